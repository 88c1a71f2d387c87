"""The demo: a simulated contact centre and the real listener on loopback, shown live, then checked.

It decides what is started, in which order it stops, and whether the listener has kept its promise: everything
that the contact centre says it sent must be in the database, byte for byte and in order, and every finished
call as the script had it. It refuses to know how anything works: it starts the commands `listener simulate`
and `listener run` as anybody would, and asks them over HTTP, and the database through `store.history`.

Everything is kept in one directory, so that questions can be asked afterwards.
"""

import asyncio
import ctypes
import fcntl
import json
import os
import re
import shlex
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp import ClientError, ClientSession, ClientTimeout
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from listener.configuration import DEMO_CONFIG
from listener.core.calls import Call
from listener.errors import ListenerError, RemoteUnavailable, SettingsError
from listener.store import migrate
from listener.store.embedded import Embedded
from listener.store.history import PAGE_MAX, Found, History, Kept

START_S_MAX = 60.0
"""A process that is not there by then will not come."""
SETTLE_S_MAX = 30.0
"""How long, after the last message, until everything must be stored."""
STOP_S_MAX = 30.0
"""How long a process may take to stop before it is killed."""
REQUEST_S_MAX = 120.0
"""Any question to the simulator or the daemon; the longest lets all calls come to their end."""
SLICE_S = 1.0
"""The contact centre plays in slices, so that it can be told to stop."""
FRAME_S = 0.25
LINE_S = 5.0
"""Between two pictures on a terminal, and two lines elsewhere."""
WINDOW_FRAMES = 20
"""The lag shown is of the last so many pictures."""
ROWS_MAX = 200
"""Calls that a picture asks for; a terminal shows fewer."""
INTERRUPTED = 130
"""What a shell calls a process that Ctrl-C ended."""
PROBLEMS_SHOWN_MAX = 20
POLL_S = 0.1


# ── What is asked, and what is compared: pure ─────────────────────────────────────────────────────────

Sample = tuple[str, frozenset[tuple[str, str]]]
Scrape = dict[Sample, float]


def scrape(text: str) -> Scrape:
    """Read Prometheus' text format as our own /metrics writes it."""
    found: Scrape = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line):
            labels = frozenset(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
            found[match[1], labels] = float(match[3])
    return found


def total(scraped: Scrape, name: str, **labels: str) -> float:
    """Add up the samples of one name that carry these labels."""
    wanted = labels.items()
    return sum(value for (sample, has), value in scraped.items() if sample == name and wanted <= has)


def quantile(share: float, before: Scrape, after: Scrape, name: str) -> float | None:
    """Estimate a quantile of what was observed between two scrapes, as PromQL's histogram_quantile does.

    None where nothing was observed. Linear within a bucket; the last finite bound where it lies beyond it.
    """
    counts = sorted(
        (float(bound), after[sample] - before.get(sample, 0.0))
        for sample in after
        if sample[0] == f"{name}_bucket"
        for label, bound in sample[1]
        if label == "le"
    )
    if not counts or counts[-1][1] <= 0:
        return None
    rank = share * counts[-1][1]
    low, below = 0.0, 0.0
    for bound, count in counts:
        if count >= rank:
            if bound == float("inf"):
                return low
            return low + (bound - low) * (rank - below) / (count - below) if count > below else bound
        low, below = bound, count
    return low


def lost(truth: Mapping[str, Any], kept: Mapping[str, Kept]) -> int:
    """Count the notifications that were sent to a subscribed session and are not stored."""
    return sum(
        max(0, sent["accepted"] - kept.get(login, Kept(0, "")).notifications)
        for login, sent in truth["accounts"].items()
    )


def surplus(truth: Mapping[str, Any], kept: Mapping[str, Kept]) -> list[str]:
    """A sentence for each account of which more is stored than was sent to it: something counted twice, or
    another listener writes into the same database."""
    return [
        f"{login}: {sent['accepted']} notifications were sent, {kept[login].notifications} are stored"
        for login, sent in truth["accounts"].items()
        if login in kept and kept[login].notifications > sent["accepted"]
    ]


def missing(
    truth: Mapping[str, Any], kept: Mapping[str, Kept], calls: Mapping[str, Sequence[Call]]
) -> list[str]:
    """Compare what the contact centre sent with what is stored; a sentence for each thing that is not there,
    or not as it was. What is there and was not sent is `surplus`.

    `truth` is the simulator's; `kept` and `calls` are by account. Messages that nobody was subscribed to
    are no loss of the listener's, and a call of which some were so is left out.
    """
    found = []
    for login, sent in truth["accounts"].items():
        has = kept.get(login, Kept(0, ""))
        if has.notifications < sent["accepted"]:
            found.append(
                f"{login}: {sent['accepted']} notifications were sent, {has.notifications} are stored"
            )
        elif has.notifications == sent["accepted"] > 0 and has.digest != sent["digest"]:
            found.append(
                f"{login}: the stored notifications are not the bytes that were sent, in their order"
            )
    for script in truth["calls"]:
        if script["finished"] and script["accepted"] == script["notifications"]:
            found += _differences(script, calls.get(script["account"], ()))
    return found


def _differences(script: Mapping[str, Any], calls: Iterable[Call]) -> list[str]:
    ids = {script["call_id"], *script["aliases"]}
    candidates = [call for call in calls if call.call_id in ids]
    title = f"{script['account']}: call {script['call_id']} ({script['script']}, {script['dialect']})"
    if not candidates:
        return [f"{title} is not there"]
    call = candidates[0]
    pairs = {
        "notifications": (script["notifications"], call.notifications),
        "state": (script["final_state"], call.state),
        "outcome": (script["outcome"], call.outcome),
        "direction": (script["direction"], call.direction),
        "hold count": (script["hold_count"], call.hold_count),
        "participants": (sorted(set(script["parties"])), sorted({party.number for party in call.parties})),
        "recording": (script["recording"], call.recording),
        "attached data": (_merged(script["user_data"]), call.user_data),
    }
    return [
        f"{title}: {name} should be {should}, is {found}"
        for name, (should, found) in pairs.items()
        if should != found
    ]


def _merged(pairs: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """Give pairs as an object, the values of a repeated key as a list: how the listener keeps them."""
    values: dict[str, list[Any]] = {}
    for key, value in pairs:
        values.setdefault(key, []).append(value)
    return {key: each[0] if len(each) == 1 else each for key, each in values.items()}


def invocation(started_as: str) -> str:
    """How to start the command that runs now once more, given its own name for itself."""
    if Path(started_as).suffix == ".py":
        return f"{shlex.quote(sys.executable)} -m listener"
    return shlex.quote(started_as)


# ── Processes ─────────────────────────────────────────────────────────────────────────────────────────


_PR_SET_PDEATHSIG = 1
"""Of Linux' prctl(2)."""


def _ends_with(parent: int) -> Callable[[], None] | None:
    """What a child does before it begins, so that it is told to end when `parent` is gone, however that
    went: kill -9 leaves nobody else to tell it. None where the system has no such thing; there it stays."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            # It was gone before we asked.
            os._exit(1)

    return tie


class _Child:
    """One of our own commands as a process, its output in a log file."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.log = log
        self._process = process

    @classmethod
    async def start(cls, name: str, arguments: Sequence[str], log: Path) -> "_Child":
        """Start it in a process group of its own: Ctrl-C in the terminal is ours to pass on, in order."""
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "listener",
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                process_group=0,
                preexec_fn=_ends_with(os.getpid()),
            )
        return cls(name, process, log)

    def alive(self) -> None:
        """Raise when it ended by itself, with its last words."""
        if self._process.returncode is not None:
            words = self.log.read_text(errors="replace").strip().splitlines()
            raise ListenerError(
                f"`listener {self.name}` ended by itself with exit code {self._process.returncode}: "
                f"{words[-1] if words else 'it said nothing'}; all it said is in {self.log}"
            )

    async def said(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait for a JSON line of its output; raises when it ends before, or does not say it in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(START_S_MAX):
                while True:
                    for line in self.log.read_bytes().splitlines():
                        with suppress(ValueError):
                            spoken = json.loads(line)
                            if isinstance(spoken, dict) and wanted(spoken):
                                return spoken
                    self.alive()
                    await asyncio.sleep(POLL_S)
        raise ListenerError(
            f"`listener {self.name}` did not start within {START_S_MAX:.0f} s; see {self.log}"
        )

    async def stop(self) -> int:
        """Ask it to end, insist after a while; gives its exit code."""
        if self._process.returncode is None:
            self._process.terminate()
            try:
                async with asyncio.timeout(STOP_S_MAX):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
        return await self._process.wait()


@asynccontextmanager
async def _child(name: str, arguments: Sequence[str], log: Path) -> AsyncIterator[_Child]:
    child = await _Child.start(name, arguments, log)
    try:
        yield child
    finally:
        await child.stop()


# ── Pictures ──────────────────────────────────────────────────────────────────────────────────────────

_COLOURS = {"Ringing": "yellow", "Dialing": "cyan", "Established": "green", "Held": "magenta"}


class Pulse(NamedTuple):
    """What the metrics say now."""

    heard: int
    per_second: float
    lag_ms: float | None
    """99th percentile from receipt to commit, lately."""
    up: int
    accounts: int
    open_calls: int


def pulse(scrapes: Sequence[tuple[float, Scrape]]) -> Pulse:
    """Read the metrics between the first and the last of some scrapes, each with the time it was made."""
    (began, first), (ended, last) = scrapes[0], scrapes[-1]
    name = "listener_notifications_total"
    # A list of live calls is asked for, and none of what the contact centre sent.
    heard, before = (total(each, name) - total(each, name, type="snapshot") for each in (last, first))
    lag_s = quantile(0.99, first, last, "listener_lag_seconds")
    return Pulse(
        heard=round(heard),
        per_second=(heard - before) / (ended - began) if ended > began else 0.0,
        lag_ms=None if lag_s is None else lag_s * 1000,
        up=round(total(last, "listener_sessions", state="up")),
        accounts=round(total(last, "listener_accounts")),
        open_calls=round(total(last, "listener_calls")),
    )


def headline(now: Pulse) -> str:
    """Say it in one line."""
    lag = "–" if now.lag_ms is None else f"{now.lag_ms:.1f} ms"
    return (
        f"{now.heard} heard, {now.per_second:.0f}/s, lag p99 {lag}, "
        f"sessions up {now.up}/{now.accounts}, open calls {now.open_calls}"
    )


def _others(call: Call) -> str:
    """Who else was on it, once each, in order."""
    return ", ".join(dict.fromkeys(party.number for party in call.parties if party.number != call.number))


def picture(now: Pulse, found: Sequence[Found], at: datetime, height: int) -> Group:
    """Draw the table of calls: those that go on, and those that ended last, as many as fit. What the outcome
    of a call implies, its last state, is not shown: at 80 columns nothing is cut."""
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        expand=True,
        header_style="bold",
    )
    for title in ("account", "state", "call", "also on it", "how long"):
        table.add_column(title, no_wrap=True, justify="right" if title == "how long" else "left")
    for each in found[: max(1, height - 6)]:
        call = each.call
        until = call.last_heard_at if call.ended_at is None and not call.open else call.ended_at or at
        state = Text(
            call.outcome or call.state, style=_COLOURS.get(call.state, "dim" if not call.open else "white")
        )
        table.add_row(
            each.account,
            state,
            each.who,
            _others(call),
            f"{max(0.0, (until - call.opened_at).total_seconds()):.0f} s",
            style="" if call.open else "dim",
        )
    return Group(Text(headline(now), style="bold"), table)


# ── The demo ──────────────────────────────────────────────────────────────────────────────────────────


def configuration(url: str, logins: Iterable[str], password: str) -> tuple[str, str]:
    """Write the settings of the demo, and its accounts file: what a site would write by hand."""
    settings = (
        "# Written by `listener demo`, and again by the next one.\n"
        'accounts_file = "accounts.csv"\n\n'
        '[store]\ndata_dir = "postgres"\n\n'
        f'[environments.demo]\nbase_url = "{url}"\n\n'
        "[operations]\nport = 0\n"
    )
    rows = "".join(f"demo,{login},{password},demo\n" for login in logins)
    return settings, "environment,login,password,tenant\n" + rows


class Demo:
    """One run. `seconds` None plays until Ctrl-C; either way all is checked at the end."""

    def __init__(
        self,
        directory: Path,
        *,
        seconds: float | None = None,
        accounts: int = 40,
        rate: float = 50.0,
        seed: int | None = None,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),  # noqa: TID251 - a shell's default
    ) -> None:
        self.directory = directory
        self.seconds = seconds
        self.accounts = accounts
        self.rate = rate
        # Another one each time: calls of an earlier demo are in the same database.
        self.seed = seed if seed is not None else int.from_bytes(os.urandom(4))
        self._wall = wall
        self._console = Console()
        self._stopping = asyncio.Event()

    def run(self) -> int:
        """Play, show, check; gives the exit code. Raises ListenerError when it cannot."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SettingsError(
                    f"a demo is running in {self.directory} already: end it, or use --directory"
                ) from None
            self._step("starting the bundled PostgreSQL")
            with Embedded(self.directory / "postgres") as server:
                return asyncio.run(self._play(server.dsn))

    def _step(self, what: str) -> None:
        self._console.print(f"· {what}", style="dim", highlight=False)

    def _say(self, what: str) -> None:
        self._console.print(what, highlight=False, markup=False, soft_wrap=True)

    async def _play(self, dsn: str) -> int:
        stages = asyncio.current_task()

        def stop() -> None:
            if self._stopping.is_set() and stages is not None:
                stages.cancel()
            self._stopping.set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, stop)
        try:
            async with AsyncExitStack() as stack:
                return await self._stages(dsn, stack)
        except asyncio.CancelledError:
            self._say("stopped at once: nothing was checked")
            return INTERRUPTED

    async def _stages(self, dsn: str, stack: AsyncExitStack) -> int:
        self._step("migrating the database")
        await migrate.upgrade(dsn)
        history = await stack.enter_async_context(History(dsn))
        http = await stack.enter_async_context(ClientSession(timeout=ClientTimeout(total=REQUEST_S_MAX)))

        self._step(f"starting the contact centre: {self.accounts} accounts, {self.rate:g} notifications/s")
        options = [f"--accounts={self.accounts}", f"--rate={self.rate}", f"--seed={self.seed}", "--idle"]
        log = self.directory / "simulate.log"
        simulate = await stack.enter_async_context(_child("simulate", ["simulate", *options], log))
        there = await simulate.said(lambda line: "url" in line)
        url = there["url"]
        logins = json.loads(await _asked(http, f"{url}/simulator/truth"))["accounts"]
        settings, accounts = configuration(url, logins, there["password"])
        (self.directory / "listener.toml").write_text(settings)
        (self.directory / "accounts.csv").touch(mode=0o600)
        (self.directory / "accounts.csv").write_text(accounts)

        self._step("starting the listener")
        began = self._wall()
        arguments = ["run", "--config", str(self.directory / "listener.toml")]
        log = self.directory / "listener.log"
        daemon = await stack.enter_async_context(_child("run", arguments, log))
        port = (await daemon.said(lambda line: line.get("event") == "listening"))["port"]
        pages = f"http://127.0.0.1:{port}"
        await self._ready(http, f"{pages}/-/ready", daemon)

        first = scrape(await _asked(http, f"{pages}/metrics"))
        if self.seconds is None:
            self._step("listening; Ctrl-C lets the calls end and then checks, twice stops at once")
        over = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._shown(http, f"{pages}/metrics", history, (simulate, daemon), over))
            await self._played(http, url)
            over.set()

        truth = json.loads(await _asked(http, f"{url}/simulator/truth"))
        kept = await self._settled(history, truth, began)
        last = scrape(await _asked(http, f"{pages}/metrics"))
        code = await daemon.stop()
        found = [f"MISSING: {each}" for each in missing(truth, kept, await _calls_since(history, began))]
        found += [f"SURPLUS: {each}" for each in surplus(truth, kept)]
        if code != 0:
            found.append(f"FAILED: `listener run` ended with exit code {code}; see {daemon.log}")
        self._summary(truth, kept, first, last, found)
        return 1 if found else 0

    async def _ready(self, http: ClientSession, url: str, daemon: _Child) -> None:
        """Wait until every account is subscribed."""
        reasons = "it did not answer"
        with suppress(TimeoutError):
            async with asyncio.timeout(START_S_MAX):
                while True:
                    async with http.get(url) as reply:
                        reasons = "; ".join((await reply.json())["reasons"])
                        if reply.status == HTTPStatus.OK:
                            return
                    daemon.alive()
                    await asyncio.sleep(POLL_S)
        raise RemoteUnavailable(f"not ready after {START_S_MAX:.0f} s: {reasons}; see {daemon.log}")

    async def _played(self, http: ClientSession, url: str) -> None:
        """Let the contact centre play until it is time or somebody wants to stop; then let all calls end."""
        left_s = self.seconds
        while not self._stopping.is_set() and (left_s is None or left_s > 0):
            slice_s = SLICE_S if left_s is None else min(SLICE_S, left_s)
            await _asked(http, f"{url}/simulator/play", {"seconds": slice_s})
            left_s = None if left_s is None else left_s - slice_s
        await _asked(http, f"{url}/simulator/finish", {})

    async def _shown(
        self,
        http: ClientSession,
        url: str,
        history: History,
        children: Sequence[_Child],
        over: asyncio.Event,
    ) -> None:
        """Draw what goes on, as a table that moves or, where that cannot be, as a line now and then."""
        scrapes: deque[tuple[float, Scrape]] = deque(maxlen=WINDOW_FRAMES)
        clock = asyncio.get_running_loop().time
        frame_s = FRAME_S if self._console.is_terminal else LINE_S
        with ExitStack() as stack:
            live = None
            if self._console.is_terminal:
                live = stack.enter_context(Live(console=self._console, auto_refresh=False, transient=True))
            while not over.is_set():
                for child in children:
                    child.alive()
                scrapes.append((clock(), scrape(await _asked(http, url))))
                now = pulse(scrapes)
                if live is not None:
                    calls = await _board(history)
                    live.update(picture(now, calls, self._wall(), self._console.height), refresh=True)
                elif len(scrapes) > 1:
                    self._say(headline(now))
                with suppress(TimeoutError):
                    async with asyncio.timeout(frame_s):
                        await over.wait()

    async def _settled(
        self, history: History, truth: Mapping[str, Any], began: datetime
    ) -> Mapping[str, Kept]:
        """Give what is stored, as soon as that is all that was sent, or when it takes too long."""
        kept: Mapping[str, Kept] = {}
        with suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_S_MAX):
                while True:
                    kept = await history.kept_since(began)
                    if not lost(truth, kept):
                        break
                    await asyncio.sleep(POLL_S)
        return kept

    def _summary(
        self,
        truth: Mapping[str, Any],
        kept: Mapping[str, Kept],
        first: Scrape,
        last: Scrape,
        found: Sequence[str],
    ) -> None:
        heard = sum(account.notifications for account in kept.values())
        outcomes = ", ".join(f"{count} {name}" for name, count in sorted(truth["outcomes"].items()))
        spans = [quantile(share, first, last, "listener_lag_seconds") for share in (0.5, 0.99)]
        p50, p99 = ("–" if span is None else f"{span * 1000:.1f} ms" for span in spans)
        self._say(f"notifications   {heard} heard and stored, of {len(kept)} accounts")
        self._say(f"calls           {sum(truth['outcomes'].values())}: {outcomes}")
        self._say(f"lost            {lost(truth, kept)}")
        self._say(f"duplicates      {round(total(last, 'listener_duplicates_total'))}")
        self._say(f"wire to commit  p50 {p50}, p99 {p99}")
        for problem in found[:PROBLEMS_SHOWN_MAX]:
            self._say(problem)
        if len(found) > PROBLEMS_SHOWN_MAX:
            self._say(f"and {len(found) - PROBLEMS_SHOWN_MAX} more")
        if not found:
            self._say("all that was sent is in the database, byte for byte, and every call as it was")
        config = self.directory / "listener.toml"
        option = "" if config == DEMO_CONFIG else f" -c {config}"
        self._say(f"\nIt is kept in {self.directory}. Ask:")
        self._say(f"  {invocation(sys.argv[0])} calls{option} --number 5001 --since 1h")


async def _board(history: History) -> list[Found]:
    """The calls that go on, then those that ended last."""
    live = await history.live(ROWS_MAX)
    ended = await history.calls(live=False, limit=ROWS_MAX)
    return [*live, *ended.calls]


async def _calls_since(history: History, since: datetime) -> dict[str, list[Call]]:
    """Every call that began since then, by account."""
    calls: dict[str, list[Call]] = {}
    after: str | None = None
    while True:
        page = await history.calls(since=since, limit=PAGE_MAX, after=after)
        for found in page.calls:
            calls.setdefault(found.account, []).append(found.call)
        if (after := page.after) is None:
            return calls


async def _asked(http: ClientSession, url: str, body: Mapping[str, Any] | None = None) -> str:
    """GET, or POST where there is a body; gives the text, raises RemoteUnavailable with the cause."""
    method = "GET" if body is None else "POST"
    try:
        async with http.request(method, url, json=body) as reply:
            text = await reply.text()
            if reply.status != HTTPStatus.OK:
                raise RemoteUnavailable(f"{url} answered {reply.status}: {text[:200]}")
            return text
    except (ClientError, TimeoutError) as error:
        raise RemoteUnavailable(f"{url} does not answer: {str(error) or type(error).__name__}") from None
