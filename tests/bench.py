"""The benchmark: ftpcoord beside what people use today, on the same servers and files.

    python3 tests/bench.py [--quick] [--only NAME]... [--install]

ftpcoord runs as users run it: `python -m ftpcoord run --once`, a process for each run, elected through
PostgreSQL, with the ledger on, every commit durable (fsync), files landing atomically and fsynced in
`download_dir`. The others (lftp, rclone, curl, OpenSSH's sftp, those that are found here, and the script
that people write, bench/plain_script.py) only copy; part `guarantees` counts what each does beside that.
Contenders take turns in changing order; the figures are medians, and ratios within one run. Each also
fetches a folder with a single file: what start, login and election take, and a service pays but once.

Without --only and --quick all parts but `takeover` run, about half an hour. Results go to
tests/bench/results.json (parts that did not run keep their last result), and comparison.svg is drawn from
it. --quick is a smoke run with small files; it writes nothing there unless --json names a file. --install
lets apt-get install lftp, rclone and curl.
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
from typing import Any, Callable, NamedTuple, Optional
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parent))
import setup_env
from processes import Process, environment

ROOT = setup_env.ROOT
FOLDER = ROOT / "tests" / "bench"
PRODUCT = ROOT / "ftpcoord.py"
PLAIN_SCRIPT = FOLDER / "plain_script.py"
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
        peak, ended = [0], threading.Event()
        watcher = threading.Thread(target=watch, args=(process, limit, peak, ended))
        watcher.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        finally:
            seconds = time.perf_counter() - started
            ended.set()
            watcher.join()
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        words = log.read_text("utf-8", "replace").strip()[-600:]
        raise RuntimeError(f"{command[0]} ended with {process.returncode} after {seconds:.1f} s: {words}")
    return Sample(seconds, usage.ru_utime + usage.ru_stime, peak[0])


def watch(process: subprocess.Popen[bytes], limit: float, peak: list[int], ended: threading.Event) -> None:
    """Keep the peak of its resident memory (rusage's includes ours, from before exec), and kill it if it hangs."""
    deadline = time.monotonic() + limit
    while not ended.wait(0.05):
        with contextlib.suppress(OSError, IndexError, ValueError):  # it has just ended
            text = Path(f"/proc/{process.pid}/status").read_text()
            peak[0] = max(peak[0], int(text.partition("VmHWM:")[2].split()[0]) * KIB)
        if time.monotonic() > deadline:
            process.kill()
            return


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
            [sys.executable, __file__, "--slow-network", str(self.round_trip / 2)],
            stdin=subprocess.PIPE,
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
        subprocess.run(["ip", "link", "set", name, "mtu", str(cls.MTU), "txqueuelen", "20000", "up"], check=True)
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
        return bool(self.host == self.server.host)

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
        return [sys.executable, "-m", "ftpcoord", "--config", "env", "run", "--once"]

    def env(self, site: Site, target: Path) -> dict[str, str]:
        settings: dict[str, Any] = {
            **site.server.settings(site.folder),
            "database": self.database.url,
            "download_dir": target,
            "settle": 0,
            "coordination_group": "bench",
            "member_id": "bench",
        }
        settings["url"] = f"{site.scheme}://{site.server.user}@{site.host}:{site.server.port}{quote(site.folder)}"
        if site.scheme == "sftp":
            settings["known_hosts"] = site.known_hosts()
        elif not site.near:
            settings["tls_verify"] = "no"
        if self.connections:
            settings["workers"] = self.connections
        return environment({**settings, **self.options})


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
                "rclone",
                "copy",
                f":sftp:{site.folder}",
                str(target),
                f"--sftp-host={site.host}",
                f"--sftp-port={server.port}",
                f"--sftp-user={server.user}",
                f"--sftp-key-file={server.key}",
                f"--sftp-known-hosts-file={site.known_hosts()}",
                "--sftp-disable-hashcheck",
                *shared,
            ]
        hidden = subprocess.run(["rclone", "obscure", server.password], stdout=subprocess.PIPE).stdout.decode()
        # It takes no authority for FTP: --ca-cert is for HTTP.
        tls = [] if site.scheme == "ftp" else ["--ftp-explicit-tls", "--ftp-no-check-certificate"]
        return [
            "rclone",
            "copy",
            f":ftp:{site.folder}",
            str(target),
            f"--ftp-host={site.host}",
            f"--ftp-port={server.port}",
            f"--ftp-user={server.user}",
            f"--ftp-pass={hidden.strip()}",
            *tls,
            *shared,
        ]


class Curl(Contender):
    """Is given the list of names, so it lists nothing."""

    name = "curl"

    def command(self, site: Site, target: Path, names: Sequence[str]) -> list[str]:
        server = site.server
        scheme = "sftp" if site.scheme == "sftp" else "ftp"
        base = (
            f"{scheme}://{server.user}@{site.host}:{server.port}/{'/' if scheme == 'sftp' else '%2F'}{site.folder[1:]}"
        )
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
            "sftp",
            "-q",
            *cipher,
            "-P",
            str(server.port),
            "-i",
            str(server.key),
            "-o",
            "IdentitiesOnly=yes",
            "-o",
            f"UserKnownHostsFile={site.known_hosts()}",
            "-o",
            "StrictHostKeyChecking=yes",
            "-b",
            str(batch),
            f"{server.user}@{site.host}",
        ]


class Plain(Contender):
    name = "plain script"

    def command(self, site: Site, target: Path, names: Sequence[str]) -> list[str]:
        server = site.server
        login = f"{server.user}:{'' if site.scheme == 'sftp' else server.password}"
        url = f"{site.scheme}://{login}@{site.host}:{server.port}{quote(site.folder)}"
        command = [sys.executable, str(PLAIN_SCRIPT), url, str(target)]
        if site.scheme == "sftp":
            command += ["--key", str(server.key), "--known-hosts", site.known_hosts()]
        elif site.scheme != "ftp":
            command += ["--ca-file", str(server.ca)] if site.near else ["--insecure"]
        return command


def compare(
    contenders: Sequence[Contender],
    site: Site,
    sizes: Mapping[str, int],
    rounds: int,
    in_memory: bool = False,
    limit: float = 600,
) -> Result:
    """Each contender fetches the files once a round, in changing order; what was fetched is checked."""
    samples: dict[str, list[Sample]] = {contender.label: [] for contender in contenders}
    starts: dict[str, list[float]] = {contender.label: [] for contender in contenders}
    failed: dict[str, str] = {}
    folder, one = fill(site.server, 1, 1)
    single = site._replace(folder=folder)
    with scratch(in_memory) as place:
        for number in range(rounds):
            order = list(contenders[number % len(contenders) :]) + list(contenders[: number % len(contenders)])
            for contender in order if number % 2 == 0 else reversed(order):
                if contender.label in failed:
                    continue
                try:
                    starts[contender.label].append(fetch(contender, single, one, place, limit).seconds)
                    samples[contender.label].append(fetch(contender, site, sizes, place, limit))
                except RuntimeError as problem:
                    failed[contender.label] = str(problem)
    found: Result = {}
    for contender in contenders:
        runs = samples[contender.label]
        if contender.label in failed or not runs:
            found[contender.label] = {"failed": failed.get(contender.label, "did not run")[-300:]}
            continue
        found[contender.label] = {
            "seconds": median([r.seconds for r in runs]),
            "least": min(r.seconds for r in runs),
            "most": max(r.seconds for r in runs),
            "start": median(starts[contender.label]),
            "cpu": median([r.cpu for r in runs]),
            "peak_mib": max(r.peak for r in runs) / MIB,
            "runs": len(runs),
            "tool": contender.name,
        }
    return found


def fetch(contender: Contender, site: Site, sizes: Mapping[str, int], place: Path, limit: float) -> Sample:
    """One run. RuntimeError if it fails, or if something else than the files arrives."""
    target = place / "target"
    target.mkdir()
    try:
        contender.ready(site)
        command = contender.command(site, target, list(sizes))
        settle_disk()
        sample = run(command, contender.env(site, target), place / "log", limit)
        got = {entry.name: entry.stat().st_size for entry in os.scandir(target)}
        if got != sizes:
            raise RuntimeError(f"fetched {len(got)} files, {sum(got.values())} bytes: not what is there")
        return sample
    finally:
        shutil.rmtree(target)
        (place / "names.txt").unlink(missing_ok=True)


@contextlib.contextmanager
def scratch(in_memory: bool) -> Iterator[Path]:
    where = "/dev/shm" if in_memory and os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="ftpcoord-bench-", dir=where) as folder:
        yield Path(folder)


def settle_disk() -> None:
    """What the last run left unwritten is not the next one's burden."""
    os.sync()


# ----------------------------------------------------------------------------- setting up


AGE = 5 * 86400.0  # of the files: as long as LIST's minute may not be over, each costs two questions more


def fill(server: Any, count: int, size: int, age: float = AGE) -> tuple[str, dict[str, int]]:
    """A new folder with files of that size, written `age` seconds ago; the folder and {name: size}."""
    root = server.folder()
    block = os.urandom(min(size, MIB))
    names = {f"f{number:07}.dat": size for number in range(count)}
    for name in names:
        with open(root / name, "wb") as file:
            for start in range(0, size, MIB):
                file.write(block[: size - start])
            if setup_env.IS_ROOT and server.ids:
                os.chown(file.fileno(), *server.ids)
        os.utime(root / name, (time.time() - age,) * 2)
    return str(root), names


@contextlib.contextmanager
def coordination() -> Iterator[Any]:
    """PostgreSQL as in production: every commit on the disk."""
    import servers

    with servers.postgres(fsync=True) as database:
        product(["schema", "postgresql", "--apply"], {"database": database.url, "url": "ftp://nobody@127.0.0.1/"})
        yield database


def product(arguments: Sequence[str], settings: Mapping[str, Any]) -> str:
    """Run a command of ftpcoord; what it prints."""
    done = subprocess.run(
        [sys.executable, str(PRODUCT), "--config", "env", *arguments],
        env=environment(settings),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"ftpcoord {' '.join(arguments)}: {done.stderr.decode(errors='replace')[-500:]}")
    return done.stdout.decode()


def child(role: str, **order: Any) -> subprocess.Popen[str]:
    """A process of this file that plays a role (see ROLES) and prints lines of JSON."""
    return subprocess.Popen(
        [sys.executable, __file__, "--role", role, json.dumps(order)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def answer(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a part of the benchmark ended with {process.wait(10)}")
    return json.loads(line)


def found_tools(*contenders: Contender) -> list[Contender]:
    return [c for c in contenders if c.name in ("ftpcoord", "plain script") or shutil.which(c.name)]


def servers_of(schemes: Sequence[str], **ftp: str) -> Iterator[tuple[str, Any]]:
    """(scheme, running server) in turn, those that can be started here."""
    import servers

    for scheme in schemes:
        name = "sshd" if scheme == "sftp" else "vsftpd"
        reason = servers.available(name)
        if reason:
            say(f"{name}: {reason}")
            continue
        ssh = {"ListenAddress": "0.0.0.0"} if ftp else {}
        mode = {"ftp": "plain", "ftpes": "explicit"}.get(scheme, "")
        with servers.sshd(options=ssh) if scheme == "sftp" else servers.vsftpd(mode, options=ftp) as server:
            yield scheme, server


def verdict(found: Result, goals: Mapping[str, float]) -> Result:
    """What each needed, as a table; ratios of the others' best time to ftpcoord's, whole and without the start."""
    good = {label: r for label, r in found.items() if "seconds" in r}
    ours = min((r for r in good.values() if r["tool"] == "ftpcoord"), key=lambda r: float(r["seconds"]), default=None)
    for label, r in sorted(found.items(), key=lambda item: item[1].get("seconds", 1e9)):
        if "seconds" in r:
            ratio = f"{r['seconds'] / ours['seconds']:5.2f} x" if ours else ""
            say(
                f"  {label:28} {r['seconds']:7.2f} s  {ratio}   start {r['start']:.2f} s, CPU {r['cpu']:.2f} s, "
                f"{r['peak_mib']:.0f} MiB"
            )
        else:
            say(f"  {label:28} failed: {r['failed'][:90]}")
    result: Result = {"contenders": found, "goals": {}}
    for pattern, goal in goals.items():
        others = [r for label, r in good.items() if r["tool"] != "ftpcoord" and re.match(pattern, label)]
        if others and ours:
            ratio = min(r["seconds"] for r in others) / ours["seconds"]
            running = min(moving(r) for r in others) / moving(ours)
            result["goals"][pattern] = {"ratio": ratio, "running": running, "goal": goal, "met": ratio >= goal}
            say(
                f"  the best of {pattern}: {ratio:.2f} x, without start {running:.2f} x; goal {goal:g} x: "
                f"{'met' if ratio >= goal else 'MISSED'}"
            )
    return result


def moving(row: Result) -> float:
    """Seconds without those of a run that fetches a single file."""
    return max(float(row["seconds"]) - float(row["start"]), 0.001)


# ----------------------------------------------------------------------------- 2, 3: files


def part_small(quick: bool) -> Result:
    """5,000 files of 1 KiB over loopback."""
    count, rounds = (20, 1) if quick else (5000, 2)
    goals = {
        "sftp": {"lftp|rclone|sftp": 2.0, "curl": 1.0},
        "ftp": {"lftp|rclone|curl": 1.3},
        "ftpes": {"lftp|rclone|curl": 1.0},
    }
    result: Result = {"files": count, "bytes": KIB}
    with coordination() as database:
        for scheme, server in servers_of(["sftp", "ftpes"] if quick else ["sftp", "ftp", "ftpes"]):
            folder, sizes = fill(server, count, KIB)
            contenders = found_tools(
                Ftpcoord(database),
                Plain(),
                Lftp(4),
                Rclone(4),
                Curl(4),
                *([Sftp()] if scheme == "sftp" else []),
            )
            # In memory for everybody: ftpcoord alone waits for a disk, and no two disks are alike.
            for where in ("memory",) if quick or scheme == "ftpes" else ("memory", "disk"):
                say(f"\n{scheme}: {count} files of 1 KiB to {where}")
                found = compare(contenders, Site(server, server.host, folder), sizes, rounds, where == "memory", 60)
                result[f"{scheme} {where}"] = verdict(found, goals[scheme])
            if scheme == "ftp" and not quick:
                folder, sizes = fill(server, count, KIB, age=0)
                say(f"\n{scheme}: {count} files of 1 KiB that have just come, to memory")
                found = compare(contenders[:1], Site(server, server.host, folder), sizes, rounds, True, 60)
                result["ftp just come"] = verdict(found, {})
    return result


def part_far(quick: bool) -> Result:
    """100 small files for each connection, and 4 large ones, over a round trip of 20 ms."""
    reason = SlowNetwork.unavailable()
    if reason:
        say(f"no slow network: {reason}")
        return {"skipped": reason}
    count, size, rounds = (12, MIB, 1) if quick else (100, 256 * MIB, 1)
    result: Result = {"files a connection": count, "round_trip": 0.02}
    options = {"listen_address": "0.0.0.0", "pasv_address": SlowNetwork.FAR}
    with coordination() as database, SlowNetwork(0.02):
        for scheme, server in servers_of(["sftp", "ftp"], **options):
            for number in (1, 4):
                folder, sizes = fill(server, count * number, KIB)
                say(f"\n{scheme}, 20 ms: {count * number} files of 1 KiB, {number} connections each")
                contenders = found_tools(
                    Ftpcoord(database, number),
                    *([Plain()] if number == 1 else []),
                    Lftp(number),
                    Rclone(number),
                    Curl(number),
                    *([Sftp()] if scheme == "sftp" and number == 1 else []),
                )
                found = compare(contenders, Site(server, SlowNetwork.FAR, folder), sizes, rounds, True, 150)
                result[f"{scheme} {number}"] = verdict(found, {".": 3.0})
            folder, sizes = fill(server, 4, size)
            say(f"\n{scheme}, 20 ms: 4 files of {size // MIB} MiB")
            contenders = found_tools(
                Ftpcoord(database), Ftpcoord(database, 1), Lftp(4), Curl(4), *([Sftp()] if scheme == "sftp" else [])
            )
            found = compare(contenders, Site(server, SlowNetwork.FAR, folder), sizes, rounds, True, 150)
            result[f"{scheme} large"] = verdict(found, {})
            for label in ("ftpcoord (1)", "ftpcoord"):
                if "seconds" in found[label]:
                    speed = result[f"{scheme} large"]["mb_per_second"] = 4 * size / 1e6 / found[label]["seconds"]
                    say(f"  {label}: {speed:.0f} MB/s, start and election included; goal 125")
    return result


def part_large(quick: bool) -> Result:
    """4 files of 256 MiB over loopback, and the memory that it takes."""
    size, rounds = (MIB, 1) if quick else (256 * MIB, 2)
    fast = "aes128-gcm@openssh.com"
    goals = {
        "sftp": {r"lftp|rclone|curl": 1.2, "sftp gcm": 0.85},
        "ftp": {"curl": 1.2},
        "ftpes": {"lftp": 1.1},
    }
    result: Result = {"files": 4, "bytes": size}
    with coordination() as database:
        for scheme, server in servers_of(["sftp", "ftp", "ftpes"]):
            folder, sizes = fill(server, 4, size)
            say(f"\n{scheme}: 4 files of {size // MIB} MiB to memory")
            contenders = found_tools(
                Ftpcoord(database),
                Ftpcoord(database, 1),
                Plain(),
                Lftp(4),
                Rclone(4),
                Curl(4),
                *([Sftp(), Sftp(label="sftp gcm", cipher=fast)] if scheme == "sftp" else []),
            )
            site = Site(server, server.host, folder)
            result[scheme] = verdict(compare(contenders, site, sizes, rounds, True, 120), goals[scheme])
            folder, sizes = fill(server, 4, 1)
            idle = compare([Ftpcoord(database)], Site(server, server.host, folder), sizes, 1, True)["ftpcoord"]
            most = result[scheme]["contenders"]["ftpcoord"]
            if "peak_mib" in idle and "peak_mib" in most:
                result[scheme]["memory_above_idle_mib"] = most["peak_mib"] - idle["peak_mib"]
                say(f"  memory above a run with 4 tiny files: {most['peak_mib'] - idle['peak_mib']:.0f} MiB, goal 64")
    return result


# ----------------------------------------------------------------------------- start, guarantees


WITH_A_DRIVER = """
import runpy, sys
import pg8000.native
pg8000.native.Connection("app", host="127.0.0.1", port=int(sys.argv.pop(1)), database="app", password=sys.argv.pop(1)).run("SELECT 1")
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""  # noqa: E501


STARTS = ("plain script", "plain script that logs in to PostgreSQL", "module", "script")


def part_start(quick: bool) -> Result:
    """From exec to the first poll: ftpcoord as a module and as a script, the plain script, and that with a login."""
    rounds = 1 if quick else 9
    result: Result = {}
    with coordination() as database:
        for scheme, server in servers_of(["sftp", "ftp"]):
            folder, _ = fill(server, 1, 1)
            site, taken = Site(server, server.host, folder), dict[str, list[tuple[float, float]]]()
            with scratch(True) as place:
                (place / "target").mkdir()
                ours = Ftpcoord(database)
                plain = Plain().command(site, place / "target", [])
                login = [sys.executable, "-c", WITH_A_DRIVER, str(database.port), database.password]
                environments = ours.env(site, place / "target")
                commands = {
                    "plain script": plain,
                    "plain script that logs in to PostgreSQL": [*login, *plain[1:]],
                    "module": [sys.executable, "-m", "ftpcoord", "--config", "env"],
                    "script": [sys.executable, str(PRODUCT), "--config", "env"],
                }
                for number, (label, command) in itertools.product(range(rounds + 1), commands.items()):
                    ours.ready(site)
                    for left in (*(place / "target").iterdir(), place / "names.txt"):
                        left.unlink(missing_ok=True)
                    seconds = until_polled(command, {**os.environ, **environments})
                    if number:  # the first one compiles
                        taken.setdefault(label, []).append(seconds)
            found = {
                label: {"wall": min(w for w, _ in runs), "cpu": min(c for _, c in runs)}
                for label, runs in taken.items()
            }
            result[scheme] = found
            for label, row in found.items():
                ratio = row["wall"] / found["plain script"]["wall"]
                say(f"{scheme} {label}: {row['wall'] * 1e3:.0f} ms, {ratio:.2f} x, CPU {row['cpu'] * 1e3:.0f} ms")
    return result


def until_polled(command: Sequence[str], env: Mapping[str, str]) -> tuple[float, float]:
    """Seconds by the wall and of CPU until a process says `polled`; it is ended then."""
    started = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(env), cwd=ROOT
    ) as process:
        assert process.stdout is not None
        said = b""
        for line in process.stdout:
            said += line
            if b"polled" in line:
                break
        seconds, cpu = time.perf_counter() - started, cpu_seconds(process.pid)
        process.kill()
    if b"polled" not in said:
        raise RuntimeError(f"{command[0]} did not poll: {said.decode(errors='replace')[-600:]}")
    return seconds, cpu


def part_guarantees(quick: bool) -> Result:
    """What each does beside copying, by what is seen: fsync, whole files alone under their names, memory, election."""
    count, size = (5, 8 * MIB) if quick else (20, 128 * MIB)
    result: Result = {"files": count}
    with coordination() as database:
        for scheme, server in servers_of(["sftp", "ftp"]):
            folder, sizes = fill(server, count, KIB)
            site, (big, one) = Site(server, server.host, folder), fill(server, 1, size)
            others = [Sftp()] if scheme == "sftp" else [Plain(), Lftp(4), Rclone(4), Curl(4)]
            for contender in found_tools(*([] if scheme == "sftp" else [Ftpcoord(database)]), *others):
                with scratch(False) as place:
                    row = result[contender.name] = {
                        "fsync a file": synced(contender, site, sizes, place / "1"),
                        "seen half": seen_half(contender, site._replace(folder=big), one, place / "2"),
                        "again": len(names_of(contender, site, sizes, place / "3", 2)[1]),
                        "twice": len(set.intersection(*names_of(contender, site, sizes, place / "4", 1, 2))),
                    }
                say(f"{scheme} {contender.name}: " + ", ".join(f"{key}: {value}" for key, value in row.items()))
    return result


def started(contender: Contender, site: Site, sizes: Mapping[str, int], target: Path, *under: str) -> Any:
    """A process that copies into the target."""
    target.mkdir(parents=True, exist_ok=True)
    env = {**contender.env(site, target), "FTPCOORD_MEMBER_ID": target.parent.name}
    command = [*under, *contender.command(site, target, list(sizes))]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)


def synced(contender: Contender, site: Site, sizes: Mapping[str, int], place: Path) -> Optional[float]:
    """Calls of fsync for each file; None: nothing here counts them."""
    if not shutil.which("strace"):
        return None
    contender.ready(site)
    calls = place.with_name("calls")
    trace = ("strace", "-f", "-qq", "-e", "trace=fsync,fdatasync,sync_file_range", "-o", str(calls))
    started(contender, site, sizes, place / "target", *trace).wait(60)
    return calls.read_text().count("sync(") / len(sizes)


def seen_half(contender: Contender, site: Site, sizes: Mapping[str, int], place: Path) -> int:
    """How often a file was seen under its name before it was whole."""
    contender.ready(site)
    target, seen = place / "target", 0
    with started(contender, site, sizes, target) as process:
        while process.poll() is None:
            with contextlib.suppress(FileNotFoundError):
                seen += any(0 <= entry.stat().st_size < sizes.get(entry.name, 0) for entry in os.scandir(target))
            time.sleep(0.001)
    return seen


def names_of(
    contender: Contender, site: Site, sizes: Mapping[str, int], place: Path, times: int, at_once: int = 1
) -> list[set[str]]:
    """What each run fetched, one after the other or at once; whoever handles files takes them away."""
    contender.ready(site)
    fetched = []
    for _ in range(times):
        targets = [place / f"host{number}" / "target" for number in range(at_once)]
        for process in [started(contender, site, sizes, target) for target in targets]:
            process.wait(90)
        for target in targets:
            fetched.append({entry.name for entry in os.scandir(target)} & set(sizes))
            shutil.rmtree(target)
    return fetched


# ----------------------------------------------------------------------------- 4: big folders


def role_poll(order: Mapping[str, Any]) -> None:
    """Polls a folder all of whose files are done, and lists it barely with the same library."""
    import ftpcoord

    config = ftpcoord.Config(**order["settings"])
    database = ftpcoord.open_database(config)
    database.prepare()
    term = database.token(config.coordination_group)[1] + 1
    database.execute("DELETE FROM token_holder")
    assert database.first(config.coordination_group, config.member_id, term) == term
    statements = 0
    plain = database._run

    def counted(sql: str) -> Any:
        nonlocal statements
        statements += 1
        return plain(sql)

    member = ftpcoord.Member(config)
    lease = ftpcoord.Lease(term, float("inf"), time.monotonic)
    selector = ftpcoord.Selector(config, time.monotonic)
    yielding = ftpcoord.Yielding(config)
    poller = ftpcoord.Poller(
        config, member, lease, selector, None, database, yielding, ftpcoord.Breaker(config, member.stats)
    )
    started = time.perf_counter()
    poller.ledger.refresh()
    load = time.perf_counter() - started
    bare, polls = [], []
    setattr(database, "_run", counted)  # noqa: B010
    with contextlib.closing(ftpcoord.open_server(config)) as server:
        for _ in range(order["rounds"]):
            started = time.perf_counter()
            listed = len(server.list(config.target.path))
            bare.append(time.perf_counter() - started)
            started = time.perf_counter()
            poller.poll()
            polls.append(time.perf_counter() - started)
    print(
        json.dumps(
            {
                "listed": listed,
                "load": load,
                "bare": median(bare),
                "poll": median(polls),
                "statements": statements / order["rounds"],
                "rss_mib": memory(os.getpid())[0] / MIB,
            }
        ),
        flush=True,
    )


def part_folder(quick: bool) -> Result:
    """A poll of a folder that is done, beside the bare listing; growth with the number of files."""
    import servers

    result: Result = {}
    with coordination() as database:
        for scheme, server in servers_of(["sftp", "ftp"]):
            counts = [100, 300] if quick else [1000, 10_000, 100_000] + ([1_000_000] if scheme == "ftp" else [])
            rows = []
            for count in counts:
                folder, _ = fill(server, count, 0)
                settings = {
                    **server.settings(folder),
                    "database": database.url,
                    "coordination_group": f"n{count}-{scheme}",
                    "member_id": "bench",
                    "download_dir": str(database.dir),
                    "settle": 0,
                    "liveness_check_interval": 3600,
                }
                product(["adopt"], settings)
                with contextlib.closing(servers.pg_login(database.port, timeout=60)) as connection:
                    connection.autocommit = True
                    connection.cursor().execute("VACUUM ANALYZE file_ledger")
                process = child("poll", settings=settings, rounds=3)
                row = answer(process)
                process.wait(60)
                rows.append({"files": count, **row})
                say(
                    f"{scheme}: {count:>9,} known files: bare listing {row['bare']:.3f} s, poll {row['poll']:.3f} s "
                    f"= {row['poll'] / row['bare']:.2f} x, {row['statements']:.0f} statements, "
                    f"first reading of the ledger {row['load']:.2f} s, {row['rss_mib']:.0f} MiB"
                )
                shutil.rmtree(folder)
            result[scheme] = rows
    return result


# ----------------------------------------------------------------------------- 5: what coordination costs


def settings_for(url: str, group: str, member: str, heartbeat: float, liveness: float) -> dict[str, Any]:
    return {
        "url": "sftp://nobody@127.0.0.1/in",
        "database": url,
        "coordination_group": group,
        "member_id": member,
        "heartbeat_frequency": heartbeat,
        "liveness_check_interval": liveness,
        "download_dir": ".",
        "log_level": "error",
    }


def part_cost(quick: bool) -> Result:
    """Round trips, statements and bytes of a heartbeat, active and standby; HOT updates by fillfactor."""
    import servers

    import ftpcoord

    beats = 20 if quick else 2000
    result: Result = {}
    for name in ("postgresql",) if quick else ("postgresql", "mysql", "mariadb"):
        reason = servers.available(name)
        if reason:
            say(f"{name}: {reason}")
            continue
        make = {"postgresql": servers.postgres, "mysql": servers.mysql, "mariadb": servers.mariadb}[name]
        with make(fsync=True) as server, servers.Proxy(server.host, server.port) as proxy:
            url = server.url.replace(f":{server.port}/", f":{proxy.port}/")
            found: Result = {}
            elections, database = [], None
            for member in ("active", "standby"):
                config = ftpcoord.Config(**settings_for(url, "g", member, 1, 30))
                database = ftpcoord.open_database(config)
                if member == "active":
                    database.apply_schema()
                timing = database.prepare()
                election = ftpcoord.Election(database, "g", member, timing, ftpcoord.boot_clock, lambda *_, **__: None)
                election.tick(ftpcoord.boot_clock())
                elections.append(election)
            assert elections[0].lease is not None and database is not None
            for fillfactor in (100, 50) if name == "postgresql" else (0,):
                if fillfactor:
                    database.execute(f"ALTER TABLE health_check SET (fillfactor = {fillfactor})")
                    with contextlib.closing(servers.pg_login(server.port, "postgres")) as connection:
                        connection.autocommit = True
                        connection.cursor().execute("VACUUM FULL health_check")
                        connection.cursor().execute("SELECT pg_stat_reset()")
                for election in elections:
                    election.tick(ftpcoord.boot_clock())
                    statements = count_statements(election.store)
                    time.sleep(0.1)
                    trips, size, wal = proxy.round_trips, proxy.bytes, log_position(name, server)
                    started = time.perf_counter()
                    for _ in range(beats):
                        election.tick(ftpcoord.boot_clock())
                    took = time.perf_counter() - started
                    time.sleep(0.1)
                    row = {
                        "round_trips": round((proxy.round_trips - trips) / beats, 2),
                        "statements": statements() / beats,
                        "network_bytes": (proxy.bytes - size) / beats,
                        "milliseconds_through_proxy": took / beats * 1e3,
                        "log_bytes": (log_position(name, server) - wal) / beats,
                    }
                    found[election.member if fillfactor != 50 else f"{election.member}, fillfactor 50"] = row
                    say(
                        f"{name} {election.member}{f', fillfactor {fillfactor}' if fillfactor else ''}: "
                        f"{row['round_trips']:g} round trips, {row['statements']:g} statements, "
                        f"{row['network_bytes']:.0f} bytes on the wire, {row['log_bytes']:.0f} bytes of log, "
                        f"{row['log_bytes'] * 86400 / 1e6:.1f} MB a day at one heartbeat a second"
                    )
                if fillfactor:
                    hot, updates, pages = hot_updates(server)
                    found[f"fillfactor {fillfactor}"] = {"hot": hot, "updates": updates, "table_bytes": pages}
                    say(f"{name}: fillfactor {fillfactor}: {hot} of {updates} updates HOT, table {pages // KIB} KiB")
            result[name] = found
    return result


def count_statements(database: Any) -> Callable[[], int]:
    count = 0
    plain = type(database)._run.__get__(database)

    def counted(*statements: str) -> Any:
        nonlocal count
        count += 1
        return plain(*statements)

    database._run = counted
    return lambda: count


def log_position(name: str, server: Any) -> int:
    """Bytes that the database has written to its log so far."""
    import servers

    if name == "postgresql":
        with contextlib.closing(servers.pg_login(server.port, "postgres")) as connection:
            cursor = connection.cursor()
            cursor.execute("SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint")
            return int(cursor.fetchone()[0])
    with contextlib.closing(servers.mysql_login(server.port)) as connection:
        cursor = connection.cursor()
        cursor.execute("SHOW GLOBAL STATUS LIKE 'Innodb_os_log_written'")
        row = cursor.fetchone()
        return int(row[1]) if row else 0


def hot_updates(server: Any) -> tuple[int, int, int]:
    import servers

    time.sleep(1.5)  # the statistics of a session are sent once a second at most
    with contextlib.closing(servers.pg_login(server.port)) as connection:
        cursor = connection.cursor()
        cursor.execute(
            "SELECT n_tup_hot_upd, n_tup_upd, pg_relation_size(relid) FROM pg_stat_user_tables "
            "WHERE relname = 'health_check'"
        )
        hot, updates, size = cursor.fetchone()
        return int(hot), int(updates), int(size)


def role_members(order: Mapping[str, Any]) -> None:
    """Many members in one process, on shared connections; tells how late heartbeats left."""
    import ftpcoord

    late: list[float] = []
    took: list[float] = []

    def heard(stats: Any, seconds: float, delay: float, failed: bool) -> None:
        took.append(seconds)
        late.append(delay)

    setattr(ftpcoord.Stats, "heartbeat", heard)  # noqa: B010
    threading.stack_size(256 * KIB)
    settings = [settings_for(order["url"], f"g{n}", order["member"], 1, 30) for n in order["groups"]]
    pulse = ftpcoord.Pulse(ftpcoord.open_database(ftpcoord.Config(**settings[0])))
    members = [ftpcoord.Member(ftpcoord.Config(**s)) for s in settings]
    for member in members:
        member.start(pulse)
    for member in members:
        member.ready.wait(60)
    print(json.dumps("ready"), flush=True)
    sys.stdin.readline()
    late.clear()
    took.clear()
    before = cpu_seconds(os.getpid())
    time.sleep(order["seconds"])
    print(
        json.dumps(
            {
                "beats": len(late),
                "late_median": median(late),
                "late_99": percentile(late, 0.99),
                "late_most": max(late),
                "took_median": median(took),
                "took_99": percentile(took, 0.99),
                "cpu": cpu_seconds(os.getpid()) - before,
                "active": sum(m.lease is not None for m in members),
                "rss_mib": memory(os.getpid())[0] / MIB,
            }
        ),
        flush=True,
    )
    os._exit(0)


def part_members(quick: bool) -> Result:
    """1,000 members in 4 processes, a heartbeat a second each, on one database."""
    import servers

    groups, seconds = (10, 2) if quick else (500, 30)
    result: Result = {"members": groups * 2, "seconds": seconds}
    for name in ("postgresql",) if quick else ("postgresql", "mysql"):
        if servers.available(name):
            say(f"{name}: {servers.available(name)}")
            continue
        with (servers.postgres if name == "postgresql" else servers.mysql)(fsync=True) as server:
            product(["schema", name, "--apply"], {"database": server.url, "url": "ftp://x@127.0.0.1/"})
            half = groups // 2
            parts = [
                child("members", url=server.url, member=member, groups=list(numbers), seconds=seconds)
                for member, numbers in itertools.product("ab", (range(half), range(half, groups)))
            ]
            for process in parts:
                answer(process)
            time.sleep(2)  # the first beats, all at once, are over
            before = sum(cpu_seconds(pid) for pid in server.pids())
            for process in parts:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
            answers = [answer(process) for process in parts]
            cpu = sum(cpu_seconds(pid) for pid in server.pids()) - before
            beats = sum(a["beats"] for a in answers)
            result[name] = {
                "beats_per_second": beats / seconds,
                "active": sum(a["active"] for a in answers),
                "database_cores": cpu / seconds,
                "member_cores": sum(a["cpu"] for a in answers) / seconds,
                "late_median": median([a["late_median"] for a in answers]),
                "late_99": max(a["late_99"] for a in answers),
                "late_most": max(a["late_most"] for a in answers),
                "took_99": max(a["took_99"] for a in answers),
                "rss_mib": max(a["rss_mib"] for a in answers),
            }
            row = result[name]
            say(
                f"{name}: {groups * 2} members, {row['active']} active: {row['beats_per_second']:.0f} heartbeats/s, "
                f"late {row['late_median'] * 1e3:.0f} ms (99 %: {row['late_99'] * 1e3:.0f}, most "
                f"{row['late_most'] * 1e3:.0f}); database {row['database_cores']:.2f} cores, members "
                f"{row['member_cores']:.2f} cores in 4 processes of at most {row['rss_mib']:.0f} MiB"
            )
    return result


# ----------------------------------------------------------------------------- 6: takeover and hand-over


def role_stand(order: Mapping[str, Any]) -> None:
    """One member; tells when it is ready and when it is active. A line on stdin stops it gracefully."""
    import ftpcoord

    member = ftpcoord.Member(ftpcoord.Config(**order["settings"]))
    member.start()
    member.ready.wait()
    print(json.dumps("ready"), flush=True)

    def stop() -> None:
        sys.stdin.readline()
        member.stop()

    threading.Thread(target=stop, daemon=True).start()
    while not member.finished.is_set():
        lease = member.wait_for_lease(1.0)
        if lease is not None:
            print(json.dumps(["active", lease.term, time.monotonic()]), flush=True)
            while member.may_work(lease):
                member.wait(lease, 3600)
            member.work_ended()
            print(json.dumps(["ended", lease.term, time.monotonic()]), flush=True)
    os._exit(0)


def lane(url: str, number: int, heartbeat: float, liveness: float, kinds: Sequence[str], found: list[Any]) -> None:
    """Two members of one group; again and again the active one is ended, and the other timed."""
    names = (f"m{n}" for n in itertools.count())

    def start() -> subprocess.Popen[str]:
        process = child("stand", settings=settings_for(url, f"lane{number}", next(names), heartbeat, liveness))
        answer(process)
        return process

    active = start()
    while answer(active)[0] != "active":
        pass
    for count, kind in enumerate(kinds):
        standby = start()
        # Different points of the heartbeat; and the standby has looked twice, as one that has stood for a while.
        time.sleep(2.2 * heartbeat + heartbeat * ((count * 0.618) % 1))
        ended = time.monotonic()
        if kind == "kill":
            active.kill()
        else:
            assert active.stdin is not None
            active.stdin.write("\n")
            active.stdin.flush()
        said = answer(standby)
        while said[0] != "active":
            said = answer(standby)
        found.append((kind, said[2] - ended))
        active.wait(60)
        active = standby
    active.kill()
    active.wait(10)


def part_takeover(quick: bool) -> Result:
    """How long until the other member is active, after a SIGKILL and after a graceful stop."""
    lanes, each = (1, 2) if quick else (6, 17)
    result: Result = {}
    settings = [(0.5, 5.0), (0.1, 1.1)]  # the second: what validation allows on PostgreSQL with ten beats a second
    with coordination() as database:
        for heartbeat, liveness in settings[-1:] if quick else settings:
            found: list[tuple[str, float]] = []
            kinds = list(itertools.islice(itertools.cycle(("kill", "stop")), each * 2))
            threads = [
                threading.Thread(target=lane, args=(database.url, n, heartbeat, liveness, kinds, found))
                for n in range(lanes)
            ]
            for thread in threads:
                thread.start()
                time.sleep(0.2)
            for thread in threads:
                thread.join()
            entry: Result = {"heartbeat": heartbeat, "liveness": liveness}
            for kind, bound in (("kill", liveness), ("stop", heartbeat)):
                times = sorted(seconds for k, seconds in found if k == kind)
                entry[kind] = [round(seconds, 4) for seconds in times]
                say(
                    f"heartbeat {heartbeat:g} s, liveness {liveness:g} s: {len(times)} x {kind}: median "
                    f"{median(times):.3f} s, 95 % {percentile(times, 0.95):.3f} s, most {times[-1]:.3f} s "
                    f"(bound {bound:g} s{' and a round trip' if kind == 'stop' else ''})"
                )
            result[f"{liveness:g} s"] = entry
    return result


# ----------------------------------------------------------------------------- 7, 8: footprint, starvation


def part_footprint(quick: bool) -> Result:
    """Memory and CPU of idle members, start-up, import."""
    import servers

    seconds = 2 if quick else 10
    result: Result = {}
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start_of(code: str) -> float:
        runs = []
        for _ in range(3 if quick else 15):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], env=env, check=True)
            runs.append(time.perf_counter() - started)
        return min(runs)  # what other processes take is not its own

    bare = start_of("pass")
    result["import_ms"] = (start_of("import ftpcoord") - bare) * 1e3
    say(f"import: {result['import_ms']:.0f} ms beyond the interpreter's {bare * 1e3:.0f} ms, goal 60")
    for name in ("postgresql",) if quick else ("postgresql", "mysql", "sqlite"):
        if name != "sqlite" and servers.available(name):
            continue
        makers = {"postgresql": servers.postgres, "mysql": servers.mysql, "mariadb": servers.mariadb}
        with contextlib.ExitStack() as stack:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            url = f"sqlite:///{place}/db"
            if name != "sqlite":
                url = stack.enter_context(makers[name](fsync=True)).url
                dialect = "postgresql" if name == "postgresql" else "mysql"
                product(["schema", dialect, "--apply"], {"database": url, "url": "ftp://x@127.0.0.1/"})
            files = stack.enter_context(servers.vsftpd())
            landed = place / "landed"  # modules are found in the working folder: nothing may be delivered there
            landed.mkdir()
            # Python compiles a script anew at each start, and keeps some of the memory; of a module it keeps the code.
            commands = {"active": [str(PRODUCT)], "standby": [str(PRODUCT)], "standby as module": ["-m", "ftpcoord"]}
            for role, command in commands.items():
                settings = {
                    **files.settings(files.folder()),
                    "database": url,
                    "member_id": role.replace(" ", "-"),
                    "coordination_group": "idle",
                    "download_dir": landed,
                    "polling_interval": 3600,
                }
                started = time.perf_counter()
                process = Process(role, [sys.executable, *command, "--config", "env"], environment(settings), place)
                stack.enter_context(process)
                wait_for_word(process, " elected " if role == "active" else " standby ")
                ready = time.perf_counter() - started
                time.sleep(1)
                before = cpu_seconds(process.pid)
                time.sleep(seconds)
                cores = (cpu_seconds(process.pid) - before) / seconds
                rss, pss = memory(process.pid)
                result[f"{name} {role}"] = {
                    "rss_mib": rss / MIB,
                    "pss_mib": pss / MIB,
                    "cpu_percent": cores * 100,
                    "first_heartbeat": ready,
                }
                say(
                    f"{name} {role}: {rss / MIB:.1f} MiB resident, {cores * 100:.2f} % of a core, "
                    f"first heartbeat after {ready:.2f} s"
                )
    return result


def wait_for_word(process: Process, word: str) -> None:
    import servers

    servers.wait_for(lambda: any(word in line for line in process.lines()), 30, f"{word!r}: {process.said()}")


def role_busy(order: Mapping[str, Any]) -> None:
    """An active member whose four workers do nothing but compute; tells how late its heartbeats left."""
    import hashlib

    import ftpcoord

    late: list[float] = []
    plain = ftpcoord.Stats.heartbeat

    def heard(stats: Any, seconds: float, delay: float, failed: bool) -> None:
        late.append(delay)
        plain(stats, seconds, delay, failed)

    setattr(ftpcoord.Stats, "heartbeat", heard)  # noqa: B010
    listener = ftpcoord.Listener(**order["settings"])

    @listener.on_file("*")
    def hash_and_count(file: Any) -> None:
        data = file.read()
        until = time.monotonic() + order["each"]
        while time.monotonic() < until:
            hashlib.sha256(data).digest()  # lets other threads run
            sum(number * number for number in range(20_000))  # does not, until it is asked to

    listener.start()
    time.sleep(order["seconds"])
    listener.stop()
    listener.join(20)
    print(json.dumps(late), flush=True)
    os._exit(0)


def part_starve(quick: bool) -> Result:
    """How late renewals leave while all workers compute."""
    seconds = 1 if quick else 30
    with coordination() as database:
        for _, server in servers_of(["sftp"]):
            folder, _ = fill(server, 10 if quick else 64, (1 if quick else 16) * MIB)
            settings = {
                **server.settings(folder),
                "database": database.url,
                "coordination_group": "busy",
                "member_id": "busy",
                "heartbeat_frequency": 0.2,
                "liveness_check_interval": 5,
                "settle": 0,
                "log_level": "error",
                "workers": 4,
            }
            process = child("busy", settings=settings, seconds=seconds, each=0.1 if quick else 1.0)
            late = [delay for delay in answer(process) if delay < 3600]
            process.wait(30)
            row = {
                "beats": len(late),
                "median": median(late),
                "95": percentile(late, 0.95),
                "most": max(late),
            }
            say(
                f"4 busy workers, a heartbeat each 0.2 s: {row['beats']} renewals left {row['median'] * 1e3:.1f} ms late "  # noqa: E501
                f"(95 %: {row['95'] * 1e3:.1f} ms, most {row['most'] * 1e3:.1f} ms)"
            )
            return row
    return {}


# ----------------------------------------------------------------------------- the picture


STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #1f2328 } .dim { fill: #59636e } .head { font-weight: 600 }
.ours { fill: #0969da } .other { fill: #b6bec7 } .no { fill: none; stroke: #b6bec7; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .dim { fill: #9198a1 } .ours { fill: #4493f8 } .other { fill: #565e68 } .no { stroke: #565e68 }
}
</style>"""
TOOLS_SHOWN = ("ftpcoord", "plain script", "curl", "rclone", "lftp", "sftp")
MOST_SHOWN = 5.0  # times ftpcoord's seconds: longer bars are cut
CELL, BAR, LINE = 300, 118, 19  # pixels: a scene's width, its longest bar, a line's height


def draw(results: Result) -> str:
    """A table of scenes, in each a bar of seconds for each tool; below, what each does beside copying."""
    y, parts = 26, [STYLE, text(10, 26, "Seconds to fetch: shorter is better.", "head")]
    parts.append(text(300, y, "ftpcoord elects one of its copies, records each file in PostgreSQL and fsyncs it."))
    columns = (
        ("small", " memory", "5,000 files of 1 KiB"),
        ("far", " 1", "100 of them at 20 ms round trip"),
        ("large", "", "4 files of 256 MiB"),
    )
    for protocol, scheme in (("SFTP", "sftp"), ("FTP", "ftp"), ("FTPS", "ftpes")):
        scenes = [fastest(results.get(part, {}).get(scheme + suffix)) for part, suffix, _ in columns]
        y += 34
        for column, ((_, _, words), best) in enumerate(zip(columns, scenes)):
            if "ftpcoord" in best:
                x = 10 + column * CELL
                parts += [text(x, y, f"{protocol}, {words}", "head"), *bars(x, y + 6, best)]
        y += LINE * max(map(len, scenes)) + 6
    return page(y, [*parts, *guarantees(y + 26, results.get("guarantees", {}))])


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}">{words}</text>'


def bars(x: float, y: float, best: Mapping[str, float]) -> list[str]:
    """ftpcoord's seconds, and those of the others as multiples of it."""
    ours, parts = best["ftpcoord"], []
    longest = min(max(best.values()), MOST_SHOWN * ours)
    for tool, seconds in sorted(best.items(), key=lambda item: item[1]):
        kind, width = "ours" if tool == "ftpcoord" else "other", BAR * min(seconds, longest) / longest
        label = f"{seconds:.2g} s" if tool == "ftpcoord" else f"{seconds / ours:.1f} x" + " »" * (seconds > longest)
        parts += [
            text(x, y + 13, tool, "" if tool == "ftpcoord" else "dim"),
            f'<rect x="{x + 88}" y="{y + 2:.0f}" width="{width:.0f}" height="14" rx="2" class="{kind}"/>',
            text(x + 94 + width, y + 13, label, "" if tool == "ftpcoord" else "dim"),
        ]
        y += LINE
    return parts


def guarantees(y: float, found: Result) -> list[str]:
    """A filled dot: it does; an empty one: it was seen not to."""
    if not found:
        return []
    parts = [text(10, y, "Beside copying, as counted", "head")]
    for number, tool in enumerate(tool for tool in TOOLS_SHOWN if tool in found):
        parts.append(text(330 + number * 96, y, tool, "" if tool == "ftpcoord" else "dim"))
        for line, (words, does) in enumerate(PROMISES.items(), 1):
            if number == 0:
                parts.append(text(10, y + line * LINE, words, "dim"))
            kind = ("ours" if tool == "ftpcoord" else "other") if does(found[tool]) else "no"
            parts.append(f'<circle cx="{348 + number * 96}" cy="{y + line * LINE - 4:.0f}" r="5" class="{kind}"/>')
    return parts


PROMISES: dict[str, Callable[[Result], bool]] = {
    "content is on the disk before it counts (fsync)": lambda row: bool(row["fsync a file"]),
    "a name appears only when its file is whole": lambda row: not row["seen half"],
    "a file that was taken away is not fetched again": lambda row: not row["again"],
    "two copies at once fetch each file once": lambda row: not row["twice"],
}


def page(y: float, parts: Sequence[str]) -> str:
    width, height = 3 * CELL + 20, y + 26 + LINE * (len(PROMISES) + 1)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    return "\n".join([head, *parts, "</svg>"]) + "\n"


def fastest(entry: Optional[Result]) -> dict[str, float]:
    """Each tool's best seconds; OpenSSH with the cipher that ftpcoord takes apart."""
    best: dict[str, float] = {}
    for label, row in entry["contenders"].items() if entry else ():
        name = label if label == "sftp gcm" else row.get("tool", "")
        if "seconds" in row:
            best[name] = min(row["seconds"], best.get(name, 1e9))
    return best


def table(results: Result) -> str:
    """The comparison as a Markdown table, from the results that are there."""
    lines = ["| | ftpcoord | the others | ratio | without start | goal |", "|---|---|---|---|---|---|"]
    scenes = [
        (part, key, f"{protocol}, {words}")
        for part, suffix, words in (
            ("small", " memory", "5,000 files of 1 KiB"),
            ("small", " disk", "the same to a disk (ftpcoord alone waits for it)"),
            ("far", " 1", "20 ms, 100 files of 1 KiB, 1 connection"),
            ("far", " 4", "20 ms, 400 files of 1 KiB, 4 connections"),
            ("far", " large", "20 ms, 4 files of 256 MiB"),
            ("large", "", "4 files of 256 MiB"),
        )
        for protocol, scheme in (("SFTP", "sftp"), ("FTP", "ftp"), ("FTPS", "ftpes"))
        for key in (scheme + suffix,)
    ]
    for part, key, words in scenes:
        entry = results.get(part, {}).get(key)
        best = fastest(entry)
        ours = best.pop("ftpcoord", None)
        if not entry or ours is None:
            continue
        others = ", ".join(f"{name} {seconds:.2f}" for name, seconds in sorted(best.items(), key=lambda b: b[1]))
        goals = "; ".join(f"{g['goal']:g}{'' if g['met'] else ' (missed)'}" for g in entry["goals"].values())
        ratios = "; ".join(f"{g['ratio']:.2f}" for g in entry["goals"].values())
        running = "; ".join(f"{g['running']:.2f}" for g in entry["goals"].values())
        if "mb_per_second" in entry:
            goals, ratios, running = "125 MB/s", f"{entry['mb_per_second']:.0f} MB/s", ""
        lines.append(f"| {words} | {ours:.2f} s | {others} | {ratios} | {running} | {goals} |")
    lines += ["", "| from exec to the first poll | " + " | ".join(STARTS) + " |", "|---" * (len(STARTS) + 1) + "|"]
    for protocol, scheme in (("SFTP", "sftp"), ("FTP", "ftp")):
        found = results.get("start", {}).get(scheme, {})
        plain = found.get("plain script", {}).get("wall", 1.0)
        cells = [f"{found[s]['wall']:.2f} s ({found[s]['wall'] / plain:.2f} x)" for s in STARTS if s in found]
        lines.append(f"| {protocol} | {' | '.join(cells)} |")
    beside = {tool: row for tool, row in results.get("guarantees", {}).items() if tool in TOOLS_SHOWN}
    lines += ["", f"| {' | '.join(['', *beside])} |", "|---" * (len(beside) + 1) + "|"]
    for key in ("fsync a file", "seen half", "again", "twice"):
        lines.append(f"| {key} | {' | '.join(f'{row[key]:g}' for row in beside.values())} |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------- the whole


PARTS: dict[str, Callable[[bool], Result]] = {
    "small": part_small,
    "far": part_far,
    "large": part_large,
    "start": part_start,
    "guarantees": part_guarantees,
    "folder": part_folder,
    "cost": part_cost,
    "members": part_members,
    "takeover": part_takeover,
    "footprint": part_footprint,
    "starve": part_starve,
}
ROLES = {"poll": role_poll, "members": role_members, "stand": role_stand, "busy": role_busy}


def machine() -> Result:
    cpu = "unknown"
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        cpu = found[1] if found else cpu
    versions = {}
    for tool, argument in (("lftp", "--version"), ("rclone", "version"), ("curl", "--version"), ("ssh", "-V")):
        if shutil.which(tool):
            said = subprocess.run([tool, argument], stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout.decode()
            number = re.search(r"v?\d+\.\d+[\w.+-]*", said)
            versions[tool] = number[0] if number else said.strip()[:40]
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)),
        "python": platform.python_version(),
        "tools": versions,
    }


def install() -> None:
    missing = [tool for tool in ("lftp", "rclone", "curl") if not shutil.which(tool)]
    if missing:
        subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", *missing], check=True)


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--slow-network"]:
        SlowNetwork.serve(float(arguments[1]))
        return 0
    if arguments[:1] == ["--role"]:
        sys.path.insert(0, str(ROOT))
        ROLES[arguments[1]](json.loads(arguments[2]))
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a smoke run with small files")
    parser.add_argument("--only", action="append", choices=list(PARTS), help="just this part; may be repeated")
    parser.add_argument("--install", action="store_true", help="apt-get install lftp, rclone and curl first")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where results go (default: tests/bench/results.json)"
    )
    parser.add_argument("--table", action="store_true", help="measure nothing, print the results as Markdown")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(json.loads((options.json or FOLDER / "results.json").read_text())))
        return 0
    python = setup_env.ensure("test")
    if Path(sys.prefix).resolve() != setup_env.VENV.resolve():
        sys.stdout.flush()
        os.execv(python, [str(python), __file__, *arguments])
    sys.path.insert(0, str(ROOT))
    if options.install:
        install()
    import servers

    problem = servers.available("postgresql")
    if problem:
        print(f"the benchmark needs PostgreSQL: {problem}", file=sys.stderr)
        return 1
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # as installed: compiled once
    os.environ["PYTHONPYCACHEPREFIX"] = str(setup_env.VENV / "pycache")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    chosen = options.only or [name for name in PARTS if name != "takeover"]
    path: Optional[Path] = options.json or (None if options.quick else FOLDER / "results.json")
    results: Result = json.loads(path.read_text()) if path and path.exists() else {}
    results["machine"] = machine()
    say(f"{results['machine']}; not found: {[t for t in TOOLS if not shutil.which(t)] or 'nothing'}")
    failed = False
    for name in chosen:
        say(f"\n== {name}: {(PARTS[name].__doc__ or '').strip()}")
        try:
            results[name] = PARTS[name](options.quick)
        except Exception as error:
            failed = True
            say(f"{name} FAILED: {type(error).__name__}: {error}")
            if options.quick:
                raise
        save(results, path, options.quick)
    return 1 if failed else 0


def save(results: Result, path: Optional[Path], quick: bool) -> None:
    if path is None:
        return
    path.parent.mkdir(exist_ok=True)
    parts = [json.dumps({name: rounded(results[name])}, sort_keys=True)[1:-1] for name in sorted(results)]
    path.write_text("{" + ",\n".join(parts) + "}\n")
    if not quick:
        (path.parent / "comparison.svg").write_text(draw(results))


def rounded(value: Any) -> Any:
    """Four significant digits: more say nothing, and make the file large."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
