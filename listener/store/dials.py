"""The write side of dials: placed ones before they are sent, then whatever is heard of any, fact by fact.

It keeps no truth of its own between two batches, as the journal does not: the rows of a batch's dials are
locked, in the order of their ids, the facts are folded into them (`listener.core.dialling.advance`), and
dials, facts and marks are written back in one transaction. So several processes may tell a dial something,
and being told the same twice changes nothing: a dial knows the newest message that it was told, and the core
ignores a fact that it had.

**Effect once.** A dial that is placed is there before its request is sent, and its idempotency key is
unique: whoever comes second is given the first one. An overheard dial is named after its call, and made if it
is not there. `dial_mark` says for each account up to which message its calls were told; since the ids of one
account's messages rise in the order of commit, what a crash left untold is exactly what is beyond (`untold`),
and the dials that wait are told their calls again (`told_again`), which is harmless.

Rows go in as one JSON document, which PostgreSQL takes apart: the statements stay the same for any number of
rows, and so does the number of statements.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import asyncpg
import msgspec
from msgspec import Struct, structs

from listener.core.calls import Heard, JsonObject, Source
from listener.core.dialling import (
    DEADLINES,
    SOUTH_AFRICA,
    Accepted,
    Advance,
    CallHeard,
    CallRecord,
    Cause,
    Deadlines,
    Dial,
    Elapsed,
    Fact,
    HangupRequested,
    NoojeeStatus,
    NotAnswered,
    Refused,
    Reported,
    System,
    advance,
    linked,
    normalised,
)
from listener.core.dialnews import Mark, News, Told, Trouble, retold, trouble
from listener.store import rows, schema
from listener.store.connect import Connection, microseconds, moment
from listener.store.journal import Journal

UNTOLD_MAX = 1000
"""Calls of one page of `untold`."""

PREVIEWS_MAX = 200
"""Messages about outbound records that are looked through, the newest."""

TROUBLES_MAX = 1000
"""Error messages that are looked up again after a crash, the newest."""


NUMBER_CHARS_MAX = 200
"""Of a number so many characters can be looked for, as no entry of an index may be longer than a third of a
page. The number as it was asked for is kept whole."""


class Dials:
    """The write side of the dials of one database, over its journal's connections."""

    def __init__(self, journal: Journal, deadlines: Deadlines = DEADLINES) -> None:
        self._journal = journal
        self._deadlines = deadlines

    async def place(
        self, dial: Dial, key: str | None = None, request: JsonObject | None = None
    ) -> tuple[Dial, bool]:
        """Write down a dial that is about to be asked for; send the request only when the answer says True.

        `key` makes it dial once: where a dial has it already, of whatever system and account, that one is
        given, with False, and nothing may be sent. `request` is what will be asked, without credentials.
        Raises StoreError; then nothing may be sent either, and what was written all the same ends as unknown.
        """
        row = _row(_Kept(dial), key)
        asked = None if request is None else rows.encode(request)
        async with self._journal.transaction() as connection:
            if await connection.fetchval(_PLACE, rows.encode([row]), asked) is not None:
                return dial, True
            found = await connection.fetchrow(_BY_KEY, row["idempotency_key"])
            if found is None:
                raise asyncpg.UniqueViolationError(f"a dial {dial.id} is there already")
            return _kept(found).dial, False

    async def get(self, id: str) -> Dial | None:
        """A dial as it is now."""
        async with self._journal.transaction() as connection:
            found = await connection.fetchrow(_BY_ID, id)
        return None if found is None else _kept(found).dial

    async def keyed(self, key: str) -> Dial | None:
        """The dial that was placed with this idempotency key."""
        async with self._journal.transaction() as connection:
            found = await connection.fetchrow(_BY_KEY, key)
        return None if found is None else _kept(found).dial

    async def called(self, accounts: Iterable[int], name: str) -> Dial | None:
        """The dial that is the call which its system calls so, of one of these accounts."""
        async with self._journal.transaction() as connection:
            found = await connection.fetchrow(_CALLED, name, sorted(set(accounts)))
        return None if found is None else _kept(found).dial

    async def call_ids(self, call: int) -> tuple[str, ...]:
        """The ids by which its system knows a call; empty if there is no such call."""
        told = await self.told_again([call])
        return (told[-1].call.call_id, *told[-1].call.aliases) if told else ()

    async def requested(self, id: str) -> JsonObject | None:
        """What was asked for when it was placed; None for a dial that was not placed, or is not there."""
        async with self._journal.transaction() as connection:
            request = await connection.fetchval("SELECT request FROM dial WHERE id = $1", id)
        return None if request is None else msgspec.json.decode(request)

    async def previews(self, account: int, since: datetime) -> list[bytes]:
        """The messages about outbound records that the account received since then, the newest first."""
        async with self._journal.transaction() as connection:
            found = await connection.fetch(_PREVIEWS, microseconds(since), account, PREVIEWS_MAX)
        return [bytes(row["raw"]) for row in found]

    async def take(
        self, news: Sequence[News], marks: Mapping[int, Mark] | None = None
    ) -> list[Advance | None]:
        """Write down what was heard, and how far each account was told; for each of the news what it did.

        None stands for news of a dial that there is not, or that is no dial of its own any more. Raises
        StoreError, and then nothing was stored, or (after a lost connection) all of it: hand it in again.
        """
        work = _Work(self._deadlines)
        opened = [_row(_Kept(one.opens)) for one in news if one.opens is not None]
        names = sorted({one.dial for one in news} | {one.merges for one in news if one.merges is not None})
        async with self._journal.transaction() as connection:
            if opened:
                await connection.execute(_OPEN, rows.encode(opened))
            if names:
                for row in await connection.fetch(_LOCK, names):
                    work.dials[row["id"]] = _kept(row)
            advances = [work.hear(one) for one in news]
            changed = [_row(work.dials[id]) for id in work.changed]
            passed = sorted((marks or {}).items())
            if changed or work.facts or passed:
                await connection.execute(
                    _WRITE,
                    rows.encode(changed),
                    rows.encode(work.facts),
                    [account for account, _ in passed],
                    [mark.notification for _, mark in passed],
                    [microseconds(mark.at) for _, mark in passed],
                )
        return advances

    async def waiting(self, count_max: int, expired_since: datetime) -> list[Dial]:
        """The dials that wait for their end, the next deadline first; and those whose unknown outcome may be
        corrected yet, since they ended after that moment."""
        async with self._journal.transaction() as connection:
            found = await connection.fetch(_WAITING, count_max)
            found += await connection.fetch(_CORRECTABLE, count_max, microseconds(expired_since))
        return [_kept(row).dial for row in found]

    async def overdue(self, before: datetime, count_max: int) -> list[Dial]:
        """The dials that should have ended before that moment and did not: nobody remembered them."""
        async with self._journal.transaction() as connection:
            found = await connection.fetch(_OVERDUE, microseconds(before), count_max)
        return [_kept(row).dial for row in found]

    async def unclaimed(self, accounts: Iterable[int], known: Iterable[str]) -> list[Dial]:
        """The placed dials of these accounts that wait for their call, but for those that are known."""
        async with self._journal.transaction() as connection:
            found = await connection.fetch(_UNCLAIMED, sorted(set(accounts)), list(known))
        return [_kept(row).dial for row in found]

    async def of_calls(self, calls: Iterable[int]) -> list[Dial]:
        """The dials that are these calls, and have not ended."""
        async with self._journal.transaction() as connection:
            found = await connection.fetch(_OF_CALLS, sorted(set(calls)))
        return [_kept(row).dial for row in found]

    async def marks(self) -> dict[int, Mark]:
        """Up to which message the calls of each account were told."""
        async with self._journal.transaction() as connection:
            found = await connection.fetch("SELECT * FROM dial_mark")
        return {row["account_id"]: Mark(row["notification_id"], moment(row["received_at"])) for row in found}

    async def untold(self, after: tuple[int, int] = (0, 0)) -> list[Told]:
        """The steps of calls that began after their account's mark and are no dial: the next page, of calls
        beyond `after` (account and call of the last step of the page before)."""
        async with self._journal.transaction() as connection:
            return await _retold(connection, await connection.fetch(_UNTOLD, *after, UNTOLD_MAX))

    async def told_again(self, calls: Sequence[int]) -> list[Told]:
        """The steps of these calls, whatever was told of them."""
        async with self._journal.transaction() as connection:
            return await _retold(connection, await connection.fetch(rows.CALLS, calls))

    async def troubles(self, since: datetime, accounts: Iterable[int]) -> list[Trouble]:
        """The error messages that these accounts received since then, in order."""
        async with self._journal.transaction() as connection:
            found = await connection.fetch(
                _TROUBLES, microseconds(since), sorted(set(accounts)), TROUBLES_MAX
            )
        return [_trouble(row) for row in reversed(found)]


# ── one batch ─────────────────────────────────────────────────────────────────────────────────────────


class _Kept(Struct):
    """A dial with what only its row knows."""

    dial: Dial
    candidates: tuple[str, ...] = ()
    facts: int = 0
    heard: int = 0
    """The newest message that it was told."""
    merged_into: str | None = None


class _Work:
    """The dials of a batch, and the facts that are to be added."""

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self.dials: dict[str, _Kept] = {}
        self.changed: dict[str, None] = {}
        self.facts: list[dict[str, Any]] = []

    def hear(self, news: News) -> Advance | None:
        """Fold one piece of news into its dial."""
        kept = self.dials.get(news.dial)
        if kept is None or kept.merged_into is not None:
            return None
        if news.notification is not None:
            if news.notification <= kept.heard:
                return Advance(kept.dial)
            kept.heard = news.notification
        found = self._found(kept, news)
        if news.merges is not None:
            self._merge(kept, news.merges, news)
        if news.fact is None:
            return Advance(kept.dial, changed=found)
        after = advance(kept.dial, news.fact, news.at, self._deadlines)
        kept.dial = after.dial
        # A call's messages stand in its timeline: only those that made a difference are facts of the dial.
        if after.changed or not isinstance(news.fact, CallHeard | Elapsed):
            self._note(kept, news, **_said(news.fact))
        return after if after.changed or not found else structs.replace(after, changed=True)

    def _found(self, kept: _Kept, news: News) -> bool:
        """Write down the call that was found for it, or that there are several dials which it may be."""
        before = kept.dial
        if news.found is None:
            if news.call is None or before.call is not None:
                return False
            kept.dial = structs.replace(before, call=news.call)
            self._note(kept, news, kind="match", said="by its system's name for the call")
            return True
        kept.dial = linked(before, news.found, news.call)
        if kept.dial == before:
            return False
        others = [other.id for other in news.found.candidates if other.id != before.id]
        kept.candidates = tuple(others) if news.found.dial is None else ()
        said = [news.found.confidence, "by", ", ".join(news.found.evidence) or "nothing"]
        if kept.candidates:
            said += ["with", ", ".join(kept.candidates)]
        self._note(kept, news, kind="match", said=" ".join(said))
        return True

    def _merge(self, kept: _Kept, merged: str, news: News) -> None:
        other = self.dials.get(merged)
        if other is not None and other.merged_into is None and other is not kept:
            other.merged_into = kept.dial.id
            self._note(other, news, kind="merged", said=kept.dial.id)

    def _note(self, kept: _Kept, news: News, **fact: Any) -> None:
        dial = kept.dial
        self.changed[dial.id] = None
        self.facts.append(
            {
                "dial_id": dial.id,
                "ordinal": kept.facts,
                "at": news.at,
                "notification_id": news.notification,
                "state": dial.state,
                "outcome": dial.outcome,
                **{name: _storable(value) for name, value in fact.items()},
            }
        )
        kept.facts += 1


def _said(fact: Fact) -> dict[str, Any]:
    """What a fact says, as `dial_fact` has it."""
    match fact:
        case Accepted():
            return {"kind": "accepted", "said": fact.session or ""}
        case Refused():
            return {"kind": "refused", "said": "", **_caused(fact.cause)}
        case NotAnswered():
            said = "it may have been sent" if fact.sent else "not sent"
            return {"kind": "not_answered", "said": f"{said}: {fact.text}" if fact.text else said}
        case CallHeard():
            call = fact.call
            inferred = call.settled if call.ended_at is None and call.settled is not None else ""
            return {"kind": "call", "said": f"{call.state} {inferred}".strip(), **_caused(fact.cause)}
        case Reported():
            return {"kind": "reported", "said": "", "leg": fact.leg, **_caused(fact.cause)}
        case NoojeeStatus():
            return {"kind": "status", "said": f"{fact.status} inbound" if fact.inbound else fact.status}
        case CallRecord():
            talk = "" if fact.call_time_s is None else f"{fact.call_time_s:g} s"
            return {"kind": "record", "said": " ".join(filter(None, (fact.end_reason, fact.end_code, talk)))}
        case HangupRequested():
            return {"kind": "hangup_requested", "said": ""}
        case Elapsed():
            return {"kind": "elapsed", "said": "nothing more was heard by the deadline"}


def _caused(cause: Cause | None) -> dict[str, Any]:
    if cause is None:
        return {}
    return {
        "cause_system": cause.system,
        "cause_field": cause.field,
        "cause_code": cause.code,
        "cause_text": cause.text,
    }


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────────

_SAME = (
    "id", "system", "origin", "number", "requested_at", "state", "reached", "device", "reference",
    "caller_id", "campaign", "session", "accepted_at", "ringing_at", "connected_at", "hangup_at", "ended_at",
    "deadline_at", "outcome", "leg", "ended_by", "cause_leg", "confidence", "expired", "corrected",
    "matched_by", "match_confidence",
)  # fmt: skip
"""The columns of `dial` that are fields of `Dial`, by the same name."""

_MOMENTS = [name for name in _SAME if name.endswith("_at")]


def _row(kept: _Kept, key: str | None = None) -> dict[str, Any]:
    dial = kept.dial
    row = {name: getattr(dial, name) for name in _SAME}
    # As `listener.core.dialling.match` reads it: Click2Dial's national numbers are South African.
    country = SOUTH_AFRICA if dial.system is System.CLICK2DIAL else None
    row |= {
        "account_id": dial.account,
        "number_normalised": normalised(dial.number, country)[:NUMBER_CHARS_MAX],
        "call_id": dial.call,
        "candidates": kept.candidates,
        "facts": kept.facts,
        "heard_id": kept.heard,
        "merged_into": kept.merged_into,
        "idempotency_key": key,
    } | _caused(dial.cause)
    return {name: _storable(value) for name, value in row.items()}


def _storable(value: Any) -> Any:
    """Text as PostgreSQL takes it: what was heard is never refused."""
    if not isinstance(value, str):
        return value
    return str(value).replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def dial_of(row: Mapping[str, Any], at: Callable[[Any], datetime]) -> Dial:
    """The dial of a row of `dial`; `at` reads the moments as the row has them."""
    values = {name: row[name] for name in _SAME}
    for name in _MOMENTS:
        if values[name] is not None:
            values[name] = at(values[name])
    values |= {"account": row["account_id"], "call": row["call_id"], "cause": cause_of(row)}
    return msgspec.convert(values, Dial)


def cause_of(row: Mapping[str, Any]) -> Cause | None:
    """The raw cause of a row of `dial` or of `dial_fact`."""
    if row["cause_system"] is None:
        return None
    code, text = row["cause_code"] or "", row["cause_text"] or ""
    return Cause(System(row["cause_system"]), row["cause_field"], code, text)


def _kept(row: asyncpg.Record) -> _Kept:
    dial = dial_of(dict(row), moment)
    return _Kept(dial, tuple(row["candidates"]), row["facts"], row["heard_id"], row["merged_into"])


async def _retold(connection: Connection, found: Sequence[asyncpg.Record]) -> list[Told]:
    """The steps of the calls of these rows, each call's in order."""
    calls = [rows.call_of(row) for row in found]
    states: dict[int, list[tuple[int, datetime, str | None]]] = {call.id: [] for call in calls}
    for id, notification, at, state in await connection.fetch(_STATES, list(states)):
        states[id].append((notification, moment(at), None if state is None else msgspec.json.decode(state)))
    return [step for call in calls for step in retold(call, states[call.id])]


def _trouble(row: asyncpg.Record) -> Trouble:
    at = moment(row["received_at"])
    heard = Heard(row["account_id"], "", 0, at, row["channel"], bytes(row["raw"]), Source(row["source"]))
    return trouble(row["id"], heard, row["message_type"])


# ── statements ────────────────────────────────────────────────────────────────────────────────────────

_COLUMNS = [column for column in schema.dial.columns.keys() if column != "request"]  # noqa: SIM118 - columns
_SETTABLE = [
    column
    for column in _COLUMNS
    if column not in {"id", "account_id", "system", "origin", "idempotency_key", "requested_at"}
]
_LIST = ", ".join(_COLUMNS)
_D = ", ".join(f"d.{column}" for column in _COLUMNS)

_OPEN = f"""
    INSERT INTO dial ({_LIST}) SELECT {_LIST} FROM json_populate_recordset(NULL::dial, $1::json)
    ON CONFLICT (id) DO NOTHING"""  # noqa: S608 - names of ours

_PLACE = f"""
    INSERT INTO dial ({_LIST}, request)
    SELECT {_LIST}, $2::json FROM json_populate_recordset(NULL::dial, $1::json)
    ON CONFLICT DO NOTHING RETURNING id"""  # noqa: S608

_BY_KEY = f"SELECT {_D} FROM dial d WHERE d.idempotency_key = $1"  # noqa: S608

_BY_ID = f"SELECT {_D} FROM dial d WHERE d.id = $1"  # noqa: S608

_LOCK = f"SELECT {_D} FROM dial d WHERE d.id = ANY($1) ORDER BY d.id FOR NO KEY UPDATE"  # noqa: S608

_WRITE = f"""
    WITH n AS MATERIALIZED (
        SELECT * FROM json_populate_recordset(NULL::dial, $1::json)
    ), moved AS (
        UPDATE dial d SET {", ".join(f"{column} = n.{column}" for column in _SETTABLE)}
        FROM n WHERE d.id = n.id
    ), noted AS (
        INSERT INTO dial_fact SELECT * FROM json_populate_recordset(NULL::dial_fact, $2::json)
    )
    INSERT INTO dial_mark AS m
    SELECT * FROM unnest($3::integer[], $4::bigint[], $5::timestamptz[]) AS n (a, i, r)
    ON CONFLICT (account_id) DO UPDATE SET
        notification_id = excluded.notification_id, received_at = excluded.received_at
    WHERE excluded.notification_id > m.notification_id"""  # noqa: S608

_WAITING = f"""
    SELECT {_D} FROM dial d WHERE d.outcome IS NULL AND d.merged_into IS NULL
    ORDER BY d.deadline_at LIMIT $1"""  # noqa: S608

_CORRECTABLE = f"""
    SELECT {_D} FROM dial d
    WHERE d.outcome = 'unknown' AND d.requested_at > $2 AND NOT d.corrected AND d.merged_into IS NULL
    ORDER BY d.requested_at DESC LIMIT $1"""  # noqa: S608

_OVERDUE = f"""
    SELECT {_D} FROM dial d WHERE d.outcome IS NULL AND d.merged_into IS NULL AND d.deadline_at < $1
    ORDER BY d.deadline_at LIMIT $2"""  # noqa: S608

_UNCLAIMED = f"""
    SELECT {_D} FROM dial d
    WHERE d.outcome IS NULL AND d.origin = 'placed' AND d.call_id IS NULL
        AND d.account_id = ANY($1) AND d.id <> ALL($2::text[])"""  # noqa: S608

_OF_CALLS = f"""
    SELECT {_D} FROM dial d
    WHERE d.call_id = ANY($1) AND d.outcome IS NULL AND d.merged_into IS NULL"""  # noqa: S608

_CALLED = f"""
    SELECT {_D} FROM call_alias a JOIN dial d ON d.call_id = a.call_id
    WHERE a.alias = $1 AND a.account_id = ANY($2) AND d.merged_into IS NULL
    ORDER BY d.requested_at DESC LIMIT 1"""  # noqa: S608

_STATES = """
    SELECT h.call_id, h.notification_id, h.at, h.after FROM change h
    WHERE h.call_id = ANY($1) AND h.field = 'state' ORDER BY h.call_id, h.notification_id, h.ordinal"""

_UNTOLD = f"""
    WITH expecting AS MATERIALIZED (
        SELECT DISTINCT account_id FROM dial WHERE outcome IS NULL AND origin = 'placed' AND call_id IS NULL
    )
    SELECT {rows.CALL_COLUMNS}
    FROM account a
    LEFT JOIN dial_mark m ON m.account_id = a.id
    CROSS JOIN LATERAL (
        SELECT * FROM call o
        WHERE o.account_id = a.id AND o.id > coalesce(m.notification_id, 0)
            AND o.opened_at >= coalesce(m.received_at - interval '1 hour', '-infinity')
            AND (a.id, o.id) > ($1::integer, $2::bigint)
            AND (o.direction = 'outbound' OR EXISTS (SELECT FROM expecting e WHERE e.account_id = a.id))
            AND NOT EXISTS (SELECT FROM dial d WHERE d.call_id = o.id)
        ORDER BY o.id LIMIT $3
    ) AS c
    ORDER BY a.id, c.id LIMIT $3"""  # noqa: S608
"""A clock that was set back by less than an hour hides none of them."""

_PREVIEWS = """
    SELECT n.raw FROM notification n
    WHERE n.received_at >= $1 AND n.account_id = $2 AND n.message_type = 'OutboundRecordMessage'
    ORDER BY n.received_at DESC, n.id DESC LIMIT $3"""

_TROUBLES = """
    SELECT n.id, n.received_at, n.account_id, n.source, n.channel, n.message_type, n.raw FROM notification n
    WHERE n.received_at >= $1 AND n.account_id = ANY($2)
        AND n.message_type IN ('ErrorMessage', 'EventError')
    ORDER BY n.received_at DESC, n.id DESC LIMIT $3"""
