"""Serving the page: on this machine alone, until Ctrl-C."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import threading
import webbrowser
from collections.abc import Callable
from urllib.parse import quote

import uvicorn

from sysdag.errors import LabelError
from sysdag.labelling.app import create_app
from sysdag.labelling.guard import Access
from sysdag.labelling.records import checked_name
from sysdag.labelling.store import LabelStore
from sysdag.traces.trace import Trace

DEFAULT_PORT = 8765
_TICKS = 10  # of the server, in a second
_ALL_ADDRESSES = ("", "0.0.0.0", "::")


def serve(
    store: LabelStore,
    trace: Trace,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    annotator: str | None = None,
    allow_remote: bool = False,
    browser: bool = True,
    announce: Callable[[str], None] = print,
    until: Callable[[], bool] = lambda: False,
) -> bool:
    """Serves the page until SIGINT, or until there is nothing left to do.

    Args:
        host: an address of this machine; other than a loopback one only with `allow_remote`.
        port: 0 for a free one; by default 8765, or a free one where that is taken.
        annotator: whose queue the link opens; by default the page asks.
        browser: opens the link in a browser.
        announce: gets the link when the server listens.
        until: asked about every second; the server ends once it says so.

    Returns:
        Whether `until` ended it.

    Raises:
        LabelError: for an address that others could reach, or that cannot be listened on.
    """
    name = "" if annotator is None else f"&annotator={quote(checked_name(annotator), safe='')}"
    if not allow_remote and not is_loopback(host):
        raise LabelError(
            f"--host {host} lets other machines reach the page, which is not encrypted. Use 127.0.0.1 and a tunnel "
            "(ssh -L), or add --allow-remote."
        )
    with _listening(host, port) as listener:
        port = listener.getsockname()[1]
        access = Access(hosts=_hosts(host, port))
        config = uvicorn.Config(
            create_app(store, trace, access), log_level="warning", access_log=False, lifespan="off",
            timeout_graceful_shutdown=3, server_header=False,
        )  # fmt: skip
        link = f"http://{_shown(host)}:{port}/?token={access.token}{name}"
        server = _Server(config, ready=lambda: _opened(link, browser, announce), until=until)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after it has shut down
            server.run(sockets=[listener])
    return server.is_done


class _Server(uvicorn.Server):
    """Says when it listens, and ends when there is nothing left to do."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None], until: Callable[[], bool]) -> None:
        super().__init__(config)
        self._ready, self._until, self.is_done = ready, until, False

    async def on_tick(self, counter: int) -> bool:
        if counter % _TICKS == 0 and self._until():
            self.is_done = True
        return await super().on_tick(counter) or self.is_done

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listening(host: str, port: int | None) -> socket.socket:
    try:
        return _bound(host, DEFAULT_PORT if port is None else port)
    except OSError as error:
        if port is not None:
            raise LabelError(f"{host}, port {port}: {error.strerror}. --port 0 picks a free one.") from error
    try:
        return _bound(host, 0)
    except OSError as error:
        raise LabelError(f"--host {host}: {error.strerror}; give an address of this machine.") from error


def _bound(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would let two servers have one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _hosts(host: str, port: int) -> set[str] | None:
    """The names that a browser may ask for; None where they cannot be known."""
    if host in _ALL_ADDRESSES:
        return None
    names = {_shown(host).lower()} | ({"127.0.0.1", "localhost", "[::1]"} if is_loopback(host) else set())
    return {f"{name}:{port}" for name in names} | (names if port == 80 else set())  # which browsers leave out


def _shown(host: str) -> str:
    if host in _ALL_ADDRESSES:
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def _opened(link: str, browser: bool, announce: Callable[[str], None]) -> None:
    announce(link)
    if browser:
        threading.Thread(target=webbrowser.open, args=(link,), daemon=True).start()  # some browsers take the terminal
