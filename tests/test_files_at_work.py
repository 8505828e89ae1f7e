"""What happens to the files: taken when whole, handled once a version, then kept, deleted, moved or quarantined."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Database, Files, wait_for
from members import PATIENCE, Crew, alive, never, stores


@pytest.fixture
def crew(postgresql: Database, files: Files, tmp_path: Path) -> Iterator[Crew]:
    with Crew(tmp_path, postgresql, files) as crew:
        yield crew


# ----------------------------------------------------------------------------- versions


def test_a_file_in_work_is_not_taken_twice_and_a_new_version_that_arrives_meanwhile_is_handled_after_it(
    crew: Crew,
) -> None:
    """after = delete: the version that nobody has handled is not deleted."""
    crew.settings["after"] = "delete"
    crew.hold()
    crew.files.put("1.txt", b"first")
    member = crew.start("a")
    crew.begun(1)
    crew.files.put("1.txt", b"second version")
    polls = member.polls()
    wait_for(lambda: member.polls() >= polls + 3, PATIENCE, "polls to go on while a file is in work")
    assert len(crew.runs("begin")) == 1
    crew.let_go()
    crew.handled("1.txt", "1.txt")
    wait_for(lambda: not crew.files.names(), PATIENCE)
    first, second = crew.runs()
    assert (first.content, second.content) == ("first", "second version")
    assert (first.attempt, second.attempt) == (1, 1) and second.at > first.at
    assert len(crew.runs("begin")) == 2
    wait_for(lambda: not crew.ledger())


def test_with_keep_each_version_is_handled_once_whoever_is_active(crew: Crew) -> None:
    crew.files.put("1.txt", b"one")
    member = crew.start("a")
    crew.handled("1.txt")
    crew.files.put("1.txt", b"another one")
    crew.handled("1.txt", "1.txt")
    wait_for(lambda: crew.states() == {"1.txt": "done"})
    assert member.stop() == 0
    # The same size, another time.
    crew.files.put("1.txt", b"one another", time.time() - 7200)
    second = crew.start("b")
    crew.handled("1.txt", "1.txt", "1.txt")
    polls = second.polls()
    wait_for(lambda: second.polls() >= polls + 3)
    assert [run.content for run in crew.runs()] == ["one", "another one", "one another"]
    assert {run.attempt for run in crew.runs()} == {1}


def test_a_file_uploaded_again_after_a_move_is_handled_again_and_its_target_gets_a_numbered_name(crew: Crew) -> None:
    crew.settings["after"] = "move:done"
    stamp = time.time() - 3600
    member = crew.start("a")
    for number in range(1, 4):
        crew.files.put("report.csv", b"same", stamp)  # the very same version each time
        crew.begun(number)
        wait_for(lambda: crew.files.names() == ["done"], PATIENCE, "the file to be moved")
        wait_for(lambda: not crew.ledger())
    assert {run.attempt for run in crew.runs()} == {1}
    moved = crew.files.root / "done"
    assert sorted(os.listdir(moved)) == ["report.1.csv", "report.2.csv", "report.csv"]
    # The folder of moved files is not listed.
    polls = member.polls()
    wait_for(lambda: member.polls() >= polls + 2)
    assert len(crew.runs("begin")) == 3


@pytest.mark.parametrize("how", ["keep", "delete", "move:done", "move:../elsewhere"])
def test_after_says_what_becomes_of_a_handled_file_and_its_marker(crew: Crew, how: str) -> None:
    """ready_suffix: a file is taken only when its marker is there; the marker shares its fate."""
    inbox = crew.files.root / "in"
    for name in ("with.csv", "with.csv.ok", "without.csv", "alone.ok"):
        crew.files.put(f"in/{name}", b"x")
    member = crew.start("a", after=how, ready_suffix=".ok", url=crew.files.url + "/in")
    crew.handled("with.csv")
    left = sorted(["without.csv", "alone.ok", *(["with.csv", "with.csv.ok"] if how == "keep" else [])])
    wait_for(lambda: sorted(path.name for path in inbox.iterdir() if path.is_file()) == left, PATIENCE)
    if how.startswith("move:"):
        moved = inbox / how[len("move:") :]
        wait_for(lambda: sorted(os.listdir(moved)) == ["with.csv", "with.csv.ok"], PATIENCE)
    wait_for(lambda: crew.states() == ({"with.csv": "done"} if how == "keep" else {}))
    crew.files.put("in/without.csv.ok", b"")
    crew.handled("with.csv", "without.csv")
    polls = member.polls()
    wait_for(lambda: member.polls() >= polls + 2)
    assert len(crew.runs("begin")) == 2


# ----------------------------------------------------------------------------- failures


def test_failures_back_off_and_end_in_quarantine_and_only_there_after_error_acts(crew: Crew) -> None:
    crew.fail()
    crew.files.put("bad.txt", b"x")
    member = crew.start("a", max_attempts=3, after="delete", after_error="move:bad")
    quarantined = member.wait("file_quarantined")
    assert [run.attempt for run in crew.runs("begin")] == [1, 2, 3]
    failed = member.events("file_failed")
    assert [event.fields["retry_in"] for event in failed] == ["0.300", "0.600"]
    assert all("this file is no good" in event.fields["error"] for event in [*failed, quarantined])
    assert quarantined.level == "error" and quarantined.fields["term"] == "1"
    begun = [run.at for run in crew.runs("begin")]
    assert begun[1] - begun[0] >= 0.3 and begun[2] - begun[1] >= 0.6
    wait_for(lambda: crew.files.names() == ["bad"], PATIENCE)
    assert os.listdir(crew.files.root / "bad") == ["bad.txt"]
    wait_for(lambda: crew.states() == {"bad.txt": "quarantined"})
    (row,) = crew.ledger()
    assert (row["failures"], row["action"]) == (3, "") and "no good" in row["error"]
    polls = member.polls()
    wait_for(lambda: member.polls() >= polls + 3)
    assert len(crew.runs("begin")) == 3, "a quarantined file rests"


def test_before_quarantine_a_failed_file_stays_where_it_is(crew: Crew) -> None:
    crew.fail()
    crew.files.put("bad.txt", b"x")
    member = crew.start("a", max_attempts=5, after_error="delete", retry_delay=0.5)
    wait_for(lambda: len(crew.runs("begin")) >= 2)
    assert crew.files.names() == ["bad.txt"]
    crew.fail(False)
    crew.handled("bad.txt")
    wait_for(lambda: crew.states() == {"bad.txt": "done"})
    assert crew.files.names() == ["bad.txt"] and not member.events("file_quarantined")


def test_a_new_version_of_a_quarantined_file_is_a_new_file(crew: Crew) -> None:
    crew.fail()
    crew.files.put("bad.txt", b"x")
    crew.start("a", max_attempts=1).wait("file_quarantined")
    crew.fail(False)
    crew.files.put("bad.txt", b"better")
    crew.handled("bad.txt")
    assert crew.runs()[0].attempt == 1
    wait_for(lambda: crew.states() == {"bad.txt": "done"})


def test_quarantine_holds_over_a_change_of_the_active_member(crew: Crew) -> None:
    crew.fail()
    crew.files.put("bad.txt", b"x")
    first = crew.start("a", max_attempts=1)
    first.wait("file_quarantined")
    assert first.stop() == 0
    crew.fail(False)
    second = crew.start("b")
    second.wait("elected")
    wait_for(lambda: second.polls() >= 3)
    assert len(crew.runs("begin")) == 1


def test_a_command_that_takes_longer_than_exec_timeout_is_ended_and_has_failed(crew: Crew) -> None:
    crew.hold()
    crew.files.put("1.txt", b"x")
    member = crew.start("a", exec_timeout=0.5, max_attempts=1)
    quarantined = member.wait("file_quarantined")
    assert "exec_timeout" in quarantined.fields["error"]
    assert not alive(crew.runs("begin")[0].pid)


@pytest.mark.parametrize("with_command", [False, True], ids=["folder", "command"])
def test_quarantine_of_many_files_at_once_moves_them_all(
    postgresql: Database, files: Files, tmp_path: Path, target: Path, with_command: bool
) -> None:
    """With one connection, in use when they fail: files that the server does not let anybody read."""
    for number in range(40):
        files.put(f"{number}.txt", b"x").chmod(0)
    with Crew(tmp_path, postgresql, files, download_dir=target, max_attempts=1) as crew:
        if not with_command:
            crew.settings["exec"] = None
        member = crew.start("a", after_error="move:bad", workers=1)
        wait_for(lambda: len(member.events("file_quarantined")) == 40, PATIENCE)
        wait_for(lambda: files.names() == ["bad"], PATIENCE)
        assert len(os.listdir(files.root / "bad")) == 40
        wait_for(lambda: os.listdir(target) == [], PATIENCE, "the last part to be discarded")
        wait_for(lambda: {(row["state"], row["action"]) for row in crew.ledger()} == {("quarantined", "")})
        assert crew.names("begin") == []


# ----------------------------------------------------------------------------- what is taken, and when


def test_a_half_written_upload_is_left_alone_until_it_rests(crew: Crew) -> None:
    """A slow writer that appends more often than `settle`."""
    crew.settings.update(settle=1.0, polling_interval=0.2)
    path = crew.files.put("slow.txt", b"0")
    member = crew.start("a")
    member.wait("elected")
    written = b"0"
    for number in range(1, 16):
        with open(path, "ab") as upload:
            upload.write(b"%d," % number)
        written += b"%d," % number
        never(lambda: crew.runs("begin"), 0.2, "it took a file that was still being written")
    crew.handled("slow.txt")
    assert crew.runs()[0].content.encode() == written and crew.runs()[0].attempt == 1
    assert len(crew.runs("begin")) == 1 and member.polls() > 2
    assert not member.events("file_failed"), "it was not even tried while it grew"


def test_names_are_chosen_by_pattern_exclude_and_folder(crew: Crew) -> None:
    """Temporary and hidden names are left alone unless they are asked for."""
    wanted = ["a.csv", "b.csv", "Z.csv"]
    for name in [
        *wanted,
        "c.txt",
        "b.old.csv",
        ".hidden.csv",
        "d.csv.part",
        "e.csv.tmp",
        "f.csv.filepart",
        "g.csv~",
        "sub/deep.csv",
    ]:
        crew.files.put(name, b"x")
    (crew.files.root / "folder.csv").mkdir()
    (crew.files.root / "link.csv").symlink_to(crew.files.root / "c.txt")
    member = crew.start("a", pattern="*.csv*", exclude="*.old.csv,x*", workers=1)
    crew.handled(*wanted, *(["link.csv"] if "link.csv" in crew.names() else []))
    polls = member.polls()
    wait_for(lambda: member.polls() >= polls + 3)
    assert set(crew.names("begin")) - {"link.csv"} == set(wanted)


@pytest.mark.parametrize(
    ("sort", "expected"),
    [("-size", "acb"), ("mtime", "cab")],
)
def test_files_are_taken_in_the_order_of_sort(crew: Crew, sort: str, expected: str) -> None:
    now = time.time()
    for name, size, age in (("a", 30, 200), ("b", 10, 100), ("c", 20, 300)):
        crew.files.put(name, b"x" * size, now - age)
    assert crew.run("run", "--once", sort=sort, workers=1).returncode == 0
    assert "".join(run.name for run in crew.runs("begin")) == expected


def test_min_age_max_age_and_max_files(crew: Crew) -> None:
    crew.files.put("old.txt", b"x", time.time() - 7200)
    crew.files.put("new.txt", b"x")
    began = time.time()
    member = crew.start("a", min_age=2, max_age=3600, settle=0, max_files=1)
    crew.begun(1)
    assert crew.runs("begin")[0].name == "new.txt" and time.time() - began >= 2
    for number in range(3):
        crew.files.put(f"{number}.txt", b"x")
    wait_for(lambda: len(crew.runs()) == 4, PATIENCE)
    assert {event.fields["new"] for event in member.events("polled")} == {"0", "1"}
    assert "old.txt" not in crew.names("begin")


# ----------------------------------------------------------------------------- download_dir


# ----------------------------------------------------------------------------- odd names


@stores("vsftpd", "sshd")
def test_undecodable_and_odd_names_go_all_the_way(
    postgresql: Database, file_server: Files, tmp_path: Path, target: Path
) -> None:
    names = [
        b"caf\xe9.csv",
        b"\x80\xff.csv",
        "grün 雪.csv".encode(),
        b"100%.csv",
        b"%41.csv",
        b"sp ace.csv",
        b"-rf.csv",
        b"q'uo\"te.csv",
        b"$(x);&.csv",
    ]
    for name in names:
        file_server.put(name, name)
    with Crew(tmp_path, postgresql, file_server, download_dir=target, after="move:done", encoding="utf-8") as crew:
        member = crew.start("a")
        wait_for(lambda: os.listdir(file_server.root) == ["done"], PATIENCE, "all files to be moved")
        wait_for(lambda: not crew.ledger(), PATIENCE)
        assert sorted(os.listdir(os.fsencode(file_server.root / "done"))) == sorted(names)
        assert sorted(os.listdir(os.fsencode(target))) == sorted(names)
        assert sorted(os.fsencode(run.name) for run in crew.runs()) == sorted(names)
        for run in crew.runs():
            assert run.content.encode("latin-1") == os.fsencode(run.name)
            assert os.fsencode(run.environment["FTPCOORD_PATH"]).endswith(b"/" + os.fsencode(run.name))
        paths = [os.path.basename(event.fields["path"]) for event in member.events("file_done")]
        assert {"caf%E9.csv", "%80%FF.csv", "grün 雪.csv", "100%.csv", "%41.csv"} <= set(paths)
        # With keep they stay in the ledger, and are known again by the next member.
        crew.settings["after"] = "keep"
        file_server.put(names[0], b"again")
        wait_for(lambda: not crew.ledger() and len(crew.runs()) == len(names) + 1, PATIENCE)
        assert member.stop() == 0
        file_server.put(names[0], b"kept")
        for member_id in "bc":
            assert crew.run("run", "--once", member_id=member_id).returncode == 0
        assert len(crew.runs("begin")) == len(names) + 2
        (row,) = crew.ledger()
        assert row["path"].endswith("/caf%E9.csv") and row["state"] == "done"
        assert crew.call("retry", "--done", "caf*").stdout.split()[0] == "1"
        assert crew.run("run", "--once", member_id="d").returncode == 0
        assert len(crew.runs("begin")) == len(names) + 3


# ----------------------------------------------------------------------------- ledger = off


def test_with_ledger_off_files_are_handled_and_removed_and_nothing_is_written_to_it(crew: Crew) -> None:
    crew.database.execute("DROP TABLE file_ledger")
    crew.settings.update(ledger="off", after="delete")
    first = crew.start("a")
    first.wait("elected")
    second = crew.start("b")
    second.wait("standby")
    for number in range(10):
        crew.files.put(f"{number}.txt", b"x")
    crew.handled(*(f"{number}.txt" for number in range(10)))
    wait_for(lambda: not crew.files.names(), PATIENCE)
    crew.fail()
    crew.files.put("bad.txt", b"x")
    wait_for(lambda: len(first.events("file_failed")) >= 2, PATIENCE)
    assert first.stop() == 0
    second.wait("elected")
    crew.fail(False)
    wait_for(lambda: not crew.files.names(), PATIENCE)
    assert not first.events("file_quarantined") and crew.names().count("bad.txt") == 1
    assert crew.status()["files"] == {}
