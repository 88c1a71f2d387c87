"""The simulated Click2Dial, as a plain client meets it: its request, its records, and how these go wrong."""

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from redis.asyncio import Redis

from listener.errors import SettingsError
from listener.simulator.click2dial import CDR_LIST, INBOUND_LIST, MIX, SCRIPTS, Click2DialServer
from tests.support.redis_server import RedisServer

FAST = 0.0005
CALLEE = "0820004417"


class Webhook:
    """Takes records, and answers what it is told, one after the other."""

    def __init__(self) -> None:
        self.url = ""
        self.records: list[dict[str, Any]] = []
        self.statuses: list[int] = []

    async def take(self, request: web.Request) -> web.Response:
        """One record."""
        self.records.append(json.loads(await request.read()))
        return web.Response(status=self.statuses.pop(0) if self.statuses else 200)


@pytest.fixture
async def webhook() -> AsyncIterator[Webhook]:
    """A webhook on loopback."""
    taker = Webhook()
    app = web.Application()
    app.router.add_post("/records", taker.take)
    runner = web.AppRunner(app, shutdown_timeout=0.05)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        taker.url = f"http://127.0.0.1:{runner.addresses[0][1]}/records"
        yield taker
    finally:
        await runner.cleanup()


async def create(server: Click2DialServer, body: Any = None, **fields: Any) -> tuple[int, bytes]:
    """One request, as it is answered."""
    request = {"agent": "204", "callee": CALLEE, "outbound_id": "27110009000"} | fields
    async with (
        aiohttp.ClientSession() as http,
        http.post(server.url + "/click2dial/calls", json=request if body is None else body) as response,
    ):
        return response.status, await response.read()


@pytest.mark.parametrize("script", sorted(SCRIPTS))
async def test_every_disposition(webhook: Webhook, script: str) -> None:
    """One record at the end, with the reason, code and time of talk of the script; `silent` has none."""
    async with Click2DialServer(webhook=webhook.url, scripts={CALLEE: script}, time_scale=FAST) as server:
        assert await create(server, contact_ref="a-1") == (200, b"")
        await server.idle()
        (call,) = server.calls
        how = SCRIPTS[script]
        assert (call.known, call.request["contact_ref"]) == (how.known, "a-1")
        if not how.end_reason:
            assert webhook.records == []
            return
        (record,) = webhook.records
        assert record["type"] == "cdr"
        payload = record["payload"]
        assert (payload["end_reason"], payload["end_code"]) == (how.end_reason, how.end_code)
        assert (payload["call_time"] > 0) == how.talks
        assert (payload["extension"], payload["contact_ref"], payload["ref"]) == ("204", "a-1", "click-dial")
        assert payload["number"][-9:] == CALLEE[-9:]


async def test_the_spelling_before_v3(webhook: Webhook) -> None:
    """No number, the client in `ref`, the dial's reference in call_ref."""
    async with Click2DialServer(webhook=webhook.url, version=2, mix={"busy": 1}, time_scale=FAST) as server:
        await create(server, call_ref="a-1")
        await server.idle()
    payload = webhook.records[0]["payload"]
    assert not {"number", "contact_ref", "call_dir"} & set(payload)
    assert (payload["call_ref"], payload["ref"][-9:]) == ("a-1", CALLEE[-9:])


async def test_numbers_and_references_are_rewritten(webhook: Webhook) -> None:
    """All four spellings come; a reference is cut at 230 characters, and made where none is given."""
    async with Click2DialServer(webhook=webhook.url, mix={"busy": 1}, time_scale=FAST) as server:
        for _ in range(30):
            await create(server, contact_ref="r" * 300)
        await create(server)
        await server.idle()
    payloads = [record["payload"] for record in webhook.records]
    assert {payload["number"] for payload in payloads} == {
        prefix + CALLEE[1:] for prefix in ("0", "27", "0027", "+27")
    }
    assert max(len(payload["contact_ref"]) for payload in payloads) == 230
    assert min(len(payload["contact_ref"]) for payload in payloads) > 0
    assert len({payload["call_ref"] for payload in payloads}) == 31


@pytest.mark.parametrize(
    "fields",
    [
        {"agent": "20"},
        {"callee": "+27820004417"},
        {"callee": "820004417"},
        {"outbound_id": "0011"},
        {"contact_ref": "a b"},
    ],
)
async def test_a_broken_rule_ends_as_an_error(webhook: Webhook, fields: dict[str, str]) -> None:
    """The request is taken, and its record says validation."""
    async with Click2DialServer(webhook=webhook.url, mix={"answered": 1}, time_scale=FAST) as server:
        assert (await create(server, **fields))[0] == 200
        await server.idle()
    assert (webhook.records[0]["payload"]["end_reason"], webhook.records[0]["payload"]["end_code"]) == (
        "error",
        28,
    )


async def test_what_is_no_request() -> None:
    """It makes no call."""
    async with Click2DialServer() as server:
        assert (await create(server, body=[]))[0] == 400
        assert (await create(server, body={"agent": "204"}))[0] == 400
        assert server.calls == []


async def test_records_by_a_redis_list(redis: Redis, redis_url: str) -> None:
    """The oldest is the first that BRPOP takes; an inbound call is announced on a list of its own."""
    async with Click2DialServer(redis_url=redis_url, time_scale=FAST) as server:
        first = server.call("204", CALLEE, "busy")
        await server.idle()
        server.call("205", CALLEE, "answered", inbound=True)
        await server.idle()
        assert await redis.llen(CDR_LIST) == 2
        popped = await redis.brpop([CDR_LIST], timeout=1)
        assert popped is not None
        assert popped[1] == first.record.encode()
        announced = json.loads(await redis.lindex(INBOUND_LIST, 0) or b"")
        assert (announced["type"], announced["payload"]["ref"]) == ("call", "205")
        second = json.loads(server.calls[1].record)["payload"]
        assert (second["call_dir"], second["call_ref"]) == ("inbound", announced["payload"]["call_ref"])


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis://:swordfish@127.0.0.1:9/0", "127.0.0.1:9"),
        ("unix:///nowhere/redis.sock", "nowhere"),
        ("http://127.0.0.1", "redis://"),
    ],
)
async def test_no_redis_is_refused_at_the_start(url: str, why: str) -> None:
    """In one sentence with the cause and the cure, without its password."""
    with pytest.raises(SettingsError, match="no Redis answers") as refused:
        async with Click2DialServer(redis_url=url):
            pass
    said = str(refused.value)
    assert why in said
    assert said.endswith("; start one there, or have them posted to a webhook instead (--webhook URL)")
    assert "swordfish" not in said
    assert "\n" not in said


async def test_a_redis_that_goes_costs_its_records(
    fragile_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said, the truth knows it, and calls go on; once Redis is back so do records."""
    scripts = {CALLEE: "busy"}
    async with Click2DialServer(redis_url=fragile_redis.url, scripts=scripts, time_scale=FAST) as server:
        server.call("204", CALLEE, "busy")
        await server.idle()
        fragile_redis.stop()
        server.call("205", CALLEE, "busy", inbound=True)
        assert (await create(server))[0] == 200
        await server.idle()
        fragile_redis.start()
        server.call("206", CALLEE, "busy")
        await server.idle()
        async with Redis.from_url(fragile_redis.url) as redis:
            assert await redis.llen(CDR_LIST) == 1
    assert [call.sent for call in server.calls] == [1, 0, 0, 1]
    assert [call.known for call in server.calls] == ["busy", "unknown", "unknown", "busy"]
    # The inbound call had been announced too.
    assert ["a record is lost" in each.getMessage() for each in caplog.records].count(True) == 3


async def test_records_that_go_wrong(webhook: Webhook) -> None:
    """Lost, twice and late, once each; what is lost proves nothing."""
    async with Click2DialServer(webhook=webhook.url, time_scale=FAST, late_s=0.01) as server:
        for fault in ("lost", "twice", "late"):
            server.arm_record(fault)
            await create(server)
        await server.idle()
        assert [call.sent for call in server.calls] == [0, 2, 1]
        assert server.calls[0].known == "unknown"
        assert len(webhook.records) == 3
        server.records_at_random({"lost": 1.0})
        await create(server)
        await server.idle()
        assert len(webhook.records) == 3


async def test_a_webhook_that_refuses_is_asked_again(webhook: Webhook) -> None:
    """A few times, until it has answered 2xx."""
    webhook.statuses = [503, 500]
    async with Click2DialServer(webhook=webhook.url, mix={"busy": 1}, time_scale=FAST) as server:
        await create(server)
        await server.idle()
        assert server.answers == {503: 1, 500: 1, 200: 1}
    assert webhook.records[0] == webhook.records[1] == webhook.records[2]


async def test_the_same_seed_ends_dials_alike() -> None:
    """And all endings of the mix come."""
    drawn = []
    for _ in range(2):
        async with Click2DialServer(time_scale=0, seed=7) as server:
            for _ in range(300):
                await create(server)
            await server.idle()
            drawn.append([(call.script, call.call_time) for call in server.calls])
    assert drawn[0] == drawn[1]
    assert len({script for script, _ in drawn[0]}) >= len(MIX) - 3


def test_what_there_is_not() -> None:
    """Is named, with what there is."""
    with pytest.raises(SettingsError, match="voicemail"):
        Click2DialServer(scripts={"1": "x"})
    with pytest.raises(SettingsError, match="twice"):
        Click2DialServer().arm_record("x")
    with pytest.raises(SettingsError, match="twice"):
        Click2DialServer().records_at_random({"lost": 2.0})
