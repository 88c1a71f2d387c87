"""The daemon's own pages: /metrics, /-/healthy and /-/ready.

It decides who may read them and what "healthy" means; it refuses to know what is measured and what "ready"
means, which it is given as plain callables.

**Healthy** says only that this process' event loop turns, and turned lately: nothing outside is asked,
because a supervisor that restarts on red would otherwise drop every session in the middle of a contact
centre's outage. **Ready** says whether the daemon does its work now, with the reasons when it does not. With
a token, both metrics and reasons need it; /-/healthy never does, since it says nothing.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Self

from aiohttp import web
from aiohttp.typedefs import Handler

from listener.adapters.exchange import challenge
from listener.errors import SettingsError

TICK_S = 1.0
"""How often the loop shows that it turns."""
STALL_S_MAX = 5.0
"""A loop that stood still for longer is not healthy: sessions are about to be lost."""
STALL_SHOWN_S = 15.0
"""How long a stall stays red. While the loop stands nobody is answered, and when it turns again it is well:
without this memory, a loop that stands still again and again would be green whenever it was asked."""
REQUEST_BYTES_MAX = 1024
"""Nobody posts anything here; a larger body is refused."""
SHUTDOWN_S_MAX = 1.0
"""How long an open request may delay the end; a scrape that takes longer is cut off."""


async def listen(runner: web.AppRunner, section: str, host: str, port: int) -> int:
    """Serve there, and give the port; port 0 takes a free one.

    Raises SettingsError, which names the settings of the section, where that cannot be; then nothing is left
    to clean up.
    """
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise SettingsError(
            f"{section}.host {host}, {section}.port {port}: cannot listen there ({error.strerror}); "
            "stop what listens there, such as another listener with these settings, or set another port"
        ) from None
    bound: int = runner.addresses[0][1]
    return bound


class Operations:
    """A small web server. Enter it as an asynchronous context manager to serve, leave it to stop.

    `metrics` is the handler of /metrics. `not_ready` gives the reasons why the daemon is not ready now, one
    sentence each, and nothing when it is; it is called on the event loop for each request and must not block.
    `port` 0 takes a free port; `port` says which, once it serves.
    """

    def __init__(
        self,
        *,
        metrics: Handler,
        not_ready: Callable[[], Sequence[str]],
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
    ) -> None:
        self.host = host
        self.port = port
        self._not_ready = not_ready
        self._token = token
        self._tick_due = 0.0
        self._stalled_at: float | None = None
        self._stalled_s = 0.0
        self._tick: asyncio.TimerHandle | None = None
        app = web.Application(middlewares=[self._guard], client_max_size=REQUEST_BYTES_MAX)
        app.router.add_get("/metrics", metrics)
        app.router.add_get("/-/healthy", self._healthy)
        app.router.add_get("/-/ready", self._ready)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S_MAX)

    async def __aenter__(self) -> Self:
        self.port = await listen(self._runner, "operations", self.host, self.port)
        self._tick_due = asyncio.get_running_loop().time()
        self._turn()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tick is not None:
            self._tick.cancel()
        await self._runner.cleanup()

    def _turn(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        if (late_s := now - self._tick_due) > STALL_S_MAX:
            self._stalled_at, self._stalled_s = now, late_s
        self._tick_due = now + TICK_S
        self._tick = loop.call_at(self._tick_due, self._turn)

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if self._token is not None and request.path != "/-/healthy":
            refused = challenge(self._token, request.headers.get("Authorization", ""))
            if refused is not None:
                return web.Response(
                    status=401,
                    text="a token is needed; send Authorization: Bearer with operations.token\n",
                    headers={"WWW-Authenticate": refused},
                )
        return await handler(request)

    async def _healthy(self, request: web.Request) -> web.Response:  # noqa: ARG002 - aiohttp's signature
        now = asyncio.get_running_loop().time()
        if self._stalled_at is not None and now - self._stalled_at < STALL_SHOWN_S:
            return web.Response(status=503, text=f"the event loop stood still for {self._stalled_s:.1f} s\n")
        return web.Response(text="healthy\n")

    async def _ready(self, request: web.Request) -> web.Response:  # noqa: ARG002 - aiohttp's signature
        reasons = list(self._not_ready())
        return web.json_response({"ready": not reasons, "reasons": reasons}, status=503 if reasons else 200)
