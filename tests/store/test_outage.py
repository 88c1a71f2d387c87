"""Every way in which PostgreSQL goes away: nothing is lost or doubled, nothing is acknowledged early.

The pipeline, the journal and the spool as they run, on a server that may be taken away. Each outage is made
on the server itself, so that what the driver says of it is what it says.
"""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from uuid import uuid4

import asyncpg
import psutil
import pytest

from listener.core.calls import Cover, Missing, Recorded
from listener.coverage import Ledger
from listener.errors import StoreUnavailable
from listener.pipeline import Pipeline
from listener.store.embedded import Embedded
from listener.store.journal import AccountRow, Journal
from listener.store.spool import Spool, inspect
from tests.support.database import THROWAWAY
from tests.support.memory import HEARD_AT, Said
from tests.support.outage import Fragile, briefly, change_a_bit
from tests.support.running import until

ROOT = Path(__file__).parents[2]
STARTED_AT = HEARD_AT + timedelta(hours=1)
"""When a process finds what another one has left."""


class Failures:
    """An observer that remembers what the store said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def recorded(self, recorded: Recorded, seconds: float) -> None:
        """Not looked at."""

    def store_failed(self, error: StoreUnavailable) -> None:
        """What the store said."""
        self.said.append(str(error))

    def backlog(self, notifications: int, size_bytes: int) -> None:
        """Not looked at."""


class Talk:
    """Two accounts that go on talking, and what of it is acknowledged."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.lines = [Said(account, str(uuid4())) for account in (1, 2)]
        self.acknowledged: list[tuple[int, int]] = []
        self._pipeline = pipeline

    async def say(self, deliveries: int) -> None:
        """So many deliveries of three messages by each."""
        for _ in range(deliveries):
            for line in self.lines:
                heard = line.next(3)
                done = partial(self.acknowledged.append, (line.account, heard[-1].position))
                await self._pipeline.hear(heard, done)
            await asyncio.sleep(0)

    async def check(self, dsn: str) -> None:
        """All of it is stored, once and in order, and acknowledged in order."""
        connection = await asyncpg.connect(dsn)
        try:
            for line in self.lines:
                rows = await connection.fetch(
                    "SELECT stream_id, position, raw FROM notification WHERE account_id = $1 ORDER BY id",
                    line.account,
                )
                stored = [(str(row[0]), row[1], row[2]) for row in rows]
                assert stored == [(one.stream, one.position, one.raw) for one in line.said]
                done = [position for account, position in self.acknowledged if account == line.account]
                assert done == list(range(3, len(line.said) + 1, 3))
        finally:
            await connection.close()


@asynccontextmanager
async def superuser(dsn: str, *statements: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection that outages do not bite; it has run the statements."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(
            "SET default_transaction_read_only = off; SET statement_timeout = 0; SET lock_timeout = 0"
        )
        for statement in statements:
            await connection.execute(statement)
        yield connection
    finally:
        await connection.close()


async def configure(dsn: str, setting: str, value: str | None) -> None:
    """Sets a server parameter for everybody, also for those who are connected; None is its default."""
    change = f"SET {setting} = '{value}'" if value is not None else f"RESET {setting}"
    async with superuser(dsn, f"ALTER SYSTEM {change}", "SELECT pg_reload_conf()"):
        pass


@asynccontextmanager
async def stopped(fragile: Fragile, dsn: str) -> AsyncIterator[None]:
    """Told to stop, and started again."""
    async with fragile.away():
        yield


@asynccontextmanager
async def crashed(fragile: Fragile, dsn: str) -> AsyncIterator[None]:
    """Ended at once, as by a failing machine; it recovers from its log."""
    await asyncio.to_thread(fragile.server._pg_ctl, "stop", "-m", "immediate")
    try:
        yield
    finally:
        await asyncio.to_thread(fragile.server._ensure_running)


@asynccontextmanager
async def killed(fragile: Fragile, dsn: str) -> AsyncIterator[None]:
    """SIGKILL to the first of its processes; the others see that and leave."""
    pid = int((fragile.server.directory / "data" / "postmaster.pid").read_text().splitlines()[0])
    left = [child.pid for child in psutil.Process(pid).children()]
    os.kill(pid, signal.SIGKILL)
    try:
        yield
    finally:
        await until(lambda: not any(_alive(child) for child in left))
        await asyncio.to_thread(fragile.server._ensure_running)


def _alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@asynccontextmanager
async def read_only(fragile: Fragile, dsn: str) -> AsyncIterator[None]:
    """It answers, and takes nothing: a standby, or a primary that was demoted."""
    await configure(dsn, "default_transaction_read_only", "on")
    try:
        yield
    finally:
        await configure(dsn, "default_transaction_read_only", None)


@asynccontextmanager
async def out_of_connections(fragile: Fragile, dsn: str) -> AsyncIterator[None]:
    """Somebody else has all of them."""
    async with AsyncExitStack() as stack:
        watcher = await stack.enter_async_context(superuser(dsn))

        async def take_all() -> None:
            while True:
                taken = await asyncpg.connect(dsn)
                stack.push_async_callback(taken.close)

        async def shut_out() -> bool:
            # The claim of a place that was just freed is a race, so until we have them all.
            ended = await watcher.fetch(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name LIKE 'listener%'"
            )
            with pytest.raises(asyncpg.TooManyConnectionsError):
                await take_all()
            return not ended

        await until(shut_out)
        yield


@asynccontextmanager
async def disk_full(fragile: Fragile, dsn: str) -> AsyncIterator[None]:
    """Each insert is answered as by a server whose disk is full (SQLSTATE 53100)."""
    async with superuser(
        dsn,
        "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100'; END $$",
        "CREATE TRIGGER full_disk BEFORE INSERT ON notification EXECUTE FUNCTION full_disk()",
    ) as connection:
        yield
        await connection.execute("DROP FUNCTION full_disk CASCADE")


_WAITS = """
    SELECT count(*) FROM pg_stat_activity WHERE application_name = 'listener journal'
    AND wait_event_type = 'Lock' AND datname = current_database()"""


@asynccontextmanager
async def deadlocked(fragile: Fragile, dsn: str) -> AsyncIterator[None]:
    """Another one locks the accounts in the wrong order, and ours is the victim."""
    async with superuser(dsn, "SET deadlock_timeout = '1min'", "BEGIN") as other:
        await other.execute("SELECT FROM account WHERE id = 2 FOR UPDATE")

        async def close_the_circle() -> None:
            async with superuser(dsn) as watcher:

                async def waits() -> bool:
                    return bool(await watcher.fetchval(_WAITS))

                await until(waits)
            await other.execute("SELECT FROM account WHERE id = 1 FOR UPDATE")

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(close_the_circle())
            yield
        await other.execute("ROLLBACK")


def timed_out(setting: str) -> Callable[[Fragile, str], AbstractAsyncContextManager[None]]:
    """Everything waits for a lock, and gives up by this parameter."""

    @asynccontextmanager
    async def outage(fragile: Fragile, dsn: str) -> AsyncIterator[None]:
        await configure(dsn, setting, "50ms")
        try:
            async with superuser(dsn, "BEGIN; LOCK TABLE notification IN ACCESS EXCLUSIVE MODE"):
                yield
        finally:
            await configure(dsn, setting, None)

    return outage


@asynccontextmanager
async def hanging(fragile: Fragile, dsn: str) -> AsyncIterator[None]:
    """It takes our statements and does not answer."""
    async with fragile.hanging(dsn, tables="notification"):
        yield


OUTAGES: dict[str, tuple[Callable[[Fragile, str], AbstractAsyncContextManager[None]], str]] = {
    "stopped": (stopped, "does not answer"),
    "crashed": (crashed, "does not answer"),
    "killed": (killed, "does not answer"),
    "read-only": (read_only, "25006"),
    "out of connections": (out_of_connections, "53300"),
    "disk full": (disk_full, "53100"),
    "deadlock": (deadlocked, "40P01"),
    "statement timeout": (timed_out("statement_timeout"), "57014"),
    "lock timeout": (timed_out("lock_timeout"), "55P03"),
    "hanging": (hanging, ""),
}
"""How to make each, and what the store must have said of it."""


@asynccontextmanager
async def at_work(
    dsn: str, place: Path, failures: Failures, *, spool_after_s: float = 0.05
) -> AsyncIterator[Pipeline]:
    """A pipeline with one writer, so that both accounts are in one batch, its journal, its spool, and who
    writes down what is missing."""
    spool = Spool.open(place)
    try:
        async with await Journal.open(dsn) as journal, asyncio.TaskGroup() as tasks:
            await journal.register([AccountRow(name, "", "lab") for name in ("ada", "bob")])
            ledger = Ledger(journal, pause=briefly)

            async def lost(missing: Sequence[Missing], left: bool) -> None:
                await ledger.lose(missing, STARTED_AT if left else None)

            pipeline = Pipeline(
                journal,
                failures,
                spool=spool,
                writers=1,
                lost=lost,
                batch_max=50,
                spool_after_s=spool_after_s,
                pause=briefly,
            )
            works = [tasks.create_task(each.run()) for each in (pipeline, ledger)]
            try:
                yield pipeline
            finally:
                for work in works:
                    work.cancel()
    finally:
        spool.close()


@pytest.mark.parametrize("name", OUTAGES)
async def test_an_outage_loses_and_doubles_nothing(
    name: str, fragile: Fragile, fragile_database: str, tmp_path: Path
) -> None:
    """While it lasts nothing is acknowledged and all of it goes to the spool; afterwards everything is stored
    once and in order, acknowledged in order, and the spool is empty."""
    make, says = OUTAGES[name]
    failures = Failures()
    async with at_work(fragile_database, tmp_path / "spool", failures) as pipeline:
        talk = Talk(pipeline)
        await talk.say(20)
        await pipeline.drain()
        async with make(fragile, fragile_database):
            await talk.say(30)
            # An outage takes effect soon, and not at once: the first of these may still be committed.
            await until(lambda: 0 < pipeline.spooled_notifications == pipeline.backlog_notifications)
            said = len(talk.acknowledged)
            assert pipeline.backlog_bytes == 0
            assert len(list((tmp_path / "spool").glob("*.spool"))) == 1
            if says:
                await until(lambda: any(says in each for each in failures.said))
            assert talk.acknowledged[said:] == []
            await until(lambda: not pipeline.available)
        await talk.say(20)
        async with asyncio.timeout(40):
            await pipeline.drain()
        assert pipeline.available
    await talk.check(fragile_database)
    assert list((tmp_path / "spool").glob("*.spool")) == []


_CHILD = """
import asyncio, os, signal, sys
from pathlib import Path
from listener.store.spool import Spool, inspect
from tests.store.test_outage import Failures, Talk, at_work
from tests.support.memory import until

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

async def main(dsn, place, stage):
    if stage == "committed":
        Spool.release = die
    async with at_work(dsn, Path(place), Failures()) as pipeline:
        await Talk(pipeline).say(10)
        await until(lambda: pipeline.backlog_bytes == 0)
        if stage == "spooled":
            die()
        Path(place, "go").touch()
        await pipeline.drain()

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("stage", ["spooled", "committed"])
async def test_a_process_that_is_killed_in_an_outage_loses_and_doubles_nothing(
    stage: str, fragile: Fragile, fragile_database: str, tmp_path: Path
) -> None:
    """SIGKILL when all of it is in the spool, or between the commit and the removal of what is committed;
    twice in a row. The next run stores what both have heard, in order, before what it hears itself."""
    place = tmp_path / "spool"
    for _ in range(2):
        async with AsyncExitStack() as outage:
            await outage.enter_async_context(disk_full(fragile, fragile_database))
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", _CHILD, fragile_database, str(place), stage, cwd=ROOT
            )
            if stage == "spooled":
                assert await child.wait() == -signal.SIGKILL
            else:
                await until((place / "go").exists)
        assert await child.wait() == -signal.SIGKILL
        (place / "go").unlink(missing_ok=True)
        assert inspect(place).notifications > 0
    async with at_work(fragile_database, place, Failures()) as pipeline:
        talk = Talk(pipeline)
        await talk.say(10)
        await pipeline.drain()
    connection = await asyncpg.connect(fragile_database)
    for line in talk.lines:
        rows = await connection.fetch(
            "SELECT stream_id, position FROM notification WHERE account_id = $1 ORDER BY id", line.account
        )
        assert [row[1] for row in rows] == [*range(1, 31)] * 3
        streams = [str(row[0]) for row in rows][::30]
        assert len(set(streams)) == 3
        assert streams[-1] == line.stream
    await connection.close()
    assert list(place.glob("*.spool")) == []


_FINDING_DAMAGE = """
import asyncio, os, signal, sys
from pathlib import Path
from listener.store.journal import Journal
from listener.store.spool import Spool
from tests.store.test_outage import Failures, at_work

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

async def main(dsn, place, stage):
    if stage == "not written":
        Journal.lose = die
    elif stage == "written":
        Spool.release = die
    elif stage == "forgotten":
        Journal.record = die
    async with at_work(dsn, Path(place), Failures()) as pipeline:
        await pipeline.drain()

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("stages", [("not written", "written", "forgotten"), ("written", "written"), ()])
async def test_a_kill_while_damage_is_found_leaves_the_same_gap(
    stages: Sequence[str], fragile_database: str, tmp_path: Path
) -> None:
    """SIGKILL before the gap is durable, before the spool lets go of what is damaged, and before the rest is
    committed: a start that is not killed leaves the same as if none had been, and the rest is stored."""
    place = tmp_path / "spool"
    said = [Said(account, str(uuid4())) for account in (1, 2)]
    spool = Spool.open(place)
    for minute in range(4):
        for line in said:
            line.at = HEARD_AT + timedelta(minutes=minute)
            spool.append([line.next(2)])
    spool.close()
    (path,) = place.glob("*.spool")
    change_a_bit(path, path.read_bytes().index(said[0].said[4].raw) + 5)
    async with await Journal.open(fragile_database) as journal:
        await journal.register([AccountRow(name, "", "lab") for name in ("ada", "bob")])
        await journal.cover([Cover(account, HEARD_AT - timedelta(hours=1)) for account in (1, 2)])
        await journal.heartbeat([1, 2], HEARD_AT)
    for stage in stages:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _FINDING_DAMAGE, fragile_database, str(place), stage, cwd=ROOT
        )
        assert await child.wait() == -signal.SIGKILL
        assert inspect(place).damaged == 1
    async with at_work(fragile_database, place, Failures()) as pipeline:
        await pipeline.drain()
    connection = await asyncpg.connect(fragile_database)
    try:
        rows = await connection.fetch(
            "SELECT account_id, since, until, cause FROM coverage WHERE until > since OR until IS NULL"
            " ORDER BY account_id, since, id"
        )
        stored = await connection.fetch(
            "SELECT account_id, position FROM notification ORDER BY account_id, id"
        )
    finally:
        await connection.close()
    lost_at = HEARD_AT + timedelta(minutes=1), HEARD_AT + timedelta(minutes=2, microseconds=1)
    assert [tuple(row) for row in rows] == [
        (1, HEARD_AT - timedelta(hours=1), HEARD_AT, ""),
        (1, HEARD_AT, lost_at[0], "not started"),
        (1, *lost_at, "spool damaged"),
        (1, lost_at[1], None, "not started"),
        (2, HEARD_AT - timedelta(hours=1), None, ""),
    ]
    assert [row[1] for row in stored] == [1, 2, 3, 4, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8]
    assert list(place.glob("*.spool")) == []


async def test_what_was_committed_and_not_yet_removed_is_recognised(
    fragile_database: str, tmp_path: Path
) -> None:
    """A kill between the commit and the removal leaves in the spool what the store has: draining it once more
    changes nothing, as often as it happens."""
    place = tmp_path / "spool"
    spool = Spool.open(place)
    said = [Said(account, str(uuid4())) for account in (1, 2)]
    for _ in range(5):
        for line in said:
            spool.append([line.next(4)])
    spool.close()
    kept = {path.name: path.read_bytes() for path in place.glob("*.spool")}
    for _ in range(3):
        for name, content in kept.items():
            (place / name).write_bytes(content)
        async with at_work(fragile_database, place, Failures()) as pipeline:
            assert pipeline.spooled_notifications == 40
            await pipeline.drain()
        assert list(place.glob("*.spool")) == []
        connection = await asyncpg.connect(fragile_database)
        for line in said:
            rows = await connection.fetch(
                "SELECT position, raw FROM notification WHERE account_id = $1 ORDER BY id", line.account
            )
            assert [tuple(row) for row in rows] == [(one.position, one.raw) for one in line.said]
        await connection.close()


async def test_an_address_that_another_server_takes_over(
    fragile: Fragile, fragile_database: str, tmp_path: Path
) -> None:
    """A failover: behind the same address there is another server with the same data, which at first only
    reads, and later is promoted."""
    first = fragile.server
    second = Embedded(Path(tempfile.gettempdir()) / f"lf-{uuid4().hex[:12]}", settings=THROWAWAY)
    here = Path(tempfile.gettempdir()) / f"lf-{uuid4().hex[:12]}"
    here.symlink_to(first.directory)
    dsn = fragile_database.replace(str(first.directory), str(here))
    failures = Failures()
    try:
        async with at_work(dsn, tmp_path / "spool", failures) as pipeline:
            talk = Talk(pipeline)
            await talk.say(20)
            await pipeline.drain()
            async with fragile.away():
                acknowledged = len(talk.acknowledged)
                await talk.say(20)
                await asyncio.to_thread(_take_over, first, second, here)
                await until(lambda: any("25006" in each for each in failures.said))
                await talk.say(20)
                assert len(talk.acknowledged) == acknowledged
                await configure(dsn, "default_transaction_read_only", None)
                async with asyncio.timeout(20):
                    await pipeline.drain()
                await talk.check(dsn)
    finally:
        await asyncio.to_thread(second.destroy)
        here.unlink(missing_ok=True)


def _take_over(first: Embedded, second: Embedded, here: Path) -> None:
    subprocess.run(["cp", "-a", str(first.directory), str(second.asked)], check=True)
    with (second.asked / "data" / "postgresql.auto.conf").open("a") as conf:
        conf.write("default_transaction_read_only = on\n")
    here.unlink()
    here.symlink_to(second.directory)
    second.start()
