"""`notify`: what an operator wants to know goes to a command, which can never be in the way of anything."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Database, wait_for
from hostile import FtpHost, Site, unused_port
from members import PATIENCE, Crew, alive, ftpcoord, kinds
from memory import config

# Appends what it gets, and where it runs, as one line; `hang` and `fail` in its folder are orders.
RECEIVER = """\
import json, os, sys, time
folder = sys.argv[1]
def there(name): return os.path.exists(os.path.join(folder, name))
told = json.load(sys.stdin)
told["environment"] = sorted(name for name in os.environ if name.startswith(("FTPCOORD_", "NOTIFY_")))
told["pid"] = os.getpid()
told["began"] = time.time()
if there("hang"):
    if os.fork() == 0: time.sleep(600)
    with open(os.path.join(folder, "hanging"), "a") as out: out.write(f"{os.getpid()}\\n")
    time.sleep(600)
told["ended"] = time.time()
with open(os.path.join(folder, "told"), "a") as out: out.write(json.dumps(told) + "\\n")
if there("fail"): sys.exit(3)
"""


class Desk:
    """Where an operator's messages arrive."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "desk"
        self.folder.mkdir()
        (self.folder / "receiver.py").write_text(RECEIVER)
        words = [sys.executable, "-I", "-S", str(self.folder / "receiver.py"), str(self.folder)]
        self.command = " ".join(map(shlex.quote, words))

    def told(self, name: str = "") -> list[dict[str, Any]]:
        path = self.folder / "told"
        whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
        return [one for one in map(json.loads, whole.splitlines()) if name in ("", one["event"])]

    def wait(self, name: str, count: int = 1) -> dict[str, Any]:
        wait_for(lambda: len(self.told(name)) >= count, PATIENCE, f"{name}: {self.told()}")
        return self.told(name)[count - 1]

    def order(self, name: str) -> None:
        (self.folder / name).touch()


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The events of a herald itself."""
    events: list[tuple[str, dict[str, Any]]] = []
    real = ftpcoord.event

    def event(what: str, level: int = 20, **fields: Any) -> None:
        events.append((what, fields))
        real(what, level, **fields)

    monkeypatch.setattr(ftpcoord, "event", event)
    return events


@contextlib.contextmanager
def herald(desk: Desk, **settings: Any) -> Iterator[Any]:
    made = ftpcoord.Herald(config(coordination_group="g", notify=desk.command, **settings))
    made.start()
    try:
        yield made
    finally:
        made.close()


def test_a_quarantined_file_is_told_with_why_and_nothing_secret(tmp_path: Path, desk: Desk) -> None:
    class Refusing(Site):
        def receive(self, file: ftpcoord.File) -> None:
            raise ValueError("card number 4111")

    settings = {"notify": desk.command, "max_attempts": 1}
    with FtpHost(files={"bad\x1b[31m.csv": b"x"}) as host:
        with Refusing(tmp_path, host.settings, "handler", **settings) as site:
            told = desk.wait("file_quarantined")
            group = site.listener.config.coordination_group
    assert told["group"] == group and told["member"] == "a" and told["count"] == 1 and told["term"] == 1
    assert told["paths"] == ["/in/bad%1B[31m.csv"] and told["error"] == "ValueError: card number 4111"
    assert told["environment"] == [] and told["time"].endswith("Z")


@pytest.mark.parametrize("kind", [ftpcoord.Listener, ftpcoord.Coordinator])
def test_a_database_that_is_away_from_the_start_on_is_told(tmp_path: Path, desk: Desk, kind: Any) -> None:
    settings = {"database": f"postgresql://u:p@127.0.0.1:{unused_port()}/d", "notify": desk.command, "member_id": "a"}
    settings.update(
        {"url": "ftp://u@127.0.0.1:1/in", "download_dir": str(tmp_path)} if kind is ftpcoord.Listener else {}
    )
    for number in range(1, 9):
        member = kind(coordination_group="g", heartbeat_frequency=0.2, liveness_check_interval=3, **settings)
        member.start()
        told = desk.wait("database_down", number)
        assert told["group"] == "g" and told["count"] == 1
        member.stop()
        assert kind is ftpcoord.Coordinator or member.join(PATIENCE)


def test_a_second_start_is_refused_and_what_comes_is_told_on(tmp_path: Path, desk: Desk) -> None:
    with FtpHost(files={}) as host, Site(tmp_path, host.settings, notify=desk.command) as site:
        site.wait("polled")
        with pytest.raises(ftpcoord.Error, match="started before"):
            site.listener.start()
        ftpcoord.event("lost", 20, group=site.listener.config.coordination_group, term=1)
        assert desk.wait("lost")["count"] == 1
        site.polls()


def test_a_handlers_words_are_told_only_with_error_output(desk: Desk) -> None:
    with herald(desk, error_output=False):
        ftpcoord.event("file_quarantined", 20, group="g", path="/in/a", error="card number 4111")
        ftpcoord.event("not_now", 20, group="g", error="card number 4111", files=3)
        ftpcoord.event("database_down", 20, group="g", error="refused")
        assert "error" not in desk.wait("file_quarantined") and "error" not in desk.wait("not_now")
        assert desk.wait("database_down")["error"] == "refused"


def test_an_event_is_told_at_once_then_once_a_minute_with_its_number(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ftpcoord, "NOTIFY_EVERY", 2.0)
    with herald(desk):
        ftpcoord.event("file_quarantined", 20, group="g", path="/in/first")
        first = desk.wait("file_quarantined")
        for number in range(50):
            ftpcoord.event("file_quarantined", 20, group="g", path=f"/in/{number}", attempt=number)
        ftpcoord.event("server_down", 20, group="g", error="refused")
        other = desk.wait("server_down")
        second = desk.wait("file_quarantined", 2)
    assert first["count"] == 1 and first["paths"] == ["/in/first"]
    assert other["began"] < second["began"] and second["began"] - first["began"] > 1.5, "others are not held up"
    assert second["count"] == 50 and second["attempt"] == 49
    assert second["paths"] == [f"/in/{number}" for number in range(20)]
    assert len(desk.told("file_quarantined")) == 2


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("down, up", [("server_down", "server_up"), ("not_now", "not_now_over")])
def test_the_last_that_is_told_of_a_thing_is_the_last_that_was_said_of_it(
    down: str, up: str, end: bool, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(ftpcoord, "boot_clock", lambda: now)
    with herald(desk):
        for name in (down, up):
            ftpcoord.event(name, 20, group="g")
            desk.wait(name)
            now += 30.0
        for number, name in enumerate((down, up, down)):
            ftpcoord.event(name, 20, group="g", number=number)
        if not end:
            now = 61.0  # the minute of the one is over, but not of the other, which was said before it
            ftpcoord.event("lost", 20, group="g")
            desk.wait("lost")
            now = 91.0
            desk.wait(down, 2)
    told = [(one["event"], one["count"], one.get("number")) for one in desk.told() if one["event"] != "lost"]
    assert told == [(down, 1, None), (up, 1, None), (up, 1, 1), (down, 2, 2)]


def test_only_what_an_operator_wants_to_know_of_this_group_is_told(desk: Desk) -> None:
    with herald(desk):
        ftpcoord.event("polled", 20, group="g")
        ftpcoord.event("file_done", 20, group="g", path="/in/a")
        ftpcoord.event("lost", 20, group="other", term=3)
        ftpcoord.event("lost", 10, group="g", term=4)  # whatever log_level is
    assert [(one["event"], one["term"], one["count"]) for one in desk.told()] == [("lost", 4, 1)]
    assert {
        "file_quarantined",
        "file_missing",
        "file_late",
        "server_down",
        "server_up",
        "database_down",
        "database_up",
        "lost",
        "not_now",
        "not_now_over",
        "group_paused",
        "group_resumed",
    } == ftpcoord.NOTIFIED


def test_one_command_runs_at_a_time_and_one_that_hangs_is_killed_with_its_group(
    desk: Desk, said: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ftpcoord, "NOTIFY_SECONDS", 1.0)
    desk.order("hang")
    with herald(desk):
        began = time.monotonic()
        for number in range(1000):
            ftpcoord.event("server_down", 5, group="g", number=number)
            ftpcoord.event("lost", 5, group="g", number=number)
        assert time.monotonic() - began < 1, "nobody waits for it"
        hanging = desk.folder / "hanging"
        wait_for(lambda: hanging.exists() and hanging.read_text(), PATIENCE)
        (desk.folder / "hang").unlink()
        pid = int(hanging.read_text())
        assert alive(pid) and not desk.told()
        desk.wait("lost")
        assert not alive(pid) and not [one for one in os.listdir("/proc") if one.isdigit() and of_group(one, pid)]
    failed = [fields for what, fields in said if what == "notify_failed"]
    assert failed and failed[0]["about"] == "server_down" and "longer than 1 s" in failed[0]["error"]
    assert sum(one["count"] for one in desk.told()) + failed[0]["count"] == 2000, (
        "those that came meanwhile are counted"
    )


def of_group(pid: str, group: int) -> bool:
    try:
        return os.getpgid(int(pid)) == group and alive(int(pid))
    except OSError:
        return False


@pytest.mark.parametrize("how", ["exits with 3", "is not there"])
def test_a_command_that_fails_is_said_in_the_log_and_not_to_itself(
    desk: Desk, said: list[tuple[str, dict[str, Any]]], how: str
) -> None:
    desk.order("fail")
    if how == "is not there":
        desk.command = str(desk.folder / "nothing")
    with herald(desk):
        ftpcoord.event("lost", 20, group="g")
        wait_for(lambda: [fields for what, fields in said if what == "notify_failed"], PATIENCE)
        failed = [fields for what, fields in said if what == "notify_failed"]
        assert failed[0]["about"] == "lost" and ("it exited with 3" in failed[0]["error"]) == (how == "exits with 3")
    assert len(desk.told()) <= 1


def test_at_the_end_what_waits_is_told_and_a_command_that_hangs_holds_it_up_for_no_longer(
    desk: Desk, said: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with herald(desk) as made:
        for number in range(5):
            ftpcoord.event("lost", 20, group="g", number=number)
        desk.wait("lost")
        made.close()
        assert sum(one["count"] for one in desk.told("lost")) == 5, "although its minute is not over"
    monkeypatch.setattr(ftpcoord, "NOTIFY_AT_END", 1.0)
    desk.order("hang")
    with herald(desk) as made:
        ftpcoord.event("lost", 20, group="g")
        wait_for((desk.folder / "hanging").exists, PATIENCE)
        for _ in range(7):
            ftpcoord.event("server_up", 20, group="g")
        began = time.monotonic()
        made.close()
        assert time.monotonic() - began < 3
        pid = int((desk.folder / "hanging").read_text())
        wait_for(lambda: not alive(pid), PATIENCE)
    assert ("notify_failed", {"group": "g", "dropped": 7}) in said
    wait_for(lambda: not [one for one in threading.enumerate() if one.name == "ftpcoord-notify"], PATIENCE)


@kinds("postgresql")
def test_a_stop_releases_first_and_then_tells_what_waits(
    database: Database, files: Any, tmp_path: Path, desk: Desk
) -> None:
    with Crew(tmp_path, database, files, notify=desk.command) as crew:
        a = crew.start("a")
        a.wait("elected")
        b = crew.start("b")
        b.wait("standby")
        desk.order("hang")
        crew.call("pause")
        wait_for((desk.folder / "hanging").exists, PATIENCE)
        began = time.time()
        a.send(signal.SIGTERM)
        elected = b.wait("elected")
        assert elected.at - began < crew.heartbeat + 2, "nobody waits for the command"
        assert a.process.wait(20) == 0
        assert time.time() - began < 5 + 5
        (desk.folder / "hang").unlink()
        assert "exec" not in a.said() and not a.events("lost")


def test_its_arguments_may_hold_a_token_and_are_shown_nowhere(
    tmp_path: Path, desk: Desk, said: list[tuple[str, dict[str, Any]]]
) -> None:
    with FtpHost(files={}) as host:
        with Site(tmp_path, host.settings, notify=f"{sys.executable} -c 'raise SystemExit(4)' s3cr3t-token") as site:
            ftpcoord.event("lost", 20, group=site.listener.config.coordination_group, term=9)
            wait_for(lambda: [fields for what, fields in said if what == "notify_failed"], PATIENCE)
            status = ftpcoord.listener_status(site.listener, ftpcoord.Survey(site.listener.config))
            assert status["settings"]["notify"] == f"{sys.executable} ... (3 arguments)"
            assert "s3cr3t" not in json.dumps(status) + ftpcoord.page([status], 0) + "\n".join(site.log)
    assert "s3cr3t" not in repr(said)


def test_check_tells_of_a_command_that_is_not_there(crew: Crew) -> None:
    done = crew.call("check", notify="/nowhere/pager --now")
    assert done.returncode == 2 and done.stderr.startswith("ftpcoord: notify: /nowhere/pager is not a command here")


@pytest.mark.parametrize("words", ["'", " ", "''x' "])
def test_a_command_that_cannot_be_split_is_a_wrong_setting(words: str) -> None:
    with pytest.raises(ftpcoord.ConfigError, match=r"^notify: "):
        config(notify=words)
