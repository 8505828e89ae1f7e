"""Nothing is forgotten because of one look, and nothing is tried for ever without being counted."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import servers
from conftest import Database, Files, new_folder, wait_for
from hostile import FtpHost, SftpHost, Site, reply, status
from members import PATIENCE, Crew, kinds


def fail(site: Site) -> None:
    """From here on its handler fails with each file."""

    def receive(file: Any) -> None:
        Site.receive(site, file)
        raise ValueError("no good")

    site.receive = receive  # type: ignore[method-assign]
    site.receive = receive  # type: ignore[method-assign]


@pytest.mark.parametrize("bad", ["empty", "refused"])
def test_a_poison_file_whose_listing_fails_now_and_then_ends_in_quarantine_with_all_its_attempts(
    tmp_path: Path, bad: str
) -> None:
    """Every other listing does not show it."""
    turn = iter(range(10**6))

    def listing(session: Any, argument: str) -> None:
        if next(turn) % 2:
            session.on_mlsd(argument)
        elif bad == "empty":
            session.send(b"")
        else:
            session.say("450 busy")

    with FtpHost(files={"a": b"1"}) as host, Site(tmp_path, host.settings, "handler", max_attempts=4) as site:
        fail(site)
        host.on("MLSD", listing, times=None)
        host.on("LIST", reply("450 busy"), times=None)
        row = site.state("a", "quarantined")
        assert (row["failures"], row["attempts"]) == (4, 4)
        assert [attempt for _, _, attempt in site.handled] == [1, 2, 3, 4]


def test_a_done_file_is_not_handled_again_because_of_one_bad_listing_whatever_the_retention(tmp_path: Path) -> None:
    with FtpHost(files={"a": b"1"}) as host, Site(tmp_path, host.settings, "handler", ledger_retention=0) as site:
        site.state("a", "done")
        for _ in range(3):
            host.on("MLSD", lambda session, argument: session.send(b""))
            site.wait("polled", len(site.all("polled", listed=0)) + 1, listed=0)
            site.polls(1)
        assert len(site.handled) == 1


def test_a_file_that_is_listed_and_called_gone_for_ever_is_counted_and_quarantined(tmp_path: Path) -> None:
    with FtpHost(files={"a": b"1", "b": b"2"}) as host:
        refuse = reply("550 no such file")
        host.on(
            "RETR",
            lambda session, name: refuse(session, name) if name.endswith("/a") else session.on_retr(name),
            times=None,
        )
        with Site(tmp_path, host.settings, "handler", max_attempts=3) as site:
            row = site.state("a", "quarantined")
            assert row["failures"] == 3 and row["attempts"] <= 4
            site.arrive({"b": b"2"})


def test_a_row_whose_file_is_not_listed_is_counted_apart_and_run_once_does_not_wait_for_it(
    sqlite: Database, files: Files, tmp_path: Path
) -> None:
    files.put("bad.txt", b"x", mtime := time.time() - 99)
    with Crew(tmp_path, sqlite, files, retry_delay=3600) as crew:
        crew.fail()
        assert crew.run("run", "--once").returncode == 1
        (files.root / "bad.txt").unlink()
        assert crew.run("run", "--once").returncode == 0
        found = crew.status()["files"]
        assert (found["failed"], found["unlisted"]) == (0, 1)
        assert "not listed" in crew.ledger()[0]["error"] and "no good" in crew.ledger()[0]["error"]
        # It comes back as it was: due at once, with its attempts.
        crew.fail(False)
        files.put("bad.txt", b"x", mtime)
        assert crew.run("run", "--once").returncode == 0
        assert [run.attempt for run in crew.runs()] == [2]
        assert crew.status()["files"] == {"claimed": 0, "done": 1, "failed": 0, "quarantined": 0}


def test_files_below_a_folder_that_is_refused_are_not_forgotten(sqlite: Database, files: Files, tmp_path: Path) -> None:
    """And `run --once` says that it has not seen all."""
    files.put("sub/a.txt", b"x")
    with Crew(tmp_path, sqlite, files, recursive="yes", ledger_retention=0) as crew:
        assert crew.run("run", "--once").returncode == 0
        (files.root / "sub").chmod(0)
        try:
            for _ in range(3):
                assert crew.run("run", "--once").returncode == 1
            assert crew.states() == {"a.txt": "done"}
        finally:
            (files.root / "sub").chmod(0o777)
        assert crew.run("run", "--once").returncode == 0
        assert crew.names() == ["a.txt"]


# ----------------------------------------------------------------------------- a file that ends the process

KILLER = """
import os, signal
listener = ftpcoord.Listener(**settings)
@listener.on_file("*")
def handle(file):
    with open({record!r}, "a") as out:
        out.write(f"{{file.name}} {{file.attempt}}\\n")
    if file.name == "bomb.txt":
        os.kill(os.getpid(), signal.SIGKILL)
ftpcoord.start_logging("info", "text", sys.stdout)
sys.exit(listener.run(once=True))
"""


@kinds("postgresql", "sqlite")
def test_a_file_that_kills_the_process_ends_in_quarantine(database: Database, files: Files, tmp_path: Path) -> None:
    """The third death is counted, and each one after: here two failures are enough."""
    record = tmp_path / "handled"
    files.put("bomb.txt", b"x")
    files.put("other.txt", b"x")
    with Crew(tmp_path, database, files, max_attempts=2, workers=1, retry_delay=0, liveness_check_interval=3) as crew:
        for _ in range(8):
            member = crew.script(KILLER.format(record=str(record)), name="a")
            if member.process.wait(PATIENCE) == 0:
                break
        assert crew.states() == {"bomb.txt": "quarantined", "other.txt": "done"}
        (row,) = [row for row in crew.ledger() if row["state"] == "quarantined"]
        assert "ended 4 times" in row["error"] and row["failures"] == 2
        handled = record.read_text().splitlines()
        assert sorted(handled) == [*(f"bomb.txt {attempt}" for attempt in range(1, 5)), "other.txt 1"]


def test_files_that_were_in_work_with_it_are_not_counted(sqlite: Database, files: Files, tmp_path: Path) -> None:
    """What was twice in work when the process ended is tried one at a time."""
    record = tmp_path / "handled"
    for name in ("bomb.txt", "1.txt", "2.txt", "3.txt"):
        files.put(name, b"x")
    slow = "    time.sleep(0.2 if file.name == 'bomb.txt' else 0.6)\n    if file.name"
    code = KILLER.replace("    if file.name", slow)
    with Crew(tmp_path, sqlite, files, max_attempts=1, retry_delay=0, liveness_check_interval=3) as crew:
        for _ in range(6):
            member = crew.script("import time\n" + code.format(record=str(record)), name="a")
            if member.process.wait(PATIENCE) == 0:
                break
        assert crew.states() == {"1.txt": "done", "2.txt": "done", "3.txt": "done", "bomb.txt": "quarantined"}
        assert record.read_text().count("bomb") == 3


def test_a_stop_that_cuts_a_command_short_is_no_death(crew_once: Crew) -> None:
    crew = crew_once
    (crew.folder / "deaf").touch()
    crew.hold()
    crew.files.put("1.txt", b"x")
    for number in range(1, 5):
        member = crew.start("a", drain_timeout=0.1, max_attempts=1)
        crew.begun(number)
        assert member.stop() in (0, 1)
        assert "ended" not in crew.ledger()[0]["error"] and crew.ledger()[0]["failures"] == 0


@pytest.fixture
def crew_once(sqlite: Database, files: Files, tmp_path: Path) -> Any:
    with Crew(tmp_path, sqlite, files) as crew:
        yield crew


# ----------------------------------------------------------------------------- names that this host cannot have


@pytest.mark.parametrize("delivery", ["command", "folder"])
@pytest.mark.parametrize("locale", ["C", "de_DE.ISO-8859-1"])
def test_a_name_that_the_file_systems_encoding_lacks_is_the_files_failure(
    sqlite: Database, files: Files, tmp_path: Path, delivery: str, locale: str
) -> None:
    for name in ("a.txt", "b-€.txt"):
        files.put(name, b"x")
    (tmp_path / "target").mkdir()
    with Crew(tmp_path, sqlite, files, max_attempts=2, retry_delay=0) as crew:
        folder = {"exec": None, "download_dir": tmp_path / "target"} if delivery == "folder" else {}
        environment = {**crew.environment(**folder), "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        done = crew.run("run", "--once", environment=environment)
        assert done.returncode == 0, done.stderr
        assert crew.states() == {"a.txt": "done", "b-€.txt": "quarantined"}
        assert "encoding" in crew.ledger()[1]["error"] or "names are in" in crew.ledger()[1]["error"]


# ----------------------------------------------------------------------------- run --once ends


def test_run_once_ends_with_1_while_the_file_server_is_down_or_the_folder_is_missing(
    sqlite: Database, tmp_path: Path
) -> None:
    with servers.pyftpd() as server, new_folder("pyftpd", server) as files:
        with Crew(tmp_path, sqlite, files) as crew:
            files.put("1.txt", b"x")
            assert crew.run("run", "--once", url=files.url + "/missing").returncode == 1
            server.stop()
            done = crew.run("run", "--once", timeout=30)
            assert done.returncode == 1 and "server_down" in done.stdout
            server.start()
            assert crew.run("run", "--once").returncode == 0
            assert crew.names() == ["1.txt"]


# ----------------------------------------------------------------------------- what one look must not hide from another


@pytest.mark.parametrize("unlisted", [False, True])
def test_a_death_is_remembered_also_when_the_next_listing_lacks_the_file(tmp_path: Path, unlisted: bool) -> None:
    """The row is then written by a member that has done nothing with the file."""
    with FtpHost(files={"a": b"1"}) as host:
        with Site(tmp_path, host.settings, "handler") as site:
            site.state("a", "done")
        for deaths in (1, 2):
            with contextlib.closing(sqlite3.connect(tmp_path / "coordination.db", isolation_level=None)) as database:
                error = f"its process ended {deaths - 1} times; " if deaths > 1 else ""
                database.execute("UPDATE file_ledger SET state = 'claimed', term = 0, error = ?", (error,))
            if unlisted:
                host.on("MLSD", lambda session, argument: session.send(b""))
            errors = []

            class Watching(Site):
                def receive(self, file: Any) -> None:
                    errors.append(self.row("a")["error"])  # type: ignore[index]  # noqa: B023
                    super().receive(file)

            with Watching(tmp_path, host.settings, "handler") as site:
                site.state("a", "done")
            assert [error.strip() for error in errors] == [f"its process ended {deaths} times;"]


def test_each_time_after_the_first_that_a_listed_file_is_called_gone_is_counted(tmp_path: Path) -> None:
    with SftpHost(files={"a": b"1"}) as host:
        host.on("OPEN", status(2), times=None)
        with Site(tmp_path, host.settings, "handler", max_attempts=4) as site:
            row = site.state("a", "quarantined")
            assert (row["attempts"], row["failures"]) == (5, 4) and len(site.all("file_gone")) == 1


def test_in_a_group_too_what_was_twice_in_work_at_the_end_of_a_process_is_claimed_alone(tmp_path: Path) -> None:
    with FtpHost(files=dict.fromkeys("abcd", b"1")) as host:
        with Site(tmp_path, host.settings) as site:
            for name in "abcd":
                site.state(name, "done")
        with contextlib.closing(sqlite3.connect(tmp_path / "coordination.db", isolation_level=None)) as database:
            database.execute("DELETE FROM file_ledger WHERE path IN ('/in/a', '/in/d')")
            error = "its process ended 1 times; "
            database.execute("UPDATE file_ledger SET state = 'claimed', term = 0, error = ?", (error,))
        at_work: dict[str, list[str]] = {}

        def look(session: Any, argument: str) -> None:
            rows = {name: site.row(name) for name in "abcd"}
            at_work[argument[-1]] = [n for n, row in rows.items() if row and row["state"] == "claimed" and row["term"]]
            session.on_retr(argument)

        host.on("RETR", look, times=None)
        with Site(tmp_path, host.settings, workers=1) as site:
            site.wait("file_done", 4)
        assert at_work == {name: [name] for name in "abcd"}


def test_a_file_that_is_done_and_deleted_while_it_is_listed_is_not_fetched_again(tmp_path: Path) -> None:
    with FtpHost(files={"a": b"1"}) as host:
        listing = threading.Event()

        def late(session: Any, argument: str) -> None:
            """It shows the file, which is deleted before the listing has ended."""
            shown = host.listing("/in")
            listing.set()
            wait_for(lambda: not host.files, PATIENCE)
            site.wait("file_done")
            wait_for(lambda: site.row("a") is None, PATIENCE)
            session.send(shown)

        class Slow(Site):
            def receive(self, file: Any) -> None:
                host.on("MLSD", late)
                assert listing.wait(PATIENCE)
                super().receive(file)

        with Slow(tmp_path, {**host.settings, "timeout": 5}, "handler", after="delete") as site:
            site.wait("file_done")
            site.polls(3)
            assert len(host.said("RETR")) == 1 and not site.all("file_gone")


def test_an_after_action_that_the_server_refuses_is_tried_with_growing_pauses(tmp_path: Path) -> None:
    with FtpHost(files={"a": b"1"}) as host:
        host.on("DELE", reply("550 permission denied"), times=3)
        with Site(tmp_path, host.settings, "handler", after="delete", retry_delay=1) as site:
            site.wait("file_failed", 3)
            assert [said["retry_in"] for said in site.all("file_failed")] == [1, 2, 4]
            wait_for(lambda: not host.files, PATIENCE)


def test_a_refused_folder_ends_no_pause_of_a_file_whose_row_is_gone(tmp_path: Path) -> None:
    """An operator removed the row while the handler failed: the file rests; a listing that hides it proves nothing."""
    with FtpHost(files={"s/a": b"1", "b": b"1"}) as host:
        host.folders.add("/in/s")
        site = Site(tmp_path, host.settings, "handler", recursive=True, pattern="a", retry_delay=60)

        def receive(file: Any) -> None:
            Site.receive(site, file)
            with contextlib.closing(sqlite3.connect(tmp_path / "coordination.db", timeout=10)) as database, database:
                database.execute("DELETE FROM file_ledger")
            raise ValueError("no good")

        site.receive = receive  # type: ignore[method-assign]
        with site:
            site.wait("file_failed")
            for _ in range(2):
                host.on("MLSD", lambda session, argument: session.on_mlsd(argument))  # the upper folder's
                host.on("MLSD", reply("450 busy"))
                host.on("LIST", reply("450 busy"))
                site.polls(3)
            assert len(site.handled) == 1, "\n".join(site.log)
