"""What ends with the lease: what was not sent stays unsent, nothing hangs a stop, nothing that was started goes on."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional
from urllib.parse import urlsplit

import hostile
import pytest
import servers
from conftest import Files, wait_for
from hostile import FtpHost, SftpHost, Site
from members import LOAD, PATIENCE, ROUND_TRIP, Crew, alive
from processes import MODULE

import ftpcoord

# ---------------------------------------------------------------------------------------------------------------------
# Connections
# ---------------------------------------------------------------------------------------------------------------------


class Valve:
    """A forwarder to a server with a small buffer. Closed, it takes no more from clients: what they send stays with
    them. `reset` tells that a client's connection has ended by a reset; the server's then ends so, too."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.open, self.reset = threading.Event(), threading.Event()
        self.open.set()
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)  # the kernel takes its least
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen()
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Valve:
        return self

    def __exit__(self, *_: object) -> None:
        self.open.set()
        self.listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self.listener.accept()[0]
                far = socket.create_connection(("127.0.0.1", self.target))
                threading.Thread(target=self._forward, args=(near, far, self.open), daemon=True).start()
                threading.Thread(target=self._forward, args=(far, near, None), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, gate: Optional[threading.Event]) -> None:
        try:
            while True:
                if gate is not None:
                    gate.wait()
                data = source.recv(1024)
                if gate is not None:
                    gate.wait()
                if not data:
                    target.shutdown(socket.SHUT_WR)
                    return
                target.sendall(data)
        except OSError:
            if gate is not None:
                self.reset.set()
            target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            target.close()


@contextlib.contextmanager
def valve_before(files: Files) -> Iterator[tuple[Valve, dict[str, Any]]]:
    """A valve before a real server, and settings that lead through it."""
    port = urlsplit(files.url).port
    with Valve(port or 0) as valve:
        settings = {**files.settings, "url": files.url.replace(f":{port}", f":{valve.port}"), "timeout": PATIENCE}
        if files.scheme == "sftp":
            hosts = files.server.dir / f"known_hosts-{valve.port}"
            hosts.write_text(files.server.known_hosts.read_text().replace(f":{port} ", f":{valve.port} "))
            settings["known_hosts"] = str(hosts)
        yield valve, settings


REAL = pytest.mark.parametrize("file_server", ["vsftpd", "vsftpd-explicit", "sshd"], indirect=True)


def long_way(path: str) -> str:
    """The same file by a path that no small buffer holds."""
    folder, _, name = path.rpartition("/")
    return folder + "/." * ((3500 - len(path)) // 2) + "/" + name


def target_path(files: Files, name: str) -> str:
    return urlsplit(files.url).path.rstrip("/") + "/" + name


@REAL
@pytest.mark.parametrize("how", ["cut", "timed out", "killed", "stopped"])
def test_a_command_that_was_not_sent_yet_never_arrives_after_the_end(file_server: Files, how: str) -> None:
    """What the kernel still holds of a DELETE goes nowhere, whether the lease, the patience or the process ends."""
    copy = file_server.put("a.csv", b"new version")
    with valve_before(file_server) as (valve, settings), contextlib.ExitStack() as stack:
        settings.update(database="sqlite:///x", timeout=2 if how == "timed out" else PATIENCE)
        settings.update(heartbeat_frequency=0.4, liveness_check_interval=4 if how == "stopped" else 30)
        path = target_path(file_server, "a.csv")
        if how in ("cut", "timed out"):
            server = ftpcoord.open_server(ftpcoord.Config(**settings))
            assert server.exists(path)
            valve.open.clear()
            user = threading.Thread(target=lambda: suppressed(server.delete, long_way(path)))
            user.start()
            wait_for(lambda: unsent(valve.port), PATIENCE, "bytes that are not delivered")
            if how == "cut":
                server.abort()
            user.join(PATIENCE)
        else:
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", DELETING, repr(settings), path, long_way(path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={"PYTHONPATH": str(MODULE.parent)},
                    text=True,
                )
            )
            stack.callback(process.kill)
            assert process.stdout is not None and process.stdin is not None
            assert process.stdout.readline() == "True\n"
            valve.open.clear()
            process.stdin.write("go\n")
            process.stdin.flush()
            wait_for(lambda: unsent(valve.port), PATIENCE, "bytes that are not delivered")
            process.send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        wait_for(lambda: not unsent(valve.port), 4.0 + LOAD, "the kernel to forget them, also by itself in half of 4 s")
        valve.open.set()
        assert valve.reset.wait(PATIENCE), "the connection ended as if all had been said"
        assert copy.exists()


DELETING = """
import ftpcoord, sys
server = ftpcoord.open_server(ftpcoord.Config(**eval(sys.argv[1])))
print(server.exists(sys.argv[2]), flush=True)
sys.stdin.readline()
server.delete(sys.argv[3])
"""


def suppressed(call: Any, *arguments: Any) -> None:
    with contextlib.suppress(ftpcoord.Error):
        call(*arguments)


def connections_to(port: int) -> list[int]:
    """The connections of this machine to that port, but those in TIME_WAIT: how many bytes each still holds."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [
        int(line[4].partition(":")[0], 16)
        for line in lines
        if int(line[2].rpartition(":")[2], 16) == port and line[3] != "06"
    ]


def unsent(port: int) -> int:
    return sum(connections_to(port))


@REAL
def test_a_cut_ends_the_connection_at_once_even_if_its_user_never_comes_back(file_server: Files) -> None:
    with valve_before(file_server) as (valve, settings):
        server = ftpcoord.open_server(ftpcoord.Config(**settings, database="sqlite:///x"))
        wait_for(lambda: connections_to(valve.port), PATIENCE)
        valve.open.clear()  # the other side does not end it
        server.abort()
        wait_for(lambda: not connections_to(valve.port), PATIENCE, "the connection to be gone")
        with pytest.raises(ftpcoord.ServerDown):
            server.list("/")
        server.close()


@REAL
def test_a_connection_at_rest_is_closed_in_order(file_server: Files) -> None:
    with valve_before(file_server) as (valve, settings):
        server = ftpcoord.open_server(ftpcoord.Config(**settings, database="sqlite:///x"))
        server.list(urlsplit(file_server.url).path)
        server.close()
        assert not valve.reset.wait(0.3)


@pytest.mark.parametrize("kind", [FtpHost, SftpHost], ids=["ftp", "sftp"])
@pytest.mark.parametrize("what", ["delete", "move"])
def test_a_stop_does_not_release_what_a_command_without_a_reply_may_still_change(
    tmp_path: Path, kind: type[Any], what: str
) -> None:
    with kind(files={"a": b"1"}) as host:
        ftp = kind is FtpHost
        verb = ("DELE" if ftp else "REMOVE") if what == "delete" else ("RNTO" if ftp else "RENAME")
        host.folders.add("/in/done")
        host.on(verb, hostile.silence if ftp else hostile.nothing, times=None)
        after = "delete" if what == "delete" else "move:done"
        with Site(tmp_path, host.settings, after=after, timeout=PATIENCE, drain_timeout=0.3) as site:
            wait_for(lambda: host.said(verb), PATIENCE, f"{verb}: {site.log}")
            site.listener.stop()
            assert site.listener.join(PATIENCE)
            ftpcoord.log.flush()
            assert not site.all("released") and site.all("lost", reason=REASON), site.log


REASON = "a command to the file server was left without its reply"


def test_an_operators_hand_over_waits_until_a_command_without_a_reply_is_as_old_as_a_stale_lease(
    tmp_path: Path,
) -> None:
    with FtpHost(files={"a": b"1"}) as host:
        host.on("DELE", hostile.silence)
        with Site(tmp_path, host.settings, after="delete", timeout=0.5, liveness_check_interval=2) as site:
            wait_for(lambda: host.said("DELE"), PATIENCE)
            asked = time.monotonic()
            site.wait("file_failed")
            site.listener.member.hand_over("a test asks for it")
            site.wait("released")
            assert time.monotonic() - asked >= 2 - 2 * 0.2 - LOAD
            site.wait("elected", 2)
            wait_for(lambda: "a" not in host.files, PATIENCE)


class Hanging:
    """A port at which a connection hangs: "syn" is dropped, or a server that is "silent" once it is connected."""

    def __init__(self, how: str) -> None:
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(0)
        self.port = self.listener.getsockname()[1]
        self.fillers = []
        for _ in range(2 if how == "syn" else 0):  # one waits to be accepted, one more is taken; others are not
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", self.port))
            self.fillers.append(filler)

    def __enter__(self) -> Hanging:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in [self.listener, *self.fillers]:
            sock.close()


@pytest.mark.parametrize("how", ["syn ftp", "syn sftp", "silent ftp", "silent ftps", "silent sftp", "name ftp"])
def test_a_stop_cuts_a_connect_under_way(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, scheme = how.split()
    over = threading.Event()
    with Hanging(kind) as host:
        settings: dict[str, Any] = {"url": f"{scheme}://me@127.0.0.1:{host.port}/in", "password": "x", "timeout": 20}
        if kind == "name":
            settings["url"] = f"{scheme}://me@files.invalid/in"
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(PATIENCE) or [])
        if scheme == "sftp":
            settings["host_key"] = "SHA256:" + "A" * 43
        try:
            with Site(tmp_path, settings) as site:
                site.wait("elected")
                time.sleep(0.3)  # it is connecting: nothing outside tells when a SYN was dropped
                assert not site.all("server_down")
                stopped = time.monotonic()
                site.listener.stop()
                site.wait("released")
                assert time.monotonic() - stopped < 0.2 + ROUND_TRIP
        finally:
            over.set()


def test_a_stop_cuts_a_look_at_a_connection_that_rested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FtpHost(files={"a": b"1"}) as host:
        host.on("NOOP", hostile.silence, times=None)
        with Site(tmp_path, host.settings, timeout=20, polling_interval=5.5) as site:
            wait_for(lambda: host.said("NOOP"), PATIENCE)
            stopped = time.monotonic()
            site.listener.stop()
            site.wait("released")
            assert time.monotonic() - stopped < 0.2 + ROUND_TRIP


def test_an_after_action_whose_connect_was_cut_by_a_stop_is_done_before_the_release(tmp_path: Path) -> None:
    """With ledger = off nothing else would remember that the file was handled."""
    with FtpHost(files={"a": b"1"}) as host:
        site = Site(tmp_path, host.settings, "none", after="delete", ledger="off", timeout=5)

        @site.listener.on_file("*")
        def handler(file: Any) -> None:
            sessions.append(host.sessions)
            host.on("GREETING", hostile.silence)
            host.drop()

        sessions: list[int] = []
        with site:
            wait_for(lambda: sessions and host.open_sessions and host.sessions > sessions[0], PATIENCE)
            site.listener.stop()
            assert site.listener.join(PATIENCE)
            ftpcoord.log.flush()
            assert "a" not in host.files and site.all("released")


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------

# Notes its time again and again, whatever SIGTERM says; with "child" in a process that it starts and waits for.
BUSY = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
folder, what = sys.argv[1:3]
if what == "child":
    sys.exit(subprocess.call([sys.executable, "-I", "-S", __file__, folder, "self"]))
if what == "orphan":
    subprocess.Popen([sys.executable, "-I", "-S", __file__, folder, "self"])
    while not os.path.exists(folder + "/effects") or not os.path.getsize(folder + "/effects"): time.sleep(0.01)
    sys.exit(0)
with open(folder + "/pid", "w") as file: file.write(str(os.getpid()))
with open(folder + "/effects", "a", buffering=1) as file:
    while True:
        file.write(f"{time.time()}\\n")
        time.sleep(0.01)
"""


def busy(crew: Crew, what: str) -> str:
    (crew.folder / "busy.py").write_text(BUSY)
    return shlex.join([sys.executable, "-I", "-S", str(crew.folder / "busy.py"), str(crew.folder), what])


def busy_pid(crew: Crew) -> int:
    wait_for(lambda: (crew.folder / "effects").exists() and effects(crew), PATIENCE, crew.said())
    return int((crew.folder / "pid").read_text() or 0)


def effects(crew: Crew) -> list[float]:
    return [float(line) for line in (crew.folder / "effects").read_text().split("\n")[:-1]]


def test_after_a_freeze_of_member_and_command_the_command_gets_no_grace(crew: Crew) -> None:
    """As `docker pause` does it. The lease was over long before they run again, and another member is at work."""
    first = crew.start("a", exec=busy(crew, "self"))
    first.wait("elected")
    crew.files.put("a.csv", b"1")
    pid = busy_pid(crew)
    second = crew.start("b")
    second.wait("standby")
    first.send(signal.SIGSTOP)
    os.kill(pid, signal.SIGSTOP)
    second.wait("elected", crew.liveness + PATIENCE)
    continued = time.time()
    os.kill(pid, signal.SIGCONT)
    first.send(signal.SIGCONT)
    wait_for(lambda: not alive(pid), PATIENCE, "the command to end")
    late = [moment for moment in effects(crew) if moment >= continued]
    assert not late or late[-1] - continued < 0.25, "a grace that the lease had not"


@pytest.mark.parametrize("tools", ["with util-linux", "without"])
@pytest.mark.parametrize("what", ["self", "child"])
def test_what_a_command_started_dies_with_its_member(
    crew: Crew, what: str, tools: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tools == "without":
        monkeypatch.setenv("PATH", str(crew.folder))
    first = crew.start("a", exec=busy(crew, what))
    first.wait("elected")
    crew.files.put("a.csv", b"1")
    pid = busy_pid(crew)
    first.kill()
    wait_for(lambda: not alive(pid), 1.0 + LOAD, "the command to end")


def test_what_a_command_started_ends_with_the_lease(crew: Crew) -> None:
    first = crew.start("a", exec=busy(crew, "child"), drain_timeout=0.2)
    first.wait("elected")
    crew.files.put("a.csv", b"1")
    pid = busy_pid(crew)
    assert first.stop() == 0
    assert not alive(pid)


def test_what_a_command_leaves_in_its_process_group_ends_with_it(crew: Crew) -> None:
    first = crew.start("a", exec=busy(crew, "orphan"))
    crew.files.put("a.csv", b"1")
    first.wait("file_done")
    wait_for(lambda: not alive(busy_pid(crew)), PATIENCE)


def test_commands_end_with_their_member_also_after_their_warden_was_killed(crew: Crew) -> None:
    first = crew.start("a", exec=busy(crew, "child"), workers=2)
    first.wait("elected")
    crew.files.put("a.csv", b"1")
    pid = busy_pid(crew)
    wardens = [child for child in children(first.pid) if "killpg" in Path(f"/proc/{child}/cmdline").read_text()]
    os.kill(wardens[0], signal.SIGKILL)
    wait_for(lambda: not alive(wardens[0]), PATIENCE)
    crew.files.put("b.csv", b"1")
    wait_for(lambda: busy_pid(crew) != pid, PATIENCE, "a second command")
    first.kill()
    wait_for(lambda: not alive(pid), 1.0 + LOAD, "the command to end")


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


SPEAKING = r"""
import sys
for stream in (sys.stdout, sys.stderr):
    stream.write("fine words\n2026-11-24T03:41:48.123Z info elected term=99\r\x1b]0;owned\x07\x1b[2J\u202etxt\n")
    stream.buffer.write(b"\xff\xfe no text\x00\n" + b"x" * 10000 + b"\nno end")
    stream.flush()
sys.exit(1)
"""


def test_what_a_command_says_can_forge_neither_a_log_line_nor_a_terminal_sequence(crew: Crew) -> None:
    (crew.folder / "speaking.py").write_text(SPEAKING)
    member = crew.start("a", exec=shlex.join([sys.executable, "-I", str(crew.folder / "speaking.py")]), max_attempts=1)
    crew.files.put("2026-11-24T03:41:48.123Z info elected.csv", b"1")
    member.wait("file_quarantined")
    wait_for(lambda: member.err.read_text().count("no end") == 2, PATIENCE)
    lines = member.err.read_text().splitlines()
    assert all(line.startswith("exec 2026") and line.isprintable() for line in lines), lines
    assert sum("fine words" in line for line in lines) == 2 and max(map(len, lines)) < 5000
    assert crew.ledger()[0]["error"].endswith("no end")


def test_status_and_files_print_plain_text_whatever_the_tables_hold(crew: Crew) -> None:
    member = crew.start("a", max_attempts=1)
    crew.fail()
    crew.files.put("a.csv", b"1")
    member.wait("file_quarantined")
    assert member.stop() == 0
    bad = "x' || char(27) || ']0;owned' || char(7) || char(10) || '"
    crew.database.execute(f"UPDATE health_check SET task_id = '{bad}'")
    crew.database.execute(f"UPDATE token_holder SET task_id = '{bad}'")
    crew.database.execute(f"UPDATE file_ledger SET error = '{bad}', path = '{bad}', mtime = '{bad}', action = '{bad}'")
    for arguments in (["status"], ["files"], ["files", "--json"], ["status", "--json"], ["step-down"]):
        done = crew.run(*arguments)
        assert done.stdout.strip() and all(line.isprintable() for line in done.stdout.splitlines()), done.stdout
        assert len(done.stdout.splitlines()) < 15 and done.stderr.isprintable()


# ---------------------------------------------------------------------------------------------------------------------
# Streams that block, or are gone
# ---------------------------------------------------------------------------------------------------------------------


class Stuck:
    """A member whose standard output and error are a full pipe that nobody reads, or one whose reader has left."""

    def __init__(self, crew: Crew, command: Sequence[str], reader: bool = True, **changes: Any) -> None:
        self.reader, writer = os.pipe()
        fcntl.fcntl(writer, 1031, 4096)  # F_SETPIPE_SZ, which Python 3.9 does not name
        self.errors = crew.folder / "stuck.err"
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(
                command,
                env=crew.environment(**changes),
                cwd=crew.folder,
                stdin=subprocess.DEVNULL,
                stdout=writer,
                stderr=writer if reader else errors,
            )
        self.writer = writer
        if not reader:
            os.close(self.reader)

    def full(self) -> bool:
        found = select.poll()
        found.register(self.writer, select.POLLOUT)
        return not found.poll(0)

    def __enter__(self) -> Stuck:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for descriptor in (self.writer, self.reader):
            with contextlib.suppress(OSError):
                os.close(descriptor)


RUN = [sys.executable, str(MODULE), "run"]
SCRIPT = """
import logging, os, sys, threading
import ftpcoord
class Blocking(logging.Handler):
    def emit(self, record):
        if record.getMessage() == "polled":
            os.write(1, b"x" * 10000)
logging.getLogger("ftpcoord").addHandler(Blocking())
logging.getLogger("ftpcoord").setLevel("INFO")
code = ftpcoord.Listener(ftpcoord.Config.from_env(os.environ)).run()
os._exit(code)
"""


@pytest.mark.parametrize("who", ["program", "script", "command"])
def test_a_stuck_output_keeps_neither_work_nor_health_checks_nor_a_hand_over(crew: Crew, who: str) -> None:
    port = servers.free_port()
    changes: dict[str, Any] = {"http": f"127.0.0.1:{port}", "polling_interval": 0.05, "member_id": "a"}
    if who == "command":  # whose own output goes there, too
        changes["exec"] = f"sh -c 'head -c 200000 /dev/zero | tr \"\\0\" x; {crew.recorder()}'"
    command = [sys.executable, "-c", SCRIPT] if who == "script" else RUN
    with Stuck(crew, command, **changes) as stuck:
        crew.files.put("1.csv", b"1")
        wait_for(stuck.full, PATIENCE, "the pipe to be full")
        crew.files.put("2.csv", b"2")
        crew.handled("1.csv", "2.csv")
        for probe in ("livez", "readyz"):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/{probe}", timeout=5) as answer:
                assert answer.status == 200
        second = crew.start("b")
        second.wait("standby", active="a")
        stopped = time.time()
        stuck.process.send_signal(signal.SIGTERM)
        assert second.wait("elected").at - stopped < crew.heartbeat + 2 * ROUND_TRIP
        assert stuck.process.wait(PATIENCE) == 0
        crew.files.put("3.csv", b"3")
        crew.handled("1.csv", "2.csv", "3.csv")


def test_a_stuck_output_does_not_keep_the_lease_when_the_work_must_be_cut(crew: Crew) -> None:
    """A handler hangs: the guard has to tell that, and to cut and to hand over all the same."""
    crew.hold()
    (crew.folder / "deaf").touch()
    changes: dict[str, Any] = {"polling_interval": 0.05, "member_id": "a", "exec_timeout": 0.5, "stall_timeout": 0.5}
    with Stuck(crew, RUN, **changes) as stuck:
        wait_for(stuck.full, PATIENCE, "the pipe to be full")
        second = crew.start("b")
        second.wait("standby", active="a")
        crew.files.put("1.csv", b"1")
        crew.begun(1)
        second.wait("elected")
        crew.let_go()
        assert stuck.process.poll() is None


def test_a_log_stream_that_was_closed_is_no_error() -> None:
    script = (
        "import io, ftpcoord\nstream = io.StringIO()\nftpcoord.start_logging('info', 'text', stream)\n"
        "ftpcoord.event('starting')\nassert ' info starting' in stream.getvalue()\nstream.close()\n"
        "ftpcoord.event('stopped')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=MODULE.parent, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_was_dropped_while_the_output_was_stuck_is_told_when_it_is_not(crew: Crew) -> None:
    code = """
import logging, threading, ftpcoord
room, names = threading.Event(), []
class Blocking(logging.Handler):
    def emit(self, record):
        room.wait()
        names.append((record.getMessage(), getattr(record, "fields", {})))
ftpcoord.logger.addHandler(Blocking()); ftpcoord.logger.setLevel("DEBUG")
def tell():
    for number in range(9000): ftpcoord.event("little", logging.DEBUG if number % 2 else logging.INFO, number=number)
    for number in range(9000): ftpcoord.event("much", logging.WARNING, number=number)
thread = threading.Thread(target=tell, name="ftpcoord-test"); thread.start(); thread.join(20)
assert not thread.is_alive()
room.set()
assert ftpcoord.log.flush(20)
assert ftpcoord.log.flush(20)
little = [fields["number"] for name, fields in names if name == "little"]
much = [fields["number"] for name, fields in names if name == "much"]
told = [fields["lines"] for name, fields in names if name == "log_dropped"]
print(little == list(range(len(little))), much == list(range(len(much))), len(much) > 4000 > 100 < len(little))
print(sum(told) + len(little) + len(much), len(little) + len(much) <= 10_001)
"""
    member = crew.script(code)
    assert member.process.wait(PATIENCE) == 0, member.said()
    assert member.lines() == ["True True True", "18000 True"], member.said()


def test_a_graceful_stop_whose_output_is_gone_ends_with_0_and_no_traceback(crew: Crew) -> None:
    with Stuck(crew, RUN, reader=False, member_id="a") as gone:
        crew.files.put("1.csv", b"1")
        crew.handled("1.csv")
        os.close(gone.writer)
        gone.process.send_signal(signal.SIGTERM)
        assert gone.process.wait(PATIENCE) == 0
        assert not gone.errors.read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Threads, handlers, slow transfers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [asyncio.CancelledError, KeyboardInterrupt, GeneratorExit, SystemExit])
def test_whatever_a_handler_raises_is_a_counted_failure(tmp_path: Path, error: type[BaseException]) -> None:
    with FtpHost(files={"a": b"1"}) as host:
        site = Site(tmp_path, host.settings, "none", workers=1, max_attempts=2)

        @site.listener.on_file("*")
        def handler(file: Any) -> None:
            if file.name == "a":
                raise error

        with site:
            assert site.state("a", "quarantined")["failures"] == 2
            host.put("b", b"2")
            site.state("b", "done")


class NoThreads:
    """No thread of these names can be started, as at a limit of the system, until `room`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.room, self.refused, start = False, 0, threading.Thread.start

        def limited(thread: threading.Thread) -> None:
            if not self.room and any(name in thread.name for name in names):
                self.refused += 1
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", limited)


def test_workers_that_cannot_be_started_are_said_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FtpHost(files={"a": b"1"}) as host:
        threads = NoThreads(monkeypatch, "ftpcoord-worker")
        with Site(tmp_path, host.settings) as site:
            assert "can't start new thread" in site.wait("server_down")["error"]
            wait_for(lambda: ftpcoord.why_unready(site.listener).startswith("cannot poll: this host"), PATIENCE)
            wait_for(lambda: threads.refused >= 2, PATIENCE)
            threads.room = True
            site.arrive({"a": b"1"})


def test_a_member_that_gets_no_thread_hands_over_to_one_that_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FtpHost(files={"a": b"1"}) as host:
        NoThreads(monkeypatch, "ftpcoord-worker")
        with Site(tmp_path, host.settings, yield_after=1) as site:
            site.wait("elected")
            other = ftpcoord.Coordinator(
                database=f"sqlite:///{tmp_path / 'coordination.db'}",
                member_id="b",
                heartbeat_frequency=0.2,
                coordination_group=site.listener.config.coordination_group,
                liveness_check_interval=4,
            )
            with other:
                leases = other.leases()  # whoever drops them hands over
                lease = next(leases)
                assert site.wait("released") and lease.valid()


def test_a_coordinator_that_gets_no_thread_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "database": f"sqlite:///{tmp_path / 'c.db'}",
        "coordination_group": "g",
        "notify": "true",
    }
    for name in ("ftpcoord-notify", "ftpcoord-guard"):
        before = {thread for thread in threading.enumerate() if thread.name.startswith("ftpcoord-")}
        with monkeypatch.context() as patch:
            NoThreads(patch, name)
            with pytest.raises(ftpcoord.Error, match="no thread"), ftpcoord.Coordinator(member_id=name, **settings):
                pytest.fail("it was entered")
        assert {thread for thread in threading.enumerate() if thread.name.startswith("ftpcoord-")} <= before
    with ftpcoord.Coordinator(member_id="b", liveness_check_interval=300, **settings) as other:
        assert next(other.leases()).term == 1, "nobody was elected before"


def test_a_command_that_cannot_be_watched_is_ended_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "output"
    command = ["sh", "-c", f"echo x >> {output}; exec sleep 60"]
    with FtpHost(files={"a": b"1"}) as host:
        start, room = threading.Thread.start, threading.Event()
        pids: list[int] = []
        child = ftpcoord.Child

        class Watched(child):  # type: ignore[misc,valid-type]
            def __init__(self, words: Any, *arguments: Any, **options: Any) -> None:
                super().__init__(words, *arguments, **options)
                if "sleep 60" in " ".join(words):
                    pids.append(self.pid)

        def limited(thread: threading.Thread) -> None:
            if threading.current_thread().name.startswith("ftpcoord-worker") and pids and not room.is_set():
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(ftpcoord, "Child", Watched)
        monkeypatch.setattr(threading.Thread, "start", limited)
        with Site(tmp_path, host.settings, "none", exec=shlex.join(command)) as site:
            failed = site.wait("file_failed")
            assert "cannot be watched" in failed["error"] and not any(map(alive, pids[:1]))
            assert site.row("a") and site.state("a", "failed")["failures"] == 0
            room.set()
            wait_for(lambda: len(pids) > 1 and alive(pids[-1]), PATIENCE)
            site.listener.stop()


def test_drips_are_no_progress(tmp_path: Path) -> None:
    with FtpHost(files={"a": b"x" * 1000}) as host:
        host.on("RETR", hostile.stream([b"x"] * 1000, 0.3))
        with Site(tmp_path, host.settings, workers=1, stall_timeout=1.5, timeout=5) as site:
            assert "no progress" in site.wait("handing_over")["reason"]
            site.arrive({"a": b"x" * 1000})
