"""The centre as a whole: what is played, what is heard, and what the truth says of it."""

import asyncio
import hashlib
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import ClientSession

from listener.simulator.centre import Simulator, Truth, run_simulator
from listener.simulator.scripts import SCRIPTS, Dialect, Quirks
from listener.simulator.settings import SimulatorSettings
from tests.simulator.client import BayeuxClient
from tests.simulator.conftest import LOGIN, Start, until

Clients = Callable[..., BayeuxClient]
FAST = 5000.0


@asynccontextmanager
async def listening(*clients: BayeuxClient, ack: bool = True) -> AsyncIterator[None]:
    """Let clients listen to all there is, while inside."""
    for client in clients:
        await client.open("/v2/me/*", ack=ack)

    async def listen(client: BayeuxClient) -> None:
        while True:
            await client.connect()

    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(listen(client)) for client in clients]
        yield
        for task in running:
            task.cancel()


async def play(settings: SimulatorSettings, notifications: int) -> Truth:
    """Play so many notifications to nobody, and let the calls end."""
    async with Simulator(settings) as simulator:
        await simulator.play(notifications=notifications)
        await simulator.finish()
        return simulator.truth()


async def test_what_is_played_is_heard(start: Start, clients: Clients) -> None:
    """Every client hears exactly what the truth says its account was sent, in order, to the byte."""
    for ack in (True, False):
        async with start(accounts=8, dialect="mixed", rate=2000, quirks=Quirks()) as simulator:
            hearing = [clients(simulator, login) for login in simulator.accounts]
            async with listening(*hearing, ack=ack):
                await simulator.subscribed()
                await simulator.play(notifications=800)
                await simulator.finish()
                await simulator.drained()
                await until(lambda: sum(len(c.data) for c in hearing) == simulator.truth().sent)  # noqa: B023 - awaited in its turn
            truth = simulator.truth()
            assert truth.sent >= 800
            assert (truth.accepted, truth.unsubscribed, truth.undelivered) == (truth.sent, 0, 0)
            for client, account in zip(hearing, truth.accounts.values(), strict=True):
                assert account.messages is not None
                assert client.data == [json.loads(message.raw) for message in account.messages]
                text = b"".join(message.raw + b"\n" for message in account.messages)
                assert account.digest == hashlib.sha256(text).hexdigest()
                said_at_s = [message.said_at_s for message in account.messages]
                assert said_at_s == sorted(said_at_s)
                assert 0 < said_at_s[0] < said_at_s[-1]
            assert all(call.finished and call.accepted == call.notifications for call in truth.calls)


async def test_every_script_and_dialect_is_played() -> None:
    """A mixed centre plays all there is, sooner or later."""
    truth = await play(SimulatorSettings(accounts=8, rate=1e6, seed=5), 12_000)
    assert {call.dialect for call in truth.calls} == set(Dialect)
    assert {call.script for call in truth.calls} == set(SCRIPTS)
    outcomes = Counter(call.outcome for call in truth.calls)
    assert set(outcomes) == {"answered", "unanswered"}
    assert len({call.call_id for call in truth.calls}) == len(truth.calls)


async def test_the_same_seed_gives_the_same_centre() -> None:
    """Same seed: same bytes in the same order per account, whatever the rate does to the clock of the
    machine; another seed gives other ones. Without a fixed epoch only the server's clock differs."""

    async def sent(seed: int, epoch_s: float | None = 1_700_000_000.0) -> dict[str, list[bytes]]:
        settings = SimulatorSettings(accounts=4, rate=FAST, seed=seed, epoch_s=epoch_s)
        truth = await play(settings, 500)
        return {login: [m.raw for m in a.messages or ()] for login, a in truth.accounts.items()}

    first = await sent(1)
    assert await sent(1) == first
    assert await sent(2) != first
    now = await sent(1, None)
    assert now != first

    def without_clock(raws: list[bytes]) -> list[str]:
        parsed = [json.loads(raw) for raw in raws]
        for message in parsed:
            message["data"].get("metrics", {}).get("eventProcessing", {}).pop("serverGenerationTimestamp", 0)
        return [json.dumps(message) for message in parsed]

    assert {k: without_clock(v) for k, v in now.items()} == {k: without_clock(v) for k, v in first.items()}


async def test_unheard_messages_are_marked(start: Start, clients: Clients) -> None:
    """What was said before anybody was subscribed is in the truth, and marked; the calls say so too."""
    async with start(rate=FAST, quirks=Quirks(0, 0, 0)) as simulator:
        await simulator.play(notifications=40)
        client = clients(simulator)
        async with listening(client):
            await simulator.play(notifications=40)
            await simulator.finish()
            await simulator.drained()
        truth = simulator.truth()
        account = truth.accounts[LOGIN]
        assert account.unsubscribed == 40
        assert account.messages is not None
        assert [m.accepted for m in account.messages] == [False] * 40 + [True] * (account.sent - 40)
        assert len(client.data) == account.accepted == account.sent - 40
        partly = [call for call in truth.calls if 0 < call.accepted < call.notifications]
        assert len(partly) <= 1
        assert any(call.accepted == 0 for call in truth.calls)


async def test_the_rate_is_kept(start: Start) -> None:
    """Messages go out at the rate, and carry the time at which they went."""
    async with start(rate=200, epoch_s=1_700_000_000.0) as simulator:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        count = await simulator.play(seconds=1.0)
        took_s = loop.time() - begun
        assert count == 200
        assert 0.9 < took_s < 4
        last = simulator.truth().accounts[LOGIN].messages or ()
        stamps = [json.loads(m.raw)["data"].get("metrics", {}).get("eventProcessing", {}) for m in last]
        times = [s["serverGenerationTimestamp"] for s in stamps if s]
        assert times == sorted(times)
        assert 1_700_000_000_800 < times[-1] < 1_700_000_001_000


async def test_finish_ends_every_call_and_begins_none(start: Start) -> None:
    """After finish nothing is live, and playing can go on."""
    async with start(accounts=5, rate=FAST) as simulator:
        await simulator.play(notifications=50)
        begun = len(simulator.truth().calls)
        assert simulator.stats()["live_calls"] > 0
        await simulator.finish()
        assert simulator.stats()["live_calls"] == 0
        assert all(call.finished for call in simulator.truth().calls)
        # Only consult legs of calls that were under way are new.
        assert all(call.parent_call_id for call in simulator.truth().calls[begun:])
        assert await simulator.finish() == 0
        assert await simulator.play(notifications=50) >= 50


async def test_play_stops_when_told(start: Start) -> None:
    """A set event ends an endless play."""
    async with start(rate=1) as simulator, asyncio.TaskGroup() as tasks:
        stop = asyncio.Event()
        playing = tasks.create_task(simulator.play(stop=stop))
        await until(lambda: simulator.truth().sent > 0)
        stop.set()
        async with asyncio.timeout(1):
            assert await playing >= 1


async def test_burst(start: Start, clients: Clients) -> None:
    """A burst arrives complete and in order, in replies that are bounded, and is waited for."""
    async with start(accounts=3, reply_messages_max=100) as simulator:
        hearing = [clients(simulator, login) for login in simulator.accounts]
        burst = simulator.prepare_burst(3000)
        assert 3000 <= burst.size < 3200
        assert simulator.truth().sent == 0
        async with listening(*hearing):
            assert await simulator.burst(burst) > 0
        truth = simulator.truth()
        assert truth.sent == truth.accepted == burst.size
        for client, messages in zip(hearing, burst.messages.values(), strict=True):
            assert client.data == [json.loads(m.raw) for m in messages]
        assert all(call.finished and call.accepted == call.notifications for call in truth.calls)


async def test_a_light_memory_keeps_counts_and_digests() -> None:
    """Without remembering, the truth has the same counts and digests and no messages."""
    settings = {"accounts": 2, "rate": FAST, "epoch_s": 1_700_000_000.0}
    full = await play(SimulatorSettings(**settings), 200)  # type: ignore[arg-type]
    light = await play(SimulatorSettings(**settings, remember=False), 200)  # type: ignore[arg-type]
    for login, account in full.accounts.items():
        other = light.accounts[login]
        assert (other.sent, other.digest, other.messages) == (account.sent, account.digest, None)


async def test_the_centre_by_http(start: Start, clients: Clients) -> None:
    """Another process can let it play, burst and finish, and read truth and counters."""
    async with start(rate=FAST) as simulator:
        client = clients(simulator)
        async with listening(client):

            async def post(path: str, **body: float) -> dict[str, float]:
                async with client.http.post(client.url + path, json=body) as response:
                    answer: dict[str, float] = await response.json()
                    return answer

            assert (await post("/simulator/play", notifications=30))["notifications"] == 30
            assert (await post("/simulator/play", seconds=0.002))["notifications"] == 10
            burst = await post("/simulator/burst", notifications=100)
            assert burst["notifications"] >= 100
            await post("/simulator/finish")
            async with client.http.get(client.url + "/simulator/stats") as response:
                stats = await response.json()
            async with client.http.get(client.url + "/simulator/truth?messages=1") as response:
                truth = await response.json()
        assert stats["sent"] == truth["sent"] == len(client.data)
        assert stats["listening"] == 1
        raws = [message["raw"] for message in truth["accounts"][LOGIN]["messages"]]
        assert [json.loads(raw) for raw in raws] == client.data
        assert sum(truth["outcomes"].values()) == len(truth["calls"])
        assert all(call["finished"] for call in truth["calls"])


async def test_run_simulator_plays_and_tells() -> None:
    """The command's own function: ready, plays, finishes, gives the truth; or serves until stopped."""
    urls = []
    settings = SimulatorSettings(accounts=3, rate=200)
    truth = await run_simulator(
        settings, stop=asyncio.Event(), seconds=0.2, on_ready=lambda simulator: urls.append(simulator.url)
    )
    assert urls[0].startswith("http://127.0.0.1:")
    assert truth.sent == truth.unsubscribed >= 40
    assert all(call.finished for call in truth.calls)
    stop = asyncio.Event()
    stop.set()
    assert (await run_simulator(settings, stop=stop, playing=False)).sent == 0


async def test_the_pbxs_beside_it(start: Start) -> None:
    """They run where the settings ask for them, do what they are told over HTTP, and are in the truth."""
    async with (
        start(noojee=True, click2dial=True, dial_time_scale=0.001) as simulator,
        ClientSession() as http,
    ):

        async def tell(path: str, body: dict[str, Any]) -> int:
            async with http.post(f"{simulator.url}/simulator/{path}", json=body) as response:
                return response.status

        noojee, click2dial = simulator.noojee, simulator.click2dial
        assert noojee is not None
        assert click2dial is not None
        assert await tell("noojee", {"monitor": "204"}) == 200
        assert await tell("noojee", {"call": "inbound_busy", "extension": "204"}) == 200
        assert await tell("noojee", {"fault": "refuse", "on": "dial"}) == 200
        assert await tell("click2dial", {"record": "lost"}) == 200
        assert await tell("click2dial", {"call": "busy", "agent": "204", "callee": "0820004417"}) == 200
        assert await tell("click2dial", {"call": "melted", "agent": "204", "callee": "0820004417"}) == 400
        assert await tell("noojee", {"melt": True}) == 400
        await noojee.idle()
        await click2dial.idle()
        async with http.get(f"{simulator.url}/simulator/truth") as response:
            truth = await response.json()
        assert [call["statuses"] for call in truth["noojee"]["calls"]] == [["Busy"]]
        assert [(call["script"], call["sent"]) for call in truth["click2dial"]["calls"]] == [("busy", 0)]
        async with http.get(f"{simulator.url}/simulator/stats") as response:
            stats = await response.json()
        assert (stats["noojee"], stats["click2dial"]) == (noojee.url, click2dial.url)
        for url in (
            noojee.url + "/servicemanager/rest/CallManagementAPI/dial",
            click2dial.url + "/click2dial/calls",
        ):
            async with http.post(url) as response:
                assert response.status in (200, 400)
    async with start() as simulator, ClientSession() as http:
        async with http.post(f"{simulator.url}/simulator/noojee", json={"clear": True}) as response:
            assert response.status == 400
        assert "noojee" not in (await (await http.get(f"{simulator.url}/simulator/truth")).json())


async def test_it_runs_as_a_process_of_its_own() -> None:
    """Nothing in it depends on the process it is made in: a child says where it listens and serves."""
    code = (
        "import asyncio\n"
        "from listener.simulator.centre import run_simulator\n"
        "from listener.simulator.settings import SimulatorSettings\n"
        "asyncio.run(run_simulator(SimulatorSettings(accounts=1), stop=asyncio.Event(), playing=False,\n"
        "    on_ready=lambda simulator: print(simulator.url, flush=True)))\n"
    )
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    try:
        assert child.stdout is not None
        url = (await child.stdout.readline()).decode().strip()
        async with BayeuxClient(url, LOGIN) as client:
            assert (await client.open())["successful"]
    finally:
        child.kill()
        await child.wait()
