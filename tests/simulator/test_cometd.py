"""The CometD side over real sockets: long-polling and websocket, as CometD Java does it."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from yarl import URL

from listener.simulator.centre import Simulator
from listener.simulator.scripts import CALLS_CHANNEL, Message
from tests.simulator.client import BayeuxClient, Json, basic
from tests.simulator.conftest import LOGIN, Start, until

Clients = Callable[..., BayeuxClient]


def say(simulator: Simulator, *numbers: int, login: str = LOGIN, channel: str = CALLS_CHANNEL) -> None:
    """Publish messages that say their number."""
    for number in numbers:
        raw = b'{"data":{"n":%d},"channel":"%b"}' % (number, channel.encode())
        simulator.gws.publish(simulator.accounts[login], Message(channel, raw))


def heard(client: BayeuxClient) -> list[int]:
    """The numbers that arrived."""
    return [message["data"]["n"] for message in client.data]


class Socket:
    """A websocket that speaks Bayeux."""

    def __init__(self, client: BayeuxClient, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.client = client
        self.socket = socket
        self.frames: list[list[Json]] = []

    @classmethod
    async def open(cls, client: BayeuxClient, *, ack: bool = True) -> "Socket":
        """Connect, handshake and subscribe."""
        url = client.url.replace("http", "ws") + "/api/v2/notifications"
        self = cls(client, await client.http.ws_connect(url))
        client.client_id = ""
        ext = {"ext": {"ack": True}} if ack else {}
        reply = await self.ask(client.message("/meta/handshake", **ext))
        client.client_id = reply["clientId"]
        client.ack = -1
        assert (await self.ask(client.message("/meta/subscribe", subscription=CALLS_CHANNEL)))["successful"]
        return self

    async def send(self, message: Json) -> None:
        """Send one message."""
        await self.socket.send_json([message])

    async def receive(self) -> list[Json]:
        """The next frame; its data is kept in the client."""
        frame: list[Json] = json.loads(await self.socket.receive_str(timeout=5))
        self.frames.append(frame)
        self.client.data += [m for m in frame if not m["channel"].startswith("/meta/")]
        return frame

    async def ask(self, message: Json) -> Json:
        """Send one message and wait for its reply, whatever comes before."""
        await self.send(message)
        return await self.reply(message)

    async def reply(self, message: Json) -> Json:
        """Wait for the reply to a message."""
        while True:
            for each in await self.receive():
                if each.get("id") == message["id"]:
                    self.client.ack = each.get("ext", {}).get("ack", self.client.ack)
                    return each


async def test_handshake(start: Start, clients: Clients) -> None:
    """The reply says version, transports, advice, and that ack is on; the browser cookie is set."""
    async with start(timeout_ms=20_000, interval_ms=50, max_interval_ms=7000) as simulator:
        client = clients(simulator)
        reply = await client.handshake()
        assert reply["successful"]
        assert (reply["version"], reply["minimumVersion"]) == ("1.0", "1.0")
        assert set(reply["supportedConnectionTypes"]) == {"long-polling", "websocket"}
        assert reply["advice"] == {
            "reconnect": "retry",
            "interval": 50,
            "timeout": 20_000,
            "maxInterval": 7000,
        }
        assert reply["ext"] == {"ack": True}
        assert {cookie.key for cookie in client.http.cookie_jar} >= {"BAYEUX_BROWSER", "JSESSIONID"}


async def test_what_is_off_is_not_offered(start: Start, clients: Clients) -> None:
    """Without ack and websocket in the server, the handshake mentions neither; maxInterval as told."""
    async with start(ack=False, websocket=False, advise_max_interval=False) as simulator:
        client = clients(simulator)
        reply = await client.handshake()
        assert "ext" not in reply
        assert reply["supportedConnectionTypes"] == ["long-polling"]
        assert "maxInterval" not in reply["advice"]
        with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
            await Socket.open(client)
        assert refusal.value.status == 400


async def test_ack_is_only_for_those_who_ask(start: Start, clients: Clients) -> None:
    """A client that did not ask for ack gets none, and its messages with any reply."""
    async with start() as simulator:
        client = clients(simulator)
        reply = await client.open(ack=False)
        assert "ext" not in reply
        say(simulator, 1)
        await client.subscribe("/v2/me/devices")
        assert heard(client) == [1]


async def test_the_url_may_end_in_the_kind_of_message(start: Start, clients: Clients) -> None:
    """/handshake and the like may be appended, as CometD's JavaScript client does; v3 has its own path."""
    async with start() as simulator:
        client = clients(simulator)
        for path in ("/api/v2/notifications/handshake", "/workspace/v3/notifications/handshake"):
            async with client.http.post(
                client.url + path, json=client.message("/meta/handshake")
            ) as response:
                assert json.loads(await response.read())[0]["successful"]


async def test_the_first_connect_is_answered_at_once_and_the_next_is_held(
    start: Start, clients: Clients
) -> None:
    """The first returns immediately, the second at the server's timeout, or at the client's."""
    async with start(timeout_ms=600) as simulator:
        client = clients(simulator)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await client.open()
        assert loop.time() - begun < 0.5
        begun = loop.time()
        assert (await client.connect())["successful"]
        assert 0.58 < loop.time() - begun < 5
        begun = loop.time()
        reply = await client.connect(timeout=0)
        assert loop.time() - begun < 0.5
        assert reply["advice"]["timeout"] == 600


async def test_advice_is_sent_once(start: Start, clients: Clients) -> None:
    """The handshake carries it; a connect only if it brought advice itself."""
    async with start(timeout_ms=50) as simulator:
        client = clients(simulator)
        assert "advice" in await client.handshake()
        assert "advice" not in await client.connect()
        assert "advice" in await client.connect(timeout=0)
        assert "advice" not in await client.connect()


async def test_a_held_connect_is_answered_by_a_message(start: Start, clients: Clients) -> None:
    """What is published in one go arrives together; the connect reply stands behind it."""
    async with start() as simulator, asyncio.TaskGroup() as tasks:
        client = clients(simulator)
        await client.open()
        asked = client.connect_message()
        request = tasks.create_task(client.post(asked))
        await until(lambda: any(s.hold for s in simulator.gws.broker.sessions.values()))
        say(simulator, 1, 2, 3)
        _, body = await request
        answers = json.loads(body)
        assert [a["channel"] for a in answers] == [CALLS_CHANNEL] * 3 + ["/meta/connect"]
        assert answers[-1]["id"] == asked["id"]


async def test_messages_wait_for_a_connect_when_ack_is_on(start: Start, clients: Clients) -> None:
    """With ack no other reply carries messages."""
    async with start() as simulator:
        client = clients(simulator)
        await client.open()
        say(simulator, 1)
        await client.subscribe("/v2/me/devices")
        assert heard(client) == []
        await client.connect()
        assert heard(client) == [1]


async def test_a_lost_reply_is_made_good(start: Start, clients: Clients) -> None:
    """The same acknowledgement again brings the same messages and the newer ones, in order."""
    async with start() as simulator:
        client = clients(simulator)
        await client.open()
        say(simulator, 1, 2)
        await client.post(client.connect_message())
        say(simulator, 3)
        await client.connect()
        assert heard(client) == [1, 2, 3]
        client.data.clear()
        await client.connect(timeout=0)
        assert heard(client) == []
        assert all(m.delivered for m in simulator.truth().accounts[LOGIN].messages or ())


async def test_each_session_of_an_account_hears_everything(start: Start, clients: Clients) -> None:
    """Two clients of one login get the same; another login gets its own."""
    async with start(accounts=2) as simulator:
        first, second = clients(simulator), clients(simulator)
        other = clients(simulator, "agent5001")
        for client in (first, second, other):
            await client.open()
        say(simulator, 1)
        say(simulator, 2, login="agent5001")
        for client in (first, second, other):
            await client.connect()
        assert (heard(first), heard(second), heard(other)) == ([1], [1], [2])


@pytest.mark.parametrize("pattern", ["/v2/me/calls", "/v2/me/*", "/**"])
async def test_subscriptions_by_pattern(start: Start, clients: Clients, pattern: str) -> None:
    """A channel or a wildcard; what is not covered does not come, and unsubscribing ends it."""
    async with start() as simulator:
        client = clients(simulator)
        await client.open(pattern)
        say(simulator, 1)
        say(simulator, 2, channel="/v2/other/deep")
        await client.connect()
        assert heard(client) == ([1, 2] if pattern == "/**" else [1])
        assert (await client.ask(client.message("/meta/unsubscribe", subscription=pattern)))["successful"]
        assert not (await client.ask(client.message("/meta/unsubscribe", subscription=pattern)))["successful"]
        say(simulator, 3)
        await client.connect(timeout=0)
        assert 3 not in heard(client)
        assert simulator.truth().accounts[LOGIN].unsubscribed == (1 if pattern == "/**" else 2)


async def test_a_refused_subscription_is_403(start: Start, clients: Clients) -> None:
    """While the switch is on the reply is unsuccessful and nothing comes."""
    async with start() as simulator:
        client = clients(simulator)
        simulator.gws.broker.refused.add("/v2/me/*")
        await client.handshake()
        reply = await client.subscribe("/v2/me/calls")
        assert not reply["successful"]
        assert reply["error"].startswith("403:")
        assert reply["subscription"] == ["/v2/me/calls"]
        simulator.gws.broker.refused.clear()
        assert (await client.subscribe("/v2/me/calls"))["successful"]


async def test_malformed_bayeux(start: Start, clients: Clients) -> None:
    """No JSON is 400, no message is 500; a subscription without channel and a publication are 403."""
    async with start() as simulator:
        client = clients(simulator)
        await client.open()
        url = client.url + "/api/v2/notifications"
        for body, status in ((b"{", 400), (b"[1]", 400), (b"[]", 500)):
            async with client.http.post(url, data=body) as response:
                assert response.status == status
        async with client.http.get(url) as response:
            assert response.status == 405
        assert (await client.post(client.message("/meta/handshake"), client.message("/meta/connect")))[
            0
        ] == 500
        assert (await client.ask(client.message("/meta/subscribe")))["error"] == "403::subscription_missing"
        assert (await client.ask(client.message("/v2/me/calls", data={})))["error"].startswith("403:")


async def test_an_unknown_client_is_402(start: Start, clients: Clients) -> None:
    """A connect is told to handshake; another message is not told anything but the error."""
    async with start() as simulator:
        client = clients(simulator)
        await client.open()
        client.client_id = "nobody"
        reply = await client.connect()
        assert (reply["successful"], reply["error"]) == (False, "402::session_unknown")
        assert reply["advice"] == {"reconnect": "handshake", "interval": 0}
        reply = await client.subscribe("/v2/me/calls")
        assert reply["error"] == "402::session_unknown"
        assert "advice" not in reply


async def test_the_browser_cookie_binds_the_session(start: Start, clients: Clients) -> None:
    """The clientId alone is not enough over long-polling: without its cookie it is unknown."""
    async with start() as simulator:
        client = clients(simulator)
        await client.open()
        thief = clients(simulator)
        await thief.open()
        thief.client_id = client.client_id
        assert (await thief.connect())["error"] == "402::session_unknown"
        client.http.cookie_jar.clear()
        assert (await client.connect())["error"] == "402::session_unknown"


async def test_two_sessions_with_one_cookie_are_told_to_wait(start: Start, clients: Clients) -> None:
    """Only one connect per BAYEUX_BROWSER is held; the other gets the multi-session advice."""
    async with start() as simulator, asyncio.TaskGroup() as tasks:
        client = clients(simulator)
        await client.open()
        held = tasks.create_task(client.post(client.connect_message()))
        await until(lambda: any(s.hold for s in simulator.gws.broker.sessions.values()))
        second = clients(simulator)
        second.http.cookie_jar.update_cookies(
            {cookie.key: cookie.value for cookie in client.http.cookie_jar},
            URL(simulator.url),
        )
        await second.open()
        reply = await second.connect()
        assert reply["advice"] == {"multiple-clients": True, "reconnect": "retry", "interval": 2000}
        say(simulator, 1)
        await held
        await second.connect()
        assert (await second.connect(timeout=10)).get("advice", {}).get("multiple-clients") is None


async def test_a_second_connect_of_a_session_ends_the_first(start: Start, clients: Clients) -> None:
    """The older one is answered with HTTP 500, the newer one is held and loses nothing."""
    async with start() as simulator, asyncio.TaskGroup() as tasks:
        client = clients(simulator)
        await client.open()
        first = tasks.create_task(client.post(client.connect_message()))
        await until(lambda: any(s.hold for s in simulator.gws.broker.sessions.values()))
        second = tasks.create_task(client.connect())
        assert (await first)[0] == 500
        say(simulator, 1)
        await second
        assert heard(client) == [1]


async def test_a_session_without_connects_expires(start: Start, clients: Clients) -> None:
    """After maxInterval the session is gone, and what waited in it is marked as undelivered."""
    async with start(max_interval_ms=100, sweep_period_ms=20) as simulator:
        client = clients(simulator)
        await client.open()
        say(simulator, 1)
        await until(lambda: not simulator.gws.broker.sessions)
        assert (await client.connect())["error"] == "402::session_unknown"
        account = simulator.truth().accounts[LOGIN]
        assert (account.accepted, account.undelivered) == (1, (1,))


async def test_connects_keep_a_session_alive(start: Start, clients: Clients) -> None:
    """With the old acknowledgement and timeout 0, a client that cannot store keeps its session and loses
    nothing."""
    async with start(max_interval_ms=500, sweep_period_ms=20) as simulator:
        client = clients(simulator)
        await client.open()
        say(simulator, 1)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while loop.time() - begun < 1.2:
            await client.post(client.connect_message(timeout=50))
        await client.connect()
        assert heard(client) == [1]


async def test_disconnect(start: Start, clients: Clients) -> None:
    """A held connect is answered with reconnect none; then the client is unknown."""
    async with start() as simulator, asyncio.TaskGroup() as tasks:
        client = clients(simulator)
        await client.open()
        held = tasks.create_task(client.connect())
        await until(lambda: any(s.hold for s in simulator.gws.broker.sessions.values()))
        assert (await client.ask(client.message("/meta/disconnect")))["successful"]
        assert (await held)["advice"]["reconnect"] == "none"
        assert (await client.connect())["error"] == "402::session_unknown"


async def test_websocket_with_ack(start: Start, clients: Clients) -> None:
    """Messages come in frames of their own, before the connect reply, and wait for a connect."""
    async with start() as simulator:
        client = clients(simulator)
        socket = await Socket.open(client)
        assert (await socket.ask(client.connect_message()))["ext"] == {"ack": 1}
        say(simulator, 1, 2)
        asked = client.connect_message()
        await socket.ask(asked)
        assert [len(frame) for frame in socket.frames[-3:]] == [1, 1, 1]
        assert heard(client) == [1, 2]
        asked = client.connect_message()
        await socket.send(asked)
        await until(lambda: not simulator.stats()["waiting"])
        say(simulator, 3)
        await socket.reply(asked)
        assert heard(client) == [1, 2, 3]
        await socket.socket.close()


async def test_websocket_without_ack_does_not_wait(start: Start, clients: Clients) -> None:
    """Without ack a message is sent while the connect stays held."""
    async with start() as simulator:
        client = clients(simulator)
        socket = await Socket.open(client, ack=False)
        await socket.ask(client.connect_message())
        await socket.send(client.connect_message())
        session = simulator.gws.broker.sessions[client.client_id]
        await until(lambda: session.expires_at == 0)
        say(simulator, 1)
        assert (await socket.receive())[0]["data"] == {"n": 1}
        say(simulator, 2)
        assert (await socket.receive())[0]["data"] == {"n": 2}
        await socket.socket.close()


async def test_websocket_session_outlives_its_connection(start: Start, clients: Clients) -> None:
    """Another websocket, or long-polling where the cookie allows it, goes on with the session."""
    async with start(frame_messages_max=10) as simulator:
        client = clients(simulator)
        socket = await Socket.open(client)
        await socket.ask(client.connect_message())
        say(simulator, 1)
        asked = client.connect_message()
        await socket.send(asked)
        await socket.receive()
        await socket.socket.close()
        say(simulator, 2)
        url = client.url.replace("http", "ws") + "/api/v2/notifications"
        again = Socket(client, await client.http.ws_connect(url))
        client.data.clear()
        await again.ask(client.connect_message())
        assert heard(client) == [1, 2]
        assert [len(frame) for frame in again.frames] == [2, 1]
        await again.ask(client.message("/meta/disconnect"))
        await again.socket.close()
        assert not simulator.gws.broker.sessions


async def test_websocket_connect_times_out_and_402(start: Start, clients: Clients) -> None:
    """A held connect is answered at the timeout; forgotten sessions are 402 at once."""
    async with start(timeout_ms=100) as simulator:
        client = clients(simulator)
        socket = await Socket.open(client)
        await socket.ask(client.connect_message())
        assert (await socket.ask(client.connect_message()))["successful"]
        asked = client.connect_message(timeout=10_000)
        await socket.send(asked)
        session = next(iter(simulator.gws.broker.sessions.values()))
        await until(lambda: session.expires_at == 0)
        simulator.gws.forget()
        reply = await socket.reply(asked)
        assert reply["error"] == "402::session_unknown"
        assert reply["advice"]["reconnect"] == "handshake"
        await socket.socket.send_str("no JSON")
        assert (await socket.socket.receive()).data == 1011


async def test_restart_forgets_everything(start: Start, clients: Clients) -> None:
    """After a restart cookies are worth nothing: 403 for a cookie, 402 for one who brings Basic."""
    async with start() as simulator, asyncio.TaskGroup() as tasks:
        url = simulator.url
        bearer, cookie = clients(simulator), clients(simulator, login=None)
        async with cookie.http.get(url + "/api/v2/me", headers=basic(LOGIN)) as response:
            assert response.status == 200
        await bearer.open()
        await cookie.open()
        held = tasks.create_task(bearer.post(bearer.connect_message()))
        await until(lambda: any(s.hold for s in simulator.gws.broker.sessions.values()))
        say(simulator, 1)
        await held
        await simulator.gws.restart()
        assert simulator.url == url
        say(simulator, 2)
        assert (await bearer.connect())["error"] == "402::session_unknown"
        assert (await cookie.post(cookie.connect_message()))[0] == 403
        await bearer.open()
        say(simulator, 3)
        await bearer.connect()
        account = simulator.truth().accounts[LOGIN]
        assert (account.sent, account.accepted, account.unsubscribed) == (3, 2, 1)
        assert account.undelivered == (1,)


async def test_a_held_connect_is_cut_by_a_restart(start: Start, clients: Clients) -> None:
    """While the server is down nothing listens; it comes back on the same port."""
    async with start() as simulator, asyncio.TaskGroup() as tasks:
        client = clients(simulator)
        await client.open()

        async def connect_and_fail() -> None:
            with pytest.raises(aiohttp.ClientError):
                await client.connect()

        held = tasks.create_task(connect_and_fail())
        await until(lambda: any(s.hold for s in simulator.gws.broker.sessions.values()))
        restart = tasks.create_task(simulator.gws.restart(0.3))
        await held
        with pytest.raises(aiohttp.ClientError):
            await client.connect()
        await restart
        assert (await client.open())["successful"]


def test_settings_say_what_is_wrong() -> None:
    """A setting that makes no sense is refused with its name."""
    from listener.errors import SettingsError
    from listener.simulator.settings import SimulatorSettings

    wrong: list[dict[str, Any]] = [{"dialect": "v9"}, {"rate": 0}, {"accounts": 0}]
    for settings in wrong:
        with pytest.raises(SettingsError, match=next(iter(settings))):
            SimulatorSettings(**settings)
