"""Chaos on MySQL and OpenSSH: tests/chaos.py says what is done. A file of its own, to run beside others."""

from __future__ import annotations

from pathlib import Path

import chaos
import pytest


@pytest.mark.summary
@pytest.mark.slow
def test_chaos_on_mysql_violates_no_promise(tmp_path: Path) -> None:
    chaos.prove("mysql", ["sshd"], 40.0, 20262, tmp_path)
