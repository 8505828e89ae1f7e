"""Features that meet: settings that are each tested alone, over a takeover, on real servers."""

from __future__ import annotations

import datetime
import hashlib
import zoneinfo
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from conftest import Database, Files, wait_for
from members import PATIENCE, Crew, kinds, stores


@kinds("postgresql")
@stores("vsftpd", "sshd")
def test_folders_order_companions_dates_and_the_trail_over_a_kill(
    database: Database, file_server: Files, tmp_path: Path
) -> None:
    files, zone = file_server, "Pacific/Kiritimati"  # where it is tomorrow already
    below = urlsplit(files.url).path
    settings: dict[str, Any] = {
        "url": files.url[: -len(below)],
        "folders": f"{below}/in1, {below}/in2",
        "order": "re:(k.)-.*",
        "requires": "{name}.ok",
        "checksum": "{name}.sha256",
        "after": "move:done/{date:%Y%m%d}",
        "timezone": zone,
        "audit": "on",
        "workers": 3,
    }
    names = {"in1/k1-1.csv", "in1/k1-2.csv", "in1/k2-1.csv", "in2/k1-3.csv"}

    def put(name: str) -> None:
        data = name.encode()
        files.put(name, data)
        files.put(f"{name}.sha256", f"{hashlib.sha256(data).hexdigest()}  {Path(name).name}\n".encode())
        files.put(f"{name}.ok")

    with Crew(tmp_path, database, files, **settings) as crew:
        crew.hold()
        for name in sorted(names):
            put(name)
        first, second = crew.start("a"), None
        assert {run.name for run in crew.begun(2)} == {"k1-1.csv", "k2-1.csv"}
        second = crew.start("b")
        second.wait("standby")
        first.kill()
        second.wait("elected")
        wait_for(lambda: len(crew.runs("begin")) == 4, PATIENCE)
        crew.let_go()
        crew.handled("k1-1.csv", "k1-2.csv", "k1-3.csv", "k2-1.csv")
        order = [(run.name, run.attempt) for run in sorted(crew.runs(), key=lambda run: run.at) if run.name[1] == "1"]
        assert order == [("k1-1.csv", 2), ("k1-2.csv", 1), ("k1-3.csv", 1)]
        wait_for(lambda: crew.ledger() == [], PATIENCE)
        day = datetime.datetime.now(zoneinfo.ZoneInfo(zone)).strftime("%Y%m%d")
        there = {str(path.relative_to(files.root)) for path in files.root.rglob("*") if path.is_file()}
        moved = {name.replace("/", f"/done/{day}/") for name in names}
        assert there == {name + end for name in moved for end in ("", ".ok", ".sha256")}
        trail = crew.database.execute("SELECT path, outcome, attempt FROM file_audit")
        told = sorted((path[len(below) + 1 :], outcome, attempt) for path, outcome, attempt in trail)
        killed = {"in1/k1-1.csv", "in1/k2-1.csv"}
        ends = [(name, outcome, 1 + (name in killed)) for name in names for outcome in ("done", "moved")]
        assert told == sorted([*ends, *((name, "lost", 1) for name in killed)])
