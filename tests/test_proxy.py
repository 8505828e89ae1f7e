"""Connections to the file server by way of a proxy: CONNECT of HTTP, and SOCKS 5."""

from __future__ import annotations

import base64
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from conftest import Files, fetch, new_folder, wait_for
from hostile import FtpHost, FtpsHost, Gateway, SftpHost, Site, reply, stall_after, unused_port

import ftpcoord

CANARY = "c4n4ry-7f3a9e"
KINDS = ("http", "socks5")


def settings(**more: Any) -> ftpcoord.Config:
    return ftpcoord.Config(**{"database": "sqlite:///unused.db", "url": "ftp://me@files.example/in", **more})


def opened(config: ftpcoord.Config) -> contextlib.closing[ftpcoord.FileServer]:
    return contextlib.closing(ftpcoord.open_server(config))


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "scheme", "user", "host", "port", "password"),
    [
        ("http://gate.example:3128", "http", "", "gate.example", 3128, ""),
        ("http://me:a%40b%2Fc%3A@gate.example:3128/", "http", "me", "gate.example", 3128, "a@b/c:"),
        ("socks5://me@[::1]:1080", "socks5", "me", "::1", 1080, ""),
        ("socks5h://10.0.0.1:1080", "socks5", "", "10.0.0.1", 1080, ""),
    ],
)
def test_a_proxy_is_a_url(url: str, scheme: str, user: str, host: str, port: int, password: str) -> None:
    config = settings(proxy=url)
    assert config.via == ftpcoord.Target(scheme, user, host, port, "") and config.proxy_login() == password


@pytest.mark.parametrize(
    "url",
    [
        f"https://me:{CANARY}@gate.example:3128",
        f"httph://me:{CANARY}@gate.example:3128",
        f"socks4://me:{CANARY}@gate.example:1080",
        f"socks5://me:{CANARY}@gate.example",
        f"http://me:{CANARY}@gate.example:99999",
        f"http://me:{CANARY}/@gate.example:3128",
        f"http://me:{CANARY}@x@gate.example:3128",
        f"http://:{CANARY}@gate.example:3128",
        f"http://me:{CANARY}@gate.example:3128/path",
        f"http://me:{CANARY}@gate\r\nX:3128",
        f"me:{CANARY}@gate.example:3128",
        CANARY,
    ],
)
def test_a_wrong_proxy_is_a_wrong_setting_that_is_not_shown(url: str, tmp_path: Path) -> None:
    (tmp_path / "proxy").write_text(url)
    for more in ({"proxy": url}, {"proxy_file": tmp_path / "proxy"}):
        with pytest.raises(ftpcoord.ConfigError, match=r"^proxy: must look like http://user@host:port or") as caught:
            settings(**more)
        assert CANARY not in str(caught.value)


def test_the_password_comes_from_its_setting_a_file_or_the_url_and_is_not_shown(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(CANARY + "\n")
    for more in (
        {"proxy": "http://me@h:1", "proxy_password": CANARY},
        {"proxy": "http://me@h:1", "proxy_password_file": secret},
        {"proxy": f"http://me:{CANARY}@h:1"},
    ):
        config = settings(**more)
        assert config.proxy_login() == CANARY
        assert CANARY not in f"{config} {config.public()}" and config.public()["proxy"] == "http://me@h:1"
        assert config.holds_secret() == ("proxy_password_file" not in more)
    secret.write_text("rotated")
    assert settings(proxy="http://me@h:1", proxy_password_file=secret).proxy_login() == "rotated"


@pytest.mark.parametrize("more", [{}, {"proxy": "http://h:1"}])
@pytest.mark.parametrize("name", ["proxy_password", "proxy_password_file"])
def test_a_password_needs_a_user(more: dict[str, str], name: str) -> None:
    with pytest.raises(ftpcoord.ConfigError, match=r"^proxy_password: is for a user that proxy names"):
        settings(**more, **{name: CANARY})


@pytest.mark.parametrize(
    ("url", "warned"),
    [("http://me@gate.example:1", True), ("http://me@127.0.0.1:1", False), ("socks5://gate.example:1", False)],
)
def test_a_login_that_goes_to_a_proxy_in_the_clear_is_said(url: str, warned: bool) -> None:
    said = [text for name, text in ftpcoord.weaknesses(settings(proxy=url, url="sftp://me@h/")) if name == "proxy"]
    assert bool(said) == warned


# ---------------------------------------------------------------------------------------------------------------------
# What a proxy is asked for
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["http", "socks5", "socks5h"])
@pytest.mark.parametrize("login", ["", "me:pass word\u00e9"])
@pytest.mark.parametrize("passive", ["EPSV", "PASV"])
def test_all_connections_ask_for_the_name_in_the_url_and_no_server_says_otherwise(
    scheme: str, login: str, passive: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FtpHost(files={"a.csv": b"1", "b.csv": b"22"}) as host, Gateway(scheme.rstrip("h"), login) as gateway:

        def trap(session: Any, argument: str) -> None:
            session.passive = socket.create_server(("127.0.0.1", 0))
            port = session.passive.getsockname()[1]
            session.say(f"227 here (10,9,8,7,{port >> 8},{port & 255})")

        if passive == "PASV":
            host.on("EPSV", reply("500 no"), times=None)
            host.on("PASV", trap, times=None)
        user, _, password = login.partition(":")
        url = f"{scheme}://{user}{'@' if user else ''}127.0.0.1:{gateway.port}"
        more = {**host.settings, "url": f"ftp://me@files.example:{host.port}/in", "proxy": url}
        looked_up: list[str] = []
        resolve = socket.getaddrinfo

        def noted(name: str, *others: Any, **more: Any) -> Any:
            looked_up.append(name)
            return resolve(name, *others, **more)

        monkeypatch.setattr(socket, "getaddrinfo", noted)
        with opened(settings(**more, proxy_password=password or None)) as server:
            got = bytearray()
            assert sorted(entry.name for entry in server.list("/in")) == ["a.csv", "b.csv"]
            fetch(server, "/in/b.csv", 2, got.extend)
            assert bytes(got) == b"22"
        assert gateway.asked[0] == ("files.example", host.port) and len(gateway.asked) == 3
        assert {name for name, _ in gateway.asked} == {"files.example"}
        assert "127.0.0.1" in looked_up and "files.example" not in looked_up
        assert set(gateway.logins) <= {login}


@pytest.mark.parametrize("scheme", KINDS)
@pytest.mark.parametrize("host", ["::1", "2001:db8::7", "192.0.2.7", "b\u00fccher.example", "a" * 60 + ".example"])
def test_literal_addresses_and_names_of_other_letters_are_asked_for(scheme: str, host: str) -> None:
    with Gateway(scheme) as gateway, SftpHost(files={"a": b"1"}) as behind:
        place = f"[{host}]" if ":" in host else host
        config = {**behind.settings, "url": f"sftp://me@{place}:{behind.port}/in", "proxy": gateway.url}
        with opened(settings(**config)) as server:
            assert [entry.name for entry in server.list("/in")] == ["a"]
        shown = place if scheme == "http" else host
        assert gateway.asked == [(shown.encode("idna").decode(), behind.port)]


@pytest.mark.parametrize("scheme", KINDS)
def test_a_proxy_behind_an_address_of_version_6(scheme: str) -> None:
    with FtpHost(files={"a": b"1"}) as host, Gateway(scheme) as gateway:
        with contextlib.suppress(OSError):
            gateway.listener.close()
        try:
            gateway.listener = socket.create_server(("::1", gateway.port), family=socket.AF_INET6)
        except OSError:
            pytest.skip("no IPv6 here")
        threading.Thread(target=gateway._accept, daemon=True).start()
        with opened(settings(**host.settings, proxy=f"{scheme}://[::1]:{gateway.port}")) as server:
            assert [entry.name for entry in server.list("/in")] == ["a"]


@pytest.mark.parametrize("scheme", KINDS)
def test_what_the_server_says_right_behind_the_answer_of_the_proxy_is_the_servers(scheme: str) -> None:
    said = b"HTTP/1.1 200 OK\nX: y\n\n" if scheme == "http" else b"\5\0" + b"\5\0\0\4" + bytes(18)
    heard: list[bytes] = []

    def at_once(sock: Any, _: str) -> None:
        sock.sendall(said + b"220 hello\r\n")
        with contextlib.suppress(OSError):
            while b"USER" not in b"".join(heard):
                heard.append(sock.recv(4096))

    with Gateway(scheme) as gateway:
        gateway.on("ASK", at_once)
        with pytest.raises(ftpcoord.ServerDown, match="closed the connection"):
            ftpcoord.open_server(settings(proxy=gateway.url))
    assert b"USER me\r\n" in b"".join(heard)


def test_the_variables_of_the_environment_lead_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{unused_port()}")
        monkeypatch.setenv(name.upper(), f"socks5://127.0.0.1:{unused_port()}")
    with FtpHost(files={"a": b"1"}) as host, opened(settings(**host.settings)) as server:
        assert [entry.name for entry in server.list("/in")] == ["a"]


@pytest.mark.parametrize("scheme", KINDS)
def test_files_arrive_through_a_proxy_and_a_connection_of_each_worker_is_asked_for(scheme: str, tmp_path: Path) -> None:
    files = {f"{number}.csv": bytes([number]) * 1000 for number in range(20)}
    with FtpHost(files=files) as host, Gateway(scheme, f"me:{CANARY}") as gateway:
        proxy = gateway.url
        with Site(tmp_path, host.settings, proxy=proxy, workers=3, after="delete") as site:
            site.arrive(files)
            wait_for(lambda: not host.files)
        assert len(gateway.asked) > 20 and CANARY not in "".join(site.log)


def test_the_certificate_is_checked_for_the_name_in_the_url(tmp_path: Path) -> None:
    tls = servers.tls_files(tmp_path)
    with FtpsHost(tls / "cert.pem", files={"a": b"1"}) as host, Gateway("http") as gateway:
        for name, right in (("localhost", True), ("files.example", False)):
            more = {**host.settings, "url": f"ftps://me@{name}:{host.port}/in", "proxy": gateway.url}
            if right:
                with opened(settings(**more)) as server:
                    assert [entry.name for entry in server.list("/in")] == ["a"]
            else:
                with pytest.raises(ftpcoord.ServerDown, match="certificate is not trusted"):
                    ftpcoord.open_server(settings(**more))


def test_the_key_of_the_host_is_checked_as_without_a_proxy() -> None:
    with SftpHost() as host, Gateway("socks5") as gateway:
        more = {**host.settings, "proxy": gateway.url, "host_key": "SHA256:another"}
        with pytest.raises(ftpcoord.ServerDown, match="is not the one in host_key; nothing was sent"):
            ftpcoord.open_server(settings(**more))
        assert "LOGIN" not in host.commands


# ---------------------------------------------------------------------------------------------------------------------
# Proxies that refuse, or misbehave
# ---------------------------------------------------------------------------------------------------------------------


def say(*pieces: bytes, pause: float = 0.0, forever: bytes = b"") -> Callable[[Any, str], None]:
    """Answers without listening; then goes on with `forever`, or waits for the other side to go."""

    def act(sock: Any, _: str) -> None:
        with contextlib.suppress(OSError):
            for piece in pieces:
                sock.sendall(piece)
                time.sleep(pause)
            while forever:
                sock.sendall(forever)
                time.sleep(pause)
            while sock.recv(4096):
                pass

    return act


def reset(sock: Any, _: str) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def close(sock: Any, _: str) -> None:
    sock.recv(4096)


BASIC = base64.b64encode(f"me:{CANARY}".encode())
PROXIES_AT_FAULT: list[tuple[str, str, Callable[[Any, str], None], str]] = [
    ("http", "silent", say(), "no answer within 1 s"),
    ("http", "closes", close, "the proxy closed the connection|reset"),
    ("http", "resets", reset, "reset"),
    ("http", "headers without end", say(b"HTTP/1.1 200 OK\r\n", forever=b"X: y\r\n" * 99), "without an end"),
    ("http", "a line without end", say(b"HTTP/1.1 200 ", forever=b"y" * 999), "without an end"),
    ("http", "drips", say(b"HTTP/1.1 200 OK\r\n", forever=b"x", pause=0.03), "no answer within 1 s"),
    ("http", "another protocol", say(b"SSH-2.0-x\r\n"), "the proxy answers no HTTP"),
    ("http", "another version", say(b"HTTP/2 200\r\n\r\n"), "the proxy answers no HTTP"),
    ("http", "no code", say(b"HTTP/1.1 OK\r\n\r\n"), "the proxy refuses: HTTP/1.1 OK"),
    ("http", "half a code", say(b"HTTP/1.1 2xx\r\n\r\n"), "the proxy refuses: HTTP/1.1 2xx"),
    ("http", "nothing", say(b"\r\n\r\n"), "the proxy answers no HTTP"),
    ("http", "forbidden", say(b"HTTP/1.1 403 Filtered\r\n\r\n"), "the proxy refuses: HTTP/1.1 403 Filtered"),
    ("http", "moved", say(b"HTTP/1.1 302 There\r\nLocation: x\r\n\r\n"), "the proxy refuses: HTTP/1.1 302"),
    ("http", "echoes", say(b"HTTP/1.1 403 " + BASIC + CANARY.encode() + b"\r\n\r\n"), r"HTTP/1.1 403 \*\*\*\*\*\*"),
    ("http", "login", say(b"HTTP/1.1 407 Who\r\n\r\n"), "the proxy wants a login, or another one, by Basic.*407"),
    ("socks5", "silent", say(), "no answer within 1 s"),
    ("socks5", "closes", close, "the proxy closed the connection|reset"),
    ("socks5", "resets", reset, "reset"),
    ("socks5", "drips", say(b"\5\0\5\0\0\3\xff", forever=b"x", pause=0.03), "no answer within 1 s"),
    ("socks5", "another protocol", say(b"HTTP/1.1 400 Bad\r\n"), "the proxy answers no SOCKS 5"),
    ("socks5", "version 4", say(b"\0\x5a" + bytes(6)), "the proxy answers no SOCKS 5"),
    ("socks5", "no method that was offered", say(b"\5\1"), "the proxy answers no SOCKS 5"),
    ("socks5", "no method", say(b"\5\xff"), "the proxy wants a login, or another one"),
    ("socks5", "login", say(b"\5\2\1\1"), "the proxy wants a login, or another one"),
    ("socks5", "garbage instead of the reply", say(b"\5\0garbage"), "the proxy answers no SOCKS 5"),
    ("socks5", "an address of no kind", say(b"\5\0\5\0\0\2" + bytes(20)), "the proxy answers no SOCKS 5"),
    ("socks5", "1", say(b"\5\0\5\1\0\1" + bytes(6)), "refuses: SOCKS error 1 general failure"),
    ("socks5", "2", say(b"\5\0\5\2\0\1"), "refuses: SOCKS error 2 not allowed"),
    ("socks5", "3", say(b"\5\0\5\3\0\1"), "refuses: SOCKS error 3 network unreachable"),
    ("socks5", "4", say(b"\5\0\5\4\0\1"), "refuses: SOCKS error 4 host unreachable"),
    ("socks5", "5", say(b"\5\0\5\5\0\1"), "refuses: SOCKS error 5 connection refused"),
    ("socks5", "6", say(b"\5\0\5\6\0\1"), "refuses: SOCKS error 6 TTL expired"),
    ("socks5", "7", say(b"\5\0\5\7\0\1"), "refuses: SOCKS error 7 command not supported"),
    ("socks5", "8", say(b"\5\0\5\x08\0\1"), "refuses: SOCKS error 8 address type not supported"),
    ("socks5", "200", say(b"\5\0\5\xc8\0\1"), "refuses: SOCKS error 200"),
]


@pytest.mark.parametrize(
    ("scheme", "action", "said"),
    [pytest.param(scheme, action, said, id=f"{scheme}-{name}") for scheme, name, action, said in PROXIES_AT_FAULT],
)
def test_trouble_with_the_proxy_is_trouble_with_the_server_that_names_it_and_no_secret(
    scheme: str, action: Callable[[Any, str], None], said: str
) -> None:
    with Gateway(scheme) as gateway:
        gateway.on("ASK", action, times=None)
        config = settings(proxy=f"{scheme}://me@127.0.0.1:{gateway.port}", proxy_password=CANARY, timeout=1)
        began = time.monotonic()
        with pytest.raises(ftpcoord.ServerDown, match=said) as caught:
            ftpcoord.open_server(config)
        assert time.monotonic() - began < 3.0
    assert f" through {scheme}://me@127.0.0.1:{gateway.port}: " in str(caught.value)
    assert CANARY not in str(caught.value) and BASIC.decode() not in str(caught.value)
    # So that no account is locked, a login that is refused is not tried again at once.
    assert isinstance(caught.value, ftpcoord.LoginRefused) == ("wants a login" in said)


@pytest.mark.parametrize("scheme", KINDS)
@pytest.mark.parametrize("login", ["", "me:wrong"])
def test_a_proxy_that_wants_a_login_or_another_one_says_so_and_is_asked_once(
    scheme: str, login: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda *asked, **more: 2 * resolve(*asked, **more))
    user, _, password = login.partition(":")
    with Gateway(scheme, "me:right") as gateway:
        url = f"{scheme}://{user}{'@' if user else ''}127.0.0.1:{gateway.port}"
        with pytest.raises(ftpcoord.LoginRefused, match="the proxy wants a login, or another one"):
            ftpcoord.open_server(settings(proxy=url, proxy_password=password or None))
        assert gateway.sessions == 1


def test_a_login_that_was_not_offered_is_not_given() -> None:
    heard: list[bytes] = []

    def demand(sock: Any, _: str) -> None:
        heard.append(sock.recv(4096))
        sock.sendall(b"\5\2")
        heard.append(sock.recv(4096))

    with Gateway("socks5") as gateway:
        gateway.on("ASK", demand)
        with pytest.raises(ftpcoord.ServerDown, match="answers no SOCKS 5"):
            ftpcoord.open_server(settings(proxy=gateway.url, password="files"))
        wait_for(lambda: len(heard) == 2)
    assert heard == [b"\5\1\0", b""]


@pytest.mark.parametrize("scheme", KINDS)
def test_the_first_pause_after_a_login_that_the_proxy_refused_is_a_minute(scheme: str, tmp_path: Path) -> None:
    with FtpHost() as host, Gateway(scheme, "me:right") as gateway:
        proxy = f"{scheme}://me@127.0.0.1:{gateway.port}"
        with Site(tmp_path, host.settings, proxy=proxy, proxy_password="wrong") as site:
            assert 59 < site.wait("server_down")["retry_in"] <= 60
        assert gateway.sessions == 1 and not host.sessions


@pytest.mark.parametrize("scheme", KINDS)
def test_the_end_of_a_lease_ends_what_goes_through_the_proxy_at_once(scheme: str) -> None:
    with behind(scheme, timeout=30) as (host, gateway, server):
        host.on("RETR", stall_after(1))
        raised: list[BaseException] = []

        def work() -> None:
            try:
                fetch(server, "/in/b", 2, got.extend)
            except ftpcoord.ServerDown as error:
                raised.append(error)

        got = bytearray()
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        wait_for(lambda: host.said("RETR") and len(gateway.asked) == 2)
        began = time.monotonic()
        server.abort()
        thread.join(10)
        assert raised and "aborted" in str(raised[0]) and time.monotonic() - began < 1.0
        wait_for(lambda: gateway.open_sessions == 0, 10, "both connections to be over at the proxy")


@pytest.mark.parametrize("scheme", KINDS)
def test_a_proxy_that_is_not_there_or_has_no_address_is_named(scheme: str) -> None:
    port = unused_port()
    with pytest.raises(ftpcoord.ServerDown, match=f"through {scheme}://127.0.0.1:{port}: connecting: .*refused"):
        ftpcoord.open_server(settings(proxy=f"{scheme}://127.0.0.1:{port}"))
    with pytest.raises(ftpcoord.ServerDown, match=r"the name gate\.invalid cannot be resolved"):
        ftpcoord.open_server(settings(proxy=f"{scheme}://gate.invalid:1"))


@pytest.mark.parametrize(
    "more",
    [
        {"proxy": f"socks5://{'u' * 256}@127.0.0.1:{{}}", "proxy_password": "p"},
        {"proxy": "socks5://u@127.0.0.1:{}", "proxy_password": "\u00e9" * 128},
        {"proxy": "socks5://127.0.0.1:{}", "url": f"ftp://me@{'.'.join(['h' * 50] * 6)}/in"},
    ],
    ids=["user", "password", "host"],
)
def test_what_socks_cannot_say_is_not_cut_to_what_it_can(more: dict[str, str]) -> None:
    with Gateway("socks5", "u:p" if "proxy_password" in more else "") as gateway:
        more = {**more, "proxy": more["proxy"].format(gateway.port)}
        with pytest.raises(ftpcoord.ServerDown, match="no host, user or password of more than 255 bytes"):
            ftpcoord.open_server(settings(**more))
        assert not gateway.asked and not gateway.logins


def test_the_longest_names_of_socks_are_sent() -> None:
    user, password, host = "u" * 255, "p" * 255, ".".join(["h" * 63] * 4)
    with Gateway("socks5", f"{user}:{password}") as gateway:
        gateway.on("CONNECT", say(b"\5\2\0\1"))
        more = {"proxy": f"socks5://{user}@127.0.0.1:{gateway.port}", "url": f"ftp://me@{host}/in"}
        with pytest.raises(ftpcoord.ServerDown, match="not allowed"):
            ftpcoord.open_server(settings(**more, proxy_password=password))
        assert gateway.asked == [(host, 21)] and gateway.logins == [f"{user}:{password}"]


# ---------------------------------------------------------------------------------------------------------------------
# Data connections, and a stop
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def behind(scheme: str, **more: Any) -> Iterator[tuple[FtpHost, Gateway, ftpcoord.FileServer]]:
    with FtpHost(files={"a": b"1", "b": b"22"}) as host, Gateway(scheme) as gateway:
        with opened(settings(**{**host.settings, "proxy": gateway.url, **more})) as server:
            yield host, gateway, server


def forbidden(scheme: str) -> Callable[[Any, str], None]:
    return say(b"HTTP/1.1 403 No\r\n\r\n" if scheme == "http" else b"\5\2\0\1")


@pytest.mark.parametrize("scheme", KINDS)
def test_pasv_is_tried_where_the_proxy_does_not_get_to_the_first_port(scheme: str) -> None:
    with behind(scheme) as (host, gateway, server):
        gateway.on("CONNECT", forbidden(scheme))
        assert sorted(entry.name for entry in server.list("/in")) == ["a", "b"]
        assert host.said("EPSV") and host.said("PASV")


@pytest.mark.parametrize("scheme", KINDS)
@pytest.mark.parametrize("listed", [False, True])
def test_a_proxy_that_gives_no_data_connection_is_trouble_with_the_server(scheme: str, listed: bool) -> None:
    with behind(scheme) as (_, gateway, server):
        if listed:
            server.list("/in")
        gateway.on("CONNECT", forbidden(scheme), times=None)
        with pytest.raises(ftpcoord.ServerDown, match="through" if listed else "not allowed|403 No"):
            server.list("/in")


@pytest.mark.parametrize("scheme", KINDS)
def test_a_data_connection_is_bounded_in_time_as_a_whole(scheme: str) -> None:
    drips = say(b"HTTP/1.1 200 OK\r\n" if scheme == "http" else b"\5\0\0\3\xff", forever=b"x", pause=0.03)
    with behind(scheme) as (_, gateway, server):
        gateway.on("CONNECT", drips, times=None)
        began = time.monotonic()
        with pytest.raises(ftpcoord.ServerDown):
            server.list("/in")
        assert time.monotonic() - began < 4.0, "a second for EPSV, another one for PASV"


@pytest.mark.parametrize("scheme", KINDS)
def test_a_server_that_refuses_and_closes_its_port_is_still_heard(scheme: str) -> None:
    with behind(scheme) as (host, _, server):
        server.list("/in")

        def refuse(session: Any, argument: str) -> None:
            session.passive.close()
            session.say("550 not for you")

        host.on("RETR", refuse)
        with pytest.raises(ftpcoord.FileRefused, match="550 not for you"):
            fetch(server, "/in/a", 1, bytes)
        fetch(server, "/in/b", 2, bytes)


@pytest.mark.parametrize("scheme", KINDS)
@pytest.mark.parametrize("cut", ["abort", "hurry"])
def test_a_stop_cuts_a_connect_while_the_proxy_is_asked(scheme: str, cut: str) -> None:
    with Gateway(scheme) as gateway:
        asked = threading.Event()

        def silent(sock: Any, _: str) -> None:
            sock.recv(1)
            asked.set()
            say()(sock, "")

        gateway.on("ASK", silent)
        server = ftpcoord.new_server(settings(proxy=gateway.url, timeout=60))
        raised: list[BaseException] = []

        def connect() -> None:
            try:
                server.connect()
            except ftpcoord.ServerDown as error:
                raised.append(error)

        thread = threading.Thread(target=connect, daemon=True)
        thread.start()
        assert asked.wait(10)
        began = time.monotonic()
        server.abort() if cut == "abort" else server.hurry(0.0)
        thread.join(10)
        assert raised and "aborted" in str(raised[0]) and time.monotonic() - began < 1.0


# ---------------------------------------------------------------------------------------------------------------------
# What people see, and real proxies
# ---------------------------------------------------------------------------------------------------------------------


def test_check_and_the_status_name_the_proxy_and_no_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FtpHost(files={"a": b"1"}) as host, Gateway("http", f"me:{CANARY}") as gateway:
        more = {**host.settings, "proxy": gateway.url, "database": f"sqlite:///{tmp_path}/c.db", "exec": "true"}
        (tmp_path / "ini").write_text("[a]\n" + "".join(f"{name} = {value}\n" for name, value in more.items()))
        assert ftpcoord.main(["--config", str(tmp_path / "ini"), "check"]) == 0
        said = capsys.readouterr().out
        (config,) = ftpcoord.Config.from_file(str(tmp_path / "ini"))
        status = str(ftpcoord.own_status(ftpcoord.Listener(config))["server"])
    for told in (said, status):
        assert f" through http://me@127.0.0.1:{gateway.port}" in told and CANARY not in told


@pytest.mark.parametrize("kind", ["vsftpd_plain", "vsftpd_explicit", "vsftpd_implicit", "sshd"])
@pytest.mark.parametrize("proxy", ["tinyproxy", "microsocks"])
def test_real_proxies_before_real_servers(proxy: str, kind: str, request: pytest.FixtureRequest) -> None:
    way: servers.Way = request.getfixturevalue(proxy)
    with new_folder(kind, request.getfixturevalue(kind)) as files:
        content = bytes(range(256)) * 4096
        files.put("a.csv", content)
        files.put("b.csv", b"")
        before = way.connections()
        more = {**files.settings, "proxy": way.url, "proxy_password": way.password}
        if files.scheme != "sftp":  # known_hosts has the address
            more["url"] = more["url"].replace(way.host, "localhost")
        with opened(settings(**more)) as server:
            handle(server, files, content)
        assert way.connections() - before >= (1 if files.scheme == "sftp" else 4)
        with pytest.raises(ftpcoord.LoginRefused, match="the proxy wants a login, or another one"):
            ftpcoord.open_server(settings(**{**more, "proxy_password": "wrong"}))
        closed = re_port(more["url"], unused_port())
        with pytest.raises(ftpcoord.ServerDown, match="the proxy refuses"):
            ftpcoord.open_server(settings(**{**more, "url": closed}))


def handle(server: ftpcoord.FileServer, files: Files, content: bytes) -> None:
    root = server.absolute(str(files.root))
    assert sorted((entry.name, entry.size) for entry in server.list(root)) == [("a.csv", 1 << 20), ("b.csv", 0)]
    got = bytearray()
    fetch(server, f"{root}/a.csv", len(content), got.extend)
    fetch(server, f"{root}/b.csv", 0, got.extend)
    assert bytes(got) == content
    server.mkdir(f"{root}/done")
    server.rename(f"{root}/a.csv", f"{root}/done/a.csv")
    server.delete(f"{root}/b.csv")
    assert [entry.name for entry in server.list(root)] == ["done"] == files.names()


def re_port(url: str, port: int) -> str:
    head, _, rest = url.rpartition(":")
    return f"{head}:{port}/{rest.partition('/')[2]}"
