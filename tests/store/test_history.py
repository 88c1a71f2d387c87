"""The questions: which calls, what happened on one, and how much of it anybody could have seen."""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy import event

from listener.core.calls import Cover, Direction, Heard, Source
from listener.errors import SchemaOutdated, StoreError
from listener.store import history as module
from listener.store.claim import Claim
from listener.store.history import Account, Gap, History, Present, assess
from listener.store.journal import AccountRow, Journal
from tests.core import messages
from tests.store.line import T0, Line

HOUR = timedelta(hours=1)


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = T0 + HOUR

    def __call__(self) -> datetime:
        """What a clock says."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    """One hour after the beginning."""
    return Clock()


@pytest.fixture
async def claim(database: str) -> AsyncIterator[Claim]:
    """What a listener holds that runs."""
    taken = await Claim.take(database)
    yield taken
    await taken.release()


@pytest.fixture
async def history(
    database: str,
    clock: Clock,
    claim: Claim,
) -> AsyncIterator[History]:
    """The questions, to this test's database, on which a listener runs."""
    async with History(database, clock=clock) as opened:
        yield opened


def at(seconds: float) -> datetime:
    """So long after the beginning."""
    return T0 + timedelta(seconds=seconds)


async def added(sql: asyncpg.Connection, **seconds: float) -> None:
    """Accounts, and how long after the beginning they were added: the database would say "now"."""
    for name, after in seconds.items():
        await sql.execute("UPDATE account SET added_at = $2 WHERE name = $1", name, at(after))


async def names(history: History, **asked: object) -> list[str]:
    """The call ids that an answer lists, in its order."""
    page = await history.calls(**asked)  # type: ignore[arg-type]
    return [found.call.call_id for found in page.calls]


# ── lists ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_newest_call_comes_first_with_its_account(journal: Journal, history: History) -> None:
    """Each with all its fields, as the journal last wrote it."""
    recorded = await journal.record(
        Line(1).call("Ringing", "Established", id="old", userData={"k": 1.0})
        + Line(2, began=at(60)).call("Ringing", id="new")
    )

    page = await history.calls()

    assert [(found.account, found.tenant, found.call.call_id) for found in page.calls] == [
        ("bob", "acme", "new"),
        ("ada", "acme", "old"),
    ]
    assert page.calls[1].call == recorded.steps[1].call
    assert page.after is None


async def test_pages_follow_each_other_without_gap_or_repeat(journal: Journal, history: History) -> None:
    """Also where calls began at the same moment, and where new ones appear meanwhile."""
    lines = [Line(1), Line(1), Line(2)]
    await journal.record(
        [
            entry
            for n in range(4)
            for i, line in enumerate(lines)
            for entry in line.call("Ringing", id=f"{n}{i}")
        ]
    )
    everything = await names(history, limit=100)
    assert len(everything) == 12

    seen: list[str] = []
    after = None
    while True:
        page = await history.calls(limit=5, after=after)
        seen += [found.call.call_id for found in page.calls]
        await journal.record(Line(1, began=at(3000 + len(seen))).call("Ringing", id=f"later-{len(seen)}"))
        after = page.after
        if after is None:
            break
    assert seen == everything


@pytest.mark.parametrize("after", ["", "x", "1-", "1-y", "99999999999999999999-1"])
async def test_a_cursor_that_is_none_is_refused(after: str, journal: Journal, history: History) -> None:
    """With the cure, and not with a traceback."""
    with pytest.raises(StoreError, match="after"):
        await history.calls(after=after)


async def test_calls_are_found_by_time_account_tenant_and_state(journal: Journal, history: History) -> None:
    """Each condition narrows; the period is that of a call's beginning, its end excluded."""
    await journal.register([AccountRow("eve", "globex", "lab")])
    await journal.record(
        Line(1).call("Ringing", "Established", id="a")  # at 1 s
        + Line(2, began=at(9)).call("Ringing", "Released", id="b")  # at 10 s
        + Line(3, began=at(19)).call("Dialing", id="c")  # at 20 s
    )

    assert await names(history, since=at(10)) == ["c", "b"]
    assert await names(history, until=at(10)) == ["a"]
    assert await names(history, since=at(1), until=at(20)) == ["b", "a"]
    assert await names(history, accounts=["ada"]) == ["a"]
    assert await names(history, accounts=["ada", "eve"]) == ["c", "a"]
    assert await names(history, tenant="acme") == ["b", "a"]
    assert await names(history, tenant="acme", accounts=["eve"]) == []
    assert await names(history, tenant=["acme", "globex"]) == ["c", "b", "a"]
    assert await names(history, direction=Direction.OUTBOUND) == ["c"]
    assert await names(history, direction=Direction.INBOUND) == ["b", "a"]
    assert await names(history, state="Released") == ["b"]
    assert await names(history, live=True) == ["c", "a"]
    assert await names(history, live=False) == ["b"]
    assert [found.call.call_id for found in await history.live()] == ["c", "a"]


async def test_a_number_is_found_wherever_it_took_part(journal: Journal, history: History) -> None:
    """As the other party, as a third party that left again, as the account's own, and as the dialled one."""
    line = Line(1)
    await journal.record(
        line.call("Ringing", id="other", numbers=("+19165550104",))
        + line.call("Established", id="third", numbers=("7001",))
        + line.call("Established", id="third", numbers=("7001", "9165550104"))
        + line.call("Established", id="third", numbers=("7001",))
        + line.call("Ringing", id="own", numbers=("7002",), phoneNumber="+1 916 555-0104")
        + line.call("Ringing", id="dialled", numbers=("7003",), dnis="19165550104")
        + line.call("Ringing", id="none", numbers=("7004",))
    )

    assert await names(history, number="19165550104") == ["dialled", "other"]
    assert await names(history, number="+19165550104") == ["dialled", "other"]
    assert await names(history, number_ends="9165550104") == ["dialled", "third", "other"]
    assert await names(history, number_ends="0104") == ["dialled", "own", "third", "other"]
    assert await names(history, number="0104") == []
    assert len(await names(history, number=messages.DN)) == 5  # the account's own, or the one dialled
    assert await names(history, number_ends="0104", since=at(6)) == ["dialled"]


async def test_an_international_spelling_is_found_too(journal: Journal, history: History) -> None:
    """`e164Number` may differ from the number that stands for the party."""
    party = {"phoneNumber": "5550104", "e164Number": "+19165550104", "digits": "5550104"}
    await journal.record(Line().call("Ringing", participants=[party]))

    assert await names(history, number="+19165550104") == [messages.UUID]


@pytest.mark.parametrize("ending", ["%", "_", "\\", "1%4"])
async def test_what_like_means_is_taken_literally(ending: str, journal: Journal, history: History) -> None:
    """A percent sign is no number."""
    await journal.record(Line().call("Ringing", numbers=("+19165550104",)))

    assert await names(history, number_ends=ending) == []


# ── one call ──────────────────────────────────────────────────────────────────────────────────────────


async def test_a_timeline_tells_every_message_and_what_it_changed(journal: Journal, history: History) -> None:
    """In order, with both clocks, the message itself, and also messages that changed nothing."""
    line = Line()
    entries = [
        line.hear(messages.message("Ringing", server_ms=1_772_442_000_123)),
        line.hear(messages.message("Ringing", "DtmfSent")),
        line.hear(messages.message("Levitating", numbers=(messages.NUMBER, "7044"))),
    ]
    await journal.record(entries)

    (timeline,) = await history.call(messages.UUID)

    assert [moment.raw for moment in timeline.moments] == [entry.raw for entry in entries]
    assert [moment.at for moment in timeline.moments] == [entry.received_at for entry in entries]
    first, second, third = timeline.moments
    assert first.server_at == datetime.fromisoformat("2026-03-02T09:00:00.123Z")
    assert (first.message_type, first.notification_type) == ("CallStateChangeMessage", "StatusChange")
    assert first.notification == timeline.found.call.id
    assert ("state", None, "Ringing") in {
        (c.field, c.before, c.after) for c in first.changes if c.field == "state"
    }
    assert (second.notification_type, second.changes) == ("DtmfSent", ())
    assert [(odd.kind, odd.detail) for odd in third.anomalies] == [("unknown_state", "Levitating")]
    assert [(c.field, c.key) for c in third.changes if c.field == "participant"] == [("participant", "7044")]
    assert [party.number for party in timeline.found.call.parties] == [messages.NUMBER, "7044"]


async def test_a_snapshot_that_changed_a_call_is_in_its_timeline(journal: Journal, history: History) -> None:
    """Though it is about several calls and filed under none."""
    line = Line()
    await journal.record(line.call("Ringing", id="mine"))
    await journal.record([line.snapshot(messages.resource("Held", id="mine", connId="conn-mine"))])

    (timeline,) = await history.call("mine")

    assert [moment.source for moment in timeline.moments] == [Source.COMETD, Source.SNAPSHOT]
    assert ("state", "Ringing", "Held") in {
        (change.field, change.before, change.after)
        for change in timeline.moments[1].changes
        if change.field == "state"
    }


async def test_a_call_is_found_by_our_id_and_by_every_alias(journal: Journal, history: History) -> None:
    """An id of the contact centre may name the legs of several accounts; ours names one call."""
    await journal.record(
        Line(1).call("Dialing", connId="aa") + Line(2, began=at(5)).call("Ringing", connId="bb")
    )

    legs = await history.call(messages.UUID)
    assert [leg.found.account for leg in legs] == ["bob", "ada"]
    assert [leg.found.account for leg in await history.call("aa")] == ["ada"]
    (by_id,) = await history.call(str(legs[0].found.call.id))
    assert by_id == legs[0]


async def test_an_id_that_was_used_again_names_both_calls(journal: Journal, history: History) -> None:
    """The newer first; the older is reached by its callUuid still."""
    line = Line()
    await journal.record(line.call("Ringing", "Released", "Ringing"))

    assert [leg.found.call.state for leg in await history.call(messages.UUID)] == ["Ringing", "Released"]


@pytest.mark.parametrize("name", ["nothing", "0", "99999999999999999999999", "²", ""])
async def test_a_name_that_names_nothing_has_no_calls(name: str, journal: Journal, history: History) -> None:
    """Neither an error nor a guess."""
    assert await history.call(name) == ()


# ── what was observed ─────────────────────────────────────────────────────────────────────────────────


async def test_coverage_leaves_no_moment_out(
    journal: Journal, history: History, clock: Clock, sql: asyncpg.Connection
) -> None:
    """Before the first row, between rows and in gaps, it says that nobody listened, and why."""
    await added(sql, ada=-10)
    await journal.cover([Cover(1, at(100)), Cover(1, at(160), "disconnected"), Cover(1, at(170))])
    await journal.heartbeat([1], at(395))
    clock.now = at(400)

    told = await history.coverage(since=at(0), until=at(4000), accounts=["ada"])

    assert (told.since, told.until) == (at(0), at(400))
    assert [(s.since, s.until, s.cause) for s in told.stretches] == [
        (at(0), at(100), "not started"),
        (at(100), at(160), ""),
        (at(160), at(170), "disconnected"),
        (at(170), at(400), ""),
    ]
    assert told.observed == pytest.approx(290 / 400)
    assert told.gaps_s == {"not started": 100, "disconnected": 10}
    (ada,) = told.accounts
    assert (ada.account, ada.tenant, ada.since, ada.until) == ("ada", "acme", at(0), at(400))
    assert ada.gaps == (Gap(at(0), at(100), "not started"), Gap(at(160), at(170), "disconnected"))
    assert ada.last == Present("", at(170))
    figures = ada.figures
    assert (figures.asked_s, figures.observed_s, figures.percent) == (400, 290, 72.5)
    assert (figures.gaps, figures.longest_gap_s) == (2, 100)
    assert figures.causes_s == {"disconnected": 10, "not started": 100}
    assert (told.now, told.asked_until) == (at(400), at(4000))


async def test_an_account_counts_from_when_it_was_added(
    journal: Journal, history: History, clock: Clock, sql: asyncpg.Connection
) -> None:
    """What nobody promised to watch is not missing; where a row is older, the database's clock is wrong."""
    await journal.cover([Cover(1, at(0)), Cover(2, at(60))])
    await journal.heartbeat([1, 2], at(100))
    await added(sql, ada=0, bob=50)
    clock.now = at(100)

    told = await history.coverage(since=at(0))
    assert {each.account: (each.since, each.figures.percent) for each in told.accounts} == {
        "ada": (at(0), 100.0),
        "bob": (at(50), 80.0),
    }
    assert (await history.calls(since=at(0))).observed == pytest.approx(140 / 150)
    await added(sql, bob=70)
    bob = (await history.coverage(since=at(0), accounts=["bob"])).accounts[0]
    assert (bob.since, bob.figures.percent) == (at(60), 100.0)


async def test_the_worst_come_first_and_tenants_are_added_up(
    journal: Journal, history: History, clock: Clock, sql: asyncpg.Connection
) -> None:
    """A limit bounds what is handed out, and neither the figures nor the count."""
    await journal.register([AccountRow(name, "globex", "lab") for name in ("cy", "di", "eve")])
    await journal.cover([Cover(account, at(0)) for account in (1, 2, 3, 4, 5)])
    await journal.cover(
        [Cover(2, at(90), "stalled"), Cover(3, at(80), "disconnected"), Cover(4, at(95), "x")]
    )
    await journal.heartbeat([1, 5], at(100))
    await added(sql, ada=0, bob=0, cy=0, di=0, eve=0)
    clock.now = at(100)

    told = await history.coverage(since=at(0), limit=2)

    assert [each.account for each in told.accounts] == ["cy", "bob"]
    assert told.not_shown == 3
    assert told.total.percent == 93.0
    assert told.total.causes_s == {"disconnected": 20, "stalled": 10, "x": 5}
    assert [(each.tenant, each.accounts, each.figures.percent) for each in told.tenants] == [
        ("globex", 3, 100 * (275 / 300)),
        ("acme", 2, 95.0),
    ]
    everybody = await history.coverage(since=at(0))
    assert [each.account for each in everybody.accounts] == ["cy", "bob", "di", "ada", "eve"]
    assert (await history.coverage(tenant=["acme", "globex"])).total.asked_s == 500
    assert (await history.coverage(tenant="globex")).total.asked_s == 300


async def test_a_gap_that_goes_on_is_told_with_its_beginning(
    journal: Journal, history: History, clock: Clock
) -> None:
    """Also where that lies before the asked time, and also where only the silence of the daemon says so."""
    await journal.cover([Cover(1, at(0)), Cover(1, at(100), "disconnected"), Cover(2, at(0))])
    await journal.heartbeat([2], at(200))
    clock.now = at(5000)

    told = await history.coverage(since=at(4000))

    assert {each.account: each.last for each in told.accounts} == {
        "ada": Present("disconnected", at(100)),
        "bob": Present("not started", at(200)),
    }
    assert all(each.gaps[0].since == at(4000) for each in told.accounts)
    assert told.total.percent == 0.0
    then = await history.coverage(since=at(50), until=at(150))
    assert {each.account: each.last for each in then.accounts} == {
        "ada": Present("disconnected", at(100)),
        "bob": Present("", at(0)),
    }


async def test_before_the_first_account_and_after_now_nothing_is_claimed(
    journal: Journal, history: History, clock: Clock, sql: asyncpg.Connection
) -> None:
    """No account was asked for anything then; the answer says when the first was added, and what now is."""
    await journal.cover([Cover(1, at(100))])
    await added(sql, ada=50)
    clock.now = at(200)

    before = await history.coverage(since=at(0), until=at(40), accounts=["ada"])
    unwatched = await history.coverage(since=at(50), until=at(90), accounts=["ada"])
    future = await history.coverage(since=at(300), until=at(400), accounts=["ada"])
    nobody = await history.coverage(accounts=["zoe"])

    assert (before.accounts, before.total.percent, before.first_at) == ((), None, at(50))
    assert unwatched.accounts[0].gaps == (Gap(at(50), at(90), "not started"),)
    assert unwatched.accounts[0].last == Present("not started", at(50))
    assert (future.accounts, future.total.percent) == ((), None)
    assert (future.since, future.until, future.now) == (at(300), at(300), at(200))
    assert (nobody.accounts, nobody.first_at) == ((), None)


_SPAN = 24
_MOMENTS = st.integers(0, _SPAN)
_ROWS = st.lists(
    st.tuples(_MOMENTS, _MOMENTS, st.sampled_from(["", "not started", "stalled", "x"])), max_size=8
)


@given(_ROWS, _MOMENTS, _MOMENTS, _MOMENTS, st.none() | _MOMENTS)
@example([(0, 9, "x"), (3, 20, ""), (4, 4, "stalled")], 5, 15, 0, None)
@example([(1, 4, ""), (6, 9, "")], 0, 12, 0, 11)
@settings(max_examples=500, derandomize=True, deadline=None)
def test_percent_and_gaps_are_exactly_the_period(
    rows: list[tuple[int, int, str]], since: int, until: int, existed: int, removed: int | None
) -> None:
    """Whatever the rows and the cut-offs, also rows that overlap, run backwards or leave holes: each unit of
    time is observed or in one gap of the right cause, and the seconds add up to the microsecond."""

    def instant(unit: int) -> datetime:
        return T0 + unit * timedelta(microseconds=333_333)

    rows = sorted(rows, key=lambda row: row[0])
    told = [(instant(first), instant(last), cause) for first, last, cause in rows]
    until = max(since, until)
    who = Account("ada", "", instant(existed), instant(removed) if removed is not None else None)

    answer = assess(who, told, instant(since), instant(until))

    asked = [
        unit for unit in range(since, until) if existed <= unit < (_SPAN if removed is None else removed)
    ]
    expected = {
        unit: next((cause for first, last, cause in rows if first <= unit < last), "not started")
        for unit in asked
    }
    found = {
        unit: stretch.cause
        for stretch in answer.stretches
        for unit in range(_SPAN)
        if stretch.since <= instant(unit) < stretch.until
    }
    assert found == expected
    figures = answer.figures
    exact = [round(each * 1_000_000) for each in (figures.observed_s, *figures.causes_s.values())]
    assert sum(exact) == round(figures.asked_s * 1_000_000) == len(asked) * 333_333
    assert exact[0] == 333_333 * list(expected.values()).count("")
    assert figures.gaps == len(answer.gaps)
    assert figures.percent == (100 * (exact[0] / (len(asked) * 333_333)) if asked else None)
    assert (figures.percent == 100) == bool(asked and not answer.gaps)
    for one, next_ in zip(answer.gaps, answer.gaps[1:], strict=False):
        assert one.until < next_.since or (one.until == next_.since and one.cause != next_.cause)


async def test_the_accounts_that_there_are_and_were(
    journal: Journal, history: History, sql: asyncpg.Connection
) -> None:
    """By name, with their tenants, and until when."""
    await added(sql, ada=0, bob=1)
    await journal.retire([2], at(50))

    assert await history.accounts() == (
        Account("ada", "acme", at(0), None),
        Account("bob", "acme", at(1), at(50)),
    )


async def test_silence_is_not_observation(journal: Journal, history: History, clock: Clock) -> None:
    """A daemon that was killed left its row open; it ended with its last heartbeat, as a restart will say."""
    await journal.cover([Cover(1, at(0))])
    await journal.heartbeat([1], at(100))
    clock.now = at(100 + module.SILENT_S_MAX - 1)
    while_beating = await history.coverage(since=at(0), accounts=["ada"])
    clock.now = at(1000)

    told = await history.coverage(since=at(0), accounts=["ada"])

    assert while_beating.observed == pytest.approx(1.0)
    assert [(s.since, s.until, s.cause) for s in told.stretches] == [
        (at(0), at(100), ""),
        (at(100), at(1000), "not started"),
    ]
    assert (await history.calls(since=at(0), accounts=["ada"])).observed == pytest.approx(0.1)


async def test_without_a_listener_silence_begins_at_once(
    journal: Journal, history: History, claim: Claim, clock: Clock, sql: asyncpg.Connection
) -> None:
    """A daemon that is killed loses its claim, and nobody has to wait until it has been silent for long."""
    await added(sql, ada=0, bob=0)
    await journal.cover([Cover(1, at(0)), Cover(2, at(0))])
    await journal.heartbeat([1], at(10))
    clock.now = at(20)
    assert (await history.coverage(since=at(0))).total.percent == 100

    await claim.release()

    async with asyncio.timeout(10):
        while (told := await history.coverage(since=at(0), accounts=["ada"])).total.percent == 100:
            pass
    assert [(s.since, s.until, s.cause) for s in told.stretches] == [
        (at(0), at(10), ""),
        (at(10), at(20), "not started"),
    ]
    assert (await history.coverage(since=at(0), accounts=["bob"])).total.percent == 0
    assert (await history.calls(since=at(0))).observed == pytest.approx(0.25)


async def test_no_call_and_nobody_listening_are_different_answers(
    journal: Journal, history: History, clock: Clock, sql: asyncpg.Connection
) -> None:
    """An empty list says how much of the asked time and accounts was observed."""
    await added(sql, ada=0, bob=0)
    clock.now = at(100)
    assert (await history.calls()).observed == 0.0
    await journal.cover([Cover(1, at(0)), Cover(2, at(50), "login refused")])
    await journal.heartbeat([1], at(100))

    watched = await history.calls(since=at(0), accounts=["ada"])
    deaf = await history.calls(since=at(0), accounts=["bob"])
    both = await history.calls(since=at(0), tenant="acme")

    assert watched.calls == deaf.calls == ()
    assert watched.observed == pytest.approx(1.0)
    assert deaf.observed == 0.0
    assert both.observed == pytest.approx(0.5)
    assert (both.since, both.until) == (at(0), at(100))


async def test_without_a_beginning_the_answer_is_about_the_time_since_we_came(
    journal: Journal, history: History, clock: Clock, sql: asyncpg.Connection
) -> None:
    """Nobody can have observed what was before."""
    await added(sql, ada=1000, bob=1000)
    await journal.cover([Cover(1, at(1000)), Cover(2, at(1100))])
    await journal.heartbeat([1, 2], at(1200))
    clock.now = at(1200)

    page = await history.calls()

    assert (page.since, page.until) == (at(1000), at(1200))
    assert page.observed == pytest.approx(300 / 400)


async def test_an_answer_is_about_no_time_before_we_came(
    journal: Journal, history: History, clock: Clock, sql: asyncpg.Connection
) -> None:
    """Asked for an hour, ten minutes after the first account was added: the share is of those ten minutes,
    and the answer says so."""
    await added(sql, ada=3000)
    await journal.cover([Cover(1, at(3000)), Cover(1, at(3300), "stopped")])
    clock.now = at(3600)
    page = await history.calls(since=at(0))
    assert (page.since, page.until) == (at(3000), at(3600))
    assert page.observed == pytest.approx(0.5)


async def test_a_retired_account_counts_until_it_went(
    journal: Journal, history: History, clock: Clock
) -> None:
    """What nobody promised to watch is not missing."""
    await journal.cover([Cover(1, at(0)), Cover(2, at(0))])
    await journal.retire([2], at(50))
    await journal.heartbeat([1], at(100))
    clock.now = at(100)

    told = await history.coverage(since=at(0))
    assert told.observed == pytest.approx(1.0)
    assert (await history.calls(since=at(0))).observed == pytest.approx(1.0)
    assert {s.account: s.until for s in told.stretches} == {"ada": at(100), "bob": at(50)}
    assert {s.account for s in (await history.coverage(since=at(60))).stretches} == {"ada"}


async def test_a_timeline_says_what_share_of_it_was_observed(
    journal: Journal, history: History, clock: Clock
) -> None:
    """A gap in the middle of a call may hide changes."""
    line = Line()
    entries = line.call("Ringing")
    line.at = at(100)
    entries += line.call("Released")
    await journal.record(entries)  # from 1 s to 101 s
    await journal.cover([Cover(1, at(0)), Cover(1, at(21), "disconnected"), Cover(1, at(46))])
    await journal.heartbeat([1], at(3600))

    (timeline,) = await history.call(messages.UUID)

    assert timeline.observed == pytest.approx(0.75)
    assert timeline.until == at(101)


async def test_the_time_of_a_call_that_goes_on_is_up_to_now(
    journal: Journal, history: History, clock: Clock
) -> None:
    """Its share is about that time, and not up to its last message only."""
    await journal.record(Line().call("Ringing"))  # at 1 s
    await journal.cover([Cover(1, at(0)), Cover(1, at(51), "disconnected")])
    clock.now = at(101)

    (timeline,) = await history.call(messages.UUID)

    assert timeline.observed == pytest.approx(0.5)
    assert timeline.until == at(101)


async def test_the_time_of_a_call_that_ended_unheard_is_up_to_when_that_was_noticed(
    journal: Journal, history: History, clock: Clock
) -> None:
    """No end is invented for it, and the gap that hid its end counts."""
    line = Line()
    await journal.record(line.call("Ringing", "Established"))  # at 1 s and 2 s
    line.at = at(100)
    await journal.record([line.snapshot()])  # at 101 s
    await journal.cover([Cover(1, at(0)), Cover(1, at(26), "disconnected"), Cover(1, at(101))])

    (timeline,) = await history.call(messages.UUID)

    assert (timeline.found.call.ended_at, timeline.until) == (None, at(101))
    assert timeline.observed == pytest.approx(0.25)
    assert (timeline.found.call.settled or "").startswith("inferred: ")


@pytest.mark.parametrize("bound", ["COVERED_MAX", "GAPS_MAX"])
async def test_too_long_an_answer_is_refused(
    bound: str, journal: Journal, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bound, with the cure, instead of an answer that is silently cut."""
    await journal.cover([Cover(1, at(n), "stalled" if n % 2 else "x") for n in range(5)])
    monkeypatch.setattr(module, bound, 4)

    with pytest.raises(StoreError, match="shorter"):
        await history.coverage(since=at(0))


async def test_what_is_kept_can_be_compared_with_what_was_sent(journal: Journal, history: History) -> None:
    """Counts and digests by account, in the order of arrival, of what came over the line."""
    line = Line(1)
    raws = [messages.message("Ringing"), b"\x00\xff", messages.message("Released")]
    await journal.record([line.hear(b"before")])
    await journal.record([line.hear(raw) for raw in raws] + [line.snapshot()])

    kept = await history.kept_since(at(2))

    expected = hashlib.sha256(b"".join(raw + b"\n" for raw in raws)).hexdigest()
    assert {name: (has.notifications, has.digest) for name, has in kept.items()} == {"ada": (3, expected)}


# ── safety ────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_question_cannot_write(history: History) -> None:
    """Twice over: the transaction is read-only, and the role may not."""
    async with history._engine.connect() as connection:
        row = (
            await connection.exec_driver_sql("SELECT current_user, current_setting('transaction_read_only')")
        ).one()
    assert tuple(row) == ("listener_auditor", "on")


async def test_a_question_that_takes_too_long_is_given_up(
    database: str, journal: Journal, monkeypatch: pytest.MonkeyPatch, sql: asyncpg.Connection
) -> None:
    """With a sentence about what to do."""
    monkeypatch.setattr(module, "STATEMENT_S_MAX", 0.05)
    await sql.execute("BEGIN; LOCK TABLE call")
    async with History(database) as hasty:
        with pytest.raises(StoreError, match="shorter time"):
            await hasty.calls()
    await sql.execute("ROLLBACK")


async def test_questions_to_a_database_without_tables_name_the_cure(empty_database: str) -> None:
    """Not a traceback of the driver."""
    async with History(empty_database) as history:
        with pytest.raises(SchemaOutdated, match="listener db upgrade"):
            await history.calls()


# ── plans ─────────────────────────────────────────────────────────────────────────────────────────────

MANY = 4000


@pytest.fixture
async def crowded(journal: Journal, sql: asyncpg.Connection) -> None:
    """Some thousand calls of two hundred accounts, half an hour apart, with statistics."""
    await journal.register([AccountRow(f"a{n}", f"t{n % 20}", "lab") for n in range(198)])
    entries: list[Heard] = []
    for n in range(MANY):
        line = Line(1 + n % 200, began=T0 + n * HOUR / 2)
        number = f"+1916{5550000 + n}"
        states = ("Ringing",) if n % 100 == 0 else ("Ringing", "Released")
        entries += line.call(*states, id=f"call-{n}", numbers=(number,), dnis=str(n))
    for start in range(0, len(entries), 2000):
        await journal.record(entries[start : start + 2000])
    await sql.execute("ANALYZE")


@pytest.mark.parametrize(
    ("asked", "indexes"),
    [
        ({}, {"ix_call_opened_at_id"}),
        ({"since": T0 + 100 * HOUR, "until": T0 + 110 * HOUR}, {"ix_call_opened_at_id"}),
        ({"accounts": ["a7"]}, {"ix_call_account_id_opened_at_id"}),
        ({"live": True, "accounts": ["a7", "a8"]}, {"ix_call_open"}),
        (
            {"number": "+19165550007"},
            {"ix_call_number", "ix_call_phone_number", "ix_call_dnis", "ix_participant_number", "pk_call"},
        ),
        (
            {"number_ends": "5550007", "since": T0},
            {"ix_call_number", "ix_call_phone_number", "ix_call_dnis", "ix_participant_number", "pk_call"},
        ),
        ({"after": "100000000000000-1"}, {"ix_call_opened_at_id"}),
    ],
    ids=["newest", "period", "account", "live", "number", "ending", "page"],
)
async def test_searches_use_their_indexes(
    asked: dict[str, object],
    indexes: set[str],
    crowded: None,
    history: History,
) -> None:
    """Each list is found through the indexes that were made for it, and no table of calls is read whole."""
    plan = await explained(history, asked)

    used = set(re.findall(r"(?:using|on) ((?:ix|pk|uq)_\w+)", plan))
    assert indexes <= used, plan
    assert not re.search(r"Seq Scan on (call|participant|change|notification)", plan), plan


async def explained(history: History, asked: dict[str, object]) -> str:
    """PostgreSQL's plan of the list that a question asks for."""
    plans: list[str] = []

    def explain(connection: Any, _: Any, statement: str, parameters: Any, *__: Any) -> None:
        if statement.startswith("SELECT account.name") and not plans:
            plans.append("")
            rows = connection.exec_driver_sql(f"EXPLAIN {statement}", parameters)
            plans[0] = "\n".join(row[0] for row in rows)

    event.listen(history._engine.sync_engine, "before_cursor_execute", explain)
    await history.calls(**asked)  # type: ignore[arg-type]
    return plans[0]
