"""A simulated contact centre in a process of its own, for the benchmarks that speak over the wire.

The simulator must not share the listener's event loop, or its work would be counted as ours. It is run as a
child and told what to push over its control API. Run as a module, this file *is* the child.
"""

import asyncio
import itertools
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

from listener.simulator.centre import Simulator, run_simulator
from listener.simulator.settings import SimulatorSettings

READY_S_MAX = 30.0

_SEEDS = itertools.count(1)
"""A seed for each centre of a run: two with the same one would send the same calls again, which an account
whose calls end for good never does."""


class Centre:
    """The child's address, its logins, and what it can be told."""

    def __init__(self, url: str, logins: list[str], process: asyncio.subprocess.Process) -> None:
        self.url = url
        self.logins = logins
        self.pid = process.pid
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600))

    async def burst(self, notifications: int) -> float:
        """Pushes so many to all sessions; gives the seconds until the last was acknowledged."""
        async with self._http.post(
            f"{self.url}/simulator/burst", json={"notifications": notifications}
        ) as answer:
            return float((await answer.json())["seconds"])

    async def play(self, seconds: float) -> None:
        """Plays scripted calls at the rate that it was started with."""
        async with self._http.post(f"{self.url}/simulator/play", json={"seconds": seconds}) as answer:
            answer.raise_for_status()

    async def stats(self) -> dict[str, int]:
        """Its counters."""
        async with self._http.get(f"{self.url}/simulator/stats") as answer:
            found: dict[str, int] = await answer.json()
            return found

    async def close(self) -> None:
        """Ends the control connection."""
        await self._http.close()


@asynccontextmanager
async def centre(accounts: int, *, rate: float = 50.0, port: int = 0) -> AsyncIterator[Centre]:
    """A centre of so many accounts, that ends with the block."""
    settings = {
        "accounts": accounts,
        "rate": rate,
        "port": port,
        "dialect": "v2",
        "remember": False,
        "seed": next(_SEEDS),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.centre",
        json.dumps(settings),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        if process.stdout is None:
            raise RuntimeError("the simulator has no output")
        async with asyncio.timeout(READY_S_MAX):
            line = json.loads(await process.stdout.readline())
        child = Centre(line["url"], line["logins"], process)
        try:
            yield child
        finally:
            await child.close()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _serve(settings: SimulatorSettings) -> None:
    def ready(simulator: Simulator) -> None:
        print(json.dumps({"url": simulator.url, "logins": list(simulator.accounts)}), flush=True)

    await run_simulator(settings, stop=asyncio.Event(), playing=False, on_ready=ready)


if __name__ == "__main__":
    asyncio.run(_serve(SimulatorSettings(**json.loads(sys.argv[1]))))
