#!/usr/bin/env python3
"""ftpcoord: several copies of one FTP, FTPS or SFTP integration, exactly one of which polls.

The copies (members) of a group share a PostgreSQL or MySQL database (SQLite: members on one host). They elect one
active member; it alone polls the file server and hands each file to a command, a folder or a Python function. The
others stand by, and one of them takes over when the active one dies, hangs or stops.

Guaranteed, as long as the database keeps its commits, clock rates differ by less than 10 % and all members of a group
have the same two intervals
  1. At most one member of a group is active at any instant, whatever is paused, killed, cut off or started twice.
  2. No file is lost, none is replaced, none is visible half-written; what a handler has not finished is neither
     deleted nor moved (`after_error` acts at quarantine).
  3. Each version of a file, a size and a time as exact as the server tells it, is handled once, with its own content.
     Again only after a failure, or if the member died, was stopped in its midst, or lost its lease or its database
     between the claim and the committed `done`; then `attempt` is greater than 1.
  4. An active member whose process is dead or stopped is replaced within `liveness_check_interval`, one that is
     stopped gracefully within a heartbeat and a round trip after its last handler (and within S, if the file server
     left a change without its reply).
  5. A standby opens no connection to the file server.
  6. While the database is away nothing is polled; work goes on by itself when it is back.

How: a lease is a term, won by compare-and-set and ended by a clock. Each renewal and each write to the ledger proves
the term in the database; each effect looks at the lease's deadline first.

Timing (H heartbeat_frequency, L liveness_check_interval)
    stale after     S = L - 2H            a second less on a column of whole seconds; by the database's clock
    margin          m = 0.2 s + S/10      clock rates may differ by so much; time to cut a transfer
    lease           valid until sent + S - m, where `sent` was read before the statement left
    database call   T <= 5 s              H + 2T + m <= S, so that two failed renewals still leave time for a third

Not guaranteed, because no program of this kind can
  - A pause between the last look at the lease and the packet leaving, one call wide: `move` and `delete` look at the
    file again, and handlers get the term so that a receiver can refuse an older one.
  - A database that loses commits (asynchronous failover, a restored backup, both tables emptied): terms may repeat.
    Use synchronous replication.
  - A hypervisor that stops the guest's clocks during a pause. Handlers should be idempotent in (path, size, mtime).
  - A database clock that is put forward while the active member is cut off from it and a process starts: it cannot
    have seen the step; members that do wait.
  - An upload that stalls longer than `settle`. Let uploaders rename, or use `requires`.
  - A new version uploaded between the last look and the delete; one of equal size and equal (shown) time. Where LIST
    alone tells times these are minutes, and kept files may come again when its display moves (zone, summer time).
  - A move target that another client makes between look and rename: a round trip, or ten seconds where an FTP server's
    "not there" cannot be told from its other refusals.
  - A lost lease told from a death: for another process both leave a claim, and from the third on each counts.
  - A command that outlives its stopped (SIGSTOP) parent, until the parent runs again or dies; and children of a
    command that left its process group (setsid) or run as another user (sudo): only a cgroup ends them.
  - What a proxy or the file server had already taken when the connection was reset.
  - With `ledger = off`: promise 3, attempts and quarantine.
"""

from __future__ import annotations

import abc
import argparse
import atexit
import base64
import binascii
import bisect
import codecs
import configparser
import contextlib
import copy
import csv
import dataclasses
import datetime
import enum
import errno
import fnmatch
import ftplib
import functools
import gc
import hashlib
import hmac
import importlib
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import os
import posixpath
import queue
import random
import re
import select
import selectors
import shlex
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import urllib.parse
from collections import Counter, deque
from operator import attrgetter
from pathlib import Path
from types import FrameType
from typing import (
    IO,
    TYPE_CHECKING,
    Any,
    Callable,
    ClassVar,
    Collection,
    Dict,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    NamedTuple,
    Optional,
    Protocol,
    Sequence,
    Set,
    TextIO,
    TypeVar,
    Union,
    cast,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

__version__ = "1.0.0"
__all__ = [
    "Config",
    "ConfigError",
    "Coordinator",
    "Error",
    "File",
    "Lease",
    "LeaseLost",
    "Listener",
    "Timing",
    "TryLater",
]

# I.1 to I.9, in order, keep the promises. They rely on the rest, which is looked up, for what interfaces say (I.10, and
# in II the tongues of databases and file servers), and on Pulse and Listener in III for being called.


# ---------------------------------------------------------------------------------------------------------------------
# I.1 Errors: what was wrong, where, and what to do
# ---------------------------------------------------------------------------------------------------------------------


class Error(Exception):
    """Every error that ftpcoord raises on purpose."""


class ConfigError(Error):
    """A setting or a usage is wrong; nothing was connected yet. Exit code 2."""


class DatabaseDown(Error):
    """The database did not answer, or not in time. Retried for ever by `run`."""


class DatabaseBusy(DatabaseDown):
    """The database answered that a lock or a conflict stood in the way; the connection is still good."""


class RowRefused(DatabaseBusy):
    """A value or a constraint stands in the way, and will the next time: in the ledger the row's own fault."""


class DatabaseRefused(Error):
    """Login, privileges, tables or a driver are missing. Ends `run` at start; retried once it has been ready."""


class ServerDown(Error):
    """The file server cannot be reached or broke off. Retried for ever by `run`."""


class LoginRefused(ServerDown):
    """The file server refused the login. Retried slowly, so as not to lock the account."""


class FileGone(Error):
    """The file or folder is not there."""


class FileRefused(Error):
    """The server refuses this file or name; the connection is still good."""


class NotNow(Error):
    """The file cannot be had at the moment: in use, or replaced since it was listed. Not counted as its failure,
    unless its handler says so again and again while others succeed."""


class FileChanged(NotNow):
    """The file is not the version that was listed."""


class TryLater(NotNow):
    """A Python handler raises it to say "not now": the system behind it is away, the file is not at fault.

    `seconds` until it is worth another try; None leaves that to `retry_delay`, doubled each time.
    """

    def __init__(self, seconds: Optional[float] = None, why: str = "") -> None:
        super().__init__(why or "the handler said: not now")
        self.seconds = None if seconds is None else min(MOST_PAUSE, max(0.0, float(seconds)))


class TargetExists(Error):
    """Something stands under the target's name; it was not replaced."""


class LeaseLost(Error):
    """The lease ran out, went to another member or is to be given up: nothing more may be begun."""

    def __init__(self, term: int) -> None:
        super().__init__(f"the lease of term {term} is over")
        self.term = term


class HandlerFailed(Error):
    """A command or a Python handler did not succeed with a file."""


class LocalTrouble(Error):
    """This host, not the file, is the reason: a full disk, a missing command. Not counted as the file's failure."""


# ---------------------------------------------------------------------------------------------------------------------
# I.2 Timing, lease, clock
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Timing:
    """The group's intervals and what follows from them, all in seconds. Raises ConfigError if L < 5H or
    H + 2T + m > S."""

    heartbeat: float
    liveness: float
    least_timeout: float = 0.1  # the shortest call that the dialect can bound
    whole_seconds: bool = False  # the heartbeat column keeps no fractions

    def __post_init__(self) -> None:
        check_timing(self)

    @property
    def stale_after(self) -> float:
        """S: a heartbeat older than this, by the database's clock, is a dead member's."""
        return round(self.liveness - 2 * self.heartbeat - (1 if self.whole_seconds else 0), 6)

    @property
    def margin(self) -> float:
        """m: what the active member leaves unused of S, for differing clock rates and the cut of transfers."""
        return 0.2 + self.stale_after / 10

    @property
    def grace(self) -> float:
        """How long after the deadline nobody else can be active, even if the own clock goes slower by 10 %."""
        return self.stale_after / 1.1 - (self.stale_after - self.margin)

    @property
    def still_after(self) -> float:
        """A heartbeat that has not moved for so long, by the observer's own clock, is a dead member's. Whole seconds
        hide moves within one, and within another one if the clock is set back."""
        return self.stale_after + (2 if self.whole_seconds else 0)

    @property
    def call_timeout(self) -> float:
        """T: the longest that one database call may take."""
        return min(5.0, max(self.least_timeout, (self.stale_after - self.margin - self.heartbeat) / 3))

    @property
    def lock_timeout(self) -> float:
        """K: how long the server lets a statement wait for a row; it gives up before the client does."""
        return min(1.0, self.call_timeout / 2)


class Lease:
    """The right to act, for one term: a comparison of times by the member's own clock. `file.lease` of handlers."""

    def __init__(self, term: int, deadline: float, clock: Callable[[], float]) -> None:
        self.term = term
        self._stopped = False
        self._deadline, self._latest = deadline, float("inf")
        self._clock = clock

    def valid(self, now: Optional[float] = None) -> bool:
        """Whether effects are allowed at this instant."""
        return self.remaining(now) > 0 and not self._stopped

    def remaining(self, now: Optional[float] = None) -> float:
        """Seconds until the deadline."""
        return min(self._deadline, self._latest) - (self._clock() if now is None else now)

    def check(self) -> None:
        """Raises LeaseLost unless valid."""
        if not self.valid():
            raise LeaseLost(self.term)

    def extend(self, deadline: float) -> None:
        """A renewal succeeded. A lease that has run out stays over: its work was cut."""
        if self.remaining() > 0:
            self._deadline = max(self._deadline, deadline)

    def stop(self) -> None:
        """No longer valid for its work, although the member still holds it."""
        self._stopped = True

    def lose(self, since: float = float("-inf")) -> None:
        """Over for good, whatever a renewal that is under way may say."""
        self._latest = min(self._latest, since)

    def __repr__(self) -> str:
        return f"Lease(term={self.term})"


def boot_clock() -> float:
    """Seconds since boot, counting suspended time where the system can: CLOCK_MONOTONIC does not, and on macOS
    CLOCK_MONOTONIC_RAW does (mach_continuous_time)."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    if sys.platform == "darwin" and hasattr(time, "CLOCK_MONOTONIC_RAW"):
        return time.clock_gettime(time.CLOCK_MONOTONIC_RAW)
    return time.monotonic()


# ---------------------------------------------------------------------------------------------------------------------
# I.3 What is stored: records, rules, and the verbs of a store
# ---------------------------------------------------------------------------------------------------------------------

#
#   token_holder   a row for each group: which member holds its lease, under which term; never deleted
#   health_check   a row for each member of a group: its last heartbeat; operators' requests under reserved ids
#   file_ledger    a row for each path of a group: which version of the file, and how far its handling has come
#
# Rules for every database, each with its reason:
#   - Who renews, releases or takes a lease locks the token row, then the holder's health row, and tests what it has
#     locked: else a renewal and a takeover could both succeed.
#   - One message is one transaction: a member stopped between two would hold its locks, and with them the group, as
#     one stopped inside a transaction of SQLite does.
#   - Times are UTC and the database's own; a stamp is never older than the moment in which its statement was sent.
#   - A renewal always moves the stamp, also when the clock was set back: one that stands still is a dead one.
#   - A released lease is known by its exact stamp, not by an age: clocks are set by years. A stamp of NULL has no age
#     and does not move.
#   - Who writes to the ledger locks the token and proves its term, and changes a row only if it is the one that was
#     read (size, mtime, state, term, attempts, whether an action is due): what comes late, or for another version,
#     changes nothing.
#   - A row of the ledger written in the future (the clock was set back) is due at once.


class View(NamedTuple):
    """What a standby sees in one look."""

    holder: Optional[str]  # None: the group has no token row
    term: int
    mine: bool  # the holder's id is the observer's own, as the database compares ids
    stamp: Optional[str]  # the holder's last_heartbeat as text, "" for NULL; None: it has no health row
    age: Optional[float]  # seconds, by the database's clock
    now: float  # the database's clock, epoch seconds
    took: float  # seconds from sending to receiving, by the observer's clock
    released: bool = False


class Renewal(NamedTuple):
    """What the active member learns in one heartbeat."""

    held: bool
    step_down: bool = False  # an operator asked it to hand over


class MemberRow(NamedTuple):
    """A member's health row."""

    member_id: str
    age: float  # a hundred years where the heartbeat is NULL
    released: bool
    stamp: str = ""  # last_heartbeat as text, "" for NULL


class Fence(NamedTuple):
    """Who writes to the ledger, under which term."""

    group: str
    member: str
    term: int


class Marks(NamedTuple):
    """What else is known of a version; the ledger keeps it before the words of `error`."""

    unlisted: bool = False  # failed or claimed, and dropped at next_attempt_at unless it is listed again
    gone: bool = False  # the server had no such file at the fetch: dropped when a whole listing lacks it, too
    delivered: bool = False  # this version has its name in download_dir already
    deaths: int = 0  # how often the process ended while this version was in work
    later: str = ""  # since when its handler says "not now"


class Row(NamedTuple):
    """One file's row in the ledger."""

    path: str
    size: int
    mtime: str
    state: str
    term: int
    attempts: int
    failures: int
    action: str = ""  # the after-action still due
    # next_attempt_at, in seconds from the reading; in a ledger's memory as a moment of its clock. Until then a failed
    # row or action pauses, and a row that is no longer listed is kept.
    due: Optional[float] = None
    error: str = ""
    marks: Marks = Marks()

    def marked(self, **changes: Any) -> Row:
        return self._replace(marks=self.marks._replace(**changes))

    def waits(self, now: float) -> float:
        """The seconds until it is due."""
        return 0.0 if self.due is None else max(0.0, self.due - now)

    @property
    def open(self) -> bool:
        return self.state != "done" or self.action != ""

    @property
    def unlisted(self) -> bool:
        """Whether a whole listing lacked it, so that next_attempt_at is when it may be dropped."""
        return self.marks.unlisted if self.state in ("failed", "claimed") else self.due is not None and not self.action


class Outcome(NamedTuple):
    """What became of an attempt: a row of the audit trail, there exactly if the change is."""

    what: str
    sha256: str = ""  # of the content, where it was fetched
    seconds: Optional[float] = None  # since the claim
    words: str = ""


class Change(NamedTuple):
    """One step of a row, from `old` to `new` (None: there is none), due in `delay` seconds."""

    old: Optional[Row]
    new: Optional[Row]
    delay: Optional[float] = None
    plain: int = 0  # texts are stored 0 as they are, 1 in ASCII, 2 in ASCII and the error shortened
    outcome: Optional[Outcome] = None

    @property
    def path(self) -> str:
        return (self.new or self.old).path  # type: ignore[union-attr]


class Store(Protocol):
    """What the election asks of a database. After an error nothing is known."""

    def look(self, group: str, member: str) -> View:
        """Writes the member's heartbeat, unless its id is the holder's, and shows the holder."""

    def first(self, group: str, member: str, term: int, timed: bool) -> Optional[int]:
        """Takes the token of a group that has none, and beats; the term won, or None. `timed`: one that is above
        the database's time in seconds, too."""

    def take(self, group: str, member: str, seen: View, stale_after: float, why: str) -> Optional[int]:
        """Takes the token under the next term, and beats, if holder and term are those `seen`; the term won, or None.

        `why` is what else must hold then: "still" or "released" (the stamp is the one seen), "stale" (and older than
        `stale_after` seconds), "absent" (no health row), "own" (nothing: the member itself won that term).
        """

    def renew(self, group: str, member: str, term: int) -> Renewal:
        """Moves the member's heartbeat, if it holds the token under this term and has a health row."""

    def release(self, group: str, member: str, term: int) -> None:
        """Makes that heartbeat a released one, under the same condition."""

    def leave(self, group: str, member: str) -> None:
        """Removes the member's health row, if another id holds the token: without one it is a trace."""

    def sweep(self, group: str, member: str) -> None:
        """Removes health rows older than a day but its own, the holder's and pauses: ids of pods change."""

    def last_term(self, group: str) -> int:
        """The highest term that the ledger knows, 0 without one."""

    def members(self, group: str) -> list[MemberRow]:
        """The group's health rows; those under reserved ids are none."""


class Rows(Protocol):
    """What the ledger asks of a database. A row is open unless it is done and no after-action is due."""

    def rows(self, group: str, only_open: bool = False) -> Iterator[Row]:
        """All rows of the group, or the open ones."""

    def done_count(self, group: str) -> int:
        """How many are not open."""

    def write(self, fence: Fence, changes: Sequence[Change]) -> list[bool]:
        """Makes each change whose old row still stands, if the fence holds; tells which were made."""

    def written(self, fence: Fence, changes: Sequence[Change]) -> list[bool]:
        """Which changes stand in the table. Only one process writes under a term: what stands is what it wrote."""


# ---------------------------------------------------------------------------------------------------------------------
# I.4 Election: a state machine over a Store; it knows no threads, sockets or clocks
# ---------------------------------------------------------------------------------------------------------------------


class ClockWatch:
    """Whether the database's clock goes on as the member's own does, so that ages can be trusted.

    Each look brackets the difference of the two. Looks that allow a step of more than `tolerance` seconds make ages
    worthless for `distrust` seconds: as long as a lease given before the step can last. So do looks more than
    `longest_gap` seconds apart: two steps in between cancel each other out, but stamps of the time between are old.
    A step just before the first look shows in no difference: `at_first` seconds let a living holder renew its stamp.
    """

    def __init__(
        self, tolerance: float, distrust: float, longest_gap: float = float("inf"), at_first: float = 0.0
    ) -> None:
        self.tolerance, self.distrust = tolerance, distrust
        self.longest_gap, self.at_first = longest_gap, at_first
        self._last: Optional[tuple[float, float, float]] = None  # the last bracket, and when that look was received
        self._trusted_from = float("-inf")

    def trusts(self, sent: float, view: View) -> bool:
        received = sent + view.took
        low, high = view.now - received, view.now - sent
        last, self._last = self._last, (low, high, received)
        if last is None:
            self._trusted_from = received + self.at_first
            return False  # one look proves nothing
        largest_step, gap = max(high - last[0], last[1] - low), received - last[2]
        if largest_step > self.tolerance or gap > self.longest_gap:
            self._trusted_from = received + self.distrust
        return received >= self._trusted_from


#
#                 look: held by another              renew: not held, or the deadline passed
#               +------------------------+         +-----------------------------------------+
#               v                        |         v                                         |
#           STANDBY --- take or first succeeds: lease until sent + S - m ---> ACTIVE --------+
#               ^                                                               |
#               +------- release (after the work has stopped) ------------------+


class Election:
    """One member of one group. Call `tick(now)` when it is due; `lease` is what it has won.

    `now` is the member's own clock in seconds, read before the call. `willing=False`: work of an earlier lease is still
    running. `tell` hears events.
    """

    def __init__(
        self,
        store: Store,
        group: str,
        member: str,
        timing: Timing,
        clock: Callable[[], float],
        tell: Callable[..., None],
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.store, self.group, self.member, self.timing = store, group, member, timing
        self.lease: Optional[Lease] = None
        self.view: Optional[View] = None  # the last look, for status
        self.step_down_asked = False
        self.database_error: Optional[DatabaseDown] = None
        self._clock, self._tell, self._chance = clock, tell, chance
        renewed = timing.heartbeat + timing.call_timeout  # so soon if the holder reaches the database
        self._round = timing.heartbeat + renewed  # in which every member that reaches it has looked or renewed
        self._watch = ClockWatch(timing.margin / 2, timing.stale_after, self._round, renewed)
        # Terms: the last one that this process itself won and did not release, the last under its id that needs no
        # warning, the highest seen.
        self._own_term: Optional[int] = None
        self._explained_term = self._seen_term = 0
        # What looks prove: since when the holder looks the same, whether long enough for a dead one; that ages count.
        self._still: tuple[object, float] = (None, 0.0)
        self._stood_still = self._trusted = False
        # Traces of a lease without a token: health rows as they were before the own first beat, and when that was; as
        # they were when the token was first seen missing.
        self._at_start: Optional[dict[str, MemberRow]] = None
        self._started = 0.0
        self._at_loss: Optional[dict[str, MemberRow]] = None
        # Times: before the first, others go first; when the database last answered, and was swept.
        self._stand_from = self._answered = self._swept = float("-inf")

    def tick(self, now: float, willing: bool = True) -> float:
        """Renews, or looks and perhaps takes over; gives the seconds until the next tick. Raises DatabaseRefused."""
        # 1. A lease whose deadline has passed is over, whatever the database would say.
        if self.lease is not None and self.lease.remaining(now) <= 0:
            self.lose("deadline passed")
        try:
            return self._renew(self.lease, now) if self.lease is not None else self._stand_by(now, willing)
        except DatabaseDown as exc:
            return self.failed(exc, now, self.timing.heartbeat)

    def failed(self, exc: DatabaseDown, now: float, longest: float) -> float:
        """The database could not be used; gives the seconds until the next try, at most `longest`."""
        self.database_error = exc
        # 2. What is unknown extends no deadline. Half of the rest goes by before the next try: a last one still fits.
        return longest if self.lease is None else min(longest, max(0.02, self.lease.remaining(now) / 2))

    def _database_answers(self, now: float) -> None:
        failed, self.database_error = self.database_error, None
        if self.lease is None and now - self._answered > self._round:
            self._at_loss = None  # unseen, the token may have been won and removed again
            if failed is not None:  # after an outage every heartbeat is stale: the former holder comes first
                self._stand_from = max(self._stand_from, now + self._round)
        self._answered = now

    # -- active -------------------------------------------------------------------------------------------------------

    def _renew(self, lease: Lease, now: float) -> float:
        # 1. One statement: it holds only if token and term are still ours.
        renewal = self.store.renew(self.group, self.member, lease.term)
        self._database_answers(now)
        # 2. Not held: another one has it, or somebody removed a row. No effect from here on.
        if not renewal.held:
            self.lose("the token went to another member")
            return self.timing.heartbeat
        # 3. Held: the lease counts from before the statement was sent.
        lease.extend(now + self.timing.stale_after - self.timing.margin)
        if lease.remaining() <= 0:  # it ran out before the answer came: the next tick wins a new one
            self.lose("deadline passed")
            return 0.0
        self.step_down_asked = renewal.step_down
        if now - self._swept > 3600:
            self._swept = now
            self.store.sweep(self.group, self.member)
        return self.timing.heartbeat

    def lose(self, why: str) -> None:
        """Ends the lease, if there is one; the others wait until it is stale, as its work may still run."""
        lease, self.lease, self.step_down_asked = self.lease, None, False
        if lease is not None:
            lease.lose()
            self._tell("lost", term=lease.term, reason=why)

    def release(self, now: float) -> None:
        """Gives the lease up, if there is one, after the work has stopped; others go first for two heartbeats."""
        lease, self.lease, self.step_down_asked = self.lease, None, False
        self._own_term = None  # also if its work hung, and it was lost
        self._stand_from = now + 2 * self.timing.heartbeat
        if lease is None:
            return
        tries = 2 if lease.remaining(now) > 0 else 0
        lease.lose()
        for _ in range(tries):
            try:
                self.store.release(self.group, self.member, lease.term)
                self.database_error = None
                self._tell("released", term=lease.term)
                return
            except DatabaseDown as exc:
                self.database_error = exc
        self._tell("lost", term=lease.term, reason="it could not be released; the others wait until it is stale")

    def stop(self) -> None:
        """Removes this member's health row, if it is a standby's."""
        with contextlib.suppress(DatabaseDown, DatabaseRefused):
            self.store.leave(self.group, self.member)

    # -- standby ------------------------------------------------------------------------------------------------------

    def _stand_by(self, now: float, willing: bool) -> float:
        # 1. Beat and look. What stood there before the first beat tells of earlier lives.
        if self._at_start is None:
            self._at_start, self._started = self._members(), now
        view = self.store.look(self.group, self.member)
        # From `now` on, not from when the store began: the process may have been stopped in between.
        view = self.view = view._replace(took=max(view.took, self._clock() - now))
        self._database_answers(now)
        self._seen_term = max(self._seen_term, view.term)
        if view.mine and view.term not in (self._own_term, self._explained_term):
            self._explained_term = view.term  # that this process did not win: no heartbeat is written for it
            if not view.released:
                self._tell("duplicate_member", term=view.term, hint="duplicate member id or previous run; waiting")
        # 2. Decide whether the lease is free, also while it is not wanted: the clocks are watched.
        why = self._free(now, view)
        # 3. Take it: only one member's statement finds the rows as they were seen.
        term = None
        if why == "vacant" and willing:
            term = self._first(view)
        elif why is not None and willing:
            term = self.store.take(self.group, self.member, view, self.timing.stale_after, why)
        if term is None:
            # 4. A little early, so that members do not march in step.
            return self.timing.heartbeat * (1 - 0.1 * self._chance())
        self._own_term = self._explained_term = self._seen_term = term
        # 5. The lease counts from before the look was sent; the heartbeat was written after that.
        self.lease = Lease(term, now + self.timing.stale_after - self.timing.margin, self._clock)
        self._tell("elected", term=term, reason=why, before=view.holder)
        return self.timing.heartbeat

    def _free(self, now: float, view: View) -> Optional[str]:
        """Why the lease may be taken, or None."""
        received = now + view.took
        self._trusted = self._watch.trusts(now, view)
        picture = (view.holder, view.term, view.stamp)
        if picture != self._still[0] or (view.holder is None and self._at_loss is None):
            self._still = (picture, received)
        self._stood_still = now - self._still[1] >= self.timing.still_after
        if view.holder is not None:
            self._at_loss = None
        if view.mine and view.term == self._own_term:
            return "own"  # nobody else ever held the term that this process won
        if received < self._stand_from:
            return None
        if view.holder is None:
            return "vacant"
        if view.released:
            return "released"
        if view.age is not None and self._trusted and view.age > self.timing.stale_after:
            return "stale"
        if self._stood_still:
            return "absent" if view.stamp is None else "still"
        return None

    def _members(self) -> dict[str, MemberRow]:
        return {row.member_id: row for row in self.store.members(self.group)}

    def _first(self, view: View) -> Optional[int]:
        """Claims a group without token row: it never had one, or lost it with a lease still running."""
        rows, at_start = self._members(), self._at_start or {}
        at_loss = self._at_loss = self._at_loss or rows

        def may_hold(member: str) -> bool:
            """Whether a member may still hold the lease that left no token."""
            own = member == self.member
            row = at_start.get(member, rows.get(member)) if own else rows.get(member)  # not as this process made it
            if row is None or row.stamp == "":
                return True
            if not own and member not in at_start and row.stamp != at_loss[member].stamp:
                return False  # it came after this process, and beats without a token: a standby
            stale = not own and self._trusted and row.age > self.timing.stale_after  # see ClockWatch
            return not row.released and not stale

        # 1. Traces of a lease: a term seen, a health row; not the own first beat, unless another process of this id can
        #    have been elected since.
        traces = at_start.keys() | at_loss.keys()
        if self.member not in at_start and self._clock() - self._started <= self._round:
            traces.discard(self.member)
        held = self._seen_term > 0 or any(map(may_hold, traces))
        if held and not self._stood_still:
            return None
        # 2. Above every term that was ever won: where the last ones left no number, time has gone by at least as fast.
        last = max(self._seen_term, self.store.last_term(self.group))
        timed = bool(last or traces)
        if timed:  # stamps may be ahead of it, and that of the look be long past
            ages = [0.0, *(row.age for row in (*rows.values(), *at_start.values()))]
            last = max(last, int(view.now - min(ages)))
        return self.store.first(self.group, self.member, last + 1, timed)


# ---------------------------------------------------------------------------------------------------------------------
# I.5 Member: an election, the guard of its deadline, and what is wanted of it
# ---------------------------------------------------------------------------------------------------------------------


#
#   state        what comes                                      what is done, and the next state
#   standing by  a lease, and nobody wants an end                the work takes it: working
#                stop                                            release, out of the group: stopped
#   working      stop, hand over                                 no new work: winding up
#                the lease ends, or no progress                  cut: winding up
#   winding up   the work has ended                              standing by; first release, if it is handed over
#                it made no progress, and drain_timeout is over  lost: winding up; another one takes it once stale
#
# Other threads only ask. The heartbeat's thread does all that touches the election; the guard's, which no call that
# hangs can hold up, cuts.


class State(enum.Enum):
    STANDING_BY = "standing by"
    WORKING = "working"
    WINDING_UP = "winding up"
    STOPPED = "stopped"


class Wanted(NamedTuple):
    """What is asked of a member."""

    stop: bool = False
    release: bool = True  # at the stop; else the others wait until the lease is stale
    hand_over: str = ""  # why
    another: str = ""  # why to hand over if another member is alive
    lost_at: float = float("inf")  # when work that hangs makes it lose the lease, if it has not ended by then


class Member:
    """One member of one group.

    Work goes: `lease = wait_for_lease()`, effects while `lease.valid()`, then `work_ended()`. Functions in
    `on_hand_over` are called when it is to end; those in `on_lost` cut it at the end of the lease.
    """

    def __init__(self, config: Config, watched: bool = True) -> None:
        self.config = config
        self.stats = Stats(config.member_id)
        self.timing: Timing  # from the start on
        self.election: Optional[Election] = None
        self.pulse: Optional[Pulse] = None
        self.next_beat = 0.0  # the next heartbeat, by boot_clock; 0: at once
        self.work: Optional[Lease] = None  # whose work is running, also after its end
        self.terms: set[int] = set()  # that this process has held
        self.wanted = Wanted()
        self.outage = Outage(config)
        self.progress = Progress(config.stall_timeout if watched else float("inf"), config.exec_timeout)
        self.unanswered = float("-inf")  # when the work sent the file server a command whose reply never came
        self.ready = threading.Event()  # the tables were found good
        self.finished = threading.Event()
        self.failure: Optional[Error] = None  # why it could not start
        self.on_lost: list[Callable[[], None]] = []
        self.on_hand_over: list[Callable[[], None]] = []
        self._changed = threading.Condition()

    @property
    def lease(self) -> Optional[Lease]:
        return self.election.lease if self.election else None

    @property
    def state(self) -> State:
        """Worked out, as a lease ends by the clock alone."""
        if self.finished.is_set():
            return State.STOPPED
        work = self.work
        if work is None:
            return State.STANDING_BY
        return State.WORKING if self.may_work(work) else State.WINDING_UP

    @property
    def stopping(self) -> bool:
        return self.wanted.stop

    # -- the work's side ----------------------------------------------------------------------------------------------

    def start(self, pulse: Optional[Pulse] = None) -> None:
        """On a connection of others, or on one of its own."""
        if self.pulse is not None:
            raise Error(f"{self.config.coordination_group}: was started before; each run needs a new one")
        threading.Thread(target=self._guard, name="ftpcoord-guard", daemon=True).start()
        (pulse or Pulse(open_database(self.config))).add(self)

    def wait_for_lease(self, timeout: float = float("inf")) -> Optional[Lease]:
        """None if this member stops first, or after `timeout` seconds. Raises what kept it from starting."""

        def come() -> object:
            lease = self.lease
            if lease is not None and self.may_work(lease):
                self.progress.begin()
                self.terms.add(lease.term)
                self.work = lease
                self._changed.notify_all()  # the guard, too
                return lease
            return self.failure or self.stopping or self.finished.is_set()

        found = self._wait(come, timeout)
        if self.failure is not None:
            raise self.failure
        return found if isinstance(found, Lease) else None

    def may_work(self, lease: Lease) -> bool:
        """Whether new work may begin."""
        return lease.valid() and not self.wanted.stop and not self.wanted.hand_over

    def wait(self, lease: Lease, seconds: float, wake: Callable[[], object] = bool) -> bool:
        """Waits until `wake` says so, or the time is over; False if by then no new work may begin."""
        self._wait(lambda: not self.may_work(lease) or wake(), seconds)
        return self.may_work(lease)

    def work_ended(self) -> None:
        """Nothing of the last lease is running any more."""
        self.ledger_trouble("")
        with self._changed:
            self.work = None
        self.ask(lost_at=float("inf"))

    def hand_over(self, why: str, hangs: bool = False) -> None:
        """Lets the work end, and then gives the lease up. Work that hangs has `drain_timeout` to end."""
        lease, lost_at = self.lease, boot_clock() + self.config.drain_timeout
        if lease is not None and hangs and lost_at < self.wanted.lost_at:
            self.ask(lost_at=lost_at)
        if lease is not None and not self.wanted.hand_over:
            event("handing_over", group=self.config.coordination_group, term=lease.term, reason=why)
            self.ask(hand_over=why)

    def hand_over_to_another(self, why: str) -> bool:
        """Hands over if another member is alive, as the next heartbeat finds; whether it does."""
        self.ask(another=why)
        self._wait(lambda: not self.wanted.another, self.timing.heartbeat + 2 * self.timing.call_timeout)
        self.note(another="")
        return bool(self.wanted.hand_over)

    def stop(self, release: bool = True) -> None:
        """Leaves the group once the work has ended."""
        self.ask(stop=True, release=release and self.wanted.release)

    def ask(self, **wishes: Any) -> None:
        """Notes what is wanted, for the heartbeat's thread; tells the work if it is to end."""
        self.note(**wishes)
        for function in list(self.on_hand_over) if self.wanted.stop or self.wanted.hand_over else ():
            function()
        with self._changed:
            at_once = self.work is None or self.wanted.another  # else the end of the work comes first
            self.next_beat = 0.0 if at_once else min(self.next_beat, self.wanted.lost_at)
        if self.pulse is not None:
            self.pulse.wake()

    def note(self, **wishes: Any) -> None:
        """Lets `wait` look again, too."""
        with self._changed:
            self.wanted = self.wanted._replace(**wishes)
            self._changed.notify_all()

    def _wait(self, come: Callable[[], object], seconds: float) -> object:
        """Waits until `come` gives something, at most so long; looks each second: leases end by the clock alone."""
        until = boot_clock() + seconds
        with self._changed:
            while True:
                found, left = come(), until - boot_clock()
                if found or left <= 0:
                    return found
                self._changed.wait(min(left, 1.0))

    # -- the heartbeat's thread ---------------------------------------------------------------------------------------

    def beat(self, database: Database) -> bool:
        """One heartbeat; called by the pulse alone. False: this member has stopped."""
        now = boot_clock()
        with self._changed:
            late, self.next_beat = now - (self.next_beat or now), now  # who asks from here on has another one follow
        try:
            wait = self._beat(database)
        except Exception as exc:
            if isinstance(exc, (ConfigError, DatabaseRefused)) and not self.ready.is_set():
                self.failure, wait = exc, None  # it cannot even start
            else:
                wait = self.outage.pause(exc)
                if not isinstance(exc, Error):
                    database.close()  # a fault of ours must not look like health: the lease runs out
                elif self.election is not None:
                    wait = self.election.failed(DatabaseDown(str(exc)), boot_clock(), wait)
        self.stats.heartbeat(boot_clock() - now, late, bool(self.outage.of("heartbeat")))
        with self._changed:
            if self.next_beat and wait is not None:
                self.next_beat = min(now + wait, self.wanted.lost_at)
            self._changed.notify_all()
        return wait is not None

    def _beat(self, database: Database) -> Optional[float]:
        """The seconds until the next one; None: this member has stopped."""
        wanted, state = self.wanted, self.state  # in this order: what is asked from here on waits
        # 1. The first one joins the group.
        if self.election is None:
            if wanted.stop:
                return None
            self.timing = database.prepare()
            database.settle_group(self.config)
            group, member = self.config.coordination_group, self.config.member_id
            tell = functools.partial(self.stats.tell_role, group, member)
            self.election = Election(database, group, member, self.timing, boot_clock, tell)
        election, now = self.election, boot_clock()
        election.store = database  # its members may have been divided
        # 2. The work has ended, and the lease is to be given up. The file server may still obey a command of it, and
        #    delete what the next member finds: a hand-over waits, a stop lets the others wait.
        uncertain = now - self.unanswered < self.timing.stale_after
        if state is State.STANDING_BY and (wanted.stop or (wanted.hand_over and not uncertain)):
            if uncertain:
                election.lose("a command to the file server was left without its reply")
            elif wanted.release:
                election.release(now)
            self.note(hand_over="", another="", lost_at=float("inf"))
            if wanted.stop and wanted.release:
                election.stop()
            self.outage.heartbeat(election.database_error)
            return None if wanted.stop else 0.0
        # 3. The work hangs.
        if now >= wanted.lost_at:
            if state is State.WINDING_UP:
                election.lose("the work hangs and does not end")
            self.note(lost_at=float("inf"))
        # 4. Renew, or look and perhaps take over.
        wait = election.tick(now, willing=state is State.STANDING_BY and not wanted.stop)
        self.outage.heartbeat(election.database_error)
        if election.database_error is None:
            self._answered(election, database)
        return wait

    def _answered(self, election: Election, database: Database) -> None:
        if not self.ready.is_set():
            database.check_ids(election.group, election.member)
            self.ready.set()
            event("ready", group=election.group, member=election.member)
        if election.lease is None and election.view is not None:
            self.stats.looked(election.view, self.timing.stale_after, election.group)
        if election.step_down_asked:
            self.hand_over("an operator asked for it")
        why, hangs = self.wanted.another, self.progress.handler_overdue(boot_clock()) > 0
        if hangs:  # alone it is better to go on with the other workers
            why = f"a handler is over its time, and no end of it, for stall_timeout, {self.config.stall_timeout:g} s"
        if why and election.lease is not None:
            ages = [row.age for row in database.members(election.group) if row.member_id != election.member]
            if min(ages, default=float("inf")) <= self.timing.stale_after:
                self.hand_over(why, hangs)
            self.note(another="")

    def ledger_trouble(self, error: str) -> None:
        """A locked table costs no lease: no other member could do better."""
        if error:
            self.progress.tell()  # waiting for the database is no hang
        self.outage.note("ledger", error)

    # -- the guard's thread -------------------------------------------------------------------------------------------

    def _guard(self) -> None:
        cut: Optional[Lease] = None
        while not self.finished.is_set():
            with self._changed:
                lease, now = self.work, boot_clock()
                if lease is None or lease is cut:
                    self._changed.wait(1.0)
                    continue
                left, stalled = lease.remaining(now), self.progress.overdue(now) > 0
                if left > 0 and not stalled:
                    self._changed.wait(min(left, 1.0))
                    continue
                cut, functions = lease, list(self.on_lost)  # its own: the next lease's work may begin at any time
            if left > 0:
                why = f"no progress for stall_timeout, {self.config.stall_timeout:g} s"
                functions.insert(0, functools.partial(self.hand_over, why, hangs=True))
            else:
                lease.lose(now + left)  # a renewal that is answered just now comes too late
            for function in functions:
                try:
                    function()
                except Exception as exc:
                    event("guard_failed", logging.ERROR, exc=exc)


# ---------------------------------------------------------------------------------------------------------------------
# I.6 Versions and selection: which of the listed files are to be handled now
# ---------------------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One line of a listing. kind: file, dir, link, other; size: bytes; mtime: ISO text of exactly the precision
    listed, or "":
        2026-01-12T10:15:30[.F]     UTC: SFTP, MLSD, and a LIST that shows its zone
        2026-01-12T10:15            LIST's, in the server's zone; 2026-01-12 if it shows no more
        2026-01-12T10:15:30=        the same with seconds (the sign tells it from UTC)
    `yearless`: the line shows no year, the one in mtime is guessed."""

    name: str
    kind: str
    size: int
    mtime: str
    yearless: bool = False


Shown = Union[Entry, Row]  # what tells two contents of one path apart, by its size and mtime


def same_version(a: Shown, b: Shown, zones: Iterable[datetime.timedelta] = ()) -> Optional[bool]:
    """Whether two looks at a path show one version. None: only its exact time, which has to be asked for, tells.

        sizes that differ       no
        no time and any         yes: the size decides
        exact and exact         yes if equal, a fraction as far as both show it; else no
        line and line           yes if equal, as far as both show it; else ask
        line and exact          yes if the line is that time in UTC or in one of the zones; else ask
        line=exact and line     yes if the lines are equal, or it is that exact time in one of the zones; else ask

    `zones`: what lines of LIST are known to be ahead of UTC. Of two lines that differ UTC itself has to be among them:
    they may be two versions as far apart as the server is from UTC."""
    if a.size != b.size or a.mtime.partition("=")[0] == b.mtime:
        return a.size == b.size
    (line_a, exact_a), (line_b, exact_b) = times_of(a.mtime), times_of(b.mtime)
    if not (line_a or exact_a) or not (line_b or exact_b):
        return True
    if exact_a and exact_b:
        return exact_a[: len(exact_b)] == exact_b[: len(exact_a)]
    if not line_b and exact_b.startswith(line_a):
        return True
    lines = [(line_a, line_b)] if line_a and line_b else []
    if exact_a or exact_b:
        line = line_b if exact_a else line_a
        lines += [(_moved(exact_a or exact_b, zone), line) for zone in (zones if lines else (UTC, *zones))]
    yearless = getattr(a, "yearless", False) or getattr(b, "yearless", False)
    for x, y in lines:
        # Whoever shows the minute may have left out the year, unless both are of that form and do not.
        first = 5 if yearless or (len(x) != len(y) and MINUTE in (len(x), len(y))) else 0
        if x[first : len(y)] == y[first : len(x)]:
            return True
    return None


class Found(NamedTuple):
    """A listed file: `relative` is its path below the polled folder."""

    path: str
    relative: str
    entry: Entry


class Work(NamedTuple):
    """A file to be handled, and the ledger's row that the claim replaces (None: there is none)."""

    found: Found
    old: Optional[Row]

    @property
    def path(self) -> str:
        return self.found.path

    @property
    def known(self) -> Optional[Row]:
        """That row, if it is of this version."""
        return self.old if self.old and same_version(self.old, self.found.entry) else None

    @property
    def attempts(self) -> int:
        return self.known.attempts if self.known else 0

    @property
    def marks(self) -> Marks:
        return self.known.marks._replace(unlisted=False) if self.known and self.attempts else Marks()


class Choice(NamedTuple):
    ready: list[Work]
    unsettled: list[Work]  # perhaps still being written
    waiting: int  # failed files whose back-off has not passed
    young: int = 0  # files not yet of min_age


class Selector:
    """Which listed files are to be handled. Ages are counted from when a file was first seen as it is: LIST tells no
    zone."""

    def __init__(self, config: Config, clock: Callable[[], float]) -> None:
        self.config, self.clock = config, clock
        self.tree, self.companions, self.unsteady = Tree(config), Companions(config), Unsteady(config, clock)
        self.verdicts = Verdicts(config, self.tree.tell)
        self._seen: dict[str, tuple[Entry, float]] = {}

    def choose(
        self,
        listing: Look,
        known: Callable[[str], Optional[Row]],
        busy: Set[str],
        backlog: Callable[[Found, str], object] = lambda found, why: None,
    ) -> Choice:
        """Divides a listing. `known` gives the ledger's row of a path, `busy` are the paths in work."""
        now = self.clock()
        companions = self.companions.see(listing, self.wants, busy)
        seen, self._seen = self._seen, {}
        ready: list[Work] = []
        unsettled: list[Work] = []
        waiting = young = 0
        for found in listing:
            path, entry = found.path, found.entry
            row = known(path)
            known_version = row is not None and bool(same_version(row, entry))
            word, why = "busy", "in work"
            if path not in busy:
                word, why = self.verdict(found, row if known_version else None, companions, now)
            self.verdicts.note(found, row, word, why, backlog)
            waiting += word == "wait"
            if word != "take":
                continue
            before = seen.get(path)
            since = before[1] if before and same_version(before[0], entry) else now
            self._seen[path] = (entry, since)
            if not known_version and now - since < self.config.min_age:
                young += 1
            else:
                settled = known_version or now - since >= self.config.settle
                (ready if settled else unsettled).append(Work(found, row))
        return Choice(in_order(ready, self.config.sort), in_order(unsettled, self.config.sort), waiting, young)

    def verdict(self, found: Found, row: Optional[Row], companions: Mapping[str, Found], now: float) -> tuple[str, str]:
        """Whether a listed file is to be taken, and why not: take, final, skip, hold, warn (and say so), or wait for
        the end of a pause. `row` is the ledger's of this very version."""
        entry = found.entry
        if row is not None and row.state == "done":
            self.unsteady.seen_again(row)
            return "final", "done before"
        if self.companions.include(entry.name):
            return "skip", "a companion of files"
        if not self.wants(found):
            return "final", "its name is not asked for (pattern, exclude, hidden or temporary)"
        for word, why in (self.companions.verdict(found, companions), self.tree.names.limit(entry)):
            if why:
                return word, why
        if row is not None and row.state == "quarantined":
            return "skip", f"quarantined: {error_text(row)}"
        if row is not None and row.state == "failed" and row.waits(now) and not row.unlisted:
            if found.path in self.companions.renewed:
                return "take", ""
            return "wait", f"failed, tried again in {duration(row.waits(now))}: {error_text(row)}"
        pause = self.unsteady.pause(found.path, entry)
        return ("wait", f"{UNSTEADY}: handled again in {duration(pause)}") if pause > 0 else ("take", "")

    def wants(self, found: Found) -> bool:
        return not self.companions.include(found.entry.name) and self.tree.names.want(found.relative)

    def unchanged(self, works: Sequence[Work], listing: Sequence[Found]) -> list[Work]:
        """Those that a second listing, `settle` seconds later, shows unchanged."""
        again = {found.path: found.entry for found in listing}
        kept = []
        for work in works:
            entry = again.get(work.path)
            if entry is not None and same_version(entry, work.found.entry):
                kept.append(work)
            else:
                self._seen.pop(work.path, None)
        return kept


# ---------------------------------------------------------------------------------------------------------------------
# I.7 Ledger: what was done with each version of each file
# ---------------------------------------------------------------------------------------------------------------------


def lost_attempt(row: Optional[Row]) -> Optional[Outcome]:
    """The outcome of an attempt that ended without a word."""
    return Outcome("lost") if row is not None and row.state == "claimed" else None


#
#     (none) --claim--> claimed --handler succeeded--> done [action due] --action succeeded--> (none)
#                          |  ^                          '--- after = keep: stays while the file is listed
#                  failure |  | back-off over
#                          v  |
#                        failed --max_attempts--> quarantined [action due]
#
# A claim of another term is void; so is one of this term that is not in work: its outcome was unknown. What the server
# was not asked for goes back to what it was. A row goes some time after its file.


class Ledger:
    """The rows of one group during one term. For several threads.

    All raises LeaseLost once the lease is over; reading DatabaseDown, too, while writing tries again as long as the
    lease lasts. `trouble` hears why the ledger cannot be used, "" when it can be again.
    """

    def __init__(
        self,
        rows: Rows,
        group: str,
        member: str,
        lease: Lease,
        clock: Callable[[], float],
        trouble: Callable[[str], object] = bool,
    ) -> None:
        self.lease = lease
        self.refused: dict[str, RowRefused] = {}  # why a path's last change was refused in every form
        self._trouble = LedgerTrouble(trouble)
        self._store, self._clock = rows, clock
        self._fence = Fence(group, member, lease.term)
        self._rows: dict[str, Row] = {}
        self._lock = threading.Lock()
        self._outdated = True  # unread, or a write found another row than remembered

    def refresh(self) -> None:
        """Reads all rows, later what an operator may have changed: those that are open, and how many are not."""
        with self._asking(Use.READ):
            if not self._outdated:
                still_open = self._read(only_open=True)
                for path in [path for path, row in self._rows.items() if row.open and path not in still_open]:
                    del self._rows[path]
                self._rows.update(still_open)
                done = self._store.done_count(self._fence.group)
                self._outdated = done != len(self._rows) - len(still_open)
            if self._outdated:
                self._rows, self._outdated = self._read(), False

    def _read(self, only_open: bool = False) -> dict[str, Row]:
        """Rows by path, due by the member's own clock."""
        rows = self._store.rows(self._fence.group, only_open)
        return {row.path: row if row.due is None else row._replace(due=self._clock() + row.due) for row in rows}

    def ask(self, question: Callable[[], bool]) -> bool:
        """On the same connection."""
        with self._asking(Use.OTHER):
            return question()

    def get(self, path: str) -> Optional[Row]:
        return self._rows.get(path)

    def all(self) -> list[Row]:
        with self._lock:
            return list(self._rows.values())

    def claim(self, works: Sequence[Work]) -> list[Optional[Row]]:
        """None for a file whose row somebody changed meanwhile: it waits for the next poll."""
        changes = [Change(work.old, self.claimed(work), outcome=lost_attempt(work.old)) for work in works]
        return [change.new if made else None for change, made in zip(changes, self.write(changes))]

    def claimed(self, work: Work) -> Row:
        entry, failures = work.found.entry, work.known.failures if work.known else 0
        row = work.path, entry.size, entry.mtime, "claimed", self.lease.term, work.attempts + 1, failures
        return Row(*row, marks=work.marks)

    def change(
        self, old: Row, new: Optional[Row], delay: Optional[float] = None, outcome: Optional[Outcome] = None
    ) -> None:
        """One step that only this term may make. Raises RowRefused, and LeaseLost if the row is not this term's."""
        if not self.write([Change(old, new, delay, outcome=outcome)])[0]:
            raise self.refused.get(old.path) or LeaseLost(self.lease.term)

    def write(self, changes: Sequence[Change], unknown: bool = False) -> list[bool]:
        """Which changes were made; tries until there is an answer or the lease is over.

        A try without an answer leaves `unknown` what it made: of what the next one does not make, the rows that stand
        there as wanted are the earlier one's. Where a value is refused each change is tried alone, then in ASCII, then
        with few words; what is refused all the same has its path in `refused`.
        """
        while True:
            began = boot_clock()
            try:
                with self._asking(Use.WRITE, first_try=not unknown):
                    made = self._store.write(self._fence, changes)
                    if unknown and not all(made):
                        made = [a or b for a, b in zip(made, self._store.written(self._fence, changes))]
                    for change, ok in zip(changes, made):
                        if ok:
                            self._remember(change)
                    self._outdated = self._outdated or not all(made)
                return made
            except RowRefused as exc:
                if len(changes) > 1:
                    return [made for change in changes for made in self.write([change], unknown=True)]
                (change,) = changes
                if change.plain < 2:
                    changes = [change._replace(plain=change.plain + 1)]
                else:
                    self.refused[change.path] = exc
                    return [False]
            except (DatabaseDown, DatabaseRefused):
                if unknown or boot_clock() - began > QUICK:  # else it may be just this connection: at once again
                    time.sleep(min(0.2, max(0.0, self.lease.remaining())))
                unknown = True

    @contextlib.contextmanager
    def _asking(self, use: Use, first_try: bool = False) -> Iterator[None]:
        """One caller at a time, under the lease."""
        with self._lock:
            self.lease.check()  # only now: a database that hangs keeps one caller after the other waiting
            with self._trouble.told(use, first_try):
                yield

    def _remember(self, change: Change) -> None:
        self.refused.pop(change.path, None)
        if change.new is None:
            self._rows.pop(change.path, None)
        else:
            due = None if change.delay is None else self._clock() + change.delay
            self._rows[change.new.path] = change.new._replace(term=self.lease.term, due=due)

    def due_actions(self, busy: set[str]) -> list[Row]:
        now = self._clock()
        return [row for row in self.all() if row.action and row.path not in busy and not row.waits(now)]

    def forget_unlisted(
        self,
        listed: Collection[str],
        retention: float,
        lacks: Callable[[str], bool] = lambda path: True,
        busy: Callable[[str], bool] = lambda path: False,
        blocking: bool = False,
        own: Collection[int] = (),
    ) -> None:
        """Dates the rows of files that are no longer listed, and drops them (`blocking`: if done) `retention` seconds
        later; at once what the server called gone, too. `lacks`: whether the listing proves that a path is not there,
        `own`: this process's earlier terms."""
        now, changes = self._clock(), []
        for row in self.all():
            if (row.path in listed and not row.unlisted) or row.action or busy(row.path):
                continue
            still_open, lost = row.state in ("failed", "claimed"), lost_attempt(row)
            over = (still_open and row.marks.gone) or (row.unlisted and row.due is not None and not row.waits(now))
            if row.path in listed:
                changes.append(Change(row, row.marked(unlisted=False)))
            elif not lacks(row.path):
                continue
            elif over and (row.state == "done" or not blocking):
                changes.append(Change(row, None, outcome=lost))
            elif not row.unlisted or row.due is None:
                # A void claim's death is noted now: the new row will be this term's.
                died = row.state == "claimed" and row.term not in (self.lease.term, *own)
                dated = row.marked(unlisted=True, deaths=row.marks.deaths + died)._replace(state="failed")
                changes.append(Change(row, dated if still_open else row, retention, outcome=lost))
        self.write_all(changes)

    def write_all(self, changes: Sequence[Change]) -> None:
        for start in range(0, len(changes), BATCH_FILES):
            self.write(changes[start : start + BATCH_FILES])


# ---------------------------------------------------------------------------------------------------------------------
# I.8 Delivery: how copies get their names
# ---------------------------------------------------------------------------------------------------------------------

# Workplace (I.10) makes copies: always new files, those for `download_dir` under hidden names of the term.


def give_name(temporary: Path, target: Path, folder: Optional[int] = None, again: bool = True) -> Path:
    """Gives a finished file its name, replacing nothing; gives the name it got. What is there with the same content
    counts as this file (`again`); another one makes the name a numbered one.

    `folder` is the path's, held open: who puts another one in its place leads nobody astray (CWE-367)."""
    for number in itertools.count():
        wanted = target if number == 0 else target.with_name(numbered(target.name, number))
        try:
            _rename_without_replacing(_at(temporary, folder), _at(wanted, folder), folder)
        except FileExistsError:
            if not again or not _same_content(_at(temporary, folder), _at(wanted, folder), folder):
                continue
            os.unlink(_at(temporary, folder), dir_fd=folder)
        return wanted
    raise AssertionError("unreachable")


naming = threading.Lock()


def _rename_without_replacing(source: str, target: str, folder: Optional[int]) -> None:
    if os.name != "posix":
        os.rename(source, target)  # refuses an existing target there
        return
    try:
        os.link(source, target, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except FileExistsError:
        if not os.path.samestat(os.lstat(source, dir_fd=folder), os.lstat(target, dir_fd=folder)):
            raise  # else NFS says so of the link just made: link(2)
    except OSError as exc:
        if exc.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        with naming:  # without hard links: only this process writes here
            with contextlib.suppress(FileNotFoundError):
                os.lstat(target, dir_fd=folder)
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from None
            os.rename(source, target, src_dir_fd=folder, dst_dir_fd=folder)
        return
    with contextlib.suppress(OSError):  # clean() does
        os.unlink(source, dir_fd=folder)


# ---------------------------------------------------------------------------------------------------------------------
# I.9 Poller: the work of one lease
# ---------------------------------------------------------------------------------------------------------------------

Task = Union[Work, Row]  # for a worker: a file to be delivered, or a row whose after-action is due


@dataclasses.dataclass(eq=False)
class Item:
    """A claimed file on its way through a delivery."""

    work: Work
    row: Row  # the ledger's
    mtime: str  # of the version, with the exact time once the fetch has told it
    started: float = dataclasses.field(default_factory=lambda: time.monotonic())
    copy: Any = None  # from step 2 on
    seal: Any = None  # what tells whether the content is the one that was sent
    sha256: str = ""  # of the whole content, with checksum or audit
    ended: bool = False  # done, or not

    def outcome(self, row: Row) -> Outcome:
        return Outcome(row.state, self.sha256, time.monotonic() - self.started, row.error)


class Poller:
    """Everything that one lease allows: polls, workers, the ledger of its term."""

    def __init__(
        self,
        config: Config,
        member: Member,
        lease: Lease,
        selector: Selector,
        route: Optional[Route],
        rows: Rows,
        yielding: Yielding,
        breaker: Breaker,
        paused: Callable[[], bool] = bool,
    ) -> None:
        # What outlives leases ...
        self.config, self.member, self.stats, self.progress = config, member, member.stats, member.progress
        self.selector, self.route, self._yielding, self._breaker = selector, route, yielding, breaker
        self._operator_pauses = paused
        # ... and what does not.
        self.lease, self._about = lease, {"group": config.coordination_group, "term": lease.term}
        self.ledger = Ledger(
            rows, config.coordination_group, config.member_id, lease, boot_clock, member.ledger_trouble
        )
        self.pool = Pool(config, lease.check, self._goes_on)
        self.recognizer = Recognizer(self.ledger, self.pool.looking, self._goes_on)
        self.companions = selector.companions = Companions(config)
        self.order = self.stats.order = Order(config)
        self.workplace = Workplace(config, lease.term)
        self.command = Command(config) if config.exec else None
        self._folder_alone = bool(config.download_dir) and route is None and self.command is None
        self.workers = Workers(config.workers, self._folder_alone, self._work, member.note, self.ledger.get)
        self.stats.queued = self.workers.busy.__len__
        self._pace = Pace(config)
        self._server_trouble = Backoff(1.0, min(60.0, max(1.0, config.polling_interval)))
        # Of the last poll:
        self.listed: Optional[Collection[str]] = None
        self.unreached = False  # the server, or something that it listed, could not be had
        self.waiting = 0  # failed files whose back-off has not passed
        self.stuck = False  # a Python handler is still running although everything was to end

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self, once: bool = False) -> bool:
        """Polls until the lease ends or is to be handed over; with `once` until nothing is left to do: then True."""
        self.member.on_lost.append(self._cut)
        self.member.on_hand_over.append(self._hurry)
        try:
            while self.member.may_work(self.lease):
                self._pace.poll_begins()
                trouble = self._poll_once()
                if once and (trouble is None or self.unreached):
                    self.member.wait(self.lease, float("inf"), lambda: not self.workers.busy)
                    if trouble is None and self._pace.more:
                        continue
                    return trouble is not None or self.member.may_work(self.lease)
                for seconds in self._pace.pauses(trouble):
                    self.progress.tell(seconds)
                    if not self.member.wait(self.lease, seconds):
                        break
            return False
        finally:
            self._stop_workers()
            self.member.unanswered = max(self.member.unanswered, self.pool.unanswered())
            self.member.on_lost.remove(self._cut)
            self.member.on_hand_over.remove(self._hurry)
            self.pool.close()
            self.workplace.close()

    def _poll_once(self) -> Optional[float]:
        """One poll; the seconds to wait because of trouble or a pause, or None."""
        try:
            self.workplace.clean(self._goes_on)
            if self._paused():
                self.unreached = True  # `run --once` leaves something
                self.workers.start()
                self.ledger.refresh()
                self._act_where_due(self.workers.busy.copy())
                return min(PAUSE_SECONDS, self.config.polling_interval)
            self.poll()
            self._server_trouble.reset()
            self._yielding.reached()
            self.stats.server_up(self.config)
            return None
        except LeaseLost:
            return 0.0
        except LoginRefused as exc:
            return self.failed(exc, max(1.0, self.pool.refused_for()))
        except (ServerDown, FileGone, FileRefused, LocalTrouble) as exc:
            return self.failed(exc, self._server_trouble.next())
        except (DatabaseDown, DatabaseRefused):
            return self.config.heartbeat_frequency

    def _paused(self) -> bool:
        """Whether an operator wants no new polls and claims; workers see it, too."""
        self._breaker.paused = self.ledger.ask(self._operator_pauses)
        return self._breaker.paused

    def failed(self, exc: Error, pause: float) -> float:
        """The seconds to wait."""
        if not self.member.may_work(self.lease):
            return 0.0  # the connections were cut by ourselves
        self.unreached = True
        self.stats.server_down(self.config, exc, pause)
        if not isinstance(exc, (FileGone, FileRefused, LoginRefused)):
            self._yielding.not_reached(self.member)
        return pause

    def poll(self) -> None:
        """List, choose, hand to the workers; returns when they have taken everything."""
        began = time.monotonic()
        self.unreached = False
        self.workers.start()
        self.ledger.refresh()
        self.pool.habits.spare_listing = True
        self.order.poll_begins(self.ledger.all())
        busy = self.workers.hold(self.order.lines_up)  # the listing may show these as they were before
        listing = self._list()
        self.unreached, self.listed = bool(listing.refused), listing.paths
        ready = self._choose(listing, busy)
        self.workers.hand_in(ready)
        self.stats.polled(self, listing, len(ready), time.monotonic() - began)
        self.progress.tell()
        while self.workers.queue and self.member.may_work(self.lease):
            self.member.wait(self.lease, 1.0, lambda: not self.workers.queue)
            self._paused()
        if self.pool.trouble is not None:
            raise self.pool.trouble
        if self.member.may_work(self.lease):
            self._forget(listing, busy)

    def _choose(self, listing: Look, busy: set[str]) -> list[Work]:
        """What is to be handled now; what is new to this member only if it is the same `settle` seconds later."""
        # 1. Nothing final, nothing whose version has to be asked for first.
        self.selector.verdicts.leave_out_final(listing, self.ledger.get)
        unclear = self.recognizer.recognize(listing, busy)
        backlog = Backlog(self.route, self.stats.backlog)
        choice = self.selector.choose(listing, self.ledger.get, busy | unclear, backlog.add)
        self.stats.backlog = backlog
        self._act_where_due(busy)
        # 2. A second look at what may still be written.
        ready, again, unsettled = choice.ready, listing, 0
        self.progress.tell(self.config.settle)
        if choice.unsettled and self.member.wait(self.lease, self.config.settle):
            again = self._list()
            settled = self.selector.unchanged(choice.unsettled, again)
            restless = self.selector.unsteady.redated(choice.unsettled, again)
            unsettled = len(choice.unsettled) - len(settled) - restless
            self.unreached |= restless > 0
            ready = in_order(ready + settled, self.config.sort)
        # 3. Wanted, in its turn, not resting, and no more than `max_files`.
        ready = [work for work in ready if self._wants(work.found)]
        if self.order.lines_up:
            wanted = filter(self._wants, [*again, *listing])
            ready = self.workers.line_up(self.order, wanted, self.ledger.all(), ready, self._breaker.may_try)
        rested = self._breaker.admit(ready, self.workers.busy.__contains__)
        self.waiting = choice.waiting + len(ready) - len(rested)
        ready = rested[: self.config.max_files or None]
        self.companions.hold((*ready, *self.workers.behind.values()), again)
        comes = busy or choice.young or self.waiting or any(row.action for row in self.ledger.all())
        self._pace.left(ready or unsettled or unclear, comes)
        return ready

    def _act_where_due(self, busy: set[str]) -> None:
        due = [row for row in self.ledger.due_actions(busy) if self.companions.known(row.path)]
        self.workers.hand_in(row for row in due if self._breaker.may_try(row.path))

    def _wants(self, found: Found) -> bool:
        return self.selector.wants(found) and (self.route is None or self.route(found.entry.name) is not None)

    def _goes_on(self) -> None:
        if not self.member.may_work(self.lease):
            raise LeaseLost(self.lease.term)
        self.progress.tell()

    def _list(self) -> Look:
        with self.pool.looking() as server:
            return self.selector.tree.walk(server, self._goes_on)

    def _hurry(self) -> None:
        """Listings and connects under way are of no use any more."""
        self.pool.hurry(self.config.heartbeat_frequency)

    def _forget(self, look: Look, busy: set[str]) -> None:
        busy, listed = busy | self.workers.busy, look.paths.keys()

        def kept(path: str) -> bool:
            row = self.ledger.get(path)
            return path in listed or path in busy or not look.lacks(path) or bool(row and row.action)

        self._breaker.keep(lambda path: kept(path) and path not in self.companions.renewed)
        for memory in (self.selector.unsteady, self.workers, self.recognizer, self.companions):
            memory.keep(kept)
        retention, own = self.config.ledger_retention * SECONDS_A_DAY, self.member.terms
        self.ledger.forget_unlisted(listed, retention, look.lacks, busy.__contains__, self.order.lines_up, own)

    # -- workers ------------------------------------------------------------------------------------------------------

    def _stop_workers(self) -> None:
        """Lets the handlers end within `drain_timeout`, then cuts what can be cut; waits for all that still runs."""
        self.workers.end()
        if not self.workers.join(self.config.drain_timeout, self.lease.valid):
            self._cut()
        self.workers.join(KILL_AFTER + 3.0)  # and what a command's output may take to end
        # Nobody can end a Python handler. While it runs this member neither releases nor stands again; a process that
        # is stopping exits with it.
        self.stuck = not self.workers.join(float("inf"), lambda: not self.member.stopping)

    def _cut(self) -> None:
        """No further effect: sockets are reset, commands ended, which may end by themselves as long as nobody else can
        be active: not after a pause of the machine. Called at the deadline by the guard's thread."""
        self.pool.abort()
        if self.command is not None:
            self.command.cut(min(KILL_AFTER, max(0.0, self.lease.remaining() + self.member.timing.grace)))

    def _work(self, tasks: list[Task]) -> None:
        """What a worker does with what it has taken from the queue."""
        row = tasks[0]
        try:
            if not isinstance(row, Row):
                self._deliver(cast(list[Work], tasks))
            elif (row.term == self.lease.term and row.due is None) or self.member.may_work(self.lease):
                self._act(row)  # else only if new work may begin
        except BaseException as exc:  # whatever it is, the worker goes on
            if not isinstance(exc, Error):
                event("worker_failed", logging.ERROR, exc=exc, error=reason(exc))
            for task in tasks:
                self.workers.next.pop(task.path, None)
                if not isinstance(exc, LeaseLost):
                    self._leave(task.path, exc)
        finally:
            self.progress.tell()

    # -- delivery -----------------------------------------------------------------------------------------------------

    def _deliver(self, works: Sequence[Work]) -> None:
        """The way of a file, or of a group of small ones where delivery is the folder alone, in steps:

            1 claim   2 open a copy   3 fetch it, and look at the file again   4 its content durable
            5 its name, and (item by item with 6) that durable   6 the handler   7 done

        A crash on the way repeats it; what has its name by then is recognized by its content.
        """
        if not self.member.may_work(self.lease):
            return
        items = self._claim([work for work in works if self._breaker.allows(work.path)])
        try:
            for item in items:
                if not item.ended:
                    try:
                        item.copy = self.workplace.create(item.work.found, private=item.row.marks.delivered)
                    except Exception as exc:
                        self._fail(item, exc)
            with contextlib.closing(self._fetch([item for item in items if not item.ended])) as come:
                for part in in_parts(come, BATCH_SECONDS):
                    self._land(part)
        finally:
            for item in items:
                self.workplace.discard(item.copy)

    def _claim(self, works: Sequence[Work]) -> list[Item]:
        """Step 1. A void claim's file may have killed the process, unless that is this one: the third counts as its
        failure, and each one after."""
        items, free = [], []
        for work in works:
            old = work.old
            if old is not None and old.state == "claimed" and work.attempts and old.term not in self.member.terms:
                old = old.marked(unlisted=False, deaths=old.marks.deaths + 1)
                work = work._replace(old=old)
                if old.marks.deaths >= 3:
                    items.append(Item(work, old, old.mtime))
                    self._fail(items[-1], HandlerFailed("it may be the file that ends it"))
                    continue
            free.append(work)
        for work, row in zip(free, self.ledger.claim(free)):
            if row is not None:
                self.selector.unsteady.claimed(work, self.lease.term)
                items.append(Item(work, row, row.mtime))
            elif work.path in self.ledger.refused:
                self._not_kept(work.old, self.ledger.claimed(work))
        return items

    def _fetch(self, items: Sequence[Item]) -> Generator[Item, None, None]:
        """Step 3. Gives what has come whole; what a handler gets, when the connection has been given back: the server
        may allow no other."""
        waiting = {item.work.path: item for item in items}
        jobs = [self._job(item) for item in items]
        server: Optional[FileServer] = None
        come: list[Item] = []
        if not jobs:
            return
        try:
            with self.pool.server() as server:
                self.lease.check()
                server.unasked = ()
                read_seals(server, [item.seal for item in items], jobs)
                for job, problem in server.fetch_many(jobs):
                    item = waiting.pop(job.path)
                    if problem is None:
                        item.sha256, problem = item.seal.sha256(), self.companions.judged(item.seal)
                    if problem is not None:
                        self._fail(item, problem)
                        continue
                    self.stats.fetched(job.size)
                    if self._folder_alone:
                        begin_sync(item.copy.out)
                        yield item
                    else:
                        come.append(item)
        except LeaseLost:
            raise
        except Exception as exc:
            self._broke_off(waiting, len(jobs), server, exc)
        yield from come

    def _job(self, item: Item) -> Job:
        found = item.work.found
        self.recognizer.forget(found.path)
        item.seal = self.companions.seal(found)

        def write(data: memoryview) -> None:
            write_all(item.copy.out, data)
            item.seal.update(data)
            self.progress.received(len(data))  # a large file may take longer than `stall_timeout`

        def told(entry: Entry) -> None:
            if "=" in entry.mtime:
                item.mtime = entry.mtime + "~" * may_still_run(entry.mtime)

        return Job(found.path, found.entry.size, write, found.entry, told)

    def _broke_off(
        self, waiting: Mapping[str, Item], number: int, server: Optional[FileServer], exc: Exception
    ) -> None:
        """The connection ended with these of a `number` of files, or there was none."""
        self.lease.check()
        unasked = waiting.keys() if server is None else {job.path for job in server.unasked if number > 1}
        back = [item for path, item in waiting.items() if path in unasked and isinstance(exc, ServerDown)]
        failed = [item for item in waiting.values() if item not in back]
        # 1. What the server was not asked for is as if never claimed (but a void claim was told and counted), and goes
        #    again: at once, or at the next poll.
        olds = [item.work.old for item in back]
        olds = [old and old._replace(state=old.state.replace("claimed", "failed")) for old in olds]
        self.ledger.write([Change(item.row, old) for item, old in zip(back, olds)])
        for item in back:
            item.ended = True
            if server is not None:
                self.workers.next[item.work.path] = Work(item.work.found, self.ledger.get(item.work.path))
        # 2. What may have broken it goes alone the next time.
        if server is None:
            self.workers.put_off()
        else:
            self.workers.alone.update(item.work.path for item in (back if len(back) == number else failed))
        # 3. The others have failed. What nobody foresaw is no file's own fault until it breaks one that is alone.
        if len(failed) > 1 and not isinstance(exc, (ServerDown, LocalTrouble, OSError)):
            exc = LocalTrouble(f"the group broke: {reason(exc)}")
        for item in failed:
            self._fail(item, exc)

    def _land(self, items: Sequence[Item]) -> None:
        """Steps 4 to 7, each for all of them: one wait for the disk serves many."""
        for item in items:
            try:
                item.copy.close(durable=bool(self.config.download_dir))
                self.lease.check()
                if not item.row.marks.delivered:
                    # Only a death can have left its name: a file of this name may have come from another folder.
                    died = item.work.old is not None and item.work.old.state == "claimed"
                    self.workplace.name(item.copy, item.work.found, died or not self.config.folders)
                    item.row = item.row.marked(delivered=bool(self.config.download_dir))
            except Exception as exc:
                self._fail(item, exc)
        durable: set[Path] = set()
        for item in items:
            if not item.ended:
                try:
                    self.workplace.sync(item.copy, durable)
                    self._handle(item)
                except Exception as exc:
                    self._fail(item, exc)
        finished = [item for item in items if not item.ended]
        if finished:
            self._done(finished)

    def _handle(self, item: Item) -> None:
        """Step 6."""
        if self._folder_alone:
            return
        row = item.row
        file = File(row.path, row.size, epoch_seconds(item.mtime), row.attempts, self.lease, item.copy.path)
        file.sha256 = item.sha256
        self.lease.check()
        with self.progress.handling(self.stats.handlers.add):
            if self.command is not None:
                self.command.run(file)
            elif self.route is not None:
                call_handler(self.route(file.name), file, self.config.error_output)

    def _done(self, items: Sequence[Item]) -> None:
        """Step 7. Only what is recorded as done is deleted or moved."""
        action = self.config.action(self.config.after)
        finished = [
            item.row._replace(state="done", mtime=item.mtime, action=action, error="", marks=Marks()) for item in items
        ]
        for item in items:  # before the ledger is written: it may need the room
            self.workplace.discard(item.copy)
        steps = [Change(item.row, row, outcome=item.outcome(row)) for item, row in zip(items, finished)]
        made = self.ledger.write(steps)
        for item, row, ok in zip(items, finished, made):
            item.ended = True
            if ok:
                if action:
                    self.workers.next[row.path] = row
                self.order.done(row)
                self._breaker.done(row.path)
                self.stats.done(row, time.monotonic() - item.started)
            else:
                self._not_kept(item.row, row)

    def _fail(self, item: Item, exc: Exception) -> None:
        """A claimed file is not done: it is failed, and due again after a pause; or quarantined, when that was its own
        fault `max_attempts` times."""
        item.ended, row = True, item.row
        self.workplace.discard(item.copy)
        # After the end of the lease all fails because it is cut: it stays claimed, which is void in the next term.
        self.lease.check()
        if isinstance(exc, LeaseLost):
            if not self.member.may_work(self.lease):  # a stop cut the command: no death for the next member to count
                failed = with_error(row, Error("cut by a stop"))._replace(state="failed")
                self.ledger.change(row, failed, outcome=item.outcome(failed))
                raise exc
            exc = HandlerFailed(f"{exc}, it says, but it is not")
        failure = self._breaker.failure(item, foreseen(exc, row.path, item.copy))
        outcome = None if failure.what == "not_now" else item.outcome(failure.row)
        if self.ledger.write([Change(row, failure.row, failure.due, outcome=outcome)])[0]:
            self.stats.failed(failure, self._about)
            if failure.row.action:
                self.workers.next[row.path] = self.ledger.get(row.path)  # as this term has written it
        else:
            self._not_kept(row, failure.row)

    def _not_kept(self, old: Optional[Row], new: Row) -> None:
        """The ledger has not taken a step of a file in work: in no form, then it is quarantined, or as somebody changed
        the row."""
        error = Error(f"it is {new.state}, but its row in the ledger was changed meanwhile")
        if new.path in self.ledger.refused:
            error = Error(f"the ledger refuses it as {new.state}: {self.ledger.refused[new.path]}")
            row = with_error(new, error)._replace(state="quarantined", action="")
            if self.ledger.write([Change(old, row, outcome=Outcome(row.state, words=str(error)))])[0]:
                self.stats.failed(Failure("file_quarantined", row), self._about)
                return
        self.lease.check()
        self._leave(new.path, error)

    def _leave(self, path: str, exc: BaseException) -> None:
        """What went wrong with a file and the ledger does not tell: said, and left alone for a growing pause."""
        pause = self._breaker.refuse(path, NotNow(reason(exc)))[0]
        event("file_failed", logging.ERROR, term=self.lease.term, path=path, retry_in=pause, error=reason(exc))

    # -- after-actions ------------------------------------------------------------------------------------------------

    def _act(self, row: Row) -> None:
        """Deletes or moves a file that is done or quarantined, if it still is the version that was handled.

        Whoever may write to the ledger must not reach other files of the server by it, nor do else with these.
        """
        wanted = self.config.may_act(row.action)
        if not wanted or not self.selector.tree.below(row.path):
            why = "its path is not below url or folders" if wanted else f"{row.action} is neither after nor after_error"
            self._keep(row, f"the action in the ledger is dropped: {why}", logging.WARNING)
            return
        try:
            try:
                self._act_on(row)
            except ServerDown:
                if self.member.may_work(self.lease):
                    raise
                self._act_on(row)  # a stop may have cut the connect: once more, in haste
        except LeaseLost:
            raise
        except Error as exc:
            self.lease.check()
            failure = self._breaker.action_failure(row, exc)
            self.ledger.change(row, failure.row, failure.due)
            self.stats.failed(failure, self._about)

    def _keep(self, row: Row, why: str, level: int = logging.INFO, drop: bool = False) -> None:
        """Leaves a file where it is, for good."""
        event("file_kept", level, term=self.lease.term, path=row.path, reason=why)
        self.ledger.change(row, None if drop else row._replace(action=""))

    def _act_on(self, row: Row) -> None:
        """Removes nothing if the file or a companion is newer than at the claim. Companions go first, and also when the
        file is gone: else they would make the next version ready too early. What another file still needs stays."""
        with self.pool.server() as server:
            same = server.same(row.path, Entry(posixpath.basename(row.path), "file", row.size, row.mtime))
            free, replaced = ([], False) if same is False else self.companions.look(server, row.path, self.ledger.get)
            self.lease.check()
            if same is False or replaced:
                what = "the file" if same is False else "its companion"
                drop = row.state == "done" and same is False  # so that the new version is handled
                if drop:
                    self.selector.unsteady.again(row.path, self.lease.term)
                self._keep(row, f"a new version of {what} arrived meanwhile", drop=drop)
                return
            for path in free + [row.path] * bool(same):
                server.put_away(path, row.action)
                self.lease.check()
            self.selector.unsteady.removed(row, self.lease.term)
            self.companions.gone(row.path)
            outcome = Outcome(f"{row.action.partition(':')[0]}d", words="" if same else "it was gone already")
            self.ledger.change(row, None if row.state == "done" else row._replace(action=""), outcome=outcome)


# ---------------------------------------------------------------------------------------------------------------------
# I.10 What the poller leans on: walks, times, copies, progress, known versions, pauses, workers, connections
# ---------------------------------------------------------------------------------------------------------------------
# -- walks ------------------------------------------------------------------------------------------------------------
LONGEST_PATH = 4096  # characters; the ledger's column ends


def start_of_paths(folder: str) -> str:
    return "" if folder in (".", "") else posixpath.join(folder, "")


class Look(list[Found]):
    """The files of one walk through the polled tree, and what it could not see; folders with their slash."""

    def __init__(self, goes_on: Callable[[], object] = bool) -> None:
        super().__init__()
        self.paths: dict[str, Found] = {}
        self.refused: dict[str, str] = {}  # folders that could not be listed whole, and why
        self.lost: dict[str, str] = {}  # the polled ones of these
        self.unread: dict[str, list[str]] = {}  # lines that nobody understands, by folder
        self.skipped: dict[str, str] = {}  # links and folders that are left out, and why
        # While the walk goes on:
        self.goes_on = goes_on
        self.base = ""  # the polled folder
        self.folders: set[str] = set()  # what was listed as a folder, below it
        self.listings: dict[str, tuple[Any, dict[int, Found]]] = {}  # by folder; files by id of entry
        self._size = 0

    def add(self, folder: str, entries: Any, files: dict[int, Found]) -> None:
        self.listings[folder] = entries, files
        paths = {found.path: found for found in files.values()}
        self.paths.update(paths)
        self._size += sum(map(len, paths))
        if len(self) > MAX_ENTRIES or self._size > MAX_LISTING:
            raise ServerDown(f"more than {MAX_ENTRIES} files or {MAX_LISTING} bytes of paths: poll fewer folders")

    def lacks(self, path: str) -> bool:
        """Whether it proves that a path is not there: its folder was listed whole, or is missing, and no line that is
        not understood may tell of it."""
        while path and (self.refused or self.unread):
            head, slash, name = path.rpartition("/")
            if head + slash in self.refused or may_tell_of(self.unread.get(head + slash, ()), name):
                return False
            path = head
        return True


class Tree:
    """The polled folders, with subfolders if `recursive`. What is left out of them is said once."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.names = Patterns(config)
        self.refused = 0
        self._targets, self._bases = MoveTargets(config), config.polled()
        self._told: set[tuple[str, str]] = set()
        self._last = Look()

    def walk(self, server: FileServer, goes_on: Callable[[], object] = bool) -> Look:
        """Raises the last error if none can be listed, FileRefused if files would be moved into one."""
        look = Look(goes_on)
        unresolved = self._targets.check(server)
        for look.base in self._bases:
            look.folders = set()
            try:
                if look.base in unresolved:
                    raise unresolved[look.base]
                self._visit(server, look, look.base, "", [])
            except (FileGone, FileRefused) as exc:
                look.lost[look.base] = look.refused[start_of_paths(look.base)] = str(exc)
                if len(look.lost) == len(self._bases):
                    raise
        self._last = look
        return look

    def _visit(self, server: FileServer, look: Look, folder: str, below: str, above: Above) -> None:
        look.goes_on()
        last, known = self._last.listings.get(folder, (None, {}))
        entries, files = server.list(folder, last), {}
        prefix = start_of_paths(folder)
        if server.unread:
            look.unread[prefix] = server.unread
            self._refuse(folder, server.unread[0][:200], "a line of the listing that is not understood")
        if len(server.unread) > MOST_UNREAD:
            look.refused[prefix] = "too much of its listing is not understood"
        folders = {entry.name for entry in entries if entry.kind == "dir"}
        if repeats(folders, entries, above):
            self._skip(look, folder, "it shows a folder above it once more, as a link to it does")
            return
        look.folders.update(below + name for name in folders)
        if len(look.folders) > MAX_FOLDERS:
            raise ServerDown(f"more than {MAX_FOLDERS} folders below {look.base}: poll fewer")
        for entry in entries:
            found = known.get(id(entry))
            if found:
                files[id(entry)] = found
                look.append(found)
                continue
            path, relative = prefix + entry.name, below + entry.name
            if not is_plain_name(entry.name) or len(path) > LONGEST_PATH:
                self._refuse(folder, entry.name[:LONGEST_PATH], "not a plain file name")
            elif entry.kind == "file":
                files[id(entry)] = Found(path, relative, entry)
                look.append(files[id(entry)])
            elif entry.kind != "dir":
                link = "a link; links are not followed"
                self._skip(look, path, link if entry.kind == "link" else "neither file nor folder")
            elif self.config.recursive:
                why = self._stays_out(server, look, relative)
                if why:
                    look.skipped[path] = why
                    continue
                try:
                    self._visit(server, look, path, relative + "/", [*above, (folders, entries)])
                except (FileGone, FileRefused) as exc:
                    look.refused[path + "/"] = str(exc)
                    self._refuse(*split_path(path), str(exc))
        look.add(folder, entries, files)

    def _stays_out(self, server: FileServer, look: Look, relative: str) -> str:
        why = self.names.leave_out(relative)
        if not why and self._targets.include(server, look, relative):
            why = "files are moved there"
        return why or "more than 100 folders deep" * (relative.count("/") > 100)

    def _refuse(self, folder: str, name: str, why: str) -> None:
        self.refused += 1
        self.tell(logging.WARNING, folder, name, why)

    def _skip(self, look: Look, path: str, why: str) -> None:
        look.skipped[path] = why
        self.tell(logging.INFO, *split_path(path), why)

    def tell(self, level: int, folder: str, name: str, why: str) -> None:
        if (folder, name + why) not in self._told and len(self._told) < 1000:
            self._told.add((folder, name + why))
            event("file_refused", level, folder=folder, name=repr(name), reason=why)

    def below(self, path: str) -> bool:
        starts = filter(path.startswith, map(start_of_paths, self._bases))
        return any(all(map(is_plain_name, path.removeprefix(start).split("/"))) for start in starts)


def in_order(works: Iterable[Work], sort: str) -> list[Work]:
    key = sort.lstrip("-")

    def rank(work: Work) -> tuple[int, str, str]:
        entry = work.found.entry
        return entry.size if key == "size" else 0, "" if key == "name" else entry.mtime, work.path

    return sorted(works, key=rank, reverse=sort.startswith("-"))


class Verdicts:
    def __init__(self, config: Config, tell: Callable[[int, str, str, str], None]) -> None:
        self._config, self._tell = config, tell
        self._final: dict[str, tuple[Found, Optional[Row]]] = {}

    def note(
        self, found: Found, row: Optional[Row], word: str, why: str, backlog: Callable[[Found, str], object]
    ) -> None:
        if word == "final" and not (row and row.mtime.endswith("~")):
            self._final[found.path] = found, row
        elif word == "warn":
            self._tell(logging.WARNING, *split_path(found.path), why)
        ended = row is not None and row.state in ("done", "quarantined")
        if word not in ("final", "skip") and not (word == "busy" and ended):
            backlog(found, why)

    def leave_out_final(self, look: Look, known: Callable[[str], Optional[Row]]) -> None:
        """Takes from a look what is final: a verdict stands while neither the file's line nor its row changes."""
        for path in self._final.keys() - look.paths.keys():
            del self._final[path]
        if not self._config.companions():  # which may be any line
            look[:] = [found for found in look if self._final.get(found.path) != (found, known(found.path))]


# -- times ------------------------------------------------------------------------------------------------------------
SECONDS_A_DAY = 86400.0
MOST_AHEAD = datetime.timedelta(hours=15)  # no zone is farther from UTC
UTC = datetime.timedelta(0)
QUARTER = datetime.timedelta(minutes=15)  # zones are multiples of it
DAY, MINUTE, SECOND = len("2026-01-12"), len("2026-01-12T10:15"), len("2026-01-12T10:15:30")
EPOCH_SECONDS = re.compile(r"-[0-5]?\d{1,10}|\d{1,11}", re.ASCII)
EPOCH = datetime.datetime(1970, 1, 1)


class Times(NamedTuple):
    """What is known of a file's time, "" where it is not."""

    line: str  # as LIST shows it
    exact: str  # in UTC


@functools.lru_cache(maxsize=1024)  # files of a listing share minutes
def times_of(mtime: str) -> Times:
    """Those in an Entry's text or the ledger's, which has both as `2026-01-12T10:15=1768212907`, and a `~` behind if
    that minute may not have been over at the fetch."""
    line, sign, seconds = mtime.rstrip("~").partition("=")
    if EPOCH_SECONDS.fullmatch(seconds):
        return Times(line, _iso_seconds(int(seconds)))
    if sign or len(line) < len("2026-01-12T10:15:30"):
        return Times(line, "")
    if line[17:19] == "60":  # a leap second (RFC 3659 section 2.3) is the one after it
        line = _moved(line[:17] + "59", datetime.timedelta(seconds=1)) + line[19:]
    return Times("", line)


@functools.lru_cache(maxsize=1024)
def epoch_seconds(mtime: str) -> Optional[float]:
    """None if there is none. LIST's is taken as UTC."""
    line, exact = times_of(mtime)
    seconds, point, fraction = (exact or line).partition(".")
    with contextlib.suppress(ValueError):
        moment = datetime.datetime.fromisoformat(seconds).replace(tzinfo=None)
        return (moment - EPOCH).total_seconds() + float(f"0{point}{fraction}")
    return None


@functools.lru_cache(maxsize=1024)
def _iso_seconds(seconds: int) -> str:
    return (EPOCH + datetime.timedelta(seconds=seconds)).isoformat()


def _moved(exact: str, by: datetime.timedelta) -> str:
    """An exact time later by so much; its fraction is cut off."""
    try:
        return (datetime.datetime.fromisoformat(exact[:19]) + by).isoformat()
    except (OverflowError, ValueError):
        return exact


def may_still_run(mtime: str) -> bool:
    """Whether the minute that a line shows may not be over yet. Generous: a line has no zone and perhaps no year."""
    seconds = epoch_seconds(mtime)
    if seconds is None:
        return True
    age, year = time.time() - seconds, 365.25 * SECONDS_A_DAY
    return age < SECONDS_A_DAY if times_of(mtime).exact else abs((age + year / 2) % year - year / 2) < 3 * SECONDS_A_DAY


def zone_between(line: str, exact: str) -> Optional[datetime.timedelta]:
    """What a line of LIST with minutes is ahead of the exact time of the same file; None if that cannot be a zone."""
    if line[:MINUTE] == exact[:MINUTE]:
        return UTC
    utc = datetime.datetime.fromisoformat(exact[:MINUTE])
    ahead = datetime.datetime.fromisoformat(line[:MINUTE]) - utc
    if abs(ahead) > MOST_AHEAD:  # a guessed year is most often one too early
        with contextlib.suppress(ValueError):  # 29 February
            ahead = datetime.datetime.fromisoformat(exact[:4] + line[4:MINUTE]) - utc
    return ahead if abs(ahead) <= MOST_AHEAD and ahead % QUARTER == UTC else None


# -- copies -----------------------------------------------------------------------------------------------------------
COPY_BYTES = 256 * 1024
FILE_MODE = 0o640  # of delivered files, less what the umask takes
PRIVATE_MODE = 0o600
OPENAT = fcntl is not None and os.open in os.supports_dir_fd
PRIVATE = "ftpcoord-copies-"  # folders of private copies


class PrivateFolder:
    """Where copies are made that are not delivered: locked while this process lives."""

    def __init__(self) -> None:
        self._path: Optional[Path] = None
        self._held: Optional[int] = None  # open and locked
        self._lock = threading.Lock()

    def path(self) -> Path:
        """Made anew when somebody has removed it."""
        with self._lock:
            while self._path is None or not self._is_held(self._path):
                self.close()
                self._path = Path(tempfile.mkdtemp(prefix=PRIVATE))
                try:
                    self._held = open_folder(self._path) if OPENAT else None
                    if self._held is not None:
                        fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, FileNotFoundError):  # taken for a dead process's: once more
                    self.close()
                except BaseException:
                    self.close()
                    raise
            return self._path

    def _is_held(self, place: Path) -> bool:
        try:
            return self._held is None or os.path.samestat(os.lstat(place), os.fstat(self._held))
        except OSError:
            return False

    def has(self, path: Path) -> bool:
        return self._path is not None and self._path in path.parents

    def close(self) -> None:
        if self._path is not None:
            with contextlib.suppress(OSError, RecursionError):  # of a command's very deep tree
                shutil.rmtree(self._path)
        if self._held is not None:
            os.close(self._held)
        self._path = self._held = None


def _at(path: Path, folder: Optional[int]) -> str:
    """What names a path in a call that takes `dir_fd`."""
    return str(path) if folder is None else path.name


def create_file(path: Path, mode: int = FILE_MODE, folder: Optional[int] = None) -> io.RawIOBase:
    """Never an existing one, never through a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return io.FileIO(os.open(_at(path, folder), flags, mode, dir_fd=folder), "wb")


def write_all(out: io.RawIOBase, data: memoryview) -> None:
    """An unbuffered file may take less than it is given."""
    while data:
        data = data[out.write(data) :]


def begin_sync(file: io.RawIOBase) -> None:
    """Hands content to the disk without waiting: fsync of many then waits about once."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sync_folder(folder: Path, held: Optional[int] = None) -> None:
    """Makes the names in it durable, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY) if held is None else held
        try:
            os.fsync(handle)
        except OSError as exc:
            if exc.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                raise
        finally:
            if held is None:
                os.close(handle)


def open_folder(name: Union[str, Path], folder: Optional[int] = None) -> int:
    """A folder, held open; never through a link."""
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)


def files_below(folder: Path, goes_on: Callable[[], object]) -> Iterator[Path]:
    """Not by os.walk(), which older Pythons end at a thousand levels."""
    places = [folder]
    while places:
        place = places.pop()
        goes_on()
        with contextlib.suppress(OSError), os.scandir(place) as found:
            for entry in list(found):
                if entry.is_dir(follow_symlinks=False):
                    places.append(place / entry.name)
                else:
                    yield place / entry.name


def remove_dead_copies() -> None:
    """This user's private copies whose process is dead: it no longer holds their folder's lock. (A pid says nothing
    between containers.)"""
    places: list[Path] = []
    with contextlib.suppress(OSError):
        places += Path(tempfile.gettempdir()).glob(PRIVATE + "*") if OPENAT else ()
    for place in places:
        with contextlib.suppress(OSError, RecursionError), contextlib.ExitStack() as stack:
            handle = open_folder(place)
            stack.callback(os.close, handle)
            if os.fstat(handle).st_uid == os.geteuid():
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(place)
                event("copies_removed", folder=str(place), reason="the process that made them is dead")


_numbers = itertools.count(1)


class Copy:
    """A file in the making."""

    def __init__(self, place: Optional[Path], part: Path, out: io.RawIOBase) -> None:
        self.place, self.part, self.out = place, part, out
        self.path = part  # or the name that it got

    def close(self, durable: bool = False) -> None:
        if durable:
            os.fsync(self.out.fileno())
        self.out.close()


class Workplace:
    """Where copies are made: in `download_dir`, or in a private temporary folder. Each step enters the folders anew:
    others may remove them, or put a link in their place."""

    def __init__(self, config: Config, term: int) -> None:
        # Absolute, so that a file called `-rf` never is a command's option.
        self._folder = Path(config.place(config.download_dir)) if config.download_dir else None
        self._file_mode = int(config.file_mode, 8)
        self._private = PrivateFolder()
        self._durable: set[tuple[int, int]] = set()  # subfolders, by device and number
        self._group_mark = f".ftpcoord-{sha256_text(config.coordination_group)[:8]}-"
        self._term, self._mark = term, f"{self._group_mark}{term}-"
        self._cleaned = False

    def clean(self, goes_on: Callable[[], object] = bool) -> None:
        """Removes, once, what dead processes, and in `download_dir` earlier terms, left. Raises LocalTrouble, and
        before each folder what `goes_on` raises: copies of a later term are not ours to remove."""
        if self._cleaned:
            return
        remove_dead_copies()
        if self._folder is not None and not os.path.isdir(self._folder):
            trouble = LocalTrouble(f"download_dir {self._folder}: is not a folder that this user sees; create it")
            event("local_trouble", logging.ERROR, term=self._term, error=str(trouble))
            raise trouble
        for path in files_below(self._folder, goes_on) if self._folder else ():
            part = path.name.startswith(self._group_mark) and path.name.endswith(".part")
            if part and not path.name.startswith(self._mark):
                try:
                    self._unlink(path)
                except (OSError, HandlerFailed) as exc:  # harmless
                    event("local_trouble", logging.WARNING, term=self._term, error=f"{path}: {reason(exc)}; remove it")
        self._cleaned = True

    def create(self, found: Found, private: bool = False) -> Copy:
        """A new file; its name carries the term, unless it is `private`: never delivered."""
        home = self._folder and self._folder / posixpath.dirname(found.relative)
        place, name, mode = home, f"{self._mark}{os.getpid()}-{next(_numbers)}.part", self._file_mode
        if place is None or private:
            place, name, mode = self._private.path() / str(next(_numbers)), found.entry.name, PRIVATE_MODE
        path = place / name
        try:
            with self._inside(place, make=True) as folder:
                out = create_file(path, mode, folder)
            if mode not in (FILE_MODE, PRIVATE_MODE) and hasattr(os, "fchmod"):  # asked for: the umask takes none of it
                os.fchmod(out.fileno(), mode)
            return Copy(home, path, out)
        except BaseException as exc:
            self._remove(path)
            if isinstance(exc, OSError):
                exc.filename = str(path)  # else relative
            raise

    def name(self, copy: Copy, found: Found, again: bool = True) -> None:
        """Gives a finished one its name, unless it is private."""
        if copy.place is not None:
            with self._inside(copy.place) as folder:
                copy.path = give_name(copy.part, copy.part.with_name(found.entry.name), folder, again)

    def sync(self, copy: Copy, durable: set[Path]) -> None:
        """Makes its name durable, once for each folder."""
        if copy.place is not None and copy.place not in durable:
            try:
                with self._inside(copy.place) as folder:
                    sync_folder(copy.place, folder)
            except (FileNotFoundError, HandlerFailed):  # removed by who took the file
                return
            except OSError as exc:
                raise LocalTrouble(f"{copy.place}: {reason(exc)}") from None
            durable.add(copy.place)

    def discard(self, copy: Optional[Copy]) -> None:
        """Removes it, unless it has its name."""
        if copy is not None:
            with contextlib.suppress(OSError):  # a full disk says so once more
                copy.close()
            if copy.path is copy.part:
                self._remove(copy.part)

    def _remove(self, temporary: Path) -> None:
        with contextlib.suppress(OSError, UnicodeError, HandlerFailed, RecursionError):
            if self._private.has(temporary):
                shutil.rmtree(temporary.parent)  # and what a handler left there
            else:
                self._unlink(temporary)

    def close(self) -> None:
        self._private.close()

    def _unlink(self, path: Path) -> None:
        with self._inside(path.parent) as folder:
            os.unlink(_at(path, folder), dir_fd=folder)

    @contextlib.contextmanager
    def _inside(self, place: Path, make: bool = False) -> Iterator[Optional[int]]:
        """A folder of copies held open, below `download_dir` without any link.

        None for that itself, which may be a link, and where there is no openat: then by its path.
        """
        if place == self._folder:
            yield None
            return
        delivered = self._folder in place.parents and not self._private.has(place)
        path = cast(Path, self._folder) if delivered else place.parent  # of which private one, should it be made anew
        handle = os.open(path, os.O_RDONLY) if OPENAT else None
        try:
            for part in place.relative_to(path).parts:
                path = path / part
                handle = self._enter(path, handle, make, delivered)
            yield handle
        finally:
            if handle is not None:
                os.close(handle)

    def _enter(self, path: Path, parent: Optional[int], make: bool, delivered: bool) -> Optional[int]:
        """From a folder, which is closed, into one in it. A new one is made durable before anything is in it."""
        name, mode, new = _at(path, parent), self._file_mode if delivered else PRIVATE_MODE, False
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700 | mode | (mode & 0o444) >> 2, dir_fd=parent)
                new = True  # though its number may be that of a removed one
        if not stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
            raise HandlerFailed(f"{path} is a link or a file: nothing is written through it")
        if parent is None:
            return None
        handle = open_folder(name, parent)
        try:
            info = os.fstat(handle)
            if delivered and (new or (info.st_dev, info.st_ino) not in self._durable):
                sync_folder(path.parent, parent)
                if len(self._durable) >= 1000:
                    self._durable.clear()
                self._durable.add((info.st_dev, info.st_ino))
        except BaseException:
            os.close(handle)
            raise
        os.close(parent)
        return handle


def _same_content(a: str, b: str, folder: Optional[int]) -> bool:
    def opened(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), dir_fd=folder)

    with contextlib.suppress(PermissionError, FileNotFoundError):  # another user's, or just taken away
        info = os.lstat(b, dir_fd=folder)
        if stat.S_ISREG(info.st_mode) and info.st_size == os.lstat(a, dir_fd=folder).st_size:
            with open(a, "rb", opener=opened) as left, open(b, "rb", opener=opened) as right:
                same = all(piece == right.read(COPY_BYTES) for piece in iter(lambda: left.read(COPY_BYTES), b""))
            here = os.listdir(Path(b).parent if folder is None else folder)
            return same and os.path.basename(b) in here  # else another's, by case
    return False


def numbered(name: str, number: int) -> str:
    """report.csv -> report.1.csv"""
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}.{number}.{suffix}" if dot and stem else f"{name}.{number}"


# -- progress ---------------------------------------------------------------------------------------------------------
def check_timing(timing: Timing) -> None:
    """Raises ConfigError unless two failed renewals leave time for a third."""
    heartbeat, liveness, stale_after = timing.heartbeat, timing.liveness, timing.stale_after
    if liveness < 5 * heartbeat:
        raise ConfigError(
            f"liveness_check_interval: must be at least five times heartbeat_frequency, {5 * heartbeat:g} s, "
            f"not {liveness:g} s"
        )
    if timing.whole_seconds and stale_after != int(stale_after):
        raise ConfigError(
            "liveness_check_interval: health_check.last_heartbeat keeps whole seconds here, so liveness_check_interval "
            f"- 2 heartbeat_frequency must be a whole number, not {liveness - 2 * heartbeat:g} s"
        )
    needed = heartbeat + 2 * timing.call_timeout + timing.margin
    if needed > stale_after:
        raise ConfigError(
            f"liveness_check_interval: {liveness:g} s leaves no time for two failed renewals and the margin: "
            f"{needed:.2f} s, but a heartbeat is stale after {stale_after:.2f} s. Lengthen it or shorten "
            "heartbeat_frequency"
        )


LEAST_RATE = 10.0  # bytes a second


class Progress:
    """Until when silence of a lease's work is fine: for `stall_timeout` seconds, for a handler `exec_timeout` longer.
    Any thread may tell."""

    def __init__(self, stall_timeout: float, exec_timeout: Optional[float]) -> None:
        self._stall_timeout = stall_timeout
        self._exec_timeout = float("inf") if exec_timeout is None else exec_timeout
        self._told = self._quiet_until = 0.0
        self._handlers: dict[int, float] = {}  # thread -> until when its handler may run
        self._received = 0

    def begin(self) -> None:
        self._told, self._quiet_until = boot_clock(), 0.0

    def tell(self, ahead: float = 0.0) -> None:
        """Work goes on; for `ahead` seconds nothing more is to be expected."""
        self._told = boot_clock()
        if ahead:
            self._quiet_until = self._told + ahead

    def received(self, count: int) -> None:
        """Bytes of files, of all workers together: below LEAST_RATE they are no progress."""
        self._received += count
        if self._received >= LEAST_RATE * self._stall_timeout:
            self._received = 0
            self.tell()

    @contextlib.contextmanager
    def handling(self, told: Callable[[float], None]) -> Iterator[None]:
        """`told` gets the seconds that it took."""
        thread, began = threading.get_ident(), boot_clock()
        self._handlers[thread] = began + self._exec_timeout
        try:
            yield
        finally:
            del self._handlers[thread]
            told(boot_clock() - began)

    def handlers(self) -> int:
        return len(self._handlers)

    def overdue(self, now: float) -> float:
        """Seconds since which silence is not fine any more."""
        return now - max([self._told, self._quiet_until, *list(self._handlers.values())]) - self._stall_timeout

    def handler_overdue(self, now: float) -> float:
        """Seconds by which a handler is over its time and `stall_timeout`."""
        return now - min(list(self._handlers.values()), default=float("inf")) - self._stall_timeout


# -- ledger -----------------------------------------------------------------------------------------------------------
QUICK = 0.2  # seconds; what fails sooner is tried once more at once


class Use(enum.IntEnum):
    """Of the ledger's connection. Locks may let readers pass and keep writers waiting."""

    OTHER = 0  # than the ledger
    READ = 1
    WRITE = 2


class LedgerTrouble:
    """Tells why the ledger cannot be used, and "" once as much as had failed is answered."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        self._tell, self._failed = tell, Use.OTHER

    @contextlib.contextmanager
    def told(self, use: Use, first_try: bool) -> Iterator[None]:
        """What is asked inside. A quick failure of a first try is not worth a word."""
        began = boot_clock()
        try:
            yield
        except RowRefused:
            raise
        except (DatabaseDown, DatabaseRefused, ConfigError) as exc:  # of a secret's file
            if not first_try or boot_clock() - began > QUICK:
                self._failed = max(self._failed, use, Use.READ)
                self._tell(f"the ledger cannot be used: {exc}")
            if isinstance(exc, ConfigError):
                raise DatabaseRefused(str(exc)) from None
            raise
        if Use.OTHER < self._failed <= use:
            self._failed = Use.OTHER
            self._tell("")


class MemoryRows:
    """The rows where `ledger = off`: what this process alone remembers."""

    def __init__(self) -> None:
        self._rows: dict[str, Row] = {}

    def rows(self, group: str, only_open: bool = False) -> Iterator[Row]:
        now = boot_clock()
        for row in list(self._rows.values()):
            if row.open or not only_open:
                yield row._replace(due=None if row.due is None else row.due - now)

    def done_count(self, group: str) -> int:
        return sum(not row.open for row in self._rows.values())

    def write(self, fence: Fence, changes: Sequence[Change]) -> list[bool]:
        return [self._change(fence.term, change) for change in changes]

    def _change(self, term: int, change: Change) -> bool:
        row = self._rows.get(change.path)
        if (row and row[1:6]) != (change.old and change.old[1:6]):
            return False
        if change.new is None:
            self._rows.pop(change.path, None)
        else:
            due = None if change.delay is None else boot_clock() + change.delay
            self._rows[change.path] = change.new._replace(term=term, due=due)
        return True

    def written(self, fence: Fence, changes: Sequence[Change]) -> list[bool]:
        return [False] * len(changes)  # a try is never left without an answer


# -- failures ---------------------------------------------------------------------------------------------------------
MOST_PAUSE = 3600.0  # seconds; no file waits longer
UNLISTED, LATER = "not listed; ", "not now since "


def marks_in(text: str) -> tuple[Marks, str]:
    """The marks that the ledger's error begins with, and its words."""
    pattern = rf"({UNLISTED})?(gone; )?(delivered; )?(?:its process ended (\d{{1,9}}) times; )?"
    pattern += rf"(?:{LATER}(\S{{20}}); )?(.*)"
    found = re.fullmatch(pattern, text, re.DOTALL)
    assert found is not None
    unlisted, gone, delivered, deaths, later, words = found.groups()
    return Marks(bool(unlisted), bool(gone), bool(delivered), int(deaths or 0), later or ""), words


def error_text(row: Row) -> str:
    """The ledger's error, as marks_in() reads it."""
    if not (row.error or any(row.marks)):
        return ""
    ended, later = f"its process ended {row.marks.deaths} times; ", f"{LATER}{row.marks.later}; "
    texts = (UNLISTED, "gone; ", "delivered; ", ended, later)
    begin = ": " if row.error and any(marks_in(f"{row.error} ")[0]) else ""  # words that would be read as marks
    return "".join(text for mark, text in zip(row.marks, texts) if mark) + begin + row.error


def with_error(row: Row, exc: BaseException) -> Row:
    """As the ledger keeps it: one line, and of a long one begin and end."""
    line = printable(" | ".join(part.strip() for part in str(exc).splitlines() if part.strip())) or reason(exc)
    later = row.marks.later or utc_second(time.time()) if isinstance(exc, TryLater) else ""
    marked = row.marked(unlisted=False, gone=isinstance(exc, FileGone), later=later)
    return marked._replace(error=shortened(line))


def foreseen(exc: Exception, path: str, copy: Optional[Copy]) -> Exception:
    """A name that this host cannot have is the file's trouble, other local errors are the host's."""
    if isinstance(exc, UnicodeError):
        return HandlerFailed(f"{path}: this host's names are in {sys.getfilesystemencoding()}, which lacks this one")
    if isinstance(exc, OSError):
        place = (
            copy.part.parent / str(exc.filename2 or copy.part.name)
            if copy
            else f"the place of the copy, {exc.filename or tempfile.tempdir or 'TMPDIR'}"
        )
        own = exc.errno in (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)
        return (HandlerFailed if own else LocalTrouble)(f"{place}: {reason(exc)}")
    if not isinstance(exc, Error):
        event("worker_failed", logging.ERROR, exc=exc, path=path, error=reason(exc))
    return exc


class Outage:
    """Why the database cannot be used, as the heartbeat and the ledger found it. Any thread may tell."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._found: dict[str, str] = {}
        self._said = 0.0
        self._backoff = Backoff(1.0, 60.0)

    def of(self, user: str) -> str:
        return self._found.get(user, "")

    def error(self) -> str:
        return self.of("heartbeat") or self.of("ledger")

    def heartbeat(self, error: Optional[Error]) -> None:
        """What the last one found."""
        if error is None:
            self._backoff.reset()
        self.note("heartbeat", str(error or ""))

    def pause(self, exc: Exception) -> float:
        """Seconds until the next heartbeat after one that failed: no failure is fatal to a running member."""
        error, wait = str(exc), self._config.heartbeat_frequency
        if isinstance(exc, (ConfigError, DatabaseRefused)):
            wait = self._backoff.next()
        elif isinstance(exc, DatabaseDown):
            wait = min(self._backoff.next(), 5.0)
        else:
            if not self.of("heartbeat"):
                event("heartbeat_failed", logging.ERROR, exc=exc, error=reason(exc))
            error = f"its answer cannot be used: {reason(exc)}"
        self.note("heartbeat", error)
        return wait

    def note(self, user: str, error: str) -> None:
        """What one of them found, "" if the database answers. Trouble is said at once, then once a minute."""
        now, group = boot_clock(), self._config.coordination_group
        with self._lock:
            was_down = bool(self._found)
            self._found.pop(user, None)
            self._found.update({user: error} if error else {})
            say = bool(error) and not (was_down and now - self._said < 60)
            self._said = now if say else self._said
        if say:
            event("database_down", logging.ERROR, group=group, error=error)
        elif was_down and not self._found:
            event("database_up", group=group, member=self._config.member_id)


class Backoff:
    """Delays that double, from `first` to `most` seconds."""

    def __init__(self, first: float, most: float) -> None:
        self.first, self.most, self.failures = first, most, 0

    def next(self) -> float:
        self.failures += 1
        return doubled(self.first, self.failures, self.most)

    def reset(self) -> None:
        self.failures = 0


# -- known versions ---------------------------------------------------------------------------------------------------
MOST_QUESTIONS = 500  # about the versions of known files, in one poll
QUESTION_SECONDS = 10.0  # that they may take


class Recognizer:
    """Which listed lines are versions that the ledger knows, where lines alone do not tell: the display of times may
    have moved, a file been replaced within the minute shown."""

    def __init__(
        self,
        ledger: Ledger,
        looking: Callable[[], contextlib.AbstractContextManager[FileServer]],
        goes_on: Callable[[], None],
    ) -> None:
        self._ledger, self._looking = ledger, looking
        self._goes_on = goes_on  # raises once there is to be no further question
        self._doubts: dict[str, tuple[float, float]] = {}  # since when, and when to ask next
        self._listing: list[Found] = []
        self._changes: list[Change] = []

    def recognize(self, listing: list[Found], busy: set[str]) -> set[str]:
        """Gives known files of a listing the ledger's time, or the exact one. The paths left for the next poll."""
        self._listing, self._changes = listing, []
        unclear: list[tuple[int, Row]] = []
        for at, (path, _, entry) in enumerate(listing):
            row = self._ledger.get(path)
            if row is None or row.mtime == entry.mtime or row.size != entry.size or path in busy:
                continue
            same = same_version(row, entry)
            if same is None or (same and row.mtime.endswith("~") and self._doubt(row)[1] <= boot_clock()):
                unclear.append((at, row))
            elif same and "=" in row.mtime and row.state != "done":  # a claim keeps it: the display may move meanwhile
                self._keep_as(at, row, row.mtime)
        exact = [(at, row) for at, row in unclear if times_of(row.mtime).exact]
        lines = [(at, row, listing[at].entry) for at, row in unclear if not times_of(row.mtime).exact]
        moves = moves_of_display([(row, entry) for _, row, entry in lines])
        for at, row, entry in lines:
            if move_of_display(row, entry) in moves or any(leads_to(move, row, entry) for move in moves):
                self._keep_as(at, row, entry.mtime)
        left = self._ask(exact) if exact else set()
        self._ledger.write_all(self._changes)
        return left

    def _doubt(self, row: Row) -> tuple[float, float]:
        """Of a file that may have been replaced within its minute."""
        age, now = time.time() - (epoch_seconds(row.mtime) or 0.0), boot_clock()
        return self._doubts.setdefault(row.path, (now, now + (0.0 if abs(age) > 60 else 2.0)))

    def _keep_as(self, at: int, row: Row, mtime: str) -> None:
        """A listed file is the version of a row: both have its exact time from now on, the file beside its line, for
        its companions' lines."""
        if not mtime.endswith("~"):
            self.forget(row.path)
        if row.state == "claimed":  # of a term that is over; its time is that of the next claim
            mtime = row.mtime
        elif mtime != row.mtime:
            delay = None if row.due is None else max(0.0, row.due - boot_clock())
            self._changes.append(Change(row, row._replace(mtime=mtime), delay))
        entry = self._listing[at].entry
        line, exact = times_of(entry.mtime).line[:SECOND], mtime.partition("=")[2]
        self._show(at, entry._replace(mtime=f"{line}={exact}" if line and exact else mtime))

    def _show(self, at: int, entry: Entry) -> None:
        self._listing[at] = self._listing[at]._replace(entry=entry)

    def _ask(self, unclear: Sequence[tuple[int, Row]]) -> set[str]:
        """Asks for exact times where known zones do not explain a line, and gives what there is no time for."""
        left: set[str] = set()
        questions, until = MOST_QUESTIONS, time.monotonic() + QUESTION_SECONDS
        with self._looking() as server:
            for at, row in unclear:
                entry, now = self._listing[at].entry, boot_clock()
                doubt = row.mtime.endswith("~")
                # Nor do zones explain a line of these days: a file may be written anew every hour.
                old = not doubt and not may_still_run(entry.mtime)
                if old and same_version(row, entry, server.habits.zones):
                    self._keep_as(at, row, row.mtime)
                    continue
                if questions == 0 or time.monotonic() > until:
                    left.update([row.path][doubt:])  # a doubt can wait
                    continue
                self._goes_on()
                questions -= 1
                since = self._doubt(row)[0]
                self._doubts[row.path] = (since, now + min(MOST_PAUSE, max(2.0, now - since)))
                told = server.exact(row.path, entry)
                if told is not None and same_version(row, told):
                    if doubt:  # while the line's minute or day may last, in any zone
                        shown = 60.0 if "T" in entry.mtime else SECONDS_A_DAY
                        late = time.time() - (epoch_seconds(told.mtime) or 0.0) - MOST_AHEAD.total_seconds()
                        doubt = max(now - since, late) < shown
                    self._keep_as(at, row, told.mtime + "~" * doubt)
                elif told is not None:
                    self._show(at, told)
        return left

    def forget(self, path: str) -> None:
        """A new version has no doubts."""
        self._doubts.pop(path, None)

    def keep(self, kept: Callable[[str], bool]) -> None:
        self._doubts = {path: doubt for path, doubt in self._doubts.copy().items() if kept(path)}


def move_of_display(row: Row, entry: Entry) -> Optional[datetime.timedelta]:
    """By what a ledger's line without its exact time differs from what is listed now, if zones can be the reason."""
    line, now = times_of(row.mtime).line, "".join(times_of(entry.mtime))
    return zone_between(line, now) if len(line) == MINUTE <= len(now) else None


def leads_to(move: datetime.timedelta, row: Row, entry: Entry) -> bool:
    """Whether it makes one line of the other where one shows the day alone: perhaps over midnight."""
    line, now = times_of(row.mtime).line, times_of(entry.mtime).line
    ends = [line] if len(line) > DAY else [f"{line}T00:00", f"{line}T23:59"]
    return min(len(line), len(now)) == DAY and now[:DAY] in [_moved(end, -move)[:DAY] for end in ends]


def moves_of_display(unclear: Sequence[tuple[Row, Entry]]) -> set[datetime.timedelta]:
    """Those that more than one file shows, and a good part of all, whose times are not of these days (those of files
    written anew are)."""
    shown = {
        (row.mtime, move_of_display(row, entry))
        for row, entry in unclear
        if not may_still_run(row.mtime) and not may_still_run(entry.mtime)
    }
    witnesses, moves = {mtime for mtime, _ in shown}, [move for _, move in shown if move is not None]
    return {move for move in set(moves) if moves.count(move) > 1 and 4 * moves.count(move) >= len(witnesses)}


def doubled(seconds: float, times: int, most: float = MOST_PAUSE) -> float:
    """The pause after so many failures in a row, twice as long each time."""
    return float(min(most, seconds * 2.0 ** min(times - 1, 30)))


class Failure(NamedTuple):
    """What becomes of a claimed file that is not done."""

    what: str  # the event
    row: Row
    due: Optional[float] = None  # in seconds, by the ledger
    pause: Optional[float] = None  # the same, as it is told
    quiet: bool = False


class Resting(NamedTuple):
    """A file that said "not now"."""

    times: int  # in a row
    alone: int  # of these, how often another file had succeeded since the one before
    successes: int  # of all files until then
    due: float  # by the member's own clock


class Breaker:
    """When what failed is tried again, and a circuit breaker for the system behind the handlers.

    Three different files in a row whose handlers say "not now" open it: claims wait. After `retry_delay`, doubled up to
    five minutes, one file is tried, each time the next in turn; the first success closes it. Outlives leases.
    """

    def __init__(self, config: Config, stats: Stats) -> None:
        self._config, self._stats = config, stats
        self._lock = threading.Lock()
        self._open_for = ""  # what the system behind said, while claims wait for it
        self._files: dict[str, Resting] = {}
        self._in_a_row: set[str] = set()
        self._successes = 0
        self._first = config.retry_delay or 1.0  # what has no end must not spin
        self._pauses = Backoff(self._first, 300.0)
        self._pause = self._due = 0.0
        self._tried: set[str] = set()
        self._trial = ""
        self.paused = False  # by an operator

    def failure(self, item: Item, exc: Exception) -> Failure:
        """Whose fault it is that a claimed file is not done, and when it is tried again."""
        row, config = item.row, self._config
        failed = with_error(row, exc)._replace(state="failed", mtime=item.mtime)
        # 1. Gone for the first time: dropped when a whole listing lacks it, too.
        if isinstance(exc, FileGone) and not row.marks.gone:
            return Failure("file_gone", failed)
        # 2. "Not now": after a pause.
        if isinstance(exc, NotNow):
            pause, tell, counts = self.refuse(row.path, exc)
            if isinstance(exc, FileChanged):  # the next claim takes the version that the line shows by then
                failed = failed._replace(mtime=times_of(row.mtime).line or row.mtime)
            if not counts:
                # What a handler refused is due at once for the next member, and for this one when another succeeds.
                due = None if isinstance(exc, TryLater) else pause
                return Failure("not_now", failed, due, pause, quiet=not tell)
        # 3. The host's or the network's: after a pause.
        if isinstance(exc, (LocalTrouble, ServerDown)):
            pause = doubled(self._first, row.attempts)
            return Failure("file_failed", failed, pause, pause)
        # 4. All else is the file's own: counted, and quarantined in the end.
        failed = failed._replace(failures=row.failures + 1)
        if failed.failures >= config.max_attempts and config.ledger:
            failed = failed._replace(state="quarantined", action=config.action(config.after_error))
            return Failure("file_quarantined", failed)
        pause = doubled(config.retry_delay, failed.failures)
        return Failure("file_failed", failed, pause, pause)

    def action_failure(self, row: Row, exc: Error) -> Failure:
        """The same of an after-action, which is tried again without end."""
        lost = isinstance(exc, ServerDown)
        pause = max(1.0, self._config.retry_delay if lost else self.refuse(row.path, NotNow())[0])
        return Failure("file_failed", with_error(row, Error(f"{row.action}: {exc}")), pause, pause)

    def refuse(self, path: str, exc: NotNow) -> tuple[float, bool, bool]:
        """The pause, whether it is to be said, and whether it counts as the file's failure: from the third time on if
        others succeed: then the system behind is not away."""
        now = boot_clock()
        with self._lock:
            last = self._files.get(path, Resting(0, 0, self._successes, now))
            alone = last.alone + (self._successes > last.successes)
            pause = doubled(self._first, last.times + 1)
            if isinstance(exc, TryLater):
                least = exc.seconds or 0.0
                pause = pause if exc.seconds is None else max(least, min(pause, 1.0))
                self._in_a_row.add(path)
                if len(self._in_a_row) >= 3 and not self._open_for:
                    self._open_for = printable(str(exc))
                    self._stats.not_now = f"{self._open_for} (since {utc_second(time.time())})"
                    self._pause, self._tried = self._pauses.next(), set(self._in_a_row)
                    event(
                        "not_now",
                        logging.WARNING,
                        group=self._config.coordination_group,
                        files=len(self._in_a_row),
                        retry_in=max(self._pause, least),
                        error=self._open_for,
                    )
                if self._open_for:
                    pause = max(self._pause, least)
                    self._due = now + pause
            self._files[path] = Resting(last.times + 1, alone, self._successes, now + pause)
            counts = isinstance(exc, TryLater) and alone >= 2
            return pause, last.times >= 2 or bool(self._open_for), counts

    def done(self, path: str) -> None:
        with self._lock:
            self._successes += 1
            self._files.pop(path, None)
            self._in_a_row.clear()
            self._trial = ""
            if not self._open_for:
                return
            self._open_for = self._stats.not_now = ""
            self._pauses.reset()
            self._tried.clear()
            self._files = {path: rest._replace(due=0.0) for path, rest in self._files.items()}
        event("not_now_over", group=self._config.coordination_group)

    def allows(self, path: str) -> bool:
        return not self.paused and (not self._open_for or path == self._trial)

    def may_try(self, path: str) -> bool:
        rest = self._files.get(path)
        return rest is None or rest.due <= boot_clock()

    def admit(self, works: Sequence[Work], busy: Callable[[str], bool]) -> list[Work]:
        """Those whose pause is over; while the breaker is open, at most one."""
        now = boot_clock()
        with self._lock:
            if self._open_for and (now < self._due or busy(self._trial)):
                return []
            rested = [work for work in works if self.may_try(work.path)]
            if not self._open_for or not rested:
                return rested
            untried = [work for work in rested if work.path not in self._tried]
            if not untried:
                self._tried.clear()
            trial = (untried or rested)[0]
            self._trial = trial.path
            self._tried.add(trial.path)
            self._pause = self._pauses.next()
            self._due = now + self._pause
            return [trial]

    def keep(self, kept: Callable[[str], bool]) -> None:
        with self._lock:
            self._files = {path: rest for path, rest in self._files.items() if kept(path)}


UNSTEADY = "it is listed again, or is another version each time it has been handled"
REMOVAL_SECONDS = 2.0  # after its answer
REDATED = "it waits as if it were being written: the server tells another time at each look"


class Unsteady:
    """Files that are another version at each look after their handling (a server tells other times each time), or one
    that was there before (two servers take turns, or it was removed and is listed). From the second in a
    row on each is handled after a pause, which doubles; from the third it is said. Outlives leases."""

    def __init__(self, config: Config, clock: Callable[[], float]) -> None:
        self._config, self._clock = config, clock
        self._files: dict[str, tuple[int, float, Optional[Row]]] = {}  # how often in a row; until when which rests
        self._before: dict[str, tuple[Row, ...]] = {}  # what these were
        self._redated: dict[str, int] = {}  # second listings in a row

    def again(self, path: str, term: int, removed: Optional[Row] = None) -> None:
        """It has been handled, and is another version."""
        times = self._files.get(path, (0, 0.0, None))[0] + 1
        pause = doubled(self._config.retry_delay or 1.0, times - 1) if times > 1 else 0.0
        pause = max(pause, REMOVAL_SECONDS) if removed else pause
        self._files[path] = times, self._clock() + pause, removed
        if times > 2:
            about = {"group": self._config.coordination_group, "term": term, "path": path}
            event("not_now", logging.WARNING, **about, retry_in=pause, error=UNSTEADY)

    def redated(self, works: Sequence[Work], listing: Sequence[Found]) -> int:
        """How many look as where a server tells the present moment: time alone differs in three second listings."""
        again = {found.path: found.entry for found in listing}
        before, self._redated = self._redated, {}
        for work in works:
            path, then, now = work.path, work.found.entry, again.get(work.path)
            if now is not None and now.size == then.size and not same_version(now, then):
                self._redated[path] = before.get(path, 0) + 1
                if self._redated[path] == 3:
                    folder, name = split_path(path)
                    event("file_refused", logging.WARNING, folder=folder, name=repr(name), reason=REDATED)
        return sum(times > 2 for times in self._redated.values())

    def claimed(self, work: Work, term: int) -> None:
        """Of what is kept, a version within the minute that the line of the one before shows; later ones are new."""
        old, entry = work.old, work.found.entry
        if old is None or old.action or work.known:
            return
        line, back = times_of(entry.mtime).line, self._was(work.path, entry)
        self._note(old)
        if back or (old.state == "done" and "" != line == times_of(old.mtime).line and old.size == entry.size):
            self.again(work.path, term)
        elif old.state == "done":
            self.over(work.path)

    def seen_again(self, row: Row) -> None:
        """What was handled is listed as it was; with a `~` nobody asked."""
        if not row.mtime.endswith("~") and not self._was(row.path, row):
            self.over(row.path)

    def _was(self, path: str, shown: Shown) -> bool:
        return bool(shown.mtime) and any(same_version(row, shown) for row in self._before.get(path, ()))

    def _note(self, row: Row) -> None:
        self._before[row.path] = (*self._before.get(row.path, ())[-3:], row)

    def removed(self, row: Row, term: int) -> None:
        """So the server says."""
        if not self._was(row.path, row):
            self.over(row.path)
        self.again(row.path, term, row)
        self._note(row)

    def over(self, path: str) -> None:
        self._files.pop(path, None)

    def pause(self, path: str, entry: Entry) -> float:
        _, until, removed = self._files.get(path, (0, 0.0, None))
        rests = removed is None or same_version(removed, entry)
        return max(0.0, until - self._clock()) if rests else 0.0

    def keep(self, kept: Callable[[str], bool]) -> None:
        for path in itertools.filterfalse(kept, self._files.keys() | self._before.keys()):
            self._before.pop(path, None)
            self.over(path)


class Yielding:
    """When a member that cannot reach the file server lets another one try: after `yield_after` polls in a row, each
    time after twice as many, lest all take turns for ever. Outlives leases."""

    def __init__(self, config: Config) -> None:
        self._first = self._needed = config.yield_after
        self._most = max(self._first, int(3600 / max(1.0, config.polling_interval)))
        self._failed = 0

    def reached(self) -> None:
        self._failed, self._needed = 0, self._first

    def not_reached(self, member: Member) -> None:
        """`yield_after = 0` never yields."""
        self._failed += 1
        why = "the file server cannot be reached from here"
        if 0 < self._needed <= self._failed and member.hand_over_to_another(why):
            self._failed, self._needed = 0, min(self._most, 2 * self._needed)


BATCH_BYTES = 1 << 20  # of a group: the first file must not wait for the last
BATCH_FILES = 64  # committed together where delivery is the folder alone
BATCH_SECONDS = 0.05  # that a completion may wait for others
KILL_AFTER = 5.0  # seconds between SIGTERM and SIGKILL


class Pace:
    """When the next poll begins: after `polling_interval`, once a round has ended when `schedule` starts the next one,
    with `run --once` at once while there is `more`. By the clock on the wall, which may be set: it is looked at each
    minute."""

    def __init__(self, config: Config) -> None:
        self._interval, self._minutes, self._since = config.polling_interval, config.minutes, 0.0
        self.more = self._goes_round = False

    def poll_begins(self) -> None:
        """A minute that comes from now on, even during the poll, starts another round."""
        self._since = time.time()

    def left(self, more: object, comes: object) -> None:
        """By the last poll: something that the next one may take, or that comes by itself."""
        self.more, self._goes_round = bool(more), bool(more or comes)

    def pauses(self, trouble: Optional[float]) -> Iterator[float]:
        """What is waited until the next poll: `trouble` if there was any."""
        if self._minutes is None or self._goes_round or trouble is not None:
            yield self._interval if trouble is None else trouble
            return
        while True:
            now = time.time()
            self._since = min(self._since, now)
            wait = self._minutes.next(self._since) - now
            if wait <= 0:
                return
            yield min(60.0, wait)


def in_parts(items: Iterable[Item], seconds: float) -> Iterator[list[Item]]:
    part, began = [], time.monotonic()
    for item in items:
        part.append(item)
        if time.monotonic() - began > seconds:
            yield part
            part, began = [], time.monotonic()
    yield part


def is_suspect(task: Task) -> bool:
    """Whether the process ended twice with this version in work: the next time counts, so it must be its own."""
    if isinstance(task, Row) or not task.old:
        return False
    died = task.attempts > 0 and task.old.state == "claimed"
    return task.marks.deaths + died >= 2


def is_done(row: Optional[Row], shown: Shown) -> bool:
    return row is not None and row.state == "done" and bool(same_version(row, shown))


class Workers:
    """The threads that do what is in their queue: after-actions first.

    A path is busy from when it is handed in until nothing more is to be done with it.
    """

    def __init__(
        self,
        number: int,
        together: bool,
        work: Callable[[list[Task]], object],
        worked: Callable[[], None],
        known: Callable[[str], Optional[Row]],
    ) -> None:
        self._number, self._together, self._work, self._worked = number, together, work, worked
        self._known = known
        self.next: dict[str, Optional[Task]] = {}  # what is to be done with a path in work after that
        self._changed = threading.Condition()  # over the next four
        self.behind: dict[str, Work] = {}  # handed in when the file of that path is done
        self.queue: deque[Task] = deque()
        self.busy: set[str] = set()
        self._ending = False
        self.alone: set[str] = set()  # files during which a group lost its connection: taken without company
        self._one_suspect = threading.Lock()  # held while a file is in work that may end the process
        self._threads: list[threading.Thread] = []

    def hand_in(self, tasks: Iterable[Task], instead: Iterable[Task] = ()) -> None:
        """Those whose path is not busy, `instead` of some that no longer are, and what was behind these."""
        with self._changed:
            self.busy.difference_update(task.path for task in instead)
            ended = [task for task in instead if isinstance(task, Work) and task.path in self.behind]
            for task in (
                *tasks,
                *(self.behind.pop(task.path) for task in ended if is_done(self._known(task.path), task.found.entry)),
            ):
                if task.path not in self.busy:
                    self.busy.add(task.path)
                    (self.queue.appendleft if isinstance(task, Row) else self.queue.append)(task)
            self._changed.notify_all()

    def hold(self, lines: bool) -> set[str]:
        """The busy paths: where they are in lines no others until the next `line_up`."""
        with self._changed:
            if lines:
                self.put_off((Row,))
            return self.busy.copy()

    def line_up(self, order: Order, listed: Iterable[Found], rows: Iterable[Row], *ready: Any) -> list[Work]:
        """What is to be handed in, and what behind it, by the busy paths as they are."""
        known = {**order.ended, **{row.path: row for row in rows}}
        with self._changed:
            first, self.behind = order.line_up(self.busy, listed, known, *ready)
            return first

    def keep(self, kept: Callable[[str], bool]) -> None:
        self.alone -= {*itertools.filterfalse(kept, self.alone.copy())}

    def put_off(self, kept: tuple[type, ...] = ()) -> None:
        """Leaves what waits, but these kinds, to the next poll."""
        with self._changed:
            self.busy.difference_update(task.path for task in self.queue if not isinstance(task, kept))
            self.behind = {}
            self.queue = deque(task for task in self.queue if isinstance(task, kept))

    def _take(self) -> list[Task]:
        """One task, or `together` a fair share of the small files that wait. Waits for it; nothing at the end."""
        with self._changed:
            while not self.queue and not self._ending:
                self._changed.wait()
            share = min(BATCH_FILES, -(-len(self.queue) // self._number))
            taken: list[Task] = []
            size = 0
            while self.queue and len(taken) < share and size < BATCH_BYTES:
                task = self.queue[0]
                alone = isinstance(task, Row) or not self._together or is_suspect(task) or task.path in self.alone
                if taken and alone:
                    break
                taken.append(self.queue.popleft())
                if isinstance(task, Row) or alone:
                    self.alone.discard(task.path)
                    break
                size += task.found.entry.size
            return taken

    def _run(self) -> None:
        while True:
            taken = self._take()
            if not taken:
                return
            with self._one_suspect if is_suspect(taken[0]) else contextlib.nullcontext():
                self._work(taken)
            self.hand_in(filter(None, [self.next.pop(task.path, None) for task in taken]), instead=taken)
            self._worked()

    def start(self) -> None:
        """Those that are missing. Raises LocalTrouble if there is none: then another host may do better."""
        while len(self._threads) < self._number:
            name = f"ftpcoord-worker-{len(self._threads)}"
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError as exc:
                if not self._threads:
                    raise LocalTrouble(f"this host gives no thread to a worker ({exc}); raise its limit") from None
                return
            self._threads.append(thread)

    def end(self) -> None:
        """Lets the threads end when they are done, and no after-action is due."""
        with self._changed:
            self._ending = True
            self.put_off((Row,))
            self._changed.notify_all()

    def join(self, seconds: float, wanted: Callable[[], bool] = lambda: True) -> bool:
        """Waits for the threads to end, as long as that is wanted; whether they have."""
        until = time.monotonic() + seconds
        while True:
            running = [thread for thread in self._threads if thread.is_alive()]
            if not running or time.monotonic() >= until or not wanted():
                return not running
            running[0].join(0.05)


LIMIT_SECONDS = 600.0  # for so long a limit on connections is taken for granted


class Pool:
    """At most `workers` connections, handed out one user at a time; none before the first use.

    A server that refuses one more while others work has a limit: for LIMIT_SECONDS as many as there are will do. One is
    made at a time, and after a refused login none for a minute, then ever longer up to an hour: accounts get locked.
    """

    def __init__(
        self, config: Config, allowed: Callable[[], object] = bool, goes_on: Callable[[], object] = bool
    ) -> None:
        self._config, self._allowed = config, allowed  # asked before each change
        self._goes_on = goes_on  # before a listing; raises once there is to be none
        self.habits = Habits()
        self.trouble: Optional[ServerDown] = None  # why there was none, the last time one was wanted
        self._changed = threading.Condition()  # over what follows
        self._all: set[FileServer] = set()
        self._idle: list[tuple[FileServer, float]] = []  # and since when
        self._connecting = self._aborted = False
        self._limit, self._limited_until = config.workers, 0.0
        self._refused, self._refused_until = ServerDown(), 0.0
        self._refusals = Backoff(60.0, 3600.0)
        self._hurry: Optional[float] = None  # seconds for a connection, once the work is to end; 0: no more of them
        self._unanswered = float("-inf")

    @contextlib.contextmanager
    def server(self, goes_on: Callable[[], object] = bool) -> Iterator[FileServer]:
        """Closed if it fails. Raises ServerDown, LoginRefused, and while all connections are in use what `goes_on`
        raises."""
        server = self._take(goes_on)
        try:
            yield server
        except (FileGone, FileRefused, NotNow, TargetExists):
            self._put(server)
            raise
        except BaseException:
            self._drop(server)
            raise
        self._put(server)

    @contextlib.contextmanager
    def looking(self) -> Iterator[FileServer]:
        """A connection for listings and questions, which a stop cuts."""
        self._goes_on()
        with self.server(self._goes_on) as server:
            server.preparing = True
            try:
                self._goes_on()  # a stop that came before that has cut nothing
                yield server
            finally:
                server.preparing = False

    def _take(self, goes_on: Callable[[], object]) -> FileServer:
        """One that rests, or a new one, or the next that is given back."""
        server: Optional[FileServer] = None
        while server is None:
            with self._changed:
                while not self._idle and not self._may_connect():
                    self._changed.wait()
                    goes_on()
                idle = self._idle.pop() if self._idle else None
                self._connecting = self._connecting or idle is None
            server = self._connect() if idle is None else self._rested(*idle)
        self.trouble = None
        return server

    def _may_connect(self) -> bool:
        if time.monotonic() > self._limited_until:
            self._limit = self._config.workers
        return not self._connecting and len(self._all) < self._limit

    def _rested(self, server: FileServer, since: float) -> Optional[FileServer]:
        """The connection, unless the server or a NAT has dropped it."""
        good, server.preparing = False, True
        try:
            good = server.quiet() and (time.monotonic() - since < 5 or server.alive())
        finally:
            server.preparing = False
            if not good:
                self._drop(server)
        return server if good else None

    def _connect(self) -> Optional[FileServer]:
        """A new connection; None if the server allows no more than there are."""
        try:
            return self._log_in()
        except (ServerDown, ConfigError) as exc:
            with self._changed:
                if self._all and not self._aborted:
                    self._limit, self._limited_until = len(self._all), time.monotonic() + LIMIT_SECONDS
                    return None
                # a key file may be back at the next try
                self.trouble = trouble = exc if isinstance(exc, ServerDown) else ServerDown(str(exc))
                self._limited_until = 0.0
            raise trouble from None
        finally:
            with self._changed:
                self._connecting = False
                self._changed.notify_all()

    def _log_in(self) -> FileServer:
        if self.refused_for() > 0:
            raise self._refused
        hurry = self._hurry
        server = new_server(self._config)
        server.habits, server.allowed = self.habits, self._allowed
        with self._changed:
            if self._aborted or self._hurry == 0:
                raise ServerDown("the connections were cut")
            self._all.add(server)
            if self._hurry is not None:
                server.hurry(self._hurry)
        try:
            server.connect()
        except BaseException as exc:
            self._drop(server)
            if isinstance(exc, LoginRefused):
                if not self._all:  # else the login is good, and one more refused
                    self._refused, self._refused_until = exc, time.monotonic() + self._refusals.next()
            elif hurry is not None:
                self._hurry = 0.0
            raise
        self._refusals.reset()
        return server

    def hurry(self, seconds: float) -> None:
        """The work is to end: a connect under way is cut, later ones get so long, and none is made after one failed."""
        with self._changed:
            self._hurry, servers = seconds, list(self._all)
            self._changed.notify_all()
        for server in servers:
            server.hurry(seconds)

    def unanswered(self) -> float:
        """When, by boot_clock, the last command that changes something was sent whose reply never came."""
        with self._changed:
            return max([self._unanswered, *(server.unanswered for server in self._all)])

    def refused_for(self) -> float:
        """Seconds until a login may be tried again."""
        return self._refused_until - time.monotonic()

    def _put(self, server: FileServer) -> None:
        with self._changed:
            self._idle.append((server, time.monotonic()))
            self._changed.notify_all()

    def _drop(self, server: FileServer) -> None:
        with contextlib.suppress(Exception):
            server.close()
        with self._changed:
            self._all.discard(server)
            self._unanswered = max(self._unanswered, server.unanswered)
            self._changed.notify_all()

    def abort(self) -> None:
        """Cuts every connection, whoever uses it; no new one is made."""
        with self._changed:
            self._aborted = True
            servers = list(self._all)
        for server in servers:
            with contextlib.suppress(Exception):
                server.abort()

    def close(self) -> None:
        for server in list(self._all):
            self._drop(server)


# ---------------------------------------------------------------------------------------------------------------------
# II.1 Databases
# ---------------------------------------------------------------------------------------------------------------------

#
# In the statements `:name` is a value, as a literal: bound parameters take pg8000 three round trips, and break poolers
# that share sessions. `$name` is one of WORDS, `$name(a, b)` one with two places. So TAKE in PostgreSQL becomes, for a
# stale lease
#
#     SELECT FROM token_holder WHERE group_id = 'g' FOR UPDATE;
#     SELECT FROM health_check WHERE group_id = 'g' AND task_id = 'a' FOR UPDATE;
#     UPDATE token_holder AS t SET task_id = 'b', term = t.term + 1
#      WHERE t.group_id = 'g' AND t.task_id = 'a' AND t.term = 7 AND EXISTS (
#            SELECT 1 FROM health_check h WHERE h.group_id = 'g' AND h.task_id = 'a'
#               AND (h.last_heartbeat = '2026-01-12 10:15:30.123456'
#                    OR '2026-01-12 10:15:30.123456' IS NULL AND h.last_heartbeat IS NULL)
#               AND (0 = 1 OR h.last_heartbeat
#                    < (CURRENT_TIMESTAMP AT TIME ZONE 'UTC') + interval '1 second' * (-28.0)))
#     RETURNING term
ANSWER_BYTES = 1 << 20  # of a login, or of one answer that is no page of a table
LEDGER_BYTES = 64 << 20
PAGE_ROWS = 5000
FIRST_PATHS = 20  # that people are told of many
TRIMMED_ROWS, TRIM_SECONDS = 1000, 60.0  # of the audit trail in one step, and between two
MOST_ITERATIONS = 1_000_000  # of SCRAM's hash: a second; servers ask for 4096
LONGEST_REASON = 500  # characters
PLAIN = "".join(chr(code) for code in range(32, 127) if chr(code) != "%")
IN_CLEAR = (
    "it asks for the password in clear, or under a key of its own, and has not proved who it is; set database_tls to "
    "verify, with database_ca_file for a private authority"
)
# What a driver's error means, and what to do: the first kind whose pattern in the dialect's FAULTS fits.
MEANINGS: dict[str, tuple[type[Error], str]] = {
    "login": (DatabaseRefused, "the login was refused"),
    "password": (DatabaseRefused, "the password was refused"),
    "database": (DatabaseRefused, "there is no such database"),
    "forbidden": (DatabaseRefused, "the user may not use this database"),
    "privilege": (
        DatabaseRefused,
        "a privilege is missing; members need SELECT, INSERT, UPDATE and DELETE on the tables",
    ),
    "table": (DatabaseRefused, "a table is missing; see `ftpcoord.py schema {}`"),
    "form": (
        DatabaseRefused,
        "a table lacks a column or key, or types or collations differ; compare it with `ftpcoord.py schema {}`",
    ),
    "certificate": (DatabaseRefused, "its certificate is not trusted; set database_ca_file"),
    "tls": (
        DatabaseRefused,
        "no TLS that can be trusted; set database_ca_file, or database_tls to prefer or disable if the network is "
        "trusted",
    ),
    "secret": (DatabaseRefused, "this login needs TLS, `pip install cryptography` or a right password"),
    "file": (DatabaseRefused, "members need the file and its folder writable"),
    "row": (RowRefused, ""),
    "busy": (DatabaseBusy, ""),
    "read-only": (DatabaseDown, "has become read-only"),
    "garbled": (DatabaseDown, "its answer cannot be understood"),
    "other": (DatabaseDown, ""),
}
GARBLED = "UnicodeDecode|AttributeError|(Lookup|Index|Key)Error|TypeError|error |AssertionError"
# The columns of `:changes`: what a change makes of a row, and of which.
NEW = ("path", "size", "mtime", "state", "attempts", "failures", "action", "error")
OLD = ("size", "mtime", "state", "term", "attempts")
NEW_OF, OLD_OF, NO_ROW = attrgetter(*NEW), attrgetter(*OLD), Row("", 0, "", "", 0, 0, 0)
COLUMNS = ("id", *(f"new_{name}" for name in NEW), "delay", *(f"old_{name}" for name in OLD), "old_acts")
STEP_DOWN = "step-down:"  # health_check.task_id of a request to release the lease of a term: step-down:<term>
PAUSE = "pause:"  # ... of an operator's pause of a group: pause:<UTC end or 0>:<user@host>, since last_heartbeat
RESERVED = (STEP_DOWN, PAUSE)  # what begins so is no member's id
LONGEST_DELAY = 36525 * SECONDS_A_DAY  # databases know no dates after the year 9999
OPTIONAL = {"file_ledger": "ledger", "file_audit": "audit"}  # tables, and the settings that need them
TRAIL = ("path", "size", "mtime", "sha256", "outcome", "term", "task_id", "attempt", "seconds", "error")
AUDITED = ("outcome", "sha256", "seconds", "words")  # with audit = on
# The columns as PostgreSQL and SQLite take them; token_holder and health_check are those of the WSO2 Integrator.
TABLES = {
    "token_holder": """
    group_id VARCHAR(128) NOT NULL PRIMARY KEY,
    task_id VARCHAR(128) NOT NULL,
    term BIGINT NOT NULL DEFAULT 1
""",
    "health_check": """
    task_id VARCHAR(128) NOT NULL,
    group_id VARCHAR(128) NOT NULL,
    last_heartbeat TIMESTAMP NOT NULL,
    PRIMARY KEY (task_id, group_id)
""",
    "file_ledger": """
    group_id VARCHAR(128) NOT NULL,
    file_id CHAR(64) NOT NULL,
    path TEXT NOT NULL,
    size BIGINT NOT NULL,
    mtime VARCHAR(32) NOT NULL,
    state VARCHAR(16) NOT NULL,
    term BIGINT NOT NULL,
    task_id VARCHAR(128) NOT NULL,
    attempts INTEGER NOT NULL,
    failures INTEGER NOT NULL,
    next_attempt_at TIMESTAMP,
    updated_at TIMESTAMP NOT NULL,
    error TEXT NOT NULL,
    action TEXT NOT NULL,
    PRIMARY KEY (group_id, file_id)
""",
    "file_audit": """
    group_id VARCHAR(128) NOT NULL,
    file_id CHAR(64) NOT NULL,
    at TIMESTAMP NOT NULL,
    path TEXT NOT NULL,
    size BIGINT NOT NULL,
    mtime VARCHAR(32) NOT NULL,
    sha256 VARCHAR(64) NOT NULL,
    outcome VARCHAR(16) NOT NULL,
    term BIGINT NOT NULL,
    task_id VARCHAR(128) NOT NULL,
    attempt INTEGER NOT NULL,
    seconds DOUBLE PRECISION,
    error TEXT NOT NULL,
    PRIMARY KEY (group_id, file_id, at, term, attempt, outcome),
    UNIQUE (group_id, at, file_id, term, attempt, outcome),
    UNIQUE (group_id, sha256, file_id, at, term, attempt, outcome)
""",
}


def ddl(mysql: bool) -> dict[str, str]:
    """The CREATE statements. In MySQL keys are compared byte by byte, and times have fractions."""
    made = {table: f"CREATE TABLE IF NOT EXISTS {table} ({columns})" for table, columns in TABLES.items()}
    if mysql:
        for table, text in made.items():
            text = re.sub(r"\w*CHAR\(\d+\)", r"\g<0> CHARACTER SET ascii COLLATE ascii_bin", text)
            text = text.replace("TIMESTAMP", "DATETIME(6)")
            made[table] = f"{text} ENGINE=InnoDB CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
    return made


SCHEMA = """\
-- The tables of ftpcoord: psql -f schema.sql, mysql DATABASE < schema.sql, sqlite3 FILE < schema.sql.
-- MySQL and MariaDB run what stands in /*!50600 ... */ and then skip the plain form; the others see comments.
-- token_holder and health_check of the WSO2 Integrator documentation serve as they are: then only file_ledger is new.
-- file_audit is for audit = on.
""" + "".join(f"\n/*!50600 {own} */;\n\n{plain};\n" for own, plain in zip(ddl(True).values(), ddl(False).values()))


class Allowance:
    """What the peer may cost in one call, in time and in bytes."""

    def __init__(self) -> None:
        self._until, self._bytes = 0.0, 0
        self.share = 1  # of the addresses that may have to be tried yet

    def renew(self, seconds: float, size: int) -> None:
        self._until, self._bytes = boot_clock() + seconds, size

    def left(self) -> float:
        seconds = self._until - boot_clock()
        if seconds <= 0:
            raise socket.timeout("timed out")
        return seconds

    def spend(self, announced: int, received: int = 0) -> None:
        """Drivers take memory for what is announced at once."""
        if not 0 <= announced <= self._bytes:
            raise OSError(errno.EMSGSIZE, "the server sends without end")
        self._bytes -= received

    def metered(self, base: Any) -> Any:
        allowance = self

        class Stream(io.BufferedRWPair):
            def read(self, size: Optional[int] = -1, /) -> bytes:
                allowance.spend(-1 if size is None else size)
                return super().read(size)

        class Metered(base):  # type: ignore[misc]
            def recv_into(self, *args: Any) -> int:
                self.settimeout(allowance.left())
                size: int = super().recv_into(*args)
                allowance.spend(size, size)
                return size

            def send(self, *args: Any) -> int:
                self.settimeout(allowance.left())
                return int(super().send(*args))

            def sendall(self, *args: Any) -> None:
                self.settimeout(allowance.left())
                super().sendall(*args)

            def makefile(self, *args: Any, **more: Any) -> Any:
                raw = super().makefile("rwb", buffering=0)
                return Stream(raw, raw)

            def close(self) -> None:
                with contextlib.suppress(OSError):  # now, whoever still holds the stream
                    socket.socket.shutdown(self, socket.SHUT_RDWR)
                super().close()

        return Metered

    def connect(self, address: Any) -> Any:
        sock = socket.create_connection(address, self.left() / self.share)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        metered = self.metered(socket.socket)(sock.family, sock.type, sock.proto, sock.detach())
        metered.settimeout(self.left())
        return metered


def guarded(base: Any, method: str) -> Any:
    """A driver's class whose `method` is to be overridden."""
    if not callable(getattr(base, method, None)):
        raise DatabaseRefused(f"{base.__module__} has no {method}: this version of the driver cannot be guarded")
    return base


class Database(abc.ABC):
    """One connection to the shared database, opened when needed; used by one thread at a time."""

    name: ClassVar[str]
    least_timeout: ClassVar[float]
    FOUND_TABLES: ClassVar[str]  # and what must be altered in them
    HEARTBEAT_TYPE: ClassVar[str]
    FAULTS: ClassVar[dict[str, str]]  # kind: how code and text of a driver's error begin
    TYPES: ClassVar[dict[str, str]] = {}  # of COLUMNS

    # The election. FIRST and the TAKEs win the token; SEAT and then RENEW, if it is still so, make the lease. A member
    # that dies between them costs the group one S; one stopped inside a transaction would cost more.
    BEAT = """
        $beat_of (SELECT 1 AS one) o
         WHERE NOT EXISTS (SELECT 1 FROM token_holder WHERE group_id = :group AND task_id = :member)
            $or_update last_heartbeat =
               CASE WHEN health_check.last_heartbeat > $now THEN health_check.last_heartbeat ELSE $now END"""
    LOOK = """
        SELECT t.task_id, t.term, t.task_id = :member, $stamp, $age, $epoch($utc), h.last_heartbeat = $released
          FROM (SELECT 1 AS one) o LEFT JOIN token_holder t ON t.group_id = :group LEFT JOIN $his_row"""
    FIRST = """
        INSERT INTO token_holder (group_id, task_id, term) VALUES (:group, :member, $first_term)
        $ignore(group_id) $won"""
    TAKE = """
        $lock(:holder) UPDATE token_holder AS t SET task_id = :member, term = t.term + 1
         WHERE $seen AND EXISTS (
               SELECT 1 FROM health_check h WHERE h.group_id = :group AND h.task_id = :holder AND $as_seen)
        RETURNING term"""
    TAKE_ABSENT = """
        $lock(:holder) UPDATE token_holder AS t SET task_id = :member, term = $tell(t.term + 1)
         WHERE $seen AND (1 = :own OR NOT EXISTS (
               SELECT 1 FROM health_check WHERE group_id = :group AND task_id = :holder)) $won"""
    SEAT = "$beat_of token_holder t WHERE $held $or_update last_heartbeat = $now"
    # Gives twice the term, plus one if a request to step down is there; beginning with the count it is BIGINT.
    RENEW = """
        $lock(:member) UPDATE health_check AS h SET last_heartbeat = $moved
         WHERE group_id = :group AND task_id = :member AND EXISTS (SELECT 1 FROM token_holder t WHERE $renewable)
        RETURNING (
               SELECT COUNT(*) FROM health_check r WHERE r.group_id = :group AND r.task_id = :request
               ) + :term + :term"""
    RELEASE = RENEW.replace("$moved", "$released")
    LEAVE = """
        DELETE FROM health_check WHERE group_id = :group AND task_id = :member
           AND EXISTS (SELECT 1 FROM token_holder WHERE group_id = :group AND task_id <> :member)"""
    SWEEP = f"""
        DELETE FROM health_check
         WHERE group_id = :group AND task_id <> :member AND task_id NOT LIKE '{PAUSE}%' AND $age > 86400
           AND NOT EXISTS (
               SELECT 1 FROM token_holder t WHERE t.group_id = :group AND t.task_id = health_check.task_id)"""
    LAST_TERM = "SELECT COALESCE(MAX(term), 0) FROM file_ledger WHERE group_id = :group"
    MEMBERS = """
        SELECT task_id, $age, CASE WHEN last_heartbeat = $released THEN 1 ELSE 0 END, $stamp
          FROM health_check h WHERE group_id = :group ORDER BY task_id"""
    TOKEN = "SELECT task_id, term FROM token_holder WHERE group_id = :group"
    GROUPS = "SELECT t.group_id, $age FROM token_holder t LEFT JOIN $his_row"
    IDS = """
        SELECT task_id, group_id FROM health_check WHERE group_id = :group AND task_id = :member
        UNION ALL SELECT :member, group_id FROM token_holder WHERE group_id = :group"""
    ASK = """
        INSERT INTO health_check (task_id, group_id, last_heartbeat) VALUES (:request, :group, $now)
        $ignore(task_id,group_id)"""
    UNASK = "DELETE FROM health_check WHERE group_id = :group AND task_id = :request"
    PAUSES = f"""
        SELECT h.task_id, $epoch(h.last_heartbeat), $epoch($utc) FROM (SELECT 1 AS one) o
          LEFT JOIN health_check h ON h.group_id = :group AND h.task_id LIKE '{PAUSE}%' ORDER BY h.last_heartbeat"""

    # The outcomes of `:changes`: in one transaction with the ledger's statement, ahead of it and under its conditions.
    # What they find they lock: both are made, or none.
    NOTE = """
        $note $fence, $those, file_ledger l WHERE l.group_id = v.group_id AND $same AND outcome <> '' $keep"""
    NOTE_NEW = """
        $lock(:member) $note $fence, (:changes) v LEFT JOIN file_ledger l ON l.group_id = :group AND l.file_id = v.id
         WHERE l.file_id IS NULL AND outcome <> ''"""
    NOTE_ADOPTED = NOTE_NEW.replace("$fence", "$unfenced")
    NOTE_TOLD = NOTE.replace("$fence", "$unfenced").replace("$same", "file_id = v.id AND $as_read")
    HISTORY = f"""
        SELECT file_id, CAST(at AS $text), {", ".join(TRAIL)} FROM file_audit
         WHERE group_id = :group AND at >= :at AND (
               at > :at OR (file_id, term, attempt, outcome) > (:file_id, :term, :attempt, :outcome))
         ORDER BY at, file_id, term, attempt, outcome LIMIT {PAGE_ROWS}"""
    AUDITED_SINCE = """
        SELECT $epoch($utc), $epoch(began) FROM (SELECT MIN(at) AS began FROM file_audit WHERE group_id = :group) f"""
    CAME = """
        SELECT $epoch(at), path, file_id, term FROM file_audit a
         WHERE group_id = :group AND at >= :since AND outcome IN ('done', 'skipped') AND path LIKE :like
           AND NOT EXISTS (
               SELECT 1 FROM file_audit b
                WHERE b.group_id = a.group_id AND b.file_id = a.file_id AND b.size = a.size AND b.mtime = a.mtime
                  AND b.outcome IN ('done', 'skipped') AND b.at < a.at)"""
    ALARMS = """
        SELECT $epoch(at), outcome, term, error FROM file_audit
         WHERE group_id = :group AND file_id = :file_id AND at >= :since"""
    ALARM = """
        $audit :group, :file_id, :by, :path, 0, '', '', :outcome, term, :member, 0, :seconds, :error FROM $fence
         WHERE NOT EXISTS (
               SELECT 1 FROM file_audit
                WHERE group_id = :group AND file_id = :file_id AND at = :by AND outcome = :outcome)"""
    TRIM = f"""
        DELETE FROM file_audit WHERE group_id = :group AND at <= (SELECT MAX(at) FROM (
               SELECT at FROM file_audit WHERE group_id = :group AND at < $shifted($utc, -:age)
                ORDER BY at LIMIT {TRIMMED_ROWS}) AS oldest)"""

    # The ledger. `:changes` is a table of COLUMNS.
    CLAIM = f"""
        INSERT INTO file_ledger (group_id, file_id, term, task_id, updated_at, {", ".join(NEW)})
        SELECT :group, id, term, :member, $utc, {", ".join(COLUMNS[1:9])} FROM $fence, (:changes) v WHERE 1 = 1
        $ignore(group_id,file_id) $made"""
    CHANGE = """
        UPDATE file_ledger AS l SET $set(), term = mine.term, task_id = :member
          FROM $fence, $those WHERE l.group_id = v.group_id AND $same $made"""
    FORGET = f"""
        DELETE FROM file_ledger AS l
         WHERE group_id = :group AND (file_id, {", ".join(OLD)}, $acts) IN (
               SELECT id, {", ".join(COLUMNS[10:])} FROM $fence, (:changes) v) $made"""
    ADOPT = CLAIM.replace("$fence", "$unfenced")
    RETRY = """
        UPDATE file_ledger SET state = 'failed', failures = 0, action = '', next_attempt_at = $utc, updated_at = $utc
         WHERE group_id = :group AND $as_read"""
    SKIP = """
        UPDATE file_ledger SET state = 'done', action = '', error = '', next_attempt_at = NULL, updated_at = $utc
         WHERE group_id = :group AND $as_read"""
    IN_LEDGER = "SELECT 1 FROM file_ledger WHERE group_id = :group LIMIT 1"
    PAGE = f"""
        SELECT file_id, path, size, mtime, state, term, attempts, failures, action,
               CASE WHEN updated_at <= $utc THEN $seconds($utc, next_attempt_at) END, error
          FROM file_ledger
         WHERE group_id = :group AND file_id > :after AND (1 = :all OR state <> 'done' OR action <> '')
         ORDER BY file_id LIMIT {PAGE_ROWS}"""
    STANDING = """
        SELECT file_id, size, mtime, state, term, attempts, failures, action FROM file_ledger
         WHERE group_id = :group AND file_id IN :ids"""
    DONE_COUNT = "SELECT COUNT(*) FROM file_ledger WHERE group_id = :group AND state = 'done' AND action = ''"
    COUNTS = f"""
        SELECT state, CASE WHEN state <> 'done' AND error LIKE '{UNLISTED}%' THEN 1 ELSE 0 END AS unlisted, COUNT(*)
          FROM file_ledger WHERE group_id = :group GROUP BY state, unlisted"""
    ACTIVITY = """
        SELECT MAX(CASE WHEN term = :term THEN $since END), MIN($since) FROM file_ledger WHERE group_id = :group"""
    NOT_NOW = f"""
        SELECT error, path, file_id FROM file_ledger
         WHERE group_id = :group AND state IN ('failed', 'claimed') AND error LIKE '%{LATER}%' LIMIT {PAGE_ROWS}"""
    ERRORS = """
        SELECT file_id, path, state, attempts, error, $since FROM file_ledger WHERE group_id = :group AND error <> ''
         ORDER BY CASE WHEN state = 'quarantined' THEN 0 ELSE 1 END, updated_at DESC LIMIT 20"""

    WORDS: ClassVar[dict[str, str]] = {  # and now, tick, which depend on the heartbeat column
        # Where somebody else wrote NULL, infinity or a date beyond all others, a renewal that is carried out late could
        # leave a time older than the last one.
        "renewable": "$held AND h.last_heartbeat < '9999-01-01'",
        "held": "t.group_id = :group AND t.task_id = :member AND t.term = :term",
        "seen": "t.group_id = :group AND t.task_id = :holder AND t.term = :old_term",
        "as_seen": "(h.last_heartbeat = :stamp OR :stamp IS NULL AND h.last_heartbeat IS NULL) "
        "AND (0 = :aged OR h.last_heartbeat < $shifted($now, -:stale_after))",
        "his_row": "health_check h ON h.group_id = t.group_id AND h.task_id = t.task_id",
        "beat_of": "INSERT INTO health_check (task_id, group_id, last_heartbeat) SELECT :member, :group, $now FROM",
        "moved": "CASE WHEN h.last_heartbeat > $now THEN $shifted(h.last_heartbeat, $tick) ELSE $now END",
        "stamp": "CASE WHEN h.task_id IS NOT NULL THEN COALESCE(CAST(h.last_heartbeat AS $text), '') END",
        "seconds": "$epoch({1}) - $epoch({0})",
        "age": "$seconds(last_heartbeat, $now)",
        "since": "$seconds(updated_at, $utc)",
        "released": "'1970-01-01 00:00:01'",
        "fence": "(SELECT term FROM token_holder t WHERE $held $update) mine",
        "unfenced": "(SELECT 0 AS term) mine",
        "audit": f"INSERT INTO file_audit (group_id, file_id, at, {', '.join(TRAIL)}) SELECT",
        "note": "$audit :group, v.id, $utc, new_path, $of(size), $of(mtime), sha256, outcome, "
        "$attempt(l.term, mine.term), $attempt(l.task_id, :by), $of(attempts), seconds, words FROM",
        "of": "$lost(l.{0}, new_{0})",
        "lost": "CASE outcome WHEN 'lost' THEN {0} ELSE {1} END",
        "attempt": "CASE l.state WHEN 'claimed' THEN {0} ELSE {1} END",  # whose it was
        "as_read": "file_id = :file_id AND state = :state AND action = :action AND size = :size AND mtime = :mtime "
        "AND attempts = :attempts",
        "those": "(SELECT :group AS group_id, r.* FROM (:changes) r) v",
        "same": " AND ".join(["file_id = v.id", *(f"l.{name} = old_{name}" for name in OLD), "$acts = old_acts"]),
        "acts": "CASE l.action WHEN '' THEN 0 ELSE 1 END",
        "set": ", ".join(f"{{0}}{name} = new_{name}" for name in NEW[1:])
        + ", {0}updated_at = $utc, {0}next_attempt_at = $shifted($utc, delay)",
        "first_term": "CASE WHEN 1 = :timed AND $second >= :term THEN $second + 1 ELSE :term END",
        "ignore": "ON CONFLICT ({0}) DO NOTHING",
        "or_update": "ON CONFLICT (task_id, group_id) DO UPDATE SET",
        "won": "RETURNING term",
        "made": "RETURNING file_id",
        "tell": "{0}",  # brings its value back to the client
        "lock": "",
        "update": "",
        "keep": "",
        "text": "text",
    }

    def __init__(self, config: Config) -> None:
        self.config = config
        self.prepared = False
        self.connection: Any = None
        self.allowance = Allowance()
        self._refusal: tuple[float, Error] = (0.0, DatabaseDown())  # of a login, until when it stands
        self.where = without_password(config.database)
        self.path = config.place(config.endpoint.name)  # of SQLite's file
        self.columns = COLUMNS + AUDITED * config.audit
        self._keep_heartbeats(6, "")

    # -- what each dialect does in its own way ------------------------------------------------------------------------

    @abc.abstractmethod
    def _open(self, host: str, address: Any) -> None:
        """Logs in to one server. Raises what the driver raises, or DatabaseDown: nothing can be written there."""

    @abc.abstractmethod
    def _run(self, sql: str, note: str = "") -> list[Sequence[Any]]:
        """Runs both as one transaction and gives the rows of `sql`. Raises what the driver raises."""

    def _said(self, exc: BaseException) -> tuple[str, str]:
        """Code and text."""
        return type(exc).__name__, reason(exc)

    def _now(self, digits: int, column_type: str) -> str:
        """The present time, in the heartbeat column's precision."""
        return "$utc"

    def literal(self, value: Any) -> str:
        """As SQL text. Strings hold no NUL; backslashes are plain."""
        if isinstance(value, str):
            return "'" + value.replace("'", "''") + "'"
        if value is None or isinstance(value, (int, float)):
            return "NULL" if value is None else repr(value + 0)
        return self._table(value) if isinstance(value[0], Change) else f"({', '.join(map(self.literal, value))})"

    def _table(self, changes: list[Change]) -> str:
        row = "SELECT " + ", ".join(f"{self.TYPES.get(name, '%s')} AS {name}" for name in self.columns)
        return " UNION ALL ".join(row % self._columns(change) for change in changes)

    def _columns(self, change: Change) -> tuple[object, ...]:
        old, path = change.old or NO_ROW, printable(change.path)
        new = change.new or old
        new = new._replace(error=self._error_text(change, error_text(new)))
        if change.plain:
            path, action = plain(change.path), new.action if new.action.isascii() else "%" + plain(new.action)
            new = new._replace(action=action)
        delay = None if change.delay is None else min(change.delay, LONGEST_DELAY)
        fields = (path, *NEW_OF(new)[1:], delay, *OLD_OF(old), int(old.action != ""))
        if self.config.audit:
            told = change.outcome or Outcome("")
            fields += (*told[:3], self._error_text(change, told.words))
        values = sha256_text(change.path), *fields
        return tuple([value if type(value) is int else self.literal(value) for value in values])

    @staticmethod
    def _error_text(change: Change, text: str) -> str:
        text = plain(printable(text)) if change.plain and not text.isascii() else text
        return text[:60] if change.plain > 1 else text  # for a short column

    # -- running statements -------------------------------------------------------------------------------------------

    def clone(self) -> Database:
        """Another connection to the same database."""
        other = type(self)(self.config)
        vars(other).update(vars(self), connection=None, allowance=Allowance())
        return other

    def close(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.close()

    def execute(self, sql: str, **values: object) -> list[Sequence[Any]]:
        """Runs one statement in time T, ahead of it `note`; connects if need be.

        Raises DatabaseDown, DatabaseBusy or DatabaseRefused. After all but DatabaseBusy the connection is given up.
        """
        idle, began = self.connection is not None, boot_clock()
        try:
            if not idle:
                self._connect()
            many = "file_" in sql or sql in (self.MEMBERS, self.GROUPS)
            self.allowance.renew(self.timing.call_timeout, LEDGER_BYTES if many else ANSWER_BYTES)
            return self._run(self._bind(sql, values), self._bind(str(values.get("note", "")), values))
        except ConfigError:
            self.close()
            raise
        except Exception as exc:
            error = self._error(exc)
        if isinstance(error, RowRefused) and "by" not in values:  # of no change
            error = DatabaseBusy(str(error))
        if not isinstance(error, DatabaseBusy):
            self.close()
        # Servers drop connections that idle: what may be done twice is, without a word. Time-outs are told.
        once = sql in (self.FIRST, self.TAKE, self.TAKE_ABSENT, self.SEAT, self.CLAIM, self.CHANGE, self.FORGET)
        quick = boot_clock() - began < self.timing.call_timeout / 4
        if idle and quick and not once and isinstance(error, DatabaseDown) and self.connection is None:
            return self.execute(sql, **values)
        raise type(error)(f"database {self.where}: {error}")

    def _connect(self) -> None:
        """Not for T after a refusal: many lock an account."""
        until, error = self._refusal
        if boot_clock() < until:
            raise error.with_traceback(None)
        problems: list[Error] = []
        for host, port in self.config.endpoint.hosts or (("", 0),):
            self.allowance.renew(self.timing.call_timeout, ANSWER_BYTES)
            for address in self._addresses(host, port):
                try:
                    return self._open(host, address)
                except ConfigError:
                    raise
                except Exception as exc:
                    error = self._error(exc)
                    problems.append(type(error)(f"{host}:{port}: {error}") if host else error)
                self.close()
                if isinstance(error, DatabaseRefused):
                    break
        refused = [isinstance(problem, DatabaseRefused) for problem in problems]
        error = (DatabaseRefused if all(refused) else DatabaseDown)("; ".join(dict.fromkeys(map(str, problems))))
        if any(refused):
            self._refusal = boot_clock() + self.timing.call_timeout, error
        raise error

    def _addresses(self, host: str, port: int) -> Iterator[Any]:
        """Behind one name may stand replicas, too."""
        found: list[tuple[str, Any]] = [(host, port)]
        with contextlib.suppress(OSError, UnicodeError):  # the connect says why
            known = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM) if host else ()
            # With the interface, where an address is link-local.
            numeric = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
            found = [socket.getnameinfo(each[4], numeric) for each in known] or found
        for self.allowance.share in range(len(found), 0, -1):
            yield found[-self.allowance.share]

    def _tls(self) -> ssl.SSLContext:
        config = self.config
        ca_file = config.place(config.database_ca_file)
        context = tls_context("database_ca_file", ca_file, config.database_tls == "verify")
        context.sslsocket_class = self.allowance.metered(ssl.SSLSocket)
        return context

    def _error(self, exc: Exception) -> Error:
        if isinstance(exc, Error):
            return exc
        code, text = self._said(exc)
        text = " ".join(text.split())[:LONGEST_REASON]
        if isinstance(exc.__cause__ or exc, (TimeoutError, socket.timeout)):  # it may be wrapped as a network error
            text = f"no answer within {self.timing.call_timeout:g} s"
        faults = {**self.FAULTS, "garbled": GARBLED}
        kind = next((kind for kind, begins in faults.items() if re.match(begins, f"{code} {text}")), "other")
        error, words = MEANINGS[kind]
        return error(f"{words.format(self.name)} ({text})" if words else text)

    def _bind(self, sql: str, values: Mapping[str, object]) -> str:
        """What was put in is not looked at again: a file may be named `:group`."""
        text = self._texts.get(sql) or self._texts.setdefault(sql, self._expanded(sql))
        return re.sub(r"(?<![:\w]):([a-z_]+)", lambda m: self.literal(values[m[1]]), text)

    def _expanded(self, text: str) -> str:
        def word(found: re.Match[str]) -> str:
            return self._expanded(self._words[found[1]].format(*(found[2] or "").split(", ")))

        return re.sub(r"\$(\w+)(?:\(([^()]*)\))?", word, text)

    def _keep_heartbeats(self, digits: int, column_type: str) -> None:
        config, whole = self.config, digits < 3
        self.timing = Timing(config.heartbeat_frequency, config.liveness_check_interval, self.least_timeout, whole)
        now = self._now(0 if whole else digits, column_type)
        self._words = {**self.WORDS, "now": now, "tick": "1" if whole else "0.001"}
        self._texts: dict[str, str] = {}  # of statements

    def _missing(self) -> dict[str, str]:
        present = {row[0] for row in self.execute(self.FOUND_TABLES)}
        return {table: text for table, text in ddl(self.name == "mysql").items() if table not in present}

    def prepare(self) -> Timing:
        """Checks the tables, once; the timing that follows from the heartbeat column's precision.

        Raises DatabaseRefused with the DDL of what is missing.
        """
        if self.prepared:
            return self.timing
        unused = {table for table, setting in OPTIONAL.items() if not getattr(self.config, setting)}
        missing = {table: text for table, text in self._missing().items() if table not in unused}
        if missing:
            switch = OPTIONAL.get(", ".join(missing))
            hint = f" (or set {switch} = off)" if switch else ""
            statements = ";\n".join(missing.values())
            raise DatabaseRefused(
                f"database {self.where}: table {', '.join(missing)} is missing; create it{hint} with "
                f"`ftpcoord.py schema {self.name} --apply` or with\n{statements};"
            )
        for table, change in self.execute(self.FOUND_TABLES):
            if change and table not in unused:  # else it may be another application's
                change = f"ALTER TABLE {table} {change}"
                raise DatabaseRefused(f"database {self.where}: rows could be lost or stand there twice; {change}")
        kind = str((self.execute(self.HEARTBEAT_TYPE) or [["missing"]])[0][0]).lower()
        if not kind.startswith(("timestamp", "datetime")):
            raise DatabaseRefused(
                f"database {self.where}: health_check.last_heartbeat is {kind}, no TIMESTAMP or DATETIME"
            )
        named = re.search(r"\((\d)\)", kind)
        self._keep_heartbeats(int(named[1]) if named else 0 if kind in ("datetime", "timestamp") else 6, kind)
        self.prepared = True
        return self.timing

    def apply_schema(self) -> list[str]:
        """Creates the tables that are missing and names them."""
        missing = self._missing()
        for statement in missing.values():
            self.execute(statement)
        return list(missing)

    def settle_group(self, config: Config) -> None:
        """The text of a default group, for which older versions took the URL's own.

        Members whose URLs spell one folder differently agree on what token or else ledger have: the group with a living
        holder, else their own spelling, else any; a new one has the normal form.
        """
        if not config._spelling:
            return
        scheme, rest = config._spelling.split(":", 1)
        schemes, normal = (scheme, {"ftp": "ftpes", "ftpes": "ftp"}.get(scheme, scheme)), config.coordination_group
        own = [*(group_id(f"{each}:{rest}") for each in schemes), normal]
        known = [
            (age is None or age > self.timing.stale_after, own.index(group) if group in own else len(own), group)
            for group, age in self.execute(self.GROUPS)
            if group in own or group_id(normal_group(group)) == normal
        ]
        if not known and self.config.ledger:
            known = [(True, own.index(group), group) for group in own if self.execute(self.IN_LEDGER, group=group)]
        config.coordination_group, config._spelling = min(known)[2] if known else normal, ""

    def check_ids(self, group: str, member: str) -> None:
        """Raises DatabaseRefused if the database takes one id for another."""
        for found in map(tuple, self.execute(self.IDS, group=group, member=member)):
            if found != (member, group):
                raise DatabaseRefused(
                    f"database {self.where}: the collation of its tables takes {found} for {(member, group)}; give the "
                    f"id columns of token_holder and health_check a binary collation, or choose ids that differ in more"
                )

    # -- the election's verbs: see Store ------------------------------------------------------------------------------

    def look(self, group: str, member: str) -> View:
        sent = boot_clock()
        if self.BEAT:
            self.execute(self.BEAT, group=group, member=member)
        holder, term, mine, stamp, age, now, released = self.execute(self.LOOK, group=group, member=member)[0]
        took = boot_clock() - sent
        if mine and holder != member:
            self.check_ids(group, member)
        return View(holder, int(term or 0), bool(mine), stamp, _number(age), float(now), took, bool(released))

    def first(self, group: str, member: str, term: int, timed: bool = False) -> Optional[int]:
        rows = self.execute(self.FIRST, group=group, member=member, term=term, timed=int(timed))
        return self._seated(group, member, rows)

    def take(self, group: str, member: str, seen: View, stale_after: float, why: str) -> Optional[int]:
        sql = self.TAKE_ABSENT if why in ("absent", "own") else self.TAKE
        rows = self.execute(
            sql,
            group=group,
            member=member,
            holder=seen.holder,
            old_term=seen.term,
            stamp=seen.stamp or None,
            stale_after=stale_after,
            aged=why == "stale",
            own=why == "own",
        )
        return self._seated(group, member, rows)

    def _seated(self, group: str, member: str, won: Sequence[Sequence[Any]]) -> Optional[int]:
        """Makes the lease, and tells its term."""
        term = int(won[0][0]) if won else 0  # MySQL's FIRST tells 0 if it lost
        if term:
            self.execute(self.SEAT, group=group, member=member, term=term)
        return term if term and self.renew(group, member, term).held else None

    def renew(self, group: str, member: str, term: int) -> Renewal:
        rows = self.execute(self.RENEW, group=group, member=member, term=term, request=f"{STEP_DOWN}{term}")
        return Renewal(True, bool(rows[0][0] % 2)) if rows and rows[0][0] // 2 == term else Renewal(False)

    def release(self, group: str, member: str, term: int) -> None:
        self.execute(self.RELEASE, group=group, member=member, term=term, request="")

    def leave(self, group: str, member: str) -> None:
        self.execute(self.LEAVE, group=group, member=member)

    def sweep(self, group: str, member: str) -> None:
        self.execute(self.SWEEP, group=group, member=member)

    def last_term(self, group: str) -> int:
        return int(self.execute(self.LAST_TERM, group=group)[0][0]) if self.config.ledger else 0

    def members(self, group: str) -> list[MemberRow]:
        rows = self.execute(self.MEMBERS, group=group)
        return [
            MemberRow(member, LONGEST_DELAY if age is None else float(age), bool(released), stamp)
            for member, age, released, stamp in rows
            if not member.startswith(RESERVED)
        ]

    # -- the ledger's verbs: see Rows ---------------------------------------------------------------------------------

    def rows(self, group: str, only_open: bool = False) -> Iterator[Row]:
        page: list[Sequence[Any]] = [("",)] * PAGE_ROWS
        while len(page) == PAGE_ROWS:
            page = self.execute(self.PAGE, group=group, after=page[-1][0], all=not only_open)
            for file_id, path, size, mtime, state, term, attempts, failures, action, due, error in page:
                marks, words = marks_in(str(error)) if error else (Marks(), "")
                # What makes no sense raises: it must not pass for another version of its file.
                yield Row(
                    _true_path(str(path), str(file_id)),
                    int(size),
                    str(mtime),
                    str(state),
                    int(term),
                    int(attempts),
                    int(failures),
                    _true_action(str(action)),
                    _number(due),
                    words,
                    marks,
                )

    def done_count(self, group: str) -> int:
        return int(self.execute(self.DONE_COUNT, group=group)[0][0])

    def write(self, fence: Fence, changes: Sequence[Change]) -> list[bool]:
        """All claims of new files are one statement, all changes and all removals another."""
        made: set[str] = set()
        for sql, note, chosen in (
            (self.CLAIM, self.NOTE_NEW, [c for c in changes if c.old is None]),
            (self.CHANGE, self.NOTE, [c for c in changes if c.old and c.new]),
            (self.FORGET, self.NOTE, [c for c in changes if c.new is None]),
        ):
            if chosen:
                rows = self._noted(sql, note, chosen, by=fence.member, **fence._asdict())
                made |= {row[0] for row in rows}
        return [sha256_text(change.path) in made for change in changes]

    def _noted(self, sql: str, note: str, changes: Sequence[Change], **values: Any) -> list[Sequence[Any]]:
        told = self.config.audit and any(change.outcome for change in changes)
        return self.execute(sql, note=note if told else "", changes=changes, **values)

    def written(self, fence: Fence, changes: Sequence[Change]) -> list[bool]:
        ids = [sha256_text(change.path) for change in changes]
        rows = self.execute(self.STANDING, group=fence.group, ids=ids)
        found = {file_id: (*known, _true_action(action)) for file_id, *known, action in rows}
        wanted = [change.new and change.new._replace(term=fence.term)[1:8] for change in changes]
        return [found.get(file_id) == new for file_id, new in zip(ids, wanted)]

    # -- the operator's verbs -----------------------------------------------------------------------------------------

    def token(self, group: str) -> tuple[Optional[str], int]:
        rows = self.execute(self.TOKEN, group=group)
        return (rows[0][0], rows[0][1]) if rows else (None, 0)

    def counts(self, group: str) -> dict[str, int]:
        """Files by state; apart those `unlisted`, if any: not done, and not to be had either."""
        counted = {"claimed": 0, "done": 0, "failed": 0, "quarantined": 0}
        for state, unlisted, number in self.execute(self.COUNTS, group=group):
            if state in counted:  # others are shown to nobody
                key = "unlisted" if unlisted else state
                counted[key] = counted.get(key, 0) + int(number)
        return counted

    def activity(self, group: str, term: int) -> tuple[Optional[float], Optional[float]]:
        """Seconds since that term's first write that still stands, and since the last of all."""
        first, last = self.execute(self.ACTIVITY, group=group, term=term)[0]
        return _number(first), _number(last)

    def errors(self, group: str) -> list[dict[str, Any]]:
        """The last ones, quarantined files first."""
        return [
            {
                "path": printable(_true_path(path, file_id)),
                "state": state,
                "attempts": attempts,
                "error": printable(error),
                "age": float(age),
            }
            for file_id, path, state, attempts, error, age in self.execute(self.ERRORS, group=group)
        ]

    def not_now(self, group: str) -> Optional[dict[str, Any]]:
        """Since when handlers say "not now", of how many files, and the first of these."""
        rows = [(marks_in(error)[0], _true_path(*name)) for error, *name in self.execute(self.NOT_NOW, group=group)]
        found = sorted((marks.later, printable(path)) for marks, path in rows if marks.later and not marks.unlisted)
        paths = [path for _, path in found[:FIRST_PATHS]]
        return {"since": found[0][0], "count": len(found), "paths": paths} if found else None

    def ask(self, group: str, request: str) -> None:
        """Leaves a row under a reserved id."""
        self.execute(self.ASK, group=group, request=request)

    def unask(self, group: str, requests: Iterable[str]) -> None:
        for request in requests:
            self.execute(self.UNASK, group=group, request=request)

    def pauses(self, group: str) -> tuple[float, list[str], Optional[dict[str, Any]]]:
        """The time, the ids of pauses, and the last one that is not over."""
        rows, found = self.execute(self.PAUSES, group=group), None
        now, ids = float(rows[0][2]), [task_id for task_id, *_ in rows if task_id]
        for task_id, began, _ in rows if ids else ():
            end, _, by = re.sub(rf"{PAUSE}(?:0:|([\d-]+T[\d:]+Z):|)", r"\1 ", task_id, count=1).partition(" ")
            if not end or end > utc_second(now):
                since = utc_second(max(0.0, (_number(began) or now) + 0.001))
                found = {"by": by, "since": since, "until": end or None}
        return now, ids, found

    def adopt(self, group: str, member: str, rows: Sequence[Row]) -> None:
        """Records files as done that the ledger does not know."""
        for start in range(0, len(rows), BATCH_FILES):
            known = [Row(*row[:3], "done", 0, 0, 0) for row in rows[start : start + BATCH_FILES]]
            changes = [Change(None, row, outcome=Outcome("adopted")) for row in known]
            self._tell(self.ADOPT, self.NOTE_ADOPTED, changes, group=group, member=member)

    def retry(self, group: str, row: Row) -> None:
        """To be handled at the next poll, if the row is still the one read."""
        self._tell(self.RETRY, self.NOTE_TOLD, [Change(row, row, outcome=Outcome("retried"))], group=group)

    def skip(self, group: str, row: Row) -> None:
        """Records a failed or quarantined version as done, without an after-action, if the row is the one read."""
        if row.state in ("failed", "quarantined"):
            self._tell(self.SKIP, self.NOTE_TOLD, [Change(row, row, outcome=Outcome("skipped"))], group=group)

    def _tell(self, sql: str, note: str, changes: Sequence[Change], **values: Any) -> None:
        path, row = changes[0].path, changes[0].old or NO_ROW
        values = {**row._asdict(), **values, "file_id": sha256_text(path), "by": operator()}
        try:
            self._noted(sql, note, changes, **values)
        except RowRefused:
            self._noted(sql, note, [change._replace(plain=2) for change in changes], **values)

    def history(self, group: str, since: str = "1970-01-01") -> Iterator[dict[str, Any]]:
        """The audit trail, the oldest row first."""
        after: dict[str, Any] = {"at": since, "file_id": "", "term": 0, "attempt": 0, "outcome": ""}
        page: list[Sequence[Any]] = [()] * PAGE_ROWS
        while len(page) == PAGE_ROWS:
            page = self.execute(self.HISTORY, group=group, **after)
            for file_id, *values in page:
                found = dict(zip(("at", *TRAIL), values))
                after = {name: found.get(name, file_id) for name in after}
                yield {**found, "path": _true_path(str(found["path"]), str(file_id))}

    def audited_since(self, group: str) -> tuple[float, Optional[float]]:
        """The database's time, and that of the group's first row in the audit trail, in epoch seconds."""
        now, began = self.execute(self.AUDITED_SINCE, group=group)[0]
        return float(now), _number(began)

    def came(self, group: str, since: float, glob: str) -> list[tuple[float, str, int]]:
        """When which paths that may fit were done or skipped, each version once, and at which term."""
        like = re.sub("[^A-Za-z0-9./-]+", "%", f"*{glob.lstrip('/').partition('[')[0]}*")
        rows = self.execute(self.CAME, group=group, since=moment(since), like=like)
        return [(float(at), _true_path(*name), term) for at, *name, term in rows]

    def alarms(self, group: str, since: float, file_id: str) -> dict[tuple[str, float], tuple[int, str]]:
        """Of an expectation: what was said of which deadline, "missing" or "late", in which term and words."""
        rows = self.execute(self.ALARMS, group=group, since=moment(since), file_id=file_id)
        return {(what, float(round(at))): (term, error) for at, what, term, error in rows}

    def alarm(
        self,
        fence: Fence,
        file_id: str,
        outcome: str,
        path: str,
        by: float,
        error: str = "",
        seconds: Optional[float] = None,
    ) -> bool:
        """Whether it is for this term to say so: another member may have the same id."""
        values = {"file_id": file_id, "by": moment(by), "path": printable(path), "error": error}
        fixed = {"outcome": outcome, "seconds": seconds, **fence._asdict()}
        try:
            self.execute(self.ALARM, **fixed, **values)
        except RowRefused:
            self.execute(self.ALARM, **fixed, **{**values, "path": plain(path), "error": plain(error)[:LONGEST_REASON]})
        return self.alarms(fence.group, by, file_id).get((outcome, by), (0,))[0] == fence.term

    def trim(self, group: str, days: float) -> None:
        """Removes some older rows."""
        self.execute(self.TRIM, group=group, age=min(days * SECONDS_A_DAY, LONGEST_DELAY))


def _number(value: Any) -> Optional[float]:
    return None if value is None else float(value)


def _true_path(path: str, file_id: str) -> str:
    """Out of its printable form."""
    if "%" in path and sha256_text(path) != file_id:
        return urllib.parse.unquote_to_bytes(path).decode("utf-8", "surrogateescape")
    return path


def _true_action(action: str) -> str:
    """Out of its plain form; no other one begins with a percent sign."""
    return urllib.parse.unquote(action[1:]) if action.startswith("%") else action


def plain(text: str) -> str:
    """As every character set has it: all but printable ASCII, and the percent sign, as %XX of its UTF-8."""
    return urllib.parse.quote(text.encode("utf-8", "surrogateescape"), safe=PLAIN)


class PostgreSQL(Database):
    """PostgreSQL 11 and newer through pg8000, READ COMMITTED or stricter; also behind a transaction pooler."""

    BEAT = ""
    LOOK = f"{Database.BEAT}; {Database.LOOK}"  # in one round trip
    FORGET = """
        DELETE FROM file_ledger l USING $fence, $those
         WHERE l.group_id = v.group_id AND $same $made"""

    name = "postgresql"
    least_timeout = 0.25
    FOUND_TABLES = f"""
        SELECT name, CASE WHEN relpersistence <> 'p' THEN 'SET LOGGED' END
          FROM (VALUES {", ".join(f"('{table}')" for table in TABLES)}) AS n (name)
          JOIN pg_class c ON c.oid = to_regclass(name)"""
    HEARTBEAT_TYPE = """
        SELECT format_type(COALESCE(NULLIF(typbasetype, 0), atttypid), GREATEST(atttypmod, typtypmod))
          FROM pg_attribute JOIN pg_type t ON t.oid = atttypid
         WHERE attrelid = to_regclass('health_check') AND attname = 'last_heartbeat'"""
    # For the index: else the column is compared as text. OFFSET 0 hides that all are of one group, whose size the
    # planner underestimates.
    TYPES = {"id": "CAST(%s AS char(64))", "delay": "CAST(%s AS float8)", "seconds": "CAST(%s AS float8)"}
    WORDS = {
        **Database.WORDS,
        "utc": "(CURRENT_TIMESTAMP AT TIME ZONE 'UTC')",
        "epoch": "CASE WHEN isfinite({0}) THEN EXTRACT(EPOCH FROM {0})::numeric END",
        "second": "FLOOR($epoch($utc))::bigint",
        "shifted": "{0} + interval '1 second' * ({1})",
        "released": "'1970-01-01 00:00:01+00'",  # columns without time zone pass over it
        "those": "(SELECT :group AS group_id, r.* FROM (:changes) r OFFSET 0) v",
        "lock": "SELECT FROM token_holder WHERE group_id = :group FOR UPDATE; "
        "SELECT FROM health_check WHERE group_id = :group AND task_id = {0} FOR UPDATE;",
        "update": "FOR UPDATE",
        "keep": "FOR UPDATE OF l",
    }
    FAULTS = {
        "password": "28P01",
        "privilege": "42501",
        "table": "42P01",
        "form": "42703|42804|42883|42P10|55000 .*ON CONFLICT",
        "certificate": "SSLCertVerificationError",
        "tls": "ConnectionError the server offers none",
        "row": "UnicodeEncode|22|23|44|54|P0",  # classes: data, constraints, check options, limits, triggers
        "busy": "55P03|40001|40P01|57014",
        # pgbouncer has no code; a row's text is a file's
        "database": r"3D000|.*database \S+ does not exist",
        "login": "28000|.*uthentication (failed|method)",
    }

    def _open(self, host: str, address: Any) -> None:
        native = import_driver("pg8000.native", "pg8000")
        endpoint, how = self.config.endpoint, self.config.database_tls
        self.connection = sock = self.allowance.connect(address)  # pg8000 would leave its own open
        trusted = how == "verify" or (how == "disable" and is_near(sock))

        class Guarded(guarded(native.Connection, "handle_AUTHENTICATION_REQUEST")):  # type: ignore[misc]
            def handle_AUTHENTICATION_REQUEST(self, data: bytes, context: object) -> None:
                """3 is the password in clear, 11 has SCRAM's cost, which this host is to pay."""
                kind, cost = int.from_bytes(data[:4], "big"), re.search(rb",i=(\d{1,20})", data[4:])
                if kind == 3 and not trusted:
                    raise DatabaseRefused(IN_CLEAR)
                if kind == 11 and cost and int(cost[1]) > MOST_ITERATIONS:
                    raise DatabaseRefused("it asks for too many rounds of SCRAM")
                super().handle_AUTHENTICATION_REQUEST(data, context)

        if how != "disable":
            self.connection = sock = self._encrypted(sock, host)
        self.connection = Guarded(
            endpoint.user,
            database=endpoint.name,
            password=self.config.database_login(),
            ssl_context=False,
            application_name="ftpcoord",
            startup_params={"client_encoding": "UTF8", "DateStyle": "ISO", "TimeZone": "UTC"},  # poolers keep these
            sock=sock,
        )
        self.durable = ""
        read_only, standard, durable = self._run(
            "SELECT current_setting('transaction_read_only'), current_setting('standard_conforming_strings'), "
            "current_setting('synchronous_commit')"
        )[0]
        if durable == "off":
            self.durable = "SET LOCAL synchronous_commit = on;"
        if standard != "on":
            raise DatabaseRefused("standard_conforming_strings must be on")
        if read_only != "off":
            raise DatabaseDown("it is read-only (a replica?)")

    def _encrypted(self, sock: Any, host: str) -> Any:
        """The connection under TLS; as it is if the server has none, and database_tls is prefer."""
        sock.sendall(struct.pack("!II", 8, 80877103))  # SSLRequest
        buffer = bytearray(1)
        answer = bytes(buffer[: sock.recv_into(buffer)])
        if answer == b"S":
            return self._tls().wrap_socket(sock, server_hostname=host)
        if answer not in (b"N", b"E"):
            raise ConnectionError("this is no PostgreSQL server" if answer else "the server closed the connection")
        if answer == b"E" or self.config.database_tls != "prefer":
            raise ConnectionError("the server offers none")
        return sock

    def _run(self, sql: str, note: str = "") -> list[Sequence[Any]]:
        # SET LOCAL lasts for this message, one transaction: it works behind a transaction pooler, too.
        lock_timeout = int(self.timing.lock_timeout * 1000)
        settings = f"SET LOCAL lock_timeout = '{lock_timeout}ms'; {self.durable}"
        rows = self.connection.run(f"{settings} {note and note + ';'} {sql}")
        return [row for row in rows or () if row]  # rows that were only locked have no columns

    def _said(self, exc: BaseException) -> tuple[str, str]:
        detail = exc.args[0] if exc.args and isinstance(exc.args[0], dict) else {}
        code, text = super()._said(exc)
        return str(detail.get("C", code)), str(detail.get("M", text))

    def _now(self, digits: int, column_type: str) -> str:
        now = "CURRENT_TIMESTAMP" if "with time zone" in column_type else "$utc"
        return now if digits else f"date_trunc('second', {now})"

    def _table(self, changes: list[Change]) -> str:
        # Planned in a fifth of the time that as many SELECTs take.
        row = f"({', '.join(self.TYPES.get(name, '%s') for name in self.columns)})"
        rows = ", ".join(row % self._columns(change) for change in changes)
        return f"SELECT * FROM (VALUES {rows}) AS r ({', '.join(self.columns)})"


class MySQL(Database):
    """MySQL 5.7 and newer and MariaDB 10.2 and newer through PyMySQL, autocommit.

    There is no RETURNING: LAST_INSERT_ID(expression) brings a result back in the same round trip; counts of changed
    rows depend on the client's flags and on proxies.
    """

    FIRST = """
        INSERT INTO token_holder (group_id, task_id, term) VALUES (:group, :member, $tell($first_term))
            ON DUPLICATE KEY UPDATE term = term + $tell(0)"""
    TAKE = """
        UPDATE token_holder t STRAIGHT_JOIN $his_row
           SET t.term = $tell(t.term + 1), t.task_id = :member,
               h.last_heartbeat = h.last_heartbeat -- changes nothing, but makes the row a locked one
         WHERE $seen AND $as_seen"""
    RENEW = """
        UPDATE token_holder t STRAIGHT_JOIN $his_row
          LEFT JOIN health_check r ON r.group_id = t.group_id AND r.task_id = :request
           SET t.term = t.term + 0 * $tell(2 * t.term + CASE WHEN r.task_id IS NULL THEN 0 ELSE 1 END),
               h.last_heartbeat = $moved
         WHERE $renewable"""
    RELEASE = RENEW.replace("$moved", "$released")
    CHANGE = """
        UPDATE token_holder t, file_ledger l, (:changes) v
           SET t.term = t.term, l.term = t.term, l.task_id = :member, $set(l.)
         WHERE $held AND l.group_id = :group AND $same"""
    FORGET = """
        DELETE l FROM token_holder t, file_ledger l, (:changes) v
         WHERE $held AND l.group_id = :group AND $same"""

    name = "mysql"
    least_timeout = 1.2  # innodb_lock_wait_timeout is a whole number of seconds, and the server gives up first
    FOUND_TABLES = " UNION ALL ".join(
        f"""
        SELECT '{table}', CASE
               WHEN transactions = 'NO' THEN 'ENGINE=InnoDB'
               WHEN table_type = 'BASE TABLE' AND NOT EXISTS (
                    SELECT 1 FROM information_schema.statistics
                     WHERE table_schema = DATABASE() AND table_name = '{table}' AND non_unique = 0
                     GROUP BY index_name HAVING GROUP_CONCAT(column_name ORDER BY column_name) = '{key}')
               THEN CONCAT('ADD ', IF('PRI' IN (
                    SELECT column_key FROM information_schema.columns
                     WHERE table_schema = DATABASE() AND table_name = '{table}'
                    ), 'UNIQUE', 'PRIMARY KEY'), ' ({key})') END
          FROM information_schema.tables LEFT JOIN information_schema.engines USING (engine)
         WHERE table_schema = DATABASE() AND table_name = '{table}'"""
        for table, key in zip(
            TABLES, ("group_id", "group_id,task_id", "file_id,group_id", "at,attempt,file_id,group_id,outcome,term")
        )
    )
    # Behind a type in an old format stands a comment.
    HEARTBEAT_TYPE = """
        SELECT SUBSTRING_INDEX(column_type, ' /*', 1) FROM information_schema.columns
         WHERE table_schema = DATABASE() AND table_name = 'health_check' AND column_name = 'last_heartbeat'"""
    TYPES = dict.fromkeys(("id", "old_mtime", "old_state"), "_ascii %s COLLATE ascii_bin")
    WORDS = {
        **Database.WORDS,
        "utc": "UTC_TIMESTAMP(6)",
        "epoch": "TIMESTAMPDIFF(MICROSECOND, '1970-01-01', {0}) * 0.000001",
        "second": "CAST(FLOOR($epoch($utc)) AS SIGNED)",
        "shifted": "{0} + INTERVAL 1000000 * ({1}) MICROSECOND",
        "update": "FOR UPDATE",  # READ COMMITTED would not lock it by itself
        "keep": "FOR UPDATE",
        "ignore": "ON DUPLICATE KEY UPDATE task_id = task_id",
        "or_update": "ON DUPLICATE KEY UPDATE",
        "won": "",
        "made": "",
        "tell": "LAST_INSERT_ID({0})",
        "text": "char",
    }
    FAULTS = {
        "login": "1045|1130|1251|1524|1698|1820|1862|2059|3118|3955|4151",
        "database": "1049",
        "forbidden": "1044",
        "privilege": "1142|1143",
        "table": "1146",
        "form": r"1054|1267 .*IMPLICIT\).*IMPLICIT\)",
        "certificate": ".*CERTIFICATE_VERIFY_FAILED",
        "tls": "2026|3159|SSL",
        "secret": "RuntimeError .*package",
        "busy": "1020|1205|1213",
        # Values, sizes, triggers, constraints; PyMySQL knows others by class.
        "row": "UnicodeEncode|1118|1153|1264|1265|1267|1292|1300|1364|1366|1369|1406|1644|1690|3819|3854|3988|4025|"
        r"\d+ (Data|Integrity)Error",
        "read-only": "1290|1792|1836",
    }

    def _open(self, host: str, address: Any) -> None:
        pymysql, how = import_driver("pymysql", "PyMySQL"), self.config.database_tls
        if how != "disable":
            try:
                self._log_in(pymysql, host, address, self._tls())
                return
            except (pymysql.Error, OSError) as exc:
                if how != "prefer" or (exc.args[:1] != (2026,) and "SSL" not in str(exc)):
                    raise
        self._log_in(pymysql, host, address, None)

    def _log_in(self, pymysql: Any, host: str, address: Any, tls: Optional[ssl.SSLContext]) -> None:
        endpoint, how = self.config.endpoint, self.config.database_tls
        sock = self.allowance.connect(address)
        near, refused = is_near(sock), []
        if how != "verify" and not near:  # full logins of these give the password to whoever asks
            refused += ["sha256_password", "caching_sha2_password"]
        if how != "verify" and not (near and how == "disable"):
            refused += ["mysql_clear_password", "dialog", "mysql_old_password"]

        def refuse(connection: object) -> None:
            raise DatabaseRefused(IN_CLEAR)

        class Guarded(guarded(pymysql.connections.Connection, "_get_server_information")):  # type: ignore[misc]
            _auth_plugin_name: str

            def _get_server_information(self) -> None:
                """What is refused is not begun: PyMySQL gives the password for some kinds of login at once."""
                super()._get_server_information()
                if tls is not None and not self.server_capabilities & 0x800:
                    raise pymysql.OperationalError(2026, "the server offers none")
                if self._auth_plugin_name in refused:
                    self._auth_plugin_name = "mysql_native_password"

        wait = max(1, int(self.timing.lock_timeout))
        self.connection = Guarded(
            host=host,
            user=endpoint.user,
            password=self.config.database_login().encode(),  # else as latin1
            database=endpoint.name,
            charset="utf8mb4",
            autocommit=True,
            program_name="ftpcoord",
            defer_connect=True,
            auth_plugin_map=dict.fromkeys(refused, refuse),
            init_command=f"SET SESSION time_zone = '+00:00', sql_mode = 'STRICT_ALL_TABLES', autocommit = 1, "
            f"sql_safe_updates = 0, sql_select_limit = {2**64 - 1}, sql_big_selects = 1, timestamp = DEFAULT, "
            f"group_concat_max_len = 1024, lock_wait_timeout = {wait}, innodb_lock_wait_timeout = {wait}",
            ssl=tls,
            ssl_disabled=tls is None,
        )
        self.connection.connect(sock)
        # Proxies that divide the work ask replicas what begins with SELECT.
        if self._run(
            "SHOW VARIABLES WHERE Variable_name RLIKE '^((innodb|tx|transaction)_)?read_only$' "
            "AND Value NOT IN ('OFF', '0')"
        ):
            raise DatabaseDown("it is read-only (a replica?)")
        cluster = dict(map(tuple, self._run("SHOW STATUS LIKE 'wsrep%'")))
        if cluster.get("wsrep_provider_name") and cluster["wsrep_ready"] == "OFF":
            raise DatabaseDown("it is cut off from its cluster (wsrep_ready is OFF)")

    def _run(self, sql: str, note: str = "") -> list[Sequence[Any]]:
        """Where a member stops in the middle the server soon ends its transaction."""
        if not note:
            return self._ask(sql)
        try:
            self._ask(f"SET autocommit = 0, wait_timeout = {max(1, int(self.timing.lock_timeout))}")
            self._ask(note)
            rows = self._ask(sql)
            self._ask("SET autocommit = 1, wait_timeout = DEFAULT")  # commits
            return rows
        except BaseException:
            self.close()
            raise

    def _ask(self, sql: str) -> list[Sequence[Any]]:
        with self.connection.cursor() as cursor:
            cursor.execute(sql)
            if cursor.description is None:
                if cursor.lastrowid or cursor.rowcount <= 0 or "LAST_INSERT_ID" not in sql:
                    return [(cursor.lastrowid,)] if cursor.lastrowid else []
                # A trigger keeps the result out of the answer, but not out of the session.
                cursor.execute("SELECT LAST_INSERT_ID()")
            return list(cursor.fetchall())

    def literal(self, value: Any) -> str:
        # In the session's sql_mode the backslash is an escape.
        return super().literal(value.replace("\\", r"\\") if isinstance(value, str) else value)

    def _said(self, exc: BaseException) -> tuple[str, str]:
        kind, text = super()._said(exc)
        if len(exc.args) > 1 and isinstance(exc.args[0], int):
            return f"{exc.args[0]} {kind}", str(exc.args[1])
        return kind, text

    def _now(self, digits: int, column_type: str) -> str:
        return f"UTC_TIMESTAMP({digits})"

    def write(self, fence: Fence, changes: Sequence[Change]) -> list[bool]:
        super().write(fence, changes)
        return self.written(fence, changes) if changes else []


class SQLite(Database):
    """SQLite 3.35 and newer in WAL mode; the file is created with its tables.

    Operations are BEGIN IMMEDIATE transactions, so all are serial. The file must be on a local disk.
    """

    name = "sqlite"
    least_timeout = 0.25
    FOUND_TABLES = "SELECT name, NULL FROM sqlite_master WHERE type = 'table'"
    HEARTBEAT_TYPE = "SELECT 'datetime(6)'"  # whatever was declared
    WORDS = {
        **Database.WORDS,
        "utc": "strftime('%Y-%m-%d %H:%M:%f', 'now')",
        "epoch": "(julianday({0}) - julianday('1970-01-01')) * 86400.0",
        "second": "CAST($epoch($utc) AS INTEGER)",
        "shifted": "strftime('%Y-%m-%d %H:%M:%f', {0}, ({1}) || ' seconds')",
    }
    FAULTS = {
        "busy": ".*(locked|busy)",
        "row": "UnicodeEncode|DataError|IntegrityError",
        "form": ".*(ON CONFLICT clause|no such column|has no column)",
        "file": ".*(unable to open|readonly|not a database)",
    }

    def _open(self, host: str, address: Any) -> None:
        import sqlite3  # here: it takes a megabyte

        if sqlite3.sqlite_version_info < (3, 35):
            raise DatabaseRefused(f"needs SQLite 3.35, this is {sqlite3.sqlite_version}")
        with contextlib.suppress(OSError, AttributeError), create_file(Path(self.path)) as made:  # sqlite3 says why
            folder = os.stat(os.path.dirname(self.path) or ".")  # root's `status` may come before the service
            os.fchown(made.fileno(), folder.st_uid, folder.st_gid)
        self.connection = sqlite3.connect(
            self.path, timeout=self.timing.lock_timeout, isolation_level=None, check_same_thread=False
        )
        self.file = os.stat(self.path)
        for statement in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", *ddl(mysql=False).values()):
            self.connection.execute(statement)

    def _run(self, sql: str, note: str = "") -> list[Sequence[Any]]:
        if not os.path.samestat(self.file, os.stat(self.path)):
            raise DatabaseDown("the file was replaced")
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            self.connection.execute(note)
            rows = list(self.connection.execute(sql).fetchall())
            self.connection.execute("COMMIT")
            return rows
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise


DIALECTS: dict[str, type[Database]] = {"postgresql": PostgreSQL, "mysql": MySQL, "sqlite": SQLite}


def open_database(config: Config) -> Database:
    return DIALECTS[config.endpoint.dialect](config)


def import_driver(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        if exc.name and exc.name.split(".")[0] != module.split(".")[0]:
            raise DatabaseRefused(f"{package} cannot be imported ({exc}): pip install --upgrade {package}") from None
        raise DatabaseRefused(f"{package} is not installed, and the settings need it: pip install {package}") from None


def tls_context(setting: str, ca_file: str, verify: bool, cert: str = "", key: str = "") -> ssl.SSLContext:
    """Raises ConfigError that names the setting of the file that cannot be used."""
    path = ca_file
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
        setting, path = "client_cert", cert
        if cert:
            context.load_cert_chain(cert, key or None)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{setting} {path}: cannot be read ({reason(exc)})") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca_file:  # Python 3.13 refuses private authorities that lack a key identifier
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


# ---------------------------------------------------------------------------------------------------------------------
# II.2 File servers: what every protocol offers
# ---------------------------------------------------------------------------------------------------------------------

MAX_ENTRIES = 2_000_000  # of one poll
MAX_LISTING = 256 << 20  # bytes of one listing, and of the paths of one poll
MAX_FOLDERS = 100_000  # of one poll
MOST_UNREAD = 100  # lines kept that nobody understands
LARGEST_FILE = 2**63 - 1  # bytes; the ledger's column
READ_BUFFER = 256 * 1024  # bytes; larger ones were slower
NAMES_SERVE = 10.0  # seconds for which a listing answers what is in its folder
MOST_NUMBERED = 1000  # names tried for one moved file
MOST_PROXY_REPLY = 16384  # bytes of an HTTP proxy before the tunnel begins
SOCKS_ERRORS = (  # from 1, RFC 1928 section 6
    "general failure",
    "not allowed",
    "network unreachable",
    "host unreachable",
    "connection refused",
    "TTL expired",
    "command not supported",
    "address type not supported",
)


class Job(NamedTuple):
    """A file to fetch, of the listed size. `write` gets views that are valid during the call only. With `seen`, the
    entry listed, the version is looked at after the last byte; `told` takes the exact time."""

    path: str
    size: int
    write: Callable[[memoryview], object]
    seen: Optional[Entry] = None
    told: Callable[[Entry], object] = bool


class Listed:
    def __init__(self) -> None:
        self.entries: dict[str, Optional[Entry]] = {}  # None: made since the listing began
        self.unread: Sequence[str] = ()
        self.over = float("inf")  # when it ended


class Habits:
    """What the connections to one server have learnt of it."""

    def __init__(self) -> None:
        self.zones: set[datetime.timedelta] = set()  # what LIST is ahead of UTC; two: summer and winter
        self.listing = self.question = 0.0  # seconds that the last of each took
        self.last: dict[str, Listing] = {}  # by folder, for a look at a group
        self.unanswered: set[str] = set()  # commands that got no answer at all
        self.spare_listing = True  # one a poll, for a look where only LIST tells
        self.open_files = OPEN_FILES  # at once in a pipeline
        self._lock = threading.Lock()
        self._listed: dict[str, Listed] = {}
        self._making: set[str] = set()  # paths

    def listed(self, folder: str) -> Optional[Listed]:
        listed, now = self._listed.get(folder), time.monotonic()
        return listed if listed and now - NAMES_SERVE < listed.over <= now else None

    @contextlib.contextmanager
    def listing_of(self, folder: str) -> Iterator[Listed]:
        oldest = time.monotonic() - NAMES_SERVE
        with self._lock:
            self._listed = {place: listed for place, listed in self._listed.items() if listed.over > oldest}
            self._listed[folder] = listed = Listed()
        yield listed
        listed.over = time.monotonic()

    @contextlib.contextmanager
    def making(self, path: str) -> Iterator[None]:
        """Around what gives a file this path. Raises TargetExists where another connection does."""
        folder, name = split_path(path)
        with self._lock:
            if path in self._making:
                raise TargetExists(f"{path} is just being made")
            self._making.add(path)
        try:
            yield
            with self._lock:
                self._listed.get(folder, Listed()).entries[name] = None
        except BaseException as error:
            if not isinstance(error, TargetExists):  # it may have been made after all
                with self._lock:
                    self._listed.pop(folder, None)
            raise
        finally:
            self._making.discard(path)


class Listing(list[Entry]):
    """The entries of a folder, and what each was read from: as the `last` one it saves reading the same bytes
    again, if they are to be `read_as` the same."""

    def __init__(self, last: Optional[Listing] = None, *read_as: object) -> None:
        super().__init__()
        self.read_as, self.lines = read_as, dict[bytes, tuple[Entry, Any]]()
        if last is not None and last.read_as == read_as:
            self.lines = last.lines.copy()

    def prune_lines(self) -> None:
        if len(self.lines) > len(self):
            there = set(map(id, self))
            self.lines = {line: told for line, told in self.lines.items() if id(told[0]) in there}


def decode_name(raw: bytes, encoding: str) -> str:
    """Text that encode_name() turns into the same bytes again."""
    try:
        text = raw.decode(encoding, "surrogateescape")
        text.encode("utf-8", "surrogateescape")  # UTF-7 knows surrogates that files here cannot have
        if text.encode(encoding, "surrogateescape") == raw:
            return text
    except UnicodeError:
        pass
    return raw.decode("ascii", "surrogateescape")


UNSENDABLE = re.compile("[\r\n\0]")


def encode_name(name: str, encoding: str) -> bytes:
    """Raises FileRefused for what the server could not take as one path."""
    if UNSENDABLE.search(name):
        raise FileRefused(f"{name!r}: a line break or NUL in a path is never sent")
    try:
        return name.encode(encoding, "surrogateescape")
    except UnicodeError:
        raise FileRefused(f"{name!r} cannot be written in encoding {encoding}") from None


def split_path(path: str) -> tuple[str, str]:
    """(folder, name); "" is the login folder."""
    folder, slash, name = path.rpartition("/")
    return folder or slash, name


def same_name(a: str, b: str) -> bool:
    """Whether two paths end in one name, in whatever case and Unicode form."""
    names = (split_path(path.rstrip("/"))[1] for path in (a, b))
    return len({unicodedata.normalize("NFC", name).casefold() for name in names}) == 1


def without_name(text: str, path: str) -> str:
    name = re.escape(split_path(path)[1])
    return re.sub(rf"\S*(?<!\w){name}(?!\w)\S*", "", text)


def normal_path(path: str) -> str:
    return re.sub(r"\A//+", "/", posixpath.normpath(path))


class _Broken(Exception):
    """The conversation cannot go on; the cause is chained. Becomes ServerDown."""


class GuardedSocket(socket.socket):
    """Closed under a lock: its number stays its own while `abort` replaces what is behind it."""

    guard: threading.RLock

    def close(self) -> None:
        with self.guard:
            super().close()


def set_linger(sock: socket.socket, orderly: bool) -> None:
    """Orderly: what is unsent is still delivered after a close; else the peer sees a reset."""
    form = "hh" if os.name == "nt" else "ii"
    socket.socket.setsockopt(sock, socket.SOL_SOCKET, socket.SO_LINGER, struct.pack(form, not orderly, 0))


class ProxyRefused(OSError):
    """Or it does not speak its protocol."""


class ProxyLogin(ProxyRefused):
    pass


class Proxy:
    """CONNECT of HTTP (RFC 9110 section 9.3.6), SOCKS 5 (RFC 1928, 1929). The proxy resolves names. Reads nothing
    behind its answer: that is the server's."""

    def __init__(self, config: Config) -> None:
        self.scheme, self.user, *_ = config.via or config.target
        self.password = config.proxy_login()

    def connect(self, sock: socket.socket, host: str, port: int, deadline: float) -> None:
        """Raises OSError."""
        self._sock, self._deadline = sock, deadline
        (self._http if self.scheme == "http" else self._socks)(host.encode("idna"), port)

    def _http(self, host: bytes, port: int) -> None:
        place = (b"[%b]:%d" if b":" in host else b"%b:%d") % (host, port)
        login = base64.b64encode(f"{self.user}:{self.password}".encode())
        proof = b"Proxy-Authorization: Basic %b\r\n" % login if self.user else b""
        self._sock.sendall(b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (place, place, proof))
        head = b""
        while not head.endswith((b"\n\r\n", b"\n\n")):
            head += self._take(1)
            if not b"HTTP/1.".startswith(head[:7]) or len(head) > MOST_PROXY_REPLY:
                raise ProxyRefused("the proxy answers no HTTP, or without an end")
        line = head.replace(login, b"***").decode("latin-1").splitlines()[0][:200]
        if line[9:12] in ("401", "407"):  # tinyproxy says 401 to a wrong one
            raise ProxyLogin(f"the proxy wants a login, or another one, by Basic: {line}")
        if not re.match(r"HTTP/1\.\d 2\d\d\b", line):
            raise ProxyRefused(f"the proxy refuses: {line}")

    def _socks(self, host: bytes, port: int) -> None:
        self._greet()
        try:
            address = ipaddress.ip_address(host.decode())
            place = (b"\1" if address.version == 4 else b"\4") + address.packed
        except ValueError:
            place = b"\3" + self._counted(host)
        self._sock.sendall(b"\5\1\0%b%b" % (place, port.to_bytes(2, "big")))
        version, error, _, kind = self._take(4)
        if version != 5 or (not error and kind not in (1, 3, 4)):
            raise ProxyRefused("the proxy answers no SOCKS 5")
        if error:
            raise ProxyRefused(f"the proxy refuses: SOCKS error {error} {''.join(SOCKS_ERRORS[error - 1 : error])}")
        self._take((self._take(1)[0] if kind == 3 else 4 * kind) + 2)  # its own address and port

    def _greet(self) -> None:
        self._sock.sendall(b"\5\2\0\2" if self.user else b"\5\1\0")  # without a login, or also with one
        method = self._take(2)
        if self.user and method == b"\5\2":
            self._sock.sendall(b"\1" + self._counted(self.user.encode()) + self._counted(self.password.encode()))
            method = b"\5\0" if self._take(2)[1] == 0 else b"\5\xff"
        if method == b"\5\xff":
            raise ProxyLogin("the proxy wants a login, or another one")
        if method != b"\5\0":
            raise ProxyRefused("the proxy answers no SOCKS 5")

    def _counted(self, text: bytes) -> bytes:
        if len(text) > 255:
            raise ProxyRefused("SOCKS has no host, user or password of more than 255 bytes")
        return bytes([len(text)]) + text

    def _take(self, count: int) -> bytes:
        taken = b""
        while len(taken) < count:
            self._sock.settimeout(max(0.0, self._deadline - time.monotonic()))
            piece = self._sock.recv(count - len(taken))
            if not piece:
                raise ProxyRefused("the proxy closed the connection")
            taken += piece
        return taken


Verb = TypeVar("Verb", bound=Callable[..., Any])


def conversation(doing: str) -> Callable[[Verb], Verb]:
    """Makes a method about a path one: see FileServer._talking()."""

    def bounded(verb: Verb) -> Verb:
        @functools.wraps(verb)
        def talk(self: FileServer, path: str, *others: Any) -> Any:
            with self._talking(f"{doing} {path or 'the login folder'}"):
                return verb(self, path, *others)

        return cast(Verb, talk)

    return bounded


class FileServer(abc.ABC):
    """A connection, used by one thread at a time but for abort() and hurry().

    Every call is bounded: connect() by `timeout` seconds in all, the others by `timeout` for each wait.
    Whatever breaks the conversation closes the connection and raises ServerDown; the next call connects
    again. Paths are absolute, or relative to the login folder."""

    def __init__(self, config: Config) -> None:
        self.host, self.user = config.target.host, config.target.user
        self.port = config.target.port or DEFAULT_PORTS[config.target.scheme]
        self.password = config.file_password() or ""
        self.timeout, self.encoding = float(config.timeout), config.encoding
        self.label = f"{config.target.scheme}://{self.host}:{self.port}{config.through()}"
        self._proxy = Proxy(config) if config.via else None
        first = config.via or self
        self._dialled = first.host, first.port
        self.habits = Habits()
        self.allowed: Callable[[], object] = bool  # raises what forbids a command that changes something
        self.unasked: Sequence[Job] = ()  # what the server had not heard of when fetch_many() lost it
        self.unread: list[str] = []  # lines of the last listing that nobody understands: MOST_UNREAD + 1 at most
        self.unanswered = float("-inf")  # when such a command was sent whose reply has not come
        self._patience = min(self.timeout, config.liveness_check_interval / 2)  # for what is sent to be acknowledged
        self._sockets: set[socket.socket] = set()
        self._guard = threading.RLock()  # over _sockets, and closing them
        self._aborted = self._expired = False
        self._limit = self.timeout  # seconds for connect()
        self.preparing = False  # connecting, listing, or looked at after a rest: what a stop cuts

    @abc.abstractmethod
    def _open(self) -> None:
        """Connects and logs in, unbounded as a whole; any exception."""

    @abc.abstractmethod
    def list(self, folder: str, last: Optional[Listing] = None) -> Listing:
        """All entries but `.` and `..`. Raises FileGone (no such folder), FileRefused, ServerDown."""

    @abc.abstractmethod
    def absolute(self, path: str) -> str:
        """The path from the root in normal form, with links resolved where the protocol can."""

    @abc.abstractmethod
    def same(self, path: str, seen: Entry) -> Optional[bool]:
        """True: still that version. False: another one. None: not there."""

    def exact(self, path: str, seen: Entry) -> Optional[Entry]:
        """The entry as it is now, with its exact time beside its line's; None if the server tells none."""
        return None

    @conversation("looking at")
    def exists(self, path: str, fresh: bool = True) -> bool:
        """Whether the path names anything. Not `fresh`: a listing that decides it may be NAMES_SERVE seconds old."""
        path = self._full(path)
        there = self._there(path)
        return split_path(path)[1] in self._siblings(path, fresh) if there is None else there

    @abc.abstractmethod
    def fetch_many(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Optional[Error]]]:
        """Each with FileGone, NotNow, FileRefused or None as it ends, in any order: None once it is known that it
        is still the version listed, or is gone since. Raises ServerDown when the connection is lost (for a look alone
        a new one is made). What write() raises closes it; leaving the loop early may close it."""

    def put_away(self, path: str, action: str) -> None:
        """Deletes a file, or moves it to a free name. One that is gone already is put away."""
        if action == "delete":
            with contextlib.suppress(FileGone):
                self.delete(path)
            return
        folder = posixpath.normpath(posixpath.join(posixpath.dirname(path), action[len("move:") :]))
        self.mkdir(folder)
        name = posixpath.basename(path)
        for number in range(MOST_NUMBERED):
            self.allowed()
            with contextlib.suppress(TargetExists):
                with contextlib.suppress(FileGone):
                    self.rename(path, posixpath.join(folder, numbered(name, number) if number else name))
                return
        raise TargetExists(f"{folder}: {MOST_NUMBERED} files named like {name} are there; make room")

    @abc.abstractmethod
    def delete(self, path: str) -> None:
        """Raises FileGone, FileRefused."""

    @conversation("renaming")
    def rename(self, path: str, target: str) -> None:
        """Raises TargetExists instead of replacing a target, FileGone, FileRefused. A target that another client makes
        between the look and the command is lost on FTP."""
        path, target = self._full(path), self._full(target)
        with self.habits.making(target):
            if self.exists(target, False):  # SFTP servers replace it as well, which the draft (6.5) forbids
                raise TargetExists(f"{target} exists")
            try:
                self._rename(path, target)
            except (FileGone, FileRefused, NotNow) as error:
                if self.exists(target):
                    raise TargetExists(f"{target}: {error}") from None
                raise

    @conversation("making the folder")
    def mkdir(self, folder: str) -> None:
        """With its parents; an existing one is fine. Raises FileRefused."""
        path = self._full(folder).rstrip("/")
        missing: list[str] = []
        while path and not self._is_folder(path):
            missing.append(path)
            path = split_path(path)[0].rstrip("/")
        for path in reversed(missing):
            try:
                self._make(path)
            except (FileGone, FileRefused) as error:
                if not self._is_folder(path):  # someone else may just have made it
                    raise FileRefused(f"{folder}: {error}") from None

    def alive(self) -> bool:
        """One round trip on the present connection; never connects."""
        with contextlib.suppress(ServerDown), self._talking("a look whether it still answers"):
            if self._sockets and self.quiet():
                return self._answers()
        self.close()
        return False

    # -- what a protocol brings, within a conversation; paths as _full() gives them

    def _full(self, path: str) -> str:
        return path

    @abc.abstractmethod
    def _there(self, path: str) -> Optional[bool]:
        """exists(); None if only a listing of the folder can tell."""

    @abc.abstractmethod
    def _is_folder(self, path: str) -> bool:
        """Or a link to one."""

    @abc.abstractmethod
    def _make(self, folder: str) -> None:
        """One folder. Raises FileGone, FileRefused."""

    @abc.abstractmethod
    def _rename(self, path: str, target: str) -> None:
        """rename() to a name that is free. Raises FileGone, FileRefused, NotNow."""

    @abc.abstractmethod
    def _answers(self) -> bool: ...

    # -- what stands in a listing

    def _siblings(self, path: str, fresh: bool = True) -> Mapping[str, Optional[Entry]]:
        """What is in the folder of a path, by name. Raises FileRefused if a line that is not understood may tell of the
        path."""
        folder, name = split_path(path)
        listed = None if fresh else self.habits.listed(folder)
        if listed is None:
            with self.habits.listing_of(folder) as listed, contextlib.suppress(FileGone):
                listed.entries.update((entry.name, entry) for entry in reversed(self.list(folder)))
                listed.unread = self.unread
        too_many = len(listed.unread) > MOST_UNREAD
        if name not in listed.entries and (too_many or may_tell_of(listed.unread, name)):
            raise FileRefused(f"{path}: the line of the listing that may tell of it is not understood")
        return listed.entries

    # -- the connection

    def quiet(self) -> bool:
        """Whether nothing came unasked, such as a goodbye."""
        return True

    def connect(self) -> None:
        """Raises ServerDown, LoginRefused."""
        self.close()
        self._expired, preparing, self.preparing = False, self.preparing, True

        def expire() -> None:
            self._expired = True
            self._shut_down()

        watchdog = threading.Timer(self._limit, expire)
        watchdog.daemon = True
        try:
            watchdog.start()
            self._open()
            if self._expired:
                raise socket.timeout()
        except Exception as error:
            if isinstance(error, Error) and not self._aborted and not self._expired:
                self.close()
                raise self._masked(error) from None
            raise self._lost("connecting", error) from error
        finally:
            self.preparing = preparing
            watchdog.cancel()

    def close(self, orderly: bool = True) -> None:
        """Without a goodbye; harmless if there is no connection. Not orderly: what is unsent stays so."""
        with self._guard:
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    set_linger(sock, orderly)
                sock.close()
            self._sockets.clear()

    def abort(self) -> None:
        """From any thread: ends blocked calls with ServerDown, for good."""
        self._aborted = True
        self._shut_down()

    def hurry(self, seconds: float) -> None:
        """From any thread: aborts unless it is at work; later connects get so long."""
        self._limit = min(self._limit, seconds)
        if self.preparing:
            self.abort()

    def _shut_down(self, orderly: bool = False) -> None:
        """Wakes who waits. Not orderly: nothing more is delivered, even if its user hangs elsewhere."""
        with self._guard:
            for sock in self._sockets:
                with contextlib.suppress(OSError):  # SSLSocket.shutdown() would go on in plain text
                    set_linger(sock, orderly)
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)
                if not orderly and os.name == "posix":
                    # Shut, the kernel would go on to send what is queued; closed, the number would soon be another's.
                    with contextlib.suppress(OSError, ValueError):
                        ended, other = socket.socketpair()
                        other.close()
                        os.dup2(ended.fileno(), sock.fileno(), inheritable=False)
                        ended.close()

    @contextlib.contextmanager
    def _effect(self) -> Iterator[None]:
        """Around a command that changes something, and its reply; without one `unanswered` stays."""
        self.allowed()
        before, self.unanswered = self.unanswered, boot_clock()
        yield
        self.unanswered = before

    def _adopt(self, sock: socket.socket) -> None:
        with self._guard:
            if self._aborted or self._expired:
                sock.close()
                raise ServerDown(f"{self.label}: aborted")
            self._sockets.add(sock)

    def _discard(self, sock: socket.socket) -> None:
        with self._guard:
            self._sockets.discard(sock)
            sock.close()

    def _dial(self) -> socket.socket:
        """To the server, with dead peers detected. Raises OSError."""
        failure: OSError = OSError(f"{self._dialled[0]} has no address")
        for family, _, _, _, address in self._addresses():
            try:
                sock = self._connected(family, address, self.port)
            except ProxyRefused:
                raise
            except OSError as error:
                failure = error
                continue
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in (
                ("TCP_KEEPIDLE", 30),
                ("TCP_KEEPINTVL", 10),
                ("TCP_KEEPCNT", 3),
                ("TCP_USER_TIMEOUT", int(1000 * self._patience)),
            ):
                if hasattr(socket, option):  # not on every system
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
            set_linger(sock, False)  # nothing is delivered after this process, however it dies
            return sock
        raise failure

    def _addresses(self) -> Sequence[tuple[Any, ...]]:
        """Of the host, or the proxy. Asked for in a thread that a cut leaves behind: nothing ends getaddrinfo()."""
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answer.put(socket.getaddrinfo(*self._dialled, type=socket.SOCK_STREAM))
            except Exception as error:
                answer.put(error)

        threading.Thread(target=ask, daemon=True).start()
        while not self._aborted and not self._expired:
            with contextlib.suppress(queue.Empty):
                found = answer.get(timeout=0.05)
                if isinstance(found, Exception):
                    raise found
                return cast(Sequence[tuple[Any, ...]], found)
        return ()

    def _connected(
        self, family: int, peer: tuple[Any, ...], port: int, timeout: Optional[float] = None
    ) -> socket.socket:
        """To a port of the server, known to abort() from before it connects. `peer`: an address of it, or the proxy."""
        timeout = timeout or self.timeout
        deadline = time.monotonic() + timeout
        sock = GuardedSocket(family, socket.SOCK_STREAM)
        sock.guard = self._guard
        self._adopt(sock)
        try:
            sock.settimeout(timeout)
            sock.connect(peer if self._proxy else (peer[0], port, *peer[2:]))
            if self._proxy:
                self._proxy.connect(sock, self.host, port, deadline)
            sock.settimeout(self.timeout)
            return sock
        except OSError:
            self._discard(sock)
            raise

    def _lost(self, doing: str, error: BaseException) -> ServerDown:
        """Closes; the error to raise."""
        self.close(orderly=False)
        while isinstance(error, _Broken) and error.__cause__ is not None:
            error = error.__cause__
        if self._aborted:
            why = "aborted"
        elif self._expired or isinstance(error, socket.timeout):
            why = f"no answer within {self.timeout:g} s"
        elif isinstance(error, ssl.SSLCertVerificationError):
            why = (
                f"the server's certificate is not trusted ({error.verify_message}); "
                "set ca_file to the authority that signed it"
            )
        elif isinstance(error, socket.gaierror):
            why = f"the name {self._dialled[0]} cannot be resolved ({error.strerror})"
        else:
            why = shortened(self._without_password(str(error) or type(error).__name__))
        kind = LoginRefused if isinstance(error, ProxyLogin) and not self._aborted else ServerDown
        return kind(f"{self.label}: {doing}: {why}")

    def _masked(self, error: Error) -> Error:
        """A server may say the password in any reply."""
        text = str(error)
        masked = shortened(self._without_password(text))
        return error if masked == text else type(error)(masked)

    def _without_password(self, text: str) -> str:
        secrets = {self.password, self._proxy.password if self._proxy else ""} - {""}
        for secret in sorted(secrets, key=len, reverse=True):
            if len(secret) >= 6:
                text = text.replace(secret, "***")
                continue
            # Masked within words a short one would be told: only where it stands alone.
            before, after = (r"\w" if end.isalnum() else r"(?!)" for end in (secret[0], secret[-1]))
            text = re.sub(f"(?<!{before}){re.escape(secret)}(?!{after})", "***", text)
        return text

    @contextlib.contextmanager
    def _talking(self, doing: str) -> Iterator[None]:
        """Around everything said to the server: after any exception but Error the two sides may be
        out of step, so the connection is closed."""
        try:
            yield
        except _Broken as error:
            raise self._lost(doing, error) from error
        except Error as error:
            if isinstance(error, ServerDown):
                self.close()
            raise self._masked(error) from error.__cause__
        except BaseException:
            self.close(orderly=False)
            raise


def new_server(config: Config) -> FileServer:
    """Not connected. Raises ConfigError."""
    return SftpServer(config) if config.target.scheme == "sftp" else FtpServer(config)


def open_server(config: Config) -> FileServer:
    """Raises ServerDown, LoginRefused, ConfigError."""
    server = new_server(config)
    server.connect()
    return server


# ---------------------------------------------------------------------------------------------------------------------
# II.3 Listings: pure functions
# ---------------------------------------------------------------------------------------------------------------------

MAX_LINE = 8192  # bytes
MOST_COLUMNS = 9  # of a line of LIST before the size
# English, German, French, Spanish, Italian, Portuguese and Dutch, without accents and dots:
MONTHS = {
    word: number
    for number, words in enumerate(
        (
            "jan janv gen ene",
            "feb fev fevr",
            "mar mars marz mrz mrt",
            "apr avr avril abr",
            "may mai mag mei",
            "jun juin juni june giu",
            "jul juil juli july lug",
            "aug aout aou ago",
            "sep sept set",
            "oct okt ott out",
            "nov",
            "dec dez dic",
        ),
        1,
    )
    for word in words.split()
}
UNIX_KINDS = {"-": "file", "d": "dir", "l": "link"}  # others: devices, sockets, pipes
DOS_KINDS = {"<DIR>": "dir", "<SYMLINK>": "link", "<SYMLINKD>": "link", "<JUNCTION>": "link"}
IBM_KINDS = {"*STMF": "file", "*DIR": "dir"}
UNIX_MODE = re.compile(r"[-dlbcpsDCMP][-rwxsStTlL]{9}[.+@]?(?= )", re.ASCII)
UNIX_DATE = re.compile(
    r" (\d{1,19}) +(?:([^\s\d]{3,9}) +(\d\d?)[.,]?|(\d\d?)[.,]? +([^\s\d]{3,9}))( +)"
    r"(?:(\d\d?:\d\d)|((?:19|20|21)\d\d))( .+)",
    re.ASCII | re.DOTALL,
)
ISO_DATE = re.compile(
    r" (\d{1,19}) +(\d{4}-\d\d-\d\d) (\d\d:\d\d)(?:(:\d\d)(\.\d{1,9})?(?: ([+-]\d{4}))?)?( .+)", re.ASCII | re.DOTALL
)
CLOCK = re.compile(r" (\d\d?:\d\d) ", re.ASCII)
PART_OF_A_DATE = re.compile(r"\d+[:/.-]\d", re.ASCII)
DOS_LINE = re.compile(
    r"(\d\d|\d{4})-(\d\d)-(\d\d|\d{4}) {1,8}(\d{1,2}):(\d\d)([AaPp][Mm])? +(<[A-Z]+>|\d+) (.+)", re.ASCII | re.DOTALL
)
IBM_LINE = re.compile(
    r"\S+ +(\d{1,19}) +\d\d([/.-])\d\d\2\d\d +\d\d:\d\d:\d\d (\*[A-Z0-9]+) +(.+)", re.ASCII | re.DOTALL
)
TOTAL_LINE = re.compile(r"(total|totale|totaal|insgesamt|gesamt) \d+", re.ASCII | re.IGNORECASE)
DIGITS = re.compile(r"\d{1,19}", re.ASCII)
MLS_TIME = re.compile(r"\d{14}(\.\d{1,9})?", re.ASCII)


def iso_time(text: str) -> str:
    """YYYYMMDDHHMMSS[.F], a UTC time (RFC 3659 section 2.3), as ISO text; "" if it is none."""
    if not MLS_TIME.fullmatch(text):
        return ""
    iso = f"{text[:4]}-{text[4:6]}-{text[6:8]}T{text[8:10]}:{text[10:12]}:{text[12:]}"
    try:
        datetime.datetime.fromisoformat(iso[:SECOND].removesuffix(":60"))
    except ValueError:
        return ""
    return iso


def parse_mlsd_line(line: str) -> Optional[Entry]:
    """`fact=value;fact=value; name` (RFC 3659 section 7.2; drafts had no last semicolon). The folder itself is `.`, its
    parent `..`; None if the line tells no kind, or a file has no size."""
    facts_text, _, name = line.partition(" ")
    pairs = [fact.partition("=") for fact in facts_text.split(";") if fact]
    if not name or not all(equals for _, equals, _ in pairs) or (not facts_text.endswith(";") and ";" in name):
        return None  # the last: a space within a fact
    facts = {key.lower(): value for key, _, value in pairs}
    kind, size = facts.get("type", "").lower(), facts.get("size", "")
    mtime = iso_time(facts.get("modify", ""))
    if kind == "file":
        valid = DIGITS.fullmatch(size) and int(size) <= LARGEST_FILE
        return Entry(name, "file", int(size), mtime) if valid else None
    if kind in ("cdir", "pdir"):
        return Entry("." if kind == "cdir" else "..", "dir", 0, "")
    if not kind:
        return None
    return Entry(name, "dir" if kind == "dir" else "link" if "link" in kind else "other", 0, mtime)


@functools.lru_cache(maxsize=1024)
def latest_date(month: int, day: int, today: datetime.date) -> datetime.date:
    """The latest such date at most one day ahead (the server's zone may be), as LIST leaves out the year of about the
    last half year. Raises ValueError."""
    limit = today + datetime.timedelta(days=1)
    for year in range(limit.year, limit.year - 9, -1):  # 29 February
        try:
            date = datetime.date(year, month, day)
        except ValueError:
            continue
        if date <= limit:
            return date
    raise ValueError("no such day")


Readings = dict[str, Entry]  # what a line may mean, by its form


def parse_list_line(line: str, today: datetime.date, forms: Collection[str] = ()) -> Optional[Entry]:
    """One line of LIST among lines of these forms; None if it is of none, or nothing decides between two. The name is
    all that follows one space after the time.

    `Jan 12 2026 10:15 a` has its time after the year, unless other lines show years without or times without years;
    `Jan 12 2026  a` is padded by AIX, unless others with a year are not. After two spaces before the year, as of `ls`,
    either is odd."""
    readings = list_readings(line, today)
    if len(readings) < 2:
        return next(iter(readings.values()), None)
    if "dos" in readings:
        return readings["dos" if "dos" in forms else "padded"]
    if "year" in forms or ("clock" in forms and "padded" not in readings and "padded?" not in readings):
        return readings["year"]
    return readings.get("year and clock") or readings.get("padded")


def list_readings(line: str, today: datetime.date) -> Readings:
    """Of Unix `ls -l` and its relatives, DOS and IIS, or IBM i."""
    readings: Readings = {}
    with contextlib.suppress(ValueError, OverflowError):  # a date or a number that cannot be
        if UNIX_MODE.match(line):
            readings = _unix_readings(line, today)
        elif match := DOS_LINE.fullmatch(line):
            readings = _dos_readings(match)
        elif match := IBM_LINE.fullmatch(line):
            readings = _ibm_reading(*match.groups())
    return readings if all(entry.name and entry.size <= LARGEST_FILE for entry in readings.values()) else {}


def _unix_readings(line: str, today: datetime.date) -> Readings:
    """The columns between mode and size differ (no group, spaces in its name), and owners are called like months: of
    two dates the one after one owner and perhaps a group counts."""
    kind, start = UNIX_KINDS.get(line[0], "other"), line.index(" ")
    for pattern, read in ((UNIX_DATE, _month_dates), (ISO_DATE, _iso_dates)):
        found: list[Readings] = []
        match = pattern.search(line, start)
        while match:
            columns = line[start : match.start()].split()
            if len(columns) > MOST_COLUMNS or any(map(PART_OF_A_DATE.match, columns)):
                break
            size = int(match[1]) if kind == "file" else 0
            readings = {
                form: Entry(name.partition(" -> ")[0] if kind == "link" else name, kind, size, mtime, yearless)
                for form, mtime, yearless, name in (read(match, today) if columns else ())
            }
            if readings and len(columns) in (2, 3):
                return readings
            found += [readings] if readings else []
            match = pattern.search(line, match.start() + 1)
        if found:
            return found[0] if len(found) == 1 else {}
    return {}


Dates = Iterator[tuple[str, str, bool, str]]  # form, time, whether its year is guessed, name


def _month_dates(match: re.Match[str], today: datetime.date) -> Dates:
    """`Jan 12 10:15`, `12. Jan 10:15`, `Jan 12  2026`, `Jan 12 2026 10:15`."""
    _, word, day, day_first, word_after, gap, clock, year, rest = match.groups()
    month, number = month_number(word or word_after), int(day or day_first)
    with contextlib.suppress(ValueError):  # no such day or time
        if month and clock:
            yield "clock", _minute(latest_date(month, number, today), clock), True, rest[1:]
        elif month:
            shown = datetime.date(int(year), month, number)
            doubt, after = "" if gap == " " else "?", CLOCK.match(rest)
            yield "year", shown.isoformat(), False, rest[1:]
            if after:
                yield "year and clock" + doubt, _minute(shown, after[1]), False, rest[after.end() :]
            elif rest.startswith("  "):
                yield "padded" + doubt, shown.isoformat(), False, rest[2:]


def _iso_dates(match: re.Match[str], today: datetime.date) -> Dates:
    """`ls --time-style=long-iso`, or `full-iso`, which shows its zone: UTC."""
    _, day, minute, second, fraction, zone, rest = match.groups(default="")
    with contextlib.suppress(ValueError, OverflowError):
        moment = datetime.datetime.fromisoformat(f"{day}T{minute}{second}")
        if zone:
            moment -= datetime.timedelta(minutes=int(zone[0] + zone[3:]), hours=int(zone[:3]))
        shown = moment.isoformat(timespec="seconds" if second else "minutes") + fraction
        yield "iso", shown if zone or not second else shown + "=", False, rest[1:]


@functools.lru_cache(maxsize=1024)
def _minute(date: datetime.date, clock: str) -> str:
    hour, minute = map(int, clock.split(":"))
    return datetime.datetime.combine(date, datetime.time(hour, minute)).isoformat(timespec="minutes")


@functools.lru_cache(maxsize=256)
def month_number(word: str) -> int:
    """0: it is none. Accents may be missing, or be bytes of another encoding."""
    raw = word.encode("utf-8", "surrogateescape")
    try:
        text = raw.decode("utf-8")
    except UnicodeError:
        text = raw.decode("latin-1")
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return MONTHS.get(plain.lower().rstrip(".,"), 0)


def _dos_readings(match: re.Match[str]) -> Readings:
    """Where one date of a listing shows its day first, none can be trusted. IIS has names 22 columns behind the time,
    whatever they begin with; others pad them by one."""
    first, second, third, hour, minute, half, size, name = match.groups(default="")
    column = match.start(8) - match.end(6 if half else 5)
    iso = len(first) == 4
    year, month, day = map(int, (first, second, third) if iso else (third, first, second))
    if not iso and len(third) == 2:
        year += 1900 if year >= 70 else 2000
    if half and not 1 <= int(hour) <= 12:
        return {}
    hours = int(hour) % 12 + 12 * (half.upper() == "PM") if half else int(hour)
    day_first = not iso and month > 12
    moment = datetime.datetime(year, *((day, month) if day_first else (month, day)), hours, int(minute))
    mtime = "" if day_first else moment.isoformat(timespec="minutes")
    if not size.isdigit():
        name = name[9:] if column + 9 == 22 and name.startswith(" " * 9) else name.lstrip(" ")
        return {"day first" if day_first else "folder": Entry(name, DOS_KINDS.get(size, "other"), 0, mtime)}
    entry = Entry(name, "file", int(size), mtime)
    if day_first:
        return {"day first": entry}
    padded = {"padded": entry._replace(name=name[1:])} if name.startswith(" ") and column != 22 else {}
    return {"dos": entry, **padded}


def _ibm_reading(size: str, separator: str, kind: str, name: str) -> Readings:
    """The order of the date's parts is a setting there: no time."""
    kind = IBM_KINDS.get(kind, "other")
    return {"ibm i": Entry(name.rstrip("/"), kind, int(size) if kind == "file" else 0, "")}


def may_tell_of(lines: Iterable[str], name: str) -> bool:
    """Whether one of them may be about this name."""
    return any(line.rstrip(" /").endswith(name.rstrip(" ")) or f"{name} -> " in line for line in lines)


class ListingReader:
    """Takes the bytes of one MLSD or LIST, within bounds."""

    def __init__(self, mlsd: bool, encoding: str, last: Optional[Listing] = None) -> None:
        self._mlsd, self._encoding = mlsd, encoding
        self._today = datetime.datetime.now(datetime.timezone.utc).date()
        self.entries = Listing(last, mlsd, self._today)
        self.unread: list[str] = []
        self._tail, self._first = b"", True
        self.size = 0  # bytes so far
        self._forms: set[str] = set()  # of the lines with one reading
        self._doubtful: list[str] = []  # those with several

    def feed(self, data: bytes) -> None:
        """The next bytes; none at its end."""
        lines = (self._tail + data).split(b"\n")
        self.size += len(data)
        count = len(self.entries) + len(self._doubtful)
        if max(map(len, lines)) > MAX_LINE or self.size > MAX_LISTING or count > MAX_ENTRIES:
            raise _Broken("a listing without an end")
        self._tail = lines.pop() if data else b""
        for raw in lines:
            if raw in self.entries.lines:
                entry, form = self.entries.lines[raw]
                self.entries.append(entry)
                self._forms.add(form)
                self._first = False
                continue
            line = decode_name(raw[:-1] if raw.endswith(b"\r") else raw, self._encoding)
            if line:
                self._read(line, raw)

    def _read(self, line: str, raw: bytes) -> None:
        first, self._first = self._first, False
        if self._mlsd:
            self._add(line, raw, parse_mlsd_line(line))
        elif not (first and TOTAL_LINE.fullmatch(line)):
            readings = list_readings(line, self._today)
            if len(readings) > 1:
                self._doubtful.append(line)
            else:
                self._add(line, raw, next(iter(readings.values()), None), *readings)

    def _add(self, line: str, raw: bytes, entry: Optional[Entry], form: str = "") -> None:
        self._forms.add(form)
        if entry is None:
            if len(self.unread) <= MOST_UNREAD:
                self.unread.append(line)
        elif entry.name not in (".", ".."):
            self.entries.append(entry)
            if raw:
                self.entries.lines[raw] = entry, form

    def listing(self, folder: str) -> Listing:
        """Raises FileRefused if nobody understands any line."""
        self.entries.prune_lines()
        for line in self._doubtful:
            self._add(line, b"", parse_list_line(line, self._today, self._forms))
        if self.unread and not self.entries:
            raise FileRefused(
                f"{folder or 'the login folder'}: its listing is not understood, e.g. {self.unread[0][:200]!r}"
            )
        if "day first" in self._forms:
            self.entries[:] = [entry._replace(mtime="") for entry in self.entries]
        return self.entries


# ---------------------------------------------------------------------------------------------------------------------
# II.4 FTP and FTPS (RFC 959, 2228, 2428, 3659, 4217)
# ---------------------------------------------------------------------------------------------------------------------

MAX_REPLY_LINES = 1000  # of one multi-line FTP reply
TLS_GOODBYE = 5.0  # seconds to answer a TLS connection's end
EPSV_PATIENCE = 5.0  # seconds for the first data connection, until PASV is tried
NO_COMMAND = ("500", "502", "504")
# No text proves an absence; these only tell refusals apart.
TOO_MANY = (
    r"(?is)(?!.*(attempt|fail|incorrect|wrong|invalid|falsch|versuch|tentativ|intento))"  # on logins that were wrong
    r".*(too many|maximum|limit|exceed|concurren|simultan|already.(logged|connected)|zu viele|"
    r"trop de|demasiad|troppe|te veel|muitas)"
)
IN_USE = (
    r"(?i)\bin use\b|\bbusy\b|\blocked\b|being (used|written|uploaded|modified|transferred)|sharing violation|"
    r"another process|anderen Prozess|autre processus|otro proceso|altro processo|outro processo"
)
NO_FILES = r"(?i)\bno (such |matching )?(files?|entries|data ?sets?|members)\b|not found|\bempty\b|cannot find"
RIGHTS = (
    r"(?i)denied|permi|access|authori[sz]|forbid|verweigert|zugriff|berechtig|refus|interdit|deneg|negad|"
    r"negat|toegang|rechten|nekad|beh[oö]rig|adgang|tilgang|rettighe|oikeu|odm[oó]w|upraw|odep|opr[aá]v|"
    r"megtagad|jogos|izin|eri[sş]im|\u0434\u043e\u0441\u0442\u0443\u043f|\u043f\u0440\u0430\u0432|"
    r"\u6743|\u6b0a|\u62d2|\uad8c\ud55c"
)


def verdict(reply: str) -> str:
    """What a reply is worth, by its code (RFC 959 section 4.2): `found`; `no`, which may mean gone or refused; `busy`;
    `unknown` (the command is); `limit`; `broken` (the connection, or the data connection)."""
    code = reply[:3]
    if code in ("421", "530") and re.match(TOO_MANY, reply):
        return "limit"
    if code in ("221", "421", "425", "426") or code.startswith("52"):
        return "broken"
    if code[0] in "123":
        return "found"
    if code in NO_COMMAND:
        return "unknown"
    return "busy" if code == "450" or re.search(IN_USE, reply) else "no"


def login_folder(reply: str) -> Optional[str]:
    """What PWD tells: in quotes, doubled within it (RFC 959 appendix II), or else the one word that can be a path."""
    line = reply.partition("\n")[0]
    quoted_path = re.search(r'"((?:[^"]|"")+)"', line)
    if quoted_path:
        path = quoted_path[1].replace('""', '"')
        return path.replace("\\", "/") if re.match(r"[A-Za-z]:\\", path) else path
    bare = re.fullmatch(r"2\d\d +(/\S*|\S+\[\S*\])( is .*)?", line.rstrip())
    return bare[1] if bare else None


class FtpClient(ftplib.FTP):
    """The standard library's, with replies bounded in time and lines, EPSV for IPv4 and TLS sessions resumed.
    Names are latin-1 bytes. A reply is a value: login() and transfers alone take one for an error."""

    sock: Any
    timeout: float

    def __init__(self, server: FtpServer) -> None:
        super().__init__(timeout=server.timeout, encoding="latin-1")
        self._server = server
        self._epsv, self._reached = True, False  # reached: a data connection was made
        self.asked = False  # the command of a transfer was sent
        self.silent = self.cut = False  # of the last data connection

    def connect(self, *_: object, **__: object) -> str:
        self.logged_in, self._inbox = False, bytearray()
        self._tls_session: Optional[ssl.SSLSession] = None  # never of another control connection
        self.sock = self._server._dial()
        self.af, self._peer = self.sock.family, self.sock.getpeername()  # now: one that was cut does not tell it
        self._arrivals = select.poll() if hasattr(select, "poll") else None  # not on Windows
        if self._arrivals is not None:
            self._arrivals.register(self.sock, select.POLLIN)
        if self._server.scheme == "ftps":
            self.encrypt()
        self.welcome = self._final_reply()  # after 120: ready in n minutes
        return self.welcome

    def encrypt(self) -> None:
        """What an attacker put in before the handshake must not count as said under it."""
        if self._inbox:
            raise _Broken("text in the clear after AUTH TLS")
        self.sock = self._server._wrap(self.sock, None)
        self.sock.do_handshake()

    # -- replies

    def putline(self, line: str) -> None:
        """What came unasked, as a reply said twice, is none to it."""
        for _ in range(10):
            if self.quiet():
                break
            self.getresp()
        else:
            raise _Broken("replies without an end")
        try:
            super().putline(line)
        except OSError as error:
            raise _Broken from error

    def getresp(self) -> str:
        """The next reply, whatever it says. Raises _Broken at the server's goodbye, LoginRefused, ServerDown."""
        try:
            reply = self.getmultiline()
        except OSError as error:
            raise _Broken from error
        if reply[:3] in ("221", "421"):
            raise _Broken(reply)
        if reply.startswith("530") and self.logged_in:
            raise (ServerDown if verdict(reply) == "limit" else LoginRefused)(f"{self._server.label}: {reply}")
        return reply

    def _final_reply(self) -> str:
        for _ in range(MAX_REPLY_LINES):
            reply = self.getresp()
            if not reply.startswith("1"):
                return reply
        raise _Broken("replies without an end")

    def getmultiline(self) -> str:
        """One whole reply (RFC 959 section 4.2), within about twice the timeout even if it comes in drips."""
        self._deadline = time.monotonic() + self.timeout
        lines = [self.getline()]
        code, more = lines[0][:3], lines[0][3:4] == "-"
        if not code.isdecimal() or len(code) != 3:
            raise _Broken(f"not an FTP reply: {lines[0][:80]!r}")
        while more:
            if len(lines) == MAX_REPLY_LINES:
                raise _Broken("a reply without an end")
            lines.append(self.getline())
            more = lines[-1][:3] != code or lines[-1][3:4].strip() != ""
        return "\n".join(lines)

    def getline(self) -> str:
        while b"\n" not in self._inbox:
            if len(self._inbox) > MAX_LINE:
                raise _Broken(f"a reply line of more than {MAX_LINE} bytes")
            piece = self.sock.recv(4096)
            if not piece:
                raise _Broken("the server closed the connection")
            if time.monotonic() > self._deadline:
                raise socket.timeout()
            self._inbox = (self._inbox + piece).lstrip(b"\r\n")  # no line is empty
        line, _, rest = self._inbox.partition(b"\n")
        self._inbox = rest.lstrip(b"\r\n")
        return line.rstrip(b"\r").decode("latin-1")

    def quiet(self) -> bool:
        """Whether nothing came unasked: no `421 idle too long`, no end of the connection."""
        held = self._inbox or (isinstance(self.sock, ssl.SSLSocket) and self.sock.pending())
        if self._arrivals is not None and not held and not self._arrivals.poll(0):
            return True  # at a third of what follows
        try:
            self.sock.settimeout(0)
            try:
                piece = self.sock.recv(4096)
            finally:
                self.sock.settimeout(self.timeout)
            self._inbox = (self._inbox + piece).lstrip(b"\r\n")
            return bool(piece) and not self._inbox
        except (BlockingIOError, ssl.SSLWantReadError):
            return not self._inbox
        except OSError:
            return False

    def _speaks_before(self, other: socket.socket) -> bool:
        """Waits until one of the two has something to read."""
        if self._inbox or (isinstance(self.sock, ssl.SSLSocket) and self.sock.pending()):
            return True
        with selectors.DefaultSelector() as selector:
            for sock in (self.sock, other):
                selector.register(sock, selectors.EVENT_READ)
            ready = [key.fileobj for key, _ in selector.select(self.timeout)]
        if not ready:
            raise socket.timeout()
        return self.sock in ready

    # -- data connections

    def makepasv(self) -> tuple[str, int]:
        """EPSV (RFC 2428), which no middlebox rewrites, else PASV, whose host may be a trap: it is the control
        connection's."""
        with contextlib.suppress(ftplib.Error, ValueError):
            if self._epsv:
                return self._at(ftplib.parse229(self.sendcmd("EPSV"), self._peer)[1])
        self._epsv = False
        try:
            return self._at(ftplib.parse227(self.sendcmd("PASV"))[1])
        except (ftplib.Error, ValueError) as error:
            raise _Broken from error

    def _at(self, port: int) -> tuple[str, int]:
        if not 0 < port < 65536:
            raise ValueError(f"no port for the data connection: {port}")
        return self._peer[0], port

    def ntransfercmd(self, cmd: str, rest: object = None) -> tuple[socket.socket, Optional[int]]:
        """Raises error_reply if the server refuses, _Broken.

        The command travels while the connection is made. Only the first one is made before: EPSV may lead nowhere."""
        conn, self.asked = None, False
        try:
            while conn is None:
                port, trying = self.makepasv()[1], self._epsv and not self._reached
                if self._reached:
                    self._begin(cmd)
                try:
                    conn = self._server._connected(
                        self.af, self._peer, port, min(EPSV_PATIENCE, self.timeout) if trying else None
                    )
                except OSError:
                    if not trying:
                        raise
                    self._epsv = False
            if not self._reached:
                self._reached = True
                self._begin(cmd)
            return self._begun(conn), None  # no size: the listing's counts
        except (OSError, ValueError) as error:  # ValueError: a socket that abort() has closed
            if conn is None and self.asked and not (isinstance(error, socket.timeout) and self.quiet()):
                self._answered()  # a server that refuses the command closes its port: the reply tells why
            raise _Broken from error

    def _begin(self, cmd: str) -> None:
        self.asked = True
        self.putcmd(cmd)

    def _answered(self) -> None:
        """Waits for the reply that begins a transfer."""
        reply = self.getresp()
        if reply.startswith("2"):  # some servers answer the passive command twice
            reply = self.getresp()
        if not reply.startswith("1"):
            raise ftplib.error_reply(reply)

    def _begun(self, conn: Any) -> Any:
        """Servers make the TLS handshake after their 150, before it, or not at all where there is nothing to send: a
        silent connection."""
        self.silent = self.cut = False
        try:
            if self._server.context is None:
                self._answered()
                return conn
            # Servers demand that the session is resumed. Read late (TLS 1.3 sends it after the handshake) and once (the
            # getter copies it).
            self._tls_session = self._tls_session or self.sock.session
            try:
                conn = self._server._wrap(conn, self._tls_session)
                conn.settimeout(0)
                with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    conn.do_handshake()
                conn.settimeout(self.timeout)
            except OSError as error:
                if not is_end(error):
                    raise
                self.silent = True
            answered = self.silent or self._speaks_before(conn)
            if answered:
                self._answered()
            self.silent = self.silent or not peek(conn)
            if not self.silent:
                conn.do_handshake()
            if not answered:
                self._answered()
            return conn
        except BaseException:
            self._server._discard(conn)
            raise

    def read(self, conn: socket.socket, buffer: memoryview) -> int:
        """Bytes put into the buffer, 0 at the end; `cut`: it was not the end that TLS protects."""
        if self.silent:
            return 0
        try:
            return conn.recv_into(buffer)
        except OSError as error:
            if is_end(error) and not isinstance(error, ConnectionError):
                self.cut = True
                return 0
            raise _Broken from error

    def finish(self, conn: socket.socket) -> str:
        """Closes one read to its end; the reply that follows."""
        if isinstance(conn, ssl.SSLSocket) and not self.silent and not self.cut:
            with contextlib.suppress(OSError, ValueError):  # servers that leave without a goodbye
                conn.settimeout(min(TLS_GOODBYE, self.timeout))
                conn.unwrap()
        self._server._discard(conn)
        return self._final_reply()


def is_end(error: OSError) -> bool:
    """Without the goodbye of TLS."""
    ended = isinstance(error, (ssl.SSLEOFError, ConnectionError)) or error.errno == errno.ENOTCONN
    return ended or getattr(error, "reason", "") == "UNEXPECTED_EOF_WHILE_READING"


def peek(sock: socket.socket) -> bytes:
    """Below any TLS; none at the end, or a reset."""
    try:
        return socket.socket.recv(sock, 1, socket.MSG_PEEK)
    except ConnectionError:
        return b""


class Looker:
    """What MLST, or where that is unknown SIZE, MDTM and CWD, tell of a path.

    A yes is believed. A no proves that nothing is there only if that very command has said yes to a file on this
    connection, says the same of a name that cannot be there, and does not speak of rights; else a listing decides."""

    YES: ClassVar[dict[str, str]] = {"MLST": "250", "SIZE": "213", "MDTM": "213"}

    def __init__(self, server: FtpServer, mlst: bool = False) -> None:
        self._server = server
        self.yes: dict[str, str] = {}  # commands that said yes to a file, and its folder
        self._no: dict[str, str] = {}  # what they say of a name that cannot be there
        self.useless = self._server.habits.unanswered | (set() if mlst else {"MLST"})

    def there(self, path: str, asked: Sequence[str] = ("MLST", "SIZE")) -> Optional[bool]:
        if not all(split_path(path)):  # a root, of whatever kind
            return True
        for command in asked:
            yes, no = self._ask(command, path)
            if yes:
                return True
            proven = self._proves(command, path, no)
            if proven and command == "MLST":
                return False
        if self._server._is_folder(path):
            return True
        return False if proven else None

    def entry(self, path: str) -> Optional[Entry]:
        """None if it is not there or cannot be told."""
        name = split_path(path)[1]
        for entry in self._facts(self._ask("MLST", path)[0]):
            return entry._replace(name=name)
        size = "" if "MLST" in self.yes else self._ask("SIZE", path)[0][4:].strip()
        return Entry(name, "file", int(size), self._time(path)) if DIGITS.fullmatch(size) else None

    def timed(self, path: str, size: int) -> Optional[Entry]:
        """By MLST, or MDTM for the time alone; None if that is not told."""
        started = time.monotonic()
        told = None if "MLST" in self.useless else self.entry(path)
        told = told or Entry("", "file", size, self._time(path))
        habits = self._server.habits  # one slow answer tells little
        habits.question += (time.monotonic() - started - habits.question) / 8
        return told if told.mtime else None

    def joined(self, seen: Entry, told: Entry) -> Optional[Entry]:
        """What LIST shows and what a question tells, in one entry. None if their times differ by no zone."""
        zones = self._server.habits.zones
        line, exact = times_of(seen.mtime).line, times_of(told.mtime).exact
        if not exact or not line:
            return seen._replace(size=told.size, mtime=told.mtime) if exact else None
        if len(line) >= MINUTE:
            zone = zone_between(line, exact)
            if zone is None:
                return None
            if zone not in zones and len(zones) > 1:
                zones.clear()
            zones.add(zone)
        elif line not in (_moved(exact, days * MOST_AHEAD)[:10] for days in (-1, 0, 1)):
            return None
        seconds = f"{(datetime.datetime.fromisoformat(exact[:SECOND]) - EPOCH).total_seconds():.0f}"
        joined = seen._replace(size=told.size, mtime=f"{line[:SECOND]}={seconds}")
        return joined if EPOCH_SECONDS.fullmatch(seconds) else None

    def _facts(self, reply: str) -> list[Entry]:
        lines = [parse_mlsd_line(self._server._text(line)) for line in body_lines(reply)]
        return [entry for entry in lines if entry is not None]

    def _time(self, path: str) -> str:
        return iso_time(self._ask("MDTM", path)[0][4:].strip())

    def _ask(self, command: str, path: str) -> tuple[str, str]:
        """Its yes and its no; both are "" if it is not asked or not answered."""
        if command in self.useless:
            return "", ""
        try:
            reply = self._server._ask(command, path)
        except _Broken as error:
            if not isinstance(error.__cause__, socket.timeout):
                raise
            self._server.habits.unanswered.add(command)
            self._server.connect()
            return "", ""
        if not reply.startswith(self.YES[command]):
            if verdict(reply) == "unknown":
                self.useless.add(command)
            return "", reply
        facts = self._facts(reply) if command == "MLST" else []
        if facts and not any(entry.name == "." or same_name(entry.name, path) for entry in facts):
            return "", ""  # servers take patterns, or tell what is in a folder
        if command == "SIZE" or any(entry.kind == "file" for entry in facts):
            self.yes[command] = split_path(path)[0]
        return reply, ""

    def _proves(self, command: str, path: str, no: str) -> bool:
        """Whether this no means that nothing is there."""
        server = self._server
        if command not in self.yes or command in self.useless or re.search(RIGHTS, server._text(no)):
            return False
        said = server._without_name(no, path)
        if command not in self._no:
            made_up = f"{self.yes[command].rstrip('/')}/ftpcoord-{os.urandom(8).hex()}"
            self._no[command] = server._without_name(server._ask(command, made_up), made_up)
        return said == self._no[command]


class FtpServer(FileServer):
    """ftp://, ftpes:// (AUTH TLS), ftps:// (TLS from the first byte); passive and binary only."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.scheme, self._strict = config.target.scheme, config.tls_close == "strict"
        self.context: Optional[ssl.SSLContext] = None
        if self.scheme != "ftp":
            ca_file, *own = map(config.place, (config.ca_file, config.client_cert, config.client_key))
            self.context = tls_context("ca_file", ca_file, config.tls_verify, *own)
        self._ftp, self._looker = FtpClient(self), Looker(self)
        self._site = config.site_commands()
        self._home: Optional[str] = None
        self._use_mlsd = True
        self._buffer = memoryview(bytearray(READ_BUFFER))

    # -- connection

    def _open(self) -> None:
        greeting = self._ftp.connect()
        if not greeting.startswith("2"):
            raise ServerDown(f"{self.label}: {greeting}")
        if self.scheme == "ftpes":
            self._require("AUTH TLS", "234", "; ftps:// is TLS from the start, ftp:// is unencrypted")
            self._ftp.encrypt()
        self._log_in()
        for command in ("PBSZ 0", "PROT P") if self.context else ():  # RFC 4217 section 9: private data
            self._require(command)
        reply = self._ask("FEAT")
        lines = body_lines(reply) if reply.startswith("211") else []
        features = {line.split(" ")[0].upper(): line for line in lines if line}
        self._use_mlsd = "MLST" in features or "MLSD" in features
        self._looker = Looker(self, "MLST" in features)
        if "UTF8" in features and self.encoding.lower().replace("-", "") == "utf8":
            self._ask("OPTS UTF8 ON")  # some need it, others refuse it and send UTF-8 anyway
        if re.search(r"[ ;](type|size|modify);", features.get("MLST", ""), re.IGNORECASE):
            self._ask("OPTS MLST type;size;modify;")  # those without an asterisk are not shown unless asked for
        started = time.monotonic()
        self._require("TYPE I")
        self.habits.question = self.habits.question or time.monotonic() - started
        for command in self._site:  # after our own OPTS, before paths and listings, whose form they may change
            try:
                self._require(self._wire(command))
            except LoginRefused as error:  # 530: it is logged in
                raise ServerDown(f"{error} ({command})") from None
        reply = self._ask("PWD")
        home = login_folder(reply) if reply.startswith("2") else None
        self._home = None if home is None else self._text(home)

    def _require(self, command: str, code: str = "2", advice: str = "") -> None:
        reply = self._ask(command)
        if not reply.startswith(code):
            raise ServerDown(f"{self.label}: the server refuses {command} ({reply}){advice}")

    def _log_in(self) -> None:
        if any(character in self.user + self.password for character in "\r\n\0"):
            raise LoginRefused(f"{self.label}: the user name or the password contains a line break")
        try:
            self._ftp.login(self._wire(self.user), self._wire(self.password))
        except ftplib.error_reply as refused:
            reply = str(refused)
            for_now = reply.startswith("4") and not reply.startswith("430")  # 430: wrong name or password
            kind = ServerDown if for_now or re.match(TOO_MANY, reply) else LoginRefused
            raise kind(f"{self.label}: login as {self.user or 'anonymous'} refused: {reply}") from None
        self._ftp.logged_in = True

    def _wrap(self, sock: socket.socket, session: Optional[ssl.SSLSession]) -> ssl.SSLSocket:
        assert self.context is not None
        with self._guard:  # wrap_socket() empties the old object
            self._sockets.discard(sock)
        wrapped = self.context.wrap_socket(
            sock, server_hostname=self.host, session=session, do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
        self._adopt(wrapped)
        return wrapped

    def close(self, orderly: bool = True) -> None:
        self._ftp.sock = None
        super().close(orderly)

    # -- commands

    def _wire(self, text: str) -> str:
        """Text as ftplib sends and receives it, each byte a character."""
        return encode_name(text, self.encoding).decode("latin-1")

    def _text(self, wire: str) -> str:
        return decode_name(wire.encode("latin-1"), self.encoding)

    def _line(self, command: str, path: Optional[str] = None) -> str:
        """A command, on a connection to send it by."""
        line = command if path is None else f"{command} {self._wire(path)}"
        if self._ftp.sock is None:
            self.connect()
        return line

    def _ask(self, command: str, path: Optional[str] = None) -> str:
        line = self._line(command, path)
        if command not in ("DELE", "RNTO", "MKD"):
            return self._ftp.sendcmd(line)
        with self._effect():
            return self._ftp.sendcmd(line)

    def _do(self, command: str, path: str, code: str = "2") -> None:
        reply = self._ask(command, path)
        if not reply.startswith(code):
            raise self._problem(path, reply)

    def _problem(self, path: str, reply: str) -> Error:
        """Why a command about a path was refused. _Broken if it was for the connection's sake."""
        kind, text = verdict(self._without_name(reply, path)), f"{path}: {reply}"
        if kind == "broken":
            raise _Broken(reply)
        if kind in ("no", "busy") and self._is_gone(path):
            return FileGone(text)
        return NotNow(text) if kind == "busy" else FileRefused(text)

    def _is_gone(self, path: str, folder: bool = False) -> bool:
        try:
            there = self._looker.there(path, ("MLST", "SIZE")[: 2 - folder])  # SIZE says yes to no folder
            return split_path(path)[1] not in self._siblings(path, folder) if there is None else not there
        except FileRefused:  # the folder cannot be listed: nobody knows
            return False

    def _without_name(self, reply: str, path: str) -> str:
        return reply[:3] + without_name(reply[3:1000], self._wire(path))

    # -- what a FileServer does

    def _full(self, path: str) -> str:
        """list() changes the working folder, so relative paths are joined to the login folder (which may begin with a
        drive)."""
        if path.startswith("/"):
            return path
        if self._ftp.sock is None:
            self.connect()
        if self._home is None:
            raise FileRefused(f"{path!r}: the server does not tell its login folder; use a full path")
        home = self._home.rstrip("/")
        if path in ("", ".", home):
            return self._home
        return path if path.startswith(f"{home}/") else f"{home}/{path}"

    def absolute(self, path: str) -> str:
        return normal_path(self._full(path))

    @conversation("listing")
    def list(self, folder: str, last: Optional[Listing] = None) -> Listing:
        # CWD, then no argument: servers take names with a leading dash or with * for options and patterns.
        path, self.unread, started = self._full(folder), [], time.monotonic()
        reply = self._ask("CWD", path)
        if not reply.startswith("2"):
            raise (FileGone if self._is_gone(path, True) else FileRefused)(f"{folder}: {reply}")
        refusals = []
        for command in ("MLSD", "LIST") if self._use_mlsd else ("LIST",):
            try:
                entries = self._listing(command, folder, last)
            except ftplib.error_reply as refused:
                if verdict(str(refused)) == "broken":
                    raise _Broken(str(refused)) from None
                refusals.append(str(refused))
                continue
            if refusals and "MLSD" not in self._looker.yes:
                self._use_mlsd = False  # named by FEAT, and not to be had
            self._looker.yes[command] = path
            self.habits.listing, self.habits.last = time.monotonic() - started, {path: entries}
            return entries
        said = [self._without_name(reply, path) for reply in refusals if verdict(reply) != "unknown"]
        if said and not self.unread and re.search(NO_FILES, said[-1]) and not re.search(RIGHTS, self._text(said[-1])):
            return Listing()  # some servers say so of an empty folder; CWD has shown it
        raise FileRefused(f"{folder}: {'; '.join(refusals)}")

    def _listing(self, command: str, folder: str, last: Optional[Listing]) -> Listing:
        """The listing of the working folder, whole. Raises error_reply, _Broken."""
        conn = self._ftp.transfercmd(self._line(command))
        reader = self._read_listing(conn, command == "MLSD", last)
        reply = self._ftp.finish(conn)
        if not reply.startswith("2"):
            if reader.size or verdict(reply) == "broken":
                raise _Broken(f"the listing was cut off: {reply}")
            raise ftplib.error_reply(reply)
        if self._ftp.cut and self._strict:
            raise _Broken(
                "the listing may be cut off: its connection ended without the close_notify of TLS (RFC 8446 "
                "section 6.1); tls_close = lax takes it from a server that never sends one"
            )
        if "failed to open directory" in reply:  # vsftpd: 226, although it could not read the folder
            raise ftplib.error_reply(reply)
        if command == "MLSD" and command not in self._looker.yes and reader.unread and not reader.entries:
            raise ftplib.error_reply(f"MLSD is not understood, e.g. {reader.unread[0][:200]!r}")
        return reader.listing(folder)

    def _read_listing(self, conn: socket.socket, mlsd: bool, last: Optional[Listing] = None) -> ListingReader:
        reader, count = ListingReader(mlsd, self.encoding, last), -1
        self.unread = reader.unread
        while count:
            count = self._ftp.read(conn, self._buffer)
            reader.feed(bytes(self._buffer[:count]))
        return reader

    @conversation("looking at")
    def same(self, path: str, seen: Entry) -> Optional[bool]:
        path = self._full(path)
        told = self._looker.entry(path)
        comparable = told and told.kind == seen.kind and (told.mtime or not seen.mtime)
        return self._is_version(path, seen, told if comparable else None)

    def _is_version(self, path: str, seen: Entry, told: Optional[Entry], now: Optional[Entry] = None) -> Optional[bool]:
        """By what a question told, if that fits, or if the time seen came from one. Anything else may be due to zones,
        rights or links: then a listing decides."""
        same = told and same_version(seen, told, self.habits.zones)
        if same or (same is False and "=" in seen.mtime):
            return same
        now = now or self._siblings(path).get(split_path(path)[1])
        if now is None:
            return None
        if told is None and "=" in seen.mtime:
            told = self._looker.timed(path, now.size)
            now = (told and self._looker.joined(now, told)) or now
        elif told is not None:
            self._looker.joined(now, told)
        return now.kind == seen.kind and bool(same_version(seen, now, self.habits.zones))

    @conversation("looking at")
    def exact(self, path: str, seen: Entry) -> Optional[Entry]:
        told = self._looker.timed(self._full(path), seen.size)
        return told and self._looker.joined(seen, told)

    def _there(self, path: str) -> Optional[bool]:
        return self._looker.there(path)

    @conversation("deleting")
    def delete(self, path: str) -> None:
        self._do("DELE", self._full(path))

    def _rename(self, path: str, target: str) -> None:
        self._do("RNFR", path, "3")
        reply = self._ask("RNTO", target)
        if not reply.startswith("2"):
            raise self._problem(path, reply)

    def _is_folder(self, path: str) -> bool:
        return self._ask("CWD", path).startswith("2")

    def _make(self, folder: str) -> None:
        reply = self._ask("MKD", folder)
        if not reply.startswith("2"):
            raise FileRefused(reply)

    def _answers(self) -> bool:
        return self._ask("NOOP").startswith("2")

    def quiet(self) -> bool:
        return self._ftp.sock is None or self._ftp.quiet()

    def fetch_many(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Optional[Error]]]:
        fetched: list[tuple[Job, str]] = []
        wrong: list[tuple[Job, FileChanged]] = []
        together = self._listing_pays(jobs)
        lost: Optional[ServerDown] = None
        for number, job in enumerate(jobs):
            self.unasked, self._ftp.asked = jobs[number + 1 :], False
            try:
                with self._talking(f"fetching {job.path}"):
                    before = self._time_before(job)
                    self._retrieve(job)
            except ServerDown as error:
                lost, self.unasked = error, jobs[number + self._ftp.asked :]
                break
            except FileChanged as error:
                wrong.append((job, error))
            except Error as error:
                yield job, error
            else:
                fetched.append((job, before))
                if not together:  # no file waits for others
                    yield from self._looked_at(fetched, False)
                    fetched = []
        yield from self._looked_at(fetched, True)
        for job, changed in wrong:
            yield job, self._explained(job, changed)
        if lost is not None:
            raise lost

    def _retrieve(self, job: Job) -> None:
        try:
            conn = self._begun(self._line("RETR", self._full(job.path)))
        except ftplib.error_reply as refused:
            raise self._problem(job.path, str(refused)) from None
        got = self._received(conn, job)
        try:
            reply = self._ftp.finish(conn)
        except _Broken:
            if got != job.size or self._aborted:
                raise
            self.close()  # all bytes are here, only the reply is not: a NAT forgot the idle connection
            return
        if verdict(reply) == "broken":
            raise _Broken(f"the transfer was cut off: {reply}")
        if not reply.startswith("2"):
            raise self._problem(job.path, reply)
        if got != job.size:
            raise FileChanged(f"{job.path}: {got} bytes instead of the {job.size} listed")

    def _begun(self, line: str) -> socket.socket:
        try:
            return self._ftp.transfercmd(line)
        except _Broken as error:
            if self._ftp.asked or isinstance(error.__cause__, socket.timeout):
                raise
            self.connect()  # the server hung up before anything was asked
            return self._ftp.transfercmd(line)

    def _received(self, conn: socket.socket, job: Job) -> int:
        """The bytes that came. TLS gives 16 KiB at a time: gathered, unless the line is slow."""
        got, filled, buffer, last = 0, 0, self._buffer, time.monotonic()
        while True:
            try:
                count = self._ftp.read(conn, buffer[filled:])
            except _Broken:  # reset, or left open
                if got != job.size or self._aborted:
                    raise
                count = 0
            got += count
            filled += count
            if got > job.size:
                self.close()  # not to wait for what is on its way
                raise FileChanged(f"{job.path}: more than the {job.size} bytes listed")
            now = time.monotonic()
            if filled > len(buffer) // 2 or not count or now - last > 0.05:
                if filled:
                    job.write(buffer[:filled])
                filled, last = 0, now
            if not count:
                return got

    # -- the second look

    def _listing_pays(self, jobs: Sequence[Job]) -> bool:
        """Whether one listing for all proves the versions, and costs less than a question for each."""
        if not self._use_mlsd and any(job.seen and may_still_run(job.seen.mtime) for job in jobs):
            return False
        if {"MDTM", "MLST"} <= self._looker.useless:
            spare, self.habits.spare_listing = self.habits.spare_listing, False
            return spare or self._use_mlsd
        folders = {split_path(job.path)[0] for job in jobs}
        listing = max(self.habits.listing, 4 * self.habits.question)  # four answers: CWD, EPSV, 150, 226
        return self.habits.listing > 0 and len(jobs) * self.habits.question > len(folders) * listing

    def _time_before(self, job: Job) -> str:
        """The exact time before the fetch, where the line's minute may still run."""
        if job.seen is None or self._use_mlsd or times_of(job.seen.mtime).exact or not may_still_run(job.seen.mtime):
            return ""
        told = self._looker.timed(self._full(job.path), job.size)
        return told.mtime if told else ""

    def _looked_at(self, fetched: Sequence[tuple[Job, str]], together: bool) -> Iterator[tuple[Job, Optional[Error]]]:
        """On a new connection if this one is lost."""
        left = deque(fetched)
        while left:
            connected = self._ftp.sock is not None
            try:
                listed = self._listed(job.path for job, _ in left) if together else {}
                while left:
                    job, before = left[0]
                    error = self._look(job, before, listed.get(split_path(job.path)))
                    left.popleft()
                    yield job, error
            except ServerDown:
                if not connected or self._aborted:
                    raise

    def _listed(self, paths: Iterable[str]) -> dict[tuple[str, str], Entry]:
        """The entries of the folders of these paths."""
        entries: dict[tuple[str, str], Entry] = {}
        for folder in {split_path(path)[0] for path in paths}:
            with contextlib.suppress(FileGone, FileRefused):
                listing = self.list(folder, self.habits.last.get(self._full(folder)))
                entries.update(((folder, entry.name), entry) for entry in listing)
        return entries

    def _look(self, job: Job, before: str, now: Optional[Entry]) -> Optional[Error]:
        """FileChanged if it is another version; gone since is none. Where only LIST tells, the size decides, and one
        listing a poll. `now`: what a listing has shown since."""
        seen = job.seen
        if seen is None or (now and now.kind == "file" and same_version(seen, now)):
            return None
        try:
            with self._talking(f"looking at {job.path}"):
                path = self._full(job.path)
                told = self._looker.timed(path, job.size)
                listing = told or now or self._use_mlsd or self.habits.spare_listing
                self.habits.spare_listing = bool(self.habits.spare_listing and (told or now))
                same = self._is_version(path, seen, told, now) if listing else None
        except FileRefused as refused:
            return FileChanged(f"{job.path}: whether it still is the version listed: {refused}")
        if same is False or (told and before and not same_version(told._replace(mtime=before), told)):
            return FileChanged(f"{job.path}: another version than the one listed")
        joined = told and self._looker.joined(seen, told)
        if joined:
            job.told(joined)
        return None

    def _explained(self, job: Job, error: FileChanged) -> Error:
        """Another version, or a server that does not keep to its word."""
        with contextlib.suppress(FileRefused):
            if job.seen is not None and self.same(job.path, job.seen):
                return FileRefused(f"{error}, which is what it still lists")
        return error


def body_lines(reply: str) -> list[str]:
    """Without the codes, which servers put before each line, or all lines into one."""
    return [re.sub(r"^\d\d\d[ -]|^ +", "", line).lstrip(" ") for line in reply.split("\n")]


# ---------------------------------------------------------------------------------------------------------------------
# II.5 SFTP (draft-ietf-secsh-filexfer-02, version 3) over paramiko's SSH transport
# ---------------------------------------------------------------------------------------------------------------------

SSH_WINDOW = 16 << 20  # bytes; one window per round trip limits the speed
SSH_PACKET = 266_240  # bytes; one whole answer to the largest READ
PORTABLE_READ = 32_768  # bytes of a READ that every server answers in full (draft section 3)
LARGEST_READ = 261_120  # what OpenSSH allows, and is asked for (limits@openssh.com)
SMALL_PIECE = 1024  # bytes
IN_FLIGHT = 8 << 20  # bytes; below SSH_WINDOW, so that answers never block
OPEN_FILES = 64
MAX_MESSAGE = 4 << 20  # bytes of an SFTP message
LARGEST_PACKET = SSH_PACKET + 4096  # of SSH, with padding and MAC
MOST_GREETING = 65_536  # bytes before the SSH handshake
MOST_STDERR = 1 << 20  # bytes of what nobody reads
# The best first; nothing that MUST NOT or SHOULD NOT be used by RFC 9142 and RFC 8332.
SSH_ALGORITHMS = {
    "kex": (
        "mlkem768x25519-sha256",
        "curve25519-sha256",
        "curve25519-sha256@libssh.org",
        "ecdh-sha2-nistp256",
        "ecdh-sha2-nistp384",
        "ecdh-sha2-nistp521",
        "diffie-hellman-group16-sha512",
        "diffie-hellman-group-exchange-sha256",
        "diffie-hellman-group14-sha256",
    ),
    "key_types": (
        "ssh-ed25519",
        "ecdsa-sha2-nistp256",
        "ecdsa-sha2-nistp384",
        "ecdsa-sha2-nistp521",
        "rsa-sha2-512",
        "rsa-sha2-256",
    ),
    "ciphers": ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "aes192-ctr", "aes256-ctr"),
    "digests": ("hmac-sha2-256", "hmac-sha2-512", "hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com"),
}
OFFERED = ("kex_algo_list", "server_key_algo_list", "server_encrypt_algo_list", "server_mac_algo_list")  # in a KEXINIT
INIT, VERSION, OPEN, CLOSE, READ = range(1, 6)
LSTAT, FSTAT = 7, 8
OPENDIR, READDIR, REMOVE, MKDIR = range(11, 15)
REALPATH, STAT, RENAME = range(16, 19)
STATUS, HANDLE, DATA, NAME, ATTRS = range(101, 106)
EXTENDED, EXTENDED_REPLY = 200, 201
OPEN_TO_READ = b"\0\0\0\1\0\0\0\0"  # flags, no attributes
OK = b"\0\0\0\0"


def _paramiko() -> Any:
    try:
        paramiko = importlib.import_module("paramiko")
    except ImportError:
        raise ConfigError("sftp:// needs paramiko: pip install paramiko") from None
    logger = logging.getLogger("paramiko")  # it logs tracebacks
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL)
    return paramiko


def _bounded_transport(paramiko: Any, sock: socket.socket) -> Any:
    """Bounds packets and greeting: paramiko reads a packet of any length before it knows who sent it. Keeps what the
    server offers."""
    transport = paramiko.Transport(sock, disabled_algorithms={"pubkeys": ["ssh-rsa", "ssh-dss"]})  # SHA-1
    packets, parse, transport.offer = transport.packetizer, transport._really_parse_kex_init, {}
    read_all, read_some, greeting = packets.read_all, packets._read_timeout, 0

    def offered(*arguments: Any, **more: Any) -> Any:
        transport.offer = parse(*arguments, **more)
        return transport.offer

    def bounded(count: int, check_rekey: bool = False) -> Any:
        if count > LARGEST_PACKET:
            raise paramiko.SSHException(f"an SSH packet of {count} bytes")
        return read_all(count, check_rekey)

    def counted(timeout: float) -> Any:
        nonlocal greeting
        piece = read_some(timeout)
        greeting += len(piece)
        if greeting > MOST_GREETING:
            raise paramiko.SSHException("a greeting without an end")
        return piece

    packets.read_all, packets._read_timeout, transport._really_parse_kex_init = bounded, counted, offered
    return transport


def known_host_keys(text: str, host: str, port: int) -> tuple[set[bytes], set[bytes]]:
    """(keys, revoked keys) of a host in a known_hosts file (sshd(8)), hashed names and patterns included; certificate
    authorities and lines that cannot be read are not."""
    wanted = host.lower() if port == 22 else f"[{host.lower()}]:{port}"
    keys: set[bytes] = set()
    revoked: set[bytes] = set()
    for line in text.splitlines():
        fields = line.split()
        marker = fields.pop(0) if fields and fields[0].startswith("@") else ""
        if len(fields) < 3 or fields[0].startswith("#") or marker not in ("", "@revoked"):
            continue
        with contextlib.suppress(binascii.Error, ValueError):
            key = base64.b64decode(fields[2], validate=True)
            if key.startswith(_string(fields[1].encode())) and _host_matches(fields[0], wanted):
                (revoked if marker else keys).add(key)
    return keys, revoked


def _host_matches(field: str, wanted: str) -> bool:
    if field.startswith("|1|"):
        _, _, salt, digest = field.split("|")
        return hmac.new(base64.b64decode(salt), wanted.encode(), "sha1").digest() == base64.b64decode(digest)
    found = False
    for pattern in field.lower().split(","):
        # Only * and ? are special there; a bracket is the one around the host of another port.
        matches = fnmatch.fnmatchcase(wanted, pattern.lstrip("!").replace("[", "[[]"))
        if matches and pattern.startswith("!"):
            return False
        found = found or matches
    return found


class FastPipe:
    """In place of paramiko's BufferedPipe, which copies too much. More than `most` unread bytes end the connection:
    paramiko does not hold a server to its window."""

    def __init__(self, most: int) -> None:
        self._most, self._length, self._closed = most, 0, False
        self._pieces: deque[bytes] = deque()
        self._ready = threading.Condition()

    def feed(self, data: bytes) -> None:
        with self._ready:
            self._length += len(data)
            if self._length > self._most:
                raise OSError(errno.EPROTO, "the server sends more than it was allowed to")
            if self._pieces and len(self._pieces[-1]) + len(data) <= SMALL_PIECE:  # each costs more than its bytes
                self._pieces[-1] += data
            elif data:
                self._pieces.append(data)
            self._ready.notify()

    def read(self, nbytes: int, timeout: Optional[float] = None) -> bytes:
        with self._ready:  # or a piece more
            if not self._ready.wait_for(lambda: self._length or self._closed, timeout):
                raise socket.timeout
            pieces: list[bytes] = []
            while self._pieces and nbytes > 0:
                pieces.append(self._pieces.popleft())
                nbytes -= len(pieces[-1])
            data = b"".join(pieces)
            self._length -= len(data)
            return data

    def close(self) -> None:
        with self._ready:
            self._closed = True
            self._ready.notify_all()

    def __len__(self) -> int:
        return self._length


BYTE, NUMBER, LONG = struct.Struct(">B"), struct.Struct(">I"), struct.Struct(">Q")
SIGNED = struct.Struct(">i")  # unsigned in the draft, but servers send times before 1970


class _Fields:
    """Of one message, in turn; _Broken if it is too short for them."""

    __slots__ = ("at", "body")

    def __init__(self, body: memoryview) -> None:
        self.body, self.at = body, 0

    def number(self, form: struct.Struct = NUMBER) -> int:
        try:
            value: int = form.unpack_from(self.body, self.at)[0]
        except struct.error as error:
            raise _Broken("an SFTP message that is too short") from error
        self.at += form.size
        return value

    def string(self) -> memoryview:
        length = self.number()
        text = self.body[self.at : self.at + length]
        if len(text) != length:
            raise _Broken("an SFTP message that is too short")
        self.at += length
        return text

    def handle(self) -> bytes:
        """As every request about it has it (draft section 6.3 allows so many bytes)."""
        handle = bytes(self.string())
        if len(handle) > 256:
            raise _Broken(f"an SFTP handle of {len(handle)} bytes")
        return _string(handle)

    def entry(self, name: str, long_name: bytes = b"") -> Optional[Entry]:
        """Attributes (draft section 5) as an entry; None if they tell no kind, or no size of a file."""
        flags = self.number()
        size = self.number(LONG) if flags & 1 else None
        if flags & 2:
            self.number(LONG)  # user and group
        mode = self.number() if flags & 4 else 0
        if flags & 8:
            self.number()  # time of last access
        mtime = self.number(SIGNED) if flags & 8 else None
        for _ in range(self.number() if flags & 0x80000000 else 0):
            self.string(), self.string()
        if stat.S_IFMT(mode):
            kind = MODE_KINDS.get(stat.S_IFMT(mode), "other")
        elif UNIX_MODE.match(long_name.decode("latin-1")):  # some put the bare name there
            kind = UNIX_KINDS.get(chr(long_name[0]), "other")
        else:
            return None
        if kind == "file" and (size is None or size > LARGEST_FILE):
            return None
        return Entry(name, kind, size or 0 if kind == "file" else 0, "" if mtime is None else _iso_seconds(mtime))


MODE_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "link"}


def _string(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


class SftpSession:
    """SFTP version 3 on an open channel. Requests are gathered until an answer is waited for.

    Not paramiko.SFTPClient: it decodes names, waits without limit, and cannot have several files under way."""

    def __init__(
        self,
        channel: Any,
        errors: tuple[type[BaseException], ...],
        failure: Callable[[], Optional[BaseException]] = lambda: None,
    ) -> None:
        self._channel, self._errors, self._failure = channel, errors, failure
        self._outbox, self._inbox, self._at = bytearray(), b"", 0
        self._number = 0
        self.largest_read = PORTABLE_READ

    def start(self) -> None:
        self._outbox += struct.pack(">IBI", 5, INIT, 3)
        fields = self._message()
        if fields.number(BYTE) != VERSION:
            raise _Broken("not an SFTP server")
        fields.number()
        limits = _string(b"limits@openssh.com")
        if limits in bytes(fields.body):
            kind, fields = self.call(EXTENDED, limits)
            if kind == EXTENDED_REPLY:
                fields.number(LONG)
                limit = fields.number(LONG)
                self.largest_read = max(PORTABLE_READ, min(limit, LARGEST_READ))

    def open(self) -> bool:
        return not self._channel.closed and not self._channel.eof_received

    def send(self, kind: int, body: bytes) -> int:
        """The request's number."""
        self._number = (self._number + 1) & 0xFFFFFFFF
        self._outbox += struct.pack(">IBI", len(body) + 5, kind, self._number) + body
        return self._number

    def receive(self) -> tuple[int, int, _Fields]:
        """The next answer: (kind, number of the request, fields)."""
        fields = self._message()
        return fields.number(BYTE), fields.number(), fields

    def call(self, kind: int, body: bytes) -> tuple[int, _Fields]:
        """One request with none under way, and its answer."""
        number = self.send(kind, body)
        kind, answered, fields = self.receive()
        if answered != number:
            raise _Broken("an SFTP answer out of turn")
        return kind, fields

    def _message(self) -> _Fields:
        self._need(4)
        length: int = NUMBER.unpack_from(self._inbox, self._at)[0]
        if not 5 <= length <= MAX_MESSAGE:
            raise _Broken("not an SFTP message (does a login script print something?)")
        self._need(4 + length)
        start = self._at + 4
        self._at = start + length
        return _Fields(memoryview(self._inbox)[start : self._at])

    def _need(self, count: int) -> None:
        missing = count - (len(self._inbox) - self._at)
        if missing <= 0:
            return
        pieces = [self._inbox[self._at :]] if self._at < len(self._inbox) else []
        try:
            if self._outbox:
                self._channel.sendall(bytes(self._outbox))
                self._outbox.clear()
            while missing > 0:
                piece = self._channel.recv(1 << 16)  # more is joined
                if not piece:
                    raise _Broken(str(self._failure() or "") or "the server closed the connection")
                pieces.append(piece)
                missing -= len(piece)
        except self._errors as error:
            raise _Broken from error
        self._inbox, self._at = b"".join(pieces), 0


class _EndOfFile(FileRefused):
    pass


class _Failure(FileRefused):
    """For no stated reason."""


REFUSALS: dict[int, type[Error]] = {1: _EndOfFile, 2: FileGone, 4: _Failure}  # by status


def _status_error(path: str, kind: int, fields: _Fields) -> Error:
    """The Error that a STATUS tells. Raises _Broken if it is another answer."""
    if kind != STATUS:
        raise _Broken(f"an SFTP answer of kind {kind} that was not asked for")
    code, text = fields.number(), ""
    with contextlib.suppress(_Broken):  # old servers send no text
        text = bytes(fields.string()).decode("utf-8", "replace")
    return REFUSALS.get(code, FileRefused)(f"{path}: {text or 'refused'} (SFTP status {code})")


def in_use(error: Error, path: str) -> bool:
    return bool(re.search(rf"{IN_USE}|status 17\)", without_name(str(error)[len(path) :], path)))


NOTHING_YET = memoryview(b"")


class _Download:
    def __init__(self, job: Job, name: bytes) -> None:
        self.job, self.name, self.handle = job, name, b""
        self.asked = self.written = 0  # bytes
        self.pieces: dict[int, memoryview] = {}  # before their turn, by offset
        self.end_seen = self.ended = False
        self.look = 0  # the request for the version as it is after the last READ
        self.problem: Optional[FileChanged] = None  # LSTAT is to say why

    @property
    def whole(self) -> bool:
        return self.end_seen and self.written == self.job.size


class SftpPipeline:
    """Fetches files with many requests under way.

    Each file is asked for up to one byte past its listed size, so that its end is seen. FSTAT behind the last READ
    proves the version; where it does not, LSTAT decides. What cannot be opened for no stated reason is tried once more
    at the end, alone: servers limit the number of open files."""

    def __init__(self, session: SftpSession, encoding: str, habits: Optional[Habits] = None) -> None:
        self._session, self._encoding, self._habits = session, encoding, habits or Habits()
        self._closed: dict[bytes, float] = {}  # handle -> request of CLOSE
        self._waiting: dict[int, tuple[_Download, int, int, int]] = {}  # request -> file, kind; offset, length of READ
        self._hungry: deque[_Download] = deque()  # files of which more is to be asked for
        self._alone = False
        self._open = self._in_flight = 0  # files; bytes asked for and not yet here
        self._again: list[Job] = []  # alone
        self._ended: deque[tuple[Job, Optional[Error]]] = deque()  # untold
        self.fetched: set[_Download] = set()  # whole, and not looked at yet

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Optional[Error]]]:
        for most in (self._habits.open_files, 1):
            todo, self._again, self._alone = deque(jobs), [], most == 1
            while todo or self._open or self._waiting or self._ended:
                while todo and self._open < most:
                    self._ask_to_open(todo.popleft())
                self._ask_for_more()
                while self._ended:
                    yield self._ended.popleft()
                if self._waiting:
                    self._take()
                elif self._open:
                    raise _Broken("an SFTP server that left out a part of a file")
            jobs = self._again

    # -- ask

    def _ask(self, file: _Download, kind: int, body: bytes, offset: int = 0, length: int = 0) -> int:
        number = self._session.send(kind, body)
        self._waiting[number] = (file, kind, offset, length)
        self._in_flight += length
        return number

    def _ask_to_open(self, job: Job) -> None:
        try:
            name = _string(encode_name(job.path, self._encoding))
        except FileRefused as error:
            self._ended.append((job, error))
            return
        self._open += 1
        self._ask(_Download(job, name), OPEN, name + OPEN_TO_READ)

    def _ask_for_more(self) -> None:
        while self._hungry and self._in_flight < IN_FLIGHT:
            file = self._hungry[0]
            length = min(self._session.largest_read, file.job.size + 1 - file.asked)
            if file.ended or file.problem or length <= 0:
                self._hungry.popleft()
                continue
            if file.asked - file.written >= IN_FLIGHT:
                return  # wait for the piece that is late
            self._read(file, file.asked, length)
            file.asked += length
            if length > file.job.size and file.job.seen is not None:
                self._look(file, FSTAT)  # in the one flight that such a file takes

    def _read(self, file: _Download, offset: int, length: int) -> None:
        self._ask(file, READ, file.handle + struct.pack(">QI", offset, length), offset, length)

    def _look(self, file: _Download, kind: int) -> None:
        file.look = self._ask(file, kind, file.handle if kind == FSTAT else file.name)

    # -- take

    def _take(self) -> None:
        kind, number, fields = self._session.receive()
        if number not in self._waiting:
            raise _Broken("an SFTP answer out of turn")
        file, asked, offset, length = self._waiting.pop(number)
        self._in_flight -= length
        if file.ended:  # of CLOSE, or of a file that has been given up
            return
        try:
            if asked == OPEN:
                self._opened(file, number, kind, fields)
            elif asked == READ and not file.problem:
                self._take_piece(file, kind, fields, offset, length)
            elif number == file.look:
                self._looked(file, asked, kind, fields)
        except FileChanged as error:
            file.problem = error
            if file.job.seen is None:
                self._close(file, error)
            else:
                self._look(file, LSTAT)
        except Error as error:
            self._close(file, error)

    def _opened(self, file: _Download, number: int, kind: int, fields: _Fields) -> None:
        if kind == HANDLE:
            file.handle = fields.handle()
            if self._closed.get(file.handle, 0) > number:
                self._habits.open_files = 1
                self.fetched.clear()
                raise _Broken("an SFTP server that gives open files the same handle")
            self._closed[file.handle] = float("inf")
            self._hungry.append(file)
            return
        error = _status_error(file.job.path, kind, fields)
        if self._alone or not isinstance(error, _Failure):
            raise error
        self._again.append(file.job)
        self._open -= 1

    def _take_piece(self, file: _Download, kind: int, fields: _Fields, offset: int, length: int) -> None:
        path, size, data = file.job.path, file.job.size, NOTHING_YET
        if kind == DATA:
            data = fields.string()
            if len(data) > length:
                raise _Broken("an SFTP server that sends more than was asked for")
        else:
            error = _status_error(path, kind, fields)
            if not isinstance(error, _EndOfFile) and (offset < size or in_use(error, path)):
                raise FileRefused(str(error))
        end = offset + len(data)
        if end > size:
            raise FileChanged(f"{path}: more than the {size} bytes listed")
        if not data or (end == size and length <= PORTABLE_READ):  # the end alone cuts such a READ short
            if end < size:
                raise FileChanged(f"{path}: {end} bytes instead of the {size} listed")
            file.end_seen = True
        elif len(data) < length:  # a server may give less: ask for the rest
            self._read(file, end, length - len(data))
            file.look = 0  # that look came before the end
        if data and offset != file.written:
            file.pieces[offset] = memoryview(bytes(data))
            return
        while data:
            file.job.write(data)
            file.written += len(data)
            data = file.pieces.pop(file.written, NOTHING_YET) if file.pieces else NOTHING_YET
        if file.whole and file.job.seen is None:
            self._close(file)
        elif file.whole:
            self.fetched.add(file)
            if file.look not in self._waiting:
                self._look(file, FSTAT)

    def _looked(self, file: _Download, asked: int, kind: int, fields: _Fields) -> None:
        job, problem = file.job, file.problem
        now = fields.entry(job.path, b"-rw-------") if kind == ATTRS else None
        same = now and now.kind == "file" and job.seen and same_version(job.seen, now)
        timed = now and job.seen and (now.mtime or not job.seen.mtime)
        another = FileChanged(f"{job.path}: another version than the one listed") if now and not same else None
        if asked == FSTAT:
            if same and timed and file.whole:
                self._close(file)
            elif file.whole:  # else it came before the end, and is asked for again
                file.problem = another
                self._look(file, LSTAT)
            return
        error: Optional[Error] = problem or another
        if kind != ATTRS and isinstance(_status_error(job.path, kind, fields), FileGone):
            error = problem and FileGone(str(problem))
        elif same:
            error = None if file.whole else FileRefused(f"{problem}, which is what it still lists")
        # Some servers give a file once, and refuse to be asked about it: then the size decides.
        self._close(file, error)

    def _close(self, file: _Download, error: Optional[Error] = None) -> None:
        if isinstance(error, FileRefused) and in_use(error, file.job.path):
            error = NotNow(str(error))
        file.ended = True
        self._open -= 1
        self.fetched.discard(file)
        if file.handle:
            self._closed[file.handle] = self._ask(file, CLOSE, file.handle)
        self._ended.append((file.job, error))


def fingerprint(key: bytes) -> str:
    """A host key's, as ssh-keygen -lf prints it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(key).digest()).decode().rstrip("=")


class SftpServer(FileServer):
    """The host's key is checked before anything secret is sent; no agent, no key but the configured."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._paramiko = _paramiko()
        self._key_file, self._passphrase = config.place(config.key), config.secret("key_passphrase")
        self._host_key = config.host_key or ""
        self._known_hosts = config.place(config.known_hosts or "~/.ssh/known_hosts")
        self._transport: Any = None
        self._session: Optional[SftpSession] = None

    # -- connection

    def _open(self) -> None:
        paramiko = self._paramiko
        key = self._private_key() if self._key_file else None
        known, revoked = self._trusted_keys()
        self._transport = transport = _bounded_transport(paramiko, self._dial())
        # connect()'s own timer says what it was: paramiko's must not come before it.
        patience = self.timeout + 5.0
        transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = patience
        options = transport.get_security_options()
        for kind, names in SSH_ALGORITHMS.items():
            setattr(options, kind, [name for name in names if name in getattr(options, kind)])
        self._prefer_known_types(options, known)
        try:
            transport.start_client(timeout=patience)
            server_key = transport.get_remote_server_key()  # raises if the time was up
        except paramiko.ssh_exception.IncompatiblePeer as error:
            raise ServerDown(f"{self.label}: {self._nothing_in_common(options, transport.offer) or error}") from None
        self._check_host_key(server_key.asbytes(), known, revoked)
        self._log_in(transport, key)
        channel = transport.open_session(SSH_WINDOW, SSH_PACKET, timeout=patience)
        channel.settimeout(self.timeout)
        channel.in_buffer, channel.in_stderr_buffer = FastPipe(SSH_WINDOW), FastPipe(MOST_STDERR)
        channel.invoke_subsystem("sftp")  # no limit but the watchdog of connect()
        session = SftpSession(channel, (OSError, EOFError, paramiko.SSHException), transport.get_exception)
        session.start()
        self._session, self._yes = session, set[int]()

    def _private_key(self) -> Any:
        """Raises ConfigError; a passphrase never shows in it."""
        paramiko, path = self._paramiko, self._key_file
        problem = ""
        for kind in (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey):
            try:
                return kind.from_private_key_file(path, password=self._passphrase or None)
            except paramiko.PasswordRequiredException:
                raise ConfigError(f"key {path} is encrypted: set key_passphrase") from None
            except OSError as error:
                raise ConfigError(f"key {path}: {error.strerror}") from None
            except Exception as error:  # each class refuses others in its own way
                problem = str(error) or type(error).__name__
        raise ConfigError(f"key {path} cannot be used (format, or wrong key_passphrase): {problem}")

    def _trusted_keys(self) -> tuple[set[bytes], set[bytes]]:
        if self._host_key:
            return set(), set()
        try:
            with open(self._known_hosts, encoding="utf-8", errors="surrogateescape") as file:
                return known_host_keys(file.read(), self.host, self.port)
        except FileNotFoundError:
            return set(), set()
        except OSError as error:
            raise ConfigError(f"known_hosts {self._known_hosts}: {error.strerror}") from None

    @staticmethod
    def _prefer_known_types(options: Any, known: set[bytes]) -> None:
        """Else a server with several keys would show one that known_hosts does not have."""
        types = {bytes(_Fields(memoryview(key)).string()).decode("latin-1") for key in known}
        if "ssh-rsa" in types:  # the kind of key; signed with SHA-2 only
            types |= {"rsa-sha2-512", "rsa-sha2-256"}
        options.key_types = sorted(options.key_types, key=lambda name: name not in types)

    @staticmethod
    def _nothing_in_common(options: Any, offer: Mapping[str, Any]) -> str:
        """What to do about it; "" if that is not the trouble."""
        for kind, name in zip(SSH_ALGORITHMS, OFFERED):
            taken, offered = getattr(options, kind), offer.get(name, ())
            if offered and not set(taken) & set(offered):
                return (
                    f"no algorithm in common ({kind}): the server offers {', '.join(offered)[:300]}; "
                    f"taken are {', '.join(taken)}; have the server's owner enable one of those"
                )
        return ""

    def _check_host_key(self, key: bytes, known: set[bytes], revoked: set[bytes]) -> None:
        shown = fingerprint(key)
        pins = [pin.strip().rstrip("=") for pin in self._host_key.split(",") if pin.strip()]
        if shown in pins or (key in known and key not in revoked):
            return
        if pins:
            problem = "is not the one in host_key"
        elif key in revoked:
            problem = f"is revoked in {self._known_hosts}"
        elif known:
            problem = f"is NOT the one in {self._known_hosts}: it was changed, or someone is in between"
        else:
            problem = f"is not in {self._known_hosts}"
        raise ServerDown(
            f"{self.label}: the server's key {shown} {problem}; nothing was sent. If its owner "
            f"confirms it, set host_key={shown}, or add the line that "
            f"`ssh-keyscan -p {self.port} {self.host}` prints to known_hosts"
        )

    def _log_in(self, transport: Any, key: Any) -> None:
        if key is None and not self.password:
            raise LoginRefused(f"{self.label}: neither password nor key is set")
        proofs: dict[str, Callable[[], object]] = {}
        if key is not None:
            proofs["the key"] = lambda: transport.auth_publickey(self.user, key)
        if self.password:  # if the key is refused, or as a second factor
            proofs["the password"] = lambda: self._give_password(transport)
        refusals = []
        for what, prove in proofs.items():
            if transport.is_active() and not transport.is_authenticated():
                refusals.append(f"{what}: {self._refusal(prove)}")
        # Servers that allow few tries hang up (sshd's MaxAuthTries); asked at once again they lock the account.
        if not transport.is_authenticated():
            raise LoginRefused(f"{self.label}: login as {self.user} refused: {'; '.join(refusals)}")

    def _refusal(self, prove: Callable[[], object]) -> str:
        try:
            prove()
        except self._paramiko.BadAuthenticationType as error:
            return f"the server wants {' or '.join(error.allowed_types)}"
        except self._paramiko.AuthenticationException as error:
            return str(error)
        except self._paramiko.SSHException as error:
            if "info request" not in str(error):  # so paramiko calls a question that it does not expect
                raise
            return "the server wants it to be changed (it has expired?)"
        return "taken, but the server wants a further proof; set both key and password"

    def _give_password(self, transport: Any) -> None:
        try:
            transport.auth_password(self.user, self.password, fallback=False)
        except self._paramiko.BadAuthenticationType as error:
            if "keyboard-interactive" not in error.allowed_types:
                raise
            given: list[str] = []

            def answer(title: str, instructions: str, prompts: Sequence[tuple[str, bool]]) -> list[str]:
                if len(given) + len(prompts) > 1:  # such as for a new one
                    raise self._paramiko.AuthenticationException(
                        f"the server asks for more than a password: {prompts[0][0][:200]!r}"
                    ) from None
                given.extend(self.password for _ in prompts)
                return [self.password for _ in prompts]

            transport.auth_interactive(self.user, answer)

    def close(self, orderly: bool = True) -> None:
        transport, self._transport, self._session = self._transport, None, None
        self._shut_down(orderly)  # the transport's thread ends at once
        if transport is not None:
            transport.close()
        super().close(orderly)

    def _talk(self) -> SftpSession:
        if self._session is None:
            self.connect()
        assert self._session is not None
        return self._session

    # -- what a FileServer does

    def _name(self, path: str) -> bytes:
        return _string(encode_name(path or ".", self.encoding))

    def _ask(self, kind: int, path: str) -> tuple[int, _Fields]:
        return self._talk().call(kind, self._name(path))

    def _do(self, path: str, kind: int, body: bytes) -> None:
        """A request that changes something. Raises FileGone, FileRefused."""
        session = self._talk()
        with self._effect():
            kind, fields = session.call(kind, body)
        if kind != STATUS or fields.body[fields.at :][:4] != OK:
            error = _status_error(path, kind, fields)
            if isinstance(error, FileGone) and self.exists(path):  # or the folder of a RENAME's target is gone
                raise FileRefused(f"{error}, but it is there")
            raise error

    @conversation("looking at")
    def absolute(self, path: str) -> str:
        kind, fields = self._ask(REALPATH, path)
        if kind == NAME and fields.number():
            return normal_path(decode_name(bytes(fields.string()), self.encoding))
        if not path.startswith("/"):
            raise _status_error(path, kind, fields)
        return normal_path(path)

    @conversation("listing")
    def list(self, folder: str, last: Optional[Listing] = None) -> Listing:
        kind, fields = self._ask(OPENDIR, folder)
        if kind != HANDLE:
            raise _status_error(folder, kind, fields)
        handle = fields.handle()
        entries = Listing(last)
        vague: list[str] = []  # names whose attributes tell no kind
        seen = size = 0
        while True:
            kind, fields = self._talk().call(READDIR, handle)
            count = fields.number() if kind == NAME else 0
            if not count:  # none is Synology's way to say that this was all
                break
            seen, size = seen + count, size + len(fields.body)
            if seen > MAX_ENTRIES or size > MAX_LISTING:
                raise _Broken("a listing without an end")
            body, at = bytes(fields.body), fields.at
            for _ in range(count):
                key = body[at : at + 4 + int.from_bytes(body[at : at + 4], "big")]
                told = entries.lines.get(key)
                if told and body.startswith(told[1], at):
                    at += len(told[1])
                else:
                    fields.at = at
                    name = decode_name(bytes(fields.string()), self.encoding)
                    entry = fields.entry(name, bytes(fields.string()))
                    line, at = body[at : fields.at], fields.at
                    if name in (".", ".."):
                        continue
                    if entry is None:
                        vague.append(name)
                        continue
                    told = entries.lines[key] = entry, line
                entries.append(told[0])
        self._talk().call(CLOSE, handle)
        error = None if kind == NAME else _status_error(folder, kind, fields)
        if error is not None and not isinstance(error, _EndOfFile):
            raise FileRefused(str(error)) if seen else error  # what showed something is there
        entries.prune_lines()
        self.unread = []
        for name in vague:
            entry = self._stat(STAT, posixpath.join(folder, name))[1] if is_plain_name(name) else None
            if entry is not None:
                entries.append(entry)
            elif len(self.unread) <= MOST_UNREAD:
                self.unread.append(name)
        if self.unread and not entries:
            raise FileRefused(
                f"{folder or 'the login folder'}: the server tells no kind or size of "
                f"anything in it: {self.unread[0][:200]!r}"
            )
        return entries

    @conversation("looking at")
    def same(self, path: str, seen: Entry) -> Optional[bool]:
        there, now = self._stat(LSTAT, path)
        if there is False:
            return None
        if now is None or now.kind != seen.kind or (seen.mtime and not now.mtime):  # a listing may follow links
            now = self._siblings(path).get(split_path(path)[1])
        return None if now is None else now.kind == seen.kind and bool(same_version(now, seen))

    def _there(self, path: str) -> Optional[bool]:
        return self._stat(LSTAT, path)[0]

    def _stat(self, question: int, path: str) -> tuple[Optional[bool], Optional[Entry]]:
        """_there(), and what it is. A no counts after a yes to a file."""
        kind, fields = self._ask(question, path)
        if kind == ATTRS:
            entry = fields.entry(split_path(path)[1])
            if entry and entry.kind == "file":
                self._yes.add(question)
            return True, entry
        gone = isinstance(_status_error(path, kind, fields), FileGone)
        return False if gone and question in self._yes else None, None

    def fetch_many(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Optional[Error]]]:
        pipeline, left, most = None, list(jobs), self.habits.open_files
        try:
            with self._talking("fetching"):  # left early, it closes: answers are under way
                pipeline = SftpPipeline(self._talk(), self.encoding, self.habits)
                for job, error in pipeline.run(jobs):
                    left.remove(job)
                    yield job, error and self._masked(error)
        except ServerDown:
            for job in [file.job for file in pipeline.fetched] if pipeline else []:
                left.remove(job)
                changed = job.seen is not None and self.same(job.path, job.seen) is False  # on a new connection
                yield job, FileChanged(f"{job.path}: another version than the one listed") if changed else None
            if self.habits.open_files < most or len(left) < len(jobs):  # one more has come
                self.unasked = left
            if left:
                raise

    @conversation("deleting")
    def delete(self, path: str) -> None:
        self._do(path, REMOVE, self._name(path))

    def _rename(self, path: str, target: str) -> None:
        self._do(path, RENAME, self._name(path) + self._name(target))

    def _make(self, folder: str) -> None:
        self._do(folder, MKDIR, self._name(folder) + b"\0\0\0\0")

    def _is_folder(self, path: str) -> bool:
        there, entry = self._stat(STAT, path)  # a link to a folder will do
        if not there or entry is not None:
            return entry is not None and entry.kind == "dir"
        kind, fields = self._ask(OPENDIR, path)  # STAT may tell no kind
        if kind != HANDLE:
            return False
        handle = fields.handle()
        kind, fields = self._talk().call(READDIR, handle)  # some open whatever they are told to
        self._talk().call(CLOSE, handle)
        return kind == NAME or isinstance(_status_error(path, kind, fields), _EndOfFile)

    def quiet(self) -> bool:
        return self._session is None or self._session.open()

    def _answers(self) -> bool:
        self._ask(LSTAT, ".")
        return True


# ---------------------------------------------------------------------------------------------------------------------
# II.6 Names: patterns, companions, orders, and where files are moved to
# ---------------------------------------------------------------------------------------------------------------------

TEMPORARY = (".tmp", ".part", ".partial", ".filepart", ".writing", ".crdownload", "~")  # names uploaders write under
NOT_IN_A_NAME = re.compile(r"[/\0\r\n]")


def is_plain_name(name: str) -> bool:
    """One path segment: others would lead out of the folder (CWE-22) or split a command."""
    if name in ("", ".", "..") or NOT_IN_A_NAME.search(name):
        return False
    return os.name == "posix" or not re.search(r'[\\:*?"<>|]', name)


SPECIAL: dict[str, Callable[[str], bool]] = {  # asked for by patterns of their kind alone
    "hidden": lambda name: name.startswith("."),
    "temporary": lambda name: name.lower().endswith(TEMPORARY),
}
EXPRESSION = "re:"


def glob_fits(name: str, glob: str) -> bool:
    """As fnmatchcase(), which before Python 3.10 raises for a range like `[z-a]`: it fits nothing."""
    with contextlib.suppress(re.error):
        return fnmatch.fnmatchcase(name, glob)
    return False


def matcher(patterns: Iterable[str], ignore_case: bool = False) -> Callable[[str], bool]:
    """For paths below the polled folder: a pattern without a slash is for the name alone. Raises re.error."""
    texts = [p[len(EXPRESSION) :] if p.startswith(EXPRESSION) else fnmatch.translate(p) for p in patterns]
    case = re.IGNORECASE if ignore_case else 0
    globs = [("/" in pattern, re.compile(text, case).fullmatch) for pattern, text in zip(patterns, texts)]

    def matches(relative: str) -> bool:
        name = relative.rpartition("/")[2]
        return any(match(relative if for_path else name) for for_path, match in globs)

    return matches


def as_glob(pattern: str) -> str:
    """A pattern whose text tells whether it asks for a kind: an escaped dot is one, another is any letter."""
    if not pattern.startswith(EXPRESSION):
        return pattern
    return re.sub(r"\\(.)|\.", lambda m: m[1] or "?", pattern[len(EXPRESSION) :].strip("^$"))


class Patterns:
    """What `pattern`, `exclude`, and limits of age and size say of a file."""

    def __init__(self, config: Config) -> None:
        self._config = config
        patterns, self._folded = config.patterns("pattern"), config.folded
        self._excluded = matcher(config.patterns("exclude"), config.ignore_case)
        self._wanted = {"": matcher(patterns, config.ignore_case)}
        for kind, is_one in SPECIAL.items():
            named = [pattern for pattern in patterns if is_one(posixpath.basename(as_glob(pattern)))]
            self._wanted[kind] = matcher(named, config.ignore_case)
        self._folders = {part for pattern in patterns for part in self._folded(as_glob(pattern)).split("/")[:-1]}

    def want(self, relative: str) -> bool:
        name = relative.rpartition("/")[2]
        kind = next((kind for kind, is_one in SPECIAL.items() if is_one(name)), "")
        return self._wanted[kind](relative) and not self._excluded(relative)

    def limit(self, entry: Entry) -> tuple[str, str]:
        """Selector.verdict's on a file that is outside of them."""
        config = self._config
        mtime = None if config.max_age is None else epoch_seconds(entry.mtime)
        if config.max_age is not None and mtime is not None and time.time() - mtime > config.max_age:
            return "skip", "older than max_age"
        if entry.size < config.min_size:
            return "skip", f"smaller than min_size: {entry.size} bytes"
        if config.max_size is not None and entry.size > config.max_size:
            return "warn", f"larger than max_size: {entry.size} bytes"
        return "", ""

    def leave_out(self, relative: str) -> str:
        if self._excluded(relative):
            return "excluded"
        name = self._folded(relative.rpartition("/")[2])
        for kind, is_one in SPECIAL.items():
            if is_one(name) and not any(is_one(part) and fnmatch.fnmatchcase(name, part) for part in self._folders):
                return f"{kind}, and no pattern names it"
        return ""


# -- companions -------------------------------------------------------------------------------------------------------
PLACE = re.compile(r"\{(name|stem)\}")
Beside = list[tuple[str, str, Optional[Entry]]]  # of each companion: template, path, listed entry


def companion_of(name: str, template: str) -> str:
    """`{stem}` is the name without its last suffix."""
    return PLACE.sub(lambda match: name if match[1] == "name" else posixpath.splitext(name)[0], template)


def is_older(companion: Entry, entry: Entry) -> bool:
    """As far as both show their times."""
    return any(x[: len(y)] < y[: len(x)] for x, y in zip(times_of(companion.mtime), times_of(entry.mtime)))


class Companions:
    """What files need beside them, and which of them still do."""

    def __init__(self, config: Config) -> None:
        self._config, self._templates, self._folded = config, config.companions(), config.folded
        texts = [".*".join(map(re.escape, PLACE.split(self._folded(text))[::2])) for text in self._templates]
        self._fits = re.compile("|".join(texts) or "(?!)", re.DOTALL).fullmatch
        self._look: Optional[Look] = None  # the last listing ...
        self._there: dict[str, Found] = {}  # ... and the companions in it
        self._needed: dict[str, dict[str, Entry]] = {}  # by companion: the listed files that need it
        self._wrong: dict[str, Seal] = {}  # of files that their companion refutes
        self.renewed: set[str] = set()  # whose companion is another one by now
        self._gone: set[str] = set()  # removed files, which that listing may show
        self._claimed: dict[str, Beside] = {}  # by file: as they were at the claim

    def known(self, path: str) -> bool:
        """Whether the last listing tells what a file has beside it."""
        return not self._templates or (self._look is not None and self._look.lacks(path))

    def include(self, name: str) -> bool:
        return bool(self._templates and self._fits(self._folded(name)))

    def among(self, listing: Iterable[Found]) -> dict[str, Found]:
        listing = listing if self._templates else ()
        return {self._folded(found.path): found for found in listing if self.include(found.entry.name)}

    def see(self, listing: Look, wanted: Callable[[Found], bool], busy: Set[str]) -> dict[str, Found]:
        """`busy` are the files that were in work before the listing. Gives the companions in it."""
        needed: dict[str, dict[str, Entry]] = {}
        for companion, files in self._needed.items():  # what it may hide still needs them
            for path, entry in files.items():
                if not listing.lacks(path):
                    needed.setdefault(companion, {})[path] = entry
        there = self.among(listing)
        self._gone &= busy
        for found in filter(wanted, listing if self._templates else ()):
            for _, path, _ in self.of(found.path, there):
                needed.setdefault(self._folded(path), {})[found.path] = found.entry
        self._needed, self._there, self._look = needed, there, listing
        self.renewed = {path for path, seal in list(self._wrong.items()) if seal.is_replaced(self.of(path))}
        return there

    def of(self, path: str, there: Optional[Mapping[str, Found]] = None) -> Beside:
        """By a listing (None: the last), in its spelling."""
        beside = []
        for template in self._templates:
            name = posixpath.basename(path)
            companion = path[: len(path) - len(name)] + companion_of(name, template)
            found = (self._there if there is None else there).get(self._folded(companion))
            beside.append((template, found.path if found else companion, found.entry if found else None))
        return beside

    def verdict(self, found: Found, there: Mapping[str, Found]) -> tuple[str, str]:
        """Selector.verdict's."""
        for template, _, entry in self.of(found.path, there):
            marker = template.removeprefix("{name}")
            if entry is None:
                return "hold", f"its marker {marker} is not there"
            if template != self._config.checksum and is_older(entry, found.entry):
                return "warn", f"its marker {marker} is older than the file"
        return "", ""

    def hold(self, works: Iterable[Work], listing: Look) -> None:
        """Of files to be claimed, as they are, or were if this listing hides them."""
        there = self.among(listing)
        for path in (work.path for work in works):
            self._claimed[path] = self.of(path, there if listing.lacks(path) else None)

    def at_claim(self, path: str) -> Beside:
        return self._claimed.get(path) or self.of(path)

    def keep(self, kept: Callable[[str], bool]) -> None:
        self._claimed = {path: beside for path, beside in self._claimed.items() if kept(path)}
        for path in itertools.filterfalse(kept, list(self._wrong)):
            self._wrong.pop(path, None)

    def seal(self, found: Found) -> Seal:
        self._wrong.pop(found.path, None)
        return Seal(self._config, found, self.at_claim(found.path))

    def look(self, server: FileServer, path: str, known: Callable[[str], Optional[Row]]) -> tuple[list[str], bool]:
        """The companions of a file that are there and no other one needs; whether one is newer than at the claim."""
        there: list[str] = []
        replaced = False
        for _, companion, at_claim in self.at_claim(path):
            shown = server.same(companion, at_claim) if at_claim else server.exists(companion)
            replaced = replaced or (shown is False if at_claim else bool(shown))
            there += [companion] * bool(shown)
        return [companion for companion in there if not self.needed(companion, path, known)], replaced

    def judged(self, seal: Seal) -> Optional[Error]:
        problem = seal.problem()
        if problem is not None:
            self._wrong[seal.found.path] = seal
        return problem

    def needed(self, companion: str, path: str, known: Callable[[str], Optional[Row]]) -> bool:
        """Whether a listed file other than `path` needs it and is not done."""

        def waits(other: str, entry: Entry) -> bool:
            row = known(other)
            return row is None or row.state != "done" or not same_version(row, entry)

        others = self._needed.get(self._folded(companion), {})
        return any(waits(other, others[other]) for other in others.keys() - self._gone - {path})

    def gone(self, path: str) -> None:
        self._gone.add(path)


# -- checksums --------------------------------------------------------------------------------------------------------
ALGORITHMS = ("md5", "sha1", "sha256", "sha512")
MOST_OF_CHECKSUM = 64 * 1024  # bytes
# Bare, BSD's form, or sha256sum's and md5sum's:
DIGEST = r"(?s)(?:(\w+) \((.+)\) = )?([0-9A-Fa-f]+)(?:[ \t]*|(?: [ *]|[ \t]+)(.+))"


def digests_in(lines: Sequence[str], algorithm: str, is_name: Callable[[str], bool]) -> set[str]:
    """Beside a name, or a path that ends with it, or alone in the file."""
    found = set()
    for line in lines:
        match = re.fullmatch(DIGEST, line.removeprefix("\\"))  # the sign that the name's are doubled
        kind, tagged, digest, name = match.groups() if match else ("none", "", "", "")
        name = tagged or name or "-"  # "-": of standard input
        name = name.replace("\\\\", "\\") if line.startswith("\\") else name
        if (kind or algorithm).lower() == algorithm and (
            is_name(posixpath.basename(name)) or (name == "-" and len(lines) == 1)
        ):
            found.add(digest.lower())
    return found


class Seal:
    """Whether what was fetched is what was sent: by its digest and its companion's."""

    def __init__(self, config: Config, found: Found, beside: Beside) -> None:
        self.found, self._config = found, config
        self._algorithm = config.checksum.rpartition(".")[2].lower()
        self.path, self.entry = self._own(beside)
        self.text = bytearray()  # of the companion
        self.trouble: Optional[Error] = None  # why it could not be read
        self._digests = {"sha256": hashlib.sha256()} if config.checksum or config.audit else {}
        if self._algorithm not in ("", *self._digests):
            self._digests[self._algorithm] = hashlib.new(self._algorithm, usedforsecurity=False)

    def _own(self, beside: Beside) -> tuple[str, Optional[Entry]]:
        return next(
            ((path, entry) for template, path, entry in beside if template == self._config.checksum), ("", None)
        )

    def is_replaced(self, beside: Beside) -> bool:
        now = self._own(beside)[1]
        return now is not None and (self.entry is None or not same_version(self.entry, now))

    def update(self, data: memoryview) -> None:
        for digest in self._digests.values():
            digest.update(data)

    def sha256(self) -> str:
        """Of what has come; "" if nobody asks."""
        return self._digests["sha256"].hexdigest() if self._digests else ""

    def problem(self) -> Optional[Error]:
        """A companion that is older may be replaced soon: "not now"; else it is the file's failure."""
        if not self._algorithm:
            return None
        if self.entry is None or isinstance(self.trouble, FileGone):
            return NotNow(f"{self.path} is not there any more")
        why = self._why()
        if self.trouble is not None or not why:
            return self.trouble
        kind = NotNow if is_older(self.entry, self.found.entry) else Error
        return kind(f"{self.path}, which tells its {self._algorithm}, {why}")

    def _why(self) -> str:
        if self.entry is not None and self.entry.size > MOST_OF_CHECKSUM:
            return f"is larger than {MOST_OF_CHECKSUM >> 10} KiB"
        raw = re.split(rb"[\r\n]+", bytes(self.text).removeprefix(codecs.BOM_UTF8))
        lines = [decode_name(line, self._config.encoding) for line in raw if line.strip()]
        name, digest = self._config.folded(self.found.entry.name), self._digests[self._algorithm].hexdigest()
        told = digests_in(lines, self._algorithm, lambda other: self._config.folded(other) == name)
        if len(told) != 1:
            return "has several for it" if told else "has none for it" if lines else "is empty"
        if len(min(told)) != len(digest):
            return f"has {len(min(told))} digits and not {len(digest)}"
        return "" if told == {digest} else "is for another content"


def read_seals(server: FileServer, seals: Sequence[Seal], jobs: Sequence[Job]) -> None:
    wanted = [
        (Job(seal.path, seal.entry.size, seal.text.extend), seal)
        for seal in seals
        if seal.entry is not None and seal.entry.size <= MOST_OF_CHECKSUM
    ]
    try:
        for job, problem in server.fetch_many([job for job, _ in wanted]) if wanted else ():
            next(seal for other, seal in wanted if other is job).trouble = problem
    except ServerDown:
        server.unasked = jobs
        raise


# -- folders ----------------------------------------------------------------------------------------------------------
Above = list[tuple[set[str], Listing]]  # of each folder on the way: the folders in it, and all entries


def repeats(folders: set[str], entries: Listing, above: Above) -> bool:
    """Whether a folder shows one above it once more, as a link to `..` that is listed as a folder does: the same
    folders, and a common file; without any files, the same three times over. A single folder may
    well contain one of its name: that ends by its depth."""
    alike = [others for names, others in above if folders and names == folders]
    files = {entry for entry in entries if entry.kind == "file"} if alike else set()
    if files:
        return not all(map(files.isdisjoint, alike))
    return len(folders) > 1 and len(alike) > 1


DATE = re.compile(r"\{date:([^%{}/\r\n]*(?:%[Yymdj][^%{}/\r\n]*)+)\}")
DATE_DIGITS = {
    "Y": "[0-9]{4}",
    "y": "[0-9]{2}",
    "m": "0[1-9]|1[0-2]",
    "d": "0[1-9]|[12][0-9]|3[01]",
    "j": "[0-2][0-9]{2}|3[0-5][0-9]|36[0-6]",
}


def dated(target: str, digits: Callable[[str], str]) -> str:
    """A move target with each `{date:...}` filled in: `digits` takes a letter of DATE_DIGITS."""
    return DATE.sub(lambda date: re.sub("%(.)", lambda letter: digits(letter[1]), date[1]), target)


def as_in(path: str, target: str) -> str:
    """A move target with a path's dates, if that is it but for case; else as it is."""
    if not DATE.search(target):
        return target
    pattern = re.escape(dated(target, "\0{}".format))
    for letter, digits in DATE_DIGITS.items():  # wherever a letter stands it stands for the same
        pattern = pattern.replace(f"\0{letter}", f"(?P<{letter}>{digits})", 1).replace(f"\0{letter}", f"(?P={letter})")
    match = re.fullmatch(pattern, path, re.IGNORECASE)
    return dated(target, match.__getitem__) if match else target


class Order:
    """The files of a key one at a time, in the order of `sort`. The one in work, or the first that may not be taken up
    now, blocks those behind it. Rows that are not done count, listed or not."""

    def __init__(self, config: Config) -> None:
        self._config, self.lines_up = config, config.order != "none"
        self.pattern = re.compile(config.order.partition(EXPRESSION)[2], re.IGNORECASE * config.ignore_case)
        self._since: dict[str, Optional[float]] = {}
        self.ended: dict[str, Row] = {}  # done since the poll began, whose rows may be gone
        self.before: dict[str, str] = {}  # what blocks a path
        self.blocked: Optional[list[dict[str, Any]]] = [] if self.lines_up else None  # the same for status

    def poll_begins(self, rows: Iterable[Row]) -> None:
        """Its listing may show what is done as it was before."""
        self.ended = {row.path: row for row in rows if self.lines_up and row.action and row.state == "done"}

    def done(self, row: Row) -> None:
        if self.lines_up:
            self.ended[row.path] = row

    def key(self, path: str) -> Optional[str]:
        """Names that do not match share one."""
        found = self.pattern.fullmatch(posixpath.basename(path))
        return found and self._config.folded(found[1] or "")

    def why(self, path: str, why: str) -> str:
        """What blocks a file, else why it waits."""
        first = self.before.get(path)
        return f"blocked by {first} (order)" if first and first not in self.ended else why

    def line_up(
        self,
        busy: Set[str],
        listed: Iterable[Found],
        rows: Mapping[str, Row],
        ready: Sequence[Work] = (),
        rested: Callable[[str], bool] = bool,
    ) -> tuple[list[Work], dict[str, Work]]:
        """What may be taken up now, one of a key, and by path what may when that is done."""
        shown: dict[str, Shown] = {path: row for path, row in rows.items() if row.state != "done"}
        there = {path: entry for path, _, entry in listed}
        shown.update((path, entry) for path, entry in there.items() if not is_done(rows.get(path), entry))

        def rank(path: str) -> tuple[str, str]:
            line, exact = times_of(shown[path].mtime)
            return (line or exact) if self._config.sort == "mtime" else "", path

        def state(path: str) -> str:
            row = rows.get(path)
            known = row.state if row and same_version(row, shown.get(path, row)) else "waits"
            return "in work" if path in busy else known + ", not listed" * bool(row and row.unlisted)

        works, room = {work.path: work for work in ready}, self._config.max_files or len(ready)
        last = {self.key(path): path for path in busy if path in shown or path not in rows}
        # A newer version may be listed, which is not done when that is.
        at_work = {path for path in busy & shown.keys() if path in rows and same_version(rows[path], shown[path])}
        first, behind, held, self.before = [], {}, set(), {}
        for path in sorted(shown.keys() - at_work, key=rank):
            key = self.key(path)
            if key in last:
                self.before[path] = last[key]
            if key in held:
                continue
            goes = path in works and room > 0
            if goes and key not in last:
                first.append(works[path])
            if goes and rested(path):
                if key in last:
                    behind[last[key]] = works[path]
                room -= 1
            else:
                held.add(key)
            last[key] = path
        counts, now = Counter(self.before.values()), time.time()
        self._since = {path: self._since.get(path, now) for path in counts}
        self.blocked = [
            {"path": printable(path), "state": state(path), "since": self._since[path], "files": count}
            for path, count in counts.items()
        ]
        return first, behind

    def of_ledger(self, rows: Iterable[Row], errors: Iterable[Mapping[str, Any]]) -> Order:
        """What the ledger alone tells; since when only of its last errors."""
        known = {row.path: row for row in rows if self.lines_up}
        self._since = {**dict.fromkeys(known), **{error["path"]: time.time() - error["age"] for error in errors}}
        self.line_up(set(), (), known)
        return self


class MoveTargets:
    """The folders that `move:` names, of any date: they are not polled, wherever in the tree.

    Compared in normal form from the root; without case where the server answers to a spelling that it does not list.
    """

    def __init__(self, config: Config) -> None:
        self._folders, self._recursive = config.polled(), config.recursive
        names = {normal_path(a[len("move:") :]) for a in (config.after, config.after_error) if a.startswith("move:")}
        self._absolute = {name for name in names if name.startswith("/")}
        split = [name.split("/") for name in names - self._absolute]
        self._relative = [(parts.count(".."), [part for part in parts if part != ".."]) for parts in split]  # up, down
        self._bases: dict[str, set[str]] = {}  # each polled folder as set, and as resolved
        self._places: set[str] = set()  # where files go, but for relative names below their own folder
        self._answers: dict[str, bool] = {}  # to a spelling

    def lead_back(self) -> bool:
        bases = list(map(normal_path, self._folders))
        return any(as_in(base, place) == base for base in bases for other in bases for place in self._from(other))

    def _from(self, base: str) -> set[str]:
        """Where files of a polled folder go, and those of folders below it that go up to it or beyond."""
        return self._absolute | {
            normal_path(posixpath.join(base, *[".."] * up, *tail))
            for ups, tail in self._relative
            for up in range(0 if self._recursive else ups, ups + 1)
        }

    def check(self, server: FileServer) -> dict[str, Error]:
        """Raises FileRefused if files would be moved into a polled folder, or one would be polled twice. Gives why
        folders cannot be resolved, and so must not be polled."""
        found: dict[str, set[str]] = {}
        unresolved: dict[str, Error] = {}
        if len(self._bases) == len(self._folders) or not (self._absolute or self._relative or self._folders[1:]):
            return unresolved
        for folder in self._folders:
            try:
                found[folder] = {normal_path(folder), server.absolute(folder)}
            except (FileGone, FileRefused) as exc:
                unresolved[folder] = exc
        for one, other in itertools.permutations(found, 2):
            if any(self._contains(server, a, b) for a in found[one] for b in found[other]):
                raise FileRefused(f"{other}: would be polled twice, in {one}, too; nothing is claimed")
        bases = {base for spellings in found.values() for base in spellings}
        places = {place for base in bases for place in self._from(base)}
        places |= {self._resolved(server, place) for place in places if place.startswith("/")}
        for place, base in itertools.product(set(places), bases):
            place = as_in(base, place)
            places.add(place)
            head, tail = place[: len(base)], place[len(base) :]
            if _differ_in_case(head, base) and tail[:1] in ("", "/") and self._is_unlisted(server, head):
                places.add(base + tail)
        if bases & places:
            of = ", ".join(self._folders)
            raise FileRefused(f"{of}: after or after_error would move files into it again; nothing is claimed")
        self._bases, self._places = found, places
        return unresolved

    def _contains(self, server: FileServer, folder: str, other: str) -> bool:
        return contains(folder.casefold(), other.casefold(), self._recursive) and (
            contains(folder, other, self._recursive) or self._is_unlisted(server, other[: len(folder)])
        )

    @staticmethod
    def _resolved(server: FileServer, place: str) -> str:
        """A date's folder need not be there yet."""
        head = posixpath.dirname(place.partition("{date:")[0]) if "{date:" in place else place
        return normal_path(f"{server.absolute(head)}/{place[len(head) :]}")

    def include(self, server: FileServer, look: Look, relative: str) -> bool:
        """Whether a folder of the tree is one of them, perhaps in another spelling."""
        parts = relative.split("/")
        for base in self._bases.get(look.base, {normal_path(look.base)}):
            path = posixpath.join(base, relative)
            targets = {posixpath.join(base, *parts[: -len(tail)], *tail) for _, tail in self._relative} | self._places
            for target in (as_in(path, target) for target in targets):
                if target == path:
                    return True
                if _differ_in_case(target, path) and target.startswith(base):
                    spelled = target[len(path) - len(relative) :].split("/")
                    odd = ["/".join(spelled[:n]) for n in range(1, len(parts) + 1) if spelled[:n] != parts[:n]]
                    if look.folders.isdisjoint(odd) and self._is_answered(server, target):  # no other folders, then
                        return True
        return False

    def _is_unlisted(self, server: FileServer, path: str) -> bool:
        """Whether the server answers to this spelling although it does not list it."""
        folder, name = split_path(path)
        with contextlib.suppress(FileGone, FileRefused):
            return all(entry.name != name for entry in server.list(folder)) and self._is_answered(server, path)
        return False

    def _is_answered(self, server: FileServer, path: str) -> bool:
        if path not in self._answers:
            try:
                self._answers[path] = server.exists(path)
            except FileRefused:
                return True  # rather a folder less than one polled without end
        return self._answers[path]


def contains(folder: str, other: str, recursive: bool) -> bool:
    place, above = (posixpath.join(normal_path(path), "") for path in (other, folder))
    return place == above or (recursive and place.startswith(above))


def _differ_in_case(a: str, b: str) -> bool:
    return a != b and a.casefold() == b.casefold()


# ---------------------------------------------------------------------------------------------------------------------
# II.7 Handlers: what they get, and commands
# ---------------------------------------------------------------------------------------------------------------------

TRY_LATER = 75  # EX_TEMPFAIL of sysexits.h: a command's way to say "not now"
STDERR_BYTES = 2000  # of a failed command's last words
LONGEST_LINE = 4096  # bytes of a command's output


class File:
    """What a Python handler gets: a fetched, complete copy of one file.

    `path` is the path on the server, `size` in bytes, `mtime` in UTC epoch seconds or None, `attempt` counts from 1;
    `lease.valid()` tells whether effects are still allowed. `local` is the copy's path, gone after the handler.
    `sha256` is the content's, in hex, with `checksum` or `audit`.
    """

    sha256 = ""

    def __init__(self, path: str, size: int, mtime: Optional[float], attempt: int, lease: Lease, local: Path) -> None:
        self.path, self.size, self.mtime, self.attempt = path, size, mtime, attempt
        self.lease, self.local = lease, local
        self.name = posixpath.basename(path)

    def open(self) -> IO[bytes]:
        return open(self.local, "rb")

    def read(self) -> bytes:
        return self.local.read_bytes()

    def text(self, encoding: str = "utf-8") -> str:
        return self.local.read_text(encoding=encoding)

    def json(self) -> Any:
        return json.loads(self.read())

    def xml(self) -> Element:
        """The root element. DTDs are refused: their entities can fill the memory (CWE-776)."""
        content = self.read()
        if any("<!DOCTYPE".encode(encoding) in content for encoding in ("ascii", "utf-16-le", "utf-16-be")):
            raise HandlerFailed("the XML file has a DTD, which is refused")
        import xml.etree.ElementTree

        return xml.etree.ElementTree.fromstring(content)

    def csv(self, encoding: str = "utf-8-sig", **options: Any) -> Iterator[dict[str, str]]:
        """Rows by the first line's names; `options` are csv.DictReader's."""
        with open(self.local, encoding=encoding, newline="") as stream:
            yield from csv.DictReader(stream, **options)

    def save(self, folder: Union[str, Path]) -> Path:
        """Puts a copy into a folder, atomically and under a free name; gives its path."""
        target = Path(folder)
        temporary = target / f".ftpcoord-{os.getpid()}-{threading.get_ident()}-{next(_numbers)}.part"
        out = create_file(temporary)
        try:
            with out, self.open() as source:
                for piece in iter(lambda: source.read(COPY_BYTES), b""):
                    write_all(out, memoryview(piece))
                os.fsync(out.fileno())
            return publish(temporary, target / self.name)
        finally:
            temporary.unlink(missing_ok=True)

    def __repr__(self) -> str:
        return f"File({self.path!r}, attempt={self.attempt})"


def publish(temporary: Path, target: Path) -> Path:
    """As `give_name`, durably."""
    named = give_name(temporary, target)
    sync_folder(named.parent)
    return named


Handler = Callable[[File], object]
WARDEN = """\
import os, signal, sys
for name in ("SIGTERM", "SIGINT", "SIGHUP"):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
groups = set()
for line in sys.stdin.buffer:
    (groups.add if line[:1] == b"+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""


class Warden:
    """A process that kills the process groups of commands when this one has died, however; on POSIX alone."""

    def __init__(self) -> None:
        self._groups: set[int] = set()
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._lock = threading.Lock()

    def tell(self, group: int, ended: bool = False) -> None:
        """That a process group has begun, or ended. Raises OSError."""
        if os.name != "posix" or not sys.executable:
            return
        with self._lock:
            (self._groups.discard if ended else self._groups.add)(group)
            try:
                self._write([group], "-" if ended else "+")
            except OSError:  # not there yet, or it was killed
                if self._groups:
                    self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", WARDEN],
            bufsize=0,
            cwd="/",
            env=environment_without_ours(),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._write(self._groups, "+")

    def _write(self, groups: Iterable[int], sign: str) -> None:
        if self._process is None or self._process.stdin is None:
            raise BrokenPipeError
        self._process.stdin.write("".join(f"{sign}{group}\n" for group in groups).encode())


warden = Warden()


class Child(subprocess.Popen[bytes]):
    """Knows of a lost exit code, which Python takes for 0."""

    lost = False

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        try:
            return os.waitpid(self.pid, wait_flags)
        except ChildProcessError:
            self.lost = True
            return self.pid, 0


class Command:
    """`exec`: runs a command without a shell, in a process group of its own, and ends what is left of it.

    Its output goes to standard error.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._words = config.command()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._cut = False
        # With util-linux the kernel ends the command even before the warden knows of it.
        setpriv = shutil.which("setpriv") if sys.platform == "linux" else None
        probe, self._prefix = [setpriv or "", "--pdeathsig", "KILL", "true"], []
        with contextlib.suppress(OSError):
            works = setpriv and subprocess.run(probe, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
            self._prefix += [*probe[:3], "--"] if works else []

    def run(self, file: File) -> None:
        """Raises HandlerFailed unless it exits with 0, LocalTrouble if it does not start, LeaseLost if it was cut."""
        values = {"file": str(file.local), "name": file.name, "path": file.path}
        words = [PLACEHOLDER.sub(lambda m: values[m[1]], word) for word in self._words]
        environment = environment_without_ours()
        environment.update(
            FTPCOORD_FILE=str(file.local),
            FTPCOORD_PATH=file.path,
            FTPCOORD_NAME=file.name,
            FTPCOORD_SIZE=str(file.size),
            FTPCOORD_MTIME="" if file.mtime is None else f"{file.mtime:.0f}",
            FTPCOORD_ATTEMPT=str(file.attempt),
            FTPCOORD_TERM=str(file.lease.term),
            FTPCOORD_GROUP=self.config.coordination_group,
            FTPCOORD_MEMBER=self.config.member_id,
            **({"FTPCOORD_SHA256": file.sha256} if file.sha256 else {}),
        )
        if not os.path.dirname(words[0]) and shutil.which(words[0]) is None:
            raise LocalTrouble(f"exec: {words[0]} is not a command here")
        with self._lock:
            if self._cut:
                raise LeaseLost(file.lease.term)
            try:
                process = Child(
                    self._prefix + words,
                    env=environment,
                    cwd=self.config.folder_left(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                )
            except OSError as exc:
                raise LocalTrouble(f"exec: {words[0]} cannot be started ({reason(exc)})") from None
            except ValueError as exc:
                raise HandlerFailed(f"exec: cannot be started with this name ({exc})") from None
            self._running.add(process)
        timed_out = False
        try:
            warden.tell(process.pid)
            tails = [_Tail(stream, file.name) for stream in (process.stdout, process.stderr) if stream is not None]
            process.wait(self.config.exec_timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
        except (OSError, RuntimeError) as exc:
            raise LocalTrouble(f"exec: {words[0]} cannot be watched ({reason(exc)})") from None
        finally:
            stop_process(process, KILL_AFTER if timed_out else 0.0)  # and what it left
            with self._lock:
                self._running.discard(process)
            with contextlib.suppress(OSError):
                warden.tell(process.pid, ended=True)
        words_of_error = [tail.text() for tail in tails][-1]
        if self._cut:
            raise LeaseLost(file.lease.term)
        if process.lost:
            raise LocalTrouble("exec: no exit code: this process ignores SIGCHLD, or waits for any child")
        said, code = f": {words_of_error}" if words_of_error and self.config.error_output else "", process.returncode
        if timed_out:
            raise HandlerFailed(f"command took longer than exec_timeout, {self.config.exec_timeout:g} s{said}")
        if code in (126, 127) and words_of_error.startswith("setpriv: "):  # as Popen, without it
            raise LocalTrouble(f"exec: {words[0]} cannot be started ({words_of_error})")
        if code == TRY_LATER:
            raise TryLater(None, f"command exited with {code}, not now{said}")
        if code:
            how = f"was ended by signal {-code}" if code < 0 else f"exited with {code}"
            raise HandlerFailed(f"command {how}{said}")

    def cut(self, grace: float) -> None:
        """Starts no more, and ends all: SIGTERM, then SIGKILL `grace` seconds later."""
        with self._lock:
            self._cut = True
            running = list(self._running)
        until = time.monotonic() + grace

        def kill() -> None:
            for process in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, until - time.monotonic()))
            for process in running:
                signal_group(process, KILL)

        for process in running:
            signal_group(process, signal.SIGTERM if grace > 0 else KILL)
        if running and grace > 0:
            try:
                threading.Thread(target=kill, daemon=True).start()
            except RuntimeError:
                until = 0.0
                kill()


def run_handler(handler: Handler, file: File) -> None:
    """What it forked and comes back ends here: one process goes on with the file."""
    process, code = os.getpid(), 1
    try:
        result: Any = handler(file)
        code = 0
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else bool(exc.code)
        raise
    finally:
        if os.getpid() != process:
            os._exit(code)
    kind = type(result)  # an object's own attributes may raise
    if issubclass(kind, (Generator, map)) or hasattr(kind, "__await__") or hasattr(kind, "__anext__"):
        raise HandlerFailed(f"the handler gave a {kind.__name__}, which nobody runs: it must do the work itself")
    if hasattr(kind, "add_done_callback"):  # a pool's Future: its copy of the file must stay until then
        result.result()


def call_handler(handler: Optional[Handler], file: File, error_output: bool) -> None:
    """Raises TryLater, LeaseLost or HandlerFailed, whatever it raises."""
    if handler is None:
        return
    try:
        run_handler(handler, file)
    except (LeaseLost, HandlerFailed):
        raise
    except TryLater as exc:
        cause = exc.__cause__
        why = reason(exc) + (f": {type(cause).__name__}: {reason(cause)}" if cause is not None else "")
        raise TryLater(getattr(exc, "seconds", None), why if error_output else "") from None
    except BaseException as exc:  # sys.exit(), asyncio.CancelledError, whatever: a failure, counted
        event("handler_failed", logging.DEBUG, exc=exc, path=file.path)
        if isinstance(exc, SystemExit) and exc.code == TRY_LATER:
            raise TryLater from None
        detail = f": {reason(exc)}" if error_output else ""
        raise HandlerFailed(f"{type(exc).__name__}{detail}") from None


class _Tail:
    """Passes a command's output on and keeps the last words.

    Plain text after `exec NAME: ` is neither a line of our log nor a sequence that a terminal obeys.
    """

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._stream, self._name = stream, name
        self._kept = b""
        self._patient = True
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        begun = b""
        with contextlib.suppress(OSError, ValueError):
            while True:
                data = os.read(self._stream.fileno(), 65536)
                self._kept = (self._kept + data)[-STDERR_BYTES:]
                *lines, begun = re.split(rb"[\r\n]+", begun + data)
                if not data or len(begun) > LONGEST_LINE:
                    lines, begun = [*lines, begun], b""
                for line in lines:
                    for at in range(0, len(line), LONGEST_LINE):
                        self._pass_on(line[at : at + LONGEST_LINE])
                if not data:
                    return

    def _pass_on(self, line: bytes) -> None:
        if self._patient and said.full():  # our own standard error may be slow, once
            self._patient = said.flush()
        text = f"exec {self._name}: {line.decode('utf-8', 'surrogateescape').expandtabs()}"
        said.put(functools.partial(print_line, printable(text)))

    def text(self) -> str:
        self._thread.join(1.0)  # who left the group may hold it open
        if not self._thread.is_alive():
            self._stream.close()
        return self._kept.decode("utf-8", "replace").strip()


def environment_without_ours() -> dict[str, str]:
    """No settings, and so no secrets."""
    return {k: v for k, v in os.environ.items() if not k.startswith("FTPCOORD_") and k != "NOTIFY_SOCKET"}


KILL = getattr(signal, "SIGKILL", signal.SIGTERM)


def stop_process(process: subprocess.Popen[bytes], grace: float) -> None:
    """SIGTERM to its process group, SIGKILL `grace` seconds later; waits for its end."""
    signal_group(process, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    signal_group(process, KILL)
    process.wait()


def signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(OSError):
        if os.name == "posix":
            os.killpg(process.pid, number)
        else:
            process.terminate()


def in_folder(place: str, folder: str) -> bool:
    """Or is that folder."""
    real, top = os.path.realpath(place), os.path.realpath(os.path.expanduser(folder))
    return real == top or real.startswith(os.path.join(top, ""))


def load_handler(name: str, download_dir: str = "") -> Handler:
    """`module:function` of sys.path, and then of the working folder, unless files are delivered there: what was
    uploaded is imported by nobody (CWE-427)."""
    module_name, _, attribute = name.partition(":")
    try:
        here = os.getcwd()
        if not {"", here} & set(sys.path) and not (download_dir and in_folder(here, download_dir)):
            sys.path.append(here)
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as exc:
        raise ConfigError(f"handler: {name} cannot be imported ({type(exc).__name__}: {reason(exc)})") from None
    if not callable(found):
        raise ConfigError(f"handler: {name} is not a function")
    return cast(Handler, found)


# ---------------------------------------------------------------------------------------------------------------------
# III.1 Settings
# ---------------------------------------------------------------------------------------------------------------------

ID_PATTERN = re.compile(r"[!-~]{1,128}\Z")  # the tables' VARCHAR(128); printable ASCII has one form in every collation
GROUP_TEXT = re.compile(r"(ftp|ftpes|ftps|sftp)://(.*?)@(\[[^]]+\]|[^@:/\[\]]+):([0-9]+)(/.*)\Z", re.DOTALL)
DEFAULT_PORTS = {"ftp": 21, "ftpes": 21, "ftps": 990, "sftp": 22}
SSH, TLS, FTP = ("sftp",), ("ftpes", "ftps"), ("ftp", "ftpes", "ftps")
OURS = re.compile(r"FTPCOORD_(?!(?i:(\w+_)?(SERVICE_(HOST|PORT\w*)|PORT_\d+_\w+)=|(\w+_)?PORT=(tcp|udp|sctp)://))")
SECRETS = ("password", "key_passphrase", "proxy_password", "database_password")
URLS = ("url", "proxy", "database")
PROGRAMS = ("exec", "notify")
IDS = ("coordination_group", "member_id")
FILE_SETTINGS = (*SECRETS, *URLS)  # may come from a file: a URL may hold a password


class Target(NamedTuple):
    """A path below the login folder (`/~/x` in the URL) is relative, others are absolute."""

    scheme: str
    user: str
    host: str
    port: int
    path: str


class Endpoint(NamedTuple):
    """`hosts` in the order in which they are tried."""

    dialect: str
    user: str
    hosts: tuple[tuple[str, int], ...]
    name: str


class Kind(NamedTuple):
    """`parse` raises ValueError or KeyError."""

    wanted: str
    parse: Callable[[Any], Any]


def matching(pattern: str) -> Callable[[Any], str]:
    """A parser of text that fits as a whole, and has no NUL."""

    def parse(value: Any) -> str:
        known = isinstance(value, (str, int, float, os.PathLike))
        if not known or "\0" in str(value) or not re.fullmatch(pattern, str(value)):
            raise ValueError
        return str(value)

    return parse


def _seconds(value: Any) -> float:
    seconds = float(str(value))
    if not abs(seconds) < 1e9:
        raise ValueError
    return seconds


def _byte_size(value: Any) -> int:
    match = re.fullmatch(r"([0-9]{1,18})\s*([KMG]?)", str(value).strip().upper())
    if not match:
        raise ValueError
    return int(match[1]) << 10 * " KMG".index(match[2] or " ")


def _file_mode(value: Any) -> str:
    mode = value if isinstance(value, int) else int(str(value), 8)
    if not 0 <= mode <= 0o777 or not mode & 0o400:
        raise ValueError
    return f"{mode:04o}"


PORT = r"(?:[0-5]?[0-9]{1,4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
BYTES = Kind("a number of bytes, or of K, M or G of 1024", _byte_size)
MODE = Kind("permissions in octal that let the owner read, like 0640", _file_mode)
SECONDS = Kind("a number of seconds", _seconds)
IDENTIFIER = Kind(
    f"1 to 128 printable ASCII characters without spaces, and not begin with {' or '.join(RESERVED)}",
    matching(rf"(?!{'|'.join(RESERVED)})[!-~]{{1,128}}"),
)
ACTION = Kind(
    "keep, delete or move:FOLDER (`.` is no folder; a date of %Y %y %m %d %j is one like {date:%Y-%m-%d})",
    matching(rf"keep|delete|move:(?!\./?\Z|\s|.*\s\Z)(?:{DATE.pattern}|(?!\{{date)[^\r\n])+"),
)
ORDER = Kind("none, strict, or re: and a regular expression", matching(r"none|strict|re:[^\r\n]+"))
FINGERPRINT = Kind("a fingerprint as ssh-keygen -lf prints it, SHA256:...", matching("SHA256:.*"))
FUNCTION = Kind("module:function", matching(r"[\w.]+:[\w.]+"))
ADDRESS = Kind("host:port, e.g. 127.0.0.1:8080", matching(f".*:{PORT}"))
SITE_COMMAND = r"(?i:OPTS MLST (?:[\w.-]+;)+|(?:SITE|OPTS) [^;\s][^;\r\n]*)"  # the facts of MLST end with semicolons
COMMANDS = Kind(
    "commands that begin with SITE or OPTS, with semicolons between them; active mode and the like are not built",
    matching(rf" *{SITE_COMMAND}(?:[; ]*{SITE_COMMAND})*[; ]*"),
)
KINDS: dict[type, Kind] = {  # where the default tells it
    bool: Kind("yes or no", lambda value: configparser.ConfigParser.BOOLEAN_STATES[str(value).strip().lower()]),
    float: SECONDS,
    int: Kind("a whole number", lambda value: int(str(value))),
    str: Kind("text", matching(r"[\s\S]*")),
}


def setting(default: Any, **metadata: Any) -> Any:
    """`kind`, `least` (0), `choices`, and the `schemes` that it is for."""
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(repr=False)
class Config:
    """The settings of one listener, explained in tests/site/settings.md. Values: text, or of the setting's own type.

    Raises ConfigError that names the setting. Secrets are never part of the representation.
    """

    url: str = ""
    folders: str = ""
    password: str = ""
    key: str = setting("", schemes=SSH)
    key_passphrase: str = setting("", schemes=SSH)
    known_hosts: str = "~/.ssh/known_hosts"
    host_key: str = setting("", kind=FINGERPRINT, schemes=SSH)
    ca_file: str = ""
    client_cert: str = setting("", schemes=TLS)
    client_key: str = setting("", schemes=TLS)
    tls_verify: bool = True
    tls_close: str = setting("strict", choices=("strict", "lax"), schemes=TLS)
    encoding: str = "utf-8"
    timeout: float = setting(30.0, least=0.1)
    proxy: str = ""
    proxy_password: str = ""
    site: str = setting("", kind=COMMANDS, schemes=FTP)
    database: str = ""
    database_password: str = ""
    database_tls: str = setting("", choices=("", "disable", "prefer", "require", "verify"))
    database_ca_file: str = ""
    coordination_group: str = setting("", kind=IDENTIFIER)
    member_id: str = setting("", kind=IDENTIFIER)
    heartbeat_frequency: float = setting(1.0, least=0.01)
    liveness_check_interval: float = setting(30.0, least=0.1)
    polling_interval: float = setting(60.0, least=0.01)
    schedule: str = ""
    timezone: str = ""
    pattern: str = "*"
    exclude: str = ""
    recursive: bool = False
    ignore_case: bool = False
    min_age: float = 0.0
    min_size: int = setting(0, kind=BYTES)
    max_size: Optional[int] = setting(None, kind=BYTES, least=1)
    max_age: Optional[float] = setting(None, kind=SECONDS)
    settle: float = 5.0
    ready_suffix: str = ""
    requires: str = ""
    checksum: str = ""
    sort: str = setting("name", choices=("name", "mtime", "size", "-name", "-mtime", "-size"))
    order: str = setting("none", kind=ORDER)
    max_files: int = 0
    workers: int = setting(4, least=1)
    exec: str = ""
    download_dir: str = ""
    file_mode: str = setting(f"{FILE_MODE:04o}", kind=MODE)
    handler: str = setting("", kind=FUNCTION)
    after: str = setting("keep", kind=ACTION)
    after_error: str = setting("keep", kind=ACTION)
    max_attempts: int = setting(5, least=1)
    retry_delay: float = 10.0
    exec_timeout: Optional[float] = setting(None, kind=SECONDS, least=0.1)
    error_output: bool = True
    stall_timeout: float = setting(300.0, least=0.1)
    yield_after: int = 3
    drain_timeout: float = 30.0
    ledger: bool = True
    ledger_retention: float = 30.0  # days
    audit: bool = False
    audit_retention: float = 365.0  # days; 0 keeps for ever
    expect: str = ""
    notify: str = ""
    http: str = setting("", kind=ADDRESS)
    log_level: str = setting("info", choices=("debug", "info", "warning", "error"))
    log_format: str = setting("text", choices=("text", "json"))

    def __init__(self, /, **settings: Any) -> None:  # the slash: FTPCOORD_SELF is a wrong setting, not a crash
        fields = {field.name: field for field in dataclasses.fields(Config)}
        self.files: dict[str, str] = {}  # NAME -> path, from NAME_file
        self.source = ""  # the file with these settings, if it holds a secret
        self.minutes: Optional[Schedule] = None  # `schedule`
        self._begun_in = ""
        with contextlib.suppress(OSError):  # a working folder that was removed
            self._begun_in = os.getcwd()
        self._spelling = ""  # of the URL, if the group follows from it and the database has not been asked
        for name, field in fields.items():
            setattr(self, name, field.default)
        for name, value in settings.items():
            if name in fields:
                setattr(self, name, _typed(name, value, fields[name]))
            elif name.removesuffix("_file") in FILE_SETTINGS:
                self.files.update({name.removesuffix("_file"): str(value)} if value else {})
            else:
                near = ", ".join(known for known in fields if known.startswith(f"{name:4.4}"))
                told = re.sub(r"\s.*", " ...", name)  # a line without its `=` may hold a secret
                raise ConfigError(f"{told}: there is no such setting" + (f" (did you mean {near}?)" if near else ""))
        for name in self.files:
            if settings.get(name):
                raise ConfigError(f"{name}: is set twice, as {name} and as {name}_file; keep one of them")
            if name in URLS:
                setattr(self, name, self.secret(name))
        for sentence in self._wrong():
            raise ConfigError(sentence)
        if not self.database_tls:
            self.database_tls = "prefer" if all(is_loopback(host) for host, _ in self.endpoint.hosts) else "verify"
        if not self.coordination_group:
            scheme, user, host, port, path = self.target
            host = f"[{host}]" if ":" in host else host
            self._spelling = f"{scheme}://{user}@{host}:{port}{path if path.startswith('/') else '/~/' + path}"
            self.coordination_group = group_id(normal_group(self._spelling))
        if not self.member_id:
            self.member_id = re.sub(r"[^!-~]", "_", socket.gethostname())[:110] + f":{os.getpid()}"

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Config:
        """FTPCOORD_NAME variables, without a line's end at theirs; an empty one counts as not set. What Kubernetes adds
        for Services is not ours."""
        texts = {
            name[9:].lower(): value.rstrip("\r\n") for name, value in environ.items() if OURS.match(f"{name}={value}")
        }
        try:
            return cls(**{name: text for name, text in texts.items() if text})
        except ConfigError as exc:
            name, colon, text = str(exc).partition(":")
            raise ConfigError(f"FTPCOORD_{name.upper()}{colon}{text}" if name.isidentifier() else str(exc)) from None

    @classmethod
    def from_file(cls, path: str) -> list[Config]:
        """An INI file: a section for each listener, [DEFAULT] shared by all, no interpolation."""
        parser = configparser.ConfigParser(interpolation=None, strict=True)
        try:
            with open(path, encoding="utf-8-sig") as stream:
                parser.read_file(stream)
        except (OSError, UnicodeError) as exc:
            raise ConfigError(f"{path}: cannot be read ({getattr(exc, 'strerror', '') or 'not UTF-8'})") from None
        except configparser.Error as exc:  # whose text has the line, perhaps a secret
            line = getattr(exc, "lineno", None) or getattr(exc, "errors", [["?"]])[0][0]
            raise ConfigError(f"{path}: not a settings file ({type(exc).__name__}, line {line})") from None
        if not parser.sections():
            raise ConfigError(f"{path}: has no section; each listener is one, e.g. [orders]")
        configs = []
        for section in parser.sections():
            try:
                configs.append(cls(**{name: value for name, value in parser.items(section) if value != ""}))
            except ConfigError as exc:
                raise ConfigError(f"{path} [{section}] {exc}") from None
            configs[-1].source = path if configs[-1].holds_secret() else ""
        return configs

    def secret(self, name: str) -> str:
        """The present value; one that came from a file is read anew, so that it can be rotated."""
        if name not in self.files:
            return str(getattr(self, name))
        path = self.place(self.files[name])
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise ConfigError(f"{name}_file: {path} is not a plain file, and so cannot be read at each login")
            with open(path, encoding="utf-8-sig") as stream:
                return stream.read(65536).rstrip("\r\n")
        except UnicodeError:  # whose text has a part of it
            raise ConfigError(f"{name}_file: {path} cannot be read: not UTF-8") from None
        except (OSError, ValueError) as exc:
            raise ConfigError(f"{name}_file: {path} cannot be read ({reason(exc)})") from None

    def place(self, path: str) -> str:
        """Relative paths are meant from where the settings were read, wherever a handler goes."""
        return os.path.join(self._begun_in, os.path.expanduser(path)) if path else ""

    def folder_left(self) -> Optional[str]:
        """That folder, if a handler has left it."""
        with contextlib.suppress(OSError):
            if os.getcwd() != self._begun_in and os.access(self._begun_in, os.X_OK):
                return self._begun_in
        return None

    @property
    def target(self) -> Target:
        """The file server, without its password."""
        return _parse_url(self.url)[0]

    def where(self) -> str:
        return f"{without_password(self.url)}{f' ({printable(self.folders)})' * bool(self.folders)}{self.through()}"

    def polled(self) -> list[str]:
        return list(map(_folder, self.patterns("folders"))) or [self.target.path]

    @property
    def endpoint(self) -> Endpoint:
        """The database, without its password."""
        return _parse_database(self.database)[0]

    def file_password(self) -> str:
        return self.secret("password") or _parse_url(self.secret("url"))[1]

    @property
    def via(self) -> Optional[Target]:
        return _parse_proxy(self.proxy)[0] if self.proxy else None

    def through(self) -> str:
        return f" through {without_password(self.proxy)}" if self.proxy else ""

    def proxy_login(self) -> str:
        return self.secret("proxy_password") or _parse_proxy(self.secret("proxy"))[1]

    def database_login(self) -> str:
        login = self.secret("database_password") or _parse_database(self.secret("database"))[1]
        if login.encode(errors="replace").decode() != login:  # a driver would tell where
            raise ConfigError("database_password: is not UTF-8")
        return login

    def public(self) -> dict[str, object]:
        """All settings, secrets masked."""
        known = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        masked = {name: "***" for name in SECRETS if known[name] or name in self.files}
        return {**known, **masked, **{name: without_password(known[name]) for name in URLS}}

    def holds_secret(self) -> bool:
        return any(self.public()[name] != getattr(self, name) for name in FILE_SETTINGS if name not in self.files)

    def __repr__(self) -> str:
        return f"Config(coordination_group={self.coordination_group!r}, member_id={self.member_id!r})"

    def _wrong(self) -> Iterator[str]:
        if not self.database:
            yield (
                "database: is required, e.g. postgresql://user@host/name, mysql://user@host/name or "
                "sqlite:///file for members on one host; members without a common one would each elect themselves"
            )
        dialect, via, scheme = DIALECTS[self.endpoint.dialect], self.via, self.target.scheme if self.url else ""
        Timing(self.heartbeat_frequency, self.liveness_check_interval, dialect.least_timeout)
        for field in dataclasses.fields(self):
            schemes = field.metadata.get("schemes", (scheme,))
            value = getattr(self, field.name)
            text = without_password(str(value))
            if field.name not in (*SECRETS, *PROGRAMS, *IDS):
                if re.fullmatch(r"""(['"]).*\1""", text, re.DOTALL):
                    yield f"{field.name}: its quotes would be part of it; write it without them"
                if field.name not in ("schedule", "site", "download_dir") and re.search(r"\s[#;]\s", text):
                    yield f"{field.name}: a comment would be part of it; give it its own line ([#] is none)"
            given = value != field.default or field.name in self.files
            if given and scheme and scheme not in schemes:
                wanted = " and ".join(f"{one}://" for one in schemes)
                yield f"{field.name}: is for {wanted} only, but url is {scheme}://"
        if not self.url and not self.coordination_group:
            yield "url: is required, e.g. sftp://user@host/inbox (a Coordinator: coordination_group)"
        yield from self._wrong_folders() if self.folders else ()
        try:
            if "/a.Z".encode(self.encoding) != b"/a.Z":
                yield f"encoding: must leave ASCII as it is, {quoted(self.encoding)} does not"
        except (LookupError, UnicodeError):  # `undefined` is one that encodes nothing
            yield f"encoding: Python knows none called {quoted(self.encoding)}"
        if self.client_key and not self.client_cert:
            yield "client_key: needs client_cert"
        if ("proxy_password" in self.files or self.proxy_password) and not (via and via.user):
            yield "proxy_password: is for a user that proxy names, http://user@host:port"
        if self.url and MoveTargets(self).lead_back():
            yield "after, after_error: files would be moved into a polled folder again"
        if self.url and not self.ledger and self.after == "keep":
            yield "ledger: off needs after = delete or move:FOLDER, else every poll takes all again"
        if self.expect and not self.audit:
            yield "expect: needs audit = on, which tells what was done"
        if self.expect and 0 < self.audit_retention < 8:
            yield "audit_retention: expect needs 8 days at least, or 0"
        if self.audit and not self.ledger:
            yield "audit: needs ledger = on, whose changes it tells of"
        if self.exec and self.handler:
            yield "exec and handler: a file goes to one of them; remove the other"
        if not self.patterns("pattern"):
            yield "pattern: matches nothing"
        if "{date:" in self.url + self.folders + self.pattern + self.exclude:
            yield (
                "url, folders, pattern, exclude: {date:...} is for after and after_error; "
                "poll the folder above, recursive"
            )
        for name in ("expect", "requires", "checksum", "exec", "download_dir"):
            if re.search(r"(?<!\$)\{date:[^{}]*%", getattr(self, name)):  # ${date:-x} is a shell's
                yield f"{name}: {{date:...}} is for after and after_error"
        if self.ready_suffix and self.requires:
            yield f"ready_suffix and requires: keep requires, and add {{name}}{self.ready_suffix} to it"
        for what in ("size", "age"):
            most = getattr(self, f"max_{what}")
            if most is not None and getattr(self, f"min_{what}") > most:
                yield f"min_{what}: must not be more than max_{what}"
        for name in ("pattern", "exclude", "order"):
            try:
                matcher(self.patterns(name))
            except (re.error, OverflowError, RecursionError) as exc:
                yield f"{name}: {quoted(getattr(self, name))} is not a regular expression ({exc})"
        yield from self._wrong_companions()
        kept = self.ledger and self.after_error == "keep" and self.max_age is None and not self.min_size
        if self.order != "none" and not (kept and self.sort in ("name", "mtime")):  # nothing may pass over a file
            yield "order: needs ledger = on, after_error = keep, sort = name or mtime; no max_age, min_size"
        if self.order.startswith(EXPRESSION) and not Order(self).pattern.groups:
            yield f"order: {quoted(self.order)} has no group, the key"
        for name in filter(self.__getattribute__, PROGRAMS):
            self.command(name)
        if re.search(r"(?<!\$)\{stem\}", self.exec):
            yield "exec: {stem} is for requires and checksum; a command gets {file}, {name} and {path}"
        if re.search(r"(?<!\$)\{file\}", self.notify):
            yield "notify: gets JSON on its standard input, and no {file}"
        if self.timezone or "{date:" in self.after + self.after_error:
            self.zone()
        try:
            self.minutes = Schedule(self.schedule, self.zone()) if self.schedule else None
        except ValueError as exc:
            yield f"schedule: {exc}"
        if self.minutes is not None and self.minutes.next(time.time()) == float("inf"):
            yield f"schedule: {quoted(self.schedule)} never comes"
        try:
            expectations(self.expect, self.zone()) if self.expect else ()
        except ValueError as exc:
            yield f"expect: {exc}"

    def zone(self) -> datetime.tzinfo:
        """`timezone`. Raises ConfigError."""
        if not self.timezone:
            raise ConfigError("timezone: schedule, expect and {date:...} need one, like Europe/Zurich")
        return time_zone(self.timezone)

    def action(self, template: str) -> str:
        """What `after` or `after_error` means for a file that ends now; "" for keep."""
        if not DATE.search(template):
            return "" if template == "keep" else template
        today = datetime.datetime.fromtimestamp(time.time(), self.zone())
        return dated(template, lambda letter: today.strftime(f"%{letter}"))

    def may_act(self, action: str) -> bool:
        meant = [as_in(action, template) for template in (self.after, self.after_error)]
        return action in meant and not DATE.search(action)

    def _wrong_folders(self) -> Iterator[str]:
        if not self.url or self.target.path != "/":
            yield "folders: need a url, and one without a path"
        if not self.coordination_group:
            yield "coordination_group: is required with folders"
        for part in self.patterns("folders") or [" "]:
            if not re.match(r"/|~(/|\Z)", part) or re.search(r"[\0-\x1f\x7f]", _folder(part)):
                yield f"folders: {quoted(part)} must begin with / or, below the login folder, with ~/"
        for one, other in itertools.permutations(self.polled(), 2):
            if contains(one, other, self.recursive):
                yield f"folders: {quoted(other)} would be polled twice, in {quoted(one)}, too"

    def command(self, name: str = "exec") -> list[str]:
        try:
            words = shlex.split(getattr(self, name))
        except ValueError as exc:
            raise ConfigError(f"{name}: cannot be split into words ({exc})") from None
        if not words:
            raise ConfigError(f"{name}: is empty")
        code = word_told_to_run(words)
        if code:
            raise ConfigError(
                f"{name}: {quoted(code)} is what an interpreter is told to run, and a file's name in it would be code; "
                'write "$FTPCOORD_FILE", "$FTPCOORD_NAME" or "$FTPCOORD_PATH" there, or pass an argument: '
                """sh -c 'import "$1"' sh {file}"""
            )
        return words

    def site_commands(self) -> list[str]:
        return [command.strip() for command in re.findall(SITE_COMMAND, self.site)]

    def http_address(self) -> tuple[str, int]:
        host, _, port = self.http.rpartition(":")
        return host.strip("[]") or "127.0.0.1", int(port)

    def patterns(self, name: str) -> list[str]:
        """A setting's globs, or its one regular expression behind `re:`."""
        text = str(getattr(self, name)).strip()
        parts = [text] if text.startswith(EXPRESSION) else text.split(",")
        return [part.strip() for part in parts if part.strip()]

    def companions(self) -> list[str]:
        texts = [text for text in map(str.strip, self.requires.split(",")) if text not in ("", self.checksum)]
        texts += ["{name}" + self.ready_suffix] * bool(self.ready_suffix)
        return texts + [self.checksum] * bool(self.checksum)

    def _wrong_companions(self) -> Iterator[str]:
        if self.checksum and self.checksum.rpartition(".")[2].lower() not in ALGORITHMS:
            ends = ", ".join(f".{name}" for name in ALGORITHMS)
            yield f"checksum: must end in one of {ends}, which tells how, not {quoted(self.checksum)}"
        for text in self.companions():
            name = "checksum" if text == self.checksum else "requires" if self.requires else "ready_suffix"
            if len(PLACE.findall(text)) != 1 or NOT_IN_A_NAME.search(text):
                yield f"{name}: must have {{name}} or {{stem}}, once, and no slash, not {quoted(text)}"
            elif any(
                self.folded(companion_of(own, text)) == self.folded(own) for own in ("a", *self.patterns("pattern"))
            ):
                yield f"{name}: {quoted(text)} would be the file itself"

    def folded(self, name: str) -> str:
        """As names are compared."""
        return name.casefold() if self.ignore_case else name


PLACEHOLDER = re.compile(r"\{(file|name|path)\}")
# Names, the options whose argument is run, others with an argument, an option after which all but the next word is
# data, and which other words are run: the first (unless an option brought it), or all.
INTERPRETERS = [
    (r"(da|a|r?ba|mk|pdk|k|z|t?c|fi|ya)?sh", "", "oO", "", "first"),
    (r"i?python|pypy|jython", "c", "WXQ", r"-\w*m", "first"),
    (r"perl|ruby", "eE", "IrC", "", "first"),
    (r"node|nodejs|bun", "", "rC", r"-(pe?|ep?)", "first"),
    (r"php", "rBREf", "dcz", "", "first"),
    (r"lua|luajit|julia|rscript|groovy|scala|gnuplot|tclsh|wish|expect|octave", "eEc", "l", "", "first"),
    (r"[gmn]?awk|g?sed", "ef", "vFl", "", "first"),
    (r"psql|duckdb|mysql|mariadb|osascript|su|runuser|script|flock|sg", "ce", "hpdUPDfv", "", ""),
    (r"env", "S", "uC", "", ""),
    (r"eval|cmd|.*\.(bat|cmd)|(auto)?ssh|rsh|remsh|watch|parallel|tmux|screen|g?make|matlab|sqlite", "", "", "", "all"),
    (r"powershell|pwsh", "", "", r"(?i)-f(i|il|ile)?", "all"),
]
LONG_OPTION = (
    r"(?s)--(?:(eval|print|source|expression|file|command|session-command|execute|split-string)|init-file|rcfile|require|"
    r"import|loader|check-hash-based-pycs)(?:=(.*))?"
)
STARTERS = re.compile(
    r"env|sudo|doas|su|su-exec|gosu|runuser|sg|nice|ionice|chrt|taskset|numactl|prlimit|timeout|nohup|setsid|setpriv|"
    r"stdbuf|time|unshare|nsenter|chroot|ip|exec|command|busybox|toybox|xargs|find|flock|script|strace|tini|dumb-init|"
    r"sshpass|firejail|bwrap|systemd-run|systemd-inhibit|docker|podman|kubectl|oc|machinectl|deno|npx|uv|cmd|start|call"
)


def word_told_to_run(words: Sequence[str]) -> str:
    """The word with a placeholder that an interpreter runs, perhaps behind sudo or env; "" if none (CWE-78)."""
    if PLACEHOLDER.search(words[0]):
        return words[0]
    names = [re.sub(r"[-.\d]*(\.exe)?\Z", "", re.split(r"[/\\]", word)[-1].lower()) for word in words]
    for number, name in enumerate(names):
        if number and not STARTERS.fullmatch(names[0]) and not words[min(number + 1, len(words) - 1)].startswith("-"):
            continue  # an argument that is called like an interpreter
        for pattern, *grammar in INTERPRETERS:
            told = _told_to_run(iter(words[number + 1 :]), *grammar) if re.fullmatch(pattern, name) else ""
            if told:
                return told
    return ""


def _told_to_run(words: Iterator[str], text: str, taking: str, ends: str, others: str) -> str:
    brought = False
    for word in words:
        if ends and re.fullmatch(ends, word):
            return next(filter(PLACEHOLDER.search, itertools.islice(words, 1)), "")
        option = re.fullmatch(LONG_OPTION, word) or re.match(f"[-+][^-=MmiF]*?([{text}{taking}-])(.*)", word, re.DOTALL)
        runs = bool(option and option[1] and (len(option[1]) > 1 or option[1] in text))
        if others == "all":
            told = word
        elif option and option[1] != "-":
            told = option[2] or next(words, "")
            brought |= runs and text != ""
            told = told if runs or word.startswith("--") else ""
        elif word == "--" and not others:
            return ""
        elif word.startswith(("-", "+")) and word not in ("-", "+"):
            told = "" if word.startswith("--") or not others else word
        elif others == "first":
            return word if PLACEHOLDER.search(word) and not brought else ""
        else:
            continue
        if PLACEHOLDER.search(told):
            return told
    return ""


def _typed(name: str, value: Any, field: dataclasses.Field[Any]) -> Any:
    if value is None or value == field.default == "":
        return field.default
    bounds = field.metadata
    kind = bounds.get("kind") or KINDS[type(field.default)]
    try:
        typed = kind.parse(value)
    except (KeyError, ValueError):
        told = "this value" if name in FILE_SETTINGS else quoted(value)
        raise ConfigError(f"{name}: must be {kind.wanted}, not {told}") from None
    least = bounds.get("least", 0)
    if isinstance(typed, (int, float)) and typed < least:
        raise ConfigError(f"{name}: must be at least {least:g}, not {typed:g}")
    if "choices" in bounds and typed not in bounds["choices"]:
        raise ConfigError(f"{name}: must be one of {', '.join(filter(None, bounds['choices']))}, not {quoted(typed)}")
    return typed


def quoted(value: object) -> str:
    """The first line of a wrong value: an indented one of an INI file may be a password."""
    text = str(value)
    line = "".join(itertools.takewhile(str.isprintable, text))[:100]
    return repr(line) + ("" if line == text else " ...")


# A login ends at the last @: in a database's URL of all, in a file server's of those before the first slash.
FILE_URL = re.compile(r"([A-Za-z]+)://(?:([^/:]*)(?::([^/]*))?@)?([^/]*)(.*)", re.DOTALL)
PROXY_URL = rf"(http(?!h)|socks5)h?://(?:([^/:@]+)(?::([^/@]*))?@)?(\[[0-9a-fA-F:.]+\]|[\w.-]+):({PORT})/?"
DATABASE_URL = re.compile(r"([a-z]+)://([^:]+)(?::(.*))?@([^/@]+)/([^?@]+)", re.DOTALL)
HOST = re.compile(rf"(\[[0-9a-fA-F:.]+(?:%[\w.-]+)?\]|[\w.-]+)(?::({PORT})?)?")


def _host(name: str, text: str, port: int) -> tuple[str, int]:
    match = HOST.fullmatch(text)
    if not match:
        raise ConfigError(
            f"{name}: its host or port is wrong; SCHEME://user@host:port/... is expected, "
            "with %40 for @ and %2F for / in a password"
        )
    return match[1].strip("[]").lower(), int(match[2] or 0) or port


def _folder(text: str) -> str:
    """A folder as URL or `folders` spell it, as Target has paths."""
    path = urllib.parse.unquote(text, errors="surrogateescape")
    below = re.match(r"/?~(?:/|\Z)", path)
    return posixpath.normpath(path[below.end() :] or ".") if below else "/" + path.strip("/")


def _parse_url(url: str) -> tuple[Target, str]:
    """RFC 3986; `/~/` as curl reads it."""
    match = FILE_URL.fullmatch(url)
    scheme = match[1].lower() if match else ""
    if not match or scheme not in DEFAULT_PORTS:
        raise ConfigError(f"url: must begin with {', '.join(f'{scheme}://' for scheme in DEFAULT_PORTS)}")
    host, port = _host("url", match[4], DEFAULT_PORTS[scheme])
    user, password = (urllib.parse.unquote(match[part] or "") for part in (2, 3))
    user = user or ("" if scheme == "sftp" else "anonymous")
    path = _folder(match[5])
    for wrong, why in (
        (re.search(r"[\0-\x1f\x7f\\?#]", url), "has a backslash, ?, # or control character; write %5C, %3F, %23"),
        (
            "@" in match[5] and (match[2] is None or match[3] is not None),  # ftp://user:12/34@host/
            "has @ after a slash; write %2F for / in a password and %40 for @ in a path",
        ),
        (not user, "names no user; it must look like sftp://user@host/path"),
        (re.search(r"[\0\r\n]", path + user + password), "has a line break or NUL in its user, password or path"),
    ):
        if wrong:
            raise ConfigError(f"url: {why}")
    return Target(scheme, user, host, port, path), password


def _parse_proxy(url: str) -> tuple[Target, str]:
    match = re.fullmatch(PROXY_URL, url)
    if not match:
        raise ConfigError(
            "proxy: must look like http://user@host:port or socks5://user@host:port, with %40 for @ in a password"
        )
    user, password = (urllib.parse.unquote(part or "") for part in match.group(2, 3))
    return Target(match[1], user, match[4].strip("[]"), int(match[5]), ""), password


def _parse_database(url: str) -> tuple[Endpoint, str]:
    unquote, (scheme, _, rest) = urllib.parse.unquote, url.partition("://")
    if scheme == "sqlite":
        path = unquote(rest[1:])
        if rest[:1] != "/" or "?" in rest or path in ("", ":memory:"):
            raise ConfigError(
                "database: sqlite:///FILE (or sqlite:////FILE for an absolute path) names a file; write %3F for ? in it"
            )
        return Endpoint("sqlite", "", (), path), ""
    port = {"postgresql": 5432, "postgres": 5432, "mysql": 3306, "mariadb": 3306}.get(scheme)
    if port is None:
        raise ConfigError("database: must begin with postgresql://, mysql:// or sqlite:///")
    match = DATABASE_URL.fullmatch(url)
    if not match:
        raise ConfigError(f"database: must name a user and a database, {scheme}://user@host/name, without options")
    hosts = tuple(_host("database", text, port) for text in match[4].split(","))
    endpoint = Endpoint("postgresql" if port == 5432 else "mysql", unquote(match[2]), hosts, unquote(match[5]))
    return endpoint, unquote(match[3] or "")


def without_password(url: str) -> str:
    scheme, colon, rest = url.partition("://")
    login, at, place = rest.rpartition("@")
    return f"{scheme}{colon}{login.partition(':')[0]}{at}{place}"


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_near(sock: socket.socket) -> bool:
    return is_loopback(str(sock.getpeername()[0]))


def normal_group(text: str) -> str:
    """A default group in normal form: one folder of one server, however its URL spells it (but an alias, or a link)."""
    match = GROUP_TEXT.match(text)
    if match is None:
        return text
    scheme, user, host, port, path = match.groups()
    try:
        host = ipaddress.ip_address(host.strip("[]")).compressed
        host = f"[{host}]" if ":" in host else host
    except ValueError:
        host = host.lower().rstrip(".")
    if path.startswith("/~/"):
        path = "/~/" + posixpath.normpath(path[3:] or ".")
    else:
        path = posixpath.normpath("/" + path.lstrip("/"))
    return f"{'ftp' if scheme == 'ftpes' else scheme}://{user}@{host}:{int(port)}{path}"


def group_id(text: str) -> str:
    return text if ID_PATTERN.match(text) else sha256_text(text)


@functools.lru_cache(maxsize=1024)
def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def shortened(text: str) -> str:
    return text if len(text) <= STDERR_BYTES else f"{text[:200]} ... {text[205 - STDERR_BYTES :]}"


def reason(exc: BaseException) -> str:
    """An exception in one line of plain text, never empty."""
    if isinstance(exc, OSError) and exc.strerror:
        return str(exc.strerror)
    text = ""
    with contextlib.suppress(BaseException):  # it may have no text
        text = " ".join(str(exc).split())
    return text or type(exc).__name__


# ---------------------------------------------------------------------------------------------------------------------
# III.2 Logging: `time level event key=value ...`, or one JSON object a line
# ---------------------------------------------------------------------------------------------------------------------

LAST_WORDS = 2.0  # seconds for what is still to be written at the end
logger = logging.getLogger("ftpcoord")


class Outbox:
    """Lines on their way out, so that nobody waits for a stream that blocks, or for a script's own log handler.

    While a thread of ours lives, one more thread writes them, in order. Where `room` lines wait, or half as many, and
    these are debug or info, further ones are dropped; their number is told when there is room again.
    """

    def __init__(self, name: str, room: int) -> None:
        self.name, self.room = name, room
        self.always = False  # by the other thread, also when none of ours lives
        self._waiting: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._dropped = 0
        self._lock = threading.Lock()
        self._thread: Optional[threading.Thread] = None

    def full(self, level: int = logging.INFO) -> bool:
        return self._waiting.qsize() >= (self.room if level > logging.INFO else self.room // 2)

    def put(self, write: Callable[[], object], level: int = logging.INFO) -> bool:
        """Calls `write`: at once, then True, or later by the other thread."""
        busy = self.always or not self._waiting.empty()
        if not busy and not any(thread.name.startswith("ftpcoord-") for thread in threading.enumerate()):
            write()
            return True
        if self.full(level):
            with self._lock:
                self._dropped += 1
        else:
            self._waiting.put(write)
            self._start()
        return False

    def flush(self, seconds: float = LAST_WORDS) -> bool:
        """Waits for what was put before, so long; whether it is written."""
        written = threading.Event()
        self._waiting.put(written.set)
        self._start()
        return written.wait(seconds)

    def _start(self) -> None:
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                return
            first, name = self._thread is None, f"outbox-{self.name}"
            self._thread = threading.Thread(target=self._write, args=(True,), name=name, daemon=True)
            try:
                self._thread.start()
                if first:
                    atexit.register(self.flush)
                return
            except RuntimeError:  # no thread is left
                pass
        self._write(False)

    def _write(self, wait: bool) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                write = self._waiting.get(wait)
                with contextlib.suppress(BaseException):  # of a script's log handler, or a stream that is gone
                    write()
                if self._dropped and not self.full():
                    with self._lock:
                        dropped, self._dropped = self._dropped, 0
                    event("log_dropped", logging.WARNING, stream=self.name, lines=dropped)


log, said = Outbox("log", 10_000), Outbox("stderr", 1000)


listening: list[Callable[[str, Mapping[str, object]], None]] = []  # beside the log


def event(what: str, level: int = logging.INFO, **fields: object) -> None:
    """Logs one event, an exception `exc` with its traceback. Names of events are part of the interface."""
    for hear in tuple(listening):
        hear(what, fields)
    logger.disabled = logger.disabled and not log.always  # by a handler's logging.config
    if logger.isEnabledFor(level):  # not logger.log(), which looks for the caller's line
        exc = fields.pop("exc", None)
        more = {"fields": {k: v for k, v in fields.items() if v is not None}}
        traceback = (type(exc), exc, exc.__traceback__) if isinstance(exc, BaseException) else None
        record = logger.makeRecord(logger.name, level, __file__, 0, what, (), traceback, extra=more)
        log.put(functools.partial(logger.handle, record), level)


def print_line(text: str) -> None:
    """With its end in the same write: another thread may write the log there."""
    print(f"{text}\n", end="", file=sys.stderr, flush=True)


def say(text: str) -> None:
    if not said.put(functools.partial(print_line, text), logging.ERROR):
        said.flush()


LONE_SURROGATES = re.compile("[\ud800-\udc7f\udd00-\udfff]")


def printable(text: str) -> str:
    """A path fit for ledger, log and terminal: undecodable bytes and control characters as %XX.

    One line of valid UTF-8. Where that was needed, % is escaped, too, so that `urllib.parse.unquote_to_bytes` gives the
    bytes back.
    """
    if text.isprintable():
        return text
    text = LONE_SURROGATES.sub(lambda match: f"\\u{ord(match[0]):04x}", text)  # no name has them, but texts of errors
    raw = text.encode("utf-8", "surrogateescape").replace(b"%", b"%25").decode("utf-8", "surrogateescape")
    return "".join(ch if ch.isprintable() else urllib.parse.quote(ch.encode("utf-8", "surrogateescape")) for ch in raw)


NEEDS_QUOTES = re.compile(r"[\s\"=]")


class TextFormatter(logging.Formatter):
    """2026-11-24T03:41:48.123Z info elected term=7 member=a"""

    def format(self, record: logging.LogRecord) -> str:
        parts = [utc_text(record.created), record.levelname.lower(), printable(record.getMessage())]
        for key, value in getattr(record, "fields", {}).items():
            if isinstance(value, (int, float)):
                text = f"{value:.3f}" if isinstance(value, float) else str(value)
            else:
                text = printable(str(value))
                if NEEDS_QUOTES.search(text) or not text:
                    text = json.dumps(text, ensure_ascii=False)
            parts.append(f"{key}={text}")
        if record.exc_info:
            parts.append("traceback=" + json.dumps(self.formatException(record.exc_info)))
        return " ".join(parts)


class JsonFormatter(logging.Formatter):
    """{"time": "2026-11-24T03:41:48.123Z", "level": "info", "event": "elected", "term": 7}"""

    def format(self, record: logging.LogRecord) -> str:
        line: Dict[str, object] = {"time": utc_text(record.created), "level": record.levelname.lower()}
        line["event"] = record.getMessage()
        for key, value in getattr(record, "fields", {}).items():
            line[key] = printable(value) if isinstance(value, str) else value
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def utc_second(seconds: float) -> str:
    """Epoch seconds as 2026-11-24T03:41:48Z."""
    return utc_text(seconds)[:19] + "Z"


def utc_text(seconds: float) -> str:
    """Epoch seconds as 2026-11-24T03:41:48.123Z."""
    whole, micros = divmod(round(seconds * 1e6), 10**6)
    return f"{_iso_seconds(whole)}.{micros // 1000:03}Z"


class LineHandler(logging.StreamHandler):  # type: ignore[type-arg]  # before 3.11
    """No tracebacks for a stream that is gone."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.stream.closed and not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def start_logging(level: str, form: str, stream: TextIO) -> None:
    """For the command line."""
    handler = LineHandler(stream)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


# ---------------------------------------------------------------------------------------------------------------------
# III.3 Schedules: cron fields and time zones
# ---------------------------------------------------------------------------------------------------------------------

# The least value, the most, and names from the least on.
CRON_FIELDS = {
    "minute": (0, 59, ""),
    "hour": (0, 23, ""),
    "day of month": (1, 31, ""),
    "month": (1, 12, "jan feb mar apr may jun jul aug sep oct nov dec"),
    "day of week": (0, 7, "sun mon tue wed thu fri sat"),
}
LONGEST_WAIT = 8 * 366 + 2  # days between two 29 February, over 2100


def time_zone(name: str) -> datetime.tzinfo:
    """Raises ConfigError."""
    import zoneinfo  # only where it is needed: a standby stays small

    try:
        return zoneinfo.ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # not there, no name at all, a folder of the database
        if not zoneinfo.available_timezones():
            raise ConfigError("timezone: this system has no database of time zones; pip install tzdata") from None
        raise ConfigError(f"timezone: the IANA database has no {quoted(name)}; Europe/Zurich is one") from None


def cron_field(text: str, name: str) -> frozenset[int]:
    """One of CRON_FIELDS as in crontab(5): numbers, names, ranges, `*`, steps of these two, lists. Sunday is 0.

    Raises ValueError with the part that is none.
    """
    least, most, names = CRON_FIELDS[name]

    def value(word: str) -> int:
        if word in names.split():
            return names.split().index(word) + least
        return int(word) if re.fullmatch("[0-9]{1,4}", word) else -1

    values: set[int] = set()
    for part in text.lower().split(","):
        span, slash, step = part.partition("/")
        first, dash, last = (f"{least}-{most}" if span == "*" else span).partition("-")
        start, end, by = value(first), value(last if dash else first), int(step) if step.isdecimal() else 0
        if names.startswith("sun") and end == 0 < start:
            end = 7  # fri-sun
        if not least <= start <= end <= most or (slash and not (dash and by)):
            raise ValueError(f"{quoted(part)} is no {name}")
        values.update(range(start, end + 1, by or 1))
    return frozenset(one % 7 if names.startswith("sun") else one for one in values)


class Schedule:
    """Minutes as in crontab(5), several lines with semicolons, in a time zone. Raises ValueError.

    Day of month or day of week is enough, unless one begins with `*`. Where the clock is put forward, the first minute
    after it stands for those that do not exist; where it is put back, an hour that begins with `*` means both passes,
    another one the first.
    """

    def __init__(self, text: str, zone: datetime.tzinfo) -> None:
        self._zone = zone
        self._lines: list[tuple[list[frozenset[int]], list[bool]]] = []
        for line in text.split(";"):
            fields = line.split()
            if len(fields) != len(CRON_FIELDS):
                raise ValueError(f"{quoted(line)} has not the five fields {', '.join(CRON_FIELDS)}")
            values = [cron_field(field, name) for field, name in zip(fields, CRON_FIELDS)]
            self._lines.append((values, [field.startswith("*") for field in fields]))

    def next(self, after: float) -> float:
        """The first scheduled minute later than `after`, in epoch seconds; infinite if none comes in eight years."""
        day, one = datetime.datetime.fromtimestamp(after, self._zone).date(), datetime.timedelta(days=1)
        found: set[float] = set()
        for number in range(-1, LONGEST_WAIT):  # from the day before: its end may come again
            last = bool(found)  # the next day may begin before the end of this one
            found.update(moment for moment in self._of_day(day + number * one) if moment > after)
            if last:
                break
        return min(found, default=float("inf"))

    def _of_day(self, day: datetime.date) -> Iterator[float]:
        for (minutes, hours, days, months, weekdays), stars in self._lines:
            fits = day.day in days, day.isoweekday() % 7 in weekdays
            if day.month not in months or not (all(fits) if stars[2] or stars[4] else any(fits)):
                continue
            for hour, minute in itertools.product(hours, minutes):
                local = datetime.datetime(day.year, day.month, day.day, hour, minute, tzinfo=self._zone)
                while (
                    datetime.datetime.fromtimestamp(local.timestamp(), self._zone) != local
                ):  # there is no such minute
                    local += datetime.timedelta(minutes=1)
                for fold in (0, 1) if stars[1] else (0,):
                    yield local.replace(fold=fold).timestamp()


DAY_NAMES = "(?:sun|mon|tue|wed|thu|fri|sat)"
EXPECTED = re.compile(r"(\S.*?)(?:\s+from\s+(\d{1,2}:\d\d))?\s+by\s+(\d{1,2}:\d\d)(?:\s+(\S+))?", re.ASCII)
EXPECT_SECONDS = 8 * SECONDS_A_DAY  # so far back deadlines are judged


class Window(NamedTuple):
    """When a file is to come, in epoch seconds: later than `start`, not later than `end`."""

    start: float
    end: float


class Came(NamedTuple):
    """A version's first done or skip."""

    at: float
    path: str
    term: int


class Expectation:
    """One part of `expect`. Raises ValueError."""

    def __init__(self, text: str, zone: datetime.tzinfo) -> None:
        found = EXPECTED.fullmatch(text)
        if not found or text.startswith(EXPRESSION):
            raise ValueError(f"{quoted(text)} is not GLOB [from HH:MM] by HH:MM [days]")
        self.text, (self.glob, self._from, by, days) = text, found.groups()
        name = self.glob.lstrip("/")
        self.fits = matcher([f"*/{name}", name] if "/" in self.glob else [name])
        start, end = ((clock[-2:], clock[:-3]) for clock in (self._from or by, by))
        self._start = Schedule(f"{' '.join(start)} * * *", zone)
        self._end = Schedule(f"{' '.join(end)} * * {days or '*'}", zone)
        self.next = self._end.next

    def windows(self, after: float, until: float) -> list[Window]:
        """Those that end later than `after`, and the first that ends later than `until`."""
        ends = [self.next(after - EXPECT_SECONDS)]
        while ends[-1] <= until:
            ends.append(self.next(ends[-1]))
        pairs = zip([after - EXPECT_SECONDS, *ends], ends)
        return [Window(self._begin(end) if self._from else before, end) for before, end in pairs if end > after]

    def _begin(self, end: float) -> float:
        begin, later = end, end - 2 * SECONDS_A_DAY
        while later < end:
            begin, later = later, self._start.next(later)
        return begin

    def judge(
        self, windows: Sequence[Window], came: Iterable[Came], alarms: Collection[float], now: float
    ) -> tuple[list[float], dict[float, Came]]:
        """The deadlines whose file is missing, and those whose file came late.

        A version counts once: for its window if that has a beginning of its own, else for the oldest alarm, else for
        its window. A deadline among `alarms` was not met.
        """
        missing: list[float] = []
        late: dict[float, Came] = {}
        met: set[float] = set()
        known = [(one.at, 0, one) for one in came if self.fits(one.path)]
        for at, _, one in sorted(known + [(window.end, 1, None) for window in windows if window.end <= now]):
            if one is None:
                missing += [at] * (at in alarms or at not in met)
                continue
            own = next((w.end for w in windows if w.start < at <= w.end and w.end not in met), None)
            if missing and (own is None or not self._from):
                late[missing.pop(0)] = one
            elif own is not None:
                met.add(own)
        return missing, late


def expectations(text: str, zone: datetime.tzinfo) -> list[Expectation]:
    """`expect`: a part of days alone continues the one before. Raises ValueError."""
    parts: list[str] = []
    for part in map(str.strip, filter(str.strip, text.split(","))):
        if parts and re.fullmatch(f"{DAY_NAMES}(-{DAY_NAMES})?", part, re.IGNORECASE):
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return [Expectation(part, zone) for part in parts]


class Judgement(NamedTuple):
    """Of one expectation, by the database's clock."""

    of: Expectation
    now: float
    missing: list[float]
    late: dict[float, Came]
    alarms: dict[tuple[str, float], tuple[int, str]]


def judgements(config: Config, database: Database) -> Iterator[Judgement]:
    """Nothing is expected before the audit trail's first row."""
    group, kept = config.coordination_group, config.audit_retention * SECONDS_A_DAY or float("inf")
    now, began = database.audited_since(group)
    for one in expectations(config.expect, config.zone()) if began is not None else ():
        windows = one.windows(max(now - 2 * EXPECT_SECONDS, began or 0), now)
        windows = [window for window in windows if window.start >= now - kept]  # others' rows may be removed by now
        alarms = database.alarms(group, now - 2 * EXPECT_SECONDS, sha256_text(one.text))
        # Of older ones those whose file came late: it does not count again.
        windows = [window for window in windows if window.end > now - EXPECT_SECONDS or ("late", window.end) in alarms]
        since = min((window.start for window in windows), default=now)
        raised = {by for what, by in alarms if what == "missing"}
        missing, late = one.judge(windows, map(Came._make, database.came(group, since, one.glob)), raised, now)
        yield Judgement(one, now, missing, late, alarms)


class Judge:
    """The alarms of `expect`, and the end of old rows of the audit trail, as long as the lease lasts."""

    def __init__(self, config: Config, member: Member, poller: Poller) -> None:
        self.config, self.member, self.poller, self.lease = config, member, poller, poller.lease
        self._tried: set[tuple[str, str, float]] = set()  # rows that may stand unsaid: their answer was lost
        self._often = min(60.0, 10 * config.polling_interval)
        self._looking = threading.Lock()

    def run(self) -> None:
        if self.config.expect:  # until it is known what came and is not done
            self.member.wait(self.lease, 30.0, lambda: self.poller.listed is not None)
        while self.member.may_work(self.lease):
            self.member.wait(self.lease, self.look())

    def look(self) -> float:
        config = self.config
        pause = self._often if config.expect else TRIM_SECONDS
        try:
            with self._looking, contextlib.closing(open_database(config)) as database:
                if config.expect:
                    pauses = [self._judged(database, one) for one in judgements(config, database)]
                    pause = min(pauses, default=pause)  # none: the trail has no row yet
                if config.audit_retention:
                    pause = min(pause, TRIM_SECONDS)
                    database.trim(config.coordination_group, config.audit_retention)
        except Exception as exc:
            event("audit_failed", logging.WARNING, term=self.lease.term, error=reason(exc))
        return pause

    def _judged(self, database: Database, found: Judgement) -> float:
        """Says what is new; the seconds until the next look."""
        one = found.of
        about = {"group": self.config.coordination_group, "term": self.lease.term}
        for by in found.missing:
            words = found.alarms["missing", by][1] if ("missing", by) in found.alarms else self._undone(one)
            if self._says(database, found, "missing", one.glob, by, error=words):
                event("file_missing", logging.ERROR, **about, path=one.glob, by=utc_second(by), error=words or None)
        for by, came in found.late.items():
            late = came.at - by
            if self._says(database, found, "late", came.path, by, seconds=late):
                event("file_late", logging.WARNING, **about, path=came.path, by=utc_second(by), seconds=late)
        return min(one.next(found.now) - found.now + 0.1, self._often if found.missing else 3600.0)

    def _says(self, database: Database, found: Judgement, outcome: str, path: str, by: float, **more: Any) -> bool:
        """Whether that is new, and for this member to say: its row was written first."""
        tried = found.of.text, outcome, by
        if (outcome, by) in found.alarms and tried not in self._tried:
            return False
        self._tried.add(tried)
        fence = Fence(self.config.coordination_group, self.config.member_id, self.lease.term)
        own = database.alarm(fence, sha256_text(found.of.text), outcome, path, by, **more)
        self._tried.remove(tried)
        return own

    def _undone(self, one: Expectation) -> str:
        rows = {row.path: row.state for row in self.poller.ledger.all()}
        states = {**dict.fromkeys(self.poller.listed or (), "listed"), **rows}
        came = [f"{path} ({state})" for path, state in sorted(states.items()) if one.fits(path) and state != "done"]
        return printable(f"came, but is not done: {', '.join(came[:FIRST_PATHS])}") if came else ""


# ---------------------------------------------------------------------------------------------------------------------
# III.4 Listeners and coordinators: what a process takes part in
# ---------------------------------------------------------------------------------------------------------------------

Route = Callable[[str], Optional[Handler]]


class Pulse:
    """A database connection and a thread for the elections of several members.

    When a round takes longer than half a heartbeat, half of the members get a connection of their own.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self._members: list[Member] = []
        self._lock = threading.Lock()
        self._woken = threading.Event()
        self._thread: Optional[threading.Thread] = None

    def add(self, member: Member) -> None:
        """Raises RuntimeError, and nothing has changed, if no thread can be started."""
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="ftpcoord-pulse", daemon=True)
                thread.start()
                self._thread = thread
            member.pulse, member.timing = self, self.database.timing
            self._members.append(member)
        self.wake()

    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wake(self) -> None:
        self._woken.set()

    def _run(self) -> None:
        while True:
            with self._lock:
                members = list(self._members)
                if not members:
                    self._thread = None
                    self.database.close()
                    return
            began = boot_clock()
            for member in members:
                if member.next_beat <= boot_clock() and not member.beat(self.database):
                    with self._lock:
                        self._members.remove(member)
                    member.finished.set()
            took = boot_clock() - began
            if len(members) > 1 and took > members[0].config.heartbeat_frequency / 2 and self.database.connection:
                self._split()
            self._woken.wait(max(0.0, min(member.next_beat for member in members) - boot_clock()))
            self._woken.clear()

    def _split(self) -> None:
        with self._lock:
            half = len(self._members) // 2
            leaving, self._members = self._members[half:], self._members[:half]
        other = Pulse(self.database.clone())
        try:
            for member in leaving:
                other.add(member)
        except RuntimeError:  # no thread is left
            with self._lock:
                self._members += leaving


def no_thread(config: Config, exc: RuntimeError) -> Error:
    return Error(f"{config.coordination_group}: this host gives no thread ({exc}); raise its limit")


def one_of(config: Optional[Config], settings: Mapping[str, Any]) -> Config:
    if config and settings:
        raise ConfigError(f"{', '.join(settings)}: have no effect beside a Config")
    return config or Config(**settings)


class Coordinator:
    """Election alone, for a script's own work.

        with Coordinator(database="postgresql://...", coordination_group="nightly", member_id="a") as member:
            for lease in member.leases():
                while lease.valid():
                    work(lease.term)

    Leaving the `with` block releases the lease. Raises ConfigError, DatabaseRefused.
    """

    def __init__(self, config: Optional[Config] = None, **settings: Any) -> None:
        self.config = one_of(config, settings)
        self._member = Member(self.config, watched=False)
        self._worker = 0  # the thread that has the lease
        self._herald = Herald(self.config)

    def start(self) -> None:
        warn_of_weaknesses(self.config)
        try:
            self._herald.start()
            self._member.start()
        except RuntimeError as exc:
            self.stop()
            raise no_thread(self.config, exc) from None

    def stop(self) -> None:
        """Makes the lease invalid, waits for the work to come back from it, releases it and leaves the group.

        Returns when that is done, or after three liveness intervals; at once if the work itself calls it.
        """
        member = self._member
        member.stop()
        if member.pulse is not None and not (member.work and self._worker == threading.get_ident()):
            member.finished.wait(3 * self.config.liveness_check_interval)
        self._herald.close()

    def __enter__(self) -> Coordinator:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._member.work_ended()  # the work was the block
        self.stop()

    def leases(self) -> Iterator[Lease]:
        """Each lease that this member wins; ends when the member is stopped."""
        member = self._member
        while True:
            lease = member.wait_for_lease()
            if lease is None:
                return
            self._worker, member.on_hand_over[:] = threading.get_ident(), [lease.stop]
            if not member.may_work(lease):  # asked for meanwhile
                lease.stop()
            try:
                yield lease
            finally:
                # Back although the lease lasts: the next is a new one.
                if member.may_work(lease):
                    member.hand_over("the work ended before the lease")
                member.work_ended()


NOTIFY_SECONDS, NOTIFY_EVERY, NOTIFY_AT_END = 30.0, 60.0, 5.0
NOTIFIED = {
    *("file_quarantined", "file_missing", "file_late", "server_down", "server_up", "database_down", "database_up"),
    *("lost", "not_now", "not_now_over", "group_paused", "group_resumed"),
}


class Herald:
    """`notify`: a command gets what an operator wants to know as JSON on its standard input, one run at a time."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._changed = threading.Condition()  # over the next three
        self._waiting: dict[str, dict[str, Any]] = {}  # at most one of each event
        self._not_before: dict[str, float] = {}
        self._ending = False
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._thread = threading.Thread(target=self._run, name="ftpcoord-notify", daemon=True)

    def start(self) -> None:
        if self._config.notify and self._thread.ident is None:
            self._thread.start()
            listening.append(self._hear)

    def _hear(self, what: str, fields: Mapping[str, object]) -> None:
        config, group = self._config, self._config.coordination_group
        if what not in NOTIFIED or fields.get("group", group) != group:
            return
        with self._changed:
            told = self._waiting.setdefault(what, {"count": 0, "paths": []})
            if any(one != what and one[:6] == what[:6] for one in self._waiting):
                self._waiting[what] = self._waiting.pop(what)
            told.update(fields, event=what, time=utc_text(time.time()), group=group, member=config.member_id)
            told["count"] += 1
            if "path" in told:
                told["paths"] = [*told["paths"], printable(told.pop("path"))][:FIRST_PATHS]
            if not config.error_output and what.startswith(("file_", "not_")):
                told.pop("error", None)  # a handler's words
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                now = boot_clock()
                first: dict[str, str] = {}  # of server_down, server_up
                due = [
                    what
                    for what in self._waiting
                    if first.setdefault(what[:6], what) == what
                    and (self._ending or self._not_before.get(what, now) <= now)
                ]
                if due:
                    told = self._waiting.pop(due[0])
                    self._not_before[due[0]] = now + NOTIFY_EVERY
                elif self._ending:
                    return
                else:
                    self._changed.wait(1.0)
                    continue
            if error := self._tell(json.dumps(told).encode()):
                group, count = told["group"], told["count"]
                event("notify_failed", logging.WARNING, group=group, about=due[0], count=count, error=error)

    def _tell(self, told: bytes) -> str:
        try:
            process = self._process = subprocess.Popen(
                self._config.command("notify"),
                env=environment_without_ours(),
                cwd=self._config.folder_left(),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                process.communicate(told, NOTIFY_SECONDS)
            finally:
                stop_process(process, 0.0)
            return f"it exited with {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:  # whose text has the arguments
            return f"it took longer than {NOTIFY_SECONDS:g} s"
        except Exception as exc:
            return reason(exc)

    def close(self) -> None:
        """What waits is told now, for NOTIFY_AT_END seconds at most."""
        if self._hear in listening:
            listening.remove(self._hear)
            self._ending = True
            self._thread.join(NOTIFY_AT_END)
            lost = sum(told["count"] for told in self._waiting.values())
            self._waiting.clear()
            if self._thread.is_alive() and self._process:
                signal_group(self._process, KILL)
            if lost:
                event("notify_failed", logging.WARNING, group=self._config.coordination_group, dropped=lost)


PAUSE_SECONDS = 5.0  # so late, or at the next poll, a pause and its end are seen


class Hold:
    """An operator's pause, as the poller sees it; under the ledger's lock."""

    def __init__(self, config: Config, database: Database) -> None:
        self._config, self._database = config, database
        self._found: Optional[dict[str, Any]] = None
        self._next = self._said = float("-inf")

    def look(self) -> bool:
        """Whether the group is paused. Says changes, and reminds every hour."""
        now, before, group = boot_clock(), self._found, self._config.coordination_group
        if now >= self._next:
            self._found = self._database.pauses(group)[2]
            self._next = now + min(PAUSE_SECONDS, self._config.polling_interval)
            if self._found and (self._found != before or now - self._said >= 3600):
                self._said = now
                event("group_paused", logging.WARNING, group=group, **self._found)
            elif before and not self._found:
                event("group_resumed", group=group)
        return self._found is not None


class Listener:
    """Polls folders of a file server whenever its member is active.

    Settings as in Config. Raises ConfigError; `run` also DatabaseRefused if the database cannot be used at start.
    """

    def __init__(self, config: Optional[Config] = None, **settings: Any) -> None:
        self.config = copy.copy(one_of(config, settings))  # `once` changes it
        if not self.config.url:
            raise ConfigError("url: is required, e.g. sftp://user@host/inbox")
        self.member = Member(self.config)
        self.exit_code = 0
        self._routes: list[tuple[str, Handler]] = []
        self._herald = Herald(self.config)
        self._once = False
        self._thread: Optional[threading.Thread] = None
        if self.config.handler:
            self._routes.append(("*", load_handler(self.config.handler, self.config.download_dir)))

    def on_file(self, pattern: str = "*") -> Callable[[Handler], Handler]:
        """Registers a handler for names that match a glob; the first match counts, others are left untouched."""

        if not isinstance(pattern, str):
            raise ConfigError("on_file: needs its brackets, @listener.on_file() or with a pattern")

        def register(handler: Handler) -> Handler:
            self._routes.append((pattern, handler))
            return handler

        return register

    def _route(self, name: str) -> Optional[Handler]:
        return next((handler for pattern, handler in self._routes if glob_fits(name, pattern)), None)

    def start(self, pulse: Optional[Pulse] = None, once: bool = False) -> None:
        """Begins in threads of its own and returns."""
        config = self.config
        check_delivery(config, bool(self._routes))
        if self._routes and config.exec:
            raise ConfigError("exec: a file goes to the command or to a Python handler; remove one")
        if config.target.scheme == "sftp":
            if importlib.util.find_spec("paramiko") is None:  # not imported: a standby does without it
                raise ConfigError("url: sftp:// needs paramiko: pip install paramiko")
        else:
            new_server(config)  # reads the certificate files
        event("starting", group=config.coordination_group, member=config.member_id, version=__version__)
        warn_of_weaknesses(config)
        thread = threading.Thread(target=self._run, name="ftpcoord-poller", daemon=True)
        try:
            self._herald.start()
            self.member.start(pulse)
            self._once, self.exit_code = once, int(once)
            if once:  # the next run would see a file for the first time again
                config.settle, config.min_age = max(config.settle, config.min_age), 0.0
            thread.start()
        except RuntimeError as exc:
            self.stop()
            self._herald.close()
            raise no_thread(config, exc) from None
        self._thread = thread

    def stop(self) -> None:
        """Begins a graceful stop: no new file, handlers end within `drain_timeout`, then the lease is released."""
        self.member.stop()

    def join(self, timeout: Optional[float] = None) -> bool:
        """Waits for the end; False if it has not come after `timeout` seconds. Raises why it could not start."""
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return False
        if self.member.failure is not None:
            raise self.member.failure
        return True

    def polling(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def run(self, once: bool = False) -> int:
        """Runs until `stop`, SIGTERM or SIGINT; gives the exit code."""
        return run_listeners([self], once)

    def _run(self) -> None:
        member, config = self.member, self.config
        with contextlib.closing(self._herald):
            try:
                with contextlib.closing(open_database(config)) as database:
                    self._take_part(database)
            except Error:
                return  # member.failure tells why
            member.finished.wait(4 * member.timing.call_timeout + KILL_AFTER)
            event("stopped", group=config.coordination_group, member=config.member_id)

    def _take_part(self, database: Database) -> None:
        member, config, route = self.member, self.config, self._route if self._routes else None
        selector, yielding, breaker = Selector(config, boot_clock), Yielding(config), Breaker(config, member.stats)
        rows: Rows = database if config.ledger else MemoryRows()
        hold, began = Hold(config, database), boot_clock()
        while True:
            lease = member.wait_for_lease(0.2 if self._once else float("inf"))
            view = member.election.view if member.election else None
            if lease is not None:
                database.timing = member.timing  # prepared there
                poller = Poller(config, member, lease, selector, route, rows, yielding, breaker, hold.look)
                wanted = config.audit and (config.audit_retention or config.expect)
                judge = Judge(config, member, poller) if wanted else None
                try:
                    if judge is not None:
                        threading.Thread(target=judge.run, name="ftpcoord-audit", daemon=True).start()
                except RuntimeError as exc:
                    event("audit_failed", logging.ERROR, term=lease.term, error=f"this host gives no thread ({exc})")
                self._work(poller, judge)
            elif member.stopping or member.finished.is_set():
                return
            elif boot_clock() - max(began, member.stats.database_at) > config.liveness_check_interval:
                member.stop()
            elif view and view.age is not None and view.age <= member.timing.stale_after:
                # What may be dead, by its id or stamp, is taken over by then.
                if (view.age >= 0 and not view.mine) or boot_clock() - began > 2 * config.liveness_check_interval:
                    event("standby", group=config.coordination_group, reason="another member is active")
                    self.exit_code = 0
                    member.stop()

    def _work(self, poller: Poller, judge: Optional[Judge]) -> None:
        member = self.member
        try:
            if poller.run(self._once):
                if judge is not None:
                    judge.look()
                self.exit_code = 1 if poller.waiting or poller.unreached or poller.order.blocked else 0
                member.stop()
        except LeaseLost:
            pass
        except Exception as exc:
            if not member.stats.server["error"]:
                event("poll_failed", logging.ERROR, exc=exc, error=reason(exc))
            member.wait(poller.lease, poller.failed(Error(f"the poll failed: {reason(exc)}"), 1.0))
        finally:
            if poller.stuck:
                why = "its work (a Python handler, the ledger) does not end; no release"
                event("stopped", logging.ERROR, reason=why)
                self.exit_code = 1
                member.stop(release=False)
            member.work_ended()


def run_listeners(listeners: Sequence[Listener], once: bool = False) -> int:
    """Runs listeners until all have stopped; those of one database and rhythm share a heartbeat connection.

    SIGTERM, SIGINT and SIGHUP stop them gracefully, if this is the main thread.
    """
    configs = [listener.config for listener in listeners]
    addresses = {config.http_address() for config in configs if config.http}
    pulses: dict[tuple[object, ...], Pulse] = {}
    notifier = Notifier(listeners, os.environ)
    for one, other in itertools.combinations(configs, 2):
        if all(getattr(one, n) == getattr(other, n) for n in ("database", "coordination_group", "member_id")):
            raise ConfigError(f"coordination_group: two listeners have {one.coordination_group}; give each its own")

    asked = threading.Event()

    def stop_all() -> None:
        notifier.stopping()
        for listener in listeners:
            listener.stop()

    def stop(number: int, frame: Optional[FrameType]) -> None:
        # Not from here: what it interrupted may hold a lock.
        try:
            threading.Thread(target=stop_all, name="ftpcoord-stop", daemon=True).start()
        except RuntimeError:  # no thread is left: by the main one
            asked.set()

    with contextlib.ExitStack() as ends:
        main = threading.current_thread() is threading.main_thread()
        try:
            hangup = [HANGUP] if signal.getsignal(HANGUP) == signal.SIG_DFL else []  # else nohup's, or a script's own
            for number in (signal.SIGTERM, signal.SIGINT, *hangup) if main else ():
                ends.callback(signal.signal, number, signal.signal(number, stop))
            for address in addresses:  # a listener without one is shown by all
                told_of = [one for one in listeners if not one.config.http or one.config.http_address() == address]
                ends.callback(StatusServer(address, told_of).close)
            for config, listener in zip(configs, listeners):
                alike = tuple((getattr(config, name), config.files.get(name)) for name in PULSE_SETTINGS)
                listener.start(pulses.setdefault(alike, Pulse(open_database(config))), once)
            waiting = list(listeners)
            while waiting:
                if asked.is_set():
                    stop_all()
                notifier.tick()
                waiting = [listener for listener in waiting if not listener.join(notifier.pause / len(waiting))]
        except Error:
            stop_all()
            for listener in listeners:
                with contextlib.suppress(Error):
                    listener.join(listener.config.drain_timeout + KILL_AFTER)
            raise
    return max(listener.exit_code for listener in listeners)


HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)
# Members that agree in these share a connection.
PULSE_SETTINGS = (
    *("database", "database_password", "database_tls", "database_ca_file", "ledger", "audit"),
    *("heartbeat_frequency", "liveness_check_interval"),
)


def check_delivery(config: Config, handled: bool) -> None:
    """Raises ConfigError unless files have a way to go, and a safe one."""
    if not handled and not config.exec and not config.download_dir:
        raise ConfigError("exec, download_dir or handler: one of them is required, or nothing is done with a file")
    for place in sys.path if config.download_dir else ():
        if in_folder(place, config.download_dir):
            raise ConfigError(
                f"download_dir: Python looks for modules in {place or 'the working folder'}, so that an uploaded file "
                "would be run; deliver to a folder that is not on its path"
            )


def weaknesses(config: Config) -> Iterator[tuple[str, str]]:
    scheme = config.target.scheme if config.url else ""
    if scheme == "ftp":
        yield "url", f"{without_password(config.url)}: ftp:// shows login, names and contents to everybody on the way"
    if scheme in TLS and not config.tls_verify:
        yield "tls_verify", f"{without_password(config.url)}: without it anybody on the way can be this server"
    if config.via and config.via.user and not is_loopback(config.via.host):
        yield "proxy", f"{without_password(config.proxy)}: shows its login to everybody between here and it"
    if scheme == "sftp" and config.host_key:
        with contextlib.suppress(OSError):
            lines = Path(config.place(config.known_hosts)).read_text(encoding="utf-8", errors="surrogateescape")
            known, revoked = known_host_keys(lines, config.target.host, config.target.port)
            pins = config.host_key.replace("=", "")
            pinned, refused = ([key for key in keys if fingerprint(key) in pins] for keys in (known, revoked))
            if refused or (known and not pinned):
                yield "host_key", f"accepts a key of {config.target.host} that {config.known_hosts} would refuse"
    if config.coordination_group[0] in "'\"":
        yield "coordination_group", "its quotes are part of it; without them it is another, to which all files are new"
    if config.ready_suffix:
        yield "ready_suffix", f"write requires = {{name}}{config.ready_suffix}, which is the same"
    remote = [host for host, _ in config.endpoint.hosts if not is_loopback(host)]
    if remote and config.database_tls != "verify":
        yield "database_tls", f"{config.database_tls}: without verify anybody on the way can be {remote[0]}"
    secret = {f"{name}_file": path for name, path in config.files.items()}
    secret.update(key=config.key, client_key=config.client_key or config.client_cert, config=config.source)
    if config.endpoint.dialect == "sqlite":
        secret["database"] = file = config.place(config.endpoint.name)
        if not os.path.isabs(config.endpoint.name):
            yield "database", f"a member that starts in another folder would not use {file}: write the whole path"
        folder = os.path.dirname(file)
        with contextlib.suppress(OSError):
            if os.name == "posix" and os.stat(folder).st_mode & 0o002:
                yield "database", f"every user of this host can put another file in its place: chmod o-w {folder}"
    for name, path in secret.items():
        with contextlib.suppress(OSError):
            if os.name == "posix" and os.stat(config.place(path)).st_mode & 0o006:
                yield name, "the file can be read or written by every user of this host: chmod o-rwx"
    if config.download_dir and os.name == "posix":
        umask = os.umask(0o077)
        os.umask(umask)
        lost = 0o666 & ~umask & ~int(config.file_mode, 8)
        if lost:
            yield "file_mode", f"{config.file_mode}: delivered files lack {lost:03o}, which the umask would give them"


_warned: set[tuple[str, str]] = set()


def warn_of_weaknesses(config: Config) -> None:
    """Once in a process."""
    for found in weaknesses(config):
        if found not in _warned:
            _warned.add(found)
            event("settings_warning", logging.WARNING, setting=found[0], reason=found[1])


# ---------------------------------------------------------------------------------------------------------------------
# III.5 Status: what this process has seen, what the database shows, and how people, programs and systemd are told
# ---------------------------------------------------------------------------------------------------------------------

SURVEY_SECONDS = 2.0  # pages have the database read so often at most,
SURVEY_SHARE = 20  # and for a twentieth of the time
SURVEY_WAIT = 1.0  # so long a request waits for that
HTTP_SECONDS, HTTP_BYTES = 5.0, 8192  # that a request may take, and be
HTTP_REQUESTS = 16  # connections at once
FOR_ANY_HOST = ("/livez", "/readyz", "/metrics")  # probes name any address
CALL_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
WORK_BOUNDS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)
MOST_WAITING = 10_000  # whose wait is timed
ROLES = ("active", "standby", "starting", "stopping")
SYMBOLS = {
    "active": "●",
    "standby": "○",
    "released": "◇",
    "stale": "✖",
    "starting": "◐",
    "stopping": "■",
    "quarantined": "▲",
    "failed": "△",
}


class Histogram:
    """`counts` has one more than `bounds`."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0
        self._lock = threading.Lock()

    def add(self, seconds: float) -> None:
        with self._lock:
            self.counts[bisect.bisect_left(self.bounds, seconds)] += 1
            self.sum += seconds


class Backlog:
    """The files that a poll finds listed, wanted and not done, and since when this member has seen each of them."""

    def __init__(self, route: Optional[Route] = None, before: Optional[Backlog] = None) -> None:
        self.files = self.bytes = 0
        self.waiting: dict[str, tuple[float, str]] = {}  # since when, and why
        self._route, self._before, self._now = route, before.waiting if before else {}, boot_clock()

    def add(self, found: Found, why: str) -> None:
        if self._route is None or self._route(found.entry.name):
            self.files, self.bytes = self.files + 1, self.bytes + found.entry.size
            if found.path in self._before or len(self.waiting) < MOST_WAITING:
                since = self._before.get(found.path, (self._now,))[0]
                self.waiting[found.path] = (since, why or "taken next, if it is at rest")

    def told(self, order: Optional[Order] = None) -> dict[str, Any]:
        """As /status shows it; ages in seconds."""
        first = sorted((since, path, why) for path, (since, why) in self.waiting.copy().items())[:FIRST_PATHS]
        rows = [
            {
                "path": printable(path),
                "age": boot_clock() - at,
                "why": printable(order.why(path, why) if order else why),
            }
            for at, path, why in first
        ]
        return {"files": self.files, "bytes": self.bytes, "oldest": rows[0]["age"] if rows else 0.0, "first": rows}


class Stats:
    """What this process has seen of one member, for status alone. Any thread may tell; memory is bounded.

    `own`, `server`, `work` and `takeovers` as /status shows them; moments there are in epoch seconds.
    """

    def __init__(self, member: str = "") -> None:
        self.member = member
        self.own: dict[str, Any] = {"started": time.time(), "active_since": None, "other_since": None}
        self.server: dict[str, Any] = {"up": None, "error": "", "last_poll": None}  # up: None on a standby
        self.server.update(listed=0, waiting=0, refused=0, lost={})
        self.work: dict[str, Any] = {"done": 0, "failed": 0, "quarantined": 0, "bytes": 0, "last_done": None}
        self.takeovers: deque[dict[str, Any]] = deque(maxlen=50)  # the last one first
        self.backlog = Backlog()
        self.order: Optional[Order] = None  # of the last lease
        self.not_now = ""  # why the claims of the group wait
        self.file_bytes = {"done": 0, "failed": 0, "quarantined": 0}
        self.minutes: deque[list[int]] = deque(maxlen=60)  # [epoch minute, done, failed, quarantined]
        self.queued: Callable[[], int] = int  # files taken up and not ended
        self.heartbeats, self.failed_heartbeats, self.late = Histogram(CALL_BOUNDS), 0, 0.0
        self.beat_at, self.database_at = boot_clock(), float("-inf")
        self.polls, self.failed_polls = Histogram(WORK_BOUNDS), 0
        self.handlers = Histogram(WORK_BOUNDS)
        self.elections = dict.fromkeys(("absent", "own", "released", "stale", "still", "vacant"), 0)  # by reason
        self.ends = {"lost": 0, "released": 0}
        self._lock = threading.Lock()
        self._server_said = float("-inf")
        self._holder: Optional[tuple[str, int]] = None
        self._follows: Optional[str] = None  # the active member that was said last
        self._why = "handed over"  # what it means if that changes now
        self._since: Optional[float] = None  # this member is active, or the last sign of life of another; by boot_clock

    def heartbeat(self, took: float, late: float, failed: bool) -> None:
        self.heartbeats.add(took)
        self.failed_heartbeats += failed
        self.late, self.beat_at = max(0.0, late), boot_clock()
        self.database_at = self.database_at if failed else self.beat_at

    def looked(self, view: View, stale_after: float, group: str = "") -> None:
        now, seen = boot_clock(), (view.holder or "", view.term)
        if view.holder is not None and self._holder not in (None, seen):
            self._changed("other", *seen, self._why)
            self.own["other_since"] = time.time()
        alive = (view.age or 0.0) <= stale_after
        self._holder, self._why = seen, "handed over" if alive else "released" if view.released else "stale"
        if view.age is not None and alive:
            self._since = now - max(0.0, view.age)
        if view.holder not in (None, self._follows):
            self._follows = view.holder
            event("standby", group=group, active=view.holder, seen_term=view.term)

    def tell_role(self, group: str, member: str, name: str, **fields: object) -> None:
        if name in ("elected", "lost", "released"):
            term, why = int(str(fields["term"])), str(fields.get("reason", "handed over"))
            self._changed(name, self.member, term, why)
            self._since, self._why = boot_clock(), "handed over"
            if name == "elected":
                self.elections[why] = self.elections.get(why, 0) + 1
                self._holder, self._follows, self.backlog = (self.member, term), None, Backlog()
                self.own.update(active_since=time.time(), other_since=None)
            else:
                self.ends[name] += 1
                self.own["active_since"] = None
                self.server.update(up=None, error="", lost={})
        level = logging.WARNING if name in ("lost", "duplicate_member") else logging.INFO
        event(name, level, group=group, member=member, **fields)

    def _changed(self, name: str, member: str, term: int, why: str) -> None:
        """`seconds`: without an active member, or as the active one."""
        change = {"time": time.time(), "event": name, "member": member, "term": term, "reason": why}
        self.takeovers.appendleft({**change, "seconds": self._since and boot_clock() - self._since})

    def polled(self, poller: Poller, listing: Look, new: int, seconds: float) -> None:
        lost = {printable(folder): printable(why) for folder, why in listing.lost.items()}
        for folder in lost.keys() - self.server["lost"].keys():
            event("file_refused", logging.WARNING, folder=folder, reason=lost[folder])
        listed, waiting, refused = len(listing.paths), poller.waiting, poller.selector.tree.refused
        self.server.update(listed=listed, waiting=waiting, refused=refused, last_poll=time.time(), lost=lost)
        self.polls.add(seconds)
        event("polled", term=poller.lease.term, listed=listed, new=new, waiting=waiting)

    def fetched(self, size: int) -> None:
        with self._lock:
            self.work["bytes"] += size

    def file(self, state: str, row: Row) -> None:
        now = time.time()
        with self._lock:
            if state != "failed":
                self.backlog.waiting.pop(row.path, None)
            self.work[state] += 1
            self.file_bytes[state] += row.size
            if not self.minutes or self.minutes[-1][0] != now // 60:
                self.minutes.append([int(now // 60), 0, 0, 0])
            self.minutes[-1][1 + list(self.file_bytes).index(state)] += 1
            if state == "done":
                self.work["last_done"] = now

    def done(self, row: Row, seconds: float) -> None:
        self.file("done", row)
        event("file_done", term=row.term, path=row.path, size=row.size, attempt=row.attempts, seconds=seconds)

    def failed(self, failure: Failure, about: Mapping[str, Any]) -> None:
        what, row = failure.what, failure.row
        level = {"file_gone": logging.INFO, "file_quarantined": logging.ERROR}.get(what, logging.WARNING)
        if what in ("file_failed", "file_quarantined"):
            self.file(what[len("file_") :], row)
        words: dict[str, Any] = {"path": row.path, "attempt": row.attempts, "action": row.action or None}
        words.update({"retry_in": failure.pause, "reason" if what == "file_gone" else "error": error_text(row)})
        event(what, logging.DEBUG if failure.quiet else level, **about, **words)

    def server_down(self, config: Config, exc: Error, pause: float) -> None:
        """Said at once, then once a minute."""
        now = boot_clock()
        self.failed_polls += 1
        if not self.server["error"] or now - self._server_said >= 60:
            self._server_said = now
            event("server_down", logging.ERROR, group=config.coordination_group, error=str(exc), retry_in=pause)
        self.server.update(up=None if type(exc) in (Error, LocalTrouble) else False, error=str(exc))

    def server_up(self, config: Config) -> None:
        if self.server["error"]:
            event("server_up", group=config.coordination_group)
        self.server.update(up=True, error="")


# -- the document -----------------------------------------------------------------------------------------------------
class Finding(NamedTuple):
    """What somebody should know of a group or member.

    `severity`: stuck, only a new process helps; unready, the member cannot do what its role asks for; problem, somebody
    is needed; passing, not ready, but that ends by itself; note. `short`: for probes and systemd.
    """

    severity: str
    text: str
    advice: str = ""
    short: str = ""


PROBLEMS = ("stuck", "unready", "problem")


def unread(config: Config, error: str = "") -> dict[str, Any]:
    return {
        **dict.fromkeys(("active", "term", "holder", "paused", "not_now")),
        **{name: [] for name in ("members", "missing", "errors")},
        "group": config.coordination_group,
        "files": {},
        "database": without_password(config.database),
        "stale_after": 0.0,
        "next_round": config.minutes and config.minutes.next(time.time()),
        "blocked": None if config.order == "none" else [],
        "database_error": error,
    }


def group_status(database: Database, config: Config) -> dict[str, Any]:
    """What the database shows, in the form of `status --json`."""
    timing = database.prepare()
    database.settle_group(config)
    group, found = config.coordination_group, unread(config)
    found["holder"], found["term"] = database.token(group)
    found["stale_after"] = timing.stale_after
    found["members"] = [
        {"member_id": row.member_id, "released": row.released, "heartbeat_age": round(row.age, 3)}
        for row in database.members(group)
    ]
    found["paused"] = database.pauses(group)[2]
    if config.ledger:
        found["files"], found["errors"] = database.counts(group), database.errors(group)
        found["not_now"] = database.not_now(group)
        found["active_for"], found["last_change"] = database.activity(group, found["term"])
    if config.order != "none":
        found["blocked"] = Order(config).of_ledger(database.rows(group, only_open=True), found["errors"]).blocked
    if config.expect:
        found["missing"] = [
            {"glob": one.of.glob, "by": utc_second(by), "error": one.alarms.get(("missing", by), (0, ""))[1]}
            for one in judgements(config, database)
            for by in one.missing
        ]
    return judged(found)


def judged(status: Mapping[str, Any], elapsed: float = 0.0) -> dict[str, Any]:
    """With roles, `elapsed` seconds after the database was read, and what is to be said."""
    found, own = dict(status, members=[], active=None), status.get("member", {})
    if own.get("role") == "active":  # it knows better
        found.update(active=own["member_id"], holder=own["member_id"], term=own.get("term", status["term"]))
        found["blocked"] = own.get("blocked")
    down = status.get("heartbeat", {"error": status["database_error"]})["error"]
    for row in status["members"]:
        age = row["heartbeat_age"] + elapsed
        role = "active" if row["member_id"] == found["holder"] else "standby"
        role = "released" if row["released"] else role if age <= status["stale_after"] else "stale"
        if role == "active" and not down:
            found["active"] = row["member_id"]
        found["members"].append({**row, "role": role, "heartbeat_age": age})
    told = list(findings(found))
    found["problems"] = [{"problem": one.text, "advice": one.advice} for one in told if one.severity in PROBLEMS]
    found["notes"] = [one.text for one in told if one.severity not in PROBLEMS]
    return {**found, "healthy": not found["problems"]}


def findings(status: Mapping[str, Any]) -> Iterator[Finding]:
    """What a document tells that somebody should know, the worst of a process first."""
    own, server, active, files = status.get("member", {}), status.get("server", {}), status["active"], status["files"]
    stuck, down, refused, later = own.get("stuck"), status["database_error"], server.get("error"), status["not_now"]
    if stuck:
        advice = "Restart the process. WatchdogSec of systemd or a liveness probe of /livez does it by itself."
        yield Finding("stuck", f"this member makes no progress: {stuck}", advice, stuck)
    if down:
        advice = (
            "Nothing is polled before it is back; then work goes on by itself. See that it runs, that this host "
            "reaches it, and that the login is right (`ftpcoord.py check`)."
        )
        yield Finding("unready", f"the database cannot be used: {down}", advice, f"database down: {down}")
    elif active is None:
        yield _nobody_active(status)
    if own.get("role") in ("starting", "stopping"):
        yield Finding("passing", f"this member is {own['role']}", short=own["role"])
    if refused:
        text, short = "the file server cannot be used", "file server down"
        if server["up"] is None:  # the trouble is our own
            text, short = "nothing can be polled", "cannot poll"
        advice = "It is tried again for ever; the files wait there. `ftpcoord.py check` tells more."
        yield Finding("unready", f"{text}: {refused}", advice, f"{short}: {refused}")
    for folder, why in server.get("lost", {}).items():
        advice = "See to its path and its rights; the other folders are polled."
        yield Finding("problem", f"{folder} cannot be polled: {why}", advice)
    if own.get("not_now"):
        yield Finding("passing", f"claims wait for the system behind the handler: {own['not_now']}")
    if status["paused"]:
        text = f"the group is {paused(status['paused'])}; no new file is taken"
        yield Finding("problem", text, "`ftpcoord.py resume` ends it.")
    if later:
        more = f" and {later['count'] - len(later['paths'])} more" * (later["count"] > len(later["paths"]))
        text = f"the system behind the handler says not now since {later['since']}: {', '.join(later['paths'])}{more}"
        advice = "Mend that system: the files are tried again by themselves, uncounted."
        yield Finding("problem" if later["count"] >= 3 else "note", text, advice)
    for row in status["members"]:
        if row["heartbeat_age"] < -5 and row["member_id"] == active:
            text = f"the heartbeat of {active} lies {duration(-row['heartbeat_age'])} in the future"
            advice = "The database's clock was set back. A dead member is noticed all the same; correct the clock."
            yield Finding("problem", text, advice)
    for one in status["missing"]:
        text = f"no {one['glob']} was done by {one['by']}" + (f": it {one['error']}" if one["error"] else "")
        yield Finding("problem", text, "If it did not come, ask who sends it; the next one that is done ends this.")
    if files.get("quarantined"):
        text = f"{files['quarantined']} {'file is' if files['quarantined'] == 1 else 'files are'} quarantined"
        advice = "`ftpcoord.py files --state quarantined` tells why; `ftpcoord.py retry GLOB` has them tried again."
        yield Finding("problem", text, advice)
    for one in status.get("blocked") or ():
        if one["state"].startswith("quarantined") or "not listed" in one["state"]:
            advice = "`ftpcoord.py retry GLOB` has it tried again, `skip GLOB` lets the others go on."
            yield Finding("problem", f"{one['path']} blocks {one['files']} files: {one['state']}", advice)
    if active is not None and all(row["role"] != "standby" for row in status["members"]):
        yield Finding("note", "there is no standby: nobody takes over if the active member dies")
    if status.get("next_round"):
        yield Finding("note", f"the schedule starts a round of polls at {moment(status['next_round'])} UTC")
    if files.get("failed"):
        yield Finding("note", f"{files['failed']} failed and will be tried again")


def paused(found: Optional[Mapping[str, Any]]) -> str:
    return f"paused by {found['by']} since {found['since']}, until {found['until'] or 'it is resumed'}" if found else ""


def _nobody_active(status: Mapping[str, Any]) -> Finding:
    holder, standbys = status["holder"], [row["member_id"] for row in status["members"] if row["role"] == "standby"]
    last = f"{holder} was, and has no heartbeat" if holder else "none ever was"
    for row in status["members"]:
        if row["member_id"] == holder:
            age = f"was, and its last heartbeat is {duration(row['heartbeat_age'])} old"
            last = f"{holder} {'gave the role up' if row['released'] else age}"
    advice = "Start a member (`ftpcoord.py run`); until then the files wait on the server."
    advice = f"{', '.join(standbys)} will take over within moments; look again." if standbys else advice
    return Finding("problem", f"no member is active: {last}", advice)


def in_short(status: Mapping[str, Any], severities: Collection[str]) -> str:
    return "; ".join(one.short or one.text for one in findings(status) if one.severity in severities)


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 5 min, 3 h 12 min, 4 days; never less than nothing"""
    seconds = max(0.0, seconds)
    if seconds < 100:
        return f"{seconds:.{int(seconds < 10)}f} s"
    hours, minutes = divmod(int(seconds / 60), 60)
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days"


class Survey:
    """A group as the database shows it, read by a thread of its own."""

    def __init__(self, config: Config) -> None:
        self.config, self.error = config, ""
        self._database: Optional[Database] = None
        self._status: Optional[dict[str, Any]] = None
        self._read_at = self._next = self._began = float("-inf")
        self._reading = False
        self._changed = threading.Condition()

    def get(self, wait: bool = True) -> tuple[Optional[dict[str, Any]], float]:
        """What was read last, and how many seconds ago."""
        with self._changed:
            if not self._reading and boot_clock() >= self._next:
                with contextlib.suppress(RuntimeError):  # no thread is left
                    threading.Thread(target=self._read, name="ftpcoord-survey", daemon=True).start()
                    self._reading, self._began = True, boot_clock()
            self._changed.wait_for(lambda: not (self._reading and wait), self._began + SURVEY_WAIT - boot_clock())
            return self._status, boot_clock() - self._read_at

    def _read(self) -> None:
        began, found, error = boot_clock(), None, ""
        try:
            if began - self._read_at > 60:  # a firewall may have dropped it
                self.close()
            self._database = self._database or open_database(self.config)
            found = group_status(self._database, self.config)
        except Exception as exc:
            error = str(exc) if isinstance(exc, Error) else reason(exc)
            self.close()
        with self._changed:
            self.error = error.partition("\n")[0]
            if found is not None:
                self._status, self._read_at = found, began
            self._next = began + max(SURVEY_SECONDS, SURVEY_SHARE * (boot_clock() - began))
            self._reading = False
            self._changed.notify_all()

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
        self._database = None


def role_of(member: Member) -> str:
    lease = member.lease
    if member.stopping or member.finished.is_set():
        return "stopping"
    return "active" if lease is not None and lease.valid() else "standby" if member.ready.is_set() else "starting"


def why_stuck(listener: Listener) -> str:
    """Why only a new process helps; "" if it does not."""
    member = listener.member
    if member.finished.is_set() or member.pulse is None:
        return str(member.failure or "")
    late = boot_clock() - max(member.next_beat, member.stats.beat_at)
    if not member.pulse.alive() or late > max(30.0, 2 * member.config.liveness_check_interval):
        return f"the heartbeat stands still for {duration(late)}"
    if not listener.polling():
        return "the polling has ended"
    lease, now, patience = member.work, boot_clock(), member.config.drain_timeout
    over = lease is not None and not lease.valid() and member.progress.overdue(now) > patience
    hangs = over or member.progress.handler_overdue(now) > patience
    return "a handler hangs, or the work of a lost lease" if hangs else ""


def own_status(listener: Listener) -> dict[str, Any]:
    """What the process itself knows: probes need no database."""
    config, member, stats = listener.config, listener.member, listener.member.stats
    role, lease, view = role_of(member), member.lease, member.election.view if member.election else None
    error, answered = member.outage.error(), stats.database_at
    return {
        **unread(config, error),
        "member": {
            **stats.own,
            "member_id": config.member_id,
            "role": role,
            "version": __version__,
            "term": lease.term if lease is not None else view.term if view is not None else None,
            "follows": view.holder or "nobody" if role == "standby" and view is not None else "",
            "lease_remaining": max(0.0, lease.remaining()) if lease is not None else None,
            "stuck": why_stuck(listener),
            "not_now": stats.not_now if role == "active" else "",
            "blocked": stats.order.blocked if role == "active" and stats.order else None,
        },
        "heartbeat": {
            "up": not error and answered >= 0,
            "error": error,
            "age": boot_clock() - answered if answered >= 0 else None,
            "mean": stats.heartbeats.sum / max(1, sum(stats.heartbeats.counts)),
        },
        "server": {"url": config.where(), **stats.server},
        "work": {
            **stats.work,
            "queue": stats.queued(),
            "handlers": member.progress.handlers(),
            "minutes": [list(minute) for minute in list(stats.minutes)],
        },
        "takeovers": list(stats.takeovers),
        "backlog": stats.backlog.told(stats.order) if role == "active" else None,
    }


def why_unready(listener: Listener) -> str:
    return in_short(own_status(listener), ("stuck", "unready", "passing"))


def listener_status(listener: Listener, survey: Survey) -> dict[str, Any]:
    config, found = listener.config, own_status(listener)
    read, age = survey.get()
    error = found["database_error"] or survey.error or ("" if read is not None else "it has not answered yet")
    settings = {name: printable(str(value)) for name, value in config.public().items()}
    for name in filter(settings.get, PROGRAMS):  # arguments may hold a token
        words = config.command(name)
        settings[name] = words[0] + (f" ... ({len(words) - 1} arguments)" if words[1:] else "")
    own = {"next_round": found["next_round"], "database_error": error, "settings": settings}
    found.update(read or {}, as_of=None if read is None else age, **own)
    return judged(found, age)


# -- metrics ----------------------------------------------------------------------------------------------------------
def metrics(listeners: Sequence[tuple[Listener, Survey]]) -> str:
    """Prometheus' text format 0.0.4: all samples of a name stand together."""
    build = {"version": __version__, "python": sys.version.split()[0]}
    families = {("build_info", "The version that runs."): list(_samples("build_info", 1, build))}
    for listener, survey in listeners:
        own = {"group": listener.config.coordination_group, "member": listener.config.member_id}
        for name, text, value in _metrics(listener_status(listener, survey), listener.member.stats):
            families.setdefault((name, text), []).extend(_samples(name, value, own))
    told = ""
    for (name, text), samples in families.items():
        kind = "counter" if name.endswith("_total") else "histogram" if "_duration_" in name else "gauge"
        told += f"# HELP ftpcoord_{name} {text}\n# TYPE ftpcoord_{name} {kind}\n" * bool(samples) + "".join(samples)
    return told


def _metrics(status: Mapping[str, Any], stats: Stats) -> Iterator[tuple[str, str, Any]]:
    """Name, text and value; a value by labels stands under the label's name; None is left out."""
    own, beat, server, work = status["member"], status["heartbeat"], status["server"], status["work"]
    polls = {"ok": sum(stats.polls.counts), "failed": stats.failed_polls}
    backlog, blocked = status["backlog"] or {}, own["blocked"]
    behind = None if blocked is None else sum(one["files"] for one in blocked)
    first = min((one["since"] for one in blocked or ()), default=None)
    yield from (
        ("start_time_seconds", "When this member started, in epoch seconds.", own["started"]),
        ("role", "1 for the role that this member has.", {"role": {role: role == own["role"] for role in ROLES}}),
        ("term", "The group's term, as this member knows it.", own["term"]),
        (
            "lease_remaining_seconds",
            "Until the lease ends, if not renewed; 0 on a standby.",
            own["lease_remaining"] or 0.0,
        ),
        ("takeovers_total", "Elections that this member won, by why the role was free.", {"reason": stats.elections}),
        ("leases_ended_total", "Leases of this member that ended.", {"how": stats.ends}),
        ("database_up", "Whether the database answered the last heartbeat.", beat["up"]),
        ("heartbeat_age_seconds", "Since the database last answered.", beat["age"]),
        ("heartbeat_late_seconds", "By how much the last heartbeat left late.", stats.late),
        ("heartbeat_duration_seconds", "What heartbeats took, round trip.", stats.heartbeats),
        ("heartbeat_failures_total", "Heartbeats that the database did not answer.", stats.failed_heartbeats),
        ("server_up", "Whether the last poll reached the file server; absent on a standby.", server["up"]),
        ("poll_duration_seconds", "What polls took.", stats.polls),
        ("polls_total", "Polls, by result.", {"result": polls}),
        ("listing_files", "Files in the last listing.", server["listed"]),
        ("retry_waiting_files", "Failed files whose time has not come, at the last poll.", server["waiting"]),
        ("blocked_files", "Files that wait for one before them (order).", behind),
        ("blocked_since_timestamp_seconds", "Since when the first of them wait.", first),
        ("refused_names_total", "Listed names that are no plain file names, at each listing.", server["refused"]),
        ("files_total", "Files handled, by result.", {"result": {state: work[state] for state in stats.file_bytes}}),
        ("file_bytes_total", "Size of the files handled, by result.", {"result": stats.file_bytes}),
        ("fetched_bytes_total", "Bytes fetched from the file server.", work["bytes"]),
        ("handler_duration_seconds", "What commands and handlers took.", stats.handlers),
        ("handlers_running", "Commands and handlers that run now.", work["handlers"]),
        ("backlog_files", "Files listed, wanted and not done, at the last poll.", backlog.get("files")),
        ("backlog_bytes", "Their size.", backlog.get("bytes")),
        ("oldest_waiting_seconds", "Since this member first saw the oldest of them.", backlog.get("oldest")),
        ("queue_files", "Files taken up and not ended.", work["queue"]),
        ("last_success_timestamp_seconds", "When a file was last done.", work["last_done"]),
        ("last_poll_timestamp_seconds", "When a poll last succeeded.", server["last_poll"]),
    )
    if status["as_of"] is None or status["as_of"] >= 60 or status["database_error"]:
        return  # what is the same on every member is not known
    later, roles = status["not_now"], [row["role"] for row in status["members"]]
    roles_there = {role: roles.count(role) for role in ("active", "standby", "released", "stale")}
    yield from (
        ("paused", "Whether an operator has paused the group.", status["paused"] is not None),
        ("not_now_files", "Files for which handlers say not now.", later["count"] if later else 0),
        ("not_now_since_timestamp_seconds", "When they said so first.", later and epoch_seconds(later["since"][:-1])),
        ("missing_files", "Expected files that are overdue; the same on every member.", len(status["missing"])),
        ("ledger_files", "Files in the ledger, by state; the same on every member.", {"state": status["files"]}),
        ("members", "Members in the database, by role; the same on every member.", {"role": roles_there}),
    )


def _samples(name: str, value: Any, labels: Mapping[str, str]) -> Iterator[str]:
    if isinstance(value, Histogram):
        counted = list(itertools.accumulate(value.counts))
        yield from _samples(f"{name}_bucket", {"le": dict(zip([*value.bounds, "+Inf"], counted))}, labels)
        yield from _samples(f"{name}_sum", value.sum, labels)
        yield from _samples(f"{name}_count", counted[-1], labels)
    elif isinstance(value, Mapping):
        for label, numbers in value.items():
            for key, number in numbers.items():
                yield from _samples(name, number, {**labels, label: str(key)})
    elif value is not None:
        told = ",".join(f"{key}={json.dumps(text)}" for key, text in labels.items())  # escaped alike
        yield f"ftpcoord_{name}{{{told}}} {float(value)!r}\n"


def moment(seconds: float) -> str:
    return utc_text(seconds)[:19].replace("T", " ")


def ago(seconds: Optional[float]) -> str:
    return "never" if seconds is None else f"{duration(time.time() - seconds)} ago"


def since(status: Mapping[str, Any]) -> str:
    own, known = status.get("member", {}), f" at term {status['term']}"
    began = own.get("active_since" if status["active"] == own.get("member_id") else "other_since")
    if began:
        return f"{known}, since {moment(began)} UTC ({ago(began)})"
    return f"{known}, for at least {duration(status['active_for'])}" if status.get("active_for") else known


def counted(status: Mapping[str, Any]) -> str:
    told = ", ".join(f"{number:,} {state}" for state, number in status["files"].items()) or "none counted"
    return told + (f"; the last change {duration(status['last_change'])} ago" if status.get("last_change") else "")


def tables(status: Mapping[str, Any]) -> Iterator[tuple[str, str, Sequence[Sequence[str]]]]:
    """Title, heads and rows. The page shows what a row has beyond its heads below it."""
    members = []
    for row in status["members"]:
        age = duration(row["heartbeat_age"])
        told = {"released": "gave its lease up", "stale": f"no heartbeat for {age}"}
        members.append((row["role"], row["member_id"], told.get(row["role"], f"heartbeat {age} ago")))
    yield "Members", "Role|Member*", members
    waiting = status.get("backlog") or {"first": []}
    yield (
        "Files that wait, the longest first",
        "Since|File*",
        [(duration(row["age"]), row["path"], row["why"]) for row in waiting["first"]],
    )
    yield (
        "Quarantined and failed files",
        "State|File*",
        [
            (row["state"], row["path"], f"attempt {row['attempts']}, {duration(row['age'])} ago", row["error"])
            for row in status["errors"]
        ],
    )
    if status.get("blocked") is not None:
        blocked = [(one["state"], one["path"], f"{one['files']} behind it" + _for(one)) for one in status["blocked"]]
        yield "Blocked (order)", "State|By*", blocked
    yield (
        "Changes of the active member, as this one saw them",
        "UTC|Change*",
        [(moment(change["time"]), _told(change)) for change in status.get("takeovers", ())],
    )
    usual = {field.name: str(field.default) for field in dataclasses.fields(Config)}
    yield (
        "Settings that are not the default",
        "Name|Value*",
        [(name, value) for name, value in sorted(status.get("settings", {}).items()) if value != usual[name]],
    )


def _for(blocked: Mapping[str, Any]) -> str:
    return "" if blocked["since"] is None else f", for {duration(time.time() - blocked['since'])}"


def _told(change: Mapping[str, Any]) -> str:
    own = change["event"] in ("lost", "released")
    verb = {"lost": "lost", "released": "gave up"}.get(change["event"], "became active at")
    took = "" if change["seconds"] is None else duration(change["seconds"])
    took = took and (f" after {took}" if own else f", {took} after the last sign of life of the one before")
    return f"{change['member']} {verb} term {change['term']} ({change['reason']}){took}"


def status_lines(status: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """A colour, which says nothing more than the words, and a line."""
    yield 1, f"group {status['group']} on {status['database']}"
    if status["active"] is not None:
        yield 32, f"  {status['active']} is active{since(status)}"
    for found in status["problems"]:
        yield 31, f"  PROBLEM: {found['problem']}"
        yield 0, f"    {found['advice']}"
    for note in status["notes"]:
        yield 0, f"  note: {note}"
    yield 0, f"  files: {counted(status)}"
    for _, _, rows in tables(status):
        width = max((len(row[1]) for row in rows), default=0)
        for state, what, *more in rows:
            yield 33 * (state == "stale"), f"  {state:<8}  {what:<{width}}  {''.join(more[:1])}".rstrip()
            yield from ((0, f"    {text}") for text in more[1:])


def nagios_line(groups: Sequence[Mapping[str, Any]]) -> str:
    bad = [f"{status['group']}: {one['problem']}" for status in groups for one in status["problems"]]
    good = [
        f"{status['group']}: {status['active']} is active at term {status['term']}, "
        f"{sum(row['role'] == 'standby' for row in status['members'])} standby"
        for status in groups
    ]
    return f"not ok: {'; '.join(bad)}" if bad else f"ok: {'; '.join(good)}"


# -- the page ---------------------------------------------------------------------------------------------------------
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --back: #f6f7f9; --card: #fff; --line: #d5d9df;
        --good: #0a5a9c; --bad: #a40e26; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a2abb6; --back: #14171b; --card: #1d2126;
        --line: #383e46; --good: #7cc0ff; --bad: #ff9a9a; } }
body { margin: auto; padding: 12px; max-width: 1100px; background: var(--back); color: var(--ink);
       font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
header, footer, a, small, dt, th { color: var(--soft); font-size: 13px; font-weight: normal; }
section, .cards div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
section, .cards, .state { margin: 12px 0; }
h2, h3 { font-size: 16px; }
p, dd { margin: 2px 0; }
.state { border-left: 6px solid var(--good); padding: 8px; }
.bad { border-color: var(--bad); border-style: double; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 10px; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: 4px 12px 4px 0; border-top: 1px solid var(--line);
         white-space: nowrap; }
.wide { white-space: normal; width: 100%; }
svg { display: block; width: 100%; height: 26px; fill: var(--good); }
"""
POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; img-src data:; style-src 'sha256-"
    + base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    + "'"
)


def shown(text: object) -> str:
    """As HTML in one line."""
    import html

    return html.escape(printable(str(text)))


def page(groups: Sequence[Mapping[str, Any]], refresh: int) -> str:
    roles = ", ".join(sorted({group["member"]["role"] for group in groups}))
    title = f"{mark(groups)} {roles}: " + ", ".join(str(group["group"]) for group in groups)
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    word = f'every {refresh} s; <a href="?refresh=0">stop</a>' if refresh else 'no more; <a href="?">go on</a>'
    links = ", ".join(f'<a href="{name}">{name}</a>' for name in ("status", "metrics", "livez", "readyz", "active"))
    overview, sections = "", ""
    for n, group in enumerate(groups):
        told = [one["problem"].partition(": ")[0] for one in group["problems"]] or [f"{group['active']} is active"]
        overview += f"<p>{mark([group])} <a href='#g{n}'>{shown(group['group'])}</a>: {shown('; '.join(told))}"
        sections += f"<section id=g{n}>{''.join(_parts(group))}</section>"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{again}<title>{shown(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body>"
        f"<header>ftpcoord {__version__} at {moment(time.time())} UTC; refreshes {word}</header>"
        f"<main>{overview if len(groups) > 1 else ''}{sections}</main>"
        f"<footer>For programs: {links}</footer></body></html>\n"
    )


def mark(groups: Sequence[Mapping[str, Any]]) -> str:
    return "✔" if all(group["healthy"] for group in groups) else "▲"


def _parts(group: Mapping[str, Any]) -> Iterator[str]:
    work, backlog = group["work"], group["backlog"]
    boxes = []
    if group["active"] is not None:
        boxes.append(f"<div class=state><b>● {shown(group['active'])} is active</b>{since(group)}</div>")
    for found in group["problems"]:
        what, colon, more = (found["problem"][:1].upper() + found["problem"][1:]).partition(": ")
        text = f"<b>▲ {shown(what)}{colon}</b>{shown(more)}<p>{shown(found['advice'])}"
        boxes.append(f"<div class='state bad'>{text}</div>")
    yield f"<h2>{shown(group['group'])}</h2>" + "".join(boxes[:1])
    if backlog is not None:
        yield f"<p><b>Work:</b> last file done {ago(work['last_done'])}, last poll {ago(group['server']['last_poll'])}"
        oldest = f"{backlog['files']:,} files, {backlog['bytes']:,} bytes, the oldest for {duration(backlog['oldest'])}"
        yield f"<p><b>Waiting:</b> {oldest if backlog['files'] else 'nothing'}"
    yield from boxes[1:]
    yield "".join(f"<p>{shown(note)}" for note in group["notes"])
    yield "" if group["problems"] else "<p>✔ Nothing has to be done."
    yield "<dl class=cards>"
    for name, *lines in _cards(group):
        state, what, more = map(shown, lines)
        yield f"<div><dt>{name}<dd><b>{state}</b><dd><small>{what}<br>{more}</small></div>"
    yield "</dl>"
    if group["database_error"]:
        read = "has not been read" if group["as_of"] is None else f"showed it {duration(group['as_of'])} ago"
        yield f"<p>▲ As the database {read}:"
    yield f"<h3>Files in the ledger</h3><p>{counted(group)}"
    yield "<h3>Handled by this member: the last 60 minutes, now at the right</h3>"
    for column, state in enumerate(("done", "failed", "quarantined"), 1):
        yield from _bars(state, {minute[0]: minute[column] for minute in work["minutes"]})
    for title, heads, rows in tables(group):
        yield f"<h3>{title}</h3>" + _table(heads.split("|"), rows) if rows else f"<h3>{title}</h3><p>None."


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The column with a * takes the width that is left."""
    lines = ["".join(f"<th scope=col>{head.rstrip('*')}" for head in heads)]
    for first, *row in rows:
        cells = zip(heads, (f"{SYMBOLS.get(first, '')} {first}", *row))
        line = "".join(f"<td{' class=wide' if head[-1] == '*' else ''}>{shown(cell)}" for head, cell in cells)
        lines.append(line + "".join(f"<br><small>{shown(more)}</small>" for more in row[len(heads) - 1 :]))
    return "<table><tr>" + "<tr>".join(lines) + "</table>"


def _cards(group: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    own, heartbeat, server, work = group["member"], group["heartbeat"], group["server"], group["work"]
    yield "This member", f"{SYMBOLS[own['role']]} {own['role']}", own["member_id"], f"started {ago(own['started'])}"
    state = "✔ up" if heartbeat["up"] else "▲ down" if heartbeat["error"] else "◐ not reached yet"
    answered = ""
    if heartbeat["age"] is not None:
        answered = f"answered {duration(heartbeat['age'])} ago, {heartbeat['mean'] * 1000:.1f} ms on average"
    yield "Database", state, group["database"], answered
    state = {None: "○ not used now", False: "▲ down", True: "✔ up"}[server["up"]]
    polled = f"polled {ago(server['last_poll'])}, {server['listed']:,} listed" if server["last_poll"] else ""
    waiting = f"{server['waiting']:,} wait to be tried again" if server["waiting"] else ""
    refused = f"{server['refused']:,} odd names refused" if server["refused"] else ""
    yield "File server", state, server["url"], ", ".join(filter(None, (polled, waiting, refused)))
    handlers = f"{work['handlers']} handlers run, last done {ago(work['last_done'])}"
    yield "In work", f"{work['queue']} files", handlers, f"{work['bytes']:,} bytes fetched"


def _bars(state: str, counts: Mapping[int, int]) -> Iterator[str]:
    now = int(time.time() // 60)
    counts = {minute: count for minute, count in counts.items() if now - minute < 60 and count}
    most, total = max(counts.values(), default=0), sum(counts.values())
    yield f"<p><small><b>{total:,}</b> {state}" + (f", at most {most:,} in a minute" if total else "") + "</small>"
    yield f'<svg viewBox="0 0 300 26" preserveAspectRatio="none" role="img" aria-label="{total} {state}">'
    for minute, count in counts.items():
        height = max(2.0, 22 * count / most)
        place = f'x="{5 * (59 - now + minute)}" y="{24 - height:.1f}" width="4" height="{height:.1f}"'
        yield f"<rect {place}><title>{utc_text(minute * 60)[11:16]} UTC: {count:,} {state}</title></rect>"
    yield '<rect y="25" width="299" height="0.6"/></svg>'


# -- HTTP -------------------------------------------------------------------------------------------------------------

# Answered without the database.
PROBES: dict[str, Callable[[Listener], str]] = {
    "/livez": lambda listener: why_stuck(listener) or "ok",
    "/readyz": lambda listener: why_unready(listener) or "ok",
    "/active": lambda listener: role_of(listener.member),
}


class StatusServer:
    """GET and HEAD: / for people, /status and /metrics for programs, /livez, /readyz and /active for probes.

    Where too many are connected, one of the peer with the most is cut: nobody can keep
    probes away. Raises Error if the port is taken.
    """

    def __init__(self, address: tuple[str, int], listeners: Sequence[Listener]) -> None:
        self._listeners = [(listener, Survey(listener.config)) for listener in listeners]
        self._peers: dict[socket.socket, str] = {}  # the oldest first
        self._lock, self._asking = threading.Lock(), threading.Lock()
        self._pages = threading.Semaphore(HTTP_REQUESTS)  # answers that may wait for the database
        self._names = {"localhost", address[0].lower()}
        try:
            family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
            self._socket = socket.create_server(address, family=family)
        except OSError as exc:
            why = os.strerror(exc.errno) if exc.errno and exc.errno > 0 else reason(exc)
            raise Error(f"http: {address[0]}:{address[1]} cannot be listened on ({why})") from None
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._serve, name="ftpcoord-http", daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept() on Linux
        self._socket.close()

    def _serve(self) -> None:
        while self._socket.fileno() >= 0:
            try:
                connection, peer = self._socket.accept()
            except OSError:  # closed, or no descriptor is left
                time.sleep(0.05)
                continue
            with self._lock:
                if len(self._peers) >= HTTP_REQUESTS:
                    peers = list(self._peers.values())
                    most = max(map(peers.count, peers))
                    oldest = next(other for other, of in self._peers.items() if peers.count(of) == most)
                    del self._peers[oldest]
                    with contextlib.suppress(OSError):
                        oldest.shutdown(socket.SHUT_RDWR)
                self._peers[connection] = peer[0]
            try:
                threading.Thread(target=self._talk, args=(connection,), name="ftpcoord-http", daemon=True).start()
            except RuntimeError:
                self._peers.pop(connection, None)
                connection.close()

    def _talk(self, connection: socket.socket) -> None:
        until = time.monotonic() + HTTP_SECONDS
        try:
            with connection, contextlib.suppress(OSError):
                request = b""
                while b"\r\n\r\n" not in request and b"\n\n" not in request and len(request) <= HTTP_BYTES:
                    connection.settimeout(max(0.001, until - time.monotonic()))
                    data = connection.recv(HTTP_BYTES)
                    if not data:
                        return
                    request += data
                answer = self._answer(request)
                connection.settimeout(max(0.001, until - time.monotonic()))
                connection.sendall(answer)
                # What was not read would make the end a reset that outruns the answer.
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(0.5)
                while time.monotonic() < until and connection.recv(HTTP_BYTES):
                    pass
        finally:
            with self._lock:
                self._peers.pop(connection, None)

    def _answer(self, request: bytes) -> bytes:
        from http import HTTPStatus

        first, *fields = request.decode("latin-1").split("\n")
        words = first.split()
        method, target, version = words if len(words) == 3 else ("", "", "")
        path = target.partition("?")[0]
        hosts = re.findall(r"^\s*host\s*:(.*)", "\n".join(fields), re.IGNORECASE | re.MULTILINE)
        kind, body = "text/plain", ""
        try:
            if len(request) > HTTP_BYTES:
                status, body = 431, "too long\n"
            elif not version.startswith("HTTP/1."):
                status, body = 400, "not an HTTP/1 request\n"
            elif method not in ("GET", "HEAD"):
                status, body = 405, "GET and HEAD only\n"
            elif len(hosts) > 1:
                status, body = 400, "more than one Host\n"
            elif path not in FOR_ANY_HOST and not self._is_ours("".join(hosts).strip()):
                status, body = 421, "this Host is no name of ours: use the address\n"
            elif path not in PROBES and not self._pages.acquire(blocking=False):
                status, body = 503, "too many ask at once\n"
            else:
                try:
                    status, kind, body = self._route(target)
                finally:
                    if path not in PROBES:
                        self._pages.release()
        except Exception as exc:
            event("http_failed", logging.ERROR, exc=exc, error=reason(exc))
            status, body = 500, "an error of ours; the log tells it\n"
        content = body.encode("utf-8", "backslashreplace")
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: {kind}; charset=utf-8\r\n"
            f"Content-Length: {len(content)}\r\nContent-Security-Policy: {POLICY}\r\nAllow: GET, HEAD\r\n"
            "X-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\nCache-Control: no-store\r\n"
            "Cross-Origin-Resource-Policy: same-origin\r\nConnection: close\r\n\r\n"
        )
        return head.encode("latin-1") + (b"" if method == "HEAD" else content)

    def _is_ours(self, host: str) -> bool:
        """Whether a Host is none, an address or a name of this host; others may mean DNS rebinding."""
        name = re.sub(r":\d*\Z", "", host).strip("[]").rstrip(".").lower()
        with contextlib.suppress(ValueError):
            return bool(ipaddress.ip_address(name.partition("%")[0]))
        if name and name not in self._names and self._asking.acquire(blocking=False):  # DNS may take its time, once
            try:
                self._names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
            finally:
                self._asking.release()
        return not name or name in self._names

    def _route(self, target: str) -> tuple[int, str, str]:
        path, _, query = target.partition("?")
        wanted = urllib.parse.parse_qs(query)
        group = wanted.get("group", [""])[0]
        chosen = [pair for pair in self._listeners if group in ("", pair[0].config.coordination_group)]
        if not chosen:
            return 404, "text/plain", "there is no such group here\n"
        for _, survey in chosen if path not in PROBES else ():  # all at once
            survey.get(wait=False)
        if path == "/":
            refresh = 0 if wanted.get("refresh") == ["0"] else 5
            return 200, "text/html", page([listener_status(*pair) for pair in chosen], refresh)
        if path == "/status":
            found = [listener_status(*pair) for pair in chosen]
            return 200, "application/json", json.dumps(found[0] if len(found) == 1 else found) + "\n"
        if path == "/metrics":
            return 200, "text/plain; version=0.0.4", metrics(chosen)
        if path in PROBES:
            told = [PROBES[path](listener) for listener, _ in chosen]
            well = "active" in told if path == "/active" else {*told} == {"ok"}
            lines = "".join(f"{one.config.coordination_group}: {text}\n" for (one, _), text in zip(chosen, told))
            return 200 if well else 503, "text/plain", lines
        return 404, "text/plain", "/, /status, /metrics, /livez, /readyz and /active are here\n"


# -- systemd ----------------------------------------------------------------------------------------------------------
def summary(groups: Sequence[Mapping[str, Any]]) -> str:
    roles, done = [one["member"]["role"] for one in groups], sum(one["work"]["done"] for one in groups)
    if len(groups) > 1:
        told = ", ".join(f"{roles.count(role)} {role}" for role in sorted(set(roles)))
        return f"{len(groups)} groups: {told}; {done} files done"
    own, active = groups[0]["member"], roles == ["active"]
    words = [
        f"active at term {own['term']}" if active else own["role"],
        own["follows"] and f"active: {own['follows']}",
        f"{done} files done" if done or active else "",
        in_short(groups[0], ("stuck", "unready")).partition("\n")[0],
    ]
    return printable(", ".join(filter(None, words)))


class Notifier:
    """Tells systemd how it goes (sd_notify(3)), if there is a NOTIFY_SOCKET."""

    def __init__(self, listeners: Sequence[Listener], environ: Mapping[str, str]) -> None:
        self._listeners = listeners
        path = environ.get("NOTIFY_SOCKET", "")
        usable = path[:1] in ("/", "@") and hasattr(socket, "AF_UNIX")
        self._address = ("\0" + path[1:] if path[:1] == "@" else path) if usable else ""
        own = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        usec = environ.get("WATCHDOG_USEC", "")
        self._every = int(usec) / 2e6 if usable and own and usec.isdigit() and int(usec) else float("inf")
        self.pause = min(1.0, self._every / 4)  # between two calls of `tick`
        self._fed = 0.0
        self._told: dict[str, str] = {}

    def tick(self) -> None:
        if not self._address:
            return
        now, groups = time.monotonic(), [own_status(listener) for listener in self._listeners]
        members = [listener.member for listener in self._listeners]
        if all(member.ready.is_set() for member in members):
            self._tell("READY", "1")
        if all(member.stopping for member in members):
            self.stopping()
        self._tell("STATUS", summary(groups))
        if now - self._fed >= self._every and not any(one["member"]["stuck"] for one in groups):
            self._fed = now
            self._tell("WATCHDOG", "1", again=True)

    def stopping(self) -> None:
        self._tell("STOPPING", "1")

    def _tell(self, name: str, value: str, again: bool = False) -> None:
        if not self._address or (self._told.get(name) == value and not again):
            return
        self._told[name] = value
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(1.0)
                sender.sendto(f"{name}={value}".encode("utf-8", "replace"), self._address)
        except OSError as exc:
            event("notify_failed", logging.DEBUG, error=reason(exc))


# ---------------------------------------------------------------------------------------------------------------------
# III.6 Command line
# ---------------------------------------------------------------------------------------------------------------------


def opened(configs: Sequence[Config], needs: str = "") -> Iterator[tuple[Config, Database]]:
    """Each group with its database, if that setting is on. One whose database is away keeps no other from its turn."""
    wanted, problems = [config for config in configs if not needs or getattr(config, needs)], []
    if needs and not wanted:
        raise ConfigError(f"{needs}: is off, so there is nothing to show, to record or to put back")
    for config in wanted:
        with contextlib.closing(open_database(config)) as database:
            try:
                database.prepare()
                database.settle_group(config)
            except (DatabaseDown, DatabaseRefused) as exc:
                problems.append(exc)
            else:
                yield config, database
    if problems:
        raise type(problems[0])("; ".join(map(str, problems)))


def of_glibc(function: str, *numbers: int) -> None:
    with contextlib.suppress(Exception):  # other systems
        import ctypes

        getattr(ctypes.CDLL(None), function)(*numbers)


def command_run(configs: Sequence[Config], options: argparse.Namespace) -> int:
    """coordinate and poll until SIGTERM or SIGINT, then hand over (default)"""
    if options.dry_run:
        return command_dry_run(configs)
    later = threading.Timer(3.0, of_glibc, ("malloc_trim", 0))  # what compiling took
    later.daemon = True
    with contextlib.suppress(RuntimeError):
        later.start()
    start_logging(configs[0].log_level, configs[0].log_format, sys.stdout)
    log.always = said.always = True
    return run_listeners([Listener(config) for config in configs], options.once)


def command_check(configs: Sequence[Config], options: argparse.Namespace) -> int:
    """try settings, database, tables, file server and one listing; changes nothing"""
    for config in configs:
        print(f"settings: group {config.coordination_group}, member {config.member_id}")
        check_delivery(config, bool(config.handler))
        if config.handler:
            load_handler(config.handler, config.download_dir)
        for name in PROGRAMS:
            if getattr(config, name) and shutil.which(config.command(name)[0]) is None:
                raise ConfigError(f"{name}: {config.command(name)[0]} is not a command here")
        try:
            tempfile.gettempdir() if config.exec or config.handler else ""
        except OSError as exc:
            raise ConfigError(f"TMPDIR: {reason(exc)}") from None
        folder = config.place(config.download_dir)
        if folder and not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
            raise ConfigError(f"download_dir: {folder} is not a folder that this user can write to")
        for _, database in opened([config]):
            database.renew("", "", 0)  # of no group
            database.leave("", "")
            steps = [Change(None, NO_ROW, outcome=Outcome("")), Change(NO_ROW, NO_ROW), Change(NO_ROW, None)]
            database.write(Fence("", "", 0), steps * config.ledger)
            print(f"database: {database.where}, a heartbeat is stale after {database.timing.stale_after:g} s")
        selector = Selector(config, boot_clock)
        with contextlib.closing(open_server(config)) as server:
            listing = selector.tree.walk(server)
        wanted = sum(selector.wants(found) for found in listing)
        print(f"file server: {config.where()}, {len(listing)} files, {wanted} match")
        if listing.lost:
            raise FileRefused("; ".join(listing.lost.values()))
    print("ok")
    return 0


def read_status(config: Config) -> dict[str, Any]:
    try:
        with contextlib.closing(open_database(config)) as database:
            return group_status(database, config)
    except (DatabaseDown, DatabaseRefused) as exc:
        return judged(unread(config, str(exc)))


def command_status(configs: Sequence[Config], options: argparse.Namespace) -> int:
    """who is active, heartbeat ages, file counts, last errors, what to do"""
    groups = [read_status(config) for config in configs]
    if options.check:
        again = [n for n, status in enumerate(groups) if status["active"] is None and not status["database_error"]]
        if again:  # a hand-over
            time.sleep(min(5.0, 2 * configs[again[0]].heartbeat_frequency + 1))
        for n in again:
            groups[n] = read_status(configs[n])
        print(printable(nagios_line(groups)))
        return int(not all(status["healthy"] for status in groups))
    if options.json:
        print(json.dumps(groups[0] if len(groups) == 1 else groups))
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.name == "posix"
    for status in [] if options.json else groups:
        for code, text in status_lines(status):
            print(f"\x1b[{code}m{printable(text)}\x1b[0m" if colour and code else printable(text))
    errors = "; ".join(filter(None, (status["database_error"] for status in groups)))
    if errors:
        print(printable(f"ftpcoord: {errors}"), file=sys.stderr)
    return int(bool(errors))


def command_dry_run(configs: Sequence[Config]) -> int:
    """What a poll would take now, and why it would leave the rest; nothing is written anywhere."""
    start_logging("warning", configs[0].log_format, sys.stderr)
    for config in configs:
        there = config.ledger and (
            config.endpoint.dialect != "sqlite" or os.path.exists(config.place(config.endpoint.name))
        )
        rows: dict[str, Row] = {}
        for _, database in opened([config] if there else []):
            rows = {row.path: row for row in database.rows(config.coordination_group)}
            if wish := database.pauses(config.coordination_group)[2]:
                print(f"the group is {paused(wish)}")
        selector = Selector(config, lambda: 0.0)  # rows are due in seconds from now
        with contextlib.closing(open_server(config)) as server:
            listing = selector.tree.walk(server)
        choice = selector.choose(listing, rows.get, set())
        taken = {work.path: "" for work in choice.ready}
        taken.update((work.path, f"if it is unchanged {config.settle:g} s later") for work in choice.unsettled)
        order, works = Order(config), [*choice.ready, *choice.unsettled]
        if order.lines_up:
            first, behind = order.line_up(set(), filter(selector.wants, listing), rows, works)
            taken = {work.path: taken[work.path] for work in (*first, *behind.values())}
        listed = selector.companions.among(listing)
        for found in sorted(listing):
            path, row = found.path, rows.get(found.path)
            row = row if row is not None and same_version(row, found.entry) else None
            why = selector.verdict(found, row, listed, 0.0)[1] or "just seen for the first time (min_age)"
            word, why = ("take", taken[path]) if path in taken else ("skip", order.why(path, why))
            print(f"{word}  {printable(path)}  {found.entry.size} B  {found.entry.mtime}  {printable(why)}".rstrip())
        for path, why in sorted({**listing.skipped, **listing.lost}.items()):
            print(printable(f"skip  {printable(path)}  {why}"))
        limit = f", at most {config.max_files} in a poll" if 0 < config.max_files < len(taken) else ""
        print(f"{len(taken)} of {len(listing)} files would be handled{limit}; nothing was changed")
    return 0


def command_schema(configs: Sequence[Config], options: argparse.Namespace) -> int:
    """print the tables, or create those that are missing"""
    if not options.apply:
        for statement in ddl(options.dialect == "mysql").values():
            print(f"{statement};\n")
        return 0
    wanted = {config.database: config for config in configs if config.endpoint.dialect == options.dialect}
    if not wanted:
        raise ConfigError(f"schema: the database setting is {configs[0].endpoint.dialect}, not {options.dialect}")
    for config in wanted.values():
        with contextlib.closing(open_database(config)) as database:
            made = database.apply_schema()
        print(f"created {', '.join(made)}" if made else "all tables are there")
    return 0


def command_files(configs: Sequence[Config], options: argparse.Namespace) -> int:
    """what the ledger or the audit trail knows"""
    if options.history or options.since:
        if options.state:
            raise ConfigError("--since: is for --history, which has no --state")
        return command_history(configs, options)
    for config, database in opened(configs, "ledger"):
        rows = sorted(database.rows(config.coordination_group))
        order = Order(config).of_ledger(rows, database.errors(config.coordination_group))
        since = {one["path"]: _for(one) for one in order.blocked or ()}
        for row in rows:
            before = printable(order.before.get(row.path, ""))
            row = row._replace(path=printable(row.path), error=printable(error_text(row)))
            if options.state not in (None, row.state):
                continue
            if options.json:
                blocked = {"blocked_by": before} if config.order != "none" else {}
                told = {name: value for name, value in row._asdict().items() if name != "marks"}
                print(json.dumps({**told, **blocked, "group": config.coordination_group}))
                continue
            due = f"attempts {row.attempts}" + (f"  due: {row.action}" if row.action else "")
            due += f"  blocked by {before}{since.get(before, '')}" * bool(before)
            what = (f"{row.state:<11}", row.path, f"{row.size} B", row.mtime, due, row.error)
            print(printable("  ".join(filter(None, what))))
    return 0


def command_history(configs: Sequence[Config], options: argparse.Namespace) -> int:
    glob, since = options.history or "*", options.since or "1970-01-01"
    shape, digits = r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:[0-5]\d)?)?", re.sub(r"\D", "", since)
    if not (re.fullmatch(shape, since, re.ASCII) and iso_time(digits.ljust(14, "0"))):
        raise ConfigError(f"--since: {quoted(since)} is no date like 2026-01-31 or 2026-01-31T10:15")
    for config, database in opened(configs, "audit"):
        for row in database.history(config.coordination_group, since.replace("T", " ")):
            if any(fits(row["path"], glob)):
                row.update(path=printable(row["path"]), error=printable(row["error"]), group=config.coordination_group)
                texts = [f"{name}={value}" for name, value in row.items() if value not in ("", None)]
                print(json.dumps(row) if options.json else printable("  ".join(texts)))
    return 0


def command_retry(configs: Sequence[Config], options: argparse.Namespace) -> int:
    """put quarantined files back"""
    state = "done" if options.done else "quarantined"
    for config, database in opened(configs, "ledger"):
        rows = [row for row in database.rows(config.coordination_group) if row.state == state]
        rows = [row for row in meant(rows, options.glob) if not (options.done and row.action)]
        for row in rows:
            database.retry(config.coordination_group, row)
        print(f"{len(rows)} files put back")
    return 0


def fits(path: str, glob: str) -> tuple[bool, bool]:
    """Whether its path or name is shown as that text, and whether it matches."""
    names = path, posixpath.basename(path)
    return glob in map(printable, names), any(glob_fits(name, glob) for name in names)


def meant(rows: Sequence[Row], glob: str) -> list[Row]:
    """Those whose path or name fits. A file may be called `[a]`: its name as it is shown means that file."""
    named = [row for row in rows if glob != "*" and fits(row.path, glob)[0]]
    return named or [row for row in rows if fits(row.path, glob)[1]]


def command_skip(configs: Sequence[Config], options: argparse.Namespace) -> int:
    """record failed or quarantined files as done, unhandled; they stay where they are"""
    in_work: list[str] = []
    for config, database in opened(configs, "ledger"):
        group = config.coordination_group
        rows = meant([row for row in database.rows(group, only_open=True) if row.state != "done"], options.glob)
        for row in rows:
            database.skip(group, row)
        left = {row.path for row in database.rows(group, only_open=True)}
        print(f"{sum(row.path not in left for row in rows)} files skipped")
        in_work += [printable(row.path) for row in rows if row.path in left]
    if in_work:
        raise Error(f"in work, and so not skipped: {', '.join(in_work)}; look again when that has ended")
    return 0


def command_adopt(configs: Sequence[Config], options: argparse.Namespace) -> int:
    """record every file that is there now as done, unhandled"""
    for config, database in opened(configs, "ledger"):
        database.close()  # a listing may take longer than a connection may idle
        with contextlib.closing(open_server(config)) as server:
            listing = Tree(config).walk(server)
        rows = [Row(found.path, found.entry.size, found.entry.mtime, "done", 0, 0, 0) for found in listing]
        database.adopt(config.coordination_group, config.member_id, rows)
        print(f"{len(rows)} files of {config.coordination_group} are recorded as done, unless they were known already")
    return 0


def command_step_down(configs: Sequence[Config], options: argparse.Namespace) -> int:
    """make the active member hand over"""
    for config, database in opened(configs):
        holder, term = database.token(config.coordination_group)
        if holder is None:
            raise DatabaseRefused(f"group {config.coordination_group} has no active member")
        database.ask(config.coordination_group, f"{STEP_DOWN}{term}")
        print(printable(f"asked {holder} to hand over at term {term}"))
    return 0


def operator() -> str:
    import getpass

    user = ""
    with contextlib.suppress(Exception):  # a container may have none
        user = getpass.getuser()
    return re.sub(r"[^!-~]", "_", f"{user[:40]}@{socket.gethostname()}")[:100]


def command_pause(configs: Sequence[Config], options: argparse.Namespace) -> int:
    """no new polls and claims until `resume`, or for a time; what is in work goes on"""
    for config, database in opened(configs):
        group = config.coordination_group
        now, before, _ = database.pauses(group)
        end = utc_second(now + options.seconds + 0.999) if options.seconds else "0"
        request = f"{PAUSE}{end}:{operator()}"
        database.ask(group, request)
        database.unask(group, {*before} - {request})
        print(printable(f"group {group} is {paused(database.pauses(group)[2])}"))
    return 0


def command_resume(configs: Sequence[Config], options: argparse.Namespace) -> int:
    """end a pause"""
    for config, database in opened(configs):
        _, ids, found = database.pauses(config.coordination_group)
        database.unask(config.coordination_group, ids)
        print(f"group {config.coordination_group} {'is resumed' if found else 'was not paused'}")
    return 0


def span(text: str) -> float:
    if not re.fullmatch(r"0*[1-9]\d{0,5}[smhd]", text, re.ASCII):
        raise ValueError
    return int(text[:-1]) * {"s": 1.0, "m": 60.0, "h": 3600.0, "d": SECONDS_A_DAY}[text[-1]]


def parse_arguments(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)  # before or after the command
    common.add_argument("--config", metavar="env|FILE", help="FTPCOORD_... variables, or an INI file (default: env)")
    text = "One of several copies polls FTP, FTPS or SFTP."
    parser = argparse.ArgumentParser(prog="ftpcoord.py", parents=[common], description=text)
    parser.add_argument("--version", action="version", version=f"ftpcoord {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(function: Callable[..., int], **flags: str) -> argparse.ArgumentParser:
        name, text = function.__name__[len("command_") :].replace("_", "-"), function.__doc__
        added = commands.add_parser(name, parents=[common], help=text, description=text)
        added.set_defaults(function=function)
        one_of = added.add_mutually_exclusive_group() if flags else added
        for flag, text in flags.items():
            one_of.add_argument("--" + flag.replace("_", "-"), action="store_true", help=text)
        return added

    add(command_run, once="until nothing is left to do, then stop", dry_run="tell which files would be handled now")
    add(command_check)
    add(command_status, json="", check="one line, and exit code 1 unless all groups are healthy")
    add(command_schema, apply="").add_argument("dialect", choices=list(DIALECTS))
    files = add(command_files, json="")
    one_of = files.add_mutually_exclusive_group()
    one_of.add_argument("--state", choices=("claimed", "done", "failed", "quarantined"))
    one_of.add_argument("--history", nargs="?", const="*", metavar="GLOB", help="the audit trail")
    files.add_argument("--since", metavar="DATE", help="in UTC, of the history")
    retry = add(command_retry, done="put done files back instead")
    retry.add_argument("glob", nargs="?", default="*", metavar="GLOB")
    add(command_skip).add_argument("glob", metavar="GLOB")
    pause = add(command_pause)
    pause.add_argument("--for", dest="seconds", type=span, metavar="2h", help="or 90s, 30m, 1d; else until resumed")
    add(command_resume)
    add(command_adopt)
    add(command_step_down)
    parser.set_defaults(command="run", function=command_run, once=False, dry_run=False)
    options = parser.parse_args(arguments)
    # No default of the parser: it would go over what stands before the command.
    vars(options).setdefault("config", "env")
    return options


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Gives the exit code: 0 done, 1 failed, 2 wrong usage or settings."""
    options, configs = parse_arguments(arguments), []
    if isinstance(sys.stdout, io.TextIOWrapper):  # for names that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if options.command != "schema" or options.apply:
            env = options.config == "env"
            configs = [Config.from_env(os.environ)] if env else Config.from_file(options.config)
        code = cast(int, options.function(configs, options))
        if options.command != "run" or options.dry_run:
            sys.stdout.flush()
        return code
    except Error as exc:  # DatabaseRefused: with the statements that are to be run, a line each
        lines = str(exc).split("\n") if isinstance(exc, DatabaseRefused) else [" ".join(str(exc).split())]
        say("ftpcoord: " + "\n".join(map(printable, lines)))
        return 2 if isinstance(exc, ConfigError) else 1
    except OSError as exc:
        sys.stdout = io.StringIO()  # else what is left is tried again at exit
        if not isinstance(exc, BrokenPipeError):
            say(f"ftpcoord: {exc.filename or 'standard output'}: {reason(exc)}")
        return 1
    except KeyboardInterrupt:
        return 1


def program() -> None:
    """The process of a command; does not return, whatever hangs: others wait for its end."""
    of_glibc("mallopt", -8, 1)  # M_ARENA_MAX
    if os.name == "posix":  # whatever the parent ignored or blocked
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
    gc.freeze()
    # Closed ones: their numbers must not become those of sockets.
    sys.stdout, sys.stderr = (
        stream or io.TextIOWrapper(io.FileIO(os.devnull, "w")) for stream in (sys.stdout, sys.stderr)
    )
    code = main()
    until = time.monotonic() + LAST_WORDS
    for box, stream in ((log, sys.stdout), (said, sys.stderr)):
        box.always = True  # a stream may block, or be gone
        box.put(stream.flush)
        box.flush(max(0.0, until - time.monotonic()))
    os._exit(code)


# For `python -c`: modules are found where a script's are, never in the working folder; what ran once is let go.
ONCE_MORE = """
import importlib.machinery, pathlib, sys, types
if sys.path[0] == "": sys.path[0] = sys.argv[1].rpartition("/")[0] or "/"
del sys.argv[0]
ftpcoord = sys.modules["ftpcoord"] = types.ModuleType("ftpcoord")
ftpcoord.__file__, ftpcoord.__spec__ = sys.argv[0], importlib.machinery.ModuleSpec("ftpcoord", None)
exec(compile(pathlib.Path(sys.argv[0]).read_bytes(), sys.argv[0], "exec"), vars(ftpcoord))
vars(sys.modules["__main__"]).update(vars(ftpcoord), __name__="__main__", __spec__=None)
ftpcoord.program()
"""


def start_small() -> None:
    """Starts a service again, in its process, if its command line is plain: Python keeps what compiling a script
    took, 26 MiB, until that ends."""
    words = list(getattr(sys, "orig_argv", ()))
    flags, rest = words[1 : -len(sys.argv)], words[-len(sys.argv) :]
    options = parse_arguments(None)
    service = options.command == "run" and not (options.once or options.dry_run)
    if os.name == "posix" and rest == sys.argv and service and all(re.match(r"-[a-zA-Z]", flag) for flag in flags):
        with contextlib.suppress(OSError):
            os.execv(sys.executable, [words[0], *flags, "-c", ONCE_MORE, os.path.realpath(__file__), *rest[1:]])


if __name__ == "__main__":
    sys.modules["ftpcoord"] = sys.modules["__main__"]  # what a handler imports is this, not another one
    start_small()
    program()
