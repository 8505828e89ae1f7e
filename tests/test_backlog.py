"""What waits, how much of it, since when and why: for an operator who asks whether work gets done."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hostile import FtpHost, Site
from members import PATIENCE, ftpcoord
from memory import Clock, config, found, row


def look(backlog: Any, *files: Any, rows: tuple[Any, ...] = (), busy: tuple[str, ...] = (), **settings: Any) -> Any:
    """The next poll over these files."""
    known, after = {one.path: one for one in rows}, ftpcoord.Backlog(settings.pop("route", None), backlog)
    selector = ftpcoord.Selector(config(**settings), ftpcoord.boot_clock)
    selector.choose(files, known.get, set(busy), after.add)
    return after


def reasons(backlog: Any) -> dict[str, str]:
    return {one["path"][len("/in/") :]: one["why"] for one in backlog.told()["first"]}


def test_what_is_listed_wanted_and_not_done_is_counted_and_says_why(clock: Clock) -> None:
    names = ["new.csv", "busy.csv", "done.csv", "odd.csv", "failed.csv", "acting.csv", "skip.txt", "large.csv"]
    files = [found(name, size=500 if name == "large.csv" else 10) for name in names]
    rows = (
        row("done.csv"),
        row("acting.csv", action="delete"),
        row("odd.csv", "quarantined"),
        row("failed.csv", "failed", due=clock.now + 60, error="no"),
    )
    seen = look(None, *files, rows=rows, busy=("/in/busy.csv", "/in/acting.csv"), pattern="*.csv", max_size=100)
    assert seen.files == 4 and seen.bytes == 10 + 10 + 10 + 500
    assert reasons(seen) == {
        "new.csv": "taken next, if it is at rest",
        "busy.csv": "in work",
        "failed.csv": "failed, tried again in 60 s: no",
        "large.csv": "larger than max_size: 500 bytes",
    }


@pytest.mark.parametrize("settings", [{"max_age": 1.0}, {"min_size": 11}, {"exclude": "*.csv"}])
def test_what_the_settings_leave_does_not_wait(clock: Clock, settings: dict[str, Any]) -> None:
    assert look(None, found(), **settings).files == 0


def test_a_file_without_its_companion_waits(clock: Clock) -> None:
    seen = look(None, found("a.csv"), found("b.csv"), found("b.csv.ok"), ready_suffix=".ok")
    assert seen.files == 2 and "is not there" in reasons(seen)["a.csv"]


def test_a_name_that_no_handler_takes_does_not_wait(clock: Clock) -> None:
    assert look(None, found("a.csv"), found("b.txt"), route=lambda name: name.endswith(".csv") and print).files == 1


def test_the_oldest_counts_from_when_it_was_first_seen_also_while_it_grows(clock: Clock) -> None:
    stats = ftpcoord.Stats()
    assert stats.backlog.told()["oldest"] == 0
    stats.backlog = look(stats.backlog, found("a.csv", size=1))
    clock.now += 100
    stats.backlog = look(stats.backlog, found("a.csv", size=2), found("b.csv"))
    clock.now += 10
    told = stats.backlog.told()
    assert told["oldest"] == 110 and [(one["path"], one["age"]) for one in told["first"]] == [
        ("/in/a.csv", 110),
        ("/in/b.csv", 10),
    ]
    # Done, and uploaded anew: it waits from then on.
    stats.file("failed", row("a.csv", "failed"))
    assert stats.backlog.told()["oldest"] == 110
    stats.file("done", row("a.csv"))
    assert stats.backlog.told()["oldest"] == 10
    stats.backlog = look(stats.backlog, found("a.csv"), found("b.csv"))
    clock.now += 1
    assert [one["age"] for one in stats.backlog.told()["first"]] == [11, 1]


def test_of_very_many_files_all_are_counted_and_the_memory_is_bounded(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ftpcoord, "MOST_WAITING", 50)
    seen = look(None, *[found(f"{number:03}") for number in range(200)])
    assert (seen.files, len(seen.waiting), len(seen.told()["first"])) == (200, 50, ftpcoord.FIRST_PATHS)
    clock.now += 5
    seen = look(seen, *[found(f"{number:03}") for number in reversed(range(200))])
    assert seen.told()["oldest"] == 5 and len(seen.waiting) <= 100, "what was known is kept"


def test_status_page_and_metrics_of_the_active_member_tell_its_backlog(tmp_path: Path) -> None:
    with FtpHost(files={"a": b"1", "b": b"22", "c": b"333"}) as host:
        with Site(tmp_path, host.settings, "handler", min_age=3600, pattern="a,b") as site:
            site.polls(2)
            status = ftpcoord.listener_status(site.listener, ftpcoord.Survey(site.listener.config))
            assert (status["backlog"]["files"], status["backlog"]["bytes"]) == (2, 3)
            assert 0 < status["backlog"]["oldest"] < PATIENCE
            told = ftpcoord.metrics([(site.listener, ftpcoord.Survey(site.listener.config))])
            found = dict(re.findall(r"^(ftpcoord_\w+)\{[^}]*\} (\S+)$", told, re.MULTILINE))
            assert found["ftpcoord_backlog_files"] == "2.0" and found["ftpcoord_backlog_bytes"] == "3.0"
            assert 0 < float(found["ftpcoord_oldest_waiting_seconds"]) < PATIENCE
            page = ftpcoord.page([status], 0)
            assert "/in/a" in page and "/in/b" in page and "/in/c" not in page
        ended = ftpcoord.own_status(site.listener)
        assert ended["backlog"] is None, "a standby does not know"
