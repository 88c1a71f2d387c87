"""The migrations: from nothing to the schema and back, and the schema is the one that the code means."""

import asyncio
import sys
from pathlib import Path

import asyncpg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection

from listener.errors import SchemaOutdated, StoreError, StoreUnavailable
from listener.store import migrate, schema
from listener.store.claim import Claim
from listener.store.connect import engine
from listener.store.embedded import Embedded
from listener.store.journal import AccountRow, Journal
from tests.store.line import Line
from tests.support.database import new_database

SHAPE = """
    SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
    WHERE conrelid::regclass::text = ANY($1)
    UNION ALL
    SELECT 'index', tablename, indexname, indexdef FROM pg_indexes WHERE tablename = ANY($1)
    UNION ALL
    SELECT 'column', attrelid::regclass::text, lpad(attnum::text, 3) || ' ' || attname,
        concat_ws(' ', format_type(atttypid, atttypmod), attnotnull, attidentity, pg_get_expr(adbin, adrelid))
    FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    WHERE attrelid::regclass::text = ANY($1) AND attnum > 0
    UNION ALL
    SELECT 'table', relname, coalesce(pg_get_partkeydef(oid), ''),
        concat_ws(' ', reloptions::text, obj_description(oid))
    FROM pg_class WHERE relname = ANY($1)
    ORDER BY 1, 2, 3, 4"""
"""Everything that a table is: more than Alembic compares."""


async def shape(dsn: str) -> list[tuple[str, ...]]:
    """What the tables of a database look like."""
    connection = await asyncpg.connect(dsn)
    try:
        return [tuple(row) for row in await connection.fetch(SHAPE, list(schema.metadata.tables))]
    finally:
        await connection.close()


async def left_over(dsn: str) -> list[str]:
    """What is in the schema `public`, apart from Alembic's own table."""
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch(
            "SELECT relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace"
            " UNION SELECT proname::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
        )
        return [row[0] for row in rows if "alembic_version" not in row[0]]
    finally:
        await connection.close()


async def test_from_nothing_to_head_and_back(empty_database: str) -> None:
    """The way down removes all that the way up made, and can be gone up again."""
    assert await migrate.current(empty_database) is None
    await migrate.upgrade(empty_database)
    assert await migrate.current(empty_database) == migrate.head()
    await migrate.check(empty_database)

    await migrate.downgrade(empty_database, "base")
    assert await migrate.current(empty_database) is None
    assert await left_over(empty_database) == []

    await migrate.upgrade(empty_database)
    await migrate.check(empty_database)


async def test_upgrading_twice_is_upgrading_once(database: str) -> None:
    """The second finds nothing to do."""
    before = await shape(database)
    await migrate.upgrade(database)
    assert await shape(database) == before


async def test_two_at_once_are_one_after_the_other(empty_database: str) -> None:
    """Daemons that start together all find the schema, and none fails."""
    program = (
        "import asyncio, sys; from listener.store import migrate; asyncio.run(migrate.upgrade(sys.argv[1]))"
    )
    processes = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", program, empty_database) for _ in range(3)
    ]
    assert [await process.wait() for process in processes] == [0, 0, 0]
    await migrate.check(empty_database)


async def test_alembic_finds_no_difference_from_the_schema(database: str) -> None:
    """`alembic revision --autogenerate` would write an empty migration."""

    def differences(connection: Connection) -> list[object]:
        options = {
            "include_name": schema.include_name,
            "compare_type": True,
            "compare_server_default": True,
        }
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), schema.metadata))

    using = engine(database)
    async with using.connect() as connection:
        assert await connection.run_sync(differences) == []
    await using.dispose()


async def test_the_tables_are_those_of_the_schema_to_the_last_constraint(
    database: str, empty_database: str
) -> None:
    """Alembic overlooks checks, exclusions, partitions, order and storage: the catalogue does not."""
    using = engine(empty_database)
    async with using.begin() as connection:
        await connection.run_sync(schema.metadata.create_all)
    await using.dispose()

    assert await shape(database) == await shape(empty_database)


async def test_rows_survive_an_upgrade(database: str) -> None:
    """What was heard is there afterwards. With one revision this is an upgrade to where the database is."""
    async with await Journal.open(database) as journal:
        await journal.register([AccountRow("ada", "", "lab")])
        await journal.record(Line().call("Ringing", "Established"))

    await migrate.upgrade(database)

    async with await Journal.open(database) as journal:
        assert len(await journal.open_calls([1])) == 1


async def test_going_down_works_with_rows_in(database: str) -> None:
    """`base` means that everything goes, also when there is something."""
    async with await Journal.open(database) as journal:
        await journal.register([AccountRow("ada", "", "lab")])
        await journal.record(Line().call("Ringing"))

    await migrate.downgrade(database, "base")

    assert await left_over(database) == []


async def test_a_failed_upgrade_leaves_nothing_behind(empty_database: str) -> None:
    """All of it is one transaction."""
    connection = await asyncpg.connect(empty_database)
    await connection.execute("CREATE VIEW report_coverage AS SELECT 1")
    with pytest.raises(StoreError, match="report_coverage"):
        await migrate.upgrade(empty_database)
    assert await left_over(empty_database) == ["report_coverage"]
    await connection.close()


async def test_no_table_is_changed_under_a_listener(database: str, empty_database: str) -> None:
    """An upgrade or downgrade does not wait for it to end: it names the listener, and the cure. Where nothing
    is to be done, nobody minds it: a second listener comes as far as the claim, which refuses it."""
    for dsn in (database, empty_database):
        listening = await Claim.take(dsn)
        try:
            if dsn == database:
                await migrate.upgrade(dsn)
                work = migrate.downgrade(dsn, "base")
            else:
                work = migrate.upgrade(dsn)
            with pytest.raises(StoreError, match=r"listener run \(pid .*stop it first"):
                await work
        finally:
            await listening.release()
    await migrate.check(database)


async def test_a_user_who_may_not_create_roles_is_told_the_cure(postgres: Embedded, template: str) -> None:
    """The error gives the statements for somebody who may; where the roles exist, none is needed."""
    async with new_database(postgres, "template0") as dsn:
        owner = await asyncpg.connect(dsn)
        await owner.execute("DROP ROLE IF EXISTS plain_owner")
        await owner.execute("CREATE ROLE plain_owner LOGIN")
        await owner.execute("GRANT ALL ON SCHEMA public TO plain_owner")
        plain = dsn.replace("listener@", "plain_owner@", 1)
        await migrate.upgrade(plain)
        await migrate.downgrade(plain, "base")

        names = ("listener_writer", "listener_reader", "listener_auditor")
        for name in names:
            await owner.execute(f"ALTER ROLE {name} RENAME TO {name}_away")
        try:
            with pytest.raises(StoreError) as refused:
                await migrate.upgrade(plain)
        finally:
            for name in names:
                await owner.execute(f"ALTER ROLE {name}_away RENAME TO {name}")
        said = str(refused.value)
        assert said.count("CREATE ROLE listener_writer NOLOGIN;") == 1
        assert "GRANT listener_writer, listener_reader, listener_auditor TO plain_owner;" in said
        assert await left_over(dsn) == []
        await owner.execute("DROP OWNED BY plain_owner")
        await owner.close()


async def test_checking_says_what_to_do(database: str, empty_database: str) -> None:
    """No schema, an older one and a newer one are three different answers."""
    with pytest.raises(SchemaOutdated, match="no tables"):
        await migrate.check(empty_database)
    with pytest.raises(SchemaOutdated, match="does not know"):
        migrate.refuse_other("9999")
    with pytest.raises(StoreUnavailable):
        await migrate.check("postgresql://listener@/listener?host=/nonexistent")


def test_the_migrations_are_found_where_the_package_is() -> None:
    """In a checkout they are at its top; a wheel has them beside the store (see pyproject.toml)."""
    assert (migrate.scripts() / "env.py").is_file()
    assert migrate.scripts() in (
        Path(migrate.__file__).parent / "migrations",
        Path(__file__).parents[1] / "migrations",
    )
