"""The pages over HTTP, for this machine alone: it reads, and answers nobody who comes by another name."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from flocktune.dashboard.filling import script, style
from flocktune.dashboard.pages import Page, nothing_here, one_run, overview
from flocktune.dashboard.watching import Watch
from flocktune.errors import Problem, UserError

DEFAULT_PORT = 8780
LOOPBACK = "127.0.0.1"

_HEADERS = {
    # Pictures have their widest width as a style attribute; no other inline style is let through, and no inline script.
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; style-src-attr 'unsafe-inline'; "
    "script-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_REPORT = (
    "sandbox allow-scripts; default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
)
"""A report is a file that somebody else may have written: its script reads no other page, and calls nobody."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


def application(watch: Watch, host: str = LOOPBACK) -> App:
    """The pages about ``watch`` as an ASGI application, which is reached at ``host``."""

    def listed(request: Request) -> Response:
        return RedirectResponse("/run/") if "" in watch.found().runs else _page(overview(watch))

    def run(request: Request) -> Response:
        page = one_run(watch, request.path_params.get("path", ""))
        return _page(page) if page else _page(nothing_here(), 404)

    def live_list(request: Request) -> Response:
        return _news(overview(watch), request)

    def live_run(request: Request) -> Response:
        page = one_run(watch, request.path_params.get("path", ""))
        return _news(page, request) if page else JSONResponse({"gone": True})

    def report(request: Request) -> Response:
        written = watch.page(request.path_params.get("path", ""))
        headers = {"Content-Security-Policy": _REPORT}
        if written is None:
            return _page(nothing_here(), 404)
        return FileResponse(written, media_type="text/html; charset=utf-8", headers=headers)

    routes = [
        Route("/", listed),
        Route("/run/{path:path}", run),
        Route("/live", live_list),
        Route("/live/run/{path:path}", live_run),
        Route("/report/{path:path}", report),
        Route("/style.css", lambda request: Response(style(), media_type="text/css")),
        Route("/follow.js", lambda request: Response(script(), media_type="text/javascript")),
    ]
    missing = {404: lambda request, error: _page(nothing_here(), 404)}
    return _guarded(Starlette(routes=routes, exception_handlers=missing), host)


def listen(host: str, port: int | None) -> socket.socket:
    """A socket at ``host``; without a ``port`` at the usual one, or where that is taken at a free one.

    Raises UserError.
    """
    wanted = [DEFAULT_PORT, 0] if port is None else [port]
    for number in wanted:
        try:
            family, kind, protocol, _, place = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
        except (socket.gaierror, UnicodeError) as error:
            raise UserError(Problem("--host", "a name or an address of this machine", f"{host!r} ({error})")) from None
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind(place)
        except OSError as error:
            opened.close()
            if number == wanted[-1]:
                fix = "Give another --port, or 0 for any that is free."
                raise UserError(Problem(f"{host}:{number}", "a free port", str(error), fix)) from None
            continue
        opened.listen(128)
        return opened
    raise AssertionError  # the loop ends by return or raise


def is_loopback(opened: socket.socket) -> bool:
    """Whether only this machine can connect to it."""
    return ipaddress.ip_address(opened.getsockname()[0]).is_loopback


def url_of(opened: socket.socket) -> str:
    """Where a browser on this machine finds it."""
    address, port = opened.getsockname()[:2]
    shown = ipaddress.ip_address(address)
    if shown.is_unspecified:
        shown = ipaddress.ip_address(LOOPBACK if shown.version == 4 else "::1")
    return f"http://[{shown}]:{port}/" if shown.version == 6 else f"http://{shown}:{port}/"


def serve(watch: Watch, opened: socket.socket, host: str) -> None:
    """Answer until Ctrl-C, which raises KeyboardInterrupt."""
    config = uvicorn.Config(
        application(watch, host),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    uvicorn.Server(config).run(sockets=[opened])


def _page(page: Page, status: int = 200) -> Response:
    return HTMLResponse(page.as_html(), status)


def _news(page: Page, request: Request) -> Response:
    """The page as JSON, or an empty object when the browser has it already."""
    return JSONResponse({} if request.query_params.get("known") == page.tag else page.as_dict())


def _guarded(app: App, host: str) -> App:
    """``app`` for those who ask by this machine's name, and only ask to read; every answer carries the headers."""

    async def guard(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        answer: App = app
        if scope["type"] == "http":
            if not _is_ours(Headers(scope=scope).get("host", ""), host):
                # Else a page from elsewhere, whose name its owner lets point here, could read this one.
                answer = PlainTextResponse("This name is not served here: ask for 127.0.0.1 or localhost.\n", 421)
            elif scope["method"] not in ("GET", "HEAD"):
                answer = PlainTextResponse("These pages are only for reading.\n", 405, {"Allow": "GET, HEAD"})
        await answer(scope, receive, with_headers)

    return guard


def _is_ours(asked_for: str, host: str) -> bool:
    """Whether a Host header names this machine: an address can not be made to point elsewhere, a name can."""
    try:
        name = (urlsplit(f"//{asked_for}").hostname or "").lower()
    except ValueError:
        return False
    if name in ("localhost", host.lower()):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return host not in (LOOPBACK, "localhost", "::1") and name == socket.gethostname().lower()
    return True


__all__ = ["application", "is_loopback", "listen", "serve", "url_of"]
