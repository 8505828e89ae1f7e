"""One suite for every kind of file server: each test runs unchanged against all of them, and they are real ones.

Below it: what is particular to TLS and SSH.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import functools
import itertools
import os
import random
import re
import stat
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
import servers
from conftest import Files, fetch
from members import stores

import ftpcoord
from ftpcoord import Entry, FileServer, Job

pytestmark = pytest.mark.timeout(60)  # a client that hangs is told as that before the next hundred tests hang, too
OLD = 1_700_000_000.0  # 2023-11-14T22:13:20 UTC
ODD_NAMES = [
    b" leading",
    b"trailing ",
    b"two  spaces",
    b"-dash",
    b"--",
    b"-rf *",
    b"*",
    b"a*b?[c]{d}",
    b"~",
    b"~user",
    b"$HOME",
    b"quote's",
    b'double "quote"',
    b"back\\slash",
    b"semi;colon",
    b"#hash",
    b"per%20cent",
    b"tab\there",
    "übung.csv".encode(),
    "日本語".encode(),
    "e\u0301".encode(),
    b"a -> b",
    b"x" * 200,
]
UNDECODABLE = [b"latin-1 caf\xe9", b"\x80\x81\xfe", b"half a rune \xe2\x82"]

# What is a matter of the client alone, and takes time: each way of connecting once.
EACH_CLIENT = stores("vsftpd", "vsftpd-explicit", "vsftpd-implicit", "sshd", "pyftpd")


def config(files: Files, **changes: Any) -> Any:
    settings = {"database": "sqlite:///unused.db", "timeout": 10, **files.settings, **changes}
    return ftpcoord.Config(**{name: value for name, value in settings.items() if value is not None})


@pytest.fixture
def server(file_server: Files) -> Iterator[FileServer]:
    with contextlib.closing(ftpcoord.open_server(config(file_server))) as connected:
        yield connected


@functools.lru_cache
def folder_of(url: str) -> str:
    return ftpcoord.Config(url=url, database="sqlite:///unused.db").target.path.rstrip("/")


def path_of(files: Files, name: str) -> str:
    return f"{folder_of(files.url)}/{name}"


def listed(server: FileServer, files: Files, folder: str = "") -> dict[str, Entry]:
    return {entry.name: entry for entry in server.list(path_of(files, folder).rstrip("/"))}


def fetched(server: FileServer, path: str, size: int) -> bytes:
    content = bytearray()
    fetch(server, path, size, content.extend)
    return bytes(content)


def names_for(files: Files) -> list[bytes]:
    # pyftpdlib lists names that are not UTF-8 with question marks, which no client can undo.
    # Pure-FTPd hides names with control characters, refuses backslashes, gives new names _ for a blank at an end.
    without = [b"tab\there", b"back\\slash", b" leading", b"trailing "] if files.name.startswith("pure-ftpd") else []
    return [name for name in ODD_NAMES if name not in without] + UNDECODABLE * (files.name != "pyftpd")


# ------------------------------------------------------------------------------------------- listing


def test_an_empty_folder_is_an_empty_list(file_server: Files, server: FileServer) -> None:
    assert server.list(path_of(file_server, "")) == []


def test_a_listing_tells_kinds_and_sizes(file_server: Files, server: FileServer) -> None:
    file_server.put("five.csv", b"12345")
    file_server.put("empty", b"")
    file_server.put("folder/inside", b"x")
    entries = listed(server, file_server)
    assert {(e.name, e.kind, e.size) for e in entries.values()} == {
        ("five.csv", "file", 5),
        ("empty", "file", 0),
        ("folder", "dir", 0),
    }
    assert [(e.name, e.size) for e in server.list(path_of(file_server, "folder"))] == [("inside", 1)]
    assert server.unread == []


def test_a_link_is_listed_as_a_link(file_server: Files, server: FileServer) -> None:
    if file_server.name == "pyftpd":
        pytest.skip("pyftpdlib shows what a link leads to")
    file_server.put("file", b"12345")
    (file_server.root / "link").symlink_to("file")
    assert listed(server, file_server)["link"].kind == "link"


def test_a_listing_tells_the_time_in_its_precision(file_server: Files, server: FileServer) -> None:
    times = {"old": OLD, "now": time.time(), "2001": 1_000_000_000.0}
    for name, when in times.items():
        file_server.put(name, b"x", when)
    for name, entry in listed(server, file_server).items():
        utc = datetime.datetime.fromtimestamp(times.pop(name), datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
        assert len(entry.mtime) >= 10 and utc.startswith(entry.mtime), name
    assert not times


def test_a_folder_that_is_not_there_is_gone(file_server: Files, server: FileServer) -> None:
    with pytest.raises(ftpcoord.FileGone):
        server.list(path_of(file_server, "nowhere"))
    assert server.alive()


def test_a_thousand_files_are_listed(file_server: Files, server: FileServer) -> None:
    for number in range(1000):
        file_server.put(f"{number:04}", b"")
    assert sorted(listed(server, file_server)) == [f"{number:04}" for number in range(1000)]


def test_paths_relative_to_the_login_folder_work(file_server: Files) -> None:
    home = ftpcoord.open_server(config(file_server))
    with contextlib.closing(home):
        name = f"ftpcoord-test-{os.getpid()}-{time.time_ns()}"
        try:
            home.mkdir(f"{name}/below")
        except ftpcoord.FileRefused:
            pytest.skip("the login folder cannot be written to")
        assert name in {entry.name for entry in home.list("")}
        assert [entry.name for entry in home.list(name)] == ["below"]
        home.rename(f"{name}/below", f"{name}/renamed")
        assert home.exists(f"{name}/renamed") and not home.exists(f"{name}/below")


# ------------------------------------------------------------------------------------------- names


def test_odd_names_are_listed_fetched_looked_at_renamed_and_deleted(file_server: Files, server: FileServer) -> None:
    names = names_for(file_server)
    for name in names:
        file_server.put(name, b"content of " + name)
    server.mkdir(path_of(file_server, "moved"))
    entries = listed(server, file_server)
    assert {ftpcoord.encode_name(name, "utf-8") for name in entries} == {*names, b"moved"}
    for raw in names:
        entry = entries[ftpcoord.decode_name(raw, "utf-8")]
        path, moved = path_of(file_server, entry.name), path_of(file_server, f"moved/{entry.name}")
        assert fetched(server, path, entry.size) == b"content of " + raw
        assert server.same(path, entry) is True
        server.rename(path, moved)
        assert os.path.exists(os.fsencode(file_server.root) + b"/moved/" + raw)
        assert server.exists(moved) and not server.exists(path)
        server.delete(moved)
    assert file_server.names() == ["moved"]
    assert os.listdir(file_server.root / "moved") == []


def test_folders_with_odd_names_are_made_and_listed(file_server: Files, server: FileServer) -> None:
    kind = file_server.name.partition("-")[0] if file_server.scheme != "sftp" else ""
    file_server.put("a b/x", b"not in the other")
    for name in ("-dash", " spaces ", "*", "a [b]", "ü"):
        if (kind, name) not in (("proftpd", "*"), ("pure", " spaces ")):  # these servers make no folder of that name
            server.mkdir(path_of(file_server, f"{name}/below"))
            assert [entry.name for entry in server.list(path_of(file_server, name))] == ["below"], name


def test_a_path_with_a_line_break_or_nul_is_refused_and_nothing_is_sent(file_server: Files, server: FileServer) -> None:
    file_server.put("b", b"stays")
    good = path_of(file_server, "b")
    calls: list[Callable[[str], object]] = [
        server.list,
        server.exists,
        server.delete,
        server.mkdir,
        lambda bad: fetch(server, bad, 1, bytes),
        lambda bad: server.rename(good, bad),
        lambda bad: server.rename(bad, path_of(file_server, "c")),
        lambda bad: server.same(bad, Entry("b", "file", 5, "")),
    ]
    for name in ("a\r\nDELE b", "a\nb", "a\0b"):
        for call in calls:
            with pytest.raises(ftpcoord.FileRefused):
                call(path_of(file_server, name))
        assert file_server.names() == ["b"] and server.alive(), name


# ------------------------------------------------------------------------------------------- fetching


def test_a_file_arrives_whole(file_server: Files, server: FileServer) -> None:
    for size in (0, 1, 32_767, 32_768, 32_769, 261_119, 261_120, 300_000, 10_000_000):
        content = os.urandom(size)
        file_server.put("file", content)
        assert fetched(server, path_of(file_server, "file"), size) == content, size
        assert server.alive()


def test_a_file_that_shrank_or_grew_since_the_listing_is_changed(file_server: Files, server: FileServer) -> None:
    file_server.put("next", b"fine")
    for size, difference in itertools.product((5, 40_000, 3_000_000), (-1, 1, -5, 100_000)):
        file_server.put("file", b"x" * (size + difference))
        received = bytearray()
        with pytest.raises(ftpcoord.FileChanged):
            fetch(server, path_of(file_server, "file"), size, received.extend)
        assert len(received) <= size
        assert fetched(server, path_of(file_server, "next"), 4) == b"fine"


def test_a_file_that_vanished_is_gone(file_server: Files, server: FileServer) -> None:
    with pytest.raises(ftpcoord.FileGone):
        fetch(server, path_of(file_server, "gone"), 5, bytes)
    with pytest.raises(ftpcoord.FileGone):
        server.delete(path_of(file_server, "gone"))
    with pytest.raises(ftpcoord.FileGone):
        server.rename(path_of(file_server, "gone"), path_of(file_server, "target"))
    assert server.alive()


def test_a_file_that_may_not_be_read_is_refused_not_gone(file_server: Files, server: FileServer) -> None:
    file_server.put("secret", b"12345").chmod(0)
    if file_server.server.ids is None or file_server.server.ids[0] == 0:
        pytest.skip("the server runs as a user who may read everything")
    with pytest.raises(ftpcoord.FileRefused):
        fetch(server, path_of(file_server, "secret"), 5, bytes)
    assert server.alive()


def test_many_files_arrive_and_each_problem_is_told_of_its_file_only(file_server: Files, server: FileServer) -> None:
    contents = {f"{number:03}": os.urandom(number * 7) for number in range(300)}
    received = {name: bytearray() for name in contents}
    for name, content in contents.items():
        if name != "100":
            file_server.put(name, content + b"more" * (name == "200"))
    jobs = [Job(path_of(file_server, name), len(content), received[name].extend) for name, content in contents.items()]
    ended = {job.path.rpartition("/")[2]: error for job, error in server.fetch_many(jobs)}
    assert sorted(ended) == sorted(contents)
    assert type(ended.pop("100")) is ftpcoord.FileGone
    assert type(ended.pop("200")) is ftpcoord.FileChanged
    assert set(ended.values()) == {None}
    assert all(received[name] == contents[name] for name in ended)
    assert server.exists(path_of(file_server, "000"))


def test_large_and_small_files_arrive_together(file_server: Files, server: FileServer) -> None:
    contents = {f"{number}": os.urandom(size) for number, size in enumerate([10, 5_000_000, 0, 70_000, 9_000_000, 3])}
    received = {name: bytearray() for name in contents}
    for name, content in contents.items():
        file_server.put(name, content)
    jobs = [Job(path_of(file_server, name), len(content), received[name].extend) for name, content in contents.items()]
    assert [error for _, error in server.fetch_many(jobs)] == [None] * len(jobs)
    assert received == contents


def test_what_write_raises_passes_through_and_the_next_call_is_in_step(file_server: Files, server: FileServer) -> None:
    file_server.put("file", os.urandom(2_000_000))

    def full(data: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fetch(server, path_of(file_server, "file"), 2_000_000, full)
    assert [entry.name for entry in server.list(path_of(file_server, ""))] == ["file"]


def test_leaving_a_loop_over_many_files_leaves_nothing_behind(file_server: Files, server: FileServer) -> None:
    for number in range(100):
        file_server.put(f"{number}", b"x" * 100)
    loop = server.fetch_many([Job(path_of(file_server, f"{number}"), 100, bytes) for number in range(100)])
    next(loop)
    loop.close()  # type: ignore[attr-defined]
    assert len(listed(server, file_server)) == 100


# ------------------------------------------------------------------------------------------- looking


def test_a_file_is_the_same_until_its_size_or_time_changes(file_server: Files, server: FileServer) -> None:
    path = path_of(file_server, "file")
    for when in (OLD, time.time() - 600):
        file_server.put("file", b"12345", when)
        seen = listed(server, file_server)["file"]
        assert [server.same(path, seen) for _ in range(3)] == [True] * 3  # by each way of looking
        file_server.put("file", b"123456", when)
        assert server.same(path, seen) is False
        file_server.put("file", b"54321", when + 200_000 if when == OLD else when - 7200)
        assert server.same(path, seen) is False
        os.unlink(file_server.root / "file")
        assert server.same(path, seen) is None
        (file_server.root / "file").mkdir()
        assert server.same(path, seen) is False
        (file_server.root / "file").rmdir()


def test_a_file_in_a_folder_that_is_gone_is_not_there(file_server: Files, server: FileServer) -> None:
    assert server.same(path_of(file_server, "no/file"), Entry("file", "file", 1, "")) is None
    assert not server.exists(path_of(file_server, "no/file"))


def test_files_and_folders_exist_and_others_do_not(file_server: Files, server: FileServer) -> None:
    file_server.put("folder/file", b"")
    assert [server.exists(path_of(file_server, name)) for name in ("folder", "folder/file", "fold", "folder/x")] == [
        True,
        True,
        False,
        False,
    ]


# ------------------------------------------------------------------------------------------- changing


def test_a_rename_never_replaces_a_file(file_server: Files, server: FileServer) -> None:
    file_server.put("a", b"content of a")
    file_server.put("b", b"content of b")
    with pytest.raises(ftpcoord.TargetExists):
        server.rename(path_of(file_server, "a"), path_of(file_server, "b"))
    assert (file_server.root / "a").read_bytes() == b"content of a"
    assert (file_server.root / "b").read_bytes() == b"content of b"
    with contextlib.closing(ftpcoord.open_server(config(file_server))) as fresh, pytest.raises(ftpcoord.TargetExists):
        fresh.rename(path_of(file_server, "a"), path_of(file_server, "b"))  # nothing learnt by other looks
    assert (file_server.root / "b").read_bytes() == b"content of b"


def test_a_rename_into_a_missing_folder_is_refused_and_the_file_stays(file_server: Files, server: FileServer) -> None:
    file_server.put("a", b"content")
    with pytest.raises(ftpcoord.FileRefused):
        server.rename(path_of(file_server, "a"), path_of(file_server, "no/a"))
    assert (file_server.root / "a").read_bytes() == b"content"


def test_folders_are_made_with_parents_and_existing_ones_are_fine(file_server: Files, server: FileServer) -> None:
    for _ in range(2):
        server.mkdir(path_of(file_server, "a/b/c"))
    assert (file_server.root / "a/b/c").is_dir()
    file_server.put("file", b"")
    with pytest.raises(ftpcoord.FileRefused):
        server.mkdir(path_of(file_server, "file/below"))


# ------------------------------------------------------------------------------------------- trouble


def test_a_wrong_password_is_refused_and_never_shown(file_server: Files) -> None:
    wrong = "not-the-pass-word"
    with pytest.raises(ftpcoord.LoginRefused) as caught:
        ftpcoord.open_server(config(file_server, key=None, password=wrong))
    assert wrong not in str(caught.value) and "127.0.0.1" in str(caught.value)


def test_a_server_that_is_not_there_is_down(file_server: Files) -> None:
    port = servers.free_port()
    url = re.sub(r":\d+/", f":{port}/", file_server.settings["url"])
    with pytest.raises(ftpcoord.ServerDown, match=str(port)) as caught:
        ftpcoord.open_server(config(file_server, url=url))
    assert not isinstance(caught.value, ftpcoord.LoginRefused)


def test_a_connection_that_the_server_dropped_is_dead_and_the_next_call_connects_again(file_server: Files) -> None:
    server = ftpcoord.open_server(config(file_server))
    file_server.put("a", b"x")
    file_server.server.restart()
    assert not server.alive()
    assert list(listed(server, file_server)) == ["a"] and server.alive()
    server.close()
    assert not server.alive()


@EACH_CLIENT
@pytest.mark.parametrize("blocked", ["fetch", "fetch_many", "list", "connect"])
def test_abort_from_another_thread_ends_a_blocked_call_within_a_second(file_server: Files, blocked: str) -> None:
    file_server.put("file", b"x" * 1000)
    server = ftpcoord.open_server(config(file_server))
    path = path_of(file_server, "file")
    calls: dict[str, Callable[[], object]] = {
        "fetch": lambda: fetch(server, path, 1000, bytes),
        "list": lambda: server.list(path_of(file_server, "")),
        "fetch_many": lambda: list(server.fetch_many([Job(path, 1000, bytes)] * 3)),
        "connect": server.connect,
    }
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(calls[blocked]())
        except Exception as error:
            outcome.append(error)

    file_server.server.freeze()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    begun = time.monotonic()
    server.abort()
    thread.join(5)
    assert time.monotonic() - begun < 1
    assert len(outcome) == 1 and isinstance(outcome[0], ftpcoord.ServerDown), outcome
    file_server.server.thaw()
    with pytest.raises(ftpcoord.ServerDown):
        server.list(path_of(file_server, ""))  # for good: it does not come back by itself


def test_a_handshake_that_takes_too_long_is_told_as_that_though_the_timer_is_late(
    sftp: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(threading.Timer):
        def __init__(self, interval: float, function: Callable[[], None]) -> None:
            super().__init__(interval + 0.5, function)

    monkeypatch.setattr(threading, "Timer", Late)
    sftp.server.freeze()
    with pytest.raises(ftpcoord.ServerDown, match="no answer within 1 s"):
        ftpcoord.open_server(config(sftp, timeout=1))


@EACH_CLIENT
def test_a_frozen_server_ends_each_call_by_the_timeout(file_server: Files) -> None:
    """All at once, each on its own connection."""
    file_server.put("file", b"x" * 1000)
    path = path_of(file_server, "file")
    calls: dict[str, Callable[[FileServer], object]] = {
        "connect": lambda _: ftpcoord.open_server(config(file_server, timeout=1)),
        "list": lambda server: server.list(path_of(file_server, "")),
        "fetch": lambda server: fetch(server, path, 1000, bytes),
        "fetch_many": lambda server: list(server.fetch_many([Job(path, 1000, bytes)])),
        "same": lambda server: server.same(path, Entry("file", "file", 1000, "")),
        "rename": lambda server: server.rename(path, path + "2"),
        "delete": lambda server: server.delete(path),
        "mkdir": lambda server: server.mkdir(path + "/x"),
        "alive": lambda server: server.alive(),
    }

    def end(call: str, server: FileServer) -> tuple[str, float]:
        begun = time.monotonic()
        try:
            said = f"gives {calls[call](server)}"
        except ftpcoord.ServerDown as exc:
            said = str(exc)
        return said, time.monotonic() - begun

    with contextlib.ExitStack() as stack:
        opened = [contextlib.closing(ftpcoord.open_server(config(file_server, timeout=1))) for _ in calls]
        connected = [stack.enter_context(each) for each in opened]
        file_server.server.freeze()
        with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
            ended = dict(zip(calls, pool.map(end, calls, connected)))
    for call, (said, took) in ended.items():
        assert said == "gives False" if call == "alive" else "no answer within 1 s" in said, (call, said)
        assert 0.5 < took < 3, (call, took)


# ------------------------------------------------------------------------------------------- TLS


@pytest.fixture(params=["vsftpd_explicit", "vsftpd_implicit"])
def tls_server(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_a_certificate_of_an_unknown_authority_is_refused(tls_server: servers.Vsftpd) -> None:
    settings = {**tls_server.settings(), "database": "sqlite:///unused.db"}
    other = str(Path(settings["ca_file"]).with_name("other-ca.pem"))
    for changes in ({"ca_file": other}, {"ca_file": None}):
        chosen = {name: value for name, value in {**settings, **changes}.items() if value}
        with pytest.raises(ftpcoord.ServerDown, match=r"not trusted.*ca_file"):
            ftpcoord.open_server(ftpcoord.Config(**chosen))
    chosen = {**settings, "ca_file": other, "tls_verify": False}
    ftpcoord.open_server(ftpcoord.Config(**chosen)).close()


def test_a_certificate_for_another_host_is_refused(tls_server: servers.Vsftpd) -> None:
    settings = {**tls_server.settings(), "database": "sqlite:///unused.db"}
    settings["url"] = settings["url"].replace("127.0.0.1", "127.0.0.2")
    with pytest.raises(ftpcoord.ServerDown):
        ftpcoord.open_server(ftpcoord.Config(**settings))


def test_a_server_without_tls_is_not_talked_to_in_the_clear(vsftpd_plain: servers.Vsftpd) -> None:
    settings = {**vsftpd_plain.settings(), "database": "sqlite:///unused.db", "timeout": 3}
    for scheme in ("ftpes://", "ftps://"):
        settings["url"] = settings["url"].replace("ftp://", scheme)
        with pytest.raises(ftpcoord.ServerDown):
            ftpcoord.open_server(ftpcoord.Config(**settings))
        settings["url"] = settings["url"].replace(scheme, "ftp://")


# ------------------------------------------------------------------------------------------- SSH


def fingerprint_in(text: str) -> str:
    found = re.search(r"SHA256:[A-Za-z0-9+/]{43}", text)
    assert found
    return found[0]


def test_an_unknown_host_key_is_refused_with_its_fingerprint_which_can_be_pinned(
    sshd: servers.Sshd, tmp_path: Path
) -> None:
    settings = {**sshd.settings(), "database": "sqlite:///unused.db"}
    settings["known_hosts"] = str(tmp_path / "known_hosts")
    for text in (None, "", "127.0.0.1 ssh-ed25519 AAAA\n"):
        if text is not None:
            (tmp_path / "known_hosts").write_text(text)
        with pytest.raises(ftpcoord.ServerDown, match="ssh-keyscan") as caught:
            ftpcoord.open_server(ftpcoord.Config(**settings))
    pin = fingerprint_in(str(caught.value))
    ftpcoord.open_server(ftpcoord.Config(**settings, host_key=pin)).close()
    with pytest.raises(ftpcoord.ServerDown, match="host_key"):
        ftpcoord.open_server(ftpcoord.Config(**settings, host_key="SHA256:" + "A" * 43))


def test_a_changed_host_key_is_refused_before_the_login(sshd: servers.Sshd, tmp_path: Path) -> None:
    settings = {**sshd.settings(), "database": "sqlite:///unused.db"}
    lines = sshd.known_hosts.read_text().splitlines()
    ed25519 = next(line.split() for line in lines if "ssh-ed25519" in line)
    changed = tmp_path / "known_hosts"
    changed.write_text(f"{ed25519[0]} {ed25519[1]} {ed25519[2][:-8]}AAAAAAA=\n")
    with pytest.raises(ftpcoord.ServerDown, match="NOT the one"):
        ftpcoord.open_server(ftpcoord.Config(**{**settings, "known_hosts": str(changed)}))
    changed.write_text(f"@revoked * {ed25519[1]} {ed25519[2]}\n{' '.join(ed25519[:3])}\n")
    with pytest.raises(ftpcoord.ServerDown, match="revoked"):
        ftpcoord.open_server(ftpcoord.Config(**{**settings, "known_hosts": str(changed)}))


@pytest.mark.parametrize("kind", ["ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256"])
def test_the_kind_of_host_key_that_known_hosts_has_is_asked_for(sshd: servers.Sshd, tmp_path: Path, kind: str) -> None:
    lines = [line for line in sshd.known_hosts.read_text().splitlines() if kind in line]
    if not lines:
        pytest.skip(f"the server has no {kind} key")
    (tmp_path / "known_hosts").write_text("\n".join(lines) + "\n")
    settings = {**sshd.settings(), "database": "sqlite:///unused.db", "known_hosts": str(tmp_path / "known_hosts")}
    ftpcoord.open_server(ftpcoord.Config(**settings)).close()


def test_a_key_that_cannot_be_used_is_a_clear_error(sshd: servers.Sshd, tmp_path: Path) -> None:
    settings = {**sshd.settings(), "database": "sqlite:///unused.db"}
    (tmp_path / "key").write_text("no key at all")
    for key in ("key", "missing"):
        with pytest.raises(ftpcoord.Error, match=f"key.*{key}"):
            ftpcoord.open_server(ftpcoord.Config(**{**settings, "key": str(tmp_path / key)}))


class FewHandles:
    """The answers of an SFTP server that has one file, and refuses to open more than `most` at once."""

    largest_read = 32_768

    def __init__(self, content: bytes, most: int) -> None:
        self.content, self.most, self.open, self.number = content, most, 0, 0
        self.answers: list[tuple[int, int, bytes]] = []

    def send(self, kind: int, body: bytes) -> int:
        self.number += 1
        if kind == 3 and self.open == self.most:
            self.answers.append((101, self.number, struct.pack(">II", 4, 0)))
        elif kind == 3:
            self.open += 1
            self.answers.append((102, self.number, struct.pack(">II", 4, self.number)))
        elif kind == 4:
            self.open -= 1
            self.answers.append((101, self.number, struct.pack(">II", 0, 0)))
        else:
            offset, length = struct.unpack(">QI", body[-12:])
            data = self.content[offset : offset + min(length, 100)]  # less than asked for, which is allowed
            self.answers.append(
                (103, self.number, struct.pack(">I", len(data)) + data)
                if data
                else (101, self.number, struct.pack(">II", 1, 0))
            )
        return self.number

    def receive(self) -> tuple[int, int, Any]:
        kind, number, body = self.answers.pop(random.Random(self.number).randrange(len(self.answers)))
        return kind, number, ftpcoord._Fields(memoryview(body))


@pytest.mark.parametrize("size", [0, 99, 100, 1000, 100_000])
def test_answers_in_any_order_short_ones_and_a_limit_of_open_files_do_no_harm(size: int) -> None:
    content = os.urandom(size)
    received = [bytearray() for _ in range(100)]
    pipeline = ftpcoord.SftpPipeline(FewHandles(content, most=3), "utf-8")  # type: ignore[arg-type]
    jobs = [Job(f"{number}", size, received[number].extend) for number in range(100)]
    ended = {job.path: error for job, error in pipeline.run(jobs)}
    assert ended == {f"{number}": None for number in range(100)}
    assert all(bytes(one) == content for one in received)


def test_a_handle_that_another_file_had_when_it_was_given_is_not_trusted_although_that_is_closed() -> None:
    """Their CLOSE may have hit the one that came later, and what it is a handle of now nobody knows."""

    class Late(FewHandles):
        """Tells of what it has opened when nothing else is left to tell."""

        def send(self, kind: int, body: bytes) -> int:
            super().send(kind, body)
            if kind == 3:
                self.answers[-1] = (102, self.number, struct.pack(">I", 4) + b"same")
            return self.number

        def receive(self) -> tuple[int, int, Any]:
            self.answers.sort(key=lambda answer: answer[0] == 102)
            kind, number, body = self.answers.pop(0)
            return kind, number, ftpcoord._Fields(memoryview(body))

    received = [bytearray(), bytearray()]
    jobs = [Job(f"{number}", 10, received[number].extend) for number in range(2)]
    habits, ended = ftpcoord.Habits(), []
    with pytest.raises(ftpcoord._Broken, match="the same handle"):
        for job, error in ftpcoord.SftpPipeline(Late(b"x" * 10, most=2), "utf-8", habits).run(jobs):  # type: ignore[arg-type]
            ended.append((job.path, error))
    assert ended == [("0", None)] and not received[1]
    again = ftpcoord.SftpPipeline(Late(b"x" * 10, most=1), "utf-8", habits).run(jobs)  # type: ignore[arg-type]
    assert [error for _, error in again] == [None, None]


class Replaced(FewHandles):
    """The same server, whose file is replaced while it is read: whoever asks for its version then hears of it."""

    largest_read = 261_120

    def __init__(self, content: bytes, seed: int) -> None:
        super().__init__(content, most=1)
        self.seed, self.reads = seed, 0

    def send(self, kind: int, body: bytes) -> int:
        self.reads += kind == 5
        if kind not in (7, 8):
            return super().send(kind, body)
        self.number += 1
        version = struct.pack(">IQIII", 0xD, len(self.content), stat.S_IFREG | 0o644, 0, 1 + (self.reads > 1))
        self.answers.append((105, self.number, version))
        return self.number

    def receive(self) -> tuple[int, int, Any]:
        kind, number, body = self.answers.pop(random.Random(self.number + self.seed).randrange(len(self.answers)))
        return kind, number, ftpcoord._Fields(memoryview(body))


@pytest.mark.parametrize("seed", range(0, 2000, 100))
def test_a_look_from_before_the_last_read_proves_nothing_whenever_it_is_answered(seed: int) -> None:
    session, received = Replaced(b"x" * 250, seed), bytearray()
    job = Job("a", 250, received.extend, ftpcoord.Entry("a", "file", 250, "1970-01-01T00:00:01"))
    ((_, error),) = ftpcoord.SftpPipeline(session, "utf-8").run([job])  # type: ignore[arg-type]
    assert isinstance(error, ftpcoord.FileChanged) and received == b"x" * 250


@pytest.mark.parametrize(
    ("says", "kind"),
    [
        ((105, 250, 1), ftpcoord.FileRefused),
        ((105, 250, 2), ftpcoord.FileChanged),
        ((105, 200, 1), ftpcoord.FileChanged),
        ((101, 2), ftpcoord.FileGone),
        ((101, 3), ftpcoord.FileChanged),
    ],
)
def test_of_a_file_that_is_shorter_than_listed_lstat_says_why(says: tuple[int, ...], kind: type[Exception]) -> None:
    class Shorter(FewHandles):
        def send(self, request: int, body: bytes) -> int:
            if request not in (7, 8):
                return super().send(request, body)
            self.number += 1
            told = struct.pack(">II", says[1], 0)
            if says[0] == 105:
                told = struct.pack(">IQIII", 0xD, says[1], stat.S_IFREG | 0o644, 0, says[2])
            self.answers.append((says[0], self.number, told))
            return self.number

    seen = ftpcoord.Entry("a", "file", 250, "1970-01-01T00:00:01")
    pipeline = ftpcoord.SftpPipeline(Shorter(b"x" * 200, most=1), "utf-8")  # type: ignore[arg-type]
    ((_, error),) = pipeline.run([Job("a", 250, bytearray().extend, seen)])
    assert type(error) is kind


def test_what_a_server_tells_no_kind_or_no_size_of_is_no_file() -> None:
    size, mode = struct.pack(">IQ", 1, 10), struct.pack(">II", 4, stat.S_IFREG | 0o644)
    assert ftpcoord._Fields(memoryview(size)).entry("x") is None
    assert ftpcoord._Fields(memoryview(mode)).entry("x") is None
    assert ftpcoord._Fields(memoryview(size)).entry("x", b"-rw-r--r-- 1 a") == ftpcoord.Entry("x", "file", 10, "")
    assert ftpcoord._Fields(memoryview(size)).entry("x", b"prw-r--r-- 1 a") == ftpcoord.Entry("x", "other", 0, "")
