"""Coverage: one row is true now, none overlaps, and a crash leaves only what was known."""

import asyncio
from datetime import datetime, timedelta

import asyncpg
import pytest

from listener.core.calls import Cover, Missing
from listener.core.session import Kept, Saved
from listener.errors import StoreError
from listener.store.journal import AccountRow, Journal
from tests.store.line import T0, Line


def at(seconds: float) -> datetime:
    """So long after the beginning."""
    return T0 + timedelta(seconds=seconds)


async def rows(sql: asyncpg.Connection, account: int = 1) -> list[tuple[float, float | None, str]]:
    """An account's coverage in order: since and until in seconds after the beginning, and the cause."""
    found = await sql.fetch(
        "SELECT since, until, cause FROM coverage WHERE account_id = $1 ORDER BY since, id", account
    )
    return [
        (
            (row["since"] - T0).total_seconds(),
            None if row["until"] is None else (row["until"] - T0).total_seconds(),
            row["cause"],
        )
        for row in found
    ]


async def test_rows_stand_end_to_end(journal: Journal, sql: asyncpg.Connection) -> None:
    """Each turn closes the row before it; accounts do not touch each other."""
    await journal.cover([Cover(1, at(0), "not started"), Cover(2, at(1)), Cover(1, at(5))])
    await journal.cover([Cover(1, at(60), "disconnected"), Cover(1, at(65))])

    assert await rows(sql) == [
        (0, 5, "not started"),
        (5, 60, ""),
        (60, 65, "disconnected"),
        (65, None, ""),
    ]
    assert await rows(sql, 2) == [(1, None, "")]


async def test_saying_the_same_again_changes_nothing(journal: Journal, sql: asyncpg.Connection) -> None:
    """A gap goes on with its first cause's beginning, also within one batch."""
    await journal.cover([Cover(1, at(0), "disconnected"), Cover(1, at(3), "disconnected")])
    await journal.cover([Cover(1, at(9), "disconnected")])
    await journal.cover([])

    assert await rows(sql) == [(0, None, "disconnected")]


async def test_another_cause_is_another_row(journal: Journal, sql: asyncpg.Connection) -> None:
    """Why nobody listened may change while nobody listens."""
    await journal.cover([Cover(1, at(0), "disconnected"), Cover(1, at(3), "session lost")])

    assert await rows(sql) == [(0, 3, "disconnected"), (3, None, "session lost")]


async def test_the_past_stays_as_it_was_told(journal: Journal, sql: asyncpg.Connection) -> None:
    """A turn from before the present row counts from that row's beginning."""
    await journal.cover([Cover(1, at(0)), Cover(1, at(10), "stalled")])
    await journal.cover([Cover(1, at(4))])
    await journal.cover([Cover(1, at(2), "stopped")])

    assert await rows(sql) == [(0, 10, ""), (10, 10, "stalled"), (10, 10, ""), (10, None, "stopped")]


async def test_turns_out_of_order_in_one_batch_are_no_way_back(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """The same where the row before is being written only now."""
    await journal.cover([Cover(1, at(10)), Cover(1, at(5), "stalled"), Cover(1, at(7))])

    assert await rows(sql) == [(10, 10, ""), (10, 10, "stalled"), (10, None, "")]


async def test_concurrent_turns_of_one_account_are_one_after_the_other(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """The account's row is the lock; whoever comes second continues what the first wrote."""
    async with asyncio.TaskGroup() as tasks:
        for number in range(20):
            tasks.create_task(journal.cover([Cover(1, at(number), "" if number % 2 else "stalled")]))

    found = await rows(sql)
    assert [row[0] for row in found[1:]] == [row[1] for row in found[:-1]]
    assert [row for row in found if row[1] is None] == found[-1:]


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO coverage (account_id, since, cause) VALUES (1, now(), '')",
        "INSERT INTO coverage VALUES (DEFAULT, 1, '2026-03-02 09:00:05Z', '2026-03-02 09:00:07Z', '')",
        "UPDATE coverage SET until = '2026-03-02 08:00Z'",
    ],
    ids=["second open row", "overlap", "backwards"],
)
async def test_the_database_itself_refuses_two_answers(
    statement: str, journal: Journal, sql: asyncpg.Connection
) -> None:
    """Whoever writes."""
    await journal.cover([Cover(1, at(0))])

    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        await sql.execute(statement)


async def test_a_heartbeat_touches_the_observed_only(journal: Journal, sql: asyncpg.Connection) -> None:
    """It says until when it was seen, never backwards, and nothing about gaps and other accounts."""
    await journal.register([AccountRow("eve", "", "lab")])
    await journal.cover([Cover(1, at(0)), Cover(2, at(0), "stalled"), Cover(3, at(0))])
    await journal.heartbeat([1, 2], at(10))
    await journal.heartbeat([1, 2], at(7))

    seen = dict(await sql.fetch("SELECT account_id, seen_at FROM coverage"))  # type: ignore[var-annotated, arg-type]
    assert seen == {1: at(10), 2: None, 3: at(0)}


async def test_after_a_crash_observed_ends_where_it_was_last_known(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """At the last heartbeat: one said before a message that was committed later may have been under way, and
    what was told of a gap before it may not have been written."""
    await journal.cover([Cover(1, at(0)), Cover(2, at(0))])
    await journal.heartbeat([1, 2], at(10))
    await journal.record([Line(2, began=at(14)).hear(b"{}")])

    await journal.resume_coverage([1, 2], at(100))

    assert await rows(sql, 1) == [(0, 10, ""), (10, None, "not started")]
    assert await rows(sql, 2) == [(0, 10, ""), (10, None, "not started")]


async def test_a_session_that_goes_on_withdraws_the_gap_of_a_stop(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """The server kept everything: the account was observed all the time, and the database says nothing else.
    The next stop is as any."""
    await journal.cover([Cover(1, at(0)), Cover(2, at(0)), Cover(1, at(50), "stopped")])
    await journal.heartbeat([2], at(40))

    since = await journal.resume_coverage([1, 2], at(60))
    assert since == {1: at(50), 2: at(40)}
    await journal.cover([Cover(account, until, withdraws=True) for account, until in since.items()])

    assert await rows(sql, 1) == [(0, 50, ""), (50, 50, "stopped"), (50, None, "")]
    assert await rows(sql, 2) == [(0, 40, ""), (40, 40, "not started"), (40, None, "")]
    await journal.cover([Cover(1, at(70), "stopped")])
    assert await journal.resume_coverage([1, 2], at(80)) == {1: at(70), 2: at(40)}


async def test_a_gap_of_several_restarts_is_withdrawn_whole(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """A crash, and a stop before the session was reached: two rows, and both were none."""
    await journal.cover([Cover(1, at(0))])
    await journal.resume_coverage([1], at(10))
    await journal.cover([Cover(1, at(20), "stopped")])

    assert await journal.resume_coverage([1], at(30)) == {1: at(0)}
    await journal.cover([Cover(1, at(0), withdraws=True), Cover(1, at(35), "disconnected")])

    assert [row for row in await rows(sql) if row[0] != row[1]] == [(0, 35, ""), (35, None, "disconnected")]
    found = await rows(sql)
    assert [row[0] for row in found[1:]] == [row[1] for row in found[:-1]]


@pytest.mark.parametrize("cause", ["session lost", "disconnected", "stalled", "subscription refused"])
async def test_a_gap_with_another_cause_than_the_restart_stays(
    cause: str, journal: Journal, sql: asyncpg.Connection
) -> None:
    """The session that is kept was not observed when it stopped: only from its snapshot on it will be."""
    await journal.cover([Cover(1, at(0)), Cover(1, at(5), cause), Cover(1, at(9), "stopped")])
    assert await journal.resume_coverage([1], at(20)) == {}


async def test_an_account_that_was_never_observed_has_nothing_to_withdraw(journal: Journal) -> None:
    """Nor has one that is observed."""
    assert await journal.resume_coverage([1], at(0)) == {}
    assert await journal.resume_coverage([1], at(1)) == {}


async def test_nothing_but_the_last_gaps_can_be_withdrawn(journal: Journal, sql: asyncpg.Connection) -> None:
    """Whoever asks for more gets no more: what was observed, and the gaps before it, stay."""
    before = [Cover(1, at(0), "not started"), Cover(1, at(5)), Cover(1, at(50), "stopped")]
    await journal.cover([*before, Cover(1, at(60)), Cover(1, at(70), "stopped"), Cover(2, at(0))])

    await journal.cover([Cover(1, at(1), withdraws=True), Cover(2, at(0), withdraws=True)])

    assert [row for row in await rows(sql) if row[0] != row[1]] == [
        (0, 5, "not started"),
        (5, 50, ""),
        (50, 60, "stopped"),
        (60, 70, ""),
        (70, None, ""),
    ]
    assert await rows(sql, 2) == [(0, None, "")]


async def test_a_gap_goes_on_over_a_restart(journal: Journal, sql: asyncpg.Connection) -> None:
    """A daemon that stopped in order said so; its start adds nothing, and an account never seen begins."""
    await journal.cover([Cover(1, at(0)), Cover(1, at(5), "stopped")])

    await journal.resume_coverage([1, 2], at(100))
    await journal.resume_coverage([1, 2], at(101))

    assert await rows(sql, 1) == [(0, 5, ""), (5, None, "stopped")]
    assert await rows(sql, 2) == [(100, None, "not started")]


async def test_observed_never_ends_after_the_start_that_ends_it(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """A clock that was set back makes no time that has not been yet."""
    await journal.cover([Cover(1, at(0))])
    await journal.heartbeat([1], at(50))

    await journal.resume_coverage([1], at(20))

    assert await rows(sql) == [(0, 20, ""), (20, None, "not started")]


async def test_a_retired_account_has_no_coverage_until_it_is_back(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """Its row closes; at its return, the time between is a gap."""
    await journal.cover([Cover(1, at(0))])
    await journal.retire([1], at(30))
    assert await rows(sql) == [(0, 30, "")]

    await journal.resume_coverage([1], at(90))
    await journal.cover([Cover(1, at(95))])

    assert await rows(sql) == [(0, 30, ""), (30, 95, "not started"), (95, None, "")]


async def test_coverage_of_an_unknown_account_is_an_error(journal: Journal) -> None:
    """Of the program, and it names the cure."""
    with pytest.raises(StoreError, match="register"):
        await journal.cover([Cover(77, at(0))])


# ── What was heard and lost ───────────────────────────────────────────────────────────────────────────


DAMAGED = "spool damaged"
JUST = timedelta(microseconds=1)
"""A message that was received at a moment was received before the one after it."""


def lasting(found: list[tuple[float, float | None, str]]) -> list[tuple[float, float | None, str]]:
    """The rows that lasted any time, to the millisecond; all of them stand end to end."""
    assert [row[0] for row in found[1:]] == [row[1] for row in found[:-1]]
    kept = [row for row in found if row[0] != row[1]]
    return [(round(a, 3), None if b is None else round(b, 3), cause) for a, b, cause in kept]


async def test_what_is_lost_is_a_gap_in_what_was_observed(journal: Journal, sql: asyncpg.Connection) -> None:
    """From the message before it to when the last of it was received, that moment included; what comes after
    is observed as before, and the next turn continues it."""
    await journal.cover([Cover(1, at(0)), Cover(2, at(0))])

    lost = await journal.lose([Missing(1, at(20), at(10))])

    assert lost == [(1, at(10), at(20) + JUST)]
    assert lasting(await rows(sql)) == [(0, 10, ""), (10, 20, DAMAGED), (20, None, "")]
    assert await rows(sql, 2) == [(0, None, "")]
    await journal.heartbeat([1], at(60))
    await journal.cover([Cover(1, at(70), "disconnected")])
    assert lasting(await rows(sql))[2:] == [(20, 70, ""), (70, None, "disconnected")]
    assert await journal.lose([Missing(1, at(20), at(10))]) == []


async def test_what_is_lost_is_looked_for_after_what_is_known_to_be_committed(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """After the last heartbeat, which vouched for all before it, or the last message that is committed; a row
    that nobody has seen yet vouches for nothing."""
    await journal.register([AccountRow("eve", "", "lab")])
    await journal.cover([Cover(account, at(0)) for account in (1, 2, 3)])
    await journal.heartbeat([1, 2], at(10))
    await journal.record([Line(2, began=at(14)).hear(b"{}")])

    await journal.lose([Missing(1, at(20)), Missing(2, at(20), at(5)), Missing(3, at(20))])

    assert lasting(await rows(sql, 1)) == [(0, 10, ""), (10, 20, DAMAGED), (20, None, "")]
    assert lasting(await rows(sql, 2)) == [(0, 15, ""), (15, 20, DAMAGED), (20, None, "")]
    assert lasting(await rows(sql, 3)) == [(0, 20, DAMAGED), (20, None, "")]
    assert await journal.lose([Missing(2, at(14))]) == [], "all that was received until then is stored"


async def test_what_is_lost_twice_and_in_several_stretches(journal: Journal, sql: asyncpg.Connection) -> None:
    """Each stretch is a gap of its own where they do not touch, over several rows too; what is a gap for
    another reason stays so."""
    await journal.cover([Cover(1, at(0)), Cover(1, at(30), "stalled"), Cover(1, at(40))])

    missing = [Missing(1, at(12), at(10)), Missing(1, at(14), at(11)), Missing(1, at(50), at(25))]
    await journal.lose([*missing, Missing(1, at(61), at(60)), Missing(77, at(5))])

    assert lasting(await rows(sql)) == [
        (0, 10, ""),
        (10, 14, DAMAGED),
        (14, 25, ""),
        (25, 30, DAMAGED),
        (30, 40, "stalled"),
        (40, 50, DAMAGED),
        (50, 60, ""),
        (60, 61, DAMAGED),
        (61, None, ""),
    ]
    before = await rows(sql)
    assert await journal.lose(missing) == []
    assert await rows(sql) == before


async def test_a_crash_after_a_loss_leaves_what_was_known(journal: Journal, sql: asyncpg.Connection) -> None:
    """What follows the gap counts as observed up to the next heartbeat, as what any gap is followed by."""
    await journal.cover([Cover(1, at(0)), Cover(2, at(0))])
    await journal.lose([Missing(1, at(20), at(10)), Missing(2, at(20), at(10))])
    await journal.heartbeat([2], at(40))

    await journal.resume_coverage([1, 2], at(100))

    assert lasting(await rows(sql, 1)) == [(0, 10, ""), (10, 20, DAMAGED), (20, None, "not started")]
    assert lasting(await rows(sql, 2)) == [
        (0, 10, ""),
        (10, 20, DAMAGED),
        (20, 40, ""),
        (40, None, "not started"),
    ]


async def test_a_loss_that_a_start_finds_is_not_withdrawn(journal: Journal, sql: asyncpg.Connection) -> None:
    """Its accounts are resumed first, so that where the session is gone all is a gap from the last heartbeat
    on; and where it goes on, everything but the loss was observed."""
    await journal.cover([Cover(1, at(0)), Cover(2, at(0))])
    await journal.heartbeat([1, 2], at(10))

    lost = await journal.lose([Missing(1, at(30), at(20))], at(100))

    assert lost == [(1, at(20), at(30) + JUST)]
    assert await rows(sql, 2) == [(0, None, "")]
    since = await journal.resume_coverage([1, 2], at(101))
    assert since == {1: at(10), 2: at(10)}
    assert await journal.damaged_since([1, 2]) == {1}
    gone = [(0, 10, ""), (10, 20, "not started"), (20, 30, DAMAGED), (30, None, "not started")]
    assert lasting(await rows(sql)) == gone
    await journal.cover([Cover(account, until, withdraws=True) for account, until in since.items()])
    assert lasting(await rows(sql)) == [(0, 10, ""), (10, 20, ""), (20, 30, DAMAGED), (30, None, "")]
    assert lasting(await rows(sql, 2)) == [(0, 10, ""), (10, None, "")]
    assert await journal.damaged_since([1, 2]) == set()
    await journal.cover([Cover(1, at(110), "stopped")])
    assert await journal.resume_coverage([1], at(120)) == {1: at(110)}


async def test_a_loss_before_a_stop_is_not_withdrawn_with_it(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """A stop that had no time to store everything: what the gap of the stop hides stays hidden."""
    await journal.cover([Cover(1, at(0)), Cover(1, at(50), "stopped")])

    await journal.lose([Missing(1, at(60), at(40))], at(100))

    assert lasting(await rows(sql)) == [
        (0, 40, ""),
        (40, 50, DAMAGED),
        (50, 60, DAMAGED),
        (60, None, "stopped"),
    ]
    assert await journal.resume_coverage([1], at(101)) == {1: at(40)}
    await journal.cover([Cover(1, at(40), withdraws=True)])
    assert lasting(await rows(sql)) == [(0, 40, ""), (40, 50, DAMAGED), (50, 60, DAMAGED), (60, None, "")]


async def test_a_loss_whose_account_nobody_knows_is_everybodys(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """Of every account that counts as observed, or did before its gap, or whose session may go on and would
    withdraw its gap; but not of those that the same loss names, and of those that are gone."""
    names = ["named", "disconnected", "retired", "stopped", "resumable"]
    ids = await journal.register([AccountRow(name, "", "lab") for name in names])
    everybody = [1, 2, *ids.values()]
    await journal.cover([Cover(account, at(0)) for account in everybody])
    await journal.heartbeat(everybody, at(10))
    turns = {"disconnected": "disconnected", "stopped": "stopped", "resumable": "stopped"}
    kept = Kept("8c2b2a2e-0000-4000-8000-000000000001", "c", True, "long-polling", None, (), "", (), ())
    saved = {ids["resumable"]: Saved(kept, at(20))}
    await journal.cover([Cover(ids[name], at(20), cause) for name, cause in turns.items()], saved)
    await journal.retire([ids["retired"]], at(20))

    await journal.lose([Missing(None, at(40)), Missing(ids["named"], at(35), at(30))], at(100))

    for account in (1, 2):
        assert lasting(await rows(sql, account)) == [
            (0, 10, ""),
            (10, 40, DAMAGED),
            (40, None, "not started"),
        ]
    assert (30, 35, DAMAGED) in lasting(await rows(sql, ids["named"]))
    assert lasting(await rows(sql, ids["disconnected"])) == [
        (0, 10, ""),
        (10, 20, DAMAGED),
        (20, None, "disconnected"),
    ]
    assert lasting(await rows(sql, ids["retired"])) == [(0, 20, "")]
    for name in ("stopped", "resumable"):
        assert lasting(await rows(sql, ids[name])) == [
            (0, 10, ""),
            (10, 20, DAMAGED),
            (20, 40, DAMAGED),
            (40, None, "stopped"),
        ]


@pytest.mark.parametrize("cause", ["disconnected", "stopped"])
async def test_a_loss_is_also_theirs_who_were_observed_then_and_are_not_now(
    journal: Journal, sql: asyncpg.Connection, cause: str
) -> None:
    """What is damaged may have been heard before a gap began that was written while the spool was drained."""
    await journal.cover([Cover(1, at(0)), Cover(2, at(0))])
    await journal.heartbeat([1, 2], at(10))
    await journal.cover([Cover(1, at(50), cause)])

    await journal.lose([Missing(None, at(40))], at(100))

    assert (10, 40, DAMAGED) in lasting(await rows(sql, 2))
    assert (10, 40, DAMAGED) in lasting(await rows(sql, 1))


async def test_a_gap_that_began_long_before_a_loss_stays(journal: Journal, sql: asyncpg.Connection) -> None:
    """An account that nobody has heard for a day when something is damaged has lost nothing of it."""
    await journal.cover([Cover(1, at(0)), Cover(2, at(0))])
    await journal.heartbeat([1, 2], at(10))
    await journal.cover([Cover(1, at(50), "disconnected")])

    await journal.lose([Missing(None, at(86_500))], at(86_600))

    assert lasting(await rows(sql, 1)) == [(0, 50, ""), (50, None, "disconnected")]
    assert (10, 86_500, DAMAGED) in lasting(await rows(sql, 2))
