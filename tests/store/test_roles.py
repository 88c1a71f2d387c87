"""The three roles: who may write what, and who may see what."""

from typing import Any

import asyncpg
import pytest

from listener.core.dialling import System, placed
from listener.errors import StoreError
from listener.store import schema
from listener.store.dials import Dials
from listener.store.embedded import Embedded
from listener.store.history import History
from listener.store.journal import AccountRow, Journal
from tests.store.line import T0, Line

NUMBER = "+19165550104"

SECRET = "bayeux_session"
"""The table that only the writer may read; it may delete what is over, too."""

VIEWS = (
    "report_calls",
    "report_changes",
    "report_notifications",
    "report_anomalies",
    "report_coverage",
    "report_dials",
)


@pytest.fixture
async def filled(journal: Journal) -> Journal:
    """A journal in which every table has rows."""
    await journal.record(Line().call("Ringing", "Levitating", "Released", userData={"Name": "Ada"}))
    asked = {"number": NUMBER, "userData": {"Name": "Ada"}}
    await Dials(journal).place(placed("d", 1, System.GWS, NUMBER, T0, reference="Ada"), "Ada", asked)
    return journal


async def as_role(sql: asyncpg.Connection, role: str, statement: str) -> Any:
    """Run a statement as somebody with that role only, and undo it."""
    transaction = sql.transaction()
    await transaction.start()
    try:
        await sql.execute(f"SET LOCAL ROLE {role}")
        return await sql.fetch(statement)
    finally:
        await transaction.rollback()


@pytest.mark.parametrize("table", ["notification", "notification_default", "change", "anomaly", "dial_fact"])
@pytest.mark.parametrize("statement", ["DELETE FROM {}", "TRUNCATE {}", "UPDATE {} SET {} = {}"])
async def test_the_writer_cannot_change_what_happened(
    table: str, statement: str, filled: Journal, sql: asyncpg.Connection
) -> None:
    """It adds to the journal, and can neither update nor delete it, nor any of its partitions."""
    key = {"notification": "id", "notification_default": "id", "dial_fact": "ordinal"}.get(
        table, "notification_id"
    )

    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await as_role(sql, "listener_writer", statement.format(table, key, key))


@pytest.mark.parametrize(
    "table", [table.name for table in schema.metadata.sorted_tables if table.name != SECRET]
)
async def test_the_writer_deletes_nothing_that_happened(
    table: str, filled: Journal, sql: asyncpg.Connection
) -> None:
    """Erasure is somebody else's business."""
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await as_role(sql, "listener_writer", f"DELETE FROM {table}")  # noqa: S608 - names of ours


async def test_the_journal_writes_as_the_writer(database: str, journal: Journal) -> None:
    """Although the login may do more: what the roles refuse is refused to the daemon as well."""
    async with journal._connection() as connection:
        assert await connection.fetchval("SELECT current_user") == "listener_writer"


@pytest.mark.parametrize("table", [table.name for table in schema.metadata.sorted_tables])
async def test_the_reader_sees_no_table(table: str, filled: Journal, sql: asyncpg.Connection) -> None:
    """Neither messages nor userData nor numbers are within its reach."""
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await as_role(sql, "listener_reader", f"SELECT * FROM {table}")  # noqa: S608


@pytest.mark.parametrize("view", VIEWS)
async def test_the_reader_sees_the_views(view: str, filled: Journal, sql: asyncpg.Connection) -> None:
    """They have rows, and in none of them stands a message, a name or a whole number."""
    await sql.execute("INSERT INTO coverage (account_id, since, cause) VALUES (1, now(), '')")
    await sql.execute("UPDATE call SET number = '+19165550104'")

    rows = await as_role(sql, "listener_reader", f"SELECT * FROM {view}")  # noqa: S608

    assert rows
    shown = " ".join(str(value) for row in rows for value in row.values())
    assert "Ada" not in shown
    assert "5550104" not in shown
    assert not {"raw", "user_data", "participants"} & set(rows[0].keys())


async def test_numbers_in_the_views_are_masked(filled: Journal, sql: asyncpg.Connection) -> None:
    """The last two digits of a long one; nothing of a short one, which two digits would half give away."""
    for number, masked in (("+19165550104", "…04"), ("7023", "…"), (None, None)):
        await sql.execute("UPDATE call SET number = $1", number)
        assert await sql.fetchval("SELECT number_masked FROM report_calls") == masked


async def test_dials_in_the_view_show_where_they_went(filled: Journal, sql: asyncpg.Connection) -> None:
    """The beginning of a long number, which says the country and the line; nothing of a short one."""
    for number, prefix in ((NUMBER, "1916"), ("4915", None), ("19165550", None)):
        await sql.execute("UPDATE dial SET number = $1, number_normalised = ltrim($1, '+')", number)
        assert await sql.fetchval("SELECT number_prefix FROM report_dials") == prefix


@pytest.mark.parametrize("role", ["listener_reader", "listener_auditor"])
async def test_a_session_is_the_writers_alone(role: str, filled: Journal, sql: asyncpg.Connection) -> None:
    """It is a credential: whoever reads it can take the session over."""
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await as_role(sql, role, f"SELECT * FROM {SECRET}")  # noqa: S608 - names of ours
    for statement in ("SELECT * FROM {}", "DELETE FROM {}", "UPDATE {} SET client_id = ''"):
        await as_role(sql, "listener_writer", statement.format(SECRET))


@pytest.mark.parametrize(
    "table", [table.name for table in schema.metadata.sorted_tables if table.name != SECRET]
)
async def test_the_auditor_sees_everything_and_changes_nothing(
    table: str, filled: Journal, sql: asyncpg.Connection
) -> None:
    """Reading is not writing."""
    await as_role(sql, "listener_auditor", f"SELECT * FROM {table}")  # noqa: S608
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await as_role(sql, "listener_auditor", f"DELETE FROM {table}")  # noqa: S608


async def test_a_login_without_the_roles_is_told_what_it_lacks(
    postgres: Embedded, database: str, sql: asyncpg.Connection
) -> None:
    """The message names the role to grant, for both sides."""
    await sql.execute("DROP ROLE IF EXISTS nobody_in_particular")
    await sql.execute("CREATE ROLE nobody_in_particular LOGIN")
    dsn = database.replace("listener@", "nobody_in_particular@", 1)

    with pytest.raises(StoreError, match="listener_writer"):
        await Journal.open(dsn)
    async with History(dsn) as history:
        with pytest.raises(StoreError, match="listener_auditor"):
            await history.calls()


async def test_a_login_with_the_role_alone_is_enough(
    postgres: Embedded, database: str, sql: asyncpg.Connection
) -> None:
    """The daemon's login needs to own nothing; ids and partitions come from functions of the owner."""
    await sql.execute("DROP ROLE IF EXISTS daemon_login")
    await sql.execute("CREATE ROLE daemon_login LOGIN IN ROLE listener_writer")
    dsn = database.replace("listener@", "daemon_login@", 1)
    async with await Journal.open(dsn) as journal:
        await journal.register([AccountRow("ada", "", "lab")])
        assert len((await journal.record(Line().call("Ringing"))).entries) == 1
        await journal.resume_coverage([1], Line().at)


async def test_only_the_writer_takes_ids(filled: Journal, sql: asyncpg.Connection) -> None:
    """The sequence is nobody's to set, and its function is not everybody's."""
    for role in ("listener_reader", "listener_auditor"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await as_role(sql, role, "SELECT listener_reserve_ids(1)")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await as_role(sql, "listener_writer", "SELECT setval('notification_id_seq', 1)")
