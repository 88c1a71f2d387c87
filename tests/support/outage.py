"""A PostgreSQL of the tests' own that may be taken away: stopped and started, or made to hang.

Apart from the session's server, which other tests use at the same time. What it takes away, it brings back:
each block leaves the server running.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest

from listener.store import migrate
from listener.store.embedded import Embedded
from tests.support.database import THROWAWAY, administer, new_database

TEMPLATE = "fragile_template"

PAUSE_s = 0.02


async def briefly(_: float) -> None:
    """A pause between two attempts, as short as a test wants it: for a pipeline."""
    await asyncio.sleep(PAUSE_s)


class Fragile:
    """The server, and what may happen to it."""

    def __init__(self, server: Embedded) -> None:
        self.server = server

    async def stop(self) -> None:
        """Takes the server away: its connections end, new ones are refused."""
        await asyncio.to_thread(self.server.stop)

    async def start(self) -> None:
        """Brings it back."""
        await asyncio.to_thread(self.server.start)

    @asynccontextmanager
    async def away(self) -> AsyncIterator[None]:
        """Takes the server away for a block."""
        await self.stop()
        try:
            yield
        finally:
            await self.start()

    @asynccontextmanager
    async def hanging(self, dsn: str, *, tables: str = "account, coverage") -> AsyncIterator[None]:
        """Makes every transaction that touches these tables wait without an answer for a block."""
        holder = await asyncpg.connect(dsn)
        try:
            async with holder.transaction():
                await holder.execute(f"LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE")
                yield
        finally:
            await holder.close()


def change_a_bit(path: Path, at: int) -> None:
    """Changes a bit of the byte there, as a bad disk does: whoever reads meanwhile never finds it empty."""
    with path.open("r+b", buffering=0) as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@asynccontextmanager
async def uncommitted(dsn: str) -> AsyncIterator[None]:
    """Lets no message be committed during the block: each transaction waits in its middle."""
    holder = await asyncpg.connect(dsn)
    try:
        await holder.execute("BEGIN; LOCK TABLE notification IN SHARE MODE")
        yield
    finally:
        await holder.close()


@pytest.fixture(scope="session")
def fragile() -> Iterator[Fragile]:
    """A server that its tests may stop; one test at a time uses it."""
    place = Path(tempfile.gettempdir()) / f"lf-{uuid4().hex[:12]}"
    server = Embedded(place, settings=THROWAWAY)
    server.start()

    async def make() -> None:
        await administer(server, f"CREATE DATABASE {TEMPLATE}")
        await migrate.upgrade(server.dsn_of(TEMPLATE))

    try:
        asyncio.run(make())
        yield Fragile(server)
    finally:
        server.destroy()


@pytest.fixture
async def fragile_database(fragile: Fragile) -> AsyncIterator[str]:
    """The DSN of a database with the schema on that server, for this test alone."""
    async with new_database(fragile.server, TEMPLATE) as dsn:
        yield dsn
