"""Listing lines as real servers send them, and how their times and names are read."""

from __future__ import annotations

import contextlib
import datetime
import time
from typing import Optional

import hostile
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ftpcoord
from ftpcoord import Entry, parse_list_line, parse_mlsd_line, same_version

TODAY = datetime.date(2026, 7, 20)

UNIX = [
    (
        "-rw-r--r--    1 1000     1000         1234 Jul 19 09:52 orders.csv",
        Entry("orders.csv", "file", 1234, "2026-07-19T09:52", True),
    ),
    (
        "-rw-rw-rw-   1 owner   group         7045120 Sep 02  3:47 music.mp3",
        Entry("music.mp3", "file", 7045120, "2025-09-02T03:47", True),
    ),
    ("-rw-r--r-- 1 ftp ftp 0 Jan 12  2024 empty", Entry("empty", "file", 0, "2024-01-12")),
    (
        "-rw-r--r--   1 ftp           512 Jul  1 00:00 no group column",
        Entry("no group column", "file", 512, "2026-07-01T00:00", True),
    ),
    (
        "drwxr-xr-x    2 0        0            4096 Jul 20 10:00 archive",
        Entry("archive", "dir", 0, "2026-07-20T10:00", True),
    ),
    (
        "drwxrwsr-t+   2 0        0            4096 Jul 20 10:00 sticky",
        Entry("sticky", "dir", 0, "2026-07-20T10:00", True),
    ),
    (
        "lrwxrwxrwx    1 0        0               9 Jul 20 10:00 latest -> orders -> x",
        Entry("latest", "link", 0, "2026-07-20T10:00", True),
    ),
    (
        "crw-rw-rw-    1 0        0          1,   3 Jul 20 10:00 null",
        Entry("null", "other", 0, "2026-07-20T10:00", True),
    ),
    (
        "prw-r--r--    1 0        0               0 Jul 20 10:00 pipe",
        Entry("pipe", "other", 0, "2026-07-20T10:00", True),
    ),
    (
        "-rw-r--r--    1 john     domain users   77 Jul 19 09:52 a.csv",
        Entry("a.csv", "file", 77, "2026-07-19T09:52", True),
    ),
    (
        "-rw-r--r--    1 0        0               5 Jul 19 09:52  two spaces  ",
        Entry(" two spaces  ", "file", 5, "2026-07-19T09:52", True),
    ),
    (
        "-rw-r--r--    1 0        0               5 Jul 19 09:52 7 Jul 19 10:00 b",
        Entry("7 Jul 19 10:00 b", "file", 5, "2026-07-19T09:52", True),
    ),
    (
        "-rw-r--r--    1 0        0               5 Jul 19 09:52 caf\udce9",
        Entry("caf\udce9", "file", 5, "2026-07-19T09:52", True),
    ),
    (
        "-rw-r--r--.   1 0        0      9999999999 JUL 19 09:52 big",
        Entry("big", "file", 9999999999, "2026-07-19T09:52", True),
    ),
]
RELATIVES = [
    ("-rw-r--r-- 1 u g 5 2026-01-12 10:15 long iso", Entry("long iso", "file", 5, "2026-01-12T10:15")),
    (
        "-rw-r--r-- 1 u g 5 2026-01-12 10:15:30.123456789 +0130 full iso",
        Entry("full iso", "file", 5, "2026-01-12T08:45:30.123456789"),
    ),
    ("-rw-r--r-- 1 u g 5 2026-01-12 22:15:30 -0200 full iso", Entry("full iso", "file", 5, "2026-01-13T00:15:30")),
    ("-rw-r--r-- 1 u g 5 2026-01-12 10:15:30 no zone", Entry("no zone", "file", 5, "2026-01-12T10:15:30=")),
    ("lrwxrwxrwx 1 neeme neeme 23 2005-03-02 18:06 macros -> ./x/.", Entry("macros", "link", 0, "2005-03-02T18:06")),
    ("-rw-r--r-- 1 u g 5 Jan 12 2026 10:15 a.csv", Entry("a.csv", "file", 5, "2026-01-12T10:15")),
    (
        "-rwxr-xr-x    1 user group        9 Oct 08, 2002 09:47 vshell file",
        Entry("vshell file", "file", 9, "2002-10-08T09:47"),
    ),
    ("-rw-rw----    1 brydro   promak            0 Mar 11 2007  *", Entry("*", "file", 0, "2007-03-11")),
    ("drwxrws---    3 promak   promak          256 Oct 01 2007  .cpan", Entry(".cpan", "dir", 0, "2007-10-01")),
    (
        "-rw-rw-rw-    1 promak   promak          196 Jun 11 09:29 tmpa_drw_portfel09:29:44.774",
        Entry("tmpa_drw_portfel09:29:44.774", "file", 196, "2026-06-11T09:29", True),
    ),
    (
        "-rw-r--r-- 1 may 5 1234 Jan 12 10:15 owner may, group 5",
        Entry("owner may, group 5", "file", 1234, "2026-01-12T10:15", True),
    ),
    ("-rw-r--r-- 1 1000 may 12 Jan 12  2025 group may", Entry("group may", "file", 12, "2025-01-12")),
    ("-rw-r--r-- 1 1 may 2026 Jan 12 10:15 size 2026", Entry("size 2026", "file", 2026, "2026-01-12T10:15", True)),
    (
        "-rw-r--r--   1 ftp      group with spaces in it   83853 Jan 22  2001 a.tar.gz",
        Entry("a.tar.gz", "file", 83853, "2001-01-22"),
    ),
    (
        "-rwxr-xr-x   2 user     my group 500        5000000000 Mar  2 15:13 zxbox",
        Entry("zxbox", "file", 5000000000, "2026-03-02T15:13", True),
    ),
    (
        "drwxrwxr-x               folder        2 May 10  1996 no link count",
        Entry("no link count", "dir", 0, "1996-05-10"),
    ),
    (
        "-r--r--r-- 0125039 12 Nov 11 2005 neither owner nor group",
        Entry("neither owner nor group", "file", 12, "2005-11-11"),
    ),
    ("crw-r----- 1 root kmem 0, 27 Jan 30 11:42 kmem", Entry("kmem", "other", 0, "2026-01-30T11:42", True)),
    (
        "-rwxrwx---   1 ftp      ftp-admin 816026400 Oct  5  2008 bloplab 7 cd1.img",
        Entry("bloplab 7 cd1.img", "file", 816026400, "2008-10-05"),
    ),
    ("drwxr-xr-x 3 user group 512 01 oct 2004 day first", Entry("day first", "dir", 0, "2004-10-01")),
    (
        "drwxrwxrwx   1 0        0               0 29 Jun 02:27 2014 Invoices",
        Entry("2014 Invoices", "dir", 0, "2026-06-29T02:27", True),
    ),
    (
        "dr-xr-xr-x   2 root     other      2235 26. Juni, 20:10 German",
        Entry("German", "dir", 0, "2026-06-26T20:10", True),
    ),
    ("-r-xr-xr-x   2 root     other      2235 2.   Okt.  2003 German", Entry("German", "file", 2235, "2003-10-02")),
]
MONTH_NAMES = {
    "English": "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec",
    "German": "Jan Feb Mär Apr Mai Jun Jul Aug Sep Okt Nov Dez",
    "Austrian": "Jän Feb Mrz Apr Mai Juni Juli Aug Sept Okt Nov Dez",
    "French": "janv. févr. mars avril mai juin juil. août sept. oct. nov. déc.",
    "Spanish": "ene feb mar abr may jun jul ago sep oct nov dic",
    "Italian": "gen feb mar apr mag giu lug ago set ott nov dic",
    "Portuguese": "jan fev mar abr mai jun jul ago set out nov dez",
    "Dutch": "jan feb mrt apr mei jun jul aug sep okt nov dec",
}
DOS = [
    ("07-20-26  09:52AM       <DIR>          name", Entry("name", "dir", 0, "2026-07-20T09:52")),
    ("07-20-2026  09:52PM                 1234 a b.csv", Entry("a b.csv", "file", 1234, "2026-07-20T21:52")),
    ("01-02-99  12:00AM                    7 midnight", Entry("midnight", "file", 7, "1999-01-02T00:00")),
    ("01-02-03  12:30PM                    7 noon", Entry("noon", "file", 7, "2003-01-02T12:30")),
    ("07-20-2026  21:52                    7 day of 24 hours", Entry("day of 24 hours", "file", 7, "2026-07-20T21:52")),
    ("07-20-26  09:52AM       <DIR>            leading", Entry("  leading", "dir", 0, "2026-07-20T09:52")),
    (
        "07-20-26  09:52AM                    7  leading and trailing ",
        Entry(" leading and trailing ", "file", 7, "2026-07-20T09:52"),
    ),
    ("2002-09-02  18:48       <DIR>          long year first", Entry("long year first", "dir", 0, "2002-09-02T18:48")),
    (
        "20-07-26  09:52AM                    7 the day first is a doubtful date",
        Entry("the day first is a doubtful date", "file", 7, ""),
    ),
    ("07-20-26  09:52AM       <JUNCTION>     elsewhere", Entry("elsewhere", "link", 0, "2026-07-20T09:52")),
]
IBM = [  # the order of the date's parts is a setting there
    ("PEP              4019 04/03/18 18:58:16 *STMF      einladung.zip", Entry("einladung.zip", "file", 4019, "")),
    ("PEP             36864 04/03/24 14:06:34 *DIR       dir1/", Entry("dir1", "dir", 0, "")),
    (
        "QSYS            77824 23/02/00 15:09:55 *FILE 45-ibm-as400-date file",
        Entry("45-ibm-as400-date file", "other", 0, ""),
    ),
    ("QPGMR           36864 18.09.06 14:21:26 *FILE      55-AS400.FILE", Entry("55-AS400.FILE", "other", 0, "")),
]
OTHERS = [  # of these no one form is sure enough
    "-rw-r--r-- 1 u g 5 Jan 12  2026 10:15 a.csv",
    "-rw-r--r-- 1 u g 5 Jan 12  2025  a.csv",
    "-rw-r--r--   1 root     other        531 3 29 03:26 02-unix-std file",
    "-rw-r--r--   1 root     other        531 3 29 03:26 5 Jan 12 2026 a date in the name",
    "-rw-r--r--   1 root     other        531 09-26 2000 05-unix-date file",
    "-rw-r--r--   1 root     other        531 09-26 13:45 7 Jan 12 2026 a date in the name",
    "-rw-r--r--   1 root     other  33.5k Oct 5 21:22 08-unix-namedsize file",
    "-rw-r--r--   1 root     other  33.5k Oct 5 21:22 8 Oct 5 21:22 a date in the name",
    "-r-xr-xr-x   2 root     other      2235 24-04-2003 17:12 31-datetest file",
    "-r-xr-xr-x   2 root     other      2235 24-04-2003 17:12 1 Jan 5 10:15 a date in the name",
    "-r-xr-xr-x longowner longgroup123456 Feb 12 17:20 46-unix-concatsize file",
    "-r-xr-xr-x   2 root     other      2235 15 jui 2002 June or July",
    "drwxr-xr-x   5 root     sys          512 2005년  1월  6일 year first",
    "-rw-rw---- 1 ep1adm sapsys 0 8月 17日 20:10 caerrinf",
    "- [R----F--] rhesus 214059 Oct 20 15:27 netware",
    "-rw-r--r-- 1 5 12 may 2026 Jan 12 10:15 two dates",
    "-rw-r--r-- 1 may 5 2026 a.csv",
    "-rw-r--r--   1 root     root       190144 2001-04-27 zxJDBC-2.0.1b1.zip",
    "drwxr-xr-x 3 slopri devlab 512 71-unix-dateless",
    "2002-09-02  19:06                9,730 19-dos-longyear file",
    "206876  Apr 04, 2000 21:06 21-vshell-old file",
    "0  Dec 12, 2002 02:13 22-vshell-old dir/",
    "36611      A    04-23-103  10:57  24-os2 file",
    "36-vms-dir.DIR;1  1 19-NOV-2001 21:41 [root,root] (RWE)",
    "PEP              4019 04/03/18 18:58:16 STMF       einladung.zip",
    "a.csv",
    "PEP               422 03/24 14:06:26 *STMF      readme",
    "WYOSPT 3420   2003/05/21  1  200  FB  80  8053  PS  X.Y",
    "size=1;type=file;modify=20090722092510;\tadsl TV 2009-07-22 08-25-10 x",
]
GARBAGE = [
    "",
    " ",
    "total 8",
    "ls: cannot open directory",
    "-rw-r--r--",
    "-rw-r--r-- 1 0 0 5 Jul 19 09:52",
    "-rw-r--r-- 1 0 0 5 Jul 19 09:52 ",
    "-rw-r--r-- 1 0 0 5 Jul 32 09:52 x",
    "-rw-r--r-- 1 0 0 5 Feb 30 09:52 x",
    "-rw-r--r-- 1 0 0 5 Jul 19 25:00 x",
    "-rw-r--r-- 1 0 0 -5 Jul 19 09:52 x",
    "-rw-r--r-- 1 0 0 5 Foo 19 09:52 x",
    "-rw-r--r-- 1 0 0 5 Jul 19 0000 x",
    "d [RWCEAFMS] supervisor 512 Jul 16 18:53 login",
    "+i8388621.48594,m825718503,r,s280,\tdjb.html",
    "13-20-26  09:52AM  7 month",
    "07-20-26  13:52PM  7 hour",
    "PEP             36864 04/03/24 14:06:34 *DIR       /",
    "07-20-26  09:52AM  seven name",
    "2026-07-2026  09:52  7 x",
    "07-20-26  09:52AM       <DIR>",
    "٣٣-20-26  09:52AM  7 digits of another script",
]


@pytest.mark.parametrize(("line", "entry"), UNIX + RELATIVES + DOS + IBM)
def test_a_line_of_list_is_read(line: str, entry: Entry) -> None:
    assert parse_list_line(line, TODAY) == entry


@pytest.mark.parametrize("line", GARBAGE + OTHERS)
def test_what_is_no_line_of_list_is_not_guessed_at(line: str) -> None:
    assert parse_list_line(line, TODAY) is None


@pytest.mark.parametrize("language", MONTH_NAMES)
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_month_is_read_in_its_language_wherever_its_day_stands(language: str, encoding: str) -> None:
    for number, month in enumerate(MONTH_NAMES[language].split(), 1):
        for date in (f"{month} 12", f"12 {month}", f"12. {month}"):
            line = ftpcoord.decode_name(f"-rw-r--r-- 1 u g 5 {date}  2025 a.csv".encode(encoding), "utf-8")
            assert parse_list_line(line, TODAY) == Entry("a.csv", "file", 5, f"2025-{number:02}-12"), line


def listed(*lines: str) -> tuple[list[Entry], list[str]]:
    """What a server with this LIST has, and the lines that nobody understands."""
    with hostile.FtpHost(mlsd=False) as host:
        host.lines += [line.encode() for line in lines]
        server = open_host(host)
        with contextlib.closing(server):
            return server.list("/in"), server.unread


HEAD = "-rw-r--r-- 1 u g 5 "


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        (["Jan 12 2026 10:15 a", "Jan 12 2026 10:16 b"], ["a", "b"]),
        (["Jan 12 2025 10:15 a", "Jan 12 2025 b"], ["10:15 a", "b"]),  # a name that begins with a time
        (["Jan 12 10:15 b", "Jan 12 2025 10:15 a"], ["b", "10:15 a"]),  # years or times, never both
        (["Jan 12  2025 10:15 a", "Jan 12  2025 b"], ["b", "10:15 a"]),
        (["Jan 12  2025 10:15 a", "Jan 12 10:15 b"], ["b", "10:15 a"]),
        (["Jan 12 2025  a", "Jan 13 2025  b", "Jan 12 10:15 c"], ["a", "b", "c"]),  # AIX
        (["Jan 12 2025  a", "Jan 13 2025 b"], [" a", "b"]),
        (["Jan 12  2025  a", "Jan 13  2025 b"], [" a", "b"]),
        (["Jan 12  2025  a", "Jan 12 10:15 b"], ["b"]),  # nothing decides
    ],
)
def test_a_line_of_two_readings_is_read_as_the_rest_of_its_listing(lines: list[str], names: list[str]) -> None:
    entries, unread = listed(*(HEAD + line for line in lines))
    assert sorted(entry.name for entry in entries) == sorted(names)
    assert len(unread) == len(lines) - len(names)


IIS, NARROW = "07-20-26  09:52AM", "07-20-26 09:52AM"


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        (
            [f"{NARROW}  <DIR>            sub", f"{NARROW}              123  a", f"{NARROW}               17   b"],
            ["sub", "a", " b"],
        ),
        ([f"{NARROW}              123  a", f"{NARROW}               17 b"], [" a", "b"]),
        ([f"{NARROW}  <DIR>           sub", f"{NARROW}              123 a"], ["sub", "a"]),
        ([f"{IIS}       <DIR>            sub", f"{IIS}                  123  a"], ["  sub", " a"]),
    ],
)
def test_names_of_a_dos_listing_are_padded_if_all_are_and_it_is_not_of_iis(lines: list[str], names: list[str]) -> None:
    entries, unread = listed(*lines)
    assert (sorted(entry.name for entry in entries), unread) == (sorted(names), [])
    assert {entry.mtime for entry in entries} == {"2026-07-20T09:52"}


def test_no_date_of_a_dos_listing_is_believed_if_one_has_its_day_first() -> None:
    entries, _ = listed("05-06-26  09:52AM  7 a", "20-06-26  09:52AM  7 b")
    assert entries == [Entry("a", "file", 7, ""), Entry("b", "file", 7, "")]


@pytest.mark.parametrize("line", [*OTHERS[1:12], "something else"])
def test_a_listing_that_nobody_understands_is_no_empty_folder(line: str) -> None:
    with pytest.raises(ftpcoord.FileRefused, match="not understood"):
        listed("total 1", line)
    entries, unread = listed(line, HEAD + "Jan 12 10:15 b")
    assert [entry.name for entry in entries] == ["b"] and unread == [line]


@pytest.mark.parametrize("total", ["total 0", "insgesamt 8", "Gesamt 4"])
def test_the_total_of_ls_is_no_line_that_nobody_understands(total: str) -> None:
    assert listed(total) == ([], [])


def open_host(host: hostile.FtpHost) -> ftpcoord.FileServer:
    return ftpcoord.open_server(ftpcoord.Config(database="sqlite:///unused.db", **host.settings))


@pytest.mark.parametrize(
    "line",
    [
        b"-rw-r--r-- 1 " + b"5 Jan 12 2026 " * 18_000,
        b"-rw-r--r-- 1 " + b"5 Abc 12 2026 " * 18_000,
        b"x" * 10_000,
        b"type=file;" * 2000 + b"size=5; x",
    ],
)
@pytest.mark.parametrize("mlsd", [True, False], ids=["MLSD", "LIST"])
def test_a_line_that_is_too_long_for_any_name_ends_the_listing_at_once(line: bytes, mlsd: bool) -> None:
    with hostile.FtpHost(mlsd=mlsd) as host:
        host.lines.append(line)
        with contextlib.closing(open_host(host)) as server:
            began = time.process_time()
            with pytest.raises(ftpcoord.ServerDown, match="without an end"):
                server.list("/in")
            assert time.process_time() - began < 2


@pytest.mark.parametrize("part", ["5 Jan 12 2026 ", "5 Jan 12 10:15 ", "5 Abc 12 2026 ", "5 2026-01-12 10:15 ", "5 "])
def test_a_line_full_of_dates_is_given_up_soon(part: str) -> None:
    line, began = ("-rw-r--r-- 1 " + part * 8000)[:8000], time.process_time()
    for _ in range(50):
        ftpcoord.list_readings(line, datetime.date(2026, 7, 1))
    assert time.process_time() - began < 1


def test_lines_of_two_readings_are_counted_like_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ftpcoord, "MAX_ENTRIES", 100)
    with hostile.FtpHost(mlsd=False) as host:
        host.lines += [b"-rw-r--r-- 1 me us 5 Jan 12 2026  a"] * 101
        with contextlib.closing(open_host(host)) as server:
            with pytest.raises(ftpcoord.ServerDown, match="without an end"):
                server.list("/in")


def test_of_a_file_whose_line_may_be_among_those_not_understood_nobody_says_that_it_is_gone() -> None:
    with hostile.FtpHost({"b": b"1"}, mlsd=False) as host:
        host.lines.append(b"?????????? ? ? ? ?            ? a.csv")
        server = open_host(host)
        with contextlib.closing(server):
            host.on("SIZE", hostile.reply("500 unknown"), times=None)
            assert server.same("/in/c.csv", Entry("c.csv", "file", 1, "")) is None
            with pytest.raises(ftpcoord.FileRefused):
                server.same("/in/a.csv", Entry("a.csv", "file", 1, ""))


@pytest.mark.parametrize(
    ("today", "text", "mtime"),
    [
        ("2026-07-20", "Jul 20 10:00", "2026-07-20T10:00"),
        ("2026-07-20", "Jul 21 10:00", "2026-07-21T10:00"),  # the server is a zone ahead
        ("2026-07-20", "Jul 22 10:00", "2025-07-22T10:00"),
        ("2026-01-02", "Dec 31 23:59", "2025-12-31T23:59"),
        ("2025-12-31", "Jan  1 00:05", "2026-01-01T00:05"),
        ("2026-03-01", "Feb 29 10:00", "2024-02-29T10:00"),
        ("2024-02-28", "Feb 29 10:00", "2024-02-29T10:00"),
        ("2024-02-27", "Feb 29 10:00", "2020-02-29T10:00"),
        ("1903-06-01", "Feb 29 10:00", "1896-02-29T10:00"),  # 1900 was no leap year
    ],
)
def test_a_time_without_a_year_is_of_the_latest_date_not_more_than_a_day_ahead(
    today: str, text: str, mtime: str
) -> None:
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
    (
        "Type=File;Size=12;Modify=20260112101530.123;UNIX.mode=0644; a ; b= c ",
        Entry("a ; b= c ", "file", 12, "2026-01-12T10:15:30.123"),
    ),
    ("modify=20260112101530;type=dir;unique=1; folder", Entry("folder", "dir", 0, "2026-01-12T10:15:30")),
    ("type=file;size=0;  leading", Entry(" leading", "file", 0, "")),
    ("type=file;size=1;modify=yesterday; x", Entry("x", "file", 1, "")),
    ("type=file;size=1;modify=20261312101530; x", Entry("x", "file", 1, "")),
    ("type=file;size=1 no last semicolon", Entry("no last semicolon", "file", 1, "")),
    ("type=cdir;modify=20260112101530; /inbox", Entry(".", "dir", 0, "")),
    ("type=pdir;modify=20260112101530; /", Entry("..", "dir", 0, "")),
    ("type=OS.unix=slink:/x;size=3; link", Entry("link", "link", 0, "")),
    ("type=OS.unix=symlink; link", Entry("link", "link", 0, "")),
    ("type=OS.unix=chr-1/3; null", Entry("null", "other", 0, "")),
]


@pytest.mark.parametrize(("line", "entry"), MLSD)
def test_a_line_of_mlsd_is_read(line: str, entry: Entry) -> None:
    assert parse_mlsd_line(line) == entry


@pytest.mark.parametrize(
    "line",
    [
        "",
        " ",
        "x",
        "type=file;size=1;",
        "type=file;size=1; ",
        "size=1; x",
        "type=file; x",
        "type=file;size=-1; x",
        "type=file;size=1;UNIX.owner=J Doe; x",
        "-rw-r--r-- 1 0 0 5 Jul 19 09:52 x",
    ],
)
def test_what_is_no_line_of_mlsd_is_not_guessed_at(line: str) -> None:
    assert parse_mlsd_line(line) is None


LINE = st.one_of(
    st.text(),
    st.from_regex(r"[-dlbc][-rwx]{9} +\d+ \w+ \w+ +\d+ [A-Z][a-z]{2} +\d+ [\d:]+ ?.*"),
    st.from_regex(r"\d\d-\d\d-\d+ +\d+:\d+\w* +\S+ .*"),
    st.from_regex(r"(\w+=\w*;)+ ?.*"),
)


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
        return  # never wrong bytes
    assert sent == raw or "utf-16" in encoding or encoding == "cp037"


@pytest.mark.parametrize("name", ["a\rb", "a\nb", "a\0b"])
def test_a_line_break_or_nul_in_a_path_is_refused_before_it_is_sent(name: str) -> None:
    with pytest.raises(ftpcoord.FileRefused):
        ftpcoord.encode_name(name, "utf-8")


KEY, OTHER = b"\0\0\0\x0bssh-ed25519\0\0\0\x04AAAA", b"\0\0\0\x0bssh-ed25519\0\0\0\x04BBBB"
KEY64, OTHER64 = "AAAAC3NzaC1lZDI1NTE5AAAABEFBQUE=", "AAAAC3NzaC1lZDI1NTE5AAAABEJCQkI="


@pytest.mark.parametrize(
    ("line", "host", "port", "keys"),
    [
        (f"files.example ssh-ed25519 {KEY64}", "files.example", 22, {KEY}),
        (f"files.example ssh-ed25519 {KEY64} a comment", "FILES.example", 22, {KEY}),
        (f"files.example ssh-ed25519 {KEY64}", "files.example", 2222, set()),
        (f"[files.example]:2222,10.0.0.1 ssh-ed25519 {KEY64}", "files.example", 2222, {KEY}),
        (f"*.example,!files.example ssh-ed25519 {KEY64}", "files.example", 22, set()),
        (f"*.example,!files.example ssh-ed25519 {KEY64}", "others.example", 22, {KEY}),
        (f"files.example ssh-ed25519 {KEY64}\nfiles.example ssh-ed25519 {OTHER64}", "files.example", 22, {KEY, OTHER}),
        (
            f"# files.example ssh-ed25519 {KEY64}\n\nfiles.example ssh-ed25519 %%%\nfiles.example",
            "files.example",
            22,
            set(),
        ),
        (f"@cert-authority files.example ssh-ed25519 {KEY64}", "files.example", 22, set()),
    ],
)
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
