"""Noojee's events and Click2Dial's records: every literal shape and trap, in the call table and for dials."""

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from listener.core.calls import ANOMALY_KINDS, Call, Direction, Heard, Notification, Unrecognised
from listener.core.calls import Outcome as CallOutcome
from listener.core.decode import NAME_BYTES_MAX, decode
from listener.core.dialling import (
    Advance,
    Confidence,
    Dial,
    DialState,
    Leg,
    MatchConfidence,
    Outcome,
    System,
    advance,
    match,
    placed,
)
from listener.core.normalise import Board
from listener.core.pbx import (
    Click2DialRecord,
    NoojeeEvent,
    click2dial_channel,
    click2dial_fact,
    click2dial_sighting,
    noojee_channel,
    noojee_fact,
    noojee_sighting,
    read_click2dial,
    read_noojee,
)

AT = datetime(2026, 3, 2, 8, 0, tzinfo=UTC)
EXTENSION = "204"
NOOJEE = noojee_channel("pbx1", EXTENSION)
CDR = click2dial_channel("cdr")
INBOUND = click2dial_channel("inbound")
CALL_ID = "1772438400.31"
NUMBER = "0383200417"


def event(status: str, **fields: Any) -> bytes:
    """One event of subscribe in the shape that Noojee sends it; an outbound call unless told otherwise."""
    data = {
        "callerId": NUMBER,
        "uniqueCallId": CALL_ID,
        "callStartTime": "",
        "isQueueCall": False,
        "isClickToDialCall": False,
        "inbound": False,
        "status": status,
        "otherPartyCallerId": NUMBER,
        "connectedCallerIdNum": "",
        "outboundDestination": NUMBER,
    }
    return json.dumps({"CallData": data | fields, "CallID": 12, "Code": 0}).encode()


def inbound(status: str) -> bytes:
    """An event of a call to the extension."""
    return event(status, inbound=True, outboundDestination="", callerId="0299", otherPartyCallerId="")


def agents_leg(status: str) -> bytes:
    """An event of the agent's own leg of a dial, which shows the callee."""
    return event(status, inbound=True, outboundDestination="", callerId="0299", otherPartyCallerId=NUMBER)


def cdr(**fields: Any) -> bytes:
    """A record as since v3.0.0."""
    payload = {
        "extension": EXTENSION,
        "number": "27820004417",
        "dial_number": "27110009000",
        "call_ref": "pbx-00417",
        "contact_ref": "attempt-1",
        "dialed_at": "2026-03-02 10:00:05",
        "end_reason": "hungup",
        "end_code": 16,
        "call_time": 63,
        "hold_time": 0,
        "call_dir": "outbound",
        "recording_url": "http://pbx1.test/recordings/pbx-00417",
        "ref": "click-dial",
    }
    return json.dumps({"type": "cdr", "payload": payload | fields}).encode()


def old_cdr(**fields: Any) -> bytes:
    """A record as before v3.0.0: no number, `ref` is the client's, and call_ref is what the dial sent."""
    payload = json.loads(cdr(call_ref="attempt-1", ref="0820004417", campaign_ref="outbound"))["payload"]
    for name in ("number", "contact_ref", "call_dir"):
        del payload[name]
    return json.dumps({"type": "cdr", "payload": payload | fields}).encode()


INBOUND_CALL = json.dumps(
    {
        "type": "call",
        "payload": {
            "number": "0820004417",
            "dial_number": "27110009000",
            "hold_time": 4,
            "call_ref": "pbx-00900",
            "contact_ref": "c-1",
            "call_dir": "inbound",
            "ref": EXTENSION,
        },
    }
).encode()


def notification(raw: bytes, channel: str) -> Notification:
    """What decoding gives, which must be a notification."""
    decoded = decode(raw, channel)
    assert isinstance(decoded, Notification), decoded
    return decoded


def folded(*messages: tuple[bytes, str]) -> list[Call]:
    """The calls that these messages make, ten seconds apart, by way of the same fold as any other."""
    board = Board([])
    calls: dict[int, Call] = {}
    for number, (raw, channel) in enumerate(messages, start=1):
        at = AT + timedelta(seconds=10 * number)
        heard = Heard(1, str(uuid4()), number, at, channel, raw)
        for step in board.hear(number, heard, decode(raw, channel)):
            calls[step.call.id] = step.call
    return list(calls.values())


def noojee_event(raw: bytes) -> NoojeeEvent:
    """The event, which must be one."""
    read = read_noojee(raw, NOOJEE)
    assert isinstance(read, NoojeeEvent), read
    return read


def record(raw: bytes) -> Click2DialRecord:
    """The record, which must be one."""
    read = read_click2dial(raw)
    assert isinstance(read, Click2DialRecord), read
    return read


# ── Noojee ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ("Dialing Out", "Dialing"),
        ("Ringing", "Ringing"),
        ("Connected", "Established"),
        ("Hungup", "Released"),
        ("Unlinked", "Unlinked"),
        ("Busy", "Busy"),
        ("No Answer", "No Answer"),
        ("Parked Somewhere", "Parked Somewhere"),
    ],
)
def test_a_status_is_a_state_where_both_mean_the_same(status: str, state: str) -> None:
    """Four statuses are Genesys' states; every other keeps its own word, and none is lost."""
    said = notification(event(status), NOOJEE)
    assert said.state == state
    assert (said.call_id, said.phone_number, said.dnis) == (CALL_ID, EXTENSION, NUMBER)
    assert [party.number for party in said.participants or ()] == [NUMBER]


def test_an_outbound_call_with_a_transfer() -> None:
    """Unlinked ends nothing, and no talk is counted until the call is connected again."""
    statuses = ["Dialing Out", "Connected", "Unlinked", "Connected", "Hungup"]
    (call,) = folded(*[(event(status), NOOJEE) for status in statuses])
    assert (call.direction, call.outcome, call.settled) == (
        Direction.OUTBOUND,
        CallOutcome.ANSWERED,
        "released",
    )
    assert (call.ring_s, call.talk_s, call.number) == (10.0, 20.0, NUMBER)
    assert call.anomalies == 1


def test_hungup_without_connected_was_not_answered() -> None:
    """Hungup is said of every end."""
    (call,) = folded((event("Dialing Out"), NOOJEE), (event("Hungup"), NOOJEE))
    assert (call.outcome, call.talk_s) == (CallOutcome.UNANSWERED, 0.0)


@pytest.mark.parametrize("status", ["Busy", "No Answer", "Unlinked"])
def test_what_is_no_end_leaves_the_call_open(status: str) -> None:
    """Whether a Hungup follows is not documented: the call is open until one is heard."""
    (call,) = folded((inbound("Ringing"), NOOJEE), (inbound(status), NOOJEE))
    assert call.open
    assert (call.state, call.direction, call.ani) == (status, Direction.INBOUND, "0299")
    (call,) = folded((inbound("Ringing"), NOOJEE), (inbound(status), NOOJEE), (inbound("Hungup"), NOOJEE))
    assert not call.open


def test_the_older_and_the_newer_fields_are_read_alike() -> None:
    """canAnswer and secondaryUniqueCallId come and go."""
    more = noojee_event(event("Ringing", canAnswer=True, secondaryUniqueCallId="1772438400.32"))
    assert more.secondary_call_id == "1772438400.32"
    assert msgspec.structs.replace(more, secondary_call_id="") == noojee_event(event("Ringing"))


def test_two_extensions_have_their_own_events() -> None:
    """The extension is in the channel only."""
    read = read_noojee(event("Connected"), noojee_channel("pbx1", "205"))
    assert isinstance(read, NoojeeEvent)
    assert read.extension == "205"


def noojee_dial(*statuses: str | bytes) -> tuple[Dial, Advance]:
    """A placed dial after these events, matched by the first."""
    dial = placed("d1", 1, System.NOOJEE, NUMBER, AT, device=f"SIP/{EXTENSION}")
    last = Advance(dial)
    for number, status in enumerate(statuses):
        read = noojee_event(event(status) if isinstance(status, str) else status)
        at = AT + timedelta(seconds=5 + number)
        found = match([dial], noojee_sighting(read, at, 1))
        assert found.dial is not None
        last = advance(last.dial, noojee_fact(read), at)
    return dial, last


def test_an_event_is_recognised_by_number_and_extension() -> None:
    """The SIP/ of the dial is none of the event's, and no event has the SessionID."""
    dial = placed("d1", 1, System.NOOJEE, NUMBER, AT, device=f"SIP/{EXTENSION}")
    seen = noojee_sighting(noojee_event(event("Dialing Out")), AT + timedelta(seconds=3), 1)
    assert match([dial], seen).confidence is MatchConfidence.STRONG
    other = noojee_sighting(noojee_event(event("Dialing Out", outboundDestination="0299990000")), AT, 1)
    assert match([dial], other).dial is None


def test_noojee_dials_end_as_their_events_say() -> None:
    """Answered is inferred, not answered is unknown, and the agent's own leg is no answer."""
    _, answered = noojee_dial("Dialing Out", "Connected", "Unlinked", "Connected", "Hungup")
    assert (answered.dial.outcome, answered.dial.confidence) == (Outcome.ANSWERED, Confidence.INFERRED)
    _, silent = noojee_dial("Dialing Out", "Hungup")
    assert silent.dial.outcome is Outcome.UNKNOWN
    _, absent = noojee_dial(agents_leg("Ringing"), agents_leg("No Answer"))
    assert (absent.dial.outcome, absent.dial.leg) == (Outcome.NO_ANSWER, Leg.AGENT)
    _, busy = noojee_dial(agents_leg("Busy"))
    assert (busy.dial.outcome, busy.dial.leg) == (Outcome.BUSY, Leg.AGENT)
    _, ringing = noojee_dial(agents_leg("Ringing"), agents_leg("Connected"))
    assert ringing.dial.state is DialState.DIALING_AGENT


# ── Click2Dial ────────────────────────────────────────────────────────────────────────────────────────


def test_a_record_is_a_call_met_at_its_end() -> None:
    """It shows no duration and no beginning, which nobody heard; what the record claims is beside it."""
    (call,) = folded((cdr(), CDR))
    assert (call.call_id, call.state, call.settled) == ("pbx-00417", "Released", "released")
    assert call.opened_at == call.ended_at
    assert (call.ring_s, call.talk_s, call.server_duration_s, call.established_at) == (0.0, 0.0, None, None)
    assert (call.number, call.dnis, call.ani) == ("27820004417", "27820004417", "27110009000")
    assert (call.phone_number, call.call_type) == (EXTENSION, "outbound")
    assert (call.user_data["call_time"], call.user_data["end_code"]) == (63, 16)
    assert call.user_data["dialed_at"] == "2026-03-02 10:00:05"


def test_a_record_of_an_inbound_call() -> None:
    """The caller is the number, and dial_number the one that he called; it was announced before."""
    (call,) = folded((INBOUND_CALL, INBOUND), (cdr(call_dir="inbound", call_ref="pbx-00900"), CDR))
    assert (call.ani, call.dnis, call.phone_number) == ("27820004417", "27110009000", EXTENSION)
    assert (call.notifications, call.state) == (2, "Released")


def test_an_announced_call_ends_only_by_its_record() -> None:
    """What the announcement says of the call's state is not documented, so none of Genesys' is claimed."""
    (call,) = folded((INBOUND_CALL, INBOUND))
    assert call.open
    assert (call.state, call.number, call.phone_number) == ("call", "0820004417", EXTENSION)


def test_the_spelling_before_v3() -> None:
    """`ref` is the client's number, and call_ref is what the dial sent."""
    old, new = record(old_cdr()), record(cdr())
    assert (old.number, old.reference, old.direction) == ("0820004417", "attempt-1", "outbound")
    assert new.reference == "attempt-1"
    assert notification(old_cdr(), CDR).dnis == "0820004417"


def test_two_calls_to_one_client_are_two() -> None:
    """contact_ref (call_ref of old) stays the same for the same callee; only the PBX's own id is unique."""
    again = "2026-03-02 11:30:00"
    assert len(folded((cdr(), CDR), (cdr(call_ref="pbx-00418"), CDR))) == 2
    assert len(folded((old_cdr(), CDR), (old_cdr(dialed_at=again), CDR))) == 2
    assert len(folded((old_cdr(), CDR), (old_cdr(), CDR))) == 1


def test_a_record_that_names_no_call_is_a_call_of_its_own() -> None:
    """The same one, whenever it is read."""
    nameless = cdr(call_ref=None, contact_ref=None, dialed_at=None)
    assert notification(nameless, CDR).call_id == notification(nameless, CDR).call_id
    assert (
        len(folded((nameless, CDR), (cdr(call_ref="", contact_ref="", dialed_at="", call_time=1), CDR))) == 2
    )


@pytest.mark.parametrize(
    ("reason", "code", "talk", "outcome"),
    [
        ("hungup", 16, 63, Outcome.ANSWERED),
        ("hungup", "0", "63", Outcome.ANSWERED),
        ("hungup", 16, 0, Outcome.CANCELLED),
        ("hungup", 16, None, Outcome.UNKNOWN),
        ("callee_hungup", 16, 8.5, Outcome.ANSWERED),
        ("voicemail", 16, 12, Outcome.MACHINE),
        ("busy", 17, 0, Outcome.BUSY),
        ("reject", 21, 0, Outcome.REJECTED),
        ("reject", 19, 0, Outcome.NO_ANSWER),
        ("reject", 22, 0, Outcome.INVALID_NUMBER),
        ("timeout", 18, 0, Outcome.NO_ANSWER),
        ("timeout", 102, 0, Outcome.FAILED),
        ("error", 28, 0, Outcome.INVALID_NUMBER),
        ("error", 34, 0, Outcome.CONGESTION),
        ("error", 42, 0, Outcome.CONGESTION),
        ("failed", None, 0, Outcome.FAILED),
        ("melted", "", 0, Outcome.UNKNOWN),
    ],
)
def test_click2dial_dials_end_as_their_record_says(
    reason: str, code: Any, talk: Any, outcome: Outcome
) -> None:
    """Every disposition, through the record as it is read."""
    dial = placed("d1", 1, System.CLICK2DIAL, "0820004417", AT, device=EXTENSION, reference="attempt-1")
    at = AT + timedelta(minutes=9)
    for raw in (cdr, old_cdr):
        read = record(raw(end_reason=reason, end_code=code, call_time=talk))
        found = match([dial], click2dial_sighting(read, at, 1))
        assert found.confidence is MatchConfidence.CERTAIN
        assert advance(dial, click2dial_fact(read), at).dial.outcome is outcome


def test_a_record_is_recognised_without_its_reference() -> None:
    """A reference that was cut is another one; then nothing is guessed, unless number and device agree."""
    long = "r" * 240
    dial = placed("d1", 1, System.CLICK2DIAL, "0820004417", AT, device=EXTENSION, reference=long)
    cut = click2dial_sighting(record(cdr(contact_ref=long[:230])), AT + timedelta(minutes=1), 1)
    assert match([dial], cut).dial is None
    none = click2dial_sighting(record(cdr(contact_ref=None, call_ref=None)), AT + timedelta(minutes=1), 1)
    assert match([dial], none).confidence is MatchConfidence.STRONG


@pytest.mark.parametrize("value", ["soon", -1, True, [3], "NaN", 10**400])
def test_a_call_time_that_is_none(value: Any) -> None:
    """It is noted, and proves no talk."""
    read = record(cdr(call_time=value))
    assert read.call_time is None
    assert [odd.kind for odd in read.oddities if odd.kind != "poisoned"] == ["malformed_field"]


# ── Junk ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"<html>busy</html>",
        b"{}",
        b'{"CallData":3}',
        b'{"CallData":{"status":"Connected"}}',
        b'{"type":"cdr"}',
        b'{"type":"weather","payload":{}}',
        b'{"a":' * 5_000,
        b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    ],
)
@pytest.mark.parametrize("channel", [NOOJEE, CDR])
def test_junk_is_unrecognised_with_its_reason(raw: bytes, channel: str) -> None:
    """Never an exception: it is kept raw."""
    decoded = decode(raw, channel)
    assert isinstance(decoded, Unrecognised)
    assert 0 < len(decoded.reason) <= 300


@pytest.mark.parametrize("poison", [b"\\u0000", b"\\ud800", b"\xff", b"\t"])
def test_poison_hides_no_call(poison: bytes) -> None:
    """NUL, half a surrogate pair, invalid UTF-8 and control characters are replaced in what is shown."""
    for raw, channel in ((event("Connected"), NOOJEE), (cdr(), CDR)):
        said = notification(
            raw.replace(b"outbound", b"out" + poison + b"bound").replace(b"417", poison), channel
        )
        storable(said)


def test_long_names_fit_the_index() -> None:
    """As for every other message."""
    said = notification(event("Connected", uniqueCallId="9" * 5000), NOOJEE)
    assert len(said.call_id) < NAME_BYTES_MAX
    assert "poisoned" in [odd.kind for odd in said.oddities]


def storable(said: object) -> None:
    """Holds nothing that PostgreSQL would refuse."""
    text = msgspec.json.encode(said)
    text.decode()
    assert re.search(rb"(?<!\\)(\\\\)*\\u0000", text) is None
    if isinstance(said, Notification):
        assert {odd.kind for odd in said.oddities} <= ANOMALY_KINDS


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.binary(max_size=80), st.sampled_from([NOOJEE, CDR, INBOUND]))
def test_any_bytes(raw: bytes, channel: str) -> None:
    """There is an answer for any bytes."""
    storable(decode(raw, channel))


@given(
    st.sampled_from(sorted(json.loads(event(""))["CallData"])),
    st.sampled_from(sorted(json.loads(cdr())["payload"])),
    JSON,
)
def test_any_value_in_any_field(of_event: str, of_record: str, value: Any) -> None:
    """A field of another type hides no call, and what is made of it can be stored and folded."""
    for raw, channel in (
        (event(**{"status": "Connected", of_event: value}), NOOJEE),
        (cdr(**{of_record: value}), CDR),
        (old_cdr(**{of_record: value}), CDR),
    ):
        storable(decode(raw, channel))
        folded((raw, channel), (raw, channel))
