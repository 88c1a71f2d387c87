"""One message in, one value out; Genesys' spelling ends here.

The same call resource reaches us in several dialects: as `call` inside the `data` of a Bayeux message,
as a bare `data`, as a bare resource, in the list of a REST reply; with participants as strings, as
objects, or in v3's words. This module knows them all and turns each into a `Notification` (or a
`Snapshot`, an `Aside`, or `Unrecognised` with the reason). It never raises: whatever the bytes, there is
an answer, and a field that has an unexpected type becomes an oddity instead of an error.

Two parsers stand behind it. The quick one (msgspec, typed, with `userData` left as raw bytes until it is
known whether its keys repeat) takes every well-formed message; it was chosen over the standard library's
because decoding is the largest cost per message on our side (measured: 6.6 us against 1.3 to 2.4 us).
What it refuses (invalid UTF-8, lone surrogates, NaN, a text where an object belongs, …), and what it would
take but no database holds or should (NUL, numbers beyond 64 bits, thousands of capabilities), goes through
the patient one, which replaces that and says so. What is kept of a message they read alike, and tests hold
them to it; what is odd about a field that is not looked for where it stands, the patient one alone says.

The field names and their traps are from Genesys' documentation of the call resource (GWS 8.5.2) and one
field capture.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import msgspec
from msgspec import Raw, Struct, structs

from listener.core.calls import (
    Anomaly,
    Aside,
    Closing,
    Decoded,
    JsonObject,
    Notification,
    Participant,
    Snapshot,
    Unrecognised,
)
from listener.core.pbx import CHANNELS, decode_pbx

REASON_CHARS_MAX = 300
"""Longer explanations (they quote the input) are cut."""

SERVER_CLOCK_MS_MAX = 253_402_300_799_000
"""The year 9999; a later timestamp is no timestamp."""

INTEGER_MAX = 2**63 - 1
INTEGER_MIN = -(2**63)
"""A number beyond is kept as text: it fits no 64-bit integer, which is what JSON readers agree on."""

INTEGER_DIGITS_MAX = 20
"""Longer, with its sign, is certainly beyond; CPython would refuse to convert thousands of digits."""

NESTING_MAX = 64
"""Attached data that is nested deeper is refused. Without a bound of ours the stack's would hold, and whether
a message can be read, or written down again, would depend on who asks from how deep."""

ODDITIES_MAX = 20
"""A message can be odd in a million places; so many are told apart, and the rest are counted."""

NAME_BYTES_MAX = 2048
"""A longer id or number fits no index (PostgreSQL's btree: 2704 bytes an entry), and is known by its digest.
No server has a reason to send one; but a call must not be hidden by it."""

PARTICIPANTS_MAX = 1000
"""Of more participants the first ones count: a message has room for millions, each of them a row."""

USER_DATA_KEYS_MAX = 10_000
"""Attached data with more keys is not read, since each of them would be a row in the call's history."""

CAPABILITIES_MAX = 200
"""Of more capabilities the first ones of the alphabet count, whatever their order was: Genesys knows some
thirty, and sets of them are kept to be shared."""

CAPABILITY_CHARS_MAX = 100
"""A longer text is no name of a capability, and is left out."""

CAPABILITY_SETS_KEPT_MAX = 256
"""Different sets of capabilities that are kept to be shared; the one that was unused longest goes."""

NAME_CHARS_SHOWN = 40
"""What is left of it to be read."""

CALL_TYPES = ("CallStateChangeMessage", "CallStateChanged")
"""The messageTypes of news of a call, in GWS 8.5.2 and in v3: without a call they are no asides."""

CALLS_CLOSED = "CallsClosed"
"""The messageType of a `Closing`, which we write ourselves."""

_NO_RAW = Raw(b"")
_END_OF_KEY = re.compile(rb'"[ \t\r\n]*:')


class _Party(Struct, gc=False):
    """A participant as an object: `participants` since October 2015, `participantsInfo` before, and v3's.

    Here and below the fields stand in the order in which they are sent: the parser looks for the next name
    where it found the last one, which saves a tenth of the parsing.
    """

    e164Number: str | None = None  # noqa: N815 - Genesys' spelling, here and below
    formattedPhoneNumber: str | None = None  # noqa: N815
    phoneNumber: str | None = None  # noqa: N815
    digits: str | None = None
    E164digits: str | None = None
    number: str | None = None
    role: str | None = None


class _EventProcessing(Struct, gc=False):
    serverGenerationTimestamp: int | None = None  # noqa: N815


class _Metrics(Struct, gc=False):
    eventProcessing: _EventProcessing | None = None  # noqa: N815


class _MonitoringState(Struct, gc=False):
    state: str | None = None


class _Closing(Struct):
    calls: tuple[int, ...]
    reason: str


class _Call(Struct, gc=False):
    """Every field of a call resource that we read."""

    id: str | int | None = None
    state: str | None = None
    callUuid: str | None = None  # noqa: N815
    connId: str | None = None  # noqa: N815
    deviceUri: str | None = None  # noqa: N815
    participants: list[_Party | str] | None = None
    participantsInfo: list[_Party] | None = None  # noqa: N815
    dnis: str | None = None
    callType: str | None = None  # noqa: N815
    capabilities: frozenset[str] | None = None
    userData: Raw = _NO_RAW  # noqa: N815
    duration: str | int | float | None = None
    mute: str | None = None
    recordingState: str | None = None  # noqa: N815
    supervisorListeningIn: bool | None = None  # noqa: N815
    monitoredUserMuted: bool | None = None  # noqa: N815
    monitoring: bool | None = None
    supervisorMonitoringState: _MonitoringState | None = None  # noqa: N815
    ani: str | None = None
    phoneNumber: str | None = None  # noqa: N815
    devicePath: str | None = None  # noqa: N815
    previousConnId: str | None = None  # noqa: N815
    parentConnId: str | None = None  # noqa: N815
    parentCallPath: str | None = None  # noqa: N815
    parentCallUri: str | None = None  # noqa: N815


class _Body(_Call, gc=False):
    """Every field that we read, at whichever of the levels (message, data, call) it stands."""

    channel: str | None = None
    data: "_Body | None" = None
    messageType: str | None = None  # noqa: N815
    notificationType: str | None = None  # noqa: N815
    call: "_Body | None" = None
    calls: "list[_Body] | None" = None
    closing: Any = None
    """Ours: what a message of the type CallsClosed says."""
    devices: Raw = _NO_RAW
    statusCode: Any = None  # noqa: N815
    statusMessage: Any = None  # noqa: N815
    extensions: Any = None
    metrics: _Metrics | None = None


class _Data(Struct, gc=False):
    """What stands beside `call` in the `data` of a Bayeux message."""

    notificationType: str | None = None  # noqa: N815
    call: _Call | None = None
    phoneNumber: str | None = None  # noqa: N815
    extensions: Any = None
    messageType: str | None = None  # noqa: N815
    metrics: _Metrics | None = None


class _Envelope(Struct, gc=False):
    """A Bayeux message in the usual shape: nearly all are, and a `_Body` at each level would take a quarter
    longer to read."""

    data: _Data | None = None
    channel: str | None = None


_USUAL = msgspec.json.Decoder(_Envelope)
_QUICK = msgspec.json.Decoder(_Body)
_ANYTHING = msgspec.json.Decoder()
_NO_BODY = _Body()
_NO_PARTY = _Party()
_UNREADABLE = _Body()
"""In the place of a `call` that is no object."""


def decode(raw: bytes, channel: str = "") -> Decoded:
    """Says what `raw` is. Total: any bytes have an answer, and nothing is raised.

    `raw` is one message: a whole Bayeux message, its `data` alone, a bare call resource, or a REST reply.
    `channel` is where it was heard, if the message does not say so itself. Whatever the answer holds can be
    written as JSON and to PostgreSQL.
    """
    if channel.startswith(CHANNELS):
        return _within_bounds(decode_pbx(raw, channel))
    try:
        # Looking for one byte first is twenty times as quick, and most messages have no escape at all.
        if not (b"\\" in raw and b"\\u0000" in raw):
            try:
                usual = _USUAL.decode(raw)
                data = usual.data
                if data is not None and data.call is not None:
                    decoded: Decoded = _notification(data.call, data, usual.channel or channel, [])
                else:
                    decoded = _interpret(_QUICK.decode(raw), channel, [])
                # A short message has neither long names nor many participants or keys.
                return decoded if len(raw) <= NAME_BYTES_MAX else _within_bounds(decoded)
            except (msgspec.MsgspecError, UnicodeError, _Unstorable):
                pass  # not without a loss: it is read again, patiently
        oddities: list[Anomaly] = []
        patiently = _interpret(_patient(raw, oddities), channel, oddities)
        if oddities and isinstance(patiently, Unrecognised):
            told = "; ".join(odd.detail for odd in _bounded(oddities))
            return Unrecognised(f"{patiently.reason} ({told})"[:REASON_CHARS_MAX])
        return _within_bounds(patiently)
    except _NotAMessage as refusal:
        return Unrecognised(str(refusal)[:REASON_CHARS_MAX])
    except RecursionError:
        return Unrecognised("nested deeper than any message should be")


def _interpret(body: _Body, channel: str, oddities: list[Anomaly]) -> Decoded:
    """Finds the call, wherever it stands, or names what else it is."""
    data = body.data or body
    heard_on = body.channel or channel
    if data.call is not None and data.call is not _UNREADABLE:
        return _notification(data.call, data, heard_on, oddities)
    if data.calls is not None:
        return _snapshot(data.calls, data.statusCode, heard_on, oddities)
    if data.messageType == CALLS_CLOSED and (closing := _closing(data.closing)) is not None:
        return closing
    has_id = data.id is not None or data.callUuid or data.connId
    if not data.messageType and data.state is not None and has_id:
        return _notification(data, data, heard_on, oddities, resource=True)
    if data.call is _UNREADABLE or data.messageType in CALL_TYPES:
        named = (data.messageType or "a JSON object")[:NAME_CHARS_SHOWN]
        return Unrecognised(f"{named} without a call that can be read")
    if data.messageType:
        return Aside(data.messageType, data.notificationType or "")
    if data.devices is not _NO_RAW:
        return Aside("DeviceResources")
    if data.statusCode is not None:
        return Aside("RestReply", data.statusMessage if isinstance(data.statusMessage, str) else "")
    if heard_on.startswith("/meta/"):
        return Aside("MetaReply", heard_on)
    return Unrecognised("a JSON object without call, calls, messageType or statusCode")


def encode_closing(closing: Closing) -> bytes:
    """The message that `decode` reads as this closing."""
    return msgspec.json.encode(
        {"messageType": CALLS_CLOSED, "closing": {"calls": closing.calls, "reason": closing.reason}}
    )


def _closing(value: Any) -> Closing | None:
    """What `encode_closing` wrote; anything else is none of ours."""
    try:
        read = msgspec.convert(value, _Closing)
    except msgspec.ValidationError:
        return None
    if not all(0 < id <= INTEGER_MAX for id in read.calls):
        return None
    return Closing(read.calls, read.reason)


def _snapshot(calls: list[_Body], status: Any, channel: str, oddities: list[Anomaly]) -> Snapshot:
    """Reads a list of live calls; what is odd about one call is told of that call only."""
    complete = status in (0, None)
    found: list[Notification] = []
    for call in calls:
        one = _notification(call, _NO_BODY, channel, [], resource=True)
        if isinstance(one, Notification):
            found.append(one)
        else:
            oddities.append(Anomaly("malformed_field", f"calls: {one.reason}"))
            complete = False
    return Snapshot(tuple(found), complete, _bounded(oddities))


def _notification(
    call: _Call, around: _Body | _Data, channel: str, oddities: list[Anomaly], *, resource: bool = False
) -> Notification | Unrecognised:
    """Reads one call resource; `around` is the object that held it (`data`)."""
    call_id = call.id or call.callUuid or call.connId
    if not call_id:
        return Unrecognised("a call without id, callUuid or connId: there is nothing to file it under")
    participants, dialect = _participants(call.participants, call.participantsInfo)
    message_type = around.messageType
    if resource:
        dialect = "resource"
        message_type = message_type or "CallResource"
    elif message_type == "CallStateChanged" or channel.startswith("/workspace/v3"):
        dialect = "v3"
    notification_type = around.notificationType or ""
    user_data = None if call.userData is _NO_RAW else _user_data(call.userData, oddities)
    extensions = None if around.extensions is None else _extensions(around.extensions, oddities)
    # "ABSENT when empty / after DeleteUserData": absence says "emptied" only where the message is about
    # attached data, or is the whole resource. StatusChange, DtmfSent and others are not read so: a deletion
    # that nobody made must never stand in a call's history.
    emptied = user_data is None and (
        notification_type == "AttachedDataChanged"
        or (resource and call.capabilities is not None and call.duration is not None)
    )
    parent = call.parentCallPath or call.parentCallUri
    device = call.deviceUri or call.devicePath
    monitoring_state = call.supervisorMonitoringState

    # By position, in the order of the fields: names would cost a fifth of the whole decoding.
    return Notification(
        message_type or "CallStateChangeMessage",
        notification_type,
        str(call_id),
        call.state or None,
        call.callUuid,
        call.connId,
        call.previousConnId,
        _last_segment(parent) if parent else call.parentConnId,
        call.callType,
        call.phoneNumber or around.phoneNumber,
        _last_segment(device) if device else None,
        call.ani,
        call.dnis,
        participants,
        None if call.capabilities is None else _one_of_its_kind(call.capabilities),
        user_data,
        emptied,
        None if call.duration is None else _seconds(call.duration, oddities),
        call.mute,
        call.recordingState,
        call.supervisorListeningIn,
        call.monitoredUserMuted,
        call.monitoring,
        None if monitoring_state is None else monitoring_state.state,
        extensions,
        None if around.metrics is None else _server_at(around.metrics, oddities),
        dialect,
        _bounded(oddities) if oddities else (),
    )


@lru_cache(maxsize=CAPABILITY_SETS_KEPT_MAX)
def _one_of_its_kind(capabilities: frozenset[str]) -> frozenset[str]:
    """The same few sets come again and again, in any order: one object for all their calls to share.

    Raises `_Unstorable` for one beyond the bounds, which is not kept then: to ask here costs a set that is
    known nothing.
    """
    if len(capabilities) > CAPABILITIES_MAX or not all(map(_is_capability, capabilities)):
        raise _Unstorable
    return capabilities


def _is_capability(text: str) -> bool:
    return len(text) <= CAPABILITY_CHARS_MAX


def _bounded(oddities: list[Anomaly]) -> tuple[Anomaly, ...]:
    """The first of them, and how many more there were."""
    if len(oddities) <= ODDITIES_MAX:
        return tuple(oddities)
    told, untold = oddities[: ODDITIES_MAX - 1], oddities[ODDITIES_MAX - 1 :]
    return (*told, Anomaly(untold[0].kind, f"and {len(untold)} more, the first: {untold[0].detail}"))


_NAMES = (
    "call_id", "call_uuid", "conn_id", "previous_conn_id", "parent_call_id", "phone_number", "ani", "dnis"
)  # fmt: skip


def _within_bounds(decoded: Decoded) -> Decoded:
    """Without what would make rows that are too long, or too many of them; what is left out is said."""
    if isinstance(decoded, Snapshot):
        return structs.replace(decoded, calls=tuple([_bounded_call(call) for call in decoded.calls]))
    return _bounded_call(decoded) if isinstance(decoded, Notification) else decoded


def _bounded_call(notification: Notification) -> Notification:
    odd: list[Anomaly] = []
    after: dict[str, Any] = {
        name: _short(value)
        for name in _NAMES
        if (value := getattr(notification, name)) is not None and _is_long(value)
    }
    named = bool(after)
    parties = notification.participants or ()
    if len(parties) > PARTICIPANTS_MAX:
        odd.append(Anomaly("poisoned", f"more than {PARTICIPANTS_MAX} participants, the first ones count"))
        parties = after["participants"] = parties[:PARTICIPANTS_MAX]
    if any(_is_long(party.number) or _is_long(party.e164) for party in parties):
        after["participants"] = tuple(
            [structs.replace(each, number=_short(each.number), e164=_short(each.e164)) for each in parties]
        )
        named = True
    if named:
        odd.append(Anomaly("poisoned", "an id or number too long, told by a digest; the raw message has it"))
    keys = len(notification.user_data or ())
    if keys > USER_DATA_KEYS_MAX:
        odd.append(Anomaly("poisoned", f"userData with {keys} keys is left out; the raw message has them"))
        after["user_data"] = None
    if not odd:
        return notification
    return structs.replace(notification, oddities=_bounded([*odd, *notification.oddities]), **after)


def _is_long(text: str) -> bool:
    # No character takes more than four bytes.
    return len(text) > NAME_BYTES_MAX // 4 and len(text.encode()) > NAME_BYTES_MAX


def _short(text: str) -> str:
    """The same for the same text, and another for any other."""
    if not _is_long(text):
        return text
    return f"{text[:NAME_CHARS_SHOWN]}…{hashlib.sha256(text.encode()).hexdigest()}"


def _last_segment(path: str) -> str | None:
    """The id at the end of a path or URI ("/calls/ID", "calls/ID", "http://…/calls/ID")."""
    return path.rstrip("/").rpartition("/")[2] or None


def _participants(
    listed: list[_Party | str] | list[_Party | str | None] | None, info: list[_Party] | None
) -> tuple[tuple[Participant, ...] | None, str]:
    """The other parties in order, and the dialect that they were spelled in.

    Before October 2015 `participants` held texts and `participantsInfo` the details at the same places;
    since then it holds objects; v3 sends `{number, role}`.
    """
    if listed is None:
        if info is None:
            return None, "v2"
        return tuple([_participant(party, "") for party in info[: PARTICIPANTS_MAX + 1]]), "v2-strings"
    if len(listed) > PARTICIPANTS_MAX:
        listed = listed[: PARTICIPANTS_MAX + 1]  # the last one only shows that there were more
    dialect = "v2"
    found = []
    for place, item in enumerate(listed):
        if type(item) is str:
            dialect = "v2-strings"
            detail = info[place] if info is not None and place < len(info) else _NO_PARTY
            found.append(_participant(detail, item))
        elif item is not None:
            found.append(_participant(item, ""))  # type: ignore[arg-type] # the other half of the union
    return tuple(found), dialect


def _participant(party: _Party, number: str) -> Participant:
    """One party from its object; `number` is the plain text that stood for it, if there was one."""
    e164 = party.e164Number or party.E164digits or ""
    digits = party.digits or party.E164digits or ""
    formatted = party.formattedPhoneNumber or ""
    best = number or party.phoneNumber or party.number or digits or e164 or formatted
    return Participant(best, e164, formatted, digits, party.role or "")


def _user_data(raw: Raw, oddities: list[Anomaly]) -> JsonObject | None:
    """The pairs of userData; a key that was attached twice keeps all its values, as a list, and is noted.

    AttachUserData of an existing key "creates duplicates of the same key in the call data" (Genesys,
    AttachUserData). v3 sends a list of `{key, type, value}` instead of an object; there too keys may repeat.
    """
    text = bytes(raw)
    value = _ANYTHING.decode(text)
    keys = _keys(value)
    if type(value) is dict:
        # Each key has one colon outside of texts, and texts can only add colons: as many colons as keys means
        # that no key came twice. The same holds for a colon after a quote, which few texts have. What both
        # counts leave open is settled by the pairs themselves.
        if text.count(b":") > keys and len(_END_OF_KEY.findall(text)) > keys:
            pairs: JsonObject = json.loads(text, object_pairs_hook=lambda pairs: _from_pairs(pairs, oddities))
            _keys(pairs)
            return pairs
        return value
    if value is None:
        return None
    if isinstance(value, list):
        return _from_pairs(_key_values(value, oddities), oddities)
    oddities.append(Anomaly("malformed_field", f"userData is {_kind(value)}, not an object"))
    return {"": value}


def _keys(value: Any, depth: int = NESTING_MAX) -> int:
    """How many keys the objects in a value have, all together; raises for a value that cannot be stored."""
    count = 0
    items: Iterable[Any] = (value,)
    if type(value) is dict:
        count = len(value)
        items = value.values()
    elif type(value) is list:
        items = value
    for item in items:
        # Most items are texts.
        if type(item) is not str:
            if type(item) is dict or type(item) is list:
                if depth == 1:
                    raise _NotAMessage(f"nested deeper than {NESTING_MAX} levels")
                count += _keys(item, depth - 1)
            elif type(item) is int and not INTEGER_MIN <= item <= INTEGER_MAX:
                raise _Unstorable
    return count


def _from_pairs(pairs: list[tuple[str, Any]], oddities: list[Anomaly]) -> JsonObject:
    """An object in which a key that came more than once holds the list of its values."""
    result = dict(pairs)
    if len(result) == len(pairs):
        return result
    values: dict[str, list[Any]] = {}
    for key, value in pairs:
        values.setdefault(key, []).append(value)
    for key, several in values.items():
        if len(several) > 1:
            result[key] = several
            oddities.append(Anomaly("duplicate_key", f"userData {key!r} came {len(several)} times"))
    return result


def _extensions(value: Any, oddities: list[Anomaly]) -> JsonObject | None:
    """What T-Server adds to an event: an object, in v3 a list of pairs like userData."""
    _keys(value)
    if type(value) is dict:
        return value
    if type(value) is list:
        return _from_pairs(_key_values(value, oddities), oddities)
    oddities.append(Anomaly("malformed_field", f"extensions is {_kind(value)}, not an object"))
    return None


def _key_values(items: list[Any], oddities: list[Anomaly]) -> list[tuple[str, Any]]:
    """The pairs of a v3 list; a `kvlist` value is a list of the same kind."""
    pairs: list[tuple[str, Any]] = []
    for item in items:
        if not isinstance(item, dict) or not isinstance(item.get("key"), str):
            oddities.append(Anomaly("malformed_field", f"userData holds {_kind(item)} without a key"))
            pairs.append(("", item))
            continue
        value = item.get("value")
        if item.get("type") == "kvlist" and isinstance(value, list):
            value = _from_pairs(_key_values(value, oddities), oddities)
        pairs.append((item["key"], value))
    return pairs


def _seconds(value: str | int | float, oddities: list[Anomaly]) -> float | None:
    """`duration` is a text of seconds in v2."""
    try:
        seconds = float(value)
    except (ValueError, OverflowError):
        seconds = math.nan
    if math.isfinite(seconds):
        return seconds
    oddities.append(Anomaly("malformed_field", f"duration {value!r:.80} is no number of seconds"))
    return None


def _server_at(metrics: _Metrics, oddities: list[Anomaly]) -> datetime | None:
    """metrics.eventProcessing.serverGenerationTimestamp, epoch milliseconds; metrics may be {} or absent."""
    processing = metrics.eventProcessing
    if processing is None or processing.serverGenerationTimestamp is None:
        return None
    value = processing.serverGenerationTimestamp
    if 0 <= value <= SERVER_CLOCK_MS_MAX:
        return datetime.fromtimestamp(value / 1000, UTC)
    oddities.append(Anomaly("malformed_field", f"serverGenerationTimestamp {value} is no epoch in ms"))
    return None


def _kind(value: Any) -> str:
    """JSON's name for the type of a value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names = {str: "a text", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object")


class _NotAMessage(Exception):
    """No JSON object can be read from the bytes; the text says why."""


class _Unstorable(Exception):
    """The quick parser has read something that no database holds, or should."""


class _Pairs(dict[str, Any]):
    """A JSON object that remembers the keys that came more than once."""

    __slots__ = ("pairs",)

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs


def _patient(raw: bytes, oddities: list[Anomaly]) -> _Body:
    """Reads what the quick parser refused, as far as it can be read; raises `_NotAMessage`."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = raw.decode("utf-8-sig", "replace")
        oddities.append(Anomaly("poisoned", f"invalid UTF-8 at byte {error.start} replaced"))

    def as_text(digits: str) -> str:
        oddities.append(Anomaly("poisoned", f"the number {digits[:40]} kept as text"))
        return digits

    def integer(digits: str) -> int | str:
        if len(digits) <= INTEGER_DIGITS_MAX and INTEGER_MIN <= (value := int(digits)) <= INTEGER_MAX:
            return value
        return as_text(digits)

    def number(digits: str) -> float | str:
        value = float(digits)
        return value if math.isfinite(value) else as_text(digits)

    def pairs(found: list[tuple[str, Any]]) -> _Pairs:
        return _Pairs([(storable(key), storable(value)) for key, value in found])

    def storable(value: Any) -> Any:
        if isinstance(value, list):
            return [storable(item) for item in value]
        if not isinstance(value, str) or (clean := _without_poison(value)) == value:
            return value
        oddities.append(Anomaly("poisoned", "NUL or half a surrogate pair replaced; the raw message has it"))
        return clean

    def read(*, strict: bool) -> Any:
        return json.loads(
            text,
            object_pairs_hook=pairs,
            parse_constant=as_text,
            parse_int=integer,
            parse_float=number,
            strict=strict,
        )

    known = len(oddities)
    try:
        value = read(strict=True)
    except ValueError as error:
        del oddities[known:]
        try:
            value = read(strict=False)
        except ValueError:
            raise _NotAMessage(f"no JSON: {error}; it begins with {text[:60]!r}") from None
        # RFC 8259, section 7: they must be escaped. What they stand in can be read all the same.
        oddities.append(Anomaly("poisoned", "control characters inside a text"))
    if not isinstance(value, _Pairs):
        raise _NotAMessage(f"{_kind(value)} instead of a JSON object")
    return _Coercion(oddities).body(value)


class _Coercion:
    """Makes a `_Body` of any JSON object: what has another type than it should is noted, and read where
    that is possible without guessing (a number for a text), else left out."""

    def __init__(self, oddities: list[Anomaly]) -> None:
        self._oddities = oddities

    def body(self, pairs: _Pairs) -> _Body:
        """The fields that we read, coerced."""
        read: dict[str, Callable[[str, Any], Any]] = {
            "data": self._nested,
            "call": self._call,
            "calls": self._calls,
            "closing": self._any,
            "devices": self._raw,
            "statusCode": self._any,
            "statusMessage": self._any,
            "extensions": self._any,
            "metrics": self._metrics,
            "participants": self._participants,
            "participantsInfo": self._participants_info,
            "capabilities": self._capabilities,
            "userData": self._raw,
            "duration": self._duration,
            "supervisorListeningIn": self._flag,
            "monitoredUserMuted": self._flag,
            "monitoring": self._flag,
            "supervisorMonitoringState": self._monitoring_state,
        }
        fields: dict[str, Any] = {}
        for name in _Body.__struct_fields__:
            if pairs.get(name) is not None:
                reader: Callable[[str, Any], Any] = read.get(name, self._text)
                fields[name] = reader(name, pairs[name])
        return _Body(**fields)

    def _odd(self, name: str, value: Any, wanted: str) -> None:
        self._oddities.append(Anomaly("malformed_field", f"{name} is {_kind(value)}, not {wanted}"))

    def _any(self, _name: str, value: Any) -> Any:
        return _plain(value)

    def _text(self, name: str, value: Any) -> str | None:
        if isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        self._odd(name, value, "text")
        return None

    def _nested(self, name: str, value: Any) -> _Body | None:
        if isinstance(value, _Pairs):
            return self.body(value)
        self._odd(name, value, "an object")
        return None

    def _call(self, name: str, value: Any) -> _Body:
        return self._nested(name, value) or _UNREADABLE

    def _calls(self, name: str, value: Any) -> list[_Body] | None:
        if isinstance(value, list):
            return [self.body(item) if isinstance(item, _Pairs) else _Body() for item in value]
        self._odd(name, value, "a list")
        return None

    def _object(self, name: str, value: Any) -> JsonObject | None:
        if isinstance(value, _Pairs):
            plain: JsonObject = _plain(value)
            return plain
        self._odd(name, value, "an object")
        return None

    def _metrics(self, name: str, value: Any) -> _Metrics | None:
        metrics = self._object(name, value) or {}
        processing = metrics.get("eventProcessing")
        stamp = processing.get("serverGenerationTimestamp") if isinstance(processing, dict) else None
        if stamp is None:
            return None
        if isinstance(stamp, int) and not isinstance(stamp, bool):
            return _Metrics(_EventProcessing(stamp))
        self._odd("serverGenerationTimestamp", stamp, "an epoch in ms")
        return None

    def _party(self, name: str, value: Any) -> _Party | None:
        if not isinstance(value, _Pairs):
            self._odd(name, value, "a participant")
            return None
        fields = {field: value[field] for field in _Party.__struct_fields__ if value.get(field) is not None}
        return _Party(**{field: self._text(f"{name}.{field}", item) for field, item in fields.items()})

    def _participants(self, name: str, value: Any) -> list[_Party | str | None] | None:
        if not isinstance(value, list):
            self._odd(name, value, "a list")
            return None
        # An unreadable one leaves an empty place: `participantsInfo` goes by place.
        return [
            self._text(name, item)
            if isinstance(item, str | int) and not isinstance(item, bool)
            else self._party(name, item)
            for item in value
        ]

    def _participants_info(self, name: str, value: Any) -> list[_Party] | None:
        if not isinstance(value, list):
            self._odd(name, value, "a list")
            return None
        return [self._party(name, item) or _Party() for item in value]

    def _capabilities(self, name: str, value: Any) -> frozenset[str] | None:
        if not isinstance(value, list):
            self._odd(name, value, "a list")
            return None
        for item in value:
            if not isinstance(item, str):
                self._odd(f"{name}[]", item, "text")
        texts = {item for item in value if isinstance(item, str)}
        kept = sorted(filter(_is_capability, texts))[:CAPABILITIES_MAX]
        if left_out := len(texts) - len(kept):
            bounds = f"more than {CAPABILITIES_MAX} or longer than {CAPABILITY_CHARS_MAX} characters"
            detail = f"{left_out} of the capabilities are left out, {bounds}; the raw message has them"
            self._oddities.append(Anomaly("poisoned", detail))
        return frozenset(kept)

    def _raw(self, _name: str, value: Any) -> Raw:
        # Back to text, repeated keys included, so that one function reads userData for both parsers.
        return Raw(_dumps(value).encode())

    def _duration(self, name: str, value: Any) -> str | int | float | None:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return value
        self._odd(name, value, "a number of seconds")
        return None

    def _flag(self, name: str, value: Any) -> bool | None:
        if isinstance(value, bool):
            return value
        self._odd(name, value, "true or false")
        return {"true": True, "false": False}.get(value) if isinstance(value, str) else None

    def _monitoring_state(self, name: str, value: Any) -> _MonitoringState:
        state = value.get("state") if isinstance(value, _Pairs) else value
        return _MonitoringState(None if state is None else self._text(name, state))


def _plain(value: Any) -> Any:
    """Without `_Pairs`, all the way down."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _dumps(value: Any) -> str:
    """JSON text of a value in which objects may hold a key more than once."""
    if isinstance(value, _Pairs):
        return "{" + ",".join([f"{json.dumps(key)}:{_dumps(item)}" for key, item in value.pairs]) + "}"
    if isinstance(value, list):
        return "[" + ",".join([_dumps(item) for item in value]) + "]"
    return json.dumps(value)


def _without_poison(text: str) -> str:
    """With U+FFFD for NUL and lone surrogates, which PostgreSQL's text cannot hold."""
    if "\x00" in text:
        text = text.replace("\x00", "\ufffd")
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
