"""How a call becomes a row and a row a call, and the statements that the journal runs over many of them.

What is only added goes in by COPY, or with the rest where it is little; all else in one statement, to which
rows come as arrays of composite values: of a table's own type, or of `call_written`. This was chosen by
measurement (`benchmarks/journal.py`): an array for each column costs the client twice as much. So the values
of a row stand in the order of its table's columns.

Moments are microseconds here and JSON is bytes (`listener.store.connect.speak_plainly`). The statements are
put together from names in this module and in the schema, and from nothing else.
"""

from collections.abc import AsyncIterator, Iterable, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any

import asyncpg
import msgspec
from sqlalchemy import Table

from listener.core.calls import Call, Direction, Outcome, Party, Source
from listener.store import schema
from listener.store.connect import Connection, microseconds, moment

Row = tuple[Any, ...]

_FIXED = ("account_id", "call_id", "direction", "opened_by", "opened_at")
"""Said once, when the call begins."""
_PLAIN = (
    "call_uuid", "conn_id", "parent_call_id", "call_type", "phone_number", "device_id", "ani", "dnis",
    "number", "mute", "recording", "supervisor_listening_in", "monitored_user_muted", "monitoring",
    "supervisor_monitoring_state", "state", "ring_s", "talk_s", "hold_s", "hold_count", "wrap_s",
    "wrap_up_time_s", "server_duration_s", "notifications", "anomalies", "outcome", "settled",
)  # fmt: skip
_MOMENTS = ("state_since", "last_heard_at", "established_at", "ended_at", "server_at")
_LONG = ("capabilities", "aliases", "participants", "user_data")
"""Worth leaving out when they stay as they were."""

_plain = attrgetter(*_PLAIN)

encode = msgspec.json.Encoder().encode
"""JSON of a value. What is absent is NULL, which the caller sees to."""
_parties_from_json = msgspec.json.Decoder(tuple[Party, ...]).decode
_object_from_json = msgspec.json.Decoder(dict[str, Any]).decode


def written(call: Call, was: Call | None) -> Row:
    """A value of the type `call_written`, whose attributes are id, _FIXED, _PLAIN, _MOMENTS and _LONG.

    `was` is the call as the database has it. Then what is fixed is NULL, and so are the long columns that
    stayed as they were.
    """
    return (
        call.id,
        *(_NOT_FIXED if was is not None else _fixed(call)),
        *_plain(call),
        microseconds(call.state_since),
        microseconds(call.last_heard_at),
        None if call.established_at is None else microseconds(call.established_at),
        None if call.ended_at is None else microseconds(call.ended_at),
        None if call.server_at is None else microseconds(call.server_at),
        None if was is not None and call.capabilities is was.capabilities else _set(call.capabilities),
        None if was is not None and call.aliases is was.aliases else _array(call.aliases),
        None if was is not None and call.parties is was.parties else encode(call.parties),
        None if was is not None and call.user_data is was.user_data else encode(call.user_data),
    )


_NOT_FIXED = (None,) * len(_FIXED)


def _fixed(call: Call) -> Row:
    return call.account, call.call_id, call.direction, call.opened_by, microseconds(call.opened_at)


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
_MOMENT_PLACES = [_PLACES[name] for name in ("opened_at", *_MOMENTS)]


def call_of(row: asyncpg.Record) -> Call:
    """The call of a row that has `CALL_COLUMNS`."""
    values = list(row)
    values[_ALIASES] = tuple(values[_ALIASES])
    values[_PARTIES] = _parties_from_json(values[_PARTIES])
    values[_CAPABILITIES] = frozenset(values[_CAPABILITIES])
    values[_USER_DATA] = _object_from_json(values[_USER_DATA])
    values[_DIRECTION] = Direction(values[_DIRECTION])
    values[_OPENED_BY] = Source(values[_OPENED_BY])
    for place in _MOMENT_PLACES:
        if values[place] is not None:
            values[place] = moment(values[place])
    if values[_OUTCOME] is not None:
        values[_OUTCOME] = Outcome(values[_OUTCOME])
    return Call(*values)


# ── statements ────────────────────────────────────────────────────────────────────────────────────────────


async def copy(connection: Connection, table: Table, rows: Sequence[Row] | AsyncIterator[Row]) -> None:
    """Add the rows, whose values stand in the order of the table's columns."""
    if rows:
        await connection.copy_records_to_table(table.name, records=rows, columns=_names(table))


def columns(rows: Sequence[Row], count: int) -> Iterable[Sequence[Any]]:
    """The rows turned: one array for each column, `count` empty ones where there is no row."""
    return zip(*rows, strict=True) if rows else ((),) * count


def _names(table: Table) -> list[str]:
    return list(table.columns.keys())


CALL_COLUMNS = ", ".join(f"c.{schema.CALL_COLUMN_OF.get(name, name)}" for name in Call.__struct_fields__)
"""Of a call `c`, as `call_of` takes them."""

POSITIONS = """
    WITH mine AS MATERIALIZED (SELECT listener_reserve_ids($2) AS first, pg_current_xact_id() AS xid)
    SELECT mine.first, mine.xid, s.id::text, s.position
    FROM mine LEFT JOIN stream s ON s.id = ANY($1::uuid[])"""
"""How far each stream is committed; with it, the first of $2 ids and the transaction's own id."""

BATCHES_AGAIN = """
    UPDATE stream s SET batch = n.batch, batch_position = n.batch_position
    FROM unnest($1::uuid[], $2::bigint[], $3::bigint[]) AS n (id, batch, batch_position)
    WHERE s.id = n.id AND (s.batch_position < n.batch_position OR s.position <= n.batch_position)"""
"""Batches that came again will be acknowledged by the number that they have now, so it is kept before: unless
what is kept reaches further, or is unknown because of messages beyond."""

NAMED = """
    SELECT a.alias, a.account_id, a.call_id FROM unnest($1::text[], $2::integer[]) AS n (alias, account_id)
    JOIN call_alias a ON a.alias = n.alias AND a.account_id = n.account_id
    UNION ALL
    SELECT NULL, o.account_id, o.id FROM call o
    WHERE o.account_id = ANY($3::integer[]) AND o.ended_at IS NULL AND o.settled IS NULL"""
"""Which calls some ids name, each at its account; and all open calls of the accounts that have a snapshot."""

CALLS = f"SELECT {CALL_COLUMNS} FROM call c WHERE c.id = ANY($1)"  # noqa: S608 - see the top
"""Whole calls, for `call_of`."""

OPEN_CALLS = f"""
    SELECT {CALL_COLUMNS} FROM call c
    WHERE c.account_id = ANY($1) AND c.ended_at IS NULL AND c.settled IS NULL ORDER BY c.id"""  # noqa: S608
"""The same of all that go on at some accounts."""

ALL_OPEN_CALLS = f"""
    SELECT {CALL_COLUMNS} FROM call c
    WHERE c.ended_at IS NULL AND c.settled IS NULL ORDER BY c.id"""  # noqa: S608
"""The same of all accounts, also of those that are not listened to any more."""

_WRITTEN = ("id", *_FIXED, *_PLAIN, *_MOMENTS, *_LONG)

_WRITE_PARAMETERS = 5


def _write(*, first: int, condition: str = "true") -> str:
    """The WITH queries that write calls and what belongs to them, for the statements below.

    Its parameters, beginning with number `first`, are lists of rows: of `written`; of `stream`, those that
    moved; of `call_alias`, the ids that were given; and of `participant`, those who joined and those who
    left. All of it together, since each statement of its own costs a round trip. Nothing is touched before
    the condition has been computed.
    """
    calls, streams, aliases, joined, left = range(first, first + _WRITE_PARAMETERS)
    return f"""written AS MATERIALIZED (
        SELECT {", ".join(_WRITTEN[:-4])}, capabilities::text[], aliases::text[], participants, user_data
        FROM unnest(${calls}::call_written[]) WHERE {condition}
    ), begun AS (
        INSERT INTO call ({", ".join(_WRITTEN)}) SELECT * FROM written WHERE account_id IS NOT NULL
    ), moved AS (
        UPDATE call c SET {", ".join(f"{name} = n.{name}" for name in (*_PLAIN, *_MOMENTS))},
            {", ".join(f"{name} = coalesce(n.{name}, c.{name})" for name in _LONG)}
        FROM written n WHERE c.id = n.id AND n.account_id IS NULL
    ), marked AS (
        INSERT INTO stream SELECT * FROM unnest(${streams}::stream[]) WHERE {condition}
        ON CONFLICT (id) DO UPDATE SET
            position = excluded.position, batch = excluded.batch, batch_position = excluded.batch_position
    ), named AS (
        INSERT INTO call_alias AS a SELECT * FROM unnest(${aliases}::call_alias[]) WHERE {condition}
        ON CONFLICT (alias, account_id) DO UPDATE SET call_id = excluded.call_id
        WHERE excluded.call_id > a.call_id
    ), joined AS (
        INSERT INTO participant SELECT * FROM unnest(${joined}::participant[]) WHERE {condition}
    ), parted AS (
        UPDATE participant p SET left_at = n.left_at
        FROM unnest(${left}::participant[]) AS n
        WHERE p.call_id = n.call_id AND p.ordinal = n.ordinal AND {condition}
    )"""  # noqa: S608 - see the top


WRITE = f"WITH {_write(first=1)} SELECT 1 AS done"
"""All that is not only added; see `_write` for its arguments. It answers with a column, unasked, since
asyncpg (0.32) writes eight bytes past the end of a row that has none."""

_EXPECTED = 4
_EXPECT = """
    held AS MATERIALIZED (
        SELECT id, xmin AS written_by FROM account WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE
    ), expected AS MATERIALIZED (
        SELECT listener_expect(
            (SELECT array_agg(written_by ORDER BY id) FROM held) = $2::xid[]
            AND NOT EXISTS (
                SELECT FROM unnest($4::call_alias[]) AS n
                JOIN call_alias a ON a.alias = n.alias AND a.account_id = n.account_id)
        ) AS met
    ), heard AS (
        UPDATE account a SET heard_at = greatest(a.heard_at, n.heard_at)
        FROM unnest($1::integer[], $3::timestamptz[]) AS n (id, heard_at)
        WHERE a.id = n.id AND (SELECT met FROM expected)
    )"""
"""The rows of the batch's accounts are as they were left, and no call has any of some ids; else the statement
fails with the SQLSTATE OUTDATED. Its arguments are the accounts in order, which transaction wrote the row of
each, when each was heard; and the ids, as rows of `call_alias` of which the call is not looked at."""

OUTDATED = "LS001"

_MET = "(SELECT met FROM expected)"

WRITE_AS_EXPECTED = f"""
    WITH {_EXPECT}, {_write(first=1 + _EXPECTED, condition=_MET)}
    SELECT pg_current_xact_id() FROM expected"""  # noqa: S608 - see the top
"""WRITE under the condition of _EXPECT, whose arguments come first. Gives the transaction's id."""


def _add(table: Table, *, number: int) -> str:
    return f"INSERT INTO {table.name} SELECT * FROM unnest(${number}::{table.name}[]) WHERE {_MET}"  # noqa: S608 - see the top


_ADDED = 1 + _EXPECTED + _WRITE_PARAMETERS

WRITE_AT_ONCE = f"""
    WITH {_EXPECT}, {_write(first=1 + _EXPECTED, condition=_MET)},
    notified AS ({_add(schema.notification, number=_ADDED)}),
    changed AS ({_add(schema.change, number=_ADDED + 1)}),
    odd AS ({_add(schema.anomaly, number=_ADDED + 2)})
    SELECT pg_current_xact_id() FROM expected"""  # noqa: S608 - see the top
"""WRITE_AS_EXPECTED and the rows that are only added, three lists that come last: a whole transaction in one
round trip. For many rows COPY is quicker."""
