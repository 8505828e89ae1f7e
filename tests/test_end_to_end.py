"""Three members as processes, real databases, real file servers, 200 files: each is handled exactly once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path

import pytest
from conftest import Database, Files, wait_for
from members import Crew, kinds, stores, through
from servers import Proxy

COUNT = 200
PAIRS = [
    ("postgresql", "sshd", COUNT),
    ("mysql", "vsftpd-implicit", 60),
    ("mariadb", "vsftpd", 60),
    ("sqlite", "pyftpd", 60),
]

# A whole minute of the day before yesterday: LIST shows no seconds, and of old files only the day.
BEGAN = int(time.time()) // 60 * 60 - 2 * 86400


def content(number: int) -> bytes:
    return f"{number}\n".encode() * number


@pytest.mark.parametrize(("database", "file_server", "count"), PAIRS, indirect=["database", "file_server"])
def test_each_file_is_handled_exactly_once_by_three_processes(
    database: Database, file_server: Files, tmp_path: Path, count: int
) -> None:
    """Half of the files are there before the members, the others come while they run. after = delete."""
    names = [f"f{number:03}.csv" for number in range(count)]
    for number in range(count // 2):
        file_server.put(names[number], content(number), BEGAN + number * 60)
    with Crew(tmp_path, database, file_server, after="delete") as crew:
        members = [crew.start(name) for name in "abc"]
        wait_for(lambda: len(crew.runs()) >= count // 4, 60)
        for number in range(count // 2, count):
            file_server.put(names[number], content(number), BEGAN + number * 60)
        crew.handled(*names, timeout=90)
        active = crew.active()
        wait_for(lambda: not file_server.names(), 30, "all files to be deleted")

        for run in crew.runs():
            number = int(run.name[1:4])
            data = content(number)
            assert (run.member, run.attempt, run.term) == (active.name, 1, active.term())
            assert (run.length, run.content) == (len(data), data[:200].decode())
            words = run.environment
            assert words["FTPCOORD_SIZE"] == str(len(data)) and words["FTPCOORD_GROUP"] == "crew"
            assert words["FTPCOORD_MTIME"] == str(BEGAN + number * 60)
            assert words["FTPCOORD_PATH"] == f"{file_server.root}/{run.name}"
            assert os.path.basename(words["FTPCOORD_FILE"]) == run.name
            # What is meant for ftpcoord is not for its command: no password, no database.
            assert len(words) == 9, words
        assert len(crew.names("begin")) == count
        assert not crew.ledger(), "a deleted file is forgotten"
        for member in members:
            if member is not active:
                member.wait("standby", active=active.name)
                assert not member.events("elected") and not member.events("polled")
        assert [member.stop() for member in crew.standbys()] == [0, 0]
        assert active.stop() == 0
        assert [event.fields["term"] for event in active.events("file_done")] == [str(active.term())] * count
        active.wait("released", term=active.term())


@kinds("postgresql")
@stores("vsftpd-explicit")
def test_200_files_appear_exactly_once_in_the_download_folder(
    database: Database, file_server: Files, tmp_path: Path
) -> None:
    """Delivery is the folder alone: claims and completions are committed in groups there."""
    target = tmp_path / "delivered"
    target.mkdir()
    for number in range(COUNT):
        file_server.put(f"f{number:03}.bin", content(number))
    with Crew(tmp_path, database, file_server, exec=None, download_dir=target, after="move:done") as crew:
        for name in "abc":
            crew.start(name)
        wait_for(lambda: file_server.names() == ["done"], 60, "all files to be moved")
        wait_for(lambda: not crew.ledger(), 10, "moved files to be forgotten")
        done = [event.fields["path"] for event in crew.active().events("file_done")]
        assert len(done) == len(set(done)) == COUNT
        expected = {f"f{number:03}.bin": content(number) for number in range(COUNT)}
        for folder in (target, file_server.root / "done"):
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected


@kinds("postgresql")
@stores("pyftpd", "sshd")
def test_a_standby_never_connects_to_the_file_server(database: Database, file_server: Files, tmp_path: Path) -> None:
    """Each member comes by a way of its own, so that the connections in the server's log can be told apart."""
    with contextlib.ExitStack() as stack:
        crew = stack.enter_context(Crew(tmp_path, database, file_server, after="delete"))
        ways = {name: stack.enter_context(Proxy("127.0.0.1", file_server.server.port)) for name in "abc"}
        before = file_server.server.connections()
        for name, way in ways.items():
            crew.start(name, **through(way, file_server))
        for number in range(8):
            file_server.put(f"{number}.txt", b"x")
        crew.handled(*(f"{number}.txt" for number in range(8)))
        active = crew.active()
        polls = active.polls()
        wait_for(lambda: active.polls() >= polls + 5)
        for member in crew.standbys():
            member.wait("standby")
            assert member.stop() == 0
        used = {name: way.connections for name, way in ways.items()}
        assert used.pop(active.name) == file_server.server.connections() - before > 0
        assert list(used.values()) == [0, 0]


@kinds("sqlite")
@stores("sshd", "vsftpd")
def test_large_files_arrive_whole(database: Database, file_server: Files, tmp_path: Path) -> None:
    target = tmp_path / "delivered"
    target.mkdir()
    blocks = {f"big{number}.bin": os.urandom(1 << 20) * 12 + b"end" for number in range(3)}
    for name, data in blocks.items():
        file_server.put(name, data)
    with Crew(tmp_path, database, file_server, download_dir=target) as crew:
        crew.start("a")
        crew.handled(*blocks, timeout=60)
        for run in crew.runs():
            path = Path(run.environment["FTPCOORD_FILE"])
            assert path == target / run.name and run.length == len(blocks[run.name])
            assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(blocks[run.name]).digest()
