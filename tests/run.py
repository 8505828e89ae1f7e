"""All checks, from nothing but Python 3.9.

    python3 tests/run.py [--require-all] [--quick] [--chaos MINUTES] [pytest arguments]

Makes a virtual environment in the checkout (.venv), installs the missing servers where it may (root on
Debian or Ubuntu), prints what is there, then runs ruff, mypy --strict and pytest.  Its last line is
pytest's summary.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Optional

sys.path.insert(0, str(Path(__file__).resolve().parent))
import setup_env

ROOT, TESTS = setup_env.ROOT, setup_env.ROOT / "tests"
NOTHING: Mapping[str, str] = {}
OLDEST_SUITES = [f"tests/test_{name}.py" for name in ("hostile_databases", "hostile_ssh", "dialects", "fileservers")]
OLDEST = "(hostile or postgresql or mysql or sshd) and (not wso2 or look)"  # as far as tables differ to a driver
CACHE = ROOT / ".pytest_cache"
OLDEST_CACHE = CACHE / "oldest"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--require-all", action="store_true", help="a missing server or tool is a failure")
    parser.add_argument("--quick", action="store_true", help="no ruff, no mypy, no tests marked slow")
    parser.add_argument("--chaos", type=float, metavar="MINUTES", help="then let tests/chaos.py break things so long")
    parser.add_argument("pytest", nargs="*", help="what pytest gets, options too")
    options, more = parser.parse_known_args(arguments)

    python = setup_env.ensure("test")
    if Path(sys.prefix).resolve() != setup_env.VENV.resolve():
        command = [str(python), __file__, *arguments]
        if os.name == "nt":
            return subprocess.call(command)
        sys.stdout.flush()
        os.execv(python, command)

    began = time.monotonic()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes would compile the same again
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(TESTS)])
    if options.require_all:
        os.environ["FTPCOORD_REQUIRE_ALL"] = "1"
    missing = print_table(setup_env.ensure_servers())
    results: dict[str, bool] = {}
    types: Optional[Beside] = None
    if missing and options.require_all:
        print(f"--require-all, but missing: {', '.join(missing)}")
        results["servers"] = False

    if not options.quick:
        checked = [name for name in ("ftpcoord.py", "tests") if (ROOT / name).exists()]
        results["ruff"] = run(["-m", "ruff", "check", *checked]) == 0
        results["ruff format"] = run(["-m", "ruff", "format", "--check", *checked]) == 0
        types = Beside(["-m", "mypy", "--strict", *checked])
        # Meanwhile the tests are compiled once, where each of pytest's processes would do it.
        warm = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", *in_order(options, more, arguments)]
        subprocess.call([sys.executable, *warm], cwd=ROOT, stdout=subprocess.DEVNULL)

    chosen = in_order(options, more, arguments)
    summary: list[str] = []
    oldest: Optional[Beside] = None
    if not options.quick and not chosen:
        # Beside the others, which wait for timers now and then, with the oldest drivers that are allowed: what talks
        # to databases and to SFTP servers.
        drivers = {"PYTHONPATH": os.pathsep.join([str(setup_env.ensure_oldest()), os.environ["PYTHONPATH"]])}
        again = [*pytest(2), "-o", f"cache_dir={OLDEST_CACHE}", "-k", OLDEST, *OLDEST_SUITES]
        oldest = Beside(again, drivers)
    # Most tests wait for timers, so more processes than cores; a file's tests share their process's servers.
    results["pytest"] = run([*pytest(5), *(["-m", "not slow"] if options.quick else []), *chosen], summary) == 0
    if types is not None:
        results["mypy"] = types.ended() == 0
    said: list[str] = []
    if oldest is not None:
        results["oldest drivers"] = oldest.ended(said) == 0
    if not results["pytest"] and may_run_again(summary):
        # Real processes with seconds to keep, on cores that other tests keep busy: what failed gets one more try with
        # the machine to itself. It is said, and a second failure counts.
        print(f"\nwhat failed is run again, alone: {summary[-1]}")
        alone: list[str] = []
        results["pytest, again and alone"] = run(["-m", "pytest", "-n", "0", "--last-failed"], alone) == 0
        results["pytest"] = results["pytest, again and alone"]
        summary[-1] += f"; again and alone: {alone[-1] if alone else 'nothing'}"
    if oldest is not None and not results["oldest drivers"] and may_run_again(said, OLDEST_CACHE):
        print(f"\nwhat failed with the oldest drivers is run again, alone: {said[-1]}")
        again = [*pytest(0), "-o", f"cache_dir={OLDEST_CACHE}", "--last-failed", *OLDEST_SUITES]
        results["oldest drivers"] = run(again, env=drivers) == 0
    if options.chaos is not None:
        if (TESTS / "chaos.py").exists():
            code = "import sys, chaos; sys.exit(chaos.main(float(sys.argv[1])))"
            results["chaos"] = run(["-c", code, str(options.chaos)]) == 0
        else:
            print("there is no tests/chaos.py")
            results["chaos"] = False

    print()
    print(
        ", ".join(f"{name} {'ok' if good else 'FAILED'}" for name, good in results.items()),
        f"after {time.monotonic() - began:.0f} s with Python {sys.version.split()[0]}",
    )
    print("pytest:", summary[-1] if summary else "no summary")
    return 0 if all(results.values()) else 1


def pytest(processes: int) -> list[str]:
    return [
        "-m",
        "pytest",
        "-n",
        str(processes),
        "--dist",
        "loadfile",
        "--no-loadscope-reorder",  # conftest.py has the order
        f"--color={'yes' if sys.stdout.isatty() else 'no'}",
    ]


def may_run_again(summary: Sequence[str], cache: Path = CACHE) -> bool:
    """Whether a few tests failed, none of which judges a history: a violation once seen is one."""
    failed = re.match(r"(\d+) failed", summary[-1]) if summary else None
    names = cache / "v" / "cache" / "lastfailed"
    if not failed or int(failed[1]) > 8 or " error" in summary[-1] or not names.exists():
        return False
    return not re.search(r"test_(chaos|simulation|sabotage|fuzz|interleavings|election)", names.read_text("utf-8"))


def in_order(options: argparse.Namespace, more: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Pytest's arguments as they were given: argparse has parted options and names ("-k", "word")."""
    wanted = [*options.pytest, *more]
    found = []
    for argument in arguments:
        if argument in wanted:
            wanted.remove(argument)
            found.append(argument)
    return found


class Beside:
    """Python with these arguments in the checkout, behind all other work; what it says is shown at its end."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] = NOTHING) -> None:
        self.said = tempfile.TemporaryFile()  # noqa: SIM115
        self.line = f"\n$ {' '.join(f'{k}={v}' for k, v in env.items())} python {' '.join(command)}"
        print(f"{self.line} &", flush=True)
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=self.said,
            stderr=subprocess.STDOUT,
            preexec_fn=(lambda: os.nice(5)) if hasattr(os, "nice") else None,
        )

    def ended(self, summary: Optional[list[str]] = None) -> int:
        """Its exit code; waits for it."""
        code = self.process.wait()
        print(self.line, flush=True)
        self.said.seek(0)
        show(self.said, summary)
        return code


def show(said: IO[bytes], summary: Optional[list[str]]) -> None:
    """What a process says; `summary` gets pytest's summary line."""
    for line in said:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
        text = re.sub(r"\x1b\[[0-9;]*m", "", line.decode("utf-8", "replace")).strip(" =\r\n")
        if summary is not None and re.match(r"(\d+ \w+, )*(\d+ \w+|no tests ran) in [\d.]+s", text):
            summary[:] = [text]


def run(command: Sequence[str], summary: Optional[list[str]] = None, env: Mapping[str, str] = NOTHING) -> int:
    """Run Python with these arguments in the checkout; `summary` gets pytest's summary line."""
    print(f"\n$ {' '.join(f'{k}={v}' for k, v in env.items())} python {' '.join(command)}", flush=True)
    if summary is None:
        return subprocess.call([sys.executable, *command], cwd=ROOT, env={**os.environ, **env})
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    show(process.stdout, summary)
    return process.wait()


def print_table(problems: dict[str, str]) -> list[str]:
    """Show which servers and tools are there; returns the names of those that are not."""
    import servers

    missing = []
    print(f"{'Python':12} {sys.version.split()[0]}")
    for name in servers.NAMES:
        reason = servers.available(name)
        if reason:
            missing.append(name)
        print(f"{name:12} {'MISSING: ' + problems.get(name, reason) if reason else servers.version(name)}")
    for tool in ("ruff", "mypy", "pytest", "hypothesis"):
        said = (
            subprocess.run(
                [sys.executable, "-c", f"import importlib.metadata as m; print(m.version('{tool}'))"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            .stdout.decode()
            .strip()
        )
        if not said:
            missing.append(tool)
        print(f"{tool:12} {said or 'MISSING'}", flush=True)
    return missing


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
