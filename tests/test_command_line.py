"""The command line: each command, its exit codes, one clear line for whatever is wrong, and no secret in any of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from conftest import Database, Files, new_folder, wait_for
from hostile import FtpHost, SftpHost
from members import Crew, Member, ftpcoord, kinds, never
from processes import MEMBER, MODULE, Process, compiled, environment

CANARY = "canary-2b7e1516"  # in every secret of the tests that look for secrets

# ----------------------------------------------------------------------------- fixtures


@pytest.fixture
def ftps(vsftpd_explicit: servers.Vsftpd) -> Iterator[Files]:
    with new_folder("vsftpd-explicit", vsftpd_explicit) as folder:
        yield folder


# ----------------------------------------------------------------------------- what is wrong, in one line


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> str:
    """It ended with that code and one line on stderr that has these words."""
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("ftpcoord: "), done.stderr
    for word in words:
        assert word.lower() in lines[0].lower(), lines[0]
    assert CANARY not in done.stdout + done.stderr
    return lines[0]


WRONG_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"database": None}, "database"),
    ({"database": ""}, "database"),
    ({"database": "oracle://u@h/d"}, "database"),
    ({"database": f"postgresql://u:{CANARY}@h:99999/d"}, "database"),
    ({"database": f"postgresql://u:{CANARY}@h"}, "database"),
    ({"database": f"postgresql://u:{CANARY}@h/d?sslmode=off"}, "database"),
    ({"url": f"http://u:{CANARY}@h/"}, "url"),
    ({"url": f"sftp://:{CANARY}@h/"}, "url"),
    ({"url": f"ftp://u:{CANARY}@h:port/"}, "url"),
    ({"url": f"ftp://u:{CANARY}@h/a?b"}, "url"),
    ({"url": f"ftp://u:{CANARY}@h/a%0d%0aDELE%20x"}, "url"),
    ({"url": None, "coordination_group": None}, "url"),
    ({"url": None}, "url"),
    ({"polling_intervall": "5"}, "polling_intervall"),
    ({"polling_interval": "often"}, "polling_interval"),
    ({"polling_interval": "0"}, "polling_interval"),
    ({"polling_interval": "nan"}, "polling_interval"),
    ({"settle": "-1"}, "settle"),
    ({"workers": "0"}, "workers"),
    ({"workers": "1.5"}, "workers"),
    ({"max_attempts": "0"}, "max_attempts"),
    ({"recursive": "perhaps"}, "recursive"),
    ({"sort": "colour"}, "sort"),
    ({"after": "burn"}, "after"),
    ({"after": "move:"}, "after"),
    ({"after_error": "move"}, "after_error"),
    ({"ledger": "off"}, "ledger"),
    ({"heartbeat_frequency": "3"}, "liveness_check_interval"),
    ({"heartbeat_frequency": "0.05", "liveness_check_interval": "0.3"}, "liveness_check_interval"),
    ({"member_id": "two words"}, "member_id"),
    ({"member_id": "x" * 129}, "member_id"),
    ({"member_id": "step-down:7"}, "member_id"),
    ({"coordination_group": "grün"}, "coordination_group"),
    ({"exec": 'sh -c "unclosed'}, "exec"),
    ({"exec": "no-such-command {file}"}, "exec"),
    ({"handler": "module:function"}, "exec"),
    ({"exec": None, "handler": "nothing"}, "handler"),
    ({"exec": None, "handler": "no_such_module:function"}, "handler"),
    ({"exec": None, "handler": "os.path:sep"}, "handler"),
    ({"download_dir": "/no/such/folder"}, "download_dir"),
    ({"http": "8080"}, "http"),
    ({"encoding": "klingon"}, "encoding"),
    ({"log_format": "xml"}, "log_format"),
    ({"database_tls": "maybe"}, "database_tls"),
    ({"key": "/no/such/key"}, "key"),
    ({"host_key": "SHA256:abc"}, "host_key"),
    ({"password": CANARY, "password_file": "/etc/hostname"}, "password"),
    ({"password": None, "password_file": "/no/such/file"}, "password"),
    ({"pattern": ","}, "pattern"),
]


@pytest.mark.parametrize("command", ["check", "run"])
def test_wrong_settings_are_one_line_that_names_the_setting_and_exit_code_2(crew: Crew, command: str) -> None:
    """`run` finds some of them only when it starts, but before it has connected."""
    before = crew.files.server.connections()
    for changes, name in WRONG_SETTINGS if command == "check" else WRONG_SETTINGS[::6]:
        if command == "run" and name in ("download_dir", "exec"):
            continue  # may be mended while it runs: it waits
        done = crew.run(**changes) if command == "run" else crew.call("check", **changes)
        assert name in refused(done, 2).lower(), (changes, done.stderr)
    assert crew.files.server.connections() - before <= 1  # an unreadable password is found when it is needed


def test_nothing_to_do_with_a_file_is_an_error(crew: Crew) -> None:
    for command in ("run", "check"):
        refused(crew.run(command, exec=None), 2, "exec", "download_dir", "handler")


def test_a_member_that_forgets_the_database_does_not_start(crew: Crew) -> None:
    """Two of them would each elect themselves."""
    crew.files.put("1.txt", b"x")
    for changes in ({"database": None}, {"database": ""}):
        refused(crew.run("run", "--once", **changes), 2, "database: is required")
    assert crew.names("begin") == [] and not (crew.folder / "coordination.db").exists()


def test_wrong_usage_ends_with_exit_code_2(crew: Crew) -> None:
    for words in (["fly"], ["status", "--xml"], ["schema", "oracle"], ["files", "--state", "lost"], ["--config"]):
        done = crew.run(*words)
        assert done.returncode == 2 and "usage:" in done.stderr and not done.stdout
    refused(crew.run("--config", "/no/such/file.ini", "check"), 2, "/no/such/file.ini")
    refused(crew.call("schema", "mysql", "--apply"), 2, "schema", "sqlite")


def test_a_broken_settings_file_is_one_line_without_its_content(crew: Crew) -> None:
    path = crew.folder / "settings.ini"
    for text, words in [
        (f"password = {CANARY}\n", ["line 1"]),
        (f"[a]\npassword {CANARY}\n", ["line 2"]),
        (f"[a]\npassword = {CANARY}\n[a]\n", ["line 3"]),
        ("", ["section"]),
        (f"[DEFAULT]\npassword = {CANARY}\n", ["section"]),
        (f"[a]\npassword = {CANARY}\nurl = ftp://u@h/\n", ["[a]", "database"]),
        (f"[a]\npasword = {CANARY}\n", ["[a]", "pasword"]),
        (f"[a]\nurl = ftp://u:{CANARY}@h:x/\ndatabase = sqlite:///x\n", ["[a]", "url"]),
    ]:
        path.write_text(text)
        refused(crew.call("--config", str(path), "check", environment=os.environ), 2, str(path), *words)
    path.write_bytes(b"[a]\npassword = \xff\n")
    refused(crew.call("--config", str(path), "check", environment=os.environ), 2, str(path))


@pytest.mark.parametrize("driver", ["pg8000", "pymysql", "paramiko"])
def test_a_missing_driver_is_one_line_that_names_the_pip_command(
    crew: Crew, sftp: Files, driver: str, tmp_path: Path
) -> None:
    """From `run`, too: it does not wait for somebody to install it."""
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / "sitecustomize.py").write_text(f"import sys\nsys.modules['{driver}'] = None\n")  # as if it were not there
    cases: dict[str, dict[str, Any]] = {
        "pg8000": {"database": f"postgresql://u:{CANARY}@127.0.0.1:1/d"},
        "pymysql": {"database": f"mysql://u:{CANARY}@127.0.0.1:1/d", "liveness_check_interval": 8},
        "paramiko": {**sftp.settings, "password": None},
    }
    environment = {**crew.environment(**cases[driver]), "PYTHONPATH": f"{shadow}{os.pathsep}{MODULE.parent}"}
    for words in (["check"], ["run"]):
        done = crew.run(*words, environment=environment)
        refused(done, 2 if driver == "paramiko" else 1, f"pip install {driver}")


@kinds("postgresql", "mysql", "mariadb")
def test_missing_tables_are_said_with_the_ddl_of_just_those_until_schema_apply_has_made_them(
    database: Database, files: Files, tmp_path: Path
) -> None:
    dialect = "postgresql" if database.name == "postgresql" else "mysql"
    with Crew(tmp_path, database, files, tables=False) as crew:
        for words in (["check"], ["run"], ["status"], ["step-down"]):
            done = crew.run(*words)
            assert done.returncode == 1 and done.stderr.startswith("ftpcoord: "), done.stderr
            for table in ("token_holder", "health_check", "file_ledger"):
                assert f"CREATE TABLE IF NOT EXISTS {table}" in done.stderr
            assert f"schema {dialect} --apply" in done.stderr
        # Nothing is made unasked. What is missing alone is printed, and what can be done without is said.
        database.execute(ftpcoord.ddl(dialect == "mysql")["token_holder"])
        database.execute(ftpcoord.ddl(dialect == "mysql")["health_check"])
        done = crew.run("check")
        assert done.returncode == 1 and re.findall(r"EXISTS (\w+)", done.stderr) == ["file_ledger"]
        assert "ledger = off" in done.stderr
        assert crew.call("check", ledger="off", after="delete").returncode == 0

        done = crew.run("schema", dialect, "--apply")
        assert (done.returncode, done.stdout) == (0, "created file_ledger, file_audit\n")
        done = crew.call("schema", dialect, "--apply")
        assert (done.returncode, done.stdout) == (0, "all tables are there\n")
        assert crew.call("check").returncode == 0
        done = crew.run("schema", dialect, environment={"PATH": "/nowhere"})
        assert done.returncode == 0 and done.stdout.count("CREATE TABLE") == len(ftpcoord.TABLES)
        files.put("1.txt", b"x")
        assert crew.run("run", "--once").returncode == 0
        crew.handled("1.txt")


@kinds("postgresql", "mysql")
def test_a_database_that_refuses_the_login_or_cannot_be_reached_is_one_line(
    database: Database, files: Files, tmp_path: Path
) -> None:
    with Crew(tmp_path, database, files) as crew:
        wrong = database.url.replace("secret", CANARY)
        for words in (["check"], ["run"], ["status"]):
            refused(crew.run(*words, database=wrong), 1, "database", "app")
        refused(crew.call("check", database=database.url.replace(":secret", ""), database_password=CANARY), 1, "app")
        refused(crew.call("check", database=database.url + "_absent"), 1, "_absent")
        port = servers.free_port()
        nobody = re.sub(r":\d+/", f":{port}/", wrong)
        refused(crew.call("check", database=nobody), 1, "database", str(port))
        refused(crew.call("status", database=nobody), 1, "database", str(port))
        never_there = re.sub(r"@[^/]*/", "@no-such-host.invalid/", wrong)
        refused(crew.call("check", database=never_there), 1, "no-such-host.invalid")


def test_a_file_server_that_refuses_or_cannot_be_reached_is_one_line(
    crew: Crew, files: Files, sftp: Files, ftps: Files, tmp_path: Path, mysql: servers.Mysql
) -> None:
    away = re.sub(r":\d+/", f":{servers.free_port()}/", files.url)
    other = tmp_path / "known_hosts"
    other.write_text("")
    changed = tmp_path / "changed_hosts"
    key = "AAAAC3NzaC1lZDI1NTE5AAAAIDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDEy"
    changed.write_text(re.sub(r"(ssh-ed25519) \S+", rf"\1 {key}", sftp.server.known_hosts.read_text()))
    wrong_ca = ftps.server.ca.parent / "other-ca.pem"
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"password": CANARY}, ["login", "ftptest"]),
        ({"url": away, "password": CANARY}, [away.split("@")[1].split("/")[0]]),
        ({"url": files.url + "/absent"}, ["absent"]),
        ({"url": "ftp://u@no-such-host.invalid/", "password": CANARY}, ["no-such-host.invalid"]),
        ({**sftp.settings, "password": CANARY, "key": None, "user": None}, ["login", sftp.server.user]),
        ({**sftp.settings, "password": None, "known_hosts": other}, ["SHA256:", "nothing was sent"]),
        ({**sftp.settings, "password": None, "known_hosts": tmp_path / "absent"}, ["SHA256:", "nothing was sent"]),
        ({**sftp.settings, "password": None, "host_key": "SHA256:" + "x" * 43}, ["SHA256:", "nothing was sent"]),
        ({**sftp.settings, "password": None, "known_hosts": changed}, ["key", "nothing was sent"]),
        ({**sftp.settings, "password": None, "url": sftp.url + "/absent"}, ["absent"]),
        ({**ftps.settings, "ca_file": wrong_ca}, ["certificate"]),
        ({**ftps.settings, "ca_file": None}, ["certificate"]),
        ({**ftps.settings, "url": ftps.url.replace("127.0.0.1", "127.0.0.2")}, ["127.0.0.2"]),
        ({**ftps.settings, "url": ftps.url.replace("ftpes", "ftp"), "ca_file": None}, ["login"]),
        ({"url": files.url.replace("ftp:", "ftpes:")}, ["TLS"]),
        ({"url": f"sftp://u@127.0.0.1:{files.server.port}/", "password": CANARY}, ["SSH"]),
        ({"url": f"ftp://u@127.0.0.1:{mysql.port}/", "password": CANARY}, ["127.0.0.1", "FTP"]),
    ]
    for changes, words in cases:
        changes.pop("user", None)
        refused(crew.call("check", **{"timeout": 5, **changes}), 1, *words)


def test_a_secret_from_a_file_or_from_a_url_is_used_and_never_shown(
    postgresql: Database, files: Files, tmp_path: Path
) -> None:
    """The crew looks for the password in all output, at every level of the log."""
    for name in ("password", "database_password", "database"):
        (tmp_path / name).write_text((postgresql.url if name == "database" else "secret") + "\n")
    with_password = files.url.replace("@", ":secret@")
    with Crew(tmp_path, postgresql, files, log_level="debug") as crew:
        bare = postgresql.url.replace(":secret", "")
        ways: list[dict[str, Any]] = [
            {
                "password": None,
                "password_file": tmp_path / "password",
                "database": bare,
                "database_password_file": tmp_path / "database_password",
            },
            {"password": None, "url": with_password, "database": None, "database_file": tmp_path / "database"},
        ]
        for number, way in enumerate(ways):
            done = crew.run("check", **way)
            assert done.returncode == 0, done.stderr
            assert done.stdout.splitlines()[-1] == "ok"
            files.put(f"{number}.txt", b"x")
            assert crew.run("run", "--once", **way).returncode == 0
            assert crew.run("status", **way).returncode == 0
        crew.handled("0.txt", "1.txt")
        assert "secret" not in json.dumps([run.environment for run in crew.runs()])


# ----------------------------------------------------------------------------- commands


def test_version_and_help(crew: Crew) -> None:
    done = crew.run("--version")
    assert (done.returncode, done.stdout) == (0, f"ftpcoord {ftpcoord.__version__}\n")
    done = crew.run("--help")
    for word in ("run", "check", "status", "schema", "files", "retry", "skip", "adopt", "step-down", "--config"):
        assert word in done.stdout
    assert done.returncode == 0


def test_check_fails_where_nobody_understands_the_listing_and_the_dry_run_says_what_is_left(tmp_path: Path) -> None:
    line = b"lrwxrwxrwx    1 0        0               9 Jul 20  2024 l -> a"
    with FtpHost(files={"a": b"1"}, mlsd=False) as host:
        settings = {**host.settings, "timeout": 30, "database": f"sqlite:///{tmp_path}/x.db"}
        settings["download_dir"] = str(tmp_path)

        def run(*words: str) -> Any:
            return subprocess.run([*compiled(), *words], env=environment(settings), capture_output=True, text=True)

        host.lines.append(line)
        assert run("check").returncode == 0
        assert "skip  /in/l  a link" in run("run", "--dry-run").stdout
        host.files.clear()
        host.lines[:] = [line[4:]]
        done = run("check")
        assert done.returncode == 1 and "not understood" in done.stderr and "l -> a" in done.stderr


def test_whoever_stops_reading_gets_no_more_and_nothing_else_is_said(crew: Crew) -> None:
    """`run --dry-run | head -1`"""
    for number in range(3000):
        crew.files.put(f"{number:0100}.txt", b"")
    command = [sys.executable, str(MODULE), "run", "--dry-run"]
    with subprocess.Popen(command, env=crew.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_change_no_exit_code_and_nothing_is_said(tmp_path: Path, closed: str) -> None:
    with FtpHost(files={"a.csv": b"x"}) as host:
        settings = {**host.settings, "database": f"sqlite:///{tmp_path / 'c.db'}", "exec": "true", "settle": 0}
        start = [sys.executable, str(MODULE)] if "<" in closed else compiled()
        for words in ("run --once", "check", "files", "status --json", "schema sqlite", "run --dry-run"):
            shell = f'exec "$0" "$@" {closed}'
            done = subprocess.run(
                ["sh", "-c", shell, *start, *words.split()],
                env=environment(settings),
                capture_output=True,
            )
            assert (done.returncode, done.stderr) == (0, b""), words


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("command", ["status", "status --json", "schema sqlite", "pause", "run --dry-run"])
def test_output_that_cannot_be_written_is_one_line_and_exit_code_1(tmp_path: Path, command: str) -> None:
    with FtpHost(files={"a.csv": b"x"}) as host, open("/dev/full", "wb") as full:
        settings = {**host.settings, "database": f"sqlite:///{tmp_path / 'c.db'}", "exec": "true", "settle": 0}
        done = subprocess.run(
            [*compiled(), *command.split()],
            env=environment(settings),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    done.stdout = ""
    refused(done, 1, "standard output: no space left")


def test_schema_apply_makes_the_tables_of_every_section_of_that_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = ["postgresql://u@127.0.0.1:1/x", f"sqlite:///{tmp_path / 'a.db'}", f"sqlite:///{tmp_path / 'b.db'}"]
    sections = [
        f"[{number}]\ncoordination_group = g{number}\ndatabase = {url}\n"
        for number, url in enumerate([*urls, urls[-1]])
    ]
    (tmp_path / "ini").write_text("".join(sections))
    assert ftpcoord.main(["--config", str(tmp_path / "ini"), "schema", "sqlite", "--apply"]) == 0
    assert {path.name for path in tmp_path.glob("*.db")} == {"a.db", "b.db"}
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert ftpcoord.main(["--config", str(tmp_path / "ini"), "schema", "mysql", "--apply"]) == 2


def test_check_fails_where_files_cannot_be_delivered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = f"[a]\nurl = ftp://u@h/\ndatabase = sqlite:///{tmp_path / 'c.db'}\ndownload_dir = {tmp_path}\n"
    (tmp_path / "ini").write_text(lines)
    monkeypatch.setattr(os, "access", lambda *_: False)  # as in a file system that is mounted read-only
    assert ftpcoord.main(["--config", str(tmp_path / "ini"), "check"]) == 2
    assert "download_dir" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="there is no /proc")
def test_an_idle_standby_as_a_script_needs_little_memory_and_keeps_its_process(
    postgresql: Database, files: Files, tmp_path: Path
) -> None:
    with Crew(tmp_path, postgresql, files) as crew:
        crew.start("a").wait("elected")
        standby = crew.add(Member("b", MEMBER, crew.environment(member_id="b"), tmp_path))
        standby.wait("standby")
        status = Path(f"/proc/{standby.pid}/status")

        def resident() -> int:
            return int(next(line.split()[1] for line in status.read_text().splitlines() if "VmRSS" in line))

        wait_for(lambda: resident() < 31 * 1024, 30, "KiB")
        assert str(MODULE) in Path(f"/proc/{standby.pid}/cmdline").read_text()
        assert standby.stop() == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="there is no /proc")
def test_a_service_writes_nothing_beside_its_file_and_a_standby_loads_no_ssh(tmp_path: Path) -> None:
    (tmp_path / "program").mkdir()
    script = Path(shutil.copy(MODULE, tmp_path / "program"))
    with SftpHost({"a": b"1"}) as host, contextlib.ExitStack() as stack:

        def loaded(member: str, word: str) -> str:
            settings = {**host.settings, "database": f"sqlite:///{tmp_path}/db", "member_id": member, "exec": "true"}
            env = {**environment(settings), "PYTHONDONTWRITEBYTECODE": ""}
            process = Process(member, [sys.executable, str(script), "--config", "env"], env, tmp_path)
            stack.enter_context(process)
            wait_for(lambda: any(word in line for line in process.lines()), 30, process.said())
            return Path(f"/proc/{process.pid}/maps").read_text()

        assert "cryptography" in loaded("active", " polled ") and "cryptography" not in loaded("standby", " standby ")
    assert os.listdir(script.parent) == [script.name]


def test_check_changes_nothing(crew: Crew) -> None:
    crew.files.put("1.txt", b"x")
    done = crew.run("check")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "ok"
    assert crew.files.names() == ["1.txt"] and crew.names("begin") == []
    assert crew.database.execute("SELECT * FROM token_holder") == []
    assert crew.database.execute("SELECT * FROM health_check") == []


def test_files_shows_what_the_ledger_knows(crew: Crew) -> None:
    crew.files.put("bad.txt", b"12345")
    crew.fail()
    assert crew.run("run", "--once", max_attempts=1).returncode == 0
    crew.fail(False)
    crew.files.put("good.txt", b"x")
    assert crew.run("run", "--once").returncode == 0
    rows = [json.loads(line) for line in crew.call("files", "--json").stdout.splitlines()]
    assert [(os.path.basename(row["path"]), row["state"], row["size"]) for row in rows] == [
        ("bad.txt", "quarantined", 5),
        ("good.txt", "done", 1),
    ]
    assert "this file is no good" in rows[0]["error"] and rows[0]["attempts"] == 1
    assert {row["group"] for row in rows} == {"crew"}
    rows = [json.loads(line) for line in crew.call("files", "--state", "done", "--json").stdout.splitlines()]
    assert [os.path.basename(row["path"]) for row in rows] == ["good.txt"]
    text = crew.call("files", "--state", "quarantined").stdout
    assert "bad.txt" in text and "no good" in text and "good.txt" not in text
    assert crew.call("files", "--state", "claimed").stdout == ""
    refused(crew.call("files", ledger="off", after="delete"), 2, "ledger")


def test_retry_puts_quarantined_files_back_and_retry_done_those_that_are_done(crew: Crew) -> None:
    for name in ("a.csv", "b.csv", "c.txt"):
        crew.files.put(name, b"x")
    crew.fail()
    assert crew.run("run", "--once", max_attempts=1).returncode == 0
    crew.fail(False)
    assert set(crew.states().values()) == {"quarantined"}
    assert crew.run("run", "--once").returncode == 0 and crew.names() == []
    done = crew.run("retry", "*.csv")
    assert (done.returncode, done.stdout.split()[0]) == (0, "2")
    assert crew.run("run", "--once").returncode == 0
    crew.handled("a.csv", "b.csv")
    assert {run.attempt for run in crew.runs()} == {2}, "the handler is told"
    assert crew.call("retry", "a.csv").stdout.split()[0] == "0"
    assert crew.call("retry", "--done", "a.*").stdout.split()[0] == "1"
    assert crew.run("run", "--once").returncode == 0
    crew.handled("a.csv", "a.csv", "b.csv")
    assert crew.states() == {"a.csv": "done", "b.csv": "done", "c.txt": "quarantined"}
    assert crew.call("retry").stdout.split()[0] == "1"


def test_skip_records_failed_and_quarantined_versions_as_done_and_leaves_the_files(crew: Crew) -> None:
    for name in ("a.csv", "b.csv", "c.txt"):
        crew.files.put(name, b"x")
    crew.fail()
    assert crew.run("run", "--once", max_attempts=1, pattern="a.*, c.*").returncode == 0
    assert crew.run("run", "--once", retry_delay=600, pattern="b.*").returncode == 1
    assert crew.states() == {"a.csv": "quarantined", "b.csv": "failed", "c.txt": "quarantined"}
    done = crew.run("skip", "*.csv", after="delete")
    assert (done.returncode, done.stdout) == (0, "2 files skipped\n")
    assert crew.states() == {"a.csv": "done", "b.csv": "done", "c.txt": "quarantined"}
    assert crew.call("skip", "*.csv").stdout == "0 files skipped\n"
    crew.fail(False)
    assert crew.run("run", "--once", after="delete").returncode == 0
    assert crew.names() == [], "none of them was handled"
    assert {"a.csv", "b.csv", "c.txt"} <= set(crew.files.names()), "nor removed"
    crew.files.put("a.csv", b"another version")
    assert crew.run("run", "--once").returncode == 0
    crew.handled("a.csv")
    refused(crew.call("skip", "*", ledger="off", after="delete"), 2, "ledger")


def test_skip_refuses_what_is_in_work_and_skips_the_rest(crew: Crew) -> None:
    crew.files.put("bad.csv", b"x")
    crew.files.put("busy.csv", b"x")
    crew.fail()
    assert crew.run("run", "--once", max_attempts=1).returncode == 0
    crew.database.execute("UPDATE file_ledger SET state = 'claimed' WHERE path LIKE '%/busy.csv'")
    done = crew.call("skip", "*.csv")
    assert done.stdout == "1 files skipped\n"
    refused(done, 1, "in work", "busy.csv")
    assert crew.states() == {"bad.csv": "done", "busy.csv": "claimed"}
    assert crew.run("adopt").returncode == 0
    assert crew.states()["busy.csv"] == "claimed"


def test_retry_is_seen_by_a_running_member(postgresql: Database, files: Files, tmp_path: Path) -> None:
    with Crew(tmp_path, postgresql, files, max_attempts=1) as crew:
        crew.fail()
        files.put("a.csv", b"x")
        member = crew.start("a")
        member.wait("file_quarantined")
        crew.fail(False)
        assert crew.call("retry").returncode == 0
        crew.handled("a.csv")
        wait_for(lambda: crew.states() == {"a.csv": "done"})
        assert crew.call("retry", "--done").returncode == 0
        crew.handled("a.csv", "a.csv")


def test_adopt_records_what_is_there_as_done(crew: Crew) -> None:
    crew.files.put("old.txt", b"x")
    crew.files.put("failed.txt", b"x")
    crew.fail()
    assert crew.run("run", "--once", max_attempts=1, pattern="failed.*").returncode == 0
    crew.fail(False)
    done = crew.run("adopt")
    assert done.returncode == 0 and done.stdout.startswith("2 files")
    assert crew.states() == {"old.txt": "done", "failed.txt": "quarantined"}, "what is known stays as it is"
    crew.files.put("new.txt", b"x")
    assert crew.run("run", "--once").returncode == 0
    crew.handled("new.txt")
    crew.files.put("old.txt", b"another version")
    assert crew.run("run", "--once").returncode == 0
    crew.handled("new.txt", "old.txt")


def test_step_down_waits_for_the_handler_and_hands_over(postgresql: Database, files: Files, tmp_path: Path) -> None:
    with Crew(tmp_path, postgresql, files) as crew:
        refused(crew.call("step-down"), 1, "no active member")
        first = crew.start("a")
        first.wait("elected")
        second = crew.start("b")
        second.wait("standby")
        crew.hold()
        files.put("1.txt", b"x")
        crew.begun(1)
        done = crew.run("step-down")
        assert done.returncode == 0 and "a" in done.stdout
        asked = first.wait("handing_over")
        files.put("2.txt", b"x")
        never(lambda: first.events("released") or second.events("elected"), 3 * crew.heartbeat, "it did not wait")
        crew.let_go()
        released = first.wait("released", since=asked.at)
        elected = second.wait("elected", term=2)
        assert crew.runs()[0].at <= released.at <= elected.at
        assert not first.events("lost")
        crew.handled("1.txt", "2.txt")
        assert [(run.member, run.attempt) for run in crew.runs()] == [("a", 1), ("b", 1)]
        # It stands by, and the request is not left behind for the next term.
        first.wait("standby", active="b")
        polls = second.polls()
        wait_for(lambda: second.polls() >= polls + 3)
        assert crew.token() == ("b", 2)
        assert crew.call("step-down").returncode == 0
        first.wait("elected", term=3)


def test_the_command_line_needs_no_environment(tmp_path: Path) -> None:
    command = [sys.executable, "-I", str(MODULE), "schema", "sqlite"]
    done = subprocess.run(command, env={}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("CREATE TABLE") == len(ftpcoord.TABLES)
