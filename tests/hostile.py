"""File servers that misbehave on command: FTP, and SFTP over paramiko's server side.  All files are in memory.

    with FtpHost(files={"a.csv": b"content"}) as host:
        host.on("RETR", cut_after(3))           # the next RETR only; host.on("RETR", ..., times=None) for all
        ...
        host.commands                           # what clients said

An action gets the session and the argument.  Without one left for its verb, a command is answered as it should be.
The SFTP host takes actions for LIST, OPEN, READ, LOGIN; see SftpHost.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import logging
import os
import posixpath
import socket
import sqlite3
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Optional, Union

import paramiko
import paramiko.common
import paramiko.server
from conftest import wait_for

import ftpcoord

Action = Callable[[Any, str], None]
NOTHING: Mapping[Any, Any] = {}
BEGAN = datetime.datetime(2024, 1, 12, 10, 15, 30)
PASSWORD = "hush-hush"
PATIENCE = 20.0
MOST_SECONDS = 60.0  # a fault of the client's must not leave threads of ours behind


class Gone(Exception):
    """The session is over."""


class Host:
    """What both kinds have in common."""

    scheme = ""

    def __init__(self, files: Mapping[Any, bytes] = NOTHING) -> None:
        self.files = {_text(name): content for name, content in files.items()}
        self.times: dict[str, datetime.datetime] = {}
        self.folders: set[str] = set()
        self.commands: list[str] = []
        self.sessions = 0
        self.open_sessions = 0
        self.over = threading.Event()
        self.password = PASSWORD
        self._actions: dict[str, list[tuple[Action, Optional[int]]]] = {}
        self.lock = threading.Lock()
        self.sockets: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self.listener.close()
        self.drop()

    def drop(self) -> None:
        """Cuts all sessions."""
        with self.lock:
            sockets, self.sockets = self.sockets, []
        for sock in sockets:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    @property
    def settings(self) -> dict[str, Any]:
        return {"url": f"{self.scheme}://me@127.0.0.1:{self.port}/in", "password": self.password, "timeout": 1}

    def on(self, verb: str, action: Action, times: Optional[int] = 1) -> None:
        """The next so many commands of this kind are answered by `action`; None: all that follow."""
        with self.lock:
            self._actions.setdefault(verb, []).append((action, times))

    def behave(self) -> None:
        """From here on everything is answered as it should be."""
        with self.lock:
            self._actions.clear()

    def take(self, verb: str) -> Optional[Action]:
        with self.lock:
            waiting = self._actions.get(verb, [])
            if not waiting:
                return None
            action, times = waiting.pop(0)
            if times is None or times > 1:
                waiting.insert(0, (action, None if times is None else times - 1))
            return action

    def put(self, name: Union[str, bytes], content: bytes, seconds: int = 0) -> None:
        """A file, so many seconds younger than the others."""
        self.files[_text(name)] = content
        self.times[_text(name)] = BEGAN + datetime.timedelta(seconds=seconds)

    def said(self, verb: str) -> list[str]:
        """The commands of this kind that came."""
        return [command for command in self.commands if command.split(" ")[0] == verb]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while not self.over.is_set():
                sock = self.listener.accept()[0]
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self.lock:
                    self.sockets.append(sock)
                self.sessions += 1
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        self.open_sessions += 1
        try:
            self.session(sock)
        except (OSError, Gone, ValueError, AssertionError):
            pass
        finally:
            self.open_sessions -= 1
            sock.close()

    def session(self, sock: socket.socket) -> None:
        raise NotImplementedError


def _text(name: Union[str, bytes]) -> str:
    """Names are latin-1 text here, so that each byte is a character."""
    raw = name if isinstance(name, bytes) else name.encode("utf-8", "surrogateescape")
    return raw.decode("latin-1")


# ---------------------------------------------------------------------------------------------------------------------
# FTP
# ---------------------------------------------------------------------------------------------------------------------


class FtpHost(Host):
    """An FTP server with one folder /in (and what MKD adds), LIST or MLSD, SIZE, MDTM."""

    scheme = "ftp"

    def __init__(self, files: Mapping[Any, bytes] = NOTHING, mlsd: bool = True, zone: int = 0) -> None:
        self.mlsd, self.zone = mlsd, zone  # minutes that LIST is ahead of UTC
        self.lines: list[bytes] = []  # further ones of the listing of /in
        self.most_sessions = 10_000
        super().__init__(files)

    def session(self, sock: socket.socket) -> None:
        FtpSession(self, sock).run()

    def listing(self, folder: str) -> bytes:
        lines = [self.folder_line(path) for path in sorted(self.folders) if posixpath.dirname(path) == folder]
        lines += [self.folder_line("/in")] if folder == "/" else []
        for name, content in list(self.files.items()):
            place, _, base = name.rpartition("/")
            if posixpath.normpath(f"/in/{place}") == folder:
                lines.append(self.line(base, content, self.times.get(name, BEGAN)))
        return b"".join(line + b"\r\n" for line in lines + (self.lines if folder == "/in" else []))

    def folder_line(self, path: str) -> bytes:
        name = posixpath.basename(path)
        text = f"type=dir; {name}" if self.mlsd else f"drwxr-xr-x    2 0        0            4096 Jan 12  2024 {name}"
        return text.encode("latin-1")

    def line(self, name: str, content: bytes, when: datetime.datetime) -> bytes:
        if self.mlsd:
            text = f"type=file;size={len(content)};modify={when:%Y%m%d%H%M%S}; {name}"
        else:
            when += datetime.timedelta(minutes=self.zone)
            old = abs(datetime.datetime.now() - when) > datetime.timedelta(days=180)
            clock = f"{when: %Y}" if old else f"{when:%H:%M}"
            text = f"-rw-r--r--    1 0        0     {len(content):12} {when:%b %d} {clock} {name}"
        return text.encode("latin-1")


class FtpSession:
    """One control connection."""

    def __init__(self, host: FtpHost, sock: socket.socket) -> None:
        self.host, self.sock = host, sock
        self.folder = "/"
        self.passive: Optional[socket.socket] = None
        self.source = ""

    def say(self, text: str) -> None:
        self.sock.sendall(text.encode("latin-1") + b"\r\n")

    def data(self) -> socket.socket:
        """The data connection that the client has made."""
        assert self.passive is not None
        self.passive.settimeout(MOST_SECONDS)
        with self.passive:
            connection: socket.socket = self.passive.accept()[0]
        with self.host.lock:
            self.host.sockets.append(connection)
        return connection

    def send(self, content: bytes, end: str = "226 done") -> None:
        self.say("150 here")
        with self.data() as connection:
            connection.sendall(content)
        self.say(end)

    def reset(self, *sockets: socket.socket) -> None:
        """An RST on each, as from a machine that has been started anew."""
        for sock in sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        raise Gone

    def name(self, path: str) -> str:
        path = posixpath.normpath(posixpath.join(self.folder, path))
        return path[len("/in/") :] if path.startswith("/in/") else path

    def run(self) -> None:
        host = self.host
        greeting = host.take("GREETING")
        if host.open_sessions > host.most_sessions:
            self.say("421 too many connections")
            return
        if greeting:
            greeting(self, "")
        else:
            self.say("220 hello")
        for raw in self.sock.makefile("rb"):
            line = raw.decode("latin-1").rstrip("\r\n")
            verb, _, argument = line.partition(" ")
            host.commands.append(line if verb != "PASS" else "PASS")
            action = host.take(verb)
            if action is not None:
                action(self, argument)
            else:
                getattr(self, f"on_{verb.lower()}", self.unknown)(argument)

    def unknown(self, argument: str) -> None:
        self.say("502 no")

    def on_user(self, argument: str) -> None:
        self.say("331 password")

    def on_pass(self, argument: str) -> None:
        self.say("230 in" if argument == self.host.password else "530 no")

    def on_feat(self, argument: str) -> None:
        self.say("211-\r\n MLST type*;size*;modify*;\r\n211 end" if self.host.mlsd else "502 no")

    def on_type(self, argument: str) -> None:
        self.say("200 ok")

    on_noop = on_type

    def on_pwd(self, argument: str) -> None:
        self.say('257 "/"')

    def on_cwd(self, argument: str) -> None:
        path = posixpath.normpath(posixpath.join(self.folder, argument))
        if path in ("/", "/in") or path in self.host.folders:
            self.folder = path
            self.say("250 ok")
        else:
            self.say("550 no such folder")

    def on_epsv(self, argument: str) -> None:
        self.passive = socket.create_server(("127.0.0.1", 0))
        self.say(f"229 (|||{self.passive.getsockname()[1]}|)")

    def on_pasv(self, argument: str) -> None:
        self.passive = socket.create_server(("127.0.0.1", 0))
        port = self.passive.getsockname()[1]
        self.say(f"227 here (127,0,0,1,{port >> 8},{port & 255})")

    def on_mlsd(self, argument: str) -> None:
        self.send(self.host.listing(self.folder))

    on_list = on_mlsd

    def on_retr(self, argument: str) -> None:
        content = self.host.files.get(self.name(argument))
        if content is None:
            self.say("550 no such file")
        else:
            self.send(content)

    def on_mlst(self, argument: str) -> None:
        name = self.name(argument)
        content = self.host.files.get(name)
        if argument in self.host.folders or argument == "/in":
            self.say(f"250-it is\r\n type=dir; {argument}\r\n250 end")
        elif content is None:
            self.say("550 no such file")
        else:
            line = self.host.line(argument, content, self.host.times.get(name, BEGAN)).decode("latin-1")
            self.say(f"250-it is\r\n {line}\r\n250 end")

    def on_size(self, argument: str) -> None:
        content = self.host.files.get(self.name(argument))
        self.say("550 no such file" if content is None else f"213 {len(content)}")

    def on_mdtm(self, argument: str) -> None:
        self.say(f"213 {self.host.times.get(self.name(argument), BEGAN):%Y%m%d%H%M%S}")

    def on_dele(self, argument: str) -> None:
        self.say("550 no such file" if self.host.files.pop(self.name(argument), None) is None else "250 gone")

    def on_mkd(self, argument: str) -> None:
        self.host.folders.add(posixpath.normpath(posixpath.join(self.folder, argument)))
        self.say("257 made")

    def on_rnfr(self, argument: str) -> None:
        self.source = self.name(argument)
        self.say("350 go on" if self.source in self.host.files else "550 no such file")

    def on_rnto(self, argument: str) -> None:
        self.host.files[self.name(argument)] = self.host.files.pop(self.source)
        self.say("250 renamed")


class FtpsHost(FtpHost):
    """FTP under TLS from the first byte. `ends` data connections: `properly`; `cut`, without TLS's own end;
    `untouched`, without a handshake where there is nothing to send. `early`: the handshake comes before the 150."""

    scheme = "ftps"

    def __init__(
        self,
        certificate: Path,
        files: Mapping[Any, bytes] = NOTHING,
        ends: str = "properly",
        early: bool = False,
        **options: Any,
    ) -> None:
        self.ca = certificate.with_name("ca.pem")
        self.ends, self.early = ends, early
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate, certificate.with_name("key.pem"))
        super().__init__(files, **options)

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "ca_file": str(self.ca)}

    def session(self, sock: socket.socket) -> None:
        sock.settimeout(MOST_SECONDS)
        with self.context.wrap_socket(sock, server_side=True) as wrapped:
            FtpsSession(self, wrapped).run()


class FtpsSession(FtpSession):
    host: FtpsHost

    on_pbsz = on_prot = FtpSession.on_type

    def send(self, content: bytes, end: str = "226 done") -> None:
        if not self.host.early:
            self.say("150 here")
        raw = self.data()
        if content or self.host.ends != "untouched":
            with self.host.context.wrap_socket(raw, server_side=True) as connection:
                if self.host.early:
                    self.say("150 here")
                connection.sendall(content)
                if self.host.ends != "cut":
                    connection.unwrap()
        else:
            raw.close()
            if self.host.early:
                self.say("150 here")
        self.say(end)


def reply(text: str) -> Action:
    """Says this, and nothing happens."""
    return lambda session, argument: session.say(text)


def answers(*steps: Union[str, bytes]) -> Action:
    """These one after the other: text is said, bytes go through a data connection."""

    def act(session: FtpSession, argument: str) -> None:
        for step in steps:
            if isinstance(step, str):
                session.say(step)
            else:
                with session.data() as data:
                    data.sendall(step)

    return act


def say_and_leave(text: str) -> Action:
    def act(session: FtpSession, argument: str) -> None:
        session.say(text)
        raise Gone

    return act


def cut_after(count: int, control: bool = True) -> Action:
    """So many bytes of the file, then an RST of the data connection, and of the control connection or a 426."""

    def act(session: FtpSession, argument: str) -> None:
        session.say("150 here")
        data = session.data()
        data.sendall(session.host.files[session.name(argument)][:count])
        if control:
            session.reset(data, session.sock)
        data.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        data.close()
        session.say("426 connection lost")

    return act


def stall_after(count: int) -> Action:
    """So many bytes of what was asked for, then silence until the client leaves."""

    def act(session: FtpSession, argument: str) -> None:
        session.say("150 here")
        with session.data() as data:
            data.sendall(session.host.files.get(session.name(argument), b"type=file;size=1; x\r\n")[:count])
            data.settimeout(MOST_SECONDS)
            data.recv(1)
        raise Gone

    return act


def silence(session: FtpSession, argument: str) -> None:
    """No answer until the client leaves."""
    session.sock.settimeout(MOST_SECONDS)
    session.sock.recv(1)
    raise Gone


def stream(pieces: Iterable[bytes], pause: float = 0.0) -> Action:
    """These bytes, one piece after the other, until the client leaves or the host is over."""

    def act(session: FtpSession, argument: str) -> None:
        session.say("150 here")
        with session.data() as data:
            for piece in pieces:
                data.sendall(piece)
                if pause and session.host.over.wait(pause):
                    break
        session.say("226 done")

    return act


def content(data: bytes, end: str = "226 done") -> Action:
    """These bytes instead of the file's."""
    return lambda session, argument: session.send(data, end)


# ---------------------------------------------------------------------------------------------------------------------
# SFTP
# ---------------------------------------------------------------------------------------------------------------------


class SftpHost(Host):
    """An SFTP server, version 3, that answers the requests named in SftpSession.VERBS.

    Actions are for these names.  An action gets the session and the path (READ: the path of the open file); it
    answers by session.status(), session.answer(), session.raw() or leaves by raising `session.Gone`.
    """

    scheme = "sftp"
    key: Any = None

    def __init__(self, files: Mapping[Any, bytes] = NOTHING) -> None:
        if SftpHost.key is None:
            SftpHost.key = paramiko.ECDSAKey.generate()
        self.pin = "SHA256:" + base64.b64encode(hashlib.sha256(self.key.asbytes()).digest()).decode().rstrip("=")
        self.entries: list[tuple[bytes, bytes]] = []  # further (name, attributes) of the listing
        self.long_names = False  # the bare name stands where `ls -l` has its line
        self.logins = "password"  # what may be tried
        self.prompts = ["Password: "]  # of keyboard-interactive, each in a message of its own
        self.offers: dict[str, tuple[str, ...]] = {}  # algorithms, by paramiko's name for the list
        super().__init__(files)

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "host_key": self.pin}

    def session(self, sock: socket.socket) -> None:
        transport = paramiko.Transport(sock)
        transport.add_server_key(self.key)
        for name, offered in self.offers.items():
            setattr(transport, "_preferred_" + name, offered)
        host = self

        class Login(paramiko.ServerInterface):
            def check_auth_password(self, username: str, password: str) -> int:
                host.commands.append("LOGIN")
                action = host.take("LOGIN")
                if action is not None:
                    action(transport, "")
                    return int(paramiko.common.AUTH_FAILED)
                right = password == host.password
                right = right and "password" in host.logins
                return int(paramiko.common.AUTH_SUCCESSFUL if right else paramiko.common.AUTH_FAILED)

            def get_allowed_auths(self, username: str) -> str:
                return host.logins

            def check_auth_publickey(self, username: str, key: Any) -> int:
                host.commands.append("KEY")
                return int(paramiko.common.AUTH_FAILED)

            def check_auth_interactive(self, username: str, submethods: str) -> Any:
                self.left, self.right = list(host.prompts), True
                return paramiko.server.InteractiveQuery("", "", self.left.pop(0))

            def check_auth_interactive_response(self, responses: list[str]) -> Any:
                host.commands.append("ANSWER")
                self.right = self.right and responses == [host.password]
                if self.left:
                    return paramiko.server.InteractiveQuery("", "", self.left.pop(0))
                return int(paramiko.common.AUTH_SUCCESSFUL if self.right else paramiko.common.AUTH_FAILED)

            def check_channel_request(self, kind: str, number: int) -> int:
                return int(paramiko.common.OPEN_SUCCEEDED)

            def check_channel_subsystem_request(self, channel: Any, name: str) -> bool:
                return name == "sftp"

        try:
            transport.start_server(server=Login())
            channel = transport.accept(MOST_SECONDS)
            if channel is not None:
                SftpSession(self, channel).run()
        except (paramiko.SSHException, EOFError):
            pass
        finally:
            transport.close()


def string(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


class SftpSession:
    """One channel."""

    Gone = Gone
    VERBS = {
        3: "OPEN",
        4: "CLOSE",
        5: "READ",
        7: "LSTAT",
        8: "FSTAT",
        11: "OPENDIR",
        12: "READDIR",
        13: "REMOVE",
        14: "MKDIR",
        17: "STAT",
        18: "RENAME",
    }

    def __init__(self, host: SftpHost, channel: Any) -> None:
        self.host, self.channel = host, channel
        self.listed, self.folder = False, "/in"
        self.number = self.offset = self.length = 0

    def raw(self, message: bytes) -> None:
        self.channel.sendall(message)

    def answer(self, kind: int, body: bytes) -> None:
        self.raw(struct.pack(">IBI", len(body) + 5, kind, self.number) + body)

    def status(self, code: int, text: bytes = b"so it is") -> None:
        self.answer(101, struct.pack(">I", code) + string(text) + string(b""))

    def names(self, entries: Iterable[tuple[bytes, bytes]]) -> None:
        long_names = self.host.long_names
        packed = [string(name) + string(name if long_names else b"") + told for name, told in entries]
        self.answer(104, struct.pack(">I", len(packed)) + b"".join(packed))

    def attributes(self, path: str) -> bytes:
        if path in ("/in", "/in/done"):
            return struct.pack(">II", 4, 0o040755)
        name = path[len("/in/") :]
        when = int((self.host.times.get(name, BEGAN) - datetime.datetime(1970, 1, 1)).total_seconds())
        return attributes(len(self.host.files[name]), when)

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.channel.recv(count - len(data))
            if not piece:
                raise Gone
            data += piece
        return data

    def run(self) -> None:
        while True:
            body = self.read(struct.unpack(">I", self.read(4))[0])
            if body[0] == 1:
                self.raw(struct.pack(">IBI", 5, 2, 3))
                continue
            self.number = struct.unpack(">I", body[1:5])[0]
            verb = self.VERBS.get(body[0], "?")
            length = struct.unpack(">I", body[5:9])[0]
            argument, rest = body[9 : 9 + length].decode("latin-1"), body[9 + length :]
            if verb == "READ":
                self.offset, self.length = struct.unpack(">QI", rest)
            self.host.commands.append(f"{verb} {argument}")
            action = self.host.take(verb)
            if action is not None:
                action(self, argument)
            else:
                self.behave(verb, argument, rest)

    def behave(self, verb: str, argument: str, rest: bytes) -> None:
        host, name = self.host, argument[len("/in/") :]
        exists = name in host.files or argument in ("/in", "/in/done", ".")
        if verb == "OPENDIR":
            self.listed, self.folder = False, argument
            self.answer(102, string(b"folder"))
        elif verb == "READDIR" and self.listed:
            self.status(1)
        elif verb == "READDIR":
            self.listed = True
            below = "done/" if self.folder == "/in/done" else ""
            found = [
                (name[len(below) :].encode("latin-1"), self.attributes(f"/in/{name}"))
                for name in list(host.files)
                if name.startswith(below) and "/" not in name[len(below) :]
            ]
            self.names([(b".", struct.pack(">II", 4, 0o040755)), *found, *host.entries])
        elif verb == "CLOSE":
            self.status(0)
        elif verb in ("LSTAT", "FSTAT", "STAT", "OPEN", "REMOVE") and not exists:
            self.status(2)
        elif verb in ("LSTAT", "FSTAT", "STAT"):
            self.answer(105, self.attributes("/in" if argument == "." else argument))
        elif verb == "OPEN":
            self.answer(102, string(argument.encode("latin-1")))
        elif verb == "READ":
            piece = host.files.get(name, b"")[self.offset : self.offset + self.length]
            self.answer(103, string(piece)) if piece else self.status(1)
        elif verb == "REMOVE":
            del host.files[name]
            self.status(0)
        elif verb == "RENAME":
            length = struct.unpack(">I", rest[:4])[0]
            host.files[rest[4 : 4 + length].decode("latin-1")[len("/in/") :]] = host.files.pop(name)
            self.status(0)
        else:
            self.status(8)


def attributes(size: int, mtime: int = 1_700_000_000, mode: int = 0o100644) -> bytes:
    """SFTP attributes: size, mode, times."""
    return struct.pack(">IQIii", 1 | 4 | 8, size, mode, mtime, mtime)


def status(code: int, text: bytes = b"so it is") -> Action:
    return lambda session, argument: session.status(code, text)


def leave(session: Any, argument: str) -> None:
    """Ends the connection at once."""
    raise Gone


def nothing(session: SftpSession, argument: str) -> None:
    """No answer at all."""


# ---------------------------------------------------------------------------------------------------------------------
# Proxies
# ---------------------------------------------------------------------------------------------------------------------


class Gateway(Host):
    """A proxy that leads to this host, whatever name it is asked for: `asked` has the names and ports. An action for
    the verb ASK gets the socket, and a place that is empty before the request was read, else HOST:PORT."""

    def __init__(self, scheme: str, login: str = "") -> None:
        self.scheme, self.login = scheme, login  # USER:PASSWORD
        self.asked: list[tuple[str, int]] = []
        self.logins: list[str] = []
        super().__init__()

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.login}{'@' if self.login else ''}127.0.0.1:{self.port}"

    def session(self, sock: socket.socket) -> None:
        sock.settimeout(MOST_SECONDS)
        action = self.take("ASK")
        if action is not None:
            action(sock, "")
            return
        with sock.makefile("rb", buffering=0) as stream:
            place = (self.http if self.scheme == "http" else self.socks)(sock, stream)
        self.asked.append(place)
        action = self.take("CONNECT")
        if action is not None:
            action(sock, f"{place[0]}:{place[1]}")
            return
        try:
            other = socket.create_connection(("127.0.0.1", place[1]), 5)
        except OSError:
            sock.sendall(b"HTTP/1.0 502 no\r\n\r\n" if self.scheme == "http" else b"\5\5\0\1\0\0\0\0\0\0")
            return
        with self.lock:
            self.sockets.append(other)
        with other:
            sock.sendall(b"HTTP/1.0 200 go\r\nVia: us\r\n\r\n" if self.scheme == "http" else b"\5\0\0\3\2us\0\1")
            back = threading.Thread(target=self.pump, args=(other, sock), daemon=True)
            back.start()
            self.pump(sock, other)
            back.join()

    @staticmethod
    def pump(source: socket.socket, sink: socket.socket) -> None:
        source.settimeout(MOST_SECONDS)
        with contextlib.suppress(OSError):
            while True:
                piece = source.recv(65536)
                if not piece:
                    break
                sink.sendall(piece)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def http(self, sock: socket.socket, stream: Any) -> tuple[str, int]:
        lines = iter(lambda: stream.readline().decode("latin-1").rstrip("\r\n"), "")
        method, place, version = next(lines).split(" ")
        fields = dict(line.split(": ", 1) for line in lines)
        assert method == "CONNECT" and version == "HTTP/1.1" and fields["Host"] == place
        kind, _, proof = fields.get("Proxy-Authorization", "Basic ").partition(" ")
        self.logins.append(base64.b64decode(proof).decode())
        if kind != "Basic" or self.logins[-1] != self.login:
            sock.sendall(b"HTTP/1.0 407 who are you\r\nProxy-Authenticate: Basic\r\n\r\n")
            raise Gone
        host, _, port = place.rpartition(":")
        return host, int(port)

    def socks(self, sock: socket.socket, stream: Any) -> tuple[str, int]:
        version, count = stream.read(2)
        methods = stream.read(count)
        assert version == 5 and set(methods) <= {0, 2}
        method = 2 if self.login else 0
        if method not in methods:
            sock.sendall(b"\5\xff")
            raise Gone
        sock.sendall(bytes([5, method]))
        if self.login:
            assert stream.read(1) == b"\1"
            words = [stream.read(stream.read(1)[0]).decode() for _ in range(2)]
            self.logins.append(":".join(words))
            sock.sendall(b"\1\0" if self.logins[-1] == self.login else b"\1\1")
            if self.logins[-1] != self.login:
                raise Gone
        version, command, _, kind = stream.read(4)
        assert (version, command) == (5, 1)
        if kind == 3:
            host = stream.read(stream.read(1)[0]).decode()
        else:
            family = {1: socket.AF_INET, 4: socket.AF_INET6}[kind]
            host = socket.inet_ntop(family, stream.read(4 if kind == 1 else 16))
        return host, int.from_bytes(stream.read(2), "big")


# ---------------------------------------------------------------------------------------------------------------------
# A listener over a host
# ---------------------------------------------------------------------------------------------------------------------


class Site(logging.Handler):
    """A listener over a host, its log as text, its deliveries and its ledger."""

    traceback = False  # whether one is to be in the log

    def __init__(self, folder: Path, settings: dict[str, Any], delivery: str = "folder", **changes: Any) -> None:
        super().__init__()
        self.folder, self.delivery = folder, delivery
        self.log: list[str] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.handled: list[tuple[str, bytes, int]] = []
        self.target = folder / "delivered"
        self.target.mkdir(exist_ok=True)
        chosen: dict[str, Any] = {
            "database": f"sqlite:///{folder / 'coordination.db'}",
            "member_id": "a",
            "timeout": 1,
            "settle": 0,
            "polling_interval": 0.1,
            "retry_delay": 0.05,
            "heartbeat_frequency": 0.2,
            "liveness_check_interval": 4,
            "drain_timeout": 3,
            **settings,
        }
        if delivery == "folder":
            chosen["download_dir"] = str(self.target)
        chosen = {name: value for name, value in {**chosen, **changes}.items() if value is not None}
        self.listener = ftpcoord.Listener(**chosen)
        if delivery == "handler":
            self.listener.on_file("*")(lambda file: self.receive(file))  # a test may set another one

    def receive(self, file: ftpcoord.File) -> None:
        self.handled.append((file.name, file.read(), file.attempt))

    def emit(self, record: logging.LogRecord) -> None:
        self.log.append(ftpcoord.TextFormatter().format(record))
        self.events.append((record.getMessage(), getattr(record, "fields", {})))

    def __enter__(self) -> Site:
        ftpcoord.logger.addHandler(self)
        ftpcoord.logger.setLevel(logging.INFO)
        self.listener.start()
        return self

    def __exit__(self, kind: Optional[type[BaseException]], *_: object) -> None:
        self.listener.stop()
        ended = self.listener.join(PATIENCE)
        ftpcoord.logger.removeHandler(self)
        if kind is None:
            text = "\n".join(self.log)
            assert ended, text
            assert self.traceback == ("traceback" in text.lower()), text
            assert PASSWORD not in text, text
            assert all(line.isprintable() for line in self.log), text
            assert not [name for _, _, names in os.walk(self.folder) for name in names if name.endswith(".part")]

    def all(self, name: str, **fields: object) -> list[dict[str, Any]]:
        return [found for event, found in list(self.events) if event == name and fields.items() <= found.items()]

    def wait(self, name: str, count: int = 1, **fields: object) -> dict[str, Any]:
        wait_for(lambda: len(self.all(name, **fields)) >= count, PATIENCE, f"{name}: " + "\n".join(self.log[-30:]))
        return self.all(name, **fields)[count - 1]

    def polls(self, more: int = 2) -> None:
        """Waits for some further polls that succeed."""
        self.wait("polled", len(self.all("polled")) + more)

    def delivered(self) -> dict[str, bytes]:
        """All that was handed over so far, by name."""
        if self.delivery == "handler":
            return {name: content for name, content, _ in list(self.handled)}
        found = {}
        for path in self.target.rglob("*"):
            if path.is_file() and not path.name.startswith(".ftpcoord-"):
                found[str(path.relative_to(self.target))] = path.read_bytes()
        return found

    def arrive(self, expected: dict[str, bytes]) -> None:
        """Waits until exactly these are delivered; whatever is there before that must be one of them, and whole."""
        until = time.monotonic() + PATIENCE
        while True:
            found = self.delivered()
            assert found.items() <= expected.items(), sorted(found.items() - expected.items())
            if len(found) == len(expected):
                return
            said = "\n".join(self.log[-30:])
            assert time.monotonic() < until, f"{sorted(expected.keys() - found.keys())} did not arrive:\n{said}"
            time.sleep(0.01)

    def row(self, name: str) -> Optional[dict[str, Any]]:
        """The ledger's row of a file."""
        with contextlib.closing(sqlite3.connect(self.folder / "coordination.db", timeout=10)) as connection:
            connection.row_factory = sqlite3.Row
            try:
                rows = [dict(row) for row in connection.execute("SELECT * FROM file_ledger")]
            except sqlite3.OperationalError:
                return None  # not made yet
        return next((row for row in rows if row["path"] == f"/in/{name}"), None)

    def state(self, name: str, state: str) -> dict[str, Any]:
        def found() -> Optional[dict[str, Any]]:
            row = self.row(name)
            return row if row is not None and row["state"] == state else None

        row: dict[str, Any] = wait_for(found, PATIENCE, f"{name} {state}: " + "\n".join(self.log[-30:]))
        return row


class Hasty(ftpcoord.Backoff):
    """A minute takes a fifth of a second."""

    def __init__(self, first: float, most: float) -> None:
        super().__init__(first / 300, most / 300)


def unused_port() -> int:
    """A port of this host on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def bytes_of(size: int) -> bytes:
    return os.urandom(64) * (size // 64) + b"e" * (size % 64)
