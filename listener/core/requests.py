"""What may be asked of the outside systems, held to their rules, and the exact HTTP request for each.

A value of one of these classes is a request that its vendor's page allows: whoever makes one from wrong
arguments gets `InvalidRequest`, which names the argument as the vendor spells it, the rule and the cure. A
wrong dial is thus refused before anything is written down or sent. `build` makes the HTTP request: method,
path, query with its order and encoding, content type and body. Fields have the vendors' names in JSON
(`msgspec.json.decode(body, type=NoojeeDial)` reads one, and holds it to the rules).

The forms are from the vendors' pages: Genesys Web Services "Dial" and "Dial Preview Record" (2015/2016),
Noojee Contact CallManagementAPI (Dial, Hangup, Answer, Start and Stop Recording), Teleforge Click2Dial
"Create a Call". Where a page gives no rule, only what no system could mean is refused: nothing, blanks in a
number, control characters, and what is out of all proportion.

It refuses to know hosts, credentials and sockets. A key that a system wants in its query is added where the
request is sent, so that neither these values nor their `repr` ever hold one.
"""

import math
import re
from typing import Any, Literal, assert_never
from urllib.parse import quote, urlencode

import msgspec
from msgspec import Struct, structs

from listener.core.calls import JsonObject
from listener.core.dialling import REFERENCE_KEY, Accepted, NotAnswered, Refused
from listener.errors import InvalidRequest

Acknowledgement = Accepted | Refused | NotAnswered
"""What a system says to a request; none of them ends a call."""

TEXT_CHARS_MAX = 255
"""No number, id, caption, tag or header of a phone is longer."""

DATA_BYTES_MAX = 64 * 1024
"""Attached data and outbound records, as JSON: more is out of all proportion to a call."""

NESTING_MAX = 16
"""How deep attached data may be nested: a bound of ours, so that the stack's never decides."""

REFERENCE_CHARS_MAX = 230
"""Click2Dial cuts longer ones off, silently. A reference that was cut matches nothing, so we refuse it."""

INTEGER_MAX = 2**63 - 1
"""JSON readers agree on 64 bits."""

JSON_TYPE = "application/json"
FORM_TYPE = "application/x-www-form-urlencoded"

NOOJEE_PATH = "/servicemanager/rest/CallManagementAPI/"
CLICK2DIAL_PATH = "/click2dial/calls"


class HttpRequest(Struct, frozen=True, gc=False):
    """One HTTP request without host and credentials. `query` is encoded already, and stays as it is."""

    path: str
    query: str = ""
    content_type: str = JSON_TYPE
    body: bytes = b""
    method: Literal["POST"] = "POST"

    @property
    def target(self) -> str:
        """Path and query, as they stand in the request line."""
        return f"{self.path}?{self.query}" if self.query else self.path


# ── Genesys Web Services ──────────────────────────────────────────────────────────────────────────────


class GwsDial(Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Dial (Voice API): the account's device calls a number."""

    number: str
    device: str | None = None
    """The device's id; None: the account's only one, which the adapter looks up."""
    location: str | None = None
    """Sets the location attribute of the TServer requests."""
    user_data: JsonObject | None = None
    """Key-value data for the call, which may be nested."""
    reference: str | None = None
    """Goes into the user data, so that the call can be recognised when it is heard."""

    def __post_init__(self) -> None:
        _number("number", self.number)
        if self.device is not None:
            _segment("device", self.device)
        if self.location is not None:
            _text("location", self.location)
        if self.reference is not None:
            _text("reference", self.reference)
        if self.user_data is not None:
            structs.force_setattr(self, "user_data", _json_object("userData", self.user_data))


class GwsPreviewDial(Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Dial Preview Record (Outbound API): the account's device calls the number of an outbound record."""

    outbound_record: JsonObject
    """The record, whole: recordHandle, phoneNumber, outboundCallerId, otherFields and what else it has."""
    device_path: str | None = None
    """Such as `/devices/1234567890`; None: the account's only device, which the adapter looks up."""

    def __post_init__(self) -> None:
        if self.device_path is not None:
            before, _, device = self.device_path.rpartition("/")
            if before != "/devices":
                raise InvalidRequest("devicePath", "is no relative path of a device", "write /devices/ID")
            _segment("devicePath", device)
        record = _json_object("outboundRecord", self.outbound_record)
        phone_number = record.get("phoneNumber")
        if not isinstance(phone_number, str):
            raise InvalidRequest(
                "phoneNumber",
                "outboundRecord has no phoneNumber that is a text",
                "give the record whole, as it was received",
            )
        _number("phoneNumber", phone_number)
        handle = record.get("recordHandle", 0)
        if not isinstance(handle, int) or isinstance(handle, bool):
            raise InvalidRequest(
                "recordHandle", "is no whole number", "give the record as it was received, such as 431"
            )
        structs.force_setattr(self, "outbound_record", record)

    @property
    def number(self) -> str:
        """The number to be called."""
        return str(self.outbound_record["phoneNumber"])


def preview_dial(heard: bytes | JsonObject, device_path: str | None = None) -> GwsPreviewDial:
    """The dial of a preview record: `heard` is the message of the outbound channel as it came, or as the
    object that somebody gives, which must be one that JSON can say.

    The record goes back as it was received, with its user data, and the number in addition. Where it has no
    `phoneNumber` of its own, its user data name it: GSW_PHONE, or contact_info. Raises `InvalidRequest` for
    any other message.
    """
    try:
        message = msgspec.json.decode(heard) if isinstance(heard, bytes) else _json_object("message", heard)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        message = None
    body = message if isinstance(message, dict) else {}
    if isinstance(body.get("data"), dict):
        body = body["data"]
    record = body.get("record")
    kind = (body.get("messageType"), body.get("notificationType"))
    if kind != ("OutboundRecordMessage", "PreviewRecord") or not isinstance(record, dict):
        raise InvalidRequest(
            "record",
            "the message is no preview record",
            "give an OutboundRecordMessage of the type PreviewRecord, from /v2/me/outbound",
        )
    user_data = record.get("userData")
    named = user_data if isinstance(user_data, dict) else {}
    number = record.get("phoneNumber") or named.get("GSW_PHONE") or named.get("contact_info")
    if isinstance(number, int) and not isinstance(number, bool):
        number = str(number)  # the values of user data mix texts and numbers
    return GwsPreviewDial(outbound_record={**record, "phoneNumber": number}, device_path=device_path)


# ── Noojee ────────────────────────────────────────────────────────────────────────────────────────────


class NoojeeDial(Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Dial: the agent's extension is called first, then the number. None leaves a parameter out; an empty
    text sends it empty, as the vendor's own sample does."""

    number: str
    exten_or_unique_id: str
    """An extension with its technology, `SIP/100`, or a unique call id."""
    auto_answer: str | None = None
    """The string by which the handset, by make and model, answers by itself."""
    caller_id: str | None = None
    """None or empty: the handset's, account's or trunk's. Set, those are ignored."""
    phone_caption: str | None = None
    monitored: bool = False
    """Events of this extension come through subscribe: without it nothing is heard of the dial."""
    record: bool = False
    """Record when the call is answered (from 6.0.1)."""
    tag: str | None = None
    """The recording's tag, which it can be found by (from 6.0.1)."""

    def __post_init__(self) -> None:
        _number("number", self.number)
        if not _UNIQUE_ID.fullmatch(self.exten_or_unique_id):
            _with_technology("extenOrUniqueId", self.exten_or_unique_id)
        for name, value in (
            ("autoAnswer", self.auto_answer),
            ("callerId", self.caller_id),
            ("phoneCaption", self.phone_caption),
        ):
            _optional(name, value)
        if self.tag is not None:
            if not self.record:
                raise InvalidRequest("tag", "is the tag of a recording", "give record too, or leave it out")
            _text("tag", self.tag)


class NoojeeHangup(Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Hangup. By its unique id, where it is known: by extension "can result in the wrong call being hungup if
    there is more than one call on the handset"."""

    exten_or_unique_id: str

    def __post_init__(self) -> None:
        _text("extenOrUniqueId", self.exten_or_unique_id)
        if not _EXTENSION_OR_ID.fullmatch(self.exten_or_unique_id.rpartition("/")[2]):
            raise InvalidRequest(
                "extenOrUniqueId", "is neither an extension nor a unique call id", _WRITE_EXTENSION_OR_ID
            )


class NoojeeAnswer(Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Answer: the handset takes a call that rings."""

    unique_id: str
    exten: str
    """With its technology: `SIP/100`."""
    answer_string: str | None = None
    """The string by which the handset, by make and model, answers by itself."""

    def __post_init__(self) -> None:
        if not _UNIQUE_ID.fullmatch(self.unique_id):
            raise InvalidRequest("uniqueId", "is no unique call id", "write it as heard: 1543022361.57")
        _with_technology("exten", self.exten)
        _optional("answerString", self.answer_string)


class NoojeeStartRecording(Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Start recording the call of an extension, or the call with this unique id."""

    exten_or_unique_id: str
    tag: str | None = None
    """Stored as the call record's External Reference."""
    agent_login_name: str | None = None
    """The Noojee Contact user who will own the leg; else the one at the extension; else nobody but the group
    Recording Manager sees it."""

    def __post_init__(self) -> None:
        _without_technology("extenOrUniqueId", self.exten_or_unique_id)
        _optional("tag", self.tag)
        _optional("agentLoginName", self.agent_login_name)


class NoojeeStopRecording(Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Stop recording."""

    exten_or_unique_id: str
    agent_login_name: str | None = None
    """Whose permission is checked."""

    def __post_init__(self) -> None:
        _without_technology("extenOrUniqueId", self.exten_or_unique_id)
        _optional("agentLoginName", self.agent_login_name)


# ── Click2Dial ────────────────────────────────────────────────────────────────────────────────────────


class Click2DialCall(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Create a call: the agent's phone is called first, then the callee."""

    agent: str
    """An extension of 3 or 4 digits, or a number in the forms of `callee` (from v2.2.1)."""
    callee: str
    """0820001234, 27820001234 or 0027820001234."""
    outbound_id: str
    """The number shown to the callee: 27820001234, 0820001234, `random`, or `tvc_` and a campaign's name."""
    reference: str | None = None
    """Comes back in the record of the call's end; None: the PBX makes one. Give each attempt its own."""
    before_v3: bool = False
    """The server is older than v3.0.0, and calls the reference call_ref."""

    def __post_init__(self) -> None:
        if not (_SHORT_EXTENSION.fullmatch(self.agent) or _CLICK2DIAL_NUMBER.fullmatch(self.agent)):
            raise InvalidRequest(
                "agent",
                f"{_shown(self.agent)} is neither an extension of 3 or 4 digits nor a number "
                f"({_why_no_number(self.agent)})",
                "write 101, 0820001234, 27820001234 or 0027820001234",
            )
        if not _CLICK2DIAL_NUMBER.fullmatch(self.callee):
            raise InvalidRequest(
                "callee",
                f"{_shown(self.callee)} is no number that Click2Dial takes ({_why_no_number(self.callee)})",
                "write 0820001234, 27820001234 or 0027820001234",
            )
        if not _OUTBOUND_ID.fullmatch(self.outbound_id):
            raise InvalidRequest(
                "outbound_id",
                f"{_shown(self.outbound_id)} is neither 11 digits from 27, nor 10 digits from 0, nor "
                "random, nor tvc_ with a campaign's name",
                "write 27820001234",
            )
        if self.reference is not None:
            self._check_reference(self.reference)

    def _check_reference(self, reference: str) -> None:
        if len(reference) > REFERENCE_CHARS_MAX:
            raise InvalidRequest(
                self.reference_field,
                f"has {len(reference)} characters, and is cut after {REFERENCE_CHARS_MAX}: "
                "its call could not be recognised",
                "shorten it",
            )
        if not _REFERENCE.fullmatch(reference):
            raise InvalidRequest(
                self.reference_field,
                f"{_shown(reference)} is not made of A-Z a-z 0-9 . - _ ~ only",
                "replace the others, or leave the reference out",
            )

    @property
    def reference_field(self) -> str:
        """What the server calls the reference."""
        return "call_ref" if self.before_v3 else "contact_ref"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is allowed and often goes wrong, each as a sentence with its cure."""
        found = []
        if len(self.outbound_id) == 10 and self.outbound_id.startswith("0"):
            found.append(
                f"outbound_id {self.outbound_id}: providers often reject 10 digits from 0; "
                f"write 27{self.outbound_id[1:]}"
            )
        elif self.outbound_id == "random":
            found.append("outbound_id random: needs a configuration of the PBX; else write 27820001234")
        if self.reference is not None and ":" in self.reference:
            found.append(
                f"{self.reference_field}: not every version's page allows a colon; write . - _ or ~ instead"
            )
        return tuple(found)


Request = (
    GwsDial
    | GwsPreviewDial
    | NoojeeDial
    | NoojeeHangup
    | NoojeeAnswer
    | NoojeeStartRecording
    | NoojeeStopRecording
    | Click2DialCall
)

# ── The HTTP requests ─────────────────────────────────────────────────────────────────────────────────


def build(request: Request) -> HttpRequest:
    """The HTTP request for it. Raises `InvalidRequest` for a GWS dial that still lacks its device."""
    match request:
        case GwsDial():
            return _gws_dial(request)
        case GwsPreviewDial():
            message = {
                "operationName": "Dial",
                "devicePath": request.device_path,
                "outboundRecord": request.outbound_record,
            }
            device = request.device_path and request.device_path.rpartition("/")[2]
            return _device_call(device, "devicePath", message)
        case NoojeeDial():
            return _noojee(
                "dial",
                ("autoAnswer", request.auto_answer),
                ("callerId", request.caller_id),
                ("phoneCaption", request.phone_caption),
                ("number", request.number),
                ("extenOrUniqueId", request.exten_or_unique_id),
                ("monitored", "yes" if request.monitored else None),
                ("record", "true" if request.record else None),
                ("tag", request.tag),
            )
        case NoojeeHangup():
            return _noojee("hangup", ("extenOrUniqueId", request.exten_or_unique_id))
        case NoojeeAnswer():
            return _noojee(
                "answer",
                ("uniqueId", request.unique_id),
                ("exten", request.exten),
                ("answerString", request.answer_string),
            )
        case NoojeeStartRecording():
            return _noojee(
                "start",
                ("extenOrUniqueId", request.exten_or_unique_id),
                ("tag", request.tag),
                ("agentLoginName", request.agent_login_name),
            )
        case NoojeeStopRecording():
            return _noojee(
                "stop",
                ("extenOrUniqueId", request.exten_or_unique_id),
                ("agentLoginName", request.agent_login_name),
            )
        case Click2DialCall():
            call = {"agent": request.agent, "callee": request.callee, "outbound_id": request.outbound_id}
            if request.reference is not None:
                call[request.reference_field] = request.reference
            return HttpRequest(CLICK2DIAL_PATH, body=msgspec.json.encode(call))
        case _:
            assert_never(request)


def _gws_dial(request: GwsDial) -> HttpRequest:
    message: JsonObject = {"operationName": "Dial", "destination": {"phoneNumber": request.number}}
    if request.location is not None:
        message["location"] = request.location
    if request.user_data is not None or request.reference is not None:
        known = {} if request.reference is None else {REFERENCE_KEY: request.reference}
        message["userData"] = {**(request.user_data or {}), **known}
    return _device_call(request.device, "device", message)


def _device_call(device: str | None, argument: str, message: JsonObject) -> HttpRequest:
    if device is None:
        raise InvalidRequest(argument, "is lacking", "name one of the account's devices")
    path = f"/api/v2/me/devices/{quote(device, safe='')}/calls"
    return HttpRequest(path, body=msgspec.json.encode(message))


def _noojee(operation: str, *parameters: tuple[str, str | None]) -> HttpRequest:
    """Arguments stand in the query of a POST whose body is empty ("you don't need to send any data")."""
    given = [(name, value) for name, value in parameters if value is not None]
    # The vendor's sample writes SIP/101, with its slash, and My+Brand.
    return HttpRequest(NOOJEE_PATH + operation, urlencode(given, safe="/"), FORM_TYPE)


# ── Rules ─────────────────────────────────────────────────────────────────────────────────────────────

_SHORT_EXTENSION = re.compile(r"[0-9]{3,4}")
_CLICK2DIAL_NUMBER = re.compile(r"0[0-9]{9}|27[0-9]{9}|00[0-9]{11,14}")
_OUTBOUND_ID = re.compile(r"random|0[0-9]{9}|27[0-9]{9}|tvc_[!-~]{1,230}")
_REFERENCE = re.compile(r"[A-Za-z0-9.\-_~:]+")
_UNIQUE_ID = re.compile(r"[0-9]+\.[0-9]+")
_EXTENSION_OR_ID = re.compile(r"[A-Za-z0-9_.-]+")
_TECHNOLOGY = re.compile(r"[A-Za-z][A-Za-z0-9]*/[A-Za-z0-9_.@-]+")
_WRITE_EXTENSION_OR_ID = "write 410, or the id that subscribe gives, such as 1543022361.57"
_SHOWN_CHARS_MAX = 40


def _text(name: str, value: str) -> None:
    """Something that can be read, on one line."""
    if not value.strip():
        raise InvalidRequest(name, "is empty", "give it a value, or leave it out")
    _optional(name, value)


def _optional(name: str, value: str | None) -> None:
    if value is None:
        return
    if len(value) > TEXT_CHARS_MAX:
        raise InvalidRequest(name, f"has {len(value)} characters", f"shorten it to {TEXT_CHARS_MAX}")
    if not value.isprintable():
        raise InvalidRequest(name, f"{_shown(value)} has control characters", "leave them out")


def _number(name: str, value: str) -> None:
    _text(name, value)
    if any(each.isspace() for each in value):
        raise InvalidRequest(name, f"{_shown(value)} has a blank", "write it without blanks")


def _segment(name: str, value: str) -> None:
    """A device's id: one segment of a path."""
    _text(name, value)
    if value in (".", "..") or any(each.isspace() or each in "/?#" for each in value):
        raise InvalidRequest(name, f"{_shown(value)} is no device's id", "write the id that GWS lists")


def _with_technology(name: str, value: str) -> None:
    _text(name, value)
    if not _TECHNOLOGY.fullmatch(value):
        raise InvalidRequest(
            name, f"{_shown(value)} is no extension with its technology", "write SIP/100 or PJSIP/100"
        )


def _without_technology(name: str, value: str) -> None:
    _text(name, value)
    if not _EXTENSION_OR_ID.fullmatch(value):
        raise InvalidRequest(
            name,
            f"{_shown(value)} is neither an extension (without technology) nor a unique call id",
            _WRITE_EXTENSION_OR_ID,
        )


def _why_no_number(value: str) -> str:
    """Which of Click2Dial's rules a number breaks."""
    if not (value.isascii() and value.isdecimal()):
        return "it has something other than digits"
    digits = len(value)
    if value.startswith("27"):
        return f"from 27 it must have 11 digits, and has {digits}"
    if value.startswith("00"):
        return f"from 00 it must have 13 to 16 digits, and has {digits}"
    if value.startswith("0"):
        return f"from 0 it must have 10 digits, and has {digits}"
    return "it begins with neither 0, 27 nor 00"


def _shown(value: str) -> str:
    """So much of a value as a message needs."""
    return repr(value if len(value) <= _SHOWN_CHARS_MAX else value[:_SHOWN_CHARS_MAX] + "…")


def _json_object(name: str, value: JsonObject) -> JsonObject:
    """A copy of its own, since what was checked must be what is sent. Raises for what JSON cannot say."""
    _json_value(name, value, NESTING_MAX)
    raw = msgspec.json.encode(value)
    if len(raw) > DATA_BYTES_MAX:
        raise InvalidRequest(
            name, f"has {len(raw)} bytes as JSON", f"leave out what the call does not need: {DATA_BYTES_MAX}"
        )
    copy: JsonObject = msgspec.json.decode(raw)
    return copy


def _json_value(name: str, value: Any, depth: int) -> None:
    if isinstance(value, dict | list) and depth == 0:
        raise InvalidRequest(name, f"is nested deeper than {NESTING_MAX} levels", "flatten it")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str) or not key:
                raise InvalidRequest(name, f"{_shown(str(key))} is no key", "keys are texts, and not empty")
            _storable(name, key)
            _json_value(name, item, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _json_value(name, item, depth - 1)
    elif isinstance(value, str):
        _storable(name, value)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidRequest(name, f"has {value}, which JSON cannot say", "give a number, or a text")
    elif isinstance(value, int):
        if not -INTEGER_MAX - 1 <= value <= INTEGER_MAX:
            raise InvalidRequest(name, "has a number of more than 64 bits", "give it as a text")
    elif value is not None:
        raise InvalidRequest(
            name, f"has a {type(value).__name__}", "give what JSON has: texts, numbers, lists and objects"
        )


def _storable(name: str, text: str) -> None:
    """What can be sent and written down: PostgreSQL holds no NUL."""
    if "\0" in text:
        raise InvalidRequest(name, "has a NUL", "leave it out")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(name, "has half a surrogate pair", "give whole characters") from None
