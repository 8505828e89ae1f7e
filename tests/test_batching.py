"""The batching behind the benchmark's figures keeps its promises when the process dies in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from conftest import Files, new_folder

ROOT = Path(__file__).resolve().parent.parent
COUNT = 150  # more than two groups

# Ends the process like a power failure at a chosen call, or notes the order of the steps.
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

    def start(self, member: str, *crash: object) -> subprocess.Popen[bytes]:
        settings = {
            **self.files.settings, "database": f"sqlite:///{self.place}/db", "member_id": member, "settle": 0,
            "coordination_group": "crash", "download_dir": self.target, "heartbeat_frequency": 0.2,
            "liveness_check_interval": 1.5, "retry_delay": 0.1, "workers": 1,
        }  # fmt: skip
        env = {name: value for name, value in os.environ.items() if not name.startswith("FTPCOORD_")}
        env.update({f"FTPCOORD_{name.upper()}": str(value) for name, value in settings.items()})
        env["PYTHONPATH"] = str(ROOT)
        words = [str(word) for word in crash or ("nothing", "before", 0)]
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, *words, str(self.log)], env=env, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.place,
        )

    def finish(self, member: str) -> None:
        """A further member does what is left, as soon as the lease of the one before is stale."""
        deadline = time.monotonic() + 30
        while True:
            process = self.start(member)
            said = process.communicate(timeout=60)[0].decode()
            assert process.returncode == 0, said
            if "another member is active" not in said:
                return
            assert time.monotonic() < deadline, said

    def wait_for_the_first_file(self, process: subprocess.Popen[bytes]) -> None:
        servers.wait_for(lambda: process.poll() is not None or any(self.target.iterdir()), 30)

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


@pytest.mark.parametrize(
    "point",
    [
        ("create_file", "after", 20), ("begin_sync", "before", 20), ("fsync", "after", 20), ("give_name", "before", 1),
        ("give_name", "after", 20), ("sync_folder", "before", 1), ("sync_folder", "after", 1), ("_done", "before", 1),
        ("_done", "after", 1), ("_done", "after", 2),
    ],
    ids=lambda point: " ".join(str(word) for word in point),
)  # fmt: skip
def test_a_member_killed_in_the_middle_of_a_group_leaves_each_file_once(
    delivery: Delivery, point: tuple[str, str, int]
) -> None:
    process = delivery.start("a", *point)
    said = process.communicate(timeout=60)[0].decode()
    assert process.returncode == -signal.SIGKILL, said
    delivery.assert_no_partial_file_has_a_final_name()
    delivery.finish("b")
    delivery.assert_each_file_is_there_once()


def test_members_killed_at_any_moment_leave_each_file_once(delivery: Delivery) -> None:
    for number in range(4):
        process = delivery.start(f"m{number}")
        delivery.wait_for_the_first_file(process)
        time.sleep(0.01 * number)  # not the same moment each time; any will do
        process.kill()
        process.communicate()
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
    said = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 1, said
    assert len(list(delivery.target.iterdir())) == COUNT - 1
    assert "file_failed" in said
    refused.chmod(0o644)
    time.sleep(0.2)
    delivery.finish("b")
    delivery.assert_each_file_is_there_once()
