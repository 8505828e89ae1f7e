"""The benchmark runs through with whatever tools are there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import need

ROOT = Path(__file__).resolve().parent.parent


def test_the_benchmark_runs_through_with_whatever_tools_are_there(tmp_path: Path) -> None:
    need("postgresql")
    parts = [word for part in ("small", "cost", "starve") for word in ("--only", part)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "bench.py"), "--quick", *parts, "--json", str(tmp_path / "r.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-3000:]
    results: dict[str, Any] = json.loads((tmp_path / "r.json").read_text())
    assert {"machine", "small", "cost", "starve"} <= set(results)
    assert results["cost"]["postgresql"]["active"]["round_trips"] == 1
