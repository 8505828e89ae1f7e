"""What the database does not take as it is: the row's own fault, kept in another form or seen, and never an outage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Database, Files, new_database, wait_for
from members import PATIENCE, Crew, ftpcoord

NAMES = ["a.csv", "b-€.csv", "c-😀.csv", "d-ä%41.csv", "e.csv"]


@contextlib.contextmanager
def narrow_database(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> Iterator[Database]:
    """A database whose file_ledger has room for few characters."""
    if name == "sqlite":
        database = Database(name, f"sqlite:///{tmp_path / 'narrow.db'}")
        for statement in ftpcoord.ddl(False).values():
            narrow = "path TEXT NOT NULL CHECK (path NOT GLOB '*[^ -~]*')"
            texts = "error TEXT NOT NULL CHECK (length(error) < 1000 AND error NOT GLOB '*[^ -~]*')"
            database.execute(statement.replace("path TEXT NOT NULL", narrow).replace("error TEXT NOT NULL", texts))
        yield database
        return
    server = request.getfixturevalue("postgres" if name == "postgresql" else name)
    with new_database(name, server) as database:
        if name == "postgresql":
            name = f"{database.database}_latin1"
            options = "ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C' OWNER app"
            database.execute(f"CREATE DATABASE {name} {options}", admin=True)
            latin = Database("postgresql", database.url.rpartition("/")[0] + f"/{name}", server)
            try:
                yield latin
            finally:
                database.execute(f"DROP DATABASE {name} WITH (FORCE)", admin=True)
        else:
            for statement in ftpcoord.ddl(True).values():
                database.execute(statement.replace("utf8mb4", "utf8mb3"))
            yield database


@pytest.fixture(params=["postgresql", "mysql", "mariadb", "sqlite"])
def narrow(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    with narrow_database(request, request.param, tmp_path) as database:
        yield database


def config(database: Database, **more: Any) -> Any:
    settings = {
        "database": database.url,
        "coordination_group": "g",
        "member_id": "a",
        "heartbeat_frequency": 0.5,
        "liveness_check_interval": 6,
    }
    return ftpcoord.Config(**settings, **more)


@contextlib.contextmanager
def holding(database: Database) -> Iterator[Any]:
    """The ledger of the member that holds the token."""
    store = ftpcoord.open_database(config(database))
    store.apply_schema()
    store.prepare()
    assert store.first("g", "a", 1) == 1
    lease = ftpcoord.Lease(1, float("inf"), time.monotonic)
    with contextlib.closing(store):
        yield ftpcoord.Ledger(store, "g", "a", lease, time.monotonic)


def works(*names: str) -> list[Any]:
    return [
        ftpcoord.Work(ftpcoord.Found(f"/in/{name}", name, ftpcoord.Entry(name, "file", 1, "")), None) for name in names
    ]


def test_names_and_words_that_the_database_lacks_are_kept_in_ascii_and_read_back_as_they_are(narrow: Database) -> None:
    """One statement claims all; those that it refuses do not hold up the others."""
    odd = [*NAMES, "f-\udcff.csv", "g-😀\udcff%.csv"]
    with holding(narrow) as ledger:
        rows = ledger.claim(works(*odd))
        assert all(rows) and not ledger.refused
        error, action = "→ exit 3: 50 % of 😀", "move:ergebnisse-€-😀"
        changes = [ftpcoord.Change(row, row._replace(state="failed", error=error, action=action), 60.0) for row in rows]
        assert ledger.write(changes) == [True] * len(odd)
        store = ftpcoord.open_database(config(narrow))
        again = ftpcoord.Ledger(store, "g", "a", ledger.lease, time.monotonic)
        again.refresh()
        assert sorted(row.path for row in again.all()) == sorted(f"/in/{name}" for name in odd)
        assert {row.action for row in again.all()} == {action}
        assert all("exit 3: 50" in row.error for row in again.all())
        row = again.get("/in/c-😀.csv")
        again.change(row, row._replace(state="done", action="", error=""))
        again.change(again.get("/in/c-😀.csv"), None)
        assert len(again.all()) == len(odd) - 1
        store.close()


def test_files_with_such_names_are_handled_once_and_their_failures_count(
    narrow: Database, files: Files, tmp_path: Path
) -> None:
    for name in NAMES:
        files.put(name, b"x")
    with Crew(tmp_path, narrow, files, max_attempts=2, retry_delay=3) as crew:
        done = crew.run("run", "--once", exec="sh -c 'echo kein → Pfeil 😀 >&2; exit 1'")
        assert done.returncode == 1 and "database_down" not in done.stdout, done.stdout
        assert [row["failures"] for row in crew.ledger()] == [1] * len(NAMES)
        assert all("Pfeil" in row["error"] for row in crew.ledger())
        wait_for(lambda: crew.run("run", "--once").returncode == 0, PATIENCE)
        assert crew.names() == sorted(NAMES) and {run.attempt for run in crew.runs()} == {2}
        assert crew.run("run", "--once").returncode == 0 and len(crew.runs()) == len(NAMES)
        listed = crew.call("files", "--json")
        assert listed.returncode == 0, listed.stderr
        files.put("z-€😀.csv", b"x")
        assert crew.call("adopt").returncode == 0
        assert crew.run("run", "--once").returncode == 0 and len(crew.runs()) == len(NAMES)


# ----------------------------------------------------------------------------- what is refused in every form


def forbid(database: Database, condition: str) -> None:
    """No row of file_ledger may be written for which this is false."""
    if database.name == "sqlite":
        for verb in ("INSERT", "UPDATE"):
            database.execute(
                f"CREATE TRIGGER no_{verb} BEFORE {verb} ON file_ledger WHEN NOT "
                f"({condition.replace('state', 'NEW.state').replace('path', 'NEW.path')}) "
                f"BEGIN SELECT RAISE(ABORT, 'not here'); END"
            )
    else:
        database.execute(f"ALTER TABLE file_ledger ADD CONSTRAINT not_here CHECK ({condition})")


def tables(database: Database) -> None:
    with contextlib.closing(ftpcoord.open_database(config(database))) as store:
        store.apply_schema()


def test_a_row_that_the_ledger_takes_in_no_form_holds_up_no_other_and_is_said_with_growing_pauses(
    database: Database, files: Files, tmp_path: Path
) -> None:
    tables(database)
    forbid(database, "path NOT LIKE '%bad%'")
    for name in ("a.csv", "bad.csv", "c.csv"):
        files.put(name, b"x")
    with Crew(tmp_path, database, files, tables=False, retry_delay=0.6) as crew:
        member = crew.start("a")
        crew.handled("a.csv", "c.csv")
        wait_for(lambda: len(member.events("file_failed")) >= 3, PATIENCE)
        said = member.events("file_failed")
        assert all(event.fields["path"].endswith("bad.csv") and event.level == "error" for event in said)
        assert [event.fields["retry_in"] for event in said[:3]] == ["0.600", "1.200", "2.400"]
        assert not member.events("database_down") and crew.states() == {"a.csv": "done", "c.csv": "done"}
        assert member.stop() == 0
        assert "released" in member.said(), "a stop is not held up"
        assert crew.run("run", "--once").returncode == 1


@pytest.mark.parametrize("delivery", ["command", "folder"])
def test_a_file_whose_done_is_refused_is_quarantined_and_not_handled_again(
    database: Database, files: Files, tmp_path: Path, delivery: str
) -> None:
    tables(database)
    forbid(database, "state <> 'done'")
    target = tmp_path / "target"
    target.mkdir()
    files.put("a.csv", b"x")
    with Crew(tmp_path, database, files, tables=False, after="delete") as crew:
        folder = {"exec": None, "download_dir": target} if delivery == "folder" else {}
        member = crew.start("a", **folder)
        assert "as done" in member.wait("file_quarantined").fields["error"]
        polls = member.polls()
        wait_for(lambda: member.polls() >= polls + 3)
        assert crew.names() == (["a.csv"] if delivery == "command" else [])
        assert crew.states() == {"a.csv": "quarantined"}
        assert files.names() == ["a.csv"], "what is not recorded is not removed"
        assert not member.events("database_down")
