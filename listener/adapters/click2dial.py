"""Teleforge Click2Dial: create a call; and its records of calls, by webhook or Redis list.

Facts that this file rests on (vendor's pages): the one REST call is a POST of JSON to `/click2dial/calls`,
over plain HTTP on a port of the integrator's own. Neither a reply's body nor its status, errors or a login
are documented; so HTTP 2xx is an acknowledgement, whatever the body, and anything else is none. There is no
hang-up and no status of a call: after the acknowledgement nothing is heard until the record at its end.
"""

import asyncio
import hashlib
import random
import ssl
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Protocol, cast

from aiohttp import web
from msgspec import Struct
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError
from yarl import URL

from listener.adapters.exchange import REQUEST_S, NoAnswer, Secrets, challenge, exchange, refusal, unanswered
from listener.core.calls import Heard
from listener.core.dialling import Accepted, System
from listener.core.pbx import Click2DialRecord, click2dial_channel, read_click2dial
from listener.core.requests import Acknowledgement, Click2DialCall, build
from listener.errors import SettingsError


class Click2Dial:
    """One Click2Dial server. `base_url` has the port and no path; `headers` are what a gateway before it
    wants, since the server itself has no login. A request may take `request_s`."""

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str] | None = None,
        *,
        tls: ssl.SSLContext | None = None,
        request_s: float = REQUEST_S,
    ) -> None:
        self._base_url = str(URL(base_url)).rstrip("/")
        self._headers = dict(headers or {})
        self._secrets = Secrets(self._headers.values())
        self._tls = tls
        self._request_s = request_s

    async def dial(self, request: Click2DialCall) -> Acknowledgement:
        """Asks for a call, once; never raises."""
        built = build(request)
        answer = await exchange(
            built.method,
            URL(self._base_url + built.target, encoded=True),
            headers={**self._headers, "Content-Type": built.content_type},
            secrets=self._secrets,
            body=built.body,
            tls=self._tls,
            within_s=self._request_s,
        )
        if isinstance(answer, NoAnswer):
            return unanswered(System.CLICK2DIAL, answer)
        if 200 <= answer.status < 300:
            return Accepted()
        return refusal(System.CLICK2DIAL, answer)


# ── Hearing ───────────────────────────────────────────────────────────────────────────────────────────

LISTS = ("enigma:notifications:cdr", "enigma:notifications:inbound")
"""Redis lists of the vendor's; the second exists for one integrator only, and may stay empty for ever."""

BODY_BYTES_MAX = 256 * 1024
"""The largest message that the webhook takes; a record has some 500 bytes. A larger one is answered 413."""

WAITING_MAX = 200
"""Requests of the webhook that wait for the store; another one is answered 503, and comes again if the PBX
sends it again."""

STORED_S = 10.0
"""How long such a request waits; then it is answered 503, although what it brought may still be stored."""

BATCH_MAX = 100
"""Messages taken off a list at a time; they are stored before more are taken."""

BLOCK_S = 5.0
"""How long Redis is asked to wait for a message."""

READ_MARGIN_S = 10.0
"""How much longer we wait for its answer."""

RETRY_S = 0.5
RETRY_S_MAX = 30.0
"""Between two attempts on a Redis that is away: doubled each time, up to this, and half of it by chance."""

_STREAMS = uuid.UUID("b7f0d4de-6a55-5c1c-8f0b-9a3c5f5d2c11")
"""The namespace of the streams' names (RFC 9562, 5.5)."""


class Click2DialHeard(Struct, frozen=True):
    """One message as it came, with its place.

    There is one record of a call, so the same bytes again (sent twice, or found again after a crash) are the
    same record, at the same place. Bytes that name no call are another message each time.
    """

    stream: str
    received_at: datetime
    channel: str
    """What `listener.core.decode.decode` must be given with `raw`."""
    raw: bytes
    record: Click2DialRecord | None
    """None where it makes no sense; `raw` has it."""
    position: int = 1

    @property
    def extension(self) -> str:
        """Whose call it is; empty where the message does not say."""
        return self.record.extension if self.record is not None else ""

    def heard(self, account: int) -> Heard:
        """The message as the pipeline takes it."""
        return Heard(account, self.stream, self.position, self.received_at, self.channel, self.raw)


class Click2DialHearing(Protocol):
    """Where messages of Click2Dial's are taken."""

    async def hear(self, message: Click2DialHeard, committed: Callable[[], None]) -> None:
        """Takes a message; returns when there is room for more; calls `committed` on the event loop once it
        is stored."""

    def covered(self, cause: str, detail: str, at: datetime) -> None:
        """From now on the lists are read (`cause` empty), or not, for one of `GAP_CAUSES`; `detail` is a
        sentence for a person. Only changes are told, and none by the webhook, which cannot know."""


def _message(raw: bytes, kind: str, at: datetime) -> Click2DialHeard:
    read = read_click2dial(raw)
    record = read if isinstance(read, Click2DialRecord) else None
    if record is not None:
        kind = "inbound" if record.kind == "call" else "cdr"
    named = record is not None and bool(record.call_id)
    digest = hashlib.sha256(raw).hexdigest()
    stream = uuid.uuid5(_STREAMS, digest) if named else uuid.uuid4()
    return Click2DialHeard(str(stream), at, click2dial_channel(kind), raw, record)


class Click2DialWebhook:
    """Receives records by HTTP: mount `handle` for POST, at a path of its own.

    The PBX must send `token`, as `Authorization: Bearer` or as `?token=` in the URL that it was given, since
    no page tells of a login or signature of its webhook, nor that it sends headers. Such a URL must not be
    logged. 204 says that the message is stored, and nothing else does. Whether and how often the PBX sends
    again what was answered otherwise is not documented: use the list where it is to be had.
    """

    def __init__(
        self,
        token: str,
        hearing: Click2DialHearing,
        *,
        stored_s: float = STORED_S,
        waiting_max: int = WAITING_MAX,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),  # noqa: TID251 - a shell's default
    ) -> None:
        if not token:
            raise SettingsError("click2dial: the webhook needs a token, or anybody could end a call; set one")
        self._token = token
        self._hearing = hearing
        self._stored_s = stored_s
        self._waiting_max = waiting_max
        self._waiting = 0
        self._wall = wall

    async def handle(self, request: web.Request) -> web.Response:
        """One message; what it holds is taken as it is, whether it makes sense or not."""
        refused = challenge(
            self._token, request.headers.get("Authorization", ""), request.query.get("token", "")
        )
        if refused is not None:
            return web.Response(
                status=401,
                text="no token, or a wrong one; send webhook_token as Authorization: Bearer, or as ?token=",
                headers={"WWW-Authenticate": refused},
            )
        if self._waiting >= self._waiting_max:
            return web.Response(status=503, text="too many wait; send it again", headers={"Retry-After": "5"})
        self._waiting += 1
        try:
            async with asyncio.timeout(self._stored_s):
                raw = await _body(request)
                if raw is None:
                    return web.Response(status=413, text=f"more than {BODY_BYTES_MAX} bytes")
                stored = asyncio.Event()
                await self._hearing.hear(_message(raw, "cdr", self._wall()), stored.set)
                await stored.wait()
        except TimeoutError:
            return web.Response(
                status=503, text="not stored yet; send it again", headers={"Retry-After": "5"}
            )
        finally:
            self._waiting -= 1
        return web.Response(status=204)


async def _body(request: web.Request) -> bytes | None:
    """The body; None where it is too large."""
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > BODY_BYTES_MAX:
            return None
    return bytes(body)


def _end_if_cancelled() -> None:
    """A client may answer a cancellation with the failure of the connection that it broke, or not at all.
    Nobody cancels twice, so a task that overheard it would go on for ever."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


class Click2DialLists:
    """Reads records from Redis lists. Run `run`; one reader for each list, since taking is for good.

    A plain pop would lose what is under way when we die. So each message moves to a list of our own beside
    its first one (`listener:NAME:`, then the list's name), by one command, and leaves that when it is stored;
    what a run finds there at its start, or after a broken connection, is handed on again first. While the
    store is away nothing more is taken. What is lost all the same: what Redis itself loses (it may keep
    nothing on disk), and what anybody else pops.

    BRPOPLPUSH is used, not its successor BLMOVE: which version of Redis a PBX has is not documented, and
    every one since 2.2 knows it.
    """

    def __init__(
        self,
        url: str,
        hearing: Click2DialHearing,
        *,
        name: str = "listener",
        lists: Sequence[str] = LISTS,
        block_s: float = BLOCK_S,
        retry_s: float = RETRY_S,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),  # noqa: TID251 - a shell's default
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._url = url
        self._secrets = Secrets([URL(url).password or ""])
        self._hearing = hearing
        self._own = f"listener:{name}:"
        self._lists = tuple(lists)
        self._block_s = block_s
        self._retry_s = retry_s
        self._wall = wall
        self._pause = pause
        self._jitter = jitter
        self._reading: set[str] = set()
        self._cause: str | None = None

    async def run(self) -> None:
        """Reads until cancelled. Raises nothing of Redis': whatever is wrong there is told by `covered`, and
        tried again."""
        # A command that is sent again by the client would move a second message. The client's own time-out is
        # `asyncio.wait_for`, which up to Python 3.11 may lose a cancellation: so ours is used.
        async with (
            Redis.from_url(
                self._url,
                protocol=2,
                retry=Retry(NoBackoff(), 0),
                socket_timeout=None,
                socket_connect_timeout=READ_MARGIN_S,
            ) as redis,
            asyncio.TaskGroup() as tasks,
        ):
            for source in self._lists:
                tasks.create_task(self._read(redis, source), name=f"click2dial-{source}")

    async def _read(self, redis: Redis, source: str) -> None:
        failures = 0
        while True:
            try:
                await self._recover(redis, source)
                while True:
                    _end_if_cancelled()
                    self._reading.add(source)
                    failures = 0
                    if len(self._reading) == len(self._lists):
                        self._covered("", "")
                    await self._take(redis, source)
            except (RedisError, TimeoutError) as error:
                _end_if_cancelled()
                self._reading.discard(source)
                refused = any(
                    isinstance(each, AuthenticationError | NoPermissionError)
                    for each in (
                        error,
                        error.__cause__,
                        error.__context__,
                    )  # wrapped where it comes at connecting
                )
                said = self._secrets.one_line(f"{type(error).__name__}: {error}")
                self._covered(
                    "login refused" if refused else "disconnected",
                    f"Click2Dial's list {source}: {said}; check the URL and the password of Redis",
                )
            longest_s = min(self._retry_s * 2**failures, RETRY_S_MAX)
            failures = min(failures + 1, 16)
            await self._pause(longest_s * (0.5 + self._jitter() / 2))

    async def _recover(self, redis: Redis, source: str) -> None:
        """Hands on what was taken and not stored, the oldest first."""
        own = self._own + source
        while True:
            async with self._in_time():
                found = cast(list[bytes], await redis.lrange(own, -BATCH_MAX, -1))
            if not found:
                return
            await self._store(redis, own, found[::-1])

    async def _take(self, redis: Redis, source: str) -> None:
        """Takes what there is, or waits for the next."""
        own = self._own + source
        async with self._in_time():
            first = await redis.brpoplpush(source, own, timeout=self._block_s)
            if first is None:
                return
            more = min(await redis.llen(source), BATCH_MAX - 1)
            async with redis.pipeline(transaction=False) as pipe:
                for _ in range(more):
                    pipe.rpoplpush(source, own)
                taken = [first, *(each for each in await pipe.execute() if each is not None)]
        await self._store(redis, own, cast(list[bytes], taken))

    async def _store(self, redis: Redis, own: str, taken: Sequence[bytes]) -> None:
        """Returns when these are stored and have left our list."""
        stored = [asyncio.Event() for _ in taken]
        kind = own.rpartition(":")[2]
        # All at once: each waits for a commit, and a hundred commits in a row would be behind the dials.
        async with asyncio.TaskGroup() as tasks:
            for raw, event in zip(taken, stored, strict=True):
                tasks.create_task(self._hearing.hear(_message(raw, kind, self._wall()), event.set))
        for event in stored:
            await event.wait()
        async with self._in_time(), redis.pipeline(transaction=False) as pipe:
            for raw in taken:
                pipe.lrem(own, -1, cast(str, raw))  # redis-py's annotation forgets bytes
            await pipe.execute()

    def _in_time(self) -> asyncio.Timeout:
        """For what Redis is asked at a time; it may wait for a message itself."""
        return asyncio.timeout(self._block_s + READ_MARGIN_S)

    def _covered(self, cause: str, detail: str) -> None:
        if cause != self._cause:
            self._cause = cause
            self._hearing.covered(cause, detail, self._wall())
