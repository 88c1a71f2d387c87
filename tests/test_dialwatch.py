"""Dials placed, calls heard and the clock, on a real PostgreSQL: each dial gets its row and its outcome."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from listener.core.calls import Heard, Recorded
from listener.core.dialling import (
    DEADLINES,
    REFERENCE_KEY,
    Accepted,
    Advance,
    CallRecord,
    Cause,
    Dial,
    Evidence,
    MatchConfidence,
    NoojeeStatus,
    Outcome,
    Refused,
    Sighting,
    System,
    advance,
    placed,
)
from listener.dialwatch import DIALS_MAX, STALE_DEADLINES_MAX, DialWatch, _Waiting
from listener.errors import StoreUnavailable
from listener.store.dials import Dials
from listener.store.embedded import Embedded
from listener.store.journal import AccountRow, Journal
from tests.store.line import T0, Line
from tests.support.database import new_database
from tests.support.running import until

NUMBER = "+27821234567"
WITHIN_S = 10


class Counts:
    """An observer that keeps what it is shown."""

    def __init__(self) -> None:
        self.advances: list[Advance] = []
        self.waiting: dict[System, int] = {}
        self.ambiguous = 0
        self.unmatched: Counter[str] = Counter()
        self.dropped = 0

    def dial(self, advance: Advance) -> None:
        """A dial changed."""
        self.advances.append(advance)

    def dials_waiting(self, waiting: Mapping[System, int]) -> None:
        """So many wait."""
        self.waiting = dict(waiting)

    def dial_ambiguous(self) -> None:
        """One of several."""
        self.ambiguous += 1

    def dial_unmatched(self, what: str) -> None:
        """None."""
        self.unmatched[what] += 1

    def dial_dropped(self, facts: int) -> None:
        """So many facts are not told."""
        self.dropped += facts

    @property
    def ended(self) -> list[Dial]:
        """The dials that ended, as they did."""
        return [advance.dial for advance in self.advances if advance.ended]


class Flaky(Dials):
    """A store that can be told to be away."""

    away = False
    lose_answers = 0
    """So many transactions are committed without an answer."""

    async def take(self, news: Sequence[Any], marks: Any = None) -> list[Advance | None]:
        """As the store, while it is there."""
        if self.away:
            raise StoreUnavailable("away")
        done = await super().take(news, marks)
        if self.lose_answers:
            self.lose_answers -= 1
            raise StoreUnavailable("the answer was lost")
        return done


class Site:
    """A journal, its dials, and the watch over them; `at` is the time of the day."""

    def __init__(self, journal: Journal, **options: Any) -> None:
        self.journal = journal
        self.dials = Flaky(journal)
        self.counts = Counts()
        self.at = T0
        self.watch = DialWatch(
            self.dials, self.counts, wall=lambda: self.at, pause=lambda _: asyncio.sleep(0), **options
        )

    async def hear(self, *entries: Heard) -> Recorded:
        """Messages are committed, and the watch is told."""
        recorded = await self.journal.record(entries)
        self.watch.recorded(recorded)
        await self.settle()
        return recorded

    async def settle(self) -> None:
        """Everything that was handed in is stored."""
        async with asyncio.timeout(WITHIN_S):
            await self.watch.drain()

    async def pass_by(self, seconds: float) -> None:
        """Time goes by, and the watch has looked at the clock."""
        self.at += timedelta(seconds=seconds)
        async with asyncio.timeout(WITHIN_S):
            self.watch._wake()
            await self.watch.drain()


@asynccontextmanager
async def site(journal: Journal, **options: Any) -> AsyncIterator[Site]:
    """A site that is watched during the block, as by one run of the daemon."""
    here = Site(journal, **options)
    async with asyncio.TaskGroup() as tasks:
        work = tasks.create_task(here.watch.run())
        try:
            async with asyncio.timeout(WITHIN_S):
                await here.watch.drain()
            yield here
        finally:
            work.cancel()


async def rows(sql: asyncpg.Connection, columns: str = "*") -> list[asyncpg.Record]:
    """The dials that count, in the order of their ids."""
    return await sql.fetch(f"SELECT {columns} FROM dial WHERE merged_into IS NULL ORDER BY id")  # noqa: S608 - ours


async def facts(sql: asyncpg.Connection, dial: str) -> list[tuple[str, str]]:
    """What was heard of a dial, in order."""
    found = await sql.fetch("SELECT kind, said FROM dial_fact WHERE dial_id = $1 ORDER BY ordinal", dial)
    return [tuple(row) for row in found]


def asked(id: str = "d1", at: datetime = T0, *, reference: str | None = None, **fields: Any) -> Dial:
    """A dial that is about to be sent, at the account ada."""
    system = fields.pop("system", System.GWS)
    number = fields.pop("number", NUMBER)
    return placed(id, 1, system, number, at, reference=reference, **fields)


def out(line: Line, *states: str, id: str = "c1", number: str = NUMBER, **fields: Any) -> list[Heard]:
    """The messages of a call that the account dialled."""
    return line.call(*states, id=id, numbers=[number], **fields)


# ── overheard ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_call_that_begins_in_dialing_is_a_dial(journal: Journal, sql: asyncpg.Connection) -> None:
    """With its number, times and outcome; each fact has its message. A call that rings is none."""
    line = Line()
    async with site(journal) as here:
        await here.hear(*out(line, "Dialing", "Established", "Released"), *line.call("Ringing", id="in"))
    (row,) = await rows(sql)
    call = await sql.fetchval("SELECT id FROM call WHERE call_id = 'c1'")
    assert (row["id"], row["call_id"], row["outcome"], row["confidence"]) == (
        f"call-{call}", call, "answered", "stated",
    )  # fmt: skip
    assert (row["connected_at"] - row["requested_at"]).total_seconds() == 1
    assert await facts(sql, row["id"]) == [("call", "Established"), ("call", "Released")]
    told = await sql.fetch(
        "SELECT n.received_at, f.at FROM dial_fact f JOIN notification n ON n.id = f.notification_id"
    )
    assert len(told) == 2
    assert all(row["received_at"] == row["at"] for row in told)
    assert [dial.id for dial in here.counts.ended] == [row["id"]]
    assert here.counts.waiting[System.GWS] == 0


async def test_the_same_batch_again_changes_nothing(journal: Journal, sql: asyncpg.Connection) -> None:
    """Neither rows nor facts nor what observers counted."""
    line = Line()
    async with site(journal) as here:
        recorded = await here.hear(*out(line, "Dialing", "Established", "Released"))
        before, told = await rows(sql), await sql.fetch("SELECT * FROM dial_fact")
        shown = list(here.counts.advances)
        here.watch.recorded(recorded)
        await here.settle()
        assert (await rows(sql), await sql.fetch("SELECT * FROM dial_fact")) == (before, told)
        assert here.counts.advances == shown
    async with site(journal) as here:
        here.watch.recorded(recorded)
        await here.settle()
        assert await rows(sql) == before
        assert here.counts.advances == []


async def test_what_a_crash_left_untold_is_told_at_the_start(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """Calls that began, went on and ended while nobody watched give the dials that watching gives."""
    line, other = Line(), Line(2)
    async with site(journal) as here:
        await here.hear(*out(line, "Dialing", id="goes on"), *out(line, "Dialing", "Released", id="over"))
    await journal.record(
        [*out(line, "Established", "Released", id="goes on"), *out(line, "Dialing", id="new")]
    )
    await journal.record([*out(other, "Dialing", "Established", "Released", id="whole")])
    await journal.record([other.snapshot(), *other.call("Ringing", id="in")])
    async with site(journal) as here:
        assert len(here.counts.ended) == 2
        assert here.counts.waiting[System.GWS] == 1
    found = {
        row["call_id"]: (row["outcome"], row["answer_s"], row["heard"], row["ended"])
        for row in await sql.fetch(
            "SELECT c.call_id, d.outcome, d.ended_at = c.ended_at AS ended,"
            " d.requested_at = c.opened_at AS heard,"
            " extract(epoch FROM d.connected_at - d.requested_at)::int AS answer_s"
            " FROM dial d JOIN call c ON c.id = d.call_id"
        )
    }
    assert found == {
        "goes on": ("answered", 3, True, True),
        "over": ("unknown", None, True, True),
        "new": (None, None, True, None),
        "whole": ("answered", 1, True, True),
    }


async def test_a_batch_whose_commit_was_not_answered_is_read_back(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """The pipeline hands it in again and hears that it is old: its steps come from the journal."""
    line = Line()
    async with site(journal) as here:
        entries = out(line, "Dialing", "Established", "Released")
        await journal.record(entries)
        here.watch.store_failed()
        assert (await here.hear(*entries)).duplicates == 3
        assert [row["outcome"] for row in await rows(sql, "outcome")] == ["answered"]


async def test_a_full_queue_loses_nothing(journal: Journal, sql: asyncpg.Connection) -> None:
    """What is dropped is read back when the store answers; what an adapter gave is kept."""
    line = Line()
    async with site(journal, queue_max=5) as here:
        dial, _ = await here.watch.place(asked("mine", number="0000000"))
        here.dials.away = True
        telling = asyncio.ensure_future(here.watch.tell(dial.id, Accepted(), T0))  # noqa: TID251 - awaited below
        for number in range(10):
            recorded = await journal.record(out(line, "Dialing", "Established", "Released", id=f"c{number}"))
            here.watch.recorded(recorded)
        here.dials.away = False
        async with asyncio.timeout(WITHIN_S):
            told = await telling
        await here.settle()
        assert told is not None
        assert told.accepted_at == T0
        assert [row["outcome"] for row in await rows(sql, "outcome")] == ["answered"] * 10 + [None]
        assert len(here.counts.ended) == 10


async def test_more_facts_than_may_wait_are_refused_and_counted(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """While the store is away. Whoever gave up waiting makes room, those first whom the journal tells again;
    what was taken is told when the store is back."""
    seen = Sighting(System.NOOJEE, T0, account=1, number=NUMBER, device="410")
    async with site(journal, direct_max=3) as here, asyncio.TaskGroup() as tasks:
        for id in ("d1", "d2", "d3", "d4"):
            await here.watch.place(asked(id))
        here.dials.away = True

        def telling(id: str) -> asyncio.Task[Dial | None]:
            return tasks.create_task(here.watch.tell(id, Accepted(), T0))

        under_way = telling("d1")
        await until(lambda: bool(here.watch._unanswered) and not here.watch._queue)
        heard = tasks.create_task(here.watch.sighted(seen, NoojeeStatus("Ringing"), T0, beside=True))
        given_up, waits = telling("d2"), telling("d3")
        await asyncio.sleep(0)
        with pytest.raises(StoreUnavailable, match="3 facts of dials wait"):
            await here.watch.tell("d4", Accepted(), T0)
        assert here.counts.dropped == 1
        for task in (heard, given_up):
            task.cancel()
        await asyncio.wait((heard, given_up))
        last = telling("d4")
        await asyncio.sleep(0)
        assert here.counts.dropped == 2
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await here.watch.tell("d4", Accepted(), T0)
        assert here.counts.dropped == 3
        here.dials.away = False
        assert [await task for task in (under_way, waits, last)]
        await here.settle()
        accepted = await rows(sql, "id, accepted_at IS NOT NULL AS accepted")
        assert [row["accepted"] for row in accepted] == [True, False, True, True]


async def test_an_answer_that_was_lost_changes_nothing(journal: Journal, sql: asyncpg.Connection) -> None:
    """The same news are handed in again, the dials know them already, and all is shown once."""
    async with site(journal) as here:
        here.dials.lose_answers = 1
        await here.hear(*out(Line(), "Dialing", "Established", "Released"))
        (row,) = await rows(sql)
        assert row["outcome"] == "answered"
        assert await facts(sql, row["id"]) == [("call", "Established"), ("call", "Released")]
        assert [dial.outcome for dial in here.counts.ended] == [Outcome.ANSWERED]
        assert [advance.connected for advance in here.counts.advances].count(True) == 1


# ── placed ────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_placed_dial_from_its_request_to_its_outcome(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """Written before it is sent, accepted, its call found, answered, ended; its call is no second dial."""
    async with site(journal) as here:
        dial, is_new = await here.watch.place(asked(), "key", {"number": NUMBER})
        assert is_new
        (row,) = await rows(sql)
        assert (row["state"], row["idempotency_key"], row["request"]) == (
            "requested", "key", '{"number":"+27821234567"}',
        )  # fmt: skip
        await here.watch.tell(dial.id, Accepted("s1"), T0 + timedelta(seconds=1))
        await here.hear(*out(Line(), "Dialing", "Established", "Released"))
        (row,) = await rows(sql)
        assert (row["id"], row["outcome"], row["match_confidence"], row["session"]) == (
            "d1", "answered", "weak", "s1",
        )  # fmt: skip
        assert row["matched_by"] == ["number", "time"]
        assert row["call_id"] == await sql.fetchval("SELECT id FROM call")
        assert [kind for kind, _ in await facts(sql, "d1")] == ["accepted", "match", "call", "call", "call"]
        again, is_new = await here.watch.place(asked("d2"), "key")
        assert (again.id, again.outcome, is_new) == ("d1", Outcome.ANSWERED, False)


async def test_a_call_that_is_heard_before_the_acknowledgement(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """It is the placed dial's all the same, and the late acknowledgement changes nothing about that."""
    async with site(journal) as here:
        await here.watch.place(asked())
        line = Line()
        await here.hear(*out(line, "Dialing"))
        told = await here.watch.tell("d1", Accepted(), T0 + timedelta(seconds=2))
        assert told is not None
        assert told.reached == "dialing"
        await here.hear(*out(line, "Released"))
        assert [(row["id"], row["state"]) for row in await rows(sql)] == [("d1", "ended")]


async def test_a_dial_that_another_process_placed_finds_its_call(
    journal: Journal, sql: asyncpg.Connection, database: str
) -> None:
    """It is looked for in the store before a call becomes an overheard dial."""
    async with site(journal) as here, await Journal.open(database) as elsewhere:
        await Dials(elsewhere).place(asked())
        await here.hear(*out(Line(), "Dialing", "Released"))
        assert [(row["id"], row["outcome"]) for row in await rows(sql)] == [("d1", "unknown")]


async def test_a_dial_that_another_process_placed_ends_at_its_deadline(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """Nobody here knew of it: a crash between writing and sending leaves such a dial."""
    await Dials(journal).place(asked())
    time = [0.0]
    async with site(journal, clock=lambda: time[0]) as here:
        await Dials(journal).place(asked("d2"))
        time[0] = 10.0
        await here.pass_by(DEADLINES.requested_s + 1)
        time[0] = 20.0
        await here.pass_by(0)
        assert [(row["outcome"], row["expired"]) for row in await rows(sql)] == [("unknown", True)] * 2
        assert here.counts.unmatched == {"dial": 2}


async def test_a_reference_that_comes_late_merges_the_overheard_dial(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """Number and device were another's; then userData says whose call it is. One dial remains."""
    line = Line()
    async with site(journal) as here:
        await here.watch.place(asked(reference="r1"))
        await here.hear(*out(line, "Dialing", number="+4930123456"))
        assert [row["id"] for row in await rows(sql)] != ["d1"]
        await here.hear(
            *out(line, "Established", "Released", number="+4930123456", userData={REFERENCE_KEY: "r1"})
        )
        (row,) = await rows(sql)
        assert (row["id"], row["outcome"], row["match_confidence"]) == ("d1", "answered", "certain")
        assert await sql.fetchval("SELECT merged_into FROM dial WHERE origin = 'overheard'") == "d1"
        assert [dial.id for dial in here.counts.ended] == ["d1"]
        assert here.counts.waiting[System.GWS] == 0
        # Also for who starts anew: the merged one is no dial to end.
    async with site(journal) as again:
        await again.pass_by(DEADLINES.dial_s + 1)
        assert again.counts.ended == []


async def test_a_call_that_is_heard_after_its_dial_expired_is_no_other_dial(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """Its reference, or number and device in time, say whose it is: its end corrects that one, once."""
    line = Line(began=T0 + timedelta(seconds=DEADLINES.requested_s - 10))
    async with site(journal) as here:
        await here.watch.place(asked(reference="r1"))
        await here.pass_by(DEADLINES.requested_s)
        assert [row["outcome"] for row in await rows(sql)] == ["unknown"]
        await here.hear(*out(line, "Dialing", userData={REFERENCE_KEY: "r1"}))
        await here.hear(*out(line, "Established", "Released", userData={REFERENCE_KEY: "r1"}))
        (row,) = await rows(sql)
        assert (row["id"], row["outcome"], row["corrected"], row["match_confidence"]) == (
            "d1", "answered", True, "certain",
        )  # fmt: skip
        await here.hear(*out(line, "Dialing", id="c2"))
        assert [row["origin"] for row in await rows(sql)] == ["overheard", "placed"]


async def test_two_that_may_be_meant_are_ambiguous(journal: Journal, sql: asyncpg.Connection) -> None:
    """None is chosen, both say so, the call is not overheard either; a reference resolves it."""
    line = Line()
    async with site(journal) as here:
        await here.watch.place(asked("d1", reference="r1"))
        await here.watch.place(asked("d2", reference="r2"))
        await here.hear(*out(line, "Dialing"))
        await here.hear(*line.call("Dialing", id="c1", numbers=[NUMBER], kind="AttachedDataChanged"))
        assert [(row["match_confidence"], row["candidates"], row["call_id"]) for row in await rows(sql)] == [
            ("ambiguous", ["d2"], None),
            ("ambiguous", ["d1"], None),
        ]
        assert here.counts.ambiguous == 1
        await here.hear(*out(line, "Released", userData={REFERENCE_KEY: "r2"}))
        first, second = await rows(sql)
        assert (first["outcome"], second["outcome"], second["match_confidence"]) == (
            None,
            "unknown",
            "certain",
        )
        assert second["candidates"] == []


async def test_an_error_message_is_about_the_only_dial_that_waits(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """With its code and text, live or read back after a crash; of two dials it is neither's."""
    line, other = Line(), Line(2)
    error = b'{"error":{"errorCode":415,"errorMessage":"Invalid Destination DN"},"messageType":"EventError"}'
    async with site(journal) as here:
        await here.watch.place(asked())
        await here.hear(line.hear(error, channel="/workspace/v3/voice"))
        assert here.counts.ended == []
        await here.pass_by(DEADLINES.error_s + 1)
        assert here.counts.unmatched == {}
        (row,) = await rows(sql)
        assert (row["outcome"], row["cause_field"], row["cause_code"], row["cause_text"]) == (
            "invalid_number", "ErrorCode", "415", "Invalid Destination DN",
        )  # fmt: skip
        for id in ("d2", "d3"):
            await here.watch.place(placed(id, 2, System.GWS, NUMBER, T0))
        await here.hear(other.hear(error))
        assert here.counts.ambiguous == 1
        assert [row["outcome"] for row in await rows(sql)][1:] == [None, None]
        await here.watch.place(asked("d4", at=T0 + timedelta(seconds=1)))
    await journal.record([line.hear(b'{"data":{"messageType":"ErrorMessage"}}', channel="/v2/me/devices")])
    async with site(journal) as here:
        await here.pass_by(DEADLINES.error_s + 5)
        row = (await rows(sql))[3]
        assert (row["outcome"], row["cause_field"], row["confidence"]) == (
            "failed",
            "ErrorMessage",
            "inferred",
        )


@pytest.mark.parametrize("restarts", [False, True])
async def test_an_error_just_before_its_call_begins_is_not_the_dials(
    journal: Journal, sql: asyncpg.Connection, *, restarts: bool
) -> None:
    """It was of something else that was asked of the device: the call, also after a restart, disproves it."""
    line = Line()
    nameless = b'{"data":{"messageType":"ErrorMessage"}}'
    async with site(journal) as here:
        await here.watch.place(asked(reference="r1"))
        await here.watch.tell("d1", Accepted(), T0)
        await here.hear(line.hear(nameless, channel="/v2/me/devices"))
        if not restarts:
            await here.hear(*out(line, "Dialing", userData={REFERENCE_KEY: "r1"}))
    async with site(journal) as here:
        await here.hear(*out(line, "Dialing", userData={REFERENCE_KEY: "r1"}))
        await here.pass_by(DEADLINES.error_s + 2)
        assert [(row["outcome"], row["cause_field"]) for row in await rows(sql)] == [(None, None)]
        await here.hear(*out(line, "Established", "Released", userData={REFERENCE_KEY: "r1"}))
        assert [(row["id"], row["outcome"], row["corrected"]) for row in await rows(sql)] == [
            ("d1", "answered", False)
        ]


async def test_an_error_of_a_call_that_is_heard_late_is_not_the_next_dials(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """The first expired before its call was heard, and the second waits: the error may be of either."""
    line = Line(began=T0 + timedelta(seconds=50))
    async with site(journal) as here:
        await here.watch.place(asked("d1", reference="r1"))
        await here.pass_by(DEADLINES.requested_s)
        await here.watch.place(asked("d2", at=T0 + timedelta(seconds=50), reference="r2"))
        await here.hear(
            *out(line, "Dialing", userData={REFERENCE_KEY: "r1"}),
            line.hear(b'{"data":{"messageType":"ErrorMessage"}}', channel="/v2/me/devices"),
            *out(line, "Released", userData={REFERENCE_KEY: "r1"}),
            *out(line, "Dialing", "Established", "Released", id="c2", userData={REFERENCE_KEY: "r2"}),
        )
        assert here.counts.ambiguous == 1
        assert [(row["id"], row["outcome"]) for row in await rows(sql)] == [
            ("d1", "unknown"),
            ("d2", "answered"),
        ]


async def test_what_a_refusal_says_is_kept_whatever_it_is(journal: Journal, sql: asyncpg.Connection) -> None:
    """Also text that PostgreSQL cannot hold."""
    async with site(journal) as here:
        await here.watch.place(asked())
        cause = Cause(System.GWS, "statusCode", "1", "a\x00b\ud800")
        told = await here.watch.tell("d1", Refused(cause), T0 + timedelta(seconds=1))
        assert told is not None
        assert told.outcome is Outcome.FAILED
        assert await here.watch.tell("nobody", Accepted(), T0) is None
    (row,) = await rows(sql)
    assert (row["outcome"], row["cause_text"]) == ("failed", "a\ufffdb?")


async def test_a_report_finds_its_dial_and_may_come_late(journal: Journal, sql: asyncpg.Connection) -> None:
    """Click2Dial's record, after the deadline, corrects `unknown` once; one that fits nothing is counted."""
    seen = Sighting(
        System.CLICK2DIAL, T0, account=1, number="0821234567", reference="r1", window_s=DEADLINES.dial_s
    )
    async with site(journal) as here:
        await here.watch.place(asked(system=System.CLICK2DIAL, reference="r1"))
        await here.pass_by(DEADLINES.requested_s)
        assert [dial.outcome for dial in here.counts.ended] == [Outcome.UNKNOWN]
        told = await here.watch.sighted(seen, CallRecord("busy"), here.at)
        assert told is not None
        assert (told.outcome, told.corrected) == (Outcome.BUSY, True)
        assert await here.watch.sighted(seen, CallRecord("busy"), here.at) is None
        assert here.counts.unmatched == {"dial": 1, "report": 1}
    async with site(journal) as here:
        await here.watch.place(asked("d2", system=System.CLICK2DIAL, reference="r2"))
        await here.pass_by(DEADLINES.requested_s)
    async with site(journal) as here:
        seen = Sighting(System.CLICK2DIAL, T0, account=1, reference="r2")
        told = await here.watch.sighted(seen, CallRecord("hungup", "", 5), here.at)
        assert told is not None
        assert (told.id, told.outcome) == ("d2", Outcome.ANSWERED)


async def test_the_same_key_is_the_same_dial(journal: Journal, sql: asyncpg.Connection) -> None:
    """Noojee's events name a call: the next dial of the same number is another one's."""
    seen = Sighting(System.NOOJEE, T0, account=1, number=NUMBER, device="410")
    async with site(journal) as here:
        for id in ("d1", "d2"):
            await here.watch.place(asked(id, system=System.NOOJEE, device="410"))
            told = await here.watch.sighted(seen, NoojeeStatus("Dialing Out"), T0, key=f"{id}.1")
            assert told is not None
            assert (told.id, told.match_confidence) == (id, MatchConfidence.STRONG)
        for id in ("d1", "d2"):
            told = await here.watch.sighted(seen, NoojeeStatus("Connected"), T0, key=f"{id}.1")
            assert told is not None
            assert told.id == id
            assert Evidence.NUMBER in told.matched_by
        assert await here.watch.sighted(seen, NoojeeStatus("Hungup"), T0, key="another") is None


async def test_another_call_of_the_same_extension_is_not_the_dials(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """A leg that shows no number recognises no dial. Should one turn out to lead to another number, it was
    another call's, and the dial is still found by its own."""

    def seen(number: str | None) -> Sighting:
        return Sighting(System.NOOJEE, T0, account=1, number=number, device="410")

    async with site(journal) as here:
        await here.watch.place(asked(system=System.NOOJEE, device="SIP/410"))
        for status in ("Ringing", "No Answer"):
            inbound = NoojeeStatus(status, inbound=True)
            assert await here.watch.sighted(seen(None), inbound, T0, key="k0") is None
        inbound = NoojeeStatus("Connected", inbound=True)
        first = await here.watch.sighted(seen(NUMBER), inbound, T0, key="k1")
        assert first is not None
        other = seen("0399999999")
        for status in ("Dialing Out", "Connected", "Hungup"):
            assert await here.watch.sighted(other, NoojeeStatus(status), T0, key="k1") is None
        assert await here.watch.sighted(seen(NUMBER), NoojeeStatus("Dialing Out"), T0, key="k2") is not None
        told = await here.watch.sighted(seen(NUMBER), NoojeeStatus("Hungup"), T0, key="k2")
        assert told is not None
        assert (told.id, told.outcome) == (first.id, Outcome.UNKNOWN)


async def test_more_dials_than_fit_in_memory_end_as_well(journal: Journal, sql: asyncpg.Connection) -> None:
    """Their calls are looked up in the store, and so are their deadlines."""
    line = Line()
    time = [0.0]
    async with site(journal, dials_max=2, clock=lambda: time[0]) as here:
        names = [f"c{number}" for number in range(6)]
        for name in names:
            await here.hear(*out(line, "Dialing", id=name))
        await here.hear(
            *[entry for name in names[:4] for entry in out(line, "Established", "Released", id=name)]
        )
        assert Counter(row["outcome"] for row in await rows(sql)) == {"answered": 4, None: 2}
        time[0] = 100.0
        await here.pass_by(DEADLINES.dialing_s * 2)
        assert Counter(row["outcome"] for row in await rows(sql)) == {"answered": 4, "unknown": 2}
        here.at = T0
        for id in ("a", "b", "c"):
            await here.hear(*out(line, "Dialing", id=id))
    async with site(journal, dials_max=2) as here:
        await here.hear(
            *[each for id in ("a", "b", "c") for each in out(line, "Established", "Released", id=id)]
        )
        assert Counter(row["outcome"] for row in await rows(sql)) == {"answered": 7, "unknown": 2}


async def test_who_waits_for_an_answer_when_it_ends_gets_an_error(journal: Journal) -> None:
    """Not silence: what was learnt may not be stored."""
    async with asyncio.TaskGroup() as tasks:
        async with site(journal) as here:
            here.dials.away = True
            telling = tasks.create_task(_told(here.watch))
            await asyncio.sleep(0)
            assert here.watch._unanswered
        assert await telling == "The dials are not followed any more: ask again."


async def _told(watch: DialWatch) -> str:
    with pytest.raises(StoreUnavailable) as refused:
        await watch.tell("d1", Accepted(), T0)
    return str(refused.value)


async def test_within_a_second_at_five_hundred_dials_a_second(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """From the commit of a call's end to the row and the metric of its dial, for a second's storm of them."""
    line = Line()
    loop = asyncio.get_running_loop()
    async with site(journal) as here:
        for part in range(5):
            calls = [f"c{part}-{number}" for number in range(100)]
            begin = [entry for id in calls for entry in out(line, "Dialing", id=id)]
            end = [entry for id in calls for entry in out(line, "Established", "Released", id=id)]
            await here.hear(*begin)
            recorded = await journal.record(end)
            committed = loop.time()
            here.watch.recorded(recorded)
            await here.settle()
            assert loop.time() - committed < 1
            assert len(here.counts.ended) == 100 * (part + 1)
    assert await sql.fetchval("SELECT count(*) FROM dial WHERE outcome = 'answered'") == 500


# ── whatever comes, in whatever pieces ────────────────────────────────────────────────────────────────

CALLS = st.lists(
    st.sampled_from(
        [
            ("Dialing", "Released"),
            ("Dialing", "Ringing", "Established", "Released"),
            ("Dialing", "Established", "Held", "Established", "Released", "Completed"),
            ("Ringing", "Established", "Released"),
            ("Dialing",),
        ]
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=CALLS, data=st.data())
def test_crashes_and_repeats_change_no_outcome(
    postgres: Embedded, template: str, calls: list[tuple[str, ...]], data: st.DataObject
) -> None:
    """Batches that are told, told twice, or not told because of a crash: the dials are the same."""
    order = data.draw(st.permutations([id for id, states in enumerate(calls) for _ in states]))
    states = [iter(each) for each in calls]
    told = [(id, next(states[id]), data.draw(st.sampled_from(["told", "twice", "crash"]))) for id in order]

    async def course(doings: Callable[[str], str]) -> list[Any]:
        async with new_database(postgres, template) as dsn, await Journal.open(dsn) as journal:
            await journal.register([AccountRow("ada", "", "lab")])
            line = Line()
            left = list(told)
            while left:
                async with site(journal) as here:
                    while left:
                        id, state, doing = left.pop(0)
                        recorded = await journal.record(out(line, state, id=f"c{id}"))
                        if doings(doing) == "crash":
                            break
                        for _ in range(2 if doings(doing) == "twice" else 1):
                            here.watch.recorded(recorded)
                            await here.settle()
            async with site(journal):
                pass
            connection = await asyncpg.connect(dsn)
            try:
                found = await connection.fetch(
                    "SELECT d.outcome, d.requested_at, d.ringing_at, d.connected_at, d.ended_at,"
                    " d.deadline_at, d.confidence, c.call_id FROM dial d"
                    " JOIN call c ON c.id = d.call_id ORDER BY c.id"
                )
                noted = await connection.fetch(
                    "SELECT f.ordinal, f.at, f.kind, f.said, f.state, f.outcome FROM dial_fact f"
                    " JOIN dial d ON d.id = f.dial_id ORDER BY d.call_id, f.ordinal"
                )
                return [tuple(row) for row in (*found, *noted)]
            finally:
                await connection.close()

    async def both() -> tuple[list[Any], list[Any]]:
        return await course(lambda _: "told"), await course(lambda doing: doing)

    plain, troubled = asyncio.run(both())
    assert troubled == plain
    assert len([each for each in calls if each[0] == "Dialing"]) <= len(plain)


def test_deadlines_of_dials_that_ended_are_not_kept() -> None:
    """However many dials end before their deadline, few of their deadlines stay; one that waits is due."""
    waiting = _Waiting(DIALS_MAX)
    waits = placed("waits", 1, System.GWS, "5001", T0)
    waiting.keep(waits)
    for number in range(3 * STALE_DEADLINES_MAX):
        dial = placed(f"dial {number}", 1, System.GWS, "5002", T0)
        waiting.keep(dial)
        refused = Refused(Cause(System.GWS, "statusCode", "3"))
        waiting.keep(advance(dial, refused, T0).dial)
    assert len(waiting._deadlines) <= STALE_DEADLINES_MAX + 3
    assert waits.deadline_at is not None
    assert waiting.due(waits.deadline_at) == [waits]
