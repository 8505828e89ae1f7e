"""Fixtures: real servers, started when a test first asks for them, one of each kind in each pytest process.

A server that cannot be started here skips the test with the reason; with FTPCOORD_REQUIRE_ALL=1 the
test fails.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import os
import shutil
import sqlite3
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Optional, TypeVar, Union
from urllib.parse import urlsplit

import memory
import pytest
import servers
from servers import wait_for

import ftpcoord

if TYPE_CHECKING:
    from members import Crew

__all__ = ["Database", "Files", "Logged", "fetch", "need", "new_database", "new_folder", "tree", "wait_for"]

# Files that take longest begin first, those that want nothing but the processor before all others.
LONGEST = """
    test_simulation test_sabotage test_chaos_mysql test_chaos_postgresql test_chaos_sqlite test_fileservers test_status
    test_files_at_work test_dialects test_takeover test_publishing test_command_line test_ends test_failover
    test_operations test_expect test_coexistence test_outages test_large_folders test_forgetting test_schedule
    test_misbehaving test_audit test_versions test_ftp_answers test_readiness test_hostile_listings
    test_ledger_refusals test_pause test_interleavings test_upgrade test_field test_databases test_delivery
    test_servers test_page test_bench test_scripts test_end_to_end test_run test_secrets
"""

Logged = Callable[[], "list[logging.LogRecord]"]
S = TypeVar("S", bound=servers.Server)
_numbers = itertools.count(1)


def need(name: str) -> None:
    """Skip the test, or fail it with FTPCOORD_REQUIRE_ALL=1, if this server cannot be started here."""
    reason = servers.available(name)
    if reason and os.environ.get("FTPCOORD_REQUIRE_ALL") == "1":
        pytest.fail(f"{name}: {reason}", pytrace=False)
    if reason:
        pytest.skip(f"{name}: {reason}")


@pytest.hookimpl(hookwrapper=True)
def pytest_collection() -> Iterator[None]:
    gc.disable()  # a sixth of the time otherwise
    yield
    gc.freeze()  # thousands of tests, none of which is let go
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def _session(name: str, make: Callable[[], S]) -> Callable[..., Iterator[S]]:
    """A fixture: this server, started when a test first asks for it."""

    @pytest.fixture(scope="session")
    def running() -> Iterator[S]:
        need(name)
        with make() as server:
            yield server

    return running


postgres = _session("postgresql", servers.postgres)
mariadb = _session("mariadb", servers.mariadb)
mysql = _session("mysql", servers.mysql)
vsftpd_plain = _session("vsftpd", servers.vsftpd)
vsftpd_explicit = _session("vsftpd", lambda: servers.vsftpd("explicit"))
vsftpd_implicit = _session("vsftpd", lambda: servers.vsftpd("implicit"))
sshd = _session("sshd", servers.sshd)
pyftpd = _session("pyftpd", servers.pyftpd)
proftpd_explicit = _session("proftpd", lambda: servers.proftpd("explicit"))
proftpd_list = _session("proftpd", lambda: servers.proftpd("list"))
proftpd_refusing = _session("proftpd", lambda: servers.proftpd("refusing"))
proftpd_sftp = _session("proftpd", lambda: servers.proftpd("sftp"))
pure_ftpd_plain = _session("pure-ftpd", servers.pure_ftpd)
pure_ftpd_explicit = _session("pure-ftpd", lambda: servers.pure_ftpd("explicit"))
asyncssh = _session("asyncssh", servers.asyncssh)
tinyproxy = _session("tinyproxy", servers.tinyproxy)
microsocks = _session("microsocks", servers.microsocks)


class Database:
    """A fresh, empty database for one test.  `server` is None for SQLite."""

    def __init__(self, name: str, url: str, server: Union[servers.Postgres, servers.Mysql, None] = None) -> None:
        self.name, self.url, self.server = name, url, server
        self.database = urlsplit(url).path[1:]  # SQLite: the file

    def __repr__(self) -> str:
        return f"<{self.url}>"

    def connect(self, admin: bool = False, timeout: float = 10) -> Any:
        """The test's own connection, in autocommit mode, as the user of `url` or as the administrator."""
        if self.server is None:
            return sqlite3.connect(self.database, timeout=timeout, isolation_level=None)
        if isinstance(self.server, servers.Postgres):
            connection = servers.pg_login(self.server.port, "postgres" if admin else "app", self.database, timeout)
            connection.autocommit = True
            return connection
        return servers.mysql_login(
            self.server.port, "admin" if admin else "app", self.database, timeout, autocommit=True
        )

    def execute(self, sql: str, admin: bool = False) -> list[tuple[Any, ...]]:
        """The rows that one statement gives, [] if it gives none."""
        with contextlib.closing(self.connect(admin)) as connection:
            cursor = connection.cursor()
            cursor.execute(sql)
            return [tuple(row) for row in cursor.fetchall()] if cursor.description else []


_managing: weakref.WeakKeyDictionary[servers.Server, Any] = weakref.WeakKeyDictionary()


def _manage(home: Database, sql: str) -> list[tuple[Any, ...]]:
    """As the server's administrator, over a connection that is kept: a login costs as much as a database."""
    assert home.server is not None
    for kept in (True, False):
        connection = _managing.pop(home.server, None)
        if connection is None:
            connection, kept = home.connect(admin=True), False
        try:
            cursor = connection.cursor()
            cursor.execute(sql)
            rows = [tuple(row) for row in cursor.fetchall()] if cursor.description else []
            _managing[home.server] = connection
            return rows
        except Exception:
            with contextlib.suppress(Exception):
                connection.close()
            if not kept:  # else a test may have ended the server's connections
                raise
    raise AssertionError


@contextlib.contextmanager
def new_database(name: str, server: Union[servers.Postgres, servers.Mysql]) -> Iterator[Database]:
    """A fresh database on that server, dropped at the end whoever is still connected."""
    database = f"t_{os.getpid()}_{next(_numbers)}"
    home = Database(name, server.url, server)
    _well(server)
    more = f" OWNER app{server.copying}" if isinstance(server, servers.Postgres) else ""
    _manage(home, f"CREATE DATABASE {database}{more}")
    try:
        yield Database(name, server.url.rpartition("/")[0] + "/" + database, server)
    finally:
        _well(server)
        if isinstance(server, servers.Postgres):
            _manage(home, f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")
        else:
            sql = f"SELECT id FROM information_schema.processlist WHERE db = '{database}'"
            for (number,) in _manage(home, sql):
                with contextlib.suppress(Exception):  # it has left meanwhile
                    _manage(home, f"KILL {number}")
            _manage(home, f"DROP DATABASE IF EXISTS {database}")


def _well(server: servers.Server) -> None:
    """Whatever a test did to a server that all share: it runs."""
    server.thaw()
    server.start()


@pytest.fixture(params=["postgresql", "mysql", "mariadb", "sqlite"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A fresh, empty database of each kind."""
    name: str = request.param
    if name == "sqlite":
        yield Database(name, f"sqlite:///{tmp_path / 'coordination.db'}")
        return
    server = request.getfixturevalue("postgres" if name == "postgresql" else name)
    with new_database(name, server) as fresh:
        yield fresh


class Files:
    """A fresh, empty folder on a file server for one test; `settings` reach it (url, login, trust)."""

    def __init__(self, name: str, server: servers.Server, root: Path) -> None:
        self.name, self.server, self.root = name, server, root
        self.scheme, self.url = server.scheme, server.url_of(root)
        self.settings: dict[str, Any] = server.settings(root)

    def __repr__(self) -> str:
        return f"<{self.name} {self.url}>"

    def put(self, name: Union[str, bytes], data: bytes = b"", mtime: Optional[float] = None) -> Path:
        """A file appears at once in the folder, complete; clients may read, rename and delete it."""
        return self.server.put(os.path.join(os.fsencode(self.root), os.fsencode(name)), data, mtime)

    def names(self) -> list[str]:
        """What is in the folder now, sorted; folders below it not looked into."""
        return sorted(os.listdir(self.root))


@contextlib.contextmanager
def new_folder(name: str, server: servers.Server) -> Iterator[Files]:
    """A fresh folder on that server, removed at the end."""
    _well(server)
    if isinstance(server, servers.Pyftpd):
        server.revive()
    root = server.folder()
    try:
        yield Files(name, server, root)
    finally:
        _well(server)
        shutil.rmtree(root, ignore_errors=True)


def fetch(server: ftpcoord.FileServer, path: str, size: int, write: Callable[[memoryview], object], *more: Any) -> None:
    """One file alone; raises what became of it."""
    ((_, problem),) = list(server.fetch_many([ftpcoord.Job(path, size, write, *more)]))
    if problem is not None:
        raise problem


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FILE_SERVERS = {
    "vsftpd": "vsftpd_plain",
    "vsftpd-explicit": "vsftpd_explicit",
    "vsftpd-implicit": "vsftpd_implicit",
    "sshd": "sshd",
    "pyftpd": "pyftpd",
    "proftpd-explicit": "proftpd_explicit",
    "proftpd-list": "proftpd_list",
    "proftpd-refusing": "proftpd_refusing",
    "proftpd-sftp": "proftpd_sftp",
    "pure-ftpd": "pure_ftpd_plain",
    "pure-ftpd-explicit": "pure_ftpd_explicit",
    "asyncssh": "asyncssh",
}


@pytest.fixture(params=list(FILE_SERVERS))
def file_server(request: pytest.FixtureRequest) -> Iterator[Files]:
    """A fresh, empty folder on each kind of file server."""
    with new_folder(request.param, request.getfixturevalue(FILE_SERVERS[request.param])) as files:
        yield files


# What most tests with processes of members need: a folder of a file server, a database, a crew.


@pytest.fixture
def files(pyftpd: servers.Pyftpd) -> Iterator[Files]:
    with new_folder("pyftpd", pyftpd) as folder:
        yield folder


@pytest.fixture
def sftp(sshd: servers.Sshd) -> Iterator[Files]:
    with new_folder("sshd", sshd) as folder:
        yield folder


@pytest.fixture
def sqlite(tmp_path: Path) -> Database:
    """A file that does not exist yet."""
    return Database("sqlite", f"sqlite:///{tmp_path / 'coordination.db'}")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A folder for what is delivered."""
    folder = tmp_path / "delivered"
    folder.mkdir()
    return folder


@pytest.fixture
def postgresql(postgres: servers.Postgres) -> Iterator[Database]:
    with new_database("postgresql", postgres) as database:
        yield database


@pytest.fixture
def crew(sqlite: Database, files: Files, tmp_path: Path) -> Iterator[Crew]:
    from members import Crew  # which imports this module

    with Crew(tmp_path, sqlite, files) as crew:
        yield crew


@pytest.fixture(autouse=True)
def logger() -> logging.Logger:
    """The product's, as it is in a new process, whatever a command that another test ran has made of it."""
    ftpcoord.logger.handlers[:] = [
        handler for handler in ftpcoord.logger.handlers if not isinstance(handler, ftpcoord.LineHandler)
    ]
    ftpcoord.logger.propagate = True
    ftpcoord.logger.setLevel(logging.NOTSET)
    return ftpcoord.logger


@pytest.fixture
def in_the_background() -> Iterator[None]:
    """Leaves the processor to the tests that have seconds to keep."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, before + 5)
    yield
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, before)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, logger: logging.Logger) -> Logged:
    """What the product has said since the test began, all of it."""
    ftpcoord.log.flush(30)
    caplog.clear()
    caplog.set_level(logging.INFO, logger.name)

    def records() -> list[logging.LogRecord]:
        assert ftpcoord.log.flush(30)
        return [record for record in caplog.records if record.name == logger.name]

    return records


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> memory.Clock:
    """The member's clock, for rows in memory, too."""
    clock = memory.Clock()
    monkeypatch.setattr("ftpcoord.boot_clock", clock)
    return clock


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Shows what the tests marked `summary` have printed: what was done to the product, and what it made of it."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        if report.when == "call" and "summary" in report.keywords and report.capstdout:
            terminalreporter.section(report.nodeid.partition("::")[2])
            terminalreporter.write(report.capstdout)
