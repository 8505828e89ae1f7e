"""What operators see: the endpoints of a process, `status`, `files`, `run --dry-run`, and an outage in all of them."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import pty
import re
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Optional

import pytest
import servers
from conftest import Database, Files, new_folder, wait_for
from members import Crew, Member, ftpcoord, kinds
from memory import row
from processes import MODULE, environment
from prometheus_client.parser import text_string_to_metric_families

CANARY = "canary-2b7e1516"


class Answer:
    """One answer of the status server."""

    def __init__(self, port: int, path: str, method: str = "GET", timeout: float = 10) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request(method, path)
            answer = connection.getresponse()
            self.code, self.headers, self.text = answer.status, answer.headers, answer.read().decode()

    def json(self) -> Any:
        return json.loads(self.text)


class Watched:
    """A member with a status server."""

    def __init__(self, crew: Crew, name: str, *arguments: str, **changes: Any) -> None:
        self.port = servers.free_port()
        self.member: Member = crew.start(name, *arguments, http=f"127.0.0.1:{self.port}", **changes)

    def get(self, path: str, method: str = "GET") -> Answer:
        return Answer(self.port, path, method)

    def status(self, group: str = "") -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/status?group={group}" if group else "/status").json()
        return found

    def up(self) -> bool:
        try:
            return self.get("/livez").code == 200
        except OSError:
            return False


def samples(text: str) -> dict[tuple[str, str], float]:
    """(name, its labels without group and member) -> value."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("group", "member")}
            found[sample.name, ",".join(f"{k}={v}" for k, v in sorted(labels.items()))] = sample.value
    return found


# ----------------------------------------------------------------------------- endpoints


def test_every_endpoint_of_the_active_member_and_of_a_standby(crew: Crew) -> None:
    crew.files.put("good.csv", b"12345")
    a = Watched(crew, "a")
    a.member.wait("elected")
    b = Watched(crew, "b")
    b.member.wait("standby")
    crew.handled("good.csv")
    wait_for(lambda: crew.states() == {"good.csv": "done"})
    wait_for(lambda: a.status()["files"]["done"] == 1)

    assert a.get("/active").code == 200 and a.get("/active").text == "crew: active\n"
    assert b.get("/active").code == 503 and b.get("/active").text == "crew: standby\n"
    for one in (a, b):
        assert one.get("/livez").code == one.get("/readyz").code == 200
        assert one.get("/livez").text == "crew: ok\n"
        assert one.get("/nothing").code == 404
        assert one.get("/status?group=other").code == 404

    active, standby = a.status(), b.status()
    for status in (active, standby):
        assert set(status) >= {"group", "active", "term", "database", "members", "files"}
        assert (status["group"], status["active"], status["term"], status["healthy"]) == ("crew", "a", 1, True)
        assert status["files"] == {"claimed": 0, "done": 1, "failed": 0, "quarantined": 0}
        assert [(row["member_id"], row["role"]) for row in status["members"]] == [("a", "active"), ("b", "standby")]
        assert status["settings"]["password"] == "***"
    assert active["member"]["role"] == "active" and standby["member"]["role"] == "standby"
    assert active["work"]["done"] == 1 and active["work"]["bytes"] == 5 and active["server"]["up"] is True
    assert standby["work"]["done"] == 0 and standby["server"]["up"] is None
    assert [(t["event"], t["reason"]) for t in active["takeovers"]] == [("elected", "vacant")]

    page = a.get("/")
    assert page.code == 200 and page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "<b>● a is active</b> at term 1" in page.text and "1 standby" not in page.text
    style = re.findall(r"<style>(.*?)</style>", page.text, re.DOTALL)[0]
    hashed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and f"style-src 'sha256-{hashed}'" in policy
    for path in ("/", "/status", "/metrics", "/livez", "/nothing"):
        answer = a.get(path)
        assert answer.headers["X-Content-Type-Options"] == "nosniff" and answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Referrer-Policy"] == "no-referrer" and answer.headers["Connection"] == "close"
        assert "Server" not in answer.headers
    head = a.get("/", "HEAD")
    assert head.code == 200 and head.text == "" and int(head.headers["Content-Length"]) > 1000

    # The standby takes over and tells how long the group was without an active member.
    killed = a.member.kill()
    b.member.wait("elected", since=killed)
    status = wait_for(lambda: (found := b.status())["active"] == "b" and found)
    ((takeover),) = status["takeovers"]
    assert (takeover["event"], takeover["reason"], takeover["member"], takeover["term"]) == ("elected", "stale", "b", 2)
    assert crew.liveness - 3 * crew.heartbeat < takeover["seconds"] < crew.liveness + 5
    assert "gave up" not in b.get("/").text and "(stale)" in b.get("/").text


def test_a_standby_tells_who_took_over_from_whom(crew: Crew) -> None:
    a = crew.start("a")
    a.wait("elected")
    b, c = Watched(crew, "b"), Watched(crew, "c")
    b.member.wait("standby")
    c.member.wait("standby")
    assert a.stop() == 0
    winner, _ = crew.elected(b.member, c.member, since=0)
    one, other = (b, c) if winner is b.member else (c, b)
    seen = wait_for(lambda: other.status()["takeovers"])
    assert (seen[0]["event"], seen[0]["member"], seen[0]["term"]) == ("other", winner.name, 2)
    assert seen[0]["reason"] in ("released", "handed over") and seen[0]["seconds"] < 3
    assert other.status()["member"]["other_since"] == pytest.approx(time.time(), abs=20)
    own = wait_for(lambda: one.status()["takeovers"])
    assert (own[0]["event"], own[0]["reason"]) == ("elected", "released") and own[0]["seconds"] < 3


def test_metrics_pass_prometheus_parser_and_follow_its_naming_guide(crew: Crew) -> None:
    command = f"{sys.executable} -c 'import sys; sys.exit(\"bad\" in sys.argv[1])' {{name}}"
    crew.settings.update(max_attempts=1, exec=command, coordination_group='a"b\\c')
    crew.files.put("good.csv", b"x" * 100)
    crew.files.put("bad.csv", b"x" * 10)
    a = Watched(crew, "a")
    a.member.wait("elected")
    wait_for(lambda: sorted(crew.states().values()) == ["done", "quarantined"], 30)
    wait_for(lambda: samples(a.get("/metrics").text)["ftpcoord_ledger_files", "state=quarantined"] == 1)
    answer = a.get("/metrics")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    for name, family in families.items():
        assert re.fullmatch(r"ftpcoord_[a-z][a-z_]*[a-z]", name) and family.documentation.endswith(".")
        assert family.type in ("counter", "gauge", "histogram")
        assert not re.search(r"_(ms|milliseconds|minutes|kb|percent)(_|$)", name), "base units"
        for sample in family.samples:
            assert (sample.name.endswith("_total")) == (family.type == "counter"), sample
            if name != "ftpcoord_build_info":
                assert sample.labels["group"] == 'a"b\\c' and sample.labels["member"] == "a"
    assert len({line.split(" ")[0] for line in answer.text.splitlines() if line[:1] != "#"}) == len(
        [line for line in answer.text.splitlines() if line[:1] != "#"]
    ), "no sample twice"
    found = samples(answer.text)
    assert found["ftpcoord_role", "role=active"] == 1 and found["ftpcoord_role", "role=standby"] == 0
    assert found["ftpcoord_term", ""] == 1 and found["ftpcoord_database_up", ""] == 1
    assert found["ftpcoord_server_up", ""] == 1
    assert found["ftpcoord_takeovers_total", "reason=vacant"] == 1
    assert found["ftpcoord_files_total", "result=done"] == 1
    assert found["ftpcoord_files_total", "result=quarantined"] == 1
    assert found["ftpcoord_file_bytes_total", "result=done"] == 100
    assert found["ftpcoord_fetched_bytes_total", ""] == 110
    assert found["ftpcoord_listing_files", ""] == 2
    assert found["ftpcoord_handler_duration_seconds_count", ""] == 2
    assert found["ftpcoord_handler_duration_seconds_bucket", "le=+Inf"] == 2
    assert found["ftpcoord_polls_total", "result=ok"] >= 1
    assert found["ftpcoord_heartbeat_duration_seconds_count", ""] >= 1
    assert 0 <= found["ftpcoord_heartbeat_age_seconds", ""] < 5
    assert found["ftpcoord_lease_remaining_seconds", ""] > 0
    assert abs(found["ftpcoord_last_success_timestamp_seconds", ""] - time.time()) < 60
    assert found["ftpcoord_build_info", f"python={sys.version.split()[0]},version={ftpcoord.__version__}"] == 1
    assert found["ftpcoord_members", "role=active"] == 1
    for name in ("queue_files", "refused_names_total", "start_time_seconds", "handlers_running"):
        assert (f"ftpcoord_{name}", "") in found


def test_a_request_that_is_wrong_slow_or_too_long_is_refused_and_disturbs_nothing(crew: Crew) -> None:
    a = Watched(crew, "a")
    a.member.wait("elected")
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE"):
        answer = a.get("/", method)
        assert answer.code == 405 and answer.headers["Allow"] == "GET, HEAD"

    def raw(data: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", a.port), 10) as connection:
            connection.sendall(data)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    assert raw(b"GET / HTTP/1.1\r\nX: " + b"x" * 9000 + b"\r\n\r\n").startswith(b"HTTP/1.1 431 ")
    assert raw(b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert raw(b"\x16\x03\x01\x02\x00\x01\n\n").startswith(b"HTTP/1.1 400 ")
    assert raw(b"GET /../../etc/passwd HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 404 ")
    assert raw(b"GET /%0d%0aSet-Cookie:x HTTP/1.0\n\n").startswith(b"HTTP/1.1 404 ")
    assert raw(b"POST / HTTP/1.1\r\nContent-Length: 100000\r\n\r\n" + b"x" * 3000).startswith(b"HTTP/1.1 405 ")
    # Clients that say nothing, or a byte now and then, hold their places for a few seconds only.
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", a.port), 10)) for _ in range(40)]
        began, age = time.monotonic(), 0.0
        while not a.up():
            for connection in idle:
                with contextlib.suppress(OSError):
                    connection.send(b"G")
            assert time.monotonic() - began < 15
            time.sleep(0.1)
        assert a.up()
        age = a.status()["heartbeat"]["age"]
    assert age < crew.liveness / 2 and not a.member.events("lost")
    assert a.member.stop() == 0


def test_a_taken_port_is_one_line_and_exit_code_1_before_anything_begins(crew: Crew) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = crew.run("run", http=f"127.0.0.1:{port}")
        assert done.returncode == 1 and "starting" not in done.stdout
        assert re.fullmatch(rf"ftpcoord: http: 127.0.0.1:{port} cannot be listened on \(.*in use\)\n", done.stderr)


def ini(crew: Crew, name: str, *sections: dict[str, Any]) -> str:
    """A settings file: one section for each dictionary, over the crew's settings."""
    path = crew.folder / name
    lines = []
    for number, section in enumerate(sections):
        values = {**crew.settings, "coordination_group": f"g{number}", **section}
        lines += [f"[s{number}]", *(f"{key} = {value}" for key, value in values.items() if value is not None)]
    path.write_text("\n".join(lines))
    return str(path)


def test_sections_with_one_http_value_share_a_server_and_others_get_their_own(crew: Crew) -> None:
    one, two = servers.free_port(), servers.free_port()
    path = ini(
        crew,
        "settings.ini",
        {"http": f"127.0.0.1:{one}"},
        {"http": f"127.0.0.1:{one}"},
        {"http": f"127.0.0.1:{two}"},
        {},
    )
    with Member("m", [sys.executable, str(MODULE), "--config", path], environment({}), crew.folder) as member:
        look_at_sections(member, one, two)


def look_at_sections(member: Member, one: int, two: int) -> None:
    wait_for(lambda: len(member.events("elected")) == 4)
    assert [found["group"] for found in Answer(one, "/status").json()] == ["g0", "g1", "g3"]
    assert [found["group"] for found in Answer(two, "/status").json()] == ["g2", "g3"]
    assert Answer(one, "/status?group=g1").json()["group"] == "g1"
    assert Answer(one, "/active").text == "g0: active\ng1: active\ng3: active\n"
    assert Answer(one, "/active?group=g2").code == 404
    assert {found for name, found in samples(Answer(one, "/metrics").text).items() if name[0] == "ftpcoord_term"} == {1}
    assert Answer(one, "/").text.count("<section") == 3
    assert member.stop() == 0


# ----------------------------------------------------------------------------- outages


def test_an_outage_of_the_database_shows_in_every_place_and_so_does_its_end(
    postgresql: Database, files: Files, tmp_path: Path
) -> None:
    with Crew(tmp_path, postgresql, files) as crew:
        files.put("1.csv", b"x")
        a = Watched(crew, "a")
        a.member.wait("elected")
        b = Watched(crew, "b")
        b.member.wait("standby")
        crew.handled("1.csv")
        wait_for(lambda: a.status()["files"]["done"] == 1)
        assert crew.call("status", "--check").returncode == 0
        wait_for(lambda: b.status()["as_of"] is not None)
        assert postgresql.server is not None
        postgresql.server.stop()
        for one in (a, b):
            shows_the_outage(one)
        wait_for(lambda: a.get("/active").code == 503)
        assert a.status()["active"] is None and "is active</b>" not in a.get("/").text

        said = crew.call("status")
        assert said.returncode == 1
        assert "PROBLEM: the database cannot be used" in said.stdout and "Nothing is polled" in said.stdout
        shown = crew.call("status", "--json")
        assert shown.returncode == 1 and json.loads(shown.stdout)["healthy"] is False
        check = crew.call("status", "--check")
        assert check.returncode == 1 and check.stdout.startswith("not ok: crew: the database cannot be used")
        assert check.stdout.count("\n") == 1

        postgresql.server.start()
        for one in (a, b):
            shows_health(one)
        lost = [found for found in a.status()["takeovers"] if found["event"] == "lost"]
        assert len(lost) == len(a.member.events("lost"))
        assert [len(one.member.events("database_up")) for one in (a, b)] == [1, 1]


def shows_the_outage(one: Watched) -> None:
    one.member.wait("database_down")
    wait_for(lambda: one.get("/readyz").code == 503)
    assert "database down" in one.get("/readyz").text
    assert one.get("/livez").code == 200, "a restart would not help"
    wait_for(lambda: samples(one.get("/metrics").text)["ftpcoord_database_up", ""] == 0)
    status = wait_for(lambda: not (found := one.status())["healthy"] and found)
    assert status["database_error"] and "cannot be used" in status["problems"][0]["problem"]
    page = one.get("/").text
    assert "<b>▲ The database cannot be used: " in page and "▲ down" in page
    assert "As the database showed" in page


def shows_health(one: Watched) -> None:
    wait_for(lambda: one.get("/readyz").code == 200, 30)
    wait_for(lambda: one.status()["healthy"], 30)
    assert "cannot be used" not in one.get("/").text


def test_a_database_that_hangs_delays_no_page_and_no_probe(postgresql: Database, files: Files, tmp_path: Path) -> None:
    with Crew(tmp_path, postgresql, files) as crew:
        a = Watched(crew, "a")
        a.member.wait("elected")
        wait_for(lambda: a.status()["as_of"] is not None)
        assert postgresql.server is not None
        postgresql.server.freeze()
        try:
            a.member.wait("database_down")
            for path, most in (("/livez", 1.0), ("/readyz", 1.0), ("/active", 1.0), ("/", 4.0), ("/status", 4.0)):
                began = time.monotonic()
                a.get(path)
                assert time.monotonic() - began < most, path
            a.member.wait("lost")
        finally:
            postgresql.server.thaw()
        a.member.wait("elected", term=2)


def test_a_file_server_that_is_down_fails_readyz_of_the_active_member_only(sqlite: Database, tmp_path: Path) -> None:
    with servers.pyftpd() as server, new_folder("pyftpd", server) as files, Crew(tmp_path, sqlite, files) as crew:
        a = Watched(crew, "a", yield_after=0)
        a.member.wait("polled")
        b = Watched(crew, "b", yield_after=0)
        b.member.wait("standby")
        server.stop()
        wait_for(lambda: a.get("/readyz").code == 503)
        assert "file server down" in a.get("/readyz").text and b.get("/readyz").code == 200
        assert a.get("/livez").code == 200 and a.get("/active").code == 200
        assert "<b>▲ The file server cannot be used" in a.get("/").text
        found = samples(a.get("/metrics").text)
        assert found["ftpcoord_server_up", ""] == 0 and found["ftpcoord_polls_total", "result=failed"] >= 1
        assert ("ftpcoord_server_up", "") not in samples(b.get("/metrics").text)
        server.start()
        wait_for(lambda: a.get("/readyz").code == 200, 30)


# ----------------------------------------------------------------------------- the command line


@kinds("postgresql", "mysql", "sqlite")
def test_status_shows_members_and_files_in_the_agreed_form_and_tells_what_is_wrong_and_what_to_do(
    database: Database, files: Files, tmp_path: Path
) -> None:
    with Crew(tmp_path, database, files, max_attempts=1) as crew:
        check = crew.call("status", "--check")
        assert check.returncode == 1 and check.stdout == "not ok: crew: no member is active: none ever was\n"
        assert "Start a member" in crew.call("status").stdout
        empty = crew.status()
        assert {key: empty[key] for key in ("group", "active", "members")} == {
            "group": "crew",
            "active": None,
            "members": [],
        }

        files.put("1.csv", b"x")
        a = crew.start("a")
        a.wait("elected")
        crew.start("b").wait("standby")
        crew.handled("1.csv")
        wait_for(lambda: crew.states() == {"1.csv": "done"})
        check = crew.call("status", "--check")
        assert check.returncode == 0 and check.stdout == "ok: crew: a is active at term 1, 1 standby\n"
        text = crew.call("status").stdout
        assert re.search(r"a is active at term 1, for at least \d", text) and "1 done, 0 failed" in text
        assert re.search(r"^  standby   b  heartbeat \d\.\d s ago$", text, re.MULTILINE)
        assert "PROBLEM" not in text and "\x1b" not in text, "no colour in a pipe"
        # The contract's names, each with its own meaning; further ones may stand beside them.
        status = crew.status()
        assert set(status) >= {"group", "active", "term", "database", "members", "files"}
        assert (status["group"], status["active"], status["term"]) == ("crew", "a", 1)
        assert status["database"] == database.url.replace(":secret", "")
        assert status["files"] == {"claimed": 0, "done": 1, "failed": 0, "quarantined": 0}
        assert [(member["member_id"], member["role"]) for member in status["members"]] == [
            ("a", "active"),
            ("b", "standby"),
        ]
        for member in status["members"]:
            assert set(member) >= {"member_id", "role", "heartbeat_age"}
            assert isinstance(member["heartbeat_age"], float) and 0 <= member["heartbeat_age"] < crew.liveness

        crew.fail()
        files.put("2.csv", b"x")
        wait_for(lambda: crew.states().get("2.csv") == "quarantined")
        check = crew.call("status", "--check")
        assert check.returncode == 1 and check.stdout == "not ok: crew: 1 file is quarantined\n"
        text = crew.call("status").stdout
        assert "this file is no good" in text and "files --state quarantined" in text and "2.csv" in text

        killed = a.kill()
        (other,) = [member for member in crew.members if member is not a]
        other.kill()
        wait_for(lambda: time.time() > killed + crew.liveness, 2 * crew.liveness)
        check = crew.call("status", "--check")
        assert check.returncode == 1
        why = r"not ok: crew: no member is active: a was, and its last heartbeat is \d+(\.\d)? s old; "
        assert re.match(why, check.stdout)
        assert "Start a member" in crew.call("status").stdout

        # One that leaves well is released, until another one has the token; those that died are stale.
        last = crew.start("c")
        last.wait("elected")
        assert last.stop() == 0
        status = crew.status()
        assert status["active"] is None and status["term"] == 2
        roles = {member["member_id"]: member["role"] for member in status["members"]}
        assert roles == {"a": "stale", "b": "stale", "c": "released"}


def test_check_of_a_hand_over_under_way_looks_twice(crew: Crew) -> None:
    a = crew.start("a")
    a.wait("elected")
    b = crew.start("b")
    b.wait("standby")
    a.stop()
    assert crew.call("status", "--check").returncode == 0


def terminal(crew: Crew, **environment: str) -> str:
    """What `status` prints in a terminal."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(MODULE), "status"],
        env={**crew.environment(), **environment},
        cwd=crew.folder,
        stdin=subprocess.DEVNULL,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    said = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while select.select([leader], [], [], 30)[0] and (data := os.read(leader, 65536)):
            said += data
    process.wait(30)
    os.close(leader)
    return said.decode()


def test_colour_is_for_terminals_without_no_color(crew: Crew) -> None:
    assert "\x1b[31m  PROBLEM: no member is active" in terminal(crew)
    assert "\x1b" not in terminal(crew, NO_COLOR="1") and "PROBLEM" in terminal(crew, NO_COLOR="1")


@pytest.mark.parametrize("kept", [True, False])
def test_the_last_lines_of_a_commands_stderr_are_kept_unless_told_otherwise(crew: Crew, kept: bool) -> None:
    script = crew.folder / "script.py"
    script.write_text(
        "import sys\nprint('on stdout')\n"
        "print('x' * 3000, file=sys.stderr)\nprint('100% wrong:', file=sys.stderr)\n"
        "print('ValueError: the last line', file=sys.stderr)\nsys.exit(3)\n"
    )
    crew.settings.update(exec=f"{sys.executable} {script}", max_attempts=1, error_output="yes" if kept else "no")
    crew.files.put("1.csv", b"x")
    crew.start("a").wait("file_quarantined")
    said = crew.call("files", "--state", "quarantined").stdout
    assert said.count("\n") == 1 and "1.csv" in said and "command exited with 3" in said and "on stdout" not in said
    assert said.rstrip().endswith("100% wrong: | ValueError: the last line") == kept
    assert len(said) < 3000 and ("xxx" in said) == kept
    found = json.loads(crew.call("files", "--state", "quarantined", "--json").stdout)
    assert (found["error"] == "command exited with 3") != kept
    assert ("ValueError: the last line" in crew.call("status").stdout) == kept


def test_names_that_the_terminal_cannot_show_end_no_command(crew: Crew) -> None:
    crew.files.put("grün-日本.csv", b"x")
    crew.fail()
    crew.settings.update(max_attempts=1)
    crew.start("a").wait("file_quarantined")
    environment = {**crew.environment(), "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    for words in (["files"], ["status"], ["run", "--dry-run"]):
        done = crew.run(*words, environment=environment)
        assert "gr\\xfcn" in done.stdout and not done.stderr and done.returncode == 0


def dry(crew: Crew, **changes: Any) -> dict[str, tuple[str, str]]:
    """name -> (take or skip, why), as `run --dry-run` tells."""
    done = crew.run("run", "--dry-run", **changes)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines()[:-1]:
        word, path, _, *rest = line.split("  ")
        found[os.path.basename(path)] = (word, rest[1] if len(rest) > 1 else "")
    taken = sum(word == "take" for word, _ in found.values())
    assert done.stdout.splitlines()[-1].startswith(f"{taken} of {len(found)} files would be handled")
    return found


@kinds("postgresql", "sqlite")
def test_a_dry_run_tells_for_each_file_why_and_changes_nothing(
    database: Database, files: Files, tmp_path: Path
) -> None:
    with Crew(tmp_path, database, files, max_attempts=1, exclude="no*") as crew:
        files.put("done.csv", b"1")
        crew.start("a").wait("file_done")
        crew.fail()
        files.put("bad.csv", b"1")
        crew.members[0].wait("file_quarantined")
        assert crew.members[0].stop() == 0
        for name in ("new.csv", "no.csv", ".hidden", "half.tmp"):
            files.put(name, b"1")
        files.put("done.csv", b"another version")
        before = (crew.ledger(), database.execute("SELECT * FROM token_holder"), files.names(), crew.runs("begin"))
        found = dry(crew, settle=2)
        assert found["new.csv"] == ("take", "if it is unchanged 2 s later")
        assert found["done.csv"] == ("take", "if it is unchanged 2 s later"), "a new version is a new file"
        assert found["bad.csv"] == ("skip", "quarantined: command exited with 1: this file is no good")
        for name in ("no.csv", ".hidden", "half.tmp"):
            assert found[name][0] == "skip" and "not asked for" in found[name][1]
        assert dry(crew, settle=0)["new.csv"] == ("take", "")
        assert dry(crew, ready_suffix=".ok")["new.csv"] == ("skip", "its marker .ok is not there")
        assert dry(crew, min_age=60)["new.csv"] == ("skip", "just seen for the first time (min_age)")
        files.put("old.csv", b"1", time.time() - 3 * 86400)
        assert dry(crew, max_age=86400)["old.csv"] == ("skip", "older than max_age")
        files.server.put(files.root / "old.csv", b"1", time.time() - 3 * 86400)
        os.remove(files.root / "old.csv")
        after = (crew.ledger(), database.execute("SELECT * FROM token_holder"), files.names(), crew.runs("begin"))
        assert after == before


def test_a_dry_run_makes_no_sqlite_file_and_tells_of_a_back_off(crew: Crew) -> None:
    crew.files.put("1.csv", b"1")
    assert dry(crew)["1.csv"][0] == "take"
    assert not (crew.folder / "coordination.db").exists()
    crew.fail()
    crew.settings.update(retry_delay=500)
    crew.start("a").wait("file_failed")
    word, why = dry(crew)["1.csv"]
    assert word == "skip" and re.match(r"failed, tried again in \d+ min: command exited with 1: this", why)


# ----------------------------------------------------------------------------- pieces


def view(holder: Optional[str], term: int, age: Optional[float]) -> Any:
    return ftpcoord.View(holder, term, False, "stamp", age, time.time(), 0.001, released=age == 1e9)


def test_takeovers_seen_by_a_standby_have_their_reason() -> None:
    stats = ftpcoord.Stats("me")
    for holder, term, age in [
        ("a", 1, 0.5),
        ("a", 1, 0.6),
        ("b", 2, 0.1),  # alive at the last look
        ("b", 2, 40.0),
        ("c", 3, 0.1),  # stale
        ("c", 3, 1e9),
        ("d", 4, 0.1),
    ]:
        stats.looked(view(holder, term, age), 28)
    assert [(t["member"], t["term"], t["reason"]) for t in reversed(stats.takeovers)] == [
        ("b", 2, "handed over"),
        ("c", 3, "stale"),
        ("d", 4, "released"),
    ]
    stats.tell_role("g", "a", "elected", term=5, reason="stale", before="d")
    assert stats.own["active_since"] is not None and stats.elections["stale"] == 1
    stats.tell_role("g", "a", "lost", term=5, reason="deadline passed")
    assert stats.own["active_since"] is None and stats.takeovers[0]["event"] == "lost"
    stats.looked(view("e", 6, 0.1), 28)
    assert stats.takeovers[0].items() >= {"event": "other", "member": "e", "term": 6, "reason": "handed over"}.items()
    for number in range(1000):
        stats.looked(view("x", number, 0.1), 28)
        stats.file("done", row())
    assert len(stats.takeovers) == 50 and len(stats.minutes) <= 2 and stats.work["done"] == 1000


def test_a_histogram_counts_each_duration_once_and_bounds_belong_to_their_bucket() -> None:
    histogram = ftpcoord.Histogram((0.1, 1.0))
    for seconds in (0.05, 0.1, 0.5, 1.0, 7.0):
        histogram.add(seconds)
    assert histogram.counts == [2, 2, 1] and histogram.sum == pytest.approx(8.65)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (12, "12 s"),
        (99, "99 s"),
        (300, "5 min"),
        (5399, "90 min"),
        (5400, "1 h 30 min"),
        (100000, "27 h 46 min"),
        (4 * 86400 + 5, "4 days"),
    ],
)
def test_durations_are_in_words(seconds: float, text: str) -> None:
    assert ftpcoord.duration(seconds) == text


def test_livez_fails_when_the_heartbeat_or_the_polling_has_ended(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {key: value for key, value in crew.settings.items() if key != "handler"}
    listener = ftpcoord.Listener(**settings, member_id="a")
    assert ftpcoord.why_stuck(listener) == ""
    listener.start()
    try:
        wait_for(lambda: ftpcoord.why_unready(listener) == "")
        assert ftpcoord.role_of(listener.member) == "active"
        pulse = listener.member.pulse
        listener.member.pulse = ftpcoord.Pulse(pulse.database)  # one without a thread
        assert "heartbeat" in ftpcoord.why_stuck(listener)
        listener.member.pulse = pulse
        assert ftpcoord.why_stuck(listener) == ""
        monkeypatch.setattr(listener, "polling", lambda: False)
        assert "polling" in ftpcoord.why_stuck(listener)
    finally:
        listener.stop()
        listener.join(30)
