"""When files are polled: cron fields, time zones, summer time."""

from __future__ import annotations

import datetime
import functools
import os
import subprocess
import sys
import zoneinfo
from pathlib import Path
from typing import Optional

import pytest
from croniter import croniter
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import ftpcoord
from ftpcoord import ConfigError, Schedule, cron_field, time_zone

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
        found = schedule.next(after)
        assert found is not None
        after = found
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
    assert Schedule("0 0 30 2 *", UTC).next(epoch("2026-03-01 00:00")) is None
    assert Schedule("0 0 31 4,6,9,11 *", UTC).next(epoch("2026-03-01 00:00")) is None


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
@settings(max_examples=100, deadline=None)
def test_in_utc_another_implementation_finds_the_same_minutes(line: str, start: int) -> None:
    """With steps of `*` in the days implementations differ: there the model below speaks."""
    schedule, other = Schedule(line, UTC), croniter(line, start, max_years_between_matches=8)
    after: Optional[float] = start
    for _ in range(3):
        assert after is not None
        after = schedule.next(after)
        try:
            expected = other.get_next(float)
        except Exception:  # croniter's own for a date that it does not find
            expected = None
        assume(expected is None or expected < start + 7.9 * 365 * 86400)
        assert after == expected
        if expected is None:
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
    found, one = [], datetime.timedelta(minutes=1)
    before = datetime.datetime.fromtimestamp(start - 60, zone)
    for moment in range(start, end, 60):
        now = datetime.datetime.fromtimestamp(moment, zone)
        shown, jumped = [], before.replace(tzinfo=None, fold=0) + one
        while jumped < now.replace(tzinfo=None, fold=0):  # the minutes that the wall never showed
            shown.append(jumped)
            jumped += one
        first = not now.fold or line.split()[1].startswith("*")
        if any(covers(line, wall) for wall in shown) or (first and covers(line, now)):
            found.append(moment)
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
@settings(max_examples=40, deadline=None)
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
