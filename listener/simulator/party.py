"""What the simulated PBXs share: a server on loopback, and answers that go wrong, once or from a seed.

A party says what it does with a request and what it then answers; this module decides whether the request
reaches it and whether the answer reaches the client, which are two things: the request behind a cut answer
may have been carried out, and that is the point of most of the faults.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from types import TracebackType
from typing import Any, Final, Self

import msgspec
from aiohttp import web

from listener.errors import SettingsError

STOP_GRACE_S: Final = 0.05
"""How long a server waits for its handlers when it stops."""
REQUEST_BYTES_MAX: Final = 1024 * 1024

Handler = Callable[[web.Request], Awaitable[web.Response]]


class ExchangeFault(StrEnum):
    """What may happen to one request and its answer."""

    REFUSE = "refuse"
    """Not carried out; the party says so in its own way."""
    STATUS = "status"
    """Not carried out; HTTP `status`."""
    REDIRECT = "redirect"
    """Not carried out; HTTP 302 to `location`."""
    UNHEARD = "unheard"
    """Not carried out; the connection is cut."""
    CUT_BEFORE = "cut_before"
    """Carried out; the connection is cut before the first byte of the answer."""
    CUT_DURING = "cut_during"
    """Carried out; the connection is cut in the middle of the answer's body."""
    CUT_AFTER = "cut_after"
    """Carried out and answered; then the connection is cut."""
    NONSENSE = "nonsense"
    """Carried out; the answer is HTTP 200 with a page of HTML."""
    SLOW = "slow"
    """Carried out; the answer comes `seconds` late."""


NOT_CARRIED_OUT: Final = frozenset(
    {ExchangeFault.REFUSE, ExchangeFault.STATUS, ExchangeFault.REDIRECT, ExchangeFault.UNHEARD}
)

LOST: Final = frozenset({ExchangeFault.CUT_BEFORE, ExchangeFault.CUT_DURING, ExchangeFault.NONSENSE})
"""Carried out, and the client never learns what was answered."""

ANSWER_LOST: Final = web.RequestKey("answer_lost", bool)
"""Whether the answer to a request will not be understood: a party whose answer is the only evidence of
something asks, to tell its truth."""


@dataclass(slots=True)
class ArmedExchange:
    """A fault that waits for its request."""

    kind: ExchangeFault
    on: str = "any"
    """The last word of the request's path (dial, subscribe, calls, …), or any."""
    times: int = 1
    seconds: float = 1.0
    status: int = 500
    location: str = "http://127.0.0.1:9/elsewhere"


class ExchangeFaults:
    """The faults that are to come."""

    def __init__(self, seed: int) -> None:
        self.struck: Counter[str] = Counter()
        """How often each has hit."""
        self._armed: list[ArmedExchange] = []
        self._rates: list[tuple[ExchangeFault, float]] = []
        self._on = "any"
        self._rng = Random(f"{seed}:exchanges")

    def arm(self, kind: str, *, on: str = "any", times: int = 1, **details: Any) -> None:
        """Let the next `times` requests to `on` fail so; `details` are fields of `ArmedExchange`."""
        try:
            self._armed.append(ArmedExchange(ExchangeFault(kind), on, times, **details))
        except (ValueError, TypeError) as error:
            names = ", ".join(ExchangeFault)
            raise SettingsError(f"simulator: no such fault ({error}); write one of {names}") from error

    def at_random(self, rates: Mapping[str, float], *, on: str = "any") -> None:
        """From now on requests to `on` fail with these chances (0 to 1 each, their sum at most 1)."""
        try:
            self._rates = [(ExchangeFault(kind), float(rate)) for kind, rate in rates.items()]
        except ValueError as error:
            raise SettingsError(f"simulator: {error}; write one of {', '.join(ExchangeFault)}") from error
        if not 0 <= sum(rate for _, rate in self._rates) <= 1:
            raise SettingsError("simulator: the rates of the faults must add up to at most 1")
        self._on = on

    def clear(self) -> None:
        """Let nothing fail any more."""
        self._armed.clear()
        self._rates.clear()

    def take(self, exchange: str) -> ArmedExchange | None:
        """The fault of this request, if any; it is used up by this."""
        for armed in self._armed:
            if armed.on in ("any", exchange):
                armed.times -= 1
                if armed.times <= 0:
                    self._armed.remove(armed)
                self.struck[armed.kind] += 1
                return armed
        if self._rates and self._on in ("any", exchange):
            chance = self._rng.random()
            for kind, rate in self._rates:
                chance -= rate
                if chance < 0:
                    self.struck[kind] += 1
                    return ArmedExchange(kind)
        return None


class Party:
    """A server on loopback. Use it as an async context manager: it listens inside, and stops at the end.

    A party adds its requests with `route` before it is entered, and runs what goes on beside them with
    `spawn`.
    """

    def __init__(self, *, host: str, port: int, seed: int) -> None:
        self.host = host
        self.port = port
        self.faults = ExchangeFaults(seed)
        self.exchanges: Counter[str] = Counter()
        """Requests that arrived, by the last word of their path."""
        self._app = web.Application(client_max_size=REQUEST_BYTES_MAX)
        self._runner: web.AppRunner | None = None
        self._tasks = asyncio.TaskGroup()
        self._background: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """The base URL, without a path."""
        return f"http://{self.host}:{self.port}"

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        try:
            # A poll ends when its client has gone, and whatever waits when the server stops.
            self._runner = web.AppRunner(
                self._app,
                access_log=None,
                handle_signals=False,
                shutdown_timeout=STOP_GRACE_S,
                handler_cancellation=True,
            )
            await self._runner.setup()
            await web.TCPSite(self._runner, self.host, self.port, backlog=4096).start()
            self.port = self._runner.addresses[0][1]
        except BaseException:
            await self._tasks.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in list(self._background):
            task.cancel()
        try:
            if self._runner is not None:
                if self._runner.server is not None:
                    for connection in list(self._runner.server.connections):
                        if connection.transport is not None:
                            connection.transport.abort()
                await self._runner.cleanup()
        finally:
            # An error of the caller's own stays what it is; only a failed task makes a group of it.
            cancelled = isinstance(error, asyncio.CancelledError)
            await self._tasks.__aexit__(*((kind, error, trace) if cancelled else (None, None, None)))

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine until it is done or the server stops."""
        task = self._tasks.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def route(self, method: str, path: str, handler: Handler, refusal: Callable[[], web.Response]) -> None:
        """Answer requests to this path with `handler`, or as its fault wants; `refusal` is how this party
        says no."""
        exchange = path.rpartition("/")[2]

        async def answered(request: web.Request) -> web.StreamResponse:
            self.exchanges[exchange] += 1
            fault = self.faults.take(exchange)
            request[ANSWER_LOST] = fault is not None and fault.kind in LOST
            if fault is None:
                return await handler(request)
            if fault.kind in NOT_CARRIED_OUT:
                return _not_carried_out(request, fault, refusal)
            response = await handler(request)
            return await _spoiled(request, response, fault)

        self._app.router.add_route(method, path, answered)


def json_answer(body: Any, *, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")


def _not_carried_out(
    request: web.Request, fault: ArmedExchange, refusal: Callable[[], web.Response]
) -> web.StreamResponse:
    match fault.kind:
        case ExchangeFault.REFUSE:
            return refusal()
        case ExchangeFault.STATUS:
            return web.Response(status=fault.status, text="out of order")
        case ExchangeFault.REDIRECT:
            return web.Response(status=302, headers={"Location": fault.location})
        case _:
            return _cut(request)


async def _spoiled(request: web.Request, response: web.Response, fault: ArmedExchange) -> web.StreamResponse:
    body = response.body if isinstance(response.body, bytes) else b""
    match fault.kind:
        case ExchangeFault.CUT_BEFORE:
            return _cut(request)
        case ExchangeFault.CUT_DURING:
            partly = web.StreamResponse(
                status=response.status, headers={"Content-Type": response.content_type}
            )
            partly.content_length = len(body) + 1
            await partly.prepare(request)
            await partly.write(body[: len(body) // 2])
            return _cut(request, partly)
        case ExchangeFault.CUT_AFTER:
            response.force_close()
            return response
        case ExchangeFault.NONSENSE:
            return web.Response(
                text="<html><body>Welcome to your new router</body></html>", content_type="text/html"
            )
        case _:
            await asyncio.sleep(fault.seconds)
            return response


def _cut(request: web.Request, response: web.StreamResponse | None = None) -> web.StreamResponse:
    """Cut the connection; closing it in order keeps what was written, so that it arrives before the end."""
    if request.transport is not None:
        if response is None:
            request.transport.abort()
        else:
            request.transport.close()
    return response or web.Response()
