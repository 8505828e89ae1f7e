"""Settings: from the environment, a file and Python; what contradicts or is unknown; secrets."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import ftpcoord
from ftpcoord import Config, ConfigError, Endpoint, Target

DATABASE = "postgresql://app@db.example/coordination"
URL = "sftp://me@files.example/inbox"
DEFAULTS = Config(url=URL, database=DATABASE)


def config(**more: Any) -> Config:
    return Config(**{"url": URL, "database": DATABASE, **more})


def target(url: str) -> Target:
    return config(url=url).target


# -- sources ----------------------------------------------------------------------------------------------------------


def test_the_environment_a_file_and_python_give_the_same_settings(tmp_path: Path) -> None:
    values = {
        "url": URL,
        "database": DATABASE,
        "member_id": "a",
        "heartbeat_frequency": "0.5",
        "recursive": "yes",
        "max_files": "7",
        "after": "move:done",
        "exec_timeout": "1.5",
        "pattern": "*.csv, *.xml",
        "exec": "a 'b c'",
    }
    path = tmp_path / "ini"
    path.write_text("[one]\n" + "".join(f"{name} = {value}\n" for name, value in values.items()))
    (of_file,) = Config.from_file(str(path))
    of_environment = Config.from_env({f"FTPCOORD_{name.upper()}": value for name, value in values.items()})
    of_python = Config(**{**values, "heartbeat_frequency": 0.5, "recursive": True, "max_files": 7, "exec_timeout": 1.5})
    assert of_file.public() == of_environment.public() == of_python.public()
    assert of_file.recursive is True
    assert (of_file.max_files, of_file.exec_timeout) == (7, 1.5)
    assert of_file.patterns("pattern") == ["*.csv", "*.xml"]
    assert of_file.command() == ["a", "b c"]


def test_an_empty_variable_counts_as_not_set_and_others_are_not_looked_at() -> None:
    found = Config.from_env(
        {
            "FTPCOORD_URL": URL,
            "FTPCOORD_DATABASE": DATABASE,
            "FTPCOORD_MAX_FILES": "",
            "FTPCOORD_PASSWORD": "",
            "PATH": "/bin",
            "MAX_FILES": "3",
        }
    )
    assert found.max_files == 0


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_line_end_at_the_end_of_a_variable_is_no_part_of_it(end: str) -> None:
    """As `echo` into a secret leaves it, or an env-file from Windows: a SQLite file would be another one."""
    texts = {"URL": URL, "DATABASE": "sqlite:////x/c.db", "PASSWORD": " p ", "HTTP": "127.0.0.1:80", "PATTERN": "*.csv"}
    found, same = (
        Config.from_env({f"FTPCOORD_{name}": text + more for name, text in texts.items()} | {"FTPCOORD_KEY": more})
        for more in (end, "")
    )
    assert found.endpoint.name == "/x/c.db" and found.file_password() == " p "
    assert {**found.public(), "member_id": ""} == {**same.public(), "member_id": ""}


def test_relative_paths_are_meant_from_where_the_settings_were_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a handler goes later: in another SQLite file another member would be elected."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "secret").write_text("hunter2\n")
    monkeypatch.chdir(tmp_path)
    found = Config(url=URL, database="sqlite:///c.db", password_file="secret", coordination_group="g", member_id="a")
    monkeypatch.chdir("elsewhere")
    assert found.file_password() == "hunter2"
    with contextlib.closing(ftpcoord.open_database(found)) as database:
        database.prepare()
    assert (tmp_path / "c.db").exists() and not any(Path().iterdir())
    assert any(name == "database" and str(tmp_path / "c.db") in why for name, why in ftpcoord.weaknesses(found))


def test_a_host_that_knows_no_home_folder_is_no_reason_to_end(tmp_path: Path) -> None:
    """A container's user may be a number alone; `~` then stays as it is."""
    found = config(url="sftp://me@h/in", host_key="SHA256:" + "a" * 43, known_hosts="~nobody-of-that-name/known_hosts")
    assert "host_key" not in dict(ftpcoord.weaknesses(found))
    with pytest.raises(ConfigError, match=r"password_file: .* cannot be read"):
        config(password_file="~nobody-of-that-name/a\0b").file_password()


@pytest.mark.parametrize("service", ["", "METRICS_", "HTTP_2_"])
def test_what_kubernetes_adds_for_a_service_called_like_ftpcoord_is_no_setting(service: str) -> None:
    Config.from_env(
        {
            "FTPCOORD_URL": URL,
            "FTPCOORD_DATABASE": DATABASE,
            f"FTPCOORD_{service}SERVICE_HOST": "10.0.0.1",
            f"FTPCOORD_{service}SERVICE_PORT": "80",
            f"FTPCOORD_{service}SERVICE_PORT_HTTP": "80",
            f"FTPCOORD_{service}PORT": "tcp://10.0.0.1:80",
            f"FTPCOORD_{service}PORT_80_TCP": "tcp://10.0.0.1:80",
            f"FTPCOORD_{service}PORT_80_TCP_PROTO": "tcp",
        }
    )
    with pytest.raises(ConfigError, match="no such setting"):
        Config.from_env({"FTPCOORD_URL": URL, "FTPCOORD_DATABASE": DATABASE, f"FTPCOORD_{service}PORT": "8080"})


def test_an_error_from_the_environment_names_the_variable() -> None:
    with pytest.raises(ConfigError, match=r"^FTPCOORD_WORKERS: must be a whole number, not 'many'"):
        Config.from_env({"FTPCOORD_URL": URL, "FTPCOORD_DATABASE": DATABASE, "FTPCOORD_WORKERS": "many"})


def test_each_section_of_a_file_is_a_listener_and_default_is_shared(tmp_path: Path) -> None:
    path = tmp_path / "ini"
    shared, a_only = f"[DEFAULT]\ndatabase = {DATABASE}\nworkers = 2\n", f"[a]\nurl = {URL}/a%20b\n"
    path.write_text(f"{shared}{a_only}[b]\nurl = {URL}/b\nworkers = 3\n")
    a, b = Config.from_file(str(path))
    assert (a.target.path, a.workers) == ("/inbox/a b", 2), "% is no interpolation"
    assert (b.target.path, b.workers) == ("/inbox/b", 3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no section"),
        ("[DEFAULT]\nworkers = 2\n", "has no section"),
        ("password = hunter2\n", "line 1"),
        ("[a]\nhunter2\n", "line 2"),
        ("[a]\npassword = hunter2\npassword = hunter2\n", "line 3"),
        ("[a]\n[a]\n", "line 2"),
        ("[a]\nself = hunter2\n", r"\[a\] self: there is no such setting"),
        (f"[a]\nurl = {URL}\n", r"\[a\] database: is required"),
        ("[a]\nworkers = hunter2\n", r"\[a\] workers: must be a whole number"),
        ("[a]\nurl = \udcff\n", "cannot be read"),
    ],
)
def test_a_wrong_file_is_an_error_that_tells_the_place_and_no_secret(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "ini"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=said) as caught:
        Config.from_file(str(path))
    assert str(path) in str(caught.value)
    assert "hunter2" not in str(caught.value) or "workers" in text


def test_no_part_of_a_settings_file_that_is_not_utf_8_is_shown(tmp_path: Path) -> None:
    (tmp_path / "ini").write_bytes("[a]\npassword = Tr\u00f6ub\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"ini: cannot be read \(not UTF-8\)"):
        Config.from_file(str(tmp_path / "ini"))


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        Config.from_file(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["pasword", "files", "self", "cls", "", "url_", "workers_file", "Url", "target"])
def test_an_unknown_name_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: there is no such setting"):
        config(**{name: "x"})


def test_of_a_line_without_its_equals_sign_only_the_first_word_is_told(tmp_path: Path) -> None:
    (tmp_path / "ini").write_text("[a]\npassword hunter2:hunter2\n")
    with pytest.raises(ConfigError, match=r"password \.\.\.: there is no such setting") as caught:
        Config.from_file(str(tmp_path / "ini"))
    assert "hunter" not in str(caught.value)


def test_an_unknown_name_like_a_known_one_is_answered_with_that() -> None:
    with pytest.raises(ConfigError, match=r"did you mean heartbeat_frequency\?"):
        config(heartbeat="x")


@pytest.mark.parametrize("nothing", [None, ""])
def test_a_secrets_file_may_be_none(nothing: object) -> None:
    assert config(password="p", password_file=nothing).file_password() == "p"


def test_none_is_not_set() -> None:
    assert config(password=None, key=None, max_files=None, exec_timeout=None).public() == DEFAULTS.public()


# -- types and bounds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("workers", "2.5"),
        ("workers", "x"),
        ("workers", "0"),
        ("max_files", "-1"),
        ("timeout", "nan"),
        ("timeout", "inf"),
        ("timeout", "0"),
        ("timeout", "30s"),
        ("recursive", "maybe"),
        ("recursive", ""),
        ("sort", "date"),
        ("database_tls", "yes"),
        ("log_level", "INFO "),
        ("log_format", "xml"),
        ("settle", "-1"),
        ("min_age", "-0.1"),
        ("max_age", "x"),
        ("exec_timeout", "0"),
        ("ledger_retention", "-1"),
        ("max_attempts", "0"),
        ("heartbeat_frequency", "0"),
        ("polling_interval", "0"),
        ("yield_after", "-1"),
        ("stall_timeout", "0"),
        ("pattern", "a\0b"),
        ("exec", "a\0b"),
        ("timeout", "1e10"),
        ("workers", "9" * 5000),
        ("timeout", True),
        ("max_size", "0"),
        ("max_size", "-1"),
        ("max_size", "1.5M"),
        ("max_size", "1T"),
        ("max_size", "K"),
        ("min_size", "-1"),
        ("min_size", "1.5K"),
        ("ignore_case", "maybe"),
        ("file_mode", "rw-r-----"),
        ("file_mode", "0240"),
        ("file_mode", "04640"),
        ("file_mode", 640),
    ],
)
def test_a_value_of_the_wrong_type_or_beyond_its_bounds_is_an_error_that_names_the_setting(
    name: str, value: object
) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: must be "):
        config(**{name: value})


@pytest.mark.parametrize("yes", ["yes", "on", "true", "1", "Yes", " TRUE ", True, 1])
def test_yes_has_several_words(yes: object) -> None:
    assert config(recursive=yes).recursive is True


@pytest.mark.parametrize("no", ["no", "off", "false", "0", "No", False, 0])
def test_no_has_several_words(no: object) -> None:
    assert config(recursive=no).recursive is False


# -- contradictions ---------------------------------------------------------------------------------------------------

CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"database": ""}, "^database: is required.*each elect themselves"),
    ({"url": ""}, "^url: is required"),
    ({"liveness_check_interval": 4}, "^liveness_check_interval: must be at least five times"),
    ({"heartbeat_frequency": 0.3, "liveness_check_interval": 1.5}, "^liveness_check_interval: .* leaves no time"),
    ({"exec": "cat", "handler": "a:b"}, "^exec and handler: "),
    ({"ledger": False}, "^ledger: off needs after = delete or move"),
    ({"after": "remove"}, "^after: must be keep, delete or move:FOLDER"),
    ({"after": "move:"}, "^after: must be"),
    ({"after": "move: done"}, "^after: must be"),
    ({"after_error": "move:bad "}, "^after_error: must be"),
    ({"after": "move:."}, "^after: .* no folder"),
    ({"after_error": "move:a\nb"}, "^after_error: .* no folder"),
    ({"key": "id", "url": "ftp://h/x"}, "^key: is for sftp:// only, but url is ftp://"),
    ({"host_key": "SHA256:x", "url": "ftps://h/x"}, "^host_key: is for sftp:// only"),
    ({"key_passphrase": "x", "url": "ftps://h/x"}, "^key_passphrase: is for sftp:// only"),
    ({"key_passphrase_file": "/x", "url": "ftps://h/x"}, "^key_passphrase: is for sftp:// only"),
    ({"client_cert": "x"}, "^client_cert: is for ftpes:// and ftps:// only"),
    ({"client_key": "x", "url": "ftps://h/x"}, "^client_key: needs client_cert"),
    ({"host_key": "MD5:x"}, "^host_key: must be a fingerprint"),
    ({"handler": "module"}, "^handler: must be module:function"),
    ({"handler": "mod ule:f"}, "^handler: must be module:function"),
    ({"exec": "'open"}, "^exec: cannot be split into words"),
    ({"exec": "  "}, "^exec: is empty"),
    ({"http": "8080"}, "^http: must be host:port"),
    ({"http": "h:http"}, "^http: must be host:port"),
    ({"http": "h:65536"}, "^http: must be host:port"),
    ({"http": "h:\u00b2"}, "^http: must be host:port"),
    ({"http": "h:" + "1" * 5000}, "^http: must be host:port"),
    ({"pattern": ","}, "^pattern: matches nothing"),
    ({"encoding": "klingon"}, "^encoding: Python knows none called"),
    ({"encoding": "undefined"}, "^encoding: Python knows none called"),
    ({"encoding": "utf-16"}, "^encoding: must leave ASCII as it is"),
    ({"coordination_group": "a b"}, "^coordination_group: must be 1 to 128 printable ASCII"),
    ({"coordination_group": "x" * 129}, "^coordination_group: must be 1 to 128"),
    ({"coordination_group": "\u00e4"}, "^coordination_group: must be 1 to 128"),
    ({"coordination_group": "x\n"}, "^coordination_group: must be 1 to 128"),
    ({"member_id": "\u00e4"}, "^member_id: must be 1 to 128 printable ASCII"),
    ({"member_id": "step-down:7"}, "^member_id: "),
    ({"member_id": "pause:0:me@here"}, "^member_id: .*not begin with step-down: or pause:"),
    ({"password": "x", "password_file": "/x"}, "^password: is set twice"),
    ({"url_file": "/x"}, "^url: is set twice"),
]


@pytest.mark.parametrize(("more", "said"), CONTRADICTIONS, ids=[str(more)[:60] for more, _ in CONTRADICTIONS])
def test_what_contradicts_is_an_error_that_names_the_setting(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**more)


@pytest.mark.parametrize("name", ["pattern", "exclude", "download_dir", "expect", "ready_suffix"])
@pytest.mark.parametrize("quote", ["'", '"'])
def test_a_value_in_quotes_is_an_error_as_they_would_be_part_of_it(name: str, quote: str) -> None:
    """`docker --env-file` and INI files keep them: a pattern would fit nothing."""
    with pytest.raises(ConfigError, match=f"^{name}: its quotes"):
        config(**{name: f"{quote}x{quote}"})
    assert config(password='"x"').file_password() == '"x"' and config(pattern="'[a-z]' x'y").patterns("pattern")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pattern", "*.csv # the orders"),
        ("exclude", "*.bak ; old ones"),
        ("after", "move:done # by day"),
        ("after_error", "move:bad\t# for a look"),
    ],
)
def test_a_comment_behind_a_value_is_an_error_as_it_would_be_part_of_it(name: str, value: str) -> None:
    """Settings files of others and some readers of env-files take it off."""
    with pytest.raises(ConfigError, match=f"^{name}: a comment would be part of it"):
        config(**{name: value})


def test_a_hash_or_semicolon_without_blanks_around_it_is_part_of_the_value() -> None:
    assert config(pattern="No #*.csv, a;b").pattern == "No #*.csv, a;b"
    assert config(download_dir="/srv/No # 1").download_dir == "/srv/No # 1", "a folder that is not there is said"
    assert config(pattern="Invoice [#] *.pdf").pattern == "Invoice [#] *.pdf"
    assert config(password="a # b", exec="x ; {file} # y").password == "a # b"
    assert config(database="postgresql://me:a # b@host/name").database_login() == "a # b"
    assert config(schedule="0 6 * * * ; 0 7 * * *", timezone="UTC").minutes is not None


@pytest.mark.parametrize("quote", ["'", '"'])
def test_quotes_of_an_id_stay_a_part_of_it_and_the_group_is_warned_of(quote: str) -> None:
    """A service that has run with them would be in another group without them, and take all files again."""
    found = config(coordination_group=f"{quote}orders{quote}", member_id=f"{quote}a{quote}")
    assert (found.coordination_group, found.member_id) == (f"{quote}orders{quote}", f"{quote}a{quote}")
    assert "all files are new" in dict(ftpcoord.weaknesses(found))["coordination_group"]
    assert "coordination_group" not in dict(ftpcoord.weaknesses(config(coordination_group="it's")))


@pytest.mark.parametrize(
    "more",
    [
        {"exec": "'/opt/my import' '{file}'"},
        {"exec": """sh -c 'n=${1##*/}; stem=${n%.*}; import "$1" > /out/${stem}.log' sh {file}"""},
        {"exec": """sh -c 'import "$1" "${date:-today}" "${date:-$(date +%F)}"' sh {file}"""},
        {"exec": "jq '{date: .day, stem: .x}' {file}"},
        {"notify": "'/opt/alert now' 'x'"},
        {"notify": "/opt/alert --template {name} --path={path}"},
        {"notify": "env file=x /opt/alert ${file} ${stem}"},
        {"password": "'x'", "database_password": '"x"'},
    ],
    ids=str,
)
def test_what_is_plain_text_or_a_variable_of_a_shell_is_no_error(more: dict[str, str]) -> None:
    assert config(**more)


def test_a_placeholder_that_nobody_fills_in_is_an_error() -> None:
    """Each file would be copied over the one before."""
    with pytest.raises(ConfigError, match=r"^exec: \{stem\} is for requires"):
        config(exec="cp {file} /out/{stem}.csv", requires="{stem}.ok")
    for notify in ("alert {file}", "sh -c 'mail {path}'"):
        with pytest.raises(ConfigError, match=r"^notify: "):
            config(notify=notify)


def test_settings_beside_a_config_are_an_error() -> None:
    for kind in (ftpcoord.Listener, ftpcoord.Coordinator):
        with pytest.raises(ConfigError, match=r"^workers, exec: "):
            kind(DEFAULTS, workers=8, exec="true")


def test_intervals_are_checked_for_the_dialect_that_is_used() -> None:
    short = {"heartbeat_frequency": 0.2, "liveness_check_interval": 2}
    config(**short)
    with pytest.raises(ConfigError, match="leaves no time"):
        config(database="mysql://app@h/d", **short)


def test_a_coordinator_needs_a_group_instead_of_a_url() -> None:
    found = Config(database=DATABASE, coordination_group="nightly", member_id="a")
    assert (found.coordination_group, found.url) == ("nightly", "")


# -- URLs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sftp://me@h/inbox", Target("sftp", "me", "h", 22, "/inbox")),
        ("ftp://h", Target("ftp", "anonymous", "h", 21, "/")),
        ("ftp://h/", Target("ftp", "anonymous", "h", 21, "/")),
        ("ftpes://me@h:2121/a/b/", Target("ftpes", "me", "h", 2121, "/a/b")),
        ("ftps://me@h/a", Target("ftps", "me", "h", 990, "/a")),
        ("sftp://me@h/~/in/x", Target("sftp", "me", "h", 22, "in/x")),
        ("sftp://me@h/~/", Target("sftp", "me", "h", 22, ".")),
        ("sftp://me@h/~", Target("sftp", "me", "h", 22, ".")),
        ("sftp://me@h/~other/x", Target("sftp", "me", "h", 22, "/~other/x")),
        ("sftp://me@[2001:db8::1]:2222/x", Target("sftp", "me", "2001:db8::1", 2222, "/x")),
        ("sftp://me@[::1]/x", Target("sftp", "me", "::1", 22, "/x")),
        ("ftp://us%40er:p%2Fw%3A%40@h/a%20b%25%23%3F", Target("ftp", "us@er", "h", 21, "/a b%#?")),
        ("ftp://h/%FF", Target("ftp", "anonymous", "h", 21, "/\udcff")),
        ("ftp://h/%C3%A4", Target("ftp", "anonymous", "h", 21, "/\u00e4")),
        ("SFTP://me@HOST/X", Target("sftp", "me", "host", 22, "/X")),
        ("sftp://me@h/in@box", Target("sftp", "me", "h", 22, "/in@box")),
        ("sftp://me:a@b@h-1.example/x", Target("sftp", "me", "h-1.example", 22, "/x")),
        ("sftp://me@[fe80::1%25eth0]/x", Target("sftp", "me", "fe80::1%25eth0", 22, "/x")),
        ("sftp://me@b\u00fccher_1.example/x", Target("sftp", "me", "b\u00fccher_1.example", 22, "/x")),
    ],
)
def test_a_url_is_split_into_its_parts(url: str, expected: Target) -> None:
    assert target(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "files.example/inbox",
        "http://h/x",
        "sftp:///x",
        "sftp://h/x",
        "sftp://@h/x",
        "sftp://me@h:x/y",
        "sftp://me@h:99999/y",
        "sftp://me@[::1/x",
        "ftp://h/x?y",
        "ftp://h/x#y",
        "ftp://h/a%0Ab",
        "ftp://h/a%00b",
        "ftp://a%0Db@h/x",
        "ftp://a:b%0A@h/x",
        "ftp://me:12/34@h/x",
        "sftp://me:12@34/5@h/in",
        "sftp://me:12@34/@h/in",
        "sftp://me@h1,h2/in",
        "sftp://me:12@h1,h2:22/in",
        "sftp://me:12@h1;h2/in",
        "sftp://me:12@h 1/in",
        "sftp://me:12\\@h/in",
        "sftp://me:1\t2@h/in",
        "sftp://me:12#34@h/in",
        "sftp://me:12?34@h/in",
        "sftp://me:12@@/x",
        "sftp://me:12@h*/in",
        "sftp://me:12@%68/in",
    ],
)
def test_a_wrong_url_is_an_error_that_does_not_show_it(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^url: ") as caught:
        config(url=url)
    assert not re.search(r"1.?2|34", str(caught.value))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://me@h/d", Endpoint("postgresql", "me", (("h", 5432),), "d")),
        ("postgres://me@h:1/d", Endpoint("postgresql", "me", (("h", 1),), "d")),
        ("mysql://me@h/d", Endpoint("mysql", "me", (("h", 3306),), "d")),
        ("mariadb://me@h/d", Endpoint("mysql", "me", (("h", 3306),), "d")),
        ("mysql://me@a,b:3307,[::1]:3308/d", Endpoint("mysql", "me", (("a", 3306), ("b", 3307), ("::1", 3308)), "d")),
        ("mysql://m%40e:x%3A@h/d%2Fx", Endpoint("mysql", "m@e", (("h", 3306),), "d/x")),
        ("mysql://me:a@b/c@h/d", Endpoint("mysql", "me", (("h", 3306),), "d")),
        ("sqlite:///x.db", Endpoint("sqlite", "", (), "x.db")),
        ("sqlite:////var/x%20y.db", Endpoint("sqlite", "", (), "/var/x y.db")),
    ],
)
def test_a_database_url_is_split_into_its_parts(url: str, expected: Endpoint) -> None:
    assert config(database=url).endpoint == expected


@pytest.mark.parametrize(
    "url",
    [
        "db",
        "oracle://me@h/d",
        "postgresql://h/d",
        "postgresql://me@h",
        "postgresql://me@h/",
        "postgresql://me@/d",
        "postgresql://me@h:99999/d",
        "postgresql://me@h:x/d",
        "postgresql://me@a,,b/d",
        "postgresql://me@h/d?x=y",
        "sqlite://x.db",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite:///c.db?timeout=5",
        "sqlite:///%3Amemory:",
        "postgresql:me@h/d",
    ],
)
def test_a_wrong_database_url_is_an_error(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^database: "):
        config(database=url)


def test_a_question_mark_in_the_name_of_a_sqlite_file_is_told_how_to_be_kept() -> None:
    with pytest.raises(ConfigError, match="%3F"):
        config(database="sqlite:///x.db?mode=rwc")
    assert config(database="sqlite:///x.db%3Fmode=rwc").endpoint.name == "x.db?mode=rwc"


def test_tls_to_the_database_is_verified_unless_all_hosts_are_this_one() -> None:
    assert config().database_tls == "verify"
    for local in ("127.0.0.1", "localhost", "[::1]", "127.0.0.9:1,localhost"):
        assert config(database=f"mysql://me@{local}/d").database_tls == "prefer"
    assert config(database="mysql://me@localhost,db.example/d").database_tls == "verify"
    assert config(database_tls="disable").database_tls == "disable"


# -- group and member -------------------------------------------------------------------------------------------------


def test_the_group_is_made_of_the_url_without_its_password() -> None:
    assert config().coordination_group == "sftp://me@files.example:22/inbox"
    assert config(url="sftp://me:pw@files.example:22/inbox/").coordination_group == "sftp://me@files.example:22/inbox"
    assert config(url="ftp://[::1]/x").coordination_group == "ftp://anonymous@[::1]:21/x"


def test_folders_below_the_login_folder_and_absolute_ones_are_different_groups() -> None:
    below, absolute = (config(url=f"sftp://me@h{path}").coordination_group for path in ("/~/in", "/in"))
    assert below != absolute


@pytest.mark.parametrize("path", ["a%20b", "%C3%A4", "%FF", "x" * 200])
def test_a_url_that_is_no_valid_id_is_hashed(path: str) -> None:
    group = config(url=f"ftp://h/{path}").coordination_group
    assert len(group) == 64
    assert group == config(url=f"ftp://h/{path}/").coordination_group
    assert group != config(url=f"ftp://h/{path}x").coordination_group


def test_a_member_is_named_after_host_and_process() -> None:
    assert DEFAULTS.member_id.endswith(f":{os.getpid()}")
    assert ftpcoord.ID_PATTERN.match(DEFAULTS.member_id)
    assert config(member_id="step-down").member_id == "step-down"


# -- secrets ----------------------------------------------------------------------------------------------------------


def test_a_secret_from_a_file_is_read_anew_each_time(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("first\n")
    found = config(password_file=str(path), database_password_file=path)
    assert (found.file_password(), found.database_login()) == ("first", "first")
    path.write_text(" second \r\n")
    assert (found.file_password(), found.database_login()) == (" second ", " second ")
    path.unlink()
    with pytest.raises(ConfigError, match=f"^password_file: {path} cannot be read"):
        found.file_password()


def test_a_byte_order_mark_is_no_part_of_a_secret_or_of_the_settings(tmp_path: Path) -> None:
    """Some editors put one before everything."""
    (tmp_path / "secret").write_bytes(b"\xef\xbb\xbfp\xc3\xa4ss\r\n")
    assert config(password_file=str(tmp_path / "secret")).file_password() == "p\u00e4ss"
    (tmp_path / "ini").write_bytes(f"\ufeff[a]\nurl = {URL}\ndatabase = {DATABASE}\n".encode())
    (found,) = Config.from_file(str(tmp_path / "ini"))
    assert found.url == URL
    (tmp_path / "secret").write_bytes("secret".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"^password_file: .* cannot be read"):
        config(password_file=str(tmp_path / "secret")).file_password()


@pytest.mark.parametrize(
    ("text", "bytes_"), [("1", 1), ("10K", 10240), (" 2 m ", 2 << 20), ("3G", 3 << 30), (77, 77), (None, None)]
)
def test_a_size_is_in_bytes_or_with_a_letter(text: object, bytes_: object) -> None:
    assert config(max_size=text).max_size == bytes_
    if bytes_ is not None:
        assert config(min_size=text).min_size == bytes_


def test_a_least_size_may_be_none_but_not_above_the_most() -> None:
    assert config(min_size="0").min_size == config().min_size == 0
    assert config(min_size="1K", max_size="1024").min_size == 1024
    with pytest.raises(ConfigError, match=r"^min_size: must not be more than max_size"):
        config(min_size="1K", max_size="1023")


def test_no_file_is_to_wait_until_it_is_too_old() -> None:
    assert config(min_age=60, max_age=60).min_age == 60
    with pytest.raises(ConfigError, match=r"^min_age: must not be more than max_age"):
        config(min_age=61, max_age=60)


@pytest.mark.parametrize(("text", "mode"), [("0640", "0640"), ("600", "0600"), (0o664, "0664"), ("0o400", "0400")])
def test_permissions_are_octal(text: object, mode: str) -> None:
    assert config(file_mode=text).file_mode == mode


def test_a_url_may_come_from_a_file_and_its_password_is_read_anew(tmp_path: Path) -> None:
    url, database = tmp_path / "url", tmp_path / "database"
    url.write_text("ftp://me:one@h/x\n")
    database.write_text("mysql://app:two@h/d\n")
    found = Config(url_file=str(url), database_file=str(database))
    assert found.target == Target("ftp", "me", "h", 21, "/x")
    assert (found.file_password(), found.database_login()) == ("one", "two")
    url.write_text("ftp://me:three@h/x\n")
    assert found.file_password() == "three"


def test_a_setting_beats_the_password_of_the_url() -> None:
    found = config(url="ftp://me:of%2Furl@h/x", database="mysql://me:of%2Furl@h/d")
    assert (found.file_password(), found.database_login()) == ("of/url", "of/url")
    found = config(url="ftp://me:url@h/x", database="mysql://me:url@h/d", password="a", database_password="b")
    assert (found.file_password(), found.database_login()) == ("a", "b")


SECRET = "Tr0ub4dor&3"


@pytest.mark.parametrize("value", [["a", "{file}"], ("a",), {"a": 1}, {"a"}, b"a", 1j], ids=str)
@pytest.mark.parametrize("name", ["exec", "pattern", "password", "database_password", "download_dir", "notify"])
def test_what_is_no_text_is_not_taken_for_its_representation(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: must be text"):
        config(**{name: value})


def test_no_part_of_a_secret_that_is_not_utf_8_is_shown(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"Tr0\xe4b4dor")
    for found in (
        config(database_password="Tr0\udce4b4dor"),
        config(database_password_file=tmp_path / "secret"),
        config(database="mysql://me:Tr0\udce4b4dor@h/d"),
    ):
        with pytest.raises(ConfigError, match=r"^database_password.* not UTF-8") as caught:
            found.database_login()
        assert not re.search("0xe4|udce4|position", str(caught.value))


def test_secrets_are_in_no_representation() -> None:
    found = config(
        url="sftp://me:Tr0ub4dor%263@h/x",
        database=f"mysql://me:{SECRET}@h/d",
        password=SECRET,
        key_passphrase=SECRET,
        database_password=SECRET,
    )
    for text in (repr(found), str(found), str(found.public()), str(found.target), str(found.endpoint)):
        assert "Tr0ub4dor" not in text
    public = found.public()
    assert public["password"] == public["key_passphrase"] == public["database_password"] == "***"
    assert (public["url"], public["database"]) == ("sftp://me@h/x", "mysql://me@h/d")
    assert DEFAULTS.public()["password"] == ""


@pytest.mark.parametrize(
    "more",
    [
        {"password": f"{SECRET}\0"},
        {"key_passphrase": f"{SECRET}\0"},
        {"database_password": f"{SECRET}\0"},
        {"url": f"ftp://me:{SECRET}@h:x/y"},
        {"url": f"http://me:{SECRET}@h/y"},
        {"url": f"ftp://me:{SECRET}@/y"},
        {"url": f"ftp://me:{SECRET}\0@h/y"},
        {"database": f"mysql://me:{SECRET}@h:x/y"},
        {"database": f"mysql://me:{SECRET}@h"},
        {"database": f"db2://me:{SECRET}@h/y"},
        {"database": f"mysql://me:{SECRET}@h/y\0"},
        {"password": SECRET, "password_file": "/x"},
        {"url": f"ftp://me:{SECRET}@h/y", "key": "x"},
    ],
    ids=str,
)
def test_no_error_shows_a_secret(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**more)
    assert "Tr0ub4dor" not in str(caught.value)
    assert caught.value.__cause__ is None


# -- anything ---------------------------------------------------------------------------------------------------------

NAMES = list(DEFAULTS.public()) + [f"{name}_file" for name in ftpcoord.FILE_SETTINGS]
VALUES = st.one_of(
    st.text(st.characters(exclude_characters="\0"), max_size=30),
    st.sampled_from(["1", "0", "-1", "1e9", "nan", "yes", "no", "move:x", "a:b", "h:80", URL, DATABASE, "/nowhere"]),
    st.from_regex(r"(s?ftp|ftpes)://[a-z:@/\[\]%0-9.~?#]{0,20}", fullmatch=True),
    st.from_regex(r"(postgresql|mysql|sqlite)://[a-z:@/,\[\]%0-9.]{0,20}", fullmatch=True),
)


@given(st.dictionaries(st.one_of(st.sampled_from(NAMES), st.text(max_size=8)), VALUES, max_size=5), st.booleans())
@settings(max_examples=300, deadline=None)
@example({"self": "x"}, True)
@example({"cls": "x"}, True)
@example({"http": "h:\u00b2"}, True)
@example({"encoding": "undefined"}, True)
@example({"encoding": "\u00e4"}, True)
@example({"url": "ftp://[v1.x]/y"}, False)
def test_whatever_the_environment_holds_the_answer_is_settings_or_a_config_error(
    values: dict[str, str], complete: bool
) -> None:
    base = {"FTPCOORD_URL": URL, "FTPCOORD_DATABASE": DATABASE} if complete else {}
    environment = {**base, **{f"FTPCOORD_{name.upper()}": value for name, value in values.items()}}
    try:
        found = Config.from_env(environment)
    except ConfigError as exc:
        assert str(exc)
        return
    assert ftpcoord.ID_PATTERN.match(found.coordination_group)
    assert ftpcoord.ID_PATTERN.match(found.member_id)
    assert set(found.public()) == set(DEFAULTS.public())
    assert found.endpoint.name
    assert not found.url or found.target.host


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------

TOLD_TO_RUN = r"""
sh -c 'import {file}'
bash -lc "import {name}"
/bin/bash -euo pipefail -c 'x {path}'
bash -c -e 'cmd {file}' x
bash --rcfile x -c 'c {file}'
bash -O extglob -c 'c {file}'
bash -O extglob +x -c 'c {file}'
dash -c {file}
python -c 'print("{name}")'
python3.11 -Ic 'open("{file}")'
python3 -W ignore -c 'open("{file}")'
python3 --check-hash-based-pycs default -c 'open("{file}")'
/usr/bin/python3 -c'open("{file}")'
perl -e 'open "{file}"'
perl -MStorable -e 'x {file}'
perl -lane 'x {file}' y
perl -F, -i.bak -pe 's/x/{name}/' /f
ruby -rcsv -e 'x {file}'
node -e 'x("{file}")'
node --eval 'x("{file}")'
node --eval='x("{file}")'
node -pe 'x("{file}")'
php -r 'x("{file}");'
lua -e 'x("{file}")'
awk '/x/ {print "{name}"}' /f
awk -F, -v a=b 'BEGIN {system("x {file}")}'
gawk -e 'BEGIN {system("x {file}")}'
sed 's/x/{name}/' /f
sed -n -e 's/x/{name}/e' /f
sed -i.bak 's/x/{name}/' /f
sed --expression='s/x/{name}/' /f
cmd /c 'import {file}'
cmd.exe /c import {file}
import.bat {file}
powershell -Command "import {file}"
powershell.exe -NoProfile -ExecutionPolicy Bypass -Command "import {file}"
pwsh -c 'x {file}'
env sh -c 'x {file}'
env FOO=bar BAR=baz bash -c 'x {file}'
/usr/bin/env -i sh -c 'x {file}'
env -S 'sh -c "x {file}"'
env --split-string='import {file}'
sudo -u app sh -c 'x {file}'
nice -n 5 bash -c 'x {file}'
timeout 10 sh -c 'x {file}'
timeout -k 5 10 nice sudo -n env A=b sh -c 'x {file}'
ssh host 'cmd {file}'
ssh -i /k -p 22 me@host import {file}
ssh host cat {file}
su -c 'import {file}' app
su app -c 'import {file}'
docker exec c sh -c 'x {file}'
kubectl exec pod -- sh -c 'x {file}'
mywrapper sh -c 'x {file}'
busybox sh -c 'x {file}'
script -qc 'x {file}' /dev/null
eval x {file}
parallel import {file}
make import FILE={file}
xargs sh -c 'x {file}'
psql -c "copy t from '{file}'"
mysql db -e "load data infile '{file}'"
sqlite3 db "insert into t values ('{name}')"
{file}
sh {file}
python3 {file}
tclsh -c 'x {file}'
flock /l -c 'x {file}'
find /x -exec sh -c 'x {file}' ;
setpriv --pdeathsig KILL sh -c 'x {file}'
stdbuf -oL sh -c 'x {file}'
osascript -e 'x {file}'
deno eval 'x {file}'
fish -c 'x {file}'
zsh -fc 'x {file}'
sh -xc 'echo $1 {name}' sh {file}
Rscript -e 'read.csv("{file}")'
"""

DATA = r"""
/usr/local/bin/import {file}
sh -c 'import "$1"' sh {file}
sh -c 'import "$FTPCOORD_FILE"'
bash -euo pipefail -c 'import "$1" "$2"' sh {file} {name}
sh /opt/import.sh {file}
bash -e /opt/import.sh --name={name} {file}
python3 /opt/load.py -c {file}
python3 -u /opt/load.py -e {file} --eval {name}
python -m importer -c {file}
python3 -c 'import sys; print(sys.argv)' {file} x{name}
perl -ne 'print' {file}
perl /opt/x.pl -e {file}
node --max-old-space-size=4096 app.js {file}
node app.js -e {file}
awk -F, '{print $1}' {file}
awk -v name={name} -f /opt/p.awk {file}
awk -vname={name} '{print name}' {file}
sed -n 's/x/y/p' {file}
sed -e s/x/y/ {file}
env FOO={name} import {file}
env import {file}
sudo -u app /opt/import {file}
nice -n 5 timeout 10 import -c {file}
powershell -NoProfile -File x.ps1 {file}
psql -v f={file} -f load.sql
psql --set=f={file} -f load.sql
mail -s 'New file {name}' ops@example
curl -T {file} https://x/{name}
deploy --via ssh {file}
tool --lang python {file}
cp {file} /srv/{name}
docker run --rm -v {file}:/in importer /in
php /opt/x.php {file}
jq . {file}
flock /lock import {file}
scp {file} host:/in/
tar -xzf {file}
gpg --batch --decrypt {file}
java -jar x.jar {file}
"""


@pytest.mark.parametrize("command", TOLD_TO_RUN.strip().splitlines())
def test_a_placeholder_in_what_an_interpreter_is_told_to_run_is_refused_and_the_variable_is_named(command: str) -> None:
    with pytest.raises(ConfigError, match=r'exec: .*"\$FTPCOORD_FILE"'):
        config(exec=command)


@pytest.mark.parametrize("command", DATA.strip().splitlines())
def test_a_placeholder_that_is_an_argument_is_accepted(command: str) -> None:
    assert config(exec=command).command()
