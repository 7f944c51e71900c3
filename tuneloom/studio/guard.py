"""Who may talk to the studio: this machine's own page, opened with the token that was printed. Nobody else.

Another web site can make a browser send requests and open websockets to 127.0.0.1, or bring a name of its own to
mean 127.0.0.1. So each request and each websocket handshake must name an allowed host, come from the page itself
where it says where from, and carry the cookie that the printed address was exchanged for.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

TOKEN = "token"  # noqa: S105 the name of a parameter
COOKIE = "tuneloom_studio"
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
        hosts: allowed values of the Host header, port included.
        token: good for one exchange against the cookie.
        max_body: bytes of a request's body, at most.
    """

    def __init__(self, app: App, hosts: Iterable[str], token: str, *, max_body: int = 600 << 20) -> None:
        self.app = app  # by this name the framework finds its server
        self.hosts = frozenset(host.lower() for host in hosts)
        self.max_body = max_body
        self._token: str | None = token
        self._session = secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, exchange the token, or refuse."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        reason = self._refusal(scope, headers)
        if reason is not None:
            await _refuse(scope, send, *reason)
        elif scope["type"] == "http" and (place := self._exchanged(scope)) is not None:
            await self._welcome(send, place)
        elif not self._known(headers):
            await _refuse(scope, send, 401, "Open the studio with the address that the terminal shows.")
        else:
            await self.app(scope, receive, _with_headers(send) if scope["type"] == "http" else send)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """Return status and reason where a request is refused whoever sends it."""
        host = headers.get("host", "").lower()
        if host not in self.hosts:
            return 421, "This host is not served here."
        origin = headers.get("origin")
        needs_origin = scope["type"] == "websocket" or scope.get("method") not in _SAFE_METHODS
        if (origin is not None or needs_origin) and origin not in (f"http://{host}", f"https://{host}"):
            return 403, "Requests from other pages are refused."
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            navigation = headers.get("sec-fetch-mode") == "navigate" and scope.get("method") == "GET"
            if not navigation:
                return 403, "Requests from other pages are refused."
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.max_body:
            return 413, "The body is too large."
        return None

    def _exchanged(self, scope: Scope) -> str | None:
        """Return where to go with the cookie, if the request carries the token that is still good."""
        pairs = parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
        given = next((value for key, value in pairs if key == TOKEN), None)
        if given is None or self._token is None or not hmac.compare_digest(given.encode(), self._token.encode()):
            return None
        self._token = None
        rest = urlencode([(key, value) for key, value in pairs if key != TOKEN])
        path = "/" + str(scope["path"]).lstrip("/")
        return path + (f"?{rest}" if rest else "")

    def _known(self, headers: dict[str, str]) -> bool:
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(cookie.value.encode(), self._session.encode())

    async def _welcome(self, send: Send, place: str) -> None:
        cookie = f"{COOKIE}={self._session}; Path=/; HttpOnly; SameSite=Strict"
        # A redirect would arrive without the cookie where the address was opened from elsewhere: SameSite=Strict.
        page = f'<!doctype html><meta http-equiv="refresh" content="0;url={_escaped(place)}">'
        await _answer(send, 200, page.encode(), b"text/html; charset=utf-8", [(b"set-cookie", cookie.encode())])


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")


def _with_headers(send: Send) -> Send:
    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            ours = {name for name, _ in HEADERS}
            kept = [(name, value) for name, value in message.get("headers", []) if name.lower() not in ours]
            message = {**message, "headers": [*kept, *HEADERS]}
        await send(message)

    return sending


async def _refuse(scope: Scope, send: Send, status: int, reason: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": reason})
    else:
        await _answer(send, status, reason.encode(), b"text/plain; charset=utf-8", [])


async def _answer(send: Send, status: int, body: bytes, kind: bytes, extra: list[tuple[bytes, bytes]]) -> None:
    headers = [
        (b"content-type", kind),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        *HEADERS,
        *extra,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
