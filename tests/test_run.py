"""`run` and `run --once`: what they end with, how they stop, what the command and the log get."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import servers
from conftest import Database, Files, new_database, wait_for
from members import PATIENCE, PROGRAM, Crew, Member, ftpcoord, never

# ----------------------------------------------------------------------------- run --once


def test_run_once_handles_all_there_is_and_ends_with_0(crew: Crew) -> None:
    assert crew.run("run", "--once").returncode == 0
    names = [f"{number:02}.txt" for number in range(20)]
    for name in names:
        crew.files.put(name, b"x")
    done = crew.run("run", "--once", after="delete")
    assert done.returncode == 0
    crew.handled(*names)
    assert crew.files.names() == [] and crew.ledger() == []
    assert " released " in done.stdout and " stopped " in done.stdout
    assert crew.status()["active"] is None


def test_run_once_that_is_stopped_before_all_is_done_ends_with_1(crew: Crew) -> None:
    crew.hold()
    for name in ("1.txt", "2.txt"):
        crew.files.put(name, b"x")
    member = crew.start("a", "run", "--once", workers=1)
    crew.begun(1)
    member.send(signal.SIGTERM)
    crew.let_go()
    assert member.process.wait(PATIENCE) == 1
    assert "done" in crew.states().values() and len(crew.states()) == 1, "the first one ends, the second is not begun"


def test_run_once_beside_an_active_member_ends_with_0_and_does_nothing(crew: Crew) -> None:
    active = crew.start("a", pattern="*.csv")
    active.wait("elected")
    crew.files.put("1.txt", b"x")
    done = crew.run("run", "--once", member_id="b", timeout=crew.liveness + PATIENCE)
    assert done.returncode == 0 and " elected " not in done.stdout
    assert crew.names("begin") == []
    assert [member["member_id"] for member in crew.status()["members"]] == ["a"]


def test_run_once_waits_for_a_stale_holder_and_takes_over(crew: Crew) -> None:
    active = crew.start("a")
    active.wait("elected")
    crew.hold()
    crew.files.put("1.txt", b"x")
    crew.begun(1)
    killed = active.kill()
    crew.let_go()
    # A dead member looks alive until it is stale: to begin with, one that runs once leaves the work to it.
    wait_for(lambda: time.time() > killed + crew.liveness - crew.heartbeat, 2 * crew.liveness)
    done = crew.run("run", "--once", member_id="b", timeout=crew.liveness + PATIENCE)
    assert done.returncode == 0 and " elected " in done.stdout
    assert [(run.member, run.attempt) for run in crew.runs()] == [("b", 2)]


def test_run_once_ends_with_1_if_the_database_does_not_answer_for_the_liveness_interval(
    files: Files, tmp_path: Path
) -> None:
    """Else each minute of an outage leaves one more process of cron's."""
    away = Database("postgresql", f"postgresql://me@127.0.0.1:{servers.free_port()}/x")
    with Crew(tmp_path, away, files, database_tls="disable", tables=False) as crew:
        began = time.monotonic()
        done = crew.run("run", "--once", timeout=crew.liveness + PATIENCE)
        assert time.monotonic() - began > crew.liveness, "a failover is waited for"
        assert done.returncode == 1 and " database_down " in done.stdout and " stopped " in done.stdout


def test_run_once_beside_an_active_member_of_its_own_id_ends_with_0_once_that_cannot_be_a_dead_one(crew: Crew) -> None:
    """As somebody starts it by hand with the service's settings."""
    member = crew.start("a")
    member.wait("elected")
    done = crew.run("run", "--once", member_id="a", timeout=crew.liveness + PATIENCE)
    assert done.returncode == 0 and "another member is active" in done.stdout
    assert not member.events("lost")


def test_run_once_takes_over_from_a_dead_holder_whose_heartbeat_lies_in_the_future(crew: Crew) -> None:
    """The database's clock was set back: it does not take that for a living member until the clock is there again."""
    crew.start("a").wait("elected")
    crew.members[0].kill()
    crew.database.execute("UPDATE health_check SET last_heartbeat = datetime('now', '1 hour')")
    crew.files.put("1.txt", b"x")
    assert crew.run("run", "--once", member_id="b", timeout=2 * crew.liveness + PATIENCE).returncode == 0
    crew.handled("1.txt")


def test_run_once_waits_until_files_have_min_age(crew: Crew) -> None:
    """From cron each run is a new process: none would ever have seen a file long enough."""
    crew.files.put("1.txt", b"x")
    began = time.monotonic()
    assert crew.run("run", "--once", min_age=1.5).returncode == 0
    assert crew.names() == ["1.txt"] and time.monotonic() - began > 1.5


def test_run_once_with_files_in_back_off_ends_with_1(crew: Crew) -> None:
    crew.fail()
    crew.files.put("1.txt", b"x")
    began = time.time()
    done = crew.run("run", "--once", retry_delay=300)
    assert done.returncode == 1 and time.time() - began < 60
    assert " file_failed " in done.stdout
    assert crew.run("run", "--once", retry_delay=300).returncode == 1, "also when it finds them so"
    assert len(crew.runs("begin")) == 1


# ----------------------------------------------------------------------------- run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_graceful_stop_waits_for_the_command_and_ends_with_0(
    crew: Crew, number: int, request: pytest.FixtureRequest
) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # these tests may run under nohup
    request.addfinalizer(lambda: signal.signal(number, before))
    crew.settings["workers"] = 1
    crew.hold()
    crew.files.put("1.txt", b"x")
    crew.files.put("2.txt", b"x")
    member = crew.start("a")
    crew.begun(1)
    member.send(number)
    never(lambda: not member.running() or member.events("released"), 1.0, "it did not wait for the command")
    crew.let_go()
    assert member.process.wait(PATIENCE) == 0
    assert crew.names() == ["1.txt"] and crew.names("begin") == ["1.txt"], "no new file is begun"
    assert [event.name for event in member.events()][-2:] == ["released", "stopped"]
    assert crew.states() == {"1.txt": "done"}


AS_LEFT_BY_A_PARENT = "import os, signal, sys; {}; os.execv(sys.argv[1], sys.argv[1:])"


def test_the_exit_code_of_a_command_counts_also_where_the_parent_process_ignored_its_childrens_end(crew: Crew) -> None:
    """The kernel then keeps no exit code, and Python takes that for 0."""
    crew.files.put("1.txt", b"x")
    crew.fail()
    command = [
        sys.executable,
        "-c",
        AS_LEFT_BY_A_PARENT.format("signal.signal(signal.SIGCHLD, signal.SIG_IGN)"),
        *PROGRAM,
    ]
    with Member("a", command, crew.environment(member_id="a", after="delete"), crew.folder) as member:
        member.wait("file_failed")
        assert not member.events("file_done") and crew.files.names() == ["1.txt"]


def test_a_stop_is_heard_also_where_the_parent_process_blocked_it(crew: Crew) -> None:
    blocked = "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})"
    command = [sys.executable, "-c", AS_LEFT_BY_A_PARENT.format(blocked), *PROGRAM]
    with Member("a", command, crew.environment(member_id="a"), crew.folder) as member:
        member.wait("elected")
        assert member.stop() == 0


@pytest.mark.skipif(shutil.which("nohup") is None, reason="there is no nohup")
def test_with_nohup_the_end_of_the_terminal_is_no_stop(crew: Crew) -> None:
    with Member("a", ["nohup", *PROGRAM], crew.environment(member_id="a"), crew.folder) as member:
        member.wait("elected")
        member.send(signal.SIGHUP)
        polls = member.polls()
        wait_for(lambda: member.polls() > polls, PATIENCE)
        assert member.stop() == 0


@pytest.mark.parametrize("command", ["sh -c 'exit 75'", "no-such-command {file}"])
def test_run_once_ends_where_failures_do_not_count_and_retry_delay_is_0(crew: Crew, command: str) -> None:
    crew.files.put("1.txt", b"x")
    done = crew.run("run", "--once", exec=command, retry_delay=0)
    assert done.returncode == 1 and done.stdout.count(" attempt=1 ") <= 1 and crew.states() == {"1.txt": "failed"}


def test_a_command_that_outlives_drain_timeout_is_ended_and_its_file_is_handled_again(crew: Crew) -> None:
    crew.hold()
    crew.files.put("1.txt", b"x")
    member = crew.start("a", drain_timeout=0.5)
    crew.begun(1)
    assert member.stop() == 0
    member.wait("released")
    crew.let_go()
    assert crew.run("run", "--once", member_id="b").returncode == 0
    assert [(run.what, run.attempt) for run in crew.runs()] == [("end", 2)]
    assert crew.states() == {"1.txt": "done"}


def test_a_json_log_has_one_object_a_line(crew: Crew) -> None:
    crew.settings["log_format"] = "json"
    crew.fail()
    crew.files.put('a "b"=c.txt', b"x")
    member = crew.start("a", max_attempts=1)
    wait_for(lambda: '"file_quarantined"' in member.out.read_text(), PATIENCE)
    assert member.stop() == 0
    lines = [json.loads(line) for line in member.lines()]
    names = [line["event"] for line in lines]
    for name in ("starting", "ready", "elected", "polled", "file_quarantined", "released", "stopped"):
        assert name in names
    for line in lines:
        assert {"time", "level", "event"} <= set(line)
    quarantined = lines[names.index("file_quarantined")]
    assert quarantined["path"].endswith('/a "b"=c.txt') and quarantined["term"] == 1
    assert lines[names.index("elected")]["term"] == 1


def test_each_section_of_a_settings_file_is_a_listener(crew: Crew, sftp: Files) -> None:
    """Values are taken as they are: no interpolation."""

    def section(values: dict[str, Any]) -> str:
        return "".join(f"{name} = {value}\n" for name, value in values.items())

    shared = {
        key: value
        for key, value in crew.settings.items()
        if key not in crew.files.settings and key not in ("coordination_group", "exec")
    }
    path = crew.folder / "settings.ini"
    path.write_text(
        f"[DEFAULT]\n{section(shared)}member_id = m\n"
        f"[orders]\n{section(crew.files.settings)}exec = {crew.recorder('100%', '%(name)s', '{name}')}\n"
        f"[invoices]\n{section(sftp.settings)}exec = {crew.recorder('invoices')}\ncoordination_group = invoices\n"
    )
    crew.files.put("order.txt", b"x")
    sftp.put("invoice.txt", b"x")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FTPCOORD_")}
    done = crew.run("--config", str(path), "check", environment=environment)
    assert done.returncode == 0 and done.stdout.count("settings: group") == 2
    assert crew.run("--config", str(path), "run", "--once", environment=environment).returncode == 0
    crew.handled("invoice.txt", "order.txt")
    runs = {run.name: run for run in crew.runs()}
    assert runs["order.txt"].arguments == ["100%", "%(name)s", "order.txt"]
    assert runs["invoice.txt"].environment["FTPCOORD_GROUP"] == "invoices"
    target = ftpcoord.Config(**crew.settings).target
    group = f"ftp://{target.user}@127.0.0.1:{target.port}{target.path}"
    assert runs["order.txt"].environment["FTPCOORD_GROUP"] == group
    shown = json.loads(crew.run("--config", str(path), "status", "--json", environment=environment).stdout)
    assert [one["group"] for one in shown] == [group, "invoices"]


def test_placeholders_of_exec_are_filled_in_after_the_words_were_split(crew: Crew) -> None:
    """A name cannot become a second word, an option of a shell or another placeholder."""
    crew.settings["exec"] = crew.recorder("'one word'", "{file}", "--name={name}", "{path}", "{other}", "'{name} x'")
    name = "a b; $(touch x) {path} 'q.txt"
    crew.files.put(name, b"x")
    assert crew.run("run", "--once").returncode == 0
    (run,) = crew.runs()
    path = f"{crew.files.root}/{name}"
    copy = run.environment["FTPCOORD_FILE"]
    assert run.arguments == ["one word", copy, f"--name={name}", path, "{other}", f"{name} x"]
    assert not (crew.folder / "x").exists() and not Path(copy).exists(), "the private copy is gone"


def test_an_unreachable_database_at_start_is_waited_for(
    files: Files, postgres: servers.Postgres, tmp_path: Path
) -> None:
    """`run` retries for ever; `check` tries once (above)."""
    with new_database("postgresql", postgres) as database, Crew(tmp_path, database, files) as crew:
        postgres.stop()
        member = crew.start("a")
        member.wait("database_down")
        files.put("1.txt", b"x")
        postgres.start()
        crew.handled("1.txt")
        assert member.stop() == 0
