"""Members die, hang, stop and come in crowds: one is active, the next one is in time, nothing is lost or done twice."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import servers
from conftest import Database, Files, new_folder, wait_for
from members import LOAD, PATIENCE, ROUND_TRIP, Crew, alive, kinds, never, through
from servers import Proxy


@kinds("postgresql", "mysql", "sqlite")
def test_after_sigkill_another_member_is_active_in_time_and_only_what_was_in_work_is_handled_again(
    database: Database, files: Files, tmp_path: Path
) -> None:
    names = [f"{number:02}.txt" for number in range(30)]
    for name in names[:10]:
        files.put(name, name.encode())
    with Crew(tmp_path, database, files, workers=3, polling_interval=0.4) as crew:
        members = [crew.start(name) for name in "abc"]
        first = crew.active()
        crew.handled(*names[:10])
        crew.hold()
        for name in names[10:]:
            files.put(name, name.encode())
        running = crew.begun(13)[10:]
        commands = {run.pid for run in running}
        in_work = {run.name for run in running}
        for member in crew.standbys():
            member.wait("standby", active=first.name)

        killed = first.kill()
        crew.let_go()
        second, event = crew.elected(*(set(members) - {first}), since=killed, timeout=crew.liveness + PATIENCE)
        assert event.at - killed <= crew.liveness + LOAD, "the next one came too late"
        assert int(event.fields["term"]) == first.term() + 1
        # It polls at once, not only after polling_interval.
        assert second.wait("polled", since=event.at).at - event.at <= crew.settings["settle"] + ROUND_TRIP

        crew.handled(*names)
        begun = crew.names("begin")
        assert {name for name in names if begun.count(name) == 2} == in_work
        assert all(begun.count(name) == 1 for name in names if name not in in_work)
        for run in crew.runs():
            assert run.attempt == (2 if run.name in in_work else 1)
            assert run.content == run.name
        # A command dies with its member.
        assert not any(alive(pid) for pid in commands)
        wait_for(lambda: set(crew.states().values()) == {"done"})


@kinds("postgresql", "sqlite")
def test_ten_hand_overs_in_a_row_each_within_a_heartbeat_and_a_round_trip(
    database: Database, files: Files, tmp_path: Path
) -> None:
    """Back and forth between two members; a file at each turn. Polls come at once, whatever polling_interval is."""
    with Crew(tmp_path, database, files, after="delete", polling_interval=60) as crew:
        active = crew.start("a")
        active.wait("elected", term=1)
        standby = crew.start("b")
        for turn in range(1, 11):
            standby.wait("standby", active=active.name)
            name = f"{turn}.txt"
            files.put(name, b"x")
            assert active.stop() == 0
            released = active.wait("released", term=turn)
            elected = standby.wait("elected", term=turn + 1)
            assert 0 <= elected.at - released.at <= crew.heartbeat + ROUND_TRIP
            assert elected.fields["reason"] == "released"
            crew.begun(turn)
            active, standby = standby, crew.start(active.name)
        wait_for(lambda: not files.names(), PATIENCE, "all files to be deleted")
        crew.handled(*(f"{turn}.txt" for turn in range(1, 11)))
        assert [run.member for run in crew.runs()] == ["b", "a"] * 5
        assert {run.attempt for run in crew.runs()} == {1}


@kinds("postgresql", "mysql", "sqlite")
def test_of_eight_members_started_at_once_on_an_empty_table_one_is_elected(
    database: Database, files: Files, tmp_path: Path
) -> None:
    """The database answers only when all of them are there, so that they come at one instant."""
    began = time.time()
    with Crew(tmp_path, database, files) as crew:
        if database.server is not None:
            database.server.freeze()
        members = [crew.start(f"m{number}") for number in range(8)]
        for member in members:
            member.wait("starting")
        if database.server is not None:
            database.server.thaw()
        for member in members:
            member.wait("ready")
        active = crew.active()
        for member in set(members) - {active}:
            member.wait("standby", active=active.name)
        polls = active.polls()
        wait_for(lambda: active.polls() >= polls + 3)
        assert sum(len(member.events("elected")) for member in members) == 1
        status = crew.status()
        # Whoever finds the first beats of others cannot know that they never held a lease: its term is the time.
        assert status["active"] == active.name and (status["term"] == 1 or status["term"] > began)
        assert sorted(member["role"] for member in status["members"]) == ["active"] + ["standby"] * 7


def test_of_two_processes_with_one_member_id_one_is_active_and_the_other_says_so(
    postgresql: Database, files: Files, tmp_path: Path
) -> None:
    with Crew(tmp_path, postgresql, files, after="delete") as crew:
        first = crew.start("twin")
        first.wait("elected", term=1)
        second = crew.start("twin")
        assert second.wait("duplicate_member").level == "warning"
        files.put("1.txt", b"x")
        crew.handled("1.txt")
        # Its end takes nothing from the active one.
        assert second.stop() == 0
        polls = first.polls()
        wait_for(lambda: first.polls() >= polls + 3)
        assert not first.events("lost") and not second.events("elected")

        # A new process with the id of a dead one waits like any other.
        third = crew.start("twin")
        third.wait("duplicate_member")
        killed = first.kill()
        elected = third.wait("elected", crew.liveness + PATIENCE, term=2)
        assert killed < elected.at <= killed + crew.liveness + LOAD
        files.put("2.txt", b"x")
        crew.handled("1.txt", "2.txt")
        assert {run.attempt for run in crew.runs()} == {1}


def test_a_member_that_was_stopped_and_continued_has_no_further_effect_and_can_be_elected_again(
    postgresql: Database, sshd: servers.Sshd, tmp_path: Path
) -> None:
    """SIGSTOP while two commands run and a transfer is under way, for twice the liveness interval.

    Member a would delete, b keeps: so what a does after SIGCONT is seen. Each has a download folder of its own.
    """
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(new_folder("sshd", sshd))
        crew = stack.enter_context(Crew(tmp_path, postgresql, files))
        way = stack.enter_context(Proxy("127.0.0.1", sshd.port))
        folders = {name: tmp_path / f"delivered-{name}" for name in "ab"}
        for folder in folders.values():
            folder.mkdir()
        first = crew.start("a", after="delete", download_dir=folders["a"], workers=4, **through(way, files))
        first.wait("elected", term=1)
        second = crew.start("b", after="keep", download_dir=folders["b"])
        second.wait("standby", active="a")
        crew.hold()
        big = os.urandom(1 << 20) * 24
        files.put("1.txt", b"one")
        files.put("2.txt", b"two")
        wait_for(lambda: crew.names("begin") == ["1.txt", "2.txt"], PATIENCE, "two files in work")
        way.bytes, way.delay = 0, 0.05  # slow enough to be caught in the middle
        files.put("big.bin", big)
        wait_for(lambda: way.bytes > 1 << 20, PATIENCE, "a transfer to be under way")
        way.blackhole()
        wait_for(lambda: list(folders["a"].glob(".*.part")), PATIENCE)
        assert not (folders["a"] / "big.bin").exists()

        stopped = first.send(signal.SIGSTOP)
        crew.let_go()  # its commands end well meanwhile: it could mark them as done
        elected = second.wait("elected", crew.liveness + PATIENCE, term=2)
        assert elected.at - stopped <= crew.liveness + LOAD
        wait_for(lambda: (tmp_path / "delivered-b" / "big.bin").exists(), PATIENCE)
        wait_for(lambda: list(crew.states().values()) == ["done"] * 3, PATIENCE)
        again = [run for run in crew.runs() if run.member == "b"]
        assert sorted((run.name, run.attempt) for run in again) == [("1.txt", 2), ("2.txt", 2), ("big.bin", 2)]
        wait_for(lambda: time.time() >= stopped + 2 * crew.liveness, 3 * crew.liveness)

        ledger, connections = crew.ledger(), way.connections
        local = sorted(path.name for path in folders["a"].iterdir())
        way.blackhole(False)
        continued = first.send(signal.SIGCONT)
        first.wait("lost", since=continued, term=1)
        first.wait("standby", since=continued, active="b")
        polls = second.polls()
        wait_for(lambda: second.polls() >= polls + 2)
        assert files.names() == ["1.txt", "2.txt", "big.bin"], "it deleted files after its lease"
        assert crew.ledger() == ledger, "it wrote into the ledger after its lease"
        assert (folders["a"] / "1.txt").read_bytes() == b"one"
        after = {path.name for path in folders["a"].iterdir()}
        assert after <= set(local) and "big.bin" not in after, "it finished a download after its lease"
        assert sorted(path.name for path in folders["b"].iterdir()) == ["1.txt", "2.txt", "big.bin"]
        assert not first.events("file_done", since=continued) and way.connections == connections
        assert len(crew.runs("begin")) == 5

        # It can be elected again, and works.
        assert second.stop() == 0
        first.wait("elected", term=3)
        files.put("3.txt", b"three")
        wait_for(lambda: [run.name for run in crew.runs() if run.term == 3] == ["3.txt"], PATIENCE)
        wait_for(lambda: "3.txt" not in files.names(), PATIENCE)


def test_after_sigkill_in_the_middle_of_deliveries_each_file_is_in_the_folder_once_and_no_part_is_left(
    postgresql: Database, files: Files, tmp_path: Path
) -> None:
    target = tmp_path / "delivered"
    target.mkdir()
    names = [f"{number:03}.bin" for number in range(300)]
    for name in names:
        files.put(name, name.encode() * 2000)
    with Crew(tmp_path, postgresql, files, exec=None, download_dir=target, after="delete") as crew:
        first = crew.start("a")
        first.wait("elected")
        second = crew.start("b")
        second.wait("standby")
        wait_for(lambda: len(list(target.glob("*.bin"))) > 50, PATIENCE)
        first.kill()
        assert len(list(target.glob("*.bin"))) < len(names), "it was too fast for this test"
        second.wait("elected", crew.liveness + PATIENCE)
        wait_for(lambda: not files.names(), 60, "all files to be deleted")
        assert sorted(path.name for path in target.iterdir()) == names
        assert all((target / name).read_bytes() == name.encode() * 2000 for name in names)
        wait_for(lambda: not crew.ledger())


def test_a_stopping_standby_leaves_and_the_group_goes_on(postgresql: Database, files: Files, tmp_path: Path) -> None:
    with Crew(tmp_path, postgresql, files) as crew:
        first = crew.start("a")
        first.wait("elected")
        second = crew.start("b")
        second.wait("standby")
        assert second.stop() == 0
        second.wait("stopped")
        assert [member["member_id"] for member in crew.status()["members"]] == ["a"]
        polls = first.polls()
        wait_for(lambda: first.polls() >= polls + 3)
        never(lambda: first.events("lost"), crew.heartbeat, "the active member lost its lease")
