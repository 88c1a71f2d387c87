"""JOINS: dials placed x calls heard x the clock -> outcomes.

Whatever the pipeline commits is handed to `recorded`, in order; what the dialling adapters learn comes by
`place`, `tell` and `sighted`. One task takes what piled up, finds out which dial each piece is about, has the
store fold all of it into the dials in one transaction, and only then shows the outcomes to observers. So a
lone dial waits for nobody, and a storm is written in few large batches.

In memory are only the dials that wait for something, to match and to know the next deadline: what a dial is,
the store says. A call belongs to the placed dial that `listener.core.dialling.match` finds; where several may
be meant, none is chosen; where none is, and it began in Dialing, it becomes an overheard dial. A dial is
written before its request is sent, also by another process, and before a call becomes an overheard dial the
store is asked for placed ones that are not known here: so a call that is heard before its dial was answered
finds its dial. Should only a later message carry the reference, the overheard dial is merged into the placed
one and counts no more.

**What is lost here is found again.** Beside the dials the store keeps, for each account, up to which message
its calls were told (the mark). At a start, after a full queue, and after a batch whose commit was not
answered, whatever lies beyond is read back from the journal and told again: it is recognised by its ids. So
the queue may be bounded and dropped, and a crash at any moment changes no outcome. What is not in the journal
(`tell`, `sighted`) is stored before these return: who must not lose it acknowledges afterwards.

Nothing here speaks SQL or HTTP: the protocols below say what is needed.
"""

import asyncio
import heapq
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Protocol

import structlog
from msgspec import Struct

from listener.core.calls import Call, Direction, JsonObject, Recorded
from listener.core.dialling import (
    DEADLINES,
    ENDING_DIGITS_MIN,
    Advance,
    CallHeard,
    Deadlines,
    Dial,
    Elapsed,
    Fact,
    Match,
    MatchConfidence,
    Origin,
    Outcome,
    Reported,
    Sighting,
    System,
    agrees,
    blamed,
    match,
    normalised,
    overheard,
    sighting,
)
from listener.core.dialnews import Mark, News, Told, Trouble, told
from listener.errors import StoreUnavailable

QUEUE_MAX = 20_000
"""Steps of calls that wait to be told. When there are more, all of them are dropped, and read back from the
journal when the store has answered."""

DIRECT_MAX = 20_000
"""Facts from adapters that wait to be told. When there are more, those go whose callers gave up waiting:
first what the journal tells again, then the rest. If all callers wait, the next one is refused. What is not
told is counted; its dial ends by what else is heard, or at its deadline."""

BATCH_MAX = 1000
"""Pieces of news in one transaction."""

DIALS_MAX = 100_000
"""Dials in memory, at about 1 KB. When more wait, the others' calls are looked up in the store, and their
deadlines found by `SWEEP_S`."""

ENDED_MAX = 20_000
"""Calls of dials that ended, remembered so that they are not taken for another dial's; and as many dials
whose unknown outcome may be corrected yet. Beyond that the oldest is forgotten."""

KEYS_MAX = 50_000
"""Names that other systems have for calls, each with the dial that it was found to be. As above."""

STALE_DEADLINES_MAX = 1000
"""Deadlines that came to nothing and are still remembered, beside one for each dial that waits."""

TICK_S = 0.25
"""How often deadlines are looked at when nothing else happens."""

SWEEP_S = 5.0
"""How often the store is asked for dials that are overdue although nobody here remembers them: of other
processes, or beyond `DIALS_MAX`."""

MARK_S = 10.0
"""How often marks are written down when no dial gives occasion to; so much is read again after a crash."""

UNSURE_S = 120.0
"""For how long after a failed commit a batch of old messages may mean that it was committed nevertheless."""

RETRY_S = 0.1
RETRY_S_MAX = 5.0
"""Between two attempts on a store that does not answer: doubled each time, up to this."""

LATE_S = DEADLINES.dial_s
"""How long after its end an unknown outcome may be corrected."""


class Store(Protocol):
    """What is needed of the store; `listener.store.dials.Dials` has it. All of it raises `StoreError`."""

    async def place(
        self, dial: Dial, key: str | None = None, request: JsonObject | None = None
    ) -> tuple[Dial, bool]:
        """Writes a dial down before it is sent; False with the dial that has this key already."""

    async def take(
        self, news: Sequence[News], marks: Mapping[int, Mark] | None = None
    ) -> list[Advance | None]:
        """Folds news into dials, in one transaction; what each of them did."""

    async def waiting(self, count_max: int, expired_since: datetime) -> list[Dial]:
        """The dials that wait for their end, and those that may be corrected."""

    async def overdue(self, before: datetime, count_max: int) -> list[Dial]:
        """Those that should have ended."""

    async def unclaimed(self, accounts: Iterable[int], known: Iterable[str]) -> list[Dial]:
        """Placed dials without a call that are not among the known ones."""

    async def of_calls(self, calls: Iterable[int]) -> list[Dial]:
        """The dials that are these calls."""

    async def marks(self) -> dict[int, Mark]:
        """Up to where each account was told."""

    async def untold(self, after: tuple[int, int] = (0, 0)) -> list[Told]:
        """A page of the calls beyond the marks; empty when there are no more."""

    async def told_again(self, calls: Sequence[int]) -> list[Told]:
        """All steps of these calls."""

    async def troubles(self, since: datetime, accounts: Iterable[int]) -> list[Trouble]:
        """Error messages."""


class Observer(Protocol):
    """Who counts; called on the event loop, after the commit."""

    def dial(self, advance: Advance) -> None:
        """Something about a dial changed."""

    def dials_waiting(self, waiting: Mapping[System, int]) -> None:
        """So many dials wait for their end."""

    def dial_ambiguous(self) -> None:
        """A call, or a report of one, may be several placed dials' and was given to none."""

    def dial_dropped(self, facts: int) -> None:
        """So many facts are not told, since too many waited for the store."""

    def dial_unmatched(self, what: str) -> None:
        """A "dial" ended at its deadline without its call; or a "report" of a call fits no dial."""


class _Direct(Struct):
    """A fact that an adapter gives, of a dial that it knows or that has to be found."""

    fact: Fact
    at: datetime
    done: asyncio.Future[Dial | None]
    dial: str | None = None
    seen: Sighting | None = None
    key: str = ""
    beside: bool = False


_Item = Told | Trouble | _Direct | dict[int, Mark]


class DialWatch:
    """Follows every dial from its request to its outcome. `run` it in a task; cancel it after `drain`.

    `system_of` says through which system an account's calls go. `run` raises what the store raises besides
    `StoreUnavailable`: that is a bug, and a restart finds everything again.
    """

    def __init__(
        self,
        store: Store,
        observer: Observer,
        *,
        wall: Callable[[], datetime],
        system_of: Callable[[int], System] = lambda _: System.GWS,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        queue_max: int = QUEUE_MAX,
        direct_max: int = DIRECT_MAX,
        dials_max: int = DIALS_MAX,
        deadlines: Deadlines = DEADLINES,
    ) -> None:
        self._store = store
        self._observer = observer
        self._wall = wall
        self._system_of = system_of
        self._clock = clock
        self._pause = pause
        self._queue_max = queue_max
        self._direct_max = direct_max
        self._deadlines = deadlines
        self._dials = _Waiting(dials_max)
        self._queue: deque[_Item] = deque()
        self._directs = 0
        """How many of those in the queue came from adapters."""
        self._queued = asyncio.Event()
        self._idle = asyncio.Event()
        self._behind = True
        """Not everything that was committed was told: read it back first."""
        self._unsure_until = 0.0
        self._marks: dict[int, Mark] = {}
        self._passed: dict[int, Mark] = {}
        """Marks that moved and are not written yet."""
        self._marked_at = 0.0
        self._swept_at = 0.0
        self._unanswered: set[asyncio.Future[Dial | None]] = set()
        self._log = structlog.get_logger()

    # ── what is heard ─────────────────────────────────────────────────────────────────────────────────

    def recorded(self, recorded: Recorded) -> None:
        """A batch of messages was committed. Never blocks and never raises."""
        if recorded.duplicates and self._clock() < self._unsure_until:
            self._behind = True  # it may be the batch whose commit was not answered: its steps are not here
        if self._behind:
            self._wake()
            return
        items, marks = told(recorded)
        if len(self._queue) + len(items) > self._queue_max:
            # What adapters gave is not in the journal, and stays.
            self._queue = deque(item for item in self._queue if isinstance(item, _Direct))
            self._behind = True
            self._log.warning("the dials fall behind and are read back from the journal", steps=len(items))
        else:
            self._queue.extend(item for item in items if self._matters(item))
            self._queue.append(marks)
        self._wake()

    def store_failed(self) -> None:
        """A batch was not committed, or was and the answer was lost."""
        self._unsure_until = self._clock() + UNSURE_S

    def _matters(self, item: Told | Trouble) -> bool:
        if isinstance(item, Trouble):
            return self._beyond(item.account, item.notification)
        call = item.call
        outbound = call.direction is Direction.OUTBOUND
        return outbound or self._dials.concerned(call) or self._system_of(call.account) is not System.GWS

    async def place(
        self, dial: Dial, key: str | None = None, request: JsonObject | None = None
    ) -> tuple[Dial, bool]:
        """Write down a dial (`listener.core.dialling.placed`) that is about to be sent. Only if the answer is
        True, send it, and `tell` what came back; else the key was used before, by the dial that is given.

        `request` says what will be asked, without credentials. Raises StoreError: then send nothing.
        """
        kept, is_new = await self._store.place(dial, key, request)
        if is_new:
            self._dials.keep(kept)
            self._observer.dials_waiting(self._dials.counts())
        return kept, is_new

    async def tell(self, dial: str, fact: Fact, at: datetime) -> Dial | None:
        """Something was learnt of the dial with this id. Returns when it is stored, with the dial as it is
        then; None if there is none. It waits for a store that is away: bound it with a timeout; it is told
        all the same, unless more than `DIRECT_MAX` wait. Raises StoreUnavailable if it is not told."""
        return await self._direct(fact, at, dial=dial)

    async def sighted(
        self, seen: Sighting, fact: Fact, at: datetime, *, key: str = "", beside: bool = False
    ) -> Dial | None:
        """Something was learnt of a call that has to be found among the dials. `key` is what its system calls
        that call: the same key is the same dial. As `tell`; None if no dial, or no single one, fits. `beside`
        says that the call is in the journal too, and becomes a dial from there: then that is no trouble."""
        return await self._direct(fact, at, seen=seen, key=key, beside=beside)

    async def _direct(
        self,
        fact: Fact,
        at: datetime,
        dial: str | None = None,
        seen: Sighting | None = None,
        key: str = "",
        *,
        beside: bool = False,
    ) -> Dial | None:
        if self._directs >= self._direct_max:
            self._make_room()
        done: asyncio.Future[Dial | None] = asyncio.get_running_loop().create_future()
        self._unanswered.add(done)
        self._directs += 1
        self._queue.append(_Direct(fact, at, done, dial, seen, key, beside))
        self._wake()
        try:
            return await done
        finally:
            self._unanswered.discard(done)

    def _make_room(self) -> None:
        """Drop the facts whose callers gave up waiting. Raises StoreUnavailable if all of them wait."""
        for also_the_rest in (False, True):
            before = len(self._queue)
            self._queue = deque(
                item
                for item in self._queue
                if not (
                    isinstance(item, _Direct) and item.done.cancelled() and (item.beside or also_the_rest)
                )
            )
            if dropped := before - len(self._queue):
                self._directs -= dropped
                self._observer.dial_dropped(dropped)
                self._log.warning("facts of dials are dropped: too many wait for the store", facts=dropped)
                return
        self._observer.dial_dropped(1)
        raise StoreUnavailable(
            f"{self._directs} facts of dials wait for the database, so this one is not noted; "
            "ask again when it answers"
        )

    def _wake(self) -> None:
        self._idle.clear()
        self._queued.set()

    # ── the task ──────────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Tells the store what is heard, until cancelled; who waits for an answer then gets none but
        StoreUnavailable."""
        try:
            await self._follow()
        finally:
            for done in self._unanswered:
                if not done.done():
                    done.set_exception(StoreUnavailable("The dials are not followed any more: ask again."))

    async def _follow(self) -> None:
        await self._insist(self._remember)
        while True:
            if self._behind:
                await self._insist(self._catch_up)
            items = [self._queue.popleft() for _ in range(min(BATCH_MAX, len(self._queue)))]
            self._directs -= sum(isinstance(item, _Direct) for item in items)
            now = self._wall()
            await self._insist(self._look_around, items, now)
            news, answers = self._compose(items, now)
            await self._write(news, answers)
            if not self._queue and not self._behind:
                self._queued.clear()
                self._idle.set()
                with suppress(TimeoutError):
                    async with asyncio.timeout(TICK_S):
                        await self._queued.wait()

    async def drain(self) -> None:
        """Returns when everything that was handed in, or was left by the run before, is stored; bound it with
        a timeout."""
        await self._idle.wait()

    async def _insist(self, attempt: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Until the store answers. What is heard meanwhile waits in the queue, or in the journal."""
        wait_s = RETRY_S
        while True:
            try:
                await attempt(*arguments)
                return
            except StoreUnavailable as error:
                if wait_s == RETRY_S:
                    self._log.warning("the dials wait for the store", error=str(error))
                await self._pause(wait_s)
                wait_s = min(wait_s * 2, RETRY_S_MAX)

    async def _remember(self) -> None:
        """What an earlier run left waiting."""
        since = self._wall() - timedelta(seconds=LATE_S)
        found = await self._store.waiting(self._dials.room, since)
        for dial in found:
            self._dials.keep(dial)
        # There may be more.
        self._dials.overflowed |= sum(dial.outcome is None for dial in found) >= self._dials.room
        self._marks = await self._store.marks()

    async def _catch_up(self) -> None:
        """Tell what was committed and not told. Marks that are not written yet are written first: they are
        where the reading begins."""
        self._behind = False
        try:
            await self._store.take([], self._passed)
            self._passed = {}
            troubles = await self._troubles()
            after = (0, 0)
            while page := await self._store.untold(after):
                await self._tell_again(page)
                last = page[-1].call
                after = last.account, last.id
            calls = self._dials.calls()
            for start in range(0, len(calls), BATCH_MAX):
                await self._tell_again(await self._store.told_again(calls[start : start + BATCH_MAX]))
            await self._tell_again(troubles)
        except StoreUnavailable:
            self._behind = True
            raise

    async def _troubles(self) -> list[Trouble]:
        """The error messages that were not told, and may be about a dial that waits to begin."""
        expecting = self._dials.expecting(System.GWS)
        if not expecting:
            return []
        since = min(dial.requested_at for dial in expecting)
        found = await self._store.troubles(since, {dial.account for dial in expecting})
        return [each for each in found if self._beyond(each.account, each.notification)]

    async def _tell_again(self, items: Sequence[Told | Trouble]) -> None:
        now = self._wall()
        marks: dict[int, Mark] = {}
        await self._look_around(items, now)
        for item in items:
            if isinstance(item, Told):
                account = item.call.account
                before = marks.get(account, self._marks.get(account))
                if before is None or item.call.id > before.notification:
                    marks[account] = Mark(item.call.id, item.call.opened_at)
        news, answers = self._compose([*items, marks], now)
        await self._write(news, answers)

    async def _look_around(self, items: Sequence[_Item], now: datetime) -> None:
        """Know what the store knows, and we must: placed dials of other processes, dials beyond our bound."""
        begun = {item.call.account for item in items if isinstance(item, Told) and self._new(item)}
        if begun:
            known = [dial.id for account in begun for dial in self._dials.unclaimed(account)]
            for dial in await self._store.unclaimed(begun, known):
                self._dials.keep(dial)
        if self._dials.overflowed:
            calls = [item.call.id for item in items if isinstance(item, Told)]
            for dial in await self._store.of_calls(calls):
                self._dials.keep(dial, beyond=True)
        if self._clock() - self._swept_at >= SWEEP_S:
            for dial in await self._store.overdue(now - timedelta(seconds=TICK_S), BATCH_MAX):
                self._dials.keep(dial, beyond=True)
            self._swept_at = self._clock()

    def _new(self, item: Told) -> bool:
        """The first message about a call that begins in Dialing, and was not told yet."""
        begins = item.began and item.call.direction is Direction.OUTBOUND
        return begins and self._beyond(item.call.account, item.call.id)

    def _beyond(self, account: int, notification: int) -> bool:
        mark = self._marks.get(account)
        return mark is None or notification > mark.notification

    async def _write(self, news: list[News], answers: Mapping[int, _Direct]) -> None:
        """Returns when all of it is stored, however often that must be tried, and shown."""
        due = self._clock() - self._marked_at >= MARK_S
        if not news and not (due and self._passed):
            for place in answers:
                _answer(answers[place], None)
            return
        advances: list[Advance | None] = []
        marks = self._passed

        async def attempt() -> None:
            advances.extend(await self._store.take(news, marks))

        await self._insist(attempt)
        self._passed = {}
        self._marked_at = self._clock()
        for place, (one, advance) in enumerate(zip(news, advances, strict=True)):
            if one.merges is not None:
                self._dials.forget(one.merges)
            if advance is None:
                self._dials.forget(one.dial)
            else:
                before = self._dials.known(one.dial)
                self._dials.keep(advance.dial)
                self._show(advance if advance.changed or before is None else _since(before, advance.dial))
            if place in answers:
                _answer(answers[place], None if advance is None else advance.dial)
        for place in answers:
            if place < 0:
                _answer(answers[place], None)
        self._observer.dials_waiting(self._dials.counts())

    def _show(self, advance: Advance) -> None:
        if advance.changed:
            self._observer.dial(advance)
        dial = advance.dial
        if advance.ended and dial.expired and dial.origin is Origin.PLACED and not dial.matched_by:
            self._observer.dial_unmatched("dial")

    # ── whose news it is ──────────────────────────────────────────────────────────────────────────────

    def _compose(self, items: Iterable[_Item], now: datetime) -> tuple[list[News], dict[int, _Direct]]:
        """The news for the store, and to whom the answer to each is given; those that got no news have
        negative places."""
        news: list[News] = []
        answers: dict[int, _Direct] = {}
        for item in items:
            match item:
                case Told():
                    news += self._call(item)
                case Trouble():
                    news += self._trouble(item)
                case _Direct():
                    found = self._of_adapter(item)
                    news += found
                    # Where several may be meant, none is the answer.
                    sole = bool(found) and found[-1].fact is not None
                    answers[len(news) - 1 if sole else -1 - len(answers)] = item
                case _:
                    self._pass(item)
        for dial in self._dials.due(now):
            news.append(News(dial.id, now, Elapsed()))
        return news, answers

    def _pass(self, marks: dict[int, Mark]) -> None:
        for account, mark in marks.items():
            before = self._marks.get(account)
            if before is None or mark.notification > before.notification:
                self._marks[account] = self._passed[account] = mark

    def _call(self, item: Told) -> list[News]:
        call, system = item.call, self._system_of(item.call.account)
        fact = CallHeard(call)
        mine = self._dials.of_call(call.id)
        named = None if system is System.GWS else self._dials.of_key(system, call.call_id)
        seen = sighting(call, system)
        if named is not None and not self._agrees(named, seen):
            named = None
        if mine is None and named is not None:
            # Its PBX said more of it than its call shows, and may have ended the dial with that already.
            told = None if system is System.CLICK2DIAL else fact
            return [News(named, item.at, told, item.notification, call=call.id)]
        if system is System.CLICK2DIAL:
            return []  # met at its end, which only its record tells: it is no other dial's
        if mine is not None and mine.origin is Origin.PLACED:
            return [News(mine.id, item.at, fact, item.notification)]
        if mine is None and self._dials.ended(call.id):
            return []
        found = match(self._dials.candidates(seen), seen)
        if mine is not None:
            # Only a reference, which came late, says that it is not just overheard.
            if found.dial is None or found.confidence is not MatchConfidence.CERTAIN:
                return [News(mine.id, item.at, fact, item.notification)]
            self._dials.claim(found.dial, call.id)
            return [_found(found.dial, found, item, fact, merges=mine.id)]
        if found.dial is not None:
            self._dials.claim(found.dial, call.id)
            return [_found(found.dial, found, item, fact)]
        if found.candidates:
            if self._dials.doubt(call.id):
                self._observer.dial_ambiguous()
            return [_found(dial, found, item) for dial in found.candidates]
        if self._new(item) and (opened := overheard(call, seen.system, self._deadlines)) is not None:
            self._dials.keep(opened)
            return [News(opened.id, item.at, fact, item.notification, opens=opened)]
        return []

    def _trouble(self, item: Trouble) -> list[News]:
        dial = blamed(self._dials.of_account(item.account), item.cause, item.at)
        if dial is not None:
            return [News(dial.id, item.at, Reported(item.cause), item.notification)]
        if self._dials.unclaimed(item.account):
            self._observer.dial_ambiguous()
        return []

    def _of_adapter(self, item: _Direct) -> list[News]:
        if item.seen is None:
            return [News(item.dial or "", item.at, item.fact)]
        known = self._dials.of_key(item.seen.system, item.key)
        if known is not None and self._agrees(known, item.seen):
            return [News(known, item.at, item.fact)]
        self._dials.unname(item.seen.system, item.key)
        found = match(self._dials.candidates(item.seen, reported=True), item.seen)
        if found.dial is not None:
            self._dials.name(found.dial, item.seen.system, item.key)
            return [News(found.dial.id, item.at, item.fact, found=found)]
        if found.candidates:
            self._observer.dial_ambiguous()
            return [News(dial.id, item.at, found=found) for dial in found.candidates]
        if not item.beside:
            self._observer.dial_unmatched("report")
            self._log.warning("a report of a call fits no dial", system=str(item.seen.system))
        return []

    def _agrees(self, id: str, seen: Sighting) -> bool:
        """Whether the call that was named may be that dial's; of one that is forgotten the store knows."""
        dial = self._dials.known(id)
        return dial is None or agrees(dial, seen)


def _since(before: Dial, after: Dial) -> Advance:
    """What became of a dial since we saw it: it was changed by a transaction whose answer was lost, or by
    another process."""
    return Advance(
        after,
        changed=after != before,
        ringing=before.ringing_at is None and after.ringing_at is not None,
        connected=before.connected_at is None and after.connected_at is not None,
        ended=before.outcome is None and after.outcome is not None,
        corrected=after.corrected and not before.corrected,
    )


def _found(dial: Dial, found: Match, item: Told, fact: Fact | None = None, merges: str | None = None) -> News:
    call = item.call.id if fact is not None else None
    return News(dial.id, item.at, fact, item.notification, found=found, call=call, merges=merges)


def _answer(item: _Direct, dial: Dial | None) -> None:
    if not item.done.done():
        item.done.set_result(dial)


class _Waiting:
    """The dials that wait for something, by all that they are looked up by; and the next deadlines."""

    def __init__(self, count_max: int) -> None:
        self._max = count_max
        self._dials: dict[str, Dial] = {}
        self._late: OrderedDict[str, Dial] = OrderedDict()
        self._by_call: dict[int, str] = {}
        self._by_account: dict[int, dict[str, None]] = {}
        self._unclaimed: dict[int, dict[str, Dial]] = {}
        self._by_hint: dict[tuple[System, str], dict[str, None]] = {}
        self._keys: OrderedDict[tuple[System, str], str] = OrderedDict()
        self._named: set[str] = set()
        self._ended: OrderedDict[int, None] = OrderedDict()
        self._doubted: OrderedDict[int, None] = OrderedDict()
        self._deadlines: list[tuple[datetime, str]] = []
        self._counts: Counter[System] = Counter()
        self.overflowed = False
        """There are, or were, more dials than may be kept."""

    @property
    def room(self) -> int:
        """How many dials may be kept."""
        return self._max

    def counts(self) -> Mapping[System, int]:
        """How many wait for their end, of each system."""
        return self._counts

    def keep(self, dial: Dial, *, beyond: bool = False) -> None:
        """The dial as it is now; one that needs nothing more is forgotten. `beyond` the bound only for as
        long as it takes to tell it something."""
        before = self._dials.get(dial.id)
        if before is None and dial.outcome is None and len(self._dials) >= self._max and not beyond:
            self.overflowed = True
            return
        if before is not None and before is not dial:
            self._drop(before)
        if dial.outcome is not None:
            self._end(dial)
            return
        self._dials[dial.id] = dial
        self._by_account.setdefault(dial.account, {})[dial.id] = None
        self._counts[dial.system] += 0 if before is dial else 1
        if dial.call is not None:
            self._by_call[dial.call] = dial.id
        elif dial.origin is Origin.PLACED:
            self._unclaimed.setdefault(dial.account, {})[dial.id] = dial
            for hint in _hints(dial):
                self._by_hint.setdefault(hint, {})[dial.id] = None
        if dial.deadline_at is not None and (before is None or before.deadline_at != dial.deadline_at):
            heapq.heappush(self._deadlines, (dial.deadline_at, dial.id))
            if len(self._deadlines) > 2 * len(self._dials) + STALE_DEADLINES_MAX:
                # Most belong to dials that have ended, or were put off.
                waiting = self._dials.values()
                self._deadlines = [(each.deadline_at, each.id) for each in waiting if each.deadline_at]
                heapq.heapify(self._deadlines)

    def _drop(self, dial: Dial) -> None:
        """Everything under which a waiting dial is found."""
        if self._dials.pop(dial.id, None) is not None:
            self._counts[dial.system] -= 1
        self._leave(dial)
        if dial.call is not None:
            self._by_call.pop(dial.call, None)
        self._unclaim(dial)

    def _leave(self, dial: Dial) -> None:
        ids = self._by_account.get(dial.account, {})
        ids.pop(dial.id, None)
        if not ids:
            self._by_account.pop(dial.account, None)

    def _unclaim(self, dial: Dial) -> None:
        waiting = self._unclaimed.get(dial.account, {})
        if waiting.pop(dial.id, None) is not None and not waiting:
            del self._unclaimed[dial.account]
        for hint in _hints(dial):
            names = self._by_hint.get(hint, {})
            names.pop(dial.id, None)
            if not names:
                self._by_hint.pop(hint, None)

    def _end(self, dial: Dial) -> None:
        self._late.pop(dial.id, None)
        if dial.outcome is Outcome.UNKNOWN and not dial.corrected:
            self._late[dial.id] = dial
            self._by_account.setdefault(dial.account, {})[dial.id] = None
            if dial.call is not None:
                self._by_call[dial.call] = dial.id
            else:
                for hint in _hints(dial):
                    self._by_hint.setdefault(hint, {})[dial.id] = None
            if len(self._late) > ENDED_MAX:
                self._forget_late(self._late.popitem(last=False)[1])
            return
        self._forget_late(dial)

    def _forget_late(self, dial: Dial) -> None:
        self._named.discard(dial.id)
        self._leave(dial)
        self._unclaim(dial)
        if dial.call is not None:
            self._by_call.pop(dial.call, None)
            _remember(self._ended, dial.call, ENDED_MAX)

    def forget(self, id: str) -> None:
        """There is no such dial of its own any more."""
        if (dial := self._dials.get(id)) is not None:
            claimed = self._by_call.get(dial.call) if dial.call is not None else None
            self._drop(dial)
            if dial.call is not None and claimed not in (None, id):
                self._by_call[dial.call] = str(claimed)

    def claim(self, dial: Dial, call: int) -> None:
        """The call is this dial's, from now on."""
        self._by_call[call] = dial.id
        self._unclaim(dial)

    def known(self, id: str) -> Dial | None:
        """The dial as it was when it was kept."""
        return self._dials.get(id) or self._late.get(id)

    def of_call(self, call: int) -> Dial | None:
        """The dial that is this call."""
        id = self._by_call.get(call)
        return None if id is None else self.known(id)

    def ended(self, call: int) -> bool:
        """Whether the call was a dial that has ended for good."""
        return call in self._ended

    def doubt(self, call: int) -> bool:
        """Whether it is the first time that this call may be several dials'."""
        first = call not in self._doubted
        _remember(self._doubted, call, ENDED_MAX)
        return first

    def concerned(self, call: Call) -> bool:
        """Whether the call is a dial's, or may be one's."""
        return call.id in self._by_call or call.account in self._unclaimed

    def calls(self) -> list[int]:
        """The calls of all dials here, in the order of their ids."""
        return sorted(self._by_call)

    def of_account(self, account: int) -> list[Dial]:
        """The dials of an account that wait for something."""
        found = [self.known(id) for id in self._by_account.get(account, ())]
        return [dial for dial in found if dial is not None]

    def unclaimed(self, account: int) -> list[Dial]:
        """The placed dials of an account that wait for their call."""
        return list(self._unclaimed.get(account, {}).values())

    def expecting(self, system: System) -> list[Dial]:
        """The same of all accounts of a system."""
        return [
            dial for dials in self._unclaimed.values() for dial in dials.values() if dial.system is system
        ]

    def candidates(self, seen: Sighting, *, reported: bool = False) -> list[Dial]:
        """The dials that a call may be, also those whose outcome it may correct; for a report of one not
        those that another call was reported for."""
        numbers = (seen.number, *seen.also)
        hints = [_ending(number) for number in numbers if number]
        hints += [f"={seen.reference}"] if seen.reference else []
        ids = {id: None for hint in hints for id in self._by_hint.get((seen.system, hint), ())}
        found = [self.known(id) for id in ids]
        return [dial for dial in found if dial is not None and not (reported and dial.id in self._named)]

    def of_key(self, system: System, key: str) -> str | None:
        """The dial of the call that its system calls so."""
        return self._keys.get((system, key)) if key else None

    def name(self, dial: Dial, system: System, key: str) -> None:
        """Its system calls the dial's call so."""
        if key:
            self._named.add(dial.id)
            self._keys[system, key] = dial.id
            if len(self._keys) > KEYS_MAX:
                self._keys.popitem(last=False)

    def unname(self, system: System, key: str) -> None:
        """What its system calls a call names no dial any more."""
        id = self._keys.pop((system, key), None)
        if id is not None:
            self._named.discard(id)

    def due(self, now: datetime) -> list[Dial]:
        """The dials whose deadline has come, as many as one batch takes; each once."""
        found: dict[str, Dial] = {}
        while self._deadlines and self._deadlines[0][0] <= now and len(found) < BATCH_MAX:
            at, id = heapq.heappop(self._deadlines)
            dial = self._dials.get(id)
            if dial is not None and dial.deadline_at == at:
                found[id] = dial
        return list(found.values())


def _hints(dial: Dial) -> list[tuple[System, str]]:
    """Under what a dial is looked up when a call is seen: the end of its number, and its reference."""
    hints = [(dial.system, _ending(dial.number))]
    return [*hints, (dial.system, f"={dial.reference}")] if dial.reference else hints


def _ending(number: str) -> str:
    return normalised(number)[-ENDING_DIGITS_MIN:]


def _remember(known: OrderedDict[int, None], value: int, count_max: int) -> None:
    known[value] = None
    known.move_to_end(value)
    if len(known) > count_max:
        known.popitem(last=False)
