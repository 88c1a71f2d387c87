"""Compares what the simulated contact centre says it sent with what is in the tables.

The rules are those of the promises, and nothing here but names is shared with the product: what was
acknowledged is stored; nothing is stored twice or out of order; what is missing was said inside a recorded
gap; a call that was heard whole is as its script had it, and one that was not is at least no longer open once
it has ended. Each account's coverage has no hole and no overlap.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, NamedTuple

import asyncpg
import msgspec

from listener.core.calls import State
from listener.simulator.centre import AccountTruth, Truth
from listener.simulator.scripts import CallTruth, Message

SHOWN_MAX = 10
"""Differences named in one report."""
GAPS_SHOWN_MAX = 6
"""Gaps named beside a message that lies in none: those nearest to it."""
LONG_AGO = datetime.fromtimestamp(0, UTC)

CLOCK_GRAIN = timedelta(milliseconds=5)
"""A gap is told from one reading of the clock, a message is said at another."""


class Stored(NamedTuple):
    """A notification in the journal."""

    raw: bytes
    received_at: datetime


class Covered(NamedTuple):
    """A row of coverage."""

    since: datetime
    until: datetime | None
    cause: str


class Report(NamedTuple):
    """What the comparison found."""

    wrong: list[str]
    """A sentence for each difference that breaks a promise."""
    sent: int
    stored: int
    missing: int
    """Not stored, and inside a gap that says so."""
    calls: int
    """Calls that were compared field by field."""
    inferred: int
    """Calls whose end was not heard, and is marked so."""
    surplus: int = 0
    """Stored, and never sent, or stored twice."""
    late_s: float = 0.0
    """The longest time from saying to hearing."""

    def check(self) -> "Report":
        """Raises AssertionError with the differences, if there are any."""
        assert not self.wrong, "\n".join(
            [f"{len(self.wrong)} differences ({self._asdict() | {'wrong': '…'}}):", *self.wrong[:SHOWN_MAX]]
        )
        return self


async def compare(
    dsn: str, truth: Truth, *, acknowledged: bool = True, name: Callable[[str], str] = str
) -> Report:
    """The truth beside the database. `acknowledged` says whether sessions acknowledged: then what the server
    let go of must be stored; without, only a gap says that something may be missing. `name` gives the
    listener's name of an account for its login."""
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch("SELECT name, id, removed_at IS NULL AS wanted FROM account")
        ids = {row["name"]: row["id"] for row in rows}
        wanted = {row["id"] for row in rows if row["wanted"]}
        wrong: list[str] = []
        stored_total = missing_total = calls = inferred = surplus = 0
        late_s = 0.0
        for login, account in truth.accounts.items():
            number = ids.get(name(login), 0)
            stored = await _stored(connection, number)
            coverage = await _coverage(connection, number)
            wrong += _holes(login, coverage, ends=number not in wanted)
            gaps = [row for row in coverage if row.cause and row.since != row.until]
            if coverage:  # before its first row the account was not ours to listen to
                gaps.insert(0, Covered(LONG_AGO, coverage[0].since, "not added yet"))
            lost, extra, lateness_s = _missing(login, account, stored, gaps, wrong, acknowledged=acknowledged)
            surplus += extra
            late_s = max(late_s, lateness_s)
            stored_total += len(stored)
            missing_total += len(lost)
            scripts = [call for call in truth.calls if call.account == login]
            found = await _calls(connection, number)
            partly = {id(message.truth) for message in lost}
            snapshots = await connection.fetchval(
                "SELECT count(*) FROM notification WHERE account_id = $1 AND source = 'snapshot'", number
            )
            for script in scripts:
                if id(script) in partly or script.accepted < script.notifications:
                    inferred += _ended(script, found, wrong)
                elif script.finished:
                    calls += 1
                    wrong += _differences(script, found, snapshots)
        return Report(wrong, truth.sent, stored_total, missing_total, calls, inferred, surplus, late_s)
    finally:
        await connection.close()


async def _stored(connection: asyncpg.Connection, account: int) -> list[Stored]:
    rows = await connection.fetch(
        "SELECT raw, received_at FROM notification WHERE account_id = $1 AND source = 'cometd' ORDER BY id",
        account,
    )
    # `null` between the messages is one of the faults, and is kept as everything is.
    return [Stored(row[0], row[1]) for row in rows if row[0] != b"null"]


async def _coverage(connection: asyncpg.Connection, account: int) -> list[Covered]:
    rows = await connection.fetch(
        "SELECT since, until, cause FROM coverage WHERE account_id = $1 ORDER BY since, id", account
    )
    return [Covered(*row) for row in rows]


def _holes(login: str, coverage: Sequence[Covered], *, ends: bool) -> list[str]:
    """Where the rows do not stand end to end, or the last one does not go on; it `ends` where nobody listens
    to the account any more."""
    if not coverage:
        return [f"{login}: no row of coverage at all"]
    found = [
        f"{login}: coverage ends at {before.until} ({before.cause or 'observed'}), goes on at {after.since}"
        for before, after in pairwise(coverage)
        if before.until != after.since
    ]
    if coverage[-1].until is not None and not ends:
        found.append(f"{login}: coverage says nothing after {coverage[-1].until}")
    return found


async def _calls(connection: asyncpg.Connection, account: int) -> dict[str, Mapping[str, Any]]:
    """The newest call of each id."""
    rows = await connection.fetch("SELECT * FROM call WHERE account_id = $1 ORDER BY id", account)
    return {alias: dict(row) for row in rows for alias in row["aliases"]}


def _missing(
    login: str,
    truth: AccountTruth,
    stored: Sequence[Stored],
    gaps: Sequence[Covered],
    wrong: list[str],
    *,
    acknowledged: bool,
) -> tuple[list[Message], int, float]:
    """The messages that are not stored, how many are stored that were not sent, and the longest seconds from
    saying to hearing; what breaks a promise is added to `wrong`."""
    assert truth.messages is not None, "the simulator must remember what it sent"
    messages = truth.messages
    runs: list[tuple[int, int, int]] = []
    at = 0
    late_s = 0.0
    for index, message in enumerate(messages):
        if message.accepted and at < len(stored) and stored[at].raw == message.raw:
            if message.said_at_s:
                late_s = max(late_s, stored[at].received_at.timestamp() - message.said_at_s)
            at += 1
        elif runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1, at)
        else:
            runs.append((index, index + 1, at))
    extra = len(stored) - at
    if extra:
        wrong.append(
            f"{login}: {extra} stored messages were never sent, or twice, or in another order; the first: "
            f"{stored[at].raw[:300]!r} at {stored[at].received_at}"
        )
    lost: list[Message] = []
    for start, end, place in runs:
        while True:
            found = _unexplained(login, messages[start:end], stored, place, gaps, acknowledged=acknowledged)
            if not found or not start or messages[start - 1].raw != messages[end - 1].raw:
                break
            # Equal bytes: it may as well be the later one that is stored.
            start, end, place = start - 1, end - 1, place - 1
        wrong += found
        lost += messages[start:end]
    return lost, extra, late_s


def _unexplained(
    login: str,
    missing: Sequence[Message],
    stored: Sequence[Stored],
    place: int,
    gaps: Sequence[Covered],
    *,
    acknowledged: bool,
) -> list[str]:
    """What is wrong about messages that are missing before the stored one at `place`."""
    let_go = [message.position for message in missing if acknowledged and message.delivered]
    found = [f"{login}: messages {let_go} were acknowledged and are not stored"] if let_go else []
    before = stored[place - 1].received_at if place else None
    after = stored[place].received_at if place < len(stored) else None
    outside = [message for message in missing if not any(_holds(gap, message) for gap in gaps)]
    if outside:
        first = outside[0]
        said_at = datetime.fromtimestamp(first.said_at_s, UTC)
        near = sorted(gaps, key=lambda gap: abs(gap.since - said_at))[:GAPS_SHOWN_MAX]
        found.append(
            f"{login}: messages {[message.position for message in outside]} are not stored, and were said in"
            f" no gap; the first at {said_at} ({'accepted' if first.accepted else 'nobody was subscribed'},"
            f" {'delivered' if first.delivered else 'not delivered'}); what is stored round them came at"
            f" {before} and {after}; the gaps near: "
            f"{[(str(gap.since), str(gap.until), gap.cause) for gap in sorted(near)]}"
        )
    return found


def _holds(gap: Covered, message: Message) -> bool:
    """Whether a message was said during a gap."""
    said_at = datetime.fromtimestamp(message.said_at_s, UTC)
    return gap.since - CLOCK_GRAIN <= said_at and (gap.until is None or said_at <= gap.until + CLOCK_GRAIN)


def _differences(script: CallTruth, found: Mapping[str, Mapping[str, Any]], snapshots: int) -> list[str]:
    """What is otherwise than the script of a call that was heard whole.

    A snapshot that lists it, and that is newer than what was heard of it, counts as a message about it.
    """
    title = f"{script.account}: call {script.call_id} ({script.script}, {script.dialect})"
    call = found.get(script.call_id)
    if call is None:
        return [f"{title} is not there"]
    parties = msgspec.json.decode(call["participants"])
    counted = call["notifications"]
    more = range(script.notifications, script.notifications + 1 + snapshots)
    pairs = {
        "notifications": (script.notifications, script.notifications if counted in more else counted),
        "state": (script.final_state, call["state"]),
        "outcome": (script.outcome, call["outcome"]),
        "direction": (script.direction, call["direction"]),
        "number": (script.number, call["number"]),
        "hold count": (script.hold_count, call["hold_count"]),
        "participants": (sorted(set(script.parties)), sorted({party["number"] for party in parties})),
        "recording": (script.recording, call["recording"]),
        "aliases": (sorted(set(script.aliases)), sorted(call["aliases"])),
        "userData": (script.merged_data, msgspec.json.decode(call["user_data"])),
    }
    return [
        f"{title}: {name} should be {should}, is {has}"
        for name, (should, has) in pairs.items()
        if should != has
    ]


def _ended(script: CallTruth, found: Mapping[str, Mapping[str, Any]], wrong: list[str]) -> int:
    """Checks a call of which something was not heard; 1 if its end was inferred."""
    call = found.get(script.call_id)
    if call is None or not script.finished:
        return 0
    if call["ended_at"] is None and call["settled"] is None:
        wrong.append(
            f"{script.account}: call {script.call_id} ({script.script}) ended, was heard in part, and is open"
            f" as {call['state']}"
        )
    if call["ended_at"] is not None and call["state"] not in (script.final_state, State.RELEASED):
        wrong.append(
            f"{script.account}: call {script.call_id} ({script.script}) has ended, and its state is"
            f" {call['state']}; it should be {script.final_state}"
        )
    return 1 if str(call["settled"]).startswith("inferred") else 0
