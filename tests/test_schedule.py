"""When files are polled: cron fields, time zones, summer time, rounds; and the dates in move targets."""

from __future__ import annotations

import datetime
import functools
import itertools
import math
import os
import subprocess
import sys
import time
import types
import zoneinfo
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
import simulation
from conftest import Database, Files, wait_for
from croniter import croniter
from hostile import FtpHost, Site, reply
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from members import PATIENCE, Crew, Member, never, stores

import ftpcoord
from ftpcoord import Config, ConfigError, Pace, Schedule, as_in, cron_field, time_zone

ROOT = Path(__file__).resolve().parent.parent
UTC = zoneinfo.ZoneInfo("UTC")
ZURICH = "Europe/Zurich"
WEEK = 7 * 86400


def epoch(text: str, zone: str = "UTC", fold: int = 0) -> float:
    return datetime.datetime.fromisoformat(text).replace(tzinfo=zoneinfo.ZoneInfo(zone), fold=fold).timestamp()


def local(moment: Optional[float], zone: str) -> str:
    assert moment is not None
    return datetime.datetime.fromtimestamp(moment, zoneinfo.ZoneInfo(zone)).isoformat(" ", "minutes")


def following(text: str, after: float, zone: str, count: int) -> list[str]:
    """The next `count` scheduled minutes, as a clock on the wall of that zone shows them."""
    schedule, shown = Schedule(text, time_zone(zone)), []
    for _ in range(count):
        after = schedule.next(after)
        shown.append(local(after, zone))
    return shown


# -- fields -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "values"),
    [
        ("minute", "*", set(range(60))),
        ("minute", "*/20", {0, 20, 40}),
        ("minute", "05", {5}),
        ("minute", "1-9/4,30", {1, 5, 9, 30}),
        ("hour", "6-8,20", {6, 7, 8, 20}),
        ("hour", "*/7", {0, 7, 14, 21}),
        ("month", "Jan,mar-MAY", {1, 3, 4, 5}),
        ("month", "nov-12", {11, 12}),
        ("day of month", "*/10", {1, 11, 21, 31}),
        ("day of week", "mon-fri", {1, 2, 3, 4, 5}),
        ("day of week", "7", {0}),
        ("day of week", "fri-sun", {5, 6, 0}),
        ("day of week", "5-7", {5, 6, 0}),
        ("day of week", "sun-tue", {0, 1, 2}),
        ("day of week", "sun", {0}),
        ("day of week", "0-0", {0}),
        ("day of week", "sun-sun", {0}),
        ("day of week", "*/2", {0, 2, 4, 6}),
    ],
)
def test_a_field_is_read_as_crontab_does(name: str, text: str, values: set[int]) -> None:
    assert cron_field(text, name) == values


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("minute", "60"),
        ("minute", "-1"),
        ("minute", ""),
        ("minute", "1,"),
        ("minute", "9-1"),
        ("minute", "*/0"),
        ("minute", "*/"),
        ("minute", "*/-1"),
        ("minute", "5/10"),
        ("minute", "1-2-3"),
        ("minute", "1-"),
        ("minute", "1.5"),
        ("minute", "mon"),
        ("minute", "٣"),
        ("minute", "*/²"),
        ("minute", "1" * 5000),
        ("minute", "*5"),
        ("minute", "?"),
        ("hour", "24"),
        ("day of month", "0"),
        ("day of month", "L"),
        ("day of month", "32"),
        ("month", "0"),
        ("month", "13"),
        ("month", "january"),
        ("month", "jan-"),
        ("day of week", "8"),
        ("day of week", "sat-mon"),
        ("day of week", "mon#1"),
        ("day of week", "jan"),
        ("day of week", ""),
    ],
)
def test_what_is_no_field_is_an_error_that_tells_the_part(name: str, text: str) -> None:
    with pytest.raises(ValueError) as caught:
        cron_field(text, name)
    assert str(caught.value).endswith(f" is no {name}")


@pytest.mark.parametrize("text", ["", "* * * *", "0 * * * * *", "@daily", "0 6 * * *;", "0 6 * * * ; ; 0 7 * * *"])
def test_a_line_has_five_fields(text: str) -> None:
    with pytest.raises(ValueError, match="has not the five fields minute, hour, day of month, month, day of week"):
        Schedule(text, UTC)


# -- the next minute --------------------------------------------------------------------------------------------------


def test_the_minute_that_begins_is_not_the_next_one() -> None:
    minute = epoch("2026-03-02 10:00")
    schedule = Schedule("*/5 * * * *", UTC)
    assert schedule.next(minute - 0.001) == minute
    assert schedule.next(minute) == schedule.next(minute + 299.999) == minute + 300


def test_several_lines_are_one_schedule() -> None:
    after = epoch("2026-03-06 05:59", ZURICH)  # a Friday
    assert following("*/30 6-7 * * mon-fri; 15 22 * * sat", after, ZURICH, 6) == [
        "2026-03-06 06:00+01:00",
        "2026-03-06 06:30+01:00",
        "2026-03-06 07:00+01:00",
        "2026-03-06 07:30+01:00",
        "2026-03-07 22:15+01:00",
        "2026-03-09 06:00+01:00",
    ]


def test_day_of_month_or_weekday_is_enough_and_with_a_star_both_are_needed() -> None:
    after = epoch("2026-05-01 12:00")
    days = [text[:10] for text in following("0 0 13 * fri", after, "UTC", 4)]
    assert days == ["2026-05-08", "2026-05-13", "2026-05-15", "2026-05-22"]
    days = [text[:10] for text in following("0 0 */2 * fri", after, "UTC", 3)]
    assert days == ["2026-05-15", "2026-05-29", "2026-06-05"]  # Fridays with an odd number


def test_a_minute_that_is_years_away_is_found_and_one_that_never_comes_is_told() -> None:
    assert Schedule("0 0 29 2 *", UTC).next(epoch("2096-03-01 00:00")) == epoch("2104-02-29 00:00")
    assert Schedule("0 0 30 2 *", UTC).next(epoch("2026-03-01 00:00")) == math.inf
    assert Schedule("0 0 31 4,6,9,11 *", UTC).next(epoch("2026-03-01 00:00")) == math.inf


def test_a_minute_that_the_clock_jumps_over_is_the_first_one_after_it() -> None:
    after = epoch("2026-03-28 12:00", ZURICH)
    expected = ["2026-03-29 03:00+02:00", "2026-03-30 02:30+02:00"]
    assert following("30 2 * * *", after, ZURICH, 2) == expected
    expected = ["2026-03-29 01:50+01:00", "2026-03-29 03:00+02:00", "2026-03-29 03:10+02:00"]
    assert following("*/10 1-3 29 * *", epoch("2026-03-29 01:40", ZURICH), ZURICH, 3) == expected
    # At midnight, by half an hour, and a whole day that Samoa left out.
    assert following("5 0 * * *", epoch("2026-04-23 23:00", "Africa/Cairo"), "Africa/Cairo", 2) == [
        "2026-04-24 01:00+03:00",
        "2026-04-25 00:05+03:00",
    ]
    assert following("15 2 4 10 *", epoch("2026-10-04 00:00", "Australia/Lord_Howe"), "Australia/Lord_Howe", 1) == [
        "2026-10-04 02:30+11:00"
    ]
    assert following("0 12 * * *", epoch("2011-12-29 12:00", "Pacific/Apia"), "Pacific/Apia", 2) == [
        "2011-12-31 00:00+14:00",
        "2011-12-31 12:00+14:00",
    ]


def test_of_a_repeated_hour_a_fixed_one_is_the_first_and_a_star_means_both() -> None:
    after = epoch("2026-10-25 01:50", ZURICH)
    assert following("30 2 * * *", after, ZURICH, 2) == ["2026-10-25 02:30+02:00", "2026-10-26 02:30+01:00"]
    expected = ["2026-10-25 02:30+02:00", "2026-10-25 02:30+01:00", "2026-10-25 03:30+01:00"]
    assert following("30 * * * *", after, ZURICH, 3) == expected
    expected = ["2026-10-25 02:30+02:00", "2026-10-25 02:30+01:00", "2026-10-25 04:30+01:00"]
    assert following("30 */2 * * *", after, ZURICH, 3) == expected
    # Where the hour before midnight comes again, its second pass is of the day before.
    expected = ["2026-10-29 23:30+03:00", "2026-10-29 23:30+02:00", "2026-10-30 00:30+02:00"]
    assert following("30 * * * *", epoch("2026-10-29 23:00", "Africa/Cairo"), "Africa/Cairo", 3) == expected
    # Newfoundland put its clock back at a minute past midnight: 00:00 was before the second 23:30.
    expected = ["2010-11-06 23:59-02:30", "2010-11-07 00:00-02:30", "2010-11-06 23:30-03:30"]
    after = epoch("2010-11-06 23:58", "America/St_Johns")
    assert following("59 23 * * *; 0,30 * * * *", after, "America/St_Johns", 3) == expected


# -- against others ---------------------------------------------------------------------------------------------------

VALUES = {"minute": (0, 59), "hour": (0, 23), "day of month": (1, 31), "month": (1, 12), "day of week": (0, 6)}


@st.composite
def fields(draw: st.DrawFn, name: str, steps_of_all: bool = True) -> str:
    least, most = VALUES[name]
    names = ftpcoord.CRON_FIELDS[name][2].split()
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(least, most))
        end = draw(st.integers(min(start + 1, most), most))
        by = draw(st.integers(1, most))
        word = names[start - least] if len(names) > 0 and draw(st.booleans()) else f"{start}"
        ranges = [f"{start}-{end}", f"{start}-{end}/{by}"] if start < end else []
        parts.append(draw(st.sampled_from([word, word, *ranges])))
    stars = ["*", f"*/{draw(st.integers(1, 12))}"] if steps_of_all else ["*"]
    return draw(st.sampled_from([*stars, ",".join(parts)]))


def lines(steps_of_all_days: bool = True) -> st.SearchStrategy[str]:
    of_days = ("day of month", "day of week")
    each = [fields(name, steps_of_all_days or name not in of_days) for name in VALUES]
    return st.tuples(*each).map(" ".join)


@given(lines(steps_of_all_days=False), st.integers(1_500_000_000, 2_500_000_000))
@settings(max_examples=60, deadline=None)
def test_in_utc_another_implementation_finds_the_same_minutes(line: str, start: int) -> None:
    """With steps of `*` in the days implementations differ: there the model below speaks."""
    schedule, other = Schedule(line, UTC), croniter(line, start, max_years_between_matches=8)
    after: float = start
    for _ in range(3):
        after = schedule.next(after)
        try:
            expected = other.get_next(float)
        except Exception:  # croniter's own for a date that it does not find
            expected = math.inf
        assume(expected == math.inf or expected < start + 7.9 * 365 * 86400)
        assert after == expected
        if expected == math.inf:
            break


values = functools.lru_cache(maxsize=None)(cron_field)


def covers(line: str, wall: datetime.datetime) -> bool:
    minute, hour, day, month, weekday = line.split()
    of_month = wall.day in values(day, "day of month")
    of_week = wall.isoweekday() % 7 in values(weekday, "day of week")
    both = day.startswith("*") or weekday.startswith("*")
    return (
        wall.minute in values(minute, "minute")
        and wall.hour in values(hour, "hour")
        and wall.month in values(month, "month")
        and (of_month and of_week if both else of_month or of_week)
    )


def walked(line: str, zone: datetime.tzinfo, start: int, end: int) -> list[int]:
    """The model: a clock on a wall that is looked at every minute."""
    found, one, lines = [], datetime.timedelta(minutes=1), line.split(";")
    before = datetime.datetime.fromtimestamp(start - 60, zone)
    for moment in range(start, end, 60):
        now = datetime.datetime.fromtimestamp(moment, zone)
        shown, jumped = [], before.replace(tzinfo=None, fold=0) + one
        while jumped < now.replace(tzinfo=None, fold=0):  # the minutes that the wall never showed
            shown.append(jumped)
            jumped += one
        for line in lines:
            first = not now.fold or line.split()[1].startswith("*")
            if any(covers(line, wall) for wall in shown) or (first and covers(line, now)):
                found.append(moment)
                break
        before = now
    return found


CHANGES = {
    "Europe/Zurich": ["2026-03-29", "2026-10-25"],
    "America/New_York": ["2026-03-08", "2026-11-01"],
    "Africa/Cairo": ["2026-04-24", "2026-10-29"],
    "Australia/Lord_Howe": ["2026-04-05", "2026-10-04"],
    "America/St_Johns": ["2010-03-14", "2010-11-07"],
    "Asia/Kathmandu": ["2026-01-01"],
    "America/Santiago": ["2026-04-05", "2026-09-06"],
}


@given(
    st.sampled_from([(zone, day) for zone, days in CHANGES.items() for day in days]),
    st.tuples(fields("minute"), fields("hour")).map(" ".join),
    st.sampled_from(["* * *", "*/2 * *", "* * sun", "1-7 * sun", "*/3 * 0,6", "* 3-11 *", "25-31 * *"]),
    st.integers(-6, 6),
)
@settings(max_examples=25, deadline=None)
def test_the_next_minute_is_the_one_that_a_clock_on_the_wall_comes_to(
    change: tuple[str, str], times: str, days: str, hours: int
) -> None:
    zone, line = zoneinfo.ZoneInfo(change[0]), f"{times} {days}"
    start = int(epoch(f"{change[1]} 00:00")) + hours * 3600
    end = start + 7 * 3600
    expected, schedule = walked(line, zone, start, end), Schedule(line, zone)
    found: list[float] = []
    moment = schedule.next(start - 1)
    while moment is not None and moment < end and len(found) < 10:
        found.append(moment)
        moment = schedule.next(moment)
    assert found == expected[:10]


# -- zones ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Zurich", "Europe", "Europe/Nowhere", "../x", "/etc/passwd", "", "a\0b", "x" * 5000])
def test_what_is_no_zone_is_an_error_that_names_the_setting(name: str) -> None:
    with pytest.raises(ConfigError, match="timezone: the IANA database has no "):
        time_zone(name)


def test_a_system_without_zones_is_told_what_to_install() -> None:
    code = """
import sys
sys.modules["tzdata"] = None
import ftpcoord
assert "zoneinfo" not in sys.modules, "it is imported only when a zone is needed"
try:
    ftpcoord.time_zone("Europe/Zurich")
except ftpcoord.ConfigError as exc:
    print(exc)
"""
    environ = {**os.environ, "PYTHONTZPATH": "", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert ran.stdout == "timezone: this system has no database of time zones; pip install tzdata\n"


# -- settings ---------------------------------------------------------------------------------------------------------

FAR = "0 0 29 2 *"  # a schedule whose next minute is, nearly always, more than a test away


def config(**changes: Any) -> Config:
    return Config(url="sftp://me@files.example/inbox", database="postgresql://app@db.example/app", **changes)


@pytest.mark.parametrize(
    ("error", "changes"),
    [
        ("timezone: schedule, expect and {date:...} need one, like Europe/Zurich", {"schedule": "* * * * *"}),
        ("timezone: schedule, expect and {date:...} need one", {"after": "move:done/{date:%Y}"}),
        ("timezone: schedule, expect and {date:...} need one", {"after_error": "move:bad/{date:%j}"}),
        ("timezone: the IANA database has no 'Mars/Olympus'", {"timezone": "Mars/Olympus"}),
        ("schedule: '60' is no minute", {"schedule": "60 * * * *", "timezone": "UTC"}),
        ("schedule: has not the five fields", {"schedule": "@hourly", "timezone": "UTC"}),
        ("schedule: '0 0 30 feb *' never comes", {"schedule": "0 0 30 feb *", "timezone": "UTC"}),
        ("after: must be keep, delete or move:FOLDER", {"after": "move:{date:%H}", "timezone": "UTC"}),
        ("after: must be", {"after": "move:{date}", "timezone": "UTC"}),
        ("after: must be", {"after": "move:{date:}", "timezone": "UTC"}),
        ("after: must be", {"after": "move:{date:today}", "timezone": "UTC"}),
        ("after: must be", {"after": "move:{date:%Y/..}", "timezone": "UTC"}),
        ("after: must be", {"after": "move:{date:%Y", "timezone": "UTC"}),
        ("after: must be", {"after": "move:a/{date:%Y%%}", "timezone": "UTC"}),
        ("after: must be", {"after": "move:a/{date:%Y}{date:%s}", "timezone": "UTC"}),
        ("after_error: must be", {"after_error": "move:{date:%Y-%M}", "timezone": "UTC"}),
        ("exec: {date:...} is for after and after_error", {"exec": "cp {file} /archive/{date:%Y%m%d}/"}),
        ("download_dir: {date:...} is for after and after_error", {"download_dir": "/in/{date:%Y%m%d}"}),
        ("requires: {date:...} is for after and after_error", {"requires": "{stem}-{date:%Y}.ok"}),
        ("checksum: {date:...} is for after and after_error", {"checksum": "{name}-{date:%Y}.md5"}),
        (
            "expect: {date:...} is for after and after_error",
            {"expect": "a-{date:%Y%m%d}.csv by 07:00", "audit": "on", "timezone": "UTC"},
        ),
        ("url, folders, pattern, exclude: {date:...} is for after and after_error", {"pattern": "{date:%Y}/*.csv"}),
        ("url, folders, pattern, exclude: {date:...} is for after and after_error", {"exclude": "{date:%Y}/*.csv"}),
        (
            "url, folders, pattern, exclude: {date:...} is for after and after_error",
            {"url": "sftp://me@h", "folders": "/in/{date:%Y}", "coordination_group": "g"},
        ),
        (
            "url, folders, pattern, exclude: {date:...} is for after and after_error",
            {"url": "sftp://me@h/in/{date:%25Y}/"},
        ),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_connected(error: str, changes: dict[str, str]) -> None:
    settings = {"url": "sftp://me@files.example/inbox", "database": "postgresql://app@db.example/app", **changes}
    with pytest.raises(ConfigError) as caught:
        Config(**settings)
    name, _, told = error.partition(": ")
    assert str(caught.value).startswith(f"{name}: ") and told in str(caught.value)
    environ = {f"FTPCOORD_{setting.upper()}": value for setting, value in settings.items()}
    with pytest.raises(ConfigError, match=f"^FTPCOORD_{name.upper()}: " if name.isidentifier() else f"^{name}: "):
        Config.from_env(environ)


def test_what_is_not_set_needs_no_zone_and_literal_percent_signs_and_braces_are_names() -> None:
    assert config().minutes is None
    assert config(after="move:50%/{a}").action("move:50%/{a}") == "move:50%/{a}"
    patterns = ftpcoord.Patterns(config(pattern="20*/*.csv", recursive=True))  # instead of dates in url or pattern
    assert patterns.want("20260101/a.csv") and not patterns.want("a.csv") and not patterns.leave_out("20260101")


# -- rounds -----------------------------------------------------------------------------------------------------------


class Wall:
    """A clock on the wall, which can be set, instead of the module `time`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
        self.now = epoch(text)
        monkeypatch.setattr(ftpcoord, "time", types.SimpleNamespace(time=lambda: self.now))


def pauses_of(pace: Pace, ended: bool) -> Iterator[float]:
    """After a poll without trouble; whether the round has ended."""
    pace.left(False, not ended)
    return pace.pauses(None)


def test_within_a_round_polling_interval_counts_and_without_a_schedule_always(monkeypatch: pytest.MonkeyPatch) -> None:
    wall = Wall(monkeypatch, "2026-03-02 10:00")
    scheduled = config(schedule="0 * * * *", timezone="UTC", polling_interval=9.5)
    for pace, ended in ((Pace(scheduled), False), (Pace(config(polling_interval=9.5)), True)):
        pace.poll_begins()
        wall.now += 7200
        assert list(pauses_of(pace, ended)) == [9.5]


def test_trouble_is_waited_for_as_long_as_it_says_whatever_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    Wall(monkeypatch, "2026-03-02 10:00")
    pace = Pace(config(schedule="0 12 * * *", timezone="UTC"))
    pace.poll_begins()
    assert next(pace.pauses(3.5)) == 3.5 and next(pace.pauses(None)) == 60


def test_after_a_round_the_next_scheduled_minute_is_waited_for_and_looked_for_each_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wall = Wall(monkeypatch, "2026-03-02 10:00:12")
    pace = Pace(config(schedule="5 10 * * *", timezone="UTC"))
    pace.poll_begins()
    wall.now += 3
    waited = []
    for seconds in pauses_of(pace, True):
        waited.append(seconds)
        wall.now += seconds
    assert waited == [60, 60, 60, 60, 45] and wall.now == epoch("2026-03-02 10:05")


def test_a_minute_that_passes_during_a_poll_starts_the_next_round_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    wall = Wall(monkeypatch, "2026-03-02 10:04:59")
    pace = Pace(config(schedule="5 10 * * *", timezone="UTC"))
    pace.poll_begins()
    wall.now += 7200
    assert list(pauses_of(pace, True)) == []
    pace.poll_begins()
    assert next(pauses_of(pace, True)) == 60.0


def test_a_clock_that_is_set_forward_or_back_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    wall = Wall(monkeypatch, "2026-03-02 10:00")
    pace = Pace(config(schedule="0 12 * * *", timezone="UTC"))
    pace.poll_begins()
    pauses = pauses_of(pace, True)
    assert next(pauses) == 60
    wall.now = epoch("2026-03-02 12:00:01")
    assert list(pauses) == []
    pace.poll_begins()
    pauses = pauses_of(pace, True)
    assert next(pauses) == 60
    wall.now = epoch("2026-03-02 11:59:50")  # tomorrow's noon was next, and today's comes again
    assert next(pauses) == pytest.approx(10)
    wall.now += 10
    assert list(pauses) == []
    pace.poll_begins()
    wall.now = epoch("1999-01-01 00:00")
    pauses = pauses_of(pace, True)
    next(pauses)
    wall.now = epoch("1999-01-01 12:00")
    assert list(pauses) == []


@given(
    st.sampled_from(["* * * * *", "*/7 * * * *", "30 1,2 * * *", "*/20 2 * * *; 59 0-3 * * sun"]),
    st.lists(st.tuples(st.booleans(), st.integers(1, 2000)), min_size=1, max_size=12),
)
@settings(max_examples=50, deadline=None)
def test_no_scheduled_minute_is_without_a_poll_that_begins_after_it(line: str, polls: list[tuple[bool, int]]) -> None:
    """The model walks all minutes: each is followed by the begin of a poll within what polls and their pauses take."""
    with pytest.MonkeyPatch.context() as patch:
        wall = Wall(patch, "2026-10-25 00:17:31")
        start = wall.now
        pace = Pace(config(schedule=line, timezone=ZURICH))
        begins, late = [], 0.0
        for ended, took in polls:
            begins.append(wall.now)
            pace.poll_begins()
            wall.now += took
            due = wall.now
            for seconds in pauses_of(pace, ended):
                assert 0 < seconds <= 60
                wall.now += seconds
            late = max(late, took + 60.0)
            assert wall.now - due <= 60 or ended
        begins.append(wall.now)
        minutes = walked(line, zoneinfo.ZoneInfo(ZURICH), int(start // 60 * 60 + 60), int(wall.now) + 1)
        for minute in minutes:
            assert any(minute <= begin <= minute + late for begin in begins), (minute, begins)
        for (ended, _), begin, after in zip(polls, begins, begins[1:]):
            if ended:  # and a round begins at no other time
                assert any(begin < minute <= after for minute in minutes)


def test_a_member_polls_until_nothing_waits_and_then_not_before_the_next_round(tmp_path: Path) -> None:
    """Files left by max_files, too young ones, and one that fails twice."""

    class Flaky(Site):
        def receive(self, file: ftpcoord.File) -> None:
            if file.name == "b" and file.attempt < 3:
                raise RuntimeError
            super().receive(file)

    changes: dict[str, Any] = {"max_files": 1, "min_age": 0.3, "stall_timeout": 0.5, "polling_interval": 0.2}
    with FtpHost(files=dict.fromkeys("abcd", b"x")) as host:
        with Flaky(tmp_path, host.settings, "handler", schedule=FAR, timezone="UTC", **changes) as site:
            listener, polls = site.listener, list[float]()

            def ended() -> bool:
                polls.append(len(site.all("polled")))
                return len(polls) > 70 and polls[-1] == polls[-70]  # for more than a second

            wait_for(lambda: sorted(site.delivered()) == list("abcd"), PATIENCE)
            wait_for(ended, PATIENCE)
            host.put("late", b"x", 7)
            never(lambda: len(site.all("polled")) > polls[-1], 1.0, "a poll after the end of the round")
            assert not site.all("lost") and not site.all("handing_over"), "waiting is no hang"
            assert ftpcoord.why_unready(listener) == "" and ftpcoord.why_stuck(listener) == ""
            began = time.monotonic()
        assert time.monotonic() - began < 3, "a stop does not wait for the next round"
    assert "late" not in site.delivered()


def test_a_scheduled_minute_starts_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Schedule, "next", lambda self, after: (after // 0.7 + 1) * 0.7)  # very short minutes
    changes: dict[str, Any] = {"schedule": "* * * * *", "timezone": "UTC", "polling_interval": 0.05}
    with FtpHost() as host, Site(tmp_path, host.settings, **changes) as site:
        began = time.monotonic()
        site.polls(4)
        assert time.monotonic() - began > 2 * 0.7
        for number in range(3):
            host.put(f"{number}", b"x", number)
            wait_for(functools.partial(lambda name: name in site.delivered(), f"{number}"), PATIENCE)


def test_a_minute_that_comes_at_the_end_of_a_poll_starts_another_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minute = [1e12]
    poll = ftpcoord.Poller.poll

    def polled(self: ftpcoord.Poller) -> None:
        poll(self)
        minute[0] = min(minute[0], time.time())  # once, after all was listed

    monkeypatch.setattr(Schedule, "next", lambda self, after: minute[0] if minute[0] > after else after + 3600)
    monkeypatch.setattr(ftpcoord.Poller, "poll", polled)
    with FtpHost() as host, Site(tmp_path, host.settings, schedule=FAR, timezone="UTC") as site:
        site.wait("polled", 2)
        never(lambda: len(site.all("polled")) > 2, 0.7, "a third poll")


def test_a_file_that_is_in_work_keeps_the_round_going_as_it_may_fail(tmp_path: Path) -> None:
    class Slow(Site):
        def receive(self, file: ftpcoord.File) -> None:
            if file.attempt == 1:
                time.sleep(0.6)
                raise RuntimeError
            super().receive(file)

    with FtpHost(files={"a": b"x"}) as host:
        with Slow(tmp_path, host.settings, "handler", schedule=FAR, timezone="UTC") as site:
            wait_for(lambda: "a" in site.delivered(), PATIENCE)


def test_a_failed_poll_is_repeated_within_the_round(tmp_path: Path) -> None:
    with FtpHost(files={"a": b"x"}) as host:
        host.on("MLSD", reply("451 not now"), 2)
        host.on("LIST", reply("451 not now"), 2)
        with Site(tmp_path, host.settings, schedule=FAR, timezone="UTC") as site:
            wait_for(lambda: "a" in site.delivered(), PATIENCE)
            assert site.all("server_down")


def test_a_file_that_goes_on_growing_and_one_that_is_told_not_now_keep_the_round_going(tmp_path: Path) -> None:
    class Late(Site):
        def receive(self, file: ftpcoord.File) -> None:
            if file.attempt < 4:
                raise ftpcoord.TryLater
            super().receive(file)

    with FtpHost(files={"grows": b"x"}) as host:
        with Late(tmp_path, host.settings, "handler", schedule=FAR, timezone="UTC", settle=0.2) as site:
            for size in range(2, 6):
                polls = len(site.all("polled"))
                wait_for(functools.partial(lambda polls: len(site.all("polled")) > polls, polls), PATIENCE)
                host.put("grows", b"x" * size)
            wait_for(lambda: site.delivered() == {"grows": b"xxxxx"}, PATIENCE)


def test_an_after_action_that_fails_is_tried_again_within_the_round(tmp_path: Path) -> None:
    with FtpHost(files={"a": b"x"}) as host:
        host.on("DELE", reply("450 busy"), 1)
        changes = {"schedule": FAR, "timezone": "UTC", "after": "delete"}
        with Site(tmp_path, host.settings, **changes) as site:
            wait_for(lambda: not host.files, PATIENCE, "the file to be deleted")
            assert site.delivered() == {"a": b"x"}


def test_a_missing_companion_does_not_prolong_the_round(tmp_path: Path) -> None:
    with FtpHost(files={"a": b"x"}) as host:
        with Site(tmp_path, host.settings, schedule=FAR, timezone="UTC", ready_suffix=".ok") as site:
            site.wait("polled")
            never(lambda: len(site.all("polled")) > 1, 1.0, "another poll")


def round_ends(member: Member) -> None:
    """Waits until a member has polled and found nothing left to do."""
    idle = [0, 0.0]

    def ended() -> bool:
        if idle[0] != member.polls():
            idle[:] = member.polls(), time.monotonic()
        return time.monotonic() - idle[1] > 1.5  # more than three times its polling_interval

    wait_for(ended, PATIENCE)


def test_a_newly_elected_member_starts_a_round_at_once(crew: Crew) -> None:
    crew.settings.update(schedule=FAR, timezone="UTC")
    crew.files.put("first.txt", b"x")
    crew.start("a")
    crew.handled("first.txt")
    crew.start("b").wait("standby")
    round_ends(crew.active())
    crew.files.put("killed.txt", b"x")
    crew.active().process.kill()
    crew.handled("first.txt", "killed.txt")
    crew.start("c").wait("standby")
    round_ends(crew.active())
    crew.files.put("stepped-down.txt", b"x")
    assert crew.call("step-down").returncode == 0
    crew.handled("first.txt", "killed.txt", "stepped-down.txt")


def test_takeovers_between_scheduled_minutes_lose_no_round() -> None:
    """Worlds with a round each minute: what was uploaded is handled although members come and go between."""
    totals = simulation.run_worlds(5_000, 1, files=True, schedule="* * * * *", intervals=(1, 8))
    assert totals.elections > totals.worlds > 3


def test_run_once_ignores_the_schedule(crew: Crew) -> None:
    for number in range(3):
        crew.files.put(f"{number}.txt", b"x")
    done = crew.run("run", "--once", schedule=FAR, timezone="UTC", max_files=1)
    assert done.returncode == 0, done.stdout
    crew.handled("0.txt", "1.txt", "2.txt")


def test_run_once_without_its_folder_ends_with_1_and_says_why(crew: Crew) -> None:
    crew.files.put("a.txt", b"x")
    done = crew.run("run", "--once", download_dir=str(crew.folder / "missing"), exec=None)
    assert done.returncode == 1 and str(crew.folder / "missing") in done.stdout + done.stderr
    assert crew.files.names() == ["a.txt"] and not crew.ledger()


def test_status_the_terminal_and_the_page_tell_the_next_round(crew: Crew) -> None:
    crew.settings.update(schedule="30 4 * * *", timezone=ZURICH)
    expected = Schedule("30 4 * * *", time_zone(ZURICH)).next(time.time())
    status = crew.status()
    assert status["next_round"] == expected
    told = f"the schedule starts a round of polls at {ftpcoord.moment(status['next_round'])} UTC"
    assert told in status["notes"] and told in crew.call("status").stdout
    listener = ftpcoord.Listener(**{**crew.settings, "member_id": "a", "exec": "true"})
    shown = ftpcoord.listener_status(listener, ftpcoord.Survey(listener.config))
    assert shown["next_round"] == expected and told in ftpcoord.page([shown], 0)
    assert crew.call("status", "--json", schedule=None).stdout.count('"next_round": null') == 1


# -- dates in move targets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "zone", "moment", "expected"),
    [
        ("move:done/{date:%Y%m%d}", "UTC", "2026-03-01 00:00", "move:done/20260301"),
        ("move:done/{date:%Y%m%d}", "America/New_York", "2026-03-01 00:00", "move:done/20260228"),
        ("move:{date:%y}/w{date:%j_%d}x/{date:%m}", "Pacific/Auckland", "2025-12-31 12:00", "move:26/w001_01x/01"),
        ("move:/a/{date:%d.%m.%Y}", "UTC", "2024-02-29 12:00", "move:/a/29.02.2024"),
        ("move:done", "", "2026-03-01 00:00", "move:done"),
        ("delete", "", "2026-03-01 00:00", "delete"),
        ("keep", "", "2026-03-01 00:00", ""),
    ],
)
def test_a_date_is_of_the_moment_in_which_the_file_ends_in_the_zone(
    monkeypatch: pytest.MonkeyPatch, after: str, zone: str, moment: str, expected: str
) -> None:
    settings = config(after=after, timezone=zone)
    Wall(monkeypatch, moment)
    assert settings.action(settings.after) == expected
    assert not expected or settings.may_act(expected)


TEMPLATES = [
    "done/{date:%Y%m%d}",
    "{date:%Y}/{date:%m}/{date:%d}",
    "/x.{date:%y-%j}",
    "{date:%m}{date:%m%d}+",
    "a{date:%Y}",
]


@given(st.sampled_from(TEMPLATES), st.sampled_from(TEMPLATES), st.dates(datetime.date(1971, 1, 1)), st.data())
@settings(max_examples=100, deadline=None)
def test_the_ledger_may_ask_for_what_a_target_can_expand_to_and_for_nothing_else(
    template: str, other: str, day: datetime.date, data: st.DataObject
) -> None:
    expansion = ftpcoord.dated(template, lambda letter: day.strftime(f"%{letter}"))
    settings = config(after=f"move:{template}", after_error="delete", timezone="UTC")
    assert settings.may_act(f"move:{expansion}") and settings.may_act("delete")
    assert as_in(expansion, template) == expansion and as_in(expansion.upper(), template).upper() == expansion.upper()
    place = data.draw(st.integers(0, len(expansion)))
    odd = data.draw(st.text("0123456789/.x\u0663", max_size=2))
    changed = expansion[:place] + odd + expansion[place + data.draw(st.integers(0, 2)) :]
    year = range(1, 10_000) if "%Y" in template else range(2000, 2100)
    days = {f"{one:04}" for one in year} if template == "a{date:%Y}" else None
    if days is not None:
        assert settings.may_act(f"move:{changed}") == (changed[:1] == "a" and changed[1:] in {*days, "0000"})
    elif settings.may_act(f"move:{changed}"):
        digits = [letter for letter in changed if letter.isdecimal()]
        assert len(changed) == len(expansion) and all(letter in "0123456789" for letter in digits)
        assert [a if not a.isdecimal() else "0" for a in changed] == [
            a if not a.isdecimal() else "0" for a in expansion
        ]
    if other != template:
        wrong = ftpcoord.dated(other, lambda letter: day.strftime(f"%{letter}"))
        assert not settings.may_act(f"move:{wrong}")
    assert not settings.may_act(f"move:{template}") and not settings.may_act("keep")


@stores("vsftpd", "sshd")
def test_a_file_goes_to_the_folder_of_its_day_which_is_kept_in_its_row_and_none_is_listed(
    file_server: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The move is refused on the first day, and done on the second one, into the folder of the first."""
    today = ["2026-03-01"]

    def action(self: Config, template: str) -> str:
        day = datetime.date.fromisoformat(today[0])
        return "" if template == "keep" else ftpcoord.dated(template, lambda letter: day.strftime(f"%{letter}"))

    monkeypatch.setattr(Config, "action", action)
    obstacle = file_server.put("done", b"in the way of the folder")
    old = Path(os.fsdecode(file_server.root), "x", "done", "1999", "19991231")
    for folder in reversed([old, *itertools.takewhile(lambda up: up != file_server.root, old.parents)]):
        folder.mkdir()
        folder.chmod(0o777)
    file_server.put("x/done/1999/19991231/old.txt", b"old")
    file_server.put("a.txt", b"a")
    changes: dict[str, Any] = {
        "after": "move:done/{date:%Y}/{date:%Y%m%d}",
        "timezone": "UTC",
        "recursive": True,
        "pattern": "*.txt",
    }
    with Site(tmp_path, file_server.settings, **changes) as site:
        site.wait("file_failed")
        rows = Database("sqlite", "sqlite:///" + str(tmp_path / "coordination.db"))
        query = "SELECT state, action FROM file_ledger"
        assert rows.execute(query) == [("done", "move:done/2026/20260301")]
        today[0] = "2026-03-02"
        file_server.put("b.txt", b"b")
        file_server.put("x/c.txt", b"c")
        obstacle.unlink()
        root = Path(os.fsdecode(file_server.root))
        moved = {"done/2026/20260301/a.txt", "done/2026/20260302/b.txt", "x/done/2026/20260302/c.txt"}

        def there() -> set[str]:
            return {str(path.relative_to(root)) for path in root.rglob("*.txt")}

        wait_for(lambda: there() == {*moved, "x/done/1999/19991231/old.txt"}, PATIENCE)
        site.polls()
        assert site.delivered() == {"a.txt": b"a", "b.txt": b"b", "x/c.txt": b"c"}
