"""Compares what the simulated contact centre says it sent with what is in the tables.

The rules are those of the promises, and nothing here is shared with the product: what was acknowledged is
stored; nothing is stored twice or out of order; what is missing lies inside a recorded gap; a call that was
heard whole is as its script had it, and one that was not is at least no longer open once it has ended.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import asyncpg
import msgspec

from listener.simulator.centre import AccountTruth, Truth
from listener.simulator.scripts import CallTruth, Message

SHOWN_MAX = 10
"""Differences named in one report."""


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
        ids = {row[0]: row[1] for row in await connection.fetch("SELECT name, id FROM account")}
        wrong: list[str] = []
        stored_total = missing_total = calls = inferred = 0
        for login, account in truth.accounts.items():
            number = ids.get(name(login), 0)
            stored = await _stored(connection, number)
            gaps = await _gaps(connection, number)
            lost = _missing(login, account, stored, gaps, wrong, acknowledged=acknowledged)
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
        return Report(wrong, truth.sent, stored_total, missing_total, calls, inferred)
    finally:
        await connection.close()


async def _stored(connection: asyncpg.Connection, account: int) -> list[Stored]:
    rows = await connection.fetch(
        "SELECT raw, received_at FROM notification WHERE account_id = $1 AND source = 'cometd' ORDER BY id",
        account,
    )
    # `null` between the messages is one of the faults, and is kept as everything is.
    return [Stored(row[0], row[1]) for row in rows if row[0] != b"null"]


async def _gaps(connection: asyncpg.Connection, account: int) -> list[Covered]:
    rows = await connection.fetch(
        "SELECT since, until, cause FROM coverage WHERE account_id = $1 ORDER BY since, id", account
    )
    return [Covered(*row) for row in rows if row["cause"] and row["since"] != row["until"]]


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
) -> list[Message]:
    """The messages that are not stored; what breaks a promise is added to `wrong`."""
    assert truth.messages is not None, "the simulator must remember what it sent"
    messages = truth.messages
    runs: list[tuple[int, int, int]] = []
    at = 0
    for index, message in enumerate(messages):
        if message.accepted and at < len(stored) and stored[at].raw == message.raw:
            at += 1
        elif runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1, at)
        else:
            runs.append((index, index + 1, at))
    if at < len(stored):
        extra = len(stored) - at
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
    return lost


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
    if not any(_explains(gap, before, after) for gap in gaps):
        found.append(
            f"{login}: messages {missing[0].position} to {missing[-1].position}, said between what came at"
            f" {before} and {after}, are not stored, and no gap explains it: "
            f"{[(str(gap.since), str(gap.until), gap.cause) for gap in gaps]}"
        )
    return found


def _explains(gap: Covered, before: datetime | None, after: datetime | None) -> bool:
    """Whether a gap meets the time between two messages that are stored."""
    return (after is None or gap.since <= after) and (
        before is None or gap.until is None or gap.until >= before
    )


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
    return 1 if str(call["settled"]).startswith("inferred") else 0
