"""Settings, listings and rows in memory, and a clock that a test sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftpcoord import Choice, Config, Entry, Found, Look, Row, Selector, Work, Workplace

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


def look(*listing: Found) -> Look:
    """A whole one."""
    made = Look()
    made.extend(listing)
    return made


def choose(selector: Selector, listing: Sequence[Found], *rows: Row, busy: Sequence[str] = ()) -> Choice:
    known = {one.path: one for one in rows}
    return selector.choose(look(*listing), known.get, set(busy))


def names(works: Sequence[Work]) -> list[str]:
    return [work.found.relative for work in works]


def part_of(place: Workplace, file: Found) -> Path:
    """A copy in the making."""
    copy = place.create(file)
    copy.close()
    return copy.part
