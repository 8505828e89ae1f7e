"""Whatever is read from a server, a file or the environment: parsed, or refused in the agreed way, never a crash.

The properties are those of fuzz_listings.py, which finds inputs by coverage and by hand; hypothesis makes its own
here, nearer to what is valid, and the inputs that were worth keeping are replayed.
"""

from __future__ import annotations

import configparser
import struct
from pathlib import Path
from typing import Any

import fuzz_listings
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import ftpcoord

FEW = settings(
    max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
NAME = st.one_of(
    st.binary(min_size=1, max_size=40),
    st.sampled_from([b"a.csv", b"a -> b", b" x ", b"caf\xe9", b"\x1b[2J", "日本".encode(), b"..", b"a/b", b"x" * 300]),
).map(lambda name: name.replace(b"\n", b"").replace(b"\r", b"") or b"x")
NUMBER = st.one_of(st.integers(0, 2**64), st.sampled_from([0, 2**31, 2**63 - 1, 2**63, 10**19 - 1, 10**30])).map(str)


@pytest.mark.parametrize("data", fuzz_listings.kept())
def test_an_input_that_was_worth_keeping_still_holds(data: bytes) -> None:
    fuzz_listings.check(data)


def test_the_kept_inputs_are_few_and_of_every_kind() -> None:
    kept = fuzz_listings.kept()
    assert 20 <= len(kept) <= 60 and fuzz_listings.INPUTS.stat().st_size < 50_000
    assert {data[0] % len(fuzz_listings.TARGETS) for data in kept if data} == set(range(len(fuzz_listings.TARGETS)))


@pytest.mark.parametrize("data", list(fuzz_listings.seeds()))
def test_a_seed_of_the_fuzzer_holds(data: bytes) -> None:
    fuzz_listings.check(data)


@pytest.mark.parametrize("target", fuzz_listings.TARGETS, ids=lambda target: str(target.__name__))
def test_arbitrary_bytes_harm_nothing(target: Any) -> None:
    @FEW
    @given(st.binary(max_size=300))
    def run(data: bytes) -> None:
        target(data)

    run()


# -- listings ---------------------------------------------------------------------------------------------------------

MODE = st.sampled_from(["-rw-r--r--", "drwxr-xr-x", "lrwxrwxrwx", "crw-rw-rw-", "-rwSr-sr-t+", "-rw-------."])
MONTH = st.sampled_from(["Jan", "feb", "MAR", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec", "Foo"])
CLOCK = st.one_of(
    st.integers(0, 9999).map(lambda year: f"{year:4}"),
    st.tuples(st.integers(0, 25), st.integers(0, 61)).map(lambda t: f"{t[0]:02}:{t[1]:02}"),
)
UNIX_LINE = st.builds(
    lambda mode, owner, size, month, day, clock, name: (
        f"{mode} 1 {owner} {size} {month} {day} {clock} ".encode() + name
    ),
    MODE,
    st.sampled_from(["0 0", "ftp", "john domain users", "Jan 1 2"]),
    NUMBER,
    MONTH,
    st.integers(0, 33),
    CLOCK,
    NAME,
)
DOS_LINE = st.builds(
    lambda month, day, year, hour, half, size, name: (
        f"{month:02}-{day:02}-{year:02}  {hour:02}:30{half}  {size} ".encode() + name
    ),
    st.integers(0, 13),
    st.integers(0, 32),
    st.sampled_from([0, 69, 70, 99, 1970, 2026, 9999]),
    st.integers(0, 25),
    st.sampled_from(["AM", "pm", ""]),
    st.one_of(NUMBER, st.sampled_from(["<DIR>", "<JUNCTION>", "<X>"])),
    NAME,
)
FACT = st.sampled_from(
    [
        "type=file",
        "type=dir",
        "Type=cdir",
        "type=OS.unix=slink:/x",
        "size=5",
        "modify=20260112101530",
        "modify=20260231000000.5",
        "modify=99991231235960",
        "unique=x",
        "=",
        "perm=r",
        "",
    ]
)
MLSD_LINE = st.builds(
    lambda facts, size, name: ";".join([*facts, f"size={size}", ""]).encode() + b" " + name,
    st.lists(FACT, max_size=5),
    NUMBER,
    NAME,
)


@FEW
@given(st.one_of(UNIX_LINE, DOS_LINE))
def test_a_line_like_those_of_list_is_an_entry_that_can_be_relied_on_or_none(line: bytes) -> None:
    fuzz_listings.list_line(line)


@FEW
@given(MLSD_LINE)
def test_a_line_like_those_of_mlsd_is_an_entry_that_can_be_relied_on_or_none(line: bytes) -> None:
    fuzz_listings.mlsd_line(line)


@FEW
@given(st.lists(st.one_of(UNIX_LINE, MLSD_LINE, st.binary(max_size=50)), max_size=20), st.booleans())
def test_a_listing_of_such_lines_is_read_to_its_end(lines: list[bytes], mlsd: bool) -> None:
    fuzz_listings.listing((b"\xff" if mlsd else b"\0") + b"\r\n".join(lines))


@FEW
@given(st.lists(st.one_of(UNIX_LINE, MLSD_LINE), max_size=10), st.integers(1, 7))
def test_it_makes_no_difference_in_which_pieces_a_listing_comes(lines: list[bytes], length: int) -> None:
    data = b"".join(line + b"\r\n" for line in lines)

    class Drips(fuzz_listings.Pieces):
        def recv(self, count: int) -> bytes:
            piece, self.data = self.data[:length], self.data[length:]
            return piece

    for mlsd in (True, False):
        results = []
        for pieces in (Drips(data), fuzz_listings.Pieces(data)):
            server, _ = fuzz_listings.ftp_server(b"")
            reader = server._read_listing(fuzz_listings.as_socket(pieces), mlsd)
            results.append((reader.entries, reader.unread))
        assert results[0] == results[1]


# -- replies and SFTP -------------------------------------------------------------------------------------------------

CODE = st.sampled_from(
    [
        "120",
        "150",
        "211",
        "213",
        "220",
        "226",
        "227",
        "229",
        "230",
        "250",
        "257",
        "331",
        "350",
        "421",
        "425",
        "426",
        "450",
        "500",
        "502",
        "530",
        "550",
        "553",
        "999",
        "2",
        "²²²",
        "2e1",
    ]
)
REPLY = st.builds(
    lambda code, mark, text: f"{code}{mark}{text}\r\n".encode(),
    CODE,
    st.sampled_from([" ", "-", ""]),
    st.one_of(
        st.text(max_size=20),
        st.sampled_from(
            [
                "(|||4711|)",
                "(|||99999|)",
                "(|||-1|)",
                "()",
                "(127,0,0,1,4,1)",
                "(1,2,3,4,256,256)",
                '"/x""y"',
                "5",
                "²",
                "20260112101530",
                "20260112101560",
                "99999999999999",
            ]
        ),
    ),
)


@FEW
@given(st.lists(REPLY, max_size=12), st.booleans())
def test_whatever_a_server_replies_the_errors_are_the_agreed_ones(replies: list[bytes], mlst: bool) -> None:
    data = b"".join(replies)
    fuzz_listings.conversation((b"\xff" if mlst else b"\0") + data)
    fuzz_listings.reply(data)


@FEW
@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=20),
    NAME,
)
def test_sftp_attributes_are_an_entry_that_can_be_relied_on_or_none(
    flags: int, size: int, mode: int, mtime: int, rest: bytes, name: bytes
) -> None:
    for chosen in (flags, flags & 0x8000000F, 0xD):
        body = struct.pack(">I", chosen) + (struct.pack(">Q", size) if chosen & 1 else b"")
        body += (b"\0" * 8 if chosen & 2 else b"") + (struct.pack(">I", mode) if chosen & 4 else b"")
        body += (struct.pack(">II", mtime, mtime) if chosen & 8 else b"") + rest
        fuzz_listings.attributes(struct.pack(">I", len(name)) + name + struct.pack(">I", 0) + body)


KIND = st.sampled_from([101, 102, 103, 104, 105, 2])


@FEW
@given(
    st.lists(
        st.tuples(
            KIND,
            st.integers(1, 12),
            st.sampled_from(
                [
                    b"\0\0\0\1h",
                    struct.pack(">I", 0),
                    struct.pack(">II", 1, 0),
                    struct.pack(">II", 2, 0),
                    struct.pack(">II", 4, 0),
                    struct.pack(">I", 32768) + b"x" * 32768,
                    struct.pack(">I", 40000) + b"x" * 40000,
                    struct.pack(">I", 7233) + b"y" * 7233,
                    struct.pack(">I", 100) + b"z" * 100,
                    b"",
                ]
            ),
        ),
        max_size=25,
    )
)
def test_whatever_an_sftp_server_answers_each_file_ends_once_and_whole_or_with_an_error(
    answers: list[tuple[int, int, bytes]],
) -> None:
    fuzz_listings.messages(b"".join(fuzz_listings.message(*answer) for answer in answers))


def test_an_sftp_server_that_sends_more_than_was_asked_for_delivers_nothing() -> None:
    """The surplus would stand where the next piece belongs: the file could end without its end being noticed."""
    pieces = [(2, 40_000), (3, 32_768), (4, 32_768), (5, 1_696)]
    answers = fuzz_listings.message(102, 1, b"\0\0\0\1h") + b"".join(
        fuzz_listings.message(103, number, struct.pack(">I", length) + b"x" * length) for number, length in pieces
    )
    session = ftpcoord.SftpSession(fuzz_listings.Answers(answers), (OSError,))
    job = ftpcoord.Job("/a", 100_000, lambda piece: None)
    with pytest.raises(ftpcoord._Broken):
        list(ftpcoord.SftpPipeline(session, "utf-8").run([job]))


# -- settings ---------------------------------------------------------------------------------------------------------

SETTINGS = st.sampled_from(sorted(set(ftpcoord.Config.__dataclass_fields__) - {"files"}))
VALUE = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        [
            "0",
            "-1",
            "1e9",
            "nan",
            "inf",
            "1_0",
            "٣",
            "²",
            "yes",
            "off",
            "move:",
            "move:..",
            "move:a\n",
            "delete",
            "a:b",
            "[::1]:80",
            ":²",
            "x:99999999",
            "undefined",
            "utf-7",
            "idna",
            "hex",
            "'",
            "a 'b",
            "{file}",
            "SHA256:",
            "step-down:1",
            "ftp://u@h/%00",
            "sftp://@h/",
            "ftp://[::1",
            "postgresql://u@[x]/d",
            "mysql://u@h:0/d",
            "sqlite:///:memory:",
            "sqlite:///",
            "ftp://h/@",
            "ftps://u:p@h:70000/",
        ]
    ),
)


@FEW
@given(st.dictionaries(SETTINGS, VALUE, max_size=5))
def test_settings_are_accepted_or_a_configerror_that_shows_no_secret(chosen: dict[str, str]) -> None:
    lines = "\n".join(f"{name}={value}" for name, value in chosen.items() if "\n" not in value)
    fuzz_listings.settings(lines.encode("utf-8", "replace"))


@FEW
@given(st.dictionaries(SETTINGS, VALUE, max_size=5))
def test_settings_from_python_are_accepted_or_a_configerror(chosen: dict[str, str]) -> None:
    base = {"url": "ftp://u@h/in", "database": "sqlite:///x"}
    fuzz_listings.check_config(lambda: [ftpcoord.Config(**{**base, **chosen})])


@FEW
@given(st.dictionaries(SETTINGS, VALUE, max_size=5))
@example({"database_password": "0"})
def test_an_ini_file_means_what_python_means(chosen: dict[str, str]) -> None:
    values = {name: value for name, value in chosen.items() if value.strip() == value and value.isprintable() and value}
    values = {"url": "ftp://u@h/in", "database": "sqlite:///x", "member_id": "m", **values}
    parser = configparser.ConfigParser(interpolation=None)
    parser["a"] = values
    path = Path(fuzz_listings.FOLDER.name) / "same.ini"
    with open(path, "w", encoding="utf-8") as stream:
        parser.write(stream)

    def outcome(make: Any) -> object:
        try:
            return {**make().__dict__, "source": ""}  # of a file that holds a secret
        except ftpcoord.ConfigError as exc:
            return str(exc).replace(f"{path} [a] ", "")

    assert outcome(lambda: ftpcoord.Config.from_file(str(path))[0]) == outcome(lambda: ftpcoord.Config(**values))


@FEW
@given(st.text(max_size=60), st.text(max_size=60))
def test_the_password_of_a_url_is_not_shown_whatever_is_wrong_with_the_rest(before: str, after: str) -> None:
    data = f"{before}\n{after}".encode("utf-8", "replace")
    fuzz_listings.urls(data)
    fuzz_listings.urls(b"sftp://" + data)


@FEW
@given(st.text(max_size=60))
def test_what_is_printable_is_one_line_of_text_and_can_be_undone(text: str) -> None:
    name = ftpcoord.decode_name(text.encode("utf-8", "surrogatepass"), "utf-8")
    fuzz_listings.check_printable(name)
