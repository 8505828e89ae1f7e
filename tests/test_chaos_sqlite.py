"""Chaos on SQLite, vsftpd and OpenSSH: tests/chaos.py says what is done. A file of its own, to run beside others."""

from __future__ import annotations

from pathlib import Path

import chaos
import pytest


@pytest.mark.summary
@pytest.mark.slow
def test_chaos_on_sqlite_violates_no_promise(tmp_path: Path) -> None:
    chaos.prove("sqlite", ["vsftpd", "sshd"], 40.0, 20263, tmp_path)
