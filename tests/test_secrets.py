"""Secrets: whatever provokes their telling (rows) against wherever they could be told (columns)."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile
import pytest
from conftest import fetch, wait_for
from hostile import FtpHost, Gateway, SftpHost, reply, unused_port
from processes import MODULE, Process, environment

import ftpcoord

CANARY = "c4n4ry-7f3a9e"
PATHS = ("/", "/status", "/metrics", "/livez", "/readyz", "/active", "/x", f"/?group={CANARY[:3]}")
COMMANDS = ("check", "status", "status --json", "status --check", "files", "files --json", "retry", "run --dry-run")
OUTLETS = ("log", "standard error", "process list", "environment of commands", "written", "names", *PATHS, *COMMANDS)
RECORDER = f"""
import json, os, sys
lines = []
for pid in filter(str.isdigit, os.listdir("/proc") if os.path.exists("/proc") else ()):
    try:
        lines.append(open("/proc/" + pid + "/cmdline", "rb").read().replace(b"\\0", b" ").decode("latin-1"))
    except OSError:
        pass
found = [line for line in lines if "{CANARY[:6]}" + "{CANARY[6:]}" in line]
with open(sys.argv[1], "a") as out:
    out.write(json.dumps([dict(os.environ), found]) + "\\n")
print("said on stdout", flush=True)
sys.exit("a reason" if "bad" in sys.argv[2] else 0)
"""


class Provoked:
    """A member over a host that provokes it, and what each outlet told."""

    def __init__(self, host: Any, folder: Path, **settings: Any) -> None:
        self.host, self.told = host, dict.fromkeys(OUTLETS, "")
        self.work, hidden = folder / "work", folder / "hidden"
        hidden.mkdir()
        (self.work / "target").mkdir(parents=True)
        (hidden / "password").write_text(CANARY + "\n")
        (hidden / "recorder.py").write_text(RECORDER)
        self.port = unused_port()
        self.settings: dict[str, Any] = {
            **host.settings,
            "database": f"sqlite:///{self.work / 'c.db'}",
            "member_id": "a",
            "settle": 0,
            "polling_interval": 0.1,
            "retry_delay": 0.05,
            "heartbeat_frequency": 0.2,
            "liveness_check_interval": 4,
            "after": "delete",
            "download_dir": self.work / "target",
            "max_attempts": 2,
            "log_level": "debug",
            "exec": f"{shlex.quote(sys.executable)} {hidden / 'recorder.py'} {self.work / 'record'} {{name}}",
            "http": f"127.0.0.1:{self.port}",
            "password_file": hidden / "password",
            "password": None,
            **settings,
        }
        self.ini = hidden / "settings.ini"  # where secrets may be

    def run(self, until: Callable[[Process], object], before: Callable[[], object]) -> None:
        lines = [f"{name} = {value}\n" for name, value in self.settings.items() if value is not None]
        self.ini.write_text("[orders]\n" + "".join(lines))
        command = [sys.executable, str(MODULE), "--config", str(self.ini)]
        inherited = environment({"password": CANARY})
        with Process("a", command, inherited, self.work) as member:
            wait_for(lambda: until(member), 30, member.said())
            told = self.told
            if os.path.exists("/proc"):
                told["process list"] = Path(f"/proc/{member.pid}/cmdline").read_text(errors="replace")
            for path in PATHS:
                before()
                told[path] = self.answer(path)
            for words in COMMANDS:
                before()
                told[words] = self.command(*words.split())
            assert member.stop() == 0
            told["log"], told["standard error"] = member.out.read_text(), member.err.read_text()
        told["written"] = "".join(self.everything())

    def answer(self, path: str) -> str:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            return f"{answer.status} {answer.headers} {answer.read().decode()}"

    def command(self, *words: str) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = ftpcoord.main(["--config", str(self.ini), *words])
            ftpcoord.log.flush()
        return f"{code} {out.getvalue()}"

    def everything(self) -> Iterator[str]:
        for path in self.work.rglob("*"):
            self.told["names"] += str(path)
            if path == self.work / "record":
                for line in path.read_text().splitlines():
                    inherited, command_lines = json.loads(line)
                    self.told["environment of commands"] += json.dumps(inherited)
                    self.told["process list"] += "".join(command_lines)
            elif path.is_file():
                yield path.read_bytes().decode("latin-1")


def repeating_ftp(folder: Path, place: str, form: str) -> Provoked:
    """The server repeats the password in answers of every kind, one of them until the file is in quarantine."""
    host = FtpHost(files={"a.csv": b"1", "bad.csv": b"22", "kept.csv": b"333", "refused.csv": b"4444"})
    host.password = CANARY
    echo = reply(f"550 your password is {CANARY}")

    def retrieve(session: Any, argument: str) -> None:
        echo(session, argument) if "refused" in argument else session.on_retr(argument)

    for verb, action, times in (
        ("RETR", echo, 1),
        ("RETR", retrieve, None),
        ("DELE", echo, 1),
        ("MLSD", echo, 1),
        ("CWD", hostile.say_and_leave(f"421 {CANARY}"), 1),
        ("PASS", reply(f"230-welcome {CANARY}\r\n230 in"), 2),
    ):
        host.on(verb, action, times)
    settings: dict[str, Any] = {"log_format": form}
    if place == "password":
        settings.update(password=CANARY, password_file=None)
    elif place == "url":
        settings.update(url=host.settings["url"].replace("me@", f"me:{CANARY}@"), password_file=None)
    provoked = Provoked(host, folder, **settings)

    def done(member: Process) -> bool:
        return member.said().count("file_quarantined") >= 2 and not {"a.csv", "kept.csv"} & host.files.keys()

    with host:
        provoked.run(done, lambda: (host.on("MLSD", echo), host.on("LIST", echo)))  # type: ignore[func-returns-value]
    assert "your password is ***" in provoked.told["log"], provoked.told["log"]
    for outlet in ("/status", "files", "check"):
        assert "your password is ***" in provoked.told[outlet], (outlet, provoked.told[outlet])
    inherited = provoked.told["environment of commands"]
    assert '"FTPCOORD_FILE"' in inherited and "FTPCOORD_PASSWORD" not in inherited
    return provoked


def repeating_sftp(folder: Path) -> Provoked:
    host = SftpHost(files={"a.csv": b"1"})
    host.password = CANARY
    echo = hostile.status(3, f"your password is {CANARY}".encode())
    for verb in ("OPENDIR", "OPEN", "READ", "REMOVE", "READDIR"):
        host.on(verb, echo)
    provoked = Provoked(host, folder, max_attempts=9)
    with host:
        provoked.run(lambda member: "a.csv" not in host.files, lambda: host.on("OPENDIR", echo))
    assert "your password is ***" in provoked.told["log"] + provoked.told["check"]
    return provoked


def refusing(folder: Path) -> Provoked:
    """No secret is right, the server repeats the password, and a secret stands among a command's arguments."""
    host = FtpHost()
    host.on("PASS", reply(f"530 {CANARY} is wrong"), times=None)
    provoked = Provoked(host, folder, database_password=CANARY)
    provoked.settings["exec"] += f" --token={CANARY}"
    with host:
        provoked.run(lambda member: "server_down" in member.said(), lambda: None)
    assert "*** is wrong" in provoked.told["log"] and "*** is wrong" in provoked.told["check"]
    assert "***" in provoked.told["/readyz"] and "arguments)" in provoked.told["/status"]
    assert '"database_password": "***"' in provoked.told["/status"]
    return provoked


def repeating_behind_proxy(folder: Path) -> Provoked:
    """The secret is the proxy's: its answers, and those of the server behind it, repeat it."""
    host, gateway = FtpHost(files={"a.csv": b"1"}), Gateway("http", f"me:{CANARY}")
    proof = base64.b64encode(f"me:{CANARY}".encode())
    gateway.on(
        "CONNECT", lambda sock, place: sock.sendall(b"HTTP/1.1 403 no " + proof + b" for " + CANARY.encode() + b"\n\n")
    )
    host.on("MLSD", reply(f"550 your password is {CANARY}"))
    own = {"password": host.password, "password_file": None}
    proxy = {"proxy": gateway.url.replace(f":{CANARY}", ""), "proxy_password_file": folder / "hidden" / "password"}
    provoked = Provoked(host, folder, **own, **proxy, max_attempts=9)

    def again() -> None:
        host.on("MLSD", reply(f"550 your password is {CANARY}"), times=None)
        host.on("LIST", reply(f"550 your password is {CANARY}"), times=None)

    with host, gateway:
        provoked.run(lambda member: "a.csv" not in host.files, again)
    assert "403 no *** for ***" in provoked.told["log"], provoked.told["log"]
    assert "your password is ***" in provoked.told["check"] and '"proxy_password": "***"' in provoked.told["/status"]
    return provoked


PROVOCATIONS: dict[str, Callable[[Path], Provoked]] = {
    "repeated, from password": lambda folder: repeating_ftp(folder, "password", "text"),
    "repeated, from password_file": lambda folder: repeating_ftp(folder, "password_file", "json"),
    "repeated, from url": lambda folder: repeating_ftp(folder, "url", "text"),
    "repeated by SFTP": repeating_sftp,
    "of a proxy": repeating_behind_proxy,
    "all wrong": refusing,
}


@pytest.fixture(scope="module")
def provoked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Provoked:
    return PROVOCATIONS[request.param](tmp_path_factory.mktemp("secrets"))


@pytest.mark.parametrize("outlet", OUTLETS)
@pytest.mark.parametrize("provoked", PROVOCATIONS, indirect=True)
def test_a_secret_is_told_nowhere_whatever_provokes_it(provoked: Provoked, outlet: str) -> None:
    told = provoked.told[outlet]
    assert CANARY not in told, told
    if outlet == "environment of commands":
        words = {name for name in provoked.told[outlet].split('"') if name.startswith("FTPCOORD_")}
        assert words <= {
            f"FTPCOORD_{name}"
            for name in ("FILE", "PATH", "NAME", "SIZE", "MTIME", "ATTEMPT", "TERM", "GROUP", "MEMBER")
        }
    elif outlet != "standard error":
        assert told, "the look works"


@pytest.mark.parametrize("kind", [FtpHost, SftpHost], ids=["ftp", "sftp"])
def test_a_password_is_in_no_error_that_a_server_provokes(kind: type[Any]) -> None:
    with kind(files={"a": b"1"}) as host:
        host.password = CANARY
        config = ftpcoord.Config(**host.settings, database=f"postgresql://u:{CANARY}@h/d")
        caught: list[BaseException] = []
        objects: list[object] = [config, ftpcoord.Listener(config), ftpcoord.Member(config), ftpcoord.Pool(config)]
        objects.append(ftpcoord.open_database(config))
        server = ftpcoord.open_server(config)
        objects.append(server)
        says = reply(f"550 {CANARY}") if kind is FtpHost else hostile.status(3, CANARY.encode())
        verbs = (
            ["MLSD", "CWD", "RETR", "DELE", "RNFR", "RNTO", "MKD"]
            if kind is FtpHost
            else ["OPENDIR", "OPEN", "READ", "REMOVE", "RENAME", "MKDIR", "READDIR"]
        )
        for verb in verbs:
            for call in (
                lambda: server.list("/in"),
                lambda: fetch(server, "/in/a", 1, bytes),
                lambda: server.delete("/in/a"),
                lambda: server.rename("/in/a", "/in/b"),
                lambda: server.mkdir("/in/x/y"),
            ):
                host.behave()
                host.files["a"] = b"1"
                host.files.pop("b", None)
                host.on(verb, says)
                try:
                    call()
                except ftpcoord.Error as exc:
                    caught.append(exc)
        server.close()
        host.behave()
        host.password = "changed"
        with pytest.raises(ftpcoord.LoginRefused) as refused:
            ftpcoord.open_server(config)
        caught.append(refused.value)
        assert len(caught) > 5
        for error in caught:
            shown = "".join(traceback.format_exception(type(error), error, error.__traceback__))
            assert CANARY not in shown + repr(error) + str(error), shown
        for thing in objects:
            assert CANARY not in repr(thing) + str(thing)


URLS = (
    "ftp://me:12/{}@h/in",
    "ftp://me:{}/x@h/in",
    "sftp://me:{}#x@h/in",
    "ftp://me:{}?x@h/in",
    "fpt://me:{}@h/in",
    "ftp://me:{}@h:port/in",
    "ftp://me:{}@/in",
    "ftp://me:{}@h/a%0ab",
    "ftp://me:{}%0a@h/a",
    "//me:{}@h/in",
)
INDENTED = (
    "handler = a:b\n  password = {}",
    "after = move\n\tpassword = {}",
    "http = x\n database_password={}",
    "log_level = x\n password: {}",
    "encoding = x\n password = {}",
    "workers = 3\n  password = {}",
    "member_id = a\n password = {}",
)


@pytest.mark.parametrize(("url", "text"), [(url, "") for url in URLS] + [("ftp://u@h/", text) for text in INDENTED])
def test_a_password_in_a_wrong_url_or_on_an_indented_line_of_a_file_is_not_shown(
    tmp_path: Path, url: str, text: str
) -> None:
    path = tmp_path / "settings.ini"
    path.write_text(f"[a]\nurl = {url}\ndatabase = sqlite:///x\n{text}\n".replace("{}", CANARY))
    with pytest.raises(ftpcoord.ConfigError) as caught:
        ftpcoord.Config.from_file(str(path))
    assert CANARY not in str(caught.value)
    if not text:
        with pytest.raises(ftpcoord.ConfigError) as caught:
            ftpcoord.Config(url=url.format(CANARY), database="sqlite:///x")
        assert CANARY not in str(caught.value)


@pytest.mark.parametrize("password", ["e", "in", "530", "#", "a.b", "30 s"])
def test_a_short_password_is_masked_where_it_stands_alone_and_breaks_no_message(password: str) -> None:
    with FtpHost() as host:
        host.on("PASS", reply(f"530 the password <{password}> is refused"))
        server = ftpcoord.new_server(
            ftpcoord.Config(**{**host.settings, "password": password, "database": "sqlite:///x", "member_id": "a"})
        )
        with pytest.raises(ftpcoord.LoginRefused) as caught:
            server.connect()
    said = str(caught.value)
    assert f"<{password}>" not in said and "<***>" in said
    assert "the password" in said and "refused" in said and said.startswith("ftp://127.0.0.1:")


@pytest.mark.parametrize("kind", ["fifo", "device", "huge"])
def test_a_secret_file_that_never_ends_costs_neither_time_nor_memory(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "secret"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "huge":
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    config = ftpcoord.Config(
        url="ftp://me@files.example/in",
        password_file="/dev/zero" if kind == "device" else str(path),
        database="sqlite:////nowhere",
        coordination_group="g",
    )
    if kind == "huge":
        assert len(config.file_password()) < 100_000
    else:
        with pytest.raises(ftpcoord.ConfigError, match=r"password_file: .* is not a plain file"):
            config.file_password()
