"""Looking for calls without an end: when, how many at once, and what becomes of a store that refuses."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta

from listener.closing import CALLS_MAX, EVERY_S, Closer
from listener.core.calls import Closing, Heard, Source
from listener.core.decode import decode
from listener.errors import StoreUnavailable
from tests.support.clock import Clock, turns

HOURS = 24
WRAP_UP_S = 3600


class Store:
    """Knows the calls that wait for an end, as (account, id), and takes the messages that close them. It
    stores a message when `store` is called, or at once."""

    def __init__(self, *waiting: tuple[int, int]) -> None:
        self.waiting = sorted(waiting)
        self.asked: list[tuple[datetime, datetime]] = []
        self.heard: list[Heard] = []
        self.at_once = True
        self.closes = True
        self.away = False
        self._committed: list[tuple[Heard, Callable[[], None]]] = []

    async def unsettled(
        self, silent_since: datetime, released_before: datetime, count_max: int
    ) -> list[tuple[int, int]]:
        """The first of them."""
        self.asked.append((silent_since, released_before))
        if self.away:
            raise StoreUnavailable("away")
        return self.waiting[:count_max]

    async def hear(self, heard: Sequence[Heard], committed: Callable[[], None]) -> None:
        """Takes messages of one account."""
        (one,) = heard
        self.heard.append(one)
        self._committed.append((one, committed))
        if self.at_once:
            self.store()

    def store(self) -> None:
        """Makes durable what was heard."""
        for one, committed in self._committed:
            if self.closes:
                gone = {(one.account, id) for id in closing(one).calls}
                self.waiting = [call for call in self.waiting if call not in gone]
            committed()
        self._committed.clear()


def closing(heard: Heard) -> Closing:
    """What a message says, which must be a closing."""
    decoded = decode(heard.raw, heard.channel)
    assert isinstance(decoded, Closing), decoded
    return decoded


def closer(store: Store, clock: Clock) -> Closer:
    """One that goes by this clock."""
    return Closer(
        store, store, call_hours_max=HOURS, wrap_up_s_max=WRAP_UP_S, wall=clock.wall, pause=clock.pause
    )


@asynccontextmanager
async def running(store: Store, clock: Clock) -> AsyncIterator[None]:
    """Runs it during the block, which begins when it has done what it can."""
    async with asyncio.TaskGroup() as tasks:
        work = tasks.create_task(closer(store, clock).run())
        await turns()
        yield
        work.cancel()


async def test_it_looks_at_once_and_then_now_and_then() -> None:
    """Each time for what is too old by then."""
    store, clock = Store(), Clock()
    async with running(store, clock):
        assert len(store.asked) == 1
        await clock.advance(EVERY_S - 1)
        assert len(store.asked) == 1
        await clock.advance(1)
    began = clock.began_at
    again = began + timedelta(seconds=EVERY_S)
    assert store.asked == [
        (at - timedelta(hours=HOURS), at - timedelta(seconds=WRAP_UP_S)) for at in (began, again)
    ]
    assert store.heard == []


async def test_each_account_gets_one_message_with_its_calls() -> None:
    """A message of our own, at the beginning of a stream of its own, which says since when it was silent."""
    store, clock = Store((1, 10), (2, 11), (1, 12)), Clock()
    await closer(store, clock).look()
    assert [(heard.account, closing(heard)) for heard in store.heard] == [
        (1, Closing((10, 12), "not heard of for 24 h")),
        (2, Closing((11,), "not heard of for 24 h")),
    ]
    for heard in store.heard:
        assert (heard.position, heard.source, heard.received_at) == (1, Source.LISTENER, clock.began_at)
        assert heard.asked_at == clock.began_at - timedelta(hours=HOURS)
    assert len({heard.stream for heard in store.heard}) == 2


async def test_many_are_closed_one_lot_after_the_other() -> None:
    """The next are not looked for before these are stored, and need not wait for their turn."""
    store, clock = Store(*((1, id) for id in range(1, CALLS_MAX * 2 + 2))), Clock()
    store.at_once = False
    async with running(store, clock):
        for lot in (1, 2, 3):
            assert (len(store.asked), len(store.heard)) == (lot, lot)
            store.store()
            await turns()
    assert store.waiting == []
    assert [len(closing(heard).calls) for heard in store.heard] == [CALLS_MAX, CALLS_MAX, 1]


async def test_what_cannot_be_closed_is_not_insisted_on() -> None:
    """A lot that is found again unchanged waits for the next time."""
    store, clock = Store(*((1, id) for id in range(1, CALLS_MAX + 1))), Clock()
    store.closes = False
    async with running(store, clock):
        assert len(store.heard) == 1
        await clock.advance(EVERY_S)
        assert len(store.heard) == 2


async def test_a_store_that_is_away_is_asked_again_next_time() -> None:
    """Nothing else suffers by it."""
    store, clock = Store((1, 10)), Clock()
    store.away = True
    async with running(store, clock):
        assert store.heard == []
        store.away = False
        await clock.advance(EVERY_S)
        assert len(store.heard) == 1
