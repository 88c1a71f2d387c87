"""The API and its client: against the daemon as it runs, with all three systems simulated."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from listener.api import Client
from tests.support.centres import TOKEN, Centres, centres
from tests.support.running import InProcess


@pytest.fixture
async def there(redis_url: str) -> AsyncIterator[Centres]:
    """The three systems."""
    async with centres(redis_url) as made:
        yield made


@pytest.fixture
async def listening(there: Centres, database: str) -> AsyncIterator[InProcess]:
    """A daemon that hears them."""
    async with InProcess(there.settings(database)).running() as daemon:
        yield daemon


@pytest.fixture
async def client(listening: InProcess) -> AsyncIterator[Client]:
    """A client of it."""
    room = listening.daemon._room
    assert room is not None
    async with Client(f"http://127.0.0.1:{room.port}", TOKEN) as made:
        yield made


async def ended(client: Client, id: str) -> dict[str, Any]:
    """A dial when it has its outcome."""
    return [told async for told in client.follow(id, poll_s=0.02)][-1]


@pytest.mark.parametrize(
    ("system", "parameters", "outcome"),
    [
        ("gws", {"account": "agent5000", "number": "5001"}, "answered"),
        ("noojee", {"number": "0383208100", "extenOrUniqueId": "SIP/101"}, "answered"),
        (
            "click2dial",
            {"agent": "2001", "callee": "0820001234", "outbound_id": "27820001234"},
            "answered",
        ),
    ],
)
async def test_a_dial_from_its_request_to_its_outcome(
    client: Client, there: Centres, system: str, parameters: dict[str, Any], outcome: str
) -> None:
    """Each system: asked for, written down, sent, heard, matched and ended; and the list has it."""
    there.noojee.scripts["0383208100"] = "answered"
    there.click2dial.scripts["0820001234"] = "answered"
    placed = await client.dial(system, **parameters)
    assert (placed["state"], placed["origin"]) == ("requested", "placed")
    told = await ended(client, placed["id"])
    assert told["outcome"] == outcome
    page = await client.dials(system=system, outcome=outcome)
    assert [each["id"] for each in page["dials"]] == [placed["id"]]
