"""The ledger over rows in memory, and paths as the text that it keeps: no server, no database."""

from __future__ import annotations

import threading
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any, Callable, Optional, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory import NOON, Clock, choose, config, found, look, names, row

import ftpcoord
from ftpcoord import (
    Change,
    DatabaseDown,
    Fence,
    Lease,
    LeaseLost,
    Ledger,
    MemoryRows,
    Row,
    Selector,
    Work,
    printable,
)


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
            (standing.get(c.path) is None)
            if c.new is None
            else (lambda s, n: s is not None and s[1:7] == n._replace(term=fence.term)[1:7])(
                standing.get(c.new.path), c.new
            )
            for c in changes
        ]


def ledger(rows: MemoryRows, clock: Callable[[], float], term: int = 1, lasting: float = 1e9) -> Ledger:
    made = Ledger(cast(Any, rows), "g", "a", Lease(term, clock() + lasting, clock), clock)
    made.refresh()
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
    assert names(selector.choose(look(found()), mine.get, set()).ready) == []
    mine.refresh()
    assert names(selector.choose(look(found()), mine.get, set()).ready) == ["a.csv"]


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


def test_the_first_refresh_of_a_term_reads_all_rows_and_asks_for_nothing_else(clock: Clock) -> None:
    asked: list[str] = []

    class Asked(MemoryRows):
        def rows(self, group: str, only_open: bool = False) -> Iterator[Row]:
            asked.append("open" if only_open else "all")
            return super().rows(group, only_open)

        def done_count(self, group: str) -> int:
            asked.append("count")
            return super().done_count(group)

    rows = Asked()
    rows.write(Fence("g", "operator", 1), [Change(None, row("a"))])
    mine = Ledger(cast(Any, rows), "g", "a", Lease(1, clock() + 9, clock), clock)
    mine.refresh()
    assert asked == ["all"] and [one.path for one in mine.all()] == [row("a").path]
    mine.refresh()
    assert asked == ["all", "open", "count"]


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
        assert selector.choose(look(found()), mine.get, set()).waiting == 1
        clock.now += 2.5
        mine.refresh()
    assert names(selector.choose(look(found()), mine.get, set()).ready) == ["a.csv"]


def test_due_actions_are_those_whose_time_has_come_and_that_are_not_in_work(clock: Clock) -> None:
    rows = MemoryRows()
    old = Fence("g", "a", 1)
    rows.write(
        old,
        [
            Change(None, row("a", action="delete")),
            Change(None, row("b", action="delete"), 10.0),
            Change(None, row("c", state="quarantined", action="move:bad")),
            Change(None, row("d")),
            Change(None, row("e", action="delete")),
        ],
    )
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
        row("a", state="quarantined"),
        row("b", state="failed"),
        row("c", state="claimed"),
        row("d", action="delete"),
    ]
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


@pytest.mark.parametrize(("own", "deaths"), [((), 1), ((7,), 0)])
def test_a_claim_of_an_earlier_lease_of_this_process_is_dated_without_a_death(
    clock: Clock, own: tuple[int, ...], deaths: int
) -> None:
    rows = MemoryRows()
    rows.write(Fence("g", "a", 7), [Change(None, row("a", state="claimed", term=7))])
    mine = ledger(rows, clock, 8)
    mine.forget_unlisted(set(), 100.0, own=own)
    assert [(one.state, one.marks.deaths) for one in mine.all()] == [("failed", deaths)]


def test_marks_before_an_error_are_told_from_its_words() -> None:
    plain = row("a", state="failed", error="exit 3")
    assert plain.marks == ftpcoord.Marks()
    every = plain.marked(unlisted=True, gone=True, delivered=True, deaths=12)
    text = ftpcoord.error_text(every)
    assert ftpcoord.marks_in(text) == (every.marks, "exit 3") and text.endswith("; exit 3")
    assert every.marked(unlisted=False, gone=False, delivered=False, deaths=0) == plain
    for words in ("delivered; ", "gone; x", "not listed;", "its process ended 9 times; "):
        kept = ftpcoord.error_text(ftpcoord.with_error(plain, ftpcoord.Error(words)))
        assert ftpcoord.marks_in(kept)[0] == ftpcoord.Marks(), "a handler's words are no marks"


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
        ("/in/a b.csv", "/in/a b.csv"),
        ("/in/ä", "/in/ä"),
        ("/in/100%", "/in/100%"),
        ("/in/\udcff", "/in/%FF"),
        ("/in/100%\udcff", "/in/100%25%FF"),
        ("a\nb", "a%0Ab"),
        ("a\tb", "a%09b"),
        ("\x1b[31m", "%1B[31m"),
        ("\u202eexe", "%E2%80%AEexe"),
        ("\x00", "%00"),
        ("", ""),
    ],
)
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


def test_an_answered_read_does_not_end_the_trouble_of_a_write(clock: Clock) -> None:
    """Making an index lets readers pass and keeps writers waiting."""
    rows, told = Shaky(), list[str]()
    mine = Ledger(cast(Any, rows), "g", "a", Lease(1, clock.now + 60, clock), clock, told.append)
    mine.refresh()

    def poll() -> None:
        """While the claim below goes on."""
        polling = threading.Thread(target=mine.refresh)
        polling.start()
        polls.append(polling)

    polls: list[threading.Thread] = []
    rows.away, rows.before_failing = 4, poll
    assert mine.claim([work()]) != [None]
    for polling in polls:
        polling.join(10)
    assert told and "" not in told[:-1] and told[-1] == "", told
