"""What an FTP server's answer is worth: a behaviour of the server, and what must come of it.

A yes is believed. A no is one only if the same question has been answered by a yes before and the text is that for a
name that cannot be there; otherwise a whole listing of the folder decides. A listing is whole, or it is none.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import hostile
import pytest
import servers
from conftest import fetch, wait_for
from hostile import PATIENCE, FtpHost, FtpSession, FtpsHost, FtpsSession, Site, answers, reply

import ftpcoord
from ftpcoord import FileServer


@contextlib.contextmanager
def connected(host: hostile.Host, **changes: Any) -> Iterator[FileServer]:
    config = ftpcoord.Config(**{**host.settings, "database": "sqlite:///unused.db", **changes})
    with contextlib.closing(ftpcoord.open_server(config)) as server:
        yield server


def names(server: FileServer, folder: str = "/in") -> list[str]:
    return sorted(entry.name for entry in server.list(folder))


# ---------------------------------------------------------------------------------------------------------------------
# Replies
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "worth"),
    [
        ("150 here", "found"),
        ("226 done", "found"),
        ("350 go on", "found"),
        ("550 No such file", "no"),
        ("550 Zugriff verweigert", "no"),
        ("553 no", "no"),
        ("451 local error", "no"),
        ("501 syntax", "no"),
        ("500 what", "unknown"),
        ("502 no", "unknown"),
        ("504 no", "unknown"),
        ("450 File busy", "busy"),
        ("450 not taken", "busy"),
        ("550 The process cannot access the file because it is being used by another process.", "busy"),
        ("550 da sie von einem anderen Prozess verwendet wird", "busy"),
        ("550 file is locked", "busy"),
        ("550 The file is being modified by another user", "busy"),
        ("530 Too many connections of this user", "limit"),
        ("421 Too many users", "limit"),
        ("530 Sorry, the maximum number of clients (4) are already connected", "limit"),
        ("530 Not logged in, only 5 sessions from same IP allowed concurrently.", "limit"),
        ("530 User me is already logged in", "limit"),
        ("421 5 users are already connected, sorry", "limit"),
        ("530 Login incorrect", "no"),
        ("530-At most 3 simultaneous logins.\n530 Login incorrect.", "no"),  # tried at once again it locks the account
        ("530-Nobody is connected concurrently.\n530 Wrong password", "no"),
        ("421 Timeout", "broken"),
        ("221 timed out", "broken"),
        ("425 no data", "broken"),
        ("426 cut", "broken"),
        ("522 reuse the session", "broken"),
    ],
)
def test_a_reply_is_worth_what_its_code_says(said: str, worth: str) -> None:
    assert ftpcoord.verdict(said) == worth


@pytest.mark.parametrize(
    ("said", "folder"),
    [
        ('257 "/home/me" is current', "/home/me"),
        ('257 "/a ""b"" c"', '/a "b" c'),
        ('257 Now in "/x".', "/x"),
        ("257 /home/me", "/home/me"),
        ("257 /home/me is the current directory", "/home/me"),
        ("257 \"'USER1.'\" is working directory", "'USER1.'"),
        ("257 SYS$LOGIN:[ME] is here", "SYS$LOGIN:[ME]"),
        ("257 ok", None),
        ("257 current directory", None),
        ('257 ""', None),
        ("257 /two words", None),
    ],
)
def test_the_login_folder_is_read_from_quotes_or_from_the_one_word_that_can_be_a_path(
    said: str, folder: Optional[str]
) -> None:
    assert ftpcoord.login_folder(said) == folder


def test_a_login_folder_that_is_not_told_is_an_error_and_never_the_root() -> None:
    with FtpHost(files={"a": b"1"}) as host:
        host.on("PWD", reply("257 ok"), times=None)
        with connected(host, url=host.settings["url"].replace("/in", "/~/")) as server:
            with pytest.raises(ftpcoord.FileRefused, match="use a full path"):
                server.list(".")
            assert not host.said("CWD")


def test_the_login_folder_itself_is_entered_by_its_own_name() -> None:
    with FtpHost(files={"a": b"1"}) as host:
        host.on("PWD", reply("257 /in is here"))
        with connected(host) as server:
            assert names(server, ".") == ["a"] and host.said("CWD") == ["CWD /in"]


def test_after_a_reconnect_on_which_the_login_folder_is_not_told_relative_paths_go_nowhere() -> None:
    with FtpHost(files={"a": b"1"}) as host:
        host.on("PWD", reply('257 "/in"'))
        host.on("PWD", reply("550 no"), times=None)
        with connected(host) as server:
            assert names(server, "") == ["a"]
            server.close()
            with pytest.raises(ftpcoord.FileRefused):
                server.list("")


# ---------------------------------------------------------------------------------------------------------------------
# Whether something is there
# ---------------------------------------------------------------------------------------------------------------------


def framed(form: str) -> hostile.Action:
    """MLST, each in another frame around the same facts."""

    def act(session: FtpSession, argument: str) -> None:
        content = session.host.files.get(session.name(argument))
        if content is None:
            session.say("550 no such file")
        else:
            session.say(form.format(f"type=file;size={len(content)};modify=20240112101530; {argument}"))

    return act


def denied_in_done(text: str) -> hostile.Action:
    def act(session: FtpSession, argument: str) -> None:
        session.say(text) if "/done" in argument else session.on_mlst(argument)

    return act


def denied_unless_seen(text: str) -> hostile.Action:
    """What is not there and what may not be seen are told by the same words."""

    def act(session: FtpSession, argument: str) -> None:
        seen = session.name(argument) in session.host.files and "/done" not in argument
        session.on_mlst(argument) if seen else session.say(text)

    return act


MLST: dict[str, hostile.Action] = {
    "as it should be": FtpSession.on_mlst,
    "refused": reply("550 no"),
    "refused as if nothing were there": reply("550 No such file or directory"),
    "refused for want of rights": reply("550 Permission denied"),
    "refused in German": reply("550 Zugriff verweigert"),
    "unknown": reply("500 what"),
    "not implemented": reply("502 no"),
    "a syntax error": reply("501 no"),
    "never answered": hostile.silence,
    "in one line": framed("250 {}"),
    "with its code in each line": framed("250-it is\r\n250-{}\r\n250 end"),
    "with an empty line": framed("250-it is\r\n\r\n {}\r\n\r\n250 end"),
    "without a blank": framed("250-it is\r\n{}\r\n250 end"),
    "a yes without facts": lambda session, argument: (
        session.say("250 yes") if session.name(argument) in session.host.files else session.say("550 no")
    ),
    "a yes to everything": reply("250-it is\r\n type=file;size=1; x\r\n250 end"),
    "denied in the other folder": denied_in_done("550 Permission denied"),
    "denied there in German": denied_in_done("550 Zugriff verweigert"),
    "denied there in Finnish": denied_in_done("550 Ei oikeuksia"),
    "busy there": denied_in_done("450 later"),
    "denied unless seen": denied_unless_seen("550 Permission denied"),
    "denied unless seen, in French": denied_unless_seen("550 Acces refuse"),
}


@pytest.mark.parametrize("mlst", MLST)
@pytest.mark.parametrize("size", [True, False], ids=["SIZE", "no SIZE"])
def test_a_question_that_is_answered_badly_replaces_nothing_and_loses_nothing(mlst: str, size: bool) -> None:
    files = {"a": b"1", "b": b"2", "c": b"3", "done/a": b"yesterday's"}
    with FtpHost(files=files) as host:
        host.folders.add("/in/done")
        host.on("MLST", MLST[mlst], times=None)
        if not size:
            host.on("SIZE", reply("502 no"), times=None)
        with connected(host) as server:
            with pytest.raises(ftpcoord.TargetExists):
                server.rename("/in/a", "/in/done/a")
            assert host.files["done/a"] == b"yesterday's" and host.files["a"] == b"1"
            host.on("RETR", reply("550 no"))
            with pytest.raises(ftpcoord.FileRefused):
                fetch(server, "/in/b", 1, bytes)
            host.on("DELE", reply("550 no"))
            with pytest.raises(ftpcoord.FileRefused):
                server.delete("/in/b")
            assert server.exists("/in/b") and server.exists("/in/done/a")
            if mlst == "a yes to everything":
                return  # a yes is believed: there is no name to move to
            server.rename("/in/b", "/in/done/b")
            assert host.files["done/b"] == b"2"
            with pytest.raises(ftpcoord.TargetExists):
                server.rename("/in/c", "/in/done/b")
            assert host.files["done/b"] == b"2"
            with pytest.raises(ftpcoord.FileGone):
                fetch(server, "/in/nothing", 1, bytes)
            assert not server.exists("/in/nothing")


@pytest.mark.parametrize(
    "text",
    [
        "Access is denied.",
        "Permission denied",
        "Not authorized",
        "Operation not permitted",
        "Zugriff verweigert",
        "Keine Berechtigung",
        "Accès refusé",
        "Permission non accordée",
        "Acceso denegado",
        "Permiso denegado",
        "Accesso negato",
        "Acesso negado",
        "Toegang geweigerd",
        "Åtkomst nekad",
        "Adgang nægtet",
        "Ingen tilgang",
        "Ei oikeuksia",
        "Odmowa dostępu",
        "Brak uprawnień",
        "Přístup odepřen",
        "Доступ запрещён",
        "Нет прав",
        "没有权限",
        "拒绝访问",
        "アクセスが拒否されました",
        "권한이 없습니다",
        "Erişim engellendi",
    ],
)
def test_a_refusal_in_any_of_many_languages_is_not_taken_for_nothing_there(text: str) -> None:
    said = f"550 {text}".encode().decode("latin-1")
    with FtpHost(files={"a": b"1", "done/a": b"yesterday's"}) as host:
        host.folders.add("/in/done")
        host.on("MLST", denied_unless_seen(said), times=None)
        host.on(
            "MLSD",
            lambda session, argument: session.say(said) if session.folder == "/in/empty" else session.on_mlsd(argument),
            times=None,
        )
        host.folders.add("/in/empty")
        host.on("SIZE", reply("502 no"), times=None)
        with connected(host) as server:
            with pytest.raises(ftpcoord.TargetExists):
                server.rename("/in/a", "/in/done/a")
            host.on("LIST", reply(said))
            with pytest.raises(ftpcoord.FileRefused):
                server.list("/in/empty")


def test_a_marker_that_came_after_the_last_listing_is_there() -> None:
    """What was listed a moment ago serves for names to move to, and for nothing that is about to be believed gone."""
    with FtpHost(files={"a": b"1"}, mlsd=False) as host:
        host.on("SIZE", reply("502 no"), times=None)
        with connected(host) as server:
            assert not server.exists("/in/a.ok")
            host.put("a.ok", b"")
            assert server.exists("/in/a.ok")


def test_one_listing_of_the_target_folder_serves_many_moves_and_own_new_names_are_in_it() -> None:
    with FtpHost(files={**{f"{number}": b"x" for number in range(30)}, "done/3": b"old"}, mlsd=False) as host:
        host.folders.add("/in/done")
        host.on("SIZE", reply("502 no"), times=None)
        with connected(host) as server:
            for number in range(30):
                if number == 3:
                    with pytest.raises(ftpcoord.TargetExists):
                        server.rename("/in/3", "/in/done/3")
                else:
                    server.rename(f"/in/{number}", f"/in/done/{number}")
            assert len(host.said("LIST")) <= 2
            host.put("again", b"new")
            with pytest.raises(ftpcoord.TargetExists):
                server.rename("/in/again", "/in/done/7")


def test_no_folder_is_asked_for_where_the_question_was_answered_by_a_proven_no() -> None:
    with FtpHost(files={f"{number}": b"x" for number in range(5)}) as host:
        host.folders.add("/in/done")
        with connected(host) as server:
            for number in range(5):
                assert server.exists(f"/in/{number}")  # as each file is looked at before its move
                server.rename(f"/in/{number}", f"/in/done/{number}")
        assert not host.said("CWD") and not host.said("MLSD")


def test_two_connections_that_move_to_one_name_at_once_replace_nothing(tmp_path: Path) -> None:
    with FtpHost(files={"x/a": b"1", "y/a": b"2"}) as host:
        host.folders |= {"/in/x", "/in/y", "/in/done"}
        waiting: list[FtpSession] = []

        def hesitate(session: FtpSession, argument: str) -> None:
            waiting.append(session)
            wait_for(lambda: len(waiting) > 1 or host.over.wait(0.3), PATIENCE)
            session.on_rnfr(argument)

        host.on("RNFR", hesitate, times=2)
        with Site(tmp_path, host.settings, recursive=True, after="move:/in/done", workers=2):
            wait_for(lambda: {"x/a", "y/a"}.isdisjoint(host.files), PATIENCE)
        assert sorted(content for name, content in host.files.items() if name.startswith("done/")) == [b"1", b"2"]


@pytest.mark.parametrize("mdtm", [reply("502 no"), reply("550 no"), hostile.silence], ids=["unknown", "no", "silent"])
def test_a_file_is_not_the_same_by_its_size_alone_where_the_listing_shows_another_time(mdtm: hostile.Action) -> None:
    with FtpHost(files={"a": b"1"}, mlsd=False) as host:
        host.on("MDTM", mdtm, times=None)
        with connected(host) as server:
            seen = server.list("/in")[0]
            assert server.same("/in/a", seen) is True
            host.put("a", b"2", seconds=86_400)
            assert server.same("/in/a", seen) is False


def test_a_reply_does_not_end_with_a_number_that_begins_like_its_code() -> None:
    with FtpHost(files={"a": b"1"}) as host:
        host.on("GREETING", reply("220-welcome\r\n2200 users are here\r\n220"))
        host.on("PASS", reply("230-you have\r\n2300 files\r\n230-\r\n230 in"))
        with connected(host) as server:
            assert names(server) == ["a"] and host.sessions == 1


@pytest.mark.parametrize("name", ["busy.csv", "in use", "550", "425"])
def test_words_of_a_files_name_in_a_refusal_do_not_count(name: str) -> None:
    with FtpHost(files={name: b"1"}) as host, connected(host) as server:
        host.on("RETR", reply(f"550 {name}: it cannot be opened"))
        host.on("DELE", reply(f"550 /in/{name}: it cannot be removed"))
        with pytest.raises(ftpcoord.FileRefused):
            fetch(server, f"/in/{name}", 1, bytes)
        with pytest.raises(ftpcoord.FileRefused):
            server.delete(f"/in/{name}")
        assert host.sessions == 1
        host.on("DELE", reply("425 no data connection"))
        with pytest.raises(ftpcoord.ServerDown):
            server.delete(f"/in/{name}")


@pytest.mark.parametrize("name", ["empty", "no files", "not found"])
def test_a_folder_that_cannot_be_listed_is_not_empty_because_of_its_name(name: str) -> None:
    with FtpHost(files={f"{name}/a": b"1"}, mlsd=False) as host:
        host.folders.add(f"/in/{name}")
        host.on("LIST", reply(f"550 /in/{name}: it cannot be opened"))
        with connected(host) as server, pytest.raises(ftpcoord.FileRefused):
            server.list(f"/in/{name}")


@pytest.mark.parametrize("facts", ["type;size;modify", "type*;size*;modify;perm*", "Type*;Size;Modify*;UNIX.mode"])
def test_facts_that_a_server_shows_only_if_asked_for_are_asked_for(facts: str) -> None:
    with FtpHost(files={"a": b"1"}) as host:
        host.on("FEAT", reply(f"211-here\r\n MLST {facts};\r\n211 end"))
        host.on(
            "MLSD",
            lambda session, argument: (
                session.on_mlsd(argument) if host.said("OPTS") else session.send(b"type=file; a\r\n")
            ),
        )
        with connected(host) as server:
            assert [(entry.size, bool(entry.mtime)) for entry in server.list("/in")] == [(1, True)]
            assert host.said("OPTS") == ["OPTS MLST type;size;modify;"]


def test_a_server_that_will_be_ready_soon_is_waited_for() -> None:
    """RFC 959 section 5.4: 120, then 220."""
    with FtpHost(files={"a": b"1"}) as host:
        host.on("GREETING", reply("120 in a minute\r\n220-now\r\n220 hello"))
        with connected(host) as server:
            assert names(server) == ["a"]


def test_the_facts_of_another_name_are_no_answer_about_a_file() -> None:
    """MLST of servers that take a name for a pattern, or tell what is in a folder."""
    with FtpHost(files={"a": b"1", "b": b"1"}) as host, connected(host) as server:
        entries = {entry.name: entry for entry in server.list("/in")}
        host.put("a", b"1", seconds=60)
        host.on("MLST", lambda session, path: session.on_mlst("/in/b"), times=None)
        assert server.same("/in/a", entries["a"]) is False and server.same("/in/b", entries["b"])


def test_a_server_that_shows_all_that_is_needed_is_not_asked_for_facts() -> None:
    with FtpHost(files={"a": b"1"}) as host:
        host.on("FEAT", reply("211-here\r\n MLST type*;size*;modify*;media-type;perm;\r\n211 end"))
        with connected(host) as server:
            assert names(server) == ["a"] and not host.said("OPTS")


def test_where_a_look_is_refused_after_a_fetch_it_is_not_now_and_its_company_goes_on() -> None:
    with FtpHost(files=dict.fromkeys("abc", b"1"), mlsd=False, zone=60) as host:
        now = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
        host.times = dict.fromkeys("abc", now - datetime.timedelta(hours=2))
        with connected(host) as server:
            jobs = [ftpcoord.Job(f"/in/{entry.name}", 1, bytes, entry) for entry in server.list("/in")]
            host.on("LIST", reply("550 Permission denied"))
            ends = {job.path: error for job, error in server.fetch_many(jobs)}
        assert isinstance(ends.pop("/in/a"), ftpcoord.NotNow) and ends == {"/in/b": None, "/in/c": None}


def test_files_of_many_folders_are_asked_for_one_by_one_where_that_costs_less_than_a_listing_of_each() -> None:
    with FtpHost(files={f"{number}/a": b"1" for number in range(4)}) as host:
        host.folders = {f"/in/{number}" for number in range(4)}
        with connected(host) as server:
            jobs = [ftpcoord.Job(f"{folder}/a", 1, bytes, server.list(folder)[0]) for folder in sorted(host.folders)]
            server.habits.listing, server.habits.question = 2.0, 1.0  # seconds
            assert all(error is None for _, error in server.fetch_many(jobs))
        assert len(host.said("MLST")) == len(host.said("MLSD")) == 4


def test_a_few_files_are_asked_for_whatever_a_busy_host_takes_for_it() -> None:
    """An answer is more exact than a line of LIST, and a listing takes four answers itself."""
    with FtpHost(files=dict.fromkeys("abc", b"1"), mlsd=False) as host, connected(host) as server:
        host.times = dict.fromkeys("abc", datetime.datetime(2026, 1, 12, 10, 15))
        jobs = [ftpcoord.Job(f"/in/{entry.name}", 1, bytes, entry) for entry in server.list("/in")]
        server.habits.listing, server.habits.question = 0.1, 1.0  # seconds
        assert all(error is None for _, error in server.fetch_many(jobs))
        assert len(host.said("MDTM")) == 3 and len(host.said("LIST")) == 1


def test_one_slow_answer_does_not_make_a_listing_cheaper_than_questions() -> None:
    """Else a busy host would list a large folder again for each group of small files."""
    with FtpHost(files=dict.fromkeys("abc", b"1")) as host, connected(host) as server:
        entries = server.list("/in")
        server.habits.listing, server.habits.question = 0.6, 0.0001  # seconds

        def slow(session: FtpSession, argument: str) -> None:
            time.sleep(0.3 if argument == "/in/c" else 0.0)
            session.on_mlst(argument)

        host.on("MLST", slow, times=None)
        for _ in range(2):
            jobs = [ftpcoord.Job(f"/in/{entry.name}", 1, bytes, entry) for entry in entries]
            assert all(error is None for _, error in server.fetch_many(jobs))
        assert len(host.said("MLST")) == 6 and len(host.said("MLSD")) == 1


@pytest.mark.parametrize("mlsd", [True, False])
def test_a_small_file_takes_no_more_commands_than_two_and_a_question_or_one_listing_for_all(mlsd: bool) -> None:
    """curl takes three: EPSV, SIZE, RETR. Each waits for its answer: at 20 ms they are what a file costs."""
    files = {f"{number:02}": b"1" for number in range(40)}
    with FtpHost(files=files, mlsd=mlsd) as host, connected(host) as server:
        host.times = dict.fromkeys(files, datetime.datetime(2026, 1, 12, 10, 15))
        jobs = [ftpcoord.Job(f"/in/{entry.name}", 1, bytes, entry) for entry in server.list("/in")]
        for listing, question, beside in ((1.0, 1.0, ["CWD", "EPSV", "MLSD" if mlsd else "LIST"]), (99.0, 1.0, [])):
            server.habits.listing, server.habits.question = listing, question  # seconds
            host.commands.clear()
            assert [error for _, error in server.fetch_many(jobs)] == [None] * len(jobs)
            asked = [] if beside else ["MLST" if mlsd else "MDTM"] * len(jobs)
            verbs = sorted(said.split(" ")[0] for said in host.commands)
            assert verbs == sorted(["EPSV", "RETR"] * len(jobs) + beside + asked)


# ---------------------------------------------------------------------------------------------------------------------
# Listings
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        "550 no",
        "550 Zugriff verweigert",
        "450 later",
        "550 Permission denied",
        "500 what",
        "501 no",
        "502 no",
        "504 no",
        "451 error",
    ],
)
def test_where_mlsd_is_refused_list_is_tried_and_what_it_shows_is_there(said: str) -> None:
    with FtpHost(files={"a": b"1"}) as host:
        host.on("MLSD", reply(said), times=None)
        host.on(
            "LIST",
            lambda session, argument: session.send(b"-rw-r--r--    1 0        0               1 Jan 12  2024 a\r\n"),
            times=None,
        )
        with connected(host) as server:
            assert names(server) == names(server) == ["a"]
            assert len(host.said("MLSD")) == 1, "not again on this connection"


@pytest.mark.parametrize(
    "line", ["modify=20240112101530; a", "type=file;modify=20240112101530; a", "size=1;modify=20240112101530; a", " a"]
)
def test_where_nobody_understands_mlsd_list_is_tried(line: str) -> None:
    with FtpHost(files={"a": b"1"}) as host:
        host.on("MLSD", hostile.content(line.encode() + b"\r\n"), times=None)
        with connected(host) as server:
            with pytest.raises(ftpcoord.FileRefused, match="not understood"):
                host.on("LIST", reply("550 No files found"))
                server.list("/in")
            host.on(
                "LIST", hostile.content(b"-rw-r--r--    1 0        0               1 Jan 12  2024 a\r\n"), times=None
            )
            assert names(server) == names(server) == ["a"]
            assert len(host.said("MLSD")) == 2, "not again on this connection"


@pytest.mark.parametrize(
    "said",
    [
        "550 no",
        "550 Zugriff verweigert",
        "550 Accès refusé",
        "450 later",
        "451 error",
        "550 Permission denied",
        "550 No files found or access denied",
    ],
)
@pytest.mark.parametrize("mlsd", [True, False], ids=["MLSD", "LIST"])
def test_a_folder_that_cannot_be_listed_is_refused_and_not_empty(said: str, mlsd: bool) -> None:
    with FtpHost(files={"a": b"1"}, mlsd=mlsd) as host:
        host.on("MLSD", reply(said), times=None)
        host.on("LIST", reply(said), times=None)
        with connected(host) as server:
            with pytest.raises(ftpcoord.FileRefused):
                server.list("/in")
            assert server.alive()


@pytest.mark.parametrize(
    "said",
    [
        "226 done",
        "550 No files found",
        "450 No files found",
        "550 no such file",
        "550 *: file not found",
        "450 No data sets found",
    ],
)
def test_an_empty_folder_is_empty_by_a_yes_or_by_a_known_text(said: str) -> None:
    with FtpHost(mlsd=False) as host:
        if not said.startswith("2"):
            host.on("LIST", reply(said))
        with connected(host) as server:
            assert names(server) == []


@pytest.mark.parametrize("said", ["550 no", "550 Permission denied", "450 later", "550 No such file or directory"])
def test_a_folder_that_cannot_be_entered_is_gone_only_if_its_parents_listing_lacks_it(said: str) -> None:
    with FtpHost() as host:
        host.folders.add("/in/sub")
        host.on(
            "CWD", lambda session, path: session.say(said) if path == "/in/sub" else session.on_cwd(path), times=None
        )
        host.on("MLST", reply("550 no"), times=None)
        with connected(host) as server:
            with pytest.raises(ftpcoord.FileRefused):
                server.list("/in/sub")
            host.folders.clear()
            with pytest.raises(ftpcoord.FileGone):
                server.list("/in/sub")


@pytest.mark.parametrize("mlsd", [True, False])
def test_no_file_is_gone_because_its_session_is_not_logged_in_any_more(mlsd: bool) -> None:
    """RFC 959 section 5.4: 530. Else what is done would lose its row, and be handled again."""
    with FtpHost(files={"a": b"1"}, mlsd=mlsd) as host, connected(host) as server:
        (entry,) = server.list("/in")
        assert server.same("/in/a", entry) and server.exists("/in/a") and not server.exists("/in/b")
        for command in ("MLST", "SIZE", "MDTM", "CWD", "RETR"):
            host.on(command, reply("530 Please login with USER and PASS"), times=None)
        calls: list[Callable[[], object]] = [
            lambda: server.same("/in/a", entry),
            lambda: server.exists("/in/a"),
            lambda: list(server.fetch_many([ftpcoord.Job("/in/a", 1, bytes, entry)])),
        ]
        for call in calls:
            with pytest.raises(ftpcoord.LoginRefused):
                call()


def test_a_file_in_a_closed_folder_is_not_gone_where_size_refuses_it_like_a_name_that_is_not_there() -> None:
    """As vsftpd does, which does not tell why it refuses CWD either."""
    with FtpHost(files={"a": b"1"}, mlsd=False) as host, connected(host) as server:
        (entry,) = server.list("/in")
        assert server.same("/in/a", entry) and not server.exists("/in/b")
        host.on("SIZE", reply("550 no such file"), times=None)
        host.on("CWD", lambda session, path: session.on_cwd(path if path == "/" else "/none"), times=None)
        with pytest.raises(ftpcoord.FileRefused):
            server.same("/in/a", entry)


@pytest.mark.parametrize(
    "begin",
    [
        b"total 5\r\n",
        b"-rw-r--r--",
        b"what is this?\r\n",
        b"drwxr-xr-x 2 me us 5 Jan 12  2024 .\r\n",
        b"-rw-r--r-- 1 me us 5 Jan 12  2024  a\r\n",
        b"-rw-r--r-- 1 me us 5 Jan 12  2024 a\r\n",
    ],
)
@pytest.mark.parametrize("mlsd", [True, False], ids=["MLSD", "LIST"])
def test_a_listing_that_ends_early_by_not_found_is_not_empty_whatever_came_of_it(begin: bytes, mlsd: bool) -> None:
    with FtpHost(files={"a": b"1"}, mlsd=mlsd) as host:
        host.on("MLSD", reply("502 no"))
        host.on("LIST", hostile.content(begin, "550 b: No such file or directory"))
        with connected(host) as server, pytest.raises((ftpcoord.ServerDown, ftpcoord.FileRefused)):
            server.list("/in")


def test_lines_that_nobody_understands_in_one_folder_are_not_said_of_the_next_one() -> None:
    with FtpHost(mlsd=False, files={"a": b"1"}) as host:
        host.folders.add("/in/sub")
        host.lines.append(b"what is this?")
        with connected(host) as server:
            assert len(server.list("/in")) == 2 and server.unread == ["what is this?"]
            host.on("LIST", reply("550 No files found"))
            assert not server.list("/in/sub") and not server.unread


def test_a_name_that_a_line_nobody_understands_may_tell_of_is_neither_there_nor_absent() -> None:
    with FtpHost(mlsd=False, files={"b": b"1"}) as host:
        host.lines.append(b"of no form a")
        host.on("SIZE", reply("550 no"), times=None)
        with connected(host) as server:
            with pytest.raises(ftpcoord.FileRefused, match="not understood"):
                server.exists("/in/a")
            assert server.exists("/in/b") and not server.exists("/in/c")


def test_nothing_is_moved_to_a_name_that_one_of_too_many_odd_lines_may_tell_of() -> None:
    """Not all of them are kept."""
    with FtpHost(mlsd=False, files={"b": b"1"}) as host:
        host.lines += [b"of no form %d" % number for number in range(200)] + [b"of no form a"]
        host.on("SIZE", reply("550 no"), times=None)
        with connected(host) as server:
            with pytest.raises(ftpcoord.FileRefused, match="not understood"):
                server.rename("/in/b", "/in/a")
        assert not [command for command in host.commands if command.startswith("RNTO")]


def test_a_listing_that_begins_and_is_then_refused_is_a_refusal() -> None:
    with FtpHost(files={"a": b"1"}, mlsd=False) as host:
        host.on("LIST", hostile.content(b"", "550 Zugriff verweigert"))
        with connected(host) as server:
            with pytest.raises(ftpcoord.FileRefused):
                server.list("/in")
            assert names(server) == ["a"]


# ---------------------------------------------------------------------------------------------------------------------
# Data connections
# ---------------------------------------------------------------------------------------------------------------------


def dead_port(session: FtpSession, argument: str) -> None:
    session.on_epsv("") if argument else None
    session.say(f"229 (|||{hostile.unused_port()}|)")


@pytest.mark.parametrize(
    "epsv",
    [dead_port, reply("229 what"), reply("229 (|||99999|)"), reply("229 (|||0|)"), reply("500 no"), reply("200 ok")],
    ids=["dead port", "no port", "99999", "0", "500", "200"],
)
def test_where_epsv_leads_nowhere_pasv_is_tried(epsv: hostile.Action) -> None:
    with FtpHost(files={"a": b"12345"}) as host:
        host.on("EPSV", epsv, times=None)
        with connected(host) as server:
            assert names(server) == ["a"]
            content = bytearray()
            fetch(server, "/in/a", 5, content.extend)
            assert content == b"12345"
            assert len(host.said("EPSV")) == 1 and host.sessions == 1


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_server_that_closes_its_port_and_refuses_is_heard(first: bool) -> None:
    """Its reply is the reason, not the connection that it did not take."""
    with FtpHost(files={"a": b"1", "b": b"2"}) as host:

        def refuse(session: FtpSession, argument: str) -> None:
            if session.passive:
                session.passive.close()
            session.say("550 no rights")

        def late(session: FtpSession, argument: str) -> None:
            session.on_epsv(argument)
            if session.passive:
                session.passive.close()  # before the client can connect

        with connected(host) as server:
            if not first:
                fetch(server, "/in/b", 1, bytes)
                host.on("EPSV", late)
            host.on("RETR", refuse)
            with pytest.raises(ftpcoord.FileRefused, match="no rights"):
                fetch(server, "/in/a", 1, bytes)
            fetch(server, "/in/a", 1, bytes)
            assert host.sessions == 1


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        ("550 Permission denied", ftpcoord.FileRefused),
        ("451 read error", ftpcoord.FileRefused),
        ("450 later", ftpcoord.NotNow),
        ("550 used by another process", ftpcoord.NotNow),
        ("426 cut", ftpcoord.ServerDown),
        ("425 no", ftpcoord.ServerDown),
        ("421 bye", ftpcoord.ServerDown),
    ],
)
def test_a_transfer_that_begins_and_is_then_refused_is_refused_for_its_file(end: str, kind: type[Exception]) -> None:
    with FtpHost(files={"a": b"1"}) as host:
        host.on("RETR", hostile.content(b"", end))
        with connected(host) as server, pytest.raises(kind):
            fetch(server, "/in/a", 1, bytes)


def twice(verb: str) -> hostile.Action:
    """Each final reply to it."""

    def act(session: FtpSession, argument: str) -> None:
        say = session.say
        session.say = lambda text: say(f"{text}\r\n{text}" if text[0] == "2" else text)  # type: ignore[method-assign]
        getattr(session, f"on_{verb.lower()}")(argument)
        session.say = say  # type: ignore[method-assign]

    return act


@pytest.mark.parametrize("mlsd", [True, False])
@pytest.mark.parametrize("verb", ["TYPE", "PWD", "CWD", "EPSV", "MLSD", "LIST", "RETR", "MLST", "SIZE", "MDTM"])
def test_a_reply_that_comes_twice_is_none_to_the_next_command(verb: str, mlsd: bool) -> None:
    with FtpHost({"a": b"1", "b": b"2"}, mlsd=mlsd) as host:
        host.on(verb, twice(verb), times=None)
        host.on("DELE", reply("550 not yours"), times=None)
        with connected(host) as server:
            listed = {entry.name: entry for entry in server.list("/in")}
            fetch(server, "/in/a", 1, bytes)
            assert server.same("/in/a", listed["a"]) and server.same("/in/b", listed["b"])
            assert server.exists("/in/b") and not server.exists("/in/c")
            server.exact("/in/a", listed["a"])
            with pytest.raises(ftpcoord.FileRefused):
                server.delete("/in/a")


@pytest.mark.parametrize("verb", ["RETR", "MLSD"])
def test_a_further_preliminary_reply_does_not_end_a_transfer(verb: str) -> None:
    def act(session: FtpSession, argument: str) -> None:
        session.say("125 about to")
        getattr(session, f"on_{verb.lower()}")(argument)

    with FtpHost({"a": b"1"}) as host, connected(host) as server:
        host.on(verb, act, times=None)
        assert names(server) == ["a"]
        fetch(server, "/in/a", 1, bytes)
        assert host.sessions == 1
        host.behave()
        host.on("MLSD", answers("150 here", b"", "150 still here\r\n" * 5000))
        with pytest.raises(ftpcoord.ServerDown, match="without an end"):
            server.list("/in")


@pytest.mark.parametrize("form", ["\r\n{}", "{}\r\n"], ids=["before", "behind"])
def test_empty_lines_around_replies_say_nothing(form: str) -> None:
    class Session(FtpSession):
        def say(self, text: str) -> None:
            super().say(form.format(text))
            time.sleep(0.002)  # so that some come before the next command, some with its reply

    with FtpHost({"a": b"1"}) as host:
        host.session = lambda sock: Session(host, sock).run()
        with connected(host) as server:
            assert names(server) == ["a"]
            fetch(server, "/in/a", 1, bytes)
            assert not server.exists("/in/b")
            server.delete("/in/a")
            assert host.sessions == 1 and not host.files


def test_replies_without_an_end_that_nobody_asked_for_end_the_connection() -> None:
    with FtpHost({"a": b"1"}) as host, connected(host) as server:
        server.list("/in")
        host.on("CWD", reply("250 ok" + "\r\n200 and another thing" * 100_000))
        with pytest.raises(ftpcoord.ServerDown):
            server.list("/in")
        assert names(server) == ["a"]


@pytest.mark.parametrize("verb", ["MLST", "CWD", "DELE", "RNTO", "MKD"])
def test_a_goodbye_is_no_yes_to_what_was_asked(verb: str) -> None:
    with FtpHost(files={"a": b"1"}) as host, connected(host) as server:
        host.on(verb, hostile.say_and_leave("221 timed out"))
        with pytest.raises(ftpcoord.ServerDown, match="221"):
            if verb == "MLST":
                server.same("/in/a", server.list("/in")[0])
            elif verb == "DELE":
                server.delete("/in/a")
            elif verb == "RNTO":
                server.rename("/in/a", "/in/b")
            else:
                server.mkdir("/in/new")
        assert host.files == {"a": b"1"} and host.folders == set()


@pytest.mark.parametrize("delivery", ["folder", "handler"])
@pytest.mark.parametrize("said", ["450 busy", "550 The file is being used by another process."])
def test_a_file_in_use_is_not_now_and_is_not_counted(tmp_path: Path, said: str, delivery: str) -> None:
    with FtpHost(files={"a": b"1"}) as host:
        host.on("RETR", reply(said), times=5)
        with Site(tmp_path, host.settings, delivery, max_attempts=2, retry_delay=0.01) as site:
            site.arrive({"a": b"1"})
            assert site.state("a", "done")["failures"] == 0 and not site.all("file_failed")


# ---------------------------------------------------------------------------------------------------------------------
# TLS on data connections
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return servers.tls_files(tmp_path_factory.mktemp("tls")) / "cert.pem"


@pytest.mark.parametrize("early", [True, False], ids=["handshake first", "150 first"])
@pytest.mark.parametrize("ends", ["properly", "untouched"])
@pytest.mark.parametrize("mlsd", [True, False], ids=["MLSD", "LIST"])
def test_folders_and_files_with_and_without_content_come_under_tls(
    certificate: Path, ends: str, early: bool, mlsd: bool
) -> None:
    with FtpsHost(certificate, ends=ends, early=early, mlsd=mlsd) as host, connected(host) as server:
        assert names(server) == names(server) == []
        host.put("a", b"12345")
        host.put("empty", b"")
        assert names(server) == ["a", "empty"]
        for name, content in (("a", b"12345"), ("empty", b""), ("a", b"12345")):
            received = bytearray()
            fetch(server, f"/in/{name}", len(content), received.extend)
            assert received == content
        assert host.sessions == 1


def test_data_connections_that_end_before_their_handshake_leave_no_socket_behind(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def end(session: FtpSession, argument: str) -> None:
        session.say("150 here")
        session.data().close()
        ended.set()
        session.say("226 done")

    def connect(sock: ftpcoord.GuardedSocket, address: Any) -> None:
        socket.socket.connect(sock, address)
        assert ended.wait(PATIENCE)
        ended.clear()

    with FtpsHost(certificate) as host, connected(host) as server:
        server.list("/in")
        monkeypatch.setattr(ftpcoord.GuardedSocket, "connect", connect)
        host.on("MLSD", end, times=None)
        before = len(os.listdir("/proc/self/fd"))
        assert [server.list("/in") for _ in range(20)] == [[]] * 20
        wait_for(lambda: len(os.listdir("/proc/self/fd")) < before + 10, PATIENCE)


@pytest.mark.parametrize("count", [0, 1, 300])
def test_a_listing_that_ends_without_the_close_of_tls_is_none_unless_that_is_allowed(
    certificate: Path, count: int
) -> None:
    files = {f"{number:03}": b"x" for number in range(count)}
    with FtpsHost(certificate, files, ends="cut") as host:
        with connected(host) as server, pytest.raises(ftpcoord.ServerDown, match="tls_close"):
            server.list("/in")
        with connected(host, tls_close="lax") as server:
            assert names(server) == sorted(files)
            if files:
                fetch(server, "/in/000", 1, bytes)
        if files:
            with connected(host) as server:
                fetch(server, "/in/000", 1, bytes)  # its size shows that it is whole


def test_a_listing_that_is_cut_in_the_middle_with_a_final_yes_forgets_nothing(certificate: Path) -> None:
    with FtpsHost(certificate, {f"{number:03}": b"x" for number in range(300)}) as host:

        def cut(session: FtpsSession, argument: str) -> None:
            host.ends = "cut"
            session.send(host.listing("/in")[:5000])
            host.ends = "properly"

        host.on("MLSD", cut)
        with connected(host) as server:
            with pytest.raises(ftpcoord.ServerDown):
                server.list("/in")
            assert len(names(server)) == 300


class Upgraded(FtpsHost):
    """TLS from AUTH on; `text_behind` comes with the answer to that."""

    scheme = "ftpes"
    text_behind = ""

    def session(self, sock: socket.socket) -> None:
        self.on("AUTH", self.upgrade, times=None)
        FtpSession(self, sock).run()

    def upgrade(self, session: FtpSession, argument: str) -> None:
        session.sock.sendall(f"234 go on\r\n{self.text_behind}".encode())
        with self.context.wrap_socket(session.sock, server_side=True) as wrapped:
            self.on("GREETING", hostile.nothing)
            FtpsSession(self, wrapped).run()
        raise hostile.Gone


@pytest.mark.parametrize("text", ["230 you are in\r\n", "211-the rest is under TLS\r\n"], ids=["whole", "begun"])
def test_what_somebody_in_between_says_before_the_handshake_ends_the_connection(certificate: Path, text: str) -> None:
    with Upgraded(certificate, {"a": b"1"}) as host:
        with connected(host) as server:
            assert names(server) == ["a"]
        host.text_behind = text
        with pytest.raises(ftpcoord.ServerDown, match="in the clear"), connected(host):
            pass


@pytest.mark.parametrize("early", [True, False], ids=["before the handshake", "after the 150"])
def test_a_file_that_is_refused_under_tls_is_refused_and_not_a_broken_connection(
    certificate: Path, early: bool
) -> None:
    def refuse(session: FtpsSession, argument: str) -> None:
        if not early:
            session.say("150 here")
        session.data().close()
        session.say("550 no rights")

    with FtpsHost(certificate, {"a": b"1"}) as host, connected(host) as server:
        for _ in range(2):
            host.on("RETR", refuse)
            with pytest.raises(ftpcoord.FileRefused, match="no rights"):
                fetch(server, "/in/a", 1, bytes)
        fetch(server, "/in/a", 1, bytes)
        assert host.sessions == 1


# ---------------------------------------------------------------------------------------------------------------------
# Connections that end, and that are limited
# ---------------------------------------------------------------------------------------------------------------------


def then_leave(session: FtpSession, argument: str) -> None:
    session.on_retr(argument)
    raise hostile.Gone


@pytest.mark.parametrize("delivery", ["folder", "handler"])
def test_a_server_that_hangs_up_after_each_file_gives_them_all_at_once_and_first_time(
    tmp_path: Path, delivery: str
) -> None:
    files = {f"{number:02}": b"x" * number for number in range(40)}
    with FtpHost(files=dict(files)) as host:
        host.on("RETR", then_leave, times=None)
        with Site(tmp_path, host.settings, delivery, retry_delay=30) as site:
            site.arrive(files)
            assert not site.all("file_failed") and not site.all("server_down")
            assert {done["attempt"] for done in site.all("file_done")} == {1}


def test_files_that_were_not_asked_for_when_the_connection_ended_go_again_at_once_as_if_never_claimed(
    tmp_path: Path,
) -> None:
    files = {f"{number:02}": b"x" * number for number in range(40)}
    with FtpHost(files=dict(files)) as host:
        host.on(
            "RETR",
            lambda session, argument: hostile.leave(session, "") if argument == "/in/05" else session.on_retr(argument),
            times=None,
        )
        with Site(tmp_path, host.settings, workers=1, retry_delay=30, polling_interval=600) as site:
            site.arrive({name: content for name, content in files.items() if name != "05"})
            assert {done["attempt"] for done in site.all("file_done")} == {1}
            assert len(site.all("file_failed")) == 1 and site.row("05")


def test_what_is_done_is_removed_without_waiting_for_another_poll(tmp_path: Path) -> None:
    with (
        FtpHost(files={"a": b"1", "b": b"2"}) as host,
        Site(tmp_path, host.settings, after="delete", polling_interval=600) as site,
    ):
        site.arrive({"a": b"1", "b": b"2"})
        wait_for(lambda: not host.files, 5)


def test_a_file_that_ended_the_connection_is_fetched_without_company_the_next_time(tmp_path: Path) -> None:
    files = {name: name.encode() for name in "abcdef"}
    with FtpHost(files=dict(files)) as host:
        host.on(
            "RETR",
            lambda session, argument: (
                hostile.leave(session, "")
                if argument == "/in/c" and len(host.said("RETR")) < 12
                else session.on_retr(argument)
            ),
            times=None,
        )
        with Site(tmp_path, host.settings, workers=1) as site:
            for round_ in "123":
                for name in "abdef":
                    host.put(name, round_.encode() * 2, int(round_))
                site.polls(3)
            site.wait("file_done", path="/in/c")
            others = [done for done in site.all("file_done") if done["path"] != "/in/c"]
            assert {done["attempt"] for done in others} == {1}


@pytest.mark.parametrize("how", [1, 2], ids=["its end", "all of it"])
def test_a_channel_that_ended_while_its_connection_stays_is_not_used_again(how: int) -> None:
    with hostile.SftpHost(files={"a": b"1"}) as host, connected(host) as server:

        def last(session: hostile.SftpSession, path: str) -> None:
            session.behave("CLOSE", path, b"")
            session.channel.shutdown(how)

        assert names(server) == ["a"] and server.quiet()
        host.on("CLOSE", last)
        server.list("/in")
        wait_for(lambda: not server.quiet(), PATIENCE)


@pytest.mark.parametrize(("scheme", "setting"), [("sftp", "key"), ("ftps", "ca_file")])
def test_a_key_or_certificate_that_is_gone_is_waited_for(tmp_path: Path, scheme: str, setting: str) -> None:
    changes: dict[str, Any] = {setting: str(tmp_path / "gone"), "database": "sqlite:///unused.db"}
    pool = ftpcoord.Pool(ftpcoord.Config(url=f"{scheme}://me@127.0.0.1:1/in", **changes))
    with pytest.raises(ftpcoord.ServerDown, match="gone"), pool.server():
        pass
    assert pool.trouble is not None and "gone" in str(pool.trouble)


@pytest.mark.parametrize("kind", [FtpHost, hostile.SftpHost], ids=["ftp", "sftp"])
def test_a_connection_that_was_dropped_a_moment_after_its_use_is_not_used_again(kind: type[Any]) -> None:
    with kind(files={"a": b"1"}) as host:
        pool = ftpcoord.Pool(ftpcoord.Config(**host.settings, database="sqlite:///unused.db"))
        with contextlib.closing(pool):
            with pool.server() as server:
                assert names(server) == ["a"]
            host.drop()
            wait_for(lambda: not server.quiet(), PATIENCE)
            with pool.server() as server:
                assert names(server) == ["a"]
        assert host.sessions == 2


@pytest.mark.parametrize("goodbye", ["221 timed out", "421 idle too long", ""])
@pytest.mark.parametrize("idle", [0.0, 60.0], ids=["just used", "long idle"])
def test_a_connection_that_has_ended_while_it_idled_is_replaced_without_a_word(
    tmp_path: Path, goodbye: str, idle: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Farewell(FtpSession):
        def on_mlsd(self, argument: str) -> None:
            super().on_mlsd(argument)
            if goodbye:
                self.say(goodbye)
            raise hostile.Gone

    with FtpHost(files={"a": b"1"}) as host:
        monkeypatch.setattr(host, "session", lambda sock: Farewell(host, sock).run())
        if idle:
            put = ftpcoord.Pool._put

            def put_long_ago(pool: ftpcoord.Pool, server: ftpcoord.FileServer) -> None:
                with pool._changed:
                    put(pool, server)
                    pool._idle[-1] = (server, time.monotonic() - idle)

            monkeypatch.setattr(ftpcoord.Pool, "_put", put_long_ago)
        with Site(tmp_path, host.settings) as site:
            site.arrive({"a": b"1"})
            site.polls(3)
            assert not site.all("server_down") and not site.all("file_failed")


@pytest.mark.parametrize(
    "said",
    [
        "530 Too many connections from this host",
        "530 Sorry, the maximum number of clients is reached",
        "421 Too many users",
        "530 Zu viele Verbindungen",
        "450 later",
        "430 Session limit reached",
    ],
)
def test_too_many_connections_is_a_limit_and_no_refused_login(tmp_path: Path, said: str) -> None:
    with FtpHost(files={"a": b"1"}) as host:
        host.on("PASS", reply(said), times=2)
        with Site(tmp_path, host.settings) as site:
            assert site.wait("server_down")["retry_in"] <= 1
            site.arrive({"a": b"1"})


def test_a_login_refused_in_any_words_while_another_is_in_is_a_limit(tmp_path: Path) -> None:
    """The other one shows that the password is good. When that one has ended, a login is tried at once."""
    files = {f"{number:02}": b"x" for number in range(20)}
    with FtpHost(files=dict(files)) as host:
        host.on(
            "PASS",
            lambda session, argument: session.say("530 nein") if host.open_sessions > 1 else session.on_pass(argument),
            times=None,
        )
        host.on("RETR", FtpSession.on_retr, times=5)
        host.on("RETR", hostile.leave)
        with Site(tmp_path, host.settings, "handler", workers=3, polling_interval=0.2) as site:
            site.arrive(files)
            assert len(host.said("PASS")) <= 8
            assert all(down["retry_in"] < 30 for down in site.all("server_down"))


def test_too_many_wrong_logins_are_no_limit_on_connections() -> None:
    with FtpHost() as host:
        host.on("PASS", reply("530 Maximum number of login attempts exceeded"))
        with pytest.raises(ftpcoord.LoginRefused), connected(host):
            pass


# ---------------------------------------------------------------------------------------------------------------------
# What bad answers do to what is known
# ---------------------------------------------------------------------------------------------------------------------


def every_third(said: str, listing: hostile.Action) -> hostile.Action:
    count = itertools.count(1)
    return lambda session, argument: session.say(said) if next(count) % 3 == 0 else listing(session, argument)


@pytest.mark.parametrize("verb", ["MLSD", "CWD"])
@pytest.mark.parametrize("said", ["450 later", "550 no", "550 No such file or directory", "550 Zugriff verweigert"])
def test_a_poison_file_is_quarantined_though_listings_in_between_are_refused(
    tmp_path: Path, verb: str, said: str
) -> None:
    with FtpHost(files={"a": b"1"}) as host:
        for command in ("MLSD", "LIST") if verb == "MLSD" else ("CWD",):
            host.on(command, every_third(said, FtpSession.on_cwd if verb == "CWD" else FtpSession.on_mlsd), times=None)
        host.on("MLST", reply("550 no"), times=None)
        host.on("RETR", reply("553 no"), times=None)
        with Site(tmp_path, host.settings, "handler", max_attempts=4, retry_delay=0.01) as site:
            row = site.state("a", "quarantined")
            assert (row["failures"], row["attempts"]) == (4, 4)


def test_a_refused_subfolder_is_said_and_stops_only_itself(tmp_path: Path) -> None:
    with FtpHost(files={"a": b"1", "sub/b": b"2"}) as host:
        host.folders.add("/in/sub")
        with Site(tmp_path, host.settings, "handler", recursive=True) as site:
            site.arrive({"a": b"1", "b": b"2"})
            host.on(
                "CWD",
                lambda session, path: session.say("550 no") if path == "/in/sub" else session.on_cwd(path),
                times=None,
            )
            host.on("MLST", reply("550 no"), times=None)
            host.put("c", b"3")
            site.arrive({"a": b"1", "b": b"2", "c": b"3"})
            site.polls(3)
            assert site.all("file_refused", folder="/in") and not site.all("server_down")
            host.behave()
            site.polls(3)
            assert len(site.handled) == 3, "nothing was forgotten"


# ---------------------------------------------------------------------------------------------------------------------
# One command, one connection
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def scripted(**script: hostile.Action) -> Iterator[FtpHost]:
    """A host without MLSD that answers these commands so."""
    with FtpHost(files={"a": b"12345"}, mlsd=False) as host:
        for verb, action in script.items():
            host.on(verb, action, times=None)
        yield host


def test_the_address_of_a_pasv_reply_is_ignored_and_unknown_lines_are_kept_apart() -> None:
    def elsewhere(session: FtpSession, argument: str) -> None:
        session.passive = socket.create_server(("127.0.0.1", 0))
        port = session.passive.getsockname()[1]
        session.say(f"227 Entering Passive Mode (203,0,113,9,{port >> 8},{port & 255})")

    lines = b"total 1\r\n-rw-r--r-- 1 0 0 5 Jan 12  2024 a\r\nsomething else\r\n"
    script = {"EPSV": reply("500 what"), "PASV": elsewhere, "LIST": answers("150 here", lines, "226 done")}
    with scripted(**script) as host, connected(host) as server:
        assert server.list("/in") == [ftpcoord.Entry("a", "file", 5, "2024-01-12")]
        assert server.unread == ["something else"]


def test_a_listing_that_was_cut_off_is_not_believed() -> None:
    cut = answers("150 here", b"-rw-r--r-- 1 0 0 5 Jan 12  2024 a\r\n", "426 connection lost")
    with scripted(LIST=cut) as host, connected(host) as server:
        with pytest.raises(ftpcoord.ServerDown, match="cut off"):
            server.list("/in")


@pytest.mark.parametrize("said", ["211-" + "x\r\n" * 5000, "211-" + "x" * 100_000, "gibberish"])
def test_a_reply_without_an_end_is_given_up(said: str) -> None:
    with scripted(FEAT=reply(said)) as host, pytest.raises(ftpcoord.ServerDown), connected(host):
        pass


def test_a_password_with_a_line_break_is_never_sent() -> None:
    with scripted() as host:
        with pytest.raises(ftpcoord.Error), connected(host, password="a\r\nDELE x"):
            pass
        assert not any("DELE" in command for command in host.commands)


@pytest.mark.parametrize(("end", "error"), [("226 done", ftpcoord.FileChanged), ("426 lost", ftpcoord.ServerDown)])
def test_a_transfer_that_ends_early_is_changed_and_one_whose_reply_says_so_is_down(
    end: str, error: type[Exception]
) -> None:
    with scripted(RETR=answers("150 here", b"123", end)) as host, connected(host) as server:
        with pytest.raises(error):
            fetch(server, "/in/a", 5, bytes)


@pytest.mark.parametrize("end", ["reset", "left open"])
@pytest.mark.parametrize("content", [b"", b"a" * 300_000], ids=len)
def test_all_bytes_count_however_their_connection_ends(end: str, content: bytes) -> None:
    left: list[socket.socket] = []

    def act(session: FtpSession, argument: str) -> None:
        session.say("150 here")
        left.append(session.data())
        left[-1].sendall(session.host.files["a"][: None if whole else 1000])
        left[-1].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if end == "reset":
            time.sleep(0.05)  # what was read is not taken back
            left.pop().close()
        session.say("226 done")

    with FtpHost({"a": content}) as host, connected(host) as server:
        host.on("RETR", act, times=None)
        whole = True
        assert fetched(server, len(content)) == content
        whole = False
        if content:
            with pytest.raises(ftpcoord.ServerDown):
                fetched(server, len(content))


def fetched(server: FileServer, size: int) -> bytes:
    got = bytearray()
    fetch(server, "/in/a", size, got.extend)
    return bytes(got)


def test_all_bytes_count_even_if_the_last_reply_never_comes() -> None:
    got = bytearray()
    with scripted(RETR=answers("150 here", b"12345")) as host, connected(host) as server:
        fetch(server, "/in/a", 5, got.extend)
    assert got == b"12345"


def test_the_zone_of_list_is_learnt_from_one_file_and_saves_later_listings() -> None:
    now = datetime.datetime.now(datetime.timezone.utc).replace(second=30, tzinfo=None) - datetime.timedelta(days=1)
    with scripted() as host, connected(host) as server:
        host.zone = 5 * 60 + 45
        host.times["a"] = now
        (seen,) = server.list("/in")
        assert server.same("/in/a", seen) is True
        host.commands.clear()
        assert server.same("/in/a", seen) is True
        assert host.commands == ["SIZE /in/a", "MDTM /in/a"]
        host.on("MDTM", reply((now + datetime.timedelta(minutes=2)).strftime("213 %Y%m%d%H%M%S")), times=None)
        assert server.same("/in/a", seen) is True  # the listing is the last word
        assert "LIST" in host.commands
