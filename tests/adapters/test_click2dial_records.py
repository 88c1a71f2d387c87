"""Click2Dial's records, by webhook and by Redis list: answered and let go only when they are stored."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import asyncpg
import pytest
from aiohttp import web
from redis.asyncio import Redis
from yarl import URL

from listener.adapters import click2dial
from listener.adapters.click2dial import (
    BODY_BYTES_MAX,
    LISTS,
    RETRY_S_MAX,
    Click2DialHeard,
    Click2DialLists,
    Click2DialWebhook,
)
from listener.core.calls import GAP_CAUSES, Notification
from listener.core.decode import decode
from listener.core.dialling import Accepted, Elapsed, MatchConfidence, System, advance, match, placed
from listener.core.pbx import click2dial_fact, click2dial_sighting
from listener.errors import SettingsError
from listener.pipeline import Pipeline
from listener.simulator.click2dial import SCRIPTS, Click2DialServer
from listener.store.journal import Journal
from tests.simulator.conftest import until
from tests.support.redis_server import RedisServer, emptied
from tests.test_pipeline import Counts, running

TOKEN = "t0ken-of-the-webhook"
FAST = 0.0005
CDR, INBOUND = LISTS
OWN = f"listener:listener:{CDR}"
RECORD = (
    b'{"type":"cdr","payload":{"extension":"204","number":"0820004417","call_ref":"p-1","contact_ref":"a"}}'
)
OLD = (
    b'{"type":"cdr","payload":{"extension":"204","ref":"0820004417","call_ref":"a","dialed_at":"2026-03-02"}}'
)
JUNK = b"\xff not a record \x00"


class Ears:
    """Takes what is heard, stores it at once unless told otherwise, and remembers everything."""

    def __init__(self) -> None:
        self.heard: list[Click2DialHeard] = []
        self.said: list[tuple[str, str]] = []
        self.waiting: list[Callable[[], None]] = []
        self.storing = True

    async def hear(self, message: Click2DialHeard, committed: Callable[[], None]) -> None:
        """One message."""
        self.heard.append(message)
        if self.storing:
            committed()
        else:
            self.waiting.append(committed)

    def covered(self, cause: str, detail: str, at: datetime) -> None:
        """Read, or not."""
        assert at.tzinfo is not None
        assert cause == "" or cause in GAP_CAUSES
        self.said.append((cause, detail))

    @property
    def causes(self) -> list[str]:
        """What was said of coverage, in order."""
        return [cause for cause, _ in self.said]

    @property
    def raw(self) -> list[bytes]:
        """The bytes of what was heard."""
        return [message.raw for message in self.heard]


# ── By webhook ────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def listening(webhook: Click2DialWebhook) -> AsyncIterator[str]:
    """It is mounted on a server during the block; gives its URL, without the token."""
    app = web.Application()
    app.router.add_post("/click2dial", webhook.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.05, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/click2dial"
    finally:
        await runner.cleanup()


async def post(url: str | URL, body: bytes = RECORD, **headers: str) -> int:
    """What one POST is answered."""
    async with aiohttp.ClientSession() as http, http.post(url, data=body, headers=headers) as response:
        return response.status


async def test_a_record_is_taken() -> None:
    """In both spellings, with its exact bytes, decoded as the call table takes it; junk is handed on too."""
    ears = Ears()
    async with listening(Click2DialWebhook(TOKEN, ears)) as url:
        for body in (RECORD, OLD, JUNK, b""):
            assert await post(f"{url}?token={TOKEN}", body) == 204
    assert ears.raw == [RECORD, OLD, JUNK, b""]
    assert [message.record is None for message in ears.heard] == [False, False, True, True]
    assert [message.extension for message in ears.heard] == ["204", "204", "", ""]
    for message in ears.heard[:2]:
        decoded = decode(message.raw, message.channel)
        assert isinstance(decoded, Notification)
        assert (decoded.state, [party.number for party in decoded.participants or ()]) == (
            "Released",
            ["0820004417"],
        )
    assert ears.heard[0].heard(7).account == 7


async def test_the_token() -> None:
    """As bearer or in the URL; nothing is looked at without it."""
    ears = Ears()
    async with listening(Click2DialWebhook(TOKEN, ears)) as url:
        assert await post(url, Authorization=f"Bearer {TOKEN}") == 204
        assert await post(url) == 401
        assert await post(f"{url}?token=") == 401
        assert await post(f"{url}?token={TOKEN}x") == 401
        assert await post(f"{url}?token={TOKEN}", Authorization="Bearer other") == 401
        assert await post(url, Authorization=f"bearer  {TOKEN}") == 204
        # A gateway before it may have a login of its own, which is then not ours to judge.
        assert await post(f"{url}?token={TOKEN}", Authorization="Basic bWU6bWU=") == 204
        assert await post(url, Authorization=TOKEN) == 401
        assert await post(URL(f"{url}?token=%ED%A0%80", encoded=True)) == 401
        async with aiohttp.ClientSession() as http, http.post(url) as answer:
            assert answer.headers["WWW-Authenticate"] == 'Bearer realm="listener"'
    assert len(ears.heard) == 3
    with pytest.raises(SettingsError, match="token"):
        Click2DialWebhook("", ears)


async def test_a_body_that_is_too_large() -> None:
    """Is refused; one of the largest size is taken."""
    ears = Ears()
    async with listening(Click2DialWebhook(TOKEN, ears)) as url:
        assert await post(f"{url}?token={TOKEN}", b"x" * (BODY_BYTES_MAX + 1)) == 413
        assert await post(f"{url}?token={TOKEN}", b"x" * BODY_BYTES_MAX) == 204
    assert len(ears.heard) == 1


async def test_the_answer_waits_for_the_store() -> None:
    """204 comes when it is stored, 503 when that lasts too long or too many wait."""
    ears = Ears()
    ears.storing = False
    webhook = Click2DialWebhook(TOKEN, ears, waiting_max=1)
    async with listening(webhook) as url, asyncio.TaskGroup() as tasks:
        first = tasks.create_task(post(f"{url}?token={TOKEN}"))
        await until(lambda: len(ears.waiting) == 1)
        assert await post(f"{url}?token={TOKEN}") == 503
        assert not first.done()
        ears.waiting[0]()
        assert await first == 204
    slow = Click2DialWebhook(TOKEN, ears, stored_s=0.02)
    async with listening(slow) as url:
        assert await post(f"{url}?token={TOKEN}") == 503
        ears.storing = True
        assert await post(f"{url}?token={TOKEN}") == 204


async def test_the_same_record_has_the_same_place() -> None:
    """However often it is sent; what names no call is another message each time."""
    ears = Ears()
    async with listening(Click2DialWebhook(TOKEN, ears)) as url:
        for body in (RECORD, RECORD, JUNK, JUNK, OLD):
            await post(f"{url}?token={TOKEN}", body)
    places = [(message.stream, message.position) for message in ears.heard]
    assert places[0] == places[1]
    assert len(set(places)) == 4


# ── By Redis list ─────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def reading(url: str, ears: Any, **settings: Any) -> AsyncIterator[None]:
    """The lists are read during the block."""
    lists = Click2DialLists(url, ears, **({"retry_s": 0.02, "block_s": 0.2} | settings))
    async with asyncio.TaskGroup() as tasks:
        work = tasks.create_task(lists.run())
        try:
            yield
        finally:
            work.cancel()


async def pushed(redis: Redis, *messages: bytes, name: str = CDR) -> None:
    """The PBX puts these on a list, one after the other."""
    for message in messages:
        await redis.lpush(name, message)


async def test_messages_of_the_lists(redis: Redis, redis_url: str) -> None:
    """The oldest first, those that waited and those that come, junk too; nothing stays behind."""
    ears = Ears()
    await pushed(redis, RECORD, OLD)
    async with reading(redis_url, ears):
        await until(lambda: len(ears.heard) == 2)
        await pushed(redis, JUNK)
        await until(lambda: len(ears.heard) == 3)
        await pushed(redis, b'{"type":"call","payload":{"ref":"204"}}', name=INBOUND)
        await until(lambda: len(ears.heard) == 4)
        await emptied(redis, OWN)
    assert ears.raw[:3] == [RECORD, OLD, JUNK]
    assert [message.channel for message in ears.heard] == [
        *["/click2dial/cdr"] * 3,
        "/click2dial/inbound",
    ]
    assert ears.causes == [""]
    assert await redis.keys("*") == []


async def test_what_is_not_stored_stays_in_redis(redis: Redis, redis_url: str) -> None:
    """A reader that dies before the commit loses nothing: the next one hears the same, at the same place."""
    before, after = Ears(), Ears()
    before.storing = False
    records = [RECORD.replace(b"p-1", b"p-%d" % number) for number in range(5)]
    async with reading(redis_url, before):
        await pushed(redis, *records)
        await until(lambda: len(before.heard) >= 1)
    left = (await redis.lrange(OWN, 0, -1))[::-1] + (await redis.lrange(CDR, 0, -1))[::-1]
    assert left == records
    await pushed(redis, OLD)
    async with reading(redis_url, after):
        await until(lambda: len(after.heard) == 6)
        await emptied(redis, OWN)
    assert after.raw == [*records, OLD]
    assert before.heard[0].stream == after.heard[0].stream


async def test_it_ends_whenever_it_is_cancelled(redis: Redis, redis_url: str) -> None:
    """A client that overhears a cancellation would go on for ever; and at no moment is a message lost."""
    records = [RECORD.replace(b"p-1", b"p-%d" % number) for number in range(3)]
    for turns in range(0, 240, 2):
        ears = Ears()
        await redis.flushall()
        await pushed(redis, *records)
        async with asyncio.timeout(2.0), reading(redis_url, ears, block_s=30.0):
            for _ in range(turns):
                await asyncio.sleep(0)
        left = [*await redis.lrange(OWN, 0, -1), *await redis.lrange(CDR, 0, -1)]
        assert {*ears.raw, *left} == set(records)


async def test_while_the_store_is_away_nothing_more_is_taken(redis: Redis, redis_url: str) -> None:
    """What was taken is bounded; the rest waits where it is safe."""
    ears = Ears()
    ears.storing = False
    await pushed(redis, *[RECORD.replace(b"p-1", b"p-%d" % number) for number in range(250)])
    async with reading(redis_url, ears):
        await until(lambda: len(ears.heard) == click2dial.BATCH_MAX)
        assert await redis.llen(CDR) == 250 - click2dial.BATCH_MAX
        ears.storing = True
        for committed in ears.waiting:
            committed()
        await until(lambda: len(ears.heard) == 250)
        await emptied(redis, OWN)
    assert len({message.stream for message in ears.heard}) == 250


async def test_equal_messages_leave_one_by_one(redis: Redis, redis_url: str) -> None:
    """A record that was sent twice is taken twice, and both leave our list."""
    ears = Ears()
    await pushed(redis, RECORD, RECORD, RECORD)
    async with reading(redis_url, ears):
        await until(lambda: len(ears.heard) == 3)
        await emptied(redis, OWN)
    assert len({message.stream for message in ears.heard}) == 1


async def test_a_redis_that_comes_back(fragile_redis: RedisServer) -> None:
    """Its absence is said, and what is pushed afterwards is heard."""
    ears = Ears()
    async with reading(fragile_redis.url, ears):
        await until(lambda: ears.causes == [""])
        fragile_redis.stop()
        await until(lambda: ears.causes == ["", "disconnected"])
        fragile_redis.start()
        await until(lambda: ears.causes == ["", "disconnected", ""])
        async with Redis.from_url(fragile_redis.url) as client:
            await pushed(client, RECORD)
            await until(lambda: ears.raw == [RECORD])
            await emptied(client, OWN)


async def test_a_redis_that_stays_away_is_asked_ever_more_seldom() -> None:
    """The pauses double up to their bound, and half of each is chance."""
    ears = Ears()
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        await asyncio.sleep(0)

    settings: dict[str, Any] = {"retry_s": 0.5, "pause": pause, "jitter": lambda: 0.5, "lists": (CDR,)}
    async with reading("redis://127.0.0.1:9/0", ears, **settings):
        await until(lambda: len(pauses) >= 9)
    assert pauses[:3] == [0.375, 0.75, 1.5]
    assert max(pauses) == RETRY_S_MAX * 0.75


async def test_a_wrong_password_is_said(redis: Redis, redis_url: str) -> None:
    """And never the password."""
    ears = Ears()
    await redis.config_set("requirepass", "the-right-one")
    try:
        async with reading(redis_url.replace("unix://", "unix://:the-wrong-one@"), ears):
            await until(lambda: bool(ears.causes))
        assert ears.causes == ["login refused"], ears.said
    finally:
        await redis.config_set("requirepass", "")
    assert "the-wrong-one" not in ears.said[0][1]


# ── What can be known ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("script", sorted(SCRIPTS))
async def test_a_dial_ends_as_its_record_proves(script: str, version: int) -> None:
    """Every script of the simulator, by its record alone: its outcome, or unknown."""
    ears = Ears()
    callee = "0820004417"
    settings: dict[str, Any] = {"scripts": {callee: script}, "version": version, "time_scale": FAST}
    at = datetime.now(UTC) - timedelta(seconds=1)  # noqa: TID251 - before the simulator's own
    async with (
        listening(Click2DialWebhook(TOKEN, ears)) as url,
        Click2DialServer(webhook=f"{url}?token={TOKEN}", **settings) as server,
    ):
        call = server.call("204", callee, script, reference="attempt-1")
        await server.idle()
    made = placed("d1", 1, System.CLICK2DIAL, callee, at, device="204", reference="attempt-1")
    dialled = advance(made, Accepted(), at).dial
    for each in ears.heard:
        assert each.record is not None
        found = match([made], click2dial_sighting(each.record, each.received_at, 1))
        assert found.confidence is MatchConfidence.CERTAIN
        dialled = advance(dialled, click2dial_fact(each.record), each.received_at).dial
    if dialled.deadline_at is not None:
        dialled = advance(dialled, Elapsed(), dialled.deadline_at).dial
    assert dialled.outcome == call.known


# ── To the store ──────────────────────────────────────────────────────────────────────────────────────


class Wired(Ears):
    """Ears that take everything to a pipeline, as the daemon does."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self.pipeline = pipeline

    async def hear(self, message: Click2DialHeard, committed: Callable[[], None]) -> None:
        """To the journal."""
        self.heard.append(message)
        await self.pipeline.hear([message.heard(1)], committed)


async def test_records_are_handed_on_beside_each_other(redis: Redis, redis_url: str) -> None:
    """Each of them waits for the store; one after the other, a hundred of them would wait a hundred times."""
    reached = asyncio.Barrier(3)

    class Waiting(Ears):
        """Takes nothing of one record before the others are there."""

        async def hear(self, message: Click2DialHeard, committed: Callable[[], None]) -> None:
            """One message."""
            await reached.wait()
            await super().hear(message, committed)

    ears = Waiting()
    for number in range(3):
        await redis.lpush(LISTS[0], b'{"type":"cdr","payload":{"call_ref":"%d"}}' % number)
    async with reading(redis_url, ears):
        await until(lambda: len(ears.heard) == 3)


@pytest.mark.parametrize("version", [2, 3])
async def test_calls_stand_in_the_table_as_they_were_recorded(
    redis: Redis, redis_url: str, journal: Journal, sql: asyncpg.Connection, version: int
) -> None:
    """By both ways at once, late, twice and never: each call that has a record stands there once."""
    pipeline = Pipeline(journal, Counts())
    ears = Wired(pipeline)
    settings: dict[str, Any] = {"version": version, "time_scale": FAST, "late_s": 0.05, "seed": 3}
    async with running(pipeline), listening(Click2DialWebhook(TOKEN, ears)) as url, reading(redis_url, ears):
        webhook = f"{url}?token={TOKEN}"
        async with Click2DialServer(webhook=webhook, redis_url=redis_url, **settings) as server:
            server.records_at_random({"lost": 0.1, "late": 0.1, "twice": 0.2})
            for number in range(60):
                reference = f"attempt-{number}"
                body = {"agent": "204", "callee": f"08200{number:05}", "outbound_id": "27110009000"}
                body |= {"contact_ref" if version >= 3 else "call_ref": reference}
                async with (
                    aiohttp.ClientSession() as http,
                    http.post(server.url + "/click2dial/calls", json=body) as response,
                ):
                    assert response.status == 200
            await server.idle()
            await until(lambda: len(ears.heard) == 2 * sum(call.sent for call in server.calls))
            assert set(server.answers) == {204}
            await emptied(redis, OWN)
    rows = await sql.fetch("SELECT state, number, user_data, talk_s, notifications FROM call")
    sent = [json.loads(call.record)["payload"] for call in server.calls if call.sent]
    key = "contact_ref" if version >= 3 else "call_ref"
    assert {json.loads(row["user_data"])[key]: json.loads(row["user_data"]) for row in rows} == {
        payload[key]: payload for payload in sent
    }
    assert len(rows) == len(sent)
    assert {(row["state"], row["talk_s"], row["notifications"]) for row in rows} == {("Released", 0.0, 1)}
    assert sum(call.sent for call in server.calls) > len(sent)
