"""The states of a member: what comes of what is asked of it and of what happens. Time and heartbeats are the test's."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any, Optional

import pytest
from conftest import wait_for
from test_election import DOWN, TIMING, Clock, MemoryStore

import ftpcoord
from ftpcoord import DatabaseRefused, Member, Progress, State

STANDING_BY, WORKING, WINDING_UP, STOPPED = State


class Store(MemoryStore):
    """A database whose tables are good."""

    connection: Optional[object] = None
    timing = TIMING

    def prepare(self) -> ftpcoord.Timing:
        return TIMING

    def settle_group(self, config: ftpcoord.Config) -> None: ...

    def check_ids(self, group: str, member: str) -> None: ...

    def close(self) -> None: ...


class Scene:
    """One member in a state; its steps are named by the table below. The guard is the real one, in its thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, watched: bool = True) -> None:
        self.clock, self.effects = Clock(), set[str]()
        self.store: Any = Store(self.clock)
        self.database: Any = self.store
        self.ended: Optional[threading.Event] = None  # of the handler that runs
        monkeypatch.setattr(ftpcoord, "boot_clock", self.clock)
        monkeypatch.setattr(ftpcoord, "event", lambda name, *_, **__: self.effects.add(name))
        self.member = Member(
            ftpcoord.Config(
                database="sqlite:///unused",
                coordination_group="g",
                member_id="a",
                stall_timeout=60,
                drain_timeout=10,
                exec_timeout=20,
            ),
            watched,
        )
        self.member.on_lost.append(lambda: self.effects.add("cut"))
        self.member.on_hand_over.append(lambda: self.effects.add("told"))
        self.member.start(self)  # type: ignore[arg-type]

    def add(self, member: Member) -> None:
        """As Pulse."""
        member.pulse, member.timing = self, TIMING  # type: ignore[assignment]

    def wake(self) -> None: ...

    def close(self) -> None:
        self.member.finished.set()
        self.member.note()
        if self.ended is not None:
            self.ended.set()

    def do(self, steps: str) -> None:
        for step in filter(None, steps.split(", ")):
            getattr(self, step.replace(" ", "_"))()

    # -- how it gets there

    def standing_by(self) -> None:
        self.store.holder, self.store.term, self.store.stamps["b"] = "b", 7, self.clock.now
        self.beat()

    def elected(self) -> None:
        self.beat()
        assert self.member.lease is not None

    def working(self) -> None:
        self.elected()
        self.take()

    # -- what comes

    def beat(self) -> None:
        if not self.member.beat(self.database):
            self.member.finished.set()

    def take(self) -> None:
        assert self.member.wait_for_lease(0.0)

    def none_to_take(self) -> None:
        assert self.member.wait_for_lease(0.0) is None

    def stop(self) -> None:
        self.member.stop()

    def stop_without_release(self) -> None:
        self.member.stop(release=False)

    def hand_over(self) -> None:
        self.member.hand_over("a test asks for it")

    def hand_over_to_another(self) -> None:
        asking = threading.Thread(target=self.member.hand_over_to_another, args=("a test asks for it",))
        asking.start()
        wait_for(lambda: self.member.wanted.another, 5)
        self.beat()
        asking.join(5)
        assert not asking.is_alive()

    def operator_asks(self) -> None:
        self.store.requested.add(self.store.term)

    def work_ends(self) -> None:
        self.member.work_ended()

    def other_lives(self) -> None:
        self.store.stamps["b"] = self.clock.now + 1000

    def other_takes(self) -> None:
        self.store._win("b", self.store.term + 1)

    def reply_is_missing(self) -> None:
        self.member.unanswered = self.clock.now

    def database_is_away(self) -> None:
        self.store.before["*"] = DOWN

    def database_is_back(self) -> None:
        self.store.before.clear()

    def login_is_refused(self) -> None:
        self.store.before["*"] = DatabaseRefused("the password was rotated")

    def answer_is_nonsense(self) -> None:
        self.store.before["*"] = TypeError("nonsense")

    def ledger_is_locked(self) -> None:
        self.member.ledger_trouble("it is locked")

    def handler_runs(self) -> None:
        began, self.ended = threading.Event(), threading.Event()

        def run() -> None:
            with self.member.progress.handling(lambda seconds: None):
                began.set()
                self.ended and self.ended.wait(60)

        threading.Thread(target=run, daemon=True).start()
        assert began.wait(5)

    def seconds(self, count: float) -> None:
        """With a heartbeat and a look of the guard in each."""
        for _ in range(int(count)):
            self.clock.now += 1
            if self.member.next_beat <= self.clock.now and not self.member.finished.is_set():
                self.beat()
        self.member.note()
        time.sleep(0.03)
        self.beat()  # what the guard asked for

    def ten_seconds(self) -> None:
        self.seconds(10)

    def thirty_seconds(self) -> None:
        self.seconds(30)

    def a_minute(self) -> None:
        self.seconds(61)


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    scene = Scene(monkeypatch)
    yield scene
    scene.close()


DOWN_UP = {"database_down", "database_up"}


@pytest.mark.parametrize(
    ("begin", "steps", "state", "effects"),
    [
        # standing by, another one is active
        ("standing_by", "beat, none to take", STANDING_BY, set()),
        ("standing_by", "stop, beat", STOPPED, {"told", "left"}),
        ("standing_by", "hand over, operator asks, beat", STANDING_BY, set()),
        ("standing_by", "database is away, beat, database is back, beat", STANDING_BY, DOWN_UP),
        ("standing_by", "login is refused, beat, database is back, beat", STANDING_BY, DOWN_UP),
        (
            "standing_by",
            "answer is nonsense, beat, beat, database is back, beat",
            STANDING_BY,
            {*DOWN_UP, "heartbeat_failed"},
        ),
        ("standing_by", "database is away, beat, stop, beat", STOPPED, {"told", "database_down"}),
        # standing by with a lease that nobody has taken yet
        ("elected", "take", WORKING, set()),
        ("elected", "stop, none to take, beat", STOPPED, {"told", "released"}),
        ("elected", "hand over, none to take, beat", STANDING_BY, {"told", "handing_over", "released"}),
        ("elected", "beat, beat", STANDING_BY, set()),
        # working
        ("working", "beat, ten seconds", WORKING, set()),
        ("working", "work ends, beat, take", WORKING, set()),
        ("working", "operator asks, beat", WINDING_UP, {"told", "handing_over"}),
        ("working", "other takes, beat", WINDING_UP, {"lost"}),
        ("working", "other takes, ten seconds", WINDING_UP, {"lost", "cut"}),
        ("working", "database is away, thirty seconds", WINDING_UP, {"lost", "cut", "database_down"}),
        ("working", "database is away, ten seconds, database is back, ten seconds", WORKING, DOWN_UP),
        ("working", "login is refused, thirty seconds", WINDING_UP, {"lost", "cut", "database_down"}),
        # working: stop and hand over, while the work goes on and once it has ended
        ("working", "stop, beat, ten seconds", WINDING_UP, {"told"}),
        ("working", "stop, beat, work ends, beat", STOPPED, {"told", "released"}),
        ("working", "stop without release, work ends, beat", STOPPED, {"told"}),
        ("working", "stop without release, stop, work ends, beat", STOPPED, {"told"}),
        ("working", "hand over, beat, ten seconds", WINDING_UP, {"told", "handing_over"}),
        ("working", "hand over, work ends, beat, none to take", STANDING_BY, {"told", "handing_over", "released"}),
        ("working", "hand over, stop, work ends, beat", STOPPED, {"told", "handing_over", "released"}),
        ("working", "stop, database is away, work ends, beat", STOPPED, {"told", "lost", "database_down"}),
        ("working", "hand over to another", WORKING, set()),
        ("working", "other lives, hand over to another", WINDING_UP, {"told", "handing_over"}),
        # working: a command to the file server has no reply
        ("working", "reply is missing, stop, work ends, beat", STOPPED, {"told", "lost"}),
        (
            "working",
            "reply is missing, hand over, work ends, beat, none to take",
            STANDING_BY,
            {"told", "handing_over"},
        ),
        (
            "working",
            "reply is missing, hand over, work ends, thirty seconds",
            STANDING_BY,
            {"told", "handing_over", "released", "elected"},
        ),
        # working: no progress, or none of a handler
        ("working", "a minute", WINDING_UP, {"told", "handing_over", "cut"}),
        ("working", "a minute, work ends, beat", STANDING_BY, {"told", "handing_over", "cut", "released"}),
        ("working", "a minute, ten seconds", WINDING_UP, {"told", "handing_over", "cut", "lost"}),
        ("working", "hand over, a minute, ten seconds", WINDING_UP, {"told", "handing_over", "cut", "lost"}),
        ("working", "thirty seconds, thirty seconds, ledger is locked, thirty seconds", WORKING, {"database_down"}),
        ("working", "handler runs, thirty seconds, thirty seconds", WORKING, set()),
        (
            "working",
            "handler runs, a minute, ledger is locked, thirty seconds, ten seconds",
            WORKING,
            {"database_down"},
        ),
        (
            "working",
            "handler runs, other lives, a minute, ledger is locked, ten seconds, ten seconds",
            WINDING_UP,
            {"database_down", "told", "handing_over"},
        ),
        (
            "working",
            "handler runs, other lives, a minute, ledger is locked, ten seconds, ten seconds, ten seconds",
            WINDING_UP,
            {"database_down", "told", "handing_over", "lost", "cut"},
        ),
    ],
)
def test_from_each_state_what_comes_leads_to_the_next_with_its_effects(
    scene: Scene, begin: str, steps: str, state: State, effects: set[str]
) -> None:
    getattr(scene, begin)()
    scene.effects.clear()
    scene.do(steps)

    def found() -> set[str]:
        return {*scene.effects, *({"left"} if "a" not in scene.store.stamps else ())} - {"standby"}

    wait_for(lambda: found() >= effects, 5, f"{effects}, not {found()}")
    assert (scene.member.state, found()) == (state, effects)
    assert ("a" in scene.store.released) == ("released" in effects and "elected" not in effects)


@pytest.mark.parametrize(
    "steps", ["other takes, ten seconds", "a minute, ten seconds", "database is away, thirty seconds"]
)
def test_a_member_does_not_stand_again_before_the_work_of_its_lease_has_ended(scene: Scene, steps: str) -> None:
    scene.do(f"working, {steps}, database is back, thirty seconds")
    assert scene.member.lease is None
    scene.store.stamps["b"] = -1e6
    scene.do("thirty seconds, thirty seconds")
    assert scene.member.lease is None and scene.member.state is WINDING_UP
    scene.do("work ends, thirty seconds, thirty seconds, take")
    assert scene.member.state is WORKING


def test_a_hand_over_that_waits_for_a_reply_does_not_ask_the_database_without_end(scene: Scene) -> None:
    scene.do("working, a minute, reply is missing, work ends, ten seconds, ten seconds, beat")
    assert scene.member.lease is not None, "the file server may still obey"
    assert scene.member.next_beat > scene.clock.now


def test_work_that_was_found_to_hang_just_when_it_ended_does_not_make_the_database_asked_without_end(
    scene: Scene,
) -> None:
    scene.do("working, reply is missing, work ends")
    scene.member.hand_over("it hangs", hangs=True)  # as the guard's thread would, having looked before the end
    scene.do("ten seconds, ten seconds, beat")
    assert scene.member.lease is not None, "the file server may still obey"
    assert scene.member.next_beat > scene.clock.now


def test_work_that_stalls_is_cut_although_a_hand_over_cannot_be_told_and_the_next_work_is_not(scene: Scene) -> None:
    """The work of the next lease may begin while the guard is about to cut that of the last one."""

    def fails() -> None:
        scene.member.on_lost[:] = [lambda: scene.effects.add("cut the next")]
        raise OSError("no")

    scene.member.on_hand_over.append(fails)
    scene.do("working, a minute")
    wait_for(lambda: {"cut", "handing_over", "guard_failed"} <= scene.effects, 5)
    assert "cut the next" not in scene.effects
    assert scene.member.wanted.lost_at == scene.clock.now + 10


def test_a_hand_over_of_work_that_hangs_ends_in_its_time_also_if_another_one_is_asked_for_at_once(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.do("working")

    def event(name: str, *_: object, **__: object) -> None:
        monkeypatch.setattr(ftpcoord, "event", lambda *_, **__: None)
        scene.member.hand_over("it hangs", hangs=True)  # as the guard's thread would

    monkeypatch.setattr(ftpcoord, "event", event)
    scene.member.hand_over("an operator asked for it")
    assert scene.member.wanted.lost_at == scene.clock.now + 10


def test_what_is_asked_during_a_heartbeat_makes_another_one(scene: Scene) -> None:
    scene.standing_by()
    look = scene.store.look

    def asked(group: str, member: str) -> Any:
        scene.member.stop()
        return look(group, member)

    scene.store.look = asked
    scene.beat()
    assert scene.member.next_beat == 0.0
    scene.beat()
    assert scene.member.state is STOPPED


def test_a_scripts_own_work_may_be_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, watched=False)
    scene.working()
    scene.effects.clear()
    scene.do("a minute, a minute")
    assert (scene.member.state, scene.effects) == (WORKING, set())
    scene.close()


def test_a_member_that_cannot_start_says_why(scene: Scene) -> None:
    scene.do("login is refused, beat")
    assert scene.member.state is STOPPED
    with pytest.raises(DatabaseRefused, match="rotated"):
        scene.member.wait_for_lease(0.0)


def test_silence_is_fine_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(ftpcoord, "boot_clock", clock)
    progress = Progress(60, 20)
    progress.begin()
    assert (progress.overdue(clock.now), progress.overdue(clock.now + 61)) == (-60, 1)
    progress.tell(100)
    progress.tell()
    assert progress.overdue(clock.now + 161) == 1, "a wait that was told lasts, whoever else tells something"
    progress.begin()
    assert progress.overdue(clock.now + 61) == 1, "but not into the next lease"
    took: list[float] = []
    with progress.handling(took.append):
        assert progress.overdue(clock.now + 81) == 1 and progress.handler_overdue(clock.now + 81) == 1
        progress.tell()
        clock.now += 5
    assert took[-1] == 5 and progress.handler_overdue(clock.now + 1000) < 0
    progress.received(599)
    assert progress.overdue(clock.now + 56) == 1
    progress.received(1)
    assert progress.overdue(clock.now + 56) == -4
    endless = Progress(60, None)
    with endless.handling(took.append):
        assert endless.overdue(clock.now + 1e6) < 0 and endless.handler_overdue(clock.now + 1e6) < 0


def test_a_renewal_that_is_answered_in_the_instant_of_the_cut_does_not_revive_the_lease(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with contextlib.closing(Scene(monkeypatch)) as scene:
        scene.working()
        lease = scene.member.lease
        assert lease is not None
        deadline = scene.clock.now + lease.remaining()
        scene.clock.now = deadline
        scene.member.note()
        wait_for(lambda: "cut" in scene.effects, 5)
        scene.clock.now = deadline - 0.001  # as the heartbeat's thread read it
        lease.extend(deadline + 10)
        assert not lease.valid(deadline + 1)


def test_a_lease_that_is_nearly_over_when_its_work_begins_is_cut_at_its_deadline(scene: Scene) -> None:
    """The process was stopped while it took the lease: the guard has looked when there was no work."""
    scene.elected()
    lease = scene.member.lease
    assert lease is not None
    scene.member.note()  # the guard looks now, and then in a second
    time.sleep(0.05)
    left = 0.01
    scene.clock.now += lease.remaining() - left
    scene.take()
    scene.clock.now += left
    began = time.monotonic()
    wait_for(lambda: "cut" in scene.effects, 5)
    assert time.monotonic() - began < 0.7


def test_work_that_is_found_to_hang_during_a_heartbeat_loses_the_lease_at_a_later_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with contextlib.closing(Scene(monkeypatch)) as scene:
        scene.working()
        scene.member.config.drain_timeout = 0
        plain = Member.state.fget  # type: ignore[attr-defined]

        def state(member: Member) -> State:
            found: State = plain(member)
            if not member.wanted.hand_over:
                member.hand_over("a test asks for it", hangs=True)  # by another thread, just behind that look
            return found

        monkeypatch.setattr(Member, "state", property(state))
        for _ in range(3):
            scene.beat()
        assert scene.member.lease is None
