"""The composition root: builds everything, runs it, and stops it in order.

It decides only who is given to whom, what is reloaded, and the order of starting and stopping. Start: the
store (the bundled PostgreSQL if no other is configured), the journal, coverage ("nothing is observed yet"),
the operations pages, what places and hears dials, then a line for each account, which goes on with the
session of the run before where there is one. Stop, on SIGTERM or SIGINT, within `limits.stop_s`: nothing is
dialled any more, each server is asked once more for what it has queued, coverage says "stopped", the
sessions are left with their servers for the next start (or ended, with `goodbye`), what was heard is
committed and told to the dials, then the store; a second signal does not wait. SIGHUP reads the settings
again: accounts that are new begin, those that are gone end, those that changed begin anew, and all others
notice nothing.

One account's failure never reaches another: each runs in a task that catches whatever breaks it, says so,
in the coverage too, and begins again from nothing after a pause.
"""

import asyncio
import gc
import logging
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

import structlog
from msgspec import Struct

from listener import __version__
from listener.adapters.cometd import Endpoint, Line, resumable
from listener.adapters.genesys import GenesysClient
from listener.closing import Closer
from listener.core.calls import Missing, Recorded
from listener.core.session import Saved
from listener.coverage import REFUSED, SNAPSHOTS_AT_ONCE_MAX, UP, Ledger, Watch
from listener.dialroom import DialRoom
from listener.errors import ListenerError, SettingsError, StoreError, StoreUnavailable
from listener.metrics import Metrics
from listener.operations import Operations
from listener.pipeline import WRITERS, Pipeline, Spooling
from listener.probe import Probe
from listener.settings import Account, Environment, Log, Settings
from listener.store import migrate
from listener.store.claim import Claim
from listener.store.embedded import Embedded
from listener.store.journal import AccountRow, Journal
from listener.store.spool import Spool
from listener.switchboard import GwsWay

LOGINS_AT_ONCE_MAX = 20
"""Logins to one server in flight; others wait, as with snapshots. At a start every account wants one, and all
at once they would need the memory of as many HTTP clients, which the process then keeps. Each has its own
bound in time."""

BROKEN_S = 60.0
"""How long an account rests after something broke in its task that should not."""

STORE_RETRY_S = 1.0
STORE_RETRY_S_MAX = 30.0
"""Between attempts to reach the database at the start."""

TEND_S = 2.0
"""How often the bundled PostgreSQL is looked after: it is back about so long after it died."""

UNFINISHED_RETRY_S = 2.0
"""When a reload waits for the database: how long until it is tried again, and how long one try may last."""

CONNECTIONS = WRITERS + 3
"""To the database: one for each writer of the pipeline, one for coverage and what probes read, one for dials
that are placed, and one for what is heard of them."""

CLOSE_S = 2.0
"""How long the database may take to say goodbye; one that hangs never does."""

SECURE_S = 5.0
"""At a stop without a store: how long what waits may take to get into the spool."""

SPOOL_SHOWN_S = 5.0
"""How often the log says how far the spool is drained."""

PARTITIONS_S = 24 * 3600.0
"""How often the partitions of the months to come are made."""

NOT_UP_SHOWN_MAX = 20
"""How many accounts /-/ready names; of more it says how many."""


_Opened = TypeVar("_Opened")


class _Running(Struct):
    """One account that is listened to."""

    settings: Account
    environment: Environment
    watch: Watch
    task: asyncio.Task[None]


class _Works(Struct):
    """What every account is given; lives as long as the daemon listens."""

    journal: Journal
    pipeline: Pipeline
    ledger: Ledger
    tasks: asyncio.TaskGroup


class _Known(Struct, frozen=True):
    """What is known of an account that begins."""

    cause: str
    """Why it was not observed until now."""
    saved: Saved | None = None
    """A session to go on with."""
    observed_until: datetime | None = None
    """Since when the account is not observed, if that is for the restart alone."""
    mistrusted: bool = False
    """Something that was heard since then is lost."""


class _Eyes:
    """Counts what the pipeline and the watches do: joins their observers to the metrics."""

    def __init__(self, metrics: Metrics, wall: Callable[[], datetime], clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._wall = wall
        self._clock = clock
        self._spool = Spooling(0, 0, None, 0, 0, "")
        self._spool_shown = -SPOOL_SHOWN_S
        self._log = structlog.get_logger()
        self._failing = False
        self.room: DialRoom | None = None
        self.handshake = metrics.handshake
        self.reconnect = metrics.reconnect
        self.gap = metrics.gap
        self.duplicates = metrics.duplicates
        self.session_state = metrics.session_state
        self.probe = metrics.probe
        self.backlog = metrics.backlog

    def recorded(self, recorded: Recorded, seconds: float) -> None:
        """A batch was committed."""
        if self._failing:
            self._failing = False
            self._log.info("the store answers again")
        self._metrics.recorded(recorded, seconds, self._wall())
        if self.room is not None:
            self.room.watch.recorded(recorded)

    def store_failed(self, error: StoreUnavailable) -> None:
        """A batch was not committed, and waits."""
        self._metrics.commit_failed()
        if self.room is not None:
            self.room.watch.store_failed()
        if not self._failing:
            self._failing = True
            self._log.error("the store does not answer; nothing is acknowledged meanwhile", error=str(error))

    def spooling(self, now: Spooling) -> None:
        """Something about the spool changed."""
        before, self._spool = self._spool, now
        self._metrics.spool(
            notifications=now.notifications,
            size_bytes=now.size_bytes,
            oldest=now.oldest,
            drained=now.drained - before.drained,
            set_aside=now.set_aside - before.set_aside,
            full=bool(now.trouble),
        )
        if now.trouble and now.trouble != before.trouble:
            self._log.error("the spool takes no more; sessions wait", error=now.trouble)
        if now.set_aside > before.set_aside:
            self._log.error(
                "damaged in the spool and set aside: `listener spool` shows where", deliveries=now.set_aside
            )
        if now.notifications and not before.notifications:
            self._log.warning("what waits for the store is kept in the spool")
        ended = before.notifications > 0 and not now.notifications
        moved = now.drained > before.drained or now.notifications > before.notifications
        if ended or (moved and self._clock() - self._spool_shown >= SPOOL_SHOWN_S):
            self._spool_shown = self._clock()
            self._log.info(
                "the spool is drained" if ended else "spool",
                notifications=now.notifications,
                bytes=now.size_bytes,
                drained=now.drained,
            )


class Daemon:
    """Everything that runs. `serve` it; `stop` and `reload` may be called from signal handlers.

    `reread` gives the settings anew for a reload; it is called in a thread. `ready`, if given, is called once
    with the port of the operations pages when every account has been started. `goodbye` ends the sessions at
    a stop, instead of leaving them for the next start. `broken_s` is how long an account rests after a
    defect.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        reread: Callable[[], Settings] | None = None,
        ready: Callable[[int], None] | None = None,
        goodbye: bool = False,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),  # noqa: TID251 - a shell's default
        clock: Callable[[], float] = time.monotonic,
        broken_s: float = BROKEN_S,
    ) -> None:
        self.settings = settings
        self._reread = reread
        self._ready = ready
        self._goodbye = goodbye
        self._wall = wall
        self._clock = clock
        self._broken_s = broken_s
        self._log = structlog.get_logger()
        self._stopping = asyncio.Event()
        self._patience: asyncio.Timeout | None = None
        self._reload_wanted = False
        self._told = asyncio.Event()
        self._accounts: dict[str, _Running] = {}
        self._lines: dict[int, Line] = {}
        self._tls: dict[tuple[str | None, bool], ssl.SSLContext] = {}
        self._turn = asyncio.Semaphore(SNAPSHOTS_AT_ONCE_MAX)
        self._logins: dict[str, asyncio.Semaphore] = {}
        self._starting = "starting"
        self._metrics = Metrics()
        self._eyes = _Eyes(self._metrics, wall, clock)
        self._pipeline: Pipeline | None = None
        self._ledger: Ledger | None = None
        self._room: DialRoom | None = None
        self._retiring: dict[int, datetime] = {}
        self._awaited: list[str] = []
        """Whom a reload wants listened to, and has not come to yet; for /-/ready."""

    def stop(self) -> None:
        """Stop in order; a second call stops at once."""
        if self._stopping.is_set():
            raise SystemExit(1)
        self._log.info("stopping")
        self._stopping.set()
        self._told.set()
        if self._patience is not None:
            self._patience.reschedule(asyncio.get_running_loop().time())

    def reload(self) -> None:
        """Read the settings again and follow what changed among the accounts."""
        self._reload_wanted = True
        self._told.set()

    async def serve(self) -> None:
        """Run until `stop`. Raises `ListenerError` where it cannot even start."""
        settings = self.settings
        async with AsyncExitStack() as stack:
            operations = Operations(
                metrics=self._metrics.handler(),
                not_ready=self.not_ready,
                host=settings.operations.host,
                port=settings.operations.port,
                token=settings.operations.token.get_secret_value() if settings.operations.token else None,
            )
            await stack.enter_async_context(operations)
            dsn, embedded = await stack.enter_async_context(self._store())
            claim = await self._until_there(lambda: Claim.take(dsn))
            if claim is None:
                return
            async with asyncio.TaskGroup() as tasks:
                holding = tasks.create_task(self._hold(dsn, claim), name="claim")
                tending = tasks.create_task(self._tend(embedded), name="bundled postgresql")
                journal = await self._until_there(lambda: Journal.open(dsn, connections=CONNECTIONS))
                if journal is not None:
                    stack.push_async_callback(_close, journal)
                    spool = await asyncio.to_thread(self._open_spool)
                    stack.callback(spool.close)
                    await self._listen(journal, spool, dsn, operations.port)
                holding.cancel()
                tending.cancel()

    def _open_spool(self) -> Spool:
        spool = Spool.open(self.settings.spool_directory(), bytes_max=self.settings.limits.spool_bytes_max)
        if spool.torn_bytes:
            self._log.info("the spool's end, which a crash cut short, was removed", bytes=spool.torn_bytes)
        if spool.damaged:
            self._log.error(
                "damaged in the spool and set aside: `listener spool` shows where", stretches=spool.damaged
            )
            self._metrics.spool_damaged(spool.damaged)
        return spool

    @asynccontextmanager
    async def _store(self) -> AsyncIterator[tuple[str, Embedded | None]]:
        """The address of the database; the bundled one runs, and has its tables, for as long as we do."""
        if self.settings.store.dsn is not None:
            yield self.settings.store.dsn.get_secret_value(), None
            return
        embedded = Embedded(self.settings.store.data_dir)
        await asyncio.to_thread(embedded.start)
        try:
            await migrate.upgrade(embedded.dsn)
            yield embedded.dsn, embedded
        finally:
            await asyncio.to_thread(embedded.stop)

    async def _tend(self, embedded: Embedded | None) -> None:
        """Has the bundled PostgreSQL, where it is ours to run, started again when it has died."""
        wait_s = TEND_S
        while embedded is not None:
            await asyncio.sleep(wait_s)
            try:
                if await asyncio.to_thread(embedded.revive):
                    self._log.error("the bundled PostgreSQL had died, and was started again")
                wait_s = TEND_S
            except StoreError as error:
                wait_s = min(wait_s * 2, STORE_RETRY_S_MAX)
                self._log.error("the bundled PostgreSQL does not start", error=str(error), retry_s=wait_s)

    async def _until_there(self, open_: Callable[[], Awaitable[_Opened]]) -> _Opened | None:
        """Waits for a database that is not there yet; None when told to stop meanwhile."""
        opened: list[_Opened] = []

        async def attempts() -> None:
            opened.append(await self._insist(open_))

        await self._until_stopped(attempts())
        return opened[0] if opened else None

    async def _insist(self, attempt: Callable[[], Awaitable[_Opened]]) -> _Opened:
        """Tries until the database answers."""
        wait_s = STORE_RETRY_S
        while True:
            try:
                return await attempt()
            except StoreUnavailable as error:
                if self._starting:
                    self._starting = f"the database does not answer: {error}"
                self._log.error("the database does not answer", error=str(error), retry_s=wait_s)
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, STORE_RETRY_S_MAX)

    async def _hold(self, dsn: str, claim: Claim) -> None:
        """Keeps the claim; raises StoreError, which ends the daemon, when another listener has taken it
        while the database was away."""
        while True:
            try:
                await claim.lost()
            finally:
                await claim.release()
            claim = await self._insist(lambda: Claim.take(dsn))

    async def _listen(self, journal: Journal, spool: Spool, dsn: str, port: int) -> None:
        limits = self.settings.limits
        room = await self._until_there(lambda: self._open_room(journal, dsn))
        if room is None:
            return
        self._room = self._eyes.room = room
        ledger = self._ledger = Ledger(journal)
        pipeline = self._pipeline = Pipeline(
            journal,
            self._eyes,
            spool=spool,
            spooling=self._eyes.spooling,
            lost=partial(self._lose, ledger),
            batch_max=limits.batch_max,
            backlog_bytes_max=limits.backlog_bytes_max,
        )
        async with asyncio.TaskGroup() as tasks:
            writing = tasks.create_task(pipeline.run(), name="pipeline")
            covering = tasks.create_task(ledger.run(), name="ledger")
            upkeep = tasks.create_task(self._upkeep(journal), name="upkeep")
            probing = tasks.create_task(self._probe(journal), name="probe")
            dialling = tasks.create_task(room.watch.run(), name="dials")
            works = _Works(journal, pipeline, ledger, tasks)
            # Sessions go on from what is committed: what the spool has of them must be, before they do.
            if pipeline.spooled_notifications or spool.damaged:
                self._starting = "what an earlier run left in the spool is stored first"
            await self._until_stopped(pipeline.drain())
            async with room.working(pipeline, ledger, tasks):
                await self._until_there(lambda: self._follow_first(works))
                closing = tasks.create_task(self._closer(journal, pipeline).run(), name="closer")
                if not self._stopping.is_set():
                    self._starting = ""
                    calm_collector()
                    self._log.info("listening", accounts=len(self._accounts), port=port, version=__version__)
                    if self._ready is not None:
                        self._ready(port)
                while not self._stopping.is_set():
                    await self._until_stopped(self._follow_changes(works))
            closing.cancel()
            await self._farewell(works, room)
            for task in (writing, covering, upkeep, probing, dialling):
                task.cancel()
        self._log.info("stopped")

    async def _lose(self, ledger: Ledger, missing: Sequence[Missing], left: bool) -> None:  # noqa: FBT001 - as `pipeline.Losing`
        """Has it written down that what an earlier run (`left`), or this one, had heard is missing."""
        gaps = await ledger.lose(missing, self._wall() if left else None)
        lost = {account for account, _, _ in gaps}
        for _, since, until in gaps:
            self._metrics.gap("spool damaged", (until - since).total_seconds())
        if gaps:
            self._log.error(
                "messages that were heard are lost: a gap in the coverage",
                cause="spool damaged",
                accounts=len(lost),
                since=min(since for _, since, _ in gaps).isoformat(),
                until=max(until for _, _, until in gaps).isoformat(),
            )
        for running in self._accounts.values():
            if running.watch.account in lost:
                running.watch.mistrust(self._wall())

    async def _open_room(self, journal: Journal, dsn: str) -> DialRoom:
        return await DialRoom.open(
            self.settings, journal, dsn, metrics=self._metrics, wall=self._wall, clock=self._clock
        )

    async def _until_stopped(self, work: Coroutine[None, None, None]) -> None:
        """Awaits it, or gives it up when told to stop: it may wait for a database that hangs."""
        if self._stopping.is_set():
            work.close()
            return
        try:
            async with asyncio.timeout(None) as self._patience:
                await work
        except TimeoutError:
            if not self._stopping.is_set():
                raise
        finally:
            self._patience = None

    async def _farewell(self, works: _Works, room: DialRoom) -> None:
        """Ends every account and stores what was heard, within `limits.stop_s`."""
        stop_s = self.settings.limits.stop_s
        deadline = asyncio.get_running_loop().time() + stop_s
        with suppress(TimeoutError):
            # A server that does not answer the farewell must not use up the time for storing.
            async with asyncio.timeout(stop_s / 2):
                await self._end(list(self._accounts.values()), goodbye=self._goodbye)
        try:
            async with asyncio.timeout_at(deadline):
                await works.pipeline.drain()
                await room.watch.drain()
                await works.ledger.drain()
                await self._retire(works)
        except (TimeoutError, StoreUnavailable):
            with suppress(TimeoutError):
                async with asyncio.timeout(SECURE_S):
                    await works.pipeline.secure()
            self._log.error(
                "not everything could be stored in time; what was not is not acknowledged",
                notifications=works.pipeline.backlog_notifications,
                in_the_spool=works.pipeline.spooled_notifications,
                stop_s=stop_s,
            )

    async def _follow_changes(self, works: _Works) -> None:
        """Waits to be told something, and does it; what the database did not take is tried again."""
        unfinished = self._reload_wanted or self._retiring
        with suppress(TimeoutError):
            async with asyncio.timeout(UNFINISHED_RETRY_S if unfinished else None):
                await self._told.wait()
        self._told.clear()
        if self._stopping.is_set():
            return
        if self._reload_wanted:
            self._reload_wanted = False
            await self._reload(works)
        try:
            async with asyncio.timeout(UNFINISHED_RETRY_S):
                await self._retire(works)
        except (TimeoutError, StoreUnavailable):
            self._log.info("the accounts that are gone wait for the database", accounts=len(self._retiring))

    async def _reload(self, works: _Works) -> None:
        """Settings that are wrong change nothing: what runs goes on as it is."""
        if self._reread is None:
            return
        try:
            settings = await asyncio.to_thread(self._reread)
            self._tls.clear()  # certificates that were renewed are read again
            await self._follow(settings, works)
        except StoreUnavailable as error:
            self._reload_wanted = True
            self._log.error("not reloaded yet; tried again soon", error=str(error))
            return
        except ListenerError as error:
            self._log.error("not reloaded; everything goes on as it was", error=str(error))
            return
        except Exception:  # noqa: BLE001 - whatever was wrong with the settings, those that run are right
            self._log.exception("not reloaded; everything goes on as it was")
            return
        finally:
            if not self._reload_wanted:  # else they are awaited until the next try has come to them
                self._awaited = []
        for section in ("store", "noojee", "click2dial", "api", "operations", "limits", "log"):
            if getattr(settings, section) != getattr(self.settings, section):
                self._log.warning("takes effect at the next start", section=section)
        self.settings = settings
        self._log.info("reloaded", accounts=len(self._accounts))

    async def _follow_first(self, works: _Works) -> None:
        """The accounts of the start."""
        # Of all accounts, also of those that are gone: their calls go on until their end is inferred.
        self._metrics.open_calls(await works.journal.open_calls())
        await self._follow(self.settings, works)

    async def _follow(self, settings: Settings, works: _Works) -> None:
        """Makes the running accounts those of `settings`. Whatever it raises, nothing was changed."""
        if not settings.accounts and not self.settings.pbx_accounts():
            raise SettingsError("there are no accounts: add some, or stop the daemon if that is meant")
        wanted = {account.name: account for account in settings.accounts}
        gone = [
            running
            for name, running in self._accounts.items()
            if name not in wanted
            or running.settings != wanted[name]
            or running.environment != settings.environment(wanted[name])
            # Whoever reloads may have mended the account at the server: it need not wait for its turn.
            or running.watch.state == REFUSED
        ]
        new = [account for name, account in wanted.items() if name not in self._accounts]
        changed = [wanted[running.settings.name] for running in gone if running.settings.name in wanted]
        # Everything that may fail comes before anything is changed.
        for account in (*new, *changed):
            self._context(settings.environment(account))
        self._awaited = [account.name for account in (*new, *changed)]
        rows = [AccountRow(a.name, a.tenant, a.environment) for a in wanted.values()]
        ids = await works.journal.register(rows)
        known = await self._recall([ids[account.name] for account in new], works.journal)
        for number in ids.values():
            self._retiring.pop(number, None)
        at = self._wall()
        self._retiring.update({each.watch.account: at for each in gone if each.settings.name not in wanted})
        await self._end(gone, goodbye=True)
        for account in new:
            number = ids[account.name]
            self._begin(account, settings, number, works, known[number])
        for account in changed:
            self._begin(account, settings, ids[account.name], works, _Known("stopped"))
        self._metrics.accounts(len(self._accounts))

    async def _recall(self, accounts: list[int], journal: Journal) -> dict[int, _Known]:
        """What earlier runs left of accounts that are about to begin; from here on they are not observed."""
        if not accounts:
            return {}
        observed_until = await journal.resume_coverage(accounts, self._wall())
        saved = await journal.kept_sessions(accounts)
        damaged = await journal.damaged_since(accounts)
        return {
            number: _Known("not started", saved.get(number), observed_until.get(number), number in damaged)
            for number in accounts
        }

    async def _retire(self, works: _Works) -> None:
        """Writes down which accounts are gone, after all that was said of them. Raises StoreUnavailable."""
        if self._retiring:
            await works.ledger.drain()
        for at in sorted(set(self._retiring.values())):
            gone = [number for number, gone_at in self._retiring.items() if gone_at == at]
            await works.journal.retire(gone, at)
            for number in gone:
                del self._retiring[number]

    def _begin(self, account: Account, settings: Settings, number: int, works: _Works, known: _Known) -> None:
        """Begins to listen to an account; goes on with its session if it can be."""
        environment = settings.environment(account)
        tls = self._context(environment)
        endpoint = Endpoint(
            url=environment.base_url + environment.notifications_path,
            connection_types=("websocket", "long-polling") if environment.websocket else ("long-polling",),
            tls=tls,
            channels=environment.channels,
            login_first=True,
            delivery_bytes_max=settings.limits.delivery_bytes_max,
            owner=f"{account.login} {environment.base_url}",
        )
        logins = self._logins.setdefault(environment.base_url, asyncio.Semaphore(LOGINS_AT_ONCE_MAX))
        left = [known.saved] if known.saved is not None and resumable(known.saved, endpoint) else []
        genesys = GenesysClient(
            environment.base_url,
            settings.login_headers(account),
            tls=tls,
            start_session=settings.logs_agent_in(account),
            me_path=environment.me_path,
            snapshot_path=environment.snapshot_path,
            wall=self._wall,
        )
        watch = Watch(
            number,
            account.name,
            pipeline=works.pipeline,
            ledger=works.ledger,
            observer=self._eyes,
            tasks=works.tasks,
            snapshot=genesys.snapshot,
            snapshot_channel=environment.snapshot_path,
            turn=self._turn,
            since=self._wall(),
            cause=known.cause,
            acknowledges=bool(left) and left[0].kept.ack,
            observed_until=known.observed_until if left else None,
            mistrusted=known.mistrusted,
            clock=self._clock,
        )

        def line() -> Line:
            saved = left.pop() if left else None  # only for the first: what broke it may be what was saved
            made = Line(
                number,
                endpoint,
                genesys,
                watch,
                saved=saved,
                turn=logins,
                clock=self._clock,
                wall=self._wall,
            )
            made.goodbye = False
            self._lines[number] = made
            watch.carried_by(partial(_give_up, made))
            return made

        if self._room is not None:
            self._room.gws[account.name] = GwsWay(
                number, account.name, account.environment, settings.may_dial(account), genesys.dial
            )
        task = works.tasks.create_task(self._keep(watch, line), name=f"account {account.name}")
        self._accounts[account.name] = _Running(account, environment, watch, task)

    async def _keep(self, watch: Watch, line: Callable[[], Line]) -> None:
        """Runs a line for ever; what breaks it breaks nothing else, and the next one begins from nothing."""
        task = asyncio.current_task()
        while True:
            try:
                await line().run()
                why = "it ended by itself"
            except asyncio.CancelledError:
                why = "it was cancelled from within"
            except Exception as error:  # noqa: BLE001 - whatever it is, the other accounts must not notice
                why = f"{type(error).__name__}: {error}"
                self._log.exception("an account broke", account=watch.name)
            if task is not None and task.cancelling():
                raise asyncio.CancelledError
            self._log.error("an account begins again", account=watch.name, why=why, retry_s=self._broken_s)
            watch.broke(self._wall(), f"a defect of the listener: {why}")
            await asyncio.sleep(self._broken_s)

    async def _end(self, running: Sequence[_Running], *, goodbye: bool) -> None:
        """Stops accounts, all at the same time; with `goodbye` their sessions are over."""
        at = self._wall()
        for each in running:
            line = self._lines.pop(each.watch.account, None)
            if line is not None:
                line.goodbye = goodbye
                # Before the farewell, from which on nothing is heard any more, however long it takes.
                line.left = partial(each.watch.end, at)
            each.task.cancel()
            del self._accounts[each.settings.name]
            if self._room is not None:
                self._room.gws.pop(each.settings.name, None)
        try:
            await asyncio.gather(*(each.task for each in running), return_exceptions=True)
        finally:
            for each in running:
                each.watch.end(at)  # where the line had nobody to ask, or did not come that far

    def _context(self, environment: Environment) -> ssl.SSLContext | None:
        """The TLS context of an environment; those that trust alike share one. Raises `SettingsError`."""
        if not environment.base_url.startswith("https"):
            return None
        key = (str(environment.ca_file) if environment.ca_file else None, environment.verify)
        if key not in self._tls:
            try:
                context = ssl.create_default_context(cafile=key[0])
            except (OSError, ssl.SSLError) as error:
                raise SettingsError(
                    f"ca_file {key[0]}: no certificates can be read from it: {error}"
                ) from None
            if not environment.verify:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            self._tls[key] = context
        return self._tls[key]

    async def _probe(self, journal: Journal) -> None:
        def listened() -> list[Watch]:
            return [each.watch for each in self._accounts.values()]

        every_s = self.settings.limits.probe_s
        if every_s:
            await Probe(journal, self._eyes, listened, every_s=every_s, clock=self._clock).run()

    def _closer(self, journal: Journal, pipeline: Pipeline) -> Closer:
        limits = self.settings.limits
        return Closer(
            journal,
            pipeline,
            call_hours_max=limits.call_hours_max,
            wrap_up_s_max=limits.wrap_up_s_max,
            wall=self._wall,
        )

    async def _upkeep(self, journal: Journal) -> None:
        while True:
            await asyncio.sleep(PARTITIONS_S)
            try:
                made = await journal.ensure_partitions()
            except StoreError as error:
                self._log.error("partitions not made", error=str(error))
            else:
                self._log.info("partitions made", partitions=made)

    @property
    def accounts(self) -> int:
        """How many accounts are listened to."""
        return len(self._accounts)

    def not_ready(self) -> list[str]:
        """Why the daemon does not do all of its work now; empty when it does."""
        if self._stopping.is_set():
            return ["stopping"]
        if self._starting:
            return [self._starting]
        reasons = []
        stores = [each.available for each in (self._pipeline, self._ledger) if each is not None]
        if not all(stores):
            reasons.append("the database does not answer")
        if self._pipeline is not None and self._pipeline.spool_trouble:
            reasons.append(self._pipeline.spool_trouble)
        if self._room is not None:
            reasons += self._room.not_ready()
        # Whoever is between two settings is listened to by nobody, and must not be missed by nobody.
        awaited = [name for name in self._awaited if name not in self._accounts]
        troubled = [running for running in self._accounts.values() if running.watch.state != UP]
        told = [f"{name}: a reload is about to begin it" for name in awaited[:NOT_UP_SHOWN_MAX]]
        told += [
            f"{running.settings.name}: {running.watch.trouble or 'not subscribed yet'}"
            for running in troubled[: NOT_UP_SHOWN_MAX - len(told)]
        ]
        if more := len(awaited) + len(troubled) - len(told):
            told.append(f"and {more} accounts more")
        return reasons + told


def run(
    settings: Settings,
    *,
    reread: Callable[[], Settings] | None = None,
    ready: Callable[[int], None] | None = None,
    goodbye: bool = False,
) -> None:
    """Run the daemon in this process until SIGTERM or SIGINT; SIGHUP reloads. `goodbye` is `Daemon`'s.

    Raises `ListenerError` where it cannot start.
    """
    log_to_stderr(settings.log)

    async def serve() -> None:
        daemon = Daemon(settings, reread=reread, ready=ready, goodbye=goodbye)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, daemon.stop)
        loop.add_signal_handler(signal.SIGINT, daemon.stop)
        loop.add_signal_handler(signal.SIGHUP, daemon.reload)
        await daemon.serve()

    try:
        asyncio.run(serve())
    except ExceptionGroup as group:
        # A task group wraps even a single error; whoever called us wants that one.
        ours, defects = group.split(ListenerError)
        if ours is None or defects is not None:
            raise
        raise _first(ours) from None


def _first(group: ExceptionGroup[ListenerError]) -> ListenerError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error


async def _give_up(line: Line, cause: str, detail: str) -> None:
    """Ends a session that is connected and of no use; another begins at once. It logs in anew and without
    cookies, which may be what leads to the wrong node or agent."""
    line.credentials.jar.clear()
    line.session.login_first()
    await line.tell(line.session.abandon(cause, detail, line.clock()))
    line.wake.ring()
    await line.hang_up()  # a connect that is held would be waited for


async def _close(journal: Journal) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_S):
            await journal.close()


def calm_collector() -> None:
    """Takes what was made until now out of the garbage collector's sight, since it stays: a full collection
    would walk over all of it, and stop the event loop for tens of milliseconds each time."""
    gc.collect()
    gc.freeze()
    # A batch makes tens of thousands of short-lived objects, none of them in a cycle.
    gc.set_threshold(50_000, 20, 20)


class _Bridge(logging.Handler):
    """Writes what libraries say to the standard library's logging as lines of ours, without tracebacks: what
    matters of a failure is said by whoever meets it."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        extra = {"error": f"{type(error).__name__}: {error}"} if error is not None else {}
        structlog.get_logger().log(record.levelno, record.getMessage(), logger=record.name, **extra)


def log_to_stderr(log: Log) -> None:
    """Makes structlog write to standard error, as JSON lines or as text, and libraries through it."""
    logging.basicConfig(handlers=[_Bridge()], level=logging.WARNING, force=True)
    renderer: structlog.types.Processor = structlog.processors.JSONRenderer(sort_keys=False)
    if log.format == "text":
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[log.level.upper()]
        ),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
