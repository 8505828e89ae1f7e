"""One conformance suite that every database dialect passes unchanged.

The election's part also runs on tables made by the documentation of the WSO2 Integrator, whose MySQL column keeps
whole seconds.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import pytest
from conftest import Database, wait_for

import ftpcoord
from ftpcoord import Change, Config, DatabaseBusy, DatabaseDown, DatabaseRefused, Fence, Row, View

# As the documentation of the WSO2 Integrator gives them.
WSO2 = """
    CREATE TABLE IF NOT EXISTS token_holder (
        group_id VARCHAR(128) NOT NULL PRIMARY KEY, task_id VARCHAR(128) NOT NULL, term BIGINT NOT NULL DEFAULT 1);
    CREATE TABLE IF NOT EXISTS health_check (
        task_id VARCHAR(128) NOT NULL, group_id VARCHAR(128) NOT NULL, last_heartbeat {type} NOT NULL,
        PRIMARY KEY (task_id, group_id))"""

RELEASED = datetime.datetime(1970, 1, 1, 0, 0, 1)


def tables_of(store: ftpcoord.Database) -> set[str]:
    return {row[0] for row in store.execute(store.FOUND_TABLES)}


class Tables:
    """One database's tables, connections to them, and what a test does to the rows behind the program's back."""

    heartbeat, liveness = 0.5, 6.0  # S = 5 s, or 4 s where the column keeps whole seconds

    def __init__(self, database: Database) -> None:
        self.database = database
        self._opened: list[ftpcoord.Database] = []
        self._quantum: Optional[float] = None

    def config(self, **settings: Any) -> Config:
        values: dict[str, Any] = {
            "database": self.database.url,
            "database_tls": "disable",
            "coordination_group": "g",
            "member_id": "a",
            "heartbeat_frequency": self.heartbeat,
            "liveness_check_interval": self.liveness,
        }
        if self.database.name == "sqlite":
            del values["database_tls"]
        return Config(**{**values, **settings})

    def unprepared(self, **settings: Any) -> ftpcoord.Database:
        store = ftpcoord.open_database(self.config(**settings))
        self._opened.append(store)
        return store

    def open(self, **settings: Any) -> ftpcoord.Database:
        store = self.unprepared(**settings)
        store.prepare()
        return store

    def apply(self) -> None:
        self.unprepared().apply_schema()

    def apply_wso2(self) -> None:
        mysql = self.database.name in ("mysql", "mariadb")
        for statement in WSO2.format(type="DATETIME" if mysql else "TIMESTAMP").split(";"):
            self.database.execute(statement)

    def close(self) -> None:
        for store in self._opened:
            store.close()

    @property
    def quantum(self) -> float:
        """The step of the heartbeat column in seconds."""
        if self._quantum is None:
            self._quantum = 1.0 if self.open().timing.whole_seconds else 0.001
        return self._quantum

    def earliest(self, sent: float) -> float:
        """The oldest stamp that a statement sent then may leave: the column cuts off what it does not keep."""
        return math.floor(sent) if self.quantum == 1 else sent - 0.001

    def set_heartbeat(self, member: str, seconds_ago: float, group: str = "g") -> None:
        """Writes a member's heartbeat as of so long ago (below zero: in the future)."""
        moment = datetime.datetime.fromtimestamp(time.time() - seconds_ago, datetime.timezone.utc)
        stamp = moment.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
        if self.quantum == 1:
            stamp = stamp[:-4]
        where = f"task_id = '{member}' AND group_id = '{group}'"
        with contextlib.closing(self.database.connect()) as connection:
            cursor = connection.cursor()
            cursor.execute(f"DELETE FROM health_check WHERE {where}")
            cursor.execute(f"INSERT INTO health_check VALUES ('{member}', '{group}', '{stamp}')")

    def set_token(self, member: str, term: int, group: str = "g") -> None:
        self.database.execute(f"DELETE FROM token_holder WHERE group_id = '{group}'")
        self.database.execute(f"INSERT INTO token_holder VALUES ('{group}', '{member}', {term})")

    def heartbeat_of(self, member: str, group: str = "g") -> Optional[float]:
        """The stored heartbeat in epoch seconds, None without a row."""
        found = self.database.execute(
            f"SELECT last_heartbeat FROM health_check WHERE task_id = '{member}' AND group_id = '{group}'"
        )
        if not found:
            return None
        value = found[0][0]
        moment = datetime.datetime.fromisoformat(value) if isinstance(value, str) else value
        assert isinstance(moment, datetime.datetime)
        return moment.replace(tzinfo=datetime.timezone.utc).timestamp()

    def released(self, member: str) -> bool:
        return self.heartbeat_of(member) == RELEASED.replace(tzinfo=datetime.timezone.utc).timestamp()

    def token(self, group: str = "g") -> Optional[tuple[str, int]]:
        found = self.database.execute(f"SELECT task_id, term FROM token_holder WHERE group_id = '{group}'")
        return (found[0][0], found[0][1]) if found else None


@pytest.fixture
def bare(database: Database) -> Iterator[Tables]:
    """A database without tables (SQLite makes them itself)."""
    with contextlib.closing(Tables(database)) as tables:
        yield tables


@pytest.fixture
def tables(bare: Tables) -> Tables:
    """The program's own tables."""
    bare.apply()
    return bare


@pytest.fixture(params=["own", "wso2"])
def shared(request: pytest.FixtureRequest, bare: Tables) -> Tables:
    """The program's own tables, and the two of the WSO2 Integrator with our ledger beside them."""
    if request.param == "wso2":
        bare.apply_wso2()
    bare.apply()
    return bare


@pytest.fixture
def store(shared: Tables) -> ftpcoord.Database:
    return shared.open()


def holding(tables: Tables, store: ftpcoord.Database, member: str = "a", term: int = 1) -> View:
    """`member` has won; what a standby sees."""
    assert store.first("g", member, term) == term
    view = store.look("g", "standby")
    assert (view.holder, view.term) == (member, term)
    return view


# -- look -------------------------------------------------------------------------------------------------------------


def test_the_first_look_shows_an_empty_group_and_leaves_a_heartbeat(shared: Tables, store: ftpcoord.Database) -> None:
    before = time.time()
    view = store.look("g", "a")
    assert (view.holder, view.term, view.mine, view.stamp, view.age) == (None, 0, False, None, None)
    assert before - 0.01 <= view.now <= time.time() + 0.01
    assert view.took > 0
    assert (shared.heartbeat_of("a") or 0) >= shared.earliest(before)


def test_a_look_shows_the_holder_its_term_and_the_age_of_its_heartbeat(
    shared: Tables, store: ftpcoord.Database
) -> None:
    shared.set_token("holder", 7)
    shared.set_heartbeat("holder", 100)
    view = store.look("g", "a")
    assert (view.holder, view.term, view.mine) == ("holder", 7, False)
    assert view.stamp
    assert view.age is not None
    assert 100 - shared.quantum <= view.age <= 110


def test_a_heartbeat_from_the_future_has_an_age_below_zero(shared: Tables, store: ftpcoord.Database) -> None:
    shared.set_token("holder", 7)
    shared.set_heartbeat("holder", -3600)
    view = store.look("g", "a")
    assert view.age is not None
    assert -3602 < view.age < -3500


def test_a_holder_without_health_row_has_neither_stamp_nor_age(shared: Tables, store: ftpcoord.Database) -> None:
    shared.set_token("holder", 7)
    view = store.look("g", "a")
    assert (view.holder, view.term, view.stamp, view.age) == ("holder", 7, None, None)


def test_a_standby_does_not_beat_under_the_holders_id(shared: Tables, store: ftpcoord.Database) -> None:
    shared.set_token("a", 3)
    assert store.look("g", "a").mine
    assert shared.heartbeat_of("a") is None
    shared.set_heartbeat("a", 50)
    before = shared.heartbeat_of("a")
    assert store.look("g", "a").mine
    assert shared.heartbeat_of("a") == before


def test_a_standbys_heartbeat_never_moves_back(shared: Tables, store: ftpcoord.Database) -> None:
    shared.set_heartbeat("a", -100)
    future = shared.heartbeat_of("a")
    store.look("g", "a")
    assert shared.heartbeat_of("a") == future
    shared.set_heartbeat("a", 100)
    past = shared.heartbeat_of("a")
    store.look("g", "a")
    assert (shared.heartbeat_of("a") or 0) > (past or 0) + 90


# -- first ------------------------------------------------------------------------------------------------------------


def test_a_vacant_group_is_won_once_with_the_given_term(shared: Tables, store: ftpcoord.Database) -> None:
    other = shared.open()
    assert store.first("g", "a", 42) == 42
    assert other.first("g", "b", 43) is None
    assert shared.token() == ("a", 42)
    assert shared.heartbeat_of("a") is not None
    assert store.renew("g", "a", 42).held


def test_two_members_of_one_id_cannot_both_win_a_vacant_group(shared: Tables, store: ftpcoord.Database) -> None:
    assert store.first("g", "a", 1) == 1
    assert shared.open().first("g", "a", 1) is None


def test_winning_a_vacant_group_overwrites_an_old_heartbeat(shared: Tables, store: ftpcoord.Database) -> None:
    shared.set_heartbeat("a", 1000)
    before = time.time()
    assert store.first("g", "a", 1) == 1
    assert (shared.heartbeat_of("a") or 0) >= shared.earliest(before)


def test_losing_a_vacant_group_keeps_the_connection(shared: Tables, store: ftpcoord.Database) -> None:
    store.first("g", "a", 1)
    connection = store.connection
    assert store.first("g", "b", 1) is None
    assert store.connection is connection


def nullable(tables: Tables) -> None:
    """The foreign column allows NULL."""
    name = tables.database.name
    if name == "sqlite":
        tables.database.execute("DROP TABLE IF EXISTS h; ")
        tables.database.execute(
            "CREATE TABLE h (task_id VARCHAR(128), group_id VARCHAR(128), last_heartbeat TIMESTAMP,"
            " PRIMARY KEY (task_id, group_id))"
        )
        for statement in (
            "INSERT INTO h SELECT * FROM health_check",
            "DROP TABLE health_check",
            "ALTER TABLE h RENAME TO health_check",
        ):
            tables.database.execute(statement)
    elif name == "postgresql":
        tables.database.execute("ALTER TABLE health_check ALTER COLUMN last_heartbeat DROP NOT NULL")
    else:
        kind = "DATETIME" if tables.quantum == 1 else "DATETIME(6)"
        tables.database.execute(f"ALTER TABLE health_check MODIFY last_heartbeat {kind} NULL")


# -- take -------------------------------------------------------------------------------------------------------------


def test_a_stale_holder_is_replaced_under_the_next_term(shared: Tables, store: ftpcoord.Database) -> None:
    holding(shared, store, term=5)
    shared.set_heartbeat("a", 100)
    view = store.look("g", "b")
    before = time.time()
    assert store.take("g", "b", view, store.timing.stale_after, "stale") == 6
    assert shared.token() == ("b", 6)
    assert (shared.heartbeat_of("b") or 0) >= shared.earliest(before)
    assert store.renew("g", "b", 6).held
    assert not store.renew("g", "a", 5).held


def test_a_fresh_holder_is_not_replaced_whatever_the_view_says(shared: Tables, store: ftpcoord.Database) -> None:
    view = holding(shared, store)
    assert store.take("g", "b", view._replace(age=9999.0), store.timing.stale_after, "stale") is None
    assert shared.token() == ("a", 1)


def test_staleness_begins_after_s_and_not_before(shared: Tables, store: ftpcoord.Database) -> None:
    view = holding(shared, store)
    stale_after = store.timing.stale_after
    shared.set_heartbeat("a", stale_after - 0.9)
    view = store.look("g", "b")
    assert store.take("g", "b", view, stale_after, "stale") is None
    shared.set_heartbeat("a", stale_after + shared.quantum + 0.01)
    assert store.take("g", "b", view, stale_after, "stale") is None, "not the stamp that was seen"
    view = store.look("g", "b")
    assert store.take("g", "b", view, stale_after, "stale") == 2


def test_a_holder_that_renewed_after_the_look_is_not_replaced(shared: Tables, store: ftpcoord.Database) -> None:
    holding(shared, store)
    shared.set_heartbeat("a", 100)
    view = store.look("g", "b")
    assert store.renew("g", "a", 1).held
    assert store.take("g", "b", view, store.timing.stale_after, "stale") is None
    assert store.take("g", "b", view, store.timing.stale_after, "still") is None


def test_a_takeover_needs_holder_and_term_to_be_as_seen(shared: Tables, store: ftpcoord.Database) -> None:
    for why in ("absent", "stale", "still", "own"):
        shared.set_token("a", 5)
        if why != "absent":
            shared.set_heartbeat("a", 100)
            shared.set_heartbeat("c", 100)
        view = store.look("g", "b")
        for other in (view._replace(term=4), view._replace(term=6), view._replace(holder="c")):
            assert store.take("g", "b", other, 4, why) is None, why
            assert shared.token() == ("a", 5)
        assert store.take("g", "b", view, 4, why) == 6, why


def test_a_takeover_happens_once(shared: Tables, store: ftpcoord.Database) -> None:
    holding(shared, store)
    shared.set_heartbeat("a", 100)
    view = store.look("g", "b")
    assert store.take("g", "b", view, 4, "stale") == 2
    assert shared.open().take("g", "c", view, 4, "stale") is None
    assert store.take("g", "b", view, 4, "stale") is None
    assert shared.token() == ("b", 2)


def test_a_stamp_that_stands_still_is_taken_over_though_it_lies_in_the_future(
    shared: Tables, store: ftpcoord.Database
) -> None:
    holding(shared, store)
    shared.set_heartbeat("a", -3600)
    view = store.look("g", "b")
    assert store.take("g", "b", view, 4, "stale") is None
    assert store.take("g", "b", view, 4, "still") == 2
    assert store.renew("g", "b", 2).held


def test_a_stamp_that_has_moved_is_not_taken_for_a_still_one(shared: Tables, store: ftpcoord.Database) -> None:
    holding(shared, store)
    shared.set_heartbeat("a", -3600)
    view = store.look("g", "b")
    store.renew("g", "a", 1)
    assert store.take("g", "b", view, 4, "still") is None
    assert shared.token() == ("a", 1)


def test_a_holder_without_health_row_is_replaced_only_while_it_has_none(
    shared: Tables, store: ftpcoord.Database
) -> None:
    shared.set_token("a", 5)
    view = store.look("g", "b")
    shared.set_heartbeat("a", 0)
    assert store.take("g", "b", view, 4, "absent") is None
    shared.database.execute("DELETE FROM health_check WHERE task_id = 'a'")
    assert store.take("g", "b", view, 4, "absent") == 6
    assert store.renew("g", "b", 6).held


def test_an_own_lost_term_is_taken_again_though_its_heartbeat_is_fresh(
    shared: Tables, store: ftpcoord.Database
) -> None:
    holding(shared, store)
    view = store.look("g", "a")
    assert store.take("g", "a", view, 4, "own") == 2
    assert shared.token() == ("a", 2)
    assert not store.renew("g", "a", 1).held
    assert store.renew("g", "a", 2).held


def test_a_previous_run_under_the_own_id_is_replaced_when_stale(shared: Tables, store: ftpcoord.Database) -> None:
    holding(shared, store)
    shared.set_heartbeat("a", 100)
    view = store.look("g", "a")
    before = time.time()
    assert store.take("g", "a", view, 4, "stale") == 2
    assert (shared.heartbeat_of("a") or 0) >= shared.earliest(before)


# -- renew ------------------------------------------------------------------------------------------------------------


def test_only_the_holder_renews_and_only_under_its_own_term(shared: Tables, store: ftpcoord.Database) -> None:
    holding(shared, store, term=5)
    shared.set_heartbeat("a", 50)
    before = shared.heartbeat_of("a")
    for group, member, term in (("g", "a", 4), ("g", "a", 6), ("g", "b", 5), ("other", "a", 5), ("g", "a", 11)):
        assert not store.renew(group, member, term).held
    assert shared.heartbeat_of("a") == before
    assert store.renew("g", "a", 5).held
    assert (shared.heartbeat_of("a") or 0) > (before or 0)


def test_a_holder_whose_health_row_was_removed_is_told_that_it_holds_nothing(
    shared: Tables, store: ftpcoord.Database
) -> None:
    holding(shared, store)
    shared.database.execute("DELETE FROM health_check WHERE task_id = 'a'")
    assert not store.renew("g", "a", 1).held


def test_a_renewal_moves_the_stamp_even_when_the_stored_one_lies_in_the_future(
    shared: Tables, store: ftpcoord.Database
) -> None:
    holding(shared, store)
    shared.set_heartbeat("a", -3600)
    stamps = [shared.heartbeat_of("a") or 0]
    for _ in range(3):
        assert store.renew("g", "a", 1).held
        stamps.append(shared.heartbeat_of("a") or 0)
    assert stamps == sorted(set(stamps)), "a stamp stood still or moved back"
    assert stamps[-1] - stamps[0] < 10, "the future must not run away"


def test_a_renewal_learns_of_a_request_to_step_down_of_its_own_term(shared: Tables, store: ftpcoord.Database) -> None:
    holding(shared, store, term=5)
    operator = shared.open()
    assert store.renew("g", "a", 5) == (True, False)
    operator.ask("g", "step-down:4")
    operator.ask("g", "step-down:15")
    operator.ask("other", "step-down:5")
    assert store.renew("g", "a", 5) == (True, False)
    operator.ask("g", "step-down:5")
    operator.ask("g", "step-down:5")
    assert store.renew("g", "a", 5) == (True, True)


def test_a_stamp_is_never_older_than_the_moment_of_sending(shared: Tables, store: ftpcoord.Database) -> None:
    """That is what the lease's deadline stands on."""
    shared.set_token("b", 1, group="take")
    shared.set_heartbeat("b", 100, group="take")
    view = store.look("take", "x")
    store.first("renew", "a", 1)
    verbs: dict[str, Callable[[], object]] = {
        "look": lambda: store.look("look", "a"),
        "first": lambda: store.first("first", "a", 1),
        "take": lambda: store.take("take", "a", view, 4, "stale"),
        "renew": lambda: store.renew("renew", "a", 1).held,
    }
    for verb, call in verbs.items():
        store.members(verb)  # whatever a transaction opened by this has to say about the present time
        time.sleep(0.05)
        sent = time.time()
        assert call(), verb
        assert shared.earliest(sent) <= (shared.heartbeat_of("a", verb) or 0) <= time.time() + 0.001, verb


# -- release, leave, sweep --------------------------------------------------------------------------------------------


def test_a_released_lease_is_taken_at_once_under_the_next_term(shared: Tables, store: ftpcoord.Database) -> None:
    holding(shared, store, term=3)
    store.release("g", "a", 3)
    assert shared.token() == ("a", 3), "the token row stays: terms must not restart"
    view = store.look("g", "b")
    assert view.released
    assert [(m.member_id, m.released) for m in store.members("g")] == [("a", True), ("b", False), ("standby", False)]
    assert store.take("g", "b", view, store.timing.stale_after, "released") == 4


def test_only_the_holder_releases_and_only_its_own_term(shared: Tables, store: ftpcoord.Database) -> None:
    holding(shared, store, term=3)
    for group, member, term in (("g", "a", 2), ("g", "b", 3), ("other", "a", 3)):
        store.release(group, member, term)
        assert not shared.released("a")
    store.release("g", "a", 3)
    assert shared.released("a")


def test_a_member_that_released_can_win_again(shared: Tables, store: ftpcoord.Database) -> None:
    holding(shared, store)
    store.release("g", "a", 1)
    assert store.take("g", "a", store.look("g", "a"), 4, "released") == 2
    assert not shared.released("a")


def test_a_release_is_its_exact_stamp_and_no_other_old_one(shared: Tables, store: ftpcoord.Database) -> None:
    holding(shared, store)
    for stamp in ("1970-01-01 00:00:02", "1971-01-01 00:00:00"):
        shared.database.execute(f"UPDATE health_check SET last_heartbeat = '{stamp}' WHERE task_id = 'a'")
        assert not store.look("g", "b").released
        assert not next(row for row in store.members("g") if row.member_id == "a").released


def test_a_takeover_of_a_released_lease_needs_it_to_be_released_still(shared: Tables, store: ftpcoord.Database) -> None:
    holding(shared, store)
    store.release("g", "a", 1)
    view = store.look("g", "b")
    shared.set_heartbeat("a", 3600)
    assert store.take("g", "b", view, 4, "released") is None


def test_a_heartbeat_of_null_has_no_age_and_is_one_that_does_not_move(shared: Tables, store: ftpcoord.Database) -> None:
    holding(shared, store)
    nullable(shared)
    shared.database.execute("UPDATE health_check SET last_heartbeat = NULL")
    view = store.look("g", "b")
    assert (view.holder, view.stamp, view.age, view.released) == ("a", "", None, False)
    rows = {row.member_id: row for row in store.members("g")}
    assert rows["a"].stamp == ""
    assert rows["a"].age > 86400
    assert rows["b"].stamp, "the own beat replaces a NULL"
    assert store.take("g", "b", view, 4, "absent") is None, "there is a row"
    assert store.take("g", "b", view, 4, "stale") is None
    assert store.take("g", "b", view, 4, "still") == 2
    assert store.renew("g", "b", 2).held


def test_a_heartbeat_of_null_cannot_be_renewed_and_its_holder_wins_a_new_term_at_once(
    shared: Tables, store: ftpcoord.Database
) -> None:
    holding(shared, store)
    nullable(shared)
    shared.database.execute("UPDATE health_check SET last_heartbeat = NULL")
    view = store.look("g", "b")
    assert not store.renew("g", "a", 1).held, "a late one would leave a time older than the one that was lost"
    assert store.look("g", "b").age is None
    assert store.take("g", "a", store.look("g", "a"), 4, "own") == 2
    assert store.renew("g", "a", 2).held
    assert store.take("g", "b", view, 4, "still") is None
    assert store.look("g", "b").age is not None


def test_a_first_term_that_is_to_be_timed_is_so_at_the_moment_of_the_claim(
    shared: Tables, store: ftpcoord.Database
) -> None:
    seconds = store.look("g", "a").now
    term = store.first("g", "a", 7, timed=True)
    assert term in (int(seconds) + 1, int(seconds) + 2)
    assert store.renew("g", "a", int(seconds) + 1).held or store.renew("g", "a", int(seconds) + 2).held
    shared.database.execute("DELETE FROM token_holder")
    assert store.first("g", "a", 2**40, timed=True) == 2**40
    shared.database.execute("DELETE FROM token_holder")
    assert store.first("g", "a", 7) == 7


def test_a_leaving_standby_removes_its_row_but_never_the_holders(shared: Tables, store: ftpcoord.Database) -> None:
    holding(shared, store)
    store.leave("g", "standby")
    assert shared.heartbeat_of("standby") is None
    store.leave("g", "a")
    assert shared.heartbeat_of("a") is not None


def test_sweeping_removes_the_rows_of_yesterday_except_the_own_and_the_holders(
    shared: Tables, store: ftpcoord.Database
) -> None:
    for member in ("me", "holder", "gone", "step-down:3", "pause:0:me@here"):
        shared.set_heartbeat(member, 2 * 86400)
    shared.set_heartbeat("alive", 86400 - 600)
    shared.set_heartbeat("gone", 2 * 86400, group="other")
    shared.set_token("holder", 1)
    store.sweep("g", "me")
    found = shared.database.execute("SELECT task_id FROM health_check WHERE group_id = 'g' ORDER BY task_id")
    assert found == [("alive",), ("holder",), ("me",), ("pause:0:me@here",)]
    assert shared.heartbeat_of("gone", "other") is not None


# -- what else the tables tell ----------------------------------------------------------------------------------------


def test_members_are_told_with_ages_and_requests_are_none(shared: Tables, store: ftpcoord.Database) -> None:
    shared.set_heartbeat("a", 10)
    shared.set_heartbeat("b", 20)
    shared.set_heartbeat("c", 20, group="other")
    store.ask("g", "step-down:3")
    store.ask("g", "pause:0:me@here")
    members = store.members("g")
    assert [(m.member_id, m.released) for m in members] == [("a", False), ("b", False)]
    assert 9 <= members[0].age <= 15
    assert 19 <= members[1].age <= 25
    assert store.token("g") == (None, 0)
    shared.set_token("b", 9)
    assert store.token("g") == ("b", 9)


def test_a_pause_ends_by_the_databases_clock_and_the_last_one_counts(shared: Tables, store: ftpcoord.Database) -> None:
    assert store.pauses("g")[1:] == ([], None)
    now = store.pauses("g")[0]
    assert abs(now - time.time()) < 5

    def until(seconds: float) -> str:
        return ftpcoord.utc_second(now + seconds)

    shared.set_heartbeat(f"pause:{until(3600)}:me@here", 600)
    shared.set_heartbeat(f"pause:{until(-2)}:late@there", 100)
    shared.set_heartbeat("pause:0:other@there", 50, group="other")
    shared.set_heartbeat("a", 0)
    _, ids, found = store.pauses("g")
    assert len(ids) == 2 and found is not None
    assert found["by"] == "me@here" and found["until"] == until(3600)
    assert found["since"][:15] in (until(-600)[:15], until(-605)[:15]), found
    shared.set_heartbeat("pause:0:you@here", 50)
    found = store.pauses("g")[2]
    assert found is not None and (found["by"], found["until"]) == ("you@here", None)
    store.unask("g", ids)
    assert store.pauses("g")[1] == ["pause:0:you@here"]
    store.unask("g", ["pause:0:you@here"])
    assert store.pauses("g")[2] is None and store.pauses("other")[2] is not None
    assert shared.heartbeat_of("a") is not None


def test_a_pause_that_nobody_understands_is_in_force(tables: Tables) -> None:
    """Whoever wrote it, perhaps a newer version, wanted one."""
    store = tables.open()
    for words in ("", "x", "2026-99-99T99:99:99Z", "someday:me@here", "1:me@here"):
        store.ask("g", f"pause:{words}")
        _, ids, found = store.pauses("g")
        assert found is not None and found["until"] is None and found["by"] == words
        store.unask("g", ids)


def test_groups_do_not_see_each_other(shared: Tables, store: ftpcoord.Database) -> None:
    holding(shared, store)
    assert store.look("h", "a").holder is None
    assert store.first("h", "b", 9) == 9
    shared.set_heartbeat("a", 100)
    view = store.look("g", "b")
    assert store.take("g", "b", view, 4, "stale") == 2
    assert shared.token("h") == ("b", 9)
    assert store.last_term("h") == 0


ODD_IDS = ["a'b", 'a"b', "a\\b", "a%b", "a:group", ":member", "$now", "a;--", "a/*b", "{a}", "x" * 128, "%s", "\\'"]


def test_any_valid_id_serves_as_group_and_as_member(tables: Tables) -> None:
    store = tables.open()
    for odd in ODD_IDS:
        assert tables.config(coordination_group=odd, member_id=odd).member_id == odd
        store.look(odd, odd)
        store.check_ids(odd, odd)
        assert store.first(odd, odd, 1) == 1, odd
        store.check_ids(odd, odd)
        assert store.renew(odd, odd, 1).held, odd
        view = store.look(odd, "b")
        assert view.holder == odd
        assert store.write(Fence(odd, odd, 1), [Change(None, row("/in/x"))]) == [True], odd
        store.release(odd, odd, 1)
        assert store.take(odd, "b", store.look(odd, "b"), 4, "released") == 2, odd


# -- the ledger -------------------------------------------------------------------------------------------------------


def row(path: str = "/in/a.csv", **changed: Any) -> Row:
    """What a first claim under term 1 looks like."""
    return Row(path, 10, "2026-01-12T10:15:30", "claimed", 1, 1, 0)._replace(**changed)


FENCE = Fence("g", "a", 1)


@pytest.fixture
def ledger(tables: Tables) -> ftpcoord.Database:
    """The ledger as member a sees it, which holds term 1 of group g."""
    store = tables.open()
    assert store.first("g", "a", 1) == 1
    return store


def rows_of(store: ftpcoord.Database, group: str = "g") -> list[Row]:
    return sorted(store.rows(group))


def test_a_claim_makes_a_row_with_all_its_columns(ledger: ftpcoord.Database) -> None:
    claim = row(attempts=3, failures=2, size=5_000_000_000)
    assert ledger.write(FENCE, [Change(None, claim)]) == [True]
    assert rows_of(ledger) == [claim]
    assert ledger.last_term("g") == 1
    assert rows_of(ledger, "other") == []


def test_a_claimed_file_is_not_claimed_again_by_another_term(tables: Tables, ledger: ftpcoord.Database) -> None:
    ledger.write(FENCE, [Change(None, row())])
    tables.set_token("b", 2)
    assert ledger.write(Fence("g", "b", 2), [Change(None, row(term=2)), Change(None, row("/in/b"))]) == [False, True]
    assert [(r.path, r.term) for r in rows_of(ledger)] == [("/in/a.csv", 1), ("/in/b", 2)]


def test_a_claim_of_another_version_is_not_taken_for_the_one_that_stands(ledger: ftpcoord.Database) -> None:
    ledger.write(FENCE, [Change(None, row())])
    assert ledger.write(FENCE, [Change(None, row(size=11))]) == [False]
    assert ledger.write(FENCE, [Change(None, row(mtime="2026-01-12T10:15:31"))]) == [False]
    assert rows_of(ledger) == [row()]


def test_the_row_of_a_claim_belongs_to_the_term_of_the_fence(tables: Tables) -> None:
    store = tables.open()
    store.first("g", "a", 7)
    assert store.write(Fence("g", "a", 7), [Change(None, row(term=1))]) == [True]
    assert [r.term for r in rows_of(store)] == [7]


def test_nothing_is_written_without_the_token(ledger: ftpcoord.Database) -> None:
    ledger.write(FENCE, [Change(None, row())])
    for fence in (Fence("g", "a", 2), Fence("g", "a", 0), Fence("g", "b", 1), Fence("other", "a", 1)):
        done = row(state="done", term=fence.term)
        assert ledger.write(fence, [Change(None, row("/in/new", term=fence.term))]) == [False], fence
        assert ledger.write(fence, [Change(row(), done)]) == [False], fence
        ledger.write(fence, [Change(row(), None)])
        assert rows_of(ledger) == [row()]
        assert rows_of(ledger, "other") == []


STALE: list[dict[str, Any]] = [
    {"size": 11},
    {"mtime": "2026-01-12T10:15"},
    {"mtime": ""},
    {"state": "failed"},
    {"term": 2},
    {"attempts": 2},
]


def test_a_change_is_made_only_to_the_row_that_was_read(ledger: ftpcoord.Database) -> None:
    ledger.write(FENCE, [Change(None, row())])
    new = row(state="done", action="delete", size=99)
    for seen in STALE:
        assert ledger.write(FENCE, [Change(row(**seen), new)]) == [False], seen
        assert rows_of(ledger) == [row()]
    assert ledger.write(FENCE, [Change(row(), new)]) == [True]
    assert rows_of(ledger) == [new]


def test_a_row_is_removed_only_as_it_was_read(ledger: ftpcoord.Database) -> None:
    ledger.write(FENCE, [Change(None, row())])
    for seen in STALE:
        assert ledger.write(FENCE, [Change(row(**seen), None)]) == [False], seen
        assert rows_of(ledger) == [row()]
    assert ledger.write(FENCE, [Change(row(), None)]) == [True]
    assert rows_of(ledger) == []


def test_an_after_action_that_was_not_recorded_is_not_taken_for_recorded(
    tables: Tables, ledger: ftpcoord.Database
) -> None:
    due = row(state="done", action="delete")
    ledger.write(FENCE, [Change(None, due)])
    tables.set_token("b", 2)
    assert ledger.write(FENCE, [Change(due, due._replace(action=""))]) == [False]
    assert rows_of(ledger) == [due]


def test_one_call_makes_claims_changes_and_removals_and_tells_each_apart(ledger: ftpcoord.Database) -> None:
    ledger.write(FENCE, [Change(None, row(f"/in/{n}")) for n in range(4)])
    changes = [
        Change(row("/in/0"), row("/in/0", state="done")),
        Change(None, row("/in/new")),
        Change(row("/in/1"), None),
        Change(row("/in/2", attempts=9), row("/in/2", state="done")),
        Change(row("/in/3", size=9), None),
        Change(None, row("/in/3", size=9)),
    ]
    assert ledger.write(FENCE, changes) == [True, True, True, False, False, False]
    assert [(r.path, r.state) for r in rows_of(ledger)] == [
        ("/in/0", "done"),
        ("/in/2", "claimed"),
        ("/in/3", "claimed"),
        ("/in/new", "claimed"),
    ]
    assert ledger.write(FENCE, []) == []


def test_a_full_group_is_written_at_once(ledger: ftpcoord.Database) -> None:
    claims = [row(f"/in/{n}", size=n * 10**9, mtime="" if n % 2 else "2026-01-12") for n in range(64)]
    assert ledger.write(FENCE, [Change(None, claim) for claim in claims]) == [True] * 64
    failed = [claim._replace(state="failed", failures=1) for claim in claims]
    delays = [None if n % 3 else n / 7 for n in range(64)]
    changes = [Change(*change) for change in zip(claims, failed, delays)]
    assert ledger.write(FENCE, changes) == [True] * 64
    found = {r.path: r for r in rows_of(ledger)}
    for claim, delay in zip(failed, delays):
        assert found[claim.path]._replace(due=None) == claim
        due = found[claim.path].due
        assert (due is None) == (delay is None)
        assert due is None or delay is None or delay - 10 < due < delay + 0.01
    assert ledger.write(FENCE, [Change(claim, None) for claim in failed]) == [True] * 64
    assert rows_of(ledger) == []


@pytest.mark.parametrize("statement", ["CHANGE", "FORGET"])
def test_a_group_of_files_is_found_by_key_however_many_files_are_known(
    ledger: ftpcoord.Database, statement: str
) -> None:
    """A type or collation that the key does not serve would make each group read the whole ledger."""
    ledger.adopt("g", "a", [row(f"/in/{n}") for n in range(20_000)])
    change = Change(row(), row(state="done") if statement == "CHANGE" else None)
    sql = ledger._bind(getattr(ledger, statement), {**FENCE._asdict(), "changes": [change] * 64})
    explain = "EXPLAIN QUERY PLAN" if ledger.name == "sqlite" else "EXPLAIN"
    plan = "\n".join(" ".join(map(str, step)) for step in ledger.execute(f"{explain} {sql}"))
    by_key = {
        "postgresql": r"Index Cond: .*group_id\b.* AND .*file_id\b",
        "mysql": r" on l using PRIMARY \(group_id = 'g', file_id = v.id\)| l eq_ref PRIMARY .*const,v.id",
        "sqlite": r"SEARCH (?:file_ledger|l) USING .*\(group_id=\? AND file_id=\?",
    }
    assert re.search(by_key[ledger.name], plan), plan


def test_a_delay_becomes_the_seconds_until_the_row_is_due(ledger: ftpcoord.Database) -> None:
    ledger.write(FENCE, [Change(None, row())])
    for delay in (0.0, 0.00001, 1.5, 3600.0, 86400 * 30.0, 86400 * 365 * 99.0):
        assert rows_of(ledger)[0].due is None
        assert ledger.write(FENCE, [Change(row(), row(state="failed"), delay)]) == [True]
        due = rows_of(ledger)[0].due
        assert due is not None, delay
        assert delay - 5 < due < delay + 0.01
        assert ledger.write(FENCE, [Change(row(state="failed"), row())]) == [True]


ODD_PATHS = [
    "/in/a b.csv",
    "/in/it's.csv",
    '/in/"quoted".csv',
    "/in/back\\slash.csv",
    "/in/100%.csv",
    "/in/%41.csv",
    "/in/%C3%A4.csv",
    "/in/ä.csv",
    "/in/a\u0308.csv",
    "/in/\U0001f600.csv",
    "/in/\udcff\udcfe.csv",
    "/in/%\udcff.csv",
    "/in/tab\there",
    "/in/A.csv",
    "/in/a.csv ",
    "/in/:group",
    "/in/ :member.csv",
    "/in/:nothing",
    "/in/$now$tick$rows",
    "/in/$ids",
    "/in/--",
    "/in/';DROP TABLE file_ledger;--",
    "/in/\\",
    "/in/\\'",
    "x/relative",
    "/in/" + "d/" * 900,
    "/in/%s%(x)s",
    "/in/{0}",
    "/in/\x1b[31m",
    "/in/\u202egnp.exe",
    "/in/\u00a0",
]


def test_a_delay_beyond_all_dates_is_a_long_one(ledger: ftpcoord.Database) -> None:
    """ledger_retention = 9999999 days, for ever in somebody's words."""
    ledger.write(FENCE, [Change(None, row())])
    for delay in (86400 * 9_999_999.0, 86400e9):
        assert ledger.write(FENCE, [Change(row(), row(), delay)]) == [True]
        assert (rows_of(ledger)[0].due or 0) > 86400 * 365 * 99


def test_any_path_keeps_its_row_through_claim_change_and_removal(ledger: ftpcoord.Database) -> None:
    claims = [row(path) for path in ODD_PATHS]
    assert ledger.write(FENCE, [Change(None, claim) for claim in claims]) == [True] * len(claims)
    assert rows_of(ledger) == sorted(claims)
    done = [claim._replace(state="done", error=claim.path.encode("utf-8", "replace").decode()) for claim in claims]
    assert ledger.write(FENCE, [Change(*pair) for pair in zip(claims, done)]) == [True] * len(claims)
    assert rows_of(ledger) == sorted(done)
    assert all(ledger.written(FENCE, [Change(None, one) for one in done]))
    assert ledger.write(FENCE, [Change(one, None) for one in done]) == [True] * len(claims)
    assert rows_of(ledger) == []


def test_any_path_can_be_claimed_alone(ledger: ftpcoord.Database) -> None:
    for path in ODD_PATHS:
        assert ledger.write(FENCE, [Change(None, row(path))]) == [True], path
        assert rows_of(ledger) == [row(path)]
        assert ledger.write(FENCE, [Change(row(path), None)]) == [True], path


def test_error_and_action_are_kept_as_they_are(ledger: ftpcoord.Database) -> None:
    new = row(state="quarantined", action="move:/bad 'ones'\\:group", error='exit 3: it\'s \\ "bad" :member $now % ä')
    ledger.write(FENCE, [Change(None, row())])
    assert ledger.write(FENCE, [Change(row(), new)]) == [True]
    assert rows_of(ledger) == [new]


def test_what_stands_is_told_from_what_does_not(ledger: ftpcoord.Database) -> None:
    ledger.write(FENCE, [Change(None, row())])
    changes = [Change(None, row()), Change(row(), None), Change(row("/in/b"), None)]
    assert ledger.written(FENCE, changes) == [True, False, True]
    for differs in (
        row(state="done"),
        row(attempts=2),
        row(failures=1),
        row(size=1),
        row(mtime=""),
        row(action="delete"),
    ):
        assert ledger.written(FENCE, [Change(None, differs)]) == [False], differs
    assert ledger.written(FENCE._replace(term=2), changes[:1]) == [False], "that is another term's row"


def test_all_rows_are_read_however_many_pages_they_take(ledger: ftpcoord.Database) -> None:
    ledger.adopt("g", "a", [row(f"/in/{n}") for n in range(5100)])
    known = {r.path for r in ledger.rows("g")}
    assert known == {f"/in/{n}" for n in range(5100)}
    assert ledger.done_count("g") == 5100
    assert list(ledger.rows("g", only_open=True)) == []
    assert ledger.counts("g") == {"claimed": 0, "done": 5100, "failed": 0, "quarantined": 0}


def test_open_rows_are_those_that_are_not_simply_done(ledger: ftpcoord.Database) -> None:
    rows = [
        row("/in/claimed"),
        row("/in/done", state="done"),
        row("/in/due", state="done", action="delete"),
        row("/in/failed", state="failed"),
        row("/in/quarantined", state="quarantined"),
    ]
    ledger.write(FENCE, [Change(None, one) for one in rows])
    assert sorted(r.path for r in ledger.rows("g", only_open=True)) == [
        "/in/claimed",
        "/in/due",
        "/in/failed",
        "/in/quarantined",
    ]
    assert ledger.done_count("g") == 1
    assert ledger.counts("g") == {"claimed": 1, "done": 2, "failed": 1, "quarantined": 1}
    assert ledger.counts("other") == {"claimed": 0, "done": 0, "failed": 0, "quarantined": 0}


def test_a_refresh_asks_for_the_open_rows_and_one_number_however_many_files_are_done(
    ledger: ftpcoord.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.adopt("g", "a", [row(f"/in/{n}") for n in range(200)])
    ledger.write(FENCE, [Change(None, row("/in/open")), Change(None, row("/in/due", state="done", action="delete"))])
    mine = ftpcoord.Ledger(ledger, "g", "a", ftpcoord.Lease(1, math.inf, time.monotonic), time.monotonic)
    mine.refresh()
    answers: list[int] = []
    execute = ledger.execute

    def counted(*arguments: Any, **values: Any) -> Any:
        rows = execute(*arguments, **values)
        answers.append(len(rows))
        return rows

    monkeypatch.setattr(ledger, "execute", counted)
    mine.refresh()
    assert answers == [2, 1]
    assert len(mine.all()) == 202


def test_rows_that_are_not_listed_are_counted_apart(ledger: ftpcoord.Database) -> None:
    states = ("claimed", "failed", "done", "quarantined")
    rows = [row(f"/in/{state}{n}", state=state, error="exit 3") for state in states for n in range(2)]
    rows[0], rows[2] = rows[0].marked(unlisted=True), rows[2].marked(unlisted=True)
    ledger.write(FENCE, [Change(None, one) for one in rows])
    assert ledger.counts("g") == {"claimed": 1, "failed": 1, "done": 2, "quarantined": 2, "unlisted": 2}


def test_adopting_records_as_done_and_touches_no_known_row(ledger: ftpcoord.Database) -> None:
    ledger.write(FENCE, [Change(None, row())])
    ledger.adopt("g", "operator", [row(size=99), row("/in/b", size=7, mtime="2026-01-12")])
    assert rows_of(ledger) == [row(), Row("/in/b", 7, "2026-01-12", "done", 0, 0, 0)]


def test_a_retried_file_is_due_at_once_with_its_attempts_but_without_failures(ledger: ftpcoord.Database) -> None:
    bad = row(state="quarantined", attempts=5, failures=5, action="delete", error="exit 1")
    ledger.write(FENCE, [Change(None, bad)])
    ledger.retry("g", bad)
    (found,) = rows_of(ledger)
    assert found._replace(due=None) == bad._replace(state="failed", failures=0, action="")
    assert found.due is not None
    assert found.due <= 0


def test_a_retry_changes_nothing_if_the_row_has_gone_on(ledger: ftpcoord.Database) -> None:
    bad = row(state="quarantined", failures=5)
    ledger.write(FENCE, [Change(None, bad)])
    for seen in (bad._replace(state="done"), bad._replace(action="delete")):
        ledger.retry("g", seen)
        ledger.retry("other", bad)
        assert rows_of(ledger) == [bad], seen


def test_a_skipped_version_is_simply_done(ledger: ftpcoord.Database) -> None:
    known = [
        row(f"/in/{state}", state=state, attempts=5, failures=5, action="delete", error="exit 1")
        for state in ("failed", "quarantined")
    ]
    ledger.write(FENCE, [Change(None, bad, delay=60.0) for bad in known])
    for number, bad in enumerate(known):
        ledger.skip("g", bad)
        assert rows_of(ledger)[number] == bad._replace(state="done", action="", error="")
        assert ledger.done_count("g") == number + 1


def test_a_skip_changes_nothing_if_the_row_has_gone_on(ledger: ftpcoord.Database) -> None:
    bad = row(state="failed", failures=5)
    ledger.write(FENCE, [Change(None, bad)])
    for seen in ({"state": "quarantined"}, {"action": "delete"}, {"size": 8}, {"mtime": "2026"}, {"attempts": 4}):
        ledger.skip("g", bad._replace(**seen))
        ledger.skip("other", bad)
        assert rows_of(ledger) == [bad], seen


def test_a_skip_leaves_rows_in_work_and_done_ones_alone(ledger: ftpcoord.Database) -> None:
    for known in (row("/in/claimed"), row("/in/done", state="done", action="delete")):
        ledger.write(FENCE, [Change(None, known)])
        ledger.skip("g", known)
        ledger.adopt("g", "operator", [known])
        assert known in rows_of(ledger)
    assert len(rows_of(ledger)) == 2


def test_the_highest_term_of_the_ledger_is_known_after_the_token_is_gone(ledger: ftpcoord.Database) -> None:
    assert ledger.last_term("g") == 0
    ledger.write(FENCE, [Change(None, row())])
    ledger.adopt("g", "a", [row("/in/b")])
    assert ledger.last_term("g") == 1
    assert ledger.last_term("other") == 0


# -- tables and start -------------------------------------------------------------------------------------------------


SERVERS = pytest.mark.parametrize("database", ["postgresql", "mysql", "mariadb"], indirect=True)


def test_a_sqlite_file_is_made_with_its_tables(tmp_path: Path) -> None:
    with contextlib.closing(Tables(Database("sqlite", f"sqlite:///{tmp_path}/new.db"))) as tables:
        assert tables_of(tables.open()) == set(ftpcoord.TABLES)


@SERVERS
def test_missing_tables_are_one_error_that_prints_just_those(bare: Tables) -> None:
    with pytest.raises(DatabaseRefused) as caught:
        bare.open()
    text = str(caught.value)
    assert all(f"CREATE TABLE IF NOT EXISTS {name} (" in text for name in ("token_holder", "health_check"))
    assert "file_ledger (" in text
    assert "ledger = off" not in text, "it would not help"
    assert tables_of(bare.unprepared()) == set(), "nothing is created unless told to"
    bare.apply_wso2()
    with pytest.raises(DatabaseRefused) as caught:
        bare.open()
    text = str(caught.value)
    assert text.count("CREATE TABLE") == 1
    assert "file_ledger (" in text
    assert "ledger = off" in text
    bare.open(ledger=False, url="ftp://u@h/in", after="delete")
    printed = "CREATE" + text.partition("CREATE")[2].rstrip(";")
    bare.database.execute(printed)
    bare.open()


def test_the_two_tables_are_enough_without_ledger(bare: Tables) -> None:
    bare.apply_wso2()
    store = bare.open(ledger=False, url="ftp://u@h/in", after="delete")
    assert store.last_term("g") == 0
    assert store.first("g", "a", 1) == 1
    assert store.renew("g", "a", 1).held


@SERVERS
def test_making_the_tables_skips_those_that_are_there(bare: Tables) -> None:
    store = bare.unprepared()
    bare.database.execute("CREATE TABLE health_check (task_id INTEGER)")
    assert sorted(store.apply_schema()) == ["file_audit", "file_ledger", "token_holder"]
    assert store.apply_schema() == []
    assert tables_of(store) == set(ftpcoord.TABLES)


def test_the_own_heartbeat_column_keeps_fractions_of_a_second(tables: Tables) -> None:
    timing = tables.open().timing
    assert not timing.whole_seconds
    assert timing.stale_after == 5.0


@SERVERS
def test_a_heartbeat_column_of_whole_seconds_is_noticed(bare: Tables) -> None:
    bare.apply_wso2()
    bare.apply()
    timing = bare.open().timing
    assert timing.whole_seconds == (bare.database.name != "postgresql")
    if timing.whole_seconds:
        assert timing.stale_after == 4.0
        with pytest.raises(ftpcoord.ConfigError, match="whole number"):
            bare.open(liveness_check_interval=6.5)


@contextlib.contextmanager
def globally(tables: Tables, name: str, value: str, before: str) -> Iterator[None]:
    """A variable of MySQL for all new sessions."""
    tables.database.execute(f"SET GLOBAL {name} = {value}", admin=True)
    try:
        yield
    finally:
        tables.database.execute(f"SET GLOBAL {name} = {before}", admin=True)


def test_a_column_of_mariadbs_old_format_is_one_of_whole_seconds(bare: Tables) -> None:
    if bare.database.name != "mariadb":
        pytest.skip("only MariaDB makes such columns")
    with globally(bare, "mysql56_temporal_format", "OFF", "ON"):
        bare.apply_wso2()
    bare.apply()
    assert bare.open().timing.whole_seconds


def test_the_tables_are_transactional_whatever_the_servers_default(bare: Tables) -> None:
    if bare.database.name not in ("mysql", "mariadb"):
        pytest.skip("the others have one kind")
    with globally(bare, "default_storage_engine", "MyISAM", "InnoDB"):
        bare.apply()
    with contextlib.closing(bare.database.connect()) as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT DISTINCT engine FROM information_schema.tables WHERE table_schema = DATABASE()")
        assert cursor.fetchall() == (("InnoDB",),)


def test_ids_are_kept_apart_and_the_check_agrees(tables: Tables) -> None:
    store = tables.open()
    for member in ("a", "A", "b"):
        store.look("/in", member)
        store.look("/IN", member)
    assert store.first("/in", "a", 1) == 1
    assert store.first("/IN", "A", 1) == 1
    store.check_ids("/in", "a")
    store.check_ids("/IN", "A")
    store.check_ids("/in", "A")
    assert not store.look("/in", "A").mine


# -- faults -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked_token(tables: Tables) -> Iterator[None]:
    """Another session keeps the token row (SQLite: the file) locked."""
    connection = tables.database.connect()
    try:
        if tables.database.name == "sqlite":
            connection.execute("BEGIN IMMEDIATE")
        else:
            if tables.database.name == "postgresql":
                connection.autocommit = False
            else:
                connection.begin()
            connection.cursor().execute("SELECT * FROM token_holder WHERE group_id = 'g' FOR UPDATE")
        yield
    finally:
        connection.rollback()
        connection.close()


def test_a_locked_row_is_an_error_in_time_and_the_statement_is_given_up_by_the_server(
    tables: Tables, ledger: ftpcoord.Database
) -> None:
    calls: list[Callable[[], object]] = [
        lambda: ledger.renew("g", "a", 1),
        lambda: ledger.write(FENCE, [Change(None, row())]),
    ]
    before, connection = tables.heartbeat_of("a"), ledger.connection
    with locked_token(tables):
        for call in calls:
            started = time.monotonic()
            with pytest.raises(DatabaseBusy):
                call()
            took = time.monotonic() - started
            assert took < ledger.timing.call_timeout + 0.5
    assert ledger.connection is connection, "the server answered: the connection is still good"
    time.sleep(0.1)
    assert tables.heartbeat_of("a") == before, "a statement that was given up must not be carried out later"
    assert rows_of(ledger) == []
    assert ledger.renew("g", "a", 1).held


def test_a_row_that_is_unlocked_in_time_is_waited_for(tables: Tables, ledger: ftpcoord.Database) -> None:
    held: list[bool] = []
    with locked_token(tables):
        waiter = threading.Thread(target=lambda: held.append(ledger.renew("g", "a", 1).held))
        waiter.start()
        time.sleep(0.1)
        assert not held
    waiter.join(10)
    assert held == [True]


@SERVERS
def test_a_frozen_database_is_an_error_in_about_t(tables: Tables, ledger: ftpcoord.Database) -> None:
    server = tables.database.server
    assert server is not None
    limit = ledger.timing.call_timeout + 1.5
    server.freeze()
    try:
        for _ in range(2):  # in the middle of a session, and while connecting
            started = time.monotonic()
            with pytest.raises(DatabaseDown) as caught:
                ledger.renew("g", "a", 1)
            assert time.monotonic() - started < limit
            assert not isinstance(caught.value, DatabaseBusy)
            assert ledger.connection is None
    finally:
        server.thaw()
    wait_for(lambda: answers(ledger), 10, "the database to answer again")


def answers(store: ftpcoord.Database) -> bool:
    try:
        return store.renew("g", "a", 1).held
    except DatabaseDown:
        return False


def test_every_verb_connects_again_by_itself(ledger: ftpcoord.Database) -> None:
    verbs: list[tuple[Callable[[], object], object]] = [
        (lambda: ledger.look("g", "b").holder, "a"),
        (lambda: ledger.renew("g", "a", 1).held, True),
        (lambda: ledger.write(FENCE, [Change(None, row())]), [True]),
        (lambda: ledger.written(FENCE, [Change(None, row())]), [True]),
        (lambda: rows_of(ledger), [row()]),
        (lambda: ledger.adopt("g", "a", [row()]), None),
        (lambda: ledger.retry("g", row()), None),
        (lambda: ledger.skip("g", row()), None),
    ]
    for verb, expected in verbs:
        ledger.close()
        assert verb() == expected


@SERVERS
def test_a_stopped_database_is_an_error_and_is_used_again_when_it_is_back(
    tables: Tables, ledger: ftpcoord.Database
) -> None:
    server = tables.database.server
    assert server is not None
    server.stop()
    try:
        for _ in range(2):
            with pytest.raises(DatabaseDown) as caught:
                ledger.write(FENCE, [Change(None, row())])
            assert "secret" not in str(caught.value)
    finally:
        server.start()
    assert ledger.write(FENCE, [Change(None, row())]) == [True]
    assert ledger.renew("g", "a", 1).held


def test_a_clone_is_a_connection_of_its_own_with_the_same_timing(ledger: ftpcoord.Database) -> None:
    clone = ledger.clone()
    assert clone.connection is None
    assert clone.timing == ledger.timing
    assert clone.renew("g", "a", 1).held
    assert clone.connection is not ledger.connection
    clone.close()
    assert ledger.renew("g", "a", 1).held


def test_the_statement_that_is_printed_in_the_source_is_what_is_sent() -> None:
    source = Path(ftpcoord.__file__).read_text(encoding="utf-8")
    begin = source.index("# In the statements `:name`")
    printed = re.findall("^#     (.*)", source[begin : source.index("\nANSWER_BYTES", begin)], re.MULTILINE)
    settings: dict[str, Any] = {
        "url": "ftp://me@files.example/in",
        "exec": "true",
        "database": "postgresql://app@db/app",
    }
    store = ftpcoord.open_database(Config(coordination_group="g", member_id="a", **settings))
    seen = {"holder": "a", "old_term": 7, "stamp": "2026-01-12 10:15:30.123456", "stale_after": 28.0, "aged": True}
    sent = store._bind(store.TAKE, {"group": "g", "member": "b", **seen})
    assert re.sub(r"\s+", "", "".join(printed)) == re.sub(r"\s+", "", sent)
