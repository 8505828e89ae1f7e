"""File servers and local disks that misbehave: no file is lost, none is delivered in part, and it is said once.

Each test runs a whole Listener against a server of hostile.py; both ways of delivery where they differ: `folder`
(groups of files, one commit) and `handler` (file by file).
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import resource
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional, Union

import hostile
import pytest
from conftest import Files, new_folder, wait_for
from hostile import FtpHost, Host, SftpHost, cut_after, reply, stall_after, stream

import ftpcoord

DELIVERIES = pytest.mark.parametrize("delivery", ["folder", "handler"])
HOSTS = pytest.mark.parametrize("kind", [FtpHost, SftpHost], ids=["ftp", "sftp"])
PATIENCE = 20.0


class Site(logging.Handler):
    """A listener over a host, its log as text, its deliveries and its ledger."""

    def __init__(self, folder: Path, settings: dict[str, Any], delivery: str = "folder", **changes: Any) -> None:
        super().__init__()
        self.folder, self.delivery = folder, delivery
        self.log: list[str] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.handled: list[tuple[str, bytes, int]] = []
        self.target = folder / "delivered"
        self.target.mkdir(exist_ok=True)
        chosen: dict[str, Any] = {
            "database": f"sqlite:///{folder / 'coordination.db'}", "member_id": "a", "timeout": 1, "settle": 0,
            "polling_interval": 0.1, "retry_delay": 0.05, "heartbeat_frequency": 0.2, "liveness_check_interval": 4,
            "drain_timeout": 3, **settings,
        }  # fmt: skip
        if delivery == "folder":
            chosen["download_dir"] = str(self.target)
        chosen = {name: value for name, value in {**chosen, **changes}.items() if value is not None}
        self.listener = ftpcoord.Listener(**chosen)
        if delivery == "handler":
            self.listener.on_file("*")(self.receive)

    def receive(self, file: ftpcoord.File) -> None:
        self.handled.append((file.name, file.read(), file.attempt))

    def emit(self, record: logging.LogRecord) -> None:
        self.log.append(ftpcoord.TextFormatter().format(record))
        self.events.append((record.getMessage(), getattr(record, "fields", {})))

    def __enter__(self) -> Site:
        ftpcoord.logger.addHandler(self)
        ftpcoord.logger.setLevel(logging.INFO)
        self.listener.start()
        return self

    def __exit__(self, kind: Optional[type[BaseException]], *_: object) -> None:
        self.listener.stop()
        ended = self.listener.join(PATIENCE)
        ftpcoord.logger.removeHandler(self)
        if kind is None:
            text = "\n".join(self.log)
            assert ended, text
            assert "Traceback" not in text and "traceback" not in text, text
            assert "hush-hush" not in text, text
            assert all(line.isprintable() for line in self.log), text
            assert not [name for _, _, names in os.walk(self.folder) for name in names if name.endswith(".part")]

    def all(self, name: str, **fields: object) -> list[dict[str, Any]]:
        return [found for event, found in list(self.events) if event == name and fields.items() <= found.items()]

    def wait(self, name: str, count: int = 1, **fields: object) -> dict[str, Any]:
        wait_for(lambda: len(self.all(name, **fields)) >= count, PATIENCE, f"{name}: " + "\n".join(self.log[-30:]))
        return self.all(name, **fields)[count - 1]

    def polls(self, more: int = 2) -> None:
        """Waits for some further polls that succeed."""
        self.wait("polled", len(self.all("polled")) + more)

    def delivered(self) -> dict[str, bytes]:
        """All that was handed over so far, by name."""
        if self.delivery == "handler":
            return {name: content for name, content, _ in list(self.handled)}
        found = {}
        for path in self.target.rglob("*"):
            if path.is_file() and not path.name.startswith(".ftpcoord-"):
                found[str(path.relative_to(self.target))] = path.read_bytes()
        return found

    def arrive(self, expected: dict[str, bytes]) -> None:
        """Waits until exactly these are delivered; whatever is there before that must be one of them, and whole."""
        until = time.monotonic() + PATIENCE
        while True:
            found = self.delivered()
            assert found.items() <= expected.items(), sorted(found.items() - expected.items())
            if len(found) == len(expected):
                return
            said = "\n".join(self.log[-30:])
            assert time.monotonic() < until, f"{sorted(expected.keys() - found.keys())} did not arrive:\n{said}"
            time.sleep(0.01)

    def row(self, name: str) -> Optional[dict[str, Any]]:
        """The ledger's row of a file."""
        with contextlib.closing(sqlite3.connect(self.folder / "coordination.db", timeout=10)) as connection:
            connection.row_factory = sqlite3.Row
            try:
                rows = [dict(row) for row in connection.execute("SELECT * FROM file_ledger")]
            except sqlite3.OperationalError:
                return None  # not made yet
        return next((row for row in rows if row["path"] == f"/in/{name}"), None)

    def state(self, name: str, state: str) -> dict[str, Any]:
        def found() -> Optional[dict[str, Any]]:
            row = self.row(name)
            return row if row is not None and row["state"] == state else None

        row: dict[str, Any] = wait_for(found, PATIENCE, f"{name} {state}: " + "\n".join(self.log[-30:]))
        return row


def bytes_of(size: int) -> bytes:
    return os.urandom(64) * (size // 64) + b"e" * (size % 64)


# ---------------------------------------------------------------------------------------------------------------------
# Transfers that break
# ---------------------------------------------------------------------------------------------------------------------


def break_transfer(host: Host, how: str) -> None:
    if isinstance(host, FtpHost):
        host.on("RETR", {
            "cut": cut_after(100_000), "cut with 426": cut_after(100_000, control=False),
            "stalled": stall_after(100_000), "silent": hostile.silence, "421": hostile.say_and_leave("421 closing"),
            "425": reply("425 no data connection"), "426": reply("426 aborted"), "left": hostile.leave,
            "reply without end": hostile.content(b"short", "226-" + "x\r\n" * 2000),
        }[how])  # fmt: skip
    else:
        actions = {"cut": hostile.leave, "stalled": hostile.nothing, "left": hostile.leave,
                   "too much": lambda session, path: session.answer(103, hostile._string(b"x" * (session.length + 1))),
                   "another's answer": lambda session, path: session.raw(b"\0\0\0\x09\x65\0\xff\xff\xff\0\0\0\0"),
                   "gibberish": lambda session, path: session.raw(b"Welcome!\r\n")}  # fmt: skip
        host.on("OPEN" if how == "left" else "READ", actions[how])


@pytest.mark.parametrize(("kind", "how"), [
    *[(FtpHost, how) for how in ("cut", "cut with 426", "stalled", "silent", "421", "425", "426", "left",
                                 "reply without end")],
    *[(SftpHost, how) for how in ("cut", "stalled", "left", "too much", "another's answer", "gibberish")],
])  # fmt: skip
@DELIVERIES
def test_a_transfer_that_breaks_is_tried_again_and_is_not_the_files_failure(
    tmp_path: Path, kind: type[Any], how: str, delivery: str
) -> None:
    content = bytes_of(300_000)
    with kind(files={"a.csv": content}) as host:
        break_transfer(host, how)
        with Site(tmp_path, host.settings, delivery) as site:
            failed = site.wait("file_failed")
            site.arrive({"a.csv": content})
            row = site.state("a.csv", "done")
            assert (row["failures"], row["attempts"]) == (0, 2)
            assert failed["attempt"] == 1 and failed["path"] == "/in/a.csv"
            assert len(site.all("file_failed")) == 1, "said once"


@DELIVERIES
def test_one_broken_transfer_leaves_the_other_files_of_the_poll_alone(tmp_path: Path, delivery: str) -> None:
    files = {f"{number:02}": bytes_of(number * 1000) for number in range(20)}
    with FtpHost(files=dict(files)) as host:
        host.on("RETR", cut_after(0))
        with Site(tmp_path, host.settings, delivery, workers=2) as site:
            site.arrive(files)
            assert not site.all("server_down")


@pytest.mark.parametrize("code", ["450", "451", "550", "553"])
@DELIVERIES
def test_a_file_that_the_server_refuses_is_counted_and_quarantined(tmp_path: Path, code: str, delivery: str) -> None:
    with FtpHost(files={"a": b"1", "b": b"2"}) as host:
        refuse = reply(f"{code} not now")
        host.on("RETR", lambda session, name: refuse(session, name) if name.endswith("/a") else session.on_retr(name),
                times=None)  # fmt: skip
        with Site(tmp_path, host.settings, delivery, max_attempts=3) as site:
            row = site.state("a", "quarantined")
            assert (row["failures"], row["attempts"]) == (3, 3) and f"{code} not now" in row["error"]
            site.arrive({"b": b"2"})
            assert len(site.all("file_failed")) == 2 and len(site.all("file_quarantined")) == 1


@DELIVERIES
def test_a_file_that_vanishes_between_listing_and_fetching_is_no_failure(tmp_path: Path, delivery: str) -> None:
    with FtpHost(files={"a": b"1", "b": b"2"}) as host:
        def vanish(session: Any, argument: str) -> None:
            del session.host.files[session.name(argument)]
            session.say("550 no such file")

        host.on("RETR", vanish)
        with Site(tmp_path, host.settings, delivery, workers=1) as site:
            site.arrive({"b": b"2"})
            site.polls()
            assert site.row("a") is None and not site.all("file_failed")
            host.put("a", b"new")
            site.arrive({"a": b"new", "b": b"2"})
            assert site.wait("file_done", path="/in/a")["attempt"] == 1


@HOSTS
@DELIVERIES
def test_of_a_file_that_is_replaced_while_it_is_read_only_the_new_version_arrives(
    tmp_path: Path, kind: type[Any], delivery: str
) -> None:
    old, new = bytes_of(200_000), bytes_of(200_001)
    with kind(files={"a": old}) as host:
        def replace(session: Any, path: str) -> None:
            host.put("a", new, seconds=60)
            session.on_retr(path) if kind is FtpHost else session.behave("READ", path, b"")

        host.on("RETR" if kind is FtpHost else "READ", replace)
        with Site(tmp_path, host.settings, delivery) as site:
            site.arrive({"a": new})
            assert site.state("a", "done")["failures"] == 0, "the new version has not failed"


@pytest.mark.parametrize("left", [0, 100, 199_999])
@DELIVERIES
def test_a_file_that_is_truncated_while_it_is_read_does_not_arrive_until_it_is_listed_like_that(
    tmp_path: Path, left: int, delivery: str
) -> None:
    old = bytes_of(200_000)
    with FtpHost(files={"a": old}) as host:
        host.on("RETR", hostile.content(old[:left]))
        with Site(tmp_path, host.settings, delivery, retry_delay=0.5) as site:
            site.wait("file_failed", path="/in/a")
            assert site.delivered() == {}
            host.put("a", old[:left], seconds=60)
            site.arrive({"a": old[:left]})


def test_a_file_that_grows_waits_until_two_listings_agree(tmp_path: Path) -> None:
    with FtpHost(files={"a": b"0"}) as host:
        def grow(session: Any, argument: str) -> None:
            session.send(host.listing(session.folder))
            host.put("a", host.files["a"] + b"more")

        host.on("MLSD", grow, times=8)
        with Site(tmp_path, host.settings, settle=0.05) as site:
            site.arrive({"a": b"0" + b"more" * 8})
            assert len(host.said("RETR")) == 1, "it was not even asked for before"


@HOSTS
@DELIVERIES
def test_an_empty_file_arrives(tmp_path: Path, kind: type[Any], delivery: str) -> None:
    with kind(files={"empty": b"", "one": b"1"}) as host, Site(tmp_path, host.settings, delivery) as site:
        site.arrive({"empty": b"", "one": b"1"})


def test_a_slow_transfer_is_progress_however_many_files_wait(tmp_path: Path) -> None:
    """A watchdog that takes it for a stall would cut it again and again, for ever."""
    content = b"0123456789"
    with FtpHost(files={f"{number}": content for number in range(4)}) as host:
        host.on("RETR", stream([content[i : i + 1] for i in range(10)], 0.06), times=None)
        with Site(tmp_path, host.settings, workers=1, stall_timeout=0.5) as site:
            site.arrive({f"{number}": content for number in range(4)})
            assert not site.all("handing_over") and not site.all("file_failed")


# ---------------------------------------------------------------------------------------------------------------------
# Servers that are down, full, or refuse the login
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [
    "421 too many", "425 no data", "426 cut", "port 99999", "port 0", "pasv port", "no passive mode", "silent",
    "endless line", "endless listing", "endless reply", "listing cut", "stalled listing",
])  # fmt: skip
def test_a_listing_that_fails_is_said_once_and_the_next_polls_go_on(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ftpcoord, "MAX_ENTRIES", 20_000)
    many = (b"type=file;size=1; %d\r\n" % number * 100 for number in range(1_000_000))
    with FtpHost(files={"a": b"1"}) as host:
        actions: dict[str, list[tuple[str, hostile.Action]]] = {
            "421 too many": [("CWD", hostile.say_and_leave("421 too many users"))],
            "425 no data": [("MLSD", reply("425 no data connection"))],
            "426 cut": [("MLSD", hostile.content(b"type=file;size=1; a\r\n", "426 cut"))],
            "port 99999": [("EPSV", reply("229 (|||99999|)"))],
            "port 0": [("EPSV", reply("229 (|||0|)"))],
            "pasv port": [("EPSV", reply("500 no")), ("PASV", reply("227 at (127,0,0,1,999,999)"))],
            "no passive mode": [("EPSV", reply("500 no")), ("PASV", reply("500 no"))],
            "silent": [("MLSD", hostile.silence)],
            "endless line": [("MLSD", stream(b"x" * 10_000 for _ in range(1_000_000)))],
            "endless listing": [("MLSD", stream(many))],
            "endless reply": [("CWD", reply("250-" + "x\r\n" * 5000))],
            "listing cut": [("MLSD", cut_listing)],
            "stalled listing": [("MLSD", stall_after(10))],
        }
        for verb, action in actions[how]:
            host.on(verb, action, times=2)
        with Site(tmp_path, host.settings) as site:
            assert "ftp://127.0.0.1" in site.wait("server_down")["error"]
            site.wait("server_up")
            site.arrive({"a": b"1"})
            assert len(site.all("server_down")) == 1 and not site.all("file_failed")


def cut_listing(session: hostile.FtpSession, argument: str) -> None:
    session.say("150 here")
    data = session.data()
    data.sendall(b"type=file;size=1; a\r\ntype=file;si")
    session.reset(data, session.sock)


def test_a_listing_that_never_ends_by_drips_is_ended_by_the_watchdog(tmp_path: Path) -> None:
    drips = (b"type=file;size=1; %d\r\n" % number for number in range(1_000_000))
    with FtpHost(files={"a": b"1"}) as host:
        host.on("MLSD", stream(drips, 0.1))
        with Site(tmp_path, host.settings, stall_timeout=1) as site:
            assert "no progress" in site.wait("handing_over")["reason"]
            site.wait("elected", 2)
            site.arrive({"a": b"1"})


def test_folders_in_folders_without_end_are_left_at_some_depth(tmp_path: Path) -> None:
    with FtpHost(files={"a": b"1"}) as host:
        host.on("CWD", reply("250 ok"), times=None)
        host.on("MLSD", lambda session, argument: session.send(b"type=dir; d\r\ntype=file;size=1; a\r\n"), times=None)
        with Site(tmp_path, host.settings, recursive=True, pattern="nothing") as site:
            assert site.wait("polled")["listed"] <= 200


def test_a_folder_that_may_not_be_listed_does_not_stop_the_others(tmp_path: Path) -> None:
    with SftpHost(files={"a": b"1"}) as host:
        host.entries.append((b"closed", hostile.attributes(0, mode=0o040700)))
        host.on("OPENDIR", lambda session, path: (
            session.status(3, b"Permission denied") if path.endswith("closed") else session.behave("OPENDIR", path, b"")
        ), times=None)  # fmt: skip
        with Site(tmp_path, host.settings, recursive=True) as site:
            site.arrive({"a": b"1"})
            site.polls()
            assert len(site.all("file_refused", folder="/in")) == 1 and not site.all("server_down")


def test_a_server_that_dies_with_many_files_waiting_is_said_once_and_not_of_each_file(tmp_path: Path) -> None:
    files = {f"{number:03}": b"x" for number in range(100)}
    with FtpHost(files=dict(files)) as host:
        def die(session: Any, argument: str) -> None:
            host.on("GREETING", hostile.say_and_leave("421 going down"), times=3)
            host.drop()
            raise session.host.Gone if hasattr(session.host, "Gone") else hostile._Gone

        def fifth(session: Any, argument: str) -> None:
            (die if len(host.said("RETR")) == 5 else type(session).on_retr.__get__(session))(*(
                (session, argument) if len(host.said("RETR")) == 5 else (argument,)))  # fmt: skip

        host.on("RETR", fifth, times=None)
        with Site(tmp_path, host.settings, "handler", workers=2, polling_interval=2) as site:
            site.wait("server_down")
            site.wait("server_up")
            site.arrive(files)
            assert len(site.all("server_down")) == 1
            assert len(site.all("file_failed")) <= 4, "those in work, not those that waited"
            assert sum(attempt > 1 for _, _, attempt in site.handled) <= 4


@pytest.mark.parametrize("refusal", ["421 too many connections", "530 too many connections of yours"])
@DELIVERIES
def test_a_server_that_allows_few_connections_is_used_with_as_many(
    tmp_path: Path, refusal: str, delivery: str
) -> None:
    files = {f"{number:02}": bytes_of(300_000) for number in range(30)}
    with FtpHost(files=dict(files)) as host:
        if refusal.startswith("421"):
            host.most_sessions = 2
        else:
            host.on("PASS", lambda session, argument: (
                session.say(refusal) if host.open_sessions > 2 else session.on_pass(argument)), times=None)  # fmt: skip
        with Site(tmp_path, host.settings, delivery, workers=4) as site:
            site.arrive(files)
            assert not site.all("file_failed") and not site.all("server_down")
            assert host.sessions <= 2 + 6, "it is not asked again and again for more"


class Hasty(ftpcoord.Backoff):
    """A minute takes a fifth of a second."""

    def __init__(self, first: float, most: float) -> None:
        super().__init__(first / 300, most / 300)


@HOSTS
def test_a_refused_login_is_tried_again_after_a_minute_at_first_and_then_twice_as_long_each_time(
    tmp_path: Path, kind: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ftpcoord, "Backoff", Hasty)
    with kind(files={"a": b"1"}) as host:
        moments: list[float] = []

        def refuse(session: Any, argument: str) -> None:
            moments.append(time.monotonic())
            if kind is FtpHost:
                session.say("530 no")

        host.on("PASS" if kind is FtpHost else "LOGIN", refuse, times=4)
        with Site(tmp_path, host.settings, polling_interval=0.01) as site:
            site.arrive({"a": b"1"})
            assert "refused" in site.all("server_down")[0]["error"] and len(site.all("server_down")) == 1
        pauses = [after - before for before, after in zip(moments, moments[1:])]
        assert len(pauses) == 3
        assert all(pause > 0.2 * 2**number - 0.05 for number, pause in enumerate(pauses)), pauses


def test_the_first_pause_after_a_refused_login_is_a_minute(tmp_path: Path) -> None:
    with FtpHost() as host:
        host.on("PASS", reply("530 no"), times=None)
        with Site(tmp_path, host.settings, polling_interval=0.01) as site:
            assert 59 < site.wait("server_down")["retry_in"] <= 60
            assert len(host.said("PASS")) == 1
        assert len(host.said("PASS")) == 1


def test_a_password_that_stops_being_valid_costs_one_refused_login_however_many_files_wait(tmp_path: Path) -> None:
    files = {f"{number:02}": b"x" for number in range(40)}
    with FtpHost(files=dict(files)) as host:
        host.on("PASS", lambda session, argument: session.on_pass(argument))
        host.on("PASS", reply("530 no"), times=None)
        with Site(tmp_path, host.settings, "handler", workers=4) as site:
            site.arrive(files)
            assert len(host.said("PASS")) <= 2


@pytest.mark.parametrize("tries", [1, 3])
def test_a_server_that_hangs_up_on_a_wrong_password_has_refused_the_login(
    tries: int, request: pytest.FixtureRequest
) -> None:
    """sshd with MaxAuthTries 1 does: it must not be taken for a server that is down and asked again at once."""
    import servers
    from conftest import need

    need("sshd")
    with servers.sshd(options={"MaxAuthTries": str(tries)}) as server, new_folder("sshd", server) as files:
        settings = {name: value for name, value in files.settings.items() if name != "key"}
        config = ftpcoord.Config(**{**settings, "password": "wrong", "database": "sqlite:///x", "timeout": 10})
        with pytest.raises(ftpcoord.LoginRefused):
            ftpcoord.open_server(config)


@pytest.mark.parametrize("waits", ["polling_interval", "settle"])
def test_waiting_on_purpose_is_not_taken_for_a_hang(tmp_path: Path, waits: str) -> None:
    """polling_interval or settle longer than stall_timeout: the member keeps its role."""
    with FtpHost(files={"a": b"1"}) as host:
        changes: dict[str, Any] = {waits: 1.5, "stall_timeout": 0.3}
        with Site(tmp_path, host.settings, **changes) as site:
            site.wait("polled", 2 if waits == "polling_interval" else 1)
            site.arrive({"a": b"1"})
            assert not site.all("handing_over") and len(site.all("elected")) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Names and listings
# ---------------------------------------------------------------------------------------------------------------------

ODD = [b"caf\xe9.csv", b"\xff\xfe", b"\x1b[2J\x1b]0;owned\x07.csv", b"\xe2\x80\xaefdp.exe", b"-rf", b"--help", b" ",
       b"a\tb", b"\xc2\x9b31m", b"per%20cent%", b"\x7f", b"$(touch x)", b"`touch x`;#"]  # fmt: skip


@HOSTS
@DELIVERIES
def test_odd_names_arrive_byte_for_byte_and_harm_no_terminal(tmp_path: Path, kind: type[Any], delivery: str) -> None:
    files: dict[Union[str, bytes], bytes] = {name: b"content of " + name for name in ODD}
    with kind(files=files) as host, Site(tmp_path, host.settings, delivery, after="delete") as site:
        site.arrive({os.fsdecode(name): content for name, content in files.items() if isinstance(name, bytes)})
        wait_for(lambda: not host.files, PATIENCE, "all to be deleted by the very same names")
        site.polls()
        for line in ftpcoord_json(site):
            line.encode("ascii")


def ftpcoord_json(site: Site) -> list[str]:
    record = logging.LogRecord("ftpcoord", logging.INFO, "", 0, "file_done", None, None)
    lines = []
    for _, fields in site.events:
        record.fields = fields
        lines.append(ftpcoord.JsonFormatter().format(record))
        assert "\\udc" not in lines[-1] and "\\u001b" not in lines[-1], "no text of a path that JSON readers refuse"
    return lines


TRAVERSAL = [b"../out", b"../../etc/cron.d/x", b"/etc/passwd", b"a/b", b"..", b".", b"", b"a\0b", b"a\rb", b"/"]


@HOSTS
def test_names_that_lead_elsewhere_are_refused_said_once_and_nothing_is_written_there(
    tmp_path: Path, kind: type[Any]
) -> None:
    inner = tmp_path / "1" / "2"
    inner.mkdir(parents=True)
    with kind(files={"good": b"1"}) as host:
        if isinstance(host, FtpHost):
            host.lines += [b"type=file;size=1; " + name for name in TRAVERSAL]
        else:
            host.entries += [(name, hostile.attributes(1)) for name in [*TRAVERSAL, b"a\nb"]]
        with Site(inner, host.settings, recursive=True, after="delete", pattern="*,.*") as site:
            site.arrive({"good": b"1"})
            site.polls(3)
            refused = [fields["name"] for fields in site.all("file_refused")]
            assert len(refused) == len(set(refused)) >= 6, refused
            said = host.said("RETR") + host.said("DELE") + host.said("OPEN") + host.said("REMOVE")
            assert {command.partition(" ")[2] for command in said} == {"/in/good"}
        assert sorted(path.name for path in tmp_path.rglob("*") if "coordination" not in path.name) == [
            "1", "2", "delivered", "good"]  # fmt: skip


@pytest.mark.parametrize("length", [256, 4000, 5000])
@DELIVERIES
def test_a_name_that_is_too_long_here_is_quarantined_or_refused_and_the_others_arrive(
    tmp_path: Path, length: int, delivery: str
) -> None:
    with FtpHost(files={"x" * length: b"1", "good": b"2"}) as host:
        with Site(tmp_path, host.settings, delivery, max_attempts=2) as site:
            site.arrive({"good": b"2"})
            if length < 4096:
                assert site.state("x" * length, "quarantined")["failures"] == 2
            else:
                site.wait("file_refused")
            site.polls()


@pytest.mark.parametrize("size", ["9223372036854775808", "9999999999999999999", "18446744073709551615", "-1", ""])
def test_a_size_that_no_file_has_is_said_once_and_the_others_arrive(tmp_path: Path, size: str) -> None:
    with FtpHost(files={"good": b"1"}) as host:
        host.lines.append(f"type=file;size={size};modify=20240112101530; huge".encode())
        with Site(tmp_path, host.settings) as site:
            site.arrive({"good": b"1"})
            site.polls()
            assert len(site.all("file_refused")) == 1


def test_a_size_beyond_the_ledgers_column_of_sftp_is_said_once_and_the_others_arrive(tmp_path: Path) -> None:
    with SftpHost(files={"good": b"1"}) as host:
        host.entries += [(b"huge", hostile.attributes(2**64 - 1)), (b"large", hostile.attributes(2**63))]
        with Site(tmp_path, host.settings) as site:
            site.arrive({"good": b"1"})
            site.polls()
            assert len(site.all("file_refused")) >= 1


def test_a_file_that_is_listed_twice_is_handled_once(tmp_path: Path) -> None:
    with FtpHost(files={"a": b"1"}) as host:
        host.lines += [b"type=file;size=1;modify=20240112101530; a"] * 5
        with Site(tmp_path, host.settings, "handler") as site:
            site.arrive({"a": b"1"})
            site.polls(3)
            assert site.handled == [("a", b"1", 1)]


@pytest.mark.parametrize("mlsd", [True, False], ids=["mlsd", "list"])
def test_links_and_devices_are_left_alone(tmp_path: Path, mlsd: bool) -> None:
    with FtpHost(files={"a": b"1"}, mlsd=mlsd) as host:
        host.lines += [
            b"type=OS.unix=slink:/etc;size=9; l", b"type=OS.unix=chr-1/3; null", b"type=dir; loop",
        ] if mlsd else [
            b"lrwxrwxrwx    1 0        0               9 Jul 20  2024 l -> /etc/passwd",
            b"crw-rw-rw-    1 0        0          1,   3 Jul 20  2024 null",
        ]  # fmt: skip
        with Site(tmp_path, host.settings, recursive=True) as site:
            site.arrive({"a": b"1"})
            site.polls()
            assert [command.rpartition("/")[2] for command in host.said("RETR")] == ["a"]


@pytest.mark.parametrize("file_server", ["vsftpd", "sshd"], indirect=True)
def test_links_of_a_real_server_are_not_followed(file_server: Files, tmp_path: Path) -> None:
    file_server.put("folder/real", b"1")
    (file_server.root / "file-link").symlink_to("folder/real")
    (file_server.root / "folder" / "loop").symlink_to("..")
    (file_server.root / "out").symlink_to("/etc")
    with Site(tmp_path, file_server.settings, recursive=True, timeout=10) as site:
        site.arrive({"folder/real": b"1"})
        site.polls()


@pytest.mark.parametrize("minutes", [-11 * 60, 0, 345, 14 * 60])
@pytest.mark.parametrize("age", [0, 300], ids=["minutes", "days"])
def test_a_server_in_another_zone_has_its_files_handled_once_and_deleted(
    tmp_path: Path, minutes: int, age: int
) -> None:
    now = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None, microsecond=0)
    when = now - datetime.timedelta(days=age, hours=2)
    with FtpHost(mlsd=False, zone=minutes) as host:
        for number in range(3):
            host.files[f"{number}"] = b"1"
            host.times[f"{number}"] = when
        with Site(tmp_path, host.settings, "handler", after="delete", max_age=None) as site:
            wait_for(lambda: not host.files, PATIENCE, "\n".join(site.log))
            site.polls()
            assert sorted(site.handled) == [(f"{number}", b"1", 1) for number in range(3)]
            assert not site.all("file_kept")


# ---------------------------------------------------------------------------------------------------------------------
# After-actions
# ---------------------------------------------------------------------------------------------------------------------


@HOSTS
def test_a_move_onto_an_existing_target_takes_a_free_name_and_replaces_nothing(tmp_path: Path, kind: type[Any]) -> None:
    with kind(files={"a.csv": b"new", "done/a.csv": b"old", "done/a.1.csv": b"older"}) as host:
        host.folders.add("/in/done")
        with Site(tmp_path, host.settings, after="move:done") as site:
            wait_for(lambda: "a.csv" not in host.files, PATIENCE, "\n".join(site.log))
            site.polls()
            assert host.files == {"done/a.csv": b"old", "done/a.1.csv": b"older", "done/a.2.csv": b"new"}
            assert site.delivered() == {"a.csv": b"new"}


def test_a_target_that_appears_between_the_look_and_the_rename_is_not_replaced(tmp_path: Path) -> None:
    with FtpHost(files={"a.csv": b"new"}) as host:
        def appear(session: Any, argument: str) -> None:
            host.files["done/a.csv"] = b"another's"
            session.say("553 exists")

        host.folders.add("/in/done")
        host.on("RNTO", appear)
        with Site(tmp_path, host.settings, after="move:done") as site:
            wait_for(lambda: "a.csv" not in host.files, PATIENCE, "\n".join(site.log))
            assert host.files == {"done/a.csv": b"another's", "done/a.1.csv": b"new"}
            site.polls(1)


def test_a_server_that_says_of_every_name_that_it_exists_holds_no_worker_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ftpcoord, "MOST_NUMBERED", 20)
    with FtpHost(files={"a": b"1"}) as host:
        host.folders.add("/in/done")
        host.on("MLST", lambda session, path: (
            session.say("250-\r\n type=file;size=1;modify=20240112101530; x\r\n250 end")), times=None)  # fmt: skip
        with Site(tmp_path, host.settings, "handler", workers=1, after="move:done") as site:
            site.wait("file_failed", path="/in/a")
            host.put("b", b"2")
            site.arrive({"a": b"1", "b": b"2"})
            assert [row for row in site.handled if row[0] == "a"] == [("a", b"1", 1)], "done stays done"
            host.behave()
            wait_for(lambda: {"done/a", "done/b"} <= set(host.files), PATIENCE, "\n".join(site.log))


def test_a_delete_that_is_refused_is_tried_again_and_the_file_is_not_handled_again(tmp_path: Path) -> None:
    with FtpHost(files={"a": b"1"}) as host:
        host.on("DELE", reply("450 busy"))
        host.on("DELE", reply("550 denied"))
        host.on("DELE", hostile.say_and_leave("421 bye"))
        with Site(tmp_path, host.settings, "handler", after="delete") as site:
            wait_for(lambda: not host.files, PATIENCE, "\n".join(site.log))
            assert site.handled == [("a", b"1", 1)]
            site.polls()
            assert site.row("a") is None


# ---------------------------------------------------------------------------------------------------------------------
# This host: disks, folders, handlers
# ---------------------------------------------------------------------------------------------------------------------


class FullDisk:
    """While it is `full`, what is written goes to /dev/full, where the kernel says that no space is left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = True
        self._create = ftpcoord.create_file
        monkeypatch.setattr(ftpcoord, "create_file", self.create)

    def create(self, path: Path) -> Any:
        made = self._create(path)
        if not self.full:
            return made
        made.close()
        return open("/dev/full", "wb")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("size", [10, 3_000_000])
@HOSTS
@DELIVERIES
def test_a_full_disk_is_not_the_files_failure_and_all_arrive_when_there_is_space(
    tmp_path: Path, kind: type[Any], size: int, delivery: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch)
    files = {f"{number}": bytes_of(size) for number in range(5)}
    with kind(files=dict(files)) as host, Site(tmp_path, host.settings, delivery, max_attempts=2) as site:
        for number in range(5):
            failed = site.wait("file_failed", 3, path=f"/in/{number}")
            assert "No space left" in failed["error"]
        assert site.delivered() == {}
        row = site.row("1")
        assert row is not None and row["failures"] == 0 and row["attempts"] >= 3
        disk.full = False
        site.arrive(files)
        assert all(site.state(name, "done")["failures"] == 0 for name in files)
        assert not site.all("file_quarantined") and not site.all("server_down")


def test_a_disk_that_is_really_full_is_not_the_files_failure(tmp_path: Path) -> None:
    """On a small file system of its own; in a process, whose ledger is elsewhere."""
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(small)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        files = {f"{number}": bytes_of(100_000) for number in range(4)}
        with FtpHost(files=dict(files)) as host:
            with Site(tmp_path, host.settings, max_attempts=2, download_dir=small) as site:
                site.target = small
                site.wait("file_failed", 4)
                ballast = site.delivered()
                assert 1 <= len(ballast) <= 2 and ballast.items() <= files.items()
                for _ in range(3):
                    for name in site.delivered():
                        (tmp_path / name).write_bytes((small / name).read_bytes())
                        (small / name).unlink()
                    wait_for(lambda: site.delivered() or len(os.listdir(tmp_path)) >= 6, PATIENCE)
                wait_for(lambda: all(site.state(name, "done") for name in files), PATIENCE)
                assert not site.all("file_quarantined")
                found = {**{name: (tmp_path / name).read_bytes() for name in files if (tmp_path / name).exists()},
                         **site.delivered()}  # fmt: skip
                assert found == files
    finally:
        subprocess.run(["umount", str(small)], capture_output=True)


def test_a_download_folder_that_goes_away_and_comes_back_loses_nothing(tmp_path: Path) -> None:
    with FtpHost(files={"a": b"1"}) as host, Site(tmp_path, host.settings, max_attempts=2) as site:
        site.arrive({"a": b"1"})
        site.target.rename(tmp_path / "elsewhere")
        host.put("b", b"2")
        site.wait("file_failed", 3, path="/in/b")
        (tmp_path / "elsewhere").rename(site.target)
        site.arrive({"a": b"1", "b": b"2"})
        assert site.state("b", "done")["failures"] == 0


@pytest.mark.parametrize("error", [SystemExit, SystemExit(3), MemoryError, RecursionError, StopIteration, OSError(28)])
def test_whatever_a_handler_raises_is_its_files_failure_and_the_workers_go_on(tmp_path: Path, error: Any) -> None:
    with FtpHost(files={"a": b"1", "b": b"2", "c": b"3"}) as host:
        site = Site(tmp_path, host.settings, "handler", max_attempts=2, workers=1)
        receive = site.receive

        def bad(file: ftpcoord.File) -> None:
            if file.name != "c":
                raise error
            receive(file)

        site.listener._routes[:] = [("*", bad)]
        with site:
            site.arrive({"c": b"3"})
            assert site.state("a", "quarantined")["failures"] == site.state("b", "quarantined")["failures"] == 2


def test_what_is_written_here_follows_the_umask_and_no_planted_link(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        outside = tmp_path / "outside"
        outside.write_text("untouched")
        with FtpHost(files={"a": b"1", "sub/x": b"2"}) as host:
            host.folders.add("/in/sub")
            host.lines.append(b"type=dir; sub")
            (tmp_path / "delivered").mkdir()
            (tmp_path / "delivered" / "a").symlink_to(outside)
            (tmp_path / "delivered" / "sub").symlink_to(tmp_path)
            with Site(tmp_path, host.settings, recursive=True, max_attempts=1) as site:
                made = site.state("sub/x", "quarantined")
                wait_for(lambda: (tmp_path / "delivered" / "a.1").exists(), PATIENCE, "\n".join(site.log))
                assert "link" in made["error"] and not (tmp_path / "x").exists()
                assert stat.S_IMODE(os.stat(tmp_path / "delivered" / "a.1").st_mode) == 0o640
            assert outside.read_text() == "untouched"
    finally:
        os.umask(before)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert threading.active_count() < 200 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2_000_000
