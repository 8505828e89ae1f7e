"""ftpcoord as it really runs: a process with its settings in the environment, its log followed in a file, signals.

Standard library alone: the demo needs this on a bare machine.  FTPCOORD_MODULE names another ftpcoord.py to be run.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MODULE = Path(os.environ.get("FTPCOORD_MODULE") or Path(__file__).resolve().parent.parent / "ftpcoord.py")
MEMBER = [sys.executable, str(MODULE), "--config", "env"]

# A service with the code that was compiled once, where the script itself would be compiled at each start.
COMPILED = """
import sys
if sys.path[0] == "": sys.path[0] = sys.argv[1].rpartition("/")[0]
import importlib.util
spec = importlib.util.spec_from_file_location("ftpcoord", sys.argv.pop(1))
module = sys.modules["ftpcoord"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.program()
"""


def compiled(module: Path = MODULE) -> list[str]:
    """The command up to its arguments."""
    return [sys.executable, "-c", COMPILED, str(module)]


def environment(settings: Mapping[str, Any], **more: object) -> dict[str, str]:
    """Ours without what it says to ftpcoord, then FTPCOORD_* of these settings (None: not set), then the rest."""
    found = {key: value for key, value in os.environ.items() if not key.startswith("FTPCOORD_")}
    found["PYTHONPATH"] = str(MODULE.parent)
    found.update({f"FTPCOORD_{key.upper()}": str(value) for key, value in settings.items() if value is not None})
    found.update({key: str(value) for key, value in more.items()})
    return found


class Event(NamedTuple):
    """One line of a log."""

    at: float  # epoch seconds
    level: str
    name: str
    fields: dict[str, str]


@functools.lru_cache(maxsize=20_000)
def parse(line: str) -> Event:
    """A line of the log in its text form: `time level event key=value ...`."""
    moment, level, name, rest = (line + " ").split(" ", 3)
    at = datetime.datetime.strptime(moment, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=datetime.timezone.utc)
    fields = {}
    for key, value in re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S*)', rest):
        fields[key] = str(json.loads(value)) if value.startswith('"') else value
    return Event(at.timestamp(), level, name, fields)


class Process:
    """A process whose standard output and error go to files in its working folder."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        self.name = name
        number = len(list(folder.glob("*.out")))
        self.out, self.err = folder / f"{number}-{name}.out", folder / f"{number}-{name}.err"
        self._lines: list[str] = []
        self._read = self._told = 0  # bytes, and lines
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = subprocess.Popen(
                command,
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,  # Ctrl-C is for us, who end it
            )
        self.pid = self.process.pid

    def __repr__(self) -> str:
        return f"<{self.name} {self.pid}>"

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def lines(self) -> list[str]:
        """The whole lines of its log so far."""
        with open(self.out, "rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        self._lines += whole.decode(errors="replace").splitlines()
        return list(self._lines)

    def news(self) -> list[str]:
        """Those since the last call."""
        known, self._told = self._told, len(self.lines())
        return self._lines[known:]

    def said(self) -> str:
        """The end of all its output, for messages."""
        return self.out.read_text(errors="replace")[-3000:] + self.err.read_text(errors="replace")[-2000:]

    def running(self) -> bool:
        return self.process.poll() is None

    def send(self, number: int) -> float:
        """Sends a signal to this process alone; the moment before, in whole milliseconds as in the log."""
        moment = int(time.time() * 1000) / 1000
        self.process.send_signal(number)
        return moment

    def kill(self) -> float:
        """SIGKILL; the moment before."""
        moment = self.send(signal.SIGKILL)
        self.process.wait()
        return moment

    def stop(self, timeout: float = 30, number: int = signal.SIGTERM) -> int:
        """SIGTERM, and its exit code."""
        self.send(number)
        return self.process.wait(timeout)

    def end(self) -> None:
        """It is gone, whatever it did."""
        self.process.kill()
        self.process.wait()
