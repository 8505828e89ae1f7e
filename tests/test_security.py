"""Security: what is refused by default, what is never done with names and files, what is said to be weak."""

from __future__ import annotations

import ast
import base64
import contextlib
import json
import os
import re
import shlex
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Union

import pytest
from conftest import wait_for
from hostile import FtpHost, Site, reply, string
from processes import MEMBER, Process, environment

import ftpcoord

MODULE = Path(ftpcoord.__file__)
SOURCE = MODULE.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)


# ---------------------------------------------------------------------------------------------------------------------
# The source
# ---------------------------------------------------------------------------------------------------------------------


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call in the module, with what is called as text."""
    for node in ast.walk(TREE):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def enclosing(line: int) -> str:
    """The innermost function around a line."""
    found = [
        node
        for node in ast.walk(TREE)
        if isinstance(node, ast.FunctionDef) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    return max(found, key=lambda node: node.lineno).name if found else ""


def test_the_source_uses_no_shell_and_evaluates_nothing() -> None:
    forbidden = {
        "eval",
        "exec",
        "compile",
        "__import__",
        "os.system",
        "os.popen",
        "subprocess.getoutput",
        "subprocess.getstatusoutput",
        "subprocess.call",
        "tempfile.mktemp",
        "os.tmpnam",
        "input",
        "ssl._create_unverified_context",
        "ssl.wrap_socket",
        "asyncio.create_subprocess_shell",
    }
    for name, call in calls():
        again = name == "os.execv" and enclosing(call.lineno) == "start_small" and "sys.executable" in ast.unparse(call)
        assert name not in forbidden and not name.startswith(("os.spawn", "pickle.", "marshal.")), name
        assert again or not name.startswith("os.exec"), name
        for keyword in call.keywords:
            assert keyword.arg != "shell", f"line {call.lineno}"


def test_the_source_imports_nothing_that_runs_what_it_reads() -> None:
    imported = {alias.name for node in ast.walk(TREE) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"pickle", "marshal", "shelve", "code", "pty", "telnetlib", "xmlrpc", "yaml"}
    if sys.version_info >= (3, 10):
        assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names | {"__future__"}


def test_a_certificate_goes_unchecked_only_where_a_setting_says_so() -> None:
    places = {
        enclosing(node.lineno)
        for node in ast.walk(TREE)
        if isinstance(node, ast.Attribute) and node.attr == "CERT_NONE"
    }
    assert places <= {"tls_context"}
    names = {node.attr for node in ast.walk(TREE) if isinstance(node, ast.Attribute)}
    assert not names & {"AutoAddPolicy", "WarningPolicy", "MissingHostKeyPolicy", "load_system_host_keys"}


def test_files_are_made_in_one_place_only() -> None:
    """With O_EXCL and O_NOFOLLOW, see create_file."""
    for name, call in calls():
        if name in ("open", "io.open", "os.fdopen"):
            modes = [argument.value for argument in call.args[1:2] if isinstance(argument, ast.Constant)]
            modes += [
                keyword.value.value
                for keyword in call.keywords
                if keyword.arg == "mode" and isinstance(keyword.value, ast.Constant)
            ]
            written = any(letter in str(mode) for mode in modes for letter in "wax+")
            assert not written or enclosing(call.lineno) == "create_file", f"line {call.lineno}"
        if name == "os.open":
            flags = ast.unparse(call.args[1])
            place = enclosing(call.lineno)
            assert place in ("create_file", "open_folder", "opened") or flags == "os.O_RDONLY", f"line {call.lineno}"
        assert not name.endswith((".write_text", ".write_bytes", ".touch")), f"line {call.lineno}"
        assert name not in ("shutil.copy", "shutil.copyfile", "shutil.copy2", "shutil.move", "os.replace"), name
    made = ast.unparse(next(n for n in ast.walk(TREE) if isinstance(n, ast.FunctionDef) and n.name == "create_file"))
    assert "O_EXCL" in made and "O_NOFOLLOW" in made


def test_a_plain_socket_listens_only_for_the_setting_http() -> None:
    for name, call in calls():
        if name.endswith((".listen", ".bind", "create_server", "TCPServer", "HTTPServer")):
            place = enclosing(call.lineno)
            around = [
                node.name
                for node in ast.walk(TREE)
                if isinstance(node, ast.ClassDef) and node.lineno <= call.lineno <= (node.end_lineno or 0)
            ]
            assert "StatusServer" in around or place == "start_status_servers", f"{place} {around} line {call.lineno}"


# ---------------------------------------------------------------------------------------------------------------------
# Importing, listening
# ---------------------------------------------------------------------------------------------------------------------

WATCH = f"""
import sys
said = []
def hook(name, arguments):
    write = name == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if name.startswith(("socket.", "subprocess.", "os.system", "os.fork", "os.exec", "shutil.", "tempfile.")) or write:
        if name != "socket.gethostname":
            said.append((name, str(arguments)[:100]))
    if name == "open" and "__pycache__" in str(arguments[0]):
        return
sys.dont_write_bytecode = True
sys.path.insert(0, {str(MODULE.parent)!r})
sys.addaudithook(hook)
import ftpcoord, threading, logging
drivers = [name for name in ("paramiko", "pg8000", "pymysql", "cryptography") if name in sys.modules]
assert not said and not drivers and threading.active_count() == 1, (said, drivers)
assert not logging.getLogger("ftpcoord").handlers and not logging.getLogger().handlers
config = ftpcoord.Config(url="sftp://u@h/in", database="postgresql://u@h/d", exec="true", member_id="a")
assert not said, said
"""


def test_importing_opens_no_socket_writes_no_file_starts_nothing_and_loads_no_driver() -> None:
    done = subprocess.run([sys.executable, "-I", "-c", WATCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def listening(pid: int) -> list[str]:
    """The local addresses on which a process listens, TCP and UDP."""
    inodes = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found = re.match(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{name}"))
            if found:
                inodes.add(found[1])
    lines = []
    for kind in ("tcp", "tcp6", "udp", "udp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[9] in inodes and (fields[3] == "0A" or kind.startswith("udp")):
                    lines.append(f"{kind} {fields[1]}")
    return lines


def settings_for(host: Any, folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        **host.settings,
        "database": f"sqlite:///{folder / 'c.db'}",
        "member_id": "a",
        "settle": 0,
        "polling_interval": 0.1,
        "retry_delay": 0.05,
        "heartbeat_frequency": 0.2,
        "liveness_check_interval": 4,
        **changes,
    }


@pytest.mark.skipif(not os.path.exists("/proc/self/net/tcp"), reason="there is no /proc")
def test_a_running_member_listens_on_nothing_by_default(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with (
        FtpHost(files={"a": b"1"}) as host,
        Process(
            "a", MEMBER, environment(settings_for(host, tmp_path, download_dir=tmp_path / "target")), tmp_path
        ) as member,
    ):
        wait_for(lambda: "file_done" in member.said(), 20, "the file")
        assert listening(os.getpid()), "the look works: our own host listens"
        assert listening(member.pid) == []


# ---------------------------------------------------------------------------------------------------------------------
# Secrets
# ---------------------------------------------------------------------------------------------------------------------

# ---------------------------------------------------------------------------------------------------------------------
# Names, terminals, commands
# ---------------------------------------------------------------------------------------------------------------------


def test_what_a_server_says_reaches_the_terminal_as_plain_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`check` prints the reason; in it the greeting of the server, with an escape sequence, a bell, an override."""
    with FtpHost() as host:
        host.on("GREETING", reply("500-\x1b]0;owned\x07\r\n500 \x1b[2J\x9b31m\u00e2\u0080\u00ae"))
        for name in [name for name in os.environ if name.startswith("FTPCOORD_")]:
            monkeypatch.delenv(name)
        for name, value in settings_for(host, tmp_path, exec="true").items():
            monkeypatch.setenv(f"FTPCOORD_{name.upper()}", str(value))
        assert ftpcoord.main(["check"]) == 1
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert all(line.isprintable() for line in text.splitlines()), repr(text)
    assert said.err.count("\n") == 1 and "owned" in said.err


NAMES: list[Union[str, bytes]] = [
    "-rf",
    "--help",
    "$(touch pwned)",
    "`touch pwned`",
    "a;touch pwned",
    "a|touch pwned",
    "a&touch pwned",
    "*",
    "~user",
    "a\tb",
    "a'b\"c",
    "{file}",
    "{path}{name}",
    "%s%n",
    b"\xff\xfe",
    " ",
    "\x1b[31m",
]


@pytest.mark.parametrize("download_dir", ["", "."])
def test_names_reach_a_command_as_they_are_and_a_file_is_never_an_option(
    tmp_path: Path, download_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recorder.py").write_text(
        "import json, os, sys\nwith open(sys.argv[1], 'a') as out:\n"
        "    out.write(json.dumps([sys.argv[2:], dict(os.environ)]) + '\\n')\n"
    )
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    record = tmp_path / "record"
    with FtpHost(files=dict.fromkeys(NAMES, b"1")) as host:
        command = f"{shlex.quote(sys.executable)} {tmp_path / 'recorder.py'} {record} x{{name}} {{file}} {{path}}"
        with Site(tmp_path, host.settings, "exec", exec=command, download_dir=download_dir or None) as site:
            wait_for(lambda: len(site.all("file_done")) == len(NAMES), 40, "\n".join(site.log[-20:]))
    seen = [json.loads(line) for line in record.read_text().splitlines()]
    expected = {os.fsdecode(name) for name in NAMES}
    assert {arguments[0][1:] for arguments, _ in seen} == expected
    for arguments, inherited in seen:
        name = arguments[0][1:]
        assert arguments[1].startswith("/") and os.path.basename(arguments[1]) == name
        assert arguments[1] == inherited["FTPCOORD_FILE"] and inherited["FTPCOORD_NAME"] == name
        assert arguments[2] == inherited["FTPCOORD_PATH"] == f"/in/{name}"
    assert not list(tmp_path.rglob("pwned"))


def test_the_password_goes_to_the_server_that_was_named_and_data_connections_too(tmp_path: Path) -> None:
    """A PASV address elsewhere is not dialled."""
    trap = socket.create_server(("127.0.0.2", 0))
    port = trap.getsockname()[1]
    with trap, FtpHost(files={"a": b"1"}) as host:
        host.on("EPSV", reply("500 no"), times=None)
        host.on("PASV", reply(f"227 at (127,0,0,2,{port >> 8},{port & 255})"))
        with Site(tmp_path, host.settings) as site:
            site.wait("server_down")
            host.behave()
            site.arrive({"a": b"1"})
        trap.settimeout(0)
        with pytest.raises(BlockingIOError):
            trap.accept()


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def test_the_copy_of_a_handler_is_in_a_folder_that_nobody_else_may_enter_and_is_gone_afterwards(tmp_path: Path) -> None:
    seen: list[Path] = []
    with FtpHost(files={"a": b"1"}) as host:
        site = Site(tmp_path, host.settings, "handler")

        def look(file: ftpcoord.File) -> None:
            for folder in (file.local.parent, file.local.parent.parent):
                assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            seen.append(file.local)
            Site.receive(site, file)

        site.receive = look  # type: ignore[method-assign]
        with site:
            site.arrive({"a": b"1"})
    assert seen and not seen[0].parent.parent.exists()


# ---------------------------------------------------------------------------------------------------------------------
# What is weaker than it has to be
# ---------------------------------------------------------------------------------------------------------------------

KEY = string(b"ssh-ed25519") + string(b"k" * 32)
OTHER = string(b"ssh-ed25519") + string(b"o" * 32)


def known_hosts(folder: Path, key: bytes, marker: str = "") -> str:
    path = folder / "known_hosts"
    path.write_text(f"{marker}files.example ssh-ed25519 {base64.b64encode(key).decode()}\n")
    return str(path)


def file_with(folder: Path, mode: int) -> str:
    path = folder / "secret"
    path.write_text("secret\n")
    path.chmod(mode)
    return str(path)


def folder_of_all(folder: Path) -> Path:
    (folder / "all").mkdir()
    (folder / "all").chmod(0o777)
    return folder / "all"


WEAK: list[tuple[str, Callable[[Path], dict[str, Any]], str]] = [
    ("ftp", lambda folder: {"url": "ftp://me@files.example/in"}, "url"),
    ("ftpes", lambda folder: {"url": "ftpes://me@files.example/in"}, ""),
    ("tls_verify", lambda folder: {"url": "ftpes://me@files.example/in", "tls_verify": "no"}, "tls_verify"),
    ("tls_verify", lambda folder: {"url": "ftps://me@files.example/in", "tls_verify": "no"}, "tls_verify"),
    ("sftp", lambda folder: {}, ""),
    ("a key of all", lambda folder: {"key": file_with(folder, 0o644)}, "key"),
    ("a key of the group", lambda folder: {"key": file_with(folder, 0o640)}, ""),
    ("a key that all may write", lambda folder: {"key": file_with(folder, 0o602)}, "key"),
    ("a password of all", lambda folder: {"password_file": file_with(folder, 0o604)}, "password_file"),
    ("another's", lambda folder: {"database_password_file": file_with(folder, 0o604)}, "database_password_file"),
    ("a pin", lambda folder: {"host_key": ftpcoord.fingerprint(KEY)}, ""),
    (
        "a pin that is known",
        lambda folder: {"host_key": ftpcoord.fingerprint(KEY), "known_hosts": known_hosts(folder, KEY)},
        "",
    ),
    (
        "a pin that is not the known key",
        lambda folder: {"host_key": ftpcoord.fingerprint(KEY), "known_hosts": known_hosts(folder, OTHER)},
        "host_key",
    ),
    (
        "a pin that is revoked",
        lambda folder: {"host_key": ftpcoord.fingerprint(KEY), "known_hosts": known_hosts(folder, KEY, "@revoked ")},
        "host_key",
    ),
    ("a database of all", lambda folder: {"database": f"sqlite:///{file_with(folder, 0o644)}"}, "database"),
    (
        "a database in a folder of all",
        lambda folder: {"database": f"sqlite:///{folder_of_all(folder)}/c.db"},
        "database",
    ),
    (
        "a remote database",
        lambda folder: {"database": "mysql://me@db.example/d", "database_tls": "require"},
        "database_tls",
    ),
    ("a local database", lambda folder: {"database": "mysql://me@127.0.0.1/d", "database_tls": "disable"}, ""),
    ("a verified database", lambda folder: {"database": "postgresql://me@db.example/d"}, ""),
    ("delivered files", lambda folder: {"download_dir": str(folder), "exec": ""}, "file_mode"),
    ("delivered files as they were", lambda folder: {"download_dir": str(folder), "file_mode": "0644"}, ""),
]


@pytest.mark.parametrize(("name", "made", "setting"), WEAK, ids=[name for name, _, _ in WEAK])
def test_what_is_weaker_than_it_has_to_be_is_said_once_at_the_start_in_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, made: Callable[[Path], dict[str, Any]], setting: str
) -> None:
    changes = {
        "url": "sftp://me@files.example/in",
        "database": f"sqlite:///{tmp_path / 'c.db'}",
        "exec": "true",
        "known_hosts": str(tmp_path / "nowhere"),
        "member_id": "a",
        **made(tmp_path),
    }
    before = os.umask(0o022)
    monitor = pytest.MonkeyPatch()
    monitor.setattr(ftpcoord, "_warned", set())
    try:
        with caplog.at_level("WARNING", logger="ftpcoord"):
            for _ in range(2):
                ftpcoord.warn_of_weaknesses(ftpcoord.Config(**changes))
            assert ftpcoord.log.flush(10)
    finally:
        os.umask(before)
        monitor.undo()
    said = [record.__dict__["fields"] for record in caplog.records if record.getMessage() == "settings_warning"]
    assert [fields["setting"] for fields in said] == [setting] * bool(setting)
    assert all("secret\n" not in fields["reason"] and "\n" not in fields["reason"] for fields in said)


def test_a_coordinator_says_what_is_weak_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    database = file_with(tmp_path, 0o644)
    Path(database).write_bytes(b"")
    with (
        caplog.at_level("WARNING", logger="ftpcoord"),
        ftpcoord.Coordinator(database=f"sqlite:///{database}", coordination_group="g", member_id="a"),
    ):
        assert ftpcoord.log.flush(10) and "settings_warning" in caplog.text


def test_a_settings_file_with_a_password_that_all_can_read_is_said(tmp_path: Path) -> None:
    with FtpHost(files={"a": b"1"}) as host:
        settings = settings_for(host, tmp_path, exec="true")
        assert settings["password"]
        path = tmp_path / "settings.ini"
        path.write_text("[orders]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
        path.chmod(0o644)
        command = [sys.executable, str(MODULE), "--config", str(path)]
        with Process("a", command, environment({}), tmp_path) as member:
            wait_for(lambda: "file_done" in member.said(), 20, "the file")
            warnings = [line for line in member.said().splitlines() if " settings_warning " in line]
            assert [re.findall(r"setting=(\w+)", line) for line in warnings] == [["url"], ["config"]]
