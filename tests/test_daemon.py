"""The daemon in this process, against the simulated contact centre and a real PostgreSQL."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from listener.core.calls import Outcome
from listener.daemon import Daemon
from listener.errors import SettingsError, StoreError
from listener.settings import Settings, Store
from listener.simulator.centre import Simulator
from listener.simulator.scripts import CALLS_CHANNEL
from listener.simulator.settings import SimulatorSettings
from listener.store import migrate
from listener.store.embedded import Embedded
from listener.store.journal import AccountRow, Journal
from listener.store.spool import Spool
from tests.peers.proxy import TcpProxy, free_port
from tests.store.line import T0, Line
from tests.support.database import THROWAWAY
from tests.support.memory import Said
from tests.support.outage import Fragile, change_a_bit
from tests.support.running import InProcess, account, settings_for, short_place, until
from tests.support.truth import compare

OPEN = "SELECT count(*) FROM call WHERE ended_at IS NULL AND settled IS NULL"


@asynccontextmanager
async def centre(**settings: Any) -> AsyncIterator[Simulator]:
    """A simulated contact centre; fast, so that a test is."""
    async with Simulator(SimulatorSettings(**({"accounts": 4, "rate": 400.0} | settings))) as simulator:
        yield simulator


def sessions(simulator: Simulator) -> dict[str, set[str]]:
    """The Bayeux sessions of each account that are subscribed to calls."""
    return {
        login: {each.id for each in simulator.gws.broker.sessions_of(login) if each.wants(CALLS_CHANNEL)}
        for login in simulator.accounts
    }


def differ(simulator: Simulator, before: dict[str, set[str]], count: int) -> bool:
    """Whether the sessions of so many accounts are others than before."""
    now = sessions(simulator)
    return sum(now[login] != before[login] for login in before) == count


def troubled(daemon: Daemon, reason: str) -> bool:
    """Whether this is among the reasons why it is not ready."""
    return any(each.startswith(reason) for each in daemon.not_ready())


async def empty(listener: InProcess) -> bool:
    """Whether its spool is drained."""
    return await listener.metric("listener_spool_notifications") == 0


async def causes(sql: asyncpg.Connection, name: str) -> list[str]:
    """The causes of an account's coverage in order, without repeats; "" is observed. A gap of no length was
    withdrawn; observed for so short a time that nothing can be vouched for is observed."""
    rows = await sql.fetch(
        "SELECT cause FROM coverage c JOIN account a ON a.id = c.account_id"
        " WHERE a.name = $1 AND (cause = '' OR until IS DISTINCT FROM since) ORDER BY since, c.id",
        name,
    )
    return [cause for cause, _ in groupby(row[0] for row in rows)]


async def until_kept(sql: asyncpg.Connection, sessions: int) -> None:
    """Until so many sessions are kept, which is written soon after they have observed; the time-out of the
    test is the bound."""
    while await sql.fetchval(KEPT) != sessions:
        pass


# ── What it is for ────────────────────────────────────────────────────────────────────────────────────


async def test_everything_that_was_sent_is_stored_and_counted(database: str, sql: asyncpg.Connection) -> None:
    """Eight accounts in all dialects: each message, each call and each metric is as the contact centre and
    the database have it; stopping says so in the coverage."""
    async with centre(accounts=8) as simulator:
        async with InProcess(settings_for(simulator, database)).running() as listener:
            await simulator.play(notifications=600)
            await simulator.finish()
            await simulator.drained()
            assert await listener.reasons() == []
            open_now = await listener.metric("listener_calls")
            counted = {
                "notifications": await listener.metric("listener_notifications_total")
                - await listener.metric("listener_notifications_total", type="snapshot"),
                "snapshots": await listener.metric("listener_notifications_total", type="snapshot"),
                "began": await listener.metric("listener_calls_began_total"),
                "answered": await listener.metric("listener_calls_ended_total", outcome="answered"),
                "unanswered": await listener.metric("listener_calls_ended_total", outcome="unanswered"),
                "anomalies": await listener.metric("listener_anomalies_total"),
                "up": await listener.metric("listener_sessions", state="up"),
                "accounts": await listener.metric("listener_accounts"),
                "backlog": await listener.metric("listener_backlog_notifications"),
                "handshakes": await listener.metric("listener_handshakes_total"),
                "in batches": await listener.metric("listener_batch_notifications_sum"),
            }
        truth = simulator.truth()
    report = (await compare(database, truth)).check()
    assert report.missing == 0
    assert report.stored == truth.sent
    stored = await sql.fetchrow(
        "SELECT (SELECT count(*) FROM notification WHERE source = 'cometd') AS notifications,"
        " (SELECT count(*) FROM notification WHERE source = 'snapshot') AS snapshots,"
        " (SELECT count(*) FROM call) AS began,"
        " (SELECT count(*) FROM call WHERE outcome = 'answered') AS answered,"
        " (SELECT count(*) FROM call WHERE outcome = 'unanswered') AS unanswered,"
        " (SELECT count(*) FROM anomaly) AS anomalies"
    )
    assert stored is not None
    expected = dict(stored) | {"up": 8, "accounts": 8, "backlog": 0, "handshakes": 8}
    assert counted == expected | {"in batches": stored["notifications"] + stored["snapshots"]}
    assert open_now == await sql.fetchval("SELECT count(*) FROM call WHERE ended_at IS NULL") == 0
    assert {Outcome.ANSWERED, Outcome.UNANSWERED} <= {call.outcome for call in truth.calls}
    for login in truth.accounts:
        assert await causes(sql, login) == ["not started", "", "stopped"]


async def test_calls_without_an_end_are_closed(database: str, sql: asyncpg.Connection) -> None:
    """Also those of an account that is gone: at the start, and without leaving the gauge below zero."""
    async with await Journal.open(database) as journal:
        gone = await journal.register([AccountRow("gone", "", "lab")])
        await journal.record(Line(gone["gone"]).call("Ringing", "Established"))
        await journal.retire(gone.values(), T0)
    async with centre() as simulator, InProcess(settings_for(simulator, database)).running() as listener:

        async def closed() -> bool:
            return await listener.metric("listener_calls_ended_total", outcome="answered") == 1

        await until(closed)
        assert await listener.metric("listener_calls", state="Established") == 0
    assert await sql.fetchval("SELECT settled FROM call") == "inferred: not heard of for 24 h"


async def test_a_second_start_goes_on_where_the_first_one_ended(
    database: str, sql: asyncpg.Connection
) -> None:
    """With its sessions: no handshake, nothing missing, and no time that was not observed, although the calls
    went on while it was stopped. Calls that were open are open still."""
    async with centre() as simulator:
        async with InProcess(settings_for(simulator, database)).running():
            await simulator.play(notifications=200)
            await simulator.drained()
        before = sessions(simulator)
        assert await sql.fetchval(OPEN) > 0
        await simulator.play(notifications=60)
        async with InProcess(settings_for(simulator, database)).running() as listener:
            await simulator.finish()
            await simulator.drained()
            await until(lambda: listener.backlog == 0)
            assert await listener.metric("listener_calls") == 0
            assert await listener.metric("listener_handshakes_total") == 0
        assert sessions(simulator) == before
        report = (await compare(database, simulator.truth())).check()
    assert (report.missing, report.inferred) == (0, 0)
    assert await sql.fetchval(OPEN) == 0
    for login in simulator.accounts:
        assert await causes(sql, login) == ["not started", "", "stopped"]


async def test_without_acknowledgements_a_session_is_resumed_and_the_gap_stays(
    database: str, sql: asyncpg.Connection
) -> None:
    """What was in flight at the stop is not known: from it to the snapshot nobody vouches for anything."""
    async with centre(ack=False) as simulator:
        async with InProcess(settings_for(simulator, database)).running():
            await simulator.play(notifications=200)
            await simulator.drained()
        before = sessions(simulator)
        await simulator.play(notifications=60)
        async with InProcess(settings_for(simulator, database)).running() as listener:
            await simulator.finish()
            await simulator.drained()
            assert await listener.metric("listener_handshakes_total") == 0
        assert sessions(simulator) == before
        (await compare(database, simulator.truth(), acknowledged=False)).check()
    assert await sql.fetchval(OPEN) == 0
    for login in simulator.accounts:
        assert await causes(sql, login) == ["not started", "", "stopped", "", "stopped"]


async def test_a_session_that_the_server_has_forgotten_is_a_gap(
    database: str, sql: asyncpg.Connection
) -> None:
    """The restart took too long: another session begins, after a login; the gap is since the stop."""
    async with centre() as simulator:
        async with InProcess(settings_for(simulator, database)).running():
            await simulator.play(notifications=100)
            await simulator.drained()
        simulator.gws.forget()
        await simulator.play(notifications=60)
        async with InProcess(settings_for(simulator, database)).running() as listener:
            await simulator.finish()
            await simulator.drained()
            assert await listener.metric("listener_handshakes_total") == 4
        report = (await compare(database, simulator.truth())).check()
    assert report.missing >= 60
    for login in simulator.accounts:
        assert await causes(sql, login) == ["not started", "", "stopped", "session lost", "", "stopped"]


async def test_a_session_of_another_login_is_not_resumed(database: str, sql: asyncpg.Connection) -> None:
    """An account that is the same by name may be somebody else's now."""
    async with centre(accounts=2) as simulator:
        one, two = simulator.accounts
        settings = settings_for(simulator, database, [one])
        async with InProcess(settings).running():
            before = sessions(simulator)
        row = account(two).model_copy(update={"name": one})
        async with InProcess(settings.model_copy(update={"accounts": (row,)})).running():
            assert len(sessions(simulator)[two]) == 1
            assert sessions(simulator)[one] == before[one]
    assert await causes(sql, one) == ["not started", "", "stopped", "", "stopped"]


# ── Reload ────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_reload_touches_only_the_accounts_that_changed(
    database: str, sql: asyncpg.Connection
) -> None:
    """One account is added, one removed, one gets another tenant: the sessions of the others are the same
    ones as before, and not a message is lost to them."""
    async with centre(accounts=5) as simulator:
        kept, changed, removed, other, added = simulator.accounts
        first = settings_for(simulator, database, [kept, changed, removed, other])
        async with InProcess(first).running() as listener:
            before = sessions(simulator)
            playing = asyncio.get_running_loop().create_task(simulator.play(notifications=400))
            rows = (account(kept), account(changed, tenant="acme"), account(other), account(added))
            listener.settings = first.model_copy(update={"accounts": rows})
            listener.daemon.reload()
            await until(lambda: bool(sessions(simulator)[added]) and not sessions(simulator)[removed])
            assert not before[changed] & sessions(simulator)[changed]
            await until(lambda: bool(sessions(simulator)[changed] - before[changed]))
            await until(lambda: not listener.daemon.not_ready())
            await playing
            await simulator.finish()
            await simulator.drained()
            after = sessions(simulator)
            assert await listener.metric("listener_accounts") == 4
            assert await listener.metric("listener_sessions", state="up") == 4
            assert (after[kept], after[other]) == (before[kept], before[other])
            assert len(after[changed]) == 1
            assert await causes(sql, removed) == ["not started", ""]  # up to the moment of the reload
            assert await sql.fetchval("SELECT removed_at FROM account WHERE name = $1", removed) is not None
            assert await causes(sql, changed) == ["not started", "", "stopped", ""]
            assert await sql.fetchval("SELECT tenant FROM account WHERE name = $1", changed) == "acme"
        truth = simulator.truth()
    for login in (kept, other):
        assert truth.accounts[login].accepted == truth.accounts[login].sent
        whole = type(truth)({login: truth.accounts[login]}, truth.calls)
        assert (await compare(database, whole)).check().missing == 0
    partly = type(truth)({login: truth.accounts[login] for login in (changed, added)}, truth.calls)
    (await compare(database, partly)).check()


async def test_a_reload_is_not_ready_until_its_accounts_are_heard(database: str) -> None:
    """While the farewell of one account takes its time, those that change and those that are new are listened
    to by nobody, and are no less missed for that."""
    async with centre(accounts=4) as simulator:
        kept, changed, removed, added = simulator.accounts
        first = settings_for(simulator, database, [kept, changed, removed])
        async with InProcess(first).running() as listener:
            simulator.faults.arm("delay", account=removed, on="disconnect", seconds=0.5)
            rows = (account(kept), account(changed, tenant="acme"), account(added))
            listener.settings = first.model_copy(update={"accounts": rows})
            listener.daemon.reload()
            await until(lambda: listener.daemon.accounts == 1)
            assert [reason.partition(":")[0] for reason in listener.daemon.not_ready()] == [added, changed]
            await until(lambda: not listener.daemon.not_ready())
            assert await listener.metric("listener_sessions", state="up") == 3


async def test_a_new_account_that_waits_for_the_database_is_missed(
    fragile: Fragile, fragile_database: str
) -> None:
    """It is in the settings and not heard yet, so the listener is not ready, whatever it waits for."""
    async with centre(accounts=2) as simulator:
        one, two = simulator.accounts
        first = settings_for(simulator, fragile_database, [one])
        async with InProcess(first).running() as listener:
            assert listener.daemon._ledger is not None
            await listener.daemon._ledger.drain()
            async with fragile.hanging(fragile_database, tables="account"):
                listener.settings = settings_for(simulator, fragile_database)
                listener.daemon.reload()
                await until(
                    lambda: any(reason.startswith(f"{two}: ") for reason in listener.daemon.not_ready())
                )
            await until(lambda: not listener.daemon.not_ready())
            assert listener.daemon.accounts == 2


async def test_settings_that_are_given_up_are_not_waited_for(fragile: Fragile, fragile_database: str) -> None:
    """A reload waits for the database; when its settings have become wrong meanwhile, nobody is missed."""
    async with centre(accounts=2) as simulator:
        one, two = simulator.accounts
        first = settings_for(simulator, fragile_database, [one])

        def wrong() -> Settings:
            raise SettingsError("listener.toml:3: there is no such setting")

        async with InProcess(first).running() as listener:
            async with fragile.away():
                listener.settings = settings_for(simulator, fragile_database)
                listener.daemon.reload()
                await until(lambda: listener.daemon._reload_wanted and not listener.daemon._told.is_set())
                assert any(reason.startswith(f"{two}: ") for reason in listener.daemon.not_ready())
                listener.reread = wrong
            await until(lambda: not listener.daemon.not_ready())
            assert listener.daemon.accounts == 1


async def test_an_account_that_comes_back_is_no_longer_removed(
    database: str, sql: asyncpg.Connection
) -> None:
    """Removed and added again: the same row, observed again, with the time between as a gap."""
    async with centre(accounts=2) as simulator:
        one, two = simulator.accounts
        both = settings_for(simulator, database)
        async with InProcess(both).running() as listener:
            number = await sql.fetchval("SELECT id FROM account WHERE name = $1", two)
            listener.settings = both.model_copy(update={"accounts": (account(one),)})
            listener.daemon.reload()
            await until(lambda: not sessions(simulator)[two])
            listener.settings = both
            listener.daemon.reload()
            await until(lambda: bool(sessions(simulator)[two]))
            await until(lambda: not listener.daemon.not_ready())
            row = await sql.fetchrow("SELECT id, removed_at FROM account WHERE name = $1", two)
            assert row is not None
            assert tuple(row) == (number, None)
        assert [cause for cause in await causes(sql, two) if cause == ""] == ["", ""]


async def test_an_account_that_is_back_before_its_removal_was_written_stays(
    fragile: Fragile, fragile_database: str
) -> None:
    """The removal waits for the database; when the account is back, nothing of it is carried out."""
    async with centre(accounts=2) as simulator:
        one, two = simulator.accounts
        both = settings_for(simulator, fragile_database)
        async with InProcess(both).running() as listener:
            # A turn of coverage that is still being written holds the accounts that a reload needs.
            assert listener.daemon._ledger is not None
            await listener.daemon._ledger.drain()
            async with fragile.hanging(fragile_database, tables="coverage"):
                listener.settings = settings_for(simulator, fragile_database, [one])
                listener.daemon.reload()
                await until(lambda: not sessions(simulator)[two])
                listener.settings = both
                listener.daemon.reload()
                await until(lambda: not listener.daemon._reload_wanted)
            await until(lambda: bool(sessions(simulator)[two]) and not listener.daemon.not_ready())
            assert listener.daemon._retiring == {}
            connection = await asyncpg.connect(fragile_database)
            try:
                assert await fetched(connection, "SELECT count(*) = 2 FROM account WHERE removed_at IS NULL")
            finally:
                await connection.close()


@pytest.mark.parametrize("why", ["refused", "no certificates", "no accounts", "a defect"])
async def test_settings_that_are_wrong_change_nothing(database: str, tmp_path: Path, why: str) -> None:
    """Whatever is wrong with them: everything that runs goes on, with the same sessions."""
    async with centre(accounts=2) as simulator:
        one, _ = simulator.accounts
        right = settings_for(simulator, database)
        async with InProcess(right).running() as listener:
            before = sessions(simulator)

            def wrong() -> Settings:
                asked.set()
                if why == "refused":
                    raise SettingsError("listener.toml:3: there is no such setting")
                if why == "a defect":
                    raise ZeroDivisionError
                if why == "no accounts":
                    return right.model_copy(update={"accounts": ()})
                (tmp_path / "ca.pem").write_text("no certificate")
                return settings_for(
                    simulator,
                    database,
                    [one],
                    environment={"base_url": "https://127.0.0.1:1", "ca_file": tmp_path / "ca.pem"},
                )

            loop = asyncio.get_running_loop()
            answered = asyncio.Event()

            class Asked:
                def set(self) -> None:
                    loop.call_soon_threadsafe(answered.set)

            asked = Asked()
            listener.reread = wrong
            listener.daemon.reload()
            async with asyncio.timeout(10):
                await answered.wait()
            await simulator.play(notifications=100)
            await simulator.finish()
            await simulator.drained()
            assert sessions(simulator) == before
            assert listener.daemon.settings is right
            assert await listener.reasons() == []
            # And the next reload works.
            listener.reread = lambda: settings_for(simulator, database, [one])
            listener.daemon.reload()
            await until(lambda: listener.daemon.accounts == 1)
        (await compare(database, simulator.truth())).check()


async def test_a_reload_while_the_database_hangs_is_finished_when_it_answers(
    fragile: Fragile, fragile_database: str
) -> None:
    """No account is lost between two settings: those that stay are heard on, and those that are gone and new
    follow when the database answers again."""
    async with centre(accounts=3) as simulator:
        one, two, three = simulator.accounts
        first = settings_for(simulator, fragile_database, [one, two])
        async with InProcess(first).running() as listener:
            before = sessions(simulator)
            async with fragile.away():
                listener.settings = settings_for(simulator, fragile_database, [one, three])
                listener.daemon.reload()
                await until(lambda: listener.daemon._reload_wanted and not listener.daemon._told.is_set())
                assert sessions(simulator) == before
            await until(lambda: bool(sessions(simulator)[three]) and not sessions(simulator)[two])
            await until(lambda: not listener.daemon.not_ready())
            assert sessions(simulator)[one] == before[one]
            connection = await asyncpg.connect(fragile_database)
            try:
                gone = "SELECT count(*) FROM account WHERE name = $1 AND removed_at IS NOT NULL"
                await until(lambda: fetched(connection, gone, two))
            finally:
                await connection.close()


async def fetched(connection: asyncpg.Connection, statement: str, *arguments: object) -> bool:
    """Whether a statement gives something that is true."""
    return bool(await connection.fetchval(statement, *arguments))


# ── One account's failure is its own ──────────────────────────────────────────────────────────────────


async def test_a_wrong_password_disturbs_nobody_and_shows(database: str, sql: asyncpg.Connection) -> None:
    """It is named by /-/ready, is a gap with its cause and a session "refused"; the others hear all."""
    async with centre(accounts=3) as simulator:
        wrong, *right = simulator.accounts
        settings = settings_for(simulator, database)
        rows = (account(wrong, "not the password"), *settings.accounts[1:])
        async with InProcess(settings.model_copy(update={"accounts": rows})).running(up=False) as listener:
            await simulator.subscribed(2)
            await until(lambda: len(listener.daemon.not_ready()) == 1)
            await simulator.play(notifications=200)
            await simulator.finish()
            await simulator.drained()
            (reason,) = await listener.reasons()
            assert reason.startswith(f"{wrong}: login refused")
            assert "not the password" not in reason
            assert await listener.metric("listener_sessions", state="refused") == 1
            assert await listener.metric("listener_sessions", state="up") == 2
        truth = simulator.truth()
    heard = type(truth)({login: truth.accounts[login] for login in right}, truth.calls)
    assert (await compare(database, heard)).check().missing == 0
    assert (await causes(sql, wrong))[-2:] == ["login refused", "stopped"]


async def test_a_reload_tries_a_refused_account_at_once(database: str) -> None:
    """Whoever reloads may have mended the account at the contact centre: its turn would come in a minute."""
    async with centre(accounts=2) as simulator:
        refused, _ = simulator.accounts
        simulator.accounts[refused].refused = True
        async with InProcess(settings_for(simulator, database)).running(up=False) as listener:
            await simulator.subscribed(1)
            await until(lambda: [":" in reason for reason in listener.daemon.not_ready()] == [True])
            await until(lambda: "login refused" in listener.daemon.not_ready()[0])
            before = sessions(simulator)
            simulator.accounts[refused].refused = False
            listener.daemon.reload()
            await until(lambda: not listener.daemon.not_ready())
            after = sessions(simulator)
            assert after[refused]
            assert {login: ids for login, ids in after.items() if login != refused} == {
                login: ids for login, ids in before.items() if login != refused
            }


async def test_a_second_daemon_on_one_database_is_refused(database: str) -> None:
    """It says who is there, stores nothing twice, and the first one does not notice."""
    async with centre(accounts=1) as simulator:
        settings = settings_for(simulator, database)
        async with InProcess(settings).running() as first:
            before = sessions(simulator)
            with pytest.raises(ExceptionGroup) as refusal:
                async with InProcess(settings).running():
                    pytest.fail("the second daemon runs")
            assert refusal.group_contains(StoreError, match="Another listener writes to this database")
            assert first.daemon.not_ready() == []
            assert sessions(simulator) == before


class Stumbling:
    """A clock that fails once, in the task that hears for an account: a defect in the middle of the work."""

    def __init__(self) -> None:
        self.stumbles = 0

    def __call__(self) -> datetime:
        """The time of day."""
        task = asyncio.current_task()
        if self.stumbles and task is not None and "Daemon._keep" in repr(task.get_coro()):
            self.stumbles -= 1
            raise ZeroDivisionError("a defect that a test put there")
        return datetime.now(UTC)  # noqa: TID251 - this is a clock


async def test_an_account_that_breaks_begins_again_and_the_others_go_on(
    database: str, sql: asyncpg.Connection
) -> None:
    """A defect ends one account's line: that is a gap, it is heard again after a rest with a new session, and
    nobody else notices. Twice, because a line that ended once must not end for good."""
    clock = Stumbling()
    async with centre(accounts=3, max_interval_ms=1000) as simulator:
        running = InProcess(settings_for(simulator, database), wall=clock, broken_s=0.05)
        async with running.running() as listener:
            for _ in range(2):
                before = sessions(simulator)
                clock.stumbles = 1
                await simulator.play(notifications=150)
                await until(lambda: clock.stumbles == 0)
                await until(partial(differ, simulator, before, 1))
                await until(lambda: all(sessions(simulator).values()) and not listener.daemon.not_ready())
            await simulator.play(notifications=150)
            await simulator.finish()
            await simulator.drained()
        (await compare(database, simulator.truth())).check()
    broken = [login for login in simulator.accounts if "session lost" in await causes(sql, login)]
    assert 1 <= len(broken) <= 2
    for login in simulator.accounts:
        assert (await causes(sql, login))[-2:] == ["", "stopped"]


# ── Ready, and why not ────────────────────────────────────────────────────────────────────────────────


async def test_it_waits_for_a_database_that_is_not_there_yet(fragile: Fragile, fragile_database: str) -> None:
    """The pages are there from the start and say why nothing is heard; with the database all begins."""
    async with centre(accounts=1) as simulator:
        running = InProcess(settings_for(simulator, fragile_database))
        async with fragile.away():
            task = asyncio.get_running_loop().create_task(running.daemon.serve())
            await until(lambda: "the database does not answer" in " ".join(running.daemon.not_ready()))
        await until(lambda: not running.daemon.not_ready())
        running.daemon.stop()
        await task


async def test_it_can_be_stopped_while_it_waits_for_the_database(
    fragile: Fragile, fragile_database: str
) -> None:
    """Nothing has begun, so nothing is waited for."""
    async with centre(accounts=1) as simulator, fragile.away():
        running = InProcess(settings_for(simulator, fragile_database))
        task = asyncio.get_running_loop().create_task(running.daemon.serve())
        await until(lambda: "the database does not answer" in " ".join(running.daemon.not_ready()))
        running.daemon.stop()
        async with asyncio.timeout(5):
            await task


async def test_it_can_be_stopped_while_the_database_says_nothing() -> None:
    """Something takes the connection and never answers: a start waits for it, and a stop does not."""
    connected = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        while await reader.read(1024):
            pass
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, centre(accounts=1) as simulator:
        running = InProcess(settings_for(simulator, f"postgresql://somebody@127.0.0.1:{port}/listener"))
        task = asyncio.get_running_loop().create_task(running.daemon.serve())
        async with asyncio.timeout(5):
            await connected.wait()
        running.daemon.stop()
        async with asyncio.timeout(3):
            await task


async def test_ready_names_the_database_and_the_accounts_that_are_not_up(
    fragile: Fragile, fragile_database: str
) -> None:
    """A reason for each thing that is not as it should be, and none when all is well again."""
    async with centre(accounts=30, rate=2000.0) as simulator:
        async with InProcess(settings_for(simulator, fragile_database)).running() as listener:
            async with fragile.away():
                await simulator.play(notifications=50)
                await until(lambda: "the database does not answer" in listener.daemon.not_ready())
                assert (await listener.get("/-/healthy"))[0] == 200
            await until(listener.ready)
            await simulator.gws._stop_listening()
            await until(lambda: listener.daemon.not_ready()[-1:] == ["and 10 accounts more"])
            reasons = await listener.reasons()
            assert len(reasons) == 21
            assert all("disconnected" in reason for reason in reasons[:-1])
            await simulator.gws._listen()
            await until(listener.ready)
        assert listener.daemon.not_ready() == ["stopping"]
        (await compare(fragile_database, simulator.truth())).check()


@pytest.mark.parametrize("ack", [True, False])
async def test_an_outage_of_the_database_costs_nothing_but_time(
    fragile: Fragile, fragile_database: str, ack: bool
) -> None:
    """PostgreSQL is away for longer than the server keeps a silent session, and more is said than memory may
    hold. A session that acknowledges keeps itself alive; what one without has heard goes to the spool, and
    is committed afterwards: nothing is missing, there is no gap, and the spool is empty."""
    limits = {"backlog_bytes_max": 2**16, "batch_max": 50}
    async with centre(accounts=12, max_interval_ms=1500, rate=1500.0, ack=ack) as simulator:
        settings = settings_for(simulator, fragile_database, limits=limits)
        async with InProcess(settings).running() as listener:
            before = sessions(simulator)
            async with fragile.away():
                await simulator.play(seconds=3)
                spooled = await listener.metric("listener_spool_notifications")
            await until(listener.ready)
            await simulator.finish()
            await simulator.drained()
            assert differ(simulator, before, 0)
            await until(partial(empty, listener))
            drained = await listener.metric("listener_spool_drained_total")
        truth = simulator.truth()
    report = (await compare(fragile_database, truth, acknowledged=ack)).check()
    assert report.missing == 0
    assert drained >= spooled > (0 if ack else 1000)
    assert list(settings.spool_directory().glob("*.spool")) == []


@pytest.mark.parametrize("ack", [True, False])
async def test_an_outage_of_the_database_costs_a_session_that_acknowledges_nothing_but_time(
    fragile: Fragile, fragile_database: str, ack: bool
) -> None:
    """PostgreSQL is away for longer than the server keeps a silent session, and the spool cannot be written.
    One that acknowledges keeps itself alive: nothing is missing, and there is no gap. Without
    acknowledgements the backlog fills up to its bound, the session waits and is lost, and what that cost
    lies in a gap."""
    limits = {"backlog_bytes_max": 2**16, "batch_max": 50}
    async with centre(accounts=12, max_interval_ms=1500, rate=1500.0, ack=ack) as simulator:
        settings = settings_for(simulator, fragile_database, limits=limits)
        store = Store(dsn=settings.store.dsn, spool_dir=Path("/dev/null/spool"))
        settings = settings.model_copy(update={"store": store})
        async with InProcess(settings).running() as listener:
            before = sessions(simulator)
            async with fragile.away():
                await simulator.play(seconds=3)
                if not ack:
                    await until(partial(troubled, listener.daemon, "The spool in /dev/null/spool cannot"))
                backlog = await listener.metric("listener_backlog_bytes")
                assert "the database does not answer" in listener.daemon.not_ready()
            await until(partial(differ, simulator, before, 0 if ack else 12))
            await simulator.subscribed()
            await until(listener.ready)
            await simulator.finish()
            await simulator.drained()
            assert differ(simulator, before, 0 if ack else 12)
            assert await listener.metric("listener_commit_failures_total") > 0
        truth = simulator.truth()
    report = (await compare(fragile_database, truth, acknowledged=ack)).check()
    assert (report.missing == 0) is ack
    connection = await asyncpg.connect(fragile_database)
    try:
        told = {login: await causes(connection, login) for login in truth.accounts}
    finally:
        await connection.close()
    if ack:
        assert set(map(tuple, told.values())) == {("not started", "", "stopped")}
    else:
        assert backlog >= 2**16
        assert any("session lost" in each for each in told.values())


# ── Stopping ──────────────────────────────────────────────────────────────────────────────────────────


KEPT = "SELECT count(*) FROM bayeux_session"


async def test_a_stop_with_a_goodbye_stores_what_was_heard_and_ends_the_sessions(
    database: str, sql: asyncpg.Connection
) -> None:
    """In the middle of the traffic: nothing that the server let go of is missing, no session stays, and
    nothing is kept that could resume one."""
    async with centre() as simulator:
        async with InProcess(settings_for(simulator, database), goodbye=True).running() as listener:
            await until_kept(sql, 4)
            playing = asyncio.get_running_loop().create_task(simulator.play(notifications=400))
            await until(lambda: simulator.truth().sent > 200)
            assert await listener.stop() < 5
            assert simulator.listening() == 0
            assert await sql.fetchval(KEPT) == 0
            await playing
        await simulator.finish()
        async with InProcess(settings_for(simulator, database)).running():
            await simulator.drained()
        report = (await compare(database, simulator.truth())).check()
    assert report.missing > 0


async def test_no_goodbye_is_said_while_something_is_not_stored(
    fragile: Fragile, fragile_database: str
) -> None:
    """The database is away at the stop: what was heard is the server's still, and comes again at the next
    start, without a gap."""
    async with centre() as simulator:
        settings = settings_for(simulator, fragile_database, limits={"stop_s": 1.0})
        async with InProcess(settings, goodbye=True).running() as listener:
            sql = await asyncpg.connect(fragile_database)
            try:
                await until_kept(sql, 4)
            finally:
                await sql.close()
            before = sessions(simulator)
            async with fragile.away():
                await simulator.play(notifications=100)
                await until(lambda: listener.backlog > 0)
                await listener.stop()
        stayed = sessions(simulator)
        assert any(stayed.values())
        assert all(stayed[login] <= before[login] for login in before)
        async with InProcess(settings).running():
            await simulator.finish()
            await simulator.drained()
        (await compare(fragile_database, simulator.truth())).check()
        assert all(sessions(simulator)[login] >= stayed[login] for login in stayed)


async def test_a_stop_keeps_its_bound_when_the_database_hangs(
    fragile: Fragile, fragile_database: str
) -> None:
    """What could not be stored was not acknowledged, and is in a gap at the next start."""
    async with centre() as simulator:
        settings = settings_for(simulator, fragile_database, limits={"stop_s": 1.0})
        async with InProcess(settings).running() as listener:
            await simulator.play(notifications=50)
            await simulator.drained()
            async with fragile.hanging(fragile_database):
                await simulator.play(notifications=50)
                await until(lambda: listener.backlog > 0)
                assert await listener.stop() < 1.0 + 2.0 + 1.0
        async with InProcess(settings).running():
            await simulator.finish()
            await simulator.drained()
        (await compare(fragile_database, simulator.truth())).check()


async def test_a_stop_keeps_its_bound_when_nothing_answers_at_all() -> None:
    """The network to the database is gone without a word, and so is the contact centre: the worst case."""
    server = Embedded(short_place(), port=free_port(), settings=THROWAWAY)
    await asyncio.to_thread(server.start)
    try:
        await migrate.upgrade(server.dsn)
        async with TcpProxy(server.port or 0) as proxy, centre(accounts=2) as simulator:
            dsn = server.tcp_dsn.replace(f":{server.port}/", f":{proxy.port}/")
            settings = settings_for(simulator, dsn, limits={"stop_s": 1.0})
            async with InProcess(settings).running() as listener:
                for login in simulator.accounts:
                    simulator.faults.arm("half_open", account=login, on="any", times=100)
                proxy.stall(new=True)
                assert await listener.stop() < 1.0 + 2.0 + 1.0
    finally:
        await asyncio.to_thread(server.destroy)


async def test_a_stop_during_a_reload_that_hangs_is_prompt(fragile: Fragile, fragile_database: str) -> None:
    """A reload waits for the database, and a stop does not wait for the reload."""
    async with centre(accounts=2) as simulator:
        one, _ = simulator.accounts
        settings = settings_for(simulator, fragile_database, limits={"stop_s": 1.0})
        async with InProcess(settings).running() as listener:
            asked = asyncio.Event()
            loop = asyncio.get_running_loop()

            def fewer() -> Settings:
                loop.call_soon_threadsafe(asked.set)
                return settings_for(simulator, fragile_database, [one], limits={"stop_s": 1.0})

            async with fragile.hanging(fragile_database):
                listener.reread = fewer
                listener.daemon.reload()
                async with asyncio.timeout(5):
                    await asked.wait()
                assert await listener.stop() < 1.0 + 2.0 + 1.0


async def test_a_second_stop_does_not_wait(fragile: Fragile, fragile_database: str) -> None:
    """Whoever asks twice wants it now: the process exits with 1."""
    async with centre(accounts=1) as simulator:
        settings = settings_for(simulator, fragile_database, limits={"stop_s": 60.0})
        async with InProcess(settings).running() as listener, fragile.hanging(fragile_database):
            await simulator.play(notifications=20)
            await until(lambda: listener.backlog > 0)
            listener.daemon.stop()
            with pytest.raises(SystemExit) as stopped:
                listener.daemon.stop()
            assert stopped.value.code == 1


async def test_the_bundled_server_runs_as_long_as_the_daemon() -> None:
    """With no DSN the daemon starts PostgreSQL in its data directory, makes the tables, and stops it."""
    place = short_place()
    async with centre(accounts=1) as simulator:
        settings = settings_for(simulator, "postgresql://nowhere/").model_copy(
            update={"store": Store(data_dir=place)}
        )
        try:
            async with InProcess(settings).running():
                await simulator.play(notifications=30)
                await simulator.finish()
                await simulator.drained()
            with pytest.raises(OSError, match=r".*"):
                await asyncpg.connect(Embedded(place).dsn, timeout=2)
            server = Embedded(place)
            await asyncio.to_thread(server.start)
            try:
                (await compare(server.dsn, simulator.truth())).check()
            finally:
                await asyncio.to_thread(server.stop)
        finally:
            server = Embedded(place)
            await asyncio.to_thread(server.start)
            await asyncio.to_thread(server.destroy)


async def test_the_bundled_server_is_started_again_when_it_has_died() -> None:
    """Somebody, or the kernel for want of memory, kills PostgreSQL: what is heard meanwhile waits, and is
    stored by the next server, which nobody had to start."""
    place = short_place()
    async with centre(accounts=1) as simulator:
        settings = settings_for(simulator, "postgresql://nowhere/").model_copy(
            update={"store": Store(data_dir=place)}
        )
        server = Embedded(place)
        try:
            async with InProcess(settings).running():
                await asyncio.to_thread(server.start)
                pid_file = server.directory / "data" / "postmaster.pid"
                died = int(pid_file.read_text().split()[0])
                os.kill(died, signal.SIGKILL)
                await simulator.play(notifications=30)
                await simulator.finish()
                await simulator.drained()
                assert int(pid_file.read_text().split()[0]) != died
                (await compare(server.dsn, simulator.truth())).check()
        finally:
            await asyncio.to_thread(server.destroy)


# ── What an earlier run left ──────────────────────────────────────────────────────────────────────────


async def test_what_an_earlier_run_left_in_the_spool_is_stored_before_its_sessions_begin(
    database: str, sql: asyncpg.Connection
) -> None:
    """A run that died in an outage left messages on disk: the next start stores them first."""
    async with centre(accounts=1) as simulator:
        settings = settings_for(simulator, database)
        async with InProcess(settings).running():
            pass
        said = Said(await sql.fetchval("SELECT id FROM account"), str(uuid4()))
        spool = Spool.open(settings.spool_directory())
        for _ in range(20):
            spool.append([said.next(3)])
        spool.close()
        async with InProcess(settings).running() as listener:
            stored = await sql.fetch(
                "SELECT position, raw FROM notification WHERE stream_id = $1 ORDER BY id", said.stream
            )
            assert await listener.metric("listener_spool_drained_total") == 60
            assert await listener.metric("listener_spool_notifications") == 0
        last = await sql.fetchval("SELECT stream_id FROM notification ORDER BY id DESC LIMIT 1")
    assert [tuple(row) for row in stored] == [(one.position, one.raw) for one in said.said]
    assert str(last) != said.stream
    assert list(settings.spool_directory().glob("*.spool")) == []


async def lasting(sql: asyncpg.Connection, name: str) -> list[asyncpg.Record]:
    """An account's coverage in order, without what lasted no time; it has no hole."""
    rows = await sql.fetch(
        "SELECT since, until, cause FROM coverage c JOIN account a ON a.id = c.account_id"
        " WHERE a.name = $1 ORDER BY since, c.id",
        name,
    )
    assert all(row["until"] == following["since"] for row, following in pairwise(rows))
    return [row for row in rows if row["since"] != row["until"]]


def damage(settings: Settings, words: bytes, *, behind: float = 0.0) -> None:
    """Changes a bit of a message in the spool: where these words come, behind that share of the file."""
    (path,) = settings.spool_directory().glob("*.spool")
    content = path.read_bytes()
    change_a_bit(path, content.index(words, int(behind * len(content))) + 5)


async def test_what_is_damaged_in_the_spool_of_an_earlier_run_is_a_gap_although_its_session_goes_on(
    database: str, sql: asyncpg.Connection
) -> None:
    """The server kept everything since, so that the gap of the restart is none: but what is lost stays a gap
    of its account, which is told, counted and as long as can be known, and a list of its live calls is stored
    as after every gap; of the others there is none."""
    async with centre(accounts=2) as simulator:
        settings = settings_for(simulator, database)
        async with InProcess(settings).running():
            await until_kept(sql, 2)
        name, other = simulator.accounts
        number = await sql.fetchval("SELECT id FROM account WHERE name = $1", name)
        stopped_at = (await lasting(sql, name))[-1]["since"]
        said = Said(number, str(uuid4()))
        spool = Spool.open(settings.spool_directory())
        for turn in range(1, 4):
            said.at = stopped_at + timedelta(milliseconds=turn)
            spool.append([said.next(2)])
        spool.close()
        damage(settings, said.said[2].raw)
        async with InProcess(settings).running() as listener:
            assert await listener.metric("listener_handshakes_total") == 0
            assert await listener.metric("listener_gap_seconds_total", cause="spool damaged") > 0
            assert await listener.metric("listener_spool_set_aside_total") == 1
            rows = await lasting(sql, name)
            assert [row["cause"] for row in rows[-4:]] == ["", "", "spool damaged", ""]
            assert await sql.fetchval(OPEN) == 0, "what the list of live calls does not name has ended"
            gap = rows[-2]
            assert gap["since"] == said.said[1].received_at > stopped_at
            assert gap["until"] == said.said[3].received_at + timedelta(microseconds=1)
        assert (await causes(sql, other)) == ["not started", "", "stopped"]
    stored = await sql.fetch(
        "SELECT position FROM notification WHERE stream_id = $1 ORDER BY id", said.stream
    )
    assert [row[0] for row in stored] == [1, 2, 5, 6]


async def test_what_is_damaged_in_the_spool_while_it_runs_is_a_gap(
    fragile: Fragile, fragile_database: str
) -> None:
    """PostgreSQL is away, and a bit of what waits for it on disk changes meanwhile: the account was observed
    before and after that delivery, and not while it came. Calls whose end is lost with it have ended."""
    async with centre(accounts=1, ack=False, max_interval_ms=20_000) as simulator:
        settings = settings_for(simulator, fragile_database)
        (name,) = simulator.accounts
        async with InProcess(settings).running() as listener:
            async with fragile.away():
                await simulator.play(notifications=200)
                await simulator.finish()
                await simulator.drained()

                async def spooled() -> bool:
                    return await listener.metric("listener_spool_notifications") >= 200

                await until(spooled)
                damage(settings, b"Released", behind=0.5)
            await until(partial(empty, listener))
            await until(lambda: not listener.daemon.not_ready())
            connection = await asyncpg.connect(fragile_database)
            try:
                await until(partial(fetched, connection, f"SELECT ({OPEN}) = 0"))
                rows = await lasting(connection, name)
            finally:
                await connection.close()
            assert [row["cause"] for row in rows] == ["not started", "", "spool damaged", ""]
            assert rows[2]["until"] - rows[2]["since"] < timedelta(seconds=10)
