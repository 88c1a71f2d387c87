"""What an idle session costs, and how a thousand of them come back.

`python -m benchmarks.sessions` prints one JSON line: memory and CPU of the real daemon with a thousand idle
long-polling sessions, per session; then the server is killed, and after eight seconds another stands in its
place: how long until all are subscribed again, and how many handshakes that took.

Memory is what the process grew by between "no account" and "all are up" (resident set, of one process, so
also the buffers of its sockets); CPU is user and system time over twenty idle seconds.
"""

import asyncio
import gc
import json
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.centre import Centre, centre
from listener.configuration import load
from listener.daemon import Daemon, log_to_stderr
from listener.settings import Settings

SESSIONS = 1000
IDLE_S = 20.0
OUTAGE_S = 8.0
UP_S_MAX = 120.0


def _settings(directory: Path, site: Centre | None, logins: list[str]) -> Settings:
    lines = [
        f'[store]\ndata_dir = "{directory / "store"}"',
        '[log]\nlevel = "error"',
        "[operations]\nport = 0",
        f'[environments.centre]\nbase_url = "{site.url if site else "http://127.0.0.1:1"}"',
    ]
    lines += [
        f'[[accounts]]\nenvironment = "centre"\nlogin = "{login}"\npassword = "simulated"' for login in logins
    ]
    path = directory / "listener.toml"
    path.write_text("\n".join(lines) + "\n")
    return load(path)


async def main() -> None:
    """Runs all and prints the line."""
    figures: dict[str, object] = {"benchmark": "sessions", "sessions": SESSIONS}
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        async with centre(SESSIONS) as site:
            port = int(site.url.rpartition(":")[2])
            first = _settings(directory, site, site.logins[:1])
            everything = _settings(directory, site, site.logins)
            log_to_stderr(first.log)
            ready = asyncio.Event()
            daemon = Daemon(first, reread=lambda: everything, ready=lambda _: ready.set())
            serving = asyncio.ensure_future(daemon.serve())  # noqa: TID251 - ended below
            await ready.wait()
            await _up(daemon)
            gc.collect()
            before = process.memory_info().rss
            began = time.perf_counter()
            daemon.reload()
            await _up(daemon, SESSIONS)
            figures["all_up_s"] = round(time.perf_counter() - began, 1)
            gc.collect()
            grown = process.memory_info().rss - before
            figures["kib_per_session"] = round(grown / (SESSIONS - 1) / 1024, 1)
            cpu, began = process.cpu_times(), time.perf_counter()
            await asyncio.sleep(IDLE_S)
            spent = process.cpu_times()
            busy = spent.user + spent.system - cpu.user - cpu.system
            figures["idle_core_percent"] = round(100 * busy / (time.perf_counter() - began), 2)
        await asyncio.sleep(OUTAGE_S)
        async with centre(SESSIONS, port=port) as site:
            began = time.perf_counter()
            await _up(daemon, SESSIONS)
            figures["back_s"] = round(time.perf_counter() - began, 1)
            figures["handshakes_per_session"] = round((await site.stats())["handshakes"] / SESSIONS, 3)
            daemon.stop()
            await serving
    sys.stdout.write(json.dumps(figures) + "\n")


async def _up(daemon: Daemon, accounts: int = 1) -> None:
    """Waits until so many accounts are observed and none is not."""
    async with asyncio.timeout(UP_S_MAX):
        while daemon.not_ready() or daemon.accounts < accounts:  # noqa: ASYNC110 - states, not events
            await asyncio.sleep(0.05)


if __name__ == "__main__":
    asyncio.run(main())
