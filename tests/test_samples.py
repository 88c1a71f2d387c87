"""Every sample goes through decoding, the fold and the journal, and comes out as the sample says.

    LISTENER_SAMPLES=DIR pytest tests/test_samples.py

Without the variable the samples beside the checkout are taken, and where there are none, bodies of our own:
something is always run. A sample is a JSON file; keys beginning with "_" are its collector's remarks and are
no part of it; `_raw` is a text that is no JSON, to be kept and not parsed.

What a sample says is read here by hand, from plain JSON, and not with the decoder's help.
"""

import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import asyncpg
import pytest

from listener.core.calls import (
    Aside,
    Call,
    Decoded,
    Heard,
    Notification,
    Participant,
    Snapshot,
    Source,
    Step,
    Unrecognised,
)
from listener.core.decode import decode
from listener.core.normalise import Board, ids_needed
from listener.store.journal import Journal
from tests.core.messages import encoded, handful

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "reference" / "samples"
ACCOUNT = 1
AT = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)


class Pairs(list[tuple[str, Any]]):
    """A JSON object as it was written, repeated keys included."""

    def get(self, name: str) -> Any:
        """The last value of a key, or None."""
        return dict(self).get(name)


class Sample(NamedTuple):
    """One body, and what plain JSON makes of it; None where it is no JSON."""

    name: str
    raw: bytes
    body: Pairs | None


def written(value: Any) -> str:
    """JSON text, the pairs of every object in their order."""
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{written(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(written(item) for item in value) + "]"
    return json.dumps(value)


def samples_in(name: str, document: bytes) -> Iterator[Sample]:
    """The bodies in one file: a list of bodies is as many samples."""
    value = json.loads(document, object_pairs_hook=Pairs)
    for number, each in enumerate([value] if isinstance(value, Pairs) else value):
        called = name if isinstance(value, Pairs) else f"{name}[{number}]"
        if (raw := each.get("_raw")) is not None:
            yield Sample(called, raw.encode(), None)
        else:
            body = Pairs(pair for pair in each if not pair[0].startswith("_"))
            yield Sample(called, written(body).encode(), body)


def collected() -> list[Sample]:
    """All samples: from the directory that is named, else from beside the checkout, else our own."""
    named = os.environ.get("LISTENER_SAMPLES")
    place = Path(named) if named else BESIDE
    if named or place.is_dir():
        files = sorted(place.rglob("*.json"))
        found = [sample for file in files for sample in samples_in(file.stem, file.read_bytes())]
        assert found, f"{place} holds no samples (*.json)"
        return found
    return [sample for name, body in handful().items() for sample in samples_in(name, encoded(body))]


SAMPLES = collected()
every_sample = pytest.mark.parametrize("sample", SAMPLES, ids=[sample.name for sample in SAMPLES])


# ── What a sample says ────────────────────────────────────────────────────────────────────────────────


def plain(value: Any) -> Any:
    """A JSON value as Python's own; a key that was written more than once has the list of its values."""
    if isinstance(value, Pairs):
        found: dict[str, list[Any]] = {}
        for key, item in value:
            found.setdefault(key, []).append(plain(item))
        return {key: items[0] if len(items) == 1 else items for key, items in found.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def data_of(body: Pairs) -> Pairs:
    """The message without its Bayeux envelope."""
    data = body.get("data")
    return data if isinstance(data, Pairs) else body


def call_in(data: Pairs) -> Pairs | None:
    """The one call that a body is about."""
    call = data.get("call")
    if isinstance(call, Pairs):
        return call
    known = data.get("id") or data.get("callUuid") or data.get("connId")
    bare = data.get("messageType") is None and data.get("calls") is None and data.get("state") is not None
    return data if bare and known else None


def last_part(path: Any) -> str | None:
    """The id at the end of a path or URI."""
    return path.split("/")[-1] if path else None


def user_data_in(call: Pairs) -> Any:
    """userData as an object, also where it was written as a list of pairs."""
    value = call.get("userData")
    if isinstance(value, list) and not isinstance(value, Pairs):
        listed = [(each.get("key"), each.get("value")) for each in value if isinstance(each, Pairs)]
        return plain(
            Pairs((key, Pairs(_kvlist(item))) if _is_kvlist(item) else (key, item) for key, item in listed)
        )
    return plain(value)


def _is_kvlist(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, Pairs) and each.get("key") for each in value)


def _kvlist(value: list[Pairs]) -> list[tuple[str, Any]]:
    return [(each.get("key"), each.get("value")) for each in value]


def clock_in(data: Pairs) -> datetime | None:
    """The server's clock."""
    metrics = plain(data.get("metrics")) or {}
    stamp = (metrics.get("eventProcessing") or {}).get("serverGenerationTimestamp")
    return None if stamp is None else datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=stamp)


PLAIN_FIELDS: dict[str, Callable[[Pairs], Any]] = {
    "state": lambda call: call.get("state"),
    "call_uuid": lambda call: call.get("callUuid"),
    "conn_id": lambda call: call.get("connId"),
    "previous_conn_id": lambda call: call.get("previousConnId"),
    "call_type": lambda call: call.get("callType"),
    "device_id": lambda call: last_part(call.get("deviceUri") or call.get("devicePath")),
    "ani": lambda call: call.get("ani"),
    "dnis": lambda call: call.get("dnis"),
    "mute": lambda call: call.get("mute"),
    "recording": lambda call: call.get("recordingState"),
    "supervisor_listening_in": lambda call: call.get("supervisorListeningIn"),
    "monitored_user_muted": lambda call: call.get("monitoredUserMuted"),
    "monitoring": lambda call: call.get("monitoring"),
    "supervisor_monitoring_state": lambda call: (plain(call.get("supervisorMonitoringState")) or {}).get(
        "state"
    ),
    "user_data": user_data_in,
    "parent_call_id": lambda call: (
        last_part(call.get("parentCallPath") or call.get("parentCallUri")) or call.get("parentConnId")
    ),
    "duration_s": lambda call: None if call.get("duration") is None else float(call.get("duration")),
    "capabilities": lambda call: (
        None if call.get("capabilities") is None else frozenset(call.get("capabilities"))
    ),
}


def assert_says(heard: Notification, call: Pairs) -> None:
    """Every field of the notification is what stands in the call."""
    assert heard.call_id == str(call.get("id") or call.get("callUuid") or call.get("connId"))
    said = {name: read(call) for name, read in PLAIN_FIELDS.items()}
    assert {name: getattr(heard, name) for name in PLAIN_FIELDS} == said
    listed = call.get("participants")
    details = call.get("participantsInfo") or []
    if listed is None:
        assert heard.participants is None or details
        return
    assert heard.participants is not None
    assert len(heard.participants) == len(listed)
    for place, (participant, written_so) in enumerate(zip(heard.participants, listed, strict=True)):
        shape = plain(written_so)
        if isinstance(shape, str):
            shape = (plain(details[place]) if place < len(details) else {}) | {"phoneNumber": shape}
        assert_names(participant, shape)


def assert_names(participant: Participant, shape: dict[str, Any]) -> None:
    """A participant has every spelling that stands in the sample, and none that does not."""
    numbers = [shape.get(name) for name in ("phoneNumber", "number", "digits", "E164digits", "e164Number")]
    numbers.append(shape.get("formattedPhoneNumber"))
    assert participant.number == next((number for number in numbers if number), "")
    assert participant.e164 == (shape.get("e164Number") or shape.get("E164digits") or "")
    assert participant.digits == (shape.get("digits") or shape.get("E164digits") or "")
    assert participant.formatted == (shape.get("formattedPhoneNumber") or "")
    assert participant.role == (shape.get("role") or "")


# ── Decoding ──────────────────────────────────────────────────────────────────────────────────────────


def test_there_are_samples() -> None:
    """A run over nothing would pass and prove nothing."""
    assert SAMPLES
    assert any(isinstance(decode(sample.raw), Notification) for sample in SAMPLES)


@every_sample
def test_each_sample_is_decoded(sample: Sample) -> None:
    """None is refused that names itself, and every field is as the sample says."""
    decoded = decode(sample.raw)
    if sample.body is None:
        assert isinstance(decoded, Unrecognised)
        assert decoded.reason
        return
    data = data_of(sample.body)
    calls, call = data.get("calls"), call_in(data)
    if call is not None:
        assert isinstance(decoded, Notification), decoded
        assert_says(decoded, call)
        assert decoded.notification_type == (data.get("notificationType") or "")
        assert decoded.message_type == (data.get("messageType") or decoded.message_type)
        assert decoded.phone_number == (call.get("phoneNumber") or data.get("phoneNumber"))
        assert decoded.extensions == plain(data.get("extensions"))
        assert decoded.server_at == clock_in(data)
    elif calls is not None:
        assert isinstance(decoded, Snapshot), decoded
        assert decoded.complete is (data.get("statusCode") == 0)
        for heard, listed in zip(decoded.calls, calls, strict=True):
            assert_says(heard, listed)
    elif data.get("messageType"):
        assert decoded == Aside(data.get("messageType"), data.get("notificationType") or "")
    elif {"statusCode", "devices"} & set(dict(data)) or str(sample.body.get("channel")).startswith("/meta/"):
        assert isinstance(decoded, Aside), decoded
    else:
        assert isinstance(decoded, Unrecognised)


# ── The fold ──────────────────────────────────────────────────────────────────────────────────────────


def heard_of(samples: list[Sample], account: int = ACCOUNT) -> list[Heard]:
    """The samples as one session hears them, a second apart; snapshots as somebody asked for them."""
    stream, heard = str(uuid4()), []
    for position, sample in enumerate(samples, start=1):
        at = AT + timedelta(seconds=position)
        snapshot = isinstance(decode(sample.raw), Snapshot)
        channel = "/api/v2/me/calls?fields=*" if snapshot else "/v2/me/calls"
        source = Source.SNAPSHOT if snapshot else Source.COMETD
        asked_at = at - timedelta(milliseconds=300) if snapshot else None
        heard.append(Heard(account, stream, position, at, channel, sample.raw, source, asked_at))
    return heard


def assert_followed(step: Step, heard: Notification) -> None:
    """A call is, after a message, what the message said."""
    call = step.call
    assert heard.call_id in call.aliases
    assert heard.state is None or call.state == heard.state
    for name in ("call_uuid", "conn_id", "parent_call_id", "call_type", "ani", "dnis", "mute", "recording"):
        assert getattr(heard, name) in (None, getattr(call, name))
    if heard.capabilities is not None:
        assert call.capabilities == heard.capabilities
    if heard.user_data is not None:
        assert call.user_data == heard.user_data
    if heard.participants is not None:
        there = [party.number for party in call.parties if call.ended_at or party.left_at is None]
        assert there == [participant.number for participant in heard.participants]


OF_THE_SAMPLE = {
    "duplicate_key",
    "malformed_field",
    "unknown_state",
    "unknown_notification_type",
    "impossible_transition",
}
"""What a first message can have odd about it; the other kinds speak of what was there before."""


@every_sample
def test_each_sample_opens_its_call(sample: Sample) -> None:
    """On an empty board, a sample is the first message of its call, which is then as the sample says."""
    (message,) = heard_of([sample])
    decoded = decode(message.raw, message.channel)
    steps = Board([]).hear(1, message, decoded)
    calls = called(decoded)
    assert len(steps) == len(calls)
    for step, heard in zip(steps, calls, strict=True):
        assert step.began
        assert_followed(step, heard)
        assert {odd.kind for odd in step.anomalies} <= OF_THE_SAMPLE


def called(decoded: Decoded) -> tuple[Notification, ...]:
    """The calls that a message is about."""
    if isinstance(decoded, Snapshot):
        return decoded.calls
    return (decoded,) if isinstance(decoded, Notification) else ()


def test_all_samples_can_be_heard_in_one_session() -> None:
    """One after the other, over and over: the fold takes them all, and each call has been heard of."""
    board, number, steps = Board([]), 1, []
    for heard in heard_of(SAMPLES * 3):
        decoded = decode(heard.raw, heard.channel)
        steps += board.hear(number, heard, decoded)
        number += ids_needed(decoded)
    known = {alias for step in steps for alias in step.call.aliases}
    assert {call.call_id for sample in SAMPLES for call in called(decode(sample.raw))} <= known


# ── The journal ───────────────────────────────────────────────────────────────────────────────────────


async def test_the_journal_keeps_every_sample(journal: Journal, sql: asyncpg.Connection) -> None:
    """Each message with its exact bytes, also what is no JSON, and each call as the fold left it; hearing
    them again adds nothing."""
    heard = heard_of(SAMPLES)
    recorded = await journal.record(heard)
    assert (len(recorded.entries), recorded.duplicates) == (len(SAMPLES), 0)

    rows = await sql.fetch("SELECT raw, reason, message_type FROM notification ORDER BY position")
    assert [row["raw"] for row in rows] == [sample.raw for sample in SAMPLES]
    for row, each in zip(rows, heard, strict=True):
        unrecognised = isinstance(decode(each.raw, each.channel), Unrecognised)
        assert (row["reason"] is not None) is unrecognised
        assert unrecognised or row["message_type"]

    last: dict[int, Call] = {step.call.id: step.call for step in recorded.steps}
    stored = await sql.fetch("SELECT id, call_id, state, user_data, capabilities FROM call ORDER BY id")
    assert [
        (
            row["id"],
            row["call_id"],
            row["state"],
            json.loads(row["user_data"]),
            frozenset(row["capabilities"]),
        )
        for row in stored
    ] == [(c.id, c.call_id, c.state, c.user_data, c.capabilities) for _, c in sorted(last.items())]

    again = await journal.record(heard)
    assert (again.entries, again.steps, again.duplicates) == ((), (), len(SAMPLES))
    assert await sql.fetchval("SELECT count(*) FROM notification") == len(SAMPLES)
