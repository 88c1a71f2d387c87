"""Which refusals may pass by themselves: a wrong answer loses messages, or retries for ever."""

import ssl

import asyncpg
import pytest
from sqlalchemy import text

from listener.errors import SchemaOutdated, StoreError, StoreUnavailable
from listener.store.connect import classified, engine, microseconds, moment
from tests.store.line import T0


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (asyncpg.CannotConnectNowError("the database system is starting up"), StoreUnavailable),
        (asyncpg.AdminShutdownError("terminating connection"), StoreUnavailable),
        (asyncpg.ConnectionDoesNotExistError("connection was closed"), StoreUnavailable),
        (asyncpg.ReadOnlySQLTransactionError("a standby"), StoreUnavailable),
        (asyncpg.DeadlockDetectedError("deadlock"), StoreUnavailable),
        (asyncpg.SerializationError("could not serialize"), StoreUnavailable),
        (asyncpg.TooManyConnectionsError("too many clients"), StoreUnavailable),
        (asyncpg.DiskFullError("no space left"), StoreUnavailable),
        (asyncpg.LockNotAvailableError("lock timeout"), StoreUnavailable),
        (asyncpg.InterfaceError("connection is closed"), StoreUnavailable),
        (asyncpg.InternalClientError("another operation is in progress"), StoreUnavailable),
        (ConnectionRefusedError(111, "refused"), StoreUnavailable),
        (TimeoutError(), StoreUnavailable),
        (asyncpg.UndefinedTableError("relation does not exist"), SchemaOutdated),
        (asyncpg.UndefinedColumnError("column does not exist"), SchemaOutdated),
        (asyncpg.InvalidParameterValueError('role "listener_writer" does not exist'), SchemaOutdated),
        (asyncpg.InvalidPasswordError("password authentication failed"), StoreError),
        (asyncpg.InvalidCatalogNameError("database does not exist"), StoreError),
        (asyncpg.CheckViolationError("violates"), StoreError),
        (asyncpg.ClientConfigurationError("invalid DSN"), StoreError),
        (ssl.SSLCertVerificationError("self-signed"), StoreError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_each_refusal_has_its_answer(error: Exception, kind: type[StoreError]) -> None:
    """Exactly this class, and the server's own words in it."""
    ours = classified(error)
    assert type(ours) is kind
    assert str(error) in str(ours)


def test_what_is_not_the_databases_is_not_taken_for_it() -> None:
    """A bug stays a bug; an error of ours stays as it is."""
    assert classified(KeyError("x")) is None
    ours = StoreError("ours")
    assert classified(ours) is ours


async def test_errors_through_sqlalchemy_are_the_same(database: str) -> None:
    """It wraps the driver's errors twice; what is inside counts."""
    using = engine(database)
    with pytest.raises(Exception, match="nowhere") as raised:
        async with using.connect() as connection:
            await connection.execute(text("SELECT * FROM nowhere"))
    await using.dispose()
    assert type(classified(raised.value)) is SchemaOutdated


def test_a_moment_survives_to_the_microsecond() -> None:
    """PostgreSQL's form of it and back, also before its epoch."""
    for at in (T0, T0.replace(year=1970, microsecond=1), T0.replace(year=9999, microsecond=999_999)):
        assert moment(microseconds(at)) == at
