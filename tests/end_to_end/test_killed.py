"""`listener run` under load, killed and started again: the first three promises, as one would break them."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import asyncpg
import pytest

from listener.configuration import load
from listener.simulator.centre import Simulator
from listener.simulator.scripts import Dialect, Quirks
from listener.simulator.settings import SimulatorSettings
from listener.store.embedded import Embedded
from listener.store.spool import inspect
from tests.support import killing
from tests.support.killing import Point
from tests.support.outage import Fragile, uncommitted
from tests.support.running import Centre, Child, InProcess, child, configuration, short_place, until
from tests.support.truth import compare

RATE = 600.0
MAX_INTERVAL_ms = 20_000
"""How long the server keeps a session while nobody asks: longer than a start on a busy machine."""
KILLED_AFTER = range(150, 600)
"""How many messages after a start it is killed: within the first second under load."""


@asynccontextmanager
async def played(simulator: Simulator) -> AsyncIterator[None]:
    """The centre plays all the time during the block; after it every call comes to its end."""
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        playing = tasks.create_task(simulator.play(stop=stop))
        yield
        stop.set()
        await playing
    await simulator.finish()
    await simulator.drained()


async def behind(listener: Child, count: int = 5) -> bool:
    """Whether so many messages are heard and not committed: of each account that acknowledges it is one
    delivery at most."""
    return await listener.metric("listener_backlog_notifications") >= count


def sent(simulator: Simulator) -> int:
    """Messages sent so far."""
    return int(simulator.stats()["sent"])


async def stretches(dsn: str) -> dict[str, list[str]]:
    """The causes of each account's coverage that lasted any time, without repeats; "" is observed."""
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch(
            "SELECT a.name, c.cause, c.since, c.until, lag(c.until) OVER account AS before"
            " FROM coverage c JOIN account a ON a.id = c.account_id"
            " WINDOW account AS (PARTITION BY a.id ORDER BY c.since, c.id)"
        )
    finally:
        await connection.close()
    found: dict[str, list[str]] = {}
    for row in rows:
        assert row["before"] in (None, row["since"]), f"a moment without a row: {dict(row)}"
        if row["since"] != row["until"] or not row["cause"]:  # what was withdrawn is no gap
            causes = found.setdefault(row["name"], [])
            if row["cause"] not in causes[-1:]:
                causes.append(row["cause"])
    return found


@pytest.mark.parametrize(("how", "kills"), [("acknowledged", 4), ("not acknowledged", 2), ("websocket", 2)])
async def test_a_kill_loses_nothing_that_was_acknowledged(
    database: str, tmp_path: Path, how: str, kills: int
) -> None:
    """`kill -9` at moments drawn from a seed and once in the middle of a transaction, while all dialects are
    spoken, and a start after each, which goes on with the sessions: nothing is stored twice, and nothing is
    missing, or lies in a gap where the server does not acknowledge; every call has ended. SIGTERM at last:
    exit code 0, and "stopped"."""
    dice = Random(how)
    settings = SimulatorSettings(
        accounts=8, rate=RATE, max_interval_ms=MAX_INTERVAL_ms, ack=how != "not acknowledged", seed=kills
    )
    async with Simulator(settings) as simulator:
        centre = Centre("lab", simulator, "websocket = true" if how == "websocket" else "")
        config = tmp_path / "listener.toml"
        config.write_text(configuration(f'dsn = "{database}"', centre))
        async with child(config) as listener:
            async with played(simulator):
                for kill in range(kills):
                    reached = sent(simulator) + dice.choice(KILLED_AFTER)
                    await until(lambda reached=reached: sent(simulator) >= reached)
                    if kill == 0:
                        async with uncommitted(database):
                            await until(partial(behind, listener))
                            await listener.kill()
                    else:
                        await listener.kill()
                    await listener.start()
            assert await listener.reasons() == []
            assert await listener.stop() == 0
            assert listener.said()[-1]["event"] == "stopped"
        truth = simulator.truth()
    acknowledged = how != "not acknowledged"
    report = (await compare(database, truth, acknowledged=acknowledged, name=centre.account)).check()
    assert (report.missing == 0) is acknowledged
    assert report.stored > report.sent / 4
    assert report.calls > 0
    assert (report.inferred == 0) is acknowledged
    assert {each.dialect for each in truth.accounts.values()} == set(Dialect)
    for account, causes in (await stretches(database)).items():
        times = 1 if acknowledged else 1 + kills
        assert causes == [*["not started", ""] * times, "stopped"], account


async def test_a_power_cut_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """With the bundled PostgreSQL in the data directory: first the listener is killed and finds the server
    still running, then both are; the last one to stop stops the server."""
    place = short_place()
    server = Embedded(place)
    dice = Random(1)
    settings = SimulatorSettings(accounts=4, rate=RATE, max_interval_ms=1500)
    try:
        async with Simulator(settings) as simulator:
            centre = Centre("lab", simulator)
            config = tmp_path / "listener.toml"
            config.write_text(configuration(f'data_dir = "{place}"', centre))
            async with child(config) as listener:
                async with played(simulator):
                    for power_cut in (False, True):
                        reached = sent(simulator) + dice.choice(KILLED_AFTER)
                        await until(lambda reached=reached: sent(simulator) >= reached)
                        await listener.kill()
                        if power_cut:
                            kill_postgres(place)
                        await listener.start()
                assert await listener.stop() == 0
            truth = simulator.truth()
        assert not (place / "data" / "postmaster.pid").exists()
        await asyncio.to_thread(server.start)
        (await compare(server.dsn, truth, name=centre.account)).check()
    finally:
        await asyncio.to_thread(server.start)
        await asyncio.to_thread(server.destroy)


def kill_postgres(place: Path) -> None:
    """Kills the bundled server as a power cut would: nothing is written any more."""
    pid = int((place / "data" / "postmaster.pid").read_text().split()[0])
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(("damage", "accounts"), [("a bit", 1), ("a border", 2)])
async def test_what_was_damaged_on_disk_after_a_kill_is_a_gap_in_every_answer(
    damage: str, accounts: int, fragile: Fragile, fragile_database: str, tmp_path: Path
) -> None:
    """PostgreSQL is away, the listener is killed, and what waits on disk changes: the next start stores the
    rest, and `listener coverage` names the gap, its cause and its account, and no other one; where nobody can
    read whose it was, both accounts, each from its last delivery before it to its next one."""
    async with Simulator(SimulatorSettings(accounts=2, rate=RATE, ack=False)) as simulator:
        centre = Centre("lab", simulator)
        config = tmp_path / "listener.toml"
        config.write_text(configuration(f'dsn = "{fragile_database}"', centre))
        async with child(config) as listener:
            await until_observed(fragile_database, 2)
            async with fragile.away():
                await simulator.play(notifications=200)
                await until(partial(spooled, listener, 200))
                await listener.kill()
            (path,) = (tmp_path / "spool").glob("*.spool")
            content = bytearray(path.read_bytes())
            if damage == "a bit":
                content[content.index(b"notificationType", len(content) // 2)] ^= 1
            else:  # where one record ends and the next one begins
                at = content.index(content[8:16], len(content) // 2)
                content[at - 64 : at + 64] = bytes(128)
            path.write_bytes(content)
            report = inspect(tmp_path / "spool")
            assert (report.damaged, report.set_aside) == (1, {})
            await listener.start()
            assert await listener.metric("listener_gap_seconds_total", cause="spool damaged") > 0
            gaps = await answered(config)
            assert await listener.stop() == 0
    assert all({gap["cause"] for gap in told} <= {"not started", "spool damaged"} for told in gaps.values())
    lost = {account: gap for account, told in gaps.items() for gap in told if gap["cause"] == "spool damaged"}
    assert len(lost) == accounts
    connection = await asyncpg.connect(fragile_database)
    try:
        for account, gap in lost.items():
            hidden = await connection.fetchval(
                "SELECT count(*) FROM notification n JOIN account a ON a.id = n.account_id"
                " WHERE a.name = $1 AND received_at > $2 AND received_at + interval '1 microsecond' < $3",
                account,
                datetime.fromisoformat(gap["since"]),
                datetime.fromisoformat(gap["until"]),
            )
            assert hidden == 0, "the gap is no longer than what is missing"
    finally:
        await connection.close()


async def spooled(listener: Child, count: int) -> bool:
    """Whether so many messages are on disk."""
    return await listener.metric("listener_spool_notifications") >= count


async def answered(config: Path) -> dict[str, list[dict[str, Any]]]:
    """The gaps of each account, as the command tells them."""
    command = "-m", "listener", "coverage", "-c", str(config), "--last", "1h", "--gaps", "-o", "json"
    asked = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=asyncio.subprocess.PIPE, cwd=config.parent
    )
    told, _ = await asked.communicate()
    assert asked.returncode == 0
    return {each["account"]: each["gaps"] for each in json.loads(told)["accounts"]}


async def test_a_second_signal_ends_it_at_once(database: str, tmp_path: Path) -> None:
    """The first waits for what cannot be stored, up to its bound; the second does not, and exits with 1."""
    async with Simulator(SimulatorSettings(accounts=2, rate=RATE)) as simulator:
        config = tmp_path / "listener.toml"
        config.write_text(configuration(f'dsn = "{database}"', Centre("lab", simulator)))
        async with child(config) as listener, uncommitted(database):
            await simulator.play(notifications=50)
            await until(partial(behind, listener, 1))
            listener.signal(signal.SIGTERM)
            await until(lambda: any(line["event"] == "stopping" for line in listener.said()))
            await until(lambda: simulator.listening() == 0)
            assert listener.process.returncode is None
            listener.signal(signal.SIGTERM)
            async with asyncio.timeout(5):
                assert await listener.process.wait() == 1
            assert "Traceback" not in listener.log.read_text()


async def test_a_child_is_reloaded_and_says_everything_in_json(database: str, tmp_path: Path) -> None:
    """SIGHUP makes the process follow its file; each line that it writes is an object, and none a secret."""
    async with Simulator(SimulatorSettings(accounts=2, rate=RATE)) as simulator:
        centre = Centre("lab", simulator)
        config = tmp_path / "listener.toml"
        whole = configuration(f'dsn = "{database}"', centre)
        first, _, second = whole.rpartition("[[accounts]]")
        config.write_text(first)
        async with child(config) as listener:
            assert await listener.metric("listener_accounts") == 1
            config.write_text(whole)
            listener.signal(signal.SIGHUP)
            await until(lambda: simulator.listening() == 2)
            config.write_text(whole.replace("password", "pasword"))
            listener.signal(signal.SIGHUP)
            await until(lambda: any("not reloaded" in line["event"] for line in listener.said()))
            assert await listener.metric("listener_accounts") == 2
            await until(listener.ready)
            assert await listener.stop() == 0
        text = listener.log.read_text()
        assert len(listener.said()) == len(text.splitlines())
        assert "simulated" not in text
        assert second


# ── Killed at each point between a delivery and its acknowledgement ────────────────────────────────────

NO_POINTS = {"journal._RESERVE", "ROLLBACK"}
"""Statements of a batch after which nothing is otherwise than before: numbers are set aside; and what was
written on an expectation that did not hold, which is seldom, is taken back to be written again."""
POINTS_RATE = 300.0
POINT_s = 20.0
"""How long it may take to come to a point."""
BURST = 1200
"""Notifications of a burst, over all accounts: enough for a batch that is written by COPY."""
SPOOLING_BYTES = 2**16
"""A bound of the backlog that a burst is above, so that it goes to the spool."""


@asynccontextmanager
async def pointed(simulator: Simulator, database: str, config: Path, point: Point) -> AsyncIterator[Child]:
    """The command, watched and up: it kills itself at the point, or with "none" is there for the block."""
    centre = Centre("lab", simulator, "websocket = true" if point.websocket else "")
    limits = f"backlog_bytes_max = {SPOOLING_BYTES}" if point.spools else ""
    text = configuration(f'dsn = "{database}"', centre, limits=limits)
    await asyncio.to_thread(config.write_text, text)
    command = (sys.executable, killing.__file__, point.name, str(point.passing))
    async with child(config, command=command) as listener:
        await until_kept(database, len(simulator.accounts))
        listener.signal(signal.SIGUSR1)
        await until(lambda: bool(told(listener, killing.ARMED)))
        yield listener


async def until_kept(dsn: str, sessions: int) -> None:
    """Until so many sessions can be resumed, which is written soon after they are up."""
    await until_counted(dsn, "SELECT count(*) FROM bayeux_session", sessions)


async def until_observed(dsn: str, accounts: int) -> None:
    """Until the coverage says so of so many accounts, which is written soon after their sessions are up: what
    is lost before it lies in the gap in which they were not observed yet."""
    await until_counted(dsn, "SELECT count(*) FROM coverage WHERE cause = '' AND until IS NULL", accounts)


async def until_counted(dsn: str, query: str, count: int) -> None:
    """Until a query counts so many; the test's own time-out is the bound."""
    connection = await asyncpg.connect(dsn)
    try:
        while await connection.fetchval(query) < count:
            pass
    finally:
        await connection.close()


@asynccontextmanager
async def played_for(
    point: Point, simulator: Simulator, listener: Child, database: str
) -> AsyncIterator[None]:
    """The traffic that passes a point. What is to be spooled is, since nothing is committed meanwhile; then
    it is read back, since the batch under way is cut off."""
    spool = listener.config.with_name("spool")

    def spooled() -> bool:
        sizes = [file.stat().st_size for file in spool.glob("*.spool")]
        return listener.process.returncode is not None or sum(sizes) > SPOOLING_BYTES / 2

    async with played(simulator):
        if point.burst:
            await until(lambda: sent(simulator) >= 100)
        async with AsyncExitStack() as stack:
            if point.spools:
                await stack.enter_async_context(uncommitted(database))
            burst = simulator.prepare_burst(BURST if point.burst else 1)
            simulator.gws.calls.extend(burst.calls)
            for login, messages in burst.messages.items():
                for message in messages:
                    simulator.gws.publish(simulator.accounts[login], message)
            if point.spools:
                await until(spooled)
                await cut_off(database)
        yield


async def cut_off(dsn: str) -> None:
    """Ends the journal's connections: the batches under way have to be handed in again."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'listener journal'"
        )
    finally:
        await connection.close()


def told(listener: Child, event: str) -> set[str]:
    """What the watched command said of the points."""
    return {line["what"] for line in listener.said() if line["event"] == event}


def point_settings() -> SimulatorSettings:
    """A centre for one point. Its quirks make what is rare come soon."""
    return SimulatorSettings(
        accounts=4,
        rate=POINTS_RATE,
        max_interval_ms=MAX_INTERVAL_ms,
        sweep_period_ms=100,
        quirks=Quirks(unknown=0.2),
        seed=7,
    )


@pytest.mark.parametrize("point", killing.POINTS, ids=lambda point: point.name)
async def test_killed_at_a_point_it_loses_and_doubles_nothing(
    database: str, tmp_path: Path, point: Point
) -> None:
    """SIGKILL exactly there, under traffic, and an ordinary start: everything that a session was subscribed
    to is stored, once, since the session goes on."""
    config = tmp_path / "listener.toml"
    async with (
        Simulator(point_settings()) as simulator,
        pointed(simulator, database, config, point) as listener,
        AsyncExitStack() as stack,
    ):
        async with played_for(point, simulator, listener, database):
            async with asyncio.timeout(POINT_s):
                assert await listener.process.wait() == -signal.SIGKILL
            assert told(listener, killing.KILLED_AT) == {point.name}
            ordinary = await stack.enter_async_context(InProcess(load(config)).running())
        await ordinary.stop()
        truth = simulator.truth()
    report = (await compare(database, truth, name=Centre("lab", simulator).account)).check()
    assert report.stored > 0
    assert report.missing == truth.unsubscribed, "what was said before the first subscription"


async def test_every_point_is_passed_and_every_statement_is_one(database: str, tmp_path: Path) -> None:
    """Left alive, the watched command passes all points but those of the other transport, and a batch makes
    no statement that is none: what is added to the way of a delivery is added to the points."""
    none = Point("none", "", killing.Moment.BEFORE, burst=True, spools=True)
    expected = {point.name for point in killing.POINTS if not point.websocket}
    async with (
        Simulator(point_settings()) as simulator,
        pointed(simulator, database, tmp_path / "listener.toml", none) as listener,
    ):
        async with played_for(none, simulator, listener, database):
            with suppress(TimeoutError):  # what is missing is told below
                await until(lambda: told(listener, killing.PASSED) == expected)
        assert await listener.stop() == 0
        assert told(listener, killing.PASSED) == expected
        stated = told(listener, killing.STATED)
        assert stated - {point.where for point in killing.POINTS} <= NO_POINTS
        assert "journal._RESERVE" in stated
