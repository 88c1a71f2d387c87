"""A dial's life: the taxonomy row by row, the nine rules, deadlines, matching, and what any facts keep."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import permutations
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from listener.core import dialling
from listener.core.calls import Call, Direction, Heard, Source, State
from listener.core.decode import decode
from listener.core.dialling import (
    CALL_WINDOW_S,
    DEADLINES,
    FIELDS,
    REFERENCE_KEY,
    Accepted,
    Advance,
    CallHeard,
    CallRecord,
    Cause,
    Confidence,
    Dial,
    DialState,
    Elapsed,
    EndedBy,
    Evidence,
    Fact,
    HangupRequested,
    Leg,
    Match,
    MatchConfidence,
    NoojeeStatus,
    NotAnswered,
    Origin,
    Outcome,
    Refused,
    Reported,
    Retry,
    Says,
    Sighting,
    System,
    advance,
    agrees,
    blamed,
    extension,
    linked,
    match,
    meaning,
    normalised,
    overheard,
    placed,
    same_number,
    sighting,
)
from listener.core.normalise import Board
from tests.core.messages import CHANNEL, message

STARTED = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)
CALL = 7


def at(seconds: float) -> datetime:
    """So long after the request."""
    return STARTED + timedelta(seconds=seconds)


def dial(system: System = System.GWS, **fields: Any) -> Dial:
    """A dial that was just written down."""
    return structs.replace(placed("one", 1, system, "0820001234", STARTED, device="101"), **fields)


def leg(
    state: str = State.DIALING,
    *,
    established_s: float | None = None,
    ended_s: float | None = None,
    direction: Direction = Direction.OUTBOUND,
    opened_s: float = 1,
    **fields: Any,
) -> Call:
    """A call as the fold has it after a message."""
    return Call(
        id=fields.pop("id", CALL),
        account=1,
        call_id="a",
        aliases=("a",),
        state=state,
        state_since=at(opened_s),
        opened_at=at(opened_s),
        last_heard_at=at(opened_s),
        direction=direction,
        opened_by=Source.COMETD,
        established_at=None if established_s is None else at(established_s),
        ended_at=None if ended_s is None else at(ended_s),
        **fields,
    )


DIALS_OUT = CallHeard(leg())
ANSWERS = CallHeard(leg(State.ESTABLISHED, established_s=5))
ENDS_ANSWERED = CallHeard(leg(State.RELEASED, established_s=5, ended_s=60))
ENDS = CallHeard(leg(State.RELEASED, ended_s=9))


def through(start: Dial, *facts: Fact) -> tuple[Dial, list[Advance]]:
    """The dial after facts that come a second apart, and what each of them did."""
    steps = []
    for second, fact in enumerate(facts, 1):
        steps.append(advance(start, fact, at(second)))
        start = steps[-1].dial
    return start, steps


def ended(start: Dial, *facts: Fact) -> Dial:
    """The dial after facts that end it, once."""
    after, steps = through(start, *facts)
    assert [step.ended for step in steps].count(True) == 1
    assert after.state is DialState.ENDED
    assert after.outcome is not None
    assert after.leg is not None
    assert after.ended_by is not None
    assert after.confidence is not None
    assert after.deadline_at is None
    return after


def gws(field: str, code: object = "", text: str = "") -> Cause:
    """A cause in Genesys' words."""
    return Cause(System.GWS, field, str(code), text)


# ── The taxonomy, written out by hand from the collected facts ────────────────────────────────────────

O = Outcome  # noqa: E741 - the table below is read across
TAXONOMY: dict[str, dict[Outcome, Sequence[object]]] = {
    "q850": {
        O.BUSY: [17],
        O.NO_ANSWER: [18, 19],
        O.REJECTED: [21],
        O.INVALID_NUMBER: [1, 22, 28],
        O.UNREACHABLE: [3, 20, 27],
        O.CONGESTION: [34, 38, 41, 42, 44, 47],
        O.NOT_ALLOWED: [52, 54, 55, 57],
        O.FAILED: [*range(95, 112), 127],  # 102 without ringing among them
    },
    "sip": {
        O.BUSY: [486, 600],
        O.NO_ANSWER: [408],
        O.REJECTED: [603, 401, 407],
        O.CANCELLED: [487],
        O.INVALID_NUMBER: [404, 410, 484, 485, 604],
        O.UNREACHABLE: [480, 420, 502],
        O.CONGESTION: [503, 500, 504],
        O.NOT_ALLOWED: [403],
        O.FAILED: [488, 606],
    },
    "DIALSTATUS": {
        O.ANSWERED: ["ANSWER"],
        O.BUSY: ["BUSY"],
        O.NO_ANSWER: ["NOANSWER"],
        O.REJECTED: ["DONTCALL", "TORTURE"],
        O.CANCELLED: ["CANCEL"],
        O.UNREACHABLE: ["CHANUNAVAIL"],
        O.CONGESTION: ["CONGESTION"],
        O.FAILED: ["INVALIDARGS"],
    },
    "Reason": {O.BUSY: [5], O.NO_ANSWER: [3], O.CANCELLED: [1], O.CONGESTION: [8], O.FAILED: [0]},
    "freeswitch": {
        O.BUSY: ["USER_BUSY"],
        O.NO_ANSWER: ["NO_ANSWER", "NO_USER_RESPONSE", "ALLOTTED_TIMEOUT"],
        O.REJECTED: ["CALL_REJECTED"],
        O.CANCELLED: ["ORIGINATOR_CANCEL"],
        O.INVALID_NUMBER: ["UNALLOCATED_NUMBER", "NUMBER_CHANGED", "INVALID_NUMBER_FORMAT"],
        O.UNREACHABLE: [
            "NO_ROUTE_DESTINATION",
            "SUBSCRIBER_ABSENT",
            "DESTINATION_OUT_OF_ORDER",
            "USER_NOT_REGISTERED",
        ],
        O.CONGESTION: [
            "NORMAL_CIRCUIT_CONGESTION",
            "SWITCH_CONGESTION",
            "NETWORK_OUT_OF_ORDER",
            "NORMAL_TEMPORARY_FAILURE",
        ],
        O.NOT_ALLOWED: ["OUTGOING_CALL_BARRED", "INCOMING_CALL_BARRED"],
        O.FAILED: [
            "RECOVERY_ON_TIMER_EXPIRE",
            "INTERWORKING",
            "PROTOCOL_ERROR",
            "INCOMPATIBLE_DESTINATION",
        ],
    },
    "twilio": {
        O.ANSWERED: ["completed"],
        O.BUSY: ["busy"],
        O.NO_ANSWER: ["no-answer"],
        O.CANCELLED: ["canceled"],
        O.FAILED: ["failed"],
    },
    "camara": {
        O.BUSY: ["callerBusy", "calleeBusy"],
        O.NO_ANSWER: ["callerNoAnswer", "calleeNoAnswer"],
        O.CANCELLED: ["callerAbandon"],
        O.INVALID_NUMBER: ["INVALID_PHONE_NUMBER"],
        O.UNREACHABLE: ["calleeFailure", "CALLEE_NOT_AVAILABLE"],
        O.NOT_ALLOWED: [401, 403],
        O.FAILED: ["failed", "callerFailure"],
    },
    "CallState": {
        O.MACHINE: [9, 17],
        O.BUSY: [6],
        O.NO_ANSWER: [7, 27],
        O.CANCELLED: [21],
        O.INVALID_NUMBER: [11, 12, 13],
        O.UNREACHABLE: [14, 8],
        O.CONGESTION: [10, 15, 16, 18, 20],
        O.FAILED: [3, 4],
    },
    "CallResult": {
        O.MACHINE: [9, 17],
        O.BUSY: [6],
        O.NO_ANSWER: [7, 27],
        O.CANCELLED: [21],
        O.INVALID_NUMBER: [11, 12, 13],
        O.UNREACHABLE: [14, 8],
        O.CONGESTION: [10, 15, 16, 18, 20],
        O.NOT_ALLOWED: [51],
        O.FAILED: [3, 4],
    },
    "event": {O.BUSY: ["EventDestinationBusy", 63]},
    "ErrorCode": {
        O.MACHINE: [519, 567, 655],
        O.BUSY: [91, 231, 510, 615, 79, 83],
        O.NO_ANSWER: [232, 512, 643],
        O.REJECTED: [233, 633],
        O.CANCELLED: [237],
        O.INVALID_NUMBER: [71, 72, 415, 600, 632, 634, 1145, 1153, 61, 70, 1144],
        O.UNREACHABLE: [58, 59, 93, 1173],
        O.CONGESTION: [452, 511, 626, 629, 636, 637, 644, 647, 1171, 1172, 1174, 1175, 1182],
        O.NOT_ALLOWED: [94, 458, 617, 649, 1148, 1149],
        O.FAILED: [*range(50, 58), 234, 1141, 1161, 40, 41, 42, 450, 518],
    },
}
ROWS = [
    (field, str(code), outcome)
    for field, outcomes in TAXONOMY.items()
    for outcome, codes in outcomes.items()
    for code in codes
]
AGENT_LEG = {("ErrorCode", code) for code in ("79", "83", "61", "70", "1144")} | {
    ("Reason", code) for code in ("5", "3", "1", "8", "0")
}
AGENT_LEG |= {("camara", code) for code in ("callerBusy", "callerNoAnswer", "callerAbandon", "callerFailure")}


@pytest.mark.parametrize(("field", "code", "outcome"), ROWS)
def test_every_code_of_the_taxonomy(field: str, code: str, outcome: Outcome) -> None:
    """A dial that went out, of which this was said and then a release, ends as its row says, with its leg."""
    after = ended(dial(), DIALS_OUT, Reported(gws(field, code)), ENDS)
    assert after.outcome is outcome
    assert after.cause == gws(field, code)
    by_system = outcome in (O.CONGESTION, O.NOT_ALLOWED, O.FAILED)
    agent = (field, code) in AGENT_LEG
    assert after.leg is (Leg.AGENT if agent else Leg.SYSTEM if by_system else Leg.CALLEE)


def test_the_tables_hold_no_row_beside_the_taxonomy() -> None:
    """Whatever a list says names an outcome stands in the taxonomy above, and the other way round."""
    for field, outcomes in TAXONOMY.items():
        said = {code for code, row in FIELDS[field].items() if row.says is Says.OUTCOME}
        assert said == {str(code) for codes in outcomes.values() for code in codes}, field


@pytest.mark.parametrize(
    ("field", "code", "outcome"),
    [("q850", 102, O.NO_ANSWER), ("sip", 480, O.NO_ANSWER), ("sip", 403, O.REJECTED)],
)
def test_ambiguous_codes_are_read_by_ringing(field: str, code: int, outcome: Outcome) -> None:
    """Rule 4: the same code means another thing once ringing was seen, and is inferred either way."""
    rings = CallHeard(leg(State.RINGING))
    after = ended(dial(), DIALS_OUT, rings, Reported(gws(field, code)), ENDS)
    assert (after.outcome, after.confidence) == (outcome, Confidence.INFERRED)
    silent = ended(dial(), DIALS_OUT, Reported(gws(field, code)), ENDS)
    assert silent.outcome is not outcome
    assert silent.confidence is Confidence.INFERRED


@pytest.mark.parametrize("code", [480, 486, 603, 408])
def test_what_vendors_use_differently_is_inferred(code: int) -> None:
    """Rule 4: these four SIP codes are never stated."""
    assert ended(dial(), Reported(gws("sip", code))).confidence is Confidence.INFERRED


@pytest.mark.parametrize("code", [0, 5, 19, 26])
def test_a_release_means_what_came_before_it(code: int) -> None:
    """Rule 3, Genesys: Ok, RemoteRelease, Cleared, Dropped end an answer, or nothing, or are our hang-up."""
    release = gws("CallState", code)
    answered = ended(dial(), DIALS_OUT, ANSWERS, structs.replace(ENDS_ANSWERED, cause=release))
    assert (answered.outcome, answered.confidence) == (O.ANSWERED, Confidence.STATED)
    assert answered.ended_by is (EndedBy.CALLEE if code == 5 else EndedBy.UNKNOWN)
    unknown = ended(dial(), DIALS_OUT, structs.replace(ENDS, cause=release))
    assert (unknown.outcome, unknown.confidence) == (O.UNKNOWN, Confidence.INFERRED)
    ours = ended(dial(), DIALS_OUT, HangupRequested(), structs.replace(ENDS, cause=release))
    assert (ours.outcome, ours.ended_by) == (O.CANCELLED, EndedBy.AGENT)


@pytest.mark.parametrize("code", [1, 2, 22, 23, 25])
def test_what_moved_has_not_ended(code: int) -> None:
    """Rule 8: redirected before an answer it stays open until its deadline; after one it is answered."""
    moved = Reported(gws("CallState", code))
    after, _ = through(dial(), DIALS_OUT, moved, ENDS)
    assert after.outcome is None
    assert after.deadline_at is not None
    over = advance(after, Elapsed(), after.deadline_at).dial
    assert (over.outcome, over.cause) == (O.UNKNOWN, moved.cause)
    assert ended(dial(), DIALS_OUT, ANSWERS, moved, ENDS_ANSWERED).outcome is O.ANSWERED


@pytest.mark.parametrize(("field", "code", "outcome"), [("q850", 16, O.CANCELLED), ("sip", 200, O.UNKNOWN)])
def test_a_clearing_before_the_answer(field: str, code: int, outcome: Outcome) -> None:
    """Rule 3: normal clearing is an answer's end only if there was an answer."""
    assert ended(dial(), DIALS_OUT, Reported(gws(field, code)), ENDS).outcome is outcome
    assert ended(dial(), DIALS_OUT, ANSWERS, Reported(gws(field, code)), ENDS_ANSWERED).outcome is O.ANSWERED


@pytest.mark.parametrize("cause", [gws("CallState", 9), gws("CallState", 17), gws("ErrorCode", 655)])
def test_a_machine_is_recognised_after_the_answer(cause: Cause) -> None:
    """Answered by a machine or fax: the outcome is machine, whichever was said first."""
    assert ended(dial(), DIALS_OUT, ANSWERS, Reported(cause), ENDS_ANSWERED).outcome is O.MACHINE
    assert ended(dial(), DIALS_OUT, Reported(cause), ANSWERS, ENDS_ANSWERED).outcome is O.MACHINE
    disproved = Reported(gws("CallState", 6))
    assert ended(dial(), DIALS_OUT, disproved, ANSWERS, Reported(cause), ENDS_ANSWERED).outcome is O.MACHINE


@pytest.mark.parametrize(
    ("reason", "code", "talk_s", "outcome", "by"),
    [
        ("hungup", "16", 12.0, O.ANSWERED, EndedBy.UNKNOWN),
        ("hungup", "0", 12.0, O.ANSWERED, EndedBy.UNKNOWN),
        ("callee_hungup", "16", 12.0, O.ANSWERED, EndedBy.CALLEE),
        ("agent_hungup", "16", 12.0, O.ANSWERED, EndedBy.AGENT),
        ("hungup", "16", 0.0, O.CANCELLED, EndedBy.UNKNOWN),
        ("hungup", "16", None, O.UNKNOWN, EndedBy.UNKNOWN),
        ("hungup", "16", float("nan"), O.UNKNOWN, EndedBy.UNKNOWN),
        ("hungup", "16", -1.0, O.UNKNOWN, EndedBy.UNKNOWN),
        ("voicemail", "16", 5.0, O.MACHINE, EndedBy.UNKNOWN),
        ("busy", "17", 0.0, O.BUSY, EndedBy.UNKNOWN),
        ("reject", "21", 0.0, O.REJECTED, EndedBy.CALLEE),
        ("reject", "", 0.0, O.REJECTED, EndedBy.CALLEE),
        ("reject", "19", 0.0, O.NO_ANSWER, EndedBy.UNKNOWN),
        ("reject", "22", 0.0, O.INVALID_NUMBER, EndedBy.SYSTEM),
        ("timeout", "18", 0.0, O.NO_ANSWER, EndedBy.UNKNOWN),
        ("timeout", "102", 0.0, O.FAILED, EndedBy.SYSTEM),
        ("error", "28", 0.0, O.INVALID_NUMBER, EndedBy.SYSTEM),
        ("error", "34", 0.0, O.CONGESTION, EndedBy.SYSTEM),
        ("error", "42", 0.0, O.CONGESTION, EndedBy.SYSTEM),
        ("error", "20", 0.0, O.UNREACHABLE, EndedBy.SYSTEM),
        ("error", "3", 0.0, O.UNREACHABLE, EndedBy.SYSTEM),
        ("error", "127", 0.0, O.FAILED, EndedBy.SYSTEM),
        ("error", "9999", 0.0, O.FAILED, EndedBy.SYSTEM),
        ("error", "", 0.0, O.FAILED, EndedBy.SYSTEM),
        ("failed", "", 0.0, O.FAILED, EndedBy.SYSTEM),
        ("unheard of", "", 0.0, O.UNKNOWN, EndedBy.UNKNOWN),
        ("unheard of", "17", 0.0, O.BUSY, EndedBy.UNKNOWN),
        ("", "", None, O.UNKNOWN, EndedBy.UNKNOWN),
    ],
)
def test_every_row_of_teleforge(
    reason: str, code: str, talk_s: float | None, outcome: Outcome, by: EndedBy
) -> None:
    """Click2Dial's record: labels with their codes, and the seconds of talk where a label proves nothing."""
    after = ended(dial(System.CLICK2DIAL), Accepted(), CallRecord(reason, code, talk_s))
    assert (after.outcome, after.ended_by) == (outcome, by)
    assert after.cause == Cause(System.CLICK2DIAL, "end_reason", f"{reason} {code}".strip())


def noojee(*said: str | NoojeeStatus) -> list[Fact]:
    """Noojee's events about a call that its extension dials."""
    return [each if isinstance(each, NoojeeStatus) else NoojeeStatus(each) for each in said]


@pytest.mark.parametrize(
    ("facts", "outcome", "which"),
    [
        (noojee("Dialing Out", "Connected", "Hungup"), O.ANSWERED, Leg.CALLEE),
        (noojee("Connected", "Hungup"), O.ANSWERED, Leg.CALLEE),
        (noojee("Dialing Out", "Connected", "Unlinked", "Connected", "Hungup"), O.ANSWERED, Leg.CALLEE),
        (noojee("Dialing Out", "Hungup"), O.UNKNOWN, Leg.CALLEE),
        (noojee("Dialing Out", "Unlinked", "Hungup"), O.UNKNOWN, Leg.CALLEE),
        (noojee("Ringing", "Hungup"), O.UNKNOWN, Leg.AGENT),
        (noojee(NoojeeStatus("Connected", inbound=True), "Hungup"), O.UNKNOWN, Leg.AGENT),
        (noojee(NoojeeStatus("Busy", inbound=True)), O.BUSY, Leg.AGENT),
        (noojee("Ringing", NoojeeStatus("No Answer", inbound=True)), O.NO_ANSWER, Leg.AGENT),
        (noojee("Dialing Out", "Busy", "Hungup"), O.UNKNOWN, Leg.CALLEE),
        (noojee("Dialing Out", "Sparkling", "Hungup"), O.UNKNOWN, Leg.CALLEE),
        ([*noojee("Dialing Out"), HangupRequested(), *noojee("Hungup")], O.CANCELLED, Leg.CALLEE),
        ([*noojee("Dialing Out", "Connected"), HangupRequested(), *noojee("Hungup")], O.ANSWERED, Leg.CALLEE),
    ],
)
def test_every_row_of_noojee(facts: list[Fact], outcome: Outcome, which: Leg) -> None:
    """Noojee's statuses: nothing is said of why a dial failed, and Unlinked is no end."""
    after = ended(dial(System.NOOJEE), Accepted("7"), *facts)
    assert (after.outcome, after.leg) == (outcome, which)
    if outcome in (O.ANSWERED, O.UNKNOWN, O.CANCELLED):
        assert after.confidence is Confidence.INFERRED


@pytest.mark.parametrize("status", ["Unlinked", "Connected", "Ringing", "Dialing Out", "", "Sparkling"])
def test_noojee_statuses_that_end_nothing(status: str) -> None:
    """Only Hungup ends a dial, and Busy or No Answer of the agent's own phone."""
    after, _ = through(dial(System.NOOJEE), Accepted(), NoojeeStatus(status))
    assert after.outcome is None


REFUSALS = [
    (Cause(System.GWS, "statusCode", "4", "Device '5001' is not registered."), O.FAILED, Leg.AGENT),
    (Cause(System.GWS, "statusCode", "10", "validation"), O.FAILED, Leg.SYSTEM),
    (Cause(System.GWS, "statusCode", "99"), O.FAILED, Leg.SYSTEM),
    (Cause(System.GWS, "statusCode", "3"), O.NOT_ALLOWED, Leg.SYSTEM),
    (Cause(System.GWS, "statusCode", "5"), O.NOT_ALLOWED, Leg.SYSTEM),
    (Cause(System.GWS, "statusCode", "20"), O.NOT_ALLOWED, Leg.SYSTEM),
    (Cause(System.GWS, "http", "403", "Missing or invalid Csrf token"), O.NOT_ALLOWED, Leg.SYSTEM),
    (Cause(System.GWS, "http", "503"), O.FAILED, Leg.SYSTEM),
    (Cause(System.GWS, "login"), O.NOT_ALLOWED, Leg.SYSTEM),
    (Cause(System.NOOJEE, "http", "302"), O.FAILED, Leg.SYSTEM),
    (Cause(System.NOOJEE, "http", "401"), O.NOT_ALLOWED, Leg.SYSTEM),
    (Cause(System.NOOJEE, "Code", "-1", "Expired TimeStamp"), O.NOT_ALLOWED, Leg.SYSTEM),
    (Cause(System.NOOJEE, "Code", "-7", "No such extension"), O.FAILED, Leg.SYSTEM),
    (Cause(System.NOOJEE, "Code", "what?"), O.FAILED, Leg.SYSTEM),
    (Cause(System.CLICK2DIAL, "http", "400"), O.FAILED, Leg.SYSTEM),
    (Cause(System.CLICK2DIAL, "validation", "callee"), O.INVALID_NUMBER, Leg.CALLEE),
    (Cause(System.CLICK2DIAL, "validation", "agent"), O.INVALID_NUMBER, Leg.AGENT),
    (Cause(System.CLICK2DIAL, "validation", "outbound_id"), O.FAILED, Leg.SYSTEM),
]


@pytest.mark.parametrize(("cause", "outcome", "which"), REFUSALS)
def test_a_refusal_ends_it(cause: Cause, outcome: Outcome, which: Leg) -> None:
    """What is refused was not dialled: it is over at once, stated, and the system's own words are kept."""
    after = ended(dial(cause.system), Refused(cause))
    assert (after.outcome, after.leg, after.cause) == (outcome, which, cause)
    assert (after.confidence, after.ended_by) == (Confidence.STATED, EndedBy.SYSTEM)


@pytest.mark.parametrize(
    "fact",
    [
        Accepted("7"),
        Refused(Cause(System.NOOJEE, "Code", "0")),
        Refused(Cause(System.NOOJEE, "Code", "3", "a warning")),
        Refused(Cause(System.GWS, "statusCode", "0")),
        Refused(Cause(System.GWS, "statusCode", "9", "processing incomplete")),
        Refused(Cause(System.CLICK2DIAL, "http", "202")),
        NotAnswered(sent=True, system=System.GWS),
        Reported(gws("event", "EventNetworkReached")),
        Reported(gws("CallState", 0)),
        Reported(gws("CallState", 28)),
        Reported(gws("never heard of", "x")),
        HangupRequested(),
        Elapsed(),
    ],
)
def test_no_acknowledgement_ends_it(fact: Fact) -> None:
    """Rule 1: accepted is not dialled; nor does a reply that never came end anything before the deadline."""
    after, _ = through(dial(), fact)
    assert after.outcome is None
    assert after.deadline_at is not None


def test_a_refusal_of_a_call_that_was_heard_is_none() -> None:
    """A broken reply to a request that was obeyed: the call decides."""
    assert ended(dial(), DIALS_OUT, Refused(gws("http", 500)), ANSWERS, ENDS_ANSWERED).outcome is O.ANSWERED
    rung = CallHeard(leg(State.RINGING, direction=Direction.INBOUND))
    assert through(dial(), rung, Refused(gws("http", 500)))[0].outcome is None


def test_no_reply_may_have_been_dialled() -> None:
    """Sent, no answer: open until the deadline, then unknown and not to be repeated; not sent: failed."""
    after, _ = through(dial(), NotAnswered(sent=True, system=System.GWS, text="timed out"))
    assert after.deadline_at == at(DEADLINES.requested_s)
    over = advance(after, Elapsed(), at(DEADLINES.requested_s)).dial
    assert (over.outcome, over.leg, over.retry) == (O.UNKNOWN, Leg.SYSTEM, Retry.NO)
    assert over.cause == gws("request", "unanswered", "timed out")
    unsent = ended(dial(), NotAnswered(sent=False, system=System.GWS, text="refused"))
    assert (unsent.outcome, unsent.retry) == (O.FAILED, Retry.REVIEW)
    heard = ended(dial(), NotAnswered(sent=True, system=System.GWS), DIALS_OUT, ANSWERS, ENDS_ANSWERED)
    assert heard.outcome is O.ANSWERED


@pytest.mark.parametrize(
    ("cause", "outcome", "confidence"),
    [
        (gws("ErrorCode", 415, "Invalid Destination DN"), O.INVALID_NUMBER, Confidence.STATED),
        (gws("ErrorMessage"), O.FAILED, Confidence.INFERRED),
        (gws("ErrorCode", 31337), O.FAILED, Confidence.INFERRED),
    ],
)
def test_an_error_instead_of_a_call_ends_it(cause: Cause, outcome: Outcome, confidence: Confidence) -> None:
    """It names no call: nothing came that disproves it, so nothing else will come. Without a code it is only
    inferred. The acknowledgement, which may come after it, and another error put nothing off."""
    orders: list[list[Fact]] = [
        [Accepted(), Reported(cause)],
        [Reported(cause), Accepted(), Reported(gws("ErrorMessage"))],
    ]
    for facts in orders:
        after, _ = through(dial(), *facts)
        heard_s = 1 + facts.index(Reported(cause))
        assert (after.outcome, after.cause) == (None, cause)
        assert after.deadline_at == at(heard_s + DEADLINES.error_s)
        assert not advance(after, Elapsed(), at(heard_s + DEADLINES.error_s - 0.001)).changed
        over = advance(after, Elapsed(), at(heard_s + DEADLINES.error_s))
        assert over.ended
        told = over.dial
        assert (told.outcome, told.confidence, told.cause) == (outcome, confidence, cause)
        assert (told.expired, told.ended_by) == (False, EndedBy.SYSTEM)
        assert not advance(told, DIALS_OUT, at(20)).changed


@pytest.mark.parametrize("error", [gws("ErrorMessage"), gws("ErrorCode", 415)])
def test_a_call_disproves_an_error_before_it(error: Cause) -> None:
    """The error was of something else that was asked of the device just then: nothing of it is left."""
    after, steps = through(dial(), Accepted(), Reported(error), DIALS_OUT)
    assert (after.outcome, after.cause) == (None, None)
    assert after.deadline_at == at(3 + DEADLINES.dialing_s)
    assert not any(step.ended for step in steps)
    assert ended(after, ANSWERS, ENDS_ANSWERED).outcome is O.ANSWERED
    assert ended(after, ENDS).outcome is O.UNKNOWN
    rung = CallHeard(leg(State.RINGING, direction=Direction.INBOUND))
    assert through(dial(), Reported(error), rung)[0].cause is None
    # As the store does: the call is the dial's before it is told of it.
    doubted, _ = through(dial(), Accepted(), Reported(error))
    found = Match(doubted, (Evidence.NUMBER,), MatchConfidence.WEAK)
    assert advance(linked(doubted, found, CALL), DIALS_OUT, at(3)).dial.cause is None
    moved_on, _ = through(doubted, Reported(gws("event", "EventNetworkReached")))
    assert (moved_on.cause, moved_on.deadline_at) == (None, at(1 + DEADLINES.dialing_s))


def test_a_refusal_says_more_than_an_error_before_it() -> None:
    """GWS says an error on the devices channel at the same instant as it refuses the request."""
    refused = Refused(gws("statusCode", 4, "Device '5001' is not registered."))
    after = ended(dial(), Reported(gws("ErrorMessage")), refused)
    assert (after.outcome, after.cause, after.leg) == (O.FAILED, refused.cause, Leg.AGENT)


def test_an_error_about_a_call_waits_for_its_end() -> None:
    """Rule 2: the destination is busy, then the release comes; until then the dial is open."""
    after, _ = through(dial(), DIALS_OUT, Reported(gws("event", "EventDestinationBusy")))
    assert after.outcome is None
    over = ended(dial(), DIALS_OUT, Reported(gws("event", "EventDestinationBusy")), ENDS)
    assert (over.outcome, over.confidence, over.ended_at) == (O.BUSY, Confidence.STATED, at(9))


def test_the_first_specific_cause_wins() -> None:
    """Rule 2: neither a later specific cause nor a release overwrites it; a vague one is overwritten."""
    first, second = Reported(gws("CallState", 6)), Reported(gws("ErrorCode", 643))
    release = Reported(gws("CallState", 0))
    assert ended(dial(), DIALS_OUT, first, second, release, ENDS).outcome is O.BUSY
    assert ended(dial(), DIALS_OUT, second, first, release, ENDS).outcome is O.NO_ANSWER
    assert ended(dial(), DIALS_OUT, release, first, ENDS).outcome is O.BUSY
    vague = Reported(gws("ErrorMessage"))
    assert ended(dial(), DIALS_OUT, vague, first, ENDS).outcome is O.BUSY
    assert ended(dial(), DIALS_OUT, vague, release, ENDS).outcome is O.FAILED


def test_an_answer_disproves_a_cause() -> None:
    """Busy was said, and then somebody talked: answered, and the cause is not held against it."""
    after = ended(dial(), DIALS_OUT, Reported(gws("CallState", 6)), ANSWERS, ENDS_ANSWERED)
    assert (after.outcome, after.cause) == (O.ANSWERED, None)


def test_the_leg_makes_another_result() -> None:
    """Rule 5: the same code is the agent's while its phone is called; what a message says comes first."""
    rung = CallHeard(leg(State.RINGING, direction=Direction.INBOUND))
    assert ended(dial(), rung, Reported(gws("CallState", 6)), ENDS).leg is Leg.CALLEE
    own = CallHeard(leg(State.RELEASED, direction=Direction.INBOUND, established_s=4, ended_s=9))
    after = ended(dial(), rung, structs.replace(own, cause=gws("CallState", 6)))
    assert (after.outcome, after.leg) == (O.BUSY, Leg.AGENT)
    assert after.connected_at is None
    said = ended(dial(), DIALS_OUT, Reported(gws("CallState", 6), leg=Leg.AGENT), ENDS)
    assert said.leg is Leg.AGENT


@pytest.mark.parametrize("field", [*sorted(set(FIELDS) - {"login"}), "never heard of", ""])
def test_unknown_codes_pass_through(field: str) -> None:
    """Rule 6: a code that nobody knows is failed or unknown with the raw code kept."""
    cause = gws(field, "№ 9", "?")
    assert meaning(cause).outcome in (O.FAILED, O.UNKNOWN)
    after = ended(dial(), DIALS_OUT, Reported(cause), ENDS)
    assert after.outcome in (O.FAILED, O.UNKNOWN)
    assert after.cause == cause


# ── Deadlines and late ends ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("system", "facts", "waits_s"),
    [
        (System.GWS, [], DEADLINES.requested_s),
        (System.GWS, [Accepted()], 1 + DEADLINES.accepted_s),
        (System.CLICK2DIAL, [Accepted()], 1 + DEADLINES.silent_s),
        (System.NOOJEE, [Accepted(), NoojeeStatus("Ringing")], 2 + DEADLINES.dialing_agent_s),
        (System.GWS, [DIALS_OUT], 1 + DEADLINES.dialing_s),
        (System.GWS, [DIALS_OUT, Reported(gws("event", "62"))], 2 + DEADLINES.dialing_s),
        (System.GWS, [DIALS_OUT, ANSWERS], DEADLINES.dial_s),
    ],
)
def test_every_state_has_its_deadline(system: System, facts: list[Fact], waits_s: float) -> None:
    """Rule 7: a moment before the deadline it is open, at the deadline it ends, and it says which that is."""
    after, _ = through(dial(system), *facts)
    assert after.deadline_at == at(waits_s)
    before = advance(after, Elapsed(), at(waits_s - 0.001))
    assert not before.changed
    over = advance(after, Elapsed(), at(waits_s))
    assert over.ended
    assert over.dial.outcome is (O.ANSWERED if after.connected_at else O.UNKNOWN)
    assert over.dial.confidence is Confidence.INFERRED
    assert over.dial.reached is after.state


def test_no_state_outlasts_the_whole_dial() -> None:
    """A state entered late has what is left of the whole dial, and not its own time."""
    short = structs.replace(DEADLINES, dial_s=100.0)
    begun = placed("one", 1, System.GWS, "5001", STARTED, deadlines=short)
    after = advance(begun, DIALS_OUT, at(50), short).dial
    assert after.deadline_at == at(100)
    shorter = structs.replace(short, dial_s=9.0)
    assert placed("one", 1, System.GWS, "5001", STARTED, deadlines=shorter).deadline_at == at(9)


def test_a_cause_without_its_end_stands_at_the_deadline() -> None:
    """Busy was said and the release never came: busy, inferred."""
    after, _ = through(dial(), DIALS_OUT, Reported(gws("CallState", 6)), Elapsed())
    over = advance(after, Elapsed(), at(1_000)).dial
    assert (over.outcome, over.confidence, over.retry) == (O.BUSY, Confidence.INFERRED, Retry.LATER)


def test_our_hang_up_without_an_end_is_unknown() -> None:
    """We asked for the end and did not hear it: at the deadline that is unknown, and not cancelled."""
    after, _ = through(dial(), DIALS_OUT, HangupRequested())
    assert advance(after, Elapsed(), at(1_000)).dial.outcome is O.UNKNOWN


def expired(system: System = System.GWS, *facts: Fact) -> Dial:
    """A dial that nothing was heard of until its deadline."""
    after, _ = through(dial(system), *facts)
    over = advance(after, Elapsed(), at(20_000)).dial
    assert (over.outcome, over.expired, over.retry) == (O.UNKNOWN, True, Retry.NO)
    return over


@pytest.mark.parametrize(
    ("system", "facts", "outcome"),
    [
        (System.CLICK2DIAL, [CallRecord("hungup", "16", 40.0)], O.ANSWERED),
        (System.CLICK2DIAL, [CallRecord("busy", "17", 0.0)], O.BUSY),
        (System.GWS, [ENDS_ANSWERED], O.ANSWERED),
        (System.GWS, [DIALS_OUT, ANSWERS, ENDS_ANSWERED], O.ANSWERED),
        (System.GWS, [Reported(gws("ErrorCode", 415))], O.INVALID_NUMBER),
        (System.GWS, [Refused(gws("http", 503))], O.FAILED),
        (System.NOOJEE, [NoojeeStatus("Dialing Out"), NoojeeStatus("Connected")], O.ANSWERED),
        (System.NOOJEE, [NoojeeStatus("Connected", inbound=True), NoojeeStatus("Busy")], O.BUSY),
    ],
)
def test_a_late_end_corrects_unknown_once(system: System, facts: list[Fact], outcome: Outcome) -> None:
    """Rule 7: what comes after the deadline replaces unknown, is flagged, and cannot be replaced again."""
    over = expired(system, Accepted())
    after, steps = through(over, *facts)
    assert (after.outcome, after.corrected, after.expired) == (outcome, True, False)
    assert after.ended_at == over.ended_at
    assert [step.corrected for step in steps] == [False] * (len(facts) - 1) + [True]
    assert not any(step.ended for step in steps)
    again, steps = through(after, *facts, CallRecord("reject", "21", 0.0), Reported(gws("CallState", 10)))
    assert again == after
    assert not any(step.changed for step in steps)


def test_a_late_end_that_tells_nothing_leaves_unknown() -> None:
    """It ended, and nobody said how: unknown, but no longer for want of an end; a cause may yet come."""
    after, steps = through(expired(System.GWS, DIALS_OUT), ENDS)
    assert (after.outcome, after.expired, after.corrected) == (O.UNKNOWN, False, False)
    assert not steps[0].ended
    assert after.retry is Retry.REVIEW
    assert through(after, Reported(gws("CallState", 6)))[0].outcome is O.BUSY


def test_unknown_at_its_end_is_corrected_by_what_tells() -> None:
    """A call released without a word, and then the error that explains it; nothing else explains it."""
    over = ended(dial(), DIALS_OUT, ENDS)
    assert through(over, Accepted(), ENDS, ANSWERS, Elapsed())[0] == over
    after, steps = through(over, Reported(gws("ErrorCode", 644)))
    assert (after.outcome, steps[0].corrected, steps[0].ended) == (O.CONGESTION, True, False)


def test_our_hang_up_explains_an_end_that_was_heard_before_its_answer() -> None:
    """The PBX says Hungup sooner than that it took our hang-up, which was asked for before that."""
    over = ended(dial(System.NOOJEE), NoojeeStatus("Dialing Out"), NoojeeStatus("Hungup"))
    assert over.outcome is O.UNKNOWN
    assert over.ended_at is not None
    told = advance(over, HangupRequested(), over.ended_at)
    assert (told.corrected, told.ended) == (True, False)
    after = told.dial
    assert (after.outcome, after.ended_by, after.confidence) == (
        O.CANCELLED,
        EndedBy.AGENT,
        Confidence.INFERRED,
    )
    assert (after.ended_at, after.hangup_at) == (over.ended_at, over.ended_at)


def test_our_hang_up_explains_nothing_else() -> None:
    """Neither an end before it, nor a deadline, nor what has a cause of its own."""
    over = ended(dial(System.NOOJEE), NoojeeStatus("Dialing Out"), NoojeeStatus("Hungup"))
    assert over.ended_at is not None
    assert advance(over, HangupRequested(), over.ended_at + timedelta(seconds=0.001)).dial == over
    unheard = expired(System.NOOJEE, NoojeeStatus("Dialing Out"))
    assert advance(unheard, HangupRequested(), at(3)).dial.outcome is O.UNKNOWN
    busy = ended(dial(System.NOOJEE), NoojeeStatus("Busy", inbound=True))
    assert advance(busy, HangupRequested(), STARTED).dial == busy


@pytest.mark.parametrize(
    ("outcome", "hint"),
    [
        (O.BUSY, Retry.LATER),
        (O.NO_ANSWER, Retry.LATER),
        (O.CONGESTION, Retry.LATER),
        (O.UNREACHABLE, Retry.LATER),
        (O.INVALID_NUMBER, Retry.NO),
        (O.REJECTED, Retry.NO),
        (O.NOT_ALLOWED, Retry.NO),
        (O.CANCELLED, Retry.POLICY),
        (O.ANSWERED, Retry.POLICY),
        (O.MACHINE, Retry.POLICY),
        (O.FAILED, Retry.REVIEW),
        (O.UNKNOWN, Retry.REVIEW),
    ],
)
def test_what_may_be_done_next(outcome: Outcome, hint: Retry) -> None:
    """Rule 9: later, no, by policy, or after a person looked."""
    assert dial(outcome=outcome).retry is hint
    assert dial().retry is None


# ── What an observer is told ──────────────────────────────────────────────────────────────────────────


def test_the_answer_is_told_at_once_and_the_outcome_at_the_end() -> None:
    """Who watches a failure rate hears of a connection when it is made; the outcome comes at the end."""
    after, steps = through(
        dial(), Accepted(), DIALS_OUT, CallHeard(leg(State.RINGING)), ANSWERS, ANSWERS, ENDS_ANSWERED
    )
    assert [step.ringing for step in steps] == [False, False, True, False, False, False]
    assert [step.connected for step in steps] == [False, False, False, True, False, False]
    assert [step.ended for step in steps] == [False] * 5 + [True]
    assert [step.changed for step in steps] == [True, True, True, True, False, True]
    assert (after.time_to_ring_s, after.time_to_answer_s) == (3.0, 5.0)
    assert after.call == CALL


def test_an_answer_known_only_at_the_end_is_told_there() -> None:
    """Click2Dial tells of an answer in its record: counted as a connection then, with no time to answer."""
    after, steps = through(dial(System.CLICK2DIAL), Accepted(), CallRecord("hungup", "16", 9.0))
    assert [step.connected for step in steps] == [False, True]
    assert after.time_to_answer_s is None


def test_the_call_of_another_dial_is_ignored() -> None:
    """A dial has one call; another one's course is not its own."""
    after, _ = through(dial(), DIALS_OUT)
    other = CallHeard(leg(State.RELEASED, ended_s=9, id=CALL + 1))
    assert not advance(after, other, at(9)).changed


def test_a_clock_set_back_gives_no_negative_time() -> None:
    """A call that was answered before it was asked for, by a clock that was set back: 0 s."""
    after, _ = through(dial(), CallHeard(leg(State.ESTABLISHED, established_s=-5)))
    assert after.time_to_answer_s == 0.0


def test_facts_and_dials_survive_being_stored() -> None:
    """Every fact and a dial with everything in it are the same after JSON."""
    facts: list[Fact] = [
        Accepted("7"),
        Refused(gws("http", 500)),
        NotAnswered(sent=True, system=System.GWS),
        Reported(gws("ErrorMessage"), Leg.AGENT),
        NoojeeStatus("Busy", inbound=True),
        CallRecord("busy", "17", 0.0),
        HangupRequested(),
        Elapsed(),
    ]
    assert msgspec.json.decode(msgspec.json.encode(facts), type=list[dialling.Fact]) == facts
    whole = ended(dial(), Accepted(), DIALS_OUT, Reported(gws("CallState", 6)), ENDS)
    assert msgspec.json.decode(msgspec.json.encode(whole), type=Dial) == whole


# ── Overheard ─────────────────────────────────────────────────────────────────────────────────────────


def heard_states(*states: str) -> list[Call]:
    """The call after each of these messages, as the fold itself makes it."""
    calls: dict[int, Call] = {}
    course = []
    for number, state in enumerate(states, 1):
        heard = Heard(1, "a stream", number, at(number), CHANNEL, message(state))
        for step in Board(calls.values()).hear(number, heard, decode(heard.raw, CHANNEL)):
            calls[step.call.id] = step.call
            course.append(step.call)
    return course


@pytest.mark.parametrize(
    ("states", "outcome", "confidence"),
    [
        (("Dialing", "Established", "Released"), O.ANSWERED, Confidence.STATED),
        (("Dialing", "Established", "Held", "Established", "Released"), O.ANSWERED, Confidence.STATED),
        (("Dialing", "Held", "Dialing", "Released"), O.UNKNOWN, Confidence.INFERRED),
        (("Dialing", "Released"), O.UNKNOWN, Confidence.INFERRED),
    ],
)
def test_an_overheard_call_is_a_dial(
    states: tuple[str, ...], outcome: Outcome, confidence: Confidence
) -> None:
    """A call that begins in Dialing, from the messages themselves to its outcome."""
    course = heard_states(*states)
    found = overheard(course[0])
    assert found is not None
    assert (found.origin, found.state, found.number) == (Origin.OVERHEARD, DialState.DIALING, "7023")
    assert (found.call, found.id) == (course[0].id, f"call-{course[0].id}")
    assert found.requested_at == course[0].opened_at
    after = ended(found, *[CallHeard(call) for call in course])
    assert (after.outcome, after.confidence) == (outcome, confidence)
    assert after.ended_at == course[-1].ended_at


def test_a_call_that_was_rung_is_no_dial() -> None:
    """Inbound, or met in talk: nobody is known to have dialled."""
    assert overheard(heard_states("Ringing")[0]) is None
    assert overheard(heard_states("Established")[0]) is None


def test_an_end_that_was_only_concluded_is_inferred() -> None:
    """A call that was no longer live after a gap: what was heard of it decides, inferred."""
    gone = CallHeard(
        leg(State.ESTABLISHED, established_s=5, settled="inferred: no longer among the live calls")
    )
    after = ended(dial(), gone)
    assert (after.outcome, after.confidence, after.ended_at) == (O.ANSWERED, Confidence.INFERRED, at(1))


# ── For any facts ─────────────────────────────────────────────────────────────────────────────────────

causes = st.builds(
    Cause,
    system=st.sampled_from(System),
    field=st.sampled_from([*FIELDS, "other"]),
    code=st.sampled_from(sorted({code for codes in FIELDS.values() for code in codes}))
    | st.text(max_size=5)
    | st.integers(-3, 1200).map(str),
    text=st.sampled_from(["", "Expired TimeStamp", "Device '1' is not registered."]),
)
calls = st.builds(
    leg,
    state=st.sampled_from([*State, "Parked", ""]),
    established_s=st.none() | st.floats(0, 50),
    ended_s=st.none() | st.floats(0, 50),
    direction=st.sampled_from(Direction),
    settled=st.none() | st.just("released"),
    id=st.sampled_from([CALL, CALL, CALL + 1]),
)
facts_of_any_kind: st.SearchStrategy[Fact] = st.one_of(
    st.builds(Accepted, session=st.none() | st.text(max_size=3)),
    st.builds(Refused, cause=causes),
    st.builds(NotAnswered, sent=st.booleans(), system=st.sampled_from(System)),
    st.builds(CallHeard, call=calls, cause=st.none() | causes),
    st.builds(Reported, cause=causes, leg=st.none() | st.sampled_from(Leg)),
    st.builds(
        NoojeeStatus,
        status=st.sampled_from([*FIELDS["status"], "Sparkling"]),
        inbound=st.booleans(),
    ),
    st.builds(
        CallRecord,
        end_reason=st.sampled_from(["hungup", "busy", "reject", "error", "timeout", "?"]),
        end_code=st.sampled_from(["", "0", "16", "17", "19", "102", "x"]),
        call_time_s=st.none() | st.floats(),
    ),
    st.just(HangupRequested()),
    st.just(Elapsed()),
)
courses = st.lists(facts_of_any_kind, max_size=12)
dials = st.builds(dial, st.sampled_from(System))


@given(dials, courses)
def test_it_ends_once_and_by_its_deadline(start: Dial, facts: list[Fact]) -> None:
    """Total; one end at most; until then always a deadline, no later than that of the whole dial."""
    after, steps = through(start, *facts)
    last = at(DEADLINES.dial_s)
    for step in steps:
        assert (step.dial.deadline_at is None) == (step.dial.outcome is not None)
        assert step.dial.deadline_at is None or step.dial.deadline_at <= last
    step = advance(after, Elapsed(), last)
    steps.append(step)
    assert [each.ended for each in steps].count(True) == 1
    assert [each.corrected for each in steps].count(True) <= 1
    assert [each.connected for each in steps].count(True) <= 1
    assert step.dial.state is DialState.ENDED
    assert step.dial.leg is not None
    assert step.dial.retry is not None


@given(dials, courses)
def test_an_outcome_stands(start: Dial, facts: list[Fact]) -> None:
    """What has an outcome keeps all of it, but for unknown, which changes into one other, once."""
    outcomes: list[Outcome] = []
    known: Dial | None = None
    for second, fact in enumerate(facts):
        start = advance(start, fact, at(second)).dial
        if known is not None:
            assert start == known
        if start.outcome is not None and start.outcome not in outcomes:
            outcomes.append(start.outcome)
        if start.outcome not in (None, O.UNKNOWN):
            known = start
    assert len(outcomes) <= 2
    assert len(outcomes) < 2 or outcomes[0] is O.UNKNOWN


@given(dials, courses)
def test_the_same_facts_again_change_nothing(start: Dial, facts: list[Fact]) -> None:
    """Replay: each fact twice, and all of them once more from the beginning, leave the dial as it is."""
    after, _ = through(start, *facts)
    doubled = start
    for second, fact in enumerate(facts, 1):
        doubled = advance(doubled, fact, at(second)).dial
        assert not advance(doubled, fact, at(second)).changed
    assert doubled == after
    again, steps = through(after, *facts)
    assert again == after
    assert not any(step.changed for step in steps)


@given(st.lists(causes, min_size=1, max_size=5))
def test_of_specific_causes_the_first_wins(said: list[Cause]) -> None:
    """Whatever is said while it dials, in any number: the outcome is that of the first that names one."""
    first = next((cause for cause in said if meaning(cause).says is Says.OUTCOME), None)
    after, _ = through(dial(), DIALS_OUT, *[Reported(cause) for cause in said], ENDS)
    if first is None:
        assert after.outcome in (None, O.UNKNOWN, O.FAILED, O.CANCELLED)
    else:
        assert after.cause == first
        found = meaning(first)
        assert after.outcome is (found.silent or found.outcome)


@given(causes)
def test_between_dialing_and_the_end_order_is_nothing(cause: Cause) -> None:
    """The acknowledgement, one cause, the answer and our hang-up may come in any order: one outcome."""
    if meaning(cause).says is Says.PROGRESS:
        return
    unordered: list[Fact] = [Accepted(), Reported(cause), HangupRequested(), ANSWERS]
    ends = {ended(dial(), DIALS_OUT, *some, ENDS_ANSWERED).outcome for some in permutations(unordered)}
    assert len(ends) == 1
    del unordered[-1]
    after = [through(dial(), DIALS_OUT, *some, ENDS)[0].outcome for some in permutations(unordered)]
    assert len(set(after)) == 1


# ── Numbers ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("written", "country", "digits"),
    [
        ("0820001234", "27", "27820001234"),
        ("27820001234", "27", "27820001234"),
        ("0027820001234", "27", "27820001234"),
        ("+27 82 000 1234", "27", "27820001234"),
        ("0820001234", None, "0820001234"),
        ("+1 (916) 555-0104", None, "19165550104"),
        ("sip:5001@10.0.0.1", None, "5001"),
        ("tel:+27820001234;ext=1", None, "27820001234"),
        ("5001", "27", "5001"),
        ("*98", None, "*98"),
        ("Anonymous", None, "anonymous"),
        ("", None, ""),
    ],
)
def test_numbers_are_normalised(written: str, country: str | None, digits: str) -> None:
    """Punctuation, schemes, 00 and + are spelling; national numbers need their country."""
    assert normalised(written, country) == digits


@pytest.mark.parametrize(
    ("one", "other", "country", "same"),
    [
        ("0820001234", "+27820001234", "27", True),
        ("0820001234", "0027820001234", "27", True),
        ("0820001234", "+27820001234", None, True),
        ("90820001234", "0820001234", None, True),
        ("0383208100", "61383208100", None, True),
        ("0820001234", "0820001235", None, False),
        ("+27820001234", "+61820001234", None, False),
        ("5001", "5001", None, True),
        ("5001", "0115005001", None, False),
        ("001", "1", None, False),
        ("", "", None, False),
        ("anonymous", "ANONYMOUS", None, True),
    ],
)
def test_two_spellings_of_one_number(one: str, other: str, country: str | None, same: bool) -> None:
    """Compared from the end, as far as enough digits are there; extensions must be equal."""
    assert same_number(one, other, country) is same
    assert same_number(other, one, country) is same


@given(st.text(max_size=20), st.text(max_size=20), st.none() | st.just("27"))
def test_numbers_may_be_anything(one: str, other: str, country: str | None) -> None:
    """Total; what is normalised stays as it is; and comparing knows no direction."""
    first = normalised(one, country)
    assert same_number(one, other, country) == same_number(other, one, country)
    assert same_number(one, one, country) == (first != "")


@pytest.mark.parametrize(
    ("device", "digits"),
    [("SIP/410-12FA7B", "410"), ("SIP/100", "100"), ("100", "100"), ("PJSIP/7", "7"), ("a-b-c", "a-b-c")],
)
def test_extensions(device: str, digits: str) -> None:
    """A PBX writes an extension with its technology and a channel's id; a device's id is left alone."""
    assert extension(device) == digits


# ── Errors that name nothing ──────────────────────────────────────────────────────────────────────────


def test_an_error_is_about_the_only_dial_that_it_can_be_about() -> None:
    """It names neither call nor request. What began already may have failed as well, also when its deadline
    is over; another account's, another system's and what was asked for later cannot be meant."""
    error, waits = gws("ErrorMessage", ""), waiting("a")
    apart = [
        waiting("noojee", system=System.NOOJEE),
        waiting("later", second=5),
        structs.replace(expired(), id="old", requested_at=at(3 - CALL_WINDOW_S)),
        ended(waiting("over"), DIALS_OUT, ENDS),
    ]
    assert blamed([waits, *apart], error, at(4)) == waits
    talking, _ = through(waiting("b"), DIALS_OUT, ANSWERS)
    late, _ = through(structs.replace(expired(), id="c"), DIALS_OUT)
    for other in (talking, late, waiting("d"), structs.replace(expired(), id="e")):
        assert blamed([waits, other], error, at(4)) is None
        assert blamed([other], error, at(4)) == (
            other if (other.outcome, other.call) == (None, None) else None
        )
    assert blamed([], error, at(4)) is None


# ── Matching ──────────────────────────────────────────────────────────────────────────────────────────


def waiting(id: str, number: str = "0820001234", second: float = 0, **fields: Any) -> Dial:
    """A dial that waits for its call."""
    fields = {"device": "101", "reference": None, "system": System.GWS, **fields}
    return placed(id, 1, fields.pop("system"), number, at(second), **fields)


def seen(**fields: Any) -> Sighting:
    """A call that was heard two seconds after the request."""
    given_fields = {"number": "+27820001234", "device": "101", "account": 1, **fields}
    return Sighting(given_fields.pop("system", System.GWS), given_fields.pop("at", at(2)), **given_fields)


@pytest.mark.parametrize(
    ("candidate", "sight", "evidence", "confidence"),
    [
        (
            waiting("a", reference="r1"),
            seen(reference="r1"),
            (Evidence.REFERENCE, Evidence.NUMBER, Evidence.DEVICE, Evidence.TIME),
            MatchConfidence.CERTAIN,
        ),
        (
            waiting("a", reference="r1"),
            seen(reference="r1", number="55501", device=None, at=at(900)),
            (Evidence.REFERENCE,),
            MatchConfidence.CERTAIN,
        ),
        (
            waiting("a", reference="r1"),
            seen(),
            (Evidence.NUMBER, Evidence.DEVICE, Evidence.TIME),
            MatchConfidence.STRONG,
        ),
        (waiting("a"), seen(device=None), (Evidence.NUMBER, Evidence.TIME), MatchConfidence.WEAK),
    ],
)
def test_a_match_says_what_speaks_for_it(
    candidate: Dial, sight: Sighting, evidence: tuple[Evidence, ...], confidence: MatchConfidence
) -> None:
    """Each kind of evidence by its name, and how sure that makes us."""
    found = match([candidate, waiting("z", number="0119998877", device="999")], sight)
    assert found.dial is candidate
    assert (found.evidence, found.confidence) == (evidence, confidence)


@pytest.mark.parametrize(
    "sight",
    [
        seen(number="0119998877"),
        seen(device="999"),
        seen(system=System.NOOJEE),
        seen(account=2),
        seen(at=at(61)),
        seen(at=at(-3)),
        seen(reference="another's"),
        seen(number=None, device=None),
        seen(number=None),
    ],
)
def test_what_contradicts_excludes(sight: Sighting) -> None:
    """Another number, device, system, account, time or reference; the time alone is no evidence, nor is the
    device in time: somebody else may call there just then."""
    found = match([waiting("a", reference="r1")], sight)
    assert (found.dial, found.evidence, found.confidence) == (None, (), MatchConfidence.NONE)
    assert found.candidates == ()


@pytest.mark.parametrize(
    ("sight", "agree"),
    [
        (seen(), True),
        (seen(number=None), True),
        (seen(number="15002", also=("27820001234",)), True),
        (seen(number="0119998877"), False),
        (seen(device="999"), True),
    ],
)
def test_a_later_report_of_a_known_call_agrees_unless_it_names_another_number(
    sight: Sighting, agree: bool
) -> None:
    """A leg that showed no number may turn out to lead elsewhere; one that shows none says nothing."""
    assert agrees(waiting("a"), sight) is agree
    assert agrees(waiting("a", number=""), sight)


def test_equal_candidates_are_ambiguous() -> None:
    """The same number twice from the same device: both are named and neither is chosen, not even by time."""
    early, late = waiting("a"), waiting("b", second=1)
    found = match([late, early], seen())
    assert (found.dial, found.confidence) == (None, MatchConfidence.AMBIGUOUS)
    assert found.candidates == (early, late)
    assert found.evidence == (Evidence.NUMBER, Evidence.DEVICE, Evidence.TIME)
    told = linked(early, found, CALL)
    assert (told.call, told.match_confidence) == (None, MatchConfidence.AMBIGUOUS)


def test_a_reference_decides_between_equals_unless_it_is_shared() -> None:
    """Teleforge keeps one contact_ref for all calls to one callee: then the number decides, or nothing."""
    one, two = (waiting(id, system=System.CLICK2DIAL, reference=id) for id in ("r1", "r2"))
    record = seen(system=System.CLICK2DIAL, reference="r2", at=at(3_000), window_s=DEADLINES.dial_s)
    assert match([one, two], record).dial is two
    shared = [structs.replace(each, reference="r") for each in (one, two)]
    assert match(shared, structs.replace(record, reference="r")).confidence is MatchConfidence.AMBIGUOUS
    shared[0] = structs.replace(shared[0], number="0119998877")
    assert match(shared, structs.replace(record, reference="r")).dial == shared[1]


def test_a_call_is_recognised_by_what_we_attached() -> None:
    """A Genesys dial carries its reference in userData; what others put there is no reference."""
    call = leg(user_data={REFERENCE_KEY: "r1"}, number="5001", device_id="101")
    found = match([waiting("a", number="5001", reference="r1")], sighting(call))
    assert found.confidence is MatchConfidence.CERTAIN
    assert found.dial is not None
    told = linked(found.dial, found, call.id)
    assert (told.call, told.matched_by[0]) == (CALL, Evidence.REFERENCE)
    assert linked(told, match([], seen()), 99) == told
    assert sighting(leg(user_data={REFERENCE_KEY: {"a": 1}})).reference is None


def test_any_number_of_the_callee_may_agree() -> None:
    """A switch may show another spelling than the one that was dialled: either agrees, a third does not."""
    call = leg(number="15002", dnis="0820001234", device_id=None, phone_number="7010")
    assert match([waiting("a")], sighting(call)).confidence is MatchConfidence.WEAK
    assert match([waiting("a", number="0119998877")], sighting(call)).dial is None
    (played,) = heard_states("Dialing")
    assert (sighting(played).number, sighting(played).device) == ("7023", played.device_id)


def test_click2dial_numbers_are_south_african() -> None:
    """National and international spellings are one number, and another country's is not."""
    candidate = waiting("a", system=System.CLICK2DIAL, device="101")
    assert match([candidate], seen(system=System.CLICK2DIAL, number="27820001234")).dial is candidate
    assert match([candidate], seen(system=System.CLICK2DIAL, number="61820001234")).dial is None


@given(
    st.lists(st.sampled_from(["0820001234", "0820009999"]), min_size=1, max_size=5),
    st.sampled_from([None, "27820001234"]),
    st.sampled_from([None, "101"]),
)
def test_a_match_is_never_a_guess(numbers: list[str], number: str | None, device: str | None) -> None:
    """A dial is chosen only if it is alone with the best evidence; in any order of the candidates."""
    dials_waiting = [waiting(str(place), each, second=place) for place, each in enumerate(numbers)]
    found = match(dials_waiting, seen(number=number, device=device, at=at(6)))
    assert found == match(dials_waiting[::-1], seen(number=number, device=device, at=at(6)))
    assert found.dial is None or number is not None
    assert (found.dial is not None) == (len(found.candidates) == 1)
    assert (found.confidence is MatchConfidence.AMBIGUOUS) == (len(found.candidates) > 1)


def test_what_was_not_sent_was_not_refused_by_an_error_before_it() -> None:
    """The error was of something else: no request of this dial reached anybody."""
    after = ended(dial(), Reported(gws("ErrorCode", 415)), NotAnswered(sent=False, system=System.GWS))
    assert after.cause is not None
    assert (after.outcome, after.cause.field, after.cause.code) == (O.FAILED, "request", "not sent")
