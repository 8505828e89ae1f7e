"""Commands of the settings that each FTP connection begins with: `site`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from conftest import Files, new_folder
from hostile import FtpHost, Site, reply

import ftpcoord


def settings(**more: Any) -> ftpcoord.Config:
    return ftpcoord.Config(**{"database": "sqlite:///unused.db", "url": "ftp://me@files.example/in", **more})


@pytest.mark.parametrize(
    ("text", "commands"),
    [
        ("", []),
        ("SITE LISTFMT 1", ["SITE LISTFMT 1"]),
        (" site UMASK 027 ; Opts UTF8 ON; ", ["site UMASK 027", "Opts UTF8 ON"]),
        ("OPTS MLST type;size;modify;", ["OPTS MLST type;size;modify;"]),
        ("OPTS MLST size;modify;;SITE X y z", ["OPTS MLST size;modify;", "SITE X y z"]),
        ("SITE X;OPTS MLST size;modify; SITE Y", ["SITE X", "OPTS MLST size;modify;", "SITE Y"]),
    ],
)
def test_commands_are_separated_by_semicolons_and_the_facts_of_mlst_keep_theirs(text: str, commands: list[str]) -> None:
    assert settings(site=text).site_commands() == commands


@pytest.mark.parametrize(
    "text",
    [
        "PORT 127,0,0,1,4,1",
        "SITE X; DELE a",
        "OPTS MLST type;DELE a",
        "SITE",
        "SITE ;",
        "OPTS MLST size;modify",
        "SITEX y",
        "SITE X\r\nDELE a",
        "SITE X\nSITE Y",
        "SITE X; \r SITE Y",
        "SITE X\0",
        ";",
    ],
)
def test_another_command_or_a_line_break_is_a_wrong_setting(text: str) -> None:
    with pytest.raises(ftpcoord.ConfigError, match=r"^site: .*SITE or OPTS.*active mode and the like are not built"):
        settings(site=text)


def test_it_is_for_ftp_only() -> None:
    with pytest.raises(ftpcoord.ConfigError, match=r"^site: is for ftp:// and ftpes:// and ftps:// only"):
        settings(url="sftp://me@h/in", site="SITE X")


def test_each_connection_begins_with_them_after_its_own_options_and_before_any_path(tmp_path: Path) -> None:
    with FtpHost(files={f"{number}.csv": b"1" for number in range(20)}) as host:
        host.on("SITE", reply("200 so be it"), times=None)
        host.on("OPTS", reply("202 not needed here"), times=None)
        with Site(tmp_path, host.settings, site="SITE LISTFMT 1; OPTS UTF8 OFF", workers=3) as site:
            site.arrive({f"{number}.csv": b"1" for number in range(20)})
        first = host.commands[: host.commands.index("PWD") + 1]
        assert first[-4:] == ["TYPE I", "SITE LISTFMT 1", "OPTS UTF8 OFF", "PWD"]
        assert "OPTS MLST type;size;modify;" not in first[first.index("TYPE I") :]
        logins = sum(command.startswith("PASS") for command in host.commands)
        assert logins > 1 and len(host.said("SITE")) == logins
        assert host.commands.count("OPTS UTF8 OFF") == logins


@pytest.mark.parametrize("refusal", ["500 unknown", "550 not for you", "530 not that", "331 more?", "421 too much"])
def test_a_refusal_is_trouble_with_the_server_and_told_but_no_refused_login(refusal: str) -> None:
    with FtpHost() as host:
        host.on("SITE", reply(refusal))
        with pytest.raises(ftpcoord.ServerDown) as caught:
            ftpcoord.open_server(settings(**host.settings, site="SITE LISTFMT 1"))
    assert type(caught.value) is ftpcoord.ServerDown
    assert refusal in str(caught.value)
    assert refusal.startswith("421") or "SITE LISTFMT 1" in str(caught.value)


@pytest.mark.parametrize("kind", ["vsftpd_plain", "vsftpd_explicit", "proftpd_explicit"])
def test_servers_obey_them(kind: str, request: pytest.FixtureRequest) -> None:
    with new_folder(kind, request.getfixturevalue(kind)) as files:
        path = files.put("a.csv", b"1")
        with opened(files, f"OPTS UTF8 ON; SITE CHMOD 600 {path}") as server:
            assert [entry.name for entry in server.list(server.absolute(str(files.root)))] == ["a.csv"]
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(ftpcoord.ServerDown, match=r"the server refuses SITE NO\.SUCH thing \(5"):
            opened(files, "SITE NO.SUCH thing")


def opened(files: Files, site: str) -> Any:
    return contextlib.closing(ftpcoord.open_server(settings(**files.settings, site=site)))
