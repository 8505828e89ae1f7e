"""Publishing into download_dir: whole, durable, under a free name, through no link, once, whenever the process dies."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import servers
from conftest import Database, Files, new_folder, tree, wait_for
from hostile import FtpHost, Site
from members import PATIENCE, Crew
from memory import config, found, part_of
from processes import Process, environment

import ftpcoord
from ftpcoord import (
    LocalTrouble,
    Workplace,
    create_file,
    numbered,
    publish,
)

OPENAT = pytest.mark.skipif(os.name != "posix", reason="openat")


# -- names that files get ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "third"),
    [("report.csv", "report.3.csv"), ("a.tar.gz", "a.tar.3.gz"), ("README", "README.3"), (".profile", ".profile.3")],
)
def test_a_number_goes_before_the_suffix(name: str, third: str) -> None:
    assert numbered(name, 3) == third


def part(folder: Path, content: bytes = b"new") -> Path:
    path = folder / ".part"
    path.write_bytes(content)
    return path


def test_the_same_content_under_the_name_counts_as_this_very_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"new")
    inode = (tmp_path / "a.csv").stat().st_ino
    assert publish(part(tmp_path), tmp_path / "a.csv") == tmp_path / "a.csv"
    assert os.listdir(tmp_path) == ["a.csv"]
    assert (tmp_path / "a.csv").stat().st_ino == inode


@pytest.mark.skipif(os.name != "posix", reason="hard links")
def test_a_link_that_was_made_although_its_answer_says_that_one_was_there_is_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS may answer when the first reply was lost: link(2)."""
    link = os.link

    def made(*arguments: str, **more: object) -> None:
        link(*arguments, **more)  # type: ignore[arg-type]
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(os, "link", made)
    assert ftpcoord.give_name(part(tmp_path), tmp_path / "a.csv", again=False) == tmp_path / "a.csv"
    assert os.listdir(tmp_path) == ["a.csv"]


def test_other_content_is_not_replaced_but_gets_company(tmp_path: Path) -> None:
    assert publish(part(tmp_path, b"old"), tmp_path / "a.csv") == tmp_path / "a.csv"
    assert publish(part(tmp_path), tmp_path / "a.csv") == tmp_path / "a.1.csv"
    assert publish(part(tmp_path, b"third"), tmp_path / "a.csv") == tmp_path / "a.2.csv"
    assert publish(part(tmp_path), tmp_path / "a.csv") == tmp_path / "a.1.csv", "that is this very file"
    assert sorted(os.listdir(tmp_path)) == ["a.1.csv", "a.2.csv", "a.csv"]
    assert (tmp_path / "a.csv").read_bytes() == b"old"


@pytest.mark.parametrize("kind", ["link", "broken link", "folder"])
def test_what_is_no_file_is_neither_followed_nor_replaced(tmp_path: Path, kind: str) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"new")
    target = tmp_path / "folder" / "a.csv"
    target.parent.mkdir()
    if kind == "folder":
        target.mkdir()
    else:
        target.symlink_to(outside if kind == "link" else tmp_path / "nowhere")
    assert publish(part(target.parent), target) == target.with_name("a.1.csv")
    assert target.is_symlink() or target.is_dir()
    assert outside.read_bytes() == b"new"
    assert not (tmp_path / "nowhere").exists()


def test_without_hard_links_nothing_is_replaced_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a.csv").write_bytes(b"old")
    assert publish(part(tmp_path), tmp_path / "a.csv") == tmp_path / "a.1.csv"
    assert publish(part(tmp_path), tmp_path / "b.csv") == tmp_path / "b.csv"
    assert (tmp_path / "a.csv").read_bytes() == b"old"


def test_without_hard_links_threads_do_not_replace_each_others_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of one name come from several folders, or are saved by several handlers."""
    lstat = os.lstat

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    def slow(*arguments: Any, **more: Any) -> os.stat_result:
        try:
            return lstat(*arguments, **more)
        finally:
            time.sleep(0.01)

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "lstat", slow)
    contents = [str(number).encode() for number in range(6)]
    for content in contents:
        (tmp_path / f".{content.decode()}.part").write_bytes(content)
    with ThreadPoolExecutor(len(contents)) as pool:
        named = list(pool.map(lambda c: publish(tmp_path / f".{c.decode()}.part", tmp_path / "a.csv"), contents))
    assert [path.read_bytes() for path in named] == contents
    assert len(os.listdir(tmp_path)) == len(contents)


def test_a_file_that_differs_in_case_alone_is_another_one_where_the_disk_has_no_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or in another way that the disk does not know; equal content does not make them one file."""
    plain = {name: getattr(os, name) for name in ("link", "lstat", "open", "unlink")}

    def there(path: Any) -> Any:
        names = os.listdir(tmp_path) if os.path.dirname(path) == str(tmp_path) else []
        return next((tmp_path / one for one in names if one.casefold() == os.path.basename(path).casefold()), path)

    def link(source: Any, target: Any, **more: Any) -> None:
        plain["link"](there(source), there(target), **more)

    monkeypatch.setattr(os, "link", link)
    for name in ("lstat", "open", "unlink"):
        monkeypatch.setattr(os, name, lambda path, *more, do=plain[name], **named: do(there(path), *more, **named))
    assert publish(part(tmp_path), tmp_path / "a.csv") == tmp_path / "a.csv"
    assert publish(part(tmp_path), tmp_path / "a.csv") == tmp_path / "a.csv"
    for _ in range(2):  # once more after a crash
        assert publish(part(tmp_path), tmp_path / "A.csv") == tmp_path / "A.1.csv"
    assert sorted(os.listdir(tmp_path)) == ["A.1.csv", "a.csv"]


def test_a_file_is_made_only_where_nothing_is(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("there", "link"):
        with pytest.raises(FileExistsError):
            create_file(tmp_path / name)
    assert (tmp_path / "there").read_bytes() == b"old"
    assert not (tmp_path / "nowhere").exists()
    before = os.umask(0o027)
    try:
        with create_file(tmp_path / "new") as stream:
            stream.write(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_copies_in_the_making_carry_the_term_and_those_of_other_terms_are_removed(tmp_path: Path) -> None:
    old, mine = (Workplace(config(download_dir=str(tmp_path)), term) for term in (3, 4))
    other = Workplace(config(download_dir=str(tmp_path), coordination_group="another"), 3)
    left = [part_of(place, found("x/a.csv")) for place in (old, mine, other)]
    for path in (*left, tmp_path / "x" / "a.part", tmp_path / "x" / "a.csv"):
        path.write_bytes(b"")
    assert len({path.name for path in left}) == 3
    mine.clean()
    assert sorted(path for path in (tmp_path / "x").iterdir()) == sorted(
        [left[1], left[2], tmp_path / "x" / "a.part", tmp_path / "x" / "a.csv"]
    )


def test_who_has_lost_its_lease_removes_no_copies_which_may_be_its_successors(tmp_path: Path) -> None:
    successors = part_of(Workplace(config(download_dir=str(tmp_path)), 4), found("x/a.csv"))
    looks: list[int] = []

    def goes_on() -> None:
        looks.append(1)
        if len(looks) > 1:
            raise ftpcoord.LeaseLost(3)

    with pytest.raises(ftpcoord.LeaseLost):
        Workplace(config(download_dir=str(tmp_path)), 3).clean(goes_on)
    assert successors.exists()


def test_a_private_folder_that_somebody_else_has_locked_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes it for a dead one's, between its making and its lock."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    flock, taken = fcntl.flock, []

    def once_taken(handle: int, how: int) -> None:
        taken.append(handle)
        if len(taken) == 1:
            raise BlockingIOError
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", once_taken)
    place = Workplace(config(exec="true {file}"), 1)
    path = part_of(place, found())
    assert len(taken) == 2 and path.exists()
    handle = os.open(path.parent.parent, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)
    place.close()


def test_a_download_folder_that_is_missing_is_this_hosts_trouble(tmp_path: Path) -> None:
    with pytest.raises(LocalTrouble, match="create it"):
        Workplace(config(download_dir=str(tmp_path / "nowhere")), 1).clean()


# -- a member publishes -----------------------------------------------------------------------------------------------


def test_download_dir_keeps_subfolders_and_the_command_sees_the_finished_file(crew: Crew, target: Path) -> None:
    crew.settings.update(download_dir=target, recursive="yes", after="delete")
    contents = {"top.csv": b"1", "a/one.csv": b"22", "a/b/two.csv": b"333", "c/one.csv": b"4444"}
    for name, content in contents.items():
        crew.files.put(name, content)
    crew.start("a")
    crew.handled("one.csv", "one.csv", "top.csv", "two.csv")
    for run in crew.runs():
        relative = os.path.relpath(run.environment["FTPCOORD_PATH"], crew.files.root)
        assert run.environment["FTPCOORD_FILE"] == str(target / relative)
        assert run.content.encode() == contents[relative]
    assert tree(target) == contents
    wait_for(lambda: not tree(crew.files.root), PATIENCE)


def test_an_existing_target_with_the_same_content_counts_as_delivered_another_one_is_not_replaced(
    crew: Crew, target: Path
) -> None:
    crew.settings.update(download_dir=target, exec=None, after="delete")
    (target / "same.csv").write_bytes(b"same")
    (target / "other.csv").write_bytes(b"precious")
    (target / "other.1.csv").write_bytes(b"precious, too")
    (target / "link.csv").symlink_to("/etc/hostname")
    for name in ("same.csv", "other.csv", "link.csv"):
        crew.files.put(name, b"same")
    crew.start("a")
    wait_for(lambda: not crew.files.names(), PATIENCE)
    assert sorted(os.listdir(target)) == [
        "link.1.csv",
        "link.csv",
        "other.1.csv",
        "other.2.csv",
        "other.csv",
        "same.csv",
    ]
    assert (target / "other.csv").read_bytes() == b"precious" and (target / "other.2.csv").read_bytes() == b"same"
    assert (target / "link.1.csv").read_bytes() == b"same" and (target / "link.csv").is_symlink()


def test_no_file_is_visible_under_its_name_before_it_is_whole(crew: Crew, target: Path) -> None:
    crew.settings.update(download_dir=target, exec=None, after="keep")
    size = 24 << 20
    crew.files.put("big.bin", bytes(size))
    member = crew.start("a")
    seen: set[int] = set()

    def arrived() -> bool:
        if (target / "big.bin").exists():
            seen.add((target / "big.bin").stat().st_size)
        return bool(member.events("file_done"))

    wait_for(arrived, PATIENCE)
    assert seen == {size}
    assert stat.S_IMODE((target / "big.bin").stat().st_mode) & 0o111 == 0


def test_links_planted_under_the_names_of_unfinished_copies_are_not_written_through(tmp_path: Path) -> None:
    """The names can be guessed; whoever may write into the folder must not gain more than that."""
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    target = tmp_path / "delivered"
    target.mkdir()
    with FtpHost(files={"a": b"1", "b": b"2"}) as host:
        site = Site(tmp_path, host.settings)
        part = part_of(Workplace(site.listener.config, 1), found("a"))
        part.unlink()
        mark, _, last = part.stem.rpartition("-")
        begin = int(last)
        for number in range(begin + 1, begin + 4):
            (target / f"{mark}-{number}.part").symlink_to(victim)
        with site:
            site.arrive({"a": b"1", "b": b"2"})
            assert site.all("file_failed"), "a planted name was met"
            for left in target.glob("*.part"):
                left.unlink()
    assert victim.read_text() == "untouched"


def test_a_new_member_removes_unfinished_copies_of_earlier_terms_but_nothing_behind_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    target = tmp_path / "delivered"
    target.mkdir()
    with FtpHost(files={"a": b"1"}) as host:
        site = Site(tmp_path, host.settings)
        mark = f".ftpcoord-{ftpcoord.sha256_text(site.listener.config.coordination_group)[:8]}-"
        (outside / f"{mark}0-1-1.part").write_text("not ours to touch")
        (target / "elsewhere").symlink_to(outside)
        (target / f"{mark}0-1-2.part").write_text("left over")
        (target / ".ftpcoord-00000000-0-1-3.part").write_text("of another group")
        with site:
            site.arrive({"a": b"1"})
            assert not (target / f"{mark}0-1-2.part").exists()
            assert (target / ".ftpcoord-00000000-0-1-3.part").exists()
            (target / ".ftpcoord-00000000-0-1-3.part").unlink()
            assert (outside / f"{mark}0-1-1.part").read_text() == "not ours to touch"
            (outside / f"{mark}0-1-1.part").unlink()


# -- subfolders -------------------------------------------------------------------------------------------------------


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
    part_of(ftpcoord.Workplace(config, 1), ftpcoord.Found("/in/x/y/1", "x/y/1", ftpcoord.Entry("1", "file", 1, "")))
    assert (str(tmp_path / "in"), True) in synced and (str(tmp_path / "in/x"), True) in synced


@OPENAT
def test_a_subfolder_made_again_is_durable_though_it_has_the_number_of_the_removed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As file systems give numbers again at once."""
    synced: list[int] = []
    plain, status = os.fsync, os.fstat

    def fsync(handle: int) -> None:
        synced.append(status(handle).st_ino)
        plain(handle)

    def fstat(handle: int) -> os.stat_result:
        found = status(handle)
        fields = list(found)
        fields[stat.ST_INO] = 1 if stat.S_ISDIR(found.st_mode) else found.st_ino
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "fstat", fstat)
    place = Workplace(config(download_dir=str(tmp_path)), 1)
    for _ in range(2):
        synced.clear()
        copy = place.create(found("x/a.csv"))
        assert tmp_path.stat().st_ino in synced
        place.discard(copy)
        (tmp_path / "x").rmdir()


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="counts open files")
@pytest.mark.parametrize("delivered", [True, False])
def test_a_folder_that_can_be_neither_made_durable_nor_locked_is_not_held_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delivered: bool
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.ENOLCK, "as some mounted file systems say")

    monkeypatch.setattr(os, "fsync", fails)
    monkeypatch.setattr(fcntl, "flock", fails)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    place = Workplace(config(download_dir=str(tmp_path)) if delivered else config(exec="true {file}"), 1)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(OSError, match="mounted"):
            place.create(found("x/a.csv"))
    assert len(os.listdir("/proc/self/fd")) == before
    assert os.listdir(tmp_path) == (["x"] if delivered else [])


@pytest.fixture
def folder_sync(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What a wait for a folder's names ends with, while it is there."""
    fsync, numbers = os.fsync, [errno.EINVAL]

    def fails(handle: int) -> None:
        if numbers and stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(numbers[0], os.strerror(numbers[0]))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fails)
    return numbers


@OPENAT
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_files_are_delivered_where_the_file_system_knows_no_fsync_of_folders(
    tmp_path: Path, folder_sync: list[int], number: int
) -> None:
    folder_sync[0] = number
    with FtpHost({"a": b"1", "x/b": b"2"}) as host:
        host.folders.add("/in/x")
        with Site(tmp_path, host.settings, recursive=True) as site:
            site.wait("file_done", 2)
            assert site.delivered() == {"a": b"1", "x/b": b"2"} and not site.all("file_failed")


@OPENAT
def test_what_has_its_name_is_not_delivered_again_when_that_could_not_be_made_durable(
    tmp_path: Path, folder_sync: list[int]
) -> None:
    """Neither beside itself nor after somebody has taken it; nor is it done before its name is durable."""
    folder_sync[0] = errno.EIO
    with FtpHost({"a": b"1", "b": b"2"}) as host:
        settings = {**host.settings, "url": host.settings["url"].rpartition("/")[0], "coordination_group": "g"}
        with Site(tmp_path, settings, folders="/in") as site:
            for path in ("/in/a", "/in/b"):
                assert str(site.target) + ":" in site.wait("file_failed", 2, path=path)["error"]
            assert site.delivered() == {"a": b"1", "b": b"2"} and not site.all("file_done")
            (site.target / "b").unlink()
            folder_sync.clear()
            site.wait("file_done", 2)
            assert site.delivered() == {"a": b"1"}, "\n".join(site.log)


@OPENAT
def test_what_has_its_name_and_keeps_its_temporary_one_is_not_delivered_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink, kept = os.unlink, [True]

    def refused(name: Any, **more: Any) -> None:
        if kept and os.fspath(name).endswith(".part"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), name)
        unlink(name, **more)

    monkeypatch.setattr(os, "unlink", refused)
    with FtpHost({"a": b"1"}) as host:
        settings = {**host.settings, "url": host.settings["url"].rpartition("/")[0], "coordination_group": "g"}
        with Site(tmp_path, settings, folders="/in") as site:
            assert site.wait("file_done")["attempt"] == 1
            assert site.delivered() == {"a": b"1"} and not site.all("file_failed")
            kept.clear()
            Workplace(site.listener.config, 2).clean()
            assert os.listdir(site.target) == ["a"], "the next term removes it"


@OPENAT
def test_a_folder_that_goes_with_its_file_before_that_is_durable_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = Workplace.name

    def taken(place: Workplace, copy: ftpcoord.Copy, *more: Any) -> None:
        named(place, copy, *more)
        copy.path.unlink()
        copy.path.parent.rmdir()

    monkeypatch.setattr(Workplace, "name", taken)
    with FtpHost({"x/a": b"1"}) as host:
        host.folders.add("/in/x")
        with Site(tmp_path, host.settings, recursive=True) as site:
            assert site.wait("file_done")["attempt"] == 1 and not site.all("file_failed")


@OPENAT
def test_a_handler_is_tried_again_whatever_has_become_of_the_folder_of_its_file(tmp_path: Path) -> None:
    with FtpHost({"x/a": b"1"}) as host:
        host.folders.add("/in/x")
        (tmp_path / "delivered").mkdir()
        more = {"recursive": True, "download_dir": str(tmp_path / "delivered")}
        with Site(tmp_path, host.settings, "handler", **more) as site:

            def fails_once(file: ftpcoord.File) -> None:
                if file.attempt == 1:
                    (site.target / "x").rename(tmp_path / "taken")
                    (site.target / "x").symlink_to(tmp_path / "taken")
                    raise ValueError("once")

            site.receive = fails_once  # type: ignore[method-assign]
            assert site.wait("file_done")["attempt"] == 2
            assert os.listdir(tmp_path / "taken") == ["a"]


@OPENAT
def test_what_is_remembered_of_subfolders_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease may last for months, and each order have a folder of its own."""
    waits: list[int] = []
    monkeypatch.setattr(os, "fsync", waits.append)
    place = Workplace(config(download_dir=str(tmp_path)), 1)

    def waited(name: str) -> bool:
        before = len(waits)
        place.discard(place.create(found(f"{name}/a.csv")))
        return len(waits) > before

    assert waited("first") and not waited("first")
    assert all(waited(str(number)) for number in range(1000))
    assert waited("first"), "it is waited for again rather than remembered for ever"


@OPENAT
def test_what_stands_under_the_name_and_cannot_be_read_is_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A consumer has made it its own."""
    opens = os.open

    def refused(name: Any, flags: int, *more: Any, **named: Any) -> int:
        if os.fspath(name).endswith("a.csv") and not flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        return opens(name, flags, *more, **named)

    monkeypatch.setattr(os, "open", refused)
    (tmp_path / "a.csv").write_bytes(b"old")
    assert publish(part(tmp_path), tmp_path / "a.csv") == tmp_path / "a.1.csv"
    assert sorted(os.listdir(tmp_path)) == ["a.1.csv", "a.csv"]


@OPENAT
def test_an_unfinished_copy_that_cannot_be_removed_is_said_and_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of another user, in a folder whose sticky bit is set."""
    unlink = os.unlink
    left: list[Path] = []

    def refused(name: Any, **more: Any) -> None:
        if left and os.fspath(name).endswith(left[0].name):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), name)
        unlink(name, **more)

    monkeypatch.setattr(os, "unlink", refused)
    with FtpHost({"a": b"1"}) as host:
        site = Site(tmp_path, host.settings)
        old = Workplace(site.listener.config, 0).create(found("b"))
        old.close()
        left.append(old.part)
        with site:
            site.arrive({"a": b"1"})
            (said,) = site.all("local_trouble")
            assert str(old.part) in said["error"] and "Operation not permitted; remove it" in said["error"]
            left.clear()
            old.part.unlink()


@pytest.mark.skipif(not hasattr(os, "fchmod"), reason="fchmod")
def test_a_copy_whose_permissions_cannot_be_set_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(number: int, mode: int) -> None:
        raise PermissionError("as some mounted file systems say")

    monkeypatch.setattr(os, "fchmod", refused)
    place = Workplace(config(download_dir=str(tmp_path), file_mode="0644"), 1)
    with pytest.raises(PermissionError):
        place.create(found("a.csv"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("umask", [0o022, 0o077])
@pytest.mark.parametrize(
    ("file_mode", "wanted"),
    [
        (None, {0o022: 0o640, 0o077: 0o600}),
        ("0660", {0o022: 0o660, 0o077: 0o660}),
        (0o444, {0o022: 0o444, 0o077: 0o444}),
    ],
)
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


# -- whenever the process dies ----------------------------------------------------------------------------------------


ROOT = Path(__file__).resolve().parent.parent


COUNT = 150  # more than two groups


CHILD = """
import os, signal, sys
import ftpcoord

point, after, number, log = sys.argv[1], sys.argv[2] == "after", int(sys.argv[3]), sys.argv[4]
calls = 0

def wrap(owner, name):
    plain = getattr(owner, name)
    def wrapped(*arguments, **more):
        global calls
        if name != point:
            with open(log, "a") as out:
                out.write(name + "\\n")
            return plain(*arguments, **more)
        calls += 1
        if calls == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = plain(*arguments, **more)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, wrapped)

wrap(ftpcoord, "create_file")
wrap(ftpcoord, "begin_sync")
wrap(ftpcoord, "give_name")
wrap(ftpcoord, "sync_folder")
wrap(ftpcoord.os, "fsync")
wrap(ftpcoord.Poller, "_done")
sys.exit(ftpcoord.main(["run", "--once"]))
"""


class Delivery:
    """A folder full of small files, and members that deliver them into `target`."""

    def __init__(self, files: Files, place: Path) -> None:
        self.files, self.place, self.target = files, place, place / "target"
        self.target.mkdir()
        self.log = place / "steps"
        self.log.touch()
        self.content = {f"f{n:03}.dat": (f"{n} " * n).encode() for n in range(COUNT)}
        for name, data in self.content.items():
            files.put(name, data)

    def start(self, member: str, *crash: object) -> Process:
        settings = {
            **self.files.settings,
            "database": f"sqlite:///{self.place}/db",
            "member_id": member,
            "settle": 0,
            "coordination_group": "crash",
            "download_dir": self.target,
            "heartbeat_frequency": 0.2,
            "liveness_check_interval": 1.5,
            "retry_delay": 0.1,
            "workers": 1,
        }
        words = [str(word) for word in crash or ("nothing", "before", 0)]
        return Process(member, [sys.executable, "-c", CHILD, *words, str(self.log)], environment(settings), self.place)

    def finish(self, member: str) -> None:
        """A further member does what is left, as soon as the lease of the one before is stale."""
        deadline = time.monotonic() + 30
        while True:
            process = self.start(member)
            code, said = process.process.wait(60), process.said()
            assert code == 0, said
            if "another member is active" not in said:
                return
            assert time.monotonic() < deadline, said

    def wait_for_the_first_file(self, process: Process) -> None:
        servers.wait_for(lambda: not process.running() or any(self.target.iterdir()), 30)

    def assert_each_file_is_there_once(self) -> None:
        found = {path.name: path.read_bytes() for path in self.target.iterdir()}
        assert sorted(found) == sorted(self.content), "a file is missing, left unfinished, or there under two names"
        assert found == self.content

    def assert_no_partial_file_has_a_final_name(self) -> None:
        for path in self.target.iterdir():
            if not path.name.startswith(".ftpcoord-"):
                assert path.read_bytes() == self.content[path.name]


@pytest.fixture(params=["sshd", "vsftpd_plain"])
def delivery(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Delivery]:
    with new_folder(request.param, request.getfixturevalue(request.param)) as files:
        yield Delivery(files, tmp_path)


POINTS = [
    ("create_file", "after", 20),
    ("give_name", "after", 20),
    ("_done", "before", 1),
    ("begin_sync", "before", 20),
    ("fsync", "after", 20),
    ("give_name", "before", 1),
    ("sync_folder", "before", 1),
    ("sync_folder", "after", 1),
    ("_done", "after", 1),
    ("_done", "after", 2),
]


@pytest.mark.parametrize(
    ("delivery", "point"),  # what comes after the fetch is the same for all servers
    [("sshd", point) for point in POINTS] + [("vsftpd_plain", point) for point in POINTS[:3]],
    indirect=["delivery"],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else value,
)
def test_a_member_killed_in_the_middle_of_a_group_leaves_each_file_once(
    delivery: Delivery, point: tuple[str, str, int]
) -> None:
    process = delivery.start("a", *point)
    assert process.process.wait(60) == -signal.SIGKILL, process.said()
    delivery.assert_no_partial_file_has_a_final_name()
    delivery.finish("b")
    delivery.assert_each_file_is_there_once()


def test_members_killed_at_any_moment_leave_each_file_once(delivery: Delivery) -> None:
    for number in range(4):
        process = delivery.start(f"m{number}")
        delivery.wait_for_the_first_file(process)
        time.sleep(0.01 * number)  # not the same moment each time; any will do
        process.kill()
        delivery.assert_no_partial_file_has_a_final_name()
    delivery.finish("last")
    delivery.assert_each_file_is_there_once()


def test_content_is_durable_before_the_name_and_the_name_before_done(delivery: Delivery) -> None:
    delivery.finish("a")
    delivery.assert_each_file_is_there_once()
    steps = delivery.log.read_text().split()
    synced = named = groups = 0
    waiting_for_folder = False
    for step in steps:
        if step == "fsync":
            synced += 1
        elif step == "give_name":
            named += 1
            waiting_for_folder = True
            assert named <= synced, "a name before its content was synced"
        elif step == "sync_folder":
            waiting_for_folder = False
        elif step == "_done":
            assert not waiting_for_folder, "done before the names were durable"
            groups += 1
    assert named == COUNT
    assert 1 < groups <= steps.count("sync_folder") < COUNT / 4, "one wait for the folder serves a whole group"


def test_a_file_that_cannot_be_fetched_does_not_hold_up_its_group(delivery: Delivery) -> None:
    refused = delivery.files.root / "f100.dat"
    refused.chmod(0)
    process = delivery.start("a")
    assert process.process.wait(60) == 1, process.said()
    assert len(list(delivery.target.iterdir())) == COUNT - 1
    assert any(" file_failed " in line for line in process.lines())
    refused.chmod(0o644)
    time.sleep(0.2)
    delivery.finish("b")
    delivery.assert_each_file_is_there_once()
