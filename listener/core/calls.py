"""The vocabulary: what was heard, what a call is, and how it changed.

Everything here is a frozen value without behaviour worth the name, so that the decoder, the fold,
the store and the tests can pass the same things about. `msgspec.Struct` is used instead of
`dataclass(frozen=True, slots=True)`, with the same meaning, because building a frozen dataclass of
thirty fields costs more than decoding the message that fills it. They are hidden from the cyclic garbage
collector (`gc=False`): they hold JSON values and each other, which form no cycles, and a collection that
walks over all of them stops the event loop for tens of milliseconds.

Genesys' own words are kept: states, capabilities and notification types are stored as received, also
the unknown ones. `State` lists the known states; a field that holds a state is a `str`, because we
observe and do not enforce.

Times are aware UTC datetimes of when *we* heard something; a `server_` prefix marks the server's own
clock, which is kept beside and never mixed in. Durations are seconds and end in `_s`.
"""

from datetime import datetime
from enum import StrEnum
from typing import Any

from msgspec import Struct

JsonObject = dict[str, Any]
"""A decoded JSON object; its values are data that we keep and never interpret."""


class State(StrEnum):
    """The call states seen at GWS v2, and `Completed`, which v3 adds (reference: Genesys, call resource)."""

    DIALING = "Dialing"
    RINGING = "Ringing"
    ESTABLISHED = "Established"
    HELD = "Held"
    RELEASED = "Released"
    COMPLETED = "Completed"


class Direction(StrEnum):
    """Who began the call, seen from the account: it dialled, it was rung, or we came too late to tell."""

    OUTBOUND = "outbound"
    INBOUND = "inbound"
    UNKNOWN = "unknown"


class Outcome(StrEnum):
    """How a call ended for its account; a call that goes on has none."""

    ANSWERED = "answered"
    UNANSWERED = "unanswered"
    UNKNOWN = "unknown"
    """It ended while nobody listened, or was met too late to know whether it was ever answered."""


class Source(StrEnum):
    """Where a message came from."""

    COMETD = "cometd"
    SNAPSHOT = "snapshot"
    """A REST reply of live calls, asked for after every (re-)subscription."""
    LISTENER = "listener"
    """Our own finding, written into the journal like a message, so that the calls follow from the journal
    alone: see `Closing`."""


class Heard(Struct, frozen=True, gc=False):
    """One raw message and its place, before anybody tried to understand it.

    `stream` and `position` are its identity: `stream` names one Bayeux session (or one snapshot) of one
    account, `position` counts that session's messages from 1 in the order of delivery. A message that
    comes again has the same place and counts once; an equal message at another place is another fact.
    """

    account: int
    """The account's id in the store."""
    stream: str
    """UUID text."""
    position: int
    received_at: datetime
    channel: str
    """The Bayeux channel, or the path of the REST request that a snapshot answers."""
    raw: bytes
    """The exact bytes, also where they are no JSON."""
    source: Source = Source.COMETD
    asked_at: datetime | None = None
    """For a snapshot: when it was asked for; what was heard since is newer than the snapshot. For a closing:
    nothing had been heard since then of the calls that it closes."""
    batch: tuple[int, int] | None = None
    """The number of the last batch that the session had whole with this message, as CometD's `ack` extension
    counts, and the position of that batch's last message: once this message is durable, the session can be
    resumed from there. None where the number is not known, or the server does not acknowledge."""


class Participant(Struct, frozen=True, gc=False):
    """Another party as one message names it. `number` is the best spelling there is, never empty
    unless the message had none at all."""

    number: str
    e164: str = ""
    formatted: str = ""
    digits: str = ""
    role: str = ""
    """v3 only: RoleOrigination, RoleDestination, RoleNewParty, RoleObserver, …"""


class Notification(Struct, frozen=True, gc=False):
    """One message about one call, in one spelling whatever the dialect was.

    None means that the message does not carry the field: the call keeps what it had. `user_data` is
    None when absent; whether that absence means "emptied" is `user_data_emptied`.
    """

    message_type: str
    notification_type: str
    call_id: str
    """As received: opaque, a callUuid or a connId. Empty only where the call has another id."""
    state: str | None = None
    call_uuid: str | None = None
    conn_id: str | None = None
    previous_conn_id: str | None = None
    parent_call_id: str | None = None
    """From parentCallPath, parentCallUri or parentConnId: the call that this consult belongs to."""
    call_type: str | None = None
    phone_number: str | None = None
    """The account's own DN."""
    device_id: str | None = None
    ani: str | None = None
    dnis: str | None = None
    participants: tuple[Participant, ...] | None = None
    capabilities: frozenset[str] | None = None
    user_data: JsonObject | None = None
    user_data_emptied: bool = False
    duration_s: float | None = None
    """The server's own count of seconds since the call began."""
    mute: str | None = None
    """"On" or "Off", or what else was sent."""
    recording: str | None = None
    """recordingState: Recording, Stopped, Paused, or what else was sent."""
    supervisor_listening_in: bool | None = None
    monitored_user_muted: bool | None = None
    monitoring: bool | None = None
    supervisor_monitoring_state: str | None = None
    extensions: JsonObject | None = None
    server_at: datetime | None = None
    """metrics.eventProcessing.serverGenerationTimestamp: neither unique nor a sequence."""
    dialect: str = "v2"
    """v2, v2-strings (participants as strings), v3, or resource (a bare call without envelope)."""
    oddities: tuple["Anomaly", ...] = ()
    """What the decoder noticed, such as duplicate keys; the fold hands them on."""


class Snapshot(Struct, frozen=True, gc=False):
    """The live calls of one account as a REST reply lists them. `complete` is false when the reply does
    not claim to list all of them (an error status): then nothing may be concluded from an absence."""

    calls: tuple[Notification, ...]
    complete: bool
    oddities: tuple["Anomaly", ...] = ()


class Closing(Struct, frozen=True, gc=False):
    """Calls of one account whose end, or the end of whose wrap-up, was waited for long enough. We write it
    ourselves (`listener.closing`): of any other `Source` it is not believed."""

    calls: tuple[int, ...]
    """The ids of the calls, as in `Call.id`."""
    reason: str
    """Why those that are still open are taken to have ended."""


class Aside(Struct, frozen=True, gc=False):
    """A message that we know and that concerns no call (devices, channels, outbound, errors): kept raw."""

    message_type: str
    notification_type: str = ""


class Unrecognised(Struct, frozen=True, gc=False):
    """A message that could not be understood; `reason` says why in one sentence. Kept raw and counted."""

    reason: str


Decoded = Notification | Snapshot | Closing | Aside | Unrecognised


class Anomaly(Struct, frozen=True, gc=False):
    """Something odd about a call or a message, recorded and never refused. `kind` is from a closed set
    (`ANOMALY_KINDS`), so that it can label a metric."""

    kind: str
    detail: str


ANOMALY_KINDS = frozenset(
    {
        "unknown_state",
        "unknown_notification_type",
        "impossible_transition",
        "after_end",
        "late",
        "duplicate_key",
        "id_changed",
        "id_reused",
        "malformed_field",
        "poisoned",
        "ended_unheard",
    }
)


class Change(Struct, frozen=True, gc=False):
    """One field of one call went from `before` to `after`.

    `field` is one of `CHANGE_FIELDS`; `key` says which one of several: the number of a participant, the
    key of a userData pair. Within a call, for the same field and key, `before` always equals the `after`
    of the change before it. What a call opens with is recorded as changes from None for the fields of
    `OPENING_FIELDS`; for the others the first `before` is what it opened with.
    """

    field: str
    before: Any
    after: Any
    key: str = ""


OPENING_FIELDS = frozenset({"state", "capabilities", "participant", "user_data", "recording"})

CHANGE_FIELDS = frozenset(
    {
        "state",
        "mute",
        "recording",
        "capabilities",
        "participant",
        "user_data",
        "call_type",
        "ani",
        "dnis",
        "phone_number",
        "conn_id",
        "call_uuid",
        "parent_call_id",
        "supervisor_listening_in",
        "monitored_user_muted",
        "monitoring",
        "supervisor_monitoring_state",
    }
)


class Party(Struct, frozen=True, gc=False):
    """A participant's stay on a call; `ordinal` counts the stays on that call from 0."""

    ordinal: int
    number: str
    e164: str
    formatted: str
    role: str
    joined_at: datetime
    left_at: datetime | None = None


class Call(Struct, frozen=True, gc=False):
    """One account's view (leg) of one call, as of the last message about it.

    `id` is the id of the notification that opened it, so that recomputing the calls from the journal
    gives them the same ids. A call id that comes back after its call ended opens another `Call`.
    """

    id: int
    account: int
    call_id: str
    """The first id under which it was heard."""
    aliases: tuple[str, ...]
    """Every id seen on it: id, callUuid, connId, previousConnId; without repeats, in order of appearance."""
    state: str
    state_since: datetime
    opened_at: datetime
    last_heard_at: datetime
    direction: Direction
    opened_by: Source
    call_uuid: str | None = None
    conn_id: str | None = None
    parent_call_id: str | None = None
    call_type: str | None = None
    phone_number: str | None = None
    device_id: str | None = None
    ani: str | None = None
    dnis: str | None = None
    number: str | None = None
    """The other party: the first participant, else ani or dnis by direction."""
    parties: tuple[Party, ...] = ()
    """Every stay, also the ended ones."""
    capabilities: frozenset[str] = frozenset()
    user_data: JsonObject = {}
    mute: str | None = None
    recording: str | None = None
    supervisor_listening_in: bool | None = None
    monitored_user_muted: bool | None = None
    monitoring: bool | None = None
    supervisor_monitoring_state: str | None = None
    established_at: datetime | None = None
    """When it was first heard in Established; None when it never was."""
    ended_at: datetime | None = None
    """When Released was heard; None while it goes on, and None for ever when its end was inferred."""
    ring_s: float = 0.0
    """Seconds in Dialing or Ringing, of the stretches whose beginning and end were heard."""
    talk_s: float = 0.0
    hold_s: float = 0.0
    hold_count: int = 0
    wrap_s: float | None = None
    """Seconds from Released to Completed, where Completed is sent; None elsewhere."""
    wrap_up_time_s: float | None = None
    """extensions.WrapUpTime: what the server says that the wrap-up may last."""
    server_duration_s: float | None = None
    """`duration` of the last message that carried it."""
    server_at: datetime | None = None
    notifications: int = 0
    anomalies: int = 0
    outcome: Outcome | None = None
    settled: str | None = None
    """Why its figures will not move any more: `released`, `completed`, `released: …` where the end of the
    wrap-up was not heard, `inferred: …` where the end was not; None while they may."""

    @property
    def open(self) -> bool:
        """True while neither an end was heard nor one was inferred."""
        return self.ended_at is None and self.settled is None


class Step(Struct, frozen=True, gc=False):
    """What one message did to one call: the call after it, its changes in order, and what was odd.

    `parties` are the stays that began or ended with it. `began` and `ended` mark the first message of a
    call and the one that ended it.
    """

    call: Call
    changes: tuple[Change, ...]
    anomalies: tuple[Anomaly, ...]
    parties: tuple[Party, ...] = ()
    began: bool = False
    ended: bool = False


class Noted(Struct, frozen=True, gc=False):
    """A message that was new to the journal, and what it was.

    What a notification says is in its steps: were all that was read of a batch kept until the commit, the
    next messages would be read into memory that has left the processor's cache.
    """

    heard: Heard
    notification_type: str = ""
    server_at: datetime | None = None
    """Both of a notification."""
    other: "Snapshot | Closing | Aside | Unrecognised | None" = None
    """What it was if it was no notification."""


def noted(heard: Heard, decoded: Decoded) -> Noted:
    """What is kept of a message and of what was read from it."""
    if isinstance(decoded, Notification):
        return Noted(heard, decoded.notification_type, decoded.server_at)
    return Noted(heard, other=decoded)


class Recorded(Struct, frozen=True, gc=False):
    """What one committed transaction did, for acknowledgements, metrics and observers."""

    entries: tuple[Noted, ...]
    """The messages that were new: those of one account in order, the accounts in any, or mixed."""
    steps: tuple[Step, ...]
    duplicates: int
    """Messages that had been committed before and were left out."""
    ids: tuple[int, ...] = ()
    """The id that each of the messages was given; those of one account rise."""
    origins: tuple[int, ...] = ()
    """For each step, which of the messages it follows from; they never fall."""


class Cover(Struct, frozen=True, gc=False):
    """From `at` on the account is observed (`cause` empty), or not, and why (one of `GAP_CAUSES`)."""

    account: int
    at: datetime
    cause: str = ""
    withdraws: bool = False
    """A session that was observed until `at` goes on, and its server kept everything: the gaps since then
    were none. The only way in which coverage takes back a gap."""


class Missing(Struct, frozen=True, gc=False):
    """Messages that were heard and are lost: nobody has them any more, and the account was not observed while
    they came. At least one of them may be missing for each value."""

    account: int | None
    """None: nobody knows whose they were. Then it is about every account that was listened to, and that no
    other value of the same list names."""
    until: datetime
    """The last of them was received then, or before."""
    since: datetime | None = None
    """When the message before them was received; None where only the store may know one."""


GAP_CAUSES = frozenset(
    {
        "not started",
        "disconnected",
        "session lost",
        "subscription refused",
        "login refused",
        "oversized",
        "malformed",
        "stalled",
        "storage down",
        "spool damaged",
        "stopped",
    }
)
