"""The read side of dials: lists, one dial with how its outcome was reached, and tallies of a period.

`DialHistory` is a `History` that also answers about dials; all that is said there about roles, pages, times
and coverage holds here. A dial that was merged into another is that other one, and stands in no list. What
`tallies` gives is what `listener.core.why` compares; it decides nothing about it.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from msgspec import Struct
from sqlalchemy import ColumnElement, RowMapping, Select, case, func, literal, or_, select, text, tuple_

from listener.core.calls import JsonObject
from listener.core.dialling import (
    ENDING_DIGITS_MIN,
    FAILURES,
    Cause,
    Dial,
    DialState,
    Leg,
    Origin,
    Outcome,
    System,
    normalised,
)
from listener.core.why import PREFIX_MAX, Tally
from listener.errors import InvalidRequest
from listener.store.connect import microseconds, moment
from listener.store.dials import cause_of, dial_of
from listener.store.history import CALLS as FOUND_CALLS
from listener.store.history import PAGE_MAX, Found, History, chosen_accounts, escaped, found_call
from listener.store.schema import account, call, dial, dial_fact

FACTS_MAX = 1000
"""Facts of one dial that are shown; a dial has about five."""

TALLIES_MAX = 200_000
"""Tallies in one answer, of both periods together: those with the most dials. What compares them takes fewer
and says so."""


class DialFound(Struct, frozen=True):
    """A dial, and whose it is."""

    account: str
    tenant: str
    dial: Dial
    candidates: tuple[str, ...] = ()
    """The other dials that its call may be instead, where that is ambiguous."""
    key: str | None = None
    """Its idempotency key."""
    merged_into: str | None = None
    """The dial that it turned out to be; such a one has no outcome of its own."""


class DialPage(Struct, frozen=True):
    """Some of the dials that were asked for, newest first."""

    dials: tuple[DialFound, ...]
    after: str | None
    """Hand it in as `after` for the next page; None where this one is the last."""
    observed: float
    """The share, 0 to 1, of the asked time of the asked accounts that was observed: what was dialled while
    nobody listened was not overheard."""
    since: datetime
    until: datetime
    """The time that `observed` is about."""


class FactFound(Struct, frozen=True):
    """Something that was heard of a dial, and what the dial was after it."""

    at: datetime
    kind: str
    """accepted, refused, not_answered, match, call, reported, status, record, hangup_requested, elapsed or
    merged."""
    said: str
    notification: int | None
    """The message that said so; None for what no message in the journal says."""
    leg: Leg | None
    cause: Cause | None
    state: DialState
    outcome: Outcome | None


class DialTimeline(Struct, frozen=True):
    """A dial with all that led to its outcome."""

    found: DialFound
    facts: tuple[FactFound, ...]
    call: Found | None
    """The call that it is."""
    request: JsonObject | None
    """What was asked for, without credentials; None for one that was overheard."""


class DialHistory(History):
    """A `History` that also answers about dials."""

    async def dials(
        self,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        accounts: Iterable[str] = (),
        tenant: str | Iterable[str] | None = None,
        systems: Iterable[System] = (),
        origin: Origin | None = None,
        campaigns: Iterable[str] = (),
        outcomes: Iterable[Outcome] = (),
        waiting: bool | None = None,
        leg: Leg | None = None,
        cause: str | None = None,
        number: str | None = None,
        number_ends: str | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> DialPage:
        """The dials that were requested in [since, until), newest first.

        `outcomes` chooses those that ended in one of these ways; `waiting` those that wait for their end, or
        those that do not. `cause` is a raw cause as `str(Cause)` gives it, or its code alone. `number` is
        whole, in any spelling; `number_ends` gives its last digits. `after` continues a page. Raises
        InvalidRequest when `after` is none of ours, and StoreError when the question takes too long.
        """
        chosen = chosen_accounts(accounts, tenant)
        wanted = _wanted(chosen, since, until, systems=systems, origin=origin, campaigns=campaigns)
        if ended := list(outcomes):
            wanted.append(dial.c.outcome.in_(ended))
        if waiting is not None:
            wanted.append(dial.c.outcome.is_(None) if waiting else dial.c.outcome.is_not(None))
        if leg is not None:
            wanted.append(dial.c.leg == leg)
        if cause is not None:
            wanted.append(or_(_CAUSE.in_([cause]), dial.c.cause_code == cause))
        if number is not None:
            wanted.append(_numbered(number))
        if number_ends is not None:
            wanted.append(_BACKWARDS.like(escaped(number_ends[::-1]) + "%"))
        if after is not None:
            wanted.append(tuple_(dial.c.requested_at, dial.c.id) < _place(after))
        limit = min(limit, PAGE_MAX)
        async with self.reading() as connection:
            page = await connection.execute(
                _FOUND.where(*wanted).order_by(dial.c.requested_at.desc(), dial.c.id.desc()).limit(limit + 1)
            )
            rows = page.mappings().all()
            begin, end = await self._period(connection, chosen, since, until)
            observed = await self._observed(connection, chosen, begin, end)
        found = tuple(_found(row) for row in rows[:limit])
        last = found[-1].dial if len(rows) > limit else None
        more = f"{microseconds(last.requested_at)}-{last.id}" if last is not None else None
        return DialPage(found, more, observed, begin, end)

    async def dial(self, id: str) -> DialTimeline | None:
        """One dial by its id, with its facts in order and its call; None where there is none."""
        async with self.reading() as connection:
            row = (await connection.execute(_FOUND.where(dial.c.id == id))).mappings().one_or_none()
            if row is None:
                return None
            found = _found(row)
            facts = await connection.execute(
                select(dial_fact)
                .where(dial_fact.c.dial_id == id)
                .order_by(dial_fact.c.ordinal)
                .limit(FACTS_MAX)
            )
            noted = tuple(_fact(each) for each in facts.mappings())
            its = None
            if found.dial.call is not None:
                its = (
                    await connection.execute(FOUND_CALLS.where(call.c.id == found.dial.call))
                ).one_or_none()
            return DialTimeline(found, noted, None if its is None else found_call(its), row["request"])

    async def tallies(
        self,
        since: datetime,
        until: datetime,
        *,
        before: datetime | None = None,
        accounts: Iterable[str] = (),
        tenant: str | Iterable[str] | None = None,
        systems: Iterable[System] = (),
        origin: Origin | None = None,
        campaigns: Iterable[str] = (),
    ) -> tuple[list[Tally], list[Tally]]:
        """How many dials that were requested in [since, until) were alike, and in [before, since), which is
        as long where no other beginning is given. For `listener.core.why.explain`.

        What is not decided yet is left out: a dial that rings may yet fail or be answered. The times of
        tallies that are no failures are not looked up. Raises InvalidRequest where no time is as long before
        `since`, and StoreError when the question takes too long.
        """
        try:
            begin = before if before is not None else since - (until - since)
        except OverflowError:
            raise InvalidRequest(
                "since", "leaves no time before it to compare with", "give a later one, or `before` too"
            ) from None
        chosen = chosen_accounts(accounts, tenant)
        wanted = _wanted(chosen, begin, until, systems=systems, origin=origin, campaigns=campaigns)
        wanted.append(or_(dial.c.outcome.is_not(None), dial.c.connected_at.is_not(None)))
        failed = dial.c.outcome.in_(sorted(FAILURES))
        alike = (
            (dial.c.requested_at >= since).label("now"),
            dial.c.system,
            dial.c.account_id,
            func.left(dial.c.number_normalised, PREFIX_MAX).label("prefix"),
            dial.c.outcome,
            # Nothing is asked of the causes of others, and each would be a tally of its own.
            case((failed, _CAUSE), else_="").label("cause"),
            case((failed, dial.c.leg)).label("leg"),
            dial.c.device,
            dial.c.caller_id,
            dial.c.campaign,
        )
        counted = (
            select(
                *alike,
                func.count().label("dials"),
                # Of others nobody asks for times, and reading them would take as long as all the rest.
                func.min(dial.c.requested_at).filter(failed).label("first_at"),
                func.max(dial.c.requested_at).filter(failed).label("last_at"),
                func.max(dial.c.id).filter(failed).label("example"),
            )
            .join(account, account.c.id == dial.c.account_id)
            .where(*wanted)
            .group_by(*alike)
            .subquery()
        )
        statement = (
            select(counted, account.c.name)
            .join(account, account.c.id == counted.c.account_id)
            .order_by(counted.c.dials.desc())
            .limit(TALLIES_MAX)
        )
        tallies: dict[bool, list[Tally]] = {True: [], False: []}
        async with self.reading() as connection:
            await connection.execute(_IN_MEMORY)
            for row in await connection.execute(statement):
                now, its_system, _, prefix, outcome, cause, leg, device, caller_id, campaign, *rest = row
                dials, first_at, last_at, example, name = rest
                tallies[now].append(
                    Tally(
                        system=its_system,
                        account=name,
                        number_prefix=prefix,
                        outcome=_OUTCOMES[outcome],
                        dials=dials,
                        first_at=first_at or since,
                        last_at=last_at or since,
                        cause=cause,
                        leg=_LEGS[leg],
                        example=example or "",
                        device=device or "",
                        caller_id=caller_id or "",
                        campaign=campaign or "",
                    )
                )
        return tallies[True], tallies[False]


_CAUSE: ColumnElement[str] = func.concat_ws(" ", dial.c.cause_field, func.nullif(dial.c.cause_code, ""))
"""As `str(Cause)`."""

_IN_MEMORY = text("SET LOCAL work_mem = '64MB'")
"""For a hundred thousand tallies; with less they are sorted on disk."""

_OUTCOMES: dict[str | None, Outcome | None] = {None: None, **{each.value: each for each in Outcome}}
_LEGS: dict[str | None, Leg | None] = {None: None, **{each.value: each for each in Leg}}
"""Looked up for each of many tallies."""

_BACKWARDS: ColumnElement[str] = func.reverse(dial.c.number_normalised)

_FOUND: Select[Any] = select(account.c.name, account.c.tenant, *dial.c).join(
    account, account.c.id == dial.c.account_id
)


def _wanted(
    chosen: ColumnElement[bool],
    since: datetime | None,
    until: datetime | None,
    *,
    systems: Iterable[System],
    origin: Origin | None,
    campaigns: Iterable[str],
) -> list[ColumnElement[bool]]:
    wanted = [chosen, dial.c.merged_into.is_(None)]
    if since is not None:
        wanted.append(dial.c.requested_at >= since)
    if until is not None:
        wanted.append(dial.c.requested_at < until)
    if among := list(systems):
        wanted.append(dial.c.system.in_(among))
    if origin is not None:
        wanted.append(dial.c.origin == origin)
    if of := list(campaigns):
        wanted.append(dial.c.campaign.in_(of))
    return wanted


def _numbered(number: str) -> ColumnElement[bool]:
    """As `listener.core.dialling.same_number`, as far as an index finds it: equal, or without country code or
    the prefix of an outside line in what was asked."""
    plain = normalised(number)
    ending = plain.removeprefix("0")
    if len(ending) >= ENDING_DIGITS_MIN and ending.isdecimal():
        return _BACKWARDS.like(ending[::-1] + "%")
    return _BACKWARDS.in_([plain[::-1]])


def _place(after: str) -> Any:
    """Where a page ended."""
    requested_at, _, id = after.partition("-")
    try:
        return tuple_(literal(moment(int(requested_at))), literal(id))
    except (ValueError, OverflowError):
        raise InvalidRequest("after", "is not where a page ended", "take it from the page before") from None


def _as_it_is(at: datetime) -> datetime:
    return at


def _found(row: RowMapping) -> DialFound:
    values = dict(row)
    return DialFound(
        account=values["name"],
        tenant=values["tenant"],
        dial=dial_of(values, _as_it_is),
        candidates=tuple(values["candidates"]),
        key=values["idempotency_key"],
        merged_into=values["merged_into"],
    )


def _fact(row: RowMapping) -> FactFound:
    values = dict(row)
    return FactFound(
        at=values["at"],
        kind=values["kind"],
        said=values["said"],
        notification=values["notification_id"],
        leg=_LEGS[values["leg"]],
        cause=cause_of(values),
        state=DialState(values["state"]),
        outcome=_OUTCOMES[values["outcome"]],
    )
