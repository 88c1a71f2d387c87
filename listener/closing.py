"""Calls without an end: finds those whose end was waited for long enough, and has them closed.

A call's end may never be heard: its account was removed, the snapshot that would have shown it was refused,
the server forgot it. And a call that has ended may wait for ever for the end of its wrap-up, since not every
server tells it. Both would stay unsettled, and a question for live calls, or for final figures, would never
have an answer.

What is found here is not written into the calls. It becomes a message of our own in the journal (`Closing`),
which goes the way of all messages and is folded like them; so whatever else was heard of a call meanwhile
comes first, and the calls still follow from the journal alone. No time and no duration is made up: a call
that is closed like this says why, and has no end.

This module decides only how long is long enough, and how much is done at once. It meets the world through
the protocols that it declares.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from itertools import groupby
from operator import itemgetter
from typing import Protocol
from uuid import uuid4

import structlog

from listener.core.calls import Closing, Heard, Source
from listener.core.decode import encode_closing
from listener.errors import StoreError

EVERY_S = 300.0
"""How often calls without an end are looked for."""

CALLS_MAX = 1000
"""Calls of each kind that are looked up at once; when there are more, the next ones follow as soon as these
are stored."""

CHANNEL = "listener/closing"
"""The channel of our own messages."""


class Journal(Protocol):
    """What is needed of the store; `listener.store.journal.Journal` has it."""

    async def unsettled(
        self, silent_since: datetime, released_before: datetime, count_max: int
    ) -> Sequence[tuple[int, int]]:
        """Accounts and ids of calls that wait for an end, those of one account together; of either kind
        `count_max` at most. Raises `StoreError`."""


class Pipeline(Protocol):
    """The way into the journal; `listener.pipeline.Pipeline` has it."""

    async def hear(self, heard: Sequence[Heard], committed: Callable[[], None]) -> None:
        """Takes messages of one account; `committed` is called when they are durable."""


class Closer:
    """Closes calls without an end; `run` it in a task, once the accounts are known to the journal.

    A call is closed when nothing was heard of it for `call_hours_max` hours. One that has ended is settled
    when the wrap-up time that the server named, and `wrap_up_s_max` seconds more, have passed.
    """

    def __init__(
        self,
        journal: Journal,
        pipeline: Pipeline,
        *,
        call_hours_max: float,
        wrap_up_s_max: float,
        wall: Callable[[], datetime],
        every_s: float = EVERY_S,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._journal = journal
        self._pipeline = pipeline
        self._silence = timedelta(hours=call_hours_max)
        self._wrap_up = timedelta(seconds=wrap_up_s_max)
        self._reason = f"not heard of for {call_hours_max:g} h"
        self._wall = wall
        self._every_s = every_s
        self._pause = pause
        self._log = structlog.get_logger()

    async def run(self) -> None:
        """Looks now and every `every_s` seconds, until cancelled; what the store refuses waits for the next
        time."""
        while True:
            try:
                await self.look()
            except StoreError as error:
                self._log.warning("calls without an end not looked for", error=str(error))
            await self._pause(self._every_s)

    async def look(self) -> None:
        """Closes whatever is due, and returns when that is stored. Raises `StoreError`."""
        before: Sequence[tuple[int, int]] = ()
        while True:
            at = self._wall()
            found = await self._journal.unsettled(at - self._silence, at - self._wrap_up, CALLS_MAX)
            # The same again: for whatever reason, closing them does not help, and insisting would not either.
            if not found or found == before:
                return
            await self._close(found, at)
            self._log.info("calls without an end closed", calls=len(found))
            if len(found) < CALLS_MAX:
                return
            before = found

    async def _close(self, found: Sequence[tuple[int, int]], at: datetime) -> None:
        """Returns when a message for each account is durable."""
        stored: list[asyncio.Event] = []
        for account, calls in groupby(found, key=itemgetter(0)):
            stored.append(asyncio.Event())
            heard = Heard(
                account=account,
                stream=str(uuid4()),
                position=1,
                received_at=at,
                channel=CHANNEL,
                raw=encode_closing(Closing(tuple(id for _, id in calls), self._reason)),
                source=Source.LISTENER,
                asked_at=at - self._silence,
            )
            await self._pipeline.hear([heard], stored[-1].set)
        for event in stored:
            await event.wait()
