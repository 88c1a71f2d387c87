"""What two PBXs say of their calls, read into our vocabulary: Noojee's events and Click2Dial's records.

Noojee sends an event for each status of a call at an extension; Click2Dial sends one record when a call is
over (and, to one integrator, a message when an inbound call comes). Both become a `Notification`, so that
their calls stand in the same table, and facts for `listener.core.dialling`. As `listener.core.decode`, which
asks this module by the channel, it never raises: what cannot be read is `Unrecognised`, and a field of
another type than it should have is an oddity.

A status becomes a state of Genesys' only where both words mean the same (`STATES`). All others keep their own
word, as a state that the fold does not know: `Unlinked` ends nothing and stops the count of talk, `Busy` and
`No Answer` are shown, and whether a Hungup follows them is not documented, so they end nothing either.

A record says that a call is over, and the fold shows that: a call that was met at its end, with no time of
its beginning and no duration, because we heard neither. What the record claims (dialed_at, call_time,
end_reason, …) stands in the call's userData in the PBX's own words: the unit of call_time and the zone of
dialed_at are documented nowhere.

It refuses to know who sent a message, when, and whose account it is.
"""

import hashlib
import json
import math
from collections.abc import Callable
from datetime import datetime
from typing import Any

import msgspec
from msgspec import Struct

from listener.core.calls import (
    Anomaly,
    Decoded,
    JsonObject,
    Notification,
    Participant,
    State,
    Unrecognised,
)
from listener.core.dialling import CallRecord, NoojeeStatus, Sighting, System, extension

NOOJEE = "/noojee/"
"""Channels of Noojee's events begin so, and go on with the PBX and the extension."""

CLICK2DIAL = "/click2dial/"
"""Channels of Click2Dial's messages begin so, and go on with `cdr`, `inbound` or another word."""

CHANNELS = (NOOJEE, CLICK2DIAL)

NOOJEE_EVENT = "NoojeeEvent"
CLICK2DIAL_RECORD = "Click2DialRecord"
CLICK2DIAL_INBOUND = "Click2DialInbound"
"""The `message_type` of each."""

STATES: dict[str, State] = {
    "Dialing Out": State.DIALING,
    "Ringing": State.RINGING,
    "Connected": State.ESTABLISHED,
    "Hungup": State.RELEASED,
}
"""Noojee's statuses that are states of Genesys'."""

TEXT_CHARS_MAX = 10_000
"""Of a longer text in a record so much is kept in userData; the raw message has all of it."""

REASON_CHARS_MAX = 300
"""Longer explanations (they quote the input) are cut."""


class NoojeeEvent(Struct, frozen=True, gc=False):
    """One status of one call at one extension. Texts are empty where the event has none."""

    extension: str
    """Whose event it is: from the channel, since the event does not say it itself."""
    unique_call_id: str
    """An Asterisk uniqueid; names the call in hangup, answer, start and stop."""
    status: str
    """In Noojee's words, also those that nobody knows."""
    inbound: bool | None = None
    """The call is one *to* the extension."""
    outbound_destination: str = ""
    """The number dialled."""
    other_party: str = ""
    """otherPartyCallerId, else callerId."""
    secondary_call_id: str = ""
    """The other leg's unique id, where it was sent."""
    oddities: tuple[Anomaly, ...] = ()


class Click2DialRecord(Struct, frozen=True, gc=False):
    """A call's record, in one spelling whatever the version was. Texts are empty where it has none."""

    kind: str
    """`cdr`; `call` for the message of an inbound call, which has no end."""
    call_ref: str
    """The PBX's id of the call; before v3.0.0 it may be what the dial sent."""
    contact_ref: str
    """What the dial sent. Neither unique per call nor whole: it was cut at 230 characters."""
    extension: str
    number: str
    """The other party, in any of four spellings."""
    dial_number: str
    """The caller id shown (outbound), or the number that was called (inbound)."""
    direction: str
    """call_dir (campaign_ref before v3.0.0), in its own words."""
    end_reason: str = ""
    end_code: str = ""
    call_time: float | None = None
    """As sent; above 0 means that they talked. None if none was sent or it is no number."""
    dialed_at: str = ""
    """As sent: the zone is not documented."""
    payload: JsonObject = {}
    """All of it, in its own words."""
    oddities: tuple[Anomaly, ...] = ()

    @property
    def reference(self) -> str:
        """What a dial may be recognised by; empty if there is nothing."""
        return self.contact_ref or self.call_ref

    @property
    def call_id(self) -> str:
        """What names this call among others of its PBX; empty if nothing does.

        Where contact_ref is sent, call_ref is the PBX's own and unique. Without it call_ref may be what the
        dial sent, which stays the same for the same callee: then the time goes with it.
        """
        if self.call_ref and self.contact_ref:
            return self.call_ref
        return f"{self.call_ref} {self.dialed_at}".strip() if self.dialed_at else ""


def noojee_channel(pbx: str, extension: str) -> str:
    """The channel of the events of an extension at a PBX, which is named as the settings do (no slash)."""
    return f"{NOOJEE}{pbx}/{extension}"


def click2dial_channel(kind: str) -> str:
    """The channel of a Click2Dial message; `kind` is the last word of its list's name: cdr, inbound."""
    return f"{CLICK2DIAL}{kind}"


def decode_pbx(raw: bytes, channel: str) -> Decoded:
    """What a message on one of `CHANNELS` says; total, and storable."""
    if channel.startswith(NOOJEE):
        event = read_noojee(raw, channel)
        return event if isinstance(event, Unrecognised) else _of_event(event)
    record = read_click2dial(raw)
    return record if isinstance(record, Unrecognised) else _of_record(record, raw)


# ── Noojee ────────────────────────────────────────────────────────────────────────────────────────────


def read_noojee(raw: bytes, channel: str) -> NoojeeEvent | Unrecognised:
    """One event, `{CallData, CallID, Code}` as it stands under its extension in a reply of subscribe."""
    try:
        fields, odd = _object(raw)
    except _NotAMessage as refusal:
        return Unrecognised(str(refusal)[:REASON_CHARS_MAX])
    data = fields.get("CallData")
    if not isinstance(data, dict):
        return Unrecognised("an event without CallData")
    text = _texts(data, odd)
    call_id = text("uniqueCallId")
    if not call_id:
        return Unrecognised("an event without uniqueCallId: there is nothing to file it under")
    inbound = data.get("inbound")
    if inbound is not None and not isinstance(inbound, bool):
        odd.append(Anomaly("malformed_field", f"inbound is {inbound!r:.40}, not true or false"))
        inbound = None
    return NoojeeEvent(
        extension=channel.rpartition("/")[2],
        unique_call_id=call_id,
        status=text("status"),
        inbound=inbound,
        outbound_destination=text("outboundDestination"),
        other_party=text("otherPartyCallerId") or text("callerId"),
        secondary_call_id=text("secondaryUniqueCallId"),
        oddities=tuple(odd),
    )


def noojee_fact(event: NoojeeEvent) -> NoojeeStatus:
    """The event as a fact about the dial that its call belongs to."""
    return NoojeeStatus(event.status, bool(event.inbound))


def noojee_sighting(
    event: NoojeeEvent, at: datetime, account: int | None = None, window_s: float = 60.0
) -> Sighting:
    """What an event of a call shows to be recognised by: the other party's number, and the extension. On the
    agent's own leg that number is the callee's, or somebody else's who just rings there. No event has the
    SessionID that the dial was answered with."""
    number = event.outbound_destination or event.other_party
    if event.inbound and extension(number) == extension(event.extension):
        number = ""  # the agent's own
    return Sighting(
        system=System.NOOJEE,
        at=at,
        account=account,
        number=number or None,
        device=event.extension or None,
        window_s=window_s,
    )


def _of_event(event: NoojeeEvent) -> Notification:
    number = event.other_party if event.inbound else event.outbound_destination or event.other_party
    outbound = event.inbound is False
    return Notification(
        message_type=NOOJEE_EVENT,
        notification_type="",
        call_id=event.unique_call_id,
        state=STATES.get(event.status, event.status) or None,
        phone_number=event.extension or None,
        ani=event.other_party or None if event.inbound else None,
        dnis=number or None if outbound else None,
        participants=(Participant(number),) if number else None,
        dialect="noojee",
        oddities=event.oddities,
    )


# ── Click2Dial ────────────────────────────────────────────────────────────────────────────────────────


def read_click2dial(raw: bytes) -> Click2DialRecord | Unrecognised:
    """One message of a list or webhook, `{type, payload}`, in the spelling since v3.0.0 or the one before."""
    try:
        fields, odd = _object(raw)
    except _NotAMessage as refusal:
        return Unrecognised(str(refusal)[:REASON_CHARS_MAX])
    payload = fields.get("payload")
    if not isinstance(payload, dict):
        return Unrecognised("a message of Click2Dial's without payload")
    kind = _texts(fields, odd)("type")
    if kind not in ("cdr", "call"):
        return Unrecognised(f"a message of Click2Dial's of the type {kind!r:.40}")
    text = _texts(payload, odd)
    ref = text("ref")
    # Before v3.0.0 there was no `number`, and `ref` was the client's; of an inbound call it is the extension.
    number = text("number") if "number" in payload else ref
    return Click2DialRecord(
        kind=kind,
        call_ref=text("call_ref"),
        contact_ref=text("contact_ref"),
        extension=text("extension") or (ref if kind == "call" else ""),
        number="" if kind == "call" and "number" not in payload else number,
        dial_number=text("dial_number"),
        direction=text("call_dir") or text("campaign_ref"),
        end_reason=text("end_reason"),
        end_code=text("end_code"),
        call_time=_amount(payload.get("call_time"), odd),
        dialed_at=text("dialed_at"),
        payload={_clean(key): _plain(value) for key, value in payload.items()},
        oddities=tuple(odd),
    )


def click2dial_fact(record: Click2DialRecord) -> CallRecord:
    """The record as a fact about the dial that its call belongs to; of a `cdr` only."""
    return CallRecord(record.end_reason, record.end_code, record.call_time)


def click2dial_sighting(
    record: Click2DialRecord, at: datetime, account: int | None = None, window_s: float = 14_400.0
) -> Sighting:
    """What a record shows to be recognised by: `at` is when it was heard, at the end of the call, so the
    window is that of a whole dial (`Deadlines.dial_s`). A reference that was cut matches no longer one."""
    return Sighting(
        system=System.CLICK2DIAL,
        at=at,
        account=account,
        number=record.number or None,
        device=record.extension or None,
        reference=record.reference or None,
        window_s=window_s,
    )


def _of_record(record: Click2DialRecord, raw: bytes) -> Notification:
    over = record.kind == "cdr"
    outbound, inbound = record.direction == "outbound", record.direction == "inbound"
    number, dial_number = record.number or None, record.dial_number or None
    return Notification(
        message_type=CLICK2DIAL_RECORD if over else CLICK2DIAL_INBOUND,
        notification_type="",
        # What nothing names is a call of its own, the same whenever it is read.
        call_id=record.call_id or f"unnamed-{hashlib.sha256(raw).hexdigest()[:32]}",
        # When an inbound call is announced (in the queue, ringing, answered) is not documented.
        state=State.RELEASED if over else record.kind,
        call_type=record.direction or None,
        phone_number=record.extension or None,
        ani=number if inbound else dial_number if outbound else None,
        dnis=number if outbound else dial_number if inbound else None,
        participants=(Participant(record.number),) if record.number else None,
        user_data=record.payload,
        dialect="click2dial",
        oddities=record.oddities,
    )


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────────


class _NotAMessage(Exception):
    """No JSON object can be read from the bytes; the text says why."""


def _object(raw: bytes) -> tuple[JsonObject, list[Anomaly]]:
    """The JSON object in the bytes, and what was odd about it. What the strict parser refuses is read as far
    as it can be."""
    odd: list[Anomaly] = []
    try:
        try:
            value: Any = msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeError):
            # Integers as text: CPython refuses to convert thousands of digits. No column holds Infinity.
            text = raw.decode("utf-8-sig", "replace")
            value = json.loads(text, strict=False, parse_int=str, parse_constant=str)
            odd.append(Anomaly("poisoned", "read with a loss; the raw message has it"))
    except ValueError as error:
        raise _NotAMessage(f"no JSON: {error}; it begins with {raw[:60]!r}") from None
    except RecursionError:
        raise _NotAMessage("nested deeper than any message should be") from None
    if not isinstance(value, dict):
        raise _NotAMessage("JSON, but no object")
    return value, odd


def _texts(fields: JsonObject, odd: list[Anomaly]) -> Callable[[str], str]:
    """Reads fields as texts: numbers are written out, and what is neither is noted and left out."""

    def text(name: str) -> str:
        value = fields.get(name)
        if value is None:
            return ""
        if isinstance(value, str):
            return _clean(value.strip())
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        odd.append(Anomaly("malformed_field", f"{name} is neither text nor number"))
        return ""

    return text


def _amount(value: Any, odd: list[Anomaly]) -> float | None:
    """A number that is not negative, or None."""
    if value is None or value == "":
        return None
    try:
        amount = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        amount = math.nan
    if math.isfinite(amount) and amount >= 0:
        return amount
    odd.append(Anomaly("malformed_field", f"call_time {value!r:.40} is no number of seconds"))
    return None


def _plain(value: Any) -> Any:
    """A value as userData may hold it: what is no text, number or flag becomes the text of its JSON."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if not isinstance(value, str):
        try:
            value = json.dumps(value, ensure_ascii=False)
        except RecursionError:
            value = "nested deeper than any message should be"
    return _clean(value[:TEXT_CHARS_MAX])


def _clean(text: str) -> str:
    """With U+FFFD for NUL and half surrogate pairs, which PostgreSQL's text cannot hold."""
    if text.isascii():
        return text.replace("\x00", "\ufffd")
    return text.replace("\x00", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
