"""Companions: what a file needs beside it, whose fate they share, and that they are never files themselves."""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import re
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import hostile
import pytest
from conftest import FILE_SERVERS, Files, Logged, new_folder, wait_for
from hostile import PATIENCE, FtpHost, SftpHost, Site, reply
from hypothesis import given
from hypothesis import strategies as st
from memory import NOON, choose, config, found, look, names, row

import ftpcoord
from ftpcoord import Beside, Companions, ConfigError, Entry, Error, NotNow, Seal, Selector

EARLY, LATE = "2026-01-12T10:00", "2026-01-12T14:00"
TEMPLATES = {
    "{name}.ok": "a.csv.ok",
    "{stem}.sum": "a.sum",
    "ok-{name}": "ok-a.csv",
    ".{stem}.done": ".a.done",
    "x{stem}": "xa",
}


def ready(*listing: Any, **settings: Any) -> list[str]:
    files = [found(each) if isinstance(each, str) else each for each in listing]
    return names(choose(Selector(config(**settings), time.monotonic), files).ready)


# -- what makes a file ready ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("template", "name"), TEMPLATES.items())
def test_a_file_is_ready_when_its_companion_is_in_its_folder_and_not_older(template: str, name: str) -> None:
    assert ready("a.csv", name, requires=template) == ["a.csv"]
    assert ready("a.csv", found(name, mtime=LATE), requires=template) == ["a.csv"]
    assert ready("a.csv", found(name, mtime=EARLY), requires=template) == []
    assert ready("a.csv", f"x/{name}", requires=template) == []
    assert ready("x/a.csv", f"x/{name}", requires=template) == ["x/a.csv"]
    assert ready(name, requires=template) == [], "a companion is no file"


def test_all_companions_must_be_there() -> None:
    wanted = {"requires": "{name}.ok, {stem}.sum"}
    assert ready("a.csv", "a.csv.ok", **wanted) == ready("a.csv", "a.sum", **wanted) == []
    assert ready("a.csv", "a.csv.ok", found("a.sum", mtime=EARLY), **wanted) == []
    assert ready("a.csv", "a.csv.ok", "a.sum", **wanted) == ["a.csv"]


def test_the_stem_is_the_name_without_its_last_suffix() -> None:
    listing = ("a.tar.gz", "a.tar.sum", "README", "README.sum", "b.tar.gz", "b.sum")
    assert ready(*listing, requires="{stem}.sum") == ["README", "a.tar.gz"]


def test_several_files_may_share_a_companion() -> None:
    assert ready("a.csv", "a.xml", "a.sum", "b.csv", requires="{stem}.sum") == ["a.csv", "a.xml"]


def test_companions_are_found_in_any_case_if_that_is_asked_for() -> None:
    assert ready("A.CSV", "a.csv.ok", "b.csv", "B.csv.OK", requires="{name}.Ok", ignore_case=True) == ["A.CSV", "b.csv"]
    assert ready("A.CSV", "a.csv.ok", "b.csv", "B.csv.ok", requires="{name}.ok") == []


TEXTS = st.text("a.b-", max_size=3)


@given(TEXTS, st.sampled_from(["{name}", "{stem}"]), TEXTS, TEXTS)
def test_a_name_is_a_companions_with_anything_in_the_braces(before: str, place: str, after: str, name: str) -> None:
    """Against a slow, obvious model: every text is tried."""
    if not before + after:
        return
    parts = {name[begin:end] for begin in range(len(name) + 1) for end in range(begin, len(name) + 1)}
    try:
        companions = Companions(config(requires=f"{before}{place}{after}", pattern="zzz"))
    except ConfigError:
        return  # of spaces or the like nothing is left
    assert companions.include(name) == any(before + part + after == name for part in parts)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ok", "must have"),
        ("{Name}.ok", "must have"),
        ("{name}{stem}.ok", "must have"),
        ("ok/{name}", "no slash"),
        ("{name}.ok, done/{stem}", "no slash"),
        ("{name}", "the file itself"),
        ("{stem}", "the file itself"),
        ("{stem}.csv", "the file itself"),
    ],
)
def test_a_template_that_cannot_be_is_a_wrong_setting(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"^requires: .*{told}"):
        config(requires=text, pattern="*.xml,*.csv")


def test_a_template_that_would_be_the_file_in_another_case_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigError, match=r"^requires: .*the file itself"):
        config(requires="{stem}.CSV", pattern="*.csv", ignore_case=True)
    assert config(requires="{stem}.CSV", pattern="*.csv").companions() == ["{stem}.CSV"]


def test_the_older_form_is_the_same_is_said_once_and_not_both(logged: Logged) -> None:
    old, new = config(ready_suffix=".ok"), config(requires="{name}.ok")
    assert old.companions() == new.companions() == ["{name}.ok"]
    with pytest.raises(ConfigError, match=r"^ready_suffix and requires: .*\{name\}\.ok"):
        config(ready_suffix=".ok", requires="{name}.sum")
    ftpcoord._warned.clear()
    for _ in range(2):
        ftpcoord.warn_of_weaknesses(old)
        ftpcoord.warn_of_weaknesses(new)
    said = [record.fields["reason"] for record in logged() if record.fields["setting"] == "ready_suffix"]  # type: ignore[attr-defined]
    assert len(said) == 1 and "requires = {name}.ok" in said[0]


# -- what becomes of them ---------------------------------------------------------------------------------------------


def seen(*files: str, **settings: Any) -> Companions:
    selector = Selector(config(requires="{stem}.sum", **settings), time.monotonic)
    choose(selector, [found(name) for name in files])
    return selector.companions


@pytest.mark.parametrize("state", ["", "claimed", "failed", "quarantined"])
def test_a_companion_stays_while_another_listed_file_that_needs_it_is_not_done(state: str) -> None:
    companions = seen("a.csv", "a.xml", "a.sum", "b.csv", "x/a.txt")
    rows = {"/in/a.csv": row("a.csv"), **({"/in/a.xml": row("a.xml", state=state)} if state else {})}
    assert companions.needed("/in/a.sum", "/in/a.csv", rows.get)
    assert not companions.needed("/in/a.sum", "/in/a.xml", rows.get), "the other one is done"
    rows["/in/a.xml"] = row("a.xml")
    assert not companions.needed("/in/a.sum", "/in/a.csv", rows.get)
    rows["/in/a.xml"] = row("a.xml", size=11)
    assert companions.needed("/in/a.sum", "/in/a.csv", rows.get), "of another version"


def test_what_is_not_asked_for_needs_no_companion() -> None:
    companions = seen("a.csv", "a.xml", "a.tmp", "a.sum", pattern="*.csv")
    assert not companions.needed("/in/a.sum", "/in/a.csv", lambda path: None)


def test_a_file_that_was_removed_needs_none_until_it_is_uploaded_anew() -> None:
    selector = Selector(config(requires="{stem}.sum"), time.monotonic)
    listing = [found(name) for name in ("a.csv", "a.xml", "a.sum")]

    def needed() -> bool:
        return selector.companions.needed("/in/a.sum", "/in/a.xml", lambda path: None)

    choose(selector, listing)
    assert needed()
    selector.companions.gone("/in/a.csv")
    assert not needed()
    choose(selector, listing, busy=["/in/a.csv"])
    assert not needed(), "that listing was of before"
    choose(selector, listing)
    assert needed()


def test_a_shared_companion_goes_with_the_last_of_its_files(tmp_path: Path) -> None:
    with FtpHost({"a.csv": b"1", "a.xml": b"2", "a.sum": b"", "b.csv": b"3", "b.sum": b"", "c.sum": b""}) as host:
        site = Site(tmp_path, host.settings, "handler", requires="{stem}.sum", after="delete", max_attempts=1000)
        failing = ["a.xml"]

        @site.listener.on_file("*.xml")
        def handle(file: ftpcoord.File) -> None:
            if file.name in failing:
                raise ValueError("not yet")

        site.listener._routes.reverse()
        with site:
            wait_for(lambda: set(host.files) == {"a.xml", "a.sum", "c.sum"}, PATIENCE, "\n".join(site.log[-20:]))
            site.wait("file_failed", 3, path="/in/a.xml")
            failing.clear()
            wait_for(lambda: set(host.files) == {"c.sum"}, PATIENCE, "\n".join(site.log[-20:]))
            wait_for(lambda: site.row("a.xml") is None, PATIENCE)
        assert host.said("DELE").index("DELE /in/a.csv") < host.said("DELE").index("DELE /in/a.sum")
        assert host.said("DELE").index("DELE /in/b.sum") < host.said("DELE").index("DELE /in/b.csv")


def test_a_shared_companion_goes_with_the_last_of_its_files_also_within_one_poll(tmp_path: Path) -> None:
    with FtpHost({"a.csv": b"1", "a.xml": b"2", "a.sum": b""}) as host:

        class Waiting(Site):
            def receive(self, file: ftpcoord.File) -> None:
                if file.name == "a.xml":
                    wait_for(lambda: "a.csv" not in host.files and self.row("a.csv") is None, PATIENCE)

        settings = {"requires": "{stem}.sum", "after": "delete", "polling_interval": 60}
        with Waiting(tmp_path, host.settings, "handler", **settings) as site:
            wait_for(lambda: not host.files, PATIENCE, "\n".join(site.log[-20:]))


def left_with_a_due_action(tmp_path: Path, host: FtpHost, settings: dict[str, Any]) -> Site:
    """A member that ended between its file's `done` and the file's removal."""
    host.on("DELE", reply("450 busy"), times=None)
    with Site(tmp_path, host.settings, "handler", **settings) as site:
        site.wait("file_failed")
    with contextlib.closing(sqlite3.connect(tmp_path / "coordination.db")) as database, database:
        assert database.execute("UPDATE file_ledger SET next_attempt_at = NULL").rowcount == 1
    return site


def test_an_after_action_that_is_due_at_a_takeover_leaves_what_another_file_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is acted on before the first listing has told who needs what, however long a look at it takes."""
    settings = {"requires": "{stem}.sum", "after": "delete", "max_attempts": 1000}
    with FtpHost({"a.csv": b"1", "a.sum": b""}) as host:
        left_with_a_due_action(tmp_path, host, settings)
        host.put("a.xml", b"2")
        host.behave()
        choose = Selector.choose

        def slowly(*arguments: Any) -> ftpcoord.Choice:
            with contextlib.suppress(AssertionError):
                wait_for(lambda: "a.csv" not in host.files, 0.5)
            return choose(*arguments)

        monkeypatch.setattr(Selector, "choose", slowly)

        class Failing(Site):
            def receive(self, file: ftpcoord.File) -> None:
                if not self.all("file_failed"):
                    raise ValueError
                assert "a.sum" in host.files

        with Failing(tmp_path, host.settings, "handler", **settings) as site:
            wait_for(lambda: not host.files, PATIENCE, "\n".join(site.log[-20:]))
            site.wait("file_done", path="/in/a.xml")


def test_while_a_group_is_paused_nobody_acts_before_it_is_known_who_needs_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"requires": "{stem}.sum", "after": "delete", "max_attempts": 1000}
    with FtpHost({"a.csv": b"1", "a.sum": b""}) as host:
        site = left_with_a_due_action(tmp_path, host, settings)
        host.behave()
        ftpcoord.command_pause([site.listener.config], argparse.Namespace(seconds=None))
        sessions, act, looks = host.sessions, ftpcoord.Poller._act_where_due, []

        def noted(poller: ftpcoord.Poller, busy: set[str]) -> None:
            act(poller, busy)
            looks.append(len(poller.workers.busy))

        monkeypatch.setattr(ftpcoord.Poller, "_act_where_due", noted)
        with Site(tmp_path, host.settings, "handler", **settings):
            wait_for(lambda: len(looks) > 3, PATIENCE)
        assert not any(looks) and host.sessions == sessions and len(host.files) == 2


@pytest.mark.parametrize("newer", ["a.csv.ok", "a.sum"])
def test_if_one_of_the_companions_is_newer_than_at_the_claim_none_is_removed(tmp_path: Path, newer: str) -> None:
    files = {"a.csv": b"1", "a.csv.ok": b"", "a.sum": b""}
    with FtpHost(files) as host:

        class Slow(Site):
            def receive(self, file: ftpcoord.File) -> None:
                super().receive(file)
                host.put(newer, b"", 60)

        with Slow(tmp_path, host.settings, "handler", requires="{name}.ok,{stem}.sum", after="delete") as site:
            site.wait("file_kept")
            site.polls()
            assert set(host.files) == set(files) and len(site.handled) == 1


def test_companions_in_another_case_share_the_fate_of_their_file(tmp_path: Path) -> None:
    with FtpHost({"A.CSV": b"1", "a.csv.Ok": b"", "b.csv": b"2"}) as host:
        with Site(tmp_path, host.settings, requires="{name}.ok", ignore_case=True, after="delete") as site:
            site.arrive({"A.CSV": b"1"})
            wait_for(lambda: set(host.files) == {"b.csv"}, PATIENCE, "\n".join(site.log[-20:]))


def test_the_dry_run_names_what_is_missing_and_what_is_a_companion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FtpHost({"a.csv": b"1", "a.csv.ok": b"", "b.csv": b"2", "b.csv.ok": b"", "b.sum": b""}) as host:
        settings = {**host.settings, "database": f"sqlite:///{tmp_path / 'coordination.db'}", "settle": 0}
        ftpcoord.command_dry_run([ftpcoord.Config(**settings, exec="true", requires="{name}.ok, {stem}.sum")])
    said = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()}
    assert re.match(r"skip .*its marker \{stem\}\.sum is not there$", said["/in/a.csv"])
    assert said["/in/b.csv"].startswith("take") and said["/in/b.sum"].endswith("a companion of files")


# -- on real servers --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["vsftpd", "sshd"])
def real(request: pytest.FixtureRequest) -> Iterator[Files]:
    with new_folder(request.param, request.getfixturevalue(FILE_SERVERS[request.param])) as files:
        yield files


@pytest.mark.parametrize("after", ["delete", "move:done"])
def test_companions_are_waited_for_and_end_with_their_file(real: Files, tmp_path: Path, after: str) -> None:
    for name in ("a.csv", "a.xml", "a.sum", "b.csv", "b.csv.ok", "a.csv.ok"):
        real.put(name, name.encode())
    with Site(tmp_path, real.settings, requires="{name}.ok, {stem}.sum", after=after) as site:
        site.arrive({"a.csv": b"a.csv"})
        left = ["a.sum", "a.xml", "b.csv", "b.csv.ok", *(["done"] if after != "delete" else [])]
        wait_for(lambda: real.names() == left, PATIENCE, "\n".join(site.log[-20:]))
        real.put("a.xml.ok")
        site.arrive({"a.csv": b"a.csv", "a.xml": b"a.xml"})
        wait_for(lambda: real.names() == [name for name in left if name[0] != "a"], PATIENCE, "\n".join(site.log[-20:]))


@pytest.mark.parametrize("after", ["delete", "move:done"])
def test_a_file_is_delivered_when_its_digest_fits(real: Files, tmp_path: Path, after: str) -> None:
    content = {name: name.encode() * 50_000 for name in ("a", "b", "c")}
    for name, data in content.items():
        real.put(name, data)
        real.put(f"{name}.sha256", line(data if name != "b" else b"another", name))
    with Site(tmp_path, real.settings, checksum="{name}.sha256", after=after, retry_delay=0.3, max_attempts=9) as site:
        site.arrive({name: content[name] for name in "ac"})
        wait_for(lambda: [name for name in real.names() if name != "done"] == ["b", "b.sha256"], PATIENCE)
        site.wait("file_failed")
        real.put("b.sha256", line(content["b"], "b", "%s *%s\r\n\r\n"), time.time() + 60)
        site.arrive(content)
        wait_for(lambda: [name for name in real.names() if name != "done"] == [], PATIENCE)


# -- checksums --------------------------------------------------------------------------------------------------------


def line(content: bytes, name: str = "a", form: str = "%s  %s\n", algorithm: str = "sha256") -> bytes:
    return (form % (hashlib.new(algorithm, content).hexdigest(), name)).encode()


def verdict(text: bytes, content: bytes = b"content", checksum: str = "{name}.sha256", **more: Any) -> Optional[Error]:
    """What a seal says of a file `a` with this content and this text in its companion."""
    size = more.pop("size", len(text))
    beside: Beside = [(checksum, "/in/c", Entry("c", "file", size, more.pop("mtime", LATE)))]
    seal = Seal(config(checksum=checksum, **more), found("a"), beside)
    for piece in (content[:3], content[3:]):
        seal.update(memoryview(piece))
    seal.text.extend(text)
    return seal.problem()


GOOD = hashlib.sha256(b"content").hexdigest()
BAD = "0" * 64


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"{GOOD.upper()}\n",
        f"\r\n{GOOD} \r\n",
        f"\ufeff{GOOD}\n",
        f"{GOOD}  a\n",
        f"{GOOD} *a\n",
        f"{GOOD} a\n",
        f"{GOOD}\ta",
        f"{GOOD}  ./a\n",
        f"{GOOD}  /home/me/out/a\n",
        f"{BAD}  b\n{GOOD}  a\n{BAD} *a.csv\n{BAD}   a\n{BAD}  a \n",
        f"# made by nobody\n{GOOD}  a\n",
        f"SHA256 (a) = {GOOD}\n",
        f"SHA256 (b) = {BAD}\nMD5 (a) = {'0' * 32}\nSHA256 (a) = {GOOD}\n",
        f"{GOOD}  a\n{GOOD}  x/a\n",
        f"{GOOD}  -\n",
        f"{GOOD} *-\r\n",
    ],
)
def test_a_digest_is_found_in_each_usual_form(text: str) -> None:
    assert verdict(text.encode()) is None
    assert "another content" in str(verdict(text.encode(), b"contend"))


@pytest.mark.parametrize(
    "line", [rf"\{GOOD}  x\\y", rf"\{GOOD} *out/x\\y", rf"\SHA256 (x\\y) = {GOOD}", rf"{GOOD}  x\y"]
)
def test_a_name_with_a_backslash_is_found_as_sha256sum_writes_it(line: str) -> None:
    lines = [f"{BAD}  y", line]
    assert ftpcoord.digests_in(lines, "sha256", lambda name: name == r"x\y") == {GOOD}


@pytest.mark.parametrize("algorithm", ["md5", "sha1", "sha256", "sha512"])
def test_the_suffix_tells_the_algorithm(algorithm: str) -> None:
    digest = hashlib.new(algorithm, b"content").hexdigest()
    for text in (f"{digest}  a".encode(), f"{algorithm.upper()} (a) = {digest}\n".encode()):
        assert verdict(text, checksum=f"{{name}}.{algorithm}") is None
        assert verdict(text, checksum=f"{{stem}}.{algorithm.upper()}") is None
        assert verdict(text, b"other", checksum=f"{{name}}.{algorithm}") is not None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is empty"),
        (" \r\n\n", "is empty"),
        (GOOD[:-1], "has 63 digits and not 64"),
        (f"{GOOD[:32]}  a", "has 32 digits and not 64"),
        (f"{GOOD}  b\n", "has none for it"),
        (f"{GOOD}\n{GOOD}\n", "has none for it"),
        (f"{GOOD}  -\n{GOOD}  b\n", "has none for it"),
        (f"MD5 (a) = {GOOD}\n", "has none for it"),
        ("<html>not found</html>", "has none for it"),
        (f"{GOOD}  a\n{BAD}  x/a\n", "has several for it"),
        (BAD, "is for another content"),
    ],
)
def test_what_is_wrong_with_a_companion_is_said_and_counts_unless_it_is_older(text: str, why: str) -> None:
    said = str(verdict(text.encode()))
    assert said == f"/in/c, which tells its sha256, {why}"
    assert not isinstance(verdict(text.encode()), NotNow)
    assert not isinstance(verdict(text.encode(), mtime=NOON), NotNow)
    older = verdict(text.encode(), mtime=EARLY)
    assert isinstance(older, NotNow) and str(older) == said
    assert BAD not in said and GOOD not in said


def test_a_companion_of_more_than_64_kib_is_not_read() -> None:
    assert "larger than 64 KiB" in str(verdict(b"", size=64 * 1024 + 1))
    assert verdict(GOOD.encode(), size=64 * 1024) is None


def test_names_in_a_companion_are_in_the_servers_encoding_and_may_differ_in_case() -> None:
    raw = "ä".encode("latin-1")
    beside: Beside = [("{name}.md5", "/in/c", Entry("c", "file", 1, NOON))]
    for encoding, name, settings, fits in (
        ("latin-1", "ä", {}, True),
        ("utf-8", "\udce4", {}, True),
        ("latin-1", "Ä", {"ignore_case": True}, True),
        ("latin-1", "Ä", {}, False),
    ):
        seal = Seal(config(checksum="{name}.md5", encoding=encoding, **settings), found(name), beside)
        seal.text.extend(hashlib.md5(b"").hexdigest().encode() + b"  " + raw + b"\n")
        assert (seal.problem() is None) == fits


HEX = st.text("0123456789abcdefABCDEF", min_size=1, max_size=70)
NAMES = st.text("ab.* ()=-/\\é", min_size=1, max_size=5).filter(str.strip)


@given(st.lists(st.tuples(HEX, NAMES), min_size=1, max_size=4), st.sampled_from(["%s  %s", "%s *%s"]), st.data())
def test_a_written_list_tells_the_digests_that_were_written_for_a_name(
    written: list[tuple[str, str]], form: str, data: st.DataObject
) -> None:
    """Against a slow, obvious model."""
    name = data.draw(st.sampled_from([name for _, name in written]))
    lines = [form % each for each in written]
    expected = {digest.lower() for digest, other in written if other.split("/")[-1] == name}
    assert ftpcoord.digests_in(lines, "sha256", lambda other: other == name) == expected


@pytest.mark.parametrize("text", ["{name}.sum", "{name}", "{name}.crc32", "{name}sha256", "x.sha256", "{name}/.md5"])
def test_a_checksum_without_an_algorithm_is_a_wrong_setting(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^checksum: "):
        config(checksum=text)


def test_a_checksum_is_required_without_the_rule_of_age() -> None:
    wanted = {"checksum": "{name}.md5"}
    assert ready("a", **wanted) == ready("a.md5", **wanted) == []
    assert ready("a", found("a.md5", mtime=EARLY), **wanted) == ["a"]
    wanted["requires"] = "{name}.ok, {name}.md5"
    assert config(**wanted).companions() == ["{name}.ok", "{name}.md5"]
    assert ready("a", "a.ok", found("a.md5", mtime=EARLY), **wanted) == ["a"]
    assert ready("a", found("a.ok", mtime=EARLY), "a.md5", **wanted) == []
    assert config(ready_suffix=".ok", checksum="{name}.md5").companions() == ["{name}.ok", "{name}.md5"]


@pytest.mark.parametrize("delivery", ["folder", "handler"])
def test_nothing_is_handed_over_on_a_mismatch_and_a_new_companion_makes_it_due_at_once(
    tmp_path: Path, delivery: str
) -> None:
    with FtpHost({"a": b"content", "a.sha256": BAD.encode(), "b": b"b", "b.sha256": line(b"b", "b")}) as host:
        settings: dict[str, Any] = {"checksum": "{name}.sha256", "after": "delete", "retry_delay": 3000}
        with Site(tmp_path, host.settings, delivery, **settings) as site:
            failed = site.wait("file_failed")
            assert failed["error"] == "/in/a.sha256, which tells its sha256, is for another content"
            site.arrive({"b": b"b"})
            site.polls(3)
            assert site.state("a", "failed")["failures"] == 1 and len(host.said("RETR")) == 4
            host.put("a.sha256", GOOD.encode(), 60)
            site.arrive({"a": b"content", "b": b"b"})
            wait_for(lambda: not host.files, PATIENCE, "\n".join(site.log[-20:]))


def test_a_new_companion_makes_a_file_due_for_one_try() -> None:
    """What goes wrong with that, such as the connection, waits its time again."""
    selector = Selector(config(checksum="{name}.md5"), lambda: 0.0)
    failed = row("a", "failed", due=3000.0)
    listing = [found("a"), found("a.md5")]

    def waits(*files: Any) -> bool:
        return choose(selector, files, failed).waiting == 1

    assert waits(*listing)
    seal = selector.companions.seal(found("a"))
    assert seal.problem() is not None and selector.companions.judged(seal) is not None
    assert waits(*listing)
    listing[1] = found("a.md5", mtime=LATE)
    assert not waits(*listing) and not waits(*listing), "until it is tried"
    selector.companions.seal(found("a"))
    assert waits(*listing)


def test_a_companion_of_more_than_64_kib_is_not_even_asked_for(tmp_path: Path) -> None:
    with FtpHost({"a": b"content", "a.sha256": GOOD.encode() + b"\n" * 65_536}) as host:
        with Site(tmp_path, host.settings, checksum="{name}.sha256", max_attempts=1) as site:
            assert "larger than 64 KiB" in site.wait("file_quarantined")["error"]
            assert not [command for command in host.said("RETR") if "sha256" in command]


@pytest.mark.parametrize("kind", ["sftp", "mdtm", "list"])
def test_a_checksum_is_verified_whatever_tells_of_the_files(tmp_path: Path, kind: str) -> None:
    files = {"a": b"content", "a.md5": hashlib.md5(b"content").hexdigest().encode(), "b": b"b", "b.md5": b"0" * 32}
    with SftpHost(files) if kind == "sftp" else FtpHost(files, mlsd=False) as host:
        for verb in ("MDTM", "SIZE") if kind == "list" else ():
            host.on(verb, reply("502 no"), times=None)
        with Site(tmp_path, host.settings, checksum="{name}.md5", after="delete", retry_delay=3000) as site:
            site.wait("file_failed", path="/in/b")
            wait_for(lambda: set(host.files) == {"b", "b.md5"}, PATIENCE, "\n".join(site.log[-20:]))
            host.put("b.md5", hashlib.md5(b"b").hexdigest().encode(), 2 * 86400)  # LIST shows the day
            site.arrive({"a": b"content", "b": b"b"})


def test_a_mismatch_with_an_older_companion_is_not_counted(tmp_path: Path) -> None:
    with FtpHost({"a": b"content", "a.sha256": BAD.encode()}) as host:
        host.put("a", b"content", 60)
        settings: dict[str, Any] = {"checksum": "{name}.sha256", "max_attempts": 1, "retry_delay": 0.05}
        with Site(tmp_path, host.settings, **settings) as site:
            site.wait("not_now")
            assert site.state("a", "failed")["failures"] == 0 and not site.delivered()
            host.put("a.sha256", GOOD.encode(), 60)
            site.arrive({"a": b"content"})


def test_a_match_counts_at_any_age_and_a_mismatch_ends_in_quarantine(tmp_path: Path) -> None:
    with FtpHost({"a": b"content", "a.sha256": GOOD.encode(), "b": b"b", "b.sha256": BAD.encode()}) as host:
        host.put("a", b"content", 60)
        with Site(tmp_path, host.settings, checksum="{name}.sha256", max_attempts=2, retry_delay=0) as site:
            site.wait("file_quarantined", path="/in/b")
            site.arrive({"a": b"content"})


def test_files_that_went_away_with_a_wrong_digest_take_no_memory(tmp_path: Path) -> None:
    """Each kept its companion's text, 64 KiB at most, until the lease ended."""
    with FtpHost() as host, Site(tmp_path, host.settings, checksum="{name}.sha256", max_attempts=1) as site:
        for number in range(10):
            host.put(f"{number}.sha256", BAD.encode())
            host.put(str(number), b"content")
        site.wait("file_quarantined", 10)
        host.files.clear()
        site.polls(2)
        gc.collect()
        assert sum(isinstance(one, Seal) for one in gc.get_objects()) < 10


@pytest.mark.parametrize("becomes", ["longer", "gone"])
def test_a_companion_that_changes_before_its_fetch_is_no_failure_of_its_file(tmp_path: Path, becomes: str) -> None:
    with FtpHost({"a": b"content", "a.sha256": GOOD[:10].encode()}) as host:

        def changed(session: Any, argument: str) -> None:
            host.files.pop("a.sha256")
            if becomes == "longer":
                host.put("a.sha256", GOOD.encode())
            session.on_retr(argument)

        host.on("RETR", changed)
        with Site(tmp_path, host.settings, checksum="{name}.sha256", max_attempts=1) as site:
            row = wait_for(lambda: site.row("a"), PATIENCE)
            if becomes == "gone":
                row = site.state("a", "failed")
                site.polls()
                assert row["failures"] == 0 and "is not there any more" in row["error"] and not site.delivered()
                host.put("a.sha256", GOOD.encode())
            site.arrive({"a": b"content"})
            assert not site.all("file_failed") and not site.all("file_quarantined")


def test_a_connection_that_ends_while_companions_are_read_costs_no_attempt(tmp_path: Path) -> None:
    files = {f"{number}": f"{number}".encode() for number in range(6)}
    sums = {f"{name}.sha256": line(data, name) for name, data in files.items()}
    with FtpHost({**files, **sums}) as host:
        host.on("RETR", hostile.leave)
        with Site(tmp_path, host.settings, checksum="{name}.sha256", max_attempts=1, workers=1) as site:
            site.arrive(files)
            site.wait("file_done", 6)
            assert {event["attempt"] for event in site.all("file_done")} == {1} and not site.all("file_failed")


def test_several_files_may_share_a_list_of_digests(tmp_path: Path) -> None:
    files = {"a.csv": b"1", "a.xml": b"2"}
    sums = b"".join(line(data, name) for name, data in files.items())
    with FtpHost({**files, "a.sha512": b"", "a.sha256": sums}) as host:
        settings: dict[str, Any] = {"checksum": "{stem}.sha256", "exclude": "*.sha512", "after": "delete", "workers": 1}
        with Site(tmp_path, host.settings, **settings) as site:
            site.arrive(files)
            wait_for(lambda: set(host.files) == {"a.sha512"}, PATIENCE, "\n".join(site.log[-20:]))


def test_a_command_and_a_handler_are_told_the_digest(tmp_path: Path) -> None:
    out = tmp_path / "told"
    with FtpHost({"a": b"content", "a.md5": hashlib.md5(b"content").hexdigest().encode()}) as host:
        command = f"sh -c 'echo $FTPCOORD_SHA256 > {out}'"
        with Site(tmp_path, host.settings, "command", exec=command, checksum="{name}.md5") as site:
            site.wait("file_done")
    assert out.read_text().strip() == GOOD
    digests = []

    class Told(Site):
        def receive(self, file: ftpcoord.File) -> None:
            digests.append(file.sha256)

    with FtpHost({"a": b"content", "b.md5": b"", "a.md5": hashlib.md5(b"content").hexdigest().encode()}) as host:
        for checksum in ("{name}.md5", None):
            (tmp_path / f"{checksum}").mkdir()
            with Told(tmp_path / f"{checksum}", host.settings, "handler", checksum=checksum, pattern="a") as site:
                site.wait("file_done")
    assert digests == [GOOD, ""]


def test_a_companion_is_still_needed_by_what_a_refused_listing_may_hide() -> None:
    selector = Selector(config(requires="{stem}.sum", recursive=True, after="delete"), time.monotonic)
    choose(selector, [found("s/a.csv"), found("s/a.xml"), found("s/a.sum")])
    hidden, whole = ftpcoord.Look(), ftpcoord.Look()
    hidden.refused["/in/s/"] = "550 not now"
    for listing, needed in ((hidden, True), (hidden, True), (whole, False)):
        selector.choose(listing, lambda path: None, set())
        assert selector.companions.needed("/in/s/a.sum", "/in/s/a.csv", lambda path: None) == needed
        assert selector.companions.known("/in/s/a.csv") != needed, "an action that is due waits"


@pytest.mark.parametrize(("there", "newer"), [(True, True), (False, False)])
def test_a_companion_that_came_after_the_claim_is_newer_than_at_the_claim(there: bool, newer: bool) -> None:
    """It vanished between two listings, and what is there now is for the next version."""

    class Server:
        def exists(self, path: str) -> bool:
            return there

    companions = Selector(config(requires="{name}.ok", after="delete"), time.monotonic).companions
    companions.hold([ftpcoord.Work(found("a"), None)], look(found("a")))
    assert companions.look(Server(), "/in/a", lambda path: None) == (["/in/a.ok"] * there, newer)  # type: ignore[arg-type]


def test_a_second_listing_that_hides_a_companion_does_not_make_it_newer() -> None:
    selector = Selector(config(requires="{name}.ok", after="delete"), time.monotonic)
    choose(selector, [found("a"), found("a.ok")])
    hidden = ftpcoord.Look()
    hidden.refused["/in/"] = "450 busy"
    selector.companions.hold([ftpcoord.Work(found("a"), None)], hidden)
    assert [entry for _, _, entry in selector.companions.at_claim("/in/a")] == [found("a.ok").entry]
