"""`listener run` killed and stopped while calls go on, and started again before the server forgets its
sessions: they go on, and it is as if nothing had been."""

import asyncio
import signal
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import pytest

from listener.simulator.centre import Simulator
from listener.simulator.settings import SimulatorSettings
from listener.store.history import History
from tests.support.running import Centre, Child, child, configuration, until
from tests.support.truth import compare

RATE = 300.0
MAX_INTERVAL_ms = 20_000
"""Longer than any start takes on a machine that is busy."""

QUIET_s = 2.0
"""Longer than a gap may be that a stop leaves behind, and shorter than a connect is held."""

SAYS_GOODBYE = (
    sys.executable,
    "-c",
    "import sys; from listener.cli import main; sys.exit(main([*sys.argv[1:], '--goodbye']))",
)


async def stretches(dsn: str, login: str) -> list[str]:
    """The causes of an account's coverage in order, without repeats; "" is observed. A gap of no length was
    withdrawn; observed for so short a time that nothing can be vouched for is observed."""
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch(
            "SELECT c.cause, c.since, c.until, lag(c.until) OVER (ORDER BY c.since, c.id) AS before"
            " FROM coverage c JOIN account a ON a.id = c.account_id WHERE a.name = $1 ORDER BY c.since, c.id",
            login,
        )
    finally:
        await connection.close()
    found: list[str] = []
    for row in rows:
        assert row["before"] in (None, row["since"]), f"a moment without a row: {dict(row)}"
        if (not row["cause"] or row["since"] != row["until"]) and row["cause"] not in found[-1:]:
            found.append(row["cause"])
    return found


async def gaps(dsn: str, login: str) -> list[datetime]:
    """When each gap since an account was observed first began."""
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch(
            "SELECT c.since FROM coverage c JOIN account a ON a.id = c.account_id"
            " WHERE a.name = $1 AND c.cause NOT IN ('', 'not started') AND c.until IS DISTINCT FROM c.since"
            " ORDER BY c.since",
            login,
        )
    finally:
        await connection.close()
    return [row["since"] for row in rows]


async def observed(dsn: str, login: str, until_: datetime) -> tuple[float, float]:
    """What the strip counts, from the first moment that was observed: seconds observed, and seconds."""
    connection = await asyncpg.connect(dsn)
    try:
        since = await connection.fetchval(
            "SELECT min(c.since) FROM coverage c JOIN account a ON a.id = c.account_id"
            " WHERE a.name = $1 AND c.cause = ''",
            login,
        )
    finally:
        await connection.close()
    async with History(dsn, clock=lambda: until_) as history:
        total = (await history.coverage(since=since, until=until_, accounts=[login])).total
    return total.observed_s, total.asked_s


async def restarted(listener: Child, how: signal.Signals) -> None:
    """Ends it and starts it again, while the centre goes on."""
    listener.signal(how)
    await listener.process.wait()
    await listener.start()


@pytest.mark.parametrize("transport", ["long-polling", "websocket"])
async def test_a_restart_is_not_noticed(database: str, tmp_path: Path, transport: str) -> None:
    """Killed twice and stopped once under load: one handshake for each account in all, nothing is missing,
    nothing is twice, no call's end is inferred, and every moment since the first start was observed."""
    settings = SimulatorSettings(accounts=4, rate=RATE, max_interval_ms=MAX_INTERVAL_ms)
    async with Simulator(settings) as simulator:
        centre = Centre("lab", simulator, "websocket = true" if transport == "websocket" else "")
        config = tmp_path / "listener.toml"
        config.write_text(configuration(f'dsn = "{database}"', centre))
        stop = asyncio.Event()
        async with child(config) as listener, asyncio.TaskGroup() as tasks:
            playing = tasks.create_task(simulator.play(stop=stop))
            for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
                reached = simulator.stats()["sent"] + 200
                await until(lambda reached=reached: simulator.stats()["sent"] >= reached)
                await restarted(listener, how)
                assert await listener.metric("listener_handshakes_total") == 0
            stop.set()
            await playing
            await simulator.finish()
            await simulator.drained()
            assert await listener.reasons() == []
            assert await listener.stop() == 0
        assert simulator.gws.broker.handshakes == 4
        truth = simulator.truth()
    report = (await compare(database, truth, name=centre.account)).check()
    assert (report.missing, report.inferred) == (0, 0)
    assert report.stored == truth.sent > 600
    for login in truth.accounts:
        assert await stretches(database, centre.account(login)) == ["not started", "", "stopped"]


@pytest.mark.parametrize("transport", ["long-polling", "websocket"])
async def test_a_planned_stop_is_observed_up_to_the_stop(
    database: str, tmp_path: Path, transport: str
) -> None:
    """Calls go on, then all is quiet for longer than a second, and it is stopped: every account was observed
    until then, and the strip says so. It is started again after calls that nobody heard at that time: nothing
    is lost or doubled, and no moment was unobserved."""
    settings = SimulatorSettings(accounts=4, rate=RATE, max_interval_ms=MAX_INTERVAL_ms)
    async with Simulator(settings) as simulator:
        centre = Centre("lab", simulator, "websocket = true" if transport == "websocket" else "")
        config = tmp_path / "listener.toml"
        config.write_text(configuration(f'dsn = "{database}"', centre))
        async with child(config) as listener:
            await simulator.play(notifications=200)
            await simulator.drained()
            quiet_since = time.monotonic()
            await until(lambda: time.monotonic() - quiet_since > QUIET_s)
            stopped_at = datetime.now(UTC)  # noqa: TID251 - beside the listener's own
            assert await listener.stop() == 0
            ended_at = datetime.now(UTC)  # noqa: TID251 - as above
            for login in simulator.accounts:
                observed_s, asked_s = await observed(database, centre.account(login), ended_at)
                assert asked_s - observed_s < 1.0 + (ended_at - stopped_at).total_seconds()
                (since,) = await gaps(database, centre.account(login))
                assert abs(since - stopped_at) < timedelta(seconds=1)
            await simulator.play(notifications=200)
            await listener.start()
            await simulator.finish()
            await simulator.drained()
            for login in simulator.accounts:
                assert await gaps(database, centre.account(login)) == []
            assert await listener.stop() == 0
        assert simulator.gws.broker.handshakes == 4
        truth = simulator.truth()
    report = (await compare(database, truth, name=centre.account)).check()
    assert (report.missing, report.surplus) == (0, 0)
    assert report.stored == truth.sent > 400


async def test_a_restart_that_takes_too_long_is_a_gap(database: str, tmp_path: Path) -> None:
    """The server has forgotten the sessions: others begin; what was missed lies in a gap since the crash."""
    settings = SimulatorSettings(accounts=2, rate=RATE, max_interval_ms=500)
    async with Simulator(settings) as simulator:
        centre = Centre("lab", simulator)
        config = tmp_path / "listener.toml"
        config.write_text(configuration(f'dsn = "{database}"', centre))
        async with child(config) as listener:
            await simulator.play(notifications=100)
            await listener.kill()
            await simulator.play(notifications=100)
            await until(lambda: not simulator.gws.broker.sessions)
            await listener.start()
            await simulator.finish()
            await simulator.drained()
            assert await listener.stop() == 0
        assert simulator.gws.broker.handshakes == 4
        truth = simulator.truth()
    report = (await compare(database, truth, name=centre.account)).check()
    assert report.missing > 0
    for login in truth.accounts:
        causes = await stretches(database, centre.account(login))
        assert causes == ["not started", "", "not started", "session lost", "", "stopped"]


async def test_goodbye_ends_the_sessions(database: str, tmp_path: Path) -> None:
    """With `--goodbye` the server keeps nothing after a stop, and neither do we."""
    async with Simulator(SimulatorSettings(accounts=2, rate=RATE)) as simulator:
        config = tmp_path / "listener.toml"
        config.write_text(configuration(f'dsn = "{database}"', Centre("lab", simulator)))
        listener = Child(config, command=SAYS_GOODBYE)
        try:
            await listener.start()
            assert len(simulator.gws.broker.sessions) == 2
            assert await listener.stop() == 0
        finally:
            await listener.kill()
        assert not simulator.gws.broker.sessions
    connection = await asyncpg.connect(database)
    try:
        assert await connection.fetchval("SELECT count(*) FROM bayeux_session") == 0
    finally:
        await connection.close()


async def test_nothing_that_could_resume_a_session_is_logged(database: str, tmp_path: Path) -> None:
    """Neither its id nor a cookie, however it begins and ends."""
    async with Simulator(SimulatorSettings(accounts=1)) as simulator:
        config = tmp_path / "listener.toml"
        config.write_text(configuration(f'dsn = "{database}"', Centre("lab", simulator)))
        async with child(config) as listener:
            connection = await asyncpg.connect(database)
            try:
                await until(lambda: connection.fetchval("SELECT count(*) = 1 FROM bayeux_session"))
                row = await connection.fetchrow("SELECT client_id, credentials::text FROM bayeux_session")
            finally:
                await connection.close()
            assert row is not None
            await restarted(listener, signal.SIGKILL)
            assert await listener.stop() == 0
            text = listener.log.read_text()
    assert "session resumed" in text
    assert row["client_id"] not in text
    assert "JSESSIONID" in row["credentials"]
    assert "JSESSIONID" not in text
