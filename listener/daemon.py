"""The composition root: builds everything, runs it, and stops it in order.

It decides only who is given to whom, what is reloaded, and the order of starting and stopping. Start: the
store (the bundled PostgreSQL if no other is configured), the journal, coverage ("nothing is observed yet"),
the operations pages, then a line for each account. Stop, on SIGTERM or SIGINT, within `limits.stop_s`: no
more sessions, coverage says "stopped", what was heard is committed, then the store; a second signal does not
wait. SIGHUP reads the settings again: accounts that are new begin, those that are gone end, those that
changed begin anew, and all others notice nothing.

One account's failure never reaches another: each runs in a task that catches whatever breaks it, says so,
and begins again after a pause.
"""

import asyncio
import gc
import logging
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime

import structlog
from msgspec import Struct

from listener import __version__
from listener.adapters.cometd import Endpoint, Line
from listener.adapters.genesys import GenesysClient
from listener.core.calls import Recorded
from listener.coverage import SNAPSHOTS_AT_ONCE_MAX, UP, Ledger, Watch
from listener.errors import ListenerError, SettingsError, StoreUnavailable
from listener.metrics import Metrics
from listener.operations import Operations
from listener.pipeline import Pipeline
from listener.settings import Account, Environment, Log, Settings
from listener.store import migrate
from listener.store.embedded import Embedded
from listener.store.journal import AccountRow, Journal

BROKEN_S = 60.0
"""How long an account rests after something broke in its task that should not."""

STORE_RETRY_S = 1.0
STORE_RETRY_S_MAX = 30.0
"""Between attempts to reach the database at the start."""

PARTITIONS_S = 24 * 3600.0
"""How often the partitions of the months to come are made."""

NOT_UP_SHOWN_MAX = 20
"""How many accounts /-/ready names; of more it says how many."""


class _Running(Struct):
    """One account that is listened to."""

    settings: Account
    environment: Environment
    watch: Watch
    line: Line
    task: asyncio.Task[None]


class _Works(Struct):
    """What every account is given; lives as long as the daemon listens."""

    journal: Journal
    pipeline: Pipeline
    ledger: Ledger
    tasks: asyncio.TaskGroup


class _Eyes:
    """Counts what the pipeline and the watches do: joins their observers to the metrics."""

    def __init__(self, metrics: Metrics, wall: Callable[[], datetime]) -> None:
        self._metrics = metrics
        self._wall = wall
        self._log = structlog.get_logger()
        self._failing = False
        self.handshake = metrics.handshake
        self.reconnect = metrics.reconnect
        self.gap = metrics.gap
        self.duplicates = metrics.duplicates
        self.session_state = metrics.session_state
        self.backlog = metrics.backlog

    def recorded(self, recorded: Recorded, seconds: float) -> None:
        """A batch was committed."""
        if self._failing:
            self._failing = False
            self._log.info("the store answers again")
        self._metrics.recorded(recorded, seconds, self._wall())

    def store_failed(self, error: StoreUnavailable) -> None:
        """A batch was not committed, and waits."""
        self._metrics.commit_failed()
        if not self._failing:
            self._failing = True
            self._log.error("the store does not answer; nothing is acknowledged meanwhile", error=str(error))


class Daemon:
    """Everything that runs. `serve` it; `stop` and `reload` may be called from signal handlers.

    `reread` gives the settings anew for a reload. `ready`, if given, is called once with the port of the
    operations pages when every account has been started.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        reread: Callable[[], Settings] | None = None,
        ready: Callable[[int], None] | None = None,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),  # noqa: TID251 - a shell's default
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self._reread = reread
        self._ready = ready
        self._wall = wall
        self._clock = clock
        self._log = structlog.get_logger()
        self._stopping = asyncio.Event()
        self._reload_wanted = False
        self._told = asyncio.Event()
        self._accounts: dict[str, _Running] = {}
        self._tls: dict[tuple[str | None, bool], ssl.SSLContext] = {}
        self._turn = asyncio.Semaphore(SNAPSHOTS_AT_ONCE_MAX)
        self._starting = "starting"
        self._metrics = Metrics()
        self._eyes = _Eyes(self._metrics, wall)
        self._pipeline: Pipeline | None = None

    def stop(self) -> None:
        """Stop in order; a second call stops at once."""
        if self._stopping.is_set():
            raise SystemExit(1)
        self._log.info("stopping")
        self._stopping.set()
        self._told.set()

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
            dsn = await stack.enter_async_context(self._store())
            journal = await self._open_journal(dsn)
            if journal is None:
                return
            stack.push_async_callback(journal.close)
            await self._listen(journal, operations.port)

    @asynccontextmanager
    async def _store(self) -> AsyncIterator[str]:
        """The address of the database; the bundled one runs, and has its tables, for as long as we do."""
        if self.settings.store.dsn is not None:
            yield self.settings.store.dsn.get_secret_value()
            return
        embedded = Embedded(self.settings.store.data_dir)
        await asyncio.to_thread(embedded.start)
        try:
            await migrate.upgrade(embedded.dsn)
            yield embedded.dsn
        finally:
            await asyncio.to_thread(embedded.stop)

    async def _open_journal(self, dsn: str) -> Journal | None:
        """Waits for a database that is not there yet; None when told to stop meanwhile."""
        wait_s = STORE_RETRY_S
        while not self._stopping.is_set():
            try:
                return await Journal.open(dsn)
            except StoreUnavailable as error:
                self._starting = f"the database does not answer: {error}"
                self._log.error("the database does not answer", error=str(error), retry_s=wait_s)
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._stopping.wait()
                wait_s = min(wait_s * 2, STORE_RETRY_S_MAX)
        return None

    async def _listen(self, journal: Journal, port: int) -> None:
        limits = self.settings.limits
        pipeline = self._pipeline = Pipeline(
            journal, self._eyes, batch_max=limits.batch_max, backlog_bytes_max=limits.backlog_bytes_max
        )
        ledger = Ledger(journal, wall=self._wall)
        async with asyncio.TaskGroup() as tasks:
            writing = tasks.create_task(pipeline.run(), name="pipeline")
            covering = tasks.create_task(ledger.run(), name="ledger")
            upkeep = tasks.create_task(self._upkeep(journal), name="upkeep")
            works = _Works(journal, pipeline, ledger, tasks)
            await self._follow(self.settings, works, first=True)
            self._starting = ""
            calm_collector()
            self._log.info("listening", accounts=len(self._accounts), port=port, version=__version__)
            if self._ready is not None:
                self._ready(port)
            while not self._stopping.is_set():
                await self._told.wait()
                self._told.clear()
                if self._reload_wanted and not self._stopping.is_set():
                    self._reload_wanted = False
                    await self._reload(works)
            await self._end(list(self._accounts.values()))
            try:
                async with asyncio.timeout(limits.stop_s):
                    await pipeline.drain()
                    await ledger.drain()
            except TimeoutError:
                self._log.error(
                    "not everything could be stored in time; it was not acknowledged",
                    notifications=pipeline.backlog_notifications,
                    stop_s=limits.stop_s,
                )
            for task in (writing, covering, upkeep):
                task.cancel()
        self._log.info("stopped")

    async def _reload(self, works: _Works) -> None:
        """Settings that are wrong change nothing: what runs goes on as it is."""
        if self._reread is None:
            return
        try:
            settings = self._reread()
            await self._follow(settings, works)
        except ListenerError as error:
            self._log.error("not reloaded; everything goes on as it was", error=str(error))
            return
        self.settings = settings
        self._log.info("reloaded", accounts=len(self._accounts))

    async def _follow(self, settings: Settings, works: _Works, *, first: bool = False) -> None:
        """Makes the running accounts those of `settings`."""
        wanted = {account.name: account for account in settings.accounts}
        gone = [
            running
            for name, running in self._accounts.items()
            if name not in wanted
            or running.settings != wanted[name]
            or running.environment != settings.environment(wanted[name])
        ]
        new = [account for name, account in wanted.items() if name not in self._accounts]
        changed = [wanted[running.settings.name] for running in gone if running.settings.name in wanted]
        # Everything that may fail comes before anything is changed.
        for account in (*new, *changed):
            self._context(settings.environment(account))
        rows = [AccountRow(a.name, a.tenant, a.environment) for a in wanted.values()]
        ids = await works.journal.register(rows)
        if new:
            await works.journal.resume_coverage([ids[account.name] for account in new], self._wall())
        if first:
            self._metrics.open_calls(await works.journal.open_calls(list(ids.values())))
        await self._end(gone)
        retired = [running.watch.account for running in gone if running.settings.name not in wanted]
        if retired:
            await works.ledger.drain()
            await works.journal.retire(retired, self._wall())
        for account in (*new, *changed):
            self._accounts[account.name] = self._begin(account, settings, ids[account.name], works)
        self._metrics.accounts(len(self._accounts))

    def _begin(self, account: Account, settings: Settings, number: int, works: _Works) -> _Running:
        environment = settings.environment(account)
        tls = self._context(environment)
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
            clock=self._clock,
        )
        endpoint = Endpoint(
            url=environment.base_url + environment.notifications_path,
            connection_types=("websocket", "long-polling") if environment.websocket else ("long-polling",),
            tls=tls,
            channels=environment.channels,
            login_first=True,
            delivery_bytes_max=settings.limits.delivery_bytes_max,
        )
        line = Line(number, endpoint, genesys, watch, clock=self._clock, wall=self._wall)
        task = works.tasks.create_task(self._keep(account.name, line), name=f"account {account.name}")
        return _Running(account, environment, watch, line, task)

    async def _keep(self, name: str, line: Line) -> None:
        """Runs a line for ever; what breaks it breaks nothing else."""
        while True:
            try:
                await line.run()
            except Exception:  # noqa: BLE001 - whatever it is, the other accounts must not notice
                self._log.exception("an account broke; it begins again", account=name, retry_s=BROKEN_S)
            await asyncio.sleep(BROKEN_S)

    async def _end(self, running: Sequence[_Running]) -> None:
        """Stops accounts, each with a farewell, all at the same time."""
        for each in running:
            each.task.cancel()
        await asyncio.gather(*(each.task for each in running), return_exceptions=True)
        at = self._wall()
        for each in running:
            each.watch.end(at)
            del self._accounts[each.settings.name]

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

    async def _upkeep(self, journal: Journal) -> None:
        while True:
            await asyncio.sleep(PARTITIONS_S)
            try:
                made = await journal.ensure_partitions()
            except StoreUnavailable as error:
                self._log.warning("partitions not made", error=str(error))
            else:
                self._log.info("partitions made", partitions=made)

    @property
    def accounts(self) -> int:
        """How many accounts are listened to."""
        return len(self._accounts)

    def not_ready(self) -> list[str]:
        """Why the daemon does not do all of its work now; empty when it does."""
        if self._starting:
            return [self._starting]
        reasons = []
        if self._pipeline is not None and not self._pipeline.available:
            reasons.append("the database does not answer")
        troubled = [running for running in self._accounts.values() if running.watch.state != UP]
        reasons.extend(
            f"{running.settings.name}: {running.watch.trouble or 'not subscribed yet'}"
            for running in troubled[:NOT_UP_SHOWN_MAX]
        )
        if len(troubled) > NOT_UP_SHOWN_MAX:
            reasons.append(f"and {len(troubled) - NOT_UP_SHOWN_MAX} accounts more")
        return reasons


def run(
    settings: Settings,
    *,
    reread: Callable[[], Settings] | None = None,
    ready: Callable[[int], None] | None = None,
) -> None:
    """Run the daemon in this process until SIGTERM or SIGINT; SIGHUP reloads.

    Raises `ListenerError` where it cannot start.
    """
    log_to_stderr(settings.log)

    async def serve() -> None:
        daemon = Daemon(settings, reread=reread, ready=ready)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, daemon.stop)
        loop.add_signal_handler(signal.SIGINT, daemon.stop)
        loop.add_signal_handler(signal.SIGHUP, daemon.reload)
        await daemon.serve()

    try:
        asyncio.run(serve())
    except* ListenerError as group:
        # A task group wraps even a single error; whoever called us wants that one.
        raise _first(group) from None


def _first(group: BaseExceptionGroup[ListenerError]) -> ListenerError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def calm_collector() -> None:
    """Takes what was made until now out of the garbage collector's sight, since it stays: a full collection
    would walk over all of it, and stop the event loop for tens of milliseconds each time."""
    gc.collect()
    gc.freeze()


def log_to_stderr(log: Log) -> None:
    """Makes structlog write to standard error, as JSON lines or as text."""
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
