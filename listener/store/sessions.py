"""The Bayeux sessions that a restart may go on with: one row an account, and no more than is needed.

A row is a credential: whoever reads it can take the session over. So it stands in a table of its own, which
only the writer's role may read, and it is gone as soon as its session is. It is written and deleted in the
transaction that says what became of the account's coverage: so where an account counts as observed, the
session that observed it is the one that is kept.

What a session's messages are is not known here; how far they are stored stands in the stream's row, which is
read with it.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from listener.core.session import Cookie, Kept, Saved
from listener.store.connect import Connection, microseconds, moment


class _Credentials(Struct, frozen=True):
    """The part of `Kept` that is stored as one JSON value."""

    cookies: tuple[Cookie, ...]
    token: tuple[tuple[str, str], ...]


_ENCODE = msgspec.json.Encoder().encode
_DECODER = msgspec.json.Decoder(_Credentials)


async def write(connection: Connection, sessions: Mapping[int, Saved | None]) -> None:
    """What each account's session is resumed with from now on; None forgets it.

    The transaction holds the rows of the accounts. How far the messages are stored is the stream's to say.
    """
    over = [account for account, saved in sessions.items() if saved is None]
    rows = [_row(account, saved) for account, saved in sorted(sessions.items()) if saved is not None]
    if over:
        await connection.execute(FORGET, over)
    if rows:
        await connection.executemany(_WRITE, rows)


def _row(account: int, saved: Saved) -> tuple[Any, ...]:
    kept = saved.kept
    credentials = _ENCODE(_Credentials(kept.cookies, kept.token))
    return (
        *(account, kept.stream, kept.client_id, kept.ack, kept.connection_type, kept.max_interval_s),
        *(list(kept.channels), kept.owner, credentials, microseconds(saved.saved_at)),
    )


async def read(connection: Connection, accounts: list[int]) -> dict[int, Saved]:
    """The sessions of those accounts that have one, and how far the messages of each are stored."""
    found: dict[int, Saved] = {}
    for row in await connection.fetch(_READ, accounts):
        credentials = _DECODER.decode(row["credentials"])
        kept = Kept(
            stream=str(row["stream_id"]),
            client_id=row["client_id"],
            ack=row["acknowledges"],
            connection_type=row["connection_type"],
            max_interval_s=row["max_interval_s"],
            channels=tuple(row["channels"]),
            owner=row["owner"],
            cookies=credentials.cookies,
            token=credentials.token,
        )
        batch = None if row["batch"] is None else (row["batch"], row["batch_position"])
        found[row["account_id"]] = Saved(kept, moment(row["saved_at"]), row["position"] or 0, batch)
    return found


FORGET = "DELETE FROM bayeux_session WHERE account_id = ANY($1)"
"""The sessions of the accounts are over."""

_WRITE = """
    INSERT INTO bayeux_session (account_id, stream_id, client_id, acknowledges, connection_type,
        max_interval_s, channels, owner, credentials, saved_at)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
    ON CONFLICT (account_id) DO UPDATE SET
        stream_id = excluded.stream_id, client_id = excluded.client_id,
        acknowledges = excluded.acknowledges, connection_type = excluded.connection_type,
        max_interval_s = excluded.max_interval_s, channels = excluded.channels, owner = excluded.owner,
        credentials = excluded.credentials, saved_at = excluded.saved_at"""

_READ = """
    SELECT b.*, s.position, s.batch, s.batch_position
    FROM bayeux_session b LEFT JOIN stream s ON s.id = b.stream_id
    WHERE b.account_id = ANY($1)"""
