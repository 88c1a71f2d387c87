"""What an account hears, as messages for the journal: a line with its own stream, positions and clock."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

from listener.core.calls import Heard, Source
from tests.core import messages

T0 = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)
"""When every line begins."""


class Line:
    """One session of one account. Each message comes one second after the one before."""

    def __init__(self, account: int = 1, *, began: datetime = T0) -> None:
        self.account = account
        self.stream = str(uuid4())
        self.position = 0
        self.at = began

    def hear(self, raw: bytes, *, channel: str = messages.CHANNEL) -> Heard:
        """The next message, whatever its bytes."""
        self.position += 1
        self.at += timedelta(seconds=1)
        return Heard(self.account, self.stream, self.position, self.at, channel, raw)

    def call(self, *states: str, id: str = messages.UUID, **fields: Any) -> list[Heard]:
        """The messages of one call that goes through these states."""
        conn_id = fields.pop("connId", f"conn-{id}")
        return [self.hear(messages.message(state, id=id, connId=conn_id, **fields)) for state in states]

    def snapshot(self, *calls: messages.JsonObject, asked_s_ago: float = 0.5) -> Heard:
        """A REST reply that lists the live calls; a stream of its own, as each snapshot is."""
        self.at += timedelta(seconds=1)
        raw = messages.snapshot(*calls)
        return Heard(
            account=self.account,
            stream=str(uuid4()),
            position=1,
            received_at=self.at,
            channel="/api/v2/me/calls",
            raw=raw,
            source=Source.SNAPSHOT,
            asked_at=self.at - timedelta(seconds=asked_s_ago),
        )
