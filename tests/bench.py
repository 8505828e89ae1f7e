"""The benchmark: ftpcoord beside what people use today, on the same servers and files.

    python3 tests/bench.py [--quick] [--only NAME]... [--install]

ftpcoord runs as users run it: `python ftpcoord.py run --once`, a process for each run, elected through
PostgreSQL, with the ledger on, every commit durable (fsync), files landing atomically and fsynced in
`download_dir`. The others (lftp, rclone, curl, OpenSSH's sftp, those that are found here) only copy.
Contenders take turns in changing order; the figures are medians, and ratios within one run.

Without --only and --quick all parts but `takeover` run, about half an hour. Results go to
tests/bench/results.json (parts that did not run keep their last result) and pictures are drawn from it:
comparison.svg, takeover.svg, growth.svg. --quick is a smoke run with small files; it writes nothing there
unless --json names a file. --install lets apt-get install lftp, rclone and curl.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
import re
import select
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Union
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parent))
import setup_env

ROOT = setup_env.ROOT
FOLDER = ROOT / "tests" / "bench"
PRODUCT = ROOT / "ftpcoord.py"
TOOLS = ("lftp", "rclone", "curl", "sftp")
KIB, MIB = 1 << 10, 1 << 20
Result = dict[str, Any]


# ----------------------------------------------------------------------------- running one process


class Sample(NamedTuple):
    """One run of one process: seconds by the wall, seconds of CPU, peak resident bytes."""

    seconds: float
    cpu: float
    peak: int


def run(command: Sequence[str], env: Mapping[str, str], log: Path, limit: float = 600) -> Sample:
    """Run a process to its end. RuntimeError with its last words if it fails or takes longer than `limit` s."""
    with open(log, "wb") as out:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=dict(env))
        watchdog = threading.Timer(limit, process.kill)
        watchdog.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        watchdog.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        words = log.read_text("utf-8", "replace").strip()[-600:]
        raise RuntimeError(f"{command[0]} ended with {process.returncode} after {seconds:.1f} s: {words}")
    return Sample(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * KIB)


def memory(pid: int) -> tuple[int, int]:
    """Resident and proportional (shared pages divided among their users) bytes of a process."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = dict(re.findall(r"^(Rss|Pss): +(\d+) kB", text, re.MULTILINE))
    return int(found["Rss"]) * KIB, int(found["Pss"]) * KIB


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]


def say(text: str = "") -> None:
    print(text, flush=True)


# ----------------------------------------------------------------------------- a slow network


class SlowNetwork:
    """An address at which this host reaches itself over a round trip of `round_trip` seconds.

    Packets to it go through a TUN device, whose other end swaps source and destination (the checksums stay
    right) and hands them back half a round trip later. So handshakes and acknowledgements are as late as the
    data, and every port and protocol is covered. Needs root and /dev/net/tun; nothing leaves the host.
    """

    NEAR, FAR = "10.77.0.1", "10.77.0.2"  # servers listen on NEAR, clients connect to FAR
    MTU = 65_520

    def __init__(self, round_trip: float) -> None:
        self.round_trip = round_trip
        self._process: Optional[subprocess.Popen[bytes]] = None

    @staticmethod
    def unavailable() -> Optional[str]:
        """Why there is none, or None."""
        if not setup_env.IS_ROOT or not os.access("/dev/net/tun", os.W_OK):
            return "needs root and /dev/net/tun"
        return None if shutil.which("ip") else "needs the command ip"

    def __enter__(self) -> SlowNetwork:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--slow-network", str(self.round_trip / 2)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError("the slow network could not be set up")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)

    @classmethod
    def serve(cls, delay: float) -> None:
        """The device's other end, in a process of its own, until stdin ends."""
        import fcntl

        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        tunsetiff, iff_tun_no_pi = 0x400454CA, 0x1001
        answer = fcntl.ioctl(device, tunsetiff, struct.pack("16sH22x", b"", iff_tun_no_pi))
        name = answer[:16].rstrip(b"\0").decode()
        subprocess.run(["ip", "address", "add", f"{cls.NEAR}/30", "dev", name], check=True)
        subprocess.run(
            ["ip", "link", "set", name, "mtu", str(cls.MTU), "txqueuelen", "20000", "up"], check=True
        )
        print("ready", flush=True)
        waiting: deque[tuple[float, bytes]] = deque()
        while True:
            wait = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
            readable = select.select([device, sys.stdin], [], [], wait)[0]
            if sys.stdin in readable:
                return  # whoever wanted this has gone
            due = time.monotonic() + delay
            with contextlib.suppress(BlockingIOError):
                for _ in range(64 if readable else 0):
                    packet = os.read(device, 1 << 17)
                    if packet[0] >> 4 == 4:  # IPv4: bytes 12 to 15 are the source, 16 to 19 the destination
                        waiting.append((due, packet[:12] + packet[16:20] + packet[12:16] + packet[20:]))
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                with contextlib.suppress(OSError):
                    os.write(device, waiting.popleft()[1])


# ----------------------------------------------------------------------------- who is compared


class Site(NamedTuple):
    """A folder on a file server, as a client is told it."""

    server: Any  # servers.Server
    host: str
    folder: str  # absolute on the server; the login folder is its parent

    @property
    def scheme(self) -> str:
        return str(self.server.scheme)

    @property
    def near(self) -> bool:
        """On loopback, for which the server's certificate was made."""
        return self.host == self.server.host

    def known_hosts(self) -> str:
        """A known_hosts file that names the host under which the server is reached."""
        path = Path(self.server.dir, f"known_hosts-{self.host}")
        if not path.exists():
            path.write_text(self.server.known_hosts.read_text().replace(f"[{self.server.host}]", f"[{self.host}]"))
        return str(path)


class Contender:
    """A client that copies all files of a site into a folder. `connections` at once, 0: what it does anyway."""

    name = ""

    def __init__(self, connections: int = 0, label: str = "", **options: Any) -> None:
        self.connections, self.options = connections, options
        self.label = label or (f"{self.name} ({connections})" if connections else self.name)

    def ready(self, site: Site) -> None:
        """Before the clock starts."""

    def command(self, site: Site, target: Path, names: Sequence[str]) -> list[str]:
        raise NotImplementedError

    def env(self, site: Site, target: Path) -> dict[str, str]:
        return {**os.environ, "HOME": str(target.parent), "RCLONE_CONFIG": "/dev/null", "LC_ALL": "C"}

    def check(self, log: str) -> None:
        """RuntimeError if the log shows that the run was not what it should be."""


class Ftpcoord(Contender):
    name = "ftpcoord"

    def __init__(self, database: Any, connections: int = 0, label: str = "", **settings: Any) -> None:
        super().__init__(connections, label, **settings)
        self.database = database

    def ready(self, site: Site) -> None:
        import servers

        with contextlib.closing(servers.pg_login(self.database.port)) as connection:
            connection.autocommit = True
            connection.cursor().execute("TRUNCATE token_holder, health_check, file_ledger")

    def command(self, site: Site, target: Path, names: Sequence[str]) -> list[str]:
        return [sys.executable, str(PRODUCT), "--config", "env", "run", "--once"]

    def env(self, site: Site, target: Path) -> dict[str, str]:
        settings: dict[str, Any] = {
            **site.server.settings(site.folder), "database": self.database.url, "download_dir": target, "settle": 0,
            "coordination_group": "bench", "member_id": "bench",
        }
        settings["url"] = f"{site.scheme}://{site.server.user}@{site.host}:{site.server.port}{quote(site.folder)}"
        if site.scheme == "sftp":
            settings["known_hosts"] = site.known_hosts()
        elif not site.near:
            settings["tls_verify"] = "no"
        if self.connections:
            settings["workers"] = self.connections
        return product_env({**settings, **self.options})


def product_env(settings: Mapping[str, Any]) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("FTPCOORD_")}
    env.update({f"FTPCOORD_{name.upper()}": str(value) for name, value in settings.items()})
    return env


class Lftp(Contender):
    name = "lftp"

    def command(self, site: Site, target: Path, names: Sequence[str]) -> list[str]:
        server = site.server
        orders = ["set net:max-retries 2", "set net:timeout 30", "set cmd:fail-exit yes"]
        if site.scheme == "sftp":
            cipher = f" -c {self.options['cipher']}" if "cipher" in self.options else ""
            ssh = f"ssh -a -x{cipher} -i {server.key} -o UserKnownHostsFile={site.known_hosts()}"
            orders += [f"set sftp:connect-program '{ssh} -o StrictHostKeyChecking=yes -o IdentitiesOnly=yes'"]
            orders += [f"open -p {server.port} sftp://{server.user}:@{site.host}"]
        else:
            if site.scheme != "ftp":
                verify = "yes" if site.near else "no"
                orders += [f"set ssl:ca-file {server.ca}", f"set ssl:verify-certificate {verify}"]
                orders += ["set ftp:ssl-force yes", "set ftp:ssl-protect-data yes"]
            orders += [f"open -p {server.port} -u {server.user},{server.password} {site.host}"]
        orders += [f"mirror --parallel={self.connections or 1} {site.folder} {target}"]
        return ["lftp", "--norc", "-c", "; ".join(orders)]


class Rclone(Contender):
    name = "rclone"

    def command(self, site: Site, target: Path, names: Sequence[str]) -> list[str]:
        server = site.server
        shared = [f"--transfers={self.connections or 4}", "--multi-thread-streams=0", "--retries=1"]
        if site.scheme == "sftp":
            return [
                "rclone", "copy", f":sftp:{site.folder}", str(target), f"--sftp-host={site.host}",
                f"--sftp-port={server.port}", f"--sftp-user={server.user}", f"--sftp-key-file={server.key}",
                f"--sftp-known-hosts-file={site.known_hosts()}", "--sftp-disable-hashcheck", *shared,
            ]
        hidden = subprocess.run(["rclone", "obscure", server.password], stdout=subprocess.PIPE).stdout.decode()
        tls = [] if site.scheme == "ftp" else ["--ftp-explicit-tls", f"--ca-cert={server.ca}"]
        return [
            "rclone", "copy", f":ftp:{site.folder}", str(target), f"--ftp-host={site.host}",
            f"--ftp-port={server.port}", f"--ftp-user={server.user}", f"--ftp-pass={hidden.strip()}",
            f"--ftp-concurrency={self.connections or 4}", *tls, *shared,
        ]


class Curl(Contender):
    """Is given the list of names, so it lists nothing."""

    name = "curl"

    def command(self, site: Site, target: Path, names: Sequence[str]) -> list[str]:
        server = site.server
        scheme = "sftp" if site.scheme == "sftp" else "ftp"
        base = f"{scheme}://{server.user}@{site.host}:{server.port}/{'/' if scheme == 'sftp' else '%2F'}{site.folder[1:]}"
        lines = []
        for name in names:
            lines += [f'url = "{base}/{quote(name)}"', f'output = "{target}/{name}"']
        path = target.parent / "curl.conf"
        path.write_text("\n".join(lines) + "\n")
        command = ["curl", "--silent", "--show-error", "--fail", "--config", str(path)]
        if scheme == "sftp":
            command += ["--insecure", "--key", str(server.key), "--pubkey", f"{server.key}.pub"]
        else:
            command += ["--ftp-method", "nocwd", "--user", f"{server.user}:{server.password}"]
            if site.scheme != "ftp":
                command += ["--ssl-reqd", *(["--cacert", str(server.ca)] if site.near else ["--insecure"])]
        if self.connections > 1:
            command += ["--parallel", "--parallel-max", str(self.connections)]
        return command


class Sftp(Contender):
    name = "sftp"

    def command(self, site: Site, target: Path, names: Sequence[str]) -> list[str]:
        server = site.server
        batch = target.parent / "sftp.batch"
        batch.write_text(f"get {site.folder}/* {target}/\n")
        cipher = ["-c", self.options["cipher"]] if "cipher" in self.options else []
        return [
            "sftp", "-q", *cipher, "-P", str(server.port), "-i", str(server.key), "-o", "IdentitiesOnly=yes", "-o",
            f"UserKnownHostsFile={site.known_hosts()}", "-o", "StrictHostKeyChecking=yes", "-b", str(batch),
            f"{server.user}@{site.host}",
        ]


def compare(
    contenders: Sequence[Contender], site: Site, sizes: Mapping[str, int], rounds: int, in_memory: bool = False,
    limit: float = 600,
) -> Result:
    """Each contender fetches the files once a round, in changing order; what was fetched is checked."""
    samples: dict[str, list[Sample]] = {contender.label: [] for contender in contenders}
    failed: dict[str, str] = {}
    with scratch(in_memory) as place:
        for number in range(rounds):
            order = list(contenders[number % len(contenders) :]) + list(contenders[: number % len(contenders)])
            for contender in order if number % 2 == 0 else reversed(order):
                if contender.label in failed:
                    continue
                target = place / "target"
                target.mkdir()
                contender.ready(site)
                command = contender.command(site, target, list(sizes))
                settle_disk()
                try:
                    sample = run(command, contender.env(site, target), place / "log", limit)
                    contender.check((place / "log").read_text("utf-8", "replace"))
                    got = {entry.name: entry.stat().st_size for entry in os.scandir(target)}
                    if got != sizes:
                        raise RuntimeError(f"fetched {len(got)} files, {sum(got.values())} bytes: not what is there")
                    samples[contender.label].append(sample)
                except RuntimeError as problem:
                    failed[contender.label] = str(problem)
                shutil.rmtree(target)
    found: Result = {}
    for contender in contenders:
        runs = samples[contender.label]
        if contender.label in failed or not runs:
            found[contender.label] = {"failed": failed.get(contender.label, "did not run")[:300]}
            continue
        found[contender.label] = {
            "seconds": median([r.seconds for r in runs]), "least": min(r.seconds for r in runs),
            "most": max(r.seconds for r in runs), "cpu": median([r.cpu for r in runs]),
            "peak_mib": median([r.peak for r in runs]) / MIB, "runs": len(runs), "tool": contender.name,
        }
    return found


@contextlib.contextmanager
def scratch(in_memory: bool) -> Iterator[Path]:
    where = "/dev/shm" if in_memory and os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="ftpcoord-bench-", dir=where) as folder:
        yield Path(folder)


def settle_disk() -> None:
    """What the last run left unwritten is not the next one's burden."""
    os.sync()
