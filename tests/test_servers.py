"""The servers that the other tests stand on: each answers a plain client, faults are what they say."""

from __future__ import annotations

import contextlib
import ftplib
import io
import os
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Union

import pytest
import servers
from conftest import Database, Files, need
from servers import wait_for


def logged_in(server: servers.Server, timeout: float = 0.5) -> bool:
    try:
        if isinstance(server, servers.Postgres):
            servers.pg_login(server.port, timeout=timeout).close()
        else:
            servers.mysql_login(server.port, timeout=timeout).close()
    except Exception:
        return False
    return True


@pytest.fixture(params=["postgres", "mysql", "mariadb"])
def database_server(request: pytest.FixtureRequest) -> Iterator[Union[servers.Postgres, servers.Mysql]]:
    server = request.getfixturevalue(request.param)
    yield server
    server.thaw()
    server.start()


def test_each_test_has_an_empty_database_of_its_own(database: Database) -> None:
    database.execute("CREATE TABLE t (n INTEGER)")
    database.execute("INSERT INTO t VALUES (7)")
    assert database.execute("SELECT n FROM t") == [(7,)]


def test_the_mysql_is_not_a_mariadb(mysql: servers.Mysql, mariadb: servers.Mysql) -> None:
    for server, is_mariadb in ((mysql, False), (mariadb, True)):
        said = Database(server.name, server.url, server).execute("SELECT VERSION()")[0][0]
        assert ("MariaDB" in said) == is_mariadb, said


def test_a_database_user_has_no_rights_beyond_its_databases(mysql: servers.Mysql, mariadb: servers.Mysql) -> None:
    for server in (mysql, mariadb):
        with pytest.raises(Exception, match="denied"):
            Database(server.name, server.url, server).execute("SET GLOBAL read_only = 1")


def test_a_frozen_database_answers_nobody_until_it_is_thawed(database_server: servers.Server) -> None:
    database_server.freeze()
    assert not logged_in(database_server)
    database_server.thaw()
    wait_for(lambda: logged_in(database_server, 5), 10, "a login after the thaw")


def test_a_database_keeps_port_and_data_over_restart_and_kill(database: Database) -> None:
    if database.server is None:
        pytest.skip("SQLite is no server")
    database.execute("CREATE TABLE t (n INTEGER)")
    for end in (database.server.stop, database.server.kill):
        end()
        assert not logged_in(database.server)
        database.server.start()
        assert database.execute("SELECT COUNT(*) FROM t") == [(0,)]
    assert len(database.server.pids()) >= 1


@pytest.mark.parametrize("kind", ["postgresql", "mysql", "mariadb"])
def test_a_database_with_tls_shows_a_certificate_that_its_ca_signed(kind: str) -> None:
    need(kind)
    make = {"postgresql": servers.postgres, "mysql": servers.mysql, "mariadb": servers.mariadb}[kind]
    with make(tls=True) as server:
        context = ssl.create_default_context(cafile=str(server.ca))
        if isinstance(server, servers.Postgres):
            with contextlib.closing(servers.pg_login(server.port, ssl_context=context)) as connection:
                cursor = connection.cursor()
                cursor.execute("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
                assert cursor.fetchone()[0]
        else:
            with contextlib.closing(servers.mysql_login(server.port, ssl=context)) as connection:
                cursor = connection.cursor()
                cursor.execute("SHOW STATUS LIKE 'Ssl_cipher'")
                assert cursor.fetchone()[1]


@pytest.mark.parametrize("kind", ["mysql", "mariadb"])
def test_a_database_can_do_without_tls(kind: str) -> None:
    need(kind)
    with (servers.mysql if kind == "mysql" else servers.mariadb)(tls=False) as server:
        with pytest.raises(Exception, match=r"(?i)SSL"):
            servers.mysql_login(server.port, ssl=ssl.create_default_context())


def test_a_replica_follows_and_can_be_promoted(postgres: servers.Postgres) -> None:
    with servers.pg_replica(postgres) as replica:
        here, there = Database("p", postgres.url, postgres), Database("r", replica.url, replica)
        here.execute("CREATE TABLE followed (n INTEGER)")
        try:
            wait_for(
                lambda: there.execute("SELECT to_regclass('followed')") != [(None,)],
                10,
                "the table on the replica",
            )
            assert there.execute("SELECT pg_is_in_recovery()") == [(True,)]
            replica.promote()
            assert there.execute("SELECT pg_is_in_recovery()") == [(False,)]
        finally:
            here.execute("DROP TABLE followed")


def test_pgbouncer_passes_transactions_on(postgres: servers.Postgres) -> None:
    need("pgbouncer")
    with (
        servers.pgbouncer(postgres) as bouncer,
        contextlib.closing(servers.pg_login(bouncer.port)) as connection,
    ):
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        assert cursor.fetchone()[0] == 1


def test_a_file_server_serves_what_is_put_and_lets_its_user_delete_it(file_server: Files) -> None:
    path = file_server.put("a b.txt", b"data", mtime=1_700_000_000)
    assert file_server.names() == ["a b.txt"]
    before = file_server.server.connections()
    if file_server.scheme == "sftp":
        with contextlib.closing(servers.sftp_login(file_server.server)) as client:
            files = client.open_sftp()
            assert files.stat(str(path)).st_mtime == 1_700_000_000
            with files.open(str(path)) as file:
                assert file.read() == b"data"
            files.mkdir(f"{file_server.root}/done")
            files.remove(str(path))
            assert Path(files.normalize(".")) == file_server.server.root
    else:
        with contextlib.closing(servers.ftp_login(file_server.server)) as ftp:
            assert ftp.pwd() == str(file_server.server.root)
            names = {os.path.basename(name) for name in ftp.nlst(str(file_server.root))} - {".", ".."}
            assert names == {"a b.txt"}
            assert ftp.sendcmd(f"MDTM {path}") == "213 20231114221320"
            data = io.BytesIO()
            ftp.retrbinary(f"RETR {path}", data.write)
            assert data.getvalue() == b"data"
            ftp.storbinary(f"STOR {file_server.root}/new", io.BytesIO(b"x" * 1000))
            assert (file_server.root / "new").read_bytes() == b"x" * 1000
            ftp.delete(f"{file_server.root}/new")
            ftp.mkd(f"{file_server.root}/done")
            ftp.delete(str(path))
            ftp.quit()
    assert file_server.names() == ["done"]
    if file_server.server.connect_pattern:
        wait_for(lambda: file_server.server.connections() == before + 1, 5, "the connection in the log")


def test_the_wait_for_a_file_servers_start_leaves_nothing_in_its_log(file_server: Files) -> None:
    before = file_server.server.connections()
    file_server.server.restart()
    assert file_server.server.connections() == before


def test_names_that_are_not_utf8_can_be_put(file_server: Files) -> None:
    file_server.put(b"caf\xe9")
    assert os.listdir(os.fsencode(file_server.root)) == [b"caf\xe9"]


def test_a_password_opens_sftp_too(sshd: servers.Sshd) -> None:
    import paramiko

    if not sshd.password:
        pytest.skip("sshd does not run as root here: keys alone")
    with contextlib.closing(paramiko.SSHClient()) as client:
        client.load_host_keys(str(sshd.known_hosts))
        client.connect(sshd.host, sshd.port, sshd.user, sshd.password, allow_agent=False, look_for_keys=False)
        assert client.open_sftp().listdir(str(sshd.root)) is not None


def test_a_new_host_key_is_refused_by_the_old_known_hosts() -> None:
    import paramiko

    need("sshd")
    with servers.sshd() as server:
        server.new_host_keys()
        with pytest.raises(paramiko.BadHostKeyException):
            servers.sftp_login(server)


def test_data_connections_without_session_reuse_are_refused(vsftpd_explicit: servers.Vsftpd) -> None:
    ftp = ftplib.FTP_TLS(context=ssl.create_default_context(cafile=str(vsftpd_explicit.ca)), timeout=10)
    with contextlib.closing(ftp):
        ftp.connect(vsftpd_explicit.host, vsftpd_explicit.port)
        ftp.login(vsftpd_explicit.user, vsftpd_explicit.password)
        ftp.prot_p()
        with pytest.raises((ftplib.Error, EOFError, OSError)):
            ftp.retrlines("LIST", lambda line: None)


@pytest.mark.parametrize("mode", ["plain", "explicit", "implicit"])
def test_pyftpd_has_mlsd_in_each_mode_unless_told_otherwise(mode: str) -> None:
    need("pyftpd")
    with servers.pyftpd(mode) as server:
        server.put("a", b"12")
        with contextlib.closing(servers.ftp_login(server)) as ftp:
            assert [name for name, facts in ftp.mlsd(str(server.root)) if facts["type"] == "file"] == ["a"]
    with (
        servers.pyftpd(mode, without=["MLSD"]) as server,
        contextlib.closing(servers.ftp_login(server)) as ftp,
    ):
        with pytest.raises(Exception, match=r"50[02]"):
            list(ftp.mlsd())


def test_a_failed_start_says_what_the_server_said() -> None:
    need("postgresql")
    with pytest.raises(RuntimeError, match="no_such_option"):
        servers.postgres(options={"no_such_option": "1"})


def test_servers_end_when_their_process_is_killed() -> None:
    need("postgresql")
    need("sshd")
    code = (
        "import servers, sys\na, b = servers.postgres(), servers.sshd()\na.freeze()\n"
        "print(a.port, b.port, a.dir, b.dir, flush=True)\nsys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parent
    )
    assert process.stdout is not None and process.stdin is not None
    first, second, *folders = process.stdout.readline().decode().split()
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    wait_for(lambda: refused(int(first)) and refused(int(second)), 15, "the ports to be closed")
    wait_for(lambda: not any(os.path.exists(folder) for folder in folders), 15, "the folders to be removed")


def refused(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((servers.HOST, port)) != 0


@pytest.fixture
def echo() -> Iterator[int]:
    """Port of a server that sends back what it gets."""
    code = (
        "import socketserver\nclass H(socketserver.StreamRequestHandler):\n def handle(self):\n"
        "  while True:\n   data = self.request.recv(65536)\n   if not data: break\n"
        "   self.request.sendall(data)\n"
        "s = socketserver.ThreadingTCPServer(('127.0.0.1', 0), H)\ns.daemon_threads = True\n"
        "print(s.server_address[1], flush=True)\ns.serve_forever()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


@contextlib.contextmanager
def answering(port: int) -> Iterator[tuple[servers.Proxy, socket.socket]]:
    """A proxy before that server, and a connection through it that has had an answer."""
    with (
        servers.Proxy(servers.HOST, port) as proxy,
        socket.create_connection((servers.HOST, proxy.port), 10) as client,
    ):
        client.sendall(b"a")
        assert client.recv(9) == b"a"
        yield proxy, client


def test_a_proxy_delays_and_counts(echo: int) -> None:
    with answering(echo) as (proxy, client):
        proxy.delay = 0.1
        began = time.monotonic()
        for _ in range(2):
            client.sendall(b"b")
            assert client.recv(9) == b"b"
        assert 0.4 <= time.monotonic() - began < 2
        assert (proxy.bytes, proxy.round_trips, proxy.connections) == (6, 2, 1)


def test_a_proxy_passes_megabytes_and_an_end_in_each_direction(echo: int) -> None:
    data = os.urandom(3_000_000)
    with servers.Proxy(servers.HOST, echo, delay=0.01) as proxy:
        with socket.create_connection((servers.HOST, proxy.port), 10) as client:

            def send() -> None:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)

            sender = threading.Thread(target=send)
            sender.start()
            got = b"".join(iter(lambda: client.recv(65536), b""))
            sender.join()
        assert got == data


def test_a_cut_proxy_resets_its_connections_and_takes_new_ones(echo: int) -> None:
    with answering(echo) as (proxy, client):
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            client.recv(9)
        with socket.create_connection((servers.HOST, proxy.port), 10) as client:
            client.sendall(b"a")
            assert client.recv(9) == b"a"


def test_a_black_hole_is_silent_and_gives_back_what_it_swallowed(echo: int) -> None:
    with answering(echo) as (proxy, client):
        proxy.blackhole()
        client.sendall(b"b")
        with socket.create_connection((servers.HOST, proxy.port), 10) as late:
            late.sendall(b"c")
            for end in (client, late):
                end.settimeout(0.3)
                with pytest.raises(TimeoutError if sys.version_info >= (3, 10) else socket.timeout):
                    end.recv(9)
                end.settimeout(10)
            proxy.blackhole(False)
            assert (client.recv(9), late.recv(9)) == (b"b", b"c")


def test_a_refusing_proxy_keeps_its_port_and_its_connections(echo: int) -> None:
    with answering(echo) as (proxy, client):
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((servers.HOST, proxy.port), 10)
        client.sendall(b"b")
        assert client.recv(9) == b"b"
        proxy.refuse(False)
        socket.create_connection((servers.HOST, proxy.port), 10).close()


def test_sqlite_has_a_file_of_its_own(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "x.db")) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
