#!/usr/bin/env python3
"""See ftpcoord at work: python3 tests/demo.py (20 seconds; prepares what it needs, stays on this machine).

Starts an FTP server in front of a temporary folder, and three members as processes of their own that share an
SQLite file. Feeds files, kills the active member with SIGKILL, stops the next one with SIGTERM, shows what
happens, and compares it with what is promised. Exit 0: all held; 1: one was broken, or the demo did not work.
"""

from __future__ import annotations

import argparse
import dataclasses
import ftplib
import hashlib
import importlib
import importlib.util
import io
import itertools
import logging
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, NoReturn, Optional

from processes import MEMBER, Process, environment

NAMES = ["a", "b", "c"]
HEARTBEAT, LIVENESS, POLLING, SETTLE = 0.4, 4.0, 0.5, 0.5  # seconds: settings of the members
WORKERS = 4  # files that a member has in work at once
ROUND_TRIP = 0.5  # seconds that "a round trip" may take where ten processes share a small machine
SENDER, PASSWORD = "sender", "demo"  # the FTP user that uploads; everyone's password
COLOURS = {
    "ACTIVE": "1;32",
    "SIGKILL": "1;31",
    "SIGTERM": "1;33",
    "note": "1;33",
    "again": "36",
    "upload": "34",
    "ok": "32",
    "BROKEN": "1;31",
}
UNEXPECTED = {"lost", "file_failed", "file_quarantined", "server_down", "database_down", "duplicate_member"}

INTRODUCTION = f"""\
Three copies of one program, the members a, b and c, watch one FTP folder. Only one of them, the active one,
may take files from it: else a file would be handled several times. The others stand by, and one of them takes
over when the active one dies or is stopped. They agree through a database that they share (here: SQLite), and
each change of the active member has a number, the term.
Everyone gives a sign of life every {HEARTBEAT} s; who is silent for {LIVENESS:.0f} s is taken for dead.

seconds"""

# What a member runs for each file. It notes its begin and its end in a record that all members share, each by
# one write() in append mode, so that lines of several processes never mix.
COMMAND = """\
import hashlib, os, sys, time
def note(what, digest):
    words = [what, *(os.environ["FTPCOORD_" + n] for n in ("NAME", "MEMBER", "TERM", "ATTEMPT")), digest]
    record = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
    os.write(record, " ".join([*words, repr(time.monotonic()) + "\\n"]).encode())
    os.close(record)
note("begin", "-")
time.sleep(0.15)                                                  # the work
with open(os.environ["FTPCOORD_FILE"], "rb") as file:
    note("end", hashlib.sha256(file.read()).hexdigest())
"""


class Trouble(Exception):
    """The demo cannot go on."""


@dataclasses.dataclass
class Run:
    """One execution of the command. Times are time.monotonic(), which all processes share."""

    name: str
    member: str
    term: int
    attempt: int
    begun: float
    ended: Optional[float] = None
    digest: str = ""


def listed(runs: list[Run]) -> str:
    return ", ".join(sorted(run.name for run in runs))


@dataclasses.dataclass
class Reign:
    member: str
    term: int
    since: float


class Server:
    """pyftpdlib in a thread of this process. Each member logs in as a user of its own, to be told apart."""

    def __init__(self, folder: Path) -> None:
        logging.getLogger("pyftpdlib").addHandler(logging.NullHandler())
        logging.getLogger("pyftpdlib").propagate = False
        authorizer = importlib.import_module("pyftpdlib.authorizers").DummyAuthorizer()
        for user in [*NAMES, SENDER]:
            authorizer.add_user(user, PASSWORD, str(folder), perm="elradfmwMT")
        self.connections: list[Any] = []  # every one, logged in or not
        self.logins: list[str] = []  # the user of each, in their order
        handler = type(
            "Handler",
            (importlib.import_module("pyftpdlib.handlers").FTPHandler,),
            {
                "authorizer": authorizer,
                "on_connect": lambda session: self.connections.append(session),
                "on_login": lambda _session, user: self.logins.append(user),
            },
        )
        self.ftpd = importlib.import_module("pyftpdlib.servers").FTPServer(("127.0.0.1", 0), handler)
        self.port: int = self.ftpd.address[1]
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        while not self.closing.is_set():
            self.ftpd.serve_forever(timeout=0.1, blocking=False, handle_exit=False)
        self.ftpd.close_all()


class Demo:
    def __init__(self, folder: Path, colour: bool) -> None:
        self.folder, self.colour, self.zero = folder, colour, time.monotonic()
        self.inbox, self.record = folder / "ftp" / "inbox", folder / "record"
        self.inbox.mkdir(parents=True)
        (folder / "tmp").mkdir()
        (folder / "command.py").write_text(COMMAND)
        self.record.touch()
        self.read_up_to = 0  # in the record
        self.server = Server(folder / "ftp")
        self.members: dict[str, Process] = {}
        self.leaving: set[str] = set()  # members whose end is part of the play
        self.roles: dict[str, list[str]] = {name: [] for name in NAMES}
        self.standing_by: set[str] = set()
        self.reigns: list[Reign] = []
        self.runs: list[Run] = []
        self.fed: dict[str, str] = {}  # name of each file uploaded: its SHA-256
        self.whole: dict[str, float] = {}  # name of a slow upload: when it was complete
        self.told, self.told_at, self.told_again = 0, 0.0, 0
        self.killed, self.killed_at = Reign("", 0, 0.0), 0.0
        self.takeovers: list[tuple[str, float, float]] = []  # text, seconds, seconds allowed

    # --------------------------------------------------------------------------------- what is seen

    def paint(self, word: str, width: int) -> str:
        text = word.ljust(width)
        return f"\x1b[{COLOURS[word]}m{text}\x1b[0m" if self.colour and word in COLOURS else text

    def say(self, what: str, text: str) -> None:
        print(f"{time.monotonic() - self.zero:7.1f}  {self.paint(what, 9)}{text}", flush=True)

    def look(self) -> None:
        """Take in what the members logged, and what their commands noted, since the last look."""
        for member, process in self.members.items():
            for line in process.news():
                event = line.split()[2]
                if event == "elected":
                    term = int(line.split(" term=")[1].split()[0])
                    self.reigns.append(Reign(member, term, time.monotonic()))
                    self.standing_by.discard(member)
                    self.roles[member].append(f"active (term {term})")
                    self.say("ACTIVE", f"{member} is the active member now, term {term}")
                elif event == "standby":
                    self.standing_by.add(member)
                elif event in UNEXPECTED:
                    self.say("note", f"{member} logs: {line}")
        with open(self.record, "rb") as file:
            file.seek(self.read_up_to)
            for raw in itertools.takewhile(lambda raw: raw.endswith(b"\n"), file):
                self.read_up_to += len(raw)
                what, name, member, won, attempt, digest, noted = raw.decode().split()
                if what == "begin":
                    self.runs.append(Run(name, member, int(won), int(attempt), float(noted)))
                else:
                    run = next(
                        run
                        for run in self.runs
                        if not run.ended and (run.name, run.term, run.attempt) == (name, int(won), int(attempt))
                    )
                    run.ended, run.digest = float(noted), digest
        if time.monotonic() - self.told_at >= 1:
            self.tell()

    def tell(self) -> None:
        done = len({run.name for run in self.runs if run.ended})
        again = [run for run in self.runs if run.attempt > 1]
        if len(again) > self.told_again and all(run.ended for run in again):
            self.told_again = len(again)
            self.say("again", f"{listed(again)}: in work at the kill, so run anew, as attempt 2")
        if done > self.told:
            self.told, self.told_at = done, time.monotonic()
            each = ", ".join(f"{name} {self.handled(name)}" for name in NAMES)
            self.say("handled", f"{done} of the {len(self.fed)} files fed so far: {each}")

    def handled(self, member: str) -> int:
        return sum(run.member == member and run.ended is not None for run in self.runs)

    def in_work(self) -> list[Run]:
        """What the active member works on."""
        return [run for run in self.runs if not run.ended and run.term == self.reigns[-1].term]

    def busy(self, handled: int) -> bool:
        """The active member has handled so many files, and several commands run, and will for some time."""
        since = [run.begun for run in self.in_work()]
        enough = self.handled(self.reigns[-1].member) >= handled and len(since) > 1
        return enough and min(since) > time.monotonic() - 0.1

    def wait(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Until the condition holds. Trouble after so many seconds, or if a member ends that should not."""
        end = time.monotonic() + seconds
        self.look()
        while not condition():
            for name, member in self.members.items():
                if name not in self.leaving and not member.running():
                    raise Trouble(f"member {name} ended by itself, exit code {member.process.returncode}")
            if time.monotonic() > end:
                raise Trouble(f"waited {seconds:.0f} s in vain for {what}")
            time.sleep(0.02)
            self.look()

    # --------------------------------------------------------------------------------- what is done

    def start(self, name: str) -> None:
        command = [sys.executable, "-I", "-S", str(self.folder / "command.py"), str(self.record)]
        settings = {
            "url": f"ftp://{name}@127.0.0.1:{self.server.port}/inbox",
            "password": PASSWORD,
            "database": f"sqlite:///{self.folder / 'coordination.db'}",
            "coordination_group": "demo",
            "member_id": name,
            "heartbeat_frequency": HEARTBEAT,
            "liveness_check_interval": LIVENESS,
            "polling_interval": POLLING,
            "settle": SETTLE,
            "workers": WORKERS,
            "exec": " ".join(map(shlex.quote, command)),
            "after": "move:done",
        }
        environ = environment(settings, TMPDIR=self.folder / "tmp")
        self.members[name] = Process(name, [*MEMBER, "run"], environ, self.folder)
        self.leaving.discard(name)
        self.roles[name].append("standby")

    def signal(self, name: str, number: signal.Signals) -> float:
        self.leaving.add(name)
        self.members[name].send(number)
        return time.monotonic()

    def expect_end(self, name: str) -> None:
        member = self.members[name]
        self.wait(lambda: not member.running(), 10, f"{name} to stop")
        if member.process.returncode:
            raise Trouble(f"member {name} was stopped; its exit code is {member.process.returncode}, not 0")

    def connect(self) -> ftplib.FTP:
        ftp = ftplib.FTP()
        ftp.connect("127.0.0.1", self.server.port, timeout=10)
        ftp.login(SENDER, PASSWORD)
        ftp.cwd("inbox")
        ftp.voidcmd("TYPE I")
        return ftp

    def content(self, name: str) -> bytes:
        content = random.Random(name).randbytes(20_000)
        self.fed[name] = hashlib.sha256(content).hexdigest()
        return content

    def feed(self, count: int) -> None:
        first = sum(name.startswith("file") for name in self.fed) + 1
        with self.connect() as ftp:
            for name in (f"file-{number:03}" for number in range(first, first + count)):
                ftp.storbinary("STOR " + name, io.BytesIO(self.content(name)))
        self.say("upload", f"{count} files, file-{first:03} to {name}")

    def feed_slowly(self, name: str, seconds: int) -> None:
        content = self.content(name)
        size = len(content) // seconds // 10

        def upload() -> None:
            try:
                with self.connect() as ftp, ftp.transfercmd("STOR " + name) as data:
                    for start in range(0, len(content), size):
                        data.sendall(content[start : start + size])
                        self.whole[name] = time.monotonic()
                        time.sleep(0.1)
                self.say("upload", f"{name} is whole now")
            except (OSError, EOFError, ftplib.Error) as error:  # also when the demo is interrupted
                self.say("upload", f"{name} cut off: {error!r}")

        threading.Thread(target=upload, daemon=True).start()
        self.say("upload", f"{name} begins, in pieces over {seconds} s: to be left alone until it is whole")

    def succession(self, old: Reign, after: str, since: Callable[[], float], bound: float, word: str) -> None:
        """Wait for the next active member, and note how long it took."""
        self.wait(lambda: self.reigns[-1] is not old, 3 * LIVENESS, f"a successor of {old.member}")
        new = self.reigns[-1]
        took = new.since - since()
        self.say("", f"{new.member} took over {took:.2f} s after {after} (promised: {word})")
        text = f"{new.member} took over from {old.member} {took:.2f} s after {after} (promised: {word})"
        self.takeovers.append((text, took, bound))

    def play(self) -> None:
        for name in NAMES:
            self.start(name)
        self.say("start", "members a, b and c: three processes with the same settings")
        self.wait(lambda: self.reigns, 20, "a first active member")
        self.wait(lambda: len(self.standing_by) == 2, 10, "two members standing by")
        self.say("standby", " and ".join(sorted(self.standing_by)) + " watch the database, and wait")
        self.feed(40)
        self.feed_slowly("slow-1", 3)

        self.wait(lambda: self.busy(15), 20, "files in work")
        first = self.killed = self.reigns[-1]
        self.killed_at = self.signal(first.member, signal.SIGKILL)  # no good-bye, as if the power had gone
        self.members[first.member].process.wait()
        self.look()
        self.say("SIGKILL", f"{first.member}, while it works on {listed(self.in_work())}")
        self.roles[first.member].append("killed")
        self.tell()
        each = ", ".join(f"{name} {self.server.logins.count(name)}" for name in NAMES)
        self.say("", f"connections to the FTP server so far: {each}")
        self.feed(25)
        self.succession(first, "the SIGKILL", lambda: self.killed_at, LIVENESS, f"at most {LIVENESS:.1f} s")

        self.standing_by.clear()
        self.start(first.member)
        self.wait(lambda: first.member in self.standing_by, 10, f"{first.member} standing by")
        self.say("restart", f"{first.member} is back: it finds {self.reigns[-1].member} active, and stands by")
        self.feed(35)
        self.wait(lambda: self.busy(35), 20, "files in work")
        second = self.reigns[-1]
        stopped_at = self.signal(second.member, signal.SIGTERM)  # as systemd and Kubernetes stop a process
        self.say("SIGTERM", f"{second.member}: it ends its work on {listed(self.in_work())}, then hands over")
        self.roles[second.member].append("stopped")
        self.succession(
            second,
            "the end of its last command",
            lambda: max([stopped_at, *(run.ended for run in self.runs if run.ended and run.term == second.term)]),
            HEARTBEAT + ROUND_TRIP,
            f"{HEARTBEAT} s and a round trip",
        )
        self.expect_end(second.member)

        self.feed_slowly("slow-2", 2)
        self.feed(18)
        late = time.monotonic() + 25  # then go on: the verdict tells what is missing
        self.wait(lambda: self.folders() == ([], sorted(self.fed)) or time.monotonic() > late, 30, "the rest")
        self.tell()
        last = self.reigns[-1].member
        for name in sorted(NAMES, key=lambda name: name == last):  # the active one last: no more elections
            if name not in self.leaving:
                self.signal(name, signal.SIGTERM)
                self.expect_end(name)
        self.say("end", "all members are stopped")

    def folders(self) -> tuple[list[str], list[str]]:
        """Names of the files in the inbox, and in its folder `done`."""
        done = self.inbox / "done"
        return (
            sorted(path.name for path in self.inbox.iterdir() if path != done),
            sorted(path.name for path in done.iterdir()) if done.is_dir() else [],
        )

    def close(self) -> None:
        for member in self.members.values():
            member.end()
        self.server.closing.set()
        self.server.thread.join(5)

    # --------------------------------------------------------------------------------- what was promised

    def verdict(self) -> bool:
        """Print the summary, and each promise with what came of it. True if all held."""
        roles = {name: ", ".join(self.roles[name]) for name in NAMES}
        width = max(map(len, roles.values()))
        print(f"\nmember  {'roles':<{width}}  files handled  again  FTP connections")
        for name in NAMES:
            again = sum(run.member == name and run.attempt > 1 for run in self.runs)
            logins = self.server.logins.count(name)
            print(f"{name:<8}{roles[name]:<{width}}{self.handled(name):>15}{again:>7}{logins:>17}")
        print()
        terms = ", ".join(f"{reign.term} {reign.member}" for reign in self.reigns)
        promises = [
            self.once(),
            ("all arrived whole (SHA-256), and lie in the folder done", self.not_whole()),
            (
                f"half-written files were left alone: {', '.join(self.whole)}",
                [
                    f"{run.name}: begun before its upload had ended"
                    for run in self.runs
                    if run.begun < self.whole.get(run.name, 0)
                ],
            ),
            (f"one active member at a time (terms: {terms}), no work overlaps", self.overlaps()),
            ("only the active member connected to the FTP server, no standby did", self.intruders()),
            *((text, [f"more than {bound:.1f} s"] * (took > bound)) for text, took, bound in self.takeovers),
        ]
        for text, faults in promises:
            print(self.paint("BROKEN" if faults else "ok", 8) + text)
            print("".join(f"        - {fault}\n" for fault in faults[:10]), end="")
        good = not any(faults for _, faults in promises)
        print("\nEvery promise held." if good else "\nA PROMISE WAS BROKEN: see the lines marked BROKEN.")
        return good

    def once(self) -> tuple[str, list[str]]:
        """Each file has one run, as attempt 1; what was in work at the kill has another one, as attempt 2."""
        faults = [f"{run.name}: never uploaded" for run in self.runs if run.name not in self.fed]
        repeated = ended = 0
        for name in self.fed:
            runs = [run for run in self.runs if run.name == name]
            cut = [
                run
                for run in runs[:-1]
                if run.term == self.killed.term and (run.ended or self.killed_at) > self.killed_at - 1
            ]
            anew = bool(runs) and runs[-1].attempt > 1 and runs[-1].term == self.killed.term + 1
            repeated += anew
            ended += any(run.ended for run in cut)
            if not runs or not runs[-1].ended:
                faults.append(f"{name}: not handled to its end")
            elif anew != (runs[-1].attempt > 1) or len(runs[:-1]) > anew or cut != runs[:-1]:
                faults.append(
                    f"{name}: handled by "
                    + ", ".join(f"{run.member} (term {run.term}, attempt {run.attempt})" for run in runs)
                )
        if repeated > WORKERS:
            faults.append(f"{repeated} files again, but only {WORKERS} can have been in work at the kill")
        text = f"each of the {len(self.fed)} files was handled exactly once"
        if repeated:
            text += f",\n        but {repeated} that were in work at the SIGKILL again, told so by attempt 2"
        if ended:
            text += f"\n        ({ended} of these had just ended: the member died before it could note that)"
        return text, faults

    def not_whole(self) -> list[str]:
        inbox, done = self.folders()
        return (
            [
                f"{run.name}: handled with other content than uploaded"
                for run in self.runs
                if run.ended and run.digest != self.fed.get(run.name)
            ]
            + [f"{name}: still in the inbox" for name in inbox]
            + [f"{name}: not in done" for name in self.fed if name not in done]
            + [f"{name}: in done, but never uploaded" for name in done if name not in self.fed]
        )

    def overlaps(self) -> list[str]:
        owners = {reign.term: reign.member for reign in self.reigns}
        faults = ["two members won the same term"] * (len(owners) != len(self.reigns))
        ends = {run.term: 0.0 for run in self.runs}
        for run in self.runs:
            ends[run.term] = max(ends[run.term], run.ended or run.begun)
        for run in self.runs:
            if owners.get(run.term) != run.member:
                faults.append(f"{run.name}: {run.member} worked in term {run.term}, which it never won")
            if any(term < run.term and run.begun < end for term, end in ends.items()):
                faults.append(f"{run.name}: {run.member} began it while its predecessor still worked")
        return faults

    def intruders(self) -> list[str]:
        """Who logged in, in this order, has to be who was active, in this order."""
        users = [user for user, _ in itertools.groupby(user for user in self.server.logins if user != SENDER)]
        reigns = iter([reign.member for reign in self.reigns])  # each `in` goes on behind the last find
        faults = [] if all(user in reigns for user in users) else [f"logins in the order {', '.join(users)}"]
        nameless = len(self.server.connections) - len(self.server.logins)
        few = WORKERS + 1  # the kill may come between connection and login
        return faults + [f"{nameless} connections without a login"] * (nameless > few)


def interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    argparse.ArgumentParser(description=(__doc__ or "").split("(")[0], epilog="No options.").parse_args()
    if sys.version_info < (3, 9) or os.name != "posix":
        print("demo: needs Python 3.9 or newer, and a system with SIGKILL and SIGTERM", file=sys.stderr)
        return 1
    if importlib.util.find_spec("pyftpdlib") is None:
        from setup_env import ensure

        try:
            python = ensure("demo")
        except (RuntimeError, OSError, subprocess.SubprocessError, KeyboardInterrupt) as error:
            print(f"demo: no set-up: {error!r}", file=sys.stderr)
            return 1
        if os.path.samefile(python.parent.parent, sys.prefix):
            print(f"demo: no pyftpdlib in {sys.prefix}; remove that folder and try again", file=sys.stderr)
            return 1
        os.execv(python, [str(python), *sys.argv])
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    folder = Path(tempfile.mkdtemp(prefix="ftpcoord-demo-"))
    demo = None
    try:
        demo = Demo(folder, colour)
        print(INTRODUCTION)
        demo.play()
        return 0 if demo.verdict() else 1
    except (KeyboardInterrupt, BrokenPipeError):
        print("\ndemo: interrupted", file=sys.stderr)
        return 130
    except (Trouble, OSError, EOFError, ftplib.Error) as trouble:
        print(f"\ndemo: {str(trouble) or repr(trouble)}", file=sys.stderr)
        if demo:
            demo.close()  # after it their logs are complete
        for name, member in demo.members.items() if demo else ():
            print(f"last log lines of {name}:", *member.said().splitlines()[-15:], sep="\n  ", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must leave nothing behind
        if demo:
            demo.close()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
