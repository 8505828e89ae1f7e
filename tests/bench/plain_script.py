"""The script that people write: polls a folder over FTP, FTPS or SFTP, and remembers names in a file.

    python3 plain_script.py sftp://me:secret@files.example/inbox TARGET --key id_ed25519 --known-hosts known_hosts

It is what ftpcoord is measured against, and so as good as such a script gets: it checks certificates and host keys,
downloads under a temporary name, compares sizes, and notes a name only when the file is there. What it lacks is what
takes more than a page: no election (two of these fetch all twice), no fsync, no second look at the version, no
second try of what fails, no memory that another host shares.
"""

from __future__ import annotations

import argparse
import ftplib
import os
import ssl
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class Ftp:
    def __init__(self, url: Any, options: argparse.Namespace) -> None:
        self.ftp = ftplib.FTP(timeout=60)
        if url.scheme == "ftpes":
            context = ssl.create_default_context(cafile=options.ca_file)
            if options.insecure:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            self.ftp = ftplib.FTP_TLS(timeout=60, context=context)
        self.ftp.connect(url.hostname, url.port or 21)
        self.ftp.login(unquote(url.username), unquote(url.password))
        if isinstance(self.ftp, ftplib.FTP_TLS):
            self.ftp.prot_p()
        self.ftp.cwd(unquote(url.path))
        self.ftp.voidcmd("TYPE I")  # SIZE wants it

    def names(self) -> list[str]:
        return self.ftp.nlst()

    def fetch(self, name: str, target: Path) -> None:
        size = self.ftp.size(name)
        with open(target, "wb") as out:
            self.ftp.retrbinary(f"RETR {name}", out.write)
        if size is not None and target.stat().st_size != size:
            raise OSError(f"{name}: {target.stat().st_size} bytes instead of {size}")


class Sftp:
    def __init__(self, url: Any, options: argparse.Namespace) -> None:
        import paramiko

        client = paramiko.SSHClient()
        client.load_host_keys(options.known_hosts)
        client.set_missing_host_key_policy(paramiko.RejectPolicy())
        client.connect(
            url.hostname,
            url.port or 22,
            unquote(url.username),
            unquote(url.password or "") or None,
            key_filename=options.key,
            allow_agent=False,
            look_for_keys=False,
        )
        self.client, self.sftp = client, client.open_sftp()
        self.sftp.chdir(unquote(url.path))

    def names(self) -> list[str]:
        return self.sftp.listdir()

    def fetch(self, name: str, target: Path) -> None:
        self.sftp.get(name, str(target))  # compares the sizes itself


def poll(url: Any, options: argparse.Namespace) -> None:
    server = Sftp(url, options) if url.scheme == "sftp" else Ftp(url, options)
    seen = set(options.names.read_text().splitlines()) if options.names.exists() else set()
    found = server.names()
    print(f"polled {len(found)} names", flush=True)
    with open(options.names, "a") as names:
        for name in found:
            if name not in seen:
                part = options.target / f".{name}.part"
                server.fetch(name, part)
                os.replace(part, options.target / name)
                print(name, file=names, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url", type=urlsplit)
    parser.add_argument("target", type=Path)
    parser.add_argument("--names", type=Path, help="the file of the names that were fetched")
    parser.add_argument("--interval", type=float, default=0.0, help="seconds between polls; 0: one poll alone")
    for option in ("--key", "--known-hosts", "--ca-file"):
        parser.add_argument(option)
    parser.add_argument("--insecure", action="store_true", help="for a certificate that names another host")
    options = parser.parse_args()
    options.names = options.names or options.target.with_name("names.txt")
    while True:
        try:
            poll(options.url, options)
        except Exception as problem:
            if not options.interval:
                raise
            print(f"failed, tried again at the next poll: {problem}", flush=True)
        if not options.interval:
            return
        time.sleep(options.interval)


if __name__ == "__main__":
    main()
