"""What the scripts say, held against the shapes in the reference of Genesys' messages."""

import json
import re
from random import Random
from typing import Any

import pytest

from listener.simulator.scripts import (
    CALLS_CHANNEL,
    DEVICES_CHANNEL,
    SCRIPTS,
    UNKNOWN_NOTIFICATION_TYPES,
    UNKNOWN_STATE,
    V3_VOICE_CHANNEL,
    Agent,
    Dialect,
    Message,
    Quirks,
    ScriptedCall,
    mix,
    render_device,
    render_resource,
)

AGENT = Agent("agent5001", "5001", "0b5c6f1e-0000-4000-8000-000000000001", "Agent 5001")
PLAIN = Quirks(unknown=0, repeated=0, bare=0)
EPOCH_S = 1_700_000_000.0
EVERY = [(name, dialect) for name, script in SCRIPTS.items() for dialect in sorted(script.dialects)]
V2_DIALECTS = [dialect for dialect in Dialect if dialect is not Dialect.V3]

Json = dict[str, Any]


def run(
    script: str, dialect: Dialect, seed: int = 1, quirks: Quirks = PLAIN, destination: str | None = None
) -> tuple[ScriptedCall, list[Message]]:
    """Play one script to its end, in script time."""
    rng = Random(f"{script}{dialect}{seed}")
    call = ScriptedCall(script, AGENT, dialect, rng, quirks=quirks, destination=destination)
    now_s, messages, delay_s = EPOCH_S, [], 0.0
    next_s: float | None = delay_s
    while next_s is not None:
        now_s += next_s
        said, next_s = call.advance(now_s)
        messages += said
    return call, messages


def bodies(messages: list[Message]) -> list[Json]:
    """The `data` of the messages that are about a call."""
    parsed = [json.loads(message.raw)["data"] for message in messages]
    return [data for data in parsed if "call" in data]


@pytest.mark.parametrize(("script", "dialect"), EVERY)
def test_every_script_ends_as_its_truth_says(script: str, dialect: Dialect) -> None:
    """The truth of every leg is what its messages, read by themselves, come to."""
    for seed in range(20):
        call, messages = run(script, dialect, seed, Quirks(unknown=0.05, repeated=0.2, bare=0.3))
        said = bodies(messages)
        for truth in call.truths:
            own = [data for data in said if data["call"]["id"] in truth.aliases]
            states = [data["call"]["state"] for data in own]
            assert truth.notifications == len(own)
            assert truth.finished
            assert truth.final_state == states[-1] == ("Completed" if dialect is Dialect.V3 else "Released")
            assert truth.outcome == ("answered" if "Established" in states else "unanswered")
            entered = sum(now == "Held" != before for before, now in zip(["", *states], states, strict=False))
            assert truth.hold_count == entered
            assert truth.direction == ("outbound" if states[0] == "Dialing" else "inbound")
            assert truth.call_id == own[0]["call"]["id"]
            assert truth.recording == own[-1]["call"].get("recordingState")
        assert sum(truth.notifications for truth in call.truths) == len(said)


@pytest.mark.parametrize("dialect", list(Dialect))
@pytest.mark.parametrize(
    "number", ["+442079460017", "+27110009000", "+", "+1", "+61", "+\N{SNOWMAN}", "*", "+ 1"]
)
def test_any_number_can_be_dialled(number: str, dialect: Dialect) -> None:
    """Also one of a country that no script makes up a number of, and what is no number at all."""
    for script in ("dial_answered", "dial_busy"):
        call, messages = run(script, dialect, destination=number)
        assert [(truth.number, truth.finished) for truth in call.truths] == [(number, True)]
        assert call.truths[0].notifications == len(bodies(messages)) > 1


@pytest.mark.parametrize("dialect", list(Dialect))
def test_same_seed_same_bytes(dialect: Dialect) -> None:
    """A script with the same seed and times gives the same bytes; another seed gives others."""
    name = mix(dialect)[0][0]
    first, again, other = (run(name, dialect, seed)[1] for seed in (1, 1, 2))
    assert [m.raw for m in first] == [m.raw for m in again]
    assert [m.raw for m in first] != [m.raw for m in other]


def test_v2_has_the_shape_of_2016() -> None:
    """v2: envelope, call and participants have the keys and types that the samples show."""
    call, messages = run("dial_answered", Dialect.V2, destination="15001")
    for message, data in zip(messages, bodies(messages), strict=True):
        assert set(json.loads(message.raw)) == {"data", "channel"}
        assert message.channel == json.loads(message.raw)["channel"] == CALLS_CHANNEL
        assert data["messageType"] == "CallStateChangeMessage"
        assert data["notificationType"] == "StatusChange"
        assert data["phoneNumber"] == "5001"
        leg = data["call"]
        assert re.fullmatch(r"[0-9A-F]{20}AES[0-9A-F]{9}", leg["id"])
        assert leg["callUuid"] == leg["id"]
        assert re.fullmatch(r"0071[0-9a-f]{12}", leg["connId"])
        assert leg["participants"] == [
            {"e164Number": "", "formattedPhoneNumber": "15001", "phoneNumber": "15001", "digits": "15001"}
        ]
        assert leg["uri"].endswith(f"/api/v2/me/calls/{leg['id']}")
        assert leg["path"] == f"/calls/{leg['id']}"
        assert leg["deviceUri"].endswith(f"/api/v2/devices/{AGENT.device_id}")
        assert (leg["dnis"], leg["callType"], leg["mute"]) == ("15001", "Internal", "Off")
        assert isinstance(leg["duration"], str)
        assert "participantsInfo" not in leg
    assert bodies(messages)[-1]["call"]["capabilities"] == []
    assert int(bodies(messages)[-1]["call"]["duration"]) > 10
    assert [data["call"]["id"] for data in bodies(messages)] == [call.truths[0].call_id] * 3


def test_v2_strings_has_the_shape_of_2015() -> None:
    """v2-strings: participants are strings, described beside in one of two shapes; there is no path."""
    shapes = set()
    for seed in range(20):
        _, messages = run("inbound_answered", Dialect.V2_STRINGS, seed)
        for data in bodies(messages):
            leg = data["call"]
            assert leg["id"] == leg["callUuid"]
            assert all(isinstance(number, str) for number in leg["participants"])
            assert len(leg["participantsInfo"]) == len(leg["participants"])
            shapes.add(frozenset(leg["participantsInfo"][0]))
            assert "path" not in leg
            assert "monitoring" not in leg
    assert shapes == {
        frozenset({"digits", "e164Number", "formattedPhoneNumber"}),
        frozenset({"country", "formattedPhoneNumber", "location", "E164digits", "isValidNumber"}),
    }


def test_v2_connid_names_calls_by_conn_id() -> None:
    """v2-connid: `id` is the connId, which has no field of its own; callUuid is another."""
    call, messages = run("dial_answered", Dialect.V2_CONNID)
    for data in bodies(messages):
        assert re.fullmatch(r"0071[0-9a-f]{12}", data["call"]["id"])
        assert data["call"]["uri"].endswith(data["call"]["id"])
        assert data["call"]["callUuid"] != data["call"]["id"]
        assert "connId" not in data["call"]
    assert call.truths[0].aliases == [data["call"]["id"], data["call"]["callUuid"]]


def test_v3_has_the_shape_of_workspace() -> None:
    """v3: CallStateChanged, roles, a list of pairs, kebab-case, Completed after Released."""
    _, messages = run("user_data", Dialect.V3)
    said = bodies(messages)
    assert {message.channel for message in messages} == {V3_VOICE_CHANNEL}
    for data in said:
        assert data["messageType"] == "CallStateChanged"
        assert data["notificationType"] in ("StateChange", "AttachedDataChanged")
        leg = data["call"]
        assert [set(participant) for participant in leg["participants"]] == [{"number", "role"}]
        assert leg["participants"][0]["role"] in ("RoleOrigination", "RoleDestination")
        assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) for name in leg["capabilities"])
        assert isinstance(leg["duration"], int)
        for pair in leg.get("userData", []):
            assert set(pair) == {"key", "type", "value"}
            assert pair["type"] in ("str", "int", "kvlist")
    assert {pair["type"] for data in said for pair in data["call"].get("userData", [])} == {
        "str",
        "int",
        "kvlist",
    }
    assert [data["call"]["state"] for data in said[-2:]] == ["Released", "Completed"]


@pytest.mark.parametrize("dialect", V2_DIALECTS)
def test_extensions_and_metrics_come_and_go(dialect: Dialect) -> None:
    """extensions never come with AttachedDataChanged or CallRecordingStateChange; metrics are whole,
    empty, absent, or have -1."""
    metrics: set[str] = set()
    for script in ("recording", "user_data", "dtmf"):
        for seed in range(30):
            for data in bodies(run(script, dialect, seed)[1]):
                if data["notificationType"] in ("AttachedDataChanged", "CallRecordingStateChange"):
                    assert "extensions" not in data
                if "metrics" not in data:
                    metrics.add("absent")
                elif not data["metrics"]:
                    metrics.add("empty")
                else:
                    processing = data["metrics"]["eventProcessing"]
                    assert set(processing) == {
                        "nodeProcessingTimeNanos",
                        "serverGenerationTimestamp",
                        "serverProcessingTimeTotalMs",
                    }
                    metrics.add("-1" if processing["serverProcessingTimeTotalMs"] == -1 else "whole")
    assert metrics == {"absent", "empty", "-1", "whole"}


def test_ringing_carries_the_no_answer_extensions() -> None:
    """An incoming call says what happens when nobody answers, as in the field capture."""
    found = [
        data["extensions"]
        for seed in range(10)
        for data in bodies(run("inbound_abandoned", Dialect.V2, seed)[1])
        if data["call"]["state"] == "Ringing" and "extensions" in data
    ]
    assert found
    for extensions in found:
        assert extensions["NO_ANSWER_TIMEOUT"] == 15
        assert {"BusinessCall", "NO_ANSWER_ACTION", "NO_ANSWER_OVERFLOW", "OriginationDN"} <= set(extensions)


def test_capabilities_come_in_any_order() -> None:
    """The same situation is described with the same set in different orders."""
    lists = [
        tuple(data["call"]["capabilities"])
        for seed in range(30)
        for data in bodies(run("dial_answered", Dialect.V2, seed)[1])
        if data["call"]["state"] == "Established"
    ]
    assert len(set(lists)) > 3
    assert len({frozenset(names) for names in lists}) == 1
    assert {"Hold", "Hangup", "AttachUserData"} <= set(lists[0])


def test_keys_come_in_any_order() -> None:
    """Neither the envelope nor data nor the call begins with the same key all the time."""
    raws = [m.raw for seed in range(20) for m in run("dial_answered", Dialect.V2, seed)[1]]
    parsed = [json.loads(raw) for raw in raws]
    assert len({next(iter(message)) for message in parsed}) == 2
    assert len({next(iter(message["data"])) for message in parsed}) > 3
    assert len({next(iter(message["data"]["call"])) for message in parsed}) > 5


@pytest.mark.parametrize("dialect", list(Dialect))
def test_user_data_is_a_whole_and_absent_when_empty(dialect: Dialect) -> None:
    """userData is the full set each time, holds text, numbers and objects, and disappears when deleted."""
    emptied = 0
    for seed in range(20):
        call, messages = run("user_data", dialect, seed)
        changes = [d for d in bodies(messages) if d["notificationType"] == "AttachedDataChanged"]
        if not call.truths[0].user_data:
            emptied += 1
            assert "userData" in changes[-2]["call"]
            assert "userData" not in changes[-1]["call"]
            assert "userData" not in bodies(messages)[-1]["call"]
        else:
            assert call.truths[0].merged_data["Address"] == {"city": "Springfield", "postcode": 3000}
            assert "AccountNumber" not in call.truths[0].merged_data
    assert 0 < emptied < 20


@pytest.mark.parametrize("dialect", list(Dialect))
def test_an_attached_key_is_there_twice(dialect: Dialect) -> None:
    """AttachUserData of an existing key repeats the key, literally, in the text."""
    call, messages = run("duplicate_key", dialect)
    last = messages[-1].raw
    assert last.count(b'"DispositionCode"') == 2
    assert b'"Callback"' in last
    assert b'"IssueResolved"' in last
    assert call.truths[0].merged_data["DispositionCode"] == ["Callback", "IssueResolved"]


@pytest.mark.parametrize("dialect", list(Dialect))
def test_consult_transfer_is_said_in_order(dialect: Dialect) -> None:
    """Original Held, consult Dialing and linked, both Released, the original first."""
    call, messages = run("consult_transfer", dialect)
    original, consult = call.truths
    said = [(d["call"]["id"] == consult.call_id, d["call"]["state"]) for d in bodies(messages)]
    said = [(leg, state) for leg, state in said if state != "Completed"]
    assert said == [
        (False, "Ringing"),
        (False, "Established"),
        (False, "Held"),
        (True, "Dialing"),
        (True, "Established"),
        (False, "Released"),
        (True, "Released"),
    ]
    for data in bodies(messages):
        leg = data["call"]
        if leg["id"] != consult.call_id:
            assert not {"parentCallUri", "parentCallPath", "parentConnId"} & set(leg)
            continue
        assert leg["callType"] == "Consult"
        if dialect is Dialect.V3:
            assert leg["parentConnId"] == consult.parent_call_id == original.call_id
        else:
            assert leg["parentCallUri"].endswith(f"/me/calls/{original.call_id}")
            assert leg["parentCallPath"] == f"/calls/{original.call_id}"
            assert consult.parent_call_id == original.call_id
    held = next(d["call"] for d in bodies(messages) if d["call"]["state"] == "Held")
    if dialect is not Dialect.V3:
        assert {"SwapCalls", "CompleteTransfer"} <= set(held["capabilities"])
        assert "Retrieve" not in held["capabilities"]


def test_v3_transfer_target_goes_on_under_another_id() -> None:
    """The call gets a new id and names the old one in previousConnId."""
    call, messages = run("consult_received", Dialect.V3)
    ids = list(dict.fromkeys(d["call"]["id"] for d in bodies(messages)))
    assert len(ids) == 2
    assert set(ids) <= set(call.truths[0].aliases)
    moved = next(d for d in bodies(messages) if d["call"]["id"] == ids[1])
    assert moved["call"]["previousConnId"] == ids[0]
    assert moved["notificationType"] == "ParticipantsUpdated"


@pytest.mark.parametrize("dialect", list(Dialect))
def test_conference_changes_the_participants(dialect: Dialect) -> None:
    """A third party joins and leaves; all that were there are in the truth."""
    for seed in range(6):
        call, messages = run("conference", dialect, seed)
        truth = call.truths[0]
        own = [d for d in bodies(messages) if d["call"]["id"] == truth.call_id]
        updates = [d for d in own if d["notificationType"] == "ParticipantsUpdated"]
        assert [len(d["call"]["participants"]) for d in updates] == [2, 1]
        assert {d["call"]["state"] for d in updates} == {"Established"}
        assert len(truth.parties) == 2
        assert truth.number == truth.parties[0]


@pytest.mark.parametrize("dialect", list(Dialect))
def test_recording_is_said_twice(dialect: Dialect) -> None:
    """recordingState and the GSIP_RECORD pair agree, under CallRecordingStateChange."""
    _, messages = run("recording", dialect)
    changes = [d["call"] for d in bodies(messages) if d["notificationType"] == "CallRecordingStateChange"]
    assert [c["recordingState"] for c in changes] == ["Recording", "Paused", "Recording", "Stopped"]
    for leg, value in zip(changes, ["ON", "PAUSED", "ON", "OFF"], strict=True):
        data = leg["userData"]
        pairs = {p["key"]: p["value"] for p in data} if isinstance(data, list) else data
        assert pairs["GSIP_RECORD"] == value
        assert "GSIP_REC_FN" in pairs


def test_mute_dtmf_and_monitoring() -> None:
    """The agent mutes, sends digits, is listened to and is muted: each in its own way."""
    mutes = [d["call"]["mute"] for d in bodies(run("mute", Dialect.V2)[1])]
    assert mutes == ["Off", "Off", "On", "Off", "Off"]
    types = [d["notificationType"] for d in bodies(run("dtmf", Dialect.V2)[1])]
    assert 2 <= types.count("DtmfSent") <= 5
    monitored = bodies(run("monitored", Dialect.V2)[1])
    muted = [
        d["call"]["monitoredUserMuted"]
        for d in monitored
        if d["notificationType"] == "MonitoredUserMutedStateChange"
    ]
    assert muted == [True, False]
    listening = [d["call"] for d in monitored if d["call"].get("supervisorListeningIn")]
    assert listening
    assert all(leg["supervisorMonitoringState"] == {"state": "ListenIn"} for leg in listening)


def test_supervisor_fields_are_absent_at_times() -> None:
    """No supervisor field can be relied upon."""
    present = {
        "supervisorListeningIn" in d["call"]
        for seed in range(60)
        for d in bodies(run("dial_answered", Dialect.V2, seed)[1])
    }
    assert present == {True, False}


def test_wrap_is_said_by_each_generation_in_its_way() -> None:
    """v2 gives WrapUpTime with Released; v3 says Completed some time after it. The device follows."""
    _, messages = run("wrap", Dialect.V2)
    assert bodies(messages)[-1]["extensions"]["WrapUpTime"] == 30
    assert [m.channel for m in messages[-2:]] == [DEVICES_CHANNEL] * 2
    states = [json.loads(m.raw)["data"]["devices"][0]["userState"]["state"] for m in messages[-2:]]
    assert states == ["NotReady", "Ready"]
    _, messages = run("wrap", Dialect.V3)
    durations = [d["call"]["duration"] for d in bodies(messages)]
    assert durations[-1] - durations[-2] >= 4


def test_an_invalid_number_is_an_error() -> None:
    """v2 has a call and an ErrorMessage without a reason; v3 has a reason and no call."""
    call, messages = run("dial_invalid", Dialect.V2)
    assert [m.channel for m in messages] == [CALLS_CHANNEL, DEVICES_CHANNEL, CALLS_CHANNEL]
    error = json.loads(messages[1].raw)["data"]
    assert set(error) == {"messageType", "metrics", "devicePath", "deviceUri"}
    assert error["messageType"] == "ErrorMessage"
    assert call.truths[0].outcome == "unanswered"
    call, messages = run("dial_invalid", Dialect.V3)
    assert [json.loads(m.raw)["data"]["messageType"] for m in messages] == ["EventError"]
    assert call.truths == []


def test_a_device_looks_as_in_the_field() -> None:
    """The device resource has the keys of the field capture."""
    device = json.loads(render_device(AGENT, "Ready"))
    assert set(device) == {
        "id",
        "deviceState",
        "userState",
        "phoneNumber",
        "description",
        "e164Number",
        "telephonyNetwork",
        "doNotDisturb",
        "voiceEnvironmentUri",
        "capabilities",
        "channels",
        "dynamicPhoneNumber",
    }
    assert set(device["userState"]) == {"id", "displayName", "state"}


def test_the_resource_is_the_call_of_the_notification() -> None:
    """REST and notification have the same fields: "the format of the call resource is identical"."""
    rng = Random(1)
    call = ScriptedCall("inbound_answered", AGENT, Dialect.V2, rng, quirks=PLAIN)
    said, _ = call.advance(EPOCH_S)
    leg = json.loads(said[0].raw)["data"]["call"]
    resource = json.loads(call.live_resources(EPOCH_S)[0])
    optional = {"supervisorListeningIn", "monitoredUserMuted", "monitoring", "case"}
    assert {k: v for k, v in resource.items() if k not in optional | {"capabilities"}} == {
        k: v for k, v in leg.items() if k not in optional | {"capabilities"}
    }
    assert set(resource["capabilities"]) == set(leg["capabilities"])
    assert json.loads(render_resource(call.legs[0], rng, EPOCH_S + 7))["duration"] == "7"


def test_quirks_can_be_switched_off() -> None:
    """With the quirks off nothing unknown is said; with them on it is."""

    def unknown(quirks: Quirks) -> int:
        said = [d for seed in range(60) for d in bodies(run("dial_answered", Dialect.V2, seed, quirks)[1])]
        return sum(
            d["notificationType"] in UNKNOWN_NOTIFICATION_TYPES or d["call"]["state"] == UNKNOWN_STATE
            for d in said
        )

    assert unknown(PLAIN) == 0
    assert unknown(Quirks(unknown=0.1)) > 0


def test_a_repeated_message_is_two_facts() -> None:
    """With the quirk, an AttachedDataChanged comes twice, byte for byte, and counts twice."""
    call, messages = run("user_data", Dialect.V2, quirks=Quirks(unknown=0, repeated=1, bare=0))
    raws = [m.raw for m in messages]
    assert len(raws) > len(set(raws))
    assert call.truths[0].notifications == len(raws)


def test_numbers_are_made_up() -> None:
    """Every number is an internal one or out of a range kept free for fiction."""
    for name, dialect in EVERY:
        for truth in run(name, dialect)[0].truths:
            for number in truth.parties:
                assert re.fullmatch(r"15\d{3}|\+120255501\d{2}|\+6135550\d{4}", number), number
