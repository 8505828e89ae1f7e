"""What files are handed to: the file object of a Python handler, commands, and how a handler is found."""

from __future__ import annotations

import concurrent.futures
import errno
import io
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
from conftest import wait_for
from members import Crew, Member
from memory import config
from processes import MEMBER, environment

import ftpcoord
from ftpcoord import (
    Command,
    File,
    HandlerFailed,
    Lease,
    LeaseLost,
    LocalTrouble,
)

PYTHON = sys.executable


def a_local(folder: Path, content: bytes = b"", name: str = "a.csv", **more: Any) -> File:
    local = folder / name
    local.write_bytes(content)
    values = {"path": f"/in/{name}", "size": len(content), "mtime": 1.6, "attempt": 2, **more}
    return File(lease=Lease(7, time.monotonic() + 1e6, time.monotonic), local=local, **values)


def test_a_file_can_be_read_in_many_ways(tmp_path: Path) -> None:
    file = a_local(tmp_path, b'\xef\xbb\xbfid,name\r\n1,"a\r\nb"\r\n2,c\r\n')
    assert (file.name, file.path, file.size, file.mtime, file.attempt) == ("a.csv", "/in/a.csv", 27, 1.6, 2)
    assert list(file.csv()) == [{"id": "1", "name": "a\r\nb"}, {"id": "2", "name": "c"}]
    with file.open() as stream:
        assert stream.read() == file.read()
    assert file.text("utf-8-sig").startswith("id,name")
    assert a_local(tmp_path, b'{"a": [1]}').json() == {"a": [1]}
    assert list(a_local(tmp_path, b"a;b\n1;2\n").csv(delimiter=";")) == [{"a": "1", "b": "2"}]
    assert a_local(tmp_path, b"<a><b>x</b></a>").xml().findtext("b") == "x"
    assert file.lease.valid()


BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bb">]><a>&b;</a>'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-16-be"])
def test_an_xml_file_with_a_dtd_is_refused_in_every_encoding(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(HandlerFailed, match="DTD"):
        a_local(tmp_path, BOMB.encode(encoding)).xml()


def test_a_file_is_saved_under_a_free_name_and_the_same_file_once(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    first, other = a_local(tmp_path, b"one"), a_local(tmp_path, b"two", "b")
    assert first.save(folder) == folder / "a.csv"
    assert first.save(str(folder)) == folder / "a.csv"
    other.name = "a.csv"
    assert other.save(folder) == folder / "a.1.csv"
    assert sorted(os.listdir(folder)) == ["a.1.csv", "a.csv"]


def test_a_file_is_saved_once_into_the_working_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When its handler fails after that, it is saved again."""
    folder = tmp_path / "out"
    folder.mkdir()
    monkeypatch.chdir(folder)
    file = a_local(tmp_path, b"one")
    assert file.save(".") == file.save("") == Path("a.csv")
    assert os.listdir(folder) == ["a.csv"]


def test_what_cannot_be_compared_for_now_is_not_taken_for_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that has too many files open would deliver it twice."""
    folder, file, open_ = tmp_path / "out", a_local(tmp_path, b"one"), os.open
    folder.mkdir()
    file.save(folder)

    def opened(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if os.path.basename(path) == "a.csv" and os.path.dirname(path) == str(folder):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return open_(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(OSError, match="Too many open files"):
        file.save(folder)
    assert os.listdir(folder) == ["a.csv"]


def test_what_could_not_be_saved_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk would become fuller with each try."""
    folder = tmp_path / "out"
    folder.mkdir()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        a_local(tmp_path, b"one").save(folder)
    assert os.listdir(folder) == []


async def awaited(file: File) -> None:
    pytest.fail("nobody runs it")


def generated(file: File) -> Iterator[int]:
    yield 1


@pytest.mark.parametrize("handler", [awaited, generated, lambda file: map(print, file.csv())])
@pytest.mark.filterwarnings("ignore:coroutine")
def test_a_handler_that_gives_work_which_nobody_runs_has_failed(tmp_path: Path, handler: ftpcoord.Handler) -> None:
    """The file would be done, and nobody had looked at it."""
    with pytest.raises(HandlerFailed, match="nobody runs"):
        ftpcoord.call_handler(handler, a_local(tmp_path), True)


class Unbound:
    """As some frameworks' stand-ins for what belongs to a request."""

    def __getattribute__(self, name: str) -> object:
        raise RuntimeError(f"{name}: working outside of a request")


@pytest.mark.parametrize(
    "give",
    [lambda file: file.open(), lambda file: sqlite3.connect(":memory:").execute("SELECT 1"), lambda file: Unbound()],
)
def test_what_a_handler_gives_beside_that_means_nothing(tmp_path: Path, give: ftpcoord.Handler) -> None:
    """An open file and a database's cursor are iterators, too, of work that is done."""
    ftpcoord.call_handler(give, a_local(tmp_path), True)


def test_work_that_a_handler_has_given_to_a_pool_is_waited_for(tmp_path: Path) -> None:
    read: list[bytes] = []

    def slow(file: File) -> None:
        time.sleep(0.1)
        read.append(file.read())
        if len(read) == 2:
            raise ValueError("no good")

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ftpcoord.call_handler(lambda file: pool.submit(slow, file), a_local(tmp_path, b"x"), True)
        assert read == [b"x"]
        with pytest.raises(HandlerFailed, match="no good"):
            ftpcoord.call_handler(lambda file: pool.submit(slow, file), a_local(tmp_path, b"x"), True)


class Speechless(Exception):
    def __str__(self) -> str:
        raise SystemExit(0)


class Curt(ftpcoord.TryLater):
    def __init__(self) -> None:
        """Without its parent's."""

    def __str__(self) -> str:
        raise ValueError


def test_exceptions_that_tell_nothing_are_what_they_are(tmp_path: Path) -> None:
    def handler(file: File) -> None:
        raise raised

    for raised, meant in ((Speechless(), HandlerFailed), (Curt(), ftpcoord.TryLater)):
        with pytest.raises(meant, match=type(raised).__name__):
            ftpcoord.call_handler(handler, a_local(tmp_path), True)


@pytest.mark.parametrize("kept", [True, False])
def test_a_handler_that_says_not_now_is_quoted_only_with_error_output(tmp_path: Path, kept: bool) -> None:
    def later(file: File) -> None:
        raise ftpcoord.TryLater(5, "the account of Muster is locked") from ValueError("4111")

    with pytest.raises(ftpcoord.TryLater) as raised:
        ftpcoord.call_handler(later, a_local(tmp_path), kept)
    assert raised.value.seconds == 5 and str(raised.value)
    assert ("Muster" in str(raised.value)) == ("4111" in str(raised.value)) == kept


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize(("ends", "code"), [("sys.exit(3)", 3), ("sys.exit()", 0), ("return", 0), ("1 / 0", 1)])
def test_a_fork_that_comes_back_from_the_handler_ends_there(ends: str, code: int) -> None:
    """It would go on with the file, and with the connections, beside the process that it was forked from."""
    text = f"""
import os, sys, pathlib, time, ftpcoord
def handler(file):
    if os.fork() == 0:
        {ends}
    else:
        print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
file = ftpcoord.File("/in/a", 0, None, 1, ftpcoord.Lease(1, 1e9, time.monotonic), pathlib.Path("a"))
ftpcoord.call_handler(handler, file, True)
print("went on", flush=True)
"""
    done = subprocess.run([PYTHON, "-c", text], env=environment({}), capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.returncode) == (f"{code}\nwent on\n", 0), done


# -- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> File:
    return a_local(tmp_path, b"content")


def command(exec_: str, **more: Any) -> Command:
    return Command(config(exec=exec_, coordination_group="g", **more))


def script(folder: Path, text: str) -> str:
    """A command line that runs a Python script."""
    path = folder / "script.py"
    path.write_text(text)
    return f"{PYTHON} {path}"


def test_a_command_gets_its_names_by_environment_and_none_of_the_settings(
    tmp_path: Path, file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FTPCOORD_PASSWORD", "FTPCOORD_DATABASE", "FTPCOORD_EXEC", "NOTIFY_SOCKET"):
        monkeypatch.setenv(name, "Tr0ub4dor")
    monkeypatch.setenv("KEPT", "yes")
    out = tmp_path / "out"
    command(script(tmp_path, f"import os; open({str(out)!r}, 'w').write(repr(dict(os.environ)))")).run(file)
    environment = eval(out.read_text())
    assert {name: value for name, value in environment.items() if name.startswith("FTPCOORD_")} == {
        "FTPCOORD_FILE": str(file.local),
        "FTPCOORD_PATH": "/in/a.csv",
        "FTPCOORD_NAME": "a.csv",
        "FTPCOORD_SIZE": "7",
        "FTPCOORD_MTIME": "2",
        "FTPCOORD_ATTEMPT": "2",
        "FTPCOORD_TERM": "7",
        "FTPCOORD_GROUP": "g",
        "FTPCOORD_MEMBER": "a",
    }
    assert environment["KEPT"] == "yes"
    assert "Tr0ub4dor" not in out.read_text()


class Writes(io.StringIO):
    """Standard error that remembers what came in one write: between two of them another thread's may lie."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[str] = []

    def write(self, text: str) -> int:
        self.all.append(text)
        return super().write(text)


def test_what_a_command_says_shares_no_line_with_the_log(
    tmp_path: Path, file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = Writes()
    monkeypatch.setattr(sys, "stderr", writes)
    command(script(tmp_path, "print('one\\ntwo'); import sys; print('three', file=sys.stderr)")).run(file)
    wait_for(lambda: len(writes.getvalue().splitlines()) == 3, 10, "its words")
    assert all(text.endswith("\n") for text in writes.all if text), writes.all


def test_a_command_gets_no_time_where_the_listing_tells_none(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = f"import os; open({str(out)!r}, 'w').write('<' + os.environ['FTPCOORD_MTIME'] + '>')"
    command(script(tmp_path, code)).run(a_local(tmp_path, mtime=None))
    assert out.read_text() == "<>"


@pytest.mark.parametrize("name", ["a b.csv", "$(touch x)", "; true", "{path}", "-rf", "\udcff", "it's", '"', "*"])
def test_a_name_is_one_argument_whatever_it_holds(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    code = f"import sys; open({str(out)!r}, 'w').write(ascii(sys.argv[1:]))"
    command(script(tmp_path, code) + " '{name} x' {path} '{file}' {other}").run(a_local(tmp_path, name=name))
    assert eval(out.read_text()) == [f"{name} x", f"/in/{name}", str(tmp_path / name), "{other}"]


def test_a_command_has_nothing_on_its_standard_input(tmp_path: Path, file: File) -> None:
    (tmp_path / "typed").write_text("yes\n")
    before = os.dup(0)
    with open(tmp_path / "typed") as typed:
        os.dup2(typed.fileno(), 0)
    try:
        command(script(tmp_path, "import sys; sys.exit(len(sys.stdin.read()))")).run(file)
    finally:
        os.dup2(before, 0)
        os.close(before)


def test_a_failing_command_tells_its_code_and_its_last_words(tmp_path: Path, file: File) -> None:
    code = "import os, sys; os.write(2, b'x' * 10000 + b'\\nlast words \\xff\\n'); sys.exit(3)"
    with pytest.raises(HandlerFailed, match=r"exited with 3: x+\nlast words \ufffd$") as caught:
        command(script(tmp_path, code)).run(file)
    assert len(str(caught.value)) <= ftpcoord.STDERR_BYTES + 100
    with pytest.raises(HandlerFailed, match=r"exited with 3$"):
        command(script(tmp_path, code), error_output="no").run(file)


def test_a_command_ended_by_a_signal_tells_which(tmp_path: Path, file: File) -> None:
    with pytest.raises(HandlerFailed, match="ended by signal 15"):
        command(script(tmp_path, "import os; os.kill(os.getpid(), 15)")).run(file)


def test_a_command_that_is_not_there_is_this_hosts_trouble(tmp_path: Path, file: File) -> None:
    with pytest.raises(LocalTrouble, match="nowhere is not a command here"):
        command("nowhere {file}").run(file)
    (tmp_path / "odd").write_text("#!/nowhere\n")
    (tmp_path / "odd").chmod(0o755)
    try:
        command(str(tmp_path / "odd")).run(file)
    except (LocalTrouble, HandlerFailed):
        return
    pytest.fail("it cannot have succeeded")


@pytest.mark.skipif(os.name != "posix", reason="a script")
def test_commands_begin_where_the_program_was_started_wherever_a_handler_goes(
    tmp_path: Path, file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "import.sh").write_text("#!/bin/sh\npwd > said\n")
    (tmp_path / "import.sh").chmod(0o755)
    relative = command("./import.sh {file}")
    monkeypatch.chdir("/")
    relative.run(file)
    assert (tmp_path / "said").read_text() == f"{tmp_path}\n"
    (tmp_path / "import.sh").unlink()
    with pytest.raises(LocalTrouble, match=r"exec: \./import\.sh cannot be started .*No such file"):
        relative.run(file)


@pytest.mark.skipif(os.name != "posix", reason="a folder that is gone")
def test_commands_begin_also_when_that_folder_is_gone(
    tmp_path: Path, file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    absolute = command("/bin/sh -c true")
    gone.rmdir()
    absolute.run(file)
    monkeypatch.chdir("/")
    absolute.run(file)


def running(pid_file: Path) -> Optional[int]:
    """The process whose id the file holds, if it lives."""
    try:
        number = int(pid_file.read_text())
        os.kill(number, 0)
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError):
        return None
    return None if state == "Z" else number


def test_a_command_that_takes_longer_than_exec_timeout_is_ended_with_its_children(tmp_path: Path, file: File) -> None:
    pid = tmp_path / "pid"
    code = f"""
import subprocess
child = subprocess.Popen(["sleep", "60"])
open({str(pid)!r}, "w").write(str(child.pid))
child.wait()
"""
    started = time.monotonic()
    with pytest.raises(HandlerFailed, match=r"longer than exec_timeout, 0\.5 s"):
        command(script(tmp_path, code), exec_timeout=0.5).run(file)
    assert time.monotonic() - started < 0.5 + ftpcoord.KILL_AFTER
    wait_for(lambda: running(pid) is None, 5, "the child to end")


def test_a_command_whose_interpreter_is_not_there_is_this_hosts_trouble(tmp_path: Path, file: File) -> None:
    """As after an upgrade of Python: quarantine would take every file that comes."""
    path = tmp_path / "script"
    path.write_text("#!/no/such/python3.7\n")
    path.chmod(0o755)
    with pytest.raises(LocalTrouble, match="cannot be started"):
        command(f"{path} {{file}}", error_output="no").run(file)


@pytest.fixture
def stubborn(tmp_path: Path, file: File) -> Iterator[tuple[Command, list[Exception], Path]]:
    """A command that ignores SIGTERM, running in a thread."""
    pid = tmp_path / "pid"
    code = f"""
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open({str(pid) + ".new"!r}, "w").write(str(os.getpid()))
os.rename({str(pid) + ".new"!r}, {str(pid)!r})
time.sleep(60)
"""
    made = command(script(tmp_path, code))
    raised: list[Exception] = []

    def run() -> None:
        try:
            made.run(file)
        except Exception as exc:
            raised.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    wait_for(lambda: running(pid), 10, "the command to run")
    yield made, raised, pid
    number = running(pid)
    if number is not None:
        os.kill(number, signal.SIGKILL)
    thread.join(10)
    assert not thread.is_alive()


def test_a_cut_command_gets_sigterm_and_then_sigkill(stubborn: tuple[Command, list[Exception], Path]) -> None:
    made, raised, pid = stubborn
    made.cut(0.5)
    time.sleep(0.2)
    assert running(pid), "it ignores SIGTERM"
    wait_for(lambda: raised, 10, "the command to be killed")
    assert isinstance(raised[0], LeaseLost)
    assert running(pid) is None


def test_no_command_starts_after_the_cut(tmp_path: Path, file: File) -> None:
    made = command(script(tmp_path, f"open({str(tmp_path / 'out')!r}, 'w')"))
    made.cut(0.1)
    with pytest.raises(LeaseLost):
        made.run(file)
    assert not (tmp_path / "out").exists()


def test_a_handler_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_handlers.py").write_text("class A:\n    @staticmethod\n    def f(file): return 7\nx = 1\n")
    (tmp_path / "broken_handlers.py").write_text("1 / 0\n")
    (tmp_path / "a_script.py").write_text("import sys\nsys.exit(0)\n")  # else the service would seem to have ended well
    monkeypatch.syspath_prepend(str(tmp_path))
    handler: Any = ftpcoord.load_handler("my_handlers:A.f")
    assert handler(None) == 7
    for name, said in (
        ("my_handlers:g", "cannot be imported"),
        ("my_handlers:x", "is not a function"),
        ("no_such_module:f", "cannot be imported"),
        ("broken_handlers:f", "ZeroDivisionError"),
        ("a_script:f", "SystemExit"),
    ):
        with pytest.raises(ftpcoord.ConfigError, match=f"^handler: .*{said}"):
            ftpcoord.load_handler(name)


# -- what is imported -------------------------------------------------------------------------------------------------


PLANTED = "import pathlib\npathlib.Path('executed').touch()\n"
ORDERS = """
import html, ftpcoord
def take(file):
    assert isinstance(file, ftpcoord.File) and html.escape("<") == "&lt;"
    file.save("out")
"""


@pytest.mark.parametrize("arguments", [["run"], ["run", "--once"]])
def test_a_module_in_the_working_folder_never_stands_for_one_of_pythons(crew: Crew, arguments: list[str]) -> None:
    """Files are often uploaded there."""
    (crew.folder / "out").mkdir()
    (crew.folder / "orders.py").write_text(ORDERS)
    for name in ("html", "ctypes", "sqlite3", "xml", "importlib", "encodings", "queue", "pyftpdlib"):
        (crew.folder / f"{name}.py").write_text(PLANTED)
    crew.files.put("1.txt", b"x")
    crew.start("a", *arguments, exec=None, handler="orders:take").wait("file_done")
    assert (crew.folder / "out/1.txt").exists() and not (crew.folder / "executed").exists()


def test_a_handler_finds_the_names_of_the_module_as_a_scripts_main_has_them(crew: Crew) -> None:
    (crew.folder / "orders.py").write_text("""
import importlib.util, sys
import ftpcoord
from __main__ import TryLater
def take(file):
    assert TryLater is ftpcoord.TryLater and sys.modules["__main__"].__name__ == "__main__"
    assert sys.modules["__main__"].__file__ == ftpcoord.__file__ and importlib.util.find_spec("ftpcoord")
""")
    crew.files.put("1.txt", b"x")
    env = crew.environment(member_id="a", exec=None, handler="orders:take")
    crew.add(Member("a", MEMBER, env, crew.folder)).wait("file_done")


def test_a_script_at_the_top_does_not_look_for_modules_in_the_working_folder(tmp_path: Path) -> None:
    words = "import sys\ntry: exec(sys.stdin.read())\nexcept FileNotFoundError: print(sys.path[0])"
    command = [sys.executable, "-c", words, "/no-such-file.py"]
    done = subprocess.run(command, input=ftpcoord.ONCE_MORE, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "/\n", done.stderr


def test_a_handler_is_not_looked_for_where_files_are_delivered(crew: Crew) -> None:
    (crew.folder / "orders.py").write_text(ORDERS)
    for place in (".", "..", crew.folder):
        done = crew.run(exec=None, handler="orders:take", download_dir=place)
        assert done.returncode == 2 and "orders" in done.stderr, done.stderr


def test_files_are_not_delivered_to_where_python_looks_for_modules(crew: Crew) -> None:
    (crew.folder / "lib/in").mkdir(parents=True)
    (crew.folder / "link").symlink_to("lib")
    for place in ("lib", "link", "."):
        environment = {**crew.environment(exec=None, download_dir=place), "PYTHONPATH": str(crew.folder / "lib")}
        for command in ("run", "check"):
            done = crew.run(command, environment=environment)
            assert done.returncode == 2 and "download_dir: Python looks for modules" in done.stderr, done.stderr
    environment["FTPCOORD_DOWNLOAD_DIR"] = "lib/in"
    assert crew.run("check", environment=environment).returncode == 0
