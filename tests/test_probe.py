"""Sessions that are connected and deaf: when they are asked about, what counts, and what becomes of them.

Who is asked when, on accounts of the test's own; what an account's watch makes of it, on the real journal;
and all of it as the daemon runs, against the simulated contact centre.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from random import Random
from uuid import uuid4

import asyncpg
import pytest
from structlog.testing import capture_logs

from listener.core.calls import Call, Heard, Snapshot, Source
from listener.core.decode import decode
from listener.core.session import Delivered, Subscribed
from listener.coverage import HEARTBEAT_S, SETTLED_S
from listener.errors import LoginRefused, RemoteUnavailable, StoreUnavailable
from listener.probe import (
    CONFIRM_S,
    LOOKS_MAX,
    PROBES_AT_ONCE_MAX,
    REFUSED_S,
    Probe,
)
from listener.simulator.centre import Simulator
from listener.simulator.gws import Account
from listener.simulator.scripts import ScriptedCall
from listener.simulator.settings import SimulatorSettings
from listener.store.journal import Journal
from tests.core.messages import resource, snapshot
from tests.support.clock import BEGAN_AT, Clock, turns
from tests.support.running import InProcess, settings_for, until
from tests.support.truth import compare
from tests.test_coverage import SHAKEN, Row, Stage, staged

PATH = "/api/v2/me/calls"
EVERY_S = 60.0


def ids(number: int) -> dict[str, str]:
    """The ids of a call: two calls share none."""
    return {"id": f"call-{number}", "callUuid": f"call-{number}", "connId": f"conn-{number}"}


def listed(*numbers: int, status: int = 0) -> bytes:
    """A list of live calls, all in talk."""
    calls = [resource("Established", numbers=["7023"], **ids(number)) for number in numbers]
    return snapshot(*calls, status=status)


class Place:
    """An account of the test: what the next lists say, and what it was told."""

    def __init__(self, account: int, clock: Clock) -> None:
        self.account = account
        self.name = f"account {account}"
        self.stretch: int | None = 1
        self.lists: list[bytes | Exception] = []
        """One for each question to come; then the empty one."""
        self.asked_s: list[float] = []
        """When it was asked about."""
        self.given_up: list[tuple[str, datetime]] = []
        self.open = asyncio.Event()
        """Lists wait while it is not set."""
        self.open.set()
        self.late_s = 0.0
        """How late a list comes."""
        self.meanwhile: Callable[[], None] = lambda: None
        """What happens while it is asked about."""
        self._clock = clock

    async def live(self) -> tuple[Heard, Snapshot]:
        """The next list."""
        asked_at = self._clock.wall()
        self.asked_s.append(self._clock.passed_s)
        await self._clock.pause(self.late_s)
        await self.open.wait()
        self.meanwhile()
        raw = self.lists.pop(0) if self.lists else listed()
        if isinstance(raw, Exception):
            raise raw
        decoded = decode(raw, PATH)
        assert isinstance(decoded, Snapshot)
        return Heard(1, "a list", 1, self._clock.wall(), PATH, raw, Source.SNAPSHOT, asked_at), decoded

    async def give_up(self, detail: str, by: datetime) -> None:
        """It is deaf."""
        self.given_up.append((detail, by))


class Asking:
    """Probes over places of the test, with no call known of any of them; counts their results."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.places: list[Place] = []
        self.results: list[str] = []
        self.away = False

    async def open_calls(self, accounts: Iterable[int]) -> list[Call]:  # noqa: ARG002 - the journal's
        """The store knows none."""
        if self.away:
            raise StoreUnavailable("The test took it away.")
        return []

    def probe(self, result: str) -> None:
        """A probe ended."""
        self.results.append(result)

    def place(self, *lists: bytes | Exception) -> Place:
        """One more account."""
        made = Place(len(self.places) + 1, self.clock)
        made.lists = list(lists)
        self.places.append(made)
        return made

    @asynccontextmanager
    async def running(self, *, jitter: Callable[[], float] = lambda: 0.5) -> AsyncIterator[None]:
        """Probes during the block."""
        probe = Probe(
            self,
            self,
            lambda: self.places,
            every_s=EVERY_S,
            clock=self.clock.steady,
            pause=self.clock.pause,
            jitter=jitter,
        )
        async with asyncio.TaskGroup() as tasks:
            work = tasks.create_task(probe.run())
            await turns()
            try:
                yield
            finally:
                work.cancel()


@pytest.fixture
def asking() -> Asking:
    """Nobody to ask about yet."""
    return Asking()


# ── Who is asked when ─────────────────────────────────────────────────────────────────────────────────


async def test_accounts_are_asked_in_turns_spread_over_the_time(asking: Asking) -> None:
    """Four accounts, one every quarter of the time; who comes later is asked in a later turn, and who is
    gone no more."""
    places = [asking.place() for _ in range(4)]
    async with asking.running():
        await asking.clock.advance(2 * EVERY_S)
        assert [place.asked_s for place in places] == [[15, 75], [30, 90], [45, 105], [60, 120]]
        asking.places.remove(places[0])
        late = asking.place()
        await asking.clock.advance(2 * EVERY_S)
        assert len(late.asked_s) >= 1
        assert len(places[0].asked_s) <= 3
    assert set(asking.results) == {"agreed"}


async def test_the_spread_is_jittered(asking: Asking) -> None:
    """No two listeners keep step; on average it is the time that was set."""
    place = asking.place()
    async with asking.running(jitter=Random(1).random):
        await asking.clock.advance(100 * EVERY_S)
    between = [after - before for before, after in zip(place.asked_s, place.asked_s[1:], strict=False)]
    assert min(between) >= EVERY_S / 2
    assert max(between) <= EVERY_S * 1.5
    assert len(set(between)) > 50
    assert sum(between) / len(between) == pytest.approx(EVERY_S, rel=0.1)


async def test_nobody_is_asked_about_without_a_session_and_nobody_twice_at_a_time(asking: Asking) -> None:
    """What is a gap already needs no probe; and one that takes long is not overtaken by the next."""
    down, slow = asking.place(), asking.place()
    down.stretch = None
    slow.open.clear()
    async with asking.running():
        await asking.clock.advance(5 * EVERY_S)
        assert (down.asked_s, len(slow.asked_s)) == ([], 1)
        down.stretch = 7
        slow.open.set()
        await asking.clock.advance(EVERY_S)
        assert (len(down.asked_s), len(slow.asked_s)) == (1, 2)


async def test_only_so_many_probes_are_under_way(asking: Asking) -> None:
    """The next one waits: each account is asked about less often, and nothing piles up."""
    places = [asking.place() for _ in range(PROBES_AT_ONCE_MAX + 20)]
    for place in places:
        place.open.clear()
    async with asking.running():
        await asking.clock.advance(3 * EVERY_S)
        assert sum(len(place.asked_s) for place in places) == PROBES_AT_ONCE_MAX
        for place in places:
            place.open.set()
        await turns()
        await asking.clock.advance(3 * EVERY_S)
        assert all(place.asked_s for place in places)


# ── What counts ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_list_that_agrees_is_told_with_the_time_when_it_was_asked_for(asking: Asking) -> None:
    """That is until when everything that lasts was heard."""
    place = asking.place()
    place.late_s = 0.5
    async with asking.running():
        await asking.clock.advance(EVERY_S + 1)
    assert (asking.results, place.given_up) == (["agreed"], [])


async def test_a_difference_gives_up_the_session_when_it_is_there_again(asking: Asking) -> None:
    """Not at once: the second list, a little later, decides. What is missing was said before the first came,
    and maybe after it was asked for."""
    place = asking.place(listed(1), listed(1, 2))
    place.late_s = 0.5
    async with asking.running():
        await asking.clock.advance(EVERY_S + CONFIRM_S)
        assert (place.asked_s, place.given_up, asking.results) == ([60], [], [])
        await asking.clock.advance(1)
    ((detail, by),) = place.given_up
    assert "call-1" in detail
    assert "call-2" not in detail
    assert by == BEGAN_AT + timedelta(seconds=60.5)
    assert asking.results == ["disagreed"]


async def test_a_difference_that_is_gone_was_a_race(asking: Asking) -> None:
    """The second list agrees: nothing was missed."""
    place = asking.place(listed(1))
    async with asking.running():
        await asking.clock.advance(EVERY_S + CONFIRM_S)
    assert (asking.results, place.given_up) == (["agreed"], [])


async def test_lists_that_differ_each_time_in_something_else_prove_nothing(asking: Asking) -> None:
    """After so many of them the probe ends, and has failed."""
    place = asking.place(*(listed(number) for number in range(LOOKS_MAX + 1)))
    async with asking.running():
        await asking.clock.advance(EVERY_S + LOOKS_MAX * CONFIRM_S)
    assert len(place.asked_s) == LOOKS_MAX
    assert (asking.results, place.given_up) == (["failed"], [])


async def test_what_was_compared_across_a_gap_proves_nothing(asking: Asking) -> None:
    """A session that was lost meanwhile, or is another one, has its own snapshot."""
    place = asking.place(listed(1), listed(1))

    def lost() -> None:
        place.stretch = 2

    async with asking.running():
        await asking.clock.advance(EVERY_S)
        place.meanwhile = lost
        await asking.clock.advance(CONFIRM_S)
    assert (asking.results, place.given_up) == (["failed"], [])


@pytest.mark.parametrize(
    "trouble", [RemoteUnavailable("no answer"), StoreUnavailable("away"), ZeroDivisionError("a defect")]
)
async def test_a_probe_that_breaks_is_counted_and_comes_again(asking: Asking, trouble: Exception) -> None:
    """Whatever breaks it proves nothing, and is nobody else's trouble."""
    asking.place(trouble)
    asking.place()
    async with asking.running():
        await asking.clock.advance(2 * EVERY_S)
    assert sorted(asking.results) == ["agreed", "agreed", "agreed", "failed"]


async def test_a_probe_that_fails_is_said_once(asking: Asking) -> None:
    """Each account once, until it has succeeded: a contact centre without REST has thousands of them. What a
    gap has said is not said again."""
    away = RemoteUnavailable("no answer")
    failing, ending = asking.place(away, away, listed(), away), asking.place()

    def ends() -> None:
        ending.stretch = None

    ending.meanwhile = ends
    with capture_logs() as logs:
        async with asking.running():
            await asking.clock.advance(4 * EVERY_S)
    said = [(line["event"], line["account"], line["error"]) for line in logs]
    assert said == [("probe failed", failing.name, "no answer")] * 2
    assert sorted(asking.results) == ["agreed"] + ["failed"] * 4


async def test_a_store_that_does_not_answer_fails_the_probe(asking: Asking) -> None:
    """There is nothing to compare with."""
    place = asking.place(listed(1))
    asking.away = True
    async with asking.running():
        await asking.clock.advance(EVERY_S)
    assert (asking.results, place.given_up) == (["failed"], [])


async def test_a_refused_login_is_not_insisted_upon(asking: Asking) -> None:
    """Each probe would be another wrong password: it rests for an hour, unless the account begins anew."""
    place = asking.place(LoginRefused("HTTP 403"))
    async with asking.running():
        await asking.clock.advance(REFUSED_S)
        assert len(place.asked_s) == 1
        await asking.clock.advance(2 * EVERY_S)
        assert len(place.asked_s) >= 2
    again = asking.place(LoginRefused("HTTP 403"))
    asking.places = [again]
    async with asking.running():
        await asking.clock.advance(EVERY_S)
        asking.places = [mended := Place(again.account, asking.clock)]
        await asking.clock.advance(2 * EVERY_S)
        assert mended.asked_s


# ── What a watch makes of it ──────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def stage(journal: Journal, sql: asyncpg.Connection) -> AsyncIterator[Stage]:
    """The daemon's parts round a journal with two accounts that were never listened to before."""
    async with staged(journal, sql, Clock()) as made:
        yield made


@pytest.mark.parametrize(
    ("message_s", "channel", "since_s"),
    [
        (None, "", 0),
        (20, "/v2/me/calls", 20),
        (20, "/workspace/v3/voice", 20),
        (20, "/v2/me/devices", 0),
        (58, "/v2/me/calls", 55),
    ],
)
async def test_the_gap_begins_with_the_last_that_can_be_vouched_for(
    stage: Stage, message_s: float | None, channel: str, since_s: float
) -> None:
    """The subscription, or the last message about a call; not the answers since,
    for which heartbeats have vouched; and not later than the list that showed what was missing (at 55)."""
    one = stage.watch()

    async def told(cause: str, detail: str) -> None:
        one.gap(cause, 59, detail)

    one.watch.carried_by(told)

    await one.up()
    stretches = [one.watch.stretch]
    for second in range(1, 61):
        await stage.clock.advance(1)
        if second == message_s:
            one.tell(Delivered(1, [(channel, b"{}")]))
            await one.watch.hear(
                [Heard(1, str(uuid4()), 1, stage.clock.wall(), channel, b"{}")], lambda: None
            )
            await stage.settled()
        one.answered()
    async with asyncio.timeout(10):
        while (await stage.seen_s() or 0) < 55:
            await asyncio.sleep(0.001)
            await stage.clock.advance(HEARTBEAT_S / 10)
    again_s = stage.clock.passed_s
    await one.watch.give_up("because", stage.at(55))
    assert (await stage.rows())[-1] == Row(since_s, None, "stalled")
    stretches.append(one.watch.stretch)
    closed = await stage._sql.fetch("SELECT until, seen_at FROM coverage WHERE cause = '' AND until > since")
    assert all(row["seen_at"] <= row["until"] for row in closed), "it was not seen after its end"
    one.tell(SHAKEN, Subscribed())
    await until(lambda: one.watch.state == "up")
    assert (await stage.rows())[-2:] == [Row(since_s, again_s, "stalled"), Row(again_s, None, "")]
    assert ("stalled", again_s - since_s) in stage.counts.gaps
    assert [*stretches, one.watch.stretch] == [1, None, 2]


async def test_a_list_of_live_calls_is_had_and_not_stored(stage: Stage) -> None:
    """It waits for what was said before it came, and leaves nothing in the journal; one that does not claim
    to be complete, or does not come, is none."""
    one = stage.watch(settled_s=SETTLED_S)
    one.tell(SHAKEN, Subscribed())
    await turns()
    await stage.clock.advance(SETTLED_S)
    await until(lambda: one.watch.state == "up")
    before = await stage._sql.fetchval("SELECT count(*) FROM notification")
    stage.rest.answers = [listed(1), listed(status=4), RemoteUnavailable("no answer")]

    async with asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(one.watch.live())
        await turns()
        heard = one.said(1)  # said before, told by the session, and not stored yet
        await stage.clock.advance(SETTLED_S * 3)
        assert not asking.done()
        await one.watch.hear(heard, lambda: None)
        await stage.settled()
        await stage.clock.advance(SETTLED_S * 3)
        await until(asking.done)
        reply, calls = await asking
    assert reply.asked_at == stage.at(SETTLED_S)
    assert [call.call_id for call in calls.calls] == ["call-1"]
    for complaint in ("does not list all calls", "no answer"):
        with pytest.raises(RemoteUnavailable, match=complaint):
            await one.watch.live()
    assert await stage._sql.fetchval("SELECT count(*) FROM notification") == before + 1
    with pytest.raises(RemoteUnavailable, match="no REST"):
        await stage.watch(2, rest=False).watch.live()


async def test_an_account_that_has_ended_is_not_given_up(stage: Stage) -> None:
    """A probe may still be under way when it is told to stop."""
    one = stage.watch()
    abandoned = []

    async def abandon(cause: str, detail: str) -> None:
        abandoned.append(cause)

    one.watch.carried_by(abandon)
    await one.up()
    one.watch.end(stage.clock.wall())
    await one.watch.give_up("because", stage.clock.wall())
    assert abandoned == []


# ── As the daemon runs ────────────────────────────────────────────────────────────────────────────────


class Talk:
    """A call of the simulated contact centre that goes on when the test says so."""

    def __init__(self, simulator: Simulator, login: str, seed: str) -> None:
        self.simulator = simulator
        self.account: Account = simulator.accounts[login]
        self.call: ScriptedCall = simulator.gws.begin(self.account, "inbound_answered", Random(seed))
        self.over = False

    def step(self, count: int = 1) -> "Talk":
        """Its next acts that say something."""
        for _ in range(count):
            said = 0
            while not said and not self.over:
                said, delay_s = self.simulator.gws.step(self.account, self.call, self.simulator.gws.now())
                self.over = delay_s is None
        return self

    def finish(self) -> None:
        """All the rest."""
        while not self.over:
            self.step()


async def covered(sql: asyncpg.Connection, name: str) -> list[asyncpg.Record]:
    """An account's coverage that lasted any time, in order."""
    return await sql.fetch(
        "SELECT since, until, cause, seen_at FROM coverage c JOIN account a ON a.id = c.account_id"
        " WHERE a.name = $1 AND until IS DISTINCT FROM since ORDER BY since, c.id",
        name,
    )


@pytest.mark.parametrize("websocket", [False, True])
async def test_one_deaf_account_among_three_is_found_and_hears_again(
    database: str, sql: asyncpg.Connection, websocket: bool
) -> None:
    """Its connects are answered, and it is told nothing more: a call begins and another one ends unheard. It
    becomes a gap "stalled" that begins after the last that was heard; then it is observed, and its calls are
    right. The other two are as they were, and keep their sessions."""
    async with Simulator(SimulatorSettings(accounts=3, rate=400.0, dialect="v2")) as simulator:
        deaf, *others = simulator.accounts
        settings = settings_for(
            simulator, database, environment={"websocket": websocket}, limits={"probe_s": 0.4}
        )
        async with InProcess(settings).running() as listener:
            await simulator.play(notifications=60)
            await simulator.finish()
            talks = [Talk(simulator, login, login).step(2) for login in simulator.accounts]
            await simulator.drained()
            heard_at = await sql.fetchval("SELECT heard_at FROM account WHERE name = $1", deaf)
            before = {login: simulator.gws.broker.sessions_of(login) for login in others}

            simulator.gws.deafen(deaf)
            deaf_at = datetime.now(UTC)  # noqa: TID251 - the time of the test, beside the daemon's
            talks[0].finish()
            unheard = Talk(simulator, deaf, "unheard").step(2)
            for talk in talks[1:]:
                talk.step()
            await until(lambda: simulator.listening() == 3)
            await until(lambda: not listener.daemon.not_ready())
            await until(lambda: is_observed(sql, deaf))
            assert await listener.metric("listener_probes_total", result="disagreed") == 1
            assert await listener.metric("listener_gap_seconds_total", cause="stalled") > 0

            *_, observed, gap, now = await covered(sql, deaf)
            assert [row["cause"] for row in (observed, gap, now)] == ["", "stalled", ""]
            # To the moment it is known above; here what the store was slow to take may be doubted as well.
            assert heard_at - timedelta(seconds=1) <= gap["since"] <= deaf_at
            assert observed["seen_at"] <= observed["until"]
            states = (
                "SELECT state, settled FROM call c JOIN account a ON a.id = c.account_id WHERE a.name = $1"
            )
            ended = await sql.fetchrow(
                f"{states} AND c.aliases @> $2", deaf, [talks[0].call.legs[0].truth.call_id]
            )
            assert ended is not None
            assert ended["settled"].startswith("inferred")
            begun = await sql.fetchrow(
                f"{states} AND c.aliases @> $2", deaf, [unheard.call.legs[0].truth.call_id]
            )
            assert begun is not None
            assert tuple(begun) == ("Established", None)

            for talk in (unheard, *talks[1:]):
                talk.finish()
            await simulator.drained()
            assert {login: simulator.gws.broker.sessions_of(login) for login in others} == before
        (await compare(database, simulator.truth())).check()
    for login in others:
        assert [row["cause"] for row in await covered(sql, login)] == ["not started", "", "stopped"]


async def is_observed(sql: asyncpg.Connection, name: str) -> bool:
    """Whether an account is observed again after it was not."""
    causes = [row["cause"] for row in await covered(sql, name)]
    return causes[-2:] == ["stalled", ""]


async def test_traffic_is_never_taken_for_deafness(database: str, sql: asyncpg.Connection) -> None:
    """Lists that come late, all the time, while calls begin, change and end: whatever they show is older
    than what was heard, and no session is given up for it."""
    async with Simulator(SimulatorSettings(accounts=4, rate=400.0)) as simulator:
        simulator.gws.snapshot_s = 0.02
        settings = settings_for(simulator, database, limits={"probe_s": 0.1})
        async with InProcess(settings).running() as listener:
            await simulator.play(notifications=1200)
            await simulator.finish()
            await simulator.drained()
            agreed = await listener.metric("listener_probes_total", result="agreed")
            await until(lambda: more_agreed(listener, agreed))
            assert await listener.metric("listener_probes_total", result="disagreed") == 0
            assert await listener.metric("listener_handshakes_total") == 4
        assert (await compare(database, simulator.truth())).check().missing == 0
    assert await sql.fetchval("SELECT count(*) FROM coverage WHERE cause = 'stalled'") == 0
    assert await sql.fetchval("SELECT count(*) FROM notification WHERE source = 'snapshot'") == 4


async def more_agreed(listener: InProcess, before: float) -> bool:
    """Whether some more probes have agreed."""
    return await listener.metric("listener_probes_total", result="agreed") >= before + 4


async def test_without_probes_nobody_is_asked(database: str) -> None:
    """`probe_s = 0`: the live calls are asked for at the handshake, and never again."""
    async with Simulator(SimulatorSettings(accounts=2, rate=400.0)) as simulator:
        settings = settings_for(simulator, database, limits={"probe_s": 0})
        async with InProcess(settings).running() as listener:
            await simulator.play(notifications=100)
            assert await listener.metric("listener_probes_total") == 0
