"""Two sessions, one with its transaction held open by hand: a renewal and a takeover never both succeed.

The statements are the program's own. A negative control shows the pair of statements that looks right and is not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from typing import Any, Callable, Optional

import pytest
from conftest import Database, wait_for
from test_dialects import FENCE, Tables, row

import ftpcoord
from ftpcoord import Change, DatabaseDown, Fence

SQL_SERVERS = pytest.mark.parametrize("database", ["postgresql", "mysql", "mariadb"], indirect=True)
LEVELS = pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ"])


class Session:
    """A transaction of a given isolation level, held open until `commit` or `rollback`."""

    def __init__(self, tables: Tables, level: str) -> None:
        self.database, self.store = tables.database, tables.open()
        self.connection = tables.database.connect(timeout=30)
        self.postgres, self.level = tables.database.name == "postgresql", level
        self.outcome: Optional[str] = None
        self._thread: Optional[threading.Thread] = None
        self.begin()

    def begin(self) -> None:
        """A new transaction. Its first statement fixes the snapshot of REPEATABLE READ, before anybody writes."""
        cursor = self._cursor()
        if self.postgres:
            self.connection.rollback()
            self.connection.autocommit = False
            cursor.execute(f"SET TRANSACTION ISOLATION LEVEL {self.level}")
        else:
            cursor.execute(f"SET SESSION TRANSACTION ISOLATION LEVEL {self.level}")
            self.connection.begin()
        cursor.execute("SELECT COUNT(*) FROM token_holder")
        cursor.fetchall()

    def _cursor(self) -> Any:
        return self.connection.cursor()

    def run(self, sql: str, changes: Sequence[Change] = (), **values: object) -> str:
        """ "won", "lost", or "conflict" if the database wants it to be tried again."""
        cursor = self._cursor()
        try:
            cursor.execute(self.store._bind(sql, {"group": "g", "stamp": None, "changes": list(changes), **values}))
        except Exception as exc:
            if isinstance(self.store._error(exc), ftpcoord.DatabaseBusy):
                self.rollback()
                return "conflict"
            raise
        if cursor.description is not None:
            return "won" if any(cursor.fetchall()) else "lost"  # rows that were only locked are empty
        if "file_ledger" in sql or "LAST_INSERT_ID" not in sql:
            return "won" if cursor.rowcount > 0 else "lost"
        return "won" if cursor.lastrowid else "lost"

    def renew(self, member: str = "a", term: int = 1) -> str:
        return self.run(self.store.RENEW, member=member, term=term, request="step-down:1")

    def take(self, member: str = "b", holder: str = "a", term: int = 1) -> str:
        stamps = {row.member_id: row.stamp for row in self.store.members("g")}
        values: dict[str, Any] = {"stale_after": 4, "aged": 1, "stamp": stamps[holder]}
        return self.run(self.store.TAKE, member=member, holder=holder, old_term=term, **values)

    def write(self, change: Change, fence: Fence = FENCE) -> str:
        sql = self.store.CLAIM if change.old is None else self.store.CHANGE if change.new else self.store.FORGET
        return self.run(sql, [change], member=fence.member, term=fence.term)

    def start(self, statement: Callable[[], str]) -> None:
        """Runs a statement in a thread, until it waits for a lock that another session holds."""

        def work() -> None:
            self.outcome = statement()

        self._thread = threading.Thread(target=work)
        self._thread.start()
        wait_for(self._blocked, 10, "the second session to wait for the first")

    def _blocked(self) -> bool:
        assert self.outcome is None, f"it did not wait but {self.outcome}"
        if self.postgres:
            sql = """
                SELECT COUNT(*) FROM pg_stat_activity
                 WHERE datname = current_database() AND wait_event_type = 'Lock'"""
        else:
            time.sleep(0.12)  # InnoDB shows what it showed before to whoever asks again within a tenth of a second
            sql = "SELECT COUNT(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'"
        return bool(self.database.execute(sql, admin=True)[0][0])

    def finish(self) -> str:
        """The outcome of the statement that was started; its transaction is committed."""
        assert self._thread is not None
        self._thread.join(20)
        assert self.outcome is not None, "it waits for ever"
        self.commit()
        return self.outcome

    def commit(self) -> None:
        self.connection.commit()

    def rollback(self) -> None:
        self.connection.rollback()

    def close(self) -> None:
        with suppress(Exception):
            self.connection.rollback()
        with suppress(Exception):
            self.connection.close()


class Two:
    """The holder a of term 1, whose heartbeat is stale, and two sessions: one for it and one for b."""

    def __init__(self, tables: Tables, level: str) -> None:
        self.tables = tables
        store = tables.open()
        assert store.first("g", "a", 1) == 1
        assert store.write(FENCE, [Change(None, row())]) == [True]
        tables.set_heartbeat("a", 100)
        tables.set_heartbeat("b", 0)
        self.first, self.second = Session(tables, level), Session(tables, level)
        self.postgres, self.level = self.first.postgres, level

    def lost(self) -> tuple[str, ...]:
        """How a loser learns it. PostgreSQL cannot look anew under REPEATABLE READ: it says so."""
        return ("conflict",) if self.postgres and self.level == "REPEATABLE READ" else ("lost",)

    def close(self) -> None:
        self.first.close()
        self.second.close()


@pytest.fixture
def two(database: Database, level: str) -> Iterator[Two]:
    with closing(Tables(database)) as tables:
        tables.apply()
        with closing(Two(tables, level)) as two:
            yield two


# -- the election -----------------------------------------------------------------------------------------------------


@SQL_SERVERS
@LEVELS
def test_a_takeover_waits_for_a_renewal_and_then_loses(two: Two) -> None:
    assert two.first.renew() == "won"
    two.second.start(two.second.take)
    two.first.commit()
    assert two.second.finish() in two.lost()
    assert two.tables.token() == ("a", 1)


@SQL_SERVERS
@LEVELS
def test_a_renewal_waits_for_a_takeover_and_then_loses(two: Two) -> None:
    assert two.first.take() == "won"
    two.second.start(two.second.renew)
    two.first.commit()
    assert two.second.finish() in two.lost()
    assert two.tables.token() == ("b", 2)


@SQL_SERVERS
@LEVELS
def test_a_renewal_succeeds_when_the_takeover_that_it_waited_for_is_undone(two: Two) -> None:
    assert two.first.take() == "won"
    two.second.start(two.second.renew)
    two.first.rollback()
    assert two.second.finish() == "won"
    assert two.tables.token() == ("a", 1)


@SQL_SERVERS
@LEVELS
def test_a_takeover_succeeds_when_the_renewal_that_it_waited_for_is_undone(two: Two) -> None:
    assert two.first.renew() == "won"
    two.second.start(two.second.take)
    two.first.rollback()
    assert two.second.finish() == "won"
    assert two.tables.token() == ("b", 2)


@SQL_SERVERS
@LEVELS
def test_of_two_takeovers_one_waits_and_loses(two: Two) -> None:
    assert two.first.take("b") == "won"
    two.second.start(lambda: two.second.take("c"))
    two.first.commit()
    assert two.second.finish() in two.lost()
    assert two.tables.token() == ("b", 2)


@SQL_SERVERS
@LEVELS
def test_of_two_claims_of_an_absent_holder_one_waits_and_loses(two: Two) -> None:
    two.tables.database.execute("DELETE FROM health_check WHERE task_id = 'a'")
    two.first.begin()
    two.second.begin()
    values: dict[str, Any] = {"holder": "a", "old_term": 1, "own": 0}
    first, second = two.first, two.second
    assert first.run(first.store.TAKE_ABSENT, member="b", **values) == "won"
    second.start(lambda: second.run(second.store.TAKE_ABSENT, member="c", **values))
    first.commit()
    assert second.finish() in two.lost()
    assert two.tables.token() == ("b", 2)


@SQL_SERVERS
@LEVELS
def test_a_takeover_waits_for_a_release_and_wins_once_it_has_seen_it(two: Two) -> None:
    assert two.first.run(two.first.store.RELEASE, member="a", term=1, request="") in ("won", "lost")
    two.second.start(two.second.take)
    two.first.commit()
    assert two.second.finish() in ("lost", "conflict"), "the stamp is not the one that was seen"
    two.second.begin()
    assert two.second.take() == "won"
    two.second.commit()
    assert two.tables.token() == ("b", 2)


@SQL_SERVERS
@LEVELS
def test_a_takeover_waits_for_the_heartbeat_of_the_row_that_it_tests(two: Two) -> None:
    """Somebody who locks the health row alone, the reference implementation for one."""
    cursor = two.first.connection.cursor()
    now = "CURRENT_TIMESTAMP AT TIME ZONE 'UTC'" if two.postgres else "UTC_TIMESTAMP(6)"
    cursor.execute(f"UPDATE health_check SET last_heartbeat = {now} WHERE group_id = 'g' AND task_id = 'a'")
    two.second.start(two.second.take)
    two.first.commit()
    assert two.second.finish() in two.lost()
    assert two.tables.token() == ("a", 1)


# -- the ledger -------------------------------------------------------------------------------------------------------

DONE = Change(row(), row(state="done"))
WRITES = pytest.mark.parametrize(
    "change", [DONE, Change(None, row("/in/b")), Change(row(), None)], ids=["done", "claim", "removal"]
)


@SQL_SERVERS
@LEVELS
@WRITES
def test_a_takeover_waits_for_a_write_under_the_old_term_and_then_wins(two: Two, change: Change) -> None:
    """So the new active member reads all that the old one has committed."""
    assert two.first.write(change) == "won"
    two.second.start(two.second.take)
    two.first.commit()
    outcome = two.second.finish()
    if outcome == "conflict":
        outcome = two.second.take()
        two.second.commit()
    assert outcome == "won"
    assert two.tables.token() == ("b", 2)


@SQL_SERVERS
@LEVELS
@WRITES
def test_a_write_waits_for_a_takeover_and_then_changes_nothing(two: Two, change: Change) -> None:
    assert two.first.take() == "won"
    two.second.start(lambda: two.second.write(change))
    two.first.commit()
    two.second.finish()
    store = two.tables.open()
    assert list(store.rows("g")) == [row()], "a deposed member wrote"
    assert store.write(FENCE, [change]) == [False]
    assert list(store.rows("g")) == [row()]


@SQL_SERVERS
@LEVELS
def test_a_takeover_undone_lets_the_write_succeed(two: Two) -> None:
    assert two.first.take() == "won"
    two.second.start(lambda: two.second.write(DONE))
    two.first.rollback()
    assert two.second.finish() == "won"
    assert [r.state for r in two.tables.open().rows("g")] == ["done"]


# -- the negative control ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
@LEVELS
def test_the_pair_of_statements_that_looks_right_lets_both_succeed(two: Two) -> None:
    """Each tests the row that the other one writes, without locking it. This is what the tests above must notice."""
    now = "(CURRENT_TIMESTAMP AT TIME ZONE 'UTC')"
    first, second = two.first, two.second
    renewed = first.run(f"""
        UPDATE health_check SET last_heartbeat = {now} WHERE group_id = 'g' AND task_id = 'a'
           AND EXISTS (SELECT 1 FROM token_holder WHERE group_id = 'g' AND task_id = 'a' AND term = 1)
        RETURNING 1""")
    taken = second.run(f"""
        UPDATE token_holder SET task_id = 'b', term = term + 1 WHERE group_id = 'g' AND task_id = 'a' AND term = 1
           AND NOT EXISTS (SELECT 1 FROM health_check WHERE group_id = 'g' AND task_id = 'a'
                            AND last_heartbeat >= {now} - interval '4 seconds')
        RETURNING term""")
    first.commit()
    second.commit()
    assert (renewed, taken) == ("won", "won")


# -- many at once -----------------------------------------------------------------------------------------------------


def test_each_term_is_won_once_and_written_under_by_its_winner_alone(database: Database) -> None:
    """All verbs of five members at once, without any order: whoever is deposed writes nothing more."""
    members = "abcde"
    with closing(Tables(database)) as tables:
        tables.apply()
        end = time.monotonic() + 1.5
        latest = end + 30
        won: list[tuple[int, str]] = []
        problems: list[str] = []

        def live(member: str, store: ftpcoord.Database) -> None:
            term = 0
            number = 0
            while time.monotonic() < (end if len(won) > 3 else latest):
                with suppress(DatabaseDown):
                    view = store.look("g", member)
                    if view.holder is None:
                        taken = store.first("g", member, 1)
                    elif view.term == term:
                        taken = None
                        store.renew("g", member, term)
                    else:
                        taken = store.take("g", member, view, 0, "stale")
                    if taken is not None:
                        term = taken
                        won.append((term, member))
                    number += 1
                    claim = row(f"/in/{member}{number}", term=term)
                    if store.write(Fence("g", member, term), [Change(None, claim)]) == [True]:
                        store.write(Fence("g", member, term), [Change(claim, claim._replace(state="done"))])

        def safely(member: str, store: ftpcoord.Database) -> None:
            try:
                live(member, store)
            except BaseException as exc:
                problems.append(repr(exc))

        threads = [threading.Thread(target=safely, args=(member, tables.open())) for member in members]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not problems
        terms = [term for term, _ in won]
        assert len(terms) == len(set(terms)), "a term was won twice"
        assert len(terms) > 3, "too little happened to prove anything"
        winner = dict(won)
        found = database.execute("SELECT term, task_id FROM file_ledger")
        assert found, "nothing was written"
        assert {(term, member) for term, member in found} <= set(winner.items())
