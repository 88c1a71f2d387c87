"""The pipeline: order, grouping, acknowledgement after commit, and what happens while the store is away."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import asyncpg
import pytest

from listener.core.calls import Cover, Heard, Missing, Recorded
from listener.errors import StoreUnavailable
from listener.pipeline import RETRY_S, RETRY_S_MAX, Pipeline, Spooling
from listener.store.journal import AccountRow, Journal
from listener.store.spool import Spool
from tests.support.memory import HEARD_AT, MemoryJournal, Said, until
from tests.support.outage import Fragile, briefly, change_a_bit


class Counts:
    """An observer that remembers what it was told."""

    def __init__(self) -> None:
        self.recorded_sizes: list[int] = []
        self.failures: list[StoreUnavailable] = []
        self.backlogs: list[tuple[int, int]] = []

    def recorded(self, recorded: Recorded, seconds: float) -> None:
        """A batch was committed."""
        assert seconds >= 0
        self.recorded_sizes.append(len(recorded.entries))

    def store_failed(self, error: StoreUnavailable) -> None:
        """The store was away."""
        self.failures.append(error)

    def backlog(self, notifications: int, size_bytes: int) -> None:
        """So much waits."""
        self.backlogs.append((notifications, size_bytes))


class Pauses:
    """Waits that a test lets pass: `asyncio.sleep` for a pipeline whose clock is the test's."""

    def __init__(self) -> None:
        self.asked_s: list[float] = []
        self.during: Callable[[], None] = lambda: None

    async def __call__(self, seconds: float) -> None:
        """Passes at once, and does what the test wants to happen meanwhile."""
        self.asked_s.append(seconds)
        self.during()
        await asyncio.sleep(0)


@asynccontextmanager
async def running(pipeline: Pipeline) -> AsyncIterator[None]:
    """Runs the pipeline's writers during the block."""
    async with asyncio.TaskGroup() as tasks:
        work = tasks.create_task(pipeline.run())
        try:
            yield
        finally:
            work.cancel()


async def turns(count: int = 20) -> None:
    """Lets the loop turn, so that whatever can happen has happened."""
    for _ in range(count):
        await asyncio.sleep(0)


def line(account: int, *, padding: int = 0) -> Said:
    """What one account says on a stream of its own."""
    return Said(account, str(uuid.uuid4()), padding=padding)


# ── The exam of a journal ─────────────────────────────────────────────────────────────────────────────


class Candidate(Protocol):
    """A journal with the accounts 1 and 2, and a way to look at what it holds and to take it away."""

    journal: Any

    async def stored(self, account: int) -> list[tuple[str, int, bytes]]:
        """Stream, position and bytes of what is stored of an account, in order."""

    async def present(self, account: int) -> str:
        """The cause that the coverage of an account has now."""

    async def away(self) -> None:
        """Takes it away."""

    async def back(self) -> None:
        """Brings it back."""


class InMemory:
    """The journal of the scheduling tests."""

    def __init__(self) -> None:
        self.journal = MemoryJournal()

    async def stored(self, account: int) -> list[tuple[str, int, bytes]]:
        """As `Candidate`."""
        return [(one.stream, one.position, one.raw) for one in self.journal.stored(account)]

    async def present(self, account: int) -> str:
        """As `Candidate`."""
        return [cover.cause for cover in self.journal.covers if cover.account == account][-1]

    async def away(self) -> None:
        """As `Candidate`."""
        self.journal.available = False

    async def back(self) -> None:
        """As `Candidate`."""
        self.journal.available = True


class InPostgres:
    """The real one."""

    def __init__(self, journal: Journal, fragile: Fragile, dsn: str) -> None:
        self.journal = journal
        self._fragile = fragile
        self._dsn = dsn

    async def stored(self, account: int) -> list[tuple[str, int, bytes]]:
        """As `Candidate`."""
        rows = await self._fetch(
            "SELECT stream_id, position, raw FROM notification WHERE account_id = $1 ORDER BY id", account
        )
        return [(str(row[0]), row[1], row[2]) for row in rows]

    async def present(self, account: int) -> str:
        """As `Candidate`."""
        (row,) = await self._fetch(
            "SELECT cause FROM coverage WHERE account_id = $1 AND until IS NULL", account
        )
        return str(row[0])

    async def _fetch(self, statement: str, account: int) -> list[Any]:
        connection = await asyncpg.connect(self._dsn)
        try:
            return list(await connection.fetch(statement, account))
        finally:
            await connection.close()

    async def away(self) -> None:
        """As `Candidate`."""
        await self._fragile.stop()

    async def back(self) -> None:
        """As `Candidate`."""
        await self._fragile.start()


@pytest.fixture
async def real_journal(fragile_database: str) -> AsyncIterator[Journal]:
    """A journal on a server that may be stopped, with the accounts 1 and 2."""
    async with await Journal.open(fragile_database) as journal:
        found = await journal.register([AccountRow(name, "", "lab") for name in ("ada", "bob")])
        assert found == {"ada": 1, "bob": 2}
        yield journal


@pytest.fixture(params=["memory", "postgresql"])
def candidate(request: pytest.FixtureRequest, fragile: Fragile) -> Candidate:
    """Each journal that the pipeline is tested with."""
    if request.param == "memory":
        return InMemory()
    journal = request.getfixturevalue("real_journal")
    return InPostgres(journal, fragile, request.getfixturevalue("fragile_database"))


def places(heard: list[Heard]) -> list[tuple[str, int, bytes]]:
    """What a journal must hold of these messages."""
    return [(one.stream, one.position, one.raw) for one in heard]


async def test_a_journal_stores_each_place_once_and_equal_messages_twice(candidate: Candidate) -> None:
    """A message that comes again is left out and counted; an equal one at another place is another fact."""
    said, other = line(1), line(2)
    heard, foreign = said.next(3), other.next(2)
    first = await candidate.journal.record([*heard, *foreign])
    again = await candidate.journal.record([*heard[1:], *said.next(1)])
    twin = Heard(1, str(uuid.uuid4()), 1, HEARD_AT, heard[0].channel, heard[0].raw)
    third = await candidate.journal.record([twin])
    assert (len(first.entries), first.duplicates) == (5, 0)
    assert ([one.heard.position for one in again.entries], again.duplicates) == ([4], 2)
    assert (len(third.entries), third.duplicates) == (1, 0)
    assert await candidate.stored(1) == [*places(heard), *places(said.said[3:]), *places([twin])]
    assert await candidate.stored(2) == places(foreign)


async def test_a_journal_that_is_away_stores_nothing_and_takes_the_same_later(candidate: Candidate) -> None:
    """`StoreUnavailable` means: nothing of it is stored, hand it in again."""
    heard = line(1).next(3)
    await candidate.away()
    try:
        with pytest.raises(StoreUnavailable):
            await candidate.journal.record(heard)
        with pytest.raises(StoreUnavailable):
            await candidate.journal.cover([Cover(1, HEARD_AT)], {})
    finally:
        await candidate.back()
    assert await candidate.stored(1) == []
    recorded = await candidate.journal.record(heard)
    assert (len(recorded.entries), recorded.duplicates) == (3, 0)
    assert await candidate.stored(1) == places(heard)


async def test_a_journal_takes_the_turns_of_coverage_in_order(candidate: Candidate) -> None:
    """The last turn of an account is what is true of it."""
    turns_of_both = [Cover(1, HEARD_AT), Cover(2, HEARD_AT), Cover(1, HEARD_AT, "disconnected")]
    await candidate.journal.cover(turns_of_both, {})
    assert (await candidate.present(1), await candidate.present(2)) == ("disconnected", "")
    await candidate.journal.cover([Cover(1, HEARD_AT)], {})
    assert await candidate.present(1) == ""


# ── Order and grouping ────────────────────────────────────────────────────────────────────────────────


async def test_each_account_is_stored_in_the_order_in_which_it_was_heard() -> None:
    """Whatever the batches and the writers: the messages of an account keep their order."""
    journal = MemoryJournal()
    pipeline = Pipeline(journal, Counts(), writers=3, batch_max=7)
    lines = [line(account) for account in range(1, 8)]
    said: dict[int, list[Heard]] = {each.account: [] for each in lines}
    async with running(pipeline):
        for turn in range(40):
            for each in lines:
                heard = each.next(1 + (turn + each.account) % 4)
                said[each.account] += heard
                await pipeline.hear(heard, lambda: None)
            if turn % 5 == 0:
                await asyncio.sleep(0)
        await pipeline.drain()
    assert {account: journal.stored(account) for account in said} == said


async def test_what_piles_up_during_a_commit_is_the_next_batch() -> None:
    """No timer groups messages: a lone one goes at once, and those that came meanwhile go together."""
    journal = MemoryJournal()
    pipeline = Pipeline(journal, Counts(), writers=1)
    said = line(1)
    async with running(pipeline):
        journal.hold(1)
        await pipeline.hear(said.next(), lambda: None)
        await until(lambda: journal.attempts == 1)
        for _ in range(5):
            await pipeline.hear(said.next(2), lambda: None)
        journal.release()
        await pipeline.drain()
    assert [len(batch) for batch in journal.batches] == [1, 10]


async def test_a_batch_never_exceeds_its_bound_and_keeps_deliveries_whole() -> None:
    """Deliveries are grouped up to `batch_max`; one that does not fit any more begins the next batch."""
    journal = MemoryJournal()
    pipeline = Pipeline(journal, Counts(), writers=1, batch_max=7)
    said = line(1)
    async with running(pipeline):
        journal.hold(1)
        for _ in range(5):
            await pipeline.hear(said.next(3), lambda: None)
        journal.release()
        await pipeline.drain()
    assert [len(batch) for batch in journal.batches] == [6, 6, 3]


async def test_a_larger_delivery_is_split_and_counts_as_committed_only_as_a_whole() -> None:
    """A delivery beyond `batch_max` takes several transactions, and is acknowledged after the last."""
    journal = MemoryJournal()
    pipeline = Pipeline(journal, Counts(), writers=1, batch_max=10)
    stored_when_committed: list[int] = []
    said = line(1)
    async with running(pipeline):
        heard = said.next(25)
        await pipeline.hear(heard, lambda: stored_when_committed.append(len(journal.stored(1))))
        await pipeline.drain()
    assert [len(batch) for batch in journal.batches] == [10, 10, 5]
    assert stored_when_committed == [25]
    assert journal.stored(1) == heard


async def test_a_store_that_leaves_in_the_middle_of_a_large_delivery_gets_the_rest_later() -> None:
    """The parts that are committed stay; the whole counts only when the last one is."""
    journal = MemoryJournal()
    pauses = Pauses()
    committed: list[int] = []

    class LeavesAfterOne(Counts):
        def recorded(self, recorded: Recorded, seconds: float) -> None:
            super().recorded(recorded, seconds)
            journal.available = len(self.recorded_sizes) > 1

    def back() -> None:
        journal.available = len(pauses.asked_s) > 2

    pauses.during = back
    pipeline = Pipeline(journal, LeavesAfterOne(), writers=1, batch_max=10, pause=pauses)
    async with running(pipeline):
        await pipeline.hear(line(1).next(25), lambda: committed.append(len(journal.stored(1))))
        await pipeline.drain()
    assert committed == [25]
    assert [one.position for one in journal.stored(1)] == list(range(1, 26))


# ── Acknowledgement ───────────────────────────────────────────────────────────────────────────────────


async def test_committed_is_called_after_the_commit_and_in_order() -> None:
    """While a transaction is open nothing is acknowledged; then its deliveries are, the first one first."""
    journal = MemoryJournal()
    pipeline = Pipeline(journal, Counts(), writers=1)
    said = line(1)
    committed: list[int] = []
    async with running(pipeline):
        journal.hold(1)
        for number in range(3):
            await pipeline.hear(said.next(), partial(committed.append, number))
        await until(lambda: journal.attempts == 1)
        assert committed == []
        assert pipeline.backlog_notifications == 3
        journal.release()
        await pipeline.drain()
    assert committed == [0, 1, 2]
    assert (pipeline.backlog_notifications, pipeline.backlog_bytes) == (0, 0)


async def test_one_writer_that_waits_does_not_hold_up_the_others() -> None:
    """Accounts are shared out among the writers: a slow transaction of one is no matter of the others'."""
    journal = MemoryJournal()
    pipeline = Pipeline(journal, Counts(), writers=2)
    committed: list[int] = []
    async with running(pipeline):
        journal.hold(1)
        for account in (1, 2):
            await pipeline.hear(line(account).next(), partial(committed.append, account))
        await until(lambda: committed == [2])
        journal.release()
        await pipeline.drain()
    assert committed == [2, 1]


# ── A store that is away ──────────────────────────────────────────────────────────────────────────────


async def test_a_store_that_is_away_is_asked_ever_more_slowly_and_loses_nothing() -> None:
    """Waits double up to their cap, and begin small again after a success."""
    journal = MemoryJournal()
    journal.available = False
    pauses, counts = Pauses(), Counts()
    committed: list[bool] = []

    def meanwhile() -> None:
        assert not pipeline.available
        assert len(committed) == len(journal.batches)
        journal.available = len(pauses.asked_s) >= 9

    pauses.during = meanwhile
    pipeline = Pipeline(journal, counts, writers=1, pause=pauses)
    said = line(1)
    async with running(pipeline):
        heard = said.next(3)
        await pipeline.hear(heard, lambda: committed.append(True))
        await pipeline.drain()
        first, pauses.asked_s = pauses.asked_s, []
        assert pipeline.available
        journal.available = False
        more = said.next(2)
        await pipeline.hear(more, lambda: committed.append(True))
        await pipeline.drain()
    assert first == [min(RETRY_S * 2**attempt, RETRY_S_MAX) for attempt in range(9)]
    assert first[-1] == RETRY_S_MAX
    assert pauses.asked_s[0] == RETRY_S
    assert len(counts.failures) == 18
    assert journal.stored(1) == [*heard, *more]
    assert committed == [True, True]


async def test_a_bug_in_the_journal_ends_the_pipeline_and_acknowledges_nothing() -> None:
    """What is no `StoreUnavailable` is not retried: `run` raises it, and a restart loses nothing."""

    class Broken(MemoryJournal):
        async def record(self, entries: object) -> Recorded:  # noqa: ARG002 - the signature is the journal's
            raise ZeroDivisionError

    pipeline = Pipeline(Broken(), Counts())
    committed: list[bool] = []
    await pipeline.hear(line(1).next(), lambda: committed.append(True))
    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.timeout(5):
            await pipeline.run()
    assert caught.group_contains(ZeroDivisionError)
    assert committed == []
    assert pipeline.backlog_notifications == 1


async def test_nothing_is_lost_or_doubled_when_postgresql_goes_and_comes_back(
    fragile: Fragile, real_journal: Journal, fragile_database: str
) -> None:
    """While the real store is stopped and started, twice, two accounts go on talking; all of it is stored
    once and in order, and acknowledged after its commit."""
    counts = Counts()
    pipeline = Pipeline(real_journal, counts, batch_max=50)
    lines = [line(1), line(2)]
    committed: list[tuple[int, int]] = []
    candidate = InPostgres(real_journal, fragile, fragile_database)

    async def talk(deliveries: int) -> None:
        for _ in range(deliveries):
            for each in lines:
                heard = each.next(3)
                await pipeline.hear(heard, partial(committed.append, (each.account, heard[-1].position)))
            await asyncio.sleep(0)

    async with running(pipeline):
        for _ in range(2):
            await talk(20)
            async with fragile.away():
                await talk(20)
                await until(lambda: not pipeline.available)
                acknowledged = len(committed)
                await talk(20)
                assert len(committed) == acknowledged
                assert pipeline.backlog_notifications > 0
            async with asyncio.timeout(20):
                await pipeline.drain()
            assert pipeline.available
    for each in lines:
        assert await candidate.stored(each.account) == places(each.said)
        done = [position for account, position in committed if account == each.account]
        assert done == list(range(3, 3 * 120 + 1, 3))
    assert len(counts.failures) >= 2
    assert max(counts.recorded_sizes) <= 50


async def test_a_commit_whose_answer_was_lost_is_not_stored_twice(
    real_journal: Journal, fragile: Fragile, fragile_database: str
) -> None:
    """The transaction committed and its connection died before we knew: handed in again, it adds nothing."""
    counts = Counts()
    said = line(1)

    class AnswerLost:
        """The real journal, of whose first answer nothing is heard."""

        lost = 0

        async def record(self, batch: Sequence[Heard]) -> Recorded:
            """Commits; then the connection is gone."""
            recorded = await real_journal.record(batch)
            if not self.lost:
                self.lost += 1
                raise StoreUnavailable("The connection was lost after the commit.")
            return recorded

    pipeline = Pipeline(AnswerLost(), counts)
    committed: list[bool] = []
    async with running(pipeline):
        await pipeline.hear(said.next(3), lambda: committed.append(True))
        async with asyncio.timeout(10):
            await pipeline.drain()
    assert committed == [True]
    assert counts.recorded_sizes == [0]
    assert await InPostgres(real_journal, fragile, fragile_database).stored(1) == places(said.said)


async def test_a_cancellation_that_a_driver_answers_with_a_failure_still_ends_the_pipeline() -> None:
    """asyncpg may turn a cancellation into the failure of the connection that it broke: nobody would cancel
    again, so a pipeline that tried once more would never end."""

    class Swallowing(MemoryJournal):
        async def record(self, entries: object) -> Recorded:  # noqa: ARG002 - the signature is the journal's
            self.attempts += 1
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise StoreUnavailable("The connection was closed in the middle of a statement.") from None
            raise AssertionError

    journal = Swallowing()
    pipeline = Pipeline(journal, Counts(), writers=1)
    committed: list[bool] = []
    async with asyncio.timeout(5), running(pipeline):
        await pipeline.hear(line(1).next(), lambda: committed.append(True))
        await until(lambda: journal.attempts == 1)
    assert (journal.attempts, committed) == (1, [])


# ── The bound of what waits ───────────────────────────────────────────────────────────────────────────


async def test_a_full_backlog_blocks_hear_until_there_is_room() -> None:
    """At `backlog_bytes_max` `hear` does not return; it does when a commit has made room."""
    journal = MemoryJournal()
    counts = Counts()
    said = line(1, padding=1000)
    size = len(Said(1, said.stream, padding=1000).next()[0].raw)
    pipeline = Pipeline(journal, counts, writers=1, backlog_bytes_max=3 * size)
    async with running(pipeline), asyncio.TaskGroup() as tasks:
        journal.hold(1)
        for _ in range(2):
            async with asyncio.timeout(5):
                await pipeline.hear(said.next(), lambda: None)
        third = tasks.create_task(pipeline.hear(said.next(), lambda: None))
        await until(lambda: pipeline.backlog_notifications == 3)
        await turns()
        assert not third.done()
        journal.release()
        async with asyncio.timeout(5):
            await third
            await pipeline.drain()
    assert [one.position for one in journal.stored(1)] == [1, 2, 3]
    assert max(size_bytes for _, size_bytes in counts.backlogs) == 3 * size
    assert counts.backlogs[-1] == (0, 0)


async def test_a_message_larger_than_the_whole_backlog_is_taken() -> None:
    """Refusing it would lose it."""
    journal = MemoryJournal()
    pipeline = Pipeline(journal, Counts(), backlog_bytes_max=100)
    said = line(1, padding=5000)
    async with running(pipeline), asyncio.timeout(5):
        await pipeline.hear(said.next(), lambda: None)
        await pipeline.hear(said.next(), lambda: None)
        await pipeline.drain()
    assert len(journal.stored(1)) == 2


async def test_hear_that_is_given_up_while_it_waits_for_room_loses_nothing() -> None:
    """A request has a time-out, and what it brought counts as had: it must be in the backlog."""
    journal = MemoryJournal()
    pipeline = Pipeline(journal, Counts(), writers=1, backlog_bytes_max=100)
    said = line(1, padding=200)
    committed: list[str] = []
    async with running(pipeline):
        journal.hold(1)
        for name in ("first", "second"):
            with suppress(TimeoutError):
                async with asyncio.timeout(0.01):
                    await pipeline.hear(said.next(), partial(committed.append, name))
        journal.release()
        await pipeline.drain()
    assert [one.position for one in journal.stored(1)] == [1, 2]
    assert committed == ["first", "second"]


async def test_drain_waits_for_the_last_commit_and_not_when_there_is_nothing() -> None:
    """`drain` returns at once when all is committed, and otherwise when it is."""
    journal = MemoryJournal()
    pipeline = Pipeline(journal, Counts())
    async with running(pipeline), asyncio.TaskGroup() as tasks:
        async with asyncio.timeout(5):
            await pipeline.drain()
        journal.hold(1, 2)
        for account in (1, 2):
            await pipeline.hear(line(account).next(), lambda: None)
        draining = tasks.create_task(pipeline.drain())
        await until(lambda: journal.attempts == 2)
        assert not draining.done()
        journal.release()
        await draining
    assert sum(map(len, journal.batches)) == 2


# ── The spool ─────────────────────────────────────────────────────────────────────────────────────────


class Seen:
    """What the pipeline said of its spool."""

    def __init__(self) -> None:
        self.said: list[Spooling] = []

    def __call__(self, now: Spooling) -> None:
        """How it stands."""
        self.said.append(now)


@asynccontextmanager
async def spooling(
    journal: MemoryJournal, place: Path, *, bytes_max: int = 2**30, **more: Any
) -> AsyncIterator[tuple[Pipeline, Seen]]:
    """A pipeline with a real spool, which soon takes a store for away."""
    spool, seen = Spool.open(place, bytes_max=bytes_max), Seen()
    settings: dict[str, Any] = {
        "writers": 2,
        "spool_after_s": 0.02,
        "pause": briefly,
    } | more
    try:
        pipeline = Pipeline(journal, Counts(), spool=spool, spooling=seen, **settings)
        async with running(pipeline):
            yield pipeline, seen
    finally:
        spool.close()


async def test_a_store_that_answers_costs_no_file(tmp_path: Path) -> None:
    """As long as commits come in time, nothing is made, written or read."""
    journal = MemoryJournal()
    async with spooling(journal, tmp_path / "spool", spool_after_s=5.0) as (pipeline, seen):
        for account in range(1, 20):
            await pipeline.hear(line(account).next(5), lambda: None)
        await pipeline.drain()
        assert len(seen.said) == 1
    assert not (tmp_path / "spool").exists()
    assert sum(map(len, journal.batches)) == 95


async def test_what_is_spooled_leaves_memory_keeps_its_order_and_is_acknowledged_by_its_commit(
    tmp_path: Path,
) -> None:
    """What was in hand, what waited and what comes while the store is away; then what comes afterwards."""
    journal = MemoryJournal()
    journal.available = False
    lines = [line(account) for account in (1, 2, 3)]
    committed: list[tuple[int, int]] = []

    async def say(pipeline: Pipeline, times: int) -> None:
        for _ in range(times):
            for each in lines:
                heard = each.next(2)
                await pipeline.hear(heard, partial(committed.append, (each.account, heard[-1].position)))
            await asyncio.sleep(0)

    async with spooling(journal, tmp_path / "spool", batch_max=7) as (pipeline, seen):
        await say(pipeline, 20)
        await until(lambda: pipeline.spooled_notifications == 120)
        await say(pipeline, 20)
        await until(lambda: pipeline.spooled_notifications == 240)
        assert (pipeline.backlog_bytes, pipeline.backlog_notifications, committed) == (0, 240, [])
        assert seen.said[-1].oldest == HEARD_AT
        await until(lambda: not pipeline.available)
        journal.available = True
        await say(pipeline, 20)
        await pipeline.drain()
        assert pipeline.available
        told = len(seen.said)
        await say(pipeline, 5)
        await pipeline.drain()
        assert len(seen.said) == told, "the outage is over, and the spool is not used any more"
    for each in lines:
        assert journal.stored(each.account) == each.said
        assert [position for account, position in committed if account == each.account] == [*range(2, 131, 2)]
    assert max(map(len, journal.batches)) <= 7
    last = seen.said[-1]
    assert (last.notifications, last.size_bytes, last.oldest, last.trouble) == (0, 0, None, "")
    assert 240 <= last.drained <= 360


async def test_a_backlog_above_its_share_goes_to_the_spool_though_the_store_answers(tmp_path: Path) -> None:
    """Memory stays bounded and `hear` goes on while a writer waits for a slow commit."""
    journal = MemoryJournal()
    said = line(1, padding=1000)
    async with spooling(journal, tmp_path / "spool", backlog_bytes_max=20_000, spool_after_s=60.0) as (
        pipeline,
        seen,
    ):
        journal.hold(1)
        await pipeline.hear(said.next(), lambda: None)
        await until(lambda: journal.attempts == 1)
        async with asyncio.timeout(10):
            for _ in range(59):
                await pipeline.hear(said.next(), lambda: None)
            await until(lambda: pipeline.backlog_bytes < 10_000)
        assert pipeline.spooled_notifications > 40
        assert pipeline.available
        journal.release()
        await pipeline.drain()
    assert [one.position for one in journal.stored(1)] == list(range(1, 61))
    assert seen.said[-1].drained > 40


async def test_a_full_spool_makes_hear_wait_and_drops_nothing(tmp_path: Path) -> None:
    """It is said why; when the store is back, all of it is stored in order and the trouble is over."""
    journal = MemoryJournal()
    journal.available = False
    said = line(1, padding=1000)
    async with (
        spooling(journal, tmp_path / "spool", bytes_max=30_000, backlog_bytes_max=20_000) as (pipeline, seen),
        asyncio.TaskGroup() as tasks,
    ):

        async def talk() -> None:
            for _ in range(100):
                await pipeline.hear(said.next(), lambda: None)

        talking = tasks.create_task(talk())
        await until(lambda: "raise limits.spool_bytes_max" in pipeline.spool_trouble)
        await until(lambda: pipeline.backlog_bytes >= 20_000)
        heard = said.position
        await turns()
        assert (said.position, talking.done()) == (heard, False)
        assert seen.said[-1].size_bytes <= 30_000
        assert seen.said[-1].trouble == pipeline.spool_trouble
        journal.available = True
        await talking
        await pipeline.drain()
        await until(lambda: pipeline.spool_trouble == "")
    assert journal.stored(1) == said.said
    assert len(said.said) == 100


async def test_a_delivery_that_was_damaged_in_the_spool_holds_up_nothing(tmp_path: Path) -> None:
    """It is set aside and counted, and its session goes on; all others are stored. Before anything newer is,
    it is told what is missing: since the delivery before it, where that is in the same batch."""
    journal = MemoryJournal()
    journal.available = False
    said = line(1)
    committed: list[int] = []
    told: list[tuple[Missing, bool]] = []

    async def lost(missing: Sequence[Missing], left: bool) -> None:
        told.extend((each, left) for each in missing)
        assert max((one.position for one in journal.stored(1)), default=0) < 3

    async with spooling(journal, tmp_path / "spool", lost=lost) as (pipeline, seen):
        for number in range(5):
            said.at = HEARD_AT + timedelta(seconds=number)
            await pipeline.hear(said.next(), partial(committed.append, number))
        await until(lambda: pipeline.spooled_notifications == 5)
        (path,) = (tmp_path / "spool").glob("*.spool")
        change_a_bit(path, path.read_bytes().index(said.said[2].raw) + 5)
        journal.available = True
        await pipeline.drain()
    assert [one.position for one in journal.stored(1)] == [1, 2, 4, 5]
    assert committed == [0, 1, 2, 3, 4]
    assert seen.said[-1].set_aside == 1
    assert [path.suffix for path in (tmp_path / "spool").iterdir() if path.name != "lock"] == [".damaged"]
    assert told == [(Missing(1, said.said[2].received_at, said.said[1].received_at), False)]


async def test_what_is_damaged_of_an_earlier_run_is_told_before_anything_is_committed(tmp_path: Path) -> None:
    """And before it is forgotten: who is killed while telling it tells it again. Then all that is left is
    stored."""
    place = tmp_path / "spool"
    said = [line(1), line(2)]
    spool = Spool.open(place)
    for each in (*said, *said):
        spool.append([each.next(2)])
    spool.close()
    (path,) = place.glob("*.spool")
    change_a_bit(path, path.read_bytes().index(said[0].said[0].raw) + 5)
    journal = MemoryJournal()
    told: list[tuple[Missing, bool]] = []
    durable = asyncio.Event()

    async def lost(missing: Sequence[Missing], left: bool) -> None:
        told.extend((each, left) for each in missing)
        await durable.wait()

    for killed in (True, False):
        async with spooling(journal, place, lost=lost) as (pipeline, _), asyncio.TaskGroup() as tasks:
            await until(lambda: bool(told))
            draining = tasks.create_task(pipeline.drain())
            await turns()
            assert told == [(Missing(1, HEARD_AT), True)]
            assert (journal.batches, draining.done()) == ([], False)
            if killed:
                draining.cancel()
                told.clear()
            else:
                durable.set()
    assert (journal.stored(1), journal.stored(2)) == (said[0].said[2:], said[1].said)
    assert [each.suffix for each in place.iterdir() if each.name != "lock"] == [".damaged"]


async def test_secure_puts_on_disk_what_waits_and_the_next_run_stores_it_first(tmp_path: Path) -> None:
    """A stop without a store: nothing is left in memory alone, also where nothing was spooled before."""
    journal = MemoryJournal()
    said = line(1)
    journal.hold(1)
    async with spooling(journal, tmp_path / "spool", spool_after_s=60.0) as (pipeline, _):
        for _ in range(3):
            await pipeline.hear(said.next(2), lambda: None)
        async with asyncio.timeout(5):
            await pipeline.secure()
        assert (pipeline.backlog_bytes, pipeline.spooled_notifications) == (0, 6)
    later = MemoryJournal()
    async with spooling(later, tmp_path / "spool") as (pipeline, seen):
        assert pipeline.backlog_notifications == 6
        await pipeline.hear(said.next(), lambda: None)
        await pipeline.drain()
    assert later.stored(1) == said.said
    assert seen.said[-1].drained == 6


async def test_secure_does_not_wait_for_a_spool_that_takes_nothing(tmp_path: Path) -> None:
    """A stop is bounded, whatever the disk does."""
    journal = MemoryJournal()
    journal.hold(1)
    (tmp_path / "file").write_text("")
    async with spooling(journal, tmp_path / "file" / "spool", spool_after_s=60.0) as (pipeline, _):
        await pipeline.hear(line(1).next(), lambda: None)
        async with asyncio.timeout(5):
            await pipeline.secure()
        assert pipeline.spool_trouble
        assert pipeline.backlog_notifications == 1


async def test_nothing_is_drained_before_it_is_told_that_all_of_it_is_damaged(tmp_path: Path) -> None:
    """Also where nothing is left to be committed: no session begins before its gap is written."""
    said = line(1)
    spool = Spool.open(tmp_path / "spool")
    spool.append([said.next()])
    spool.close()
    (path,) = (tmp_path / "spool").glob("*.spool")
    path.write_bytes(bytes(path.stat().st_size))
    telling, durable = asyncio.Event(), asyncio.Event()

    async def lost(missing: Sequence[Missing], left: bool) -> None:
        assert ([each.account for each in missing], left) == ([None], True)
        telling.set()
        await durable.wait()

    async with spooling(MemoryJournal(), tmp_path / "spool", lost=lost) as (pipeline, _):
        await telling.wait()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await pipeline.drain()
        assert path.exists()
        durable.set()
        await pipeline.drain()
        await until(lambda: not path.exists())


async def test_what_an_earlier_run_left_and_is_damaged_later_is_missing_since_the_one_before_it(
    tmp_path: Path,
) -> None:
    """All that is known of a delivery that was left is that it was received before its segment was last
    written to: that is no moment since which the next one is missing."""
    said = line(1)
    first, second = said.next(3), said.next(3)
    spool = Spool.open(tmp_path / "spool")
    places = spool.append([first, second])
    spool.close()
    spool = Spool.open(tmp_path / "spool")
    (segment,) = (tmp_path / "spool").glob("*.spool")
    change_a_bit(segment, sum(places[1][1:]) - 10)
    told: list[Missing] = []

    async def lost(missing: Sequence[Missing], left: bool) -> None:
        told.extend(missing)

    pipeline = Pipeline(MemoryJournal(), Counts(), spool=spool, lost=lost)
    async with running(pipeline):
        await pipeline.drain()
    spool.close()

    (missing,) = told
    assert missing.until >= second[-1].received_at
    assert missing.since is None or missing.since <= second[0].received_at
