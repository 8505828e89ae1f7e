"""PostgreSQL and MySQL peers that do their worst, by name: none gets the password, more memory or more time than it
may, and each is told in one clear line."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import struct
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import pytest
import servers

import ftpcoord
from ftpcoord import DatabaseDown, DatabaseRefused

PASSWORD = "hush-hush-7531"
MOST_SECONDS = 12.0  # T is 5 s, or 1.6 s where it is waited for; with prefer there are two connections
MOST_BYTES = 24 << 20
SSL, PLUGINS = 0x800, 0x80000


class Peer:
    """What a script talks to: the connection, and all that came over it."""

    def __init__(self, sock: socket.socket, certificate: Optional[ssl.SSLContext]) -> None:
        self.sock, self.certificate = sock, certificate
        self.said = b""

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def hear(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.sock.recv(min(65536, size - len(data)))
            if not more:
                raise ConnectionError("the client is gone")
            data += more
            self.said += more
        return data

    def encrypt(self) -> None:
        assert self.certificate is not None
        self.sock = self.certificate.wrap_socket(self.sock, server_side=True)

    def for_ever(self, data: bytes, pause: float = 0.0) -> None:
        while True:
            self.send(data)
            time.sleep(pause)

    def silence(self) -> None:
        self.hear(1 << 30)

    # -- PostgreSQL

    def startup(self, tls: str = "N") -> None:
        """The TLS request, if there is one, and the startup message."""
        size, code = struct.unpack("!II", self.hear(8))
        if code == 80877103:
            self.send(tls.encode())
            if tls == "S":
                self.encrypt()
            size, code = struct.unpack("!II", self.hear(8))
        self.hear(size - 8)

    def message(self, kind: str, body: bytes = b"") -> None:
        self.send(kind.encode() + struct.pack("!i", len(body) + 4) + body)

    def ask(self, code: int, more: bytes = b"") -> None:
        self.message("R", struct.pack("!I", code) + more)

    def answer(self) -> None:
        """The client's answer to a request, whatever it is."""
        self.hear(1)
        self.hear(struct.unpack("!I", self.hear(4))[0] - 4)

    # -- MySQL

    def packet(self, body: bytes, number: int) -> None:
        self.send(struct.pack("<I", len(body))[:3] + bytes([number]) + body)

    def greet(self, plugin: str = "mysql_native_password", flags: int = 0) -> None:
        flags |= 0x200 | 0x8000 | PLUGINS | 0x8
        self.packet(
            b"\x0a8.0.99\0"
            + struct.pack("<I", 1)
            + b"saltsalt\0"
            + struct.pack("<HBH", flags & 0xFFFF, 45, 2)
            + struct.pack("<HB", flags >> 16, 21)
            + b"\0" * 10
            + b"saltsaltsalt\0"
            + plugin.encode()
            + b"\0",
            0,
        )

    def response(self) -> int:
        """One packet of the client's; its number."""
        head = self.hear(4)
        self.hear(int.from_bytes(head[:3], "little"))
        return head[3]

    def login(self, flags: int = 0, plugin: str = "mysql_native_password") -> int:
        self.greet(plugin, flags)
        number = self.response()
        if flags & SSL and number == 1 and len(self.said) == 36:
            self.encrypt()
            number = self.response()
        return number

    def switch(self, plugin: str, flags: int = 0, more: bytes = b"saltsaltsaltsaltsalt\0") -> None:
        number = self.login(flags)
        self.packet(b"\xfe" + plugin.encode() + b"\0" + more, number + 1)
        self.response()
        self.silence()


Script = Callable[[Peer], None]


@contextlib.contextmanager
def peer(script: Script, certificate: Optional[ssl.SSLContext] = None) -> Iterator[tuple[int, list[Peer]]]:
    """Listens on a port and runs the script for each connection."""
    listener = socket.create_server(("127.0.0.1", 0))
    peers: list[Peer] = []

    def talk(sock: socket.socket) -> None:
        sock.settimeout(20)
        this = Peer(sock, certificate)
        peers.append(this)
        with contextlib.suppress(OSError, ValueError):
            script(this)
        with contextlib.suppress(OSError):
            this.sock.close()

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=talk, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1], peers
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for each in peers:
            with contextlib.suppress(OSError):
                each.sock.close()


def logged_in(peer: Peer) -> None:
    """PostgreSQL: in, without a question; the first statement has come."""
    peer.startup()
    peer.ask(0)
    peer.message("Z", b"I")
    peer.answer()


def scram(peer: Peer, rounds: str) -> None:
    peer.startup()
    peer.ask(10, b"SCRAM-SHA-256\0\0")
    head = peer.hear(5)
    first = peer.hear(struct.unpack("!I", head[1:])[0] - 4)
    nonce = re.search(rb"r=([^,]+)", first)
    assert nonce is not None
    peer.ask(11, b"r=" + nonce[1] + b"xyz,s=c2FsdHNhbHQ=,i=" + rounds.encode())
    peer.silence()


def steps(*actions: Callable[[Peer], object]) -> Script:
    def script(peer: Peer) -> None:
        for action in actions:
            action(peer)

    return script


class Worst(NamedTuple):
    """One peer: what it does, under which setting, and what must be said of it."""

    name: str
    dialect: str
    tls: str
    script: Script
    error: type[ftpcoord.Error]
    text: str
    near: bool = True  # whether the peer counts as one on this host


def clear(tls: str) -> Script:
    def script(peer: Peer) -> None:
        peer.startup(tls)
        peer.ask(3)
        peer.answer()

    return script


def local_file(peer: Peer) -> None:
    peer.packet(b"\0\0\0\2\0\0\0", peer.login() + 1)
    while True:
        peer.response()
        peer.packet(b"\xfb/etc/passwd", 1)


def settings(peer: Peer) -> None:
    for number in range(1 << 24):
        peer.message("S", b"n%d\0v\0" % number)


def without_end(peer: Peer) -> None:
    """Packets that each say that they go on in the next one."""
    body, number = b"x" * 65535, peer.login() + 1
    while True:
        peer.send(b"\xff\xff\xff" + bytes([number % 256]))
        for _ in range(257):
            peer.send(body)
        number += 1


def full_login(plugin: str, request: bytes) -> Script:
    """The login that the greeting names, and then a request for all of it."""

    def script(peer: Peer) -> None:
        peer.packet(request, peer.login(SSL, plugin) + 1)
        peer.response()
        peer.silence()

    return script


IN_CLEAR = "password in clear"
WORST = [
    Worst("asks for the password in clear", "postgresql", "prefer", clear("N"), DatabaseRefused, IN_CLEAR),
    Worst(
        "asks for it in clear under TLS that proves nothing",
        "postgresql",
        "require",
        clear("S"),
        DatabaseRefused,
        IN_CLEAR,
    ),
    Worst("asks for it in clear from afar", "postgresql", "disable", clear("N"), DatabaseRefused, IN_CLEAR, False),
    Worst("has no TLS", "postgresql", "require", lambda p: p.startup("N"), DatabaseRefused, "no TLS"),
    Worst("has no TLS to verify", "postgresql", "verify", lambda p: p.startup("N"), DatabaseRefused, "no TLS"),
    Worst("has a certificate of its own", "postgresql", "verify", clear("S"), DatabaseRefused, "certificate"),
    Worst(
        "refuses the TLS request with an error",
        "postgresql",
        "prefer",
        lambda p: p.startup("E"),
        DatabaseRefused,
        "no TLS",
    ),
    Worst("is no PostgreSQL", "postgresql", "prefer", lambda p: p.startup("H"), DatabaseDown, "no PostgreSQL"),
    Worst(
        "wants a login that the driver does not know",
        "postgresql",
        "prefer",
        steps(Peer.startup, lambda p: p.ask(7)),
        DatabaseRefused,
        "login was refused",
    ),
    Worst("hangs up at once", "postgresql", "prefer", lambda p: None, DatabaseDown, "closed|reset"),
    Worst("says nothing", "postgresql", "prefer", Peer.silence, DatabaseDown, "no answer within"),
    Worst(
        "says nothing in the handshake",
        "postgresql",
        "require",
        steps(lambda p: p.hear(8), lambda p: p.send(b"S"), Peer.silence),
        DatabaseDown,
        "no answer within|timed out",
    ),
    Worst(
        "sends a byte now and then",
        "postgresql",
        "prefer",
        steps(Peer.startup, lambda p: p.send(b"R\0\0\1\0"), lambda p: p.for_ever(b"x", 0.1)),
        DatabaseDown,
        "no answer within",
    ),
    Worst(
        "announces two gigabytes and sends them",
        "postgresql",
        "prefer",
        steps(Peer.startup, lambda p: p.send(b"R\x7f\xff\xff\xff"), lambda p: p.for_ever(b"x" * 65536)),
        DatabaseDown,
        "without end",
    ),
    Worst(
        "sends notices without end",
        "postgresql",
        "prefer",
        steps(Peer.startup, lambda p: p.for_ever(b"N\0\0\0\x0cSnotice\0" * 4096)),
        DatabaseDown,
        "without end|no answer within",
    ),
    Worst(
        "sends settings without end",
        "postgresql",
        "prefer",
        steps(Peer.startup, settings),
        DatabaseDown,
        "without end|no answer within",
    ),
    Worst(
        "announces less than nothing",
        "postgresql",
        "prefer",
        steps(Peer.startup, lambda p: p.send(b"R\0\0\0\0"), Peer.silence),
        DatabaseDown,
        "without end",
    ),
    Worst(
        "asks for two billion rounds of SCRAM",
        "postgresql",
        "prefer",
        lambda p: scram(p, "2147483647"),
        DatabaseRefused,
        "rounds of SCRAM",
    ),
    Worst(
        "says much about an error",
        "postgresql",
        "prefer",
        steps(Peer.startup, lambda p: p.message("E", b"SFATAL\0C28P01\0M" + b"no! " * 200_000 + b"\0\0")),
        DatabaseRefused,
        "password was refused",
    ),
    Worst(
        "answers with rows without end",
        "postgresql",
        "prefer",
        steps(
            lambda p: logged_in(p),
            lambda p: p.send(b"T\0\0\0\x06\0\0"),
            lambda p: p.for_ever(b"D\0\0\0\x06\0\0" * 4096),
        ),
        DatabaseDown,
        "without end|no answer within",
    ),
    Worst(
        "answers with rows that it has not described",
        "postgresql",
        "prefer",
        steps(lambda p: logged_in(p), lambda p: p.for_ever(b"D\0\0\0\x06\0\0" * 4096)),
        DatabaseDown,
        "be understood",
    ),
    Worst(
        "asks for the password in clear",
        "mysql",
        "prefer",
        lambda p: p.switch("mysql_clear_password"),
        DatabaseRefused,
        IN_CLEAR,
    ),
    Worst(
        "asks for it in clear under TLS that proves nothing",
        "mysql",
        "require",
        lambda p: p.switch("mysql_clear_password", SSL),
        DatabaseRefused,
        IN_CLEAR,
    ),
    Worst(
        "asks for it in clear from afar",
        "mysql",
        "disable",
        lambda p: p.switch("mysql_clear_password"),
        DatabaseRefused,
        IN_CLEAR,
        False,
    ),
    Worst(
        "holds a dialog",
        "mysql",
        "prefer",
        lambda p: p.switch("dialog", more=b"\2Password: "),
        DatabaseRefused,
        IN_CLEAR,
    ),
    Worst(
        "asks for the hash of old",
        "mysql",
        "prefer",
        lambda p: p.switch("mysql_old_password"),
        DatabaseRefused,
        IN_CLEAR,
    ),
    Worst(
        "asks for sha256 from afar",
        "mysql",
        "prefer",
        lambda p: p.switch("sha256_password"),
        DatabaseRefused,
        IN_CLEAR,
        False,
    ),
    Worst(
        "greets with sha256 from afar, under TLS",
        "mysql",
        "require",
        full_login("sha256_password", b"\xfesha256_password\0saltsaltsaltsaltsalt\0"),
        DatabaseRefused,
        IN_CLEAR,
        False,
    ),
    Worst(
        "asks for a full login from afar",
        "mysql",
        "prefer",
        full_login("caching_sha2_password", b"\1\4"),
        DatabaseDown,
        "extra packet",
        False,
    ),
    Worst(
        "switches to sha2 from afar",
        "mysql",
        "prefer",
        lambda p: p.switch("caching_sha2_password", SSL),
        DatabaseRefused,
        IN_CLEAR,
        False,
    ),
    Worst(
        "switches to sha2 from afar after a greeting of it",
        "mysql",
        "prefer",
        full_login("caching_sha2_password", b"\xfecaching_sha2_password\0saltsaltsaltsaltsalt\0"),
        DatabaseRefused,
        IN_CLEAR,
        False,
    ),
    Worst("has no TLS", "mysql", "require", steps(lambda p: p.login()), DatabaseRefused, "TLS"),
    Worst("has no TLS to verify", "mysql", "verify", steps(lambda p: p.login()), DatabaseRefused, "TLS"),
    Worst(
        "has a certificate of its own",
        "mysql",
        "verify",
        steps(lambda p: p.login(SSL)),
        DatabaseRefused,
        "certificate|TLS",
    ),
    Worst(
        "wants a login that the driver does not know",
        "mysql",
        "prefer",
        lambda p: p.switch("auth_gssapi_client"),
        DatabaseRefused,
        "login was refused",
    ),
    Worst("hangs up at once", "mysql", "prefer", lambda p: None, DatabaseDown, "[Ll]ost connection|reset"),
    Worst("says nothing", "mysql", "prefer", Peer.silence, DatabaseDown, "timed out"),
    Worst(
        "sends a byte now and then",
        "mysql",
        "prefer",
        steps(lambda p: p.send(b"\xff\0\0\0"), lambda p: p.for_ever(b"\x0a", 0.1)),
        DatabaseDown,
        "timed out",
    ),
    Worst("sends packets without end", "mysql", "disable", without_end, DatabaseDown, "without end"),
    Worst(
        "greets without end",
        "mysql",
        "prefer",
        steps(lambda p: p.send(b"\xff\xff\xff\0\x0a"), lambda p: p.for_ever(b"x" * 65536)),
        DatabaseDown,
        "without end",
    ),
    Worst(
        "says much about an error",
        "mysql",
        "prefer",
        lambda p: p.packet(b"\xff\x15\x04#28000" + b"no! " * 200_000, 0),
        DatabaseRefused,
        "login was refused",
    ),
    Worst("asks for a file of ours", "mysql", "disable", local_file, DatabaseDown, "."),
]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return servers.tls_files(tmp_path_factory.mktemp("certificates"))


def certificate(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


def database(dialect: str, tls: str, port: int, **settings: Any) -> ftpcoord.Database:
    return ftpcoord.open_database(
        ftpcoord.Config(
            database=f"{dialect}://app:{PASSWORD}@127.0.0.1:{port}/app",
            database_tls=tls,
            coordination_group="g",
            member_id="a",
            heartbeat_frequency=0.5,
            **{"liveness_check_interval": 24, **settings},
        )
    )


@pytest.mark.parametrize("worst", WORST, ids=lambda worst: f"{worst.dialect} {worst.tls}: {worst.name}")
def test_a_hostile_database_gets_no_password_no_memory_and_no_time(
    worst: Worst, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not worst.near:
        monkeypatch.setattr(ftpcoord, "is_near", lambda sock: False)
    with peer(worst.script, certificate(certificates)) as (port, peers):
        waits = re.search("no answer|timed out", worst.text)
        store = database(worst.dialect, worst.tls, port, liveness_check_interval=7 if waits else 24)
        tracemalloc.start()
        began = time.monotonic()
        try:
            with pytest.raises(worst.error, match=worst.text) as caught:
                store.prepare()
            seconds, peak = time.monotonic() - began, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            store.close()
        said = b"".join(each.said for each in peers)
    line = str(caught.value)
    assert seconds < MOST_SECONDS
    assert peak < MOST_BYTES
    assert "\n" not in line
    assert len(line) < 1000
    assert PASSWORD not in line
    assert PASSWORD.encode() not in said
    assert b"root:" not in said


@pytest.mark.parametrize("tls", ["verify", "disable"])
@pytest.mark.parametrize("dialect", ["postgresql", "mysql"])
def test_a_login_in_clear_works_where_the_peer_is_verified_or_here(dialect: str, tls: str, certificates: Path) -> None:
    """PAM and LDAP need it."""
    secure = tls == "verify"
    script = (
        clear("S")
        if dialect == "postgresql"
        else steps(lambda p: p.switch("mysql_clear_password", SSL if secure else 0))
    )
    with peer(script, certificate(certificates)) as (port, peers):
        more: dict[str, Any] = {"liveness_check_interval": 7}
        more.update({"database_ca_file": str(certificates / "ca.pem")} if secure else {})
        store = database(dialect, tls, port, **more)
        with pytest.raises(DatabaseDown):
            store.prepare()
        store.close()
        assert any(PASSWORD.encode() + b"\0" in each.said for each in peers)


@pytest.mark.parametrize("dialect", ["postgresql", "mysql"])
def test_all_hosts_are_tried_before_one_that_refuses_is_a_reason_to_give_up(dialect: str) -> None:
    def refuses(p: Peer) -> None:
        if dialect == "mysql":
            p.packet(b"\xff\x15\x04#28000no", 0)
        else:
            p.startup()
            p.message("E", b"SFATAL\0C3D000\0Mno such database\0\0")

    with peer(refuses) as (first, _), peer(refuses) as (second, _), socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        for other, error in ((second, DatabaseRefused), (closed.getsockname()[1], DatabaseDown)):
            store = database(dialect, "disable", first)
            store.config.database = store.config.database.replace(f":{first}/", f":{first},127.0.0.1:{other}/")
            with pytest.raises(error) as caught:
                store.prepare()
            assert type(caught.value) is error
            assert f"127.0.0.1:{first}" in str(caught.value) and f"127.0.0.1:{other}" in str(caught.value)
            store.close()


@pytest.mark.parametrize("name", ["ca_file", "database_ca_file"])
def test_an_authority_that_cannot_be_read_is_told_under_its_own_setting(name: str, tmp_path: Path) -> None:
    with pytest.raises(ftpcoord.ConfigError, match=rf"^{name} .*missing.pem"):
        ftpcoord.tls_context(name, str(tmp_path / "missing.pem"), True)


def test_contexts_are_of_tls_1_2_and_take_private_authorities(certificates: Path) -> None:
    context = ftpcoord.tls_context("ca_file", str(certificates / "ca.pem"), True)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert not context.verify_flags & ssl.VERIFY_X509_STRICT
    assert context.check_hostname
