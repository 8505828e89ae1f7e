"""Settings, listings and rows in memory, and a clock that a test sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ftpcoord
from ftpcoord import Change, Choice, Config, Entry, Fence, Found, Row, Selector, Work, Workplace

NOON = "2026-01-12T12:00"


def config(**more: Any) -> Config:
    values = {"url": "ftp://me@h/in", "database": "sqlite:///x", "settle": 0, "member_id": "a", **more}
    return Config(**values)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def found(name: str = "a.csv", size: int = 10, mtime: str = NOON) -> Found:
    return Found(f"/in/{name}", name, Entry(name.rpartition("/")[2], "file", size, mtime))


def row(name: str = "a.csv", state: str = "done", **more: Any) -> Row:
    return Row(f"/in/{name}", 10, NOON, state, 1, 1, 0)._replace(**more)


def choose(selector: Selector, listing: Sequence[Found], *rows: Row, busy: Sequence[str] = ()) -> Choice:
    known = {one.path: one for one in rows}
    return selector.choose(listing, known.get, set(busy))


def names(works: Sequence[Work]) -> list[str]:
    return [work.found.relative for work in works]


def part_of(place: Workplace, file: Found) -> Path:
    """A copy in the making."""
    path, out = place.create(file)
    out.close()
    return path


class MemoryRows:
    """A database's rows of one group, without the database."""

    def __init__(self) -> None:
        self._rows: dict[str, Row] = {}

    def rows(self, group: str, only_open: bool = False) -> Iterator[Row]:
        now = ftpcoord.boot_clock()
        for row in list(self._rows.values()):
            if not only_open or row.state != "done" or row.action:
                yield row._replace(due=None if row.due is None else row.due - now)

    def done_count(self, group: str) -> int:
        return sum(row.state == "done" and not row.action for row in self._rows.values())

    def write(self, fence: Fence, changes: Sequence[Change]) -> list[bool]:
        return [self._change(fence.term, change) for change in changes]

    def _change(self, term: int, change: Change) -> bool:
        path = change.path
        row = self._rows.get(path)
        if (row and row[1:6]) != (change.old and change.old[1:6]):
            return False
        if change.new is None:
            self._rows.pop(path, None)
        else:
            due = None if change.delay is None else ftpcoord.boot_clock() + change.delay
            self._rows[path] = change.new._replace(term=term, due=due)
        return True

    def written(self, fence: Fence, changes: Sequence[Change]) -> list[bool]:
        return [False] * len(changes)
