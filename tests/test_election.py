"""Timing, lease, clock watch and election with a fake clock and a database in memory: no threads, no waiting."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ftpcoord
from ftpcoord import (
    ClockWatch,
    ConfigError,
    DatabaseBusy,
    DatabaseDown,
    DatabaseRefused,
    Election,
    Lease,
    LeaseLost,
    MemberRow,
    Renewal,
    Timing,
    View,
)

# -- timing -----------------------------------------------------------------------------------------------------------


def test_a_heartbeat_is_stale_two_heartbeats_before_the_liveness_interval_ends() -> None:
    timing = Timing(1, 30)
    assert timing.stale_after == timing.still_after == 28
    assert timing.margin == pytest.approx(3.0)
    assert timing.call_timeout == 5.0
    assert timing.lock_timeout == 1.0


def test_a_column_of_whole_seconds_costs_a_second_of_the_window_and_hides_two_of_standing_still() -> None:
    timing = Timing(1, 30, whole_seconds=True)
    assert timing.stale_after == 27
    assert timing.still_after == 29


def test_on_a_column_of_whole_seconds_the_window_must_be_a_whole_number() -> None:
    Timing(0.5, 30, whole_seconds=True)
    Timing(0.25, 30)
    with pytest.raises(ConfigError, match=r"must be a whole number, not 29\.5 s"):
        Timing(0.25, 30, whole_seconds=True)


def test_an_error_in_the_intervals_is_a_sentence_that_names_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"^liveness_check_interval: must be at least five times heartbeat_frequency"):
        Timing(1, 4.9)
    with pytest.raises(ConfigError, match=r"^liveness_check_interval: 5 s leaves no time for two failed renewals"):
        Timing(1, 5, least_timeout=1.2)


intervals = st.floats(0.01, 1000, allow_nan=False)


@given(intervals, st.floats(0.1, 10_000), st.sampled_from([0.1, 0.25, 1.2]), st.booleans())
def test_accepted_intervals_leave_time_for_two_failed_renewals(h: float, l: float, least: float, whole: bool) -> None:  # noqa: E741
    try:
        timing = Timing(h, l, least, whole)
    except ConfigError as exc:
        assert str(exc).startswith("liveness_check_interval: ")
        return
    assert h + 2 * timing.call_timeout + timing.margin <= timing.stale_after
    assert least <= timing.call_timeout <= 5
    assert 0 < timing.lock_timeout < timing.call_timeout
    assert timing.stale_after + 2 * h <= l + 1e-6, "crash to takeover within the liveness interval"
    assert timing.margin >= timing.stale_after / 10, "clock rates may differ by a tenth"
    lease = timing.stale_after - timing.margin
    assert timing.grace > 0.1 and (lease + timing.grace) * 1.1 <= timing.stale_after * (1 + 1e-9)


# -- lease ------------------------------------------------------------------------------------------------------------


def test_a_lease_is_valid_before_its_deadline_and_not_at_it() -> None:
    lease = Lease(7, 100.0, lambda: 0.0)
    assert lease.valid(99.999)
    assert not lease.valid(100.0)
    assert lease.remaining(90.0) == 10.0
    assert lease.remaining(101.0) == -1.0


def test_a_lease_reads_its_own_clock_when_asked_without_a_time() -> None:
    now = [99.0]
    lease = Lease(7, 100.0, lambda: now[0])
    lease.check()
    now[0] = 100.0
    assert not lease.valid()
    with pytest.raises(LeaseLost, match="term 7") as caught:
        lease.check()
    assert caught.value.term == 7


def test_a_lease_that_is_lost_while_a_renewal_is_answered_stays_lost() -> None:
    """Its work has been cut by then."""

    def clock() -> float:
        lease.lose()
        return 99.0

    lease = Lease(1, 100.0, clock)
    lease.extend(110.0)
    assert not lease.valid(99.0) and lease.remaining(99.0) == float("-inf")


def test_a_renewal_never_shortens_a_lease() -> None:
    lease = Lease(1, 100.0, lambda: 0.0)
    lease.extend(90.0)
    assert lease.remaining(0) == 100.0
    lease.extend(110.0)
    assert lease.remaining(0) == 110.0


def test_an_ended_lease_is_not_revived_by_a_renewal_under_way() -> None:
    lease = Lease(1, 100.0, lambda: 0.0)
    lease.lose()
    lease.extend(1000.0)
    assert not lease.valid(0.0)


def test_the_clock_of_leases_counts_suspended_time_where_the_system_can() -> None:
    a, b = ftpcoord.boot_clock(), ftpcoord.boot_clock()
    assert a <= b
    if hasattr(time, "CLOCK_BOOTTIME"):
        assert abs(time.clock_gettime(time.CLOCK_BOOTTIME) - b) < 5


@pytest.mark.parametrize(
    ("platform", "clocks", "expected"),
    [
        ("linux", {"CLOCK_BOOTTIME": 7, "CLOCK_MONOTONIC_RAW": 4}, 7.0),
        ("darwin", {"CLOCK_MONOTONIC_RAW": 4}, 4.0),
        ("linux", {"CLOCK_MONOTONIC_RAW": 4}, 99.0),  # stops in suspend like the other one
        ("win32", {}, 99.0),
    ],
)
def test_the_clock_of_leases_is_the_one_that_counts_sleep_where_the_system_has_one(
    monkeypatch: pytest.MonkeyPatch, platform: str, clocks: dict[str, int], expected: float
) -> None:
    class Time:
        monotonic = staticmethod(lambda: 99.0)
        clock_gettime = staticmethod(float)

    for name, number in clocks.items():
        setattr(Time, name, number)
    with monkeypatch.context() as patch:
        patch.setattr(ftpcoord, "time", Time)
        patch.setattr(sys, "platform", platform)
        found = ftpcoord.boot_clock()
    assert found == expected


# -- clock watch ------------------------------------------------------------------------------------------------------


def look_at(now: float, took: float = 0.01) -> View:
    return View("h", 1, False, "s", 0.0, now, took)


def test_one_look_proves_nothing_about_a_clock() -> None:
    watch = ClockWatch(tolerance=1.5, distrust=28)
    assert not watch.trusts(100.0, look_at(5000.0))
    assert watch.trusts(101.0, look_at(5001.0))


@pytest.mark.parametrize("step", [2.0, 3600.0, -2.0, -3600.0])
def test_a_step_of_the_databases_clock_makes_ages_worthless_for_as_long_as_a_lease_can_last(step: float) -> None:
    watch = ClockWatch(tolerance=1.5, distrust=28)
    for second in range(3):
        watch.trusts(100.0 + second, look_at(5000.0 + second))
    assert not watch.trusts(103.0, look_at(5003.0 + step))
    for second in range(4, 31):
        assert not watch.trusts(100.0 + second, look_at(5000.0 + second + step)), second
    assert watch.trusts(131.1, look_at(5031.1 + step))


def test_looks_too_slow_to_tell_a_step_are_not_trusted() -> None:
    watch = ClockWatch(tolerance=1.5, distrust=28)
    watch.trusts(100.0, look_at(5000.0))
    assert watch.trusts(101.0, look_at(5001.5, took=1.0))
    assert not watch.trusts(103.0, look_at(5003.0, took=2.0)), "the step may be anywhere within the two seconds"


def test_a_clock_that_is_a_little_fast_is_trusted() -> None:
    watch = ClockWatch(tolerance=1.5, distrust=28)
    watch.trusts(0.0, look_at(5000.0))
    assert all(watch.trusts(second, look_at(5000.0 + second * 1.05)) for second in range(1, 1000))


# -- election: the world ----------------------------------------------------------------------------------------------


class Clock:
    """The present time of everything but the database, whose clock may be off by `step`."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.step = 0.0

    def __call__(self) -> float:
        return self.now


class MemoryStore:
    """The two tables of one group in memory, with the semantics of ftpcoord.Store and with faults on request."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.holder: Optional[str] = None
        self.term = 0
        self.stamps: dict[str, float] = {}
        self.requested: set[int] = set()
        self.ledger_term = 0
        self.latency = 0.0  # seconds that each call takes; half of them before its effect
        self.calls: list[str] = []
        self.before: dict[str, Exception] = {}  # verb -> error instead of an effect
        self.after: dict[str, Exception] = {}  # verb -> error after the effect: the answer was lost
        self.arguments: dict[str, tuple[Any, ...]] = {}
        self.released: set[str] = set()

    def _call(self, verb: str, effect: Callable[[], Any], *arguments: Any) -> Any:
        self.calls.append(verb)
        self.arguments[verb] = arguments
        self.clock.now += self.latency / 2
        for key in (verb, "*"):
            if key in self.before:
                self.clock.now += self.latency / 2
                raise self.before[key]
        result = effect()
        self.clock.now += self.latency / 2
        if verb in self.after:
            raise self.after[verb]
        return result

    @property
    def now(self) -> float:
        return self.clock.now + self.clock.step

    def look(self, group: str, member: str) -> View:
        sent = self.clock.now
        view: View = self._call("look", lambda: self._look(member))
        return view._replace(took=self.clock.now - sent)

    def _look(self, member: str) -> View:
        if member != self.holder:
            self.stamps[member] = max(self.stamps.get(member, 0.0), self.now)
            self.released.discard(member)
        stamp = None if self.holder is None else self.stamps.get(self.holder)
        age = None if stamp is None else 1e9 if self.holder in self.released else self.now - stamp
        shown = None if stamp is None else self._shown(self.holder)
        term = 0 if self.holder is None else self.term
        return View(self.holder, term, self.holder == member, shown, age, self.now, 0.0, self.holder in self.released)

    def _shown(self, member: Optional[str]) -> str:
        return "released" if member in self.released else repr(self.stamps[str(member)])

    def members(self, group: str) -> list[MemberRow]:
        def effect() -> list[MemberRow]:
            return [
                MemberRow(m, 1e9 if m in self.released else self.now - stamp, m in self.released, self._shown(m))
                for m, stamp in self.stamps.items()
            ]

        rows: list[MemberRow] = self._call("members", effect)
        return rows

    def first(self, group: str, member: str, term: int, timed: bool = False) -> Optional[int]:
        def effect() -> Optional[int]:
            least = int(self.now) + 1 if timed else term
            return self._win(member, max(term, least)) if self.holder is None else None

        won: Optional[int] = self._call("first", effect, term)
        return won

    def take(self, group: str, member: str, seen: View, stale_after: float, why: str) -> Optional[int]:
        def effect() -> Optional[int]:
            if (self.holder, self.term) != (seen.holder, seen.term):
                return None
            stamp = self.stamps.get(str(self.holder))
            same = stamp is not None and self._shown(self.holder) == seen.stamp
            free = {
                "own": True,
                "absent": stamp is None,
                "still": same,
                "released": same,
                "stale": same and stamp is not None and stamp < self.now - stale_after,
            }
            return self._win(member, self.term + 1) if free[why] else None

        won: Optional[int] = self._call("take", effect, why)
        return won

    def _win(self, member: str, term: int) -> int:
        self.holder, self.term, self.stamps[member] = member, term, self.now
        self.released.discard(member)
        return term

    def renew(self, group: str, member: str, term: int) -> Renewal:
        def effect() -> Renewal:
            if (self.holder, self.term) != (member, term) or member not in self.stamps:
                return Renewal(False)
            self.stamps[member] = self.stamps[member] + 0.001 if self.stamps[member] > self.now else self.now
            return Renewal(True, term in self.requested)

        renewal: Renewal = self._call("renew", effect, term)
        return renewal

    def release(self, group: str, member: str, term: int) -> None:
        def effect() -> None:
            if (self.holder, self.term) == (member, term) and member in self.stamps:
                self.released.add(member)

        self._call("release", effect, term)

    def leave(self, group: str, member: str) -> None:
        def effect() -> None:
            if self.holder not in (None, member):
                self.stamps.pop(member, None)

        self._call("leave", effect)

    def sweep(self, group: str, member: str) -> None:
        self._call("sweep", lambda: None)

    def last_term(self, group: str) -> int:
        term: int = self._call("last_term", lambda: self.ledger_term)
        return term


DOWN = DatabaseDown("the database is away")
TIMING = Timing(1, 30)  # S = 28, m = 3, T = 5: a lease lasts 25 s
LEASE = TIMING.stale_after - TIMING.margin


class Site:
    """One member, ticked when it is due."""

    def __init__(self, store: MemoryStore, member: str = "a", timing: Timing = TIMING) -> None:
        self.store, self.clock, self.member = store, store.clock, member
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.election = Election(
            store,
            "g",
            member,
            timing,
            self.clock,
            lambda what, **fields: self.told.append((what, fields)),
            lambda: self.chance,
        )
        self.due = self.chance = 0.0
        self.alive = self.willing = True

    @property
    def lease(self) -> Optional[Lease]:
        return self.election.lease

    @property
    def active(self) -> bool:
        return self.lease is not None and self.lease.valid()

    @property
    def term(self) -> int:
        assert self.lease is not None
        return self.lease.term

    @property
    def events(self) -> list[str]:
        return [what for what, _ in self.told]

    def tick(self) -> float:
        wait = self.election.tick(self.clock.now, self.willing)
        self.due = self.clock.now + wait
        return wait


def run(seconds: float, *sites: Site, until: Optional[Callable[[], bool]] = None) -> float:
    """Lets time go by and ticks who is due; gives the seconds that went by. Two leases at once fail the test."""
    clock = sites[0].clock
    begin = clock.now
    while clock.now < begin + seconds:
        for site in sites:
            if site.alive and clock.now >= site.due:
                site.tick()
            assert sum(each.active for each in sites) <= 1, "two leases are valid at once"
        if until is not None and until():
            break
        clock.now = round(clock.now + 0.1, 6)
    return clock.now - begin


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(Clock())


def elected(store: MemoryStore, member: str = "a") -> Site:
    """A member that has just won a vacant group."""
    site = Site(store, member)
    site.tick()
    assert site.active
    return site


def watching(store: MemoryStore, member: str = "b") -> Site:
    """A standby that has looked long enough to trust the database's clock."""
    site = Site(store, member)
    site.tick()
    store.clock.now += 1
    site.tick()
    return site


# -- election: winning ------------------------------------------------------------------------------------------------


def test_a_vacant_group_is_won_at_the_first_tick(store: MemoryStore) -> None:
    site = Site(store)
    assert site.tick() == TIMING.heartbeat
    assert site.active
    assert site.term == store.term == 1
    assert site.told == [("elected", {"term": 1, "reason": "vacant", "before": None})]


def test_a_first_term_is_higher_than_any_that_the_ledger_knows(store: MemoryStore) -> None:
    store.ledger_term = 5000
    assert elected(store).term == 5001


def test_where_the_ledger_is_left_the_first_term_is_at_least_the_databases_time(store: MemoryStore) -> None:
    """Terms above the ledger's may have been won since; none of them is won again."""
    store.ledger_term = 41
    assert elected(store).term > store.now - 1


def test_the_deadline_counts_from_before_the_statement_was_sent(store: MemoryStore) -> None:
    store.latency = 1.0
    sent = store.clock.now
    site = elected(store)
    assert site.lease is not None
    assert site.lease.remaining(sent) == pytest.approx(LEASE)
    store.clock.now += 5
    sent = store.clock.now
    site.tick()
    assert site.lease.remaining(sent) == pytest.approx(LEASE), "a slow renewal must not extend it further"


def test_a_standby_waits_while_the_holder_is_alive(store: MemoryStore) -> None:
    a, b = elected(store), Site(store, "b")
    run(120, a, b)
    assert a.active
    assert not b.active
    assert "take" not in store.calls
    assert b.events == []


def test_a_standby_beats_a_little_early_by_chance_so_that_members_do_not_march_in_step(store: MemoryStore) -> None:
    elected(store)
    b = Site(store, "b")
    assert b.tick() == 1.0
    b.chance = 1.0
    assert b.tick() == pytest.approx(0.9)


def test_a_dead_holder_is_replaced_within_the_liveness_interval(store: MemoryStore) -> None:
    a, b = elected(store), watching(store)
    run(10, a, b)
    a.alive = False
    assert run(60, a, b, until=lambda: b.active) <= TIMING.liveness
    assert b.term == 2
    (told,) = b.told
    assert told[0] == "elected"
    assert told[1] in ({"term": 2, "reason": why, "before": "a"} for why in ("stale", "still"))


def test_a_holder_is_not_replaced_before_its_lease_has_run_out_by_more_than_the_margin(store: MemoryStore) -> None:
    a, b = elected(store), watching(store)
    run(10, a, b)
    lease = a.lease
    a.alive = False
    run(60, a, b, until=lambda: b.active)
    assert lease is not None
    assert lease.remaining() < -TIMING.margin + TIMING.heartbeat


def test_members_take_over_from_each_other_and_back(store: MemoryStore) -> None:
    """The reference implementation never let the first holder win again."""
    a, b = elected(store), watching(store)
    for term, (dies, takes) in enumerate([(a, b), (b, a), (a, b), (b, a)], 2):
        run(5, a, b)
        dies.alive = False
        assert run(60, a, b, until=lambda takes=takes: takes.active) <= TIMING.liveness  # type: ignore[misc]
        assert takes.term == term
        dies.alive = True
        run(5, a, b)
        assert not dies.active


def test_of_many_standbys_one_takes_over(store: MemoryStore) -> None:
    a = elected(store)
    others = [watching(store, name) for name in "bcdef"]
    a.alive = False
    run(60, a, *others)
    assert sum(site.active for site in others) == 1
    assert store.term == 2


def test_an_unwilling_member_watches_but_does_not_take(store: MemoryStore) -> None:
    a, b = elected(store), watching(store)
    a.alive = b.willing = False
    run(60, a, b)
    assert not b.active
    assert "take" not in store.calls
    b.willing = True
    b.tick()
    assert b.active, "it watched the clocks meanwhile"


def test_an_unwilling_member_does_not_take_a_vacant_group(store: MemoryStore) -> None:
    site = Site(store)
    site.willing = False
    run(5, site)
    assert not site.active
    assert store.holder is None


def test_a_lost_race_is_no_lease(store: MemoryStore) -> None:
    a, b, c = elected(store), watching(store, "b"), watching(store, "c")
    a.alive, c.willing = False, False
    for _ in range(40):
        store.clock.now += 1
        c.tick()
    b.tick()
    assert b.active
    c.willing = True
    assert store.take("g", "c", View("a", 1, False, "x", 40.0, store.now, 0.0), 28, "stale") is None
    c.tick()
    assert not c.active


# -- election: holding ------------------------------------------------------------------------------------------------


def test_every_renewal_extends_the_lease(store: MemoryStore) -> None:
    site = elected(store)
    for _ in range(100):
        store.clock.now += 1
        assert site.tick() == 1.0
        assert site.lease is not None
        assert site.lease.remaining() == pytest.approx(LEASE)
    assert site.term == 1
    assert site.events == ["elected"]


def test_a_lease_ends_at_its_deadline_without_asking_the_database(store: MemoryStore) -> None:
    site = elected(store)
    lease = site.lease
    store.clock.now += LEASE
    assert lease is not None
    assert not lease.valid()
    store.calls.clear()
    store.before["*"] = DOWN
    site.tick()
    assert site.lease is None
    assert "renew" not in store.calls
    assert site.told[1] == ("lost", {"term": 1, "reason": "deadline passed"})


def test_a_member_that_slept_through_its_deadline_is_not_saved_by_a_token_that_is_still_its_own(
    store: MemoryStore,
) -> None:
    site = elected(store)
    lease = site.lease
    store.clock.now += 3600
    site.tick()
    assert lease is not None
    assert not lease.valid(), "the old lease stays over"
    assert site.events[:2] == ["elected", "lost"]
    assert site.term == 2, "a new lease has a new term"


def test_a_renewal_that_does_not_hold_ends_the_lease_at_once(store: MemoryStore) -> None:
    site = elected(store)
    lease = site.lease
    store.holder, store.term, store.stamps["b"] = "b", 2, store.now
    store.clock.now += 1
    site.tick()
    assert site.lease is None
    assert lease is not None
    assert not lease.valid()
    assert site.told[-1] == ("lost", {"term": 1, "reason": "the token went to another member"})


def test_a_token_under_the_own_id_but_another_term_is_not_held(store: MemoryStore) -> None:
    site = elected(store)
    store.term = 2
    store.clock.now += 1
    site.tick()
    assert site.lease is None


@pytest.mark.parametrize("error", [DOWN, DatabaseBusy("a row is locked")])
@pytest.mark.parametrize("answer", ["before", "after"])
def test_an_unknown_outcome_does_not_extend_the_lease(store: MemoryStore, answer: str, error: Exception) -> None:
    site = elected(store)
    lease = site.lease
    assert lease is not None
    deadline = store.clock.now + lease.remaining()
    getattr(store, answer)["renew"] = error
    for _ in range(1000):
        if not lease.valid():
            break
        assert site.lease is lease
        store.clock.now = min(site.due, deadline) if site.due > store.clock.now else store.clock.now + 0.5
        site.tick()
    assert store.clock.now == pytest.approx(deadline)
    assert site.lease is not lease
    assert "lost" in site.events


def test_failed_renewals_are_tried_again_after_half_of_what_is_left(store: MemoryStore) -> None:
    site = elected(store)
    store.before["renew"] = DOWN
    store.clock.now += LEASE - 1.0
    assert site.tick() == pytest.approx(0.5)
    store.clock.now += 0.5
    assert site.tick() == pytest.approx(0.25)
    store.clock.now += 0.25
    del store.before["renew"]
    assert site.tick() == 1.0
    assert site.active, "the last try still fitted"
    assert site.term == 1


def test_a_failed_renewal_early_in_the_lease_is_tried_again_after_a_heartbeat(store: MemoryStore) -> None:
    site = elected(store)
    store.before["renew"] = DOWN
    store.clock.now += 1
    assert site.tick() == TIMING.heartbeat


def test_a_request_to_step_down_is_seen_in_a_renewal_and_forgotten_with_the_lease(store: MemoryStore) -> None:
    site = elected(store)
    store.requested.add(1)
    assert not site.election.step_down_asked
    store.clock.now += 1
    site.tick()
    assert site.election.step_down_asked
    assert site.active, "stepping down is the owner's business: work has to stop first"
    site.election.release(store.clock.now)
    assert not site.election.step_down_asked
    run(10, site, until=lambda: site.active)
    assert site.term == 2
    run(3, site)
    assert not site.election.step_down_asked


def test_a_request_to_step_down_is_forgotten_when_the_lease_is_lost(store: MemoryStore) -> None:
    site = elected(store)
    store.requested.add(1)
    store.clock.now += 1
    site.tick()
    store.holder, store.term = "b", 2
    site.tick()
    assert site.lease is None
    assert not site.election.step_down_asked


def test_old_health_rows_are_swept_when_elected_and_every_hour(store: MemoryStore) -> None:
    site = elected(store)
    run(3600, site)
    assert store.calls.count("sweep") == 1
    run(10, site)
    assert store.calls.count("sweep") == 2


def test_a_refused_login_is_passed_on_and_does_not_end_the_lease_early(store: MemoryStore) -> None:
    site = elected(store)
    store.before["renew"] = DatabaseRefused("the password was refused")
    store.clock.now += 1
    with pytest.raises(DatabaseRefused):
        site.tick()
    assert site.active
    store.clock.now += LEASE
    assert not site.active


# -- election: outages ------------------------------------------------------------------------------------------------


def test_an_outage_is_known_from_its_begin_to_its_end(store: MemoryStore) -> None:
    site = elected(store)
    store.before["*"] = DOWN
    run(60, site)
    assert site.events == ["elected", "lost"]
    assert site.election.database_error is DOWN
    del store.before["*"]
    run(5, site)
    assert site.events == ["elected", "lost", "elected"]
    assert site.election.database_error is None


def test_after_an_outage_the_former_holder_takes_again_with_a_new_term(store: MemoryStore) -> None:
    a, b = elected(store), watching(store)
    store.before["*"] = DOWN
    run(120, a, b)
    assert not a.active
    del store.before["*"]
    a.due = store.clock.now + 0.9  # the standby is back first
    run(60, a, b)
    assert a.active
    assert a.term == 2
    assert a.told[-1] == ("elected", {"term": 2, "reason": "own", "before": "a"})
    assert "elected" not in b.events


def test_after_an_outage_a_standby_takes_from_a_dead_holder_after_two_heartbeats_and_a_call(store: MemoryStore) -> None:
    a, b = elected(store), watching(store)
    a.alive = False
    store.before["*"] = DOWN
    run(120, a, b)
    del store.before["*"]
    wait = 2 * TIMING.heartbeat + TIMING.call_timeout
    took = run(60, a, b, until=lambda: b.active)
    assert wait <= took <= wait + 2.5 * TIMING.heartbeat


@pytest.mark.parametrize("ends", ["released", "dead"])
def test_a_database_that_fails_at_every_third_look_keeps_nobody_from_taking_over(store: MemoryStore, ends: str) -> None:
    a, b = elected(store), watching(store)
    run(10, a, b)
    a.alive = False
    if ends == "released":
        a.election.release(store.clock.now)
    began, looks = store.clock.now, 0
    while not b.active and store.clock.now < began + 120:
        looks += 1
        if looks % 3 == 0:
            store.before["*"] = DOWN
        b.tick()
        store.before.clear()
        store.clock.now += 1
    assert b.active and store.clock.now - began <= (4 if ends == "released" else TIMING.liveness + 2)


def test_a_short_outage_within_the_lease_changes_nothing(store: MemoryStore) -> None:
    a, b = elected(store), watching(store)
    run(3, a, b)
    store.before["*"] = DOWN
    run(15, a, b)
    assert a.active
    del store.before["*"]
    run(60, a, b)
    assert a.active
    assert a.term == 1


def test_a_takeover_whose_answer_was_lost_is_no_lease_until_it_is_stale(store: MemoryStore) -> None:
    a, b = elected(store), watching(store)
    a.alive = False
    store.after["take"] = DOWN
    run(60, a, b, until=lambda: store.holder == "b")
    assert store.term == 2
    assert not b.active
    del store.after["take"]
    began = store.clock.now
    run(60, a, b, until=lambda: b.active)
    assert b.term == 3
    assert store.clock.now - began >= TIMING.stale_after, "it cannot know that the term was its own"


def test_a_standby_cut_off_alone_does_not_disturb_the_holder(store: MemoryStore) -> None:
    a, b = elected(store), watching(store)
    store.before["look"] = DOWN
    run(60, a, b)
    assert b.election.database_error is not None
    del store.before["look"]
    run(60, a, b)
    assert a.active
    assert a.term == 1
    assert b.election.database_error is None


# -- election: ids ----------------------------------------------------------------------------------------------------


def test_a_second_member_of_the_same_id_waits_and_says_so_once(store: MemoryStore) -> None:
    a, twin = elected(store), Site(store, "a")
    run(60, a, twin)
    assert a.active
    assert twin.events == ["duplicate_member"]
    assert "duplicate member id or previous run" in twin.told[0][1]["hint"]


def test_a_restarted_member_waits_until_its_previous_run_is_stale(store: MemoryStore) -> None:
    a = elected(store)
    run(5, a)
    a.alive = False
    restarted = Site(store, "a")
    died = store.clock.now
    run(60, a, restarted, until=lambda: restarted.active)
    assert TIMING.stale_after - TIMING.heartbeat <= store.clock.now - died <= TIMING.liveness
    assert restarted.term == 2
    assert restarted.events == ["duplicate_member", "elected"]


def test_a_restarted_member_does_not_call_its_own_released_token_a_duplicate(store: MemoryStore) -> None:
    a = elected(store)
    a.election.release(store.clock.now)
    restarted = Site(store, "a")
    restarted.tick()
    assert restarted.active
    assert restarted.told == [("elected", {"term": 2, "reason": "released", "before": "a"})]


def test_a_twin_that_took_the_token_ends_the_lease_of_the_other(store: MemoryStore) -> None:
    a, twin = elected(store), Site(store, "a")
    twin.tick()
    store.clock.now += 1
    twin.tick()
    store.clock.now += 30  # a hangs
    twin.tick()
    assert twin.active
    assert twin.term == 2
    assert not a.active
    a.tick()
    assert not a.active
    assert a.events == ["elected", "lost", "duplicate_member"]


def test_the_own_term_is_taken_again_at_once_but_not_another_one_under_the_own_id(store: MemoryStore) -> None:
    site = elected(store)
    store.clock.now += LEASE
    site.tick()
    assert site.term == 2
    assert store.arguments["take"] == ("own",)
    store.term, store.stamps["a"] = 9, store.now  # somebody else's, under the same id
    store.clock.now += LEASE - 1
    site.tick()
    assert site.lease is None
    site.tick()
    assert site.lease is None


# -- election: vacant, absent, still ----------------------------------------------------------------------------------


def test_a_token_row_that_vanished_is_not_claimed_before_a_lease_can_have_ended(store: MemoryStore) -> None:
    a, b = elected(store), watching(store)
    lease = a.lease
    a.alive = False  # cut off: it does not notice
    store.holder, store.term = None, 0
    vanished = store.clock.now
    run(60, a, b, until=lambda: b.active)
    assert store.clock.now - vanished >= TIMING.stale_after
    assert lease is not None
    assert not lease.valid()
    assert b.term > vanished, "terms do not restart"


def test_a_term_that_this_process_won_is_not_won_again_after_the_token_row_vanished(store: MemoryStore) -> None:
    site = elected(store)
    store.holder, store.term = None, 0
    vanished = store.clock.now
    run(60, site, until=lambda: site.active and site.term > 1)
    assert site.term > vanished
    assert store.clock.now - vanished >= TIMING.stale_after


@pytest.mark.parametrize("name", ["b", "a"])
def test_a_member_that_starts_after_the_token_row_vanished_waits_for_the_lease_that_may_be_left(
    store: MemoryStore, name: str
) -> None:
    a = elected(store)
    run(5, a)
    lease = a.lease
    assert lease is not None
    a.alive = False  # stopped: it does not notice
    store.holder, store.term = None, 0
    late = Site(store, name)
    run(60, a, late, until=lambda: late.active)
    assert not lease.valid()
    assert late.term > store.now - 60, "no term is won twice"
    a.alive = True
    run(60, a, late)
    assert late.active


@pytest.mark.parametrize("name", ["b", "a"])
def test_a_process_that_starts_after_a_forward_step_and_without_a_token_waits_for_a_living_holder_to_notice(
    store: MemoryStore, name: str
) -> None:
    a = elected(store)
    lease = a.lease
    assert lease is not None
    store.holder, store.term = None, 0
    store.clock.step = 3600
    late = Site(store, name)
    run(60, late, a, until=lambda: late.active or not lease.valid())
    assert not late.active


def test_rows_that_only_standbys_can_have_written_do_not_delay_a_fresh_group(store: MemoryStore) -> None:
    """All begin at once: each finds what those before it left, but the first one nothing."""
    sites = [Site(store, name) for name in "abcd"]
    beat = store.look

    def late(group: str, member: str) -> View:
        """The first of them is slow: the others have begun before its own first look."""
        store.look = beat  # type: ignore[method-assign]
        for site in sites[1:]:
            site.willing = False
            site.tick()
            site.willing = True
        return beat(group, member)

    store.look = late  # type: ignore[method-assign]
    sites[0].tick()
    assert store.holder is None
    assert run(60, *sites, until=lambda: any(site.active for site in sites)) <= 2 * TIMING.heartbeat


@pytest.mark.parametrize("left", ["stale", "released"])
def test_rows_of_members_long_gone_do_not_delay_a_group_whose_token_row_was_deleted(
    store: MemoryStore, left: str
) -> None:
    store.stamps["a"] = store.now - 100
    store.released = {"a"} if left == "released" else set()
    site = Site(store, "b")
    trusted = TIMING.call_timeout if left == "stale" else 0  # no age before a living holder would have renewed it
    assert run(60, site, until=lambda: site.active) <= 2 * TIMING.heartbeat + trusted
    assert site.term >= int(store.now) - 2


def test_a_member_that_slept_while_the_token_was_missing_knows_nothing_of_who_won_it_since(store: MemoryStore) -> None:
    store.stamps["old"] = store.now - 1  # a trace: nobody claims at once
    b = Site(store, "b")
    b.tick()
    assert not b.active
    store.clock.now += TIMING.stale_after + 1  # it is stopped; its row goes stale
    a = Site(store, "a")
    run(60, a, until=lambda: a.active)
    store.holder = None  # somebody removes the row once more
    b.due = 0.0
    run(TIMING.stale_after - TIMING.margin, b, a)
    assert not b.active


def test_a_health_row_that_vanished_with_the_token_row_is_waited_for(store: MemoryStore) -> None:
    a, late = elected(store), Site(store, "b")
    lease = a.lease
    a.alive = False
    store.holder, store.term = None, 0
    late.tick()
    del store.stamps["a"]
    run(60, a, late, until=lambda: late.active)
    assert lease is not None
    assert not lease.valid()


def test_the_first_term_lies_above_the_time_of_every_heartbeat_that_is_left(store: MemoryStore) -> None:
    """The clock was set back after terms had been taken from it."""
    store.stamps["x"] = store.now + 7200
    site = Site(store)
    run(60, site, until=lambda: site.active)
    assert site.term >= store.stamps["x"]


def test_the_first_term_is_timed_when_it_is_claimed_not_when_the_token_was_seen_missing(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is stopped in between, so long that another one can win a term and lose its token row."""
    store.stamps["x"] = store.now
    pause = 100.0

    def last_term(group: str) -> int:
        store.clock.now += pause
        return 0

    monkeypatch.setattr(store, "last_term", last_term)
    site = Site(store)
    run(600, site, until=lambda: "first" in store.calls)
    assert store.term > store.now - 1


def test_standing_still_is_counted_from_the_end_of_a_slow_look(store: MemoryStore) -> None:
    elected(store)
    store.stamps["a"] = store.now + 86400
    b = Site(store, "b")
    store.latency = 4.0
    b.tick()
    store.latency = 0.0
    seen = store.clock.now
    store.clock.now = seen + TIMING.stale_after - 0.5
    b.tick()
    assert not b.active, "the stamp may be as young as the end of that look"
    store.clock.now = seen + TIMING.stale_after
    b.tick()
    assert b.active


def test_a_holder_without_health_row_is_replaced_after_s_by_the_observers_own_clock(store: MemoryStore) -> None:
    a, b = elected(store), watching(store)
    a.alive = False
    del store.stamps["a"]
    vanished = store.clock.now
    run(60, a, b, until=lambda: b.active)
    assert store.clock.now - vanished >= TIMING.stale_after
    assert b.told[-1][1]["reason"] == "absent"


def test_a_holder_whose_row_came_back_is_left_alone(store: MemoryStore) -> None:
    a, b = elected(store), watching(store)
    a.alive = False
    del store.stamps["a"]
    run(20, a, b)
    store.stamps["a"] = store.now
    run(20, a, b)
    assert not b.active


def test_a_dead_holder_whose_stamp_lies_in_the_future_is_replaced_after_s(store: MemoryStore) -> None:
    a, b = elected(store), watching(store)
    a.alive = False
    store.stamps["a"] = store.now + 86400
    began = store.clock.now
    run(60, a, b, until=lambda: b.active)
    assert TIMING.stale_after <= store.clock.now - began <= TIMING.liveness
    assert b.told[-1][1]["reason"] == "still"


def test_a_living_holder_whose_stamp_lies_in_the_future_keeps_the_token(store: MemoryStore) -> None:
    a, b = elected(store), watching(store)
    store.stamps["a"] = store.now + 86400
    run(120, a, b)
    assert a.active
    assert a.term == 1


def test_a_column_of_whole_seconds_hides_moves_for_two_seconds_longer(store: MemoryStore) -> None:
    timing = Timing(1, 30, whole_seconds=True)
    elected(store)
    b = Site(store, "b", timing)
    b.tick()
    store.stamps["a"] = store.now + 86400
    store.clock.now += 1
    b.tick()
    store.clock.now += timing.stale_after + 1.5
    b.tick()
    assert not b.active
    store.clock.now += 0.5
    b.tick()
    assert b.active


# -- election: the database's clock -----------------------------------------------------------------------------------


def test_a_first_look_trusts_no_age(store: MemoryStore) -> None:
    elected(store)
    b = Site(store, "b")
    store.clock.now += 100
    b.tick()
    assert not b.active
    assert run(60, b, until=lambda: b.active) <= 2 * TIMING.heartbeat + TIMING.call_timeout
    assert b.told[-1][1]["reason"] == "stale"


@pytest.mark.parametrize("late", [0.0, TIMING.call_timeout - 0.1])
def test_a_process_that_starts_after_a_forward_step_waits_for_the_renewal_of_a_living_holder(
    store: MemoryStore, late: float
) -> None:
    """Both of its looks are behind the step and show the stamp from before it."""
    a = elected(store)
    store.clock.step = 3600
    b = Site(store, "b")
    b.chance = 1.0  # it looks as early as it may
    b.tick()
    a.due += late  # by a slow call
    run(60, b, a)
    assert a.active and a.term == 1


def test_a_forward_step_of_the_databases_clock_deposes_nobody(store: MemoryStore) -> None:
    a, b = elected(store), watching(store)
    run(10, a, b)
    store.clock.step = 3600
    b.due = 0  # the standby looks before the holder renews
    run(120, b, a)
    assert a.active
    assert a.term == 1


def test_a_holder_cut_off_before_a_forward_step_keeps_its_lease_to_the_end(store: MemoryStore) -> None:
    a, b = elected(store), watching(store)
    run(10, a, b)
    lease = a.lease
    a.alive = False
    store.clock.step = 3600
    run(60, a, b, until=lambda: b.active)
    assert lease is not None
    assert lease.remaining() < 0
    assert b.active


def test_a_backward_step_delays_the_takeover_by_no_more_than_s(store: MemoryStore) -> None:
    a, b = elected(store), watching(store)
    run(10, a, b)
    store.clock.step = -3600
    run(3, a, b)
    a.alive = False
    assert run(120, a, b, until=lambda: b.active) <= TIMING.liveness


@pytest.mark.parametrize("years", [2, 30, 60])
def test_a_forward_step_of_years_is_no_release(store: MemoryStore, years: int) -> None:
    a, b = elected(store), watching(store)
    run(5, a, b)
    lease = a.lease
    assert lease is not None
    a.alive = False  # cut off: its lease lasts
    store.clock.step += years * 365.25 * 86400
    run(60, b, until=lambda: b.active)
    assert not lease.valid()
    assert b.told[-1][1]["reason"] in ("stale", "still")


def test_a_released_lease_is_taken_without_trust_in_the_clock(store: MemoryStore) -> None:
    a = elected(store)
    a.election.release(store.clock.now)
    b = Site(store, "b")
    b.tick()
    assert b.active


# -- election: release ------------------------------------------------------------------------------------------------


def test_a_released_lease_is_taken_at_the_next_look(store: MemoryStore) -> None:
    a, b = elected(store), watching(store)
    run(5, a, b)
    lease = a.lease
    a.election.release(store.clock.now)
    assert lease is not None
    assert not lease.valid()
    assert a.told[-1] == ("released", {"term": 1})
    assert run(60, a, b, until=lambda: b.active) <= TIMING.heartbeat + 0.2
    assert b.told == [("elected", {"term": 2, "reason": "released", "before": "a"})]


def test_after_a_release_the_others_go_first_for_two_heartbeats(store: MemoryStore) -> None:
    site = elected(store)
    released = store.clock.now
    site.election.release(released)
    run(60, site, until=lambda: site.active)
    assert 2 * TIMING.heartbeat <= store.clock.now - released <= 3.2 * TIMING.heartbeat
    assert site.term == 2


def test_a_lease_lost_because_its_work_hung_is_not_taken_back_when_the_work_ends(store: MemoryStore) -> None:
    a, b = elected(store), watching(store)
    run(10, a, b)
    a.election.lose("the work hangs and does not end")
    a.willing = False  # while it hangs
    run(5, a, b)
    a.election.release(store.clock.now)
    a.willing = True
    run(60, a, b, until=lambda: a.active or b.active)
    assert b.active and "duplicate_member" not in a.events


def test_a_released_lease_of_ones_own_is_not_taken_back_as_ones_own(store: MemoryStore) -> None:
    site = elected(store)
    store.before["release"] = DOWN
    site.election.release(store.clock.now)
    released = store.clock.now
    run(60, site, until=lambda: site.active)
    assert store.clock.now - released >= TIMING.stale_after, "whoever gave a lease up waits like the others"


def test_a_release_is_tried_twice(store: MemoryStore) -> None:
    site = elected(store)
    store.before["release"] = DOWN
    store.calls.clear()
    site.election.release(store.clock.now)
    assert store.calls == ["release", "release"]
    assert site.events == ["elected", "lost"]
    assert site.election.database_error is DOWN
    assert site.lease is None


def test_a_second_try_can_release(store: MemoryStore) -> None:
    site = elected(store)
    failures = [DOWN]

    def release(group: str, member: str, term: int) -> None:
        if failures:
            raise failures.pop()
        MemoryStore.release(store, group, member, term)

    store.release = release  # type: ignore[method-assign]
    site.election.release(store.clock.now)
    assert site.events == ["elected", "released"]
    assert store.released == {"a"}


def test_a_lease_that_has_run_out_is_not_released(store: MemoryStore) -> None:
    site = elected(store)
    store.clock.now += LEASE
    store.calls.clear()
    site.election.release(store.clock.now)
    assert store.calls == []
    assert site.events == ["elected", "lost"]


def test_a_release_without_lease_does_nothing(store: MemoryStore) -> None:
    site = Site(store)
    site.election.release(store.clock.now)
    assert store.calls == []
    assert site.events == []


def test_a_lease_that_is_lost_on_purpose_is_over_but_not_released(store: MemoryStore) -> None:
    a, b = elected(store), watching(store)
    lease = a.lease
    a.willing = False  # its work has not ended
    a.election.lose("no progress")
    lost = store.clock.now
    assert lease is not None
    assert not lease.valid()
    assert a.told[-1] == ("lost", {"term": 1, "reason": "no progress"})
    run(60, a, b, until=lambda: b.active)
    assert store.clock.now - lost >= TIMING.stale_after - 2 * TIMING.heartbeat


def test_a_leaving_standby_takes_its_row_along_and_an_outage_does_not_matter(store: MemoryStore) -> None:
    elected(store)
    b = watching(store)
    b.election.stop()
    assert "b" not in store.stamps
    store.before["leave"] = DOWN
    b.election.stop()


# -- election: anything, in any order ---------------------------------------------------------------------------------

NAMES = ["a", "b", "a", "c"]  # two of them under one id
EVENTS = st.tuples(
    st.sampled_from(
        ["pause", "resume", "down", "up", "mute", "release", "restart", "future", "slow", "fast", "vanish"]
    ),
    st.integers(0, len(NAMES) - 1),
    st.floats(0.1, 40),
)


@settings(deadline=None)  # other tests may have the cores
@given(st.lists(EVENTS, max_size=25))
def test_whatever_happens_no_two_leases_are_valid_at_once(happenings: list[tuple[str, int, float]]) -> None:
    store = MemoryStore(Clock())
    sites = [Site(store, name) for name in NAMES]
    paused: list[Site] = []  # of former processes, too: a stopped one may wake up at any time
    seen_terms: dict[int, object] = {}
    for what, number, seconds in happenings:
        site = sites[number]
        if what == "pause":
            site.alive = False
        elif what == "resume":
            site.alive = True
        elif what == "down":
            store.before["*"] = DOWN
        elif what == "mute":
            store.after.update(renew=DOWN, take=DOWN, first=DOWN)
        elif what == "up":
            store.before.clear()
            store.after.clear()
        elif what == "release":
            site.election.release(store.clock.now)
        elif what == "restart":
            paused.append(site)
            sites[number] = Site(store, site.member)
        elif what == "future" and store.holder in store.stamps:
            store.stamps[str(store.holder)] = store.now + 3600
        elif what == "slow":
            store.latency = min(seconds, 3.0)
        elif what == "fast":
            store.latency = 0.0
        elif what == "vanish" and store.holder is not None:
            store.stamps.pop(store.holder, None)
            store.released.discard(store.holder)
        end = store.clock.now + seconds
        while store.clock.now < end:
            for each in sites:
                if each.alive and store.clock.now >= each.due:
                    each.tick()
                holders = [s for s in [*sites, *paused] if s.active]
                assert len(holders) <= 1, [s.member for s in holders]
                for holder in holders:
                    assert seen_terms.setdefault(holder.term, holder.lease) is holder.lease, "a term was won twice"
            store.clock.now += 0.5
    # Everything is well again: somebody becomes active.
    store.before.clear()
    store.after.clear()
    store.latency = 0.0
    for each in sites:
        each.alive = True
    run(2 * TIMING.liveness, *sites)
    assert sum(each.active for each in sites) == 1
    assert math.isfinite(store.now)


# -- member -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Callable[[str], ftpcoord.Member]]:
    """Members of one group in a file, started one after the other."""
    started: list[ftpcoord.Member] = []

    def start(name: str) -> ftpcoord.Member:
        member = ftpcoord.Member(
            ftpcoord.Config(
                database=f"sqlite:///{tmp_path / 'c.db'}",
                coordination_group="g",
                member_id=name,
                heartbeat_frequency=0.5,
                liveness_check_interval=8,
            )
        )
        member.start()
        started.append(member)
        return member

    yield start
    for member in started:
        member.stop()
    for member in started:
        member.finished.wait(10)


def test_a_wait_for_a_lease_is_as_long_as_it_was_asked_to_be(sqlite: Callable[[str], ftpcoord.Member]) -> None:
    first = sqlite("a")
    assert first.wait_for_lease(10) is not None
    second = sqlite("b")
    assert second.ready.wait(10)
    began = time.monotonic()
    assert second.wait_for_lease(0.2) is None
    assert 0.15 < time.monotonic() - began < 0.8
    first.work_ended()


def test_a_question_for_the_others_is_not_lost_in_the_end_of_a_heartbeat(
    sqlite: Callable[[str], ftpcoord.Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sqlite("a")
    assert first.wait_for_lease(10) is not None
    second = sqlite("b")
    assert second.ready.wait(10)
    ending, go_on = threading.Event(), threading.Event()
    heartbeat = first.stats.heartbeat

    def told(took: float, late: float, failed: bool) -> None:
        ending.set()
        go_on.wait(10)
        heartbeat(took, late, failed)

    monkeypatch.setattr(first.stats, "heartbeat", told)
    first.config.heartbeat_frequency = 30  # what slips would slip by so much
    assert first.election is not None
    first.election.timing = first.timing = Timing(30, 300)
    assert ending.wait(10)
    threading.Timer(0.3, go_on.set).start()
    assert first.hand_over_to_another("a test asks for it")
    first.work_ended()


def test_a_login_that_is_refused_while_active_is_tried_again_in_the_time_that_is_left(
    sqlite: Callable[[str], ftpcoord.Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sqlite("a")
    lease = first.wait_for_lease(10)
    assert lease is not None
    refused: list[float] = []
    again = threading.Event()
    renew = ftpcoord.SQLite.renew

    def renewed(self: ftpcoord.SQLite, *args: Any) -> Renewal:
        if not refused or time.monotonic() < refused[0] + 3.2:
            refused.append(time.monotonic())
            raise DatabaseRefused("the password was rotated")
        held = renew(self, *args)
        again.set()
        return held

    monkeypatch.setattr(ftpcoord.SQLite, "renew", renewed)
    assert again.wait(20)  # at doubled pauses alone it would be a second too late for the lease
    assert lease.valid() and len(refused) > 1
    first.work_ended()
