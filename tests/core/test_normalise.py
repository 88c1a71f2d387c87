"""The fold: what each message does to a call, and what holds whatever the messages are."""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from listener.core.calls import (
    ANOMALY_KINDS,
    CHANGE_FIELDS,
    OPENING_FIELDS,
    Aside,
    Call,
    Closing,
    Decoded,
    Direction,
    Heard,
    Notification,
    Outcome,
    Party,
    Snapshot,
    Source,
    State,
    Step,
    Unrecognised,
)
from listener.core.decode import decode
from listener.core.normalise import (
    INFERRED_NOT_LIVE,
    NO_WRAP_UP_END,
    NOTIFICATION_TYPES,
    TRANSITIONS,
    Board,
    closes,
    diagram,
    ids,
    ids_needed,
)
from tests.core.messages import (
    ABSENT,
    CHANNEL,
    CONN,
    DN,
    NUMBER,
    UUID,
    JsonObject,
    bayeux,
    encoded,
    in_data,
    message,
    resource,
    snapshot,
    stamped,
    v3,
)

ACCOUNT = 7
STARTED = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)
FIGURES = ("ring_s", "talk_s", "hold_s", "hold_count", "outcome", "ended_at", "established_at")


class Memory:
    """What the store keeps between two batches: the calls, and which one each id names (the newest)."""

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}
        self.named: dict[tuple[int, str], int] = {}

    def board(self, batch: Iterable[tuple[Heard, Decoded]]) -> Board:
        """A board for a batch, with the calls that its contract asks for, read back from what was written."""
        wanted: set[int] = set()
        for heard, decoded in batch:
            wanted |= {
                self.named[heard.account, name]
                for name in ids(decoded)
                if (heard.account, name) in self.named
            }
            wanted |= {id for id in closes(heard, decoded) if id in self.calls}
            if isinstance(decoded, Snapshot):
                wanted |= {c.id for c in self.calls.values() if c.account == heard.account and c.open}
        written = msgspec.json.encode([self.calls[id] for id in wanted])
        return Board(msgspec.json.decode(written, type=list[Call]))

    def keep(self, steps: Iterable[Step]) -> None:
        """Write what a batch came to."""
        for call in sorted((step.call for step in steps), key=lambda call: call.id):
            self.calls[call.id] = call
            for alias in call.aliases:
                self.named[call.account, alias] = max(call.id, self.named.get((call.account, alias), 0))


class Listening:
    """One account that is listened to: hears messages one after the other and remembers what they did."""

    def __init__(self) -> None:
        self.board = Board([])
        self.now = STARTED
        self.next_id = 100
        self.steps: list[Step] = []

    def hear(
        self,
        raw: bytes | JsonObject | Decoded,
        after_s: float = 0,
        *,
        account: int = ACCOUNT,
        asked_at: datetime | None = None,
        source: Source | None = None,
    ) -> list[Step]:
        """One message, so many seconds after the last."""
        self.now += timedelta(seconds=after_s)
        if isinstance(raw, dict):
            raw = encoded(raw)
        decoded = decode(raw, CHANNEL) if isinstance(raw, bytes) else raw
        source = source or (Source.COMETD if asked_at is None else Source.SNAPSHOT)
        heard = Heard(account, "stream", self.next_id, self.now, CHANNEL, b"", source, asked_at)
        steps = self.board.hear(self.next_id, heard, decoded)
        self.next_id += ids_needed(decoded)
        self.steps += steps
        return steps

    def step(self, raw: bytes | JsonObject | Decoded, after_s: float = 0) -> Step:
        """As `hear`, where the message is about one call."""
        (step,) = self.hear(raw, after_s)
        return step

    def ask(self, *calls: JsonObject, after_s: float = 1, took_s: float = 0.2, status: int = 0) -> list[Step]:
        """A snapshot that was asked for after so many seconds and answered so many later."""
        asked_at = self.now + timedelta(seconds=after_s)
        return self.hear(snapshot(*calls, status=status), after_s + took_s, asked_at=asked_at)

    def close(self, *calls: Call, silent_s: float, source: Source = Source.LISTENER) -> list[Step]:
        """We find, now, that nothing was heard of these for so many seconds."""
        since = self.now - timedelta(seconds=silent_s)
        closing = Closing(tuple(call.id for call in calls), "silent")
        return self.hear(closing, asked_at=since, source=source)

    def goes(self, *states: tuple[str, float]) -> Call:
        """States of the one call, each so many seconds after the one before; answers the call."""
        for state, after_s in states:
            self.hear(message(state), after_s)
        return self.call

    @property
    def call(self) -> Call:
        """The call that was heard of last, as of its last message."""
        return self.steps[-1].call


def kinds(step: Step) -> list[str]:
    """The kinds of a step's anomalies."""
    return [odd.kind for odd in step.anomalies]


def changes(step: Step, field: str) -> list[tuple[str, Any, Any]]:
    """What a step changed of one field: key, before, after."""
    return [(change.key, change.before, change.after) for change in step.changes if change.field == field]


# ── States and transitions ────────────────────────────────────────────────────────────────────────────


def test_the_table_is_whole() -> None:
    """Every known state has a row and, but for the two ends, somewhere to go; Released is always near."""
    assert set(TRANSITIONS) == {None, *State}
    assert all(row for state, row in TRANSITIONS.items() if state is not State.COMPLETED)
    ongoing = [State.DIALING, State.RINGING, State.ESTABLISHED, State.HELD]
    assert all(State.RELEASED in TRANSITIONS[state] for state in (None, *ongoing))
    assert all(
        label == label.strip().lower() and label for row in TRANSITIONS.values() for label in row.values()
    )


def test_the_diagram_is_the_table() -> None:
    """No arrow more, no arrow less, each with its words; the two ends lead out."""
    first, *lines = diagram().splitlines()
    assert first == "stateDiagram-v2"
    drawn = set()
    for line in lines:
        arrow, _, label = line.strip().partition(": ")
        before, after = arrow.split(" --> ")
        drawn.add((before, after, label))
    expected = {
        (str(before or "[*]"), str(after), label)
        for before, row in TRANSITIONS.items()
        for after, label in row.items()
    }
    assert drawn == expected | {("Released", "[*]", ""), ("Completed", "[*]", "")}
    assert len(lines) == len(drawn)


WAYS_IN: dict[State, tuple[str, ...]] = {
    State.DIALING: ("Dialing",),
    State.RINGING: ("Ringing",),
    State.ESTABLISHED: ("Ringing", "Established"),
    State.HELD: ("Ringing", "Established", "Held"),
    State.RELEASED: ("Ringing", "Released"),
    State.COMPLETED: ("Ringing", "Released", "Completed"),
}


@pytest.mark.parametrize(("before", "after"), list(itertools.product(State, State)))
def test_each_transition(before: State, after: State) -> None:
    """Each pair of states: silent in the table; else noted, and applied unless the call is over."""
    line = Listening()
    for state in WAYS_IN[before]:
        line.hear(v3(state), 1)
    assert line.call.state == before
    was = line.call
    step = line.step(v3(after), 1)
    if before == after:
        assert (kinds(step), changes(step, "state")) == ([], [])
    elif before in (State.RELEASED, State.COMPLETED) and after in (State.DIALING, State.RINGING):
        assert kinds(step) == ["id_reused"]
        assert step.call.id != was.id
    elif before in (State.RELEASED, State.COMPLETED) and after not in TRANSITIONS[before]:
        assert kinds(step) == ["after_end"]
        assert (step.call.state, changes(step, "state")) == (before, [])
    else:
        assert kinds(step) == ([] if after in TRANSITIONS[before] else ["impossible_transition"])
        assert step.call.state == after
        assert changes(step, "state") == [("", before, after)]


@pytest.mark.parametrize(
    "life",
    [
        "Dialing Established Released",
        "Dialing Released",
        "Dialing Held Dialing Established Held Established Released",
        "Dialing Held Released",
        "Dialing Held Established Released",
        "Ringing Established Held Established Released Completed",
        "Ringing Established Held Released",
        "Ringing Released Completed",
        "Established Released",
        "Held Established Released",
        "Held Dialing Released",
        "Released Completed",
    ],
)
def test_ordinary_lives(life: str) -> None:
    """What calls do every day is nothing odd."""
    line = Listening()
    for state in life.split():
        assert kinds(line.step(v3(state), 1)) == []
    assert legs(line) == 1
    assert line.call.state == life.rsplit(maxsplit=1)[-1]


@pytest.mark.parametrize(
    "life",
    [
        "Dialing Ringing",
        "Ringing Dialing",
        "Ringing Held",
        "Established Dialing",
        "Established Ringing",
        "Held Ringing",
        "Dialing Completed",
        "Ringing Completed",
        "Established Completed",
        "Held Completed",
    ],
)
def test_impossible_turns(life: str) -> None:
    """Something was not heard, or the server is wrong: the call follows, and says so."""
    line = Listening()
    first, second = life.split()
    line.hear(v3(first))
    assert kinds(line.step(v3(second), 1)) == ["impossible_transition"]
    assert line.call.state == second


@pytest.mark.parametrize("first", State)
def test_each_beginning(first: State) -> None:
    """A call may be met in any state; what the table does not know is noted and taken all the same."""
    line = Listening()
    step = line.step(message(first))
    assert step.began
    assert step.call.state == first
    assert changes(step, "state") == [("", None, first)]
    assert kinds(step) == ([] if first in TRANSITIONS[None] else ["impossible_transition"])
    assert step.ended is (first in (State.RELEASED, State.COMPLETED))
    assert step.call.open is not step.ended


def test_unknown_states_are_followed() -> None:
    """They are noted each time and break nothing: the known states around them keep their durations."""
    line = Listening()
    line.hear(message("Ringing"))
    step = line.step(message("Queued"), 5)
    assert kinds(step) == ["unknown_state"]
    assert step.call.state == "Queued"
    assert step.call.ring_s == 5
    step = line.step(message("Established"), 7)
    assert kinds(step) == []
    assert changes(step, "state") == [("", "Queued", "Established")]
    line.hear(message("Released"), 11)
    assert (line.call.ring_s, line.call.talk_s, line.call.outcome) == (5, 11, Outcome.ANSWERED)


def test_a_call_can_be_met_in_an_unknown_state() -> None:
    """Its direction is not guessed."""
    step = Listening().step(message("Queued"))
    assert kinds(step) == ["unknown_state"]
    assert (step.call.state, step.call.direction) == ("Queued", Direction.UNKNOWN)


def test_a_call_can_be_met_without_a_state() -> None:
    """It is opened, noted, and takes the state of the next message as a change from nothing."""
    line = Listening()
    step = line.step({"call": {"id": UUID}, "notificationType": "StatusChange"})
    assert kinds(step) == ["malformed_field"]
    assert (step.call.state, step.began, changes(step, "state")) == ("", True, [])
    step = line.step(message("Ringing"), 3)
    assert changes(step, "state") == [("", None, "Ringing")]
    assert kinds(step) == []


def test_unknown_notification_types_are_taken_like_others() -> None:
    """They are noted; their content counts."""
    step = Listening().step(message("Ringing", "SomethingNew"))
    assert kinds(step) == ["unknown_notification_type"]
    assert step.call.state == "Ringing"


@pytest.mark.parametrize("kind", [*sorted(NOTIFICATION_TYPES), ""])
def test_known_notification_types_are_silent(kind: str) -> None:
    """So is a message without one: a snapshot has none."""
    assert kinds(Listening().step(message("Ringing", kind))) == []


@pytest.mark.parametrize(
    "kind", ["ParticipantsUpdated", "AttachedDataChanged", "DtmfSent", "PropertiesUpdated"]
)
def test_any_notification_may_carry_a_new_state(kind: str) -> None:
    """A vendor's client notes that ParticipantsUpdated "can update other fields (like state)" too."""
    line = Listening()
    line.goes(("Ringing", 0))
    assert line.step(message("Established", kind), 4).call.ring_s == 4
    assert line.call.state == "Established"


# ── Durations and figures ─────────────────────────────────────────────────────────────────────────────


def test_durations_add_up() -> None:
    """Ring, talk and hold are what lay between the messages, over all stretches."""
    call = Listening().goes(
        ("Ringing", 0), ("Established", 4), ("Held", 10), ("Established", 3), ("Held", 20), ("Released", 5)
    )
    assert (call.ring_s, call.talk_s, call.hold_s, call.hold_count) == (4, 30, 8, 2)
    assert call.established_at == STARTED + timedelta(seconds=4)
    assert call.ended_at == STARTED + timedelta(seconds=42)
    assert (call.opened_at, call.state_since) == (STARTED, call.ended_at)


def test_repeating_a_state_begins_nothing() -> None:
    """A message that says what is known already neither ends a stretch nor counts a hold."""
    call = Listening().goes(("Ringing", 0), ("Established", 1), ("Held", 1), ("Held", 1), ("Established", 1))
    assert (call.hold_s, call.hold_count) == (2, 1)


@pytest.mark.parametrize(
    ("states", "direction", "outcome"),
    [
        (("Dialing", "Released"), Direction.OUTBOUND, Outcome.UNANSWERED),
        (("Ringing", "Released"), Direction.INBOUND, Outcome.UNANSWERED),
        (("Dialing", "Established", "Released"), Direction.OUTBOUND, Outcome.ANSWERED),
        (("Ringing", "Established", "Released"), Direction.INBOUND, Outcome.ANSWERED),
        (("Ringing", "Established", "Held", "Released"), Direction.INBOUND, Outcome.ANSWERED),
        (("Dialing", "Held", "Dialing", "Released"), Direction.OUTBOUND, Outcome.UNANSWERED),
        (("Dialing", "Held", "Released"), Direction.OUTBOUND, Outcome.UNANSWERED),
        (("Dialing", "Held", "Established", "Released"), Direction.OUTBOUND, Outcome.ANSWERED),
        (("Established", "Released"), Direction.UNKNOWN, Outcome.ANSWERED),
        (("Held", "Released"), Direction.UNKNOWN, Outcome.ANSWERED),
        (("Released",), Direction.UNKNOWN, Outcome.UNKNOWN),
        (("Queued", "Released"), Direction.UNKNOWN, Outcome.UNKNOWN),
        (("Completed",), Direction.UNKNOWN, Outcome.UNKNOWN),
    ],
)
def test_direction_and_outcome(states: Sequence[str], direction: Direction, outcome: Outcome) -> None:
    """Who began is told by the first state; whether it was answered, by whether it was ever talked."""
    call = Listening().goes(*((state, 1) for state in states))
    assert (call.direction, call.outcome) == (direction, outcome)


def test_a_call_that_goes_on_has_no_outcome() -> None:
    """Nor an end, nor a reason to be settled."""
    call = Listening().goes(("Ringing", 0), ("Established", 1), ("Held", 1))
    assert (call.outcome, call.ended_at, call.settled) == (None, None, None)


def test_v2_settles_with_released() -> None:
    """Nothing follows when no wrap-up is due."""
    call = Listening().goes(("Ringing", 0), ("Released", 1))
    assert (call.settled, call.wrap_s) == ("released", None)


def test_v3_settles_with_completed() -> None:
    """The time from Released to Completed is the wrap."""
    line = Listening()
    line.hear(v3("Ringing"))
    line.hear(v3("Established"), 2)
    released = line.step(v3("Released"), 3)
    assert released.ended
    assert (released.call.settled, released.call.outcome) == (None, Outcome.ANSWERED)
    completed = line.step(v3("Completed"), 30)
    assert not completed.ended
    assert (completed.call.settled, completed.call.wrap_s, completed.call.state) == (
        "completed",
        30,
        "Completed",
    )
    assert completed.call.ended_at == released.call.ended_at


def test_completed_without_released_ends_the_call() -> None:
    """Then there is no wrap to speak of."""
    line = Listening()
    line.hear(v3("Ringing"))
    step = line.step(v3("Completed"), 3)
    assert step.ended
    assert (step.call.settled, step.call.wrap_s, step.call.ring_s) == ("completed", None, 3)


def test_a_call_that_is_due_for_wrap_up_is_not_settled() -> None:
    """WrapUpTime is kept as the server says it; 0 means none."""
    line = Listening()
    line.hear(bayeux(in_data(resource("Ringing"), extensions={"WrapUpTime": 15})))
    assert line.call.wrap_up_time_s == 15
    line.hear(message("Released"), 1)
    assert (line.call.settled, line.call.open) == (None, False)
    other = Listening()
    other.hear(bayeux(in_data(resource("Ringing"), extensions={"WrapUpTime": 0})))
    other.hear(message("Released"), 1)
    assert other.call.settled == "released"


@pytest.mark.parametrize("value", ["15", True, None, [], {}, 10**400])
def test_wrap_up_time_that_is_no_number(value: Any) -> None:
    """It is left out."""
    heard = Notification("CallStateChangeMessage", "", "a", "Ringing", extensions={"WrapUpTime": value})
    assert Listening().step(heard).call.wrap_up_time_s is None


def test_a_clock_set_back_takes_nothing_away() -> None:
    """Durations never run backwards, and the call's times stay in order."""
    line = Listening()
    line.goes(("Ringing", 0), ("Established", 10), ("Held", -4), ("Established", 6), ("Released", 3))
    call = line.call
    assert call.ended_at is not None
    assert min(call.ring_s, call.talk_s, call.hold_s) >= 0
    assert call.ring_s + call.talk_s + call.hold_s <= (call.ended_at - call.opened_at).total_seconds()
    assert call.last_heard_at >= call.state_since >= call.opened_at


def test_the_servers_clock_is_kept_beside() -> None:
    """Its duration and its clock are those of the newest message that had them."""
    line = Listening()
    line.hear(message("Ringing", server_ms=1_772_438_400_000, duration="3"))
    line.hear(message("Ringing", duration=ABSENT))
    assert line.call.server_duration_s == 3
    assert line.call.server_at == datetime(2026, 3, 2, 8, 0, tzinfo=UTC)
    line.hear(message("Ringing", server_ms=1_772_438_399_000))
    assert line.call.server_at == datetime(2026, 3, 2, 8, 0, tzinfo=UTC)


# ── What a call opens with, and what changes ──────────────────────────────────────────────────────────


def test_what_a_call_opens_with() -> None:
    """Everything is taken over; the fields whose history begins with nothing say so as changes."""
    line = Listening()
    step = line.step(
        message(userData={"Case": "4"}, recordingState="Recording", ani="+4912", parentCallPath="/calls/P")
    )
    call = step.call
    assert (call.id, call.account, call.call_id) == (100, ACCOUNT, UUID)
    assert call.aliases == (UUID, CONN)
    assert (call.number, call.phone_number, call.ani, call.dnis) == (NUMBER, DN, "+4912", DN)
    assert (call.parent_call_id, call.call_type, call.mute) == ("P", "Internal", "Off")
    assert (call.opened_by, call.notifications, call.anomalies) == (Source.COMETD, 1, 0)
    assert call.parties == step.parties == (Party(0, NUMBER, "", NUMBER, "", STARTED),)
    assert [(change.field, change.key, change.before, change.after) for change in step.changes] == [
        ("state", "", None, "Ringing"),
        ("capabilities", "", None, sorted(call.capabilities)),
        ("participant", NUMBER, None, {"number": NUMBER, "formatted": NUMBER}),
        ("user_data", "Case", None, "4"),
        ("recording", "", None, "Recording"),
    ]


@pytest.mark.parametrize(
    ("field", "attribute", "before", "after"),
    [
        ("mute", "mute", "Off", "On"),
        ("recordingState", "recording", "Recording", "Paused"),
        ("supervisorListeningIn", "supervisor_listening_in", False, True),
        ("monitoredUserMuted", "monitored_user_muted", False, True),
        ("monitoring", "monitoring", True, False),
        ("callType", "call_type", "Internal", "Consult"),
        ("ani", "ani", "1", "2"),
        ("dnis", "dnis", "1", "2"),
        ("connId", "conn_id", "c1", "c2"),
        ("callUuid", "call_uuid", "u1", "u2"),
        ("parentConnId", "parent_call_id", "p1", "p2"),
    ],
)
def test_each_plain_field(field: str, attribute: str, before: Any, after: Any) -> None:
    """A change is recorded once; absence keeps what was known."""
    line = Listening()
    old, new, absent = ({field: value} for value in (before, after, ABSENT))
    line.hear(message(**old))
    assert getattr(line.call, attribute) == before
    step = line.step(message(**new))
    assert changes(step, attribute) == [("", before, after)]
    assert getattr(line.call, attribute) == after
    assert line.step(message(**new)).changes == ()
    assert line.step(message(**absent)).changes == ()
    assert getattr(line.call, attribute) == after


def test_the_number_of_the_phone() -> None:
    """It stands at the call or beside it, and is there in every message."""
    line = Listening()
    line.hear(message(phoneNumber="5001"))
    step = line.step(message(phoneNumber="5002"))
    assert changes(step, "phone_number") == [("", "5001", "5002")]


def test_the_supervisors_state() -> None:
    """It is an object on the wire and a word here."""
    line = Listening()
    line.hear(message(supervisorMonitoringState={"state": "ListenIn"}))
    step = line.step(message(supervisorMonitoringState={"state": "BargeIn"}))
    assert changes(step, "supervisor_monitoring_state") == [("", "ListenIn", "BargeIn")]


def test_capabilities_change_as_a_set() -> None:
    """Another order is no change; what is shown is sorted."""
    line = Listening()
    line.hear(message(capabilities=["Hold", "Hangup"]))
    assert line.step(message(capabilities=["Hangup", "Hold"])).changes == ()
    assert line.step(message(capabilities=ABSENT)).changes == ()
    step = line.step(message(capabilities=["Hangup", "Retrieve"]))
    assert changes(step, "capabilities") == [("", ["Hangup", "Hold"], ["Hangup", "Retrieve"])]
    assert changes(line.step(message(capabilities=[])), "capabilities") == [("", ["Hangup", "Retrieve"], [])]


@pytest.mark.parametrize(
    ("state", "fields", "number"),
    [
        ("Ringing", {}, NUMBER),
        ("Ringing", {"participants": [], "ani": "+4912"}, "+4912"),
        ("Dialing", {"participants": [], "dnis": "7099"}, "7099"),
        ("Ringing", {"participants": [], "dnis": "7099"}, None),
        ("Established", {"participants": [], "ani": "1", "dnis": "2"}, None),
        ("Ringing", {"participants": [{"other": 1}], "ani": "+4912"}, "+4912"),
        ("Ringing", {"participants": [], "ani": ""}, None),
    ],
)
def test_the_number_of_a_call(state: str, fields: JsonObject, number: str | None) -> None:
    """The first participant, else who rang or was dialled; not made up where the direction is unknown."""
    assert Listening().step(message(state, **fields)).call.number == number


def test_the_number_may_come_later() -> None:
    """A call that opens without one gets it from the first message that has it, and keeps it."""
    line = Listening()
    line.hear(message("Ringing", numbers=()))
    assert line.call.number is None
    line.hear(message("Ringing", numbers=("7031",)))
    line.hear(message("Ringing", numbers=("7032",)))
    assert line.call.number == "7031"


# ── Participants ──────────────────────────────────────────────────────────────────────────────────────


def on_the_call(call: Call) -> list[str]:
    """Who is there now."""
    return [party.number for party in call.parties if party.left_at is None]


def test_participants_join_and_leave() -> None:
    """Each list is a snapshot of who is there; a stay has its beginning and its end."""
    line = Listening()
    line.hear(message("Established", numbers=("7023",)))
    joined = line.step(message("Established", "ParticipantsUpdated", numbers=("7023", "7031")), 10)
    assert changes(joined, "participant") == [("7031", None, {"number": "7031", "formatted": "7031"})]
    assert [party.number for party in joined.parties] == ["7031"]
    left = line.step(message("Established", "ParticipantsUpdated", numbers=("7031",)), 5)
    assert changes(left, "participant") == [("7023", {"number": "7023", "formatted": "7023"}, None)]
    assert [(p.ordinal, p.number, p.left_at) for p in left.parties] == [(0, "7023", line.now)]
    assert on_the_call(left.call) == ["7031"]
    assert line.step(message("Established", participants=ABSENT), 5).parties == ()
    back = line.step(message("Established", "ParticipantsUpdated", numbers=("7031", "7023")), 5)
    assert [(p.ordinal, p.number) for p in back.parties] == [(2, "7023")]
    assert [p.ordinal for p in back.call.parties] == [0, 1, 2]


def test_the_same_number_twice_is_two_parties() -> None:
    """Two legs to one number each have their stay, and their changes do not mix."""
    line = Listening()
    line.hear(message("Established", numbers=("7023",)))
    twice = line.step(message("Established", numbers=("7023", "7023")), 1)
    assert on_the_call(twice.call) == ["7023", "7023"]
    ((key, before, _),) = changes(twice, "participant")
    assert before is None
    assert key != "7023"
    once = line.step(message("Established", numbers=("7023",)), 1)
    ((gone, _, after),) = changes(once, "participant")
    assert after is None
    assert gone in (key, "7023")
    assert on_the_call(once.call) == ["7023"]


def test_stays_of_one_number_within_one_instant() -> None:
    """Messages of one delivery have one time; two stays of a number that end with it are still two."""
    line = Listening()
    for numbers in [("7023",), ("7023", "7023"), (), ("7023",), ()]:
        line.hear(message("Established", numbers=numbers))
    assert_chained(line.steps)


def test_a_number_that_looks_like_a_key() -> None:
    """Whatever a number is made of, it is not taken for another stay."""
    line = Listening()
    for numbers in [("7", "7"), ("7", "7", "7#1"), ("7",), ("7#1", "7#1"), ("7#1",), ()]:
        line.hear(message("Established", numbers=numbers), 1)
    assert_chained(line.steps)


def test_another_order_of_participants_is_no_change() -> None:
    """Nor is another spelling of the details."""
    line = Listening()
    line.hear(message("Established", numbers=("7023", "7031")))
    assert line.step(message("Established", numbers=("7031", "7023"))).changes == ()


def test_the_end_ends_every_stay() -> None:
    """Those who were there at the end left with it; that is told with the end, not as changes of its own."""
    line = Listening()
    line.hear(message("Established", numbers=("7023", "7031")))
    line.hear(message("Established", numbers=("7023",)), 1)
    step = line.step(message("Released", numbers=("7023", "7040")), 1)
    assert [(p.ordinal, p.left_at) for p in step.parties] == [(0, line.now), (2, line.now)]
    assert on_the_call(step.call) == []
    late = line.step(message("Released", "ParticipantsUpdated", numbers=("7050",)), 1)
    assert late.call.parties == step.call.parties


# ── userData ──────────────────────────────────────────────────────────────────────────────────────────


def data_changes(
    before: JsonObject | None, after: Any, kind: str = "AttachedDataChanged"
) -> list[tuple[str, Any, Any]]:
    """What changes when userData goes from one to the other."""
    line = Listening()
    line.hear(message("Established", userData=ABSENT if before is None else before))
    step = line.step(message("Established", kind, userData=after))
    if after is not ABSENT:
        assert step.call.user_data == after
    return changes(step, "user_data")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, {"a": "1"}, [("a", None, "1")]),
        (None, {"a": "1"}, [("a", None, "1")]),
        ({"a": "1"}, {"a": "2"}, [("a", "1", "2")]),
        ({"a": "1", "b": "2"}, {"b": "2"}, [("a", "1", None)]),
        ({"a": "1", "b": "2"}, {"b": "3", "c": "4"}, [("b", "2", "3"), ("c", None, "4"), ("a", "1", None)]),
        ({"a": "1", "b": "2"}, {"b": "2", "a": "1"}, []),
        ({"a": {"x": [1]}}, {"a": {"x": [2]}}, [("a", {"x": [1]}, {"x": [2]})]),
        ({"n": 1}, {"n": "1"}, [("n", 1, "1")]),
        ({"n": 1}, {"n": 1.0}, []),
        ({"a": "1"}, {}, [("a", "1", None)]),
        ({"a": "1"}, ABSENT, [("a", "1", None)]),
        ({"a": None}, {"a": "1"}, [("a", None, "1")]),
        ({"a": "1"}, {"a": None}, [("a", "1", None)]),
        ({}, {"a": None}, []),
        ({"a": None}, {}, []),
    ],
)
def test_user_data_is_compared_key_by_key(
    before: JsonObject | None, after: Any, expected: list[tuple[str, Any, Any]]
) -> None:
    """Added, changed, removed: each key is one change; a JSON null is the absence of a value."""
    assert data_changes(before, after) == expected


@pytest.mark.parametrize("kind", [*sorted(NOTIFICATION_TYPES - {"AttachedDataChanged"}), "SomethingNew", ""])
def test_user_data_is_not_emptied_by_other_messages(kind: str) -> None:
    """A deletion that nobody made must never stand in a call's history."""
    assert data_changes({"a": "1"}, ABSENT, kind) == []


def test_repeated_keys_reach_the_call() -> None:
    """Both values, and an anomaly that says so."""
    line = Listening()
    line.hear(message("Established", userData={"a": "1"}))
    step = line.step(
        message("Established", "AttachedDataChanged", userData="@").replace(b'"@"', b'{"a":"1","a":"2"}')
    )
    assert changes(step, "user_data") == [("a", "1", ["1", "2"])]
    assert kinds(step) == ["duplicate_key"]
    assert step.call.anomalies == 1


# ── Which call it is ──────────────────────────────────────────────────────────────────────────────────


def legs(line: Listening) -> int:
    """How many calls there were."""
    return len({step.call.id for step in line.steps})


def test_ids_needed_are_what_is_used() -> None:
    """Each call that a snapshot opens has an id of its own, within those reserved."""
    line = Listening()
    first = line.next_id
    steps = line.ask(*(resource("Held", id=f"u{n}", connId=f"c{n}") for n in range(4)))
    used = [step.call.id for step in steps]
    assert len(set(used)) == 4
    assert all(first <= id < line.next_id for id in used)


def test_ids_are_all_that_name_a_call() -> None:
    """Without repeats, the id as received first."""
    one = Notification("", "", "a", call_uuid="b", conn_id="a", previous_conn_id="c")
    assert [*ids(one)] == ["a", "b", "c"]
    assert ids(Snapshot((one, Notification("", "", "d", conn_id="b")), True)) == ("a", "b", "c", "d")
    assert ids(Aside("x")) == ids(Unrecognised("y")) == ()
    assert [ids_needed(x) for x in (one, Snapshot((one, one), True), Aside("x"))] == [1, 3, 1]


def test_what_concerns_no_call_does_nothing() -> None:
    """Asides and what was not understood move nothing."""
    line = Listening()
    assert line.hear(Aside("ErrorMessage")) == line.hear(Unrecognised("?")) == []


def test_accounts_do_not_mix() -> None:
    """The same call heard by two accounts is two legs."""
    line = Listening()
    line.hear(message("Dialing"), account=1)
    line.hear(message("Ringing"), account=2)
    line.hear(message("Established"), account=1)
    assert [(step.call.account, step.call.state) for step in line.steps] == [
        (1, "Dialing"),
        (2, "Ringing"),
        (1, "Established"),
    ]
    assert legs(line) == 2


def test_an_id_that_was_a_conn_id() -> None:
    """A server that changes from connIds to callUuids in mid-call goes on with the same call."""
    line = Listening()
    line.hear(message("Ringing", id=CONN, callUuid=UUID))
    step = line.step(message("Established", id=UUID, callUuid=UUID, connId=CONN), 1)
    assert legs(line) == 1
    assert step.call.call_id == CONN
    assert step.call.aliases == (CONN, UUID)
    line.hear(message("Released", id=CONN, callUuid=ABSENT, connId=ABSENT), 1)
    assert legs(line) == 1
    assert not line.call.open


def test_a_snapshot_with_other_ids() -> None:
    """The REST page still shows connIds as ids: it means the calls that are known by callUuid."""
    line = Listening()
    line.hear(message("Established"))
    line.ask({"id": CONN, "state": "Established", "callUuid": UUID})
    line.hear(message("Released"), 1)
    assert legs(line) == 1


def test_an_id_that_changes() -> None:
    """When a transfer is completed, the consulted party's call takes the id of the first call (v3)."""
    line = Listening()
    line.hear(v3("Ringing", id="c2", callUuid="u2", connId="c2"))
    line.hear(v3("Established", id="c2", callUuid="u2", connId="c2"), 2)
    step = line.step(v3("Established", id="c1", callUuid="u1", connId="c1", previousConnId="c2"), 3)
    assert kinds(step) == ["id_changed"]
    assert legs(line) == 1
    assert set(step.call.aliases) == {"c2", "u2", "c1", "u1"}
    assert changes(step, "conn_id") == [("", "c2", "c1")]
    line.hear(v3("Released", id="c1", callUuid="u1", connId="c1"), 5)
    assert (legs(line), line.call.talk_s) == (1, 8)


def test_an_id_that_changes_to_one_that_had_ended() -> None:
    """The first call may have been here before; the message means the one whose id changed."""
    line = Listening()
    line.hear(v3("Ringing", id="c1", callUuid="u1", connId="c1"))
    line.hear(v3("Released", id="c1", callUuid="u1", connId="c1"), 1)
    line.hear(v3("Ringing", id="c2", callUuid="u2", connId="c2"), 1)
    step = line.step(v3("Established", id="c1", callUuid="u1", connId="c1", previousConnId="c2"), 1)
    assert kinds(step) == ["id_changed"]
    assert (step.call.call_id, step.call.state) == ("c2", "Established")
    line.hear(v3("Released", id="c1", callUuid="u1", connId="c1"), 1)
    assert line.call.id == step.call.id
    assert not line.call.open


def test_an_id_of_before_does_not_give_a_call_away() -> None:
    """A first call that names the consult as its previous id is not the consult: both go on."""
    line = Listening()
    line.hear(v3("Established", id="c1", callUuid="u1", connId="c1"))
    line.hear(v3("Dialing", id="c2", callUuid="u2", connId="c2"), 1)
    line.hear(v3("Established", id="c1", callUuid="u1", connId="c1", previousConnId="c2"), 1)
    step = line.step(v3("Released", id="c2", callUuid="u2", connId="c2"), 1)
    assert (step.call.call_id, step.call.open) == ("c2", False)
    assert line.step(v3("Held", id="c1", callUuid="u1", connId="c1"), 1).call.call_id == "c1"
    assert legs(line) == 2


def test_two_legs_of_one_call() -> None:
    """Under one callUuid, two connIds that are ids are two legs, whichever message comes when."""
    line = Listening()
    for state_a, state_b in [("Ringing", "Dialing"), ("Established", "Established"), ("Released", "Held")]:
        line.hear(message(state_a, id="A", connId="A", callUuid="U"), 1)
        line.hear(message(state_b, id="B", connId="B", callUuid="U"), 1)
    assert legs(line) == 2
    by_id = {step.call.call_id: step.call for step in line.steps}
    assert (by_id["A"].state, by_id["B"].state) == ("Released", "Held")


def test_two_legs_of_one_call_named_by_their_uuid() -> None:
    """A message that calls both by the callUuid says by its connId which one it means."""
    line = Listening()
    line.ask(
        {"id": "A", "state": "Held", "callUuid": "U"},
        {"id": "B", "state": "Dialing", "callUuid": "U"},
    )
    a = line.step(message("Established", id="U", connId="A"), 1)
    b = line.step(message("Released", id="U", connId="B"), 1)
    assert legs(line) == 2
    assert (a.call.call_id, b.call.call_id) == ("A", "B")


def test_a_leg_beside_one_that_has_the_uuid_for_its_id() -> None:
    """The callUuid alone makes them one only as long as no two connIds tell them apart."""
    line = Listening()
    line.hear(message("Held", id="U", callUuid="U", connId="A"))
    step = line.step(message("Dialing", id="B", callUuid="U", connId="B"), 1)
    assert step.began
    assert kinds(step) == []
    other = Listening()
    other.hear(message("Held", id="U", callUuid="U", connId=ABSENT))
    step = other.step(message("Established", id="B", callUuid="U", connId="B"), 1)
    assert kinds(step) == ["id_changed"]
    assert step.call.aliases == ("U", "B")


def test_a_conn_id_alone_makes_it_the_same_call() -> None:
    """A new id with the connId of an open call is that call's; with that of one that has ended it is not."""
    line = Listening()
    line.hear(message("Ringing", id="U", connId="A"))
    assert kinds(line.step(message("Established", id="V", connId="A"), 1)) == ["id_changed"]
    line.hear(message("Released", id="V", connId="A"), 1)
    assert line.step(message("Ringing", id="W", connId="A"), 1).began


def test_an_id_decides_over_a_conn_id() -> None:
    """The documents show one id with two connIds (before and after a transfer): it is one call."""
    line = Listening()
    line.hear(message("Established", id="U", connId="c11"))
    line.hear(message("Dialing", id="V", connId="c16", parentCallPath="/calls/U"), 1)
    step = line.step(message("Released", id="U", connId="c16"), 1)
    assert step.call.call_id == "U"
    assert changes(step, "conn_id") == [("", "c11", "c16")]
    assert line.step(message("Released", id="V", connId="c16"), 1).call.call_id == "V"
    assert legs(line) == 2


def test_a_consult_is_linked_with_its_parent() -> None:
    """Its own leg, with the parent's id."""
    line = Listening()
    line.hear(message("Held", id="U", connId="c1"))
    step = line.step(
        message(
            "Dialing", id="V", connId="c2", callType="Consult", parentCallUri="http://192.0.2.1/me/calls/U"
        )
    )
    assert step.began
    assert (step.call.parent_call_id, step.call.call_type) == ("U", "Consult")


def test_a_call_that_comes_back() -> None:
    """Transferred away and back, it rings again under its old callUuid: another leg, with its own figures."""
    line = Listening()
    line.goes(("Ringing", 0), ("Established", 2), ("Released", 5))
    before = line.call
    step = line.step(message("Ringing"), 60)
    assert kinds(step) == ["id_reused"]
    assert step.began
    assert step.call.id != before.id
    assert (step.call.ring_s, step.call.opened_at) == (0, line.now)
    call = line.goes(("Established", 3), ("Released", 4))
    assert (call.id, call.ring_s, call.talk_s) == (step.call.id, 3, 4)


def test_the_newest_call_has_the_id() -> None:
    """Of several calls that had one id, a message means the last, in the next batch too."""
    line = Listening()
    line.goes(("Ringing", 0), ("Released", 1), ("Ringing", 1))
    known = {step.call.id: step.call for step in line.steps}
    for order in (known.values(), reversed(known.values())):
        line.board = Board(order)
        assert line.step(message("Ringing", "DtmfSent")).call.id == max(known)


def test_a_late_message_is_no_new_call() -> None:
    """By the server's clock it was said before the end: it is the old call's, and changes no figure."""
    line = Listening()
    line.hear(message("Ringing", server_ms=1_000))
    line.hear(message("Released", server_ms=9_000), 8)
    ended = line.call
    for stamp in (2_000, 1_500, 3_000):
        step = line.step(
            message("Ringing", "AttachedDataChanged", server_ms=stamp, userData={"a": str(stamp)}), 1
        )
        assert kinds(step) == ["late"]
        assert not step.began
        assert step.call.id == ended.id
        assert [getattr(step.call, name) for name in FIGURES] == [getattr(ended, name) for name in FIGURES]
    assert line.step(message("Ringing", server_ms=9_000), 1).began


# ── After the end ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("state", ["Established", "Held", "Queued"])
def test_a_state_after_the_end_is_noted_only(state: str) -> None:
    """The figures were promised not to move."""
    line = Listening()
    line.goes(("Ringing", 0), ("Established", 2), ("Released", 5))
    ended = line.call
    step = line.step(message(state, numbers=("7099",)), 5)
    assert "after_end" in kinds(step)
    assert not step.ended
    assert (step.call.state, step.call.parties, step.call.settled) == ("Released", ended.parties, "released")
    assert [getattr(step.call, name) for name in FIGURES] == [getattr(ended, name) for name in FIGURES]
    assert step.call.notifications == 4


def test_attached_data_after_the_end() -> None:
    """Agents write the disposition when the call is over."""
    line = Listening()
    line.goes(("Ringing", 0), ("Released", 5))
    step = line.step(message("Released", "AttachedDataChanged", userData={"DispositionCode": "Sold"}), 5)
    assert changes(step, "user_data") == [("DispositionCode", None, "Sold")]
    assert step.anomalies == ()


def test_released_twice() -> None:
    """The first time counts."""
    line = Listening()
    line.goes(("Ringing", 0), ("Released", 5))
    ended_at = line.call.ended_at
    step = line.step(message("Released"), 5)
    assert (step.ended, step.call.ended_at, step.changes) == (False, ended_at, ())


# ── Snapshots ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_snapshot_opens_what_was_not_heard() -> None:
    """A call that began while nobody listened is opened by it."""
    line = Listening()
    (step,) = line.ask(resource("Established", userData={"a": "1"}))
    assert step.began
    assert (step.call.opened_by, step.call.direction) == (Source.SNAPSHOT, Direction.UNKNOWN)
    assert step.call.user_data == {"a": "1"}


def test_a_snapshot_corrects_what_is_known() -> None:
    """The state is taken; the time in the old one is not counted, since nobody saw when it ended."""
    line = Listening()
    line.goes(("Ringing", 0))
    (step,) = line.ask(resource("Held", numbers=("7031",)), after_s=30)
    assert step.call.state == "Held"
    assert step.call.ring_s == 0
    assert on_the_call(step.call) == ["7031"]
    assert "impossible_transition" in kinds(step)


def test_a_snapshot_ends_what_is_not_live() -> None:
    """Without a time and without a duration, marked as inferred; the outcome is what was seen of it."""
    line = Listening()
    line.goes(("Ringing", 0), ("Established", 2))
    line.hear(message("Ringing", id="other", connId="other-c"), 1)
    answered, rung = line.ask()
    assert [step.call.outcome for step in (answered, rung)] == [Outcome.ANSWERED, Outcome.UNKNOWN]
    for step in (answered, rung):
        assert step.ended
        assert kinds(step) == ["ended_unheard"]
        assert (step.call.settled, step.call.ended_at, step.call.open) == (INFERRED_NOT_LIVE, None, False)
        assert step.call.state == "Released"
    assert answered.call.talk_s == 0
    assert line.ask() == []


def test_a_snapshot_ends_nothing_of_other_accounts() -> None:
    """It lists one account's calls."""
    line = Listening()
    line.hear(message("Ringing"), account=1)
    line.hear(message("Ringing"), account=2)
    asked_at = line.now + timedelta(seconds=1)
    steps = line.hear(snapshot(), 2, account=1, asked_at=asked_at)
    assert [step.call.account for step in steps] == [1]


def test_an_incomplete_snapshot_ends_nothing() -> None:
    """What it lists is live; what it lacks may be too."""
    line = Listening()
    line.goes(("Ringing", 0))
    (step,) = line.ask(resource("Ringing", id="other", connId="other-c"), status=7)
    assert step.began
    assert line.ask({"state": "Held"}) == []


def test_a_snapshot_does_not_overrule_what_was_heard_since() -> None:
    """What was heard after it was asked for is newer: an end, a state, or a call that it cannot know."""
    line = Listening()
    line.goes(("Ringing", 0))
    asked_at = line.now + timedelta(seconds=1)
    line.hear(message("Established"), 2)
    line.hear(message("Ringing", id="new", connId="new-c"))
    assert line.hear(snapshot(resource("Ringing")), 1, asked_at=asked_at) == []
    asked_at = line.now + timedelta(seconds=1)
    line.hear(message("Released"), 2)
    assert (
        line.hear(snapshot(resource("Established"), resource(id="new", connId="new-c")), 1, asked_at=asked_at)
        != []
    )
    assert line.step(message("Released", "DtmfSent"), 1).call.settled == "released"


def test_a_snapshot_may_list_a_call_twice() -> None:
    """Once is enough."""
    line = Listening()
    assert len(line.ask(resource("Held"), resource("Held"))) == 1


def test_a_snapshot_opens_a_call_that_came_back_unheard() -> None:
    """Its id had ended, and now it is live: it came back while nobody listened, and is followed again."""
    line = Listening()
    line.goes(("Ringing", 0), ("Established", 2), ("Released", 5))
    ended = line.call
    (step,) = line.ask(resource("Established"), after_s=60)
    assert kinds(step) == ["id_reused"]
    assert step.began
    assert step.call.id != ended.id
    line.hear(message("Held"), 1)
    assert (line.call.id, line.call.state) == (step.call.id, "Held")


def test_a_snapshot_may_list_what_has_ended() -> None:
    """A call that is Released and waits to be completed is no call that came back; of one that was completed
    meanwhile nobody heard when, so its wrap is not known."""
    line = Listening()
    line.hear(v3("Ringing"))
    line.hear(v3("Released"), 1)
    (step,) = line.ask(resource("Released"))
    assert not step.began
    assert step.call.ended_at is not None
    (step,) = line.ask(resource("Completed"))
    assert (step.call.settled, step.call.wrap_s) == ("completed", None)


def test_a_snapshot_asked_for_in_the_same_instant_is_not_newer() -> None:
    """What was heard at the moment of asking may already be missing from the answer."""
    line = Listening()
    line.goes(("Ringing", 0))
    assert line.ask(after_s=0) == []
    assert line.ask(resource("Held"), after_s=-0.2) == []


def test_a_snapshot_across_a_clock_set_back_ends_nothing_that_it_lists() -> None:
    """By our clock the answer came before the question; what it lists is live all the same."""
    line = Listening()
    line.goes(("Ringing", 0))
    (step,) = line.ask(resource("Held"), after_s=10, took_s=-5)
    assert (step.call.state, step.call.open) == ("Held", True)


def test_a_list_of_calls_that_nobody_asked_for_ends_nothing() -> None:
    """Without the moment of asking, nothing says what is newer."""
    line = Listening()
    line.goes(("Ringing", 0))
    assert line.hear(snapshot(), 10) == []


# ── Ends that were inferred, and wrongly ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("state", ["Established", "Held", "Queued"])
def test_a_call_whose_end_was_inferred_may_speak_again(state: str) -> None:
    """It goes on, with what this message says; the anomaly says that we were wrong."""
    line = Listening()
    line.goes(("Ringing", 0), ("Established", 2))
    line.ask()
    step = line.step(message(state, numbers=("7031",)), 10)
    assert kinds(step)[-1] == "after_end"
    assert (step.call.open, step.call.state, step.call.settled, step.call.outcome) == (
        True,
        state,
        None,
        None,
    )
    assert changes(step, "state") == [("", "Released", state)]
    assert on_the_call(step.call) == ["7031"]
    assert step.call.hold_count == (1 if state == "Held" else 0)
    end = line.step(message("Released"), 5)
    assert end.ended
    assert (end.call.settled, end.call.outcome) == ("released", Outcome.ANSWERED)
    assert legs(line) == 1


def test_a_call_that_speaks_again_was_answered_meanwhile() -> None:
    """It rang when it was lost, and talks when it is found: it has been answered."""
    line = Listening()
    line.goes(("Ringing", 0))
    line.ask()
    call = line.goes(("Established", 10), ("Released", 5))
    assert (call.outcome, call.established_at) == (Outcome.ANSWERED, line.now - timedelta(seconds=5))
    assert (call.ring_s, call.talk_s) == (0, 5)


def test_an_inferred_end_that_is_heard_after_all() -> None:
    """The Released that comes later has no time to tell: it says nothing that was not inferred."""
    line = Listening()
    line.goes(("Ringing", 0), ("Established", 2))
    line.ask()
    step = line.step(message("Released"), 10)
    assert (step.call.settled, step.call.ended_at) == (INFERRED_NOT_LIVE, None)
    assert step.changes == changed_only(step, "capabilities")


# ── Ends that were waited for long enough ─────────────────────────────────────────────────────────────


def test_a_call_that_nothing_was_heard_of_is_closed() -> None:
    """As inferred, for the reason given; without a time or a duration, and what it has does not move."""
    line = Listening()
    before = line.goes(("Ringing", 0), ("Established", 2))
    line.now += timedelta(hours=30)
    (step,) = line.close(before, silent_s=3600)
    assert step.ended
    assert kinds(step) == ["ended_unheard"]
    assert changes(step, "state") == [("", "Established", "Released")]
    assert step.call == msgspec.structs.replace(
        before, state="Released", outcome=Outcome.ANSWERED, settled="inferred: silent", anomalies=1
    )
    assert (step.call.open, step.call.ended_at, step.call.talk_s) == (False, None, 0)


def test_what_was_heard_meanwhile_keeps_a_call_open() -> None:
    """What waited to be stored while we looked is heard first, and is newer than what we found."""
    line = Listening()
    call = line.goes(("Ringing", 0))
    line.goes(("Established", 600))
    assert line.close(call, silent_s=600) == []
    assert line.close(call, silent_s=0) == []
    line.now += timedelta(seconds=1)
    assert line.close(call, silent_s=0) != []
    assert line.close(call, silent_s=0) == []


@pytest.mark.parametrize("dialect", [message, lambda state: encoded(v3(state))])
def test_a_wrap_up_whose_end_was_not_heard_settles(dialect: Callable[[str], bytes]) -> None:
    """The call has ended, as was heard; nothing else of it moves, and nothing is odd about it."""
    line = Listening()
    line.hear(bayeux(in_data(resource("Ringing"), extensions={"WrapUpTime": 15})))
    line.hear(dialect("Released"), 5)
    released = line.call
    assert (released.settled, released.open) == (None, False)
    line.now += timedelta(seconds=100)
    (step,) = line.close(released, silent_s=9999)
    assert (step.changes, step.anomalies, step.ended) == ((), (), False)
    assert step.call == msgspec.structs.replace(released, settled=NO_WRAP_UP_END)
    assert step.call.wrap_s is None


def test_a_completed_that_comes_after_all_moves_no_figure() -> None:
    """The state is what it says; how long the wrap-up took was settled as not known."""
    line = Listening()
    line.hear(v3("Ringing"))
    line.hear(v3("Released"), 1)
    line.close(line.call, silent_s=0)
    step = line.step(v3("Completed"), 9000)
    assert (step.call.state, step.call.settled, step.call.wrap_s) == ("Completed", NO_WRAP_UP_END, None)
    assert step.anomalies == ()


def test_a_settled_call_is_not_closed_again() -> None:
    """What was said of its end stands."""
    line = Listening()
    call = line.goes(("Ringing", 0), ("Released", 1))
    line.now += timedelta(hours=30)
    assert line.close(call, silent_s=0) == []


def test_a_call_that_was_closed_may_speak_again() -> None:
    """It goes on from there, the silence is counted for nothing, and it can be closed another time."""
    line = Listening()
    call = line.goes(("Ringing", 0), ("Established", 2))
    line.now += timedelta(hours=30)
    line.close(call, silent_s=0)
    step = line.step(message("Held"), 10)
    assert kinds(step) == ["after_end"]
    assert (step.call.open, step.call.id, step.call.outcome, step.call.settled) == (True, call.id, None, None)
    assert step.call.talk_s == 0
    line.now += timedelta(hours=30)
    (again,) = line.close(step.call, silent_s=0)
    assert (again.call.settled, again.call.outcome) == ("inferred: silent", Outcome.ANSWERED)


@pytest.mark.parametrize("source", [Source.COMETD, Source.SNAPSHOT])
def test_only_we_close_calls(source: Source) -> None:
    """A contact centre that sends such a message, whether by chance or by malice, closes nothing."""
    line = Listening()
    call = line.goes(("Ringing", 0))
    line.now += timedelta(hours=30)
    assert line.close(call, silent_s=0, source=source) == []
    assert line.close(call, silent_s=0) != []


def test_calls_of_another_account_are_not_closed() -> None:
    """Nor such that are not there."""
    line = Listening()
    call = line.goes(("Ringing", 0))
    line.now += timedelta(hours=30)
    closing = Closing((call.id, 999), "silent")
    assert line.hear(closing, account=ACCOUNT + 1, asked_at=line.now, source=Source.LISTENER) == []
    assert line.hear(closing, source=Source.LISTENER) == []
    assert len(line.hear(closing, asked_at=line.now, source=Source.LISTENER)) == 1


def changed_only(step: Step, field: str) -> tuple[Any, ...]:
    """The changes of one field."""
    return tuple(change for change in step.changes if change.field == field)


# ── Whatever is heard ─────────────────────────────────────────────────────────────────────────────────


def assert_chained(steps: Iterable[Step]) -> None:
    """Within a call, for the same field and key, each change's before is the previous one's after; the first
    one's is nothing for the fields whose history begins with nothing; and no change changes nothing."""
    last: dict[tuple[int, str, str], Any] = {}
    for step in steps:
        for change in step.changes:
            assert change.field in CHANGE_FIELDS
            place = (step.call.id, change.field, change.key)
            if place in last:
                assert change.before == last[place], (place, change)
            elif change.field in OPENING_FIELDS - {"recording"}:
                assert change.before in (None, []), (place, change)
            assert (change.before, type(change.before)) != (change.after, type(change.after)), change
            last[place] = change.after


def assert_replayable(steps: Iterable[Step]) -> None:
    """The changes tell the whole story: replayed, they give the call that is stored."""
    told: dict[int, dict[tuple[str, str], Any]] = {}
    stays: dict[int, dict[int, Party]] = {}
    for step in steps:
        call = step.call
        story = told.setdefault(call.id, {})
        story.update({(change.field, change.key): change.after for change in step.changes})
        stays.setdefault(call.id, {}).update({party.ordinal: party for party in step.parties})
        for name in CHANGE_FIELDS - {"participant", "user_data", "capabilities"}:
            if (name, "") in story:
                assert story[name, ""] == getattr(call, name)
        assert story.get(("capabilities", ""), []) == sorted(call.capabilities)
        data = {
            key: value for (field, key), value in story.items() if field == "user_data" and value is not None
        }
        assert data == {key: value for key, value in call.user_data.items() if value is not None}
        assert tuple(stays[call.id].values()) == call.parties
        assert [party.ordinal for party in call.parties] == list(range(len(call.parties)))
        there = sum(value is not None for (field, _), value in story.items() if field == "participant")
        if call.open:
            assert there == len(on_the_call(call))


def assert_settled_stays(steps: Iterable[Step]) -> None:
    """After the end that was heard no figure moves; an end that was inferred may turn out wrong."""
    ended: dict[int, Call] = {}
    for step in steps:
        call = step.call
        if call.id in ended:
            before = ended[call.id]
            assert [getattr(call, name) for name in FIGURES] == [getattr(before, name) for name in FIGURES]
            assert not call.open
            assert not step.ended
            assert before.settled in (None, call.settled)
            assert before.settled is None or before.wrap_s == call.wrap_s
            assert call.parties == before.parties
        if call.ended_at is not None:
            assert call.outcome is not None
            assert on_the_call(call) == []
            ended[call.id] = call


def assert_sound(steps: Sequence[Step]) -> None:
    """What holds for each call at each step."""
    seen: dict[int, Call] = {}
    for step in steps:
        call = step.call
        assert step.began is (call.id not in seen)
        assert all(odd.kind in ANOMALY_KINDS for odd in step.anomalies)
        before = seen.get(call.id)
        assert call.anomalies == (before.anomalies if before else 0) + len(step.anomalies)
        assert call.state_since <= call.last_heard_at
        assert min(call.ring_s, call.talk_s, call.hold_s, call.wrap_s or 0) >= 0
        spent = (call.last_heard_at - call.opened_at).total_seconds()
        assert call.ring_s + call.talk_s + call.hold_s <= spent + 1e-6
        assert step.ended is ((before is None or before.open) and not call.open)
        assert call.call_id == call.aliases[0]
        assert len(set(call.aliases)) == len(call.aliases)
        assert before is None or call.aliases[: len(before.aliases)] == before.aliases
        assert all(party.left_at is None or party.left_at >= party.joined_at for party in call.parties)
        for value in (step, call):
            assert msgspec.json.encode(value)
        seen[call.id] = call


_USER_DATA = st.sampled_from(
    [
        ABSENT,
        ABSENT,
        None,
        {},
        {"a": "1"},
        {"a": 1},
        {"a": True, "b": {"c": [1]}},
        {"b": None},
        {"a:b": "c"},
        [],
        5,
    ]
)
_NUMBERS = st.lists(st.sampled_from(["7", "8", "7#1", "8#2", ""]), max_size=4)
_IDS = st.sampled_from(["a", "b", "c"])


@st.composite
def _call_resources(draw: st.DrawFn) -> JsonObject:
    """A call with one of few ids, so that messages meet, in every role that an id can have."""
    return resource(
        draw(st.sampled_from([*State, "Ringing", "Established", "Queued", "", None])),
        id=draw(_IDS),
        callUuid=draw(st.sampled_from([ABSENT, "a", "b", "u"])),
        connId=draw(st.sampled_from([ABSENT, "a", "b", "c", "d"])),
        previousConnId=draw(st.sampled_from([ABSENT, ABSENT, ABSENT, "a", "b", "d"])),
        numbers=draw(_NUMBERS),
        capabilities=draw(st.sampled_from([ABSENT, [], ["Hold"], ["Hold", "Hangup"]])),
        userData=draw(_USER_DATA),
        recordingState=draw(st.sampled_from([ABSENT, "Recording", "Stopped"])),
        mute=draw(st.sampled_from([ABSENT, "On", "Off"])),
        duration=draw(st.sampled_from([ABSENT, "3", "x"])),
    )


@st.composite
def _sessions(draw: st.DrawFn) -> list[tuple[Heard, Decoded]]:
    """A session's messages with their times: notifications in two dialects, snapshots late and early, other
    things, a clock that stands still or is set back."""
    now = STARTED
    heard: list[tuple[Heard, Decoded]] = []
    for position in range(1, draw(st.integers(1, 14)) + 1):
        now += timedelta(seconds=draw(st.sampled_from([0, 0, 1, 2.5, 30, -3])))
        source, asked_at, account = Source.COMETD, None, draw(st.sampled_from([1, 1, 1, 2]))
        what = draw(st.integers(0, 10))
        body: JsonObject
        if what == 10:
            source = draw(st.sampled_from([Source.LISTENER, Source.LISTENER, Source.COMETD]))
            asked_at = now - timedelta(seconds=draw(st.sampled_from([0, 0.1, 30])))
            closed = draw(st.lists(st.integers(1, 20), max_size=8))
            heard.append(
                (
                    Heard(account, "s", position, now, CHANNEL, b"", source, asked_at),
                    Closing(tuple(closed), "silent"),
                )
            )
            continue
        if what == 0:
            source, asked_at = (
                Source.SNAPSHOT,
                now - timedelta(seconds=draw(st.sampled_from([0, 0.1, 2, -1]))),
            )
            body = {
                "statusCode": draw(st.sampled_from([0, 0, 7])),
                "calls": draw(st.lists(_call_resources(), max_size=3)),
            }
        elif what == 1:
            body = {"messageType": "ErrorMessage"}
        else:
            around: JsonObject = {
                "messageType": draw(st.sampled_from(["CallStateChangeMessage", "CallStateChanged"]))
            }
            if draw(st.booleans()):
                around["metrics"] = stamped(draw(st.sampled_from([1_000, 2_000, 3_000])))
            around["extensions"] = draw(st.sampled_from([ABSENT, {}, {"WrapUpTime": 0}, {"WrapUpTime": 9}]))
            kind = draw(
                st.sampled_from(["StatusChange", "AttachedDataChanged", "ParticipantsUpdated", "New"])
            )
            body = in_data(draw(_call_resources()), kind, **around)
        decoded = decode(encoded(body))
        heard.append((Heard(account, "s", position, now, CHANNEL, b"", source, asked_at), decoded))
    return heard


def fold(session: Sequence[tuple[Heard, Decoded]], batches: Iterable[int]) -> list[list[Step]]:
    """The steps of each message, when the session is cut into batches of these sizes (the last one repeats),
    each on a board of its own with what the store has."""
    memory, answers, next_id, start = Memory(), [], 1, 0
    sizes = iter(batches)
    size = 1
    while start < len(session):
        size = next(sizes, size)
        batch = session[start : start + size]
        board = memory.board(batch)
        for heard, decoded in batch:
            answers.append(board.hear(next_id, heard, decoded))
            next_id += ids_needed(decoded)
        memory.keep(step for steps in answers[start:] for step in steps)
        start += size
    return answers


@given(_sessions())
def test_any_session(session: list[tuple[Heard, Decoded]]) -> None:
    """The fold is total, its changes are a chain and tell the whole story, and ends are ends."""
    steps = [step for answer in fold(session, [len(session)]) for step in answer]
    assert_sound(steps)
    assert_chained(steps)
    assert_replayable(steps)
    assert_settled_stays(steps)


@given(_sessions(), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_batches_make_no_difference(session: list[tuple[Heard, Decoded]], sizes: list[int]) -> None:
    """Replaying gives the same steps, however the session is cut into batches, and whoever folds them."""
    whole = fold(session, [len(session)])
    assert fold(session, [len(session)]) == whole
    assert fold(session, sizes) == whole


@given(
    st.lists(st.binary(max_size=30) | st.sampled_from([message(), message("Released"), snapshot(resource())]))
)
def test_any_bytes_can_be_heard(raws: list[bytes]) -> None:
    """From the wire to the step nothing raises."""
    line = Listening()
    for raw in raws:
        line.hear(raw, 1)


_TEXT = st.sampled_from(["", "a", "b", "Held"])
_MAYBE = st.none() | _TEXT


@given(
    st.lists(
        st.builds(
            Notification,
            message_type=_TEXT,
            notification_type=_TEXT,
            call_id=_TEXT,
            state=_MAYBE,
            call_uuid=_MAYBE,
            conn_id=_MAYBE,
            extensions=st.none()
            | st.dictionaries(st.just("WrapUpTime"), st.none() | st.integers() | st.floats()),
            duration_s=st.none() | st.floats(allow_nan=False),
            user_data=st.none() | st.dictionaries(_TEXT, st.none() | st.integers() | st.booleans() | _TEXT),
            user_data_emptied=st.booleans(),
        ),
        max_size=6,
    )
)
def test_any_notification_can_be_heard(notifications: list[Notification]) -> None:
    """The fold does not rely on the decoder's good manners."""
    line = Listening()
    for notification in notifications:
        line.hear(notification, 1)
    assert_chained(line.steps)


# ── Size ──────────────────────────────────────────────────────────────────────────────────────────────


def seconds(line: Listening, decoded: Sequence[Decoded], asked_at: datetime | None = None) -> float:
    """How long it takes to hear these, after a first run that warms up."""
    began = time.perf_counter()
    for number, each in enumerate(decoded):
        line.hear(each, account=number % 1000, asked_at=asked_at)
    return time.perf_counter() - began


def test_many_participants_take_linear_time() -> None:
    """Four thousand who join, turn round, double and leave: a message costs by its size, not its square."""
    numbers = [str(number) for number in range(4_000)]
    line = Listening()
    for listed in (numbers, numbers[::-1], numbers * 2, numbers[::-1], []):
        raw = message("Established", numbers=listed)
        decoded = decode(raw)
        began = time.perf_counter()
        line.hear(decoded, 1)
        assert time.perf_counter() - began < 1
    assert on_the_call(line.call) == []
    assert_chained(line.steps)


def test_many_snapshots_take_linear_time() -> None:
    """A thousand accounts that come back at once cost a thousand snapshots, not a million calls."""
    line = Listening()
    opening = [
        decode(message("Ringing", id=f"u{account}-{n}", connId=f"c{account}-{n}"))
        for n in range(5)
        for account in range(1000)
    ]
    seconds(line, opening)
    assert legs(line) == 5_000
    line.now += timedelta(seconds=60)
    spent = seconds(line, [Snapshot((), complete=True)] * 1000, asked_at=line.now)
    assert sum(step.ended for step in line.steps) == 5_000
    assert spent < 2
