"""A member tells the truth about its database: connections that idled, and a ledger that cannot be used."""

from __future__ import annotations

import contextlib
import http.client
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
import servers
from conftest import Database, Files, wait_for
from members import PATIENCE, Crew, Member, ftpcoord, kinds, never


def code(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().status


@contextlib.contextmanager
def locked(database: Database) -> Iterator[None]:
    """Somebody keeps file_ledger to himself: VACUUM FULL, LOCK TABLE, a transaction that was forgotten."""
    with contextlib.closing(database.connect()) as connection:
        cursor = connection.cursor()
        if database.name == "postgresql":
            connection.autocommit = False
            cursor.execute("LOCK TABLE file_ledger IN ACCESS EXCLUSIVE MODE")
        else:
            cursor.execute("LOCK TABLES file_ledger WRITE")
        yield
        if database.name == "postgresql":
            connection.rollback()
        else:
            cursor.execute("UNLOCK TABLES")


@kinds("postgresql", "mysql", "mariadb")
def test_a_locked_ledger_is_said_and_not_ready_at_once_and_the_lease_is_kept(
    database: Database, files: Files, tmp_path: Path
) -> None:
    """Longer than `stall_timeout`, with a handler's file waiting to be done: nobody else could do better."""
    port = servers.free_port()
    with Crew(tmp_path, database, files, http=f"127.0.0.1:{port}", stall_timeout=1.5, workers=1) as crew:
        member = crew.start("a")
        member.wait("polled")
        standby = crew.start("b", http=None)
        standby.wait("standby")
        wait_for(lambda: code(port, "/readyz") == 200)
        crew.hold()
        files.put("1.txt", b"x")
        crew.begun(1)
        with locked(database):
            began = time.time()
            crew.let_go()
            down = member.wait("database_down", since=began)
            assert "ledger" in down.fields["error"] and down.at - began < 5
            wait_for(lambda: code(port, "/readyz") == 503, 1)
            assert code(port, "/livez") == 200
            never(lambda: member.events("lost") or member.events("handing_over"), 4, "it gave the lease up")
            assert len(member.events("database_down")) == 1, "once a minute"
            assert code(port, "/readyz") == 503 and code(port, "/livez") == 200
        member.wait("database_up", since=began)
        wait_for(lambda: code(port, "/readyz") == 200)
        wait_for(lambda: crew.states() == {"1.txt": "done"})
        assert crew.names() == ["1.txt"] and len(member.events("elected")) == 1 and not standby.events("elected")


@kinds("postgresql", "mysql", "mariadb")
def test_a_statement_that_waits_for_a_locked_table_is_given_up_by_the_server(database: Database) -> None:
    """Or sessions would heap up there, and carry out later what was given up."""
    config = ftpcoord.Config(database=database.url, coordination_group="g", member_id="a")
    with contextlib.closing(ftpcoord.open_database(config)) as store:
        store.apply_schema()
        store.prepare()
        store.first("g", "a", 1)
        claim = ftpcoord.Row("/in/1", 1, "", "claimed", 1, 1, 0)
        with locked(database), pytest.raises(ftpcoord.DatabaseBusy):
            store.write(ftpcoord.Fence("g", "a", 1), [ftpcoord.Change(None, claim)])
        never(lambda: list(store.rows("g")), 0.5, "it was carried out later")


@kinds("postgresql")
def test_a_privilege_that_is_taken_away_is_said_and_waited_for(
    database: Database, files: Files, tmp_path: Path
) -> None:
    with Crew(tmp_path, database, files) as crew:
        member = crew.start("a")
        member.wait("polled")
        database.execute("ALTER TABLE file_ledger RENAME TO elsewhere")
        assert "table is missing" in member.wait("database_down").fields["error"]
        files.put("1.txt", b"x")
        time.sleep(1)
        database.execute("ALTER TABLE elsewhere RENAME TO file_ledger")
        member.wait("database_up")
        crew.handled("1.txt")
        assert len(member.events("elected")) == 1 and not member.events("lost")


def test_a_file_with_the_password_that_is_gone_for_a_moment_fails_no_file(
    postgresql: Database, files: Files, tmp_path: Path
) -> None:
    """While it is written anew the connection ends, with a handled file waiting to be done."""
    secret = tmp_path / "password"
    secret.write_text("secret")
    away = secret.with_suffix(".new")
    url = postgresql.url.replace(":secret@", "@")
    settings: dict[str, Any] = {
        "database": url,
        "database_password_file": secret,
        "workers": 1,
        "liveness_check_interval": 15,
    }
    with Crew(tmp_path, postgresql, files, **settings) as crew:
        member = crew.start("a")
        member.wait("polled")
        crew.hold()
        files.put("1.txt", b"x")
        crew.begun(1)
        secret.rename(away)
        drop(postgresql)
        crew.let_go()
        member.wait("database_down")
        time.sleep(1.5)
        away.rename(secret)
        member.wait("database_up")
        crew.handled("1.txt")
        member.wait("file_done")
        assert not member.events("file_failed"), member.said()
        assert len(crew.runs()) == 1 and not member.events("lost")


def test_a_password_that_was_changed_is_not_tried_so_often_that_the_account_is_locked(
    postgresql: Database, files: Files, tmp_path: Path
) -> None:
    """The file with it follows later; a handled file waits to be done meanwhile."""
    user, secret = f"rotated_{postgresql.database}", tmp_path / "password"
    secret.write_text("first")
    postgresql.execute(f"CREATE ROLE {user} LOGIN PASSWORD 'first'", admin=True)
    settings: dict[str, Any] = {
        "database": postgresql.url.replace("//app:secret@", f"//{user}@"),
        "database_password_file": secret,
        "liveness_check_interval": 15,
    }
    try:
        with Crew(tmp_path, postgresql, files, **settings) as crew:
            postgresql.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {user}", admin=True)
            member = crew.start("a")
            member.wait("polled")
            crew.hold()
            files.put("1.txt", b"x")
            crew.begun(1)
            postgresql.execute(f"ALTER ROLE {user} PASSWORD 'second'", admin=True)
            drop(postgresql)
            crew.let_go()
            member.wait("database_down")
            time.sleep(7)
            secret.write_text("second")
            member.wait("database_up")
            crew.handled("1.txt")
            member.wait("file_done")
            assert postgresql.server is not None
            assert postgresql.server.log().count(f'FATAL:  password authentication failed for user "{user}"') <= 10
    finally:
        postgresql.execute(f"DROP OWNED BY {user}", admin=True)
        postgresql.execute(f"DROP ROLE {user}", admin=True)


# ----------------------------------------------------------------------------- connections that idled

VERBS: dict[str, Callable[[Any], object]] = {
    "look": lambda store: store.look("g", "b").holder,
    "renew": lambda store: store.renew("g", "a", 1).held,
    "rows": lambda store: list(store.rows("g")),
    "members": lambda store: store.members("g"),
    "release": lambda store: store.release("g", "a", 1),
}


def drop(database: Database) -> None:
    """The server ends all connections of the user, as its limit for idle ones does."""
    if database.name == "postgresql":
        ours = f"datname = '{database.database}' AND application_name = 'ftpcoord'"
        database.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {ours}", admin=True)
        return
    sql = f"SELECT id FROM information_schema.processlist WHERE db = '{database.database}' AND user = 'app'"
    for (number,) in database.execute(sql, admin=True):
        database.execute(f"KILL {number}", admin=True)


@kinds("postgresql", "mysql", "mariadb")
def test_a_connection_that_the_server_dropped_is_made_anew_without_a_word(database: Database) -> None:
    config = ftpcoord.Config(
        database=database.url, coordination_group="g", member_id="a", heartbeat_frequency=0.5, liveness_check_interval=6
    )
    with contextlib.closing(ftpcoord.open_database(config)) as store:
        store.apply_schema()
        store.prepare()
        store.first("g", "a", 1)
        for name, verb in VERBS.items():
            before, old = verb(store), store.connection
            drop(database)
            time.sleep(0.1)
            assert verb(store) == before or name in ("members", "release"), name
            assert store.connection is not old
        drop(database)
        claim = ftpcoord.Row("/in/1", 1, "", "claimed", 1, 1, 0)
        time.sleep(0.1)
        with pytest.raises(ftpcoord.DatabaseDown):  # it might have been carried out: the ledger looks
            store.write(ftpcoord.Fence("g", "a", 1), [ftpcoord.Change(None, claim)])


@kinds("postgresql", "mysql", "mariadb")
def test_a_limit_for_idle_connections_disturbs_nobody(database: Database, files: Files, tmp_path: Path) -> None:
    def polled(member: Member, more: int) -> None:
        polls = member.polls() + more
        wait_for(lambda: member.polls() >= polls, PATIENCE)

    with Crew(tmp_path, database, files, polling_interval=0.5) as crew:
        members = [crew.start(name) for name in "ab"]
        active = crew.active()
        for number in range(3):
            polled(active, 1)
            drop(database)
            files.put(f"{number}.txt", b"x")
        crew.handled("0.txt", "1.txt", "2.txt")
        polled(active, 2)
        for member in members:
            assert not member.events("database_down") and not member.events("lost"), member.said()
