"""Runs the migrations: on the connection that `listener.store.migrate` hands over, or on one of its own.

The second way is for developers: `alembic -x dsn=postgresql://… upgrade head`, or `revision --autogenerate`.
"""

import asyncio

from alembic import context
from sqlalchemy import Connection, text

from listener.store.connect import engine
from listener.store.schema import include_name, metadata

LOCK = 0x6C697374656E6572
"""The advisory lock of whoever migrates ("listener" in ASCII)."""


def run(connection: Connection) -> None:
    """Migrate on this connection, in one transaction, alone."""
    context.configure(
        connection=connection,
        target_metadata=metadata,
        include_name=include_name,
        compare_type=True,
        compare_server_default=True,
    )
    with context.begin_transaction():
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
        context.run_migrations()


async def run_alone(dsn: str) -> None:
    """Connect, migrate, disconnect."""
    using = engine(dsn)
    async with using.begin() as connection:
        await connection.run_sync(run)
    await using.dispose()


handed_over = context.config.attributes.get("connection")
if handed_over is not None:
    run(handed_over)
else:
    asyncio.run(run_alone(context.get_x_argument(as_dictionary=True).get("dsn", "")))
