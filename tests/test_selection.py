"""Selection, ledger and delivery over rows in memory: no server, no database."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st
from servers import wait_for

import ftpcoord
from ftpcoord import (
    Change,
    Choice,
    Command,
    Config,
    DatabaseDown,
    Entry,
    Fence,
    File,
    FileGone,
    FileRefused,
    Found,
    HandlerFailed,
    Lease,
    LeaseLost,
    Ledger,
    LocalTrouble,
    MemoryRows,
    Row,
    Selector,
    Work,
    Workplace,
    create_file,
    epoch_seconds,
    is_plain_name,
    numbered,
    printable,
    publish,
    same_version,
)

NONE: frozenset[str] = frozenset()
NOON = "2026-01-12T12:00"


def config(**more: Any) -> Config:
    values = {"url": "ftp://me@h/in", "database": "sqlite:///x", "settle": 0, "member_id": "a", **more}
    return Config(**values)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The member's clock, for rows in memory, too."""
    clock = Clock()
    monkeypatch.setattr(ftpcoord, "boot_clock", clock)
    return clock


def found(name: str = "a.csv", size: int = 10, mtime: str = NOON) -> Found:
    return Found(f"/in/{name}", name, Entry(name.rpartition("/")[2], "file", size, mtime))


def row(name: str = "a.csv", state: str = "done", **more: Any) -> Row:
    return Row(f"/in/{name}", 10, NOON, state, 1, 1, 0)._replace(**more)


def choose(selector: Selector, listing: Sequence[Found], *rows: Row, busy: Sequence[str] = ()) -> Choice:
    known = {one.path: one for one in rows}
    return selector.choose(listing, known.get, set(busy))


def names(works: Sequence[Work]) -> list[str]:
    return [work.found.relative for work in works]


def ready(listing: Sequence[Found], *rows: Row, **settings: Any) -> list[str]:
    return names(choose(Selector(config(**settings), time.monotonic), listing, *rows).ready)


# -- the verdict ------------------------------------------------------------------------------------------------------

VERDICTS: list[tuple[dict[str, Any], Optional[Row], str, str]] = [
    ({}, None, "take", ""),
    ({}, row(), "skip", "done before"),
    ({"pattern": "*.xml"}, None, "skip", "its name is not asked for (pattern, exclude, hidden or temporary)"),
    ({"ready_suffix": ".ok"}, None, "skip", "its marker .ok is not there"),
    ({"max_age": 60}, None, "skip", "older than max_age"),
    ({"max_size": 9}, None, "warn", "larger than max_size: 10 bytes"),
    ({"max_size": 10}, None, "take", ""),
    ({}, row(state="quarantined", error="no good"), "skip", "quarantined: no good"),
    ({}, row(state="failed", due=70.0, error="no good"), "wait", "failed, tried again in 70 s: no good"),
    ({}, row(state="failed", due=0.0), "take", ""),
    ({}, row(state="claimed"), "take", ""),
]


@pytest.mark.parametrize(("settings", "old", "word", "why"), VERDICTS, ids=[f"{v[0]}-{v[3]}" for v in VERDICTS])
def test_polling_does_what_the_verdict_says_that_the_dry_run_shows(
    settings: dict[str, Any], old: Optional[Row], word: str, why: str
) -> None:
    selector = Selector(config(**settings), lambda: 0.0)
    assert selector.verdict(found(), old, {}, 0.0) == (word, why)
    choice = choose(selector, [found()], *([old] if old else []))
    assert (len(choice.ready), choice.waiting) == (word == "take", word == "wait")


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "../x", "a\0b", "a\rb", "a\nb"])
def test_a_name_that_is_not_one_plain_segment_is_refused(name: str) -> None:
    assert not is_plain_name(name)


@pytest.mark.parametrize("name", ["a", "...", ".a", "a b", "ä", "\udcff", "-rf", "a;b", "~", "%2F"])
def test_other_names_are_taken_as_they_are(name: str) -> None:
    assert is_plain_name(name)


class Folders:
    """A server of folders in memory."""

    def __init__(self, **folders: list[Entry]) -> None:
        self.folders: dict[str, list[Entry]] = folders
        self.listed: list[str] = []
        self.unread: list[str] = []
        self.errors: dict[str, Exception] = {}
        self.lines: dict[str, list[str]] = {}
        self.caseless = False

    def list(self, folder: str) -> list[Entry]:
        self.listed.append(folder)
        self.unread = self.lines.get(folder, [])
        if folder in self.errors:
            raise self.errors[folder]
        return self.folders[folder]

    def absolute(self, path: str) -> str:
        return path if path.startswith("/") else "/home/me/" + path

    def exists(self, path: str) -> bool:
        for known, entries in self.folders.items():
            for entry in entries:
                full = known.rstrip("/") + "/" + entry.name
                if full == path or (self.caseless and full.casefold() == path.casefold()):
                    return True
        return False


def a_file(name: str) -> Entry:
    return Entry(name, "file", 1, NOON)


def a_folder(name: str) -> Entry:
    return Entry(name, "dir", 0, NOON)


def walk(server: Folders, **settings: Any) -> list[str]:
    return [each.relative for each in Selector(config(**settings), time.monotonic).walk(server)]  # type: ignore[arg-type]


def test_a_walk_refuses_odd_names_and_counts_them(caplog: pytest.LogCaptureFixture) -> None:
    server = Folders(**{"/in": [a_file("../x"), a_file("ok"), a_file("a\nb"), a_folder(".."), a_file("../x")]})
    selector = Selector(config(recursive=True), time.monotonic)
    assert [each.path for each in selector.walk(server)] == ["/in/ok"]  # type: ignore[arg-type]
    assert selector.refused == 4
    assert server.listed == ["/in"]
    assert [record.getMessage() for record in caplog.records] == ["file_refused"] * 3, "each name is told once"


def test_a_walk_without_recursive_stays_in_the_folder_and_takes_files_alone() -> None:
    server = Folders(**{"/in": [a_folder("sub"), a_file("a"), Entry("l", "link", 1, ""), Entry("s", "other", 1, "")]})
    assert walk(server) == ["a"]
    assert server.listed == ["/in"]


def test_a_recursive_walk_keeps_the_paths_below_the_polled_folder() -> None:
    server = Folders(**{
        "/in": [a_folder("x"), a_file("a"), a_folder("gone"), a_folder("closed")],
        "/in/x": [a_file("b"), a_folder("y")], "/in/x/y": [a_file("c")],
    })  # fmt: skip
    server.errors = {"/in/gone": FileGone("gone"), "/in/closed": FileRefused("closed")}
    assert walk(server, recursive=True) == ["x/b", "x/y/c", "a"]


@pytest.mark.parametrize("base", ["/in", "/", "in", "."])
def test_a_walk_knows_what_it_could_not_see(base: str) -> None:
    prefix = {".": "", "/": "/"}.get(base, base + "/")
    server = Folders(**{
        base: [a_file("a"), a_folder("x"), a_folder("closed")], prefix + "x": [a_file("b")], prefix + "odd": [],
    })  # fmt: skip
    server.errors = {prefix + "closed": FileRefused("closed")}
    server.lines = {base: ["???? c.csv", "???? link -> d"], prefix + "x": ["???? odd/"]}
    url = f"ftp://me@h/{'~/' * (base[0] != '/')}{base.lstrip('/').strip('.')}"
    look = Selector(config(url=url, recursive=True), time.monotonic).walk(server)  # type: ignore[arg-type]
    absent = ("b", "x/a", "x/y/z", "gone/c.csv", "c.csvx", "x/c.csv", "lin", "x/od/a")
    doubtful = ("c.csv", "csv", "link", "d", "closed/a", "closed/b/c", "c.csv/a", "x/odd", "x/odd/a")
    assert [name for name in absent if not look.lacks(prefix + name)] == []
    assert [name for name in doubtful if look.lacks(prefix + name)] == []
    assert look.lacks("/elsewhere/c.csv") and look.lacks("elsewhere/c.csv"), "nobody looks there any more"


def test_a_folder_of_whose_listing_too_much_is_not_understood_is_not_seen_whole() -> None:
    server = Folders(**{"/in": [a_file("a")]})
    server.lines = {"/in": ["????"] * 101}
    assert not Selector(config(), time.monotonic).walk(server).lacks("/in/b")  # type: ignore[arg-type]


def test_a_walk_below_the_login_folder_gives_relative_paths() -> None:
    server = Folders(**{".": [a_file("a"), a_folder("x")], "x": [a_file("b")]})
    selector = Selector(config(url="ftp://me@h/~/", recursive=True), time.monotonic)
    assert [each.path for each in selector.walk(server)] == ["a", "x/b"]  # type: ignore[arg-type]


def test_folders_that_files_are_moved_to_and_excluded_ones_are_not_listed() -> None:
    server = Folders(**{
        "/in": [a_folder("done"), a_folder("bad"), a_folder("skip"), a_folder("x"), a_folder("abs")],
        "/in/x": [a_folder("done"), a_folder("bad"), a_file("a")],
    })  # fmt: skip
    settings = {"recursive": True, "exclude": "skip", "after": "move:done", "after_error": "move:/in/abs/"}
    server.folders["/in/bad"] = server.folders["/in/x/bad"] = []
    assert walk(server, **settings) == ["x/a"]
    assert server.listed == ["/in", "/in/bad", "/in/x", "/in/x/bad"]


def tree(*paths: str) -> Folders:
    """A server with these files below /in, and their folders."""
    folders: dict[str, list[Entry]] = {}
    for path in paths:
        parts = path.strip("/").split("/")
        for depth, name in enumerate(parts):
            entries = folders.setdefault("/" + "/".join(parts[:depth]), [])
            entry = a_file(name) if depth == len(parts) - 1 else a_folder(name)
            if entry not in entries:
                entries.append(entry)
    return Folders(**folders)


@pytest.mark.parametrize(("targets", "polled", "left"), [
    ({"after": "move:done"}, ["a", "x/a", "x/arch/a"], ["done/a", "x/done/a", "x/done/y/a"]),
    ({"after": "move:arch/done"}, ["arch/a", "x/arch/a", "done/a"], ["arch/done/a", "x/arch/done/a"]),
    ({"after": "move:./arch//done/"}, ["arch/a"], ["arch/done/a"]),
    ({"after": "move:/in//done"}, ["x/done/a"], ["done/a"]),
    ({"after": "move:/x/../in/done"}, ["x/done/a"], ["done/a"]),
    ({"after": "move:/in/x/done", "after_error": "move:bad"}, ["done/a"], ["x/done/a", "bad/a", "x/bad/a"]),
    ({"after": "move:../done"}, ["x/a"], ["done/a", "x/done/a"]),
    ({"after": "move:../../done"}, ["x/a"], ["done/a", "x/done/a"]),
    ({"after": "move:/done"}, ["done/a", "x/done/a"], []),
    ({"after": "move:done", "url": "ftp://me@h//in//"}, ["a"], ["done/a"]),
    ({"after": "move:done", "url": "ftp://me@h/x/../in"}, ["a"], ["done/a"]),
])
def test_what_files_are_moved_to_is_not_polled_wherever_it_is(
    targets: dict[str, str], polled: list[str], left: list[str]
) -> None:
    server = tree(*("/in/" + path for path in polled + left))
    base = config(**targets).target.path
    server.folders.update({base.rstrip("/") + path[3:]: entries for path, entries in server.folders.items()
                           if path.startswith("/in")})  # fmt: skip
    server.folders[base] = server.folders["/in"]
    assert sorted(walk(server, recursive=True, **targets)) == sorted(polled)


@pytest.mark.parametrize("target", ["/home/me/in/done", "../in/done", "/home/me/./in/done/"])
def test_a_target_is_compared_with_the_login_folder_resolved(target: str) -> None:
    server = Folders(in_=[a_file("a"), a_folder("done")])
    server.folders["in"] = server.folders.pop("in_")
    assert walk(server, url="ftp://me@h/~/in", recursive=True, after="move:" + target) == ["a"]


@pytest.mark.parametrize("target", ["done", "/in/done", "/IN/done", "arch/done"])
def test_a_target_is_compared_without_case_where_the_server_has_none(target: str) -> None:
    server = tree("/in/a", "/in/DONE/a", "/in/ARCH/Done/a", "/in/done2/a")
    server.caseless = True
    left = {"ARCH/Done/a"} if target.startswith("/") else set()
    kept = {"a", "done2/a"} | (left or ({"DONE/a"} if "arch" in target else set()))
    assert set(walk(server, recursive=True, after="move:" + target)) == kept


@pytest.mark.parametrize("target", ["done", "/in/done", "/IN/done"])
def test_a_folder_that_differs_from_a_target_in_case_is_polled_where_case_counts(target: str) -> None:
    assert walk(tree("/in/DONE/a"), recursive=True, after="move:" + target) == ["DONE/a"]
    server = tree("/in/DONE/a", "/in/done/b", "/IN/done/c")
    assert walk(server, recursive=True, after="move:" + target) == ["DONE/a"] + ["done/b"] * target.startswith("/IN")


@pytest.mark.parametrize("settings", [
    {"after": "move:/in"}, {"after": "move:/in/"}, {"after": "move:../in"}, {"after": "move:/x/../in"},
    {"after": "move:."}, {"after_error": "move:done/.."}, {"after": "move:..", "recursive": True},
    {"after": "move:../../in", "recursive": True}, {"after": "move:../in", "url": "ftp://me@h/~/in"},
])  # fmt: skip
def test_a_target_that_is_the_polled_folder_is_a_wrong_setting(settings: dict[str, Any]) -> None:
    with pytest.raises(ftpcoord.ConfigError, match="after"):
        config(**settings)


def test_a_target_that_turns_out_to_be_the_polled_folder_is_said_and_nothing_is_polled() -> None:
    server = Folders(**{"in": [a_file("a")], "/in": [a_file("a")], "/": [a_folder("in")]})
    for url, target in (("ftp://me@h/~/in", "/home/me/in"), ("ftp://me@h/in", "/IN")):
        server.caseless = True
        with pytest.raises(FileRefused, match="after"):
            walk(server, url=url, after="move:" + target)
    server.caseless = False
    assert walk(server, after="move:/IN") == ["a"]
    server.folders["/"].append(a_folder("IN"))
    assert walk(server, after="move:/IN") == ["a"]


@pytest.mark.parametrize(("pattern", "polled"), [
    ("*", ["a", "x/b"]), ("*,.*", [".c", "a", "x/b"]), (".ssh/*,*/.snap*/*", [".ssh/key", "x/.snapshot/b"]),
    ("*.part/*,*", ["a", "up.part/d", "x/b"]),
])
def test_hidden_and_temporary_folders_are_entered_only_where_a_pattern_names_them(
    pattern: str, polled: list[str]
) -> None:
    server = tree("/in/a", "/in/.c", "/in/.ssh/key", "/in/x/b", "/in/x/.snapshot/b", "/in/up.part/d", "/in/.Trash/a")
    selector = Selector(config(recursive=True, pattern=pattern), time.monotonic)
    look = selector.walk(server)  # type: ignore[arg-type]
    assert sorted(found.relative for found in look if selector.wants(found)) == polled
    assert "hidden" in look.skipped["/in/.Trash"]


def test_links_are_left_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    server = Folders(**{"/in": [a_file("a"), Entry("l", "link", 0, NOON)]})
    selector = Selector(config(), time.monotonic)
    for _ in range(3):
        look = selector.walk(server)  # type: ignore[arg-type]
        assert [found.relative for found in look] == ["a"] and "link" in look.skipped["/in/l"]
    assert len(caplog.records) == 1 and selector.refused == 0


@pytest.mark.parametrize("files", [["a", "b"], []])
def test_links_to_folders_above_that_are_listed_as_folders_are_not_descended(files: list[str]) -> None:
    class Linked(Folders):
        def list(self, folder: str) -> list[Entry]:
            self.listed.append(folder)
            up = folder.split("/")[-1] in ("up", "self")
            return [a_folder("x"), a_folder("up"), a_folder("self"), *(a_file(name) for name in files)] if (
                up or folder == "/in") else [a_file("c")]  # fmt: skip

    server = Linked()
    selector = Selector(config(recursive=True), time.monotonic)
    look = selector.walk(server)  # type: ignore[arg-type]
    assert {found.relative.rsplit("up/")[-1].rsplit("self/")[-1] for found in look} == {"x/c", *files}
    assert len(server.listed) < 20
    if files:
        assert sorted(found.relative for found in look) == ["a", "b", "x/c"]
        assert {"/in/up", "/in/self"} <= set(look.skipped)


def test_folders_of_the_same_names_with_other_files_are_all_polled() -> None:
    paths = ["in/a", "in/in/a", "in/in/in/b", "x/x/x/x/c"]
    server = tree(*("/in/" + path for path in paths))
    server.folders["/in/in/in"][0] = Entry("a", "file", 2, NOON)
    assert sorted(walk(server, recursive=True)) == sorted(paths)


@pytest.mark.parametrize(("limit", "what"), [
    ("MAX_ENTRIES", "10000 files"), ("MAX_FOLDERS", "10000 folders"), ("MAX_LISTING", "10000 bytes"),
])  # fmt: skip
def test_a_tree_without_end_is_an_error_and_not_a_full_memory(
    limit: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Endless(Folders):
        def list(self, folder: str) -> list[Entry]:
            return [*(a_folder(f"{len(folder)}{letter}") for letter in "ab"), a_file("f" * len(folder))]

    monkeypatch.setattr(ftpcoord, limit, 10_000)
    with pytest.raises(ftpcoord.ServerDown, match=what):
        walk(Endless(), recursive=True)


def test_an_endless_tree_ends() -> None:
    class Endless(Folders):
        def list(self, folder: str) -> list[Entry]:
            self.listed.append(folder)
            return [a_folder("x")]

    server = Endless()
    assert walk(server, recursive=True) == []
    assert 50 < len(server.listed) < 200


# -- filters ----------------------------------------------------------------------------------------------------------


def test_patterns_choose_and_exclude_wins() -> None:
    listing = [found(name) for name in ("a.csv", "b.xml", "B.CSV", "c.csv")]
    assert ready(listing, pattern="*.csv") == ["a.csv", "c.csv"]
    assert ready(listing, pattern="*.csv,*.xml", exclude="c*") == ["a.csv", "b.xml"]
    assert ready(listing, pattern="[ab].*") == ["a.csv", "b.xml"]


def test_a_pattern_with_a_slash_is_for_the_path_below_the_folder() -> None:
    listing = [found("x/a.csv"), found("y/a.csv"), found("a.csv")]
    assert ready(listing, pattern="x/*.csv") == ["x/a.csv"]
    assert ready(listing, exclude="x/*") == ["a.csv", "y/a.csv"]
    assert ready(listing, pattern="a.csv") == ["a.csv", "x/a.csv", "y/a.csv"]


TEMPORARY = ["a.tmp", "a.part", "A.PART", "a.csv.filepart", "a.writing", "a.crdownload", "a.partial", "a.csv~"]


def test_hidden_and_temporary_names_are_skipped() -> None:
    assert ready([found(name) for name in [*TEMPORARY, ".hidden", ".a.csv.swp", "a.csv"]]) == ["a.csv"]
    assert ready([found(".hidden.csv")], pattern="*.csv") == []


def test_hidden_and_temporary_names_are_taken_by_a_pattern_of_their_own() -> None:
    assert ready([found("a.tmp"), found("b.csv")], pattern="*.tmp") == ["a.tmp"]
    assert ready([found(".hidden"), found("b.csv")], pattern=".*,*.csv") == [".hidden", "b.csv"]
    assert ready([found("a.csv~")], pattern="*~") == ["a.csv~"]


def test_a_file_with_a_marker_waits_for_it_and_the_marker_is_no_file() -> None:
    listing = [found("a.csv"), found("b.csv"), found("b.csv.ok"), found("c.ok")]
    assert ready([*listing, found("b.csv.ok.ok")], ready_suffix=".ok") == ["b.csv"]
    assert ready(listing) == ["a.csv", "b.csv", "b.csv.ok", "c.ok"]
    assert ready([found("x/a"), found("a.ok"), found("y/a"), found("y/a.ok")], ready_suffix=".ok") == ["y/a"]


def test_a_file_in_work_is_not_chosen() -> None:
    selector = Selector(config(), time.monotonic)
    assert names(choose(selector, [found("a"), found("b")], busy=["/in/a"]).ready) == ["b"]


def test_files_older_than_max_age_are_left() -> None:
    now = time.time()
    listed = {age: time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now - age)) for age in (10, 5000)}
    listing = [found("new", mtime=listed[10]), found("old", mtime=listed[5000]), found("none", mtime="")]
    assert ready(listing, max_age=3600) == ["new", "none"]


def test_files_younger_than_min_age_are_left_by_the_members_own_clock() -> None:
    clock = Clock()
    selector = Selector(config(min_age=60), clock)
    assert choose(selector, [found()]) == Choice([], [], 0)
    clock.now += 59
    assert choose(selector, [found()]).ready == []
    clock.now += 1
    assert names(choose(selector, [found()]).ready) == ["a.csv"]


def test_a_file_that_changes_or_goes_away_is_young_again() -> None:
    clock = Clock()
    selector = Selector(config(min_age=60), clock)
    choose(selector, [found(), found("b")])
    clock.now += 60
    assert names(choose(selector, [found(size=11), found("b")]).ready) == ["b"]
    clock.now += 59
    assert names(choose(selector, [found(size=11)]).ready) == []
    clock.now += 1
    assert names(choose(selector, [found(size=11), found("b")]).ready) == ["a.csv"]


def test_the_order_is_that_of_sort_and_ties_are_by_path() -> None:
    listing = [
        found("c", 1, "2026-01-12T10:00"), found("a", 2, "2026-01-12T09:00"), found("b", 2, "2026-01-12T09:00"),
        found("d", 1, ""),
    ]  # fmt: skip
    assert ready(listing, sort="name") == ["a", "b", "c", "d"]
    assert ready(listing, sort="-name") == ["d", "c", "b", "a"]
    assert ready(listing, sort="mtime") == ["d", "a", "b", "c"]
    assert ready(listing, sort="-mtime") == ["c", "b", "a", "d"]
    assert ready(listing, sort="size") == ["d", "c", "a", "b"]
    assert ready(listing, sort="-size") == ["b", "a", "c", "d"]


# -- settling ---------------------------------------------------------------------------------------------------------


def test_a_new_file_has_to_settle_and_a_second_listing_decides_for_all() -> None:
    selector = Selector(config(settle=5), Clock())
    choice = choose(selector, [found("a"), found("b"), found("c")])
    assert choice.ready == []
    assert names(choice.unsettled) == ["a", "b", "c"]
    again = [found("a"), found("b", size=11), found("d")]
    assert names(selector.settled(choice.unsettled, again)) == ["a"]


def test_a_file_seen_unchanged_for_the_time_of_settle_needs_no_second_listing() -> None:
    clock = Clock()
    selector = Selector(config(settle=5), clock)
    choose(selector, [found()])
    clock.now += 5
    choice = choose(selector, [found()])
    assert (names(choice.ready), choice.unsettled) == (["a.csv"], [])


def test_a_file_that_grew_in_between_settles_anew() -> None:
    clock = Clock()
    selector = Selector(config(settle=5), clock)
    choice = choose(selector, [found()])
    clock.now += 5
    assert selector.settled(choice.unsettled, [found(size=11)]) == []
    assert names(choose(selector, [found(size=11)]).unsettled) == ["a.csv"]
    clock.now += 4
    assert names(choose(selector, [found(size=11, mtime="2026-01-12T12:01")]).unsettled) == ["a.csv"]


def test_a_version_that_the_ledger_knows_has_settled_before() -> None:
    selector = Selector(config(settle=5), Clock())
    assert names(choose(selector, [found()], row(state="failed")).ready) == ["a.csv"]
    assert names(choose(selector, [found(size=11)], row(state="failed")).unsettled) == ["a.csv"]


# -- versions ---------------------------------------------------------------------------------------------------------


def test_what_is_done_is_not_handled_again() -> None:
    assert ready([found()], row()) == []
    assert ready([found()], row(action="delete")) == [], "it is deleted, not handled"


def test_a_change_of_size_or_time_makes_a_new_version() -> None:
    for listed in (found(size=11), found(mtime="2026-01-12T12:01"), found(mtime="2025-01-12T12:00")):
        for state in ("done", "quarantined", "failed", "claimed"):
            assert ready([listed], row(state=state, due=time.monotonic() + 999)) == ["a.csv"], (listed, state)


def test_a_done_file_is_not_handled_again_when_list_changes_to_days_after_half_a_year() -> None:
    assert ready([found(mtime="2026-01-12")], row(mtime="2026-01-12T12:00")) == []
    assert ready([found(mtime="2026-01-13")], row(mtime="2026-01-12T12:00")) == ["a.csv"]


def test_a_file_recorded_by_list_is_the_same_by_mlsd() -> None:
    assert ready([found(mtime="2026-01-12T12:00:31")], row(mtime="2026-01-12T12:00")) == []
    assert ready([found(mtime="")], row()) == []


def test_quarantined_files_wait_for_the_operator_and_failed_ones_for_their_time(clock: Clock) -> None:
    selector = Selector(config(), clock)
    assert choose(selector, [found()], row(state="quarantined")) == Choice([], [], 0)
    failed = row(state="failed", due=clock.now + 10)
    assert choose(selector, [found()], failed) == Choice([], [], 1)
    clock.now += 10
    assert names(choose(selector, [found()], failed).ready) == ["a.csv"]
    assert names(choose(selector, [found()], row(state="failed", due=None)).ready) == ["a.csv"]


def test_a_claim_that_is_not_in_work_is_void_whatever_its_term() -> None:
    for term in (1, 2, 99):
        assert ready([found()], row(state="claimed", term=term)) == ["a.csv"]


def test_attempts_and_failures_belong_to_a_version() -> None:
    known = row(state="failed", attempts=3, failures=2)
    assert (Work(found(), known).attempts, Work(found(), known).failures) == (3, 2)
    assert (Work(found(size=11), known).attempts, Work(found(size=11), known).failures) == (0, 0)
    assert (Work(found(), None).attempts, Work(found(), None).failures) == (0, 0)


times = st.sampled_from(
    ["", "2026-01-12", "2026-01-12T10:15", "2026-01-12T10:15:30", "2026-01-12T10:15:30.123", "2025-07-01", "2026-01-13"]
)


@given(times, times)
def test_being_the_same_version_goes_both_ways(a: str, b: str) -> None:
    one, other = found(mtime=a).entry, found(mtime=b).entry
    assert same_version(one, other) == same_version(other, one)
    assert same_version(one, one)


@pytest.mark.parametrize(
    ("listed", "seconds"),
    [
        ("", None), ("1970-01-02", 86400.0), ("1970-01-01T00:01", 60.0), ("1970-01-01T00:00:07", 7.0),
        ("1970-01-01T00:00:07.500", 7.5), ("nonsense", None), ("2026-02-30", None),
    ],
)  # fmt: skip
def test_a_listed_time_is_utc_seconds(listed: str, seconds: Optional[float]) -> None:
    assert epoch_seconds(listed) == seconds


# -- the ledger -------------------------------------------------------------------------------------------------------


class Shaky(MemoryRows):
    """Rows in a database that is away for a while; `carried_out`: the lost answers were to writes that were made."""

    def __init__(self) -> None:
        super().__init__()
        self.away = 0
        self.carried_out = False
        self.before_failing: Callable[[], None] = lambda: None

    def write(self, fence: Fence, changes: Sequence[Change]) -> list[bool]:
        if self.away:
            self.away -= 1
            if self.carried_out:
                super().write(fence, changes)
            self.before_failing()
            raise DatabaseDown("away")
        return super().write(fence, changes)

    def written(self, fence: Fence, changes: Sequence[Change]) -> list[bool]:
        standing = {one.path: one for one in self.rows("g")}
        return [
            (standing.get(ftpcoord._path(c)) is None) if c.new is None else
            (lambda s, n: s is not None and s[1:7] == n._replace(term=fence.term)[1:7])(
                standing.get(c.new.path), c.new)
            for c in changes
        ]  # fmt: skip


def ledger(rows: MemoryRows, clock: Callable[[], float], term: int = 1, lasting: float = 1e9) -> Ledger:
    made = Ledger(rows, "g", "a", Lease(term, clock() + lasting, clock), clock)
    made.load()
    return made


def work(name: str = "a.csv", old: Optional[Row] = None, **more: Any) -> Work:
    return Work(found(name, **more), old)


def test_a_claim_is_a_row_of_this_term_and_counts_the_attempt(clock: Clock) -> None:
    mine = ledger(MemoryRows(), clock, term=7)
    (claimed,) = mine.claim([work()])
    assert claimed == Row("/in/a.csv", 10, NOON, "claimed", 7, 1, 0)
    assert mine.get("/in/a.csv") == claimed
    mine.change(claimed, claimed._replace(state="failed", failures=1), 0.0)
    (again,) = mine.claim([work(old=mine.get("/in/a.csv"))])
    assert again is not None
    assert (again.attempts, again.failures) == (2, 1)


def test_a_claim_of_a_new_version_begins_to_count_anew(clock: Clock) -> None:
    mine = ledger(MemoryRows(), clock)
    (claimed,) = mine.claim([work()])
    assert claimed is not None
    mine.change(claimed, claimed._replace(state="quarantined", failures=5))
    (again,) = mine.claim([work(old=mine.get("/in/a.csv"), size=11)])
    assert again is not None
    assert (again.size, again.attempts, again.failures) == (11, 1, 0)


def test_a_claim_of_another_term_is_void_and_is_not_counted_as_a_failure(clock: Clock) -> None:
    rows = MemoryRows()
    ledger(rows, clock, term=5).claim([work()])
    mine = ledger(rows, clock, term=2)
    (claimed,) = mine.claim([work(old=mine.get("/in/a.csv"))])
    assert claimed is not None
    assert (claimed.term, claimed.attempts, claimed.failures) == (2, 2, 0)


def test_a_file_that_somebody_else_changed_is_not_claimed(clock: Clock) -> None:
    rows = MemoryRows()
    mine = ledger(rows, clock)
    rows.write(Fence("g", "operator", 0), [Change(None, row())])
    assert mine.claim([work(), work("b")])[0] is None
    assert mine.get("/in/a.csv") is None
    assert mine.get("/in/b") is not None


def test_nothing_is_written_or_read_after_the_lease(clock: Clock) -> None:
    rows = MemoryRows()
    mine = ledger(rows, clock, lasting=10)
    (claimed,) = mine.claim([work()])
    clock.now += 10
    assert claimed is not None
    with pytest.raises(LeaseLost):
        mine.change(claimed, claimed._replace(state="done"))
    with pytest.raises(LeaseLost):
        mine.claim([work("b")])
    with pytest.raises(LeaseLost):
        mine.refresh()
    assert [one.state for one in rows.rows("g")] == ["claimed"]


def test_a_change_of_a_row_that_is_no_longer_ones_own_means_that_the_lease_is_lost(clock: Clock) -> None:
    rows = MemoryRows()
    mine = ledger(rows, clock, term=1)
    (claimed,) = mine.claim([work()])
    other = ledger(rows, clock, term=2)
    other.claim([work(old=other.get("/in/a.csv"))])
    assert claimed is not None
    with pytest.raises(LeaseLost):
        mine.change(claimed, claimed._replace(state="done"))


def test_a_write_is_tried_until_the_database_is_back(clock: Clock) -> None:
    rows = Shaky()
    mine = ledger(rows, clock)
    rows.away = 2
    (claimed,) = mine.claim([work()])
    assert claimed is not None
    assert rows.away == 0


def test_a_write_whose_answer_was_lost_counts_as_made(clock: Clock) -> None:
    rows = Shaky()
    mine = ledger(rows, clock)
    rows.away, rows.carried_out = 1, True
    (claimed,) = mine.claim([work()])
    assert claimed is not None
    rows.away = 1
    mine.change(claimed, claimed._replace(state="done"))
    rows.away = 1
    mine.change(claimed._replace(state="done"), None)
    assert list(rows.rows("g")) == []


def test_a_write_is_given_up_when_the_lease_ends_meanwhile(clock: Clock) -> None:
    rows = Shaky()
    mine = ledger(rows, clock, lasting=10)
    rows.away = 10**9
    rows.before_failing = lambda: setattr(clock, "now", clock.now + 4)
    with pytest.raises(LeaseLost):
        mine.claim([work()])
    assert rows.away >= 10**9 - 3


def test_what_an_operator_put_back_is_seen_after_a_refresh(clock: Clock) -> None:
    rows = MemoryRows()
    mine = ledger(rows, clock)
    (claimed,) = mine.claim([work()])
    assert claimed is not None
    bad = claimed._replace(state="quarantined", failures=5)
    mine.change(claimed, bad)
    operator = Fence("g", "operator", 1)
    rows.write(operator, [Change(bad, bad._replace(state="failed", failures=0), 0.0)])
    selector = Selector(config(), clock)
    assert names(selector.choose([found()], mine.get, set()).ready) == []
    mine.refresh()
    assert names(selector.choose([found()], mine.get, set()).ready) == ["a.csv"]


def test_done_files_that_were_put_back_or_removed_or_adopted_are_seen_after_a_refresh(clock: Clock) -> None:
    rows = MemoryRows()
    operator = Fence("g", "operator", 1)
    rows.write(operator, [Change(None, row(name)) for name in ("a", "b", "c")])
    mine = ledger(rows, clock)
    rows.write(operator, [Change(row("a"), row("a", state="failed"), 0.0), Change(None, row("d"))])
    mine.refresh()
    assert {one.path[4:]: one.state for one in mine.all()} == {"a": "failed", "b": "done", "c": "done", "d": "done"}
    rows.write(operator, [Change(row("b"), None)])
    mine.refresh()
    assert {one.path[4:]: one.state for one in mine.all()} == {"a": "failed", "c": "done", "d": "done"}


def test_open_rows_that_were_removed_are_forgotten_by_a_refresh(clock: Clock) -> None:
    rows = MemoryRows()
    mine = ledger(rows, clock)
    (claimed,) = mine.claim([work()])
    rows.write(Fence("g", "operator", 1), [Change(claimed, None)])
    mine.refresh()
    assert mine.all() == []
    (claimed,) = mine.claim([work()])
    rows.write(Fence("g", "operator", 1), [Change(claimed, None), Change(None, row("adopted"))])
    mine.refresh()
    assert [one.path for one in mine.all()] == [row("adopted").path], "the number of rows alone does not tell"


def test_a_back_off_passes_however_often_the_rows_are_read(clock: Clock) -> None:
    mine = ledger(MemoryRows(), clock)
    (claimed,) = mine.claim([work()])
    assert claimed is not None
    mine.change(claimed, claimed._replace(state="failed"), 10.0)
    selector = Selector(config(), clock)
    for _ in range(4):
        assert selector.choose([found()], mine.get, set()).waiting == 1
        clock.now += 2.5
        mine.refresh()
    assert names(selector.choose([found()], mine.get, set()).ready) == ["a.csv"]


def test_due_actions_are_those_whose_time_has_come_and_that_are_not_in_work(clock: Clock) -> None:
    rows = MemoryRows()
    old = Fence("g", "a", 1)
    rows.write(old, [
        Change(None, row("a", action="delete")), Change(None, row("b", action="delete"), 10.0),
        Change(None, row("c", state="quarantined", action="move:bad")), Change(None, row("d")),
        Change(None, row("e", action="delete")),
    ])  # fmt: skip
    mine = ledger(rows, clock, term=2)
    assert sorted(one.path for one in mine.due_actions({"/in/e"})) == ["/in/a", "/in/c"]
    clock.now += 10
    assert sorted(one.path for one in mine.due_actions(set())) == ["/in/a", "/in/b", "/in/c", "/in/e"]


def test_a_done_row_goes_the_time_of_retention_after_its_file_was_last_listed(clock: Clock) -> None:
    mine = ledger(MemoryRows(), clock)
    (claimed,) = mine.claim([work()])
    assert claimed is not None
    mine.change(claimed, claimed._replace(state="done"))
    for _ in range(3):
        mine.forget_unlisted({"/in/a.csv"}, 100.0)
        clock.now += 1000
    mine.forget_unlisted(set(), 100.0)
    clock.now += 99
    mine.forget_unlisted(set(), 100.0)
    assert mine.get("/in/a.csv") is not None
    clock.now += 1
    mine.forget_unlisted(set(), 100.0)
    assert mine.get("/in/a.csv") is None


def test_a_file_that_is_listed_again_in_between_is_kept_for_the_whole_time_again(clock: Clock) -> None:
    mine = ledger(MemoryRows(), clock)
    (claimed,) = mine.claim([work()])
    assert claimed is not None
    mine.change(claimed, claimed._replace(state="done"))
    mine.forget_unlisted(set(), 100.0)
    clock.now += 90
    mine.forget_unlisted({"/in/a.csv"}, 100.0)
    clock.now += 90
    mine.forget_unlisted(set(), 100.0)
    clock.now += 90
    mine.forget_unlisted(set(), 100.0)
    assert mine.get("/in/a.csv") is not None


def test_rows_that_are_not_listed_go_when_their_time_is_over_but_none_with_an_action_due(clock: Clock) -> None:
    rows = MemoryRows()
    kept = [
        row("a", state="quarantined"), row("b", state="failed"), row("c", state="claimed"), row("d", action="delete")
    ]  # fmt: skip
    rows.write(Fence("g", "a", 1), [Change(None, one) for one in kept])
    mine = ledger(rows, clock)
    mine.forget_unlisted(set(), 15.0)
    clock.now += 10
    mine.forget_unlisted(set(), 15.0)
    assert len(mine.all()) == 4
    clock.now += 10
    mine.forget_unlisted(set(), 15.0)
    assert [one.path for one in mine.all()] == ["/in/d"]


def test_a_failed_row_that_is_listed_again_is_due_at_once_with_its_attempts_and_its_words(clock: Clock) -> None:
    """Also by a member that comes later."""
    rows = MemoryRows()
    failed = row("a", state="failed", attempts=4, failures=3, error="no good")
    rows.write(Fence("g", "a", 1), [Change(None, failed), Change(failed, failed, 3600.0)])
    mine = ledger(rows, clock)
    assert choose(Selector(config(), clock), [found("a")], *mine.all()).waiting == 1
    mine.forget_unlisted(set(), 30 * 86400.0)
    for one in (mine, ledger(rows, clock)):
        chosen = choose(Selector(config(), clock), [found("a")], *one.all())
        assert chosen.waiting == 0 and [work.attempts for work in chosen.ready] == [4]
    mine.forget_unlisted({"/in/a"}, 30 * 86400.0)
    assert [(one.state, one.attempts, one.failures, one.error, one.due) for one in mine.all()] == [
        ("failed", 4, 3, "no good", None)
    ]


def test_a_row_that_the_server_called_gone_goes_with_the_first_listing_that_lacks_it(clock: Clock) -> None:
    rows = MemoryRows()
    gone = row("a", state="failed").marked(gone=True)
    rows.write(Fence("g", "a", 1), [Change(None, gone), Change(None, row("b", state="failed"))])
    mine = ledger(rows, clock)
    mine.forget_unlisted(set(), 100.0, lacks=lambda path: False)
    assert len(mine.all()) == 2, "nothing is proven by a listing that is not whole"
    mine.forget_unlisted(set(), 100.0)
    assert [one.path for one in mine.all()] == ["/in/b"]


def test_marks_before_an_error_are_told_from_its_words() -> None:
    plain = row("a", state="failed", error="exit 3")
    assert plain.marks == ftpcoord.Marks()
    every = plain.marked(unlisted=True, gone=True, delivered=True, deaths=12)
    assert every.marks == ftpcoord.Marks(True, True, True, 12) and every.error.endswith("; exit 3")
    assert every.marked(unlisted=False, gone=False, delivered=False, deaths=0) == plain
    for words in ("delivered; ", "gone; x", "not listed;", "its process ended 9 times; "):
        kept = ftpcoord.kept_error(plain, ftpcoord.Error(words))
        assert plain._replace(error=kept).marks == ftpcoord.Marks(), "a handler's words are no marks"


def test_many_rows_are_forgotten_in_groups(clock: Clock) -> None:
    rows = MemoryRows()
    rows.write(Fence("g", "a", 1), [Change(None, row(str(number))) for number in range(1000)])
    sizes: list[int] = []
    write = rows.write

    def counted(fence: Fence, changes: Sequence[Change]) -> list[bool]:
        sizes.append(len(changes))
        return write(fence, changes)

    rows.write = counted  # type: ignore[method-assign]
    mine = ledger(rows, clock)
    mine.forget_unlisted(set(), 1.0)
    clock.now += 1
    mine.forget_unlisted(set(), 1.0)
    assert mine.all() == []
    assert max(sizes) <= ftpcoord.BATCH_FILES


# -- paths as text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/in/a b.csv", "/in/a b.csv"), ("/in/ä", "/in/ä"), ("/in/100%", "/in/100%"), ("/in/\udcff", "/in/%FF"),
        ("/in/100%\udcff", "/in/100%25%FF"), ("a\nb", "a%0Ab"), ("a\tb", "a%09b"), ("\x1b[31m", "%1B[31m"),
        ("\u202eexe", "%E2%80%AEexe"), ("\x00", "%00"), ("", ""),
    ],
)  # fmt: skip
def test_a_path_is_shown_in_one_line_of_printable_text(path: str, shown: str) -> None:
    assert printable(path) == shown


@given(st.binary(max_size=40))
def test_the_printable_form_gives_the_bytes_back(raw: bytes) -> None:
    path = raw.decode("utf-8", "surrogateescape")
    shown = printable(path)
    assert shown.isprintable()
    shown.encode("utf-8")
    if shown != path:
        assert urllib.parse.unquote_to_bytes(shown) == raw
    assert ftpcoord._true_path(shown, ftpcoord.sha256_text(path)) == path


@given(st.text(max_size=40), st.text(max_size=40))
def test_different_paths_have_different_ids(a: str, b: str) -> None:
    assert (ftpcoord.sha256_text(a) == ftpcoord.sha256_text(b)) == (a == b)


# -- local files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "third"),
    [("report.csv", "report.3.csv"), ("a.tar.gz", "a.tar.3.gz"), ("README", "README.3"), (".profile", ".profile.3")],
)
def test_a_number_goes_before_the_suffix(name: str, third: str) -> None:
    assert numbered(name, 3) == third


def part(folder: Path, content: bytes = b"new") -> Path:
    path = folder / ".part"
    path.write_bytes(content)
    return path


def test_a_finished_file_gets_its_name(tmp_path: Path) -> None:
    assert publish(part(tmp_path), tmp_path / "a.csv") == tmp_path / "a.csv"
    assert os.listdir(tmp_path) == ["a.csv"]
    assert (tmp_path / "a.csv").read_bytes() == b"new"


def test_the_same_content_under_the_name_counts_as_this_very_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"new")
    inode = (tmp_path / "a.csv").stat().st_ino
    assert publish(part(tmp_path), tmp_path / "a.csv") == tmp_path / "a.csv"
    assert os.listdir(tmp_path) == ["a.csv"]
    assert (tmp_path / "a.csv").stat().st_ino == inode


def test_other_content_is_not_replaced_but_gets_company(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"old")
    assert publish(part(tmp_path), tmp_path / "a.csv") == tmp_path / "a.1.csv"
    assert publish(part(tmp_path, b"third"), tmp_path / "a.csv") == tmp_path / "a.2.csv"
    assert publish(part(tmp_path), tmp_path / "a.csv") == tmp_path / "a.1.csv", "that is this very file"
    assert sorted(os.listdir(tmp_path)) == ["a.1.csv", "a.2.csv", "a.csv"]
    assert (tmp_path / "a.csv").read_bytes() == b"old"


@pytest.mark.parametrize("kind", ["link", "broken link", "folder"])
def test_what_is_no_file_is_neither_followed_nor_replaced(tmp_path: Path, kind: str) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"new")
    target = tmp_path / "folder" / "a.csv"
    target.parent.mkdir()
    if kind == "folder":
        target.mkdir()
    else:
        target.symlink_to(outside if kind == "link" else tmp_path / "nowhere")
    assert publish(part(target.parent), target) == target.with_name("a.1.csv")
    assert target.is_symlink() or target.is_dir()
    assert outside.read_bytes() == b"new"
    assert not (tmp_path / "nowhere").exists()


def test_without_hard_links_nothing_is_replaced_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a.csv").write_bytes(b"old")
    assert publish(part(tmp_path), tmp_path / "a.csv") == tmp_path / "a.1.csv"
    assert publish(part(tmp_path), tmp_path / "b.csv") == tmp_path / "b.csv"
    assert (tmp_path / "a.csv").read_bytes() == b"old"


def test_a_file_is_made_only_where_nothing_is(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("there", "link"):
        with pytest.raises(FileExistsError):
            create_file(tmp_path / name)
    assert (tmp_path / "there").read_bytes() == b"old"
    assert not (tmp_path / "nowhere").exists()
    before = os.umask(0o027)
    try:
        with create_file(tmp_path / "new") as stream:
            stream.write(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_copies_in_the_making_carry_the_term_and_those_of_other_terms_are_removed(tmp_path: Path) -> None:
    old, mine = (Workplace(config(download_dir=str(tmp_path)), term) for term in (3, 4))
    other = Workplace(config(download_dir=str(tmp_path), coordination_group="another"), 3)
    left = [place.temporary(found("x/a.csv")) for place in (old, mine, other)]
    for path in (*left, tmp_path / "x" / "a.part", tmp_path / "x" / "a.csv"):
        path.write_bytes(b"")
    assert len({path.name for path in left}) == 3
    mine.clean()
    assert sorted(path for path in (tmp_path / "x").iterdir()) == sorted(
        [left[1], left[2], tmp_path / "x" / "a.part", tmp_path / "x" / "a.csv"]
    )


def test_cleaning_follows_no_links(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (inside / "link").symlink_to(outside)
    old = Workplace(config(download_dir=str(outside)), 3).temporary(found())
    old.write_bytes(b"")
    Workplace(config(download_dir=str(inside)), 4).clean()
    assert old.exists()


def test_a_subfolder_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    target = tmp_path / "in"
    target.mkdir()
    (target / "x").symlink_to(outside)
    with pytest.raises(HandlerFailed, match="link"):
        Workplace(config(download_dir=str(target)), 1).temporary(found("x/a.csv"))
    assert os.listdir(outside) == []


def test_a_download_folder_that_is_missing_is_this_hosts_trouble(tmp_path: Path) -> None:
    with pytest.raises(LocalTrouble, match="create it"):
        Workplace(config(download_dir=str(tmp_path / "nowhere")), 1).clean()


def test_private_copies_are_seen_by_no_other_user_and_go_away() -> None:
    place = Workplace(config(), 1)
    path = place.temporary(found("x/a.csv"))
    assert path.name == "a.csv"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.write_bytes(b"x")
    assert place.finish(path, found("x/a.csv")) == path
    place.discard(path)
    assert not path.parent.exists()
    top = path.parent.parent
    assert top.exists()
    place.close()
    assert not top.exists()


# -- what a handler gets ----------------------------------------------------------------------------------------------


def a_local(folder: Path, content: bytes = b"", name: str = "a.csv", **more: Any) -> File:
    local = folder / name
    local.write_bytes(content)
    values = {"path": f"/in/{name}", "size": len(content), "mtime": 1.6, "attempt": 2, **more}
    return File(lease=Lease(7, time.monotonic() + 1e6, time.monotonic), local=local, **values)


def test_a_file_can_be_read_in_many_ways(tmp_path: Path) -> None:
    file = a_local(tmp_path, b"\xef\xbb\xbfid,name\r\n1,\"a\r\nb\"\r\n2,c\r\n")
    assert (file.name, file.path, file.size, file.mtime, file.attempt) == ("a.csv", "/in/a.csv", 27, 1.6, 2)
    assert list(file.csv()) == [{"id": "1", "name": "a\r\nb"}, {"id": "2", "name": "c"}]
    with file.open() as stream:
        assert stream.read() == file.read()
    assert file.text("utf-8-sig").startswith("id,name")
    assert a_local(tmp_path, b'{"a": [1]}').json() == {"a": [1]}
    assert list(a_local(tmp_path, b"a;b\n1;2\n").csv(delimiter=";")) == [{"a": "1", "b": "2"}]
    assert a_local(tmp_path, b"<a><b>x</b></a>").xml().findtext("b") == "x"
    assert file.lease.valid()


BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bb">]><a>&b;</a>'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-16-be"])
def test_an_xml_file_with_a_dtd_is_refused_in_every_encoding(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(HandlerFailed, match="DTD"):
        a_local(tmp_path, BOMB.encode(encoding)).xml()


def test_a_file_is_saved_under_a_free_name_and_the_same_file_once(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    first, other = a_local(tmp_path, b"one"), a_local(tmp_path, b"two", "b")
    assert first.save(folder) == folder / "a.csv"
    assert first.save(str(folder)) == folder / "a.csv"
    other.name = "a.csv"
    assert other.save(folder) == folder / "a.1.csv"
    assert sorted(os.listdir(folder)) == ["a.1.csv", "a.csv"]


# -- commands ---------------------------------------------------------------------------------------------------------

PYTHON = sys.executable


@pytest.fixture
def file(tmp_path: Path) -> File:
    return a_local(tmp_path, b"content")


def command(exec_: str, **more: Any) -> Command:
    return Command(config(exec=exec_, coordination_group="g", **more))


def script(folder: Path, text: str) -> str:
    """A command line that runs a Python script."""
    path = folder / "script.py"
    path.write_text(text)
    return f"{PYTHON} {path}"


def test_a_command_gets_its_names_by_environment_and_none_of_the_settings(
    tmp_path: Path, file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FTPCOORD_PASSWORD", "FTPCOORD_DATABASE", "FTPCOORD_EXEC", "NOTIFY_SOCKET"):
        monkeypatch.setenv(name, "Tr0ub4dor")
    monkeypatch.setenv("KEPT", "yes")
    out = tmp_path / "out"
    command(script(tmp_path, f"import os; open({str(out)!r}, 'w').write(repr(dict(os.environ)))")).run(file)
    environment = eval(out.read_text())
    assert {name: value for name, value in environment.items() if name.startswith("FTPCOORD_")} == {
        "FTPCOORD_FILE": str(file.local), "FTPCOORD_PATH": "/in/a.csv", "FTPCOORD_NAME": "a.csv", "FTPCOORD_SIZE": "7",
        "FTPCOORD_MTIME": "2", "FTPCOORD_ATTEMPT": "2", "FTPCOORD_TERM": "7", "FTPCOORD_GROUP": "g",
        "FTPCOORD_MEMBER": "a",
    }  # fmt: skip
    assert environment["KEPT"] == "yes"
    assert "Tr0ub4dor" not in out.read_text()


def test_a_command_gets_no_time_where_the_listing_tells_none(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = f"import os; open({str(out)!r}, 'w').write('<' + os.environ['FTPCOORD_MTIME'] + '>')"
    command(script(tmp_path, code)).run(a_local(tmp_path, mtime=None))
    assert out.read_text() == "<>"


@pytest.mark.parametrize("name", ["a b.csv", "$(touch x)", "; true", "{path}", "-rf", "\udcff", "it's", '"', "*"])
def test_a_name_is_one_argument_whatever_it_holds(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    code = f"import sys; open({str(out)!r}, 'w').write(ascii(sys.argv[1:]))"
    command(script(tmp_path, code) + " '{name} x' {path} '{file}' {other}").run(a_local(tmp_path, name=name))
    assert eval(out.read_text()) == [f"{name} x", f"/in/{name}", str(tmp_path / name), "{other}"]


def test_a_command_has_nothing_on_its_standard_input(tmp_path: Path, file: File) -> None:
    (tmp_path / "typed").write_text("yes\n")
    before = os.dup(0)
    with open(tmp_path / "typed") as typed:
        os.dup2(typed.fileno(), 0)
    try:
        command(script(tmp_path, "import sys; sys.exit(len(sys.stdin.read()))")).run(file)
    finally:
        os.dup2(before, 0)
        os.close(before)


def test_a_failing_command_tells_its_code_and_its_last_words(tmp_path: Path, file: File) -> None:
    code = "import os, sys; os.write(2, b'x' * 10000 + b'\\nlast words \\xff\\n'); sys.exit(3)"
    with pytest.raises(HandlerFailed, match=r"exited with 3: x+\nlast words \ufffd$") as caught:
        command(script(tmp_path, code)).run(file)
    assert len(str(caught.value)) <= ftpcoord.STDERR_BYTES + 100
    with pytest.raises(HandlerFailed, match=r"exited with 3$"):
        command(script(tmp_path, code), error_output="no").run(file)


def test_a_command_ended_by_a_signal_tells_which(tmp_path: Path, file: File) -> None:
    with pytest.raises(HandlerFailed, match="ended by signal 15"):
        command(script(tmp_path, "import os; os.kill(os.getpid(), 15)")).run(file)


def test_a_command_that_is_not_there_is_this_hosts_trouble(tmp_path: Path, file: File) -> None:
    with pytest.raises(LocalTrouble, match="nowhere is not a command here"):
        command("nowhere {file}").run(file)
    (tmp_path / "odd").write_text("#!/nowhere\n")
    (tmp_path / "odd").chmod(0o755)
    try:
        command(str(tmp_path / "odd")).run(file)
    except (LocalTrouble, HandlerFailed):
        return
    pytest.fail("it cannot have succeeded")


def running(pid_file: Path) -> Optional[int]:
    """The process whose id the file holds, if it lives."""
    try:
        number = int(pid_file.read_text())
        os.kill(number, 0)
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError):
        return None
    return None if state == "Z" else number


def test_a_command_that_takes_longer_than_exec_timeout_is_ended_with_its_children(tmp_path: Path, file: File) -> None:
    pid = tmp_path / "pid"
    code = f"""
import subprocess
child = subprocess.Popen(["sleep", "60"])
open({str(pid)!r}, "w").write(str(child.pid))
child.wait()
"""
    started = time.monotonic()
    with pytest.raises(HandlerFailed, match=r"longer than exec_timeout, 0\.5 s"):
        command(script(tmp_path, code), exec_timeout=0.5).run(file)
    assert time.monotonic() - started < 0.5 + ftpcoord.KILL_AFTER
    wait_for(lambda: running(pid) is None, 5, "the child to end")


@pytest.fixture
def stubborn(tmp_path: Path, file: File) -> Iterator[tuple[Command, list[Exception], Path]]:
    """A command that ignores SIGTERM, running in a thread."""
    pid = tmp_path / "pid"
    code = f"""
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open({str(pid) + ".new"!r}, "w").write(str(os.getpid()))
os.rename({str(pid) + ".new"!r}, {str(pid)!r})
time.sleep(60)
"""
    made = command(script(tmp_path, code))
    raised: list[Exception] = []

    def run() -> None:
        try:
            made.run(file)
        except Exception as exc:
            raised.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    wait_for(lambda: running(pid), 10, "the command to run")
    yield made, raised, pid
    number = running(pid)
    if number is not None:
        os.kill(number, signal.SIGKILL)
    thread.join(10)
    assert not thread.is_alive()


def test_a_cut_command_gets_sigterm_and_then_sigkill(stubborn: tuple[Command, list[Exception], Path]) -> None:
    made, raised, pid = stubborn
    made.cut(0.5)
    time.sleep(0.2)
    assert running(pid), "it ignores SIGTERM"
    wait_for(lambda: raised, 10, "the command to be killed")
    assert isinstance(raised[0], LeaseLost)
    assert running(pid) is None


def test_no_command_starts_after_the_cut(tmp_path: Path, file: File) -> None:
    made = command(script(tmp_path, f"open({str(tmp_path / 'out')!r}, 'w')"))
    made.cut(0.1)
    with pytest.raises(LeaseLost):
        made.run(file)
    assert not (tmp_path / "out").exists()


def test_a_handler_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_handlers.py").write_text("class A:\n    @staticmethod\n    def f(file): return 7\nx = 1\n")
    (tmp_path / "broken_handlers.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    handler: Any = ftpcoord.load_handler("my_handlers:A.f")
    assert handler(None) == 7
    for name, said in (
        ("my_handlers:g", "cannot be imported"), ("my_handlers:x", "is not a function"),
        ("no_such_module:f", "cannot be imported"), ("broken_handlers:f", "ZeroDivisionError"),
    ):  # fmt: skip
        with pytest.raises(ftpcoord.ConfigError, match=f"^handler: .*{said}"):
            ftpcoord.load_handler(name)
