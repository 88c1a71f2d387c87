"""What the socket tests of the simulator share: a simulator, a client, and a way to wait."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

import pytest

from listener.simulator.centre import Simulator
from listener.simulator.scripts import Quirks
from listener.simulator.settings import SimulatorSettings
from tests.simulator.client import BayeuxClient

Start = Callable[..., "AbstractAsyncContextManager[Simulator]"]
LOGIN = "agent5000"


@pytest.fixture
def start() -> Start:
    """Make a simulator with one account, a dialect of v2 and no quirks, unless told otherwise."""

    def make(**settings: Any) -> Simulator:
        defaults: dict[str, Any] = {"accounts": 1, "dialect": "v2", "quirks": Quirks(0, 0, 0)}
        return Simulator(SimulatorSettings(**(defaults | settings)))

    return make


@pytest.fixture
async def clients() -> AsyncIterator[Callable[..., BayeuxClient]]:
    """Make clients that are closed at the end of the test."""
    async with AsyncExitStack() as stack:

        def make(
            simulator: Simulator, login: str | None = LOGIN, password: str = "simulated"
        ) -> BayeuxClient:
            client = BayeuxClient(simulator.url, login, password)
            stack.push_async_exit(client)
            return client

        yield make


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait until it holds; TimeoutError when it does not in time."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.005)
