"""Finds the sessions that are connected and deaf: asks what is live, and compares it with what was heard.

A server that answers every connect and says nothing (it lost the subscription, a balancer moved us to another
node, the session is bound to another agent) looks like a quiet account. So each account that is up is asked
about over REST, in turns: which of its calls are live now? Where that differs from the calls that the store
has open, and differs again a little later with nothing heard in between, the session is given up. It becomes
a gap with the cause "stalled", which begins with the last moment that can be vouched for, and the snapshot of
the next session closes and opens what was missed.

What a probe cannot know: a call that began and ended between two probes leaves no trace in either list, nor
does a message that changed neither a call's state nor its being there. So a list that agrees does not prove
that all was heard, and a gap that is found later reaches back behind it, to the last message: too long it may
be, but never too short. An account without calls agrees, deaf or not; it is found out by the first call that
lasts from one list to the next. A list that does not come, or does not claim to be complete, proves nothing;
nor does one that differs each time in something else. An agreement writes nothing to the journal.

What is a difference is decided in `listener.core.probe`, since when an account was deaf in
`listener.coverage`. Nothing here speaks SQL or HTTP: the protocols below say what is needed of both.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from typing import Protocol

import structlog

from listener.core.calls import Call, Heard, Snapshot
from listener.core.probe import Difference, confirmed, differences, sentence
from listener.errors import ListenerError, LoginRefused

CONFIRM_S = 5.0
"""How long after a difference the account is looked at again, or `every_s` if that is less: calls that are
said and listed at almost the same time have come by then."""

LOOKS_MAX = 4
"""Lists asked for in one probe. When they all differ, and each in something else, nothing is proved."""

PROBE_S_MAX = 60.0
"""A probe that takes longer, because the contact centre or the store does not answer, has failed."""

PROBES_AT_ONCE_MAX = 100
"""Probes under way. When there are so many, the next one waits, so that each account is asked about less
often. How many requests they make at a time is bounded further by `coverage.SNAPSHOTS_AT_ONCE_MAX`."""

REFUSED_S = 3600.0
"""How long an account is left alone whose login was refused: each probe would be another wrong password, and
insisting locks accounts."""

AGREED, DISAGREED, FAILED = "agreed", "disagreed", "failed"
"""What comes of a probe, as metrics show it."""


class Listened(Protocol):
    """An account that is listened to: `listener.coverage.Watch`."""

    @property
    def account(self) -> int:
        """Its id in the store."""

    @property
    def name(self) -> str:
        """How the log calls it."""

    @property
    def stretch(self) -> int | None:
        """The number of the stretch of time without a gap that goes on now; None while there is a gap."""

    async def live(self) -> tuple[Heard, Snapshot]:
        """A complete list of its live calls, once everything that was said before it came is durable."""

    async def give_up(self, detail: str, by: datetime) -> None:
        """Something that was said by then was not heard: this session ends, and another one begins."""


class Journal(Protocol):
    """What is needed of the store: `listener.store.journal.Journal`."""

    async def open_calls(self, accounts: Iterable[int]) -> list[Call]:
        """The calls that had not ended when they were last heard of."""


class Observer(Protocol):
    """Who counts the probes."""

    def probe(self, result: str) -> None:
        """A probe ended: "agreed", "disagreed" or "failed"."""


class Probe:
    """Asks about each account about every `every_s` seconds. `run` it in a task; cancel it to end it.

    `accounts` gives those that are listened to, whenever it is asked. `jitter` gives numbers from 0 to 1.
    """

    def __init__(
        self,
        journal: Journal,
        observer: Observer,
        accounts: Callable[[], Iterable[Listened]],
        *,
        every_s: float,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._journal = journal
        self._observer = observer
        self._accounts = accounts
        self._every_s = every_s
        self._confirm_s = min(CONFIRM_S, every_s)
        self._clock = clock
        self._pause = pause
        self._jitter = jitter
        self._room = asyncio.Semaphore(PROBES_AT_ONCE_MAX)
        self._asking: set[Listened] = set()
        self._failing: set[Listened] = set()
        self._rests_until: dict[Listened, float] = {}
        self._log = structlog.get_logger()

    async def run(self) -> None:
        """Probes until cancelled; no account's trouble is another's."""
        async with asyncio.TaskGroup() as probes:
            while True:
                turn = list(self._accounts())
                self._forget(turn)
                for one in turn:
                    # Spread over the time, so that thousands of requests do not come at once.
                    await self._pause(self._every_s / len(turn) * (0.5 + self._jitter()))
                    if self._due(one):
                        await self._room.acquire()
                        self._asking.add(one)
                        probes.create_task(self._take(one))
                if not turn:
                    await self._pause(self._every_s)

    def _due(self, one: Listened) -> bool:
        if one.stretch is None or one in self._asking:
            return False
        return self._rests_until.get(one, 0.0) <= self._clock()

    def _forget(self, listened: Iterable[Listened]) -> None:
        """What is remembered of accounts that are gone, or begun anew with another password."""
        there = set(listened)
        self._failing &= there
        self._rests_until = {one: until for one, until in self._rests_until.items() if one in there}

    async def _take(self, one: Listened) -> None:
        """One probe, whatever comes of it."""
        result, why = FAILED, ""
        try:
            async with asyncio.timeout(PROBE_S_MAX):
                result, why = await self._probe(one)
        except TimeoutError:
            why = f"no answer within {PROBE_S_MAX:g} s"
        except LoginRefused as error:
            why = str(error)
            self._rests_until[one] = self._clock() + REFUSED_S
        except ListenerError as error:
            why = str(error)
        except Exception as error:  # noqa: BLE001 - a defect of ours must not end the other accounts
            self._log.exception("a probe broke", account=one.name)
            why = f"{type(error).__name__}: {error}"
        finally:
            self._asking.discard(one)
            self._room.release()
        self._observer.probe(result)
        if result != FAILED:
            self._failing.discard(one)
        elif why and one not in self._failing:
            # Once, not each time: a contact centre without REST has thousands of accounts.
            self._failing.add(one)
            self._log.warning("probe failed", account=one.name, error=why)

    async def _probe(self, one: Listened) -> tuple[str, str]:
        """Looks until two lists agree about what is wrong, or one with what was heard; and why it failed, if
        that is not said elsewhere."""
        stretch = one.stretch
        before: list[Difference] = []
        by: datetime | None = None
        for _ in range(LOOKS_MAX):
            if by is not None:
                await self._pause(self._confirm_s)
            heard, listed = await one.live()
            found = differences(await self._journal.open_calls([one.account]), heard, listed)
            if stretch is None or one.stretch != stretch:
                return FAILED, ""  # its own gap, or its end, says more
            if not found:
                return AGREED, ""
            by = by or heard.received_at
            if sure := confirmed(before, found):
                await one.give_up(sentence(sure), by)
                return DISAGREED, ""
            before = found
        return (
            FAILED,
            f"each of {LOOKS_MAX} lists of live calls differs in something else: {sentence(before)}",
        )
