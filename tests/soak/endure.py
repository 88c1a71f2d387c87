"""Lets everything happen that a schedule says, to the real command, a real PostgreSQL and simulated centres.

The centres play in this process, which does nothing else: what they sent, when and to whom stays at hand. The
daemon and the database are processes of their own, and are hit from outside, by signals, by their own
commands, and by what they read. Nothing here decides whether the soak was passed: see `verdict`.
"""

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import aiohttp
import asyncpg
import psutil

from listener.simulator.centre import Simulator
from listener.simulator.settings import SimulatorSettings
from listener.store import migrate
from listener.store.embedded import Embedded
from tests.soak.schedule import Blow, Schedule, Sting, Stroke, draw
from tests.support.running import Centre, Child, configuration, until

START_s = 90.0
"""How long a start, of the daemon or of the database, may take on a machine that does other things too."""
STOP_s = 60.0
RECOVER_s = 15.0
"""How long the next stroke waits for everything to be up again; then it comes all the same."""
SETTLE_s = 180.0
"""How long everything may take to be up, and to have delivered, when nothing goes wrong any more."""
PROGRESS_s = 30.0
SAMPLE_s = 2.0
"""Between two looks at the daemon's memory and descriptors."""
TICK_s = 0.05

DELIVERY_BYTES_MAX = 2**20
TIMEOUT_ms = 4_000
"""How long a centre holds a connect: short, so that a dead connection is found soon (five seconds more)."""


class Plan(NamedTuple):
    """What to do; the same plan does the same."""

    seconds: float
    seed: int
    accounts: int = 20
    rate: float = 30.0
    """Notifications a second, over all accounts."""

    @property
    def centres(self) -> tuple[tuple[str, int, SimulatorSettings, str], ...]:
        """Name, accounts, settings and options of each: half of the accounts with acknowledgements, a quarter
        without, a quarter over websockets; all dialects in each."""
        quarter = max(1, self.accounts // 4)
        half = max(1, self.accounts - 2 * quarter)
        total = half + 2 * quarter

        def settings(
            number: int, accounts: int, *, ack: bool = True, csrf: bool = False
        ) -> SimulatorSettings:
            return SimulatorSettings(
                accounts=accounts,
                rate=self.rate * accounts / total,
                seed=self.seed * 10 + number,
                timeout_ms=TIMEOUT_ms,
                ack=ack,
                csrf=csrf,
                csrf_on_notifications=csrf,
            )

        return (
            ("acknowledged", half, settings(1, half, csrf=True), ""),
            ("unacknowledged", quarter, settings(2, quarter, ack=False), ""),
            ("websocket", quarter, settings(3, quarter), "websocket = true"),
        )

    @property
    def schedule(self) -> Schedule:
        """What goes wrong, and when."""
        return draw(self.seed, self.seconds, [accounts for _, accounts, _, _ in self.centres])


class Sample(NamedTuple):
    """The daemon at one moment."""

    at_s: float
    """Since it was started."""
    rss_bytes: int
    descriptors: int


class Witness:
    """What was seen while it went on; `verdict` reads it."""

    def __init__(self) -> None:
        self.blows: Counter[str] = Counter()
        self.lives: list[list[Sample]] = []
        """The samples of each life of the daemon."""
        self.wrong: list[str] = []
        """What went wrong that should not."""


class Endurance:
    """One soak, in a directory of its own. After `run` its log, its database and `witness` are judged."""

    def __init__(
        self, plan: Plan, place: Path, postgres: Path, *, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self.plan = plan
        self.witness = Witness()
        self.config = place / "listener.toml"
        self.centres: list[Centre] = []
        self.postgres = Embedded(postgres)
        self.daemon = Child(self.config)
        self._say = say
        self._clock = asyncio.get_running_loop().time
        self._began_s = self._life_s = self._clock()
        self._expected = asyncio.Event()
        """Set while the daemon is meant to be alive."""
        self._doing = "nothing"

    @property
    def dsn(self) -> str:
        """The database, which runs from `run` on and is still there afterwards."""
        return self.postgres.dsn

    @property
    def now_s(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._began_s

    async def run(self) -> None:
        """Plays, lets it all happen, and stops in order. The database is left running; `close` stops it."""
        await asyncio.to_thread(self.postgres.start)
        await migrate.upgrade(self.dsn)
        async with AsyncExitStack() as stack:
            for name, _, settings, options in self.plan.centres:
                simulator = await stack.enter_async_context(Simulator(settings))
                self.centres.append(Centre(name, simulator, options))
            self._configure()
            await stack.enter_async_context(self._daemon())
            await self.daemon.start(within_s=START_s)
            self._life()
            self._began_s = self._clock()
            stop = asyncio.Event()
            async with asyncio.TaskGroup() as tasks:
                watching = [tasks.create_task(self._watch()), tasks.create_task(self._report())]
                for centre in self.centres:
                    tasks.create_task(centre.simulator.play(stop=stop))
                schedule = self.plan.schedule
                async with asyncio.TaskGroup() as trouble:
                    trouble.create_task(self._sting(schedule.stings))
                    trouble.create_task(self._strike(schedule.strokes, schedule.quiet_s))
                await self._calm()
                await self._wait_for(self.plan.seconds)
                stop.set()
                for task in watching:
                    task.cancel()
            await asyncio.gather(*(self._finish(centre.simulator) for centre in self.centres))
            self._sample()
            self._expected.clear()
            code = await self.daemon.stop(STOP_s)
            if code:
                self.witness.wrong.append(f"the daemon ended with exit code {code} after the last SIGTERM")

    async def close(self) -> None:
        """Stops the database and removes it."""
        await asyncio.to_thread(self.postgres.destroy)

    @asynccontextmanager
    async def _daemon(self) -> AsyncIterator[None]:
        try:
            yield
        finally:
            if self.daemon._process is not None:
                await self.daemon.kill()

    async def _finish(self, simulator: Simulator) -> None:
        await simulator.finish()
        with suppress(TimeoutError):
            await simulator.drained(timeout_s=SETTLE_s)
            return
        self.witness.wrong.append(f"{simulator.url}: not everything was taken within {SETTLE_s:g} s")

    def _configure(self, without: Iterable[tuple[int, int]] = ()) -> None:
        """Writes the settings, without some accounts: (centre, account)."""
        names = {self.centres[centre].account(self._login(centre, account)) for centre, account in without}
        limits = f"delivery_bytes_max = {DELIVERY_BYTES_MAX}"
        # At once, as whoever manages files does it: a signal of the blow before may be about to have it read.
        whole = self.config.with_suffix(".new")
        whole.write_text(configuration(f'dsn = "{self.dsn}"', *self.centres, limits=limits, without=names))
        whole.replace(self.config)

    def _login(self, centre: int, account: int) -> str:
        return list(self.centres[centre].simulator.accounts)[account]

    async def _wait_for(self, at_s: float) -> None:
        """Waits for a moment of the soak."""
        await asyncio.sleep(max(0.0, at_s - self.now_s))

    # What goes wrong

    async def _sting(self, stings: Iterable[Sting]) -> None:
        for sting in stings:
            await self._wait_for(sting.at_s)
            faults = self.centres[sting.centre].simulator.faults
            faults.arm(sting.kind, account=self._login(sting.centre, sting.account), **sting.details)

    async def _strike(self, strokes: Iterable[Stroke], quiet_s: float) -> None:
        for stroke in strokes:
            await self._wait_for(stroke.at_s)
            if self.now_s >= quiet_s:
                return  # a slow machine: what is left of the schedule is left out, the quiet is not
            self._doing = f"{stroke.blow} {stroke.seconds:g} s"
            await self._blow(stroke)
            self.witness.blows[stroke.blow] += 1
            self._doing = "nothing"
            with suppress(TimeoutError):
                await until(self._up, min(RECOVER_s, max(0.1, quiet_s - self.now_s)))

    async def _up(self) -> bool:
        """Whether the daemon is ready; what it cannot say, it is not."""
        with suppress(aiohttp.ClientError, TimeoutError):
            async with asyncio.timeout(5):
                return await self.daemon.ready()
        await asyncio.sleep(TICK_s)
        return False

    async def _blow(self, stroke: Stroke) -> None:
        centre = self.centres[stroke.centre]
        simulator = centre.simulator
        match stroke.blow:
            case Blow.KILL | Blow.TERM:
                self._expected.clear()
                if stroke.blow is Blow.KILL:
                    await self.daemon.kill()
                elif code := await self.daemon.stop(STOP_s):
                    self.witness.wrong.append(f"the daemon ended with exit code {code} after SIGTERM")
                await asyncio.sleep(stroke.seconds)
                await self.daemon.start(up=False, within_s=START_s)
                self._life()
            case Blow.FREEZE:
                await self._frozen([psutil.Process(self.daemon.process.pid)], stroke.seconds)
            case Blow.RELOAD:
                self._configure((stroke.centre, account) for account in stroke.accounts)
                self.daemon.signal(signal.SIGHUP)
                await asyncio.sleep(stroke.seconds)
                self._configure()
                self.daemon.signal(signal.SIGHUP)
            case Blow.POSTGRES_FAST:
                await asyncio.to_thread(self.postgres.stop)
                await asyncio.sleep(stroke.seconds)
                await asyncio.to_thread(self.postgres.start)
            case Blow.POSTGRES_IMMEDIATE:
                await self._crash_postgres(stroke.seconds)
            case Blow.POSTGRES_FREEZE:
                postmaster = self._postmaster()
                await self._frozen([postmaster, *postmaster.children(recursive=True)], stroke.seconds)
            case Blow.POSTGRES_CUT:
                await self._cut_postgres()
            case Blow.CENTRE_RESTART:
                await simulator.gws.restart(stroke.seconds)
            case Blow.CENTRE_FORGETS:
                simulator.gws.forget()
            case Blow.CENTRE_REFUSES_LOGIN:
                logins = [self._login(stroke.centre, account) for account in stroke.accounts]
                for login in logins:
                    simulator.accounts[login].refused = True
                await asyncio.sleep(stroke.seconds)
                for login in logins:
                    simulator.accounts[login].refused = False
                self.daemon.signal(signal.SIGHUP)
            case Blow.CENTRE_REFUSES_CHANNEL:
                simulator.gws.broker.refused.add("/v2/me/calls")
                simulator.gws.forget()
                await asyncio.sleep(stroke.seconds)
                simulator.gws.broker.refused.clear()
            case Blow.CENTRE_EXPIRES_CSRF:
                simulator.gws.expire_csrf()
            case Blow.CENTRE_OVERSIZE:
                simulator.gws.oversize(self._login(stroke.centre, stroke.accounts[0]), 2 * DELIVERY_BYTES_MAX)

    def _postmaster(self) -> psutil.Process:
        pid = int((self.postgres.directory / "data" / "postmaster.pid").read_text().split()[0])
        return psutil.Process(pid)

    async def _frozen(self, processes: Iterable[psutil.Process], seconds: float) -> None:
        """Stops processes for a while; those that end meanwhile need no more."""
        stopped = []
        try:
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.suspend()
                    stopped.append(process)
            await asyncio.sleep(seconds)
        finally:
            for process in stopped:
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    async def _crash_postgres(self, seconds: float) -> None:
        """SIGQUIT: an immediate shutdown, so that the next start has to recover."""
        postmaster = self._postmaster()
        postmaster.send_signal(signal.SIGQUIT)
        await asyncio.to_thread(psutil.wait_procs, [postmaster], START_s)
        await asyncio.sleep(seconds)
        # Another user of the same directory starts it; ours, which never left, stays its user.
        second = Embedded(self.postgres.asked)
        await asyncio.to_thread(second.start)
        await asyncio.to_thread(second.stop)

    async def _cut_postgres(self) -> None:
        connection = await asyncpg.connect(self.dsn)
        try:
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
        finally:
            await connection.close()

    async def _calm(self) -> None:
        """Nothing goes wrong any more; who was refused need not wait for its turn. Waits until all is up."""
        for centre in self.centres:
            centre.simulator.faults.clear()
        self.daemon.signal(signal.SIGHUP)
        self._doing = "settling"
        try:
            await until(self._up, SETTLE_s)
        except TimeoutError:
            reasons = await self.daemon.reasons()
            self.witness.wrong.append(f"not ready after {SETTLE_s:g} s of quiet: {'; '.join(reasons)}")
        self._doing = "quiet"

    # What is seen

    def _life(self) -> None:
        """Another life of the daemon has begun."""
        self.witness.lives.append([])
        self._life_s = self._clock()
        self._expected.set()

    def _sample(self) -> None:
        process = psutil.Process(self.daemon.process.pid)
        with suppress(psutil.Error):
            self.witness.lives[-1].append(
                Sample(self._clock() - self._life_s, process.memory_info().rss, process.num_fds())
            )

    async def _watch(self) -> None:
        """Samples the daemon while it lives, and ends the soak when it died by itself."""
        while True:
            await self._expected.wait()
            if self.daemon.process.returncode is not None:
                tail = self.daemon.log.read_text()[-2000:]
                raise DiedByItself(f"the daemon ended by itself: {self.daemon.process.returncode}\n{tail}")
            self._sample()
            await asyncio.sleep(SAMPLE_s)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_s)
            stats = [centre.simulator.stats() for centre in self.centres]
            sample = self.witness.lives[-1][-1] if self.witness.lives[-1] else None
            stings = Counter[str]()
            for each in stats:
                stings.update(each["faults"])
            self._say(
                f"{self.now_s:6.0f} s  sent {sum(each['sent'] for each in stats)}"
                f"  listening {sum(each['listening'] for each in stats)}/{self.plan.accounts}"
                f"  blows {self.witness.blows.total()}  stings {stings.total()}"
                f"  lives {len(self.witness.lives)}"
                + (f"  rss {sample.rss_bytes / 2**20:.0f} MiB  fds {sample.descriptors}" if sample else "")
                + f"  now: {self._doing}"
            )


class DiedByItself(Exception):
    """The daemon ended, and nobody had told it to."""
