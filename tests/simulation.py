"""The whole program under virtual time: a deterministic simulation.

    python tests/simulation.py --ticks 2000000 --seed 1     # worlds of seed 1, 2, 3, ... until so many heartbeats
    python tests/simulation.py --seed 4711                  # that one world again, exactly

What runs is ftpcoord itself: Election, Member, Pulse, the guard, Listener, Poller, Ledger, Selector, Coordinator,
and the dialects' verbs.  Replaced are the modules that it gets time, threads and randomness from (`time`,
`threading`, `queue`), the database below `execute`, the file server below FileServer's verbs, and the local disk.
A seed draws a world: dialect, precision of the heartbeat column, intervals, members, clock rates, latencies, and
a schedule of faults; the seed alone decides everything that happens.  One heartbeat is one tick.

Threads are greenlets that change hands where real threads would block.  True time is the hub's; each process has
a clock of its own rate, the database one that can be set.  A statement travels, takes its time stamp and snapshot
on arrival, waits for locks, is carried out, and is answered; any of these may be late, and a statement whose
client gave up (or died) may still be carried out.

After every step of a process:
  one lease     no two processes hold valid leases; a new one has a higher term than any valid before it
  the token     the database's term only grows, each term is won by one process
  no effect     no delete, move or handler start without a valid lease; no file server connection without one
  files         a handler starts again only after a failure, a death, or a loss of lease, and is told (attempt > 1);
                nothing done is handled again; nothing unhandled is deleted or moved
  no accident   no exception that the program did not expect
Then the faults stop, and what is promised must come within its bound: one member active, the files handled, a
dead member replaced within liveness_check_interval, a stopped one within a heartbeat and a round trip.

Where this cannot hold: see EXPOSED (a forward step of the database's clock while the active member is stalled, and
a member that started after the step) and the worlds that lose commits.  Both are bounded, and measured.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import heapq
import importlib
import io
import logging
import math
import os
import queue
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Union

import ftpcoord

greenlet: Any = importlib.import_module("greenlet")

EPOCH = 1_700_000_000.0  # the database's clock at the start
RELEASED_STAMP = 1.0  # 1970-01-01 00:00:01
GROUP = "group"
Wait = tuple["Task", int]  # a task, and which of its waits

WORLD: World  # the one that is running


class Killed(BaseException):
    """Thrown into the tasks of a process that dies; also by whatever they then still call."""


class Violation(AssertionError):
    """An invariant does not hold."""


# ---------------------------------------------------------------------------------------------------------------------
# Tasks, processes, and the modules that ftpcoord gets instead of the real ones
# ---------------------------------------------------------------------------------------------------------------------


class Task:
    """One thread of a process."""

    __slots__ = ("alive", "greenlet", "joiners", "process", "serial", "target")

    def __init__(self, process: Process, target: Callable[[], object]) -> None:
        self.process, self.target = process, target
        self.serial = 0  # which wait this is: a wake-up for an earlier one comes to nothing
        self.alive = True
        self.joiners: list[Wait] = []
        self.greenlet = greenlet.greenlet(self._run, WORLD.hub)

    def _run(self, _: object) -> None:
        try:
            self.target()
        except Killed:
            pass
        except BaseException as exc:
            WORLD.failed(exc)
        finally:
            self.alive = False
            for waiter in self.joiners:
                WORLD.soon(waiter, True)
            self.process.tasks.discard(self)


def block(seconds: Optional[float] = None) -> Any:
    """Waits to be woken, at most so long by the process's clock; gives what the waker passed, None at the end."""
    world = WORLD
    task = world.task
    process = task.process
    if process.dead:
        raise Killed
    if seconds is not None:
        serial = task.serial
        world.push(world.now + max(0.0, seconds) / process.rate, world.wake, task, serial, None)
    return world.hub.switch()


class SimTime:
    """Instead of the module `time`."""

    @staticmethod
    def monotonic() -> float:
        return WORLD.task.process.clock()

    @staticmethod
    def time() -> float:
        return EPOCH + WORLD.now

    @staticmethod
    def sleep(seconds: float) -> None:
        block(seconds)


class SimLock:
    """threading.Lock."""

    __slots__ = ("held", "waiters")

    def __init__(self) -> None:
        self.held = False
        self.waiters: collections.deque[Wait] = collections.deque()

    def __enter__(self) -> bool:
        while self.held:
            task = WORLD.task
            self.waiters.append((task, task.serial))
            block()
        self.held = True
        return True

    def __exit__(self, *exc: object) -> None:
        self.held = False
        while self.waiters:
            WORLD.soon(self.waiters.popleft(), True)


class SimSemaphore:
    """threading.Semaphore."""

    def __init__(self, value: int = 1) -> None:
        self.value = value
        self.waiters: collections.deque[Wait] = collections.deque()

    def __enter__(self) -> bool:
        while self.value <= 0:
            task = WORLD.task
            self.waiters.append((task, task.serial))
            block()
        self.value -= 1
        return True

    def __exit__(self, *exc: object) -> None:
        self.value += 1
        while self.waiters:
            WORLD.soon(self.waiters.popleft(), True)


class SimCondition:
    """threading.Condition.  Its lock is none: no task blocks while it holds it, and tasks change only then."""

    __slots__ = ("waiters",)

    def __init__(self) -> None:
        self.waiters: list[Wait] = []

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *exc: object) -> None:
        pass

    def wait(self, timeout: Optional[float] = None) -> bool:
        task = WORLD.task
        self.waiters.append((task, task.serial))
        return bool(block(timeout))

    def wait_for(self, predicate: Callable[[], bool], timeout: float) -> bool:
        until = SimTime.monotonic() + timeout
        while not predicate():
            left = until - SimTime.monotonic()
            if left <= 0:
                return False
            self.wait(left)
        return True

    def notify_all(self) -> None:
        if self.waiters:
            waiters, self.waiters = self.waiters, []
            for waiter in waiters:
                WORLD.soon(waiter, True)


class SimEvent(SimCondition):
    """threading.Event."""

    __slots__ = ("flag",)

    def __init__(self) -> None:
        super().__init__()
        self.flag = False

    def set(self) -> None:
        self.flag = True
        self.notify_all()

    def clear(self) -> None:
        self.flag = False

    def is_set(self) -> bool:
        return self.flag

    def wait(self, timeout: Optional[float] = None) -> bool:
        if not self.flag:
            super().wait(timeout)
        return self.flag


class SimThread:
    """threading.Thread."""

    def __init__(self, target: Callable[..., object], name: str = "", daemon: bool = False, args: Any = ()) -> None:
        self.target, self.name, self.args = target, name, args
        self.task: Optional[Task] = None

    def start(self) -> None:
        self.task = WORLD.spawn(WORLD.task.process, lambda: self.target(*self.args))

    def is_alive(self) -> bool:
        return self.task is not None and self.task.alive

    def join(self, timeout: Optional[float] = None) -> None:
        if self.task is not None and self.task.alive:
            task = WORLD.task
            self.task.joiners.append((task, task.serial))
            block(timeout)


class SimThreading:
    """Instead of the module `threading`."""

    Thread, Lock, RLock, Condition = SimThread, SimLock, SimLock, SimCondition
    Event, Semaphore = SimEvent, SimSemaphore

    @staticmethod
    def get_ident() -> int:
        return id(WORLD.task)


class SimQueue:
    """queue.Queue."""

    def __init__(self) -> None:
        self.items: collections.deque[Any] = collections.deque()
        self.changed = SimCondition()

    def put(self, item: Any) -> None:
        self.items.append(item)
        self.changed.notify_all()

    def get(self) -> Any:
        while not self.items:
            self.changed.wait()
        return self.items.popleft()

    def get_nowait(self) -> Any:
        if not self.items:
            raise queue.Empty
        return self.items.popleft()

    def empty(self) -> bool:
        return not self.items


class SimQueueModule:
    """Instead of the module `queue`."""

    Queue, Empty = SimQueue, queue.Empty


class SimElection(ftpcoord.Election):
    """The real one; its chance is the world's, and each tick is counted."""

    def __init__(self, store: Any, group: str, member: str, timing: Any, clock: Any, tell: Any) -> None:
        process = WORLD.task.process

        def heard(name: str, **fields: object) -> None:
            WORLD.heard(process, name, fields)
            tell(name, **fields)

        super().__init__(store, group, member, timing, clock, heard, WORLD.rng.random)
        process.election = self
        process.first_look = WORLD.now

    def tick(self, now: float, willing: bool = True) -> float:
        WORLD.ticks += 1
        return super().tick(now, willing)


class Process:
    """One process of one member, with its host's clock and its ways to the database and the file server."""

    def __init__(self, world: World, number: int, member: str) -> None:
        self.number, self.member = number, member
        self.name = f"{member}/{number}"
        self.rate, self.since, self.base = world.rate(), world.now, 1e4 * world.rng.random()
        self.started = self.first_look = world.now
        self.dead = self.paused = False
        self.backlog: list[tuple[Task, int, Any]] = []
        self.tasks: set[Task] = set()
        self.election: Optional[SimElection] = None
        self.program: Any = None  # the Listener or the Coordinator
        self.stopping = False
        self.cut: str = ""  # what becomes of its messages to the database: "", "lost", "replies", "late"
        self.cut_until = 0.0
        self.slow = 1.0

    def clock(self) -> float:
        return self.base + (WORLD.now - self.since) * self.rate

    def set_rate(self, rate: float) -> None:
        self.base, self.since = self.clock(), WORLD.now
        self.rate = rate

    def valid(self) -> bool:
        """Whether it holds a lease that its own clock calls valid, running or paused."""
        lease = self.election.lease if self.election else None
        return lease is not None and lease.valid(self.clock())


# ---------------------------------------------------------------------------------------------------------------------
# The database
# ---------------------------------------------------------------------------------------------------------------------


class Call:
    """One statement on its way."""

    __slots__ = (
        "connection", "deadline", "process", "replied", "result", "sent", "serial", "snapshot", "stamp", "task",
        "values", "verb",
    )  # fmt: skip

    def __init__(self, connection: Any, verb: Callable[..., Any], values: dict[str, Any], deadline: float) -> None:
        world = WORLD
        self.connection, self.verb, self.values = connection, verb, values
        self.task = world.task
        self.process = self.task.process
        self.serial = self.task.serial
        self.sent, self.deadline = world.now, deadline
        self.stamp = self.replied = math.inf
        self.snapshot: Any = None
        self.result: Any = None


class Tables:
    """The three tables as of now, or as of when a statement took its snapshot."""

    def __init__(self) -> None:
        self.token: Optional[tuple[str, int]] = None
        self.health: dict[str, float] = {}
        self.ledger: dict[str, ftpcoord.Row] = {}

    def copy(self) -> Tables:
        other = Tables()
        other.token, other.health, other.ledger = self.token, dict(self.health), dict(self.ledger)
        return other


class SimDatabase(Tables):
    """What the statements mean.  Each verb gets the time stamp, the snapshot for what it does not lock, and values.

    `kind` "postgresql": a statement's unlocked reads are of its snapshot, its locked rows are the present ones.
    `kind` "mysql": writing statements read what is there now.
    """

    def __init__(self, kind: str, whole_seconds: bool) -> None:
        super().__init__()
        self.kind, self.whole = kind, whole_seconds
        self.tick = 1.0 if whole_seconds else 0.001
        self.offset = EPOCH
        self.up = True
        self.silent = False  # down so that nothing answers at all
        self.epoch = 0  # connections of an earlier one are dead
        self.frozen_until = self.stalled_until = self.locked_until = 0.0
        self.done: set[tuple[str, int, str]] = set()  # versions that were ever committed as done
        self.highest_term = 0
        self.winners: dict[int, Any] = {}

    def clock(self) -> float:
        return self.offset + WORLD.now

    def column(self, clock: float) -> float:
        """A time as the heartbeat column keeps it."""
        return math.floor(clock) if self.whole else clock

    def _read(self, snapshot: Tables) -> Tables:
        return snapshot if self.kind == "postgresql" else self

    # -- the election's statements ------------------------------------------------------------------------------------

    def ping(self, clock: float, snapshot: Tables) -> list[Any]:
        return []

    def beat(self, clock: float, snapshot: Tables, group: str, member: str) -> list[Any]:
        token = self._read(snapshot).token
        if token is None or token[0] != member:
            now = self.column(clock)
            self.health[member] = max(self.health.get(member, now), now)
        return []

    def look(self, clock: float, snapshot: Tables, group: str, member: str) -> list[Any]:
        if self.kind == "postgresql":
            self.beat(clock, snapshot, group, member)
        token = snapshot.token
        if token is None:
            return [(None, None, None, None, None, clock)]
        stamp = snapshot.health.get(token[0])
        age = None if stamp is None else self.column(clock) - stamp
        return [(token[0], token[1], token[0] == member, None if stamp is None else repr(stamp), age, clock)]

    def first(self, clock: float, snapshot: Tables, group: str, member: str, term: int) -> list[Any]:
        if self.token is not None:
            if self.kind == "mysql":
                raise ftpcoord.DatabaseDown("(1062, \"Duplicate entry 'group' for key 'PRIMARY'\")")
            return []
        self._win(member, term)
        if self.kind == "mysql":
            return []
        self.health[member] = self.column(clock)
        return [(term,)]

    def take(
        self, clock: float, snapshot: Tables, group: str, member: str, holder: str, old_term: int,
        stamp: Optional[str], stale_after: float = 0.0, stale_us: int = 0,
    ) -> list[Any]:  # fmt: skip
        heartbeat = self.health.get(holder)
        if self.token != (holder, old_term) or heartbeat is None:
            return []
        stale = stale_us / 1e6 if self.kind == "mysql" else stale_after
        if not (heartbeat < self.column(clock) - stale or (stamp is not None and repr(heartbeat) == stamp)):
            return []
        return self._won(clock, member, old_term + 1)

    def take_absent(
        self, clock: float, snapshot: Tables, group: str, member: str, holder: str, old_term: int, own: int
    ) -> list[Any]:
        if self.token != (holder, old_term) or not (own or holder not in self._read(snapshot).health):
            return []
        return self._won(clock, member, old_term + 1)

    def _won(self, clock: float, member: str, term: int) -> list[Any]:
        self._win(member, term)
        if self.kind == "postgresql":
            self.health[member] = self.column(clock)
        return [(term,)]

    def _win(self, member: str, term: int) -> None:
        self.token = (member, term)
        WORLD.term_written(term)

    def seat(self, clock: float, snapshot: Tables, group: str, member: str, term: int) -> list[Any]:
        if self.token == (member, term):
            self.health[member] = self.column(clock)
        return []

    def renew(
        self, clock: float, snapshot: Tables, group: str, member: str, term: int, request: str
    ) -> list[Any]:
        heartbeat = self.health.get(member)
        if self.token != (member, term) or heartbeat is None:
            return []
        now = self.column(clock)
        self.health[member] = heartbeat + self.tick if heartbeat > now else now
        asked = request in self._read(snapshot).health
        return [(2 * term + asked,)] if self.kind == "mysql" else [(asked,)]

    def release(self, clock: float, snapshot: Tables, group: str, member: str, term: int) -> list[Any]:
        if self.token == (member, term) and member in self.health:
            self.health[member] = RELEASED_STAMP
            WORLD.released()
        return []

    def leave(self, clock: float, snapshot: Tables, group: str, member: str) -> list[Any]:
        token = self._read(snapshot).token
        if token is None or token[0] != member:
            self.health.pop(member, None)
        return []

    def sweep(self, clock: float, snapshot: Tables, group: str, member: str) -> list[Any]:
        token = self._read(snapshot).token
        for other, stamp in list(self.health.items()):
            if other != member and clock - stamp > 86400 and (token is None or token[0] != other):
                del self.health[other]
        return []

    def last_term(self, clock: float, snapshot: Tables, group: str) -> list[Any]:
        return [(max((row.term for row in snapshot.ledger.values()), default=0),)]

    def members(self, clock: float, snapshot: Tables, group: str) -> list[Any]:
        rows = sorted(snapshot.health.items())
        return [(member, clock - stamp, int(stamp == RELEASED_STAMP)) for member, stamp in rows]

    # -- the ledger's statements --------------------------------------------------------------------------------------
    # Rows are kept by file_id; `due` is of the database's clock.

    def page(self, clock: float, snapshot: Tables, only_open: bool) -> list[ftpcoord.Row]:
        return [
            row._replace(due=None if row.due is None else row.due - clock)
            for row in snapshot.ledger.values()
            if not only_open or row.state != "done" or row.action
        ]

    def done_count(self, clock: float, snapshot: Tables, group: str) -> list[Any]:
        return [(sum(row.state == "done" and not row.action for row in snapshot.ledger.values()),)]

    def standing(self, clock: float, snapshot: Tables, group: str, ids: list[str]) -> list[Any]:
        rows = [(file_id, snapshot.ledger[file_id]) for file_id in ids if file_id in snapshot.ledger]
        return [(file_id, row.state, row.term, row.attempts, row.failures) for file_id, row in rows]

    def change(
        self, clock: float, snapshot: Tables, group: str, member: str, term: int, changes: Sequence[ftpcoord.Change]
    ) -> list[Any]:
        """CLAIM, CHANGE and FORGET: each change whose old row stands, if the fence holds."""
        made: list[Any] = []
        if self.token != (member, term):
            return made
        for old, new, delay in changes:
            path = (new or old).path  # type: ignore[union-attr]
            file_id = ftpcoord.sha256_text(path)
            row = self.ledger.get(file_id)
            if (row and row[1:6]) != (old and old[1:6]):
                continue
            made.append((file_id,))
            if new is None:
                del self.ledger[file_id]
                continue
            self.ledger[file_id] = new._replace(term=term, due=None if delay is None else clock + delay)
            if new.state == "done":
                self.done.add((path, new.size, new.mtime))
        return made


class Statement(str):
    """The text of a CLAIM, CHANGE or FORGET, with its changes beside it instead of in it."""

    changes: Sequence[ftpcoord.Change]


VERBS = (
    "BEAT", "LOOK", "FIRST", "TAKE", "TAKE_ABSENT", "SEAT", "RENEW", "RELEASE", "LEAVE", "SWEEP", "LAST_TERM",
    "MEMBERS", "DONE_COUNT",
)  # fmt: skip


class SimStoreMixin:
    """A dialect whose `execute` is the simulated database's; everything above it is the real one's."""

    STANDING = "ids $ids"
    connection: Any
    timing: Any
    name: str

    def __init__(self, config: Any, timing: Any) -> None:
        super().__init__(config, timing)  # type: ignore[call-arg]
        database = WORLD.database
        self.verbs = {getattr(self, verb): getattr(database, verb.lower()) for verb in VERBS if hasattr(self, verb)}
        self.changing = {self.CLAIM, self.CHANGE, self.FORGET}  # type: ignore[attr-defined]

    def execute(self, sql: str, **values: Any) -> Any:
        world = WORLD
        if self.connection is None:
            epoch = world.database.epoch
            world.statement(self, world.database.ping, {}, connecting=True)
            self.connection = epoch + 1
        verb = self.verbs.get(sql)
        if verb is None:
            if sql in self.changing:
                verb, values["changes"] = world.database.change, sql.changes  # type: ignore[attr-defined]
            else:
                assert sql.startswith("ids "), sql
                verb, values["ids"] = world.database.standing, re.findall("[0-9a-f]{64}", sql)
        return world.statement(self, verb, values)

    def prepare(self) -> Any:
        if self.connection is None:
            WORLD.statement(self, WORLD.database.ping, {}, connecting=True)
            self.connection = WORLD.database.epoch + 1
        self.timing = WORLD.timing
        return self.timing

    def check_ids(self, group: str, member: str) -> None:
        pass

    def close(self) -> None:
        self.connection = None

    def literal(self, value: object) -> str:
        return repr(value)

    def rows(self, group: str, only_open: bool = False) -> Iterator[Any]:
        if self.connection is None:
            self.prepare()
        return iter(WORLD.statement(self, WORLD.database.page, {"only_open": only_open}))

    def _with_rows(self, sql: str, changes: Sequence[Any]) -> str:
        statement = Statement(sql)
        statement.changes = changes
        return statement


class SimPostgreSQL(SimStoreMixin, ftpcoord.PostgreSQL):  # type: ignore[misc]
    pass


class SimMySQL(SimStoreMixin, ftpcoord.MySQL):  # type: ignore[misc]
    pass


# ---------------------------------------------------------------------------------------------------------------------
# The file server, the disk, the handler
# ---------------------------------------------------------------------------------------------------------------------


class Version(NamedTuple):
    """One version of one file; all sizes are different, so that a size is a version's name."""

    path: str
    size: int
    mtime: str


class Run:
    """One start of the handler."""

    __slots__ = ("attempt", "lease", "outcome", "process", "term")

    def __init__(self, process: Process, lease: Any, attempt: int) -> None:
        self.process, self.lease, self.term, self.attempt = process, lease, lease.term, attempt
        self.outcome = ""  # "ok" or "failed"


class SimFileServer:
    """A folder that clients of all processes see, and who did what to it."""

    def __init__(self) -> None:
        self.files: dict[str, Version] = {}
        self.moved: dict[str, Version] = {}
        self.up = True
        self.slow = 1.0
        self.number = 0
        self.runs: dict[Version, list[Run]] = {}
        self.looked: dict[str, SimConnection] = {}  # looked at, and about to be deleted or moved
        self.replaced: set[Version] = set()

    def upload(self, path: str) -> None:
        """A new file, or a new version.  Not between a member's last look and its delete: nobody can promise that."""
        if path in self.looked:
            return
        if path in self.files:
            self.replaced.add(self.files[path])
        self.number += 1
        when = time.gmtime(EPOCH + WORLD.now)
        self.files[path] = Version(path, 1000 + self.number, time.strftime("%Y-%m-%dT%H:%M:%S", when))


class SimConnection:
    """A FileServer; each verb acts when it is called and is answered later, or not."""

    def __init__(self, config: Any) -> None:
        self.process = WORLD.task.process
        self.server = WORLD.files
        self.gone = False
        self.waiting: Optional[Wait] = None

    def _call(self, what: str, path: str = "", effect: bool = False) -> None:
        """Before what the verb does.  Raises ServerDown if it does not come to that."""
        world = WORLD
        process = self.process
        if process.dead:
            raise Killed
        world.trace(process, f"{what} {path}")
        if effect and not process.valid():
            raise Violation(f"{process.name} acts past its deadline: {what} {path}")
        if self.gone or not self.server.up or world.rng.random() < world.server_loss:
            self._answer(world.rng.random() * world.timing.heartbeat)
            raise ftpcoord.ServerDown("the connection was closed")

    def _answer(self, seconds: Optional[float] = None) -> None:
        """The time until the answer; ends with ServerDown if it does not come."""
        world = WORLD
        if seconds is None:
            seconds = world.latency * world.rng.expovariate(1.0) * self.server.slow
        task = world.task
        self.waiting = (task, task.serial)
        cut = block(seconds)
        self.waiting = None
        if cut or self.gone or world.rng.random() < world.server_loss:
            self.gone = True
            raise ftpcoord.ServerDown("no answer")

    def connect(self) -> None:
        if not self.process.dead and not self.process.valid():
            WORLD.late_connects += 1
        self._call("connect")
        self._answer()

    def alive(self) -> bool:
        try:
            self._call("alive")
            self._answer()
        except ftpcoord.ServerDown:
            return False
        return True

    def list(self, folder: str) -> list[ftpcoord.Entry]:
        self._call("list", folder)
        entries = [
            ftpcoord.Entry(path.rpartition("/")[2], "file", version.size, version.mtime)
            for path, version in self.server.files.items()
        ]
        self._answer()
        return entries

    def same(self, path: str, seen: ftpcoord.Entry) -> Optional[bool]:
        self._call("same", path)
        version = self.server.files.get(path)
        if version is not None and version.size == seen.size:
            self.server.looked[path] = self
        try:
            self._answer()
        except BaseException:
            self._forget()
            raise
        return None if version is None else version.size == seen.size

    def exists(self, path: str) -> bool:
        self._call("exists", path)
        there = path in self.server.files or path in self.server.moved
        self._answer()
        return there

    def fetch(self, path: str, size: int, write: Callable[[bytes], object]) -> None:
        self._call("fetch", path)
        version = self.server.files.get(path)
        self._answer()
        if version is None:
            raise ftpcoord.FileGone(path)
        if version.size != size:
            raise ftpcoord.FileChanged(path)
        write(str(version.size).encode())

    def fetch_many(self, jobs: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        for job in jobs:
            try:
                self.fetch(job.path, job.size, job.write)
            except (ftpcoord.FileGone, ftpcoord.FileChanged) as exc:
                yield job, exc
            else:
                yield job, None

    def delete(self, path: str) -> None:
        self._remove("delete", path, None)

    def rename(self, path: str, target: str) -> None:
        self._remove("rename", path, target)

    def _remove(self, what: str, path: str, target: Optional[str]) -> None:
        try:
            self._call(what, path, effect=True)
            if target in self.server.moved:
                raise ftpcoord.TargetExists(str(target))
            version = self.server.files.pop(path, None)
            if version is not None:
                WORLD.removed(self.process, version)
                if target is not None:
                    self.server.moved[target] = version
        finally:
            self._forget()
        self._answer()
        if version is None:
            raise ftpcoord.FileGone(path)

    def mkdir(self, folder: str) -> None:
        self._call("mkdir", folder, effect=True)
        self._answer()

    def _forget(self) -> None:
        looked = self.server.looked
        for path in [path for path, connection in looked.items() if connection is self]:
            del looked[path]

    def close(self) -> None:
        self.gone = True
        self._forget()

    def abort(self) -> None:
        self.gone = True
        if self.waiting is not None:
            WORLD.soon(self.waiting, True)


class SimFile(io.BytesIO):
    """A file in the making."""

    DESCRIPTOR: Optional[Any] = None

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def fileno(self) -> int:
        if SimFile.DESCRIPTOR is None:
            SimFile.DESCRIPTOR = tempfile.TemporaryFile()
        return int(SimFile.DESCRIPTOR.fileno())

    def close(self) -> None:
        if not self.closed:
            WORLD.disk[self.path] = self.getvalue()
        super().close()


class SimWorkplace:
    """Instead of Workplace: finished files are kept by the world."""

    def __init__(self, config: Any, term: int) -> None:
        self.term, self.number = term, 0
        self.folder = bool(config.download_dir)

    def clean(self) -> None:
        pass

    def temporary(self, found: Any) -> Path:
        WORLD.numbers += 1
        return Path(f"{WORLD.numbers}")

    def finish(self, temporary: Path, found: Any) -> Path:
        return temporary

    def discard(self, temporary: Path) -> None:
        WORLD.disk.pop(temporary, None)

    def close(self) -> None:
        pass


# ---------------------------------------------------------------------------------------------------------------------
# The world
# ---------------------------------------------------------------------------------------------------------------------
