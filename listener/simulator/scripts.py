"""The scripted calls: what a contact centre says about them, and what should be known afterwards.

This module decides the order, the delays and the spelling of every message about one call, in the
dialects that Genesys Web Services has spoken over the years. It knows no socket, no clock and no
session: randomness is a seeded `random.Random`, time is an argument. The same seed and the same times
give the same bytes.

A script is a generator over a `ScriptedCall`: it acts (each act says one message) and yields the
seconds until its next act. Beside the messages it keeps a `CallTruth` per leg: what a listener that
heard everything must have stored. It is written from the reference of the message shapes alone and
shares no code with the decoder, so that a mistake on one side shows.

The traps of the real messages are in here on purpose: capabilities in any order, keys in any order,
`duration` as text, userData that is nested, numeric, doubled or suddenly absent, `metrics` that are
empty or missing, supervisor fields that come and go, ids that were connIds.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cache
from random import Random
from typing import Any, Final
from uuid import UUID

from msgspec.json import encode

CALLS_CHANNEL: Final = "/v2/me/calls"
DEVICES_CHANNEL: Final = "/v2/me/devices"
V3_VOICE_CHANNEL: Final = "/workspace/v3/voice"


class Dialect(StrEnum):
    """One spelling of the messages. They follow each other in time; an installation speaks one."""

    V2_CONNID = "v2-connid"
    """Before August 2015: `id` is the connId, participants are strings."""
    V2_STRINGS = "v2-strings"
    """2015: `id` is the callUuid, participants are strings with `participantsInfo` beside them."""
    V2 = "v2"
    """Since October 2015: participants are objects."""
    V3 = "v3"
    """Workspace v3: CallStateChanged, participants with roles, userData as a list, kebab-case."""


@dataclass(frozen=True, slots=True)
class Agent:
    """Whose calls they are: a login with its own DN and device."""

    login: str
    dn: str
    device_id: str
    name: str


@dataclass(frozen=True, slots=True)
class Quirks:
    """How often the centre misbehaves, as shares of its messages from 0 to 1. Zero switches one off."""

    unknown: float = 0.002
    """A notificationType or a state that no documentation lists."""
    repeated: float = 0.005
    """The same AttachedDataChanged twice, byte for byte: two facts, not a redelivery."""
    bare: float = 0.1
    """A DtmfSent, ParticipantsUpdated or PropertiesUpdated without the userData that the call has."""


@dataclass(slots=True)
class CallTruth:
    """What a listener that heard every message of one leg must have stored about it.

    It is complete once `final_state` is Released (v2) or Completed (v3). `accepted` is filled by the
    server: how many of `notifications` entered the queue of at least one session; where it is smaller,
    the rest was said while nobody was subscribed.
    """

    account: str
    script: str
    dialect: str
    call_id: str
    """The first id; later ones are in `aliases`, with callUuid, connId and previousConnId as sent."""
    aliases: list[str]
    direction: str
    number: str
    """The other party at the beginning."""
    parent_call_id: str | None = None
    final_state: str = ""
    outcome: str = ""
    """answered | unanswered; empty while the call goes on."""
    hold_count: int = 0
    parties: list[str] = field(default_factory=list)
    """Every number that was ever a participant, in order of appearance."""
    user_data: list[tuple[str, Any]] = field(default_factory=list)
    """The pairs at the end, in order; a key that was attached twice is here twice. See `merged_data`."""
    recording: str | None = None
    notifications: int = 0
    accepted: int = 0

    @property
    def finished(self) -> bool:
        """True once nothing more will be said about this leg."""
        return bool(self.outcome)

    @property
    def merged_data(self) -> dict[str, Any]:
        """`user_data` by key; the values of a key that is there more than once as a list, in order."""
        merged: dict[str, list[Any]] = {}
        for key, value in self.user_data:
            merged.setdefault(key, []).append(value)
        return {key: values[0] if len(values) == 1 else values for key, values in merged.items()}

    def as_json(self) -> dict[str, Any]:
        """The same as a JSON object, with `finished` and `merged_data`."""
        return asdict(self) | {"finished": self.finished, "merged_data": self.merged_data}


class Message:
    """One Bayeux data message, serialised once, with its place in what its account was sent.

    A script sets the first three; `position` (from 1, per account), `accepted` (at least one session
    took it), `delivered` (a session acknowledged it or, without the ack extension, it was handed to
    the socket) and `said_at_s` (when, in epoch seconds; 0 for a burst) are stamped by the server.
    """

    __slots__ = ("accepted", "channel", "delivered", "position", "raw", "said_at_s", "truth")

    def __init__(self, channel: str, raw: bytes, truth: CallTruth | None = None) -> None:
        self.channel = channel
        self.raw = raw
        self.truth = truth
        self.position = 0
        self.accepted = False
        self.delivered = False
        self.said_at_s = 0.0


class Leg:
    """One leg as its last message described it. Only `ScriptedCall` changes it."""

    def __init__(self, agent: Agent, dialect: Dialect, truth: CallTruth, started_s: float) -> None:
        self.agent = agent
        self.dialect = dialect
        self.truth = truth
        self.started_s = started_s
        self.call_uuid = ""
        self.conn_id = ""
        self.previous_conn_id = ""
        self.parent: Leg | None = None
        self.state = ""
        self.call_type = "Internal"
        self.ani = ""
        self.dnis = ""
        self.participants: list[tuple[str, str]] = []
        """(number, v3 role)."""
        self.user_data: list[tuple[str, Any]] = []
        self.mute = "Off"
        self.recording: str | None = None
        self.listening_in = False
        self.monitored_muted = False
        self.swappable = False
        """A consult is under way: SwapCalls and CompleteTransfer instead of Retrieve."""
        self.answered = False
        self.participants_json = b"[]"
        self.user_data_json = b""

    @property
    def id(self) -> str:
        """The id that its dialect gives to it."""
        return self.conn_id if self.dialect in (Dialect.V2_CONNID, Dialect.V3) else self.call_uuid

    @property
    def live(self) -> bool:
        """True while a REST reply of live calls lists it."""
        return self.state not in ("", "Released", "Completed")


GATEWAY: Final = "http://127.0.0.1:8080/api/v2"
"""The external URL in deviceUri and uri. Fixed: it is the server's own idea of its name, and the same
seed must give the same bytes on any port."""

_CAPABILITIES: Final = {
    "Dialing": ("Hangup", "SendDtmf"),
    "Ringing": ("Answer", "ClearCall"),
    "Established": (
        "Hold",
        "Hangup",
        "SendDtmf",
        "SingleStepTransfer",
        "SingleStepConference",
        "InitiateTransfer",
        "InitiateConference",
    ),
    "Held": (
        "Hangup",
        "SingleStepTransfer",
        "SingleStepConference",
        "InitiateTransfer",
        "InitiateConference",
    ),
}
_USER_DATA_CAPABILITIES: Final = ("AttachUserData", "UpdateUserData", "DeleteUserData", "DeleteUserDataPair")
_RECORDING_CAPABILITIES: Final = {
    "Stopped": ("StartCallRecording",),
    "Recording": ("PauseCallRecording", "StopCallRecording"),
    "Paused": ("ResumeCallRecording", "StopCallRecording"),
}
_V3_CAPABILITIES: Final = {
    "Dialing": ("release", "clear", "send-dtmf"),
    "Ringing": ("answer", "clear", "redirect"),
    "Established": (
        "release",
        "hold",
        "clear",
        "send-dtmf",
        "initiate-conference",
        "initiate-transfer",
        "single-step-conference",
        "single-step-transfer",
    ),
    "Held": ("release", "retrieve", "clear", "initiate-conference", "initiate-transfer"),
    "Released": ("complete",),
}
_V3_USER_DATA_CAPABILITIES: Final = ("attach-user-data", "update-user-data", "delete-user-data-pair")
_V3_RECORDING_CAPABILITIES: Final = {
    "Stopped": ("start-recording",),
    "Recording": ("pause-recording", "stop-recording"),
    "Paused": ("resume-recording", "stop-recording"),
}
CAPABILITY_ORDERS: Final = 8
"""How many different orders of one set of capabilities are used; a shuffle per message costs more than
the rest of the message."""


@cache
def _capability_orders(
    *, v3: bool, state: str, recording: str | None, swappable: bool, conference: bool
) -> tuple[bytes, ...]:
    """The capabilities of a situation as JSON, in several orders."""
    if v3:
        names = list(_V3_CAPABILITIES.get(state, ()))
        if state in ("Dialing", "Ringing", "Established", "Held"):
            names += _V3_USER_DATA_CAPABILITIES
        if state in ("Established", "Held") and recording:
            names += _V3_RECORDING_CAPABILITIES.get(recording, ())
    else:
        names = list(_CAPABILITIES.get(state, ()))
        if names:
            names += _USER_DATA_CAPABILITIES
        if state == "Held":
            names += ("SwapCalls", "CompleteTransfer") if swappable else ("Retrieve",)
        if state == "Established":
            names += _RECORDING_CAPABILITIES.get(recording or "", ())
            if conference:
                names.append("RemoveParticipantFromConference")
    shuffle = Random(f"{v3}{state}{recording}{swappable}{conference}").shuffle
    orders = []
    for _ in range(CAPABILITY_ORDERS):
        shuffle(names)
        orders.append(encode(names))
    return tuple(orders)


def _digits(number: str) -> str:
    return number.lstrip("+")


def _formatted(number: str) -> str:
    if number.startswith("+1"):
        return f"+1 {number[2:5]}-{number[5:8]}-{number[8:]}"
    if number.startswith("+61"):
        return f"+61 {number[3:4]} {number[4:8]} {number[8:]}"
    return number


def _is_external(number: str) -> bool:
    return number.startswith("+")


@cache
def _participant_object(number: str, *, detailed: bool) -> bytes:
    """A participant as v2 spells it since October 2015; only numbers of the two countries that calls here are
    made up of have a location."""
    participant: dict[str, Any] = {
        "e164Number": number if _is_external(number) else "",
        "formattedPhoneNumber": _formatted(number),
        "phoneNumber": number,
        "digits": _digits(number),
    }
    if detailed and number.startswith(("+1", "+61")):
        american = number.startswith("+1")
        participant["location"] = "Washington D.C." if american else "Victoria"
        participant["country"] = (
            {"name": "United States", "code": "US", "callingCode": "1"}
            if american
            else {"name": "Australia", "code": "AU", "callingCode": "61"}
        )
        participant["localPhoneNumber"] = _formatted(number).split(" ", 1)[1]
    return encode(participant)


@cache
def _participant_info(number: str, *, first_shape: bool) -> bytes:
    """An entry of participantsInfo, in one of the two shapes that were seen."""
    if first_shape:
        return encode(
            {"digits": _digits(number), "e164Number": number, "formattedPhoneNumber": _formatted(number)}
        )
    return encode(
        {
            "country": {},
            "formattedPhoneNumber": _formatted(number),
            "location": None,
            "E164digits": _digits(number),
            "isValidNumber": _is_external(number),
        }
    )


def _key_value_list(pairs: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    """userData as v3 spells it: a list, in which a key may come twice."""
    items: list[dict[str, Any]] = []
    for key, value in pairs:
        if isinstance(value, dict):
            items.append({"key": key, "type": "kvlist", "value": _key_value_list(list(value.items()))})
        else:
            items.append({"key": key, "type": "int" if isinstance(value, int) else "str", "value": value})
    return items


def _object_with_duplicates(pairs: list[tuple[str, Any]]) -> bytes:
    """A JSON object that repeats a key wherever the pairs do, as no JSON library would write it."""
    return b"{" + b",".join(encode(key) + b":" + encode(value) for key, value in pairs) + b"}"


def _render_participants(leg: Leg, *, detailed: bool, first_shape: bool) -> bytes:
    numbers = [number for number, _ in leg.participants]
    if leg.dialect is Dialect.V3:
        return b'"participants":' + encode([{"number": n, "role": r} for n, r in leg.participants])
    if leg.dialect is Dialect.V2:
        return (
            b'"participants":[' + b",".join(_participant_object(n, detailed=detailed) for n in numbers) + b"]"
        )
    infos = b",".join(_participant_info(n, first_shape=first_shape) for n in numbers)
    return b'"participants":' + encode(numbers) + b',"participantsInfo":[' + infos + b"]"


def _render_user_data(leg: Leg) -> bytes:
    if not leg.user_data:
        return b""
    if leg.dialect is Dialect.V3:
        return b'"userData":' + encode(_key_value_list(leg.user_data))
    return b'"userData":' + _object_with_duplicates(leg.user_data)


def _call_fields(leg: Leg, rng: Random, now_s: float, *, bare: bool) -> list[bytes]:
    """The fields of the call resource, each `"key":value`, before their order is chosen."""
    v3 = leg.dialect is Dialect.V3
    orders = _capability_orders(
        v3=v3,
        state=leg.state,
        recording=leg.recording,
        swappable=leg.swappable,
        conference=len(leg.participants) > 1,
    )
    duration = max(0, int(now_s - leg.started_s))
    fields = [
        b'"id":"%b"' % leg.id.encode(),
        b'"state":"%b"' % leg.state.encode(),
        b'"callUuid":"%b"' % leg.call_uuid.encode(),
        leg.participants_json,
        b'"dnis":"%b"' % leg.dnis.encode(),
        b'"callType":"%b"' % leg.call_type.encode(),
        b'"capabilities":' + orders[int(rng.random() * CAPABILITY_ORDERS)],
        # v2 sends the seconds as text, v3 as a number.
        (b'"duration":%d' if v3 else b'"duration":"%d"') % duration,
    ]
    if leg.ani:
        fields.append(b'"ani":"%b"' % leg.ani.encode())
    if leg.user_data_json and not bare:
        fields.append(leg.user_data_json)
    if leg.recording is not None:
        fields.append(b'"recordingState":"%b"' % leg.recording.encode())
    if v3:
        fields.append(b'"connId":"%b"' % leg.conn_id.encode())
        if leg.previous_conn_id:
            fields.append(b'"previousConnId":"%b"' % leg.previous_conn_id.encode())
        if leg.parent:
            fields.append(b'"parentConnId":"%b"' % leg.parent.conn_id.encode())
        return fields
    identifier = leg.id.encode()
    fields.append(b'"mute":"%b"' % leg.mute.encode())
    fields.append(b'"deviceUri":"%b/devices/%b"' % (GATEWAY.encode(), leg.agent.device_id.encode()))
    fields.append(b'"uri":"%b/me/calls/%b"' % (GATEWAY.encode(), identifier))
    if leg.dialect is Dialect.V2:
        fields.append(b'"path":"/calls/%b"' % identifier)
    if leg.dialect is not Dialect.V2_CONNID:
        fields.append(b'"connId":"%b"' % leg.conn_id.encode())
    if leg.parent:
        parent = leg.parent.id.encode()
        fields.append(b'"parentCallUri":"%b/me/calls/%b"' % (GATEWAY.encode(), parent))
        fields.append(b'"parentCallPath":"/calls/%b"' % parent)
    chance = rng.random()
    if chance < 0.9 or leg.listening_in or leg.monitored_muted:
        fields.append(b'"supervisorListeningIn":%b' % (b"true" if leg.listening_in else b"false"))
        fields.append(b'"monitoredUserMuted":%b' % (b"true" if leg.monitored_muted else b"false"))
        if leg.dialect is Dialect.V2:
            if leg.listening_in:
                fields.append(b'"supervisorMonitoringState":{"state":"ListenIn"}')
            elif chance < 0.7:
                fields.append(b'"monitoring":false')
    if chance < 0.05:
        fields.append(b'"case":[]')
    return fields


def _object(fields: list[bytes], rng: Random) -> bytes:
    """The fields as a JSON object in some order: Genesys' keys have none."""
    start = int(rng.random() * len(fields))
    return b"{" + b",".join(fields[start:] + fields[:start]) + b"}"


def render_resource(leg: Leg, rng: Random, now_s: float) -> bytes:
    """The call as `GET /api/v2/me/calls?fields=*` lists it; the same shape as inside a notification."""
    return _object(_call_fields(leg, rng, now_s, bare=False), rng)


def _metrics(rng: Random, now_s: float, dialect: Dialect) -> bytes:
    """`metrics` in the forms that were seen: whole, with -1, empty, absent (b"")."""
    chance = rng.random()
    if dialect is Dialect.V3 or chance < 0.1:
        return b""
    if chance < 0.15:
        return b'"metrics":{}'
    total = -1 if chance < 0.2 else int(chance * 6)
    return (
        b'"metrics":{"eventProcessing":{"nodeProcessingTimeNanos":%d,'
        b'"serverGenerationTimestamp":%d,"serverProcessingTimeTotalMs":%d}}'
        % (100_000 + int(chance * 5_000_000), int(now_s * 1000), total)
    )


def _envelope(channel: str, data: bytes, rng: Random) -> bytes:
    if rng.random() < 0.25:
        return b'{"channel":"%b","data":%b}' % (channel.encode(), data)
    return b'{"data":%b,"channel":"%b"}' % (data, channel.encode())


def device_message(agent: Agent, state: str, rng: Random, now_s: float) -> Message:
    """A DeviceStateChangeMessage: `state` is Ready or NotReady."""
    data = _object(
        [
            b'"messageType":"DeviceStateChangeMessage"',
            b'"devices":[' + render_device(agent, state) + b"]",
            _metrics(rng, now_s, Dialect.V2) or b'"metrics":{}',
        ],
        rng,
    )
    return Message(DEVICES_CHANNEL, _envelope(DEVICES_CHANNEL, data, rng))


def render_device(agent: Agent, state: str) -> bytes:
    """The agent's device as REST and the devices channel show it; `state` is Ready or NotReady."""
    return encode(
        {
            "id": agent.device_id,
            "deviceState": "Active",
            "userState": {
                "id": str(UUID(int=Random(state).getrandbits(128), version=4)).upper(),
                "displayName": "Ready" if state == "Ready" else "Not Ready",
                "state": state,
            },
            "phoneNumber": agent.dn,
            "description": "",
            "e164Number": "",
            "telephonyNetwork": "Private",
            "doNotDisturb": "Off",
            "voiceEnvironmentUri": f"{GATEWAY}/voice-environments/simulated",
            "capabilities": ["DoNotDisturbOn", "ForwardCallsOn"],
            "channels": ["voice"],
            "dynamicPhoneNumber": "",
        }
    )


def error_message(agent: Agent, rng: Random, now_s: float) -> Message:
    """The ErrorMessage of the devices channel, which names a device and no reason at all."""
    data = _object(
        [
            b'"messageType":"ErrorMessage"',
            _metrics(rng, now_s, Dialect.V2) or b'"metrics":{}',
            b'"devicePath":"/devices/%b"' % agent.device_id.encode(),
            b'"deviceUri":"%b/devices/%b"' % (GATEWAY.encode(), agent.device_id.encode()),
        ],
        rng,
    )
    return Message(DEVICES_CHANNEL, _envelope(DEVICES_CHANNEL, data, rng))


def oversized_message(truth: CallTruth, agent: Agent, size_bytes: int, rng: Random, now_s: float) -> Message:
    """A whole call in one notification of at least `size_bytes`: Released, with one huge userData value."""
    leg = Leg(agent, Dialect.V2, truth, now_s)
    leg.call_uuid, leg.conn_id = truth.call_id, truth.call_id[-16:].lower()
    leg.state, leg.dnis = "Released", truth.number
    leg.participants = [(truth.number, "")]
    leg.participants_json = _render_participants(leg, detailed=False, first_shape=True)
    leg.user_data = [("Transcript", "x" * size_bytes)]
    leg.user_data_json = _render_user_data(leg)
    data = _object(
        [
            b'"notificationType":"StatusChange"',
            b'"call":' + render_resource(leg, rng, now_s),
            b'"phoneNumber":"%b"' % agent.dn.encode(),
            b'"messageType":"CallStateChangeMessage"',
        ],
        rng,
    )
    truth.final_state, truth.outcome, truth.notifications = "Released", "unanswered", 1
    truth.user_data = list(leg.user_data)
    return Message(CALLS_CHANNEL, _envelope(CALLS_CHANNEL, data, rng), truth)


UNKNOWN_NOTIFICATION_TYPES: Final = ("CallbackOffered", "TreatmentApplied", "QueuePositionChanged")
UNKNOWN_STATE: Final = "Parked"

_BARE_TYPES: Final = frozenset({"DtmfSent", "ParticipantsUpdated", "PropertiesUpdated"})
# Newer messages of these types come without `extensions`.
_WITHOUT_EXTENSIONS: Final = frozenset({"AttachedDataChanged", "CallRecordingStateChange"})


class ScriptedCall:
    """One play of one script for one agent: the messages come out of `advance`.

    `now_s` is epoch seconds; every message carries the time that was given to `advance`.
    `v3_channel` is where v3 messages go. `destination` overrides the number that is dialled, `attached` is
    the data that whoever dials attaches.
    """

    def __init__(
        self,
        script: str,
        agent: Agent,
        dialect: Dialect,
        rng: Random,
        *,
        quirks: Quirks | None = None,
        destination: str | None = None,
        attached: Mapping[str, Any] | None = None,
        v3_channel: str = V3_VOICE_CHANNEL,
    ) -> None:
        self.script = script
        self.agent = agent
        self.dialect = dialect
        self.rng = rng
        self.quirks = quirks or Quirks()
        self.destination = destination
        self.attached = list((attached or {}).items())
        self.legs: list[Leg] = []
        self.now_s = 0.0
        self._channel = v3_channel if dialect is Dialect.V3 else CALLS_CHANNEL
        self._outbox: list[Message] = []
        self._acts = SCRIPTS[script].play(self)

    def advance(self, now_s: float) -> tuple[list[Message], float | None]:
        """Do the next act at `now_s`. Gives its messages and the seconds until the next act, or None
        when the script is over: then it must not be called again."""
        self.now_s = now_s
        delay_s = next(self._acts, None)
        said, self._outbox = self._outbox, []
        return said, delay_s

    @property
    def truths(self) -> list[CallTruth]:
        """The expected truth of every leg that has begun."""
        return [leg.truth for leg in self.legs]

    def live_resources(self, now_s: float) -> list[bytes]:
        """Its legs that are live now, as REST lists them."""
        rng = Random(f"{self.script}{now_s}")
        return [render_resource(leg, rng, now_s) for leg in self.legs if leg.live]

    # What scripts are made of. -----------------------------------------------------------------

    def between(self, low_s: float, high_s: float) -> float:
        """A delay in seconds."""
        return low_s + (high_s - low_s) * self.rng.random()

    def internal(self) -> str:
        """A made-up extension."""
        return f"15{int(self.rng.random() * 1000):03d}"

    def external(self) -> str:
        """A made-up outside number, out of the ranges that are kept free for fiction."""
        if self.rng.random() < 0.5:
            return f"+120255501{int(self.rng.random() * 100):02d}"
        return f"+6135550{int(self.rng.random() * 10_000):04d}"

    def anyone(self) -> str:
        """An outside number mostly, an extension at times."""
        return self.external() if self.rng.random() < 0.7 else self.internal()

    def dial(self, number: str | None = None) -> Leg:
        """Begin an outgoing leg."""
        number = number or self.destination or self.anyone()
        leg = self._leg(number, "outbound", "RoleDestination")
        leg.call_type = "Outbound" if _is_external(number) else "Internal"
        leg.dnis = number
        self._set_user_data(leg, list(self.attached))
        self.become(leg, "Dialing")
        return leg

    def ring(self, *, consult_from: str | None = None) -> Leg:
        """Begin an incoming leg, with the data that routing attached to it."""
        number = consult_from or self.anyone()
        leg = self._leg(number, "inbound", "RoleOrigination")
        leg.dnis = self.agent.dn
        if consult_from:
            leg.call_type = "Consult"
        elif _is_external(number):
            leg.call_type, leg.ani = "Inbound", number
        if self.rng.random() < 0.6:
            data: list[tuple[str, Any]] = [
                ("IW_CaseUid", self._uuid()),
                (
                    f"WWE_PARTY_{self.agent.dn}",
                    {"username": self.agent.login, "firstname": self.agent.name, "lastname": "Simulated"},
                ),
                ("GSW_CALL_ATTEMPTS", int(self.rng.random() * 4)),
                ("CustomerSegment", "Gold" if self.rng.random() < 0.3 else "Silver"),
            ]
            self._set_user_data(leg, data)
        self.become(leg, "Ringing")
        return leg

    def consult(self, parent: Leg) -> Leg:
        """Begin a consult leg; `parent` must be Held already."""
        number = self.internal()
        leg = self._leg(number, "outbound", "RoleDestination", parent)
        leg.call_type, leg.dnis = "Consult", number
        self._set_user_data(leg, list(parent.user_data))
        self.become(leg, "Dialing")
        return leg

    def become(self, leg: Leg, state: str, **extensions: Any) -> None:
        """Say a new state."""
        leg.state = state
        if state == "Established":
            leg.answered = True
        elif state == "Held":
            leg.truth.hold_count += 1
        self._say(leg, "StateChange" if self.dialect is Dialect.V3 else "StatusChange", extensions)

    def talk(self, leg: Leg, low_s: float, high_s: float) -> Iterator[float]:
        """Let time pass on an established leg; now and then something undocumented is said."""
        if self.rng.random() < self.quirks.unknown * 5:
            yield self.between(0.2, 1)
            if self.rng.random() < 0.5:
                self._say(leg, UNKNOWN_NOTIFICATION_TYPES[int(self.rng.random() * 3)], {})
            else:
                before = leg.state
                self.become(leg, UNKNOWN_STATE)
                yield self.between(0.2, 1)
                self.become(leg, before)
        yield self.between(low_s, high_s)

    def release(self, leg: Leg, **extensions: Any) -> Iterator[float]:
        """End a leg. In v3 it is completed at once, as a server does unless told otherwise."""
        self.hang_up(leg, **extensions)
        if self.dialect is Dialect.V3:
            yield 0.05
            self.complete(leg)

    def hang_up(self, leg: Leg, **extensions: Any) -> None:
        """Say Released, which in v3 leaves the wrap-up to come."""
        leg.swappable = leg.listening_in = leg.monitored_muted = False
        if leg.recording is not None:
            leg.recording = leg.truth.recording = "Stopped"
        if self.dialect is not Dialect.V3:
            self._finish(leg)
        self.become(leg, "Released", **extensions)

    def complete(self, leg: Leg) -> None:
        """v3: the wrap-up is over."""
        self._finish(leg)
        self.become(leg, "Completed")

    def _finish(self, leg: Leg) -> None:
        leg.truth.outcome = "answered" if leg.answered else "unanswered"

    def parties(self, leg: Leg, participants: list[tuple[str, str]], *, state: str | None = None) -> None:
        """Say who is on the call now; such a message may carry a new state too."""
        self._set_participants(leg, participants)
        if state:
            leg.state = state
            leg.answered = leg.answered or state == "Established"
        self._say(leg, "ParticipantsUpdated", {})

    def attach(self, leg: Leg, key: str, value: Any) -> None:
        """AttachUserData: an existing key is not replaced, it is there twice."""
        self._set_user_data(leg, [*leg.user_data, (key, value)])
        self._say(leg, "AttachedDataChanged", {})

    def update(self, leg: Leg, key: str, value: Any) -> None:
        """UpdateUserData: replaces."""
        self._put(leg, key, value)
        self._say(leg, "AttachedDataChanged", {})

    def detach(self, leg: Leg, key: str | None = None) -> None:
        """DeleteUserDataPair, or DeleteUserData without a key: then the field is absent."""
        self._set_user_data(leg, [(k, v) for k, v in leg.user_data if key is not None and k != key])
        self._say(leg, "AttachedDataChanged", {})

    def record(self, leg: Leg, state: str) -> None:
        """Recording, Paused or Stopped; the server keeps the same in userData."""
        leg.recording = leg.truth.recording = state
        self._put(leg, "GSIP_RECORD", {"Recording": "ON", "Paused": "PAUSED", "Stopped": "OFF"}[state])
        if state == "Recording":
            name = f"{leg.call_uuid}_{self.agent.dn}_{self.agent.dn}_{_digits(leg.truth.number)}_%3Ccentre%3E"
            self._put(leg, "GSIP_REC_FN", name)
        self._say(leg, "CallRecordingStateChange", {})

    def tell(self, leg: Leg, notification_type: str) -> None:
        """Say the leg as it is, under another notificationType."""
        self._say(leg, notification_type, {})

    def device(self, state: str) -> None:
        """Say the state of the agent's device: Ready or NotReady."""
        if self.dialect is Dialect.V3:
            dn = {"number": self.agent.dn, "agentState": state, "agentWorkMode": "Unknown", "reasons": []}
            data = b'{"dn":%b,"messageType":"DnStateChanged"}' % encode(dn)
            self._outbox.append(Message(self._channel, _envelope(self._channel, data, self.rng)))
        else:
            self._outbox.append(device_message(self.agent, state, self.rng, self.now_s))

    def error(self) -> None:
        """Say that something failed: v3 says what, v2 does not."""
        if self.dialect is Dialect.V3:
            error = b'{"errorCode":415,"errorMessage":"Invalid Destination DN"}'
            data = b'{"error":%b,"messageType":"EventError"}' % error
            self._outbox.append(Message(self._channel, _envelope(self._channel, data, self.rng)))
        else:
            self._outbox.append(error_message(self.agent, self.rng, self.now_s))

    def new_identity(self, leg: Leg) -> None:
        """v3: the leg goes on under another connId and names the one before."""
        leg.previous_conn_id, leg.conn_id = leg.conn_id, self._conn_id()
        leg.call_uuid = self._call_uuid()
        leg.truth.aliases += [leg.conn_id, leg.call_uuid]

    # How they are said. ------------------------------------------------------------------------

    def _leg(self, number: str, direction: str, role: str, parent: Leg | None = None) -> Leg:
        truth = CallTruth(self.agent.login, self.script, self.dialect, "", [], direction, number)
        leg = Leg(self.agent, self.dialect, truth, self.now_s)
        leg.call_uuid, leg.conn_id, leg.parent = self._call_uuid(), self._conn_id(), parent
        truth.call_id = leg.id
        truth.aliases = [leg.id]
        for other in (leg.call_uuid, "" if self.dialect is Dialect.V2_CONNID else leg.conn_id):
            if other and other not in truth.aliases:
                truth.aliases.append(other)
        if parent:
            truth.parent_call_id = parent.conn_id if self.dialect is Dialect.V3 else parent.id
        self._set_participants(leg, [(number, role)])
        self.legs.append(leg)
        return leg

    def _set_participants(self, leg: Leg, participants: list[tuple[str, str]]) -> None:
        leg.participants = participants
        for number, _ in participants:
            if number not in leg.truth.parties:
                leg.truth.parties.append(number)
        chance = self.rng.random()
        leg.participants_json = _render_participants(leg, detailed=chance < 0.3, first_shape=chance < 0.5)

    def _set_user_data(self, leg: Leg, pairs: list[tuple[str, Any]]) -> None:
        leg.user_data = pairs
        leg.truth.user_data = list(pairs)
        leg.user_data_json = _render_user_data(leg)

    def _put(self, leg: Leg, key: str, value: Any) -> None:
        kept = [(k, v) for k, v in leg.user_data if k != key]
        self._set_user_data(leg, [*kept, (key, value)])

    def _say(self, leg: Leg, notification_type: str, extensions: dict[str, Any]) -> None:
        rng, quirks = self.rng, self.quirks
        bare = notification_type in _BARE_TYPES and rng.random() < quirks.bare
        call = _object(_call_fields(leg, rng, self.now_s, bare=bare), rng)
        fields = [b'"notificationType":"%b"' % notification_type.encode(), b'"call":' + call]
        if self.dialect is Dialect.V3:
            fields.append(b'"messageType":"CallStateChanged"')
            if extensions or rng.random() < 0.2:
                fields.append(b'"operationId":"%b"' % self._uuid().encode())
        else:
            fields.append(b'"phoneNumber":"%b"' % self.agent.dn.encode())
            fields.append(b'"messageType":"CallStateChangeMessage"')
            if notification_type not in _WITHOUT_EXTENSIONS and (extensions or rng.random() < 0.9):
                fields.append(b'"extensions":' + self._extensions(leg, extensions))
            if metrics := _metrics(rng, self.now_s, self.dialect):
                fields.append(metrics)
        message = Message(self._channel, _envelope(self._channel, _object(fields, rng), rng), leg.truth)
        leg.truth.notifications += 1
        leg.truth.final_state = leg.state
        self._outbox.append(message)
        if notification_type == "AttachedDataChanged" and rng.random() < quirks.repeated:
            leg.truth.notifications += 1
            self._outbox.append(Message(message.channel, message.raw, leg.truth))

    def _extensions(self, leg: Leg, more: dict[str, Any]) -> bytes:
        extensions: dict[str, Any] = {"BusinessCall": int(_is_external(leg.truth.number))}
        if self.dialect is not Dialect.V2:
            extensions["WrapUpTime"] = 0
        if leg.state == "Ringing":
            extensions |= {
                "NO_ANSWER_ACTION": "notready",
                "OriginationDN": leg.truth.number,
                "OriginationDN_location": "SIP_Switch",
                "NO_ANSWER_TIMEOUT": 15,
                "NO_ANSWER_OVERFLOW": "recall",
            }
        return encode(extensions | more)

    def _call_uuid(self) -> str:
        return f"{self.rng.getrandbits(80):020X}AES{self.rng.getrandbits(36):09X}"

    def _conn_id(self) -> str:
        return f"0071{self.rng.getrandbits(48):012x}"

    def _uuid(self) -> str:
        return str(UUID(int=self.rng.getrandbits(128), version=4))


# The scripts. ------------------------------------------------------------------------------------


def _dial_answered(c: ScriptedCall) -> Iterator[float]:
    leg = c.dial()
    yield c.between(3, 12)
    c.become(leg, "Established")
    yield from c.talk(leg, 10, 60)
    yield from c.release(leg)


def _dial_busy(c: ScriptedCall) -> Iterator[float]:
    leg = c.dial()
    yield c.between(0.5, 2)
    yield from c.release(leg)


def _dial_not_answered(c: ScriptedCall) -> Iterator[float]:
    leg = c.dial()
    yield c.between(20, 40)
    yield from c.release(leg)


def _dial_invalid(c: ScriptedCall) -> Iterator[float]:
    if c.dialect is Dialect.V3:
        # v3 refuses before there is a call.
        c.error()
        return
    leg = c.dial()
    yield 0.1
    c.error()
    yield 0.1
    yield from c.release(leg)


def _inbound_answered(c: ScriptedCall) -> Iterator[float]:
    leg = c.ring()
    yield c.between(2, 8)
    c.become(leg, "Established")
    yield from c.talk(leg, 10, 60)
    yield from c.release(leg)


def _inbound_abandoned(c: ScriptedCall) -> Iterator[float]:
    leg = c.ring()
    yield c.between(5, 15)
    yield from c.release(leg)


def _hold_and_retrieve(c: ScriptedCall) -> Iterator[float]:
    leg = c.dial() if c.rng.random() < 0.5 else c.ring()
    yield c.between(2, 8)
    c.become(leg, "Established")
    for _ in range(1 + int(c.rng.random() * 2)):
        yield from c.talk(leg, 5, 20)
        c.become(leg, "Held")
        yield c.between(3, 15)
        c.become(leg, "Established")
    yield from c.talk(leg, 3, 20)
    yield from c.release(leg)


def _consult_transfer(c: ScriptedCall) -> Iterator[float]:
    leg = c.ring()
    yield c.between(2, 8)
    c.become(leg, "Established")
    yield from c.talk(leg, 5, 20)
    leg.swappable = True
    c.become(leg, "Held")
    yield 0.1
    consult = c.consult(leg)
    yield c.between(2, 6)
    c.become(consult, "Established")
    yield from c.talk(consult, 3, 10)
    yield from c.release(leg)
    yield 0.1
    yield from c.release(consult)


def _consult_received(c: ScriptedCall) -> Iterator[float]:
    """v3 only: the target of a transfer, whose call goes on under the id of the original."""
    leg = c.ring(consult_from=c.internal())
    yield c.between(2, 6)
    c.become(leg, "Established")
    yield from c.talk(leg, 3, 10)
    c.new_identity(leg)
    leg.call_type = "Inbound"
    c.parties(leg, [(c.external(), "RoleOrigination")])
    yield from c.talk(leg, 5, 20)
    yield from c.release(leg)


def _single_step_transfer(c: ScriptedCall) -> Iterator[float]:
    leg = c.ring()
    yield c.between(2, 8)
    c.become(leg, "Established")
    yield from c.talk(leg, 5, 20)
    yield from c.release(leg)


def _conference(c: ScriptedCall) -> Iterator[float]:
    leg = c.dial()
    yield c.between(2, 8)
    c.become(leg, "Established")
    yield from c.talk(leg, 5, 20)
    first = list(leg.participants)
    if c.rng.random() < 0.5:
        third = (c.internal(), "RoleNewParty")
        c.parties(leg, [*first, third])
    else:
        leg.swappable = True
        c.become(leg, "Held")
        yield 0.1
        consult = c.consult(leg)
        yield c.between(2, 6)
        c.become(consult, "Established")
        yield from c.talk(consult, 2, 6)
        yield from c.release(consult)
        yield 0.1
        leg.swappable = False
        c.parties(leg, [*first, (consult.truth.number, "RoleNewParty")], state="Established")
    yield from c.talk(leg, 10, 30)
    c.parties(leg, first)
    yield from c.talk(leg, 2, 10)
    yield from c.release(leg)


def _user_data(c: ScriptedCall) -> Iterator[float]:
    leg = c.ring() if c.rng.random() < 0.5 else c.dial()
    yield c.between(2, 8)
    c.become(leg, "Established")
    yield c.between(1, 5)
    c.update(leg, "AccountNumber", f"{int(c.rng.random() * 1e8):08d}")
    yield c.between(1, 5)
    c.update(leg, "CustomerSegment", "Gold")
    yield c.between(1, 5)
    c.update(leg, "Score", int(c.rng.random() * 100))
    yield c.between(1, 5)
    c.update(leg, "Address", {"city": "Springfield", "postcode": 3000})
    yield c.between(1, 5)
    c.update(leg, "CustomerSegment", "Platinum")
    yield c.between(1, 5)
    c.detach(leg, "AccountNumber")
    if c.rng.random() < 0.5:
        yield c.between(1, 5)
        c.detach(leg)
    yield from c.talk(leg, 2, 10)
    yield from c.release(leg)


def _duplicate_key(c: ScriptedCall) -> Iterator[float]:
    leg = c.dial()
    yield c.between(2, 8)
    c.become(leg, "Established")
    yield c.between(1, 5)
    c.attach(leg, "DispositionCode", "Callback")
    yield c.between(1, 5)
    c.attach(leg, "DispositionCode", "IssueResolved")
    yield from c.talk(leg, 2, 10)
    yield from c.release(leg)


def _recording(c: ScriptedCall) -> Iterator[float]:
    leg = c.ring() if c.rng.random() < 0.5 else c.dial()
    yield c.between(2, 8)
    leg.recording = leg.truth.recording = "Stopped"
    c.become(leg, "Established")
    for state in ("Recording", "Paused", "Recording", "Stopped"):
        yield c.between(1, 8)
        c.record(leg, state)
    yield from c.talk(leg, 2, 10)
    yield from c.release(leg)


def _mute(c: ScriptedCall) -> Iterator[float]:
    leg = c.dial()
    yield c.between(2, 8)
    c.become(leg, "Established")
    for mute in ("On", "Off"):
        yield c.between(2, 8)
        leg.mute = mute
        c.tell(leg, "PropertiesUpdated")
    yield from c.talk(leg, 2, 10)
    yield from c.release(leg)


def _dtmf(c: ScriptedCall) -> Iterator[float]:
    leg = c.dial()
    yield c.between(2, 8)
    c.become(leg, "Established")
    for _ in range(2 + int(c.rng.random() * 4)):
        yield c.between(0.2, 1)
        c.tell(leg, "DtmfSent")
    yield from c.talk(leg, 2, 10)
    yield from c.release(leg)


def _monitored(c: ScriptedCall) -> Iterator[float]:
    leg = c.ring()
    yield c.between(2, 8)
    c.become(leg, "Established")
    yield c.between(2, 8)
    first = list(leg.participants)
    leg.listening_in = True
    c.parties(leg, [*first, (c.internal(), "RoleObserver")])
    if c.dialect is not Dialect.V3:
        for muted in (True, False):
            yield c.between(1, 5)
            leg.monitored_muted = muted
            c.tell(leg, "MonitoredUserMutedStateChange")
    yield c.between(2, 8)
    leg.listening_in = False
    c.parties(leg, first)
    yield from c.talk(leg, 2, 10)
    yield from c.release(leg)


def _wrap(c: ScriptedCall) -> Iterator[float]:
    leg = c.ring()
    yield c.between(2, 8)
    c.become(leg, "Established")
    yield from c.talk(leg, 5, 30)
    c.hang_up(leg, WrapUpTime=30)
    yield 0.1
    c.device("NotReady")
    yield c.between(5, 30)
    if c.dialect is Dialect.V3:
        c.complete(leg)
        yield 0.1
    c.device("Ready")


@dataclass(frozen=True, slots=True)
class Script:
    """A scripted call: how it is played, how often beside the others, and which dialects can say it."""

    play: Callable[[ScriptedCall], Iterator[float]]
    weight: int
    dialects: frozenset[Dialect] = frozenset(Dialect)


_V2_ONLY: Final = frozenset(Dialect) - {Dialect.V3}

SCRIPTS: Final[dict[str, Script]] = {
    "dial_answered": Script(_dial_answered, 20),
    "dial_busy": Script(_dial_busy, 6),
    "dial_not_answered": Script(_dial_not_answered, 8),
    "dial_invalid": Script(_dial_invalid, 3),
    "inbound_answered": Script(_inbound_answered, 20),
    "inbound_abandoned": Script(_inbound_abandoned, 6),
    "hold_and_retrieve": Script(_hold_and_retrieve, 8),
    "consult_transfer": Script(_consult_transfer, 5),
    "consult_received": Script(_consult_received, 3, frozenset({Dialect.V3})),
    "single_step_transfer": Script(_single_step_transfer, 3),
    "conference": Script(_conference, 4),
    "user_data": Script(_user_data, 6),
    "duplicate_key": Script(_duplicate_key, 2),
    "recording": Script(_recording, 5),
    "mute": Script(_mute, 2, _V2_ONLY),
    "dtmf": Script(_dtmf, 3, _V2_ONLY),
    "monitored": Script(_monitored, 2),
    "wrap": Script(_wrap, 6),
}
"""Every script by name."""


@cache
def mix(dialect: Dialect) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The scripts that a dialect can say, and their weights: what `random.choices` takes."""
    names = tuple(name for name, script in SCRIPTS.items() if dialect in script.dialects)
    return names, tuple(SCRIPTS[name].weight for name in names)
