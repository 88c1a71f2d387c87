"""What a restart goes on with: stored whole, with the stream it belongs to, and for the writer alone."""

from datetime import timedelta
from uuid import uuid4

import asyncpg
import msgspec
import pytest

from listener.core.calls import Cover, Heard
from listener.core.session import Cookie, Kept, Saved
from listener.errors import StoreError
from listener.store.journal import Journal
from tests.store.line import T0, Line

KEPT = Kept(
    stream=str(uuid4()),
    client_id="27qs4c1m0",
    ack=True,
    connection_type="long-polling",
    max_interval_s=10.0,
    channels=("/v2/me/calls", "/v2/me/devices"),
    owner="ada http://gws.example",
    cookies=(
        Cookie("BAYEUX_BROWSER", "x1", "gws.example", "/", secure=False, expires="", max_age=""),
        Cookie(
            "JSESSIONID", '"a b"', "gws.example", "/api", secure=True, expires="Thu, 01 Jan", max_age="60"
        ),
    ),
    token=(("X-CSRF-TOKEN", "secret"),),
)


def saved(**fields: object) -> Saved:
    """A session that was saved when everything began."""
    return Saved(msgspec.structs.replace(KEPT, **fields), T0)


def heard(line: Line, *batches: tuple[int, int] | None) -> list[Heard]:
    """As many messages, each with the batch that it leaves whole."""
    entries = [line.hear(b"{}") for _ in batches]
    return [
        msgspec.structs.replace(entry, batch=batch) for entry, batch in zip(entries, batches, strict=True)
    ]


async def test_a_session_comes_back_as_it_was(journal: Journal) -> None:
    """Of the accounts that are asked for; one whose stream has no message yet has heard nothing."""
    other = saved(client_id="another", ack=False, max_interval_s=None, channels=(), cookies=(), token=())
    await journal.cover([], {1: saved(), 2: other})

    assert await journal.kept_sessions([1, 2, 77]) == {1: saved(), 2: other}
    assert await journal.kept_sessions([2]) == {2: other}
    assert (await journal.kept_sessions([1]))[1].resumes_at == (-1, 0)


async def test_the_last_word_counts(journal: Journal) -> None:
    """A session replaces the one before, and None forgets it; saying so twice is saying it once."""
    await journal.cover([], {1: saved(), 2: saved()})
    later = Saved(msgspec.structs.replace(KEPT, client_id="later"), T0 + timedelta(hours=1))
    await journal.cover([], {1: later, 2: None})
    await journal.cover([], {2: None})

    assert await journal.kept_sessions([1, 2]) == {1: later}


async def test_it_is_written_with_the_coverage_or_not_at_all(journal: Journal) -> None:
    """Who reads "observed" must find the session that observed."""
    with pytest.raises(StoreError):
        await journal.cover([Cover(77, T0)], {1: saved()})
    assert await journal.kept_sessions([1]) == {}


async def test_how_far_it_is_stored_is_the_streams_to_say(journal: Journal) -> None:
    """The batch comes with the messages that it covers, in their transaction: the last new one decides."""
    line = Line()
    await journal.cover([], {1: saved(stream=line.stream)})

    await journal.record(heard(line, (-1, 0), (-1, 0)))
    assert (await journal.kept_sessions([1]))[1].resumes_at == (-1, 0)
    assert (await journal.kept_sessions([1]))[1].position == 2

    await journal.record(heard(line, (7, 3)))
    assert (await journal.kept_sessions([1]))[1].resumes_at == (7, 3)


async def test_a_batch_that_is_not_known_is_no_older_one(journal: Journal) -> None:
    """Nothing can be resumed then, until the next batch is known."""
    line = Line()
    await journal.cover([], {1: saved(stream=line.stream)})
    await journal.record(heard(line, (7, 1)))
    await journal.record(heard(line, None))
    assert (await journal.kept_sessions([1]))[1].resumes_at is None

    await journal.record(heard(line, (9, 3)))
    assert (await journal.kept_sessions([1]))[1].resumes_at == (9, 3)


async def test_what_comes_again_after_a_restart_counts_once(
    journal: Journal, sql: asyncpg.Connection
) -> None:
    """Messages that were committed and not acknowledged come again, with the places that they had; two equal
    ones are two, and what is new after them is stored."""
    line = Line()
    await journal.cover([], {1: saved(stream=line.stream)})
    await journal.record(heard(line, (1, 1)))
    await journal.record(heard(line, (1, 1), (1, 1)))  # the transaction after this one was never committed

    resumed = (await journal.kept_sessions([1]))[1]
    assert (resumed.resumes_at, resumed.position) == ((1, 1), 3)
    again = Line()
    again.stream, again.position = resumed.kept.stream, 1
    recorded = await journal.record(heard(again, (1, 1), (1, 1), (1, 1), (2, 5)))

    assert recorded.duplicates == 2
    assert [entry.heard.position for entry in recorded.entries] == [4, 5]
    assert [row[0] for row in await sql.fetch("SELECT position FROM notification ORDER BY id")] == [
        1,
        2,
        3,
        4,
        5,
    ]
    assert (await journal.kept_sessions([1]))[1].resumes_at == (2, 5)


async def test_an_account_that_is_retired_leaves_no_credential(journal: Journal) -> None:
    """Nobody will go on with its session."""
    await journal.cover([], {1: saved(), 2: saved()})
    await journal.retire([1], T0)
    assert await journal.kept_sessions([1, 2]) == {2: saved()}
