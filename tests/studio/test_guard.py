"""Nobody drives the studio but the page that was opened with its token: each attack against the running server."""

from __future__ import annotations

import re
import socket
from http.client import HTTPConnection, HTTPResponse
from urllib.parse import quote

import pytest

from tuneloom.studio.guard import HEADERS

from .conftest import RunningStudio

websockets = pytest.importorskip("websockets.sync.client")

SOCKET = "/_nicegui_ws/socket.io/?EIO=4&transport=websocket"


class Client:
    """Plain requests to a studio, with its cookie unless told otherwise."""

    def __init__(self, studio: RunningStudio) -> None:
        self.studio = studio
        self.own = {"Host": f"127.0.0.1:{studio.port}", "Origin": studio.base}
        answer = self.ask("GET", studio.url.removeprefix(studio.base))
        assert answer.status == 200
        self.cookie = answer.getheader("set-cookie", "").partition(";")[0]

    def ask(self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b"") -> HTTPResponse:
        connection = HTTPConnection("127.0.0.1", self.studio.port, timeout=20)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        given = {"Host": f"127.0.0.1:{self.studio.port}", **(headers or {})}
        if body:
            given["Content-Length"] = str(len(body))
        for name, value in given.items():
            connection.putheader(name, value)
        connection.endheaders(body or None)
        answer = connection.getresponse()
        self.body = answer.read()
        return answer

    def inside(self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b"") -> HTTPResponse:
        """Ask with the cookie."""
        return self.ask(method, path, {"Cookie": self.cookie, **(headers or {})}, body)

    def look(self, path: str) -> int:
        """Return the status of a page, after where it leads on to."""
        answer = self.inside("GET", path)
        while answer.status == 303:
            answer = self.inside("GET", answer.getheader("location", ""))
        return answer.status

    def websocket_status(self, **headers: str) -> int:
        """Return the status of a websocket handshake; 101: it is open."""
        given = {"Origin": self.studio.base, "Cookie": self.cookie}
        given.update({name.replace("_", "-"): value for name, value in headers.items()})
        lines = [f"{name}: {value}" for name, value in {"Host": f"127.0.0.1:{self.studio.port}", **given}.items() if value]
        text = "\r\n".join(
            [
                f"GET {SOCKET} HTTP/1.1",
                *lines,
                "Connection: Upgrade",
                "Upgrade: websocket",
                "Sec-WebSocket-Version: 13",
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
                "\r\n",
            ]
        )
        with socket.create_connection(("127.0.0.1", self.studio.port), timeout=20) as connection:
            connection.sendall(text.encode())
            return int(connection.recv(4096).split()[1])


@pytest.fixture(scope="module")
def client(studio: RunningStudio) -> Client:
    return Client(studio)


# Who asks.


def test_the_page_opens_with_the_cookie(client: Client) -> None:
    assert client.inside("GET", "/").status == 200
    assert b"Tuneloom" in client.body
    assert client.websocket_status() == 101


@pytest.mark.parametrize("path", ["/", "/runs", "/studio.css", "/_nicegui/3.18.0/static/nicegui.js", "/choose", "/nowhere"])
def test_nothing_is_shown_without_the_cookie(client: Client, path: str) -> None:
    for cookie in ("", f"{client.cookie.partition('=')[0]}=", client.cookie[:-1], f"{client.cookie}x", f"x{client.cookie}"):
        assert client.ask("GET", path, {"Cookie": cookie}).status == 401
        assert b"address that the terminal shows" in client.body
        assert client.websocket_status(Cookie=cookie) == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example:{port}", "", "[::1]:{port}0"]
)
def test_a_foreign_host_is_refused(client: Client, host: str) -> None:
    host = host.format(port=client.studio.port)
    for origin in (client.studio.base, f"http://{host}"):
        assert client.inside("GET", "/", {"Host": host}).status == 421
        assert client.inside("POST", "/", {"Host": host, "Origin": origin}).status == 421
        if host:
            assert client.websocket_status(Host=host, Origin=origin) == 403


def test_a_request_with_two_hosts_is_refused(client: Client) -> None:
    lines = ["GET / HTTP/1.1", f"Host: 127.0.0.1:{client.studio.port}", "Host: evil.example", f"Cookie: {client.cookie}"]
    with socket.create_connection(("127.0.0.1", client.studio.port), timeout=20) as connection:
        connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        assert int(connection.recv(4096).split()[1]) in (400, 421)


def test_the_names_of_this_machine_are_served(client: Client) -> None:
    for name in ("localhost", "LOCALHOST", "[::1]"):
        host = f"{name}:{client.studio.port}"
        assert client.inside("GET", "/", {"Host": host}).status == 200
        assert client.websocket_status(Host=host, Origin=f"http://{host.lower()}") == 101


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "http://127.0.0.1:1", "http://localhost:{port}", "https://127.0.0.1:{port}", "file://", ""],
)
def test_a_foreign_origin_is_refused(client: Client, origin: str) -> None:
    origin = origin.format(port=client.studio.port)
    for method in ("GET", "POST", "PUT", "DELETE"):
        assert client.inside(method, "/choose", {"Origin": origin}).status == 403
    assert client.websocket_status(Origin=origin) == 403  # an empty one: without the header


def test_what_changes_something_must_say_its_origin(client: Client) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        assert client.inside(method, "/choose").status == 403
        assert client.inside(method, "/choose", client.own).status in (404, 405)


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_what_another_page_loads_is_refused(client: Client, site: str) -> None:
    assert client.inside("GET", "/", {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors"}).status == 403
    assert client.inside("GET", "/", {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate"}).status == 200
    assert client.inside("POST", "/", {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", **client.own}).status == 403


def test_what_a_proxy_would_say_is_not_believed(client: Client) -> None:
    """Nobody stands before the studio: who says that he forwards for a safe page is not heard."""
    said = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "evil.example", "X-Forwarded-For": "192.0.2.1"}
    assert client.inside("GET", "/", said).status == 200
    assert b"evil.example" not in client.body
    answer = client.inside("GET", "/runs/", said)
    assert answer.getheader("location", "http://127.0.0.1").startswith(("http://127.0.0.1", "/"))


# The token.


def test_the_token_is_good_once_and_the_cookie_is_kept_from_scripts_and_other_sites(client: Client) -> None:
    studio = client.studio.restart()
    address = studio.url.removeprefix(studio.base)
    for wrong in ("/?token=", "/?token=wrong", f"{address}x", "/?token=%C3%A9%00"):
        assert client.ask("GET", wrong).status == 401
        assert client.ask("GET", wrong).getheader("set-cookie") is None
    assert client.ask("HEAD", address).status == 401  # a preview of the address takes nothing away
    assert client.inside("GET", "/").status == 401, "the cookie of the studio before is good no longer"
    first = client.ask("GET", address)
    assert re.fullmatch(
        rf"tuneloom_studio_{studio.port}=[\w-]{{43}}; Path=/; HttpOnly; SameSite=Strict", first.getheader("set-cookie", "")
    )
    client.cookie = first.getheader("set-cookie", "").partition(";")[0]
    again = client.ask("GET", address)
    assert again.status == 401
    assert again.getheader("set-cookie") is None
    same_browser = client.inside("GET", f"/chat?a=%2F&{address[2:]}")
    assert (same_browser.status, same_browser.getheader("location")) == (303, "/chat?a=%2F")


def test_cookies_of_other_servers_do_not_lock_the_studio(client: Client) -> None:
    cookie = f'theme={{"dark": true}}; b@d[name]=x; ; =; {client.cookie}; last'
    assert client.ask("GET", "/", {"Cookie": cookie}).status == 200


# Where it leads.


@pytest.mark.parametrize(
    "back",
    ["//evil.example", "/\\evil.example", "/\t/evil.example", "/\n/evil.example", "/\r\nSet-Cookie: a=b", "http://evil.example",
     "javascript:alert(1)", "evil.example", "/a\\b", "/%0a/evil.example\n", "/.//evil.example\x00", "\x01//evil.example"],
)  # fmt: skip
def test_a_choice_leads_back_into_the_studio_only(client: Client, back: str) -> None:
    answer = client.inside("GET", f"/choose?theme=dark&back={quote(back, safe='')}")
    assert (answer.status, answer.getheader("location")) == (303, "/")


@pytest.mark.parametrize("back", ["/", "/runs/0123456789abcdef", "/chat?run=0123456789abcdef&a=b%20c"])
def test_a_choice_leads_back_to_where_it_was_made(client: Client, back: str) -> None:
    answer = client.inside("GET", f"/choose?language=zh&back={quote(back, safe='')}")
    assert (answer.status, answer.getheader("location")) == (303, back)
    assert answer.getheader("set-cookie", "").startswith("tuneloom_language=zh;")


@pytest.mark.parametrize(
    "place", ["//evil.example", "/\\evil.example", "/%5Cevil.example", "/%2F%2Fevil.example", "///evil.example"]
)
def test_the_exchange_leads_into_the_studio_only(client: Client, place: str) -> None:
    answer = client.inside("GET", f"{place}?token=x")
    assert answer.status == 303
    assert re.fullmatch(r"/(?![/\\]).*", answer.getheader("location", ""))
    client.ask("GET", f'{place}"><script>?token=x')
    assert re.findall(rb"<(\w+)", client.body) == [b"title", b"meta"]
    assert re.search(rb'url=/(?![/\\])[^"<>]*">$', client.body)


@pytest.mark.parametrize("escape", ["../", "..%2f", "%2e%2e/", "..%5c", "%2e%2e%2f", "....//", "..%252f"])
def test_no_path_leads_out_of_the_studios_files(client: Client, escape: str) -> None:
    page = client.inside("GET", "/")
    assert page.status == 200
    tops = {"/", "/runs/", "/studio.css/", "/_nicegui/auto/static/"}
    tops |= {match.decode() for match in re.findall(rb"/_nicegui/[\w./-]+/", client.body)}
    for top in sorted(tops):
        for target in ("etc/passwd", "proc/self/environ"):
            answer = client.inside("GET", top + escape * 12 + target)
            assert answer.status in (307, 400, 403, 404), (top, escape)
            assert b"root:" not in client.body
            assert b"PYTHONPATH=" not in client.body


@pytest.mark.parametrize(
    "run_id", ["..", "%2e%2e", "..%2F..%2Fetc", "0" * 16, "0" * 5000, "%00", "a%22%20onclick=%22b", "%ff%fe"]
)
def test_a_run_that_is_none_has_no_page(client: Client, run_id: str) -> None:
    assert client.look(f"/runs/{run_id}") < 500
    assert "Traceback" not in client.studio.said()


@pytest.mark.parametrize("path", ["/%00", "/runs/%00", "/runs/a%0Ab", "/a%1Fb", "/_nicegui/auto/%00/a"])
def test_a_path_with_control_characters_is_refused(client: Client, path: str) -> None:
    assert client.inside("GET", path).status == 400


# What it takes and what it sends.


def test_an_oversized_body_is_refused_before_it_is_read(client: Client) -> None:
    for length in ("700000000", "9" * 30, "-1", "1e3", "²"):
        headers = {**client.own, "Content-Length": length.encode().decode("latin-1")}
        assert client.inside("POST", "/choose", headers).status in (400, 413), length


def test_every_answer_carries_the_strict_headers(client: Client) -> None:
    client.inside("GET", "/")
    linked = re.findall(rb'["(](/_nicegui/[\w./-]+\.(?:js|css|ico|woff2))', client.body)
    places = ["/", "/runs", "/nowhere", "/studio.css", "/choose", *sorted({place.decode() for place in linked})]
    assert len(places) > 8
    for place in places:
        for answer in (
            client.inside("GET", place),
            client.ask("GET", place),
            client.ask("GET", place, {"Host": "evil.example"}),
        ):
            for name, value in HEADERS:
                assert answer.getheader(name.decode()) == value.decode(), (place, name)
            assert answer.getheader("server") is None
    policy = dict(rule.split(" ", 1) for rule in client.inside("GET", "/").getheader("content-security-policy", "").split("; "))
    assert policy["frame-ancestors"] == policy["object-src"] == "'none'"
    for kind in ("default-src", "connect-src", "base-uri", "form-action"):
        assert policy[kind] == "'self'"
    assert policy["script-src"] == "'self' 'unsafe-inline' 'unsafe-eval'"
    assert not re.search(r"https?:|\*", " ".join(policy.values()))


def test_the_terminal_stays_calm_when_a_browser_leaves_in_mid_request(client: Client) -> None:
    polling = "/_nicegui_ws/socket.io/?EIO=4&transport=polling"
    for method, path, length in (("GET", polling, 0), ("POST", polling, 99), ("POST", "/nowhere", 99), ("GET", "/", 0)):
        lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in client.own.items()), f"Cookie: {client.cookie}"]
        with socket.create_connection(("127.0.0.1", client.studio.port), timeout=20) as connection:
            connection.sendall(
                ("\r\n".join([*lines, f"Content-Length: {length}"]) + "\r\n\r\nx"[: 5 if length else 4]).encode()
            )
    assert client.inside("GET", polling).status == 426
    assert "Traceback" not in client.studio.said()
    assert "No response" not in client.studio.said()
