"""`order`: of the files of one key one at a time, none before one that sorts before it is done or skipped."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

import pytest
from conftest import Database, Files, wait_for
from hostile import FtpHost, Site
from hypothesis import given, settings
from hypothesis import strategies as st
from members import PATIENCE, Crew
from memory import NOON, config, found, names, row

import ftpcoord
from ftpcoord import Change, ConfigError, Fence, Found, Lease, Ledger, MemoryRows, Order, Row, Work, Workers

KEYED = r"re:([a-z]+)\d+"


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"order": "yes"}, "order: must be none, strict, or re:"),
        ({"order": "re:(a"}, "order: .* is not a regular expression"),
        ({"order": "re:a.*"}, "order: .* has no group"),
        (
            {"after_error": "delete"},
            "order: needs ledger = on, after_error = keep, sort = name or mtime; no max_age, min_size",
        ),
        (
            {"after_error": "move:bad"},
            "order: needs ledger = on, after_error = keep, sort = name or mtime; no max_age, min_size",
        ),
        ({"max_age": 60}, "order: needs ledger = on, after_error = keep, sort = name or mtime; no max_age, min_size"),
        ({"min_size": 1}, "order: needs ledger = on, after_error = keep, sort = name or mtime; no max_age, min_size"),
        ({"sort": "size"}, "order: needs ledger = on, after_error = keep, sort = name or mtime; no max_age, min_size"),
        ({"sort": "-name"}, "order: needs ledger = on, after_error = keep, sort = name or mtime; no max_age, min_size"),
        (
            {"ledger": "off", "after": "delete"},
            "order: needs ledger = on, after_error = keep, sort = name or mtime; no max_age, min_size",
        ),
    ],
    ids=str,
)
def test_what_would_pass_over_a_file_is_refused_with_order(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**{"order": "strict", **wrong})
    if "order" not in wrong:
        config(**wrong)


def test_the_key_is_the_group_and_names_that_do_not_match_share_one() -> None:
    order = Order(config(order=r"re:([A-Za-z]*)\d+"))
    assert [order.key(f"/in/sub/{name}") for name in ("a1", "A1", "12", "a1.csv", "x")] == ["a", "A", "", None, None]
    assert Order(config(order=r"re:(A)\d", ignore_case="yes")).key("/in/a1") == "a"
    assert {Order(config(order="strict")).key(f"/in/{name}") for name in ("a1", "b")} == {None}
    assert Order(config(order=r"re:(x)?\d")).key("/in/1") == ""


# -- who may be taken up, and who waits for whom ----------------------------------------------------------------------


def works(*each: str, rows: Sequence[Row] = ()) -> list[Work]:
    known = {one.path: one for one in rows}
    return [Work(found(name), known.get(f"/in/{name}")) for name in each]


def lined(
    order: Order,
    listed: Iterable[Found],
    rows: Iterable[Row] = (),
    ready: Sequence[Work] = (),
    busy: Iterable[str] = (),
    resting: Iterable[str] = (),
) -> tuple[list[str], dict[str, str]]:
    """Names of what may be taken up now, and of what follows what."""
    known, rest = {one.path: one for one in rows}, {f"/in/{name}" for name in resting}
    at_work = {f"/in/{name}" for name in busy}
    first, behind = order.line_up(at_work, listed, known, ready, lambda path: path not in rest)
    return names(first), {path[4:]: work.path[4:] for path, work in behind.items()}


LISTED = [found(name) for name in ("a1", "a2", "a3", "b1", "b2")]


def test_the_first_of_each_key_goes_and_the_others_follow_it_one_by_one() -> None:
    order, all_ready = Order(config(order=KEYED)), works("a1", "a2", "a3", "b1", "b2")
    assert lined(order, LISTED, (), all_ready) == (["a1", "b1"], {"a1": "a2", "a2": "a3", "b1": "b2"})
    assert lined(Order(config(order="strict")), LISTED, (), all_ready)[0] == ["a1"]


def test_a_quarantined_file_that_could_not_be_moved_yet_is_not_told_to_be_missing() -> None:
    order = Order(config(order="strict"))
    lined(order, LISTED[1:], [row("a2", "quarantined", action="move:bad", due=5.0)])
    assert [one["state"] for one in order.blocked or ()] == ["quarantined"]


@pytest.mark.parametrize(
    "blocking",
    [
        {},  # it grows, has no companion, is too large, too young
        {"rows": [row("a2", "claimed")]},
        {"rows": [row("a2", "failed", due=1e9)]},
        {"rows": [row("a2", "quarantined")]},
        {"listed": ["a1", "a3"], "rows": [row("a2", "quarantined")]},  # its file is gone
        {"listed": ["a1", "a3"], "rows": [row("a2", "failed").marked(unlisted=True, gone=True)]},
        {"rows": [row("a2", size=9)]},  # another version was done
        {"resting": ["a2"], "ready": ["a1", "a2", "a3"]},  # "not now"
    ],
    ids=str,
)
def test_whatever_keeps_a_file_it_blocks_those_behind_it(blocking: dict[str, Any]) -> None:
    order, rows = Order(config(order="strict")), blocking.get("rows", [])
    listed = [found(name) for name in blocking.get("listed", ["a1", "a2", "a3"])]
    ready = works(*blocking.get("ready", ["a1", "a3"]), rows=rows)
    assert lined(order, listed, rows, ready, resting=blocking.get("resting", ())) == (["a1"], {})
    assert order.before["/in/a3"] == "/in/a2"


def test_what_is_done_or_skipped_blocks_nobody_and_a_claim_of_a_dead_member_is_tried_in_its_turn() -> None:
    order = Order(config(order="strict"))
    rows = [row("a1", "done"), row("a2", "claimed")]
    assert lined(order, LISTED[:3], rows, works("a2", "a3", rows=rows)) == (["a2"], {"a2": "a3"})


def test_one_in_work_lets_none_of_its_key_begin_even_if_it_sorts_before() -> None:
    order, rows = Order(config(order=KEYED)), [row("a2", "claimed")]
    listed, ready = LISTED, works("a1", "a3", "b1", rows=rows)
    assert lined(order, listed, rows, ready, busy=["a2"]) == (["b1"], {"a2": "a1", "a1": "a3"})
    assert lined(order, [], [], works("a1"), busy=["a9"]) == ([], {}), "in work, and neither listed nor in the ledger"
    # A new version came during the after-action of the one before.
    rows = [row("a1", "claimed"), row("a2", "done", size=9, action="delete")]
    assert lined(order, LISTED, rows, works("a3"), busy=["a1", "a2"]) == ([], {})
    # Nor is it done when an earlier version is.
    rows = [row("a1", "claimed", size=9)]
    assert lined(order, LISTED, rows, works("a2", "a3"), busy=["a1"]) == ([], {})
    # An after-action of what is done is no work that anybody waits for.
    rows = [row("a1", "done", action="delete")]
    assert lined(order, LISTED[:2], rows, works("a2", rows=rows), busy=["a1"]) == (["a2"], {})


def test_max_files_counts_those_that_follow() -> None:
    order = Order(config(order=KEYED, max_files=3))
    assert lined(order, LISTED, (), works("a1", "a2", "a3", "b1", "b2")) == (["a1"], {"a1": "a2", "a2": "a3"})


def test_times_of_lines_are_compared_as_the_listing_shows_them_and_equal_ones_by_path() -> None:
    order = Order(config(order="strict", sort="mtime"))
    known = row("a2", "failed", mtime=f"{NOON}=1768212907~")
    listed = [found("a3"), found("a2", mtime=known.mtime), found("a1", mtime="2026-01-12T12:01")]
    ready = [Work(one, None) for one in listed]
    assert lined(order, listed, [known], ready) == (["a2"], {"a2": "a3", "a3": "a1"})
    assert lined(order, listed[::2], [known], ready[::2]) == ([], {}), "by the time of its row"


STATES = (None, "done", "claimed", "failed", "quarantined")
FILE = st.tuples(
    st.sampled_from("ab"), st.integers(0, 9), st.sampled_from(STATES), *[st.booleans()] * 4
)  # key, number, row, listed, ready, busy, rested


@given(st.lists(FILE, max_size=12, unique_by=lambda one: one[:2]), st.sampled_from((0, 0, 1, 3)))
def test_lines_are_as_in_a_slow_model(
    files: list[tuple[str, int, Optional[str], bool, bool, bool, bool]], most: int
) -> None:
    """Each key for itself, again and again from the front: who is first, and may it go?"""
    rows = [row(f"{key}{number}", state) for key, number, state, *_ in files if state]
    listed = [found(f"{key}{number}") for key, number, _, there, *_ in files if there]
    ready = [f"{k}{n}" for k, n, state, there, may, busy, _ in files if there and may and not busy and state != "done"]
    busy = [f"{key}{number}" for key, number, state, _, _, at_work, _ in files if at_work and state != "done"]
    resting = [f"{key}{number}" for key, number, *_, rested in files if not rested]
    doubtful = {f"{k}{n}" for k, n, state, there, *_ in files if there and not state}  # is that version at work?
    order = Order(config(order=KEYED, max_files=most))
    heads, behind = lined(order, listed, rows, works(*sorted(ready), rows=rows), busy, resting)

    not_done = sorted(
        {f"{k}{n}" for k, n, state, there, *_ in files if state != "done" and (state or there)} | set(busy)
    )
    room, wanted_heads, wanted_behind = most or 99, [], {}
    before = {name[0]: name for name in not_done if name in busy}
    stopped = set()
    for name in not_done:
        if (name in busy and name not in doubtful) or name[0] in stopped:
            continue
        if name not in ready or room == 0:
            stopped.add(name[0])
            continue
        if name[0] not in before:
            wanted_heads.append(name)
        if name in resting:
            stopped.add(name[0])
            continue
        if name[0] in before:
            wanted_behind[before[name[0]]] = name
        before[name[0]] = name
        room -= 1
    if sum(name[0] == "a" for name in busy) <= 1 >= sum(name[0] == "b" for name in busy):
        assert (heads, behind) == (wanted_heads, wanted_behind)
    assert not {name[0] for name in heads} & {name[0] for name in busy}
    for name in [*heads, *behind.values()]:
        earlier = [one for one in not_done if one[0] == name[0] and one < name and one not in busy]
        assert set(earlier) <= {*heads, *behind.values()}, "nobody is passed over"


# -- what happens over time: polls, workers that end well or not, and files that come at any moment -------------------


class Run:
    """A group's lines: the real Order and Workers, and polls that take their time. Files are done, fail, go."""

    def __init__(self, deletes: bool) -> None:
        self.config = config(order=KEYED)
        self.order, self.deletes = Order(self.config), deletes
        self.rows: dict[str, Row] = {}
        self.files: set[str] = set()
        self.done: set[str] = set()
        self.ended: dict[str, Row] = {}
        self.at_work: list[Work] = []
        self.workers = Workers(3, False, lambda tasks: (), lambda: None, lambda path: self.rows.get(path))
        self.listed: list[Found] = []  # by a poll that is under way
        self.busy: Optional[set[str]] = None
        self.seen: set[str] = set()  # by the last poll that has chosen

    def list(self) -> None:
        if self.busy is None:
            self.ended, self.busy = {}, self.workers.hold(True)
            self.listed = [found(name) for name in sorted(self.files)]

    def choose(self) -> None:
        if self.busy is None:
            return
        ready = [Work(one, self.rows.get(one.path)) for one in self.listed if one.path not in self.busy]
        ready = [work for work in ready if work.old is None or work.old.state in ("failed", "claimed")]
        rows = {**self.ended, **self.rows}
        first = self.workers.line_up(self.order, self.listed, rows.values(), ready)
        self.seen = {one.path for one in self.listed}
        self.workers.hand_in(first)
        self.busy = None

    def take(self) -> None:
        if not self.workers.queue:
            return
        (work,) = self.workers._take()
        key = self.order.key(work.path)
        assert isinstance(work, Work)
        assert all(self.order.key(other.path) != key for other in self.at_work), "two of one key"
        before = {path for path in self.seen | self.rows.keys() if self.order.key(path) == key and path < work.path}
        assert before <= self.done, "out of order"
        self.at_work.append(work)
        self.rows[work.path] = row(work.path[4:], "claimed")

    def end(self, state: str) -> None:
        if not self.at_work:
            return
        work = self.at_work.pop(0)
        self.rows[work.path] = row(work.path[4:], state)
        if state == "done":
            self.ended[work.path] = self.rows[work.path]
            self.done.add(work.path)
        self.workers.hand_in((), instead=[work])
        if state == "done" and self.deletes:
            self.files.discard(work.path[4:])
            del self.rows[work.path]

    def arrive(self, name: str) -> None:
        if f"/in/{name}" not in self.done:
            self.files.add(name)


STEP = st.one_of(
    st.sampled_from(["list", "choose", "take", "take", "done", "failed", "quarantined"]),
    st.builds("{}{}".format, st.sampled_from("ab"), st.integers(0, 4)),
)


def test_nobody_follows_one_that_failed() -> None:
    for state, expected in (("done", 1), ("failed", 0)):
        run = Run(deletes=False)
        run.files = {"a1", "a2"}
        run.list()
        run.choose()
        run.take()
        run.end(state)
        assert len(run.workers.queue) == expected


@settings(max_examples=300)
@given(st.booleans(), st.lists(STEP, min_size=20, max_size=80))
def test_no_key_is_handled_out_of_order_and_never_two_of_one_key_whatever_happens_when(
    deletes: bool, steps: list[str]
) -> None:
    run = Run(deletes)
    for step in steps:
        if step in ("list", "choose", "take"):
            getattr(run, step)()
        elif step in ("done", "failed", "quarantined"):
            run.end(step)
        else:
            run.arrive(step)
    # What blocked is skipped, and nothing is blocked for ever.
    for path, known in list(run.rows.items()):
        if known.state == "quarantined":
            run.rows[path] = known._replace(state="done")
            run.done.add(path)
    for _ in range(2):
        run.choose()
        run.list()
        run.choose()
        while run.workers.queue or run.at_work:
            run.take()
            run.end("done")
    assert {f"/in/{name}" for name in run.files} <= run.done


# -- the ledger -------------------------------------------------------------------------------------------------------


def test_a_row_that_blocks_is_never_dropped_and_a_skipped_one_is_dropped_like_a_done_one() -> None:
    now = ftpcoord.boot_clock()
    lease = Lease(1, now + 100, ftpcoord.boot_clock)
    rows = MemoryRows()
    ledger = Ledger(rows, "g", "a", lease, ftpcoord.boot_clock)
    each = [
        row("failed", "failed").marked(gone=True),
        row("claimed", "claimed", term=0),
        row("quarantined", "quarantined"),
        row("done", "done"),
    ]
    rows.write(Fence("g", "a", 1), [Change(None, one) for one in each])
    for _ in range(3):
        ledger.refresh()
        ledger.forget_unlisted(set(), 0.0, blocking=True)
    assert {one.path[4:]: one.state for one in rows.rows("g")} == {
        "failed": "failed",
        "claimed": "failed",
        "quarantined": "quarantined",
    }
    ledger.forget_unlisted(set(), 0.0)
    assert not list(rows.rows("g"))


# -- on servers -------------------------------------------------------------------------------------------------------


class Desk(Site):
    """A handler that notes who is in work beside whom, and fails or waits as a test wants."""

    def __init__(self, folder: Path, host: FtpHost, **changes: Any) -> None:
        super().__init__(folder, host.settings, "handler", **{"order": KEYED, "max_attempts": 1, **changes})
        self.bad: set[str] = set()
        self.away: set[str] = set()
        self.asked: list[str] = []
        self.at_once: list[set[str]] = [set()]
        self.gate: Optional[threading.Barrier] = None
        self.seconds = 0.0

    def __enter__(self) -> Desk:
        super().__enter__()
        return self

    def receive(self, file: ftpcoord.File) -> None:
        self.asked.append(file.name)
        self.at_once.append(self.at_once[-1] | {file.name})
        try:
            if self.gate is not None:
                self.gate.wait(PATIENCE)
            time.sleep(self.seconds)
            if file.name in self.away or "all" in self.away:
                raise ftpcoord.TryLater
            if file.name in self.bad:
                raise ValueError("no good")
            super().receive(file)
        finally:
            self.at_once.append(self.at_once[-1] - {file.name})

    def names(self, key: str) -> list[str]:
        return [name for name, _, _ in self.handled if name.startswith(key)]


@pytest.mark.parametrize("after", ["keep", "delete"])
def test_each_key_is_handled_in_order_one_at_a_time_and_different_keys_in_parallel(tmp_path: Path, after: str) -> None:
    expected = {f"{key}{number}": b"x" for key in "ab" for number in range(6)}
    with FtpHost(files=dict(expected)) as host, Desk(tmp_path, host, after=after, polling_interval=0.05) as desk:
        desk.seconds = 0.02
        desk.gate = threading.Barrier(2)  # each waits for one of the other key
        desk.arrive(expected)
        for key in "ab":
            assert desk.names(key) == [f"{key}{number}" for number in range(6)]
            assert all(len([name for name in at_once if name[0] == key]) <= 1 for at_once in desk.at_once)
        if after == "delete":
            wait_for(lambda: not host.files, PATIENCE)


def test_one_poll_is_enough_for_a_whole_line(tmp_path: Path) -> None:
    expected = {f"a{number}": b"x" for number in range(9)}
    with FtpHost(files=dict(expected)) as host, Desk(tmp_path, host, polling_interval=600) as desk:
        desk.arrive(expected)
        assert desk.names("a") == sorted(expected)
        assert len(desk.all("polled")) == 1


def test_a_file_in_quarantine_blocks_its_key_alone_until_it_is_skipped_although_it_is_gone(tmp_path: Path) -> None:
    files = {"a1": b"x", "a2": b"x", "a3": b"x", "b1": b"x", "b2": b"x"}
    with FtpHost(files=dict(files)) as host, Desk(tmp_path, host, ledger_retention=0) as desk:
        desk.bad = {"a2"}
        wait_for(lambda: {name for name, _, _ in desk.handled} >= {"a1", "b1", "b2"}, PATIENCE)
        desk.wait("file_quarantined")
        del host.files["a2"]
        desk.polls(3)
        assert desk.names("a") == ["a1"] and desk.asked.count("a2") == 1
        status = ftpcoord.listener_status(desk.listener, ftpcoord.Survey(desk.listener.config))
        (blocked,) = status["blocked"]
        assert (blocked["path"], blocked["state"], blocked["files"]) == ("/in/a2", "quarantined, not listed", 1)
        assert time.time() - 60 < blocked["since"] <= time.time()
        assert [(one["path"], one["why"]) for one in status["backlog"]["first"]] == [
            ("/in/a3", "blocked by /in/a2 (order)")
        ]
        assert any("/in/a2 blocks" in one["problem"] for one in status["problems"]), status["problems"]
        assert "/in/a2" in ftpcoord.page([status], 0) and "Blocked" in ftpcoord.page([status], 0)
        survey = ftpcoord.Survey(desk.listener.config)
        told = ftpcoord.metrics([(desk.listener, survey)])
        assert "ftpcoord_blocked_files{" in told and "} 1.0\n" in told[told.index("ftpcoord_blocked_files{") :]
        assert "ftpcoord_blocked_since_timestamp_seconds{" in told
        with contextlib.closing(ftpcoord.open_database(desk.listener.config)) as database:
            (bad,) = [one for one in database.rows(desk.listener.config.coordination_group) if one.state != "done"]
            database.skip(desk.listener.config.coordination_group, bad)
        desk.arrive({name: b"x" for name in files if name != "a2"})
        desk.polls()
        status = ftpcoord.listener_status(desk.listener, survey)
        assert status["blocked"] == []


def test_while_the_system_behind_is_away_the_next_key_is_tried_each_time(tmp_path: Path) -> None:
    files = {f"{key}{number}": b"x" for key in "abcd" for number in range(2)}
    with FtpHost(files=dict(files)) as host, Desk(tmp_path, host, workers=1, retry_delay=0.1) as desk:
        desk.away = {"all"}
        wait_for(lambda: len(desk.asked) >= 7, PATIENCE)
        assert desk.asked[:4] == ["a0", "b0", "c0", "d0"], "the next key in turn"
        assert set(desk.asked) <= {"a0", "b0", "c0", "d0"}
        desk.away = set()
        desk.arrive(files)
        assert all(desk.names(key) == [f"{key}0", f"{key}1"] for key in "abcd")


def test_delivery_into_a_folder_keeps_the_order_too(tmp_path: Path) -> None:
    files = {f"{key}{number}": b"x" for key in "abc" for number in range(5)}
    with FtpHost(files=dict(files)) as host, Site(tmp_path, host.settings, order=KEYED, polling_interval=600) as site:
        site.arrive(files)
        site.wait("file_done", len(files))
        done = [event["path"][4:] for event in site.all("file_done")]
        for key in "abc":
            assert [name for name in done if name[0] == key] == [f"{key}{number}" for number in range(5)]


def test_commands_tell_what_is_blocked_and_by_what(postgresql: Database, files: Files, tmp_path: Path) -> None:
    for name in ("a1.csv", "a2.csv", "a3.csv"):
        files.put(name, b"x")
    with Crew(tmp_path, postgresql, files, order="strict", max_attempts=1) as crew:
        dry = crew.run("run", "--dry-run")
        assert dry.stdout.count("take  ") == 3, dry.stdout
        crew.fail()
        done = crew.run("run", "--once")
        assert done.returncode == 1, "files are left that wait for one in quarantine"
        assert crew.states() == {"a1.csv": "quarantined"}
        dry = crew.run("run", "--dry-run")
        assert dry.stdout.count("a1.csv (order)") == 2 and "0 of 3 files would be handled" in dry.stdout, dry.stdout
        assert crew.call("skip", "a1.csv").returncode == 0
        crew.fail(False)
        assert crew.run("run", "--once").returncode == 0
        assert [run.name for run in crew.runs() if run.attempt][-2:] == ["a2.csv", "a3.csv"]
        # A failed row behind another one.
        assert (
            crew.call("retry", "--done", "a1.csv").returncode == crew.call("retry", "--done", "a3.csv").returncode == 0
        )
        listed = crew.call("files").stdout.splitlines()
        assert [("blocked by" in line and "a1.csv" in line.partition("blocked by")[2]) for line in listed] == [
            False,
            False,
            True,
        ], listed
        status = crew.status()
        assert [(one["state"], one["files"]) for one in status["blocked"]] == [("failed", 1)]
        assert "a1.csv" in crew.call("status").stdout
