"""The journal against two measures, on the bundled PostgreSQL with `fsync` and `synchronous_commit` on.

`python -m benchmarks.journal` prints one JSON line. All arms get the same messages, each arm of each round a
database of its own, and the rounds go through all arms in turn, so that a busy machine slows all of them:

- `a1`: one SQLAlchemy ORM session and one commit for each notification (`benchmarks.a1`, which keeps fewer
  facts than the journal does); the goal is stated against this one;
- `a1_same`: the same with the journal's facts in the journal's tables (`benchmarks.orm`): for comparison, and
  no part of any goal;
- `b1_500`, `b1_2000`: COPY of the raw messages into a table with a primary key and a jsonb column, in
  batches, one after the other on one connection;
- `j500`, `j2000`: bytes in memory → decoded → `Journal.record` → every table durable, idempotence included.
  As in the daemon, several writers share the accounts among them and one event loop serves all.

Each arm is warm when its time begins: some messages, or one batch of each writer, have been stored, so that
statements are prepared and what the journal keeps in memory is there, as in a daemon that runs for months.
Figures are messages per second, medians of five rounds; a ratio is the median of each round's own. To say
where the time goes, `client_us` is the CPU of this process for a message, and `server_us` that of all of
PostgreSQL's processes.
"""

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg

from benchmarks.a1 import OneCommitEach
from benchmarks.orm import OrmJournal
from benchmarks.traffic import traffic
from listener.core.calls import Heard
from listener.core.decode import decode
from listener.daemon import calm_collector
from listener.pipeline import WRITERS
from listener.store import migrate
from listener.store.embedded import Embedded
from listener.store.journal import AccountRow, Journal

ACCOUNTS = 100
MESSAGES = 80_000
"""Enough for 32 batches of 2,000 after the first of each writer: the end, where work runs out, weighs
little."""
A1_MESSAGES = 2000
"""In some five seconds: a shorter time is a matter of luck."""
A1_SAME_MESSAGES = 500
WARM_UP = 50
ROUNDS = 5
REGISTERED = [AccountRow(f"account {n:03}", "", "bench") for n in range(ACCOUNTS)]
GOALS = {"j500_by_a1": 60.0, "j500_by_b1": 0.28, "j2000_by_b1": 0.40}


async def a1_same(dsn: str, heard: Sequence[Heard], began: Callable[[], None]) -> int:
    """As `a1`, with the journal's facts in the journal's tables."""
    async with await Journal.open(dsn) as opened:
        await opened.register(REGISTERED)
    writer = OrmJournal(dsn)
    for place, each in enumerate(heard[: WARM_UP + A1_SAME_MESSAGES]):
        if place == WARM_UP:
            began()
        await writer.record(each, decode(each.raw, each.channel))
    await writer.close()
    return A1_SAME_MESSAGES


async def a1(dsn: str, heard: Sequence[Heard], began: Callable[[], None]) -> int:
    """One session and commit each; of fewer messages, since it is slow."""
    async with OneCommitEach(dsn, lambda: datetime.now(UTC)) as writer:  # noqa: TID251 - a benchmark's clock
        for each in heard[:WARM_UP]:
            await writer.record(each.account, each.raw)
        began()
        for each in heard[WARM_UP : WARM_UP + A1_MESSAGES]:
            await writer.record(each.account, each.raw)
    return A1_MESSAGES


async def b1(dsn: str, heard: Sequence[Heard], began: Callable[[], None], *, batch: int) -> int:
    """COPY into jsonb with a primary key."""
    connection = await asyncpg.connect(dsn)
    await connection.execute("CREATE TABLE b1 (id bigint PRIMARY KEY, received_at timestamptz, raw jsonb)")
    for start in range(0, len(heard), batch):
        rows = [
            (start + place, each.received_at, each.raw.decode())
            for place, each in enumerate(heard[start : start + batch])
        ]
        await connection.copy_records_to_table("b1", records=rows)
        if start == 0:
            began()
    await connection.close()
    return len(heard) - batch


async def journal(dsn: str, heard: Sequence[Heard], began: Callable[[], None], *, batch: int) -> int:
    """Decoded, and recorded by the writers."""
    async with await Journal.open(dsn, connections=WRITERS) as opened:
        ids = await opened.register(REGISTERED)
        assert set(ids.values()) == set(range(1, ACCOUNTS + 1))
        shards = [[each for each in heard if each.account % WRITERS == n] for n in range(WRITERS)]

        async def write(shard: Sequence[Heard]) -> None:
            for start in range(0, len(shard), batch):
                recorded = await opened.record(shard[start : start + batch])
                assert recorded.duplicates == 0

        await asyncio.gather(*[write(shard[:batch]) for shard in shards])
        began()
        await asyncio.gather(*[write(shard[batch:]) for shard in shards])
    return len(heard) - batch * len(shards)


ARMS: dict[str, tuple[Callable[..., Awaitable[int]], bool]] = {
    "a1": (a1, False),
    "a1_same": (a1_same, True),
    "b1_500": (partial(b1, batch=500), False),
    "b1_2000": (partial(b1, batch=2000), False),
    "j500": (partial(journal, batch=500), True),
    "j2000": (partial(journal, batch=2000), True),
}
"""Each arm, and whether its database has our schema."""


class Cost:
    """What one run of an arm took."""

    def __init__(self, postmaster: int) -> None:
        self._postmaster = postmaster
        self.seconds = self.client_s = self.server_s = 0.0

    def begin(self) -> None:
        """From here on it counts."""
        self.seconds, self.client_s = -time.perf_counter(), -time.process_time()
        self.server_s = -_cpu_s(self._postmaster)

    def end(self) -> None:
        """Up to here."""
        self.seconds += time.perf_counter()
        self.client_s += time.process_time()
        self.server_s += _cpu_s(self._postmaster)


def _cpu_s(postmaster: int) -> float:
    """CPU seconds of the postmaster's children, those that have ended included (proc(5), stat)."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended just now
        if int(fields[1]) == postmaster:
            ticks += int(fields[11]) + int(fields[12])
        elif stat.parent.name == str(postmaster):
            ticks += int(fields[13]) + int(fields[14])
    return ticks / os.sysconf("SC_CLK_TCK")


async def run(server: Embedded, name: str, heard: Sequence[Heard]) -> dict[str, float]:
    """One arm, in a database of its own."""
    work, migrated = ARMS[name]
    database = f"bench_{uuid4().hex}"
    admin = await asyncpg.connect(server.dsn)
    await admin.execute(f"CREATE DATABASE {database}")
    dsn = server.dsn_of(database)
    if migrated:
        await migrate.upgrade(dsn)
    await admin.execute("CHECKPOINT")
    cost = Cost(int((server.directory / "data" / "postmaster.pid").read_text().split()[0]))
    calm_collector()  # of what the arm before has left, too
    count = await work(dsn, heard, cost.begin)
    cost.end()
    await admin.execute(f"DROP DATABASE {database} WITH (FORCE)")
    await admin.close()
    return {
        "per_s": count / cost.seconds,
        "client_us": cost.client_s / count * 1e6,
        "server_us": cost.server_s / count * 1e6,
    }


async def measure(server: Embedded, heard: Sequence[Heard]) -> dict[str, Any]:
    """All rounds, and what follows from them."""
    connection = await asyncpg.connect(server.dsn)
    durable = {name: await connection.fetchval(f"SHOW {name}") for name in ("fsync", "synchronous_commit")}
    version = await connection.fetchval("SHOW server_version")
    await connection.close()
    assert set(durable.values()) == {"on"}
    rounds = [{name: await run(server, name, heard) for name in ARMS} for _ in range(ROUNDS)]
    per_s = {name: [each[name]["per_s"] for each in rounds] for name in ARMS}
    ratios = {
        name: [a / b for a, b in zip(per_s[ours], per_s[measure], strict=True)]
        for name, ours, measure in (
            ("j500_by_a1", "j500", "a1"),
            ("j500_by_a1_same", "j500", "a1_same"),
            ("j500_by_b1", "j500", "b1_500"),
            ("j2000_by_b1", "j2000", "b1_2000"),
        )
    }
    return {
        "benchmark": "journal",
        "messages": len(heard),
        "writers": WRITERS,
        "bytes_mean": round(statistics.mean(len(each.raw) for each in heard)),
        "postgresql": version,
        **{f"{name}_per_s": round(statistics.median(values)) for name, values in per_s.items()},
        **{f"{name}_range": [round(min(values)), round(max(values))] for name, values in per_s.items()},
        **{name: round(statistics.median(values), 2) for name, values in ratios.items()},
        **{f"{name}_range": [round(min(v), 2), round(max(v), 2)] for name, v in ratios.items()},
        "cpu_us": {
            name: {
                side: round(statistics.median([each[name][side] for each in rounds]), 1)
                for side in ("client_us", "server_us")
            }
            for name in ARMS
        },
        "goals": GOALS,
        "reached": all(statistics.median(ratios[name]) >= goal for name, goal in GOALS.items()),
    }


def main() -> int:
    """Runs all and prints the line; 0 if the goals are reached."""
    heard = list(traffic(MESSAGES, accounts=ACCOUNTS))
    place = Path(tempfile.gettempdir()) / f"lb-{uuid4().hex[:10]}"
    server = Embedded(place)
    server.start()
    try:
        found = asyncio.run(measure(server, heard))
    finally:
        server.destroy()
    print(json.dumps(found))
    return 0 if found["reached"] else 1


if __name__ == "__main__":
    sys.exit(main())
