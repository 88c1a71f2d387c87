"""Folds notifications into calls: a table of states, and what else a message may change.

The rule of this module is that it observes and does not enforce. `TRANSITIONS` says which state may
follow which, and every transition stands in it (the README's diagram is drawn from it); one that does not
stand in it is applied all the same and recorded as an anomaly. The one thing that is protected is a figure
that was promised not to move: what comes for a call after its end changes its attached data at most.

`Board` is the working set of one batch: it is given the calls that the batch may touch, hears the messages
in order, and answers what each did. It has no memory beyond the batch; the truth is in the store.

Durations are measured between messages that we heard. A stretch whose beginning or end fell into a gap is
not counted, because a number that nobody observed would be an invention. Within a call time does not run
backwards: should our clock be set back, the last time stands until the clock has caught up.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from operator import attrgetter
from typing import Any

from msgspec import structs

from listener.core.calls import (
    Anomaly,
    Aside,
    Call,
    Change,
    Closing,
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

_number = attrgetter("number")
_id = attrgetter("id")

_LONG_AGO = datetime.min.replace(tzinfo=UTC)

INFERRED_NOT_LIVE = "inferred: no longer among the live calls"
"""Why a call that ended while nobody listened is settled."""

NO_WRAP_UP_END = "released: the end of the wrap-up was not heard"
"""Why a call is settled whose Completed never came."""


def ids(decoded: Decoded) -> Sequence[str]:
    """Every id under which the calls of a message may be known: load these before a `Board` hears it."""
    match decoded:
        case Notification():
            return _ids(decoded)
        case Snapshot():
            return tuple(dict.fromkeys(id for call in decoded.calls for id in _ids(call)))
        case Closing() | Aside() | Unrecognised():
            return ()


def closes(heard: Heard, decoded: Decoded) -> tuple[int, ...]:
    """The ids of the calls that a message closes: load these, where they are the account's, before a `Board`
    hears it. Only our own findings close calls; whoever else says that he does is not believed."""
    return decoded.calls if isinstance(decoded, Closing) and heard.source is Source.LISTENER else ()


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

    Give it every call that any id of the batch (`ids`) names or that a message closes (`closes`), and for
    each account with a `Snapshot` in the batch all its open calls. Then call `hear` once for each message in
    order, and write what it answers; the last `Step` of a call holds the call as it must be stored.
    """

    __slots__ = ("_accounts",)

    def __init__(self, calls: Iterable[Call]) -> None:
        self._accounts: dict[int, _Calls] = {}
        for call in calls:
            self.put(call)

    def put(self, call: Call) -> None:
        """Take in a call that the messages to come may touch, as it was before the first of them."""
        self._of(call.account).put(call)

    def _of(self, account: int) -> "_Calls":
        calls = self._accounts.get(account)
        if calls is None:
            calls = self._accounts[account] = _Calls()
        return calls

    def hear(self, notification_id: int, heard: Heard, decoded: Decoded) -> list[Step]:
        """Folds one message and answers what it did to which calls; total.

        `notification_id` becomes the id of a call that the message opens.
        """
        match decoded:
            case Notification():
                _, step = self._notification(notification_id, heard, decoded)
                return [step] if step is not None else []
            case Snapshot():
                return list(self._snapshot(notification_id, heard, decoded))
            case Closing():
                return list(self._closing(heard, decoded))
            case Aside() | Unrecognised():
                return []

    def _notification(
        self, notification_id: int, heard: Heard, notification: Notification
    ) -> tuple[Call, Step | None]:
        """The call that a notification is about, as it is afterwards, and what was done to it if anything."""
        calls = self._of(heard.account)
        call, odd = calls.find(notification)
        if call is not None and heard.asked_at is not None and call.last_heard_at >= heard.asked_at:
            return call, None  # heard since the snapshot was asked for: what was heard is newer
        if call is not None and not call.open and _begins_again(call, heard, notification):
            call, odd = None, [Anomaly("id_reused", f"{notification.call_id} had ended and begins again")]
        if call is None:
            step = _opening(notification_id, heard, notification, odd)
        else:
            step = _following(call, heard, notification, odd)
        calls.put(step.call)
        return step.call, step

    def _snapshot(self, notification_id: int, heard: Heard, snapshot: Snapshot) -> Iterator[Step]:
        """Opens and corrects what is live; ends what is not, if the snapshot claims to be complete."""
        live: set[int] = set()
        # One message may open several calls, whose ids must differ and be the same in every rebuild: the
        # store reserves `ids_needed`.
        for offset, notification in enumerate(snapshot.calls, start=1):
            call, step = self._notification(notification_id + offset, heard, notification)
            live.add(call.id)
            if step is not None:
                yield step
        if not snapshot.complete or heard.asked_at is None:
            return
        calls = self._of(heard.account)
        for call in calls.open():
            if call.id not in live and call.last_heard_at < heard.asked_at:
                step = _ended_unheard(call, INFERRED_NOT_LIVE)
                calls.put(step.call)
                yield step

    def _closing(self, heard: Heard, closing: Closing) -> Iterator[Step]:
        """Settles those of the calls that were not heard of meanwhile, with the figures that they have."""
        calls = self._of(heard.account)
        for id in closes(heard, closing):
            call = calls.get(id)
            if call is None or call.settled is not None:
                continue
            if call.ended_at is not None:
                step = Step(structs.replace(call, settled=NO_WRAP_UP_END), (), ())
            elif heard.asked_at is not None and call.last_heard_at < heard.asked_at:
                step = _ended_unheard(call, f"inferred: {closing.reason}")
            else:
                continue
            calls.put(step.call)
            yield step


class _Calls:
    """The calls of one account on a board, and which of them each id names."""

    __slots__ = ("_by_id", "_named")

    def __init__(self) -> None:
        self._by_id: dict[int, Call] = {}
        self._named: dict[str, int] = {}

    def open(self) -> list[Call]:
        """Those that go on, the oldest first."""
        return sorted((call for call in self._by_id.values() if call.open), key=_id)

    def get(self, id: int) -> Call | None:
        """The call with this id, if it is on the board."""
        return self._by_id.get(id)

    def put(self, call: Call) -> None:
        """Takes a call in, or what has become of it."""
        known = self._by_id.get(call.id)
        self._by_id[call.id] = call
        if known is not None and known.aliases is call.aliases:
            return
        for alias in call.aliases:
            # An id that was used more than once names the newest call, whichever was heard of last: so it is
            # in the store, and where one batch ends and the next begins must make no difference.
            self._named[alias] = max(call.id, self._named.get(alias, call.id))

    def find(self, notification: Notification) -> tuple[Call | None, list[Anomaly]]:
        """The call that a notification is about, and what was odd about recognising it.

        Ids are opaque: what one message calls `id` another calls `connId`. An id under which an open call
        was first heard decides, whatever else the message says (the documents show one id with two connIds).
        An id that a call got later decides as well, unless the connId names another open call that has it
        too. An id that names nothing, or only a call that has ended, may be a new one of an open call: of the
        one with the previous id, with the same connId, or with the callUuid for its id. Two different connIds
        under one callUuid stay two legs.
        """
        call_id = notification.call_id
        named = self._by_name(call_id)
        if named is not None and named.open and named.call_id == call_id:
            return named, []
        before = self._open(notification.previous_conn_id)
        same = self._open(notification.conn_id)
        if named is not None:
            if named.call_id != call_id and same is not None and call_id in same.aliases:
                return same, []
            if named.open or before is None:
                return named, []
        call = before or same
        if call is None:
            call = self._open(notification.call_uuid)
            if call is None or call.call_id != notification.call_uuid:
                return None, []
            if call.conn_id is not None and notification.conn_id is not None:
                return None, []
        return call, [Anomaly("id_changed", f"{call.call_id} is now called {call_id}")]

    def _by_name(self, alias: str) -> Call | None:
        number = self._named.get(alias)
        return None if number is None else self._by_id[number]

    def _open(self, alias: str | None) -> Call | None:
        call = self._by_name(alias) if alias else None
        return call if call is not None and call.open else None


def _begins_again(call: Call, heard: Heard, notification: Notification) -> bool:
    """Whether a message about an ended call is the first of another one under the same id.

    A call that is transferred away and back rings again under the callUuid that it had. An older message
    that arrives late looks the same, but for the server's clock. What a snapshot lists is live, whatever its
    state: if the end of the call was heard before, then it has come back while nobody listened.
    """
    if heard.source is Source.SNAPSHOT and call.ended_at is not None:
        return notification.state is not None and notification.state not in ENDINGS
    return notification.state in BEGINNINGS and not _is_late(call, notification)


def _is_late(call: Call, notification: Notification) -> bool:
    """Whether the server said it before something that we have heard already, by its own clock."""
    said_at, known_at = notification.server_at, call.server_at
    return said_at is not None and known_at is not None and said_at < known_at


def _opening(notification_id: int, heard: Heard, notification: Notification, odd: list[Anomaly]) -> Step:
    """The first message of a call."""
    at = heard.received_at
    state = notification.state or None
    anomalies = [*notification.oddities, *odd]
    if state is None:
        anomalies.append(Anomaly("malformed_field", "the first message of the call has no state"))
    elif state not in _STATES:
        anomalies.append(Anomaly("unknown_state", state))
    elif state not in TRANSITIONS[None]:
        anomalies.append(Anomaly("impossible_transition", f"the first that is heard is {state}"))
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
        changes.append(Change("capabilities", None, _in_order(notification.capabilities)))
    changes.extend(_movements(parties, parties))
    user_data = notification.user_data or {}
    changes.extend(_differences({}, user_data))
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
    ended = structs.replace(call, **_end(call, notification))
    return Step(ended, tuple(changes), tuple(anomalies), ended.parties, began=True, ended=True)


def _following(call: Call, heard: Heard, notification: Notification, odd: list[Anomaly]) -> Step:
    """A message about a call that is known."""
    at = max(call.last_heard_at, heard.received_at)
    anomalies = [*notification.oddities, *odd]
    _note_type(notification, anomalies)
    changes: list[Change] = []
    parties: tuple[Party, ...] = ()
    after: dict[str, Any] = {"last_heard_at": at, "notifications": call.notifications + 1}

    state = notification.state
    was_open = goes_on = call.open
    if state and state != call.state:
        moved = _move(call, notification, heard.source, at, anomalies)
        if moved:
            changes.append(Change("state", call.state or None, state))
            after.update(moved)
            goes_on = goes_on or state not in ENDINGS

    if not _says_the_same(notification, call):
        changes += _overwritten(call, notification, after)

    capabilities = notification.capabilities
    # Asked whether it is the same object first, as it mostly is: two sets are compared member by member.
    if (
        capabilities is not None
        and capabilities is not call.capabilities
        and capabilities != call.capabilities
    ):
        after["capabilities"] = capabilities
        changes.append(Change("capabilities", _in_order(call.capabilities), _in_order(capabilities)))

    if notification.participants is not None and goes_on:
        stays, parties = _stays(call.parties, notification.participants, at)
        if parties:
            after["parties"] = stays
            changes.extend(_movements(parties, stays))

    user_data = {} if notification.user_data_emptied else notification.user_data
    if user_data is not None and user_data != call.user_data:
        after["user_data"] = user_data
        changes.extend(_differences(call.user_data, user_data))

    known_ids = call.aliases
    if (
        notification.call_id not in known_ids
        or (notification.conn_id and notification.conn_id not in known_ids)
        or (notification.call_uuid and notification.call_uuid not in known_ids)
        or notification.previous_conn_id
    ):
        new_ids = [id for id in _ids(notification) if id not in known_ids]
        after["aliases"] = (*known_ids, *new_ids) if new_ids else known_ids
    if notification.device_id is not None:
        after["device_id"] = notification.device_id
    if call.number is None:
        stays = after.get("parties", call.parties)
        ani, dnis = after.get("ani", call.ani), after.get("dnis", call.dnis)
        after["number"] = _other_party(stays, ani, dnis, call.direction)
    if notification.extensions is not None:
        wrap_up_time_s = _wrap_up_time_s(notification.extensions)
        if wrap_up_time_s is not None:
            after["wrap_up_time_s"] = wrap_up_time_s
    if notification.duration_s is not None:
        after["server_duration_s"] = notification.duration_s
    server_at = notification.server_at
    if server_at is not None and (call.server_at is None or server_at >= call.server_at):
        after["server_at"] = server_at
    after["anomalies"] = call.anomalies + len(anomalies)

    followed = structs.replace(call, **after)
    if not (was_open and state in ENDINGS):
        return Step(followed, tuple(changes), tuple(anomalies), parties)
    ended = structs.replace(followed, **_end(followed, notification))
    moved_now = {party.ordinal for party in parties}
    left = tuple(
        party
        for party, was in zip(ended.parties, followed.parties, strict=True)
        if was.left_at is None or was.ordinal in moved_now
    )
    return Step(ended, tuple(changes), tuple(anomalies), left, ended=True)


def _says_the_same(notification: Notification, call: Call) -> bool:
    """Whether all _PLAIN_FIELDS are as they were, as in most messages. It says the names again, since looking
    fields up by their names costs a tenth of the whole fold."""
    return (
        notification.call_type == call.call_type
        and notification.ani == call.ani
        and notification.dnis == call.dnis
        and notification.phone_number == call.phone_number
        and notification.conn_id == call.conn_id
        and notification.call_uuid == call.call_uuid
        and notification.parent_call_id == call.parent_call_id
        and notification.mute == call.mute
        and notification.recording == call.recording
        and notification.supervisor_listening_in == call.supervisor_listening_in
        and notification.monitored_user_muted == call.monitored_user_muted
        and notification.monitoring == call.monitoring
        and notification.supervisor_monitoring_state == call.supervisor_monitoring_state
    )


def _overwritten(call: Call, notification: Notification, after: dict[str, Any]) -> Iterator[Change]:
    """The changes of _PLAIN_FIELDS, which become part of `after` as they are taken."""
    for name in _PLAIN_FIELDS:
        value, before = getattr(notification, name), getattr(call, name)
        if value is not None and value != before:
            after[name] = value
            yield Change(name, before, value)


@lru_cache(maxsize=1024)
def _in_order(capabilities: frozenset[str]) -> list[str]:
    """As it stands in a change; shared, since the same few sets come again and again."""
    return sorted(capabilities)


def _note_type(notification: Notification, anomalies: list[Anomaly]) -> None:
    kind = notification.notification_type
    if kind not in NOTIFICATION_TYPES and kind:
        anomalies.append(Anomaly("unknown_notification_type", kind))


def _move(
    call: Call, notification: Notification, source: Source, at: datetime, anomalies: list[Anomaly]
) -> dict[str, Any]:
    """The fields that another state changes; empty when the state is kept, because the call had ended."""
    state = notification.state or ""
    known = state in _STATES
    if not known:
        anomalies.append(Anomaly("unknown_state", state))
    after: dict[str, Any] = {"state": state, "state_since": at}
    if call.open:
        if known and call.state in _STATES and state not in _MAY_FOLLOW[call.state]:
            anomalies.append(Anomaly("impossible_transition", f"{call.state} to {state}"))
        booked_on = _BOOKED_ON.get(call.state)
        # A snapshot shows that the state has changed, not when: that stretch is not counted.
        if booked_on is not None and source is Source.COMETD:
            after[booked_on] = getattr(call, booked_on) + _elapsed_s(call.state_since, at)
    elif call.ended_at is None and state not in ENDINGS:
        # Its end was inferred, and wrongly: it speaks. It goes on from here.
        anomalies.append(Anomaly("after_end", f"{state} after an end that was only inferred"))
        after["settled"] = after["outcome"] = None
    elif call.state == State.RELEASED and state == State.COMPLETED:
        return _wrapped_up(call, source, at)
    else:
        kind = "late" if _is_late(call, notification) else "after_end"
        anomalies.append(Anomaly(kind, f"{state} after {call.state}"))
        return {}
    # A call that is held while it dials has not been answered; any other call on hold has.
    answered = state == State.ESTABLISHED or (state == State.HELD and call.state != State.DIALING)
    if answered and call.established_at is None:
        after["established_at"] = at
    if state == State.HELD:
        after["hold_count"] = call.hold_count + 1
    return after


def _end(call: Call, notification: Notification) -> dict[str, Any]:
    """The fields that the end of a call fixes; `call` is as of the message that ends it."""
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
    at = call.last_heard_at
    return {
        "ended_at": at,
        "outcome": outcome,
        "settled": settled,
        "parties": tuple(
            structs.replace(party, left_at=at) if party.left_at is None else party for party in call.parties
        ),
    }


def _wrapped_up(call: Call, source: Source, at: datetime) -> dict[str, Any]:
    """Completed after Released; a call that had settled keeps its figures."""
    after: dict[str, Any] = {"state": State.COMPLETED.value, "state_since": at}
    if call.settled is None and call.ended_at is not None:
        after["settled"] = "completed"
        if source is Source.COMETD:
            after["wrap_s"] = _elapsed_s(call.ended_at, at)
    return after


def _ended_unheard(call: Call, why: str) -> Step:
    """A call that ended and whose end nobody heard: closed without a time or a duration."""
    after = structs.replace(
        call,
        state=State.RELEASED.value,
        outcome=Outcome.ANSWERED if call.established_at is not None else Outcome.UNKNOWN,
        settled=why,
        anomalies=call.anomalies + 1,
    )
    return Step(
        after,
        (Change("state", call.state or None, State.RELEASED.value),),
        (Anomaly("ended_unheard", why),),
        ended=True,
    )


def _elapsed_s(since: datetime, until: datetime) -> float:
    return (until - since).total_seconds()


def _wrap_up_time_s(extensions: JsonObject | None) -> float | None:
    value = extensions.get("WrapUpTime") if extensions else None
    if type(value) is not int and type(value) is not float:  # a boolean is no number here
        return None
    try:
        seconds = float(value)
    except OverflowError:
        return None
    return seconds if math.isfinite(seconds) else None


def _other_party(
    parties: tuple[Party, ...], ani: str | None, dnis: str | None, direction: Direction
) -> str | None:
    """The number that a person would call "the number" of this call."""
    if parties and parties[0].number:
        return parties[0].number
    if direction is Direction.INBOUND:
        return ani or None
    return dnis or None if direction is Direction.OUTBOUND else None


def _shown(party: Party) -> JsonObject:
    """A party as it stands in a change."""
    shown: JsonObject = {"number": party.number}
    for name in ("e164", "formatted", "role"):
        if getattr(party, name):
            shown[name] = getattr(party, name)
    return shown


def _movements(moved: tuple[Party, ...], stays: tuple[Party, ...]) -> Iterator[Change]:
    """The changes of those who came or went; `stays` are all stays on the call."""
    keys = _stay_keys(stays)
    for party in moved:
        if party.left_at is None:
            yield Change("participant", None, _shown(party), keys[party.ordinal])
        else:
            yield Change("participant", _shown(party), None, keys[party.ordinal])


def _stay_keys(stays: tuple[Party, ...]) -> list[str]:
    """What names each stay among the changes: its number, made distinct where that number was there already.

    The key must be the same when a party joins and when it leaves, so it depends on what was before the stay
    only. A number with the mark in it could be taken for such a key, and always gets one of its own.
    """
    keys = []
    there_until: dict[str, datetime | None] = {}
    for party in stays:
        number = party.number
        until = there_until.get(number, _LONG_AGO)
        alone = until is not None and until < party.joined_at
        keys.append(number if alone and "#" not in number else f"{number}#{party.ordinal}")
        there_until[number] = None if until is None or party.left_at is None else max(until, party.left_at)
    return keys


def _stays(
    known: tuple[Party, ...], listed: tuple[Participant, ...], at: datetime
) -> tuple[tuple[Party, ...], tuple[Party, ...]]:
    """All stays after a message that lists who is there now, and those of them that began or ended with it.

    The list is a snapshot of the other parties. The same number twice is two parties.
    """
    if len(known) == len(listed) == 1 and known[0].left_at is None and known[0].number == listed[0].number:
        return known, ()  # as in most messages
    present = [party for party in known if party.left_at is None]
    if [*map(_number, present)] == [*map(_number, listed)]:
        return known, ()
    staying = Counter(map(_number, present)) & Counter(map(_number, listed))
    left = {}
    matched = staying.copy()
    for party in present:
        if matched[party.number]:
            matched[party.number] -= 1
        else:
            left[party.ordinal] = structs.replace(party, left_at=at)
    begun: list[Party] = []
    for each in listed:
        if staying[each.number]:
            staying[each.number] -= 1
        else:
            ordinal = len(known) + len(begun)
            begun.append(Party(ordinal, each.number, each.e164, each.formatted, each.role, at))
    stays = (*(left.get(party.ordinal, party) for party in known), *begun)
    return stays, (*left.values(), *begun)


def _differences(before: JsonObject, after: JsonObject) -> Iterator[Change]:
    """userData is a full snapshot: a key that it lacks is gone, and so is a value that is null."""
    for key, value in after.items():
        was = before.get(key)
        if was != value:
            yield Change("user_data", was, value, key)
    for key, value in before.items():
        if key not in after and value is not None:
            yield Change("user_data", value, None, key)


def diagram() -> str:
    """The states and transitions as a Mermaid `stateDiagram-v2`; the README shows exactly this."""
    lines = ["stateDiagram-v2"]
    for before, row in TRANSITIONS.items():
        lines.extend(f"    {before or '[*]'} --> {after}: {label}" for after, label in row.items())
    lines.extend(f"    {state} --> [*]" for state in sorted(ENDINGS))
    return "\n".join(lines)
