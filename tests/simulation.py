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
                nothing done is handled again; nothing unhandled is deleted or moved; what a handler gets is the whole
                content of the version that it is told of.  Versions have the same few sizes; LIST shows minutes, moves
                by an hour, and is refused for a folder or the one below; files change while they are fetched; some
                paths can be kept in ASCII alone, or not at all
  companions    with `ready_suffix` no version is handled whose companion shows that it is an earlier one's; none is
                removed that is newer than at the claim, or whose file is not done, or after its file; none is left
  order         with `order` no file is handled while another of its key is in work, nor before one that the last poll
                listed or the ledger knew and that sorts before it is done or skipped; nothing is blocked for ever
  the trail     with `audit` each step of a row that ends an attempt has its row in the audit trail, no other one has,
                also a skip; at the end no attempt has two, none that a handler was started for is without, and done
                are those alone whose handler succeeded
  late effects  a delete or move on its way arrives after a shutdown, and not after a reset of its (real) connection
  the log       nobody waits for a line, however long the stream blocks; what is written keeps its order; debug and
                info are dropped first, and all that was dropped is told
  no accident   no exception that the program did not expect
Then the faults stop, and what is promised must come within its bound: one member active, the files handled, a
dead member replaced within liveness_check_interval, a stopped one within a heartbeat and a round trip.

Where this cannot hold, it is bounded, and measured:
  - The database's clock is set forward while the active member is stalled, and a member that started after that takes
    over (`_exposed`): for at most S - m - H - T. A member that looked before the step notices it.
  - Commits are lost: two leases for at most one S after it; then one again, and terms grow from there.
Left out, because nothing helps: two steps of the database's clock within 2H + T that cancel each other out, several
forward steps too small to be noticed within one S, commits lost in a group with two members of one id, a hypervisor
that stops a guest's clocks, a new version uploaded between the last look and the delete, one of the listed size that
is fetched instead and removed before the look.
Twenty million ticks once (seeds 100000 to 114898: 107 days, 2.1 million faults, 292 000 elections): nothing violated.
Left to tests with real servers: the text of the SQL, the file protocols, commands, delivery into a folder, SQLite.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import gc
import heapq
import importlib
import io
import logging
import math
import queue
import random
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: a changed ftpcoord.py may stand in for ours
import ftpcoord

REAL_EVENT = ftpcoord.event
greenlet: Any = importlib.import_module("greenlet")

EPOCH = 1_700_000_000.0  # the database's clock at the start
RELEASED_STAMP = 1.0  # 1970-01-01 00:00:01
YEARS = 3 * 365.25 * 86400.0  # the step of a clock that began without its battery
GROUP = "group"
ODD, NEVER = "\N{EURO SIGN}", "\N{SNOWMAN}"  # the ledger takes the one in ASCII alone, the other in no form
KEYED = "re:(f)[0-3]"  # two keys
OK = ".ok"  # the end of a companion's name
LOG_ROOM = 6  # lines that may wait
NAMES = [*(f"/in/f{number}" for number in range(8)), "/in/sub/a", "/in/sub/b", f"/in/{ODD}", f"/in/{NEVER}"]
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

    __slots__ = ("alive", "greenlet", "joiners", "name", "process", "serial", "target")

    def __init__(self, process: Process, target: Callable[[], object], name: str) -> None:
        self.process, self.target, self.name = process, target, name
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
            self.process.tasks.pop(self, None)


def block(seconds: Optional[float] = None) -> Any:
    """Waits to be woken, at most so long by the process's clock; gives what the waker passed, None at the end.

    At least a microsecond: a clock must not stand still because a float cannot hold less.
    """
    world = WORLD
    task = world.task
    process = task.process
    if process.dead:
        raise Killed
    if seconds is not None:
        serial = task.serial
        world.push(world.now + max(1e-6, seconds) / process.rate, world.wake, task, serial, None)
    return world.hub.switch()


class SimTime:
    """Instead of the module `time`."""

    @staticmethod
    def monotonic() -> float:
        world = WORLD
        process = world.task.process
        return process.base + (world.now - process.since) * process.rate  # clock(), called very often

    @staticmethod
    def time() -> float:
        return EPOCH + WORLD.now

    @staticmethod
    def sleep(seconds: float) -> None:
        block(seconds)


class SimSemaphore:
    """threading.Semaphore."""

    __slots__ = ("value", "waiters")

    def __init__(self, value: int = 1) -> None:
        self.value = value
        self.waiters: list[Wait] = []

    def acquire(self) -> bool:
        while self.value <= 0:
            task = WORLD.task
            self.waiters.append((task, task.serial))
            block()
        self.value -= 1
        return True

    def release(self) -> None:
        self.value += 1
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            WORLD.soon(waiter, True)

    def __enter__(self) -> bool:
        if self.value > 0:
            self.value -= 1
            return True
        return self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.value += 1
        if self.waiters:
            self.value -= 1
            self.release()


class SimLock(SimSemaphore):
    """threading.Lock."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(1)


class SimWaiters:
    """Tasks that wait for something to change."""

    __slots__ = ("waiters",)

    def __init__(self) -> None:
        self.waiters: list[Wait] = []

    def wait(self, timeout: Optional[float] = None) -> bool:
        task = WORLD.task
        self.waiters.append((task, task.serial))
        return bool(block(timeout))

    def notify_all(self) -> None:
        if self.waiters:
            waiters, self.waiters = self.waiters, []
            for waiter in waiters:
                WORLD.soon(waiter, True)


class SimCondition(SimWaiters):
    """threading.Condition.  Its lock is none: no task blocks while it holds it, and tasks change only then.

    For speed alone, the members' only condition is looked at less often by a standby that stays one.
    """

    __slots__ = ()

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *exc: object) -> None:
        pass

    def wait(self, timeout: Optional[float] = None) -> bool:
        task = WORLD.task
        self.waiters.append((task, task.serial))
        if timeout is not None and task.process.quiet > 1:
            timeout *= 10
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
        process = WORLD.task.process
        election = process.election
        if process.stopping or election is None or election.lease is not None or process.working:
            process.quiet = 0
        else:
            process.quiet += 1
        if process.quiet < 3:
            super().notify_all()


class SimEvent(SimWaiters):
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
        self.task = WORLD.spawn(WORLD.task.process, lambda: self.target(*self.args), self.name)

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

    @staticmethod
    def enumerate() -> list[Task]:
        return list(WORLD.task.process.tasks)


class SimQueue:
    """queue.SimpleQueue."""

    def __init__(self) -> None:
        self.items: collections.deque[Any] = collections.deque()
        self.changed = SimWaiters()

    def put(self, item: Any) -> None:
        self.items.append(item)
        self.changed.notify_all()

    def get(self, wait: bool = True) -> Any:
        while wait and not self.items:
            self.changed.wait()
        if not self.items:
            raise queue.Empty
        return self.items.popleft()

    def empty(self) -> bool:
        return not self.items

    def qsize(self) -> int:
        return len(self.items)


class SimQueueModule:
    """Instead of the module `queue`."""

    SimpleQueue, Empty = SimQueue, queue.Empty


class SimLog:
    """Instead of the module's log: each process has the real one, with little room and a stream that may block."""

    @staticmethod
    def put(write: Callable[[], object], level: int = logging.INFO) -> bool:
        process, task = WORLD.task.process, WORLD.task
        process.lines += 1
        number, waiting, serial = process.lines, process.outbox_waits, task.serial
        before = waiting.qsize()
        done = process.outbox.put(lambda: process.write(number, write), level)
        if task.serial != serial:
            WORLD.violate(f"{process.name} waits for the log")
        room = LOG_ROOM if level > logging.INFO else LOG_ROOM // 2
        if not done and (waiting.qsize() > before) != (before < room):
            kept = "drops" if before < room else "keeps"
            WORLD.violate(f"{process.name} {kept} a line of level {level} while {before} of {LOG_ROOM} wait")
        return bool(done)

    @staticmethod
    def flush(seconds: float = 2.0) -> bool:
        return bool(WORLD.task.process.outbox.flush(seconds))


class SimAtexit:
    """Instead of the module `atexit`."""

    @staticmethod
    def register(function: Callable[..., object]) -> None:
        pass


class SimTiming:
    """Timing, with its properties worked out once."""

    def __init__(self, timing: ftpcoord.Timing) -> None:
        self.heartbeat, self.liveness = timing.heartbeat, timing.liveness
        self.stale_after, self.still_after = timing.stale_after, timing.still_after
        self.margin, self.call_timeout, self.lock_timeout = timing.margin, timing.call_timeout, timing.lock_timeout


class SimElection(ftpcoord.Election):
    """The real one; its chance is the world's, and each tick is counted."""

    def __init__(self, store: Any, group: str, member: str, timing: Any, clock: Any, tell: Any) -> None:
        process = WORLD.task.process

        def heard(name: str, **fields: object) -> None:
            WORLD.heard(process, name, fields)
            tell(name, **fields)

        super().__init__(store, group, member, timing, clock, heard, WORLD.rng.random)
        process.election = self
        self.process = process

    def tick(self, now: float, willing: bool = True) -> float:
        WORLD.ticks += 1
        wait = super().tick(now, willing)
        if self.process.first_view == math.inf and self.view is not None:
            self.process.first_view = WORLD.now
        return wait


def lasts(lease: Any, process: Process) -> bool:
    """Whether something may still be done under a lease; also one that its owner wants back."""
    now = process.clock()
    return bool(lease.valid(now) or lease.remaining(now) > 0)


class Process:
    """One process of one member, with its host's clock and its ways to the database and the file server."""

    def __init__(self, world: World, number: int, member: str) -> None:
        self.number, self.member = number, member
        self.name = f"{member}/{number}"
        self.rate, self.since, self.base = world.rate(), world.now, 1e4 * world.rng.random()
        self.started, self.first_view = world.now, math.inf
        self.dead = self.paused = False
        self.backlog: list[tuple[Task, int, Any]] = []
        self.tasks: dict[Task, None] = {}
        self.election: Optional[SimElection] = None
        self.lease: Any = None  # the last one that was found valid
        self.quiet = 0  # how often nothing has changed for a standby
        self.program: Any = None  # the Listener or the Coordinator
        self.member_of: Any = None  # and its Member
        self.stopping = False
        self.walk: dict[str, Version] = {}  # what it is being shown
        self.walk_began = (math.inf, 0)  # the first walk of a poll: when, and how many versions there were
        self.seen: dict[str, Version] = {}  # by the last poll, and when that had begun and chosen
        self.polled = (math.inf, math.inf)
        self.at_work = 0  # handlers, or a script's own work, that are running
        self.lost_at = self.resumed_at = -math.inf
        self.cut: str = ""  # what becomes of its messages to the database: "", "lost", "replies", "late"
        self.cut_until = 0.0
        self.stumble = ""  # it is stopped just after it has had this done
        self.slow = 1.0
        self.outbox = ftpcoord.Outbox("log", LOG_ROOM)
        self.outbox_waits = next(value for value in vars(self.outbox).values() if isinstance(value, SimQueue))
        self.lines = self.written = self.told_dropped = self.dropped = 0  # lines of the log so far
        self.log_blocks_until = 0.0

    def write(self, number: int, write: Callable[[], object]) -> None:
        """What the log does with a line of this number."""
        while WORLD.now < self.log_blocks_until:
            block((self.log_blocks_until - WORLD.now) * self.rate)
        if self.dead:
            raise Killed
        if number <= self.written:
            WORLD.violate(f"{self.name} writes line {number} of its log after line {self.written}")
        self.dropped += number - self.written - 1
        self.written = number
        write()

    def clock(self) -> float:
        return self.base + (WORLD.now - self.since) * self.rate

    def set_rate(self, rate: float) -> None:
        self.base, self.since = self.clock(), WORLD.now
        self.rate = rate

    @property
    def working(self) -> bool:
        """Whether work of a lease is running, also of one that is over."""
        return self.member_of is not None and self.member_of.work is not None

    def valid(self) -> bool:
        """Whether it holds a lease that its own clock calls valid, running or paused."""
        lease = self.election.lease if self.election else None
        return lease is not None and lasts(lease, self)


# ---------------------------------------------------------------------------------------------------------------------
# The database
# ---------------------------------------------------------------------------------------------------------------------


class Call:
    """One statement on its way."""

    __slots__ = (
        "connection",
        "deadline",
        "epoch",
        "process",
        "replied",
        "result",
        "sent",
        "serial",
        "snapshot",
        "stamp",
        "task",
        "values",
        "verb",
    )

    def __init__(self, connection: Any, verb: Callable[..., Any], values: dict[str, Any], deadline: float) -> None:
        world = WORLD
        self.connection, self.verb, self.values = connection, verb, values
        self.task = world.task
        self.process = self.task.process
        self.serial = self.task.serial
        self.sent, self.deadline = world.now, deadline
        self.epoch = 0
        self.stamp = self.replied = math.inf
        self.snapshot: Any = None
        self.result: Any = None


class Tables:
    """The three tables as of now, or as of when a statement took its snapshot."""

    def __init__(self) -> None:
        self.token: Optional[tuple[str, int]] = None
        self.health: dict[str, Optional[float]] = {}  # None: NULL, in a foreign column that allows it
        self.ledger: dict[str, ftpcoord.Row] = {}
        self.updated: dict[str, float] = {}  # updated_at of the ledger's rows
        self.noted = 0  # how many rows the audit trail has

    def copy(self) -> Tables:
        other = Tables()
        other.token, other.health, other.ledger = self.token, dict(self.health), dict(self.ledger)
        other.updated, other.noted = dict(self.updated), self.noted
        return other


class Attempt(NamedTuple):
    """A claim, as the audit trail names it. One version's numbers may come again for the next one."""

    path: str
    term: int
    number: int


class Noted(NamedTuple):
    """A row of the audit trail."""

    of: Attempt
    outcome: str


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
        self.done: set[Version] = set()  # what was ever committed as done ...
        self.quarantined: set[Version] = set()  # ... or as quarantined
        self.skipped: set[tuple[str, int, str]] = set()  # rows of which nobody had asked the exact time
        self.dated: set[tuple[str, int, Optional[float]]] = set()  # path, size and exact time of what rows stood for
        self.trail: list[Noted] = []
        self.claims: collections.Counter[Attempt] = collections.Counter()
        self.highest_term = 0
        self.won_at = 0.0
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
            self.health[member] = max(self.health.get(member) or now, now)
        return []

    def look(self, clock: float, snapshot: Tables, group: str, member: str) -> list[Any]:
        if self.kind == "postgresql":
            self.beat(clock, snapshot, group, member)
        token = snapshot.token
        if token is None:
            return [(None, None, None, None, None, clock, None)]
        there = token[0] in snapshot.health
        stamp = snapshot.health.get(token[0])
        age = None if stamp is None else self.column(clock) - stamp
        shown = self._shown(stamp) if there else None
        return [(token[0], token[1], token[0] == member, shown, age, clock, stamp == RELEASED_STAMP)]

    @staticmethod
    def _shown(stamp: Optional[float]) -> str:
        return "" if stamp is None else repr(stamp)

    def first(self, clock: float, snapshot: Tables, group: str, member: str, term: int, timed: int) -> list[Any]:
        if self.token is not None:
            return []
        return self._won(clock, member, max(term, int(clock) + 1) if timed else term)

    def take(
        self,
        clock: float,
        snapshot: Tables,
        group: str,
        member: str,
        holder: str,
        old_term: int,
        stamp: Optional[str],
        stale_after: float,
        aged: int,
        own: int,
    ) -> list[Any]:
        if self.token != (holder, old_term) or holder not in self.health:
            return []
        heartbeat = self.health[holder]
        if self._shown(heartbeat) != (stamp or ""):
            return []
        if aged and not (heartbeat is not None and heartbeat < self.column(clock) - stale_after):
            return []
        return self._won(clock, member, old_term + 1)

    def take_absent(
        self, clock: float, snapshot: Tables, group: str, member: str, holder: str, old_term: int, own: int, **_: object
    ) -> list[Any]:
        if self.token != (holder, old_term) or not (own or holder not in self._read(snapshot).health):
            return []
        return self._won(clock, member, old_term + 1)

    def _won(self, clock: float, member: str, term: int) -> list[Any]:
        self._win(member, term)
        return [(term,)]

    def _win(self, member: str, term: int) -> None:
        self.token, self.won_at = (member, term), WORLD.now
        WORLD.term_written(term)

    def seat(self, clock: float, snapshot: Tables, group: str, member: str, term: int) -> list[Any]:
        if self.token == (member, term):
            self.health[member] = self.column(clock)
        return []

    def renew(self, clock: float, snapshot: Tables, group: str, member: str, term: int, request: str) -> list[Any]:
        heartbeat, now = self.health.get(member), self.column(clock)
        if self.token != (member, term) or heartbeat is None:
            return []
        self.health[member] = heartbeat + self.tick if heartbeat > now else now
        asked = request in self._read(snapshot).health
        return [(2 * term + asked,)]

    def release(self, clock: float, snapshot: Tables, group: str, member: str, term: int, request: str) -> list[Any]:
        if self.token == (member, term) and self.health.get(member) is not None:
            self.health[member] = RELEASED_STAMP
            WORLD.released()
        return []

    def leave(self, clock: float, snapshot: Tables, group: str, member: str) -> list[Any]:
        token = self._read(snapshot).token
        if token is not None and token[0] != member:
            self.health.pop(member, None)
        return []

    def sweep(self, clock: float, snapshot: Tables, group: str, member: str) -> list[Any]:
        token = self._read(snapshot).token
        for other, stamp in list(self.health.items()):
            if stamp is not None and other != member and clock - stamp > 86400 and (not token or token[0] != other):
                del self.health[other]
        return []

    def last_term(self, clock: float, snapshot: Tables, group: str) -> list[Any]:
        return [(max((row.term for row in snapshot.ledger.values()), default=0),)]

    def pauses(self, clock: float, snapshot: Tables, group: str) -> list[Any]:
        return [(None, None, clock)]

    def members(self, clock: float, snapshot: Tables, group: str) -> list[Any]:
        rows = sorted(snapshot.health.items())
        return [
            (
                member,
                None if stamp is None else self.column(clock) - stamp,
                int(stamp == RELEASED_STAMP),
                self._shown(stamp),
            )
            for member, stamp in rows
        ]

    # -- the ledger's statements --------------------------------------------------------------------------------------
    # Rows are kept by file_id; `due` is of the database's clock.

    def page(self, clock: float, snapshot: Tables, only_open: bool) -> list[ftpcoord.Row]:
        return [
            row._replace(due=None if row.due is None or snapshot.updated[file_id] > clock else row.due - clock)
            for file_id, row in snapshot.ledger.items()
            if not only_open or row.state != "done" or row.action
        ]

    def done_count(self, clock: float, snapshot: Tables, group: str) -> list[Any]:
        return [(sum(row.state == "done" and not row.action for row in snapshot.ledger.values()),)]

    def standing(self, clock: float, snapshot: Tables, group: str, ids: list[str]) -> list[Any]:
        rows = [(file_id, snapshot.ledger[file_id]) for file_id in ids if file_id in snapshot.ledger]
        return [(i, *r[1:8]) for i, r in rows]

    def change(
        self,
        clock: float,
        snapshot: Tables,
        group: str,
        member: str,
        term: int,
        changes: Sequence[ftpcoord.Change],
        note: str = "",  # the audit trail's statement
        by: str = "",
    ) -> list[Any]:
        """CLAIM, CHANGE and FORGET: each change whose old row stands, if the fence holds."""
        made: list[Any] = []
        for _, new, _, plain, _ in changes:  # a value that this database does not take, or takes in ASCII alone
            if new is not None and (NEVER in new.path or (ODD in new.path and not plain)):
                raise ftpcoord.RowRefused(f"no such character in this database: {new.path}")
        if self.token != (member, term):
            return made
        for old, new, delay, _, outcome in changes:
            path = (new or old).path  # type: ignore[union-attr]
            file_id = ftpcoord.sha256_text(path)
            row = self.ledger.get(file_id)
            if (row and row[1:6]) != (old and old[1:6]):
                continue
            made.append((file_id,))
            if WORLD.audit == "on":
                WORLD.check_outcome(term, row, new, outcome.what if outcome and note else "")
                self._note(path, row, new, outcome if note else None, term)
            WORLD.changed(path, old, new)
            if new is None:
                del self.ledger[file_id]
                continue
            self.updated[file_id] = clock
            self.ledger[file_id] = new._replace(term=term, due=None if delay is None else clock + delay)
            self.dated.add((new.path, new.size, ftpcoord.epoch_seconds(ftpcoord.times_of(new.mtime)[1])))
            if new.state == "done":
                self.done.update(WORLD.files.meant(new))
            elif new.state == "quarantined":
                self.quarantined.update(WORLD.files.meant(new))
        return made

    def _note(
        self,
        path: str,
        row: Optional[ftpcoord.Row],
        new: Optional[ftpcoord.Row],
        outcome: Optional[ftpcoord.Outcome],
        term: int,
    ) -> None:
        if new is not None and new.state == "claimed":
            self.claims[Attempt(path, term, new.attempts)] += 1
        if outcome is not None:
            of = row if outcome.what == "lost" or new is None else new
            assert of is not None
            began = row.term if row is not None and row.state == "claimed" else term
            self.trail.append(Noted(Attempt(path, began, of.attempts), outcome.what))
            self.noted = len(self.trail)

    def skip(
        self, clock: float, snapshot: Tables, group: str, file_id: str, note: str = "", **values: Any
    ) -> list[Any]:
        """SKIP: what did not become done is recorded as done, if the row is the one that was read."""
        row, read = self.ledger.get(file_id), ("state", "action", "size", "mtime", "attempts")
        if row is None or any(getattr(row, name) != values[name] for name in read):
            return []
        if WORLD.audit == "on":
            if not note:
                WORLD.violate(f"{row.path} is skipped, and the trail does not tell")
            self._note(row.path, row, row, values["changes"][0].outcome if note else None, 0)
        self.ledger[file_id] = row._replace(state="done", action="", error="", due=None)
        self.updated[file_id] = clock
        self.done.update(WORLD.files.meant(row))
        if "=" not in row.mtime:
            self.skipped.add((row.path, row.size, row.mtime))
        return []


VERBS = (
    "BEAT",
    "LOOK",
    "FIRST",
    "TAKE",
    "TAKE_ABSENT",
    "SEAT",
    "RENEW",
    "RELEASE",
    "LEAVE",
    "SWEEP",
    "LAST_TERM",
    "MEMBERS",
    "DONE_COUNT",
    "STANDING",
    "PAUSES",
    "SKIP",
)


class SimStoreMixin:
    """A dialect whose `execute` is the simulated database's; everything above it is the real one's."""

    connection: Any
    timing: Any
    name: str

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.timing = WORLD.timing
        database = WORLD.database
        self.verbs = {getattr(self, verb): getattr(database, verb.lower()) for verb in VERBS if hasattr(self, verb)}
        self.changing = {self.CLAIM, self.CHANGE, self.FORGET}  # type: ignore[attr-defined]

    def execute(self, sql: str, **values: Any) -> Any:
        world = WORLD
        if self.connection is None:
            self._connected()
        verb = self.verbs.get(sql)
        if verb is None:
            assert sql in self.changing, sql
            verb = world.database.change
        return world.statement(self, verb, values)

    def _connected(self) -> None:
        if self.connection is None:
            epoch = WORLD.database.epoch
            WORLD.statement(self, WORLD.database.ping, {}, connecting=True)
            self.connection = epoch + 1

    def prepare(self) -> Any:
        self._connected()
        self.timing = WORLD.timing
        return self.timing

    def check_ids(self, group: str, member: str) -> None:
        pass

    def close(self) -> None:
        self.connection = None

    def literal(self, value: object) -> str:
        return repr(value)

    def rows(self, group: str, only_open: bool = False) -> Iterator[Any]:
        self._connected()
        return iter(WORLD.statement(self, WORLD.database.page, {"only_open": only_open}))


class SimPostgreSQL(SimStoreMixin, ftpcoord.PostgreSQL):
    pass


class SimMySQL(SimStoreMixin, ftpcoord.MySQL):
    pass


# ---------------------------------------------------------------------------------------------------------------------
# The file server, the disk, the handler
# ---------------------------------------------------------------------------------------------------------------------


class Version(NamedTuple):
    """One version of one file.  Sizes repeat, and times are whole seconds: only the content, a number, is its own."""

    path: str
    content: int
    size: int
    time: int  # epoch seconds


class Command:
    """A delete or a move on its way."""

    __slots__ = ("arrived", "path", "target", "version")

    def __init__(self, path: str, target: Optional[str]) -> None:
        self.path, self.target = path, target
        self.arrived = False
        self.version: Optional[Version] = None


class Run:
    """One start of the handler."""

    __slots__ = ("attempt", "began", "claim", "lease", "outcome", "process", "term", "uploads")

    def __init__(self, process: Process, lease: Any, path: str, attempt: int) -> None:
        self.process, self.lease, self.term, self.attempt = process, lease, lease.term, attempt
        self.claim = Attempt(path, lease.term, attempt)
        self.began, self.uploads = WORLD.now, len(WORLD.files.history)
        self.outcome = ""  # "ok" or "failed"


class SimFileServer:
    """A folder and one below it that clients of all processes see, and who did what to them.

    `lines`: LIST shows minutes of some zone, and exact times are told to who asks; else listings tell them.
    """

    def __init__(self, lines: bool, refusals: float) -> None:
        self.lines, self.refusals = lines, refusals
        self.zone = WORLD.rng.choice((0, 3600, 19800))
        self.moved_at = -math.inf
        self.files: dict[str, Version] = {}
        self.moved: dict[str, Version] = {}
        self.history: dict[int, Version] = {}  # all versions that ever were, by content
        self.taken: set[tuple[str, int, int]] = set()
        self.shown: dict[tuple[str, int, str], list[Version]] = {}  # what a line stood for
        self.up = True
        self.slow = 1.0
        self.runs: dict[Version, list[Run]] = {}
        # Looked at, and about to be deleted or moved; and how many versions there were by then.
        self.looked: dict[str, tuple[SimConnection, int]] = {}

    def upload(self, path: str) -> bool:
        """A new file, or a new version.  Not between a member's last look and its delete: nobody can promise that.

        Nor of a size and a time that an earlier version had: no one can tell them apart."""
        if path in self.looked:
            return False
        size, moment = WORLD.rng.choice((1000, 1000, 1001)), int(SimTime.time())
        while (path, size, moment) in self.taken:
            size += 1
        self.taken.add((path, size, moment))
        version = Version(path, len(self.history), size, moment)
        self.files[path] = self.history[version.content] = version
        return True

    def vanish(self, path: str) -> None:
        """Its owner removes a file."""
        if path not in self.looked:
            self.files.pop(path, None)

    def seconds(self, version: Version) -> int:
        """The time, as exact as a listing shows it."""
        return version.time // 60 * 60 if self.lines else version.time

    def entry(self, version: Version) -> ftpcoord.Entry:
        """A line of a listing."""
        moment = version.time + self.zone * self.lines
        mtime = ftpcoord.utc_text(float(moment))[: 16 if self.lines else 19]
        if self.lines:
            self.shown.setdefault((version.path, version.size, mtime), []).append(version)
        return ftpcoord.Entry(version.path.rpartition("/")[2], "file", version.size, mtime)

    def exact(self, version: Version, seen: Optional[ftpcoord.Entry] = None) -> ftpcoord.Entry:
        """The same with the exact time, as an answer to a question, beside the line that was seen, or is shown now."""
        entry = self.entry(version)
        if seen is not None and ftpcoord.times_of(seen.mtime)[0]:
            entry = entry._replace(mtime=ftpcoord.times_of(seen.mtime)[0])
        return entry._replace(mtime=f"{entry.mtime}={version.time}") if self.lines else entry

    def meant(self, row: ftpcoord.Row) -> list[Version]:
        """The versions that a row of the ledger stands for: several that were handled where only a line is known."""
        line, exact = ftpcoord.times_of(row.mtime)
        if exact:
            seconds = ftpcoord.epoch_seconds(exact)
            return [v for v in self.runs if (v.path, v.size, v.time) == (row.path, row.size, seconds)]
        return [v for v in self.shown.get((row.path, row.size, line), ()) if v in self.runs]


class SimConnection(ftpcoord.FileServer):
    """Each verb acts when it is called and is answered later, or not."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.process = WORLD.task.process
        self.server = WORLD.files
        self.gone = False
        self.waiting: Optional[Wait] = None
        self.peer: Optional[socket.socket] = None

    def _call(self, what: str, path: str = "", effect: bool = False) -> None:
        """Before what the verb does.  Raises ServerDown if it does not come to that."""
        world = WORLD
        process = self.process
        if process.dead:
            raise Killed
        world.trace(process, f"{what} {path}")
        if effect and not process.valid():
            world.violate(f"{process.name} acts past its deadline: {what} {path}")
        world.stumbled(process, what)
        if self.gone:
            raise ftpcoord.ServerDown("the connection was cut")
        if not self.server.up or world.rng.random() < world.server_loss:
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
        world.check_transfer(self.process)
        if cut or self.gone or world.rng.random() < world.server_loss:
            self.gone = True
            raise ftpcoord.ServerDown("no answer")

    def _open(self) -> None:
        raise NotImplementedError

    _there = _is_folder = _make = _rename = _answers = _open  # type: ignore[assignment]

    def absolute(self, path: str) -> str:
        return path

    def connect(self) -> None:
        if not self.process.dead and not self.process.valid():
            WORLD.measure("connections without a lease", WORLD.measured.get("connections without a lease", 0) + 1)
        self._call("connect")
        self._answer()
        sock, self.peer = WORLD.connected()
        self._adopt(sock)
        self.gone = False

    def alive(self) -> bool:
        try:
            self._call("alive")
            self._answer()
        except ftpcoord.ServerDown:
            return False
        return True

    def list(self, folder: str, last: Any = None) -> ftpcoord.Listing:
        self._call("list", folder)
        here = [version for path, version in self.server.files.items() if path.rpartition("/")[0] == folder]
        entries = ftpcoord.Listing(last)
        for entry in map(self.server.entry, here):
            entries.append(entries.lines.setdefault(repr(entry).encode(), (entry, ""))[0])
        entries.prune_lines()
        if folder == "/in":
            entries.append(ftpcoord.Entry("sub", "dir", 0, ""))
        if folder == "/in":
            self.process.walk = {}
            self.process.walk_began = min(self.process.walk_began, (WORLD.now, len(self.server.history)))
        self._answer()
        if WORLD.rng.random() < self.server.refusals:
            raise ftpcoord.FileRefused(f"{folder}: 450 not now")
        self.process.walk.update((version.path, version) for version in here)
        return entries

    def same(self, path: str, seen: ftpcoord.Entry) -> Optional[bool]:
        self._call("same", path)
        version = self.server.files.get(path)
        same = None if version is None else ftpcoord.same_version(seen, self.server.exact(version)) is True
        self._looks(path, same is not False)
        return same

    def _looks(self, path: str, before_removal: bool) -> None:
        if before_removal:
            self.server.looked[path] = self, len(self.server.history)
        try:
            self._answer()
        except BaseException:
            self._forget()
            raise

    def exact(self, path: str, seen: ftpcoord.Entry) -> Optional[ftpcoord.Entry]:
        self._call("exact", path)
        version = self.server.files.get(path)
        self._answer()
        told = version and self.server.exact(version, seen)
        line, exact = ftpcoord.times_of(told.mtime) if told else ("", "")
        return None if line and ftpcoord.zone_between(line, exact) is None else told  # of another version than the line

    def exists(self, path: str, fresh: bool = True) -> bool:
        self._call("exists", path)
        there = path in self.server.files or path in self.server.moved
        self._looks(path, there and path.endswith(OK))
        return there

    def _fetch(self, job: Any) -> None:
        """Content is what is there while it is read, and it may be of two versions."""
        files, path = self.server.files, job.path
        before = files.get(path)  # as asked for where a line's minute may still run
        self._call("fetch", path)
        first = files.get(path)
        self._answer()
        last = files.get(path) or first
        if first is None or last is None:
            raise ftpcoord.FileGone(path)
        if first.size != job.size:
            raise ftpcoord.FileChanged(path)
        job.write(memoryview(f"{first.content} {last.content}".encode()))
        if job.seen is None:
            return
        self._answer()
        now = files.get(path) or last  # of one that is gone by now FTP could not tell
        same = ftpcoord.same_version(job.seen, self.server.exact(now))
        if not same or (self.server.lines and now != before):
            raise ftpcoord.FileChanged(path)
        if self.server.lines:
            job.told(self.server.exact(now, job.seen))

    def fetch_many(self, jobs: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        for job in jobs:
            try:
                self._fetch(job)
            except (ftpcoord.FileGone, ftpcoord.FileChanged) as exc:
                yield job, exc
            else:
                yield job, None

    def delete(self, path: str) -> None:
        self._remove("delete", path, None)

    def rename(self, path: str, target: str) -> None:
        self._remove("rename", path, target)

    def _remove(self, what: str, path: str, target: Optional[str]) -> None:
        """Sent now, it acts when it arrives: also after the connection was shut, unless that was a reset."""
        world, command = WORLD, Command(path, target)
        try:
            self._call(what, path, effect=True)
            travel = world.latency * world.rng.expovariate(1.0) * self.server.slow
            if world.rng.random() < world.server_loss:
                travel += world.span()  # the network sends it again
            world.push(world.now + travel, self._arrives, command)
            with self._effect():
                self._answer(travel + world.latency * world.rng.expovariate(1.0))
        except BaseException:
            self.close(orderly=False)
            raise
        if not command.arrived:
            self.close(orderly=False)
            raise ftpcoord.ServerDown("no answer")
        if command.version is None and target in self.server.moved:
            raise ftpcoord.TargetExists(str(target))  # the next name is tried at once
        if command.version is None:
            raise ftpcoord.FileGone(path)

    def _arrives(self, command: Command) -> None:
        world, process = WORLD, self.process
        # The kernel of a host whose process is stopped or dead gives up by itself: TCP_USER_TIMEOUT, SO_LINGER.
        if process.dead or process.paused or self.peer is None or not self.server.up:
            return
        if self.peer.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.peer = None  # it was reset
            return
        world.trace(process, f"arrives: {command.target or 'delete'} {command.path}")
        if not process.valid():
            world.check_transfer(process, f"{process.name}: a command arrives after its lease: {command.path}")
        command.arrived = True
        if command.target in self.server.moved:
            return
        command.version = self.server.files.pop(command.path, None)
        if command.version is not None:
            world.removed(process, command.version)
            if command.target is not None:
                self.server.moved[command.target] = command.version

    def mkdir(self, folder: str) -> None:
        self._call("mkdir", folder, effect=True)
        with self._effect():
            self._answer()

    def _forget(self) -> None:
        looked = self.server.looked
        for path in [path for path, (connection, _) in looked.items() if connection is self]:
            del looked[path]

    def close(self, orderly: bool = True) -> None:
        self.gone = True
        self._forget()
        super().close(orderly)

    def abort(self) -> None:
        self.gone = True
        super().abort()
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
            SimFile.DESCRIPTOR = tempfile.TemporaryFile()  # noqa: SIM115 - it is every file's, to the end
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

    def clean(self, goes_on: Callable[[], object] = bool) -> None:
        pass

    def create(self, found: Any, private: bool = False) -> ftpcoord.Copy:
        WORLD.numbers += 1
        path = Path(f"{WORLD.numbers}")
        out: Any = SimFile(path)
        return ftpcoord.Copy(path.parent, path, out)

    def name(self, copy: ftpcoord.Copy, found: Any, *_: object) -> None:
        pass

    def sync(self, copy: ftpcoord.Copy, durable: set[Path]) -> None:
        pass

    def discard(self, copy: Optional[ftpcoord.Copy]) -> None:
        if copy is not None:
            copy.close()
            WORLD.disk.pop(copy.part, None)

    def close(self) -> None:
        pass


# ---------------------------------------------------------------------------------------------------------------------
# The world
# ---------------------------------------------------------------------------------------------------------------------
class World:
    """One seed's run: members, database, file server, faults, and what is checked."""

    def __init__(self, seed: int, tracing: bool = False, **fixed: Any) -> None:
        global WORLD
        WORLD = self
        self.seed, self.tracing = seed, tracing
        self.lines: collections.deque[str] = collections.deque(maxlen=400)
        self.rng = rng = random.Random(seed)
        self.hub = greenlet.getcurrent()
        self.now = 0.0
        self.heap: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self.pushed = 0
        self.task: Task
        self.ticks = self.numbers = self.late_connects = self.faults = self.elections = 0
        self.violation: Optional[str] = None
        self.measured: dict[str, float] = {}

        # What the seed draws, or the caller has fixed.
        def draw(name: str, choices: Sequence[Any]) -> Any:
            chosen = rng.choice(choices)
            return fixed.get(name, chosen)

        kind = draw("kind", ("postgresql", "mysql"))
        whole = draw("whole", (False, False, True))
        intervals = ((1, 8), (1, 8), (1, 10), (1, 15), (1, 30), (0.5, 8), (2, 20))
        heartbeat, liveness = draw("intervals", intervals)
        least = {"postgresql": ftpcoord.PostgreSQL, "mysql": ftpcoord.MySQL}[kind].least_timeout
        self.timing = SimTiming(ftpcoord.Timing(float(heartbeat), float(liveness), least, whole))
        self.spread = draw("spread", (0.0, 0.001, 0.03, 0.03))
        self.latency = heartbeat * draw("latency", (0.001, 0.01, 0.03))
        self.loss = draw("loss", (0.0, 0.0, 0.001, 0.01))
        self.lock_chance = draw("lock_chance", (0.0, 0.01, 0.1))
        self.server_loss = draw("server_loss", (0.0, 0.001, 0.02))
        self.handler_failures = draw("handler_failures", (0.0, 0.05, 0.3))
        self.breaks = draw("breaks", (0.0, 0.003))  # how often a script's work ends before its lease
        self.files_wanted = draw("files", (True, False, False, False))
        self.loses_commits = draw("loses_commits", (False,) * 7 + (True,))
        self.steps_wanted = draw("steps", (True, True, False))
        self.claiming = 2 * (self.timing.heartbeat + self.timing.call_timeout) / (1 - self.spread)
        self.first_until = 0.0  # when the last first claim is carried out
        self.tokens_vanish = draw("tokens", (True, False))
        self.suffix = draw("suffix", ("", OK))
        self.schedule = fixed.get("schedule", "")
        by_itself = random.Random(f"order {seed}").choice(("none", "none", "strict", KEYED))  # the other draws stay
        self.order = fixed.get("order", by_itself)
        self.audit = fixed.get("audit", random.Random(f"audit {seed}").choice(("on", "on", "off")))
        self.handling: list[tuple[str, Any, Process]] = []
        self.claimed_at: dict[str, float] = {}
        self.written_at: dict[str, float] = {}
        members = draw("members", (2, 3, 3, 4))
        self.ids = [f"m{number}" for number in range(members)]
        if draw("duplicates", (True, False, False)) and not self.loses_commits:
            self.ids[-1] = "m0"
        self.gap = self.timing.stale_after * draw("gap", (0.2, 0.7, 2.0))
        self.length = draw("length", (1500,)) * heartbeat / members
        self.config = self._config(kind)
        self.looked_at: Optional[tuple[dict[str, Any], ftpcoord.Config]] = None

        self.database = SimDatabase(kind, whole)
        self.files = SimFileServer(draw("lines", (False, True)), draw("refusals", (0.0, 0.02, 0.1)))
        self.sockets: list[socket.socket] = []
        self.disk: dict[Path, bytes] = {}
        self.processes: list[Process] = []
        self.operators: list[Process] = []
        self.started = 0
        self.calm = False
        self.steps: list[tuple[float, float]] = []  # when the database's clock was set forward, and by how much
        self.next_step = 0.0
        self.commits_lost = False
        self.lost_until = -math.inf
        self.released_at = -math.inf
        self.highest_valid = 0
        self.elected: set[int] = set()
        self.exposed: set[Any] = set()  # leases that a forward step of the database's clock has cut short

    def _config(self, kind: str) -> dict[str, Any]:
        rng, heartbeat = self.rng, self.timing.heartbeat
        return {
            "url": "ftp://user@files.example/in",
            "database": f"{kind}://user@database.example/app",
            "coordination_group": GROUP,
            "heartbeat_frequency": heartbeat,
            "liveness_check_interval": self.timing.liveness,
            "polling_interval": heartbeat * rng.choice((1, 3)),
            "schedule": self.schedule,
            "timezone": "UTC",
            "settle": heartbeat * rng.choice((0, 0.3)),
            "recursive": True,
            "ready_suffix": self.suffix,
            "after": rng.choice(("keep", "delete", "move:done")),
            "after_error": rng.choice(("keep", "move:bad" if self.order == "none" else "keep")),
            "order": self.order,
            "audit": self.audit,
            "audit_retention": 0,
            "max_attempts": 3,
            "retry_delay": heartbeat,
            "workers": rng.choice((1, 2)),
            "drain_timeout": 2 * heartbeat,
            "stall_timeout": 5 * self.timing.liveness,
        }

    def settings(self, member: str) -> ftpcoord.Config:
        """Of a process that begins; for speed they are looked at once."""
        if self.looked_at is None or self.looked_at[0] != self.config:
            self.looked_at = dict(self.config), ftpcoord.Config(**self.config)
        config = copy.copy(self.looked_at[1])
        config.member_id = member
        return config

    def rate(self) -> float:
        return float(1.0 + self.spread * (2 * self.rng.random() - 1))

    # -- the scheduler ------------------------------------------------------------------------------------------------

    def push(self, when: float, function: Callable[..., object], *args: Any) -> None:
        self.pushed += 1
        heapq.heappush(self.heap, (when, self.pushed, function, args))

    def soon(self, wait: Wait, value: Any) -> None:
        self.push(self.now, self.wake, wait[0], wait[1], value)

    def wake(self, task: Task, serial: int, value: Any) -> None:
        if task.serial != serial or not task.alive or task.process.dead:
            return
        process = task.process
        if process.paused:
            process.backlog.append((task, serial, value))
            return
        task.serial = serial + 1
        self.task = task
        task.greenlet.switch(value)
        election = process.election
        if election is not None and election.lease is not None:
            self._check_lease(process, election.lease)

    def spawn(self, process: Process, target: Callable[[], object], name: str = "") -> Task:
        task = Task(process, target, name)
        process.tasks[task] = None
        self.push(self.now, self.wake, task, 0, None)
        return task

    def run_until(self, until: float) -> None:
        heap, pop = self.heap, heapq.heappop
        while heap and heap[0][0] <= until:
            self.now, _, function, args = pop(heap)
            function(*args)
            if self.violation is not None:
                raise Violation(f"seed {self.seed}, {self.now:.3f} s: {self.violation}")
        self.now = until

    def trace(self, process: Optional[Process], text: str) -> None:
        if self.tracing:
            self.lines.append(f"{self.now:11.4f} {process.name if process else '-':6} {text}")

    # -- processes ----------------------------------------------------------------------------------------------------

    def start(self, member: str) -> None:
        self.started += 1
        process = Process(self, self.started, member)
        self.processes.append(process)
        self.trace(process, f"starts, clock rate {process.rate:.4f}")
        target = self._listener if self.files_wanted else self._coordinator
        self.spawn(process, lambda: target(process))

    def _listener(self, process: Process) -> None:
        program = process.program = ftpcoord.Listener(self.settings(process.member))
        process.member_of = program.member
        program.on_file("*")(self.handle)
        program.start()
        program.join()
        self.push(self.now, self.kill, process, "exits")

    def _coordinator(self, process: Process) -> None:
        program = process.program = ftpcoord.Coordinator(self.settings(process.member))
        process.member_of = program._member
        rng, heartbeat = self.rng, self.timing.heartbeat
        with program:
            for lease in program.leases():
                process.at_work = 1
                while lease.valid():
                    if not process.valid():
                        self.violate(f"{process.name} acts without a valid lease")
                    block(heartbeat * (9 if rng.random() < 0.01 and not self.calm else 0.7))
                    if rng.random() < self.breaks and not self.calm:
                        break  # the work ends before the lease
                process.at_work = 0
        self.push(self.now, self.kill, process, "exits")

    def kill(self, process: Process, why: str, again: Optional[float] = None) -> None:
        """The process is no more; perhaps it is started again later."""
        if process.dead:
            return
        self.trace(process, why)
        process.dead = True
        self.processes.remove(process)
        for task in list(process.tasks):
            if task.greenlet:  # it has begun and not ended
                self.task = task
                task.greenlet.throw(Killed)
        if not self.calm:
            delay = self.rng.choice((0.0, self.span())) if again is None else again
            self.push(self.now + delay, self._restart, process.member)

    def _restart(self, member: str) -> None:
        if not self.calm:
            self.start(member)

    def pause(self, process: Process, seconds: float) -> None:
        if not process.paused:
            self.trace(process, f"is stopped for {seconds:.2f} s")
            process.paused = True
            self.push(self.now + seconds, self.resume, process)

    def resume(self, process: Process) -> None:
        if process.dead or not process.paused:
            return
        self.trace(process, "goes on")
        process.paused = False
        process.resumed_at = self.now
        backlog, process.backlog = process.backlog, []
        self.rng.shuffle(backlog)  # all its threads can run: who comes first is chance
        for task, serial, value in backlog:
            self.push(self.now, self.wake, task, serial, value)

    def stop(self, process: Process) -> None:
        """SIGTERM."""
        if not process.stopping and process.program is not None:
            process.stopping = True
            self.trace(process, "gets SIGTERM")
            self.spawn(process, process.program.stop)

    # -- statements ---------------------------------------------------------------------------------------------------

    def statement(
        self, connection: Any, verb: Callable[..., Any], values: dict[str, Any], connecting: bool = False
    ) -> Any:
        """Sends a statement and waits for what comes of it; the client's side."""
        process = self.task.process
        if process.dead:
            raise Killed
        rng = self.rng
        call = Call(connection, verb, values, self.now + self.timing.call_timeout / process.rate)
        call.epoch = self.database.epoch if connecting else connection.connection - 1
        delay = self.latency * process.slow * -math.log(1.0 - rng.random())
        lost = False
        if self.now < process.cut_until:
            lost = process.cut == "lost"
            if process.cut == "late":
                delay += process.cut_until - self.now
        elif self.loss and rng.random() < self.loss:
            lost = rng.random() < 0.3
            delay += self.span()
        if lost:
            self.push(call.deadline, self.wake, call.task, call.serial, call)
        else:
            self._later(call, self.now + delay, self.arrive)
        if self.tracing:
            self.trace(process, f"sends {verb.__name__} {values or ''}")
        if process.at_work and verb.__name__ == "release":
            self.violate(f"{process.name} releases its lease while work is running")
        self.hub.switch()
        if call.replied <= self.now:
            result = call.result
            if not isinstance(result, ftpcoord.DatabaseDown):
                if self.tracing:
                    self.trace(process, f"gets {verb.__name__} -> {result}")
                return result
        else:
            result = ftpcoord.DatabaseDown("no answer")
        self.trace(process, f"gets {verb.__name__} -> {result}")
        if not isinstance(result, ftpcoord.DatabaseBusy):
            connection.close()
        raise result

    def arrive(self, call: Call) -> None:
        """The statement reaches the server, which starts it: time stamp and snapshot are taken here."""
        database, now = self.database, self.now
        if self.calm and now > call.deadline:
            return
        if now < database.frozen_until:
            self._later(call, database.frozen_until, self.arrive)
            return
        if not database.up:
            if database.silent:
                self.push(call.deadline, self.wake, call.task, call.serial, call)
            else:
                self._reply(call, ftpcoord.DatabaseDown("connection refused"))
            return
        call.stamp = database.clock()
        if now < database.stalled_until:
            wait = database.stalled_until - now
        elif now < database.locked_until:
            wait = database.locked_until - now
            if wait > self.timing.lock_timeout:
                self._later(call, now + self.timing.lock_timeout, self._busy)
                return
        elif self.lock_chance and self.rng.random() < self.lock_chance:
            wait = self.timing.lock_timeout * self.rng.random()
        else:
            self.execute(call)
            return
        call.snapshot = database.copy()
        self._later(call, now + wait, self.execute)

    def _later(self, call: Call, when: float, function: Callable[[Call], None]) -> None:
        if call.verb.__name__ == "first":
            self.first_until = max(self.first_until, when)
        self.push(when, function, call)
        if when > call.deadline:
            self.push(call.deadline, self.wake, call.task, call.serial, call)

    def execute(self, call: Call) -> None:
        """The statement has its locks and is carried out, whether or not anybody waits for it any more."""
        database = self.database
        if call.epoch != database.epoch or not database.up:
            self._reply(call, ftpcoord.DatabaseDown("connection reset"))
            return
        result: Any
        try:
            result = call.verb(call.stamp, call.snapshot or database, **call.values)
        except ftpcoord.DatabaseDown as exc:
            result = exc
        if self.tracing:
            late = f", stamped {call.stamp - database.clock():+.3f}" if call.snapshot else ""
            state = f"{database.token} { ({k: v and round(v - EPOCH, 3) for k, v in database.health.items()}) }"
            self.trace(call.process, f"    carried out {call.verb.__name__}{late} -> {result}   {state}")
        if call.process.stumble:
            self.stumbled(call.process, call.verb.__name__)
        self._reply(call, result)

    def _busy(self, call: Call) -> None:
        self._reply(call, ftpcoord.DatabaseBusy("lock timeout"))

    def _reply(self, call: Call, result: Any) -> None:
        process, now = call.process, self.now
        call.result = result
        if (now < process.cut_until and process.cut in ("lost", "replies")) or (
            self.loss and self.rng.random() < self.loss
        ):
            self.push(call.deadline, self.wake, call.task, call.serial, call)
            return
        call.replied = now + self.latency * process.slow * -math.log(1.0 - self.rng.random())
        self.push(min(call.replied, max(now, call.deadline)), self.wake, call.task, call.serial, call)

    # -- faults -------------------------------------------------------------------------------------------------------

    def span(self) -> float:
        """How long something lasts: about as long as one of the periods that matter."""
        timing, rng = self.timing, self.rng
        kind = rng.randrange(5)
        if kind == 0:
            return rng.random() * timing.heartbeat
        if kind == 1:
            return rng.random() * 3 * timing.call_timeout
        if kind == 2:
            return timing.stale_after - timing.margin + (rng.random() - 0.7) * 2 * timing.heartbeat
        if kind == 3:
            return timing.stale_after + (rng.random() - 0.3) * 2 * timing.heartbeat
        return rng.random() * 2 * timing.liveness

    def fault(self) -> None:
        if self.calm:
            return
        self.push(self.now + self.gap * self.rng.expovariate(1.0), self.fault)
        self.faults += 1
        if self.files_wanted and self.rng.random() < 0.3:
            self._upload()
        rng, database = self.rng, self.database
        kind = rng.choice(self.KINDS)
        active = [process for process in self.processes if process.election and process.election.lease]
        process = rng.choice(active if active and rng.random() < 0.6 else self.processes or [None])
        if process is not None and kind in self.OF_PROCESSES:
            getattr(self, f"_{kind}")(process)
        elif kind not in self.OF_PROCESSES:
            self.trace(None, kind)
            getattr(self, f"_{kind}")(database)

    OF_PROCESSES = ("pause", "crash", "stop", "cut", "slow", "rate", "stumble", "log")
    KINDS = (
        *OF_PROCESSES,
        "zone",
        "pause",
        "cut",
        "crash",
        "stumble",
        "stumble",
        "stumble",
        "outage",
        "freeze",
        "stall",
        "lock",
        "step",
        "step",
        "vanish",
        "null",
        "token",
        "step_down",
        "commits",
        "commits",
        "server",
    )

    def _pause(self, process: Process) -> None:
        self.pause(process, self.span())

    def _stumble(self, process: Process) -> None:
        """It will be stopped at a moment that matters."""
        moments = ("renew", "take", "seat", "look", "change", "same", "fetch", "fetch", "mkdir")
        process.stumble = self.rng.choice(moments[: None if self.files_wanted else 4])

    def stumbled(self, process: Process, what: str) -> None:
        if process.stumble == what and not process.dead and not self.calm:
            process.stumble = ""
            timing, rng = self.timing, self.rng
            lease = timing.stale_after - timing.margin
            stopped = rng.choice((self.span(), lease * rng.random(), lease + timing.heartbeat * rng.random()))
            self.pause(process, stopped)
            if rng.random() < 0.5:
                self.push(self.now + stopped, self._cut, process)

    def _crash(self, process: Process) -> None:
        self.kill(process, "crashes")

    def _stop(self, process: Process) -> None:
        self.stop(process)

    def _cut(self, process: Process) -> None:
        if self.calm:
            return
        process.cut = self.rng.choice(("lost", "replies", "late"))
        process.cut_until = self.now + self.span()
        self.trace(process, f"messages: {process.cut} until {process.cut_until:.3f}")

    def _slow(self, process: Process) -> None:
        process.slow = self.rng.choice((1.0, 10.0, 100.0))

    def _rate(self, process: Process) -> None:
        process.set_rate(self.rate())

    def _outage(self, database: SimDatabase) -> None:
        if database.up:
            database.up, database.silent = False, self.rng.random() < 0.5
            database.epoch += 1
            self.push(self.now + self.span(), self._database_up)

    def _database_up(self) -> None:
        self.trace(None, "the database is up")
        self.database.up = True

    def _freeze(self, database: SimDatabase) -> None:
        database.frozen_until = self.now + self.span()

    def _stall(self, database: SimDatabase) -> None:
        database.stalled_until = self.now + self.span()

    def _lock(self, database: SimDatabase) -> None:
        database.locked_until = self.now + min(self.span(), 3 * self.timing.lock_timeout)

    def _step(self, database: SimDatabase) -> None:
        if not self.steps_wanted:
            return
        timing, rng = self.timing, self.rng
        size = rng.choice(
            (
                timing.margin / 2.01,
                0.9,
                timing.margin,
                timing.stale_after,
                2 * timing.liveness,
                3600.0,
                2 * 86400.0,
                YEARS,
            )
        ) * rng.choice((1.0, rng.random()))
        if rng.random() < 0.5:
            if database.token is None:  # with a trace from the future gone meanwhile, no term would be known
                return
            self.trace(None, f"the database's clock is set back by {size:.3f} s")
            database.offset -= size
            # Two steps that cancel each other out between two looks cannot be seen.
            self.next_step = max(self.next_step, self.now + 1.05 * (2 * timing.heartbeat + timing.call_timeout))
        elif self.now >= self.next_step:
            # One forward step in the time of a lease: several that are too small to be noticed add up.
            self.trace(None, f"the database's clock is set forward by {size:.3f} s")
            self.next_step = self.now + 1.1 * timing.stale_after
            database.offset += size
            self.steps.append((self.now, size))

    def _vanish(self, database: SimDatabase) -> None:
        """An operator deletes somebody's health row."""
        if database.health and database.token is not None:
            del database.health[self.rng.choice(sorted(database.health))]

    def _null(self, database: SimDatabase) -> None:
        """A foreign writer sets somebody's heartbeat to NULL, in a column that allows it."""
        if database.health:
            database.health[self.rng.choice(sorted(database.health))] = None

    def _token(self, database: SimDatabase) -> None:
        """An operator deletes the token row, but leaves a trace of the group, and a clock later than every term.
        Not while a first claim from before the last election may be under way: it would be a late packet's claim."""
        traces = [member for member in database.health if not member.startswith(ftpcoord.STEP_DOWN)]
        claimed = max(database.won_at + self.claiming, self.first_until)
        if self.tokens_vanish and traces and database.highest_term < database.clock() and self.now > claimed:
            database.token = None

    def _step_down(self, database: SimDatabase) -> None:
        if database.token is not None:
            database.health[f"{ftpcoord.STEP_DOWN}{database.token[1]}"] = database.column(database.clock())

    def _commits(self, database: SimDatabase) -> None:
        """A failover to a replica that lags behind."""
        if self.loses_commits:
            self.push(self.now + self.span(), self._restore, database.copy(), set(database.done))

    def _restore(self, backup: Tables, done: set[Version]) -> None:
        if self.calm:
            return
        self.trace(None, f"commits are lost: {self.database.token} -> {backup.token}")
        database = self.database
        database.token, database.health, database.ledger = backup.token, backup.health, backup.ledger
        database.updated, database.noted = backup.updated, backup.noted
        del database.trail[backup.noted :]
        database.done = done
        database.epoch += 1
        database.highest_term = backup.token[1] if backup.token else 0
        self.commits_lost = True
        self.lost_until = self.now + (self.timing.stale_after + self.timing.call_timeout) / (1 - self.spread)
        self.elected.clear()
        self.highest_valid = 0

    def _zone(self, database: SimDatabase) -> None:
        """What LIST shows moves by an hour."""
        self.files.zone = 3600 - self.files.zone if self.files.zone in (0, 3600) else 19800
        self.files.moved_at = self.now

    def _server(self, database: SimDatabase) -> None:
        if self.rng.random() < 0.5:
            self.files.slow = self.rng.choice((1.0, 10.0, 300.0))
        else:
            self.files.up = False
            self.push(self.now + self.span(), self._server_up)

    def _server_up(self) -> None:
        self.files.up = True

    def _log(self, process: Process) -> None:
        """Nobody reads the log for a while."""
        process.log_blocks_until = self.now + self.span()

    def _upload(self) -> None:
        rng, files = self.rng, self.files
        for _ in range(rng.randrange(1, 5)):
            path = rng.choice(NAMES)
            if files.upload(path) and self.suffix and rng.random() < 0.8:
                delay = rng.choice((0.0, 3 * self.timing.heartbeat * rng.random(), self.span()))
                self.push(self.now + delay, self._complete, path)
            elif self.suffix:
                self._misuse(path)

    def _skip(self) -> None:
        """An operator skips what blocks others and will not be done by itself."""
        process = Process(self, 0, "operator")
        self.operators.append(process)
        self.spawn(process, self._skips)
        self.push(self.now + 5 * self.timing.heartbeat, self._skip)

    def _skips(self) -> None:
        store = open_database(self.settings("operator"))
        with contextlib.suppress(ftpcoord.DatabaseDown):
            for row in list(store.rows(GROUP, only_open=True)):
                gone = row.state == "failed" and row.marks.unlisted and row.path not in self.files.files
                if row.state == "quarantined" or gone:
                    store.skip(GROUP, row)

    def _misuse(self, path: str) -> None:
        """What nobody should do: a companion is replaced or removed, or its file is removed."""
        what, end = self.rng.choice(((self.files.upload, OK), (self.files.vanish, OK), (self.files.vanish, "")))
        what(path + end)

    def _complete(self, path: str) -> None:
        """A file's companion is uploaded, after it."""
        if path in self.files.files and not self.files.upload(path + OK):
            self.push(self.now + self.timing.heartbeat, self._complete, path)

    # -- what is checked ----------------------------------------------------------------------------------------------

    def violate(self, text: str) -> None:
        """Remembered, and raised by the hub: the program catches what is raised inside it."""
        self.trace(None, f"VIOLATION: {text}")
        if self.violation is None:
            self.violation = text

    def failed(self, exc: BaseException) -> None:
        self.violate(f"a thread ended with {type(exc).__name__}: {exc}")

    def measure(self, name: str, value: float) -> None:
        if value > self.measured.get(name, -math.inf):
            self.measured[name] = value

    def _check_lease(self, process: Process, lease: Any) -> None:
        """After each step of a process with a lease. Others' leases only end meanwhile, so that this misses nothing."""
        if not lasts(lease, process):
            return
        for other in self.processes:
            if other is not process and other.valid():
                self._two(process, other)
        if lease is not process.lease:
            process.lease = lease
            if self.now >= self.lost_until and lease not in self.exposed:
                if lease.term <= self.highest_valid:
                    self.violate(f"{process.name}: lease of term {lease.term} after one of term {self.highest_valid}")
                self.highest_valid = lease.term

    def _two(self, a: Process, b: Process) -> None:
        older, newer = (a, b) if a.election.lease.term <= b.election.lease.term else (b, a)  # type: ignore
        old, new = older.election.lease, newer.election.lease  # type: ignore[union-attr]
        assert old is not None and new is not None
        overlap = old.remaining(older.clock()) / older.rate
        if self.now < self.lost_until:
            self.measure("overlap after lost commits, in S", overlap / self.timing.stale_after)
            return
        if old in self.exposed:  # also to whom the newer member hands its lease on meanwhile
            return
        if self._exposed(older, newer, overlap):
            self.exposed.add(old)
            return
        self.violate(
            f"two valid leases: {older.name} term {old.term} for {overlap:.3f} s more, {newer.name} term {new.term}"
        )

    def _exposed(self, older: Process, newer: Process, overlap: float) -> bool:
        """EXPOSED: the clock was set forward while the older lease ran without a renewal, and the newer member's first
        look came after that: it cannot know. For at most S - m - H - T, until the older deadline: it waits for a
        renewal."""
        timing = self.timing
        term = timing.stale_after - timing.margin
        longest = term - timing.heartbeat - timing.call_timeout
        for when, size in self.steps:
            if size > 0 and when <= newer.first_view and self.now - when <= term / older.rate:
                self.measure("overlap after a forward step, in S - m", overlap / term)
                self.measure("overlap after a forward step, in S - m - H - T", overlap / longest)
                return bool(overlap <= longest / (1 - 2 * self.spread))
        return False

    def term_written(self, term: int) -> None:
        database = self.database
        if term <= database.highest_term:
            self.violate(f"the token got term {term} after {database.highest_term}")
        database.highest_term = term

    def released(self) -> None:
        self.released_at = self.now

    def heard(self, process: Process, name: str, fields: dict[str, Any]) -> None:
        self.trace(process, f"{name} {fields}")
        if name == "elected":
            self.elections += 1
            if fields["term"] in self.elected and not self.commits_lost:
                self.violate(f"{process.name} was elected with term {fields['term']}, as another one was")
            self.elected.add(fields["term"])
            if process.at_work:
                self.violate(f"{process.name} stands again while work of an earlier lease is running")
        elif name in ("lost", "released"):
            process.lost_at, process.polled = self.now, (math.inf, math.inf)

    def handle(self, file: Any) -> None:
        """The Python handler."""
        task = self.task
        process, rng = task.process, self.rng
        size = file.size
        first, last = self.disk[file.local].decode().split()
        version = self.files.history[int(first)]
        if first != last:
            self.violate(f"{process.name} handles {file.path} with the content of two versions")
        if (file.path, size) != (version.path, version.size) or (not self.files.lines and file.mtime != version.time):
            self.violate(f"{process.name} handles {file.path} with another version's content")
        if not process.valid() or not file.lease.valid():
            self.violate(f"{process.name}: a handler starts without a valid lease: {file.path}")
        if self.order != "none" and not self.commits_lost and not self._beside_another(process):
            self._check_order(process, file.path)
        runs = self.files.runs.setdefault(version, [])
        if self.suffix and not runs and not self._complete_once(version):
            self.violate(f"{process.name} handles {file.path}, whose companion is not there or an earlier version's")
        if runs and not self.commits_lost and not self._beside_another(process):
            if version in self.database.done:
                self.violate(f"{process.name} handles {file.path} again, which was done")
            # Where no exact time was recorded only a line is known, and a display that moved since hides it.
            moved = runs[-1].began - 10 * self.timing.heartbeat < self.files.moved_at
            unknown = self.files.lines and moved and runs[-1].lease is not file.lease
            if file.attempt <= max(run.attempt for run in runs):
                if not unknown or (file.path, size, version.time) in self.database.dated:
                    self.violate(f"{process.name} handles {file.path} again and is not told: attempt {file.attempt}")
                for run in runs:  # it counts anew
                    run.attempt = 0
            if version in self.database.quarantined:
                self.violate(f"{process.name} handles {file.path} again, which is quarantined")
            for run in runs:
                if not self._over(run):
                    self.violate(f"{process.name} handles {file.path} again, which {run.process.name} has or had")
        run = Run(process, file.lease, file.path, file.attempt)
        runs.append(run)
        self.trace(process, f"handles {file.path} {size}, attempt {file.attempt}")
        timing = self.timing
        process.at_work += 1
        at_work = (file.path, file.lease, process)
        self.handling.append(at_work)
        try:
            block(
                timing.stale_after * rng.random() if rng.random() < 0.03 and not self.calm else 0.1 * timing.heartbeat
            )
        finally:
            self.handling.remove(at_work)
        process.at_work -= 1
        if rng.random() < self.handler_failures:
            run.outcome = "failed"
            raise ValueError("as the seed wants it")
        run.outcome = "ok"

    def _key(self, path: str) -> bool:
        return self.order == KEYED and path in NAMES[:4]

    def _check_order(self, process: Process, path: str) -> None:
        """Nothing of its key is in work, and none that was known to sort before it when it was claimed is not done."""
        key, done = self._key(path), self.database.done
        for other, lease, owner in self.handling:
            if self._key(other) == key and lasts(lease, owner):
                self.violate(f"{process.name} handles {path} while {other} of its key is in work")
        began, chosen = process.polled
        if self.claimed_at.get(path, -math.inf) < chosen:
            return
        for other, version in process.seen.items():
            over = version in done or (self.files.lines and any(one.path == other for one in done))
            if self._key(other) == key and other < path and self.files.files.get(other) is version and not over:
                self.violate(f"{process.name}: {path} is handled before {other}, which is not done")
        for row in self.database.ledger.values():
            known = row.state in ("failed", "quarantined") and self.written_at.get(row.path, math.inf) < began
            if self._key(row.path) == key and row.path < path and known:
                self.violate(f"{process.name}: {path} is handled before {row.path}, which is {row.state}")

    def _beside_another(self, process: Process) -> bool:
        """Whether the other one of two leases that no one can prevent works on the same files."""
        return process.election is not None and process.election.lease in self.exposed

    def _over(self, run: Run) -> bool:
        """Whether a run gives reason for another one: it failed, or its member died or lost its lease."""
        return (
            run.outcome == "failed"
            or run.process.dead
            or not lasts(run.lease, run.process)
            or self.database.token != (run.process.member, run.term)
        )

    def check_transfer(self, process: Process, what: str = "") -> None:
        """A call to the file server has ended: at the deadline at the latest, if the process was running then."""
        if not process.valid():
            lease = process.lease
            over = self.now - max(process.lost_at, process.resumed_at, process.started)
            left = lease.remaining(process.clock()) if lease is not None else -math.inf
            over = min(over, -left / process.rate)
            self.measure("a transfer outlived its lease, in s", over)
            if over > 0.1:  # a clock whose rate changes meanwhile makes a timer of a second so late
                self.violate(what or f"{process.name}: a call to the file server outlived its lease by {over:.3f} s")

    def removed(self, process: Process, version: Version) -> None:
        """A version was deleted or moved."""
        if version.path.endswith(OK):
            self._companion_removed(process, version)
            return
        companion, looked = self.files.files.get(version.path + OK), self.files.looked.get(version.path)
        if companion is not None and looked is not None and companion.content < looked[1]:
            self.violate(f"{process.name} removes {version.path} before its companion")
        runs = self.files.runs.get(version, [])
        if version in self.database.quarantined:
            return
        if not any(run.outcome == "ok" for run in runs):
            self.violate(f"{process.name} removes {version.path}, which no handler has finished")
        elif version not in self.database.done and not self.commits_lost:
            self.violate(f"{process.name} removes {version.path} before it is done")

    # -- companions ---------------------------------------------------------------------------------------------------

    def _complete_once(self, version: Version) -> bool:
        """Whether there ever was a companion that is not seen to be older."""
        seconds = self.files.seconds(version)
        companions = [other for other in self.files.history.values() if other.path == version.path + OK]
        return any(c.content > version.content or self.files.seconds(c) >= seconds for c in companions)

    def _companion_removed(self, process: Process, companion: Version) -> None:
        files, path = self.files, companion.path[: -len(OK)]
        handled = [version for version in files.runs if version.path == path and files.runs[version]]
        version = max(handled, key=lambda version: files.runs[version][-1].began, default=None)
        if version is None or not (version in self.database.done or version in self.database.quarantined):
            if not self.commits_lost:
                self.violate(f"{process.name} removes {companion.path}, but its file is not done")
            return
        run = files.runs[version][-1]
        if companion.content < run.uploads or process.election is None or run.lease is not process.election.lease:
            return  # of an earlier term it is not known what was there at the claim
        shown = companion.size, files.seconds(companion)
        if not any(
            other.path == companion.path and other.content < run.uploads and (other.size, files.seconds(other)) == shown
            for other in files.history.values()
        ):
            self.violate(f"{process.name} removes {companion.path}, which is newer than at the claim")

    # -- the audit trail ----------------------------------------------------------------------------------------------

    def check_outcome(self, term: int, row: Optional[ftpcoord.Row], new: Optional[ftpcoord.Row], told: str) -> None:
        """What the trail is told of one step of a row."""
        was, now = row.state if row else "", new.state if new else ""
        if now == "quarantined" != was:
            right = told == now
        elif was != "claimed":  # an action that was not taken, or only for a part, is none
            done = row.action if row and not (new and new.action) else ""
            right = not told or (told in ("deleted", "moved") and told[:4] == done[:4])
        elif row is None or self._put_back(term, row, new, told):
            right = True
        elif new is None or now == "claimed" or new.marks.unlisted:
            right = told == "lost"
        elif now == "done" or new.failures > row.failures:
            right = told == now
        else:  # the host's failure is told, "not now" is not
            right = told in ("", "failed")
        if not right:
            self.violate(f"{(row or new).path}: {was} -> {now or 'gone'} is told as {told or 'nothing'}")  # type: ignore

    def _put_back(self, term: int, row: ftpcoord.Row, new: Optional[ftpcoord.Row], told: str) -> bool:
        """Whether what the server was not asked for is as if never claimed: what there was before may come again."""
        same = new is not None and new.attempts == row.attempts and ftpcoord.same_version(row, new)
        return not told and row.term == term and (new is None or (new.state in ("failed", "done") and not same))

    def check_trail(self) -> None:
        """At the end: each attempt has its end there, once."""
        database, told = self.database, collections.Counter(self.database.trail)
        ended: collections.Counter[Attempt] = collections.Counter()
        for (attempt, outcome), number in told.items():
            if outcome in ("done", "failed", "quarantined", "lost"):
                ended[attempt] += number
        for attempt, number in ended.items():
            if number > database.claims[attempt]:
                self.violate(f"{attempt} ended {number} times, and was begun {database.claims[attempt]} times")
        for row in database.ledger.values():
            if row.state == "claimed":
                ended[Attempt(row.path, row.term, row.attempts)] += 1
        runs = [run for those in self.files.runs.values() for run in those]
        for attempt, number in collections.Counter(run.claim for run in runs).items():
            if number > ended[attempt]:
                self.violate(f"{number} handlers were started for {attempt}, and the trail knows {ended[attempt]}")
        succeeded = collections.Counter(run.claim for run in runs if run.outcome == "ok")
        for (attempt, outcome), number in told.items():
            if outcome == "done" and number > succeeded[attempt]:
                self.violate(f"{attempt} is told as done {number} times, and was so {succeeded[attempt]} times")

    def changed(self, path: str, old: Optional[ftpcoord.Row], new: Optional[ftpcoord.Row]) -> None:
        """A row was written: what was looked at has been dealt with."""
        self.written_at[path] = self.now
        if new is not None and new.state == "claimed":
            self.claimed_at[path] = self.now
        files, companion = self.files, self.files.files.get(path + OK)
        files.looked.pop(path, None)
        files.looked.pop(path + OK, None)
        if self.suffix and new is not None and new.action and not self.calm and self.rng.random() < 0.1:
            self.push(self.now + 2 * self.latency * self.rng.expovariate(1.0), self._misuse, path)
        if old is None or new is not None or not old.action or companion is None or path in files.files:
            return
        runs = [run for version in files.meant(old) for run in files.runs[version]]
        last = max((version.content for version in files.history.values() if version.path == path), default=-1)
        known = any(version.content == last for version in files.meant(old))
        if self.suffix and known and not self.commits_lost and companion.content < max(run.uploads for run in runs):
            self.violate(f"the companion of {path} is left")

    # -- one life -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Chaos, then calm, then one experiment. Raises Violation."""
        for member in self.ids:
            self.push(self.now + self.rng.random() * 2 * self.timing.heartbeat, self._restart, member)
        self.push(self.gap, self.fault)
        if self.order != "none":
            self.push(self.gap, self._skip)
        try:
            self.run_until(self.length)
            self.heal()
            self.converge()
            self.experiment()
        finally:
            self.close()

    def close(self) -> None:
        """Ends all tasks."""
        self.calm = True
        for process in list(self.processes):
            self.kill(process, "the end")
        for process in self.operators:
            process.dead = True
            for task in list(process.tasks):
                if task.greenlet:
                    self.task = task
                    task.greenlet.throw(Killed)
        for sock in self.sockets:
            sock.close()

    def connected(self) -> tuple[socket.socket, socket.socket]:
        """The two ends of a real connection: what a close or a cut is, the kernel tells the other one."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            sock = socket.create_connection(listener.getsockname())
            peer = listener.accept()[0]
        self.sockets += [sock, peer]
        return sock, peer

    def heal(self) -> None:
        """No more faults; what was on its way and late is lost."""
        self.trace(None, "calm")
        database = self.database
        self.calm = True
        self.loss = self.lock_chance = self.server_loss = self.handler_failures = self.files.refusals = 0.0
        self.latency = 0.002 * self.timing.heartbeat
        database.up, database.frozen_until, database.stalled_until, database.locked_until = True, 0.0, 0.0, 0.0
        self.files.up, self.files.slow = True, 1.0
        here = collections.Counter(process.member for process in self.processes if not process.stopping)
        for process in self.processes:
            process.cut_until, process.slow, process.stumble, process.log_blocks_until = 0.0, 1.0, "", 0.0
            self.resume(process)
        for path, version in self.files.files.items() if self.suffix else ():
            companion = self.files.files.get(path + OK)
            if not path.endswith(OK) and (companion is None or companion.content < version.content):
                self.push(self.now, self._complete, path)
        for member, number in sorted((collections.Counter(self.ids) - here).items()):
            for _ in range(number):
                self.start(member)

    def active(self) -> list[Process]:
        return [process for process in self.processes if process.valid()]

    def until(self, condition: Callable[[], bool], bound: float, what: str) -> float:
        """Runs until the condition holds; how long that took. Violation if it is longer than `bound`."""
        began = self.now
        step = self.timing.heartbeat / 50
        while not condition():
            if self.now - began > bound:
                raise Violation(f"seed {self.seed}, {self.now:.3f} s: {what}: not within {bound:.3f} s")
            self.run_until(self.now + step)
        return self.now - began

    def slack(self, seconds: float) -> float:
        """So long by the slowest clock, plus what the messages take."""
        return float(seconds / (1 - self.spread) + 60 * self.latency)

    def converge(self) -> None:
        timing = self.timing
        # A dead holder is found stale, or found standing still after the clock was set; calls that were hanging end,
        # the back-off of a member that started during an outage is at most 5 s, a handler at most S.
        bound = self.slack(2 * timing.still_after + 4 * timing.heartbeat + 4 * timing.call_timeout + 5)
        took = self.until(lambda: len(self.active()) == 1, bound, "no active member after the faults")
        self.measure("active again after chaos, in L", took / timing.liveness)
        self.run_until(self.now + self.slack(2 * timing.still_after + 10 * timing.heartbeat))
        if len(self.active()) != 1:
            raise Violation(f"seed {self.seed}, {self.now:.3f} s: no active member in calm")
        if self.files_wanted:
            # What may have been replaced within the minute that its line shows is asked for again, ever more rarely.
            bound = 40 * timing.heartbeat + timing.liveness + 240 * self.files.lines + 60 * bool(self.schedule)
            took = self.until(lambda: not self.unfinished(), bound, f"files are left over: {self.unfinished()}")
            self.measure("files handled after calm, in L", took / timing.liveness)
            if self.audit == "on" and not self.commits_lost and not self.exposed:
                self.check_trail()
        for process in self.processes:
            waiting = process.outbox_waits.qsize()
            if waiting or process.dropped + process.written + waiting < process.lines:
                self.violate(f"{process.name}: {waiting} lines of the log are not written")
            if process.dropped != process.told_dropped:
                self.violate(f"{process.name} tells of {process.told_dropped} of {process.dropped} dropped lines")

    def unfinished(self) -> list[str]:
        """The files that were neither handled nor quarantined."""
        left = []
        for path, version in self.files.files.items():
            runs = self.files.runs.get(version, [])
            ended = version in self.database.quarantined or NEVER in path or path.endswith(OK)
            for row in self.database.ledger.values():  # one that looks like what was skipped is skipped as well
                looks = (row.path, row.size, ftpcoord.times_of(row.mtime).line)
                ended |= tuple(row[:3]) in self.database.skipped and version in self.files.shown.get(looks, ())
            if not ended and not any(run.outcome == "ok" for run in runs):
                left.append(path)
        return left

    def experiment(self) -> None:
        """One promise, put to the test in calm."""
        timing = self.timing
        active = self.active()[0]
        kind = self.rng.choice(("crash", "stopped", "cut", "stop", "outage", "step_down"))
        others = len(self.processes) - 1
        self.trace(None, f"experiment: {kind}")

        def replaced() -> bool:
            return any(process is not active for process in self.active())

        if kind in ("crash", "stopped", "cut"):
            if kind == "crash":
                self.kill(active, "crashes")
            elif kind == "stopped":
                self.pause(active, 4 * timing.liveness)
            else:
                active.cut, active.cut_until = "lost", self.now + 4 * timing.liveness
            bound, name = timing.liveness, "replaced after death, in L"
            token = self.database.token
            if token is not None and (self.database.health.get(token[0]) or 0.0) > self.database.clock():
                # The clock was set back: found standing still, by the observer's clock, not stale.
                bound = max(bound, self.slack(timing.still_after + 2 * timing.heartbeat))
                name = "replaced after death although the clock was set back, in L"
            took = self.until(replaced, bound, f"{kind}: nobody else active")
            self.measure(name, took / timing.liveness)
        elif kind in ("stop", "step_down"):
            if kind == "stop":
                self.stop(active)
            else:
                self._step_down(self.database)
            before = self.now
            bound = self.slack(4 * timing.heartbeat + timing.heartbeat + 12)
            self.until(lambda: self.released_at >= before, bound, f"{kind}: not released")
            took = self.until(replaced, self.slack(timing.heartbeat), f"{kind}: nobody else active after the release")
            self.measure("replaced after release, in H", took / timing.heartbeat)
        else:
            database = self.database
            database.up, database.silent = False, self.rng.random() < 0.5
            database.epoch += 1
            self.run_until(self.now + self.span())
            database.up = True
            bound = self.slack(2 * timing.heartbeat + 3 * timing.call_timeout)
            self.until(lambda: bool(self.active()), bound, "outage: nobody active after it")
            if self.active()[0] is not active:
                self.violate(f"outage: {self.active()[0].name} took the role of {active.name}")
        assert others > 0
        self.run_until(self.now + 2 * timing.heartbeat)


# ---------------------------------------------------------------------------------------------------------------------
# Running worlds
# ---------------------------------------------------------------------------------------------------------------------


def noted_event(what: str, level: int = logging.INFO, **fields: object) -> None:
    """The real one; and the program's own record of exceptions that it did not expect is looked at here."""
    exc, process = fields.get("exc"), WORLD.task.process
    WORLD.trace(process, f"logs {what} {fields}")
    if what == "polled":
        began, versions = process.walk_began
        shown = process.walk.items()
        process.seen = {path: one for path, one in shown if one.content < versions and not path.endswith(OK)}
        process.polled, process.walk_began = (began, WORLD.now), (math.inf, 0)
    if level >= logging.ERROR and isinstance(exc, BaseException) and not isinstance(exc, Killed):
        WORLD.violate(f"{what}: {type(exc).__name__} {fields}")
        if WORLD.tracing:
            WORLD.lines += traceback.format_exception(type(exc), exc, exc.__traceback__)
    REAL_EVENT(what, level, **fields)


class Stream(logging.Handler):
    """Where the lines of all processes go."""

    def handle(self, record: logging.LogRecord) -> bool:
        if record.msg == "log_dropped":
            WORLD.task.process.told_dropped += record.fields["lines"]  # type: ignore[attr-defined]
        return True


def open_database(config: Any) -> Any:
    world = WORLD
    store = SimMySQL if world.database.kind == "mysql" else SimPostgreSQL
    return store(config)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """ftpcoord with simulated surroundings."""
    instead: dict[str, Any] = {
        "time": SimTime,
        "threading": SimThreading,
        "queue": SimQueueModule,
        "boot_clock": SimTime.monotonic,
        "Election": SimElection,
        "open_database": open_database,
        "new_server": SimConnection,
        "Workplace": SimWorkplace,
        "log": SimLog,
        "atexit": SimAtexit,
        "event": noted_event,
    }
    before = {name: getattr(ftpcoord, name) for name in instead}
    logger = ftpcoord.logger
    level, propagate, handlers = logger.level, logger.propagate, logger.handlers[:]
    logger.propagate, logger.handlers[:] = False, [Stream()]
    logger.setLevel(logging.DEBUG)
    for name, value in instead.items():
        setattr(ftpcoord, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(ftpcoord, name, value)
        logger.setLevel(level)
        logger.propagate, logger.handlers[:] = propagate, handlers


def run_world(seed: int, tracing: bool = False, **fixed: Any) -> World:
    """One world from its seed. Raises Violation; `fixed` overrides what the seed draws."""
    collecting = gc.isenabled()
    gc.disable()  # a sixth of the time otherwise, and a world is small
    try:
        with installed():
            world = World(seed, tracing, **fixed)
            try:
                world.run()
            except Violation as exc:
                exc.world = world  # type: ignore[attr-defined]
                raise
            return world
    finally:
        if collecting:
            gc.enable()


class Totals(NamedTuple):
    """What many worlds came to."""

    worlds: int
    ticks: int
    faults: int
    elections: int
    virtual_seconds: float
    seconds: float
    measured: dict[str, tuple[float, int]]  # the largest value, and its seed


def run_worlds(ticks: int, seed: int, **fixed: Any) -> Totals:
    """Worlds of this seed and the following ones until so many ticks. Raises Violation, which says its seed."""
    began = time.monotonic()
    measured: dict[str, tuple[float, int]] = {}
    worlds = done = faults = elections = 0
    virtual = 0.0
    while done < ticks:
        if worlds % 40 == 0:
            gc.collect()
        world = run_world(seed + worlds, **fixed)
        worlds += 1
        done += world.ticks
        faults += world.faults
        elections += world.elections
        virtual += world.now
        for name, value in world.measured.items():
            if value > measured.get(name, (-math.inf, 0))[0]:
                measured[name] = (value, world.seed)
    return Totals(worlds, done, faults, elections, virtual, time.monotonic() - began, measured)


def summary(totals: Totals, seed: int) -> str:
    """In words."""
    lines = [
        f"{totals.ticks} ticks in {totals.worlds} worlds (seeds {seed} to {seed + totals.worlds - 1}), "
        f"{totals.virtual_seconds / 86400:.1f} days of virtual time, {totals.faults} faults, "
        f"{totals.elections} elections, in {totals.seconds:.1f} s: {totals.ticks / totals.seconds:.0f} ticks/s"
    ]
    lines += [f"  {name}: at most {value:.3f} (seed {at})" for name, (value, at) in sorted(totals.measured.items())]
    return "\n".join(lines)


def story(seed: int, lines: int = 60, **fixed: Any) -> str:
    """The last lines of a world's trace."""
    try:
        world = run_world(seed, tracing=True, **fixed)
    except Violation as exc:
        world = exc.world  # type: ignore[attr-defined]
    return "\n".join(list(world.lines)[-lines:])


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ticks", type=int, default=1, help="how many heartbeats at least; default: one world")
    parser.add_argument("--seed", type=int, default=1, help="of the first world; the next ones count up")
    instead = "instead of what the seed draws"
    parser.add_argument("--fix", action="append", default=[], metavar="NAME=VALUE", help=instead)
    end = "print the end of the first world's trace"
    parser.add_argument("--trace", type=int, default=0, metavar="LINES", help=end)
    parser.add_argument("--quiet", action="store_true", help="no story of a world that fails")
    options = parser.parse_args(arguments)
    fixed = {name: eval(value) for name, value in (item.split("=", 1) for item in options.fix)}
    if options.trace:
        print(story(options.seed, options.trace, **fixed))
    try:
        totals = run_worlds(options.ticks, options.seed, **fixed)
    except Violation as exc:
        found = exc.world.seed  # type: ignore[attr-defined]
        if not options.quiet:
            print(story(found, **fixed))
        print(f"{exc}\nagain: python tests/simulation.py --seed {found} {' '.join('--fix ' + f for f in options.fix)}")
        return 1
    print(summary(totals, options.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
