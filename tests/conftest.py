"""What holds for every test: nothing is left running, and nothing is skipped without saying so.

The fixtures themselves are in `tests/support`, one module per outside thing.
"""

import inspect
import os
from collections.abc import AsyncIterator, Generator, Iterator
from uuid import uuid4

import pytest
import structlog

from tests.support.database import database, empty_database, journal, postgres, sql, template
from tests.support.leftovers import UNHEARD, Before, tasks_left
from tests.support.outage import fragile, fragile_database
from tests.support.peers import cometd_peer, faye_peer, node, tcp_proxy
from tests.support.redis_server import fragile_redis, redis, redis_program, redis_running, redis_url

__all__ = [
    "cometd_peer",
    "database",
    "empty_database",
    "faye_peer",
    "fragile",
    "fragile_database",
    "fragile_redis",
    "journal",
    "node",
    "postgres",
    "redis",
    "redis_program",
    "redis_running",
    "redis_url",
    "sql",
    "tcp_proxy",
    "template",
]


@pytest.fixture(autouse=True)
def own_state_directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a listener with a DSN keeps for itself belongs to the test, also in its children. Nothing is made
    before it is needed."""
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / uuid4().hex))


@pytest.fixture(autouse=True)
def plain_tracebacks() -> None:
    """What a test's listener logs. Left alone, structlog draws a traceback with all local variables, which
    stops the loop for seconds where the machine is busy."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
        ]
    )


_LEFT = pytest.StashKey[list[str]]()
_before: list[Before] = []
"""What there was before the test that runs now."""


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Look what the test leaves. Autouse fixtures come first and so end last, this one after all others, when
    also the loop is closed."""
    UNHEARD.taken()
    _before.append(Before())
    yield
    request.node.stash[_LEFT] = _before.pop().left()


class _Lasting:
    """Knows fixtures that live longer than a test. A plugin, since pytest asks no folder's conftest about the
    fixtures of the session."""

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[object]) -> Generator[None, object, object]:
        """What they make is not left by the test that asked for them first."""
        if fixturedef.scope == "function" or not _before:
            return (yield)
        earlier = Before()
        made = yield
        _before[-1].and_what_came_since(earlier)
        return made


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest ask it."""
    config.pluginmanager.register(_Lasting())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """Fail the test that left anything; not in the fixture, since pytest would then tell the next test of the
    warnings that nobody could catch."""
    try:
        yield
    except BaseException as error:
        for line in item.stash.get(_LEFT, []):
            error.add_note(f"the test left behind: {line}")
        raise
    if left := item.stash.get(_LEFT, []):
        pytest.fail("the test left behind:\n" + "\n".join(left), pytrace=False)


@pytest.fixture
async def _tasks_end() -> AsyncIterator[None]:
    """Fail the test whose tasks outlive it."""
    yield
    if left := await tasks_left():
        pytest.fail("the test left behind:\n" + "\n".join(left), pytrace=False)


@pytest.fixture(autouse=True)
def no_task_is_left_behind(request: pytest.FixtureRequest, nothing_is_left_behind: None) -> None:
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
