"""The recipes, as they stand in tests/recipes."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Database, Files, need, wait_for
from members import PATIENCE, Crew
from processes import MODULE

import ftpcoord

RECIPES = Path(__file__).resolve().parent / "recipes"


# ---------------------------------------------------------------------------------------------------------------------
# A job queue
# ---------------------------------------------------------------------------------------------------------------------


class Queue:
    """The recipe's module in the members' working folder, its tables, and what its command line is asked for."""

    def __init__(self, folder: Path, database: Database) -> None:
        assert database.server is not None
        self.folder, self.database, self.shared = folder, database, folder / "shared"
        self.shared.mkdir()
        shutil.copy(RECIPES / "orders_queue.py", folder)
        self.environment = {"ORDERS_DSN": database.url, "ORDERS_SHARED": str(self.shared)}
        for statement in (RECIPES / "orders_queue.sql").read_text().split(";")[:-1]:
            database.execute(statement)
        self.run("schema", "--apply")

    def command(self, *words: str) -> tuple[list[str], dict[str, Any]]:
        python_path = os.pathsep.join([str(self.folder), str(MODULE.parent)])
        environ = {**os.environ, **self.environment, "PYTHONPATH": python_path}
        command = [sys.executable, "-m", "procrastinate", "--app=orders_queue.app", *words]
        return command, {"env": environ, "cwd": self.folder, "stdin": subprocess.DEVNULL}

    def run(self, *words: str) -> None:
        command, more = self.command(*words)
        done = subprocess.run(command, **more, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

    def jobs(self, state: str = "todo") -> list[dict[str, Any]]:
        rows = self.database.execute(f"SELECT args FROM procrastinate_jobs WHERE status = '{state}' ORDER BY id")
        return [args for (args,) in rows]

    def twice(self) -> None:
        """All jobs are there once more."""
        self.database.execute(
            "INSERT INTO procrastinate_jobs (queue_name, task_name, priority, args, status, attempts)"
            " SELECT queue_name, task_name, priority, args, 'todo', 0 FROM procrastinate_jobs"
        )


@pytest.fixture
def queue(postgresql: Database, tmp_path: Path) -> Iterator[Queue]:
    if sys.version_info < (3, 10):
        pytest.skip("the queue needs Python 3.10")
    if os.environ.get("FTPCOORD_REQUIRE_ALL") != "1":
        pytest.importorskip("procrastinate")
    yield Queue(tmp_path, postgresql)


@pytest.fixture
def crew(queue: Queue, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    for name, value in queue.environment.items():
        monkeypatch.setenv(name, value)
    with Crew(tmp_path, queue.database, files, exec=None, handler="orders_queue:enqueue", after="delete") as crew:
        yield crew


def test_each_file_becomes_a_job_and_its_work_is_done_once_though_jobs_are_there_twice(
    queue: Queue, crew: Crew
) -> None:
    numbers = [f"{number}" for number in range(6)]
    for number in numbers:
        crew.files.put(f"{number}.csv", f"number,amount\n{number},10.00\n".encode())
    member = crew.start("a")
    wait_for(lambda: not crew.files.names(), PATIENCE, member.said())
    assert member.stop() == 0
    jobs = queue.jobs()
    assert sorted(os.path.basename(job["path"]) for job in jobs) == [f"{number}.csv" for number in numbers]
    assert all(job["attempt"] == 1 and job["size"] == 22 and float(job["mtime"]) for job in jobs)
    assert len({job["content"] for job in jobs}) == 6 and all(Path(job["content"]).exists() for job in jobs)

    queue.twice()
    workers = [queue.command("worker", "--one-shot", "--concurrency=4") for _ in range(2)]
    running = [subprocess.Popen(command, **more, stderr=subprocess.DEVNULL) for command, more in workers]
    assert [worker.wait(60) for worker in running] == [0, 0]
    assert len(queue.jobs("succeeded")) == 12 and not queue.jobs()
    done = queue.database.execute("SELECT number, amount FROM orders ORDER BY number")
    assert done == [(number, "10.00") for number in numbers]
    assert not list(queue.shared.iterdir())


def test_a_queue_that_is_away_counts_for_no_file_and_the_file_comes_when_it_is_back(queue: Queue, crew: Crew) -> None:
    queue.database.execute("ALTER TABLE procrastinate_jobs RENAME TO away")
    crew.files.put("1.csv", b"number,amount\n1,10.00\n")
    member = crew.start("a", log_level="debug")
    member.wait("not_now")
    assert not member.events("file_failed"), member.said()
    queue.database.execute("ALTER TABLE away RENAME TO procrastinate_jobs")
    wait_for(lambda: not crew.files.names(), PATIENCE, member.said())
    (job,) = queue.jobs()
    assert job["attempt"] >= 2 and not member.events("file_failed"), "no try counted against the file"
    assert member.stop() == 0


# ---------------------------------------------------------------------------------------------------------------------
# PGP
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def keys() -> Iterator[Path]:
    """A home of gpg with a key of its own."""
    need("gpg")
    home = Path(tempfile.mkdtemp(prefix="gpg", dir="/tmp"))  # a short path: its agent's socket is in it
    try:
        gpg(home, "--passphrase", "", "--quick-generate-key", "ours@files.example", "default", "default", "never")
        yield home
    finally:
        subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"])
        shutil.rmtree(home, ignore_errors=True)


def gpg(home: Path, *words: str, text: bytes = b"") -> bytes:
    command = ["gpg", "--homedir", str(home), "--batch", "--pinentry-mode", "loopback", *words]
    return subprocess.run(command, input=text, stdout=subprocess.PIPE, check=True, timeout=60).stdout


def test_files_are_decrypted_and_what_is_not_for_us_ends_in_quarantine(
    keys: Path, sqlite: Database, files: Files, tmp_path: Path
) -> None:
    clear = tmp_path / "clear"
    clear.mkdir()
    (config,) = ftpcoord.Config.from_file(str(RECIPES / "pgp.ini"))
    run = config.exec.replace("/srv/clear", str(clear)).replace("/etc/ftpcoord/gnupg", str(keys))
    encrypt = ("--trust-model", "always", "--encrypt", "--recipient", "ours@files.example")
    secret, large = gpg(keys, *encrypt, text=b"paid"), gpg(keys, *encrypt, text=os.urandom(1 << 20))
    for name in ("a.csv.gpg", "-b c.csv.gpg", "$(touch x);`id`.gpg"):
        files.put(name, secret)
    files.put("cut.csv.gpg", large[: 1 << 19])
    with Crew(tmp_path, sqlite, files, exec=run, after="delete", max_attempts=1) as crew:
        member = crew.start("a")
        assert member.wait("file_quarantined").fields["path"].endswith("/cut.csv.gpg")
        wait_for(lambda: files.names() == ["cut.csv.gpg"], PATIENCE, member.said())
        assert member.stop() == 0
    found = {path.name: path.read_bytes() for path in clear.iterdir() if path.suffix != ".part"}
    assert found == dict.fromkeys(("a.csv", "-b c.csv", "$(touch x);`id`"), b"paid")
    assert shlex.split(run)[0] == "sh"
