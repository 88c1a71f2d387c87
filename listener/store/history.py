"""The read side: the questions that people ask about calls, and about what was observed of them.

Everything here reads and nothing writes: each connection is read-only, takes on the role `listener_auditor`,
and gives up a statement after a time. Lists come in pages, newest first, and a page is found by where the one
before ended and not by counting, so that the thousandth costs what the first did.

An answer about calls carries the share of the asked time that was observed, because "no call" and "nobody
watched" are different answers. An account that is said to be observed counts as such only as long as its
daemon goes on saying so: when no daemon holds the claim on the database any more, or after `SILENT_S_MAX`
without a heartbeat, it counts as "not started" from the last heartbeat on. It is asked for nothing before it
was added and after it was removed.
"""

import hashlib
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
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
    text,
    true,
    tuple_,
    union,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from listener.core.calls import Call, Direction, Source
from listener.errors import StoreError
from listener.store.claim import IS_HELD
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

COVERED_MAX = 2_000_000
"""Rows of coverage read for one answer; beyond that a shorter time has to be asked for."""

GAPS_MAX = 50_000
"""Gaps in one answer; beyond that a shorter time, or fewer accounts, have to be asked for."""

SILENT_S_MAX = 90
"""A heartbeat comes every ten seconds and vouches for what was said before the server's last answer was asked
for: two long polls of CometD's default, thirty seconds each, may lie between. Without one for so long, nobody
can say that the daemon listens, although its claim is held (`listener.store.claim`)."""


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
    """The share, 0 to 1, of the time from its opening to `until` that its account was observed. An account
    that was removed is observed no more."""
    until: datetime
    """Now, of a call that goes on; of one whose end was inferred, when that was concluded, which is not when
    it ended; else its last message."""


class Account(Struct, frozen=True):
    """An account that there is, or was."""

    account: str
    tenant: str
    since: datetime
    """When it was added, or first watched where a clock says that this was earlier."""
    removed_at: datetime | None


class Gap(Struct, frozen=True):
    """From `since` to `until` an account was not observed, because of `cause`."""

    since: datetime
    until: datetime
    cause: str


class Stretch(Struct, frozen=True):
    """An account was observed from `since` to `until`, or was not, because of `cause`."""

    account: str
    tenant: str
    since: datetime
    until: datetime
    cause: str
    """Empty where it was observed."""


class Present(Struct, frozen=True):
    """How it is with an account at the end of the asked time."""

    cause: str
    """Empty where it is observed."""
    since: datetime
    """Since when it is so; that may be before the asked time."""


class Figures(Struct, frozen=True):
    """How much of a time was observed, of one account or of several together. Each is exact to the
    microsecond: `observed_s` and the seconds of all causes make up `asked_s`."""

    asked_s: float
    observed_s: float
    percent: float | None
    """0 to 100; None where nothing was asked."""
    gaps: int
    longest_gap_s: float
    causes_s: Mapping[str, float]
    """Seconds that were not observed, by cause."""


class Watched(Struct, frozen=True):
    """One account in the asked time."""

    account: str
    tenant: str
    since: datetime
    until: datetime
    """The part of the asked time in which there was such an account."""
    figures: Figures
    last: Present | None
    """None where it had been removed by then."""
    gaps: tuple[Gap, ...]
    """In order; two that touch have different causes."""

    @property
    def stretches(self) -> tuple[Stretch, ...]:
        """Its time without a moment left out: the gaps, and what was observed between them."""
        stretches: list[Stretch] = []
        at = self.since
        for gap in (*self.gaps, Gap(self.until, self.until, OBSERVED)):
            if gap.since > at:
                stretches.append(Stretch(self.account, self.tenant, at, gap.since, OBSERVED))
            if gap.until > gap.since:
                stretches.append(Stretch(self.account, self.tenant, gap.since, gap.until, gap.cause))
            at = gap.until
        return tuple(stretches)


class Tenant(Struct, frozen=True):
    """All accounts of a tenant together."""

    tenant: str
    accounts: int
    figures: Figures


class Coverage(Struct, frozen=True):
    """What was observed of some accounts in some time."""

    since: datetime
    until: datetime
    """The asked time as far as it has passed: `until` is `now` at the latest. Where all of it is still to
    come, both are when it begins."""
    now: datetime
    asked_until: datetime
    """As it was asked, also where that is still to come."""
    first_at: datetime | None
    """When the first of these accounts was added; None where there never was one."""
    total: Figures
    """Of all accounts together, also those that are not shown."""
    last: Mapping[str, int]
    """How many of all accounts are how at `until`: by cause, which is empty where they are observed."""
    tenants: tuple[Tenant, ...]
    """The worst first."""
    accounts: tuple[Watched, ...]
    """The worst first."""
    not_shown: int
    """How many more accounts there are, all of them better than those shown."""

    @property
    def observed(self) -> float:
        """The share, 0 to 1, of the time of all accounts together; 0 where there is none."""
        return (self.total.percent or 0.0) / 100

    @property
    def gaps_s(self) -> Mapping[str, float]:
        """Seconds of all accounts together that were not observed, by cause."""
        return self.total.causes_s

    @property
    def stretches(self) -> tuple[Stretch, ...]:
        """Those of the accounts that are shown, account by account in the order of their names."""
        ordered = sorted(self.accounts, key=lambda each: each.account)
        return tuple(stretch for each in ordered for stretch in each.stretches)


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
        tenant: str | Iterable[str] | None = None,
        direction: Direction | None = None,
        state: str | None = None,
        live: bool | None = None,
        number: str | None = None,
        number_ends: str | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> Page:
        """The calls that began in [since, until), newest first.

        `number` is whole, with or without its `+`; `number_ends` gives its last digits. Either finds the
        account's own number, the other party's, the dialled one and those of all who took part; an account's
        own only where a message told it, which those of some sites never do: ask by account then. `state` is
        Genesys' word; `live` chooses the calls that go on, or those that do not. `after` continues a page.
        Raises StoreError when `after` is none of ours, or the question takes too long.
        """
        chosen = chosen_accounts(accounts, tenant)
        conditions: list[ColumnElement[bool]] = [chosen]
        if since is not None:
            conditions.append(call.c.opened_at >= since)
        if until is not None:
            conditions.append(call.c.opened_at < until)
        if direction is not None:
            conditions.append(call.c.direction == direction)
        if state is not None:
            conditions.append(call.c.state == state)
        if live is not None:
            # What a removed account had going on is over, as far as anybody will ever hear.
            goes_on = and_(_LIVE, account.c.removed_at.is_(None))
            conditions.append(goes_on if live else ~goes_on)
        if number is not None:
            conditions.append(_with_number(lambda column: column.in_(_spellings(number)), since))
        if number_ends is not None:
            pattern = escaped(number_ends[::-1]) + "%"
            conditions.append(_with_number(lambda column: column.like(pattern), since))
        if after is not None:
            conditions.append(tuple_(call.c.opened_at, call.c.id) < _place(after))
        limit = min(limit, PAGE_MAX)
        async with self.reading() as connection:
            rows = (
                await connection.execute(
                    CALLS.where(*conditions)
                    .order_by(call.c.opened_at.desc(), call.c.id.desc())
                    .limit(limit + 1)
                )
            ).all()
            begin, end = await self._period(connection, chosen, since, until)
            observed = await self._observed(connection, chosen, begin, end)
        found = tuple(found_call(row) for row in rows[:limit])
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
        async with self.reading() as connection:
            rows = (
                await connection.execute(
                    CALLS.where(call.c.id.in_(wanted)).order_by(call.c.id.desc()).limit(LEGS_MAX)
                )
            ).all()
            return tuple([await self._timeline(connection, found_call(row)) for row in rows])

    async def accounts(self) -> tuple[Account, ...]:
        """Every account that there is or ever was, by name."""
        columns = (account.c.name, account.c.tenant, _existed_since(), account.c.removed_at)
        async with self.reading() as connection:
            rows = await connection.execute(select(*columns).order_by(account.c.name))
            return tuple(Account(*row) for row in rows)

    async def coverage(
        self,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        accounts: Iterable[str] = (),
        tenant: str | Iterable[str] | None = None,
        limit: int | None = None,
    ) -> Coverage:
        """What was observed of each account in [since, until), as long as there was such an account.

        No moment is left out. Without `since` it begins where the first of the accounts was added. With
        `limit` only so many accounts are handed out, the worst; the figures of tenants and of all together
        are about every one. One statement, whatever the number of accounts; of those that are not handed out,
        nothing stays in memory. Raises StoreError when there are more than COVERED_MAX rows in that time, or
        GAPS_MAX gaps in the answer.
        """
        chosen = chosen_accounts(accounts, tenant)
        tally, tenants, shown = _Tally(), dict[str, _Tally](), list[Watched]()
        last: Counter[str] = Counter()
        async with self.reading() as connection:
            now = self._clock()
            first_at = (await connection.execute(select(func.min(_existed_since())).where(chosen))).scalar()
            end = min(until, now) if until is not None else now
            begin = since if since is not None else min(first_at or end, end)
            end = max(begin, end)
            async for each in self._watched(connection, chosen, begin, end):
                tally.add(each.since, each.until, each.gaps)
                tenants.setdefault(each.tenant, _Tally()).add(each.since, each.until, each.gaps)
                if each.last is not None:
                    last[each.last.cause] += 1
                shown.append(each)
                if limit is not None and len(shown) >= 2 * limit:
                    shown = sorted(shown, key=_worst)[:limit]
        shown = sorted(shown, key=_worst)[:limit]
        if sum(len(each.gaps) for each in shown) > GAPS_MAX:
            raise StoreError(f"More than {GAPS_MAX} gaps: ask for a shorter time, or for fewer accounts.")
        together = [Tenant(name, its.accounts, its.figures()) for name, its in tenants.items()]
        return Coverage(
            since=begin,
            until=end,
            now=now,
            asked_until=until if until is not None else max(now, begin),
            first_at=first_at,
            total=tally.figures(),
            last=dict(sorted(last.items())),
            tenants=tuple(sorted(together, key=lambda each: (each.figures.percent or 0.0, each.tenant))),
            accounts=tuple(shown),
            not_shown=tally.accounts - len(shown),
        )

    async def live(self, limit: int = PAGE_MAX) -> tuple[Found, ...]:
        """The calls that go on now, newest first."""
        async with self.reading() as connection:
            rows = await connection.execute(
                CALLS.where(_LIVE, account.c.removed_at.is_(None))
                .order_by(call.c.opened_at.desc(), call.c.id.desc())
                .limit(min(limit, PAGE_MAX))
            )
            return tuple(found_call(row) for row in rows)

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
        async with self.reading() as connection:
            async for name, raw in await connection.stream(statement):
                counts[name] += 1
                digests.setdefault(name, hashlib.sha256()).update(raw + b"\n")
        return {name: Kept(counts[name], digest.hexdigest()) for name, digest in digests.items()}

    # ── parts of answers ──────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
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
        if found.call.open:
            end = self._clock()
        elif found.call.ended_at is None:
            end = max([last, *(row.at for row in (*changes, *odds))])
        else:
            end = last
        observed = await self._observed(connection, account.c.id == found.call.account, opened_at, end)
        return Timeline(found, moments, observed, end)

    async def _watched(
        self, connection: AsyncConnection, chosen: ColumnElement[bool], begin: datetime, end: datetime
    ) -> AsyncIterator[Watched]:
        """Each chosen account that there was in [begin, end), by name."""
        # The last row that began by then tells how it was at the beginning, and since when.
        earlier = coverage.alias()
        floor = (
            select(func.max(earlier.c.since))
            .where(earlier.c.account_id == account.c.id, earlier.c.since <= begin)
            .correlate(account)
            .scalar_subquery()
        )
        there = (
            select(
                account.c.id,
                account.c.name,
                account.c.tenant,
                _existed_since().label("existed_since"),
                account.c.removed_at,
                func.coalesce(floor, begin).label("floor"),
            )
            .where(chosen, _watched_after(begin))
            .cte("there")
            # Else PostgreSQL looks for the floor once for each row of coverage.
            .prefix_with("MATERIALIZED")
        )
        joined = there.outerjoin(
            coverage,
            and_(
                coverage.c.account_id == there.c.id,
                coverage.c.since >= there.c.floor,
                coverage.c.since < end,
            ),
        )
        statement = (
            select(
                there.c.name,
                there.c.tenant,
                there.c.existed_since,
                there.c.removed_at,
                coverage.c.since,
                self._believed_until(),
                coverage.c.cause,
            )
            .select_from(joined)
            # Of a time that is still to come nothing is known, of whom ever.
            .where(there.c.existed_since < end, literal(begin < end))
            .order_by(there.c.name, coverage.c.since, coverage.c.id)
        )
        read = 0
        who: Account | None = None
        told: list[Told] = []
        stream = await connection.stream(statement, execution_options={"yield_per": _FETCH})
        async for rows in stream.partitions():
            if (read := read + len(rows)) > COVERED_MAX:
                raise StoreError(f"More than {COVERED_MAX} rows of coverage: ask for a shorter time.")
            for name, tenant, existed_since, removed_at, since, until, cause in rows:
                if who is None or who.account != name:
                    if who is not None:
                        yield assess(who, told, begin, end)
                    who, told = Account(name, tenant, existed_since, removed_at), []
                if since is not None:
                    told.append((since, until, cause))
        if who is not None:
            yield assess(who, told, begin, end)

    def _believed_until(self) -> ColumnElement[datetime]:
        """The end of a row of coverage. An open "observed" goes on as long as heartbeats come; when they have
        stopped, it ended with the last of them, as the next start of a daemon will write it down."""
        now = self._clock()
        silent = and_(
            coverage.c.cause == OBSERVED,
            or_(coverage.c.seen_at < now - timedelta(seconds=SILENT_S_MAX), text(f"NOT {IS_HELD}")),
        )
        return case(
            (coverage.c.until.is_not(None), coverage.c.until),
            (silent, func.coalesce(coverage.c.seen_at, coverage.c.since)),
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
        first = (await connection.execute(select(func.min(_existed_since())).where(chosen))).scalar()
        begin = max((each for each in (since, first) if each is not None), default=end)
        return min(begin, end), end

    async def _observed(
        self, connection: AsyncConnection, chosen: ColumnElement[bool], begin: datetime, end: datetime
    ) -> float:
        """The share of [begin, end) that was observed, of all chosen accounts together."""
        last = func.least(end, account.c.removed_at)
        there = select(func.greatest(begin, _existed_since()).label("first"), last.label("last"))
        there = there.where(chosen, _watched_after(begin))
        each = there.subquery()
        asked = select(func.sum(_seconds(each.c.last - each.c.first))).where(each.c.last > each.c.first)
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

_FETCH = 2000
"""Rows of coverage that are in memory at a time; one by one, each would cost a turn of the loop."""

_LIVE = and_(call.c.ended_at.is_(None), call.c.settled.is_(None))
"""As the index `ix_call_open` has it."""

CALLS: Select[Any] = select(
    account.c.name,
    account.c.tenant,
    *(call.c[CALL_COLUMN_OF.get(field, field)] for field in Call.__struct_fields__),
).join(account, account.c.id == call.c.account_id)
"""Calls with whose they are, for `found_call`."""


def found_call(row: Row[*tuple[Any, ...]]) -> Found:
    """The call of a row of `CALLS`."""
    name, tenant, *values = row
    fields = dict(zip(Call.__struct_fields__, values, strict=True))
    return Found(name, tenant, msgspec.convert(fields, Call))


def chosen_accounts(accounts: Iterable[str], tenant: str | Iterable[str] | None) -> ColumnElement[bool]:
    """The accounts of these names, or all, as far as they are these tenants'."""
    names = list(accounts)
    tenants = [tenant] if isinstance(tenant, str) else list(tenant or ())
    conditions: list[ColumnElement[bool]] = [true()]
    if names:
        conditions.append(account.c.name.in_(names))
    if tenants:
        conditions.append(account.c.tenant.in_(tenants))
    return and_(*conditions)


def _existed_since() -> ColumnElement[Any]:
    """When an account was added. `added_at` is the database's clock and coverage the daemon's: the earlier
    counts, so that no row lies before it."""
    first = (
        select(func.min(coverage.c.since))
        .where(coverage.c.account_id == account.c.id)
        .correlate(account)
        .scalar_subquery()
    )
    return func.least(account.c.added_at, first)


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


def escaped(text: str) -> str:
    """As LIKE takes it literally."""
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")


def _place(after: str) -> Any:
    """Where a page ended."""
    opened_at, _, id = after.partition("-")
    try:
        return tuple_(literal(moment(int(opened_at))), literal(int(id)))
    except (ValueError, OverflowError):
        raise StoreError(f"{after!r} is not where a page ended: take `after` from the page before.") from None


Told = tuple[datetime, datetime, str]
"""A row of coverage: from, to, cause."""


def assess(who: Account, told: Sequence[Told], begin: datetime, end: datetime) -> Watched:
    """One account in [begin, end), from its rows in the order of time: those since the last that began by
    `begin`. Where no row says anything, nobody had started to watch. Total: of rows that overlap, the first
    counts."""
    last_at = min(end, who.removed_at) if who.removed_at is not None else end
    first_at = min(max(begin, who.since), last_at)
    known_since = told[0][0] if told and told[0][0] <= first_at else min(who.since, first_at)
    gaps: list[Gap] = []
    present: Present | None = None
    for since, until, cause in _tiled(known_since, last_at, told):
        if present is None or present.cause != cause:
            present = Present(cause, since)
        if cause == OBSERVED or until <= first_at:
            continue
        begun = max(since, first_at)
        if gaps and (gaps[-1].until, gaps[-1].cause) == (begun, cause):
            begun = gaps.pop().since
        gaps.append(Gap(begun, until, cause))
    tally = _Tally()
    tally.add(first_at, last_at, gaps)
    return Watched(
        account=who.account,
        tenant=who.tenant,
        since=first_at,
        until=last_at,
        figures=tally.figures(),
        last=present if last_at == end else None,
        gaps=tuple(gaps),
    )


def _tiled(begin: datetime, end: datetime, told: Iterable[Told]) -> Iterator[Told]:
    """[begin, end) without a moment left out: what is told, and "not started" where nothing is."""
    at = begin
    for told_since, told_until, cause in told:
        since, until = max(told_since, at), min(told_until, end)
        if since >= until:
            continue
        if since > at:
            yield at, since, NOT_STARTED
        yield since, until, cause
        at = until
    if at < end:
        yield at, end, NOT_STARTED


class _Tally:
    """Adds up times exactly, which seconds as floats would not."""

    def __init__(self) -> None:
        self.accounts = 0
        self._asked = timedelta()
        self._gaps = 0
        self._longest = timedelta()
        self._causes: dict[str, timedelta] = {}

    def add(self, since: datetime, until: datetime, gaps: Iterable[Gap]) -> None:
        """One account more."""
        self.accounts += 1
        self._asked += until - since
        for gap in gaps:
            lasted = gap.until - gap.since
            self._gaps += 1
            self._longest = max(self._longest, lasted)
            self._causes[gap.cause] = self._causes.get(gap.cause, timedelta()) + lasted

    def figures(self) -> Figures:
        """What it comes to."""
        observed = self._asked - sum(self._causes.values(), timedelta())
        return Figures(
            asked_s=self._asked.total_seconds(),
            observed_s=observed.total_seconds(),
            percent=100 * (observed / self._asked) if self._asked else None,
            gaps=self._gaps,
            longest_gap_s=self._longest.total_seconds(),
            causes_s={cause: lasted.total_seconds() for cause, lasted in sorted(self._causes.items())},
        )


def _worst(each: Watched) -> tuple[float, float, str]:
    """The order of accounts: the least observed first; of whom nothing was asked last."""
    percent = each.figures.percent
    return (math.inf if percent is None else percent, -each.figures.longest_gap_s, each.account)
