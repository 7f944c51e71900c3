"""The guard around a small application, on a real server: limits on bodies, and where a studio may be reached."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import psutil
import pytest
import uvicorn

from tuneloom.errors import UserError
from tuneloom.studio.guard import HEADERS, Guard
from tuneloom.studio.server import _listen, allowed_hosts

LIMIT = 100_000


class Echo:
    """Reads a body whole, and answers with its length; at /files with a page that a user wrote."""

    def __init__(self) -> None:
        self.read = 0
        self.left = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        self.read, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":  # as the framework does
                await send({"type": "http.response.start", "status": 500, "headers": []})
                await send({"type": "http.response.body", "body": b""})
                self.left.set()
                raise RuntimeError("No response returned.")
            self.read += len(message.get("body", b""))
            more = message.get("more_body", False)
        own = [(b"content-type", b"text/html"), (b"Content-Security-Policy", b"default-src *"), (b"x-frame-options", b"ALLOW")]
        await send({"type": "http.response.start", "status": 200, "headers": own})
        await send({"type": "http.response.body", "body": str(self.read).encode()})


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Echo, int, str]]:
    listening = _listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    echo = Echo()
    guard = Guard(echo, allowed_hosts("127.0.0.1", port), "secret", max_body=LIMIT)
    server = uvicorn.Server(uvicorn.Config(guard, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    connection = HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/?token=secret")
    yield echo, port, connection.getresponse().headers["set-cookie"].partition(";")[0]
    server.should_exit = True
    thread.join(timeout=20)


def post(port: int, cookie: str, size: int, chunked: bool, path: str = "/upload") -> tuple[int, bytes, dict[str, str]]:
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    headers = {"Origin": f"http://127.0.0.1:{port}", "Cookie": cookie}
    body: Any = (b"x" * 1000 for _ in range(size // 1000)) if chunked else b"x" * size
    with contextlib.suppress(OSError):  # the server has answered and hung up
        connection.request("POST", path, body=body, headers=headers, encode_chunked=chunked)
    answer = connection.getresponse()
    return answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_up_to_the_limit_is_read(served: tuple[Echo, int, str], chunked: bool) -> None:
    _, port, cookie = served
    assert post(port, cookie, LIMIT, chunked)[:2] == (200, str(LIMIT).encode())


def test_a_body_over_the_limit_is_refused_before_it_is_read_where_it_says_its_length(served: tuple[Echo, int, str]) -> None:
    echo, port, cookie = served
    echo.read = 0
    assert post(port, cookie, LIMIT + 1, chunked=False)[0] == 413
    assert echo.read == 0


def test_a_body_that_does_not_say_its_length_is_cut_at_the_limit(served: tuple[Echo, int, str]) -> None:
    echo, port, cookie = served
    status, body, headers = post(port, cookie, LIMIT + 1000, chunked=True)
    assert (status, body) == (413, b"The body is too large.")
    assert headers["x-content-type-options"] == "nosniff"
    assert 0 < echo.read <= LIMIT


def test_nothing_is_logged_when_a_browser_leaves_in_mid_request(
    served: tuple[Echo, int, str], caplog: pytest.LogCaptureFixture
) -> None:
    echo, port, cookie = served
    echo.left.clear()
    lines = ["POST /upload HTTP/1.1", f"Host: 127.0.0.1:{port}", f"Origin: http://127.0.0.1:{port}", f"Cookie: {cookie}"]
    with caplog.at_level("WARNING"), socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(("\r\n".join([*lines, "Content-Length: 50"]) + "\r\n\r\nx").encode())
        connection.close()
        assert echo.left.wait(timeout=20)
        assert post(port, cookie, 10, chunked=False)[0] == 200  # the server has gone on, past what it would have logged
        assert caplog.records == []


def test_the_guards_headers_replace_the_applications_own_and_files_are_downloads(served: tuple[Echo, int, str]) -> None:
    _, port, cookie = served
    for path in ("/page", "/_nicegui/auto/static/12345/report.html"):
        status, _, headers = post(port, cookie, 10, chunked=False, path=path)
        assert status == 200
        for name, value in HEADERS:
            assert headers[name.decode()] == value.decode()
        assert headers.get("content-disposition") == ("attachment" if "auto" in path else None)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_on_loopback_only_loopbacks_names_are_served(host: str) -> None:
    assert allowed_hosts(host, 7878) == ["127.0.0.1:7878", "[::1]:7878", "localhost:7878"]
    assert allowed_hosts(host, 80) == ["127.0.0.1", "[::1]", "localhost"]  # so a browser names it


def test_on_every_interface_its_addresses_are_served_and_no_names() -> None:
    hosts = allowed_hosts("0.0.0.0", 7878)
    own = [address.address for card in psutil.net_if_addrs().values() for address in card if address.family.name == "AF_INET"]
    assert {f"{address}:7878" for address in own} <= set(hosts)
    assert "0.0.0.0:7878" not in hosts
    assert [host for host in hosts if not host[0].isdigit() and not host.startswith("[")] == ["localhost:7878"]
    assert "192.0.2.7:7878" in allowed_hosts("192.0.2.7", 7878)


def test_a_port_that_is_taken_is_an_error_unless_it_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    with _listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match="cannot listen there"):
            _listen("127.0.0.1", port)
        monkeypatch.setattr("tuneloom.studio.server.DEFAULT_PORT", port)
        with _listen("127.0.0.1", port) as other:
            assert other.getsockname()[1] not in (0, port)
    with pytest.raises(UserError, match="cannot listen there"):
        _listen("192.0.2.7", 0)
