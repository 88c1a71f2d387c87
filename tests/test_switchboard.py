"""The switchboard, with the real dial watch and a real PostgreSQL; the ways out are plain functions."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from msgspec import structs

from listener.core.calls import JsonObject
from listener.core.dialling import (
    Accepted,
    Cause,
    Deadlines,
    Dial,
    EndedBy,
    NoojeeStatus,
    NotAnswered,
    Outcome,
    Refused,
    System,
)
from listener.core.requests import Acknowledgement
from listener.dialwatch import DialWatch
from listener.errors import (
    InvalidRequest,
    KeyReused,
    ListenerError,
    NotAllowed,
    NotKnown,
    RemoteError,
    StoreUnavailable,
    TooMany,
)
from listener.metrics import Metrics
from listener.store.dials import Dials
from listener.store.journal import AccountRow, Journal
from listener.switchboard import PLACE_S, Click2DialWay, GwsWay, NoojeeWay, Placed, Switchboard
from tests.support.running import until

GWS = {"system": "gws", "account": "ann", "number": "5001"}
NOOJEE = {"system": "noojee", "number": "0383208100", "extenOrUniqueId": "SIP/101"}
CLICK2DIAL = {"system": "click2dial", "agent": "201", "callee": "0820001234", "outbound_id": "27820001234"}
RECORD = {"recordHandle": 431, "phoneNumber": "5001", "outboundCallerId": "410004343"}


def now() -> datetime:
    """The time of day."""
    return datetime.now(UTC)  # noqa: TID251 - a shell's default


@dataclass
class Party:
    """An outside system: what it was asked, and what it says."""

    said: Acknowledgement = field(default_factory=Accepted)
    asked: list[Any] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        """It answers at once, unless a test closes the gate."""
        self.gate.set()

    async def dial(self, request: Any) -> Acknowledgement:
        """Every request comes here."""
        self.asked.append(request)
        await self.gate.wait()
        return self.said

    hangup = answer = start_recording = stop_recording = dial


class Written(Dials):
    """The store, in which calls have ids although nobody heard them."""

    under_way = ""
    """The id of the dial that is the call 1543022361.57."""

    async def call_ids(self, call: int) -> tuple[str, ...]:
        """Every call has one."""
        return (f"1543022361.{call}",)

    async def called(self, accounts: Iterable[int], name: str) -> Dial | None:
        """The dial that is this call."""
        assert list(accounts)
        return await self.get(self.under_way) if name == "1543022361.57" else None


@dataclass
class Board:
    """A switchboard that works, and what is round it."""

    switchboard: Switchboard
    dials: Written
    watch: DialWatch
    party: Party

    async def ended(self, placed: Placed) -> Outcome | None:
        """The outcome of a dial, once everything about it is stored."""
        await self.switchboard.drain()
        await self.watch.drain()
        dial = await self.dials.get(placed.dial.id)
        assert dial is not None
        return dial.outcome


@asynccontextmanager
async def working(journal: Journal, **options: Any) -> AsyncIterator[Board]:
    """A switchboard with an account that may dial and one that may not, a Noojee and a Click2Dial."""
    ids = await journal.register([AccountRow(name, "", "lab") for name in ("ann", "bob", "desk", "c2d")])
    dials, party = Written(journal), Party()
    watch = DialWatch(dials, Metrics(), wall=now)
    board = Switchboard(watch, dials, **options)
    board.gws["ann"] = GwsWay(ids["ann"], "ann", "lab", True, party.dial)
    board.gws["bob"] = GwsWay(ids["bob"], "bob", "lab", False, party.dial)
    board.noojee["office"] = NoojeeWay("office", True, {"101": ids["desk"]}, True, party)
    board.click2dial["c2d"] = Click2DialWay("c2d", True, {"201": ids["c2d"]}, False, party.dial)
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(watch.run()), tasks.create_task(board.run())]
        await asyncio.sleep(0)
        try:
            yield Board(board, dials, watch, party)
        finally:
            party.gate.set()
            for task in running:
                task.cancel()


@pytest.mark.parametrize("fields", [GWS, NOOJEE, CLICK2DIAL, {"system": "preview", "outboundRecord": RECORD}])
async def test_a_dial_is_written_before_it_is_sent(journal: Journal, fields: JsonObject) -> None:
    """When a system is asked, the dial is in the database, as requested and with what was asked for."""
    async with working(journal) as there:
        there.party.gate.clear()
        placed = await there.switchboard.place(fields)
        await until(lambda: bool(there.party.asked))
        kept = await there.dials.get(placed.dial.id)
        assert kept == placed.dial
        assert kept is not None
        assert kept.accepted_at is None
        unsaid = {"account": None, "environment": None, "campaign": None}
        assert await there.dials.requested(kept.id) == {**unsaid, **fields}


async def test_what_a_system_says_is_a_fact_of_the_dial(journal: Journal) -> None:
    """Accepted ends nothing; a refusal, and what was never sent, ends it; a lost answer does not."""
    async with working(journal) as there:
        assert await there.ended(await there.switchboard.place(GWS)) is None
        there.party.said = Refused(Cause(System.GWS, "statusCode", "5"))
        assert await there.ended(await there.switchboard.place(GWS)) is Outcome.NOT_ALLOWED
        there.party.said = NotAnswered(sent=False, system=System.GWS)
        assert await there.ended(await there.switchboard.place(GWS)) is Outcome.FAILED
        there.party.said = NotAnswered(sent=True, system=System.GWS)
        assert await there.ended(await there.switchboard.place(GWS)) is None


async def test_the_same_key_never_dials_twice(journal: Journal) -> None:
    """Also when both come at once; with another request, or by another way, it is refused."""
    async with working(journal) as there:
        first, second = await asyncio.gather(
            there.switchboard.place(GWS, "order-1"), there.switchboard.place(dict(GWS), "order-1")
        )
        assert first.dial.id == second.dial.id
        assert first.is_new is not second.is_new
        await there.switchboard.drain()
        assert len(there.party.asked) == 1
        ways = there.switchboard.gws
        ways["bob"] = structs.replace(ways["bob"], dials=True)
        for other in (
            {**GWS, "userData": {"a": "b"}},
            {**GWS, "account": "bob"},
            {**GWS, "environment": "lab"},
            {**GWS, "campaign": "spring"},
            NOOJEE,
        ):
            with pytest.raises(KeyReused, match="used for another request"):
                await there.switchboard.place(other, "order-1")
        await there.switchboard.drain()
        assert len(there.party.asked) == 1


async def test_a_key_is_kept_when_its_request_falls_to_another_account(journal: Journal) -> None:
    """The settings were changed between a lost answer and the same request again: it is the same dial."""
    async with working(journal) as there:
        ways, request = there.switchboard.gws, {"system": "gws", "number": "5001"}
        first = await there.switchboard.place(dict(request), "order-1")
        for name, dials in (("ann", False), ("bob", True)):
            ways[name] = structs.replace(ways[name], dials=dials)
        again = await there.switchboard.place(dict(request), "order-1")
        assert (again.dial.id, again.is_new) == (first.dial.id, False)
        await there.switchboard.drain()
        assert len(there.party.asked) == 1


async def test_what_the_store_does_not_take_is_not_sent(journal: Journal) -> None:
    """No row, no dial."""
    async with working(journal) as there:
        await journal.close()
        with pytest.raises(StoreUnavailable):
            await there.switchboard.place(GWS)
        await there.switchboard.drain()
        assert there.party.asked == []


async def test_a_dial_that_was_written_too_late_is_not_sent(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller is told so by then, and a row that was committed all the same ends at its deadline."""
    async with working(journal, place_s=0.2) as there:
        place, written = there.dials.place, asyncio.Event()

        async def slow(*dial: Any) -> Any:
            await place(*dial)
            written.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(there.dials, "place", slow)
        async with asyncio.timeout(3):
            with pytest.raises(StoreUnavailable, match=r"within 0\.2 s, so nothing was sent"):
                await there.switchboard.place(GWS, "order-1")
        assert written.is_set()
        monkeypatch.setattr(there.dials, "place", place)
        again = await there.switchboard.place(GWS, "order-1")
        assert not again.is_new
        await there.switchboard.drain()
        assert there.party.asked == []
        (overdue,) = await there.dials.overdue(now() + timedelta(days=1), 10)
        assert overdue.id == again.dial.id


@pytest.mark.parametrize(
    ("later_s", "outcome", "words"),
    [
        (PLACE_S, None, ""),
        (PLACE_S + 0.1, Outcome.FAILED, "more than 10 s before it could be sent"),
    ],
)
async def test_a_dial_that_grew_old_before_it_was_sent_is_not_sent(
    journal: Journal, later_s: float, outcome: Outcome | None, words: str
) -> None:
    """The machine slept between the two; the dial says that nothing was sent."""
    moments = [now()]
    async with working(journal, wall=lambda: moments[-1]) as there:
        placed = await there.switchboard.place(GWS)
        moments.append(placed.dial.requested_at + timedelta(seconds=later_s))
        assert await there.ended(placed) is outcome
        assert len(there.party.asked) == (outcome is None)
        dial = await there.dials.get(placed.dial.id)
        assert dial is not None
        assert words in (dial.cause.text if dial.cause is not None else "")


async def test_a_dial_whose_deadline_passed_is_not_sent(journal: Journal) -> None:
    """It may have ended as unknown by then, and a call after that would be nobody's."""
    moments = [now()]
    deadlines = Deadlines(requested_s=0.5)
    async with working(journal, wall=lambda: moments[-1], deadlines=deadlines) as there:
        placed = await there.switchboard.place(GWS)
        moments.append(placed.dial.requested_at + timedelta(seconds=0.5))
        assert await there.ended(placed) is Outcome.FAILED
        assert there.party.asked == []


async def test_more_at_a_time_than_are_taken_are_refused(journal: Journal) -> None:
    """The bound holds for callers at the same time, and what is refused is not written down."""
    async with working(journal, sending_max=2) as there:
        there.party.gate.clear()
        done = await asyncio.gather(*(there.switchboard.place(GWS) for _ in range(5)), return_exceptions=True)
        assert sorted(type(each).__name__ for each in done) == ["Placed", "Placed", *["TooMany"] * 3]
        assert isinstance(next(each for each in done if not isinstance(each, Placed)), TooMany)
        there.party.gate.set()
        await there.switchboard.drain()
        assert (await there.switchboard.place(GWS)).is_new


async def test_a_defect_of_an_adapter_is_no_second_dial(journal: Journal) -> None:
    """It may have been sent: the dial waits for its deadline."""

    async def broken(_: Any) -> Acknowledgement:
        raise ZeroDivisionError

    async with working(journal) as there:
        way = there.switchboard.gws["ann"]
        there.switchboard.gws["ann"] = GwsWay(way.account, "ann", "lab", True, broken)
        placed = await there.switchboard.place(GWS)
        assert await there.ended(placed) is None
        kept = await there.dials.get(placed.dial.id)
        assert kept is not None
        assert kept.cause is not None
        assert "ZeroDivisionError" in kept.cause.text


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"system": "fax"}, InvalidRequest, "system: 'fax' is none of ours; write gws, preview"),
        ({}, InvalidRequest, "system: is lacking"),
        ({**GWS, "account": 5}, InvalidRequest, "account: "),
        ({**GWS, "account": "eve"}, NotKnown, "no account 'eve'; known are ann, bob"),
        ({**GWS, "account": "bob"}, NotAllowed, "do not let this listener dial by bob"),
        ({**GWS, "numbr": "1"}, InvalidRequest, "numbr: is no parameter of this request; it has number"),
        ({"system": "gws", "account": "ann"}, InvalidRequest, "number: is lacking"),
        ({**GWS, "number": "50 01"}, InvalidRequest, "number: '50 01' has a blank"),
        ({**NOOJEE, "environment": "home"}, NotKnown, "no \\[noojee.home\\]; known are office"),
        ({**NOOJEE, "extenOrUniqueId": "SIP/999"}, NotKnown, "'SIP/999' is no extension of office"),
        ({**NOOJEE, "extenOrUniqueId": "SIP/101-boss"}, NotKnown, "'SIP/101-boss' is no extension of office"),
        ({**NOOJEE, "extenOrUniqueId": "101"}, InvalidRequest, "no extension with its technology"),
        ({**CLICK2DIAL, "callee": "820001234"}, InvalidRequest, "begins with neither 0, 27 nor 00"),
        ({**CLICK2DIAL, "contact_ref": "a b"}, InvalidRequest, "contact_ref: 'a b' is not made of"),
        (
            {**CLICK2DIAL, "contact_ref": "a", "call_ref": "a"},
            InvalidRequest,
            "contact_ref and call_ref: are names of one parameter; give one of them",
        ),
        ({**GWS, "campaign": "x" * 256}, InvalidRequest, "campaign: has 256 characters; shorten it to 255"),
        ({**GWS, "campaign": "spring\x00"}, InvalidRequest, "campaign: has control characters"),
        ({**GWS, "campaign": " "}, InvalidRequest, "campaign: is empty"),
        ({**GWS, "environment": "\ud800"}, InvalidRequest, "environment: has control characters"),
        ({"system": "preview", "message": {"a": 1}}, InvalidRequest, "the message is no preview record"),
        ({"system": "preview", "message": [1]}, InvalidRequest, "message: is no JSON object"),
        (
            {"system": "preview", "message": {"record": {"phoneNumber": "\ud800"}}},
            InvalidRequest,
            "message: has half a surrogate pair; give whole characters",
        ),
        (
            {"system": "preview", "outboundRecord": RECORD, "recordHandle": 431},
            InvalidRequest,
            "recordHandle: stands beside a record",
        ),
    ],
)
async def test_what_is_wrong_is_refused_before_anything_is_written(
    journal: Journal, fields: JsonObject, kind: type[ListenerError], words: str
) -> None:
    """By the rule that was broken; nothing is sent, and no dial is there."""
    async with working(journal) as there:
        with pytest.raises(kind, match=words):
            await there.switchboard.place(fields)
        assert there.party.asked == []
        assert await there.dials.waiting(10, datetime(2000, 1, 1, tzinfo=UTC)) == []


async def test_dials_are_made_so_that_they_can_be_recognised(journal: Journal) -> None:
    """A reference of its own for GWS and Click2Dial, `monitored` for Noojee; the caller's own come first."""
    async with working(journal) as there:
        await there.switchboard.place(GWS)
        await there.switchboard.place({**GWS, "reference": "mine"})
        await there.switchboard.place(CLICK2DIAL)
        await there.switchboard.place(NOOJEE)
        await there.switchboard.place({**NOOJEE, "monitored": False})
        await there.switchboard.drain()
        gws, mine, click2dial, noojee, quiet = there.party.asked
        assert gws.reference.startswith("d-")
        assert mine.reference == "mine"
        assert click2dial.reference.startswith("d-")
        assert (noojee.monitored, quiet.monitored) == (True, False)


@pytest.mark.parametrize("name", ["contact_ref", "call_ref", "reference"])
async def test_a_reference_goes_by_any_of_its_names(journal: Journal, name: str) -> None:
    """None is as if it were not given: the dial's own id is the reference."""
    async with working(journal) as there:
        named = await there.switchboard.place({**CLICK2DIAL, name: "mine"})
        nameless = await there.switchboard.place({**CLICK2DIAL, "contact_ref": None, name: None})
        await there.switchboard.drain()
        assert [each.reference for each in there.party.asked] == ["mine", nameless.dial.id]
        assert (named.dial.reference, nameless.dial.reference) == ("mine", nameless.dial.id)


async def test_an_extension_of_the_settings_may_have_a_dash(journal: Journal) -> None:
    """It is compared as a whole with what follows the technology."""
    async with working(journal) as there:
        ways = there.switchboard.noojee
        (account,) = ways["office"].accounts.values()
        ways["office"] = structs.replace(ways["office"], accounts={"101-boss": account})
        assert (await there.switchboard.place({**NOOJEE, "extenOrUniqueId": "SIP/101-boss"})).is_new
        with pytest.raises(NotKnown):
            await there.switchboard.place(NOOJEE)


Control = Callable[[Switchboard], Awaitable[None]]


async def test_noojee_is_asked_for_what_changes_a_call(journal: Journal) -> None:
    """Each action is its request; a refusal is said, and what the settings do not allow is not asked."""
    async with working(journal) as there:
        board = there.switchboard
        await board.control("hangup", {"extenOrUniqueId": "101"})
        await board.control("answer", {"uniqueId": "1543022361.57", "exten": "SIP/101"})
        await board.control("start", {"extenOrUniqueId": "101", "tag": "22"})
        await board.control("stop", {"environment": "office", "extenOrUniqueId": "101"})
        assert [type(each).__name__ for each in there.party.asked] == [
            "NoojeeHangup",
            "NoojeeAnswer",
            "NoojeeStartRecording",
            "NoojeeStopRecording",
        ]
        there.party.said = Refused(Cause(System.NOOJEE, "Code", "-1", "Expired TimeStamp"))
        with pytest.raises(RemoteError, match="Code -1 Expired TimeStamp"):
            await board.control("stop", {"extenOrUniqueId": "101"})
        way = board.noojee["office"]
        board.noojee["office"] = NoojeeWay("office", False, way.accounts, True, way.calls)
        with pytest.raises(NotAllowed, match="set dials = true"):
            await board.control("stop", {"extenOrUniqueId": "101"})


async def test_a_dial_is_hung_up_by_the_id_of_its_call(journal: Journal) -> None:
    """Not before that is known, since by extension it might be another call; and not where nobody can."""
    async with working(journal) as there:
        placed = await there.switchboard.place(NOOJEE)
        await there.switchboard.drain()
        with pytest.raises(NotAllowed, match="was not heard yet"):
            await there.switchboard.hang_up(placed.dial)
        gws = await there.switchboard.place(GWS)
        with pytest.raises(NotAllowed, match="gws has no request that hangs up"):
            await there.switchboard.hang_up(gws.dial)


async def under_way(there: Board) -> Dial:
    """A Noojee dial whose call is known."""
    placed = await there.switchboard.place(NOOJEE)
    assert await there.ended(placed) is None
    dial = await there.watch.tell(placed.dial.id, NoojeeStatus("Dialing Out"), now())
    assert dial is not None
    there.dials.under_way = dial.id
    return structs.replace(dial, call=57)


async def hung_up(there: Board, dial: Dial) -> Dial:
    """The dial when its PBX said that the call is over."""
    told = await there.watch.tell(dial.id, NoojeeStatus("Hungup"), now())
    assert told is not None
    assert told.outcome is not None
    return told


async def test_a_hang_up_that_was_accepted_is_why_a_dial_ended(journal: Journal) -> None:
    """With the moment when it was asked, which was before the PBX answered."""
    async with working(journal) as there:
        dial = await under_way(there)
        there.party.gate.clear()
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(there.switchboard.hang_up(dial))
            await until(lambda: len(there.party.asked) == 2)
            unanswered = await there.dials.get(dial.id)
            assert unanswered is not None
            assert unanswered.hangup_at is None
            after = now()
            there.party.gate.set()
        asked = asking.result().hangup_at
        assert asked is not None
        assert asked <= after
        assert there.party.asked[-1].exten_or_unique_id == "1543022361.57"
        told = await hung_up(there, dial)
        assert (told.outcome, told.ended_by) == (Outcome.CANCELLED, EndedBy.AGENT)


async def test_a_call_that_is_hung_up_is_why_its_dial_ended(journal: Journal) -> None:
    """By the id of the call; by extension it may have been another one, and no dial is told. Also when the
    end was heard before the PBX answered."""
    async with working(journal) as there:
        dial = await under_way(there)
        await there.switchboard.control("hangup", {"extenOrUniqueId": "SIP/101"})
        kept = await there.dials.get(dial.id)
        assert kept is not None
        assert kept.hangup_at is None
        there.party.gate.clear()
        async with asyncio.TaskGroup() as tasks:
            fields: JsonObject = {"extenOrUniqueId": "1543022361.57"}
            tasks.create_task(there.switchboard.control("hangup", fields))
            await until(lambda: len(there.party.asked) == 3)
            assert (await hung_up(there, dial)).outcome is Outcome.UNKNOWN
            there.party.gate.set()
        told = await there.dials.get(dial.id)
        assert told is not None
        assert (told.outcome, told.ended_by, told.corrected) == (Outcome.CANCELLED, EndedBy.AGENT, True)


async def test_a_key_is_looked_up_before_the_record_that_its_request_names(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same request again is the same dial, although its preview record is forgotten meanwhile; another
    record is another request."""
    message = {"messageType": "OutboundRecordMessage", "notificationType": "PreviewRecord", "record": RECORD}
    request = {"system": "preview", "account": "ann", "recordHandle": 431}
    heard = [msgspec.json.encode(message)]

    async def previews(*_: Any) -> list[bytes]:
        return heard

    async with working(journal) as there:
        monkeypatch.setattr(there.dials, "previews", previews)
        first = await there.switchboard.place(dict(request), "order-1")
        heard.clear()
        again = await there.switchboard.place(dict(request), "order-1")
        assert (again.dial.id, again.is_new) == (first.dial.id, False)
        with pytest.raises(KeyReused):
            await there.switchboard.place({**request, "recordHandle": 432}, "order-1")
        with pytest.raises(NotKnown, match="no preview record 431"):
            await there.switchboard.place(dict(request), "order-2")
        await there.switchboard.drain()
        (asked,) = there.party.asked
        assert asked.outbound_record == RECORD


@pytest.mark.parametrize(
    "said",
    [
        Refused(Cause(System.NOOJEE, "Code", "-1", "No such call")),
        NotAnswered(sent=False, system=System.NOOJEE),
        NotAnswered(sent=True, system=System.NOOJEE),
    ],
)
async def test_a_hang_up_that_was_not_accepted_explains_nothing(
    journal: Journal, said: Acknowledgement
) -> None:
    """The call went on, or may have: what ends it later is not known to be ours."""
    async with working(journal) as there:
        dial = await under_way(there)
        there.party.said = said
        with pytest.raises(RemoteError):
            await there.switchboard.hang_up(dial)
        told = await hung_up(there, dial)
        assert (told.hangup_at, told.outcome) == (None, Outcome.UNKNOWN)


async def test_a_hang_up_that_the_settings_refuse_is_neither_sent_nor_noted(journal: Journal) -> None:
    """Dials were switched off meanwhile."""
    async with working(journal) as there:
        dial = await under_way(there)
        ways = there.switchboard.noojee
        ways["office"] = structs.replace(ways["office"], dials=False)
        with pytest.raises(NotAllowed, match="set dials = true"):
            await there.switchboard.hang_up(dial)
        assert len(there.party.asked) == 1
        told = await hung_up(there, dial)
        assert (told.hangup_at, told.outcome) == (None, Outcome.UNKNOWN)


async def test_a_hang_up_is_noted_when_the_store_is_back(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was done, so the caller is told no error, and the dial learns of it later."""
    async with working(journal, tell_s=0.05) as there:
        dial = await under_way(there)
        take, back = there.dials.take, asyncio.Event()

        async def slow(*batch: Any) -> Any:
            await back.wait()
            return await take(*batch)

        monkeypatch.setattr(there.dials, "take", slow)
        assert await there.switchboard.hang_up(dial) == dial
        assert len(there.party.asked) == 2
        back.set()
        told = await hung_up(there, dial)
        assert (told.outcome, told.ended_by) == (Outcome.CANCELLED, EndedBy.AGENT)
