"""A database that fails over: a replica that becomes the primary, a server that becomes read-only, and a pooler
between members and database that lends its connections for one transaction at a time.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import servers
from conftest import Database, Files, need, new_database, new_folder, wait_for
from members import Crew, ftpcoord, kinds, never, stores


@pytest.fixture(scope="module")
def files(vsftpd_plain: servers.Vsftpd) -> Iterator[servers.Vsftpd]:
    """The file server of all tests here; `inbox` makes a folder of it."""
    yield vsftpd_plain


@contextlib.contextmanager
def inbox(server: servers.Vsftpd) -> Iterator[Files]:
    with new_folder("vsftpd", server) as found:
        yield found


class Uploads(threading.Thread):
    """Files that go on appearing, ten a second, until `end`."""

    def __init__(self, files: Files) -> None:
        super().__init__(daemon=True)
        self.files, self.names = files, list[str]()
        self._ended = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._ended.wait(0.1):
            name = f"{len(self.names):04}.csv"
            self.names.append(name)
            self.files.put(name, name.encode())

    def end(self) -> list[str]:
        self._ended.set()
        self.join()
        return self.names


def handled_once_but_for_the_failover(crew: Crew, names: list[str]) -> None:
    """Each file was handled to its end, a second time only under a newer term and told so, never two at a time."""
    wait_for(lambda: set(crew.names()) >= set(names) and not crew.files.names(), 60, "all files to be handled")
    ends = {run.pid: run for run in crew.runs("end")}
    for name in names:
        runs = crew.runs("begin", name)
        for before, run in zip(runs, runs[1:]):
            assert run.term > before.term and run.attempt > before.attempt, (before, run)
            assert before.pid not in ends or ends[before.pid].at <= run.at, (before, run)
    assert set(crew.names()) == set(names)


def writable(server: servers.Server) -> Database:
    return Database("postgresql", server.url, server)  # type: ignore[arg-type]


def both(first: servers.Server, second: servers.Server) -> str:
    return first.url.replace(f":{first.port}/", f":{first.port},127.0.0.1:{second.port}/")


def named(url: str, database: Database) -> str:
    return f"{url.rpartition('/')[0]}/{database.database}"


@pytest.fixture
def pair() -> Iterator[tuple[servers.Postgres, servers.Postgres]]:
    """A primary of which every commit waits for its replica."""
    need("postgresql")
    with servers.postgres() as primary, servers.pg_replica(primary) as replica:
        writable(primary).execute("ALTER SYSTEM SET synchronous_standby_names = '*'", admin=True)
        writable(primary).execute("SELECT pg_reload_conf()", admin=True)
        state = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
        wait_for(lambda: writable(primary).execute(state, admin=True) == [(1,)], 20, "synchronous replication")
        yield primary, replica


def test_when_the_primary_dies_under_load_the_group_goes_on_with_the_promoted_replica(
    pair: tuple[servers.Postgres, servers.Postgres], files: servers.Vsftpd, tmp_path: Path
) -> None:
    """And when the old primary comes back read-only, nobody stays with it, although it is named first."""
    primary, replica = pair
    with inbox(files) as folder, Crew(tmp_path, writable(primary), folder, after="delete") as crew:
        crew.settings["database"] = both(primary, replica)
        members = [crew.start(name) for name in "abc"]
        active = crew.active()
        uploads = Uploads(folder)
        wait_for(lambda: len(crew.runs()) >= 20, 30)
        assert crew.status()["term"] == active.term() and len(active.events("elected")) == 1

        died = time.time()
        primary.kill()
        # The replica alone is no place to write to: that is said. Promoted at once it might be had before anybody asks.
        wait_for(lambda: any(member.events("database_down", died) for member in members), 30, "the outage to be said")
        replica.promote()
        crew.database = writable(replica)
        # Every commit was on the replica: the token is there, no term is used twice, and no file's end was forgotten.
        done = len(crew.runs())
        wait_for(lambda: len(crew.runs()) >= done + 20, 30, "files to be handled again")

        data = primary.dir / "data"
        (data / "standby.signal").touch()
        servers.chown(data / "standby.signal", primary.ids)
        primary.start()
        assert writable(primary).execute("SELECT pg_is_in_recovery()", admin=True) == [(True,)]
        # All connect anew, to the first that they can reach and write to.
        cut = time.time()
        ours = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'ftpcoord'"
        assert len(crew.database.execute(ours, admin=True)) >= 3
        done = len(crew.runs())
        wait_for(lambda: len(crew.runs()) >= done + 20, 30, "files to be handled with the old primary there")
        for member in members:
            for event in member.events("database_down", cut):
                assert "read-only" not in event.fields["error"], event
        # A takeover, on the promoted one alone.
        active = crew.active()
        killed = active.kill()
        crew.elected(*(member for member in members if member is not active), since=killed)
        handled_once_but_for_the_failover(crew, uploads.end())
        assert crew.token()[1] >= 2
        state = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'ftpcoord'"
        assert writable(primary).execute(state, admin=True) == [(0,)], "a member is connected to the read-only server"


def test_a_member_that_finds_replicas_alone_says_so_and_begins_when_one_is_promoted(
    pair: tuple[servers.Postgres, servers.Postgres], files: servers.Vsftpd, tmp_path: Path
) -> None:
    primary, replica = pair
    with inbox(files) as folder, Crew(tmp_path, writable(primary), folder, after="delete") as crew:
        primary.kill()
        crew.settings["database"] = both(primary, replica)
        member = crew.start("a")
        assert "read-only" in member.wait("database_down").fields["error"]
        folder.put("x.csv", b"1")
        never(lambda: member.events("elected"), 1.0, "elected by a replica")
        checked = crew.call("check")
        assert checked.returncode == 1 and "read-only" in checked.stderr
        replica.promote()
        member.wait("elected")
        crew.handled("x.csv")


# ----------------------------------------------------------------------------- a server that becomes read-only


def set_read_only(database: Database, on: bool) -> None:
    if database.name == "postgresql":
        state = "on" if on else "off"
        assert database.server is not None
        other = writable(database.server)  # this database may not be written to by then
        other.execute(f"ALTER DATABASE {database.database} SET default_transaction_read_only = {state}", admin=True)
        # Sessions that are there do not notice; a demoted server would end them.
        mine = f"pg_stat_activity WHERE application_name = 'ftpcoord' AND datname = '{database.database}'"
        other.execute(f"SELECT pg_terminate_backend(pid) FROM {mine}", admin=True)
    else:
        database.execute(f"SET GLOBAL read_only = {int(on)}", admin=True)


@kinds("postgresql", "mysql", "mariadb")
@stores("vsftpd")
def test_a_database_that_becomes_read_only_ends_the_lease_and_work_goes_on_when_it_is_writable_again(
    database: Database, file_server: Files, tmp_path: Path
) -> None:
    with Crew(tmp_path, database, file_server, after="delete") as crew:
        a, b = crew.start("a"), crew.start("b")
        active = crew.active()
        file_server.put("before.csv", b"1")
        crew.handled("before.csv")
        wait_for(lambda: not file_server.names(), 10)
        set_read_only(database, True)
        since = time.time()
        try:
            error = active.wait("database_down", since=since - 1).fields["error"]
            assert "read-only" in error or database.name == "postgresql"  # there its session was ended first
            lost = active.wait("lost", since=since)
            assert lost.at - since < crew.liveness
            file_server.put("meanwhile.csv", b"2")
            never(lambda: crew.names("begin") != ["before.csv"], 1.5, "handled while the database was read-only")
        finally:
            set_read_only(database, False)
        crew.elected(a, b, since=lost.at)
        crew.handled("before.csv", "meanwhile.csv")


def test_of_two_mysql_servers_the_writable_one_is_used(
    mysql: servers.Mysql, mariadb: servers.Mysql, files: servers.Vsftpd, tmp_path: Path
) -> None:
    """The first is read-only, the second down for a moment, then writable."""
    with new_database("mysql", mysql) as second, inbox(files) as folder:
        home = Database("mariadb", mariadb.url, mariadb)
        home.execute(f"CREATE DATABASE {second.database}", admin=True)
        home.execute("SET GLOBAL read_only = 1", admin=True)
        try:
            with Crew(tmp_path, second, folder, after="delete") as crew:
                crew.settings["database"] = named(both(mariadb, mysql), second)
                member = crew.start("a")
                member.wait("elected")
                folder.put("x.csv", b"1")
                crew.handled("x.csv")
                wait_for(lambda: not folder.names(), 10)
                assert crew.token() == ("a", 1)
                mysql.restart()
                down = member.wait("database_down")
                folder.put("y.csv", b"2")
                crew.handled("x.csv", "y.csv")
                assert not member.events("ready", since=down.at), "it was never started anew"
        finally:
            home.execute("SET GLOBAL read_only = 0", admin=True)
            home.execute(f"DROP DATABASE {second.database}", admin=True)


# ----------------------------------------------------------------------------- behind a pooler


@contextlib.contextmanager
def pooled(
    tmp_path: Path, postgres: servers.Postgres, files: servers.Vsftpd, connections: int
) -> Iterator[tuple[Crew, servers.Pgbouncer, Database]]:
    """A crew behind a pooler that has so many connections to a fresh database."""
    need("pgbouncer")
    with new_database("postgresql", postgres) as database, inbox(files) as folder:
        with servers.pgbouncer(postgres, options={"default_pool_size": str(connections)}) as pooler:
            with Crew(tmp_path, database, folder, after="delete") as crew:
                crew.settings["database"] = named(pooler.url, database)
                yield crew, pooler, database


def test_behind_a_transaction_pooler_with_fewer_connections_than_members_all_works(
    postgres: servers.Postgres, files: servers.Vsftpd, tmp_path: Path
) -> None:
    """Statements of all members take turns on two connections; then the active dies, then the pooler is restarted."""
    with pooled(tmp_path, postgres, files, connections=2) as (crew, pooler, database):
        members = [crew.start(name) for name in "abc"]
        active = crew.active()
        uploads = Uploads(crew.files)
        wait_for(lambda: len(crew.runs()) >= 20, 30)
        assert all(run.attempt == 1 for run in crew.runs("begin"))

        killed = active.kill()
        _, elected = crew.elected(*(member for member in members if member is not active), since=killed)
        assert elected.at - killed <= crew.liveness + 1
        done = len(crew.runs())
        wait_for(lambda: len(crew.runs()) >= done + 10, 30)

        pooler.restart()
        done = len(crew.runs())
        wait_for(lambda: len(crew.runs()) >= done + 10, 30, "files to be handled after the pooler's restart")
        status = crew.status()
        assert status["active"] == crew.active().name
        assert {entry["member_id"] for entry in status["members"]} == set("abc")

        last = crew.active()
        stopped = time.time()
        assert last.stop() == 0
        assert last.events("released", stopped)
        crew.elected(*(member for member in members if member.running()), since=stopped)
        handled_once_but_for_the_failover(crew, uploads.end())
        # Through the pooler, or beside it: all that was ever left behind in a session would show here.
        leftovers = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
        assert database.execute(leftovers, admin=True) == [(0,)]


def test_a_login_that_a_pooler_refuses_ends_the_program_at_its_start(
    postgres: servers.Postgres, files: servers.Vsftpd, tmp_path: Path
) -> None:
    """A pooler says so in its own words, without PostgreSQL's code for it."""
    need("pgbouncer")
    database = Database("postgresql", postgres.url, postgres)
    with servers.pgbouncer(postgres) as pooler, inbox(files) as folder:
        with Crew(tmp_path, database, folder, tables=False) as crew:
            crew.settings["database"] = pooler.url.replace("app:secret", "app:wrong")
            done = crew.run("--config", "env", timeout=20)
            assert done.returncode == 1 and "login was refused" in done.stderr, done


def test_a_member_stopped_behind_a_pooler_holds_no_locks(
    postgres: servers.Postgres, files: servers.Vsftpd, tmp_path: Path
) -> None:
    with pooled(tmp_path, postgres, files, connections=1) as (crew, _, _):
        members = [crew.start(name) for name in "ab"]
        active = crew.active()
        wait_for(lambda: active.polls() >= 2, 20)
        stopped = active.send(signal.SIGSTOP)
        _, elected = crew.elected(*(member for member in members if member is not active), since=stopped)
        assert elected.at - stopped <= crew.liveness + 1
        active.send(signal.SIGCONT)
        active.wait("lost", since=stopped)
        crew.files.put("x.csv", b"1")
        crew.handled("x.csv")


# ----------------------------------------------------------------------------- a database that hangs


class Hanging:
    """Rows whose database answers when it is told to."""

    def __init__(self) -> None:
        self.asked, self.answer = threading.Semaphore(0), threading.Event()
        self.writes = 0

    def write(self, fence: object, changes: Sequence[object]) -> list[bool]:
        self.writes += 1
        self.asked.release()
        assert self.answer.wait(20)
        return [True] * len(changes)


def test_workers_that_queue_for_a_hanging_database_do_not_write_once_the_lease_is_over() -> None:
    """Else each would wait in turn, and the member could not stop for as long."""
    rows, lease = Hanging(), ftpcoord.Lease(1, time.monotonic() + 60, time.monotonic)
    ledger = ftpcoord.Ledger(rows, "g", "a", lease, time.monotonic)
    ends: list[str] = []

    def write(number: int) -> None:
        row = ftpcoord.Row(f"/in/{number}", 1, "", "claimed", 1, 1, 0)
        try:
            ledger.write([ftpcoord.Change(None, row)])
            ends.append("written")
        except ftpcoord.LeaseLost:
            ends.append("lost")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    assert rows.asked.acquire(timeout=10)
    time.sleep(0.2)  # the others reach the lock; should one not, it finds the lease over all the same
    lease.lose()
    rows.answer.set()
    for thread in threads:
        thread.join(10)
    assert sorted(ends) == ["lost", "lost", "lost", "written"] and rows.writes == 1


def test_a_mysql_server_that_does_not_answer_is_not_asked_again_without_tls() -> None:
    """`prefer` does without TLS where there is none, not where there is no answer: a call takes T, not twice T."""
    with servers.Proxy("127.0.0.1", 1) as proxy:
        proxy.blackhole()
        config = ftpcoord.Config(
            database=f"mysql://app:secret@127.0.0.1:{proxy.port}/app",
            coordination_group="g",
            member_id="a",
            heartbeat_frequency=0.5,
            liveness_check_interval=6,
        )
        assert config.database_tls == "prefer"
        database = ftpcoord.open_database(config)
        began = time.monotonic()
        with pytest.raises(ftpcoord.DatabaseDown):
            database.token("g")
        assert proxy.connections == 1
        assert time.monotonic() - began < 2 * database.timing.call_timeout
