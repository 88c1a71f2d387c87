"""How a call becomes a row and a row a call, and the statements that the journal runs over many of them.

New rows go in by COPY. Calls that go on are updated from one array of composite values (`call_moved`), which
holds the columns that move in the life of a call; the others are corrected apart, in the rare batch that
needs it. All that is small goes in one statement. This was chosen by measurement (`benchmarks/journal.py`).

Moments are microseconds here and JSON is bytes (`listener.store.connect.speak_plainly`). The statements are
put together from names in this module and in the schema, and from nothing else.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any

import asyncpg
import msgspec
from sqlalchemy import Dialect, Table
from sqlalchemy.dialects.postgresql import dialect as postgresql

from listener.core.calls import Call, Direction, Outcome, Party, Source
from listener.store import schema
from listener.store.connect import Connection, microseconds, moment

Row = tuple[Any, ...]

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
steady = attrgetter(*_STEADY)
"""What is corrected apart: the arguments of `CORRECT_CALLS` behind the id, without the aliases."""
_moving = attrgetter(*_MOVING)


def _moving_at(call: Call) -> Row:
    return (
        microseconds(call.state_since),
        microseconds(call.last_heard_at),
        None if call.established_at is None else microseconds(call.established_at),
        None if call.ended_at is None else microseconds(call.ended_at),
        None if call.server_at is None else microseconds(call.server_at),
    )


encode = msgspec.json.Encoder().encode
"""JSON of a value. What is absent is NULL, which the caller sees to."""
_parties_from_json = msgspec.json.Decoder(tuple[Party, ...]).decode
_object_from_json = msgspec.json.Decoder(dict[str, Any]).decode


def begun(call: Call) -> Row:
    """The whole row, in the order of `BEGUN`."""
    return (
        *_fixed(call),
        microseconds(call.opened_at),
        *steady(call),
        *_moving(call),
        *_moving_at(call),
        sorted(call.capabilities),
        call.aliases,
        encode(call.parties),
        encode(call.user_data),
    )


BEGUN = _FIXED + _STEADY + _MOVING + _MOVING_AT + _LONG
"""The columns of `begun`."""


def moved(was: Call, call: Call) -> Row:
    """A value of the type `call_moved`, with NULL for the long columns that stayed as they were."""
    return (
        call.id,
        *_moving(call),
        *_moving_at(call),
        None if call.capabilities is was.capabilities else _set(call.capabilities),
        None if call.parties is was.parties else encode(call.parties),
        None if call.user_data is was.user_data else encode(call.user_data),
    )


@lru_cache(maxsize=1024)
def _set(texts: frozenset[str]) -> str:
    """The same few sets of capabilities come again and again."""
    return array(sorted(texts))


def array(texts: Iterable[str]) -> str:
    """PostgreSQL's text form of an array: cheaper here than an array inside of an array."""
    return "{" + ",".join('"' + t.replace("\\", "\\\\").replace('"', '\\"') + '"' for t in texts) + "}"


_PLACES = {name: place for place, name in enumerate(Call.__struct_fields__)}
_ALIASES, _PARTIES, _CAPABILITIES, _USER_DATA, _DIRECTION, _OPENED_BY, _OUTCOME = (
    _PLACES[name]
    for name in ("aliases", "parties", "capabilities", "user_data", "direction", "opened_by", "outcome")
)
_MOMENTS = [_PLACES[name] for name in ("opened_at", *_MOVING_AT)]


def call_of(row: asyncpg.Record) -> Call:
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


async def copy(
    connection: Connection, table: Table, rows: Sequence[Row], columns: Sequence[str] = ()
) -> None:
    """Add the rows, whose values stand in the order of these columns, or of the table's."""
    if rows:
        names = list(columns or table.columns.keys())
        await connection.copy_records_to_table(table.name, records=rows, columns=names)


def columns(rows: Sequence[Row], count: int) -> Iterable[Sequence[Any]]:
    """The rows turned: one array for each column, `count` empty ones where there is no row."""
    return zip(*rows, strict=True) if rows else ((),) * count


def _unnest(table: Table, columns: Iterable[str], *, first: int = 1, **other: str) -> str:
    """`unnest($1::type[], …) AS n (column, …)` for columns of a table; `other` names other types for some.
    `first` is the number of the first parameter."""
    names = list(columns)
    dialect: Dialect = postgresql()  # type: ignore[no-untyped-call] # SQLAlchemy left it so
    types = [other.get(name) or str(table.columns[name].type.compile(dialect)) for name in names]
    arrays = ", ".join(f"${place}::{kind}[]" for place, kind in enumerate(types, start=first))
    return f"unnest({arrays}) AS n ({', '.join(names)})"


def _set_to(columns: Iterable[str]) -> str:
    return ", ".join(f"{name} = n.{name}" for name in columns)


_CALL_COLUMNS = ", ".join(f"c.{schema.CALL_COLUMN_OF.get(name, name)}" for name in Call.__struct_fields__)

POSITIONS = """
    WITH mine AS MATERIALIZED (SELECT listener_reserve_ids($2) AS first, pg_current_xact_id() AS xid)
    SELECT mine.first, mine.xid, s.id::text, s.position
    FROM mine LEFT JOIN stream s ON s.id = ANY($1::uuid[])"""
"""How far each stream is committed; with it, the first of $2 ids and the transaction's own id."""

NAMED = """
    SELECT a.alias, a.account_id, a.call_id FROM unnest($1::text[], $2::integer[]) AS n (alias, account_id)
    JOIN call_alias a ON a.alias = n.alias AND a.account_id = n.account_id
    UNION ALL
    SELECT NULL, o.account_id, o.id FROM call o
    WHERE o.account_id = ANY($3::integer[]) AND o.ended_at IS NULL AND o.settled IS NULL"""
"""Which calls some ids name, each at its account; and all open calls of the accounts that have a snapshot."""

CALLS = f"SELECT {_CALL_COLUMNS} FROM call c WHERE c.id = ANY($1)"  # noqa: S608 - see the top
"""Whole calls, for `call_of`."""

OPEN_CALLS = f"""
    SELECT {_CALL_COLUMNS} FROM call c
    WHERE c.account_id = ANY($1) AND c.ended_at IS NULL AND c.settled IS NULL ORDER BY c.id"""  # noqa: S608
"""The same of all that go on at some accounts."""

MOVE_CALLS = f"""
    UPDATE call c SET {_set_to(_MOVING + _MOVING_AT)},
        capabilities = coalesce(n.capabilities::text[], c.capabilities),
        participants = coalesce(n.participants, c.participants),
        user_data = coalesce(n.user_data, c.user_data)
    FROM unnest($1::call_moved[]) AS n WHERE c.id = n.id"""  # noqa: S608
"""What messages moved; its argument is a list of `moved`."""

CORRECT_CALLS = f"""
    UPDATE call c SET {_set_to(_STEADY)}, aliases = n.aliases::text[]
    FROM {_unnest(schema.call, ("id", *_STEADY, "aliases"), aliases="text")} WHERE c.id = n.id"""  # noqa: S608
"""What is known from the first message as a rule, and was not, or has changed."""

STREAM = ("id", "account_id", "source", "opened_at", "position")
NAME = ("alias", "account_id", "call_id")
JOINED = ("call_id", "ordinal", "number", "e164", "formatted", "role", "joined_at", "left_at")
LEFT = ("call_id", "ordinal", "left_at")

REST = f"""
    WITH marked AS (
        INSERT INTO stream ({", ".join(STREAM)})
        SELECT * FROM {_unnest(schema.stream, STREAM)}
        ON CONFLICT (id) DO UPDATE SET position = excluded.position
    ), named AS (
        INSERT INTO call_alias AS a ({", ".join(NAME)})
        SELECT * FROM {_unnest(schema.call_alias, NAME, first=len(STREAM) + 1)}
        ON CONFLICT (alias, account_id) DO UPDATE SET call_id = excluded.call_id
        WHERE excluded.call_id > a.call_id
    ), joined AS (
        INSERT INTO participant ({", ".join(JOINED)})
        SELECT * FROM {_unnest(schema.participant, JOINED, first=len(STREAM + NAME) + 1)}
    )
    UPDATE participant p SET left_at = n.left_at
    FROM {_unnest(schema.participant, LEFT, first=len(STREAM + NAME + JOINED) + 1)}
    WHERE p.call_id = n.call_id AND p.ordinal = n.ordinal"""  # noqa: S608
"""All that is small, together, since each statement of its own costs a round trip: its arguments are the
columns STREAM, NAME, JOINED and LEFT of the streams that moved, the ids that were given, and the participants
who joined and left."""
