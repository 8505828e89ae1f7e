"""Coverage-guided fuzzing of everything that reads what others wrote: listings, replies, SFTP messages, settings.

    pip install atheris                                     # Linux, Python 3.11 or so; not needed by the tests
    python tests/fuzz_listings.py run 600                   # seconds; grows the corpus in a temporary folder
    python tests/fuzz_listings.py keep FOLDER               # the few of that folder that together cover the most

An input's first byte chooses what reads the rest; `check` raises AssertionError, or whatever escaped, for a fault.
`keep` writes tests/corpus/inputs.txt, one Python bytes literal a line, which test_fuzz.py replays in every run.
"""

from __future__ import annotations

import ast
import contextlib
import datetime
import importlib
import os
import re
import socket
import stat
import sys
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Union

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__":  # the branches of the module are to be seen by the fuzzer
    with importlib.import_module("atheris").instrument_imports(include=["ftpcoord"]):
        import ftpcoord
else:
    import ftpcoord

INPUTS = Path(__file__).resolve().parent / "corpus" / "inputs.txt"
MOST_KEPT = 58
CANARY = "s3cr3t-c4n4ry"
TODAY = datetime.date(2026, 7, 20)
ENCODINGS = ("utf-8", "latin-1", "cp1252", "ascii", "shift_jis", "utf-16", "cp037", "utf-7", "gb18030", "idna")
LARGEST = 2**63 - 1  # of the ledger's columns


# -- what must hold ---------------------------------------------------------------------------------------------------


def check_entry(entry: ftpcoord.Entry, text: str) -> None:
    """What the rest of the program takes for granted of an entry that was read out of this text."""
    assert entry.name and entry.name in text
    assert entry.kind in ("file", "dir", "link", "other")
    assert 0 <= entry.size <= LARGEST and (entry.kind == "file" or entry.size == 0)
    assert len(entry.mtime) <= 32 and re.fullmatch(r"(\d{4}-\d\d-\d\d(T\d\d:\d\d(:\d\d(\.\d+)?=?)?)?)?", entry.mtime)
    assert ftpcoord.same_version(entry, entry)
    ftpcoord.epoch_seconds(entry.mtime)
    check_printable(entry.name)


def check_printable(text: str) -> None:
    shown = ftpcoord.printable(text)
    assert shown.isprintable()
    shown.encode("utf-8")
    raw = text.encode("utf-8", "surrogateescape")
    assert shown == text or urllib.parse.unquote_to_bytes(shown) == raw
    assert (ftpcoord.sha256_text(text) == ftpcoord.sha256_text(shown)) == (shown == text)


def list_line(data: bytes) -> None:
    line = ftpcoord.decode_name(data, "utf-8")
    entry = ftpcoord.parse_list_line(line, TODAY)
    if entry is not None:
        check_entry(entry, line)


def mlsd_line(data: bytes) -> None:
    line = ftpcoord.decode_name(data, "utf-8")
    entry = ftpcoord.parse_mlsd_line(line)
    if entry is not None and entry.name not in (".", ".."):
        check_entry(entry, line)


NOTHING = os.open(os.devnull, os.O_RDONLY)


class Pieces:
    """A socket that gives these bytes, in pieces whose lengths they tell themselves."""

    family = socket.AF_INET

    def __init__(self, data: bytes) -> None:
        self.data, self.sent = data, b""
        self.patient = True

    def settimeout(self, seconds: float) -> None:
        self.patient = seconds > 0

    def fileno(self) -> int:
        """Of something that is always ready."""
        return NOTHING

    def recv(self, count: int) -> bytes:
        if not self.patient:
            raise BlockingIOError  # nothing comes unasked
        count = min(count, 1 + (self.data[0] & 15) * 8) if self.data else 0
        piece, self.data = self.data[:count], self.data[count:]
        return piece

    def recv_into(self, buffer: memoryview) -> int:
        piece = self.recv(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def sendall(self, data: bytes) -> None:
        self.sent += data

    def getpeername(self) -> tuple[str, int]:
        return "127.0.0.1", 21

    def close(self) -> None:
        pass


def ftp_server(data: bytes) -> tuple[ftpcoord.FtpServer, Pieces]:
    config = ftpcoord.Config(url="ftp://u@127.0.0.1/in", database="sqlite:///x", password=CANARY)
    server, pieces = ftpcoord.FtpServer(config), Pieces(b"220 hello\r\n" + data)
    server._dial = lambda: as_socket(pieces)  # type: ignore[method-assign]
    server._ftp.connect()
    server._ftp.logged_in, server._home = True, "/"
    return server, pieces


def as_socket(pieces: Pieces) -> socket.socket:
    return pieces  # type: ignore[return-value]


def reply(data: bytes) -> None:
    server, _ = ftp_server(data)
    with contextlib.suppress(ftpcoord._Broken, ftpcoord.LoginRefused):
        while True:
            text = server._ftp.getresp()
            assert len(text) >= 3 and "\r\n" not in text


def conversation(data: bytes) -> None:
    """Replies to passive mode, looks, renames: whatever they say, errors are the agreed ones."""
    server, _ = ftp_server(data[1:])
    if data[:1] > b"\x7f":
        server._looker = ftpcoord.Looker(server, True)
    with contextlib.suppress(ftpcoord._Broken, ftpcoord.LoginRefused):
        host, port = server._ftp.makepasv()
        assert host == "127.0.0.1" and 0 < port < 65536
    seen = ftpcoord.Entry("a", "file", 1, "2026-01-12T10:15")
    calls: Sequence[Callable[[], object]] = (
        lambda: server.exact("/in/a", seen),
        lambda: server.same("/in/a", seen),
        lambda: server.rename("/in/a", "/in/b"),
        lambda: server.delete("/in/a"),
        lambda: server.mkdir("/in/c/d"),
    )
    for call in calls:
        server.connect = give_up  # type: ignore[method-assign]
        with contextlib.suppress(ftpcoord.Error, ftpcoord._Broken):
            call()


def give_up() -> None:
    raise ftpcoord.ServerDown("no second connection here")


def listing(data: bytes) -> None:
    server, _ = ftp_server(b"")
    with contextlib.suppress(ftpcoord._Broken):
        for entry in server._read_listing(as_socket(Pieces(data[1:])), data[:1] > b"\x7f").entries:
            assert "\n" not in entry.name
            check_printable(entry.name)


def attributes(data: bytes) -> None:
    fields = ftpcoord._Fields(memoryview(data))
    with contextlib.suppress(ftpcoord._Broken):
        name = ftpcoord.decode_name(bytes(fields.string()), "utf-8")
        entry = fields.entry(name or "?", bytes(fields.string()))
        if entry is not None:
            check_entry(entry, name or "?")


class Answers:
    """An SFTP channel that gives these bytes, whatever is asked."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def sendall(self, data: bytes) -> None:
        pass

    def recv(self, count: int) -> bytes:
        piece, self.data = self.data[:count], self.data[count:]
        return piece


def messages(data: bytes) -> None:
    """A pipeline of three files: each ends once, whole or with an error, or the conversation is broken."""
    session = ftpcoord.SftpSession(Answers(data), (OSError,))
    got = [bytearray() for _ in range(3)]
    jobs = [ftpcoord.Job(f"/{number}", number * 40_000, got[number].extend) for number in range(3)]
    ended: list[ftpcoord.Job] = []
    try:
        for job, error in ftpcoord.SftpPipeline(session, "utf-8").run(jobs):
            ended.append(job)
            assert error is not None or len(got[int(job.path[1:])]) == job.size
        assert sorted(job.path for job in ended) == ["/0", "/1", "/2"]
    except ftpcoord._Broken:
        pass


def names(data: bytes) -> None:
    encoding = ENCODINGS[data[0] % len(ENCODINGS)] if data else "utf-8"
    name = ftpcoord.decode_name(data[1:], encoding)
    raw = os.fsencode(name)
    # Names in UTF-8 on a server that is said to have another multi-byte encoding, or none: not told apart.
    if raw.decode("utf-8", "surrogateescape") == name or encoding in ("utf-8", "latin-1", "cp1252"):
        check_printable(name)
    with contextlib.suppress(ftpcoord.FileRefused):
        sent = ftpcoord.encode_name(name, encoding)
        assert sent == data[1:] or encoding in ("utf-16", "cp037", "utf-7", "idna")
        assert not re.search(rb"[\r\n]", sent) or encoding in ("utf-16", "cp037", "utf-7")


def known_hosts(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    for host, port in (("files.example", 22), ("::1", 2222)):
        keys, revoked = ftpcoord.known_host_keys(text, host, port)
        assert all(isinstance(key, bytes) for key in keys | revoked)


def settings(data: bytes) -> None:
    """`name=value` lines over a good base; the only error is ConfigError, and it shows no secret."""
    chosen: dict[str, Any] = {"url": "sftp://u@h/in", "database": "sqlite:///x", "password": CANARY}
    for line in data.decode("utf-8", "replace").split("\n"):
        name, _, value = line.partition("=")
        if name and not name.endswith("_file"):
            chosen[name] = value
    check_config(lambda: [ftpcoord.Config(**chosen)])


def urls(data: bytes) -> None:
    """The password of a URL stays out of errors whatever is wrong with the rest of it."""
    before, _, after = data.decode("utf-8", "replace").partition("\n")
    check_config(lambda: [ftpcoord.Config(url=f"{before}:{CANARY}@{after}", database="sqlite:///x")])
    check_config(lambda: [ftpcoord.Config(url="ftp://h/", database=f"{before}:{CANARY}@{after}")])


FOLDER = tempfile.TemporaryDirectory(prefix="ftpcoord-fuzz-")


def ini(data: bytes) -> None:
    path = Path(FOLDER.name) / "settings.ini"
    lines = [line for line in data.replace(CANARY.encode(), b"").splitlines() if b"_file" not in line]
    secret = re.compile(rb"[ \t]*(password|key_passphrase|database_password)[ \t]*[=:]", re.IGNORECASE)
    for at, line in enumerate(lines):
        lines[at] = line.replace(b"CANARY", CANARY.encode() if secret.match(line) else b"x")
    path.write_bytes(b"\n".join(lines))
    check_config(lambda: ftpcoord.Config.from_file(str(path)))


def check_config(make: Callable[[], list[ftpcoord.Config]]) -> None:
    try:
        made = make()
    except ftpcoord.ConfigError as exc:
        assert str(exc) and CANARY not in str(exc) and CANARY not in repr(exc), str(exc)
        return
    for config in made:
        assert re.fullmatch(r"[!-~]{1,128}", config.coordination_group)
        assert re.fullmatch(r"[!-~]{1,128}", config.member_id)
        shown = config.public()
        path = config.target.path if config.url else ""
        if config.file_password() == CANARY and CANARY not in path + config.member_id:
            assert CANARY not in repr(config) and CANARY not in str(shown["url"]) and shown["password"] in ("", "***")
        if config.database_login() == CANARY:
            assert CANARY not in str(shown["database"]) or CANARY in config.endpoint.name
        if config.url:
            target = config.target
            assert not re.search(r"[\0\r\n]", target.path + target.user)
            assert 0 < target.port < 65536


TARGETS: Sequence[Callable[[bytes], None]] = (
    list_line,
    mlsd_line,
    reply,
    conversation,
    listing,
    attributes,
    messages,
    names,
    known_hosts,
    settings,
    urls,
    ini,
)


def check(data: bytes) -> None:
    """One input."""
    if data:
        TARGETS[data[0] % len(TARGETS)](data[1:])


# -- seeds and the kept corpus ----------------------------------------------------------------------------------------


def _attributes(flags: int, *values: bytes) -> bytes:
    return b"\0\0\0\1a\0\0\0\1-" + flags.to_bytes(4, "big") + b"".join(values)


def message(kind: int, number: int, body: bytes) -> bytes:
    return (len(body) + 5).to_bytes(4, "big") + bytes([kind]) + number.to_bytes(4, "big") + body


SEEDS: dict[Callable[[bytes], None], Sequence[bytes]] = {
    list_line: [
        b"-rw-r--r--    1 1000     1000         1234 Jul 19 09:52 orders.csv",
        b"07-20-26  09:52AM       <DIR>   name",
        b"lrwxrwxrwx 1 0 0 9 Jul 20  2024 latest -> x",
        b"07-20-2026  21:52   1234 a b.csv",
        b"-rw-r--r-- 1 ftp 512 Feb 29 10:00 caf\xe9",
    ],
    mlsd_line: [
        b"type=file;size=12;modify=20260112101530.123; a.csv",
        b"type=OS.unix=slink:/x;size=3; link",
        b"Type=cdir;Modify=20260112101530; /inbox",
    ],
    reply: [b"220 hello\r\n", b"211-FEAT\r\n MLST\r\n211 end\r\n", b"230-a\n230-b\n230 c\n"],
    conversation: [
        b"\0x229 (|||4711|)\r\n213 1\r\n213 20260112101530\r\n350 go\r\n250 ok\r\n550 no\r\n257 made\r\n",
        b"\0x229 (|||99999|)\r\n",
        b"\0x500 no\r\n227 at (127,0,0,1,999,999)\r\n",
        b"\xffx500 no\r\n227 at (127,0,0,1,200,10)\r\n250-is\r\n type=file;size=1; /in/a\r\n250 end\r\n",
    ],
    listing: [b"\0xtotal 1\r\n-rw-r--r-- 1 0 0 5 Jan 12  2024 a\r\n", b"\xffxtype=file;size=1; a\r\ntype=dir; b\r\n"],
    attributes: [
        _attributes(0xD, b"\0" * 7 + b"\5", b"\0\0\x81\xa4", b"\0\0\0\1\0\0\0\2"),
        _attributes(0x8000000F, b"\0" * 8, b"\0" * 8, b"\0\0\x41\xff", b"\0" * 8, b"\0\0\0\1\0\0\0\1a\0\0\0\1b"),
    ],
    messages: [
        message(102, 1, b"\0\0\0\1h")
        + message(102, 2, b"\0\0\0\1i")
        + message(101, 3, b"\0\0\0\2\0\0\0\0")
        + message(101, 4, b"\0\0\0\1\0\0\0\0")
        + message(103, 5, b"\0\0\x80\0" + b"x" * 32768),
    ],
    names: [b"\0caf\xc3\xa9", b"\0caf\xe9", b"\1caf\xe9", b"\5a\0", b"\7+2AA-"],
    known_hosts: [
        b"files.example ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAABEFBQUE=",
        b"@revoked * ssh-ed25519 AAAA",
        b"|1|MTIz|NDU2 ssh-rsa AAAA",
        b"[::1]:2222,!x,*.example ssh-rsa AAAAB3NzaC1yc2E=",
    ],
    settings: [
        b"url=ftpes://u:p@h:2121/~/in\nafter=move:done\nsort=-mtime\nmax_age=5\nhttp=[::1]:80\nexec=a {file} 'b c'",
        b"database=postgresql://u:p@[::1]:5432,h2/x\nledger=off\nafter=delete\nencoding=utf-7\nhandler=a.b:c",
        b"http=h:\xc2\xb2",
        b"encoding=undefined",
        b"encoding=idna",
        b"liveness_check_interval=5.5\nheartbeat_frequency=0.25\ncoordination_group=a\nhost_key=SHA256:x\nrecursive=yes",
    ],
    urls: [b"sftp://user\nhost:22/path", b"mysql://user\nhost,[::1]:3306/name", b"ftp://u\nh/%ff%0a?"],
    ini: [
        b"[DEFAULT]\npassword=CANARY\ndatabase=sqlite:///x\n[a]\nurl=ftp://u@h/\n b\n[b]\nurl = sftp://u@h/x",
        b"[a]\nurl=sftp://u@h/\ndatabase=sqlite:///x\nhandler=a:b\n  password = CANARY\n[b]\nafter=x",
    ],
}


def seeds() -> Iterator[bytes]:
    for target, inputs in SEEDS.items():
        for data in inputs:
            yield bytes([TARGETS.index(target)]) + data


def kept() -> list[bytes]:
    """The inputs that are replayed by test_fuzz.py."""
    lines = INPUTS.read_text(encoding="ascii").splitlines() if INPUTS.exists() else []
    return [ast.literal_eval(line) for line in lines if line and not line.startswith("#")]


# -- by hand ----------------------------------------------------------------------------------------------------------


def run(seconds: str, folder: str = "") -> None:
    """Fuzzes for so long; the corpus is in `folder`, which is made if need be."""
    place = Path(folder or tempfile.mkdtemp(prefix="ftpcoord-corpus-"))
    place.mkdir(exist_ok=True)
    for number, data in enumerate([*seeds(), *kept()]):
        (place / f"seed-{number}").write_bytes(data)
    print(f"corpus: {place}", flush=True)
    atheris = importlib.import_module("atheris")
    options = [f"-max_total_time={seconds}", "-max_len=4096", "-timeout=10", "-rss_limit_mb=2048"]
    options.append("-print_final_stats=1")
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={place}-", str(place)], check)
    atheris.Fuzz()


def steps_of(data: bytes) -> set[tuple[int, int]]:
    """The pairs of lines of the module that follow each other when this input is checked."""
    steps: set[tuple[int, int]] = set()
    previous = 0

    def trace(frame: Any, event: str, argument: Any) -> Union[Callable[..., Any], None]:
        nonlocal previous
        if frame.f_code.co_filename != ftpcoord.__file__:
            return None
        if event == "line":
            steps.add((previous, frame.f_lineno))
            previous = frame.f_lineno
        return trace

    sys.settrace(trace)
    try:
        check(data)
    finally:
        sys.settrace(None)
    return steps


def keep(folder: str) -> None:
    """Of all inputs in the folder the MOST_KEPT that together take the most steps; the shorter of two equals."""
    found = {path.read_bytes() for path in Path(folder).iterdir() if stat.S_ISREG(path.stat().st_mode)}
    left = {data: steps_of(data) for data in sorted(found, key=lambda data: (len(data), data)) if len(data) <= 600}
    taken: set[tuple[int, int]] = set()
    chosen: list[bytes] = []
    while len(chosen) < MOST_KEPT:
        best = max(left, key=lambda data: len(left[data] - taken))
        if not left[best] - taken:
            break
        taken |= left.pop(best)
        chosen.append(best)
    INPUTS.parent.mkdir(exist_ok=True)
    text = "# Inputs of tests/fuzz_listings.py that take different ways, one bytes literal a line.\n"
    chosen.sort(key=lambda data: (data[0] % len(TARGETS), len(data), data))
    INPUTS.write_text(text + "".join(f"{data!r}\n" for data in chosen), encoding="ascii")
    reached = len(set().union(taken, *left.values()))
    print(f"{len(chosen)} inputs of {len(found)}, {INPUTS.stat().st_size} bytes, {len(taken)} of {reached} steps")


if __name__ == "__main__":
    if sys.argv[1] == "keep":
        keep(sys.argv[2])
    else:
        run(*sys.argv[2:])
