"""A TCP proxy that breaks connections on demand, between any client and any server.

It decides nothing about what it carries: it counts bytes, and lets them pass, waits with them, keeps them
for ever, or ends the connection. So it serves HTTP, websockets and databases alike. It stands for the
network: the server behind it lives on and does not know, which is the difference to the faults that the
peers themselves can be told to have.

`stall` is the half-open connection (a cable pulled, a NAT entry forgotten): nothing arrives, in neither
direction, not even the end of the connection, until somebody's own timer gives up. `refuse` is a server
that is down: the kernel answers with a reset.
"""

import asyncio
import contextlib
import random
import socket
import struct
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

HOST = "127.0.0.1"

CHUNK_BYTES = 64 * 1024
"""How much is read, held back or delayed at a time, for each connection and direction."""

PORTS_MAX = 5
"""Ports tried at a start: another process may take one between its choice and its use."""

Direction = Literal["down", "up"]
"""`down` is from the server to the client."""


def free_port() -> int:
    """A port on which nothing listens, below those the kernel gives to outgoing connections.

    A client that retries a port of the ephemeral range while its server is down can be given that very port
    for its own end: it then connects to itself, or keeps the server from coming back. Nobody holds the port
    between this call and its use: whoever binds it tries another one on failure.
    """
    try:
        lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        lowest = 49152  # RFC 6335, section 6: the dynamic ports
    while True:
        port = random.randrange(20_000, lowest) if lowest > 20_000 else 0
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((HOST, port))
                return int(probe.getsockname()[1])


def _abort(writer: asyncio.StreamWriter) -> None:
    """Ends a connection at once. CPython up to 3.11.2 fails to abort a TLS transport that is lost already."""
    with contextlib.suppress(AttributeError):
        writer.transport.abort()


class _Link:
    """One connection through the proxy: its two sockets and the task that serves it."""

    def __init__(self, task: asyncio.Task[None], client: asyncio.StreamWriter) -> None:
        self.task = task
        self.writers = [client]
        self.flowing = asyncio.Event()
        self.aborted = False

    def abort(self, *, reset: bool) -> None:
        self.aborted = True
        for writer in self.writers:
            if reset:
                # SO_LINGER with zero seconds makes the kernel end the connection by RST instead of FIN.
                raw = writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            _abort(writer)
        self.task.cancel()


class TcpProxy:
    """Listens on `port` and forwards to `target_port`, both on loopback; used with `async with`.

    All methods act at once, on connections that are open and, where they say so, on those to come; `resume`
    undoes them all. Leaving the block ends every connection.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = 0
        """Where it listens; chosen at the start of the block, and kept over `refuse` and `resume`."""
        self.opened = 0
        """Connections accepted since the start."""
        self.carried: dict[Direction, int] = {"down": 0, "up": 0}
        """Bytes forwarded since the start."""
        self.delay_s = 0.0
        """How long each chunk waits before it is passed on, in order; may be set at any time."""
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._stall_new = False
        self._budget: dict[Direction, list[int]] = {"down": [], "up": []}

    @property
    def open(self) -> int:
        """Connections that are open now, stalled ones included."""
        return len(self._links)

    async def __aenter__(self) -> Self:
        for attempt in range(1, PORTS_MAX + 1):
            self.port = free_port()
            try:
                await self._listen()
                break
            except OSError:
                if attempt == PORTS_MAX:
                    raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.refuse()

    def cut(self, *, reset: bool = False) -> int:
        """Ends all open connections, by FIN or by RST, and says how many there were; new ones are served."""
        links = list(self._links)
        for link in links:
            link.abort(reset=reset)
        return len(links)

    def cut_after(self, count_bytes: int, *, direction: Direction = "down", times: int = 1) -> None:
        """Lets so many more bytes pass in this direction, all connections together, and cuts the connection
        that carried the last one; this `times` times, counting anew after each."""
        self._budget[direction] = [count_bytes] * times

    def stall(self, *, new: bool = False) -> int:
        """Makes all open connections half-open, and with `new` also those to come; says how many are open."""
        self._stall_new = new
        for link in self._links:
            link.flowing.clear()
        return len(self._links)

    async def refuse(self) -> None:
        """Stops listening (clients get "connection refused") and ends all connections."""
        if self._server is not None:
            self._server.close()
        tasks = [link.task for link in self._links]
        self.cut()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()
            self._server = None

    async def resume(self) -> None:
        """Undoes everything: listens again on the same port, forgets cuts to come, and delivers what stalled
        connections held back, as when a cable is plugged in again."""
        self._stall_new = False
        self.delay_s = 0.0
        self._budget = {"down": [], "up": []}
        for link in self._links:
            link.flowing.set()
        if self._server is None:
            await self._listen()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, HOST, self.port, backlog=4096)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        link = _Link(task, writer)
        self.opened += 1
        self._links.add(link)
        if not self._stall_new:
            link.flowing.set()
        try:
            await self._carry(reader, writer, link)
        except asyncio.CancelledError:
            if not link.aborted:
                raise
            # A task that asyncio's server started and that ends as cancelled is reported as an error.
        finally:
            self._links.discard(link)
            for each in link.writers:
                _abort(each)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: _Link) -> None:
        await link.flowing.wait()
        try:
            far_reader, far_writer = await asyncio.open_connection(HOST, self.target_port)
            link.writers.append(far_writer)
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump("up", reader, far_writer, link))
                pumps.create_task(self._pump("down", far_reader, writer, link))
        except* OSError:
            pass  # an end that goes away is an event for the other end, not for us

    async def _pump(
        self, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: _Link
    ) -> None:
        # With a zero high-water mark `drain` returns when the kernel has all bytes: a cut then comes after
        # exactly the bytes that were to pass.
        writer.transport.set_write_buffer_limits(0)
        while data := await reader.read(CHUNK_BYTES):
            await link.flowing.wait()
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            budget = self._budget[direction]
            passing = data[: budget[0]] if budget else data
            writer.write(passing)
            await writer.drain()
            self.carried[direction] += len(passing)
            if budget:
                budget[0] -= len(passing)
                if budget[0] == 0:
                    budget.pop(0)
                    link.abort(reset=False)
                    return
        await link.flowing.wait()
        writer.close()
