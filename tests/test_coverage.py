"""Coverage: what an account's watch reads in the facts of its session, and what the ledger writes of it.

On the real journal and the real pipeline; the session's facts, the clock and the REST server's answers are
the test's.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime, timedelta
from itertools import pairwise
from random import Random
from typing import Any, NamedTuple

import asyncpg
import pytest

from listener.core.calls import Cover, Heard, Missing, Recorded
from listener.core.session import (
    Delivered,
    Fact,
    Gap,
    Handshaken,
    Kept,
    Refused,
    Resumed,
    Saved,
    Subscribed,
    SubscriptionRefused,
    Unbroken,
)
from listener.coverage import (
    COVERS_MAX,
    COVERS_WAITING_MAX,
    HEARTBEAT_S,
    HELD_S,
    LEDGER_RETRY_S,
    LEDGER_RETRY_S_MAX,
    SETTLED_LISTED_TIMES,
    SETTLED_S,
    SETTLED_TRIPS,
    SNAPSHOT_RETRY_S,
    SNAPSHOT_RETRY_S_MAX,
    SNAPSHOTS_AT_ONCE_MAX,
    Ledger,
    Watch,
)
from listener.errors import LoginRefused, RemoteUnavailable, StoreUnavailable
from listener.pipeline import Pipeline
from listener.store.claim import Claim
from listener.store.history import SILENT_S_MAX, History
from listener.store.journal import Journal
from tests.support.clock import BEGAN_AT, Clock, turns
from tests.support.memory import MemoryJournal, Said, until
from tests.support.outage import uncommitted

EMPTY = b'{"statusCode":0,"calls":[]}'
KEPT = Kept("s", "c", True, "long-polling", None, (), "", (), ())
SHAKEN = Handshaken("client-id-of-a-session", True, ("long-polling",))
UNACKNOWLEDGED = Handshaken("client-id-of-a-session", False, ("long-polling",))


class Row(NamedTuple):
    """A row of coverage, in seconds since the clock began; `until` is None while it is true."""

    since_s: float
    until_s: float | None
    cause: str


class Answer(NamedTuple):
    """A snapshot as it came."""

    asked_at: datetime
    received_at: datetime
    raw: bytes


class Rest:
    """The REST server of a test: what the next requests for live calls are answered with."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.answers: list[bytes | Exception] = []
        """One for each request to come; then the empty list of calls."""
        self.asked = 0
        self.open = asyncio.Event()
        """Requests wait while it is not set."""
        self.open.set()
        self.at_once = 0
        self.at_once_max = 0

    async def snapshot(self) -> Answer:
        """Answers one request."""
        asked_at = self._clock.wall()
        self.asked += 1
        self.at_once += 1
        self.at_once_max = max(self.at_once_max, self.at_once)
        try:
            await self.open.wait()
        finally:
            self.at_once -= 1
        answer = self.answers.pop(0) if self.answers else EMPTY
        if isinstance(answer, Exception):
            raise answer
        return Answer(asked_at, self._clock.wall(), answer)


class Counts:
    """What the metrics would count."""

    def __init__(self) -> None:
        self.handshakes = 0
        self.reconnects = 0
        self.repeated = 0
        self.gaps: list[tuple[str, float]] = []
        self.states: dict[str, int] = {}

    def handshake(self) -> None:
        """A handshake."""
        self.handshakes += 1

    def reconnect(self) -> None:
        """Up again."""
        self.reconnects += 1

    def gap(self, cause: str, seconds: float) -> None:
        """Not observed for so long."""
        self.gaps.append((cause, round(seconds, 6)))

    def duplicates(self, count: int) -> None:
        """Repeated by the server."""
        self.repeated += count

    def session_state(self, before: str | None, after: str | None) -> None:
        """From a state to another."""
        for state, step in ((before, -1), (after, 1)):
            if state is not None:
                self.states[state] = self.states.get(state, 0) + step

    def recorded(self, recorded: Recorded, seconds: float) -> None:
        """The pipeline's, not looked at here."""

    def store_failed(self, error: StoreUnavailable) -> None:
        """The pipeline's, not looked at here."""

    def backlog(self, notifications: int, size_bytes: int) -> None:
        """The pipeline's, not looked at here."""


class Stage:
    """Everything that stands between the facts of two sessions and the tables."""

    def __init__(self, journal: Journal, sql: asyncpg.Connection, clock: Clock) -> None:
        self.journal = journal
        self.clock = clock
        self.rest = Rest(clock)
        self.counts = Counts()
        self.ledger = Ledger(journal, pause=clock.pause)
        self.pipeline = Pipeline(journal, self.counts, pause=clock.pause)
        self.turn = asyncio.Semaphore(SNAPSHOTS_AT_ONCE_MAX)
        self.tasks = asyncio.TaskGroup()
        self.work: list[asyncio.Task[None]] = []
        self.watches: list[Watch] = []
        self._sql = sql

    def watch(
        self, account: int = 1, *, rest: bool = True, settled_s: float = 0.0, **resumed: Any
    ) -> "Driven":
        """A watch over an account, whose facts the test tells."""
        watch = Watch(
            account,
            f"account {account}",
            pipeline=self.pipeline,
            ledger=self.ledger,
            observer=self.counts,
            tasks=self.tasks,
            snapshot=self.rest.snapshot if rest else None,
            turn=self.turn,
            since=self.clock.wall(),
            settled_s=settled_s,
            clock=self.clock.steady,
            pause=self.clock.pause,
            **resumed,
        )
        self.watches.append(watch)
        return Driven(self, watch)

    def at(self, passed_s: float) -> datetime:
        """The time of day so long after the clock began."""
        return self.clock.began_at + timedelta(seconds=passed_s)

    async def seen_s(self, account: int = 1) -> float | None:
        """Until when the open row of an account is known to be true."""
        return self._seconds(
            await self._sql.fetchval(
                "SELECT seen_at FROM coverage WHERE account_id = $1 AND until IS NULL", account
            )
        )

    async def rows(self, account: int = 1) -> list[Row]:
        """The coverage of an account; what lasted no time at all is left out."""
        async with asyncio.timeout(10):
            await self.ledger.drain()
        found = [
            Row(self._seconds(row[0]) or 0.0, self._seconds(row[1]), row[2])
            for row in await self._sql.fetch(
                "SELECT since, until, cause FROM coverage WHERE account_id = $1 ORDER BY since, id", account
            )
        ]
        for before, after in pairwise(found):
            assert before.until_s == after.since_s, f"a moment without a row: {found}"
        assert [row.until_s for row in found].count(None) <= 1
        return [row for row in found if row.until_s != row.since_s]

    def _seconds(self, at: datetime | None) -> float | None:
        return None if at is None else (at - self.clock.began_at).total_seconds()

    async def settled(self) -> None:
        """Waits until everything that was heard and told is stored."""
        async with asyncio.timeout(10):
            await turns()
            await self.pipeline.drain()
            await turns()
            await self.ledger.drain()


class Driven:
    """A watch, and the test's way to tell it facts."""

    def __init__(self, stage: Stage, watch: Watch) -> None:
        self.stage = stage
        self.watch = watch
        self._said = Said(watch.account, str(uuid.uuid4()))

    async def hear(self, count: int) -> None:
        """The session takes so many messages now."""
        await self.watch.hear(self.said(count), lambda: None)

    def said(self, count: int) -> list[Heard]:
        """As `hear`, but for the handing on."""
        self._said.at = self.stage.clock.wall()
        heard = self._said.next(count)
        self.tell(Delivered(heard[0].position, [(one.channel, one.raw) for one in heard]))
        return heard

    def answered(self, *, took: bool = False) -> None:
        """The server has answered now."""
        self.watch.answered(self.stage.clock.wall(), took=took)

    def tell(self, *facts: Fact) -> None:
        """The session says this now."""
        for fact in facts:
            self.watch.told(fact, self.stage.clock.wall())

    def gap(self, cause: str, since_s: float | None = None, detail: str = "because") -> None:
        """The session says that since that second (now, if not given) it may have missed something."""
        since_s = self.stage.clock.passed_s if since_s is None else since_s
        self.tell(Gap(1000.0 + since_s, cause, detail))

    async def up(self, shaken: Handshaken = SHAKEN) -> None:
        """A handshake, a subscription and a snapshot."""
        for fact in (shaken, Subscribed()):
            self.tell(fact)
            self.answered()
        await until(lambda: self.watch.state == "up")
        await self.stage.settled()


@pytest.fixture
async def stage(journal: Journal, sql: asyncpg.Connection) -> AsyncIterator[Stage]:
    """The daemon's parts round a journal with two accounts that were never listened to before."""
    async with staged(journal, sql, Clock()) as made:
        yield made


@asynccontextmanager
async def staged(journal: Journal, sql: asyncpg.Connection, clock: Clock) -> AsyncIterator[Stage]:
    """One life of the daemon's parts, from its start to its end."""
    stage = Stage(journal, sql, clock)
    await journal.resume_coverage([1, 2], clock.wall())
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(stage.tasks)
        stage.work += [stage.tasks.create_task(each.run()) for each in (stage.pipeline, stage.ledger)]
        try:
            yield stage
        finally:
            for watch in stage.watches:
                watch.end(clock.wall())  # a snapshot that waits would be waited for
            for task in stage.work:
                task.cancel()


@asynccontextmanager
async def running(ledger: Ledger) -> AsyncIterator[None]:
    """Runs a ledger during the block."""
    async with asyncio.TaskGroup() as tasks:
        work = tasks.create_task(ledger.run())
        try:
            yield
        finally:
            work.cancel()


# ── A session's life ──────────────────────────────────────────────────────────────────────────────────


async def test_it_is_a_gap_until_the_snapshot_is_stored(stage: Stage) -> None:
    """A handshake is a gap until the channels are subscribed and the live calls are stored; then it ended
    when they were subscribed."""
    one = stage.watch()
    stage.rest.open.clear()
    await stage.clock.advance(1)
    one.tell(SHAKEN)
    await stage.clock.advance(1)
    one.tell(Subscribed())
    await stage.clock.advance(5)
    await turns()
    assert await stage.rows() == [Row(0, None, "not started")]
    assert one.watch.state == "starting"
    stage.rest.open.set()
    await until(lambda: one.watch.state == "up")
    assert await stage.rows() == [Row(0, 2, "not started"), Row(2, None, "")]
    stored = await stage._sql.fetch("SELECT source, raw FROM notification")
    assert [tuple(row) for row in stored] == [("snapshot", EMPTY)]
    assert one.watch.trouble == ""


async def test_a_snapshot_that_fails_is_asked_for_again_and_the_gap_stays(stage: Stage) -> None:
    """Ever more slowly, up to a cap; the gap ends with the first that is stored."""
    one = stage.watch()
    stage.rest.answers = [RemoteUnavailable("no answer")] * 8
    one.tell(SHAKEN, Subscribed())
    await turns()
    assert "no answer" in one.watch.trouble
    await stage.clock.advance(60)
    assert await stage.rows() == [Row(0, None, "not started")]
    await stage.clock.advance(120)
    await until(lambda: one.watch.state == "up")
    waits = [SNAPSHOT_RETRY_S * 2**n for n in range(5)] + [SNAPSHOT_RETRY_S_MAX] * 3
    assert [s for s in stage.clock.pauses_s if s in waits][: len(waits)] == waits
    assert await stage.rows() == [Row(0, None, "")]


async def test_an_answer_that_does_not_list_all_calls_closes_no_gap(stage: Stage) -> None:
    """A status that says error, a page of a proxy: nothing may be concluded from them, so they are no
    snapshot."""
    one = stage.watch()
    stage.rest.answers = [b'{"statusCode":4,"calls":[]}', b"<html>maintenance</html>", b'{"statusCode":0}']
    one.tell(SHAKEN, Subscribed())
    await turns()
    await stage.pipeline.drain()
    await turns()
    assert one.watch.state == "starting"
    await stage.clock.advance(10)
    await until(lambda: one.watch.state == "up")
    assert stage.rest.asked == 4
    assert await stage._sql.fetchval("SELECT count(*) FROM notification") == 1


async def test_a_snapshot_that_breaks_is_the_trouble_of_its_account_alone(stage: Stage) -> None:
    """Whatever a request raises, also a defect of ours: it is said and tried again, and nobody else ends."""
    one, two = stage.watch(1), stage.watch(2)
    stage.rest.answers = [ZeroDivisionError("a defect")]
    one.tell(SHAKEN, Subscribed())
    await turns()
    assert "a defect" in one.watch.trouble
    await two.up()
    await stage.clock.advance(SNAPSHOT_RETRY_S)
    await until(lambda: one.watch.state == "up")


async def test_a_refused_login_is_not_insisted_upon_by_the_snapshot(stage: Stage) -> None:
    """To try a wrong password every few seconds locks the account: the waits are those of a refused login."""
    one = stage.watch()
    stage.rest.answers = [LoginRefused("HTTP 403")] * 4
    one.tell(SHAKEN, Subscribed())
    await turns()
    assert one.watch.state == "refused"
    await stage.clock.advance(300)
    assert stage.rest.asked <= 4
    await stage.clock.advance(4000)
    await until(lambda: one.watch.state == "up")


async def test_an_unbroken_session_leaves_no_gap(stage: Stage) -> None:
    """The connection was lost and the server kept everything: not a second of gap, in the rows and in the
    metric, but while nobody could know it was one."""
    one = stage.watch()
    await one.up()
    await stage.clock.advance(10)
    one.gap("disconnected", 8)
    assert await stage.rows() == [Row(0, 8, ""), Row(8, None, "disconnected")]
    assert one.watch.state == "waiting"
    await stage.clock.advance(5)
    one.tell(Unbroken())
    assert await stage.rows() == [Row(0, 8, ""), Row(8, None, "")]
    assert sum(seconds for _, seconds in stage.counts.gaps) == 0
    assert stage.counts.reconnects == 1
    assert one.watch.state == "up"


@asynccontextmanager
async def restarted(
    journal: Journal, sql: asyncpg.Connection, *, up: bool = True
) -> AsyncIterator[tuple[Stage, datetime | None]]:
    """The second life of the daemon's parts, from second 20 on: the account was up (or not) in the first one,
    which was stopped at second 10, when an answer came that was asked for at second 9. With it, since when a
    resumed session would have observed."""
    clock = Clock()
    async with staged(journal, sql, clock) as first:
        one = first.watch()
        if up:
            await one.up()
        await clock.advance(9)
        one.answered()
        await clock.advance(1)
        one.answered()
        one.watch.end(clock.wall())
        await first.settled()
        first.watches.clear()
    await clock.advance(10)
    async with staged(journal, sql, clock) as second:
        yield second, (await journal.resume_coverage([1], clock.wall())).get(1)


def merged(rows: list[Row]) -> list[Row]:
    """Rows that say the same, one after the other, as one."""
    found: list[Row] = []
    for row in rows:
        if found and found[-1].cause == row.cause:
            row = found.pop()._replace(until_s=row.until_s)
        found.append(row)
    return found


@pytest.mark.parametrize("reached", [True, False], ids=["at once", "at the second attempt"])
async def test_a_session_that_goes_on_after_a_restart_was_observed_all_the_time(
    journal: Journal, sql: asyncpg.Connection, *, reached: bool
) -> None:
    """The gap of the restart is withdrawn, without a snapshot; before that it is what it was, also while the
    server is not reached."""
    async with restarted(journal, sql) as (stage, since):
        one = stage.watch(acknowledges=True, observed_until=since)
        if not reached:
            one.gap("disconnected")
            assert one.watch.state == "waiting"
            assert one.watch.trouble == "disconnected: because"
        await stage.clock.advance(2)
        assert await stage.rows() == [Row(0, 9, ""), Row(9, None, "stopped")]
        one.tell(Unbroken())
        assert merged(await stage.rows()) == [Row(0, None, "")]
        assert (one.watch.state, one.watch.trouble, stage.rest.asked) == ("up", "", 0)
        assert stage.counts.gaps == []
        await stage.clock.advance(3)
        one.gap("disconnected")
        assert merged(await stage.rows()) == [Row(0, 25, ""), Row(25, None, "disconnected")]


async def test_a_session_that_goes_on_after_something_was_lost_stores_a_snapshot_first(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """What a damaged spool had of it is a gap that stays; the rest of the restart's is withdrawn once the
    live calls are stored, so that a start after one that was killed before asks for them, too."""
    async with restarted(journal, sql) as (stage, since):
        one = stage.watch(acknowledges=True, observed_until=since, mistrusted=True)
        await stage.ledger.lose([Missing(1, stage.at(15), stage.at(12))], stage.at(20))
        stage.rest.open.clear()
        one.tell(Unbroken())
        await stage.clock.advance(2)
        left = [Row(0, 9, ""), Row(9, 12, "stopped"), Row(12, 15.000001, "spool damaged")]
        assert await stage.rows() == [*left, Row(15.000001, None, "stopped")]
        assert (one.watch.state, stage.rest.asked) == ("starting", 1)
        assert await journal.damaged_since([1, 2]) == {1}
        stage.rest.open.set()
        await until(lambda: one.watch.state == "up")
        observed = [Row(0, 12, ""), Row(12, 15.000001, "spool damaged"), Row(15.000001, None, "")]
        assert merged(await stage.rows()) == observed
        assert await journal.damaged_since([1]) == set()
        await stage.clock.advance(1)
        one.tell(Gap(1000.0 + stage.clock.passed_s, "disconnected", "because"), Unbroken())
        assert (one.watch.state, stage.rest.asked) == ("up", 1)


async def test_when_something_is_lost_while_it_is_observed_a_snapshot_is_stored(stage: Stage) -> None:
    """Without a gap; also where a gap begins before the snapshot has come, and was none."""
    one = stage.watch()
    await one.up()
    await stage.clock.advance(5)
    one.watch.mistrust(stage.clock.wall())
    await until(lambda: stage.rest.asked == 2)
    await stage.settled()
    stage.rest.open.clear()
    one.watch.mistrust(stage.clock.wall())
    await until(lambda: stage.rest.asked == 3)
    await stage.clock.advance(1)
    one.gap("disconnected")
    await stage.clock.advance(1)
    stage.rest.open.set()
    one.tell(Unbroken())
    await until(lambda: one.watch.state == "up")
    await stage.settled()
    assert stage.rest.asked == 4
    assert merged(await stage.rows()) == [Row(0, None, "")]
    stored = await stage._sql.fetchval("SELECT count(*) FROM notification WHERE source = 'snapshot'")
    assert stored == 3
    one.watch.end(stage.clock.wall())
    one.watch.mistrust(stage.clock.wall())
    await turns()
    assert stage.rest.asked == 4


async def test_a_session_that_is_gone_after_a_restart_leaves_the_gap(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """From the stop to the snapshot, with the cause that each part had; nothing later withdraws it."""
    async with restarted(journal, sql) as (stage, since):
        one = stage.watch(acknowledges=True, observed_until=since)
        one.gap("session lost", 20)
        await stage.clock.advance(2)
        await one.up()
        await stage.clock.advance(3)
        one.gap("disconnected")
        one.tell(Unbroken())
        assert merged(await stage.rows()) == [
            Row(0, 9, ""),
            Row(9, 20, "stopped"),
            Row(20, 22, "session lost"),
            Row(22, None, ""),
        ]


async def test_a_session_that_broke_after_a_restart_is_resumed_no_more(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """The line that begins again begins from nothing, and so does the coverage."""
    async with restarted(journal, sql) as (stage, since):
        one = stage.watch(acknowledges=True, observed_until=since)
        one.watch.broke(stage.clock.wall(), "a defect")
        one.gap("disconnected", 20)
        await stage.clock.advance(1)
        await one.up()
        assert [row.cause for row in merged(await stage.rows())][:2] == ["", "stopped"]
        assert (await stage.rows())[-1] == Row(21, None, "")


async def test_without_acknowledgements_the_gap_of_a_restart_stays(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """What was in flight is not known: a snapshot closes it."""
    async with restarted(journal, sql) as (stage, since):
        one = stage.watch(acknowledges=False, observed_until=since)
        one.tell(Resumed())
        await until(lambda: one.watch.state == "up")
        assert await stage.rows() == [Row(0, 9, ""), Row(9, 20, "stopped"), Row(20, None, "")]
        assert stage.rest.asked == 1


async def test_a_session_that_was_not_observed_before_a_restart_owes_its_snapshot(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """It was stopped before the first one was stored: that it goes on proves nothing of before."""
    async with restarted(journal, sql, up=False) as (stage, since):
        assert since is None
        one = stage.watch(acknowledges=True, observed_until=since)
        one.tell(Unbroken())
        await until(lambda: one.watch.state == "up")
        rows = await stage.rows()
        assert [row.cause for row in rows] == ["not started", "stopped", ""]
        assert rows[-1] == Row(20, None, "")
        assert stage.rest.asked == 1


async def test_what_a_session_is_resumed_with_is_written_with_the_coverage_or_later() -> None:
    """Never before the turns that were told first, however many they are and however long the store is away;
    the last word counts."""
    clock = Clock()
    one, two = (Saved(KEPT, clock.wall() + timedelta(seconds=n)) for n in range(2))
    seen: list[tuple[int, dict[int, Saved]]] = []

    class Watched(MemoryJournal):
        async def cover(self, covers: Sequence[Cover], sessions: Mapping[int, Saved | None]) -> None:
            await super().cover(covers, sessions)
            seen.append((len(self.covers), dict(self.sessions)))

    memory = Watched()
    memory.available = False
    ledger = Ledger(memory, pause=clock.pause)
    async with running(ledger):
        for number in range(COVERS_MAX + 1):
            ledger.cover(Cover(1, clock.wall(), "stalled" if number % 2 else ""))
        ledger.keep(1, one)
        ledger.keep(2, one)
        await turns()
        ledger.keep(1, two)
        ledger.keep(2, None)
        memory.available = True
        await clock.advance(LEDGER_RETRY_S)
        await ledger.drain()
        ledger.keep(1, None)
        await ledger.drain()
    assert seen == [(COVERS_MAX, {}), (COVERS_MAX + 1, {1: two}), (COVERS_MAX + 1, {})]


async def test_a_session_lost_while_the_store_took_nothing_is_the_stores_fault(stage: Stage) -> None:
    """Without acknowledgements it does not ask while it is held up; the gap is since it was last answered. A
    short wait is nobody's fault, nor is an old one that was followed by an answer."""

    class HoldsUp:
        """A store that takes messages late."""

        async def hear(self, heard: Sequence[Heard], committed: Callable[[], None]) -> None:
            """Takes them, in a while."""
            await stage.clock.advance(held_s)
            await stage.pipeline.hear(heard, committed)

    one = stage.watch()
    one.watch._pipeline = HoldsUp()
    held_s = 0.0
    await one.up(UNACKNOWLEDGED)
    held_s = 2 * HELD_S
    await stage.clock.advance(3)
    one.answered(took=True)
    await one.hear(1)
    one.gap("session lost", 10)
    await stage.settled()
    assert (await stage.rows())[-1] == Row(3, None, "storage down")
    one.tell(UNACKNOWLEDGED, Subscribed())
    await until(lambda: one.watch.state == "up")
    one.answered(took=True)
    since_s = stage.clock.passed_s
    one.gap("session lost", since_s)
    await stage.settled()
    assert (await stage.rows())[-1] == Row(since_s, None, "session lost")


async def test_a_resumed_session_leaves_a_gap(stage: Stage) -> None:
    """Without acknowledgements, what was in flight is lost: a gap from the last answer to the next. A call
    may have ended meanwhile, so a snapshot closes it."""
    one = stage.watch()
    await one.up(UNACKNOWLEDGED)
    await stage.clock.advance(10)
    one.gap("disconnected", 8)
    await stage.clock.advance(5)
    asked = stage.rest.asked
    one.tell(Resumed())
    await until(lambda: one.watch.state == "up")
    assert stage.rest.asked == asked + 1
    assert await stage.rows() == [Row(0, 8, ""), Row(8, 15, "disconnected"), Row(15, None, "")]
    assert stage.counts.gaps[-1] == ("disconnected", 7.0)
    assert stage.counts.reconnects == 1


async def test_a_stop_begins_where_nothing_is_vouched_for_any_more(stage: Stage) -> None:
    """What the server said since its last answer was asked for may not have come with it: it is not observed,
    though that answer and the stop came later."""
    one = stage.watch()
    await one.up()
    for passed_s in (6, 4):
        await stage.clock.advance(passed_s)
        one.answered()
    await stage.clock.advance(3)
    one.watch.end(stage.clock.wall())
    assert await stage.rows() == [Row(0, 6, ""), Row(6, None, "stopped")]


@pytest.mark.parametrize("asked_s", [12, 14])
async def test_a_stop_that_asked_once_more_begins_with_the_stop(stage: Stage, asked_s: float) -> None:
    """What the server had said by then is durable: it is observed up to the stop, or to that ask."""
    one = stage.watch()
    await one.up()
    for passed_s in (6, 4, 4):
        await stage.clock.advance(passed_s)
        one.answered()
    await one.hear(2)
    await stage.settled()
    one.watch.end(stage.at(13), stage.at(asked_s))
    one.watch.end(stage.at(14))
    stopped = min(13, asked_s)
    assert await stage.rows() == [Row(0, stopped, ""), Row(stopped, None, "stopped")]


async def test_a_stop_vouches_for_nothing_that_its_last_ask_brought_and_that_is_not_durable(
    stage: Stage, database: str
) -> None:
    """Up to the answer before it: what came with the last one may never be stored."""
    one = stage.watch()
    await one.up()
    for passed_s in (6, 4):
        await stage.clock.advance(passed_s)
        one.answered()
    async with uncommitted(database):
        await one.hear(1)
        one.watch.end(stage.clock.wall(), stage.clock.wall())
    assert await stage.rows() == [Row(0, 6, ""), Row(6, None, "stopped")]


async def test_a_slow_commit_is_no_doubt_when_nothing_was_asked_meanwhile(
    stage: Stage, database: str
) -> None:
    """After the last ask the session polls no more with an old acknowledgement."""
    one = stage.watch()
    await one.up()
    for passed_s in (6, 4):
        await stage.clock.advance(passed_s)
        one.answered()
    async with uncommitted(database):
        await one.hear(1)
        await stage.clock.advance(1)
    await stage.settled()
    one.watch.end(stage.clock.wall(), stage.at(10))
    assert await stage.rows() == [Row(0, 10, ""), Row(10, None, "stopped")]


async def test_a_stop_in_a_gap_stays_one_whatever_was_asked(stage: Stage) -> None:
    """The last answer closes no gap."""
    one = stage.watch()
    await one.up()
    await stage.clock.advance(5)
    one.gap("disconnected", 3)
    await stage.clock.advance(5)
    one.watch.end(stage.clock.wall(), stage.clock.wall())
    assert await stage.rows() == [Row(0, 3, ""), Row(3, 10, "disconnected"), Row(10, None, "stopped")]


async def test_a_stop_before_what_a_resumed_session_delivered_is_durable_leaves_the_gap_of_the_restart(
    journal: Journal, sql: asyncpg.Connection, database: str
) -> None:
    """The first answer after a restart brings what was said since the life before it: as long as that is not
    stored, no moment of it is observed."""
    async with restarted(journal, sql) as (stage, since):
        one = stage.watch(acknowledges=True, observed_until=since)
        async with uncommitted(database):
            (waiting,) = one.said(1)
            one.tell(Unbroken())
            one.answered()
            await stage.clock.advance(3)
            assert one.watch.vouched() == stage.at(9)
            await one.watch.hear([waiting], lambda: None)
            one.watch.end(stage.clock.wall())
        await stage.settled()
        assert merged(await stage.rows()) == [Row(0, 9, ""), Row(9, None, "stopped")]


async def test_the_cause_of_a_gap_becomes_known(stage: Stage) -> None:
    """A connection lost turns out to be a session lost: the whole gap has the cause that explains it."""
    one = stage.watch()
    await one.up()
    await stage.clock.advance(10)
    one.gap("disconnected", 9)
    await stage.clock.advance(2)
    one.gap("session lost", 9)
    await stage.clock.advance(3)
    one.tell(SHAKEN, Subscribed())
    await until(lambda: one.watch.state == "up")
    assert await stage.rows() == [Row(0, 9, ""), Row(9, 15, "session lost"), Row(15, None, "")]
    assert stage.counts.gaps[-1] == ("session lost", 6.0)


async def test_a_session_lost_during_the_snapshot_closes_nothing(stage: Stage) -> None:
    """The snapshot of a session that is gone is forgotten; that of the next one counts."""
    one = stage.watch()
    stage.rest.open.clear()
    one.tell(SHAKEN, Subscribed())
    await turns()
    await stage.clock.advance(2)
    one.gap("session lost", 1)
    stage.rest.open.set()
    await turns(50)
    assert [row.cause for row in await stage.rows()] == ["not started", "session lost"]
    await stage.clock.advance(2)
    one.tell(SHAKEN, Subscribed())
    await until(lambda: one.watch.state == "up")
    assert await stage.rows() == [Row(0, 1, "not started"), Row(1, 4, "session lost"), Row(4, None, "")]


@pytest.mark.parametrize(("fact", "observed_since_s"), [(Unbroken(), 3.0), (Resumed(), 5.0)])
async def test_a_connection_lost_during_the_snapshot_leaves_the_snapshot_owed(
    stage: Stage, fact: Fact, observed_since_s: float
) -> None:
    """The session goes on, but what happened before it is still unknown: no snapshot, no end of the gap."""
    one = stage.watch()
    stage.rest.open.clear()
    await stage.clock.advance(2)
    one.tell(SHAKEN, Subscribed())
    await turns()
    await stage.clock.advance(2)
    one.gap("disconnected", 3)
    await turns()
    await stage.clock.advance(1)
    one.tell(fact)
    await turns()
    assert [row.cause for row in await stage.rows()][-1] != ""
    stage.rest.open.set()
    await until(lambda: one.watch.state == "up")
    rows = await stage.rows()
    assert rows[-1] == Row(observed_since_s, None, "")
    assert stage.rest.asked == 2
    assert await stage._sql.fetchval("SELECT count(*) FROM notification") == 1


async def test_a_second_confirmation_does_not_stand_for_the_snapshot(stage: Stage) -> None:
    """A server may confirm a subscription twice; only the snapshot closes the gap."""
    one = stage.watch()
    stage.rest.open.clear()
    one.tell(SHAKEN, Subscribed())
    await turns()
    one.tell(Subscribed())
    await turns()
    assert await stage.rows() == [Row(0, None, "not started")]
    stage.rest.open.set()
    await until(lambda: one.watch.state == "up")
    assert stage.rest.asked == 1


async def test_a_refused_subscription_is_a_gap_that_a_person_sees(stage: Stage) -> None:
    """It says which channel and why, and ends with the confirmation and the snapshot."""
    one = stage.watch()
    one.tell(SHAKEN, SubscriptionRefused("/v2/me/calls", "403::denied", 5.0))
    one.gap("subscription refused", 0, "403::denied")
    assert one.watch.state == "refused"
    assert "403::denied" in one.watch.trouble
    await stage.clock.advance(5)
    one.tell(Subscribed())
    await until(lambda: one.watch.state == "up")
    assert await stage.rows() == [Row(0, 5, "subscription refused"), Row(5, None, "")]
    one.gap("session lost")
    one.tell(Refused("none", 60.0))
    assert one.watch.state == "refused"
    assert "none" in one.watch.trouble


async def test_a_watch_without_rest_takes_the_subscription_for_the_end_of_the_gap(
    stage: Stage,
) -> None:
    """Where there is nothing to ask for live calls."""
    one = stage.watch(rest=False)
    await stage.clock.advance(2)
    one.tell(SHAKEN, Subscribed())
    assert await stage.rows() == [Row(0, 2, "not started"), Row(2, None, "")]
    one.gap("session lost", 1)
    one.tell(SHAKEN)
    await stage.clock.advance(2)
    one.tell(Subscribed())
    assert (await stage.rows())[-1] == Row(4, None, "")


async def test_the_end_is_a_row_and_the_last_word(stage: Stage) -> None:
    """From then on it is "stopped", and what may have been under way is not vouched for; a snapshot under way
    is given up, and the farewell changes nothing."""
    one, two = stage.watch(1), stage.watch(2)
    await one.up()
    stage.rest.open.clear()
    two.tell(SHAKEN, Subscribed())
    await turns()
    for passed_s in (9, 1):
        await stage.clock.advance(passed_s)
        one.answered()
    for each in (one, two):
        each.watch.end(stage.clock.wall())
    await stage.clock.advance(3)
    one.gap("session lost")
    one.tell(Unbroken(), Subscribed())
    stage.rest.open.set()
    await turns()
    assert await stage.rows(1) == [Row(0, 9, ""), Row(9, None, "stopped")]
    assert await stage.rows(2) == [Row(0, 10, "not started"), Row(10, None, "stopped")]
    assert {state: count for state, count in stage.counts.states.items() if count} == {}
    assert stage.counts.gaps == [("not started", 10.0)]


async def test_the_server_repeating_messages_is_counted(stage: Stage) -> None:
    """What was recognised as repeated is a number, and changes no coverage."""
    one = stage.watch()
    await one.up()
    one.tell(Delivered(3, [], redelivered=2))
    assert stage.counts.repeated == 2
    assert await stage.rows() == [Row(0, None, "")]


async def stored_in_order(stage: Stage) -> list[str]:
    """Where what is stored came from, in the order of its ids."""
    return [row[0] for row in await stage._sql.fetch("SELECT source FROM notification ORDER BY id")]


async def test_a_snapshot_is_heard_after_what_was_said_before_it(stage: Stage) -> None:
    """Messages that waited in the session's queue while the snapshot was asked for come first, else the calls
    would seem to begin with what the snapshot knows already."""
    one = stage.watch(settled_s=SETTLED_S)
    one.tell(SHAKEN, Subscribed())
    await turns()
    await stage.clock.advance(SETTLED_S / 2)
    await one.hear(2)
    one.answered(took=True)
    await stage.settled()
    assert await stored_in_order(stage) == ["cometd", "cometd"]
    await stage.clock.advance(SETTLED_S)
    assert await stored_in_order(stage) == ["cometd", "cometd"], "the queue may not be empty yet"
    await stage.clock.advance(SETTLED_S)
    await until(lambda: one.watch.state == "up")
    assert await stored_in_order(stage) == ["cometd", "cometd", "snapshot"]
    assert await stage.rows() == [Row(0, None, "")]


async def test_a_snapshot_that_took_long_waits_for_a_longer_silence(stage: Stage) -> None:
    """Where everything is slow, what was said before it is under way for longer, too."""
    one = stage.watch(settled_s=SETTLED_S)
    stage.rest.open.clear()
    one.tell(SHAKEN, Subscribed())
    await turns()
    await stage.clock.advance(1.0)
    stage.rest.open.set()
    await turns()
    for _ in range(4):
        await stage.clock.advance(1.0)
    assert await stored_in_order(stage) == []
    await one.hear(1)
    one.answered(took=True)
    await stage.settled()
    for _ in range(2 * SETTLED_TRIPS):
        await stage.clock.advance(1.0)
    await until(lambda: one.watch.state == "up")
    assert await stored_in_order(stage) == ["cometd", "snapshot"]


async def test_a_snapshot_that_lists_calls_waits_for_a_longer_silence(stage: Stage) -> None:
    """What is under way may be how they began."""
    one = stage.watch(settled_s=SETTLED_S)
    stage.rest.answers = [b'{"statusCode":0,"calls":[{"id":"1","state":"Held"}]}']
    one.tell(SHAKEN, Subscribed())
    await turns()
    for _ in range(SETTLED_LISTED_TIMES - 1):
        await stage.clock.advance(SETTLED_S)
    assert await stored_in_order(stage) == []
    await one.hear(1)
    one.answered(took=True)
    await stage.settled()
    for _ in range(2 * SETTLED_LISTED_TIMES):
        await stage.clock.advance(SETTLED_S)
    await until(lambda: one.watch.state == "up")
    assert await stored_in_order(stage) == ["cometd", "snapshot"]


async def test_a_snapshot_does_not_wait_for_a_silence_that_never_comes(stage: Stage) -> None:
    """Under load the second answer after the snapshot was asked for when it had come already."""
    one = stage.watch(settled_s=SETTLED_S)
    one.tell(SHAKEN, Subscribed())
    await turns()
    for _ in range(2):
        await stage.clock.advance(SETTLED_S / 3)
        await one.hear(1)
        one.answered(took=True)
        await stage.settled()
    await stage.clock.advance(SETTLED_S / 3)
    await until(lambda: one.watch.state == "up")
    assert await stored_in_order(stage) == ["cometd", "cometd", "snapshot"]


async def test_a_snapshot_waits_for_what_the_store_has_not_taken_yet(stage: Stage, database: str) -> None:
    """While a delivery is not durable, its session leaves what is newer with the server: silence says
    nothing then."""
    one = stage.watch(settled_s=SETTLED_S)
    async with uncommitted(database):
        one.tell(SHAKEN, Subscribed())
        await turns()
        await one.hear(1)
        one.answered(took=True)
        for _ in range(8):
            await stage.clock.advance(SETTLED_S)
            one.answered()
        assert stage.pipeline.backlog_notifications == 1
    await stage.settled()
    await one.hear(1)
    one.answered(took=True)
    await stage.settled()
    for _ in range(3):
        await stage.clock.advance(SETTLED_S)
    await until(lambda: one.watch.state == "up")
    assert await stored_in_order(stage) == ["cometd", "cometd", "snapshot"]


async def test_snapshots_take_turns(stage: Stage) -> None:
    """After a server's restart every account wants one: only so many are asked for at a time."""
    many = [stage.watch(1 + number % 2) for number in range(3 * SNAPSHOTS_AT_ONCE_MAX)]
    stage.rest.open.clear()
    for each in many:
        each.tell(SHAKEN, Subscribed())
    await turns()
    assert stage.rest.at_once == SNAPSHOTS_AT_ONCE_MAX
    stage.rest.open.set()
    await until(lambda: all(each.watch.state == "up" for each in many))
    assert stage.rest.at_once_max == SNAPSHOTS_AT_ONCE_MAX
    assert stage.rest.asked == len(many)


# ── What a crash leaves ───────────────────────────────────────────────────────────────────────────────


async def seen(stage: Stage, until_s: float) -> None:
    """Lets time pass until a heartbeat vouches until then, and several more: it stays so."""
    async with asyncio.timeout(10):
        while await stage.seen_s() != until_s:
            await stage.clock.advance(1)
    for _ in range(3):
        await stage.clock.advance(HEARTBEAT_S)
        assert await stage.seen_s() == until_s


async def crash(stage: Stage) -> None:
    """Everything that is not in the database is gone from here on."""
    for task in stage.work:
        task.cancel()
    await asyncio.gather(*stage.work, return_exceptions=True)


async def test_the_heartbeat_says_when_the_last_answer_was_asked_for(
    stage: Stage, journal: Journal, sql: asyncpg.Connection
) -> None:
    """After a crash the gap begins before the last answer was asked for, not where it came, nor where the
    process was last alive: a connection that was dead by then would not have been noticed yet."""
    one = stage.watch()
    await one.up()
    for _ in range(2):
        one.answered()
        await stage.clock.advance(12)
    one.answered()
    await stage.clock.advance(40)
    await seen(stage, 10)
    await crash(stage)
    later = Clock(stage.clock.began_at)
    later.passed_s = 100
    async with staged(journal, sql, later) as restarted:
        assert await restarted.rows() == [Row(0, 10, ""), Row(10, None, "not started")]


async def test_the_heartbeat_never_vouches_for_what_is_not_committed(
    stage: Stage, journal: Journal, sql: asyncpg.Connection, database: str
) -> None:
    """A message that was heard and not stored when the process died lies inside the gap, also one that was
    said while the answer before it was under way."""
    one = stage.watch()
    await one.up()
    for passed_s in (11, 10):
        await stage.clock.advance(passed_s)
        one.answered()
    await stage.clock.advance(5)
    async with uncommitted(database):
        await one.hear(1)
        one.answered(took=True)
        for _ in range(10):
            await stage.clock.advance(4)
            one.answered()
            await turns(50)
        await seen(stage, 10)
        await crash(stage)
    later = Clock(stage.clock.began_at)
    later.passed_s = 100
    async with staged(journal, sql, later) as restarted:
        assert await restarted.rows() == [Row(0, 10, ""), Row(10, None, "not started")]


async def test_what_was_stored_after_the_last_heartbeat_vouches_for_nothing(
    stage: Stage, journal: Journal, sql: asyncpg.Connection
) -> None:
    """A gap before the last message may have been told and not written when the crash came."""
    one = stage.watch()
    await one.up()
    await stage.clock.advance(7)
    await one.hear(3)
    await stage.settled()
    await crash(stage)
    later = Clock(stage.clock.began_at)
    later.passed_s = 50
    async with staged(journal, sql, later) as restarted:
        assert await restarted.rows() == [Row(0, None, "not started")]
        again = restarted.watch()
        await again.up()
        assert await restarted.rows() == [Row(0, 50, "not started"), Row(50, None, "")]


async def test_a_planned_stop_is_still_stopped_at_the_next_start(
    stage: Stage, journal: Journal, sql: asyncpg.Connection
) -> None:
    """The time between a stop and the next subscription has the cause "stopped"."""
    one = stage.watch()
    await one.up()
    for passed_s in (4, 1):
        await stage.clock.advance(passed_s)
        one.answered()
    one.watch.end(stage.clock.wall())
    await stage.settled()
    await crash(stage)
    later = Clock(stage.clock.began_at)
    later.passed_s = 60
    async with staged(journal, sql, later) as restarted:
        await restarted.watch().up()
        assert await restarted.rows() == [Row(0, 4, ""), Row(4, 60, "stopped"), Row(60, None, "")]


async def test_what_the_line_still_holds_is_not_vouched_for(stage: Stage) -> None:
    """A message that the session has taken may wait before it is handed on; it is as good as lost in a
    crash."""
    one = stage.watch()
    await one.up()
    for _ in range(3):
        await stage.clock.advance(1)
        one.answered()
    await stage.clock.advance(1)
    (waiting,) = one.said(1)
    one.answered(took=True)
    await stage.clock.advance(1)
    one.answered()
    assert one.watch.vouched() == stage.at(2), "it may have been said while the answer before was under way"
    await one.watch.hear([waiting], lambda: None)
    await stage.settled()
    assert one.watch.vouched() == stage.at(3), "what is newer was left with the server meanwhile"


async def test_what_was_said_during_an_outage_is_vouched_for_when_it_is_durable(stage: Stage) -> None:
    """The server kept it and tells it when the connection is back; attempts in vain meanwhile, of which the
    session has nothing new to say, say nothing of what came."""
    one = stage.watch()
    await one.up()
    for _ in range(3):
        await stage.clock.advance(1)
        one.answered()
    one.gap("disconnected", 2)
    for _ in range(3):
        await stage.clock.advance(1)
        one.answered()
    await stage.clock.advance(1)
    (waiting,) = one.said(1)
    one.tell(Unbroken())
    one.answered(took=True)
    assert one.watch.vouched() == stage.at(2)
    await one.watch.hear([waiting], lambda: None)
    await stage.settled()
    assert one.watch.vouched() == stage.at(6)


async def test_a_session_that_broke_was_deaf_since_its_last_durable_answer(stage: Stage) -> None:
    """What it had in hand is gone with it, and was said after the answer before was asked for, however many
    answers came since; what it had handed on is stored. The next one closes the gap."""
    one = stage.watch()
    await one.up()
    for _ in range(3):
        await stage.clock.advance(1)
        one.answered()
    await one.hear(1)
    await stage.settled()
    one.said(1)
    one.answered(took=True)
    await stage.clock.advance(1)
    one.answered()
    one.watch.broke(stage.clock.wall(), "a defect")
    assert one.watch.state == "waiting"
    assert "a defect" in one.watch.trouble
    await stage.clock.advance(60)
    await one.up()
    assert await stage.rows() == [Row(0, 2, ""), Row(2, 64, "session lost"), Row(64, None, "")]
    for _ in range(2):
        await stage.clock.advance(1)
        one.answered()
    assert one.watch.vouched() == stage.at(65)


# ── A store that is slow or away ──────────────────────────────────────────────────────────────────────


async def test_a_session_lost_while_the_store_is_slow_was_deaf_since_we_stopped_taking(
    stage: Stage, database: str
) -> None:
    """A session that acknowledges leaves what is newer with the server until the commit. When the server
    forgets the session then, that is lost, although it answered a moment ago."""
    one = stage.watch()
    await one.up()
    await stage.clock.advance(9)
    one.answered()
    await stage.clock.advance(1)
    async with uncommitted(database):
        await one.hear(1)
        one.answered(took=True)
        for _ in range(5):
            await stage.clock.advance(4)
            one.answered()
        await stage.clock.advance(1)
        one.gap("session lost", 30)
    await stage.settled()
    assert await stage.rows() == [Row(0, 9, ""), Row(9, None, "session lost")]


async def test_an_answer_that_came_late_left_behind_what_was_said_meanwhile(
    stage: Stage, database: str
) -> None:
    """When an answer was composed is not known, only when it was asked for: what was said while it was under
    way is still with the server. While its messages are not durable the session leaves it there, and when the
    session is lost then, it was said in the gap."""
    one = stage.watch()
    await one.up()
    await stage.clock.advance(5)
    one.answered()
    await stage.clock.advance(7)
    async with uncommitted(database):
        await one.hear(1)
        one.answered(took=True)
        for _ in range(3):
            await stage.clock.advance(2)
            one.answered()
            vouched = one.watch.vouched()
            assert vouched is not None
            assert vouched <= stage.at(5)
        one.gap("session lost", 16)
    await stage.settled()
    assert await stage.rows() == [Row(0, 5, ""), Row(5, None, "session lost")]


async def test_a_session_that_caught_up_is_vouched_for_again(stage: Stage, database: str) -> None:
    """Once an answer that was asked for after the commit has come, nothing is left behind."""
    one = stage.watch()
    await one.up()
    for _ in range(2):
        one.answered()
        await stage.clock.advance(5)
    async with uncommitted(database):
        await one.hear(1)
        one.answered(took=True)
        await stage.clock.advance(4)
        one.answered()
        assert one.watch.vouched() == stage.at(0)
    await stage.settled()
    assert one.watch.vouched() == stage.at(5), "the answer that brought it was asked for then"
    await stage.clock.advance(1)
    one.answered()
    assert one.watch.vouched() == stage.at(5), "this answer may have been asked for before the commit"
    await stage.clock.advance(1)
    one.answered()
    assert one.watch.vouched() == stage.at(15)
    one.gap("session lost", 15)
    assert await stage.rows() == [Row(0, 15, ""), Row(15, None, "session lost")]


async def test_coverage_waits_for_a_store_that_is_away_and_keeps_its_order() -> None:
    """Turns are written in order when it is back; meanwhile the ledger says that it is not available."""
    memory, clock = MemoryJournal(), Clock()
    ledger = Ledger(memory, pause=clock.pause)
    told = [Cover(1, clock.wall()), Cover(2, clock.wall()), Cover(1, clock.wall(), "disconnected")]
    async with running(ledger):
        memory.available = False
        for cover in told[:2]:
            ledger.cover(cover)
        await turns()
        available = [ledger.available]
        ledger.cover(told[2])
        await clock.advance(30)
        assert clock.pauses_s[1:4] == [LEDGER_RETRY_S, 2 * LEDGER_RETRY_S, LEDGER_RETRY_S_MAX]
        memory.available = True
        await clock.advance(10)
        await ledger.drain()
        available.append(ledger.available)
    assert memory.covers == told
    assert available == [False, True]


async def test_a_heartbeat_that_fails_says_that_the_store_is_away() -> None:
    """Where nobody calls, nothing else would notice that the database is down."""
    memory, clock = MemoryJournal(), Clock()
    ledger = Ledger(memory, pause=clock.pause)
    async with running(ledger):
        ledger.cover(Cover(1, clock.wall()), clock.wall)
        await ledger.drain()
        memory.available = False
        await clock.advance(HEARTBEAT_S)
        available = [ledger.available]
        memory.available = True
        await clock.advance(LEDGER_RETRY_S_MAX)
        available.append(ledger.available)
    assert [accounts for accounts, _ in memory.beats] == [frozenset({1})]
    assert available == [False, True]


class CoverRefused(MemoryJournal):
    """A store that takes everything but turns of coverage, while it refuses those."""

    refusing = False

    async def cover(self, covers: Sequence[Cover], sessions: Mapping[int, Saved | None]) -> None:
        """As ever, or StoreUnavailable."""
        if self.refusing:
            raise StoreUnavailable("A lock was not to be had in time.")
        await super().cover(covers, sessions)


async def test_no_heartbeat_overtakes_a_gap_that_is_not_written_yet() -> None:
    """While covers wait for the store nothing is vouched for: the row that a heartbeat would lengthen is one
    that has ended."""
    memory, clock = CoverRefused(), Clock()
    ledger = Ledger(memory, pause=clock.pause)
    async with running(ledger):
        ledger.cover(Cover(1, clock.wall()), clock.wall)
        await ledger.drain()
        await clock.advance(HEARTBEAT_S)
        assert len(memory.beats) == 1
        memory.refusing = True
        ledger.cover(Cover(1, clock.wall(), "disconnected"))
        ledger.cover(Cover(1, clock.wall()), clock.wall)
        await clock.advance(5 * HEARTBEAT_S)
        assert len(memory.beats) == 1
        memory.refusing = False
        await clock.advance(2 * HEARTBEAT_S)
        assert len(memory.beats) >= 2


async def test_what_is_lost_is_written_after_what_was_told_before_it() -> None:
    """However long the store takes no turns: a gap that is told and not written yet would find its moment cut
    away. Who told it waits until it is durable, and no heartbeat comes before."""
    memory, clock = CoverRefused(), Clock()
    memory.refusing = True
    ledger = Ledger(memory, pause=clock.pause)
    async with running(ledger), asyncio.TaskGroup() as tasks:
        ledger.cover(Cover(1, clock.wall()), clock.wall)
        lost = Missing(1, clock.wall())
        losing = tasks.create_task(ledger.lose([lost], clock.wall()))
        await turns()
        await clock.advance(2 * HEARTBEAT_S)
        assert (losing.done(), memory.missing, memory.beats) == (False, [], [])
        memory.refusing = False
        for _ in range(3):
            await clock.advance(LEDGER_RETRY_S_MAX)
        assert (losing.done(), memory.missing, len(memory.covers)) == (True, [(lost, True)], 1)
        memory.available = False
        losing = tasks.create_task(ledger.lose([lost]))
        await turns()
        await clock.advance(2 * HEARTBEAT_S)
        assert (losing.done(), memory.beats) == (False, [])
        memory.available = True
        for _ in range(3):
            await clock.advance(LEDGER_RETRY_S_MAX)
        assert (losing.done(), memory.missing[1:]) == (True, [(lost, False)])


async def test_coverage_that_waits_is_bounded_and_stays_true() -> None:
    """Sessions that flap for days while the store is away: each account keeps its first gap and its last
    turn, and "observed" is said nowhere where it was not."""
    memory, clock = MemoryJournal(), Clock()
    ledger = Ledger(memory, pause=clock.pause)
    accounts = range(1, 11)
    async with running(ledger):
        memory.available = False
        for account in accounts:
            ledger.cover(Cover(account, clock.wall()))
        await turns()
        flaps = COVERS_WAITING_MAX // 10
        for flap in range(flaps):
            await clock.advance(1)
            for account in accounts:
                ledger.cover(Cover(account, clock.wall(), "disconnected"))
                ledger.cover(Cover(account, clock.wall() + timedelta(seconds=0.5)))
            if flap == flaps // 2:
                assert len(ledger._waiting) <= COVERS_WAITING_MAX
        memory.available = True
        await clock.advance(10)
        await ledger.drain()
    assert len(memory.covers) < COVERS_WAITING_MAX
    for account in accounts:
        told = [cover for cover in memory.covers if cover.account == account]
        assert [cover.at for cover in told] == sorted(cover.at for cover in told)
        assert told[1] == Cover(account, BEGAN_AT + timedelta(seconds=1), "disconnected")
        assert told[-1] == Cover(account, BEGAN_AT + timedelta(seconds=flaps + 0.5))


async def test_the_ledger_ends_when_a_cancellation_is_answered_with_a_failure() -> None:
    """As the pipeline: nobody cancels twice."""

    class Swallowing(MemoryJournal):
        async def cover(self, *_: object) -> None:
            self.attempts += 1
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise StoreUnavailable("The connection was closed in the middle of a statement.") from None

    memory, clock = Swallowing(), Clock()
    ledger = Ledger(memory, pause=clock.pause)
    async with asyncio.timeout(5), running(ledger):
        ledger.cover(Cover(1, clock.wall()))
        await until(lambda: memory.attempts == 1)
    assert memory.attempts == 1


# ── Questions ─────────────────────────────────────────────────────────────────────────────────────────


async def test_the_answers_about_coverage_agree_with_what_was_told(stage: Stage, database: str) -> None:
    """`listener coverage` has the stretches of the rows, the share that was observed, and for each cause the
    seconds that the metrics counted; an idle account that polls as it should is observed until now."""
    one, two = stage.watch(1), stage.watch(2)
    await stage.clock.advance(10)
    for each in (one, two):
        await each.up()
    await stage.clock.advance(20)
    one.gap("disconnected", 25)
    await stage.clock.advance(5)
    one.gap("session lost", 25)
    await stage.clock.advance(5)
    await one.up()
    two.gap("disconnected", 38)
    await stage.clock.advance(2)
    two.tell(Unbroken())
    for _ in range(5):
        for each in (one, two):
            each.answered()
        for _ in range(30):
            await stage.clock.advance(1)
            await stage.seen_s()  # as long as the database takes for a heartbeat, or nearly
    for account in (1, 2):
        while (await stage.seen_s(account) or 0) < stage.clock.passed_s - SILENT_S_MAX:
            await stage.clock.advance(HEARTBEAT_S / 10)
    await stage.settled()
    now_s = stage.clock.passed_s
    expected = {
        "ada": [Row(0, 10, "not started"), Row(10, 25, ""), Row(25, 40, "session lost"), Row(40, now_s, "")],
        "bob": [Row(0, 10, "not started"), Row(10, now_s, "")],
    }
    claim = await Claim.take(database)
    async with History(database, clock=stage.clock.wall) as history:
        answer = await history.coverage()
        alone = await history.coverage(accounts=["ada"], since=stage.at(20), until=stage.at(50))
    await claim.release()
    found: dict[str, list[Row]] = {"ada": [], "bob": []}
    for stretch in answer.stretches:
        since_s, until_s = stage._seconds(stretch.since), stage._seconds(stretch.until)
        rows = found[stretch.account]
        if rows and rows[-1].cause == stretch.cause:
            since_s = rows.pop().since_s
        rows.append(Row(since_s or 0.0, until_s, stretch.cause))
    assert found == expected
    assert answer.observed == pytest.approx(1 - (20 + 15) / (2 * now_s))
    assert alone.observed == pytest.approx(0.5)
    counted: dict[str, float] = {}
    for cause, seconds in stage.counts.gaps:
        counted[cause] = counted.get(cause, 0.0) + seconds
    assert counted == answer.gaps_s == {"not started": 20.0, "session lost": 15.0}


# ── Whatever happens ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_the_session_says_no_deaf_moment_is_called_observed(
    stage: Stage, sql: asyncpg.Connection, seed: int
) -> None:
    """A session's life at random, beside a model of what the server would have lost: from start to stop each
    moment has a row, and "observed" covers none at which the account was deaf."""
    dice = Random(seed)
    one = stage.watch()
    deaf: list[tuple[float, float, str]] = []
    began_s, up, acknowledges = 0.0, False, True
    for _ in range(60):
        await stage.clock.advance(1)
        now_s = stage.clock.passed_s
        if not up:
            acknowledges = dice.random() < 0.7
            one.tell(SHAKEN if acknowledges else UNACKNOWLEDGED)
            await stage.clock.advance(1)
            if dice.random() < 0.2:
                one.gap("session lost", now_s)
                continue
            stage.rest.answers = [RemoteUnavailable("away")] * dice.choice([0, 0, 1, 3])
            one.tell(Subscribed())
            deaf.append((began_s, stage.clock.passed_s, "session"))
            up = True
        elif dice.random() < 0.4:
            await one.hear(dice.randrange(1, 4))
            one.answered(took=True)
        else:
            since_s = now_s - dice.choice([0.0, 0.5])
            one.gap("disconnected", since_s)
            await stage.clock.advance(dice.choice([0.5, 2]))
            if dice.random() < 0.5:
                one.tell(Unbroken() if acknowledges else Resumed())
                if not acknowledges:
                    deaf.append((since_s, stage.clock.passed_s, "connection"))
            else:
                one.gap("session lost", since_s)
                began_s, up = since_s, False
        if dice.random() < 0.3:
            await turns(50)
    if not up:
        deaf.append((began_s, stage.clock.passed_s, "session"))
    one.watch.end(stage.clock.wall())
    await stage.settled()
    rows = await stage.rows()
    assert rows[0].since_s == 0
    assert rows[-1].cause == "stopped"
    assert rows[-1].since_s <= stage.clock.passed_s
    for row in rows[:-1]:
        if row.cause == "":
            for since_s, until_s, what in deaf:
                overlap_s = min(until_s, row.until_s or until_s) - max(since_s, row.since_s)
                assert overlap_s <= 0, f"{row} calls observed what was deaf ({what}) {since_s} to {until_s}"
    counted_s = sum(seconds for _, seconds in stage.counts.gaps)
    recorded_s = sum((row.until_s or 0) - row.since_s for row in rows[:-1] if row.cause)
    assert counted_s == pytest.approx(recorded_s, abs=1e-3)
