"""What file servers in the field really do, and what must come of it: one line of a table each.

Every case runs a whole Listener against a server of hostile.py that behaves as the line's name says.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import posixpath
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

import hostile
import pytest
from conftest import wait_for
from hostile import BEGAN, PATIENCE, FtpHost, Hasty, Host, SftpHost, Site, bytes_of, reply

import ftpcoord

Behaviour = Callable[[Any], None]  # makes a host behave like that
Run = Callable[[Path, Behaviour], None]


class Case(NamedTuple):
    """One line of the table."""

    server: str
    behaviour: Behaviour
    must: str
    run: Run

    def __str__(self) -> str:
        return f"{self.server}: {self.must}"


# ---------------------------------------------------------------------------------------------------------------------
# What servers do, by name
# ---------------------------------------------------------------------------------------------------------------------


def well(host: Host) -> None:
    """Nothing unusual."""


def always(verb: str, action: hostile.Action) -> Behaviour:
    return lambda host: host.on(verb, action, None)


def both(one: Behaviour, other: Behaviour) -> Behaviour:
    def act(host: Any) -> None:
        one(host)
        other(host)

    return act


def answer_mlst(form: str) -> Behaviour:
    """MLST of what is there, in a framing that no RFC knows."""

    def act(session: Any, argument: str) -> None:
        name = session.name(argument)
        found = session.host.files.get(name)
        if found is None:
            session.say("550 no such file")
            return
        line = session.host.line(argument, found, session.host.times.get(name, BEGAN)).decode("latin-1")
        session.say(form.format(line=line))

    return always("MLST", act)


def epsv(answer: Callable[[int], str]) -> Behaviour:
    """EPSV gets this answer, with the number of a port on which nobody listens."""
    return always("EPSV", lambda session, argument: session.say(answer(hostile.unused_port())))


def hang_up_after(verb: str) -> Behaviour:
    """The session ends after each such command, which was carried out and answered."""

    def act(session: Any, argument: str) -> None:
        getattr(session, f"on_{verb.lower()}")(argument)
        raise hostile.Gone

    return always(verb, act)


def refuse_data_first(session: Any, argument: str) -> None:
    """The port of the data connection is closed, then comes the 550."""
    session.passive.close()
    session.say("550 Permission denied")


def accept_then_refuse(session: Any, argument: str) -> None:
    session.say("150 here")
    session.data().close()
    session.say("550 Permission denied")


def only_for(name: str, verb: str, action: hostile.Action) -> Behaviour:
    """The action for this file alone."""

    def act(session: Any, argument: str) -> None:
        right = posixpath.basename(argument) == name
        action(session, argument) if right else getattr(session, f"on_{verb.lower()}")(argument)

    return always(verb, act)


def alternate(*actions: Optional[hostile.Action]) -> hostile.Action:
    """Each in turn; None: as it should be answered."""
    count = iter(range(10**9))

    def act(session: Any, argument: str) -> None:
        action = actions[next(count) % len(actions)]
        action(session, argument) if action else session.on_mlsd(argument)

    return act


def as_lines(session: Any, argument: str) -> None:
    """LIST of a server that has MLSD, too."""
    twin = copy.copy(session.host)
    twin.mlsd = False
    session.send(twin.listing(session.folder))


def without_mlsd(answer: str) -> Behaviour:
    """FEAT names it; LIST works."""
    return both(always("MLSD", reply(answer)), always("LIST", as_lines))


def with_fractions(fraction: str) -> Behaviour:
    """LIST, and an MDTM that is as exact as the server's file system."""

    def act(session: Any, argument: str) -> None:
        session.say(f"213 {session.host.times.get(session.name(argument), BEGAN):%Y%m%d%H%M%S}.{fraction}")

    return both(listed_by_lines, always("MDTM", act))


def another_time_at_each_look(host: FtpHost) -> None:
    """LIST stands still; MDTM tells another second of that minute each time."""
    seconds = itertools.count()

    def act(session: Any, argument: str) -> None:
        when = session.host.times.get(session.name(argument), BEGAN)
        session.say(f"213 {when:%Y%m%d%H%M}{next(seconds) % 60:02}")

    listed_by_lines(host)
    host.on("MDTM", act, None)


def tell_of_another(session: Any, argument: str) -> None:
    """MLST takes a name for a pattern that fits nothing, and tells what is in the folder."""
    if session.name(argument) in session.host.files:
        session.on_mlst(argument)
    else:
        session.say("250-it is\r\n type=dir;modify=20260112101500; done\r\n250 end")


def listed_by_lines(host: FtpHost) -> None:
    """LIST is all it knows, and MDTM tells exact times."""
    host.mlsd = False


def without_types(host: SftpHost) -> None:
    """Attributes say size and time, and not what it is; the long name is the bare name."""
    host.on("LSTAT", lambda session, path: untyped(session, path), None)
    host.on("STAT", lambda session, path: untyped(session, path), None)


def untyped(session: Any, path: str) -> None:
    folder = path in ("/in", "/in/done", ".")
    found = b"" if folder else session.host.files.get(path[len("/in/") :])
    session.status(2) if found is None else session.answer(105, hostile.attributes(len(found), mode=0o755))


# ---------------------------------------------------------------------------------------------------------------------
# What must come of it
# ---------------------------------------------------------------------------------------------------------------------


def yesterdays_archive_stays(tmp_path: Path, behaviour: Behaviour) -> None:
    """A move finds yesterday's file of that name in its folder."""
    with FtpHost(files={"a.csv": b"today", "done/a.csv": b"yesterday"}) as host:
        host.folders.add("/in/done")
        behaviour(host)
        with Site(tmp_path, host.settings, "handler", after="move:done") as site:
            wait_for(lambda: "a.csv" not in host.files, PATIENCE, "the move: " + "\n".join(site.log[-10:]))
            assert site.handled == [("a.csv", b"today", 1)]
            assert host.files.pop("done/a.csv") == b"yesterday"
            assert list(host.files.values()) == [b"today"]


def a_refused_file_counts(tmp_path: Path, behaviour: Behaviour) -> None:
    """One file of three is refused for ever: it ends in quarantine, the others arrive."""
    with FtpHost(files={"a": b"1", "b": b"2", "c": b"3"}) as host:
        behaviour(host)
        with Site(tmp_path, host.settings, max_attempts=2, workers=1) as site:
            site.arrive({"a": b"1", "c": b"3"})
            assert site.state("b", "quarantined")["failures"] == 2
            assert not site.all("server_down")


def files_arrive(tmp_path: Path, behaviour: Behaviour) -> None:
    """All of them, once, and nobody is told that the server is down."""
    files = {f"{number:02}": bytes_of(number * 100) for number in range(12)}
    with FtpHost(files=dict(files)) as host:
        behaviour(host)
        with Site(tmp_path, host.settings, workers=2) as site:
            site.arrive(files)
            site.polls()
            assert not site.all("server_down")
            assert not site.all("file_failed")


def files_arrive_moved(tmp_path: Path, behaviour: Behaviour) -> None:
    with SftpHost(files={"data.csv": b"1", "labels.csv": b"2"}) as host:
        behaviour(host)
        with Site(tmp_path, host.settings, after="move:done") as site:
            site.arrive({"data.csv": b"1", "labels.csv": b"2"})
            wait_for(lambda: sorted(host.files) == ["done/data.csv", "done/labels.csv"], PATIENCE, "\n".join(site.log))


def of_these_days(host: FtpHost, days: int) -> None:
    """Files so young that lines show hours and minutes and no year."""
    now = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
    for name, content in list(host.files.items()):
        host.put(name, content, seconds=int((now - BEGAN).total_seconds()) + days * 86_400)


def handled_once(tmp_path: Path, behaviour: Behaviour) -> None:
    """What is kept is not handled again, whatever is shown of it."""
    with FtpHost(files={"a": b"1", "b": b"2"}) as host:
        of_these_days(host, -1)
        behaviour(host)
        with Site(tmp_path, host.settings, "handler") as site:
            site.arrive({"a": b"1", "b": b"2"})
            site.polls(6)
            assert sorted(site.handled) == [("a", b"1", 1), ("b", b"2", 1)]


def handled_once_and_deleted(tmp_path: Path, behaviour: Behaviour) -> None:
    with FtpHost(files={"a": b"1", "b": b"2"}) as host:
        of_these_days(host, -1)
        behaviour(host)
        with Site(tmp_path, host.settings, "handler", after="delete") as site:
            wait_for(lambda: not host.files, PATIENCE, "\n".join(site.log))
            assert sorted(site.handled) == [("a", b"1", 1), ("b", b"2", 1)] and not site.all("file_kept")


def repeated_with_growing_pauses(tmp_path: Path, behaviour: Behaviour, after: str, days: int) -> list[float]:
    """What is another version each time it has been handled waits longer and longer, and is said; how long."""
    handled: list[float] = []
    with FtpHost(files={"a": b"1"}) as host:
        of_these_days(host, days)
        minute = host.times["a"] = host.times["a"].replace(second=0)
        behaviour(host)

        def receive(file: ftpcoord.File) -> None:
            handled.append(time.monotonic())
            if after == "keep":  # touched within its minute, when it has been looked at
                host.times["a"] = minute.replace(second=len(handled))

        with Site(tmp_path, host.settings, "handler", after=after, retry_delay=0.4) as site:
            site.receive = receive  # type: ignore[method-assign]
            said = [site.wait("not_now", number, error=ftpcoord.UNSTEADY)["retry_in"] for number in (1, 2)]
            assert said == [0.8, 1.6] and 4 <= len(handled) <= 5 and "a" in host.files
    return [later - earlier for earlier, later in zip(handled, handled[1:])]


def repeated_with_growing_pauses_deleted(tmp_path: Path, behaviour: Behaviour) -> None:
    pauses = repeated_with_growing_pauses(tmp_path, behaviour, "delete", -5)
    assert pauses[0] < 0.4 <= pauses[1] < 0.8 <= pauses[2], pauses


def repeated_with_growing_pauses_kept(tmp_path: Path, behaviour: Behaviour) -> None:
    pauses = repeated_with_growing_pauses(tmp_path, behaviour, "keep", 0)
    assert pauses[2] >= 0.4 and pauses[3] >= 0.8, pauses


def repeated_though_removed(tmp_path: Path, behaviour: Behaviour, host: Host, after: str) -> None:
    with host:
        behaviour(host)
        began = time.monotonic()
        with Site(tmp_path, host.settings, "handler", after=after, retry_delay=0.4) as site:
            said = site.wait("not_now", error=ftpcoord.UNSTEADY)["retry_in"]
            assert said == max(2.0, 0.8) and len(site.handled) == 3 and host.files["a"] == b"1"
            assert time.monotonic() - began >= 4.0


def listed_a_while_after_its_removal(tmp_path: Path, behaviour: Behaviour) -> None:
    """It is handled once, and so is a new version, which waits for nothing."""
    with FtpHost({"a": b"1"}) as host:
        behaviour(host)
        with Site(tmp_path, host.settings, "handler", after="delete", retry_delay=0.1) as site:
            wait_for(lambda: host.said("DELE"), PATIENCE, "\n".join(site.log))
            site.polls(3)
            assert host.files, "it is still listed"
            host.put("a", b"2", seconds=60)
            wait_for(lambda: len(site.handled) == 2, 1.5, "\n".join(site.log))
            wait_for(lambda: not host.files, PATIENCE, "\n".join(site.log))
            site.polls(3)
            host.put("a", b"3", seconds=90)
            wait_for(lambda: len(site.handled) == 3 and not host.files, PATIENCE, "\n".join(site.log))
            site.polls(3)
            assert site.handled == [("a", b"1", 1), ("a", b"2", 1), ("a", b"3", 1)]


def a_second_late(host: FtpHost) -> None:
    """What is deleted stays for a second."""

    def act(session: Any, argument: str) -> None:
        name, there = session.name(argument), host.files.get(session.name(argument))
        threading.Timer(1.0, lambda: host.files.get(name) is there and host.files.pop(name)).start()
        session.say("250 gone")

    host.on("DELE", act, None)


def repeated_though_deleted(tmp_path: Path, behaviour: Behaviour) -> None:
    repeated_though_removed(tmp_path, behaviour, FtpHost({"a": b"1"}), "delete")


def repeated_though_moved(tmp_path: Path, behaviour: Behaviour) -> None:
    repeated_though_removed(tmp_path, behaviour, SftpHost({"a": b"1"}), "move:done")


def moved_under_its_own_name(tmp_path: Path, behaviour: Behaviour) -> None:
    with FtpHost(files={"[a].csv": b"1", "done/other": b"2"}) as host:
        host.folders.add("/in/done")
        behaviour(host)
        with Site(tmp_path, host.settings, "handler", after="move:done") as site:
            wait_for(lambda: "[a].csv" not in host.files, PATIENCE, "the move: " + "\n".join(site.log[-10:]))
            assert host.files == {"done/[a].csv": b"1", "done/other": b"2"}


def a_shifted_display_is_no_new_version(tmp_path: Path, behaviour: Behaviour) -> None:
    with FtpHost(files={"a": b"1", "b": b"2"}) as host:
        of_these_days(host, -1)
        behaviour(host)
        with Site(tmp_path, host.settings, "handler") as site:
            site.arrive({"a": b"1", "b": b"2"})
            site.polls()
            host.zone += 60
            site.polls(4)
            assert sorted(site.handled) == [("a", b"1", 1), ("b", b"2", 1)]


def a_failure_is_remembered(tmp_path: Path, behaviour: Behaviour) -> None:
    """What is shown of a file moves between its failure and its next try."""
    attempts: list[int] = []
    with FtpHost(files={"a": b"1"}) as host:
        of_these_days(host, -1)
        behaviour(host)
        site = Site(tmp_path, host.settings, "own", max_attempts=3)

        def fail(file: ftpcoord.File) -> None:
            attempts.append(file.attempt)
            host.zone += 60
            raise ValueError("no good")

        site.listener.on_file("*")(fail)
        with site:
            site.state("a", "quarantined")
            assert attempts == [1, 2, 3]


def a_version_is_handled_with_its_own_content(tmp_path: Path, behaviour: Behaviour) -> None:
    """The file is replaced by one of the same size while it waits, or while it is read."""
    with FtpHost(files={"a": bytes_of(200_000)}) as host:
        behaviour(host)
        with Site(tmp_path, host.settings, "handler") as site:
            wait_for(lambda: site.handled, PATIENCE, "\n".join(site.log))
            site.polls(4)
            assert site.handled == [("a", host.files["a"], 1)]


def replaced_when_asked_for(host: FtpHost) -> None:
    def act(session: Any, argument: str) -> None:
        host.put("a", bytes_of(200_000), seconds=90)
        session.on_retr(argument)

    host.on("RETR", act)


def replaced_while_read(host: FtpHost) -> None:
    def act(session: Any, argument: str) -> None:
        old = host.files["a"]
        host.put("a", bytes_of(200_000), seconds=90)
        session.send(old[:100_000] + host.files["a"][100_000:])

    host.on("RETR", act)


def a_new_version_is_not_deleted_unhandled(tmp_path: Path, behaviour: Behaviour) -> None:
    """A version of the same size comes while the handler runs, within the minute that the listing shows."""
    handled: list[bytes] = []
    with FtpHost(files={"a": b"first"}) as host:
        behaviour(host)
        site = Site(tmp_path, host.settings, "own", after="delete")

        def receive(file: ftpcoord.File) -> None:
            handled.append(file.read())
            if len(handled) == 1:
                host.put("a", b"later", seconds=20)

        site.listener.on_file("*")(receive)
        with site:
            wait_for(lambda: not host.files, PATIENCE, "\n".join(site.log))
            assert handled == [b"first", b"later"]


def nothing_is_forgotten(tmp_path: Path, behaviour: Behaviour) -> None:
    """A file fails each time: attempts are counted on, whatever some listings in between say."""
    with FtpHost(files={"a": b"1"}) as host:
        behaviour(host)
        site = Site(tmp_path, host.settings, "own", max_attempts=4, retry_delay=0.3)

        def fail(file: ftpcoord.File) -> None:
            attempts.append(file.attempt)
            raise ValueError("no good")

        attempts: list[int] = []
        site.listener.on_file("*")(fail)
        with site:
            assert site.state("a", "quarantined")["failures"] == 4
            site.polls(4)
            assert attempts == [1, 2, 3, 4]


def refused_listing_is_said(tmp_path: Path, behaviour: Behaviour) -> None:
    """A folder that was fine can no longer be listed: that is said, and what the ledger knows stays."""
    with FtpHost(files={"a": b"1"}) as host:
        with Site(tmp_path, host.settings, "handler", ledger_retention=0) as site:
            site.arrive({"a": b"1"})
            site.polls()
            behaviour(host)
            wait_for(lambda: [line for line in site.log if "Zugriff" in line], PATIENCE, "\n".join(site.log))
            host.behave()
            site.polls(4)
            assert site.handled == [("a", b"1", 1)]


def in_use_is_not_counted(tmp_path: Path, behaviour: Behaviour) -> None:
    with FtpHost(files={"a": b"1", "b": b"2"}) as host:
        behaviour(host)
        with Site(tmp_path, host.settings, max_attempts=2) as site:
            site.arrive({"b": b"2"})
            wait_for(lambda: len(host.said("RETR")) > 4, PATIENCE, "\n".join(site.log))
            assert not site.all("file_failed") and not site.all("file_quarantined")
            host.behave()
            site.arrive({"a": b"1", "b": b"2"})


def nothing_elsewhere_is_polled(tmp_path: Path, behaviour: Behaviour) -> None:
    """The folder below the login folder is polled, or nothing is, and that is said."""
    with FtpHost() as host:
        host.files["/in/x"] = b"not ours"
        host.put("/x", b"not ours")
        host.folders.add("/home/me")
        behaviour(host)
        url = host.settings["url"].rpartition("/")[0]
        with Site(tmp_path, {**host.settings, "url": f"{url}/~/"}) as site:
            wait_for(lambda: site.all("server_down") or site.all("polled"), PATIENCE)
            assert not any(posixpath.normpath(said[4:]) == "/" for said in host.said("CWD")), host.commands
            assert site.delivered() == {}


def few_folders_are_looked_for(tmp_path: Path, behaviour: Behaviour) -> None:
    """What must fail is not asked of a server that slows down and hangs up for it."""
    files = {f"{number:02}": b"1" for number in range(20)}
    with FtpHost(files=dict(files)) as host:
        host.folders.add("/in/done")
        behaviour(host)
        with Site(tmp_path, host.settings, after="move:done") as site:
            wait_for(lambda: all(name.startswith("done/") for name in host.files), PATIENCE, "\n".join(site.log))
        failed = [said for said in host.said("CWD") if said.rpartition("/")[2] in files]
        assert len(failed) <= 1, failed


def a_marker_ends_with_its_file(tmp_path: Path, behaviour: Behaviour) -> None:
    """The delete's reply is lost: the next file of that name does not find the old marker."""
    with FtpHost(files={"a.csv": b"1", "a.csv.ok": b""}) as host:
        behaviour(host)
        with Site(tmp_path, host.settings, "handler", after="delete", ready_suffix=".ok") as site:
            site.arrive({"a.csv": b"1"})
            wait_for(lambda: not host.files, PATIENCE, "\n".join(site.log))
            host.put("a.csv", b"half", seconds=60)
            site.polls(4)
            assert site.handled == [("a.csv", b"1", 1)]


def a_marker_serves_one_version(tmp_path: Path, behaviour: Behaviour) -> None:
    """The next version is being written while the first one is in work: the old marker does not make it ready."""
    handled: list[bytes] = []
    with FtpHost(files={"a.csv": b"whole", "a.csv.ok": b""}) as host:
        behaviour(host)
        site = Site(tmp_path, host.settings, "own", ready_suffix=".ok")

        def receive(file: ftpcoord.File) -> None:
            handled.append(file.read())
            if len(handled) == 1:
                host.put("a.csv", b"half of", seconds=600)

        site.listener.on_file("*")(receive)
        with site:
            wait_for(lambda: handled, PATIENCE, "\n".join(site.log))
            site.polls(4)
            assert handled == [b"whole"]
            host.put("a.csv", b"half of the next", seconds=700)
            host.put("a.csv.ok", b"", seconds=700)
            wait_for(lambda: len(handled) > 1, PATIENCE, "\n".join(site.log))
            assert handled == [b"whole", b"half of the next"]


def read_right_or_not_at_all(tmp_path: Path, behaviour: Behaviour) -> None:
    with FtpHost(files={"b.csv": b"12345"}) as host:
        listed_by_lines(host)
        behaviour(host)
        with Site(tmp_path, host.settings, "handler") as site:
            wait_for(lambda: len(host.said("LIST")) > 3, PATIENCE)
            assert {name for name, _, _ in site.handled} <= {"b.csv"}
            assert {posixpath.basename(said[5:]) for said in host.said("RETR")} <= {"b.csv"}


def not_understood_is_said(tmp_path: Path, behaviour: Behaviour) -> None:
    """Not one line can be read: that is no empty folder."""
    with FtpHost(files={"a": b"1"}) as host:
        listed_by_lines(host)
        behaviour(host)
        with Site(tmp_path, host.settings, "handler") as site:
            wait_for(lambda: [line for line in site.log if "not understood" in line], PATIENCE, "\n".join(site.log))
            assert not site.all("polled") and not site.handled


def in_a_tree(tmp_path: Path, behaviour: Behaviour, **settings: Any) -> None:
    """Below the polled folder each file is handled once, and what is hidden not at all."""
    with FtpHost(files={"a": b"1", "sub/b": b"2"}) as host:
        host.folders.add("/in/sub")
        behaviour(host)
        with Site(tmp_path, host.settings, "handler", recursive=True, **settings) as site:
            wait_for(lambda: len(site.handled) >= 2, PATIENCE, "\n".join(site.log))
            site.polls(5)
            assert sorted(site.handled) == [("a", b"1", 1), ("b", b"2", 1)]


def in_a_tree_moved(tmp_path: Path, behaviour: Behaviour) -> None:
    in_a_tree(tmp_path, behaviour, after="move:arch/done")


def in_a_tree_moved_twice_written(tmp_path: Path, behaviour: Behaviour) -> None:
    in_a_tree(tmp_path, behaviour, after="move:/in//done")


def in_a_tree_deleted(tmp_path: Path, behaviour: Behaviour) -> None:
    in_a_tree(tmp_path, behaviour, after="delete")


def hidden_folder(host: FtpHost) -> None:
    host.folders.update(("/in/.ssh", "/in/upload.part"))
    host.put(".ssh/id_rsa", b"secret")
    host.put("upload.part/x", b"half")


def others_of_the_tree_go_on(tmp_path: Path, behaviour: Behaviour) -> None:
    """One subfolder is refused: it is said, the others are polled, and its rows stay."""
    with FtpHost(files={"a": b"1", "sub/b": b"2"}) as host:
        host.folders.add("/in/sub")
        with Site(tmp_path, host.settings, "handler", recursive=True, ledger_retention=0) as site:
            wait_for(lambda: len(site.handled) == 2, PATIENCE, "\n".join(site.log))
            site.polls()
            behaviour(host)
            host.put("c", b"3")
            wait_for(lambda: len(site.handled) == 3, PATIENCE, "\n".join(site.log))
            wait_for(
                lambda: [line for line in site.log if "/in/sub" in line and "refused" in line],
                PATIENCE,
                "the refused folder: " + "\n".join(site.log),
            )
            host.behave()
            site.polls(4)
            assert sorted(site.handled) == [("a", b"1", 1), ("b", b"2", 1), ("c", b"3", 1)]


def times_are_told_as_they_are(tmp_path: Path, behaviour: Behaviour) -> None:
    with SftpHost(files={"a": b"1"}) as host:
        behaviour(host)
        with Site(tmp_path, host.settings) as site:
            site.arrive({"a": b"1"})
            assert site.state("a", "done")["mtime"].startswith("1969-12-31T"), site.row("a")


def before_1970(host: SftpHost) -> None:
    host.times["a"] = datetime.datetime(1969, 12, 31, 12)


def days_ahead(host: FtpHost) -> None:
    listed_by_lines(host)
    of_these_days(host, 3)


def login_of_a_second_session(answer: str) -> Behaviour:
    def act(session: Any, argument: str) -> None:
        session.say(answer if session.host.open_sessions > 1 else "331 password")

    return always("USER", act)


def delete_and_leave(session: Any, argument: str) -> None:
    session.host.files.pop(session.name(argument), None)
    raise hostile.Gone


def refuse_sub(session: Any, argument: str) -> None:
    session.say("550 Permission denied") if "sub" in argument else session.on_cwd(argument)


def refuse_there(session: Any, argument: str) -> None:
    session.say("550 Permission denied") if session.folder.endswith("sub") else session.on_mlsd(argument)


MLST = {
    "FEAT names MLST, which is refused with 500": always("MLST", reply("500 what")),
    "FEAT names MLST, which is refused with 550": always("MLST", reply("550 no such thing")),
    "FEAT names MLST, which is never answered": always("MLST", hostile.silence),
    "MLST is answered in one line": answer_mlst("250 {line}"),
    "MLST is answered with its code on each line": answer_mlst("250-it is\r\n250-{line}\r\n250 end"),
    "MLST is answered with an empty line in it": answer_mlst("250-it is\r\n\r\n {line}\r\n250 end"),
}
UNREADABLE = {
    "a listed file is 550 for ever": only_for("b", "RETR", reply("550 Permission denied")),
    "a listed file is 550 No such file for ever": only_for("b", "RETR", reply("550 No such file or directory")),
    "the data port is closed before the 550": only_for("b", "RETR", refuse_data_first),
    "a file is 150, then 550": only_for("b", "RETR", accept_then_refuse),
}
EPSV = {
    "EPSV names a port on which nobody listens": epsv(lambda port: f"229 entered (|||{port}|)"),
    "EPSV's answer has no port": epsv(lambda port: "229 Entering Extended Passive Mode"),
    "EPSV names a port above 65535": epsv(lambda port: "229 entered (|||65999|)"),
}
LINES = {
    "the year is in the middle": "-rw-r--r--   1 root system       5 Jan 12 2026 10:15 b.csv",
    "a name is padded": "-rw-r--r--   1 root system       5 Jan 12  2024  b.csv",
    "an owner is called like a month": "-rw-r--r--   1 may staff 5 Jan 12  2024 b.csv",
    "the day comes first": "-rw-r--r--   1 root system       5 12 Jan 10:15 b.csv",
}
TABLE: list[tuple[dict[str, Behaviour], str, Run]] = [
    (MLST, "a move replaces nothing", yesterdays_archive_stays),
    (
        {f"{name}, nor is MLSD": both(without_mlsd("502 what"), behaviour) for name, behaviour in MLST.items()},
        "a move replaces nothing",
        yesterdays_archive_stays,
    ),
    (UNREADABLE, "it is counted, and quarantined in the end", a_refused_file_counts),
    (
        {
            f"{one}, and {other}": both(MLST[one], UNREADABLE[other])
            for one in list(MLST)[:2]
            for other in list(UNREADABLE)[:2]
        },
        "it is counted, and quarantined in the end",
        a_refused_file_counts,
    ),
    (EPSV, "PASV is used", files_arrive),
    (
        {
            "MLSD is named and refused with 550": without_mlsd("550 what"),
            "MLSD is named and refused with 502": without_mlsd("502 what"),
            "the server hangs up after each RETR": hang_up_after("RETR"),
            "a second session is 421": lambda host: setattr(host, "most_sessions", 1),
            "the second login is 530 too many connections, and the first is in": login_of_a_second_session(
                "530 Too many connections from your address"
            ),
            "an idle session is told 221 and ended at once": hang_up_after("MLSD"),
        },
        "all files arrive, without alarm",
        files_arrive,
    ),
    (
        {
            "MLSD and LIST take turns": both(
                always("MLSD", alternate(None, reply("502 what"))), always("LIST", as_lines)
            ),
            "MLSD is 450 every other time": always("MLSD", alternate(None, reply("450 busy"))),
            "each MLSD is 550 after the first": both(
                lambda host: host.on("MLSD", lambda session, argument: session.on_mlsd(argument)),
                without_mlsd("550 no"),
            ),
        },
        "each file is handled once",
        handled_once,
    ),
    (
        {
            f"MDTM tells a fraction of {fraction}": with_fractions(fraction)
            for fraction in ("000", "499", "5", "999999")
        },
        "each file is handled once",
        handled_once_and_deleted,
    ),
    (
        {"MLST of a name tells of another": always("MLST", tell_of_another)},
        "a move has its own name",
        moved_under_its_own_name,
    ),
    ({"the server is three days ahead, by lines": days_ahead}, "each file is handled once", handled_once),
    (
        {name: always("LIST", hostile.content(line.encode() + b"\r\n")) for name, line in LINES.items()},
        "it is read right or not at all",
        read_right_or_not_at_all,
    ),
    (
        {"no line is understood": always("LIST", hostile.content(b"12.01.2024 10:15 a 1 byte\r\n"))},
        "that is said, and is no empty folder",
        not_understood_is_said,
    ),
    ({"a tree is polled": well}, "a move target below its root is not polled", in_a_tree_moved),
    ({"a tree is polled": well}, "a move target written otherwise is not polled", in_a_tree_moved_twice_written),
    ({"there are hidden and temporary folders": hidden_folder}, "they are not entered", in_a_tree_deleted),
    (
        {
            "a subfolder's CWD is 550": lambda host: host.on("CWD", refuse_sub, None),
            "a subfolder's MLSD is 550": both(always("MLSD", refuse_there), always("LIST", refuse_there)),
        },
        "that stops only itself",
        others_of_the_tree_go_on,
    ),
    ({"times are before 1970": before_1970}, "they are told as they are", times_are_told_as_they_are),
    ({"LIST moves by an hour": listed_by_lines}, "each file is handled once", a_shifted_display_is_no_new_version),
    ({"LIST moves by an hour after a failure": listed_by_lines}, "it is remembered", a_failure_is_remembered),
    (
        {
            "a file is replaced between listing and RETR": replaced_when_asked_for,
            "a file is overwritten while it is read": replaced_while_read,
            "a file is replaced between LIST and RETR": both(listed_by_lines, replaced_when_asked_for),
        },
        "it is handled once, with the content of its version",
        a_version_is_handled_with_its_own_content,
    ),
    (
        {"LIST shows minutes": listed_by_lines, "MLSD shows seconds": well},
        "a new version is not deleted unhandled",
        a_new_version_is_not_deleted_unhandled,
    ),
    (
        {
            "every third listing is 450": always("MLSD", alternate(None, None, reply("450 busy"))),
            "every third listing is 550 no files": always("MLSD", alternate(None, None, reply("550 No files found"))),
            "every third listing is empty": always("MLSD", alternate(None, None, hostile.content(b""))),
        },
        "its attempts are counted on",
        nothing_is_forgotten,
    ),
    (
        {
            "a folder's listing is refused in German": both(
                always("MLSD", reply("550 Zugriff verweigert")), always("LIST", reply("550 Zugriff verweigert"))
            )
        },
        "that is said, and nothing is forgotten",
        refused_listing_is_said,
    ),
    (
        {
            "a file is 550 used by another process": only_for(
                "a",
                "RETR",
                reply("550 The process cannot access the file because it is being used by another process."),
            ),
            "a file is 450 in use": only_for("a", "RETR", reply("450 File is busy")),
        },
        "it is not counted",
        in_use_is_not_counted,
    ),
    (
        {"PWD is answered without quotes": always("PWD", reply("257 /home/me is current directory"))},
        "no other folder is polled",
        nothing_elsewhere_is_polled,
    ),
    ({"MLST says no to what is not there": well}, "CWD is not asked as well", few_folders_are_looked_for),
    (
        {
            "the reply to DELE is lost": lambda host: host.on("DELE", delete_and_leave),
            "a marker's DELE is refused once": lambda host: host.on("DELE", reply("450 busy")),
        },
        "the marker ends with its file",
        a_marker_ends_with_its_file,
    ),
    ({"a new version comes while its marker is old": well}, "it is not ready", a_marker_serves_one_version),
    (
        {"attributes tell no type, long names are bare": without_types},
        "files are files, and moves work",
        files_arrive_moved,
    ),
]
TABLE += [
    (
        {"MDTM tells another time at each look": another_time_at_each_look},
        "what cannot be deleted is not repeated without growing pauses and a word",
        repeated_with_growing_pauses_deleted,
    ),
    (
        {"a file is touched again and again within the minute that LIST shows": listed_by_lines},
        "what is kept is not repeated without growing pauses and a word",
        repeated_with_growing_pauses_kept,
    ),
]
TABLE += [
    (
        {"DELE is answered yes a second before the file goes": a_second_late},
        "each version is handled once",
        listed_a_while_after_its_removal,
    ),
    (
        {"DELE is answered yes, and the file stays": always("DELE", reply("250 gone"))},
        "it is not handled without growing pauses and a word",
        repeated_though_deleted,
    ),
    (
        {"RENAME is answered yes, and the file stays": always("RENAME", hostile.status(0))},
        "it is not handled without growing pauses and a word",
        repeated_though_moved,
    ),
]
CASES = [Case(name, behaviour, must, run) for lines, must, run in TABLE for name, behaviour in lines.items()]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ftpcoord, "Backoff", Hasty)
    yield


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_a_server_does_is_met(tmp_path: Path, case: Case, hasty: None) -> None:
    case.run(tmp_path, case.behaviour)
