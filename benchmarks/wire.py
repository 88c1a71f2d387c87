"""From the CometD wire: to the pipeline alone, to commit and acknowledgement, and how long that takes.

`python -m benchmarks.wire` prints one JSON line. Simulator, PostgreSQL and listener share the machine, as
the issue's goals have it:

- `heard_per_s`: sessions, decoding of envelopes and positions, no storage;
- `stored_per_s`: the same with the pipeline and the journal, until the server has every acknowledgement;
- `unacknowledged_rule_ratio`: what commit-then-acknowledge costs, against acknowledging at once;
- `latency_ms`: wire to commit at 200/s, and in turn with it that of A1 (one SQLAlchemy ORM commit per
  notification) at the same rate; `latency_p99_ratio` is ours by A1's.

Every figure is the median of five rounds, a ratio that of each round's own; the run is on a noisy machine, so
compare inside one line only.
"""

import asyncio
import base64
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from benchmarks.a1 import OneCommitEach
from benchmarks.centre import Centre, centre
from listener.adapters.cometd import Endpoint, Line
from listener.adapters.genesys import GenesysClient
from listener.core.calls import Heard, Recorded
from listener.core.session import Fact, Saved, Subscribed
from listener.daemon import calm_collector
from listener.pipeline import WRITERS, Pipeline
from listener.store import migrate
from listener.store.embedded import Embedded
from listener.store.journal import AccountRow, Journal

ACCOUNTS = 50
ROUNDS = 5
HEARD_BURST = 50_000
STORED_BURST = 40_000
LATENCY_RATE = 200.0
LATENCY_S = 6.0
WARM_UP_S = 2.0


def _now() -> datetime:
    return datetime.now(UTC)  # noqa: TID251 - a benchmark is a shell


class _Counting:
    """A hearing that counts and acknowledges at once."""

    def __init__(self) -> None:
        self.heard = 0
        self.subscribed = 0

    async def hear(self, heard: Sequence[Heard], committed: Callable[[], None]) -> None:
        """Counts."""
        self.heard += len(heard)
        committed()

    def told(self, fact: Fact, at: datetime) -> None:  # noqa: ARG002 - the protocol's signature
        """Notes that an account is subscribed."""
        self.subscribed += isinstance(fact, Subscribed)

    def answered(self, at: datetime, *, took: bool) -> None:
        """Not looked at."""

    def keep(self, saved: Saved | None) -> None:
        """Not looked at."""


class _Early(_Counting):
    """Hands on to a pipeline; `early` acknowledges before the commit, as one must not."""

    def __init__(self, pipeline: Pipeline, *, early: bool) -> None:
        super().__init__()
        self._pipeline = pipeline
        self._early = early

    async def hear(self, heard: Sequence[Heard], committed: Callable[[], None]) -> None:
        """Hands on."""
        self.heard += len(heard)
        if self._early:
            await self._pipeline.hear(heard, lambda: None)
            committed()
        else:
            await self._pipeline.hear(heard, committed)


class _Single(_Counting):
    """Commits each notification by itself, and keeps how long that took from its arrival."""

    def __init__(self, a1: OneCommitEach) -> None:
        super().__init__()
        self.ms: list[float] = []
        self._a1 = a1

    async def hear(self, heard: Sequence[Heard], committed: Callable[[], None]) -> None:
        """Commits them one by one."""
        for one in heard:
            await self._a1.record(one.account, one.raw)
            self.ms.append((_now() - one.received_at).total_seconds() * 1000)
        committed()


class _Delays:
    """An observer of the pipeline that keeps how long each notification waited for its commit."""

    def __init__(self) -> None:
        self.ms: list[float] = []
        self.batches: list[int] = []
        self.commit_ms: list[float] = []

    def recorded(self, recorded: Recorded, seconds: float) -> None:
        """Keeps the delays."""
        now = _now()
        self.batches.append(len(recorded.entries))
        self.commit_ms.append(seconds * 1000)
        self.ms.extend((now - entry.heard.received_at).total_seconds() * 1000 for entry in recorded.entries)

    def store_failed(self, error: Exception) -> None:
        """A benchmark wants a store that works."""
        raise error

    def backlog(self, notifications: int, size_bytes: int) -> None:
        """Not looked at."""


@asynccontextmanager
async def _lines(
    site: Centre, hearing: _Counting, ids: Sequence[int], *, websocket: bool = False
) -> AsyncIterator[None]:
    """Every account's line, subscribed."""
    types = ("websocket", "long-polling") if websocket else ("long-polling",)
    endpoint = Endpoint(f"{site.url}/api/v2/notifications", connection_types=types, login_first=True)
    async with asyncio.TaskGroup() as tasks:
        running = []
        for account, login in zip(ids, site.logins, strict=True):
            pair = base64.b64encode(f"{login}:simulated".encode()).decode()
            headers = {"Authorization": f"Basic {pair}"}
            line = Line(account, endpoint, GenesysClient(site.url, headers), hearing)
            running.append(tasks.create_task(line.run()))
        while hearing.subscribed < len(ids):  # noqa: ASYNC110 - a count, not an event
            await asyncio.sleep(0.01)
        yield
        for task in running:
            task.cancel()


async def _heard() -> list[float]:
    async with centre(ACCOUNTS) as site:
        hearing = _Counting()
        async with _lines(site, hearing, range(1, ACCOUNTS + 1)):
            rates = []
            for _ in range(ROUNDS + 1):
                before = hearing.heard
                seconds = await site.burst(HEARD_BURST)
                rates.append((hearing.heard - before) / seconds)
    return rates[1:]


async def _stored(dsn: str) -> tuple[list[float], list[float], _Delays]:
    """Rates with the rule and without it, in turn, in one run."""
    rates: dict[bool, list[float]] = {False: [], True: []}
    delays = _Delays()
    async with centre(ACCOUNTS) as site, await Journal.open(dsn, connections=WRITERS) as journal:
        numbers = await journal.register([AccountRow(login, "", "bench") for login in site.logins])
        ids = [numbers[login] for login in site.logins]
        pipeline = Pipeline(journal, delays)
        writing = asyncio.ensure_future(pipeline.run())  # noqa: TID251 - ended below
        for _ in range(ROUNDS + 1):
            for early in (False, True):
                hearing = _Early(pipeline, early=early)
                async with _lines(site, hearing, ids):
                    began = time.perf_counter()
                    await site.burst(STORED_BURST)
                    await pipeline.drain()
                    rates[early].append(hearing.heard / (time.perf_counter() - began))
        writing.cancel()
    return rates[False][1:], rates[True][1:], delays


async def _latency(dsn: str, *, one_commit_each: bool) -> list[float]:
    """Milliseconds from the wire to the commit at a steady rate."""
    delays = _Delays()
    async with (
        centre(ACCOUNTS, rate=LATENCY_RATE) as site,
        await Journal.open(dsn, connections=WRITERS) as journal,
    ):
        numbers = await journal.register([AccountRow(login, "", "bench") for login in site.logins])
        ids = [numbers[login] for login in site.logins]
        if one_commit_each:
            async with OneCommitEach(dsn, _now) as a1:
                single = _Single(a1)
                async with _lines(site, single, ids):
                    await _play(site, single)
            return single.ms
        pipeline = Pipeline(journal, delays)
        writing = asyncio.ensure_future(pipeline.run())  # noqa: TID251 - ended below
        hearing = _Early(pipeline, early=False)
        async with _lines(site, hearing, ids):
            await _play(site, delays)
            await pipeline.drain()
        writing.cancel()
    return delays.ms


async def _play(site: Centre, measured: "_Delays | _Single") -> None:
    """A steady rate; what came while connections and caches were cold does not count."""
    calm_collector()  # as the daemon does when it is ready
    await site.play(WARM_UP_S)
    measured.ms.clear()
    await site.play(LATENCY_S)


def _percentile(values: list[float], share: float) -> float:
    return round(sorted(values)[min(len(values) - 1, int(len(values) * share))], 2)


async def main() -> None:
    """Runs all and prints the line."""
    figures: dict[str, object] = {"benchmark": "wire", "accounts": ACCOUNTS}
    heard = await _heard()
    figures["heard_per_s"] = round(statistics.median(heard))
    with tempfile.TemporaryDirectory() as directory, Embedded(Path(directory) / "store") as server:
        await migrate.upgrade(server.dsn)
        stored, early, delays = await _stored(server.dsn)
        figures["stored_per_s"] = round(statistics.median(stored))
        figures["unacknowledged_rule_ratio"] = round(statistics.median(stored) / statistics.median(early), 3)
        figures["batch_median"] = statistics.median(delays.batches)
    # Not on the server of the bursts, whose checkpoint goes on for minutes.
    with tempfile.TemporaryDirectory() as directory, Embedded(Path(directory) / "store") as server:
        await migrate.upgrade(server.dsn)
        rounds = [
            [await _latency(server.dsn, one_commit_each=single) for single in (False, True)]
            for _ in range(ROUNDS)
        ]
    for place, name in enumerate(("ours", "a1")):
        figures[f"latency_ms_{name}"] = {
            f"p{percent}": statistics.median(_percentile(each[place], percent / 100) for each in rounds)
            for percent in (50, 99)
        }
    ratios = [_percentile(ours, 0.99) / _percentile(a1, 0.99) for ours, a1 in rounds]
    figures["latency_p99_ratio"] = round(statistics.median(ratios), 2)
    figures["latency_p99_ratio_range"] = [round(min(ratios), 2), round(max(ratios), 2)]
    figures["cpu_s"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_utime, 1)
    sys.stdout.write(msgspec.json.encode(figures).decode() + "\n")


if __name__ == "__main__":
    asyncio.run(main())
