"""Brings a database to the schema of this version, or says that it is not there.

The migrations travel with the package: in a wheel they lie beside this file, in a checkout at its top.
Each upgrade or downgrade is one transaction under a lock, so that two of them at once are one after the
other, and a failure leaves the schema as it was. The lock is that of `listener.store.claim`, which a running
listener holds for as long as it lives: so nobody waits for it who can be told to stop that listener instead.
"""

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from listener.errors import SchemaOutdated, StoreError
from listener.store.claim import RUN, WHO
from listener.store.connect import classified, engine


def scripts() -> Path:
    """Where the migrations are."""
    beside = Path(str(files("listener.store"))) / "migrations"
    return beside if beside.is_dir() else Path(__file__).parents[2] / "migrations"


def head() -> str:
    """The newest revision that this version knows."""
    found = ScriptDirectory.from_config(_config()).get_current_head()
    if found is None:
        raise StoreError(f"There are no migrations in {scripts()}: install the package again.")
    return found


ROLES = ("listener_writer", "listener_reader", "listener_auditor")
"""Whom the migrations grant rights to. They belong to the server and are made by the first upgrade."""


async def upgrade(dsn: str, revision: str = "head") -> None:
    """Bring the database to the revision; nothing happens where it is there already. Raises StoreError, also
    where our roles are missing and the user of the DSN may not make them, or a listener runs that would have
    the tables changed under it."""

    def run(connection: Connection) -> None:
        found = MigrationContext.configure(connection).get_current_revision()
        if revision == "head" and found == head():
            return
        if found is None:
            _refuse_without_roles(connection)
        _refuse_while_listening(connection)
        command.upgrade(_config(connection), revision)

    await _run(dsn, run)


async def downgrade(dsn: str, revision: str) -> None:
    """Bring the database back to an older revision; `base` removes all tables with what is in them. Raises
    StoreError while a listener runs."""

    def run(connection: Connection) -> None:
        _refuse_while_listening(connection)
        command.downgrade(_config(connection), revision)

    await _run(dsn, run)


async def current(dsn: str) -> str | None:
    """The revision of the database; None where no migration ever ran."""
    found: list[str | None] = []

    def run(connection: Connection) -> None:
        found.append(MigrationContext.configure(connection).get_current_revision())

    await _run(dsn, run)
    return found[0]


async def check(dsn: str) -> None:
    """Raises SchemaOutdated unless the database has exactly the schema of this version."""
    refuse_other(await current(dsn))


def refuse_other(revision: str | None) -> None:
    """Raises SchemaOutdated unless `revision`, as found in a database, is ours."""
    ours = head()
    if revision == ours:
        return
    if revision is None:
        raise SchemaOutdated("The database has no tables of the listener yet: run `listener db upgrade`.")
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    if revision in known:
        raise SchemaOutdated(
            f"The database is at revision {revision}, and this version needs {ours}:"
            " run `listener db upgrade`."
        )
    raise SchemaOutdated(
        f"The database is at revision {revision}, which this version does not know (its newest is {ours}):"
        " install the version of the listener that upgraded it."
    )


def _refuse_without_roles(connection: Connection) -> None:
    user, may_create = connection.execute(
        text(
            "SELECT quote_ident(current_user), rolsuper OR rolcreaterole FROM pg_roles"
            " WHERE rolname = current_user"
        )
    ).one()
    found = connection.execute(text("SELECT rolname FROM pg_roles")).scalars().all()
    missing = [role for role in ROLES if role not in found]
    if not missing or may_create:
        return
    create = " ".join(f"CREATE ROLE {role} NOLOGIN;" for role in missing)
    raise StoreError(
        f"The user {user} may not create the roles that are missing. Let a superuser run: {create}"
        f" GRANT {', '.join(ROLES)} TO {user}; then run `listener db upgrade` again."
    )


def _refuse_while_listening(connection: Connection) -> None:
    listening = connection.execute(text(WHO)).scalars().all()
    if holder := next((name for name in listening if name.startswith(RUN)), None):
        raise StoreError(f"The tables cannot be changed while {holder} works with them: stop it first.")


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(scripts()).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


async def _run(dsn: str, work: Callable[[Connection], None]) -> None:
    using = engine(dsn)
    try:
        async with using.begin() as connection:
            await connection.run_sync(work)
    except (DBAPIError, OSError) as error:
        raise classified(error) or error from error
    finally:
        await using.dispose()
