"""`pause` and `resume`: no new polls and claims, and everybody is shown who wants that, since when and until when."""

from __future__ import annotations

import contextlib
import getpass
import json
import re
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any, Optional

import pytest
import servers
from conftest import Database, Files, wait_for
from members import Crew, Member, ftpcoord, kinds, never
from memory import Clock, config

ME = f"{getpass.getuser()}@{socket.gethostname()}"


def pause(crew: Crew, *more: str) -> subprocess.CompletedProcess[str]:
    done = crew.call("pause", *more)
    assert done.returncode == 0, done.stderr
    return done


def resume(crew: Crew) -> str:
    done = crew.call("resume")
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def paused(member: Member, since: float = 0.0) -> dict[str, str]:
    found: dict[str, str] = member.wait("group_paused", since=since).fields
    return found


@kinds("postgresql", "mysql", "sqlite")
def test_a_paused_group_takes_nothing_new_keeps_its_lease_and_goes_on_when_it_is_resumed(
    database: Database, files: Files, tmp_path: Path
) -> None:
    with Crew(tmp_path, database, files, after="delete", workers=1) as crew:
        a = crew.start("a")
        crew.hold()
        files.put("1.csv", b"x")
        files.put("2.csv", b"x")
        crew.begun(1)
        said = pause(crew).stdout
        assert f"group crew is paused by {ME} since " in said and "until it is resumed" in said
        fields = paused(a)
        assert fields["by"] == ME and re.fullmatch(r"2\d{3}-\d\d-\d\dT\d\d:\d\d:\d\dZ", fields["since"])
        files.put("3.csv", b"x")
        crew.let_go()
        # What it has ends, its after-action included; what only waited in the queue is not claimed.
        crew.handled("1.csv")
        wait_for(lambda: files.names() == ["2.csv", "3.csv"])
        polls = a.polls()
        never(lambda: a.polls() > polls + 1 or len(crew.runs("begin")) > 1, 4 * crew.heartbeat, "it went on")
        assert not a.events("lost") and not a.events("released") and len(a.events("group_paused")) == 1
        assert resume(crew) == "group crew is resumed\n"
        crew.handled("1.csv", "2.csv", "3.csv")
        wait_for(lambda: files.names() == [])
        assert len(a.events("group_resumed")) == 1
        assert {run.attempt for run in crew.runs()} == {1}
        assert resume(crew) == "group crew was not paused\n"


def test_a_pause_outlives_a_takeover_and_ends_at_its_time_by_itself(
    postgresql: Database, files: Files, tmp_path: Path
) -> None:
    with Crew(tmp_path, postgresql, files) as crew:
        a = crew.start("a")
        a.wait("elected")
        pause(crew, "--for", "1d")
        until = paused(a)["until"]
        assert a.kill() and until > ftpcoord.utc_second(time.time() + 80000)
        b = crew.start("b")
        files.put("1.csv", b"x")
        b.wait("elected")
        assert paused(b)["until"] == until
        never(lambda: crew.runs("begin") or b.polls(), 3 * crew.heartbeat, "the new active member polls")
        # The second pause is in the place of the first.
        began = time.time()
        pause(crew, "--for", "3s")
        assert paused(b, since=began)["until"] < until
        crew.handled("1.csv")
        assert time.time() - began >= 3 and b.wait("group_resumed").at - began < 3 + 1 + 2
        assert not b.events("lost")


def test_a_pause_is_shown_everywhere_and_does_not_make_a_member_unready(crew: Crew) -> None:
    port = servers.free_port()
    a = crew.start("a", http=f"127.0.0.1:{port}")
    a.wait("elected")
    files = [f"http://127.0.0.1:{port}/{name}" for name in ("status", "metrics", "readyz", "")]

    def got(number: int) -> str:
        with contextlib.closing(urllib.request.urlopen(files[number], timeout=10)) as answer:
            return str(answer.read().decode())

    assert crew.status()["paused"] is None and crew.call("status", "--check").returncode == 0
    wait_for(lambda: 'ftpcoord_paused{group="crew",member="a"} 0.0' in got(1))
    pause(crew, "--for", "2h")
    found = crew.status()["paused"]
    assert found["by"] == ME and found["since"] < found["until"], found
    words = f"paused by {ME} since {found['since']}, until {found['until']}"
    assert words in crew.call("status").stdout
    checked = crew.call("status", "--check")
    assert checked.returncode == 1 and words in checked.stdout
    assert words in crew.run("run", "--dry-run").stdout
    wait_for(lambda: json.loads(got(0))["paused"] == found)
    assert words in got(3) and 'ftpcoord_paused{group="crew",member="a"} 1.0' in got(1)
    paused(a)
    assert got(2) == "crew: ok\n"
    assert [row["member_id"] for row in crew.status()["members"]] == ["a"]


def test_after_actions_that_are_due_go_on_while_the_group_is_paused(crew: Crew) -> None:
    crew.files.put("1.csv", b"x")
    assert crew.run("run", "--once").returncode == 0
    crew.database.execute("UPDATE file_ledger SET action = 'delete'")  # as a crash before it leaves it
    pause(crew)
    a = crew.start("a", after="delete")
    paused(a)
    wait_for(lambda: crew.files.names() == [])
    wait_for(lambda: crew.ledger() == [])
    assert not a.events("polled")


def test_run_once_says_that_the_group_is_paused_and_exits_with_1(crew: Crew) -> None:
    crew.files.put("1.csv", b"x")
    pause(crew)
    done = crew.run("run", "--once")
    assert done.returncode == 1 and " group_paused " in done.stdout and " polled " not in done.stdout, done.stdout
    resume(crew)
    assert crew.run("run", "--once").returncode == 0
    crew.handled("1.csv")


@kinds("postgresql", "sqlite")
def test_without_a_ledger_it_is_the_same(database: Database, files: Files, tmp_path: Path) -> None:
    with Crew(tmp_path, database, files, ledger="off", after="delete") as crew:
        pause(crew)
        files.put("1.csv", b"x")
        a = crew.start("a")
        paused(a)
        never(lambda: a.polls(), 3 * crew.heartbeat, "it polls")
        resume(crew)
        crew.handled("1.csv")


@pytest.mark.parametrize("rows", [1, 3])
def test_pauses_are_no_trace_of_a_group(tmp_path: Path, rows: int) -> None:
    """A group that never had a member starts at once, under its first term, however often it was paused before."""
    settings = {"database": f"sqlite:///{tmp_path / 'c.db'}", "heartbeat_frequency": 0.2, "liveness_check_interval": 4}
    member = ftpcoord.Coordinator(coordination_group="g", member_id="a", **settings)
    with contextlib.closing(ftpcoord.open_database(member.config)) as database:
        for number in range(rows):
            database.ask("g", f"pause:0:me@host{number}")
    began = time.monotonic()
    with member:
        lease = next(member.leases())
        assert lease.term == 1 and time.monotonic() - began < 2


@pytest.mark.parametrize("words", ["", "2", "h", "0h", "-2h", "2 h", "2w", "1.5h", "9999999d"])
def test_a_wrong_duration_is_wrong_usage(crew: Crew, words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        crew.call("pause", f"--for={words}")
    assert ended.value.code == 2
    assert crew.status()["paused"] is None


def test_a_change_is_said_once_and_a_pause_again_every_hour(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(ftpcoord, "event", lambda what, *args, **fields: said.append(what))

    class Pauses:
        found: Optional[dict[str, Any]] = None
        asked = 0

        def prepare(self) -> None:
            pass

        def pauses(self, group: str) -> tuple[float, list[str], Optional[dict[str, Any]]]:
            self.asked += 1
            return 0.0, [], self.found

    database = Pauses()
    hold = ftpcoord.Hold(config(polling_interval=60), database)

    def after(seconds: float, found: Optional[str]) -> tuple[bool, list[str]]:
        clock.now += seconds
        database.found = found and {"by": found, "since": "", "until": None}  # type: ignore[assignment]
        said.clear()
        return hold.look(), list(said)

    assert after(0, None) == (False, [])
    assert after(4.9, "me") == (False, []), "not asked again so soon"
    assert after(0.1, "me") == (True, ["group_paused"])
    for _ in range(359):
        assert after(10, "me") == (True, [])
    assert after(10, "me") == (True, ["group_paused"])
    assert after(10, "you") == (True, ["group_paused"])
    assert after(10, None) == (False, ["group_resumed"])
    assert after(10, None) == (False, [])
    asked = database.asked
    after(1, None)
    assert database.asked == asked
