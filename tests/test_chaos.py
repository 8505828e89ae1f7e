"""The checker of tests/chaos.py can fail: each kind of violation is found, in a doctored history and in a real one
of a sabotaged ftpcoord.py.  The chaos itself is in test_chaos_postgresql.py, test_chaos_mysql.py and
test_chaos_sqlite.py.
"""

from __future__ import annotations

import copy
import io
import time
import zoneinfo
from collections.abc import Callable
from pathlib import Path

import chaos
import pytest
from chaos import Change, Command, Deadline, History, Life, Run, Said, Upload, check
from conftest import need, wait_for

import ftpcoord

# ----------------------------------------------------------------------------- doctored histories


def clean() -> History:
    """Two members, a takeover after a death, a file of each: all as it should be."""
    history = History(3.0, {"g": "move"})
    history.lives = {
        "a.1": Life("a.1", "a", 0.0, ended=10.0, roles=[(1.0, "elected", "g", 1)]),
        "b.1": Life("b.1", "b", 0.0, roles=[(12.5, "elected", "g", 2), (30.0, "released", "g", 2)]),
    }
    history.uploads = [Upload("v1", "g", "/in/x", 1.5, 100, 11), Upload("v2", "g", "/in/y", 1.6, 200, 22)]
    history.runs = [
        Run("a.1", "g", "/in/x", 1, 1, "v1", 100, 11, 2.0, 3.0, "end"),
        Run("a.1", "g", "/in/y", 1, 1, "v2", 200, 22, 9.5, 10.0),  # its parent was killed
        Run("b.1", "g", "/in/y", 2, 2, "v2", 200, 22, 13.0, 14.0, "end"),
    ]
    history.commands = [
        Command("a.1", "g", "move", "/in/x", 3.2, 3.2),
        Command("b.1", "g", "move", "/in/y", 14.2, 14.2),
    ]
    history.connections = [(1.1, "a.1", "g"), (12.6, "b.1", "g")]
    history.changes = [
        Change(1, 1.0, "token", "g", 1, "a"),
        Change(2, 1.9, "file", "g", 1, "a", "/in/x", 100, "claimed", 1),
        Change(3, 3.1, "file", "g", 1, "a", "/in/x", 100, "done", 1, "claimed"),
        Change(4, 3.3, "file", "g", 1, "a", "/in/x", 100, "", 1, "done"),
        Change(5, 9.4, "file", "g", 1, "a", "/in/y", 200, "claimed", 1),
        Change(6, 12.5, "token", "g", 2, "b"),
        Change(7, 12.9, "file", "g", 2, "b", "/in/y", 200, "claimed", 2, "claimed"),
        Change(8, 14.1, "file", "g", 2, "b", "/in/y", 200, "done", 2, "claimed"),
        Change(9, 14.3, "file", "g", 2, "b", "/in/y", 200, "", 2, "done"),
    ]
    history.deadlines = [
        Deadline("g", "x", 0.0, 8.0, 1008),
        Deadline("g", "y", 0.0, 11.0, 1011),
        Deadline("g", "z", 10.0, 15.0, 1015),
    ]
    history.changes += [
        Change(11, 12.8, "alarm", "g", 0, "b", "y*", 1011, "missing"),
        Change(12, 14.6, "alarm", "g", 0, "b", "/in/y", 1011, "late"),
        Change(13, 15.1, "alarm", "g", 0, "b", "z*", 1015, "missing"),
    ]
    history.said = [
        Said("b.1", "g", "missing", "y*", 1011),
        Said("b.1", "g", "late", "y", 1011),
        Said("b.1", "g", "missing", "z*", 1015),
    ]
    history.left.moved.update(["v1", "v2"])
    history.takeovers = history.clean_takeovers = [2.5]
    return history


def run(history: History, number: int, **changes: object) -> None:
    for name, value in changes.items():
        setattr(history.runs[number], name, value)


def second_handling(history: History) -> None:
    history.changes.insert(4, Change(10, 4.9, "file", "g", 1, "a", "/in/x", 100, "claimed", 2, "done"))
    history.runs.append(Run("a.1", "g", "/in/x", 1, 2, "v1", 100, 11, 5.0, 5.5, "end"))


def unexplained(history: History) -> None:
    """Twice in one term, with no failure between."""
    history.changes.insert(2, Change(10, 2.4, "file", "g", 1, "a", "/in/x", 100, "claimed", 2, "claimed"))
    run(history, 0, last=2.3)
    history.runs.append(Run("a.1", "g", "/in/x", 1, 2, "v1", 100, 11, 2.5, 3.0, "end"))


def silent_release(history: History) -> None:
    run(history, 1, outcome="end")
    history.lives["a.1"].roles.append((10.0, "released", "g", 1))


def stale_command(history: History) -> None:
    history.commands.append(Command("a.1", "g", "move", "/in/x", 13.5, 13.5))


DOCTORED: list[tuple[str, Callable[[History], object]]] = [
    ("overlap", lambda h: run(h, 1, last=13.2)),
    ("two active", lambda h: run(h, 1, last=13.6)),
    ("stale effect", lambda h: run(h, 1, begin=13.4, last=13.4)),
    ("stale effect", stale_command),
    ("lost", lambda h: run(h, 2, outcome="")),
    ("lost", lambda h: h.left.moved.subtract(["v1"])),
    ("lost", lambda h: h.left.moved.update(["v1"])),
    ("left behind", lambda h: h.left.inbox.add("v2")),
    ("handled twice", second_handling),
    ("handled twice", unexplained),
    ("handled twice", silent_release),
    ("attempt not counted", lambda h: run(h, 2, attempt=1)),
    ("no claim", lambda h: h.changes.pop(1)),
    ("no claim", lambda h: run(h, 0, attempt=4)),
    ("wrong content", lambda h: run(h, 0, size=99)),
    ("wrong content", lambda h: run(h, 0, crc=12)),
    ("removed too early", lambda h: setattr(h.changes[2], "at", 3.5)),
    ("removed too early", lambda h: h.changes.pop(2)),
    ("stale write", lambda h: setattr(h.changes[7], "term", 1)),
    ("stale write", lambda h: h.changes.append(Change(10, 15, "file", "g", 1, "a", "/in/y", 200, "done", 1))),
    ("term repeated", lambda h: setattr(h.changes[5], "term", 1)),
    ("term repeated", lambda h: h.lives["a.1"].roles.append((12.6, "elected", "g", 2))),
    ("standby connected", lambda h: h.connections.append((5.0, "b.1", "g"))),
    ("late takeover", lambda h: h.clean_takeovers.append(5.5)),
    ("deadline lost", lambda h: h.changes.pop(11)),
    ("deadline lost", lambda h: h.changes.pop(10)),
    ("deadline lost", lambda h: setattr(h.deadlines[2], "name", "w")),
    ("deadline lost", lambda h: setattr(h.deadlines[0], "by", 1.0)),
    ("deadline lost", lambda h: setattr(h.deadlines[0], "start", 5.0)),
    ("false alarm", lambda h: h.changes.append(Change(14, 9.0, "alarm", "g", 0, "b", "x*", 1008, "missing"))),
    ("false alarm", lambda h: setattr(h.deadlines[1], "by", 16.0)),
    ("alarm twice", lambda h: h.changes.append(h.changes[11])),
    ("alarm twice", lambda h: h.said.append(h.said[1])),
    ("alarm twice", lambda h: h.said.append(Said("a.1", "g", "missing", "z*", 1015))),
    ("alarm without its row", lambda h: setattr(h.changes[10], "size", 1012)),
    ("alarm unsaid", lambda h: h.said.pop()),
    ("stale write", lambda h: setattr(h.changes[9], "member", "a")),
    ("ended by itself", lambda h: h.troubles.append(chaos.Violation("ended by itself", "a.1"))),
]


def test_the_checker_finds_nothing_in_a_history_as_it_should_be() -> None:
    assert check(clean()) == []


@pytest.mark.parametrize(("kind", "doctor"), DOCTORED, ids=[f"{n}-{kind}" for n, (kind, _) in enumerate(DOCTORED)])
def test_the_checker_finds_each_kind_of_violation_in_a_doctored_history(
    kind: str, doctor: Callable[[History], object]
) -> None:
    history = clean()
    doctor(history)
    assert kind in {violation.kind for violation in check(history)}


@pytest.mark.parametrize("doctor", [DOCTORED[0][1], DOCTORED[1][1], DOCTORED[2][1], stale_command])
def test_a_stopped_parent_explains_what_its_command_did_meanwhile(doctor: Callable[[History], object]) -> None:
    history = clean()
    doctor(history)
    history.lives["a.1"].stops = [(9.9, 13.0)]
    assert check(history) == []
    history.lives["a.1"].stops = [(9.9, 11.0)]
    assert check(history) != [], "a stop that was over long before explains nothing"


def test_a_run_that_a_hand_over_cut_at_its_end_may_be_repeated() -> None:
    history = clean()
    silent_release(history)
    history.lives["a.1"].told = 10.0 - chaos.DRAIN
    assert check(history) == []


def test_who_loses_its_role_just_after_an_alarms_row_was_written_may_not_have_said_it() -> None:
    history = clean()
    history.said.pop()
    assert {violation.kind for violation in check(history)} == {"alarm unsaid"}
    history.lives["b.1"].roles.append((20.0, "lost", "g", 2))
    assert check(history) == []


def test_what_is_done_about_when_its_deadline_passes_may_have_an_alarm_or_none() -> None:
    history = clean()
    history.deadlines[1].by = 14.5
    assert check(history) == []
    del history.changes[9:11], history.said[:2]
    assert check(history) == []


def test_in_the_zone_of_the_chaos_each_minute_takes_a_few_seconds() -> None:
    noon = int(time.time())
    zone = zoneinfo.ZoneInfo.from_file(io.BytesIO(chaos.quick_zone(noon)))
    one = ftpcoord.Expectation("a from 12:04 by 12:05", zone)
    assert one.windows(noon, noon + 100)[0] == (noon + 4 * chaos.MINUTE, noon + 5 * chaos.MINUTE)
    assert one.next(noon + 5 * chaos.MINUTE) > noon + 70000, "the next one is tomorrow's"


def test_a_quarantined_file_is_not_a_lost_one() -> None:
    history = clean()
    history.runs = [one for one in copy.deepcopy(history.runs) if one.version != "v2"]
    history.commands.pop()
    history.left.inbox.add("v2")
    assert "lost" in {violation.kind for violation in check(history)}
    history.left.states["g", "/in/y"] = "quarantined"
    assert check(history) == []


# ----------------------------------------------------------------------------- a sabotaged member

# Leadership is a flag: it never expires by itself.
NO_DEADLINE = (
    "return min(self._deadline, self._latest) - (self._clock() if now is None else now)\n",
    "return 3600.0 if self._latest > 0 else self._latest\n",
)


def sabotaged(folder: Path, *edits: tuple[str, str]) -> Path:
    """A copy of ftpcoord.py with these places changed."""
    text = chaos.MODULE.read_text(encoding="utf-8")
    for old, new in edits:
        assert old in text, f"ftpcoord.py has changed: there is no {old!r} any more"
        text = text.replace(old, new)
    path = folder / "ftpcoord.py"
    path.write_text(text, encoding="utf-8")
    return path


def test_chaos_finds_out_a_leadership_that_never_expires(tmp_path: Path) -> None:
    """The active member's connection to the database goes dead while it handles files that take long."""
    need("postgresql")
    need("vsftpd")
    kinds = {"two active", "overlap"}
    (tmp_path / "sabotaged").mkdir()
    world = chaos.World("postgresql", ["vsftpd"], 1, tmp_path, sabotaged(tmp_path / "sabotaged", NO_DEADLINE))
    try:
        world.long_handlers = True
        inbox = world.inboxes[0]
        world.start()

        def active() -> str:
            world.run(0.1, faults=False)
            return next((slot for slot, member in world.members.items() if member.active(inbox.group)), "")

        found: set[str] = set()
        until = time.monotonic() + 40
        while not found & kinds and time.monotonic() < until:
            slot = wait_for(active, 20)
            world.run(1.0, faults=False)
            world.do("database black-holed", slot, inbox, 2.5 * world.liveness)
            world.run(2 * world.liveness, faults=False)
            world.collect()
            found = {violation.kind for violation in check(world.history)}
        assert found & kinds
    finally:
        world.close()
