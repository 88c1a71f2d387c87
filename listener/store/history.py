"""The read side: the questions that people ask about calls, and about what was observed of them.

Everything here reads and nothing writes: each connection is read-only, takes on the role `listener_auditor`,
and gives up a statement after a time. Lists come in pages, newest first, and a page is found by where the one
before ended and not by counting, so that the thousandth costs what the first did.

An answer about calls carries the share of the asked time that was observed, because "no call" and "nobody
watched" are different answers. An account that is said to be observed counts as such only as long as its
daemon goes on saying so: after `SILENT_S_MAX` without a heartbeat it counts as "not started".
"""

import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Self

import msgspec
from msgspec import Struct
from sqlalchemy import (
    ColumnElement,
    Row,
    Select,
    and_,
    case,
    extract,
    func,
    literal,
    or_,
    select,
    true,
    tuple_,
    union,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from listener.core.calls import Call, Direction, Source
from listener.errors import StoreError
from listener.store.connect import classified, engine, microseconds, moment
from listener.store.ledger import NOT_STARTED, OBSERVED
from listener.store.schema import (
    CALL_COLUMN_OF,
    account,
    anomaly,
    call,
    call_alias,
    change,
    coverage,
    notification,
    participant,
)

AUDITOR = "listener_auditor"

STATEMENT_S_MAX = 30
"""A question that takes longer is asked wrongly, or lacks an index."""

PAGE_MAX = 1000
"""Calls in one page; a longer list is read page by page."""

LEGS_MAX = 20
"""Calls that one id may name: the legs of a call at different accounts, and its repeated use."""

MOMENTS_MAX = 10_000
"""Messages in one timeline; a call with more is shown up to there."""

STRETCHES_MAX = 50_000
"""Rows of coverage in one answer; beyond that a shorter time has to be asked for."""

SILENT_S_MAX = 60
"""A heartbeat comes every ten seconds and vouches up to the server's last answer, which a long poll of
CometD's default holds back for thirty. Without one for so long, nobody can say that the daemon listens."""


class Found(Struct, frozen=True):
    """A call, and whose it is."""

    account: str
    tenant: str
    call: Call

    @property
    def who(self) -> str:
        """Who called whom; where the beginning was not heard, a dash says only that they are connected. Where
        no message told the account's number, its name stands for it."""
        own, other = self.call.phone_number or self.account, self.call.number or "?"
        match self.call.direction:
            case Direction.OUTBOUND:
                return f"{own} → {other}"
            case Direction.INBOUND:
                return f"{other} → {own}"
            case Direction.UNKNOWN:
                return f"{own} – {other}"


class Page(Struct, frozen=True):
    """Some of the calls that were asked for, newest first."""

    calls: tuple[Found, ...]
    after: str | None
    """Hand it in as `after` for the next page; None where this one is the last."""
    observed: float
    """The share, 0 to 1, of the asked time of the asked accounts that was observed."""
    since: datetime
    until: datetime
    """The time that `observed` is about."""


class Altered(Struct, frozen=True):
    """One field went from `before` to `after`; `key` says which of several."""

    field: str
    key: str
    before: Any
    after: Any


class Odd(Struct, frozen=True):
    """Something odd, as it was recorded."""

    kind: str
    detail: str


class Moment(Struct, frozen=True):
    """A message about a call, and what it changed; also one that changed nothing."""

    at: datetime
    """When it was received."""
    server_at: datetime | None
    notification: int
    message_type: str
    notification_type: str
    source: Source
    channel: str
    changes: tuple[Altered, ...]
    anomalies: tuple[Odd, ...]
    raw: bytes


class Timeline(Struct, frozen=True):
    """A call with everything that was heard of it, in order."""

    found: Found
    moments: tuple[Moment, ...]
    observed: float
    """The share, 0 to 1, of the time from its opening to its last message that its account was observed; of a
    call that goes on, up to now. An account that was removed is observed no more."""


class Stretch(Struct, frozen=True):
    """An account was observed from `since` to `until`, or was not, because of `cause`."""

    account: str
    tenant: str
    since: datetime
    until: datetime
    cause: str
    """Empty where it was observed."""


class Coverage(Struct, frozen=True):
    """What was observed of some accounts in some time; its stretches leave no moment out."""

    since: datetime
    until: datetime
    stretches: tuple[Stretch, ...]
    observed: float
    """The share, 0 to 1, of the time of all accounts together."""
    gaps_s: Mapping[str, float]
    """Seconds of all accounts together, by cause."""


class Kept(Struct, frozen=True):
    """What the journal holds of one account."""

    notifications: int
    digest: str
    """SHA-256, in hex, over the exact bytes of the messages, each followed by a newline, in the order of
    their ids. Messages that differ, or come in another order, give another digest."""


def _now() -> datetime:
    return datetime.now(UTC)  # noqa: TID251 - a shell's default


class History:
    """The questions, asked of one database. Close it, or use it as a context manager."""

    def __init__(self, dsn: str, *, role: str = AUDITOR, clock: Callable[[], datetime] = _now) -> None:
        self._clock = clock
        self._engine = engine(
            dsn,
            pooled=True,
            settings={
                "role": role,
                "application_name": "listener history",
                "timezone": "UTC",
                "default_transaction_read_only": "on",
                "statement_timeout": f"{STATEMENT_S_MAX}s",
                "jit": "off",
            },
        )

    async def close(self) -> None:
        """Disconnect."""
        await self._engine.dispose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def calls(
        self,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        accounts: Iterable[str] = (),
        tenant: str | None = None,
        state: str | None = None,
        live: bool | None = None,
        number: str | None = None,
        number_ends: str | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> Page:
        """The calls that began in [since, until), newest first.

        `number` is whole, with or without its `+`; `number_ends` gives its last digits. Either finds the
        account's own number, the other party's, the dialled one and those of all who took part. `state` is
        Genesys' word; `live` chooses the calls that go on, or those that do not. `after` continues a page.
        Raises StoreError when `after` is none of ours, or the question takes too long.
        """
        chosen = _chosen(accounts, tenant)
        conditions: list[ColumnElement[bool]] = [chosen]
        if since is not None:
            conditions.append(call.c.opened_at >= since)
        if until is not None:
            conditions.append(call.c.opened_at < until)
        if state is not None:
            conditions.append(call.c.state == state)
        if live is not None:
            # What a removed account had going on is over, as far as anybody will ever hear.
            goes_on = and_(_LIVE, account.c.removed_at.is_(None))
            conditions.append(goes_on if live else ~goes_on)
        if number is not None:
            conditions.append(_with_number(lambda column: column.in_(_spellings(number)), since))
        if number_ends is not None:
            pattern = _escaped(number_ends[::-1]) + "%"
            conditions.append(_with_number(lambda column: column.like(pattern), since))
        if after is not None:
            conditions.append(tuple_(call.c.opened_at, call.c.id) < _place(after))
        limit = min(limit, PAGE_MAX)
        async with self._reading() as connection:
            rows = (
                await connection.execute(
                    _FOUND.where(*conditions)
                    .order_by(call.c.opened_at.desc(), call.c.id.desc())
                    .limit(limit + 1)
                )
            ).all()
            begin, end = await self._period(connection, chosen, since, until)
            observed = await self._observed(connection, chosen, begin, end)
        found = tuple(_found(row) for row in rows[:limit])
        more = f"{microseconds(found[-1].call.opened_at)}-{found[-1].call.id}" if len(rows) > limit else None
        return Page(found, more, observed, begin, end)

    async def call(self, name: str) -> tuple[Timeline, ...]:
        """The calls of that name with their timelines, newest first; empty where there is none.

        `name` is our id of one call, or any id under which the contact centre spoke of calls: that may name
        a leg at each of several accounts.
        """
        ids = select(call_alias.c.call_id).where(call_alias.c.alias == name)
        older = select(call.c.id).where(call.c.call_uuid == name)
        wanted: Any = union(ids, older)
        if name.isascii() and name.isdecimal() and int(name) < 2**63:
            wanted = union(ids, older, select(literal(int(name))))
        async with self._reading() as connection:
            rows = (
                await connection.execute(
                    _FOUND.where(call.c.id.in_(wanted)).order_by(call.c.id.desc()).limit(LEGS_MAX)
                )
            ).all()
            return tuple([await self._timeline(connection, _found(row)) for row in rows])

    async def coverage(
        self,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        accounts: Iterable[str] = (),
        tenant: str | None = None,
    ) -> Coverage:
        """What was observed in [since, until), account by account, without a moment left out.

        Without `since` it begins where the first of the accounts was first watched. Raises StoreError when
        there are more than STRETCHES_MAX rows in it.
        """
        chosen = _chosen(accounts, tenant)
        async with self._reading() as connection:
            begin, end = await self._period(connection, chosen, since, until)
            watched = (
                await connection.execute(
                    select(account.c.name, account.c.tenant, account.c.removed_at)
                    .where(chosen, _watched_after(begin))
                    .order_by(account.c.name)
                )
            ).all()
            rows = (
                await connection.execute(
                    select(account.c.name, coverage.c.since, self._believed_until(), coverage.c.cause)
                    .join(account)
                    .where(chosen, coverage.c.since < end, self._believed_until() > begin)
                    .order_by(account.c.name, coverage.c.since, coverage.c.id)
                    .limit(STRETCHES_MAX + 1)
                )
            ).all()
        if len(rows) > STRETCHES_MAX:
            raise StoreError(f"More than {STRETCHES_MAX} rows of coverage: ask for a shorter time.")
        told: dict[str, list[tuple[datetime, datetime, str]]] = {}
        for name, row_since, row_until, cause in rows:
            told.setdefault(name, []).append((row_since, row_until, cause))
        stretches: list[Stretch] = []
        for name, tenant_of, removed_at in watched:
            last = min(end, removed_at) if removed_at is not None else end
            stretches += _filled(name, tenant_of, begin, last, told.get(name, ()))
        return _summed(begin, end, stretches)

    async def live(self, limit: int = PAGE_MAX) -> tuple[Found, ...]:
        """The calls that go on now, newest first."""
        async with self._reading() as connection:
            rows = await connection.execute(
                _FOUND.where(_LIVE, account.c.removed_at.is_(None))
                .order_by(call.c.opened_at.desc(), call.c.id.desc())
                .limit(min(limit, PAGE_MAX))
            )
            return tuple(_found(row) for row in rows)

    async def kept_since(self, since: datetime, *, source: Source = Source.COMETD) -> Mapping[str, Kept]:
        """For each account, how many messages were received from that moment on, and a digest of them: to
        compare with what somebody else says was sent. It reads them all."""
        statement = (
            select(account.c.name, notification.c.raw)
            .join(account, account.c.id == notification.c.account_id)
            .where(notification.c.received_at >= since, notification.c.source == source)
            .order_by(notification.c.id)
        )
        counts: Counter[str] = Counter()
        digests: dict[str, Any] = {}
        async with self._reading() as connection:
            async for name, raw in await connection.stream(statement):
                counts[name] += 1
                digests.setdefault(name, hashlib.sha256()).update(raw + b"\n")
        return {name: Kept(counts[name], digest.hexdigest()) for name, digest in digests.items()}

    # ── parts of answers ──────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[AsyncConnection]:
        """A read-only transaction; what goes wrong in it comes out as one of our errors."""
        try:
            async with self._engine.connect() as connection:
                yield connection
        except Exception as error:
            if "statement timeout" in str(error):
                raise StoreError(
                    f"The question took longer than {STATEMENT_S_MAX} s: ask for a shorter time."
                ) from error
            raise classified(error) or error from error

    async def _timeline(self, connection: AsyncConnection, found: Found) -> Timeline:
        id, opened_at, last = found.call.id, found.call.opened_at, found.call.last_heard_at
        changes = (
            await connection.execute(
                select(change)
                .where(change.c.call_id == id)
                .order_by(change.c.notification_id, change.c.ordinal)
            )
        ).all()
        odds = (
            await connection.execute(
                select(anomaly)
                .where(anomaly.c.call_id == id)
                .order_by(anomaly.c.notification_id, anomaly.c.ordinal)
            )
        ).all()
        # A snapshot is about several calls and names none; what it changed here leads to it.
        elsewhere = {(row.at, row.notification_id) for row in (*changes, *odds)}
        # The times spare partitions of other months; a day, because clocks are set.
        messages = (
            await connection.execute(
                select(notification)
                .where(
                    notification.c.received_at >= min(opened_at, last) - _CLOCK_SLACK,
                    notification.c.received_at <= max(opened_at, last) + _CLOCK_SLACK,
                    notification.c.call_id == id,
                )
                .order_by(notification.c.id)
                .limit(MOMENTS_MAX)
            )
        ).all()
        elsewhere -= {(row.received_at, row.id) for row in messages}
        if elsewhere:
            place = tuple_(notification.c.received_at, notification.c.id)
            messages = [
                *messages,
                *await connection.execute(select(notification).where(place.in_(sorted(elsewhere)))),
            ]
        altered: dict[int, list[Altered]] = {}
        for row in changes:
            altered.setdefault(row.notification_id, []).append(
                Altered(row.field, row.key, row.before, row.after)
            )
        odd: dict[int, list[Odd]] = {}
        for row in odds:
            odd.setdefault(row.notification_id, []).append(Odd(row.kind, row.detail))
        moments = tuple(
            Moment(
                row.received_at,
                row.server_at,
                row.id,
                row.message_type,
                row.notification_type,
                Source(row.source),
                row.channel,
                tuple(altered.get(row.id, ())),
                tuple(odd.get(row.id, ())),
                row.raw,
            )
            for row in sorted(messages, key=lambda row: row.id)
        )
        end = self._clock() if found.call.open else last
        observed = await self._observed(connection, account.c.id == found.call.account, opened_at, end)
        return Timeline(found, moments, observed)

    def _believed_until(self) -> ColumnElement[datetime]:
        """The end of a row of coverage. An open "observed" goes on as long as heartbeats come; when they have
        stopped, it ended with the last of them, as the next start of a daemon will write it down."""
        now = self._clock()
        silent = and_(
            coverage.c.cause == OBSERVED, coverage.c.seen_at < now - timedelta(seconds=SILENT_S_MAX)
        )
        return case(
            (coverage.c.until.is_not(None), coverage.c.until),
            (silent, coverage.c.seen_at),
            else_=now,
        )

    async def _period(
        self,
        connection: AsyncConnection,
        chosen: ColumnElement[bool],
        since: datetime | None,
        until: datetime | None,
    ) -> tuple[datetime, datetime]:
        """The asked time as far as anything can be known of it: not before we came, and not the future."""
        end = min(until, self._clock()) if until is not None else self._clock()
        if since is None:
            first = select(func.min(coverage.c.since)).join(account).where(chosen)
            since = (await connection.execute(first)).scalar() or end
        return min(since, end), end

    async def _observed(
        self, connection: AsyncConnection, chosen: ColumnElement[bool], begin: datetime, end: datetime
    ) -> float:
        """The share of [begin, end) that was observed, of all chosen accounts together."""
        last = func.least(end, account.c.removed_at)
        asked = select(func.sum(_seconds(last - begin))).where(chosen, _watched_after(begin))
        until = func.least(self._believed_until(), last)
        watched = (
            select(func.sum(_seconds(until - func.greatest(coverage.c.since, begin))))
            .join(account, account.c.id == coverage.c.account_id)
            .where(chosen, coverage.c.cause == OBSERVED, coverage.c.since < last, until > begin)
        )
        asked_s, watched_s = (
            await connection.execute(select(asked.scalar_subquery(), watched.scalar_subquery()))
        ).one()
        return float(watched_s) / float(asked_s) if asked_s and watched_s else 0.0


_CLOCK_SLACK = timedelta(days=1)

_LIVE = and_(call.c.ended_at.is_(None), call.c.settled.is_(None))
"""As the index `ix_call_open` has it."""

_FOUND: Select[Any] = select(
    account.c.name,
    account.c.tenant,
    *(call.c[CALL_COLUMN_OF.get(field, field)] for field in Call.__struct_fields__),
).join(account, account.c.id == call.c.account_id)


def _found(row: Row[*tuple[Any, ...]]) -> Found:
    name, tenant, *values = row
    fields = dict(zip(Call.__struct_fields__, values, strict=True))
    return Found(name, tenant, msgspec.convert(fields, Call))


def _chosen(accounts: Iterable[str], tenant: str | None) -> ColumnElement[bool]:
    names = list(accounts)
    conditions: list[ColumnElement[bool]] = [true()]
    if names:
        conditions.append(account.c.name.in_(names))
    if tenant is not None:
        conditions.append(account.c.tenant == tenant)
    return and_(*conditions)


def _watched_after(begin: datetime) -> ColumnElement[bool]:
    return or_(account.c.removed_at.is_(None), account.c.removed_at > begin)


def _seconds(span: ColumnElement[Any]) -> ColumnElement[Any]:
    return extract("epoch", span)


def _with_number(
    matches: Callable[[ColumnElement[str]], ColumnElement[bool]], since: datetime | None
) -> ColumnElement[bool]:
    """The calls on which a number has any part. Each place that may hold it is asked through its own index,
    in which numbers stand backwards; `since` narrows them further."""
    begun = call.c.opened_at >= since if since is not None else true()
    joined = participant.c.joined_at >= since if since is not None else true()
    places = [
        select(call.c.id).where(matches(func.reverse(column)), begun)
        for column in (call.c.number, call.c.phone_number, call.c.dnis)
    ]
    international = and_(participant.c.e164 != "", participant.c.e164 != participant.c.number)
    places += [
        select(participant.c.call_id).where(matches(func.reverse(participant.c.number)), joined),
        select(participant.c.call_id).where(matches(func.reverse(participant.c.e164)), international, joined),
    ]
    return call.c.id.in_(union(*places))


def _spellings(number: str) -> list[str]:
    """Backwards, with and without the `+` of an international number."""
    plain = number.removeprefix("+")
    return [plain[::-1], plain[::-1] + "+"]


def _escaped(text: str) -> str:
    """As LIKE takes it literally."""
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")


def _place(after: str) -> Any:
    """Where a page ended."""
    opened_at, _, id = after.partition("-")
    try:
        return tuple_(literal(moment(int(opened_at))), literal(int(id)))
    except (ValueError, OverflowError):
        raise StoreError(f"{after!r} is not where a page ended: take `after` from the page before.") from None


def _filled(
    name: str, tenant: str, begin: datetime, end: datetime, told: Iterable[tuple[datetime, datetime, str]]
) -> list[Stretch]:
    """The account's stretches in [begin, end), with a gap wherever nothing is told."""
    stretches: list[Stretch] = []
    at = begin
    for since, until, cause in told:
        since, until = max(since, at), min(until, end)
        if since >= until:
            continue
        if since > at:
            stretches.append(Stretch(name, tenant, at, since, NOT_STARTED))
        stretches.append(Stretch(name, tenant, since, until, cause))
        at = until
    if at < end:
        stretches.append(Stretch(name, tenant, at, end, NOT_STARTED))
    return stretches


def _summed(begin: datetime, end: datetime, stretches: list[Stretch]) -> Coverage:
    by_cause: dict[str, float] = {}
    for stretch in stretches:
        seconds = (stretch.until - stretch.since) / timedelta(seconds=1)
        by_cause[stretch.cause] = by_cause.get(stretch.cause, 0.0) + seconds
    asked_s = sum(by_cause.values())
    observed = by_cause.pop(OBSERVED, 0.0) / asked_s if asked_s else 0.0
    return Coverage(begin, end, tuple(stretches), observed, by_cause)
