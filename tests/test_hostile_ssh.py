"""SSH and SFTP servers that do their worst, before and after the handshake: bounded memory and time, one clear error.

Memory is what Python allocates at its peak; the hostile side runs in this process and keeps next to nothing itself.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile
import paramiko
import pytest
from conftest import fetch, wait_for
from hostile import PASSWORD, SftpHost

import ftpcoord

MOST = 48 << 20  # bytes; 16 MiB of them are the window that a server may fill
TIMEOUT = 1.0
BANNER = b"SSH-2.0-hostile\r\n"


@contextlib.contextmanager
def bounded(seconds: float = TIMEOUT + 4) -> Iterator[None]:
    tracemalloc.start()
    started = time.monotonic()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MOST
        assert time.monotonic() - started < seconds
    finally:
        tracemalloc.stop()


class Peer:
    """A socket that says what `talk` tells it to, and keeps the first of what it is told."""

    def __init__(self, talk: Callable[[Callable[[bytes], None]], None]) -> None:
        self.heard = bytearray()
        self._talk = talk
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError), self._listener, self._listener.accept()[0] as sock:
            sock.settimeout(0.01)

            def say(data: bytes) -> None:
                with contextlib.suppress(socket.timeout):
                    if len(self.heard) < 100_000:
                        self.heard += sock.recv(4096)
                sock.settimeout(10)
                sock.sendall(data)
                sock.settimeout(0.0001)

            self._talk(say)

    def settings(self, **changes: Any) -> dict[str, Any]:
        return {
            "url": f"sftp://me@127.0.0.1:{self.port}/in",
            "password": PASSWORD,
            "host_key": "SHA256:none",
            "timeout": TIMEOUT,
            "database": "sqlite:///unused.db",
            **changes,
        }


def endless(piece: bytes, before: bytes = b"", pause: float = 0.0) -> Callable[[Callable[[bytes], None]], None]:
    def talk(say: Callable[[bytes], None]) -> None:
        say(before)
        while True:
            say(piece)
            time.sleep(pause)

    return talk


def packet(payload: bytes) -> bytes:
    padding = 8 - (len(payload) + 5) % 8 + 8
    return struct.pack(">IB", len(payload) + padding + 1, padding) + payload + bytes(padding)


def no_banner(say: Callable[[bytes], None]) -> None:
    time.sleep(TIMEOUT + 3)


PEERS = {
    "a greeting line without end": endless(b"x" * 65_536),
    "greeting lines without end": endless(b"hello\r\n" * 1000),
    "a greeting of NULs": endless(bytes(65_536)),
    "a greeting that drips": endless(b"x", pause=0.05),
    "silence": no_banner,
    "a packet of two gigabytes": endless(bytes(1 << 20), BANNER + struct.pack(">I", 0x7FFFFFF4)),
    "a packet of four gigabytes": endless(bytes(1 << 20), BANNER + b"\xff" * 8),
    "a packet of sixteen megabytes": endless(bytes(1 << 20), BANNER + struct.pack(">I", (16 << 20) + 4)),
    "a packet that drips": endless(b"\0", BANNER + struct.pack(">I", 30_004), pause=0.05),
    "a packet of no length": endless(bytes(4096), BANNER),
    "messages to ignore without end": endless(packet(b"\x02" + struct.pack(">I", 30_000) + bytes(30_000)), BANNER),
    "what is no message": endless(packet(b"\xfe" * 100), BANNER),
    "version 1": endless(b"\0", b"SSH-1.5-old\r\n", pause=0.05),
}


SAID = {
    "a greeting line": "a greeting without an end",
    "a greeting of": "a greeting without an end",
    "a packet of two": "an SSH packet of 2147483",
    "a packet of sixteen": "an SSH packet of 16",
}


@pytest.mark.parametrize("kind", PEERS)
def test_whatever_comes_before_the_handshake_costs_little_memory_and_time_and_no_secret(kind: str) -> None:
    peer = Peer(PEERS[kind])
    with bounded(), pytest.raises(ftpcoord.ServerDown) as caught:
        ftpcoord.open_server(ftpcoord.Config(**peer.settings()))
    assert PASSWORD not in str(caught.value) and PASSWORD.encode() not in peer.heard
    assert "\n" not in str(caught.value)
    said = [words for start, words in SAID.items() if kind.startswith(start)]
    assert all(words in str(caught.value) for words in said)


def send_raw(session: Any, kind: int, *fields: bytes, times: int = 1) -> None:
    """Messages of the channel that do not care for its window."""
    transport, channel = session.channel.transport, session.channel
    with contextlib.suppress(EOFError, OSError, paramiko.SSHException):
        for _ in range(times):
            message = paramiko.Message()
            message.add_byte(bytes([kind]))
            message.add_int(channel.remote_chanid)
            if kind == 95:
                message.add_int(1)
            for field in fields:
                message.add_string(field)
            transport._send_message(message)
            if not transport.is_active():
                return


def idle_flood(kind: int, *fields: bytes, times: int) -> Callable[[Any, str], None]:
    """After the answer to CLOSE, while nobody reads."""

    def act(session: Any, argument: str) -> None:
        session.status(0)
        threading.Thread(target=send_raw, args=(session, kind, *fields), kwargs={"times": times}, daemon=True).start()

    return act


@pytest.mark.parametrize(
    ("kind", "field", "times"),
    [
        (94, bytes(200_000), 400),
        (95, bytes(200_000), 400),
        (94, b"ab", 20_000),
        (94, b"", 20_000),
        (95, b"ab", 20_000),
    ],
)
def test_what_a_server_sends_to_an_idle_connection_is_bounded_and_ends_it(kind: int, field: bytes, times: int) -> None:
    with SftpHost(files={"a": b"1"}) as host:
        server = ftpcoord.open_server(ftpcoord.Config(database="sqlite:///unused.db", **host.settings))
        host.on("CLOSE", idle_flood(kind, field, times=times))
        with contextlib.closing(server), bounded(seconds=30):
            assert [entry.name for entry in server.list("/in")] == ["a"]
            if len(field) > 2:
                wait_for(lambda: not server.alive(), 20)
            elif kind == 94 and field:
                assert not server.alive()
            host.drop()


@pytest.mark.parametrize("piece", [b"", b"ab"])
def test_bytes_that_come_in_tiny_pieces_cost_little_more_than_their_number(piece: bytes) -> None:
    pipe = ftpcoord.FastPipe(1 << 20)
    tracemalloc.start()
    for _ in range(300_000):
        pipe.feed(piece)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20 and len(pipe) == 300_000 * len(piece)
    assert b"".join(iter(lambda: pipe.read(1000, 0) if len(pipe) else b"", b"")) == piece * 300_000


def test_who_is_slower_than_the_server_takes_its_answers_in_pieces_and_in_order() -> None:
    """All of it at once would be in the memory twice, on each connection."""
    pipe = ftpcoord.FastPipe(16 << 20)
    sent = [bytes([number]) * (256 << 10) for number in range(32)]
    for piece in sent:
        pipe.feed(piece)
    taken = [pipe.read(1 << 20, 0.1) for _ in range(8)]
    assert max(map(len, taken)) <= 1 << 20 and b"".join(taken) == b"".join(sent) and not len(pipe)


FLOODS: dict[str, Callable[[Any], None]] = {
    "data beyond the window": lambda session: send_raw(session, 94, bytes(200_000), times=400),
    "stderr": lambda session: send_raw(session, 95, bytes(200_000), times=400),
    "pieces of no bytes": lambda session: send_raw(session, 94, b"", times=20_000),
    "pieces of two bytes": lambda session: send_raw(session, 94, b"ab", times=20_000),
    "a message of a gigabyte": lambda session: session.raw(struct.pack(">I", 1 << 30) + bytes(100_000)),
    "a string of a gigabyte": lambda session: session.answer(104, struct.pack(">II", 1, 1 << 30)),
    "a count of a billion": lambda session: session.answer(104, struct.pack(">I", 1 << 30)),
}


@pytest.mark.parametrize("kind", FLOODS)
def test_whatever_comes_after_the_handshake_costs_little_memory_and_time(kind: str) -> None:
    with SftpHost(files={"a": b"1"}) as host:
        server = ftpcoord.open_server(ftpcoord.Config(database="sqlite:///unused.db", **host.settings))
        with contextlib.closing(server):
            host.on("OPENDIR", lambda session, path: FLOODS[kind](session))
            with bounded(seconds=20), pytest.raises(ftpcoord.ServerDown) as caught:
                server.list("/in")
    assert kind != "stderr" or "more than it was allowed to" in str(caught.value)


@pytest.mark.parametrize("limit", ["MAX_LISTING", "MAX_ENTRIES"])
def test_a_listing_is_bounded_in_bytes_and_in_names(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ftpcoord, limit, 100_000 if limit == "MAX_LISTING" else 1000)
    name = b"x" * (10_000 if limit == "MAX_LISTING" else 1)
    with SftpHost() as host:
        host.on("READDIR", lambda session, path: session.names([(name, hostile.attributes(1))] * 3), times=None)
        server = ftpcoord.open_server(ftpcoord.Config(database="sqlite:///unused.db", **host.settings))
        with contextlib.closing(server), pytest.raises(ftpcoord.ServerDown, match="without an end"):
            server.list("/in")
    with hostile.FtpHost(mlsd=False) as host:
        line = b"-rw-r--r-- 1 u g 5 Jan 12  2025 " + name[:5000] + b"\r\n"
        host.on("LIST", hostile.stream(line for _ in range(1_000_000)))
        server = ftpcoord.open_server(ftpcoord.Config(database="sqlite:///unused.db", **host.settings))
        with contextlib.closing(server), pytest.raises(ftpcoord.ServerDown, match="without an end"):
            server.list("/in")


@pytest.mark.parametrize("code", [2, 3, 4])
def test_a_folder_of_which_a_part_was_listed_is_not_gone(code: int) -> None:
    with SftpHost(files={"a": b"1"}) as host:
        server = ftpcoord.open_server(ftpcoord.Config(database="sqlite:///unused.db", **host.settings))
        with contextlib.closing(server):
            for call in (lambda: server.list("/in"), lambda: server.exists("/in/a")):
                host.on("LSTAT", hostile.status(4))
                host.on("READDIR", lambda session, path: session.behave("READDIR", path, b""))
                host.on("READDIR", hostile.status(code))
                with pytest.raises(ftpcoord.FileRefused):
                    call()


# -- algorithms -------------------------------------------------------------------------------------------------------

WEAK = ["3des", "cbc", "md5", "sha1", "-96", "arcfour", "blowfish", "ssh-rsa", "ssh-dss", "group1-", "none,none"]


def test_nothing_weak_is_offered_to_a_server_whichever_paramiko_is_installed() -> None:
    peer = Peer(endless(packet(b"\x02" + struct.pack(">I", 10) + bytes(10)), BANNER, pause=0.05))
    with pytest.raises(ftpcoord.ServerDown):
        ftpcoord.open_server(ftpcoord.Config(**peer.settings()))
    heard = peer.heard.decode("latin-1")
    assert "aes128-gcm" in heard and "hmac-sha2-256" in heard and "ssh-ed25519" in heard
    assert [name for name in WEAK if name in heard] == []


@pytest.mark.parametrize(
    ("kind", "offered"),
    [
        ("ciphers", "3des-cbc"),
        ("ciphers", "aes256-cbc"),
        ("ciphers", "chacha20-poly1305@openssh.com"),
        ("macs", "hmac-md5-96"),
        ("macs", "hmac-sha1"),
        ("kex", "diffie-hellman-group14-sha1"),
    ],
)
def test_a_server_with_nothing_that_is_taken_is_told_what_it_offers_and_what_to_do(kind: str, offered: str) -> None:
    with SftpHost() as host:
        host.offers[kind] = (offered,)
        with pytest.raises(ftpcoord.ServerDown) as caught:
            ftpcoord.open_server(ftpcoord.Config(database="sqlite:///unused.db", **host.settings))
    said = str(caught.value)
    assert f"offers {offered};" in said and "enable" in said and "pip install" not in said
    assert {"ciphers": "aes256-ctr", "macs": "hmac-sha2-256", "kex": "ecdh-sha2-nistp256"}[kind] in said
    assert not host.commands, "no login is tried"


# -- logins -----------------------------------------------------------------------------------------------------------


def refused(host: SftpHost, **changes: Any) -> str:
    settings = {"database": "sqlite:///unused.db", **host.settings, "timeout": 5, **changes}
    with pytest.raises(ftpcoord.LoginRefused) as caught:
        ftpcoord.open_server(ftpcoord.Config(**settings))
    assert PASSWORD not in str(caught.value)
    return str(caught.value)


def ask_for_change(transport: Any, argument: str) -> None:
    message = paramiko.Message()
    message.add_byte(b"\x3c")
    message.add_string("Your password has expired.")
    message.add_string("")
    transport._send_message(message)
    time.sleep(0.2)


def test_a_password_that_has_to_be_changed_is_a_refused_login_and_not_a_server_that_is_down() -> None:
    with SftpHost() as host:
        host.on("LOGIN", ask_for_change)
        assert "changed" in refused(host) and host.commands == ["LOGIN"]


def test_a_wrong_password_is_said_to_be_wrong_where_it_is_asked_for_interactively() -> None:
    with SftpHost() as host:
        host.logins = "keyboard-interactive"
        assert "wants keyboard-interactive" not in refused(host, password="wrong")
        assert host.commands == ["LOGIN", "ANSWER"]
        ftpcoord.open_server(ftpcoord.Config(database="sqlite:///unused.db", **host.settings)).close()


@pytest.mark.parametrize("prompts", [["Password: ", "New password: "], ["Password: ", "Password: "]])
def test_a_second_question_is_not_answered_by_the_password(prompts: list[str]) -> None:
    with SftpHost() as host:
        host.logins, host.prompts = "keyboard-interactive", prompts
        assert prompts[1].strip() in refused(host) and host.commands.count("ANSWER") == 1


@pytest.mark.parametrize("logins", ["publickey,password", "password", "publickey,keyboard-interactive"])
def test_a_refused_key_is_followed_by_the_configured_password(tmp_path: Any, logins: str) -> None:
    key = tmp_path / "key"
    paramiko.ECDSAKey.generate().write_private_key_file(str(key))
    with SftpHost() as host:
        host.logins = logins
        settings = {"database": "sqlite:///unused.db", **host.settings, "key": str(key)}
        ftpcoord.open_server(ftpcoord.Config(**settings)).close()
        said = refused(host, key=str(key), password="wrong")
        assert "the key: " in said and "the password: " in said
        said = refused(host, key=str(key), password=None)
        assert "the key: " in said and "the password" not in said


# -- attributes -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["no long name", "a long name that is the bare name"])
def bare(request: pytest.FixtureRequest) -> Iterator[SftpHost]:
    """A server whose attributes of READDIR have no type bits."""
    with SftpHost() as host:
        host.long_names = request.param
        for name in ("data.csv", "labels.csv", "-dash", "d"):
            host.files[name] = b"12345"
            host.entries.append((name.encode(), hostile.attributes(5, mode=0o644)))
        list_only(host)
        yield host


def list_only(host: SftpHost) -> None:
    """The next listing has the entries that were put there, and no others."""
    host.on("READDIR", lambda session, path: session.names(host.entries))
    host.on("READDIR", hostile.status(1))


def test_where_a_listing_tells_no_kind_stat_does(bare: SftpHost) -> None:
    with contextlib.closing(open_sftp(bare)) as server:
        assert sorted((entry.name, entry.kind, entry.size) for entry in server.list("/in")) == [
            ("-dash", "file", 5),
            ("d", "file", 5),
            ("data.csv", "file", 5),
            ("labels.csv", "file", 5),
        ]
        assert server.unread == []


def test_what_not_even_stat_tells_the_kind_of_is_no_empty_folder(bare: SftpHost) -> None:
    bare.on("STAT", lambda session, path: session.answer(105, hostile.attributes(5, mode=0o644)), times=None)
    with contextlib.closing(open_sftp(bare)) as server:
        with pytest.raises(ftpcoord.FileRefused, match="no kind"):
            server.list("/in")
        bare.entries.append((b"known", hostile.attributes(5)))
        list_only(bare)
        assert [entry.name for entry in server.list("/in")] == ["known"] and len(server.unread) == 4


def open_sftp(host: SftpHost) -> ftpcoord.FileServer:
    return ftpcoord.open_server(ftpcoord.Config(database="sqlite:///unused.db", **host.settings))


def test_an_existing_folder_that_stat_tells_no_kind_of_is_not_made_again() -> None:
    with SftpHost() as host, contextlib.closing(open_sftp(host)) as server:
        host.on("STAT", lambda session, path: session.answer(105, hostile.attributes(0, mode=0o755)), times=None)
        server.mkdir("/in/done")
        assert not host.said("MKDIR")
        host.on("OPENDIR", hostile.status(4), times=None)
        with pytest.raises(ftpcoord.FileRefused):
            server.mkdir("/in/file")


@pytest.mark.parametrize("action", ["delete", "move:done"])
def test_a_server_whose_lstat_never_says_yes_is_not_believed_its_no(action: str) -> None:
    with SftpHost({"a": b"1", "done/a": b"yesterday's"}) as host, contextlib.closing(open_sftp(host)) as server:
        host.on("LSTAT", hostile.status(2), times=None)
        listed = server.list("/in")[0]
        assert server.same("/in/a", listed) and server.same("/in/b", listed) is None
        server.put_away("/in/a", action)
        assert host.files.pop("done/a") == b"yesterday's"
        assert list(host.files) == ([] if action == "delete" else ["done/a.1"])


def test_a_server_whose_lstat_says_yes_to_folders_alone_is_not_believed_its_no() -> None:
    with SftpHost({"a": b"1"}) as host, contextlib.closing(open_sftp(host)) as server:

        def lstat(session: Any, path: str) -> None:
            session.behave("LSTAT", path, b"") if path in ("/in", "/in/done") else session.status(2)

        host.on("LSTAT", lstat, times=None)
        assert server.exists("/in/done")
        assert server.exists("/in/a") and server.same("/in/a", server.list("/in")[0])


def test_an_empty_file_that_is_refused_as_in_use_is_not_now() -> None:
    """Its first bytes may be on their way."""
    with SftpHost({"a": b""}) as host, contextlib.closing(open_sftp(host)) as server:
        (listed,) = server.list("/in")
        host.on("READ", hostile.status(3, b"another process has locked it"), times=2)
        job = ftpcoord.Job("/in/a", 0, bytes, listed)
        ((_, error),) = server.fetch_many([job])
        assert isinstance(error, ftpcoord.NotNow), error
        host.behave()
        assert list(server.fetch_many([job])) == [(job, None)]


@pytest.mark.parametrize("verb", ["OPEN", "READ"])
@pytest.mark.parametrize(
    ("code", "said", "counts"),
    [
        (4, b"The process cannot access the file because it is being used by another process.", False),
        (3, b"a is locked", False),
        (17, b"no", False),  # SSH_FX_LOCK_CONFLICT of later versions
        (3, b"busy: no", True),  # the file's name
        (3, b"no", True),
    ],
)
def test_a_file_in_use_is_not_now(verb: str, code: int, said: bytes, counts: bool) -> None:
    with SftpHost({"busy": b"1"}) as host, contextlib.closing(open_sftp(host)) as server:
        host.on(verb, hostile.status(code, said), times=2)
        job = ftpcoord.Job("/in/busy", 1, bytes)
        ((_, error),) = server.fetch_many([job])
        assert isinstance(error, ftpcoord.FileRefused if counts else ftpcoord.NotNow), error
        host.behave()
        assert list(server.fetch_many([job])) == [(job, None)]


@pytest.mark.parametrize("code", [0, 3, 4, 99])
@pytest.mark.parametrize("size", [0, 32768, 40000])
def test_the_end_of_a_file_may_be_told_by_any_refusal(code: int, size: int) -> None:
    with SftpHost({"a": b"x" * size}) as host, contextlib.closing(open_sftp(host)) as server:

        def read(session: Any, path: str) -> None:
            session.behave("READ", path, b"") if session.offset < most else session.status(code)

        host.on("READ", read, times=None)
        (listed,) = server.list("/in")
        job, most = ftpcoord.Job("/in/a", size, bytes, listed), size
        assert list(server.fetch_many([job])) == [(job, None)]
        most = 0
        ((_, error),) = server.fetch_many([job])
        assert error is None if size == 0 else isinstance(error, ftpcoord.FileRefused)


@pytest.mark.parametrize("number", [1, 3])
def test_a_server_that_hangs_up_after_some_files_gives_them_all_at_once_and_first_time(
    tmp_path: Path, number: int
) -> None:
    files = {f"{count:02}": b"1" * count for count in range(12)}
    with SftpHost(dict(files)) as host:

        def hang_up(session: Any, path: str) -> None:
            session.reads = getattr(session, "reads", 0) + 1
            if session.reads > number:
                time.sleep(0.1)  # what was said before arrives
                raise hostile.Gone
            session.behave("READ", path, b"")

        host.on("READ", hang_up, times=None)
        with hostile.Site(tmp_path, host.settings, workers=1, retry_delay=3600) as site:
            site.arrive(files)
            assert not site.all("file_failed") and not site.all("file_done", attempt=2)


@pytest.mark.parametrize("action", ["delete", "move:done"])
def test_what_is_there_is_not_put_away_by_a_refusal_that_calls_it_gone(action: str) -> None:
    with SftpHost({"a": b"1"}) as host, contextlib.closing(open_sftp(host)) as server:
        host.on("REMOVE", hostile.status(2), times=None)
        host.on("RENAME", hostile.status(2), times=None)
        with pytest.raises(ftpcoord.FileRefused):
            server.put_away("/in/a", action)
        del host.files["a"]
        server.put_away("/in/a", action)


@pytest.mark.parametrize(
    ("seconds", "mtime"),
    [
        (0, "1970-01-01T00:00:00"),
        (-1, "1969-12-31T23:59:59"),
        (-(2**31), "1901-12-13T20:45:52"),
        (2**31 - 1, "2038-01-19T03:14:07"),
    ],
)
def test_a_time_before_1970_is_shown_as_that(seconds: int, mtime: str) -> None:
    with SftpHost() as host, contextlib.closing(open_sftp(host)) as server:
        host.entries.append((b"old", hostile.attributes(5, mtime=seconds)))
        assert [entry.mtime for entry in server.list("/in")] == [mtime]


def test_a_handle_longer_than_the_draft_allows_is_not_repeated_in_every_request() -> None:
    """Four megabytes in each READ of a large file would be hundreds, kept here until they are sent."""
    with SftpHost({"a.bin": b"x" * 100_000}) as host:
        host.on("OPEN", lambda session, argument: session.answer(102, struct.pack(">I", 300) + b"h" * 300))
        server = ftpcoord.open_server(ftpcoord.Config(database="sqlite:///unused.db", **host.settings))
        with pytest.raises(ftpcoord.ServerDown, match="handle of 300 bytes"):
            fetch(server, "/in/a.bin", 100_000, lambda data: None)
        assert not host.said("READ")
