"""Who may talk to the server: whoever knows the token, from a page of this server.

The page shows what may not leave the machine and writes to its disk. Every request needs a cookie that only the link
with the token gives (other users and programs of the machine do not know it); its `Host` must be this server's (a
foreign name that was pointed at this address is refused); what writes must say in `Origin` that a page of this server
asks. Responses forbid scripts, styles and connections from anywhere else, so that text which slipped into the page as
HTML would not run either.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
MOST_BYTES = 16_384
"""Of a request's body; the page's own have some hundred."""
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True)
class Access:
    """Who is let in.

    Attributes:
        hosts: values of `Host` that are this server's, with the port; None for any.
        token: what the link holds; new for each start by default.
        session: what the cookie holds.
    """

    hosts: Collection[str] | None
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    session: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)

    def cookie(self, host: str) -> str:
        """The cookie's name; browsers do not keep the cookies of a machine's ports apart."""
        port = re.search(r":(\d+)$", host)
        return f"sysdag_label_{port[1] if port else 80}"


class Guard:
    """ASGI middleware that refuses what `Access` does not allow, before a route sees it."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no route takes anything else; a browser's socket is closed before it opens
            if scope["type"] == "websocket":
                await receive()
                await send({"type": "websocket.close", "code": 1008, "reason": "There are no sockets here."})
            return
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        entering = self._has_token(scope)
        refusal = self._refusal(scope, headers, host, entering)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered = MutableHeaders(scope=message)
                answered.update(HEADERS)
                if entering and refusal is None:
                    name = self.access.cookie(host)
                    answered.append("set-cookie", f"{name}={self.access.session}; Path=/; HttpOnly; SameSite=Strict")
            await send(message)

        if refusal is not None:
            await PlainTextResponse(refusal + "\n", status_code=403)(scope, receive, answer)
            return
        read = await _body(headers, receive)
        if read is None:
            told = f"A body may have {MOST_BYTES} bytes.\n"
            await PlainTextResponse(told, status_code=413, headers={"connection": "close"})(scope, receive, answer)
            return
        await self.app(scope, read, answer)

    def _refusal(self, scope: Scope, headers: Headers, host: str, entering: bool) -> str | None:
        """Why a request is refused, or None."""
        if self.access.hosts is not None and host not in self.access.hosts:
            return "This server does not serve the host that was asked for. Open the link that sysdag label printed."
        if not entering and not self._has_session(headers, host):
            return "This page needs the link with the token that sysdag label printed. Open that link."
        if scope["method"] not in ("GET", "HEAD") and headers.get("origin", "").lower() != f"http://{host}":
            return "Only pages of this server may write to it."
        return None

    def _has_token(self, scope: Scope) -> bool:
        """Whether it is a first visit by the link; nothing but the page takes a token."""
        if scope["path"] != "/" or scope["method"] != "GET":
            return False
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])
        return secrets.compare_digest(given[-1].encode("utf-8", "replace"), self.access.token.encode())

    def _has_session(self, headers: Headers, host: str) -> bool:
        cookies: SimpleCookie = SimpleCookie()
        try:
            cookies.load(headers.get("cookie", ""))
        except CookieError:
            return False
        given = cookies.get(self.access.cookie(host))
        return given is not None and secrets.compare_digest(given.value.encode(), self.access.session.encode())


async def _body(headers: Headers, receive: Receive) -> Receive | None:
    """What gives a request's body, which has been read; None where it is too large, of which no more is read.

    A client that goes away in between is told of by what the application receives.
    """
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > MOST_BYTES:
        return None
    messages: list[Message] = []
    size = 0
    while not messages or messages[-1].get("more_body", False):
        messages.append(await receive())
        size += len(messages[-1].get("body", b""))
        if size > MOST_BYTES:
            return None

    async def read() -> Message:
        return messages.pop(0) if messages else await receive()

    return read
