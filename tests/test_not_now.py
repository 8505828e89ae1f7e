"""The system behind the handler is away, or a file cannot be had yet: no file's failure, but a pause and a word."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any, Optional

import pytest
from conftest import Database, Files, wait_for
from hostile import FtpHost, FtpSession, Site
from members import PATIENCE, Crew
from memory import config, row

import ftpcoord


class Backend(Site):
    """A site whose handler hands each file to a system that may be away."""

    def __init__(self, folder: Path, settings: dict[str, Any], **changes: Any) -> None:
        super().__init__(folder, settings, "handler", **{"retry_delay": 0.2, "workers": 1, **changes})
        self.away = True
        self.never: set[str] = set()  # files that it always sends away
        self.seconds: Optional[float] = None
        self.asked: list[tuple[str, float]] = []

    def __enter__(self) -> Backend:
        super().__enter__()
        return self

    def receive(self, file: ftpcoord.File) -> None:
        self.asked.append((file.name, time.monotonic()))
        if self.away or file.name in self.never:
            raise ftpcoord.TryLater(self.seconds) from ConnectionError("nobody answers")
        super().receive(file)


def test_an_outage_behind_the_handler_opens_the_breaker_and_counts_for_no_file(tmp_path: Path) -> None:
    """Twenty files, three of which are tried; then one at a time, the next in turn, until one succeeds."""
    files = {f"{number:02}": b"x" for number in range(20)}
    with FtpHost(files=dict(files)) as host, Backend(tmp_path, host.settings, max_attempts=1) as site:
        said = site.wait("not_now", files=3)
        assert "nobody answers" in said["error"] and said["retry_in"] == 0.2
        wait_for(lambda: len(site.asked) >= 6, PATIENCE)
        names, times = zip(*site.asked[:6])
        assert names == ("00", "01", "02", "03", "04", "05"), "the next in turn"
        pauses = [late - early for early, late in zip(times[2:], times[3:])]
        assert all(pause >= wanted for pause, wanted in zip(pauses, (0.2, 0.4, 0.8))), pauses
        assert "system behind" in ftpcoord.why_unready(site.listener)
        status = ftpcoord.listener_status(site.listener, ftpcoord.Survey(site.listener.config))
        assert any("system behind" in note for note in status["notes"]), status
        assert len(site.all("not_now", files=3)) == 1 and site.wait("not_now", path="/in/04")["attempt"] == 1
        shown = status["not_now"]
        assert shown["count"] >= 5 and shown["paths"][:5] == [f"/in/{number:02}" for number in range(5)]
        assert abs((ftpcoord.epoch_seconds(shown["since"][:-1]) or 0) - time.time()) < PATIENCE
        # What another process can know of it, and for how long; a retry does not make it younger.
        seen = ftpcoord.read_status(site.listener.config)
        assert seen["not_now"]["since"] == shown["since"] and not seen["healthy"]
        words = f"not now since {shown['since']}: /in/00, /in/01, "
        assert words in ftpcoord.nagios_line([seen]), ftpcoord.nagios_line([seen])
        survey = ftpcoord.Survey(site.listener.config)
        told = ftpcoord.metrics([(site.listener, survey)])
        assert re.search(r"^ftpcoord_not_now_files\{.*\} ([5-9]|1\d|20)\.0$", told, re.MULTILINE)
        since = re.search(r"^ftpcoord_not_now_since_timestamp_seconds\{.*\} (.*)$", told, re.MULTILINE)
        assert since and abs(float(since[1]) - time.time()) < PATIENCE
        site.away = False
        site.arrive(files)
        site.wait("not_now_over")
        assert len(site.all("not_now_over")) == 1 and not ftpcoord.why_unready(site.listener)
        wait_for(lambda: ftpcoord.read_status(site.listener.config)["not_now"] is None, PATIENCE)
        assert not site.all("file_failed") and not site.all("file_quarantined")
        assert {attempt for _, _, attempt in site.handled} <= {1, 2}
        assert all(site.state(name, "done")["failures"] == 0 for name in files)


def test_a_pause_that_a_handler_asked_for_outlives_a_listing_of_its_folder_that_is_refused(tmp_path: Path) -> None:
    with FtpHost(files={"sub/a": b"x"}) as host:
        host.folders.add("/in/sub")
        refused = threading.Event()

        def listing(session: FtpSession, argument: str) -> None:
            if refused.is_set() and session.folder == "/in/sub":
                session.say("450 busy")
            else:
                session.on_mlsd(argument)

        for verb in ("MLSD", "LIST"):
            host.on(verb, listing, times=None)
        with Backend(tmp_path, host.settings, recursive="yes") as site:
            site.seconds = 3600.0
            wait_for(lambda: site.asked, PATIENCE)
            site.state("sub/a", "failed")
            refused.set()
            site.polls(3)
            refused.clear()
            site.polls(3)
            assert len(site.asked) == 1


def test_not_now_from_one_file_while_others_succeed_counts_from_its_third_time_on(tmp_path: Path) -> None:
    settings = {"max_attempts": 2, "retry_delay": 0.05}
    with FtpHost(files={"odd": b"x"}) as host, Backend(tmp_path, host.settings, **settings) as site:
        site.away, site.never = False, {"odd"}
        for number in range(40):
            host.put(f"{number}", b"x", number)
            if site.all("file_quarantined"):
                break
            site.polls(1)
        asked = len([name for name, _ in site.asked if name == "odd"])
        row = site.state("odd", "quarantined")
        assert (asked, row["failures"], row["attempts"]) == (4, 2, 4)
        assert not site.all("not_now", files=3), "one file is no outage"


def test_a_lone_file_that_is_told_not_now_is_never_counted(tmp_path: Path) -> None:
    with FtpHost(files={"a": b"x"}) as host:
        with Backend(tmp_path, host.settings, max_attempts=1, retry_delay=0.02) as site:
            wait_for(lambda: len(site.asked) >= 6, PATIENCE)
            assert site.state("a", "failed")["failures"] == 0
            said = [event["attempt"] for event in site.all("not_now")]
            assert said[:3] == [3, 4, 5], "said from the third time on"
            site.away = False
            site.arrive({"a": b"x"})


def test_the_handler_may_say_how_long_to_wait(tmp_path: Path) -> None:
    class Patient(Backend):
        def receive(self, file: ftpcoord.File) -> None:
            self.seconds = 0.7
            super().receive(file)

    with FtpHost(files={"a": b"x"}) as host, Patient(tmp_path, host.settings, retry_delay=0.01) as site:
        wait_for(lambda: len(site.asked) >= 2, PATIENCE)
        assert site.asked[1][1] - site.asked[0][1] >= 0.7


def test_a_file_keeps_since_when_it_is_told_not_now_until_something_else_happens() -> None:
    first = row("a.csv", "claimed", marks=ftpcoord.Marks(delivered=True, later="2026-01-12T10:15:00Z"))
    again = ftpcoord.error_text(ftpcoord.with_error(first, ftpcoord.TryLater()))
    assert again == "delivered; not now since 2026-01-12T10:15:00Z; the handler said: not now"
    assert ftpcoord.marks_in(again)[0] == first.marks and first.marks.later
    for other in (ftpcoord.HandlerFailed("no"), ftpcoord.FileChanged("new"), ftpcoord.LocalTrouble("full")):
        assert not ftpcoord.with_error(first, other).marks.later
    begun = ftpcoord.with_error(row("a.csv", "claimed"), ftpcoord.TryLater()).marks.later
    assert abs((ftpcoord.epoch_seconds(begun[:-1]) or 0) - time.time()) < 5
    # Words of a handler that look like it are words.
    said = ftpcoord.with_error(row("a.csv", "claimed"), ftpcoord.HandlerFailed(again.partition("; ")[2]))
    assert not any(ftpcoord.marks_in(ftpcoord.error_text(said))[0])


@pytest.mark.parametrize(("seconds", "kept"), [(None, None), (-1, 0.0), (float("nan"), 0.0), (1e9, 3600.0), (5, 5.0)])
def test_a_pause_is_between_nothing_and_an_hour(seconds: Optional[float], kept: Optional[float]) -> None:
    assert ftpcoord.TryLater(seconds).seconds == kept


def test_who_asks_for_no_pause_gets_one_that_grows_to_a_second() -> None:
    """Else one file is handled as often as the processor can."""
    breaker = ftpcoord.Breaker(config(retry_delay=0.3), ftpcoord.Stats())
    pauses = [breaker.refuse("/in/a", ftpcoord.TryLater(seconds))[0] for seconds in (0, -1, float("nan"), 0, 2)]
    assert pauses == [0.3, 0.6, 1.0, 1.0, 2.0]


def test_a_command_says_not_now_with_exit_75_and_run_once_ends_with_1(
    postgresql: Database, files: Files, tmp_path: Path
) -> None:
    for number in range(5):
        files.put(f"{number}.txt", b"x")
    with Crew(tmp_path, postgresql, files, exec="sh -c 'echo queue is full >&2; exit 75'", max_attempts=1) as crew:
        done = crew.run("run", "--once")
        assert done.returncode == 1, done.stdout
        assert " not_now " in done.stdout and "queue is full" in done.stdout
        assert {(row["state"], row["failures"]) for row in crew.ledger()} == {("failed", 0)}
        assert crew.run("run", "--once", exec="true").returncode == 0
        assert set(crew.states().values()) == {"done"}


@pytest.mark.parametrize("code", [75, 1])
def test_what_has_its_name_in_download_dir_is_not_delivered_again_though_its_command_did_not_succeed(
    postgresql: Database, files: Files, tmp_path: Path, code: int
) -> None:
    """Somebody takes it from there before the command is run again."""
    target = tmp_path / "delivered"
    target.mkdir()
    files.put("1.txt", b"one")
    with Crew(tmp_path, postgresql, files, download_dir=target) as crew:
        assert crew.run("run", "--once", exec=f"sh -c 'exit {code}'").returncode == 1
        (target / "1.txt").unlink()
        wait_for(lambda: crew.run("run", "--once").returncode == 0, PATIENCE)
        (run,) = crew.runs()
        assert (run.content, run.attempt) == ("one", 2) and Path(run.environment["FTPCOORD_FILE"]).name == "1.txt"
        assert list(target.iterdir()) == [] and not Path(run.environment["FTPCOORD_FILE"]).exists()
        files.put("1.txt", b"another")
        assert crew.run("run", "--once").returncode == 0
        assert (target / "1.txt").read_bytes() == b"another"


def test_not_now_without_a_word_opens_the_breaker_too(tmp_path: Path) -> None:
    class Silent(Backend):
        def receive(self, file: ftpcoord.File) -> None:
            self.asked.append((file.name, time.monotonic()))
            raise ftpcoord.TryLater(None, "")

    files = {f"{number:02}": b"x" for number in range(12)}
    with FtpHost(files=files) as host, Silent(tmp_path, host.settings, retry_delay=5) as site:
        site.wait("not_now", files=3)
        site.polls()
        assert len(site.asked) == 3 and ftpcoord.why_unready(site.listener)
