"""How anybody here reaches a database, and which of its refusals may pass by themselves.

A DSN is a libpq URL (or empty, then the PG* environment variables say where), and asyncpg alone reads it,
also for SQLAlchemy: so the write side and the read side cannot disagree about what a DSN means.

The write side talks to PostgreSQL in its own form of moments and JSON (`speak_plainly`).

`classified` is the one place that knows PostgreSQL's error codes. What may succeed later becomes
StoreUnavailable; a missing table becomes SchemaOutdated; what no retry mends becomes StoreError.
"""

import socket
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from listener.errors import SchemaOutdated, StoreError, StoreUnavailable

Connection = asyncpg.Connection | PoolConnectionProxy
"""A connection of our own, or one that a pool lent."""

CONNECT_S_MAX = 10
"""A database that does not accept a connection within this is unavailable."""

SEND_BUFFER_BYTES = 2**19
"""What a local connection of the write side takes before PostgreSQL has read it: asyncpg sends COPY in pieces
of this size. Linux gives 208 KiB unless asked; asked, twice as much, up to twice net.core.wmem_max, which is
416 KiB where nobody has raised it."""

POOLED_CONNECTIONS_MAX = 15
POOLED_CONNECTIONS_KEPT = 5
"""Of a pool for questions; who comes beyond it waits for one, up to SQLAlchemy's 30 s."""

PASSING = (
    "08",  # connection exceptions
    "25006",  # read-only: a standby, or a primary that was demoted
    "40",  # deadlock, serialization failure: the transaction is rolled back, and may be tried again
    "53",  # out of connections, memory or disk
    "55P03",  # a lock was not to be had in time
    "57",  # shutdown, crash, starting up, cancelled
    "58",  # the server's disk or files
)
"""SQLSTATE classes and codes that may be gone at the next attempt (PostgreSQL, appendix A)."""

MISSING = ("42P01", "42703", "42883", "42704")
"""Undefined table, column, function or object: another schema than ours."""


def engine(dsn: str, *, settings: Mapping[str, str] | None = None, pooled: bool = False) -> AsyncEngine:
    """A SQLAlchemy engine whose connections asyncpg makes from the DSN; `settings` are server parameters.

    Dispose of it. Without a pool each use is a connection of its own.
    """

    async def connect() -> asyncpg.Connection:
        return await asyncpg.connect(dsn or None, timeout=CONNECT_S_MAX, server_settings=dict(settings or {}))

    pool: dict[str, Any] = {"poolclass": NullPool}
    if pooled:
        more = POOLED_CONNECTIONS_MAX - POOLED_CONNECTIONS_KEPT
        pool = {"pool_pre_ping": True, "pool_size": POOLED_CONNECTIONS_KEPT, "max_overflow": more}
    return create_async_engine("postgresql+asyncpg://", async_creator=connect, **pool)


async def speak_plainly(connection: asyncpg.Connection) -> None:
    """On this connection a `timestamptz` is an int (`microseconds`) and a `json` is bytes, both ways.

    That is how PostgreSQL sends them; asyncpg's own conversion of a datetime takes ten times as long as that
    of any other value (measured: 0.7 us against 0.05), and was a tenth of all that a message cost.
    """
    await connection.set_builtin_type_codec("timestamptz", schema="pg_catalog", codec_name="int8")
    await connection.set_builtin_type_codec("json", schema="pg_catalog", codec_name="bytea")


def take_whole_pieces(connection: asyncpg.Connection) -> None:
    """Lets a local connection take a whole piece of COPY at once, or as much of it as the system allows.

    What does not fit waits until the event loop has time for it, and PostgreSQL waits with it, since what is
    to follow is being folded meanwhile (measured: 6 to 10 % of the time of batches of 2,000, and 7 % with
    the 416 KiB of a system as it comes). The buffers of TCP grow by themselves (tcp(7), tcp_wmem).
    """
    # asyncpg has no public way to the socket. Should it move, a test says so, and batches are slower.
    transport = getattr(connection, "_transport", None)
    plug = transport.get_extra_info("socket") if transport is not None else None
    if plug is not None and plug.family == socket.AF_UNIX:
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)


_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def microseconds(at: datetime) -> int:
    """Microseconds since the beginning of the year 2000, UTC: PostgreSQL's own form of a moment."""
    return (at - _EPOCH) // _MICROSECOND


def moment(value: int) -> datetime:
    """The moment that `microseconds` came from, in UTC."""
    return _EPOCH + timedelta(microseconds=value)


def classified(error: BaseException) -> StoreError | None:
    """Our error for one of asyncpg's, SQLAlchemy's or the operating system's; None for what is not theirs."""
    if isinstance(error, StoreError):
        return error
    if isinstance(error, DBAPIError):
        cause = error.orig.__cause__ if error.orig is not None else None
        return classified(cause) if cause is not None else StoreError(f"PostgreSQL refused: {error.orig}.")
    if isinstance(error, asyncpg.PostgresError):
        return _refusal(error)
    if isinstance(error, ssl.SSLError):
        return StoreError(f"PostgreSQL: TLS failed: {error}. Look at sslmode and sslrootcert of the DSN.")
    if isinstance(error, asyncpg.ClientConfigurationError):
        return StoreError(f"The DSN cannot be used: {error}.")
    if isinstance(error, ConnectionRefusedError | FileNotFoundError | socket.gaierror):
        return StoreUnavailable(f"PostgreSQL does not answer: {error}. Is it up, and is store.dsn right?")
    if isinstance(error, OSError | TimeoutError | asyncpg.InterfaceError | asyncpg.InternalClientError):
        # The last two are what asyncpg says of a connection that was closed, or was ended by the server.
        return StoreUnavailable(f"PostgreSQL does not answer: {str(error) or type(error).__name__}.")
    return None


def _refusal(error: asyncpg.PostgresError) -> StoreError:
    code = str(error.sqlstate or "")
    if code.startswith(PASSING):
        return StoreUnavailable(f"PostgreSQL cannot now: {error} ({code}).")
    if code in MISSING:
        return SchemaOutdated(f"The database lacks something ({error}): run `listener db upgrade`.")
    if code == "22023" and "role" in str(error):
        return SchemaOutdated(f"The database lacks our roles ({error}): run `listener db upgrade`.")
    cure = error.hint or ""
    if code == "42501" and not cure:
        cure = "Grant the login listener_writer for `run`, and listener_auditor for questions."
    return StoreError(f"PostgreSQL refused: {error} ({code}). {cure}".rstrip())
