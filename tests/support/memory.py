"""A journal in memory, for questions of scheduling alone: who waits for whom, and what goes into one batch.

It is a product with the contract of `listener.store.journal.Journal` as far as the pipeline and the ledger
know it, and `tests/test_pipeline.py` holds it to the same exam as the real one. What it adds is a hand on the
commit: a test may hold transactions open, or take the store away, for some accounts or for all.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime

from listener.core.calls import Cover, Heard, Missing, Recorded, noted
from listener.core.decode import decode
from listener.core.session import Saved
from listener.errors import StoreUnavailable

CHANNEL = "/v2/me/calls"
HEARD_AT = datetime(2026, 3, 2, 8, 0, tzinfo=UTC)
WAIT_s = 10.0
"""How long a test waits for what must happen."""
POLL_s = 0.001


async def until(condition: Callable[[], bool], within_s: float = WAIT_s) -> None:
    """Waits until the condition holds; TimeoutError when it does not in time."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(POLL_s)


def message(call: str, state: str = "Ringing", padding: int = 0) -> bytes:
    """A notification about a call, of v2."""
    return (
        b'{"channel":"%b","data":{"messageType":"CallStateChangeMessage","notificationType":"StatusChange",'
        b'"call":{"id":"%b","state":"%b","dnis":"5000"},"padding":"%b"}}'
        % (CHANNEL.encode(), call.encode(), state.encode(), b"x" * padding)
    )


class Said:
    """What one account's server says, delivery by delivery: messages with their places."""

    def __init__(self, account: int, stream: str, *, padding: int = 0, at: datetime = HEARD_AT) -> None:
        self.account = account
        self.stream = stream
        self.position = 0
        self.at = at
        self.said: list[Heard] = []
        """All of it."""
        self._padding = padding

    def next(self, count: int = 1) -> list[Heard]:
        """The next so many messages."""
        for _ in range(count):
            self.position += 1
            raw = message(f"{self.account}-{self.position}", padding=self._padding)
            self.said.append(Heard(self.account, self.stream, self.position, self.at, CHANNEL, raw))
        return self.said[-count:]


class MemoryJournal:
    """Stores messages and coverage in lists; each message of a stream once, by its position."""

    def __init__(self) -> None:
        self.available = True
        self.attempts = 0
        """Calls of `record`."""
        self.batches: list[list[Heard]] = []
        """What was committed, transaction by transaction."""
        self.covers: list[Cover] = []
        self.sessions: dict[int, Saved] = {}
        self.missing: list[tuple[Missing, bool]] = []
        """What was lost, and whether a start said so."""
        self.beats: list[tuple[frozenset[int], datetime]] = []
        self._positions: dict[str, int] = {}
        self._held: set[int] = set()
        self._released = asyncio.Event()

    def stored(self, account: int) -> list[Heard]:
        """What is stored of an account, in order."""
        return [each for batch in self.batches for each in batch if each.account == account]

    def hold(self, *accounts: int) -> None:
        """Lets transactions with these accounts wait before their commit, until `release`."""
        self._held.update(accounts)

    def release(self) -> None:
        """Lets them commit."""
        self._held.clear()
        self._released.set()
        self._released = asyncio.Event()

    async def record(self, heard: Sequence[Heard]) -> Recorded:
        """Commits the messages that are new, all or none; StoreUnavailable while it is away."""
        self.attempts += 1
        while self._held & {each.account for each in heard}:
            await self._released.wait()
        await self._answer()
        fresh = []
        for each in heard:
            if each.position > self._positions.get(each.stream, 0):
                self._positions[each.stream] = each.position
                fresh.append(each)
        if fresh:
            self.batches.append(fresh)
        new = tuple(noted(each, decode(each.raw, each.channel)) for each in fresh)
        return Recorded(new, (), len(heard) - len(fresh))

    async def cover(self, covers: Sequence[Cover], sessions: Mapping[int, Saved | None]) -> None:
        """Writes turns of coverage down, and what sessions are resumed with."""
        await self._answer()
        self.covers.extend(covers)
        for account, saved in sessions.items():
            self.sessions.pop(account, None)
            if saved is not None:
                self.sessions[account] = saved

    async def heartbeat(self, accounts: Iterable[int], at: datetime) -> None:
        """Writes a heartbeat down."""
        await self._answer()
        self.beats.append((frozenset(accounts), at))

    async def lose(
        self, missing: Sequence[Missing], restarted_at: datetime | None
    ) -> list[tuple[int, datetime, datetime]]:
        """Writes down what is missing; what gaps it makes is for the real one to say."""
        await self._answer()
        self.missing.extend((each, restarted_at is not None) for each in missing)
        return []

    async def _answer(self) -> None:
        await asyncio.sleep(0)  # a transaction takes at least a turn of the loop
        if not self.available:
            raise StoreUnavailable("The journal in memory was told to be away.")
