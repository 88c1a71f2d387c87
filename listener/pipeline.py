"""JOINS: deliveries -> decode -> journal (which normalises) -> acknowledge -> observers.

Group commit without a timer: each transaction takes whatever piled up while the one before it was being
written, so that a lone notification waits for nobody and a burst is written in few large batches. Several
writers share the accounts among them; one account has one writer, so its messages stay in order.

Nothing is acknowledged before its transaction has committed. While the store does not answer, batches stay
where they are and are tried again. What was heard is always taken, since its session counts it as had; the
backlog is bounded by not asking for more: while it is full `hear` does not return. A session that
acknowledges keeps itself alive meanwhile, with the old acknowledgement.

This module reaches the world only through the protocols that it declares.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from msgspec import Struct

from listener.core.calls import Entry, Heard, Recorded
from listener.core.decode import decode
from listener.errors import StoreUnavailable

BACKLOG_BYTES_MAX = 64 * 1024 * 1024
"""Raw bytes heard and not yet committed; at the bound, `hear` waits and the sessions stop asking. What is
over it is at most one delivery of each session."""

BATCH_MAX = 2000
"""Messages in one transaction: more would not be faster, and would keep its locks longer."""

WRITERS = 4
"""Transactions under way at the same time: while some wait for the database, another one's batch is decoded
and folded. More than four bring nothing (measured on two cores)."""

RETRY_S = 0.1
RETRY_S_MAX = 5.0
"""Between two attempts on a store that does not answer: doubled each time, up to this."""


class Journal(Protocol):
    """What the pipeline needs of the store; `listener.store.journal.Journal` has it."""

    async def record(self, entries: Sequence[Entry]) -> Recorded:
        """Commits a batch, or raises `StoreUnavailable`: then the same batch is handed in again."""


class Observer(Protocol):
    """Who is told about the work of the pipeline, on the event loop and without waiting."""

    def recorded(self, recorded: Recorded, seconds: float) -> None:
        """A batch was committed, which took so long."""

    def store_failed(self, error: StoreUnavailable) -> None:
        """The store did not take a batch; it will be tried again."""

    def backlog(self, notifications: int, size_bytes: int) -> None:
        """So much is heard and not yet committed."""


class _Waiting(Struct):
    """One delivery: committed as a whole, even if in several transactions."""

    heard: list[Heard]
    committed: Callable[[], None]
    size_bytes: int


class Pipeline:
    """Takes what the sessions hear to the journal. `run` it in a task; cancel it after `drain`.

    `run` raises what `Journal.record` raises besides `StoreUnavailable`: that is a bug, and since nothing of
    the batch was acknowledged, a restart loses nothing.
    """

    def __init__(
        self,
        journal: Journal,
        observer: Observer,
        *,
        writers: int = WRITERS,
        batch_max: int = BATCH_MAX,
        backlog_bytes_max: int = BACKLOG_BYTES_MAX,
        clock: Callable[[], float] = time.perf_counter,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._journal = journal
        self._observer = observer
        self._batch_max = batch_max
        self._backlog_bytes_max = backlog_bytes_max
        self._clock = clock
        self._pause = pause
        self._queues: list[deque[_Waiting]] = [deque() for _ in range(writers)]
        self._filled = [asyncio.Event() for _ in range(writers)]
        self._room = asyncio.Event()
        self._room.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.backlog_bytes = 0
        self.backlog_notifications = 0
        self.available = True
        """False while the store does not answer."""

    async def hear(self, heard: Sequence[Heard], committed: Callable[[], None]) -> None:
        """Takes messages of one account, in order; returns when there is room for more.

        They are taken at once, whatever the backlog: who gives up the wait gives up no message. `committed`
        is called on the event loop once all of them are durable.
        """
        size_bytes = sum(len(one.raw) for one in heard)
        writer = heard[0].account % len(self._queues)
        self._queues[writer].append(_Waiting(list(heard), committed, size_bytes))
        self._count(len(heard), size_bytes)
        self._filled[writer].set()
        await self._room.wait()

    async def run(self) -> None:
        """Writes until cancelled."""
        async with asyncio.TaskGroup() as writers:
            for number in range(len(self._queues)):
                writers.create_task(self._write(number), name=f"writer-{number}")

    async def drain(self) -> None:
        """Returns when everything that was heard is committed; bound it with a timeout."""
        await self._idle.wait()

    async def _write(self, number: int) -> None:
        queue, filled = self._queues[number], self._filled[number]
        while True:
            _end_if_cancelled()
            await filled.wait()
            taken: list[_Waiting] = []
            size = 0
            while queue and (not taken or size + len(queue[0].heard) <= self._batch_max):
                taken.append(queue.popleft())
                size += len(taken[-1].heard)
            if not queue:
                filled.clear()
            entries = [Entry(one, decode(one.raw, one.channel)) for each in taken for one in each.heard]
            for start in range(0, len(entries), self._batch_max):
                await self._commit(entries[start : start + self._batch_max])
            for each in taken:
                each.committed()
                self._count(-len(each.heard), -each.size_bytes)

    async def _commit(self, entries: list[Entry]) -> None:
        """Returns when the entries are durable, however often that must be tried."""
        wait_s = RETRY_S
        while True:
            began = self._clock()
            try:
                recorded = await self._journal.record(entries)
            except StoreUnavailable as error:
                _end_if_cancelled()
                self.available = False
                self._observer.store_failed(error)
                await self._pause(wait_s)
                wait_s = min(wait_s * 2, RETRY_S_MAX)
            else:
                self.available = True
                self._observer.recorded(recorded, self._clock() - began)
                return

    def _count(self, notifications: int, size_bytes: int) -> None:
        self.backlog_notifications += notifications
        self.backlog_bytes += size_bytes
        if self.backlog_bytes < self._backlog_bytes_max:
            self._room.set()
        else:
            self._room.clear()
        if self.backlog_notifications:
            self._idle.clear()
        else:
            self._idle.set()
        self._observer.backlog(self.backlog_notifications, self.backlog_bytes)


def _end_if_cancelled() -> None:
    """A driver may answer a cancellation with the failure of the connection that it broke. Nobody cancels
    twice, so a task that took it for a failure would go on for ever."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
