"""The write side: raw messages, the calls that follow from them, and coverage.

`record` is one transaction for any number of messages, and it is where three promises are kept. *Effect
once*: a stream's row says up to which position it is committed; what is not beyond that has been here before
and is left out, in the same transaction that moves the mark. *Raw first*: each message is stored with its
exact bytes, whatever the decoder made of it. *Never refuse what was observed*: should PostgreSQL refuse a
value, the one message that carries it is found and stored raw, as unrecognised, and the rest as ever.

The journal keeps no truth of its own between two batches. It locks the rows of the batch's accounts, always
in the order of their ids, reads what the batch may touch, folds the messages in memory, and writes everything
back (`listener.store.batch`). So any number of recorders may run, also on the same accounts; none waits for
another in a circle, and the ids of one account's notifications rise in the order of commit.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from types import MappingProxyType
from typing import Self

import asyncpg
from msgspec import Struct

from listener.core.calls import Call, Cover, Heard, Missing, Recorded
from listener.core.session import Saved
from listener.errors import StoreError
from listener.store import batch, ledger, migrate
from listener.store import sessions as bayeux
from listener.store.batch import Outdated, Recollection, RefusedValue, Written
from listener.store.connect import (
    CONNECT_S_MAX,
    Connection,
    classified,
    microseconds,
    moment,
    speak_plainly,
    take_whole_pieces,
)
from listener.store.ledger import Ledger

WRITER = "listener_writer"
"""The role that every connection of the journal takes on: it may add to the journal, not change it."""

TRANSACTION_S_MAX = 60
"""What is not committed by then is given up as "unavailable"; the caller hands it in again."""

PIECE_MAX = 100
"""Messages in one transaction while looking for those that cannot be stored: were it all of them, they would
take some seconds (measured: up to 22 ms each on two busy cores)."""

MONTHS_AHEAD = 3
"""Partitions that exist before they are needed: a daemon may run that long without anybody making more."""


IDS_AHEAD = 10_000
"""Ids that are reserved at once; those left over at the end name nothing."""


class _Ids:
    """Ids reserved ahead. They only rise: those of one account's messages are in the order of commit."""

    def __init__(self) -> None:
        self._next = self._end = 0
        self._used = 0

    @property
    def left(self) -> int:
        """How many may be taken."""
        return self._end - self._next

    def add(self, first: int, count: int) -> None:
        """So many consecutive ids are ours; what is left of the ones before is let go."""
        if first > self._used:
            self._next, self._end = first, first + count

    def take(self, count: int) -> int | None:
        """The first of `count` ids; None when there are not so many."""
        if self.left < count:
            return None
        first = self._next
        self.used(first + count - 1)
        return first

    def used(self, last: int) -> None:
        """An id has been given to a message; no lower one will be."""
        self._used = max(self._used, last)
        if last >= self._next:
            self._next = min(last + 1, self._end)


NO_SESSIONS: Mapping[int, Saved | None] = MappingProxyType({})
"""No session changed."""


class AccountRow(Struct, frozen=True):
    """An account as the settings name it."""

    name: str
    tenant: str
    environment: str


class Journal:
    """The write side of one database. Made by `open`; ends with `close`, or as a context manager."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._kept = Recollection()
        self._ids = _Ids()
        self._reserving = asyncio.Lock()

    @classmethod
    async def open(cls, dsn: str, *, connections: int = 2) -> Self:
        """Connect, see that the schema is ours, and make the next months' partitions.

        `connections` is how many batches may be written at the same time; more wait for one. Raises
        StoreUnavailable when the database does not answer, SchemaOutdated when it needs
        `listener db upgrade`, StoreError when the login may not write.
        """
        pool = asyncpg.create_pool(
            dsn or None,
            min_size=connections,
            max_size=connections,
            timeout=CONNECT_S_MAX,
            init=_made_ready,
            reset=_nothing_to_reset,
            max_inactive_connection_lifetime=0,
            server_settings={
                "role": WRITER,
                "application_name": "listener journal",
                "timezone": "UTC",
                # Planned once for arrays of any length, and always by key: a plan that was made while a table
                # was empty must not read it whole when it has grown.
                "plan_cache_mode": "force_generic_plan",
                "enable_seqscan": "off",
                "enable_hashjoin": "off",
                "enable_mergejoin": "off",
                "jit": "off",
            },
        )
        journal = cls(pool)
        try:
            await journal._begin()
        except BaseException:
            pool.terminate()
            raise
        return journal

    async def _begin(self) -> None:
        try:
            await self._pool
        except Exception as error:
            raise classified(error) or error from error
        async with self._connection() as connection:
            revision = None
            if await connection.fetchval("SELECT to_regclass('alembic_version') IS NOT NULL"):
                revision = await connection.fetchval("SELECT version_num FROM alembic_version")
            migrate.refuse_other(revision)
        await self.ensure_partitions()

    async def close(self) -> None:
        """Wait for the batches under way, and disconnect."""
        await self._pool.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ── accounts ──────────────────────────────────────────────────────────────────────────────────────

    async def register(self, accounts: Sequence[AccountRow]) -> dict[str, int]:
        """Have a row for each account, with this tenant and environment; gives the id of each by its name.

        One that was retired is back. Registering twice is registering once.
        """
        rows = {account.name: account for account in accounts}
        async with self.transaction() as connection:
            await connection.execute(
                _REGISTER,
                list(rows),
                [account.tenant for account in rows.values()],
                [account.environment for account in rows.values()],
            )
            found = await connection.fetch("SELECT name, id FROM account WHERE name = ANY($1)", list(rows))
        return {row["name"]: row["id"] for row in found}

    async def retire(self, accounts: Iterable[int], at: datetime) -> None:
        """The accounts are not listened to any more; what was heard stays. Their coverage ends at `at`."""
        ids, ended_at = sorted(set(accounts)), microseconds(at)
        async with self.transaction() as connection:
            await _lock(connection, ids)
            await connection.execute("UPDATE account SET removed_at = $2 WHERE id = ANY($1)", ids, ended_at)
            await connection.execute(ledger.END, ids, ended_at)
            await connection.execute(bayeux.FORGET, ids)

    # ── messages ──────────────────────────────────────────────────────────────────────────────────────

    async def record(self, heard: Sequence[Heard]) -> Recorded:
        """Commit the messages and all that follows from them, in one transaction; answers what was new.

        The messages of one stream must come in the order of their positions, here and from call to call.
        When it raises, nothing of them is stored, or (after a lost connection) all of it: hand the same
        messages in again. Raises StoreUnavailable when that may succeed, StoreError when it cannot.

        Messages among which PostgreSQL refuses a value are the exception: they are committed piece by piece,
        and when it raises, a beginning of them may be stored.
        """
        if not heard:
            return Recorded((), (), 0)
        try:
            written = await self._foreseen(heard) or await self._looked_up(heard)
        except RefusedValue:
            return await self._around(heard)
        written.keep(self._kept)
        return written.recorded

    async def _foreseen(self, heard: Sequence[Heard]) -> Written | None:
        """As `record`, for a batch of which everything is known already; None where it is not."""
        if not self._kept.accounts:
            return None
        if self._ids.left < len(heard):
            async with self._reserving:
                if self._ids.left < len(heard):  # nobody else has done it meanwhile
                    async with self._connection() as connection:
                        self._ids.add(await connection.fetchval(_RESERVE, IDS_AHEAD), IDS_AHEAD)
        foreseen = batch.foresee(heard, self._kept, self._ids.take)
        if foreseen is None:
            return None
        try:
            if len(heard) <= batch.AT_ONCE_MAX:
                async with self._connection() as connection:
                    return await foreseen.write_at_once(connection)
            async with self.transaction() as connection:
                return await foreseen.write(connection)
        except Outdated:
            return None

    async def _around(self, heard: Sequence[Heard]) -> Recorded:
        """As `record`, where a value is refused. Finding it takes many attempts; were all of a large batch
        refused, one transaction would not have the time, and the batch would be tried again for ever."""
        pieces = []
        for start in range(0, len(heard), PIECE_MAX):
            piece = heard[start : start + PIECE_MAX]
            async with self.transaction() as connection:
                held = await _touch(connection, piece)
                pieces.append(await batch.write_around(connection, batch.read(piece), held))
        return batch.together(pieces)

    async def _looked_up(self, heard: Sequence[Heard]) -> Written:
        """As `record`, for any batch."""
        messages = batch.read(heard)
        async with self.transaction() as connection:
            held = await _touch(connection, heard)
            written = await batch.write(connection, messages, held, self._kept)
        self._ids.used(written.last_id)
        return written

    async def open_calls(self, accounts: Iterable[int] | None = None) -> list[Call]:
        """The calls that had not ended when they were last heard of: of these accounts, or of all that ever
        were listened to."""
        async with self._connection() as connection:
            return await batch.open_calls(connection, accounts)

    async def unsettled(
        self, silent_since: datetime, released_before: datetime, count_max: int
    ) -> list[tuple[int, int]]:
        """Calls that wait for an end: each as its account and its id, the calls of one account together.

        Those that go on and were not heard of since `silent_since`; and those that ended before
        `released_before`, as did the wrap-up time that the server named, without being settled. Of either
        kind `count_max` at most: there may be more. Of all accounts, also those that were retired.
        """
        moments = microseconds(silent_since), microseconds(released_before)
        async with self._connection() as connection:
            found = await connection.fetch(UNSETTLED, *moments, count_max)
        return sorted((row[0], row[1]) for row in found)

    async def ensure_partitions(self) -> list[str]:
        """Make the next months' partitions that are missing, and give their names. Once a day is enough."""
        async with self._connection() as connection:
            rows = await connection.fetch("SELECT listener_ensure_partitions($1)", MONTHS_AHEAD)
        return [row[0] for row in rows]

    # ── coverage ──────────────────────────────────────────────────────────────────────────────────────

    async def cover(
        self, covers: Sequence[Cover], sessions: Mapping[int, Saved | None] = NO_SESSIONS
    ) -> None:
        """From each moment on, that account is observed, or is not and why; in order, for each account.

        What says nothing new changes nothing. A moment before the present row began counts as its beginning:
        coverage is told forwards, and what it said about the past stays said; but for a turn that `withdraws`
        the gaps since its moment. `sessions` are those that can be resumed from now on; None forgets one.
        """
        accounts = sorted({cover.account for cover in covers} | set(sessions))
        withdrawn = {cover.account: place for place, cover in enumerate(covers) if cover.withdraws}
        before: list[Cover] = []
        after: list[Cover] = []
        for place, cover in enumerate(covers):
            (before if place < withdrawn.get(cover.account, len(covers)) else after).append(cover)
        async with self.transaction() as connection:
            await _lock(connection, accounts)
            await _turn(connection, before)
            if withdrawn:
                moments = [microseconds(covers[place].at) for place in withdrawn.values()]
                await connection.execute(ledger.WITHDRAW, list(withdrawn), moments)
                await _turn(connection, after)
            await bayeux.write(connection, sessions)

    async def heartbeat(self, accounts: Iterable[int], at: datetime) -> None:
        """Those of the accounts that are observed were so at `at`: what a crash afterwards leaves known."""
        async with self.transaction() as connection:
            await connection.execute(ledger.HEARTBEAT, list(accounts), microseconds(at))

    async def resume_coverage(self, accounts: Iterable[int], at: datetime) -> dict[int, datetime]:
        """At a start: nothing is observed yet. Where a crash left an account "observed", that ended when it
        was last known to be (its heartbeat, or a notification committed after it), and a gap began.

        Gives the accounts whose gap is the restart's alone, and since when it lasts: should their session go
        on, and its server have kept everything, a `Cover` from then on withdraws that gap.
        """
        ids = sorted(set(accounts))
        async with self.transaction() as connection:
            await _lock(connection, ids)
            end = await Ledger.read(connection, ids)
            for account in ids:
                end.resume(account, microseconds(at))
            await end.write(connection)
            return {row[0]: moment(row[1]) for row in await connection.fetch(ledger.OBSERVED_UNTIL, ids)}

    async def lose(
        self, missing: Sequence[Missing], restarted_at: datetime | None = None
    ) -> list[tuple[int, datetime, datetime]]:
        """Messages that were heard are lost: the time in which they may have been received is a gap with the
        cause "spool damaged" wherever it counted as observed. Gives account, beginning and end of each.

        To be called before anything newer of these accounts is recorded. At a start, before anything is
        heard, with the time of the start: where a crash left an account "observed", that ends first.
        """
        at = None if restarted_at is None else microseconds(restarted_at)
        async with self.transaction() as connection:
            lost = await ledger.lose(connection, missing, at)
        return [(account, moment(since), moment(until)) for account, since, until in lost]

    async def damaged_since(self, accounts: Iterable[int]) -> set[int]:
        """Those of the accounts that have lost something that was heard since they were observed last."""
        async with self._connection() as connection:
            return {row[0] for row in await connection.fetch(ledger.DAMAGED_SINCE, sorted(set(accounts)))}

    async def kept_sessions(self, accounts: Iterable[int]) -> dict[int, Saved]:
        """The sessions that a start may go on with, and how far their messages are stored."""
        async with self._connection() as connection:
            return await bayeux.read(connection, sorted(set(accounts)))

    # ── connections ───────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        """A connection of the pool. What fails on it comes out as one of our errors, and it is closed."""
        try:
            async with asyncio.timeout(TRANSACTION_S_MAX), self._pool.acquire() as connection:
                try:
                    yield connection
                except (RefusedValue, Outdated):
                    raise
                except BaseException:
                    # Its state is unknown, and finding out might take for ever. The server rolls back. One
                    # that the server has ended is the pool's again by now, and what it said is to be told.
                    with suppress(asyncpg.InterfaceError):
                        connection.terminate()
                    raise
        except (RefusedValue, Outdated):
            raise
        except Exception as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                # The driver may answer a cancellation with the failure of the connection that it broke.
                raise asyncio.CancelledError from error
            raise classified(error) or error from error

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """A transaction as the writer, also for what is kept beside the journal (`listener.store.dials`).
        What fails in it comes out as one of our errors, and is rolled back."""
        async with self._connection() as connection:
            await connection.execute("BEGIN")
            try:
                yield connection
            except (RefusedValue, Outdated):
                await connection.execute("ROLLBACK")
                raise
            await connection.execute("COMMIT")


async def _made_ready(connection: asyncpg.Connection) -> None:
    """A new connection of the pool, for batches."""
    await speak_plainly(connection)
    take_whole_pieces(connection)


async def _nothing_to_reset(connection: Connection) -> None:
    """Between two uses nothing is left behind, as a connection on which anything failed is closed; the pool's
    own reset would cost a round trip for each batch."""


async def _lock(connection: Connection, accounts: list[int]) -> None:
    """Hold the accounts' rows until the transaction ends; in order, so that no two wait in a circle."""
    if await connection.fetchval(_LOCK, accounts) != len(accounts):
        raise StoreError("An account is not in the database: register the accounts first.")


async def _turn(connection: Connection, covers: Sequence[Cover]) -> None:
    """Write these turns of coverage, in order; under the lock of their accounts."""
    end = await Ledger.read(connection, sorted({cover.account for cover in covers}))
    for cover in covers:
        end.turn(cover.account, microseconds(cover.at), cover.cause)
    await end.write(connection)


async def _touch(connection: Connection, messages: Sequence[Heard]) -> dict[int, int]:
    """As `_lock` for the accounts of the messages, and write each row: when it was last heard. Gives for each
    account which transaction had written its row before."""
    heard = batch.last_heard(messages)
    accounts = list(heard)
    rows = await connection.fetch(_TOUCH, accounts, list(heard.values()))
    if len(rows) != len(accounts):
        raise StoreError("An account is not in the database: register the accounts first.")
    return {row[0]: row[1] for row in rows}


_TOUCH = """
    WITH held AS MATERIALIZED (
        SELECT id, xmin AS written_by FROM account WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE
    )
    UPDATE account a SET heard_at = greatest(a.heard_at, n.heard_at)
    FROM held, unnest($1::integer[], $2::timestamptz[]) AS n (id, heard_at)
    WHERE a.id = held.id AND a.id = n.id
    RETURNING a.id, held.written_by"""

_RESERVE = "SELECT listener_reserve_ids($1)"

UNSETTLED = """
    (SELECT account_id, id FROM call
    WHERE ended_at IS NULL AND settled IS NULL AND last_heard_at < $1 ORDER BY account_id LIMIT $3)
    UNION ALL
    (SELECT account_id, id FROM call
    WHERE ended_at < $2 AND settled IS NULL
        AND ended_at + greatest(least(coalesce(wrap_up_time_s, 0), 86400), 0) * interval '1 second' < $2
    ORDER BY ended_at LIMIT $3)"""
"""The calls that go on and were last heard of before $1, at most $3; and as many of those that ended before
$2, also when the wrap-up time that the server named is counted (up to a day: what it sends has no bounds)."""

_LOCK = "SELECT count(*) FROM (SELECT FROM account WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE) AS held"

_REGISTER = """
    INSERT INTO account AS a (name, tenant, environment)
    SELECT * FROM unnest($1::text[], $2::text[], $3::text[]) AS n (name, tenant, environment) ORDER BY name
    ON CONFLICT (name) DO UPDATE
        SET tenant = excluded.tenant, environment = excluded.environment, removed_at = NULL
        WHERE (a.tenant, a.environment) <> (excluded.tenant, excluded.environment)
            OR a.removed_at IS NOT NULL"""
