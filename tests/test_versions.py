"""What a version of a file is: how it is told apart, tied to its content, and recognized again whoever lists it."""

from __future__ import annotations

import argparse
import datetime
import struct
import threading
import time
from pathlib import Path
from typing import Any, Callable, Optional

import hostile
import pytest
from conftest import wait_for
from hostile import PATIENCE, FtpHost, Host, SftpHost, Site, reply

import ftpcoord
from ftpcoord import Entry, Row, parse_list_line, parse_mlsd_line, same_version

HOUR = datetime.timedelta(hours=1)


def entry(mtime: str, yearless: bool = False) -> Entry:
    return Entry("x", "file", 5, mtime, yearless)


EXACT, MINUTE, DAY = "2026-01-12T10:15:07", "2026-01-12T10:15", "2026-01-12"
BOTH = "2026-01-12T10:15=1768212907"  # that minute, and the exact time of it, by a server in UTC


@pytest.mark.parametrize(
    ("stored", "listed", "zones", "same"),
    [
        # exact times: SFTP, MLSD, MLST, MDTM
        (EXACT, EXACT, [], True),
        (EXACT, "2026-01-12T10:15:08", [], False),
        (EXACT, "2026-01-12T11:15:07", [HOUR], False),
        (EXACT, "2026-01-12T10:15:07.5", [], True),
        ("2026-01-12T10:15:07.25", "2026-01-12T10:15:07.5", [], False),
        ("2026-12-31T23:59:60", "2027-01-01T00:00:00", [], True),
        ("2026-12-31T23:59:60", "2026-12-31T23:59:59", [], False),
        # lines, of the same or of another precision; without a year
        (MINUTE, MINUTE, [], True),
        (MINUTE, DAY, [], True),
        (DAY, MINUTE, [], True),
        (MINUTE, "2026-01-13", [], None),
        (MINUTE, "2026-01-12T11:15", [], None),
        (MINUTE, "2026-01-12T11:15", [HOUR], None),
        (MINUTE, ("2025-01-12T10:15", True), [], True),
        (MINUTE, ("2025-01-12T10:16", True), [], None),
        (MINUTE, "2025-01-12T10:15", [], None),
        (MINUTE, "2025-01-12", [], True),
        (DAY, "2025-01-12", [], None),
        ("2026-01-12T10:15:07=", "2026-01-12T10:15:07=", [], True),
        ("2026-01-12T10:15:07=", MINUTE, [], True),
        ("2026-01-12T10:15:07=", "2026-01-12T10:15:08=", [], None),
        ("2026-01-12T10:15:07=", DAY, [], True),
        # a line and an exact time: only a zone that is known ties them
        (MINUTE, EXACT, [], True),
        (EXACT, MINUTE, [], True),
        (EXACT, DAY, [], True),
        (DAY, EXACT, [], True),
        ("2026-01-12T11:15", EXACT, [], None),
        ("2026-01-12T11:15", EXACT, [HOUR], True),
        (EXACT, "2026-01-12T11:15", [2 * HOUR], None),
        (EXACT, "2026-01-12T11:15", [2 * HOUR, HOUR], True),
        ("2026-01-12T23:30:00", "2026-01-13", [HOUR], True),
        ("2026-01-12T23:30:00", "2026-01-13", [], None),
        ("2026-12-31T23:30:00", ("2026-01-01T00:30", True), [HOUR], True),
        # both are known: the line, when it is shown again, else the exact time
        (BOTH, MINUTE, [], True),
        (BOTH, DAY, [], True),
        (BOTH, EXACT, [], True),
        (BOTH, "2026-01-12T10:15:08", [], False),
        (BOTH, "2026-01-12T10:15=1768212908", [], False),
        (BOTH, "2026-01-12T11:15=1768212907", [], True),
        (BOTH, "2026-01-12T11:15", [], None),
        (BOTH, "2026-01-12T11:15", [HOUR], True),
        (BOTH + "~", MINUTE, [], True),
        ("2026-01-12T04:15=1768212907", MINUTE, [-6 * HOUR], None),  # written anew six hours later, or shown in UTC
        ("2026-01-12T04:15=1768212907", MINUTE, [-6 * HOUR, 0 * HOUR], True),
        # no time at all, or none that anybody can read: the size decides
        ("", "", [], True),
        ("", EXACT, [], True),
        (MINUTE, "", [], True),
    ],
)
def test_times_are_compared_as_finely_as_both_show_them(
    stored: str, listed: Any, zones: list[datetime.timedelta], same: Optional[bool]
) -> None:
    now = entry(*listed) if isinstance(listed, tuple) else entry(listed)
    row = Row("/in/x", 5, stored, "done", 1, 1, 0)
    assert same_version(row, now, zones) is same
    assert same_version(now, row, zones) is same
    assert same_version(row, now._replace(size=6), zones) is False


def test_a_ledger_of_a_member_of_version_1_0_0_compares_the_beginning_which_is_what_it_knows() -> None:
    assert BOTH.startswith(MINUTE) and len(BOTH + "~") <= 32 and len("2026-01-12T10:15:07=1768212907~") <= 32


def test_the_clock_of_a_member_changes_no_version() -> None:
    line = "-rw-r--r-- 1 0 0 5 Jul 21 10:00 x"
    days = [datetime.date(2026, 7, day) for day in (18, 20, 22)]
    listed = [found for found in (parse_list_line(line, day) for day in days) if found]
    assert {found.mtime[:4] for found in listed} == {"2025", "2026"}
    assert all(same_version(a, b) for a in listed for b in listed)


def test_a_leap_second_is_a_time(tmp_path: Path) -> None:
    found = parse_mlsd_line("type=file;size=5;modify=20161231235960; x")
    assert found and ftpcoord.epoch_seconds(found.mtime) == 1483228800.0 and same_version(found, found)
    assert ftpcoord.epoch_seconds(ftpcoord.iso_time("20161231235960.5")) == 1483228800.5
    assert ftpcoord.iso_time("20161231235961") == ftpcoord.iso_time("20161231236030") == ""
    assert ftpcoord.iso_time("20161231236060") == ftpcoord.iso_time("20161231246060") == ""


def test_a_time_that_somebody_wrote_with_a_zone_into_the_ledger_is_read_without_it() -> None:
    assert ftpcoord.epoch_seconds("2026-01-12T10:15:30+02:00") == 1768212930.0


# ---------------------------------------------------------------------------------------------------------------------
# The content is tied to the version
# ---------------------------------------------------------------------------------------------------------------------

OLD, NEW = b"old " * 25_000, b"new " * 25_000
KINDS = pytest.mark.parametrize("kind", ["sftp", "mlsd", "mdtm", "list"])
DELIVERIES = pytest.mark.parametrize("delivery", ["folder", "handler"])


def a_host(kind: str, files: Optional[dict[str, bytes]] = None) -> Host:
    """By SFTP, MLSD and MLST, LIST and MDTM, or LIST alone."""
    if kind == "sftp":
        return SftpHost(files or {})
    host = FtpHost(files or {}, mlsd=kind == "mlsd")
    if kind == "list":
        host.on("MDTM", reply("502 no"), times=None)
        host.on("SIZE", reply("502 no"), times=None)
    return host


def on_fetch(host: Host, happens: Callable[[], None]) -> None:
    """Before the first fetch."""
    if isinstance(host, SftpHost):

        def open_(session: Any, path: str) -> None:
            happens()
            session.behave("OPEN", path, b"")

        host.on("OPEN", open_)
    else:

        def retr(session: Any, argument: str) -> None:
            happens()
            session.on_retr(argument)

        host.on("RETR", retr)


class Days(FtpHost):
    """LIST shows no more than the day of any file."""

    def line(self, name: str, content: bytes, when: datetime.datetime) -> bytes:
        return f"-rw-r--r-- 1 0 0 {len(content)} {when:%b %d  %Y} {name}".encode()


@KINDS
@DELIVERIES
def test_a_file_replaced_between_listing_and_fetch_is_handled_once_as_the_new_version(
    tmp_path: Path, kind: str, delivery: str
) -> None:
    with a_host(kind, {"a": OLD}) as host:
        on_fetch(host, lambda: host.put("a", NEW, 7200))
        with Site(tmp_path, host.settings, delivery) as site:
            site.arrive({"a": NEW})
            row = site.state("a", "done")
            site.polls()
            assert (row["attempts"], row["failures"]) == (1, 0)
            assert len(site.all("file_done")) == 1 and not site.all("file_failed")


@pytest.mark.parametrize("no", ["550 no", "502 no"])
@pytest.mark.parametrize("refused", ["MLST SIZE", "MLST SIZE MDTM"])
@DELIVERIES
def test_each_file_is_looked_at_by_mdtm_or_mlsd_where_nothing_else_tells_of_it(
    tmp_path: Path, delivery: str, refused: str, no: str
) -> None:
    with a_host("mlsd", {"a": OLD, "b": OLD, "c": OLD}) as host:
        for command in refused.split():
            host.on(command, reply(no), times=None)

        def replaced(session: Any, argument: str) -> None:
            host.put(session.name(argument), NEW, 20)
            session.on_retr(argument)

        host.on("RETR", replaced, times=3)
        with Site(tmp_path, host.settings, delivery, workers=1) as site:
            site.arrive({"a": NEW, "b": NEW, "c": NEW})
            site.polls()
            assert len(site.all("file_done")) == 3


@pytest.mark.parametrize("seconds", [7200, 20])
@pytest.mark.parametrize("kind", ["mlsd", "mdtm"])
@DELIVERIES
def test_a_file_overwritten_while_it_is_fetched_is_never_delivered_torn(
    tmp_path: Path, kind: str, delivery: str, seconds: int
) -> None:
    """Also within the minute, which a line of LIST does not show: MDTM is asked before and after."""
    with a_host(kind) as host:
        began = datetime.datetime.now(datetime.timezone.utc).replace(second=5, microsecond=0, tzinfo=None)
        host.files["a"], host.times["a"] = OLD, began

        def overwrite(session: Any, argument: str) -> None:
            session.say("150 here")
            with session.data() as connection:
                connection.sendall(OLD[:50_000])
                host.files["a"], host.times["a"] = NEW, began + datetime.timedelta(seconds=seconds)
                connection.sendall(NEW[50_000:])
            session.say("226 done")

        host.on("RETR", overwrite)
        with Site(tmp_path, host.settings, delivery) as site:
            site.arrive({"a": NEW})
            assert site.state("a", "done")["failures"] == 0


@pytest.mark.parametrize("kind", ["sftp", "mlsd", "mdtm"])
@DELIVERIES
def test_a_file_that_is_gone_after_a_whole_fetch_was_had(tmp_path: Path, kind: str, delivery: str) -> None:
    """Some servers give a file once."""
    with a_host(kind, {"a": OLD}) as host:
        taken = host.files["a"]

        def once(session: Any, argument: str) -> None:
            host.files.pop("a", None)
            session.status(2) if kind == "sftp" else session.send(taken)

        host.on("FSTAT" if kind == "sftp" else "RETR", once)
        if kind == "mdtm":
            host.on("MDTM", reply("550 gone"), times=None)
        with Site(tmp_path, host.settings, delivery) as site:
            site.arrive({"a": OLD})
            assert site.wait("file_done", path="/in/a")["attempt"] == 1 and not site.all("file_failed")


def overwritten_while_it_is_read(host: SftpHost) -> None:
    def read(session: Any, path: str) -> None:
        session.behave("READ", path, b"")
        host.put("a", NEW, 7200)

    host.on("READ", read)


def without_times(session: Any, path: str) -> None:
    size = len(session.host.files.get(path[len("/in/") :], b""))
    there = path[len("/in/") :] in session.host.files
    session.answer(105, struct.pack(">IQI", 1 | 4, size, 0o100644)) if there else session.status(2)


@DELIVERIES
def test_an_fstat_that_tells_no_time_proves_no_version(tmp_path: Path, delivery: str) -> None:
    with SftpHost({"a": OLD}) as host:
        host.on("FSTAT", without_times, times=None)
        overwritten_while_it_is_read(host)
        with Site(tmp_path, host.settings, delivery) as site:
            site.arrive({"a": NEW})


@DELIVERIES
def test_what_was_overwritten_while_it_was_read_was_not_had_though_it_is_gone_since(
    tmp_path: Path, delivery: str
) -> None:
    with SftpHost({"a": OLD}) as host:
        overwritten_while_it_is_read(host)

        def gone(session: Any, path: str) -> None:
            host.files.pop("a", None)
            session.status(2)

        host.on("LSTAT", gone)
        with Site(tmp_path, host.settings, delivery) as site:
            wait_for(lambda: host.said("LSTAT"), PATIENCE)
            site.polls()
            assert not site.delivered() and not site.all("file_done")


@pytest.mark.parametrize("kind", ["sftp", "mlsd", "mdtm"])
@DELIVERIES
def test_a_connection_that_is_lost_between_fetch_and_look_is_replaced_for_the_look_alone(
    tmp_path: Path, kind: str, delivery: str
) -> None:
    with a_host(kind, {"a": OLD}) as host:
        host.on({"sftp": "FSTAT", "mlsd": "MLST", "mdtm": "MDTM"}[kind], hostile.leave)
        with Site(tmp_path, host.settings, delivery) as site:
            site.arrive({"a": OLD})
            assert site.wait("file_done")["attempt"] == 1
            assert len(host.said("RETR") + host.said("OPEN")) == 1 and not site.all("file_failed")


@pytest.mark.parametrize(
    ("verb", "says"),
    [
        ("MDTM", hostile.silence),
        ("MDTM", reply("550 no")),
        ("MDTM", reply("213 yesterday")),
        ("MDTM", reply("500 what?")),
        ("MLST", hostile.silence),
        ("MLST", reply("550 no")),
        ("MLST", reply("250 a")),
        ("MLST", reply("502 what?")),
    ],
)
def test_a_server_that_does_not_tell_times_is_taken_at_its_listings(tmp_path: Path, verb: str, says: Any) -> None:
    with a_host("mdtm" if verb == "MDTM" else "mlsd", {"a": OLD}) as host:
        host.on(verb, says, times=None)
        with Site(tmp_path, host.settings) as site:
            site.arrive({"a": OLD})
            assert site.wait("file_done")["attempt"] == 1 and len(host.said("RETR")) == 1


@pytest.mark.parametrize("answer", ["unsupported", "another time"])
def test_where_fstat_does_not_prove_the_version_lstat_decides(tmp_path: Path, answer: str) -> None:
    with SftpHost({"a": OLD}) as host:
        host.on(
            "FSTAT",
            hostile.status(8)
            if answer == "unsupported"
            else lambda session, path: session.answer(105, hostile.attributes(len(OLD), 7)),
            times=None,
        )
        with Site(tmp_path, host.settings) as site:
            site.arrive({"a": OLD})
            assert len(host.said("OPEN")) == 1 and site.wait("file_done")["attempt"] == 1


def test_the_look_after_the_fetch_rides_in_the_same_flight(tmp_path: Path) -> None:
    with SftpHost({"a": b"small"}) as host:
        with Site(tmp_path, host.settings) as site:
            site.arrive({"a": b"small"})
        order = [command.split(" ")[0] for command in host.commands]
        assert order[order.index("OPEN") :][:3] == ["OPEN", "READ", "FSTAT"] and "LSTAT" not in order


def test_a_version_that_changes_at_each_fetch_is_said_from_the_third_time_and_never_counted(tmp_path: Path) -> None:
    with a_host("mlsd", {"a": OLD}) as host:

        def replaced(session: Any, argument: str) -> None:
            host.put("a", NEW, seconds=len(host.commands))
            session.on_retr(argument)

        host.on("RETR", replaced, times=None)
        with Site(tmp_path, host.settings, max_attempts=2) as site:
            said = site.wait("not_now")
            assert "another version" in said["error"] and len(host.said("RETR")) >= 3
            assert site.row("a")["failures"] == 0  # type: ignore[index]
            host.behave()
            site.arrive({"a": NEW})
            assert not site.all("file_failed") and not site.all("file_quarantined")


@pytest.mark.parametrize("after", ["delete", "move:done", "keep"])
@pytest.mark.parametrize("kind", ["sftp", "mlsd", "mdtm"])
def test_a_version_that_arrives_while_the_last_one_is_handled_is_handled_too_also_within_the_same_minute(
    tmp_path: Path, kind: str, after: str
) -> None:
    with a_host(kind) as host:
        began = datetime.datetime.now(datetime.timezone.utc).replace(second=5, microsecond=0, tzinfo=None)
        host.files["a"], host.times["a"] = OLD, began

        class Slow(Site):
            def receive(self, file: ftpcoord.File) -> None:
                super().receive(file)
                if len(self.handled) == 1:
                    host.files["a"], host.times["a"] = NEW, began + datetime.timedelta(seconds=20)

        with Slow(tmp_path, host.settings, "handler", after=after) as site:
            wait_for(lambda: len(site.handled) == 2, PATIENCE, "\n".join(site.log[-20:]))
            assert [(content, attempt) for _, content, attempt in site.handled] == [(OLD, 1), (NEW, 1)]
            site.polls()
            assert len(site.handled) == 2


@pytest.mark.parametrize("kind", ["sftp", "mlsd", "mdtm"])
def test_versions_of_a_minute_that_come_as_their_forerunners_go_wait_no_longer_each_time(
    tmp_path: Path, kind: str
) -> None:
    with a_host(kind) as host:
        host.put("a", b"0")

        def replace(session: Any, argument: str) -> None:
            number = int(host.files["a"]) + 1
            host.put("a", b"%d" % number, seconds=number)
            session.status(0) if kind == "sftp" else session.say("250 gone")

        host.on("REMOVE" if kind == "sftp" else "DELE", replace, times=3)
        with Site(tmp_path, host.settings, "handler", after="delete", retry_delay=3600) as site:
            wait_for(lambda: not host.files, PATIENCE, "\n".join(site.log[-20:]))
            assert [int(content) for _, content, _ in site.handled] == list(range(4)) and not site.all("not_now")


@pytest.mark.parametrize("tells", ["MDTM and no SIZE", "SFTP, and no time in LSTAT"])
def test_a_new_version_is_not_deleted_where_not_all_of_it_can_be_asked_for(tmp_path: Path, tells: str) -> None:
    with a_host("sftp" if "SFTP" in tells else "mdtm", {"a": OLD}) as host:
        host.on("SIZE", reply("502 no"), times=None)
        for question in ("LSTAT", "STAT", "FSTAT"):
            host.on(question, without_times, times=None)

        class Slow(Site):
            def receive(self, file: ftpcoord.File) -> None:
                super().receive(file)
                if len(self.handled) == 1:
                    host.put("a", NEW, seconds=20)

        with Slow(tmp_path, host.settings, "handler", after="delete") as site:
            wait_for(lambda: not host.files, PATIENCE, "\n".join(site.log[-20:]))
            assert [content for _, content, _ in site.handled] == [OLD, NEW]


@pytest.mark.parametrize("after", ["delete", "move:done"])
def test_what_is_listed_as_a_file_is_put_away_though_lstat_calls_it_a_link(tmp_path: Path, after: str) -> None:
    with SftpHost({"a": OLD}) as host:

        def link(session: Any, path: str) -> None:
            if path == "/in/a" and "a" in host.files:
                session.answer(105, hostile.attributes(5, mode=0o120777))
            else:
                session.behave("LSTAT", path, b"")

        host.on("LSTAT", link, times=None)
        with Site(tmp_path, host.settings, "handler", after=after) as site:
            wait_for(lambda: "a" not in host.files, PATIENCE, "\n".join(site.log[-20:]))
            assert site.handled == [("a", OLD, 1)] and not site.all("file_kept")


def test_a_new_version_of_the_day_is_found_where_lines_show_days_alone(tmp_path: Path) -> None:
    now = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
    noon = now.replace(hour=12, minute=0, second=0)  # lines of both versions are of one day
    with Days({"a": OLD}, mlsd=False) as host:
        host.times["a"] = min(noon, now) - datetime.timedelta(minutes=min(60, now.hour * 60 + now.minute))
        with Site(tmp_path, host.settings, "handler") as site:
            site.state("a", "done")
            asked = len(host.said("MDTM"))
            wait_for(lambda: len(host.said("MDTM")) > asked, PATIENCE)
            site.polls()
            host.files["a"], host.times["a"] = NEW, host.times["a"] + datetime.timedelta(seconds=1)
            wait_for(lambda: len(site.handled) == 2, PATIENCE, "\n".join(site.log[-20:]))
            assert site.handled == [("a", OLD, 1), ("a", NEW, 1)]


@pytest.mark.parametrize("kind", ["sftp", "mlsd", "mdtm", "list"])
def test_a_file_that_is_replaced_within_its_minute_after_it_failed_is_handled_as_it_is_now(
    tmp_path: Path, kind: str
) -> None:
    with a_host(kind) as host:
        began = datetime.datetime.now(datetime.timezone.utc).replace(second=5, microsecond=0, tzinfo=None)
        host.files["a"], host.times["a"] = OLD, began

        class Failing(Site):
            def receive(self, file: ftpcoord.File) -> None:
                super().receive(file)
                if len(self.handled) == 1:
                    host.files["a"], host.times["a"] = NEW, began + datetime.timedelta(seconds=20)
                    raise ValueError("not this one")

        with Failing(tmp_path, host.settings, "handler") as site:
            assert site.state("a", "done")["failures"] <= 1
            assert [content for _, content, _ in site.handled] == [OLD, NEW]


@pytest.mark.parametrize("kind", ["sftp", "mlsd"])
def test_two_servers_of_one_name_whose_copies_have_other_times_are_said_and_waited_for(
    tmp_path: Path, kind: str
) -> None:
    with a_host(kind, {"a": OLD}) as host:
        times = [datetime.datetime(2026, 1, 12, 10), datetime.datetime(2026, 1, 12, 11)]
        host.times["a"] = times[0]

        class Turns(Site):
            def receive(self, file: ftpcoord.File) -> None:
                super().receive(file)
                threading.Timer(0.3, lambda: host.times.update(a=times[len(self.handled) % 2])).start()

        with Turns(tmp_path, host.settings, "handler", retry_delay=0.5) as site:
            error = site.wait("not_now", count=2)["error"]
            assert "another version each time" in error
            site.polls()  # it is said at the claim, and then handled
            handled = len(site.handled)
            site.polls(10)
            assert len(site.handled) == handled


def test_a_name_that_is_listed_twice_as_two_versions_is_not_handled_without_end(tmp_path: Path) -> None:
    with FtpHost({"a": OLD}) as host:
        host.lines = [b"type=file;size=%d;modify=20240101000000; a" % len(OLD)]
        host.on("MLST", reply("500 no"), times=None)
        with Site(tmp_path, host.settings, "handler", retry_delay=0.5) as site:
            site.wait("not_now")
            site.polls(10)
            assert len(site.handled) <= 5


@pytest.mark.parametrize("year", [1960, 2037, 2038, 2040, 2105, 2199])
def test_a_clock_that_is_wrong_by_years_makes_no_new_versions(tmp_path: Path, year: int) -> None:
    with FtpHost({"a": OLD}, mlsd=False) as host:
        host.times["a"] = datetime.datetime(year, 12, 12, 10, 15, 7)
        with Site(tmp_path, host.settings, "handler", after="delete") as site:
            wait_for(lambda: not host.files, PATIENCE, "\n".join(site.log[-20:]))
            site.polls()
            assert site.handled == [("a", OLD, 1)] and site.row("a") is None and not site.all("file_kept")


@pytest.mark.parametrize("year", [2026, 5000])
def test_a_time_is_never_longer_than_the_ledgers_column(tmp_path: Path, year: int) -> None:
    """A line may show as many digits as a file system keeps."""

    class Fine(FtpHost):
        def line(self, name: str, content: bytes, when: datetime.datetime) -> bytes:
            return f"-rw-r--r-- 1 0 0 {len(content)} {when + HOUR} {name}".encode()

    when = datetime.datetime(year, 1, 12, 10, 15, 7, 123_456)
    with Fine({"a": OLD}, mlsd=False) as host:
        host.times["a"] = when
        with Site(tmp_path, host.settings, "handler") as site:
            row = site.state("a", "done")
            assert row["mtime"].startswith(f"{year}-01-12T11:15:07") and len(row["mtime"]) <= 32
            assert f"{when:%Y-%m-%dT%H:%M:%S}" == ftpcoord.times_of(row["mtime"]).exact
            site.polls()
            assert len(site.handled) == 1


# ---------------------------------------------------------------------------------------------------------------------
# A display that moves is no new version
# ---------------------------------------------------------------------------------------------------------------------


def some(count: int, host: Host) -> dict[str, bytes]:
    """Files of the last days, each with a time of its own."""
    now = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0, tzinfo=None)
    for number in range(count):
        host.files[f"{number}"] = b"%05d" % number
        host.times[f"{number}"] = now - datetime.timedelta(days=5 + number, minutes=7 * number)
    return dict(host.files)


@DELIVERIES
@pytest.mark.parametrize("count", [1, 30])
def test_a_server_whose_zone_is_changed_has_no_new_versions_and_is_asked_once(
    tmp_path: Path, count: int, delivery: str
) -> None:
    with a_host("mdtm") as host:
        assert isinstance(host, FtpHost)
        files = some(count, host)
        with Site(tmp_path, host.settings, delivery) as site:
            site.arrive(files)
            for name in files:
                site.state(name, "done")
            if delivery == "handler":
                assert site.row("0")["mtime"].endswith(f"={int(host.times['0'].timestamp())}")  # type: ignore[index]
            for zone in (60, -300, 0):
                host.zone = zone
                asked = len(host.said("MDTM"))
                site.polls(3)
                assert len(site.all("file_done")) == count
                assert len(host.said("MDTM")) - asked <= 2


@pytest.mark.parametrize("kind", ["mdtm", "list"])
def test_one_move_settles_all_rows_that_an_older_version_wrote(tmp_path: Path, kind: str) -> None:
    with a_host(kind) as host:
        assert isinstance(host, FtpHost)
        files = some(200, host)
        host.put("over midnight", b"1")
        host.times["over midnight"] = host.times["199"].replace(hour=22, minute=30)
        host.put("replaced", b"old")
        host.times["replaced"] = host.times["199"].replace(hour=12)
        host.zone = 120
        adopted(tmp_path, host)
        host.zone = 60
        new = {"new": b"new", "replaced": b"upd"}
        host.files.update(new)
        host.times.update(new=host.times["0"], replaced=host.times["replaced"] + datetime.timedelta(days=1))
        with Site(tmp_path, host.settings) as site:
            site.arrive(new)
            site.polls()
            assert len(site.all("file_done")) == 2 and len(host.said("MDTM")) <= 4
            assert site.row("7")["state"] == "done" and len(files) == 200  # type: ignore[index]


@pytest.mark.parametrize(("count", "days", "handled"), [(1, 30, 2), (3, 1, 6), (2, 30, 2)])
def test_where_list_alone_tells_times_a_move_is_known_by_two_files_that_are_not_of_these_days(
    tmp_path: Path, count: int, days: int, handled: int
) -> None:
    """EXPOSED: with fewer the files come again as new ones, and the README says so."""
    with a_host("list") as host:
        assert isinstance(host, FtpHost)
        files = some(count, host)
        for number, name in enumerate(files):
            host.times[name] += datetime.timedelta(days=5 + number - days)
        with Site(tmp_path, host.settings, "handler") as site:
            site.arrive(files)
            host.zone += 60
            site.polls(3)
            assert [attempt for _, _, attempt in site.handled] == [1] * handled


@pytest.mark.parametrize("kind", ["mdtm", "list"])
def test_files_that_are_written_anew_each_hour_are_no_display_that_moves(tmp_path: Path, kind: str) -> None:
    with a_host(kind) as host:
        now = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0, tzinfo=None)

        def written(hour: int) -> None:
            for minute, name in enumerate("abc"):
                host.files[name] = b"%d%s" % (hour, name.encode())
                host.times[name] = now - hour * HOUR - datetime.timedelta(minutes=minute)

        written(3)
        adopted(tmp_path, host)
        with Site(tmp_path, host.settings, "handler") as site:
            site.polls()
            written(2)
            wait_for(lambda: len(site.handled) == 3, PATIENCE)
            site.wait("file_done", 3)
            written(1)
            wait_for(lambda: len(site.handled) == 6, PATIENCE)
        assert sorted(content for _, content, _ in site.handled) == [b"1a", b"1b", b"1c", b"2a", b"2b", b"2c"]


@pytest.mark.parametrize(("hours", "zone", "winters"), [(6, -6, -6), (8, -8, -8), (1, 1, 2), (1, -5, -4)])
def test_a_file_that_is_written_anew_at_the_distance_of_two_zones_is_a_new_version(
    tmp_path: Path, hours: int, zone: int, winters: int
) -> None:
    """Six hours west of UTC a line of now looks like the exact time of six hours ago."""
    with a_host("mdtm", {"old": b"old", "a": b"1"}) as host:
        assert isinstance(host, FtpHost)
        now = datetime.datetime.now(datetime.timezone.utc).replace(second=7, microsecond=0, tzinfo=None) - HOUR
        host.times = {"old": now - 100 * 24 * HOUR, "a": now - hours * HOUR}
        plain = host.line

        def line(name: str, content: bytes, when: datetime.datetime) -> bytes:
            host.zone = 60 * (winters if name.endswith("old") else zone)
            return plain(name, content, when)

        host.line = line  # type: ignore[method-assign]
        with Site(tmp_path, host.settings, "handler") as site:
            site.wait("file_done", 2)
            site.polls()
            host.files["a"], host.times["a"] = b"2", now
            wait_for(lambda: ("a", b"2", 1) in site.handled, PATIENCE)
            site.polls()
            assert len(site.handled) == 3


def adopted(folder: Path, host: Host) -> None:
    """The ledger as of a member that has handled all that is there, without exact times."""
    config = ftpcoord.Config(**host.settings, database=f"sqlite:///{folder / 'coordination.db'}", exec="true")
    ftpcoord.command_adopt([config], argparse.Namespace())


@DELIVERIES
def test_servers_of_one_name_that_list_in_different_ways_have_no_new_versions(tmp_path: Path, delivery: str) -> None:
    """MLSD tells UTC, LIST the minute of the server's zone."""
    with a_host("mlsd") as host:
        assert isinstance(host, FtpHost)
        files, host.zone = some(12, host), 120
        with Site(tmp_path, host.settings, delivery) as site:
            site.arrive(files)
            for mlsd in (False, True, False):
                host.mlsd = mlsd
                host.drop()
                site.polls(3)
            host.put("12", b"new")
            site.arrive({**files, "12": b"new"})
            site.wait("file_done", path="/in/12")
            assert len(site.all("file_done")) == 13


def test_questions_are_bounded_in_each_poll_and_what_was_not_asked_for_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ftpcoord, "MOST_QUESTIONS", 3)
    with a_host("mdtm") as host:
        files = some(10, host)
        with Site(tmp_path, host.settings, "handler") as site:
            site.arrive(files)
            for name in files:
                site.state(name, "done")
                host.files[name] = b"%05d" % (int(name) + 1)
                host.times[name] += datetime.timedelta(days=1, minutes=int(name) + 1)
            asked, polled = len(host.said("MDTM")), len(site.all("polled"))
            wait_for(lambda: len(site.handled) == 20, PATIENCE, "\n".join(site.log[-20:]))
            site.wait("file_done", 20)
            assert len(site.all("polled")) - polled >= 3 and len(host.said("MDTM")) - asked <= 30


@pytest.mark.parametrize("ahead", [0, -8, 9])
@pytest.mark.parametrize("shown", ["minutes", "days"])
def test_a_single_run_finds_what_was_replaced_within_the_time_that_its_line_shows(
    tmp_path: Path, shown: str, ahead: int
) -> None:
    """Also where MDTM tells the server's own time, so many hours ahead of UTC."""
    began = datetime.datetime.now(datetime.timezone.utc).replace(second=5, tzinfo=None)
    began += datetime.timedelta(hours=ahead, minutes=-3)
    with Days(mlsd=False) if shown == "days" else a_host("mdtm") as host:
        for number, content in enumerate((OLD, NEW)):
            host.files["a"], host.times["a"] = content, began + datetime.timedelta(seconds=20 * number)
            site = Site(tmp_path, host.settings, "handler")
            assert site.listener.run(once=True) == 0
            assert site.handled == [("a", content, 1)]


def test_what_may_have_been_replaced_within_its_minute_keeps_no_single_run_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ftpcoord, "MOST_QUESTIONS", 1)
    with a_host("mdtm") as host:
        files = some(5, host)
        for name in files:
            host.times[name] += datetime.timedelta(days=5 + int(name), minutes=7 * int(name) - 2)
        with Site(tmp_path, host.settings, "handler") as site:
            site.arrive(files)
            site.wait("file_done", 5)
        again = Site(tmp_path, host.settings, "handler")
        listed = len(host.said("LIST"))
        assert again.listener.run(once=True) == 0 and not again.handled
        assert len(host.said("LIST")) == listed + 1


# ---------------------------------------------------------------------------------------------------------------------
# Companions
# ---------------------------------------------------------------------------------------------------------------------

MARKED = {"ready_suffix": ".ok", "after": "delete"}


@pytest.mark.parametrize("lost", ["a", "a.ok"])
def test_a_marker_never_outlives_its_file_also_if_the_reply_to_its_removal_is_lost(tmp_path: Path, lost: str) -> None:
    with a_host("mlsd", {"a": OLD, "a.ok": b""}) as host:

        def removed(session: Any, argument: str) -> None:
            name = session.name(argument)
            host.files.pop(name)
            if name != lost:
                session.say("250 gone")
            else:
                host.behave()
                hostile.leave(session, argument)

        host.on("DELE", removed, times=None)
        with Site(tmp_path, host.settings, "handler", **MARKED) as site:
            site.arrive({"a": OLD})
            wait_for(lambda: not host.files and site.row("a") is None, PATIENCE, "\n".join(site.log[-20:]))
            host.put("a", b"half", 60)
            site.polls(3)
            assert len(site.handled) == 1 and "a" in host.files


@pytest.mark.parametrize("after", ["delete", "move:done", "keep"])
@pytest.mark.parametrize("kind", ["sftp", "mlsd"])
def test_the_marker_of_one_version_does_not_make_the_next_one_ready(tmp_path: Path, kind: str, after: str) -> None:
    with a_host(kind, {"a": OLD, "a.ok": b""}) as host:

        class Slow(Site):
            def receive(self, file: ftpcoord.File) -> None:
                super().receive(file)
                if len(self.handled) == 1:
                    host.put("a", b"half", 60)

        with Slow(tmp_path, host.settings, "handler", **{**MARKED, "after": after}) as site:
            site.wait("file_done")
            site.polls(4)
            assert [content for _, content, _ in site.handled] == [OLD] and host.files["a"] == b"half"
            assert len(site.all("file_refused")) == 1, "said once"
            host.put("a", NEW, 120)
            host.put("a.ok", b"", 120)
            wait_for(lambda: len(site.handled) == 2, PATIENCE, "\n".join(site.log[-20:]))
            assert site.handled[1] == ("a", NEW, 1)


def test_a_marker_that_came_after_the_claim_stays_with_its_file(tmp_path: Path) -> None:
    with a_host("mlsd", {"a": OLD, "a.ok": b""}) as host:

        class Slow(Site):
            def receive(self, file: ftpcoord.File) -> None:
                super().receive(file)
                host.put("a.ok", b"", 60)

        with Slow(tmp_path, host.settings, "handler", **MARKED) as site:
            site.wait("file_kept")
            site.polls()
            assert set(host.files) == {"a", "a.ok"} and len(site.handled) == 1


def test_the_dry_run_says_that_a_marker_is_too_old(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with a_host("mlsd", {"a": OLD, "a.ok": b""}) as host:
        host.put("a", NEW, 60)
        database = f"sqlite:///{tmp_path / 'coordination.db'}"
        ftpcoord.command_dry_run([ftpcoord.Config(**host.settings, database=database, exec="true", ready_suffix=".ok")])
        assert "its marker .ok is older than the file" in capsys.readouterr().out


@pytest.mark.parametrize("after", ["delete", "move:done"])
def test_before_a_delete_the_listing_is_looked_at_where_the_size_alone_can_be_asked_for(
    tmp_path: Path, after: str
) -> None:
    with a_host("mdtm") as host:
        host.on("MDTM", reply("502 no"), times=None)
        began = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None) - datetime.timedelta(days=2)
        host.files["a"], host.times["a"] = OLD, began

        class Slow(Site):
            def receive(self, file: ftpcoord.File) -> None:
                super().receive(file)
                if len(self.handled) == 1:
                    host.files["a"], host.times["a"] = NEW, began + 2 * HOUR

        with Slow(tmp_path, host.settings, "handler", after=after) as site:
            wait_for(lambda: len(site.handled) == 2, PATIENCE, "\n".join(site.log[-20:]))
            assert site.handled[1] == ("a", NEW, 1)


def test_a_doubt_that_no_answer_ends_is_not_asked_about_at_each_poll(tmp_path: Path) -> None:
    with a_host("mdtm") as host:
        host.files["a"] = OLD
        host.times["a"] = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
        with Site(tmp_path, host.settings, "handler") as site:
            site.state("a", "done")
            host.on("MDTM", reply("550 not today"), times=None)
            asked = len(host.said("MDTM"))
            wait_for(lambda: len(host.said("MDTM")) > asked, PATIENCE)
            site.polls(10)
            assert len(host.said("MDTM")) == asked + 1


def test_a_time_that_sftp_cannot_be_compared_with_is_no_file_that_is_gone(tmp_path: Path) -> None:
    """As after a change from FTP to SFTP with after-actions to do."""
    with SftpHost({"a": OLD}) as host:
        server = ftpcoord.open_server(ftpcoord.Config(**host.settings, database="sqlite:///x.db"))
        assert server.same("/in/a", Entry("a", "file", len(OLD), "2024-01-12T11:15")) is False
        assert server.same("/in/b", Entry("b", "file", len(OLD), "2024-01-12T11:15")) is None
        server.close()


def test_names_made_while_their_folder_is_listed_are_in_its_listing_and_no_two_make_one_name() -> None:
    habits = ftpcoord.Habits()
    with habits.listing_of("/done") as listed:
        with habits.making("/done/a"), pytest.raises(ftpcoord.TargetExists), habits.making("/done/a"):
            pass
        assert habits.listed("/done") is None, "it is not whole yet"
        listed.entries["b"] = None
    known = habits.listed("/done")
    assert known is not None and known.entries.keys() == {"a", "b"}
    with pytest.raises(ftpcoord.ServerDown), habits.making("/done/c"):
        raise ftpcoord.ServerDown("whether it was made is not known")
    assert habits.listed("/done") is None
    with pytest.raises(ftpcoord.FileRefused), habits.listing_of("/done"):
        raise ftpcoord.FileRefused("no")
    assert habits.listed("/done") is None


def test_many_moves_cost_no_more_than_few() -> None:
    habits = ftpcoord.Habits()

    def seconds(first: int) -> float:
        began = time.process_time()
        for number in range(first, first + 2000):
            with habits.making(f"/done/{number}"):
                pass
        return time.process_time() - began

    few = seconds(0)
    for first in range(2000, 18000, 2000):
        many = seconds(first)
    assert many < 10 * few + 0.1


@pytest.mark.parametrize("minutes", [-60, 60])
@pytest.mark.parametrize("state", ["failed", "claimed"])
def test_a_display_that_moves_makes_no_companion_older_than_its_file(tmp_path: Path, minutes: int, state: str) -> None:
    """The row of the file has the line of another day, the companion that of today."""
    with FtpHost(files={"a": b"1", "a.ok": b""}, mlsd=False) as host:
        now = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)

        def upload(days: int) -> None:
            for name in host.files:
                host.times[name] = now - datetime.timedelta(days=days)

        site = Site(tmp_path, host.settings, "own", ready_suffix=".ok", polling_interval=0.2)
        attempts: list[int] = []

        def once_more(file: ftpcoord.File) -> None:
            attempts.append(file.attempt)
            if len(attempts) == 2:  # of a version that was asked for its exact time
                host.zone += minutes
                if state == "claimed":
                    file.lease.lose()
                raise ValueError("not this one")

        upload(9)
        site.listener.on_file("*")(once_more)
        with site:
            site.state("a", "done")
            upload(2)
            wait_for(lambda: len(attempts) == 3, PATIENCE, "\n".join(site.log[-20:]))
            assert attempts == [1, 1, 2]
