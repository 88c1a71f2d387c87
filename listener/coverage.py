"""Knows for each account and moment whether it is observed, and why not: no silent deafness.

A `Watch` stands between one account's line and the pipeline. It reads the facts of the session: a handshake
is a gap until the channels are subscribed *and* a snapshot of the live calls has been stored, because what
happened in between was said to nobody; a lost connection is a gap until the session goes on, and none at
all where the server kept everything for us. The `Ledger` writes what the watches say, in order, whether the
store answers at once or later.

Nothing here decides what a gap is (`listener.core.session` does), and nothing here speaks SQL or HTTP: the
protocols below say what is needed of both.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Protocol

import structlog

from listener.core.calls import Cover, Heard, Source
from listener.core.session import (
    Delivered,
    Fact,
    Gap,
    Handshaken,
    Refused,
    Resumed,
    Subscribed,
    SubscriptionRefused,
    Unbroken,
)
from listener.errors import RemoteError, StoreUnavailable

SNAPSHOTS_AT_ONCE_MAX = 20
"""REST requests for snapshots in flight. After a server's restart every account wants one: others wait."""

SNAPSHOT_RETRY_S = 1.0
SNAPSHOT_RETRY_S_MAX = 30.0
LEDGER_RETRY_S = 0.5
LEDGER_RETRY_S_MAX = 5.0

COVERS_MAX = 4096
"""Covers written in one transaction."""

HEARTBEAT_S = 10.0
"""How often "observed" is written down anew: what a crash leaves uncertain is at most this long."""

STARTING, UP, WAITING, REFUSED = "starting", "up", "waiting", "refused"
"""The states of a session as metrics show them."""


class Reply(Protocol):
    """A snapshot as it came; `listener.adapters.genesys.Reply` is one."""

    @property
    def asked_at(self) -> datetime:
        """When it was asked for."""

    @property
    def received_at(self) -> datetime:
        """When it came."""

    @property
    def raw(self) -> bytes:
        """Its exact bytes."""


class Hears(Protocol):
    """Takes messages to the store: `listener.pipeline.Pipeline`."""

    async def hear(self, heard: Sequence[Heard], committed: Callable[[], None]) -> None:
        """Returns when there is room for more; calls `committed` when they are durable."""


class CoverageJournal(Protocol):
    """What the ledger needs of the store: `listener.store.journal.Journal`."""

    async def cover(self, covers: Sequence[Cover]) -> None:
        """Writes turns of coverage, in order."""

    async def heartbeat(self, accounts: Iterable[int], at: datetime) -> None:
        """These accounts are observed now."""


class Observer(Protocol):
    """Who counts what the sessions do."""

    def handshake(self) -> None:
        """A handshake was granted."""

    def reconnect(self) -> None:
        """A lost session or connection is up again."""

    def gap(self, cause: str, seconds: float) -> None:
        """An account was not observed for so long."""

    def duplicates(self, count: int) -> None:
        """The server repeated so many messages, and they were recognised."""

    def session_state(self, before: str | None, after: str | None) -> None:
        """An account's session went from one state to another."""


class Ledger:
    """Writes coverage in the order in which it was told. `run` it in a task.

    What waits is bounded by what can happen: an account has a handful of turns while the store is away,
    because each wait of its session is longer than the one before.
    """

    def __init__(
        self,
        journal: CoverageJournal,
        *,
        wall: Callable[[], datetime],
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._journal = journal
        self._wall = wall
        self._pause = pause
        self._waiting: list[Cover] = []
        self._told = asyncio.Event()
        self._written = asyncio.Event()
        self._written.set()
        self.observed: set[int] = set()
        """The accounts that are observed now."""

    def cover(self, cover: Cover) -> None:
        """Takes one turn; it is written soon."""
        self._waiting.append(cover)
        if cover.cause:
            self.observed.discard(cover.account)
        else:
            self.observed.add(cover.account)
        self._written.clear()
        self._told.set()

    async def drain(self) -> None:
        """Returns when everything that was told is written; bound it with a timeout."""
        await self._written.wait()

    async def run(self) -> None:
        """Writes until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._write(), name="coverage")
            tasks.create_task(self._beat(), name="coverage-heartbeat")

    async def _write(self) -> None:
        wait_s = LEDGER_RETRY_S
        while True:
            await self._told.wait()
            self._told.clear()
            while self._waiting:
                part = self._waiting[:COVERS_MAX]
                try:
                    await self._journal.cover(part)
                except StoreUnavailable:
                    await self._pause(wait_s)
                    wait_s = min(wait_s * 2, LEDGER_RETRY_S_MAX)
                else:
                    wait_s = LEDGER_RETRY_S
                    del self._waiting[: len(part)]
            self._written.set()

    async def _beat(self) -> None:
        while True:
            await self._pause(HEARTBEAT_S)
            if self.observed and not self._waiting:
                try:
                    await self._journal.heartbeat(sorted(self.observed), self._wall())
                except StoreUnavailable:
                    continue  # the pipeline says so; the next beat comes


class Watch:
    """One account: hands on what its line hears, and keeps its coverage. Satisfies `adapters.cometd.Hearing`.

    `snapshot` asks for the live calls; None where there is no REST to ask, and then a subscription alone
    closes a gap. `tasks` is where the snapshot runs. Call `end` when the account is listened to no more.
    """

    def __init__(
        self,
        account: int,
        name: str,
        *,
        pipeline: Hears,
        ledger: Ledger,
        observer: Observer,
        tasks: asyncio.TaskGroup,
        snapshot: Callable[[], Awaitable[Reply]] | None,
        snapshot_channel: str = "/api/v2/me/calls",
        turn: asyncio.Semaphore,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.account = account
        self.name = name
        self.state: str | None = None
        self.trouble = ""
        """Why it is not up, for a person; empty while it is."""
        self._pipeline = pipeline
        self._ledger = ledger
        self._observer = observer
        self._tasks = tasks
        self._snapshot = snapshot
        self._snapshot_channel = snapshot_channel
        self._turn = turn
        self._clock = clock
        self._pause = pause
        self._log = structlog.get_logger().bind(account=name)
        self._fresh = False
        self._gap: tuple[float, datetime, str] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._stand(STARTING)

    async def hear(self, heard: Sequence[Heard], committed: Callable[[], None]) -> None:
        """Hands messages on to the pipeline."""
        await self._pipeline.hear(heard, committed)

    def told(self, fact: Fact, at: datetime) -> None:
        """Reads one fact of the session, of the time `at`."""
        match fact:
            case Delivered():
                if fact.redelivered:
                    self._observer.duplicates(fact.redelivered)
            case Handshaken():
                self._fresh = True
                self._observer.handshake()
                self._log.info("handshake", acknowledges=fact.ack, client_id=_masked(fact.client_id))
            case Subscribed():
                self._subscribed(at)
            case Gap(since, cause, detail):
                self._lost(since, cause, detail, at)
            case Unbroken():
                # The server kept everything: there was no gap.
                self._found(self._gap[1] if self._gap else at)
            case Resumed():
                self._found(at)
            case SubscriptionRefused(channel, error, retry_s):
                self._log.error("subscription refused", channel=channel, error=error, retry_s=retry_s)
                self.trouble = f"the server refuses {channel}: {error}"
                self._stand(REFUSED)
            case Refused(error, retry_s):
                self._log.error("the server wants no more of us", error=error, retry_s=retry_s)
                self.trouble = f"the server refuses the session: {error}"
                self._stand(REFUSED)

    def end(self, at: datetime, cause: str = "stopped") -> None:
        """The account is listened to no more, from `at` on."""
        self._forget_snapshot()
        self._ledger.cover(Cover(self.account, at, cause))
        self._stand(None)

    def _subscribed(self, at: datetime) -> None:
        if not self._fresh or self._snapshot is None:
            self._fresh = False
            self._found(at)
            return
        self._fresh = False
        self._forget_snapshot()
        self._closing = self._tasks.create_task(self._close_gap(self._snapshot, at))

    async def _close_gap(self, snapshot: Callable[[], Awaitable[Reply]], since: datetime) -> None:
        """Stores what is live now; then nothing that happened before `since` is in doubt any more."""
        wait_s = SNAPSHOT_RETRY_S
        reply: Reply | None = None
        while reply is None:
            try:
                async with self._turn:
                    reply = await snapshot()
            except RemoteError as error:
                self._log.warning("snapshot failed", error=str(error), retry_s=wait_s)
                self.trouble = f"no snapshot of the live calls: {error}"
                await self._pause(wait_s)
                wait_s = min(wait_s * 2, SNAPSHOT_RETRY_S_MAX)
        heard = Heard(
            account=self.account,
            stream=str(uuid.uuid4()),
            position=1,
            received_at=reply.received_at,
            channel=self._snapshot_channel,
            raw=reply.raw,
            source=Source.SNAPSHOT,
            asked_at=reply.asked_at,
        )
        stored = asyncio.Event()
        await self._pipeline.hear([heard], stored.set)
        await stored.wait()
        self._closing = None
        self._found(since)

    def _lost(self, since: float, cause: str, detail: str, at: datetime) -> None:
        self._forget_snapshot()
        since_at = at - timedelta(seconds=max(0.0, self._clock() - since))
        if self._gap is None:
            self._log.warning("gap", cause=cause, detail=detail, since=since_at.isoformat())
            self._gap = (since, since_at, cause)
        else:
            self._log.info("gap goes on", cause=cause, detail=detail)
            since, since_at, _ = self._gap
            self._gap = (since, since_at, cause)
        self._ledger.cover(Cover(self.account, since_at, cause))
        self.trouble = f"{cause}: {detail}"
        self._stand(REFUSED if cause in ("login refused", "subscription refused") else WAITING)

    def _found(self, at: datetime) -> None:
        """Observed from `at` on."""
        if self._gap is not None:
            since, _, cause = self._gap
            seconds = self._clock() - since
            self._log.info("gap closed", cause=cause, seconds=round(seconds, 3))
            self._observer.gap(cause, seconds)
            self._observer.reconnect()
            self._gap = None
        self._ledger.cover(Cover(self.account, at))
        self.trouble = ""
        self._stand(UP)

    def _forget_snapshot(self) -> None:
        """A snapshot of a session that is gone closes nothing."""
        closing, self._closing = self._closing, None
        if closing is not None:
            closing.cancel()

    def _stand(self, state: str | None) -> None:
        if state != self.state:
            self._observer.session_state(self.state, state)
            self.state = state


def _masked(credential: str) -> str:
    """Enough of a clientId to tell two apart; whoever has all of it can take the session over."""
    return credential[:6] + "…"
