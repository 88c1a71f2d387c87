"""A poisoned notification never blocks the batch: whatever it is made of, it is stored, and so is the rest.

Each poison stands in the middle of two hundred ordinary messages, which must not notice. Most of it hides
nothing: the call is there all the same, and an oddity says what was replaced or left out. What cannot be read
at all is kept raw, with the reason. The bounds of time are generous, since test machines are slow; what is
meant is that no poison costs more than it has bytes.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence

import asyncpg
import pytest

from listener.core.calls import Anomaly, Heard, Notification, Recorded, Unrecognised
from listener.core.decode import NAME_BYTES_MAX, PARTICIPANTS_MAX, USER_DATA_KEYS_MAX, decode
from listener.errors import StoreError, StoreUnavailable
from listener.metrics import Metrics
from listener.pipeline import Pipeline
from listener.store.journal import PIECE_MAX, Journal
from tests.core import messages
from tests.store.line import T0, Line

LIFE = ("Ringing", "Established", "Held", "Established", "Released")
POISON_S_MAX = 15.0
"""A batch with the worst poison takes a second on a machine that has nothing else to do."""

MEGABYTES = 10


def noise(length: int, seed: int = 1) -> str:
    """Text that does not become shorter when it is compressed: that would make room in an index."""
    return "".join(random.Random(seed).choices("0123456789abcdefghijklmnopqrstuvwxyz", k=length))


def ringing(**fields: object) -> bytes:
    """The first message of the poisoned call."""
    made: messages.JsonObject = {"id": "poisoned"} | fields
    return messages.message("Ringing", **made)


def with_bytes(value: bytes, **fields: object) -> bytes:
    """The same, with these bytes for every "@"."""
    return ringing(**fields).replace(b'"@"', value)


VISIBLE: dict[str, Callable[[], bytes]] = {
    "NUL": lambda: with_bytes(b'"a\x00b"', ani="@"),
    "NUL in userData": lambda: with_bytes(b'"a\x00b"', userData={"@": "@"}),
    "escaped NUL": lambda: ringing(ani="7\x00", userData={"k\x00": "a\x00b"}),
    "NUL in the id": lambda: ringing(id="poisoned\x00"),
    "lone surrogates": lambda: ringing(dnis="\ud800", userData={"\udc00": "\ud800"}),
    "numbers out of range": lambda: with_bytes(b"1e999", userData={"k": "@"}, duration="@"),
    "an integer of 400 digits": lambda: ringing(userData={"k": 10**400}),
    "an id of 100 kB": lambda: ringing(id=noise(100_000)),
    "every id of 100 kB": lambda: ringing(
        **{name: noise(100_000, seed) for seed, name in enumerate(("id", "callUuid", "connId"))}
    ),
    "numbers of 100 kB": lambda: ringing(
        dnis=noise(100_000), ani=noise(100_000, 2), numbers=(noise(100_000, 3), "+" + noise(100_000, 4))
    ),
    "65,536 participants": lambda: ringing(numbers=[str(number) for number in range(65_536)]),
    "a participant 65,536 times": lambda: ringing(numbers=["7023"] * 65_536),
    "100,000 capabilities": lambda: ringing(capabilities=[str(number) for number in range(100_000)]),
    "100,000 userData keys": lambda: ringing(userData={f"k{number}": "v" for number in range(100_000)}),
    "a userData key 100,000 times": lambda: with_bytes(
        b"{%b}" % b",".join([b'"k":"v"'] * 100_000), userData="@"
    ),
    "100,000 poisoned keys": lambda: ringing(userData={f"k\x00{number}": "v" for number in range(100_000)}),
}
"""Poison that hides nothing: the call is there, and one oddity at least says so."""

PLAIN: dict[str, Callable[[], bytes]] = {
    "10 MB of userData": lambda: ringing(userData={"k": noise(MEGABYTES * 1_000_000)}),
    "a userData key of 1 MB": lambda: ringing(userData={noise(1_000_000): "v"}),
}
"""Much, and nothing else: stored as it is."""

UNREADABLE: dict[str, Callable[[], bytes]] = {
    "objects 10,000 deep": lambda: with_bytes(b'{"a":' * 10_000 + b"1" + b"}" * 10_000, userData="@"),
    "lists 10,000 deep": lambda: with_bytes(b"[" * 10_000 + b"]" * 10_000, userData="@"),
    "10 MB of nothing": lambda: b"\x00" * (MEGABYTES * 1_000_000),
    "10 MB of brackets": lambda: b"[" * (MEGABYTES * 1_000_000),
    "half a message": lambda: ringing()[:-20],
}
"""Kept raw."""

POISON = VISIBLE | PLAIN | UNREADABLE


def ordinary(line: Line, name: str) -> list[Heard]:
    """A hundred messages of twenty calls."""
    return [entry for number in range(20) for entry in line.call(*LIFE, id=f"{name} {number}")]


async def assert_as_ever(sql: asyncpg.Connection, *names: str) -> None:
    """These calls of `ordinary` are whole, with their figures."""
    for name in names:
        rows = await sql.fetch(
            "SELECT state, outcome, settled, notifications, talk_s, hold_s, anomalies FROM call"
            " WHERE call_id LIKE $1",
            f"{name} %",
        )
        assert [tuple(row) for row in rows] == [("Released", "answered", "released", 5, 2.0, 1.0, 0)] * 20


async def reasons(sql: asyncpg.Connection) -> list[str]:
    """Why messages were kept raw only."""
    return [row[0] for row in await sql.fetch("SELECT reason FROM notification WHERE reason IS NOT NULL")]


@pytest.mark.parametrize("name", POISON)
async def test_poison_is_stored_and_the_batch_with_it(
    name: str, journal: Journal, sql: asyncpg.Connection
) -> None:
    """With its exact bytes, marked, counted, once, and in bounded time; the batch after it goes on."""
    raw, line, metrics = POISON[name](), Line(), Metrics()
    before = ordinary(line, "before")
    began = time.perf_counter()
    entry = line.hear(raw)
    entries = [*before, entry, *ordinary(line, "after")]
    recorded = await journal.record(entries)
    assert time.perf_counter() - began < POISON_S_MAX
    metrics.recorded(recorded, 0.1, T0)

    assert [each.heard for each in recorded.entries] == entries
    positions = await sql.fetch("SELECT position FROM notification ORDER BY id")
    assert [row[0] for row in positions] == list(range(1, 202))
    assert await sql.fetchval("SELECT raw = $1 FROM notification WHERE position = 101", raw)
    poisoned = await sql.fetchval("SELECT count(*) FROM anomaly WHERE kind = 'poisoned'")
    if name in UNREADABLE:
        assert len(await reasons(sql)) == 1
        assert "listener_unrecognised_total 1.0" in metrics.text()
    else:
        assert await reasons(sql) == []
        assert await sql.fetchval("SELECT count(*) FROM call WHERE state = 'Ringing'") == 1
        odd = await sql.fetchval("SELECT count(*) FROM anomaly")
        assert (odd > 0) is (name in VISIBLE)
        assert f'listener_anomalies_total{{kind="poisoned"}} {poisoned}.0' in metrics.text()
    await assert_as_ever(sql, "before", "after")

    assert (await journal.record(entries)).duplicates == 201
    await journal.record(ordinary(line, "next"))
    await assert_as_ever(sql, "next")


@pytest.mark.parametrize("name", VISIBLE | PLAIN)
async def test_a_poisoned_call_goes_on(name: str, journal: Journal, sql: asyncpg.Connection) -> None:
    """Its next messages find it, whatever its ids look like: it is one call, which ends."""
    raw = POISON[name]()
    line = Line()
    await journal.record([line.hear(raw)])

    ended = await journal.record([line.hear(raw.replace(b'"Ringing"', b'"Released"', 1))])

    assert [step.ended for step in ended.steps] == [True]
    rows = await sql.fetch("SELECT state, notifications FROM call")
    assert [tuple(row) for row in rows] == [("Released", 2)]


async def test_what_is_left_out_is_bounded(journal: Journal, sql: asyncpg.Connection) -> None:
    """A message becomes no more rows, and none longer, than the bounds say."""
    line = Line()
    await journal.record(
        [line.hear(POISON[name]()) for name in ("65,536 participants", "100,000 userData keys")]
    )
    assert await sql.fetchval("SELECT count(*) FROM participant") <= PARTICIPANTS_MAX + 1
    assert await sql.fetchval("SELECT count(*) FROM change") <= 2 * PARTICIPANTS_MAX + USER_DATA_KEYS_MAX
    await journal.record([line.hear(POISON[name]()) for name in ("every id of 100 kB", "numbers of 100 kB")])
    longest = await sql.fetchval(
        "SELECT max(octet_length(text)) FROM (SELECT alias FROM call_alias UNION ALL SELECT number FROM call"
        " UNION ALL SELECT dnis FROM call UNION ALL SELECT number FROM participant) AS t (text)"
    )
    assert longest <= NAME_BYTES_MAX


# ── what only PostgreSQL knows to be poison ───────────────────────────────────────────────────────────


async def with_an_index(sql: asyncpg.Connection) -> None:
    """From now on PostgreSQL refuses some values of a field that it takes as it is otherwise."""
    await sql.execute("CREATE INDEX ON call (mute)")


def refused(line: Line, number: int) -> Heard:
    """A message with such a value."""
    return line.hear(messages.message("Ringing", id=f"refused {number}", mute=noise(9_000, number)))


async def test_what_postgresql_refuses_is_kept_raw(journal: Journal, sql: asyncpg.Connection) -> None:
    """Alone, and with PostgreSQL's own words for the reason."""
    await with_an_index(sql)
    line, metrics = Line(), Metrics()
    entries = [*ordinary(line, "before"), refused(line, 1), *ordinary(line, "after")]

    recorded = await journal.record(entries)
    metrics.recorded(recorded, 0.1, T0)

    assert isinstance(recorded.entries[100].other, Unrecognised)
    (reason,) = await reasons(sql)
    assert reason.startswith("poisoned: index row ")
    await assert_as_ever(sql, "before", "after")
    ids = [row[0] for row in await sql.fetch("SELECT id FROM notification ORDER BY position")]
    assert ids == sorted(ids)
    assert len(ids) == 201
    assert "listener_unrecognised_total 1.0" in metrics.text()
    assert (await journal.record(entries)).duplicates == 201
    await journal.record(ordinary(line, "next"))
    await assert_as_ever(sql, "next")


async def test_a_channel_that_cannot_be_stored_loses_nothing(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """The message is kept with its bytes, under the channel as far as it can be written."""
    line = Line()
    entries = [
        *line.call("Ringing", id="before"),
        line.hear(messages.message("Ringing", id="x"), channel="/v2/\x00\ud800"),
        *line.call("Ringing", id="after"),
    ]
    await journal.record(entries)
    channels = [row[0] for row in await sql.fetch("SELECT channel FROM notification ORDER BY position")]
    assert channels == [messages.CHANNEL, "/v2/\ufffd?", messages.CHANNEL]
    assert len(await reasons(sql)) == 1


async def test_a_batch_of_nothing_but_poison_ends(journal: Journal, sql: asyncpg.Connection) -> None:
    """In order, and each message once."""
    await with_an_index(sql)
    line = Line()
    entries = [refused(line, number) for number in range(PIECE_MAX + 20)]

    recorded = await journal.record(entries)

    assert [each.heard for each in recorded.entries] == entries
    assert len(await reasons(sql)) == len(entries)
    assert (await journal.record(entries)).duplicates == len(entries)
    positions = await sql.fetch("SELECT position FROM notification ORDER BY id")
    assert [row[0] for row in positions] == list(range(1, len(entries) + 1))


async def test_poison_is_written_in_pieces(journal: Journal, sql: asyncpg.Connection) -> None:
    """Each a transaction that is short enough to be committed. What fails in the middle leaves a beginning,
    which is not stored again when the batch is handed in again."""
    await with_an_index(sql)
    await sql.execute(
        "CREATE FUNCTION broken() RETURNS trigger LANGUAGE plpgsql AS $$"
        " BEGIN RAISE EXCEPTION 'broken' USING ERRCODE = '23514'; END $$;"
        # When the transaction ends: the attempt on the whole batch must fail for its poison.
        " CREATE CONSTRAINT TRIGGER broken AFTER INSERT OR UPDATE ON stream DEFERRABLE INITIALLY DEFERRED"
        f" FOR EACH ROW WHEN (NEW.position > {PIECE_MAX}) EXECUTE FUNCTION broken()"
    )
    line = Line()
    entries = [refused(line, 1), *(entry for part in "abcdef" for entry in ordinary(line, part))]

    with pytest.raises(StoreError):
        await journal.record(entries)

    assert await sql.fetchval("SELECT count(*) FROM notification") == PIECE_MAX
    await sql.execute("DROP TRIGGER broken ON stream")
    assert (await journal.record(entries)).duplicates == PIECE_MAX
    assert len(await reasons(sql)) == 1
    await assert_as_ever(sql, *"abcdef")


# ── through the pipeline ──────────────────────────────────────────────────────────────────────────────


class Eyes:
    """What the pipeline tells, as the daemon hears it."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.failures: list[StoreUnavailable] = []

    def recorded(self, recorded: Recorded, seconds: float) -> None:
        """A batch was committed."""
        self.metrics.recorded(recorded, seconds, T0)

    def store_failed(self, error: StoreUnavailable) -> None:
        """It was not."""
        self.failures.append(error)

    def backlog(self, notifications: int, size_bytes: int) -> None:
        """So much waits."""


async def through_the_pipeline(journal: Journal, eyes: Eyes, heard: Sequence[Heard]) -> None:
    """Hears each message as a delivery of its own, and waits until all are acknowledged."""
    pipeline = Pipeline(journal, eyes)
    acknowledged: list[int] = []
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        work = tasks.create_task(pipeline.run())
        for number, one in enumerate(heard):
            await pipeline.hear([one], lambda number=number: acknowledged.append(number))  # type: ignore[misc]
        await pipeline.drain()
        work.cancel()
    assert acknowledged == list(range(len(heard)))


async def test_poison_goes_through_the_pipeline(journal: Journal, sql: asyncpg.Connection) -> None:
    """All of it, one after the other, among ordinary messages: everything is acknowledged, in order."""
    await with_an_index(sql)
    line, eyes = Line(), Eyes()
    entries: list[Heard] = []
    for place, make in enumerate(POISON.values()):
        entries += ordinary(line, f"a{place}")
        entries.append(line.hear(make()))
    entries += [refused(line, 1), *ordinary(line, "last")]

    await through_the_pipeline(journal, eyes, entries)

    assert eyes.failures == []
    assert await sql.fetchval("SELECT count(*) FROM notification") == len(entries)
    await assert_as_ever(sql, *(f"a{place}" for place in range(len(POISON))), "last")
    assert len(await reasons(sql)) == len(UNREADABLE) + 1
    assert f"listener_unrecognised_total {len(UNREADABLE) + 1}.0" in eyes.metrics.text()
    odd = decode(entries[100].raw, entries[100].channel)
    assert isinstance(odd, Notification)
    assert Anomaly("poisoned", "control characters inside a text") in odd.oddities
