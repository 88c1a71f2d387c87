"""The requests: each as its vendor's page shows it, and what is refused before it is sent."""

import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from listener.core.dialling import REFERENCE_KEY, Cause, System, meaning
from listener.core.requests import (
    DATA_BYTES_MAX,
    FORM_TYPE,
    JSON_TYPE,
    NESTING_MAX,
    REFERENCE_CHARS_MAX,
    TEXT_CHARS_MAX,
    Click2DialCall,
    GwsDial,
    GwsPreviewDial,
    HttpRequest,
    NoojeeAnswer,
    NoojeeDial,
    NoojeeHangup,
    NoojeeStartRecording,
    NoojeeStopRecording,
    Request,
    build,
    preview_dial,
)
from listener.errors import InvalidRequest

CALLS = "/api/v2/me/devices/1234567890/calls"
NOOJEE = "/servicemanager/rest/CallManagementAPI"

RECORD = {
    "recordHandle": 77,
    "phoneNumber": "6001",
    "outboundCallerId": "410004399",
    "otherFields": {"GSW_ATTEMPTS": 0, "campaign": {"name": "Spring", "list": [1, 2]}},
}

# ── The table of the vendors' pages ───────────────────────────────────────────────────────────────────

SAMPLES: dict[str, tuple[Request, str, str, str]] = {
    "GWS Dial": (
        GwsDial(number="5001", device="1234567890"),
        CALLS,
        JSON_TYPE,
        '{"operationName": "Dial", "destination": {"phoneNumber": "5001"}}',
    ),
    "GWS Dial with user data": (
        GwsDial(number="5001", device="1234567890", user_data={"CustomerSegment": "Gold"}),
        CALLS,
        JSON_TYPE,
        (
            '{"operationName": "Dial", "destination": {"phoneNumber": "5001"}, '
            '"userData": {"CustomerSegment": "Gold"}}'
        ),
    ),
    "GWS Dial with everything": (
        GwsDial(
            number="+61383208100",
            device="efe1ab32-53f9",
            location="Perth",
            user_data={"Customer": {"Segment": "Gold", "since": 2015, "tags": ["a", None, True, 1.5]}},
            reference="d-1",
        ),
        "/api/v2/me/devices/efe1ab32-53f9/calls",
        JSON_TYPE,
        (
            '{"operationName": "Dial", "destination": {"phoneNumber": "+61383208100"}, "location": "Perth", '
            '"userData": {"Customer": {"Segment": "Gold", "since": 2015, "tags": ["a", null, true, 1.5]}, '
            f'"{REFERENCE_KEY}": "d-1"}}}}'
        ),
    ),
    "GWS Dial Preview Record": (
        GwsPreviewDial(device_path="/devices/1234567890", outbound_record=RECORD),
        CALLS,
        JSON_TYPE,
        (
            '{"operationName": "Dial", "devicePath": "/devices/1234567890", "outboundRecord": '
            '{"recordHandle": 77, "phoneNumber": "6001", "outboundCallerId": "410004399", '
            '"otherFields": {"GSW_ATTEMPTS": 0, "campaign": {"name": "Spring", "list": [1, 2]}}}}'
        ),
    ),
    "Noojee dial": (
        NoojeeDial(
            number="0383208100",
            exten_or_unique_id="SIP/101",
            auto_answer="",
            caller_id="",
            phone_caption="My Brand",
        ),
        f"{NOOJEE}/dial?autoAnswer=&callerId=&phoneCaption=My+Brand&number=0383208100&extenOrUniqueId=SIP/101",
        FORM_TYPE,
        "",
    ),
    "Noojee dial with the least": (
        NoojeeDial(number="102", exten_or_unique_id="PJSIP/101"),
        f"{NOOJEE}/dial?number=102&extenOrUniqueId=PJSIP/101",
        FORM_TYPE,
        "",
    ),
    "Noojee dial with everything": (
        NoojeeDial(
            number="+61383208100",
            exten_or_unique_id="1543022361.57",
            auto_answer="Call-Info:\\; answer-after=0",
            caller_id="0390001111",
            phone_caption="Müller & Söhne",
            monitored=True,
            record=True,
            tag="T 1",
        ),
        (
            f"{NOOJEE}/dial?autoAnswer=Call-Info%3A%5C%3B+answer-after%3D0&callerId=0390001111"
            "&phoneCaption=M%C3%BCller+%26+S%C3%B6hne&number=%2B61383208100&extenOrUniqueId=1543022361.57"
            "&monitored=yes&record=true&tag=T+1"
        ),
        FORM_TYPE,
        "",
    ),
    "Noojee hangup": (
        NoojeeHangup(exten_or_unique_id="100"),
        f"{NOOJEE}/hangup?extenOrUniqueId=100",
        FORM_TYPE,
        "",
    ),
    "Noojee hangup by id": (
        NoojeeHangup(exten_or_unique_id="1543022361.57"),
        f"{NOOJEE}/hangup?extenOrUniqueId=1543022361.57",
        FORM_TYPE,
        "",
    ),
    "Noojee answer": (
        NoojeeAnswer(unique_id="1543022361.57", exten="SIP/101", answer_string="Call-info:answer-after=0"),
        f"{NOOJEE}/answer?uniqueId=1543022361.57&exten=SIP/101&answerString=Call-info%3Aanswer-after%3D0",
        FORM_TYPE,
        "",
    ),
    "Noojee start recording": (
        NoojeeStartRecording(exten_or_unique_id="410", tag="22", agent_login_name="Fred"),
        f"{NOOJEE}/start?extenOrUniqueId=410&tag=22&agentLoginName=Fred",
        FORM_TYPE,
        "",
    ),
    "Noojee start recording by id": (
        NoojeeStartRecording(exten_or_unique_id="4103412341214.123", tag="22", agent_login_name="Fred"),
        f"{NOOJEE}/start?extenOrUniqueId=4103412341214.123&tag=22&agentLoginName=Fred",
        FORM_TYPE,
        "",
    ),
    "Noojee stop recording": (
        NoojeeStopRecording(exten_or_unique_id="410", agent_login_name="Fred"),
        f"{NOOJEE}/stop?extenOrUniqueId=410&agentLoginName=Fred",
        FORM_TYPE,
        "",
    ),
    "Click2Dial": (
        Click2DialCall(agent="101", callee="0820001234", outbound_id="27110001234", reference="r-1.a_b~c"),
        "/click2dial/calls",
        JSON_TYPE,
        '{"agent": "101", "callee": "0820001234", "outbound_id": "27110001234", "contact_ref": "r-1.a_b~c"}',
    ),
    "Click2Dial before v3.0.0": (
        Click2DialCall(
            agent="101", callee="27820001234", outbound_id="random", reference="ref-1", before_v3=True
        ),
        "/click2dial/calls",
        JSON_TYPE,
        '{"agent": "101", "callee": "27820001234", "outbound_id": "random", "call_ref": "ref-1"}',
    ),
    "Click2Dial without reference": (
        Click2DialCall(agent="0027820001234", callee="0027820001235", outbound_id="tvc_spring"),
        "/click2dial/calls",
        JSON_TYPE,
        '{"agent": "0027820001234", "callee": "0027820001235", "outbound_id": "tvc_spring"}',
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_requests_are_as_the_vendors_show_them(name: str) -> None:
    """Method, path, parameters in order and encoding, content type, and the body with its fields in order."""
    request, target, content_type, body = SAMPLES[name]
    built = build(request)
    assert (built.method, built.target, built.content_type) == ("POST", target, content_type)
    if content_type == FORM_TYPE:
        assert built.body == b""
    else:
        assert built.query == ""
        assert json.loads(built.body, object_pairs_hook=tuple) == json.loads(body, object_pairs_hook=tuple)


@pytest.mark.parametrize("name", SAMPLES)
def test_requests_go_through_json(name: str) -> None:
    """A request can be written down, and one that came as JSON is held to the same rules."""
    request = SAMPLES[name][0]
    assert msgspec.json.decode(msgspec.json.encode(request), type=type(request)) == request


def test_json_has_the_vendors_names() -> None:
    """Whoever knows the vendor's page can write the JSON; a parameter that nobody knows is refused."""
    dial = msgspec.json.decode(
        b'{"number": "102", "extenOrUniqueId": "SIP/1", "phoneCaption": "A"}', type=NoojeeDial
    )
    assert dial == NoojeeDial(number="102", exten_or_unique_id="SIP/1", phone_caption="A")
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"number": "102", "extenOrUniqueId": "SIP/1", "caption": "A"}', type=NoojeeDial)
    with pytest.raises(InvalidRequest):
        msgspec.json.decode(b'{"number": "102", "extenOrUniqueId": "101"}', type=NoojeeDial)


def test_a_device_is_one_segment_of_the_path() -> None:
    """Whatever is in an id, it changes no path."""
    assert build(GwsDial(number="1", device="a%2Fb;c")).path == "/api/v2/me/devices/a%252Fb%3Bc/calls"


@pytest.mark.parametrize("request_", [GwsDial(number="5001"), GwsPreviewDial(outbound_record=RECORD)])
def test_a_dial_without_device_is_not_built(request_: GwsDial | GwsPreviewDial) -> None:
    """Which device it is must be known by then."""
    with pytest.raises(InvalidRequest, match="device"):
        build(request_)


def test_what_was_checked_is_what_is_sent() -> None:
    """Changes to the caller's own objects come too late."""
    data: dict[str, Any] = {"a": {"b": 1}}
    dial = GwsDial(number="1", device="d", user_data=data)
    data["a"]["b"] = math.nan
    assert dial.user_data == {"a": {"b": 1}}


# ── What is refused ───────────────────────────────────────────────────────────────────────────────────


def nested(depth: int) -> Any:
    """An object in an object, so many times."""
    value: Any = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


def gws(**fields: Any) -> GwsDial:
    """A dial that is right but for these."""
    return GwsDial(**{"number": "5001", "device": "1", **fields})


def preview(path: str | None = "/devices/1", **fields: Any) -> GwsPreviewDial:
    """A preview dial whose record is right but for these."""
    return GwsPreviewDial(device_path=path, outbound_record={**RECORD, **fields})


def noojee(**fields: Any) -> NoojeeDial:
    """A dial that is right but for these."""
    return NoojeeDial(**{"number": "0383208100", "exten_or_unique_id": "SIP/101", **fields})


def click(**fields: Any) -> Click2DialCall:
    """A call that is right but for these."""
    return Click2DialCall(**{"agent": "101", "callee": "0820001234", "outbound_id": "27110001234", **fields})


REFUSED: dict[str, tuple[Any, dict[str, Any], str, str, str]] = {
    # what, with which fields, the argument that is named, the rule, the cure
    "no number": (gws, {"number": ""}, "number", "is empty", "give it a value"),
    "a blank number": (gws, {"number": "  "}, "number", "is empty", "give it a value"),
    "a number with blanks": (gws, {"number": "50 01"}, "number", "has a blank", "without blanks"),
    "a number of two lines": (gws, {"number": "50\n01"}, "number", "control characters", "leave them out"),
    "a long number": (gws, {"number": "1" * 256}, "number", "256 characters", f"{TEXT_CHARS_MAX}"),
    "a device that is a path": (gws, {"device": "1/calls"}, "device", "no device's id", "that GWS lists"),
    "a device that leads up": (gws, {"device": ".."}, "device", "no device's id", "that GWS lists"),
    "an empty location": (gws, {"location": ""}, "location", "is empty", "leave it out"),
    "an empty reference": (gws, {"reference": ""}, "reference", "is empty", "leave it out"),
    "NaN": (gws, {"user_data": {"a": [math.nan]}}, "userData", "nan", "give a number"),
    "a large number": (gws, {"user_data": {"a": 2**63}}, "userData", "64 bits", "as a text"),
    "a set": (gws, {"user_data": {"a": {1}}}, "userData", "a set", "what JSON has"),
    "half a surrogate pair": (gws, {"user_data": {"a": "\ud800"}}, "userData", "surrogate", "whole"),
    "NUL": (gws, {"user_data": {"a": "\0"}}, "userData", "NUL", "leave it out"),
    "a key of NUL": (gws, {"user_data": {"\0": 1}}, "userData", "NUL", "leave it out"),
    "an empty key": (gws, {"user_data": {"a": {"": 1}}}, "userData", "is no key", "not empty"),
    "a key that is a number": (gws, {"user_data": {1: 1}}, "userData", "is no key", "texts"),
    "too deep": (gws, {"user_data": nested(NESTING_MAX + 1)}, "userData", "deeper than", "flatten"),
    "too much": (gws, {"user_data": {"a": "x" * DATA_BYTES_MAX}}, "userData", "bytes", "leave out"),
    "a whole URL": (preview, {"path": "http://h/devices/1"}, "devicePath", "no relative", "/devices/ID"),
    "a device alone": (preview, {"path": "1"}, "devicePath", "no relative path", "/devices/ID"),
    "no device in the path": (preview, {"path": "/devices/"}, "devicePath", "is empty", "give it a value"),
    "a record without number": (preview, {"phoneNumber": None}, "phoneNumber", "no phoneNumber", "whole"),
    "a record's number that is one": (preview, {"phoneNumber": 5001}, "phoneNumber", "a text", "whole"),
    "a record's empty number": (preview, {"phoneNumber": ""}, "phoneNumber", "is empty", "give it"),
    "a handle that is a text": (preview, {"recordHandle": "431"}, "recordHandle", "whole number", "431"),
    "a handle that is true": (preview, {"recordHandle": True}, "recordHandle", "whole number", "431"),
    "a record with NaN": (preview, {"x": math.inf}, "outboundRecord", "inf", "give a number"),
    "no technology": (noojee, {"exten_or_unique_id": "101"}, "extenOrUniqueId", "technology", "SIP/100"),
    "only technology": (noojee, {"exten_or_unique_id": "SIP/"}, "extenOrUniqueId", "technology", "SIP/100"),
    "no extension": (noojee, {"exten_or_unique_id": ""}, "extenOrUniqueId", "is empty", "give it a value"),
    "Noojee without number": (noojee, {"number": ""}, "number", "is empty", "give it a value"),
    "a tag without recording": (noojee, {"tag": "22"}, "tag", "the tag of a recording", "give record too"),
    "an empty tag": (noojee, {"record": True, "tag": ""}, "tag", "is empty", "leave it out"),
    "a header too many": (noojee, {"auto_answer": "a\r\nb: c"}, "autoAnswer", "control", "leave them out"),
    "a long caption": (noojee, {"phone_caption": "x" * 256}, "phoneCaption", "256", "shorten"),
    "a long caller id": (noojee, {"caller_id": "1" * 256}, "callerId", "256", "shorten"),
    "hang up nothing": (NoojeeHangup, {"exten_or_unique_id": "SIP/"}, "extenOrUniqueId", "neither", "410"),
    "answer an extension": (NoojeeAnswer, {"unique_id": "101", "exten": "SIP/1"}, "uniqueId", "no uni", "15"),
    "answer without technology": (NoojeeAnswer, {"unique_id": "1.2", "exten": "1"}, "exten", "tech", "SIP/"),
    "answer by id": (NoojeeAnswer, {"unique_id": "1.2", "exten": "1.2"}, "exten", "technology", "SIP/100"),
    "record a technology": (
        NoojeeStartRecording,
        {"exten_or_unique_id": "SIP/410"},
        "extenOrUniqueId",
        "without technology",
        "write 410",
    ),
    "stop a technology": (
        NoojeeStopRecording,
        {"exten_or_unique_id": "SIP/410"},
        "extenOrUniqueId",
        "without technology",
        "write 410",
    ),
    "a long tag": (
        NoojeeStartRecording,
        {"exten_or_unique_id": "410", "tag": "x" * 256},
        "tag",
        "256",
        "shorten",
    ),
    "agent of 2 digits": (click, {"agent": "10"}, "agent", "3 or 4 digits", "101"),
    "agent of many digits": (click, {"agent": "1" * 5_000}, "agent", "neither 0, 27 nor 00", "101"),
    "agent of 5 digits": (click, {"agent": "10101"}, "agent", "3 or 4 digits", "101"),
    "a callee that is an extension": (
        click,
        {"callee": "102"},
        "callee",
        "neither 0, 27 nor 00",
        "0820001234",
    ),
    "9 digits from 0": (click, {"callee": "082000123"}, "callee", "from 0 it must have 10 digits", "0820001"),
    "11 digits from 0": (click, {"callee": "08200012345"}, "callee", "and has 11", "0820001234"),
    "10 digits from 27": (click, {"callee": "2782000123"}, "callee", "from 27 it must have 11", "278200"),
    "12 digits from 00": (click, {"callee": "002782000123"}, "callee", "13 to 16 digits, and has 12", "0027"),
    "17 digits from 00": (click, {"callee": "0" * 17}, "callee", "13 to 16 digits, and has 17", "0027"),
    "a plus": (click, {"callee": "+27820001234"}, "callee", "other than digits", "27820001234"),
    "digits of another script": (click, {"callee": "٠٨٢٠٠٠١٢٣٤"}, "callee", "other than", "0820001234"),
    "a line more": (click, {"callee": "0820001234\n"}, "callee", "other than digits", "0820001234"),
    "an outbound id that is none": (click, {"outbound_id": "101"}, "outbound_id", "11 digits", "27820001234"),
    "an outbound id from 00": (click, {"outbound_id": "0027110001234"}, "outbound_id", "11 digits", "278"),
    "a reference that is cut": (
        click,
        {"reference": "x" * (REFERENCE_CHARS_MAX + 1)},
        "contact_ref",
        "is cut after 230",
        "shorten it",
    ),
    "a reference with a blank": (click, {"reference": "a b"}, "contact_ref", "not made of", "replace"),
    "an empty reference for Click2Dial": (click, {"reference": ""}, "contact_ref", "not made of", "leave"),
    "an old reference": (click, {"reference": "é", "before_v3": True}, "call_ref", "not made", "replace"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused(name: str) -> None:
    """The error names the argument as the vendor spells it, the rule, and what to write."""
    make, fields, argument, rule, cure = REFUSED[name]
    with pytest.raises(InvalidRequest) as error:
        make(**fields)
    text = str(error.value)
    assert error.value.argument == argument
    assert text.startswith(f"{argument}: ")
    before, _, after = text.rpartition("; ")
    assert rule in before
    assert cure in after
    assert len(text) < 300
    assert text.isprintable()


@pytest.mark.parametrize(
    ("argument", "outcome"),
    [("number", "invalid_number"), ("callee", "invalid_number"), ("userData", "failed")],
)
def test_a_refusal_of_ours_is_a_cause(argument: str, outcome: str) -> None:
    """The names of the arguments are those that the cause table knows."""
    assert meaning(Cause(System.GWS, "validation", argument)).outcome == outcome


def test_the_bounds_are_taken() -> None:
    """What is just allowed is allowed."""
    assert gws(number="1" * TEXT_CHARS_MAX, user_data=nested(NESTING_MAX)).number == "1" * TEXT_CHARS_MAX
    data = {"a": 2**63 - 1, "b": -(2**63), "c": "x" * (DATA_BYTES_MAX - 100)}
    assert gws(user_data=data).user_data == data
    assert gws(user_data={}).user_data == {}
    reference = "x" * REFERENCE_CHARS_MAX
    assert json.loads(build(click(reference=reference)).body)["contact_ref"] == reference
    for callee in ("0820001234", "27820001234", "0027820001234", "00" + "1" * 14):
        assert click(callee=callee, agent=callee).callee == callee
    assert click(agent="1234").agent == "1234"


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"outbound_id": "0110001234"}, "write 27110001234"),
        ({"outbound_id": "random"}, "configuration of the PBX"),
        ({"reference": "crm:7"}, "colon"),
    ],
)
def test_what_often_goes_wrong_is_warned_of(fields: dict[str, Any], warning: str) -> None:
    """It is allowed, and the page says that it may fail."""
    (said,) = click(**fields).warnings
    assert warning in said
    assert click().warnings == ()


@given(st.text(), st.text(), st.text(), st.text())
def test_click2dial_takes_what_its_rules_say_and_raises_nothing_else(
    agent: str, callee: str, outbound_id: str, reference: str
) -> None:
    """Any text is either refused with InvalidRequest or sent in ASCII."""
    try:
        call = Click2DialCall(agent=agent, callee=callee, outbound_id=outbound_id, reference=reference)
    except InvalidRequest:
        return
    assert build(call).body.isascii()


@given(st.text(min_size=1), st.text())
def test_any_text_is_encoded_or_refused(number: str, caption: str) -> None:
    """A query is ASCII without blanks, whatever was asked for."""
    try:
        built = build(noojee(number=number, phone_caption=caption))
    except InvalidRequest:
        return
    assert built.target.isascii()
    assert built.target.isprintable()
    assert " " not in built.target
    assert built.target.count("&") == 2


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), _JSON, max_size=4))
def test_user_data_arrive_as_they_are_or_not_at_all(data: dict[str, Any]) -> None:
    """No value is changed on the way: NaN would silently become null."""
    try:
        built = build(gws(user_data=data))
    except InvalidRequest:
        return
    assert json.loads(built.body)["userData"] == data


# ── A preview record that was heard ───────────────────────────────────────────────────────────────────


def heard(record: Any, **fields: Any) -> dict[str, Any]:
    """The body of a message of the outbound channel."""
    return {
        "notificationType": "PreviewRecord",
        "messageType": "OutboundRecordMessage",
        "referenceId": "88",
        "record": record,
        **fields,
    }


USER_DATA = {"GSW_PHONE": "6002", "contact_info": "6003", "GSW_CALL_RESULT": 28, "custom2": 0}


@pytest.mark.parametrize("envelope", ["bare", "data", "bayeux"])
def test_a_heard_preview_record_can_be_dialled(envelope: str) -> None:
    """The record goes back whole, with its user data, and the number in addition."""
    body = heard({"userData": USER_DATA, "recordHandle": 9})
    raw = {
        "bare": body,
        "data": {"data": body},
        "bayeux": {"data": body, "channel": "/v2/me/outbound"},
    }[envelope]
    dial = preview_dial(json.dumps(raw).encode(), "/devices/7")
    assert dial == GwsPreviewDial(
        device_path="/devices/7",
        outbound_record={"userData": USER_DATA, "recordHandle": 9, "phoneNumber": "6002"},
    )
    assert dial.number == "6002"


@pytest.mark.parametrize(
    ("record", "number"),
    [
        ({"phoneNumber": "1", "userData": USER_DATA}, "1"),
        ({"userData": {"contact_info": "6003"}}, "6003"),
        ({"userData": {"GSW_PHONE": 6002}}, "6002"),
    ],
)
def test_the_number_of_a_heard_record(record: dict[str, Any], number: str) -> None:
    """Its own, or the one in its user data, which mix texts and numbers."""
    assert preview_dial(json.dumps(heard(record)).encode()).number == number


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        json.dumps(heard({}, notificationType="StatusChanged")).encode(),
        json.dumps(heard({}, messageType="OutboundCampaignMessage")).encode(),
        json.dumps(heard("no record")).encode(),
        json.dumps({"data": 7}).encode(),
    ],
)
def test_other_messages_are_no_preview_records(raw: bytes) -> None:
    """The error says what to give instead."""
    with pytest.raises(InvalidRequest, match="no preview record"):
        preview_dial(raw)


@pytest.mark.parametrize("record", [{}, {"userData": []}, {"userData": {"GSW_PHONE": True}}])
def test_a_heard_record_without_number_is_refused(record: dict[str, Any]) -> None:
    """Nothing is dialled at a guess."""
    with pytest.raises(InvalidRequest) as error:
        preview_dial(json.dumps(heard(record)).encode())
    assert error.value.argument == "phoneNumber"


def test_a_target_without_query() -> None:
    """The path alone."""
    assert HttpRequest("/a").target == "/a"
    assert HttpRequest("/a", "b=c").target == "/a?b=c"
