"""Listing lines as real servers send them, and how their times and names are read."""

from __future__ import annotations

import datetime
from typing import Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ftpcoord
from ftpcoord import Entry, parse_list_line, parse_mlsd_line, same_version

TODAY = datetime.date(2026, 7, 20)

UNIX = [
    ("-rw-r--r--    1 1000     1000         1234 Jul 19 09:52 orders.csv",
     Entry("orders.csv", "file", 1234, "2026-07-19T09:52", True)),
    ("-rw-rw-rw-   1 owner   group         7045120 Sep 02  3:47 music.mp3",
     Entry("music.mp3", "file", 7045120, "2025-09-02T03:47", True)),
    ("-rw-r--r-- 1 ftp ftp 0 Jan 12  2024 empty", Entry("empty", "file", 0, "2024-01-12")),
    ("-rw-r--r--   1 ftp           512 Jul  1 00:00 no group column",
     Entry("no group column", "file", 512, "2026-07-01T00:00", True)),
    ("drwxr-xr-x    2 0        0            4096 Jul 20 10:00 archive",
     Entry("archive", "dir", 0, "2026-07-20T10:00", True)),
    ("drwxrwsr-t+   2 0        0            4096 Jul 20 10:00 sticky",
     Entry("sticky", "dir", 0, "2026-07-20T10:00", True)),
    ("lrwxrwxrwx    1 0        0               9 Jul 20 10:00 latest -> orders -> x",
     Entry("latest", "link", 0, "2026-07-20T10:00", True)),
    ("crw-rw-rw-    1 0        0          1,   3 Jul 20 10:00 null",
     Entry("null", "other", 0, "2026-07-20T10:00", True)),
    ("prw-r--r--    1 0        0               0 Jul 20 10:00 pipe",
     Entry("pipe", "other", 0, "2026-07-20T10:00", True)),
    ("-rw-r--r--    1 john     domain users   77 Jul 19 09:52 a.csv",
     Entry("a.csv", "file", 77, "2026-07-19T09:52", True)),
    ("-rw-r--r--    1 0        0               5 Jul 19 09:52  two spaces  ",
     Entry(" two spaces  ", "file", 5, "2026-07-19T09:52", True)),
    ("-rw-r--r--    1 0        0               5 Jul 19 09:52 7 Jul 19 10:00 b",
     Entry("7 Jul 19 10:00 b", "file", 5, "2026-07-19T09:52", True)),
    ("-rw-r--r--    1 0        0               5 Jul 19 09:52 caf\udce9",
     Entry("caf\udce9", "file", 5, "2026-07-19T09:52", True)),
    ("-rw-r--r--.   1 0        0      9999999999 JUL 19 09:52 big",
     Entry("big", "file", 9999999999, "2026-07-19T09:52", True)),
]
DOS = [
    ("07-20-26  09:52AM       <DIR>          name", Entry("name", "dir", 0, "2026-07-20T09:52")),
    ("07-20-2026  09:52PM                 1234 a b.csv", Entry("a b.csv", "file", 1234, "2026-07-20T21:52")),
    ("01-02-99  12:00AM                    7 midnight", Entry("midnight", "file", 7, "1999-01-02T00:00")),
    ("01-02-03  12:30PM                    7 noon", Entry("noon", "file", 7, "2003-01-02T12:30")),
    ("07-20-2026  21:52                    7 day of 24 hours", Entry("day of 24 hours", "file", 7, "2026-07-20T21:52")),
    ("07-20-26  09:52AM       <DIR>            leading", Entry("  leading", "dir", 0, "2026-07-20T09:52")),
    ("07-20-26  09:52AM                    7  leading and trailing ",
     Entry(" leading and trailing ", "file", 7, "2026-07-20T09:52")),
    ("07-20-26  09:52AM       <JUNCTION>     elsewhere", Entry("elsewhere", "link", 0, "2026-07-20T09:52")),
]
GARBAGE = [
    "", " ", "total 8", "ls: cannot open directory", "-rw-r--r--", "-rw-r--r-- 1 0 0 5 Jul 19 09:52",
    "-rw-r--r-- 1 0 0 5 Jul 19 09:52 ", "-rw-r--r-- 1 0 0 5 Jul 32 09:52 x", "-rw-r--r-- 1 0 0 5 Feb 30 09:52 x",
    "-rw-r--r-- 1 0 0 5 Jul 19 25:00 x", "-rw-r--r-- 1 0 0 -5 Jul 19 09:52 x", "-rw-r--r-- 1 0 0 5 Foo 19 09:52 x",
    "-rw-r--r-- 1 0 0 5 Jul 19 0000 x", "d [RWCEAFMS] supervisor 512 Jul 16 18:53 login",
    "+i8388621.48594,m825718503,r,s280,\tdjb.html", "13-20-26  09:52AM  7 month", "07-20-26  13:52PM  7 hour",
    "07-20-26  09:52AM  seven name", "07-20-26  09:52AM       <DIR>", "٣٣-20-26  09:52AM  7 digits of another script",
]


@pytest.mark.parametrize(("line", "entry"), UNIX + DOS)
def test_a_line_of_list_is_read(line: str, entry: Entry) -> None:
    assert parse_list_line(line, TODAY) == entry


@pytest.mark.parametrize("line", GARBAGE)
def test_what_is_no_line_of_list_is_not_guessed_at(line: str) -> None:
    assert parse_list_line(line, TODAY) is None


@pytest.mark.parametrize(("today", "text", "mtime"), [
    ("2026-07-20", "Jul 20 10:00", "2026-07-20T10:00"),
    ("2026-07-20", "Jul 21 10:00", "2026-07-21T10:00"),         # the server is a zone ahead
    ("2026-07-20", "Jul 22 10:00", "2025-07-22T10:00"),
    ("2026-01-02", "Dec 31 23:59", "2025-12-31T23:59"),
    ("2025-12-31", "Jan  1 00:05", "2026-01-01T00:05"),
    ("2026-03-01", "Feb 29 10:00", "2024-02-29T10:00"),
    ("2024-02-28", "Feb 29 10:00", "2024-02-29T10:00"),
    ("2024-02-27", "Feb 29 10:00", "2020-02-29T10:00"),
    ("1903-06-01", "Feb 29 10:00", "1896-02-29T10:00"),         # 1900 was no leap year
])
def test_a_time_without_a_year_is_of_the_latest_date_not_more_than_a_day_ahead(
        today: str, text: str, mtime: str) -> None:
    entry = parse_list_line(f"-rw-r--r-- 1 0 0 5 {text} x", datetime.date.fromisoformat(today))
    assert entry == Entry("x", "file", 5, mtime, yearless=True)


def test_a_file_stays_the_same_version_when_list_changes_to_the_form_with_a_year() -> None:
    young = parse_list_line("-rw-r--r-- 1 0 0 5 Jan 21 10:00 x", datetime.date(2026, 7, 20))
    old = parse_list_line("-rw-r--r-- 1 0 0 5 Jan 21  2026 x", datetime.date(2026, 7, 22))
    assert young and old and (young.mtime, old.mtime) == ("2026-01-21T10:00", "2026-01-21")
    assert same_version(young, old) and same_version(old, young)
    assert not same_version(old, young._replace(size=6))
    assert not same_version(old, young._replace(mtime="2026-01-22T10:00"))


MLSD = [
    ("type=file;size=12;modify=20260112101530; a.csv", Entry("a.csv", "file", 12, "2026-01-12T10:15:30")),
    ("Type=File;Size=12;Modify=20260112101530.123;UNIX.mode=0644; a ; b= c ",
     Entry("a ; b= c ", "file", 12, "2026-01-12T10:15:30.123")),
    ("modify=20260112101530;type=dir;unique=1; folder", Entry("folder", "dir", 0, "2026-01-12T10:15:30")),
    ("type=file;size=0;  leading", Entry(" leading", "file", 0, "")),
    ("type=file;size=1;modify=yesterday; x", Entry("x", "file", 1, "")),
    ("type=file;size=1;modify=20261312101530; x", Entry("x", "file", 1, "")),
    ("type=cdir;modify=20260112101530; /inbox", Entry(".", "dir", 0, "")),
    ("type=pdir;modify=20260112101530; /", Entry("..", "dir", 0, "")),
    ("type=OS.unix=slink:/x;size=3; link", Entry("link", "link", 0, "")),
    ("type=OS.unix=symlink; link", Entry("link", "link", 0, "")),
    ("type=OS.unix=chr-1/3; null",
     Entry("null", "other", 0, "")),
]


@pytest.mark.parametrize(("line", "entry"), MLSD)
def test_a_line_of_mlsd_is_read(line: str, entry: Entry) -> None:
    assert parse_mlsd_line(line) == entry


@pytest.mark.parametrize("line", ["", " ", "x", "type=file;size=1;", "type=file;size=1; ", "size=1; x", "type=file; x",
                                  "type=file;size=-1; x", "type=file;size=1 x", "-rw-r--r-- 1 0 0 5 Jul 19 09:52 x"])
def test_what_is_no_line_of_mlsd_is_not_guessed_at(line: str) -> None:
    assert parse_mlsd_line(line) is None


LINE = st.one_of(
    st.text(), st.from_regex(r"[-dlbc][-rwx]{9} +\d+ \w+ \w+ +\d+ [A-Z][a-z]{2} +\d+ [\d:]+ ?.*"),
    st.from_regex(r"\d\d-\d\d-\d+ +\d+:\d+\w* +\S+ .*"), st.from_regex(r"(\w+=\w*;)+ ?.*"))


@given(LINE, st.dates())
def test_no_line_makes_a_parser_fail(line: str, today: datetime.date) -> None:
    for entry in (parse_list_line(line, today), parse_mlsd_line(line)):
        assert entry is None or (entry.name and entry.size >= 0)


@given(st.binary(), st.sampled_from(["utf-8", "latin-1", "cp1252", "ascii", "shift_jis", "utf-16", "cp037"]))
def test_a_name_is_sent_back_as_the_bytes_it_came_as(raw: bytes, encoding: str) -> None:
    name = ftpcoord.decode_name(raw, encoding)
    sent: Optional[bytes] = None
    try:
        sent = ftpcoord.encode_name(name, encoding)
    except ftpcoord.FileRefused:
        return                                                  # never wrong bytes
    assert sent == raw or "utf-16" in encoding or encoding == "cp037"


@pytest.mark.parametrize("name", ["a\rb", "a\nb", "a\0b"])
def test_a_line_break_or_nul_in_a_path_is_refused_before_it_is_sent(name: str) -> None:
    with pytest.raises(ftpcoord.FileRefused):
        ftpcoord.encode_name(name, "utf-8")


KEY, OTHER = b"\0\0\0\x0bssh-ed25519\0\0\0\x04AAAA", b"\0\0\0\x0bssh-ed25519\0\0\0\x04BBBB"
KEY64, OTHER64 = "AAAAC3NzaC1lZDI1NTE5AAAABEFBQUE=", "AAAAC3NzaC1lZDI1NTE5AAAABEJCQkI="


@pytest.mark.parametrize(("line", "host", "port", "keys"), [
    (f"files.example ssh-ed25519 {KEY64}", "files.example", 22, {KEY}),
    (f"files.example ssh-ed25519 {KEY64} a comment", "FILES.example", 22, {KEY}),
    (f"files.example ssh-ed25519 {KEY64}", "files.example", 2222, set()),
    (f"[files.example]:2222,10.0.0.1 ssh-ed25519 {KEY64}", "files.example", 2222, {KEY}),
    (f"*.example,!files.example ssh-ed25519 {KEY64}", "files.example", 22, set()),
    (f"*.example,!files.example ssh-ed25519 {KEY64}", "others.example", 22, {KEY}),
    (f"files.example ssh-ed25519 {KEY64}\nfiles.example ssh-ed25519 {OTHER64}", "files.example", 22, {KEY, OTHER}),
    (f"# files.example ssh-ed25519 {KEY64}\n\nfiles.example ssh-ed25519 %%%\nfiles.example", "files.example", 22,
     set()),
    (f"@cert-authority files.example ssh-ed25519 {KEY64}", "files.example", 22, set()),
])
def test_known_hosts_is_read_as_ssh_reads_it(line: str, host: str, port: int, keys: set[bytes]) -> None:
    assert ftpcoord.known_host_keys(line, host, port) == (keys, set())


def test_a_revoked_key_is_told_apart() -> None:
    text = f"@revoked * ssh-ed25519 {KEY64}\nfiles.example ssh-ed25519 {KEY64}"
    assert ftpcoord.known_host_keys(text, "files.example", 22) == ({KEY}, {KEY})


def test_a_hashed_name_of_known_hosts_is_recognised() -> None:
    import base64
    import hmac
    salt = b"12345678901234567890"
    digest = hmac.new(salt, b"[files.example]:2222", "sha1").digest()
    line = f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()} ssh-ed25519 {KEY64}"
    assert ftpcoord.known_host_keys(line, "files.example", 2222) == ({KEY}, set())
    assert ftpcoord.known_host_keys(line, "files.example", 22) == (set(), set())
