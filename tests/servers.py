"""Real servers on loopback for the tests, the demo and the benchmark, thrown away after use.

    with servers.postgres() as database, servers.vsftpd("explicit") as files:
        ...                              # database.url, files.url, files.password, files.root, files.ca
        database.freeze()                # SIGSTOP; thaw(), restart(), kill(), stop(), start()

Each runs as plain processes in a temporary folder of its own, on a port that nobody else takes; where the
server allows it under an ordinary user.  All ends with this process, even when that is killed (`_Reaper`).
`available(name)` tells whether a server can be started here; `setup_env.ensure_servers()` installs them.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import errno
import ftplib
import getpass
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Callable, ClassVar, Optional, TypeVar, Union
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parent))
import setup_env

HOST = "127.0.0.1"
FTP_USER = "ftptest"
PASSWORD = "secret"
TEMPLATE_VERSION = "2"  # raise it when a _build_* function changes
NOTHING: Mapping[str, str] = {}


# ----------------------------------------------------------------------------- processes


def _parents(of: Optional[Collection[int]] = None) -> dict[int, tuple[int, str]]:
    """Of each process, or of these: its parent and its start time (which tells a process from a later one with its
    id)."""
    found: dict[int, tuple[int, str]] = {}
    if os.path.isdir("/proc/self"):
        for pid in of if of is not None else [int(name) for name in os.listdir("/proc") if name.isdigit()]:
            try:
                with open(f"/proc/{pid}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            if fields[0] not in (b"Z", b"X"):
                found[pid] = (int(fields[1]), fields[19].decode())
        return found
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,lstart="], stdout=subprocess.PIPE).stdout.decode()
    for line in listing.splitlines():
        number, parent, started = line.split(None, 2)
        found[int(number)] = (int(parent), started)
    return found


def _tree(pid: int) -> dict[int, str]:
    """The process and all its descendants, each with its start time; empty if it has ended."""
    parents = _parents()
    if pid not in parents:
        return {}
    found = {pid: parents[pid][1]}
    grown = True
    while grown:
        grown = False
        for child, (parent, started) in parents.items():
            if parent in found and child not in found:
                found[child] = started
                grown = True
    return found


def _signal(processes: Mapping[int, str], number: int) -> None:
    now = _parents(processes)
    for pid, started in processes.items():
        if pid in now and now[pid][1] == started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _stopped(pid: int) -> bool:
    """Whether all threads of a process stand still: on a busy machine that takes a moment after the signal."""
    try:
        states = [stat.read_text().rpartition(")")[2].split()[0] for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    except OSError:
        return True  # it has ended, or this is no Linux
    return all(state in "TtZX" for state in states)


def _finish(processes: Mapping[int, str]) -> None:
    """SIGKILL these and what they have started meanwhile, and wait until they are gone."""
    _signal(processes, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        now = _parents(processes)
        if not any(now.get(pid, (0, ""))[1] == started for pid, started in processes.items()):
            return
        time.sleep(0.005)


class _Reaper:
    """A process that ends our servers when we are gone, however that came about (SIGKILL, a time limit)."""

    _pipe: Optional[IO[bytes]] = None
    _owner = 0
    _lock = threading.Lock()

    @classmethod
    def tell(cls, *words: object) -> None:
        with cls._lock:
            if cls._pipe is None or cls._owner != os.getpid():
                process = subprocess.Popen(
                    [sys.executable, __file__, "--reaper"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
                cls._pipe, cls._owner = process.stdin, os.getpid()
                process.returncode = 0  # it outlives us: no warning about that
            assert cls._pipe is not None
            cls._pipe.write(json.dumps(words).encode() + b"\n")
            cls._pipe.flush()

    @staticmethod
    def main() -> None:
        running: dict[int, str] = {}
        folders: set[str] = set()
        for line in sys.stdin:
            what, *words = json.loads(line)
            if what == "started":
                running[words[0]] = words[1]
            elif what == "folder":
                folders.add(words[0])
            elif what == "closed":
                running.pop(words[0], None)
                folders.discard(words[1])
        trees = {
            pid: started
            for main in running
            for pid, started in _tree(main).items()
            if running[main] == _tree(main).get(main)
        }
        _signal(trees, signal.SIGCONT)
        mains = {pid: started for pid, started in trees.items() if pid in running}
        _signal(mains, signal.SIGQUIT)  # PostgreSQL frees its shared memory at this one
        deadline = time.monotonic() + 3
        while mains and time.monotonic() < deadline:
            now = _parents()
            mains = {pid: started for pid, started in mains.items() if now.get(pid, (0, ""))[1] == started}
            time.sleep(0.02)
        _finish(trees)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


# ----------------------------------------------------------------------------- ports, folders, users

_reserved: dict[int, IO[bytes]] = {}


def free_port() -> int:
    """A loopback port that no other process of these tests takes as long as this one lives.

    Below the range of outgoing connections (32768 and up), which would take it between a stop and a start.
    """
    folder = Path(tempfile.gettempdir(), f"ftpcoord-ports-{os.getuid() if hasattr(os, 'getuid') else ''}")
    folder.mkdir(exist_ok=True)
    chance = random.SystemRandom()
    for _ in range(1000):
        port = chance.randrange(15000, 32000)
        lock = open(folder / str(port), "ab")  # noqa: SIM115 - held as long as we live
        try:
            try:
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:
                pass
            with socket.socket() as probe:
                probe.bind((HOST, port))
        except OSError:
            lock.close()
            continue
        _reserved[port] = lock
        return port
    raise RuntimeError("no free port between 15000 and 32000")


def _new_folder(name: str, in_memory: bool) -> Path:
    where = None
    with contextlib.suppress(OSError):
        if in_memory and os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 2 << 30:
            where = "/dev/shm"
    folder = Path(tempfile.mkdtemp(prefix=f"ftpcoord-{name}-", dir=where))
    folder.chmod(0o755)
    _Reaper.tell("folder", str(folder))
    return folder


def _ids(user: str) -> Optional[tuple[int, int]]:
    try:
        import pwd

        entry = pwd.getpwnam(user)
    except (ImportError, KeyError):
        return None
    return entry.pw_uid, entry.pw_gid


def _service_ids(preferred: str) -> Optional[tuple[int, int]]:
    """User and group that a server which refuses root runs under; None: our own."""
    return (_ids(preferred) or _ids("nobody") or (65534, 65534)) if setup_env.IS_ROOT else None


def _as(ids: Optional[tuple[int, int]]) -> list[str]:
    return ["setpriv", f"--reuid={ids[0]}", f"--regid={ids[1]}", "--clear-groups", "--"] if ids else []


def _ftp_ids() -> tuple[int, int]:
    """User and group that owns served files.  As root: the local user ftptest, made if it is missing."""
    if not setup_env.IS_ROOT:
        return os.getuid(), os.getgid()
    with setup_env.locked(setup_env.CACHE / "user.lock"):
        found = _ids(FTP_USER)
        if not found:
            _run(["useradd", "--create-home", "--shell", "/bin/sh", FTP_USER])
            _run(["chpasswd"], stdin=f"{FTP_USER}:{PASSWORD}\n")
            found = _ids(FTP_USER)
    assert found
    return found


def chown(path: Union[str, bytes, Path], ids: Optional[tuple[int, int]]) -> None:
    if ids and setup_env.IS_ROOT:
        os.chown(path, *ids)


def _run(command: Sequence[str], stdin: str = "", env: Mapping[str, str] = NOTHING) -> str:
    done = subprocess.run(
        command,
        input=stdin.encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **env},
        cwd="/",
    )
    text = done.stdout.decode(errors="replace")
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} gave {done.returncode}: {text.strip()[-2000:]}")
    return text


def _template(key: str, build: Callable[[Path], None], ids: Optional[tuple[int, int]] = None) -> Path:
    """A folder for copying that `build` fills once on this machine; its content depends on the key alone."""
    key = re.sub(r"[^A-Za-z0-9.]+", "-", f"{key}-{ids[0] if ids else os.getuid()}-{TEMPLATE_VERSION}")
    folder = setup_env.CACHE / "templates"
    with setup_env.locked(folder / f"{key}.lock"):
        if not (folder / key).exists():
            fresh = Path(tempfile.mkdtemp(dir=folder))
            fresh.chmod(0o755)
            chown(fresh, ids)
            try:
                build(fresh)
                fresh.rename(folder / key)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
    return folder / key


def _build_tls(folder: Path) -> None:
    """ca.pem signs cert.pem (key.pem; for 127.0.0.1) and client.pem (client.key); other-ca.pem nothing."""
    config = folder / "openssl.cnf"
    config.write_text(
        "[req]\ndistinguished_name=dn\nprompt=no\n[dn]\nCN=localhost\n"
        "[ca]\nbasicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n"
        "subjectKeyIdentifier=hash\n"
        "[leaf]\nbasicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature,keyEncipherment\n"
        "extendedKeyUsage=serverAuth,clientAuth\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
        "subjectAltName=IP:127.0.0.1,DNS:localhost\n"
    )
    new = ["openssl", "req", "-config", str(config), "-newkey", "rsa:2048", "-nodes", "-sha256"]
    for name in ("ca", "other-ca"):
        _run(
            [
                *new,
                "-x509",
                "-extensions",
                "ca",
                "-days",
                "3650",
                "-subj",
                f"/CN=ftpcoord test {name}",
                "-keyout",
                f"{folder}/{name}.key",
                "-out",
                f"{folder}/{name}.pem",
            ]
        )
    for name, key in (("cert", "key.pem"), ("client", "client.key")):
        _run([*new, "-keyout", f"{folder}/{key}", "-out", f"{folder}/{name}.csr", "-subj", f"/CN={name}"])
        _run(
            [
                "openssl",
                "x509",
                "-req",
                "-in",
                f"{folder}/{name}.csr",
                "-CA",
                f"{folder}/ca.pem",
                "-CAkey",
                f"{folder}/ca.key",
                "-CAcreateserial",
                "-days",
                "3650",
                "-sha256",
                "-extfile",
                str(config),
                "-extensions",
                "leaf",
                "-out",
                f"{folder}/{name}.pem",
            ]
        )


def tls_files(folder: Path, ids: Optional[tuple[int, int]] = None) -> Path:
    """A copy of the certificates in `folder`/tls, readable by that user."""
    tls = Path(shutil.copytree(_template("tls", _build_tls), folder / "tls"))
    for path in (tls, *tls.iterdir()):
        chown(path, ids)
    return tls


# ----------------------------------------------------------------------------- servers

Self = TypeVar("Self", bound="Server")


class Server:
    """A server that is running (after its factory function) in `dir`, on `port` of 127.0.0.1."""

    stop_signal = signal.SIGTERM
    scheme = ""
    user = "app"
    password = PASSWORD
    admin_url = ""  # databases: a login that may do everything
    root: Path  # file servers: the folder served, and its owner
    ids: Optional[tuple[int, int]] = None
    ca: Path
    key: Optional[Path] = None
    known_hosts: Path
    connect_pattern = ""  # file servers: a connection in the log

    def __init__(self, name: str, in_memory: bool = True, env: Mapping[str, str] = NOTHING) -> None:
        self.name, self.host, self.port, self.url = name, HOST, free_port(), ""
        self.dir = _new_folder(name, in_memory)
        self.env = dict(env)
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._own_noise: list[tuple[int, int]] = []
        self._start_of_log = 0  # where it stood at the last start
        self._closed = self._frozen = False
        _all.append(self)

    # What each kind of server fills in.
    def command(self) -> list[str]:
        raise NotImplementedError

    def probe(self) -> None:
        """Log in as a client would; an exception means that the server is not ready."""
        raise NotImplementedError

    def hopeless(self, problem: Exception) -> bool:
        """Whether waiting will not mend what `probe` has raised."""
        return False

    def settled(self) -> bool:
        """Whether all is over that `probe` has caused."""
        return True

    @property
    def log_file(self) -> Path:
        return self.dir / "log"

    # What a test does with it.
    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{self.name} {self.url}>"

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, timeout: float = 60) -> None:
        """Start it and wait until a client can log in; RuntimeError with the end of its log if that fails."""
        if self.running():
            return
        before = self._start_of_log = self._log_size()
        # vsftpd reports its errors on descriptor 0: all three are the same file, readable and writable.
        with open(self.dir / "out", "a+b") as out:
            self._process = subprocess.Popen(
                self.command(),
                stdin=out,
                stdout=out,
                stderr=out,
                cwd=self.dir,
                start_new_session=True,
                env={**os.environ, "HOME": str(self.dir), **self.env},
            )
        _Reaper.tell("started", self._process.pid, _tree(self._process.pid).get(self._process.pid, ""))
        deadline = time.monotonic() + timeout
        problem: Optional[Exception] = None
        while True:
            if not self.running():
                raise RuntimeError(
                    f"{self.name} ended with code {self._process.returncode} at its start:\n{self._tail()}"
                )
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # half-made connections of the probes
                    self.probe()
                break
            except Exception as error:
                problem = error
            if time.monotonic() > deadline or self.hopeless(problem):
                self.kill()
                raise RuntimeError(f"{self.name} gave no login ({problem!r}):\n{self._tail()}")
            time.sleep(0.01)
        if not self._own_noise:
            wait_for(self.settled, 5, f"{self.name} to have ended the probe's session")
        else:  # clients that waited for its return may be in: their sessions do not end with the probe's
            with contextlib.suppress(AssertionError):
                wait_for(self.settled, 0.5)
        self._own_noise.append((before, self._log_size()))

    def stop(self, timeout: float = 30) -> None:
        """End it as its service manager would; what is left after `timeout` seconds is killed."""
        self._end(self.stop_signal, timeout)

    def kill(self) -> None:
        """SIGKILL all its processes, as a power failure of that machine would."""
        self._end(signal.SIGKILL, 10)

    def _end(self, number: int, timeout: float) -> None:
        if self._process is None:
            return
        processes = _tree(self._process.pid)
        if number == signal.SIGKILL:
            _signal(processes, number)
        else:
            _signal(processes, signal.SIGCONT)
            self._process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        _finish({**_tree(self._process.pid), **processes})
        self._process.wait()

    def restart(self) -> None:
        """Stop and start with the same port and data."""
        self.stop()
        self.start()

    def freeze(self) -> None:
        """SIGSTOP all its processes: connections stay open, nothing answers."""
        done: dict[int, str] = {}
        self._frozen = True
        while self._process is not None and _tree(self._process.pid) != done:
            done = _tree(self._process.pid)
            _signal(done, signal.SIGSTOP)
        wait_for(lambda: all(map(_stopped, done)), 10, f"{self.name} to stand still")

    def thaw(self) -> None:
        """SIGCONT all its processes, after `freeze`."""
        if self._process is not None and self._frozen:
            _signal(_tree(self._process.pid), signal.SIGCONT)
            self._frozen = False

    def pids(self) -> list[int]:
        """Its processes, the main one first."""
        return list(_tree(self._process.pid)) if self._process else []

    def log(self) -> str:
        """What the server has logged, without what our own waiting for its start caused."""
        text = self.log_file.read_bytes() if self.log_file.exists() else b""
        for begin, end in reversed(self._own_noise):
            text = text[:begin] + text[end:]
        return text.decode(errors="replace")

    def connections(self) -> int:
        """File servers: how many connections clients have made so far, by the log."""
        return len(re.findall(self.connect_pattern, self.log()))

    def close(self) -> None:
        """End it at once and remove its folder."""
        if not self._closed:
            self._closed = True
            self._end(self._close_signal, 5)
            shutil.rmtree(self.dir, ignore_errors=True)
            _Reaper.tell("closed", self._process.pid if self._process else 0, str(self.dir))
            _all.remove(self)

    _close_signal = signal.SIGKILL

    def _log_size(self) -> int:
        return self.log_file.stat().st_size if self.log_file.exists() else 0

    def _tail(self) -> str:
        lines: list[str] = []
        for path in dict.fromkeys((self.dir / "out", self.log_file)):
            if path.exists():
                lines += path.read_text("utf-8", "replace").splitlines()[-30:]
        return "\n".join(lines) or "(it has logged nothing)"

    # File servers.
    def url_of(self, folder: Union[str, Path]) -> str:
        """URL of a folder below `root`."""
        path = os.fsencode(str(folder))
        return f"{self.scheme}://{self.user}@{self.host}:{self.port}{quote(path)}"

    def settings(self, folder: Union[str, Path, None] = None) -> dict[str, Any]:
        """The program's settings that reach a folder of this file server: url, login and trust."""
        found: dict[str, Any] = {"url": self.url_of(folder or self.root)}
        if self.key:
            found["key"] = str(self.key)
        else:
            found["password"] = self.password
        for name, attribute in (("known_hosts", "known_hosts"), ("ca_file", "ca")):
            if hasattr(self, attribute):
                found[name] = str(getattr(self, attribute))
        return found

    def put(self, path: Union[str, bytes, Path], data: bytes = b"", mtime: Optional[float] = None) -> Path:
        """A file appears below `root` at once, complete, owned by the user that clients log in as."""
        name = path if isinstance(path, bytes) else os.fsencode(str(path))
        target = os.path.join(os.fsencode(self.root), name)
        missing, parent = [], os.path.dirname(target)
        while not os.path.isdir(parent):
            missing.append(parent)
            parent = os.path.dirname(parent)
        for parent in reversed(missing):
            os.mkdir(parent)
            chown(parent, self.ids)
        handle, fresh = tempfile.mkstemp(dir=os.fsencode(self.dir))
        with open(handle, "wb") as file:
            file.write(data)
        os.chmod(fresh, 0o644)
        chown(fresh, self.ids)
        if mtime is not None:
            os.utime(fresh, (mtime, mtime))
        os.replace(fresh, target)
        return Path(os.fsdecode(target))

    def folder(self, name: str = "") -> Path:
        """A fresh empty folder below `root` that clients may write to."""
        path = self.root / (name or f"in{next(_numbers)}")
        path.mkdir()
        chown(path, self.ids)
        return path


_all: list[Server] = []
_numbers = itertools.count(1)


@atexit.register
def close_all() -> None:
    """End all servers of this process."""
    for server in list(_all):
        with contextlib.suppress(Exception):
            server.close()


def wait_for(condition: Callable[[], Any], timeout: float = 10, message: str = "") -> Any:
    """The condition's first true value; AssertionError if there is none within `timeout` seconds."""
    began = time.monotonic()
    while True:
        found = condition()
        if found:
            return found
        waited = time.monotonic() - began
        if waited > timeout:
            raise AssertionError(f"waited {timeout:g} s in vain for {message or condition}")
        time.sleep(min(0.04, 0.01 + waited / 40))


def _started(server: Self) -> Self:
    try:
        server.start()
    except BaseException:
        server.close()
        raise
    return server


# ----------------------------------------------------------------------------- databases


def pg_login(port: int, user: str = "app", database: str = "app", timeout: float = 5, **more: Any) -> Any:
    """A pg8000 connection."""
    import pg8000.dbapi

    more.setdefault("ssl_context", False)  # else each connection reads all of the system's CAs
    sock = socket.create_connection((HOST, port), timeout)  # pg8000 would not close its own when a login fails
    try:
        return pg8000.dbapi.connect(user, sock=sock, database=database, password=PASSWORD, **more)
    except BaseException:
        sock.close()
        raise


def mysql_login(port: int, user: str = "app", database: str = "app", timeout: float = 5, **more: Any) -> Any:
    """A PyMySQL connection."""
    import pymysql

    more.setdefault("ssl_disabled", "ssl" not in more)  # as above
    return pymysql.connect(
        host=HOST,
        port=port,
        user=user,
        password=PASSWORD,
        database=database,
        connect_timeout=max(1, int(timeout)),
        read_timeout=timeout,
        write_timeout=timeout,
        **more,
    )


class Postgres(Server):
    """PostgreSQL: role app owns the database app and may create others; superuser postgres."""

    stop_signal = signal.SIGINT  # "fast": SIGTERM would wait for the clients to leave
    _close_signal = signal.SIGQUIT  # "immediate", but frees shared memory

    def __init__(
        self, name: str, fsync: bool, tls: Optional[bool], options: Mapping[str, str], env: Mapping[str, str]
    ) -> None:
        super().__init__(name, in_memory=not fsync, env=env)
        found = setup_env.postgres_bin()
        assert found
        self.bin, self.ids = found, _service_ids("postgres")
        self.copying = ""  # how CREATE DATABASE does it fastest
        self.url = f"postgresql://app:{PASSWORD}@{HOST}:{self.port}/app"
        self.admin_url = f"postgresql://postgres:{PASSWORD}@{HOST}:{self.port}/app"
        chown(self.dir, self.ids)
        switch = "on" if fsync else "off"
        self.options: dict[str, str] = {
            "listen_addresses": HOST,
            "port": str(self.port),
            "unix_socket_directories": str(self.dir),
            "fsync": switch,
            "full_page_writes": switch,
            "max_connections": "200",
            # Not /dev/shm: there it would stay behind after a SIGKILL.
            "dynamic_shared_memory_type": "mmap",
        }
        if tls:
            files = tls_files(self.dir, self.ids)
            self.ca = files / "ca.pem"
            self.options.update(ssl="on", ssl_cert_file=f"{files}/cert.pem", ssl_key_file=f"{files}/key.pem")
        self.options.update(options)

    def command(self) -> list[str]:
        settings = [word for name, value in self.options.items() for word in ("-c", f"{name}={value}")]
        return [*_as(self.ids), str(self.bin / "postgres"), "-D", str(self.dir / "data"), *settings]

    @property
    def log_file(self) -> Path:
        return self.dir / "out"

    def probe(self) -> None:
        with contextlib.closing(pg_login(self.port)) as connection:
            connection.cursor().execute("SELECT 1")

    def promote(self) -> None:
        """Make a replica a primary."""
        with contextlib.closing(pg_login(self.port, "postgres", timeout=30)) as connection:
            connection.autocommit = True
            connection.cursor().execute("SELECT pg_promote()")


def _build_postgres(folder: Path) -> None:
    binaries, ids = setup_env.postgres_bin(), _service_ids("postgres")
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(PASSWORD + "\n")
        file.flush()
        chown(file.name, ids)
        _run(
            [
                *_as(ids),
                f"{binaries}/initdb",
                "-D",
                f"{folder}/data",
                "-U",
                "postgres",
                f"--pwfile={file.name}",
                "-A",
                "scram-sha-256",
                "--no-sync",
                "-E",
                "UTF8",
                "--no-locale",
            ],
            env={"HOME": "/tmp"},
        )
    _run(
        [
            *_as(ids),
            f"{binaries}/postgres",
            "--single",
            "-D",
            f"{folder}/data",
            "-c",
            "fsync=off",
            "postgres",
        ],
        stdin=f"CREATE ROLE app LOGIN CREATEDB PASSWORD '{PASSWORD}';\nCREATE DATABASE app OWNER app;\n",
        env={"HOME": "/tmp"},
    )


def postgres(
    *,
    fsync: bool = False,
    tls: Optional[bool] = None,
    options: Mapping[str, str] = NOTHING,
    env: Mapping[str, str] = NOTHING,
) -> Postgres:
    """A running PostgreSQL.  fsync: data on a disk, and synced; tls: with a certificate that `.ca` signs."""
    require("postgresql")
    server = Postgres("postgresql", fsync, tls, options, env)
    version = _run([f"{server.bin}/postgres", "--version"])
    if re.search(r"\) (1[5-9]|[2-9]\d)", version):
        server.copying = " STRATEGY FILE_COPY"
    _copy(_template(version, _build_postgres, server.ids) / "data", server.dir / "data")
    return _started(server)


def pg_replica(primary: Postgres, *, options: Mapping[str, str] = NOTHING) -> Postgres:
    """A running hot standby of `primary` (asynchronous streaming); .promote() makes it a primary."""
    require("postgresql")
    server = Postgres("pg-replica", False, None, options, NOTHING)
    try:
        _run(
            [
                *_as(server.ids),
                f"{server.bin}/pg_basebackup",
                "-h",
                HOST,
                "-p",
                str(primary.port),
                "-U",
                "postgres",
                "-D",
                f"{server.dir}/data",
                "-R",
                "-X",
                "stream",
                "-c",
                "fast",
                "--no-sync",
            ],
            env={"PGPASSWORD": PASSWORD, "HOME": "/tmp"},
        )
    except BaseException:
        server.close()
        raise
    return _started(server)


def _copy(source: Path, target: Path) -> None:
    _run(["cp", "-a", str(source), str(target)])  # -a keeps owners, which shutil.copytree does not


class Mysql(Server):
    """MySQL or MariaDB: user app has all rights on `app` and on databases t_..., user admin may do all."""

    def __init__(
        self, name: str, fsync: bool, tls: Optional[bool], options: Mapping[str, str], env: Mapping[str, str]
    ) -> None:
        super().__init__(name, in_memory=not fsync, env=env)
        self.program, self.ids = _mysql_program(name), _service_ids("mysql")
        self.url = f"mysql://app:{PASSWORD}@{HOST}:{self.port}/app"
        self.admin_url = f"mysql://admin:{PASSWORD}@{HOST}:{self.port}/app"
        chown(self.dir, self.ids)
        self.options: dict[str, str] = {
            "datadir": f"{self.dir}/data",
            "port": str(self.port),
            "bind-address": HOST,
            "socket": f"{self.dir}/s",
            "pid-file": f"{self.dir}/pid",
            "tmpdir": str(self.dir),
            "max-connections": "200",
            "innodb-flush-log-at-trx-commit": "1" if fsync else "0",
            "innodb-buffer-pool-size": "64M",
            "performance-schema": "OFF",
            "skip-name-resolve": "ON",
        }
        if name == "mysql":
            self.options.update(
                {
                    "mysqlx": "0",
                    "disable-log-bin": "ON",
                    "innodb-redo-log-capacity": "32M",
                    "secure-file-priv": "NULL",
                }
            )
        else:
            self.options["innodb-log-file-size"] = "16M"
        if tls:
            files = tls_files(self.dir, self.ids)
            self.ca = files / "ca.pem"
            self.options.update(
                {"ssl-ca": f"{files}/ca.pem", "ssl-cert": f"{files}/cert.pem", "ssl-key": f"{files}/key.pem"}
            )
        elif tls is False:
            self.options.update({"tls-version": "", "auto-generate-certs": "0"} if name == "mysql" else {"ssl": "0"})
        self.options.update({key.replace("_", "-"): value for key, value in options.items()})

    def command(self) -> list[str]:
        return [*_as(self.ids), *self.program, *(f"--{name}={value}" for name, value in self.options.items())]

    @property
    def log_file(self) -> Path:
        return self.dir / "out"

    def probe(self) -> None:
        mysql_login(self.port).close()


def _mysql_program(name: str) -> list[str]:
    """The command up to the options that depend on the server's place."""
    if name == "mariadb":
        return [setup_env.find_program("mariadbd") or "mariadbd", "--no-defaults"]
    command = setup_env.mysql_command() or ["mysqld"]
    if len(command) == 1:
        return [*command, "--no-defaults"]
    base = setup_env.mysql_root() / "usr"  # unpacked, so it looks in the wrong places by itself
    return [
        *command,
        "--no-defaults",
        f"--basedir={base}",
        f"--lc-messages-dir={base}/share/mysql",
        f"--character-sets-dir={base}/share/mysql/charsets",
        f"--plugin-dir={base}/lib/mysql/plugin",
    ]


_MYSQL_USERS = [  # one statement a line: MariaDB's init-file wants it so
    "CREATE DATABASE app;",
    f"CREATE USER app@'%' IDENTIFIED BY '{PASSWORD}';",
    f"CREATE USER admin@'%' IDENTIFIED BY '{PASSWORD}';",
    "GRANT ALL ON app.* TO app@'%';",
    r"GRANT ALL ON `t\_%`.* TO app@'%';",
    "GRANT ALL ON *.* TO admin@'%' WITH GRANT OPTION;",
]


def _build_mysql(folder: Path) -> None:
    _run(
        [
            *_as(_service_ids("mysql")),
            *_mysql_program("mysql"),
            "--initialize-insecure",
            f"--datadir={folder}/data",
            "--innodb-redo-log-capacity=32M",
            "--secure-file-priv=NULL",
            "--disable-log-bin",
        ]
    )
    _add_mysql_users("mysql", folder)  # its first start makes RSA keys, too


def _build_mariadb(folder: Path) -> None:
    install = setup_env.find_program("mariadb-install-db") or "mariadb-install-db"
    _run(
        [
            *_as(_service_ids("mysql")),
            install,
            "--no-defaults",
            f"--datadir={folder}/data",
            f"--tmpdir={folder}",
            "--skip-test-db",
            "--auth-root-authentication-method=normal",
            "--skip-name-resolve",
            "--force",
        ],
        env={"HOME": "/tmp"},
    )
    _add_mysql_users("mariadb", folder)


def _add_mysql_users(name: str, folder: Path) -> None:
    with Mysql(name, False, None, NOTHING, NOTHING) as server:
        users = server.dir / "users.sql"
        users.write_text("\n".join(_MYSQL_USERS) + "\n")
        server.options.update({"datadir": f"{folder}/data", "init-file": str(users)})
        server.start()
        server.stop()


def mysql(
    *,
    fsync: bool = False,
    tls: Optional[bool] = None,
    options: Mapping[str, str] = NOTHING,
    env: Mapping[str, str] = NOTHING,
) -> Mysql:
    """A running real MySQL (caching_sha2_password).

    fsync: data on a disk, and synced; tls: True with a certificate that `.ca` signs, False without TLS,
    None with the certificate that MySQL makes for itself.
    """
    return _mysql("mysql", _build_mysql, fsync, tls, options, env)


def mariadb(
    *,
    fsync: bool = False,
    tls: Optional[bool] = None,
    options: Mapping[str, str] = NOTHING,
    env: Mapping[str, str] = NOTHING,
) -> Mysql:
    """A running MariaDB.  fsync, tls: as for mysql()."""
    return _mysql("mariadb", _build_mariadb, fsync, tls, options, env)


def _mysql(
    name: str,
    build: Callable[[Path], None],
    fsync: bool,
    tls: Optional[bool],
    options: Mapping[str, str],
    env: Mapping[str, str],
) -> Mysql:
    require(name)
    version = _run([*_mysql_program(name), "--version"]).partition("Ver ")[2]
    template = _template(f"{name}-{version}", build, _service_ids("mysql"))
    server = Mysql(name, fsync, tls, options, env)
    _copy(template / "data", server.dir / "data")
    return _started(server)


class Pgbouncer(Server):
    """pgbouncer before a PostgreSQL server; a connection is a client's for one transaction."""

    stop_signal = signal.SIGINT

    def __init__(self, behind: Postgres, options: Mapping[str, str]) -> None:
        super().__init__("pgbouncer")
        self.ids = _service_ids("postgres")
        self.url = f"postgresql://app:{PASSWORD}@{HOST}:{self.port}/app"
        self.admin_url = f"postgresql://postgres:{PASSWORD}@{HOST}:{self.port}/app"
        settings = {
            "listen_addr": HOST,
            "listen_port": str(self.port),
            "unix_socket_dir": "",
            "auth_type": "scram-sha-256",
            "auth_file": f"{self.dir}/users",
            "pool_mode": "transaction",
            "max_client_conn": "500",
            "default_pool_size": "50",
            **options,
        }
        (self.dir / "users").write_text(f'"app" "{PASSWORD}"\n"postgres" "{PASSWORD}"\n')
        (self.dir / "ini").write_text(
            f"[databases]\n* = host={HOST} port={behind.port}\n[pgbouncer]\n"
            + "".join(f"{key} = {value}\n" for key, value in settings.items())
        )

    def command(self) -> list[str]:
        return [*_as(self.ids), setup_env.find_program("pgbouncer") or "pgbouncer", f"{self.dir}/ini"]

    @property
    def log_file(self) -> Path:
        return self.dir / "out"

    def probe(self) -> None:
        with contextlib.closing(pg_login(self.port)) as connection:
            connection.cursor().execute("SELECT 1")


def pgbouncer(behind: Postgres, *, options: Mapping[str, str] = NOTHING) -> Pgbouncer:
    """A running pgbouncer in transaction mode before that PostgreSQL server."""
    require("pgbouncer")
    return _started(Pgbouncer(behind, options))


# ----------------------------------------------------------------------------- file servers


class FtpDaemon(Server):
    """An FTP server of the system, in one of its modes: user ftptest, login folder = root."""

    user = FTP_USER
    SCHEMES: ClassVar[Mapping[str, str]] = {"plain": "ftp", "explicit": "ftpes", "implicit": "ftps"}

    def __init__(self, name: str, mode: str, env: Mapping[str, str] = NOTHING) -> None:
        if mode not in self.SCHEMES:
            raise ValueError(f"mode {mode!r}: one of {', '.join(self.SCHEMES)}")
        super().__init__(name if mode == "plain" else f"{name}-{mode}", env=env)
        self.mode, self.scheme, self.ids = mode, self.SCHEMES[mode], _ftp_ids()
        self.root = self.dir / "root"
        self.root.mkdir()
        chown(self.root, self.ids)
        self.url = self.url_of(self.root)
        if self.scheme in ("ftpes", "ftps"):
            self.tls = tls_files(self.dir)
            self.ca = self.tls / "ca.pem"

    def users(self, more: str) -> Path:
        """A file of the one user, for a server that does not ask the system."""
        assert self.ids is not None
        users = self.dir / "users"
        users.write_text(f"{FTP_USER}:{_crypted(PASSWORD)}:{self.ids[0]}:{self.ids[1]}::{self.root}{more}\n")
        users.chmod(0o600)
        return users

    def probe(self) -> None:
        sftp_login(self, check_host=False).close() if self.scheme == "sftp" else ftp_login(self).quit()

    def settled(self) -> bool:
        return len(self.pids()) == 1


class Vsftpd(FtpDaemon):
    """vsftpd: user ftptest, login folder = root; the TLS modes demand session reuse of data connections."""

    connect_pattern = r'CONNECT: Client "'

    def __init__(self, mode: str, options: Mapping[str, str]) -> None:
        super().__init__("vsftpd", mode)
        empty = Path("/var/run/vsftpd/empty")
        empty.mkdir(parents=True, exist_ok=True)
        # Debian's own PAM file wants a login shell and an audit id, which not every container can set.
        pam = Path("/etc/pam.d/ftpcoord-tests")
        if not pam.exists():
            pam.write_text("auth required pam_unix.so nodelay\naccount required pam_unix.so\n")
        settings = {
            "listen": "YES",
            "listen_ipv6": "NO",
            "listen_address": HOST,
            "listen_port": str(self.port),
            "background": "NO",
            "anonymous_enable": "NO",
            "local_enable": "YES",
            "write_enable": "YES",
            "local_root": str(self.root),
            "local_umask": "022",
            "pam_service_name": pam.name,
            "secure_chroot_dir": str(empty),
            "seccomp_sandbox": "NO",
            "isolate": "NO",
            "isolate_network": "NO",
            "connect_from_port_20": "NO",
            "pasv_min_port": "42000",
            "pasv_max_port": "60999",
            "pasv_address": HOST,
            "use_localtime": "NO",
            "max_clients": "200",
            "max_per_ip": "200",
            "delay_failed_login": "0",
            "xferlog_enable": "YES",
            "xferlog_std_format": "NO",
            "log_ftp_protocol": "YES",
            "no_log_lock": "YES",
            "vsftpd_log_file": str(self.log_file),
        }
        if mode != "plain":
            settings.update(
                ssl_enable="YES",
                rsa_cert_file=f"{self.tls}/cert.pem",
                rsa_private_key_file=f"{self.tls}/key.pem",
                force_local_logins_ssl="YES",
                force_local_data_ssl="YES",
                ssl_ciphers="HIGH",
                require_ssl_reuse="YES",
                implicit_ssl="YES" if mode == "implicit" else "NO",
            )
        settings.update(options)
        (self.dir / "conf").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))

    def command(self) -> list[str]:
        return [setup_env.find_program("vsftpd") or "vsftpd", f"{self.dir}/conf"]


def vsftpd(mode: str = "plain", *, options: Mapping[str, str] = NOTHING) -> Vsftpd:
    """A running vsftpd: plain, explicit or implicit TLS.  options: further lines of its configuration."""
    require("vsftpd")
    return _started(Vsftpd(mode, options))


class ImplicitFTP(ftplib.FTP_TLS):
    """ftplib with TLS from the first byte on, and one TLS session for all connections, as servers want it."""

    implicit = True

    def connect(
        self,
        host: str = "",
        port: int = 0,
        timeout: float = -999,
        source_address: Optional[tuple[str, int]] = None,
    ) -> str:
        if not self.implicit:
            return super().connect(host, port, timeout, source_address)
        self.host, self.port = host, port
        raw = socket.create_connection((host, port), timeout)
        self.sock = self.context.wrap_socket(raw, server_hostname=host)
        self.timeout, self.af = timeout, self.sock.family
        self.file = self.sock.makefile("r", encoding=self.encoding)
        self.welcome: str = self.getresp()
        return self.welcome

    def ntransfercmd(self, cmd: str, rest: Union[int, str, None] = None) -> tuple[socket.socket, Optional[int]]:
        data, size = ftplib.FTP.ntransfercmd(self, cmd, rest)
        assert isinstance(self.sock, ssl.SSLSocket)
        return self.context.wrap_socket(data, server_hostname=self.host, session=self.sock.session), size


class ExplicitFTP(ImplicitFTP):
    """ftplib with AUTH TLS and one TLS session for all connections."""

    implicit = False


def ftp_login(server: Server, timeout: float = 10) -> ftplib.FTP:
    """A plain client library's session with one of the FTP servers, logged in, data connections protected."""
    if server.scheme == "ftp":
        session = ftplib.FTP()
    else:
        kind: type[ImplicitFTP] = ImplicitFTP if server.scheme == "ftps" else ExplicitFTP
        session = kind(context=ssl.create_default_context(cafile=str(server.ca)))
    try:
        session.connect(server.host, server.port, timeout)
        if isinstance(session, ExplicitFTP):
            session.auth()
        session.login(server.user, server.password)
        if isinstance(session, ftplib.FTP_TLS):
            session.prot_p()
    except BaseException:
        session.close()
        raise
    return session


class Sshd(Server):
    """OpenSSH's sshd with SFTP, login folder = root.

    As root for the user ftptest, by key or by password; else for ourselves, by key alone (password is "").
    """

    scheme = "sftp"
    connect_pattern = r"(?m)^Connection from "

    def __init__(self, options: Mapping[str, str]) -> None:
        super().__init__("sshd")
        self.ids = _ftp_ids()
        self.user = FTP_USER if setup_env.IS_ROOT else getpass.getuser()
        self.password = PASSWORD if setup_env.IS_ROOT else ""
        self.root = self.dir / "root"
        self.root.mkdir()
        chown(self.root, self.ids)
        self.url = self.url_of(self.root)
        keys = _ssh_files(self)
        if setup_env.IS_ROOT:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        settings = {
            **options,
            "Port": str(self.port),
            "ListenAddress": HOST,
            "PidFile": "none",
            "UsePAM": "no",
            "PasswordAuthentication": "yes" if setup_env.IS_ROOT else "no",
            "PubkeyAuthentication": "yes",
            "KbdInteractiveAuthentication": "no",
            "AuthorizedKeysFile": f"{self.dir}/authorized_keys",
            "StrictModes": "no",
            "MaxStartups": "200:30:300",
            "MaxSessions": "100",
            "UseDNS": "no",
            "LogLevel": "VERBOSE",
            "Subsystem": f"sftp internal-sftp -d {self.root}",
        }
        if _sshd_version() >= (9, 8):
            settings["PerSourcePenalties"] = "no"  # a failed login would lock all of loopback out
        settings.update(options)
        lines = [f"HostKey {keys}/host_{kind}" for kind in ("ed25519", "ecdsa", "rsa")]
        lines += [f"{name} {value}" for name, value in settings.items()]
        (self.dir / "conf").write_text("\n".join(lines) + "\n")

    def new_host_keys(self) -> None:
        """Give it other host keys (known_hosts stays as it is) and restart it."""
        self.stop()
        for kind in ("ed25519", "ecdsa", "rsa"):
            path = self.dir / "keys" / f"host_{kind}"
            path.unlink()
            Path(f"{path}.pub").unlink()
            _run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", str(path)])
        self.start()

    def command(self) -> list[str]:
        program = setup_env.find_program("sshd") or "sshd"
        return [program, "-D", "-f", f"{self.dir}/conf", "-E", str(self.log_file)]

    def probe(self) -> None:
        import logging

        logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # it logs a trace for each refused connection

        client = sftp_login(self, check_host=False)
        client.close()

    def hopeless(self, problem: Exception) -> bool:
        return type(problem).__name__ == "AuthenticationException"  # such as: the account is locked

    def settled(self) -> bool:
        return len(self.pids()) == 1


def sftp_login(server: Server, timeout: float = 10, check_host: bool = True) -> Any:
    """A paramiko SSHClient, logged in with the server's user key; .open_sftp() gives the file session."""
    import paramiko

    client = paramiko.SSHClient()
    if check_host:
        client.load_host_keys(str(server.known_hosts))
    else:
        client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
    try:
        client.connect(
            server.host,
            server.port,
            server.user,
            key_filename=str(server.key),
            timeout=timeout,
            banner_timeout=timeout,
            auth_timeout=timeout,
            allow_agent=False,
            look_for_keys=False,
        )
    except BaseException:
        client.close()
        raise
    return client


def _sshd_version() -> tuple[int, int]:
    # -V is understood since 9.3; older ones print their version beside the complaint.
    said = subprocess.run(
        [setup_env.find_program("sshd") or "sshd", "-V"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ).stdout.decode(errors="replace")
    found = re.search(r"OpenSSH_(\d+)\.(\d+)", said)
    return (int(found.group(1)), int(found.group(2))) if found else (0, 0)


def _ssh_files(server: Server) -> Path:
    """Gives the server its keys (authorized_keys, user, host_* in the folder returned), and clients theirs."""
    keys = Path(shutil.copytree(_template("ssh", _build_ssh), server.dir / "keys"))
    server.key, server.known_hosts = keys / "user", server.dir / "known_hosts"
    shutil.copy(keys / "user.pub", server.dir / "authorized_keys")
    (server.dir / "authorized_keys").chmod(0o644)
    lines = []
    for kind in ("ed25519", "ecdsa", "rsa"):
        name, data = (keys / f"host_{kind}.pub").read_text().split()[:2]
        lines.append(f"[{HOST}]:{server.port} {name} {data}\n")
    server.known_hosts.write_text("".join(lines))
    return keys


def _build_ssh(folder: Path) -> None:
    for name, kind in (
        ("host_ed25519", "ed25519"),
        ("host_ecdsa", "ecdsa"),
        ("host_rsa", "rsa"),
        ("user", "ed25519"),
    ):
        _run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", name, "-f", f"{folder}/{name}"])


def sshd(*, options: Mapping[str, str] = NOTHING) -> Sshd:
    """A running sshd.  options: lines of its configuration that replace ours."""
    require("sshd")
    return _started(Sshd(options))


class Pyftpd(FtpDaemon):
    """pyftpdlib in a Python process of its own: an FTP server that has MLSD and MLST; paths are real ones."""

    connect_pattern = r'(?m)^CONNECT: Client "'

    def __init__(self, mode: str, without: Sequence[str], options: Mapping[str, Any]) -> None:
        super().__init__("pyftpd", mode)
        self._orders = json.dumps(
            {
                "mode": mode,
                "port": self.port,
                "dir": str(self.dir),
                "without": list(without),
                "options": dict(options),
                "ids": self.ids if setup_env.IS_ROOT else None,
            }
        )

    def command(self) -> list[str]:
        return [sys.executable, __file__, "--pyftpd", self._orders]

    @property
    def log_file(self) -> Path:
        return self.dir / "out"

    def probe(self) -> None:
        with contextlib.closing(ftp_login(self)) as session:
            session.nlst()
            session.quit()

    def revive(self) -> None:
        """Starts it anew if a test has left it in a state in which it lists nothing any more."""
        before = self._log_size()
        try:
            self.probe()
        except (OSError, EOFError, ftplib.Error):
            self.kill()
            self.start()
            return
        with contextlib.suppress(AssertionError):  # sessions of the test before may end later
            wait_for(self.settled, 0.5)
        self._own_noise.append((before, self._log_size()))

    def settled(self) -> bool:
        text = self.log_file.read_bytes()[self._start_of_log :].decode("utf-8", "replace")
        return len(re.findall(self.connect_pattern, text)) == text.count("DISCONNECT: Client")


def pyftpd(mode: str = "plain", *, without: Sequence[str] = (), options: Mapping[str, Any] = NOTHING) -> Pyftpd:
    """A running pyftpdlib: plain, explicit or implicit TLS.

    without: commands that it shall not know (("MLSD", "MLST")); options: attributes of its handler class.
    """
    require("pyftpd")
    return _started(Pyftpd(mode, without, options))


def _pyftpd_main(orders: dict[str, Any]) -> None:
    import logging

    from pyftpdlib import handlers
    from pyftpdlib.authorizers import DummyAuthorizer
    from pyftpdlib.filesystems import UnixFilesystem
    from pyftpdlib.servers import FTPServer

    logging.basicConfig(level=logging.DEBUG, format="%(asctime)s %(message)s", stream=sys.stdout)
    base: Any = handlers.FTPHandler if orders["mode"] == "plain" else handlers.TLS_FTPHandler

    class Handler(base):  # type: ignore[misc]
        proto_cmds = {name: value for name, value in base.proto_cmds.items() if name not in orders["without"]}

        def on_connect(self) -> None:
            print(f'CONNECT: Client "{self.remote_ip}" port {self.remote_port}', flush=True)

        def on_disconnect(self) -> None:
            print(f'DISCONNECT: Client "{self.remote_ip}" port {self.remote_port}', flush=True)

        def handle(self) -> None:
            if orders["mode"] == "implicit":
                self.secure_connection(self.ssl_context)
            super().handle()

    tls = Path(orders["dir"], "tls")
    if orders["mode"] != "plain":
        Handler.certfile, Handler.keyfile = str(tls / "cert.pem"), str(tls / "key.pem")
        Handler.tls_control_required = Handler.tls_data_required = True
        Handler.get_ssl_context()  # reads the key, as long as we may
    Handler.authorizer = DummyAuthorizer()
    Handler.authorizer.add_user(FTP_USER, PASSWORD, os.path.join(orders["dir"], "root"), perm="elradfmwMT")
    Handler.abstracted_fs = UnixFilesystem
    Handler.auth_failed_timeout = 0.1
    Handler.passive_ports = range(42000, 61000)
    Handler.banner = "pyftpdlib"
    for name, value in orders["options"].items():
        setattr(Handler, name, value)
    server = FTPServer((HOST, orders["port"]), Handler)
    server.max_cons, server.max_cons_per_ip = 512, 0
    if orders["ids"]:
        os.setgroups([])
        os.setgid(orders["ids"][1])
        os.setuid(orders["ids"][0])
    server.serve_forever()


class Proftpd(FtpDaemon):
    """ProFTPD.

    list: FEAT names no MLST, so that clients use LIST; refusing: FEAT names it, and MLSD and MLST are forbidden.
    """

    SCHEMES = {"plain": "ftp", "explicit": "ftpes", "list": "ftp", "refusing": "ftp", "sftp": "sftp"}
    connect_pattern = r"(?:FTP|SSH2) session opened"

    def __init__(self, mode: str, options: Sequence[str]) -> None:
        super().__init__("proftpd", mode, _libraries("proftpd"))
        lines = [
            "ServerType standalone",
            f"Port {self.port}",
            f"DefaultAddress {HOST}",
            "SocketBindTight on",
            f"ModulePath {setup_env.unpacked('proftpd')}/usr/lib/proftpd",
            "User nobody",
            "Group nogroup",
            "AuthOrder mod_auth_file.c",
            f"AuthUserFile {self.users(':/bin/sh')}",
            "AuthPAM off",
            "RequireValidShell off",
            "DefaultServer on",
            "UseIPv6 off",
            "UseReverseDNS off",
            "WtmpLog off",
            "TransferLog none",
            "DelayEngine off",
            "ControlsEngine off",
            "MaxInstances 300",
            "MaxLoginAttempts 1",
            "TimesGMT on",
            f"SystemLog {self.log_file}",
            "SyslogLevel info",
            f"PidFile {self.dir}/pid",
            f"ScoreboardFile {self.dir}/score",
            "Umask 022",
            "AllowOverwrite on",
            "PassivePorts 42000 60999",
        ]
        if mode == "list":
            lines.append("FactsAdvertise off")
        elif mode == "refusing":
            lines += ["<Limit MLSD MLST>", "DenyAll", "</Limit>"]
        elif mode == "explicit":
            (self.tls / "key.pem").chmod(0o600)
            lines += [
                "LoadModule mod_tls.c",
                "TLSEngine on",
                "TLSRequired on",
                "TLSProtocol TLSv1.2 TLSv1.3",
                f"TLSRSACertificateFile {self.tls}/cert.pem",
                f"TLSRSACertificateKeyFile {self.tls}/key.pem",
                f"TLSLog {self.dir}/tls.log",
            ]
        elif mode == "sftp":
            keys = _ssh_files(self)
            rfc4716 = self.dir / "authorized.pub"
            rfc4716.write_text(_run(["ssh-keygen", "-e", "-f", f"{keys}/user.pub"]))
            lines += [
                "LoadModule mod_sftp.c",
                "SFTPEngine on",
                "SFTPAuthMethods publickey password",
                f"SFTPAuthorizedUserKeys file:{rfc4716}",
                f"SFTPLog {self.dir}/sftp.log",
                *(f"SFTPHostKey {keys}/host_{kind}" for kind in ("rsa", "ecdsa", "ed25519")),
            ]
        (self.dir / "conf").write_text("\n".join([*lines, *options]) + "\n")

    def command(self) -> list[str]:
        return [f"{setup_env.unpacked('proftpd')}/usr/sbin/proftpd", "-n", "-q", "-c", f"{self.dir}/conf"]


def proftpd(mode: str = "plain", *, options: Sequence[str] = ()) -> Proftpd:
    """A running ProFTPD.  options: further lines of its configuration."""
    require("proftpd")
    return _started(Proftpd(mode, options))


class PureFtpd(FtpDaemon):
    """Pure-FTPd.  It logs to syslog alone."""

    SCHEMES = {"plain": "ftp", "explicit": "ftpes"}

    def __init__(self, mode: str, options: Sequence[str]) -> None:
        super().__init__("pureftpd", mode, _libraries("pure-ftpd"))
        users = self.users("::::::::::::")
        program = setup_env.unpacked("pure-ftpd")
        _run([f"{program}/usr/bin/pure-pw", "mkdb", f"{users}.pdb", "-f", str(users)], env=self.env)
        self._command = [
            f"{program}/usr/sbin/pure-ftpd",
            "-S",
            f"{HOST},{self.port}",
            "-l",
            f"puredb:{users}.pdb",
            "-4",
            "-H",
            "-E",
            "-c",
            "200",
            "-C",
            "200",
            "-u",
            "1",
            "-U",
            "133:022",
            "-p",
            "42000:60999",
            "-g",
            f"{self.dir}/pid",
            *options,
        ]
        if mode == "explicit":
            both = self.dir / "both.pem"
            both.write_text((self.tls / "key.pem").read_text() + (self.tls / "cert.pem").read_text())
            both.chmod(0o600)
            self._command += ["-Y", "2", "-2", str(both)]

    def command(self) -> list[str]:
        return self._command


def pure_ftpd(mode: str = "plain", *, options: Sequence[str] = ()) -> PureFtpd:
    """A running Pure-FTPd.  options: further words of its command line."""
    require("pure-ftpd")
    return _started(PureFtpd(mode, options))


def _libraries(name: str) -> dict[str, str]:
    folders = setup_env.unpacked(name).glob("usr/lib/*-linux-gnu")
    return {"LD_LIBRARY_PATH": ":".join(map(str, folders)), "TZ": "UTC"}


def _crypted(password: str) -> str:
    return _run(["openssl", "passwd", "-5", password]).strip()


class Asyncssh(FtpDaemon):
    """asyncssh's SFTP server in a Python process of its own; login folder = root, paths are real ones."""

    SCHEMES = {"plain": "sftp"}
    connect_pattern = r"(?m)^CONNECT$"

    def __init__(self) -> None:
        super().__init__("asyncssh", "plain")
        self._orders = json.dumps(
            {
                "port": self.port,
                "root": str(self.root),
                "keys": str(_ssh_files(self)),
                "ids": self.ids if setup_env.IS_ROOT else None,
            }
        )

    def command(self) -> list[str]:
        return [sys.executable, __file__, "--asyncssh", self._orders]

    @property
    def log_file(self) -> Path:
        return self.dir / "out"

    def settled(self) -> bool:
        text = self.log_file.read_text()[self._start_of_log :]
        return text.count("\nDISCONNECT\n") == len(re.findall(self.connect_pattern, text))


def asyncssh() -> Asyncssh:
    """A running asyncssh."""
    require("asyncssh")
    return _started(Asyncssh())


def _asyncssh_main(orders: dict[str, Any]) -> None:
    import asyncssh

    class Login(asyncssh.SSHServer):
        def connection_made(self, conn: object) -> None:
            print("\nCONNECT", flush=True)

        def connection_lost(self, exc: Optional[Exception]) -> None:
            print("\nDISCONNECT", flush=True)

        def password_auth_supported(self) -> bool:
            return True

        def validate_password(self, username: str, password: str) -> bool:
            return (username, password) == (FTP_USER, PASSWORD)

    async def serve() -> None:
        await asyncssh.listen(
            HOST,
            orders["port"],
            server_factory=Login,
            sftp_factory=True,
            backlog=200,
            login_timeout=0,
            authorized_client_keys=asyncssh.read_authorized_keys(f"{orders['keys']}/user.pub"),
            server_host_keys=[
                asyncssh.read_private_key(f"{orders['keys']}/host_{kind}") for kind in ("ed25519", "ecdsa", "rsa")
            ],
        )
        if orders["ids"]:
            os.setgroups([])
            os.setgid(orders["ids"][1])
            os.setuid(orders["ids"][0])
        os.chdir(orders["root"])
        await asyncio.Event().wait()

    asyncio.run(serve())


# ----------------------------------------------------------------------------- what is there

NAMES = (
    "postgresql",
    "mysql",
    "mariadb",
    "pgbouncer",
    "vsftpd",
    "sshd",
    "pyftpd",
    "proftpd",
    "pure-ftpd",
    "asyncssh",
    "tinyproxy",
    "microsocks",
    "gpg",
)


def available(name: str) -> Optional[str]:
    """None if this server can be started here, else the reason why not, in one line.

    Names as in NAMES; "postgres", "pg_replica", "sqlite", "vsftpd-explicit" and the like are understood too.
    """
    name = {"postgres": "postgresql", "pg_replica": "postgresql", "pg-replica": "postgresql"}.get(name, name)
    name = re.sub(r"[-_](plain|explicit|implicit)$", "", name)
    modules = {
        "postgresql": ["pg8000"],
        "pgbouncer": ["pg8000"],
        "mysql": ["pymysql", "cryptography"],
        "mariadb": ["pymysql"],
        "sshd": ["paramiko"],
        "pyftpd": ["pyftpdlib", "OpenSSL"],
        "asyncssh": ["asyncssh", "paramiko"],
    }.get(name, [])
    programs = {
        "mariadb": ["mariadbd", "mariadb-install-db"],
        "pgbouncer": ["pgbouncer"],
        "vsftpd": ["vsftpd", "openssl", "useradd", "chpasswd"],
        "sshd": ["sshd", "ssh-keygen"],
        "pyftpd": ["openssl"],
        "proftpd": ["openssl", "ssh-keygen"],
        "pure-ftpd": ["openssl"],
        "asyncssh": ["ssh-keygen"],
        "tinyproxy": ["tinyproxy"],
        "microsocks": ["microsocks"],
        "gpg": ["gpg", "gpgconf"],
    }.get(name, [])
    if name == "sqlite":
        return None
    if name not in NAMES:
        return f"no server is named {name!r}"
    if os.name != "posix":
        return "the test servers need a POSIX system"
    if name == "postgresql" and not setup_env.postgres_bin():
        return "no initdb and postgres in /usr/lib/postgresql/*/bin or PATH"
    if name == "mysql" and not setup_env.mysql_command():
        return f"no real mysqld in PATH, none unpacked in {setup_env.mysql_root()}"
    if name == "vsftpd" and not setup_env.IS_ROOT:
        return "vsftpd lets local users log in only when root starts it"
    if name in setup_env.UNPACKED:
        if not setup_env.IS_ROOT:
            return "it is tried as root alone"
        if not (setup_env.unpacked(name) / "usr/sbin" / name).exists():
            return f"not unpacked in {setup_env.unpacked(name)}"
    if setup_env.IS_ROOT:
        programs = [*programs, "setpriv"]
    for program in programs:
        if not setup_env.find_program(program):
            return f"no program {program}"
    for module in modules:
        try:
            __import__(module)
        except ImportError as error:
            return f"Python cannot import {module}: {error}"
    return None


def version(name: str) -> str:
    """What an available server calls itself, in one line."""
    module = {"pyftpd": "pyftpdlib", "asyncssh": "asyncssh"}.get(name)
    if module:
        import importlib.metadata

        return f"{module} {importlib.metadata.version(module)}"
    program = {
        "postgresql": [f"{setup_env.postgres_bin()}/postgres"],
        "mysql": setup_env.mysql_command() or ["mysqld"],
        "mariadb": ["mariadbd"],
    }.get(name, [name])
    command = [
        setup_env.find_program(program[0]) or program[0],
        *program[1:],
        "-V" if name == "sshd" else "--version",
    ]
    if name in setup_env.UNPACKED:
        command = [f"{setup_env.unpacked(name)}/usr/sbin/{name}", "-v" if name == "proftpd" else "--help"]
    if name in ("vsftpd", "tinyproxy"):
        command = [command[0], "-v"]
    if name == "microsocks":
        command = ["dpkg-query", "-W", name] if shutil.which("dpkg-query") else ["true"]  # it does not tell
    # vsftpd prints that to descriptor 0.
    with tempfile.TemporaryFile() as file:
        libraries = _libraries(name) if name in setup_env.UNPACKED else NOTHING
        subprocess.run(command, stdin=file, stdout=file, stderr=file, env={**os.environ, **libraries})
        file.seek(0)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if re.search(r"\d\.\d", line)]
    return re.sub(r".*/(?=\w+  ?Ver)", "", lines[0]) if lines else "unknown version"


def require(name: str) -> None:
    """RuntimeError with the reason if this server cannot be started here."""
    reason = available(name)
    if reason:
        raise RuntimeError(f"{name}: {reason}")


# ----------------------------------------------------------------------------- proxies


class Way(Server):
    """A proxy of the system that demands a login; what it was asked for is in its log."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.ids = _service_ids("nobody")
        chown(self.dir, self.ids)
        self.url = f"{self.scheme}://{self.user}@{HOST}:{self.port}"

    def probe(self) -> None:
        socket.create_connection((HOST, self.port), 5).close()


class Tinyproxy(Way):
    """tinyproxy: CONNECT of HTTP, Basic login."""

    scheme = "http"
    connect_pattern = r"CONNECT .*: CONNECT "

    def command(self) -> list[str]:
        lines = (
            f"Port {self.port}",
            f"Listen {HOST}",
            f"Allow {HOST}",
            f"BasicAuth {self.user} {self.password}",
            "MaxClients 200",
            f'LogFile "{self.log_file}"',
            "LogLevel Connect",
        )
        (self.dir / "conf").write_text("\n".join(lines) + "\n")
        return [*_as(self.ids), setup_env.find_program("tinyproxy") or "tinyproxy", "-d", "-c", f"{self.dir}/conf"]


class Microsocks(Way):
    """microsocks: SOCKS 5."""

    scheme = "socks5"
    connect_pattern = r"connected to "

    def command(self) -> list[str]:
        program = setup_env.find_program("microsocks") or "microsocks"
        login = ["-u", self.user, "-P", self.password]
        return [*_as(self.ids), program, "-i", HOST, "-p", str(self.port), *login]

    @property
    def log_file(self) -> Path:
        return self.dir / "out"


def tinyproxy() -> Tinyproxy:
    """A running tinyproxy."""
    require("tinyproxy")
    return _started(Tinyproxy("tinyproxy"))


def microsocks() -> Microsocks:
    """A running microsocks."""
    require("microsocks")
    return _started(Microsocks("microsocks"))


# ----------------------------------------------------------------------------- network faults


class Proxy:
    """A TCP forwarder on a free loopback port that does what bad networks do.

    delay       seconds that data waits in each direction; may be changed at any time
    bytes       forwarded so far, both directions
    round_trips how often a client sent after it had been answered: the waits a slow network would multiply
    connections accepted so far
    """

    def __init__(self, target_host: str, target_port: int, delay: float = 0.0) -> None:
        self.target, self.delay = (target_host, target_port), delay
        self.host, self.port = HOST, free_port()
        self.bytes = self.round_trips = self.connections = 0
        self._pairs: set[tuple[asyncio.StreamWriter, ...]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: Optional[asyncio.AbstractServer] = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy-{self.port}", daemon=True)
        self._thread.start()
        self._flow: asyncio.Event
        self._do(self._prepare())
        self._do(self._listen())

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cut(self) -> None:
        """Reset all connections (RST to both ends); new ones are accepted."""
        self._do(self._cut())

    def blackhole(self, on: bool = True) -> None:
        """on: accept, but forward nothing either way, not even an end; off: go on with what has come."""
        self._do(self._set_flow(not on))

    def refuse(self, on: bool = True) -> None:
        """on: refuse new connections (the port is closed), keep the present ones; off: listen again."""
        self._do(self._unlisten() if on else self._listen())

    def close(self) -> None:
        """Reset all connections and end."""
        if self._loop.is_closed():
            return
        self._do(self._finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _prepare(self) -> None:
        self._flow = asyncio.Event()  # made inside the loop: Python 3.9 binds it here
        self._flow.set()

    async def _set_flow(self, on: bool) -> None:
        if on:
            self._flow.set()
        else:
            self._flow.clear()

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, HOST, self.port, backlog=200, reuse_address=True)

    async def _unlisten(self) -> None:
        if self._server is not None:
            self._server.close()  # no wait_closed(): it waits for the connections
            self._server = None

    async def _cut(self) -> None:
        for pair in list(self._pairs):
            for writer in pair:
                self._reset(writer)

    @staticmethod
    def _reset(writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):  # lingering for 0 s makes close() send an RST
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async def _finish(self) -> None:
        await self._unlisten()
        await self._cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = self._loop.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        pair: tuple[asyncio.StreamWriter, ...] = (writer,)
        self._pairs.add(pair)
        try:
            await self._flow.wait()
            try:
                far_reader, far_writer = await asyncio.open_connection(*self.target)
            except OSError:
                return
            self._pairs.discard(pair)
            pair = (writer, far_writer)
            self._pairs.add(pair)
            for end in pair:
                end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            answered = [False]
            ways = [
                asyncio.ensure_future(self._forward(reader, far_writer, answered, True)),
                asyncio.ensure_future(self._forward(far_reader, writer, answered, False)),
            ]
            try:
                await asyncio.gather(*ways)  # until both have said their last word
                for end in pair:
                    end.close()  # sends first what it still holds
            except OSError:
                pass  # one end was reset: so is the other, below
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        finally:
            self._pairs.discard(pair)
            for end in pair:
                if not end.is_closing():
                    self._reset(end)

    async def _forward(
        self,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        answered: list[bool],
        from_client: bool,
    ) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)
        fill = asyncio.ensure_future(self._read(source, queue, answered, from_client))
        try:
            while True:
                due, data = await queue.get()
                wait = due - self._loop.time()
                if wait > 0:
                    await asyncio.sleep(wait)
                await self._flow.wait()
                if not data:
                    if fill.done() and fill.exception():
                        raise ConnectionResetError(errno.ECONNRESET, "the other end was reset")
                    target.write_eof()
                    return
                self.bytes += len(data)
                target.write(data)
                await target.drain()
        finally:
            fill.cancel()
            await asyncio.gather(fill, return_exceptions=True)

    async def _read(
        self,
        source: asyncio.StreamReader,
        queue: asyncio.Queue[tuple[float, bytes]],
        answered: list[bool],
        from_client: bool,
    ) -> None:
        data = b""
        try:
            while True:
                data = b""
                data = await source.read(65536)
                if from_client and data and answered[0]:
                    self.round_trips += 1
                if data:
                    answered[0] = not from_client
                await queue.put((self._loop.time() + self.delay, data))
                if not data:
                    return
        except OSError:
            await queue.put((self._loop.time(), b""))
            raise


if __name__ == "__main__":
    if sys.argv[1:2] == ["--reaper"]:
        _Reaper.main()
    elif sys.argv[1:2] == ["--pyftpd"]:
        _pyftpd_main(json.loads(sys.argv[2]))
    elif sys.argv[1:2] == ["--asyncssh"]:
        _asyncssh_main(json.loads(sys.argv[2]))
    else:
        for server_name in NAMES:
            print(f"{server_name:12} {available(server_name) or 'can be started'}")
