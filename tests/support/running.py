"""The listener as it runs: in this process, or the real command as a child of its own.

Both listen to a simulator in this process, whose truth a test can look at, and store in a database that a
test can look into. A child is a process group of its own, and none outlives its test.
"""

import asyncio
import json
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from pydantic import SecretStr

from listener.daemon import Daemon
from listener.settings import Account, Environment, Limits, Operations, Settings, Store
from listener.simulator.centre import Simulator

READY_s = 30.0
"""How long a listener may take until it listens."""
WAIT_s = 20.0
"""How long a test waits for what must happen."""
STOP_s = 20.0
"""How long a child may take to stop before it is killed."""
POLL_s = 0.01


async def until(
    condition: Callable[[], bool] | Callable[[], Awaitable[bool]], within_s: float = WAIT_s
) -> None:
    """Waits until the condition holds; TimeoutError when it does not in time."""
    async with asyncio.timeout(within_s):
        while True:
            holds = condition()
            if await holds if isinstance(holds, Awaitable) else holds:
                return
            await asyncio.sleep(POLL_s)


def settings_for(
    simulator: Simulator,
    dsn: str,
    logins: Iterable[str] | None = None,
    *,
    environment: dict[str, Any] | None = None,
    limits: dict[str, Any] | None = None,
) -> Settings:
    """Settings that listen to accounts of the simulator (all, if none are named) and store at the DSN."""
    return Settings(
        store=Store(dsn=SecretStr(dsn)),
        environments={"lab": Environment(base_url=simulator.url, **(environment or {}))},
        accounts=tuple(account(login) for login in (logins or simulator.accounts)),
        operations=Operations(port=0),
        limits=Limits(**(limits or {})),
    )


def account(login: str, password: str = "simulated", **fields: Any) -> Account:
    """An account of the simulator, as `configuration.load` gives it."""
    return Account(environment="lab", login=login, name=login, password=SecretStr(password), **fields)


class _Pages:
    """The operation pages of a listener, wherever it runs."""

    port = 0

    async def get(self, path: str) -> tuple[int, str]:
        """Status and text of one of them."""
        async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{self.port}{path}") as answer:
            return answer.status, await answer.text()

    async def reasons(self) -> list[str]:
        """Why it is not ready; empty when it is."""
        status, text = await self.get("/-/ready")
        told = json.loads(text)
        assert (status == 200) is told["ready"] is (not told["reasons"])
        return list(told["reasons"])

    async def ready(self) -> bool:
        """Whether every account is up and the store answers."""
        return not await self.reasons()

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of that name with these labels."""
        _, text = await self.get("/metrics")
        total = 0.0
        for line in text.splitlines():
            sample, _, value = line.rpartition(" ")
            if sample.partition("{")[0] == name and all(f'{k}="{v}"' in sample for k, v in labels.items()):
                total += float(value)
        return total


class InProcess(_Pages):
    """A daemon in this process. `settings` may be changed before `reload`."""

    def __init__(self, settings: Settings, **options: Any) -> None:
        self.settings = settings
        self.reread: Callable[[], Settings] = lambda: self.settings
        self.started = asyncio.Event()
        self.daemon = Daemon(settings, reread=self._read_again, ready=self._ready, **options)
        self.task: asyncio.Task[None] | None = None

    def _ready(self, port: int) -> None:
        self.port = port
        self.started.set()

    def _read_again(self) -> Settings:
        return self.reread()

    @property
    def backlog(self) -> int:
        """Notifications heard and not yet committed."""
        pipeline = self.daemon._pipeline
        return 0 if pipeline is None else pipeline.backlog_notifications

    @asynccontextmanager
    async def running(self, *, up: bool = True) -> AsyncIterator["InProcess"]:
        """Runs it during the block; waits until it listens and, with `up`, until it is ready."""
        async with asyncio.TaskGroup() as tasks:
            self.task = tasks.create_task(self.daemon.serve())
            try:
                async with asyncio.timeout(READY_s):
                    await self.started.wait()
                if up:
                    await until(lambda: not self.daemon.not_ready())
                yield self
            finally:
                if not self.task.done():
                    with suppress(SystemExit):
                        self.daemon.stop()

    async def stop(self) -> float:
        """Stops it in order, and gives how many seconds that took."""
        assert self.task is not None
        began = asyncio.get_running_loop().time()
        self.daemon.stop()
        await asyncio.wait({self.task})
        return asyncio.get_running_loop().time() - began


def configuration(store: str, *centres: "Centre", limits: str = "", without: Collection[str] = ()) -> str:
    """A listener.toml for all accounts of these centres but those `without`, by their names; `store` is the
    line of the [store] section. The spool is beside the file."""
    parts = [f'[store]\n{store}\nspool_dir = "spool"\n[operations]\nport = 0\n[limits]\n{limits}\n']
    for centre in centres:
        base_url = centre.simulator.url
        parts.append(f'[environments.{centre.name}]\nbase_url = "{base_url}"\n{centre.options}\n')
        parts += [
            f'[[accounts]]\nenvironment = "{centre.name}"\nlogin = "{login}"\n'
            f'name = "{centre.account(login)}"\npassword = "simulated"\n'
            for login in centre.simulator.accounts
            if centre.account(login) not in without
        ]
    return "".join(parts)


class Centre(NamedTuple):
    """A simulated contact centre as one environment of a configuration."""

    name: str
    simulator: Simulator
    options: str = ""
    """Further lines of its section."""

    def account(self, login: str) -> str:
        """How the listener calls an account of this centre."""
        return f"{self.name}-{login}"


class Child(_Pages):
    """`listener run` as a process of its own. `start` it as often as is wanted, one at a time."""

    def __init__(self, config: Path, *, command: Sequence[str] = (sys.executable, "-m", "listener")) -> None:
        self.config = config
        self.log = config.with_suffix(".log")
        self.starts = 0
        self._command = command
        self._process: asyncio.subprocess.Process | None = None
        self._read = 0

    @property
    def process(self) -> asyncio.subprocess.Process:
        """The process that was started last."""
        assert self._process is not None
        return self._process

    async def start(self, *, up: bool = True, within_s: float = READY_s) -> None:
        """Starts it; waits until it listens and, with `up`, until it is ready."""
        self.starts += 1
        self._read = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                "run",
                "-c",
                str(self.config),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={k: v for k, v in os.environ.items() if not k.startswith("LISTENER_")},
                process_group=0,
            )
        await until(self._listens, within_s)
        if up:
            await until(self.ready, within_s)

    def said(self) -> list[dict[str, Any]]:
        """Everything that the process that was started last has logged."""
        lines = []
        for line in self.log.read_bytes()[self._read :].splitlines():
            with suppress(ValueError):
                lines.append(json.loads(line))
        return lines

    def _listens(self) -> bool:
        assert self.process.returncode is None, self.log.read_text()[-3000:]
        for line in self.said():
            if line.get("event") == "listening":
                self.port = line["port"]
                return True
        return False

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        self.process.send_signal(number)

    async def kill(self) -> None:
        """Kills it at once."""
        with suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()

    async def stop(self, within_s: float = STOP_s) -> int:
        """Asks it to stop; gives its exit code."""
        if self.process.returncode is None:
            self.signal(signal.SIGTERM)
        async with asyncio.timeout(within_s):
            return await self.process.wait()


def short_place() -> Path:
    """A directory whose path leaves room for a socket's name."""
    return Path(tempfile.gettempdir()) / f"ld-{uuid.uuid4().hex[:12]}"


@asynccontextmanager
async def child(
    config: Path, *, command: Sequence[str] = (sys.executable, "-m", "listener"), up: bool = True
) -> AsyncIterator[Child]:
    """A child that is started, and that is gone after the block."""
    made = Child(config, command=command)
    try:
        await made.start(up=up)
        yield made
    finally:
        if made._process is not None:
            await made.kill()
