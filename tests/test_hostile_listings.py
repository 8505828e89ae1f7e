"""What hostile servers list, refused after-actions, and trouble on this host: nothing is lost, replaced or led astray.

See test_misbehaving.py.
"""

from __future__ import annotations

import datetime
import io
import logging
import os
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union

import hostile
import pytest
from conftest import Files, wait_for
from hostile import PATIENCE, FtpHost, FtpSession, SftpHost, Site, bytes_of, reply

import ftpcoord

DELIVERIES = pytest.mark.parametrize("delivery", ["folder", "handler"])
HOSTS = pytest.mark.parametrize("kind", [FtpHost, SftpHost], ids=["ftp", "sftp"])
# ---------------------------------------------------------------------------------------------------------------------
# Names and listings
# ---------------------------------------------------------------------------------------------------------------------

ODD = [
    b"caf\xe9.csv",
    b"\xff\xfe",
    b"\x1b[2J\x1b]0;owned\x07.csv",
    b"\xe2\x80\xaefdp.exe",
    b"-rf",
    b"--help",
    b" ",
    b"a\tb",
    b"\xc2\x9b31m",
    b"per%20cent%",
    b"\x7f",
    b"$(touch x)",
    b"`touch x`;#",
]


@HOSTS
@DELIVERIES
def test_odd_names_arrive_byte_for_byte_and_harm_no_terminal(tmp_path: Path, kind: type[Any], delivery: str) -> None:
    files: dict[Union[str, bytes], bytes] = {name: b"content of " + name for name in ODD}
    with kind(files=files) as host, Site(tmp_path, host.settings, delivery, after="delete") as site:
        site.arrive({os.fsdecode(name): content for name, content in files.items() if isinstance(name, bytes)})
        wait_for(lambda: not host.files, PATIENCE, "all to be deleted by the very same names")
        site.polls()
        for line in ftpcoord_json(site):
            line.encode("ascii")


def ftpcoord_json(site: Site) -> list[str]:
    record = logging.LogRecord("ftpcoord", logging.INFO, "", 0, "file_done", None, None)
    lines = []
    for _, fields in site.events:
        record.fields = fields
        lines.append(ftpcoord.JsonFormatter().format(record))
        assert "\\udc" not in lines[-1] and "\\u001b" not in lines[-1], "no text of a path that JSON readers refuse"
    return lines


TRAVERSAL = [b"../out", b"../../etc/cron.d/x", b"/etc/passwd", b"a/b", b"..", b".", b"", b"a\0b", b"a\rb", b"/"]


@HOSTS
def test_names_that_lead_elsewhere_are_refused_said_once_and_nothing_is_written_there(
    tmp_path: Path, kind: type[Any]
) -> None:
    inner = tmp_path / "1" / "2"
    inner.mkdir(parents=True)
    with kind(files={"good": b"1"}) as host:
        if isinstance(host, FtpHost):
            host.lines += [b"type=file;size=1; " + name for name in TRAVERSAL]
        else:
            host.entries += [(name, hostile.attributes(1)) for name in [*TRAVERSAL, b"a\nb"]]
        with Site(inner, host.settings, recursive=True, after="delete", pattern="*,.*") as site:
            site.arrive({"good": b"1"})
            site.polls(3)
            refused = [fields["name"] for fields in site.all("file_refused")]
            assert len(refused) == len(set(refused)) >= 6, refused
            said = host.said("RETR") + host.said("DELE") + host.said("OPEN") + host.said("REMOVE")
            assert {command.partition(" ")[2] for command in said} == {"/in/good"}
        assert sorted(path.name for path in tmp_path.rglob("*") if "coordination" not in path.name) == [
            "1",
            "2",
            "delivered",
            "good",
        ]


@pytest.mark.parametrize("length", [256, 4000, 5000])
@DELIVERIES
def test_a_name_that_is_too_long_here_is_quarantined_or_refused_and_the_others_arrive(
    tmp_path: Path, length: int, delivery: str
) -> None:
    with FtpHost(files={"x" * length: b"1", "good": b"2"}) as host:
        with Site(tmp_path, host.settings, delivery, max_attempts=2) as site:
            site.arrive({"good": b"2"})
            if length < 4096:
                assert site.state("x" * length, "quarantined")["failures"] == 2
            else:
                site.wait("file_refused")
            site.polls()


@pytest.mark.parametrize("size", ["9223372036854775808", "9999999999999999999", "18446744073709551615", "-1", ""])
def test_a_size_that_no_file_has_is_said_once_and_the_others_arrive(tmp_path: Path, size: str) -> None:
    with FtpHost(files={"good": b"1"}) as host:
        host.lines.append(f"type=file;size={size};modify=20240112101530; huge".encode())
        with Site(tmp_path, host.settings) as site:
            site.arrive({"good": b"1"})
            site.polls()
            assert len(site.all("file_refused")) == 1


def test_a_size_beyond_the_ledgers_column_of_sftp_is_said_once_and_the_others_arrive(tmp_path: Path) -> None:
    with SftpHost(files={"good": b"1"}) as host:
        host.entries += [(b"huge", hostile.attributes(2**64 - 1)), (b"large", hostile.attributes(2**63))]
        with Site(tmp_path, host.settings) as site:
            site.arrive({"good": b"1"})
            site.polls()
            assert len(site.all("file_refused")) >= 1


def test_a_file_that_is_listed_twice_is_handled_once(tmp_path: Path) -> None:
    with FtpHost(files={"a": b"1"}) as host:
        host.lines += [b"type=file;size=1;modify=20240112101530; a"] * 5
        with Site(tmp_path, host.settings, "handler") as site:
            site.arrive({"a": b"1"})
            site.polls(3)
            assert site.handled == [("a", b"1", 1)]


@pytest.mark.parametrize("mlsd", [True, False], ids=["mlsd", "list"])
def test_links_and_devices_are_left_alone(tmp_path: Path, mlsd: bool) -> None:
    with FtpHost(files={"a": b"1"}, mlsd=mlsd) as host:
        host.lines += (
            [
                b"type=OS.unix=slink:/etc;size=9; l",
                b"type=slink; l2",
                b"type=OS.unix=chr-1/3; null",
                b"type=dir; loop",
            ]
            if mlsd
            else [
                b"lrwxrwxrwx    1 0        0               9 Jul 20  2024 l -> a",
                b"crw-rw-rw-    1 0        0          1,   3 Jul 20  2024 null",
            ]
        )
        with Site(tmp_path, host.settings, recursive=True) as site:
            site.arrive({"a": b"1"})
            site.polls()
            assert host.said("RETR") == ["RETR /in/a"]
            told = {found["name"]: found["reason"] for found in site.all("file_refused")}
            assert told.pop("'null'") == "neither file nor folder"
            assert told.keys() >= {"'l'"} | ({"'l2'"} if mlsd else set())
            assert {told["'l'"], told.get("'l2'", told["'l'"])} == {"a link; links are not followed"}


@pytest.mark.parametrize("file_server", ["vsftpd", "sshd"], indirect=True)
def test_links_of_a_real_server_are_not_followed(file_server: Files, tmp_path: Path) -> None:
    file_server.put("folder/real", b"1")
    (file_server.root / "file-link").symlink_to("folder/real")
    (file_server.root / "folder" / "loop").symlink_to("..")
    (file_server.root / "out").symlink_to("/etc")
    with Site(tmp_path, file_server.settings, recursive=True, timeout=10) as site:
        site.arrive({"folder/real": b"1"})
        site.polls()
        assert not site.all("file_failed")


@pytest.mark.parametrize("file_server", ["vsftpd", "sshd", "asyncssh"], indirect=True)
@pytest.mark.parametrize("how", ["arch/done", "absolute", "behind a link"])
def test_what_was_moved_within_the_polled_tree_is_not_polled_again(
    file_server: Files, tmp_path: Path, how: str
) -> None:
    settings = dict(file_server.settings)
    _, _, folder = settings["url"].partition("://")[2].partition("/")
    target = "/" + folder + "//done/." if how != "arch/done" else how
    if how == "behind a link":
        if settings["url"].startswith("ftp"):
            pytest.skip("FTP does not tell where a link leads")
        link = file_server.root.with_name(file_server.root.name + "-link")
        link.symlink_to(file_server.root.name)
        settings["url"] += "-link"
    file_server.put("a", b"1")
    file_server.put("x/b", b"2")
    with Site(tmp_path, settings, "handler", recursive=True, timeout=10, after="move:" + target) as site:
        wait_for(lambda: len(site.handled) == 2 and not (file_server.root / "x" / "b").exists(), 20)
        site.polls(4)
        assert sorted(site.handled) == [("a", b"1", 1), ("b", b"2", 1)]


def test_a_listing_that_nobody_understands_is_said_and_forgets_nothing(tmp_path: Path) -> None:
    with FtpHost(files={"a": b"1"}, mlsd=False) as host, Site(tmp_path, host.settings) as site:
        site.arrive({"a": b"1"})
        host.on("LIST", hostile.content(b"2026. 01. 12. a\r\n"), times=None)
        assert "not understood" in site.wait("server_down")["error"]
        assert site.state("a", "done")["attempts"] == 1 and not site.all("file_failed")
        host.behave()
        site.wait("server_up")
        site.polls()
        assert len(site.all("file_done")) == 1


@pytest.mark.parametrize("minutes", [-11 * 60, 0, 345, 14 * 60])
@pytest.mark.parametrize("age", [0, 300], ids=["minutes", "days"])
def test_a_server_in_another_zone_has_its_files_handled_once_and_deleted(
    tmp_path: Path, minutes: int, age: int
) -> None:
    now = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None, microsecond=0)
    when = now - datetime.timedelta(days=age, hours=2)
    with FtpHost(mlsd=False, zone=minutes) as host:
        for number in range(3):
            host.files[f"{number}"] = b"1"
            host.times[f"{number}"] = when
        with Site(tmp_path, host.settings, "handler", after="delete", max_age=None) as site:
            wait_for(lambda: not host.files, PATIENCE, "\n".join(site.log))
            site.polls()
            assert sorted(site.handled) == [(f"{number}", b"1", 1) for number in range(3)]
            assert not site.all("file_kept")


# ---------------------------------------------------------------------------------------------------------------------
# After-actions
# ---------------------------------------------------------------------------------------------------------------------


@HOSTS
def test_a_move_onto_an_existing_target_takes_a_free_name_and_replaces_nothing(tmp_path: Path, kind: type[Any]) -> None:
    with kind(files={"a.csv": b"new", "done/a.csv": b"old", "done/a.1.csv": b"older"}) as host:
        host.folders.add("/in/done")
        with Site(tmp_path, host.settings, after="move:done") as site:
            wait_for(lambda: "a.csv" not in host.files, PATIENCE, "\n".join(site.log))
            site.polls()
            assert host.files == {"done/a.csv": b"old", "done/a.1.csv": b"older", "done/a.2.csv": b"new"}
            assert site.delivered() == {"a.csv": b"new"}


def test_a_target_that_appears_between_the_look_and_the_rename_is_not_replaced(tmp_path: Path) -> None:
    with FtpHost(files={"a.csv": b"new"}) as host:

        def appear(session: Any, argument: str) -> None:
            host.files["done/a.csv"] = b"another's"
            session.say("553 exists")

        host.folders.add("/in/done")
        host.on("RNTO", appear)
        with Site(tmp_path, host.settings, after="move:done") as site:
            wait_for(lambda: "a.csv" not in host.files, PATIENCE, "\n".join(site.log))
            assert host.files == {"done/a.csv": b"another's", "done/a.1.csv": b"new"}
            site.polls(1)


def test_a_server_that_says_of_every_name_that_it_exists_holds_no_worker_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ftpcoord, "MOST_NUMBERED", 20)
    with FtpHost(files={"a": b"1"}) as host:
        host.folders.add("/in/done")
        yes = "250-\r\n type=file;size=1;modify=20240112101530; {}\r\n250 end"
        host.on("MLST", lambda session, path: session.say(yes.format(path)), times=None)
        with Site(tmp_path, host.settings, "handler", workers=1, after="move:done") as site:
            site.wait("file_failed", path="/in/a")
            host.put("b", b"2")
            site.arrive({"a": b"1", "b": b"2"})
            assert [row for row in site.handled if row[0] == "a"] == [("a", b"1", 1)], "done stays done"
            site.wait("file_failed", path="/in/b")  # else it moves to the number that it has come to
            host.behave()
            wait_for(lambda: {"done/a", "done/b"} <= set(host.files), PATIENCE, "\n".join(site.log))


def test_a_delete_that_is_refused_is_tried_again_and_the_file_is_not_handled_again(tmp_path: Path) -> None:
    with FtpHost(files={"a": b"1"}) as host:
        host.on("DELE", reply("450 busy"))
        host.on("DELE", reply("550 denied"))
        host.on("DELE", hostile.say_and_leave("421 bye"))
        with Site(tmp_path, host.settings, "handler", after="delete") as site:
            wait_for(lambda: not host.files, PATIENCE, "\n".join(site.log))
            assert site.handled == [("a", b"1", 1)]
            site.polls()
            assert site.row("a") is None


# ---------------------------------------------------------------------------------------------------------------------
# This host: disks, folders, handlers
# ---------------------------------------------------------------------------------------------------------------------


class FullDisk:
    """While it is `full`, what is written goes to /dev/full, where the kernel says that no space is left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = True
        self._create = ftpcoord.create_file
        monkeypatch.setattr(ftpcoord, "create_file", self.create)

    def create(self, *arguments: Any) -> Any:
        made = self._create(*arguments)
        if not self.full:
            return made
        made.close()
        return open("/dev/full", "wb", buffering=0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("size", [10, 3_000_000])
@HOSTS
@DELIVERIES
def test_a_full_disk_is_not_the_files_failure_and_all_arrive_when_there_is_space(
    tmp_path: Path, kind: type[Any], size: int, delivery: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch)
    files = {f"{number}": bytes_of(size) for number in range(5)}
    with kind(files=dict(files)) as host, Site(tmp_path, host.settings, delivery, max_attempts=2) as site:
        for number in range(5):
            failed = site.wait("file_failed", 3, path=f"/in/{number}")
            assert "No space left" in failed["error"]
        assert site.delivered() == {}
        row = site.row("1")
        assert row is not None and row["failures"] == 0 and row["attempts"] >= 3
        disk.full = False
        site.arrive(files)
        assert all(site.state(name, "done")["failures"] == 0 for name in files)
        assert not site.all("file_quarantined") and not site.all("server_down")


class HalfWrites(io.FileIO):
    """Takes at most 1,000 bytes of what it is given, as write(2) may."""

    def write(self, data: Any) -> int:
        return super().write(bytes(data)[:1000])


@HOSTS
@pytest.mark.parametrize("delivery", ["folder", "handler", "saving handler"])
def test_a_disk_that_takes_less_than_it_is_given_gets_all_of_it(
    tmp_path: Path, kind: type[Any], delivery: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = ftpcoord.create_file

    def halved(path: Path, *more: Any) -> HalfWrites:
        with create(path, *more):
            return HalfWrites(str(path), "wb")

    monkeypatch.setattr(ftpcoord, "create_file", halved)
    files = {"small": bytes_of(2500), "large": bytes_of(700_000)}
    with kind(files=dict(files)) as host:
        site = Site(tmp_path, host.settings, delivery)
        if delivery == "saving handler":
            site.listener.on_file("*")(lambda file: file.save(site.target))
        with site:
            site.arrive(files)


@pytest.mark.parametrize(("count", "workers", "most"), [(100, 4, 25), (200, 1, 64)])
def test_small_files_are_dealt_to_the_workers_in_fair_shares_of_at_most_64(
    tmp_path: Path, count: int, workers: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    claim, hand_in = ftpcoord.Ledger.claim, ftpcoord.Workers.hand_in

    def counted(ledger: Any, works: Any) -> Any:
        sizes.append(len(works))
        return claim(ledger, works)

    def leisurely(items: Any) -> Iterator[Any]:
        for item in items:
            yield item
            time.sleep(0.001)  # a worker that did not wait for the others of this poll would go off with a few

    def handed_in(workers: Any, tasks: Any, *more: Any, **named: Any) -> None:
        hand_in(workers, leisurely(tasks), *more, **named)

    monkeypatch.setattr(ftpcoord.Ledger, "claim", counted)
    monkeypatch.setattr(ftpcoord.Workers, "hand_in", handed_in)
    files = {f"{number}": b"x" for number in range(count)}
    with FtpHost(files=dict(files)) as host, Site(tmp_path, host.settings, workers=workers) as site:
        site.arrive(files)
    assert sum(sizes) == count and max(sizes) == most, sizes


def test_a_small_file_does_not_wait_long_for_company(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a slow line a group becomes several deliveries."""
    sizes: list[int] = []
    land, retrieve = ftpcoord.Poller._land, ftpcoord.FtpServer._retrieve

    def slow(server: Any, job: Any) -> None:
        time.sleep(0.03)
        retrieve(server, job)

    def counted(poller: Any, copies: Any, *more: Any) -> None:
        sizes.append(len(copies))
        land(poller, copies, *more)

    monkeypatch.setattr(ftpcoord.FtpServer, "_retrieve", slow)
    monkeypatch.setattr(ftpcoord.Poller, "_land", counted)
    files = {f"{number}": b"x" for number in range(8)}

    def dear(session: FtpSession, argument: str) -> None:
        time.sleep(0.5)  # so that no listing is the look at a whole group
        session.on_mlsd(argument)

    with FtpHost(files=dict(files)) as host:
        host.on("MLSD", dear, times=None)
        with Site(tmp_path, host.settings, workers=1) as site:
            site.arrive(files)
    assert sum(sizes) == 8 and max(sizes) <= 2, sizes


def test_a_disk_that_is_really_full_is_not_the_files_failure(tmp_path: Path) -> None:
    """On a small file system of its own; in a process, whose ledger is elsewhere."""
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(small)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        files = {f"{number}": bytes_of(100_000) for number in range(4)}
        with FtpHost(files=dict(files)) as host:
            with Site(tmp_path, host.settings, max_attempts=2, download_dir=small) as site:
                site.target = small
                site.wait("file_failed", 4)
                ballast = site.delivered()
                assert 1 <= len(ballast) <= 2 and ballast.items() <= files.items()
                for _ in range(3):
                    for name in site.delivered():
                        (tmp_path / name).write_bytes((small / name).read_bytes())
                        (small / name).unlink()
                    wait_for(lambda: site.delivered() or len(os.listdir(tmp_path)) >= 6, PATIENCE)
                wait_for(lambda: all(site.state(name, "done") for name in files), PATIENCE)
                assert not site.all("file_quarantined")
                found = {
                    **{name: (tmp_path / name).read_bytes() for name in files if (tmp_path / name).exists()},
                    **site.delivered(),
                }
                assert found == files
    finally:
        subprocess.run(["umount", str(small)], capture_output=True)


def test_a_download_folder_that_goes_away_and_comes_back_loses_nothing(tmp_path: Path) -> None:
    with FtpHost(files={"a": b"1"}) as host, Site(tmp_path, host.settings, max_attempts=2) as site:
        site.arrive({"a": b"1"})
        site.target.rename(tmp_path / "elsewhere")
        host.put("b", b"2")
        site.wait("file_failed", 3, path="/in/b")
        (tmp_path / "elsewhere").rename(site.target)
        site.arrive({"a": b"1", "b": b"2"})
        assert site.state("b", "done")["failures"] == 0


@pytest.mark.parametrize("error", [SystemExit, SystemExit(3), MemoryError, RecursionError, StopIteration, OSError(28)])
def test_whatever_a_handler_raises_is_its_files_failure_and_the_workers_go_on(tmp_path: Path, error: Any) -> None:
    with FtpHost(files={"a": b"1", "b": b"2", "c": b"3"}) as host:
        site = Site(tmp_path, host.settings, "handler", max_attempts=2, workers=1)
        receive = site.receive

        def bad(file: ftpcoord.File) -> None:
            if file.name != "c":
                raise error
            receive(file)

        site.receive = bad  # type: ignore[method-assign]
        with site:
            site.arrive({"c": b"3"})
            assert site.state("a", "quarantined")["failures"] == site.state("b", "quarantined")["failures"] == 2


def test_what_is_written_here_follows_the_umask_and_no_planted_link(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        outside = tmp_path / "outside"
        outside.write_text("untouched")
        with FtpHost(files={"a": b"1", "sub/x": b"2"}) as host:
            host.folders.add("/in/sub")
            host.lines.append(b"type=dir; sub")
            (tmp_path / "delivered").mkdir()
            (tmp_path / "delivered" / "a").symlink_to(outside)
            (tmp_path / "delivered" / "sub").symlink_to(tmp_path)
            with Site(tmp_path, host.settings, recursive=True, max_attempts=1) as site:
                made = site.state("sub/x", "quarantined")
                wait_for(lambda: (tmp_path / "delivered" / "a.1").exists(), PATIENCE, "\n".join(site.log))
                assert "link" in made["error"] and not (tmp_path / "x").exists()
                assert stat.S_IMODE(os.stat(tmp_path / "delivered" / "a.1").st_mode) == 0o640
            assert outside.read_text() == "untouched"
    finally:
        os.umask(before)
