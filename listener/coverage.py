"""Knows for each account and moment whether it is observed, and why not: no silent deafness.

A `Watch` stands between one account's line and the pipeline. It reads the facts of the session: a handshake
is a gap until the channels are subscribed *and* a snapshot of the live calls has been stored, because what
happened in between was said to nobody; a lost connection is a gap until the session goes on, and none at
all where the server kept everything for us. The `Ledger` writes what the watches say, in order, whether the
store answers at once or later.

Three things can make "observed" a lie that no fact of the session corrects, and are seen to here. A crash
loses what was heard and not committed: so the heartbeat vouches for an account only up to when the last
answer was asked for of which, as of all before it, the messages are durable. And while the store is slow, a
session that acknowledges leaves the newer messages with the server: if the server forgets the session then,
the gap began when we stopped taking. And a server may answer every connect and say nothing: a probe
(`listener.probe`) finds that out, and the gap began after the last that was heard, since neither the answers
in between nor a probe that agreed prove that nothing was missed.

Nothing here decides what a gap is (`listener.core.session` does), and nothing here speaks SQL or HTTP: the
protocols below say what is needed of both.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Protocol

import structlog
from msgspec import Struct

from listener.core.calls import Cover, Heard, Missing, Snapshot, Source
from listener.core.decode import decode
from listener.core.session import (
    Delivered,
    Fact,
    Gap,
    Handshaken,
    Refused,
    Resumed,
    Saved,
    Subscribed,
    SubscriptionRefused,
    Unbroken,
)
from listener.errors import LoginRefused, RemoteError, RemoteUnavailable, StoreUnavailable

SNAPSHOTS_AT_ONCE_MAX = 20
"""REST requests for snapshots in flight. After a server's restart every account wants one: others wait."""

SNAPSHOT_RETRY_S = 1.0
SNAPSHOT_RETRY_S_MAX = 30.0
SNAPSHOT_REFUSED_S = 60.0
SNAPSHOT_REFUSED_S_MAX = 3600.0
"""Between two snapshots after the login was refused: insisting locks accounts."""

SETTLED_S = 0.25
SETTLED_TRIPS = 5
"""When a session has been silent for so long after a snapshot came, or for so many times what the snapshot
took where that is longer, nothing that was said before it is under way any more: the server holds a connect,
and would have answered it. A busy server, or a busy listener, is late with either."""

SETTLED_LISTED_TIMES = 8
"""So many times as long a silence is waited for where the snapshot that is to be stored lists calls: then
more is at stake, and what is under way may be about one of them."""

LEDGER_RETRY_S = 0.5
LEDGER_RETRY_S_MAX = 1.0
"""Between attempts to write while the store is away."""

COVERS_MAX = 4096
"""Covers written in one transaction."""

COVERS_WAITING_MAX = 50_000
"""When more covers wait for the store, each account's are shortened: what remains says "observed" nowhere
where it was not said before, so that it is coarser and still true."""

HEARTBEAT_S = 10.0
"""How often "observed" is written down anew."""

VOUCHED_GRAIN_S = 5.0
"""Heartbeats vouch for moments on this grid, so that thousands of accounts need few statements."""

CALL_CHANNELS = frozenset({"/v2/me/calls", "/workspace/v3/voice"})
"""Where calls are told, in v2 and v3: what comes on another channel does not show that calls would."""

HELD_S = 5.0
"""A session without acknowledgements asks for nothing while the store takes nothing. If that lasted so long,
and the server has forgotten the session meanwhile, then it was lost by the store."""

QUICK_S = 0.15
"""A commit that is quicker than this was known before the session asked again; it keeps silent for longer
(`listener.core.session.Limits.retry_s`) before it asks with an old acknowledgement."""

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


Losses = Sequence[tuple[int, datetime, datetime]]
"""Gaps in what had counted as observed: account, beginning and end of each."""


class CoverageJournal(Protocol):
    """What the ledger needs of the store: `listener.store.journal.Journal`."""

    async def cover(self, covers: Sequence[Cover], sessions: Mapping[int, Saved | None]) -> None:
        """Writes turns of coverage, in order, and in the same transaction what the sessions of some accounts
        can be resumed with; None forgets one."""

    async def heartbeat(self, accounts: Iterable[int], at: datetime) -> None:
        """These accounts were observed until then."""

    async def lose(self, missing: Sequence[Missing], restarted_at: datetime | None) -> Losses:
        """Makes gaps of what is missing, and of nothing else; at a start, says when it was."""


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


Abandon = Callable[[str, str], Awaitable[None]]
"""How a line gives up its session: with the cause, one of `calls.GAP_CAUSES`, and the detail."""

Vouched = Callable[[], datetime | None]
"""Until when everything that an account's server said is durable; None when that is not known yet."""


class _Loss(Struct, frozen=True):
    """What is missing, and who waits for that to be written."""

    missing: Sequence[Missing]
    restarted_at: datetime | None
    written: asyncio.Future[Losses]


class Ledger:
    """Writes coverage in the order in which it was told, and with it what sessions are resumed with: so that
    where an account counts as observed, the session that is kept is the one that observed it.

    `run` it in a task; cancel it after `drain`.
    """

    def __init__(
        self, journal: CoverageJournal, *, pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._journal = journal
        self._pause = pause
        self._waiting: list[Cover] = []
        self._sessions: dict[int, Saved | None] = {}
        self._losses: list[_Loss] = []
        self._shorten_at = COVERS_WAITING_MAX
        self._told = asyncio.Event()
        self._written = asyncio.Event()
        self._written.set()
        self._observed: dict[int, Vouched] = {}
        self.available = True
        """False while the store does not answer."""

    def cover(self, cover: Cover, vouched: Vouched = lambda: None) -> None:
        """Takes one turn; it is written soon. `vouched` is asked at each heartbeat while it is observed."""
        self._waiting.append(cover)
        if cover.cause:
            self._observed.pop(cover.account, None)
        else:
            self._observed[cover.account] = vouched
        if len(self._waiting) > self._shorten_at:
            self._waiting = shortened(self._waiting)
            # What cannot be shortened any more must not be tried at every turn.
            self._shorten_at = max(COVERS_WAITING_MAX, 2 * len(self._waiting))
        self._written.clear()
        self._told.set()

    def keep(self, account: int, saved: Saved | None) -> None:
        """Takes what an account's session is resumed with from now on; None when it is over."""
        self._sessions[account] = saved
        self._written.clear()
        self._told.set()

    async def lose(self, missing: Sequence[Missing], restarted_at: datetime | None = None) -> Losses:
        """Takes what is missing of what was heard; returns when that is written, after all that was told
        before, with the gaps that it made. At a start, before anything is heard, `restarted_at` says when."""
        loss = _Loss(missing, restarted_at, asyncio.get_running_loop().create_future())
        self._losses.append(loss)
        self._written.clear()
        self._told.set()
        return await loss.written

    async def drain(self) -> None:
        """Returns when everything that was told is written; bound it with a timeout."""
        await self._written.wait()

    async def run(self) -> None:
        """Writes until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._write(), name="coverage")
            tasks.create_task(self._beat(), name="coverage-heartbeat")

    async def _write(self) -> None:
        while True:
            await self._told.wait()
            self._told.clear()
            while self._waiting or self._sessions or self._losses:
                if not self._waiting and not self._sessions:
                    await self._insist(partial(self._lose, self._losses.pop(0)))
                    continue
                part, self._waiting = self._waiting[:COVERS_MAX], self._waiting[COVERS_MAX:]
                sessions: dict[int, Saved | None] = {}
                if not self._waiting:  # with the last turn that was told before them, or with a later one
                    sessions, self._sessions = self._sessions, {}
                await self._insist(partial(self._journal.cover, part, sessions))
            self._shorten_at = COVERS_WAITING_MAX
            self._written.set()

    async def _insist(self, write: Callable[[], Awaitable[None]]) -> None:
        """Returns when it is written."""
        wait_s = LEDGER_RETRY_S
        while not await self._stored(write()):
            await self._pause(wait_s)
            wait_s = min(wait_s * 2, LEDGER_RETRY_S_MAX)

    async def _lose(self, loss: _Loss) -> None:
        made = await self._journal.lose(loss.missing, loss.restarted_at)
        if not loss.written.done():  # who told it may be gone
            loss.written.set_result(made)

    async def _beat(self) -> None:
        wait_s = HEARTBEAT_S
        while True:
            await self._pause(wait_s)
            wait_s = HEARTBEAT_S
            if not self._written.is_set():
                continue  # an end that is not written yet would be overtaken
            for at, accounts in self._vouched():
                if not await self._stored(self._journal.heartbeat(accounts, at)):
                    # Soon again, or the store would seem to be away for longer than it is.
                    wait_s = LEDGER_RETRY_S_MAX
                    break

    def _vouched(self) -> list[tuple[datetime, list[int]]]:
        """The observed accounts by the moment until which they are known to be."""
        moments: dict[datetime, list[int]] = {}
        for account, vouched in sorted(self._observed.items()):
            at = vouched()
            if at is not None:
                on_grid_s = at.timestamp() // VOUCHED_GRAIN_S * VOUCHED_GRAIN_S
                moments.setdefault(datetime.fromtimestamp(on_grid_s, UTC), []).append(account)
        return sorted(moments.items())

    async def _stored(self, writing: Awaitable[None]) -> bool:
        """False when the store did not answer."""
        try:
            await writing
        except StoreUnavailable:
            # A driver may answer a cancellation with the failure of the connection that it broke.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise asyncio.CancelledError from None
            self.available = False
            return False
        self.available = True
        return True


def shortened(covers: Sequence[Cover]) -> list[Cover]:
    """Of each account what is true at least: as it was up to its first gap, which lasts to its last turn."""
    kept: list[Cover] = []
    last: dict[int, Cover] = {}
    ended: set[int] = set()
    for cover in covers:
        if cover.account in ended:
            last[cover.account] = cover
        else:
            kept.append(cover)
            if cover.cause:
                ended.add(cover.account)
    return [*kept, *last.values()]


class _Gap(Struct, frozen=True):
    """Since when an account is not observed, and why."""

    since: datetime
    cause: str
    named: float | None
    """What the session calls its beginning; None for the time before the first session."""


class _Delivery(Struct, frozen=True):
    """Messages that the session has taken, and that are not durable yet."""

    at: datetime
    taken: float
    """The same on the steady clock."""
    asked_after: datetime | None
    """When the answer before it came: what was said until then came with it or before."""
    known_until: datetime | None
    """When the answer before it was asked for: what was said until then came before."""


class Watch:
    """One account: hands on what its line hears, and keeps its coverage. Satisfies `adapters.cometd.Hearing`.

    It is unobserved since `since`, because of `cause`, until its session says otherwise. Where the line
    resumes a session, `acknowledges` says whether its server does, and `observed_until` since when the
    account would not be observed but for that; None if not for the restart alone. With `mistrusted`, some of
    what was heard before is lost, and a snapshot is stored although the session goes on. `snapshot` asks for
    the live calls; None where there is no REST to ask, and then a subscription alone closes a gap. `tasks` is
    where the snapshot runs, `clock` the one of the session. Call `answered` after every answer of the server,
    `end` when the account is listened to no more. Satisfies `listener.probe.Listened` too, once `carried_by`
    has said how a session is given up.
    """

    __slots__ = (  # one for each account, of which there are thousands
        "_abandon",
        "_acknowledges",
        "_announced",
        "_answered_at",
        "_answers",
        "_asked_last",
        "_behind_since",
        "_clock",
        "_closing",
        "_ended",
        "_gap",
        "_has_observed",
        "_held_since",
        "_ledger",
        "_observer",
        "_owed",
        "_pause",
        "_pipeline",
        "_resumes_from",
        "_said_until",
        "_saved",
        "_settled_s",
        "_slow",
        "_snapshot",
        "_snapshot_channel",
        "_stretch",
        "_subscribed_at",
        "_sure_at",
        "_tasks",
        "_turn",
        "_undurable",
        "account",
        "name",
        "state",
        "trouble",
    )

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
        since: datetime,
        cause: str = "not started",
        acknowledges: bool = False,
        observed_until: datetime | None = None,
        mistrusted: bool = False,
        settled_s: float = SETTLED_S,
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
        self._settled_s = settled_s
        self._clock = clock
        self._pause = pause
        self._gap: _Gap | None = _Gap(since, cause, None)
        self._ended = False
        self._acknowledges = acknowledges
        self._resumes_from = observed_until if acknowledges else None
        self._has_observed = False
        self._saved: Saved | None = None
        self._subscribed_at: datetime | None = None
        self._owed = self._resumes_from is None or mistrusted
        self._closing: asyncio.Task[None] | None = None
        self._announced: list[_Delivery] = []
        self._undurable: list[_Delivery] = []
        self._answers = 0
        self._answered_at: datetime | None = None
        self._said_until: datetime | None = None
        self._asked_last: datetime | None = None
        self._slow: datetime | None = None
        self._held_since: datetime | None = None
        self._behind_since: datetime | None = None
        self._sure_at: datetime | None = None
        self._stretch = 0
        self._abandon: Abandon | None = None
        self._stand(STARTING)

    @property
    def _log(self) -> Any:
        """Made when there is something to say, which is seldom: thousands of loggers would only wait."""
        return structlog.get_logger().bind(account=self.name)

    # What was heard

    async def hear(self, heard: Sequence[Heard], committed: Callable[[], None]) -> None:
        """Hands messages on to the pipeline; their `Delivered` has been told before."""
        delivery = self._announced.pop(0) if self._announced else None

        def durable() -> None:
            if delivery is not None:
                self._slow = self._slow or self._slowest()
                self._undurable.remove(delivery)
            committed()

        began, at = self._clock(), self._answered_at
        await self._pipeline.hear(heard, durable)
        if not self._acknowledges and self._clock() - began > HELD_S:
            self._held_since = at

    def keep(self, saved: Saved | None) -> None:
        """What the session can be resumed with from now on; None when it is over.

        Only a session that has observed the account is resumed: another one, going on after a restart, would
        withdraw a gap that began before its handshake.
        """
        self._saved = saved
        if saved is None or self._has_observed:
            self._ledger.keep(self.account, saved)

    def answered(self, at: datetime, *, took: bool) -> None:
        """The server answered, and all facts of the answer have been told; `took`: with new messages."""
        slow, self._slow = self._slow or self._slowest(), None
        if took or slow is None:
            self._behind_since = None
        else:
            # Asked with an old acknowledgement, the answer was left with the server, whatever it held.
            self._behind_since = self._behind_since or slow
        self._answers += 1
        # An answer holds what had been said when it was asked for, which was after the one before it came.
        # When it was given, and how long it was under way, is not known.
        self._said_until, self._answered_at = self._answered_at, at
        self._held_since = None

    def _slowest(self) -> datetime | None:
        """Until when all that was said came with the oldest delivery whose commit is not known yet, or before
        it, if the session asks meanwhile."""
        if not self._acknowledges or not self._undurable:
            return None
        oldest = self._undurable[0]
        return (oldest.asked_after or oldest.at) if self._clock() - oldest.taken > QUICK_S else None

    def vouched(self) -> datetime | None:
        """Until when everything that the server said is durable, whatever happens to us now."""
        if self._asked_last is not None and not self._undurable:
            return self._asked_last
        at = self._undurable[0].known_until if self._undurable else self._said_until
        doubts = [doubt for doubt in (at, self._slow, self._behind_since) if doubt is not None]
        return min(doubts) if at is not None else None

    def mistrust(self, at: datetime) -> None:
        """Something that was heard before is lost, which the coverage says already: a snapshot is stored, as
        after every gap, so that the calls are right again."""
        if self._ended:
            return
        self._owed = True
        if self._gap is None:
            self._goes_on(at)

    # What a probe asks and finds

    def carried_by(self, abandon: Abandon) -> None:
        """Says how the present line gives its session up."""
        self._abandon = abandon

    @property
    def stretch(self) -> int | None:
        """The number of the stretch of time without a gap that goes on now; None while there is a gap."""
        return self._stretch if self.state == UP else None

    async def live(self) -> tuple[Heard, Snapshot]:
        """A list of the live calls, which is not stored, once all that was said before it came is durable.

        Raises `RemoteError` when none comes that claims to be complete. While the store does not answer, it
        does not return: bound it.
        """
        if self._snapshot is None:
            raise RemoteUnavailable("there is no REST to ask for the live calls")
        async with self._turn:
            reply = await self._snapshot()
        decoded = decode(reply.raw, self._snapshot_channel)
        if not isinstance(decoded, Snapshot) or not decoded.complete:
            raise RemoteUnavailable(f"the answer does not list all calls ({len(reply.raw)} bytes)")
        await self._caught_up(reply, self._settled_s)
        taken = self._undurable[-1] if self._undurable else None
        while taken is not None and any(each is taken for each in self._undurable):
            await self._pause(self._settled_s)
        return self._as_heard(reply), decoded

    async def give_up(self, detail: str, by: datetime) -> None:
        """Something that was said by then was not heard: this session ends, and another one begins.

        The gap, with the cause "stalled", begins with the last message about a call, or else with the
        subscription. A list that agreed in between moves nothing: a call may have come and gone unheard.
        """
        if self._ended or self._abandon is None:
            return
        self._sure_at = by if self._sure_at is None else min(self._sure_at, by)
        await self._abandon("stalled", detail)

    # What the session says

    def told(self, fact: Fact, at: datetime) -> None:
        """Reads one fact of the session, of the time `at`."""
        if self._ended:
            return
        match fact:
            case Delivered():
                if fact.messages or fact.odd:
                    asked_after, known_until = self._answered_at, self._said_until
                    if self._resumes_from is not None:
                        # All that is known of what this life has not heard is what the one before it left.
                        asked_after = known_until = self._resumes_from
                    elif self._gap is not None and known_until is not None:
                        # Where the gap is none in the end, this is what was said since it began.
                        known_until = min(known_until, self._gap.since)
                    delivery = _Delivery(at, self._clock(), asked_after, known_until)
                    self._announced.append(delivery)
                    self._undurable.append(delivery)
                if any(channel in CALL_CHANNELS for channel, _ in fact.messages):
                    self._sure_at = at
                if fact.redelivered:
                    self._observer.duplicates(fact.redelivered)
            case Handshaken():
                self._has_observed = False
                self._saved = None
                self._ledger.keep(self.account, None)
                self._owed = True
                self._resumes_from = None
                self._acknowledges = fact.ack
                self._subscribed_at = None
                self._forget_snapshot()
                self._observer.handshake()
                self._log.info("handshake", acknowledges=fact.ack, client_id=_masked(fact.client_id))
            case Subscribed():
                if self._subscribed_at is None:
                    self._subscribed_at = self._sure_at = at
                self._goes_on(at)
            case Gap():
                self._lost(fact, at)
            case Unbroken() if self._resumes_from is not None:
                # The session of before the restart goes on, and the server kept everything.
                since, self._resumes_from = self._resumes_from, None
                self._log.info("session resumed", observed_since=since.isoformat())
                self._sure_at = since
                self._answered_at = self._answered_at or since
                self._goes_on(since, withdraws=True)
            case Unbroken():
                # The server kept everything: there was no gap.
                self._goes_on(self._gap.since if self._gap is not None else at)
            case Resumed():
                self._subscribed_at = self._sure_at = at
                self._owed = True
                self._goes_on(at)
            case SubscriptionRefused(channel, error, retry_s):
                self._log.error("subscription refused", channel=channel, error=error, retry_s=retry_s)
                self.trouble = f"the server refuses {channel}: {error}"
                self._stand(REFUSED)
            case Refused(error, retry_s):
                self._log.error("the server wants no more of us", error=error, retry_s=retry_s)
                self.trouble = f"the server refuses the session: {error}"
                self._stand(REFUSED)

    def broke(self, at: datetime, detail: str) -> None:
        """The session ended by a defect of ours, whatever it had in hand; another one will begin."""
        since = self.vouched() or at  # before what it had in hand is forgotten, which nobody will say again
        for delivery in self._announced:
            self._undurable.remove(delivery)
        self._announced.clear()
        self._resumes_from = None
        self._deaf(_Gap(since, "session lost", self._clock()), detail)

    def end(self, at: datetime, asked_last: datetime | None = None, *, cause: str = "stopped") -> None:
        """The account is listened to no more, from `at` on; what its session still says changes nothing, nor
        does another call.

        Unless the session is resumed, the gap began when the last answer was asked for, which may be long
        before `at`: what was said since may have been under way, and nobody waits for it any more. But if the
        server was asked once more, at `asked_last`, when all that it had said before was durable, and has
        answered, then everything until that moment is in what it has told.
        """
        if self._ended:
            return
        self._ended = True
        self._asked_last = asked_last
        self._forget_snapshot()
        if self._gap is not None:
            self._count(self._gap, at)
        else:
            at = min(at, self.vouched() or at)
        self._ledger.cover(Cover(self.account, at, cause))
        self._stand(None)

    # Gaps

    def _lost(self, fact: Gap, at: datetime) -> None:
        since = at - timedelta(seconds=max(0.0, self._clock() - fact.since))
        if fact.cause == "stalled" and self._sure_at is not None:
            since = self._sure_at  # the answers since then were no evidence
        if self._acknowledges and self._behind_since is not None:
            since = min(since, self._behind_since)
        cause = fact.cause
        if self._held_since is not None and cause == "session lost":
            cause, since = "storage down", min(since, self._held_since)
        self._deaf(_Gap(since, cause, fact.since), fact.detail)

    def _deaf(self, gap: _Gap, detail: str) -> None:
        self._forget_snapshot()
        was = self._gap
        if self._resumes_from is not None and gap.cause == "disconnected":
            # The gap of the restart goes on, and may still turn out to be none.
            self._log.warning("the session to resume is not reached yet", detail=detail)
            self.trouble = f"{gap.cause}: {detail}"
            self._stand(WAITING)
            return
        if was is not None and was.named == gap.named:
            gap = _Gap(was.since, gap.cause, gap.named)  # the same, of which more is known now
            self._log.info("gap goes on", cause=gap.cause, detail=detail)
        else:
            if was is not None:
                self._count(was, gap.since)
            self._log.warning("gap", cause=gap.cause, detail=detail, since=gap.since.isoformat())
        self._gap = gap
        self._ledger.cover(Cover(self.account, gap.since, gap.cause))
        self.trouble = f"{gap.cause}: {detail}"
        self._stand(REFUSED if gap.cause in ("login refused", "subscription refused") else WAITING)

    def _goes_on(self, at: datetime, *, withdraws: bool = False) -> None:
        """Every channel is subscribed, and all that was said since `at` is heard or will be; `withdraws` as
        in `_found`."""
        if not self._owed or self._snapshot is None:
            self._owed = False
            self._found(at, withdraws=withdraws)
        elif self._closing is None:
            closing = self._close_gap(self._snapshot, at if withdraws else None)
            self._closing = self._tasks.create_task(closing)

    async def _close_gap(
        self, snapshot: Callable[[], Awaitable[Reply]], withdraws_since: datetime | None
    ) -> None:
        """Stores what is live now; then nothing that happened before the subscription is in doubt, or before
        the session went on."""
        reply, live = await self._ask(snapshot)
        await self._caught_up(reply, self._settled_s * (SETTLED_LISTED_TIMES if live.calls else 1))
        heard = self._as_heard(reply)
        stored = asyncio.Event()
        await self._pipeline.hear([heard], stored.set)
        await stored.wait()
        self._closing = None
        self._owed = False
        if withdraws_since is not None:
            self._found(withdraws_since, withdraws=True)
        else:
            self._found(self._subscribed_at or reply.asked_at)

    def _as_heard(self, reply: Reply) -> Heard:
        return Heard(
            account=self.account,
            stream=str(uuid.uuid4()),
            position=1,
            received_at=reply.received_at,
            channel=self._snapshot_channel,
            raw=reply.raw,
            source=Source.SNAPSHOT,
            asked_at=reply.asked_at,
        )

    async def _ask(self, snapshot: Callable[[], Awaitable[Reply]]) -> tuple[Reply, Snapshot]:
        """A reply that lists all live calls, however often it must be asked for."""
        wait_s, most_s = SNAPSHOT_RETRY_S, SNAPSHOT_RETRY_S_MAX
        while True:
            try:
                async with self._turn:
                    reply = await snapshot()
            except LoginRefused as error:
                why = str(error)
                wait_s, most_s = max(wait_s, SNAPSHOT_REFUSED_S), SNAPSHOT_REFUSED_S_MAX
                self._stand(REFUSED)
            except RemoteError as error:
                why = str(error)
            except Exception as error:  # noqa: BLE001 - a defect of ours must not end the other accounts
                self._log.exception("snapshot broke")
                why = f"{type(error).__name__}: {error}"
            else:
                decoded = decode(reply.raw, self._snapshot_channel)
                if isinstance(decoded, Snapshot) and decoded.complete:
                    return reply, decoded
                why = f"the answer does not list all calls ({len(reply.raw)} bytes)"
            self._log.warning("snapshot failed", error=why, retry_s=wait_s)
            self.trouble = f"no snapshot of the live calls: {why}"
            await self._pause(wait_s)
            wait_s = min(wait_s * 2, most_s)

    async def _caught_up(self, reply: Reply, settled_s: float) -> None:
        """Waits until the session has heard everything that was said before a reply, which has just come; a
        silence shows that if it lasts `settled_s`.

        A snapshot that overtook messages in the session's queue would show a state first and how it came
        about afterwards: calls that are held twice, or that begin in the middle. Heard in this order, what
        was said since the snapshot was asked for counts, and what it knows of the other calls.
        """
        before = self._answers
        took_s = (reply.received_at - reply.asked_at).total_seconds()
        settled_s = max(settled_s, SETTLED_TRIPS * took_s)
        while True:
            seen = self._answers
            await self._pause(settled_s)
            behind = self._slow or self._behind_since or self._announced
            # The second answer was asked for after the reply had come.
            if self._answers >= before + 2 and not behind:
                return
            if self._answers == seen and not self._undurable:
                return

    def _found(self, at: datetime, *, withdraws: bool = False) -> None:
        """Observed from `at` on; with `withdraws`, whatever was written of gaps since then."""
        self._stretch += 1
        if not self._has_observed:
            self._has_observed = True
            if self._saved is not None:
                self._ledger.keep(self.account, self._saved)
        gap, self._gap = self._gap, None
        if gap is not None:
            self._count(gap, at)
            if gap.named is not None:
                self._log.info("gap closed", cause=gap.cause, until=at.isoformat())
                self._observer.reconnect()
        self._ledger.cover(Cover(self.account, at, withdraws=withdraws), self.vouched)
        self.trouble = ""
        self._stand(UP)

    def _count(self, gap: _Gap, until: datetime) -> None:
        """What the rows say of a gap that ended, or goes on for another cause."""
        if until > gap.since:
            self._observer.gap(gap.cause, (until - gap.since).total_seconds())

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
