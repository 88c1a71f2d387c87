"""Notifications in every dialect that GWS is documented to speak, made to order, in values of our own.

A test says what it is about (a state, some userData, who is on the call) and gets the bytes that a server
would send. The shapes are those of Genesys' pages and of one field capture; numbers, ids and names are not.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, Final

JsonObject = dict[str, Any]

CHANNEL: Final = "/v2/me/calls"
DN: Final = "7010"
DEVICE: Final = "5d0c1f6e-77aa-4a3e-9f0e-2b6c8e1d4a90"
UUID: Final = "02AB7CDKQ1H9V6T4080000LAES00001A"
CONN: Final = "00a1034f1be7c021"
NUMBER: Final = "7023"

ABSENT: Final[Any] = object()
"""As a field's value: leave the field out."""

RINGING: Final = ("Answer", "ClearCall", "AttachUserData", "UpdateUserData", "DeleteUserData")
DIALING: Final = ("Hangup", "SendDtmf", "AttachUserData", "UpdateUserData", "DeleteUserData")
TALKING: Final = ("Hangup", "Hold", "SendDtmf", "InitiateTransfer", "SingleStepTransfer", "AttachUserData")
ON_HOLD: Final = ("Retrieve", "Hangup", "InitiateConference", "AttachUserData")
CAPABILITIES: Final[dict[str, tuple[str, ...]]] = {
    "Ringing": RINGING,
    "Dialing": DIALING,
    "Established": TALKING,
    "Held": ON_HOLD,
}

WITHOUT_EXTENSIONS: Final = frozenset({"AttachedDataChanged", "CallRecordingStateChange"})
"""Notification types that come without `extensions` in the newer samples."""


def encoded(value: Any) -> bytes:
    """Compact JSON, as servers send it."""
    return json.dumps(value, separators=(",", ":")).encode()


def present(fields: JsonObject) -> JsonObject:
    """Without the fields that are `ABSENT`."""
    return {name: value for name, value in fields.items() if value is not ABSENT}


def party(number: str) -> JsonObject:
    """A participant as an object (since October 2015); internal numbers have an empty e164Number."""
    e164 = number if number.startswith("+") else ""
    return {
        "e164Number": e164,
        "formattedPhoneNumber": number,
        "phoneNumber": number,
        "digits": number.lstrip("+"),
    }


def resource(state: Any = "Ringing", *, numbers: Sequence[str] = (NUMBER,), **fields: Any) -> JsonObject:
    """A call resource of GWS 8.5.2; `fields` replace its fields, or remove them with `ABSENT`."""
    call_id = fields.get("id", UUID)
    made: JsonObject = {
        "id": call_id,
        "state": state,
        "callUuid": call_id,
        "connId": CONN,
        "deviceUri": f"http://192.0.2.10:8090/api/v2/devices/{DEVICE}",
        "participants": [party(number) for number in numbers],
        "dnis": DN,
        "callType": "Internal",
        "capabilities": list(CAPABILITIES.get(state, ()) if isinstance(state, str) else ()),
        "duration": "0",
        "mute": "Off",
        "supervisorListeningIn": False,
        "monitoredUserMuted": False,
        "monitoring": False,
        "uri": f"http://192.0.2.10:8090/api/v2/me/calls/{call_id}",
        "path": f"/calls/{call_id}",
    }
    return present(made | fields)


def in_data(call: JsonObject, kind: str = "StatusChange", **around: Any) -> JsonObject:
    """The `data` that carries a call; `around` is what else stands in it."""
    made: JsonObject = {
        "notificationType": kind,
        "call": call,
        "phoneNumber": DN,
        "messageType": "CallStateChangeMessage",
        "extensions": ABSENT if kind in WITHOUT_EXTENSIONS else {"BusinessCall": 0},
    }
    return present(made | around)


def bayeux(data: JsonObject, channel: str = CHANNEL) -> JsonObject:
    """A whole Bayeux message."""
    return {"data": data, "channel": channel}


def stamped(milliseconds: int) -> JsonObject:
    """`metrics` with the server's clock, epoch milliseconds."""
    return {
        "eventProcessing": {
            "nodeProcessingTimeNanos": 318_204,
            "serverGenerationTimestamp": milliseconds,
            "serverProcessingTimeTotalMs": -1,
        }
    }


def message(
    state: Any = "Ringing", kind: str = "StatusChange", *, server_ms: int | None = None, **fields: Any
) -> bytes:
    """The bytes of a v2 notification; `fields` are those of the call."""
    around = {} if server_ms is None else {"metrics": stamped(server_ms)}
    return encoded(bayeux(in_data(resource(state, **fields), kind, **around)))


def snapshot(*calls: JsonObject, status: Any = 0) -> bytes:
    """The REST reply that lists the live calls."""
    return encoded(present({"statusCode": status, "calls": list(calls)}))


# ── The dialects ──────────────────────────────────────────────────────────────────────────────────────


def objects(state: str, **fields: Any) -> JsonObject:
    """Since October 2015: participants are objects."""
    return bayeux(in_data(resource(state, **fields)))


def strings(state: str, **fields: Any) -> JsonObject:
    """Before: participants are texts, with the details beside them, and the id is the connId."""
    call = resource(state, **({"id": CONN, "callUuid": UUID} | fields))
    listed = call.pop("participants", [])
    call["participants"] = [each["phoneNumber"] for each in listed]
    call["participantsInfo"] = [
        {"digits": p["digits"], "e164Number": p["phoneNumber"], "formattedPhoneNumber": p["phoneNumber"]}
        for p in listed
    ]
    del call["monitoring"]
    return bayeux(in_data(call))


def strings_located(state: str, **fields: Any) -> JsonObject:
    """As `strings`, with the other known shape of participantsInfo."""
    made = strings(state, **fields)
    for info in made["data"]["call"]["participantsInfo"]:
        info.pop("e164Number")
        info["E164digits"] = info.pop("digits")
        info |= {"country": {"name": "Nowhere", "code": "XX"}, "location": None, "isValidNumber": True}
    return made


def v3(state: str, **fields: Any) -> JsonObject:
    """GWS v3: `{number, role}`, userData as a list, capabilities in kebab case."""
    call = resource(state, **fields)
    numbers = [each["phoneNumber"] for each in call.pop("participants", [])]
    made: JsonObject = {
        "id": call["id"],
        "callUuid": call.get("callUuid", UUID),
        "connId": call.get("connId", CONN),
        "state": state,
        "callType": call.get("callType"),
        "phoneNumber": DN,
        "participants": [{"number": number, "role": "RoleDestination"} for number in numbers],
        "dnis": call.get("dnis", ABSENT),
        "capabilities": ["attach-user-data", "release"] if call.get("capabilities") else [],
        "userData": [
            {"key": key, "type": "int" if isinstance(value, int) else "str", "value": value}
            for key, value in call.get("userData", {}).items()
        ],
        "duration": int(call["duration"]),
    }
    made |= {name: fields[name] for name in ("previousConnId", "parentConnId") if name in fields}
    data = {
        "messageType": "CallStateChanged",
        "notificationType": "StateChange",
        "call": present(made),
        "phoneNumber": DN,
    }
    return bayeux(data, "/workspace/v3/voice")


def data_alone(state: str, **fields: Any) -> JsonObject:
    """Some pages print only the `data` of the message."""
    return in_data(resource(state, **fields))


def bare(state: str, **fields: Any) -> JsonObject:
    """A call resource without an envelope, as GET on the call answers."""
    return resource(state, **fields)


DIALECTS: Final[dict[str, Callable[..., JsonObject]]] = {
    "objects": objects,
    "strings": strings,
    "strings, located": strings_located,
    "v3": v3,
    "data alone": data_alone,
    "bare": bare,
}

# ── Messages about something else ─────────────────────────────────────────────────────────────────────

ASIDES: Final[dict[str, JsonObject]] = {
    "DeviceStateChangeMessage": bayeux(
        {
            "messageType": "DeviceStateChangeMessage",
            "devices": [{"id": DEVICE, "deviceState": "Active", "userState": {"state": "Ready"}}],
        },
        "/v2/me/devices",
    ),
    "ErrorMessage": bayeux(
        {"messageType": "ErrorMessage", "metrics": stamped(1_760_000_000_000), "devicePath": "/devices/1"},
        "/v2/me/devices",
    ),
    "EventError": bayeux(
        {"messageType": "EventError", "error": {"errorCode": 7, "errorMessage": "No such number"}},
        "/workspace/v3/voice",
    ),
    "OutboundRecordMessage": {
        "messageType": "OutboundRecordMessage",
        "notificationType": "PreviewRecord",
        "record": {"userData": {"GSW_ATTEMPTS": 0}},
    },
    "ChannelStateChangeMessageV2": {"messageType": "ChannelStateChangeMessageV2", "channels": []},
}


def handful() -> dict[str, JsonObject]:
    """One body of each kind by a name, for where no samples are at hand."""
    return (
        {f"call, {name}": dialect("Established", duration="12") for name, dialect in DIALECTS.items()}
        | {f"aside, {name}": body for name, body in ASIDES.items()}
        | {
            "snapshot": {"statusCode": 0, "calls": [resource("Held", userData={"Case": "4"})]},
            "attached data": bayeux(
                in_data(resource("Ringing", userData={"Case": "4"}), "AttachedDataChanged")
            ),
            "refusal": {"statusCode": 20, "statusMessage": "Access denied"},
            "devices": {"statusCode": 0, "devices": []},
            "no JSON": {"_raw": "{'messageType': 'OutboundCampaignMessage'}"},
        }
    )
