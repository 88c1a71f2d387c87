"""The contact centre: plays scripted calls over all accounts at a rate, and knows what it sent.

Which act comes next is decided in script time, from the seed alone: every line (an account has one or
more) has its own generator of randomness, and the line whose next act is due first goes first. *When* it
goes is decided by the rate: message number n is sent n / rate seconds after the first, and that is the
time it carries. So the order of the messages of each account, and with a fixed `epoch_s` their bytes, are
the same in every run, on a slow machine too; and the messages agree with what a listener measures.

The centre does not know whether anybody listens: see `Truth` for what can be said about that afterwards.
"""

import asyncio
import heapq
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from random import Random
from time import time  # noqa: TID251 - the default of a shell
from types import TracebackType
from typing import Any, Final, Self

from aiohttp import web

from listener.errors import SettingsError
from listener.simulator import scripts
from listener.simulator.click2dial import Click2DialServer
from listener.simulator.faults import Faults
from listener.simulator.gws import Account, GwsServer, json_response
from listener.simulator.noojee import NoojeeServer
from listener.simulator.party import ExchangeFaults
from listener.simulator.scripts import CallTruth, Message, ScriptedCall
from listener.simulator.settings import SimulatorSettings

TICK_MESSAGES_MAX: Final = 500
"""Messages that are made before the server gets its turn. A centre that cannot keep its rate falls behind
and says so (`behind_s`); it never blocks its own server."""
SINGLE_RATE_MAX: Final = 500.0
"""Notifications per second up to which each goes out in its own moment."""
TICK_S: Final = 0.01
"""Above that rate, what is due goes out every so often: a reply for each message would cost the machine
more than the messages."""
POLL_S: Final = 0.02
"""How often a waiting condition is looked at."""
STOP_POLL_S: Final = 0.2
"""How late a play may notice that it is to stop, at rates of a few messages a minute."""
BURST_POLL_S: Final = 0.002
"""The same while a burst is timed."""
IDLE_SCRIPT_S: Final = (1.0, 15.0)
"""Between two calls of a line, in script time."""


@dataclass(frozen=True, slots=True)
class AccountTruth:
    """What one account was sent. `digest` is the SHA-256 over the accepted messages, each followed by a
    newline, in order."""

    login: str
    dialect: str
    sent: int
    accepted: int
    """Entered the queue of at least one session: a listener must have them, see `undelivered`."""
    unsubscribed: int
    """Said while no session was subscribed: a listener cannot have them, and must show a gap."""
    undelivered: tuple[int, ...]
    """Positions (from 1, in all that was sent) of accepted messages that were never acknowledged before
    their session ended: a listener may have them or not."""
    digest: str
    messages: tuple[Message, ...] | None
    """All that was sent, in order; None when the settings say not to remember."""


@dataclass(frozen=True, slots=True)
class Truth:
    """What was sent, and what must be known of it."""

    accounts: Mapping[str, AccountTruth]
    calls: tuple[CallTruth, ...]
    """One per leg, the live ones last. A leg whose `accepted` is below its `notifications` was heard in
    part only."""

    @property
    def sent(self) -> int:
        """Messages in all."""
        return sum(account.sent for account in self.accounts.values())

    @property
    def accepted(self) -> int:
        """Messages that entered a queue."""
        return sum(account.accepted for account in self.accounts.values())

    @property
    def unsubscribed(self) -> int:
        """Messages that nobody was subscribed to."""
        return sum(account.unsubscribed for account in self.accounts.values())

    @property
    def undelivered(self) -> int:
        """Messages of sessions that ended before they were acknowledged."""
        return sum(len(account.undelivered) for account in self.accounts.values())

    def as_json(self, *, messages: bool = False) -> dict[str, Any]:
        """The same as a JSON object; with `messages` their text too, where it is remembered."""
        accounts = {}
        for login, account in self.accounts.items():
            accounts[login] = {
                "dialect": account.dialect,
                "sent": account.sent,
                "accepted": account.accepted,
                "unsubscribed": account.unsubscribed,
                "undelivered": list(account.undelivered),
                "digest": account.digest,
            }
            if messages and account.messages is not None:
                accounts[login]["messages"] = [
                    {
                        "position": m.position,
                        "accepted": m.accepted,
                        "channel": m.channel,
                        "raw": m.raw.decode(),
                    }
                    for m in account.messages
                ]
        return {
            "sent": self.sent,
            "accepted": self.accepted,
            "unsubscribed": self.unsubscribed,
            "undelivered": self.undelivered,
            "outcomes": dict(Counter(call.outcome or "live" for call in self.calls)),
            "accounts": accounts,
            "calls": [call.as_json() for call in self.calls],
        }


@dataclass(slots=True)
class _Line:
    """One line of one account: it has a call, or it is idle."""

    account: Account
    rng: Random
    call: ScriptedCall | None = None


@dataclass(frozen=True, slots=True)
class Burst:
    """Messages made ahead by `Simulator.prepare_burst`, per account, and the calls they belong to."""

    messages: Mapping[str, tuple[Message, ...]]
    calls: tuple[CallTruth, ...]

    @property
    def size(self) -> int:
        """Messages in all."""
        return sum(len(messages) for messages in self.messages.values())


class Simulator:
    """A contact centre on loopback. Use it as an async context manager.

    ::

        async with Simulator(SimulatorSettings(accounts=20, rate=50)) as simulator:
            …                                   # a listener connects to simulator.url
            await simulator.subscribed()
            await simulator.play(seconds=20)
            await simulator.finish()
            await simulator.drained()
            truth = simulator.truth()

    `clock` gives epoch seconds. `gws` is the server under it, `faults` what goes wrong in exchanges; `noojee`
    and `click2dial` are the PBXs beside it, where the settings ask for them.
    """

    def __init__(self, settings: SimulatorSettings, *, clock: Callable[[], float] = time) -> None:
        self.settings = settings
        self.gws = GwsServer(settings, clock=clock)
        self.noojee: NoojeeServer | None = None
        self.click2dial: Click2DialServer | None = None
        if settings.noojee:
            self.noojee = NoojeeServer(
                api_key=settings.noojee_key,
                time_scale=settings.dial_time_scale,
                seed=settings.seed,
                host=settings.host,
                port=settings.noojee_port,
                clock=clock,
            )
        if settings.click2dial:
            self.click2dial = Click2DialServer(
                webhook=settings.click2dial_webhook,
                redis_url=settings.click2dial_redis,
                version=settings.click2dial_version,
                time_scale=settings.dial_time_scale,
                seed=settings.seed,
                host=settings.host,
                port=settings.click2dial_port,
                clock=clock,
            )
        self._running = AsyncExitStack()
        self.behind_s = 0.0
        """How late the last message was, against the rate."""
        self._clock = clock
        self._epoch_s = settings.epoch_s
        self._sent = 0
        self._order = 0
        self._lines: list[tuple[float, int, _Line]] = []
        self._resting: list[tuple[float, int, _Line]] = []
        for index, account in enumerate(self.accounts.values()):
            for line in range(settings.calls_per_account):
                rng = Random(f"{settings.seed}:line:{index}:{line}")
                self._put(rng.random() * IDLE_SCRIPT_S[1], _Line(account, rng))
        self._bursts = 0
        self.gws.control("GET", "/simulator/stats", self._get_stats)
        self.gws.control("GET", "/simulator/truth", self._get_truth)
        self.gws.control("POST", "/simulator/play", self._post_play)
        self.gws.control("POST", "/simulator/finish", self._post_finish)
        self.gws.control("POST", "/simulator/burst", self._post_burst)
        self.gws.control("POST", "/simulator/noojee", self._post_noojee)
        self.gws.control("POST", "/simulator/click2dial", self._post_click2dial)

    @property
    def url(self) -> str:
        """The base URL, such as http://127.0.0.1:40123."""
        return self.gws.url

    @property
    def accounts(self) -> Mapping[str, Account]:
        """The accounts by login, with password, token, DN and device."""
        return self.gws.accounts

    @property
    def faults(self) -> Faults:
        """What goes wrong."""
        return self.gws.faults

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.gws)
            for party in (self.noojee, self.click2dial):
                if party is not None:
                    await stack.enter_async_context(party)
            self._running = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._running.__aexit__(kind, error, trace)

    # Playing. -----------------------------------------------------------------------------------

    async def play(
        self,
        seconds: float | None = None,
        *,
        notifications: int | None = None,
        stop: asyncio.Event | None = None,
    ) -> int:
        """Play at the rate for so many seconds, until so many notifications were sent in this play, or
        until `stop` is set; gives how many were sent. Calls are left as they are: go on with `play` or
        `finish`. Two plays at a time are a mistake of the caller's."""
        if notifications is None and seconds is not None:
            notifications = round(seconds * self.settings.rate)
        return await self._run(notifications, stop, beginning=True)

    async def finish(self) -> int:
        """Let every call come to its end, at the rate, and begin no other; gives how many notifications
        that took."""
        try:
            return await self._run(None, None, beginning=False)
        finally:
            for entry in self._resting:
                heapq.heappush(self._lines, entry)
            self._resting.clear()

    async def _run(self, most: int | None, stop: asyncio.Event | None, *, beginning: bool) -> int:
        loop = asyncio.get_running_loop()
        if self._epoch_s is None:
            self._epoch_s = self._clock()
        rate = self.settings.rate
        begun = loop.time()
        count = 0
        while not (stop is not None and stop.is_set()):
            due = int((loop.time() - begun) * rate) + 1 - count
            made = 0
            while made < min(due, TICK_MESSAGES_MAX) and (most is None or count + made < most):
                said = self._act(self._epoch_s + self._sent / rate, beginning=beginning)
                if said is None:
                    return count + made
                made += said
                self._sent += said
            count += made
            next_s = begun + count / rate
            self.behind_s = max(0.0, loop.time() - next_s)
            if most is not None and count >= most:
                break
            if due > TICK_MESSAGES_MAX:
                await asyncio.sleep(0)
            else:
                pause_s = max(next_s - loop.time(), TICK_S if rate > SINGLE_RATE_MAX else 0.0)
                await asyncio.sleep(min(pause_s, STOP_POLL_S))
        return count

    def _put(self, due_s: float, line: _Line) -> None:
        # The order number decides between equal times, so that it is the same in every run.
        self._order += 1
        heapq.heappush(self._lines, (due_s, self._order, line))

    def _act(self, now_s: float, *, beginning: bool) -> int | None:
        """Let the line that is due first do its next act; gives how many messages that said, or None
        when every call is over and none may begin."""
        while self._lines:
            entry = heapq.heappop(self._lines)
            due_s, _, line = entry
            if line.call is None and not beginning:
                self._resting.append(entry)
                continue
            if line.call is None:
                names, weights = scripts.mix(line.account.dialect)
                name = line.rng.choices(names, weights)[0]
                line.call = self.gws.begin(line.account, name, line.rng)
            said, delay_s = self.gws.step(line.account, line.call, now_s)
            if delay_s is None:
                line.call = None
                delay_s = IDLE_SCRIPT_S[0] + (IDLE_SCRIPT_S[1] - IDLE_SCRIPT_S[0]) * line.rng.random()
            self._put(due_s + delay_s, line)
            return said
        return None

    # Bursts. ------------------------------------------------------------------------------------

    def prepare_burst(self, notifications: int) -> Burst:
        """Make at least so many notifications ahead, spread over the accounts, each call whole. They are
        sent by `burst`, once; the time they carry runs in script time from now."""
        self._bursts += 1
        each = -(-notifications // len(self.accounts))
        messages: dict[str, tuple[Message, ...]] = {}
        calls: list[CallTruth] = []
        for login, account in self.accounts.items():
            rng = Random(f"{self.settings.seed}:burst:{self._bursts}:{login}")
            now_s = self.settings.epoch_s or self._clock()
            made: list[Message] = []
            while len(made) < each:
                names, weights = scripts.mix(account.dialect)
                call = ScriptedCall(
                    rng.choices(names, weights)[0],
                    account.agent,
                    account.dialect,
                    rng,
                    quirks=self.settings.quirks,
                    v3_channel=self.settings.v3_channel,
                )
                delay_s: float | None = 0.0
                while delay_s is not None:
                    now_s += delay_s
                    said, delay_s = call.advance(now_s)
                    made += said
                calls += call.truths
            messages[login] = tuple(made)
        return Burst(messages, tuple(calls))

    async def burst(self, burst: Burst) -> float:
        """Push a prepared burst into the sessions as fast as they take it, and wait until every session
        has acknowledged it (without the ack extension: until it was written). Gives the seconds."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        self.gws.calls.extend(burst.calls)
        most = max(len(messages) for messages in burst.messages.values())
        step = max(1, TICK_MESSAGES_MAX // len(burst.messages))
        for start in range(0, most, step):
            for login, messages in burst.messages.items():
                for message in messages[start : start + step]:
                    self.gws.broker.publish(login, message)
            await asyncio.sleep(0)
        await self._until(self._empty, BURST_POLL_S)
        return loop.time() - begun

    # Waiting and knowing. -------------------------------------------------------------------------

    async def subscribed(self, accounts: int | None = None, *, timeout_s: float = 30.0) -> None:
        """Wait until so many accounts (None: all) have a session that is subscribed to their calls.
        TimeoutError when they have not in time."""
        wanted = len(self.accounts) if accounts is None else accounts
        async with asyncio.timeout(timeout_s):
            await self._until(lambda: self.listening() >= wanted)

    def listening(self) -> int:
        """How many accounts have a session that is subscribed to their calls."""
        sessions_of, channel = self.gws.broker.sessions_of, scripts.CALLS_CHANNEL
        return sum(any(s.wants(channel) for s in sessions_of(login)) for login in self.accounts)

    async def drained(self, *, timeout_s: float = 30.0) -> None:
        """Wait until every session has taken, and with ack acknowledged, all that waits for it.
        TimeoutError when they have not in time."""
        async with asyncio.timeout(timeout_s):
            await self._until(self._empty)

    def _empty(self) -> bool:
        return not any(session.waiting for session in self.gws.broker.sessions.values())

    async def _until(self, condition: Callable[[], bool], period_s: float = POLL_S) -> None:
        # Looked at now and then, so that the sending of a message need not tell anybody.
        while not condition():  # noqa: ASYNC110 - see above
            await asyncio.sleep(period_s)

    def truth(self) -> Truth:
        """What was sent so far, and what must be known of it."""
        accounts = {}
        for login, ledger in self.gws.broker.ledgers.items():
            accounts[login] = AccountTruth(
                login,
                self.accounts[login].dialect,
                ledger.sent,
                ledger.accepted,
                ledger.unsubscribed,
                tuple(ledger.undelivered),
                ledger.digest,
                None if ledger.messages is None else tuple(ledger.messages),
            )
        live = [truth for a in self.accounts.values() for call in a.playing for truth in call.truths]
        return Truth(accounts, (*self.gws.calls, *live))

    def stats(self) -> dict[str, Any]:
        """Counters of the server and the centre, as a JSON object."""
        return self.gws.stats() | {"behind_s": round(self.behind_s, 3), "listening": self.listening()}

    # The control API: what `listener simulate` is driven by from another process. -----------------

    async def _get_stats(self, _request: web.Request) -> web.StreamResponse:
        parties = (("noojee", self.noojee), ("click2dial", self.click2dial))
        urls = {name: party.url for name, party in parties if party is not None}
        return json_response(self.stats() | urls)

    async def _get_truth(self, request: web.Request) -> web.StreamResponse:
        truth = self.truth().as_json(messages="messages" in request.query)
        for name, party in (("noojee", self.noojee), ("click2dial", self.click2dial)):
            if party is not None:
                truth[name] = party.truth()
        return json_response(truth)

    async def _post_play(self, request: web.Request) -> web.StreamResponse:
        """`{"seconds": n}` or `{"notifications": n}`: plays, and answers when it is done."""
        body = await request.json()
        count = await self.play(body.get("seconds"), notifications=body.get("notifications"))
        return json_response({"notifications": count})

    async def _post_noojee(self, request: web.Request) -> web.StreamResponse:
        """What `_party` takes, or `{"call": script, "extension": e}`, `{"monitor": e}`,
        `{"restart": true}`."""
        if self.noojee is None:
            raise SettingsError("simulator: it was started without Noojee")
        said: dict[str, Any] = await request.json()
        match said:
            case {"call": str(script), "extension": str(extension), **details}:
                self.noojee.call(extension, script, **details)
            case {"monitor": str(extension)}:
                self.noojee.monitor(extension)
            case {"restart": _}:
                await self.noojee.restart()
            case _:
                _party(self.noojee.faults, said)
        return json_response({"ok": True})

    async def _post_click2dial(self, request: web.Request) -> web.StreamResponse:
        """What `_party` takes, or `{"call": script, "agent": a, "callee": c}`, `{"record": fault}`, or
        `{"records": {fault: chance}}`."""
        if self.click2dial is None:
            raise SettingsError("simulator: it was started without Click2Dial")
        said: dict[str, Any] = await request.json()
        match said:
            case {"call": str(script), "agent": str(agent), "callee": str(callee), **details}:
                self.click2dial.call(agent, callee, script, **details)
            case {"record": str(fault), **details}:
                self.click2dial.arm_record(fault, **details)
            case {"records": dict(rates)}:
                self.click2dial.records_at_random(rates)
            case _:
                _party(self.click2dial.faults, said)
        return json_response({"ok": True})

    async def _post_finish(self, _request: web.Request) -> web.StreamResponse:
        """Lets every call end, and answers when all is delivered."""
        count = await self.finish()
        with suppress(TimeoutError):
            await self.drained()
        return json_response({"notifications": count, **self.stats()})

    async def _post_burst(self, request: web.Request) -> web.StreamResponse:
        """`{"notifications": n}`: makes so many, pushes them, and answers when all is acknowledged."""
        body = await request.json()
        burst = self.prepare_burst(int(body["notifications"]))
        seconds = await self.burst(burst)
        return json_response({"notifications": burst.size, "seconds": seconds})


def _party(faults: ExchangeFaults, body: dict[str, Any]) -> None:
    """`{"fault": name, …}`, `{"random": {name: chance}}` or `{"clear": true}`."""
    match body:
        case {"fault": str(kind), **details}:
            faults.arm(kind, **details)
        case {"random": dict(rates), **details}:
            faults.at_random(rates, **details)
        case {"clear": _}:
            faults.clear()
        case other:
            raise SettingsError(f"simulator: no such request: {other}")


async def run_simulator(
    settings: SimulatorSettings,
    *,
    stop: asyncio.Event,
    seconds: float | None = None,
    playing: bool = True,
    on_ready: Callable[[Simulator], None] | None = None,
    clock: Callable[[], float] = time,
) -> Truth:
    """Run a simulator until `stop` is set or, if `seconds` is given, for so long; then let every call
    end, which takes at most a few calls' worth of messages, and give the truth.

    `on_ready` is called once, when it listens. With `playing` false it only serves, and is told what to
    play over `/simulator/play` and `/simulator/burst`. It prints nothing and handles no signal.
    """
    async with Simulator(settings, clock=clock) as simulator:
        if on_ready is not None:
            on_ready(simulator)
        if playing:
            await simulator.play(seconds, stop=stop)
            await simulator.finish()
            with suppress(TimeoutError):
                await simulator.drained(timeout_s=5)
        else:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await stop.wait()
        return simulator.truth()
