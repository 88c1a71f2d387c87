"""Questions about dials: lists and their pages, one dial with its facts and its call, and what fails more."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from listener.core.dialling import (
    Accepted,
    CallHeard,
    CallRecord,
    Cause,
    Dial,
    DialState,
    Fact,
    Leg,
    Match,
    MatchConfidence,
    Origin,
    Outcome,
    Refused,
    System,
    overheard,
    placed,
)
from listener.core.dialnews import News
from listener.core.why import explain
from listener.errors import InvalidRequest
from listener.store.dialled import DialHistory
from listener.store.dials import Dials
from listener.store.journal import Journal
from tests.store.line import T0, Line


@pytest.fixture
async def dials(journal: Journal) -> Dials:
    """The write side."""
    return Dials(journal)


@pytest.fixture
async def history(database: str) -> AsyncIterator[DialHistory]:
    """The questions."""
    async with DialHistory(database) as opened:
        yield opened


def at(minutes: float) -> datetime:
    """So many minutes after the beginning."""
    return T0 + timedelta(minutes=minutes)


async def have(
    dials: Dials,
    id: str,
    *facts: Fact,
    number: str = "0821234567",
    account: int = 1,
    minute: float = 0,
    system: System = System.CLICK2DIAL,
    **fields: Any,
) -> Dial:
    """A placed dial that was told these facts."""
    dial = placed(id, account, system, number, at(minute), **fields)
    await dials.place(dial)
    for second, fact in enumerate(facts, 1):
        (advance,) = await dials.take([News(id, at(minute) + timedelta(seconds=second), fact)])
        assert advance is not None
        dial = advance.dial
    return dial


async def ids(history: DialHistory, **wanted: Any) -> list[str]:
    """The ids of the dials that are found."""
    return [each.dial.id for each in (await history.dials(**wanted)).dials]


async def test_what_is_asked_for_is_found(dials: Dials, history: DialHistory) -> None:
    """By time, account, tenant, system, origin, campaign, outcome, cause, leg and number, newest first."""
    await have(dials, "busy", CallRecord("busy"), minute=1, campaign="spring")
    await have(dials, "machine", CallRecord("voicemail"), minute=2, account=2, number="+44 20 7946 0000")
    refused = Refused(Cause(System.NOOJEE, "http", "500"))
    await have(dials, "failed", refused, minute=3, system=System.NOOJEE, number="410")
    await have(dials, "waits", Accepted(), minute=4)

    assert await ids(history) == ["waits", "failed", "machine", "busy"]
    assert await ids(history, since=at(2), until=at(4)) == ["failed", "machine"]
    assert await ids(history, accounts=["bob"]) == ["machine"]
    assert await ids(history, tenant="elsewhere") == []
    assert await ids(history, systems=[System.NOOJEE]) == ["failed"]
    assert await ids(history, systems=[System.NOOJEE, System.CLICK2DIAL], until=at(4)) == [
        "failed",
        "machine",
        "busy",
    ]
    assert await ids(history, origin=Origin.OVERHEARD) == []
    assert await ids(history, campaigns=["spring", "autumn"]) == ["busy"]
    now, _ = await history.tallies(at(0), at(9), campaigns=["spring"])
    assert [(each.campaign, each.dials) for each in now] == [("spring", 1)]
    assert await ids(history, outcomes=[Outcome.BUSY, Outcome.FAILED]) == ["failed", "busy"]
    assert await ids(history, waiting=True) == ["waits"]
    assert await ids(history, waiting=False, outcomes=[Outcome.BUSY]) == ["busy"]
    assert await ids(history, cause="http 500") == ["failed"]
    assert await ids(history, cause="voicemail") == ["machine"]
    assert await ids(history, leg=None, cause="nothing") == []
    for spelling in ("0821234567", "+27821234567", "0027821234567"):
        assert await ids(history, number=spelling) == ["waits", "busy"]
    assert await ids(history, number="410") == ["failed"]
    assert await ids(history, number="10") == []
    assert await ids(history, number_ends="0000") == ["machine"]


async def test_pages_meet(dials: Dials, history: DialHistory) -> None:
    """Each dial once, also those of the same moment; the last page says so; a stranger's place is refused."""
    for number in range(7):
        await have(dials, f"d-{number}", minute=number // 3)
    found: list[str] = []
    after = None
    while True:
        page = await history.dials(limit=3, after=after)
        found += [each.dial.id for each in page.dials]
        after = page.after
        if after is None:
            break
    assert found == ["d-6", "d-5", "d-4", "d-3", "d-2", "d-1", "d-0"]
    for stranger in ("", "x", "-", "9" * 5000 + "-d-1", "99999999999999999999-d-1"):
        with pytest.raises(InvalidRequest, match="not where a page ended"):
            await history.dials(after=stranger)


async def test_an_auditor_sees_how_an_outcome_was_reached(
    journal: Journal, dials: Dials, history: DialHistory
) -> None:
    """Every fact in order with its message, the dial as it was then, and the call with its owner."""
    recorded = await journal.record(Line().call("Dialing", "Established", "Released", numbers=["0821234567"]))
    await dials.place(placed("d", 1, System.GWS, "0821234567", T0), "k", {"number": "0821234567"})
    first, *later = recorded.steps
    here = placed("d", 1, System.GWS, "0821234567", T0)
    found = Match(here, (), MatchConfidence.STRONG, (here,))
    news = [News("d", at(0), CallHeard(first.call), recorded.ids[0], found=found, call=first.call.id)]
    news += [
        News("d", at(0), CallHeard(step.call), id) for step, id in zip(later, recorded.ids[1:], strict=True)
    ]
    await dials.take(news)

    timeline = await history.dial("d")
    assert timeline is not None
    assert timeline.found.account == "ada"
    assert (timeline.found.dial.outcome, timeline.found.key) == (Outcome.ANSWERED, "k")
    assert timeline.request == {"number": "0821234567"}
    assert [(fact.kind, fact.said, fact.notification, fact.state) for fact in timeline.facts] == [
        ("match", "strong by nothing", recorded.ids[0], DialState.REQUESTED),
        ("call", "Dialing", recorded.ids[0], DialState.DIALING),
        ("call", "Established", recorded.ids[1], DialState.CONNECTED),
        ("call", "Released", recorded.ids[2], DialState.ENDED),
    ]
    assert timeline.call is not None
    assert timeline.call.call == later[-1].call
    assert await history.dial("nobody") is None


async def test_a_cause_is_shown_in_its_own_words(dials: Dials, history: DialHistory) -> None:
    """With the fact that said it, and with the dial."""
    cause = Cause(System.NOOJEE, "Code", "-5", "Expired timestamp")
    dial = await have(dials, "d", Refused(cause), system=System.NOOJEE)
    timeline = await history.dial("d")
    assert timeline is not None
    assert timeline.found.dial == dial
    assert [fact.cause for fact in timeline.facts] == [cause]
    assert [fact.outcome for fact in timeline.facts] == [Outcome.NOT_ALLOWED]


async def test_what_was_merged_stands_in_no_list(
    journal: Journal, dials: Dials, history: DialHistory
) -> None:
    """It is asked for by its id, and says which dial it is."""
    recorded = await journal.record(Line().call("Dialing"))
    call = recorded.steps[0].call
    opened = overheard(call)
    assert opened is not None
    await dials.take([News(opened.id, T0, CallHeard(call), recorded.ids[0], opens=opened)])
    await have(dials, "d")
    await dials.take([News("d", at(1), Accepted(), merges=opened.id)])
    assert await ids(history) == ["d"]
    merged = await history.dial(opened.id)
    assert merged is not None
    assert merged.found.merged_into == "d"
    assert merged.facts[-1].kind == "merged"


async def test_tallies_are_of_what_is_decided(dials: Dials, history: DialHistory) -> None:
    """Alike dials together, of this period and the one before; a waiting one is in none."""
    busy = CallRecord("busy")
    for number in range(3):
        await have(dials, f"now-{number}", busy, minute=60 + number, caller_id="27110000000", device="410")
    await have(dials, "answered", CallRecord("hungup", "", 5), minute=61, account=2)
    await have(dials, "waits", Accepted(), minute=62)
    await have(dials, "before", CallRecord("hungup", "", 5), minute=30, campaign="c")
    await have(dials, "long before", busy, minute=-30)

    now, before = await history.tallies(at(60), at(120))
    assert [
        (each.account, each.outcome, each.cause, each.number_prefix, each.dials, each.caller_id, each.device)
        for each in now
    ] == [
        ("ada", Outcome.BUSY, "end_reason busy", "2782123", 3, "27110000000", "410"),
        ("bob", Outcome.ANSWERED, "", "2782123", 1, "", ""),
    ]
    assert (now[0].first_at, now[0].last_at) == (at(60), at(62))
    assert [(each.leg, each.example) for each in now] == [(Leg.CALLEE, "now-2"), (None, "")]
    assert [(each.outcome, each.campaign, each.dials) for each in before] == [(Outcome.ANSWERED, "c", 1)]
    _, longer = await history.tallies(at(60), at(120), before=at(-60))
    assert sum(each.dials for each in longer) == 2
    assert await history.tallies(at(60), at(120), accounts=["bob"], systems=[System.GWS]) == ([], [])
    with pytest.raises(InvalidRequest, match="no time before it"):
        await history.tallies(datetime(1, 1, 1, tzinfo=UTC), at(0))


MANY = """
    INSERT INTO dial (id, account_id, system, origin, number, number_normalised, requested_at, state, reached,
        connected_at, ended_at, outcome, leg, ended_by, cause_system, cause_field, cause_code, confidence,
        expired, corrected, matched_by, candidates, facts, heard_id, device)
    SELECT 'd' || n, 1 + n % 2, 'gws', 'overheard', number, number, at, 'ended', 'dialing',
        CASE WHEN n % 10 < 8 THEN at END, at, CASE WHEN n % 10 < 8 THEN 'answered' ELSE 'busy' END, 'callee',
        'unknown', 'gws', 'CallState', (n % 7)::text, 'stated', false, false, '{}', '{}', 2, 0,
        (n % 50)::text
    FROM (
        SELECT n, $1::timestamptz + n * interval '70 milliseconds' AS at,
            '27' || (n % 31 + 60) || lpad((n::bigint * 7919 % 10000000)::text, 7, '0') AS number
        FROM generate_series(0, 99999) AS n
    ) AS made"""


async def test_a_hundred_thousand_dials_are_answered_for(
    history: DialHistory, journal: Journal, sql: asyncpg.Connection
) -> None:
    """What `--why` asks, a page of a filtered list, and one dial by its number, within what a question may
    take."""
    await sql.execute(MANY, T0)
    await sql.execute("ANALYZE dial")
    now, before = await history.tallies(at(58), at(120))
    assert sum(each.dials for each in (*now, *before)) == 100_000
    assert explain(now, before).now.dials == sum(each.dials for each in now)
    page = await history.dials(outcomes=[Outcome.BUSY], cause="CallState 3", accounts=["ada"])
    assert len(page.dials) == 50
    assert len((await history.dials(number_ends="7919")).dials) > 0
