"""The line against CometD servers that we did not write, with a network that can be cut in every place.

Three kinds of tests: what a line is for (everything, once, in order, over whatever happens), one test for
each defect that was measured in the client whose transports ours replace (`test_defect_01_…` and so on, in
the order of that list), and the rest of what a line promises. The servers' times are scaled to tenths of a
second, and the line's limits with them, so that what takes half a minute in the field takes a moment here.

Every test also fails if anything is reported to the event loop or logged as a warning: see `quiet`.
"""

import asyncio
import contextlib
import importlib.metadata
import itertools
import re
import shutil
import ssl
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import aiohttp
import asyncpg
import msgspec
import psutil
import pytest
from aiohttp import web
from yarl import URL

from listener.adapters import cometd
from listener.adapters.cometd import Endpoint, Line, LongPolling, WebSocket, resumable
from listener.adapters.genesys import GenesysClient
from listener.core.calls import Heard
from listener.core.session import (
    CONNECT,
    DISCONNECT,
    HANDSHAKE,
    SUBSCRIBE,
    Delivered,
    Fact,
    Gap,
    Handshaken,
    Kept,
    Limits,
    Refused,
    Resumed,
    Saved,
    Subscribed,
    SubscriptionRefused,
    Unbroken,
)
from listener.errors import LoginRefused, RemoteUnavailable
from listener.simulator.bayeux import ServerSession
from listener.simulator.centre import AccountTruth, Simulator
from listener.simulator.scripts import Message
from listener.simulator.settings import SimulatorSettings
from listener.store.journal import Journal
from tests.peers.proxy import CHUNK_BYTES, HOST, Direction, TcpProxy
from tests.support.peers import CALLS, CometdFactory, FayeFactory, Peer, ProxyFactory
from tests.support.running import until

WEBSOCKET = ("websocket",)
BOUND_s = 15.0
"""Bound of anything that must come."""

LIMITS = Limits(
    request_s=3.0,
    network_delay_s=0.5,
    keep_alive_s=0.3,
    retry_s=0.02,
    retry_dense_s_max=0.2,
    dense_s=2.0,
    retry_s_max=0.5,
    lasting_s=0.1,
    refused_s=0.1,
    refused_s_max=0.4,
    resubscribe_s=0.05,
    resubscribe_s_max=0.2,
)
"""A tenth of the field's times, or less."""

SERVER: dict[str, float] = {"timeout": 400, "max_interval": 2000, "sweep": 100}
"""The same of a CometD server, in milliseconds: it holds a connect for 0.4 s and forgets after 2 s."""
FAYE: dict[str, float] = {"timeout": 400}

SEQ = re.compile(rb'"seq":(\d+)')


class Span(NamedTuple):
    """A time in which an account was not observed; `end` is None while it lasts."""

    since: float
    cause: str
    end: float | None


class Store:
    """Takes what a line hears as the pipeline and the journal do, and remembers when what was told.

    What has a place counts once. With `commits` false nothing becomes durable until `commit`; without
    `room`, `hear` does not return.
    """

    def __init__(self, *, commits: bool = True) -> None:
        self.heard: list[Heard] = []
        self.seqs: list[int] = []
        """The numbers of the messages, in the order in which they were heard."""
        self.doubled = 0
        self.facts: list[Fact] = []
        self.gaps: list[Span] = []
        self.commits = commits
        self.room = asyncio.Event()
        self.room.set()
        self.turns = itertools.cycle([0])
        """How many turns of the event loop each `hear` takes."""
        self.breaks: Exception | None = None
        """Raised by the next `hear`."""
        self.answers: list[tuple[datetime, bool]] = []
        """When a request had its answer, and whether that brought messages."""
        self.saved: Saved | None = None
        """What the line said that its session can be resumed with."""
        self._places: set[tuple[str, int]] = set()
        self._uncommitted: list[Callable[[], None]] = []
        self._changed = asyncio.Event()

    async def hear(self, heard: Sequence[Heard], committed: Callable[[], None]) -> None:
        """Part of `Hearing`."""
        breaks, self.breaks = self.breaks, None
        if breaks is not None:
            raise breaks
        await self.room.wait()
        for _ in range(next(self.turns)):
            await asyncio.sleep(0)
        for one in heard:
            place = (one.stream, one.position)
            self.doubled += place in self._places
            self._places.add(place)
        self.heard += heard
        self.seqs += [int(found[1]) for one in heard if (found := SEQ.search(one.raw))]
        self._uncommitted.append(committed)
        if self.commits:
            self.commit()
        self._changed.set()

    def told(self, fact: Fact, at: datetime) -> None:
        """Part of `Hearing`."""
        assert at.tzinfo is UTC
        now = time.monotonic()
        self.facts.append(fact)
        if isinstance(fact, Gap):
            if self.gaps and self.gaps[-1].end is None:
                assert self.gaps[-1].since == fact.since, "a gap that goes on keeps its beginning"
                self.gaps.pop()
            self.gaps.append(Span(fact.since, fact.cause, None))
        elif isinstance(fact, Subscribed | Resumed | Unbroken) and self.gaps and self.gaps[-1].end is None:
            gap = self.gaps.pop()
            if not isinstance(fact, Unbroken):
                self.gaps.append(gap._replace(end=now))
        self._changed.set()

    def answered(self, at: datetime, *, took: bool) -> None:
        """Part of `Hearing`."""
        self.answers.append((at, took))

    def keep(self, saved: Saved | None) -> None:
        """Part of `Hearing`."""
        self.saved = saved
        self._changed.set()

    def commit(self) -> None:
        """Everything that was heard is durable."""
        waiting, self._uncommitted = self._uncommitted, []
        for committed in waiting:
            committed()

    def kinds(self) -> Counter[type[Fact]]:
        """How many facts there were of each kind."""
        return Counter(type(fact) for fact in self.facts)

    async def until(self, condition: Callable[[], object], within_s: float = BOUND_s) -> None:
        """Returns when the condition holds; it is looked at whenever something was heard or told."""
        try:
            async with asyncio.timeout(within_s):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            last = [fact for fact in self.facts if not isinstance(fact, Delivered)][-8:]
            pytest.fail(
                f"not within {within_s} s; heard {len(self.heard)}, gaps {self.gaps}, last told {last}"
            )

    async def until_told(self, kind: type[Fact], times: int = 1) -> None:
        """Returns when so many facts of that kind were told."""
        await self.until(lambda: self.kinds()[kind] >= times)

    async def until_heard(self, count: int, within_s: float = BOUND_s) -> None:
        """Returns when so many messages were heard."""
        await self.until(lambda: len(self.heard) >= count, within_s)


class Login:
    """Credentials for a peer: they cost nothing, are counted, and give `granted` as headers afterwards."""

    def __init__(self, granted: Mapping[str, str] | None = None, *, refuses: int = 0) -> None:
        self.jar = aiohttp.CookieJar(unsafe=True)
        self.token: Mapping[str, str] = {}
        self.granted = dict(granted or {})
        self.refuses = refuses
        self.away = 0
        self.logins = 0
        self.slow: asyncio.Event | None = None
        """If given, a login waits for it."""
        self._headers: dict[str, str] = {}

    async def login(self) -> None:
        """Part of `Credentials`."""
        self.logins += 1
        if self.slow is not None:
            await self.slow.wait()
        if self.logins <= self.refuses:
            raise LoginRefused("wrong password; give the right one")
        if self.logins <= self.away:
            raise RemoteUnavailable("nobody there; try later")
        self._headers = self.granted

    def headers(self) -> Mapping[str, str]:
        """Part of `Credentials`."""
        return self._headers


@contextlib.asynccontextmanager
async def listening(
    url: str,
    store: Store,
    login: Login | GenesysClient | None = None,
    *,
    limits: Limits = LIMITS,
    goodbye: bool = True,
    saved: Saved | None = None,
    turn: asyncio.Semaphore | None = None,
    **endpoint: Any,
) -> AsyncIterator[Line]:
    """A line that runs while the block does; what breaks it breaks the test."""
    where = Endpoint(url, **{"channels": (CALLS,), **endpoint})
    line = Line(1, where, login or Login(), store, saved=saved, limits=limits, jitter=lambda: 1.0)
    line.goodbye = goodbye
    if turn is not None:
        line.turn = turn
    running = asyncio.get_running_loop().create_task(line.run())
    try:
        yield line
    finally:
        running.cancel()
        await asyncio.wait({running})
    if not running.cancelled():
        running.result()


@contextlib.asynccontextmanager
async def subscribed(url: str, store: Store, *rest: Any, **more: Any) -> AsyncIterator[Line]:
    """The same, entered when it is subscribed."""
    async with listening(url, store, *rest, **more) as line:
        await store.until_told(Subscribed)
        yield line


class Centre:
    """A simulated centre with one account, which is listened to over a websocket only."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator
        (self._account,) = simulator.accounts.values()

    def line(
        self, store: Store, port: int | None = None, **more: Any
    ) -> contextlib.AbstractAsyncContextManager[Line]:
        """As `listening`: a line of the account, with a login of its own; through a proxy's `port`."""
        origin = f"http://{HOST}:{port or self.simulator.gws.port}"
        basic = aiohttp.encode_basic_auth(self._account.login, self._account.password)
        login = GenesysClient(origin, {"Authorization": basic})
        how: dict[str, Any] = {"connection_types": WEBSOCKET, "login_first": True, **more}
        return listening(origin + "/api/v2/notifications", store, login, **how)

    @property
    def session(self) -> ServerSession:
        """The only one that the account has there."""
        (session,) = self.simulator.gws.broker.sessions_of(self._account.login)
        return session

    @property
    def truth(self) -> AccountTruth:
        """What was said to the account."""
        return self.simulator.truth().accounts[self._account.login]

    @property
    def accepted(self) -> list[Message]:
        """The messages that it was said."""
        messages = self.truth.messages
        assert messages is not None
        return [each for each in messages if each.accepted]

    def slow(self, seconds: float) -> None:
        """The next answer to a connect takes so long."""
        self.simulator.faults.arm("delay", account=self._account.login, on="connect", seconds=seconds)


@contextlib.asynccontextmanager
async def by_websocket(**settings: Any) -> AsyncIterator[Centre]:
    """A centre while the block runs; `settings` are the simulator's."""
    async with Simulator(SimulatorSettings(accounts=1, **settings)) as simulator:
        yield Centre(simulator)


async def raws(sql: asyncpg.Connection) -> list[bytes]:
    """The bytes of the messages in the journal, in order."""
    return [row["raw"] for row in await sql.fetch("SELECT raw FROM notification ORDER BY id")]


@pytest.fixture(autouse=True)
async def quiet(caplog: pytest.LogCaptureFixture) -> AsyncIterator[None]:
    """Nothing may be reported to the event loop, or logged as a warning, by whatever library."""
    reported: list[Mapping[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    yield
    await asyncio.sleep(0)
    assert not reported
    assert [record for record in caplog.records if record.levelname in {"WARNING", "ERROR"}] == []


def sockets_to(peer: Peer) -> int:
    """How many sockets of this process lead there."""
    connections = psutil.Process().net_connections(kind="tcp")
    return sum(1 for each in connections if getattr(each.raddr, "port", None) == peer.port)


class Said(NamedTuple):
    """What a peer published, and between which times of our clock."""

    seqs: range
    began: float
    ended: float


async def says(peer: Peer, count: int, **how: Any) -> Said:
    """Publishes so many, and notes when."""
    began = time.monotonic()
    published = await peer.publish(count, **how)
    return Said(published.seqs, began, time.monotonic())


def assert_complete(store: Store, *said: Said) -> None:
    """Everything was heard once and in order, or was said within a gap that was recorded."""
    seqs = store.seqs
    assert store.doubled == 0
    assert seqs == sorted(set(seqs)), "out of order, or twice"
    got = set(seqs)
    for each in said:
        missing = [seq for seq in each.seqs if seq not in got]
        if missing:
            covering = [gap for gap in store.gaps if gap.since <= each.began and each.ended <= (gap.end or 0)]
            assert covering, f"{len(missing)} lost silently, from {missing[0]} on; gaps {store.gaps}"
    assert got <= {seq for each in said for seq in each.seqs}


# ── What a line is for ────────────────────────────────────────────────────────────────────────────────


class Kind(NamedTuple):
    """A server and the way to it."""

    script: str
    flags: dict[str, Any]
    endpoint: dict[str, Any]


KINDS = {
    "cometd, long-polling, ack": Kind("cometd", SERVER, {}),
    "cometd, long-polling": Kind("cometd", {**SERVER, "ack": False}, {}),
    "faye, long-polling": Kind("faye", FAYE, {}),
    "faye, websocket": Kind("faye", FAYE, {"connection_types": WEBSOCKET}),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each server and each way."""
    return KINDS[request.param]


@pytest.fixture
async def peer(kind: Kind, cometd_peer: CometdFactory, faye_peer: FayeFactory) -> Peer:
    """The server of that kind."""
    return await (cometd_peer if kind.script == "cometd" else faye_peer)(**kind.flags)


async def test_ten_thousand_through_a_restart_and_a_402(kind: Kind, peer: Peer) -> None:
    """10,000 messages arrive complete and in order; what was said to nobody lies within recorded gaps.

    In the middle the server forgets the session and denies the channel for a while, then is killed.
    """
    store = Store()
    async with subscribed(peer.url, store, **kind.endpoint):
        first = await says(peer, 4_000)
        await store.until_heard(4_000)

        await peer.policy(refuse=[CALLS])
        await peer.forget(how="wake")
        await store.until_told(SubscriptionRefused)
        unheard = await says(peer, 500)
        await peer.policy()
        await store.until_told(Subscribed, 2)
        second = await says(peer, 3_000)
        await store.until_heard(7_000)

        await peer.kill()
        await store.until(lambda: store.gaps[-1].end is None)
        await peer.start()
        into_the_dark = await says(peer, 500)
        await store.until_told(Subscribed, 3)
        third = await says(peer, 3_000)
        await store.until(lambda: store.seqs[-1] == third.seqs[-1])

    said = (first, unheard, second, into_the_dark, third)
    assert_complete(store, *said)
    assert not set(store.seqs) & set(unheard.seqs), "said to nobody, and yet heard"
    assert set(store.seqs) >= {*first.seqs, *second.seqs, *third.seqs}
    assert [gap.cause for gap in store.gaps] == ["subscription refused", "session lost"]
    assert store.kinds()[Handshaken] == 3
    assert len({one.stream for one in store.heard}) == 3


@pytest.mark.parametrize("at", ["headers", "after_headers", "body"])
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_connection_killed_while_an_answer_is_in_flight(
    cometd_peer: CometdFactory, at: str, how: str
) -> None:
    """With acknowledgements nothing is lost and nothing comes twice, wherever the answer was cut."""
    peer = await cometd_peer(**SERVER)
    store = Store()
    async with subscribed(peer.url, store):
        for skip in (5, 40, 41, 90):
            await peer.rule("cut", channel=CONNECT, at=at, how=how, skip=skip)
        said = await says(peer, 600, rate_per_s=1_200)
        await store.until_heard(600)
        stats = await peer.stats()
    assert_complete(store, said)
    assert store.seqs == list(said.seqs)
    assert stats["handshakes"] == 1
    assert store.kinds()[Unbroken] >= 1
    assert store.gaps == []


async def test_without_acknowledgements_a_cut_is_a_recorded_gap(cometd_peer: CometdFactory) -> None:
    """What the cut answer carried is lost, and the gap that says so covers the time when it was said."""
    peer = await cometd_peer(**SERVER, ack=False)
    store = Store()
    async with subscribed(peer.url, store):
        before = await says(peer, 10)
        await store.until_heard(10)
        await peer.rule("cut", channel=CONNECT, at="body")
        lost = await says(peer, 10, whole=True)
        await store.until_told(Resumed)
        after = await says(peer, 10)
        await store.until_heard(20)
    assert_complete(store, before, lost, after)
    assert store.seqs == [*before.seqs, *after.seqs]
    assert [gap.cause for gap in store.gaps] == ["disconnected"]


async def test_websocket_with_acknowledgements_through_cuts(tcp_proxy: Callable[..., Any]) -> None:
    """A websocket that is cut again and again in the middle of bursts loses and doubles nothing."""
    store = Store()
    store.turns = itertools.cycle([9, 0, 4, 0, 0])
    times = {"timeout_ms": 400, "max_interval_ms": 3_000, "sweep_period_ms": 100}
    async with (
        by_websocket(rate=3_000, seed=5, **times) as centre,
        TcpProxy(centre.simulator.gws.port) as proxy,
    ):
        async with centre.line(store, port=proxy.port):
            await store.until_told(Subscribed)
            proxy.cut_after(60_000, times=6)
            await centre.simulator.play(notifications=2_000)
            await store.until_heard(centre.truth.accepted)
        assert proxy.opened >= 7, "not cut six times"
    assert [one.raw for one in store.heard] == [each.raw for each in centre.accepted]
    assert store.doubled == 0
    assert store.kinds()[Unbroken] >= 1
    assert store.kinds()[Handshaken] == 1


# ── Defects measured in aiocometd ─────────────────────────────────────────────────────────────────────


async def test_defect_01_cookies_of_a_host_that_is_an_ip_address(cometd_peer: CometdFactory) -> None:
    """CometD finds a long-polling session by its cookie: at 127.0.0.1 it must come back, or all is 402."""
    peer = await cometd_peer(**SERVER)
    store = Store()
    async with subscribed(peer.url, store):
        said = await says(peer, 20)
        await store.until_heard(20)
        requests = await peer.requests()
    assert_complete(store, said)
    assert HOST in peer.url
    assert not any(
        "cookie" in each["headers"] for each in requests if each["message"]["channel"] == HANDSHAKE
    )
    assert all(
        "BAYEUX_BROWSER=" in each["headers"].get("cookie", "")
        for each in requests
        if each["message"]["channel"] != HANDSHAKE
    )
    assert store.kinds()[Handshaken] == 1


@pytest.mark.parametrize("endpoint", [{}, {"connection_types": WEBSOCKET}])
async def test_defect_02_what_never_opened_leaves_nothing_running(
    faye_peer: FayeFactory, endpoint: dict[str, Any]
) -> None:
    """A line that is refused asks rarely, and when it is stopped it is gone: no request, task or socket."""
    peer = await faye_peer(**FAYE)
    await peer.policy(handshake=False)
    store = Store()
    tasks = asyncio.all_tasks()
    async with listening(peer.url, store, **endpoint):
        await store.until_told(Refused, 8)
        requests = await peer.requests(HANDSHAKE)
    assert asyncio.all_tasks() == tasks
    assert sockets_to(peer) == 0
    waits = [after["at_ms"] - before["at_ms"] for before, after in itertools.pairwise(requests)]
    assert waits[5] > 150, f"asked again after {waits} ms"
    await peer.reset()
    await peer.until("stats", lambda stats: stats["uptime_ms"] > 500)
    assert (await peer.stats())["requests"] == 0


async def test_defect_03_a_refused_resubscription_is_loud(cometd_peer: CometdFactory) -> None:
    """After a new handshake a denied channel is told, is a gap, is asked for again, and then heard again."""
    peer = await cometd_peer(**SERVER)
    store = Store()
    async with subscribed(peer.url, store):
        await peer.policy(refuse=[CALLS])
        await peer.forget(how="wake")
        await store.until_told(SubscriptionRefused, 3)
        assert store.gaps[-1].cause == "subscription refused"
        assert store.gaps[-1].end is None
        lost = await says(peer, 5)
        await peer.policy()
        await store.until_told(Subscribed, 2)
        said = await says(peer, 5)
        await store.until_heard(5)
    refused = next(fact for fact in store.facts if isinstance(fact, SubscriptionRefused))
    assert (refused.channel, refused.error) == (CALLS, "403::subscribe_denied")
    assert store.seqs == list(said.seqs)
    assert_complete(store, lost, said)


async def test_defect_04_the_interval_is_in_milliseconds(cometd_peer: CometdFactory) -> None:
    """An advised interval of 200 is a fifth of a second between two connects, not three minutes."""
    peer = await cometd_peer(**{**SERVER, "timeout": 100, "interval": 200})
    store = Store()
    async with subscribed(peer.url, store):
        said = await says(peer, 3)
        await store.until_heard(3)
        await peer.reset()
        await peer.until("stats", lambda stats: stats["connects"] >= 3)
        requests = await peer.requests(CONNECT)
    assert store.seqs == list(said.seqs)
    waits = [after["at_ms"] - before["at_ms"] for before, after in itertools.pairwise(requests)]
    assert all(190 <= wait <= 1_000 for wait in waits), waits


@pytest.mark.parametrize(
    "reply",
    [
        {"successful": False, "error": "500::busy"},
        {"successful": False, "error": "402::session_unknown", "advice": {"reconnect": "handshake"}},
        {"successful": False, "error": "500::busy", "advice": {"reconnect": "retry", "interval": 0}},
    ],
)
async def test_defect_05_a_server_that_rejects_is_not_stormed(
    cometd_peer: CometdFactory, reply: dict[str, Any]
) -> None:
    """Connects that are refused for ever come ever more slowly; and when the server mends, all is heard."""
    peer = await cometd_peer(**SERVER)
    store = Store()
    async with subscribed(peer.url, store):
        await peer.reset()
        await peer.rule("reply", channel=CONNECT, count=None, set=reply)
        await peer.until("stats", lambda stats: stats["connects"] >= 8)
        stats = await peer.stats()
        assert stats["uptime_ms"] > 600, stats
        assert stats["peak_per_s"] < 30, stats
        assert store.gaps[-1].end is None
        await peer.clear()
        await store.until(lambda: not store.gaps or store.gaps[-1].end is not None)
        said = await says(peer, 5)
        await store.until_heard(5)
    assert store.seqs == list(said.seqs)


async def test_defect_06_advice_may_be_null_and_is_merged(cometd_peer: CometdFactory) -> None:
    """Null in place of advice, or of one of its fields, neither ends the session nor changes its timeout."""
    peer = await cometd_peer(**SERVER)
    store = Store()
    async with subscribed(peer.url, store) as line:
        await peer.rule("reply", channel=CONNECT, count=3, set={"advice": None})
        await peer.rule("reply", channel=CONNECT, count=3, set={"advice": {"timeout": None, "interval": 0}})
        said = await says(peer, 400, rate_per_s=400)
        await store.until_heard(400)
        assert line.session.timeout_s == SERVER["timeout"] / 1000
        assert (await peer.stats())["rules_pending"] == 0
    assert_complete(store, said)
    assert store.kinds()[Handshaken] == 1


@pytest.mark.parametrize("code", [401, 403])
@pytest.mark.parametrize("endpoint", [{}, {"connection_types": WEBSOCKET}])
async def test_defect_07_http_401_and_403_log_in_again(code: int, endpoint: dict[str, Any]) -> None:
    """A refusal by HTTP calls for the login, whose new token goes with every request from then on."""
    login = Login({"X-CSRF-TOKEN": "2"}, refuses=1)
    store = Store()
    async with guarded(code) as url, listening(url, store, login, **endpoint):
        await store.until_told(Subscribed)
    assert login.logins == 2
    assert [fact.cause for fact in store.facts if isinstance(fact, Gap)] == ["disconnected", "login refused"]


@contextlib.asynccontextmanager
async def guarded(code: int) -> AsyncIterator[str]:
    """A GWS of ours behind a gate that wants a header, and answers this status to who has it not."""
    settings = SimulatorSettings(accounts=1, timeout_ms=400)
    async with Simulator(settings) as simulator, aiohttp.ClientSession() as onward:
        (account,) = simulator.accounts.values()
        headers = {"Authorization": aiohttp.encode_basic_auth(account.login, account.password)}

        async def gate(request: web.Request) -> web.StreamResponse:
            if request.headers.get("X-CSRF-TOKEN") != "2":
                return web.Response(status=code)
            url = simulator.url + "/api/v2/notifications"
            if request.method == "GET":
                front = web.WebSocketResponse()
                await front.prepare(request)
                async with onward.ws_connect(url, headers=headers) as back:
                    async for frame in front:
                        await back.send_str(frame.data)
                        await front.send_str(await back.receive_str())
                return front
            cookies = {"Cookie": request.headers.get("Cookie", "")}
            async with onward.post(
                url, data=await request.read(), headers={**headers, **cookies}
            ) as response:
                answer = web.Response(body=await response.read(), status=response.status)
                answer.headers.extend(
                    (name, value) for name, value in response.headers.items() if name == "Set-Cookie"
                )
                return answer

        app = web.Application()
        app.router.add_route("*", "/", gate)
        async with serving(app) as origin:
            yield origin


@contextlib.asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[str]:
    """An aiohttp application on a port of its own; gives its URL."""
    runner = web.AppRunner(app, handle_signals=False, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, HOST, 0)
        await site.start()
        yield f"http://{HOST}:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()


async def test_defect_07_redirects_are_not_followed(cometd_peer: CometdFactory) -> None:
    """A redirect would take the credentials elsewhere: it is an error that says where it led."""
    peer, elsewhere = await cometd_peer(**SERVER), await cometd_peer(**SERVER)
    await peer.rule("status", code=302, headers={"Location": elsewhere.url}, count=3)
    store = Store()
    async with subscribed(peer.url, store, Login({"Authorization": "Basic c2VjcmV0"})):
        pass
    assert (await elsewhere.stats())["requests"] == 0
    gap = next(fact for fact in store.facts if isinstance(fact, Gap))
    assert "HTTP 302" in gap.detail
    assert elsewhere.url in gap.detail
    assert "set base_url" in gap.detail


@pytest.mark.parametrize("code", [400, 404, 500, 503])
async def test_defect_07_other_statuses_are_failures(cometd_peer: CometdFactory, code: int) -> None:
    """Whatever else the server answers is no answer: the session goes on when it answers again."""
    peer = await cometd_peer(**SERVER)
    store = Store()
    async with subscribed(peer.url, store):
        await peer.rule("status", channel=CONNECT, code=code, text="[]", count=2)
        await store.until_told(Unbroken)
        said = await says(peer, 5)
        await store.until_heard(5)
    assert store.seqs == list(said.seqs)
    assert store.kinds()[Handshaken] == 1
    assert f"HTTP {code}" in next(fact.detail for fact in store.facts if isinstance(fact, Gap))


STALL_s = 1.8
MAX_INTERVAL_ms = 1_000
"""Nine seconds of stall against a maxInterval of five, on a fifth of the scale."""


@pytest.mark.parametrize("stall", ["commits", "room"])
async def test_defect_08_a_slow_store_does_not_cost_the_session(
    cometd_peer: CometdFactory, stall: str
) -> None:
    """The store stalls for longer than maxInterval: the session is kept, 0 lost, 0 doubled.

    Once because nothing is committed, once because there is no room for what is heard.
    """
    peer = await cometd_peer(**{**SERVER, "max_interval": MAX_INTERVAL_ms})
    store = Store()
    async with subscribed(peer.url, store):
        before = await says(peer, 10)
        await store.until_heard(10)
        if stall == "commits":
            store.commits = False
        else:
            store.room.clear()
        during = await says(peer, int(STALL_s * 200), rate_per_s=200)
        (session,) = await peer.sessions()
        assert session["acked"] is not None
        assert len(store.heard) < 10 + len(during.seqs)
        store.commits = True
        store.room.set()
        store.commit()
        await store.until_heard(10 + len(during.seqs))
        stats = await peer.stats()
    assert_complete(store, before, during)
    assert store.seqs == [*before.seqs, *during.seqs]
    assert stats["handshakes"] == 1
    assert store.gaps == []


@pytest.mark.parametrize("endpoint", [{}, {"connection_types": WEBSOCKET}])
async def test_defect_08_without_acknowledgements_a_stall_loses_nothing_silently(
    faye_peer: FayeFactory, endpoint: dict[str, Any]
) -> None:
    """A server that does not acknowledge cannot be held off for longer than it keeps the session; what is
    lost then lies within a gap, and what was taken is not lost to our own impatience."""
    peer = await faye_peer(**FAYE)
    store = Store()
    async with subscribed(peer.url, store, **endpoint):
        store.room.clear()
        first = await says(peer, 1)
        during = [await says(peer, 10, rate_per_s=200) for _ in range(36)]
        store.room.set()
        await store.until_told(Subscribed, 2)
        after = await says(peer, 20)
        await store.until(lambda: store.seqs[-1:] == [after.seqs[-1]])
    assert_complete(store, first, *during, after)
    assert store.seqs[0] == first.seqs[0]


async def test_defect_09_impatience_with_the_store_loses_nothing(cometd_peer: CometdFactory) -> None:
    """A store that takes longer than any request may is waited for: what it was handed is not taken back."""
    limits = Limits(**{**_fields(LIMITS), "network_delay_s": 0.1, "request_s": 0.3})
    peer = await cometd_peer(**SERVER)
    store = Store()
    async with subscribed(peer.url, store, limits=limits):
        store.room.clear()
        said = await says(peer, 200, rate_per_s=200)
        store.room.set()
        await store.until_heard(200)
    assert_complete(store, said)
    assert store.seqs == list(said.seqs)
    assert store.kinds()[Handshaken] == 1


def _fields(limits: Limits) -> dict[str, Any]:
    return {name: getattr(limits, name) for name in limits.__struct_fields__}


async def test_defect_08_beyond_its_bound_the_outbox_waits(
    cometd_peer: CometdFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What may wait for a store without room is bounded: then the server's own bound decides, as a gap."""
    monkeypatch.setattr(cometd, "OUTBOX_BYTES_MAX", 1_000)
    peer = await cometd_peer(**{**SERVER, "max_interval": 500})
    store = Store()
    async with subscribed(peer.url, store):
        store.room.clear()
        first = await says(peer, 10, size_bytes=200, whole=True)
        await peer.until("sessions", lambda answer: answer["removed"]["expired"] == 1)
        lost = await says(peer, 10)
        store.room.set()
        await store.until_told(Subscribed, 2)
        after = await says(peer, 10)
        await store.until(lambda: store.seqs[-1:] == [after.seqs[-1]])
    assert_complete(store, first, lost, after)
    assert store.seqs[:10] == list(first.seqs)


async def test_defect_09_a_stop_acknowledges_only_what_is_durable(cometd_peer: CometdFactory) -> None:
    """A line that is stopped in the middle of a burst has heard a beginning without holes, and the server
    still keeps what did not become durable."""
    peer = await cometd_peer(**SERVER)
    for _ in range(3):
        store = Store()
        async with subscribed(peer.url, store, goodbye=False):
            first = await says(peer, 100, rate_per_s=4_000)
            await store.until_heard(30)
            store.commits = False
            durable = len(store.heard)
        assert store.seqs == list(first.seqs)[: len(store.heard)]
        assert len(store.heard) >= durable
        await peer.forget()


@pytest.mark.parametrize("scope", ["existing", "frozen"])
async def test_defect_10_half_open_connections_are_noticed_in_time(
    cometd_peer: CometdFactory, tcp_proxy: ProxyFactory, scope: str
) -> None:
    """A connection over which nothing comes any more is given up after timeout + 5 s (scaled), with all that
    are pooled: the session is kept, and with acknowledgements nothing is lost.

    Once the server goes on believing in it, once the network between us is gone for that connection.
    """
    peer = await cometd_peer(**SERVER)
    proxy = await tcp_proxy(peer)
    store = Store()
    async with subscribed(f"http://{HOST}:{proxy.port}{peer.path}", store):
        before = await says(peer, 10)
        await store.until_heard(10)
        if scope == "existing":
            await peer.half_open("existing")
        else:
            proxy.stall()
        began = time.monotonic()
        during = await says(peer, 10)
        await store.until_heard(20)
        took = time.monotonic() - began
        stats = await peer.stats()
    assert_complete(store, before, during)
    assert store.seqs == [*before.seqs, *during.seqs]
    assert stats["handshakes"] == 1
    assert took < SERVER["timeout"] / 1000 + LIMITS.network_delay_s + 0.5
    assert store.kinds()[Unbroken] == 1


async def test_defect_10_a_half_open_websocket_is_noticed_in_time(
    faye_peer: FayeFactory, tcp_proxy: ProxyFactory
) -> None:
    """The same over a websocket: no farewell is waited for on a connection that is dead."""
    peer = await faye_peer(timeout=1_000)
    proxy = await tcp_proxy(peer)
    store = Store()
    async with subscribed(f"http://{HOST}:{proxy.port}{peer.path}", store, connection_types=WEBSOCKET):
        before = await says(peer, 10)
        await store.until_heard(10)
        proxy.stall()
        began = time.monotonic()
        during = await says(peer, 10)
        await store.until_told(Resumed)
        took = time.monotonic() - began
        after = await says(peer, 10)
        await store.until_heard(20)
        stats = await peer.stats()
    assert_complete(store, before, during, after)
    assert stats["handshakes"] == 1
    assert took < 1.0 + LIMITS.network_delay_s + 0.5


@pytest.mark.parametrize("name", ["cometd, long-polling, ack", "faye, long-polling", "faye, websocket"])
async def test_defect_11_an_oversized_message_does_not_stop_the_others(
    cometd_peer: CometdFactory, faye_peer: FayeFactory, name: str
) -> None:
    """An answer above the bound ends the session, as a gap with that cause; what comes after is heard."""
    script, flags, endpoint = KINDS[name]
    peer: Peer = await (cometd_peer if script == "cometd" else faye_peer)(**flags)
    store = Store()
    async with subscribed(peer.url, store, delivery_bytes_max=100_000, **endpoint):
        before = await says(peer, 10)
        large = await says(peer, 1, size_bytes=50_000)
        await store.until_heard(11)
        poison = await says(peer, 1, size_bytes=200_000)
        await store.until_told(Subscribed, 2)
        after = await says(peer, 10)
        await store.until_heard(21)
    assert_complete(store, before, large, poison, after)
    assert store.seqs == [*before.seqs, *large.seqs, *after.seqs]
    assert [gap.cause for gap in store.gaps] == ["oversized"]
    assert store.kinds()[Handshaken] == 2


async def test_defect_12_stopping_is_quick_and_says_nothing(kind: Kind, peer: Peer) -> None:
    """A stop takes no time worth the name, and leaves no word, task or socket behind."""
    tasks = asyncio.all_tasks()
    store = Store()
    async with subscribed(peer.url, store, **kind.endpoint):
        said = await says(peer, 100)
        await store.until_heard(100)
        began = time.monotonic()
    assert time.monotonic() - began < 0.2
    assert asyncio.all_tasks() == tasks
    assert sockets_to(peer) == 0
    assert_complete(store, said)


async def test_defect_13_no_tasks_for_messages_and_few_for_a_session(kind: Kind, peer: Peer) -> None:
    """An idle session is a handful of tasks; a thousand messages make none."""
    loop = asyncio.get_running_loop()
    before = len(asyncio.all_tasks())
    store = Store()
    async with subscribed(peer.url, store, **kind.endpoint):
        await says(peer, 10)
        await store.until_heard(10)
        assert len(asyncio.all_tasks()) - before <= 4
        made = 0

        def count(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
            # aiohttp writes each request in a task of its own; a request may bring any number of messages.
            nonlocal made
            made += work.__qualname__ != "ClientRequest.write_bytes"
            return asyncio.Task(work, loop=loop, **options)

        said = loop.create_task(says(peer, 1_000, rate_per_s=2_000))
        loop.set_task_factory(count)
        await store.until_heard(1_010)
        loop.set_task_factory(None)
        await said
    # A frame of a websocket may be awaited by a task; frames are fewer than messages.
    assert made <= 50, f"{made} tasks for 1,000 messages"


async def test_defect_14_the_order_survives_cuts(cometd_peer: CometdFactory, tcp_proxy: ProxyFactory) -> None:
    """With the connection cut again and again inside the answers, and a store that takes now longer and now
    shorter, the order is the server's."""
    peer = await cometd_peer(**SERVER)
    proxy = await tcp_proxy(peer)
    store = Store()
    store.turns = itertools.cycle([9, 0, 4, 0, 0])
    async with subscribed(f"http://{HOST}:{proxy.port}{peer.path}", store):
        proxy.cut_after(40_000, times=10)
        said = await says(peer, 4_000, rate_per_s=4_000, size_bytes=200)
        await store.until_heard(4_000)
    assert store.seqs == list(said.seqs)
    assert store.doubled == 0
    assert proxy.opened >= 11, "not cut ten times"
    positions = [one.position for one in store.heard]
    assert positions == list(range(1, 4_001))


# ── Bytes ─────────────────────────────────────────────────────────────────────────────────────────────

TEXTS = [
    '{"a": 1,  "b" :[ 1,2 ]}',
    '{"a":1,"a":2,"a":3}',
    '{"name":"J\\u00fcrgen \\ud83d\\ude00 \\/ \\u0000"}',
    '{"name":"Jürgen 😀"}',
    '{"half":"\\ud800"}',
    "1e400",
    "-0.0",
    "123456789012345678901234567890.10",
    '"text"',
    "null",
    "[]",
    "[" * 5_000 + "]" * 5_000,
]


async def test_the_exact_bytes_are_heard(cometd_peer: CometdFactory) -> None:
    """Spacing, repeated keys, escapes, numbers and depth arrive as they stood on the wire."""
    peer = await cometd_peer(**SERVER)
    store = Store()
    async with subscribed(peer.url, store):
        await peer.publish_texts(TEXTS)
        await store.until_heard(len(TEXTS))
    assert [one.raw.decode() for one in store.heard] == [
        f'{{"channel":"{CALLS}","data":{text}}}' for text in TEXTS
    ]
    assert [one.position for one in store.heard] == list(range(1, len(TEXTS) + 1))
    assert {one.channel for one in store.heard} == {CALLS, ""}  # what nests too deep to read has no name
    assert {one.account for one in store.heard} == {1}


async def test_an_exchange_that_failed_answers_nothing() -> None:
    """However often it is tried: what was said meanwhile is with the server, and nobody may vouch for it."""
    asked = asyncio.Semaphore(0)

    async def away(request: web.Request) -> web.Response:
        await request.read()
        asked.release()
        return web.Response(status=503)

    app = web.Application()
    app.router.add_post("/", away)
    store = Store()
    async with serving(app) as url, listening(url, store):
        for _ in range(4):
            await asked.acquire()
    assert store.answers == []


async def test_items_that_are_no_messages_are_kept_apart(cometd_peer: CometdFactory) -> None:
    """A null among the messages is heard in a stream of its own, and shifts no places."""
    peer = await cometd_peer(**SERVER)
    store = Store()
    async with subscribed(peer.url, store):
        await peer.rule("insert", channel=CONNECT, text="null", count=2)
        said = await says(peer, 2, rate_per_s=20)
        await store.until_heard(4)
        more = await says(peer, 1)
        await store.until_heard(5)
    odd = [one for one in store.heard if one.raw == b"null"]
    assert [one.position for one in odd] == [1, 2]
    assert len({one.stream for one in odd}) == 1
    assert odd[0].stream not in {one.stream for one in store.heard if one.raw != b"null"}
    assert store.seqs == [*said.seqs, *more.seqs]
    assert store.kinds()[Handshaken] == 1


@pytest.mark.parametrize(
    "rule",
    [
        {"kind": "truncate"},
        {"kind": "body", "text": "<html>Bad gateway</html>"},
        {"kind": "body", "text": ""},
        {"kind": "body", "text": "[]"},
        {"kind": "body", "text": "null"},
    ],
)
async def test_an_answer_that_cannot_be_read_is_asked_for_again(
    cometd_peer: CometdFactory, rule: dict[str, Any]
) -> None:
    """Twice is forgiven: with acknowledgements it all comes again."""
    peer = await cometd_peer(**SERVER)
    store = Store()
    async with subscribed(peer.url, store):
        await peer.rule(channel=CONNECT, count=2, **rule)
        said = await says(peer, 10, whole=True)
        await store.until_heard(10)
        await store.until_told(Unbroken)
    assert_complete(store, said)
    assert store.seqs == list(said.seqs)
    assert store.kinds()[Handshaken] == 1


async def test_a_message_that_breaks_the_answer_thrice_is_given_up(cometd_peer: CometdFactory) -> None:
    """What is no JSON holds back the session only until it is known to be hopeless, and then is a gap."""
    peer = await cometd_peer(**SERVER)
    store = Store()
    async with subscribed(peer.url, store):
        began = time.monotonic()
        await peer.publish_texts(['{"a":'])
        poison = Said(range(0), began, time.monotonic())
        await store.until_told(Subscribed, 2)
        said = await says(peer, 10)
        await store.until_heard(10)
    assert store.seqs == list(said.seqs)
    (gap,) = store.gaps
    assert gap.cause == "malformed"
    assert gap.since <= poison.began
    assert gap.end is not None
    assert gap.end >= poison.ended


# ── Sessions ──────────────────────────────────────────────────────────────────────────────────────────


async def test_all_channels_go_into_one_request(cometd_peer: CometdFactory) -> None:
    """Subscribing costs one request, however many channels there are."""
    peer = await cometd_peer(**SERVER)
    store = Store()
    channels = (CALLS, "/v2/me/devices", "/v2/me/channels")
    async with subscribed(peer.url, store, channels=channels):
        requests = await peer.requests()
        (session,) = await peer.sessions()
        assert (await peer.stats())["requests"] <= 4
    asked = [each["message"]["channel"] for each in requests][:5]
    assert asked == [HANDSHAKE, CONNECT, SUBSCRIBE, SUBSCRIBE, SUBSCRIBE]
    assert set(session["subscriptions"]) == set(channels)


async def test_goodbye_is_said(kind: Kind, peer: Peer) -> None:
    """A line that stops for good tells the server, which then keeps nothing for it."""
    store = Store()
    async with subscribed(peer.url, store, **kind.endpoint):
        assert len(await peer.sessions()) == 1
    assert (await peer.stats())["disconnects"] == 1
    assert (await peer.requests())[-1]["message"]["channel"] == DISCONNECT
    assert await peer.sessions() == []


async def test_goodbye_is_not_said_when_the_session_is_to_be_resumed(cometd_peer: CometdFactory) -> None:
    """A planned restart must not end the session."""
    peer = await cometd_peer(**SERVER)
    async with subscribed(peer.url, Store(), goodbye=False):
        pass
    assert (await peer.stats())["disconnects"] == 0
    assert len(await peer.sessions()) == 1


async def test_who_is_stopped_more_than_once_leaves_no_connection(cometd_peer: CometdFactory) -> None:
    """A stop during a reload cancels a line again while it leaves: its sockets are closed all the same."""

    class Unyielding(Store):
        async def hear(self, heard: Sequence[Heard], committed: Callable[[], None]) -> None:
            taking.set()
            try:
                await super().hear(heard, committed)
            except asyncio.CancelledError:
                cancelled.set()
                await let_go.wait()
                raise

    taking, cancelled, let_go = asyncio.Event(), asyncio.Event(), asyncio.Event()
    peer = await cometd_peer(**SERVER)
    store = Unyielding()
    store.room.clear()
    async with subscribed(peer.url, store) as line:
        (running,) = {
            task for task in asyncio.all_tasks() if getattr(task.get_coro(), "__name__", "") == "run"
        }
        await says(peer, 1)
        await taking.wait()
        running.cancel()
        await asyncio.sleep(0)
        running.cancel()
        await cancelled.wait()
        running.cancel()
        await asyncio.sleep(0)
        let_go.set()
        await asyncio.wait({running})
        assert line._http is None


# ── The last ask ──────────────────────────────────────────────────────────────────────────────────────


class Leaving:
    """Notes when a line was left, and what it then knew."""

    def __init__(self, line: Line) -> None:
        self.told: list[datetime | None] = []
        line.left = self.told.append


def utc() -> datetime:
    """Now."""
    return datetime.now(UTC)  # noqa: TID251 - beside the line's own


async def test_a_stop_hears_what_was_under_way_and_leaves_a_connect(
    cometd_peer: CometdFactory, journal: Journal, sql: asyncpg.Connection
) -> None:
    """The server believes that it has answered, and the answer is lost with the connection that is not waited
    for. The last ask brings it, and what was said since; it is acknowledged once it is stored, by a connect
    that the server goes on holding. The next line goes on: one handshake, nothing lost, nothing twice."""
    peer = await cometd_peer(**SERVER | {"timeout": 2000, "max_interval": 6000})
    first = Remembering(journal)
    async with subscribed(peer.url, first, goodbye=False) as line:
        leaving = Leaving(line)
        said = [await says(peer, 10)]
        await first.until_heard(10)
        await peer.until("sessions", lambda answer: answer["sessions"][0]["held"])
        await peer.rule("cut", channel=CONNECT, at="headers", how="silent")
        said.append(await says(peer, 5, whole=True))
        await peer.until("sessions", lambda answer: not answer["sessions"][0]["held"])
        said.append(await says(peer, 5, whole=True))
        assert len(first.heard) == 10
        before = utc()
    (asked,) = leaving.told
    assert asked is not None
    assert before <= asked <= utc()
    assert await stored(sql) == [seq for each in said for seq in each.seqs]
    last, left = [each["message"] for each in await peer.requests(CONNECT)][-2:]
    assert last["advice"] == {"timeout": 0}
    assert "advice" not in left
    assert left["ext"]["ack"] > last["ext"]["ack"]
    assert (await peer.sessions())[0]["held"], "its time does not run yet"
    said.append(await says(peer, 5))

    second = Remembering(journal)
    async with listening(peer.url, second, saved=await first.left()):
        await second.until_told(Unbroken)
        await second.until_heard(5)
        assert (await peer.stats())["handshakes"] == 1
    assert await stored(sql) == [seq for each in said for seq in each.seqs]
    assert second.duplicates == 0


async def test_a_goodbye_comes_after_the_last_ask(cometd_peer: CometdFactory) -> None:
    """What the server had said is heard before it forgets it."""
    peer = await cometd_peer(**SERVER)
    store = Store()
    async with subscribed(peer.url, store) as line:
        leaving = Leaving(line)
        await peer.until("sessions", lambda answer: answer["sessions"][0]["held"])
        await peer.rule("cut", channel=CONNECT, at="headers", how="silent")
        said = await says(peer, 5, whole=True)
        await peer.until("sessions", lambda answer: not answer["sessions"][0]["held"])
    assert store.seqs == list(said.seqs)
    assert leaving.told != [None]
    *_, last, farewell = [each["message"] for each in await peer.requests()]
    assert (last["channel"], last["advice"]) == (CONNECT, {"timeout": 0})
    assert farewell["channel"] == DISCONNECT
    assert await peer.sessions() == []


async def test_without_acknowledgements_no_last_ask_is_made(kind: Kind, peer: Peer) -> None:
    """What was under way is gone: another answer would prove nothing."""
    asks = 2 if kind.flags.get("ack", kind.script == "cometd") else 0
    store = Store()
    async with subscribed(peer.url, store, goodbye=False, **kind.endpoint) as line:
        leaving = Leaving(line)
        await line_holds(line)
        connects = (await peer.stats())["connects"]
    assert (await peer.stats())["connects"] <= connects + asks
    assert (leaving.told == [None]) is not bool(asks)


async def line_holds(line: Line) -> None:
    """Until it has connected since it subscribed."""
    await until(lambda: line.session.connected and line.session.observing)


@pytest.mark.parametrize("how", ["hangs", "gone", "unknown", "403"])
async def test_a_last_ask_that_fails_is_as_if_it_had_not_been_made(
    cometd_peer: CometdFactory, tcp_proxy: ProxyFactory, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """It takes no longer than its bound, tells of no gap, and vouches for nothing; what is kept of a session
    that the server may still have stays."""
    monkeypatch.setattr(cometd, "LAST_ASK_S_MAX", 0.3)
    peer = await cometd_peer(**SERVER)
    proxy = await tcp_proxy(peer)
    store = Store()
    async with subscribed(f"http://{HOST}:{proxy.port}{peer.path}", store, goodbye=False) as line:
        leaving = Leaving(line)
        await peer.until("sessions", lambda answer: answer["sessions"][0]["held"])
        match how:
            case "hangs":
                proxy.stall(new=True)
            case "gone":
                await peer.kill()
            case "unknown":
                await peer.forget()
            case _:
                await peer.rule("status", channel=CONNECT, code=403)
        told = len(store.facts)
        began = time.monotonic()
    assert time.monotonic() - began < 1.0
    assert leaving.told == [None]
    assert [fact for fact in store.facts[told:] if not isinstance(fact, Gap)] == []
    if how != "gone":  # then the line may have noticed before it was told to stop
        assert store.facts[told:] == []
    assert (store.saved is None) is (how == "unknown")


async def test_nothing_is_asked_while_something_heard_is_not_durable(
    cometd_peer: CometdFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not stored by then is the server's; a store that hangs is waited for within a bound."""
    monkeypatch.setattr(cometd, "STORED_S_MAX", 0.1)
    peer = await cometd_peer(**SERVER)
    store = Store(commits=False)
    async with subscribed(peer.url, store, goodbye=False) as line:
        leaving = Leaving(line)
        await says(peer, 5, whole=True)
        await store.until(lambda: store.heard)
    assert leaving.told == [None]
    assert {each["message"]["ext"]["ack"] for each in (await peer.requests(CONNECT))[1:]} <= {-1, 1, 2}
    assert store.saved is not None


async def test_what_the_last_ask_brings_is_acknowledged_only_when_it_is_durable(
    cometd_peer: CometdFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heard at the last moment by a store that hangs then: the moment is told, for who knows what is durable;
    no connect is left behind, and none says goodbye."""
    monkeypatch.setattr(cometd, "STORED_S_MAX", 0.1)
    limits = Limits(**{**_fields(LIMITS), "request_s": 0.5})
    peer = await cometd_peer(**SERVER)
    store = Store()
    async with subscribed(peer.url, store, limits=limits) as line:
        leaving = Leaving(line)
        await peer.until("sessions", lambda answer: answer["sessions"][0]["held"])
        await peer.rule("cut", channel=CONNECT, at="headers", how="silent")
        said = await says(peer, 5, whole=True)
        await peer.until("sessions", lambda answer: not answer["sessions"][0]["held"])
        store.commits = False
    assert store.seqs == list(said.seqs)
    assert leaving.told != [None]
    last = (await peer.requests())[-1]["message"]
    assert (last["channel"], last["advice"]) == (CONNECT, {"timeout": 0})
    assert len(await peer.sessions()) == 1
    assert store.saved is not None


async def test_a_websocket_asks_once_more_on_a_new_connection(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """Frames of the old one, which nobody reads any more, are not taken for its answer: while messages come
    all the time, all that were said before the stop are stored, once and in order, and so are those after."""
    first, second = Remembering(journal), Remembering(journal)
    stop = asyncio.Event()
    async with (
        by_websocket(rate=1_000, timeout_ms=5_000, max_interval_ms=6_000) as centre,
        asyncio.TaskGroup() as tasks,
    ):
        async with centre.line(first, goodbye=False) as line:
            await first.until_told(Subscribed)
            leaving = Leaving(line)
            playing = tasks.create_task(centre.simulator.play(stop=stop))
            await first.until_heard(300)
        (asked,) = leaving.told
        assert asked is not None
        before = [each.raw for each in centre.accepted if each.said_at_s < asked.timestamp()]
        assert (await raws(sql))[: len(before)] == before
        async with centre.line(second, saved=await first.left()):
            await second.until_heard(100)
            stop.set()
            await playing
            await centre.simulator.drained()
    assert centre.simulator.gws.broker.handshakes == 1
    assert second.gaps == []
    assert await raws(sql) == [each.raw for each in centre.accepted]


async def test_a_late_answer_on_a_websocket_is_not_taken_for_the_last(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """The server has begun to answer the connect that is held, and is slow about it, when the line is
    stopped: what that answer holds is heard once, with the last one."""
    store = Remembering(journal)
    async with by_websocket(rate=2_000, timeout_ms=5_000, max_interval_ms=6_000) as centre:
        async with centre.line(store, goodbye=False) as line:
            await store.until_told(Subscribed)
            leaving = Leaving(line)
            session = centre.session
            await until(lambda: session.notify is not None and session.expires_at == 0.0)
            batch = session.batch
            centre.slow(2.0)
            await centre.simulator.play(notifications=20)
            await until(lambda: session.batch == batch + 1)
            assert store.heard == []
        said = centre.accepted
    assert leaving.told != [None]
    assert await raws(sql) == [each.raw for each in said]
    assert [fact.odd for fact in store.facts if isinstance(fact, Delivered)] == [()]


# ── Resume ────────────────────────────────────────────────────────────────────────────────────────────


SAVED_AT = datetime(2026, 3, 2, tzinfo=UTC)


class Remembering(Store):
    """Stores in the journal too. With `commits` false the line is not told that it did, so that what is
    stored stays unacknowledged."""

    def __init__(self, journal: Journal, **how: Any) -> None:
        super().__init__(**how)
        self.journal = journal
        self.duplicates = 0

    async def hear(self, heard: Sequence[Heard], committed: Callable[[], None]) -> None:
        """Part of `Hearing`."""
        self.duplicates += (await self.journal.record(heard)).duplicates
        await super().hear(heard, committed)

    async def left(self) -> Saved:
        """What a start finds after this line was dropped."""
        await self.journal.cover([], {1: self.saved})
        return (await self.journal.kept_sessions([1]))[1]


async def stored(sql: asyncpg.Connection) -> list[int]:
    """The numbers of the messages in the journal, in order."""
    return [int(found[1]) for raw in await raws(sql) if (found := SEQ.search(raw))]


async def test_a_session_is_resumed_where_the_store_is(
    cometd_peer: CometdFactory, journal: Journal, sql: asyncpg.Connection
) -> None:
    """A line is dropped without a farewell, with messages stored that it had no time to acknowledge, and
    more are said while nobody listens. Another line with what the store kept goes on: no handshake, no login,
    no subscription; nothing lost, nothing twice, no gap."""
    peer = await cometd_peer(**SERVER | {"max_interval": 6000})
    first = Remembering(journal)
    async with subscribed(peer.url, first, goodbye=False):
        said = [await says(peer, 10)]
        await first.until_heard(10)
        await peer.until("sessions", lambda answer: answer["sessions"][0]["held"])
        first.commits = False
        said.append(await says(peer, 5, whole=True))
        await first.until_heard(15)
    said.append(await says(peer, 5))
    left = await first.left()
    assert left.position == 15
    assert left.resumes_at == (left.batch or (0, 0))

    second, login = Remembering(journal), Login()
    async with listening(peer.url, second, login, saved=left, login_first=True):
        await second.until_told(Unbroken)
        said.append(await says(peer, 5))
        await second.until_heard(10)
        assert second.saved is None, "what is kept is as it was"
        stats = await peer.stats()
    assert await stored(sql) == [seq for each in said for seq in each.seqs]
    assert (stats["handshakes"], stats["disconnects"]) == (1, 0)
    assert login.logins == 0
    assert second.gaps == []
    assert {Handshaken, Subscribed}.isdisjoint(second.kinds())
    assert {one.stream for one in second.heard} == {one.stream for one in first.heard}


async def test_a_batch_that_was_stored_in_part_comes_again_and_counts_once(
    cometd_peer: CometdFactory, journal: Journal, sql: asyncpg.Connection
) -> None:
    """Killed between two transactions of one delivery: the server sends all of it again."""
    peer = await cometd_peer(**SERVER)
    first = Remembering(journal, commits=False)
    async with subscribed(peer.url, first, goodbye=False):
        first.room.clear()
        said = await says(peer, 6, whole=True)
        await peer.until("sessions", lambda answer: answer["sessions"][0]["held"] is False)
        first.room.set()
        await first.until_heard(6)
    await sql.execute("DELETE FROM notification WHERE position > 2")
    await sql.execute("UPDATE stream SET position = 2, batch = -1, batch_position = 0")
    await sql.execute("UPDATE account SET heard_at = heard_at")  # whoever else writes says so

    second = Remembering(journal)
    async with listening(peer.url, second, saved=await first.left()):
        await second.until_heard(6)
    assert second.duplicates == 2
    assert await stored(sql) == list(said.seqs)


@pytest.mark.parametrize("why", ["forgotten", "without its cookies"])
async def test_a_session_that_cannot_be_resumed_is_followed_by_another(
    cometd_peer: CometdFactory, journal: Journal, why: str
) -> None:
    """The server says 402: a login, a handshake, a subscription, and a gap since nobody vouches."""
    peer = await cometd_peer(**SERVER)
    first = Remembering(journal)
    async with subscribed(peer.url, first, goodbye=False):
        pass
    left = await first.left()
    if why == "forgotten":
        await peer.forget()
    else:
        left = msgspec.structs.replace(left, kept=msgspec.structs.replace(left.kept, cookies=()))
    began = time.monotonic()
    second, login = Remembering(journal), Login()
    async with listening(peer.url, second, login, saved=left, login_first=True):
        await second.until_told(Subscribed)
        assert (await peer.stats())["handshakes"] == 2
        assert second.saved is not None
        assert second.saved.kept.stream != left.kept.stream
    assert login.logins == 1
    (gap,) = second.gaps
    assert gap.cause == "session lost"
    assert gap.since == pytest.approx(began, abs=0.1)


async def test_an_old_session_is_tried_once_while_the_server_is_away(
    cometd_peer: CometdFactory, tcp_proxy: ProxyFactory, journal: Journal
) -> None:
    """It would hardly be there any more. A younger one is tried until the server says that it is gone."""
    peer = await cometd_peer(**SERVER)
    proxy = await tcp_proxy(peer)
    url = f"http://{HOST}:{proxy.port}{peer.path}"
    for age_s, begins_anew in ((60.0, False), (3600.0, True)):
        await peer.reset()
        first = Remembering(journal)
        async with subscribed(url, first, goodbye=False):
            pass
        left = await first.left()
        left = msgspec.structs.replace(left, saved_at=left.saved_at - timedelta(seconds=age_s))
        second = Remembering(journal)
        await proxy.refuse()
        async with listening(url, second, saved=left):
            await second.until_told(Gap)
            await proxy.resume()
            await second.until_told(Subscribed if begins_anew else Unbroken)
        # More than one, should a connection of before the proxy's return break after the first.
        assert (second.kinds()[Handshaken] > 0) is begins_anew


async def test_without_acknowledgements_a_session_is_resumed_with_a_gap(
    cometd_peer: CometdFactory, journal: Journal, sql: asyncpg.Connection
) -> None:
    """Positions go on; what was in flight at the end is not known."""
    peer = await cometd_peer(**SERVER, ack=False)
    first = Remembering(journal)
    async with subscribed(peer.url, first, goodbye=False):
        said = [await says(peer, 5)]
        await first.until_heard(5)
    second = Remembering(journal)
    async with listening(peer.url, second, saved=await first.left()):
        await second.until_told(Resumed)
        said.append(await says(peer, 5))
        await second.until_heard(5)
    assert (second.heard[0].position, second.heard[0].stream) == (6, first.heard[0].stream)
    assert await stored(sql) == [seq for each in said for seq in each.seqs]


async def test_what_is_kept_is_told_when_it_changes_and_not_with_each_message(kind: Kind, peer: Peer) -> None:
    """Once the session hears everything; when it is lost; and when it is ended."""
    told: list[Saved | None] = []

    class Noting(Store):
        def keep(self, saved: Saved | None) -> None:
            told.append(saved)
            super().keep(saved)

    store = Noting()
    async with subscribed(peer.url, store, **kind.endpoint):
        await says(peer, 50)
        await store.until_heard(50)
        assert [saved is not None for saved in told[-1:]] == [True]
        assert len(told) <= 2  # the first answers may set a cookie more
        before = len(told)
        await peer.forget(how="wake")
        await store.until_told(Subscribed, 2)
        assert [saved is None for saved in told[before:]] == [True, False]
    assert told[-1] is None


async def test_cookies_are_kept_as_long_as_they_last() -> None:
    """A cookie that was to last for a minute does so, however often the listener starts."""
    login = GenesysClient("http://127.0.0.1:1", {})
    login.jar.update_cookies_from_headers(
        ["A=1; Path=/; HttpOnly", 'B="x y"; Path=/api; Max-Age=60', "C=3; Max-Age=5; Path=/"],
        URL("http://127.0.0.1:1/api/v2/me"),
    )
    login.token = {"X-CSRF-TOKEN": "t"}
    line = Line(1, Endpoint("http://127.0.0.1:1/"), login, Store())
    line.session.client_id = "c1"
    for channel in line.endpoint.channels:
        line.session.want(channel)
    line.session._subscribed.update(line.endpoint.channels)
    kept = line._to_keep()
    assert kept is not None
    later = Saved(kept, SAVED_AT)

    again = GenesysClient("http://127.0.0.1:1", {})
    line = Line(1, line.endpoint, again, Store(), saved=later, wall=lambda: SAVED_AT + timedelta(seconds=30))
    sent = again.jar.filter_cookies(URL("http://127.0.0.1:1/api/v2/notifications"))
    assert {name: morsel.coded_value for name, morsel in sent.items()} == {"A": "1", "B": '"x y"'}
    assert again.token == {"X-CSRF-TOKEN": "t"}
    kept = line._to_keep()
    assert kept is not None
    assert [(each.name, each.max_age) for each in kept.cookies] == [("A", ""), ("B", "30")]


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"owner": "somebody else"}, False),
        ({"channels": (CALLS, "/v2/me/other")}, False),
        ({"connection_types": WEBSOCKET}, True),
    ],
)
def test_whose_session_may_be_resumed(change: dict[str, Any], *, fits: bool) -> None:
    """The same owner's, which hears all that is wanted."""
    kept = Kept("s", "c", True, "long-polling", None, (CALLS,), "ada", (), ())
    endpoint = Endpoint(**{"url": "http://gws", "channels": (CALLS,), "owner": "ada", **change})
    assert resumable(Saved(kept, SAVED_AT), endpoint) is fits
    assert not resumable(Saved(kept, SAVED_AT, position=5), endpoint)


async def test_a_websocket_is_acknowledged_after_the_commit_and_resumed(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """While nothing is committed the server keeps everything, however often it is asked; then the line is
    dropped, and the next one goes on over a websocket again."""
    first, second = Remembering(journal), Remembering(journal)
    async with by_websocket(rate=2_000, timeout_ms=400, max_interval_ms=3_000) as centre:
        async with centre.line(first, goodbye=False):
            await first.until_told(Subscribed)
            session = centre.session
            first.commits = False
            await centre.simulator.play(notifications=50)
            await first.until(lambda: first.heard)
            batch = session.batch
            await until(lambda: session.batch >= batch + 3)
            said = centre.truth.accepted
            assert session.waiting == said
            first.commit()
            first.commits = True
            await first.until_heard(said)
            await centre.simulator.drained()
            assert first.saved is not None
            first.commits = False
            await centre.simulator.play(notifications=20)
            await first.until(lambda: len(first.heard) > said)
        await centre.simulator.play(notifications=20)
        async with centre.line(second, saved=await first.left()):
            await second.until_told(Unbroken)
            await centre.simulator.drained()
    assert centre.simulator.gws.broker.handshakes == 1
    assert second.gaps == []
    assert await raws(sql) == [each.raw for each in centre.accepted]


async def test_no_farewell_is_said_before_everything_is_durable(cometd_peer: CometdFactory) -> None:
    """What is heard and not committed would be lost with the session: it stays, and may be resumed."""
    peer = await cometd_peer(**SERVER)
    store = Store(commits=False)
    limits = Limits(**{**_fields(LIMITS), "request_s": 0.3})
    async with subscribed(peer.url, store, limits=limits):
        await says(peer, 5, whole=True)
        await store.until(lambda: store.heard)
    assert (await peer.stats())["disconnects"] == 0
    assert store.saved is not None


async def test_goodbye_to_a_server_that_is_gone_is_bounded(
    cometd_peer: CometdFactory, tcp_proxy: ProxyFactory
) -> None:
    """Stopping does not depend on the network."""
    peer = await cometd_peer(**SERVER)
    proxy = await tcp_proxy(peer)
    limits = Limits(**{**_fields(LIMITS), "request_s": 0.3})
    async with subscribed(f"http://{HOST}:{proxy.port}{peer.path}", Store(), limits=limits):
        proxy.stall(new=True)
        began = time.monotonic()
    assert time.monotonic() - began < 1.0


async def test_what_waits_for_room_is_handed_over_before_the_goodbye(cometd_peer: CometdFactory) -> None:
    """After a farewell the server gives nothing again: what was heard by then must reach the store."""
    peer = await cometd_peer(**SERVER)
    store = Store()
    loop = asyncio.get_running_loop()
    async with subscribed(peer.url, store):
        store.room.clear()
        said = await says(peer, 10, whole=True)
        await peer.until("sessions", lambda answer: answer["sessions"][0]["held"] is False)
        loop.call_later(0.1, store.room.set)
    assert store.seqs == list(said.seqs)


@pytest.mark.parametrize("how", ["silent", "wake", "disconnect"])
async def test_a_session_that_the_server_lost_is_followed_by_another(
    kind: Kind, peer: Peer, how: Literal["silent", "wake", "disconnect"]
) -> None:
    """However it was lost: a gap since before it was, a new session, and all that follows."""
    store = Store()
    async with subscribed(peer.url, store, **kind.endpoint):
        before = await says(peer, 10)
        await store.until_heard(10)
        await peer.forget(how=how)
        lost = await says(peer, 5)
        await store.until_told(Subscribed, 2)
        after = await says(peer, 10)
        await store.until(lambda: store.seqs[-1] == after.seqs[-1])
    assert_complete(store, before, lost, after)
    assert store.kinds()[Handshaken] == 2


async def test_advice_none_is_obeyed_with_a_pause(cometd_peer: CometdFactory) -> None:
    """A server that wants no more of us is left alone for a while, then asked anew with a fresh login."""
    peer = await cometd_peer(**SERVER)
    store = Store()
    login = Login()
    reply = {"successful": False, "error": "500::full", "advice": {"reconnect": "none"}}
    async with subscribed(peer.url, store, login):
        await peer.rule("reply", channel=CONNECT, set=reply)
        await store.until_told(Refused)
        refused_at = time.monotonic()
        await store.until_told(Subscribed, 2)
        assert time.monotonic() - refused_at >= LIMITS.refused_s
    assert login.logins == 1
    assert [gap.cause for gap in store.gaps] == ["session lost"]


async def test_two_lines_of_one_account_do_not_disturb_each_other(cometd_peer: CometdFactory) -> None:
    """Each has a jar of its own, so that the server sees two browsers and holds both their connects."""
    peer = await cometd_peer(**SERVER)
    first, second = Store(), Store()
    async with subscribed(peer.url, first), subscribed(peer.url, second):
        said = await says(peer, 200, rate_per_s=1_000)
        await first.until_heard(200)
        await second.until_heard(200)
    assert first.seqs == second.seqs == list(said.seqs)


async def test_login_comes_first_where_the_server_wants_it(cometd_peer: CometdFactory) -> None:
    """GWS wants the cookies of a REST login with CometD's first request."""
    peer = await cometd_peer(**SERVER)
    await peer.policy(headers={"authorization": "Basic x"})
    login = Login({"authorization": "Basic x"})
    async with subscribed(peer.url, Store(), login, login_first=True):
        pass
    assert login.logins == 1
    assert (await peer.stats())["handshakes"] == 1


async def test_lines_that_share_a_turn_log_in_one_after_the_other(cometd_peer: CometdFactory) -> None:
    """A login that takes long, or is refused, holds up the next one until it has ended, and no longer."""
    peer = await cometd_peer(**SERVER)
    turn = asyncio.Semaphore(1)
    first, second = Login(refuses=1), Login()
    first.slow = asyncio.Event()
    how: dict[str, Any] = {"login_first": True, "turn": turn}
    one, two = Store(), Store()
    async with listening(peer.url, one, first, **how):
        await until(lambda: first.logins == 1)
        async with listening(peer.url, two, second, **how):
            await until(lambda: bool(turn._waiters))
            assert second.logins == 0
            first.slow.set()
            await two.until_told(Subscribed)
            await one.until_told(Subscribed)
    assert (first.logins, second.logins) == (2, 1)


async def test_a_login_that_is_refused_is_tried_ever_more_slowly(cometd_peer: CometdFactory) -> None:
    """It is a gap with that cause and the reason, and ends when a person has mended it."""
    peer = await cometd_peer(**SERVER)
    login = Login(refuses=3)
    store = Store()
    began = time.monotonic()
    async with subscribed(peer.url, store, login, login_first=True):
        took = time.monotonic() - began
    assert login.logins == 4
    assert took >= 0.1 + 0.2 + 0.4
    assert next(fact for fact in store.facts if isinstance(fact, Gap)).detail.startswith("wrong password")


async def test_a_login_server_that_is_away_is_waited_for(cometd_peer: CometdFactory) -> None:
    """REST that does not answer is a disconnection like any other."""
    peer = await cometd_peer(**SERVER)
    login = Login()
    login.away = 4
    store = Store()
    async with subscribed(peer.url, store, login, login_first=True):
        pass
    assert login.logins == 5
    assert [fact.cause for fact in store.facts if isinstance(fact, Gap)] == ["disconnected"]


async def test_a_line_that_broke_may_run_again(kind: Kind, peer: Peer) -> None:
    """A bug behind the line ends `run` loudly and as a gap; run again, it hears again."""
    store = Store()
    endpoint = Endpoint(peer.url, channels=(CALLS,), **kind.endpoint)
    line = Line(7, endpoint, Login(), store, limits=LIMITS)
    store.breaks = ZeroDivisionError("a bug")
    loop = asyncio.get_running_loop()
    first = loop.create_task(line.run())
    await store.until_told(Subscribed)
    await says(peer, 5)
    with pytest.raises(ZeroDivisionError):
        async with asyncio.timeout(BOUND_s):
            await first
    assert store.gaps[-1].end is None, "broken, and said to be observed"
    assert sockets_to(peer) == 0

    again = loop.create_task(line.run())
    await store.until_told(Subscribed, 2)
    said = await says(peer, 5)
    await store.until(lambda: store.seqs[-5:] == list(said.seqs))
    again.cancel()
    await asyncio.wait({again})


# ── Negotiation ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_server_without_websocket_is_heard_over_long_polling(cometd_peer: CometdFactory) -> None:
    """What the server does not offer is not used, also if nothing else was configured."""
    peer = await cometd_peer(**SERVER)
    store = Store()
    async with subscribed(peer.url, store, connection_types=WEBSOCKET):
        said = await says(peer, 5)
        await store.until_heard(5)
    assert store.seqs == list(said.seqs)


async def test_a_server_that_offers_nothing_known_is_heard_over_long_polling(faye_peer: FayeFactory) -> None:
    """Long-polling is what every server has, whatever it says that it has."""
    peer = await faye_peer(**FAYE)
    await peer.rule("reply", channel=HANDSHAKE, set={"supportedConnectionTypes": ["callback-polling", 7]})
    store = Store()
    async with subscribed(peer.url, store):
        said = await says(peer, 5)
        await store.until_heard(5)
    assert store.seqs == list(said.seqs)


@contextlib.asynccontextmanager
async def without_upgrades(peer: Peer, status: int) -> AsyncIterator[tuple[str, list[str]]]:
    """A proxy that passes POST and answers this status to websockets; gives its URL and who was refused."""
    refused: list[str] = []
    async with aiohttp.ClientSession() as onward:

        async def pass_on(request: web.Request) -> web.Response:
            if request.method == "GET":
                refused.append(request.headers["Upgrade"])
                return web.Response(status=status)
            async with onward.post(
                peer.url, data=await request.read(), headers={"Content-Type": "application/json"}
            ) as response:
                return web.Response(body=await response.read(), status=response.status)

        app = web.Application()
        app.router.add_route("*", "/", pass_on)
        async with serving(app) as url:
            yield url, refused


@pytest.mark.parametrize("status", [400, 403, 404, 501])
async def test_a_websocket_that_is_refused_gives_way_to_long_polling(
    faye_peer: FayeFactory, status: int
) -> None:
    """A proxy that passes POST and refuses the upgrade must not make us deaf for ever."""
    peer = await faye_peer(**FAYE)
    store = Store()
    async with (
        without_upgrades(peer, status) as (url, refused),
        subscribed(url, store, connection_types=WEBSOCKET) as line,
    ):
        said = await says(peer, 5)
        await store.until_heard(5)
        assert line.session.connection_type == "long-polling"
    assert store.seqs == list(said.seqs)
    assert refused == ["websocket"] * 3
    assert f"HTTP {status}" in next(fact.detail for fact in store.facts if isinstance(fact, Gap))


async def test_a_gateway_that_is_away_is_no_reason_to_leave_the_websocket(faye_peer: FayeFactory) -> None:
    """503 says that the server is away, and nothing about websockets."""
    peer = await faye_peer(**FAYE)
    store = Store()
    async with (
        without_upgrades(peer, 503) as (url, refused),
        listening(url, store, connection_types=WEBSOCKET) as line,
    ):
        await peer.until("stats", lambda stats: stats["uptime_ms"] > 100 and len(refused) >= 6)
        assert line.session.connection_type == "websocket"


async def test_a_server_that_is_away_is_no_reason_to_leave_the_websocket(
    faye_peer: FayeFactory, tcp_proxy: ProxyFactory
) -> None:
    """Refused connections are an outage; the websocket is used again afterwards."""
    peer = await faye_peer(**FAYE)
    proxy = await tcp_proxy(peer)
    store = Store()
    async with subscribed(
        f"http://{HOST}:{proxy.port}{peer.path}", store, connection_types=WEBSOCKET
    ) as line:
        await proxy.refuse()
        await store.until(lambda: bool(store.gaps))
        await proxy.resume()
        await store.until(lambda: store.gaps[-1].end is not None)
        assert line.session.connection_type == "websocket"
        said = await says(peer, 5)
        await store.until(lambda: store.seqs[-5:] == list(said.seqs))


# ── TLS ───────────────────────────────────────────────────────────────────────────────────────────────


class Authority:
    """A throw-away certificate authority, by the openssl program, with a server certificate for 127.0.0.1."""

    def __init__(self, directory: Path) -> None:
        self.certificate = directory / "ca.pem"
        self._directory = directory
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        (directory / "ca.cnf").write_text(
            "[req]\ndistinguished_name=dn\nx509_extensions=ca\nprompt=no\n[dn]\nCN=throw-away\n"
            "[ca]\nbasicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\n"
            "subjectKeyIdentifier=hash\n"
        )
        (directory / "server.ext").write_text(
            f"subjectAltName=IP:{HOST}\nauthorityKeyIdentifier=keyid\nextendedKeyUsage=serverAuth\n"
        )
        self._openssl("req", "-x509", *key, "-config", "ca.cnf", "-keyout", "ca.key", "-out", "ca.pem")
        self._openssl(
            "req", "-new", *key[:5], "-config", "ca.cnf", "-keyout", "server.key", "-out", "server.csr"
        )
        signing = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2"]
        self._openssl(
            "x509", "-req", "-in", "server.csr", *signing, "-extfile", "server.ext", "-out", "server.pem"
        )

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self._directory, check=True, capture_output=True)

    def server(self) -> ssl.SSLContext:
        """What a server needs to show the certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._directory / "server.pem", self._directory / "server.key")
        return context

    def client(self) -> ssl.SSLContext:
        """What a client needs to trust this authority and no other."""
        return ssl.create_default_context(cafile=str(self.certificate))


class TlsProxy(TcpProxy):
    """The breaking proxy with TLS towards its clients."""

    def __init__(self, target_port: int, context: ssl.SSLContext) -> None:
        super().__init__(target_port)
        self._context = context

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, HOST, self.port, ssl=self._context)

    async def _pump(
        self,
        direction: Direction,  # noqa: ARG002 - as in the plain one, here and below
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        link: Any,  # noqa: ARG002
    ) -> None:
        # Without the exact byte counts of the plain proxy: over TLS a buffer limit of zero never drains.
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
        writer.close()


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Authority]:
    """Ours, and another's; without the openssl program, skips by name (a failure where CI=true)."""
    if shutil.which("openssl") is None:
        pytest.skip("TLS not tried: there is no openssl program")
    return Authority(tmp_path_factory.mktemp("ours")), Authority(tmp_path_factory.mktemp("theirs"))


@pytest.mark.parametrize("endpoint", [{}, {"connection_types": WEBSOCKET}])
async def test_tls_with_a_private_authority(
    faye_peer: FayeFactory, authorities: tuple[Authority, Authority], endpoint: dict[str, Any]
) -> None:
    """The given authority is trusted, for long-polling and for websockets, also when connections are cut."""
    ours, _ = authorities
    peer = await faye_peer(**FAYE)
    assert peer.port is not None
    store = Store()
    async with TlsProxy(peer.port, ours.server()) as proxy:
        url = f"https://{HOST}:{proxy.port}{peer.path}"
        async with subscribed(url, store, tls=ours.client(), **endpoint):
            before = await says(peer, 10)
            await store.until_heard(10)
            await proxy.refuse()
            await store.until(lambda: bool(store.gaps))
            await proxy.resume()
            await store.until_told(Resumed)
            after = await says(peer, 10)
            await store.until_heard(20)
    assert_complete(store, before, after)


@pytest.mark.parametrize("endpoint", [{}, {"connection_types": WEBSOCKET}])
async def test_tls_of_another_authority_is_refused(
    faye_peer: FayeFactory, authorities: tuple[Authority, Authority], endpoint: dict[str, Any]
) -> None:
    """Nothing is said to who cannot prove to be the server, and the reason is told."""
    ours, theirs = authorities
    peer = await faye_peer(**FAYE)
    assert peer.port is not None
    store = Store()
    async with TlsProxy(peer.port, ours.server()) as proxy:
        url = f"https://{HOST}:{proxy.port}{peer.path}"
        async with listening(url, store, tls=theirs.client(), **endpoint):
            await store.until(lambda: bool(store.gaps))
            await peer.until("stats", lambda stats: stats["uptime_ms"] > 300)
    assert (await peer.stats())["requests"] == 0
    assert "certificate" in next(fact.detail for fact in store.facts if isinstance(fact, Gap)).lower()


# ── The library ───────────────────────────────────────────────────────────────────────────────────────


def test_the_libraries_are_those_that_were_tried() -> None:
    """Our transports stand on aiocometd 0.4.5 and aiohttp 3; if either moves, this file must be read anew."""
    assert importlib.metadata.version("aiocometd") == "0.4.5"
    major, minor, *_ = importlib.metadata.version("aiohttp").split(".")
    assert (3, 14) <= (int(major), int(minor)) < (4, 0)
    wanted = importlib.metadata.requires("listener") or []
    pins = {re.split(r"[<>=!]", each)[0]: each for each in wanted}
    assert pins["aiocometd"] == "aiocometd==0.4.5"
    assert "<4" in pins["aiohttp"]


def test_our_transports_replace_those_of_the_library() -> None:
    """Whatever asks aiocometd for a transport gets ours."""
    from aiocometd.constants import ConnectionType
    from aiocometd.transports.registry import TRANSPORT_CLASSES

    assert {
        ConnectionType.LONG_POLLING: LongPolling,
        ConnectionType.WEBSOCKET: WebSocket,
    } == TRANSPORT_CLASSES
