"""Where copies are made and what is done with files afterwards: folders that others change, dead processes' copies,
permissions, and a ledger that somebody else has written to."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Database, Files, wait_for
from hostile import FtpHost, Site
from members import PATIENCE, Crew, ftpcoord

OPENAT = pytest.mark.skipif(os.name != "posix", reason="openat")



# ---------------------------------------------------------------------------------------------------------------------
# download_dir
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def deep(files: Files, sqlite: Database, tmp_path: Path) -> Iterator[Crew]:
    """Files in subfolders are delivered to `tmp_path/target`."""
    (tmp_path / "target").mkdir()
    with Crew(tmp_path, sqlite, files, download_dir=tmp_path / "target", exec=None, recursive="yes", settle=0) as crew:
        yield crew


def upload(crew: Crew, path: str) -> None:
    (crew.files.root / path).parent.mkdir(parents=True, exist_ok=True)
    crew.files.put(path, path.encode())


@OPENAT
@pytest.mark.parametrize("level", ["x", "x/y"])
def test_a_subfolder_that_becomes_a_link_after_its_first_file_is_not_written_through_and_that_is_said(
    deep: Crew, tmp_path: Path, level: str
) -> None:
    target, outside = tmp_path / "target", tmp_path / "outside"
    (outside / "y").mkdir(parents=True)
    member = deep.start("a")
    upload(deep, "x/y/1")
    wait_for((target / "x/y/1").exists, PATIENCE, member.said())
    (target / level).rename(tmp_path / "before")
    (target / level).symlink_to(outside)
    upload(deep, "x/y/2")
    said = member.wait("file_failed")
    assert "is a link" in said.fields["error"] and level in said.fields["error"]
    assert not [path for path in outside.rglob("*") if path.is_file()]
    (target / level).unlink()
    wait_for((target / "x/y/2").exists, PATIENCE, member.said())


def test_a_subfolder_that_a_consumer_has_removed_is_made_again(deep: Crew, tmp_path: Path) -> None:
    target = tmp_path / "target"
    member = deep.start("a")
    done: list[int] = []
    for number in range(3):
        upload(deep, f"x/y/{number}")
        wait_for((target / f"x/y/{number}").exists, PATIENCE, member.said())
        wait_for(lambda: len(member.events("file_done")) == len(done) + 1)
        done.append(number)
        (target / f"x/y/{number}").unlink()
        (target / "x/y").rmdir()
        (target / "x").rmdir()
    assert not member.events("file_failed")


@OPENAT
def test_a_download_folder_may_itself_be_a_link(deep: Crew, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    deep.start("a", download_dir=tmp_path / "link")
    upload(deep, "x/1")
    wait_for((tmp_path / "disk/x/1").exists, PATIENCE)


@OPENAT
def test_a_new_subfolder_is_durable_before_a_file_in_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new name is durable when the folder that holds it was fsynced after it was made."""
    synced: list[tuple[str, bool]] = []
    plain = os.fsync

    def fsync(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}") if os.path.exists("/proc/self/fd") else ""
        synced.append((path, (tmp_path / "in/x").exists()))
        plain(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "in").mkdir()
    config = ftpcoord.Config(url="sftp://u@h/in", database="sqlite:///x", download_dir=str(tmp_path / "in"))
    ftpcoord.Workplace(config, 1).temporary(ftpcoord.Found("/in/x/y/1", "x/y/1", ftpcoord.Entry("1", "file", 1, "")))
    assert (str(tmp_path / "in"), True) in synced and (str(tmp_path / "in/x"), True) in synced


@pytest.mark.parametrize("umask", [0o022, 0o077])
@pytest.mark.parametrize(
    ("file_mode", "wanted"), [(None, {0o022: 0o640, 0o077: 0o600}), ("0660", {0o022: 0o660, 0o077: 0o660}),
                              (0o444, {0o022: 0o444, 0o077: 0o444})],
)  # fmt: skip
@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_delivered_files_have_the_permissions_of_file_mode_and_new_folders_the_like(
    tmp_path: Path, umask: int, file_mode: object, wanted: dict[int, int]
) -> None:
    before = os.umask(umask)
    try:
        with FtpHost(files={"a": b"1"}) as host, Site(tmp_path, host.settings, file_mode=file_mode) as site:
            site.arrive({"a": b"1"})
            assert stat.S_IMODE((site.target / "a").stat().st_mode) == wanted[umask]
            database = stat.S_IMODE((tmp_path / "coordination.db").stat().st_mode)
            assert not database & 0o007
    finally:
        os.umask(before)


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
    with FtpHost(files={"kept": b"1"}) as host, Site(
        tmp_path, host.settings, after=after, after_error=after, pattern="none"
    ) as site:  # fmt: skip
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

PLANTED = "import pathlib\npathlib.Path('executed').touch()\n"
ORDERS = """
import html, ftpcoord
def take(file):
    assert isinstance(file, ftpcoord.File) and html.escape("<") == "&lt;"
    file.save("out")
"""


@pytest.mark.parametrize("arguments", [["run"], ["run", "--once"]])
def test_a_module_in_the_working_folder_never_stands_for_one_of_pythons(crew: Crew, arguments: list[str]) -> None:
    """Files are often uploaded there."""
    (crew.folder / "out").mkdir()
    (crew.folder / "orders.py").write_text(ORDERS)
    for name in ("html", "ctypes", "sqlite3", "xml", "importlib", "encodings", "queue", "pyftpdlib"):
        (crew.folder / f"{name}.py").write_text(PLANTED)
    crew.files.put("1.txt", b"x")
    crew.start("a", *arguments, exec=None, handler="orders:take").wait("file_done")
    assert (crew.folder / "out/1.txt").exists() and not (crew.folder / "executed").exists()


def test_a_handler_is_not_looked_for_where_files_are_delivered(crew: Crew) -> None:
    (crew.folder / "orders.py").write_text(ORDERS)
    for place in (".", "..", crew.folder):
        done = crew.run(exec=None, handler="orders:take", download_dir=place)
        assert done.returncode == 2 and "orders" in done.stderr, done.stderr


def test_files_are_not_delivered_to_where_python_looks_for_modules(crew: Crew) -> None:
    (crew.folder / "lib/in").mkdir(parents=True)
    (crew.folder / "link").symlink_to("lib")
    for place in ("lib", "link", "."):
        environment = {**crew.environment(exec=None, download_dir=place), "PYTHONPATH": str(crew.folder / "lib")}
        for command in ("run", "check"):
            done = crew.run(command, environment=environment)
            assert done.returncode == 2 and "download_dir: Python looks for modules" in done.stderr, done.stderr
    environment["FTPCOORD_DOWNLOAD_DIR"] = "lib/in"
    assert crew.run("check", environment=environment).returncode == 0
