"""A1: what a listener costs that opens one SQLAlchemy ORM session, and commits, for each notification.

It is the plain way to write the same thing, and the measure that the goals are stated against: the message
as jsonb, one row for the call that is read, changed and written back, and a row for each change of state. It
does less than the journal does (no participants, no history of userData, no idempotence).
"""

import json
from collections.abc import Callable
from datetime import datetime
from types import TracebackType
from typing import Any, Self

from sqlalchemy import DateTime, ForeignKey, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

CONNECTIONS = 8
"""Notifications that are being written at the same time, at most."""


class _Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSONB, datetime: DateTime(timezone=True)}  # noqa: RUF012 - the ORM's


class _CallRow(_Base):
    __tablename__ = "a1_call"

    id: Mapped[int] = mapped_column(primary_key=True)
    account: Mapped[int] = mapped_column(index=True)
    call_id: Mapped[str] = mapped_column(unique=True)
    state: Mapped[str]
    since: Mapped[datetime]
    user_data: Mapped[dict[str, Any]]


class _NotificationRow(_Base):
    __tablename__ = "a1_notification"

    id: Mapped[int] = mapped_column(primary_key=True)
    call: Mapped[int] = mapped_column(ForeignKey(_CallRow.id))
    at: Mapped[datetime]
    body: Mapped[dict[str, Any]]


class _ChangeRow(_Base):
    __tablename__ = "a1_change"

    id: Mapped[int] = mapped_column(primary_key=True)
    call: Mapped[int] = mapped_column(ForeignKey(_CallRow.id), index=True)
    at: Mapped[datetime]
    before: Mapped[str | None]
    after: Mapped[str]


class OneCommitEach:
    """The ORM's way into one database; enter it to have its tables."""

    def __init__(self, dsn: str, now: Callable[[], datetime]) -> None:
        address = dsn.replace("postgresql://", "postgresql+asyncpg://", 1)
        self._engine: AsyncEngine = create_async_engine(address, pool_size=CONNECTIONS, max_overflow=0)
        self._session = async_sessionmaker(self._engine)
        self._now = now

    async def __aenter__(self) -> Self:
        async with self._engine.begin() as connection:
            await connection.run_sync(_Base.metadata.drop_all)
            await connection.run_sync(_Base.metadata.create_all)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._engine.dispose()

    async def record(self, account: int, raw: bytes) -> None:
        """One notification, one session, one commit."""
        body = json.loads(raw)
        call = body["data"].get("call")
        if call is None:
            return
        async with self._session() as session, session.begin():
            await self._fold(session, account, call, body)

    async def _fold(
        self, session: AsyncSession, account: int, call: dict[str, Any], body: dict[str, Any]
    ) -> None:
        now = self._now()
        row = await session.scalar(select(_CallRow).where(_CallRow.call_id == call["id"]).with_for_update())
        before = None if row is None else row.state
        if row is None:
            row = _CallRow(account=account, call_id=call["id"], state=call["state"], since=now, user_data={})
            session.add(row)
        elif before != call["state"]:
            row.state, row.since = call["state"], now
        if "userData" in call:
            row.user_data = call["userData"] if isinstance(call["userData"], dict) else {}
        await session.flush()
        session.add(_NotificationRow(call=row.id, at=now, body=body))
        if before != call["state"]:
            session.add(_ChangeRow(call=row.id, at=now, before=before, after=call["state"]))
