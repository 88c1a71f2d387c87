"""JOINS: deliveries -> decode -> journal (which normalises) -> acknowledge -> observers.

Group commit without a timer: each transaction takes whatever piled up while the one before it was being
written, so that a lone notification waits for nobody and a burst is written in few large batches. Several
writers share the accounts among them; one account has one writer, so its messages stay in order.

Nothing is acknowledged before its transaction has committed. While the store does not answer, batches stay
where they are and are tried again. What was heard is always taken, since its session counts it as had; the
backlog is bounded by not asking for more: while it is full `hear` does not return. A session that
acknowledges keeps itself alive meanwhile, with the old acknowledgement.

A session that does not acknowledge has its messages from the server for good, and a crash would lose those
that wait in memory. So when the store has been silent for a while, or the backlog grows, what waits goes to
the spool on disk, and only its place is remembered. It is committed from there, in the same order and by the
same writers, before anything that is newer. Being spooled acknowledges nothing: only a commit does.

What is damaged when it is read back is lost, and that is told (`lost`) before anything newer of its account
is committed, and before the spool lets go of it: a crash in between only means that it is told again.

This module reaches the world only through the protocols that it declares.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import Protocol

from msgspec import Struct

from listener.core.calls import Heard, Missing, Recorded
from listener.errors import SpoolFull, StoreUnavailable

BACKLOG_BYTES_MAX = 64 * 1024 * 1024
"""Raw bytes in memory, heard and not yet committed; at the bound, `hear` waits and the sessions stop asking.
What is over it is at most one delivery of each session."""

BATCH_MAX = 2000
"""Messages in one transaction: more would not be faster, and would keep its locks longer."""

BATCH_BYTES_MAX = 16 * 1024 * 1024
"""Raw bytes in one transaction, or a single delivery that has more: what a writer holds in its hand does not
count as backlog when it comes from the spool."""

WRITERS = 8
"""Transactions under way at the same time: while some wait for the database, another one's batch is decoded
and folded. Eight do 8 % more than four in batches of 500, as many in batches of 2,000, and ten do no more
(measured on two cores)."""

RETRY_S = 0.1
RETRY_S_MAX = 5.0
"""Between two attempts on a store that does not answer: doubled each time, up to this."""

SPOOL_AFTER_S = 2.0
"""A store that has not answered for so long is away: what waits for it goes to the spool. A restart or a
failover that is quicker costs no write to disk."""

SPOOL_SHARE = 0.5
"""Of the backlog's bound: what is above it goes to the spool, however well the store may do."""

SPOOL_BYTES_AT_ONCE = 1024 * 1024
"""Raw bytes that are written and fsynced together; a single delivery may be larger."""

SPOOL_RETRY_S = 1.0
"""Between two attempts on a spool that is full or cannot be written."""

Place = tuple[int, int, int]
"""Where the spool has a delivery; only the spool knows what the numbers mean."""


class Journal(Protocol):
    """What the pipeline needs of the store; `listener.store.journal.Journal` has it."""

    async def record(self, heard: Sequence[Heard]) -> Recorded:
        """Commits a batch, or raises `StoreUnavailable`: then the same batch is handed in again."""


class Observer(Protocol):
    """Who is told about the work of the pipeline, on the event loop and without waiting."""

    def recorded(self, recorded: Recorded, seconds: float) -> None:
        """A batch was committed, which took so long."""

    def store_failed(self, error: StoreUnavailable) -> None:
        """The store did not take a batch; it will be tried again."""

    def backlog(self, notifications: int, size_bytes: int) -> None:
        """So much is heard and not yet committed."""


class Left(Protocol):
    """A delivery that an earlier run left in the spool."""

    @property
    def place(self) -> Place:
        """Where it is."""

    @property
    def account(self) -> int:
        """Whose messages it holds."""

    @property
    def notifications(self) -> int:
        """How many."""

    @property
    def until(self) -> datetime:
        """All of them were received by then."""


class Lost(Protocol):
    """What an earlier run left in the spool, and is damaged."""

    @property
    def places(self) -> Sequence[Place]:
        """Where it is."""

    @property
    def missing(self) -> Sequence[Missing]:
        """What it may have been."""


Losing = Callable[[Sequence[Missing], bool], Awaitable[None]]
"""Who is told what is missing, and whether an earlier run had heard it; returns when that is durable."""


class Spool(Protocol):
    """What the pipeline needs of the spool; `listener.store.spool.Spool` has it. Methods may block: they are
    called in threads."""

    size_bytes: int

    def left(self) -> Sequence[Left]:
        """What an earlier run left, in the order in which it was heard; asked once."""

    def lost(self) -> Lost:
        """What of it is damaged; asked once, and released when it is told."""

    @property
    def oldest(self) -> datetime | None:
        """About when the oldest message in it was received."""

    def append(self, deliveries: Sequence[Sequence[Heard]]) -> Sequence[Place]:
        """Puts deliveries on disk, all or none; raises `SpoolFull` when it cannot now."""

    def read(self, places: Sequence[Place]) -> Sequence[list[Heard] | None]:
        """Gives them back; None for one that is damaged and was set aside."""

    def release(self, places: Sequence[Place]) -> None:
        """They are needed no more."""


class Spooling(Struct, frozen=True):
    """How it stands with the spool."""

    notifications: int
    """In it, and not yet committed."""
    size_bytes: int
    oldest: datetime | None
    drained: int
    """Notifications committed from it since the start."""
    set_aside: int
    """Deliveries that were damaged when they were read back, since the start."""
    trouble: str
    """Why it takes no more; empty while it does, or need not."""


class _Waiting(Struct):
    """One delivery: committed as a whole, even if in several transactions."""

    heard: list[Heard] | None
    """None while only the spool has it."""
    account: int
    until: datetime
    """When the last of them was received, at the latest."""
    committed: Callable[[], None]
    notifications: int
    size_bytes: int
    place: Place | None = None
    done: bool = False
    """Committed."""


class _Lane:
    """The deliveries of one writer's accounts, in the order in which they were heard."""

    __slots__ = ("filled", "queue", "silent", "since", "spooled", "taken")

    def __init__(self) -> None:
        self.spooled: deque[_Waiting] = deque()
        """On disk; all of them older than those of the queue, which need not be searched through them."""
        self.queue: deque[_Waiting] = deque()
        self.taken: list[_Waiting] = []
        """Being written to the store; older than both."""
        self.filled = asyncio.Event()
        self.since: float | None = None
        """When the store was asked; None when it has answered."""
        self.silent = False
        """It has not answered for too long."""


class Pipeline:
    """Takes what the sessions hear to the journal. `run` it in a task; cancel it after `drain`.

    `run` raises what `Journal.record` raises besides `StoreUnavailable`: that is a bug, and since nothing of
    the batch was acknowledged, a restart loses nothing. With a `spool`, what an earlier run left in it is
    committed first, and `spooling` is told on the event loop whenever something about it changes; `lost` is
    told what was damaged in it.
    """

    def __init__(
        self,
        journal: Journal,
        observer: Observer,
        *,
        spool: Spool | None = None,
        spooling: Callable[[Spooling], None] = lambda _: None,
        lost: Losing | None = None,
        writers: int = WRITERS,
        batch_max: int = BATCH_MAX,
        backlog_bytes_max: int = BACKLOG_BYTES_MAX,
        spool_after_s: float = SPOOL_AFTER_S,
        clock: Callable[[], float] = time.perf_counter,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._journal = journal
        self._observer = observer
        self._spool = spool
        self._spooling = spooling
        self._losing = lost
        self._batch_max = batch_max
        self._backlog_bytes_max = backlog_bytes_max
        self._spool_bytes = backlog_bytes_max * SPOOL_SHARE if spool is not None else math.inf
        self._spool_after_s = spool_after_s
        self._clock = clock
        self._pause = pause
        self._lanes = [_Lane() for _ in range(writers)]
        self._room = asyncio.Event()
        self._room.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._settled = asyncio.Event()
        self._alarm: asyncio.TimerHandle | None = None
        self._at_risk = asyncio.Event()
        self._securing = False
        self._secured = asyncio.Event()
        self._drained = 0
        self._set_aside = 0
        self.backlog_bytes = 0
        """In memory."""
        self.backlog_notifications = 0
        """In memory and in the spool."""
        self.spooled_notifications = 0
        self.spool_trouble = ""
        """Why the spool takes no more, for a person; empty while it does, or need not."""
        self.available = True
        """False while the store does not answer."""
        for left in spool.left() if spool is not None else ():
            lane = self._lanes[left.account % writers]
            waiting = _Waiting(None, left.account, left.until, _nobody, left.notifications, 0, left.place)
            lane.spooled.append(waiting)
            lane.filled.set()
            self.spooled_notifications += left.notifications
        self._count(self.spooled_notifications, 0)
        self._tell()

    async def hear(self, heard: Sequence[Heard], committed: Callable[[], None]) -> None:
        """Takes messages of one account, in order; returns when there is room for more.

        They are taken at once, whatever the backlog: who gives up the wait gives up no message. `committed`
        is called on the event loop once all of them are durable in the store.
        """
        size_bytes = sum(len(one.raw) for one in heard)
        lane = self._lanes[heard[0].account % len(self._lanes)]
        last = heard[-1].received_at
        lane.queue.append(_Waiting(list(heard), heard[0].account, last, committed, len(heard), size_bytes))
        self._count(len(heard), size_bytes)
        lane.filled.set()
        if lane.silent:
            self._at_risk.set()
        await self._room.wait()

    async def run(self) -> None:
        """Writes until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                if self._spool is not None:
                    tasks.create_task(self._save(self._spool), name="spool")
                    await self._settle(self._spool)
                self._settled.set()
                for number, lane in enumerate(self._lanes):
                    tasks.create_task(self._write(lane), name=f"writer-{number}")
        finally:
            if self._alarm is not None:
                self._alarm.cancel()

    async def drain(self) -> None:
        """Returns when all that was heard is committed, or told to be lost; bound it with a timeout."""
        await self._settled.wait()
        await self._idle.wait()

    async def secure(self) -> None:
        """Returns when nothing waits in memory alone, or the spool takes no more: for an end without a store.
        Bound it with a timeout."""
        self._secured.clear()
        if self._spool is not None:
            self._securing = True
            self._at_risk.set()
            await self._secured.wait()

    # ── to the store ──────────────────────────────────────────────────────────────────────────────────

    async def _write(self, lane: _Lane) -> None:
        while True:
            _end_if_cancelled()
            await lane.filled.wait()
            lane.taken = self._take(lane)
            if not lane.spooled and not lane.queue:
                lane.filled.clear()
            await self._commit(lane)
            for each in lane.taken:
                each.done = True
                each.committed()
            spooled = [each for each in lane.taken if each.place is not None]
            if spooled:
                await self._release(spooled)
            for each in lane.taken:
                self._count(-each.notifications, 0 if each.place is not None else -each.size_bytes)
            lane.taken = []

    def _take(self, lane: _Lane) -> list[_Waiting]:
        taken: list[_Waiting] = []
        size = size_bytes = 0
        for queue in (lane.spooled, lane.queue):
            while queue:
                size += queue[0].notifications
                size_bytes += queue[0].size_bytes
                if taken and (size > self._batch_max or size_bytes > BATCH_BYTES_MAX):
                    return taken
                taken.append(queue.popleft())
        return taken

    async def _commit(self, lane: _Lane) -> None:
        """Returns when what the lane has taken is durable, however often that must be tried."""
        wait_s = RETRY_S
        done = 0
        self._asking(lane)
        while True:
            heard = [one for each in await self._recalled(lane.taken) for one in each]
            try:
                while done < len(heard):
                    began = self._clock()
                    recorded = await self._journal.record(heard[done : done + self._batch_max])
                    self.available = True
                    lane.silent = False
                    self._observer.recorded(recorded, self._clock() - began)
                    done += self._batch_max
                lane.since = None
                return
            except StoreUnavailable as error:
                _end_if_cancelled()
                self.available = False
                self._observer.store_failed(error)
            # They may lie in the spool by the next time, and then need not be in memory; nor in the frames of
            # the error's traceback, which is gone here.
            del heard
            await self._pause(wait_s)
            wait_s = min(wait_s * 2, RETRY_S_MAX)

    # ── to the spool and back ─────────────────────────────────────────────────────────────────────────

    def _asking(self, lane: _Lane) -> None:
        """From now on the store owes this lane an answer. One timer, which watches all lanes, is all that a
        healthy store costs here."""
        lane.since = asyncio.get_running_loop().time()
        if self._spool is not None and self._alarm is None:
            self._alarm = asyncio.get_running_loop().call_later(self._spool_after_s, self._look)

    def _look(self) -> None:
        """Finds the lanes that the store leaves without an answer for too long."""
        loop = asyncio.get_running_loop()
        self._alarm = None
        for lane in self._lanes:
            if lane.since is not None and loop.time() - lane.since >= self._spool_after_s and not lane.silent:
                lane.silent = True
                self.available = False
                self._at_risk.set()
        if any(lane.since is not None for lane in self._lanes):
            self._alarm = loop.call_later(self._spool_after_s / 2, self._look)

    async def _save(self, spool: Spool) -> None:
        """Puts on disk what is at risk, one append at a time."""
        while True:
            await self._at_risk.wait()
            self._at_risk.clear()
            while batch := self._oldest_at_risk():
                _end_if_cancelled()
                try:
                    places = await asyncio.to_thread(spool.append, [heard for _, _, heard in batch])
                except SpoolFull as error:
                    self.spool_trouble = str(error)
                    self._secured.set()
                    self._tell()
                    await self._pause(SPOOL_RETRY_S)
                    continue
                self.spool_trouble = ""
                late = []
                for (lane, each, _), place in zip(batch, places, strict=True):
                    if each.done:
                        late.append(place)
                        continue
                    each.heard, each.place = None, place
                    if lane.queue and lane.queue[0] is each:
                        lane.spooled.append(lane.queue.popleft())
                    self.spooled_notifications += each.notifications
                    self._count(0, -each.size_bytes)
                if late:
                    await asyncio.to_thread(spool.release, late)
                self._tell()
            if self.spool_trouble:
                self.spool_trouble = ""
                self._tell()
            self._secured.set()

    def _oldest_at_risk(self) -> list[tuple[_Lane, _Waiting, list[Heard]]]:
        """What should go to disk next, of each lane the oldest first; nothing when nothing needs to."""
        batch: list[tuple[_Lane, _Waiting, list[Heard]]] = []
        size_bytes = 0
        for lane in self._lanes:
            away = lane.silent or self._securing
            if not away and self.backlog_bytes < self._spool_bytes:
                continue
            # What a store that answers has in hand is nearly committed.
            for each in (*lane.taken, *lane.queue) if away else lane.queue:
                if each.heard is None or each.done or each.place is not None:
                    continue
                size_bytes += each.size_bytes
                if batch and size_bytes > SPOOL_BYTES_AT_ONCE:
                    return batch
                batch.append((lane, each, each.heard))
        return batch

    async def _recalled(self, taken: Sequence[_Waiting]) -> list[list[Heard]]:
        """The messages of deliveries, those of the spool read back. One that is damaged has none left, and
        that is told."""
        away = [each for each in taken if each.heard is None]
        read: dict[int, list[Heard]] = {}
        damaged: list[_Waiting] = []
        if self._spool is not None and away:
            places = [each.place for each in away if each.place is not None]
            for each, heard in zip(away, await asyncio.to_thread(self._spool.read, places), strict=True):
                if heard is None:
                    each.heard = []
                    self._set_aside += 1
                    self._tell()
                    damaged.append(each)
                read[id(each)] = heard or []
        if damaged:
            await self._lost(taken, damaged, read)
        return [each.heard if each.heard is not None else read[id(each)] for each in taken]

    async def _lost(
        self, taken: Sequence[_Waiting], damaged: Sequence[_Waiting], read: Mapping[int, list[Heard]]
    ) -> None:
        """Tells of deliveries that cannot be read; returns when that is durable."""
        before: dict[int, datetime] = {}
        missing: dict[bool, list[Missing]] = {True: [], False: []}
        for each in taken:
            if any(each is one for one in damaged):
                lost = Missing(each.account, each.until, before.get(each.account))
                missing[each.committed is _nobody].append(lost)
            elif heard := each.heard or read.get(id(each)):
                # Not `until`: of what an earlier run left that is only when its file was last written to.
                before[each.account] = heard[-1].received_at
        for left, told in missing.items():
            if told and self._losing is not None:
                await self._losing(told, left)

    async def _settle(self, spool: Spool) -> None:
        """Tells first what is damaged of an earlier run: later nobody could say what it is newer than."""
        lost = spool.lost()
        if lost.missing and self._losing is not None:
            await self._losing(lost.missing, True)
        if lost.places:
            await asyncio.to_thread(spool.release, lost.places)

    async def _release(self, spooled: Sequence[_Waiting]) -> None:
        """What came from the spool is committed, and needed there no more."""
        if self._spool is None:
            return
        await asyncio.to_thread(self._spool.release, [each.place for each in spooled if each.place])
        notifications = sum(each.notifications for each in spooled)
        self.spooled_notifications -= notifications
        self._drained += notifications
        self._tell()

    def _tell(self) -> None:
        if self._spool is not None:
            self._spooling(
                Spooling(
                    notifications=self.spooled_notifications,
                    size_bytes=self._spool.size_bytes,
                    oldest=self._spool.oldest if self.spooled_notifications else None,
                    drained=self._drained,
                    set_aside=self._set_aside,
                    trouble=self.spool_trouble,
                )
            )

    def _count(self, notifications: int, size_bytes: int) -> None:
        self.backlog_notifications += notifications
        self.backlog_bytes += size_bytes
        if self.backlog_bytes < self._backlog_bytes_max:
            self._room.set()
        else:
            self._room.clear()
        if self.backlog_bytes >= self._spool_bytes:
            self._at_risk.set()
        if self.backlog_notifications:
            self._idle.clear()
        else:
            self._idle.set()
        self._observer.backlog(self.backlog_notifications, self.backlog_bytes)


def _nobody() -> None:
    """Whom a delivery of an earlier run is reported to."""


def _end_if_cancelled() -> None:
    """A driver may answer a cancellation with the failure of the connection that it broke. Nobody cancels
    twice, so a task that took it for a failure would go on for ever."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
