"""Calls without an end in the database: which are found, what closing them writes, and what follows."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from listener.closing import Closer
from listener.core.calls import Closing, Heard, Recorded, Source
from listener.core.decode import encode_closing
from listener.core.normalise import NO_WRAP_UP_END
from listener.errors import StoreUnavailable
from listener.pipeline import Pipeline
from listener.store.embedded import Embedded
from listener.store.journal import UNSETTLED, AccountRow, Journal
from tests.core import messages
from tests.store.line import T0, Line
from tests.support.database import new_database
from tests.support.memory import until

HOURS = 24
WRAP_UP_S = 3600
MUCH_LATER = T0 + timedelta(hours=HOURS + 1)
INFERRED = "inferred: not heard of for 24 h"


class Nobody:
    """An observer who does not care."""

    def recorded(self, recorded: Recorded, seconds: float) -> None:
        """A batch was committed."""

    def store_failed(self, error: StoreUnavailable) -> None:
        """It was not."""

    def backlog(self, notifications: int, size_bytes: int) -> None:
        """So much waits."""


@asynccontextmanager
async def listening(journal: Journal) -> AsyncIterator[Pipeline]:
    """A pipeline that runs during the block."""
    pipeline = Pipeline(journal, Nobody())
    async with asyncio.TaskGroup() as tasks:
        work = tasks.create_task(pipeline.run())
        try:
            yield pipeline
        finally:
            work.cancel()


async def look(journal: Journal, at: datetime = MUCH_LATER) -> None:
    """Closes what is due at a time, the way the daemon does."""
    async with listening(journal) as pipeline:
        closer = Closer(journal, pipeline, call_hours_max=HOURS, wrap_up_s_max=WRAP_UP_S, wall=lambda: at)
        await closer.look()


def closes(account: int, *calls: int, at: datetime, source: Source = Source.LISTENER) -> Heard:
    """A closing of these calls: everything since `at` is newer."""
    raw = encode_closing(Closing(calls, "not heard of"))
    return Heard(account, str(uuid4()), 1, at, "listener/closing", raw, source, asked_at=at)


def wrapping_up(line: Line, wrap_up_time: Any, *, id: str) -> list[Heard]:
    """A call of v2 that has ended and is due for a wrap-up."""
    ringing = messages.in_data(messages.resource(id=id, connId=id), extensions={"WrapUpTime": wrap_up_time})
    return [
        line.hear(messages.encoded(messages.bayeux(ringing))),
        *line.call("Released", id=id, connId=id),
    ]


async def row(sql: asyncpg.Connection, call_id: str) -> asyncpg.Record:
    """A call by the id under which it was first heard."""
    found = await sql.fetchrow("SELECT * FROM call WHERE call_id = $1", call_id)
    assert found is not None
    return found


# ── what is found ─────────────────────────────────────────────────────────────────────────────────────


async def test_what_waits_for_an_end_is_found(journal: Journal) -> None:
    """Open calls by when they were last heard of; ended ones by when they ended and were to be wrapped up."""
    line, other = Line(1), Line(2)
    recorded = await journal.record(
        [
            *line.call("Ringing", id="open"),
            *line.call("Ringing", "Released", id="over"),
            *wrapping_up(line, 15, id="wrap-up"),
            *other.call("Ringing", "Established", id="another's"),
        ]
    )
    id_of = {step.call.call_id: step.call.id for step in recorded.steps}
    opened, ended, talked = (
        next(s.call for s in reversed(recorded.steps) if s.call.call_id == name)
        for name in ("open", "wrap-up", "another's")
    )
    assert ended.ended_at is not None
    instant, due = timedelta(microseconds=1), ended.ended_at + timedelta(seconds=15)

    async def found(silent_since: datetime, released_before: datetime, most: int = 10) -> list[str]:
        """By their names."""
        names = {id: name for name, id in id_of.items()}
        return [names[id] for _, id in await journal.unsettled(silent_since, released_before, most)]

    assert await found(T0, T0) == []
    assert await found(opened.last_heard_at, T0) == []
    assert await found(opened.last_heard_at + instant, T0) == ["open"]
    assert await found(talked.last_heard_at + instant, T0) == ["open", "another's"]
    assert await found(T0, due) == []
    assert await found(T0, due + instant) == ["wrap-up"]
    assert await found(MUCH_LATER, MUCH_LATER, 1) == ["open", "wrap-up"]


@pytest.mark.parametrize("wrap_up_time", [1e300, -1e300, -5, 0.25])
async def test_whatever_the_server_says_of_the_wrap_up_it_ends(wrap_up_time: float, journal: Journal) -> None:
    """A time that no wrap-up takes neither breaks the look-up nor keeps a call from settling for ever."""
    await journal.record(wrapping_up(Line(), wrap_up_time, id="a"))
    assert len(await journal.unsettled(T0, T0 + timedelta(days=2), 10)) == 1


async def test_looking_for_them_does_not_read_the_history(journal: Journal, sql: asyncpg.Connection) -> None:
    """With a hundred thousand calls that are over, both kinds are found through their small indexes."""
    line = Line()
    await journal.record([*line.call("Ringing", id="open"), *wrapping_up(line, 5, id="wrap-up")])
    columns = [
        r[0]
        for r in await sql.fetch(
            "SELECT attname FROM pg_attribute WHERE attrelid = 'call'::regclass AND attnum > 0"
        )
    ]
    values = ["g + 1000" if c == "id" else "'released'" if c == "settled" else c for c in columns]
    await sql.execute(
        f"INSERT INTO call ({', '.join(columns)})"  # noqa: S608 - names of ours
        f" SELECT {', '.join(values)} FROM call, generate_series(1, 100000) AS g WHERE call_id = 'wrap-up'"
    )
    await sql.execute("ANALYZE call")
    plan = "\n".join(
        r[0] for r in await sql.fetch(f"EXPLAIN ANALYZE {UNSETTLED}", MUCH_LATER, MUCH_LATER, 1000)
    )
    assert "ix_call_open" in plan, plan
    assert "ix_call_unsettled" in plan, plan
    assert "Seq Scan" not in plan, plan
    assert len(await journal.unsettled(MUCH_LATER, MUCH_LATER, 1000)) == 2


# ── what is written ───────────────────────────────────────────────────────────────────────────────────


async def test_a_call_without_an_end_is_closed_and_says_why(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """By a message of ours in the journal: no time of its end, no duration, and what it has does not move."""
    await journal.record(Line().call("Ringing", "Established", id="lost"))
    before, heard_at = await row(sql, "lost"), await sql.fetchval("SELECT heard_at FROM account WHERE id = 1")

    await look(journal)

    after = await row(sql, "lost")
    differs = {name: after[name] for name in after.keys() if after[name] != before[name]}  # noqa: SIM118 - a record is no mapping
    assert differs == {"state": "Released", "settled": INFERRED, "outcome": "answered", "anomalies": 1}
    said = await sql.fetchrow("SELECT * FROM notification WHERE source = 'listener'")
    assert said is not None
    assert (said["account_id"], said["message_type"], said["reason"], said["call_id"]) == (
        1,
        "CallsClosed",
        None,
        None,
    )
    assert json.loads(said["raw"])["closing"]["calls"] == [after["id"]]
    assert said["asked_at"] == MUCH_LATER - timedelta(hours=HOURS)
    change = await sql.fetchrow("SELECT * FROM change WHERE notification_id = $1", said["id"])
    assert change is not None
    assert (change["field"], change["before"], change["after"]) == ("state", '"Established"', '"Released"')
    odd = await sql.fetchrow("SELECT * FROM anomaly WHERE notification_id = $1", said["id"])
    assert odd is not None
    assert (odd["kind"], odd["detail"], odd["call_id"]) == ("ended_unheard", INFERRED, after["id"])
    assert await sql.fetchval("SELECT left_at FROM participant") is None
    assert await sql.fetchval("SELECT heard_at FROM account WHERE id = 1") == heard_at
    assert await journal.open_calls() == []
    await look(journal)
    assert await sql.fetchval("SELECT count(*) FROM notification WHERE source = 'listener'") == 1


async def test_calls_of_all_accounts_are_closed(journal: Journal, sql: asyncpg.Connection) -> None:
    """Also of one that is not listened to any more: nobody else would do it."""
    await journal.record(Line(1).call("Ringing", id="a") + Line(2).call("Ringing", id="b"))
    await journal.retire([2], T0 + timedelta(minutes=1))

    await look(journal, T0 + timedelta(hours=HOURS))
    assert len(await journal.open_calls()) == 2
    await look(journal)

    assert await journal.open_calls() == []
    settled = await sql.fetch("SELECT settled FROM call")
    assert [each["settled"] for each in settled] == [INFERRED] * 2


async def test_wrap_ups_that_nobody_ended_settle(journal: Journal, sql: asyncpg.Connection) -> None:
    """In both versions; with the figures that were heard, and without one that was not."""
    line = Line()
    await journal.record(
        [
            *wrapping_up(line, 15, id="v2"),
            *(line.hear(messages.encoded(messages.v3(s, id="v3"))) for s in ("Ringing", "Released")),
        ]
    )
    before = [await row(sql, name) for name in ("v2", "v3")]

    await look(journal, line.at + timedelta(seconds=WRAP_UP_S))
    assert [await row(sql, name) for name in ("v2", "v3")] == before
    await look(journal, line.at + timedelta(seconds=WRAP_UP_S + 20))

    for was in before:
        after = await row(sql, was["call_id"])
        assert dict(after) == dict(was) | {"settled": NO_WRAP_UP_END}
        assert (after["ended_at"] is None, after["wrap_s"]) == (False, None)
    assert await sql.fetchval("SELECT count(*) FROM anomaly") == 0


# ── what follows ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_call_that_was_closed_and_speaks_goes_on(journal: Journal, database: str) -> None:
    """Whoever closed it: the recorder that hears it again, or another one."""
    line = Line(began=T0)
    await journal.record(line.call("Ringing", "Established", id="a"))
    for hours, closed_by_another in ((30, False), (60, True), (90, False)):
        line.at = T0 + timedelta(hours=hours)
        if closed_by_another:
            async with await Journal.open(database) as another:
                await look(another, line.at)
        else:
            await look(journal, line.at)
        assert await journal.open_calls() == []

        (spoken,) = (await journal.record(line.call("Held", id="a"))).steps

        assert [odd.kind for odd in spoken.anomalies] == ["after_end"]
        assert (spoken.call.open, spoken.call.settled, spoken.call.talk_s) == (True, None, 0)
        assert await journal.open_calls() == [spoken.call]
        assert (await journal.record(line.call("Held", id="a"))).steps[0].anomalies == ()


async def test_what_was_heard_meanwhile_comes_first(journal: Journal) -> None:
    """A message that waited in the pipeline while we looked is in front of the closing, and is newer."""
    line = Line()
    await journal.record(line.call("Ringing", id="a"))
    line.at = MUCH_LATER - timedelta(seconds=60)
    raw = messages.message("Established", id="a", connId="conn-a")
    late = Heard(1, line.stream, 2, MUCH_LATER - timedelta(seconds=59), messages.CHANNEL, raw)
    pipeline = Pipeline(journal, Nobody())
    closer = Closer(journal, pipeline, call_hours_max=HOURS, wrap_up_s_max=WRAP_UP_S, wall=lambda: MUCH_LATER)
    await pipeline.hear([late], lambda: None)
    async with asyncio.TaskGroup() as tasks:
        looking = tasks.create_task(closer.look())
        await until(lambda: pipeline.backlog_notifications == 2)
        writing = tasks.create_task(pipeline.run())
        await looking
        writing.cancel()

    (call,) = await journal.open_calls()
    assert call.state == "Established"


async def test_only_we_close_calls(journal: Journal, sql: asyncpg.Connection) -> None:
    """The same bytes from a contact centre close nothing; they are kept, as about something else."""
    (step,) = (await journal.record(Line().call("Ringing"))).steps
    forged = closes(1, step.call.id, at=MUCH_LATER, source=Source.COMETD)

    recorded = await journal.record([forged])

    assert recorded.steps == ()
    assert await journal.open_calls() == [step.call]
    said = await sql.fetchrow("SELECT message_type, reason FROM notification WHERE raw = $1", forged.raw)
    assert said is not None
    assert tuple(said) == ("CallsClosed", None)


async def test_a_closing_reaches_its_own_account_only(journal: Journal) -> None:
    """Also where it names a call of another one, or one that is not there."""
    (step,) = (await journal.record(Line(1).call("Ringing"))).steps

    assert (await journal.record([closes(2, step.call.id, 999, at=MUCH_LATER)])).steps == ()

    assert await journal.open_calls() == [step.call]


async def test_closings_do_not_depend_on_batches_either(postgres: Embedded, template: str) -> None:
    """One by one, by twos, or all at once: the same calls, whether they are remembered or read."""
    line = Line()
    entries = [*line.call("Ringing", "Established", id="a"), *wrapping_up(line, 15, id="b")]
    entries += [closes(1, 1, 3, at=line.at + timedelta(hours=30))]
    line.at += timedelta(hours=31)
    entries += [*line.call("Held", id="a"), closes(1, 1, 3, at=line.at + timedelta(hours=60))]

    async def written(size: int, *, reopened: bool) -> list[Any]:
        async with new_database(postgres, template) as dsn:
            journal = await Journal.open(dsn)
            await journal.register([AccountRow("ada", "", "lab")])
            for start in range(0, len(entries), size):
                await journal.record(entries[start : start + size])
                if reopened:
                    await journal.close()
                    journal = await Journal.open(dsn)
            await journal.close()
            sql = await asyncpg.connect(dsn)
            try:
                # By position: ids need not be without holes.
                return [
                    [dict(r) for r in await sql.fetch(f"SELECT {what}")]
                    for what in (
                        "to_jsonb(c) - 'id' AS call FROM call c ORDER BY call_id",
                        "field, key, before::text, after::text FROM change ORDER BY call_id, at, ordinal",
                        "kind, detail FROM anomaly ORDER BY notification_id, ordinal",
                    )
                ]
            finally:
                await sql.close()

    whole = await written(len(entries), reopened=False)
    settled = [json.loads(each["call"])["settled"] for each in whole[0]]
    assert settled == ["inferred: not heard of", NO_WRAP_UP_END]
    assert await written(1, reopened=False) == whole
    assert await written(1, reopened=True) == whole
    assert await written(2, reopened=False) == whole
