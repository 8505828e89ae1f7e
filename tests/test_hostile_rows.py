"""Rows that somebody else has written, names that mean something to an operator's tools, texts that are too long, and
trees that are too deep: what cannot be used is said and not ready, and the rest goes on."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Database, wait_for
from hostile import FtpHost, Hasty, SftpHost, Site, reply, status

import ftpcoord


def change(folder: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(folder / "coordination.db", timeout=10)) as connection, connection:
        connection.execute(statement)


def unready(site: Site) -> str:
    return ftpcoord.why_unready(site.listener)


def test_a_row_that_cannot_be_read_is_said_and_not_ready_until_it_is_mended(tmp_path: Path) -> None:
    with FtpHost({"1.csv": b"1"}) as host:
        site = Site(tmp_path, host.settings)
        site.traceback = True
        with site:
            site.wait("file_done")
            change(tmp_path, "UPDATE file_ledger SET size = 'abc', state = 'failed'")
            site.wait("server_down")
            assert "the poll failed" in wait_for(lambda: unready(site))
            host.put("2.csv", b"22")
            change(tmp_path, "UPDATE file_ledger SET size = 1, state = 'done'")
            wait_for(lambda: "2.csv" in site.delivered())
            wait_for(lambda: not unready(site))
        assert len(site.all("poll_failed")) == 1


def test_a_row_whose_error_looks_like_marks_without_end_stops_no_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", faults.append)
    with FtpHost({"1.csv": b"1"}) as host, Site(tmp_path, host.settings, workers=1) as site:
        site.wait("file_done")
        text = f"its process ended {'9' * 5000} times; "
        change(tmp_path, f"UPDATE file_ledger SET state = 'failed', error = '{text}'")
        site.wait("file_done", 2)
        host.put("2.csv", b"22")
        site.arrive({"1.csv": b"1", "2.csv": b"22"})
    assert not faults


def test_states_that_nobody_knows_are_neither_on_the_page_nor_in_the_metrics(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "url": "ftp://me@files.example/in",
        "database": f"sqlite:///{tmp_path / 'coordination.db'}",
        "exec": "true",
        "coordination_group": "g",
        "member_id": "a",
    }
    listener = ftpcoord.Listener(**settings)
    with contextlib.closing(ftpcoord.open_database(listener.config)) as store:
        store.prepare()
        store.adopt("g", "a", [ftpcoord.Row(f"/in/{number}", 1, "", "done", 0, 0, 0) for number in range(3)])
    change(tmp_path, "UPDATE file_ledger SET state = '<script src=//a>' WHERE path = '/in/1'")
    change(tmp_path, "UPDATE file_ledger SET state = char(1) || 'é' WHERE path = '/in/2'")
    survey = ftpcoord.Survey(listener.config)
    read = wait_for(lambda: survey.get()[0])
    assert read["files"] == {"claimed": 0, "done": 1, "failed": 0, "quarantined": 0}
    assert "<script" not in ftpcoord.page([ftpcoord.listener_status(listener, survey)], 0)
    assert "script" not in ftpcoord.metrics([(listener, survey)])
    survey.close()


def test_health_rows_of_many_that_died_keep_nobody_from_standing(postgresql: Database) -> None:
    """A process that is killed and started anew every few seconds leaves so many in a day."""
    config = ftpcoord.Config(database=postgresql.url, coordination_group="g", member_id="a")
    with contextlib.closing(ftpcoord.open_database(config)) as store:
        store.apply_schema()
        postgresql.execute(
            "INSERT INTO health_check SELECT 'integration-host.example.internal:' || i, 'g', "
            "now() AT TIME ZONE 'UTC' - interval '1 hour' FROM generate_series(1, 20000) i"
        )
        store.prepare()
        assert len(store.members("g")) == 20000


def test_retry_takes_a_name_that_is_one_for_that_file_and_not_as_a_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "URL": "ftp://me@files.example/in",
        "COORDINATION_GROUP": "g",
        "MEMBER_ID": "a",
        "DATABASE": f"sqlite:///{tmp_path / 'coordination.db'}",
        "EXEC": "true",
    }.items():
        monkeypatch.setenv(f"FTPCOORD_{name}", value)
    monkeypatch.delenv("FTPCOORD_REQUIRE_ALL", raising=False)
    names = ["a.csv", "[a].csv", "?.csv", "new\nline"]
    with contextlib.closing(ftpcoord.open_database(ftpcoord.Config.from_env(os.environ))) as store:
        store.prepare()
        store.adopt("g", "a", [ftpcoord.Row(f"/in/{name}", 1, "", "done", 0, 0, 0) for name in names])

        def put_back(glob: str) -> list[str]:
            before = {row.path for row in store.rows("g") if row.state == "done"}
            assert ftpcoord.main(["retry", "--done", glob]) == 0
            return sorted(before - {row.path for row in store.rows("g") if row.state == "done"})

        assert put_back("[a].csv") == ["/in/[a].csv"]
        assert put_back("/in/?.csv") == ["/in/?.csv"]
        assert put_back("new%0Aline") == ["/in/new\nline"]
        assert put_back("*") == ["/in/a.csv"]


@pytest.mark.parametrize("kind", [FtpHost, SftpHost])
def test_what_a_server_says_at_length_is_shortened_wherever_it_is_shown(tmp_path: Path, kind: type[Any]) -> None:
    with kind({"1.csv": b"1"}) as host:
        host.on("CWD", reply("550-" + "no! " * 2000 + "\r\n" + " no!\r\n" * 900 + "550 end"), None)
        host.on("OPENDIR", status(4, b"no! " * 1_000_000), None)
        with Site(tmp_path, host.settings) as site:
            site.wait("server_down")
            assert "no! no!" in wait_for(lambda: unready(site))
            assert len(unready(site)) < 3000
        assert max(map(len, site.log)) < 5000


@contextlib.contextmanager
def deep_tree(top: Path) -> Iterator[Path]:
    """Deeper than Python recurses."""
    top.mkdir()
    here = os.open(top, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=here)
        last, here = here, os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(last)
    os.close(here)
    try:
        yield top
    finally:
        subprocess.run(["rm", "-rf", top], check=True)


@pytest.mark.parametrize("delivery", ["folder", "handler"])
def test_a_tree_that_is_too_deep_below_download_dir_or_left_by_a_command_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delivery: str
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "copies").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "copies"))
    place = tmp_path / ("deep" if delivery == "folder" else "copies/ftpcoord-copies-dead")
    with deep_tree(place), FtpHost({"1.csv": b"1"}) as host:
        more = {"download_dir": str(place)} if delivery == "folder" else {}
        with Site(tmp_path / "site", host.settings, delivery, **more) as site:
            site.wait("file_done")


def test_a_missing_download_dir_is_not_ready_and_another_member_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ftpcoord, "Backoff", Hasty)
    with FtpHost({"1.csv": b"1"}) as host:
        database = f"sqlite:///{tmp_path / 'coordination.db'}"
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        with Site(tmp_path / "a", host.settings, database=database, yield_after=2) as site:
            site.wait("file_done")
            site.listener.stop()
            site.wait("stopped")
        host.put("2.csv", b"22")
        (tmp_path / "b" / "delivered").mkdir()
        broken = Site(tmp_path / "b", host.settings, database=database, member_id="b", yield_after=2)
        (tmp_path / "b" / "delivered").rmdir()
        with broken:
            broken.wait("local_trouble")
            assert "is not a folder" in wait_for(lambda: unready(broken))
            with Site(tmp_path / "a", host.settings, database=database, yield_after=2) as well:
                wait_for(lambda: "2.csv" in well.delivered())


def test_a_heartbeat_whose_answer_makes_no_sense_is_a_database_that_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FtpHost({"1.csv": b"1"}) as host:
        site = Site(tmp_path, host.settings)
        site.traceback = True
        with site:
            site.wait("file_done")
            with monkeypatch.context() as patch:
                patch.setattr(ftpcoord.SQLite, "renew", lambda *_: int("no"))
                site.wait("lost")
                wait_for(lambda: "cannot be used" in unready(site))
                said = [name for name, _ in site.events]
                said = said[: said.index("lost")]  # a standby's look makes sense here, so that it is said anew
                assert (said.count("heartbeat_failed"), said.count("database_down")) == (1, 1)
            site.wait("elected", 2)
            wait_for(lambda: not unready(site))
        assert len(site.all("elected")) >= 2
