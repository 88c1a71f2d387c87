"""Each fault, as a plain client meets it, and what is left of the messages afterwards."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from listener.errors import SettingsError
from listener.simulator.faults import Fault, Faults
from tests.simulator.client import BayeuxClient
from tests.simulator.conftest import LOGIN, Start, until
from tests.simulator.test_cometd import Socket, heard, say

Clients = Callable[..., BayeuxClient]


@pytest.mark.parametrize(
    "kind", [Fault.DROP_BEFORE_REPLY, Fault.DROP_MID_REPLY, Fault.REPLY_LOST, Fault.TRUNCATED_JSON]
)
@pytest.mark.parametrize("ack", [True, False])
async def test_a_broken_reply(start: Start, clients: Clients, kind: Fault, ack: bool) -> None:
    """The client cannot read it. With ack the messages come again; without, they are gone, and the truth
    says which."""
    async with start(ack=ack) as simulator:
        client = clients(simulator)
        await client.open()
        say(simulator, 1, 2)
        simulator.faults.arm(kind)
        with pytest.raises((aiohttp.ClientError, json.JSONDecodeError)):
            await client.connect()
        say(simulator, 3)
        await client.connect()
        assert heard(client) == ([1, 2, 3] if ack else [3])
        await client.connect(timeout=0)
        account = simulator.truth().accounts[LOGIN]
        delivered = [m.delivered for m in account.messages or ()]
        assert delivered == ([True] * 3 if ack else [False, False, True])
        assert account.undelivered == (() if ack else (1, 2))
        assert simulator.stats()["faults"] == {kind: 1}


async def test_reply_lost_sends_every_message_first(start: Start, clients: Clients) -> None:
    """All messages are on the wire, and only the connect reply is not: a reader that takes them as they
    come has them twice."""
    async with start() as simulator:
        client = clients(simulator)
        await client.open()
        say(simulator, 1, 2)
        simulator.faults.arm("reply_lost")
        url = client.url + "/api/v2/notifications"
        got, cut = b"", False
        async with client.http.post(url, json=[client.connect_message()]) as response:
            try:
                async for chunk in response.content.iter_any():
                    got += chunk
            except aiohttp.ClientPayloadError:
                cut = True
        assert cut
        assert [m["data"]["n"] for m in json.loads(got.rstrip(b",") + b"]")] == [1, 2]
        await client.connect()
        assert heard(client) == [1, 2]


async def test_half_open(start: Start, clients: Clients) -> None:
    """A request that arrives is never answered and never looked at; one that is held is answered into the
    void."""
    async with start() as simulator:
        client = clients(simulator)
        await client.open()
        say(simulator, 1)
        simulator.faults.arm("half_open")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.connect()
        assert heard(client) == []
        await client.connect()
        assert heard(client) == [1]
        async with asyncio.TaskGroup() as tasks:
            held = tasks.create_task(client.post(client.connect_message()))
            await until(lambda: any(s.hold for s in simulator.gws.broker.sessions.values()))
            simulator.faults.arm("half_open")
            say(simulator, 2)
            await until(lambda: simulator.faults.struck["half_open"] == 2)
            held.cancel()
        await client.connect()
        assert heard(client) == [1, 2]


async def test_delay(start: Start, clients: Clients) -> None:
    """The reply comes late and whole."""
    async with start() as simulator:
        client = clients(simulator)
        simulator.faults.arm("delay", on="handshake", seconds=0.3)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        assert (await client.handshake())["successful"]
        assert loop.time() - begun >= 0.3


async def test_error_pages(start: Start, clients: Clients) -> None:
    """A proxy's HTML, or any status with a GWS body."""
    async with start() as simulator:
        client = clients(simulator)
        await client.open()
        simulator.faults.arm("html_503")
        status, body = await client.post(client.connect_message(timeout=0))
        assert (status, body[:6]) == (503, b"<html>")
        simulator.faults.arm("http_status", status=401, times=2)
        for _ in range(2):
            assert (await client.post(client.connect_message(timeout=0)))[0] == 401
        assert (await client.connect(timeout=0))["successful"]


async def test_odd_json(start: Start, clients: Clients) -> None:
    """null items, null advice, an interval as text, advice of one's own choice."""
    async with start(interval_ms=20) as simulator:
        client = clients(simulator)
        await client.open()
        say(simulator, 1)
        simulator.faults.arm("null_items")
        items = json.loads((await client.post(client.connect_message()))[1])
        assert items[0] is None
        assert items[-1] is None
        assert items[1]["data"] == {"n": 1}
        simulator.faults.arm("advice_null")
        assert (await client.connect(timeout=0))["advice"] is None
        simulator.faults.arm("string_interval")
        assert (await client.connect(timeout=0))["advice"]["interval"] == "20"
        advice = {"reconnect": "retry", "interval": 123}
        simulator.faults.arm("advice", advice=advice)
        assert (await client.connect(timeout=0))["advice"] == advice
        assert (await client.connect(timeout=0))["successful"]


@pytest.mark.parametrize("reconnect", ["none", "handshake"])
async def test_advice_may_end_the_session(start: Start, clients: Clients, reconnect: str) -> None:
    """After reconnect none or handshake the session is no more."""
    async with start() as simulator:
        client = clients(simulator)
        await client.open()
        simulator.faults.arm("advice", advice={"reconnect": reconnect})
        assert (await client.connect(timeout=0))["advice"]["reconnect"] == reconnect
        assert (await client.connect())["error"] == "402::session_unknown"


async def test_forgotten_sessions(start: Start, clients: Clients) -> None:
    """A held connect is answered 402 at once or, silently forgotten, only at its timeout; the other
    account is not disturbed."""
    async with start(accounts=2, timeout_ms=1000) as simulator, asyncio.TaskGroup() as tasks:
        client, other = clients(simulator), clients(simulator, "agent5001")
        await client.open()
        await other.open()
        loop = asyncio.get_running_loop()
        for answer in (True, False):
            held = tasks.create_task(client.connect())
            await until(lambda: any(s.hold for s in simulator.gws.broker.sessions.values()))
            begun = loop.time()
            simulator.gws.forget(LOGIN, answer=answer)
            assert (await held)["advice"]["reconnect"] == "handshake"
            assert (loop.time() - begun < 0.6) is answer
            await client.open()
        assert (await other.connect(timeout=0))["successful"]


async def test_a_deaf_session(start: Start, clients: Clients) -> None:
    """Its connects are answered as ever and carry nothing more; another handshake and subscription hear
    again. The other account is not disturbed, and the truth says what nobody was told."""
    async with start(accounts=2) as simulator:
        client, other = clients(simulator), clients(simulator, "agent5001")
        await client.open()
        await other.open()
        simulator.gws.deafen(LOGIN)
        say(simulator, 1)
        assert (await client.connect(timeout=0))["successful"]
        assert heard(client) == []
        say(simulator, 2, login="agent5001")
        await other.connect(timeout=0)
        assert heard(other) == [2]
        await client.open()
        say(simulator, 3)
        await client.connect(timeout=0)
        assert heard(client) == [3]
        account = simulator.truth().accounts[LOGIN]
        assert (account.unsubscribed, account.accepted) == (1, 1)


async def test_a_session_that_is_deaf_for_a_while(start: Start, clients: Clients) -> None:
    """It hears again by itself; what was said meanwhile is gone."""
    async with start() as simulator:
        client = clients(simulator)
        await client.open()
        simulator.gws.deafen(seconds=0.05)
        say(simulator, 1)
        await until(lambda: simulator.listening() == 1)
        say(simulator, 2)
        await client.connect(timeout=0)
        assert heard(client) == [2]


async def test_a_list_of_live_calls_that_comes_late(start: Start, clients: Clients) -> None:
    """It says what was live when it was asked for."""
    async with start() as simulator:
        client = clients(simulator)
        simulator.gws.snapshot_s = 0.2
        loop = asyncio.get_running_loop()
        begun = loop.time()
        async with client.http.get(client.url + "/api/v2/me/calls") as response:
            assert (await response.json())["calls"] == []
        assert loop.time() - begun >= 0.2


@pytest.mark.parametrize("websocket", [False, True])
async def test_an_exchange_may_lose_its_session(start: Start, clients: Clients, websocket: bool) -> None:
    """The connect is answered 402 instead, its messages are lost with the session, and the truth says so."""
    async with start() as simulator:
        client = clients(simulator)
        socket = await Socket.open(client) if websocket else None
        await (socket.ask(client.connect_message()) if socket else client.open())
        say(simulator, 1)
        simulator.faults.arm("unknown_client")
        asked = client.connect_message()
        reply = await (socket.ask(asked) if socket else client.ask(asked))
        assert reply["error"] == "402::session_unknown"
        assert reply["advice"]["reconnect"] == "handshake"
        assert heard(client) == []
        assert not simulator.gws.broker.sessions
        assert simulator.truth().accounts[LOGIN].undelivered == (1,)
        if socket:
            await socket.socket.close()


async def test_oversized(start: Start, clients: Clients) -> None:
    """One notification of the wanted size, which is a call of its own in the truth."""
    async with start() as simulator:
        client = clients(simulator)
        await client.open()
        truth = simulator.gws.oversize(LOGIN, 3_000_000)
        _, body = await client.post(client.connect_message())
        assert len(body) > 3_000_000
        leg = json.loads(body)[0]["data"]["call"]
        assert leg["id"] == truth.call_id
        assert leg["state"] == truth.final_state == "Released"
        assert (truth.notifications, truth.accepted, truth.finished) == (1, 1, True)
        assert simulator.gws.oversize(LOGIN, 10).call_id != truth.call_id


@pytest.mark.parametrize(
    "kind", [Fault.DROP_BEFORE_REPLY, Fault.DROP_MID_REPLY, Fault.REPLY_LOST, Fault.HTML_503]
)
async def test_a_websocket_is_cut(start: Start, clients: Clients, kind: Fault) -> None:
    """The connection ends before the connect reply, after none, some or all of the messages; with ack they
    come again on the next one."""
    async with start() as simulator:
        client = clients(simulator)
        socket = await Socket.open(client)
        await socket.ask(client.connect_message())
        say(simulator, 1, 2)
        simulator.faults.arm(kind)
        asked = client.connect_message()
        # What arrives instead of text, at the end of a connection, is no text: TypeError.
        with pytest.raises((TypeError, aiohttp.ClientError)):
            await socket.ask(asked)
        before = {Fault.DROP_MID_REPLY: [1], Fault.REPLY_LOST: [1, 2]}.get(kind, [])
        assert heard(client) == before
        again = Socket(client, await client.http.ws_connect(socket.socket._response.url))
        await again.ask(client.connect_message())
        assert heard(client) == [*before, 1, 2]
        await again.socket.close()
        await socket.socket.close()


async def test_odd_websocket_frames(start: Start, clients: Clients) -> None:
    """null items, truncated JSON and a connection that goes silent."""
    async with start() as simulator:
        client = clients(simulator)
        socket = await Socket.open(client)
        simulator.faults.arm("null_items")
        await socket.send(client.connect_message())
        assert json.loads(await socket.socket.receive_str()) == [None]
        assert (await socket.receive())[0]["successful"]
        simulator.faults.arm("delay", seconds=0.01)
        assert (await socket.ask(client.connect_message(timeout=0)))["successful"]
        simulator.faults.arm("advice_null")
        assert (await socket.ask(client.connect_message(timeout=0)))["advice"] is None
        simulator.faults.arm("truncated_json")
        await socket.send(client.connect_message(timeout=0))
        with pytest.raises(json.JSONDecodeError):
            json.loads(await socket.socket.receive_str())
        await socket.socket.close()
        for held in (False, True):
            socket = await Socket.open(client)
            if held:
                await socket.ask(client.connect_message())
                await socket.send(client.connect_message())
                session = simulator.gws.broker.sessions[client.client_id]
                await until(lambda session=session: session.expires_at == 0)  # type: ignore[misc]
            simulator.faults.arm("half_open")
            if held:
                say(simulator, 1)
            else:
                await socket.send(client.connect_message())
            with pytest.raises(TimeoutError):
                await socket.socket.receive(timeout=0.1)
            await socket.socket.close()


async def test_faults_by_http(start: Start, clients: Clients) -> None:
    """The control API arms, forgets, refuses, restarts and oversizes from outside the process."""
    async with start() as simulator:
        client = clients(simulator)
        await client.open()

        async def ask(**fault: Any) -> None:
            async with client.http.post(client.url + "/simulator/faults", json=fault) as response:
                assert await response.json() == {"ok": True}

        await ask(fault="html_503", on="connect", times=1)
        assert (await client.post(client.connect_message(timeout=0)))[0] == 503
        await ask(oversized=LOGIN, bytes=100)
        await client.connect()
        assert len(client.data) == 1
        await ask(forget=None)
        assert (await client.connect())["error"] == "402::session_unknown"
        await ask(refuse_subscription="/v2/me/calls", on=True)
        await client.handshake()
        assert not (await client.subscribe("/v2/me/calls"))["successful"]
        await ask(refuse_subscription="/v2/me/calls", on=False)
        assert (await client.subscribe("/v2/me/calls"))["successful"]
        await ask(refuse_login=LOGIN, on=True)
        assert (await client.post(client.connect_message()))[0] == 403
        await ask(refuse_login=LOGIN, on=False)
        await ask(expire_csrf=True)
        await ask(deaf=LOGIN, seconds=60)
        assert simulator.listening() == 0
        await ask(snapshot_s=0.5)
        assert simulator.gws.snapshot_s == 0.5
        await ask(random={"html_503": 1.0}, seed=7)
        assert (await client.post(client.connect_message(timeout=0)))[0] == 503
        await ask(clear=True)
        assert (await client.connect(timeout=0))["successful"]
        await ask(restart=0)
        await until(lambda: simulator.gws.restarts == 1)
        await until(lambda: not simulator.gws.broker.sessions)


async def test_random_faults_lose_nothing_with_ack(start: Start, clients: Clients) -> None:
    """A fifth of all exchanges fails in every way there is; a client that only repeats itself gets every
    message, in order, as long as its session lives."""
    rates = {
        "drop_before_reply": 0.05,
        "drop_mid_reply": 0.05,
        "reply_lost": 0.05,
        "truncated_json": 0.05,
        "html_503": 0.05,
    }
    async with start(seed=3) as simulator:
        client = clients(simulator)
        await client.open()
        simulator.faults.at_random(rates, seed=3)
        for number in range(300):
            say(simulator, number)
            if number % 3:
                continue
            try:
                status, body = await client.post(client.connect_message(timeout=0))
                if status == 200:
                    answers = json.loads(body)
                    client.data += answers[:-1]
                    client.ack = answers[-1]["ext"]["ack"]
            except (aiohttp.ClientError, json.JSONDecodeError):
                continue
        simulator.faults.clear()
        await client.connect(timeout=0)
        assert heard(client) == list(range(300))
        assert sum(simulator.faults.struck.values()) > 10
        assert set(simulator.faults.struck) == set(rates)


def test_random_faults_repeat_from_the_seed() -> None:
    """The same seed strikes the same exchanges."""

    def strikes(seed: int) -> list[Fault | None]:
        faults = Faults({"delay": 0.2, "half_open": 0.1}, seed)
        return [fault.kind if fault else None for fault in (faults.take("a", "connect") for _ in range(500))]

    assert strikes(1) == strikes(1) != strikes(2)
    assert 60 < Counter(strikes(1))[Fault.DELAY] < 140


def test_armed_faults_hit_what_they_are_meant_for() -> None:
    """By account, by kind of exchange, so many times, in the order in which they were armed."""
    faults = Faults()
    faults.arm("delay", account="b", on="any", times=2)
    faults.arm("html_503")
    assert faults.take("a", "handshake") is None
    first, second = faults.take("b", "handshake"), faults.take("a", "connect")
    assert first is not None
    assert second is not None
    assert (first.kind, second.kind) == (Fault.DELAY, Fault.HTML_503)
    assert faults.take("a", "connect") is None
    assert faults.take("b", "connect") is not None
    assert faults.take("b", "connect") is None


def test_wrong_faults_are_refused() -> None:
    """A name that is none, a detail that is none, rates above one."""
    faults = Faults()
    with pytest.raises(SettingsError, match="drop_mid_reply"):
        faults.arm("drop")
    with pytest.raises(SettingsError):
        faults.arm("delay", minutes=1)
    with pytest.raises(SettingsError):
        faults.at_random({"drop": 0.1}, 1)
    with pytest.raises(SettingsError):
        faults.at_random({"delay": 0.6, "html_503": 0.6}, 1)
