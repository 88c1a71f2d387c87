"""Every fault that the simulated contact centre knows, once each, heard by the real command.

One process listens to three centres at a time: one whose sessions acknowledge, one that has no
acknowledgements, and one over websockets. Each account has its own fault, in the middle of the traffic.
"""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import asyncpg

from listener.simulator.centre import Simulator
from listener.simulator.faults import Fault
from listener.simulator.settings import SimulatorSettings
from tests.support.running import Centre, child, configuration, until
from tests.support.truth import compare

DELIVERY_BYTES_MAX = 2**20
SETTINGS = SimulatorSettings(
    accounts=18,
    rate=500.0,
    # Short, so that a connection that is dead is found soon; the listener adds five seconds of its own.
    timeout_ms=500,
    max_interval_ms=9_000,
)

Strike = Callable[[Simulator, str], object]


def fault(kind: Fault, **details: Any) -> Strike:
    """Lets the next exchange of an account fail so."""
    return lambda simulator, login: simulator.faults.arm(kind, account=login, **details)


STRIKES: dict[str, Strike] = {
    "none": lambda simulator, login: None,  # noqa: ARG005 - an account that nothing happens to
    "402 at once": lambda simulator, login: simulator.gws.forget(login),
    "402 after the hold": lambda simulator, login: simulator.gws.forget(login, answer=False),
    "oversize": lambda simulator, login: simulator.gws.oversize(login, 2 * DELIVERY_BYTES_MAX),
    "unknown client": fault(Fault.UNKNOWN_CLIENT),
    "cut before the reply": fault(Fault.DROP_BEFORE_REPLY),
    "cut in the reply": fault(Fault.DROP_MID_REPLY),
    "duplicates": fault(Fault.REPLY_LOST),
    "half-open": fault(Fault.HALF_OPEN),
    "delay": fault(Fault.DELAY, seconds=1.0),
    "malformed": fault(Fault.TRUNCATED_JSON),
    "malformed again and again": fault(Fault.TRUNCATED_JSON, times=4),
    "an error page": fault(Fault.HTML_503),
    "null among the messages": fault(Fault.NULL_ITEMS),
    "advice: handshake": fault(Fault.ADVICE, advice={"reconnect": "handshake"}),
    "advice: null": fault(Fault.ADVICE_NULL),
    "advice: an interval as text": fault(Fault.STRING_INTERVAL),
    "403": fault(Fault.HTTP_STATUS, status=403),
}


async def test_after_each_fault_all_is_stored_or_in_a_gap(database: str, tmp_path: Path) -> None:
    """Nothing that was acknowledged is missing, nothing is there twice, and what was lost lies in a gap; at
    last each server restarts, and every call has ended in the database as it did in truth."""
    assert len(STRIKES) == SETTINGS.accounts
    centres: list[Centre] = []
    async with AsyncExitStack() as stack:
        for name, ack in (("acknowledged", True), ("unacknowledged", False), ("websocket", True)):
            settings = SimulatorSettings(
                accounts=SETTINGS.accounts,
                rate=SETTINGS.rate,
                timeout_ms=SETTINGS.timeout_ms,
                max_interval_ms=SETTINGS.max_interval_ms,
                ack=ack,
                csrf=True,
            )
            simulator = await stack.enter_async_context(Simulator(settings))
            centres.append(Centre(name, simulator, "websocket = true" if name == "websocket" else ""))
        config = tmp_path / "listener.toml"
        limits = f"delivery_bytes_max = {DELIVERY_BYTES_MAX}"
        config.write_text(configuration(f'dsn = "{database}"', *centres, limits=limits))
        listener = await stack.enter_async_context(child(config))
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            for centre in centres:
                tasks.create_task(centre.simulator.play(stop=stop))
            await until(lambda: all(c.simulator.stats()["sent"] > 300 for c in centres))
            for centre in centres:
                for strike, login in zip(STRIKES.values(), centre.simulator.accounts, strict=True):
                    strike(centre.simulator, login)
            await until(lambda: all(struck(centre) for centre in centres))
            await until(listener.ready)
            for centre in centres:
                await centre.simulator.gws.restart(0.2)
            await until(lambda: all(c.simulator.listening() == SETTINGS.accounts for c in centres))
            await until(listener.ready)
            stop.set()
        for centre in centres:
            await centre.simulator.finish()
            await centre.simulator.drained()
        assert await listener.stop() == 0
        for centre in centres:
            truth = centre.simulator.truth()
            compared = await compare(
                database, truth, acknowledged=centre.name != "unacknowledged", name=centre.account
            )
            report = compared.check()
            assert report.stored > report.sent / 2
            assert report.calls > report.inferred > 0
            gaps = await causes(database, centre)
            assert gaps["none"] == {"not started", "session lost", "stopped"}, "the restart alone"
            assert "oversized" in gaps["oversize"]
            assert "malformed" in gaps["malformed again and again"]


def struck(centre: Centre) -> bool:
    """Whether every fault that was armed has happened."""
    return not centre.simulator.faults._armed


async def causes(dsn: str, centre: Centre) -> dict[str, set[str]]:
    """Why the account of each fault was not observed."""
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch(
            "SELECT a.name, c.cause FROM coverage c JOIN account a ON a.id = c.account_id"
            " WHERE c.cause <> '' AND c.since IS DISTINCT FROM c.until"
        )
    finally:
        await connection.close()
    names = dict(zip(map(centre.account, centre.simulator.accounts), STRIKES, strict=True))
    found: dict[str, set[str]] = {strike: set() for strike in STRIKES}
    for row in rows:
        if row["name"] in names:
            found[names[row["name"]]].add(row["cause"])
    return found
