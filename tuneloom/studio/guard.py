"""Who may talk to the studio: this machine's own page, opened with the token that was printed. Nobody else.

Another web site can make a browser send requests and open websockets to 127.0.0.1, or bring a name of its own to
mean 127.0.0.1. So each request and each websocket handshake must name an allowed host, come from the page itself
where it says where from, and carry the cookie that the printed address was exchanged for.
"""

from __future__ import annotations

import hmac
import html
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Sequence[tuple[str, str]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

TOKEN = "token"  # noqa: S105 the name of a parameter
COOKIE = "tuneloom_studio"
FILES = "/_nicegui/auto/"
"""Where the framework serves files that a view hands out."""
TOO_LARGE = "The body is too large."
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

# The framework compiles its templates in the page: 'unsafe-eval' and 'unsafe-inline' cannot be left out.
_POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "connect-src 'self'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Guard:
    """ASGI middleware around all of the studio, websockets included.

    Args:
        app: what is guarded.
        hosts: allowed values of the Host header, port included where it is not 80.
        token: good for one exchange against the cookie.
        cookie: the cookie's name; studios on other ports of this machine share its cookies, and need other names.
        max_body: bytes of a request's body, at most.
    """

    def __init__(self, app: App, hosts: Iterable[str], token: str, *, cookie: str = COOKIE, max_body: int = 600 << 20) -> None:
        self.app = app  # by this name the framework finds its server
        self.hosts = frozenset(host.lower() for host in hosts)
        self.cookie = cookie
        self.max_body = max_body
        self._token: str | None = token
        self._session = secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, exchange the token, or refuse."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        known = self._known(headers)
        reason = self._refusal(scope, headers)
        if reason is not None:
            await _refuse(scope, send, *reason)
        elif scope.get("method") == "GET" and (exchange := _exchange(scope)) is not None:
            await self._exchange(send, *exchange, known)
        elif not known:
            await _refuse(scope, send, 401, "Open the studio with the address that the terminal shows.")
        elif scope["type"] == "websocket":
            await self.app(scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        """Return status and reason where a request is refused whoever sends it."""
        hosts, origins = _values(headers, "host"), _values(headers, "origin")
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return 421, "This host is not served here."
        needs_origin = scope.get("method") not in _SAFE_METHODS  # a websocket has no method, and needs it too
        if (origins or needs_origin) and origins != [f"http://{hosts[0].lower()}"]:
            return 403, "Requests from other pages are refused."
        site = _values(headers, "sec-fetch-site") or ["none"]
        opened = _values(headers, "sec-fetch-mode") == ["navigate"] and scope.get("method") == "GET"
        if site[0] not in ("same-origin", "none") and not opened:
            return 403, "Requests from other pages are refused."
        length = (_values(headers, "content-length") or ["0"])[0]
        if not length.isdecimal() or len(length) > 15 or int(length) > self.max_body:
            return 413, TOO_LARGE
        if any(ord(letter) < 32 for letter in str(scope["path"])):
            return 400, "There is no such place."
        return None

    def _known(self, headers: Headers) -> bool:
        """Whether the cookie is there. Other servers of this machine set cookies too, well-formed or not."""
        pairs = [pair.strip().partition("=") for line in _values(headers, "cookie") for pair in line.split(";")]
        given = [value for name, _, value in pairs if name == self.cookie]
        return any(hmac.compare_digest(value.encode(), self._session.encode()) for value in given)

    async def _exchange(self, send: Send, given: str, place: str, known: bool) -> None:
        """Answer the printed address.

        Where it is opened from another page the browser keeps a SameSite=Strict cookie back, on a redirect too; but not
        when our own page then goes on by itself. So the printed address works again in the browser that has the cookie,
        and in another one leads to the refusal.
        """
        if known:
            await _answer(send, 303, b"", b"text/plain; charset=utf-8", [(b"location", place.encode())])
            return
        good = self._token is not None and hmac.compare_digest(given.encode(), self._token.encode())
        extra = []
        if good:
            self._token = None
            extra = [(b"set-cookie", f"{self.cookie}={self._session}; Path=/; HttpOnly; SameSite=Strict".encode())]
        page = f'<!doctype html><title>Tuneloom</title><meta http-equiv="refresh" content="0;url={html.escape(place)}">'
        await _answer(send, 200 if good else 401, page.encode(), b"text/html; charset=utf-8", extra)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through; one whose body turns out too large is answered as such."""
        num_bytes, begun, left, too_large = 0, False, False, False

        async def receiving() -> Message:
            nonlocal num_bytes, left, too_large
            message = await receive()
            num_bytes += len(message.get("body", b""))
            left = left or message["type"] == "http.disconnect"
            too_large = too_large or num_bytes > self.max_body
            return {"type": "http.disconnect"} if too_large else message

        async def sending(message: Message) -> None:
            nonlocal begun
            if (left or too_large) and not begun:
                return
            if message["type"] == "http.response.start":
                begun = True
                message = {**message, "headers": _with_ours(str(scope["path"]), message.get("headers", []))}
            await send(message)

        try:
            await self.app(scope, receiving, sending)
        except Exception:
            # A browser that left before its answer: the framework's middlewares call it an error that there is none.
            if begun or not (left or too_large):
                raise
        if too_large and not begun:
            await _refuse(scope, send, 413, TOO_LARGE)


def _values(headers: Headers, name: str) -> list[str]:
    return [value for key, value in headers if key == name]


def _exchange(scope: Scope) -> tuple[str, str] | None:
    """Return the token that a request carries, and where to go without it; None where it carries none."""
    pairs = parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
    given = next((value for key, value in pairs if key == TOKEN), None)
    if given is None:
        return None
    rest = urlencode([(key, value) for key, value in pairs if key != TOKEN])
    path = "/" + quote(str(scope["path"]).lstrip("/\\"))
    return given, path + (f"?{rest}" if rest else "")


def _with_ours(path: str, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return a response's headers with ours in place of its own; a user's file is a download, never a page."""
    ours = {name for name, _ in HEADERS}
    kept = [(name, value) for name, value in headers if name.lower() not in ours]
    if path.startswith(FILES) and not any(name.lower() == b"content-disposition" for name, _ in kept):
        kept.append((b"content-disposition", b"attachment"))
    return [*kept, *HEADERS]


async def _refuse(scope: Scope, send: Send, status: int, reason: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": reason})
    else:
        await _answer(send, status, reason.encode(), b"text/plain; charset=utf-8", [(b"connection", b"close")])


async def _answer(send: Send, status: int, body: bytes, kind: bytes, extra: Iterable[tuple[bytes, bytes]]) -> None:
    headers = [
        (b"content-type", kind),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        *HEADERS,
        *extra,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
