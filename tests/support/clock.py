"""A clock that stands still until a test moves it: time of day, steady seconds, and whoever sleeps on it."""

import asyncio
import heapq
import itertools
from datetime import UTC, datetime, timedelta

TURNS = 10
"""Turns of the loop that whoever is woken gets before the clock moves on."""

BEGAN_AT = datetime(2026, 3, 2, 8, 0, tzinfo=UTC)


class Clock:
    """Hand out `wall`, `steady` and `pause` where the product takes a clock, and `advance` it."""

    def __init__(self, began_at: datetime = BEGAN_AT) -> None:
        self.began_at = began_at
        self.passed_s = 0.0
        self.pauses_s: list[float] = []
        """Every pause that was asked for, in order."""
        self._number = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def wall(self) -> datetime:
        """The time of day."""
        return self.began_at + timedelta(seconds=self.passed_s)

    def steady(self) -> float:
        """Seconds since some moment that has nothing to do with the time of day."""
        return 1000.0 + self.passed_s

    async def pause(self, seconds: float) -> None:
        """Sleeps until the clock has been moved so far."""
        self.pauses_s.append(seconds)
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        until: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.passed_s + seconds, next(self._number), until))
        await until

    async def advance(self, seconds: float) -> None:
        """Moves the clock, and wakes who has slept long enough, one after the other, at his own time."""
        end_s = self.passed_s + seconds
        while self._sleepers and self._sleepers[0][0] <= end_s:
            due_s, _, until = heapq.heappop(self._sleepers)
            if until.cancelled():
                continue
            self.passed_s = max(self.passed_s, due_s)
            until.set_result(None)
            await turns()
        self.passed_s = end_s


async def turns(count: int = TURNS) -> None:
    """Lets the loop turn, so that what can happen has happened."""
    for _ in range(count):
        await asyncio.sleep(0)
