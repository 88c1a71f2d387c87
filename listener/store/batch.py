"""What one transaction does with a batch of messages: what is new of it, what follows from that, which rows.

`write` runs under the locks of the batch's accounts. It asks the database up to which position each stream is
committed and which calls the messages' ids name, folds the messages in memory, and writes all rows: a handful
of statements, whatever the size of the batch.

**What was written is kept, not trusted.** Finding and reading the calls of a batch costs more than folding
messages into them, so each account's open calls are kept in `Recollection` after a commit. Every batch also
writes the row of each of its accounts, and PostgreSQL says for a row which transaction wrote it last
(`xmin`): what is kept of an account is used only if that was the transaction that it was kept after. So
several recorders may work on one account, and whoever else changes an account's calls must write its row.

**Most batches are foreseen.** Where something is kept of every account of a batch, it is folded before the
database is asked anything (`foresee`), and the statement that writes the rows also says what they were built
on. If that holds, a small batch is one statement, in one round trip, and the rows of a large one are on their
way while the rest of it is folded. If not, nothing was done, and `write` does it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, groupby
from operator import attrgetter
from typing import Any

import asyncpg
import msgspec

from listener.core import normalise
from listener.core.calls import (
    Anomaly,
    Aside,
    Call,
    Closing,
    Decoded,
    Heard,
    Noted,
    Notification,
    Party,
    Recorded,
    Snapshot,
    Source,
    Step,
    Unrecognised,
    noted,
)
from listener.core.decode import CALLS_CLOSED, decode
from listener.store import rows, schema
from listener.store.connect import Connection, microseconds
from listener.store.rows import Row, encode

CALLS_KEPT_MAX = 20_000
"""Calls kept in memory, at 2 to 3 KB each. Beyond that the one kept longest goes, and is read when needed."""

STREAMS_KEPT_MAX = 4
"""Streams of an account whose positions are kept: it has one at a time, and one for items without a place."""

AT_ONCE_MAX = 100
"""Messages up to which a batch is written by one statement; for more, COPY is quicker (measured)."""

REASON_CHARS_MAX = 300
"""A longer reason why a message was stored raw only is cut."""

PIECE = 32
"""Messages of a batch that are decoded and folded before the next ones: so few and all that they touch find
room in a processor's cache, which saves a tenth of the work (measured)."""

TURN = 8 * PIECE
"""Messages that are folded in one turn of the event loop: some milliseconds. Meanwhile nobody else's rows get
on their way, and the database waits for them."""

_Name = tuple[str, int]
"""An id that a message has for a call, and the account of the message."""

_AS_IT_WAS = (None,) * 5
"""Of a participant who leaves: what stands between its key and the time."""

_XID_MASK = 0xFFFF_FFFF
"""`xmin` holds the lower half of a transaction's id."""


class RefusedValue(Exception):
    """PostgreSQL, or the way there, refuses a value of the batch. What was written since the last savepoint
    is lost."""


class Outdated(Exception):
    """A batch was foreseen from what the database holds no longer. Nothing was written."""


class _Account:
    """What is known of one account: its open calls, those of their ids that were asked for, and how far its
    last streams are committed."""

    __slots__ = ("calls", "counted", "names", "streams", "written_by")

    def __init__(self, written_by: int) -> None:
        self.written_by = written_by
        self.calls: dict[int, Call] = {}
        self.names: dict[str, int] = {}
        self.streams: dict[str, int] = {}
        self.counted = 0


class Recollection:
    """What is known of each account since it was last written, by which transaction."""

    def __init__(self) -> None:
        self._accounts: dict[int, _Account] = {}
        self.calls = 0
        """How many calls are kept."""

    @property
    def accounts(self) -> int:
        """Of how many accounts something is kept."""
        return len(self._accounts)

    def of(self, account: int, written_by: int) -> _Account:
        """What is known, if that transaction was the last one to write the account; else nothing."""
        known = self._accounts.get(account)
        if known is not None and known.written_by == written_by:
            return known
        return _Account(written_by)

    def last(self, account: int) -> _Account | None:
        """What was known when we wrote the account last."""
        return self._accounts.get(account)

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

    def __init__(self, work: "_Work", recorded: Recorded, transaction: int) -> None:
        self.recorded = recorded
        self.last_id = work.last_id
        self._work = work
        self._transaction = transaction

    def keep(self, kept: Recollection) -> None:
        """Call it after the commit, and only then."""
        for call in self._work.calls.values():
            known = self._work.known[call.account]
            if call.open:
                known.calls[call.id] = call
            elif known.calls.pop(call.id, None) is not None:
                # What has ended is seldom heard of again: its ids are looked up when it is.
                for alias in call.aliases:
                    if known.names.get(alias) == call.id:
                        del known.names[alias]
        for (alias, account), id in self._work.names.items():
            known = self._work.known[account]
            if id in known.calls:
                known.names[alias] = id
            else:
                known.names.pop(alias, None)
        for first, last in self._work.streams.values():
            if first.source is Source.COMETD:
                streams = self._work.known[first.account].streams
                streams[first.stream] = last.position
                if len(streams) > STREAMS_KEPT_MAX:
                    del streams[next(iter(streams))]
        for account, known in self._work.known.items():
            known.written_by = self._transaction
            kept.keep(account, known)


def last_heard(heard: Iterable[Heard]) -> dict[int, int | None]:
    """The accounts of the messages in the order of their ids, and when each of them was heard last, in
    microseconds; None where nothing was heard, but what we found ourselves is written down."""
    return _last_heard(groupby(sorted(heard, key=_account), _account))


def _last_heard(of_accounts: Iterable[tuple[int, Iterable[Heard]]]) -> dict[int, int | None]:
    """The same for messages that lie account by account."""
    return {
        account: None if at is None else microseconds(at)
        for account, heard in of_accounts
        for at in [max([one.received_at for one in heard if one.source is not Source.LISTENER], default=None)]
    }


_account = attrgetter("account")

Read = tuple[Heard, Decoded]
"""A message, and what the decoder made of it."""


def read(heard: Iterable[Heard]) -> list[Read]:
    """The messages, decoded."""
    return [(each, decode(each.raw, each.channel)) for each in heard]


class Foreseen:
    """A batch of which everything is known that it needs; made by `foresee`, ended by one of the writes.

    They fold it, and raise Outdated when the database is not as expected after all, or RefusedValue when a
    value cannot be stored. Then nothing is written.
    """

    def __init__(
        self,
        heard: Sequence[Heard],
        ids: Sequence[int],
        last_heard: Mapping[int, int | None],
        work: "_Work",
    ) -> None:
        self._heard = heard
        self._ids = ids
        self._last_heard = last_heard
        self._work = work
        self._unknown: dict[_Name, None] = {}
        """Ids that no call has, as far as we know."""

    async def write_at_once(self, connection: Connection) -> Written:
        """As a transaction of its own, in one statement."""
        work = self._work
        with _refusals():
            for start in range(0, len(self._heard), PIECE):
                self._fold(start)
            return await self._write(
                connection, rows.WRITE_AT_ONCE, work.notifications, work.changes, work.anomalies
            )

    async def write(self, connection: Connection) -> Written:
        """In the transaction under way."""
        work = self._work
        with _refusals():
            await rows.copy(connection, schema.notification, self._folded())
            await rows.copy(connection, schema.change, work.changes)
            await rows.copy(connection, schema.anomaly, work.anomalies)
            return await self._write(connection, rows.WRITE_AS_EXPECTED)

    def _fold(self, start: int) -> None:
        """The piece of the batch that begins there."""
        piece = read(self._heard[start : start + PIECE])
        self._work.recollect(piece, self._unknown)
        self._work.fold(piece, self._ids[start : start + PIECE])
        if self._work.lists_calls:
            raise Outdated  # the ids that were taken do not suffice

    async def _folded(self) -> AsyncIterator[Row]:
        """The rows of the notifications, folded while the first of them are on their way."""
        messages = self._work.notifications
        for start in range(0, len(self._heard), PIECE):
            if start and start % TURN == 0:
                await asyncio.sleep(0)
            self._fold(start)
            for row in messages:
                yield row
            messages.clear()

    async def _write(self, connection: Connection, statement: str, *added: Sequence[Any]) -> Written:
        work = self._work
        heard = self._last_heard
        try:
            transaction = await connection.fetchval(
                statement,
                list(heard),
                [work.built_on[account] for account in heard],
                list(heard.values()),
                [(alias, account, None) for alias, account in self._unknown],
                *work.arguments(),
                *added,
            )
        except asyncpg.UniqueViolationError:
            raise Outdated from None  # by another recorder's rows, seen before the condition was looked at
        except asyncpg.PostgresError as error:
            if error.sqlstate == rows.OUTDATED:
                raise Outdated from None
            raise
        return Written(work, work.recorded(len(self._heard)), transaction & _XID_MASK)


def foresee(
    heard: Sequence[Heard], kept: Recollection, take_ids: Callable[[int], int | None]
) -> Foreseen | None:
    """The batch with all that it needs to be folded, account by account, since the calls of one account find
    room in a processor's cache (measured: a twentieth of all work). None where what is kept does not suffice.

    `take_ids` gives the first of so many consecutive ids that were reserved, and are higher than those of
    all messages that were committed here; or None.
    """
    accounts = [each.account for each in heard]
    order = sorted(range(len(heard)), key=accounts.__getitem__)
    in_order = [heard[place] for place in order]
    of_account = [(account, list(messages)) for account, messages in groupby(in_order, _account)]
    work = _Work({}, {})
    if not all(work.foreknows(account, messages, kept) for account, messages in of_account):
        return None
    first_id = take_ids(len(heard))
    if first_id is None:
        return None
    return Foreseen(in_order, [first_id + place for place in order], _last_heard(of_account), work)


async def write(
    connection: Connection, messages: Sequence[Read], held: Mapping[int, int], kept: Recollection
) -> Written:
    """Store what is new of the messages and all that follows from it, in the transaction under way.

    It holds the rows of all their accounts, and has written them: `held` says for each which transaction was
    the last to do so before. Raises RefusedValue when a value cannot be stored.
    """
    streams = list({heard.stream for heard, _ in messages})
    wanted = sum(normalise.ids_needed(decoded) for _, decoded in messages)
    with _refusals():
        marks = await connection.fetch(rows.POSITIONS, streams, wanted)
        work = _Work(
            {account: kept.of(account, written_by) for account, written_by in held.items()},
            {row["id"]: row["position"] for row in marks if row["id"] is not None},
        )
        fresh = [each for each in messages if work.takes(each[0])]
        if fresh:
            await work.load(connection, fresh)
            needed = [normalise.ids_needed(decoded) for _, decoded in fresh]
            *ids, beyond = accumulate(needed, initial=marks[0]["first"])
            work.fold(fresh, ids)
            work.last_id = beyond - 1
            await work.add(connection)
            await connection.execute(rows.WRITE, *work.arguments())
        if work.again:  # perhaps of what has just been written for the first time
            batches = [(stream, *batch) for stream, batch in work.again.items()]
            await connection.execute(rows.BATCHES_AGAIN, *rows.columns(batches, 3))
    return Written(work, work.recorded(len(messages)), marks[0]["xid"] & _XID_MASK)


@contextmanager
def _refusals() -> Iterator[None]:
    """What cannot be stored is RefusedValue, whoever says so."""
    try:
        yield
    except (asyncpg.DataError, asyncpg.ProgramLimitExceededError, UnicodeError, OverflowError) as error:
        raise RefusedValue(str(error)) from error


async def write_around(connection: Connection, messages: Sequence[Read], held: Mapping[int, int]) -> Recorded:
    """As `write`, for a batch with a value in it that cannot be stored: halves it until the message stands
    alone, and stores that one raw. The bytes of a message can always be stored."""
    await connection.execute("SAVEPOINT part")
    try:
        written = await write(connection, messages, held, Recollection())
    except RefusedValue as refusal:
        await connection.execute("ROLLBACK TO SAVEPOINT part; RELEASE SAVEPOINT part")
        reason = str(refusal)
    else:
        await connection.execute("RELEASE SAVEPOINT part")
        return written.recorded
    if len(messages) == 1:
        return (await write(connection, [_raw_only(messages[0], reason)], held, Recollection())).recorded
    half = len(messages) // 2
    first = await write_around(connection, messages[:half], held)
    second = await write_around(connection, messages[half:], held)
    return together((first, second))


def together(pieces: Sequence[Recorded]) -> Recorded:
    """What several transactions did, one after the other, as if it had been one."""
    origins: list[int] = []
    before = 0
    for piece in pieces:
        origins += [before + origin for origin in piece.origins]
        before += len(piece.entries)
    return Recorded(
        tuple(entry for piece in pieces for entry in piece.entries),
        tuple(step for piece in pieces for step in piece.steps),
        sum(piece.duplicates for piece in pieces),
        tuple(id for piece in pieces for id in piece.ids),
        tuple(origins),
    )


def _raw_only(message: Read, reason: str) -> Read:
    """The message without anything that was read from it."""
    heard, _ = message
    heard = msgspec.structs.replace(heard, channel=_storable(heard.channel))
    return heard, Unrecognised(_storable(f"poisoned: {reason}")[:REASON_CHARS_MAX])


def _storable(text: str) -> str:
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")


async def open_calls(connection: Connection, accounts: Iterable[int] | None) -> list[Call]:
    """The calls of the accounts, or of all, that had not ended when they were last heard of."""
    if accounts is None:
        found = await connection.fetch(rows.ALL_OPEN_CALLS)
    else:
        found = await connection.fetch(rows.OPEN_CALLS, list(accounts))
    return [rows.call_of(row) for row in found]


class _Work:
    """One batch: know what is new of it (`foreknows`, or `takes` for each message) and the calls that it may
    touch (`recollect`, or `load` all of them), `fold` it into rows, and write them: `add` those that are only
    added, the rest by a statement that gets `arguments`. `recollect` and `fold` may be done in pieces."""

    def __init__(self, known: dict[int, _Account], positions: dict[str, int]) -> None:
        """`positions` says up to where each stream is committed."""
        self.known = known
        self.built_on: dict[int, int] = {}
        """Which transaction had written the row of each account when `foreknows` took up what is kept of it:
        another batch may be kept before this one is written."""
        self._reached = positions
        self._noted: list[Noted] = []
        """The messages that were folded."""
        self.streams: dict[str, tuple[Heard, Heard]] = {}
        """The streams that move, each with its first and last new message."""
        self.again: dict[str, tuple[int, int]] = {}
        """The last batch that came again of each stream: the server may have cut it otherwise this time."""
        self.steps: list[Step] = []
        self._ids: list[int] = []
        self._origins: list[int] = []
        self.calls: dict[int, Call] = {}
        """Every call that was touched, as it is after the batch."""
        self.names: dict[_Name, int | None] = {}
        """The ids that were looked up or given, with their accounts, and the calls that they name as far as
        that is known without asking."""
        self.notifications: list[Row] = []
        self.changes: list[Row] = []
        self.anomalies: list[Row] = []
        self._before: dict[int, Call] = {}
        """The calls that the messages may touch, as they were before the batch."""
        self._board = normalise.Board(())
        self._parties: dict[tuple[int, int], Party] = {}
        self.last_id = 0
        """The highest id that a message, or a call of a snapshot, may have been given; of a batch that was
        looked up."""
        self.lists_calls = False
        """Whether there is a message among them that needs more than one id."""

    def recorded(self, handed_in: int) -> Recorded:
        """What was done with so many entries."""
        new = len(self._noted)
        return Recorded(
            tuple(self._noted), tuple(self.steps), handed_in - new, tuple(self._ids), tuple(self._origins)
        )

    def foreknows(self, account: int, heard: Sequence[Heard], kept: Recollection) -> bool:
        """Whether what is kept says up to where the account's streams are committed, and all its messages are
        beyond; they are part of the batch then."""
        known = kept.last(account)
        if known is None:
            return False
        self.known[account] = known
        self.built_on[account] = known.written_by
        reached = dict(known.streams)
        first: dict[str, Heard] = {}
        last: dict[str, Heard] = {}
        for each in heard:
            stream, position = each.stream, each.position
            if position <= reached.get(stream, position):
                return False
            reached[stream] = position
            first.setdefault(stream, each)
            last[stream] = each
        for stream, each in first.items():
            self.streams[stream] = each, last[stream]
        return True

    def takes(self, heard: Heard) -> bool:
        """Whether the message is beyond what is committed; then it is part of the batch."""
        stream = heard.stream
        if heard.position > self._reached.get(stream, 0):
            self._reached[stream] = heard.position
            moved = self.streams.get(stream)
            self.streams[stream] = (heard if moved is None else moved[0], heard)
            return True
        if heard.batch is not None:
            self.again[stream] = heard.batch
        return False

    def recollect(self, fresh: Sequence[Read], unknown: dict[_Name, None]) -> None:
        """Take up the calls that are known, and add to `unknown` the ids of which nothing is."""
        for heard, decoded in fresh:
            account = heard.account
            known = self.known[account]
            for alias in normalise.ids(decoded):
                id = known.names.get(alias)
                if id is None:
                    unknown[alias, account] = None
                elif id not in self._before:
                    self._take_up(known.calls[id])

    def _take_up(self, call: Call) -> None:
        self._before[call.id] = call
        self._board.put(call)

    async def load(self, connection: Connection, fresh: Sequence[Read]) -> None:
        """Every call that the messages may touch: what is known of them, and the rest from the database."""
        unknown: dict[_Name, None] = {}
        self.recollect(fresh, unknown)
        # The accounts of which every open call is asked for.
        whole = {heard.account for heard, decoded in fresh if isinstance(decoded, Snapshot)}
        missing = [id for heard, decoded in fresh for id in normalise.closes(heard, decoded)]
        if not unknown and not whole and not missing:
            return
        aliases, accounts = zip(*unknown, strict=True) if unknown else ((), ())
        for alias, account, id in await connection.fetch(rows.NAMED, aliases, accounts, list(whole)):
            if alias is not None:
                self.names[alias, account] = id
            call = self.known[account].calls.get(id)
            if call is not None:
                self._take_up(call)
            else:
                missing.append(id)
        if missing:
            for row in await connection.fetch(rows.CALLS, missing):
                call = rows.call_of(row)
                if call.account not in self.known:
                    continue  # a closing names it, of an account whose rows this transaction does not hold
                self._take_up(call)
                if call.open:
                    self.known[call.account].calls[call.id] = call

    def fold(self, fresh: Iterable[Read], ids: Iterable[int]) -> None:
        """Hear the messages in order, each with its id; a list of calls may use the next ones."""
        hear = self._board.hear
        add = self.notifications.append
        add_noted = self._noted.append
        for (heard, decoded), number in zip(fresh, ids, strict=True):
            at = microseconds(heard.received_at)
            steps = hear(number, heard, decoded)
            add_noted(noted(heard, decoded))
            call_id = server_at = reason = None
            notification_type = ""
            if isinstance(decoded, Notification):
                message_type, notification_type = decoded.message_type, decoded.notification_type
                if decoded.server_at is not None:
                    server_at = microseconds(decoded.server_at)
                if steps:
                    call_id = steps[0].call.id
                    self._follow(number, at, steps)
            elif isinstance(decoded, Snapshot):
                message_type = "Snapshot"
                self.lists_calls = self.lists_calls or bool(decoded.calls)
                self._follow(number, at, steps, decoded.oddities)
            elif isinstance(decoded, Aside):
                message_type, notification_type = decoded.message_type, decoded.notification_type
            elif isinstance(decoded, Closing):
                message_type = CALLS_CLOSED
                self._follow(number, at, steps)
            else:
                message_type, reason = "", decoded.reason
            asked_at = None if heard.asked_at is None else microseconds(heard.asked_at)
            add(
                (at, number, heard.account, heard.stream, heard.position, heard.source, heard.channel,
                 message_type, notification_type, call_id, asked_at, server_at, reason, heard.raw)
            )  # fmt: skip
            self._ids.append(number)

    def _follow(self, number: int, at: int, steps: Sequence[Step], oddities: Sequence[Anomaly] = ()) -> None:
        """The rows of what a message did to its calls; `oddities` are about none of them."""
        origin = len(self._ids)
        changes = anomalies = 0
        for odd in oddities:
            self.anomalies.append((number, anomalies, None, at, odd.kind, odd.detail))
            anomalies += 1
        for step in steps:
            self.steps.append(step)
            self._origins.append(origin)
            call = step.call
            id = call.id
            self.calls[id] = call
            for change in step.changes:
                before, after = change.before, change.after
                self.changes.append(
                    (id, number, changes, at, change.field, change.key,
                     None if before is None else encode(before),
                     None if after is None else encode(after))
                )  # fmt: skip
                changes += 1
            for party in step.parties:
                self._parties[id, party.ordinal] = party
            for odd in step.anomalies:
                self.anomalies.append((number, anomalies, id, at, odd.kind, odd.detail))
                anomalies += 1

    async def add(self, connection: Connection) -> None:
        """Write the rows that are only added."""
        await rows.copy(connection, schema.notification, self.notifications)
        await rows.copy(connection, schema.change, self.changes)
        await rows.copy(connection, schema.anomaly, self.anomalies)

    def arguments(self) -> tuple[Sequence[Any], ...]:
        """All other rows, as the statements of `rows` take them."""
        calls: list[Row] = []
        names: dict[_Name, int] = {}
        for id, call in sorted(self.calls.items()):
            was = self._before.get(id)
            calls.append(rows.written(call, was))
            if was is None or was.aliases is not call.aliases:
                # In the order of the calls' ids: an id that was used again names the newer one. An older call
                # that learns of an id may not get it, since a newer one may have it.
                for alias in call.aliases:
                    names[alias, call.account] = id
                    self.names[alias, call.account] = id if was is None else None
        streams = [
            (
                *(stream, first.account, first.source, microseconds(first.received_at), last.position),
                *(last.batch or (None, None)),
            )
            for stream, (first, last) in self.streams.items()
        ]
        return (
            calls,
            streams,
            [(*name, id) for name, id in names.items()],
            *self._stays(),
        )

    def _stays(self) -> tuple[list[Row], list[Row]]:
        """The participants who joined, and those who were there and left."""
        joined: list[Row] = []
        left: list[Row] = []
        for (call_id, ordinal), party in self._parties.items():
            left_at = None if party.left_at is None else microseconds(party.left_at)
            before = self._before.get(call_id)
            if before is None or ordinal >= len(before.parties):
                joined.append(
                    (call_id, ordinal, party.number, party.e164, party.formatted, party.role,
                     microseconds(party.joined_at), left_at)
                )  # fmt: skip
            else:
                left.append((call_id, ordinal, *_AS_IT_WAS, left_at))
        return joined, left
