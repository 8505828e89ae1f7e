"""Chaos on PostgreSQL and vsftpd: tests/chaos.py says what is done. A file of its own, to run beside others."""

from __future__ import annotations

from pathlib import Path

import chaos
import pytest


@pytest.mark.summary
@pytest.mark.slow
def test_chaos_on_postgresql_violates_no_promise(tmp_path: Path) -> None:
    chaos.prove("postgresql", ["vsftpd"], 40.0, 20261, tmp_path)
