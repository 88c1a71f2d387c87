"""That the peers do what they claim, seen by clients as naive as possible: plain aiohttp, no retries.

The session tests rest on this: a fault that the peer only pretends to have would make them green for
nothing. So each fault is observed from outside, and each guarantee (redelivery) beside its absence.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.peers.proxy import HOST, TcpProxy, free_port
from tests.support.peers import (
    CALLS,
    CometdFactory,
    CometdPeer,
    FayeFactory,
    FayePeer,
    Node,
    Peer,
    PeerError,
    ProxyFactory,
)

Message = dict[str, Any]

SILENCE_s = 0.3
"""How long no answer counts as none; the peers answer within milliseconds."""
BOUND_s = 20.0
"""Bound of anything that must come."""

BURST_s = 2.0
"""A burst of 10,000 takes the server a tenth of this; more is a defect, and not a busy machine."""

BYTES, HTML, JSON = "application/octet-stream", "text/html", "application/json"


class NaiveClient:
    """One Bayeux session over long-polling, a request at a time; what goes wrong is raised."""

    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self.url = url
        self.http = http
        self.client_id = ""
        self.acked: int | None = None
        self._id = 0

    async def post(self, channel: str, **fields: Any) -> list[Any]:
        """One request with one message; gives the items of the reply."""
        self._id += 1
        message = {"channel": channel, "id": str(self._id), **fields}
        if self.client_id:
            message["clientId"] = self.client_id
        async with self.http.post(self.url, json=[message], allow_redirects=False) as response:
            response.raise_for_status()
            items: list[Any] = await response.json()
            return items

    async def handshake(self, *, ack: bool = True) -> Message:
        """Begins a new session; the old one is forgotten here, not there."""
        self.client_id = ""
        self.acked = 0 if ack else None
        ext = {"ext": {"ack": True}} if ack else {}
        fields = {"version": "1.0", "supportedConnectionTypes": ["long-polling"], **ext}
        reply: Message = (await self.post("/meta/handshake", **fields))[-1]
        self.client_id = reply.get("clientId", "")
        return reply

    async def subscribe(self, channel: str = CALLS) -> Message:
        """Subscribes, or not: look at the reply."""
        reply: Message = (await self.post("/meta/subscribe", subscription=channel))[-1]
        return reply

    async def connect(self, **fields: Any) -> list[Any]:
        """One poll, whose acknowledgement is what the last reply offered; gives all items of the reply."""
        if self.acked is not None:
            fields["ext"] = {"ack": self.acked}
        items = await self.post("/meta/connect", connectionType="long-polling", **fields)
        offered = items[-1].get("ext", {}).get("ack")
        if offered is not None:
            self.acked = offered
        return items

    async def open(self, *, ack: bool = True) -> None:
        """Handshake, subscription and a connect that does not wait."""
        assert (await self.handshake(ack=ack))["successful"]
        assert (await self.subscribe())["successful"]
        await self.connect(advice={"timeout": 0})

    async def collect(self, count: int) -> list[int]:
        """Polls until `count` numbered messages are there."""
        seqs: list[int] = []
        async with asyncio.timeout(BOUND_s):
            while len(seqs) < count:
                seqs += numbers(await self.connect())
        return seqs


def numbers(items: list[Any]) -> list[int]:
    """The sequence numbers of the data messages among these items."""
    return [item["data"]["seq"] for item in items if item["channel"] == CALLS]


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client that keeps cookies of IP addresses too: CometD finds the session by its cookie."""
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
        yield session


async def held(peer: Peer) -> None:
    """Returns when some session's connect waits at the server."""
    await peer.until("sessions", lambda answer: any(each["held"] for each in answer["sessions"]))


# ── CometD ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("whole", [False, True])
async def test_burst_arrives_complete_and_in_order(
    cometd_peer: CometdFactory, http: aiohttp.ClientSession, whole: bool
) -> None:
    """10,000 messages of exactly 1,200 bytes leave the server at once, all and in order."""
    peer = await cometd_peer()
    client = NaiveClient(peer.url, http)
    await client.open()

    async with asyncio.TaskGroup() as tasks:
        burst = tasks.create_task(peer.publish(10_000, size_bytes=1200, whole=whole))
        got = tasks.create_task(client.collect(10_000))

    assert got.result() == list(burst.result().seqs)
    assert burst.result().elapsed_s < BURST_s
    assert (await peer.stats())["published"] == {CALLS: 10_000}


async def test_messages_have_the_size_and_the_text_asked_for(
    cometd_peer: CometdFactory, http: aiohttp.ClientSession
) -> None:
    """Padding is exact, a template's fields are kept, and texts go out byte for byte, even broken ones."""
    peer = await cometd_peer()
    client = NaiveClient(peer.url, http)
    await client.open()

    async def raw(ack: int) -> bytes:
        message = {"channel": "/meta/connect", "clientId": client.client_id, "id": "raw", "ext": {"ack": ack}}
        async with http.post(peer.url, json=[message]) as response:
            return await response.read()

    await peer.publish(1, size_bytes=300, data={"name": "Zoë"}, first=123)
    body = await raw(ack=1)
    item = body[1 : body.index(b',{"id"')]
    assert len(item) == 300
    assert item.startswith('{"channel":"/v2/me/calls","data":{"name":"Zoë","seq":123,"pad":"xxx'.encode())

    await peer.publish_texts(['{"k": 1, "k":2}', "{broken"])
    body = await raw(ack=2)
    assert body.startswith(
        b'[{"channel":"/v2/me/calls","data":{"k": 1, "k":2}},{"channel":"/v2/me/calls","data":{broken},'
    )


async def test_pace_is_kept(cometd_peer: CometdFactory, http: aiohttp.ClientSession) -> None:
    """A rate is kept on the server's own clock, and the messages come in several replies."""
    peer = await cometd_peer()
    client = NaiveClient(peer.url, http)
    await client.open()

    async with asyncio.TaskGroup() as tasks:
        paced = tasks.create_task(peer.publish(200, rate_per_s=400))
        got = tasks.create_task(client.collect(200))

    assert got.result() == list(range(1, 201))
    assert paced.result().elapsed_s >= 199 / 400
    assert (await peer.stats())["connects"] > 10


@pytest.mark.parametrize("at", ["headers", "after_headers", "body"])
@pytest.mark.parametrize("ack", [True, False])
async def test_cut_reply_is_redelivered_with_ack_only(
    cometd_peer: CometdFactory, http: aiohttp.ClientSession, at: str, ack: bool
) -> None:
    """A reply cut on its way comes again where the session acknowledges, and is lost where it does not."""
    peer = await cometd_peer(timeout=1000)
    client = NaiveClient(peer.url, http)
    await client.open(ack=ack)

    await peer.publish(100, size_bytes=500)
    await peer.rule("cut", channel="/meta/connect", at=at)
    with pytest.raises(aiohttp.ClientError):
        await client.connect()
    await peer.publish(1)

    assert await client.collect(101 if ack else 1) == (list(range(1, 102)) if ack else [101])


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_request_is_cut_before_the_server_sees_it(
    cometd_peer: CometdFactory, http: aiohttp.ClientSession, how: str
) -> None:
    """A cut at the request leaves no trace in the server: the handshake made no session."""
    peer = await cometd_peer()
    client = NaiveClient(peer.url, http)
    await peer.rule("cut", at="request", how=how)

    with pytest.raises(aiohttp.ClientConnectionError):
        await client.handshake()

    assert await peer.sessions() == []
    assert (await client.handshake())["successful"]


@pytest.mark.parametrize("how", ["silent", "wake", "disconnect"])
async def test_forgotten_session_is_402(
    cometd_peer: CometdFactory, http: aiohttp.ClientSession, how: Any
) -> None:
    """A lost session is answered 402 with the advice to handshake; only `disconnect` says so before."""
    peer = await cometd_peer(timeout=500)
    client = NaiveClient(peer.url, http)
    await client.open()

    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(client.connect())
        await held(peer)
        assert await peer.forget(how=how) == [client.client_id]
    channels = [item["channel"] for item in waiting.result()]
    assert ("/meta/disconnect" in channels) is (how == "disconnect")

    (reply,) = await client.connect()
    assert (reply["successful"], reply["error"]) == (False, "402::session_unknown")
    assert reply["advice"] == {"reconnect": "handshake", "interval": 0}
    assert (await peer.control("sessions"))["removed"]["gone"] == 1


async def test_session_expires_and_channel_outlives_it(
    cometd_peer: CometdFactory, http: aiohttp.ClientSession
) -> None:
    """A session without a connect expires after maxInterval, and the next one hears the swept channel."""
    peer = await cometd_peer(max_interval=50, sweep=10)
    client = NaiveClient(peer.url, http)
    await client.open()
    await peer.publish(1)
    await peer.until("sessions", lambda answer: answer["removed"]["channels"] == 1)
    assert (await peer.control("sessions"))["removed"]["expired"] == 1
    assert (await client.connect())[0]["error"] == "402::session_unknown"

    await peer.options(maxInterval=10_000)
    await client.open()
    await peer.publish(3)
    assert await client.collect(3) == [2, 3, 4]


@pytest.mark.parametrize(
    ("at", "how"), [("headers", "close"), ("body", "reset"), ("body", "silent"), ("half-open", "")]
)
async def test_session_expires_after_a_lost_reply(
    cometd_peer: CometdFactory, http: aiohttp.ClientSession, at: str, how: str
) -> None:
    """However a reply is lost, the server's clock runs: who does not come back within maxInterval is gone."""
    peer = await cometd_peer(timeout=300, max_interval=50, sweep=10)
    client = NaiveClient(peer.url, http)

    async def lose() -> None:
        with contextlib.suppress(aiohttp.ClientError):
            await client.connect()

    assert (await client.handshake())["successful"]
    if at != "half-open":
        await peer.rule("cut", channel="/meta/connect", at=at, how=how)
    async with asyncio.TaskGroup() as tasks:
        lost = tasks.create_task(lose())
        if at == "half-open":
            await held(peer)
            await peer.half_open()
        await peer.until("sessions", lambda answer: answer["removed"]["expired"] == 1, within_s=3.0)
        lost.cancel()


async def test_policy(cometd_peer: CometdFactory, http: aiohttp.ClientSession) -> None:
    """Handshakes, channels and requests without a header are refused as told, and allowed again."""
    peer = await cometd_peer()
    client = NaiveClient(peer.url, http)

    await peer.policy(handshake=False)
    reply = await client.handshake()
    assert (reply["successful"], reply["error"]) == (False, "403::handshake_denied")
    assert reply["advice"]["reconnect"] == "none"

    await peer.policy(refuse=[CALLS])
    assert (await client.handshake())["successful"]
    assert (await client.subscribe())["error"] == "403::subscribe_denied"
    assert (await client.subscribe("/v2/me/devices"))["successful"]

    await peer.policy(headers={"X-CSRF-TOKEN": "b"})
    with pytest.raises(aiohttp.ClientResponseError) as refused:
        await client.connect()
    assert refused.value.status == 403
    http.headers["X-CSRF-TOKEN"] = "b"
    assert (await client.subscribe())["successful"]
    assert (await peer.requests(last=1))[0]["headers"]["x-csrf-token"] == "b"


@pytest.mark.parametrize(
    ("kind", "what", "expected"),
    [
        ("status", {"code": 401}, (401, BYTES, "")),
        ("status", {"code": 503, "headers": {"Retry-After": "1"}}, (503, BYTES, "")),
        ("status", {"code": 302, "headers": {"Location": "/login"}}, (302, BYTES, "")),
        ("status", {"code": 200, "headers": {"Content-Type": HTML}, "text": "<html>"}, (200, HTML, "<html>")),
        ("body", {"text": "[{"}, (200, JSON, "[{")),
        ("truncate", {"bytes": 5}, (200, JSON, '[{"id')),
        ("insert", {"text": "null"}, (200, JSON, '[null,{"id":"x"')),
    ],
)
async def test_http_answers_on_demand(
    cometd_peer: CometdFactory,
    http: aiohttp.ClientSession,
    kind: Any,
    what: dict[str, Any],
    expected: tuple[int, str, str],
) -> None:
    """Status, headers and bodies come as ordered, on the occasions ordered, and then no more."""
    status, content_type, text = expected
    peer = await cometd_peer()
    await peer.rule(kind, channel="/meta/connect", skip=1, count=2, **what)
    answers = []
    for channel in ["/meta/connect", "/meta/subscribe", "/meta/connect", "/meta/connect", "/meta/connect"]:
        message = {"channel": channel, "id": "x"}
        async with http.post(peer.url, json=[message], allow_redirects=False) as response:
            body = await response.text()
            as_ordered = (response.status, response.content_type) == (
                status,
                content_type,
            ) and body.startswith(text)
            answers.append(as_ordered and not body.startswith('[{"id":"x"'))

    assert answers == [False, False, True, True, False]
    assert (await peer.stats())["rules_pending"] == 0


@pytest.mark.parametrize(
    "advice",
    [
        None,
        {"reconnect": "none"},
        {"reconnect": "handshake", "interval": 20},
        {"reconnect": "retry", "interval": "20"},
    ],
)
async def test_replies_carry_the_advice_ordered(
    cometd_peer: CometdFactory, http: aiohttp.ClientSession, advice: Any
) -> None:
    """A /meta reply's fields are replaced until cleared, null included, and messages are left alone."""
    peer = await cometd_peer()
    client = NaiveClient(peer.url, http)
    await client.open()
    await peer.rule("reply", channel="/meta/connect", count=None, set={"advice": advice, "successful": False})
    for seq in [1, 2]:
        await peer.publish()
        message, reply = await client.connect()
        assert message["data"] == {"seq": seq}
        assert (reply["advice"], reply["successful"]) == (advice, False)
    await peer.clear()
    await peer.publish()
    assert (await client.connect())[-1]["successful"]


async def test_delay_and_silence(cometd_peer: CometdFactory, http: aiohttp.ClientSession) -> None:
    """A delayed reply comes late and whole; a silent one never comes, and its connection stays open."""
    peer = await cometd_peer()
    client = NaiveClient(peer.url, http)
    await client.open()
    loop = asyncio.get_running_loop()

    await peer.rule("delay", ms=150)
    asked = loop.time()
    assert (await client.subscribe())["successful"]
    assert loop.time() - asked >= 0.149

    await peer.rule("cut", at="headers", how="silent")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(SILENCE_s):
            await client.subscribe()
    assert (await client.subscribe())["successful"]


@pytest.mark.parametrize("scope", ["existing", "all"])
async def test_half_open_server(cometd_peer: CometdFactory, http: aiohttp.ClientSession, scope: Any) -> None:
    """Half-open connections neither answer nor end, what is sent into them is lost unless acknowledged, and
    new ones work or not as told."""
    peer = await cometd_peer()
    client = NaiveClient(peer.url, http)
    await client.open()

    async def half_open_while_held() -> None:
        async with asyncio.timeout(SILENCE_s), asyncio.TaskGroup() as tasks:
            tasks.create_task(client.connect())
            await held(peer)
            await peer.half_open(scope)
            await peer.publish(5)

    with pytest.raises(TimeoutError):
        await half_open_while_held()
    if scope == "all":
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SILENCE_s):
                await client.connect()
        await peer.half_open("none")
    assert await client.collect(5) == [1, 2, 3, 4, 5]


async def test_drop_ends_held_connects(cometd_peer: CometdFactory, http: aiohttp.ClientSession) -> None:
    """Dropping ends the connection of a held connect, and the session lives on."""
    peer = await cometd_peer()
    client = NaiveClient(peer.url, http)
    await client.open()

    async def drop_while_held() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(client.connect())
            await held(peer)
            assert await peer.drop() == 1

    with pytest.raises(ExceptionGroup) as lost:
        await drop_while_held()
    assert lost.group_contains(aiohttp.ClientConnectionError)
    await peer.publish()
    assert await client.collect(1) == [1]


async def test_delivery_to_one_session_and_wildcards(cometd_peer: CometdFactory) -> None:
    """A message can be meant for one session; subscribers of a wildcard get what is published below it."""
    peer = await cometd_peer()
    async with (
        aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as one,
        aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as other,
    ):
        first, second = NaiveClient(peer.url, one), NaiveClient(peer.url, other)
        await first.open()
        await second.handshake()
        assert (await second.subscribe("/v2/me/*"))["successful"]
        await peer.publish(2, session=first.client_id)
        await peer.publish(1)
        assert await first.collect(3) == [1, 2, 3]
        assert await second.collect(1) == [3]
    with pytest.raises(PeerError, match="no session nobody"):
        await peer.publish(1, session="nobody")


async def test_stats_tell_what_the_client_did(
    cometd_peer: CometdFactory, http: aiohttp.ClientSession
) -> None:
    """Handshakes, connects and subscriptions are counted, and a session's last acknowledgement is known."""
    peer = await cometd_peer()
    client = NaiveClient(peer.url, http)
    await client.open()
    await peer.publish(1)
    await client.connect()
    await peer.publish(1)
    await client.connect()

    stats = await peer.stats()
    assert (stats["handshakes"], stats["subscribes"], stats["connects"]) == (1, 1, 3)
    assert (stats["requests"], stats["peak_per_s"], stats["connections"]) == (5, 5, 1)
    (session,) = await peer.sessions()
    assert (session["id"], session["subscriptions"]) == (client.client_id, [CALLS])
    assert (session["ack"], session["acked"], session["connects"]) == (True, 2, 3)
    acks = [each["message"]["ext"]["ack"] for each in await peer.requests("/meta/connect")]
    assert acks == [0, 1, 2]

    await peer.reset()
    assert (await peer.stats())["connects"] == 0
    assert await peer.requests() == []


async def test_server_without_ack_does_not_offer_it(
    cometd_peer: CometdFactory, http: aiohttp.ClientSession
) -> None:
    """With `ack=False` the handshake is answered without the extension."""
    peer = await cometd_peer(ack=False)
    assert "ext" not in await NaiveClient(peer.url, http).handshake()


async def test_kill_and_restart_on_the_same_port(
    cometd_peer: CometdFactory, http: aiohttp.ClientSession
) -> None:
    """A killed server refuses connections; restarted, it has the same address and no memory."""
    peer = await cometd_peer()
    client = NaiveClient(peer.url, http)
    await client.open()
    await peer.publish(5)
    await peer.kill()
    with pytest.raises(aiohttp.ClientConnectionError):
        await client.connect()
    with pytest.raises(PeerError, match="not running"):
        await peer.stats()

    await peer.restart()
    assert (await client.connect())[0]["error"] == "402::session_unknown"
    await client.open()
    await peer.publish(2)
    assert await client.collect(2) == [6, 7]


async def test_kill_in_the_middle_of_a_publication(
    cometd_peer: CometdFactory, http: aiohttp.ClientSession
) -> None:
    """Who waits for a publication learns that the server was killed; the restarted one is not disturbed."""
    peer = await cometd_peer()
    async with asyncio.TaskGroup() as tasks:
        paced = tasks.create_task(broken_publication(peer))
        await peer.until("stats", lambda stats: stats["published"].get(CALLS, 0) >= 10)
        await peer.restart()
    assert "killed during publish" in paced.result()
    client = NaiveClient(peer.url, http)
    await client.open()
    await peer.publish()
    assert await client.collect(1) == [10_001]


async def broken_publication(peer: Peer) -> str:
    """Publishes for ten seconds, and gives the error that comes before that."""
    with pytest.raises(PeerError) as error:
        await peer.publish(10_000, rate_per_s=1000)
    return str(error.value)


async def test_death_shows_the_last_words(node: Node) -> None:
    """A peer that cannot start, or dies, raises with its status and its stderr; nothing of it stays."""
    async with CometdPeer(node) as first:
        with pytest.raises(PeerError, match=r"died with status 1(.|\n)*EADDRINUSE"):
            await CometdPeer(node, port=first.port).start()
    with pytest.raises(PeerError, match=r"died with status 1(.|\n)*--timeout wants a number"):
        await CometdPeer(node, timeout="soon").start()

    peer = CometdPeer(node)
    await peer.start()
    os.kill(peer.pid, signal.SIGTERM)
    with pytest.raises(PeerError, match=f"died with status {-signal.SIGTERM}"):
        await peer.stop()
    assert not peer.running
    await peer.stop()


async def test_no_peer_outlives_its_test_run(node: Node) -> None:
    """When the process that started a peer is killed outright, the peer ends too."""
    script = (
        "import asyncio\n"
        "from tests.support.peers import FayePeer, Node\n"
        "async def main():\n"
        "    async with FayePeer(Node.find()) as peer:\n"
        "        print(peer.pid, flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    root = Path(__file__).parent.parent.parent
    run = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, cwd=root, stdout=asyncio.subprocess.PIPE
    )
    assert run.stdout is not None
    peer = psutil.Process(int(await run.stdout.readline()))
    assert "faye_server.js" in " ".join(peer.cmdline())
    run.kill()
    await run.wait()
    async with asyncio.timeout(BOUND_s):
        while not ended(peer):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.01)


def ended(process: psutil.Process) -> bool:
    """Whether it is gone, or would be if the machine's first process looked after its orphans."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_lock_is_exact_and_names_no_registry() -> None:
    """The versions are pinned, each package has a checksum, and the lock does not say where to fetch it."""
    here = Path(__file__).parent
    wanted = json.loads((here / "package.json").read_text())["dependencies"]
    lock = json.loads((here / "package-lock.json").read_text())["packages"]
    assert wanted == {"cometd-nodejs-server": "1.2.1", "faye": "1.4.3"}
    packages = [what for name, what in lock.items() if name]
    assert all(what["integrity"].startswith("sha512-") for what in packages)
    assert not any("resolved" in what for what in packages)


# ── Faye ──────────────────────────────────────────────────────────────────────────────────────────────


class NaiveSocket:
    """One Bayeux session over a websocket; frames are read in order and sorted by channel."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws
        self.client_id = ""
        self.heard: list[int] = []

    async def ask(self, channel: str, **fields: Any) -> Message:
        """Sends one message and gives its reply; data that come before it are kept in `heard`."""
        message = {"channel": channel, "id": channel, **fields}
        if self.client_id:
            message["clientId"] = self.client_id
        await self.ws.send_json([message])
        return await self.read(lambda item: item["channel"] == channel)

    async def read(self, wanted: Callable[[Message], bool]) -> Message:
        """Reads up to the first item that is wanted, and gives it."""
        async with asyncio.timeout(BOUND_s):
            while True:
                for item in await self.ws.receive_json():
                    self.heard += numbers([item])
                    if wanted(item):
                        found: Message = item
                        return found

    async def open(self) -> None:
        """Handshake, subscription and a connect: only a connect ties faye's session to the socket."""
        reply = await self.ask("/meta/handshake", version="1.0", supportedConnectionTypes=["websocket"])
        self.client_id = reply["clientId"]
        assert (await self.ask("/meta/subscribe", subscription=CALLS))["successful"]
        reply = await self.ask("/meta/connect", connectionType="websocket", advice={"timeout": 0})
        assert reply["successful"]


async def test_faye_burst_over_websocket(faye_peer: FayeFactory, http: aiohttp.ClientSession) -> None:
    """10,000 messages of 1,200 bytes come over the websocket, all and in order."""
    peer = await faye_peer()
    async with http.ws_connect(peer.ws_url) as ws:
        naive = NaiveSocket(ws)
        await naive.open()
        async with asyncio.TaskGroup() as tasks:
            burst = tasks.create_task(peer.publish(10_000, size_bytes=1200))
            tasks.create_task(naive.read(lambda item: item.get("data", {}).get("seq") == 10_000))
        assert naive.heard == list(burst.result().seqs)
        assert burst.result().elapsed_s < BURST_s


async def test_faye_long_polling(faye_peer: FayeFactory, http: aiohttp.ClientSession) -> None:
    """The same server speaks long-polling; without acknowledgements in the handshake."""
    peer = await faye_peer()
    client = NaiveClient(peer.url, http)
    await client.open()
    await peer.publish(1000)
    items = await client.post("/meta/connect", connectionType="long-polling", advice={"timeout": 0})
    assert numbers(items) == list(range(1, 1001))
    assert "ext" not in items[0]
    stats = await peer.stats()
    assert (stats["handshakes"], stats["subscribes"], stats["connects"]) == (1, 1, 2)


@pytest.mark.parametrize("how", ["silent", "disconnect"])
async def test_faye_forgets_a_session(faye_peer: FayeFactory, http: aiohttp.ClientSession, how: Any) -> None:
    """A lost session is "401:…:Unknown client" with advice to handshake; `disconnect` closes the socket."""
    peer = await faye_peer()
    async with http.ws_connect(peer.ws_url) as ws:
        naive = NaiveSocket(ws)
        await naive.open()
        assert await peer.forget(how=how) == [naive.client_id]
        if how == "disconnect":
            assert (await ws.receive(BOUND_s)).type is aiohttp.WSMsgType.CLOSE
            return
        await peer.publish(1)
        reply = await naive.ask("/meta/connect", connectionType="websocket")
        assert reply["error"] == f"401:{naive.client_id}:Unknown client"
        assert reply["advice"]["reconnect"] == "handshake"
        assert naive.heard == []


async def test_faye_policy_rules_and_one_session(faye_peer: FayeFactory, http: aiohttp.ClientSession) -> None:
    """Faye refuses as told, changes its replies as told, and delivers to one session."""
    peer = await faye_peer()
    await peer.policy(handshake=False, refuse=[CALLS])
    async with http.ws_connect(peer.ws_url) as ws, http.ws_connect(peer.ws_url) as other_ws:
        naive, other = NaiveSocket(ws), NaiveSocket(other_ws)
        reply = await naive.ask("/meta/handshake", version="1.0", supportedConnectionTypes=["websocket"])
        assert (reply["successful"], reply["error"]) == (False, "403::handshake_denied")
        await peer.policy(refuse=["/v2/me/devices"])
        await naive.open()
        reply = await naive.ask("/meta/subscribe", subscription="/v2/me/devices")
        assert (reply["successful"], reply["error"]) == (False, "403::subscribe_denied")
        await peer.rule("reply", channel="/meta/connect", set={"advice": None})
        await other.open()
        reply = await naive.ask("/meta/connect", connectionType="websocket", advice={"timeout": 0})
        assert reply["advice"]["reconnect"] == "retry"
        await peer.publish(2, session=naive.client_id)
        await peer.publish(1)
        await other.read(lambda item: "data" in item)
        await naive.read(lambda item: item.get("data", {}).get("seq") == 3)
        assert (naive.heard, other.heard) == ([1, 2, 3], [3])


async def test_faye_drop_and_restart(faye_peer: FayeFactory, http: aiohttp.ClientSession) -> None:
    """Dropping ends the websocket without a close frame; a restarted faye knows nobody."""
    peer = await faye_peer()
    async with http.ws_connect(peer.ws_url) as ws:
        naive = NaiveSocket(ws)
        await naive.open()
        assert await peer.drop() == 1
        assert (await ws.receive(BOUND_s)).type in {aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR}
    await peer.restart()
    async with http.ws_connect(peer.ws_url) as ws:
        naive.ws = ws
        assert (await naive.ask("/meta/connect", connectionType="websocket"))["error"].startswith("401:")


# ── The proxy ─────────────────────────────────────────────────────────────────────────────────────────


async def test_proxy_cuts_a_reply_after_so_many_bytes(
    cometd_peer: CometdFactory, tcp_proxy: ProxyFactory, http: aiohttp.ClientSession
) -> None:
    """Exactly the bytes ordered pass, twice; the reply is redelivered when it gets through."""
    peer = await cometd_peer()
    proxy = await tcp_proxy(peer)
    client = NaiveClient(f"http://{HOST}:{proxy.port}/", http)
    await client.open()
    await peer.publish(1000, size_bytes=1200)
    before = proxy.carried["down"]
    proxy.cut_after(100_000, times=2)
    for _ in range(2):
        with pytest.raises(aiohttp.ClientPayloadError):
            await client.connect()
    assert proxy.carried["down"] - before == 200_000
    assert await client.collect(1000) == list(range(1, 1001))
    assert proxy.opened == 3


@pytest.mark.parametrize("new", [False, True])
async def test_proxy_stalls(
    cometd_peer: CometdFactory, tcp_proxy: ProxyFactory, http: aiohttp.ClientSession, new: bool
) -> None:
    """Stalled connections stay open and carry nothing, new ones as told; resumed, all is delivered."""
    peer = await cometd_peer()
    proxy = await tcp_proxy(peer)
    client = NaiveClient(f"http://{HOST}:{proxy.port}/", http)
    await client.open()
    assert proxy.stall(new=new) == 1
    async with asyncio.TaskGroup() as tasks:
        stuck = tasks.create_task(client.subscribe("/v2/me/devices"))
        fresh = tasks.create_task(client.subscribe("/v2/me/channels"))
        done, _ = await asyncio.wait([stuck, fresh], timeout=SILENCE_s)
        assert done == (set() if new else {fresh})
        assert proxy.open == 2
        await proxy.resume()
    assert stuck.result()["successful"]
    assert fresh.result()["successful"]


async def test_proxy_refuses_and_resumes(
    cometd_peer: CometdFactory, tcp_proxy: ProxyFactory, http: aiohttp.ClientSession
) -> None:
    """Refusing is "connection refused" to new connections and the end of old ones; then the port is back."""
    peer = await cometd_peer()
    proxy = await tcp_proxy(peer)
    client = NaiveClient(f"http://{HOST}:{proxy.port}/", http)
    await client.open()
    await proxy.refuse()
    assert proxy.open == 0
    with pytest.raises((aiohttp.ClientConnectorError, aiohttp.ServerDisconnectedError)):
        await client.subscribe()
    with pytest.raises(aiohttp.ClientConnectorError):
        await client.subscribe()
    await proxy.resume()
    assert (await client.subscribe())["successful"]


@pytest.mark.parametrize("reset", [False, True])
async def test_proxy_delays_and_cuts_websockets(
    faye_peer: FayeFactory, tcp_proxy: ProxyFactory, http: aiohttp.ClientSession, reset: bool
) -> None:
    """Websockets pass too: late when delayed, and ended by FIN or RST when cut, without a close frame."""
    peer = await faye_peer()
    proxy = await tcp_proxy(peer)
    async with http.ws_connect(f"ws://{HOST}:{proxy.port}{peer.path}") as ws:
        naive = NaiveSocket(ws)
        await naive.open()
        loop = asyncio.get_running_loop()
        asked, proxy.delay_s = loop.time(), 0.1
        await naive.ask("/meta/connect", connectionType="websocket", advice={"timeout": 0})
        assert loop.time() - asked >= 0.199
        assert proxy.cut(reset=reset) == 1
        assert (await ws.receive(BOUND_s)).type in {aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR}


async def test_proxy_lets_all_bytes_through_before_a_cut(caplog: pytest.LogCaptureFixture) -> None:
    """More bytes than the kernel can hold arrive to the last before the cut, which is no error of ours."""

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(20_000_000))
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.close()

    port = free_port()
    async with await asyncio.start_server(pour, HOST, port), TcpProxy(port) as proxy:
        proxy.cut_after(16_000_001)
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(slow, (HOST, proxy.port))
            total = 0
            async with asyncio.timeout(BOUND_s):
                while data := await loop.sock_recv(slow, 32_000):
                    total += len(data)
        assert total == 16_000_001
    assert caplog.records == []


async def test_proxy_before_a_server_that_is_down() -> None:
    """A proxy whose target does not listen accepts and ends the connection, and stays up itself."""
    async with TcpProxy(free_port()) as proxy:
        for _ in range(2):
            reader, writer = await asyncio.open_connection(HOST, proxy.port)
            assert await reader.read() == b""
            writer.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(HOST, proxy.port)


def test_peers_of_both_kinds_have_their_address() -> None:
    """The address of a peer follows from its port."""
    cometd = CometdPeer(Node("node", ("npm",)), port=4711)
    faye = FayePeer(Node("node", ("npm",)), port=4712)
    assert cometd.url == "http://127.0.0.1:4711/api/v2/notifications"
    assert (faye.url, faye.ws_url) == ("http://127.0.0.1:4712/cometd", "ws://127.0.0.1:4712/cometd")
