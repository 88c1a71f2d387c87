"""Coverage: for each account and moment, whether it was observed, or why not.

The rows of an account stand end to end; the last one is open and says what is true now. `Ledger` is given the
last row of some accounts, is told what happened since, and writes what follows: it closes a row and begins
the next, and never touches what was said before, but in two cases. A session that goes on after a restart,
and whose server kept everything, makes the gap of the restart none (`WITHDRAW`). And what was heard, and
damaged before it was committed, makes a gap of a stretch that counted as observed, or that such a session
would make observed (`lose`): a row is cut, and its pieces stand end to end again. The database refuses a
second open row and any overlap.

Moments are microseconds here (`listener.store.connect.microseconds`).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import asyncpg

from listener.core.calls import Missing
from listener.store.connect import Connection, microseconds

NOT_STARTED = "not started"
"""The cause of the gap between the last that is known of an earlier run and the first of this one."""

OBSERVED = ""

DAMAGED = "spool damaged"
"""The cause of a gap in the past: what was heard then is lost. A restart does not withdraw it."""

Stretch = tuple[int, int]
"""From and to, without its end."""


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

    def resume_observed(self, at: int) -> None:
        """As `resume`, for those of the accounts that a crash left "observed"."""
        for account, last in self._last.items():
            if last["until"] is None and last["cause"] == OBSERVED:
                self.resume(account, at)

    async def write(self, connection: Connection) -> None:
        """Close what ended, then add what began: at no time are two rows of an account open."""
        if self._closed:
            ids = [self._last[account]["id"] for account in self._closed]
            await connection.execute(_CLOSE, ids, list(self._closed.values()))
        rows = [row for begun in self._begun.values() for row in begun]
        if rows:
            await connection.execute(_ADD, *zip(*rows, strict=True))


async def lose(
    connection: Connection, missing: Sequence[Missing], restarted_at: int | None
) -> list[tuple[int, int, int]]:
    """Make gaps of the time in which the missing messages may have been received, wherever it counted as
    observed; gives account, beginning and end of each. What is a gap already stays as it is.

    Each gap begins with the last moment of which the store knows that all before it was committed: with the
    last message, or the last heartbeat. So call it before any message of these accounts is committed that is
    newer than those that are missing. `restarted_at` is for a start before anything is heard: the accounts
    are resumed first. Accounts that the database does not know have no coverage.
    """
    named = {each.account for each in missing if each.account is not None}
    others = set()
    anybodys = [microseconds(each.until) for each in missing if each.account is None]
    if anybodys:
        others = {row[0] for row in await connection.fetch(_LISTENED, min(anybodys) - _BEFORE_A_LOSS)}
    held = await connection.fetch(_HELD, sorted(named | others))
    if restarted_at is not None:
        end = await Ledger.read(connection, [row["id"] for row in held])
        end.resume_observed(restarted_at)
        await end.write(connection)
    stretches: dict[int, list[Stretch]] = {}
    for account, known in await connection.fetch(_KNOWN, *_columns(held, "id", "heard_at")):
        about = [each for each in missing if each.account == (account if account in named else None)]
        found = _joined(_stretch(each, known) for each in about)
        if found:
            stretches[account] = found
    rows = await connection.fetch(
        _CUT,
        list(stretches),
        [each[0][0] for each in stretches.values()],
        [each[-1][1] for each in stretches.values()],
    )
    closed: dict[int, int] = {}
    added: list[list[Any]] = []
    for row in rows:
        pieces = list(_pieces(row, stretches[row["account_id"]]))
        if pieces:
            closed[row["id"]] = pieces[0][_SINCE]
            added += pieces
    if closed:
        await connection.execute(_CLOSE, list(closed), list(closed.values()))
        await connection.execute(_ADD, *zip(*added, strict=True))
    return [(account, since, until) for account, since, until, cause, _ in added if cause == DAMAGED]


def _columns(rows: Sequence[asyncpg.Record], *names: str) -> list[list[Any]]:
    return [[row[name] for row in rows] for name in names]


def _stretch(missing: Missing, known: int | None) -> Stretch:
    """When the missing messages may have been received: the last of them may be as late as `until` itself."""
    beginnings = [known] if missing.since is None else [known, microseconds(missing.since)]
    return max((each for each in beginnings if each is not None), default=_EVER), (
        microseconds(missing.until) + 1
    )


def _joined(stretches: Iterable[Stretch]) -> list[Stretch]:
    """The same time, in order, in stretches that do not touch."""
    joined: list[Stretch] = []
    for since, until in sorted(stretches):
        if since >= until:
            continue
        if joined and since <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(until, joined[-1][1])
        else:
            joined.append((since, until))
    return joined


def _pieces(row: asyncpg.Record, stretches: Sequence[Stretch]) -> Iterator[list[Any]]:
    """New rows for what follows the beginning of a row up to the first of the stretches."""
    account, end, cause = row["account_id"], row["until"], row["cause"]
    at: int | None = None
    for since, until in stretches:
        since = max(since, row["since"])
        until = until if end is None else min(until, end)
        if since >= until:
            continue
        if at is not None:
            yield [account, at, since, cause, _seen(row, at, since)]
        yield [account, since, until, DAMAGED, None]
        at = until
    if at is not None and at != end:
        yield [account, at, end, cause, _seen(row, at, end)]


def _seen(row: asyncpg.Record, since: int, until: int | None) -> int | None:
    if row["cause"] != OBSERVED:
        return None
    seen_at = max(row["seen_at"] or since, since)
    return seen_at if until is None else min(seen_at, until)


_EVER = -(2**63)
"""PostgreSQL's -infinity: before anything that was ever heard."""

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
    UPDATE coverage c SET
        since = CASE WHEN c.since < w.at THEN c.since ELSE w.at END,
        until = CASE WHEN c.since < w.at THEN c.until ELSE w.at END,
        cause = CASE WHEN c.since < w.at THEN '' ELSE c.cause END,
        seen_at = CASE WHEN c.since < w.at THEN c.until END
    FROM (
        SELECT n.account_id, greatest(n.at, o.until) AS since, greatest(n.at, o.until, (
            SELECT max(d.until) FROM coverage d
            WHERE d.account_id = n.account_id AND d.since >= greatest(n.at, o.until) AND d.cause = '{DAMAGED}'
        )) AS at
        FROM unnest($1::integer[], $2::timestamptz[]) AS n (account_id, at)
        {_LAST_OBSERVED}
        WHERE o.until IS NOT NULL
    ) AS w
    WHERE c.account_id = w.account_id AND c.since >= w.since AND c.cause NOT IN ('', '{DAMAGED}')"""  # noqa: S608 - text of this module
"""The sessions that observed these accounts until then go on: the gaps since then lasted no time, and those
before one of a damaged spool, which stays, were observed. What was observed is not touched, nor are the gaps
before it."""

OBSERVED_UNTIL = f"""
    SELECT n.account_id, o.until
    FROM unnest($1::integer[]) AS n (account_id)
    {_LAST_OBSERVED}
    WHERE o.until IS NOT NULL AND NOT EXISTS (
        SELECT FROM coverage g WHERE g.account_id = n.account_id AND g.since >= o.until
        AND g.until IS DISTINCT FROM g.since
        AND g.cause NOT IN ('', 'stopped', 'not started', '{DAMAGED}'))"""  # noqa: S608 - text of this module
"""The accounts of which nothing but a stop or a crash, and no other gap, says that they are not observed; and
until when they were."""

DAMAGED_SINCE = f"""
    SELECT n.account_id
    FROM unnest($1::integer[]) AS n (account_id)
    {_LAST_OBSERVED}
    WHERE o.until IS NOT NULL AND EXISTS (
        SELECT FROM coverage g
        WHERE g.account_id = n.account_id AND g.since >= o.until AND g.cause = '{DAMAGED}')"""  # noqa: S608 - text of this module
"""The accounts that have lost something that was heard since they were observed last."""

_BEFORE_A_LOSS = 86_400_000_000
"""Microseconds: a gap that began a day before the last of what is damaged began before the outage in which
that was written down. Were there no bound, accounts unheard for months would get gaps in those days."""

_LISTENED = """
    SELECT c.account_id FROM coverage c
    WHERE c.until IS NULL AND (c.cause = '' OR c.since > $1
        OR c.cause IN ('stopped', 'not started') AND EXISTS (
            SELECT FROM bayeux_session b WHERE b.account_id = c.account_id))"""
"""The accounts that count as observed now, or did before a gap that began after $1, or would if their session
went on: whatever is damaged may have been theirs. Those that are retired are not heard."""

_HELD = "SELECT id, heard_at FROM account WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE"

_KNOWN = """
    SELECT n.id, greatest(n.heard_at, (
        SELECT c.seen_at FROM coverage c
        WHERE c.account_id = n.id AND c.cause = '' AND c.seen_at > c.since
        ORDER BY c.since DESC, c.id DESC LIMIT 1
    ))
    FROM unnest($1::integer[], $2::timestamptz[]) AS n (id, heard_at)"""
"""Of each account, until when all that was received is known to be committed: messages are committed in their
order, and a heartbeat vouches for what came before. A row that has just begun was seen by nobody yet."""

_CUT = f"""
    SELECT c.id, c.account_id, c.since, c.until, c.cause, c.seen_at
    FROM unnest($1::integer[], $2::timestamptz[], $3::timestamptz[]) AS n (account_id, since, until)
    {_LAST_OBSERVED}
    JOIN coverage c
        ON c.account_id = n.account_id AND c.since < n.until AND (c.until > n.since OR c.until IS NULL)
    WHERE c.cause = '' OR c.cause IN ('stopped', 'not started') AND c.since >= o.until
    ORDER BY c.account_id, c.since, c.id"""  # noqa: S608 - text of this module
"""The rows in these stretches that say "observed", and gaps that a session that goes on would withdraw."""

HEARTBEAT = """
    UPDATE coverage SET seen_at = greatest(seen_at, $2) WHERE id IN (
        SELECT id FROM coverage WHERE account_id = ANY($1) AND until IS NULL AND cause = ''
        ORDER BY account_id FOR NO KEY UPDATE)"""
"""In the order of the accounts, as everything that holds several of these rows."""

END = "UPDATE coverage SET until = greatest(since, $2) WHERE account_id = ANY($1) AND until IS NULL"
"""The accounts are not listened to any more: no row says anything about the time from then on."""
