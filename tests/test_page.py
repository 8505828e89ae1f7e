"""The status page in a real browser: headless Chromium, light and dark, narrow and wide, few and hostile contents.

Chromium is driven over its DevTools pipe (descriptors 3 and 4, JSON ended by NUL).  FTPCOORD_SCREENSHOTS=FOLDER
keeps the pictures.
"""

from __future__ import annotations

import base64
import contextlib
import html
import itertools
import json
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from conftest import Database, new_folder, wait_for
from members import Crew, ftpcoord

NOW = time.time()
NARROW, WIDE = 390, 1280


class Browser:
    """One headless Chromium with one tab.  `said` holds what the console and the security log told."""

    def __init__(self, program: str, folder: Path) -> None:
        to_browser, from_browser = os.pipe(), os.pipe()

        def descriptors() -> None:  # 3: commands, 4: answers; out of the way first, they may be 3 or 4 themselves
            read, write = os.dup(to_browser[0]), os.dup(from_browser[1])
            read, write = os.dup(read), os.dup(write)
            os.dup2(read, 3)
            os.dup2(write, 4)

        command = [
            program,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
            f"--user-data-dir={folder}",
            "about:blank",
        ]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=descriptors,
            close_fds=False,
            start_new_session=True,
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        self._out, self._in, self._rest = to_browser[1], from_browser[0], b""
        self._numbers = itertools.count(1)
        self._session = ""
        self._events: list[dict[str, Any]] = []
        self.said: list[str] = []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Runtime", "Security", "Audits"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self, seconds: float = 60) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, until - time.monotonic()))
            assert ready, "Chromium does not answer"
            data = os.read(self._in, 1 << 20)
            assert data, "Chromium has ended"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        method = message.get("method", "")
        if method == "Log.entryAdded":
            self.said.append(message["params"]["entry"]["text"])
        elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Audits.issueAdded"):
            self.said.append(json.dumps(message["params"]))
        elif method:
            self._events.append(message)
        return message

    def open(self, url: str, width: int = WIDE, scheme: str = "light") -> None:
        """Shows a page and waits until it is loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._events.clear()
        self.call("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._read()

    def value(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def picture(self, path: Path) -> None:
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._session = ""
            self.call("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._out)
        os.close(self._in)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        message = "chromium: it is not installed (Debian: apt-get install chromium)"
        if os.environ.get("FTPCOORD_REQUIRE_ALL") == "1":
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    made = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield made
    made.close()


# -- contents ---------------------------------------------------------------------------------------------------------


def group(**changes: Any) -> dict[str, Any]:
    """What /status tells of a healthy group, with some of it changed."""
    members = [
        {"member_id": "pod-7f9c-a", "released": False, "heartbeat_age": 0.31},
        {"member_id": "pod-7f9c-b", "released": False, "heartbeat_age": 0.78},
    ]
    found: dict[str, Any] = {
        "group": "sftp://me@files.example:22/inbox",
        "holder": "pod-7f9c-a",
        "term": 7,
        "stale_after": 28.0,
        "database": "postgresql://app@db.example/app",
        "members": members,
        "errors": [],
        "paused": None,
        "not_now": None,
        "backlog": {"files": 0, "bytes": 0, "oldest": 0.0, "first": []},
        "active_for": 4000.0,
        "last_change": 12.0,
        "files": {"claimed": 2, "done": 1204, "failed": 1, "quarantined": 0},
        "as_of": 0.1,
        "database_error": "",
        "member": {
            "member_id": "pod-7f9c-a",
            "role": "active",
            "active_since": NOW - 4321,
            "other_since": None,
            "started": NOW - 90000,
            "version": "1.0.0",
            "lease_remaining": 24.1,
            "stuck": "",
            "unready": "",
        },
        "heartbeat": {"up": True, "error": "", "age": 0.3, "count": 9000, "failed": 3, "mean": 0.0023},
        "server": {
            "url": "sftp://me@files.example:22/inbox",
            "up": True,
            "error": "",
            "last_poll": NOW - 12,
            "listed": 1207,
            "waiting": 1,
            "refused": 0,
            "polls": 70,
            "failed_polls": 0,
        },
        "work": {
            "done": 310,
            "failed": 4,
            "quarantined": 1,
            "bytes": 73400320,
            "queue": 2,
            "handlers": 2,
            "last_done": NOW - 12,
            "minutes": [[int(NOW // 60) - 59 + n, (n * 7) % 23, int(n % 17 == 3), int(n == 40)] for n in range(60)],
        },
        "takeovers": [
            {
                "time": NOW - 4321,
                "event": "elected",
                "member": "pod-7f9c-a",
                "term": 7,
                "reason": "stale",
                "seconds": 27.3,
            },
            {
                "time": NOW - 50000,
                "event": "other",
                "member": "pod-7f9c-b",
                "term": 6,
                "reason": "handed over",
                "seconds": 1.2,
            },
            {
                "time": NOW - 50001,
                "event": "lost",
                "member": "pod-7f9c-a",
                "term": 5,
                "reason": "deadline passed",
                "seconds": 3999.0,
            },
        ],
        "missing": [],
        "settings": {
            "database": "postgresql://app@db.example/app",
            "exec": "/usr/bin/import ... (2 arguments)",
            "password": "***",
            "polling_interval": "10.0",
            "url": "sftp://me@files.example:22/inbox",
        },
    }
    for name, value in changes.items():
        found[name] = {**found[name], **value} if isinstance(value, dict) and found.get(name) else value
    judged: dict[str, Any] = ftpcoord.judged(found)
    return judged


PROBLEMS: dict[str, dict[str, Any]] = {
    "the database cannot be used: refused": {"database_error": "refused", "heartbeat": {"error": "refused"}},
    "the file server cannot be used: refused": {"server": {"up": False, "error": "refused"}},
    "this member makes no progress: the polling has ended": {"member": {"stuck": "the polling has ended"}},
    "3 files are quarantined": {"files": {"quarantined": 3}},
    "no member is active: pod-7f9c-a gave the role up": {
        "members": [{"member_id": "pod-7f9c-a", "released": True, "heartbeat_age": 3.0}],
        "member": {"role": "standby"},
    },
    "the group is paused by root@db1 since 2026-01-12T10:15:00Z, until it is resumed": {
        "paused": {"by": "root@db1", "since": "2026-01-12T10:15:00Z", "until": None},
    },
    "the system behind the handler says not now since 2026-01-12T10:15:00Z: /in/a, /in/b and 2 more": {
        "not_now": {"since": "2026-01-12T10:15:00Z", "count": 4, "paths": ["/in/a", "/in/b"]},
    },
    "the heartbeat of pod-7f9c-a lies 10 min in the future": {
        "members": [{"member_id": "pod-7f9c-a", "released": False, "heartbeat_age": -600.0}],
    },
}
NOTES: dict[str, dict[str, Any]] = {
    "claims wait for the system behind the handler: away": {"member": {"not_now": "away"}},
    "the system behind the handler says not now since 2026-01-12T10:15:00Z: /in/a": {
        "not_now": {"since": "2026-01-12T10:15:00Z", "count": 1, "paths": ["/in/a"]},
    },
    "there is no standby": {"members": [{"member_id": "pod-7f9c-a", "released": False, "heartbeat_age": 0.1}]},
    "7 failed and will be tried again": {"files": {"failed": 7}},
    "this member is stopping": {"member": {"role": "stopping"}},
    "this member is starting": {"member": {"role": "starting"}},
}


@pytest.mark.parametrize("text", [*PROBLEMS, *NOTES])
def test_what_is_to_be_said_is_said_alike_on_the_page_in_the_terminal_and_by_the_check(text: str) -> None:
    status = group(**(PROBLEMS.get(text) or NOTES[text]))
    assert status["healthy"] == (text in NOTES)
    terminal = [line for _, line in ftpcoord.status_lines(status)]
    assert any(text in line for line in terminal), terminal
    assert text[1:] in re.sub("</?b>", "", html.unescape(ftpcoord.page([status], 0)))
    assert ftpcoord.nagios_line([status]).startswith("ok: " if text in NOTES else f"not ok: {status['group']}: {text}")


def test_nobody_but_a_holder_of_the_lease_is_called_active_while_the_database_is_away() -> None:
    away = {"database_error": "refused", "heartbeat": {"error": "refused"}}
    assert group(**away, member={"role": "standby"})["active"] is None
    assert group(**away)["active"] == "pod-7f9c-a"


HOSTILE = "</td></table><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp;'\""
ERROR = {"state": "quarantined", "attempts": 5, "age": 500.0}
WAITING = {
    "paused": {"by": "ops@control-1", "since": "2026-11-24T03:41:48Z", "until": "2026-11-24T05:41:48Z"},
    "not_now": {"since": "2026-11-24T03:21:07Z", "count": 23, "paths": [f"/inbox/pay-{n:04}.xml" for n in range(20)]},
    "backlog": {
        "files": 1284,
        "bytes": 83_412_733,
        "oldest": 2345.0,
        "first": [
            {"path": "/inbox/salaries-2026-11.xml", "age": 2345.0, "why": "its marker .ok is not there"},
            {"path": "/inbox/pay-0001.xml", "age": 1200.0, "why": "in work"},
            {"path": "/inbox/archive.zip", "age": 900.0, "why": "larger than max_size: 4831838208 bytes"},
            {"path": "/inbox/pay-0002.xml", "age": 812.0, "why": "failed, tried again in 2 min: command exited with 1"},
            {"path": "/inbox/pay-0003.xml", "age": 4.0, "why": "taken next, if it is at rest"},
        ],
    },
    "files": {"quarantined": 1},
    "errors": [{**ERROR, "path": "/inbox/pay-0000.xml", "error": "command exited with 1: no such customer"}],
}
CASES = {
    "healthy": [group()],
    "waiting": [group(**WAITING)],
    "ten": [
        group(group=f"listener-{n}", **WAITING)
        if n == 3
        else group(group=f"listener-{n}", member={"active_since": NOW - n})
        for n in range(10)
    ],
    "one": [group(members=[{"member_id": "pod-7f9c-a", "released": False, "heartbeat_age": 0.3}], takeovers=[])],
    "none": [
        group(
            members=[],
            holder=None,
            term=0,
            files={},
            takeovers=[],
            as_of=0.1,
            active_for=None,
            member={"role": "starting", "active_since": None},
            server={"up": None, "last_poll": None, "waiting": 0},
            heartbeat={"age": None, "up": False, "mean": 0.0},
            work={"minutes": [], "last_done": None, "queue": 0, "handlers": 0, "bytes": 0},
        )
    ],
    "twenty": [
        group(
            members=[
                {
                    "member_id": f"integration-host-{number:02}.example:41{number:02}",
                    "released": number == 3,
                    "heartbeat_age": 0.05 * number if number % 6 else 4000.0 + number,
                }
                for number in range(1, 21)
            ],
            holder="integration-host-01.example:4101",
            files={"quarantined": 3},
            errors=[
                {
                    **ERROR,
                    "path": f"/inbox/2026/orders-{n}.csv",
                    "error": "command exited with 1: Traceback (most recent call "
                    'last): | File "/srv/import.py", line 12, in <module> | ValueError: invalid literal for int()',
                }
                for n in range(3)
            ],
        )
    ],
    "outage": [
        group(
            database_error="database postgresql://app@db.example/app: connection refused",
            as_of=75.0,
            heartbeat={"up": False, "error": "connection refused", "age": 75.0},
            member={"active_since": None, "role": "standby"},
            server={"up": None},
            active=None,
        )
    ],
    "server": [group(server={"up": False, "error": "files.example:22: no answer within 30 s"})],
    "hostile": [
        group(
            group="x" * 128,
            members=[{"member_id": "m" * 128, "released": False, "heartbeat_age": 1.0}],
            holder="m" * 128,
            database=f"postgresql://app@{HOSTILE}/app",
            errors=[
                {**ERROR, "path": HOSTILE, "error": HOSTILE},
                {**ERROR, "path": "/in/\u202egpj.exe \x1b[31m\r\n\udcff" + "n" * 240, "error": "e" * 1900},
            ],
            files={"quarantined": 2},
            member={"member_id": "m" * 128},
            settings={"exec": HOSTILE, "url": HOSTILE, "password": "***", "database": HOSTILE, "polling_interval": "1"},
        ),
        group(group="second group"),
    ],
}


class Shown(ftpcoord.StatusServer):  # type: ignore[misc]
    """The real server, with the page of a made-up group."""

    groups: list[dict[str, Any]] = []

    def _route(self, target: str) -> tuple[int, str, str]:
        path, _, query = target.partition("?")
        if path == "/":
            return 200, "text/html", ftpcoord.page(self.groups, 0 if query == "refresh=0" else 5)
        return 404, "text/plain", ""


@pytest.fixture(scope="module")
def shown() -> Iterator[Shown]:
    server = Shown(("127.0.0.1", 0), [])
    yield server
    server.close()


def keep(browser: Browser, name: str, tmp_path: Path) -> None:
    folder = Path(os.environ.get("FTPCOORD_SCREENSHOTS") or tmp_path)
    folder.mkdir(exist_ok=True)
    browser.picture(folder / f"{name}.png")


@pytest.mark.parametrize("name", list(CASES))
def test_the_page_is_readable_on_a_phone_and_on_a_desk_in_light_and_dark(
    browser: Browser, shown: Shown, name: str, tmp_path: Path
) -> None:
    shown.groups = CASES[name]
    for number, (width, scheme) in enumerate(itertools.product((NARROW, WIDE), ("light", "dark"))):
        browser.said.clear()
        browser.open(f"http://127.0.0.1:{shown.port}/?refresh=0&{number}", width, scheme)
        keep(browser, f"{name}-{width}-{scheme}", tmp_path)
        assert not browser.said, "no violation of the policy, no error"
        assert browser.value("document.title") != "owned" and not browser.value("document.scripts.length")
        assert browser.value("document.documentElement.scrollWidth") <= width, "nothing has to be scrolled sideways"
        text: str = browser.value("document.body.innerText")
        for one in shown.groups:
            assert one["group"] in text
            for found in one["problems"]:
                assert ftpcoord.printable(found["problem"][1:]) in text
            for row in one["members"]:
                assert row["member_id"] in text and f"{ftpcoord.SYMBOLS[row['role']]} {row['role']}" in text
            for row in one["backlog"]["first"]:
                assert row["path"] in text and row["why"] in text
            answers = [f"{one['active']} is active", "Work:", "Waiting:"]
            answers += [found["problem"][1:] for found in one["problems"] if "is active" not in found["problem"]]
            if one["active"] and len(shown.groups) == 1:
                places = [text.find(ftpcoord.printable(answer)) for answer in answers]
                assert places == sorted(places) and -1 not in places, "in the order in which it is asked"
            for number, other in enumerate(shown.groups if len(shown.groups) > 1 else []):
                line = browser.value(f"document.querySelector('main > p:nth-of-type({number + 1})').innerText")
                assert line.startswith(f"{'✔' if other['healthy'] else '▲'} {other['group']}: "), line
                place = browser.value(f"document.querySelector('#g{number} h2').innerText")
                assert place == other["group"]
            for row in one["errors"]:
                assert ftpcoord.printable(row["path"]) in text and ftpcoord.printable(row["error"]) in text
        # The stylesheet was let in by its hash, and both schemes have their own colours.
        back = browser.value("getComputedStyle(document.body).backgroundColor")
        assert back == {"light": "rgb(246, 247, 249)", "dark": "rgb(20, 23, 27)"}[scheme]
        assert contrast(browser) >= 4.5, "WCAG AA"
        squeezed = browser.value("""[...document.querySelectorAll("td, th, dd b")].filter(cell => {
            const text = document.createRange();
            text.selectNodeContents(cell);
            return cell.innerText.length <= 12 && text.getBoundingClientRect().height > 32;
        }).map(cell => cell.innerText).join()""")
        assert not squeezed, "short words stand in one line"


def contrast(browser: Browser) -> float:
    """The least contrast of any text with what is behind it, by WCAG's formula."""
    found: float = browser.value("""(() => {
      const parts = c => c.match(/[\\d.]+/g).map(Number);
      const light = c => { const [r, g, b] = parts(c).map(v => { v /= 255;
        return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126*r + 0.7152*g + 0.0722*b; };
      const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
        if (parts(c).length === 3) return c; } return "rgb(255, 255, 255)"; };
      let least = 21;
      for (const e of document.body.querySelectorAll("*:not(svg):not(svg *)")) {
        if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
        const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
        least = Math.min(least, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)); }
      return least; })()""")
    return found


def test_the_page_refreshes_by_itself_until_it_is_told_not_to(browser: Browser, shown: Shown) -> None:
    shown.groups = CASES["healthy"]
    browser.open(f"http://127.0.0.1:{shown.port}/")
    assert browser.value("document.querySelector('meta[http-equiv=refresh]').content") == "5"
    first = time.monotonic()
    shown.groups = [group(group="another")]
    while "another" not in (seen := browser.value("document.body.innerText") or ""):
        assert time.monotonic() - first < 20, seen
        time.sleep(0.2)
    browser.open(f"http://127.0.0.1:{shown.port}/?refresh=0")
    assert browser.value("document.querySelector('meta[http-equiv=refresh]')") is None


def test_a_script_that_got_into_the_page_would_not_run(browser: Browser, shown: Shown) -> None:
    """The policy is the second wall: here the first one, escaping, is taken away."""
    browser.said.clear()
    real = ftpcoord.shown
    try:
        ftpcoord.shown = str
        shown.groups = [group(group=HOSTILE)]
        browser.open(f"http://127.0.0.1:{shown.port}/?refresh=0")
    finally:
        ftpcoord.shown = real
    assert browser.value("document.scripts.length") == 1 and browser.value("document.title") != "owned"
    assert any("Content Security Policy" in text for text in browser.said), browser.said


def test_every_bar_of_the_chart_is_in_the_picture(browser: Browser, shown: Shown) -> None:
    now = int(time.time() // 60)
    minutes = [[now - 58 + n, n % 23 + 1, int(n % 17 == 3), int(n == 40)] for n in range(58)]
    shown.groups = [group(work={"minutes": minutes})]
    browser.open(f"http://127.0.0.1:{shown.port}/?refresh=0")
    found = browser.value("document.querySelectorAll('svg rect title').length")
    assert found == sum(bool(count) for minute in minutes for count in minute[1:])
    assert browser.value("""[...document.querySelectorAll('svg rect')].every(bar => {
        const [a, b] = [bar.getBoundingClientRect(), bar.ownerSVGElement.getBoundingClientRect()];
        return a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1 && a.bottom <= b.bottom + 1; })""")


def test_the_page_of_a_running_member_follows_what_happens(
    browser: Browser, pyftpd: servers.Pyftpd, tmp_path: Path
) -> None:
    database, port = Database("sqlite", f"sqlite:///{tmp_path / 'c.db'}"), servers.free_port()
    with new_folder("pyftpd", pyftpd) as files, Crew(tmp_path, database, files, max_attempts=1) as crew:
        member = crew.start("a", http=f"127.0.0.1:{port}")
        member.wait("elected")
        files.put("good.csv", b"1")
        member.wait("file_done")
        crew.fail()
        files.put("<b>bad<b>.csv", b"1")
        member.wait("file_quarantined")
        browser.said.clear()

        def text() -> str:
            browser.open(f"http://127.0.0.1:{port}/?refresh=0")
            return str(browser.value("document.body.innerText"))

        wait_for(lambda: "1 file is quarantined" in text(), 20)
        seen = text()
        assert "a is active at term 1, since " in seen and "<b>bad<b>.csv" in seen and "this file is no good" in seen
        assert "1 done, at most 1 in a minute" in seen and "a became active at term 1 (vacant)" in seen
        assert browser.value("document.querySelectorAll('svg rect title').length") >= 2
        assert not browser.said
        keep(browser, "real", tmp_path)
