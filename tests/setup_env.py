"""What the tests and the demo need on a fresh machine: a virtual environment, and real servers.

`ensure(extras)` gives the environment's Python, `ensure_servers()` installs what a root user of Debian or
Ubuntu may install.  Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import configparser
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv" / f"{sys.version_info[0]}.{sys.version_info[1]}"  # one for each Python that is tried
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0

# As root not below /root: mysqld runs there under another user, who may not enter it.
CACHE = Path("/var/cache") if IS_ROOT else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
CACHE = CACHE / "ftpcoord-tests"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file; the end of its holder frees it, too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        try:
            import fcntl
        except ImportError:  # Windows: the tests are not run at the same time there
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def requirements(extras: str) -> list[str]:
    """The requirements of these extras ("test", "postgres,sftp") in setup.cfg, `ftpcoord[...]` resolved."""
    config = configparser.RawConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    found: list[str] = []
    for extra in filter(None, (part.strip() for part in extras.split(","))):
        for line in config.get("options.extras_require", extra).split("\n"):
            own = re.fullmatch(r"ftpcoord\[(.*)\]", line.strip())
            found += requirements(own.group(1)) if own else [line.strip()] if line.strip() else []
    return list(dict.fromkeys(found))


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _works(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def ensure(extras: str = "test") -> Path:
    """Python of a virtual environment in the checkout that has these extras' requirements.

    The second call returns at once, until setup.cfg asks for something new.  Safe when called twice at once.
    RuntimeError says what to install by hand where nothing worked.
    """
    wanted = requirements(extras)
    python, stamp = _python(VENV), VENV / "installed.txt"
    with locked(VENV.parent / "lock"):
        have = stamp.read_text("utf-8").split("\n") if stamp.exists() else []
        if set(wanted) <= set(have) and _works([str(python), "-c", ""]):
            return python
        if not _works([str(python), "-c", ""]):
            shutil.rmtree(VENV, ignore_errors=True)
            have = []
        lines = list(dict.fromkeys(have + wanted)) if set(have) <= set(requirements("test")) else wanted
        print(f"[setup] {VENV}: installing {', '.join(lines)}", file=sys.stderr, flush=True)
        pip = _environment()
        subprocess.run([*pip, "install", "--quiet", "--disable-pip-version-check", *lines], check=True)
        stamp.write_text("\n".join(lines), "utf-8")
    return python


def ensure_oldest() -> Path:
    """A folder with the oldest drivers that setup.cfg allows: first on the path, it stands before VENV's own."""
    oldest = [line.partition(",")[0].replace(">=", "==") for line in requirements("all") if ">=" in line]
    folder = VENV.parent / f"{VENV.name}-oldest"
    stamp = folder / "installed.txt"
    with locked(VENV.parent / "lock"):
        if not stamp.exists() or stamp.read_text("utf-8").split("\n") != oldest:
            shutil.rmtree(folder, ignore_errors=True)
            print(f"[setup] {folder}: installing {', '.join(oldest)}", file=sys.stderr, flush=True)
            pip = [*_environment(), "install", "--quiet", "--disable-pip-version-check", "--target", str(folder)]
            subprocess.run([*pip, *oldest], check=True)
            stamp.write_text("\n".join(oldest), "utf-8")
    return folder


def _environment() -> list[str]:
    """Make VENV if it is not there; returns the command that runs a pip for it."""
    python, base = str(_python(VENV)), getattr(sys, "_base_executable", None) or sys.executable
    if _works([python, "-m", "pip", "--version"]):
        return [python, "-m", "pip"]
    if not _works([base, "-c", "import venv, ensurepip"]) and IS_ROOT and sys.base_prefix == "/usr":
        # Debian's bare python3 has no ensurepip: that is a package of its own.
        if not apt_install(["python3-venv"]):
            apt_install([f"python{VENV.name}-venv"])
    if _works([base, "-m", "venv", str(VENV)]) and _works([python, "-m", "pip", "--version"]):
        return [python, "-m", "pip"]
    shutil.rmtree(VENV, ignore_errors=True)
    if _works([base, "-m", "virtualenv", str(VENV)]) and _works([python, "-m", "pip", "--version"]):
        return [python, "-m", "pip"]
    shutil.rmtree(VENV, ignore_errors=True)
    if _works([base, "-m", "venv", "--without-pip", str(VENV)]):
        wheels = sorted(Path("/usr/share/python-wheels").glob("pip-*.whl"))
        pips = [[base, "-m", "pip"], ["pip3"], ["pip"], *([base, f"{wheel}/pip"] for wheel in wheels)]
        for pip in pips:  # --python: pip 22.3 and newer
            if _works([*pip, "--python", python, "--version"]):
                return [*pip, "--python", python]
    raise RuntimeError(
        f"no way to make a virtual environment with {base}: install its venv module with ensurepip"
        " (Debian, Ubuntu: apt-get install python3-venv), or virtualenv, or pip 22.3"
    )


# --------------------------------------------------------------------------------------------- servers

DEBIAN_PACKAGES = {
    "postgresql": "postgresql",
    "mariadbd": "mariadb-server",
    "vsftpd": "vsftpd",
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
    "pgbouncer": "pgbouncer",
    "tinyproxy": "tinyproxy",
    "microsocks": "microsocks",
    "gpg": "gnupg",
    "openssl": "openssl",
    "setpriv": "util-linux",
    "chromium": "chromium",  # for the status page
    "promtool": "prometheus",  # for metrics and alert rules
}


def find_program(name: str) -> Optional[str]:
    """Absolute path of a program, also from the folders of system daemons that an ordinary PATH lacks."""
    return shutil.which(
        name,
        path=os.pathsep.join(
            [
                os.environ.get("PATH", ""),
                "/usr/sbin",
                "/sbin",
                "/usr/local/sbin",
                "/usr/libexec",
                "/opt/homebrew/bin",
            ]
        ),
    )


def postgres_bin() -> Optional[Path]:
    """The folder with initdb and postgres, the newest version first."""
    folders = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"),
        reverse=True,
        key=lambda folder: [int(digits) for digits in re.findall(r"\d+", folder.parent.name)],
    )
    found = find_program("initdb")
    folders += [Path(os.path.realpath(found)).parent] if found else []
    return next((f for f in folders if (f / "postgres").exists() and (f / "initdb").exists()), None)


def apt_install(packages: Sequence[str]) -> bool:
    """Install Debian packages without starting their services; True if it worked."""
    if not (IS_ROOT and shutil.which("apt-get")):
        return False
    policy = Path("/usr/sbin/policy-rc.d")
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
    print(f"[setup] apt-get install {' '.join(packages)}", file=sys.stderr, flush=True)
    with locked(CACHE / "apt.lock"):
        made = not policy.exists()
        if made:
            policy.write_text("#!/bin/sh\nexit 101\n")  # 101: action forbidden (invoke-rc.d)
            policy.chmod(0o755)
        try:
            # One source that cannot be reached fails the whole update: what counts is that the install works.
            subprocess.run([*apt, "update"], stdout=subprocess.DEVNULL, env=environ)
            done = subprocess.run(
                [*apt, "install", "-y", "--no-install-recommends", *packages],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        finally:
            if made:
                policy.unlink()
    if done.returncode:
        sys.stderr.write(done.stdout.decode(errors="replace"))
    return done.returncode == 0


def mysql_command() -> Optional[list[str]]:
    """How to run a real MySQL server (never MariaDB): one that is installed, or the unpacked one of CACHE."""
    found = find_program("mysqld")
    if found:
        said = subprocess.run([found, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
        if b"MariaDB" not in said:
            return [found]
    root = mysql_root()
    loader = next(iter([*root.glob("usr/lib*/ld-linux-*.so.*"), *root.glob("usr/lib/*/ld-linux-*.so.*")]), None)
    if loader and (root / "usr/sbin/mysqld").exists():
        libraries = ":".join(str(path) for path in root.glob("usr/lib/*-linux-gnu"))
        return [str(loader), "--library-path", libraries, str(root / "usr/sbin/mysqld")]
    return None


def mysql_root() -> Path:
    """Where the unpacked MySQL is, or would be."""
    return CACHE / "mysql"


def fetch_mysql() -> Optional[str]:
    """Unpack the real MySQL of Debian sid beside the system, installing nothing; None, or why not.

    The tree has its own C library and is run by its own loader, so the release of the system does not matter.
    """
    keyring = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    if mysql_command():
        return None
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb") and keyring.exists()):
        return "no real mysqld is installed, and only a Debian system can fetch one"
    print(f"[setup] unpacking MySQL from Debian sid into {mysql_root()}", file=sys.stderr, flush=True)
    with locked(CACHE / "mysql.lock"):
        if mysql_command():
            return None
        targets = subprocess.run(["apt-get", "indextargets", "--format", "$(REPO_URI)"], stdout=subprocess.PIPE)
        mirrors = [line for line in targets.stdout.decode().split() if re.search(r"/debian/?$", line)]
        if not mirrors:
            return "no Debian mirror in the system's apt sources"
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            apt, tree = Path(folder, "apt"), Path(folder, "tree")
            for name in ("lists/partial", "cache/archives/partial"):
                (apt / name).mkdir(parents=True)
            tree.mkdir()
            (apt / "status").touch()  # an empty system: all that is needed is fetched
            (apt / "sources.list").write_text(f"deb [signed-by={keyring}] {mirrors[0]} sid main\n")
            (apt / "apt.conf").write_text(
                f'Dir::State::Lists "{apt}/lists"; Dir::State::status "{apt}/status";\n'
                f'Dir::Cache "{apt}/cache";\n'
                f'Dir::Etc::SourceList "{apt}/sources.list"; Dir::Etc::SourceParts "/dev/null";\n'
                'Dir::Etc::PreferencesParts "/dev/null"; Debug::NoLocking "1"; APT::Sandbox::User "root";\n'
            )
            environ = {**os.environ, "APT_CONFIG": str(apt / "apt.conf")}
            fetch = ["install", "-y", "--no-install-recommends", "--download-only", "mysql-server-core"]
            for command in (["update"], fetch):
                done = subprocess.run(
                    ["apt-get", "-qq", *command],
                    env=environ,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
                if done.returncode:
                    return f"apt-get {' '.join(command)}: {done.stdout.decode(errors='replace').strip()[-300:]}"
            for package in sorted((apt / "cache/archives").glob("*.deb")):
                subprocess.run(["dpkg-deb", "-x", str(package), str(tree)], check=True)
            tree.chmod(0o755)
            shutil.rmtree(mysql_root(), ignore_errors=True)
            tree.rename(mysql_root())
    return None if mysql_command() else "the unpacked MySQL has no mysqld"


# Debian lets only one FTP server be installed: the others are unpacked beside the system.
UNPACKED = {"proftpd": ("proftpd-core", "proftpd-mod-crypto"), "pure-ftpd": ("pure-ftpd",)}


def unpacked(name: str) -> Path:
    """The folder of UNPACKED's packages and of what they need: usr/sbin/NAME there is the server."""
    return CACHE / name


def unpack(name: str) -> Optional[str]:
    """Fetch the packages of an UNPACKED server with what they need, installing nothing; None, or why not."""
    root = unpacked(name)
    if (root / "usr/sbin" / name).exists():
        return None
    if not (IS_ROOT and shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return "only root of a Debian system can fetch it"
    print(f"[setup] unpacking {name} into {root}", file=sys.stderr, flush=True)
    with locked(CACHE / "apt.lock"), tempfile.TemporaryDirectory(dir=CACHE) as folder:
        if (root / "usr/sbin" / name).exists():
            return None
        archives, tree = Path(folder, "archives"), Path(folder, "tree")
        (archives / "partial").mkdir(parents=True)
        apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300", "-o", f"Dir::Cache::archives={archives}"]
        subprocess.run([*apt, "update"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        done = subprocess.run(
            [*apt, "install", "-y", "--no-install-recommends", "--download-only", *UNPACKED[name]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            return f"apt-get: {done.stdout.decode(errors='replace').strip()[-300:]}"
        for package in sorted(archives.glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(package), str(tree)], check=True)
        tree.chmod(0o755)
        shutil.rmtree(root, ignore_errors=True)
        tree.rename(root)
    return None if (root / "usr/sbin" / name).exists() else f"the packages have no usr/sbin/{name}"


SERVERS = (
    "postgresql",
    "mariadb",
    "mysql",
    "vsftpd",
    "sshd",
    "pgbouncer",
    "tinyproxy",
    "microsocks",
    "gpg",
    "chromium",
    "promtool",
    *UNPACKED,
)


def ensure_servers(names: Sequence[str] = SERVERS) -> dict[str, str]:
    """Install what is missing of these servers where this user and system allow it.

    Returns why something could not be installed, by name.  Instant when all is there.
    """
    programs = ["mariadbd" if name == "mariadb" else name for name in names] + [
        "ssh-keygen",
        "openssl",
        "setpriv",
    ]
    missing = [
        package
        for program, package in DEBIAN_PACKAGES.items()
        if program in programs and not (postgres_bin() if program == "postgresql" else find_program(program))
    ]
    if missing and not apt_install(missing) and len(missing) > 1:
        for package in missing:  # one that does not exist must not keep the others out
            apt_install([package])
    reasons = {name: unpack(name) for name in names if name in UNPACKED}
    reasons["mysql"] = fetch_mysql() if "mysql" in names else None
    return {name: reason for name, reason in reasons.items() if reason}


if __name__ == "__main__":
    print(ensure(sys.argv[1] if len(sys.argv) > 1 else "test"))
