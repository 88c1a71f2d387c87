"""What a test may leave behind: nothing.

It decides what counts as left over, and says it by name: tasks, threads, children, descriptors (sockets above
all), aiohttp sessions and connectors, connections to a test's database, and failures of which asyncio could
only write a line. It refuses to know why. Warnings are not its business: `filterwarnings = ["error"]` makes
each a failure, and pytest turns those that are raised where nobody can catch them (`__del__`, the coroutine
that nobody awaited) into failures too; tests/test_leftovers.py holds both to it.

A look costs tens of microseconds where nothing is left. Only where something is, it waits a moment: a thread
or a server process may be on its way out.
"""

import asyncio
import contextlib
import gc
import logging
import os
import stat
import threading
import time
from collections import Counter
from weakref import WeakSet

import aiohttp
import asyncpg
import psutil

SETTLE_s = 2.0
"""How long something may be on its way out."""
POLL_s = 0.002
TURNS_MAX = 10
"""Turns of the loop that a task which was just cancelled may take to end."""

NOT_OURS = (asyncpg.ConnectionDoesNotExistError,)
"""asyncpg leaves a future that nobody asks when a server goes away while it connects. What it means for us is
raised to whoever waits for that connection."""

_open: WeakSet[aiohttp.ClientSession | aiohttp.BaseConnector] = WeakSet()
"""Every session and connector of aiohttp that was made and still exists. One that holds no connection is no
descriptor, and warns only when it is collected, which may be in another test."""


def _watch(kind: type[aiohttp.ClientSession | aiohttp.BaseConnector]) -> None:
    """Notes each one that is made."""
    made = kind.__init__

    def make(self: aiohttp.ClientSession | aiohttp.BaseConnector, *given: object, **named: object) -> None:
        made(self, *given, **named)  # type: ignore[arg-type]  # handed on as they came
        _open.add(self)

    kind.__init__ = make  # type: ignore[method-assign]  # a library's class, to look at and not to change


_watch(aiohttp.ClientSession)
_watch(aiohttp.BaseConnector)


class Unheard(logging.Handler):
    """Keeps what asyncio reports as an error because there was nobody to raise it to: a task whose failure
    nobody asked for, one that was destroyed while it waited, a callback that broke."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps its sentence, and the failure that belongs to it."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, NOT_OURS):
            return
        self.lines.append(record.getMessage() + (f": {error!r}" if error is not None else ""))

    def taken(self) -> list[str]:
        """What was reported since this was last asked."""
        lines, self.lines = self.lines, []
        return lines


UNHEARD = Unheard()
logging.getLogger("asyncio").addHandler(UNHEARD)


class Before:
    """What there is before a test; `left` says what is there beyond it afterwards."""

    def __init__(self) -> None:
        self._threads = set(threading.enumerate())
        self._children = _children()
        self._open = set(_open)
        self._descriptors = Counter({there: len(numbers) for there, numbers in _descriptors().items()})

    def and_what_came_since(self, earlier: "Before") -> None:
        """What there is now and was not at an earlier look may stay: its maker outlives the test."""
        now = Before()
        self._threads |= now._threads - earlier._threads
        self._children |= now._children - earlier._children
        self._open |= now._open - earlier._open
        self._descriptors += now._descriptors - earlier._descriptors

    def left(self) -> list[str]:
        """A sentence for each thing that is left over; waits up to `SETTLE_s` for what is on its way out."""
        found = self._look()
        if found:
            gc.collect()  # what only waits for the collector warns by itself, as a test's failure
        deadline = time.monotonic() + SETTLE_s
        while found and time.monotonic() < deadline:
            time.sleep(POLL_s)
            found = self._look()
        return found + [f"asyncio reported: {line}" for line in UNHEARD.taken()]

    def _look(self) -> list[str]:
        found = [f"thread {each.name}" for each in set(threading.enumerate()) - self._threads]
        found += [f"child process {pid}" for pid in _children() - self._children]
        found += [f"not closed: {each!r}" for each in _open if not each.closed and each not in self._open]
        for there, numbers in _descriptors().items():
            found += map(_described, sorted(numbers)[self._descriptors[there] :])
        return found


def _children() -> set[int]:
    """The processes that are our children, those that ended and were not waited for included."""
    try:
        # Asks only whether there are any, which is quick; nothing is taken from who waits for them.
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return set()
    return {child.pid for child in psutil.Process().children()}


def _descriptors() -> dict[tuple[int, int], list[int]]:
    """The open descriptors of each thing that there is: what is closed and opened again is nothing more."""
    found: dict[tuple[int, int], list[int]] = {}
    for name in os.listdir("/dev/fd"):  # noqa: PTH208 - twice as quick as a Path for each
        with contextlib.suppress(OSError):  # that of the listing itself
            there = os.fstat(int(name))
            found.setdefault((there.st_dev, there.st_ino), []).append(int(name))
    return found


def _described(number: int) -> str:
    try:
        kind = "socket" if stat.S_ISSOCK(os.fstat(number).st_mode) else "descriptor"
        return f"{kind} {number}: {os.readlink(f'/dev/fd/{number}')}"  # noqa: PTH115 - a name, not a path
    except OSError:
        return f"descriptor {number}"


async def tasks_left() -> list[str]:
    """The tasks of this loop beside the caller's, after those that were just cancelled had time to end."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for _ in range(TURNS_MAX if left else 0):
        await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
    return sorted(f"task {task.get_name()}: {task.get_coro()}" for task in left)


async def connections_left(administrator: asyncpg.Connection, database: str) -> list[str]:
    """The connections that a test still has to its database, after those that were closed had time to end:
    the server notices the end of one when it next looks."""
    deadline = time.monotonic() + SETTLE_s
    while True:
        rows = await administrator.fetch(_CONNECTIONS, database)
        if not rows or time.monotonic() > deadline:
            return [f"connection {row['pid']} ({row['state']}): {row['query'][:120]}" for row in rows]
        await asyncio.sleep(POLL_s)


_CONNECTIONS = (
    "SELECT pid, state, query FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'"
)
