"""The audit trail: a row for each outcome of each attempt, if the change of the ledger that it tells of is made."""

from __future__ import annotations

import contextlib
import datetime
import getpass
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Database, Files, wait_for
from members import PATIENCE, Crew, kinds
from processes import MODULE
from test_dialects import FENCE, ODD_PATHS, SERVERS, STALE, Tables, row, rows_of
from test_ledger_refusals import narrow, works

import ftpcoord
from ftpcoord import Change, ConfigError, DatabaseRefused, Fence, Outcome

__all__ = ["narrow"]
SHA = hashlib.sha256(b"1").hexdigest()
DONE = Outcome("done", SHA, 1.5)
OPERATOR = f"{getpass.getuser()}@{socket.gethostname()}"
URL = {"url": "ftp://u@h/in"}


@pytest.fixture
def tables(database: Database) -> Iterator[Tables]:
    with contextlib.closing(Tables(database)) as tables:
        tables.apply()
        yield tables


@pytest.fixture
def ledger(tables: Tables) -> ftpcoord.Database:
    """The ledger of member a, which holds term 1 of group g and has a claim."""
    store = tables.open(audit=True)
    assert store.first("g", "a", 1) == 1
    assert store.write(FENCE, [Change(None, row())]) == [True]
    return store


def trail(store: ftpcoord.Database, *names: str) -> list[Any]:
    """These columns of all rows, the oldest first."""
    found = [tuple(one[name] for name in names) for one in store.history("g")]
    return found if len(names) > 1 else [one[0] for one in found]


# -- a row beside its change ------------------------------------------------------------------------------------------


def test_an_outcome_is_a_row_beside_its_change(ledger: ftpcoord.Database) -> None:
    done = row(state="done", size=5_000_000_000, mtime="2026-01-12T10:15=1768212907")
    assert ledger.write(FENCE, [Change(row(), done, outcome=DONE)]) == [True]
    (found,) = ledger.history("g")
    at = time.time() - datetime.datetime.fromisoformat(f"{found.pop('at')}+00:00").timestamp()
    assert -1 < at < 30
    assert found == {
        "path": "/in/a.csv",
        "size": 5_000_000_000,
        "mtime": "2026-01-12T10:15=1768212907",
        "sha256": SHA,
        "outcome": "done",
        "term": 1,
        "task_id": "a",
        "attempt": 1,
        "seconds": 1.5,
        "error": "",
    }


def test_what_is_not_changed_has_no_row(ledger: ftpcoord.Database) -> None:
    done, fence = row(state="done"), Fence("g", "a", 2)
    for seen in STALE:
        assert ledger.write(FENCE, [Change(row(**seen), done, outcome=DONE)]) == [False], seen
        assert ledger.write(FENCE, [Change(row(**seen), None, outcome=DONE)]) == [False], seen
    assert ledger.write(FENCE, [Change(None, done, outcome=DONE)]) == [False], "another row stands there"
    for fence in (Fence("g", "a", 2), Fence("g", "b", 1), Fence("other", "a", 1)):
        assert ledger.write(fence, [Change(row(), done, outcome=DONE)]) == [False], fence
        ledger.write(fence, [Change(row(), None, outcome=DONE)])
        ledger.write(fence, [Change(None, row("/in/new"), outcome=DONE)])
    assert trail(ledger, "outcome") == []
    assert rows_of(ledger) == [row()]


def test_a_change_without_outcome_has_no_row_among_others_that_have(ledger: ftpcoord.Database) -> None:
    ledger.write(FENCE, [Change(None, row(f"/in/{n}")) for n in range(5)])
    moved, bad = Outcome("moved"), Outcome("quarantined", words="exit 1")
    made = ledger.write(
        FENCE,
        [
            Change(row("/in/1"), row("/in/1", state="failed"), 3.0),
            Change(row("/in/0"), row("/in/0", state="done"), outcome=DONE),
            Change(row("/in/2", attempts=9), row("/in/2", state="done"), outcome=DONE),
            Change(row("/in/3"), None, outcome=moved),
            Change(row("/in/4"), None),
            Change(None, row("/in/new", state="quarantined"), outcome=bad),
        ],
    )
    assert made == [True, True, False, True, True, True]
    told = sorted(trail(ledger, "path", "outcome", "size", "mtime", "attempt", "error"))
    time_ = row().mtime
    assert told == [
        ("/in/0", "done", 10, time_, 1, ""),
        ("/in/3", "moved", 10, time_, 1, ""),
        ("/in/new", "quarantined", 10, time_, 1, "exit 1"),
    ]


def test_a_lost_attempt_is_told_of_who_had_it(tables: Tables, ledger: ftpcoord.Database) -> None:
    """Also one that is counted as a failure."""
    ledger.write(FENCE, [Change(None, row("/in/deadly"))])
    tables.set_token("b", 2)
    counted = row("/in/deadly", term=2, state="failed", failures=1)
    assert ledger.write(Fence("g", "b", 2), [Change(row("/in/deadly"), counted, outcome=Outcome("failed"))]) == [True]
    claim = row(term=2, attempts=2, mtime="2026-02-02T10:15:30", size=11)
    assert ledger.write(Fence("g", "b", 2), [Change(row(), claim, outcome=Outcome("lost"))]) == [True]
    assert sorted(trail(ledger, "outcome", "term", "task_id", "attempt", "size", "mtime")) == [
        ("failed", 1, "a", 1, 10, row().mtime),
        ("lost", 1, "a", 1, 10, row().mtime),
    ]


def test_a_write_whose_answer_was_lost_leaves_one_row(ledger: ftpcoord.Database) -> None:
    steps = [Change(row(), row(state="done"), outcome=DONE)]
    assert ledger.write(FENCE, steps) == [True]
    ledger.write(FENCE, steps)
    assert ledger.written(FENCE, steps) == [True]
    assert trail(ledger, "outcome") == ["done"]


@pytest.mark.parametrize("action", ["delete", "move:/in/bäd"])
def test_an_after_action_of_a_quarantined_file_is_told_once_however_often_it_is_written(
    ledger: ftpcoord.Database, action: str
) -> None:
    bad = row(state="quarantined", action=action)
    assert ledger.write(FENCE, [Change(row(), bad, plain=1, outcome=Outcome("quarantined"))]) == [True]
    (found,) = ledger.rows("g")
    assert found == bad
    steps = [Change(found, found._replace(action=""), outcome=Outcome("deleted"))]
    assert ledger.write(FENCE, steps) == [True]
    ledger.write(FENCE, steps)
    assert ledger.written(FENCE, steps) == [True]
    assert trail(ledger, "outcome") == ["quarantined", "deleted"]


def test_a_full_group_has_its_rows_with_few_messages(ledger: ftpcoord.Database) -> None:
    claims = [row(f"/in/{n}") for n in range(64)]
    ledger.write(FENCE, [Change(None, claim) for claim in claims])
    sent: list[str] = []

    def counted(name: str) -> None:
        plain = getattr(ledger, name)
        setattr(ledger, name, lambda *sql: sent.append(name) or plain(*sql))  # type: ignore[func-returns-value]

    counted("_run")
    if ledger.name == "mysql":
        counted("_ask")
    steps = [Change(claim, claim._replace(state="done"), outcome=DONE._replace(seconds=None)) for claim in claims]
    assert ledger.write(FENCE, steps) == [True] * 64
    assert sent.count("_run") == (2 if ledger.name == "mysql" else 1), "what it is without the audit trail"
    assert sent.count("_ask") == (5 if ledger.name == "mysql" else 0)
    assert trail(ledger, "outcome", "seconds") == [("done", None)] * 64


def test_audit_rows_find_their_files_by_key(ledger: ftpcoord.Database, tables: Tables) -> None:
    tables.open().adopt("g", "a", [row(f"/in/{n}") for n in range(20_000)])
    change = Change(row(), row(state="done"), outcome=DONE)
    sql = ledger._bind(ledger.NOTE, {**FENCE._asdict(), "by": "a", "changes": [change] * 64})
    explain = "EXPLAIN QUERY PLAN" if ledger.name == "sqlite" else "EXPLAIN"
    plan = "\n".join(" ".join(map(str, step)) for step in ledger.execute(f"{explain} {sql}"))
    by_key = {
        "postgresql": r"Index Cond: .*group_id\b.* AND .*file_id\b",
        "mysql": r" on l using PRIMARY \(group_id = 'g', file_id = [rv].id\)| l eq_ref PRIMARY .*const,[rv].id",
        "sqlite": r"SEARCH l USING .*\(group_id=\? AND file_id=\?",
    }
    assert re.search(by_key[ledger.name], plan), plan


def test_any_path_has_its_row(ledger: ftpcoord.Database) -> None:
    for path in ODD_PATHS:
        ledger.write(FENCE, [Change(None, row(path))])
        ledger.write(FENCE, [Change(row(path), row(path, state="done"), outcome=DONE)])
    assert set(trail(ledger, "path")) == set(ODD_PATHS)


def test_history_is_read_however_many_pages_it_takes(
    ledger: ftpcoord.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.adopt("g", "a", [row(f"/in/{n}") for n in range(23)])
    for name in ("PAGE_ROWS", "HISTORY"):
        owner, value = (ftpcoord, 7) if name == "PAGE_ROWS" else (type(ledger), ledger.HISTORY.replace("5000", "7"))
        monkeypatch.setattr(owner, name, value)
    assert sorted(trail(ledger, "path")) == sorted(f"/in/{n}" for n in range(23))
    assert list(ledger.history("g", "2999-01-01")) == list(ledger.history("other")) == []


# -- operators --------------------------------------------------------------------------------------------------------


def test_operators_are_named_for_what_they_did(ledger: ftpcoord.Database) -> None:
    ledger.adopt("g", "operator", [row(size=99), row("/in/b", size=7)])
    ledger.adopt("g", "operator", [row("/in/b", size=7)])
    bad = row(state="quarantined", attempts=5)
    ledger.write(FENCE, [Change(row(), bad)])
    ledger.retry("g", bad._replace(state="done"))
    ledger.retry("other", bad)
    assert trail(ledger, "outcome", "path", "size", "task_id") == [("adopted", "/in/b", 7, OPERATOR)]
    ledger.retry("g", bad)
    ledger.retry("g", bad)
    assert trail(ledger, "outcome", "task_id", "attempt", "term")[1:] == [("retried", OPERATOR, 5, 0)]
    assert [r.state for r in rows_of(ledger)] == ["failed", "done"]


# -- what the database refuses ----------------------------------------------------------------------------------------


def test_what_the_audit_table_has_no_room_for_is_kept_in_plain_form(narrow: Database) -> None:
    with contextlib.closing(Tables(narrow)) as tables:
        tables.apply()
        store = tables.open(audit=True)
        store.first("g", "a", 1)
        book = ftpcoord.Ledger(store, "g", "a", ftpcoord.Lease(1, float("inf"), time.monotonic), time.monotonic)
        names = ["a.csv", "b-€.csv", "c-😀.csv", "d-ä%41.csv"]
        for claim in book.claim(works(*names)):
            assert claim is not None
            long = claim._replace(state="failed", error="")
            book.change(claim, long, outcome=Outcome("failed", words="→ 😀" + "x" * 2000))
        assert sorted(trail(store, "path")) == sorted(f"/in/{name}" for name in names)
        store.adopt("g", "a", [row("/in/e-😀.csv")])
        store.retry("g", row("/in/e-😀.csv", state="done", attempts=0))
        assert [r.state for r in rows_of(store)] == ["failed"] * 5
        by, words = 1768212000.0, f"came, but is not done: {', '.join(['/in/' + '😀€' * 2000] * 20)}"
        assert store.alarm(Fence("g", "a", 1), "f" * 64, "missing", "😀-*.csv", by, words)
        ((_, told),) = store.alarms("g", by, "f" * 64).values()
        assert told.startswith("came, but is not done: /in/%F0%9F%98%80%E2%82%AC")


@kinds("postgresql", "sqlite")
def test_a_file_whose_audit_row_is_refused_in_every_form_is_not_done(
    database: Database, files: Files, tmp_path: Path
) -> None:
    with Crew(tmp_path, database, files, audit="on", after="delete") as crew:
        ftpcoord.open_database(ftpcoord.Config(database=database.url, coordination_group="g")).apply_schema()
        if database.name == "sqlite":
            database.execute(
                "CREATE TRIGGER no BEFORE INSERT ON file_audit WHEN NEW.outcome = 'done' "
                "BEGIN SELECT RAISE(ABORT, 'not here'); END"
            )
        else:
            database.execute("ALTER TABLE file_audit ADD CONSTRAINT no CHECK (outcome <> 'done')")
        files.put("a.csv", b"1")
        member = crew.start("a")
        assert "as done" in member.wait("file_quarantined").fields["error"]
        assert crew.states() == {"a.csv": "quarantined"} and files.names() == ["a.csv"]
        assert database.execute("SELECT outcome FROM file_audit") == [("quarantined",)]


# -- a crash at every step --------------------------------------------------------------------------------------------

CRASHING = """
import os, signal, sys
sys.path[:0] = [os.path.dirname(sys.argv[1]), os.path.dirname(sys.argv[1]) + "/tests"]
import ftpcoord
from ftpcoord import Change, Fence, Outcome, Row
url, left, path = sys.argv[2], int(sys.argv[3]), sys.argv[4]
config = ftpcoord.Config(database=url, coordination_group="g", member_id="a", audit=True)
store = ftpcoord.open_database(config)
store.prepare()
def step(plain):
    def counted(*arguments, **more):
        global left
        if left == 0: os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return plain(*arguments, **more)
    return counted
class Connection:
    def __init__(self, real): self.execute = step(real.execute)
    def close(self): pass
if store.name == "sqlite": store.connection = Connection(store.connection)
elif store.name == "mysql": store._ask = step(store._ask)
else: store.connection.run = step(store.connection.run)
def row(n, **more): return Row(f"{path}{n}", 10, "", "claimed", 1, 1, 0)._replace(**more)
store.write(Fence("g", "a", 1), [
    Change(row(0), row(0, state="done"), outcome=Outcome("done")),
    Change(row(1), row(1, state="quarantined"), outcome=Outcome("quarantined")),
    Change(None, row(2, state="quarantined"), outcome=Outcome("quarantined"))])
step(lambda: None)()
"""


def test_no_done_and_no_quarantine_is_without_its_row_nor_with_two_after_a_crash_at_every_step(
    ledger: ftpcoord.Database, tables: Tables, tmp_path: Path
) -> None:
    (tmp_path / "crash.py").write_text(CRASHING)
    made = []
    for steps in range(20):
        path = f"/in/{steps}-"
        claims = [row(f"{path}{n}", mtime="") for n in (0, 1)]
        assert ledger.write(FENCE, [Change(None, claim) for claim in claims]) == [True, True]
        words = [sys.executable, str(tmp_path / "crash.py"), str(MODULE), tables.database.url, str(steps), path]
        code = subprocess.run(words, timeout=60).returncode

        def settled(path: str = path) -> list[str]:
            """Ends in the ledger, each of which has exactly its row."""
            ends = {r.path: r.state for r in ledger.rows("g") if r.path.startswith(path) and r.state != "claimed"}
            told = [one for one in trail(ledger, "path", "outcome") if one[0].startswith(path)]
            assert sorted(told) == sorted(ends.items())
            return sorted(ends)

        made.append(len(wait_for(lambda: [settled()], 5)[0]))
        book = ftpcoord.Ledger(ledger, "g", "a", ftpcoord.Lease(1, float("inf"), time.monotonic), time.monotonic)
        again = [
            Change(claims[0], claims[0]._replace(state="done"), outcome=Outcome("done")),
            Change(claims[1], claims[1]._replace(state="quarantined"), outcome=Outcome("quarantined")),
            Change(None, row(f"{path}2", state="quarantined", mtime=""), outcome=Outcome("quarantined")),
        ]
        assert book.write(again, unknown=True) == [True] * 3
        assert len(settled()) == 3
        if code == 0:
            break
    assert made[0] == 0 and made[-1] == 3 and made == sorted(made)
    assert len(made) >= (4 if ledger.name == "postgresql" else 8)


@kinds("mysql", "mariadb")
def test_a_member_that_stops_inside_its_transaction_does_not_keep_the_token(
    ledger: ftpcoord.Database, tables: Tables
) -> None:
    assert isinstance(ledger, ftpcoord.MySQL)
    last = ledger._ask

    def stopped(sql: str) -> Any:
        if "autocommit = 1" in sql:
            raise KeyboardInterrupt
        return last(sql)

    ledger._ask = stopped  # type: ignore[method-assign]
    ledger.close, close = lambda: None, ledger.close  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        ledger.write(FENCE, [Change(row(), row(state="done"), outcome=DONE)])
    other, began = tables.open(audit=True, member_id="b"), time.monotonic()
    wait_for(lambda: _taken(other), 4.0)
    assert time.monotonic() - began < other.timing.stale_after
    assert [r.state for r in rows_of(other)] == ["claimed"] and trail(other, "outcome") == []
    close()


def _taken(store: ftpcoord.Database) -> bool:
    with contextlib.suppress(ftpcoord.DatabaseBusy):
        return store.take("g", "b", store.look("g", "b"), 0.0, "still") == 2
    return False


# -- retention, privileges, tables ------------------------------------------------------------------------------------


def test_old_rows_go_in_small_steps_and_no_younger_ones(
    ledger: ftpcoord.Database, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(ledger), "TRIM", ledger.TRIM.replace("LIMIT 1000", "LIMIT 2"))
    ledger.adopt("g", "a", [row(f"/in/{n}") for n in range(6)])
    for n in range(5):
        tables.database.execute(f"UPDATE file_audit SET at = '2020-01-0{n + 1} 00:00:00' WHERE path = '/in/{n}'")
    ledger.trim("other", 1)
    for left in (6, 4, 2, 1, 1):
        assert len(trail(ledger, "path")) == left
        ledger.trim("g", 1)
    assert trail(ledger, "path") == ["/in/5"]


@SERVERS
def test_the_table_is_asked_for_with_audit_alone(tables: Tables) -> None:
    tables.database.execute("DROP TABLE file_audit")
    tables.open()
    with pytest.raises(DatabaseRefused) as caught:
        tables.open(audit=True)
    assert str(caught.value).count("CREATE TABLE") == 1
    assert "file_audit" in str(caught.value) and "audit = off" in str(caught.value)
    assert tables.unprepared().apply_schema() == ["file_audit"]
    tables.open(audit=True)


@kinds("postgresql")
def test_insert_and_select_are_enough_for_a_trail_that_is_kept_for_ever(
    ledger: ftpcoord.Database, tables: Tables
) -> None:
    tables.database.execute("ALTER TABLE file_audit OWNER TO postgres", admin=True)
    tables.database.execute("GRANT SELECT, INSERT ON file_audit TO app", admin=True)
    assert ledger.write(FENCE, [Change(row(), row(state="done"), outcome=DONE)]) == [True]
    assert trail(ledger, "outcome") == ["done"]
    with pytest.raises(DatabaseRefused, match="privilege"):
        ledger.trim("g", 1)


def test_audit_needs_a_ledger() -> None:
    with pytest.raises(ConfigError, match=r"^audit: needs ledger = on"):
        ftpcoord.Config(**URL, database="sqlite:///x", audit="on", ledger="off", after="delete")


# -- members ----------------------------------------------------------------------------------------------------------


def history(crew: Crew, *words: str) -> list[dict[str, Any]]:
    done = crew.call("files", "--history", *words, "--json")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_each_attempt_has_its_outcome(database: Database, files: Files, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"audit": "on", "max_attempts": 2, "after": "move:away", "after_error": "delete"}
    with Crew(tmp_path, database, files, **settings) as crew:
        files.put("old.csv", b"0")
        assert crew.call("adopt").returncode == 0
        member = crew.start("a")
        files.put("a.csv", b"1")
        wait_for(lambda: "away" in files.names() or (files.root / "away" / "a.csv").exists())
        wait_for(lambda: [row["outcome"] for row in history(crew, "a.csv")] == ["done", "moved"])
        done, moved = history(crew, "a.csv")
        assert done["sha256"] == SHA == crew.runs()[0].environment["FTPCOORD_SHA256"]
        assert 0 < done["seconds"] < PATIENCE and moved["seconds"] is None
        assert (done["task_id"], done["attempt"], done["group"]) == ("a", 1, "crew")
        crew.fail()
        files.put("bad.csv", b"2")
        member.wait("file_quarantined")
        wait_for(lambda: len(history(crew, "bad.csv")) == 3)
        assert [(row["outcome"], row["attempt"]) for row in history(crew, "bad.csv")] == [
            ("failed", 1),
            ("quarantined", 2),
            ("deleted", 2),
        ]
        assert "no good" in history(crew, "bad.csv")[0]["error"]
        assert crew.call("retry").returncode == 0
        assert member.stop() == 0
        (adopted,) = history(crew, "*old*")
        assert (adopted["outcome"], adopted["task_id"]) == ("adopted", OPERATOR)
        shown = crew.call("files", "--history", "bad.csv", "--since", "2020-01-31T10:15").stdout.splitlines()
        assert len(shown) == 4 and "retried" in shown[3]
        assert history(crew, "--since", "2999-01-01") == []


def test_an_attempt_whose_member_was_killed_is_lost(crew: Crew, files: Files) -> None:
    crew.settings["audit"] = "on"
    crew.hold()
    first = crew.start("a")
    files.put("a.csv", b"1")
    crew.begun(1)
    first.kill()
    crew.let_go()
    second = crew.start("b")
    second.wait("file_done")
    told = [(row["outcome"], row["task_id"], row["attempt"]) for row in history(crew)]
    assert told == [("lost", "a", 1), ("done", "b", 2)]


def test_not_now_writes_no_row(crew: Crew, files: Files) -> None:
    crew.settings.update(audit="on", exec="sh -c 'exit 75'")
    member = crew.start("a", log_level="debug")
    files.put("a.csv", b"1")
    member.wait("not_now")
    assert history(crew) == []


def test_files_delivered_in_groups_have_their_digests(database: Database, files: Files, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with Crew(tmp_path, database, files, exec=None, download_dir=tmp_path / "in", audit="on", settle=0) as crew:
        content = {f"{n}.csv": os.urandom(n * 3000) for n in range(40)}
        for name, data in content.items():
            files.put(name, data)
        assert crew.run("run", "--once").returncode == 0
        told = {os.path.basename(row["path"]): (row["outcome"], row["sha256"]) for row in history(crew)}
        assert told == {name: ("done", hashlib.sha256(data).hexdigest()) for name, data in content.items()}


@pytest.mark.parametrize(
    "words, changes, sentence",
    [
        (["--history", "--since", "yesterday"], {"audit": "on"}, "'yesterday' is no date like"),
        (["--since", "2026-01-31T10:15+01:00"], {"audit": "on"}, "is no date like"),
        (["--since", "2026-02-30"], {"audit": "on"}, "'2026-02-30' is no date like"),
        (["--history", "--since", "2026-01-31T24:00"], {"audit": "on"}, "is no date like"),
        (["--since", "2026-01-31T23:59:60"], {"audit": "on"}, "is no date like"),
        (["--history"], {}, "audit: is off"),
    ],
)
def test_history_says_what_is_wrong(crew: Crew, words: list[str], changes: dict[str, Any], sentence: str) -> None:
    done = crew.call("files", *words, **changes)
    assert done.returncode == 2 and sentence in done.stderr


def test_the_active_member_removes_what_is_older_than_audit_retention(crew: Crew, files: Files) -> None:
    crew.settings["audit"] = "on"
    files.put("a.csv", b"1")
    assert crew.run("run", "--once", audit_retention=0).returncode == 0
    crew.database.execute("UPDATE file_audit SET at = '2020-01-01 00:00:00'")
    kept = crew.start("a", audit_retention=0)
    kept.wait("polled")
    assert kept.stop() == 0 and len(history(crew)) == 1
    crew.start("b", audit_retention=30)
    wait_for(lambda: not history(crew), PATIENCE)


def test_the_queries_that_people_are_given_are_answered(ledger: ftpcoord.Database, tables: Tables) -> None:
    ledger.write(FENCE, [Change(row(), row(state="done"), outcome=DONE)])
    queries = MODULE.with_name("tests").joinpath("site", "audit.sql").read_text()
    queries = queries.replace("'orders'", "'g'").replace("6b86b273ff34...", SHA)
    today = datetime.datetime.now(datetime.timezone.utc).date()
    queries = (
        queries.replace("2026-01-13", "2999-01-01").replace("2026-01-12", str(today)).replace("2026-01-01", str(today))
    )
    answers = [tables.database.execute(query) for query in queries.split(";") if query.strip()]
    assert [len(answer) for answer in answers] == [1, 1, 1]
    assert answers[0][0][1] == "/in/a.csv" and answers[2][0][:3] == ("done", 1, 1.5)


def test_what_was_skipped_has_its_row(ledger: ftpcoord.Database) -> None:
    bad = row(state="quarantined", attempts=5, error="exit 1")
    ledger.write(FENCE, [Change(row(), bad)])
    for other in (bad._replace(size=11), bad._replace(mtime=""), bad._replace(attempts=4), bad._replace(state="done")):
        ledger.skip("g", other)
    assert trail(ledger, "outcome") == []
    ledger.skip("g", bad)
    assert [r.state for r in rows_of(ledger)] == ["done"]
    assert trail(ledger, "outcome", "task_id", "attempt") == [("skipped", OPERATOR, 5)]
