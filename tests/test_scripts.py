"""Python handlers: module:function on the command line, Listener and Coordinator in scripts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from conftest import Database, new_database, new_folder, wait_for
from members import PATIENCE, Crew, Member
from processes import MEMBER, MODULE

import ftpcoord


@pytest.fixture
def crew(postgres: servers.Postgres, pyftpd: servers.Pyftpd, tmp_path: Path) -> Iterator[Crew]:
    with new_database("postgresql", postgres) as database, new_folder("pyftpd", pyftpd) as files:
        with Crew(tmp_path, database, files) as crew:
            yield crew


HANDLER = """\
import json, os, time
def handle(file):
    with open({record!r}, "a") as record:
        record.write(json.dumps([file.name, file.attempt, file.size, file.lease.term, file.text()]) + "\\n")
    until = time.time() + 60
    while os.path.exists({hold!r}) and time.time() < until:
        time.sleep(0.01)
    if file.name.startswith("bad"):
        raise ValueError("this file is no good")
    if file.name.startswith("later"):
        import ftpcoord
        assert ftpcoord.__file__ == {module!r} and type(file) is ftpcoord.File
        raise ftpcoord.TryLater
"""


@pytest.fixture
def handled(crew: Crew) -> Path:
    """handlers:handle of the working folder is the handler; gives the file where it records."""
    record = crew.folder / "handled"
    record.touch()
    source = HANDLER.format(record=str(record), hold=str(crew.folder / "hold"), module=str(MODULE))
    (crew.folder / "handlers.py").write_text(source)
    crew.settings.update(exec=None, handler="handlers:handle")
    return record


def noted(record: Path) -> list[list[object]]:
    return [json.loads(line) for line in record.read_text().splitlines()]


def test_a_python_handler_of_the_command_line_gets_each_file(crew: Crew, handled: Path) -> None:
    crew.files.put("1.txt", b"content")
    crew.files.put("bad.txt", b"x")
    member = crew.start("a", after="delete", max_attempts=2)
    quarantined = member.wait("file_quarantined")
    assert quarantined.fields["error"] == "ValueError: this file is no good"
    wait_for(lambda: crew.files.names() == ["bad.txt"], PATIENCE)
    assert sorted(noted(handled)) == [
        ["1.txt", 1, 7, 1, "content"],
        ["bad.txt", 1, 1, 1, "x"],
        ["bad.txt", 2, 1, 1, "x"],
    ]
    assert member.stop() == 0


def test_what_a_handler_of_a_script_run_as_a_service_imports_is_the_program_itself(crew: Crew, handled: Path) -> None:
    crew.files.put("later.txt", b"x")
    member = crew.add(Member("a", MEMBER, crew.environment(member_id="a"), crew.folder))
    assert "the handler said: not now" in member.wait("not_now").fields["error"]


def test_a_python_handler_that_outlives_drain_timeout_keeps_the_lease_from_being_released(
    crew: Crew, handled: Path
) -> None:
    """The process exits with 1; the next one comes when the lease is stale, and is told of the second attempt."""
    crew.hold()
    crew.files.put("1.txt", b"x")
    first = crew.start("a", drain_timeout=0.5)
    wait_for(lambda: noted(handled), PATIENCE)
    second = crew.start("b")
    second.wait("standby")
    stopped = time.time()
    assert first.stop() == 1
    ended = time.time()
    crew.let_go()
    assert not first.events("released")
    elected = second.wait("elected", crew.liveness + PATIENCE)
    assert elected.fields["reason"] != "released" and elected.at > stopped + crew.liveness / 2
    assert elected.at > ended - 1
    wait_for(lambda: crew.states() == {"1.txt": "done"}, PATIENCE)
    assert [(note[1], note[3]) for note in noted(handled)] == [(1, 1), (2, 2)]


def test_a_script_routes_files_by_pattern_and_reads_them(crew: Crew) -> None:
    """Listener with @on_file; a file that no pattern matches is left untouched."""
    contents = {
        "o.csv": "\ufeffid,name\n1,Zoë\n".encode(),
        "o.json": b'{"id": 2}',
        "o.xml": b"<order><id>3</id></order>",
        "o.txt": "grün".encode(),
        "evil.xml": b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>',
        "o.dat": b"nobody's",
    }
    for name, content in contents.items():
        crew.files.put(name, content)
    (crew.folder / "saved").mkdir()
    (crew.folder / "saved" / "o.txt").write_text("there before")
    member = crew.script(
        """
import json
listener = ftpcoord.Listener(**settings)
def note(*words):
    with open("noted", "a") as out:
        out.write(json.dumps(words) + "\\n")
@listener.on_file("*.csv")
def table(file): note(file.name, list(file.csv()))
@listener.on_file("*.json")
def tree(file): note(file.name, file.json()["id"])
@listener.on_file("*.xml")
def element(file): note(file.name, file.xml().findtext("id"))
@listener.on_file("*.txt")
def text(file):
    with file.open() as stream: assert stream.read() == file.read()
    note(file.name, file.text(), file.save("saved").name, file.size, file.attempt, file.lease.valid(), file.mtime > 0)
@listener.on_file("o.[ct]*")
def never(file): note(file.name, "the first match counts")
sys.exit(listener.run())
""",
        after="delete",
        max_attempts=1,
    )
    wait_for(lambda: crew.states().get("evil.xml") == "quarantined", PATIENCE)
    assert any("DTD" in row["error"] for row in crew.ledger())
    wait_for(lambda: crew.files.names() == ["evil.xml", "o.dat"], PATIENCE)
    found = {words[0]: words[1:] for words in noted(crew.folder / "noted")}
    assert found == {
        "o.csv": [[{"id": "1", "name": "Zoë"}]],
        "o.json": [2],
        "o.xml": ["3"],
        "o.txt": ["grün", "o.1.txt", 5, 1, True, True],
    }
    assert {path.name: path.read_text() for path in (crew.folder / "saved").iterdir()} == {
        "o.txt": "there before",
        "o.1.txt": "grün",
    }
    assert set(crew.states()) == {"evil.xml"}, "an unmatched file is not even claimed"
    assert member.stop() == 0
    assert crew.status()["active"] is None


def test_a_script_may_start_and_stop_a_listener_by_itself(crew: Crew) -> None:
    crew.files.put("1.txt", b"x")
    member = crew.script("""
import threading
done = threading.Event()
listener = ftpcoord.Listener(**settings)
@listener.on_file()
def handle(file):
    done.set()
listener.start()
assert done.wait(30)
listener.stop()
assert listener.join(30)
print("ended well")
""")
    assert member.process.wait(PATIENCE) == 0, member.said()
    assert member.out.read_text() == "ended well\n"
    assert crew.states() == {"1.txt": "done"} and crew.status()["active"] is None


def coordinator(tmp_path: Path) -> ftpcoord.Coordinator:
    return ftpcoord.Coordinator(
        database=f"sqlite:///{tmp_path / 'c.db'}", coordination_group="g", member_id="a", liveness_check_interval=300
    )


def test_a_listener_and_a_coordinator_start_once(tmp_path: Path) -> None:
    """Started again they would work with one lease twice, or, after their end, do nothing and say so with exit 0."""
    listener = ftpcoord.Listener(
        url="ftp://me@127.0.0.1:1/", database=f"sqlite:///{tmp_path / 'l.db'}", download_dir=str(tmp_path)
    )
    listener.start()
    with pytest.raises(ftpcoord.Error, match="started before"):
        listener.start(once=True)
    assert listener.polling()
    listener.stop()
    assert listener.join(PATIENCE)
    with pytest.raises(ftpcoord.Error, match="started before"):
        listener.run(once=True)
    with coordinator(tmp_path) as member:
        assert next(member.leases()).valid()
        with pytest.raises(ftpcoord.Error, match="started before"):
            member.start()
    with pytest.raises(ftpcoord.Error, match="started before"), member:
        pass


def test_a_run_that_ends_by_itself_leaves_its_settings_to_the_next(tmp_path: Path) -> None:
    config = ftpcoord.Config(
        url="ftp://me@127.0.0.1:1/",
        database=f"sqlite:///{tmp_path / 'l.db'}",
        download_dir=str(tmp_path),
        min_age=900,
    )
    listener = ftpcoord.Listener(config)
    listener.start(once=True)
    listener.stop()
    assert listener.join(PATIENCE)
    assert (config.settle, config.min_age) == (5, 900)


def test_a_stop_before_the_start_or_from_the_work_itself_waits_for_nobody(tmp_path: Path) -> None:
    began = time.monotonic()
    coordinator(tmp_path).stop()
    with coordinator(tmp_path) as member:
        for lease in member.leases():
            assert lease.valid()
            member.stop()
            assert not lease.valid()
    assert time.monotonic() - began < PATIENCE


def test_work_that_ends_before_its_lease_gives_it_up_and_the_next_one_is_new(tmp_path: Path) -> None:
    """The same lease again would let work begin twice under one term."""
    with coordinator(tmp_path) as member:
        terms = []
        for lease in member.leases():
            assert lease.valid()
            terms.append(lease.term)
            if len(terms) == 3:
                break
    assert terms == [1, 2, 3]


def test_a_handler_that_would_not_be_registered_is_an_error(tmp_path: Path) -> None:
    listener = ftpcoord.Listener(url="ftp://me@h/", database=f"sqlite:///{tmp_path / 'c.db'}", download_dir="x")
    with pytest.raises(ftpcoord.ConfigError, match=r"on_file\(\)"):

        @listener.on_file  # type: ignore[arg-type]
        def handle(file: ftpcoord.File) -> None:
            """Its brackets were forgotten."""

    with pytest.raises(ftpcoord.ConfigError, match=r"on_file\(\)"):
        listener.on_file(["*.csv", "*.txt"])  # type: ignore[arg-type]


def test_a_handler_that_configures_logging_does_not_silence_the_program(crew: Crew) -> None:
    """Python's dictConfig() disables each logger that it does not name, unless told otherwise."""
    (crew.folder / "own.py").write_text(
        "import logging.config\nlogging.config.dictConfig({'version': 1})\n"
        "def handle(file):\n    logging.config.dictConfig({'version': 1, 'root': {'level': 'ERROR'}})\n"
    )
    crew.files.put("1.txt", b"x")
    done = crew.run("run", "--once", exec=None, handler="own:handle")
    assert done.returncode == 0
    assert [event for event in ("elected", "file_done", "released") if f" {event} " not in done.stdout] == []


@pytest.mark.parametrize(
    "habit",
    [
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
        """
def reap():
    while True:
        try:
            os.wait()
        except ChildProcessError:
            pass
threading.Thread(target=reap, daemon=True).start()""",
    ],
    ids=["ignores", "reaps"],
)
def test_a_script_that_loses_exit_codes_takes_no_command_for_successful(crew: Crew, habit: str) -> None:
    crew.files.put("1.txt", b"x")
    member = crew.script(f"""
import os, signal, threading
{habit}
listener = ftpcoord.Listener(exec="sh -c 'sleep 0.3; exit 1'", exec_timeout=30, after="delete", **settings)
sys.exit(listener.run(once=True))
""")
    assert member.process.wait(PATIENCE) == 1
    assert crew.files.names() == ["1.txt"] and crew.states() == {"1.txt": "failed"}


NO_FOLDER = "import tempfile\ntempfile._candidate_tempdir_list = lambda: ['/nowhere']\n"


def test_a_host_without_a_temporary_folder_is_said_counts_for_no_file_and_disturbs_no_delivery(crew: Crew) -> None:
    """A read-only root, or a full disk at the start."""
    crew.files.put("1.txt", b"x")
    run = "listener = ftpcoord.Listener({}, **settings)\nsys.exit(listener.run(once=True))\n"
    member = crew.script(NO_FOLDER + run.format("exec='true {file}'"), "a", log_level="info")
    assert member.process.wait(PATIENCE) == 1
    (row,) = crew.ledger()
    assert (row["state"], row["failures"]) == ("failed", 0) and "No usable temporary directory" in row["error"]
    check = """import os
os.environ.update({f"FTPCOORD_{name.upper()}": value for name, value in settings.items()}, FTPCOORD_EXEC="true {file}")
sys.exit(ftpcoord.main(["check"]))
"""
    done = crew.script(NO_FOLDER + check)
    assert done.process.wait(PATIENCE) == 2 and "TMPDIR: No usable temporary directory" in done.err.read_text()
    into = crew.folder / "into"
    into.mkdir()
    member = crew.script(NO_FOLDER + run.format(f"download_dir={str(into)!r}"), "b")
    assert member.process.wait(PATIENCE) == 0, member.said()
    assert [path.name for path in into.iterdir()] == ["1.txt"]


def test_a_coordinator_needs_no_ledger(postgresql: Database) -> None:
    for table in ("token_holder", "health_check"):
        postgresql.execute(ftpcoord.ddl(False)[table])
    with ftpcoord.Coordinator(database=postgresql.url, coordination_group="g", ledger="off") as member:
        assert next(member.leases()).valid()


def test_a_coordinator_in_a_script_gets_a_lease_after_every_loss(crew: Crew) -> None:
    code = """
import signal, threading, time
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
with ftpcoord.Coordinator(**settings) as member:
    threading.Thread(target=lambda: (stop.wait(), member.stop()), daemon=True).start()
    for lease in member.leases():
        print("got", lease.term, flush=True)
        while lease.valid() and not stop.is_set():
            time.sleep(0.02)
        print("end", lease.term, flush=True)
"""
    only = dict.fromkeys(crew.files.settings)
    first = crew.script(code, "a", **only)
    wait_for(lambda: first.out.read_text() == "got 1\n", PATIENCE)
    second = crew.script(code, "b", **only)
    wait_for(lambda: [row["member_id"] for row in crew.status()["members"]] == ["a", "b"], PATIENCE)
    assert first.stop() == 0
    wait_for(lambda: second.out.read_text() == "got 2\n", PATIENCE)
    # Losing it to somebody else, then having it again.
    crew.database.execute("UPDATE token_holder SET task_id = 'thief', term = 3")
    wait_for(lambda: second.out.read_text() == "got 2\nend 2\n", PATIENCE)
    wait_for(lambda: second.out.read_text() == "got 2\nend 2\ngot 4\n", crew.liveness + PATIENCE)
    assert second.stop() == 0
    assert first.out.read_text() == "got 1\nend 1\n"
    assert crew.status()["active"] is None
