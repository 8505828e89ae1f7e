"""The database, the file server, the network or the local disk is away: who acts, who says what, how it goes on."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import servers
import setup_env
from conftest import Database, Files, Logged, new_folder, wait_for
from members import LOAD, PATIENCE, Crew, alive, ftpcoord, kinds, never, through
from servers import Proxy


def behind(proxy: Proxy, database: Database) -> str:
    """The URL of a database as it is reached through this proxy."""
    assert database.server is not None
    return database.url.replace(f":{database.server.port}/", f":{proxy.port}/")


@pytest.mark.parametrize(("database", "how"), [("postgresql", "stop"), ("mariadb", "freeze")], indirect=["database"])
def test_while_the_database_is_away_nothing_is_polled_and_work_goes_on_by_itself(
    database: Database, files: Files, tmp_path: Path, how: str
) -> None:
    """Away for longer than the liveness interval: the former holder keeps the role, with a new term."""
    server = database.server
    assert server is not None
    with Crew(tmp_path, database, files, after="delete") as crew:
        members = [crew.start(name) for name in "abc"]
        active = crew.active()
        for member in crew.standbys():
            member.wait("standby")
        files.put("before.txt", b"x")
        crew.handled("before.txt")
        wait_for(lambda: not files.names(), 10, "the file to be done with")

        away = time.time()
        server.stop() if how == "stop" else server.freeze()
        down = [member.wait("database_down", since=away) for member in members]
        assert all(event.level == "error" and event.fields["error"] for event in down)
        term = active.term()
        lost = active.wait("lost", since=away, term=term)
        assert lost.at - away <= crew.liveness, "it stopped after another one could have taken over"
        files.put("meanwhile.txt", b"x")
        wait_for(lambda: time.time() > away + crew.liveness + 2, 3 * crew.liveness)
        assert files.names() == ["meanwhile.txt"] and crew.names("begin") == ["before.txt"]
        for member in members:
            assert not member.events("polled", since=lost.at) and not member.events("elected", since=away)
            assert len(member.events("database_down")) == 1, "it says so once a minute, not at every try"

        back = time.time()
        server.start() if how == "stop" else server.thaw()
        for member in members:
            member.wait("database_up", since=back)
        elected = active.wait("elected", since=back)
        assert int(elected.fields["term"]) == term + 1
        crew.handled("before.txt", "meanwhile.txt")
        assert crew.runs()[-1].member == active.name and crew.runs()[-1].attempt == 1
        assert not any(member.events("elected", since=away) for member in members if member is not active)


def test_a_cut_connection_to_the_database_that_is_short_changes_nothing(
    postgresql: Database, files: Files, tmp_path: Path
) -> None:
    with Proxy("127.0.0.1", postgresql.server.port if postgresql.server else 0) as way:
        with Crew(tmp_path, postgresql, files, after="delete", database=behind(way, postgresql)) as crew:
            members = [crew.start(name) for name in "ab"]
            active = crew.active()
            names = []
            for number in range(6):
                files.put(f"{number}.txt", b"x")
                names.append(f"{number}.txt")
                crew.begun(number + 1)
                way.cut()
            crew.handled(*names)
            wait_for(lambda: not files.names(), PATIENCE)
            assert crew.names("begin") == names
            assert sum(len(member.events("elected")) for member in members) == 1
            assert not active.events("lost")


def test_a_member_that_is_cut_off_from_the_database_ends_its_command_before_another_one_is_active(
    postgresql: Database, files: Files, tmp_path: Path
) -> None:
    """The command is deaf to SIGTERM."""
    with Proxy("127.0.0.1", postgresql.server.port if postgresql.server else 0) as way:
        with Crew(tmp_path, postgresql, files, after="delete") as crew:
            first = crew.start("a", database=behind(way, postgresql))
            first.wait("elected")
            second = crew.start("b")
            second.wait("standby")
            crew.hold()
            (tmp_path / "deaf").touch()
            files.put("1.txt", b"x")
            command = crew.begun(1)[0].pid
            cut = time.time()
            way.blackhole()
            ended = wait_for(lambda: not alive(command) and time.time(), crew.liveness + PATIENCE)
            assert ended - cut <= crew.liveness
            elected = second.wait("elected", crew.liveness + PATIENCE, term=2)
            assert ended <= elected.at, "the command outlived the lease"
            assert elected.at - cut <= crew.liveness + LOAD
            first.wait("lost", term=1)
            polls = first.polls()
            crew.let_go()
            crew.handled("1.txt")
            assert [(run.member, run.attempt) for run in crew.runs("begin")] == [("a", 1), ("b", 2)]
            wait_for(lambda: not files.names(), PATIENCE)
            assert first.polls() == polls

            # The way is free again: it stands by.
            way.blackhole(False)
            way.cut()
            first.wait("database_up", since=elected.at)
            first.wait("standby", since=elected.at, active="b")
            assert first.running() and crew.token() == ("b", 2)


def test_the_sockets_of_a_running_transfer_are_shut_at_the_deadline(
    postgresql: Database, sshd: servers.Sshd, tmp_path: Path
) -> None:
    """Member a loses its database in the middle of a download that does not move."""
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(new_folder("sshd", sshd))
        crew = stack.enter_context(Crew(tmp_path, postgresql, files, exec=None, after="delete"))
        to_database = stack.enter_context(Proxy("127.0.0.1", postgresql.server.port if postgresql.server else 0))
        to_files = stack.enter_context(Proxy("127.0.0.1", sshd.port))
        for name in "ab":
            (tmp_path / name).mkdir()
        first = crew.start(
            "a", database=behind(to_database, postgresql), download_dir=tmp_path / "a", **through(to_files, files)
        )
        first.wait("elected")
        second = crew.start("b", download_dir=tmp_path / "b")
        second.wait("standby")
        to_files.bytes, to_files.delay = 0, 0.05
        content = bytes(24 << 20)
        files.put("big.bin", content)
        wait_for(lambda: to_files.bytes > 1 << 20, PATIENCE, "a transfer to be under way")
        cut = time.time()
        to_files.blackhole()
        to_database.blackhole()
        wait_for(lambda: not list((tmp_path / "a").iterdir()), crew.liveness + PATIENCE, "the part to be removed")
        assert time.time() - cut <= crew.liveness + LOAD, "it hung in the transfer"
        second.wait("elected", crew.liveness + PATIENCE)
        wait_for(lambda: (tmp_path / "b" / "big.bin").exists(), PATIENCE)
        assert (tmp_path / "b" / "big.bin").read_bytes() == content
        wait_for(lambda: not files.names(), PATIENCE)
        assert not list((tmp_path / "a").iterdir()) and not first.events("file_failed")


@kinds("postgresql", "sqlite")
def test_while_the_file_server_is_away_the_role_is_kept_and_work_goes_on_by_itself(
    database: Database, tmp_path: Path
) -> None:
    with servers.pyftpd() as server, new_folder("pyftpd", server) as files:
        with Crew(tmp_path, database, files, after="delete", yield_after=0, max_attempts=1) as crew:
            first = crew.start("a")
            first.wait("elected")
            files.put("before.txt", b"x")
            crew.handled("before.txt")
            away = time.time()
            server.kill()
            down = first.wait("server_down", since=away)
            assert down.level == "error" and down.fields["error"]
            files.put("meanwhile.txt", b"x")
            never(lambda: len(first.events("server_down")) > 1, 2.5, "it said so more than once a minute")
            server.start()
            first.wait("server_up", since=away)
            crew.handled("before.txt", "meanwhile.txt")
            assert len(first.events("elected")) == 1 and not first.events("lost")
            assert not first.events("file_quarantined"), "trouble with the server is no file's failure"


def test_a_server_that_breaks_off_in_the_middle_of_a_file_is_no_failure_of_the_file(
    postgresql: Database, sshd: servers.Sshd, tmp_path: Path
) -> None:
    """max_attempts = 1: one failure would put it into quarantine. No part of it appears under its name."""
    with new_folder("sshd", sshd) as files, Proxy("127.0.0.1", sshd.port) as way:
        target = tmp_path / "delivered"
        target.mkdir()
        settings: dict[str, Any] = {"exec": None, "download_dir": target, "max_attempts": 1, **through(way, files)}
        with Crew(tmp_path, postgresql, files, **settings) as crew:
            first = crew.start("a")
            first.wait("elected")
            way.bytes, way.delay = 0, 0.05
            content = bytes(16 << 20)
            files.put("big.bin", content)
            for _ in range(2):
                wait_for(lambda: way.bytes > 2 << 20, PATIENCE)
                assert not (target / "big.bin").exists()
                way.cut()
                way.bytes = 0
                first.wait("file_failed")
            way.delay = 0
            wait_for(lambda: list(crew.states().values()) == ["done"], PATIENCE)
            assert (target / "big.bin").read_bytes() == content
            assert [path.name for path in target.iterdir()] == ["big.bin"]
            assert not first.events("file_quarantined")


@pytest.mark.parametrize("batched", [True, False], ids=["folder", "command"])
def test_a_full_local_disk_quarantines_nothing(
    postgresql: Database, files: Files, tmp_path: Path, batched: bool
) -> None:
    target = tmp_path / "small"
    target.mkdir()
    if not setup_env.IS_ROOT:
        pytest.skip("only root may mount a small disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(target)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        with Crew(tmp_path, postgresql, files, download_dir=target, max_attempts=1, after="delete") as crew:
            if batched:
                crew.settings["exec"] = None
            content = bytes(3 << 20)
            files.put("big.bin", content)
            first = crew.start("a")
            failed = first.wait("file_failed")
            assert "No space left" in failed.fields["error"]
            files.put("small.txt", b"x")
            wait_for(lambda: (target / "small.txt").exists(), PATIENCE, "the disk to be full for big.bin alone")
            wait_for(lambda: len(first.events("file_failed")) >= 3, PATIENCE)
            assert not first.events("file_quarantined") and "big.bin" in files.names()
            assert not (target / "big.bin").exists()
            subprocess.run(["mount", "-o", "remount,size=16m", str(target)], check=True)
            wait_for(lambda: not files.names(), PATIENCE)
            assert (target / "big.bin").read_bytes() == content
            assert sorted(path.name for path in target.iterdir()) == ["big.bin", "small.txt"]
            crew.members[0].stop()
    finally:
        subprocess.run(["umount", "-l", str(target)], check=True)


# ----------------------------------------------------------------------------- once a minute, without waiting for it


class Clock:
    """A member's clock that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(ftpcoord, "boot_clock", lambda: self.now)


def said(logged: Logged, name: str) -> int:
    return sum(record.getMessage() == name for record in logged())


class Absent:
    """A database that is away until told otherwise; it has the verbs that a standby needs."""

    def __init__(self) -> None:
        self.away = True
        self.looks = 0

    def prepare(self) -> Any:
        return ftpcoord.Timing(1, 30)

    def settle_group(self, config: ftpcoord.Config) -> None: ...

    def members(self, group: str) -> list[ftpcoord.MemberRow]:
        if self.away:
            raise ftpcoord.DatabaseDown("nobody answers")
        return []

    def close(self) -> None: ...

    def look(self, group: str, member: str) -> Any:
        if self.away:
            raise ftpcoord.DatabaseDown("nobody answers")
        self.looks += 1
        return ftpcoord.View("another", 7, False, str(self.looks), 0.1, 0.0, 0.0)

    def check_ids(self, group: str, member: str) -> None:
        pass


def test_an_unreachable_database_is_said_at_once_and_then_once_a_minute(
    logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, database = Clock(monkeypatch), Absent()
    config = ftpcoord.Config(database="sqlite:///unused", coordination_group="g", member_id="m")
    member = ftpcoord.Member(config)

    def beat(seconds: float) -> None:
        for _ in range(int(seconds)):
            member.beat(database)
            clock.now += 1

    beat(1)
    assert said(logged, "database_down") == 1
    beat(58)
    assert said(logged, "database_down") == 1
    beat(121)
    assert said(logged, "database_down") == 3
    database.away = False
    beat(30)
    assert (said(logged, "database_down"), said(logged, "database_up")) == (3, 1)
    database.away = True
    beat(1)
    assert said(logged, "database_down") == 4, "a new outage is said at once"


def test_a_file_server_in_trouble_is_said_at_once_and_then_once_a_minute(
    logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    config = ftpcoord.Config(
        url="ftp://h/", database="sqlite:///unused", coordination_group="g", member_id="m", exec="true"
    )
    stats = ftpcoord.Stats()
    for second in range(181):
        clock.now = 1000.0 + second
        stats.server_down(config, ftpcoord.ServerDown("nobody answers"), 1.0)
    assert said(logged, "server_down") == 4
    stats.server_up(config)
    stats.server_up(config)
    assert said(logged, "server_up") == 1


def test_back_off_doubles_up_to_its_bound_and_begins_anew() -> None:
    delays = ftpcoord.Backoff(1.0, 60.0)
    assert [delays.next() for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    delays.reset()
    assert delays.next() == 1
    assert all(delay == 60 for delay in itertools.islice(iter(ftpcoord.Backoff(60.0, 60.0).next, None), 5000))
