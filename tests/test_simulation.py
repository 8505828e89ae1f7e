"""The deterministic simulation in every run, its own controls, and tests of what it has found."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import random
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional, cast

import pytest
import simulation
from conftest import Database
from simulation import EPOCH, GROUP, Violation, World
from test_dialects import Tables

import ftpcoord
from ftpcoord import (
    Change,
    Election,
    Entry,
    Fence,
    Found,
    Lease,
    Ledger,
    MemberRow,
    MemoryRows,
    Outcome,
    Renewal,
    Row,
    Timing,
    View,
    Work,
)

TICKS = int(os.environ.get("FTPCOORD_TICKS", 2_000_000))
SEED = int(os.environ.get("FTPCOORD_SEED", 1))


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left() -> Iterator[None]:
    """What worlds have left is collected here, not in the middle of a later test."""
    yield
    gc.collect()


@pytest.mark.summary
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("in_the_background")
def test_whatever_happens_the_promises_hold_for_two_million_heartbeats() -> None:
    totals = simulation.run_worlds(TICKS, SEED)
    print(simulation.summary(totals, SEED))
    assert totals.ticks >= TICKS
    assert totals.elections > totals.worlds
    # What cannot be prevented is bounded, and these worlds were wild enough for it to happen.
    assert 0 < totals.measured["overlap after a forward step, in S - m - H - T"][0] < 1.1
    assert 0 < totals.measured["overlap after lost commits, in S"][0] < 1


def trace_of(seed: int) -> str:
    code = (
        "import sys, zlib, simulation; w = simulation.run_world(int(sys.argv[1]), True, files=True, length=200);"
        "print(w.ticks, w.pushed, zlib.crc32('\\n'.join(w.lines).encode()))"
    )
    folder = Path(simulation.__file__).parent
    environ = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": f"{folder.parent}{os.pathsep}{folder}"}
    return subprocess.run(
        [sys.executable, "-c", code, "4711"], env=environ, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def test_a_seed_replays_exactly_in_another_process() -> None:
    assert trace_of(1) == trace_of(2)


def test_a_violation_names_the_seed_that_replays_it() -> None:
    with pytest.raises(Violation) as first:
        simulation.run_worlds(500_000, 1, spread=0.2, steps=False, files=False)
    seed = first.value.world.seed  # type: ignore[attr-defined]
    assert str(first.value).startswith(f"seed {seed}, ")
    with pytest.raises(Violation) as second:
        simulation.run_world(seed, spread=0.2, steps=False, files=False)
    assert str(first.value) == str(second.value)


def test_clocks_that_differ_by_more_than_the_margin_are_noticed() -> None:
    """The simulation can fail: 12 % either way is more than the tenth that the margin covers."""
    first = r"two valid leases|after one of term|outlived its lease|acts past its deadline"  # whichever comes first
    with pytest.raises(Violation, match=first):
        simulation.run_worlds(500_000, 1, spread=0.12, intervals=(1, 30), steps=False, files=False, loses_commits=False)


def test_clocks_that_differ_by_four_percent_are_covered() -> None:
    simulation.run_worlds(40_000, 50_000, spread=0.04, steps=False, files=False)


# -- a forward step of the database's clock while the active member is stalled ----------------------------------------


@contextlib.contextmanager
def quiet_world(**fixed: Any) -> Iterator[World]:
    """A world without faults; the test lets them happen."""
    nothing = {
        "spread": 0.0,
        "latency": 0.001,
        "loss": 0.0,
        "lock_chance": 0.0,
        "server_loss": 0.0,
        "gap": 1e9,
        "breaks": 0.0,
        "steps": False,
        "loses_commits": False,
        "duplicates": False,
        "files": False,
        "whole": False,
        "suffix": "",
        "order": "none",
    }
    with simulation.installed():
        world = World(1, **{**nothing, **fixed})
        try:
            yield world
        finally:
            world.close()


def overlap(starts_after_the_step: bool, looks_wait: float) -> float:
    """The active member is stopped and the clock set forward by an hour; how long two leases are valid, in seconds."""
    with quiet_world(intervals=(1, 30), members=1) as world:
        world.start("a")
        if not starts_after_the_step:
            world.run_until(0.5)
            world.start("b")
        world.run_until(20.3)
        world.pause(world.processes[0], 1000)
        world.run_until(world.now + looks_wait)
        world.database.offset += 3600
        world.steps.append((world.now, 3600))
        if starts_after_the_step:
            world.start("b")
        world.run_until(100)
        assert [process.member for process in world.processes if process.valid()] == ["b"]
        return world.measured.get("overlap after a forward step, in S - m", 0.0) * 25


def test_a_forward_step_while_the_active_member_is_stopped_does_not_move_a_standby_that_saw_it() -> None:
    assert overlap(starts_after_the_step=False, looks_wait=0.1) == 0
    assert overlap(starts_after_the_step=False, looks_wait=0.9) == 0


def test_a_member_started_after_a_forward_step_cannot_know_and_the_overlap_is_bounded() -> None:
    """EXPOSED: at most S - m - H - T, 19 s of the default S - m = 25 s: so long it lets a living holder renew."""
    longest = overlap(starts_after_the_step=True, looks_wait=0.1)
    assert 17 < longest < 19
    assert overlap(starts_after_the_step=True, looks_wait=20) < 5


def test_a_claim_that_is_void_is_told_as_lost_once_also_if_the_next_one_comes_to_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server goes away after the next member's claims: one file was being fetched, the other had no connection."""
    fixed = {"files": True, "lines": False, "refusals": 0.0, "handler_failures": 0.0, "latency": 0.01}
    with quiet_world(intervals=(1, 8), members=1, audit="on", **fixed) as world:
        world.config["workers"] = 2
        world.start("a")
        world.run_until(20)
        for number, path in enumerate(("/in/f", "/in/g")):
            version = simulation.Version(path, number, 1000, int(EPOCH + world.now))
            world.files.files[path] = world.files.history[number] = version

        def goes_away(path: str, old: Optional[Row], new: Optional[Row]) -> None:
            if path == "/in/g" and old is not None:
                world.server_loss = 1.0

        world.files.slow = 30.0
        monkeypatch.setattr(world, "changed", goes_away)
        world.until(lambda: [row.state for row in world.database.ledger.values()] == ["claimed"] * 2, 20, "claims")
        world.kill(world.processes[0], "dies", again=0.0)
        world.until(lambda: world.server_loss > 0, 20, "claims")
        world.run_until(world.now + 3)
        monkeypatch.undo()
        world.server_loss = 0.0
        world.run_until(world.now + 30)
        for each, told in (("/in/f", ["lost", "failed", "done", "moved"]), ("/in/g", ["lost", "done", "moved"])):
            assert [noted.outcome for noted in world.database.trail if noted.of.path == each] == told
        assert world.violation is None


# -- files whose lines show minutes --------------------------------------------------------------------------------


def test_each_version_of_a_minute_is_handled_also_where_an_earlier_one_was_in_doubt() -> None:
    with quiet_world(intervals=(1, 8), members=1, files=True, lines=True, refusals=0.0, handler_failures=0.0) as world:
        world.config["after"] = "keep"
        world.start("a")
        for moment in (101, 161, 175, 200):  # the minute of the last three begins at 160
            world.run_until(moment)
            version = simulation.Version("/in/f", len(world.files.history), 1000, int(EPOCH + world.now))
            world.files.files["/in/f"] = world.files.history[version.content] = version
        world.run_until(400)
        handled = [run.outcome for version in world.files.history.values() for run in world.files.runs.get(version, [])]
        assert handled == ["ok"] * 4


def test_a_claim_that_a_dead_member_left_is_counted_also_where_the_display_of_times_has_moved_since() -> None:
    with quiet_world(intervals=(1, 8), members=1, files=True, lines=True, refusals=0.0, handler_failures=1.0) as world:
        world.start("a")
        world.run_until(101)
        version = simulation.Version("/in/f", 0, 1000, int(EPOCH + world.now))
        world.files.files["/in/f"] = world.files.history[0] = version
        runs = world.files.runs.setdefault(version, [])
        while len(runs) < 2:
            world.run_until(world.now + 0.05)
        world.kill(world.processes[0], "dies", again=0.0)
        world.files.zone += 3600
        world.handler_failures = 0.0
        world.run_until(200)
        assert [(run.attempt, run.outcome) for run in runs] == [(1, "failed"), (2, ""), (3, "ok")]


# -- the simulated database is like the real ones ---------------------------------------------------------------------


class Twin:
    """A real store whose statements are also carried out by the simulated database, and compared."""

    def __init__(self, store: ftpcoord.Database, kind: str) -> None:
        self.store, self.sim = store, simulation.SimDatabase(kind, store.timing.whole_seconds)
        self.compared = 0
        self.verbs = {
            getattr(store, verb): getattr(self.sim, verb.lower()) for verb in simulation.VERBS if hasattr(store, verb)
        }
        self.verbs.update(dict.fromkeys((store.CLAIM, store.CHANGE, store.FORGET), self.sim.change))
        self.real = store.execute
        store.execute = self.execute  # type: ignore[method-assign]

    def set_clock(self, seconds: float) -> None:
        self.clock = seconds
        text = f"'{ftpcoord.utc_text(seconds).replace('T', ' ')[:-1]}'"
        if self.sim.whole:
            text = text[:-5] + "'"
        self.store._words["now"] = f"TIMESTAMP {text}"
        self.store._texts.clear()

    def execute(self, sql: str, **values: Any) -> Any:
        rows: Any
        try:
            rows = self.real(sql, **values)
        except ftpcoord.DatabaseDown as exc:
            rows = type(exc)
        verb = self.verbs.get(sql)
        if verb is None:
            return rows
        like = dict(values)
        if like.get("stamp") is not None:
            seen = epoch(like["stamp"])
            present = self.sim.health.get(like["holder"]) or 0.0
            like["stamp"] = repr(present if abs(present - seen) < 1e-5 else seen)
        try:
            expected = verb(self.clock, self.sim, **like)
        except ftpcoord.DatabaseDown as exc:
            expected = type(exc)
        assert alike(rows, expected, verb.__name__), (verb.__name__, values, rows, expected)
        self.compared += 1
        if isinstance(rows, type):
            raise ftpcoord.DatabaseBusy("Duplicate") if rows is ftpcoord.DatabaseBusy else rows("Duplicate")
        return rows


def epoch(stamp: str) -> float:
    seconds = ftpcoord.epoch_seconds(stamp)
    assert seconds is not None
    return seconds


def alike(rows: Any, expected: Any, verb: str) -> bool:
    """Whether a real answer and a simulated one say the same."""
    if isinstance(rows, type) or isinstance(expected, type):
        return isinstance(rows, type) and isinstance(expected, type)
    if verb == "change":  # MySQL tells nothing, and is asked with STANDING
        return not rows or sorted(rows) == sorted(expected) or sorted(map(list, rows)) == sorted(map(list, expected))
    if verb == "standing":
        return sorted(map(tuple, rows)) == sorted(expected)
    if verb in ("beat", "seat", "release", "leave", "sweep"):
        return True  # the tables are compared
    if verb == "look":
        real, own = list(rows[0])[:5], list(expected[0])[:5]
        if real[0] is None or own[0] is None:
            return real[0] is own[0]
        same_age = own[4] == real[4] if None in (own[4], real[4]) else abs(float(own[4]) - float(real[4])) < 1e-3
        same_stamp = own[3] == real[3] if None in (own[3], real[3]) else abs(float(own[3]) - epoch(real[3])) < 1e-3
        return real[:2] == own[:2] and bool(real[2]) == own[2] and same_age and same_stamp
    return bool([tuple(row) for row in rows] == expected)


@pytest.mark.parametrize("database", ["postgresql", "mysql", "mariadb"], indirect=True)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_simulated_database_does_what_the_real_ones_do(database: Database, seed: int) -> None:
    kind = "postgresql" if database.name == "postgresql" else "mysql"
    rng = random.Random(seed)
    with contextlib.ExitStack() as stack:
        tables = stack.enter_context(contextlib.closing(Tables(database)))
        if seed == 2:
            tables.apply_wso2()
        tables.apply()
        world = World(1, audit="on")
        twin = Twin(tables.open(audit=True), kind)
        connection = stack.enter_context(contextlib.closing(database.connect()))
        world.database = twin.sim
        views: dict[str, View] = {}
        won: dict[str, int] = {}
        clock = EPOCH
        for _ in range(400):
            clock += rng.choice((0.0, 0.25, 1.5, 3.0, 3.0, 7.0, -2.0, 90000.0 if rng.random() < 0.1 else 0.5))
            twin.set_clock(clock)
            random_step(rng, twin, views, won)
            same_tables(connection, twin)
        assert {noted.outcome for noted in twin.sim.trail} > {"done", "quarantined", "lost", "skipped"}
        assert twin.compared > 300
        assert twin.sim.highest_term > 5


def random_step(rng: random.Random, twin: Twin, views: dict[str, View], won: dict[str, int]) -> None:
    store, member = twin.store, rng.choice("abc")
    term = won.get(member, 1) - (rng.random() < 0.1)
    step = rng.choice(
        ("look", "look", "take", "take", "renew", "renew", "release", "leave", "sweep", "write", "write", "skip")
    )
    if step == "look":
        views[member] = store.look(GROUP, member)
        if views[member].holder is None:
            won[member] = store.first(GROUP, member, views[member].term + 1) or 0
    elif step == "take" and member in views and views[member].holder is not None:
        why = rng.choice(("stale", "stale", "still", "absent", "own" if rng.random() < 0.2 else "stale"))
        won[member] = store.take(GROUP, member, views[member], 4, why) or won.get(member, 0)
    elif step == "renew":
        store.renew(GROUP, member, term)
    elif step == "release" and rng.random() < 0.3:
        store.release(GROUP, member, term)
    elif step == "leave" and rng.random() < 0.5:
        store.leave(GROUP, member)
    elif step == "sweep":
        store.sweep(GROUP, member)
    elif step == "write":
        if rng.random() < 0.5 and twin.sim.token is not None:
            member, term = twin.sim.token
        changes = [change_of(rng, twin, path, term) for path in rng.sample(("/x", "/y", "/z"), 2)]
        store.write(Fence(GROUP, member, term), changes)
    elif step == "skip" and twin.sim.ledger:
        store.skip(GROUP, rng.choice(list(twin.sim.ledger.values())))


def change_of(rng: random.Random, twin: Twin, path: str, term: int) -> Change:
    """A change that fits the row that is there, mostly."""
    old: Optional[Row] = twin.sim.ledger.get(ftpcoord.sha256_text(path))
    if old is not None and rng.random() < 0.2:
        old = None if rng.random() < 0.3 else old._replace(attempts=old.attempts + 1)
    if old is not None and rng.random() < 0.2:
        return Change(old, None, outcome=rng.choice((None, Outcome("moved"), Outcome("lost"))))
    state = rng.choice(("claimed", "done", "failed", "quarantined"))
    attempts, action = old.attempts + 1 if old else 1, rng.choice(("", "delete"))
    new = Row(path, 7, "2026-01-12", state, term, attempts, rng.randrange(3), action)
    told = None if rng.random() < 0.3 else Outcome("lost" if old and old.state == "claimed" and term % 2 else state)
    return Change(old, new, rng.choice((None, 5.0)), outcome=told)


def same_tables(connection: Any, twin: Twin) -> None:
    cursor = connection.cursor()

    def rows(sql: str) -> list[tuple[Any, ...]]:
        cursor.execute(sql)
        return sorted(tuple(row) for row in cursor.fetchall())

    assert rows("SELECT task_id, term FROM token_holder") == ([twin.sim.token] if twin.sim.token else [])
    real = rows("SELECT task_id, last_heartbeat FROM health_check")
    stamps = [(member, moment.replace(tzinfo=datetime.timezone.utc).timestamp()) for member, moment in real]
    assert stamps == [(member, pytest.approx(stamp, abs=1e-3)) for member, stamp in sorted(twin.sim.health.items())]
    own = [(i, r.state, r.term, r.attempts, r.failures, r.action) for i, r in twin.sim.ledger.items()]
    assert rows("SELECT file_id, state, term, attempts, failures, action FROM file_ledger") == sorted(own)
    trail = sorted((*noted.of, noted.outcome) for noted in twin.sim.trail)
    assert rows("SELECT path, term, attempt, outcome FROM file_audit") == trail


# -- what the simulation has found ------------------------------------------------------------------------------------


class Scripted:
    """A store that shows what the test says, and remembers what it was asked to take."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.view = View("a", 1, False, "x", 0.0, EPOCH, 0.0)
        self.stopped = 0.0  # how long the process is stopped before it looks
        self.answers_after = 0.0  # how long the process waits for the answer to a renewal
        self.taken: list[str] = []

    def clock(self) -> float:
        return self.now

    def look(self, group: str, member: str) -> View:
        self.now += self.stopped
        self.stopped = 0.0
        return self.view._replace(now=EPOCH + self.now)

    def take(self, group: str, member: str, seen: View, stale_after: float, why: str) -> Optional[int]:
        self.taken.append(why)
        return seen.term + 1

    def renew(self, group: str, member: str, term: int) -> Renewal:
        self.now += self.answers_after
        return Renewal(True)

    def sweep(self, group: str, member: str) -> None:
        pass

    def members(self, group: str) -> list[MemberRow]:
        return []


def standby(store: Any) -> Election:
    return Election(store, "g", "b", Timing(1, 30), store.clock, lambda *event, **fields: None)


def test_a_holder_does_not_stand_still_while_the_observer_was_stopped() -> None:
    """The time of the tick was read before the process was stopped; the look itself was quick."""
    store = Scripted()
    election = standby(store)
    store.stopped = 40
    election.tick(store.now)
    for _ in range(20):
        store.now += 1
        election.tick(store.now)
    assert store.taken == []
    for _ in range(9):
        store.now += 1
        election.tick(store.now)
    assert store.taken == ["still"]


def test_steps_that_cancel_each_other_between_two_looks_are_not_trusted_away() -> None:
    """A failover to a slower clock and back while the observer was stopped: what was stamped meanwhile looks old."""
    store = Scripted()
    election = standby(store)
    for _ in range(3):
        election.tick(store.now)
        store.now += 1
    store.now += 20
    store.view = store.view._replace(stamp="y", age=29.0)
    election.tick(store.now)
    assert store.taken == []
    for _ in range(28):
        store.now += 1
        election.tick(store.now)
    assert len(store.taken) == 1


def test_a_lease_that_has_run_out_stays_over() -> None:
    """Its work was cut, and its guard has done its duty: a late answer must not bring it back."""
    clock = [0.0]
    lease = Lease(1, 10.0, lambda: clock[0])
    clock[0] = 10.0
    lease.extend(100.0)
    assert not lease.valid()


def test_a_renewal_whose_answer_comes_after_the_deadline_loses_the_lease_and_a_new_one_is_won_at_once() -> None:
    store = Scripted()
    store.view = store.view._replace(age=1e9, released=True)
    election = standby(store)
    election.tick(store.now)
    lease = election.lease
    assert lease is not None
    store.answers_after = 26.0
    assert election.tick(store.now) == 0.0
    assert election.lease is None
    assert not lease.valid()
    store.view = View("b", 2, True, "y", 26.0, EPOCH, 0.0)
    election.tick(store.now)
    assert election.lease is not None
    assert election.lease.term == 3


def test_a_step_back_within_a_second_does_not_make_a_column_of_whole_seconds_stand_still() -> None:
    """Clocks at the ends of their rates, a step back that hides renewals, and the active member stopped right then."""
    for seed in range(150):
        rng = random.Random(seed)
        with quiet_world(intervals=(0.2, 6.4), members=1, whole=True, kind="mysql") as world:
            world.start("a")
            world.run_until(1 + rng.random())
            world.start("b")
            world.run_until(10 + rng.random())
            active = next(process for process in world.processes if process.valid())
            for process in world.processes:
                process.set_rate(0.97 if process is active else 1.03)
            world.database.offset -= 0.7 + 0.29 * rng.random()
            world.run_until(world.now + 0.9 * rng.random())
            world.pause(active, 100)
            world.run_until(world.now + 12)
            assert active not in world.active()


def test_a_scripts_own_work_is_not_taken_for_stalled() -> None:
    with quiet_world(intervals=(1, 8), members=1) as world:
        world.start("a")
        world.run_until(10 * float(world.config["stall_timeout"]))
        assert world.elections == 1


def test_a_back_off_does_not_last_until_a_clock_that_was_set_back_has_caught_up(database: Database) -> None:
    with contextlib.closing(Tables(database)) as tables:
        tables.apply()
        store = tables.open()
        assert store.first("g", "a", 1) == 1
        failed = Row("/x", 1, "", "failed", 1, 1, 1)
        assert store.write(Fence("g", "a", 1), [Change(None, failed._replace(state="claimed"))]) == [True]
        assert store.write(Fence("g", "a", 1), [Change(failed._replace(state="claimed"), failed, 10.0)]) == [True]
        (row,) = store.rows("g")
        assert row.due is not None
        assert 0 < row.due <= 10.01  # SQLite counts in days, as floats
        for column in ("updated_at", "next_attempt_at"):
            tables.database.execute(f"UPDATE file_ledger SET {column} = '2099-01-01 00:00:00'")
        (row,) = store.rows("g")
        assert row.due is None


def test_a_row_that_is_another_one_than_remembered_is_read_anew_at_the_next_poll() -> None:
    """After lost commits a `done` row may be an older one again: as many done rows, and none of them open."""
    store = MemoryRows()
    ledger = Ledger(cast(Any, store), "g", "a", Lease(1, 100.0, lambda: 0.0), lambda: 0.0)
    done = Row("/x", 2, "", "done", 1, 1, 0)
    assert store.write(Fence("g", "a", 1), [Change(None, done)]) == [True]
    ledger.refresh()
    older = done._replace(size=1)
    assert store.write(Fence("g", "a", 1), [Change(done, None), Change(None, older)]) == [True, True]
    ledger.refresh()
    new = Work(Found("/x", "x", Entry("x", "file", 3, "")), ledger.get("/x"))
    assert ledger.claim([new]) == [None]
    ledger.refresh()
    again = Work(new.found, ledger.get("/x"))
    assert ledger.claim([again]) != [None]


def test_an_end_too_many_or_too_few_in_the_trail_is_found() -> None:
    def violation(doctor: Callable[[list[simulation.Noted]], object]) -> str:
        world = simulation.run_world(5, files=True, audit="on", loses_commits=False, handler_failures=0.3)
        world.check_trail()
        assert world.violation is None
        doctor(world.database.trail)
        world.check_trail()
        return str(world.violation)

    def done(trail: list[simulation.Noted]) -> simulation.Noted:
        return next(noted for noted in trail if noted.outcome == "done")

    def other(trail: list[simulation.Noted]) -> simulation.Noted:
        failed = next(noted for noted in trail if noted.outcome == "failed")
        trail.remove(failed)
        return failed._replace(outcome="done")

    assert "ended 2 times, and was begun 1 times" in violation(lambda trail: trail.append(done(trail)))
    assert "and the trail knows 0" in violation(lambda trail: trail.remove(done(trail)))
    assert "and was so 0 times" in violation(lambda trail: trail.append(other(trail)))


def test_the_digest_of_a_world_does_not_depend_on_what_ran_before() -> None:
    def digest() -> int:
        return zlib.crc32("\n".join(simulation.run_world(7, True, length=100).lines).encode())

    first = digest()
    simulation.run_world(8)
    assert digest() == first
