"""A real PostgreSQL for the tests: one bundled server a session, one database a test.

The server keeps nothing that matters, so it does not wait for the disk (`fsync` off). A template is migrated
once; each test's database is a copy of it, which takes about 20 ms, and is dropped afterwards.
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
from listener.store.journal import AccountRow, Journal
from tests.support.leftovers import connections_left

THROWAWAY = {"fsync": "off", "full_page_writes": "off", "autovacuum": "off", "max_connections": "60"}
"""Autovacuum would analyse tables at moments that no test chose, and change their plans."""

TEMPLATE = "listener_template"


async def administer(server: Embedded, *statements: str) -> None:
    """Run statements that no transaction may hold, such as CREATE DATABASE."""
    connection = await asyncpg.connect(server.dsn)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


@asynccontextmanager
async def new_database(server: Embedded, template: str) -> AsyncIterator[str]:
    """A database of its own, copied from the template; gives its DSN, and drops it at the end. Fails the test
    that leaves a connection to it."""
    name = f"test_{uuid4().hex}"
    await administer(server, f"CREATE DATABASE {name} TEMPLATE {template}")
    left: list[str] = []
    try:
        yield server.dsn_of(name)
        administrator = await asyncpg.connect(server.dsn)
        try:
            left = await connections_left(administrator, name)
        finally:
            await administrator.close()
    finally:
        await administer(server, f"DROP DATABASE {name} WITH (FORCE)")
    if left:
        pytest.fail("the test left behind:\n" + "\n".join(left), pytrace=False)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Embedded]:
    """The session's server. Its directory is short, so that its socket lies inside."""
    place = Path(tempfile.gettempdir()) / f"lt-{uuid4().hex[:12]}"
    server = Embedded(place, settings=THROWAWAY)
    server.start()
    try:
        yield server
    finally:
        server.destroy()


@pytest.fixture(scope="session")
def template(postgres: Embedded) -> str:
    """The name of a database with the schema of this version and nothing in it."""

    async def make() -> None:
        await administer(postgres, f"CREATE DATABASE {TEMPLATE}")
        await migrate.upgrade(postgres.dsn_of(TEMPLATE))

    asyncio.run(make())
    return TEMPLATE


@pytest.fixture
async def database(postgres: Embedded, template: str) -> AsyncIterator[str]:
    """The DSN of a database with the schema, for this test alone."""
    async with new_database(postgres, template) as dsn:
        yield dsn


@pytest.fixture
async def empty_database(postgres: Embedded) -> AsyncIterator[str]:
    """The DSN of a database without any table, for this test alone."""
    async with new_database(postgres, "template0") as dsn:
        yield dsn


@pytest.fixture
async def journal(database: str) -> AsyncIterator[Journal]:
    """A journal on this test's database, with the accounts 1 and 2 (`ada` and `bob`) registered."""
    async with await Journal.open(database) as opened:
        found = await opened.register([AccountRow("ada", "acme", "lab"), AccountRow("bob", "acme", "lab")])
        assert found == {"ada": 1, "bob": 2}
        yield opened


@pytest.fixture
async def sql(database: str) -> AsyncIterator[asyncpg.Connection]:
    """A plain connection to this test's database, as its owner: to look at what was stored."""
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()
