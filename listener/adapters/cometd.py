"""CometD over HTTP: the sockets round `listener.core.session`.

aiocometd is used by its public face: `Client` negotiates the transport, subscribes and closes; our two
transports are registered in place of its own (`register_transport`), because those lose messages, storm
and go deaf in ways that were measured; `AuthExtension` adds the headers of the login. What each transport
decides is decided by the pure `Session`; here are only sockets, bytes and the clock.

Where that face was in the way: an aiocometd `Extension` is handed *decoded* messages, which have lost the
exact bytes and repeated keys, and its `incoming` has no way back to say "committed". So deliveries leave by
`Line.hear`, with the bytes as they stood on the wire; and the acknowledgement, which must be decided when a
connect is built and not when it has been built, is written by the session. A `Line` travels to the
transports as an extension, since that is what `Client` hands on to whatever transport it creates.

The store may be slow, and the server must not notice. So what was heard goes into an outbox that a courier
empties, and never counts against the time of a request. With acknowledgements the session goes on meanwhile:
it keeps itself alive, and takes nothing new before what it took is durable. Without them whatever a poll
brings is taken from the server for good: then the next one waits until the outbox is empty.

A stop does not wait for the connect that is held, nor take it for nothing said: on another connection the
server is asked once more, and answers at once (`Session.last`). After that a held connect is left behind,
whose answer nobody reads: while the server holds one, it does not count the session's time.

One `Line` is one account's connection over any number of Bayeux sessions. It owns a cookie jar of its own
(CometD binds a session to the cookie BAYEUX_BROWSER; sharing a jar makes two sessions one "browser", of
which the server lets only one poll), one that also takes cookies from hosts that are IP addresses, which
aiohttp's default does not.
"""

import asyncio
import random
import ssl
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from datetime import UTC, datetime
from http.cookies import Morsel
from typing import Any, Literal, Protocol

import aiohttp
import msgspec
import structlog
from aiocometd.client import Client
from aiocometd.constants import ConnectionType, TransportState
from aiocometd.extensions import AuthExtension, Extension
from aiocometd.transports.abc import Transport
from aiocometd.transports.registry import register_transport
from aiohttp.abc import AbstractStreamWriter

from listener.core.calls import Heard
from listener.core.session import (
    DEFAULT_LIMITS,
    LONG_POLLING,
    Cookie,
    Delivered,
    Fact,
    Failure,
    Gap,
    Handshaken,
    Kept,
    Limits,
    Login,
    Saved,
    Send,
    Session,
    Sleep,
    Stop,
    split,
)
from listener.errors import LoginRefused, RemoteError

DELIVERY_BYTES_MAX = 64 * 1024 * 1024
"""The largest answer that is taken. A larger one cannot be acknowledged, so the server would send it again
for ever: the session is given up instead, which is a recorded gap."""

OUTBOX_BYTES_MAX = DELIVERY_BYTES_MAX
"""Heard and not yet taken by who hears. With acknowledgements that is one delivery, unless one session after
another is lost while the store is away: at this bound the line waits, and the server's own bound decides."""

COURIER_RESTS_S = 1.0
"""How long a courier waits for more before it is let go."""

UPGRADES_REFUSED_MAX = 3
"""After so many refusals in a row to upgrade to a websocket, long-polling is used: some proxies pass POST and
nothing else."""

LAST_ASK_S_MAX = 5.0
"""How long a stop may take to ask a server for the last time, to store what that brings, and to leave a
connect behind; all sessions do so at once. What is not known by then is not vouched for."""

STORED_S_MAX = 1.0
"""How long it waits until all that was heard is durable, before each of those steps. A store that takes
longer is slow or away, and meanwhile nobody keeps the session alive."""

READ_BUFFER_BYTES = 256 * 1024
"""How much of an answer may wait in the socket's reader; a burst is read in few steps."""

LIFETIMES_MAX = 2
LIFETIME_S_MIN = 60.0
"""A session that was saved longer ago than so many times the server's `maxInterval` (or what is assumed at
least) is hardly there any more: one connect asks, and then another begins."""


class Credentials(Protocol):
    """What a line needs to know of the login; satisfied by `adapters.genesys.GenesysClient`."""

    @property
    def jar(self) -> aiohttp.CookieJar:
        """The account's cookies, shared by REST and CometD."""

    token: Mapping[str, str]
    """The header with the CSRF token; empty where there is none. Set when a session is resumed."""

    async def login(self) -> None:
        """Logs in; raises `LoginRefused` or `RemoteUnavailable`."""

    def headers(self) -> Mapping[str, str]:
        """Authorization and CSRF headers as of now."""


class Hearing(Protocol):
    """Where a line takes what it hears."""

    async def hear(self, heard: Sequence[Heard], committed: Callable[[], None]) -> None:
        """Takes new messages; returns when there is room for more; calls `committed` when they are stored."""

    def told(self, fact: Fact, at: datetime) -> None:
        """Takes every fact, before the messages themselves, at once and without waiting."""

    def answered(self, at: datetime, *, took: bool) -> None:
        """The server answered, and all facts of the answer have been told; `took`: with new messages."""

    def keep(self, saved: Saved | None) -> None:
        """What the session can be resumed with from now on; None when it is over."""


class Endpoint(msgspec.Struct, frozen=True):
    """Where and how to reach one CometD server."""

    url: str
    connection_types: tuple[str, ...] = ("long-polling",)
    """In order of preference; long-polling is used where the server offers none of them."""
    tls: ssl.SSLContext | None = None
    channels: tuple[str, ...] = ("/v2/me/calls", "/v2/me/devices")
    login_first: bool = False
    """Whether the CometD server wants the cookies of a REST login (GWS does)."""
    owner: str = ""
    """Whose sessions these are, at which server: a session of another owner is not resumed."""
    delivery_bytes_max: int = DELIVERY_BYTES_MAX


class _Bell:
    """What `asyncio.Event` is, for one who waits, at a tenth of its memory: thousands of lines rest."""

    __slots__ = ("_rung", "_sleeper")

    def __init__(self) -> None:
        self._rung = False
        self._sleeper: asyncio.Future[None] | None = None

    def ring(self) -> None:
        """Ends the wait, or the next one."""
        self._rung = True
        if self._sleeper is not None and not self._sleeper.done():
            self._sleeper.set_result(None)

    def hush(self) -> None:
        """The next wait is one."""
        self._rung = False

    async def wait(self) -> None:
        """Returns when it has been rung since it was hushed."""
        if not self._rung:
            self._sleeper = asyncio.get_running_loop().create_future()
            await self._sleeper


_NO_TURN = nullcontext()
"""For a line that logs in whenever it likes."""


class Line(Extension):
    """One account's connection. `run` it until it is cancelled.

    `goodbye` says whether a cancelled `run` tells the server (/meta/disconnect), so that it keeps nothing
    more for us; it may be changed at any time. Without it the session can be resumed: by a line that is given
    what this one told its `hearing` to `keep`, as `saved`, if it is `resumable`. `left` is called when a
    cancelled `run` hears nothing more, before the goodbye: with the moment at which the server was asked for
    the last time, if that is known to have brought all that had been said. `account` is the store's id.
    `turn` is held during each login: lines that share a semaphore do not all log in at once.
    `clock` is steady seconds, `wall` the time of day; both are parameters so that a test can own them.
    """

    __slots__ = (  # thousands of lines live in one process
        "_courier",
        "_emptied",
        "_http",
        "_kept",
        "_leaving",
        "_odd_position",
        "_odd_stream",
        "_outbox",
        "_outbox_bytes",
        "_posted",
        "_transport",
        "account",
        "broken",
        "clock",
        "credentials",
        "endpoint",
        "goodbye",
        "hearing",
        "left",
        "session",
        "stream",
        "turn",
        "wake",
        "wall",
    )

    def __init__(
        self,
        account: int,
        endpoint: Endpoint,
        credentials: Credentials,
        hearing: Hearing,
        *,
        saved: Saved | None = None,
        limits: Limits = DEFAULT_LIMITS,
        turn: AbstractAsyncContextManager[None] = _NO_TURN,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),  # noqa: TID251 - a shell's default
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.goodbye = True
        self.left: Callable[[datetime | None], None] = _nothing
        self.account = account
        self.endpoint = endpoint
        self.credentials = credentials
        self.hearing = hearing
        self.clock = clock
        self.wall = wall
        self.turn = turn
        self.session = Session(now=clock(), jitter=jitter, limits=limits)
        self.wake = _Bell()
        self.stream = str(uuid.uuid4())
        self._odd_stream = str(uuid.uuid4())
        """Items without a position are filed under a stream of their own."""
        self._odd_position = 0
        self._kept: Kept | None = None
        self._leaving = False
        self._http: aiohttp.ClientSession | None = None
        self._transport: _Shell | None = None
        self._outbox: list[tuple[list[Heard], Callable[[], None], int]] = []
        self._outbox_bytes = 0
        self._courier: asyncio.Task[None] | None = None
        self.broken: Exception | None = None
        """What who hears raised; it ends `run`."""
        self._posted = _Bell()
        self._emptied = _Bell()
        if saved is not None:
            self._resume(saved)
        elif endpoint.login_first:
            self.session.login_first()

    async def run(self) -> None:
        """Connects, subscribes and hears until cancelled; never raises for what a server does.

        When cancelled it hands over what was heard, asks once more and says goodbye, all within the bound of
        a request. A bug, of ours or of who hears, ends it with that exception and as a gap; it may be run
        again.
        """
        self._outbox.clear()
        self._outbox_bytes = 0
        self.broken = None
        try:
            await self._listen()
        except asyncio.CancelledError:
            try:
                await self._leave()
            except Exception:  # noqa: BLE001 - who stops us must not take it for our not having stopped
                structlog.get_logger().exception("a line broke while it stopped", account=self.account)
            raise
        except Exception as error:
            await self.tell(self.session.abandon("session lost", f"the line broke: {error!r}", self.clock()))
            raise
        finally:
            courier = self._courier
            try:
                if courier is not None:
                    courier.cancel()
                    await asyncio.wait({courier})
            finally:  # who stops us twice, as a stop during a reload does, does not wait for the courier
                if self._transport is not None:
                    await self._transport.close()

    async def _listen(self) -> None:
        """Hears for ever, by the transport that works."""
        types = [ConnectionType(name) for name in self.endpoint.connection_types]
        if ConnectionType.LONG_POLLING not in types:
            types.append(ConnectionType.LONG_POLLING)
        while True:
            try:
                await self._open(types)
                if self._transport is not None:
                    await self._transport.hear()
            except _UpgradeRefused as refusal:
                log = structlog.get_logger().bind(account=self.account)
                log.warning("websockets are refused; long-polling instead", reason=str(refusal))
                if self._transport is not None:
                    await self._transport.close()
                types = [ConnectionType.LONG_POLLING]

    async def _open(self, types: list[ConnectionType]) -> None:
        """Negotiates and subscribes. The `Client` has done its work then and is let go: its queue, which we
        do not use, would be a tenth of what an idle session costs."""
        client = Client(self.endpoint.url, types, extensions=[self], auth=_Headers(self.credentials))
        await client.open()
        # At once, so that one request carries all of them.
        await asyncio.gather(*(client.subscribe(channel) for channel in self.endpoint.channels))

    async def _leave(self) -> None:
        """Stops hearing, hands over what was heard, and says goodbye if that is wanted."""
        # `Client.close` does nothing after a failed `open`, and would leave the transport running.
        if self._transport is not None:
            # In a task of its own: up to Python 3.11.3 no time-out ends in a task that has been cancelled.
            # Whoever cancels this one meanwhile cancels that one, and waits for it.
            await asyncio.create_task(self._say_farewell(self._transport), name="farewell")  # noqa: TID251 - awaited here

    async def _say_farewell(self, transport: "_Shell") -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self.session.limits.request_s):
                await self._outbox_empty()
                self.left(await self._ask_last(transport))
                if self.goodbye and self.broken is None:
                    await self._durable()
                    self._leaving = True
                    self._keep(None)
                    await transport.disconnect()

    async def _ask_last(self, transport: "_Shell") -> datetime | None:
        """Asks for what is queued, so that everything until now is known to be heard, and gives that moment;
        None when it is not known. Whatever goes wrong, it is as if nothing had been asked."""
        asked_at: datetime | None = None
        try:
            async with asyncio.timeout(LAST_ASK_S_MAX):
                send = await self._last()
                if send is None:
                    return None
                began_at = self.wall()
                await transport.ask_once(send)
                if not self.session.observing:
                    return None
                asked_at = began_at
                held = await self._last(held=True)
                if held is not None and not self.goodbye:
                    await transport.leave_behind(held)
        except (_NoAnswer, TimeoutError, ValueError, aiohttp.ClientError, OSError) as error:
            log = structlog.get_logger().bind(account=self.account)
            log.info("not all was asked before the stop", error=f"{type(error).__name__}: {error}")
        return asked_at

    async def _last(self, *, held: bool = False) -> Send | None:
        """The session's last connect, when everything is durable."""
        if self.broken is not None:
            return None
        async with asyncio.timeout(STORED_S_MAX):
            await self._durable()
        return self.session.last(self.clock(), held=held)

    async def _durable(self) -> None:
        """Returns when what an acknowledging server would give again is committed: it gives nothing after a
        farewell."""
        while self.session.ack and not self.session.durable:
            self.wake.hush()
            await self.wake.wait()

    async def outgoing(self, payload: list[dict[str, Any]], headers: dict[str, str]) -> None:
        """Part of aiocometd's `Extension`; the session has written everything already."""

    async def incoming(self, payload: list[dict[str, Any]], headers: dict[str, str] | None = None) -> None:
        """Part of aiocometd's `Extension`; deliveries leave by `hearing`, with their exact bytes."""

    def seat(self, transport: "_Shell") -> None:
        """The transport that `Client` has created is the one that counts."""
        self._transport = transport

    def http(self) -> aiohttp.ClientSession:
        """The line's own HTTP client, made when needed."""
        if self._http is None or self._http.closed:
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=2, ssl=self.endpoint.tls or True),
                cookie_jar=self.credentials.jar,
                read_bufsize=READ_BUFFER_BYTES,
                timeout=_NO_TIMEOUT,
                headers=_CONTENT_TYPE,
            )
        return self._http

    async def hang_up(self) -> None:
        """Drops every pooled connection: after one has failed, the others are as stale."""
        http, self._http = self._http, None
        if http is not None:
            await http.close()

    async def tell(self, facts: Sequence[Fact], *, answered: bool = False) -> None:
        """Hands facts on, messages as `Heard`; `answered` says that with them a request has its answer."""
        at = self.wall()
        for fact in facts:
            if isinstance(fact, Handshaken):
                self.stream = str(uuid.uuid4())
            self.hearing.told(fact, at)
            if isinstance(fact, Delivered):
                await self._deliver(fact, at)
        if answered and not any(isinstance(fact, Gap) for fact in facts):
            took = any(isinstance(fact, Delivered) and fact.messages for fact in facts)
            self.hearing.answered(self.wall(), took=took)
        self._keep(self._to_keep())

    async def _deliver(self, delivered: Delivered, at: datetime) -> None:
        account, stream = self.account, self.stream
        last = delivered.first + len(delivered.messages) - 1
        heard = [
            Heard(
                account,
                stream,
                position,
                at,
                channel,
                raw,
                batch=delivered.batch if position == last else delivered.before,
            )
            for position, (channel, raw) in enumerate(delivered.messages, start=delivered.first)
        ]
        odd = []
        for channel, raw in delivered.odd:
            self._odd_position += 1
            odd.append(Heard(account, self._odd_stream, self._odd_position, at, channel, raw))

        def committed() -> None:
            if self.stream == stream:
                self.session.committed(last)
                self.wake.ring()

        if heard or odd:
            await self._post([*heard, *odd], committed)

    async def _post(self, heard: list[Heard], committed: Callable[[], None]) -> None:
        """Puts messages into the outbox; returns when more may be asked of the server."""
        size_bytes = sum(len(one.raw) for one in heard)
        self._outbox.append((heard, committed, size_bytes))
        self._outbox_bytes += size_bytes
        if self._courier is None:
            # A task that is held, here; and none for an idle line, of which there are thousands.
            self._courier = asyncio.get_running_loop().create_task(self._carry())
        self._posted.ring()
        if not self.session.ack or self._outbox_bytes > OUTBOX_BYTES_MAX:
            await self._outbox_empty()

    async def _carry(self) -> None:
        """The courier: takes what is in the outbox to who hears, in order, until nothing more comes."""
        loop = asyncio.get_running_loop()
        try:
            while self._outbox:
                heard, committed, size_bytes = self._outbox[0]
                await self.hearing.hear(heard, committed)
                self._outbox.pop(0)
                self._outbox_bytes -= size_bytes
                if not self._outbox:
                    self._emptied.ring()
                    self._posted.hush()
                    alarm = loop.call_later(COURIER_RESTS_S, self._posted.ring)
                    await self._posted.wait()
                    alarm.cancel()
        except Exception as error:  # noqa: BLE001 - handed on: the loop raises it
            self.broken = error
            self.wake.ring()
        finally:
            self._courier = None
            self._emptied.ring()

    async def _outbox_empty(self) -> None:
        """Returns when everything that was heard has been handed over, or cannot be."""
        while self._outbox and self.broken is None:
            self._emptied.hush()
            await self._emptied.wait()

    # What a session is resumed with

    def _to_keep(self) -> Kept | None:
        """What the present session could be resumed with; None while there is none that hears everything."""
        session = self.session
        heard = session.subscribed.issuperset(self.endpoint.channels)
        if self._leaving or session.client_id is None or not heard:
            return None
        return Kept(
            stream=self.stream,
            client_id=session.client_id,
            ack=session.ack,
            connection_type=session.connection_type,
            max_interval_s=session.max_interval_s,
            channels=tuple(sorted(session.subscribed)),
            owner=self.endpoint.owner,
            cookies=_cookies(self.credentials.jar),
            token=tuple(self.credentials.token.items()),
        )

    def _keep(self, kept: Kept | None) -> None:
        """Says what is to be kept, when it is something else than before."""
        if kept != self._kept:
            self._kept = kept
            self.hearing.keep(None if kept is None else Saved(kept, self.wall()))

    def _resume(self, saved: Saved) -> None:
        kept = self._kept = saved.kept
        age_s = (self.wall() - saved.saved_at).total_seconds()
        lifetime_s = max(kept.max_interval_s or 0.0, LIFETIME_S_MIN)
        for channel in self.endpoint.channels:
            self.session.want(channel)
        self.session.resume(
            saved,
            attempts_max=1 if age_s > LIFETIMES_MAX * lifetime_s else None,
            login_first=self.endpoint.login_first,
        )
        self.stream = kept.stream
        self.credentials.token = dict(kept.token)
        _set_cookies(self.credentials.jar, kept.cookies, age_s)


def resumable(saved: Saved, endpoint: Endpoint) -> bool:
    """Whether a line to `endpoint` can go on with that session: it is the same owner's, hears all that is
    wanted, and it is known what to acknowledge."""
    kept = saved.kept
    return (
        kept.owner == endpoint.owner
        and set(kept.channels) >= set(endpoint.channels)
        and kept.connection_type in (*endpoint.connection_types, LONG_POLLING)
        and saved.resumes_at is not None
    )


def _cookies(jar: aiohttp.CookieJar) -> tuple[Cookie, ...]:
    """The cookies of a jar, in an order that stays."""
    return tuple(
        Cookie(
            name=name,
            value=morsel.coded_value,
            domain=domain,
            path=morsel["path"],
            secure=bool(morsel["secure"]),
            expires=morsel["expires"],
            max_age=str(morsel["max-age"]),
        )
        for (domain, path), cookies in sorted(jar.cookies.items())
        for name, morsel in sorted(cookies.items())
    )


def _set_cookies(jar: aiohttp.CookieJar, cookies: Sequence[Cookie], age_s: float) -> None:
    """Puts them back; they were set `age_s` seconds ago at least. Those of a host alone are that domain's
    then, which makes no difference here: a line talks to one host."""
    for cookie in cookies:
        morsel: Morsel[str] = Morsel()
        morsel.set(cookie.name, cookie.value, cookie.value)
        morsel["path"] = cookie.path
        morsel["secure"] = cookie.secure
        morsel["expires"] = cookie.expires
        if cookie.max_age:
            morsel["max-age"] = str(int(float(cookie.max_age) - max(0.0, age_s)))
        morsel["domain"] = cookie.domain
        jar.update_cookies({cookie.name: morsel})


def _nothing(asked_last: datetime | None) -> None:
    """Whom it does not concern that a line is left."""


_NO_TIMEOUT = aiohttp.ClientTimeout(total=None)
"""Each request has the limit that the session gives it."""

_Socket = aiohttp.ClientWebSocketResponse[Literal[False]]

_CONTENT_TYPE = {"Content-Type": "application/json;charset=UTF-8"}


class _Headers(AuthExtension):
    """The headers of the account's login on every request."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    async def outgoing(
        self,
        payload: list[dict[str, Any]],  # noqa: ARG002 - aiocometd's signature
        headers: dict[str, str],
    ) -> None:
        headers.update(self._credentials.headers())

    async def incoming(self, payload: list[dict[str, Any]], headers: dict[str, str] | None = None) -> None:
        """Nothing to read here."""

    async def authenticate(self) -> None:
        """Logs in anew."""
        await self._credentials.login()


def _never() -> bool:
    return False


class _UpgradeRefused(Exception):
    """The server, or something before it, refuses websockets; says how."""


class _NoAnswer(Exception):
    """A request brought nothing that can be used; says why."""

    def __init__(self, failure: Failure, detail: str) -> None:
        super().__init__(detail)
        self.failure = failure


class _Shell(Transport):
    """What both transports share: obeying the session, and what aiocometd asks of a `Transport`."""

    __slots__ = ("_auth", "_hears", "_url", "line")

    def __init__(
        self,
        *,
        url: str,
        extensions: list[Extension] | None = None,
        auth: AuthExtension | None = None,
        **_unused: Any,
    ) -> None:
        """`_unused`: queue, client id, advice, JSON functions and loop, which the `Line` has its own of."""
        (line,) = [each for each in extensions or () if isinstance(each, Line)]
        self.line = line
        self._url = url
        self._auth = auth
        self._hears = False
        line.seat(self)

    # What aiocometd reads

    @property
    def connection_type(self) -> ConnectionType:
        """Defined by `register_transport` on each of the classes below; abstract until then."""
        raise NotImplementedError

    @property
    def endpoint(self) -> str:
        """The server's URL."""
        return self._url

    @property
    def client_id(self) -> str | None:
        """The present session's clientId."""
        return self.line.session.client_id

    @property
    def state(self) -> TransportState:
        """CONNECTED while an exchange has succeeded lately, CONNECTING while it is tried."""
        if not self._hears:
            return TransportState.DISCONNECTED
        return TransportState.CONNECTED if self.line.session.connected else TransportState.CONNECTING

    @property
    def subscriptions(self) -> set[str]:
        """The channels that the server has confirmed."""
        return set(self.line.session.subscribed)

    @property
    def last_connect_result(self) -> dict[str, Any] | None:
        """Not kept: the session has read it."""
        return None

    @property
    def reconnect_advice(self) -> dict[str, Any]:
        """Kept by the session; `Client` passes this from one transport to the next."""
        return {}

    @property
    def http_session(self) -> aiohttp.ClientSession | None:
        """Owned by the line; `Client` passes this from one transport to the next."""
        return None

    @http_session.setter
    def http_session(self, http_session: aiohttp.ClientSession | None) -> None:
        """Nothing to keep: see the getter."""

    async def wait_for_state(self, state: TransportState) -> None:
        """Only `Client.receive` asks, which is not used."""
        raise NotImplementedError("deliveries leave by Line.hearing; Client.receive() is not supported")

    # What aiocometd does

    async def handshake(self, connection_types: list[ConnectionType]) -> dict[str, Any]:
        """Goes on until the server grants a session, however long that takes."""
        session = self.line.session
        session.offer([each.value for each in connection_types])
        await self._drive(lambda: session.client_id is not None)
        return {
            "channel": "/meta/handshake",
            "successful": True,
            "clientId": session.client_id,
            # Every server understands long-polling, and `Client` raises where it finds nothing in common.
            "supportedConnectionTypes": [*session.server_connection_types, LONG_POLLING],
        }

    async def connect(self) -> dict[str, Any]:
        """Connects once. The session goes on with `hear`, which the line calls when `Client` has done its
        work: in its own task, since another one for each of thousands of lines would only be memory."""
        session = self.line.session
        session.use(self.connection_type.value)
        await self._drive(lambda: session.connected)
        self._hears = True
        return {"channel": "/meta/connect", "successful": True}

    async def subscribe(self, channel: str) -> dict[str, Any]:
        """Asks for `channel` from now on. What the server answers is a fact like any other: a refusal is
        told, and tried again, so it is no error here."""
        self.line.session.want(channel)
        self.line.wake.ring()
        return {"channel": "/meta/subscribe", "successful": True, "subscription": channel}

    async def unsubscribe(self, channel: str) -> dict[str, Any]:
        """Asks for `channel` no more."""
        self.line.session.unwant(channel)
        return {"channel": "/meta/unsubscribe", "successful": True, "subscription": channel}

    async def publish(self, channel: str, data: dict[str, Any]) -> dict[str, Any]:
        """A listener says nothing."""
        raise NotImplementedError("a listener does not publish")

    async def hear(self) -> None:
        """Keeps the session until cancelled; raises what breaks that, a bug of ours."""
        try:
            await self._drive(_never)
        finally:
            self._hears = False

    async def disconnect(self) -> None:
        """Says goodbye, within the bound of a request, when `hear` has ended."""
        self.line.session.goodbye()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.line.session.limits.request_s):
                await self._drive(_never)

    async def close(self) -> None:
        """Releases every socket, when `hear` has ended."""
        self._hears = False
        await self._drop()

    # How the session is obeyed

    async def _drive(self, done: Callable[[], bool]) -> None:
        """Does what the session says until `done` or the session has stopped."""
        line = self.line
        session = line.session
        while not done():
            line.wake.hush()
            if line.broken is not None:
                raise line.broken
            match session.next(line.clock()):
                case Send() as send:
                    await self._attempt(send)
                case Sleep(until):
                    await self._rest(until - line.clock())
                case Login():
                    await self._login()
                case Stop():
                    return

    async def _attempt(self, send: Send) -> None:
        """Sends, and reports the answer or its absence."""
        line = self.line
        loop = asyncio.get_running_loop()
        deadline = loop.time() + send.timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                body = await self._ask(send, await self._headers(send))
            while True:
                asked = loop.time()
                await self._take(body)
                if line.session.answered:
                    return
                deadline += loop.time() - asked  # the time of the store is not the server's
                async with asyncio.timeout_at(deadline):
                    body = await self._more(send)
        except _NoAnswer as error:
            await self._failed(error.failure, str(error))
        except TimeoutError:
            detail = f"no answer to {send.channel} within {send.timeout_s:g} s"
            await self._failed(Failure.NETWORK, detail)
        except (aiohttp.ClientError, OSError, ssl.SSLError) as error:
            await self._failed(Failure.NETWORK, f"{type(error).__name__}: {error}")

    async def _headers(self, send: Send) -> dict[str, str]:
        headers: dict[str, str] = {}
        if self._auth is not None:
            await self._auth.outgoing(send.messages, headers)
        return headers

    async def ask_once(self, send: Send) -> None:
        """One exchange more after `hear`, on a new connection. What it delivers is told, and nothing else:
        what goes wrong now is for the next start to find. Raises as `_ask`, and ValueError."""
        session = self.line.session
        await self._drop()
        body = await self._ask(send, await self._headers(send))
        while True:
            facts = session.received(split(body), self.line.clock())
            await self.line.tell([fact for fact in facts if isinstance(fact, Delivered)])
            if session.answered:
                return
            body = await self._more(send)

    async def leave_behind(self, send: Send) -> None:
        """Sends a connect that the server will hold, and returns when it is under way.

        A server that loses a websocket lets go of its connects too, so that there is nothing to leave.
        """

    async def _failed(self, failure: Failure, detail: str) -> None:
        await self._drop()
        await self.line.tell(self.line.session.failed(failure, detail, self.line.clock()))

    async def _login(self) -> None:
        line = self.line
        try:
            async with line.turn:
                await line.credentials.login()
        except LoginRefused as error:
            await line.tell(line.session.login_refused(str(error), line.clock()))
        except RemoteError as error:
            await self._failed(Failure.NETWORK, f"login: {error}")
        else:
            line.session.logged_in()

    async def _take(self, body: bytes) -> None:
        """Hands an answer to the session and what it says of it to the line."""
        try:
            items = split(body)
        except ValueError as error:
            raise _NoAnswer(Failure.MALFORMED, str(error)) from None
        facts = self.line.session.received(items, self.line.clock())
        await self.line.tell(facts, answered=self.line.session.answered)

    async def _ask(self, send: Send, headers: dict[str, str]) -> bytes:
        """Sends the messages and gives what comes first; raises `_NoAnswer`, `aiohttp.ClientError` or
        `OSError`."""
        raise NotImplementedError

    async def _more(self, send: Send) -> bytes:
        """Gives what comes next, because a reply is still lacking; raises as `_ask`."""
        raise NotImplementedError

    async def _rest(self, seconds: float) -> None:
        """Waits that long, or until the line is woken."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.line.wake.wait()

    async def _drop(self) -> None:
        """Drops every connection."""
        await self.line.hang_up()


class _Noticed(aiohttp.BytesPayload):
    """A body that says when it has been sent."""

    def __init__(self, value: bytes) -> None:
        super().__init__(value)
        self.sent = asyncio.Event()

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        """Part of aiohttp's `Payload`."""
        await super().write_with_length(writer, content_length)
        self.sent.set()


@register_transport(ConnectionType.LONG_POLLING)
class LongPolling(_Shell):
    """One POST an exchange; a connect is held by the server until there is something to say."""

    __slots__ = ()

    async def _ask(self, send: Send, headers: dict[str, str]) -> bytes:
        return await self._post(msgspec.json.encode(send.messages), headers)

    async def _post(self, body: bytes | aiohttp.Payload, headers: dict[str, str]) -> bytes:
        limit = self.line.endpoint.delivery_bytes_max
        # A redirect would turn the POST into a GET, or take the credentials elsewhere.
        async with self.line.http().post(
            self._url, data=body, headers=headers, allow_redirects=False
        ) as response:
            if response.status != 200:
                raise _refusal(response, self._url)
            if (response.content_length or 0) > limit:
                raise _NoAnswer(Failure.OVERSIZED, f"{response.content_length} bytes, more than {limit}")
            chunks = []
            size = 0
            async for chunk in response.content.iter_any():
                chunks.append(chunk)
                size += len(chunk)
                if size > limit:
                    raise _NoAnswer(Failure.OVERSIZED, f"more than {limit} bytes")
        return b"".join(chunks)

    async def leave_behind(self, send: Send) -> None:
        """Sends a connect that the server will hold, and returns when it is under way."""
        body = _Noticed(msgspec.json.encode(send.messages))
        loop = asyncio.get_running_loop()
        asking = loop.create_task(self._post(body, await self._headers(send)))
        leaving = loop.create_task(body.sent.wait())
        try:
            await asyncio.wait({asking, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            asking.cancel()
            leaving.cancel()
            await asyncio.wait({asking, leaving})
            if not asking.cancelled():
                asking.exception()  # seen, and of no use to anybody

    async def _more(self, send: Send) -> bytes:
        raise _NoAnswer(Failure.MALFORMED, f"an answer without a reply to {send.channel}")


def _refusal(response: aiohttp.ClientResponse, url: str) -> _NoAnswer:
    """What an HTTP status other than 200 means."""
    detail = f"HTTP {response.status} {response.reason or ''} from {url}".replace("  ", " ")
    if response.status in (401, 403):
        return _NoAnswer(Failure.UNAUTHORISED, detail)
    if 300 <= response.status < 400:
        detail += (
            f" to {response.headers.get('Location', 'nowhere')}: redirects are not followed, set base_url"
        )
    return _NoAnswer(Failure.HTTP, detail)


@register_transport(ConnectionType.WEBSOCKET)
class WebSocket(_Shell):
    """One connection that stays; frames also come unasked, so a frame is awaited at all times."""

    __slots__ = ("_frame", "_refusals", "_socket")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._socket: _Socket | None = None
        self._frame: asyncio.Task[Any] | None = None
        self._refusals = 0

    async def _attempt(self, send: Send) -> None:
        await super()._attempt(send)
        if self._refusals >= UPGRADES_REFUSED_MAX:
            raise _UpgradeRefused(f"{self._url} refused {self._refusals} upgrades in a row")

    async def _ask(self, send: Send, headers: dict[str, str]) -> bytes:
        socket = await self._open(headers)
        await socket.send_str(msgspec.json.encode(send.messages).decode())
        return await self._next_frame()

    async def _more(self, send: Send) -> bytes:  # noqa: ARG002 - as the other transport's
        return await self._next_frame()

    async def _open(self, headers: dict[str, str]) -> _Socket:
        if self._socket is None:
            try:
                self._socket = await self.line.http().ws_connect(
                    "ws" + self._url.removeprefix("http"),
                    headers=headers,
                    max_msg_size=self.line.endpoint.delivery_bytes_max,
                    decode_text=False,  # the exact bytes, also where they are no text
                )
            except aiohttp.WSServerHandshakeError as error:
                # 5xx says that the server is away, and nothing about websockets; but 501 does.
                self._refusals += error.status < 500 or error.status == 501
                failure = Failure.UNAUTHORISED if error.status in (401, 403) else Failure.HTTP
                raise _NoAnswer(failure, f"HTTP {error.status} to the websocket's upgrade") from None
            self._refusals = 0
        return self._socket

    async def _next_frame(self) -> bytes:
        socket = self._socket
        if socket is None:
            raise _NoAnswer(Failure.NETWORK, "there is no websocket")
        if self._frame is None:
            message = await socket.receive()
        else:
            # Shielded: a cancelled exchange must not take the frame, which may be the farewell's, with it.
            message = await asyncio.shield(self._frame)
            self._frame = None
        if message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
            return bytes(message.data)
        code = socket.close_code
        if code == aiohttp.WSCloseCode.MESSAGE_TOO_BIG:
            limit = self.line.endpoint.delivery_bytes_max
            raise _NoAnswer(Failure.OVERSIZED, f"a frame of more than {limit} bytes")
        raise _NoAnswer(Failure.NETWORK, f"the websocket closed ({code})")

    async def _rest(self, seconds: float) -> None:
        if self._socket is None:
            await super()._rest(seconds)
            return
        loop = asyncio.get_running_loop()
        if self._frame is None:
            self._frame = loop.create_task(self._socket.receive())  # outlives a rest that ends without one
        frame = self._frame
        woken = loop.create_task(self.line.wake.wait())
        try:
            await asyncio.wait({frame, woken}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            woken.cancel()
        if frame.done():
            try:
                await self._take(await self._next_frame())
            except _NoAnswer as error:
                await self._failed(error.failure, str(error))

    async def _drop(self) -> None:
        frame, self._frame = self._frame, None
        socket, self._socket = self._socket, None
        if frame is not None:
            frame.cancel()
            await asyncio.wait({frame})
            if not frame.cancelled():
                frame.exception()  # seen: whatever it was, the connection is dropped
        # First: on a connection that is dead a closing handshake would be waited for in vain.
        await super()._drop()
        if socket is not None:
            await socket.close()
