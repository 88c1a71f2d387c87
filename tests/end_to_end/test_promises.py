"""What a user sees of each fault, and that all is heard again afterwards: the rows of docs/promises.md.

One account is struck and another one is not. The struck account reaches the simulated contact centre through
a gateway and a network that can be told to fail. While the fault lasts it must be named: in the log, by
`/-/ready`, by the state of the session. Once it is over, the rows of the coverage and the metrics must say
what was lost, which is nothing or a gap, everything that was said to the account must be stored or lie in
that gap, and the other account must have noticed nothing.
"""

import inspect
import socket
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import structlog
from aiohttp import web
from pydantic import SecretStr

from listener.settings import Account, Environment, Limits, Operations, Settings, Store
from listener.simulator.centre import Simulator
from listener.simulator.faults import Fault
from listener.simulator.settings import SimulatorSettings
from tests.peers.proxy import TcpProxy
from tests.support.gateway import HOST, LOGIN, Certificates, Gateway, on
from tests.support.running import InProcess, until
from tests.support.truth import compare

DELIVERY_BYTES_MAX = 2**20
CALLS = "/v2/me/calls"
CONNECT = "/meta/connect"
HANDSHAKE = "/meta/handshake"
NOTIFICATIONS = "/api/v2/notifications"
ALWAYS = 1_000_000
"""A fault that strikes so often lasts until it is cleared."""
SHORT = {"max_interval_ms": 1_500}
"""Where the listener gives a session up that the server still has: how long it keeps what waits there."""
CENTRE = SimulatorSettings(
    accounts=2,
    rate=200.0,
    # Short, so that a connection that is dead is found soon; the listener adds five seconds of its own.
    timeout_ms=500,
    max_interval_ms=9_000,
)


@dataclass
class Stage:
    """A listener with two accounts, and everything between the struck one and its server."""

    simulator: Simulator
    gateway: Gateway
    proxy: TcpProxy
    listener: InProcess
    logged: list[MutableMapping[str, Any]]
    sql: asyncpg.Connection
    certificates: Certificates | None = None
    struck: str = field(init=False)
    other: str = field(init=False)

    def __post_init__(self) -> None:
        self.struck, self.other = self.simulator.accounts

    @property
    def reason(self) -> str:
        """What `/-/ready` would say of the struck account; empty when nothing."""
        told = [reason for reason in self.listener.daemon.not_ready() if reason.startswith(self.struck)]
        return told[0].removeprefix(f"{self.struck}: ") if told else ""

    def lines(self, event: str, **fields: Any) -> list[MutableMapping[str, Any]]:
        """What was logged under this event with these fields about the struck account."""
        wanted = {"event": event, "account": self.struck} | fields
        return [line for line in self.logged if wanted.items() <= line.items()]

    @property
    def gaps_told(self) -> set[str]:
        """The causes that the log names for the struck account."""
        return {line["cause"] for line in self.lines("gap") + self.lines("gap goes on")}

    async def rows(self, account: str) -> list[asyncpg.Record]:
        """The coverage of an account, in order, once for each stretch that lasted any time."""
        rows = await self.sql.fetch(
            "SELECT c.since, c.until, c.cause FROM coverage c JOIN account a ON a.id = c.account_id"
            " WHERE a.name = $1 ORDER BY c.since, c.id",
            account,
        )
        for before, after in pairwise(rows):
            assert before["until"] == after["since"], (dict(before), dict(after))
        return [row for row in rows if row["since"] != row["until"]]

    async def causes(self, account: str) -> list[str]:
        """The causes of these stretches, each once in a row; "" is observed."""
        return [cause for cause, _ in groupby(row["cause"] for row in await self.rows(account))]

    def fails(self, fault: Fault, exchange: str = "connect", **details: Any) -> None:
        """Lets every such exchange of the struck account fail until `heal`."""
        self.simulator.faults.arm(fault, account=self.struck, on=exchange, times=ALWAYS, **details)

    def forget(self) -> None:
        """Lets the server forget the session of the struck account."""
        self.simulator.gws.forget(self.struck)

    def keep_out(self) -> None:
        """Lets no new session begin, so that the loss of one can be looked at."""
        self.fails(Fault.HTML_503, "handshake")

    async def reload(self) -> None:
        """Reads the settings again, as SIGHUP does; returns when it has been done."""
        before = len(self.logged)
        self.listener.daemon.reload()
        await until(lambda: any(line["event"] == "reloaded" for line in self.logged[before:]))

    def heal(self) -> None:
        """Ends what the server and the gateway do."""
        self.simulator.faults.clear()
        self.gateway.says = None


@asynccontextmanager
async def stage(
    dsn: str,
    sql: asyncpg.Connection,
    *,
    centre: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    url: Callable[[TcpProxy], str] | None = None,
    certificates: Certificates | None = None,
    days: int = 2,
    up: bool = True,
    **options: Any,
) -> AsyncIterator[Stage]:
    """Listens to two accounts, the first of which goes through a proxy and a gateway."""
    async with AsyncExitStack() as stack:
        settings = {name: getattr(CENTRE, name) for name in CENTRE.__slots__} | (centre or {})
        simulator = await stack.enter_async_context(Simulator(SimulatorSettings(**settings)))
        tls = certificates.server(days) if certificates else None
        gateway = await stack.enter_async_context(Gateway(simulator.url, tls))
        proxy = await stack.enter_async_context(TcpProxy(gateway.port))
        far = url(proxy) if url else gateway.url.replace(str(gateway.port), str(proxy.port))
        if certificates:
            environment = {"ca_file": certificates.authority} | (environment or {})
        environments = {
            "far": Environment(base_url=far, **(environment or {})),
            "near": Environment(base_url=simulator.url),
        }
        accounts = tuple(
            Account(environment=where, login=login, name=login, password=SecretStr("simulated"))
            for where, login in zip(environments, simulator.accounts, strict=True)
        )
        running = InProcess(
            Settings(
                store=Store(dsn=SecretStr(dsn)),
                environments=environments,
                accounts=accounts,
                operations=Operations(port=0),
                limits=Limits(delivery_bytes_max=DELIVERY_BYTES_MAX),
            ),
            **options,
        )
        logged = stack.enter_context(structlog.testing.capture_logs())
        listener = await stack.enter_async_context(running.running(up=up))
        yield Stage(simulator, gateway, proxy, listener, logged, sql, certificates)


async def all_is_heard_again(now: Stage) -> None:
    """The daemon is ready, and what is said from now on is heard, by both accounts."""
    await until(now.listener.ready)
    await now.simulator.play(notifications=60)
    await now.simulator.finish()
    await now.simulator.drained()
    await until(lambda: now.listener.backlog == 0)
    assert await now.listener.reasons() == []
    assert await now.listener.metric("listener_sessions", state="up") == 2


async def nothing_else_was_lost(dsn: str, now: Stage) -> None:
    """What was sent is stored once or lies in a gap, and the other account was always observed."""
    (await compare(dsn, now.simulator.truth())).check()
    assert await now.causes(now.other) == ["not started", "", "stopped"]


Act = Callable[[Stage], object]
Acts = Act | tuple[Act, ...]


@dataclass(frozen=True)
class Sign:
    """A fault that lasts until it is healed, and what is seen of it."""

    strike: Acts
    says: str
    """What `/-/ready` and the log say of it."""
    heal: Acts = Stage.heal
    cause: str = "disconnected"
    """The cause that the log and `/-/ready` name."""
    lost: tuple[str, ...] = ()
    """The gaps that stay in the coverage."""
    state: str = "waiting"
    """The state of the session meanwhile."""
    handshakes: int = 0
    """New sessions that it costs."""
    centre: dict[str, Any] = field(default_factory=dict)


def advised(stage: Stage, **advice: object) -> None:
    """Lets every connect be answered with a failure and this advice."""
    stage.gateway.says = on(CONNECT, "503::Simulated", **advice)


def sent_away(_path: str, _messages: object) -> web.Response:
    """A gateway that wants a person to log in somewhere else."""
    return web.Response(status=302, headers={"Location": "https://login.invalid/"})


def locked_out(stage: Stage) -> None:
    """The password was changed, and the session has come to its end."""
    stage.simulator.accounts[stage.struck].refused = True


async def let_in(stage: Stage) -> None:
    """The account is mended, and whoever did it reloads."""
    stage.simulator.accounts[stage.struck].refused = False
    await stage.reload()


def deny(stage: Stage) -> None:
    """The server has forgotten the session, and the account may not subscribe to calls any more."""
    stage.gateway.says = on("/meta/subscribe", "403:/v2/me/calls:denied")
    stage.forget()


async def healed_and_reloaded(stage: Stage) -> None:
    """The server is well again, and whoever mended it reloads."""
    stage.heal()
    await stage.reload()


SIGNS: dict[str, Sign] = {
    "402": Sign(
        (Stage.keep_out, Stage.forget),
        "402",
        cause="session lost",
        lost=("session lost",),
        handshakes=1,
    ),
    "403": Sign(lambda now: now.fails(Fault.HTTP_STATUS, status=403), "HTTP 403"),
    "503": Sign(lambda now: now.fails(Fault.HTML_503), "HTTP 503"),
    "advice none": Sign(
        lambda now: advised(now, reconnect="none"),
        "503::Simulated",
        healed_and_reloaded,
        cause="session lost",
        lost=("session lost",),
        state="refused",
        handshakes=1,
        centre=SHORT,
    ),
    "advice handshake": Sign(
        (Stage.keep_out, lambda now: advised(now, reconnect="handshake")),
        "503::Simulated",
        cause="session lost",
        lost=("session lost",),
        handshakes=1,
        centre=SHORT,
    ),
    "advice retry with an interval": Sign(
        lambda now: advised(now, reconnect="retry", interval=300), "503::Simulated"
    ),
    "refused subscription": Sign(
        deny,
        "403:/v2/me/calls:denied",
        healed_and_reloaded,
        cause="subscription refused",
        lost=("subscription refused",),
        state="refused",
        handshakes=2,
    ),
    "password changed": Sign(
        locked_out,
        "refused the login",
        let_in,
        cause="login refused",
        lost=("login refused",),
        state="refused",
        handshakes=1,
    ),
    "redirect": Sign(
        lambda now: setattr(now.gateway, "says", sent_away), "redirects are not followed, set base_url"
    ),
    "malformed": Sign(
        (Stage.keep_out, lambda now: now.fails(Fault.TRUNCATED_JSON)),
        "JSON",
        cause="malformed",
        lost=("malformed",),
        handshakes=1,
        centre=SHORT,
    ),
    "oversized": Sign(
        (Stage.keep_out, lambda now: now.simulator.gws.oversize(now.struck, 2 * DELIVERY_BYTES_MAX)),
        "more than 1048576",
        cause="oversized",
        lost=("oversized",),
        handshakes=1,
        centre=SHORT,
    ),
    "dropped": Sign(lambda now: now.proxy.refuse(), "disconnect", lambda now: now.proxy.resume()),
    "half-open": Sign(
        lambda now: now.proxy.stall(new=True), "no answer to /meta/connect", lambda now: now.proxy.resume()
    ),
    "server restart": Sign(
        (
            Stage.keep_out,
            lambda now: now.simulator.gws.forget(now.struck, answer=False),
            lambda now: now.proxy.cut(),
        ),
        "402",
        cause="session lost",
        lost=("session lost",),
        handshakes=1,
    ),
}


async def do(acts: Acts, now: Stage) -> None:
    """Does them one after the other, and waits for those that take their time."""
    for act in acts if isinstance(acts, tuple) else (acts,):
        done = act(now)
        if inspect.isawaitable(done):
            await done


@pytest.mark.parametrize("fault", SIGNS)
async def test_a_fault_is_named_while_it_lasts_and_heard_through(
    database: str, sql: asyncpg.Connection, fault: str
) -> None:
    """In the log, by `/-/ready` and by the session's state; afterwards the coverage says what was lost."""
    sign = SIGNS[fault]
    async with stage(database, sql, centre=sign.centre) as now:
        await now.simulator.play(notifications=40)
        handshakes = await now.listener.metric("listener_handshakes_total")
        await do(sign.strike, now)
        await until(lambda: sign.says in now.reason and sign.cause in now.gaps_told)
        await now.simulator.play(notifications=20)
        told = [line for line in now.logged if sign.says in str(line)]
        assert {line["account"] for line in told} == {now.struck}
        assert len(now.lines("gap")) == 1
        status, _ = await now.listener.get("/-/ready")
        assert (status, (await now.listener.get("/-/healthy"))[0]) == (503, 200)
        assert await now.listener.metric("listener_sessions", state=sign.state) == 1
        assert await now.listener.metric("listener_sessions", state="up") == 1
        await do(sign.heal, now)
        await all_is_heard_again(now)
        assert await now.listener.metric("listener_handshakes_total") - handshakes == sign.handshakes
        for cause in sign.lost:
            assert await now.listener.metric("listener_gap_seconds_total", cause=cause) > 0
    gaps = [cause for cause in await now.causes(now.struck) if cause]
    assert [cause for cause in gaps[1:-1] if cause != "stopped"] == list(sign.lost)
    await nothing_else_was_lost(database, now)


# ── Who lets us in ────────────────────────────────────────────────────────────────────────────────────


async def test_an_expired_cookie_is_a_login_and_no_loss(database: str, sql: asyncpg.Connection) -> None:
    """The gateway knows our cookie no more: 403 to CometD, one login, and the same session goes on."""
    async with stage(database, sql) as now:
        now.gateway.wants_cookie = True
        await now.reload()
        await now.simulator.play(notifications=40)
        await until(lambda: not now.reason)
        for expiry in (1, 2):
            logins = now.gateway.asked[LOGIN]
            now.gateway.expire()
            await until(lambda expiry=expiry: len(now.lines("gap closed")) >= expiry)
            await all_is_heard_again(now)
            assert now.gateway.asked[LOGIN] == logins + 1
            assert "HTTP 403" in now.lines("gap")[-1]["detail"]
        assert await now.listener.metric("listener_handshakes_total") == 2
        assert await now.listener.metric("listener_reconnects_total") == 2
    assert await now.causes(now.struck) == ["not started", "", "stopped"]
    await nothing_else_was_lost(database, now)


async def test_an_expired_csrf_token_is_fetched_again(database: str, sql: asyncpg.Connection) -> None:
    """Where CometD's own requests need it too: 403, a login that brings the new one, and no loss."""
    async with stage(database, sql, centre={"csrf": True, "csrf_on_notifications": True}) as now:
        await now.simulator.play(notifications=40)
        logins = now.gateway.asked[LOGIN]
        now.simulator.gws.expire_csrf()
        await until(lambda: bool(now.lines("gap closed")))
        await all_is_heard_again(now)
        (gap,) = now.lines("gap")
        assert (gap["cause"], "HTTP 403" in gap["detail"]) == ("disconnected", True)
        assert now.gateway.asked[LOGIN] == logins + 1
        assert await now.listener.metric("listener_handshakes_total") == 2
    for account in now.simulator.accounts:
        assert await now.causes(account) == ["not started", "", "stopped"]
    (await compare(database, now.simulator.truth())).check()


async def test_a_wrong_password_is_loud_and_locks_no_account(database: str, sql: asyncpg.Connection) -> None:
    """One attempt, and none that follows soon: GWS locks accounts; the log and `/-/ready` say what to do."""
    async with stage(database, sql, up=False) as now:
        now.simulator.accounts[now.struck].refused = True
        now.simulator.gws.forget()
        await now.reload()
        await until(lambda: "login refused" in now.reason)
        logins = now.gateway.asked[LOGIN]
        await until(lambda: now.simulator.listening() == 1)
        await now.simulator.play(seconds=1.5)
        assert now.gateway.asked[LOGIN] == logins <= 2
        assert "check the account's login and password" in now.reason
        assert "simulated" not in str(now.logged)
        assert await now.listener.metric("listener_sessions", state="refused") == 1
        await let_in(now)
        await all_is_heard_again(now)
    assert "login refused" in await now.causes(now.struck)
    (await compare(database, now.simulator.truth())).check()


# ── How it is reached ─────────────────────────────────────────────────────────────────────────────────


async def test_a_certificate_that_expired_is_named_and_its_renewal_is_heard(
    database: str, sql: asyncpg.Connection, tmp_path: Path
) -> None:
    """The authority is trusted, its certificate is out of date: nothing is said to that server. With the new
    certificate it is heard without a reload; one that expires later costs a session nothing but time."""
    certificates = Certificates(tmp_path)
    async with stage(database, sql, certificates=certificates, days=0, up=False) as now:
        await until(lambda: "certificate has expired" in now.reason)
        assert now.reason.startswith("disconnected: ")
        assert now.gaps_told == {"disconnected"}
        assert now.gateway.asked.total() == 0
        assert await now.listener.metric("listener_sessions", state="waiting") == 1
        await now.gateway.renew(certificates.server())
        await all_is_heard_again(now)
        await now.gateway.renew(certificates.server(days=0))
        asked = now.gateway.asked.total()
        await until(lambda: "certificate has expired" in now.reason)
        await now.simulator.play(notifications=20)
        assert await now.listener.metric("listener_sessions", state="waiting") == 1
        assert now.gateway.asked.total() == asked
        await now.gateway.renew(certificates.server())
        await all_is_heard_again(now)
        assert await now.listener.metric("listener_handshakes_total") == 2
    assert await now.causes(now.struck) == ["not started", "disconnected", "", "stopped"]
    await nothing_else_was_lost(database, now)


class Names:
    """A name server for one name, which may stop knowing it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.known = True
        self._others = socket.getaddrinfo

    def getaddrinfo(self, host: Any, *given: Any, **named: Any) -> Any:
        """As `socket.getaddrinfo`."""
        if host == self.name:
            if not self.known:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            host = HOST
        return self._others(host, *given, **named)


async def test_a_name_that_does_not_resolve_is_named(
    database: str, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name server does not know the contact centre at first, and forgets it later: each time it is heard
    as soon as its name is known, and the second time nothing is lost."""
    names = Names("gws.invalid")
    names.known = False
    monkeypatch.setattr(socket, "getaddrinfo", names.getaddrinfo)
    url = f"http://{names.name}"
    async with stage(database, sql, url=lambda proxy: f"{url}:{proxy.port}", up=False) as now:
        await until(lambda: "Name or service not known" in now.reason)
        assert now.reason.startswith(f"disconnected: login: {url}")
        assert now.gaps_told == {"disconnected"}
        names.known = True
        await all_is_heard_again(now)
        names.known = False
        now.proxy.cut()
        await until(lambda: len(now.lines("gap")) == 2)
        await now.simulator.play(notifications=20)
        assert await now.listener.metric("listener_sessions", state="waiting") == 1
        names.known = True
        await all_is_heard_again(now)
        assert await now.listener.metric("listener_handshakes_total") == 2
    assert await now.causes(now.struck) == ["not started", "disconnected", "", "stopped"]
    await nothing_else_was_lost(database, now)


async def test_a_gateway_that_refuses_websockets_is_heard_by_long_polling(
    database: str, sql: asyncpg.Connection
) -> None:
    """Said once, in the log; it is no gap after the start, and no reason not to be ready."""
    async with stage(database, sql, environment={"websocket": True}, up=False) as now:
        now.gateway.websockets = False
        await all_is_heard_again(now)
        (line,) = [line for line in now.logged if line["event"].startswith("websockets are refused")]
        assert "refused 3 upgrades" in line["reason"]
    assert (await now.causes(now.struck))[-2:] == ["", "stopped"]
    await nothing_else_was_lost(database, now)


# ── The clock ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("jumps_h", [(-1,), (1,), (1, -2)], ids=["back", "forward", "forward and back"])
async def test_a_clock_that_jumps_leaves_no_hole_and_no_negative_time(
    database: str, sql: asyncpg.Connection, jumps_h: tuple[int, ...]
) -> None:
    """Somebody sets this machine's clock by an hour, in the middle of calls and of gaps: the rows still stand
    end to end, every duration is 0 or more, and all is heard."""
    off = timedelta()

    def wall() -> datetime:
        return datetime.now(UTC) + off  # noqa: TID251 - the clock that is set wrong

    async with stage(database, sql, wall=wall) as now:
        for jump in jumps_h:
            await now.simulator.play(notifications=60)
            off += timedelta(hours=jump)
            await now.simulator.play(notifications=60)
            now.forget()
            await until(lambda: bool(now.lines("gap", cause="session lost")))
            await all_is_heard_again(now)
            now.logged.clear()
        text = (await now.listener.get("/metrics"))[1]
        assert not [line for line in text.splitlines() if line.rpartition(" ")[2].startswith("-")]
    for account in now.simulator.accounts:
        rows = await now.rows(account)
        assert all(row["since"] < row["until"] for row in rows[:-1])
        assert (rows[-1]["cause"], rows[-1]["until"]) == ("stopped", None)
    durations = "ring_s, talk_s, hold_s, coalesce(wrap_s, 0), coalesce(server_duration_s, 0)"
    assert await sql.fetchval("SELECT count(*) FROM call") > 0
    assert await sql.fetchval(f"SELECT min(least({durations})) FROM call") >= 0  # noqa: S608 - our words
