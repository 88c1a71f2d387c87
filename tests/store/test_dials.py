"""Dials in the database: placed once, told in any number of pieces, and never two of one call."""

import asyncio
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from itertools import pairwise

import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from listener.core.calls import Step
from listener.core.dialling import (
    Accepted,
    Advance,
    CallHeard,
    CallRecord,
    Cause,
    Confidence,
    Dial,
    Elapsed,
    Evidence,
    HangupRequested,
    Leg,
    Match,
    MatchConfidence,
    NoojeeStatus,
    NotAnswered,
    Outcome,
    Refused,
    Reported,
    System,
    advance,
    overheard,
    placed,
)
from listener.core.dialnews import Mark, News
from listener.errors import StoreError
from listener.store.dials import Dials
from listener.store.embedded import Embedded
from listener.store.journal import AccountRow, Journal
from tests.store.line import T0, Line
from tests.support.database import new_database

LATER = T0 + timedelta(hours=5)


@pytest.fixture
async def dials(journal: Journal) -> Dials:
    """The write side."""
    return Dials(journal)


@pytest.fixture
async def again(database: str, dials: Dials) -> AsyncIterator[Dials]:
    """Another process on the same database."""
    async with await Journal.open(database) as journal:
        yield Dials(journal)


def asked(id: str = "d", system: System = System.NOOJEE, **fields: str) -> Dial:
    """A dial that is about to be sent, at the account ada."""
    return placed(id, 1, system, "0821234567", T0, **fields)  # type: ignore[arg-type] # texts only


def news(*facts: tuple[str, object]) -> list[News]:
    """These facts of these dials, a second apart."""
    return [
        News(id, T0 + timedelta(seconds=second), fact)  # type: ignore[arg-type] # a fact
        for second, (id, fact) in enumerate(facts, 1)
    ]


async def dial_of(dials: Dials, id: str = "d") -> Dial:
    """The dial as the store has it."""
    (found,) = await dials.take(news((id, Elapsed())))
    assert found is not None
    return found.dial


async def steps(journal: Journal, *states: str) -> tuple[list[Step], tuple[int, ...]]:
    """A call through these states in the journal, and the ids of its messages."""
    recorded = await journal.record(Line().call(*states))
    return list(recorded.steps), recorded.ids


# ── placing ───────────────────────────────────────────────────────────────────────────────────────────


async def test_a_placed_dial_is_there_before_it_is_sent(dials: Dials, again: Dials) -> None:
    """With all its fields, for every other process."""
    dial = asked(device="410", reference="r", caller_id="27110000000", campaign="c\x00d")
    assert await dials.place(dial, "key", {"number": "0821234567"}) == (dial, True)
    (waits,) = await again.waiting(10, T0)
    assert waits.campaign == "c\ufffdd"
    assert waits == placed(
        "d", 1, System.NOOJEE, "0821234567", T0,
        device="410", reference="r", caller_id="27110000000", campaign="c\ufffdd",
    )  # fmt: skip


async def test_a_number_of_any_length_is_kept(dials: Dials, sql: asyncpg.Connection) -> None:
    """Whole, though only its beginning can be looked for."""
    number = "9" * 100_000
    await dials.place(placed("d", 1, System.GWS, number, T0))
    assert await sql.fetchval("SELECT number FROM dial") == number


async def test_the_same_key_never_dials_twice(dials: Dials, again: Dials) -> None:
    """Who comes second gets the first dial as it is now, also by another account or system."""
    assert (await dials.place(asked("d1"), "k"))[1]
    await dials.take(news(("d1", Accepted("s"))))
    kept, is_new = await again.place(asked("d2"), "k")
    assert (kept.id, kept.session, is_new) == ("d1", "s", False)
    for dial in (asked("d3", System.GWS), placed("d4", 2, System.NOOJEE, "1", T0)):
        kept, is_new = await again.place(dial, "k")
        assert (kept.id, is_new) == ("d1", False)
    assert (await again.place(asked("d4"), "another"))[1]
    assert (await again.place(asked("d5")))[1]
    assert (await again.place(asked("d6")))[1]
    with pytest.raises(StoreError, match="d6"):
        await again.place(asked("d6"))


async def test_of_many_at_once_one_dials(dials: Dials, again: Dials, sql: asyncpg.Connection) -> None:
    """Two processes, twenty attempts with one key: a single True, and a single row."""
    answers = await asyncio.gather(
        *(one.place(asked(f"d{n}"), "k") for n in range(10) for one in (dials, again)), return_exceptions=True
    )
    new = [answer for answer in answers if not isinstance(answer, BaseException) and answer[1]]
    assert len(new) == 1
    assert await sql.fetchval("SELECT count(*) FROM dial") == 1
    assert {answer[0].id for answer in answers if not isinstance(answer, BaseException)} == {new[0][0].id}


PLACES = """
import asyncio, sys
from datetime import UTC, datetime
from listener.core.dialling import System, placed
from listener.store.dials import Dials
from listener.store.journal import Journal

async def main():
    async with await Journal.open(sys.argv[1]) as journal:
        dial = placed(sys.argv[2], 1, System.GWS, "1", datetime(2026, 3, 2, tzinfo=UTC))
        print((await Dials(journal).place(dial, "k"))[1])

asyncio.run(main())
"""


async def test_two_processes_that_share_a_key_dial_once(database: str, journal: Journal) -> None:
    """They are started together; one of them may send."""
    started = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", PLACES, database, f"d{number}", stdout=asyncio.subprocess.PIPE
        )
        for number in range(3)
    ]
    said = [(await process.communicate())[0].decode().strip() for process in started]
    assert sorted(said) == ["False", "False", "True"]


# ── telling ───────────────────────────────────────────────────────────────────────────────────────────

CAUSE = Cause(System.NOOJEE, "Code", "-5", "no\x00thing")


async def test_each_kind_of_fact_is_written_in_its_own_words(dials: Dials, sql: asyncpg.Connection) -> None:
    """With its cause and leg, and the dial as it was after it."""
    for id in ("a", "b", "c"):
        await dials.place(asked(id))
    await dials.place(asked("r", System.CLICK2DIAL))
    told = await dials.take(
        news(
            ("a", Accepted("s1")),
            ("a", NoojeeStatus("Ringing", inbound=True)),
            ("a", Reported(CAUSE, Leg.AGENT)),
            ("a", HangupRequested()),
            ("a", NoojeeStatus("Hungup")),
            ("b", NotAnswered(sent=True, system=System.NOOJEE, text="reset")),
            ("c", Refused(CAUSE)),
            ("r", CallRecord("busy", "17", 0.0)),
            ("nobody", Accepted()),
        )
    )
    assert told[-1] is None
    rows = await sql.fetch(
        "SELECT dial_id, kind, said, leg, cause_code, cause_text, state, outcome FROM dial_fact"
        " ORDER BY dial_id, ordinal"
    )
    assert [tuple(row) for row in rows] == [
        ("a", "accepted", "s1", None, None, None, "accepted", None),
        ("a", "status", "Ringing inbound", None, None, None, "dialing_agent", None),
        ("a", "reported", "", "agent", "-5", "no\ufffdthing", "ended", "failed"),
        ("a", "hangup_requested", "", None, None, None, "ended", "failed"),
        ("a", "status", "Hungup", None, None, None, "ended", "failed"),
        ("b", "not_answered", "it may have been sent: reset", None, None, None, "requested", None),
        ("c", "refused", "", None, "-5", "no\ufffdthing", "ended", "failed"),
        ("r", "record", "busy 17 0 s", None, None, None, "ended", "busy"),
    ]


async def test_what_is_stored_is_what_the_core_says(dials: Dials, again: Dials) -> None:
    """Fact by fact through the database, in two processes, or all at once in memory: the same dial."""
    await dials.place(asked())
    facts = (Accepted("s"), NoojeeStatus("Dialing Out"), NoojeeStatus("Connected"), NoojeeStatus("Hungup"))
    here = asked()
    for number, one in enumerate(news(*(("d", fact) for fact in facts))):
        assert one.fact is not None
        here = advance(here, one.fact, one.at).dial
        (told,) = await (dials, again)[number % 2].take([one])
        assert told is not None
        assert told.dial == here
    assert here.outcome is Outcome.ANSWERED
    assert here.confidence is Confidence.INFERRED


async def test_two_that_tell_at_the_same_time_take_turns(
    dials: Dials, again: Dials, sql: asyncpg.Connection
) -> None:
    """Each fact is folded into what the one before left, and none is lost."""
    await dials.place(asked())
    telling = [(dials, again)[turn % 2].take(news(("d", Accepted(str(turn))))) for turn in range(30)]
    told = [advance for (advance,) in await asyncio.gather(*telling) if advance is not None]
    assert [advance.changed for advance in told].count(True) == 1
    assert {advance.dial.session for advance in told} == {advance.dial.session for advance in told[:1]}
    rows = await sql.fetch("SELECT ordinal FROM dial_fact ORDER BY ordinal")
    assert [row[0] for row in rows] == list(range(30))


async def test_an_older_message_is_not_told_again(
    journal: Journal, dials: Dials, sql: asyncpg.Connection
) -> None:
    """Whatever was told with a newer one was told before."""
    (first, *_, last), ids = await steps(journal, "Dialing", "Ringing", "Released")
    opened = overheard(first.call)
    assert opened is not None
    one = News(opened.id, T0, CallHeard(first.call), ids[0], opens=opened)
    two = News(opened.id, T0, CallHeard(last.call), ids[2], opens=opened)
    told = await dials.take([one, two, one])
    assert [advance.changed for advance in told if advance is not None] == [False, True, False]
    error = News(opened.id, T0, Reported(CAUSE), ids[1])
    before = await sql.fetch("SELECT * FROM dial_fact")
    assert await dials.take([error, one]) == [Advance(told[1].dial)] * 2  # type: ignore[union-attr] # it is
    assert await dials.take([one, two]) == [Advance(told[1].dial)] * 2  # type: ignore[union-attr] # it is
    assert await sql.fetch("SELECT * FROM dial_fact") == before


async def test_a_match_and_a_doubt_are_facts(journal: Journal, dials: Dials, sql: asyncpg.Connection) -> None:
    """Which dials are meant, by what, is written down with the dial and with its facts."""
    (step,), (id,) = await steps(journal, "Dialing")
    one, two = asked("d1"), asked("d2")
    for dial in (one, two):
        await dials.place(dial)
    doubt = Match(None, (Evidence.NUMBER,), MatchConfidence.AMBIGUOUS, (one, two))
    await dials.take([News(dial.id, T0, None, id, found=doubt) for dial in (one, two)])
    rows = await sql.fetch("SELECT candidates, call_id FROM dial ORDER BY id")
    assert [tuple(row) for row in rows] == [(["d2"], None), (["d1"], None)]
    sure = Match(one, (Evidence.REFERENCE,), MatchConfidence.CERTAIN, (one,))
    await dials.take([News("d1", T0, CallHeard(step.call), id + 1, found=sure, call=step.call.id)])
    (row,) = await sql.fetch("SELECT candidates, call_id FROM dial WHERE id = 'd1'")
    assert tuple(row) == ([], step.call.id)
    said = await sql.fetch("SELECT said FROM dial_fact WHERE kind = 'match' ORDER BY 1")
    assert [row[0] for row in said] == [
        "ambiguous by number with d1", "ambiguous by number with d2", "certain by reference",
    ]  # fmt: skip


# ── what waits, and what was not told ─────────────────────────────────────────────────────────────────


async def test_what_waits_is_found_again(dials: Dials, again: Dials) -> None:
    """The next deadline first, those that may be corrected, and those that nobody ended."""
    for id, fact in (("a", None), ("b", NoojeeStatus("Dialing Out")), ("c", NoojeeStatus("Busy"))):
        await dials.place(asked(id))
        if fact is not None:
            await dials.take(news((id, fact)))
    await dials.place(placed("gone", 1, System.NOOJEE, "1", T0 - timedelta(hours=3)))
    await dials.take([News("gone", T0, Elapsed())])
    assert [dial.id for dial in await again.waiting(10, T0 - timedelta(hours=4))] == ["a", "b", "gone"]
    assert [dial.id for dial in await again.waiting(10, T0)] == ["a", "b"]
    assert [dial.id for dial in await again.waiting(1, T0)] == ["a"]
    assert [dial.id for dial in await again.overdue(T0 + timedelta(seconds=61), 10)] == ["a"]
    assert [dial.id for dial in await again.unclaimed([1, 2], ["a"])] == ["b"]
    assert await again.unclaimed([2], []) == []


async def test_marks_go_forward(dials: Dials, again: Dials) -> None:
    """An older one, of a slower process, changes nothing."""
    await dials.take([], {1: Mark(10, T0), 2: Mark(5, T0)})
    await again.take([], {1: Mark(9, LATER), 2: Mark(6, LATER)})
    assert await dials.marks() == {1: Mark(10, T0), 2: Mark(6, LATER)}


async def test_what_lies_beyond_the_marks_is_told(journal: Journal, dials: Dials) -> None:
    """Outbound calls that are no dial yet; page after page, and nothing twice."""
    one, two = Line(1), Line(2)
    entries = [*one.call("Dialing", "Released", id="old"), *one.call("Ringing", id="in")]
    recorded = await journal.record(entries)
    await dials.take([], {1: Mark(recorded.ids[-1], entries[-1].received_at)})
    await journal.record([*one.call("Dialing", id="new"), *two.call("Dialing", "Established", id="first")])
    await journal.record(two.call("Dialing", id="known"))
    found = await dials.untold()
    assert [(told.call.call_id, told.call.state, told.began) for told in found] == [
        ("new", "Dialing", True),
        ("first", "Dialing", True),
        ("first", "Established", False),
        ("known", "Dialing", True),
    ]
    last = found[-1].call
    assert await dials.untold((last.account, last.id)) == []
    opened = overheard(last)
    assert opened is not None
    await dials.take([News(opened.id, T0, CallHeard(last), found[-1].notification, opens=opened)])
    assert "known" not in {told.call.call_id for told in await dials.untold()}
    again = await dials.told_again([last.id])
    assert [told.call for told in again] == [last]
    assert [dial.id for dial in await dials.of_calls([last.id, 7])] == [opened.id]


async def test_a_call_that_rings_may_be_a_placed_dials(journal: Journal, dials: Dials) -> None:
    """The agent's own phone rings first: so where a dial waits for its call, inbound ones are told too."""
    await journal.record(Line(1).call("Ringing", id="a"))
    await journal.record(Line(2).call("Ringing", id="b"))
    await dials.place(asked())
    assert [told.call.call_id for told in await dials.untold()] == ["a"]


# ── any pieces ────────────────────────────────────────────────────────────────────────────────────────

FACTS = st.lists(
    st.sampled_from(
        [
            ("a", Accepted("s")),
            ("a", NoojeeStatus("Dialing Out")),
            ("b", NoojeeStatus("Busy")),
            ("a", NoojeeStatus("Connected")),
            ("b", Refused(Cause(System.NOOJEE, "http", "500"))),
            ("a", NoojeeStatus("Hungup")),
            ("b", CallRecord("busy")),
            ("a", Elapsed()),
        ]
    ),
    max_size=8,
)


@settings(max_examples=10, deadline=None)
@given(told=FACTS, cuts=st.lists(st.integers(0, 8), max_size=3))
def test_any_pieces_give_the_same_dials(
    postgres: Embedded, template: str, told: list[tuple[str, object]], cuts: list[int]
) -> None:
    """One transaction or several, by one process or by two that open anew: dials and facts are the same."""

    async def after(pieces: list[list[News]]) -> list[tuple[object, ...]]:
        async with new_database(postgres, template) as dsn:
            for number, piece in enumerate([[], *pieces]):
                async with await Journal.open(dsn) as journal:
                    dials = Dials(journal)
                    if number == 0:
                        await journal.register([AccountRow("ada", "", "lab")])
                        for id in ("a", "b"):
                            await dials.place(asked(id))
                    await dials.take(piece)
            connection = await asyncpg.connect(dsn)
            try:
                rows = await connection.fetch("SELECT * FROM dial_fact ORDER BY dial_id, ordinal")
                kept = await connection.fetch("SELECT * FROM dial ORDER BY id")
                return [tuple(row) for row in (*rows, *kept)]
            finally:
                await connection.close()

    everything = news(*told)
    bounds = [0, *sorted(min(cut, len(everything)) for cut in cuts), len(everything)]
    pieces = [everything[start:end] for start, end in pairwise(bounds)]

    async def both() -> tuple[list[tuple[object, ...]], list[tuple[object, ...]]]:
        return await after([everything]), await after(pieces)

    whole, pieced = asyncio.run(both())
    assert pieced == whole
