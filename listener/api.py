"""Dials over HTTP: the server within the daemon, and the client for Python programs and the command line.

It decides paths, statuses and who may ask; it refuses to know what a dial is (`listener.switchboard` places
them, `listener.store.history` answers). Every request needs the token, also on loopback: who may dial costs
money and disturbs people. Only Click2Dial's webhook does not, and has a token of its own.

    POST   /dials         {"system", "account" or "environment", and the request's own parameters}
                          → 202 it is written down and being asked for; 200 this Idempotency-Key had it before
    GET    /dials         filters as `listener dials`; {"dials": […], "after": …}
    GET    /dials/why     why dials fail more than before
    GET    /dials/ID      one, with the facts that led to its outcome
    DELETE /dials/ID      have it hung up, where the system can
    POST   /recordings    {"action": "start" or "stop", "environment", "extenOrUniqueId", …}
    POST   /calls         {"action": "hangup" or "answer", "environment", …}

An error is `{"error", "cure"}`: 400 the rule that was broken, 401 no or a wrong token, 403 not allowed, 404
no such account, extension or dial, 409 the key was used for another request, 413 too large, 429 too many at
the same time, 502 the outside system refused, 503 the database does not answer; then nothing was sent.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec
import structlog
from aiohttp import web
from aiohttp.typedefs import Handler
from multidict import MultiMapping

from listener.adapters.exchange import challenge
from listener.core.calls import JsonObject
from listener.core.dialling import Dial, Leg, Origin, Outcome, System
from listener.core.moments import moment
from listener.core.why import explain
from listener.errors import (
    InvalidRequest,
    KeyReused,
    ListenerError,
    NotAllowed,
    NotKnown,
    RemoteError,
    RemoteUnavailable,
    SettingsError,
    StoreError,
    StoreUnavailable,
    TooMany,
)
from listener.operations import listen
from listener.store.dialled import DialFound, DialHistory, DialPage, DialTimeline
from listener.store.history import PAGE_MAX
from listener.switchboard import Placed

_T = TypeVar("_T")
_E = TypeVar("_E", bound=StrEnum)

LIMIT = 50
"""Dials in one answer, where no other number is asked for."""

BODY_BYTES_MAX = 256 * 1024
"""The largest request is an outbound record, of `core.requests.DATA_BYTES_MAX`; a larger body is refused."""

SHUTDOWN_S_MAX = 1.0
"""How long an open request may delay the end."""

KEY_HEADER = "Idempotency-Key"

WEBHOOK = "/click2dial/"
"""Where Click2Dial posts its records: this, and the PBX's name."""

REQUEST_S = 30.0
"""How long the client waits for one answer."""

POLL_S = 0.2
"""How often the client looks at a dial that it follows."""

STATUSES: tuple[tuple[type[ListenerError], int], ...] = (
    (InvalidRequest, 400),
    (NotAllowed, 403),
    (NotKnown, 404),
    (KeyReused, 409),
    (TooMany, 429),
    (RemoteError, 502),
    (StoreError, 503),
    (ListenerError, 400),
)
"""What each kind of error is told as; the first that fits."""


class Places(Protocol):
    """Who places dials: `listener.switchboard.Switchboard`."""

    async def place(self, fields: JsonObject, key: str | None = None) -> Placed:
        """Places a dial."""

    async def hang_up(self, dial: Dial) -> Dial:
        """Has one hung up."""

    async def control(self, action: str, fields: JsonObject) -> None:
        """Has something done with a call."""


# ── How dials are told ────────────────────────────────────────────────────────────────────────────────


def dial_told(dial: Dial) -> JsonObject:
    """A dial as JSON tells it: its fields, and what follows from them."""
    told: JsonObject = msgspec.to_builtins(dial)
    told["account_id"] = told.pop("account")
    told["cause_text"] = "" if dial.cause is None else str(dial.cause)
    return told | {
        "time_to_ring_s": dial.time_to_ring_s,
        "time_to_answer_s": dial.time_to_answer_s,
        "retry": dial.retry,
    }


def found_told(found: DialFound) -> JsonObject:
    """The same of a dial that was found, with whose it is."""
    told: JsonObject = msgspec.to_builtins(found)
    del told["dial"]
    return dial_told(found.dial) | told


def page_told(page: DialPage) -> JsonObject:
    """A page of dials as JSON tells it."""
    told: JsonObject = msgspec.to_builtins(page)
    return told | {"dials": [found_told(found) for found in page.dials]}


def timeline_told(timeline: DialTimeline) -> JsonObject:
    """A dial with its facts, its call and what was asked for, as JSON tells it."""
    told: JsonObject = msgspec.to_builtins(timeline)
    del told["found"]
    return found_told(timeline.found) | told


# ── Questions ─────────────────────────────────────────────────────────────────────────────────────────

_FILTERS = frozenset(
    {
        "since", "until", "last", "account", "tenant", "system", "origin", "outcome", "waiting", "leg",
        "cause", "number", "number_ends", "campaign", "limit", "after",
    }
)  # fmt: skip
_WHY_FILTERS = frozenset(
    {"since", "until", "last", "before", "account", "tenant", "system", "origin", "campaign"}
)

WHY_LAST = "1h"
"""The period that `GET /dials/why` explains where none is asked for."""


class _Query:
    """The filters of a request, read and checked. Raises `InvalidRequest`."""

    def __init__(self, query: MultiMapping[str], known: frozenset[str], now: datetime) -> None:
        if unknown := sorted(set(query) - known):
            raise InvalidRequest(unknown[0], "is no filter here", f"there are {', '.join(sorted(known))}")
        for name, given in query.items():
            _text(name, given)
        self._query = query
        self._now = now

    def text(self, name: str) -> str | None:
        """A filter as it was given."""
        return self._query.get(name)

    def texts(self, name: str) -> list[str]:
        """A filter that may be repeated."""
        return list(self._query.getall(name, []))

    def moment(self, name: str) -> datetime | None:
        """A time."""
        given = self._query.get(name)
        if given is None and name == "since":
            given = self._query.get("last")
        try:
            return None if given is None else moment(given, self._now)
        except ValueError as error:
            raise InvalidRequest(name, *_halves(str(error))) from None

    def period(self) -> tuple[datetime | None, datetime | None]:
        """Its beginning and its end."""
        since, until = self.moment("since"), self.moment("until")
        if since is not None and until is not None and until < since:
            raise InvalidRequest("until", "is before since", "exchange them")
        return since, until

    def one(self, name: str, kind: type[_E]) -> _E | None:
        """One word of a list."""
        found = self.several(name, kind)
        return found[0] if found else None

    def several(self, name: str, kind: type[_E]) -> list[_E]:
        """Several words of a list."""
        try:
            return [kind(each) for each in self._query.getall(name, [])]
        except ValueError:
            raise InvalidRequest(name, "is none of the words", f"write {', '.join(kind)}") from None

    def yes(self, name: str) -> bool | None:
        """true or false."""
        given = self._query.get(name)
        if given not in (None, "true", "false"):
            raise InvalidRequest(name, "is neither true nor false", "write one of them")
        return None if given is None else given == "true"

    def limit(self) -> int:
        """How many."""
        given = self._query.get("limit", str(LIMIT))
        if not (_COUNT.fullmatch(given) and 0 < int(given) <= PAGE_MAX):
            raise InvalidRequest("limit", "is no number that is allowed", f"write 1 to {PAGE_MAX}")
        return int(given)


_COUNT = re.compile(r"[0-9]{1,9}")
"""More digits are no number of dials, and int() refuses more than 4300."""

_NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""PostgreSQL has no NUL in a text; a surrogate is what a byte becomes that is no UTF-8."""


def _text(name: str, given: str) -> str:
    """A value of a URL that can be looked for. Raises `InvalidRequest`."""
    if _NO_TEXT.search(given):
        raise InvalidRequest(name, "has a byte that is in no text", "write it as UTF-8, without NUL")
    return given


def _halves(text: str) -> tuple[str, str]:
    said, _, cure = text.partition("; ")
    return said, cure or "see the README, Dials"


class Api:
    """The server. Enter it as an asynchronous context manager to serve, leave it to stop.

    Without `token` nobody may ask, and only the `webhooks` (by the PBX's name) are served. `port` 0 takes a
    free port; `port` says which, once it serves.
    """

    def __init__(
        self,
        *,
        token: str | None,
        places: Places,
        history: DialHistory,
        webhooks: Mapping[str, Handler] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),  # noqa: TID251 - a shell's default
    ) -> None:
        self.host = host
        self.port = port
        self._token = token
        self._places = places
        self._history = history
        self._wall = wall
        self._webhooks = dict(webhooks or {})
        self._log = structlog.get_logger()
        app = web.Application(middlewares=[self._told, self._guard], client_max_size=BODY_BYTES_MAX)
        for method, path, handler in (
            ("POST", "/dials", self._place),
            ("GET", "/dials", self._dials),
            ("GET", "/dials/why", self._why),
            ("GET", "/dials/{id}", self._dial),
            ("DELETE", "/dials/{id}", self._hang_up),
            ("POST", "/recordings", self._recording),
            ("POST", "/calls", self._call),
            ("POST", WEBHOOK + "{name}", self._webhook),
        ):
            app.router.add_route(method, path, handler, expect_handler=_expected)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S_MAX)

    async def __aenter__(self) -> Self:
        self.port = await listen(self._runner, "api", self.host, self.port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    @web.middleware
    async def _told(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Every failure as JSON, with a status of its own."""
        try:
            return await handler(request)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            cure = "see the README, Dials"
            if error.status == 413:
                cure = f"send at most {BODY_BYTES_MAX} bytes"
            return _error(error.status, error.reason.lower(), cure)
        except ListenerError as error:
            status = next(status for kind, status in STATUSES if isinstance(error, kind))
            said, _, cure = str(error).partition("; ")
            return _error(status, said, cure)
        except Exception as error:  # noqa: BLE001 - whatever it is, the next request must be answered
            self._log.exception("a request broke", path=request.path)
            return _error(500, f"a defect of ours: {type(error).__name__}", "the log has where")

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if request.path.startswith(WEBHOOK):
            return await handler(request)  # it has a token of its own
        if self._token is None:
            return _error(403, "nobody may ask here", "set api.token_file, and start the listener again")
        refused = challenge(self._token, request.headers.get("Authorization", ""))
        if refused is not None:
            answer = _error(401, "no token, or a wrong one", "send Authorization: Bearer with api.token")
            answer.headers["WWW-Authenticate"] = refused
            return answer
        return await handler(request)

    async def _place(self, request: web.Request) -> web.Response:
        placed = await self._places.place(await _fields(request), request.headers.get(KEY_HEADER))
        told = dial_told(placed.dial) | {"warnings": list(placed.warnings)}
        return _json(told, status=202 if placed.is_new else 200)

    async def _dials(self, request: web.Request) -> web.Response:
        query = _Query(request.query, _FILTERS, self._wall())
        since, until = query.period()
        page = await self._history.dials(
            since=since,
            until=until,
            accounts=query.texts("account"),
            tenant=query.texts("tenant"),
            systems=query.several("system", System),
            origin=query.one("origin", Origin),
            campaigns=query.texts("campaign"),
            outcomes=query.several("outcome", Outcome),
            waiting=query.yes("waiting"),
            leg=query.one("leg", Leg),
            cause=query.text("cause"),
            number=query.text("number"),
            number_ends=query.text("number_ends"),
            limit=query.limit(),
            after=query.text("after"),
        )
        return _json(page_told(page))

    async def _why(self, request: web.Request) -> web.Response:
        now = self._wall()
        query = _Query(request.query, _WHY_FILTERS, now)
        since, until = query.period()
        since, until = since or moment(WHY_LAST, now), until or now + timedelta(seconds=1)
        if until < since:
            raise InvalidRequest("since", "is after the end of the period", "give an earlier one")
        tallies = await self._history.tallies(
            since,
            until,
            before=query.moment("before"),
            accounts=query.texts("account"),
            tenant=query.texts("tenant"),
            systems=query.several("system", System),
            origin=query.one("origin", Origin),
            campaigns=query.texts("campaign"),
        )
        return _json(await asyncio.to_thread(explain, *tallies))

    async def _dial(self, request: web.Request) -> web.Response:
        id = _text("id", request.match_info["id"])
        return _json(timeline_told(_there(await self._history.dial(id), id)))

    async def _hang_up(self, request: web.Request) -> web.Response:
        id = _text("id", request.match_info["id"])
        found = _there(await self._history.dial(id), id).found
        return _json(dial_told(await self._places.hang_up(found.dial)), status=202)

    async def _recording(self, request: web.Request) -> web.Response:
        return await self._control(request, ("start", "stop"))

    async def _call(self, request: web.Request) -> web.Response:
        return await self._control(request, ("hangup", "answer"))

    async def _control(self, request: web.Request, actions: tuple[str, ...]) -> web.Response:
        fields = await _fields(request)
        action = fields.pop("action", None)
        if action not in actions:
            raise InvalidRequest("action", "is none of this resource", f"write {' or '.join(actions)}")
        await self._places.control(action, fields)
        return _json({"done": action})

    async def _webhook(self, request: web.Request) -> web.StreamResponse:
        handler = self._webhooks.get(request.match_info["name"])
        if handler is None:
            raise NotKnown("no Click2Dial of that name has a webhook; set its webhook_token_file")
        return await handler(request)


async def _expected(request: web.Request) -> web.StreamResponse | None:
    """What to do about `Expect` (RFC 9110, 10.1.1). aiohttp's own repeats in its refusal what was expected,
    and breaks on bytes that are no text."""
    if request.headers["Expect"].lower() != "100-continue":
        return _error(417, "the header Expect is none that we know", "leave it out, or send 100-continue")
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    return None


async def _fields(request: web.Request) -> JsonObject:
    """The JSON object that was posted. Raises `InvalidRequest`."""
    raw = await request.read()
    try:
        fields = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise InvalidRequest("body", "is no JSON object", 'send one, such as {"system": "gws", …}')
    return fields


def _there(found: _T | None, id: str) -> _T:
    if found is None:
        raise NotKnown(f"there is no dial {id[:80]!r}; `listener dials` lists them")
    return found


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")


def _error(status: int, error: str, cure: str) -> web.Response:
    return _json({"error": error, "cure": cure}, status)


# ── The client ────────────────────────────────────────────────────────────────────────────────────────


class Client:
    """Places dials through a listener that runs, from Python. Use it as an asynchronous context manager.

        async with Client("http://127.0.0.1:9465", token) as listener:
            dial = await listener.dial("gws", account="agent5001", number="5000", key="order-4711")
            async for dial in listener.follow(dial["id"]):
                print(dial["state"], dial["outcome"])

    Dials are given as JSON objects: the fields of `listener.core.dialling.Dial`. Raises what the listener
    says as the errors of `listener.errors`: `InvalidRequest`, `NotKnown`, `NotAllowed`, `KeyReused`,
    `TooMany`, `RemoteError`, `StoreUnavailable`; `SettingsError` for a wrong token; `RemoteUnavailable` if no
    listener answers. After that last one, or `StoreUnavailable`, ask again with the same `key`: it does not
    dial twice.
    """

    def __init__(self, url: str, token: str, *, request_s: float = REQUEST_S) -> None:
        self._url = url.rstrip("/")
        self._token = token
        self._request_s = request_s
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self._token}"},
            timeout=aiohttp.ClientTimeout(total=self._request_s),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._http is not None:
            await self._http.close()

    async def dial(
        self,
        system: str,
        *,
        account: str | None = None,
        environment: str | None = None,
        campaign: str | None = None,
        key: str | None = None,
        **parameters: Any,
    ) -> JsonObject:
        """Place a dial: `system` is gws, preview, noojee or click2dial, `parameters` are its request's own,
        by their vendor's names. Gives it as soon as it is written down; `follow` it. A `key` dials once."""
        whose = {"system": system, "account": account, "environment": environment, "campaign": campaign}
        fields = {name: value for name, value in whose.items() if value is not None} | parameters
        return await self._ask("POST", "/dials", fields, {KEY_HEADER: key} if key is not None else None)

    async def get(self, id: str) -> JsonObject:
        """A dial as it is now, with its facts."""
        return await self._ask("GET", f"/dials/{_segment(id)}")

    async def dials(self, **filters: str) -> JsonObject:
        """A page of dials; filters as `GET /dials` has them."""
        return await self._ask("GET", "/dials", query=filters)

    async def why(self, **filters: str) -> JsonObject:
        """Why dials fail more than before."""
        return await self._ask("GET", "/dials/why", query=filters)

    async def follow(self, id: str, *, poll_s: float = POLL_S) -> AsyncIterator[JsonObject]:
        """A dial each time that it changes, until it has its outcome. Bound it with a timeout if need be: it
        lasts as long as the conversation."""
        before: JsonObject | None = None
        while True:
            told = await self.get(id)
            if told != before:
                before = told
                yield told
            if told["outcome"] is not None:
                return
            await asyncio.sleep(poll_s)

    async def hang_up(self, id: str) -> JsonObject:
        """Have a dial hung up; only Noojee can."""
        return await self._ask("DELETE", f"/dials/{_segment(id)}")

    async def control(self, action: str, *, environment: str | None = None, **parameters: Any) -> None:
        """Have Noojee `hangup` or `answer` a call, or `start` or `stop` its recording."""
        path = "/recordings" if action in ("start", "stop") else "/calls"
        fields = {"action": action, **parameters}
        await self._ask("POST", path, fields | ({"environment": environment} if environment else {}))

    async def _ask(
        self,
        method: str,
        path: str,
        fields: JsonObject | None = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> JsonObject:
        if self._http is None:
            raise RuntimeError("enter the Client as an asynchronous context manager")
        try:
            async with self._http.request(
                method,
                self._url + path,
                data=None if fields is None else msgspec.json.encode(fields),
                headers={"Content-Type": "application/json", **(headers or {})},
                params=query,
                allow_redirects=False,
            ) as answer:
                raw, status = await answer.read(), answer.status
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise RemoteUnavailable(
                f"no listener answers at {self._url} ({str(error) or type(error).__name__}); start it with "
                "`listener run`, and see api.port"
            ) from None
        try:
            told = msgspec.json.decode(raw)
        except (msgspec.MsgspecError, UnicodeError):
            told = None
        if not isinstance(told, dict):
            raise RemoteUnavailable(f"{self._url} is no listener (HTTP {status}); see api.port")
        if status >= 400:
            raise _refusal(status, str(told.get("error", "")), str(told.get("cure", "")))
        return told


def _refusal(status: int, error: str, cure: str) -> ListenerError:
    text = f"{error}; {cure}" if cure else error
    if status == 400:
        argument, _, rule = error.partition(": ")
        return InvalidRequest(argument, rule, cure) if rule else ListenerError(text)
    if status == 401:
        return SettingsError(f"the listener refuses the token; {cure}")
    if status == 503:
        return StoreUnavailable(text)
    kinds: dict[int, type[ListenerError]] = {code: kind for kind, code in STATUSES if code not in (400, 503)}
    return kinds.get(status, RemoteError)(text)


def _segment(id: str) -> str:
    """An id as one segment of a path."""
    return quote(id, safe="")
