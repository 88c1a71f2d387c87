"""Folds notifications into calls: a table of states, and what else a message may change.

The rule of this module is that it observes and does not enforce. `TRANSITIONS` says which state may
follow which, and every transition stands in it (the README's diagram is drawn from it); one that does not
stand in it is applied all the same and recorded as an anomaly. The one thing that is protected is a figure
that was promised not to move: what comes for a call after its end changes its attached data at most.

`Board` is the working set of one batch: it is given the calls that the batch may touch, hears the messages
in order, and answers what each did. It has no memory beyond the batch; the truth is in the store.

Durations are measured between messages that we heard. A stretch whose beginning or end fell into a gap is
not counted, because a number that nobody observed would be an invention.
"""

from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from typing import Any

from msgspec import UNSET, structs

from listener.core.calls import (
    Anomaly,
    Aside,
    Call,
    Change,
    Decoded,
    Direction,
    Heard,
    JsonObject,
    Notification,
    Outcome,
    Participant,
    Party,
    Snapshot,
    Source,
    State,
    Step,
    Unrecognised,
)

TRANSITIONS: dict[State | None, dict[State, str]] = {
    None: {
        State.DIALING: "dials",
        State.RINGING: "is rung",
        State.ESTABLISHED: "met in talk",
        State.HELD: "met on hold",
        State.RELEASED: "met at its end",
    },
    State.DIALING: {
        State.ESTABLISHED: "answered",
        State.HELD: "held while dialling",
        State.RELEASED: "given up or refused",
    },
    State.RINGING: {
        State.ESTABLISHED: "answers",
        State.RELEASED: "not answered",
    },
    State.ESTABLISHED: {
        State.HELD: "holds",
        State.RELEASED: "ends",
    },
    State.HELD: {
        State.ESTABLISHED: "retrieves",
        State.DIALING: "retrieved while dialling",
        State.RELEASED: "ends on hold",
    },
    State.RELEASED: {
        State.COMPLETED: "wrapped up",
    },
    State.COMPLETED: {},
}
"""What may follow what, and the words for it. None is "not heard of yet"."""

BEGINNINGS = frozenset({State.DIALING, State.RINGING})
ENDINGS = frozenset({State.RELEASED, State.COMPLETED})
TALKING = frozenset({State.ESTABLISHED, State.HELD})

_STATES: frozenset[str] = frozenset(State)
_MAY_FOLLOW: dict[str, frozenset[str]] = {
    before: frozenset(row) for before, row in TRANSITIONS.items() if before is not None
}
_BOOKED_ON: dict[str, str] = {
    State.DIALING: "ring_s",
    State.RINGING: "ring_s",
    State.ESTABLISHED: "talk_s",
    State.HELD: "hold_s",
}
"""Which duration the time in a state counts for."""

NOTIFICATION_TYPES = frozenset(
    {
        "StatusChange",
        "ParticipantsUpdated",
        "AttachedDataChanged",
        "DtmfSent",
        "CallRecordingStateChange",
        "MonitoredUserMutedStateChange",
        "PropertiesUpdated",
        "Error",
        "StateChange",
        "CallRecovered",
    }
)
"""Those seen in samples and clients of v2 and v3; the vendor's own list is not to be had, so others are
counted and taken in the same way."""

_PLAIN_FIELDS = (
    "call_type",
    "ani",
    "dnis",
    "phone_number",
    "conn_id",
    "call_uuid",
    "parent_call_id",
    "mute",
    "recording",
    "supervisor_listening_in",
    "monitored_user_muted",
    "monitoring",
    "supervisor_monitoring_state",
)
"""Fields that a notification overwrites when it carries them; the same names on both sides."""

INFERRED_NOT_LIVE = "inferred: no longer among the live calls"
"""Why a call that ended while nobody listened is settled."""


def ids(decoded: Decoded) -> tuple[str, ...]:
    """Every id under which the calls of a message may be known: load these before a `Board` hears it."""
    match decoded:
        case Notification():
            return tuple(_ids(decoded))
        case Snapshot():
            return tuple(dict.fromkeys(id for call in decoded.calls for id in _ids(call)))
        case Aside() | Unrecognised():
            return ()


def ids_needed(decoded: Decoded) -> int:
    """How many notification ids `Board.hear` may use for a message: its own, and one for each call of a
    snapshot, since a call's id is that of the notification that opened it."""
    return 1 + len(decoded.calls) if isinstance(decoded, Snapshot) else 1


def _ids(notification: Notification) -> list[str]:
    """The ids of one notification without repeats, its own first."""
    found = [notification.call_id]
    for other in (notification.call_uuid, notification.conn_id, notification.previous_conn_id):
        if other and other not in found:
            found.append(other)
    return found


class Board:
    """The calls of one batch, changed in memory as the batch's messages are heard.

    Give it every call that any id of the batch (`ids`) names, and for each account with a `Snapshot` in the
    batch all its open calls. Then call `hear` once for each message in order, and write what it answers;
    the last `Step` of a call holds the call as it must be stored.
    """

    __slots__ = ("_by_alias", "_calls")

    def __init__(self, calls: Iterable[Call]) -> None:
        self._calls: dict[int, Call] = {}
        self._by_alias: dict[tuple[int, str], int] = {}
        # The newest call wins an id that was used more than once.
        for call in sorted(calls, key=lambda each: each.id):
            self._calls[call.id] = call
            for alias in call.aliases:
                self._by_alias[call.account, alias] = call.id

    def hear(self, notification_id: int, heard: Heard, decoded: Decoded) -> list[Step]:
        """Folds one message and answers what it did to which calls; total.

        `notification_id` becomes the id of a call that the message opens.
        """
        match decoded:
            case Notification():
                step = self._notification(notification_id, heard, decoded)
                return [step] if step is not None else []
            case Snapshot():
                return list(self._snapshot(notification_id, heard, decoded))
            case Aside() | Unrecognised():
                return []

    def _notification(self, notification_id: int, heard: Heard, notification: Notification) -> Step | None:
        call, odd = self._find(heard.account, notification)
        stale = heard.asked_at is not None and call is not None and call.last_heard_at >= heard.asked_at
        if stale:
            return None  # heard since the snapshot was asked for: what was heard is newer
        if call is not None and not call.open and _begins_again(call, notification):
            call, odd = None, [Anomaly("id_reused", f"{notification.call_id} had ended and begins again")]
        if call is None:
            step = _opening(notification_id, heard, notification, odd)
        else:
            step = _following(call, heard, notification, odd)
        self._put(step.call)
        return step

    def _find(self, account: int, notification: Notification) -> tuple[Call | None, list[Anomaly]]:
        """The call that a notification is about, and what was odd about recognising it.

        Ids are opaque: what one message calls `id` another calls `connId`. An id that names a known call
        decides. Otherwise an open call is taken that shares the connId, or whose one id is the callUuid of
        the other; two different connIds under one callUuid stay two legs.
        """
        found = self._by_alias.get((account, notification.call_id))
        if found is not None:
            return self._calls[found], []
        for alias in _ids(notification)[1:]:
            other = self._by_alias.get((account, alias))
            if other is None or not self._calls[other].open:
                continue
            call = self._calls[other]
            by_uuid_only = alias == notification.call_uuid
            if by_uuid_only and notification.call_id != alias and call.call_id != alias:
                continue
            return call, [Anomaly("id_changed", f"{call.call_id} is now called {notification.call_id}")]
        return None, []

    def _snapshot(self, notification_id: int, heard: Heard, snapshot: Snapshot) -> Iterator[Step]:
        """Opens and corrects what is live; ends what is not, if the snapshot claims to be complete."""
        live: set[int] = set()
        # One message may open several calls, whose ids must differ and be the same in every rebuild: the
        # store reserves `ids_needed`.
        for offset, notification in enumerate(snapshot.calls, start=1):
            step = self._notification(notification_id + offset, heard, notification)
            call, _ = self._find(heard.account, notification)
            if call is not None:
                live.add(call.id)
            if step is not None:
                yield step
        if not snapshot.complete or heard.asked_at is None:
            return
        for call in list(self._calls.values()):
            if call.account == heard.account and call.open and call.id not in live:
                if call.last_heard_at < heard.asked_at:
                    step = _ended_unheard(call)
                    self._put(step.call)
                    yield step

    def _put(self, call: Call) -> None:
        self._calls[call.id] = call
        for alias in call.aliases:
            self._by_alias[call.account, alias] = call.id


def _begins_again(call: Call, notification: Notification) -> bool:
    """Whether a message about an ended call is the first of another one under the same id.

    A call that is transferred away and back rings again under the callUuid that it had. An older message
    that arrives late looks the same, but for the server's clock.
    """
    if notification.state not in BEGINNINGS:
        return False
    return not (notification.server_at and call.server_at and notification.server_at < call.server_at)


def _opening(notification_id: int, heard: Heard, notification: Notification, odd: list[Anomaly]) -> Step:
    """The first message of a call."""
    at = heard.received_at
    state = notification.state
    anomalies = [*notification.oddities, *odd]
    if state is None:
        anomalies.append(Anomaly("malformed_field", "the first message of the call has no state"))
    elif state not in _STATES:
        anomalies.append(Anomaly("unknown_state", state))
    _note_type(notification, anomalies)

    if state == State.DIALING:
        direction = Direction.OUTBOUND
    elif state == State.RINGING:
        direction = Direction.INBOUND
    else:
        direction = Direction.UNKNOWN
    parties = tuple(
        Party(ordinal, each.number, each.e164, each.formatted, each.role, at)
        for ordinal, each in enumerate(notification.participants or ())
    )
    changes = [Change("state", None, state)] if state is not None else []
    if notification.capabilities:
        changes.append(Change("capabilities", None, sorted(notification.capabilities)))
    changes.extend(Change("participant", None, _shown(party), _stay_key(party, parties)) for party in parties)
    user_data = notification.user_data or {}
    changes.extend(Change("user_data", None, value, key) for key, value in user_data.items())
    if notification.recording is not None:
        changes.append(Change("recording", None, notification.recording))

    call = Call(
        id=notification_id,
        account=heard.account,
        call_id=notification.call_id,
        aliases=tuple(_ids(notification)),
        state=state or "",
        state_since=at,
        opened_at=at,
        last_heard_at=at,
        direction=direction,
        opened_by=heard.source,
        call_uuid=notification.call_uuid,
        conn_id=notification.conn_id,
        parent_call_id=notification.parent_call_id,
        call_type=notification.call_type,
        phone_number=notification.phone_number,
        device_id=notification.device_id,
        ani=notification.ani,
        dnis=notification.dnis,
        number=_other_party(parties, notification.ani, notification.dnis, direction),
        parties=parties,
        capabilities=notification.capabilities or frozenset(),
        user_data=user_data,
        mute=notification.mute,
        recording=notification.recording,
        supervisor_listening_in=notification.supervisor_listening_in,
        monitored_user_muted=notification.monitored_user_muted,
        monitoring=notification.monitoring,
        supervisor_monitoring_state=notification.supervisor_monitoring_state,
        established_at=at if state in TALKING else None,
        hold_count=1 if state == State.HELD else 0,
        wrap_up_time_s=_wrap_up_time_s(notification.extensions),
        server_duration_s=notification.duration_s,
        server_at=notification.server_at,
        notifications=1,
        anomalies=len(anomalies),
    )
    if state not in ENDINGS:
        return Step(call, tuple(changes), tuple(anomalies), parties, began=True)
    ended = structs.replace(call, **_end(call, notification, at, call.parties))
    return Step(ended, tuple(changes), tuple(anomalies), ended.parties, began=True, ended=True)


def _following(call: Call, heard: Heard, notification: Notification, odd: list[Anomaly]) -> Step:
    """A message about a call that is known."""
    at = heard.received_at
    was_open = call.open
    anomalies = [*notification.oddities, *odd]
    _note_type(notification, anomalies)
    changes: list[Change] = []
    parties: tuple[Party, ...] = ()
    after: dict[str, Any] = {"last_heard_at": at, "notifications": call.notifications + 1}

    state = notification.state
    if state is not None and state != call.state:
        moved = _move(call, state, heard, anomalies)
        if moved:
            changes.append(Change("state", call.state or None, state))
            after.update(moved)

    for name in _PLAIN_FIELDS:
        value = getattr(notification, name)
        if value is not None and value != (before := getattr(call, name)):
            after[name] = value
            changes.append(Change(name, before, value))

    capabilities = notification.capabilities
    if capabilities is not None and capabilities != call.capabilities:
        after["capabilities"] = capabilities
        changes.append(Change("capabilities", sorted(call.capabilities), sorted(capabilities)))

    if notification.participants is not None and was_open:
        known, parties = _stays(call.parties, notification.participants, at)
        if parties:
            after["parties"] = known
            changes.extend(
                Change("participant", None, _shown(party), _stay_key(party, known))
                if party.left_at is None
                else Change("participant", _shown(party), None, _stay_key(party, known))
                for party in parties
            )

    user_data = {} if notification.user_data_emptied else notification.user_data
    if user_data is not None and user_data != call.user_data:
        differences = list(_differences(call.user_data, user_data))
        if differences:
            after["user_data"] = user_data
            changes.extend(differences)

    if any(id not in call.aliases for id in _ids(notification)):
        after["aliases"] = tuple(dict.fromkeys((*call.aliases, *_ids(notification))))
    if notification.device_id is not None:
        after["device_id"] = notification.device_id
    if call.number is None:
        known = after.get("parties", call.parties)
        ani, dnis = after.get("ani", call.ani), after.get("dnis", call.dnis)
        after["number"] = _other_party(known, ani, dnis, call.direction)
    if notification.extensions is not None:
        wrap_up_time_s = _wrap_up_time_s(notification.extensions)
        if wrap_up_time_s is not None:
            after["wrap_up_time_s"] = wrap_up_time_s
    if notification.duration_s is not None:
        after["server_duration_s"] = notification.duration_s
    if notification.server_at is not None:
        after["server_at"] = notification.server_at

    ends = was_open and after.get("state") in ENDINGS
    if ends:
        present = after.get("parties", call.parties)
        ending = _end(structs.replace(call, **after), notification, at, present)
        parties = tuple(party for party in ending["parties"] if party.left_at == at)
        after.update(ending)
    after["anomalies"] = call.anomalies + len(anomalies)
    return Step(
        structs.replace(call, **after), tuple(changes), tuple(anomalies), parties, began=False, ended=ends
    )


def _note_type(notification: Notification, anomalies: list[Anomaly]) -> None:
    kind = notification.notification_type
    if kind not in NOTIFICATION_TYPES and kind:
        anomalies.append(Anomaly("unknown_notification_type", kind))


def _move(call: Call, state: str, heard: Heard, anomalies: list[Anomaly]) -> dict[str, Any]:
    """The fields that a change of state changes; empty when the state is kept, because the call had ended."""
    known = state in _STATES
    if not known:
        anomalies.append(Anomaly("unknown_state", state))
    if not call.open:
        if call.ended_at is None and state not in ENDINGS:
            # Its end was inferred, and wrongly: it speaks. It goes on from here.
            anomalies.append(Anomaly("after_end", f"{state} after an end that was only inferred"))
            return {"state": state, "state_since": heard.received_at, "settled": None, "outcome": None}
        if call.state == State.RELEASED and state == State.COMPLETED:
            return _wrapped_up(call, heard.received_at)
        anomalies.append(Anomaly("after_end", f"{state} after {call.state}"))
        return {}
    if known and call.state in _STATES and state not in _MAY_FOLLOW[call.state]:
        anomalies.append(Anomaly("impossible_transition", f"{call.state} to {state}"))

    after: dict[str, Any] = {"state": state, "state_since": heard.received_at}
    booked_on = _BOOKED_ON.get(call.state)
    # A snapshot shows that the state has changed, not when: that stretch is not counted.
    if booked_on is not None and heard.source is Source.COMETD:
        after[booked_on] = getattr(call, booked_on) + _elapsed_s(call.state_since, heard.received_at)
    if state in TALKING and call.established_at is None:
        after["established_at"] = heard.received_at
    if state == State.HELD:
        after["hold_count"] = call.hold_count + 1
    return after


def _end(call: Call, notification: Notification, at: datetime, parties: tuple[Party, ...]) -> dict[str, Any]:
    """The fields that the end of a call fixes."""
    if call.established_at is not None:
        outcome = Outcome.ANSWERED
    elif call.direction is Direction.UNKNOWN:
        outcome = Outcome.UNKNOWN
    else:
        outcome = Outcome.UNANSWERED
    settled = None
    if notification.state == State.COMPLETED:
        settled = "completed"
    elif notification.dialect != "v3" and not call.wrap_up_time_s:
        # v2 sends nothing after Released when no wrap-up is due; v3 sends Completed.
        settled = "released"
    return {
        "ended_at": at,
        "outcome": outcome,
        "settled": settled,
        "parties": tuple(party if party.left_at else structs.replace(party, left_at=at) for party in parties),
    }


def _wrapped_up(call: Call, at: datetime) -> dict[str, Any]:
    """Completed after Released; a call that had settled keeps its figures."""
    after: dict[str, Any] = {"state": State.COMPLETED.value, "state_since": at}
    if call.settled is None and call.ended_at is not None:
        after["wrap_s"] = _elapsed_s(call.ended_at, at)
        after["settled"] = "completed"
    return after


def _ended_unheard(call: Call) -> Step:
    """A call that is no longer live and whose end nobody heard: closed without a time or a duration."""
    after = structs.replace(
        call,
        state=State.RELEASED.value,
        outcome=Outcome.ANSWERED if call.established_at is not None else Outcome.UNKNOWN,
        settled=INFERRED_NOT_LIVE,
        anomalies=call.anomalies + 1,
    )
    return Step(
        after,
        (Change("state", call.state or None, State.RELEASED.value),),
        (Anomaly("ended_unheard", INFERRED_NOT_LIVE),),
        ended=True,
    )


def _elapsed_s(since: datetime, until: datetime) -> float:
    """Never negative: our clock may have been set back between two messages."""
    return max(0.0, (until - since) / timedelta(seconds=1))


def _wrap_up_time_s(extensions: JsonObject | None) -> float | None:
    value = extensions.get("WrapUpTime") if extensions else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _other_party(
    parties: tuple[Party, ...], ani: str | None, dnis: str | None, direction: Direction
) -> str | None:
    """The number that a person would call "the number" of this call."""
    if parties and parties[0].number:
        return parties[0].number
    if direction is Direction.INBOUND:
        return ani
    return dnis if direction is Direction.OUTBOUND else None


def _shown(party: Party) -> JsonObject:
    """A party as it stands in a change."""
    shown: JsonObject = {"number": party.number}
    for name in ("e164", "formatted", "role"):
        if getattr(party, name):
            shown[name] = getattr(party, name)
    return shown


def _stay_key(party: Party, all_stays: tuple[Party, ...]) -> str:
    """What names a stay among the changes: its number, made distinct where that number was there already."""
    for other in all_stays:
        if other.ordinal >= party.ordinal:
            break
        if other.number == party.number and (other.left_at is None or other.left_at > party.joined_at):
            return f"{party.number}#{party.ordinal}"
    return party.number


def _stays(
    known: tuple[Party, ...], listed: tuple[Participant, ...], at: datetime
) -> tuple[tuple[Party, ...], tuple[Party, ...]]:
    """All stays after a message that lists who is there now, and those of them that began or ended with it.

    The list is a snapshot of the other parties. The same number twice is two parties.
    """
    present = [party for party in known if party.left_at is None]
    if [party.number for party in present] == [each.number for each in listed]:
        return known, ()
    gone = list(present)
    joined: list[Participant] = []
    for each in listed:
        stay = next((party for party in gone if party.number == each.number), None)
        if stay is None:
            joined.append(each)
        else:
            gone.remove(stay)
    left = {party.ordinal: structs.replace(party, left_at=at) for party in gone}
    begun = tuple(
        Party(len(known) + place, each.number, each.e164, each.formatted, each.role, at)
        for place, each in enumerate(joined)
    )
    all_stays = tuple(left.get(party.ordinal, party) for party in known) + begun
    return all_stays, (*left.values(), *begun)


def _differences(before: JsonObject, after: JsonObject) -> Iterator[Change]:
    """userData is a full snapshot: a key that it lacks is gone."""
    for key, value in after.items():
        was = before.get(key, UNSET)
        if was is UNSET or was != value or type(was) is not type(value):
            yield Change("user_data", None if was is UNSET else was, value, key)
    for key, value in before.items():
        if key not in after:
            yield Change("user_data", value, None, key)


def diagram() -> str:
    """The states and transitions as a Mermaid `stateDiagram-v2`; the README shows exactly this."""
    lines = ["stateDiagram-v2"]
    for before, row in TRANSITIONS.items():
        lines.extend(f"    {before or '[*]'} --> {after}: {label}" for after, label in row.items())
    lines.extend(f"    {state} --> [*]" for state in sorted(ENDINGS))
    return "\n".join(lines)
