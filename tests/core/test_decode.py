"""Decoding: every dialect and trap of the call resource, and that no bytes whatever are an accident."""

import copy
import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from listener.core import decode as decoder
from listener.core.calls import (
    ANOMALY_KINDS,
    Aside,
    Closing,
    Decoded,
    Notification,
    Participant,
    Snapshot,
    Unrecognised,
)
from listener.core.decode import decode, encode_closing
from tests.core.messages import (
    ABSENT,
    ASIDES,
    CHANNEL,
    CONN,
    DEVICE,
    DIALECTS,
    DN,
    NUMBER,
    UUID,
    JsonObject,
    bare,
    bayeux,
    encoded,
    handful,
    in_data,
    message,
    objects,
    resource,
    snapshot,
    stamped,
    strings,
    v3,
)


def notification(raw: bytes | JsonObject, channel: str = "") -> Notification:
    """What decoding gives, which must be a notification."""
    decoded = decode(raw if isinstance(raw, bytes) else encoded(raw), channel)
    assert isinstance(decoded, Notification), decoded
    return decoded


def live(raw: bytes | JsonObject) -> Snapshot:
    """What decoding gives, which must be a snapshot."""
    decoded = decode(raw if isinstance(raw, bytes) else encoded(raw))
    assert isinstance(decoded, Snapshot), decoded
    return decoded


def refused(raw: bytes | JsonObject) -> str:
    """Why decoding gives nothing but a reason."""
    decoded = decode(raw if isinstance(raw, bytes) else encoded(raw))
    assert isinstance(decoded, Unrecognised), decoded
    return decoded.reason


def kinds(decoded: Decoded) -> list[str]:
    """The kinds of what the decoder found odd."""
    assert isinstance(decoded, Notification | Snapshot)
    return [odd.kind for odd in decoded.oddities]


def with_user_data(text: str, kind: str = "StatusChange") -> bytes:
    """A notification whose userData is exactly this text."""
    return message(kind=kind, userData="@").replace(b'"@"', text.encode())


# ── Dialects ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("state", ["Dialing", "Ringing", "Established", "Held", "Released"])
def test_each_dialect_says_the_same(dialect: str, state: str) -> None:
    """State, ids and the other parties come out alike, whatever the spelling was."""
    heard = notification(DIALECTS[dialect](state, numbers=(NUMBER, "7031"), userData={"Case": "4"}))
    assert heard.state == state
    assert {heard.call_id, heard.call_uuid, heard.conn_id} == {UUID, CONN}
    assert heard.participants is not None
    assert [each.number for each in heard.participants] == [NUMBER, "7031"]
    assert heard.dnis == DN
    assert heard.call_type == "Internal"
    assert heard.user_data == {"Case": "4"}
    assert heard.duration_s == 0
    assert heard.oddities == ()


@pytest.mark.parametrize(
    ("dialect", "named"),
    [
        ("objects", "v2"),
        ("strings", "v2-strings"),
        ("strings, located", "v2-strings"),
        ("v3", "v3"),
        ("data alone", "v2"),
        ("bare", "resource"),
    ],
)
def test_the_dialect_is_named(dialect: str, named: str) -> None:
    """A call that ends depends on it: v3 sends Completed, v2 does not."""
    assert notification(DIALECTS[dialect]("Ringing")).dialect == named


def test_v3_is_also_known_by_its_channel() -> None:
    """A message without messageType is v3's when it came on v3's channel, in the message or beside it."""
    data = {"call": resource("Released")}
    assert notification(bayeux(data, "/workspace/v3/voice")).dialect == "v3"
    assert notification(data, "/workspace/v3/voice").dialect == "v3"
    assert notification(data, CHANNEL).dialect == "v2"


def test_the_envelope_is_read() -> None:
    """What stands beside the call in `data` belongs to the notification."""
    heard = notification(message("Ringing", "ParticipantsUpdated", server_ms=1_772_438_400_123))
    assert (heard.message_type, heard.notification_type) == ("CallStateChangeMessage", "ParticipantsUpdated")
    assert heard.phone_number == DN
    assert heard.extensions == {"BusinessCall": 0}
    assert heard.server_at == datetime(2026, 3, 2, 8, 0, 0, 123_000, tzinfo=UTC)
    assert heard.device_id == DEVICE


def test_every_field_is_in_its_place() -> None:
    """Each has a value here that no other has."""
    call = {
        "id": "id",
        "state": "state",
        "callUuid": "uuid",
        "connId": "conn",
        "previousConnId": "previous",
        "parentCallPath": "/calls/parent",
        "callType": "type",
        "phoneNumber": "own",
        "deviceUri": "http://192.0.2.1/devices/device",
        "ani": "ani",
        "dnis": "dnis",
        "participants": ["number"],
        "capabilities": ["capability"],
        "userData": {"user": "data"},
        "duration": "7",
        "mute": "mute",
        "recordingState": "recording",
        "supervisorListeningIn": True,
        "monitoredUserMuted": False,
        "monitoring": True,
        "supervisorMonitoringState": {"state": "monitoring"},
    }
    around = {"extensions": {"ex": "tensions"}, "metrics": stamped(1_000), "messageType": "message"}
    heard = notification({"call": call, "notificationType": "notification"} | around)
    assert msgspec.structs.asdict(heard) == {
        "message_type": "message",
        "notification_type": "notification",
        "call_id": "id",
        "state": "state",
        "call_uuid": "uuid",
        "conn_id": "conn",
        "previous_conn_id": "previous",
        "parent_call_id": "parent",
        "call_type": "type",
        "phone_number": "own",
        "device_id": "device",
        "ani": "ani",
        "dnis": "dnis",
        "participants": (Participant("number"),),
        "capabilities": frozenset({"capability"}),
        "user_data": {"user": "data"},
        "user_data_emptied": False,
        "duration_s": 7.0,
        "mute": "mute",
        "recording": "recording",
        "supervisor_listening_in": True,
        "monitored_user_muted": False,
        "monitoring": True,
        "supervisor_monitoring_state": "monitoring",
        "extensions": {"ex": "tensions"},
        "server_at": datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC),
        "dialect": "v2-strings",
        "oddities": (),
    }


def test_what_is_missing_is_none() -> None:
    """No field is made up: absence is not a default."""
    heard = notification({"call": {"id": UUID}})
    fields = {name: getattr(heard, name) for name in heard.__struct_fields__}
    told = {"message_type", "notification_type", "call_id", "user_data_emptied", "dialect", "oddities"}
    assert all(value is None for name, value in fields.items() if name not in told)
    assert not heard.user_data_emptied


def test_extensions_may_be_pairs() -> None:
    """v3 spells what has keys and values as a list of pairs; where it stands in the call it is not ours."""
    pairs = [{"key": "WrapUpTime", "type": "int", "value": 15}]
    heard = notification(bayeux(in_data(resource(extensions=pairs), extensions=pairs)))
    assert heard.extensions == {"WrapUpTime": 15}
    assert heard.oddities == ()
    odd = notification(bayeux(in_data(resource(), extensions="x")))
    assert (odd.extensions, kinds(odd)) == (None, ["malformed_field"])


def test_supervisor_fields() -> None:
    """They are read where they are, in both shapes of the monitoring state; `false` is not absence."""
    heard = notification(
        message(supervisorListeningIn=True, monitoring=False, supervisorMonitoringState={"state": "ListenIn"})
    )
    assert heard.supervisor_listening_in is True
    assert heard.monitored_user_muted is False
    assert heard.monitoring is False
    assert heard.supervisor_monitoring_state == "ListenIn"


def test_null_is_absence() -> None:
    """A field that is null says as much as one that is missing."""
    nulls = dict.fromkeys(resource("Ringing"), None) | {"id": UUID, "state": "Ringing"}
    heard = notification({"call": nulls, "extensions": None, "metrics": None, "messageType": None})
    assert heard == notification({"call": {"id": UUID, "state": "Ringing"}})


def test_order_of_keys_does_not_matter() -> None:
    """Documents put messageType first or last, and the call anywhere."""
    body = objects("Held", userData={"a": "1"})

    def reversed_keys(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: reversed_keys(item) for key, item in reversed(value.items())}
        return value

    assert notification(reversed_keys(body)) == notification(body)


def test_order_of_capabilities_does_not_matter() -> None:
    """They are a set: the server shuffles them from message to message."""
    one = notification(message(capabilities=["Hold", "Hangup", "SendDtmf"]))
    other = notification(message(capabilities=["SendDtmf", "Hold", "Hangup", "Hold"]))
    assert one == other
    assert one.capabilities == frozenset({"Hold", "Hangup", "SendDtmf"})


def test_no_capabilities_is_not_unknown_capabilities() -> None:
    """Released carries an empty list, which differs from a message that does not list them."""
    assert notification(message(capabilities=[])).capabilities == frozenset()
    assert notification(message(capabilities=ABSENT)).capabilities is None


@pytest.mark.parametrize("state", ["Parked", "ringing", "Queued", "Dialing "])
def test_unknown_states_are_kept(state: str) -> None:
    """No closed list of states was found, so none is enforced."""
    assert notification(message(state)).state == state


def test_an_empty_state_is_no_state() -> None:
    """An empty text says nothing about the call."""
    assert notification(message("")).state is None


@pytest.mark.parametrize("kind", ["SomethingNew", "", "statuschange"])
def test_unknown_notification_types_are_kept(kind: str) -> None:
    """The vendor's list is cut off in the documents."""
    assert notification(message(kind=kind)).notification_type == kind


# ── Ids and links ─────────────────────────────────────────────────────────────────────────────────────


def test_the_id_is_opaque() -> None:
    """Before 2015 it was the connId, since then the callUuid: it is kept as it came."""
    assert notification(strings("Ringing")).call_id == CONN
    assert notification(objects("Ringing")).call_id == UUID


@pytest.mark.parametrize(
    ("fields", "call_id"),
    [
        ({"id": ABSENT, "callUuid": "u"}, "u"),
        ({"id": "", "callUuid": "u"}, "u"),
        ({"id": ABSENT, "callUuid": ABSENT, "connId": "c"}, "c"),
        ({"id": None, "callUuid": "", "connId": "c"}, "c"),
        ({"id": 12345}, "12345"),
        ({"id": 12.5}, "12.5"),
        ({"id": 10**30}, str(10**30)),
    ],
)
def test_the_best_id_there_is(fields: JsonObject, call_id: str) -> None:
    """A call without `id` is filed under another of its ids; a number is an id too."""
    assert notification(message(**fields)).call_id == call_id


def test_a_call_without_any_id() -> None:
    """There is nothing to file it under, and the reason says so."""
    assert "without id" in refused(message(id=ABSENT, callUuid=ABSENT, connId=ABSENT))


@pytest.mark.parametrize(
    ("fields", "parent"),
    [
        ({"parentCallPath": "/calls/P1"}, "P1"),
        ({"parentCallPath": "calls/P1"}, "P1"),
        ({"parentCallUri": "http://192.0.2.10:8090/api/v2/me/calls/P1"}, "P1"),
        ({"parentCallUri": "http://192.0.2.10/calls/P1/"}, "P1"),
        ({"parentCallPath": "/calls/P1", "parentCallUri": "http://elsewhere/calls/P2"}, "P1"),
        ({"parentConnId": "c9"}, "c9"),
        ({"parentCallPath": "/calls/P1", "parentConnId": "c9"}, "P1"),
        ({"parentCallPath": "/"}, None),
        ({}, None),
    ],
)
def test_the_parent_of_a_consult(fields: JsonObject, parent: str | None) -> None:
    """By path rather than by URI, whose host depends on who asked."""
    assert notification(message("Dialing", callType="Consult", **fields)).parent_call_id == parent


def test_ids_of_before() -> None:
    """v3 says which id a call had before a transfer was completed."""
    assert notification(v3("Established", previousConnId="c1")).previous_conn_id == "c1"


# ── Participants ──────────────────────────────────────────────────────────────────────────────────────


def parties(participants: Any, info: Any = ABSENT) -> tuple[Participant, ...] | None:
    """The participants that a message with these fields has."""
    return notification(message(participants=participants, participantsInfo=info)).participants


def test_participants_as_objects() -> None:
    """Each spelling has its place; an internal number has an empty e164Number."""
    assert parties(
        [
            {"e164Number": "", "formattedPhoneNumber": "70-23", "phoneNumber": "7023", "digits": "7023"},
            {"e164Number": "+4912", "formattedPhoneNumber": "+49 12", "phoneNumber": "012", "digits": "4912"},
        ]
    ) == (
        Participant("7023", "", "70-23", "7023"),
        Participant("012", "+4912", "+49 12", "4912"),
    )


def test_participants_as_texts() -> None:
    """The details stand at the same places in participantsInfo, in two known shapes, or are missing."""
    info = [
        {"digits": "7023", "e164Number": "7023", "formattedPhoneNumber": "70-23"},
        {"country": {"code": "DE"}, "formattedPhoneNumber": "+49 12", "location": None, "E164digits": "4912"},
    ]
    assert parties(["7023", "012", "7031"], info) == (
        Participant("7023", "7023", "70-23", "7023"),
        Participant("012", "4912", "+49 12", "4912"),
        Participant("7031"),
    )


def test_details_without_participants() -> None:
    """participantsInfo alone still names the parties."""
    assert parties(ABSENT, [{"digits": "7023"}]) == (Participant("7023", digits="7023"),)


def test_an_unreadable_participant_does_not_shift_the_details() -> None:
    """Details belong to a place; skipping a participant must not give its details to the next."""
    info = [{"digits": "1", "formattedPhoneNumber": "one"}, {"digits": "2", "formattedPhoneNumber": "two"}]
    assert parties([None, "2"], info) == (Participant("2", "", "two", "2"),)
    assert parties([["x"], "2"], info) == (Participant("2", "", "two", "2"),)


def test_participants_of_v3() -> None:
    """Number and role."""
    heard = notification(v3("Established", numbers=("7023",)))
    assert heard.participants == (Participant("7023", role="RoleDestination"),)


@pytest.mark.parametrize(
    ("party", "number"),
    [
        ({"phoneNumber": "1", "number": "2", "digits": "3"}, "1"),
        ({"number": "2", "digits": "3"}, "2"),
        ({"digits": "3", "e164Number": "+4"}, "3"),
        ({"e164Number": "+4", "formattedPhoneNumber": "5"}, "+4"),
        ({"E164digits": "44"}, "44"),
        ({"formattedPhoneNumber": "5"}, "5"),
        ({"phoneNumber": "", "digits": "3"}, "3"),
        ({"phoneNumber": 7023}, "7023"),
        ({"somethingElse": "x"}, ""),
    ],
)
def test_the_best_number_there_is(party: JsonObject, number: str) -> None:
    """The number is empty only when the message has none at all."""
    found = parties([party])
    assert found is not None
    assert found[0].number == number


def test_nobody_is_not_unknown() -> None:
    """An empty list says that nobody else is there; its absence says nothing."""
    assert parties([]) == ()
    assert parties(ABSENT) is None


# ── userData ──────────────────────────────────────────────────────────────────────────────────────────


def test_user_data_of_all_types() -> None:
    """Texts, numbers and nested objects are kept as they are."""
    data = {"a": "x", "n": 0, "f": -2.5, "t": True, "WWE_PARTY_7023": {"path": "/u", "deep": {"l": [1, {}]}}}
    assert notification(message(userData=data)).user_data == data


@pytest.mark.parametrize(
    ("kind", "emptied"),
    [
        ("AttachedDataChanged", True),
        ("StatusChange", False),
        ("ParticipantsUpdated", False),
        ("DtmfSent", False),
        ("CallRecordingStateChange", False),
        ("MonitoredUserMutedStateChange", False),
        ("PropertiesUpdated", False),
        ("SomethingNew", False),
        ("", False),
    ],
)
def test_absent_user_data(kind: str, emptied: bool) -> None:
    """After DeleteUserData the field is absent, which means "emptied" only in a message about it."""
    heard = notification(message("Established", kind))
    assert heard.user_data is None
    assert heard.user_data_emptied is emptied


@pytest.mark.parametrize("kind", ["AttachedDataChanged", "StatusChange"])
def test_present_user_data_is_never_emptied(kind: str) -> None:
    """Whatever stands there is the userData, also when it is an empty object."""
    assert not notification(message(kind=kind, userData={"a": "1"})).user_data_emptied
    empty = notification(message(kind=kind, userData={}))
    assert empty.user_data == {}
    assert not empty.user_data_emptied


def test_a_whole_resource_without_user_data_is_emptied() -> None:
    """A snapshot lists everything; one that was cut short says nothing about what it lacks."""
    assert notification(bare("Held")).user_data_emptied
    assert not notification(bare("Held", capabilities=ABSENT)).user_data_emptied
    assert [call.user_data_emptied for call in live(snapshot(resource("Held"))).calls] == [True]
    assert [call.user_data_emptied for call in live(snapshot(resource("Held", duration=ABSENT))).calls] == [
        False
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"k":"1","k":"2"}', {"k": ["1", "2"]}),
        ('{"k":"1","o":1,"k":"1","k":3}', {"k": ["1", "1", 3], "o": 1}),
        ('{"k" : "1" ,\n\t"k"\r\n:\t"2"}', {"k": ["1", "2"]}),
        ('{"k":"a:b\\":c","k":"d"}', {"k": ['a:b":c', "d"]}),
        ('{"k":1,"\\u006b":2}', {"k": [1, 2]}),
        ('{"a":{"k":1,"k":2}}', {"a": {"k": [1, 2]}}),
        ('{"a":[{"k":1,"k":2}]}', {"a": [{"k": [1, 2]}]}),
        ('{"k":["x"],"k":["x"]}', {"k": [["x"], ["x"]]}),
        ('{"":1,"":2}', {"": [1, 2]}),
    ],
)
def test_repeated_keys_keep_all_their_values(text: str, expected: JsonObject) -> None:
    """AttachUserData of an existing key "creates duplicates of the same key": none may get lost."""
    heard = notification(with_user_data(text))
    assert heard.user_data == expected
    assert kinds(heard) == ["duplicate_key"]


@pytest.mark.parametrize(
    "text",
    [
        '{"k":"12:30:00","u":"http://192.0.2.1:80/x"}',
        '{"a:b":"c"}',
        '{"k":"\\":\\":"}',
        '{"k":"\\" : "}',
        '{"a":{"k":":"},"k":[":",{"k":"::"}]}',
        "{}",
        " { } ",
        '{"k":"{\\"k\\":1,\\"k\\":2}"}',
    ],
)
def test_colons_in_texts_are_no_keys(text: str) -> None:
    """A time or an address is no repetition."""
    heard = notification(with_user_data(text))
    assert heard.user_data == json.loads(text)
    assert heard.oddities == ()


def test_user_data_of_v3() -> None:
    """A list of pairs, in which a kvlist is an object, and keys may repeat at every level."""
    pairs = [
        {"key": "a", "type": "str", "value": "1"},
        {"key": "n", "type": "int", "value": 2},
        {"key": "o", "type": "kvlist", "value": [{"key": "x", "type": "str", "value": "y"}]},
        {"key": "a", "type": "str", "value": "3"},
        {"key": "l", "type": "unknown", "value": [1]},
        {"key": "null", "type": "str"},
    ]
    heard = notification(message(userData=pairs))
    assert heard.user_data == {"a": ["1", "3"], "n": 2, "o": {"x": "y"}, "l": [1], "null": None}
    assert kinds(heard) == ["duplicate_key"]
    nested = [{"key": "o", "type": "kvlist", "value": [{"key": "x", "value": 1}, {"key": "x", "value": 2}]}]
    assert notification(message(userData=nested)).user_data == {"o": {"x": [1, 2]}}
    assert notification(message(userData=[])).user_data == {}


def test_user_data_that_is_something_else() -> None:
    """It is kept under no key, and noted."""
    for odd in ("text", 5, True, [1], [{"value": "x"}]):
        heard = notification(message(userData=odd))
        assert heard.user_data == {"": odd[0] if isinstance(odd, list) else odd}
        assert kinds(heard) == ["malformed_field"]


_WHITE = st.text(" \t\r\n", max_size=2)
_TEXTS = st.one_of(
    st.text('":\\ {}[],k/', max_size=6),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4),
)
_KEYS = st.one_of(st.sampled_from(["k", "key", ""]), _TEXTS)


def _spelled_text(text: str, escaped: bool) -> str:
    """A JSON text, plainly or with every character as an escape."""
    if escaped and all(ord(char) < 0x10000 for char in text):
        return '"' + "".join(f"\\u{ord(char):04x}" for char in text) + '"'
    return json.dumps(text, ensure_ascii=escaped)


@st.composite
def _json_text(draw: st.DrawFn, depth: int = 3) -> str:
    """JSON in any spelling: white space anywhere, repeated keys, colons and quotes in the texts."""
    kind = draw(st.integers(0, 4 if depth else 2))
    if kind <= 1:
        return _spelled_text(draw(_TEXTS), escaped=draw(st.booleans()))
    if kind == 2:
        return draw(st.sampled_from(["1", "-0.5", "true", "false", "null", "1e3", "12"]))
    items = draw(st.lists(_json_text(depth - 1), max_size=4))
    if kind == 3:
        return "[" + ",".join([f"{draw(_WHITE)}{item}{draw(_WHITE)}" for item in items]) + draw(_WHITE) + "]"
    return _object_text(draw, items)


def _object_text(draw: st.DrawFn, items: list[str]) -> str:
    keys = [_spelled_text(draw(_KEYS), escaped=draw(st.booleans())) for _ in items]
    gaps = [draw(st.tuples(_WHITE, _WHITE, _WHITE, _WHITE)) for _ in items]
    pairs = [f"{a}{key}{b}:{c}{item}{d}" for key, item, (a, b, c, d) in zip(keys, items, gaps, strict=True)]
    return "{" + (",".join(pairs) or draw(_WHITE)) + "}"


@st.composite
def _user_data_text(draw: st.DrawFn) -> str:
    return _object_text(draw, draw(st.lists(_json_text(), max_size=5)))


@given(_user_data_text())
def test_no_repeated_key_escapes_notice(text: str) -> None:
    """Whatever the spelling, userData is what a parser finds that is shown each pair: counting is sound."""
    repeated: list[str] = []

    def grouped(pairs: list[tuple[str, Any]]) -> JsonObject:
        found: dict[str, list[Any]] = {}
        for key, value in pairs:
            found.setdefault(key, []).append(value)
        repeated.extend(key for key, values in found.items() if len(values) > 1)
        return {key: values if len(values) > 1 else values[0] for key, values in found.items()}

    expected = json.loads(text, object_pairs_hook=grouped)
    heard = notification(b'{"call":{"id":"a","userData":' + text.encode() + b"}}")
    assert heard.user_data == expected
    assert kinds(heard) == ["duplicate_key"] * len(repeated)


# ── Numbers and clocks ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("sent", "seconds"),
    [("0", 0), ("1174", 1174), ("27.5", 27.5), (12, 12), (0.25, 0.25), (ABSENT, None), (None, None)],
)
def test_duration_is_a_text_of_seconds(sent: Any, seconds: float | None) -> None:
    """Or a number, in other dialects."""
    heard = notification(message(duration=sent))
    assert heard.duration_s == seconds
    assert heard.oddities == ()


@pytest.mark.parametrize("sent", ["", "soon", "NaN", "inf", "1e400", 10**400, True, [], {}])
def test_duration_that_is_none(sent: Any) -> None:
    """It is noted and left out."""
    heard = notification(message(duration=sent))
    assert heard.duration_s is None
    assert "malformed_field" in kinds(heard)


@pytest.mark.parametrize(
    "metrics", [ABSENT, None, {}, {"eventProcessing": None}, {"eventProcessing": {}}, {"other": 1}]
)
def test_metrics_may_be_missing(metrics: Any) -> None:
    """Then there is no server clock, and nothing is odd about it."""
    heard = notification(bayeux(in_data(resource(), metrics=metrics)))
    assert heard.server_at is None
    assert heard.oddities == ()


@pytest.mark.parametrize("stamp", [-1, 10**15, 10**30, "1772438400123", 1.5, True, []])
def test_a_server_clock_that_is_none(stamp: Any) -> None:
    """A number that is no moment, or no number, is noted and left out."""
    heard = notification(bayeux(in_data(resource(), metrics=stamped(stamp))))
    assert heard.server_at is None
    assert "malformed_field" in kinds(heard)


def test_the_last_moment() -> None:
    """The bound itself is a moment."""
    heard = notification(message(server_ms=decoder.SERVER_CLOCK_MS_MAX))
    assert heard.server_at is not None
    assert heard.server_at.year == 9999


# ── What is no call ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ASIDES)
def test_asides(name: str) -> None:
    """Messages about devices, channels, campaigns and errors are known and concern no call."""
    decoded = decode(encoded(ASIDES[name]))
    assert isinstance(decoded, Aside)
    assert decoded.message_type == name


@pytest.mark.parametrize("closing", [Closing((), ""), Closing((1, 2**63 - 1), "not heard of for 24 h")])
def test_a_closing_is_read_as_it_was_written(closing: Closing) -> None:
    """So the calls follow from the journal alone."""
    assert decode(encode_closing(closing)) == closing


@pytest.mark.parametrize(
    "said",
    [
        ABSENT,
        None,
        {},
        {"calls": [1]},
        {"calls": "1", "reason": "r"},
        {"calls": [0], "reason": "r"},
        {"calls": [-1], "reason": "r"},
        {"calls": [2**63], "reason": "r"},
        {"calls": [10**400], "reason": "r"},
        {"calls": [1.5], "reason": "r"},
        {"calls": ["1"], "reason": "r"},
        {"calls": [True], "reason": "r"},
        {"calls": [1], "reason": 5},
    ],
)
def test_what_looks_like_a_closing_is_none(said: Any) -> None:
    """Whoever else uses the word means something else, which concerns no call."""
    body = {"messageType": "CallsClosed"} | ({} if said is ABSENT else {"closing": said})
    assert decode(encoded(body)) == Aside("CallsClosed")


@pytest.mark.parametrize(
    ("body", "aside"),
    [
        ({"statusCode": 20, "statusMessage": "Access denied"}, Aside("RestReply", "Access denied")),
        ({"statusCode": 7, "failed": [{"statusCode": 4}]}, Aside("RestReply")),
        ({"statusCode": 0, "statusMessage": {"a": 1}}, Aside("RestReply")),
        ({"statusCode": 0, "devices": []}, Aside("DeviceResources")),
        ({"channel": "/meta/connect", "successful": True}, Aside("MetaReply", "/meta/connect")),
    ],
)
def test_replies(body: JsonObject, aside: Aside) -> None:
    """So are REST and Bayeux replies."""
    assert decode(encoded(body)) == aside


@pytest.mark.parametrize(
    "raw", [b"", b" ", b"null", b"true", b"3", b'"text"', b"[]", b"[{}]", b"{}", b'{"data":{}}', b'{"a":1}']
)
def test_no_message(raw: bytes) -> None:
    """JSON without any of our words is kept with a reason, never guessed at."""
    assert refused(raw)


@pytest.mark.parametrize("value", [7, True, "/calls/1", [], [{"id": UUID, "state": "Held"}]])
@pytest.mark.parametrize(
    "body", [{"messageType": "Foo"}, {"messageType": "CallStateChangeMessage"}, {"statusCode": 0}, {}]
)
def test_a_call_that_is_no_object_is_no_aside(body: JsonObject, value: Any) -> None:
    """It may be news of a call: that it cannot be read is said, with what stands there."""
    kind = {bool: "a boolean", int: "a number", str: "a text", list: "a list"}[type(value)]
    reason = refused(bayeux(body | {"call": value}))
    assert reason.startswith(body.get("messageType", "a JSON object"))
    assert reason.endswith(f"(call is {kind}, not an object)")


@pytest.mark.parametrize("kind", decoder.CALL_TYPES)
@pytest.mark.parametrize("fields", [{}, {"call": None}])
def test_news_of_a_call_without_the_call_is_no_aside(kind: str, fields: JsonObject) -> None:
    """By its type it concerns a call. A message of another type need not have one."""
    assert refused(bayeux({"messageType": kind} | fields)).startswith(kind)
    assert decode(encoded(bayeux({"messageType": "Foo"} | fields))) == Aside("Foo")


def test_a_bare_call_may_hold_a_call_that_cannot_be_read() -> None:
    """It is a field that we do not read there, and hides nothing."""
    heard = notification(resource("Held") | {"call": "/calls/1"})
    assert (heard.state, kinds(heard)) == ("Held", ["malformed_field"])


def test_what_is_read_of_no_message_is_in_the_reason() -> None:
    """Fields of the wrong type are often why."""
    assert refused({"call": {"id": [], "connId": {}}}).endswith(
        "(id is a list, not text; connId is an object, not text)"
    )
    assert refused(bayeux("text")).endswith("(data is a text, not an object)")  # type: ignore[arg-type]


def test_a_reason_is_short() -> None:
    """It quotes the input, but not all of it."""
    assert len(refused(b"x" * 100_000)) <= decoder.REASON_CHARS_MAX
    assert len(refused({"messageType": "x" * 10_000, "call": 7})) <= decoder.REASON_CHARS_MAX
    assert "call is a number" in refused({"messageType": "x" * 10_000, "call": 7})


@pytest.mark.parametrize("body", [{"id": "x"}, {"state": "Ringing"}, {"id": "", "state": "Ringing"}])
def test_a_bare_body_needs_an_id_and_a_state(body: JsonObject) -> None:
    """Less is no call resource."""
    assert isinstance(decode(encoded(body)), Unrecognised)


# ── Snapshots ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("status", "complete"), [(0, True), (ABSENT, True), (7, False), (4, False), ("0", False), ([], False)]
)
def test_a_snapshot_is_complete_when_it_says_so(status: Any, complete: bool) -> None:
    """Any other status than 0 claims less than all live calls."""
    decoded = live(snapshot(resource("Held"), status=status))
    assert decoded.complete is complete
    assert [call.state for call in decoded.calls] == ["Held"]
    assert decoded.calls[0].dialect == "resource"


def test_no_live_calls() -> None:
    """An empty list is an answer."""
    assert live(snapshot()) == Snapshot((), complete=True)


def test_a_call_of_a_snapshot_without_an_id() -> None:
    """It cannot be followed, so the snapshot does not list all that is live."""
    decoded = live(snapshot(resource("Held"), {"state": "Held"}))
    assert len(decoded.calls) == 1
    assert not decoded.complete
    assert kinds(decoded) == ["malformed_field"]


def test_calls_of_a_snapshot_that_are_no_objects() -> None:
    """Nor when it lists something else."""
    decoded = live({"statusCode": 0, "calls": ["/calls/1", 5, None, resource("Held")]})
    assert len(decoded.calls) == 1
    assert not decoded.complete


def test_what_is_odd_about_one_call_is_not_odd_about_the_next() -> None:
    """Each call of a snapshot has its own oddities, which become its own anomalies."""
    decoded = live(
        snapshot(resource(duration="soon", id="a"), resource(id="b"), resource(userData=5, id="c"))
    )
    assert [kinds(call) for call in decoded.calls] == [["malformed_field"], [], ["malformed_field"]]
    assert decoded.oddities == ()


# ── Fields of the wrong type ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fields", "read"),
    [
        ({"ani": 491234}, {"ani": "491234"}),
        ({"dnis": 1.5}, {"dnis": "1.5"}),
        ({"ani": 12345678901234567890123}, {"ani": "12345678901234567890123"}),
        ({"monitoring": "true"}, {"monitoring": True}),
        ({"supervisorMonitoringState": "ListenIn"}, {"supervisor_monitoring_state": "ListenIn"}),
    ],
)
def test_what_can_be_read_without_guessing_is_read(fields: JsonObject, read: JsonObject) -> None:
    """A number where a text belongs is still that number."""
    heard = notification(message(**fields))
    assert {name: getattr(heard, name) for name in read} == read


@pytest.mark.parametrize(
    ("field", "attribute"),
    [
        ("state", "state"),
        ("ani", "ani"),
        ("callType", "call_type"),
        ("mute", "mute"),
        ("recordingState", "recording"),
        ("participants", "participants"),
        ("participantsInfo", None),
        ("capabilities", "capabilities"),
        ("monitoring", "monitoring"),
        ("supervisorMonitoringState", "supervisor_monitoring_state"),
    ],
)
@pytest.mark.parametrize("value", [True, 5, "x", [[]], {"a": []}])
def test_a_field_of_the_wrong_type_spoils_no_other(field: str, attribute: str | None, value: Any) -> None:
    """It is noted, and everything else is read as ever."""
    fields: JsonObject = {"state": "Held", "capabilities": ["Retrieve"], "userData": {"a": 1}}
    fine, heard = notification(message(**fields)), notification(message(**(fields | {field: value})))
    for name in fine.__struct_fields__:
        if name not in (attribute, "oddities", "dialect"):
            assert getattr(heard, name) == getattr(fine, name), name


@pytest.mark.parametrize("place", ["call", "extensions", "metrics", "messageType", "channel"])
@pytest.mark.parametrize("value", [True, 5, "x", [], [[]], {}])
def test_an_envelope_of_the_wrong_type(place: str, value: Any) -> None:
    """Whatever stands where, there is an answer."""
    body = bayeux(in_data(resource(userData={"a": 1})))
    (body if place == "channel" else body["data"])[place] = value
    decoded = decode(encoded(body))
    assert place == "call" or isinstance(decoded, Notification)


def test_oddities_are_bounded() -> None:
    """A message can be odd in a million places; what is kept of it says so without a million records."""
    heard = notification(message(capabilities=[1] * 100_000))
    assert len(heard.oddities) <= decoder.ODDITIES_MAX
    assert str(100_000 - decoder.ODDITIES_MAX + 1) in heard.oddities[-1].detail


# ── Poison ────────────────────────────────────────────────────────────────────────────────────────────


def texts_in(value: Any) -> list[str]:
    """Every text in a value, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (key, *texts_in(item))]
    if isinstance(value, list | tuple | frozenset | set):
        return [text for item in value for text in texts_in(item)]
    return []


def numbers_in(value: Any) -> list[float]:
    """Every number in a value."""
    if isinstance(value, bool):
        return []
    if isinstance(value, int | float):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [number for item in items for number in numbers_in(item)]


def depth_of(value: Any) -> int:
    """How deep a value is nested, without recursion."""
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        deepest = max(deepest, depth)
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple) else ()
        waiting.extend((each, depth + 1) for each in inner)
    return deepest


def assert_storable(decoded: Decoded) -> None:
    """PostgreSQL can hold it: no NUL, no lone surrogate, numbers of 64 bits, nothing infinite, and not so
    deep that writing it down needs more stack than reading it did."""
    assert msgspec.json.decode(msgspec.json.encode(decoded)) is not None
    plain = msgspec.to_builtins(decoded)
    for text in texts_in(plain):
        assert "\x00" not in text
        text.encode()
    assert all(math.isfinite(number) for number in numbers_in(plain))
    assert all(-(2**63) <= number < 2**63 for number in numbers_in(plain) if type(number) is int)
    assert depth_of(plain) <= decoder.NESTING_MAX + 5
    if isinstance(decoded, Notification | Snapshot):
        every = [decoded, *(decoded.calls if isinstance(decoded, Snapshot) else ())]
        assert all(odd.kind in ANOMALY_KINDS for each in every for odd in each.oddities)
        assert all(len(each.oddities) <= decoder.ODDITIES_MAX for each in every)


POISON = {
    "NUL in a text": rb'"a\u0000b"',
    "NUL itself in a text": b'"a\x00b"',
    "line break in a text": b'"a\nb"',
    "lone surrogate": rb'"\ud800"',
    "other lone surrogate": rb'"x\udc00"',
    "broken surrogate pair": rb'"\ud800A"',
    "invalid UTF-8": b'"\xff\xfe"',
    "overlong UTF-8": b'"\xc0\x80"',
    "surrogate in UTF-8": b'"\xed\xa0\x80"',
    "NaN": b"NaN",
    "Infinity": b"-Infinity",
    "1e400": b"1e400",
    "-1e400": b"-1e400",
    "1e-400": b"1e-400",
    "64 bits": str(2**63).encode(),
    "128 bits": str(-(2**127)).encode(),
    "5000 digits": b"9" * 5000,
    "100000 digits": b"9" * 100_000,
    "long fraction": b"0." + b"3" * 5000,
    "nested 60 deep": b"[" * 60 + b"]" * 60,
    "nested 500 deep": b"[" * 500 + b"]" * 500,
    "nested 500 deep in objects": b'{"a":' * 500 + b"1" + b"}" * 500,
    "nested 10000 deep": b"[" * 10_000 + b"]" * 10_000,
    "nested 10000 deep in objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
}
PLACES: dict[str, Callable[[bytes], bytes]] = {
    "userData": lambda poison: with_poison({"userData": "@"}, poison),
    "in userData": lambda poison: with_poison({"userData": {"k": "@", "u": "a:b"}}, poison),
    "in a repeated key": lambda poison: with_poison({"userData": {"k": "@", "j": 1}}, poison).replace(
        b'"j"', b'"k"'
    ),
    "key": lambda poison: with_poison({"userData": {"@": "v"}}, poison if poison[:1] == b'"' else b'"k"'),
    "kvlist": lambda poison: with_poison({"userData": [{"key": "k", "type": "str", "value": "@"}]}, poison),
    "duration": lambda poison: with_poison({"duration": "@"}, poison),
    "id": lambda poison: with_poison({"id": "@"}, poison),
    "state": lambda poison: with_poison({"state": "@"}, poison),
    "participants": lambda poison: with_poison({"participants": ["@", {"digits": "@"}]}, poison),
    "capabilities": lambda poison: with_poison({"capabilities": ["@", "Hold"]}, poison),
    "ignored": lambda poison: with_poison({"case": "@"}, poison),
    "extensions": lambda poison: encoded(in_data(resource(), extensions={"WrapUpTime": "@"})).replace(
        b'"@"', poison
    ),
    "metrics": lambda poison: encoded(in_data(resource(), metrics={"eventProcessing": "@"})).replace(
        b'"@"', poison
    ),
    "clock": lambda poison: encoded(in_data(resource(), metrics=stamped("@"))).replace(b'"@"', poison),  # type: ignore[arg-type]
    "type": lambda poison: encoded(in_data(resource(), "@")).replace(b'"@"', poison),
    "aside": lambda poison: b'{"messageType":' + poison + b"}",
    "reply": lambda poison: b'{"statusCode":3,"statusMessage":' + poison + b"}",
    "snapshot": lambda poison: snapshot(resource(ani="@")).replace(b'"@"', poison),
    "nothing of ours": lambda poison: b'{"x":' + poison + b"}",
    "alone": lambda poison: poison,
}


def with_poison(fields: JsonObject, poison: bytes) -> bytes:
    """A notification in whose call every "@" is replaced."""
    return encoded(bayeux(in_data(resource(**({"state": "Held"} | fields))))).replace(b'"@"', poison)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("poison", POISON)
def test_poison_is_stored(poison: str, place: str) -> None:
    """Nothing that a message can hold makes decoding fail, or its result impossible to store."""
    assert_storable(decode(PLACES[place](POISON[poison])))


@pytest.mark.parametrize("poison", [name for name in POISON if not name.startswith("nested")])
def test_poison_in_attached_data_does_not_hide_the_call(poison: str) -> None:
    """The state of the call is read all the same."""
    heard = notification(PLACES["in userData"](POISON[poison]))
    assert heard.state == "Held"
    assert heard.user_data is not None
    assert heard.user_data["u"] == "a:b"


@pytest.mark.parametrize(
    ("poison", "kept"),
    [
        (rb'"a\u0000b"', "a\ufffdb"),
        (rb'"\ud800"', "\ufffd"),
        (b'"\xff"', "\ufffd"),
        (b"1e400", "1e400"),
        (b"NaN", "NaN"),
        (str(2**63).encode(), str(2**63)),
        (b"9" * 5000, "9" * 5000),
    ],
)
def test_what_was_replaced_is_said(poison: bytes, kept: Any) -> None:
    """A value that no database holds is kept as nearly as it can be, with an oddity."""
    heard = notification(PLACES["in userData"](poison))
    assert heard.user_data == {"k": kept, "u": "a:b"}
    assert set(kinds(heard)) == {"poisoned"}


def test_control_characters_hide_nothing() -> None:
    """JSON forbids them inside a text; they are read all the same, and said. NUL cannot be kept."""
    heard = notification(PLACES["in userData"](b'"a\tb\x00c"'))
    assert heard.user_data == {"k": "a\tb\ufffdc", "u": "a:b"}
    assert kinds(heard) == ["poisoned", "poisoned"]
    assert refused(b'{"messageType":"a\tb"')


LONG = "9" * (decoder.NAME_BYTES_MAX + 1)
NAMES = {
    "id": "call_id",
    "callUuid": "call_uuid",
    "connId": "conn_id",
    "previousConnId": "previous_conn_id",
    "parentCallUri": "parent_call_id",
    "phoneNumber": "phone_number",
    "ani": "ani",
    "dnis": "dnis",
}


@pytest.mark.parametrize("field", NAMES)
def test_a_name_that_fits_no_index_is_known_by_its_digest(field: str) -> None:
    """The same one is the same, another one is another, and what is as long as may be is as it came."""
    name = NAMES[field]
    calls: list[JsonObject] = [{field: value} for value in (LONG, LONG, LONG[:-1] + "8", LONG[:-1])]
    heard, again, other, fits = (notification(message(**call)) for call in calls)
    assert len(getattr(heard, name).encode()) < 200
    assert getattr(heard, name).startswith(LONG[: decoder.NAME_CHARS_SHOWN])
    assert getattr(heard, name) == getattr(again, name) != getattr(other, name)
    assert getattr(fits, name) == LONG[:-1]
    assert (kinds(heard), kinds(fits)) == (["poisoned"], [])


@pytest.mark.parametrize("spelling", [list, lambda numbers: [{"number": number} for number in numbers]])
def test_more_participants_than_any_call_has(spelling: Callable[[list[str]], list[Any]]) -> None:
    """As many as may be are taken, from the beginning, and it is said that there were more."""
    numbers = [str(number) for number in range(decoder.PARTICIPANTS_MAX + 1)]
    many, fit = (
        notification(message(participants=spelling(listed))) for listed in (numbers * 60, numbers[:-1])
    )
    assert many.participants == fit.participants
    assert many.participants is not None
    assert [each.number for each in many.participants] == numbers[:-1]
    assert (kinds(many), kinds(fit)) == (["poisoned"], [])
    infos = notification(message(participants=ABSENT, participantsInfo=[{"digits": "1"}] * 2_000))
    assert infos.participants is not None
    assert (len(infos.participants), kinds(infos)) == (decoder.PARTICIPANTS_MAX, ["poisoned"])


def test_more_attached_data_than_any_call_has() -> None:
    """It is left out and said; nothing is taken to be deleted."""
    data = {str(number): 1 for number in range(decoder.USER_DATA_KEYS_MAX + 1)}
    many = notification(in_data(resource(userData=data), "AttachedDataChanged"))
    assert (many.user_data, many.user_data_emptied, kinds(many)) == (None, False, ["poisoned"])
    assert str(len(data)) in many.oddities[0].detail
    data.popitem()
    assert notification(in_data(resource(userData=data))).user_data == data


def test_more_capabilities_than_any_call_has() -> None:
    """As many as may be are taken, the same ones in whatever order they came, and how many are not
    is said. So in a list of calls."""
    names = [f"Capability{number:05}" for number in range(decoder.CAPABILITIES_MAX + 50)]
    heard = notification(message(capabilities=names))
    assert heard.capabilities == frozenset(names[: decoder.CAPABILITIES_MAX])
    assert kinds(heard) == ["poisoned"]
    assert heard.oddities[0].detail.startswith("50 of the capabilities are left out")
    assert notification(message(capabilities=names[::-1])) == heard
    fit = notification(message(capabilities=names[: decoder.CAPABILITIES_MAX]))
    assert (fit.capabilities, kinds(fit)) == (heard.capabilities, [])
    listed = live(snapshot(resource("Held", capabilities=names)))
    assert (listed.calls[0].capabilities, kinds(listed)) == (heard.capabilities, ["poisoned"])


def test_a_capability_that_is_no_name() -> None:
    """It is left out and said, also in a short message; the others on the call stay as they are."""
    longest = "☎" * decoder.CAPABILITY_CHARS_MAX
    heard = notification(message(capabilities=["Hold", longest, longest + "x", "Hangup"]))
    assert heard.capabilities == frozenset({"Hold", longest, "Hangup"})
    assert (kinds(heard), heard.oddities[0].detail[:2]) == (["poisoned"], "1 ")
    fit = notification(message(capabilities=["Hold", longest, "Hangup"]))
    assert (fit.capabilities, kinds(fit)) == (heard.capabilities, [])


def test_only_capabilities_within_their_bounds_are_kept_to_be_shared() -> None:
    """A server that sends huge sets, always others, does not fill the memory with them."""
    decoder._one_of_its_kind.cache_clear()
    for number in range(3):
        notification(message(capabilities=[f"{number}" * 1_000_000]))
        notification(message(capabilities=[f"{number} {each}" for each in range(10_000)]))
    assert decoder._one_of_its_kind.cache_info().currsize == 4  # none, and the first ones of each
    one, other = (notification(message(capabilities=names)) for names in (["A", "B"], ["B", "A"]))
    assert one.capabilities is other.capabilities


def test_long_numbers_of_participants_too() -> None:
    """By bytes and not by characters; the others on the call stay as they are. So in a list of calls."""
    wide = "☎" * (decoder.NAME_BYTES_MAX // 3 + 1)
    heard = notification(message(numbers=("7023", wide, "+" + LONG)))
    assert heard.participants is not None
    ours, wider, longer = heard.participants
    assert (ours.number, ours.e164) == ("7023", "")
    assert len(wider.number.encode()) < 250
    assert longer.number == longer.e164 != ""
    assert len(longer.e164) < 200
    assert kinds(heard) == ["poisoned"]
    (listed,) = live(snapshot(resource("Held", numbers=(wide,)))).calls
    assert listed.participants is not None
    assert listed.participants[0].number == wider.number


@pytest.mark.parametrize("value", [0, 2**53 + 1, 2**63 - 1, -(2**63), 0.1, 1e308])
@pytest.mark.parametrize("poisoned", [False, True])
def test_numbers_that_fit_are_numbers(value: float, poisoned: bool) -> None:
    """Up to 64 bits they stay what they are, also beside poison."""
    raw = message(userData={"k": value}, ani="@").replace(b'"@"', rb'"\ud800"' if poisoned else b'"1"')
    assert notification(raw).user_data == {"k": value}


def test_an_escaped_backslash_is_no_nul() -> None:
    """A text that spells the escape of NUL out is a text, and nothing is odd about it."""
    heard = notification(message(userData={"k": "\\u0000"}))
    assert heard.user_data == {"k": "\\u0000"}
    assert heard.oddities == ()


def test_a_byte_order_mark_is_skipped() -> None:
    """Some tools put one before what they save."""
    assert notification(b"\xef\xbb\xbf" + message("Held")) == notification(message("Held"))


def test_other_encodings_are_refused() -> None:
    """JSON on the wire is UTF-8."""
    assert refused(message().decode().encode("utf-16"))


def test_deep_nesting_is_refused_with_its_reason() -> None:
    """The bound does not depend on how deep the caller's own stack is: rebuilding gives the same answer."""
    within = decoder.NESTING_MAX - 1
    for depth, is_read in [(within, True), (decoder.NESTING_MAX + 1, False), (800, False), (50_000, False)]:
        decoded = decode(PLACES["in userData"](b"[" * depth + b"]" * depth))
        assert isinstance(decoded, Notification) is is_read
        assert is_read or "nested" in str(decoded)


def test_ten_megabytes_of_user_data() -> None:
    """Size alone is no reason to refuse, with or without repeated keys and colons."""
    pairs = {f"key {number}": "x:" * 500 for number in range(10_000)}
    raw = message(userData=pairs)
    assert len(raw) > 10_000_000
    assert notification(raw).user_data == pairs
    repeated = notification(raw.replace(b'"key 1"', b'"key 2"'))
    assert repeated.user_data is not None
    assert repeated.user_data["key 2"] == ["x:" * 500] * 2


# ── Totality ──────────────────────────────────────────────────────────────────────────────────────────


@given(st.binary(max_size=200))
def test_any_bytes(raw: bytes) -> None:
    """Decoding is total, and what it gives can be stored."""
    assert_storable(decode(raw))


_ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
_FIELDS = sorted({*decoder._Body.__struct_fields__, *decoder._Party.__struct_fields__, "eventProcessing"})
_OUR_JSON = st.recursive(
    _ANY_JSON,
    lambda inner: (
        st.dictionaries(st.sampled_from(_FIELDS), inner, max_size=6)
        | st.lists(inner, max_size=3)
        | st.fixed_dictionaries({"call": inner})
        | st.fixed_dictionaries({"calls": st.lists(inner, max_size=3), "statusCode": inner})
    ),
    max_leaves=20,
)


@given(_OUR_JSON)
def test_any_json(value: Any) -> None:
    """Also with our own field names at every place where they do not belong."""
    assert_storable(decode(json.dumps(value).encode("utf-8", "surrogatepass")))
    assert_storable(decode(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")))


@st.composite
def _mutated(draw: st.DrawFn) -> bytes:
    """A valid message in which bytes were cut, repeated or replaced."""
    raw = bytearray(encoded(draw(st.sampled_from(list(handful().values())))))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(raw)))
        stop = min(len(raw), start + draw(st.integers(0, 30)))
        put = draw(st.sampled_from([b"", b'"', b"{", b"]", b",", b"\\", b"null", b"1e999", b"\xff", b"\x00"]))
        raw[start:stop] = bytes(raw[start:stop]) * 2 if draw(st.booleans()) else put
    return bytes(raw)


@given(_mutated())
def test_any_mutation_of_a_message(raw: bytes) -> None:
    """Cut, repeated and replaced bytes included."""
    assert_storable(decode(raw))


@st.composite
def _with_one_field_replaced(draw: st.DrawFn) -> bytes:
    """A valid message in which one value, anywhere, is another one."""
    body = copy.deepcopy(draw(st.sampled_from(list(handful().values()))))
    places: list[tuple[Any, Any]] = []
    waiting: list[Any] = [body]
    while waiting:
        item = waiting.pop()
        pairs = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
        for key, inner in pairs:
            places.append((item, key))
            waiting.append(inner)
    holder, key = draw(st.sampled_from(places))
    holder[key] = draw(_ANY_JSON)
    return json.dumps(body).encode()


@given(_with_one_field_replaced())
def test_any_value_in_any_field(raw: bytes) -> None:
    """A field may hold anything."""
    assert_storable(decode(raw))


_WHOLE = {name: body for name, body in handful().items() if "_raw" not in body}


@given(st.sampled_from(sorted(_WHOLE)), _user_data_text(), st.sampled_from([None, 1]))
def test_both_parsers_agree(name: str, user_data: str, indent: int | None) -> None:
    """What the quick parser takes, the patient one reads the same way: nobody can tell them apart."""
    raw = json.dumps(_WHOLE[name], indent=indent).encode()
    raw = raw.replace(b'"Case": "4"', b'"Case": ' + user_data.encode())
    oddities: list[Any] = []
    patient = decoder._interpret(decoder._patient(raw, oddities), "", oddities)
    quick = decoder._interpret(decoder._QUICK.decode(raw), "", [])
    assert patient == quick == decode(raw)


def test_what_is_not_read_may_hold_anything() -> None:
    """A field beside the call that means something elsewhere is no oddity of the call, whatever it holds."""
    usual = _WHOLE["attached data"]
    strange = copy.deepcopy(usual)
    strange["data"] |= {"state": 5, "participants": "none", "statusCode": [], "data": "x"}
    assert decode(json.dumps(strange).encode()) == decode(json.dumps(usual).encode())


def test_old_and_new_spelling_of_one_call() -> None:
    """The same call spelled by two servers differs in the dialect only, where both say the same."""
    new, old = notification(objects("Held")), notification(strings("Held", id=UUID, callUuid=UUID))
    differing = {n for n in new.__struct_fields__ if getattr(new, n) != getattr(old, n)}
    assert differing == {"dialect", "participants", "monitoring"}
