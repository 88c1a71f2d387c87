"""One listener for a database: two of them would store every message twice, and contradict each other about
what was observed.

The claim is a PostgreSQL advisory lock, held by a connection of its own for as long as the process lives: it
ends with the connection, so that nothing needs cleaning up after a crash. It guards against a mistake, a
second `listener run` with the same settings, and is no election: whoever comes second is told who is there.
"""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Self

import asyncpg

from listener.errors import StoreError
from listener.store.connect import CONNECT_S_MAX, classified

LOCK = 0x6C697374656E6572
"""The advisory lock's number: "listener" in ASCII. Advisory locks are apart for each database."""

TAKE_S_MAX = 5.0
TAKE_RETRY_S = 0.2
"""How long a claim waits for one whose holder has just been killed, and between two looks."""

_HELD = f"""l.locktype = 'advisory' AND l.granted AND l.database = (
        SELECT oid FROM pg_database WHERE datname = current_database())
    AND l.classid = {LOCK >> 32} AND l.objid = {LOCK & 0xFFFF_FFFF}"""  # noqa: S608 - text of this module
"""Of a row `l` of pg_locks."""

IS_HELD = f"EXISTS (SELECT FROM pg_locks l WHERE {_HELD})"
"""A condition in SQL: a listener runs on this database. Any role may ask."""

RUN = "listener run"
"""What the name of a connection that holds a claim begins with; a migration holds the lock under another."""

WHO = f"""
    SELECT a.application_name FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
    WHERE {_HELD}"""  # noqa: S608 - text of this module
"""The names of the connections that hold the lock."""


class Claim:
    """A claim that is held. Made by `take`; ends with `release`, or when the connection is `lost`."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection
        self._lost = asyncio.Event()
        connection.add_termination_listener(lambda _: self._lost.set())

    @classmethod
    async def take(
        cls,
        dsn: str,
        *,
        take_s: float = TAKE_S_MAX,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> Self:
        """Claims the database, waiting up to `take_s` seconds for another that is just ending.

        Raises StoreUnavailable when the database does not answer, StoreError that names the holder when there
        is one.
        """
        name = f"{RUN} (pid {os.getpid()} on {socket.gethostname()})"
        settings = {
            "application_name": name[:63],
            # A host that lost its power says nothing; by these its claim ends after half a minute.
            "tcp_keepalives_idle": "10",
            "tcp_keepalives_interval": "5",
            "tcp_keepalives_count": "4",
        }
        try:
            connection = await asyncpg.connect(dsn or None, timeout=CONNECT_S_MAX, server_settings=settings)
            try:
                waited_s = 0.0
                while not await connection.fetchval("SELECT pg_try_advisory_lock($1)", LOCK):
                    if waited_s >= take_s:
                        break
                    await pause(TAKE_RETRY_S)
                    waited_s += TAKE_RETRY_S
                else:
                    return cls(connection)
                holder = await connection.fetchval(WHO) or "a process of another database user"
            except BaseException:
                connection.terminate()
                raise
        except Exception as error:
            raise classified(error) or error from error
        connection.terminate()
        raise StoreError(
            f"Another listener writes to this database: {holder}. Stop it, or give this one its own."
        )

    async def lost(self) -> None:
        """Returns when the claim's connection has ended, and the claim with it: take it again."""
        await self._lost.wait()

    async def release(self) -> None:
        """Gives the claim up."""
        self._connection.terminate()
