"""A line that a folder's last listing had is not read again, and nothing but the time that it takes tells so."""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import struct
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, Optional

import hostile
import pytest
from hostile import FtpHost, SftpHost, Site, reply
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory import Clock, config, found, row

import ftpcoord
from ftpcoord import Change, Entry, Found, Ledger, Recognizer, Row, Selector

KINDS = ["MLSD", "LIST", "SFTP"]
MANY = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=KINDS)
def host(request: pytest.FixtureRequest) -> Iterator[Any]:
    with SftpHost() if request.param == "SFTP" else FtpHost(mlsd=request.param == "MLSD") as one:
        yield one


def config_of(host: Any, **more: Any) -> ftpcoord.Config:
    return ftpcoord.Config(**{"database": "sqlite:///unused.db", "settle": 0, **host.settings, "timeout": 10, **more})


@pytest.fixture
def server(host: Any) -> Iterator[ftpcoord.FileServer]:
    with contextlib.closing(ftpcoord.open_server(config_of(host))) as one:
        yield one


# -- one listing ------------------------------------------------------------------------------------------------------

MODE = b"-rw-r--r-- 1 u g 5 "
LINES = {
    "MLSD": [
        b"type=file;size=5;modify=20240112101530; a",
        b"type=file;size=6;modify=20240112101530; a",
        b"type=file;size=5;modify=20240112101530;UNIX.mode=0644; a",
        b"type=dir;modify=20240112101530; sub",
        b"type=cdir; .",
        b"type=file;modify=20240112101530; no size",
        b"what is this?",
        b"total 5",
        b"",
    ],
    "LIST": [
        MODE + b"Jan 12 10:15 a",
        MODE + b"Jan 13 10:15 a",
        MODE + b"Jan 12  2024 b",
        MODE + b"Jan 12 2024 10:15 either",  # a time, or a name that begins with one
        MODE + b"Jan 12 2024  padded",
        b"drwxr-xr-x 2 u g 4096 Jan 12 10:15 .",
        b"drwxr-xr-x 2 u g 4096 Jan 12 2024 10:15 sub",
        b"01-12-24  10:15AM  5 dos",
        b"13-12-24  10:15AM  5 its day first",  # no time of the listing can be trusted then
        b"what is this?",
        b"total 5",
        b"",
    ],
}
ENTRIES = [
    (b"a", hostile.attributes(5)),
    (b"a", hostile.attributes(6)),
    (b"ab", hostile.attributes(5)),
    (b"sub", hostile.attributes(5, mode=0o040755)),
    (b"..", hostile.attributes(5, mode=0o040755)),
    (b"vague", hostile.attributes(5, mode=0o644)),
    (b"extended", struct.pack(">IQII", 0x80000005, 5, 0o100644, 1) + hostile.string(b"x") + hostile.string(b"y")),
    (b"extended", struct.pack(">IQII", 0x80000005, 5, 0o100644, 1) + hostile.string(b"x") + hostile.string(b"z")),
    (b"owned", struct.pack(">IIIII", 6, 1, 2, 0o100644, 0)),
    (b"owned", struct.pack(">IQIII", 7, 5, 1, 2, 0o100644)),
]


def told(list_it: Callable[[], Sequence[Entry]], server: ftpcoord.FileServer) -> tuple[Any, Any, Any]:
    """(the listing, what was not understood, the error)"""
    try:
        return list_it(), list(server.unread), None
    except ftpcoord.Error as error:
        return None, list(server.unread), str(error)


@MANY
@given(data=st.data())
def test_a_listing_means_the_same_whatever_the_one_before_it_had(
    host: Any, server: ftpcoord.FileServer, data: st.DataObject
) -> None:
    sftp = isinstance(host, SftpHost)
    pool = ENTRIES if sftp else LINES["MLSD" if host.mlsd else "LIST"]
    listings = data.draw(st.lists(st.lists(st.sampled_from(pool), max_size=8), min_size=2, max_size=4))
    last: Any = None
    for lines in listings:
        if sftp:
            host.entries = lines
        else:
            host.lines = lines
        expected = told(functools.partial(server.list, "/in"), server)
        again = told(functools.partial(server.list, "/in", last), server)
        assert again == expected
        last = again[0]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What is read of listings."""
    found: list[bytes] = []
    decode = ftpcoord.decode_name

    def noted(raw: bytes, encoding: str) -> str:
        found.append(raw)
        return decode(raw, encoding)

    monkeypatch.setattr(ftpcoord, "decode_name", noted)
    return found


def test_what_has_not_changed_is_not_read_again(host: Any, server: ftpcoord.FileServer, read: list[bytes]) -> None:
    for number in range(200):
        host.put(f"{number:03}", b"1")
    selector = Selector(config_of(host), Clock())
    assert len(selector.tree.walk(server)) == 200
    assert len(read) >= 200
    read.clear()
    host.put("001", b"12")
    host.put("100a", b"1")
    del host.files["000"]
    sizes = {one.path: one.entry.size for one in selector.tree.walk(server)}
    assert len(sizes) == 200 and (sizes["/in/001"], sizes["/in/002"]) == (2, 1)
    assert {b"001", b"100a"} <= {raw.rpartition(b" ")[2] for raw in read} and len(read) < 8


@pytest.mark.parametrize("mlsd", [True, False])
def test_a_look_at_a_group_by_one_listing_reads_only_what_has_changed(mlsd: bool, read: list[bytes]) -> None:
    files = {f"{number:03}": b"1" for number in range(200)}
    with FtpHost(files=files, mlsd=mlsd) as host, contextlib.closing(ftpcoord.open_server(config_of(host))) as server:
        host.times = dict.fromkeys(files, datetime.datetime(2026, 1, 12, 10, 15))
        jobs = [ftpcoord.Job(f"/in/{entry.name}", 1, bytes, entry) for entry in server.list("/in")[:64]]
        for changed in ([], ["003", "new"]):
            host.put("new", b"1")
            host.times.update(dict.fromkeys(changed, datetime.datetime(2026, 1, 13, 10, 15)))
            server.habits.listing, server.habits.question = 1.0, 1.0  # seconds
            read.clear()
            refused = [job.path for job, error in server.fetch_many(jobs) if error is not None]
            assert refused == ["/in/003"] * ("003" in changed) and len(read) < 12
        assert len(host.said("MLST")) + len(host.said("MDTM")) < 2


def test_a_total_that_does_not_come_first_is_not_understood() -> None:
    with FtpHost(mlsd=False) as host, contextlib.closing(ftpcoord.open_server(config_of(host))) as server:
        host.lines = [MODE + b"Jan 12  2024 a"]
        last = server.list("/in")
        host.lines += [b"total 5"]
        server.list("/in", last)
        assert server.unread == ["total 5"]


def test_lines_are_read_anew_where_they_come_as_the_other_kind() -> None:
    line = b"type=file;size=5;modify=20260101000000; 12 01/01/26 10:00:00 *STMF x"
    with FtpHost() as host, contextlib.closing(ftpcoord.open_server(config_of(host))) as server:
        host.lines = [line]
        last = server.list("/in")
        assert [entry.size for entry in last] == [5]
        host.on("MLSD", reply("502 not now"))
        assert [(entry.name, entry.size) for entry in server.list("/in", last)] == [("x", 12)]


def test_the_year_that_a_line_leaves_out_is_another_one_on_another_day(monkeypatch: pytest.MonkeyPatch) -> None:
    class Today(datetime.datetime):
        moment = datetime.datetime(2026, 3, 1, 12, tzinfo=datetime.timezone.utc)

        @classmethod
        def now(cls, tz: Optional[datetime.tzinfo] = None) -> Any:
            return cls.moment

    monkeypatch.setattr(ftpcoord, "datetime", types.SimpleNamespace(**{**vars(datetime), "datetime": Today}))
    with FtpHost(mlsd=False) as host, contextlib.closing(ftpcoord.open_server(config_of(host))) as server:
        host.lines = [MODE + b"Mar 5 10:15 a"]
        last = server.list("/in")
        assert last[0].mtime == "2025-03-05T10:15"
        Today.moment += datetime.timedelta(days=4)
        assert server.list("/in", last)[0].mtime == "2026-03-05T10:15"


def test_only_the_lines_of_the_last_listing_are_kept(host: Any, server: ftpcoord.FileServer) -> None:
    def alive() -> int:
        gc.collect()
        return sum(isinstance(one, (Entry, Found)) for one in gc.get_objects())

    selector, before = Selector(config_of(host), Clock()), alive()
    for start in range(0, 5000, 500):
        host.files = {f"{number:05}": b"1" for number in range(start, start + 500)}
        assert len(selector.tree.walk(server)) == 500
    assert alive() - before < 1100


# -- polls ------------------------------------------------------------------------------------------------------------


class Forgetful:
    """A server that is never given a listing of before."""

    def __init__(self, server: ftpcoord.FileServer) -> None:
        self.server = server

    def __getattr__(self, name: str) -> Any:
        return getattr(self.server, name)

    def list(self, folder: str, last: object = None) -> Sequence[Entry]:
        return self.server.list(folder)


class Side:
    """Polls by one connection, with a selector, a ledger and a recognizer of its own."""

    def __init__(self, config: ftpcoord.Config, server: Any) -> None:
        self.config, self.server = config, server
        self.clock = Clock()
        lease = ftpcoord.Lease(1, float("inf"), self.clock)
        self.ledger = Ledger(ftpcoord.MemoryRows(), "g", "a", lease, self.clock)
        self.selector = Selector(config, self.clock)
        self.recognizer = Recognizer(self.ledger, self._looking, lambda: None)

    @contextlib.contextmanager
    def _looking(self) -> Iterator[Any]:
        yield self.server

    def poll(self) -> tuple[Any, ...]:
        left: list[tuple[Found, str]] = []
        look = self.selector.tree.walk(self.server)
        shown = list(look)
        if not isinstance(self.server, Forgetful):
            self.selector.verdicts.leave_out_final(look, self.ledger.get)
        unclear = self.recognizer.recognize(look, set())
        choice = self.selector.choose(look, self.ledger.get, unclear, lambda found, why: left.append((found, why)))
        self.ledger.forget_unlisted(look.paths.keys(), 1000.0, look.lacks)
        counts = choice.waiting, choice.young, self.selector.tree.refused
        return shown, choice.ready, choice.unsettled, counts, left, unclear, look.refused, look.unread

    def step(self, step: str, how: list[Any], host: Any) -> tuple[Any, ...]:
        if step == "wait":
            self.clock.now += how[0]
        elif step == "operate" and (row := self.ledger.get(f"/in/{how[0]}")):  # by an operator, or by another member
            delay = how[2] if how[1] == "failed" else None
            assert self.ledger.write([Change(row, row._replace(state=how[1]), delay)]) == [True]
        elif step == "refuse":
            host.on("READDIR" if isinstance(host, SftpHost) else "CWD", refused(host))
        try:
            polled = self.poll()
        except ftpcoord.FileRefused as error:
            polled = (str(error),)
        host.behave()
        taken = {"handle": [work.found for work in polled[1]], "adopt": polled[0]} if len(polled) > 1 else {}
        for path, _, entry in taken.get(step, ()):
            done = Row(path, entry.size, entry.mtime, "done", 1, 1, 0)
            assert self.ledger.write([Change(self.ledger.get(path), done)]) == [True]
        return polled


def judged(selector: Selector, *rows: Row, names: Sequence[str] = ("a.csv",)) -> tuple[list[str], list[str]]:
    """By a poll that lists these: the names that are judged, and those that are ready."""
    look, known = ftpcoord.Look(), {one.path: one for one in rows}
    look.extend(map(found, names))
    look.paths.update((one.path, one) for one in look)
    selector.verdicts.leave_out_final(look, known.get)
    choice = selector.choose(look, known.get, set())
    return [one.relative for one in look], [work.found.relative for work in choice.ready]


@pytest.mark.parametrize(("name", "rows"), [("a.csv", [row()]), ("a.tmp", []), ("a.txt", [])])
def test_what_is_done_or_unwanted_is_judged_once(name: str, rows: list[Row]) -> None:
    selector = Selector(config(pattern="*.csv"), Clock())
    assert judged(selector, *rows, names=[name]) == ([name], [])
    assert judged(selector, *rows, names=[name]) == ([], [])
    assert judged(selector, *rows, names=[]) == ([], [])
    assert judged(selector, *rows, names=[name]) == ([name], []), "it was away"
    assert judged(selector, row(name, "failed"), names=[name])[0] == [name], "its row is another one"


@pytest.mark.parametrize("waiting", [row(state="failed", due=1050.0), row(state="quarantined"), row(mtime="x~")])
def test_what_waits_or_may_have_been_replaced_in_its_minute_is_judged_at_each_poll(waiting: Row) -> None:
    selector = Selector(config(), Clock())
    for _ in range(3):
        assert judged(selector, waiting._replace(mtime=waiting.mtime.replace("x", found().entry.mtime)))[0] == ["a.csv"]


def test_a_companion_counts_though_it_was_recorded_as_done() -> None:
    selector, known = Selector(config(requires="{name}.ok"), Clock()), row("a.csv.ok")
    for _ in range(3):
        assert judged(selector, known, names=["a.csv.ok"])[1] == []
    assert judged(selector, known, names=["a.csv.ok", "a.csv"])[1] == ["a.csv"]


NAME = st.sampled_from(["a.csv", "b.csv", "c.csv", "c.csv.ok", "left.txt", ".hidden", "sub/a.csv", "sub/d.csv"])
STEP = st.one_of(
    st.tuples(st.just("put"), NAME, st.sampled_from([b"1", b"1", b"22"]), st.sampled_from([0, 20, 60, 90_000])),
    st.tuples(st.just("remove"), NAME),
    st.tuples(st.just("turn")),
    st.tuples(st.just("wait"), st.sampled_from([1, 100, 5000])),
    st.tuples(st.just("handle")),
    st.tuples(st.just("adopt")),
    st.tuples(st.just("operate"), NAME, st.sampled_from(["done", "failed", "quarantined"]), st.sampled_from([0, 50])),
    st.tuples(st.just("refuse")),
    st.tuples(st.just("poll")),
)
SETTINGS = st.fixed_dictionaries(
    {
        "recursive": st.booleans(),
        "pattern": st.sampled_from(["*", "*.csv"]),
        "requires": st.sampled_from([None, None, "{name}.ok"]),
        "min_age": st.sampled_from([0, 50]),
        "settle": st.sampled_from([0, 5]),
    }
)


@MANY
@given(chosen=SETTINGS, steps=st.lists(STEP, min_size=4, max_size=25))
def test_each_poll_selects_the_same_as_one_that_reads_and_judges_every_line_anew(
    host: Any, server: ftpcoord.FileServer, chosen: dict[str, Any], steps: list[tuple[Any, ...]]
) -> None:
    config = config_of(host, **{name: value for name, value in chosen.items() if value is not None})
    host.files, host.times, host.folders = {}, {}, {"/in/sub"}
    sides = Side(config, server), Side(config, Forgetful(server))
    for step, *how in [*steps, ("poll",)]:
        if step == "put":
            host.put(*how)
        elif step == "remove":
            host.files.pop(how[0], None)
        elif step == "turn":
            host.files = dict(reversed(host.files.items()))
        polled = [side.step(step, how, host) for side in sides]
        assert polled[0] == polled[1], step
        assert sorted(sides[0].ledger.all()) == sorted(sides[1].ledger.all())


def refused(host: Any) -> Callable[[Any, str], None]:
    return hostile.status(3) if isinstance(host, SftpHost) else reply("450 not now")


@pytest.fixture
def site(host: Any, tmp_path: Path) -> Site:
    host.put("a", b"1")
    host.put("b", b"1")
    return Site(tmp_path, host.settings, "handler")


def test_an_operator_s_write_is_noticed_although_no_line_has_changed(host: Any, site: Site) -> None:
    with site:
        site.arrive({"a": b"1", "b": b"1"})
        site.polls(3)
        with contextlib.closing(ftpcoord.open_database(site.listener.config)) as database:
            group = site.listener.config.coordination_group
            (row,) = [row for row in database.rows(group) if row.path == "/in/a"]
            database.retry(group, row)
        site.wait("file_done", 3)
        site.polls(3)
    assert [(name, attempt) for name, _, attempt in site.handled if name == "a"] == [("a", 1), ("a", 2)]
    assert [name for name, _, _ in site.handled].count("b") == 1


def test_a_file_that_comes_back_as_it_was_is_not_handled_again_and_another_one_is(host: Any, site: Site) -> None:
    with site:
        site.arrive({"a": b"1", "b": b"1"})
        del host.files["a"], host.files["b"]
        site.wait("polled", listed=0)
        host.put("b", b"2", seconds=3 * 86_400)
        host.put("a", b"1")
        site.wait("file_done", 3)
        site.polls(3)
    assert [name for name, _, _ in site.handled].count("a") == 1
    assert [content for name, content, _ in site.handled if name == "b"] == [b"1", b"2"]


@pytest.mark.parametrize("ahead", [0, -8, 9])
def test_a_file_that_is_replaced_within_the_minute_of_its_line_is_found(tmp_path: Path, ahead: int) -> None:
    """Also where MDTM tells the server's own time, so many hours ahead of UTC."""
    with FtpHost(mlsd=False) as host:
        now = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None, second=5, microsecond=0)
        now += datetime.timedelta(hours=ahead)
        host.put("a", b"1")
        host.times["a"] = now
        site = Site(tmp_path, host.settings, "handler")
        with site:
            site.wait("file_done")
            site.polls(3)
            host.put("a", b"2")
            host.times["a"] = now + datetime.timedelta(seconds=40)
            site.wait("file_done", 2)
            site.polls(3)
        assert [content for _, content, _ in site.handled] == [b"1", b"2"]
