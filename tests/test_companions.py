"""Companions: what a file needs beside it, whose fate they share, and that they are never files themselves."""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import FILE_SERVERS, Files, new_folder, wait_for
from hostile import PATIENCE, FtpHost, Site, reply
from hypothesis import given
from hypothesis import strategies as st
from memory import choose, config, found, names, row

import ftpcoord
from ftpcoord import Companions, ConfigError, Selector

EARLY, LATE = "2026-01-12T10:00", "2026-01-12T14:00"
TEMPLATES = {
    "{name}.ok": "a.csv.ok",
    "{stem}.sum": "a.sum",
    "ok-{name}": "ok-a.csv",
    ".{stem}.done": ".a.done",
    "x{stem}": "xa",
}


def ready(*listing: Any, **settings: Any) -> list[str]:
    files = [found(each) if isinstance(each, str) else each for each in listing]
    return names(choose(Selector(config(**settings), time.monotonic), files).ready)


# -- what makes a file ready ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("template", "name"), TEMPLATES.items())
def test_a_file_is_ready_when_its_companion_is_in_its_folder_and_not_older(template: str, name: str) -> None:
    assert ready("a.csv", name, requires=template) == ["a.csv"]
    assert ready("a.csv", found(name, mtime=LATE), requires=template) == ["a.csv"]
    assert ready("a.csv", found(name, mtime=EARLY), requires=template) == []
    assert ready("a.csv", f"x/{name}", requires=template) == []
    assert ready("x/a.csv", f"x/{name}", requires=template) == ["x/a.csv"]
    assert ready(name, requires=template) == [], "a companion is no file"


def test_all_companions_must_be_there() -> None:
    wanted = {"requires": "{name}.ok, {stem}.sum"}
    assert ready("a.csv", "a.csv.ok", **wanted) == ready("a.csv", "a.sum", **wanted) == []
    assert ready("a.csv", "a.csv.ok", found("a.sum", mtime=EARLY), **wanted) == []
    assert ready("a.csv", "a.csv.ok", "a.sum", **wanted) == ["a.csv"]


def test_the_stem_is_the_name_without_its_last_suffix() -> None:
    listing = ("a.tar.gz", "a.tar.sum", "README", "README.sum", "b.tar.gz", "b.sum")
    assert ready(*listing, requires="{stem}.sum") == ["README", "a.tar.gz"]


def test_several_files_may_share_a_companion() -> None:
    assert ready("a.csv", "a.xml", "a.sum", "b.csv", requires="{stem}.sum") == ["a.csv", "a.xml"]


def test_companions_are_found_in_any_case_if_that_is_asked_for() -> None:
    assert ready("A.CSV", "a.csv.ok", "b.csv", "B.csv.OK", requires="{name}.Ok", ignore_case=True) == ["A.CSV", "b.csv"]
    assert ready("A.CSV", "a.csv.ok", "b.csv", "B.csv.ok", requires="{name}.ok") == []


TEXTS = st.text("a.b-", max_size=3)


@given(TEXTS, st.sampled_from(["{name}", "{stem}"]), TEXTS, TEXTS)
def test_a_name_is_a_companions_with_anything_in_the_braces(before: str, place: str, after: str, name: str) -> None:
    """Against a slow, obvious model: every text is tried."""
    if not before + after:
        return
    parts = {name[begin:end] for begin in range(len(name) + 1) for end in range(begin, len(name) + 1)}
    try:
        companions = Companions(config(requires=f"{before}{place}{after}", pattern="zzz"))
    except ConfigError:
        return  # of spaces or the like nothing is left
    assert companions.include(name) == any(before + part + after == name for part in parts)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ok", "must have"),
        ("{Name}.ok", "must have"),
        ("{name}{stem}.ok", "must have"),
        ("ok/{name}", "no slash"),
        ("{name}.ok, done/{stem}", "no slash"),
        ("{name}", "the file itself"),
        ("{stem}", "the file itself"),
        ("{stem}.csv", "the file itself"),
    ],
)
def test_a_template_that_cannot_be_is_a_wrong_setting(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"^requires: .*{told}"):
        config(requires=text, pattern="*.xml,*.csv")


def test_a_template_that_would_be_the_file_in_another_case_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigError, match=r"^requires: .*the file itself"):
        config(requires="{stem}.CSV", pattern="*.csv", ignore_case=True)
    assert config(requires="{stem}.CSV", pattern="*.csv").companions() == ["{stem}.CSV"]


def test_the_older_form_is_the_same_is_said_once_and_not_both(caplog: pytest.LogCaptureFixture) -> None:
    old, new = config(ready_suffix=".ok"), config(requires="{name}.ok")
    assert old.companions() == new.companions() == ["{name}.ok"]
    with pytest.raises(ConfigError, match=r"^ready_suffix and requires: .*\{name\}\.ok"):
        config(ready_suffix=".ok", requires="{name}.sum")
    caplog.set_level(logging.WARNING)
    ftpcoord._warned.clear()
    for _ in range(2):
        ftpcoord.warn_of_weaknesses(old)
        ftpcoord.warn_of_weaknesses(new)
    said = [record.fields["reason"] for record in caplog.records if record.fields["setting"] == "ready_suffix"]  # type: ignore[attr-defined]
    assert len(said) == 1 and "requires = {name}.ok" in said[0]


# -- what becomes of them ---------------------------------------------------------------------------------------------


def seen(*files: str, **settings: Any) -> Companions:
    selector = Selector(config(requires="{stem}.sum", **settings), time.monotonic)
    choose(selector, [found(name) for name in files])
    return selector.companions


@pytest.mark.parametrize("state", ["", "claimed", "failed", "quarantined"])
def test_a_companion_stays_while_another_listed_file_that_needs_it_is_not_done(state: str) -> None:
    companions = seen("a.csv", "a.xml", "a.sum", "b.csv", "x/a.txt")
    rows = {"/in/a.csv": row("a.csv"), **({"/in/a.xml": row("a.xml", state=state)} if state else {})}
    assert companions.needed("/in/a.sum", "/in/a.csv", rows.get)
    assert not companions.needed("/in/a.sum", "/in/a.xml", rows.get), "the other one is done"
    rows["/in/a.xml"] = row("a.xml")
    assert not companions.needed("/in/a.sum", "/in/a.csv", rows.get)
    rows["/in/a.xml"] = row("a.xml", size=11)
    assert companions.needed("/in/a.sum", "/in/a.csv", rows.get), "of another version"


def test_what_is_not_asked_for_needs_no_companion() -> None:
    companions = seen("a.csv", "a.xml", "a.tmp", "a.sum", pattern="*.csv")
    assert not companions.needed("/in/a.sum", "/in/a.csv", lambda path: None)


def test_a_file_that_was_removed_needs_none_until_it_is_uploaded_anew() -> None:
    selector = Selector(config(requires="{stem}.sum"), time.monotonic)
    listing = [found(name) for name in ("a.csv", "a.xml", "a.sum")]

    def needed() -> bool:
        return selector.companions.needed("/in/a.sum", "/in/a.xml", lambda path: None)

    choose(selector, listing)
    assert needed()
    selector.companions.gone("/in/a.csv")
    assert not needed()
    choose(selector, listing, busy=["/in/a.csv"])
    assert not needed(), "that listing was of before"
    choose(selector, listing)
    assert needed()


def test_a_shared_companion_goes_with_the_last_of_its_files(tmp_path: Path) -> None:
    with FtpHost({"a.csv": b"1", "a.xml": b"2", "a.sum": b"", "b.csv": b"3", "b.sum": b"", "c.sum": b""}) as host:
        site = Site(tmp_path, host.settings, "handler", requires="{stem}.sum", after="delete", max_attempts=1000)
        failing = ["a.xml"]

        @site.listener.on_file("*.xml")
        def handle(file: ftpcoord.File) -> None:
            if file.name in failing:
                raise ValueError("not yet")

        site.listener._routes.reverse()
        with site:
            wait_for(lambda: set(host.files) == {"a.xml", "a.sum", "c.sum"}, PATIENCE, "\n".join(site.log[-20:]))
            site.wait("file_failed", 3, path="/in/a.xml")
            failing.clear()
            wait_for(lambda: set(host.files) == {"c.sum"}, PATIENCE, "\n".join(site.log[-20:]))
            wait_for(lambda: site.row("a.xml") is None, PATIENCE)
        assert host.said("DELE").index("DELE /in/a.csv") < host.said("DELE").index("DELE /in/a.sum")
        assert host.said("DELE").index("DELE /in/b.sum") < host.said("DELE").index("DELE /in/b.csv")


def test_a_shared_companion_goes_with_the_last_of_its_files_also_within_one_poll(tmp_path: Path) -> None:
    with FtpHost({"a.csv": b"1", "a.xml": b"2", "a.sum": b""}) as host:

        class Waiting(Site):
            def receive(self, file: ftpcoord.File) -> None:
                if file.name == "a.xml":
                    wait_for(lambda: "a.csv" not in host.files and self.row("a.csv") is None, PATIENCE)

        settings = {"requires": "{stem}.sum", "after": "delete", "polling_interval": 60}
        with Waiting(tmp_path, host.settings, "handler", **settings) as site:
            wait_for(lambda: not host.files, PATIENCE, "\n".join(site.log[-20:]))


def test_an_after_action_that_is_due_at_a_takeover_leaves_what_another_file_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is acted on before the first listing has told who needs what, however long a look at it takes."""
    settings = {"requires": "{stem}.sum", "after": "delete", "max_attempts": 1000}
    with FtpHost({"a.csv": b"1", "a.sum": b""}) as host:
        host.on("DELE", reply("450 busy"), times=None)
        with Site(tmp_path, host.settings, "handler", **settings) as site:
            site.wait("file_failed")
        with contextlib.closing(sqlite3.connect(tmp_path / "coordination.db")) as database, database:
            assert database.execute("UPDATE file_ledger SET next_attempt_at = NULL").rowcount == 1
        host.put("a.xml", b"2")
        host.behave()
        choose = Selector.choose

        def slowly(*arguments: Any) -> ftpcoord.Choice:
            with contextlib.suppress(AssertionError):
                wait_for(lambda: "a.csv" not in host.files, 0.5)
            return choose(*arguments)

        monkeypatch.setattr(Selector, "choose", slowly)

        class Failing(Site):
            def receive(self, file: ftpcoord.File) -> None:
                if not self.all("file_failed"):
                    raise ValueError
                assert "a.sum" in host.files

        with Failing(tmp_path, host.settings, "handler", **settings) as site:
            wait_for(lambda: not host.files, PATIENCE, "\n".join(site.log[-20:]))
            site.wait("file_done", path="/in/a.xml")


def test_while_a_group_is_paused_nobody_acts_before_it_is_known_who_needs_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"requires": "{stem}.sum", "after": "delete", "max_attempts": 1000}
    with FtpHost({"a.csv": b"1", "a.sum": b""}) as host:
        host.on("DELE", reply("450 busy"), times=None)
        with Site(tmp_path, host.settings, "handler", **settings) as site:
            site.wait("file_failed")
        with contextlib.closing(sqlite3.connect(tmp_path / "coordination.db")) as database, database:
            assert database.execute("UPDATE file_ledger SET next_attempt_at = NULL").rowcount == 1
        host.behave()
        ftpcoord.command_pause([site.listener.config], argparse.Namespace(seconds=None))
        sessions, act, looks = host.sessions, ftpcoord.Poller._act_where_due, []

        def noted(poller: ftpcoord.Poller, busy: set[str]) -> None:
            act(poller, busy)
            looks.append(len(poller.workers.busy))

        monkeypatch.setattr(ftpcoord.Poller, "_act_where_due", noted)
        with Site(tmp_path, host.settings, "handler", **settings):
            wait_for(lambda: len(looks) > 3, PATIENCE)
        assert not any(looks) and host.sessions == sessions and len(host.files) == 2


@pytest.mark.parametrize("newer", ["a.csv.ok", "a.sum"])
def test_if_one_of_the_companions_is_newer_than_at_the_claim_none_is_removed(tmp_path: Path, newer: str) -> None:
    files = {"a.csv": b"1", "a.csv.ok": b"", "a.sum": b""}
    with FtpHost(files) as host:

        class Slow(Site):
            def receive(self, file: ftpcoord.File) -> None:
                super().receive(file)
                host.put(newer, b"", 60)

        with Slow(tmp_path, host.settings, "handler", requires="{name}.ok,{stem}.sum", after="delete") as site:
            site.wait("file_kept")
            site.polls()
            assert set(host.files) == set(files) and len(site.handled) == 1


def test_companions_in_another_case_share_the_fate_of_their_file(tmp_path: Path) -> None:
    with FtpHost({"A.CSV": b"1", "a.csv.Ok": b"", "b.csv": b"2"}) as host:
        with Site(tmp_path, host.settings, requires="{name}.ok", ignore_case=True, after="delete") as site:
            site.arrive({"A.CSV": b"1"})
            wait_for(lambda: set(host.files) == {"b.csv"}, PATIENCE, "\n".join(site.log[-20:]))


def test_the_dry_run_names_what_is_missing_and_what_is_a_companion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FtpHost({"a.csv": b"1", "a.csv.ok": b"", "b.csv": b"2", "b.csv.ok": b"", "b.sum": b""}) as host:
        settings = {**host.settings, "database": f"sqlite:///{tmp_path / 'coordination.db'}", "settle": 0}
        ftpcoord.command_dry_run([ftpcoord.Config(**settings, exec="true", requires="{name}.ok, {stem}.sum")])
    said = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()}
    assert re.match(r"skip .*its marker \{stem\}\.sum is not there$", said["/in/a.csv"])
    assert said["/in/b.csv"].startswith("take") and said["/in/b.sum"].endswith("a companion of files")


# -- on real servers --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["vsftpd", "sshd"])
def real(request: pytest.FixtureRequest) -> Iterator[Files]:
    with new_folder(request.param, request.getfixturevalue(FILE_SERVERS[request.param])) as files:
        yield files


@pytest.mark.parametrize("after", ["delete", "move:done"])
def test_companions_are_waited_for_and_end_with_their_file(real: Files, tmp_path: Path, after: str) -> None:
    for name in ("a.csv", "a.xml", "a.sum", "b.csv", "b.csv.ok", "a.csv.ok"):
        real.put(name, name.encode())
    with Site(tmp_path, real.settings, requires="{name}.ok, {stem}.sum", after=after) as site:
        site.arrive({"a.csv": b"a.csv"})
        left = ["a.sum", "a.xml", "b.csv", "b.csv.ok", *(["done"] if after != "delete" else [])]
        wait_for(lambda: real.names() == left, PATIENCE, "\n".join(site.log[-20:]))
        real.put("a.xml.ok")
        site.arrive({"a.csv": b"a.csv", "a.xml": b"a.xml"})
        wait_for(lambda: real.names() == [name for name in left if name[0] != "a"], PATIENCE, "\n".join(site.log[-20:]))
