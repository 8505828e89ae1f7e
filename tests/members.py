"""Members as they really run: processes of `python ftpcoord.py`, their events, and what their command recorded.

    with Crew(tmp_path, database, files, after="delete") as crew:
        a, b = crew.start("a"), crew.start("b")
        crew.active()                                   # waits until one of them is elected
        files.put("x.csv", b"1")
        wait_for(lambda: crew.names() == ["x.csv"])     # the command has handled it
        a.kill(); b.wait("elected")

Leaving the block ends all processes, and fails the test if a member has said a secret or printed a traceback, or
if two elections had the same term.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import shlex
import subprocess
import sys
import time
import unittest.mock
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional
from urllib.parse import urlsplit

import pytest
from conftest import Database, Files, wait_for
from processes import MODULE, Event, Process, compiled, environment, parse
from servers import Proxy

sys.path.insert(0, str(MODULE.parent))
ftpcoord: Any = importlib.import_module("ftpcoord")

PROGRAM = compiled()

# Seconds that anything may take on a loaded machine where no promise names a time.
PATIENCE = 30.0
LOAD = 0.5  # what waiting for a processor may add to a time that is promised
ROUND_TRIP = 1.0  # what "a round trip" may take where a dozen processes share two cores

# Each run appends one line at its begin and one at its end, each by one write(), so that lines never mix.
RECORDER = """\
import json, os, signal, sys, time
folder = sys.argv[1]
def there(name): return os.path.exists(os.path.join(folder, name))
def note(what, **more):
    line = {k: v for k, v in os.environ.items() if k.startswith("FTPCOORD_")}
    line.update(more, what=what, at=time.time(), pid=os.getpid(), arguments=sys.argv[2:])
    record = os.open(os.path.join(folder, "record"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(record, json.dumps(line).encode() + b"\\n")
    os.close(record)
if there("deaf"): signal.signal(signal.SIGTERM, signal.SIG_IGN)
note("begin")
until = time.time() + 60
while there("hold") and time.time() < until: time.sleep(0.01)
if there("fail"):
    sys.exit("this file is no good")
with open(os.environ["FTPCOORD_FILE"], "rb") as file:
    content = file.read()
note("end", length=len(content), content=content[:200].decode("latin-1"))
"""


class Run(NamedTuple):
    """One begin or end of the recording command."""

    what: str
    at: float
    pid: int
    name: str
    member: str
    term: int
    attempt: int
    length: int
    content: str
    environment: dict[str, str]
    arguments: list[str]


@functools.lru_cache(maxsize=20_000)
def noted_run(line: str) -> Run:
    """A line of the record."""
    noted = json.loads(line)
    words = {key: value for key, value in noted.items() if key.startswith("FTPCOORD_")}
    return Run(
        noted["what"],
        noted["at"],
        noted["pid"],
        words["FTPCOORD_NAME"],
        words["FTPCOORD_MEMBER"],
        int(words["FTPCOORD_TERM"]),
        int(words["FTPCOORD_ATTEMPT"]),
        noted.get("length", -1),
        noted.get("content", ""),
        words,
        noted["arguments"],
    )


class Member(Process):
    """A process, whose log has events."""

    def events(self, name: str = "", since: float = 0.0, **fields: object) -> list[Event]:
        """Its events so far of that name, with those fields, from that moment on (epoch seconds)."""
        wanted = {key: str(value) for key, value in fields.items()}
        pattern = f" {name} " if name else ""
        found = [parse(line) for line in self.lines() if pattern in line + " "]
        return [
            event
            for event in found
            if (not name or event.name == name) and event.at >= since and wanted.items() <= event.fields.items()
        ]

    def wait(self, name: str, timeout: float = PATIENCE, since: float = 0.0, **fields: object) -> Event:
        """The first such event; waits for it."""

        def first() -> Optional[Event]:
            ended = not self.running()
            found = self.events(name, since, **fields)
            assert found or not ended, f"{self} ended with {self.process.returncode} without {name}: {self.said()}"
            return found[0] if found else None

        event: Event = wait_for(first, timeout, f"{self} to say {name} {fields or ''}: {self.said()}")
        return event

    def term(self) -> int:
        """What it won last. The first term of members that start together need not be 1."""
        return int(self.wait("elected") and self.events("elected")[-1].fields["term"])

    def polls(self) -> int:
        """How many polls it has completed."""
        return len([event for event in self.events("polled") if "listed" in event.fields])


class Crew:
    """The members of one group on one machine, with a folder for their logs and for the record of their command."""

    secrets = ("secret",)  # passwords of servers.py

    def __init__(
        self, folder: Path, database: Database, files: Files, /, *, tables: bool = True, **settings: Any
    ) -> None:
        self.folder, self.database, self.files = folder, database, files
        self.members: list[Member] = []
        (folder / "recorder.py").write_text(RECORDER)
        mysql = database.name in ("mysql", "mariadb")
        # The least that MySQL's timeouts, which are whole seconds, allow.
        self.heartbeat, self.liveness = (0.5, 6.0) if mysql else (0.4, 5.0)
        self.settings: dict[str, Any] = {
            **files.settings,
            "database": database.url,
            "coordination_group": "crew",
            "heartbeat_frequency": self.heartbeat,
            "liveness_check_interval": self.liveness,
            "polling_interval": 0.4,
            "settle": 0.3,
            "retry_delay": 0.3,
            "exec": self.recorder(),
            # Else each process reads all of the system's CAs.
            **({} if database.server is None else {"database_tls": "disable"}),
            **settings,
        }
        if tables and database.server is not None:
            for statement in ftpcoord.ddl(mysql).values():
                database.execute(statement)

    def recorder(self, *arguments: str) -> str:
        """The value of `exec` that runs the recording command with these arguments."""
        words = [sys.executable, "-I", "-S", str(self.folder / "recorder.py"), str(self.folder)]
        return " ".join([*map(shlex.quote, words), *arguments])

    # -- starting and ending ------------------------------------------------------------------------------------------

    def environment(self, **changes: Any) -> dict[str, str]:
        """FTPCOORD_* of all settings; None removes one."""
        return environment({**self.settings, **changes})

    def start(self, name: str, *arguments: str, **changes: Any) -> Member:
        """A member of that id runs from here on."""
        command = [*PROGRAM, "--config", "env", *arguments]
        return self.add(Member(name, command, self.environment(member_id=name, **changes), self.folder))

    def script(self, code: str, name: str = "script", **changes: Any) -> Member:
        """A Python script runs, to which `settings` is known: all settings as a dictionary, without `exec`."""
        settings = {
            key: str(value)
            for key, value in {**self.settings, "member_id": name, **changes}.items()
            if value is not None and key != "exec"
        }
        path = self.folder / f"{name}.py"
        path.write_text(f"import sys, ftpcoord\nsettings = {settings!r}\n" + code)
        return self.add(Member(name, [sys.executable, str(path)], environment({}), self.folder))

    def add(self, member: Member) -> Member:
        self.members.append(member)
        return member

    def run(
        self, *arguments: str, environment: Optional[Mapping[str, str]] = None, timeout: float = 60, **changes: Any
    ) -> subprocess.CompletedProcess[str]:
        """A command in a process of its own, until it has ended."""
        done = subprocess.run(
            [*PROGRAM, *arguments],
            env=environment or self.environment(**changes),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        self._decent(done.stdout + done.stderr, " ".join(arguments))
        return done

    def call(
        self, *arguments: str, environment: Optional[Mapping[str, str]] = None, **changes: Any
    ) -> subprocess.CompletedProcess[str]:
        """The same within this process: a tenth of the time."""
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
        with unittest.mock.patch.dict(os.environ, environment or self.environment(**changes), clear=True):
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = ftpcoord.main(arguments)
                ftpcoord.log.flush()
        said = [stream.buffer.getvalue().decode() for stream in (out, err)]
        self._decent("".join(said), " ".join(arguments))
        return subprocess.CompletedProcess(arguments, code, *said)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for member in self.members:
            member.process.kill()
        for member in self.members:
            member.process.wait()
        self.let_go()
        print(self.said())  # pytest shows it if the test has failed
        if kind is None:
            terms: list[str] = []
            for member in self.members:
                self._decent(member.out.read_text() + member.err.read_text(), str(member))
                if "log_format" not in self.settings:
                    terms += [event.fields["term"] for event in member.events("elected")]
            assert len(terms) == len(set(terms)), f"two elections with one term: {terms}"

    def _decent(self, output: str, who: str) -> None:
        for secret in self.secrets:
            assert secret not in output, f"{who} has told the secret {secret!r}: {output}"
        assert "traceback" not in output.lower(), f"{who} printed a traceback: {output}"

    # -- who is active ------------------------------------------------------------------------------------------------

    def active(self, timeout: float = PATIENCE) -> Member:
        """The running member that is active by its own log; waits until there is one."""

        def leading() -> Optional[Member]:
            for member in self.members:
                roles = [event.name for event in member.events() if event.name in ("elected", "lost", "released")]
                if member.running() and roles and roles[-1] == "elected":
                    return member
            return None

        found: Member = wait_for(leading, timeout, "an active member")
        return found

    def standbys(self) -> list[Member]:
        """The running members that have said that they stand by, without the active one."""
        active = self.active()
        return [member for member in self.members if member.running() and member is not active]

    def elected(self, *members: Member, since: float, timeout: float = PATIENCE) -> tuple[Member, Event]:
        """Which of these members is elected from that moment on, and when."""

        def winner() -> Optional[tuple[Member, Event]]:
            for member in members:
                for event in member.events("elected", since):
                    return member, event
            return None

        found: tuple[Member, Event] = wait_for(winner, timeout, f"one of {members} to be elected")
        return found

    # -- what the command saw -----------------------------------------------------------------------------------------

    def runs(self, what: str = "end", name: str = "") -> list[Run]:
        """What the command has recorded: the ends, or the begins, of its runs."""
        record = self.folder / "record"
        whole = record.read_text().rpartition("\n")[0] if record.exists() else ""  # the last line may be half-written
        found = [noted_run(line) for line in whole.splitlines()]
        return [run for run in found if run.what == what and name in ("", run.name)]

    def names(self, what: str = "end") -> list[str]:
        """The names of the files handled, in order of the alphabet; one that was handled twice is there twice."""
        return sorted(run.name for run in self.runs(what))

    def begun(self, count: int, timeout: float = PATIENCE) -> list[Run]:
        """Waits until the command was begun so many times, and gives these runs."""
        wait_for(lambda: len(self.runs("begin")) >= count, timeout, f"{count} runs: {self.said()}")
        found = self.runs("begin")
        assert len(found) == count, found
        return found

    def handled(self, *names: str, timeout: float = PATIENCE) -> None:
        """Waits until the command has handled exactly these files."""
        expected = sorted(names)
        try:
            wait_for(lambda: self.names() == expected, timeout)
        except AssertionError:
            assert self.names() == expected, self.said()

    def said(self) -> str:
        return "\n".join(f"--- {member}\n{member.said()}" for member in self.members)

    def hold(self) -> None:
        """Runs of the command that begin from here on do not end before `let_go`."""
        (self.folder / "hold").touch()

    def let_go(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.folder / "hold").unlink()

    def fail(self, on: bool = True) -> None:
        """The command exits with 1."""
        if on:
            (self.folder / "fail").touch()
        else:
            (self.folder / "fail").unlink()

    def ledger(self) -> list[dict[str, Any]]:
        """The rows of file_ledger, ordered by path."""
        names = ["path", "size", "mtime", "state", "term", "task_id", "attempts", "failures", "error", "action"]
        rows = self.database.execute(f"SELECT {', '.join(names)} FROM file_ledger ORDER BY path")
        return [dict(zip(names, row)) for row in rows]

    def states(self) -> dict[str, str]:
        """State in the ledger by file name."""
        return {os.path.basename(row["path"]): row["state"] for row in self.ledger()}

    def status(self) -> dict[str, Any]:
        """What `status --json` prints."""
        done = self.call("status", "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def token(self) -> tuple[str, int]:
        """Holder and term, by the table."""
        ((holder, term),) = self.database.execute("SELECT task_id, term FROM token_holder")
        return holder, term


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1] not in (b"Z", b"X")
    except OSError:
        return False


def through(proxy: Proxy, files: Files) -> dict[str, Any]:
    """Settings that reach the files through this proxy (before files.server)."""
    port = urlsplit(files.url).port
    found = {"url": files.url.replace(f":{port}", f":{proxy.port}")}
    if files.scheme == "sftp":
        hosts = files.server.dir / f"known_hosts-{proxy.port}"
        hosts.write_text(files.server.known_hosts.read_text().replace(f":{port} ", f":{proxy.port} "))
        found["known_hosts"] = str(hosts)
    return found


def never(condition: Callable[[], Any], seconds: float, message: str) -> None:
    """Fails if the condition becomes true within a stretch of time in which it must not."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert not condition(), message
        time.sleep(0.02)


def kinds(*names: str) -> pytest.MarkDecorator:
    """Runs a test on these kinds of databases."""
    return pytest.mark.parametrize("database", names, indirect=True)


def stores(*names: str) -> pytest.MarkDecorator:
    """Runs a test on these kinds of file servers."""
    return pytest.mark.parametrize("file_server", names, indirect=True)
