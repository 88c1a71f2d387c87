"""The journal's promises: effect once, raw first, all or nothing, and nothing refused."""

import asyncio
import contextlib
import json
import random
import re
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from msgspec import structs

from listener.core.calls import Aside, Call, Heard, Outcome, Recorded, Unrecognised, noted
from listener.core.decode import decode
from listener.errors import SchemaOutdated, StoreError, StoreUnavailable
from listener.store import batch, rows
from listener.store.embedded import Embedded
from listener.store.journal import IDS_AHEAD, AccountRow, Journal
from tests.core import messages
from tests.store.line import T0, Line
from tests.support.database import new_database

LIFE = ("Ringing", "Established", "Held", "Established", "Released")

TABLES = ("notification", "call", "call_alias", "participant", "change", "anomaly", "stream")


async def counts(sql: asyncpg.Connection) -> dict[str, int]:
    """How many rows each table has."""
    return {name: await sql.fetchval(f"SELECT count(*) FROM {name}") for name in TABLES}  # noqa: S608 - names of ours


async def contents(sql: asyncpg.Connection, *tables: str) -> dict[str, Any]:
    """Everything that is in these tables, in an order that does not depend on how it was written."""
    return {
        name: sorted(str(dict(row)) for row in await sql.fetch(f"SELECT * FROM {name}"))  # noqa: S608
        for name in tables or TABLES
    }


def renumbered(found: dict[str, Any]) -> dict[str, Any]:
    """The same contents with the ids of messages and calls as 1, 2, 3…, since some ids are left out."""
    named = re.compile(r"'((?:notification_|call_)?id)': (\d+)")
    ids = {int(number) for rows in found.values() for row in rows for _, number in named.findall(row)}
    ranks = {str(id): rank for rank, id in enumerate(sorted(ids), start=1)}
    return {
        name: sorted(named.sub(lambda hit: f"'{hit[1]}': {ranks[hit[2]]}", row) for row in rows)
        for name, rows in found.items()
    }


async def stored(journal: Journal, *accounts: int) -> list[Call]:
    """The open calls as a restart would read them."""
    return await journal.open_calls(accounts or (1, 2))


async def until_somebody_waits(sql: asyncpg.Connection) -> None:
    """Until a statement of the journal waits for a lock; the test's own time-out is the bound."""
    while not await sql.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
        pass


@pytest.mark.parametrize(
    "name", ["POSITIONS", "NAMED", "CALLS", "OPEN_CALLS", "WRITE", "WRITE_AS_EXPECTED", "WRITE_AT_ONCE"]
)
async def test_every_answer_has_a_column(sql: asyncpg.Connection, name: str) -> None:
    """No statement answers rows without columns, past whose end asyncpg 0.32 writes when it frees them."""
    prepared = await sql.prepare(getattr(rows, name))

    assert prepared.get_attributes() != ()


# ── what is written ───────────────────────────────────────────────────────────────────────────────────


async def test_a_batch_is_stored_with_all_that_follows_from_it(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """A whole call leaves its messages, one row of its own, its participant, ids and changes."""
    entries = Line().call(*LIFE)

    recorded = await journal.record(entries)

    assert recorded.entries == tuple(noted(each, decode(each.raw, each.channel)) for each in entries)
    assert recorded.duplicates == 0
    assert [step.call.state for step in recorded.steps] == list(LIFE)
    row = await sql.fetchrow("SELECT * FROM call")
    assert row is not None
    assert row["state"] == "Released"
    assert row["outcome"] == "answered"
    assert row["notifications"] == 5
    assert row["hold_count"] == 1
    assert row["talk_s"] == 2.0
    assert row["number"] == messages.NUMBER
    assert row["id"] == await sql.fetchval("SELECT min(id) FROM notification")
    assert json.loads(row["participants"])[0]["number"] == messages.NUMBER
    aliases = {row["alias"] for row in await sql.fetch("SELECT alias FROM call_alias")}
    assert aliases == {messages.UUID, f"conn-{messages.UUID}"}
    party = await sql.fetchrow("SELECT * FROM participant")
    assert party is not None
    assert (party["number"], party["joined_at"], party["left_at"]) == (
        messages.NUMBER,
        entries[0].received_at,
        entries[-1].received_at,
    )
    states = await sql.fetch(
        "SELECT before #>> '{}' AS before, after #>> '{}' AS after FROM change WHERE field = 'state'"
        " ORDER BY notification_id"
    )
    assert [tuple(row) for row in states] == list(zip((None, *LIFE), LIFE, strict=False))
    notifications = await sql.fetch("SELECT * FROM notification ORDER BY id")
    assert [bytes(row["raw"]) for row in notifications] == [entry.raw for entry in entries]
    assert {row["call_id"] for row in notifications} == {
        row["id"] for row in await sql.fetch("SELECT id FROM call")
    }
    assert [row["position"] for row in notifications] == [1, 2, 3, 4, 5]
    assert {str(row["stream_id"]) for row in notifications} == {entries[0].stream}


async def test_a_call_read_back_equals_the_one_that_was_written(journal: Journal, database: str) -> None:
    """No field is lost or changed on its way through the database, and numbers keep their spelling."""
    data = {"b": 1e22, "a": {"nested": [1, 1.0, None, True]}, "ünï": "☎", "long": "x" * 3000}
    line = Line()
    entries = line.call("Ringing", "Established", userData=data)
    entries.append(
        line.hear(
            messages.message(
                "Established",
                "ParticipantsUpdated",
                connId=f"conn-{messages.UUID}",
                numbers=("+19165550104", "7023"),
                recordingState="Recording",
                supervisorListeningIn=True,
                server_ms=1_772_442_000_123,
            )
        )
    )
    recorded = await journal.record(entries)

    async with await Journal.open(database) as another:
        assert await another.open_calls([1]) == [recorded.steps[-1].call]


async def test_the_result_does_not_depend_on_how_messages_are_cut_into_batches(
    postgres: Embedded, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one, all at once, and in random batches, through one journal or a reopened one, give the same
    rows."""
    dice = random.Random(5)
    lines = [Line(1), Line(2)]
    entries: list[Heard] = []
    for number in range(12):
        line = lines[number % 2]
        entries += line.call(
            *LIFE[: dice.randint(1, 5)], id=f"call-{number}", userData={"z": number, "a": "1"}
        )
    entries.append(lines[0].snapshot(messages.resource("Held", id="call-2"), messages.resource(id="new")))
    entries += lines[0].call("Established", "Released", id="new")

    async def written(sizes: Sequence[int], *, reopen: bool = False) -> dict[str, Any]:
        async with new_database(postgres, template) as dsn:
            left = list(entries)
            journal = await Journal.open(dsn, connections=1)
            await journal.register([AccountRow("ada", "", "lab"), AccountRow("bob", "", "lab")])
            for size in sizes:
                await journal.record(left[:size])
                del left[:size]
                if reopen:
                    await journal.close()
                    journal = await Journal.open(dsn, connections=1)
            await journal.close()
            assert not left
            connection = await asyncpg.connect(dsn)
            try:
                return renumbered(await contents(connection))
            finally:
                await connection.close()

    whole = await written([len(entries)])
    assert await written([1] * len(entries)) == whole
    assert await written([1] * len(entries), reopen=True) == whole
    assert await written([7, 1, 11, len(entries) - 19]) == whole
    monkeypatch.setattr(batch, "AT_ONCE_MAX", 0)
    assert await written([1] * len(entries)) == whole


async def test_several_calls_of_one_snapshot_have_ids_of_their_own(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """A snapshot reserves an id for itself and one for each of its calls, and the next message follows."""
    line = Line()
    calls = [messages.resource("Established", id=f"call-{n}", connId=f"conn-{n}") for n in range(3)]
    snapshot = line.snapshot(*calls)
    await journal.record([snapshot, *line.call("Ringing", id="later")])

    ids = [row["id"] for row in await sql.fetch("SELECT id FROM call ORDER BY id")]
    numbers = [row["id"] for row in await sql.fetch("SELECT id FROM notification ORDER BY id")]
    assert ids == [numbers[0] + 1, numbers[0] + 2, numbers[0] + 3, numbers[0] + 4]
    assert numbers[1] == ids[-1]
    row = await sql.fetchrow("SELECT * FROM notification WHERE source = 'snapshot'")
    assert row is not None
    assert (row["message_type"], row["call_id"], row["asked_at"]) == (
        "Snapshot",
        None,
        snapshot.asked_at,
    )


async def test_a_snapshot_ends_the_calls_that_it_does_not_list(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """The open calls of its account are loaded, though the snapshot names none of them."""
    line, other = Line(1), Line(2)
    await journal.record(line.call("Established", id="gone") + other.call("Established", id="untouched"))

    recorded = await journal.record([line.snapshot()])

    assert [step.call.call_id for step in recorded.steps] == ["gone"]
    assert await sql.fetchval("SELECT settled FROM call WHERE call_id = 'gone'") == (
        "inferred: no longer among the live calls"
    )
    assert [call.call_id for call in await stored(journal)] == ["untouched"]


async def test_a_late_correction_is_stored(journal: Journal, sql: asyncpg.Connection) -> None:
    """Fields that are known from the first message as a rule are updated too when they change after it."""
    line = Line()
    await journal.record(line.call("Ringing", ani=messages.ABSENT))

    await journal.record(
        line.call("Established", ani="+15550100", deviceUri="/devices/other", callUuid="another-uuid")
    )

    row = await sql.fetchrow("SELECT ani, device_id, call_uuid, aliases FROM call")
    assert row is not None
    assert tuple(row) == (
        "+15550100",
        "other",
        "another-uuid",
        [messages.UUID, f"conn-{messages.UUID}", "another-uuid"],
    )
    assert await sql.fetchval("SELECT count(*) FROM call_alias WHERE alias = 'another-uuid'") == 1


async def test_participants_come_and_go_across_batches(journal: Journal, sql: asyncpg.Connection) -> None:
    """A stay is one row, which learns its end later."""
    line = Line()
    await journal.record(line.call("Established", numbers=("7023",)))
    await journal.record(line.call("Established", numbers=("7023", "7044")))
    await journal.record(line.call("Established", numbers=("7044",)))

    rows = await sql.fetch("SELECT ordinal, number, left_at FROM participant ORDER BY ordinal")
    assert [tuple(row) for row in rows] == [(0, "7023", line.at), (1, "7044", None)]


# ── effect once ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_redelivery_changes_nothing_and_is_counted(journal: Journal, sql: asyncpg.Connection) -> None:
    """The same places again, in a batch of their own, are duplicates."""
    entries = Line().call(*LIFE)
    await journal.record(entries)
    before = await contents(sql)

    again = await journal.record(entries)

    assert again == Recorded((), (), 5)
    assert await contents(sql) == before


async def test_a_redelivery_within_one_batch_counts_once(journal: Journal, sql: asyncpg.Connection) -> None:
    """The server sent a message twice before anything was committed."""
    entries = Line().call("Ringing", "Established")

    recorded = await journal.record([entries[0], entries[0], entries[1], entries[0], entries[1]])

    assert recorded.entries == tuple(noted(each, decode(each.raw, each.channel)) for each in entries)
    assert recorded.duplicates == 3
    assert (await counts(sql))["notification"] == 2


@pytest.mark.parametrize("at_once_max", [0, 100])
async def test_a_redelivery_within_a_batch_of_what_is_known_counts_once(
    journal: Journal, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, at_once_max: int
) -> None:
    """Also where such a batch would be folded before the database is asked; the next one is, and its last
    message is the mark."""
    monkeypatch.setattr(batch, "AT_ONCE_MAX", at_once_max)
    line = Line()
    await journal.record(line.call("Ringing"))
    entries = line.call("Established", "Held", "Released")

    recorded = await journal.record([entries[0], entries[0], entries[1], entries[0], entries[2]])

    assert (len(recorded.entries), recorded.duplicates) == (3, 2)
    assert await sql.fetchval("SELECT notifications FROM call") == 4
    assert await sql.fetchval("SELECT position FROM stream") == 4
    await journal.record(line.call("Ringing", "Established", "Held", id="next"))
    assert await sql.fetchval("SELECT position FROM stream") == 7


async def test_a_redelivery_after_a_restart_is_recognised(
    journal: Journal, database: str, sql: asyncpg.Connection
) -> None:
    """The mark of a stream is in the database, not in the process; what is new beside it is taken."""
    line = Line()
    entries = line.call("Ringing", "Established")
    await journal.record(entries)

    async with await Journal.open(database) as another:
        recorded = await another.record([*entries, *line.call("Released")])

    assert len(recorded.entries) == 1
    assert recorded.duplicates == 2
    assert await sql.fetchval("SELECT notifications FROM call") == 3


async def test_equal_messages_at_different_places_are_two_facts(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """Equality of content proves nothing: the same DtmfSent may happen twice."""
    line = Line()
    raw = messages.message("Established", "DtmfSent")

    recorded = await journal.record([line.hear(raw), line.hear(raw)])

    assert recorded.duplicates == 0
    assert await sql.fetchval("SELECT notifications FROM call") == 2


async def test_replaying_everything_adds_nothing(journal: Journal, sql: asyncpg.Connection) -> None:
    """A whole day handed in again, in other batches and the order of the streams kept, is no change."""
    lines = [Line(1), Line(2), Line(1)]
    entries = [
        entry for n, line in enumerate(lines) for entry in line.call(*LIFE, id=f"call-{n}", userData={"n": n})
    ]
    entries.append(lines[0].snapshot(messages.resource("Ringing", id="live")))
    for start in range(0, len(entries), 4):
        await journal.record(entries[start : start + 4])
    before = await contents(sql)

    for start in range(0, len(entries), 7):
        recorded = await journal.record(entries[start : start + 7])
        assert recorded.entries == ()

    assert await contents(sql) == before


async def test_an_id_that_comes_back_opens_another_call(journal: Journal, sql: asyncpg.Connection) -> None:
    """After its end, the same id rings again: two calls, and the id names the newer one from then on."""
    line = Line()
    await journal.record(line.call("Ringing", "Established", "Released"))
    await journal.record(line.call("Ringing"))
    recorded = await journal.record(line.call("Established"))

    calls = await sql.fetch("SELECT id, state, notifications FROM call ORDER BY id")
    assert [tuple(row)[1:] for row in calls] == [("Released", 3), ("Established", 2)]
    assert recorded.steps[0].call.id == calls[1]["id"]
    assert {row["call_id"] for row in await sql.fetch("SELECT call_id FROM call_alias")} == {calls[1]["id"]}


async def test_a_call_is_found_by_any_of_its_ids(journal: Journal, sql: asyncpg.Connection) -> None:
    """The message that calls it by its connId, in a later batch, is about the same call."""
    line = Line()
    await journal.record(line.call("Ringing"))
    await journal.record(
        [line.hear(messages.message("Established", id=f"conn-{messages.UUID}", callUuid=messages.UUID))]
    )

    assert await sql.fetchval("SELECT notifications FROM call") == 2


async def test_the_same_id_at_two_accounts_is_two_calls(journal: Journal, sql: asyncpg.Connection) -> None:
    """Both legs of an internal call carry one callUuid; each account has its own view."""
    await journal.record(Line(1).call("Dialing", "Established") + Line(2).call("Ringing", "Established"))

    rows = await sql.fetch("SELECT account_id, direction FROM call ORDER BY account_id")
    assert [tuple(row) for row in rows] == [(1, "outbound"), (2, "inbound")]


# ── raw first, nothing refused ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "raw",
    [b"", b"\x00\xff\xfe{", b"{'messageType': 1}", b'{"a": "\xed\xa0\x80"}', b"[1]", b"{" * 5000],
    ids=["empty", "bytes", "quotes", "surrogate", "list", "deep"],
)
async def test_what_is_not_understood_is_kept_byte_for_byte(
    raw: bytes, journal: Journal, sql: asyncpg.Connection
) -> None:
    """Raw, with the reason; and it counts as heard."""
    entry = Line().hear(raw)
    decoded = decode(raw, entry.channel)
    assert isinstance(decoded, Unrecognised)

    recorded = await journal.record([entry])

    assert len(recorded.entries) == 1
    row = await sql.fetchrow("SELECT raw, reason, call_id FROM notification")
    assert row is not None
    assert (bytes(row["raw"]), row["reason"], row["call_id"]) == (raw, decoded.reason, None)


async def test_messages_about_other_things_are_kept(journal: Journal, sql: asyncpg.Connection) -> None:
    """A device's message concerns no call, and is in the journal with its types and channel."""
    raw = messages.encoded(messages.ASIDES["DeviceStateChangeMessage"])
    entry = Line().hear(raw, channel="/v2/me/devices")
    assert isinstance(decode(raw, entry.channel), Aside)

    await journal.record([entry])

    row = await sql.fetchrow("SELECT raw, reason, channel, message_type FROM notification")
    assert row is not None
    assert tuple(row) == (raw, None, "/v2/me/devices", "DeviceStateChangeMessage")


async def test_duplicate_keys_survive_in_the_raw_message(journal: Journal, sql: asyncpg.Connection) -> None:
    """What a parser would drop is still there to be read again."""
    raw = messages.message("Ringing").replace(b'"state"', b'"state":"Held","state"', 1)

    await journal.record([Line().hear(raw)])

    assert bytes(await sql.fetchval("SELECT raw FROM notification")) == raw


@pytest.mark.parametrize(
    "poison",
    [
        messages.message("Ringing", userData={"k\x00": "a\x00b"}),
        messages.message("Ringing", userData={"k": "\ud800"}),
        messages.message("Ringing", id="a\x00b"),
        messages.message("Ringing", id="x" * 9000),
        messages.message("Ringing", numbers=("9" * 9000,)),
        messages.message("Ringing", userData={"k": 10**400}),
        messages.message("Ringing", ani="7\x00"),
    ],
    ids=["nul", "surrogate", "nul id", "long id", "long number", "huge integer", "nul field"],
)
async def test_no_value_can_keep_the_batch_from_being_stored(
    poison: bytes, journal: Journal, sql: asyncpg.Connection
) -> None:
    """The message with the value is stored with its bytes, and those around it as ever."""
    line = Line()
    before, after = line.call("Ringing", id="before"), []
    entry = line.hear(poison)
    after = line.call("Ringing", id="after")

    recorded = await journal.record([*before, entry, *after])

    assert len(recorded.entries) == 3
    assert await sql.fetchval("SELECT count(*) FROM notification WHERE raw = $1", poison) == 1
    assert {"before", "after"} <= {row["call_id"] for row in await sql.fetch("SELECT call_id FROM call")}
    assert (await journal.record([entry])).duplicates == 1


async def test_anomalies_are_stored_with_their_call_or_without(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """An unknown state belongs to its call."""
    recorded = await journal.record(Line().call("Ringing", "Levitating"))

    row = await sql.fetchrow("SELECT kind, detail, call_id FROM anomaly")
    assert row is not None
    assert tuple(row) == ("unknown_state", "Levitating", recorded.steps[0].call.id)


# ── all or nothing ────────────────────────────────────────────────────────────────────────────────────


async def test_a_batch_that_fails_leaves_nothing(journal: Journal, sql: asyncpg.Connection) -> None:
    """Whatever the last statement was: the transaction is one."""
    await sql.execute("ALTER TABLE stream ADD CONSTRAINT broken CHECK (position < 3)")
    entries = Line().call("Ringing", "Established", "Released")

    with pytest.raises(StoreError):
        await journal.record(entries)
    assert set((await counts(sql)).values()) == {0}

    await sql.execute("ALTER TABLE stream DROP CONSTRAINT broken")
    assert len((await journal.record(entries)).entries) == 3


async def test_an_unknown_account_is_refused_whole(journal: Journal, sql: asyncpg.Connection) -> None:
    """It is an error of the program, not of the message; it names the cure."""
    with pytest.raises(StoreError, match="register"):
        await journal.record(Line(1).call("Ringing") + Line(99).call("Ringing"))

    assert (await counts(sql))["notification"] == 0


async def test_nothing_to_record_is_nothing(journal: Journal) -> None:
    """An empty batch asks the database nothing."""
    assert await journal.record([]) == Recorded((), (), 0)


# ── several recorders ─────────────────────────────────────────────────────────────────────────────────


async def test_recorders_of_the_same_accounts_wait_for_each_other(
    journal: Journal, database: str, sql: asyncpg.Connection
) -> None:
    """Four writers, in two processes' worth of journals, on the same two accounts in any order: all is
    stored, no deadlock, and the ids of each account's messages rise in the order of their positions."""
    async with await Journal.open(database) as other:
        journals = [journal, journal, other, other]
        lines = [[Line(1), Line(2)] for _ in journals]

        async def record(number: int) -> None:
            for turn in range(15):
                batch_of_both = [
                    entry
                    for line in lines[number][:: 1 if turn % 2 else -1]
                    for entry in line.call("Ringing", "Established", "Released", id=f"{number}-{turn}")
                ]
                await journals[number].record(batch_of_both)

        async with asyncio.TaskGroup() as tasks:
            for number in range(4):
                tasks.create_task(record(number))

    assert (await counts(sql))["notification"] == 4 * 15 * 6
    assert (await counts(sql))["call"] == 4 * 15 * 2
    rows = await sql.fetch("SELECT stream_id, position, id FROM notification ORDER BY id")
    for line in {row["stream_id"] for row in rows}:
        assert [row["position"] for row in rows if row["stream_id"] == line] == list(range(1, 46))


async def test_a_batch_that_another_one_overtakes_is_folded_again(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """A large batch is folded in several turns of the event loop; another one of its account that commits
    meanwhile is not overwritten: no message is lost from the call, and its changes follow from each other."""
    long, short = Line(1), Line(1)
    await journal.record([*long.call("Ringing"), *short.call("Ringing", id="other")])
    await journal.record(short.call("Established", id="other"))
    many = [*long.call("Established"), *long.call(*["Ringing"] * 3000, id="third")]

    await asyncio.gather(journal.record(many), journal.record(short.call("Held")))

    assert await sql.fetchval("SELECT notifications FROM call WHERE call_id = $1", messages.UUID) == 3
    changes = await sql.fetch(
        """SELECT ch.before::text, ch.after::text FROM change ch JOIN call c ON c.id = ch.call_id
        WHERE c.call_id = $1 AND ch.field = 'state' ORDER BY ch.notification_id""",
        messages.UUID,
    )
    assert [change["before"] for change in changes] == [None, *(change["after"] for change in changes[:-1])]


@pytest.mark.parametrize("others", [1, 300])
async def test_a_list_of_calls_among_notifications_opens_them_all(
    journal: Journal, sql: asyncpg.Connection, others: int
) -> None:
    """Should a server send one in the middle of a session: in a small batch or a large one, each call has an
    id that nothing else gets, and what the batch had begun to write is not there twice."""
    line = Line()
    await journal.record(line.call("Ringing"))
    listed = [messages.resource("Established", id=f"listed {n}", connId=f"conn {n}") for n in range(3)]
    batch_with_list = [
        *line.call(*["Ringing"] * others, id="before"),
        line.hear(messages.snapshot(*listed)),
        *line.call(*["Ringing"] * others, id="after"),
    ]

    recorded = await journal.record(batch_with_list)

    await journal.record(line.call("Ringing", id="last"))

    assert recorded.duplicates == 0
    assert (await counts(sql))["notification"] == 2 * others + 3
    ids = {row["id"] for row in await sql.fetch("SELECT id FROM notification UNION SELECT id FROM call")}
    assert len(ids) == 2 * others + 3 + len(listed)
    found = await sql.fetch("SELECT call_id, state FROM call ORDER BY id")
    assert [row["call_id"] for row in found] == [
        messages.UUID,
        "before",
        *(f"listed {n}" for n in range(3)),
        "after",
        "last",
    ]


async def test_a_call_that_another_recorder_moved_on_is_read_again(
    journal: Journal, database: str, sql: asyncpg.Connection
) -> None:
    """What a journal keeps in memory is not used when the row has changed since."""
    mine, theirs = Line(1), Line(1, began=T0 + timedelta(minutes=1))
    await journal.record(mine.call("Ringing"))
    async with await Journal.open(database) as other:
        await other.record(theirs.call("Established"))
    mine.at = theirs.at

    recorded = await journal.record(mine.call("Released"))

    assert recorded.steps[0].call.outcome is Outcome.ANSWERED
    assert await sql.fetchval("SELECT notifications FROM call") == 3


async def test_what_is_committed_while_a_batch_waits_is_seen_by_it(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """Whether what was kept is still true is asked when the lock is held, and not before."""
    line = Line()
    await journal.record(line.call("Ringing"))
    await sql.execute("BEGIN")
    await sql.execute("UPDATE account SET heard_at = heard_at WHERE id = 1")
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(journal.record(line.call("Established")))
        await until_somebody_waits(sql)
        await sql.execute("UPDATE call SET state = 'Held'")
        await sql.execute("COMMIT")

    states = [change for change in waiting.result().steps[0].changes if change.field == "state"]
    assert [(change.before, change.after) for change in states] == [("Held", "Established")]


async def test_a_batch_that_waits_for_an_account_holds_no_later_one(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """Locks are taken in the order of the accounts' ids, whatever the order of the messages."""
    await sql.execute("BEGIN")
    await sql.execute("SELECT FROM account WHERE id = 1 FOR UPDATE")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(journal.record(Line(2).call("Ringing") + Line(1).call("Ringing")))
        await until_somebody_waits(sql)
        await sql.execute("SELECT FROM account WHERE id = 2 FOR UPDATE NOWAIT")
        await sql.execute("COMMIT")


async def test_a_rolled_back_batch_is_not_remembered(journal: Journal, sql: asyncpg.Connection) -> None:
    """A call kept in memory is the one that was committed, not the one that was tried."""
    line = Line()
    await journal.record(line.call("Ringing"))
    established = line.call("Established")
    await sql.execute("ALTER TABLE stream ADD CONSTRAINT broken CHECK (position < 2)")
    with pytest.raises(StoreError):
        await journal.record(established)
    await sql.execute("ALTER TABLE stream DROP CONSTRAINT broken")

    recorded = await journal.record(established)

    assert recorded.steps[0].call.notifications == 2
    assert [change.before for change in recorded.steps[0].changes if change.field == "state"] == ["Ringing"]


async def test_a_batch_that_comes_again_is_known_by_its_new_number(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """The server may cut the same messages otherwise, and will be told that number: it is kept, but never one
    that reaches less far than what is kept, nor where messages beyond it have no number."""
    line = Line()
    heard = line.call("Ringing", "Established", "Held", "Established")

    def numbered(place: int, batch: tuple[int, int] | None) -> Heard:
        return structs.replace(heard[place], batch=batch)

    async def kept() -> tuple[int | None, ...]:
        return tuple(await sql.fetchrow("SELECT position, batch, batch_position FROM stream") or ())

    await journal.record([numbered(0, (1, 1)), numbered(1, (1, 1)), numbered(2, (1, 1))])
    assert await kept() == (3, 1, 1)
    await journal.record([numbered(1, (2, 2))])
    assert await kept() == (3, 2, 2)
    await journal.record([numbered(0, (1, 1))])
    assert await kept() == (3, 2, 2)
    await journal.record([numbered(3, None)])
    assert await kept() == (4, None, None)
    await journal.record([numbered(1, (2, 2)), numbered(2, (3, 3))])
    assert await kept() == (4, None, None)
    await journal.record([numbered(3, (3, 4))])
    assert await kept() == (4, 3, 4)


async def test_a_batch_that_comes_again_at_once_is_known_by_its_new_number(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """As after a restart, when what the spool had kept and the redelivery of it are written together."""
    first, second = Line().call("Ringing", "Established")

    await journal.record(
        [
            structs.replace(each, batch=number)
            for each, number in ((first, (1, 1)), (second, (2, 2)), (second, (9, 2)))
        ]
    )

    kept = await sql.fetchrow("SELECT position, batch, batch_position FROM stream")
    assert tuple(kept or ()) == (2, 9, 2)


def send_buffer_bytes(connection: Any) -> int:
    """How much a connection takes before PostgreSQL has read it."""
    plug = connection._transport.get_extra_info("socket")
    return int(plug.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF))


async def test_a_local_connection_takes_a_whole_piece_of_copy(journal: Journal, database: str) -> None:
    """Else PostgreSQL waits for the rest of it until the next messages are folded: the system gives less."""
    plain = await asyncpg.connect(database)
    try:
        async with journal._pool.acquire() as ours:
            assert send_buffer_bytes(ours) > send_buffer_bytes(plain)
    finally:
        await plain.close()


async def test_what_is_known_is_written_in_one_round_trip(database: str, sql: asyncpg.Connection) -> None:
    """A small batch about kept accounts, also with a new call in it, is a single statement; a message about a
    call that has ended is not foreseen, and reaches that call all the same."""
    line = Line()
    async with await Journal.open(database, connections=1) as journal:
        await journal.register([AccountRow("ada", "", "lab")])
        await journal.record(line.call("Ringing", id="a"))
        await journal.record(line.call("Established", id="a"))  # the ids are reserved now
        async with journal._pool.acquire() as connection:
            asked: list[str] = []
            connection.add_query_logger(lambda record: asked.append(record.query))
        await journal.record(line.call("Released", id="a") + line.call("Ringing", id="b"))
        assert len(asked) == 1
        late = line.hear(
            messages.message("Released", "AttachedDataChanged", id="a", connId="conn-a", userData={"k": "v"})
        )
        recorded = await journal.record([late])
        assert len(asked) > 2
    assert recorded.steps[0].call.user_data == {"k": "v"}
    assert await sql.fetchval("SELECT count(*) FROM call") == 2


async def test_ids_are_set_aside_once_for_all_who_wait(database: str, sql: asyncpg.Connection) -> None:
    """Writers that find none left at the same time need one round trip between them, and waste none."""
    async with await Journal.open(database, connections=4) as opened:
        await opened.register([AccountRow(name, "", "lab") for name in "abcd"])
        lines = [Line(account) for account in (1, 2, 3, 4)]
        for line in lines:
            await opened.record(line.call("Ringing"))
        before = await sql.fetchval("SELECT last_value FROM notification_id_seq")
        await asyncio.gather(*[opened.record(line.call("Established")) for line in lines])
        assert await sql.fetchval("SELECT last_value FROM notification_id_seq") - before == IDS_AHEAD


async def test_kept_calls_are_bounded(
    journal: Journal, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bound, those of the account that was heard longest ago are read again: slower, no other
    result. What has ended is not kept at all."""
    monkeypatch.setattr(batch, "CALLS_KEPT_MAX", 3)
    ada, bob = Line(1), Line(2)
    await journal.record([entry for n in range(3) for entry in ada.call("Ringing", id=f"call-{n}")])
    await journal.record(bob.call("Ringing", id="a") + bob.call("Ringing", "Released", id="b"))
    assert journal._kept.calls == 1

    recorded = await journal.record(ada.call("Established", id="call-0") + bob.call("Released", id="a"))

    assert [step.call.notifications for step in recorded.steps] == [2, 2]
    assert journal._kept.calls == 1
    assert await sql.fetchval("SELECT count(*) FROM call") == 5


async def test_an_id_of_a_newer_call_stays_with_it(journal: Journal, sql: asyncpg.Connection) -> None:
    """An older call that is heard to carry it as well does not take it, in memory or in the database."""
    line = Line()
    await journal.record(line.call("Ringing", id="old", connId="c1", callUuid="u1"))
    await journal.record(line.call("Ringing", id="new", connId="c2", callUuid="u2"))
    await journal.record(line.call("Established", id="old", connId="c2", callUuid="u1"))

    recorded = await journal.record(line.call("Established", id="c2", connId=messages.ABSENT, callUuid="u9"))

    assert recorded.steps[0].call.call_id == "new"


# ── accounts, restarts, partitions ────────────────────────────────────────────────────────────────────


async def test_registering_again_gives_the_same_ids(journal: Journal, sql: asyncpg.Connection) -> None:
    """And takes over a tenant that has changed, for that account alone."""
    found = await journal.register(
        [
            AccountRow("ada", "globex", "lab"),
            AccountRow("eve", "acme", "lab"),
            AccountRow("eve", "acme", "lab"),
        ]
    )

    assert found["ada"] == 1
    assert set(found) == {"ada", "eve"}
    rows = await sql.fetch("SELECT name, tenant FROM account ORDER BY name")
    assert [tuple(row) for row in rows] == [("ada", "globex"), ("bob", "acme"), ("eve", "acme")]
    assert await journal.register([]) == {}


async def test_a_retired_account_comes_back_with_its_history(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """Its row is marked and not removed."""
    await journal.retire([1], T0)
    assert await sql.fetchval("SELECT removed_at FROM account WHERE id = 1") == T0

    assert await journal.register([AccountRow("ada", "acme", "lab")]) == {"ada": 1}
    assert await sql.fetchval("SELECT removed_at FROM account WHERE id = 1") is None


async def test_the_open_calls_come_back_after_a_restart(journal: Journal, database: str) -> None:
    """Those of the accounts asked for, without the ended ones."""
    line = Line(1)
    recorded = await journal.record(
        line.call("Ringing", "Established", id="open") + line.call("Ringing", "Released", id="over")
    )
    await journal.record(Line(2).call("Ringing", id="other"))

    async with await Journal.open(database) as another:
        assert await another.open_calls([1]) == [recorded.steps[1].call]


async def test_the_next_months_have_partitions(journal: Journal, sql: asyncpg.Connection) -> None:
    """Made when they are missing, once, by a role that owns no table."""
    name = await sql.fetchval("SELECT 'notification_' || to_char(now() AT TIME ZONE 'UTC', 'YYYY_MM')")
    await sql.execute(f"DROP TABLE {name}")

    assert await journal.ensure_partitions() == [name]
    assert await journal.ensure_partitions() == []
    assert (
        await sql.fetchval("SELECT count(*) FROM pg_inherits WHERE inhparent = 'notification'::regclass") == 5
    )


async def test_a_message_of_another_time_goes_to_the_default_partition(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """No partition is no reason to refuse it; and that month's partition is not made over its head."""
    now = await sql.fetchval("SELECT now()")
    name = await sql.fetchval("SELECT 'notification_' || to_char(now() AT TIME ZONE 'UTC', 'YYYY_MM')")
    await sql.execute(f"DROP TABLE {name}")

    await journal.record(Line(began=T0).call("Ringing") + Line(2, began=now).call("Ringing"))

    assert await sql.fetchval("SELECT count(*) FROM notification_default") == 2
    assert await journal.ensure_partitions() == []


async def test_a_long_message_is_stored_whole_and_uncompressed(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """2 to 8 kB stay in their row; a megabyte is stored as well."""
    line = Line()
    lengths = [3_000, 7_000, 1_000_000]
    await journal.record([line.hear(messages.message("Ringing", id=str(n), pad="x" * n)) for n in lengths])

    rows = await sql.fetch(
        "SELECT octet_length(raw) AS length, pg_column_size(raw) AS size FROM notification ORDER BY id"
    )
    assert [row["size"] >= row["length"] for row in rows] == [True, True, False]


async def test_no_table_is_read_whole(database: str, sql: asyncpg.Connection) -> None:
    """Statements are planned on an empty database, and must go on by their keys when it has grown."""
    async with await Journal.open(database) as journal:
        await journal.register([AccountRow(f"a{n}", "", "lab") for n in range(50)])
        lines = [Line(1 + n) for n in range(50)]
        for turn in range(8):
            await journal.record([entry for line in lines for entry in line.call(*LIFE, id=f"call-{turn}")])
            await journal.record([lines[turn].snapshot()])

    scans = await sql.fetch("SELECT relname, seq_scan FROM pg_stat_user_tables WHERE seq_scan > 0")
    read_whole = {row["relname"] for row in scans} - {"alembic_version"}
    assert not {name for name in read_whole if not name.startswith("notification_")}


# ── a database that does not answer ───────────────────────────────────────────────────────────────────


async def test_a_database_that_is_not_there_is_unavailable() -> None:
    """It may come: the caller tries again."""
    with pytest.raises(StoreUnavailable):
        await Journal.open("postgresql://listener@/listener?host=/nonexistent")


async def test_a_database_without_tables_names_the_cure(postgres: Embedded, empty_database: str) -> None:
    """So does one whose roles exist, since roles belong to the whole server."""
    with pytest.raises(SchemaOutdated, match="listener db upgrade"):
        await Journal.open(empty_database)


async def test_a_database_of_another_version_is_refused(database: str, sql: asyncpg.Connection) -> None:
    """Never write into tables that may mean something else."""
    await sql.execute("UPDATE alembic_version SET version_num = '9999'")

    with pytest.raises(SchemaOutdated, match="9999"):
        await Journal.open(database)


async def test_a_killed_connection_is_unavailable_and_the_next_batch_goes_through(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """As after a restart of PostgreSQL: the pool connects anew by itself."""
    entries = Line().call("Ringing", "Established")
    await journal.record(entries[:1])
    killed = await sql.fetchval(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE application_name = 'listener journal' AND datname = current_database()"
    )
    assert killed == 2

    # Whether an attempt fails depends on who is quicker: the news of the end, or the next batch.
    recorded = None
    for _ in range(3):
        with contextlib.suppress(StoreUnavailable):
            recorded = await journal.record(entries)
            break

    assert recorded is not None
    assert recorded.duplicates == 1
    assert await sql.fetchval("SELECT notifications FROM call") == 2


async def test_the_servers_own_words_are_told_when_it_ends_a_connection(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """In the middle of a transaction: not what the driver says when the dead connection is closed."""

    async def end(process: int) -> None:
        asleep = "SELECT wait_event = 'PgSleep' FROM pg_stat_activity WHERE pid = $1"
        while not await sql.fetchval(asleep, process):
            pass
        await sql.execute("SELECT pg_terminate_backend($1)", process)

    async def sleep_until_ended() -> None:
        async with journal.transaction() as connection:
            process = await connection.fetchval("SELECT pg_backend_pid()")
            await asyncio.gather(connection.execute("SELECT pg_sleep(60)"), end(process))

    with pytest.raises(StoreUnavailable, match="administrator command"):
        await sleep_until_ended()


async def test_a_lock_that_somebody_holds_is_waited_for(journal: Journal, sql: asyncpg.Connection) -> None:
    """A batch of another account goes on meanwhile."""
    await sql.execute("BEGIN")
    await sql.execute("SELECT FROM account WHERE id = 1 FOR UPDATE")
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(journal.record(Line(1).call("Ringing")))
        await journal.record(Line(2).call("Ringing"))
        assert not waiting.done()
        await sql.execute("COMMIT")
    assert len(waiting.result().entries) == 1


async def test_a_cancellation_that_the_driver_answers_with_a_failure_is_one(journal: Journal) -> None:
    """asyncpg may say that the connection was closed, which it was because of the cancellation: nobody
    cancels twice, and who took it for a failure of the store would try again for ever."""
    under_way = asyncio.Event()

    async def work() -> None:
        async with journal._connection():
            under_way.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise asyncpg.ConnectionDoesNotExistError("closed in the middle of an operation") from None

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(work())
        await under_way.wait()
        task.cancel()
    assert task.cancelled()


async def test_a_cancelled_batch_is_as_if_it_had_never_been(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """A daemon that is told to stop in the middle of a transaction leaves no half of it."""
    entries = Line(1).call("Ringing", "Established")
    await sql.execute("BEGIN")
    await sql.execute("SELECT FROM account WHERE id = 1 FOR UPDATE")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await journal.record(entries)
    await sql.execute("COMMIT")

    assert (await counts(sql))["notification"] == 0
    assert len((await journal.record(entries)).entries) == 2


async def test_what_was_recorded_says_from_which_message_each_step_follows(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """Each new entry has its id, each step its entry, whichever way the batch was written."""
    line = Line()
    known = line.call("Ringing")
    await journal.record(known)
    foreseen = [*line.call("Established"), line.hear(b"no JSON"), *line.call("Held", "Released")]
    looked_up = [line.snapshot(), *line.call("Dialing", id="another"), line.hear(b"{}")]
    refused = [line.hear(b"{}"), *line.call("Released", id="another", callType="x\x00")]
    for entries in (known, foreseen, looked_up, refused):
        recorded = await journal.record(entries)
        rows = await sql.fetch("SELECT id, raw FROM notification ORDER BY id")
        by_id = {row["id"]: bytes(row["raw"]) for row in rows}
        assert [by_id[id] for id in recorded.ids] == [entry.heard.raw for entry in recorded.entries]
        assert list(recorded.ids) == sorted(recorded.ids)
        assert len(recorded.origins) == len(recorded.steps)
        for step, origin in zip(recorded.steps, recorded.origins, strict=True):
            assert step.call.last_heard_at == recorded.entries[origin].heard.received_at
