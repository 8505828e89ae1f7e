"""Where copies are made and what is done with files afterwards: folders that others change, dead processes' copies,
permissions, and a ledger that somebody else has written to."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import hostile
import pytest
from conftest import wait_for
from hostile import FtpHost, FtpSession, Site
from members import PATIENCE, Crew, ftpcoord
from memory import config, found

OPENAT = pytest.mark.skipif(os.name != "posix", reason="openat")


# ---------------------------------------------------------------------------------------------------------------------
# download_dir
# ---------------------------------------------------------------------------------------------------------------------


def test_a_file_larger_than_max_size_is_said_once_and_left(tmp_path: Path) -> None:
    with FtpHost(files={"small": b"1" * 2048, "large": b"1" * 2049}) as host:
        with Site(tmp_path, host.settings, max_size="2K", after="delete") as site:
            site.arrive({"small": b"1" * 2048})
            site.polls(3)
            (refused,) = site.all("file_refused")
            assert refused["name"] == "'large'" and "max_size" in refused["reason"]
            assert list(host.files) == ["large"] and not host.said("RETR")[1:]
            host.put("large", b"2" * 2050)
            site.wait("file_refused", 2)
            host.put("large", b"3")
            site.arrive({"small": b"1" * 2048, "large": b"3"})


# ---------------------------------------------------------------------------------------------------------------------
# Private copies
# ---------------------------------------------------------------------------------------------------------------------


def copies(place: Path) -> list[Path]:
    return [path for path in place.rglob("*") if path.is_file()]


def test_private_copies_are_seen_by_no_other_user_and_go_away() -> None:
    place = ftpcoord.Workplace(config(), 1)
    copy = place.create(found("x/a.csv"))
    assert copy.path.name == "a.csv"
    assert stat.S_IMODE(copy.path.parent.stat().st_mode) == 0o700
    place.name(copy, found("x/a.csv"))
    assert copy.path == copy.part
    place.discard(copy)
    assert not copy.path.parent.exists()
    top = copy.path.parent.parent
    assert top.exists()
    place.close()
    assert not top.exists()


@pytest.mark.skipif(os.name != "posix", reason="locks of folders")
def test_copies_of_a_killed_process_are_removed_by_the_next_one_and_those_of_a_living_one_are_not(
    crew: Crew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    crew.hold()
    crew.files.put("patient.txt", b"content")
    killed = crew.start("a")
    crew.begun(1)
    (left,) = copies(temporary)
    # What is not ours to remove: something without our name, another program's, and a link to it.
    precious = temporary / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    (temporary / (left.relative_to(temporary).parts[0] + "x")).symlink_to(precious)
    living = crew.start("c", coordination_group="another")
    crew.begun(2)
    killed.kill()
    assert left.exists()
    second = crew.start("b")
    second.wait("elected")
    wait_for(lambda: not left.exists(), PATIENCE, second.said())
    wait_for(lambda: len(crew.runs("begin")) == 3, PATIENCE)
    assert (precious / "file").exists() and len(copies(temporary)) == 3, "of the living and of the new one"
    crew.let_go()
    assert living.stop() == 0 and second.stop() == 0
    assert copies(temporary) == [precious / "file"]
    crew.members.remove(living)  # its terms are another group's


def test_a_private_folder_that_somebody_removes_is_made_again(
    crew: Crew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some remove what is old in the place for temporary files."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    member = crew.start("a")
    for number in range(2):
        crew.files.put(f"{number}.txt", b"x")
        member.wait("file_done", path=f"{crew.files.root}/{number}.txt")
        for place in temporary.iterdir():
            subprocess.run(["rm", "-r", str(place)], check=True)
    assert not member.events("file_failed")


@OPENAT
def test_a_copy_in_work_whose_private_folder_was_made_anew_is_done_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))

    class Slow(Site):
        def receive(self, file: ftpcoord.File) -> None:
            super().receive(file)
            if file.name == "1":
                private = file.local.parents[1]
                shutil.copytree(private, tmp_path / "saved")  # somebody restores what was lost
                shutil.rmtree(private)
                (tmp_path / "saved").rename(private)
                host.put("2", b"two")
                wait_for(lambda: len(self.handled) == 2, PATIENCE, "\n".join(self.log))

    with FtpHost({"1": b"one"}) as host, Slow(tmp_path, host.settings, "handler") as site:
        site.wait("file_done", 2)
        site.polls()
        assert sorted(site.handled) == [("1", b"one", 1), ("2", b"two", 1)]


def test_a_place_for_temporary_files_that_is_missing_is_named_and_not_the_servers_file(
    crew: Crew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    member = crew.start("a")
    crew.files.put("1.txt", b"x")
    member.wait("file_done")
    subprocess.run(["rm", "-r", str(temporary)], check=True)
    crew.files.put("2.txt", b"x")
    failed = member.wait("file_failed")
    assert str(temporary) in failed.fields["error"] and "2.txt" not in failed.fields["error"]
    temporary.mkdir()
    wait_for(lambda: len(member.events("file_done")) == 2, PATIENCE, member.said())
    assert crew.ledger()[1]["failures"] == 0


@OPENAT
def test_where_a_copy_could_not_be_made_is_said_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of a private folder says nothing."""
    mkdir = os.mkdir

    def full(name: Any, mode: int = 0o777, *, dir_fd: Optional[int] = None) -> None:
        if dir_fd is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        mkdir(name, mode)

    monkeypatch.setattr(os, "mkdir", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with FtpHost({"a": b"1"}) as host, Site(tmp_path, host.settings, "handler") as site:
        error = site.wait("file_failed")["error"]
        assert f"{tmp_path}/ftpcoord-copies-" in error and "No space left on device" in error


def no_place() -> str:
    raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/']")


def test_a_host_without_a_place_for_temporary_files_delivers_into_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a container whose only volume that can be written to is that one."""
    monkeypatch.setattr(tempfile, "gettempdir", no_place)
    with FtpHost({"a": b"1"}) as host, Site(tmp_path, host.settings) as site:
        site.arrive({"a": b"1"})


def test_a_file_without_a_place_for_its_copy_waits_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", no_place)
    with FtpHost({"a": b"1"}) as host, Site(tmp_path, host.settings, "handler") as site:
        assert ": No usable temporary directory" in site.wait("file_failed", 2)["error"]
        row = site.row("a")
        assert row is not None and row["failures"] == 0 and host.files
        monkeypatch.undo()
        site.arrive({"a": b"1"})


def test_what_a_handler_leaves_beside_its_copy_goes_with_it(tmp_path: Path) -> None:
    """A copy that it has renamed holds what nobody else is to read."""
    places: list[Path] = []

    def renames(file: ftpcoord.File) -> None:
        file.local.with_name("unpacked").mkdir()
        file.local.rename(file.local.with_name("unpacked") / "old")
        places.append(file.local.parent)

    with FtpHost({"a": b"1"}) as host, Site(tmp_path, host.settings, "handler") as site:
        site.receive = renames  # type: ignore[method-assign]
        site.wait("file_done")
        assert places and not places[0].exists()


# ---------------------------------------------------------------------------------------------------------------------
# A ledger that somebody else has written to
# ---------------------------------------------------------------------------------------------------------------------

FORGED = {
    "another action": ("/in/kept", "delete", "keep"),
    "another folder": ("/in/kept", "move:/out", "move:done"),
    "outside": ("/other/kept", "delete", "delete"),
    "outside by dots": ("/in/../other/kept", "delete", "delete"),
    "a name that begins alike": ("/in2/kept", "delete", "delete"),
    "the folder itself": ("/in", "delete", "delete"),
    "a command in the path": ("/in/x\r\nDELE /other/kept", "delete", "delete"),
}


@pytest.mark.parametrize("forged", FORGED)
@pytest.mark.parametrize("state", ["done", "quarantined"])
def test_an_action_in_the_ledger_that_is_not_todays_or_not_below_the_folder_is_dropped_and_said(
    tmp_path: Path, forged: str, state: str
) -> None:
    path, action, after = FORGED[forged]
    with (
        FtpHost(files={"kept": b"1"}) as host,
        Site(tmp_path, host.settings, after=after, after_error=after, pattern="none") as site,
    ):
        site.polls(1)
        with contextlib.closing(sqlite3.connect(tmp_path / "coordination.db", timeout=10)) as ledger:
            ledger.execute(
                "INSERT INTO file_ledger SELECT group_id, ?, ?, 1, '', ?, term, task_id, 1, 0, NULL,"
                " datetime('now'), '', ? FROM token_holder",
                (ftpcoord.sha256_text(path), path, state, action),
            )
            ledger.commit()
            site.polls(1)
            kept = site.wait("file_kept")
            assert "the action in the ledger is dropped" in kept["reason"]
            site.polls(2)
            assert len(site.all("file_kept")) == 1
            assert ledger.execute("SELECT action FROM file_ledger").fetchall() == [("",)]
        assert not any(host.said(verb) for verb in ("DELE", "RNFR", "MKD")) and "kept" in host.files


def test_an_action_that_is_due_from_before_is_done_if_the_settings_are_the_same(crew: Crew) -> None:
    """A member that died between `done` and the move leaves it to the next one."""
    crew.files.put("1.txt", b"x")
    crew.settings["after"] = "keep"
    first = crew.start("a")
    first.wait("file_done")
    first.kill()
    crew.database.execute("UPDATE file_ledger SET action = 'move:done'")
    crew.start("b", after="move:done")
    wait_for((crew.files.root / "done/1.txt").exists, PATIENCE)


# ---------------------------------------------------------------------------------------------------------------------
# What is imported
# ---------------------------------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------------------------------
# Connections and workers
# ---------------------------------------------------------------------------------------------------------------------


class Held(Site):
    """Its handler waits to be let go."""

    def __init__(self, folder: Path, settings: dict[str, Any], **more: Any) -> None:
        super().__init__(folder, settings, "handler", **more)
        self.begun: list[str] = []
        self.let_go = threading.Event()

    def __enter__(self) -> Held:
        super().__enter__()
        return self

    def receive(self, file: ftpcoord.File) -> None:
        self.begun.append(file.name)
        self.let_go.wait(PATIENCE)
        super().receive(file)


def test_one_allowed_connection_serves_listings_and_as_many_handlers_as_there_are_workers(tmp_path: Path) -> None:
    files = {f"{number}": b"x" for number in range(3)}
    with FtpHost(files=dict(files)) as host:
        host.on(
            "PASS",
            lambda session, argument: session.say("530 no") if host.open_sessions > 1 else session.on_pass(argument),
            times=None,
        )
        with Held(tmp_path, host.settings, workers=3, after="delete") as site:
            wait_for(lambda: len(site.begun) == 3, PATIENCE, "three handlers at once")
            site.polls(3)
            site.let_go.set()
            site.arrive(files)
            wait_for(lambda: not host.files, PATIENCE)
            assert not site.all("server_down") and not site.all("file_failed")


def test_no_more_connections_than_workers_and_none_for_a_limit_of_the_server_twice(tmp_path: Path) -> None:
    files = {f"{number:02}": bytes(200_000) for number in range(30)}
    most: list[int] = []
    with FtpHost(files=dict(files)) as host:

        def counted(session: FtpSession, argument: str) -> None:
            most.append(host.open_sessions)
            session.on_retr(argument)

        host.on("RETR", counted, times=None)
        host.on(
            "PASS",
            lambda session, argument: session.say("530 no") if host.open_sessions > 2 else session.on_pass(argument),
            times=None,
        )
        with Site(tmp_path, host.settings, workers=4) as site:
            site.arrive(files)
            site.polls(3)
        assert max(most) <= 4 and len(host.said("PASS")) <= 3, "two, and one that was refused"


def test_a_stop_cuts_a_listing_and_lets_handlers_end(tmp_path: Path) -> None:
    with FtpHost(files={"a": b"1"}) as host:
        with Held(tmp_path, host.settings, timeout=20, after="delete", drain_timeout=20) as site:
            wait_for(lambda: site.begun, PATIENCE)
            host.on("MLSD", hostile.silence, times=None)
            listings = len(host.said("MLSD"))
            wait_for(lambda: len(host.said("MLSD")) > listings, PATIENCE, "a listing that hangs")
            site.listener.stop()
            time.sleep(0.3)
            assert site.listener.polling() and not site.all("released")
            stopped = time.monotonic()
            site.let_go.set()
            site.wait("released")
            assert time.monotonic() - stopped < 3, "not the 20 s of a listing that hangs"
            assert site.handled == [("a", b"1", 1)] and site.all("file_done") and not host.files


class Fails(Held):
    """Its handler fails once it is let go."""

    def receive(self, file: ftpcoord.File) -> None:
        super().receive(file)
        raise ValueError("no good")


@pytest.mark.parametrize("kind", [Held, Fails])
def test_a_row_that_an_operator_changes_while_its_file_is_in_work_is_said(tmp_path: Path, kind: type[Held]) -> None:
    with FtpHost(files={"a": b"1"}) as host, kind(tmp_path, host.settings, retry_delay=30, after="delete") as site:
        wait_for(lambda: site.begun, PATIENCE)
        with contextlib.closing(sqlite3.connect(tmp_path / "coordination.db", timeout=10)) as connection:
            connection.execute("UPDATE file_ledger SET state = 'quarantined'")
            connection.commit()
        site.let_go.set()
        said = site.wait("file_failed", path="/in/a")
        assert "changed meanwhile" in said["error"]
        site.polls(3)
        assert list(host.files) == ["a"] and site.state("a", "quarantined") and len(site.handled) == 1


def test_what_a_stop_finds_done_is_still_removed(tmp_path: Path) -> None:
    files = {f"{number}": b"x" for number in range(10)}
    with FtpHost(files=dict(files)) as host:

        def stop(session: FtpSession, argument: str) -> None:
            site.listener.stop()
            time.sleep(0.05)
            session.on_dele(argument)

        host.on("DELE", stop, times=None)
        with Site(tmp_path, host.settings, workers=1, after="delete") as site:
            site.wait("released")
            assert len(site.all("file_done")) == 10 and not host.files


def test_a_stop_ends_in_its_time_also_while_the_only_connection_is_busy(tmp_path: Path) -> None:
    with FtpHost(files={"a": bytes(1000)}) as host:
        ended = threading.Event()

        def drip(session: FtpSession, argument: str) -> None:
            session.say("150 here")
            data = session.data()
            while not ended.wait(0.05):
                data.sendall(b"x")

        host.on("RETR", drip, times=None)
        with Site(tmp_path, host.settings, timeout=20, workers=1, drain_timeout=0.5) as site:
            wait_for(lambda: host.said("RETR"), PATIENCE)
            site.wait("polled")
            time.sleep(0.5)  # the next poll waits for the connection
            stopped = time.monotonic()
            site.listener.stop()
            assert site.listener.join(PATIENCE) and time.monotonic() - stopped < 5
            ended.set()


def test_a_lease_that_ends_during_the_looks_before_a_move_lets_nothing_be_moved(tmp_path: Path) -> None:
    leases: list[ftpcoord.Lease] = []
    with FtpHost(files={"a": b"1"}) as host:

        def lose(session: FtpSession, argument: str) -> None:
            leases[-1].lose()
            session.on_rnfr(argument)

        host.on("RNFR", lose)
        site = Site(tmp_path, host.settings, "own", after="move:done")
        site.listener.on_file("*")(lambda file: leases.append(file.lease))
        with site:
            wait_for(lambda: host.said("RNFR"), PATIENCE)
            wait_for(lambda: len(host.said("RNFR")) > 1, PATIENCE, "the next term does it")
            assert len(leases) == 1 and site.wait("elected", 2)
            wait_for(lambda: "done/a" in host.files, PATIENCE)
            first, second = (at for at, said in enumerate(host.commands) if said.startswith("RNFR"))
            assert not [said for said in host.commands[first:second] if said.startswith("RNTO")]


def test_a_commands_grace_ends_before_another_member_can_be_active(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graces: list[float] = []
    cut = ftpcoord.Command.cut

    def noted(command: ftpcoord.Command, grace: float) -> None:
        graces.append(grace)
        cut(command, 0.0)

    monkeypatch.setattr(ftpcoord.Command, "cut", noted)
    with FtpHost(files={"a": b"1"}) as host, Site(tmp_path, host.settings, "own", exec="sleep 60") as site:
        site.state("a", "claimed")
        with monkeypatch.context() as at_the_deadline:
            at_the_deadline.setattr(ftpcoord.Lease, "remaining", lambda lease, now=None: 0.0)
            wait_for(lambda: graces, PATIENCE)
        timing = site.listener.member.timing
        assert graces[0] * 1.1 <= timing.stale_after - 1.1 * (timing.stale_after - timing.margin) + 1e-9


def test_leases_that_this_process_itself_has_lost_are_no_deaths_of_a_process(tmp_path: Path) -> None:
    attempts: list[int] = []

    def handle(file: ftpcoord.File) -> None:
        attempts.append(file.attempt)
        if file.attempt < 5:
            file.lease.lose()

    with FtpHost(files={"a": b"1"}) as host:
        site = Site(tmp_path, host.settings, "own")
        site.listener.on_file("*")(handle)
        with site:
            wait_for(lambda: site.all("file_done"), PATIENCE)
            assert attempts == [1, 2, 3, 4, 5] and not site.all("file_failed") and not site.all("file_quarantined")


def test_a_long_walk_through_many_folders_is_progress(tmp_path: Path) -> None:
    names = [f"sub{number:02}" for number in range(12)]
    with FtpHost(files={f"{name}/a": b"1" for name in names}) as host:
        host.folders.update(f"/in/{name}" for name in names)

        def slow(session: FtpSession, argument: str) -> None:
            time.sleep(0.1)
            session.on_mlsd(argument)

        host.on("MLSD", slow, times=None)
        with Site(tmp_path, host.settings, recursive=True, stall_timeout=0.7) as site:
            site.arrive({f"{name}/a": b"1" for name in names})
            site.polls(1)
            assert not site.all("handing_over") and not site.all("lost")


def test_a_file_whose_holders_died_is_acted_on_in_the_poll_that_puts_it_in_quarantine(tmp_path: Path) -> None:
    with FtpHost(files={"a": b"1"}) as host:
        site = Site(tmp_path, host.settings, "handler", max_attempts=1, after_error="delete", polling_interval=60)
        with contextlib.closing(ftpcoord.open_database(site.listener.config)) as database:
            database.prepare()
            with contextlib.closing(ftpcoord.open_server(site.listener.config)) as server:
                (entry,) = server.list("/in")
            found = ftpcoord.Row("/in/a", entry.size, entry.mtime, "done", 0, 0, 0)
            database.adopt(site.listener.config.coordination_group, "dead", [found])
        with contextlib.closing(sqlite3.connect(tmp_path / "coordination.db")) as connection, connection:
            claimed = "state = 'claimed', term = 99, attempts = 2, error = 'its process ended 2 times; '"
            assert connection.execute(f"UPDATE file_ledger SET {claimed}").rowcount == 1
        with site:
            site.wait("file_quarantined")
            wait_for(lambda: not host.files, PATIENCE, "\n".join(site.log))
            wait_for(lambda: not site.state("a", "quarantined")["action"], PATIENCE, "its row knows of it")
            assert not site.handled


@pytest.mark.parametrize("delivery", ["folder", "handler"])
def test_no_copy_is_left_when_the_ledger_is_told_what_became_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delivery: str
) -> None:
    """Where both are on one disk, and that is full, the ledger needs the room."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen: list[tuple[str, list[str]]] = []

    class Watched(ftpcoord.MemoryRows):  # type: ignore[misc]
        def write(self, fence: ftpcoord.Fence, changes: Sequence[ftpcoord.Change]) -> list[bool]:
            left = [path.name for path in copies(tmp_path) if path.name == "a" or path.suffix == ".part"]
            seen.extend((change.new.state, left) for change in changes if change.new)
            return super().write(fence, changes)  # type: ignore[no-any-return]

    class Failing(Site):
        def receive(self, file: ftpcoord.File) -> None:
            super().receive(file)
            if len(self.handled) == 1:
                raise ValueError("no good")

    monkeypatch.setattr(ftpcoord, "MemoryRows", Watched)
    with FtpHost({"a": b"1" * 9}) as host:
        host.on("RETR", hostile.content(b"1" * 4))
        with Failing(tmp_path, host.settings, delivery, ledger="off", after="delete") as site:
            site.wait("file_done")
    assert {state for state, _ in seen} == {"claimed", "failed", "done"}
    assert not [left for state, left in seen if left and (state == "failed" or delivery == "handler")]
