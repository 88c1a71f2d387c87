"""A dial's life: facts come in, each with its time, and exactly one outcome comes out.

A dial is an attempt to reach a number. We *placed* it, or we *overheard* it, because an agent's call began in
Dialing. Outside systems say how it went in a dozen spellings and often not at all; this module turns what
they said into one vocabulary, and keeps their own words beside it. It decides what ends a dial, what the
outcome is, which leg failed, whether that was said or is only our conclusion, and until when to wait.

The rules, numbered as in the taxonomy that they come from:

1. No acknowledgement ends a dial: it was accepted, not dialled.
2. The first specific cause wins; a later release that says nothing does not overwrite it.
3. Whether it was ever connected decides what such a release means.
4. Codes that vendors use differently are read by whether ringing was seen, and are marked `inferred`.
5. Every outcome carries its leg: busy is another matter when the agent's own phone is.
6. A code that nobody knows becomes `failed` or `unknown`, with the raw code kept; never an exception.
7. Every state has a deadline. Past it the outcome is `unknown`, and one late end may correct that, once.
8. What is transferred, unlinked or redirected has moved, not ended.
9. `retry` says what may be done next. Nothing here ever dials again: a repeat may dial twice.

When is a dial decided? At its end, because a machine is often recognised only after it was answered, and an
outcome never changes but for rule 7. But who watches a failure rate must not wait for conversations to end:
failures end within seconds and answered dials after minutes, so a rate of endings shows a failure storm every
morning. Therefore `Advance.connected` marks the moment of the answer: count failures as they end, against
failures plus connections.

An error that names no call is no end yet. Genesys says such errors of whatever was asked of a device, so one
that comes before the dial's call may be of something else. For `Deadlines.error_s` the dial is in doubt: its
call disproves the error, a refusal says more than it, and if neither comes it was the end.

It refuses to know sockets, tables and the clock, and it does not find out which call belongs to which dial
behind anybody's back: `match` says what speaks for it, and two equal candidates are `ambiguous`.
"""

import math
from collections.abc import Iterable
from datetime import datetime, timedelta
from enum import StrEnum
from typing import assert_never

from msgspec import Struct, structs

from listener.core.calls import Call, Direction, State

REFERENCE_KEY = "listener_dial"
"""The userData key under which a Genesys dial carries its reference, so that its call can be recognised."""

# ── Vocabulary ────────────────────────────────────────────────────────────────────────────────────────


class System(StrEnum):
    """Who dialled, or told us of it."""

    GWS = "gws"
    NOOJEE = "noojee"
    CLICK2DIAL = "click2dial"


class Origin(StrEnum):
    """Whether we asked for the dial, or only heard of it."""

    PLACED = "placed"
    OVERHEARD = "overheard"


class Outcome(StrEnum):
    """How a dial ended; every dial gets exactly one."""

    ANSWERED = "answered"
    MACHINE = "machine"
    BUSY = "busy"
    NO_ANSWER = "no_answer"
    REJECTED = "rejected"
    CANCELLED = "cancelled"
    INVALID_NUMBER = "invalid_number"
    UNREACHABLE = "unreachable"
    CONGESTION = "congestion"
    NOT_ALLOWED = "not_allowed"
    FAILED = "failed"
    UNKNOWN = "unknown"


SUCCESSES = frozenset({Outcome.ANSWERED, Outcome.MACHINE})
"""Somebody or something answered."""

FAILURES = frozenset(Outcome) - SUCCESSES - {Outcome.CANCELLED}
"""What counts against a line: a dial that was called off is neither."""


class Leg(StrEnum):
    """On which side it was decided: the agent's phone, the number called, or the systems between."""

    AGENT = "agent"
    CALLEE = "callee"
    SYSTEM = "system"


class EndedBy(StrEnum):
    """Who ended it, where that is known."""

    AGENT = "agent"
    CALLEE = "callee"
    SYSTEM = "system"
    UNKNOWN = "unknown"


class Confidence(StrEnum):
    """Whether a system said the outcome, or we concluded it."""

    STATED = "stated"
    INFERRED = "inferred"


class DialState(StrEnum):
    """How far a dial got; they only go forward, and any may be skipped."""

    REQUESTED = "requested"
    """Written down; whether the request arrived is not known."""
    ACCEPTED = "accepted"
    DIALING_AGENT = "dialing_agent"
    """The agent's own phone is being called, or was answered: that is no answer of the callee."""
    DIALING = "dialing"
    PROGRESS = "progress"
    """It reached the network; neither ringing nor an answer."""
    RINGING = "ringing"
    CONNECTED = "connected"
    ENDED = "ended"


class Retry(StrEnum):
    """What may be done next (rule 9)."""

    LATER = "later"
    NO = "no"
    POLICY = "policy"
    """The campaign decides."""
    REVIEW = "review"
    """A person looks first: the dial may have happened."""


class Cause(Struct, frozen=True, gc=False):
    """What a system said, in its own words: kept for ever, also when nobody knows the code.

    `field` names the list that the code is from: one of `FIELDS`, or any other, which is then unknown.
    """

    system: System
    field: str
    code: str = ""
    """A number or word as text; empty where none was sent."""
    text: str = ""

    def __str__(self) -> str:
        """As `field code`, to group and to show."""
        return f"{self.field} {self.code}".strip()


class Dial(Struct, frozen=True, gc=False):
    """An attempt to reach a number, as of the last fact. Make it with `placed` or `overheard`."""

    id: str
    """Placed: given by whoever places it, before it is sent. Overheard: `call-` and the call's id."""
    account: int
    system: System
    origin: Origin
    number: str
    """As asked for, or as heard; empty if no message named it."""
    requested_at: datetime
    state: DialState = DialState.REQUESTED
    reached: DialState = DialState.REQUESTED
    """The state that it got to: `state`, or the last one before its end."""
    device: str | None = None
    """The device or extension that dials, as sent."""
    reference: str | None = None
    """What we sent along to recognise the call by: contact_ref, or the value of `REFERENCE_KEY`."""
    caller_id: str | None = None
    """The number shown to the callee, where we chose it."""
    campaign: str | None = None
    session: str | None = None
    """What the acknowledgement calls it (Noojee's SessionID). It matches nothing that is heard later."""
    accepted_at: datetime | None = None
    ringing_at: datetime | None = None
    connected_at: datetime | None = None
    hangup_at: datetime | None = None
    """When we asked for it to be hung up."""
    ended_at: datetime | None = None
    deadline_at: datetime | None = None
    """Give `Elapsed` no earlier than this; None once it ended."""
    outcome: Outcome | None = None
    leg: Leg | None = None
    ended_by: EndedBy | None = None
    cause: Cause | None = None
    """The raw cause; before the end, the best one so far."""
    cause_leg: Leg | None = None
    """The leg that came with the cause, where the message said which."""
    confidence: Confidence | None = None
    expired: bool = False
    """Its deadline ended it; no end was heard."""
    corrected: bool = False
    """A late end replaced `unknown`."""
    call: int | None = None
    """The id of the call that it is."""
    matched_by: tuple["Evidence", ...] = ()
    match_confidence: "MatchConfidence | None" = None

    @property
    def time_to_ring_s(self) -> float | None:
        """Seconds from the request to ringing; None if ringing was not seen."""
        return _seconds(self.requested_at, self.ringing_at)

    @property
    def time_to_answer_s(self) -> float | None:
        """Seconds from the request to the answer; None if none was seen. Known before the end."""
        return _seconds(self.requested_at, self.connected_at)

    @property
    def retry(self) -> Retry | None:
        """What may be done next; None while it goes on."""
        if self.outcome is None:
            return None
        if self.expired and self.outcome is Outcome.UNKNOWN:
            return Retry.NO
        return RETRY[self.outcome]


RETRY: dict[Outcome, Retry] = {
    Outcome.ANSWERED: Retry.POLICY,
    Outcome.MACHINE: Retry.POLICY,
    Outcome.CANCELLED: Retry.POLICY,
    Outcome.BUSY: Retry.LATER,
    Outcome.NO_ANSWER: Retry.LATER,
    Outcome.CONGESTION: Retry.LATER,
    Outcome.UNREACHABLE: Retry.LATER,
    Outcome.INVALID_NUMBER: Retry.NO,
    Outcome.REJECTED: Retry.NO,
    Outcome.NOT_ALLOWED: Retry.NO,
    Outcome.FAILED: Retry.REVIEW,
    Outcome.UNKNOWN: Retry.REVIEW,
}
"""Rule 9. An unknown that only its deadline ended is `no` (rule 7)."""


class Deadlines(Struct, frozen=True, gc=False):
    """How long each state may last without news, in seconds, and a whole dial from its request on."""

    requested_s: float = 60.0
    """For the answer to the request, and for a call that shows that it arrived although no answer came."""
    accepted_s: float = 60.0
    error_s: float = 5.0
    """For the call that disproves an error which named none. Longer, and failures are told late; shorter, and
    a slow switch makes a failure of a dial whose call begins."""
    silent_s: float = 3_600.0
    """As `accepted_s` for Click2Dial, which is silent from then until its record at the end of the call."""
    dialing_agent_s: float = 90.0
    dialing_s: float = 180.0
    """Also for progress and ringing: longer than the ring timeouts of switches and carriers."""
    dial_s: float = 14_400.0
    """The whole dial with its conversation. When it is over and it was connected, it was answered."""


DEADLINES = Deadlines()

# ── Facts ─────────────────────────────────────────────────────────────────────────────────────────────


class Accepted(Struct, frozen=True, gc=False, tag=True):
    """The request was acknowledged: GWS statusCode 0, Noojee Code >= 0, Click2Dial 2xx. Ends nothing."""

    session: str | None = None


class Refused(Struct, frozen=True, gc=False, tag=True):
    """The request was refused. The cause's field is `http` (status), `statusCode`, `Code`, `login` (wrong
    credentials, whatever the status) or `validation` (never sent; the code names the wrong argument)."""

    cause: Cause


class NotAnswered(Struct, frozen=True, gc=False, tag=True):
    """The request got no usable answer. `sent` is false only if it is certain that nothing was sent (no
    connection): then it failed. Else it may have been dialled, and we wait until the deadline."""

    sent: bool
    system: System
    text: str = ""


class CallHeard(Struct, frozen=True, gc=False, tag=True):
    """The dial's call, as it is after a message; `cause` if the same message carried one."""

    call: Call
    cause: Cause | None = None


class Reported(Struct, frozen=True, gc=False, tag=True):
    """A cause that came by itself: an error message on the devices channel (field `ErrorMessage`, no code),
    EventError (`ErrorCode`), a CallState, an event. `leg` where the message says which. An error before the
    call ends the dial only after `Deadlines.error_s`."""

    cause: Cause
    leg: Leg | None = None


class NoojeeStatus(Struct, frozen=True, gc=False, tag=True):
    """One event of Noojee's subscribe about the dial's call; `status` in Noojee's words."""

    status: str
    inbound: bool = False
    """The event is about a call *to* the extension: the agent's own leg."""


class CallRecord(Struct, frozen=True, gc=False, tag=True):
    """Click2Dial's record at the end of a call."""

    end_reason: str
    end_code: str = ""
    call_time_s: float | None = None
    """Seconds of talk; None if it was not sent or is no number."""


class HangupRequested(Struct, frozen=True, gc=False, tag=True):
    """We asked for the dial to be hung up, at the moment of the fact, and the PBX took it."""


class Elapsed(Struct, frozen=True, gc=False, tag=True):
    """Time has passed; it matters if the deadline is over."""


Fact = (
    Accepted
    | Refused
    | NotAnswered
    | CallHeard
    | Reported
    | NoojeeStatus
    | CallRecord
    | HangupRequested
    | Elapsed
)


class Advance(Struct, frozen=True, gc=False):
    """What one fact did to a dial. Store `dial` if it `changed`; count by the other flags."""

    dial: Dial
    changed: bool = False
    ringing: bool = False
    """Ringing was seen for the first time: observe `time_to_ring_s`."""
    connected: bool = False
    """The answer was seen for the first time: observe `time_to_answer_s`, and count it in failure rates."""
    ended: bool = False
    """It got its outcome: true exactly once in a dial's life."""
    corrected: bool = False
    """A late end replaced `unknown`: true at most once. Not counted as an end again."""


# ── Matching ──────────────────────────────────────────────────────────────────────────────────────────


class Evidence(StrEnum):
    """What speaks for a call being a dial's."""

    REFERENCE = "reference"
    NUMBER = "number"
    DEVICE = "device"
    TIME = "time"
    OVERHEARD = "overheard"
    """The dial was made from this very call."""


class MatchConfidence(StrEnum):
    """How sure a match is."""

    CERTAIN = "certain"
    """By a reference that only one waiting dial has, or the dial was overheard."""
    STRONG = "strong"
    """By number and device, in time."""
    WEAK = "weak"
    """By number alone, in time."""
    AMBIGUOUS = "ambiguous"
    """Several dials with equal evidence: none is chosen."""
    NONE = "none"


CALL_WINDOW_S = 60.0
"""How long after its request a dial's call may begin, without a reference that says more."""


class Sighting(Struct, frozen=True, gc=False):
    """What a heard call, or a record of one, shows to be recognised by; `sighting` makes it from a `Call`."""

    system: System
    at: datetime
    """When it was first heard."""
    account: int | None = None
    """None: not known, or not one of ours."""
    number: str | None = None
    also: tuple[str, ...] = ()
    """Other numbers that it has for the callee, such as the one that was dialled: any of them may agree."""
    device: str | None = None
    """The id of the device or extension, as a dial has it."""
    reference: str | None = None
    window_s: float = CALL_WINDOW_S
    """How long after the request it may have been heard; for a record of its end, `Deadlines.dial_s`."""


class Match(Struct, frozen=True, gc=False):
    """Which dial a sighting belongs to, and what says so. `dial` is None when none does, or when several do
    equally: those are the `candidates`, also the only one when there is one."""

    dial: Dial | None
    evidence: tuple[Evidence, ...]
    confidence: MatchConfidence
    candidates: tuple[Dial, ...] = ()


# ── What the codes mean ───────────────────────────────────────────────────────────────────────────────


class Says(StrEnum):
    """What kind of thing a code says."""

    OUTCOME = "outcome"
    """It names how the dial ended, or will have."""
    RELEASE = "release"
    """It is over, without saying how: whether it was connected decides (rule 3)."""
    MOVED = "moved"
    """It goes on elsewhere (rule 8)."""
    PROGRESS = "progress"
    """It got on; no end."""
    NOTHING = "nothing"
    """No code, or one that the list does not explain."""


class Meaning(Struct, frozen=True, gc=False):
    """One row of the cause tables."""

    says: Says
    outcome: Outcome = Outcome.UNKNOWN
    """For a release: if it was never connected."""
    leg: Leg | None = None
    """Where the list says which; else it follows from the state and the outcome."""
    confidence: Confidence = Confidence.STATED
    silent: Outcome | None = None
    """The outcome instead, if no ringing was seen (rule 4)."""


def _all(
    outcome: Outcome, *codes: int | str, leg: Leg | None = None, weak: bool = False
) -> dict[str, Meaning]:
    confidence = Confidence.INFERRED if weak else Confidence.STATED
    return {str(code): Meaning(Says.OUTCOME, outcome, leg, confidence) for code in codes}


def _ambiguous(code: int | str, outcome: Outcome, silent: Outcome | None = None) -> dict[str, Meaning]:
    return {str(code): Meaning(Says.OUTCOME, outcome, None, Confidence.INFERRED, silent)}


def _neutral(says: Says, *codes: int | str, outcome: Outcome = Outcome.UNKNOWN) -> dict[str, Meaning]:
    return {str(code): Meaning(says, outcome) for code in codes}


CALL_STATES = {
    **_neutral(Says.RELEASE, 0, 5, 19, 26),  # Ok, RemoteRelease, Cleared, Dropped
    **_neutral(Says.MOVED, 1, 2, 22, 23, 25),  # Transferred, Conferenced, Redirected, Forwarded, Pickedup
    **_all(Outcome.FAILED, 3, 4),  # GeneralError, SystemError
    **_all(Outcome.BUSY, 6),
    **_all(Outcome.NO_ANSWER, 7, 27),  # NoAnswer, Droppednoanswer
    **_all(Outcome.UNREACHABLE, 8, 14),  # SitDetected, SitUnknown
    **_all(Outcome.MACHINE, 9, 17),  # AnsweringMachineDetected, FaxDetected
    **_all(Outcome.CONGESTION, 10, 15, 16, 18, 20),  # AllTrunksBusy, SitNocircuit, SitReorder, QueueFull, …
    **_all(Outcome.INVALID_NUMBER, 11, 12, 13),  # SitInvalidnum, SitVacant, SitIntercept
    **_all(Outcome.CANCELLED, 21),  # Abandoned
    # Consult, Unknown, Covered, ConverseOn, Bridged, Deafened, Held: known, and no outcome.
    **_neutral(Says.NOTHING, 24, 28, 29, 30, 31, 49, 50),
}
"""Genesys TCallState."""

OCS_RESULTS = {
    **CALL_STATES,
    # Silence, Answer, NU Tone, No Dial Tone, No Progress, No RingBack, No Established Detected, Pager, Wrong
    # Party, Dial Error, Call Drop Error, Switch Error, No Port Available, Transfer Error, Stale, two callback
    # errors, Cancel Record, Wrong Number: the taxonomy gives them no outcome, and nor do we.
    **_neutral(Says.NOTHING, *range(32, 49), 52, 53),
    **_all(Outcome.NOT_ALLOWED, 51),  # Do Not Call
}
"""Genesys Outbound Contact Server's call results: TCallState and more."""

ERROR_CODES = {
    **_all(Outcome.MACHINE, 519, 567, 655),
    **_all(Outcome.BUSY, 91, 231, 510, 615),
    **_all(Outcome.BUSY, 79, 83, leg=Leg.AGENT),  # origination busy
    **_all(Outcome.NO_ANSWER, 232, 512, 643),
    **_all(Outcome.REJECTED, 233, 633),
    **_all(Outcome.CANCELLED, 237, weak=True),  # it only says that the call was disconnected
    **_all(Outcome.INVALID_NUMBER, 71, 72, 415, 600, 632, 634, 1145, 1153),
    **_all(Outcome.INVALID_NUMBER, 61, 70, 1144, leg=Leg.AGENT),  # the calling DN
    **_all(Outcome.UNREACHABLE, 58, 59, 93, 1173),
    **_all(Outcome.CONGESTION, 452, 511, 626, 629, 636, 637, 644, 647, 1171, 1172, 1174, 1175, 1182),
    **_all(Outcome.NOT_ALLOWED, 94, 458, 617, 649, 1148, 1149),
    **_all(Outcome.FAILED, *range(50, 58), 234, 1141, 1161),
    **_all(Outcome.FAILED, 40, 41, 42, 450, 518, weak=True),  # explained, and in no row: as any unlisted one
}
"""Genesys EventError's ErrorCode: T-Library, Rockwell, Avaya ASAI (600 + n), CSTA (1100 + n)."""

EVENTS = {
    **_all(Outcome.BUSY, "EventDestinationBusy", 63),
    **_neutral(Says.PROGRESS, "EventNetworkReached", 62),
}
"""Genesys T-Library events that are no states of a call."""

Q850 = {
    **_neutral(Says.RELEASE, 16, outcome=Outcome.CANCELLED),
    **_neutral(Says.NOTHING, 0, 31),
    **_all(Outcome.BUSY, 17),
    **_all(Outcome.NO_ANSWER, 18, 19),
    **_all(Outcome.REJECTED, 21),
    **_all(Outcome.INVALID_NUMBER, 1, 22, 28),
    **_all(Outcome.UNREACHABLE, 3, 20, 27),
    **_all(Outcome.CONGESTION, 34, 38, 41, 42, 44, 47),
    **_all(Outcome.NOT_ALLOWED, 52, 54, 55, 57),
    **_all(Outcome.FAILED, *range(95, 102), *range(103, 112), 127),
    **_ambiguous(102, Outcome.NO_ANSWER, silent=Outcome.FAILED),
}
"""ITU-T Q.850 causes."""

SIP = {
    **_neutral(Says.RELEASE, 200),
    **_ambiguous(486, Outcome.BUSY),
    **_all(Outcome.BUSY, 600),
    **_ambiguous(408, Outcome.NO_ANSWER),
    **_ambiguous(480, Outcome.NO_ANSWER, silent=Outcome.UNREACHABLE),
    **_ambiguous(603, Outcome.REJECTED),
    **_all(Outcome.REJECTED, 401, 407),
    **_ambiguous(403, Outcome.REJECTED, silent=Outcome.NOT_ALLOWED),  # the far end's, or our own side's
    **_all(Outcome.CANCELLED, 487),
    **_all(Outcome.INVALID_NUMBER, 404, 410, 484, 485, 604),
    **_all(Outcome.UNREACHABLE, 420, 502),
    **_all(Outcome.CONGESTION, 500, 503, 504),
    **_all(Outcome.FAILED, 488, 606),
}
"""Final SIP responses (RFC 3261); other 4xx, 5xx and 6xx are `failed`."""

DIALSTATUS = {
    **_all(Outcome.ANSWERED, "ANSWER"),
    **_all(Outcome.BUSY, "BUSY"),
    **_all(Outcome.NO_ANSWER, "NOANSWER"),
    **_all(Outcome.REJECTED, "DONTCALL", "TORTURE"),
    **_all(Outcome.CANCELLED, "CANCEL"),
    **_all(Outcome.UNREACHABLE, "CHANUNAVAIL"),
    **_all(Outcome.CONGESTION, "CONGESTION"),
    **_all(Outcome.FAILED, "INVALIDARGS"),
}
"""Asterisk's DIALSTATUS: of the second leg."""

AMI_REASONS = {
    **_neutral(Says.PROGRESS, 4),  # the agent answered; the callee has not
    **_all(Outcome.FAILED, 0, leg=Leg.AGENT),
    **_all(Outcome.CANCELLED, 1, leg=Leg.AGENT),
    **_all(Outcome.NO_ANSWER, 3, leg=Leg.AGENT),
    **_all(Outcome.BUSY, 5, leg=Leg.AGENT),
    **_all(Outcome.CONGESTION, 8, leg=Leg.AGENT),
}
"""Asterisk AMI OriginateResponse's Reason: the last control frame, of the first leg."""

FREESWITCH = {
    **_neutral(Says.RELEASE, "SUCCESS", "NORMAL_CLEARING"),
    **_neutral(Says.NOTHING, "UNSPECIFIED", "NORMAL_UNSPECIFIED"),
    **_all(Outcome.BUSY, "USER_BUSY"),
    **_all(Outcome.NO_ANSWER, "NO_ANSWER", "NO_USER_RESPONSE", "ALLOTTED_TIMEOUT"),
    **_all(Outcome.REJECTED, "CALL_REJECTED"),
    **_all(Outcome.CANCELLED, "ORIGINATOR_CANCEL"),
    **_all(Outcome.INVALID_NUMBER, "UNALLOCATED_NUMBER", "NUMBER_CHANGED", "INVALID_NUMBER_FORMAT"),
    **_all(Outcome.UNREACHABLE, "NO_ROUTE_DESTINATION", "SUBSCRIBER_ABSENT"),
    **_all(Outcome.UNREACHABLE, "DESTINATION_OUT_OF_ORDER", "USER_NOT_REGISTERED"),
    **_all(Outcome.CONGESTION, "NORMAL_CIRCUIT_CONGESTION", "SWITCH_CONGESTION", "NETWORK_OUT_OF_ORDER"),
    **_all(Outcome.CONGESTION, "NORMAL_TEMPORARY_FAILURE"),
    **_all(Outcome.NOT_ALLOWED, "OUTGOING_CALL_BARRED", "INCOMING_CALL_BARRED"),
    **_all(Outcome.FAILED, "RECOVERY_ON_TIMER_EXPIRE", "INTERWORKING", "PROTOCOL_ERROR"),
    **_all(Outcome.FAILED, "INCOMPATIBLE_DESTINATION"),
}
"""FreeSWITCH hangup causes."""

TWILIO = {
    **_neutral(Says.PROGRESS, "queued", "initiated", "ringing", "in-progress"),
    **_all(Outcome.ANSWERED, "completed"),
    **_all(Outcome.BUSY, "busy"),
    **_all(Outcome.NO_ANSWER, "no-answer"),
    **_all(Outcome.CANCELLED, "canceled"),
    **_all(Outcome.FAILED, "failed"),
}
"""Twilio call statuses."""

CAMARA = {
    **_neutral(Says.RELEASE, "hangUp"),
    **_neutral(Says.NOTHING, "other"),
    **_all(Outcome.BUSY, "callerBusy", leg=Leg.AGENT),
    **_all(Outcome.BUSY, "calleeBusy", leg=Leg.CALLEE),
    **_all(Outcome.NO_ANSWER, "callerNoAnswer", leg=Leg.AGENT),
    **_all(Outcome.NO_ANSWER, "calleeNoAnswer", leg=Leg.CALLEE),
    **_all(Outcome.CANCELLED, "callerAbandon", leg=Leg.AGENT),
    **_all(Outcome.UNREACHABLE, "calleeFailure", "CALLEE_NOT_AVAILABLE", leg=Leg.CALLEE),
    **_all(Outcome.INVALID_NUMBER, "INVALID_PHONE_NUMBER", leg=Leg.CALLEE),
    **_all(Outcome.FAILED, "callerFailure", leg=Leg.AGENT),
    **_all(Outcome.FAILED, "failed"),
    **_all(Outcome.NOT_ALLOWED, 401, 403),
}
"""CAMARA ClickToDial reasons and error codes."""

NOOJEE_STATUSES = {
    **_neutral(Says.PROGRESS, "Ringing", "Dialing Out", "Connected"),
    **_neutral(Says.MOVED, "Unlinked"),
    **_neutral(Says.RELEASE, "Hungup"),
    # Said of a call to the extension only: in a dial, that is the agent's own leg.
    **_all(Outcome.BUSY, "Busy", leg=Leg.AGENT),
    **_all(Outcome.NO_ANSWER, "No Answer", leg=Leg.AGENT),
}
"""Noojee's event status strings."""

END_REASONS = {
    **_neutral(Says.RELEASE, "hungup", "callee_hungup", "agent_hungup"),  # the call time decides
    **_all(Outcome.MACHINE, "voicemail"),
    **_all(Outcome.BUSY, "busy"),
    **_all(Outcome.REJECTED, "reject"),
    **_all(Outcome.REJECTED, "reject 21"),
    **_all(Outcome.NO_ANSWER, "reject 19"),  # Q.850: no answer although alerted
    **_all(Outcome.INVALID_NUMBER, "reject 22"),  # Q.850: number changed
    **_all(Outcome.NO_ANSWER, "timeout"),
    **_ambiguous("timeout 102", Outcome.NO_ANSWER, silent=Outcome.FAILED),
    **_all(Outcome.INVALID_NUMBER, "error 28"),
    **_all(Outcome.CONGESTION, "error 34", "error 42"),
    **_all(Outcome.FAILED, "error"),
    **_all(Outcome.FAILED, "failed"),
}
"""Teleforge's end_reason, with its end_code where that decides; another code of an `error` is read by
Q.850."""

STATUS_CODES = {
    # 0 is an acknowledgement; partial success and incomplete processing are no refusals: it may still dial.
    **_neutral(Says.PROGRESS, 0, 7, 9),
    **_all(Outcome.NOT_ALLOWED, 3, 5, 20),  # forbidden, no permission, not authenticated
}
"""GWS statusCode of a reply; others are `failed`."""

_VALIDATION = {
    **_all(Outcome.INVALID_NUMBER, "number", "callee", "phoneNumber", leg=Leg.CALLEE),
    **_all(Outcome.INVALID_NUMBER, "agent", "extension", "extenOrUniqueId", "device", leg=Leg.AGENT),
}

FIELDS: dict[str, dict[str, Meaning]] = {
    "CallState": CALL_STATES,
    "CallResult": OCS_RESULTS,
    "ErrorCode": ERROR_CODES,
    "event": EVENTS,
    "q850": Q850,
    "sip": SIP,
    "DIALSTATUS": DIALSTATUS,
    "Reason": AMI_REASONS,
    "freeswitch": FREESWITCH,
    "twilio": TWILIO,
    "camara": CAMARA,
    "status": NOOJEE_STATUSES,
    "end_reason": END_REASONS,
    "statusCode": STATUS_CODES,
    "Code": {},
    "http": _all(Outcome.NOT_ALLOWED, 401, 403, 407),
    "login": {},
    "validation": _VALIDATION,
    "request": _neutral(Says.NOTHING, "unanswered"),
    "ErrorMessage": {},
}
"""Every list of codes by the `field` of a `Cause`."""

_NOTHING = Meaning(Says.NOTHING, Outcome.UNKNOWN, None, Confidence.INFERRED)
_UNLISTED = Meaning(Says.NOTHING, Outcome.FAILED, None, Confidence.INFERRED)
_FAILED = Meaning(Says.OUTCOME, Outcome.FAILED, Leg.SYSTEM)
_REFUSED = Meaning(Says.OUTCOME, Outcome.NOT_ALLOWED, Leg.SYSTEM)
_PROGRESS = Meaning(Says.PROGRESS)


def meaning(cause: Cause) -> Meaning:
    """What a raw cause means; total. A code that its list does not explain is `failed` where the list is one
    of errors, and else `unknown` (rule 6)."""
    code = cause.code.strip()
    known = FIELDS.get(cause.field, {}).get(code)
    if known is not None:
        return known
    match cause.field:
        case "ErrorCode" | "ErrorMessage":
            return _UNLISTED
        case "sip" | "http":
            # Success and what is provisional refuses nothing; a redirect does (Noojee: HTTP >= 300).
            if len(code) == 3 and code.isascii() and code.isdecimal() and code[0] in "12":
                return _PROGRESS
            return _FAILED
        case "Code":
            number = _integer(code)
            if number is not None and number >= 0:
                return _PROGRESS
            # The only negative code that Noojee documents.
            return _REFUSED if "expired timestamp" in cause.text.lower() else _FAILED
        case "login":
            return _REFUSED
        case "validation" | "request" | "statusCode":
            # Seen at GWS: "Device '5001' is not registered.", as an internal error.
            agent = cause.field == "statusCode" and "not registered" in cause.text
            return structs.replace(_FAILED, leg=Leg.AGENT) if agent else _FAILED
        case "end_reason":
            return _record_meaning(code)
        case _:
            return _NOTHING


def _record_meaning(code: str) -> Meaning:
    """A record's `end_reason end_code` that has no row of its own: by the reason, or the code."""
    reason, _, number = code.rpartition(" ")
    row = END_REASONS.get(reason or code)
    if row is not None and reason != "error":
        return row
    by_code = Q850.get(number)
    if by_code is not None and by_code.says is Says.OUTCOME:
        return structs.replace(by_code, confidence=Confidence.INFERRED)
    return row if row is not None else _NOTHING


def _integer(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


# ── A dial's life ─────────────────────────────────────────────────────────────────────────────────────


def placed(
    id: str,
    account: int,
    system: System,
    number: str,
    at: datetime,
    *,
    device: str | None = None,
    reference: str | None = None,
    caller_id: str | None = None,
    campaign: str | None = None,
    deadlines: Deadlines = DEADLINES,
) -> Dial:
    """A dial that we are about to ask for: store it, and only then send the request."""
    return Dial(
        id=id,
        account=account,
        system=system,
        origin=Origin.PLACED,
        number=number,
        requested_at=at,
        device=device,
        reference=reference,
        caller_id=caller_id,
        campaign=campaign,
        deadline_at=at + timedelta(seconds=min(deadlines.requested_s, deadlines.dial_s)),
    )


def overheard(call: Call, system: System = System.GWS, deadlines: Deadlines = DEADLINES) -> Dial | None:
    """The dial that a call is, which nobody asked us for; None for a call that did not begin in Dialing.

    Give the same call, and each of its later steps, to `advance` as `CallHeard`: also the first, which may be
    its end already. Ask `match` first whether it is one that we placed.
    """
    if call.direction is not Direction.OUTBOUND:
        return None
    dial = Dial(
        id=f"call-{call.id}",
        account=call.account,
        system=system,
        origin=Origin.OVERHEARD,
        number=call.number or call.dnis or "",
        requested_at=call.opened_at,
        device=call.device_id or call.phone_number,
        call=call.id,
        matched_by=(Evidence.OVERHEARD,),
        match_confidence=MatchConfidence.CERTAIN,
    )
    return _reach(dial, DialState.DIALING, call.opened_at, deadlines)


def linked(dial: Dial, found: Match, call: int | None) -> Dial:
    """The dial with what `match` found: its call if one dial was found, and else only what was lacking. A
    dial that has its call keeps it."""
    if dial.call is not None:
        return dial
    return structs.replace(
        dial,
        call=call if found.dial is not None else None,
        matched_by=found.evidence,
        match_confidence=found.confidence,
    )


_ORDER = {state: place for place, state in enumerate(DialState)}
_DECIDED_BEFORE_DIALLING = frozenset({DialState.REQUESTED, DialState.ACCEPTED, DialState.DIALING_AGENT})
"""In these states a cause is the end: nothing was dialled whose end could still be heard."""

_UNPROVED = frozenset({DialState.REQUESTED, DialState.ACCEPTED})
"""In these states nothing was seen of the dial's call."""

_NAMELESS = frozenset({"ErrorMessage", "ErrorCode"})
"""The fields of causes whose messages name neither a call nor a request."""


def advance(dial: Dial, fact: Fact, at: datetime, deadlines: Deadlines = DEADLINES) -> Advance:
    """What a fact about this dial, heard at `at`, makes of it; total.

    Facts about calls come after `match` or `overheard`; one about another call than the dial's is ignored.
    The same fact again changes nothing. What has an outcome keeps it, unless that is `unknown` and this is
    the late end that tells (rule 7). Until it ended, call this with `Elapsed` at `dial.deadline_at`.
    """
    if dial.outcome is not None and (dial.outcome is not Outcome.UNKNOWN or dial.corrected):
        return Advance(dial)
    after, over = _take(dial, fact, at, deadlines)
    if dial.outcome is None:
        if over:
            after = _concluded(after, fact, at)
    elif over:
        after = _late(dial, _concluded(after, fact, at))
    elif not dial.expired:
        after = dial  # its end was heard: what led to it comes too late
    if after == dial:
        return Advance(dial)
    succeeded = after.outcome in SUCCESSES and dial.outcome is not after.outcome
    return Advance(
        after,
        changed=True,
        ringing=after.ringing_at is not None and dial.ringing_at is None,
        connected=dial.connected_at is None and (after.connected_at is not None or succeeded),
        ended=dial.outcome is None and after.outcome is not None,
        corrected=after.corrected,
    )


def _late(dial: Dial, after: Dial) -> Dial:
    """A dial whose outcome is unknown, after its end was heard late; it keeps the time of its first end."""
    if after.outcome is not Outcome.UNKNOWN:
        return structs.replace(after, ended_at=dial.ended_at, corrected=True)
    if dial.expired:
        return structs.replace(after, ended_at=dial.ended_at)
    return dial


def _take(dial: Dial, fact: Fact, at: datetime, deadlines: Deadlines) -> tuple[Dial, bool]:
    """The dial with what a fact tells, and whether it is over with it."""
    match fact:
        case Accepted():
            if dial.accepted_at is not None:
                return dial, False
            known = structs.replace(dial, accepted_at=at, session=fact.session)
            return _reach(known, DialState.ACCEPTED, at, deadlines), False
        case Refused() | NotAnswered():
            return _not_accepted(dial, fact)
        case CallHeard():
            return _call_heard(dial, fact, at, deadlines)
        case Reported():
            return _reported(dial, fact, at, deadlines)
        case NoojeeStatus():
            return _noojee(dial, fact, at, deadlines)
        case CallRecord():
            code = f"{fact.end_reason.strip()} {fact.end_code.strip()}".strip()
            return _noted(dial, Cause(System.CLICK2DIAL, "end_reason", code)), True
        case HangupRequested():
            # The end may be heard before the PBX's answer to our hang-up, which is then why it ended.
            explains = dial.ended_at is not None and not dial.expired and at <= dial.ended_at
            return (structs.replace(dial, hangup_at=at) if dial.hangup_at is None else dial), explains
        case Elapsed():
            return dial, dial.deadline_at is not None and at >= dial.deadline_at
        case _:
            assert_never(fact)


def _not_accepted(dial: Dial, fact: Refused | NotAnswered) -> tuple[Dial, bool]:
    if isinstance(fact, NotAnswered):
        if dial.call is not None or dial.reached is not DialState.REQUESTED:
            return dial, False
        code = "unanswered" if fact.sent else "not sent"
        if not fact.sent:
            dial = _undoubted(dial)
        return _noted(dial, Cause(fact.system, "request", code, fact.text)), not fact.sent
    # A call that was heard disproves the refusal (a slow or broken reply).
    refused = dial.call is None and dial.reached in _DECIDED_BEFORE_DIALLING
    if not refused or meaning(fact.cause).says is Says.PROGRESS:
        return dial, False
    return _noted(dial, fact.cause), True


def _call_heard(dial: Dial, fact: CallHeard, at: datetime, deadlines: Deadlines) -> tuple[Dial, bool]:
    call = fact.call
    if dial.call is not None and dial.call != call.id:
        return dial, False
    dial = structs.replace(_undoubted(dial), call=call.id)
    if fact.cause is not None:
        dial = _noted(dial, fact.cause)
    if call.direction is Direction.INBOUND:
        # The agent's own phone is rung first: that it is answered is no answer of the callee (rule 5).
        dial = _reach(dial, DialState.DIALING_AGENT, at, deadlines)
    else:
        dial = _reach(dial, DialState.DIALING, at, deadlines)
        if call.state == State.RINGING:
            dial = _reach(dial, DialState.RINGING, at, deadlines)
        if call.established_at is not None:
            dial = _reach(dial, DialState.CONNECTED, call.established_at, deadlines)
    over = not call.open
    if over and dial.connected_at is None and dial.cause is not None:
        over = meaning(dial.cause).says is not Says.MOVED  # rule 8
    return dial, over


def _reported(dial: Dial, fact: Reported, at: datetime, deadlines: Deadlines) -> tuple[Dial, bool]:
    found = meaning(fact.cause)
    if found.says is Says.PROGRESS:
        if fact.cause.field != "event":
            return dial, False
        return _reach(_undoubted(dial), DialState.PROGRESS, at, deadlines), False
    after = _noted(dial, fact.cause, fact.leg)
    tells = found.outcome is not Outcome.UNKNOWN and found.says in (Says.OUTCOME, Says.NOTHING)
    if dial.outcome is not None:
        return after, tells
    if _in_doubt(after):
        last = at + timedelta(seconds=deadlines.error_s)
        sooner = last if dial.deadline_at is None else min(last, dial.deadline_at)
        return structs.replace(after, deadline_at=sooner), False
    return after, tells and dial.call is None and dial.reached in _DECIDED_BEFORE_DIALLING


def _in_doubt(dial: Dial) -> bool:
    """Whether an error was blamed on it that its call would disprove."""
    return dial.reached in _UNPROVED and dial.cause is not None and dial.cause.field in _NAMELESS


def _undoubted(dial: Dial) -> Dial:
    """The dial once its call was seen, or nothing of it was sent: an error before was of something else."""
    return structs.replace(dial, cause=None, cause_leg=None) if _in_doubt(dial) else dial


def _noojee(dial: Dial, fact: NoojeeStatus, at: datetime, deadlines: Deadlines) -> tuple[Dial, bool]:
    status = fact.status.strip()
    dialled = dial.reached not in _DECIDED_BEFORE_DIALLING
    cause = Cause(System.NOOJEE, "status", status)
    match status:
        case "Dialing Out":
            return _reach(dial, DialState.DIALING, at, deadlines), False
        case "Ringing":
            # "Inbound ringing this extension": the agent's own phone, whatever else goes on.
            return _reach(dial, DialState.DIALING_AGENT, at, deadlines), False
        case "Connected":
            state = DialState.DIALING_AGENT if fact.inbound else DialState.CONNECTED
            # After the deadline this is as good as the end, which may never come: Noojee says no more of it.
            return _reach(dial, state, at, deadlines), dial.expired and not fact.inbound
        case "Unlinked":
            return dial, False
        case "Busy" | "No Answer":
            # Said of calls to the extension only. Once it dials out, that is somebody else's call to it.
            return (dial, False) if dialled else (_noted(dial, cause), True)
        case "Hungup":
            return _noted(dial, cause), True
        case _:
            return _noted(dial, cause), False


def _reach(dial: Dial, state: DialState, at: datetime, deadlines: Deadlines) -> Dial:
    """The dial in a later state, with its next deadline; states do not go back."""
    if _ORDER[state] <= _ORDER[dial.reached]:
        return dial
    return structs.replace(
        dial,
        reached=state,
        state=state if dial.outcome is None else DialState.ENDED,
        ringing_at=at if state is DialState.RINGING else dial.ringing_at,
        connected_at=at if state is DialState.CONNECTED else dial.connected_at,
        deadline_at=_deadline(dial, state, at, deadlines) if dial.outcome is None else None,
    )


def _deadline(dial: Dial, state: DialState, at: datetime, deadlines: Deadlines) -> datetime:
    last = dial.requested_at + timedelta(seconds=deadlines.dial_s)
    if _in_doubt(dial) and dial.deadline_at is not None:
        return dial.deadline_at
    if state is DialState.CONNECTED:
        return last
    if state is DialState.ACCEPTED:
        silent = dial.system is System.CLICK2DIAL
        wait_s = deadlines.silent_s if silent else deadlines.accepted_s
    elif state is DialState.DIALING_AGENT:
        wait_s = deadlines.dialing_agent_s
    else:
        wait_s = deadlines.dialing_s
    return min(last, at + timedelta(seconds=wait_s))


def _noted(dial: Dial, cause: Cause, leg: Leg | None = None) -> Dial:
    """The dial with this cause, unless the one that it has says as much (rule 2)."""
    connected = dial.connected_at is not None
    if dial.cause is not None and _weight(cause, connected=connected) <= _weight(
        dial.cause, connected=connected
    ):
        return dial
    return structs.replace(dial, cause=cause, cause_leg=leg)


def _weight(cause: Cause, *, connected: bool) -> int:
    """How much a cause says: of two equals the first stays."""
    found = meaning(cause)
    if cause.field == "request" and found.says is Says.NOTHING:
        return 0  # that a reply did not come says less than whatever comes later
    if found.says is Says.OUTCOME:
        # Once it was answered, only "by a machine" says more.
        return 5 if connected and found.outcome is Outcome.MACHINE else 4
    if found.says is Says.MOVED or found.outcome is Outcome.FAILED:
        return 3
    return 2 if found.says is Says.RELEASE else 1


_BY_SYSTEM = frozenset({Outcome.CONGESTION, Outcome.NOT_ALLOWED, Outcome.FAILED})
_ENDED_BY_SYSTEM = _BY_SYSTEM | {Outcome.INVALID_NUMBER, Outcome.UNREACHABLE}


def _concluded(dial: Dial, fact: Fact, at: datetime) -> Dial:
    """A dial that is over, with its one outcome."""
    expired = isinstance(fact, Elapsed) and not _in_doubt(dial)
    talk_s = fact.call_time_s if isinstance(fact, CallRecord) else None
    outcome, confidence, cause = _outcome(dial, talk_s, expired=expired)
    unheard = isinstance(fact, CallHeard) and fact.call.ended_at is None
    if expired or unheard:
        confidence = Confidence.INFERRED
    found = meaning(cause) if cause is not None else None
    ended_at = fact.call.ended_at if isinstance(fact, CallHeard) else None
    return structs.replace(
        dial,
        state=DialState.ENDED,
        ended_at=ended_at or at,
        deadline_at=None,
        outcome=outcome,
        leg=dial.cause_leg or (found.leg if found is not None else None) or _leg(dial, outcome),
        ended_by=EndedBy.UNKNOWN if expired else _ended_by(dial, outcome, confidence, cause),
        cause=cause,
        confidence=confidence,
        expired=expired,
    )


def _outcome(dial: Dial, talk_s: float | None, *, expired: bool) -> tuple[Outcome, Confidence, Cause | None]:
    """What a dial that is over came to, and the cause that goes with it."""
    cause = dial.cause
    found = meaning(cause) if cause is not None else _NOTHING
    connected = dial.connected_at is not None
    tells = found.says is Says.OUTCOME or (found.says is Says.NOTHING and found.outcome is Outcome.FAILED)
    if tells and (not connected or found.outcome in SUCCESSES):
        silent = found.silent is not None and dial.ringing_at is None
        outcome = found.silent if silent and found.silent is not None else found.outcome
        return outcome, found.confidence, cause
    if connected:
        # Noojee never says who answered. A cause that the answer disproved is none.
        noojee = dial.system is System.NOOJEE
        confidence = Confidence.INFERRED if noojee else Confidence.STATED
        return Outcome.ANSWERED, confidence, None if tells else cause
    if cause is not None and cause.field == "end_reason" and found.says is Says.RELEASE:
        # "hungup" is said of an answered call and of one called off: the seconds of talk decide.
        if talk_s is not None and math.isfinite(talk_s) and talk_s > 0:
            return Outcome.ANSWERED, Confidence.STATED, cause
        if talk_s == 0:
            return Outcome.CANCELLED, Confidence.INFERRED, cause
    if dial.hangup_at is not None and not expired and found.says is not Says.MOVED:
        return Outcome.CANCELLED, Confidence.INFERRED, cause
    return found.outcome, Confidence.INFERRED, cause


def _leg(dial: Dial, outcome: Outcome) -> Leg:
    """The leg by how far it got, where no code said which (rule 5)."""
    if dial.reached is DialState.DIALING_AGENT:
        return Leg.AGENT
    unheard_of = dial.reached in _DECIDED_BEFORE_DIALLING and outcome is Outcome.UNKNOWN
    return Leg.SYSTEM if outcome in _BY_SYSTEM or unheard_of else Leg.CALLEE


def _ended_by(dial: Dial, outcome: Outcome, confidence: Confidence, cause: Cause | None) -> EndedBy:
    """Who ended it, as far as anything said so."""
    code = cause.code if cause is not None else ""
    if outcome is Outcome.REJECTED or code.startswith("callee_hungup"):
        return EndedBy.CALLEE
    if code.startswith("agent_hungup"):
        return EndedBy.AGENT
    if outcome in _ENDED_BY_SYSTEM:
        return EndedBy.SYSTEM
    if outcome is Outcome.CANCELLED:
        ours = dial.hangup_at is not None or confidence is Confidence.STATED
        return EndedBy.AGENT if ours else EndedBy.UNKNOWN
    if outcome is Outcome.ANSWERED:
        if dial.hangup_at is not None:
            return EndedBy.AGENT
        if cause is not None and cause.field in ("CallState", "CallResult") and code == "5":  # RemoteRelease
            return EndedBy.CALLEE
    return EndedBy.UNKNOWN


def _seconds(start: datetime, end: datetime | None) -> float | None:
    # Clocks are set back now and then: a negative time would spoil every average.
    return None if end is None else max(0.0, (end - start).total_seconds())


# ── Which dial it is ──────────────────────────────────────────────────────────────────────────────────

ENDING_DIGITS_MIN = 7
"""Two spellings of a number are one if the shorter is the ending of the other and has as many digits; what
is shorter is an extension, which must be equal."""

SKEW_S = 2.0
"""How long before its request a call may seem to have begun: clocks and queues."""

SOUTH_AFRICA = "27"
"""Click2Dial's numbers are South African: 0XXXXXXXXX is 27XXXXXXXXX."""


def normalised(number: str, country: str | None = None) -> str:
    """A number's digits in international form without `+` or `00`, if that can be told; total.

    `country` is the country code of national numbers (ten digits that begin with 0); without it those keep
    their 0. What has no digits (`anonymous`) is given back in lower case.
    """
    text = number.strip()
    for scheme in ("sip:", "sips:", "tel:"):
        if text.lower().startswith(scheme):
            text = text[len(scheme) :].split("@", 1)[0].split(";", 1)[0]
    digits = "".join(each for each in text if each in "0123456789*#")
    if not digits:
        return text.lower()
    if not text.startswith("+") and digits.startswith("00") and len(digits) > ENDING_DIGITS_MIN:
        return digits[2:]
    if country is not None and len(digits) == 10 and digits[0] == "0":
        return country + digits[1:]
    return digits


def same_number(one: str, other: str, country: str | None = None) -> bool:
    """Whether two spellings are of one number: equal when `normalised`, or one is the other's ending (a
    country code or a prefix for the outside line is lacking). With `country`, national numbers are of there.
    """
    first, second = normalised(one, country), normalised(other, country)
    if first == second:
        return first != ""
    short, long = sorted((first.removeprefix("0"), second.removeprefix("0")), key=len)
    return len(short) >= ENDING_DIGITS_MIN and short.isdecimal() and long.endswith(short)


def extension(device: str) -> str:
    """The extension in a device as PBXs write it: `SIP/410-12FA7B` is 410."""
    return device.strip().rsplit("/", 1)[-1].split("-", 1)[0] if "/" in device else device.strip()


def sighting(call: Call, system: System = System.GWS, window_s: float = CALL_WINDOW_S) -> Sighting:
    """What a call shows to be recognised by. The reference is what a Genesys dial sent in userData."""
    reference = call.user_data.get(REFERENCE_KEY)
    others = (call.dnis, *(party.e164 for party in call.parties))
    return Sighting(
        system=system,
        at=call.opened_at,
        account=call.account,
        number=call.number or call.dnis,
        also=tuple(dict.fromkeys(other for other in others if other and other != call.number)),
        # A PBX names no device: its extension is one.
        device=call.device_id if system is System.GWS else call.phone_number,
        reference=reference if isinstance(reference, str) else None,
        window_s=window_s,
    )


def match(dials: Iterable[Dial], seen: Sighting) -> Match:
    """Which of these dials a call, or a record of one, belongs to.

    Give it the placed dials that wait for their call (a record: also those whose `unknown` it may correct).
    What contradicts excludes: another system, account, number or device, a time outside the window. A
    reference is stronger than a number, and a number with the device than without; within equal evidence
    nothing is chosen, not even by time: an ambiguous call is one of the candidates', and so none that was
    only overheard. A reference overrules a number or device that is spelt otherwise, because a PBX rewrites
    those. The device and the time recognise nothing: somebody else may call there just then, and what became
    of that call would become the dial's outcome.
    """
    ranked: dict[tuple[bool, bool, bool], list[Dial]] = {}
    for dial in dials:
        found = _evidence(dial, seen)
        if found:
            rank = (Evidence.REFERENCE in found, Evidence.NUMBER in found, Evidence.DEVICE in found)
            ranked.setdefault(rank, []).append(dial)
    if not ranked:
        return Match(None, (), MatchConfidence.NONE)
    best = max(ranked)
    candidates = tuple(sorted(ranked[best], key=lambda dial: (dial.requested_at, dial.id)))
    evidence = _evidence(candidates[0], seen)
    if len(candidates) > 1:
        # What all of them have: one may have been in time and another not.
        shared = tuple(each for each in evidence if all(each in _evidence(dial, seen) for dial in candidates))
        return Match(None, shared, MatchConfidence.AMBIGUOUS, candidates)
    by_reference, by_number, by_device = best
    if by_reference:
        confidence = MatchConfidence.CERTAIN
    elif by_number and by_device:
        confidence = MatchConfidence.STRONG
    else:
        confidence = MatchConfidence.WEAK
    return Match(candidates[0], evidence, confidence, candidates)


def agrees(dial: Dial, seen: Sighting) -> bool:
    """Whether what is seen of a call that was found to be the dial's may still be its: it names no other
    number. The agent's own leg, which shows none, may have come from another call at the same extension."""
    return _number_agrees(dial, seen) is not False


def blamed(dials: Iterable[Dial], cause: Cause, at: datetime) -> Dial | None:
    """The dial that an error is about which names neither a call nor a request: the only one that it can be
    about, if that waits for its call; else None.

    Give it every dial of the account that goes on, or was ended by its deadline: an error that comes late is
    not the next dial's because the one before it was given up, or because its call is under way.
    """
    possible = [dial for dial in dials if _may_be_about(dial, cause, at)]
    if len(possible) != 1 or possible[0].outcome is not None or possible[0].call is not None:
        return None
    return possible[0]


def _may_be_about(dial: Dial, cause: Cause, at: datetime) -> bool:
    if dial.system is not cause.system or dial.requested_at > at:
        return False
    if dial.outcome is None:
        return True
    begins = at - dial.requested_at < timedelta(seconds=CALL_WINDOW_S)
    return dial.expired and (dial.call is not None or begins)


def _number_agrees(dial: Dial, seen: Sighting) -> bool | None:
    """None where either names no number."""
    numbers = [each for each in (seen.number, *seen.also) if each]
    if not dial.number or not numbers:
        return None
    country = SOUTH_AFRICA if dial.system is System.CLICK2DIAL else None
    return any(same_number(dial.number, each, country) for each in numbers)


def _evidence(dial: Dial, seen: Sighting) -> tuple[Evidence, ...]:
    """What speaks for a dial; empty if anything speaks against it, or no number and no reference for it."""
    if dial.system is not seen.system or (seen.account is not None and dial.account != seen.account):
        return ()
    since_s = (seen.at - dial.requested_at).total_seconds()
    in_time = -SKEW_S <= since_s <= seen.window_s
    referred = bool(dial.reference) and dial.reference == seen.reference
    if since_s < -SKEW_S or not (in_time or referred):
        return ()
    number, device = _number_agrees(dial, seen), None
    if dial.device and seen.device:
        device = extension(dial.device) == extension(seen.device)
    contradicted = device is False or (dial.reference and seen.reference)
    if not referred and (not number or contradicted):
        return ()
    found = {
        Evidence.REFERENCE: referred,
        Evidence.NUMBER: number is True,
        Evidence.DEVICE: device is True,
    }
    speaks = tuple(evidence for evidence, holds in found.items() if holds)
    return (*speaks, Evidence.TIME) if in_time else speaks
