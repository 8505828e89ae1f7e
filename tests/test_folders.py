"""Several folders of one server: polled over the same connections, each for itself, with one ledger."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from conftest import Files, wait_for
from hostile import PATIENCE, FtpHost, FtpSession, Host, SftpHost, Site
from memory import config, found

import ftpcoord
from ftpcoord import ConfigError, Selector, Workplace

SERVER = {"url": "sftp://me@files.example", "coordination_group": "g"}

# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "polled"),
    [
        ("/a,/b/c", ["/a", "/b/c"]),
        (" /a ,\n /b/ , ", ["/a", "/b"]),
        ("~/x/,~/,/~/y", ["x", ".", "y"]),
        ("/with%2Ccomma,/a b%25,/%FF", ["/with,comma", "/a b%", "/\udcff"]),
        ("/", ["/"]),
    ],
)
def test_folders_are_absolute_or_below_the_login_folder(text: str, polled: list[str]) -> None:
    assert config(**SERVER, folders=text).polled() == polled


def test_without_them_the_folder_is_that_of_the_url() -> None:
    assert config(url="sftp://me@files.example/~/in%2Cbox").polled() == ["in,box"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"folders": "/a,/b", "coordination_group": ""}, "coordination_group: is required with folders"),
        ({"folders": "/a,/b", "url": "sftp://me@files.example/in"}, "folders: need a url, and one without a path"),
        ({"folders": "/a,/b", "url": "sftp://me@files.example/~/"}, "folders: need a url, and one without a path"),
        ({"folders": "/a", "url": ""}, "folders: need a url, and one without a path"),
        ({"folders": " , "}, "folders: ' ' must begin with / or"),
        ({"folders": "/a,b"}, "folders: 'b' must begin with / or"),
        ({"folders": "/a,~b"}, "folders: '~b' must begin with / or"),
        ({"folders": "/a,/b%0A"}, "folders: '/b%0A' must begin"),
        ({"folders": "/a,/b,/a/"}, "folders: '/a' would be polled twice"),
        ({"folders": "~/a,~/b/../a"}, "folders: 'a' would be polled twice"),
        ({"folders": "/a/b,/a", "recursive": "yes"}, "folders: '/a/b' would be polled twice, in '/a', too"),
        ({"folders": "/a,/", "recursive": "yes"}, "folders: '/a' would be polled twice, in '/', too"),
        ({"folders": "/a,/b", "after": "move:/b"}, "after, after_error: files would be moved into a polled folder"),
        ({"folders": "/a,/b", "after": "move:../b"}, "after, after_error: files would be moved into a polled folder"),
        ({"folders": "/a,/b", "after_error": "move:/a"}, "after, after_error: files would be moved"),
        ({"folders": "/a,/a/b", "after": "move:b"}, "after, after_error: files would be moved into a polled folder"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**{**SERVER, **settings})
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    "settings",
    [
        {"folders": "/a,/a/b"},
        {"folders": "/a,/ab", "recursive": "yes"},
        {"folders": "/a,/b", "after": "move:done"},
        {"folders": "/a,/b", "after": "move:/b/done", "recursive": "yes"},
    ],
)
def test_folders_that_share_no_file_are_taken(settings: dict[str, Any]) -> None:
    assert len(config(**SERVER, **settings).polled()) == 2


# -- what an after-action may touch, and names of copies --------------------------------------------------------------


def test_paths_below_any_of_the_folders_are_below_them_and_no_others() -> None:
    selector = Selector(config(**SERVER, folders="/a,/b/c"), lambda: 0.0)
    for path in ("/a/x", "/a/y/x", "/b/c/x"):
        assert selector.tree.below(path)
    for path in ("/b/x", "/ab/x", "/a/../b/x", "/c", "x", "/b/c/../x", "/a/", "/a//x"):
        assert not selector.tree.below(path)
    assert Selector(config(**SERVER, folders="~/,/b"), lambda: 0.0).tree.below("x/y")
    assert not Selector(config(**SERVER, folders="~/x,/b"), lambda: 0.0).tree.below("y")


def deliver(place: Workplace, name: str, content: bytes, again: bool) -> str:
    file = found(name)
    copy = place.create(file)
    copy.out.write(content)
    copy.close()
    place.name(copy, file, again)
    return copy.path.name


def test_a_first_copy_is_never_taken_for_another_folders_of_the_same_name_and_content(tmp_path: Path) -> None:
    place = Workplace(config(**SERVER, folders="/a,/b", download_dir=tmp_path), 1)
    assert deliver(place, "x.csv", b"1", again=False) == "x.csv"
    assert deliver(place, "x.csv", b"1", again=False) == "x.1.csv"
    assert deliver(place, "x.csv", b"2", again=False) == "x.2.csv"
    assert deliver(place, "x.csv", b"1", again=True) == "x.csv", "it may have been named before a crash"


# -- on a scripted server ---------------------------------------------------------------------------------------------


def site(tmp_path: Path, host: Host, folders: str = "/in/a,/in/b", **changes: Any) -> Site:
    url = host.settings["url"][: -len("/in")]
    settings = {**host.settings, "url": url, "folders": folders, "coordination_group": "g"}
    return Site(tmp_path, settings, changes.pop("delivery", "folder"), **changes)


def two_folders(**files: bytes) -> FtpHost:
    host = FtpHost(files={name.replace("_", "/", 1): content for name, content in files.items()})
    host.folders.update({"/in/a", "/in/b"})
    return host


def test_all_folders_are_polled_over_one_connection_and_files_of_one_name_arrive_side_by_side(tmp_path: Path) -> None:
    with two_folders(a_x=b"1", b_x=b"2", b_y=b"3") as host, site(tmp_path, host, workers=1, after="delete") as at_work:
        at_work.arrive({"x": b"1", "x.1": b"2", "y": b"3"})
        wait_for(lambda: not host.files, PATIENCE, "\n".join(at_work.log))
        assert host.sessions == 1
        at_work.wait("file_done", 3)
        done = [event["path"] for event in at_work.all("file_done")]
        assert sorted(done) == ["/in/a/x", "/in/b/x", "/in/b/y"]


def test_of_one_folder_an_equal_copy_of_the_same_name_is_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "delivered").mkdir()
    (tmp_path / "delivered" / "a").write_bytes(b"1")
    with FtpHost(files={"a": b"1"}) as host, Site(tmp_path, host.settings) as at_work:
        at_work.wait("file_done")
        assert at_work.delivered() == {"a": b"1"}


@pytest.mark.parametrize("equal", [True, False])
def test_equal_files_of_two_folders_are_two_files(tmp_path: Path, equal: bool) -> None:
    with two_folders(a_x=b"1", b_x=b"1" if equal else b"2") as host, site(tmp_path, host) as at_work:
        wait_for(lambda: len(at_work.delivered()) == 2, PATIENCE, "\n".join(at_work.log))
        assert sorted(at_work.delivered().values()) == [b"1", b"1" if equal else b"2"]


def test_a_folder_that_is_missing_or_refused_stops_no_other_and_is_said_each_time(tmp_path: Path) -> None:
    with two_folders(a_x=b"1", b_y=b"2") as host, site(tmp_path, host, delivery="handler") as at_work:
        at_work.arrive({"x": b"1", "y": b"2"})
        before = at_work.state("a/x", "done")
        for again in (1, 2):
            host.folders.remove("/in/a")
            said = at_work.wait("file_refused", again, folder="/in/a")
            assert "550 no such folder" in said["reason"]
            host.files[f"b/z{again}"] = b"3"
            wait_for(lambda n=again: f"z{n}" in at_work.delivered(), PATIENCE)  # type: ignore[misc]
            status = ftpcoord.own_status(at_work.listener)
            assert list(status["server"]["lost"]) == ["/in/a"]
            assert status["server"]["up"] and not at_work.all("server_down")
            told = [finding for finding in ftpcoord.findings(status_of(at_work)) if "/in/a" in finding.text]
            assert [finding.severity for finding in told] == ["problem"]
            host.folders.add("/in/a")
            wait_for(lambda: not ftpcoord.own_status(at_work.listener)["server"]["lost"], PATIENCE)
        at_work.polls()
        assert len(at_work.all("file_refused", folder="/in/a")) == 2
        assert at_work.row("a/x") == before, "nothing in it was forgotten, or dated"
        assert len(at_work.handled) == 4, "nor handled again"


def status_of(at_work: Site) -> dict[str, Any]:
    survey = ftpcoord.Survey(at_work.listener.config)
    return ftpcoord.listener_status(at_work.listener, survey)


def test_rows_of_a_refused_folder_are_not_dated_those_of_others_are(tmp_path: Path) -> None:
    with two_folders(a_x=b"1", b_y=b"2") as host, site(tmp_path, host, ledger_retention=0) as at_work:
        at_work.arrive({"x": b"1", "y": b"2"})
        host.folders.remove("/in/a")
        del host.files["b/y"]
        wait_for(lambda: at_work.row("b/y") is None, PATIENCE, "\n".join(at_work.log))
        at_work.polls()
        assert at_work.row("a/x") is not None


def test_none_that_can_be_listed_is_trouble_with_the_server(tmp_path: Path) -> None:
    with FtpHost() as host, site(tmp_path, host) as at_work:
        at_work.wait("server_down")
        host.folders.update({"/in/a", "/in/b"})
        at_work.wait("server_up")


def test_a_single_run_fails_for_a_folder_that_is_missing(tmp_path: Path) -> None:
    with two_folders(a_x=b"1") as host:
        host.folders.remove("/in/b")
        for missing in (True, False):
            at_work = site(tmp_path, host)
            assert at_work.listener.run(once=True) == missing
            host.folders.add("/in/b")
        assert at_work.delivered() == {"x": b"1"}


def test_a_folder_that_is_named_twice_is_found_after_the_login(tmp_path: Path) -> None:
    """The login folder is the root there."""
    with FtpHost(files={"x": b"1"}) as host, site(tmp_path, host, "/in,~/in") as at_work:
        said = at_work.wait("server_down")
        assert said["error"].endswith("would be polled twice, in /in, too; nothing is claimed")
        assert not at_work.delivered()


def test_a_folder_of_which_nobody_knows_where_it_is_is_not_polled(tmp_path: Path) -> None:
    """There is no REALPATH: it might be one of the others."""
    with SftpHost(files={"x": b"1"}) as host, site(tmp_path, host, "/in,~/in", delivery="handler") as at_work:
        at_work.wait("file_refused", folder="in")
        at_work.arrive({"x": b"1"})
        at_work.polls()
        assert len(at_work.handled) == 1


def test_a_move_target_that_another_folder_is_by_another_name_is_found_after_the_login(tmp_path: Path) -> None:
    with two_folders(a_x=b"1") as host, site(tmp_path, host, "/in/a,~/in/b", after="move:/in/b") as at_work:
        assert "would move files into it again" in at_work.wait("server_down")["error"]
        assert not at_work.delivered()


def test_folders_that_differ_in_case_alone_are_one_where_the_server_has_none(tmp_path: Path) -> None:
    with FtpHost(files={"x": b"1"}) as host:
        host.folders.add("/IN")  # answered to, and not listed
        root = lambda session, argument: session.send(b"type=dir; in\r\n" if session.folder == "/" else b"")  # noqa: E731
        host.on("MLSD", root, None)
        with site(tmp_path, host, "/in,/IN") as at_work:
            assert "polled twice" in at_work.wait("server_down")["error"]


def test_what_is_moved_into_a_tree_of_another_folder_is_not_polled_there(tmp_path: Path) -> None:
    with two_folders(a_x=b"1", b_y=b"2") as host:
        with site(tmp_path, host, after="move:/in/b/done", recursive="yes", delivery="handler") as at_work:
            wait_for(lambda: sorted(host.files) == ["b/done/x", "b/done/y"], PATIENCE, "\n".join(at_work.log))
            at_work.polls(3)
            assert len(at_work.handled) == 2 and sorted(host.files) == ["b/done/x", "b/done/y"]


def test_a_folder_of_that_name_in_another_one_is_polled(tmp_path: Path) -> None:
    with two_folders(**{"a_done/x": b"1", "b_y": b"2"}) as host:
        host.folders.update({"/in/a/done", "/in/b/done"})
        with site(tmp_path, host, after="move:/in/b/done", recursive="yes") as at_work:
            at_work.arrive({"done/x": b"1", "y": b"2"})


# -- the command line -------------------------------------------------------------------------------------------------


def environ(host: Host, tmp_path: Path, folders: str) -> dict[str, str]:
    settings = {
        **host.settings,
        "url": host.settings["url"][: -len("/in")],
        "folders": folders,
        "coordination_group": "g",
        "database": f"sqlite:///{tmp_path / 'c.db'}",
        "download_dir": str(tmp_path),
        "settle": 0,
    }
    return {f"FTPCOORD_{name.upper()}": str(value) for name, value in settings.items()}


@pytest.mark.parametrize("missing", [False, True])
def test_check_and_dry_run_show_each_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: bool
) -> None:
    with two_folders(a_x=b"1", a_y=b"1", b_y=b"2") as host:
        if missing:
            host.folders.remove("/in/a")
        monkeypatch.delenv("FTPCOORD_REQUIRE_ALL", raising=False)  # the run's own
        for name, value in environ(host, tmp_path, "/in/a,/in/b").items():
            monkeypatch.setenv(name, value)
        assert ftpcoord.main(["--config", "env", "check"]) == missing
        said = capsys.readouterr()
        assert f" (/in/a,/in/b), {1 if missing else 3} files" in said.out
        assert ("/in/a: 550 no such folder" in said.err) == missing
        assert ftpcoord.main(["--config", "env", "run", "--dry-run"]) == 0
        out = capsys.readouterr().out
        assert "take  /in/b/y" in out and ("take  /in/a/x" in out) != missing
        assert ("skip  /in/a  /in/a: 550" in out) == missing


def test_the_page_and_the_status_show_the_folders(tmp_path: Path) -> None:
    with two_folders(a_x=b"1") as host, site(tmp_path, host) as at_work:
        at_work.arrive({"x": b"1"})
        status = status_of(at_work)
        assert status["server"]["url"].endswith(" (/in/a,/in/b)")
        assert json.loads(json.dumps(status))["settings"]["folders"] == "/in/a,/in/b"
        assert any("(/in/a,/in/b)" in str(line) for line in ftpcoord._cards(status))


# -- real servers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_server", ["vsftpd", "sshd"], indirect=True)
def test_several_folders_of_a_real_server(file_server: Files, tmp_path: Path) -> None:
    """One absolute, one below the login folder, one with a comma, one that does not exist."""
    for name in ("a/x", "b/sub/x", "c,d/y"):
        file_server.put(name, name.encode())
    root = str(file_server.root)
    below = quote(os.path.relpath(root, file_server.server.root))
    folders = f"{quote(root)}/a,~/{below}/b,{quote(root)}/c%2Cd,{quote(root)}/missing"
    url = file_server.settings["url"].partition("//")[2].partition("/")[0]
    settings = {**file_server.settings, "url": f"{file_server.scheme}://{url}", "coordination_group": "g"}
    work: dict[str, Any] = {"folders": folders, "recursive": "yes", "after": "move:../done", "timeout": 10}
    with Site(tmp_path, settings, **work) as at_work:
        at_work.arrive({"x": b"a/x", "sub/x": b"b/sub/x", "y": b"c,d/y"})
        at_work.wait("file_refused", folder=f"{root}/missing")
        left = {"done/x", "b/done/x", "done/y"}
        wait_for(lambda: all((file_server.root / name).exists() for name in left), PATIENCE, "\n".join(at_work.log))
        at_work.polls(3)
        assert len(at_work.all("file_done")) == 3


def test_a_file_that_failed_once_is_not_taken_for_another_folders_of_the_same_name_and_content(tmp_path: Path) -> None:
    refused: list[str] = []

    def retrieve(session: FtpSession, argument: str) -> None:
        if argument.startswith("/in/y") and not refused:
            refused.append(argument)
            session.say("451 local error")
        else:
            session.on_retr(argument)

    with FtpHost({"x/a": b"1", "y/a": b"1"}) as host:
        host.folders |= {"/in/x", "/in/y"}
        host.on("RETR", retrieve, times=None)
        settings = {**host.settings, "url": host.settings["url"].rpartition("/")[0], "coordination_group": "g"}
        with Site(tmp_path, settings, folders="/in/x,/in/y") as site:
            site.wait("file_done", 2)
            assert refused and sorted(site.delivered().values()) == [b"1", b"1"], "\n".join(site.log)
