"""Chaos on MySQL and OpenSSH.: tests/chaos.py says what is done and checked."""

from __future__ import annotations

from pathlib import Path

import chaos
import pytest
from conftest import need

SEED = 20262
SECONDS = 40.0


@pytest.mark.summary
@pytest.mark.slow
def test_chaos_on_mysql_violates_no_promise(tmp_path: Path) -> None:
    for server in ("mysql", "sshd"):
        need(server)
    history, violations = chaos.play("mysql", ["sshd"], SECONDS, SEED, tmp_path)
    print(f"seed {SEED}\n{chaos.summary([history], violations)}")
    assert not violations
    assert history.runs and history.takeovers and sum(history.faults.values()) > SECONDS / 4
