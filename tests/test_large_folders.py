"""100,000 entries in a folder: what a poll of it costs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hostile import FtpHost, Site

import ftpcoord

LARGE = """
import datetime, resource, sys, time
import ftpcoord, hostile
count, mlsd = int(sys.argv[1]), sys.argv[2] == "mlsd"
host = hostile.FtpHost(mlsd=mlsd)
line = b"type=file;size=12;modify=20240112101530; %06d.csv" if mlsd else b"-rw-r--r-- 1 0 0 12 Jan 12  2024 %06d.csv"
host.lines = [line % number for number in range(count)]
config = ftpcoord.Config(**{**host.settings, "timeout": 30, "settle": 0, "database": "sqlite:///x"})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
server = ftpcoord.open_server(config)
selector = ftpcoord.Selector(config, time.monotonic)
lease = ftpcoord.Lease(1, float("inf"), time.monotonic)
class Elsewhere(ftpcoord.MemoryRows):
    def _change(self, term, change):
        return True
ledger = ftpcoord.Ledger(Elsewhere(), "g", "m", lease, time.monotonic)
spent = -time.process_time()
found = selector.tree.walk(server)
ready = selector.choose(found, ledger.get, set()).ready
assert len(ready) == count, len(ready)
for start in range(0, count, 64):
    ledger.claim(ready[start : start + 64])
for row in ledger.all():
    ledger.change(row, row._replace(state="done"))
spent += time.process_time()
again = -time.process_time()
found = selector.tree.walk(server)
assert not selector.choose(found, ledger.get, set()).ready
ledger.forget_unlisted({one.path for one in found}, 10)
again += time.process_time()
print(spent, again, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def cost(tmp_path: Path, count: int, kind: str) -> tuple[float, float, float]:
    """(seconds of the first poll, of a second one with nothing new, MB) for so many entries."""
    tests = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(count), kind],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])},
    )
    assert done.returncode == 0, done.stderr
    first, second, memory = map(float, done.stdout.split())
    return first, second, memory


@pytest.mark.parametrize("kind", ["mlsd", "list"])
def test_a_poll_of_100_000_entries_takes_seconds_and_grows_no_faster_than_their_number(
    tmp_path: Path, kind: str
) -> None:
    small = cost(tmp_path, 25_000, kind)
    large = cost(tmp_path, 100_000, kind)
    assert large[1] < 15 and large[0] < 40, "even on a slow machine"
    assert large[1] < 4 * 2.5 * small[1] + 0.5 and large[0] < 4 * 2.5 * small[0] + 0.5
    assert large[2] < 400, "MB, listing included"


def test_a_folder_of_100_000_known_files_has_its_new_ones_handled(tmp_path: Path) -> None:
    with FtpHost() as host:
        host.lines = [b"type=file;size=12;modify=20240112101530; %06d.csv" % number for number in range(100_000)]
        site = Site(tmp_path, host.settings, timeout=30, polling_interval=0.5)
        config = site.listener.config
        with contextlib.closing(ftpcoord.open_database(config)) as database:
            database.prepare()
            rows = [
                ftpcoord.Row(f"/in/{number:06}.csv", 12, "2024-01-12T10:15:30", "done", 0, 0, 0)
                for number in range(100_000)
            ]
            database.adopt(config.coordination_group, config.member_id, rows)
        host.put("new", b"1")
        with site:
            assert site.wait("polled")["new"] == 1
            site.arrive({"new": b"1"})
            begun = time.monotonic()
            site.polls(2)
            assert time.monotonic() - begun < 20
