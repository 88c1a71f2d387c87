"""The two transports of the CometD server, long-polling and websocket, and how faults look on the wire.

What is said is decided in `listener.simulator.bayeux`; this module holds the requests, writes the answers
in CometD's order (a handshake reply first, every other reply after the messages), and breaks them when a
fault is due. It asks its owner who is logged in.

As in CometD, a client that has gone away is not noticed before something is written to it: what is
written then is lost without the ack extension, and comes again with it.
"""

import asyncio
import logging
from collections import deque
from functools import partial
from random import Random
from typing import Any, Final

import msgspec
from aiohttp import WSMsgType, web

from listener.simulator.bayeux import LONG_POLLING, WEBSOCKET, Broker, Reply, ServerSession
from listener.simulator.faults import WEBSOCKET_FAULTS, ArmedFault, Fault, Faults
from listener.simulator.scripts import Message
from listener.simulator.settings import SimulatorSettings

BROWSER_COOKIE: Final = "BAYEUX_BROWSER"
REQUEST_BYTES_MAX: Final = 1 << 20
"""A larger request is answered 413, a larger frame closes its websocket: nobody has that much to say."""
UNANSWERED_S: Final = 120.0
"""How long a half-open connection is kept; then it is cut."""

_log = logging.getLogger(__name__)


class Abort(Exception):
    """The connection is to be cut without an answer."""


class Exchange:
    """One request or frame and what it is answered with: filled while its messages are handled."""

    __slots__ = ("account", "channel", "data", "replies", "request", "session")

    def __init__(self, request: web.Request, account: str, channel: str) -> None:
        self.request = request
        self.account = account
        self.channel = channel
        """Of its first message."""
        self.session: ServerSession | None = None
        self.data: list[Message] = []
        self.replies: list[Reply] = []

    @property
    def kind(self) -> str:
        """handshake | connect | subscribe | …: what a fault may be armed for."""
        return self.channel.rpartition("/")[2]

    @property
    def writable(self) -> bool:
        """False once the client is known to have gone away."""
        return self.request.transport is not None and not self.request.transport.is_closing()

    def compose(self) -> bytes:
        """The body of the answer."""
        written = [msgspec.json.encode(reply) for reply in self.replies]
        messages = [message.raw for message in self.data]
        first = self.channel == "/meta/handshake"
        return b"[" + b",".join([*written, *messages] if first else [*messages, *written]) + b"]"

    def delivered(self) -> None:
        """It was written whole. Without ack that is all the delivery there is."""
        if self.session is not None and not self.session.ack:
            for message in self.data:
                message.delivered = True

    def lost(self) -> None:
        """It was not. With ack its messages are still queued; without, they are gone."""
        if self.session is not None and not self.session.ack:
            self.session.ledger.abandon(self.data)

    def forget(self, broker: Broker) -> None:
        """Let the session be unknown, and the answer say so."""
        self.lost()
        self.data = []
        self.replies = [broker.unknown(reply) for reply in self.replies]
        if self.session is not None:
            broker.remove(self.session, "forgotten")

    def misadvise(self, fault: ArmedFault, broker: Broker) -> None:
        """Replace the advice of every reply by what the fault says."""
        for reply in self.replies:
            if fault.kind is Fault.ADVICE_NULL:
                reply["advice"] = None
            elif fault.kind is Fault.STRING_INTERVAL:
                interval = str(broker.settings.interval_ms)
                reply["advice"] = {**(reply.get("advice") or {}), "interval": interval}
            else:
                reply["advice"] = fault.advice
        if self.session is not None and fault.advice.get("reconnect") in ("none", "handshake"):
            broker.remove(self.session, "forgotten")


class Transports:
    """Long-polling and websocket for one broker. `handle` takes a request whose login is known.

    `closing` is set while the server goes down: what is held then is cut, not answered."""

    def __init__(self, settings: SimulatorSettings, broker: Broker, faults: Faults) -> None:
        self.settings = settings
        self.broker = broker
        self.faults = faults
        self.closing = asyncio.Event()
        self.exchanges = 0
        # Cookies must differ from those before a restart, whatever the seed.
        self._secrets = Random()

    async def poll(self, request: web.Request, account: str, body: bytes) -> web.StreamResponse:
        """Answer one POST."""
        self.exchanges += 1
        if self.faults.take(account, exchange_of(body), arriving=True):
            return await self.never(request)
        try:
            messages = parse(body)
        except ValueError:
            return web.Response(status=400)
        if not messages or (len(messages) > 1 and any(_channel(m) == "/meta/handshake" for m in messages)):
            # CometD Java: "bayeux protocol violation".
            return web.Response(status=500)
        exchange = Exchange(request, account, _channel(messages[0]))
        try:
            new_browser_id = await self._handle(exchange, messages)
            response = await self._answer(exchange)
        except Abort:
            exchange.lost()
            return cut(request)
        if new_browser_id and not response.prepared:
            response.set_cookie(BROWSER_COOKIE, new_browser_id, path="/", httponly=True)
        return response

    async def _handle(self, exchange: Exchange, messages: list[dict[str, Any]]) -> str:
        """Handle the messages of a request; gives a new BAYEUX_BROWSER, if one must be set."""
        loop, broker = asyncio.get_running_loop(), self.broker
        browser_id = exchange.request.cookies.get(BROWSER_COOKIE, "")
        new_browser_id = ""
        session = None if exchange.kind == "handshake" else broker.find(messages[0], browser_id)
        take_queue = False
        for message in messages:
            match _channel(message):
                case "/meta/handshake":
                    if not browser_id:
                        browser_id = new_browser_id = f"{self._secrets.getrandbits(64):016x}"
                    session, reply = broker.handshake(
                        message, exchange.account, browser_id, LONG_POLLING, loop.time()
                    )
                case "/meta/connect":
                    if session is not None and isinstance(session.hold, asyncio.Future):
                        # CometD answers the older of two /meta/connect of a session with an error.
                        self._release(session, session.hold, "superseded")
                    reply, hold_s = broker.connect(session, message, LONG_POLLING, alone=len(messages) == 1)
                    if session is not None:
                        if hold_s is not None and await self._hold(session, hold_s) == "superseded":
                            raise web.HTTPInternalServerError
                        reply, exchange.data = broker.conclude(session, reply, LONG_POLLING, loop.time())
                case _:
                    reply = broker.handle(session, message, loop.time())
                    take_queue = session is not None and not session.ack
            exchange.replies.append(reply)
        exchange.session = session
        if take_queue and session is not None and not session.ended:
            exchange.data += session.take(self.settings.reply_messages_max)[1]
        return new_browser_id

    async def _hold(self, session: ServerSession, hold_s: float) -> str:
        """Hold a /meta/connect until there is a reason to answer it, which is given."""
        loop = asyncio.get_running_loop()
        hold: asyncio.Future[str] = loop.create_future()
        session.hold = hold
        session.notify = partial(self._release, session, hold, "messages")
        timer = loop.call_later(hold_s, self._release, session, hold, "timeout")
        closing = self.closing
        try:
            reason = await hold
        finally:
            timer.cancel()
            self._release(session, hold, "cancelled")
        if closing.is_set():
            raise Abort
        return reason

    def _release(self, session: ServerSession, hold: asyncio.Future[str], reason: str) -> None:
        if session.hold is hold:
            session.hold = session.notify = None
            self.broker.release(session)
            if not hold.done():
                hold.set_result(reason)

    async def _answer(self, exchange: Exchange) -> web.StreamResponse:
        fault = self.faults.take(exchange.account, exchange.kind)
        if fault is None:
            if not exchange.writable:
                raise Abort
            exchange.delivered()
            return _json(exchange.compose())
        match fault.kind:
            case Fault.DELAY:
                await asyncio.sleep(fault.seconds)
            case Fault.ADVICE | Fault.ADVICE_NULL | Fault.STRING_INTERVAL:
                exchange.misadvise(fault, self.broker)
            case Fault.UNKNOWN_CLIENT:
                exchange.forget(self.broker)
            case Fault.NULL_ITEMS:
                exchange.delivered()
                return _json(b"[null," + exchange.compose()[1:-1] + b",null]")
            case _:
                exchange.lost()
                return await self._break(exchange, fault)
        exchange.delivered()
        return _json(exchange.compose())

    async def _break(self, exchange: Exchange, fault: ArmedFault) -> web.StreamResponse:
        """Answer so that the messages do not arrive, or not so that they could be relied upon."""
        body = exchange.compose()
        match fault.kind:
            case Fault.HALF_OPEN:
                return await self.never(exchange.request)
            case Fault.TRUNCATED_JSON:
                return _json(body[: len(body) // 2])
            case Fault.HTML_503:
                page = "<html><body><h1>503 Service Unavailable</h1></body></html>"
                return web.Response(text=page, content_type="text/html", status=503)
            case Fault.HTTP_STATUS:
                return _json(b'{"statusCode":4,"statusMessage":"Simulated"}', status=fault.status)
            case Fault.DROP_MID_REPLY:
                return await _write_part(exchange.request, body, len(body) // 2)
            case Fault.REPLY_LOST:
                tail = sum(len(msgspec.json.encode(reply)) for reply in exchange.replies)
                return await _write_part(exchange.request, body, len(body) - tail - 1)
            case _:
                return cut(exchange.request)

    async def never(self, request: web.Request) -> web.StreamResponse:
        """Leave a request unanswered until the server goes away, or for `UNANSWERED_S`."""
        try:
            async with asyncio.timeout(UNANSWERED_S):
                await self.closing.wait()
        except TimeoutError:
            _log.debug("a half-open connection was kept for %s s", UNANSWERED_S)
        return cut(request)

    async def websocket(self, request: web.Request, account: str) -> web.StreamResponse:
        """Serve one websocket until it is closed."""
        if not self.settings.websocket:
            return web.Response(status=400)
        socket = web.WebSocketResponse(max_msg_size=REQUEST_BYTES_MAX, compress=False)
        await socket.prepare(request)
        endpoint = _WebSocketEndpoint(self, request, socket, account)
        try:
            async with asyncio.TaskGroup() as tasks:
                writer = tasks.create_task(endpoint.write())
                await endpoint.read()
                writer.cancel()
        finally:
            endpoint.detach()
        return socket


class _WebSocketEndpoint:
    """One websocket: what arrives is handled at once; what goes out is written by one task, in order,
    which is woken when there is a reason."""

    def __init__(
        self, transports: Transports, request: web.Request, socket: web.WebSocketResponse, account: str
    ) -> None:
        self._transports = transports
        self._broker = transports.broker
        self._request = request
        self._socket = socket
        self._account = account
        self._session: ServerSession | None = None
        self._answers: deque[tuple[str, Reply]] = deque()
        self._connect: Reply | None = None
        """The reply to the /meta/connect that is being answered or held."""
        self._timer: asyncio.TimerHandle | None = None
        self._due = False
        self._wake = asyncio.Event()

    async def read(self) -> None:
        """Handle the frames until the websocket is closed."""
        async for frame in self._socket:
            if frame.type is not WSMsgType.TEXT:
                continue
            self._transports.exchanges += 1
            body = frame.data.encode()
            if self._transports.faults.take(self._account, exchange_of(body), arriving=True):
                await self._transports.never(self._request)
                return
            try:
                messages = parse(body)
            except ValueError:
                await self._socket.close(code=1011)
                return
            for message in messages:
                self._receive(message, alone=len(messages) == 1)
            self._wake.set()

    def _receive(self, message: dict[str, Any], *, alone: bool) -> None:
        loop, broker, channel = asyncio.get_running_loop(), self._broker, _channel(message)
        if channel == "/meta/handshake":
            self.detach()
            self._session, reply = broker.handshake(message, self._account, "", WEBSOCKET, loop.time())
            self._answers.append((channel, reply))
            return
        if self._session is None or self._session.ended:
            self._session = broker.find(message, None)
        session = self._session
        if session is not None:
            # Another connection of the session, if any, hears nothing from now on.
            session.notify = self._notify
        if channel != "/meta/connect":
            self._answers.append((channel, broker.handle(session, message, loop.time())))
            return
        reply, hold_s = broker.connect(session, message, WEBSOCKET, alone=alone)
        if session is None:
            self._answers.append((channel, reply))
            return
        self._stop_timer()
        self._connect = reply
        self._due = hold_s is None
        if hold_s is not None:
            self._timer = loop.call_later(hold_s, self._time_out)

    def detach(self) -> None:
        """The websocket is gone, or begins another session; the old one may expire from now on."""
        self._stop_timer()
        session, self._session = self._session, None
        if session is not None and session.notify == self._notify:
            session.notify = None
            if self._connect is not None:
                self._broker.expire_later(session, asyncio.get_running_loop().time())
        self._connect = None

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _notify(self) -> None:
        session = self._session
        if session is not None and (session.ack or session.ended):
            self._due = self._connect is not None
        self._wake.set()

    def _time_out(self) -> None:
        self._due = True
        self._wake.set()

    async def write(self) -> None:
        """Write until the connection is closed."""
        while not self._socket.closed:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._flush()
            except (ConnectionError, Abort):
                return

    async def _flush(self) -> None:
        while self._answers:
            channel, reply = self._answers.popleft()
            await self._send(channel, [], [reply])
        session = self._session
        if session is None:
            return
        if self._due and self._connect is not None:
            reply, self._connect, self._due = self._connect, None, False
            self._stop_timer()
            now = asyncio.get_running_loop().time()
            reply, data = self._broker.conclude(session, reply, WEBSOCKET, now)
            await self._send("/meta/connect", data, [reply])
        elif not session.ack and session.fresh:
            # Without the extension, messages do not wait for a /meta/connect.
            await self._send("", session.take(0)[1], [])

    async def _send(self, channel: str, data: list[Message], replies: list[Reply]) -> None:
        """Messages first, in frames of their own, then the replies: as CometD does."""
        exchange = Exchange(self._request, self._account, channel)
        exchange.session, exchange.data, exchange.replies = self._session, data, replies
        fault = self._transports.faults.take(self._account, exchange.kind)
        if fault is not None:
            await self._falter(exchange, fault)
        elif not exchange.writable:
            exchange.lost()
            raise Abort
        for frame in self._frames(exchange.data):
            await self._socket.send_frame(frame, WSMsgType.TEXT)
        if exchange.replies:
            await self._socket.send_frame(msgspec.json.encode(exchange.replies), WSMsgType.TEXT)
        exchange.delivered()

    def _frames(self, data: list[Message]) -> list[bytes]:
        size = self._transports.settings.frame_messages_max or max(len(data), 1)
        parts = [data[start : start + size] for start in range(0, len(data), size)]
        return [b"[" + b",".join([message.raw for message in part]) + b"]" for part in parts]

    async def _falter(self, exchange: Exchange, fault: ArmedFault) -> None:
        """Let a fault happen; returns when the frames are to be sent all the same, else raises Abort."""
        match fault.kind:
            case Fault.DELAY:
                await asyncio.sleep(fault.seconds)
                return
            case Fault.ADVICE | Fault.ADVICE_NULL | Fault.STRING_INTERVAL:
                exchange.misadvise(fault, self._broker)
                return
            case Fault.UNKNOWN_CLIENT:
                exchange.forget(self._broker)
                return
            case Fault.NULL_ITEMS:
                await self._socket.send_frame(b"[null]", WSMsgType.TEXT)
                return
        exchange.lost()
        frames = self._frames(exchange.data)
        match fault.kind:
            case Fault.HALF_OPEN:
                await self._transports.never(self._request)
            case Fault.TRUNCATED_JSON:
                body = exchange.compose()
                frames = [body[: len(body) // 2]]
            case Fault.DROP_MID_REPLY:
                frames = frames[: len(frames) // 2]
            case Fault.DROP_BEFORE_REPLY:
                frames = []
        if fault.kind in WEBSOCKET_FAULTS:
            for frame in frames:
                await self._socket.send_frame(frame, WSMsgType.TEXT)
            if self._request.transport is not None:
                self._request.transport.close()
        else:
            await self._socket.close(code=1011)
        raise Abort


def _channel(message: dict[str, Any]) -> str:
    return str(message.get("channel"))


def exchange_of(body: bytes) -> str:
    """The kind of exchange by its first meta channel, without parsing it: connect, handshake, and so on."""
    _, _, rest = body.partition(b'"/meta/')
    return rest.partition(b'"')[0].decode(errors="replace")


def parse(body: bytes) -> list[dict[str, Any]]:
    """The messages of a request; ValueError when it is no Bayeux."""
    try:
        parsed = msgspec.json.decode(body)
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from error
    messages = parsed if isinstance(parsed, list) else [parsed]
    if not all(isinstance(message, dict) for message in messages):
        raise ValueError("a Bayeux message is an object")
    return messages


def _json(body: bytes, *, status: int = 200) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json", charset="UTF-8")


async def _write_part(request: web.Request, body: bytes, count: int) -> web.StreamResponse:
    """Promise the whole body, send its first bytes, and close."""
    response = web.StreamResponse(headers={"Content-Type": "application/json;charset=UTF-8"})
    response.content_length = len(body)
    try:
        await response.prepare(request)
        await response.write(body[:count])
    except ConnectionError:
        return cut(request)  # the client had gone away before
    if request.transport is not None:
        request.transport.close()
    return response


def cut(request: web.Request) -> web.StreamResponse:
    """Reset the connection; what is given is never seen."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()
