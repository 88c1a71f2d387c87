"""One listener for a database."""

import pytest

from listener.errors import StoreError, StoreUnavailable
from listener.store.claim import Claim


async def test_a_second_claim_is_told_who_holds_the_first(database: str) -> None:
    """With the process and the host, so that a person finds it; and the cure."""
    first = await Claim.take(database)

    with pytest.raises(StoreError, match=r"Another listener .*pid \d+ on .*Stop it"):
        await Claim.take(database, take_s=0)

    await first.release()


async def test_a_claim_ends_with_its_connection(database: str) -> None:
    """Whether it was released or its process was killed: the next one has it."""
    first = await Claim.take(database)
    await first.release()

    second = await Claim.take(database)

    await first.lost()
    await second.release()


async def test_databases_are_claimed_apart(database: str, empty_database: str) -> None:
    """Two listeners with a database each do not know of one another."""
    one = await Claim.take(database)
    other = await Claim.take(empty_database, take_s=0)

    await one.release()
    await other.release()


async def test_a_database_that_does_not_answer_is_unavailable(database: str) -> None:
    """Which may pass: it is not the same as a claim that is refused."""
    with pytest.raises(StoreUnavailable):
        await Claim.take(database.replace("port=", "port=1"))
