"""Files that are expected by a time of day: what was missing is said once, by whoever is active then."""

from __future__ import annotations

import contextlib
import datetime
import json
import time
import types
import zoneinfo
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional, cast

import pytest
from conftest import Database, Files, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st
from members import PATIENCE, Crew, kinds, never
from test_dialects import Tables, row

import ftpcoord
from ftpcoord import Came, Change, ConfigError, Expectation, Fence, Outcome

UTC = datetime.timezone.utc
ZURICH = zoneinfo.ZoneInfo("Europe/Zurich")
HOUR, DAY = 3600.0, 86400.0


def at(text: str, zone: datetime.tzinfo = UTC) -> float:
    return datetime.datetime.fromisoformat(text).replace(tzinfo=zone).timestamp()


def came(*texts: str) -> list[Came]:
    return [Came(at(text), "/in/a.csv", 1) for text in texts]


def judged(
    text: str, seen: Sequence[Came], now: str, alarms: Sequence[str] = (), after: str = "2026-01-01"
) -> tuple[list[str], dict[str, str]]:
    """Missing deadlines and those with a late file, as minutes."""
    one = Expectation(text, UTC)
    windows = one.windows(at(after), at(now))
    missing, late = one.judge(windows, seen, {at(alarm) for alarm in alarms}, at(now))
    short = "%d %H:%M"

    def minute(seconds: float) -> str:
        return datetime.datetime.fromtimestamp(seconds, UTC).strftime(short)

    return [minute(end) for end in missing], {minute(end): minute(one.at) for end, one in late.items()}


# -- what is expected -------------------------------------------------------------------------------------------------


def test_days_alone_continue_the_expectation_before() -> None:
    parts = ftpcoord.expectations("a*.csv by 10:00 mon,wed , b.txt from 07:30 by 8:00, c by 23:59 mon-thu,sat", UTC)
    assert [one.text for one in parts] == [
        "a*.csv by 10:00 mon,wed",
        "b.txt from 07:30 by 8:00",
        "c by 23:59 mon-thu,sat",
    ]
    monday = at("2026-01-12T11:00")
    assert parts[0].next(monday) == at("2026-01-14T10:00")
    assert parts[1].windows(monday, monday)[0] == (at("2026-01-13T07:30"), at("2026-01-13T08:00"))


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("a.csv", "expect: 'a.csv' is not GLOB"),
        ("a.csv by 25:00", "expect: .*25"),
        ("a.csv by 10:61", "expect: .*61"),
        ("a.csv by 10:00 someday", "expect: .*someday"),
        ("a.csv from 9 by 10:00 x y", "expect: .* is not GLOB"),
        ("mon", "expect: 'mon' is not GLOB"),
        (r"re:a\d+[.]csv by 10:00", "expect: .* is not GLOB"),
    ],
)
def test_what_is_no_expectation_is_said(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config(expect=text)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"audit": "off"}, "expect: needs audit = on"),
        ({"timezone": ""}, "timezone: "),
        ({"audit_retention": 7}, "audit_retention: expect needs 8 days"),
    ],
)
def test_what_an_expectation_needs_is_said(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config(**changes)
    config(audit_retention=0)
    config(audit_retention=8)


def config(**changes: Any) -> ftpcoord.Config:
    values = {
        "url": "ftp://u@h/in",
        "database": "sqlite:///x",
        "audit": "on",
        "timezone": "UTC",
        "expect": "a by 10:00",
    }
    return ftpcoord.Config(**{**values, **changes})


def test_a_glob_is_for_the_name_or_with_a_slash_for_the_end_of_the_path() -> None:
    assert Expectation("a*.csv by 10:00", UTC).fits("/in/deep/a1.csv")
    assert Expectation("deep/a*.csv by 10:00", UTC).fits("/in/deep/a1.csv")
    assert not Expectation("deep/a*.csv by 10:00", UTC).fits("/in/a1.csv")
    for glob in ("in/a*.csv", "/in/a*.csv"):
        fits = Expectation(f"{glob} by 10:00", UTC).fits
        assert fits("in/a1.csv"), "below the login folder paths begin with no slash"
        assert fits("/home/in/a1.csv") and not fits("begin/a1.csv")


# -- what is missing --------------------------------------------------------------------------------------------------


def test_without_a_beginning_the_window_begins_at_the_deadline_before() -> None:
    assert judged("a.csv by 10:00", came("2026-01-12T10:01"), "2026-01-13T12:00", after="2026-01-12T12:00") == ([], {})
    assert judged("a.csv by 10:00", came("2026-01-12T09:59"), "2026-01-13T12:00", after="2026-01-12T12:00") == (
        ["13 10:00"],
        {},
    )


def test_with_a_beginning_what_came_before_does_not_count() -> None:
    text = "a.csv from 08:00 by 10:00"
    assert judged(text, came("2026-01-13T07:59"), "2026-01-13T12:00", after="2026-01-12T12:00") == (["13 10:00"], {})
    assert judged(text, came("2026-01-13T08:01"), "2026-01-13T12:00", after="2026-01-12T12:00") == ([], {})
    night = "a.csv from 22:00 by 02:00"
    assert judged(night, came("2026-01-12T23:00"), "2026-01-13T12:00", after="2026-01-12T12:00") == ([], {})


def test_one_that_ended_an_alarm_does_not_count_again() -> None:
    late = came("2026-01-13T11:00")
    assert judged("a.csv by 10:00", late, "2026-01-13T12:00", after="2026-01-12T12:00") == (
        [],
        {"13 10:00": "13 11:00"},
    )
    assert judged("a.csv by 10:00", late, "2026-01-14T12:00", after="2026-01-12T12:00")[0] == ["14 10:00"]
    both = came("2026-01-13T11:00", "2026-01-14T09:00")
    assert judged("a.csv by 10:00", both, "2026-01-14T12:00", after="2026-01-12T12:00")[0] == []


def test_one_that_came_in_a_window_of_its_own_ends_no_older_alarm() -> None:
    text, seen = "a.csv from 08:00 by 10:00", came("2026-01-14T09:00")
    assert judged(text, seen, "2026-01-14T12:00", after="2026-01-12T12:00") == (["13 10:00"], {})
    seen = came("2026-01-14T09:00", "2026-01-14T09:30")
    assert judged(text, seen, "2026-01-14T12:00", after="2026-01-12T12:00") == ([], {"13 10:00": "14 09:30"})


def test_a_deadline_that_has_its_alarm_was_not_met_whatever_is_known_now() -> None:
    seen = came("2026-01-13T09:00")
    assert judged("a.csv by 10:00", seen, "2026-01-13T12:00", ["2026-01-13T10:00"], "2026-01-12T12:00")[0] == [
        "13 10:00"
    ]


def test_only_on_its_days() -> None:
    assert judged("a.csv by 10:00 mon-fri", [], "2026-01-12T09:00", after="2026-01-09T12:00") == ([], {})
    assert judged("a.csv by 10:00 mon-fri", [], "2026-01-12T10:00", after="2026-01-09T12:00") == (["12 10:00"], {})


def test_deadlines_are_local_times_in_summer_and_winter() -> None:
    one = Expectation("a.csv by 10:00", ZURICH)
    ends = [w.end for w in one.windows(at("2026-03-27T12:00"), at("2026-03-30T12:00"))]
    assert ends[:3] == [at(f"2026-03-{day}T10:00", ZURICH) for day in (28, 29, 30)]
    assert [b - a for a, b in zip(ends, ends[1:])][:2] == [23 * HOUR, 24 * HOUR]


@settings(max_examples=300, deadline=None)
@given(st.sets(st.integers(1, 24 * 6 - 1), max_size=12), st.integers(0, 23), st.one_of(st.none(), st.integers(0, 23)))
def test_a_version_counts_once_and_every_deadline_is_met_missing_or_late(
    hours: set[int], by: int, start: Optional[int]
) -> None:
    """Beside a slow and obvious model, hour by hour."""
    zero = at("2026-01-12T00:00")
    seen = [Came(zero + hour * HOUR + 60, "/in/a.csv", 1) for hour in sorted(hours)]
    text = "a.csv " + (f"from {start:02}:00 " if start is not None else "") + f"by {by:02}:00"
    one = Expectation(text, UTC)
    windows = one.windows(zero, zero + 6 * DAY)
    missing, late = one.judge(windows, seen, (), zero + 6 * DAY)
    left, model_late = list(seen), {}
    model_open: list[float] = []
    met: set[float] = set()
    for minute in range(6 * 24 * 60 + 1):
        now = zero + minute * 60
        if left and left[0].at == now:
            event = left.pop(0)
            mine = [w.end for w in windows if w.start < now <= w.end and w.end not in met]
            if start is not None and mine:
                met.add(mine[0])
            elif model_open:
                model_late[model_open.pop(0)] = event
            elif mine:
                met.add(mine[0])
        model_open += [w.end for w in windows if w.end == now and now not in met]
    assert (missing, late) == (model_open, model_late)


# -- on each database -------------------------------------------------------------------------------------------------


@pytest.fixture
def store(database: Database) -> Iterator[ftpcoord.Database]:
    with contextlib.closing(Tables(database)) as tables:
        tables.apply()
        found = tables.open(audit=True)
        assert found.first("g", "a", 1) == 1
        yield found


def test_the_trail_tells_what_came_and_keeps_each_alarm_once(store: ftpcoord.Database) -> None:
    now, began = store.audited_since("g")
    assert abs(now - time.time()) < 30 and began is None
    fence = Fence("g", "a", 1)
    for path in ("/in/a-ä.csv", "/in/b.csv"):
        claim = row(path)
        store.write(fence, [Change(None, claim)])
        store.write(fence, [Change(claim, row(path, state="done"), outcome=Outcome("done"))])
    store.write(fence, [Change(row("/in/b.csv", state="done"), row("/in/b.csv"))])
    store.write(fence, [Change(row("/in/b.csv"), row("/in/b.csv", state="done"), outcome=Outcome("done"))])
    store.adopt("g", "a", [row("/in/a-adopted.csv")])
    seen = store.came("g", now - 100, "*.csv")
    assert sorted(path for _, path, _ in seen) == ["/in/a-ä.csv", "/in/b.csv"], "the first time alone"
    assert all(now - 1 < moment < now + 30 and term == 1 for moment, _, term in seen)
    assert [path for _, path, _ in store.came("g", now - 100, "a-*.csv")] == ["/in/a-ä.csv"]
    assert store.came("g", now + 1000, "*") == [] == store.came("other", 0, "*")
    began = store.audited_since("g")[1]
    assert began is not None and now - 1 < began < now + 30
    by = at("2026-01-12T10:00")
    words = "came, but is not done: /in/ä (failed)"
    assert store.alarm(fence, "f" * 64, "missing", "a*ä.csv", by, words)
    assert store.alarm(fence, "f" * 64, "missing", "a*ä.csv", by, "again")
    assert not store.alarm(Fence("g", "b", 1), "e" * 64, "missing", "x", by), "whoever holds the token says it"
    assert not store.alarm(Fence("g", "a", 2), "e" * 64, "missing", "x", by)
    assert not store.alarm(Fence("g", "a", 2), "f" * 64, "missing", "x", by), "what a term said is not for another"
    assert store.alarms("g", by, "f" * 64) == {("missing", by): (1, words)}
    assert store.alarm(fence, "f" * 64, "late", "/in/a-ä.csv", by, seconds=60.0)
    assert store.alarms("g", by, "f" * 64).keys() == {("missing", by), ("late", by)}
    assert store.alarms("g", by + 1, "f" * 64) == store.alarms("g", by, "e" * 64) == {}
    trail = [one["outcome"] for one in store.history("g", "2026-01-01")]
    assert trail.count("missing") == trail.count("late") == 1


@pytest.mark.parametrize("glob", ["[ab]*.csv", "[!x-z]?.csv", "x[[]1].csv", "b[]]*", "*"])
def test_what_came_is_found_by_whatever_a_glob_may_say(store: ftpcoord.Database, glob: str) -> None:
    fence = Fence("g", "a", 1)
    names = ("a1.csv", "b].csv", "x[1].csv", "z.csv")
    for name in names:
        claim = row(f"/in/{name}")
        store.write(fence, [Change(None, claim)])
        store.write(fence, [Change(claim, row(f"/in/{name}", state="done"), outcome=Outcome("done"))])
    fits = Expectation(f"{glob} by 10:00", UTC).fits
    found = {path for _, path, _ in store.came("g", 0, glob) if fits(path)}
    assert found == {f"/in/{name}" for name in names if fits(f"/in/{name}")} != set()


def test_what_came_below_the_login_folder_is_found_by_a_glob_with_a_slash(store: ftpcoord.Database) -> None:
    fence, claim = Fence("g", "a", 1), row("in/a.csv")
    store.write(fence, [Change(None, claim)])
    store.write(fence, [Change(claim, claim._replace(state="done"), outcome=Outcome("done"))])
    for glob in ("in/*.csv", "/in/*.csv"):
        assert [path for _, path, _ in store.came("g", 0, glob)] == ["in/a.csv"]


# -- members ----------------------------------------------------------------------------------------------------------


def minute(seconds: float) -> str:
    return time.strftime("%H:%M", time.gmtime(seconds))


def passed(crew: Crew) -> str:
    """A deadline of some minutes ago; the trail has a row from the day before."""
    crew.settings.update(audit="on", timezone="UTC")
    assert crew.call("adopt").returncode == 0
    crew.files.put("old.txt", b"1")
    assert crew.call("adopt").returncode == 0
    long_ago = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(time.time() - 1.5 * DAY))
    crew.database.execute(f"UPDATE file_audit SET at = '{long_ago}'")
    return minute(time.time() - 120)


def alarms(crew: Crew) -> int:
    ((count,),) = crew.database.execute("SELECT COUNT(*) FROM file_audit WHERE outcome = 'missing'")
    return int(count)


@kinds("sqlite", "mysql")
def test_what_did_not_come_is_said_once_over_restarts_and_takeovers_and_again_when_it_comes(
    database: Database, files: Files, tmp_path: Path
) -> None:
    with Crew(tmp_path, database, files) as crew:
        by = passed(crew)
        crew.settings["expect"] = f"a*.csv by {by}"
        first = crew.start("a")
        said = first.wait("file_missing")
        assert said.level == "error" and said.fields["path"] == "a*.csv" and by in said.fields["by"]
        wait_for(lambda: alarms(crew) == 2, PATIENCE, "yesterday's and today's")
        status = crew.status()
        assert [one["glob"] for one in status["missing"]] == ["a*.csv"] * 2 and not status["healthy"]
        done = crew.call("status", "--check")
        assert done.returncode == 1 and "no a*.csv was done by" in done.stdout
        first.kill()
        second = crew.start("b")
        second.wait("polled")
        never(lambda: second.events("file_missing"), 2.0, "said again")
        assert alarms(crew) == 2
        for name in ("a1.csv", "a2.csv"):
            files.put(name, b"1")
        wait_for(lambda: len(second.events("file_late")) == 2, PATIENCE)
        assert crew.status()["missing"] == []
        assert second.stop() == 0
        third = crew.start("c")
        third.wait("polled")
        never(lambda: third.events("file_late") or third.events("file_missing"), 2.0, "said again")


def test_a_single_run_says_what_did_not_come_and_the_next_one_does_not(crew: Crew, files: Files) -> None:
    crew.settings["expect"] = f"a*.csv by {passed(crew)}"
    for missed, late in ((2, 0), (0, 0), (0, 1)):
        if late:
            files.put("a1.csv", b"1")
        done = crew.run("run", "--once")
        assert done.returncode == 0
        said = done.stdout + done.stderr
        assert (said.count("file_missing"), said.count("file_late")) == (missed, late), said
    assert alarms(crew) == 2


def test_a_file_that_came_late_just_before_a_takeover_is_said_by_the_next_one(crew: Crew, files: Files) -> None:
    crew.settings["expect"] = f"a*.csv by {passed(crew)}"
    first = crew.start("a")
    wait_for(lambda: alarms(crew) == 2, PATIENCE, "yesterday's and today's")
    first.kill()
    files.put("a1.csv", b"1")
    assert crew.call("adopt").returncode == 0
    crew.database.execute("UPDATE file_audit SET outcome = 'done', term = 1 WHERE path LIKE '%a1.csv'")
    second = crew.start("b")
    assert second.wait("file_late").fields["path"].endswith("a1.csv")
    second.kill()
    third = crew.start("c")
    third.wait("polled")
    never(lambda: third.events("file_late") or third.events("file_missing"), 2.0, "said again")


def test_a_version_that_ended_an_alarm_ends_no_other_one_when_that_is_forgotten() -> None:
    """Two were missed, one came late: the second alarm stays as long as it is judged."""
    first, second, now = at("2026-01-12T10:00"), at("2026-01-13T10:00"), at("2026-01-20T12:00")
    seen = came("2026-01-13T11:00", *(f"2026-01-{day}T09:00" for day in range(14, 21)))
    rows = {("missing", first): ("a", ""), ("late", first): ("a", ""), ("missing", second): ("a", "")}
    database = types.SimpleNamespace(
        audited_since=lambda group: (now, at("2026-01-12T08:00")),
        came=lambda group, since, glob: [one for one in seen if one.at >= since],
        alarms=lambda group, since, file_id: {key: row for key, row in rows.items() if key[1] >= since},
    )
    (found,) = ftpcoord.judgements(config(expect="a.csv from 08:00 by 10:00"), cast(Any, database))
    assert found.missing == [second]
    assert second not in found.late
    del rows["late", first], rows["missing", second]  # an alarm that was never ended is forgotten for good
    (found,) = ftpcoord.judgements(config(expect="a.csv from 08:00 by 10:00"), cast(Any, database))
    assert list(found.late) == [second]


def test_what_could_not_be_said_because_the_answer_was_lost_is_said_at_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row was committed, but the member does not know."""
    found = config(database=f"sqlite:///{tmp_path}/db", member_id="a", coordination_group="g")
    store = ftpcoord.open_database(found)
    store.apply_schema()
    store.prepare()
    assert store.first("g", "a", 1) == 1
    store.adopt("g", "a", [row("/in/x")])
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(time.time() - 1.5 * DAY))
    store.execute(f"UPDATE file_audit SET at = '{began}'")
    said: list[tuple[str, Any]] = []
    monkeypatch.setattr(ftpcoord, "event", lambda name, *level, **fields: said.append((name, fields.get("by"))))
    lost: list[float] = []

    def open_database(config: ftpcoord.Config) -> ftpcoord.Database:
        database = ftpcoord.SQLite(config)
        alarm = database.alarm

        def loses(fence: Fence, file_id: str, outcome: str, path: str, by: float, **more: Any) -> bool:
            told = alarm(fence, file_id, outcome, path, by, **more)
            if by not in lost:
                lost.append(by)
                raise ftpcoord.DatabaseDown("no answer")
            return told

        monkeypatch.setattr(database, "alarm", loses)
        return database

    monkeypatch.setattr(ftpcoord, "open_database", open_database)
    looks = iter([True] * 6 + [False])
    member = types.SimpleNamespace(wait=lambda *args: None, may_work=lambda lease: next(looks))
    lease, ledger = ftpcoord.Lease(1, 1e9, time.monotonic), types.SimpleNamespace(all=list)
    ftpcoord.Judge(
        found, cast(Any, member), cast(Any, types.SimpleNamespace(lease=lease, ledger=ledger, listed=()))
    ).run()
    missing = [by for name, by in said if name == "file_missing"]
    assert len(missing) == len(set(missing)) == len(lost) >= 1


def test_what_came_in_time_is_not_missed_and_what_came_but_failed_is_said_so(crew: Crew, files: Files) -> None:
    by = passed(crew)
    crew.fail()
    files.put("a.csv", b"1")
    files.put("b.csv", b"1")
    one = crew.start("a", max_attempts=1)
    wait_for(lambda: list(crew.states().values()).count("quarantined") == 2, PATIENCE)
    assert one.stop() == 0
    earlier = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(time.time() - 600))
    crew.database.execute(f"UPDATE file_audit SET outcome = 'done', at = '{earlier}' WHERE path LIKE '%b.csv'")
    now = f"from {minute(time.time() - 1200)} by {by}"
    two = crew.start("b", expect=f"a.csv {now}, b.csv {now}")
    assert "came, but is not done: " in two.wait("file_missing", path="a.csv").fields["error"]
    assert "a.csv (quarantined)" in two.events("file_missing")[0].fields["error"]
    today = time.strftime("%Y-%m-%d", time.gmtime(time.time() - 120))
    assert not [one for one in two.events("file_missing", path="b.csv") if one.fields["by"].startswith(today)]


def test_a_deadline_is_judged_while_a_poll_is_far_away_and_none_before_the_first_row(crew: Crew) -> None:
    crew.settings.update(audit="on", timezone="UTC", expect=f"a.csv by {minute(time.time() - 120)}")
    member = crew.start("a")
    member.wait("polled")
    crew.files.put("other.txt", b"1")
    member.wait("file_done")
    never(lambda: member.events("file_missing"), 5.0, "nothing was expected yet")
    assert crew.status()["missing"] == []


def test_metrics_count_what_is_missing(crew: Crew) -> None:
    crew.settings["expect"] = f"a*.csv by {passed(crew)}"
    done = crew.call("status", "--json")
    assert len(json.loads(done.stdout)["missing"]) == 2, "told before anybody is active"
