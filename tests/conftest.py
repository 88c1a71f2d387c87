"""What holds for every test: nothing is left running, and nothing is skipped without saying so.

The fixtures themselves are in `tests/support`, one module per outside thing.
"""

import asyncio
import inspect
import os
from collections.abc import AsyncIterator, Generator

import pytest

from tests.support.database import database, empty_database, journal, postgres, sql, template
from tests.support.outage import fragile, fragile_database
from tests.support.peers import cometd_peer, faye_peer, node, tcp_proxy

__all__ = [
    "cometd_peer",
    "database",
    "empty_database",
    "faye_peer",
    "fragile",
    "fragile_database",
    "journal",
    "node",
    "postgres",
    "sql",
    "tcp_proxy",
    "template",
]

TURNS_MAX = 10
"""Turns of the loop that a task which was just cancelled may take to end."""


@pytest.fixture
async def _tasks_end() -> AsyncIterator[None]:
    """Fail the test whose tasks outlive it."""
    yield
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for _ in range(TURNS_MAX if left else 0):
        await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
    if left:
        pytest.fail(f"the test left tasks behind: {sorted(str(task.get_coro()) for task in left)}")


@pytest.fixture(autouse=True)
def no_task_is_left_behind(request: pytest.FixtureRequest) -> None:
    """Watch every asynchronous test; asked for first, so that it looks when all other fixtures have ended."""
    if inspect.iscoroutinefunction(getattr(request, "function", None)):
        request.getfixturevalue("_tasks_end")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With CI=true, turn a skip into a failure: CI must have every peer."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: a peer is missing, and CI must have it: {report.longrepr}"
    return report
