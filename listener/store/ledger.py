"""Coverage: for each account and moment, whether it was observed, or why not.

The rows of an account stand end to end; the last one is open and says what is true now. `Ledger` is given the
last row of some accounts, is told what happened since, and writes what follows: it closes a row and begins
the next, and never touches what was said before, but in one case: a session that goes on after a restart,
and whose server kept everything, makes the gap of the restart none (`WITHDRAW`). The database refuses a
second open row and any overlap.

Moments are microseconds here (`listener.store.connect.microseconds`).
"""

from collections.abc import Iterable
from typing import Any

import asyncpg

from listener.store.connect import Connection

NOT_STARTED = "not started"
"""The cause of the gap between the last that is known of an earlier run and the first of this one."""

OBSERVED = ""


class Ledger:
    """The end of the coverage of some accounts. Made by `read`, under the lock of their rows."""

    def __init__(self, rows: Iterable[asyncpg.Record]) -> None:
        self._last: dict[int, asyncpg.Record] = {row["account_id"]: row for row in rows}
        self._begun: dict[int, list[list[Any]]] = {}
        self._closed: dict[int, int] = {}

    @classmethod
    async def read(cls, connection: Connection, accounts: list[int]) -> "Ledger":
        """The last row of each of the accounts."""
        return cls(await connection.fetch(_LAST, accounts))

    def turn(self, account: int, at: int, cause: str) -> None:
        """From a moment on it is so, unless it is so already. A moment before the present row began counts as
        its beginning."""
        last = self._last.get(account)
        begun = self._begun.setdefault(account, [])
        if begun:
            present = begun[-1]
            if present[_CAUSE] == cause:
                return
            at = present[_UNTIL] = max(at, present[_SINCE])
        elif last is not None and last["until"] is None:
            if last["cause"] == cause:
                return
            at = self._closed[account] = max(at, last["since"])
        elif last is not None:
            at = max(at, last["until"])
        begun.append([account, at, None, cause, at if cause == OBSERVED else None])

    def resume(self, account: int, at: int) -> None:
        """What a start at `at` finds: a gap goes on, and "observed" ended when it was last known to be so."""
        last = self._last.get(account)
        if last is None:
            self.turn(account, at, NOT_STARTED)
        elif last["until"] is not None:
            self.turn(account, last["until"], NOT_STARTED)
        elif last["cause"] == OBSERVED:
            # A message that was committed later proves nothing of the time before it: others may have been
            # under way, and a gap may have been told and not written yet.
            known = last["since"] if last["seen_at"] is None else max(last["since"], last["seen_at"])
            self.turn(account, min(known, at), NOT_STARTED)

    async def write(self, connection: Connection) -> None:
        """Close what ended, then add what began: at no time are two rows of an account open."""
        if self._closed:
            ids = [self._last[account]["id"] for account in self._closed]
            await connection.execute(_CLOSE, ids, list(self._closed.values()))
        rows = [row for begun in self._begun.values() for row in begun]
        if rows:
            await connection.execute(_ADD, *zip(*rows, strict=True))


_SINCE, _UNTIL, _CAUSE = 1, 2, 3
"""Places in a new row."""

_LAST = """
    SELECT DISTINCT ON (account_id) account_id, id, since, until, cause, seen_at FROM coverage
    WHERE account_id = ANY($1) ORDER BY account_id, since DESC, id DESC"""

_CLOSE = """
    UPDATE coverage c
    SET until = n.until, seen_at = CASE WHEN c.seen_at > n.until THEN n.until ELSE c.seen_at END
    FROM unnest($1::bigint[], $2::timestamptz[]) AS n (id, until) WHERE c.id = n.id"""

_ADD = """
    INSERT INTO coverage (account_id, since, until, cause, seen_at) SELECT * FROM
    unnest($1::integer[], $2::timestamptz[], $3::timestamptz[], $4::text[], $5::timestamptz[])"""

_LAST_OBSERVED = """CROSS JOIN LATERAL (
            SELECT until FROM coverage WHERE account_id = n.account_id AND cause = ''
            ORDER BY since DESC, id DESC LIMIT 1
        ) AS o"""
"""For each account `n`, until when it was observed last; NULL is now."""

WITHDRAW = f"""
    UPDATE coverage c SET since = w.at, until = w.at
    FROM (
        SELECT n.account_id, greatest(n.at, o.until) AS at
        FROM unnest($1::integer[], $2::timestamptz[]) AS n (account_id, at)
        {_LAST_OBSERVED}
        WHERE o.until IS NOT NULL
    ) AS w
    WHERE c.account_id = w.account_id AND c.since >= w.at AND c.cause <> ''"""  # noqa: S608 - text of this module
"""The sessions that observed these accounts until then go on: the gaps since then lasted no time. What was
observed is not touched, nor are the gaps before it."""

OBSERVED_UNTIL = f"""
    SELECT n.account_id, o.until
    FROM unnest($1::integer[]) AS n (account_id)
    {_LAST_OBSERVED}
    WHERE o.until IS NOT NULL AND NOT EXISTS (
        SELECT FROM coverage g WHERE g.account_id = n.account_id AND g.since >= o.until
        AND g.until IS DISTINCT FROM g.since AND g.cause NOT IN ('', 'stopped', 'not started'))"""  # noqa: S608 - text of this module
"""The accounts of which nothing but a stop or a crash, and no other gap, says that they are not observed; and
until when they were."""

HEARTBEAT = """
    UPDATE coverage SET seen_at = greatest(seen_at, $2) WHERE id IN (
        SELECT id FROM coverage WHERE account_id = ANY($1) AND until IS NULL AND cause = ''
        ORDER BY account_id FOR NO KEY UPDATE)"""
"""In the order of the accounts, as everything that holds several of these rows."""

END = "UPDATE coverage SET until = greatest(since, $2) WHERE account_id = ANY($1) AND until IS NULL"
"""The accounts are not listened to any more: no row says anything about the time from then on."""
