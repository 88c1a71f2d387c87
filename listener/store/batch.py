"""What one transaction does with a batch of messages: what is new of it, what follows from that, which rows.

`write` runs under the locks that the journal holds, and asks four things of the database, whatever the size
of the batch: up to which position each stream is committed, which calls the messages' ids name, the calls
themselves, and then that all rows be written. Between reading and writing, the messages are folded in memory.

New rows go in by COPY. Calls that go on are updated from one array of composite values (`call_moved`), which
holds the columns that move in the life of a call; the others are corrected apart, in the rare batch that
needs it. Both were chosen by measurement (`benchmarks/journal.py`).

**Calls are kept, not trusted.** Reading a call back costs more than folding a message into it, so the calls
that were written are kept in `Recollection`, each with the id of the transaction that wrote it. PostgreSQL
tells that id for every row (`xmin`), and it changes with every write, whoever writes: a kept call is used
only when the row, read under the lock, still has the same. So several recorders may work on one account.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import lru_cache
from operator import attrgetter
from typing import Any

import asyncpg
import msgspec
from sqlalchemy import Dialect, Table
from sqlalchemy.dialects.postgresql import dialect as postgresql

from listener.core import normalise
from listener.core.calls import (
    Aside,
    Call,
    Decoded,
    Direction,
    Entry,
    Notification,
    Outcome,
    Party,
    Recorded,
    Snapshot,
    Source,
    Step,
    Unrecognised,
)
from listener.store import schema
from listener.store.connect import Connection, microseconds, moment

CALLS_KEPT_MAX = 20_000
"""Calls kept in memory, at 2 to 3 KB each. Beyond that the one kept longest goes, and is read when needed."""

REASON_CHARS_MAX = 300
"""A longer reason why a message was stored raw only is cut."""

_OPENED_AT = list(schema.stream.columns.keys()).index("opened_at")
_XID_MASK = 0xFFFF_FFFF
"""`xmin` holds the lower half of a transaction's id."""

_Row = tuple[Any, ...]


class RefusedValue(Exception):
    """PostgreSQL, or the way there, refuses a value of the batch. What was written since the last savepoint
    is lost."""


class Recollection:
    """Calls as they were last read or written, each with the transaction that wrote it."""

    def __init__(self) -> None:
        self._calls: dict[int, tuple[int, Call]] = {}

    def get(self, id: int, written_by: int) -> Call | None:
        """The call, if its row is still the one that was kept."""
        kept = self._calls.get(id)
        return kept[1] if kept is not None and kept[0] == written_by else None

    def keep(self, calls: Iterable[Call], written_by: int) -> None:
        """Keep the open ones, which will be heard of again. Only after their transaction has committed."""
        for call in calls:
            self._calls.pop(call.id, None)
            if call.open:
                self._calls[call.id] = (written_by, call)
        while len(self._calls) > CALLS_KEPT_MAX:
            del self._calls[next(iter(self._calls))]


class Written:
    """What `write` did: the answer for the caller, and what may be kept once it is committed."""

    def __init__(self, recorded: Recorded, calls: Iterable[Call] = (), transaction: int = 0) -> None:
        self.recorded = recorded
        self.calls = calls
        self.transaction = transaction


async def write(connection: Connection, entries: Sequence[Entry], kept: Recollection) -> Written:
    """Store what is new of the entries and all that follows from it, in the transaction under way.

    The caller holds the locks of all their accounts. Raises RefusedValue when a value cannot be stored.
    """
    streams = list({entry.heard.stream for entry in entries})
    wanted = sum(normalise.ids_needed(entry.decoded) for entry in entries)
    try:
        known = await connection.fetch(_POSITIONS, streams, wanted)
        first_id, transaction = known[0]["first"], known[0]["xid"] & _XID_MASK
        positions = {row["id"]: row["position"] for row in known}
        fresh = []
        for entry in entries:
            heard = entry.heard
            if heard.position > positions.get(heard.stream, 0):
                positions[heard.stream] = heard.position
                fresh.append(entry)
        recorded_before = len(entries) - len(fresh)
        if not fresh:
            return Written(Recorded((), (), recorded_before))
        rows = _Rows(await _load(connection, fresh, kept))
        rows.fold(fresh, first_id=first_id)
        await rows.store(connection)
    except (asyncpg.DataError, asyncpg.ProgramLimitExceededError, UnicodeError, OverflowError) as error:
        raise RefusedValue(str(error)) from error
    return Written(
        Recorded(tuple(fresh), tuple(rows.steps), recorded_before), rows.calls.values(), transaction
    )


async def write_around(connection: Connection, entries: Sequence[Entry]) -> Recorded:
    """As `write`, for a batch with a value in it that cannot be stored: halves it until the message stands
    alone, and stores that one raw. The bytes of a message can always be stored."""
    await connection.execute("SAVEPOINT part")
    try:
        # Nothing is kept of it: below a savepoint, rows are written by transactions of other ids.
        written = await write(connection, entries, Recollection())
    except RefusedValue as refusal:
        await connection.execute("ROLLBACK TO SAVEPOINT part; RELEASE SAVEPOINT part")
        reason = str(refusal)
    else:
        await connection.execute("RELEASE SAVEPOINT part")
        return written.recorded
    if len(entries) == 1:
        return (await write(connection, [_raw_only(entries[0], reason)], Recollection())).recorded
    half = len(entries) // 2
    first = await write_around(connection, entries[:half])
    second = await write_around(connection, entries[half:])
    return Recorded(
        first.entries + second.entries, first.steps + second.steps, first.duplicates + second.duplicates
    )


def _raw_only(entry: Entry, reason: str) -> Entry:
    """The entry without anything that was read from it."""
    heard = msgspec.structs.replace(entry.heard, channel=_storable(entry.heard.channel))
    return Entry(heard, Unrecognised(_storable(f"poisoned: {reason}")[:REASON_CHARS_MAX]))


def _storable(text: str) -> str:
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")


async def open_calls(connection: Connection, accounts: Iterable[int]) -> list[Call]:
    """The calls of the accounts that had not ended when they were last heard of."""
    rows = await connection.fetch(_OPEN_CALLS, list(accounts))
    return [_call(row)[1] for row in rows]


async def _load(connection: Connection, entries: Sequence[Entry], kept: Recollection) -> list[Call]:
    """Every call that the entries may touch."""
    named: dict[tuple[str, int], None] = {}
    whole: set[int] = set()
    for entry in entries:
        account = entry.heard.account
        if type(entry.decoded) is Snapshot:
            whole.add(account)
        for id in normalise.ids(entry.decoded):
            named[id, account] = None
    aliases, accounts = zip(*named, strict=True) if named else ((), ())
    calls: list[Call] = []
    unknown: list[int] = []
    for id, written_by in await connection.fetch(_NAMED, aliases, accounts, list(whole)):
        call = kept.get(id, written_by)
        if call is None:
            unknown.append(id)
        else:
            calls.append(call)
    if unknown:
        for row in await connection.fetch(_CALLS, unknown):
            written_by, call = _call(row)
            kept.keep((call,), written_by)
            calls.append(call)
    return calls


class _Rows:
    """The rows of one batch: `fold` makes them, `store` writes them."""

    def __init__(self, calls: list[Call]) -> None:
        self._board = normalise.Board(calls)
        self._known = {call.id: call for call in calls}
        self.steps: list[Step] = []
        self.calls: dict[int, Call] = {}
        self._streams: dict[str, _Row] = {}
        self._parties: dict[tuple[int, int], Party] = {}
        self._notifications: list[_Row] = []
        self._changes: list[_Row] = []
        self._anomalies: list[_Row] = []

    def fold(self, entries: Sequence[Entry], *, first_id: int) -> None:
        """Hear the entries in order; `first_id` is the first of the ids reserved for them."""
        number = first_id
        for entry in entries:
            heard, decoded = entry.heard, entry.decoded
            steps = self._board.hear(number, heard, decoded)
            call_id = server_at = reason = None
            notification_type = ""
            if isinstance(decoded, Notification):
                message_type, notification_type = decoded.message_type, decoded.notification_type
                server_at = decoded.server_at and microseconds(decoded.server_at)
                if steps:
                    call_id = steps[0].call.id
            elif isinstance(decoded, Aside):
                message_type, notification_type = decoded.message_type, decoded.notification_type
            elif isinstance(decoded, Snapshot):
                message_type = "Snapshot"
            else:
                message_type, reason = "", decoded.reason
            at = microseconds(heard.received_at)
            self._notifications.append(
                (at, number, heard.account, heard.stream, heard.position, heard.source, heard.channel,
                 message_type, notification_type, call_id, heard.asked_at and microseconds(heard.asked_at),
                 server_at, reason, heard.raw)
            )  # fmt: skip
            known = self._streams.get(heard.stream)
            opened_at = at if known is None else known[_OPENED_AT]
            self._streams[heard.stream] = (
                heard.stream, heard.account, heard.source, opened_at, at, heard.position
            )  # fmt: skip
            self._follow(number, at, decoded, steps)
            number += normalise.ids_needed(decoded)

    def _follow(self, number: int, at: int, decoded: Decoded, steps: Sequence[Step]) -> None:
        """The rows of what the message did to its calls."""
        changes, anomalies = 0, 0
        if isinstance(decoded, Snapshot):
            for odd in decoded.oddities:
                self._anomalies.append((number, anomalies, None, at, odd.kind, odd.detail))
                anomalies += 1
        for step in steps:
            call = step.call
            self.steps.append(step)
            self.calls[call.id] = call
            for change in step.changes:
                self._changes.append(
                    (call.id, number, changes, at, change.field, change.key, _json(change.before),
                     _json(change.after))
                )  # fmt: skip
                changes += 1
            for party in step.parties:
                self._parties[call.id, party.ordinal] = party
            for odd in step.anomalies:
                self._anomalies.append((number, anomalies, call.id, at, odd.kind, odd.detail))
                anomalies += 1

    async def store(self, connection: Connection) -> None:
        """Write all rows, with a number of statements that does not depend on theirs."""
        begun: list[_Row] = []
        moved: list[_Row] = []
        corrected: list[_Row] = []
        names: dict[tuple[str, int], int] = {}
        for id, call in sorted(self.calls.items()):
            was = self._known.get(id)
            if was is None:
                begun.append(_begun(call))
            else:
                moved.append(_moved(was, call))
                if was.aliases is not call.aliases or _steady(was) != _steady(call):
                    corrected.append((id, *_steady(call), _array(call.aliases)))
            if was is None or was.aliases is not call.aliases:
                # In the order of the calls' ids: an id that was used again names the newer one.
                names.update(((alias, call.account), id) for alias in call.aliases)
        await _copy(connection, schema.notification, self._notifications)
        await _copy(connection, schema.change, self._changes)
        await _copy(connection, schema.anomaly, self._anomalies)
        await _copy(connection, schema.call, begun, _BEGUN)
        if moved:
            await connection.execute(_MOVE_CALLS, moved)
        await _each(connection, _CORRECT_CALLS, corrected)
        await _each(connection, _NAME_CALLS, [(*name, id) for name, id in names.items()])
        await self._store_parties(connection)
        await _each(connection, _MOVE_STREAMS, list(self._streams.values()))

    async def _store_parties(self, connection: Connection) -> None:
        joined: list[_Row] = []
        left: list[_Row] = []
        for (call_id, ordinal), party in self._parties.items():
            known = self._known.get(call_id)
            if known is None or ordinal >= len(known.parties):
                joined.append(
                    (call_id, ordinal, party.number, party.e164, party.formatted, party.role,
                     microseconds(party.joined_at), _microseconds(party.left_at))
                )  # fmt: skip
            else:
                left.append((call_id, ordinal, _microseconds(party.left_at)))
        await _copy(connection, schema.participant, joined)
        await _each(connection, _LEAVE, left)


# ── a call and its row ────────────────────────────────────────────────────────────────────────────────────

_FIXED = ("id", "account_id", "call_id", "direction", "opened_by", "opened_at")
_STEADY = (
    "call_uuid", "conn_id", "parent_call_id", "call_type", "phone_number", "device_id", "ani", "dnis",
    "number", "supervisor_listening_in", "monitored_user_muted", "monitoring", "supervisor_monitoring_state",
)  # fmt: skip
"""What is known from the first message as a rule: corrected apart, when it has to be."""
_MOVING = (
    "mute", "recording", "state", "ring_s", "talk_s", "hold_s", "hold_count", "wrap_s", "wrap_up_time_s",
    "server_duration_s", "notifications", "anomalies", "outcome", "settled",
)  # fmt: skip
_MOVING_AT = ("state_since", "last_heard_at", "established_at", "ended_at", "server_at")
"""What most messages move; `call_moved` has these columns in this order, behind the id."""
_LONG = ("capabilities", "aliases", "participants", "user_data")

_fixed = attrgetter("id", "account", "call_id", "direction", "opened_by")
_steady = attrgetter(*_STEADY)
_moving = attrgetter(*_MOVING)


def _microseconds(at: datetime | None) -> int | None:
    return None if at is None else microseconds(at)


def _moving_at(call: Call) -> _Row:
    return (
        microseconds(call.state_since),
        microseconds(call.last_heard_at),
        None if call.established_at is None else microseconds(call.established_at),
        None if call.ended_at is None else microseconds(call.ended_at),
        None if call.server_at is None else microseconds(call.server_at),
    )


_encode = msgspec.json.Encoder().encode
_parties_from_json = msgspec.json.Decoder(tuple[Party, ...]).decode
_object_from_json = msgspec.json.Decoder(dict[str, Any]).decode


def _json(value: Any) -> bytes | None:
    """JSON text; None is SQL's NULL: the absence of a value, which JSON's null is not told apart from."""
    return None if value is None else _encode(value)


def _begun(call: Call) -> _Row:
    """The whole row, in the order of `_BEGUN`."""
    return (
        *_fixed(call),
        microseconds(call.opened_at),
        *_steady(call),
        *_moving(call),
        *_moving_at(call),
        sorted(call.capabilities),
        call.aliases,
        _encode(call.parties),
        _encode(call.user_data),
    )


_BEGUN = _FIXED + _STEADY + _MOVING + _MOVING_AT + _LONG


def _moved(was: Call, call: Call) -> _Row:
    """A value of the type `call_moved`, with NULL for the long columns that stayed as they were."""
    return (
        call.id,
        *_moving(call),
        *_moving_at(call),
        None if call.capabilities is was.capabilities else _set(call.capabilities),
        None if call.parties is was.parties else _encode(call.parties),
        None if call.user_data is was.user_data else _encode(call.user_data),
    )


@lru_cache(maxsize=1024)
def _set(texts: frozenset[str]) -> str:
    """The same few sets of capabilities come again and again."""
    return _array(sorted(texts))


def _array(texts: Iterable[str]) -> str:
    """PostgreSQL's text form of an array: cheaper here than an array inside of an array."""
    return "{" + ",".join('"' + t.replace("\\", "\\\\").replace('"', '\\"') + '"' for t in texts) + "}"


_PLACES = {name: place for place, name in enumerate(Call.__struct_fields__)}
_ALIASES, _PARTIES, _CAPABILITIES, _USER_DATA, _DIRECTION, _OPENED_BY, _OUTCOME = (
    _PLACES[name]
    for name in ("aliases", "parties", "capabilities", "user_data", "direction", "opened_by", "outcome")
)
_MOMENTS = [_PLACES[name] for name in ("opened_at", *_MOVING_AT)]


def _call(row: asyncpg.Record) -> tuple[int, Call]:
    """Of a row of `_CALLS`: the transaction that wrote it, and the call."""
    written_by, *values = row
    values[_ALIASES] = tuple(values[_ALIASES])
    values[_PARTIES] = _parties_from_json(values[_PARTIES])
    values[_CAPABILITIES] = frozenset(values[_CAPABILITIES])
    values[_USER_DATA] = _object_from_json(values[_USER_DATA])
    values[_DIRECTION] = Direction(values[_DIRECTION])
    values[_OPENED_BY] = Source(values[_OPENED_BY])
    for place in _MOMENTS:
        if values[place] is not None:
            values[place] = moment(values[place])
    if values[_OUTCOME] is not None:
        values[_OUTCOME] = Outcome(values[_OUTCOME])
    return written_by, Call(*values)


# ── statements ────────────────────────────────────────────────────────────────────────────────────────────


async def _copy(
    connection: Connection, table: Table, rows: Sequence[_Row], columns: Sequence[str] = ()
) -> None:
    """Add the rows, whose values stand in the order of these columns, or of the table's."""
    if rows:
        names = list(columns or table.columns.keys())
        await connection.copy_records_to_table(table.name, records=rows, columns=names)


async def _each(connection: Connection, statement: str, rows: Sequence[_Row]) -> None:
    """Run a statement over arrays once for all rows: one array for each of its parameters."""
    if rows:
        await connection.execute(statement, *zip(*rows, strict=True))


def _unnest(table: Table, columns: Iterable[str], **other: str) -> str:
    """`unnest($1::type[], …) AS n (column, …)` for columns of a table; `other` names other types for some."""
    names = list(columns)
    dialect: Dialect = postgresql()  # type: ignore[no-untyped-call]
    types = [other.get(name) or str(table.columns[name].type.compile(dialect)) for name in names]
    arrays = ", ".join(f"${place}::{kind}[]" for place, kind in enumerate(types, start=1))
    return f"unnest({arrays}) AS n ({', '.join(names)})"


def _set_to(columns: Iterable[str]) -> str:
    return ", ".join(f"{name} = n.{name}" for name in columns)


_CALL_COLUMNS = ", ".join(f"c.{schema.CALL_COLUMN_OF.get(name, name)}" for name in Call.__struct_fields__)

_POSITIONS = """
    WITH mine AS MATERIALIZED (SELECT listener_reserve_ids($2) AS first, pg_current_xact_id() AS xid)
    SELECT mine.first, mine.xid, s.id::text, s.position
    FROM mine LEFT JOIN stream s ON s.id = ANY($1::uuid[])"""

_NAMED = """
    SELECT c.id, c.xmin FROM call c WHERE c.id IN (
        SELECT a.call_id FROM unnest($1::text[], $2::integer[]) AS n (alias, account_id)
        JOIN call_alias a ON a.alias = n.alias AND a.account_id = n.account_id
        UNION
        SELECT o.id FROM call o
        WHERE o.account_id = ANY($3::integer[]) AND o.ended_at IS NULL AND o.settled IS NULL)"""

# The texts below are put together from names in this module and the schema alone.
_CALLS = f"SELECT c.xmin, {_CALL_COLUMNS} FROM call c WHERE c.id = ANY($1)"  # noqa: S608

_OPEN_CALLS = f"""
    SELECT c.xmin, {_CALL_COLUMNS} FROM call c
    WHERE c.account_id = ANY($1) AND c.ended_at IS NULL AND c.settled IS NULL ORDER BY c.id"""  # noqa: S608

_MOVE_CALLS = f"""
    UPDATE call c SET {_set_to(_MOVING + _MOVING_AT)},
        capabilities = coalesce(n.capabilities::text[], c.capabilities),
        participants = coalesce(n.participants, c.participants),
        user_data = coalesce(n.user_data, c.user_data)
    FROM unnest($1::call_moved[]) AS n WHERE c.id = n.id"""  # noqa: S608

_CORRECT_CALLS = f"""
    UPDATE call c SET {_set_to(_STEADY)}, aliases = n.aliases::text[]
    FROM {_unnest(schema.call, ("id", *_STEADY, "aliases"), aliases="text")} WHERE c.id = n.id"""  # noqa: S608

_NAME_CALLS = f"""
    INSERT INTO call_alias AS a (alias, account_id, call_id)
    SELECT * FROM {_unnest(schema.call_alias, ("alias", "account_id", "call_id"))}
    ON CONFLICT (alias, account_id) DO UPDATE SET call_id = excluded.call_id
    WHERE excluded.call_id > a.call_id"""  # noqa: S608

_LEAVE = f"""
    UPDATE participant p SET left_at = n.left_at
    FROM {_unnest(schema.participant, ("call_id", "ordinal", "left_at"))}
    WHERE p.call_id = n.call_id AND p.ordinal = n.ordinal"""  # noqa: S608

_MOVE_STREAMS = f"""
    INSERT INTO stream SELECT * FROM {_unnest(schema.stream, schema.stream.columns.keys())}
    ON CONFLICT (id) DO UPDATE SET heard_at = excluded.heard_at, position = excluded.position"""  # noqa: S608
