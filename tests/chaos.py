"""Chaos: real members on a real database and real file servers are stopped, killed, frozen and cut off at random;
afterwards their history is checked against what ftpcoord promises.

    python3 tests/run.py --chaos 10         # ten minutes, divided over PostgreSQL, MySQL and SQLite

A round (`play`) is one database, one or two file servers, and four members, two of which share one id.  Its history
is made of what cannot lie about the order of things on one host:
  - the command that handles a file appends its begin, a beat every 20 ms and its end to one file, with
    CLOCK_MONOTONIC;
  - triggers in the database record every change of the token and of the ledger inside the transaction that makes it;
  - each member reaches each server through a proxy of its own, which sees when a command left the member and when
    it reached the server.  FTP is read there; for SFTP each member has a key of its own whose server process keeps a
    log of its own;
  - the members' own logs, for roles and for what they say of deadlines alone.
Files are expected by the minutes of a time zone whose minutes take a few seconds: some come in time, some late, some
never.
`check` finds what a history has of what must never happen; test_chaos.py proves that it finds each kind.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import dataclasses
import datetime
import functools
import heapq
import itertools
import json
import os
import random
import shlex
import shutil
import signal
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Optional, Union

sys.path.insert(0, str(Path(__file__).resolve().parent))
import servers
from processes import compiled

MODULE = Path(__file__).resolve().parent.parent / "ftpcoord.py"
DATABASES = ("postgresql", "mysql", "sqlite")
SLOTS = {"a1": "a", "a2": "a", "b": "b", "c": "c"}  # two members start under one id

# What the checks allow, in seconds.
WINDOW = 0.3  # between the last look at the lease and the effect, where more processes run than there are cores
DRAIN = 1.5  # drain_timeout
BLURRED = 1.5  # between the time stamp of what is done and its commit
UNSAID = 8.0  # after an alarm's row was written: who is stopped or loses its role until then may not have said it
RESUMED = 1.0  # after SIGCONT: a command that outlived its stopped parent is ended, a packet that was due has left

# ----------------------------------------------------------------------------- the command that handles a file

RECORDER = r"""
import os, signal, sys, time, zlib
words = os.environ
with open(words["FTPCOORD_FILE"], "rb") as file:
    content = file.read()
version, seconds, kind = content.partition(b"\n")[0].decode().split()
if kind == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
record = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
key = "%d.%d" % (os.getpid(), time.monotonic_ns())
def note(what, *more):
    line = [what, key, "%.6f" % (time.monotonic_ns() / 1e9), *map(str, more)]
    os.write(record, ("\t".join(line) + "\n").encode())
attempt = int(words["FTPCOORD_ATTEMPT"])
note("begin", words["CHAOS_INSTANCE"], words["FTPCOORD_GROUP"], words["FTPCOORD_PATH"], words["FTPCOORD_TERM"],
     attempt, version, len(content), zlib.crc32(content))
until = time.monotonic() + float(seconds)
while time.monotonic() < until:
    time.sleep(0.02)
    note("beat")
if kind == "poison" or (kind == "flaky" and attempt == 1):
    note("fail")
    sys.exit("this file is no good")
note("end")
"""

# ----------------------------------------------------------------------------- a time zone

MINUTE = 7  # seconds, in that zone
ZONE = "Chaos/Quick"


def quick_zone(noon: int) -> bytes:
    """The file of a time zone in which it is noon then (epoch seconds), and each minute from then on takes MINUTE."""
    first = (noon // 86400 * 86400 + 43200) - noon - (60 - MINUTE)
    offsets = [first + number * (60 - MINUTE) for number in range(200)]
    moments = [noon + number * MINUTE for number in range(len(offsets) - 1)]
    counts = struct.pack(">6I", 0, 0, 0, len(moments), len(offsets), 4)
    table = struct.pack(f">{len(moments)}i", *moments) + bytes(range(1, 200))
    types = b"".join(struct.pack(">iBB", offset, 0, 0) for offset in offsets)
    return b"TZif" + bytes(16) + counts + table + types + b"QCK\0"


# ----------------------------------------------------------------------------- history


@dataclasses.dataclass
class Life:
    """One process of a member."""

    instance: str  # slot and number: "b.3"
    member: str
    began: float
    ended: Optional[float] = None
    stops: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # SIGSTOP until SIGCONT
    roles: list[tuple[float, str, str, int]] = dataclasses.field(default_factory=list)  # at, event, group, term
    told: float = float("inf")  # SIGTERM

    def term_at(self, group: str, at: float) -> int:
        """The last term that it had won by then, 0 if none."""
        won = [term for when, name, of, term in self.roles if name == "elected" and of == group and when <= at + 0.005]
        return won[-1] if won else 0

    def stopped_at(self, at: float) -> bool:
        """Whether it was stopped then, or had just gone on."""
        return any(since <= at <= until + RESUMED for since, until in self.stops)

    def drained(self, run: Run) -> bool:
        """Whether a run was cut, or ended just then, because it took longer than a hand-over waits."""
        asked = [
            at
            for at, name, group, term in self.roles
            if name == "handing_over" and (group, term) == (run.group, run.term)
        ]
        return run.last >= min([self.told, *asked]) + DRAIN - WINDOW


@dataclasses.dataclass
class Run:
    """One run of the command."""

    instance: str
    group: str
    path: str
    term: int
    attempt: int
    version: str
    size: int
    crc: int
    begin: float
    last: float  # the last moment at which it was seen alive
    outcome: str = ""  # end, fail, or nothing: it was killed


@dataclasses.dataclass
class Command:
    """A delete or a move that a member sent to a file server."""

    instance: str
    group: str
    what: str
    path: str
    sent: float
    arrived: float


@dataclasses.dataclass
class Change:
    """A committed change of the token ("token") or of a row of the ledger ("file"), or a row of the audit trail about a
    deadline ("alarm": `state` missing or late, `size` the deadline in epoch seconds), in the database's order."""

    number: int
    at: float
    what: str
    group: str
    term: int
    member: str
    path: str = ""
    size: int = 0
    state: str = ""  # "" : the row was removed
    attempts: int = 0
    old_state: str = ""


@dataclasses.dataclass
class Upload:
    """One version of a file."""

    version: str
    group: str
    path: str
    at: float
    size: int
    crc: int
    kind: str = "plain"


@dataclasses.dataclass
class Deadline:
    """A file whose name begins so is to come later than `start`, and not later than `by`."""

    group: str
    name: str
    start: float
    by: float
    epoch: int  # `by` in epoch seconds


@dataclasses.dataclass
class Said:
    """What a member's log has of a deadline."""

    instance: str
    group: str
    what: str  # missing or late
    name: str
    epoch: int


@dataclasses.dataclass
class Left:
    """What is there at the end: versions in the inbox, versions where the after-action puts them, states by path."""

    inbox: set[str] = dataclasses.field(default_factory=set)
    moved: Counter[str] = dataclasses.field(default_factory=Counter)
    states: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class History:
    """All that happened in a round.  Times are CLOCK_MONOTONIC in seconds."""

    liveness: float
    after: dict[str, str]  # by group: "move" or "delete"
    lives: dict[str, Life] = dataclasses.field(default_factory=dict)
    runs: list[Run] = dataclasses.field(default_factory=list)
    commands: list[Command] = dataclasses.field(default_factory=list)
    connections: list[tuple[float, str, str]] = dataclasses.field(default_factory=list)  # at, instance, group
    changes: list[Change] = dataclasses.field(default_factory=list)
    uploads: list[Upload] = dataclasses.field(default_factory=list)
    deadlines: list[Deadline] = dataclasses.field(default_factory=list)
    said: list[Said] = dataclasses.field(default_factory=list)
    left: Left = dataclasses.field(default_factory=Left)
    faults: Counter[str] = dataclasses.field(default_factory=Counter)
    takeovers: list[float] = dataclasses.field(default_factory=list)
    clean_takeovers: list[float] = dataclasses.field(default_factory=list)  # while nothing else was wrong
    troubles: list[Violation] = dataclasses.field(default_factory=list)  # seen while it ran
    seconds: float = 0.0

    def repeats(self) -> int:
        """Runs of a version beyond its first one."""
        return len(self.runs) - len({run.version for run in self.runs})


@dataclasses.dataclass(frozen=True)
class Violation:
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


ENDS = ("done", "quarantined")


# ----------------------------------------------------------------------------- the checks


def check(history: History) -> list[Violation]:
    """What happened of what must never happen."""
    found = list(history.troubles)
    for group in history.after:
        found += _terms(history, group)
        found += _one_active(history, group)
        found += _fences(history, group)
    found += _claims(history)
    found += _removals(history)
    found += _repeats(history)
    found += _losses(history)
    found += _standbys(history)
    for deadline in history.deadlines:
        found += _deadline(history, deadline)
    found += [
        Violation("late takeover", f"{seconds:.2f} s, liveness_check_interval {history.liveness:g} s")
        for seconds in history.clean_takeovers
        if seconds > history.liveness + 2
    ]
    return found


def _terms(history: History, group: str) -> Iterable[Violation]:
    """Terms only grow, and each is won by one process alone."""
    last = 0
    for change in history.changes:
        if change.what == "token" and change.group == group:
            if change.term <= last:
                yield Violation("term repeated", f"{group}: term {change.term} after {last}")
            last = max(last, change.term)
    winners: dict[int, str] = {}
    for life in history.lives.values():
        for _, name, of, term in life.roles:
            if name == "elected" and of == group:
                if winners.setdefault(term, life.instance) != life.instance:
                    text = f"{group}: {life.instance} and {winners[term]} both won term {term}"
                    yield Violation("term repeated", text)


def _one_active(history: History, group: str) -> Iterable[Violation]:
    """Nothing of a term happens any more once a newer term has had an effect: neither begins nor goes on.

    Exceptions, as stated: a command whose parent was stopped, or killed while it was being started, and a packet that
    a stopped member had been about to send.
    """
    effects: list[tuple[float, int, str, str]] = []  # at, term, instance, what
    for run in history.runs:
        if run.group == group:
            effects.append((run.begin, run.term, run.instance, f"begin of {run.path}"))
    for command in history.commands:
        if command.group == group:
            term = history.lives[command.instance].term_at(group, command.sent)
            effects.append((command.sent, term, command.instance, f"{command.what} of {command.path}"))
    effects.sort()
    first: dict[int, float] = {}
    for at, term, _, _ in effects:
        first.setdefault(term, at)
    for change in history.changes:
        if change.what == "file" and change.group == group and change.state == "claimed":
            first[change.term] = min(change.at, first.get(change.term, change.at))

    def superseded(term: int) -> float:
        """When the first newer term began to act."""
        return min((at for newer, at in first.items() if newer > term), default=float("inf"))

    for at, term, instance, what in effects:
        since = superseded(term)
        if at > since + WINDOW and not history.lives[instance].stopped_at(at):
            text = f"{group}: {instance}, term {term}: {what} {at - since:.3f} s after a newer term's first effect"
            yield Violation("stale effect", text)
    runs = [run for run in history.runs if run.group == group]
    for run in runs:
        since, life = superseded(run.term), history.lives[run.instance]
        if life.ended is not None and run.begin >= life.ended:
            continue
        if run.last > since + WINDOW and not life.stopped_at(since + WINDOW) and not life.stopped_at(run.last):
            text = f"{group}: {run.instance}, term {run.term}, still handled {run.path} {run.last - since:.3f} s later"
            yield Violation("two active", text)
    by_path: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_path[run.path].append(run)
    for path, theirs in by_path.items():
        for one, other in itertools.combinations(sorted(theirs, key=lambda run: run.begin), 2):
            older = min(one, other, key=lambda run: run.term)
            if other.begin < one.last and not history.lives[older.instance].stopped_at(other.begin):
                text = (
                    f"{group}: {path}: {one.instance} term {one.term} until {one.last:.3f}, "
                    f"{other.instance} term {other.term} from {other.begin:.3f}"
                )
                yield Violation("overlap", text)


def _fences(history: History, group: str) -> Iterable[Violation]:
    """A row is only ever written under the term that holds the token at that moment, by its holder."""
    term, member = 0, ""
    for change in history.changes:
        if change.group != group:
            continue
        if change.what == "token":
            term, member = change.term, change.member
        elif change.what == "alarm":
            if change.member != member:
                yield Violation("stale write", f"{group}: {change.path} is {change.state}, says {change.member}")
        elif change.state and (change.term, change.member) != (term, member):
            text = f"{change.path} {change.state} by {change.member}, {change.term}; the token: {member}, {term}"
            yield Violation("stale write", f"{group}: {text}")


def _claims(history: History) -> Iterable[Violation]:
    """Each run was claimed before, under its term and attempt; what it got was one uploaded version, whole."""
    claimed: dict[tuple[str, str, int, int], float] = {}
    for change in history.changes:
        if change.state == "claimed":
            claimed.setdefault((change.group, change.path, change.term, change.attempts), change.at)
    uploads = {upload.version: upload for upload in history.uploads}
    for run in history.runs:
        at = claimed.get((run.group, run.path, run.term, run.attempt))
        if at is None or at > run.begin + 0.01:
            yield Violation("no claim", f"{run.group}: {run.path} term {run.term} attempt {run.attempt}")
        upload = uploads.get(run.version)
        if upload is None or (run.path, run.size, run.crc) != (upload.path, upload.size, upload.crc):
            yield Violation("wrong content", f"{run.group}: {run.path} version {run.version}, {run.size} bytes")


def _versions(history: History) -> dict[tuple[str, str], list[Upload]]:
    by_path: dict[tuple[str, str], list[Upload]] = defaultdict(list)
    for upload in sorted(history.uploads, key=lambda upload: upload.at):
        by_path[upload.group, upload.path].append(upload)
    return by_path


def _version_at(versions: Sequence[Upload], at: float) -> Optional[Upload]:
    place = bisect.bisect_right([upload.at for upload in versions], at)
    return versions[place - 1] if place else None


def _done(history: History) -> dict[str, float]:
    """By version: when `done` was first committed."""
    versions = _versions(history)
    found: dict[str, float] = {}
    for change in history.changes:
        if change.state == "done" and change.old_state == "claimed":
            upload = _version_at(versions[change.group, change.path], change.at)
            if upload is not None:
                found.setdefault(upload.version, change.at)
    return found


def _removals(history: History) -> Iterable[Violation]:
    """Nothing is deleted or moved that is not done."""
    versions, done = _versions(history), _done(history)
    for command in history.commands:
        upload = _version_at(versions[command.group, command.path], command.arrived)
        if upload is None:
            continue
        at = done.get(upload.version)
        if at is None or at > command.arrived + 0.01:
            # Sent for the version before, to arrive late: a stated exception, unless the file was lost by it.
            earlier = _version_at(versions[command.group, command.path], command.sent)
            if earlier is upload or earlier is None or upload.version not in _handled(history):
                text = f"{command.group}: {command.instance} {command.what} {command.path} before it was done"
                yield Violation("removed too early", text)


def _handled(history: History) -> set[str]:
    return {run.version for run in history.runs if run.outcome == "end"}


def _repeats(history: History) -> Iterable[Violation]:
    """A version is handled again only after a failure, or if its member died or lost its lease before `done`."""
    done = _done(history)
    by_version: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(history.runs, key=lambda run: (run.term, run.begin)):
        by_version[run.version].append(run)
    for version, runs in by_version.items():
        for before, run in zip(runs, runs[1:]):
            where = f"{run.group}: {run.path} version {version}, attempts {before.attempt} and {run.attempt}"
            life = history.lives[before.instance]
            released = any(
                name == "released" and group == run.group and term == before.term for _, name, group, term in life.roles
            )
            if version in done and done[version] < run.begin - 0.01:
                yield Violation("handled twice", f"{where}: it was done")
            elif before.outcome == "fail":
                pass
            elif run.term == before.term:
                yield Violation("handled twice", f"{where}: both in term {run.term} of {run.instance}")
            elif before.outcome == "end" and released and not life.drained(before):
                yield Violation("handled twice", f"{where}: {life.instance} released its lease without a word of it")
            if run.attempt <= before.attempt:
                yield Violation("attempt not counted", where)


def _losses(history: History) -> Iterable[Violation]:
    """At the end each version has been handled, or is visibly quarantined; what was to be kept is there."""
    handled = _handled(history)
    for upload in history.uploads:
        state = history.left.states.get((upload.group, upload.path), "")
        where = f"{upload.group}: {upload.path} version {upload.version} ({upload.kind})"
        if state == "quarantined" and upload.version in history.left.inbox:
            continue
        if upload.version not in handled:
            there = "waits" if upload.version in history.left.inbox else "is gone"
            yield Violation("lost", f"{where} was never handled to its end; it {there}, state {state or 'none'}")
        elif upload.version in history.left.inbox:
            yield Violation("left behind", f"{where} is still in the inbox, state {state or 'none'}")
        elif history.after[upload.group] == "move" and history.left.moved[upload.version] != 1:
            text = f"{where} is {history.left.moved[upload.version]} times where it was to be moved"
            yield Violation("lost", text)


def _standbys(history: History) -> Iterable[Violation]:
    """Only the active member connects to the file server."""
    for at, instance, group in history.connections:
        life, active = history.lives[instance], False
        for when, name, of, _ in life.roles:
            if of == group and when <= at + 0.01:
                active = name in ("elected", "handing_over") or when >= at - WINDOW
        if not active and not life.stopped_at(at):
            yield Violation("standby connected", f"{group}: {instance} at {at:.3f}")


def _alarms(history: History, deadline: Deadline, what: str) -> list[Change]:
    """The rows of the audit trail that say so of a deadline."""
    return [
        change
        for change in history.changes
        if (change.what, change.group, change.state, change.size) == ("alarm", deadline.group, what, deadline.epoch)
        and os.path.basename(change.path).startswith(deadline.name)
    ]


def _came(history: History, deadline: Deadline) -> Optional[float]:
    """When its file was first done."""
    return min(
        (
            change.at
            for change in history.changes
            if (change.what, change.group, change.state) == ("file", deadline.group, "done")
            and os.path.basename(change.path).startswith(deadline.name)
        ),
        default=None,
    )


def _deadline(history: History, deadline: Deadline) -> Iterable[Violation]:
    """What passed has its file or its alarm, once; the alarm has its end once, if the file comes after all."""
    came, where = _came(history, deadline), f"{deadline.group}: {deadline.name} by {deadline.by:.3f}"
    missing, late = (_alarms(history, deadline, what) for what in ("missing", "late"))
    in_time = came is not None and deadline.start + BLURRED < came < deadline.by - BLURRED
    if in_time and (missing or late):
        yield Violation("false alarm", f"{where}, but it was done at {came:.3f}")
    about = any(came is not None and abs(came - moment) <= BLURRED for moment in (deadline.start, deadline.by))
    if not (in_time or about or missing or late):
        yield Violation("deadline lost", f"{where}: nothing was done by then (first at {came}), and nobody noticed")
    if came is not None and came > deadline.by + BLURRED and not late:
        yield Violation("deadline lost", f"{where}: done at {came:.3f}, which was not noticed")
    for what, rows in (("missing", missing), ("late", late)):
        said = [
            one.instance
            for one in history.said
            if (one.group, one.what, one.epoch) == (deadline.group, what, deadline.epoch)
            and one.name.startswith(deadline.name)
        ]
        if len(rows) > 1 or len(said) > 1:
            yield Violation("alarm twice", f"{where}: {what}: {len(rows)} rows, said by {', '.join(said) or 'nobody'}")
        if said and not rows:
            yield Violation("alarm without its row", f"{where}: {what}, says {said[0]}")
        if rows and not said and not _interrupted(history, rows[0]):
            yield Violation("alarm unsaid", f"{where}: {what}: {rows[0].member} wrote the row at {rows[0].at:.3f}")


def _interrupted(history: History, row: Change) -> bool:
    """Whether who wrote an alarm's row had no time to say it."""
    since, until = row.at - WINDOW, row.at + UNSAID
    return any(
        since <= (life.ended or 0.0) <= until
        or any(began <= until and since <= ended for began, ended in life.stops)
        or any(since <= at <= until and name != "elected" and of == row.group for at, name, of, _ in life.roles)
        for life in history.lives.values()
        if life.member == row.member
    )


# ----------------------------------------------------------------------------- proxies that remember


class Proxy(servers.Proxy):
    """A proxy whose connections may be reset at any moment, also while they are made."""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await super()._serve(reader, writer)


class Tap(Proxy):
    """A proxy that remembers when what a client sent was taken and passed on, by its own port to the server."""

    def __init__(self, port: int) -> None:
        self.accepted: list[float] = []
        self.chunks: dict[int, list[tuple[float, float]]] = defaultdict(list)  # (taken, passed on)
        self.lines: list[tuple[float, float, str]] = []  # the same with an FTP command
        super().__init__(servers.HOST, port)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted.append(time.monotonic())
        super()._accept(reader, writer)

    async def _forward(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, answered: list[bool], from_client: bool
    ) -> None:
        if from_client:
            both: Any = _Ear(self, source, target)
            source = target = both
        await super()._forward(source, target, answered, from_client)


class _Ear:
    """A client's stream and the server's, with an ear between them."""

    def __init__(self, tap: Tap, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        self.tap, self.source, self.target = tap, source, target
        self.taken: list[float] = []
        self.text = ""
        self.chunks = tap.chunks[target.get_extra_info("sockname")[1]]
        self.drain, self.write_eof = target.drain, target.write_eof

    async def read(self, size: int) -> bytes:
        data = await self.source.read(size)
        self.taken.append(time.monotonic())
        return data

    def write(self, data: bytes) -> None:
        taken, now = self.taken.pop(0), time.monotonic()
        self.chunks.append((taken, now))
        self.target.write(data)
        lines = (self.text + data.decode("latin-1")).split("\r\n")
        self.text = lines.pop()[-10000:]
        self.tap.lines += [(taken, now, line) for line in lines if line.startswith(("DELE ", "RNFR ", "RNTO "))]


# ----------------------------------------------------------------------------- the file servers


class Inbox:
    """A folder on a file server that members watch, each through a proxy of its own."""

    def __init__(self, server: servers.Server, after: str) -> None:
        self.server, self.after = server, after
        self.group = server.name
        self.root = server.folder()
        self.taps = {slot: Tap(server.port) for slot in SLOTS}
        self.log = server.dir / "sessions"
        self.expect = ""
        self._stamps: dict[str, list[tuple[float, str]]] = {}
        self._ended = threading.Event()
        self._tail: Optional[threading.Thread] = None
        if isinstance(server, servers.Sshd):
            self._give_keys(server)
            self._tail = threading.Thread(target=self._watch, name="sessions", daemon=True)
            self._tail.start()

    def _give_keys(self, server: servers.Sshd) -> None:
        """Each member has a key of its own; its SFTP process writes what it is told to a file of its own."""
        self.log.mkdir()
        if server.ids and os.getuid() == 0:
            os.chown(self.log, *server.ids)
        program = next(
            path
            for path in (
                "/usr/lib/openssh/sftp-server",
                "/usr/libexec/openssh/sftp-server",
                "/usr/lib/ssh/sftp-server",
                "/usr/libexec/sftp-server",
            )
            if os.path.exists(path)
        )
        script = server.dir / "session"
        script.write_text(
            f'set -- $1 $SSH_CONNECTION\nexec {program} -d {server.root} -e -l INFO 2>>"{self.log}/$1.$3.$$"\n'
        )
        lines = []
        for slot, tap in self.taps.items():
            key = server.dir / f"key-{slot}"
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", slot, "-f", str(key)],
                check=True,
                stdin=subprocess.DEVNULL,
            )
            lines.append(f'restrict,command="/bin/sh {script} {slot}" {Path(f"{key}.pub").read_text()}')
            hosts = server.known_hosts.read_text().replace(f":{server.port} ", f":{tap.port} ")
            (server.dir / f"hosts-{slot}").write_text(hosts)
        (server.dir / "authorized_keys").write_text("".join(lines))

    def settings(self, slot: str) -> dict[str, str]:
        """What a member needs to reach it."""
        found = {name: str(value) for name, value in self.server.settings(self.root).items()}
        found["url"] = found["url"].replace(f":{self.server.port}", f":{self.taps[slot].port}")
        if self._tail:
            found.update(key=str(self.server.dir / f"key-{slot}"), known_hosts=str(self.server.dir / f"hosts-{slot}"))
        found.update(coordination_group=self.group, after="move:done" if self.after == "move" else "delete")
        found.update({"expect": self.expect, "timezone": ZONE} if self.expect else {})
        return found

    def _watch(self) -> None:
        """Reads the sessions' logs as they grow, for the moment of each line."""
        open_logs: dict[str, Any] = {}
        known: set[str] = set()
        while not self._ended.wait(0.005):
            for name in os.listdir(self.log):
                if name not in known:
                    known.add(name)
                    open_logs[name] = (open(self.log / name, encoding="utf-8", errors="replace"), [])  # noqa: SIM115
                    self._stamps[name] = []
            for name, (file, rest) in list(open_logs.items()):
                text = "".join(rest) + file.read()
                now = time.monotonic()  # after reading: a line is never older than its moment says
                lines = text.split("\n")
                rest[:] = [lines.pop()]
                for line in lines:
                    self._stamps[name].append((now, line.strip()))
                    if line.startswith("session closed"):
                        open_logs.pop(name)[0].close()
        for file, _ in open_logs.values():
            file.close()

    def commands(self, instance_at: Callable[[str, float], Optional[str]]) -> list[Command]:
        """The deletes and moves that members have sent."""
        found = []

        def add(slot: str, what: str, path: str, sent: float, arrived: float) -> None:
            instance = instance_at(slot, sent)
            if instance is not None:
                found.append(Command(instance, self.group, what, path, sent, arrived))

        for slot, tap in self.taps.items():
            source = ""
            for sent, arrived, line in tap.lines:
                verb, _, path = line.partition(" ")
                if verb == "RNFR":
                    source = path
                elif verb == "RNTO":
                    add(slot, "move", source, sent, arrived)
                elif verb == "DELE":
                    add(slot, "delete", path, sent, arrived)
        for name, lines in self._stamps.items():
            slot, port = name.split(".")[:2]
            chunks = self.taps[slot].chunks[int(port)]
            for seen, line in lines:
                words = shlex.split(line) if line.startswith(("remove name", "rename old")) else []
                if words:
                    # The last that had been passed on by then: the command itself, or what came just after it.
                    place = bisect.bisect_right([passed for _, passed in chunks], seen)
                    sent, arrived = chunks[place - 1] if place else (seen, seen)
                    add(slot, "delete" if words[0] == "remove" else "move", words[2], sent, arrived)
        return found

    def versions(self, folder: Path) -> list[str]:
        """The versions of the files in a folder."""
        found = []
        for entry in os.scandir(folder) if folder.is_dir() else ():
            if entry.is_file():
                with contextlib.suppress(FileNotFoundError), open(entry.path, "rb") as file:
                    found.append(file.readline().split()[0].decode())
        return found

    def close(self) -> None:
        self._ended.set()
        if self._tail:
            self._tail.join()
        for tap in self.taps.values():
            tap.close()


# ----------------------------------------------------------------------------- the database

_COLUMNS = "at, what, grp, path, size, state, term, attempts, member, old_state"
_NEW_FILE = "NEW.group_id, NEW.path, NEW.size, NEW.state, NEW.term, NEW.attempts, NEW.task_id"
_OLD_FILE = "OLD.group_id, OLD.path, OLD.size, '', OLD.term, OLD.attempts, OLD.task_id, OLD.state"
_ALARM = "'alarm', NEW.group_id, NEW.path, {}, NEW.outcome, 0, 0, NEW.task_id, ''"
_IS_ALARM = "NEW.outcome IN ('missing', 'late')"
_TOKEN = "'token', NEW.group_id, '', 0, '', NEW.term, 0, NEW.task_id, ''"


def _audit_postgresql() -> list[str]:
    now = "extract(epoch FROM clock_timestamp())"
    insert = f"INSERT INTO chaos ({_COLUMNS}) SELECT {now}"
    return [
        "CREATE TABLE chaos (number bigserial PRIMARY KEY, at float8, what text, grp text, path text, size bigint, "
        "state text, term bigint, attempts int, member text, old_state text)",
        f"CREATE FUNCTION chaos_token() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {insert}, {_TOKEN}; "
        "RETURN NULL; END $$",
        f"CREATE FUNCTION chaos_file() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF TG_OP = 'DELETE' THEN {insert}, 'file', {_OLD_FILE}; "
        f"ELSIF TG_OP = 'INSERT' THEN {insert}, 'file', {_NEW_FILE}, ''; "
        f"ELSE {insert}, 'file', {_NEW_FILE}, OLD.state; END IF; RETURN NULL; END $$",
        "CREATE TRIGGER chaos_token AFTER INSERT OR UPDATE ON token_holder FOR EACH ROW "
        "WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION chaos_token()",
        "CREATE TRIGGER chaos_file AFTER INSERT OR UPDATE OR DELETE ON file_ledger FOR EACH ROW "
        "EXECUTE FUNCTION chaos_file()",
        f"CREATE FUNCTION chaos_alarm() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {insert}, "
        f"{_ALARM.format('extract(epoch FROM NEW.at)')}; RETURN NULL; END $$",
        f"CREATE TRIGGER chaos_alarm AFTER INSERT ON file_audit FOR EACH ROW WHEN ({_IS_ALARM}) "
        "EXECUTE FUNCTION chaos_alarm()",
    ]


def _audit_plain(table: str, now: str, deadline: str, number: str = "") -> list[str]:
    """The triggers of MySQL and SQLite, one for each kind of change."""
    columns = f"number, {_COLUMNS}" if number else _COLUMNS
    insert = f"INSERT INTO chaos ({columns}) SELECT {number + ', ' if number else ''}{now}"
    changed = "NEW.state <> OLD.state OR NEW.term <> OLD.term OR NEW.attempts <> OLD.attempts"
    bodies = [
        ("INSERT ON token_holder", f"{insert}, {_TOKEN}"),
        ("UPDATE ON token_holder", f"{insert}, {_TOKEN} FROM (SELECT 1 AS one) o WHERE NEW.term <> OLD.term"),
        ("INSERT ON file_ledger", f"{insert}, 'file', {_NEW_FILE}, ''"),
        (
            "UPDATE ON file_ledger",
            f"{insert}, 'file', {_NEW_FILE}, OLD.state FROM (SELECT 1 AS one) o WHERE {changed}",
        ),
        ("DELETE ON file_ledger", f"{insert}, 'file', {_OLD_FILE}"),
        (
            "INSERT ON file_audit",
            f"{insert}, {_ALARM.format(deadline)} FROM (SELECT 1 AS one) o WHERE {_IS_ALARM}",
        ),
    ]
    return [table] + [
        f"CREATE TRIGGER chaos_{place} AFTER {event} FOR EACH ROW BEGIN {body}; END"
        for place, (event, body) in enumerate(bodies)
    ]


class Store:
    """The shared database, with triggers that keep its history, and a proxy for each member."""

    def __init__(self, name: str, folder: Path, module: Any) -> None:
        self.name = name
        self.server: Union[servers.Postgres, servers.Mysql, None] = None
        self.file = folder / "coordination.db"
        self.taps: dict[str, Proxy] = {}
        statements = list(module.ddl(name == "mysql").values())
        if name == "sqlite":
            table = (
                "CREATE TABLE chaos (number INTEGER PRIMARY KEY AUTOINCREMENT, at, what, grp, path, size, state, "
                "term, attempts, member, old_state)"
            )
            statements += _audit_plain(
                table, "(julianday('now') - 2440587.5) * 86400", "CAST(strftime('%s', NEW.at) AS INTEGER)"
            )
        elif name == "postgresql":
            self.server = servers.postgres()
            statements += _audit_postgresql()
        else:
            # A commit survives the death of the process, if not that of the machine: that much is promised.
            self.server = servers.mysql(options={"innodb-flush-log-at-trx-commit": "2"})
            table = (
                "CREATE TABLE chaos (number BIGINT UNSIGNED PRIMARY KEY, at DOUBLE, what VARCHAR(9), grp VARCHAR(128), "
                "path TEXT, size BIGINT, state VARCHAR(16), term BIGINT, attempts INT, member VARCHAR(128), "
                "old_state VARCHAR(16))"
            )
            # UUID_SHORT() grows, and does not touch LAST_INSERT_ID().
            now = "TIMESTAMPDIFF(MICROSECOND, '1970-01-01', CONVERT_TZ(SYSDATE(6), @@time_zone, '+00:00')) / 1e6"
            statements += _audit_plain(table, now, "TIMESTAMPDIFF(SECOND, '1970-01-01', NEW.at)", "UUID_SHORT()")
        if self.server is not None:
            self.taps = {slot: Proxy(servers.HOST, self.server.port) for slot in SLOTS}
        self.execute(*statements)

    def url(self, slot: str) -> str:
        if self.server is None:
            return f"sqlite:///{self.file}"
        return self.server.url.replace(f":{self.server.port}", f":{self.taps[slot].port}")

    def execute(self, *statements: str) -> list[tuple[Any, ...]]:
        """The rows of the last one."""
        connection: Any
        if self.server is None:
            connection = sqlite3.connect(self.file, timeout=60, isolation_level=None)  # a stopped member may hold it
        elif isinstance(self.server, servers.Postgres):
            connection = servers.pg_login(self.server.port)
            connection.autocommit = True
        else:
            connection = servers.mysql_login(self.server.port, autocommit=True)
        rows: list[tuple[Any, ...]] = []
        with contextlib.closing(connection):
            cursor = connection.cursor()
            for statement in statements:
                cursor.execute(statement)
                rows = [tuple(row) for row in cursor.fetchall()] if cursor.description else []
        return rows

    def changes(self, offset: float) -> list[Change]:
        """All changes in the database's order; `offset` leads from its clock to ours."""
        rows = self.execute(f"SELECT number, {_COLUMNS} FROM chaos ORDER BY number")
        found = []
        for number, at, what, group, path, size, state, term, attempts, member, old_state in rows:
            found.append(Change(number, at + offset, what, group, term, member, path, size, state, attempts, old_state))
        return found

    def close(self) -> None:
        for tap in self.taps.values():
            tap.close()
        if self.server is not None:
            self.server.close()


# ----------------------------------------------------------------------------- a round


class Member:
    """A place where one process of a member runs at a time."""

    def __init__(self, world: World, slot: str) -> None:
        self.world, self.slot, self.id = world, slot, SLOTS[slot]
        self.busy = False  # a fault of its process is under way
        self.expected = False  # its process may end
        self.lives: list[Life] = []
        self.process: Optional[subprocess.Popen[bytes]] = None
        self.out = world.folder / "none"
        self._read = 0

    @property
    def life(self) -> Life:
        return self.lives[-1]

    def start(self) -> None:
        world = self.world
        instance = f"{self.slot}.{len(self.lives) + 1}"
        self.out, self._read, self.expected = world.folder / f"{instance}.log", 0, False
        life = Life(instance, self.id, time.monotonic())
        self.lives.append(life)
        world.history.lives[instance] = life
        environment = {key: value for key, value in os.environ.items() if not key.startswith("FTPCOORD_")}
        # One as most are installed; the others need not be compiled at each start.
        start = [sys.executable, str(world.module_path)] if self.slot == "b" else compiled(world.module_path)
        environment.update(CHAOS_INSTANCE=instance, PYTHONTZPATH=str(world.folder / "zones"))
        with open(self.out, "wb") as out:
            self.process = subprocess.Popen(
                [*start, "--config", str(world.folder / f"{self.slot}.ini")],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=world.folder,
            )

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> None:
        self.send(signal.SIGSTOP)
        self.life.stops.append((time.monotonic(), float("inf")))

    def go_on(self) -> None:
        since, until = self.life.stops[-1]
        if until == float("inf") and self.running():
            self.send(signal.SIGCONT)
            self.life.stops[-1] = (since, time.monotonic())

    def finish(self) -> None:
        """SIGTERM, if it runs."""
        self.expected = True
        if self.running():
            self.life.told = time.monotonic()
            self.send(signal.SIGTERM)

    def listen(self) -> None:
        """Reads on in its log."""
        if not self.lives:
            return
        with open(self.out, "rb") as file:
            file.seek(self._read)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        self._read += len(data)
        for line in data.decode(errors="replace").splitlines():
            if "traceback" in line.lower() or not line.startswith("{"):
                if not line.endswith(": this file is no good"):
                    self.world.trouble("bad output", f"{self.life.instance}: {line[:2000]}")
                continue
            said = json.loads(line)
            if said["event"] in ("file_missing", "file_late"):
                by = datetime.datetime.strptime(said["by"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.timezone.utc)
                what, name = said["event"][len("file_") :], os.path.basename(said["path"])
                self.world.history.said.append(Said(self.life.instance, said["group"], what, name, int(by.timestamp())))
            if said["event"] in ("elected", "lost", "released", "handing_over"):
                at = datetime.datetime.strptime(said["time"], "%Y-%m-%dT%H:%M:%S.%fZ")
                moment = at.replace(tzinfo=datetime.timezone.utc).timestamp() + self.world.offset
                self.life.roles.append((moment, said["event"], said["group"], said["term"]))
                if said["event"] == "elected":
                    self.world.elected(self, moment, said["group"])

    def active(self, group: str) -> bool:
        roles = [name for _, name, of, _ in self.life.roles if of == group] if self.lives else []
        return bool(roles) and roles[-1] in ("elected", "handing_over") and self.running()


@dataclasses.dataclass
class Fault:
    kind: str
    slot: str  # "" : the database's server
    began: float
    until: float = float("inf")


@dataclasses.dataclass
class Watch:
    """An active member in trouble: when will another one have taken its place?"""

    group: str
    slot: str
    began: float
    kind: str
    ended: float = float("inf")  # the fault; a takeover after that had another reason


class World:
    """Members, servers, uploads and faults of one round."""

    def __init__(
        self,
        database: str,
        file_servers: Sequence[str],
        seed: int,
        folder: Path,
        module_path: Path = MODULE,
        seconds: float = 0.0,
        **settings: Any,
    ) -> None:
        """With `seconds` files are expected in the course of them."""
        sys.path.insert(0, str(MODULE.parent))
        import ftpcoord

        self.chance, self.folder = random.Random(seed), folder
        # A copy: members that start later run the same program, even if somebody edits it meanwhile.
        self.module_path = Path(shutil.copy(module_path, folder / "ftpcoord.py"))
        self.offset = time.monotonic() - time.time()
        self.heartbeat, self.liveness = (0.4, 4.2) if database == "mysql" else (0.3, 3.0)
        self.timing = ftpcoord.Timing(self.heartbeat, self.liveness, ftpcoord.DIALECTS[database].least_timeout)
        self.history = History(self.liveness, {})
        self.record = folder / "record"
        self.faults: list[Fault] = []
        self.watches: list[Watch] = []
        self.inboxes: list[Inbox] = []
        self._jobs: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count(1)
        self._uploads = itertools.count(1)
        self._lock = threading.Lock()
        self._server_fault = False
        self.long_handlers = False
        (folder / "recorder.py").write_text(RECORDER)
        self.store = Store(database, folder, ftpcoord)
        try:
            for name in file_servers:
                server: servers.Server = servers.vsftpd() if name == "vsftpd" else servers.sshd()
                inbox = Inbox(server, self.chance.choice(("move", "delete")))
                self.inboxes.append(inbox)
                self.history.after[inbox.group] = inbox.after
            self.noon = int(time.time()) + 3
            (folder / "zones" / "Chaos").mkdir(parents=True)
            (folder / "zones" / ZONE).write_bytes(quick_zone(self.noon))
            for inbox in self.inboxes:
                inbox.expect = ", ".join(self._plan(inbox, minute) for minute in range(1, int((seconds - 4) / MINUTE)))
            self.members = {slot: Member(self, slot) for slot in SLOTS}
            for slot in SLOTS:
                self._write_settings(slot, settings)
        except BaseException:
            self.close()
            raise

    def _write_settings(self, slot: str, more: dict[str, Any]) -> None:
        recorder = [sys.executable, "-I", "-S", str(self.folder / "recorder.py"), str(self.record)]
        common = {
            "database": self.store.url(slot),
            "member_id": SLOTS[slot],
            "heartbeat_frequency": self.heartbeat,
            "liveness_check_interval": self.liveness,
            "polling_interval": 0.4,
            "settle": 0.05,
            "retry_delay": 0.2,
            "timeout": 2,
            "workers": 8,
            "max_attempts": 3,
            "drain_timeout": DRAIN,
            "exec": shlex.join(recorder),
            "exec_timeout": 20,
            "log_format": "json",
            "yield_after": 3,
            "audit": "on",
            **more,
        }
        lines = ["[DEFAULT]", *(f"{name} = {value}" for name, value in common.items())]
        for inbox in self.inboxes:
            lines += [f"[{inbox.group}]", *(f"{name} = {value}" for name, value in inbox.settings(slot).items())]
        (self.folder / f"{slot}.ini").write_text("\n".join(lines) + "\n")

    def _plan(self, inbox: Inbox, minute: int) -> str:
        """Two files are expected by a minute of the zone; when they come, if they do."""
        now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        self.store.execute(
            "INSERT INTO file_audit (group_id, file_id, at, path, size, mtime, sha256, outcome, term, task_id, "
            f"attempt, error) VALUES ('{inbox.group}', '{minute:064}', '{now}', '/before', 0, '', '', 'adopted', 0, "
            "'chaos', 0, '')"
        )
        found = []
        for number, since in (("a", ""), ("b", f" from 12:{minute - 1:02}")):
            name, by = f"0-due-{minute}{number}-", self.noon + minute * MINUTE
            start = by - MINUTE if since else by - 86400
            self.history.deadlines.append(Deadline(inbox.group, name, start + self.offset, by + self.offset, by))
            comes = self.chance.choice(("in time", "in time", "late", "never"))
            away = self.chance.uniform(0.2, MINUTE - 0.5)
            if comes != "never":
                moment = by - away if comes == "in time" else by + away
                self.later(moment - time.time(), functools.partial(self._put, inbox, f"{name}x.dat", 0.05, "plain"))
            found.append(f"{name}*.dat{since} by 12:{minute:02}")
        return ", ".join(found)

    def trouble(self, kind: str, text: str) -> None:
        self.history.troubles.append(Violation(kind, text))

    # -- what happens in the course of time

    def later(self, seconds: float, job: Callable[[], None]) -> None:
        with self._lock:
            heapq.heappush(self._jobs, (time.monotonic() + seconds, next(self._numbers), job))

    def run(self, seconds: float, faults: bool = True) -> None:
        """Lets all go on for that long."""
        until = time.monotonic() + seconds
        next_fault = time.monotonic() + 2.0
        next_upload = 0.0
        while time.monotonic() < until:
            now = time.monotonic()
            while self._jobs and self._jobs[0][0] <= now:
                heapq.heappop(self._jobs)[2]()
            for member in self.members.values():
                member.listen()
                self._notice_end(member)
            if now >= next_upload:
                self.upload()
                next_upload = now + self.chance.expovariate(4.0)
            if faults and now >= next_fault:
                self.fault()
                next_fault = now + self.chance.uniform(0.2, 1.6)
            time.sleep(0.01)

    def _notice_end(self, member: Member) -> None:
        if not member.lives or member.running() or member.life.ended is not None:
            return
        member.life.ended = time.monotonic()
        assert member.process is not None
        if not member.expected:
            self.trouble("ended by itself", f"{member.life.instance} with code {member.process.returncode}")
            self.later(0.5, member.start)

    def upload(self) -> None:
        """A file appears: a new name, or one that was handled and went."""
        inbox = self.chance.choice(self.inboxes)
        number = next(self._uploads)
        name = f"{number:05}.dat"
        if self.chance.random() < 0.2:
            old = [upload for upload in self.history.uploads if upload.group == inbox.group and upload.kind != "poison"]
            names = [os.path.basename(upload.path) for upload in old[-30:] if "due-" not in upload.path]
            if names:
                again = self.chance.choice(names)
                if not (inbox.root / again).exists():
                    name = again
        seconds = self.chance.choice((0.0, 0.05, 0.2, 0.5, 1.5))
        kind = self.chance.choices(("plain", "deaf", "flaky", "poison"), (80, 10, 8, 2))[0]
        if self.long_handlers or (kind in ("plain", "deaf") and self.chance.random() < 0.12):
            seconds = self.chance.uniform(1.5, 3) * self.timing.stale_after  # it sees the lease end
        self._put(inbox, name, seconds, kind, number)

    def _put(self, inbox: Inbox, name: str, seconds: float, kind: str, number: int = 0) -> None:
        version = f"v{number or next(self._uploads)}"
        head = f"{version} {seconds} {kind}\n".encode()
        content = head + self.chance.choice((b"", b"x" * 1000, bytes(range(256)) * self.chance.choice((20, 1000))))
        path = inbox.server.url_of(inbox.root / name).partition("@")[2]
        path = "/" + path.partition("/")[2]
        # Before it is there: a member may find it before `put` has returned.
        self.history.uploads.append(
            Upload(version, inbox.group, path, time.monotonic(), len(content), zlib.crc32(content), kind)
        )
        inbox.server.put(inbox.root / name, content)

    # -- faults

    def fault(self) -> None:
        """One more thing goes wrong."""
        kinds = {
            "SIGSTOP": 5,
            "SIGKILL": 4,
            "SIGTERM": 3,
            "files delayed": 1,
            "files cut": 2,
            "files black-holed": 2,
            "files refused": 1,
            "paused": 1,
        }
        if self.store.server is not None:
            kinds.update(
                {
                    "database delayed": 1,
                    "database cut": 2,
                    "database black-holed": 4,
                    "database refused": 1,
                    "database frozen": 1,
                    "database restarted": 1,
                    "database killed": 1,
                }
            )
        kind = self.chance.choices(list(kinds), list(kinds.values()))[0]
        inbox = self.chance.choice(self.inboxes)
        active = [slot for slot, member in self.members.items() if member.active(inbox.group)]
        slot = active[0] if active and self.chance.random() < 0.75 else self.chance.choice(list(SLOTS))
        self.do(kind, slot, inbox)

    def do(self, kind: str, slot: str, inbox: Inbox, seconds: Optional[float] = None) -> bool:
        """Begins a fault and sees to its end; False if something like it is under way."""
        stale = self.timing.stale_after
        if seconds is None:
            spans = ((0.05, 0.5), (0.5, stale), (1.2 * stale, 2.2 * stale))
            least, most = self.chance.choices(spans, (10, 15, 75) if "black" in kind else (25, 30, 45))[0]
            seconds = self.chance.uniform(least, most)
        member = self.members[slot]
        server_fault = kind in ("database frozen", "database restarted", "database killed")
        if server_fault:
            if self._server_fault:
                return False
            self._server_fault = True
            fault = Fault(kind, "", time.monotonic())
        elif kind.startswith("SIG"):
            if member.busy or not member.running():
                return False
            member.busy = True
            fault = Fault(kind, slot, time.monotonic())
        else:
            if any(
                f.slot == slot and f.kind.split()[0] == kind.split()[0] and f.until == float("inf") for f in self.faults
            ):
                return False
            fault = Fault(kind, slot, time.monotonic())
        # A stopped member may hold the lock of SQLite's file: whoever waits for it here never lets it go on.
        stopped = any(f.kind == "SIGSTOP" and f.until == float("inf") for f in self.faults)
        if kind == "paused" and (self._server_fault or (stopped and self.store.server is None)):
            return False
        self.faults.append(fault)
        self.history.faults[kind] += 1
        if kind in ("SIGSTOP", "SIGKILL", "SIGTERM", "database black-holed"):
            watches = [Watch(box.group, slot, fault.began, kind) for box in self.inboxes if member.active(box.group)]
            self.watches += watches
        else:
            watches = []

        def over() -> None:
            fault.until = time.monotonic()
            for watch in watches:
                watch.ended = fault.until

        if server_fault:
            self._strike_server(kind, fault, seconds)
        elif kind == "SIGSTOP":
            member.stop()

            def go_on() -> None:
                member.go_on()
                member.busy = False
                over()

            self.later(seconds, go_on)
        elif kind == "SIGKILL":
            member.expected = True
            member.send(signal.SIGKILL)
            assert member.process is not None
            member.process.wait()
            self._notice_end(member)
            self._start_again(member, fault, self.chance.uniform(0, 2))
        elif kind == "SIGTERM":
            member.finish()
            self._await_end(member, fault, time.monotonic() + 30)
        elif kind == "paused":
            end = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds + 1))
            pause = f"'pause:{end}:chaos@{len(self.faults)}', '{inbox.group}', CURRENT_TIMESTAMP"
            self.store.execute(f"INSERT INTO health_check (task_id, group_id, last_heartbeat) VALUES ({pause})")
            self.later(seconds + 1, over)
        else:
            self._strike_proxy(kind, slot, inbox, seconds, over)
        return True

    def _start_again(self, member: Member, fault: Fault, seconds: float) -> None:
        def start() -> None:
            member.listen()
            self._notice_end(member)
            member.start()
            member.busy = False
            fault.until = time.monotonic()

        self.later(seconds, start)

    def _await_end(self, member: Member, fault: Fault, deadline: float) -> None:
        def look() -> None:
            if member.running() and time.monotonic() > deadline:
                self.trouble("did not stop", f"{member.life.instance} runs 30 s after SIGTERM")
                member.send(signal.SIGKILL)
            if member.running():
                self.later(0.05, look)
                return
            member.listen()
            assert member.process is not None
            if member.process.returncode not in (0, -signal.SIGKILL, -signal.SIGTERM):
                # -SIGTERM: the signal came before Python had begun to listen to it.
                self.trouble("bad exit", f"{member.life.instance}: {member.process.returncode} after SIGTERM")
            self._start_again(member, fault, self.chance.uniform(0, 1))

        self.later(0.05, look)

    def _strike_server(self, kind: str, fault: Fault, seconds: float) -> None:
        server = self.store.server
        assert server is not None

        def strike() -> None:
            try:
                if kind == "database frozen":
                    server.freeze()
                    time.sleep(seconds)
                    server.thaw()
                elif kind == "database restarted":
                    server.restart()
                else:
                    server.kill()
                    time.sleep(min(seconds, 2.0))
                    server.start()
            except Exception as exc:
                self.trouble("test broken", f"{kind}: {exc!r}")
            fault.until = time.monotonic()
            self._server_fault = False

        threading.Thread(target=strike, name=kind, daemon=True).start()

    def _strike_proxy(self, kind: str, slot: str, inbox: Inbox, seconds: float, over: Callable[[], None]) -> None:
        whose, what = kind.split()
        proxy: Proxy = self.store.taps[slot] if whose == "database" else inbox.taps[slot]
        # What a member's network swallowed is delivered late or never. At the file server never: a delete that comes
        # after the partition is a packet that had left in time, which nobody can call back.
        deliver = whose == "database" and self.chance.random() < 0.5

        def heal() -> None:
            proxy.delay = 0.0
            if what == "black-holed":
                if not deliver:
                    proxy.cut()
                proxy.blackhole(False)
            elif what == "refused":
                proxy.refuse(False)
            over()

        if what == "delayed":
            proxy.delay = self.chance.choice((0.02, 0.1, self.timing.call_timeout / 3))
        elif what == "black-holed":
            proxy.blackhole()
        else:
            if what == "refused":
                proxy.refuse()
            proxy.cut()
        self.later(0.0 if what == "cut" else seconds, heal)

    # -- takeovers

    def elected(self, member: Member, at: float, group: str) -> None:
        """How long had the group waited?"""
        for watch in [watch for watch in self.watches if watch.group == group and watch.began < at]:
            self.watches.remove(watch)
            survived = watch.kind in ("SIGSTOP", "database black-holed")
            if survived and (at > watch.ended or member.slot == watch.slot):
                continue
            took = at - watch.began
            self.history.takeovers.append(took)
            if self._clean(watch, at):
                self.history.clean_takeovers.append(took)

    def _clean(self, watch: Watch, at: float) -> bool:
        """Whether some other member, and what it needs, was well all the time: then the promise holds."""
        others = [
            fault
            for fault in self.faults
            if fault.until > watch.began - self.liveness and fault.began < at and not fault.kind.startswith("files")
        ]
        if watch.kind == "SIGTERM" or any(fault.slot == "" for fault in others):
            return False
        if self.store.name == "sqlite" and any(fault.kind == "SIGSTOP" for fault in others):
            return False  # it may have been stopped inside a transaction
        return bool(set(SLOTS) - {watch.slot} - {fault.slot for fault in others})

    # -- begin and end

    def start(self) -> None:
        for member in self.members.values():
            member.start()

    def finish(self, patience: float = 60.0) -> History:
        """Everything heals; when all is handled the members stop. The history of it all."""
        history = self.history
        deadline = time.monotonic() + patience
        while self._jobs or self._server_fault or any(member.busy for member in self.members.values()):
            self._pass(0.05)
            if time.monotonic() > deadline:
                raise AssertionError(f"a fault does not end: {[f for f in self.faults if f.until == float('inf')]}")
        # What is left may take long; it is given up once the command is not even run any more.
        seen, until = -1, time.monotonic() + 4 * patience
        quiet_from = time.monotonic()
        while self._unfinished() and time.monotonic() < min(until, quiet_from + patience / 2):
            size = self.record.stat().st_size if self.record.exists() else 0
            if size != seen:
                seen, quiet_from = size, time.monotonic()
            self._pass(0.2)
        for member in self.members.values():
            member.finish()
        deadline = time.monotonic() + 30
        while any(member.running() for member in self.members.values()) and time.monotonic() < deadline:
            self._pass(0.05)
        for member in self.members.values():
            if member.running():
                self.trouble("did not stop", f"{member.life.instance} runs 30 s after SIGTERM")
                member.send(signal.SIGKILL)
                assert member.process is not None
                member.process.wait()
            elif member.process is not None and member.process.returncode != 0:
                self.trouble("bad exit", f"{member.life.instance}: {member.process.returncode} after SIGTERM")
            member.listen()
        self.collect()
        return history

    def _pass(self, seconds: float) -> None:
        while self._jobs and self._jobs[0][0] <= time.monotonic():
            heapq.heappop(self._jobs)[2]()
        for member in self.members.values():
            member.listen()
            self._notice_end(member)
        time.sleep(seconds)

    def _unfinished(self) -> bool:
        """Whether there is work left: files that are not quarantined, after-actions that are due, deadlines."""
        self.history.changes = self.store.changes(self.offset)
        found = [
            violation.kind for deadline in self.history.deadlines for violation in _deadline(self.history, deadline)
        ]
        if "deadline lost" in found:
            return True
        quarantined = set()
        for path, state in self.store.execute("SELECT path, state FROM file_ledger"):
            if state != "quarantined":
                return True
            quarantined.add(path)
        for inbox in self.inboxes:
            for entry in os.scandir(inbox.root):
                if entry.is_file() and entry.path not in quarantined:
                    return True
        return False

    def _compare_with_the_trail(self) -> None:
        """Each file that was done or quarantined has its row in the audit trail, and only one, under the term of its
        attempt: a death that is counted was that of an earlier term."""
        trail = self.store.execute("SELECT group_id, path, outcome, term, attempt FROM file_audit")
        told = Counter(tuple(row) for row in trail if row[2] in ENDS)
        ends: Counter[tuple[object, ...]] = Counter()
        claimed: dict[tuple[str, str], int] = {}
        for change in self.history.changes:
            path = (change.group, change.path)
            if change.what == "file" and change.state == "claimed":
                claimed[path] = change.term
            elif change.what == "file" and change.state in ENDS and change.old_state != change.state:
                term = claimed[path] if change.old_state == "claimed" else change.term
                ends[(*path, change.state, term, change.attempts)] += 1
        for end in (ends - told) + (told - ends):
            self.trouble("audit trail", f"{end}: {ends[end]} in the ledger, {told[end]} in the trail")

    def collect(self) -> None:
        """Fills the history with what there is by now."""
        history = self.history
        history.commands, history.connections = [], []
        history.left = Left()
        runs: dict[str, Run] = {}
        for line in self.record.read_text().splitlines() if self.record.exists() else ():
            what, key, at, *more = line.split("\t")
            if what == "begin":
                instance, group, path, term, attempt, version, size, crc = more
                runs[key] = Run(
                    instance, group, path, int(term), int(attempt), version, int(size), int(crc), float(at), float(at)
                )
            else:
                runs[key].last = float(at)
                runs[key].outcome = "" if what == "beat" else what
        history.runs = list(runs.values())
        history.changes = self.store.changes(self.offset)
        self._compare_with_the_trail()

        def instance_at(slot: str, at: float) -> Optional[str]:
            lives = [life.instance for life in self.members[slot].lives if life.began <= at]
            return lives[-1] if lives else None

        for inbox in self.inboxes:
            history.commands += inbox.commands(instance_at)
            for slot, tap in inbox.taps.items():
                for moment in tap.accepted:
                    whose = instance_at(slot, moment)
                    if whose is not None:
                        history.connections.append((moment, whose, inbox.group))
            history.left.inbox.update(inbox.versions(inbox.root))
            history.left.moved.update(inbox.versions(inbox.root / "done"))
        for group, path, state in self.store.execute("SELECT group_id, path, state FROM file_ledger"):
            history.left.states[group, path] = state

    def close(self) -> None:
        for member in getattr(self, "members", {}).values():
            if member.running():
                member.send(signal.SIGKILL)
                member.process.wait()
        for inbox in self.inboxes:
            inbox.close()
            inbox.server.close()
        self.store.close()


def play(
    database: str,
    file_servers: Sequence[str],
    seconds: float,
    seed: int,
    folder: Path,
    module_path: Path = MODULE,
    **settings: Any,
) -> tuple[History, list[Violation]]:
    """A round: its history and what was wrong with it."""
    began = time.monotonic()
    world = World(database, file_servers, seed, folder, module_path, seconds, **settings)
    try:
        world.start()
        world.run(seconds)
        history = world.finish()
    finally:
        world.close()
    history.seconds = time.monotonic() - began
    return history, check(history)


def prove(database: str, pairing: Sequence[str], seconds: float, seed: int, folder: Path) -> None:
    """One world for the test run: prints what was done, and fails on a violation, or if hardly anything was done."""
    from conftest import need  # here, because this program also runs without pytest

    for name in (database, *pairing):
        if name != "sqlite":
            need(name)
    history, violations = play(database, pairing, seconds, seed, folder)
    print(f"seed {seed}\n{summary([history], violations)}")
    assert not violations
    assert {change.what for change in history.changes} == {"token", "file", "alarm"}
    assert history.runs and history.takeovers and sum(history.faults.values()) > seconds / 4


def summary(histories: Sequence[History], violations: Sequence[Violation]) -> str:
    """What happened, in a few lines."""
    faults: Counter[str] = Counter()
    takeovers, clean = [], []
    for history in histories:
        faults += history.faults
        takeovers += history.takeovers
        clean += history.clean_takeovers
    terms = sum(change.what == "token" for history in histories for change in history.changes)

    alarms = Counter(change.state for h in histories for change in h.changes if change.what == "alarm")

    def times(values: Sequence[float]) -> str:
        return f"{len(values)}" + (
            f" (median {statistics.median(values):.2f} s, maximum {max(values):.2f} s)" if values else ""
        )

    return "\n".join(
        [
            f"  faults      {sum(faults.values())}: " + ", ".join(f"{n} {kind}" for kind, n in faults.most_common()),
            f"  terms       {terms}",
            f"  takeovers   {times(takeovers)}; with no other fault at the time {times(clean)}",
            f"  files       {sum(len(h.uploads) for h in histories)}, runs of the command "
            f"{sum(len(h.runs) for h in histories)}, deletes and moves {sum(len(h.commands) for h in histories)}",
            f"  deadlines   {sum(len(h.deadlines) for h in histories)}, missing {alarms['missing']}, "
            f"late {alarms['late']}",
            f"  repeats     {sum(h.repeats() for h in histories)}, each explained unless it is a violation",
            f"  violations  {len(violations)}",
            *(f"    {violation}" for violation in violations[:50]),
        ]
    )


PAIRINGS: tuple[tuple[str, ...], ...] = (("vsftpd",), ("sshd",), ("vsftpd", "sshd"))


def main(minutes: float, seed: Optional[int] = None) -> int:
    """Chaos for so many minutes, divided over the databases; prints a summary.  0 if nothing was violated."""
    seed = seed if seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"chaos: {minutes:g} minutes, seed {seed}", flush=True)
    possible = [name for name in DATABASES if servers.available(name) is None]
    for name in DATABASES:
        if name not in possible:
            print(f"chaos: without {name}: {servers.available(name)}")
    everything: list[History] = []
    every_violation: list[Violation] = []
    for number, database in enumerate(possible):
        share = minutes * 60 / len(possible)
        rounds = max(1, round(share / 75))  # a quarter of each is for its begin and for what is left at its end
        histories: list[History] = []
        violations: list[Violation] = []
        for turn in range(rounds):
            pairing = PAIRINGS[(number + turn) % len(PAIRINGS)]
            folder = Path(tempfile.mkdtemp(prefix=f"ftpcoord-chaos-{database}-"))
            history, found = play(database, pairing, max(10.0, 0.75 * share / rounds), seed + turn, folder)
            histories.append(history)
            violations += found
            if found:
                print(f"chaos: {database} with {', '.join(pairing)}: {len(found)} violations, logs in {folder}")
            else:
                shutil.rmtree(folder, ignore_errors=True)
        print(f"{database}, {sum(h.seconds for h in histories):.0f} s\n{summary(histories, violations)}", flush=True)
        everything += histories
        every_violation += violations
    print(f"chaos: all databases\n{summary(everything, every_violation)}", flush=True)
    return 1 if every_violation else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None))
