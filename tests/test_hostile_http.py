"""A hostile HTTP client does its worst by name: probes are answered all the while, memory, threads and time stay
bounded, nothing secret is told, and the log says little."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import wait_for

import ftpcoord

SECRET = "c4n4ry-91b7"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ftpcoord.StatusServer]:
    listener = ftpcoord.Listener(
        url=f"sftp://me:{SECRET}@files.example/in",
        database=f"sqlite:///{tmp_path / 'c.db'}",
        exec="true",
        key_passphrase=SECRET,
        database_password=SECRET,
        coordination_group="g",
        member_id="a",
    )
    made = ftpcoord.StatusServer(("127.0.0.1", 0), [listener])
    yield made
    made.close()


class Client:
    """Opens connections and keeps them."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.open: list[socket.socket] = []

    def connect(self, first: bytes = b"") -> socket.socket:
        made = socket.create_connection(("127.0.0.1", self.port), 5)
        self.open.append(made)
        with contextlib.suppress(OSError):
            made.sendall(first)
        return made

    def read(self, request: bytes) -> bytes:
        """All that is answered; nothing if we are cut."""
        found = b""
        with self.connect(request) as one, contextlib.suppress(OSError):
            one.settimeout(10)
            while data := one.recv(65536):
                found += data
        return found

    # -- its worst, by name

    def idles(self) -> None:
        for _ in range(100):
            self.connect()

    def stops_in_the_middle(self) -> None:
        for _ in range(100):
            self.connect(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-")

    def drips(self) -> None:
        for _ in range(40):
            self.connect(b"G")
        for letter in b"ET / HTTP/1.1\r\n":
            for one in self.open:
                with contextlib.suppress(OSError):
                    one.send(bytes([letter]))
            time.sleep(0.02)

    def reads_nothing(self) -> None:
        for _ in range(60):
            made = socket.socket()
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            made.connect(("127.0.0.1", self.port))
            self.open.append(made)
            with contextlib.suppress(OSError):
                made.sendall(b"GET / HTTP/1.1\r\n\r\n")

    def sends_a_head_without_end(self) -> None:
        with contextlib.suppress(OSError):
            one = self.connect(b"GET / HTTP/1.1\r\n")
            for _ in range(200):
                one.sendall(b"X: " + b"x" * 100_000)

    def sends_a_line_without_end(self) -> None:
        with contextlib.suppress(OSError):
            one = self.connect()
            for _ in range(200):
                one.sendall(b"x" * 100_000)

    def sends_a_body_without_end(self) -> None:
        with contextlib.suppress(OSError):
            one = self.connect(b"GET /livez HTTP/1.1\r\nContent-Length: 999999999999\r\n\r\n")
            for _ in range(200):
                one.sendall(b"x" * 100_000)

    def asks_a_thousand_times_at_once(self) -> None:
        self.connect(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)

    def asks_for_many_pages(self) -> None:
        for _ in range(150):
            self.connect(b"GET / HTTP/1.1\r\n\r\n")

    def resets(self) -> None:
        for _ in range(100):
            with self.connect(b"GET / HTTP/1.1\r\n\r\n") as one:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def speaks_something_else(self) -> None:
        self.connect(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
        for first in (b"SSH-2.0-x", b"PRI * HTTP/2.0", b"\0" * 100, b"", b"GET", b"GET / HTTP/9", b"GET / x HTTP/1.1"):
            assert b" 400 " in self.read(first + b"\r\n\r\n").partition(b"\r\n")[0], first

    def asks_for_other_things(self) -> None:
        targets = [
            b"/../../etc/passwd",
            b"/%2e%2e/",
            b"//evil.example/",
            b"http://evil.example/",
            b"/\x00",
            b"*",
            b"/?group=%00",
            b"/?group=<script>",
            b"/?refresh=" + b"9" * 5000,
            b"/?" + b"a=1&" * 500,
        ]
        for target in targets:
            answer = self.read(b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 200")) and b"<script>" not in answer, target
        for method in (b"POST", b"PUT", b"DELETE", b"TRACE", b"OPTIONS", b"CONNECT", b"get", b"X" * 3000):
            assert self.read(method + b" / HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 405")


WORST = [name for name in vars(Client) if name[0] != "_" and name not in ("connect", "read")]


def livez(port: int, source: str) -> float:
    """Seconds until a probe is answered."""
    began = time.monotonic()
    probe = http.client.HTTPConnection("127.0.0.1", port, timeout=15, source_address=(source, 0))
    probe.request("GET", "/livez", headers={"Host": "10.1.2.3:8080"})
    answer = probe.getresponse()
    assert answer.status == 200 and answer.read() == b"g: ok\n"
    probe.close()
    return time.monotonic() - began


def resident() -> int:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="there is no /proc")
@pytest.mark.parametrize("worst", WORST)
def test_whatever_a_client_does_probes_are_answered_and_memory_and_threads_stay_bounded(
    server: ftpcoord.StatusServer, caplog: pytest.LogCaptureFixture, worst: str
) -> None:
    """The probe comes from an address of its own, and from the attacker's."""
    client = Client(server.port)
    before, threads = resident(), threading.active_count()
    most = [0, 0]
    failed: list[BaseException] = []

    def run() -> None:
        try:
            getattr(client, worst)()
        except BaseException as exc:
            failed.append(exc)

    try:
        with caplog.at_level(logging.INFO, logger="ftpcoord"):
            attack = threading.Thread(target=run)
            attack.start()
            while attack.is_alive():
                livez(server.port, "127.0.0.2")
                most = [max(most[0], resident()), max(most[1], threading.active_count())]
            for source in ("127.0.0.2", "127.0.0.1"):
                for _ in range(20):
                    livez(server.port, source)
            assert ftpcoord.log.flush(10)
    finally:
        for one in client.open:
            one.close()
    assert not failed, failed
    assert most[0] - before < 30 and most[1] - threads < 80, most
    assert len(caplog.records) <= 1 and SECRET not in caplog.text
    wait_for(lambda: threading.active_count() <= threads + 2, 10, "threads to end")


def test_a_slow_client_is_not_cut_for_the_many_connections_of_another(server: ftpcoord.StatusServer) -> None:
    client = Client(server.port)
    with socket.create_connection(("127.0.0.1", server.port), 5, source_address=("127.0.0.2", 0)) as slow:
        slow.sendall(b"GET /livez ")
        client.idles()
        livez(server.port, "127.0.0.3")
        slow.sendall(b"HTTP/1.1\r\n\r\n")
        assert slow.recv(100).startswith(b"HTTP/1.1 200")
    for one in client.open:
        one.close()


HOSTS = {
    "": 200,
    "127.0.0.1": 200,
    "127.0.0.1:8080": 200,
    "[::1]:8080": 200,
    "10.9.8.7": 200,
    "localhost:1": 200,
    "LOCALHOST": 200,
    "localhost.": 200,
    socket.gethostname(): 200,
    socket.gethostname().upper() + ":80": 200,
    "evil.example": 421,
    "evil.example:8080": 421,
    "127.0.0.1.evil.example": 421,
    "localhost.evil.example": 421,
    "evil.example\r\nHost: localhost": 400,
    "localhost\r\nhost : evil.example": 400,
    "127.0.0.1@evil.example": 421,
    "1.2.3": 421,
}


@pytest.mark.parametrize("host", HOSTS)
def test_pages_are_for_addresses_and_names_of_this_host_and_probes_for_any(
    server: ftpcoord.StatusServer, host: str
) -> None:
    """A page in a browser whose name was made to point here must not read the status (DNS rebinding)."""
    client = Client(server.port)

    def status(path: str) -> tuple[int, bytes]:
        answer = client.read(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        return int(answer.split()[1]), answer

    for path in ("/", "/status", "/status?group=g", "/nothing"):
        code, answer = status(path)
        wanted = 404 if HOSTS[host] == 200 and path == "/nothing" else HOSTS[host]
        assert code == wanted, path
        assert code == 200 or b"sftp://" not in answer
    if HOSTS[host] != 400:
        for path in ("/livez", "/metrics"):
            assert status(path)[0] == 200


def test_names_that_dns_is_slow_about_cost_no_more_than_one_thread(
    server: ftpcoord.StatusServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()
    monkeypatch.setattr(socket, "getfqdn", lambda *_: "slow.example" if answered.wait(20) else "")
    client, before = Client(server.port), threading.active_count()
    for _ in range(100):
        client.connect(b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n").close()
    wait_for(lambda: b" 421 " in client.read(b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n"))
    assert threading.active_count() - before < 40
    answered.set()
    wait_for(lambda: b" 200 " in client.read(b"GET / HTTP/1.1\r\nHost: slow.example\r\n\r\n"))
