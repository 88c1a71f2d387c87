"""A party that a request is sent to, played by a server of a few lines: it says what it is told to say.

For what a real party does, see `listener.simulator`; this is for what none should do.
"""

import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

from tests.peers.proxy import HOST

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Party:
    """A server that behaves in one way; `seen` are the requests in order, method and target."""

    url: str
    seen: list[tuple[str, str]]
    port: int

    def posts(self, path: str) -> int:
        """How often this path was posted to."""
        return sum(method == "POST" and target.split("?")[0] == path for method, target in self.seen)


@contextlib.asynccontextmanager
async def party(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[Party]:
    """A party that answers everything so."""
    seen: list[tuple[str, str]] = []

    async def watch(request: web.Request) -> web.StreamResponse:
        seen.append((request.method, request.path_qs))
        await request.read()
        return await handler(request)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", watch)
    runner = web.AppRunner(
        app, handle_signals=False, access_log=None, shutdown_timeout=0.1, handler_cancellation=True
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, HOST, 0, ssl_context=tls).start()
        port = runner.addresses[0][1]
        yield Party(f"{'https' if tls else 'http'}://{HOST}:{port}", seen, port)
    finally:
        await runner.cleanup()


def says(status: int, body: str, content_type: str = "application/json", **headers: str) -> Handler:
    """A party that says this to everything."""

    async def handler(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=body.encode(), content_type=content_type, headers=headers)

    return handler


def cut(sent: bytes) -> Handler:
    """A party that says this much, and then is gone."""

    async def handler(request: web.Request) -> web.StreamResponse:
        transport = request.transport
        assert transport is not None
        transport.write(sent)
        transport.close()
        return web.Response()

    return handler
