"""Members of two versions in one group, rows that an older version wrote, columns and triggers that nobody knows."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import pytest
import servers
from conftest import Database, Files, new_folder, wait_for
from members import Crew, Member, kinds, never
from processes import MODULE, compiled

GROUP = "crew"


@pytest.fixture
def files(vsftpd_plain: servers.Vsftpd) -> Iterator[Files]:
    with new_folder("vsftpd", vsftpd_plain) as found:
        yield found


def other_version(folder: Path, version: str) -> Path:
    """ftpcoord.py as it will call itself one day."""
    folder.mkdir()
    source = MODULE.read_text(encoding="utf-8")
    changed = re.sub(r'(?m)^__version__ = "[^"]+"$', f'__version__ = "{version}"', source)
    assert changed != source
    path = folder / "ftpcoord.py"
    path.write_text(changed, encoding="utf-8")
    return path


def add_columns(database: Database) -> None:
    """Columns that a later version, or an administrator, may have added to all three tables."""
    for table in ("token_holder", "health_check", "file_ledger"):
        for column in ("remark VARCHAR(20) NOT NULL DEFAULT 'x'", "extra INTEGER DEFAULT NULL", "zone TEXT"):
            database.execute(f"ALTER TABLE {table} ADD COLUMN {column}")


@kinds("postgresql", "mysql", "sqlite")  # the statements of MariaDB are MySQL's
def test_members_of_two_versions_take_turns_in_one_group_with_columns_that_neither_knows(
    database: Database, files: Files, tmp_path: Path
) -> None:
    newer = other_version(tmp_path / "newer", "9.9.9")
    with Crew(tmp_path, database, files, after="keep") as crew:
        if database.server is None:
            crew.call("schema", "sqlite", "--apply", "--config", "env")
        add_columns(database)

        def start(name: str, module: Path) -> Member:
            environment = crew.environment(member_id=name)
            return crew.add(Member(name, [*compiled(module), "--config", "env"], environment, tmp_path))

        old = start("old", MODULE)
        old.wait("elected")
        new = start("new", newer)
        assert new.wait("starting").fields["version"] == "9.9.9"
        new.wait("standby", active="old")
        expected = []
        for name in ("0.csv", "1.csv", "2.csv"):
            files.put(name, b"1")
            expected.append(name)
            crew.handled(*expected)
            wait_for(lambda: set(crew.states().values()) == {"done"}, 10)
            leaving = crew.active()
            since = time.time()
            assert leaving.stop() == 0
            crew.elected(*(member for member in crew.members if member.running()), since=since)
            start(leaving.name, newer if leaving.name == "new" else MODULE)
        assert [run.member for run in crew.runs()] == ["old", "new", "old"]
        assert all(run.attempt == 1 for run in crew.runs("begin"))
        assert {row[0] for row in database.execute("SELECT remark FROM file_ledger")} == {"x"}
        status = crew.status()
        assert status["files"]["done"] == 3 and status["term"] == 4


# What version 1.0.0 leaves behind in each state: (name, state, term, attempts, failures, action, seconds until due).
LEFT_BY_1_0_0: list[tuple[str, str, int, int, int, str, Optional[int]]] = [
    ("done.csv", "done", 3, 1, 0, "", None),
    ("due.csv", "done", 3, 1, 0, "move:sent", None),
    ("claimed.csv", "claimed", 3, 1, 0, "", None),
    ("failed.csv", "failed", 2, 2, 2, "", 0),
    ("waiting.csv", "failed", 2, 2, 2, "", 3600),
    ("quarantined.csv", "quarantined", 2, 5, 5, "", None),
]


def test_every_row_that_version_1_0_0_wrote_is_understood(database: Database, files: Files, tmp_path: Path) -> None:
    """The rows are written here letter by letter: they are never to be changed, whatever becomes of the program."""
    mysql = database.name in ("mysql", "mariadb")
    moment = "2026-01-12 10:15:30.123"
    old = time.time() - 40 * 86400
    listed = time.strftime("%Y-%m-%d" if mysql else "%Y-%m-%dT%H:%M", time.gmtime(old))
    with Crew(tmp_path, database, files, after="keep", after_error="move:sent") as crew:  # due.csv has it due
        if database.server is None:
            crew.call("schema", "sqlite", "--apply", "--config", "env")
        database.execute(f"INSERT INTO token_holder (group_id, task_id, term) VALUES ('{GROUP}', 'gone', 3)")
        for beat, when in (("gone", moment), ("left", "1970-01-01 00:00:01"), ("step-down:2", moment)):
            database.execute(
                f"INSERT INTO health_check (task_id, group_id, last_heartbeat) VALUES ('{beat}', '{GROUP}', '{when}')"
            )
        for name, state, term, attempts, failures, action, due in LEFT_BY_1_0_0:
            files.put(name, b"12345", old)
            path = f"{files.root}/{name}"
            number = hashlib.sha256(path.encode()).hexdigest()
            later = "NULL"
            if due is not None:
                later = {
                    "postgresql": f"(CURRENT_TIMESTAMP AT TIME ZONE 'UTC') + interval '{due} seconds'",
                    "sqlite": f"strftime('%Y-%m-%d %H:%M:%f', 'now', '+{due} seconds')",
                }.get(database.name, f"UTC_TIMESTAMP(6) + INTERVAL {due} SECOND")
            database.execute(
                "INSERT INTO file_ledger (group_id, file_id, path, size, mtime, state, term, task_id, attempts, "
                "failures, next_attempt_at, updated_at, error, action) VALUES "
                f"('{GROUP}', '{number}', '{path}', 5, '{listed}', '{state}', {term}, 'gone', "
                f"{attempts}, {failures}, {later}, '{moment}', '{'it broke' if failures else ''}', '{action}')"
            )
        member = crew.start("now")
        assert member.wait("elected").fields["term"] == "4"
        crew.handled("claimed.csv", "failed.csv")
        wait_for(lambda: "due.csv" not in files.names(), 10)
        assert (files.root / "sent" / "due.csv").exists()
        assert {(run.name, run.attempt) for run in crew.runs()} == {("claimed.csv", 2), ("failed.csv", 3)}
        polls = member.polls()
        wait_for(lambda: member.polls() >= polls + 2, 20)
        assert crew.states() == {
            "done.csv": "done",
            "claimed.csv": "done",
            "failed.csv": "done",
            "waiting.csv": "failed",
            "quarantined.csv": "quarantined",
        }
        assert len(crew.names("begin")) == 2


def test_triggers_and_defaults_on_the_tables_do_not_disturb(database: Database, files: Files, tmp_path: Path) -> None:
    """An administrator audits them. On MySQL a trigger hides LAST_INSERT_ID(expression) from the answer."""
    with Crew(tmp_path, database, files, after="delete") as crew:
        if database.server is None:
            crew.call("schema", "sqlite", "--apply", "--config", "env")
        database.execute("CREATE TABLE audit (what VARCHAR(20))")
        for table in ("token_holder", "health_check", "file_ledger"):
            for change in ("INSERT", "UPDATE", "DELETE"):
                insert = f"INSERT INTO audit (what) VALUES ('{change} {table[:5]}')"
                if database.name == "postgresql":
                    name = f"audit_{table}_{change}"
                    database.execute(
                        f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS "
                        f"$$ BEGIN {insert}; RETURN NULL; END $$"
                    )
                    body = f"FOR EACH ROW EXECUTE FUNCTION {name}()"
                else:
                    body = f"FOR EACH ROW BEGIN {insert}; END"
                database.execute(f"CREATE TRIGGER t_{table}_{change} AFTER {change} ON {table} {body}")
        a, b = crew.start("a"), crew.start("b")
        active = crew.active()
        files.put("x.csv", b"1")
        crew.handled("x.csv")
        never(lambda: a.events("lost") + b.events("lost"), 2 * crew.heartbeat, "the lease was lost")
        since = time.time()
        assert active.stop() == 0
        crew.elected(a, b, since=since, timeout=crew.liveness)
        files.put("y.csv", b"1")
        crew.handled("x.csv", "y.csv")
        assert crew.token()[1] == active.term() + 1
        assert ("UPDATE token",) in database.execute("SELECT what FROM audit")
