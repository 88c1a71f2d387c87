"""What one transaction does with a batch of messages: what is new of it, what follows from that, which rows.

`write` runs under the locks of the batch's accounts. It asks the database up to which position each stream is
committed and which calls the messages' ids name, folds the messages in memory, and writes all rows: a handful
of statements, whatever the size of the batch.

New rows go in by COPY. Calls that go on are updated from one array of composite values (`call_moved`), which
holds the columns that move in the life of a call; the others are corrected apart, in the rare batch that
needs it. Both were chosen by measurement (`benchmarks/journal.py`).

**What was written is kept, not trusted.** Finding and reading the calls of a batch costs more than folding
messages into them, so each account's open calls are kept in `Recollection` after a commit. Every batch also
writes the row of each of its accounts, and PostgreSQL says for a row which transaction wrote it last
(`xmin`): what is kept of an account is used only if that was the transaction that it was kept after. So
several recorders may work on one account, and whoever else changes an account's calls must write its row.
"""

from collections.abc import Iterable, Mapping, Sequence
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


class _Account:
    """What is known of one account: its open calls, and those of their ids that were asked for."""

    __slots__ = ("calls", "counted", "names", "written_by")

    def __init__(self, written_by: int) -> None:
        self.written_by = written_by
        self.calls: dict[int, Call] = {}
        self.names: dict[str, int] = {}
        self.counted = 0


class Recollection:
    """What is known of each account since it was last written, by which transaction."""

    def __init__(self) -> None:
        self._accounts: dict[int, _Account] = {}
        self.calls = 0
        """How many calls are kept."""

    def of(self, account: int, written_by: int) -> _Account:
        """What is known, if that transaction was the last one to write the account; else nothing."""
        known = self._accounts.get(account)
        if known is not None and known.written_by == written_by:
            return known
        return _Account(written_by)

    def keep(self, account: int, known: _Account) -> None:
        """Keep what is known now, and let go of what was kept longest when that is too much."""
        before = self._accounts.pop(account, None)
        if before is not None:
            self.calls -= before.counted
        self._accounts[account] = known
        known.counted = len(known.calls)
        self.calls += known.counted
        while self.calls > CALLS_KEPT_MAX and len(self._accounts) > 1:
            self.calls -= self._accounts.pop(next(iter(self._accounts))).counted


class Written:
    """What `write` did: the answer, and what may be kept of it once it is committed."""

    def __init__(self, recorded: Recorded, rows: "_Rows | None" = None, transaction: int = 0) -> None:
        self.recorded = recorded
        self._rows = rows
        self._transaction = transaction

    def keep(self, kept: Recollection) -> None:
        """Call it after the commit, and only then."""
        if self._rows is None:
            return
        for call in self._rows.calls.values():
            known = self._rows.known[call.account]
            if call.open:
                known.calls[call.id] = call
            elif known.calls.pop(call.id, None) is not None:
                # What has ended is seldom heard of again: its ids are looked up when it is.
                for alias in call.aliases:
                    if known.names.get(alias) == call.id:
                        del known.names[alias]
        for (alias, account), id in self._rows.names.items():
            known = self._rows.known[account]
            if id in known.calls:
                known.names[alias] = id
            else:
                known.names.pop(alias, None)
        for account, known in self._rows.known.items():
            known.written_by = self._transaction
            kept.keep(account, known)


async def write(
    connection: Connection, entries: Sequence[Entry], held: Mapping[int, int], kept: Recollection
) -> Written:
    """Store what is new of the entries and all that follows from it, in the transaction under way.

    It holds the rows of all their accounts, and has written them: `held` says for each which transaction was
    the last to do so before. Raises RefusedValue when a value cannot be stored.
    """
    streams = list({entry.heard.stream for entry in entries})
    wanted = sum(normalise.ids_needed(entry.decoded) for entry in entries)
    try:
        marks = await connection.fetch(_POSITIONS, streams, wanted)
        positions = {row["id"]: row["position"] for row in marks}
        fresh = []
        for entry in entries:
            heard = entry.heard
            if heard.position > positions.get(heard.stream, 0):
                positions[heard.stream] = heard.position
                fresh.append(entry)
        duplicates = len(entries) - len(fresh)
        rows = _Rows({account: kept.of(account, written_by) for account, written_by in held.items()})
        if fresh:
            await rows.load(connection, fresh)
            rows.fold(fresh, first_id=marks[0]["first"])
            await rows.store(connection)
    except (asyncpg.DataError, asyncpg.ProgramLimitExceededError, UnicodeError, OverflowError) as error:
        raise RefusedValue(str(error)) from error
    recorded = Recorded(tuple(fresh), tuple(rows.steps), duplicates)
    return Written(recorded, rows, marks[0]["xid"] & _XID_MASK)


async def write_around(connection: Connection, entries: Sequence[Entry], held: Mapping[int, int]) -> Recorded:
    """As `write`, for a batch with a value in it that cannot be stored: halves it until the message stands
    alone, and stores that one raw. The bytes of a message can always be stored."""
    await connection.execute("SAVEPOINT part")
    try:
        written = await write(connection, entries, held, Recollection())
    except RefusedValue as refusal:
        await connection.execute("ROLLBACK TO SAVEPOINT part; RELEASE SAVEPOINT part")
        reason = str(refusal)
    else:
        await connection.execute("RELEASE SAVEPOINT part")
        return written.recorded
    if len(entries) == 1:
        return (await write(connection, [_raw_only(entries[0], reason)], held, Recollection())).recorded
    half = len(entries) // 2
    first = await write_around(connection, entries[:half], held)
    second = await write_around(connection, entries[half:], held)
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
    return [_call(row) for row in await connection.fetch(_OPEN_CALLS, list(accounts))]


class _Rows:
    """One batch: `load` reads what it may touch, `fold` makes its rows, `store` writes them."""

    def __init__(self, known: dict[int, _Account]) -> None:
        self.known = known
        self.steps: list[Step] = []
        self.calls: dict[int, Call] = {}
        """Every call that was touched, as it is after the batch."""
        self.names: dict[tuple[str, int], int | None] = {}
        """The ids that were looked up or given, with their accounts, and the calls that they name as far as
        that is known without asking."""
        self._before: dict[int, Call] = {}
        self._streams: dict[str, _Row] = {}
        self._parties: dict[tuple[int, int], Party] = {}
        self._notifications: list[_Row] = []
        self._changes: list[_Row] = []
        self._anomalies: list[_Row] = []

    async def load(self, connection: Connection, entries: Sequence[Entry]) -> None:
        """Every call that the entries may touch: what is known of them, and the rest from the database."""
        unknown: dict[tuple[str, int], None] = {}
        whole: set[int] = set()
        before = self._before
        for entry in entries:
            account, decoded = entry.heard.account, entry.decoded
            known = self.known[account]
            if isinstance(decoded, Snapshot):
                whole.add(account)
            for alias in normalise.ids(decoded):
                id = known.names.get(alias)
                if id is None:
                    unknown[alias, account] = None
                else:
                    before[id] = known.calls[id]
        if not unknown and not whole:
            return
        aliases, accounts = zip(*unknown, strict=True) if unknown else ((), ())
        missing: list[int] = []
        for alias, account, id in await connection.fetch(_NAMED, aliases, accounts, list(whole)):
            if alias is not None:
                self.names[alias, account] = id
            call = self.known[account].calls.get(id)
            if call is not None:
                before[id] = call
            else:
                missing.append(id)
        if missing:
            for row in await connection.fetch(_CALLS, missing):
                call = _call(row)
                before[call.id] = call
                if call.open:
                    self.known[call.account].calls[call.id] = call

    def fold(self, entries: Sequence[Entry], *, first_id: int) -> None:
        """Hear the entries in order; `first_id` is the first of the ids reserved for them."""
        board = normalise.Board(self._before.values())
        number = first_id
        for entry in entries:
            heard, decoded = entry.heard, entry.decoded
            steps = board.hear(number, heard, decoded)
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
                heard.stream, heard.account, heard.source, opened_at, heard.position
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
            was = self._before.get(id)
            if was is None:
                begun.append(_begun(call))
            else:
                moved.append(_moved(was, call))
                if was.aliases is not call.aliases or _steady(was) != _steady(call):
                    corrected.append((id, *_steady(call), _array(call.aliases)))
            if was is None or was.aliases is not call.aliases:
                # In the order of the calls' ids: an id that was used again names the newer one. An older call
                # that learns of an id may not get it, since a newer one may have it.
                for alias in call.aliases:
                    names[alias, call.account] = id
                    self.names[alias, call.account] = id if was is None else None
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
            before = self._before.get(call_id)
            if before is None or ordinal >= len(before.parties):
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


def _call(row: asyncpg.Record) -> Call:
    """The call of a row that has `_CALL_COLUMNS`."""
    values = list(row)
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
    return Call(*values)


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

# An index look-up for each id, and all open calls of the accounts that a snapshot is of.
_NAMED = """
    SELECT a.alias, a.account_id, a.call_id FROM unnest($1::text[], $2::integer[]) AS n (alias, account_id)
    JOIN call_alias a ON a.alias = n.alias AND a.account_id = n.account_id
    UNION ALL
    SELECT NULL, o.account_id, o.id FROM call o
    WHERE o.account_id = ANY($3::integer[]) AND o.ended_at IS NULL AND o.settled IS NULL"""

# The texts below are put together from names in this module and the schema alone.
_CALLS = f"SELECT {_CALL_COLUMNS} FROM call c WHERE c.id = ANY($1)"  # noqa: S608

_OPEN_CALLS = f"""
    SELECT {_CALL_COLUMNS} FROM call c
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
    ON CONFLICT (id) DO UPDATE SET position = excluded.position"""  # noqa: S608
