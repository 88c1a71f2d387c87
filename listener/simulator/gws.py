"""Genesys Web Services as a server on loopback: logins, REST, the way into CometD, and its controls.

It owns the listening socket, the HTTP sessions and the clock. CometD itself is `listener.simulator.bayeux`
(what is answered) and `listener.simulator.cometd` (how it travels); what is said about calls comes from
`listener.simulator.centre`, through `begin` and `step`.

Logins and errors are those that were seen at GWS: a request without a valid login is HTTP 403 with
statusCode 20, never 401; CometD's requests need the same login (JSESSIONID, or Authorization on each).

The control API (`/simulator/…`) is for loopback only and has no login.
"""

import asyncio
import base64
import binascii
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from random import Random
from time import time  # noqa: TID251 - the default of a shell
from types import TracebackType
from typing import Any, Final, Self
from uuid import UUID

import msgspec
from aiohttp import web

from listener.errors import SettingsError
from listener.simulator import scripts
from listener.simulator.bayeux import Broker, ServerSession
from listener.simulator.cometd import REQUEST_BYTES_MAX, Transports
from listener.simulator.faults import Faults
from listener.simulator.scripts import Agent, CallTruth, Dialect, Message, ScriptedCall
from listener.simulator.settings import MIXED, SimulatorSettings

SESSION_COOKIE: Final = "JSESSIONID"
CSRF_HEADER: Final = "X-CSRF-TOKEN"
CALLS_LISTED_MAX: Final = 100_000
"""Finished calls whose truth is kept; older ones are dropped, so that a run of days does not grow."""
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
        self.restarts = 0
        self.snapshot_s = 0.0
        """How late a list of live calls comes: it says what was live when it was asked for."""
        self._device_messages = 0
        self._clock = clock
        self._by_token = {account.token: account for account in self.accounts.values()}
        self._http_sessions: dict[str, HttpSession] = {}
        # Cookies and tokens must differ from those before a restart, whatever the seed.
        self._secrets = Random()
        self._transports = Transports(settings, self.broker, self.faults)
        self._tasks = asyncio.TaskGroup()
        self._background: set[asyncio.Task[None]] = set()
        self._runner: web.AppRunner | None = None
        self._control: list[tuple[str, str, Callable[[web.Request], Awaitable[web.StreamResponse]]]] = []

    # Life. --------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The base URL, without a path."""
        return f"http://{self.settings.host}:{self.port}"

    async def __aenter__(self) -> Self:
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
            # An error of the caller's own stays what it is; only a failed task makes a group of it.
            cancelled = isinstance(error, asyncio.CancelledError)
            await self._tasks.__aexit__(*((kind, error, trace) if cancelled else (None, None, None)))

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine until it is done or the server stops."""
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
        for method, path, handler in self._control:
            app.router.add_route(method, path, self._local(handler))
        self._transports.closing = asyncio.Event()
        self._runner = web.AppRunner(
            app, access_log=None, handle_signals=False, shutdown_timeout=RESTART_GRACE_S, keepalive_timeout=75
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.settings.host, self.port, backlog=4096)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _stop_listening(self) -> None:
        self._transports.closing.set()
        if self._runner is None:
            return
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
        await self._stop_listening()
        self.forget()
        self._http_sessions.clear()
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
        message.said_at_s = self._clock()
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

    def deafen(self, login: str | None = None, *, seconds: float | None = None) -> None:
        """Let the present sessions of one account, or of all, be told nothing more, while all that they ask
        is answered as ever: for so many seconds, or else until there is another session."""
        for session in self.broker.sessions.values():
            if login in (None, session.ledger.account):
                lost = session.deafen()
                if seconds is not None:
                    self.spawn(self._mend(session, lost, seconds))

    async def _mend(self, session: ServerSession, lost: set[str], seconds: float) -> None:
        await asyncio.sleep(seconds)
        for channel in lost:
            session.subscribe(channel)

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
        rng = Random(f"{account.login}{self._device_messages}")
        self._device_messages += 1
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
        await asyncio.sleep(self.snapshot_s)
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
            rng = Random(f"{account.login}{self._device_messages}")
            self._device_messages += 1
            self.publish(account, scripts.error_message(account.agent, rng, self.now()))
            return json_response(
                {"statusCode": 4, "statusMessage": f"Device '{name}' is not registered."}, status=500
            )
        body = await self._body(request)
        record = body.get("outboundRecord")
        asked = record if isinstance(record, dict) else body.get("destination")
        number = asked.get("phoneNumber") if isinstance(asked, dict) else None
        if body.get("operationName") != "Dial" or not isinstance(number, str) or not number:
            return json_response(
                {
                    "statusCode": 1,
                    "statusMessage": "operationName Dial needed, and the phoneNumber of a destination"
                    " or an outboundRecord",
                },
                status=400,
            )
        attached = record.get("otherFields") if isinstance(record, dict) else body.get("userData")
        self.dial(account.login, number, attached=attached if isinstance(attached, dict) else None)
        # 0 says that the switch was asked; what came of it is told by CometD.
        return self._dress(json_response({"statusCode": 0}), session, "")

    async def _body(self, request: web.Request) -> dict[str, Any]:
        try:
            body = msgspec.json.decode(await request.read())
        except msgspec.DecodeError:
            return {}
        return body if isinstance(body, dict) else {}

    def dial(
        self,
        login: str,
        number: str,
        script: str | None = None,
        *,
        attached: Mapping[str, Any] | None = None,
    ) -> ScriptedCall:
        """Dial a number for an account and let the call run by itself, in real time times
        `dial_time_scale`. The script is the given one, or what `DIAL_SCRIPTS` says; `attached` becomes the
        call's userData."""
        account = self.accounts[login]
        account.dials += 1
        rng = Random(f"{self.settings.seed}:dial:{login}:{account.dials}")
        name = script or DIAL_SCRIPTS.get(number, "dial_answered")
        call = self.begin(account, name, rng, number, attached=attached)
        self.spawn(self._play(account, call))
        return call

    def begin(
        self,
        account: Account,
        script: str,
        rng: Random,
        destination: str | None = None,
        *,
        attached: Mapping[str, Any] | None = None,
    ) -> ScriptedCall:
        """Put a call on an account's line. Then `step` it to its end."""
        call = ScriptedCall(
            script,
            account.agent,
            account.dialect,
            rng,
            quirks=self.settings.quirks,
            destination=destination,
            attached=attached,
            v3_channel=self.settings.v3_channel,
        )
        account.playing.append(call)
        return call

    def step(self, account: Account, call: ScriptedCall, now_s: float) -> tuple[int, float | None]:
        """Do a call's next act and publish what it says: how many messages, and the seconds to the next
        act; None when it is over."""
        messages, delay_s = call.advance(now_s)
        for message in messages:
            self.publish(account, message)
        if delay_s is None:
            account.playing.remove(call)
            self.calls.extend(call.truths)
        return len(messages), delay_s

    async def _play(self, account: Account, call: ScriptedCall) -> None:
        delay_s: float | None = 0.0
        while delay_s is not None:
            await asyncio.sleep(delay_s * self.settings.dial_time_scale)
            _, delay_s = self.step(account, call, self.now())

    # CometD. ------------------------------------------------------------------------------------

    async def _notifications(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Upgrade", "").lower() == "websocket":
            session, _ = self._session(request)
            if session is None:
                return access_denied()
            return await self._transports.websocket(request, session.account.login)
        if request.method != "POST":
            return web.Response(status=405)
        body = await request.read()
        session, new_cookie = self._session(request, create=b"/meta/handshake" in body)
        if session is None:
            return access_denied()
        if self.settings.csrf_on_notifications and (refusal := self._csrf_failed(request, session)):
            return refusal
        response = await self._transports.poll(request, session.account.login, body)
        if new_cookie and not response.prepared:
            response.set_cookie(SESSION_COOKIE, new_cookie, path="/", httponly=True)
        return response

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
        `{"deaf": login | null, "seconds": s}`, `{"snapshot_s": s}`, `{"oversized": login, "bytes": n}`."""
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
            case {"deaf": login, **details}:
                self.deafen(login, seconds=details.get("seconds"))
            case {"snapshot_s": seconds}:
                self.snapshot_s = float(seconds)
            case {"oversized": str(login), "bytes": int(size_bytes)}:
                self.oversize(login, size_bytes)
            case other:
                raise SettingsError(f"simulator: no such fault: {other}")
        return json_response({"ok": True})

    def stats(self) -> dict[str, Any]:
        """Counters of the server, as a JSON object."""
        ledgers = self.broker.ledgers.values()
        return {
            "accounts": len(self.accounts),
            "sessions": len(self.broker.sessions),
            "handshakes": self.broker.handshakes,
            "exchanges": self._transports.exchanges,
            "restarts": self.restarts,
            "sent": sum(ledger.sent for ledger in ledgers),
            "accepted": sum(ledger.accepted for ledger in ledgers),
            "unsubscribed": sum(ledger.unsubscribed for ledger in ledgers),
            "waiting": sum(session.waiting for session in self.broker.sessions.values()),
            "live_calls": sum(len(account.playing) for account in self.accounts.values()),
            "faults": dict(self.faults.struck),
        }
