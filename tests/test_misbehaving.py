"""File servers and local disks that misbehave: no file is lost, none is delivered in part, and it is said once.

Each test runs a whole Listener against a server of hostile.py; both ways of delivery where they differ: `folder`
(groups of files, one commit) and `handler` (file by file).
"""

from __future__ import annotations

import collections
import contextlib
import resource
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import hostile
import pytest
from conftest import new_folder, wait_for
from hostile import PATIENCE, FtpHost, Hasty, Host, SftpHost, Site, bytes_of, cut_after, reply, stall_after, stream
from processes import MEMBER, environment

import ftpcoord

DELIVERIES = pytest.mark.parametrize("delivery", ["folder", "handler"])
HOSTS = pytest.mark.parametrize("kind", [FtpHost, SftpHost], ids=["ftp", "sftp"])
# ---------------------------------------------------------------------------------------------------------------------
# Transfers that break
# ---------------------------------------------------------------------------------------------------------------------


def break_transfer(host: Host, how: str) -> None:
    if isinstance(host, FtpHost):
        host.on(
            "RETR",
            {
                "cut": cut_after(100_000),
                "cut with 426": cut_after(100_000, control=False),
                "stalled": stall_after(100_000),
                "silent": hostile.silence,
                "421": hostile.say_and_leave("421 closing"),
                "425": reply("425 no data connection"),
                "426": reply("426 aborted"),
                "left": hostile.leave,
                "reply without end": hostile.content(b"short", "226-" + "x\r\n" * 2000),
            }[how],
        )
    else:
        actions = {
            "cut": hostile.leave,
            "stalled": hostile.nothing,
            "left": hostile.leave,
            "too much": lambda session, path: session.answer(103, hostile.string(b"x" * (session.length + 1))),
            "another's answer": lambda session, path: session.raw(b"\0\0\0\x09\x65\0\xff\xff\xff\0\0\0\0"),
            "gibberish": lambda session, path: session.raw(b"Welcome!\r\n"),
        }
        host.on("OPEN" if how == "left" else "READ", actions[how])


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *[
            (FtpHost, how)
            for how in ("cut", "cut with 426", "stalled", "silent", "421", "425", "426", "left", "reply without end")
        ],
        *[(SftpHost, how) for how in ("cut", "stalled", "left", "too much", "another's answer", "gibberish")],
    ],
)
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


@DELIVERIES
def test_a_server_that_gives_open_files_the_same_handle_is_asked_for_one_file_at_a_time(
    tmp_path: Path, delivery: str
) -> None:
    """As Erlang's does from the third on. Their sizes and times are alike: nothing else tells what a READ read."""
    files = {f"{number:02}": b"%04d" % number for number in range(40)}
    opened: dict[Any, list[tuple[int, str]]] = collections.defaultdict(list)  # the newest first

    def open_file(session: Any, path: str) -> None:
        number = 0
        for handle, _ in opened[session]:
            number = handle + 1 if handle <= number else number
        opened[session].insert(0, (number, path))
        session.answer(102, hostile.string(b"%d" % number))

    def of_handle(verb: str) -> Any:
        def answer(session: Any, handle: str) -> None:
            known = next(((number, path) for number, path in opened[session] if handle == str(number)), None)
            if verb == "CLOSE" and known:
                opened[session].remove(known)
            session.behave(verb, known[1] if known else handle, b"")

        return answer

    with SftpHost(files=dict(files)) as host:
        host.on("OPEN", open_file, None)
        for verb in ("READ", "FSTAT", "CLOSE"):
            host.on(verb, of_handle(verb), None)
        with Site(tmp_path, host.settings, delivery, workers=2) as site:
            site.arrive(files)
            assert all(site.state(name, "done")["attempts"] == 1 for name in files)
            assert not site.all("file_failed") and not site.all("server_down")


@pytest.mark.parametrize("code", ["451", "550", "553"])
@DELIVERIES
def test_a_file_that_the_server_refuses_is_counted_and_quarantined(tmp_path: Path, code: str, delivery: str) -> None:
    with FtpHost(files={"a": b"1", "b": b"2"}) as host:
        refuse = reply(f"{code} not now")
        host.on(
            "RETR",
            lambda session, name: refuse(session, name) if name.endswith("/a") else session.on_retr(name),
            times=None,
        )
        with Site(tmp_path, host.settings, delivery, max_attempts=3) as site:
            row = site.state("a", "quarantined")
            assert (row["failures"], row["attempts"]) == (3, 3) and f"{code} not now" in row["error"]
            site.arrive({"b": b"2"})
            site.wait("file_quarantined")
            site.polls()
            assert len(site.all("file_failed")) == 2 and len(site.all("file_quarantined")) == 1


@pytest.mark.parametrize("words", ["\ud800 and \udfff", "\udc80\udcff", "\0", "", "x" * 100_000])
def test_whatever_words_a_handler_fails_with_it_is_counted(tmp_path: Path, words: str) -> None:
    """json gives lone surrogates, file names bytes that are no text."""
    with FtpHost(files={"a": b"1"}) as host, Site(tmp_path, host.settings, "handler", max_attempts=3) as site:

        def receive(file: ftpcoord.File) -> None:
            Site.receive(site, file)
            raise ValueError(words)

        site.receive = receive  # type: ignore[method-assign]
        assert site.state("a", "quarantined")["failures"] == 3 == len(site.handled)


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
    content = b"0123456789" * 10
    with FtpHost(files={f"{number}": content for number in range(4)}) as host:
        host.on("RETR", stream([content[i : i + 5] for i in range(0, 100, 5)], 0.1), times=None)
        with Site(tmp_path, host.settings, workers=1, stall_timeout=1.5) as site:
            site.arrive({f"{number}": content for number in range(4)})
            assert not site.all("handing_over") and not site.all("file_failed")


# ---------------------------------------------------------------------------------------------------------------------
# Servers that are down, full, or refuse the login
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        "421 too many",
        "425 no data",
        "426 cut",
        "port 99999",
        "port 0",
        "pasv port",
        "no passive mode",
        "silent",
        "endless line",
        "endless listing",
        "endless reply",
        "listing cut",
        "stalled listing",
    ],
)
def test_a_listing_that_fails_is_said_once_and_the_next_polls_go_on(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ftpcoord, "MAX_ENTRIES", 20_000)
    monkeypatch.setattr(ftpcoord, "Backoff", Hasty)
    many = (b"type=file;size=1; %d\r\n" % number * 100 for number in range(1_000_000))
    with FtpHost(files={"a": b"1"}) as host:
        actions: dict[str, list[tuple[str, hostile.Action]]] = {
            "421 too many": [("CWD", hostile.say_and_leave("421 too many users"))],
            "425 no data": [("MLSD", reply("425 no data connection"))],
            "426 cut": [("MLSD", hostile.content(b"type=file;size=1; a\r\n", "426 cut"))],
            "port 99999": [("EPSV", reply("229 (|||99999|)")), ("PASV", reply("502 no"))],
            "port 0": [("EPSV", reply("229 (|||0|)")), ("PASV", reply("502 no"))],
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


@pytest.mark.parametrize("mlsd", [True, False])
@pytest.mark.parametrize(("told", "home"), [("C:/", "C:"), ("C:\\", "C:"), ("DKA0:[ME]", "DKA0:[ME]")])
def test_below_a_login_folder_without_a_slash_before_it_no_move_target_is_replaced(
    tmp_path: Path, told: str, home: str, mlsd: bool
) -> None:
    """A path that was made full stays as it is: under another one nothing is in the way of a move."""

    def below_home(verb: str) -> Any:
        def answer(session: Any, path: str) -> None:
            getattr(session, f"on_{verb.lower()}")(path[len(home) :] if path.startswith(home) else path)

        return answer

    with FtpHost(files={"a.csv": b"today", "b.csv": b"b", "done/a.csv": b"yesterday"}, mlsd=mlsd) as host:
        host.folders.add("/in/done")
        host.on("PWD", reply(f'257 "{told}"'), None)
        for verb in ("CWD", "SIZE", "MDTM", "MLST", "RETR", "DELE", "MKD", "RNFR", "RNTO"):
            host.on(verb, below_home(verb), None)
        url = host.settings["url"].replace("/in", "/~/in")
        with Site(tmp_path, {**host.settings, "url": url}, after="move:done") as site:
            site.arrive({"a.csv": b"today", "b.csv": b"b"})
            wait_for(lambda: len(host.files) == 3 and "done/b.csv" in host.files, PATIENCE, "\n".join(site.log[-20:]))
        assert host.files == {"done/a.csv": b"yesterday", "done/a.1.csv": b"today", "done/b.csv": b"b"}


def test_a_folder_below_such_a_login_folder_that_is_not_there_is_said() -> None:
    with FtpHost() as host:
        host.on("PWD", reply('257 "C:/"'), None)
        host.on("CWD", reply("550 no such folder"), None)
        settings = {**host.settings, "url": host.settings["url"].replace("/in", "/~/in")}
        server = ftpcoord.open_server(ftpcoord.Config(database="sqlite:///unused.db", **settings))
        with contextlib.closing(server), pytest.raises(ftpcoord.FileRefused, match="no such folder"):
            server.list("in")


def test_run_once_ends_although_a_server_tells_another_time_of_a_file_at_each_look(tmp_path: Path) -> None:
    """It waits as a file does that is being written; another one does not wait for it."""
    seconds = iter(range(1, 1000))

    def listing(session: Any, argument: str) -> None:
        host.put("now.csv", b"now", next(seconds))
        session.on_mlsd(argument)

    with FtpHost(files={"now.csv": b"now", "then.csv": b"then"}) as host:
        host.on("MLSD", listing, None)
        settings = {"settle": 0.1, "polling_interval": 0.1, "exec": "true", "after": "delete", "member_id": "a"}
        database = f"sqlite:///{tmp_path / 'coordination.db'}"
        variables = environment({**host.settings, **settings, "database": database})
        done = subprocess.run(
            [*MEMBER, "run", "--once"],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE,
        )
        assert done.returncode == 1 and done.stdout.count(b"another time at each look") == 1, done.stdout
        assert list(host.files) == ["now.csv"] and "RETR /in/now.csv" not in host.commands


def test_a_connection_that_is_cut_between_two_commands_is_a_server_that_is_down() -> None:
    """By the other side, or by our own deadline: the address of the peer cannot be asked for any more."""
    with FtpHost(files={"a": b"1"}) as host:
        server = ftpcoord.open_server(ftpcoord.Config(**host.settings, database="sqlite:///x"))
        assert isinstance(server, ftpcoord.FtpServer)
        ask = server._ask

        def cut(command: str, path: Optional[str] = None) -> str:
            said = ask(command, path)
            if command == "CWD":
                server._shut_down()
                wait_for(lambda: host.open_sessions == 0, PATIENCE, "the host to hang up, too")
            return said

        server._ask = cut  # type: ignore[method-assign]
        with pytest.raises(ftpcoord.ServerDown):
            server.list("/in")


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
        host.on(
            "OPENDIR",
            lambda session, path: (
                session.status(3, b"Permission denied")
                if path.endswith("closed")
                else session.behave("OPENDIR", path, b"")
            ),
            times=None,
        )
        with Site(tmp_path, host.settings, recursive=True) as site:
            site.arrive({"a": b"1"})
            site.polls()
            assert len(site.all("file_refused", folder="/in")) == 1 and not site.all("server_down")


def test_a_server_that_dies_with_many_files_waiting_is_said_once_and_not_of_each_file(tmp_path: Path) -> None:
    files = {f"{number:03}": b"x" for number in range(100)}
    with FtpHost(files=dict(files)) as host:

        def die(session: hostile.FtpSession, argument: str) -> None:
            if len(host.said("RETR")) != 5:
                session.on_retr(argument)
                return
            host.on("GREETING", hostile.say_and_leave("421 going down"), times=3)
            host.drop()

        host.on("RETR", die, times=None)
        with Site(tmp_path, host.settings, "handler", workers=2, polling_interval=2) as site:
            site.wait("server_down")
            site.wait("server_up")
            site.arrive(files)
            assert len(site.all("server_down")) == 1
            assert len(site.all("file_failed")) <= 4, "those in work, not those that waited"
            assert sum(attempt > 1 for _, _, attempt in site.handled) <= 4


@pytest.mark.parametrize("refusal", ["421 too many connections", "530 too many connections of yours"])
@DELIVERIES
def test_a_server_that_allows_few_connections_is_used_with_as_many(tmp_path: Path, refusal: str, delivery: str) -> None:
    files = {f"{number:02}": bytes_of(300_000) for number in range(30)}
    with FtpHost(files=dict(files)) as host:
        if refusal.startswith("421"):
            host.most_sessions = 2
        else:
            host.on(
                "PASS",
                lambda session, argument: session.say(refusal) if host.open_sessions > 2 else session.on_pass(argument),
                times=None,
            )
        with Site(tmp_path, host.settings, delivery, workers=4) as site:
            site.arrive(files)
            assert not site.all("file_failed") and not site.all("server_down")
            assert host.sessions <= 2 + 6, "it is not asked again and again for more"


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


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert threading.active_count() < 200 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2_000_000


def test_a_file_at_which_the_connection_always_ends_holds_up_no_others(tmp_path: Path) -> None:
    """Many files are under way at once: each of them goes alone the next time, and only that one ends its own."""
    files = {f"{number:02}": b"x" for number in range(12)}
    with SftpHost(files=dict(files)) as host:
        host.on(
            "OPEN",
            lambda session, path: (
                hostile.leave(session, path) if path == "/in/00" else session.behave("OPEN", path, b"")
            ),
            times=None,
        )
        with Site(tmp_path, host.settings, workers=1) as site:
            del files["00"]
            site.arrive(files)
            assert site.wait("file_failed", path="/in/00")
