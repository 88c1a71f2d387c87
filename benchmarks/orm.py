"""The journal's work done the plain way: the same facts in the same tables, by SQLAlchemy's ORM.

One session and one commit for each notification. It asks for the stream's mark, finds the calls that the
message's ids name, folds the message with the same rules, and leaves the rest to the unit of work. What it
does not do is everything that makes the journal quick: batches, COPY, calls kept between transactions.
"""

from typing import Any
from uuid import UUID

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import registry

from listener.core import normalise
from listener.core.calls import Call, Decoded, Heard, Notification, Step
from listener.store import schema
from listener.store.connect import engine

_FIELDS = {field: schema.CALL_COLUMN_OF.get(field, field) for field in Call.__struct_fields__}


class _Mapped:
    """A row, as the ORM makes one from the names of its columns."""

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)


class _Stream(_Mapped):
    position: int


class _Notification(_Mapped):
    pass


class _Call(_Mapped):
    id: int


class _Name(_Mapped):
    pass


class _Change(_Mapped):
    pass


class _Participant(_Mapped):
    pass


_mapped = registry()
for _rows, _table in (
    (_Stream, schema.stream),
    (_Notification, schema.notification),
    (_Call, schema.call),
    (_Name, schema.call_alias),
    (_Change, schema.change),
    (_Participant, schema.participant),
):
    _mapped.map_imperatively(_rows, _table)


class OrmJournal:
    """The ORM's way into a database that has the journal's schema; close it."""

    def __init__(self, dsn: str) -> None:
        self._engine = engine(dsn, pooled=True)
        self._session = async_sessionmaker(self._engine, expire_on_commit=False)

    async def close(self) -> None:
        """Disconnect."""
        await self._engine.dispose()

    async def record(self, heard: Heard, decoded: Decoded) -> None:
        """One notification, one session, one commit; one that is committed already changes nothing."""
        async with self._session() as session, session.begin():
            if await self._is_new(session, heard):
                await self._follow(session, heard, decoded)

    async def _is_new(self, session: AsyncSession, heard: Heard) -> bool:
        stream = await session.get(_Stream, UUID(heard.stream), with_for_update=True)
        if stream is None:
            session.add(
                _Stream(
                    id=UUID(heard.stream),
                    account_id=heard.account,
                    source=heard.source.value,
                    opened_at=heard.received_at,
                    position=heard.position,
                )
            )
            return True
        if heard.position <= stream.position:
            return False
        stream.position = heard.position
        return True

    async def _follow(self, session: AsyncSession, heard: Heard, decoded: Decoded) -> None:
        assert isinstance(decoded, Notification)
        number = await session.scalar(schema.NOTIFICATION_ID.next_value().select())
        assert number is not None
        named = select(schema.call_alias.c.call_id).where(
            schema.call_alias.c.account_id == heard.account,
            schema.call_alias.c.alias.in_(normalise.ids(decoded)),
        )
        found = await session.scalars(select(_Call).where(schema.call.c.id.in_(named)).with_for_update())
        rows = {row.id: row for row in found}
        steps = normalise.Board([_call(row) for row in rows.values()]).hear(number, heard, decoded)
        session.add(
            _Notification(
                received_at=heard.received_at,
                id=number,
                account_id=heard.account,
                stream_id=UUID(heard.stream),
                position=heard.position,
                source=heard.source.value,
                channel=heard.channel,
                message_type=decoded.message_type,
                notification_type=decoded.notification_type,
                call_id=steps[0].call.id if steps else None,
                server_at=decoded.server_at,
                raw=heard.raw,
            )
        )
        for step in steps:
            await self._write(session, heard, number, step, rows.get(step.call.id))

    async def _write(
        self, session: AsyncSession, heard: Heard, number: int, step: Step, row: _Call | None
    ) -> None:
        values = _values(step.call)
        if row is None:
            session.add(_Call(**values))
            for alias in step.call.aliases:
                await session.merge(_Name(alias=alias, account_id=step.call.account, call_id=step.call.id))
        else:
            for name, value in values.items():
                setattr(row, name, value)
        session.add_all(
            _Change(
                call_id=step.call.id,
                notification_id=number,
                ordinal=ordinal,
                at=heard.received_at,
                **msgspec.structs.asdict(change),
            )
            for ordinal, change in enumerate(step.changes)
        )
        for party in step.parties:
            await session.merge(_Participant(call_id=step.call.id, **msgspec.structs.asdict(party)))


def _values(call: Call) -> dict[str, Any]:
    """The columns of a call."""
    plain = msgspec.to_builtins(call, builtin_types=(type(call.opened_at),))
    values = {column: plain[field] for field, column in _FIELDS.items()}
    return values | {
        "participants": msgspec.to_builtins(call.parties),
        "capabilities": sorted(call.capabilities),
        "aliases": list(call.aliases),
    }


def _call(row: _Call) -> Call:
    return msgspec.convert({field: getattr(row, column) for field, column in _FIELDS.items()}, Call)
