"""What is particular to one database: time zones, collations, several hosts, logins, TLS, round trips, real clients."""

from __future__ import annotations

import os
import re
import shutil
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Union
from urllib.parse import urlsplit

import pytest
import servers
from conftest import Database, Files, need, new_database
from members import Crew
from servers import Proxy, free_port
from test_dialects import Tables, row

import ftpcoord
from ftpcoord import Change, DatabaseDown, DatabaseRefused, Fence

SQL_SERVERS = pytest.mark.parametrize("database", ["postgresql", "mysql", "mariadb"], indirect=True)
MYSQLS = pytest.mark.parametrize("database", ["mysql", "mariadb"], indirect=True)
POSTGRES = pytest.mark.parametrize("database", ["postgresql"], indirect=True)
SCHEMA = Path(ftpcoord.__file__).with_name("schema.sql")


@pytest.fixture
def tables(database: Database) -> Iterator[Tables]:
    with closing(Tables(database)) as tables:
        yield tables


def reach_all_verbs(tables: Tables, a: ftpcoord.Database, b: ftpcoord.Database) -> None:
    """A whole life: win, renew, work, release, take over, and all that is read."""
    assert a.first("g", "a", 1) == 1
    assert a.renew("g", "a", 1).held
    view = b.look("g", "b")
    assert view.age is not None
    assert -0.1 < view.age < 5
    fence = Fence("g", "a", 1)
    assert a.write(fence, [Change(None, row()), Change(None, row("/in/b"))]) == [True, True]
    assert a.write(fence, [Change(row(), row(state="failed"), 60.0), Change(row("/in/b"), None)]) == [True, True]
    (found,) = b.rows("g")
    assert found.due is not None
    assert 50 < found.due <= 60
    assert b.take("g", "b", view, b.timing.stale_after, "stale") is None
    a.release("g", "a", 1)
    view = b.look("g", "b")
    assert view.released
    assert b.take("g", "b", view, b.timing.stale_after, "released") == 2
    assert a.write(fence, [Change(row("/in/c"), row("/in/c"))]) == [False]
    assert {m.member_id: m.released for m in a.members("g")} == {"a": True, "b": False}
    b.sweep("g", "b")
    tables.set_heartbeat("b", 100)
    view = a.look("g", "a")
    assert view.age is not None
    assert 90 < view.age < 120
    assert a.take("g", "a", view, a.timing.stale_after, "stale") == 3


# -- time zones and isolation -----------------------------------------------------------------------------------------


@SQL_SERVERS
@pytest.mark.parametrize("made", ["own", "wso2"])
def test_sessions_in_different_time_zones_agree_about_ages(tables: Tables, made: str) -> None:
    database = tables.database
    if made == "wso2":
        tables.apply_wso2()
    tables.apply()
    postgres = database.name == "postgresql"
    opened = []
    try:
        for zone in ("Asia/Kolkata", "America/New_York") if postgres else ("+05:30", "-05:00"):
            if postgres:
                database.execute(f"ALTER ROLE app IN DATABASE {database.database} SET timezone = '{zone}'", admin=True)
            else:
                database.execute(f"SET GLOBAL time_zone = '{zone}'", admin=True)
            opened.append(tables.open())
        reach_all_verbs(tables, *opened)
    finally:
        if not postgres:
            database.execute("SET GLOBAL time_zone = 'SYSTEM'", admin=True)


@POSTGRES
def test_a_heartbeat_column_with_time_zone_serves_as_well(tables: Tables) -> None:
    database = tables.database
    tables.apply_wso2()
    database.execute("ALTER TABLE health_check ALTER last_heartbeat TYPE TIMESTAMP WITH TIME ZONE")
    tables.apply()
    opened = []
    for zone in ("Asia/Kolkata", "America/New_York"):
        database.execute(f"ALTER ROLE app IN DATABASE {database.database} SET timezone = '{zone}'", admin=True)
        opened.append(tables.open())
    a, b = opened
    assert a.first("g", "a", 1) == 1
    view = b.look("g", "b")
    assert view.age is not None
    assert -0.1 < view.age < 5
    database.execute("UPDATE health_check SET last_heartbeat = now() + interval '1 hour' WHERE task_id = 'a'")
    view = b.look("g", "b")
    assert b.take("g", "b", view, 4, "stale") is None
    assert b.take("g", "b", view, 4, "still") == 2
    b.release("g", "b", 2)
    assert a.look("g", "a").released
    assert [row.released for row in a.members("g")] == [False, True]


@POSTGRES
def test_a_heartbeat_of_infinity_is_one_that_does_not_move_until_a_new_term_is_won(tables: Tables) -> None:
    tables.apply()
    a, b = tables.open(), tables.open()
    assert a.first("g", "a", 1) == 1
    tables.database.execute("UPDATE health_check SET last_heartbeat = 'infinity'")
    view = b.look("g", "b")
    assert (view.stamp, view.age) == ("infinity", None)
    assert [row.age > 86400 for row in b.members("g")] == [True, False]
    assert not a.renew("g", "a", 1).held
    assert a.take("g", "a", a.look("g", "a"), 4, "own") == 2
    assert b.take("g", "b", view, 4, "still") is None
    tables.database.execute("UPDATE health_check SET last_heartbeat = 'infinity'")
    assert b.take("g", "b", b.look("g", "b"), 4, "still") == 3


@POSTGRES
@pytest.mark.parametrize("digits", [0, 3])
def test_a_timestamp_column_of_fewer_digits_is_noticed(tables: Tables, digits: int) -> None:
    tables.apply_wso2()
    tables.database.execute(f"ALTER TABLE health_check ALTER last_heartbeat TYPE TIMESTAMP({digits})")
    tables.apply()
    store = tables.open()
    assert store.timing.whole_seconds == (digits == 0)
    before = time.time()
    assert store.first("g", "a", 1) == 1
    assert (tables.heartbeat_of("a") or 0) <= time.time(), "rounded into the future"
    assert (tables.heartbeat_of("a") or 0) >= before - 1
    tables.set_heartbeat("a", -3600)
    stamp = tables.heartbeat_of("a")
    assert store.renew("g", "a", 1).held
    assert (tables.heartbeat_of("a") or 0) > (stamp or 0)


@SQL_SERVERS
@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_every_isolation_level_serves(tables: Tables, level: str) -> None:
    database = tables.database
    tables.apply()
    if database.name == "postgresql":
        sql = f"ALTER DATABASE {database.database} SET default_transaction_isolation = '{level.lower()}'"
        database.execute(sql, admin=True)
        reach_all_verbs(tables, tables.open(), tables.open())
        return
    name = "transaction_isolation" if database.name == "mysql" else "tx_isolation"
    ((before,),) = database.execute(f"SELECT @@global.{name}")
    try:
        database.execute(f"SET GLOBAL TRANSACTION ISOLATION LEVEL {level}", admin=True)
        reach_all_verbs(tables, tables.open(), tables.open())
    finally:
        database.execute(f"SET GLOBAL {name} = '{before}'", admin=True)


@POSTGRES
def test_a_pooler_in_transaction_mode_may_stand_between(tables: Tables) -> None:
    need("pgbouncer")
    assert isinstance(tables.database.server, servers.Postgres)
    tables.apply()
    with servers.pgbouncer(tables.database.server) as pooler:
        url = f"{pooler.url.rpartition('/')[0]}/{tables.database.database}"
        reach_all_verbs(tables, tables.open(database=url), tables.open(database=url))


@MYSQLS
def test_a_server_that_treats_backslashes_as_plain_changes_nothing(tables: Tables) -> None:
    database = tables.database
    tables.apply()
    ((before,),) = database.execute("SELECT @@global.sql_mode")
    try:
        database.execute("SET GLOBAL sql_mode = 'NO_BACKSLASH_ESCAPES,ANSI_QUOTES,PIPES_AS_CONCAT'", admin=True)
        store = tables.open()
        store.first("g", "a", 1)
        claims = [row(path) for path in ("/in/\\", "/in/\\' OR 1=1 --", "/in/it's", '/in/"x"')]
        assert store.write(Fence("g", "a", 1), [Change(None, claim) for claim in claims]) == [True] * 4
        assert sorted(store.rows("g")) == sorted(claims)
    finally:
        database.execute(f"SET GLOBAL sql_mode = '{before}'", admin=True)


# -- collations -------------------------------------------------------------------------------------------------------


CASELESS = "CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci"


@pytest.fixture
def caseless(tables: Tables) -> Tables:
    """Made, two of them by WSO2's statements, where ids that differ in case alone are the same."""
    tables.database.execute(f"ALTER DATABASE {tables.database.database} {CASELESS}", admin=True)
    tables.apply_wso2()
    tables.apply()
    return tables


@MYSQLS
def test_a_collation_that_merges_ids_is_an_error_that_says_what_to_do(caseless: Tables) -> None:
    store = caseless.open()
    store.look("/IN", "a")
    store.check_ids("/IN", "a")
    store.look("/in", "a")
    with pytest.raises(DatabaseRefused, match=r"collation.*binary collation"):
        store.check_ids("/in", "a")
    store.look("/IN", "A")
    with pytest.raises(DatabaseRefused, match="collation"):
        store.check_ids("/IN", "A")


@MYSQLS
def test_a_holder_whose_id_differs_in_case_alone_is_noticed_in_a_look(caseless: Tables) -> None:
    store = caseless.open()
    assert store.first("g", "Node", 1) == 1
    with pytest.raises(DatabaseRefused, match="collation"):
        store.look("g", "node")


@MYSQLS
def test_a_token_of_a_group_that_differs_in_case_alone_is_noticed(caseless: Tables) -> None:
    store = caseless.open()
    caseless.set_token("other", 1, group="/IN")
    store.look("/in", "a")
    with pytest.raises(DatabaseRefused, match="collation"):
        store.check_ids("/in", "a")


# -- several hosts ----------------------------------------------------------------------------------------------------


def with_hosts(url: str, *hosts: str) -> str:
    """The URL with these hosts instead of its own; "" stands for its own."""
    login, _, place = url.rpartition("@")
    own, _, name = place.partition("/")
    return f"{login}@{','.join(host or own for host in hosts)}/{name}"


def resolve_as(monkeypatch: pytest.MonkeyPatch, name: str, *addresses: str) -> None:
    resolve = socket.getaddrinfo

    def resolved(host: str, *arguments: Any, **more: Any) -> list[Any]:
        hosts = addresses if host == name else (host,)
        return [found for one in hosts for found in resolve(one, *arguments, **more)]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)


@SQL_SERVERS
def test_a_dead_host_is_passed_over(tables: Tables) -> None:
    tables.apply()
    store = tables.open(database=with_hosts(tables.database.url, f"127.0.0.1:{free_port()}", ""))
    assert store.first("g", "a", 1) == 1


@SQL_SERVERS
def test_an_address_of_a_name_that_does_not_answer_leaves_the_next_one_its_time(
    tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables.apply()
    port = urlsplit(tables.database.url).port
    resolve_as(monkeypatch, "two.example", "127.0.0.2", "127.0.0.1")
    with ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.2", port))
        full.listen(0)
        for _ in range(4):  # whoever comes after these hears nothing
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(("127.0.0.2", port))
        url = with_hosts(tables.database.url, f"two.example:{port}")
        store = tables.open(database=url, database_tls="disable")
        assert store.first("g", "a", 1) == 1


@POSTGRES
def test_of_the_addresses_of_a_name_the_writable_one_is_used(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name for all members of a cluster gives the replica first, whenever it is asked."""
    tables.apply()
    port = urlsplit(tables.database.url).port
    assert port is not None
    monkeypatch.setattr(servers, "HOST", "127.0.0.2")
    monkeypatch.setattr(servers.Postgres, "probe", lambda server: servers.pg_login(port).close())
    with servers.postgres(options={"default_transaction_read_only": "on", "port": str(port)}):
        with closing(servers.pg_login(port, "postgres")) as replica:
            replica.autocommit = True
            replica.cursor().execute("SET default_transaction_read_only = off")
            replica.cursor().execute(f"CREATE DATABASE {tables.database.database} OWNER app")
        resolve_as(monkeypatch, "cluster.example", "127.0.0.2", "127.0.0.1")
        url = with_hosts(tables.database.url, f"cluster.example:{port}")
        store = tables.open(database=url, database_tls="disable")
        assert store.first("g", "a", 1) == 1


@SQL_SERVERS
def test_a_login_that_is_refused_is_tried_once_a_host_however_many_addresses_it_has(
    tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accounts are locked after some refusals."""
    port = urlsplit(tables.database.url).port
    assert port is not None
    resolve_as(monkeypatch, "three.example", "127.0.0.1", "127.0.0.1", "127.0.0.1")
    with Proxy("127.0.0.1", port) as first, Proxy("127.0.0.1", port) as second:
        url = with_hosts(tables.database.url, f"three.example:{first.port}", f"127.0.0.1:{second.port}")
        store = tables.unprepared(database=url.replace(":secret@", ":wrong@"), database_tls="disable")
        with pytest.raises(DatabaseRefused, match=f"three.example:{first.port}: .*127.0.0.1:{second.port}: "):
            store.prepare()
        assert (first.connections, second.connections) == (1, 1)


@SQL_SERVERS
def test_a_host_whose_name_is_none_is_passed_over_and_told(tables: Tables) -> None:
    tables.apply()
    assert tables.open(database=with_hosts(tables.database.url, "db..x", "")).first("g", "a", 1) == 1
    with pytest.raises(DatabaseDown, match=r"db\.\.x:7: "):
        tables.open(database=with_hosts(tables.database.url, "db..x:7"))


@SQL_SERVERS
def test_a_link_local_address_keeps_its_interface(tables: Tables) -> None:
    """Without it the system takes none: Invalid argument."""
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6")
    with pytest.raises(DatabaseDown, match=r"fe80::1%lo:7: (?!.*Invalid argument)"):
        tables.open(database=with_hosts(tables.database.url, "[fe80::1%lo]:7"))


@SQL_SERVERS
def test_if_no_host_answers_the_error_names_the_last_one_and_no_password(tables: Tables) -> None:
    ports = [free_port(), free_port()]
    url = with_hosts(tables.database.url, *(f"127.0.0.1:{port}" for port in ports))
    with pytest.raises(DatabaseDown) as caught:
        tables.open(database=url)
    assert f"127.0.0.1:{ports[1]}" in str(caught.value)
    assert "secret" not in str(caught.value)


PORT = {"postgresql": "SELECT current_setting('port')::int", "mysql": "SELECT @@port", "mariadb": "SELECT @@port"}


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("postgresql", "default_transaction_read_only"),
        ("mysql", "read_only"),
        ("mysql", "innodb_read_only"),
        ("mariadb", "read_only"),
        ("mariadb", "transaction_read_only"),
    ],
)
def test_a_read_only_host_is_passed_over(request: pytest.FixtureRequest, name: str, option: str) -> None:
    need(name)
    writable: Union[servers.Postgres, servers.Mysql] = request.getfixturevalue(
        "postgres" if name == "postgresql" else name
    )
    make = {"postgresql": servers.postgres, "mysql": servers.mysql, "mariadb": servers.mariadb}[name]
    with make(options={option: "on"}) as replica:
        tables = Tables(Database(name, writable.url, writable))
        with closing(tables):
            store = tables.unprepared(database=with_hosts(writable.url, f"127.0.0.1:{replica.port}", ""))
            assert store.execute(PORT[name]) == [[writable.port]] or store.execute(PORT[name]) == [(writable.port,)]
            alone = tables.unprepared(database=replica.url)
            with pytest.raises(DatabaseDown, match=f"127.0.0.1:{replica.port}: it is read-only"):
                alone.execute(PORT[name])
            assert alone.connection is None


@MYSQLS
@pytest.mark.parametrize(("shown", "writable"), [("OFF", True), ("0", True), ("ON", False), ("1", False)])
def test_variables_of_read_only_servers_may_be_words_or_numbers(
    tables: Tables, monkeypatch: pytest.MonkeyPatch, shown: str, writable: bool
) -> None:
    pymysql = pytest.importorskip("pymysql")
    variables = f"SELECT * FROM (SELECT 'innodb_read_only' AS Variable_name, '{shown}' AS Value) AS v WHERE"
    execute = pymysql.cursors.Cursor.execute

    def executed(cursor: Any, sql: str, *values: Any) -> Any:
        return execute(cursor, sql.replace("SHOW VARIABLES WHERE", variables), *values)

    monkeypatch.setattr(pymysql.cursors.Cursor, "execute", executed)
    store = tables.unprepared()
    if writable:
        store.apply_schema()
    else:
        with pytest.raises(DatabaseDown, match="it is read-only"):
            store.apply_schema()


def test_a_host_that_its_cluster_left_behind_is_passed_over(mariadb: servers.Mysql) -> None:
    """It takes logins and refuses all else."""
    galera = Path("/usr/lib/galera/libgalera_smm.so")
    if not galera.exists():
        pytest.skip("no Galera")
    address = f"gmcast.listen_addr=tcp://127.0.0.1:{free_port()}"
    cluster = {
        "wsrep-on": "ON",
        "wsrep-provider": str(galera),
        "wsrep-cluster-address": "gcomm://",
        "wsrep-node-address": "127.0.0.1",
        "wsrep-provider-options": address,
        "binlog-format": "ROW",
        "innodb-autoinc-lock-mode": "2",
    }
    with servers.mariadb(options=cluster) as node:
        tables = Tables(Database("mariadb", with_hosts(mariadb.url, f"127.0.0.1:{node.port}", ""), mariadb))
        with closing(tables):
            assert tables.unprepared().execute(PORT["mariadb"]) == [(node.port,)]
            with pytest.raises(Exception, match="timed out"):  # it looks for the others in vain
                Database("mariadb", node.url, node).execute(
                    "SET GLOBAL wsrep_cluster_address = 'gcomm://127.0.0.1:1'", True
                )
            assert tables.unprepared().execute(PORT["mariadb"]) == [(mariadb.port,)]
            with pytest.raises(DatabaseDown, match="cut off from its cluster"):
                tables.unprepared(database=node.url).execute(PORT["mariadb"])


@MYSQLS
def test_a_host_that_becomes_read_only_is_left(tables: Tables) -> None:
    tables.apply()
    store = tables.open()
    store.first("g", "a", 1)
    try:
        tables.database.execute("SET GLOBAL read_only = 1", admin=True)
        with pytest.raises(DatabaseDown, match="read-only"):
            store.renew("g", "a", 1)
        with pytest.raises(DatabaseDown, match="read-only"):
            store.renew("g", "a", 1)
    finally:
        tables.database.execute("SET GLOBAL read_only = 0", admin=True)
    assert store.renew("g", "a", 1).held


@POSTGRES
def test_a_host_that_has_become_read_only_is_left_at_the_next_connection(tables: Tables) -> None:
    tables.apply()
    store = tables.open()
    store.first("g", "a", 1)
    alter = f"ALTER DATABASE {tables.database.database} SET default_transaction_read_only = "
    tables.database.execute(alter + "on", admin=True)
    store.close()
    with pytest.raises(DatabaseDown, match="read-only"):
        store.renew("g", "a", 1)
    with closing(tables.database.connect(admin=True)) as connection:
        cursor = connection.cursor()
        cursor.execute("SET default_transaction_read_only = off")
        cursor.execute(alter + "off")
    assert store.renew("g", "a", 1).held


# -- settings of a server, a role, a session --------------------------------------------------------------------------


@POSTGRES
def test_times_are_read_as_they_were_written_whatever_form_and_zone_the_role_prefers(tables: Tables) -> None:
    """IST is India's time where it is written, Israel's where it is read."""
    tables.apply()
    database = tables.database
    for name, value in (("DateStyle", "SQL, DMY"), ("TimeZone", "Asia/Kolkata")):
        database.execute(f"ALTER DATABASE {database.database} SET {name} = '{value}'", admin=True)
    database.execute("ALTER TABLE health_check ALTER last_heartbeat TYPE timestamptz")
    database.execute(
        "ALTER TABLE file_ledger ALTER updated_at TYPE timestamptz, ALTER next_attempt_at TYPE timestamptz"
    )
    a, b = tables.open(), tables.open(member_id="b")
    assert a.first("g", "a", 1) == 1
    fence = Fence("g", "a", 1)
    assert a.write(fence, [Change(None, row())]) == [True]
    assert a.write(fence, [Change(row(), row(state="failed"), 60.0)]) == [True]
    (found,) = a.rows("g")
    assert found.due is not None
    assert 50 < found.due <= 60
    assert b.take("g", "b", b.look("g", "b"), b.timing.stale_after, "still") == 2


@POSTGRES
@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_the_encoding_that_the_role_prefers_narrows_no_name(tables: Tables, encoding: str) -> None:
    tables.apply()
    name = tables.database.database
    tables.database.execute(f"ALTER DATABASE {name} SET client_encoding = '{encoding}'", admin=True)
    store = tables.open()
    assert store.first("g", "a", 1) == 1
    assert store.write(Fence("g", "a", 1), [Change(None, row("/in/ä→.csv"))]) == [True]
    assert [found.path for found in store.rows("g")] == ["/in/ä→.csv"]


@POSTGRES
@pytest.mark.parametrize(("preferred", "used"), [("off", "on"), ("local", "local")])
def test_what_is_committed_is_on_the_disk_also_for_a_role_that_does_not_wait_for_it(
    tables: Tables, preferred: str, used: str
) -> None:
    name = tables.database.database
    tables.database.execute(f"ALTER DATABASE {name} SET synchronous_commit = {preferred}", admin=True)
    assert tables.unprepared().execute("SELECT current_setting('synchronous_commit')") == [[used]]


@POSTGRES
def test_all_that_is_asked_begins_as_a_change_does_so_that_no_pooler_asks_a_replica(
    tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also whether the server is read-only: poolers that balance loads look at the first words."""
    import pg8000.native

    run = pg8000.native.Connection.run
    asked: list[str] = []

    def heard(self: Any, sql: str) -> Any:
        asked.append(sql)
        return run(self, sql)

    monkeypatch.setattr("pg8000.native.Connection.run", heard)
    tables.apply()
    reach_all_verbs(tables, tables.open(), tables.open(member_id="b"))
    assert {sql[:10] for sql in asked} == {"SET LOCAL "}


@POSTGRES
def test_a_row_that_cannot_be_read_is_no_refusal_of_a_change(tables: Tables) -> None:
    """That would be the file's own fault, and said to nobody. What is left of the answer is not taken for the next."""
    name = f"{tables.database.database}_ascii"
    options = "ENCODING 'SQL_ASCII' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C' OWNER app"
    tables.database.execute(f"CREATE DATABASE {name} {options}", admin=True)
    database = Database("postgresql", tables.database.url.rpartition("/")[0] + f"/{name}", tables.database.server)
    try:
        with closing(Tables(database)) as ascii:
            ascii.apply()
            store = ascii.open()
            assert store.first("g", "a", 1) == 1
            store.write(Fence("g", "a", 1), [Change(None, row(f"/in/{n}")) for n in range(9)])
            database.execute(r"UPDATE file_ledger SET error = E'\344' WHERE path = '/in/4'")
            with pytest.raises(DatabaseDown) as caught:
                list(store.rows("g"))
            assert not isinstance(caught.value, ftpcoord.RowRefused), "nobody's row was written"
            assert store.write(Fence("g", "a", 1), [Change(None, row(f"/in/{n}")) for n in range(9)]) == [False] * 9
    finally:
        tables.database.execute(f"DROP DATABASE {name} WITH (FORCE)", admin=True)


@POSTGRES
@pytest.mark.parametrize("name", ["database x does not exist", "an authentication failed"])
def test_what_the_database_says_of_a_files_name_is_no_refusal_of_the_member(tables: Tables, name: str) -> None:
    """Whoever may upload a file chooses the words."""
    tables.apply()
    says = "CREATE FUNCTION says() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE EXCEPTION 'no: %', NEW.path; END$$"
    tables.database.execute(says)
    tables.database.execute("CREATE TRIGGER t BEFORE INSERT ON file_ledger FOR EACH ROW EXECUTE FUNCTION says()")
    store = tables.open()
    assert store.first("g", "a", 1) == 1
    with pytest.raises(ftpcoord.RowRefused, match=name):
        store.write(Fence("g", "a", 1), [Change(None, row(f"/in/{name}"))])


@MYSQLS
@pytest.mark.parametrize(
    "setting",
    [
        "init_connect = 'SET autocommit = 0'",
        "autocommit = 0",
        "init_connect = 'SET sql_safe_updates = 1'",
        "init_connect = 'SET sql_select_limit = 1'",
        "init_connect = 'SET sql_big_selects = 0, max_join_size = 1'",
        "init_connect = 'SET timestamp = 1000000000'",
        "init_connect = 'SET group_concat_max_len = 4'",
    ],
)
def test_settings_that_change_what_statements_do_are_not_taken_over(tables: Tables, setting: str) -> None:
    tables.apply()
    tables.set_heartbeat("b", 100)  # what `reach_all_verbs` finds of another one
    name = setting.partition(" ")[0]
    ((before,),) = tables.database.execute(f"SELECT @@global.{name}", admin=True)
    tables.database.execute(f"SET GLOBAL {setting}", admin=True)
    try:
        a, b = tables.open(), tables.open(member_id="b")
        assert a.first("g", "a", 1) == 1
        view = b.look("g", "b")
        assert view.age is not None
        assert -2 < view.age < 5
        time.sleep(tables.quantum)
        assert a.renew("g", "a", 1).held
        assert b.take("g", "b", view, 5.0, "still") is None
        fence, claims = Fence("g", "a", 1), [row(f"/in/{n}") for n in range(64)]
        assert a.write(fence, [Change(None, claim) for claim in claims]) == [True] * 64
        assert a.write(fence, [Change(claim, claim._replace(state="done")) for claim in claims[:32]]) == [True] * 32
        assert a.write(fence, [Change(claim, None) for claim in claims[32:]]) == [True] * 32
        assert (len(list(b.rows("g"))), len(b.members("g"))) == (32, 2)
        a.release("g", "a", 1)
        assert b.take("g", "b", b.look("g", "b"), 5.0, "released") == 2
    finally:
        value = before if isinstance(before, int) else f"'{before}'"
        tables.database.execute(f"SET GLOBAL {name} = {value}", admin=True)


@SQL_SERVERS
def test_times_have_their_fractions_whatever_precision_a_role_or_server_prefers(tables: Tables) -> None:
    """Rounded ones would look like a clock that steps, and move deadlines."""
    tables.apply()
    database = tables.database
    if database.name == "postgresql":
        database.execute(f"ALTER ROLE app IN DATABASE {database.database} SET extra_float_digits = -15", admin=True)
    else:
        database.execute("SET GLOBAL div_precision_increment = 0", admin=True)
    try:
        a, b = tables.open(), tables.open(member_id="b")
        assert a.first("g", "a", 1) == 1
        began = time.monotonic()
        first = b.look("g", "b")
        time.sleep(0.4)
        second = b.look("g", "b")
        took = time.monotonic() - began
        assert first.age is not None and second.age is not None
        assert 0.4 <= second.now - first.now < took + 0.01
        assert 0.39 < second.age - first.age < took + 0.01
    finally:
        if database.name != "postgresql":
            database.execute("SET GLOBAL div_precision_increment = DEFAULT", admin=True)


# -- tables that are there already ------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["token_holder", "health_check", "file_ledger"])
@pytest.mark.parametrize("wider", [False, True])
def test_a_table_in_which_a_key_could_stand_twice_is_refused(tables: Tables, table: str, wider: bool) -> None:
    """Two rows of one group in token_holder would be two leases, two of one path a file handled twice."""
    mysql = tables.database.name in ("mysql", "mariadb")
    text = re.sub(",?\\s*(PRIMARY KEY|UNIQUE)( \\([^)]*\\))?", "", ftpcoord.ddl(mysql)[table], flags=re.DOTALL)
    key = {"token_holder": "group_id, task_id", "health_check": "group_id, task_id, last_heartbeat"}
    if wider:
        more = f", PRIMARY KEY ({key.get(table, 'group_id, file_id, term')})"
        text = re.sub("\\n\\)", f"{more}\n)", text)
    tables.database.execute(text)
    cure = f"ADD {'UNIQUE' if wider else 'PRIMARY KEY'} " if mysql else "lacks a column or key"
    with pytest.raises(DatabaseRefused, match=cure):
        tables.apply()
        store = tables.open()
        store.look("g", "a")
        store.first("g", "a", 1)
        store.write(Fence("g", "a", 1), [Change(None, row())])


@SQL_SERVERS
def test_keys_are_known_in_any_order_and_beside_others(tables: Tables) -> None:
    tables.apply()
    tables.database.execute("ALTER TABLE health_check ADD CONSTRAINT other UNIQUE (group_id, task_id)")
    drop = "DROP CONSTRAINT health_check_pkey" if tables.database.name == "postgresql" else "DROP PRIMARY KEY"
    tables.database.execute(f"ALTER TABLE health_check {drop}")
    reach_all_verbs(tables, tables.open(), tables.open(member_id="b"))


@POSTGRES
@pytest.mark.parametrize("table", ["token_holder", "health_check", "file_ledger"])
def test_a_key_that_is_checked_at_the_end_alone_is_refused(tables: Tables, table: str) -> None:
    tables.apply()
    key = ftpcoord.ddl(False)[table].rpartition("KEY (")[2].rstrip("\n)") if table != "token_holder" else "group_id"
    key = f"DROP CONSTRAINT {table}_pkey, ADD PRIMARY KEY ({key}) DEFERRABLE"
    tables.database.execute(f"ALTER TABLE {table} {key}")
    with pytest.raises(DatabaseRefused, match="lacks a column or key"):
        reach_all_verbs(tables, tables.open(), tables.open(member_id="b"))


@SQL_SERVERS
@pytest.mark.parametrize("table", ["token_holder", "file_ledger"])
def test_tables_that_lose_what_was_committed_are_refused(tables: Tables, table: str) -> None:
    tables.apply()
    mysql = tables.database.name != "postgresql"
    tables.database.execute("CREATE TABLE somebody_elses (a INTEGER)" + " ENGINE=MyISAM" * mysql)
    tables.open()
    tables.database.execute(f"ALTER TABLE {table} {'ENGINE=MyISAM' if mysql else 'SET UNLOGGED'}")
    cure = f"ALTER TABLE {table} {'ENGINE=InnoDB' if mysql else 'SET LOGGED'}"
    with pytest.raises(DatabaseRefused, match=cure):
        tables.open()
    tables.apply()  # skips what is there
    tables.database.execute(cure)
    tables.open()


@SQL_SERVERS
@pytest.mark.parametrize(("table", "setting"), [("file_ledger", "ledger"), ("file_audit", "audit")])
@pytest.mark.parametrize("trouble", ["no key", "no commits"])
def test_a_table_of_another_application_matters_only_where_it_is_used(
    tables: Tables, table: str, setting: str, trouble: str
) -> None:
    tables.apply()
    tables.database.execute(f"DROP TABLE {table}")
    mysql, lost = tables.database.name != "postgresql", trouble == "no commits"
    kind, engine = "UNLOGGED" * (lost and not mysql), "ENGINE=MyISAM" * (lost and mysql)
    tables.database.execute(f"CREATE {kind} TABLE {table} (id INTEGER PRIMARY KEY, who VARCHAR(20)) {engine}")
    tables.open(after="delete", **{setting: False}).look("g", "a")
    if mysql or lost:
        with pytest.raises(DatabaseRefused, match=f"ALTER TABLE {table} "):
            tables.open(after="delete", **{setting: True})


@POSTGRES
@pytest.mark.parametrize("base", ["timestamp", "timestamp(0)", "timestamptz"])
def test_a_heartbeat_may_be_of_a_domain_over_a_moment(tables: Tables, base: str) -> None:
    tables.apply()
    tables.database.execute(f"CREATE DOMAIN moment AS {base} NOT NULL")
    tables.database.execute("ALTER TABLE health_check ALTER last_heartbeat TYPE moment")
    a, b = tables.open(), tables.open(member_id="b")
    assert a.timing.whole_seconds == (base == "timestamp(0)")
    reach_all_verbs(tables, a, b)


@SQL_SERVERS
@pytest.mark.parametrize("kind", ["DATE", "VARCHAR(40)", "no column"])
def test_a_heartbeat_that_is_no_moment_is_refused(tables: Tables, kind: str) -> None:
    """A day's renewals would all leave the same stamp, and pass for a dead member's."""
    tables.apply()
    change = {"postgresql": "ALTER last_heartbeat TYPE"}.get(tables.database.name, "MODIFY last_heartbeat")
    if kind == "no column":
        tables.database.execute("ALTER TABLE health_check DROP COLUMN last_heartbeat")
    else:
        tables.database.execute(f"ALTER TABLE health_check {change} {kind}")
    with pytest.raises(DatabaseRefused, match=r"last_heartbeat is (date|character varying|varchar|missing)"):
        tables.open()


def test_columns_of_others_in_the_tables_disturb_no_statement(tables: Tables) -> None:
    tables.apply()
    for table in ("token_holder", "health_check", "file_ledger", "file_audit"):
        for column in ("id", "created_at", "version", "name"):
            tables.database.execute(f"ALTER TABLE {table} ADD COLUMN {column} VARCHAR(9)")
    for table in ("token_holder", "health_check"):
        for column in ("updated_at", "state", "error"):
            tables.database.execute(f"ALTER TABLE {table} ADD COLUMN {column} VARCHAR(9)")
    a = tables.open(audit=True)
    b = tables.open(member_id="b", audit=True)
    assert a.first("g", "a", 1) == 1
    a.release("g", "a", 1)
    assert b.take("g", "b", b.look("g", "b"), 5.0, "released") == 2
    assert a.take("g", "a", a.look("g", "a"), 5.0, "still") == 3
    fence, done = Fence("g", "a", 3), ftpcoord.Outcome("done")
    assert a.write(fence, [Change(None, row("/in/d", term=3))]) == [True]
    assert a.write(fence, [Change(row("/in/d", term=3), row("/in/d", state="done"), outcome=done)]) == [True]
    a.retry("g", row("/in/d", state="done", term=3))
    assert [each["outcome"] for each in a.history("g")] == ["done", "retried"]


@MYSQLS
def test_tables_of_two_collations_are_refused_and_said(tables: Tables) -> None:
    tables.apply()
    for table, collation in (("token_holder", "utf8mb4_unicode_ci"), ("health_check", "utf8mb4_general_ci")):
        tables.database.execute(f"ALTER TABLE {table} CONVERT TO CHARACTER SET utf8mb4 COLLATE {collation}")
    with pytest.raises(DatabaseRefused, match="collations differ"):
        tables.open().look("g", "a")


def test_a_sqlite_file_stays_the_one_it_was_though_a_handler_changes_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with closing(Tables(Database("sqlite", "sqlite:///own.db"))) as tables:
        store = tables.open()
        assert store.first("g", "a", 1) == 1
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert store.renew("g", "a", 1).held
        store.close()
        assert store.renew("g", "a", 1).held


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_a_sqlite_file_that_root_makes_is_its_folders_owners(tmp_path: Path) -> None:
    """`status` and `check` are run as root, and may come before the service's first start."""
    folder = tmp_path / "state"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    with closing(Tables(Database("sqlite", f"sqlite:///{folder / 'c.db'}"))) as tables:
        tables.open().look("g", "a")
        assert {os.stat(path).st_uid for path in folder.iterdir()} == {65534}


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_sqlite_file_that_was_replaced_is_opened_anew(tables: Tables, tmp_path: Path) -> None:
    """Whoever kept to the old one would hold a lease there, beside the lease in the new one."""
    file = Path(tables.database.database)
    a = tables.open()
    assert a.first("g", "a", 1) == 1
    for each in tmp_path.glob(f"{file.name}*"):
        each.unlink()
    b = tables.open(member_id="b")
    assert b.first("g", "b", 1) == 1
    assert not a.renew("g", "a", 1).held
    file.unlink()
    assert b.look("g", "b").holder is None, "what is gone is made anew"


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_transaction_that_cannot_be_committed_for_a_reader_holds_up_nobody_afterwards(tables: Tables) -> None:
    """Where the file system has no shared memory there is no WAL, and who reads keeps others from committing."""
    a, b = tables.open(heartbeat_frequency=0.3, liveness_check_interval=3), tables.open(member_id="b")
    assert a.first("g", "a", 1) == 1
    b.close()
    a.connection.execute("PRAGMA journal_mode = DELETE")
    with closing(tables.database.connect()) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM token_holder").fetchall()
        with pytest.raises(ftpcoord.DatabaseBusy):
            a.renew("g", "a", 1)
    with closing(tables.database.connect(timeout=0)) as other:
        other.execute("UPDATE health_check SET last_heartbeat = last_heartbeat")
    assert a.renew("g", "a", 1).held


# -- logins and privileges --------------------------------------------------------------------------------------------


@SQL_SERVERS
def test_a_wrong_password_is_refused_and_not_shown(tables: Tables) -> None:
    url = tables.database.url.replace(":secret@", ":Tr0ub4dor@")
    with pytest.raises(DatabaseRefused) as caught:
        tables.open(database=url)
    text = str(caught.value)
    assert "refused" in text
    assert "Tr0ub4dor" not in text
    assert "app@127.0.0.1" in text


@SQL_SERVERS
@pytest.mark.parametrize("password", ["p\u00e4\u00df", "\u20ac \u0442\u0440", " a'b\\\"c%d"])
def test_a_password_of_any_letters_is_the_one_that_was_set(tables: Tables, password: str) -> None:
    database, user = tables.database, f"other_{tables.database.database}"
    tables.apply()
    with closing(database.connect(admin=True)) as connection:
        cursor = connection.cursor()
        if database.name == "postgresql":
            cursor.execute(f"CREATE ROLE {user} LOGIN PASSWORD {ftpcoord.SQLite.literal(tables.open(), password)}")
            cursor.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {user}")
        else:
            cursor.execute(f"CREATE USER {user} IDENTIFIED BY %s", [password])
            cursor.execute(f"GRANT ALL ON {database.database}.* TO {user}")
        try:
            url = database.url.replace("//app:secret@", f"//{user}@")
            store = tables.open(database=url, database_password=password)
            assert store.look("g", "a").holder is None
        finally:
            if database.name == "postgresql":
                cursor.execute(f"DROP OWNED BY {user}")
            cursor.execute(f"DROP {'ROLE' if database.name == 'postgresql' else 'USER'} {user}")


@SQL_SERVERS
def test_an_unknown_database_is_refused(tables: Tables) -> None:
    with pytest.raises(DatabaseRefused, match="no such database"):
        tables.open(database=f"{tables.database.url.rpartition('/')[0]}/t_nowhere")


@POSTGRES
def test_an_unknown_database_behind_a_pooler_is_refused(tables: Tables) -> None:
    """pgbouncer tells the server's text without its code."""
    need("pgbouncer")
    assert isinstance(tables.database.server, servers.Postgres)
    with servers.pgbouncer(tables.database.server) as pooler:
        with pytest.raises(DatabaseRefused, match="no such database"):
            tables.open(database=f"{pooler.url.rpartition('/')[0]}/t_nowhere")


@SQL_SERVERS
def test_an_unknown_user_is_refused(tables: Tables) -> None:
    with pytest.raises(DatabaseRefused, match="refused"):
        tables.open(database=tables.database.url.replace("//app:", "//nobody:"))


@SQL_SERVERS
def test_a_missing_privilege_is_refused_and_named(tables: Tables) -> None:
    database = tables.database
    tables.apply()
    user = f"weak_{database.database}"
    if database.name == "postgresql":
        database.execute(f"CREATE ROLE {user} LOGIN PASSWORD 'secret'", admin=True)
        grant = f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {user}"
    else:
        database.execute(f"CREATE USER {user}@'%' IDENTIFIED BY 'secret'", admin=True)
        grant = f"GRANT SELECT ON {database.database}.* TO {user}@'%'"
    try:
        database.execute(grant, admin=True)
        store = tables.open(database=database.url.replace("//app:", f"//{user}:"))
        with pytest.raises(DatabaseRefused, match="privilege is missing; members need SELECT, INSERT, UPDATE and DEL"):
            store.look("g", "a")
    finally:
        if database.name == "postgresql":
            database.execute(f"DROP OWNED BY {user}", admin=True)
        database.execute(f"DROP {'ROLE' if database.name == 'postgresql' else 'USER'} {user}", admin=True)


@SQL_SERVERS
@pytest.mark.parametrize("missing", ["UPDATE ON token_holder", "DELETE ON health_check", "INSERT ON file_ledger"])
def test_check_misses_a_privilege_before_a_member_does(
    tables: Tables, missing: str, files: Files, tmp_path: Path
) -> None:
    database = tables.database
    user, postgres = f"weak_{database.database}", database.name == "postgresql"
    with Crew(tmp_path, database, files, audit="on") as crew:
        database.execute(
            f"CREATE ROLE {user} LOGIN PASSWORD 'secret'" if postgres else f"CREATE USER {user} IDENTIFIED BY 'secret'",
            admin=True,
        )
        try:
            for table in ("token_holder", "health_check", "file_ledger", "file_audit"):
                rights = {"SELECT", "INSERT", "UPDATE", "DELETE"} - {missing.split()[0] if table in missing else ""}
                database.execute(f"GRANT {', '.join(rights)} ON {table} TO {user}", admin=True)
            done = crew.run("check", database=database.url.replace("//app:", f"//{user}:"))
            assert done.returncode == 1 and "a privilege is missing" in done.stderr
            assert crew.run("check").returncode == 0
            assert [database.execute(f"SELECT * FROM {table}") for table in ("health_check", "file_ledger")] == [[], []]
        finally:
            if postgres:
                database.execute(f"DROP OWNED BY {user}", admin=True)
            database.execute(f"DROP {'ROLE' if postgres else 'USER'} {user}", admin=True)


@contextmanager
def another_user(tables: Tables, state: str = "") -> Iterator[str]:
    """Of MySQL, without any privilege; how it is named in SQL."""
    user = f"other_{tables.database.database}@'%'"
    tables.database.execute(f"CREATE USER {user} IDENTIFIED BY 'secret' {state}", admin=True)
    try:
        yield user
    finally:
        tables.database.execute(f"DROP USER {user}", admin=True)


def open_as(tables: Tables, user: str) -> Any:
    return tables.open(database=tables.database.url.replace("//app:", f"//{user.partition('@')[0]}:"))


@MYSQLS
@pytest.mark.parametrize("state", ["PASSWORD EXPIRE", "ACCOUNT LOCK"])
def test_an_account_that_is_locked_or_whose_password_has_expired_is_refused(tables: Tables, state: str) -> None:
    with another_user(tables, state) as user:
        tables.database.execute(f"GRANT ALL ON {tables.database.database}.* TO {user}", admin=True)
        with pytest.raises(DatabaseRefused, match="the login was refused"):
            open_as(tables, user)


@MYSQLS
def test_a_database_that_the_user_may_not_use_is_refused(tables: Tables) -> None:
    with another_user(tables) as user, pytest.raises(DatabaseRefused, match="may not use this database"):
        open_as(tables, user)


@SQL_SERVERS
def test_a_table_of_another_form_is_refused_and_named(tables: Tables) -> None:
    tables.apply_wso2()
    ids = "group_id VARCHAR(9), file_id VARCHAR(9)"
    tables.database.execute(f"CREATE TABLE file_ledger ({ids}, PRIMARY KEY (group_id, file_id))")
    store = tables.open()
    with pytest.raises(DatabaseRefused, match="lacks a column"):
        list(store.rows("g"))


@SQL_SERVERS
def test_a_table_that_was_dropped_is_refused_and_named(tables: Tables) -> None:
    tables.apply()
    store = tables.open()
    tables.database.execute("DROP TABLE health_check")
    with pytest.raises(DatabaseRefused, match="a table is missing"):
        store.look("g", "a")


def test_a_sqlite_file_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("this is no database, but long enough to be looked at as one. " * 20)
    for path in (tmp_path / "no" / "folder.db", tmp_path / "text"):
        with closing(Tables(Database("sqlite", f"sqlite:///{path}"))) as tables:
            with pytest.raises(DatabaseRefused, match="writable"):
                tables.open()


def test_sqlite_members_wait_for_each_other(tmp_path: Path) -> None:
    with closing(Tables(Database("sqlite", f"sqlite:///{tmp_path}/db"))) as tables:
        stores = [tables.open() for _ in range(4)]
        assert [store.first("g", f"m{n}", 1) for n, store in enumerate(stores)] == [1, None, None, None]
        reach = tables.open()
        assert reach.execute("PRAGMA journal_mode") == [("wal",)]


# -- TLS --------------------------------------------------------------------------------------------------------------


def started(name: str, tls: bool) -> Iterator[Union[servers.Postgres, servers.Mysql]]:
    need(name)
    server: Union[servers.Postgres, servers.Mysql]
    if name == "postgresql":
        server = servers.postgres(tls=tls)
    else:
        server = servers.mysql(tls=tls) if name == "mysql" else servers.mariadb(tls=tls)
    with closing(server):
        yield server


@pytest.fixture(scope="module", params=["postgresql", "mysql", "mariadb"])
def tls_server(request: pytest.FixtureRequest) -> Iterator[Union[servers.Postgres, servers.Mysql]]:
    yield from started(request.param, True)


@pytest.fixture(scope="module", params=["postgresql", "mysql", "mariadb"])
def plain_server(request: pytest.FixtureRequest) -> Iterator[Union[servers.Postgres, servers.Mysql]]:
    yield from started(request.param, False)


ENCRYPTED = {
    "postgresql": "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()",
    "mysql": "SHOW STATUS LIKE 'Ssl_cipher'",
    "mariadb": "SHOW STATUS LIKE 'Ssl_cipher'",
}


def encrypted(server: Union[servers.Postgres, servers.Mysql], **settings: object) -> bool:
    with closing(Tables(Database(server.name, server.url, server))) as tables:
        ((*_, found),) = tables.unprepared(**settings).execute(ENCRYPTED[server.name])
        return bool(found)


def test_tls_with_a_trusted_certificate_is_used(tls_server: Union[servers.Postgres, servers.Mysql]) -> None:
    assert encrypted(tls_server, database_tls="verify", database_ca_file=str(tls_server.ca))
    assert encrypted(tls_server, database_tls="require")
    assert encrypted(tls_server, database_tls="prefer")
    assert not encrypted(tls_server, database_tls="disable")


def test_a_certificate_that_is_not_trusted_is_refused(tls_server: Union[servers.Postgres, servers.Mysql]) -> None:
    for trusted in ("", str(tls_server.ca.with_name("other-ca.pem"))):
        with pytest.raises(DatabaseRefused, match=r"trusted.*set database_ca_file"):
            encrypted(tls_server, database_tls="verify", database_ca_file=trusted)


def test_a_certificate_for_another_host_is_refused(tls_server: Union[servers.Postgres, servers.Mysql]) -> None:
    another = tls_server.url.replace("@127.0.0.1:", "@127.1:")  # the same address under a name the certificate lacks
    assert not encrypted(tls_server, database=another, database_tls="disable")
    with pytest.raises(DatabaseRefused, match="trusted"):
        encrypted(tls_server, database=another, database_tls="verify", database_ca_file=str(tls_server.ca))


def test_a_server_without_tls_is_used_only_where_that_is_allowed(
    plain_server: Union[servers.Postgres, servers.Mysql],
) -> None:
    assert not encrypted(plain_server, database_tls="prefer")
    assert not encrypted(plain_server, database_tls="disable")
    for level in ("require", "verify"):
        with pytest.raises(DatabaseRefused, match=r"TLS.*prefer or disable"):
            encrypted(plain_server, database_tls=level)


# -- round trips ------------------------------------------------------------------------------------------------------


@SQL_SERVERS
def test_a_heartbeat_is_one_round_trip_and_a_look_at_most_two(tables: Tables) -> None:
    tables.apply()
    postgres = tables.database.name == "postgresql"
    assert tables.database.server is not None
    with Proxy("127.0.0.1", tables.database.server.port) as proxy:
        store = tables.open(database=with_hosts(tables.database.url, f"127.0.0.1:{proxy.port}"))
        assert store.first("g", "a", 1) == 1
        fence, connections = Fence("g", "a", 1), proxy.connections

        def trips(call: object) -> int:
            before = proxy.round_trips
            assert callable(call)
            call()
            return proxy.round_trips - before

        assert trips(lambda: store.renew("g", "a", 1)) == 1
        assert trips(lambda: store.look("g", "b")) == (1 if postgres else 2)
        assert trips(lambda: store.look("g", "a")) == (1 if postgres else 2)
        assert trips(lambda: store.release("g", "a", 1)) == 1
        claims = [Change(None, row(f"/in/{n}")) for n in range(64)]
        assert trips(lambda: store.write(fence, claims)) == (1 if postgres else 2)
        assert proxy.connections == connections, "no new connections"


# -- real clients -----------------------------------------------------------------------------------------------------


def run_client(command: list[str], script: Path, **environment: str) -> None:
    with open(script, "rb") as stdin:
        done = subprocess.run(
            command, stdin=stdin, capture_output=True, timeout=60, env={**os.environ, **environment}, text=True
        )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "error" not in (done.stderr + done.stdout).lower()


@SQL_SERVERS
def test_schema_sql_is_taken_by_the_databases_own_client_also_twice(tables: Tables) -> None:
    database = tables.database
    assert database.server is not None
    port = str(database.server.port)
    if database.name == "postgresql":
        client = shutil.which("psql")
        command = [
            client or "",
            "-X",
            "-q",
            "-v",
            "ON_ERROR_STOP=1",
            "-h",
            "127.0.0.1",
            "-p",
            port,
            "-U",
            "app",
            "-d",
            database.database,
            "-f",
            str(SCHEMA),
        ]
    else:
        client = shutil.which("mariadb") or shutil.which("mysql")
        command = [
            client or "",
            "--no-defaults",
            "-h",
            "127.0.0.1",
            "-P",
            port,
            "-u",
            "app",
            "-psecret",
            database.database,
        ]
    if client is None:
        pytest.skip(f"no client of {database.name} here")
    for _ in range(2):
        run_client(command, SCHEMA, PGPASSWORD="secret")
    store = tables.open()
    assert not store.timing.whole_seconds
    reach_all_verbs(tables, store, tables.open())
    store.look("/in", "a")
    store.look("/IN", "A")
    store.check_ids("/in", "a")
    store.check_ids("/IN", "A")


@pytest.mark.parametrize("client", ["module", "program"])
def test_schema_sql_is_taken_by_sqlite(tmp_path: Path, client: str) -> None:
    path = tmp_path / "db"
    if client == "module":
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript(SCHEMA.read_text())
            connection.executescript(SCHEMA.read_text())
    else:
        program = shutil.which("sqlite3")
        if program is None:
            pytest.skip("no sqlite3 program here")
        for _ in range(2):
            run_client([program, "-bail", str(path)], SCHEMA)
    with closing(Tables(Database("sqlite", f"sqlite:///{path}"))) as tables:
        reach_all_verbs(tables, tables.open(), tables.open())


@pytest.mark.parametrize("name", ["mysql", "mariadb"])
def test_the_own_tables_are_binary_where_the_database_is_not(request: pytest.FixtureRequest, name: str) -> None:
    server = request.getfixturevalue(name)
    with new_database(name, server) as database, closing(Tables(database)) as tables:
        database.execute(f"ALTER DATABASE {database.database} {CASELESS}", admin=True)
        tables.apply()
        store = tables.open()
        store.look("/IN", "a")
        store.look("/in", "A")
        store.check_ids("/in", "A")
        assert store.first("/IN", "a", 1) == 1
        assert store.first("/in", "A", 1) == 1
        fence = Fence("/in", "A", 1)
        claims = [Change(None, row(path)) for path in ("/x", "/X", "/x ", "/\u00e4", "/a\u0308", "/\u00c4")]
        assert store.write(fence, claims) == [True] * 6


# -- the default group ------------------------------------------------------------------------------------------------

SPELLINGS = ["ftp://me@files.example/a/in", "ftpes://me@FILES.example:21//a/x/../in/", "ftp://me@files.example.//a//in"]


def settled(tables: Tables, url: str) -> str:
    config = tables.config(url=url, coordination_group="", exec="true")
    store = tables.open()
    store.settle_group(config)
    return config.coordination_group


def test_one_folder_of_one_server_is_one_group_however_its_url_spells_it(tables: Tables) -> None:
    tables.apply()
    assert {settled(tables, url) for url in SPELLINGS} == {"ftp://me@files.example:21/a/in"}
    for other in (
        "sftp://me@files.example/a/in",
        "ftp://you@files.example/a/in",
        "ftp://me@files.example:2121/a/in",
        "ftp://me@files.example/~/a/in",
        "ftps://me@files.example/a/in",
    ):
        assert settled(tables, other) != settled(tables, SPELLINGS[0]), other


@pytest.mark.parametrize("place", ["token", "ledger"])
def test_a_group_under_the_text_of_an_older_version_is_found_and_kept(tables: Tables, place: str) -> None:
    tables.apply()
    old = "ftpes://me@files.example:21/a/x/../in"
    if place == "token":
        tables.set_token("old", 7, group=old)
    else:
        tables.set_token("old", 7, group=old)
        assert tables.open().write(Fence(old, "old", 7), [Change(None, row())]) == [True]
        tables.database.execute("DELETE FROM token_holder")
    assert settled(tables, "ftpes://me@files.example/a/x/../in") == old


def test_a_change_of_the_url_joins_the_group_of_the_members_that_still_run(tables: Tables) -> None:
    tables.apply()
    old, dead = "ftpes://me@files.example:21/a//in", "ftp://me@files.example:21/a/in"
    tables.set_token("gone", 3, group=dead)
    tables.set_heartbeat("gone", 9000, group=dead)
    tables.set_token("old", 7, group=old)
    tables.set_heartbeat("old", 0, group=old)
    assert {settled(tables, url) for url in SPELLINGS} == {old}
    tables.set_heartbeat("old", 9000, group=old)
    assert settled(tables, "ftpes://me@files.example/a//in") == old, "nobody runs: its own text, as an older one takes"


def test_a_group_that_was_set_is_nobody_elses(tables: Tables) -> None:
    tables.apply()
    tables.set_token("old", 7, group="ftpes://me@files.example:21/a/in")
    config = tables.config(url=SPELLINGS[0], coordination_group="ftp://me@files.example:21/a/in", exec="true")
    tables.open().settle_group(config)
    assert config.coordination_group == "ftp://me@files.example:21/a/in"
