"""Genesys Web Services as a server on loopback: REST, CometD over HTTP and websocket, and its controls.

This is the shell round `listener.simulator.bayeux`: it owns the sockets, the HTTP sessions, the held
requests and the clock, and lets faults happen. What is said about calls comes from elsewhere
(`listener.simulator.centre`), through `GwsServer.publish`.

Logins and errors are those that were seen at GWS: a request without a valid login is HTTP 403 with
statusCode 20, never 401; CometD's requests need the same login (JSESSIONID, or Authorization on each).

The control API (`/simulator/…`) is for loopback only and has no login.
"""

import asyncio
import base64
import binascii
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address
from random import Random
from time import time
from types import TracebackType
from typing import Any, Final, Self
from uuid import UUID

import msgspec
from aiohttp import WSMsgType, web

from listener.errors import SettingsError
from listener.simulator import bayeux, scripts
from listener.simulator.bayeux import LONG_POLLING, WEBSOCKET, Broker, Reply, ServerSession
from listener.simulator.faults import WEBSOCKET_FAULTS, ArmedFault, Fault, Faults
from listener.simulator.scripts import Agent, CallTruth, Dialect, Message, ScriptedCall
from listener.simulator.settings import MIXED, SimulatorSettings

BROWSER_COOKIE: Final = "BAYEUX_BROWSER"
SESSION_COOKIE: Final = "JSESSIONID"
CSRF_HEADER: Final = "X-CSRF-TOKEN"
REQUEST_BYTES_MAX: Final = 1 << 20
"""A larger request is answered 413 by the HTTP server: nobody has that much to say to GWS."""
CALLS_LISTED_MAX: Final = 100_000
"""Finished calls whose truth is kept; older ones are dropped, so that a run of days does not grow."""
UNANSWERED_S: Final = 120.0
"""How long a half-open connection is kept; then it is cut."""
RESTART_GRACE_S: Final = 0.05
"""How long the HTTP server waits for its handlers when it stops."""

DIAL_SCRIPTS: Final = {
    "5901": "dial_busy",
    "5902": "dial_not_answered",
    "5903": "dial_invalid",
    "+12025550191": "dial_busy",
    "+12025550192": "dial_not_answered",
    "+12025550193": "dial_invalid",
}
"""What becomes of a Dial to these numbers; every other number answers."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Account:
    """One login and what goes on under it."""

    agent: Agent
    dialect: Dialect
    password: str
    token: str
    """What `Authorization: Bearer` must carry."""
    playing: list[ScriptedCall] = field(default_factory=list)
    ready: bool = True
    contact_centre_session: bool = False
    refused: bool = False
    """Its password is refused from now on."""
    dials: int = 0

    @property
    def login(self) -> str:
        """Its login."""
        return self.agent.login


@dataclass(slots=True)
class HttpSession:
    """What a JSESSIONID stands for."""

    account: Account
    csrf_token: str


class Abort(Exception):
    """The connection is to be cut without an answer."""


def make_accounts(settings: SimulatorSettings) -> list[Account]:
    """The accounts of a centre, the same for the same settings."""
    dialects = list(Dialect) if settings.dialect == MIXED else [Dialect(settings.dialect)]
    accounts = []
    for index in range(settings.accounts):
        rng = Random(f"{settings.seed}:account:{index}")
        dn = f"5{index:03d}" if index < 900 else f"15{index:05d}"
        device_id = str(UUID(int=rng.getrandbits(128), version=4))
        agent = Agent(f"agent{dn}", dn, device_id, f"Agent {dn}")
        token = f"token-{rng.getrandbits(64):016x}"
        accounts.append(Account(agent, dialects[index % len(dialects)], settings.password, token))
    return accounts


def json_response(body: Any, *, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")


def access_denied() -> web.Response:
    """What GWS answers to somebody who is not logged in: 403, not 401."""
    return json_response({"statusCode": 20, "statusMessage": "Access denied"}, status=403)


class GwsServer:
    """The server. Use it as an async context manager: it listens inside, and stops at the end.

    `clock` gives epoch seconds. `faults` decides what goes wrong in the exchanges.
    """

    def __init__(self, settings: SimulatorSettings, *, clock: Callable[[], float] = time) -> None:
        self.settings = settings
        self.faults = Faults(settings.faults, settings.seed)
        self.accounts = {account.login: account for account in make_accounts(settings)}
        self.broker = Broker(settings, list(self.accounts))
        self.calls: deque[CallTruth] = deque(maxlen=CALLS_LISTED_MAX)
        self.port = settings.port
        self.requests = 0
        self.restarts = 0
        self.device_posts = 0
        self._clock = clock
        self._by_token = {account.token: account for account in self.accounts.values()}
        self._http_sessions: dict[str, HttpSession] = {}
        # Cookies and tokens must differ from those before a restart, whatever the seed.
        self._secrets = Random()
        self._closing = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._runner: web.AppRunner | None = None
        self._control: list[tuple[str, str, Callable[[web.Request], Awaitable[web.StreamResponse]]]] = []

    # Life. --------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The base URL, without a path."""
        return f"http://{self.settings.host}:{self.port}"

    async def __aenter__(self) -> Self:
        self._tasks = asyncio.TaskGroup()
        await self._tasks.__aenter__()
        try:
            await self._listen()
        except BaseException:
            await self._tasks.__aexit__(None, None, None)
            raise
        self.spawn(self._sweep())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in list(self._background):
            task.cancel()
        try:
            await self._stop_listening()
        finally:
            assert self._tasks is not None
            await self._tasks.__aexit__(kind, error, trace)

    def spawn(self, work: Any) -> None:
        """Run a coroutine until it is done or the server stops."""
        assert self._tasks is not None
        task = self._tasks.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def control(
        self, method: str, path: str, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> None:
        """Add a request to the control API; before the server is entered."""
        self._control.append((method, path, handler))

    async def _listen(self) -> None:
        app = web.Application(client_max_size=REQUEST_BYTES_MAX)
        for root in ("/api/v2", "/workspace/v3"):
            app.router.add_route("*", root + "/notifications", self._notifications)
            app.router.add_route("*", root + "/notifications/{kind:.*}", self._notifications)
        app.router.add_get("/api/v2/me", self._get_me)
        app.router.add_post("/api/v2/me", self._post_me)
        app.router.add_get("/api/v2/me/devices", self._get_devices)
        app.router.add_get("/api/v2/me/calls", self._get_calls)
        app.router.add_post("/api/v2/me/devices/{device}/calls", self._post_call)
        app.router.add_post("/simulator/faults", self._local(self._post_faults))
        app.router.add_get("/simulator/stats", self._local(self._get_stats))
        for method, path, handler in self._control:
            app.router.add_route(method, path, self._local(handler))
        self._closing = asyncio.Event()
        self._runner = web.AppRunner(
            app, access_log=None, handle_signals=False, shutdown_timeout=RESTART_GRACE_S, keepalive_timeout=75
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.settings.host, self.port, backlog=4096)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _stop_listening(self) -> None:
        assert self._runner is not None
        self._closing.set()
        server = self._runner.server
        for site in list(self._runner.sites):
            await site.stop()
        if server is not None:
            for connection in list(server.connections):
                if connection.transport is not None:
                    connection.transport.abort()
        for session in list(self.broker.sessions.values()):
            if session.notify is not None:
                session.notify()
        await self._runner.cleanup()

    async def restart(self, down_s: float = 0.0) -> None:
        """Stop as a killed server does, stay away so many seconds, and come back on the same port with
        no session, no cookie and no token of before. Calls go on meanwhile, unheard."""
        for session in list(self.broker.sessions.values()):
            self.broker.remove(session, "forgotten")
        self._http_sessions.clear()
        await self._stop_listening()
        self.restarts += 1
        if down_s:
            await asyncio.sleep(down_s)
        await self._listen()

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self.settings.sweep_period_ms / 1000)
            self.broker.sweep(loop.time())

    # What others say and ask. --------------------------------------------------------------------

    def publish(self, account: Account, message: Message) -> None:
        """Send a message to every session of the account that wants it."""
        self.broker.publish(account.login, message)

    def forget(self, login: str | None = None, *, answer: bool = True) -> None:
        """Forget the Bayeux sessions of one account, or of all; their next message is answered 402.

        A /meta/connect that is held is answered so at once; with `answer` false it stays held until its
        timeout, as when another node of a cluster lost the session."""
        for session in list(self.broker.sessions.values()):
            if login in (None, session.ledger.account):
                if not answer:
                    session.notify = None
                self.broker.remove(session, "forgotten")

    def expire_csrf(self) -> None:
        """Give every HTTP session another CSRF token: the old ones are answered 403."""
        for session in self._http_sessions.values():
            session.csrf_token = self._secret()

    def oversize(self, login: str, size_bytes: int) -> CallTruth:
        """Publish one notification of at least so many bytes; gives the truth of its call."""
        account = self.accounts[login]
        ledger = self.broker.ledgers[login]
        call_id = f"{'OVERSIZED':0<17}AES{ledger.sent:012X}"
        truth = CallTruth(
            login, "oversized", Dialect.V2, call_id, [call_id], "unknown", "5999", parties=["5999"]
        )
        message = scripts.oversized_message(truth, account.agent, size_bytes, Random(call_id), self._clock())
        self.calls.append(truth)
        self.publish(account, message)
        return truth

    def now(self) -> float:
        """The server's clock in epoch seconds."""
        return self._clock()

    # REST. --------------------------------------------------------------------------------------

    def _secret(self) -> str:
        return f"{self._secrets.getrandbits(128):032X}"

    def _login(self, request: web.Request) -> Account | None:
        """The account that Authorization names; None when it names none or is refused."""
        kind, _, value = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() == "bearer":
            account = self._by_token.get(value.strip())
            return account if account and not account.refused else None
        if kind.lower() != "basic":
            return None
        try:
            login, _, password = base64.b64decode(value, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return None
        account = self.accounts.get(login)
        return account if account and account.password == password and not account.refused else None

    def _session(self, request: web.Request, *, create: bool = False) -> tuple[HttpSession | None, str]:
        """The HTTP session of a request, and the cookie value to set when it is new. Authorization wins
        over a cookie; without `create`, a login without a cookie gets a session that is not kept."""
        cookie = request.cookies.get(SESSION_COOKIE, "")
        session = self._http_sessions.get(cookie)
        if "Authorization" in request.headers:
            account = self._login(request)
            if account is None:
                return None, ""
            if session is None or session.account is not account:
                session = HttpSession(account, self._secret())
                cookie = f"{self._secret()}.node1"
                if create:
                    self._http_sessions[cookie] = session
                    return session, cookie
            return session, ""
        if session is not None and session.account.refused:
            return None, ""
        return session, ""

    def _csrf_failed(self, request: web.Request, session: HttpSession) -> web.Response | None:
        if not self.settings.csrf or request.headers.get(CSRF_HEADER) == session.csrf_token:
            return None
        return json_response({"statusCode": 3, "statusMessage": "Missing or invalid Csrf token"}, status=403)

    def _dress(self, response: web.Response, session: HttpSession, cookie: str) -> web.Response:
        if cookie:
            response.set_cookie(SESSION_COOKIE, cookie, path="/", httponly=True)
        if self.settings.csrf:
            response.headers["X-CSRF-HEADER"] = CSRF_HEADER
            response.headers["X-CSRF-TOKEN"] = session.csrf_token
        return response

    def _device(self, account: Account) -> msgspec.Raw:
        return msgspec.Raw(scripts.render_device(account.agent, "Ready" if account.ready else "NotReady"))

    def _live_calls(self, account: Account) -> list[msgspec.Raw]:
        now_s = self.now()
        return [msgspec.Raw(raw) for call in account.playing for raw in call.live_resources(now_s)]

    async def _get_me(self, request: web.Request) -> web.StreamResponse:
        session, cookie = self._session(request, create=True)
        if session is None:
            return access_denied()
        account = session.account
        user: dict[str, Any] = {
            "id": account.agent.device_id.replace("-", ""),
            "userName": account.login,
            "firstName": account.agent.name,
            "uri": f"{scripts.GATEWAY}/users/{account.login}",
        }
        subresources = request.query.get("subresources", "")
        if "*" in subresources or "devices" in subresources:
            user["devices"] = [self._device(account)]
        if "*" in subresources or "calls" in subresources:
            user["calls"] = self._live_calls(account)
        return self._dress(json_response({"statusCode": 0, "user": user}), session, cookie)

    async def _post_me(self, request: web.Request) -> web.StreamResponse:
        session, _ = self._session(request)
        if session is None:
            return access_denied()
        if refusal := self._csrf_failed(request, session):
            return refusal
        body = await self._body(request)
        account = session.account
        match body.get("operationName"):
            case "StartContactCenterSession":
                account.contact_centre_session = account.ready = True
                answer: dict[str, Any] = {"statusCode": 0}
                if self.settings.partial_contact_centre_session:
                    failure = {
                        "statusCode": 4,
                        "statusMessage": "Interaction server connection is not opened",
                        "channel": "multimedia",
                    }
                    succeeded = [{"statusCode": 0, "channel": "voice"}]
                    answer = {"statusCode": 7, "failed": [failure], "succeeded": succeeded}
            case "EndContactCenterSession":
                account.contact_centre_session = account.ready = False
                answer = {"statusCode": 0}
            case _:
                return json_response(
                    {"statusCode": 1, "statusMessage": "operationName is missing or unknown"}, status=400
                )
        rng = Random(f"{account.login}{self.device_posts}")
        self.device_posts += 1
        state = "Ready" if account.ready else "NotReady"
        self.publish(account, scripts.device_message(account.agent, state, rng, self.now()))
        return self._dress(json_response(answer), session, "")

    async def _get_devices(self, request: web.Request) -> web.StreamResponse:
        session, cookie = self._session(request, create=True)
        if session is None:
            return access_denied()
        body = {"statusCode": 0, "devices": [self._device(session.account)]}
        return self._dress(json_response(body), session, cookie)

    async def _get_calls(self, request: web.Request) -> web.StreamResponse:
        session, cookie = self._session(request, create=True)
        if session is None:
            return access_denied()
        body = {"statusCode": 0, "calls": self._live_calls(session.account)}
        return self._dress(json_response(body), session, cookie)

    async def _post_call(self, request: web.Request) -> web.StreamResponse:
        session, _ = self._session(request)
        if session is None:
            return access_denied()
        if refusal := self._csrf_failed(request, session):
            return refusal
        account = session.account
        device = request.match_info["device"]
        lacking = self.settings.contact_centre_session_required and not account.contact_centre_session
        if device != account.agent.device_id or lacking:
            name = account.agent.dn if device == account.agent.device_id else device
            rng = Random(f"{account.login}{self.device_posts}")
            self.device_posts += 1
            self.publish(account, scripts.error_message(account.agent, rng, self.now()))
            return json_response(
                {"statusCode": 4, "statusMessage": f"Device '{name}' is not registered."}, status=500
            )
        body = await self._body(request)
        destination = body.get("destination")
        number = destination.get("phoneNumber") if isinstance(destination, dict) else None
        if body.get("operationName") != "Dial" or not isinstance(number, str) or not number:
            return json_response(
                {"statusCode": 1, "statusMessage": "operationName Dial and destination.phoneNumber needed"},
                status=400,
            )
        self.dial(account.login, number)
        # 0 says that the switch was asked; what came of it is told by CometD.
        return self._dress(json_response({"statusCode": 0}), session, "")

    async def _body(self, request: web.Request) -> dict[str, Any]:
        try:
            body = msgspec.json.decode(await request.read())
        except msgspec.DecodeError:
            return {}
        return body if isinstance(body, dict) else {}

    def dial(self, login: str, number: str, script: str | None = None) -> ScriptedCall:
        """Dial a number for an account and let the call run by itself, in real time times
        `dial_time_scale`. The script is the given one, or what `DIAL_SCRIPTS` says."""
        account = self.accounts[login]
        account.dials += 1
        rng = Random(f"{self.settings.seed}:dial:{login}:{account.dials}")
        name = script or DIAL_SCRIPTS.get(number, "dial_answered")
        call = self.begin(account, name, rng, number)
        self.spawn(self._play(account, call))
        return call

    def begin(
        self, account: Account, script: str, rng: Random, destination: str | None = None
    ) -> ScriptedCall:
        """Put a call on an account's line. Then `step` it to its end."""
        call = ScriptedCall(
            script,
            account.agent,
            account.dialect,
            rng,
            quirks=self.settings.quirks,
            destination=destination,
            v3_channel=self.settings.v3_channel,
        )
        account.playing.append(call)
        return call

    def step(self, account: Account, call: ScriptedCall, now_s: float) -> tuple[int, float | None]:
        """Do a call's next act and publish what it says: how many messages, and the seconds to the next
        act; None when it is over."""
        messages, delay_s = call.advance(now_s)
        for message in messages:
            self.broker.publish(account.login, message)
        if delay_s is None:
            account.playing.remove(call)
            self.calls.extend(call.truths)
        return len(messages), delay_s

    async def _play(self, account: Account, call: ScriptedCall) -> None:
        delay_s: float | None = 0.0
        while delay_s is not None:
            await asyncio.sleep(delay_s * self.settings.dial_time_scale)
            _, delay_s = self.step(account, call, self.now())

    # CometD over long-polling. --------------------------------------------------------------------

    async def _notifications(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return await self._websocket(request)
        if request.method != "POST":
            return web.Response(status=405)
        self.requests += 1
        body = await request.read()
        if self._is_swallowed(request, body):
            return await self._never(request)
        session, new_cookie = self._session(request, create=b"/meta/handshake" in body)
        if session is None:
            return access_denied()
        if self.settings.csrf_on_notifications and (refusal := self._csrf_failed(request, session)):
            return refusal
        try:
            messages = parse(body)
        except ValueError:
            return web.Response(status=400)
        if not messages or (len(messages) > 1 and any(_channel(m) == "/meta/handshake" for m in messages)):
            # CometD Java: "bayeux protocol violation".
            return web.Response(status=500)
        try:
            response = await self._exchange(request, session.account, messages)
        except Abort:
            return await self._cut(request)
        if isinstance(response, web.Response) and new_cookie:
            response.set_cookie(SESSION_COOKIE, new_cookie, path="/", httponly=True)
        return response

    def _is_swallowed(self, request: web.Request, body: bytes) -> bool:
        """Whether a half-open connection swallows this request before anybody looks at it."""
        session, _ = self._session(request)
        kind = exchange_of(body)
        return session is not None and bool(self.faults.take(session.account.login, kind, arriving=True))

    async def _exchange(
        self, request: web.Request, account: Account, messages: list[dict[str, Any]]
    ) -> web.StreamResponse:
        loop = asyncio.get_running_loop()
        browser_id = request.cookies.get(BROWSER_COOKIE, "")
        new_browser_id = ""
        session: ServerSession | None = None
        if _channel(messages[0]) != "/meta/handshake":
            session = self.broker.find(messages[0], browser_id)
        replies: list[Reply] = []
        data: list[Message] = []
        take_queue = False
        for message in messages:
            match _channel(message):
                case "/meta/handshake":
                    if not browser_id:
                        browser_id = new_browser_id = f"{self._secrets.getrandbits(80):016x}"[:16]
                    session, reply = self.broker.handshake(
                        message, account.login, browser_id, LONG_POLLING, loop.time()
                    )
                    replies.append(reply)
                case "/meta/connect":
                    alone = len(messages) == 1
                    if session is not None and isinstance(session.hold, asyncio.Future):
                        # CometD answers the older of two /meta/connect of a session with an error.
                        self._release(session, session.hold, "superseded")
                    reply, hold_s = self.broker.connect(session, message, LONG_POLLING, alone=alone)
                    if session is None:
                        replies.append(reply)
                        continue
                    if hold_s is not None and await self._hold(session, hold_s) == "superseded":
                        return web.Response(status=500)
                    reply, data = self.broker.conclude(session, reply, LONG_POLLING, loop.time())
                    replies.append(reply)
                case _:
                    replies.append(self.broker.handle(session, message, loop.time()))
                    take_queue = session is not None and not session.ack
        if take_queue and session is not None and not session.ended:
            _, more = session.take(self.settings.reply_messages_max)
            data += more
        response = await self._answer(request, account, _channel(messages[0]), session, data, replies)
        if new_browser_id and isinstance(response, web.Response):
            response.set_cookie(BROWSER_COOKIE, new_browser_id, path="/", httponly=True)
        return response

    async def _hold(self, session: ServerSession, hold_s: float) -> str:
        """Hold a /meta/connect until there is a reason to answer it, which is given."""
        loop = asyncio.get_running_loop()
        hold: asyncio.Future[str] = loop.create_future()
        session.hold = hold
        session.notify = partial(self._release, session, hold, "messages")
        timer = loop.call_later(hold_s, self._release, session, hold, "timeout")
        try:
            if self._closing.is_set():
                raise Abort
            reason = await hold
        finally:
            timer.cancel()
            self._release(session, hold, "cancelled")
        if self._closing.is_set():
            raise Abort
        return reason

    def _release(self, session: ServerSession, hold: asyncio.Future[str], reason: str) -> None:
        if session.hold is hold:
            session.hold = session.notify = None
            self.broker.release(session)
            if not hold.done():
                hold.set_result(reason)

    async def _answer(
        self,
        request: web.Request,
        account: Account,
        channel: str,
        session: ServerSession | None,
        data: list[Message],
        replies: list[Reply],
    ) -> web.StreamResponse:
        """Write the answer to one exchange, unless a fault is due."""
        fault = self.faults.take(account.login, channel.rpartition("/")[2])
        if fault is None and request.transport is not None and not request.transport.is_closing():
            handed_over(session, data)
            return web.Response(
                body=compose(channel, data, replies), content_type="application/json", charset="UTF-8"
            )
        if fault is None:
            self._lose(session, data)
            raise Abort
        return await self._answer_faultily(request, fault, channel, session, data, replies)

    async def _answer_faultily(
        self,
        request: web.Request,
        fault: ArmedFault,
        channel: str,
        session: ServerSession | None,
        data: list[Message],
        replies: list[Reply],
    ) -> web.StreamResponse:
        match fault.kind:
            case Fault.DELAY:
                await asyncio.sleep(fault.seconds)
            case Fault.ADVICE | Fault.ADVICE_NULL | Fault.STRING_INTERVAL:
                self._misadvise(fault, session, replies)
            case Fault.NULL_ITEMS:
                handed_over(session, data)
                body = b"[null," + compose(channel, data, replies)[1:-1] + b",null]"
                return web.Response(body=body, content_type="application/json", charset="UTF-8")
            case _:
                # In all others the messages do not arrive, or not so that they could be relied upon.
                self._lose(session, data)
                return await self._break(request, fault, compose(channel, data, replies), replies)
        handed_over(session, data)
        return web.Response(
            body=compose(channel, data, replies), content_type="application/json", charset="UTF-8"
        )

    async def _break(
        self, request: web.Request, fault: ArmedFault, body: bytes, replies: list[Reply]
    ) -> web.StreamResponse:
        match fault.kind:
            case Fault.HALF_OPEN:
                return await self._never(request)
            case Fault.TRUNCATED_JSON:
                return web.Response(body=body[: len(body) // 2], content_type="application/json")
            case Fault.HTML_503:
                page = "<html><body><h1>503 Service Unavailable</h1></body></html>"
                return web.Response(text=page, content_type="text/html", status=503)
            case Fault.HTTP_STATUS:
                return json_response({"statusCode": 4, "statusMessage": "Simulated"}, status=fault.status)
            case Fault.DROP_MID_REPLY:
                return await self._write_part(request, body, len(body) // 2)
            case Fault.REPLY_LOST:
                return await self._write_part(request, body, len(body) - len(compose("", [], replies)))
            case _:
                return await self._cut(request)

    def _misadvise(self, fault: ArmedFault, session: ServerSession | None, replies: list[Reply]) -> None:
        for reply in replies:
            if fault.kind is Fault.ADVICE_NULL:
                reply["advice"] = None
            elif fault.kind is Fault.STRING_INTERVAL:
                interval = str(self.settings.interval_ms)
                reply["advice"] = {**(reply.get("advice") or {}), "interval": interval}
            else:
                reply["advice"] = fault.advice
        if session is not None and fault.advice.get("reconnect") in ("none", "handshake"):
            self.broker.remove(session, "forgotten")

    def _lose(self, session: ServerSession | None, data: list[Message]) -> None:
        """Note that messages left the queue for nothing. With ack they are still in it."""
        if session is not None and not session.ack:
            session.ledger.abandon(data)

    async def _write_part(self, request: web.Request, body: bytes, count: int) -> web.StreamResponse:
        """Promise the whole body, send its first bytes, and close."""
        response = web.StreamResponse(headers={"Content-Type": "application/json;charset=UTF-8"})
        response.content_length = len(body)
        await response.prepare(request)
        await response.write(body[:count])
        if request.transport is not None:
            request.transport.close()
        return response

    async def _cut(self, request: web.Request) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()
        return web.Response()

    async def _never(self, request: web.Request) -> web.StreamResponse:
        """Leave a request unanswered until the client or the server goes away."""
        try:
            async with asyncio.timeout(UNANSWERED_S):
                await self._closing.wait()
        except TimeoutError:
            _log.debug("a half-open connection was kept for %s s", UNANSWERED_S)
        return await self._cut(request)

    # CometD over websocket. -----------------------------------------------------------------------

    async def _websocket(self, request: web.Request) -> web.StreamResponse:
        if not self.settings.websocket:
            return web.Response(status=400)
        session, _ = self._session(request)
        if session is None:
            return access_denied()
        socket = web.WebSocketResponse(max_msg_size=REQUEST_BYTES_MAX, compress=False)
        await socket.prepare(request)
        endpoint = _WebSocketEndpoint(self, request, socket, session.account)
        try:
            async with asyncio.TaskGroup() as tasks:
                writer = tasks.create_task(endpoint.write())
                await self._read(request, socket, endpoint, session.account)
                writer.cancel()
        finally:
            endpoint.detach()
        return socket

    async def _read(
        self,
        request: web.Request,
        socket: web.WebSocketResponse,
        endpoint: "_WebSocketEndpoint",
        account: Account,
    ) -> None:
        """Hand the frames of a websocket to its endpoint until it is closed."""
        async for frame in socket:
            if frame.type is not WSMsgType.TEXT:
                continue
            self.requests += 1
            body = frame.data.encode()
            if self.faults.take(account.login, exchange_of(body), arriving=True):
                await self._never(request)
                return
            try:
                endpoint.receive(parse(body))
            except ValueError:
                await socket.close(code=1011)

    # The control API. -----------------------------------------------------------------------------

    def _local(
        self, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """Let only loopback in."""

        async def guarded(request: web.Request) -> web.StreamResponse:
            if request.remote is None or not ip_address(request.remote).is_loopback:
                return access_denied()
            try:
                return await handler(request)
            except (SettingsError, KeyError, TypeError, ValueError) as error:
                return json_response({"error": f"{type(error).__name__}: {error}"}, status=400)

        return guarded

    async def _post_faults(self, request: web.Request) -> web.StreamResponse:
        """One object per request: `{"fault": name, …}`, `{"random": {name: rate}, "seed": n}`, or one of
        `{"clear": true}`, `{"forget": login | null}`, `{"restart": down_s}`, `{"refuse_login": login,
        "on": bool}`, `{"refuse_subscription": channel, "on": bool}`, `{"expire_csrf": true}`,
        `{"oversized": login, "bytes": n}`."""
        match await self._body(request):
            case {"fault": str(kind), **details}:
                self.faults.arm(kind, **details)
            case {"random": dict(rates), **details}:
                self.faults.at_random(rates, int(details.get("seed", self.settings.seed)))
            case {"clear": _}:
                self.faults.clear()
            case {"forget": login, **details}:
                self.forget(login, answer=bool(details.get("answer", True)))
            case {"restart": down_s}:
                # The restart cuts this very connection, so it is begun after the answer.
                asyncio.get_running_loop().call_later(
                    0.05, lambda: self.spawn(self.restart(float(down_s or 0)))
                )
            case {"refuse_login": str(login), "on": bool(on)}:
                self.accounts[login].refused = on
            case {"refuse_subscription": str(channel), "on": bool(on)}:
                (self.broker.refused.add if on else self.broker.refused.discard)(channel)
            case {"expire_csrf": _}:
                self.expire_csrf()
            case {"oversized": str(login), "bytes": int(size_bytes)}:
                self.oversize(login, size_bytes)
            case other:
                raise SettingsError(f"simulator: no such fault: {other}")
        return json_response({"ok": True})

    async def _get_stats(self, request: web.Request) -> web.StreamResponse:
        return json_response(self.stats())

    def stats(self) -> dict[str, Any]:
        """Counters of the server, as a JSON object."""
        ledgers = self.broker.ledgers.values()
        return {
            "accounts": len(self.accounts),
            "sessions": len(self.broker.sessions),
            "handshakes": self.broker.handshakes,
            "requests": self.requests,
            "restarts": self.restarts,
            "sent": sum(ledger.sent for ledger in ledgers),
            "accepted": sum(ledger.accepted for ledger in ledgers),
            "unsubscribed": sum(ledger.unsubscribed for ledger in ledgers),
            "waiting": sum(session.waiting for session in self.broker.sessions.values()),
            "live_calls": sum(len(account.playing) for account in self.accounts.values()),
            "faults": dict(self.faults.struck),
        }


class _WebSocketEndpoint:
    """One websocket: frames go out in order by one writer, which is woken when there is a reason."""

    def __init__(
        self, server: GwsServer, request: web.Request, socket: web.WebSocketResponse, account: Account
    ) -> None:
        self._server = server
        self._request = request
        self._socket = socket
        self._account = account
        self._session: ServerSession | None = None
        self._replies: deque[tuple[str, list[Reply]]] = deque()
        self._connect: Reply | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = False
        self._wake = asyncio.Event()

    def receive(self, messages: list[dict[str, Any]]) -> None:
        """Handle the messages of one frame; answers are left to the writer."""
        loop = asyncio.get_running_loop()
        broker = self._server.broker
        for message in messages:
            channel = _channel(message)
            if channel == "/meta/handshake":
                self.detach()
                self._session, reply = broker.handshake(
                    message, self._account.login, "", WEBSOCKET, loop.time()
                )
                self._replies.append((channel, [reply]))
                continue
            if self._session is None or self._session.ended:
                self._session = broker.find(message, None)
            session = self._session
            if session is not None:
                # Another endpoint of the session, if any, hears nothing from now on.
                session.notify = self._notify
            if channel == "/meta/connect":
                reply, hold_s = broker.connect(session, message, WEBSOCKET, alone=len(messages) == 1)
                if session is None:
                    self._replies.append((channel, [reply]))
                    continue
                self._connect = reply
                self._due = hold_s is None
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = loop.call_later(hold_s, self._time_out) if hold_s is not None else None
            else:
                self._replies.append((channel, [broker.handle(session, message, loop.time())]))
        self._wake.set()

    def detach(self) -> None:
        """The websocket is gone or begins another session; the old one may expire from now on."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        session, self._session = self._session, None
        if session is not None and session.notify == self._notify:
            session.notify = None
            if self._connect is not None:
                now = asyncio.get_running_loop().time()
                settings = self._server.settings
                session.expires_at = now + (settings.interval_ms + settings.max_interval_ms) / 1000
        self._connect = None

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
                while self._replies:
                    channel, replies = self._replies.popleft()
                    await self._send(channel, [], replies)
                session = self._session
                if session is None:
                    continue
                if self._due and self._connect is not None:
                    reply, self._connect, self._due = self._connect, None, False
                    if self._timer is not None:
                        self._timer.cancel()
                        self._timer = None
                    now = asyncio.get_running_loop().time()
                    reply, data = self._server.broker.conclude(session, reply, WEBSOCKET, now)
                    await self._send("/meta/connect", data, [reply])
                elif not session.ack and session.fresh and session.subscriptions:
                    _, data = session.take(0)
                    await self._send("", data, [])
            except ConnectionError:
                return

    async def _send(self, channel: str, data: list[Message], replies: list[Reply]) -> None:
        """Messages first, in frames of their own, then the replies: as CometD does."""
        server = self._server
        session = self._session
        fault = server.faults.take(self._account.login, channel.rpartition("/")[2])
        if fault is not None:
            if not await self._falter(fault, data, replies):
                return
        elif self._request.transport is None or self._request.transport.is_closing():
            server._lose(session, data)
            raise ConnectionResetError
        for frame in bayeux.frames(data, server.settings.frame_messages_max):
            await self._socket.send_frame(frame, WSMsgType.TEXT)
        if replies:
            await self._socket.send_frame(compose("", [], replies), WSMsgType.TEXT)
        handed_over(session, data)

    async def _falter(self, fault: ArmedFault, data: list[Message], replies: list[Reply]) -> bool:
        """Let a fault happen; True when the frames are to be sent all the same."""
        server, session, socket = self._server, self._session, self._socket
        match fault.kind:
            case Fault.DELAY:
                await asyncio.sleep(fault.seconds)
                return True
            case Fault.ADVICE | Fault.ADVICE_NULL | Fault.STRING_INTERVAL:
                server._misadvise(fault, session, replies)
                return True
            case Fault.NULL_ITEMS:
                await socket.send_frame(b"[null]", WSMsgType.TEXT)
                return True
        server._lose(session, data)
        whole = list(bayeux.frames(data, server.settings.frame_messages_max))
        match fault.kind:
            case Fault.HALF_OPEN:
                await server._closing.wait()
            case Fault.TRUNCATED_JSON:
                body = compose("", data, replies)
                await socket.send_frame(body[: len(body) // 2], WSMsgType.TEXT)
                return False
            case Fault.DROP_MID_REPLY:
                whole = whole[: len(whole) // 2]
            case Fault.DROP_BEFORE_REPLY:
                whole = []
        if fault.kind in WEBSOCKET_FAULTS:
            for frame in whole:
                await socket.send_frame(frame, WSMsgType.TEXT)
            if self._request.transport is not None:
                self._request.transport.close()
        else:
            await socket.close(code=1011)
        raise ConnectionResetError


def _channel(message: dict[str, Any]) -> str:
    return str(message.get("channel"))


def exchange_of(body: bytes) -> str:
    """The kind of exchange by its first meta channel, without parsing: connect, handshake, …"""
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


def compose(channel: str, data: list[Message], replies: list[Reply]) -> bytes:
    """The body of an answer. CometD writes a handshake reply first, and every other reply last."""
    written = [msgspec.json.encode(reply) for reply in replies]
    messages = [message.raw for message in data]
    parts = [*written, *messages] if channel == "/meta/handshake" else [*messages, *written]
    return b"[" + b",".join(parts) + b"]"


def handed_over(session: ServerSession | None, data: list[Message]) -> None:
    """Without ack, being written is all the delivery there is."""
    if session is not None and not session.ack:
        for message in data:
            message.delivered = True
