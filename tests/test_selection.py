"""Selection: what a poll takes, what it leaves and why, over listings in memory."""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, Optional

import pytest
from conftest import Logged
from hypothesis import given
from hypothesis import strategies as st
from memory import NOON, Clock, choose, config, found, names, row

import ftpcoord
from ftpcoord import (
    Choice,
    Entry,
    FileGone,
    FileRefused,
    Found,
    Row,
    Selector,
    Work,
    epoch_seconds,
    is_plain_name,
    same_version,
)

NONE: frozenset[str] = frozenset()


def ready(listing: Sequence[Found], *rows: Row, **settings: Any) -> list[str]:
    return names(choose(Selector(config(**settings), time.monotonic), listing, *rows).ready)


# -- the verdict ------------------------------------------------------------------------------------------------------

VERDICTS: list[tuple[dict[str, Any], Optional[Row], str, str]] = [
    ({}, None, "take", ""),
    ({}, row(), "final", "done before"),
    ({"pattern": "*.xml"}, None, "final", "its name is not asked for (pattern, exclude, hidden or temporary)"),
    ({"ready_suffix": ".ok"}, None, "hold", "its marker .ok is not there"),
    ({"max_age": 60}, None, "skip", "older than max_age"),
    ({"max_size": 9}, None, "warn", "larger than max_size: 10 bytes"),
    ({"max_size": 10}, None, "take", ""),
    ({"min_size": 11}, None, "skip", "smaller than min_size: 10 bytes"),
    ({"min_size": 10, "max_size": 10}, None, "take", ""),
    ({"min_size": 11}, row(), "final", "done before"),
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

    def list(self, folder: str, last: object = None) -> list[Entry]:
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
    return [each.relative for each in Selector(config(**settings), time.monotonic).tree.walk(server)]  # type: ignore[arg-type]


def test_a_walk_refuses_odd_names_and_counts_them(logged: Logged) -> None:
    server = Folders(**{"/in": [a_file("../x"), a_file("ok"), a_file("a\nb"), a_folder(".."), a_file("../x")]})
    selector = Selector(config(recursive=True), time.monotonic)
    assert [each.path for each in selector.tree.walk(server)] == ["/in/ok"]  # type: ignore[arg-type]
    assert selector.tree.refused == 4
    assert server.listed == ["/in"]
    assert [record.getMessage() for record in logged()] == ["file_refused"] * 3, "each name is told once"


def test_a_walk_without_recursive_stays_in_the_folder_and_takes_files_alone() -> None:
    server = Folders(**{"/in": [a_folder("sub"), a_file("a"), Entry("l", "link", 1, ""), Entry("s", "other", 1, "")]})
    assert walk(server) == ["a"]
    assert server.listed == ["/in"]


def test_a_recursive_walk_keeps_the_paths_below_the_polled_folder() -> None:
    server = Folders(
        **{
            "/in": [a_folder("x"), a_file("a"), a_folder("gone"), a_folder("closed")],
            "/in/x": [a_file("b"), a_folder("y")],
            "/in/x/y": [a_file("c")],
        }
    )
    server.errors = {"/in/gone": FileGone("gone"), "/in/closed": FileRefused("closed")}
    assert walk(server, recursive=True) == ["x/b", "x/y/c", "a"]


@pytest.mark.parametrize("base", ["/in", "/", "in", "."])
def test_a_walk_knows_what_it_could_not_see(base: str) -> None:
    prefix = {".": "", "/": "/"}.get(base, base + "/")
    server = Folders(
        **{
            base: [a_file("a"), a_folder("x"), a_folder("closed")],
            prefix + "x": [a_file("b")],
            prefix + "odd": [],
        }
    )
    server.errors = {prefix + "closed": FileRefused("closed")}
    server.lines = {base: ["???? c.csv", "???? link -> d"], prefix + "x": ["???? odd/"]}
    url = f"ftp://me@h/{'~/' * (base[0] != '/')}{base.lstrip('/').strip('.')}"
    look = Selector(config(url=url, recursive=True), time.monotonic).tree.walk(server)  # type: ignore[arg-type]
    absent = ("b", "x/a", "x/y/z", "gone/c.csv", "c.csvx", "x/c.csv", "lin", "x/od/a")
    doubtful = ("c.csv", "csv", "link", "d", "closed/a", "closed/b/c", "c.csv/a", "x/odd", "x/odd/a")
    assert [name for name in absent if not look.lacks(prefix + name)] == []
    assert [name for name in doubtful if look.lacks(prefix + name)] == []
    assert look.lacks("/elsewhere/c.csv") and look.lacks("elsewhere/c.csv"), "nobody looks there any more"


def test_a_folder_of_whose_listing_too_much_is_not_understood_is_not_seen_whole() -> None:
    server = Folders(**{"/in": [a_file("a")]})
    server.lines = {"/in": ["????"] * 101}
    assert not Selector(config(), time.monotonic).tree.walk(server).lacks("/in/b")  # type: ignore[arg-type]


def test_a_walk_below_the_login_folder_gives_relative_paths() -> None:
    server = Folders(**{".": [a_file("a"), a_folder("x")], "x": [a_file("b")]})
    selector = Selector(config(url="ftp://me@h/~/", recursive=True), time.monotonic)
    assert [each.path for each in selector.tree.walk(server)] == ["a", "x/b"]  # type: ignore[arg-type]


def test_folders_that_files_are_moved_to_and_excluded_ones_are_not_listed() -> None:
    server = Folders(
        **{
            "/in": [a_folder("done"), a_folder("bad"), a_folder("skip"), a_folder("x"), a_folder("abs")],
            "/in/x": [a_folder("done"), a_folder("bad"), a_file("a")],
        }
    )
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


@pytest.mark.parametrize(
    ("targets", "polled", "left"),
    [
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
        (
            {"after": "move:{date:%Y%m%d}"},
            ["a", "x/a", "2026/a", "20261301/a", "20260100/a", "202601011/a"],
            ["20260115/a", "x/19991231/a", "20000229/x/20000229/a"],
        ),
        (
            {"after": "move:old/{date:%Y}/{date:%m}", "after_error": "move:bad"},
            ["old/a", "old/2026/a", "old/2026/13/a", "old/x/05/a", "2026/05/a"],
            ["old/2026/05/a", "x/old/1999/12/a", "x/bad/a"],
        ),
        ({"after": "move:{date:%Y}/{date:%Y-%m}"}, ["2026/2025-01/a"], ["2026/2026-01/a"]),
        ({"after": "move:../d{date:%y.%j}"}, ["x/a", "d26.367/a", "d26x001/a"], ["d26.001/a", "x/d99.366/a"]),
        ({"after": "move:/in/x{date:%d}"}, ["y/x01/a", "x32/a"], ["x01/a"]),
        ({"after": "move:/{date:%Y}/done"}, ["2026/done/a"], []),
        ({"after": "move:/in/2026/{date:%m}", "url": "ftp://me@h/x/../in"}, ["2026/a"], ["2026/12/a"]),
    ],
)
def test_what_files_are_moved_to_is_not_polled_wherever_it_is(
    targets: dict[str, str], polled: list[str], left: list[str]
) -> None:
    targets = {**targets, "timezone": "UTC"}
    server = tree(*("/in/" + path for path in polled + left))
    base = config(**targets).target.path
    server.folders.update(
        {base.rstrip("/") + path[3:]: entries for path, entries in server.folders.items() if path.startswith("/in")}
    )
    server.folders[base] = server.folders["/in"]
    assert sorted(walk(server, recursive=True, **targets)) == sorted(polled)


@pytest.mark.parametrize("target", ["/home/me/in/done", "../in/done", "/home/me/./in/done/"])
def test_a_target_is_compared_with_the_login_folder_resolved(target: str) -> None:
    server = Folders(in_=[a_file("a"), a_folder("done")])
    server.folders["in"] = server.folders.pop("in_")
    assert walk(server, url="ftp://me@h/~/in", recursive=True, after="move:" + target) == ["a"]


def test_what_stands_before_a_date_is_resolved_though_the_folder_of_the_day_is_not_there_yet() -> None:
    class Linked(Folders):
        """/archive is a link to the polled folder; what is not there cannot be resolved."""

        def absolute(self, path: str) -> str:
            return path if "{date:" in path else path.replace("/archive", "/in")

    server = Linked(**tree("/in/a", "/in/old/d2026/01/a").folders)
    assert walk(server, recursive=True, timezone="UTC", after="move:/archive/old/d{date:%Y}/{date:%m}") == ["a"]


@pytest.mark.parametrize("target", ["done", "/in/done", "../done", "done/{date:%Y}"])
def test_a_target_that_is_a_link_to_the_polled_folder_is_said_and_nothing_is_polled(target: str) -> None:
    class Linked(Folders):
        def absolute(self, path: str) -> str:
            return path.replace("/in/done", "/in").replace("/done", "/in")

    if "{" in target:  # the folder of a day in it is another one
        server = Linked(**tree("/in/a", "/in/2026/a").folders)
        assert walk(server, recursive=True, timezone="UTC", after="move:" + target) == ["a"]
    else:
        with pytest.raises(FileRefused, match="after"):
            walk(Linked(**tree("/in/a").folders), after="move:" + target)


@pytest.mark.parametrize("target", ["done", "/in/done", "/IN/done", "arch/done"])
def test_a_target_is_compared_without_case_where_the_server_has_none(target: str) -> None:
    server = tree("/in/a", "/in/DONE/a", "/in/ARCH/Done/a", "/in/done2/a")
    server.caseless = True
    left = {"ARCH/Done/a"} if target.startswith("/") else set()
    kept = {"a", "done2/a"} | (left or ({"DONE/a"} if "arch" in target else set()))
    assert set(walk(server, recursive=True, after="move:" + target)) == kept


def test_a_target_with_a_date_is_compared_without_case_where_the_server_has_none() -> None:
    server = tree("/in/a", "/in/Old/D2026/a")
    after = "move:old/d{date:%Y}"
    assert walk(server, recursive=True, timezone="UTC", after=after) == ["a", "Old/D2026/a"]
    server.caseless = True
    assert walk(server, recursive=True, timezone="UTC", after=after) == ["a"]


@pytest.mark.parametrize("target", ["done", "/in/done", "/IN/done"])
def test_a_folder_that_differs_from_a_target_in_case_is_polled_where_case_counts(target: str) -> None:
    assert walk(tree("/in/DONE/a"), recursive=True, after="move:" + target) == ["DONE/a"]
    server = tree("/in/DONE/a", "/in/done/b", "/IN/done/c")
    assert walk(server, recursive=True, after="move:" + target) == ["DONE/a"] + ["done/b"] * target.startswith("/IN")


@pytest.mark.parametrize(
    "settings",
    [
        {"after": "move:/in"},
        {"after": "move:/in/"},
        {"after": "move:../in"},
        {"after": "move:/x/../in"},
        {"after": "move:."},
        {"after_error": "move:done/.."},
        {"after": "move:..", "recursive": True},
        {"after": "move:../../in", "recursive": True},
        {"after": "move:../in", "url": "ftp://me@h/~/in"},
        {"after": "move:/{date:%Y}", "url": "ftp://me@h/2019"},
        {"after": "move:../{date:%Y%m%d}", "url": "ftp://me@h/in/20190102"},
        {"after": "move:../../{date:%Y}/{date:%m}", "url": "ftp://me@h/2019/12"},
        {"after": "move:{date:%Y}/.."},
        {"after": "move:../{date:%Y}/", "url": "ftp://me@h/~/2019", "recursive": True},
    ],
)
def test_a_target_that_is_the_polled_folder_is_a_wrong_setting(settings: dict[str, Any]) -> None:
    with pytest.raises(ftpcoord.ConfigError, match=r"^after"):
        config(**settings, timezone="UTC")


def test_a_target_that_turns_out_to_be_the_polled_folder_is_said_and_nothing_is_polled() -> None:
    server = Folders(**{"in": [a_file("a")], "/in": [a_file("a")], "/": [a_folder("in")]})
    for url, target in (("ftp://me@h/~/in", "/home/me/in"), ("ftp://me@h/in", "/IN"), ("ftp://me@h/in", "../IN")):
        server.caseless = True
        with pytest.raises(FileRefused, match="after"):
            walk(server, url=url, after="move:" + target)
    dated = Folders(**{"/2026": [a_file("a")], "2026": [a_file("a")], "/": [a_folder("2026")]})
    for url, target in (("ftp://me@h/~/2026", "/home/me/{date:%Y}"), ("ftp://me@h/d2026", "/D{date:%Y}")):
        dated.caseless = True
        dated.folders["/d2026"], dated.folders["/"] = dated.folders["/2026"], [a_folder("d2026")]
        with pytest.raises(FileRefused, match="after"):
            walk(dated, url=url, after="move:" + target, timezone="UTC")
    server.caseless = False
    assert walk(server, after="move:/IN") == ["a"]
    server.folders["/"].append(a_folder("IN"))
    assert walk(server, after="move:/IN") == ["a"]


@pytest.mark.parametrize(
    ("pattern", "polled"),
    [
        ("*", ["a", "x/b"]),
        ("*,.*", [".c", "a", "x/b"]),
        (".ssh/*,*/.snap*/*", [".ssh/key", "x/.snapshot/b"]),
        ("*.part/*,*", ["a", "up.part/d", "x/b"]),
    ],
)
def test_hidden_and_temporary_folders_are_entered_only_where_a_pattern_names_them(
    pattern: str, polled: list[str]
) -> None:
    server = tree("/in/a", "/in/.c", "/in/.ssh/key", "/in/x/b", "/in/x/.snapshot/b", "/in/up.part/d", "/in/.Trash/a")
    selector = Selector(config(recursive=True, pattern=pattern), time.monotonic)
    look = selector.tree.walk(server)  # type: ignore[arg-type]
    assert sorted(found.relative for found in look if selector.wants(found)) == polled
    assert "hidden" in look.skipped["/in/.Trash"]


def test_links_are_left_and_said_once(logged: Logged) -> None:
    server = Folders(**{"/in": [a_file("a"), Entry("l", "link", 0, NOON)]})
    selector = Selector(config(), time.monotonic)
    for _ in range(3):
        look = selector.tree.walk(server)  # type: ignore[arg-type]
        assert [found.relative for found in look] == ["a"] and "link" in look.skipped["/in/l"]
    assert [record.getMessage() for record in logged()] == ["file_refused"] and selector.tree.refused == 0


@pytest.mark.parametrize("files", [["a", "b"], []])
def test_links_to_folders_above_that_are_listed_as_folders_are_not_descended(files: list[str]) -> None:
    class Linked(Folders):
        def list(self, folder: str, last: object = None) -> list[Entry]:
            self.listed.append(folder)
            up = folder.split("/")[-1] in ("up", "self")
            return (
                [a_folder("x"), a_folder("up"), a_folder("self"), *(a_file(name) for name in files)]
                if (up or folder == "/in")
                else [a_file("c")]
            )

    server = Linked()
    selector = Selector(config(recursive=True), time.monotonic)
    look = selector.tree.walk(server)  # type: ignore[arg-type]
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


@pytest.mark.parametrize(
    ("limit", "what"),
    [
        ("MAX_ENTRIES", "10000 files"),
        ("MAX_FOLDERS", "10000 folders"),
        ("MAX_LISTING", "10000 bytes"),
    ],
)
def test_a_tree_without_end_is_an_error_and_not_a_full_memory(
    limit: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Endless(Folders):
        def list(self, folder: str, last: object = None) -> list[Entry]:
            return [*(a_folder(f"{len(folder)}{letter}") for letter in "ab"), a_file("f" * len(folder))]

    monkeypatch.setattr(ftpcoord, limit, 10_000)
    with pytest.raises(ftpcoord.ServerDown, match=what):
        walk(Endless(), recursive=True)


def test_an_endless_tree_ends() -> None:
    class Endless(Folders):
        def list(self, folder: str, last: object = None) -> list[Entry]:
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


def test_an_expression_is_for_the_whole_name_and_commas_in_it_are_its_own() -> None:
    listing = [found(name) for name in ("a1.csv", "a12.csv", "a123.csv", "xa1.csv", "a1.csvx")]
    assert ready(listing, pattern=r"re:a\d{1,2}\.csv") == ["a1.csv", "a12.csv"]
    assert ready(listing, pattern=r"re:a\d|xa1\.csv") == ["xa1.csv"]
    assert ready(listing, exclude=r"re:.*a\d{1,2}\.csv") == ["a1.csvx", "a123.csv"]
    assert ready(listing, pattern="*.csv", exclude="re:a1.*") == ["xa1.csv"]


@pytest.mark.parametrize(("glob", "fits"), [("[z-a]*", False), ("*", True)])
def test_a_range_that_runs_backwards_fits_nothing_also_where_python_raises_for_it(
    glob: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_before_3_10(name: str, pattern: str) -> bool:
        if "z-a" in pattern:
            raise re.error("bad character range z-a")
        return True

    monkeypatch.setattr(fnmatch, "fnmatchcase", as_before_3_10)
    assert bool(ftpcoord.meant([row("a.csv")], glob)) is fits


def test_an_expression_with_a_slash_is_for_the_path_below_the_folder_as_a_glob_is() -> None:
    listing = [found("x/a.csv"), found("y/a.csv"), found("a.csv"), found("x/y/a.csv")]
    assert ready(listing, pattern=r"re:[xy]/a\.csv") == ["x/a.csv", "y/a.csv"]
    assert ready(listing, pattern=r"re:a\.csv", exclude=r"re:x/.*") == ["a.csv", "y/a.csv"]
    assert ready(listing, pattern=r"re:[^/]+\.csv") == ["a.csv"]


@pytest.mark.parametrize("name", ["pattern", "exclude"])
@pytest.mark.parametrize("text", ["re:*.csv", "re:(", "re:a{99999999999999999999}", "re:[z-a]"])
def test_a_wrong_expression_is_a_wrong_setting(name: str, text: str) -> None:
    with pytest.raises(ftpcoord.ConfigError, match=f"^{name}: .*is not a regular expression"):
        config(**{name: text})


def test_names_are_matched_in_any_case_if_that_is_asked_for() -> None:
    listing = [found(name) for name in ("a.csv", "B.CSV", "Ä.Csv", "c.xml", "D.BAK")]
    assert ready(listing, pattern="*.csv", ignore_case=True) == ["B.CSV", "a.csv", "Ä.Csv"]
    assert ready(listing, pattern=r"re:[a-zä]\.csv", ignore_case=True) == ["B.CSV", "a.csv", "Ä.Csv"]
    assert ready(listing, exclude="*.bak,ä*", ignore_case=True) == ["B.CSV", "a.csv", "c.xml"]
    assert ready(listing, pattern="ä.csv,b.csv", ignore_case=False) == []


def test_in_any_case_folders_too_are_excluded_and_named() -> None:
    server = tree("/in/Old/a", "/in/x/A", "/in/.SSH/a")
    settings = {"recursive": True, "ignore_case": True, "pattern": "a,.ssh/*", "exclude": "old"}
    assert sorted(walk(server, **settings)) == [".SSH/a", "x/A"]
    assert sorted(walk(server, **{**settings, "ignore_case": False})) == ["Old/a", "x/A"]


@pytest.mark.parametrize(
    ("name", "patterns"),
    [
        (".hidden", [r"re:\..*", r"re:^\.h.*"]),
        ("a.tmp", [r"re:.*\.tmp", r"re:^a\.tmp$", r"re:A\.TMP"]),
        ("a.csv~", ["re:.*~"]),
    ],
)
def test_hidden_and_temporary_names_are_taken_by_an_expression_of_their_own(name: str, patterns: list[str]) -> None:
    for pattern in patterns:
        assert ready([found(name)], pattern=pattern, ignore_case=True) == [name]
    for pattern in ("re:.*", "re:.+", r"re:.*\.?.*", r"re:[.a].*", "re:.hidden|.*"):
        assert ready([found(name)], pattern=pattern) == []


def test_a_hidden_folder_is_entered_where_an_expression_names_it() -> None:
    server = tree("/in/.ssh/key", "/in/x/.snapshot/b", "/in/.Trash/a")
    assert walk(server, recursive=True, pattern=r"re:\.ssh/.*") == [".ssh/key"]
    assert walk(server, recursive=True, pattern="re:.*/.*") == []


GLOBS = st.text("ab.*?[]!/,", min_size=1, max_size=6).filter(lambda text: text.strip(", "))


@given(GLOBS, st.text("abAB./", min_size=1, max_size=6), st.booleans())
def test_a_glob_matches_as_it_always_did_and_in_any_case_as_that_of_small_letters(
    glob: str, name: str, ignore_case: bool
) -> None:
    """Against an obvious model."""
    glob = glob.split(",")[0] or "a"
    model = fnmatch.fnmatchcase
    subject = name if "/" in glob else name.rpartition("/")[2]
    expected = model(subject.lower(), glob.lower()) if ignore_case else model(subject, glob)
    assert ftpcoord.matcher([glob], ignore_case)(name) == expected


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
    assert choose(selector, [found()]) == Choice([], [], 0, young=1)
    clock.now += 59
    assert choose(selector, [found()]) == Choice([], [], 0, young=1)
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
        found("c", 1, "2026-01-12T10:00"),
        found("a", 2, "2026-01-12T09:00"),
        found("b", 2, "2026-01-12T09:00"),
        found("d", 1, ""),
    ]
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
    assert names(selector.unchanged(choice.unsettled, again)) == ["a"]


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
    assert selector.unchanged(choice.unsettled, [found(size=11)]) == []
    assert names(choose(selector, [found(size=11)]).unsettled) == ["a.csv"]
    clock.now += 4
    assert names(choose(selector, [found(size=11, mtime="2026-01-12T12:01")]).unsettled) == ["a.csv"]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [([9] * 4, 0), ([9] * 6, 1), ([9] * 10, 1), ([1, 2, 3, 4, 5, 6], 0), ([9] * 5 + [8] + [9] * 4, 0)],
)
def test_a_file_whose_time_alone_is_another_one_at_each_look_is_said_to_wait(
    sizes: list[int], said: int, logged: Logged
) -> None:
    """As where a server tells the present moment: it looks as if it were being written, for ever."""
    selector = Selector(config(settle=5), Clock())
    looks = [found(size=size, mtime=f"2026-01-12T10:00:0{number}") for number, size in enumerate(sizes)]
    for first, second in zip(looks[::2], looks[1::2]):
        unsettled = choose(selector, [first]).unsettled
        assert selector.unchanged(unsettled, [second]) == []
        restless = selector.unsteady.redated(unsettled, [second])
    events = [record for record in logged() if record.getMessage() == "file_refused"]
    assert len(events) == said == restless and all(
        "another time at each look" in getattr(record, "fields", {})["reason"] for record in events
    )


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
    assert (Work(found(), known).attempts, Work(found(), known).known) == (3, known)
    assert (Work(found(size=11), known).attempts, Work(found(size=11), known).known) == (0, None)
    assert (Work(found(), None).attempts, Work(found(), None).known) == (0, None)


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
        ("", None),
        ("1970-01-02", 86400.0),
        ("1970-01-01T00:01", 60.0),
        ("1970-01-01T00:00:07", 7.0),
        ("1970-01-01T00:00:07.500", 7.5),
        ("nonsense", None),
        ("2026-02-30", None),
    ],
)
def test_a_listed_time_is_utc_seconds(listed: str, seconds: Optional[float]) -> None:
    assert epoch_seconds(listed) == seconds


# -- what is another version each time it has been handled ------------------------------------------------------------


def test_pauses_of_a_file_that_is_never_the_same_double_up_to_an_hour_and_end_with_it(
    logged: Logged,
) -> None:
    now = [0.0]
    selector = Selector(config(settle=0), lambda: now[0])
    unsteady, file = selector.unsteady, found()
    pauses = []
    for _ in range(12):
        unsteady.again(file.path, 1)
        pauses.append(unsteady.pause(file.path, file.entry))
        choice = choose(selector, [file])
        assert (len(choice.ready), choice.waiting) == ((0, 1) if pauses[-1] else (1, 0))
        now[0] += pauses[-1]
        assert names(choose(selector, [file]).ready) == [file.entry.name]
    assert pauses == [0, *(10 * 2**times for times in range(9)), 3600, 3600]
    assert [record.getMessage() for record in logged()] == ["not_now"] * 10
    ends: list[Callable[[], None]] = [
        lambda: unsteady.over(file.path),
        lambda: unsteady.keep(lambda path: False),
        lambda: unsteady.seen_again(row()),
    ]
    for end in ends:
        unsteady.again(file.path, 1)
        assert unsteady.pause(file.path, file.entry)
        end()
        unsteady.again(file.path, 1)
        assert not unsteady.pause(file.path, file.entry)
        unsteady.again(file.path, 1)
    unsteady.keep({file.path}.__contains__)
    assert unsteady.pause(file.path, file.entry)


def test_a_file_that_is_tried_again_does_not_wait_for_its_age_once_more() -> None:
    selector = Selector(config(min_age=3600), Clock())
    assert names(choose(selector, [found()], row(state="failed")).ready) == ["a.csv"]
    assert not choose(selector, [found()], row(state="failed", size=11)).ready, "another version waits"
