"""Running for years: hand-overs that make progress, listeners that do not disturb each other, systemd, containers."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Optional

import pytest
import servers
from conftest import Database, Files, new_database, new_folder, wait_for
from members import Crew, Member, ftpcoord, never, through
from processes import MODULE, Event, compiled, environment
from servers import Proxy


def answer(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()


def code(port: int, path: str) -> int:
    return answer(port, path)[0]


# ----------------------------------------------------------------------------- progress


def test_a_file_server_that_one_member_cannot_reach_leads_to_one_hand_over_without_ping_pong(
    postgresql: Database, files: Files, tmp_path: Path
) -> None:
    with Proxy("127.0.0.1", files.server.port) as proxy, Crew(tmp_path, postgresql, files) as crew:
        a = crew.start("a", yield_after=2, **through(proxy, files))
        a.wait("polled", listed=0)
        b = crew.start("b", yield_after=2)
        b.wait("standby")
        proxy.refuse()
        proxy.cut()
        files.put("1.csv", b"x")
        handed = a.wait("handing_over")
        assert "file server" in handed.fields["reason"]
        elected = b.wait("elected", term=2)
        assert elected.fields["reason"] == "released"
        assert elected.at - handed.at < 2 * crew.heartbeat + 1, "a hand-over, not a death"
        crew.handled("1.csv")
        assert [run.member for run in crew.runs()] == ["b"]
        never(lambda: len(a.events("elected")) > 1 or b.events("handing_over"), 3 * crew.heartbeat + 2, "ping-pong")
        # While nobody else is alive the role is kept: somebody must go on trying.
        b.kill()
        a.wait("elected", term=3)
        wait_for(lambda: len([e for e in a.events("server_down") if e.at > a.events("elected")[-1].at]) > 0)
        never(lambda: a.events("handing_over", since=elected.at), 3, "there is nobody to hand over to")
        proxy.refuse(False)
        files.put("2.csv", b"x")
        crew.handled("1.csv", "2.csv")


def test_members_none_of_which_reaches_the_file_server_take_turns_ever_more_seldom(
    sqlite: Database, tmp_path: Path
) -> None:
    with servers.pyftpd() as server, new_folder("pyftpd", server) as files:
        with Crew(tmp_path, sqlite, files, yield_after=1, polling_interval=0.2) as crew:
            members = [crew.start(name) for name in "ab"]
            crew.active()
            crew.standbys()
            wait_for(lambda: any(member.events("standby") for member in members))
            server.stop()

            def hand_overs() -> list[Event]:
                return sorted(event for member in members for event in member.events("handing_over"))

            wait_for(lambda: len(hand_overs()) >= 5, 60)
            gaps = [later.at - earlier.at for earlier, later in zip(hand_overs(), hand_overs()[1:])]
            assert gaps[3] > 1.5 * gaps[0], gaps
            server.start()
            files.put("1.csv", b"x")
            crew.handled("1.csv")


HANGING = """
import os, time
def handle(file):
    if file.name == "hang.csv" and os.path.exists("hang"):
        open("hanging", "w").close()
        time.sleep(600)
    with open("handled", "a") as out:
        out.write(f"{file.name} {file.lease.term}\\n")
"""


def test_a_handler_that_hangs_beyond_exec_timeout_leads_to_a_takeover_by_the_other_member(
    postgresql: Database, files: Files, tmp_path: Path
) -> None:
    """A Python handler cannot be ended: its process is no longer live and has to be restarted."""
    (tmp_path / "handlers.py").write_text(HANGING)
    (tmp_path / "hang").touch()
    port = servers.free_port()
    settings: dict[str, Any] = {
        "exec": None,
        "handler": "handlers:handle",
        "exec_timeout": 1,
        "stall_timeout": 2,
        "drain_timeout": 1,
    }
    with Crew(tmp_path, postgresql, files, **settings) as crew:
        a = crew.start("a", http=f"127.0.0.1:{port}")
        a.wait("elected")
        b = crew.start("b")
        b.wait("standby")
        files.put("hang.csv", b"x")
        wait_for((tmp_path / "hanging").exists)
        (tmp_path / "hang").unlink()
        began = time.time()
        a.wait("handing_over")
        lost = a.wait("lost")
        assert "hangs" in lost.fields["reason"]
        elected = b.wait("elected", term=2)
        # exec_timeout + stall_timeout + drain_timeout until the lease is given up, then until it is stale
        assert elected.at - began < 1 + 2 + 1 + crew.liveness + 5
        wait_for(lambda: (tmp_path / "handled").exists() and (tmp_path / "handled").read_text() == "hang.csv 2\n")
        wait_for(lambda: code(port, "/livez") == 503, 20)
        never(lambda: len(a.events("elected")) > 1, 2, "it stands again although its handler still runs")
        began = time.time()
        assert a.stop() in (0, 1) and time.time() - began < 1 + 5 + 2 + 5, "a stopping process does not wait for it"


def test_a_handler_within_its_time_is_progress(sqlite: Database, files: Files, tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text("import time\ndef handle(file):\n    time.sleep(4)\n")
    settings: dict[str, Any] = {"exec": None, "handler": "handlers:handle", "stall_timeout": 1}
    with Crew(tmp_path, sqlite, files, **settings) as crew:
        a = crew.start("a")
        files.put("1.csv", b"x")
        done = a.wait("file_done")
        assert float(done.fields["seconds"]) > 3.9 and not a.events("handing_over") and not a.events("lost")


# ----------------------------------------------------------------------------- several listeners in one process


class Listeners:
    """One process with a section for each listener."""

    def __init__(self, crew: Crew, sections: dict[str, dict[str, Any]], **more: str) -> None:
        self.crew, path = crew, crew.folder / "settings.ini"
        lines = []
        for name, changes in sections.items():
            values = {**crew.settings, "coordination_group": name, "member_id": "m", **changes}
            lines += [f"[{name}]", *(f"{key} = {value}" for key, value in values.items() if value is not None)]
        path.write_text("\n".join(lines))
        command = [*compiled(), "--config", str(path)]
        self.member = Member("m", command, environment({}, **more), crew.folder)

    def __enter__(self) -> Member:
        return self.member

    def __exit__(self, *_: object) -> None:
        self.member.end()
        assert "Traceback" not in self.member.said(), self.member.said()


def test_a_dead_server_and_a_dead_handler_do_not_disturb_a_third_listener(
    postgresql: Database, files: Files, pyftpd: servers.Pyftpd, tmp_path: Path
) -> None:
    (tmp_path / "handlers.py").write_text("import time\ndef handle(file):\n    time.sleep(600)\n")
    with contextlib.ExitStack() as stack:
        crew = stack.enter_context(Crew(tmp_path, postgresql, files))
        other = stack.enter_context(new_folder("pyftpd", pyftpd))
        proxy = stack.enter_context(Proxy("127.0.0.1", pyftpd.port))
        proxy.blackhole()
        other.put("stuck.csv", b"x")
        sections: dict[str, dict[str, Any]] = {
            "server": {**through(proxy, files), "timeout": 5},
            "handler": {
                **other.settings,
                "exec": None,
                "handler": "handlers:handle",
                "exec_timeout": 1,
                "stall_timeout": 1,
                "drain_timeout": 1,
            },
            "well": {"http": f"127.0.0.1:{servers.free_port()}"},
        }
        member = stack.enter_context(Listeners(crew, sections))
        for group in sections:
            member.wait("ready", group=group)
        member.wait("server_down", group="server")
        port = int(sections["well"]["http"].rpartition(":")[2])
        wait_for(lambda: code(port, "/livez?group=handler") == 503, 20)
        assert code(port, "/livez?group=well") == code(port, "/readyz?group=well") == 200
        names = []
        for number in range(5):
            names.append(f"{number}.csv")
            files.put(names[-1], b"x")
            crew.handled(*names, timeout=10)
        assert len(member.events("elected", group="well")) == 1 and not member.events("lost", group="well")
        for group in ("server", "handler"):
            assert not member.events("lost", group=group) and not member.events("handing_over", group=group)
        began = time.time()
        member.stop()
        assert member.events("released", group="well") and time.time() - began < 20


def test_a_locked_group_does_not_cost_another_group_of_the_process_its_lease(
    postgresql: Database, files: Files, tmp_path: Path
) -> None:
    with Crew(tmp_path, postgresql, files) as crew:
        sections: dict[str, dict[str, Any]] = {name: {"download_dir": tmp_path, "exec": None} for name in "abcd"}
        for name in sections:
            (tmp_path / name).mkdir()
            sections[name] = {"download_dir": tmp_path / name, "exec": None, "polling_interval": 60}
        with Listeners(crew, sections) as member:
            for group in sections:
                member.wait("elected", group=group)
            locked = time.time()
            with contextlib.closing(postgresql.connect()) as session:
                session.autocommit = False
                cursor = session.cursor()
                cursor.execute("SELECT * FROM token_holder WHERE group_id = 'b' FOR UPDATE")
                member.wait("lost", group="b", since=locked)
                never(lambda: any(member.events("lost", group=group) for group in "acd"), crew.liveness, "a lost lease")
                session.rollback()
            member.wait("elected", group="b", since=locked)
            for group in "acd":
                assert len(member.events("elected", group=group)) == 1 and not member.events("lost", group=group)
            assert member.stop() == 0


@pytest.mark.parametrize(
    ("table", "well", "ill"),
    [("file_ledger", {"ledger": "off", "after": "delete"}, {}), ("file_audit", {}, {"audit": "on"})],
)
def test_a_listener_that_cannot_start_ends_the_process_and_the_others_hand_over(
    postgresql: Database, files: Files, tmp_path: Path, table: str, well: dict[str, str], ill: dict[str, str]
) -> None:
    """It is not overlooked because another one runs, nor is a missing table because another one needs none."""
    with Crew(tmp_path, postgresql, files) as crew:
        postgresql.execute(f"DROP TABLE {table}")
        with Listeners(crew, {"well": {**well}, "ill": {**ill}}) as member:
            assert member.process.wait(30) == 1
            assert f"table {table} is missing" in member.err.read_text()
            ended = member.events("released", group="well"), member.events("elected", group="well")
            assert len(ended[0]) == len(ended[1])


def test_two_sections_with_one_group_and_one_member_id_are_refused(
    sqlite: Database, files: Files, tmp_path: Path
) -> None:
    """They would wait for each other for ever."""
    with Crew(tmp_path, sqlite, files) as crew:
        sections: dict[str, dict[str, Any]] = {
            "csv": {"coordination_group": "one", "pattern": "*.csv"},
            "xml": {"coordination_group": "one"},
        }
        with Listeners(crew, sections) as member:
            assert member.process.wait(30) == 2
            assert "coordination_group" in member.err.read_text() and not member.events("starting")


def test_probes_tell_of_each_listener_of_a_group_and_one_address_may_be_spelled_in_two_ways(
    sqlite: Database, files: Files, tmp_path: Path
) -> None:
    """One of them waits for a database that does not answer; that the other one is well must not hide it."""
    port, away = servers.free_port(), f"postgresql://me@127.0.0.1:{servers.free_port()}/x"
    with Crew(tmp_path, sqlite, files) as crew:
        sections: dict[str, dict[str, Any]] = {
            "away": {"coordination_group": "one", "database": away, "http": f":{port}"},
            "well": {"coordination_group": "one", "http": f"127.0.0.1:{port}"},
        }
        with Listeners(crew, sections) as member:
            member.wait("elected")
            wait_for(lambda: "one: ok\n" in answer(port, "/readyz")[1], 30)
            status, told = answer(port, "/readyz")
            assert status == 503 and told.count("one: ") == 2, told


def test_a_database_that_hangs_delays_the_metrics_of_many_groups_no_longer_than_those_of_one(
    postgresql: Database, files: Files, tmp_path: Path
) -> None:
    """A scrape that times out takes back the alert that the database is down."""
    port = servers.free_port()
    with Crew(tmp_path, postgresql, files) as crew:
        more = {
            "http": f"127.0.0.1:{port}",
            "polling_interval": 60,
            "heartbeat_frequency": 1,
            "liveness_check_interval": 30,
        }
        with Listeners(crew, {f"g{number}": {**more} for number in range(8)}) as member:
            for number in range(8):
                member.wait("ready", group=f"g{number}")
            assert postgresql.server is not None
            postgresql.server.freeze()
            try:
                time.sleep(2.1)  # no answer of before is young enough
                began = time.monotonic()
                status, told = answer(port, "/metrics")
                assert status == 200 and told.count("ftpcoord_database_up{") == 8
                assert time.monotonic() - began < 4
            finally:
                postgresql.server.thaw()


def test_a_database_that_is_away_keeps_a_command_from_no_other_group(
    postgresql: Database, files: Files, tmp_path: Path
) -> None:
    """Whichever stands first, the reason is told and the exit code is 1. What some groups do not have is no reason."""
    away = f"postgresql://me@127.0.0.1:{servers.free_port()}/x"
    with Crew(tmp_path, postgresql, files) as crew:
        sections: dict[str, dict[str, Any]] = {
            "away": {"database": away, "audit": "on"},
            "bare": {"ledger": "off", "after": "delete"},
            "well": {"audit": "on"},
        }
        file_id = ftpcoord.sha256_text("/in/a")
        postgresql.execute(
            "INSERT INTO file_ledger (group_id, file_id, path, size, mtime, state, term, task_id, attempts, failures, "
            f"updated_at, error, action) VALUES ('well', '{file_id}', '/in/a', 1, '', 'quarantined', 1, 'm', 5, 5, "
            "now(), 'bad', '')"
        )
        listeners = Listeners(crew, sections)  # for its file of settings
        listeners.member.end()

        def call(*words: str) -> str:
            done = crew.run("--config", str(tmp_path / "settings.ini"), *words, environment=environment({}))
            assert (done.returncode, done.stderr.count("127.0.0.1")) == (1, 2), done
            return done.stdout

        assert "group well is paused" in call("pause")
        assert "group well is resumed" in call("resume")
        assert "/in/a" in call("files")
        assert "1 files put back" in call("retry")
        assert "1 files skipped" in call("skip", "a")
        history = call("files", "--history")
        assert "outcome=retried" in history and "outcome=skipped" in history


def test_the_check_of_many_groups_waits_for_hand_overs_no_longer_than_that_of_one(
    sqlite: Database, files: Files, tmp_path: Path
) -> None:
    """Who asks, Nagios say, has little patience."""
    with Crew(tmp_path, sqlite, files, heartbeat_frequency=1, liveness_check_interval=30) as crew:
        Listeners(crew, {f"g{number}": {} for number in range(6)}).member.end()  # for its file of settings
        began = time.monotonic()
        done = crew.run("--config", str(tmp_path / "settings.ini"), "status", "--check", environment=environment({}))
        assert done.returncode == 1 and done.stdout.count("no member is active") == 6
        assert time.monotonic() - began < 9


# ----------------------------------------------------------------------------- systemd and containers


class Systemd:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.environment = {"NOTIFY_SOCKET": address}
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.setblocking(False)
        self.told: list[tuple[float, str]] = []

    def lines(self) -> list[str]:
        with contextlib.suppress(BlockingIOError):
            while True:
                text = self.socket.recv(65536).decode()
                self.told += [(time.monotonic(), line) for line in text.split("\n")]
        return [line for _, line in self.told]

    def wait(self, text: str) -> None:
        wait_for(lambda: any(text in line for line in self.lines()), 30, f"{text} in {self.told}")


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told_ready_status_watchdog_and_stopping(
    sqlite: Database, files: Files, tmp_path: Path, abstract: bool
) -> None:
    systemd = Systemd(f"@ftpcoord-{os.getpid()}" if abstract else str(tmp_path / "notify"))
    with contextlib.closing(systemd.socket), Crew(tmp_path, sqlite, files) as crew:
        environment = {**systemd.environment, "WATCHDOG_USEC": "1000000"}
        files.put("1.csv", b"x")
        with Listeners(crew, {"g": {}}, **environment) as member:
            systemd.wait("READY=1")
            assert member.events("ready")
            systemd.wait("STATUS=active at term 1, 1 files done")
            wait_for(lambda: systemd.lines().count("WATCHDOG=1") >= 5)
            beats = [at for at, line in systemd.told if line == "WATCHDOG=1"]
            assert (beats[-1] - beats[0]) / (len(beats) - 1) < 0.8, "about half of WATCHDOG_USEC"
            crew.hold()
            files.put("2.csv", b"x")
            wait_for(lambda: crew.names("begin") == ["1.csv", "2.csv"])
            stopped = time.monotonic()
            member.send(signal.SIGTERM)
            systemd.wait("STOPPING=1")
            assert time.monotonic() - stopped < 5 and member.running(), "told at once, while the command still runs"
            # While a stop waits for the command the watchdog is still fed.
            count = systemd.lines().count("WATCHDOG=1")
            wait_for(lambda: systemd.lines().count("WATCHDOG=1") > count)
            crew.let_go()
            assert member.process.wait(30) == 0
        assert systemd.lines().count("READY=1") == systemd.lines().count("STOPPING=1") == 1
        for run in crew.runs():
            assert "NOTIFY_SOCKET" not in run.environment


def test_ready_waits_for_the_database_and_a_frozen_process_feeds_no_watchdog(
    postgres: servers.Postgres, files: Files, tmp_path: Path
) -> None:
    systemd = Systemd(str(tmp_path / "notify"))
    with new_database("postgresql", postgres) as database, contextlib.closing(systemd.socket):
        with Crew(tmp_path, database, files) as crew:
            postgres.stop()
            with Listeners(crew, {"g": {}}, **systemd.environment, WATCHDOG_USEC="800000") as member:
                member.wait("database_down")
                systemd.wait("WATCHDOG=1")
                systemd.wait("STATUS=starting, database")
                assert "READY=1" not in systemd.lines()
                postgres.start()
                systemd.wait("READY=1")
                systemd.wait("STATUS=active at term 1")
                member.send(signal.SIGSTOP)
                systemd.lines()
                count = len(systemd.lines())
                never(lambda: len(systemd.lines()) > count, 1.5, "a frozen process spoke")
                member.send(signal.SIGCONT)


def test_another_processs_watchdog_and_a_vanished_socket_are_left_alone(tmp_path: Path) -> None:
    systemd = Systemd(str(tmp_path / "notify"))
    with contextlib.closing(systemd.socket):
        listener = ftpcoord.Listener(url="ftp://u@127.0.0.1/", database=f"sqlite:///{tmp_path}/x", exec="true")
        other = {**systemd.environment, "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
        notifier = ftpcoord.Notifier([listener], other)
        notifier.tick()
        assert systemd.lines() == ["STATUS=starting"] and notifier.pause == 1.0
        os.remove(tmp_path / "notify")
        notifier.stopping()
        ftpcoord.Notifier([listener], {"NOTIFY_SOCKET": "vsock:2:1234"}).tick()
        ftpcoord.Notifier([listener], {}).tick()


def unshare() -> Optional[list[str]]:
    """A command that runs another one as PID 1 of a namespace, if that is possible here."""
    program = shutil.which("unshare")
    command = [program or "", "--pid", "--fork", "--kill-child", "--mount-proc"]
    works = program and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if works else None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_as_pid_1_of_a_container_a_signal_hands_over_and_ends_it(
    sqlite: Database, files: Files, tmp_path: Path, number: int
) -> None:
    """PID 1 has no default action for signals: a handler must be there."""
    command = unshare()
    if command is None:
        if os.environ.get("FTPCOORD_REQUIRE_ALL") == "1":
            pytest.fail("unshare: a PID namespace cannot be made here", pytrace=False)
        pytest.skip("unshare: a PID namespace cannot be made here")
    with Crew(tmp_path, sqlite, files) as crew:
        environment = crew.environment(member_id="a", log_format="json")
        member = Member("a", [*command, sys.executable, str(MODULE)], environment, tmp_path)
        try:
            files.put("1.csv", b"x")
            wait_for(lambda: '"event": "file_done"' in member.said())
            children = Path(f"/proc/{member.pid}/task/{member.pid}/children").read_text().split()
            os.kill(int(children[0]), number)
            assert member.process.wait(30) == 0
            assert '"event": "released"' in member.said() and '"event": "stopped"' in member.said()
        finally:
            if member.running():
                member.kill()
