"""`listener` as ever, which kills itself at a named point: `python killing.py POINT PASSING run -c FILE`.

The points stand between the bytes of a delivery and its acknowledgement, in the order in which a delivery
passes them. Each is a function of the product, and a moment before it, after it, or while what it sends is
under way; a statement of a transaction is one by its name in the module that owns it. Nothing of the product
is changed but that these functions are watched. At the PASSING-th time the process says where it is and gets
SIGKILL, as by the kernel, a power cut or an operator: nothing is closed, flushed or rolled back. It counts
from SIGUSR1 on, which it acknowledges in its log: then everything is up, and what passes is a notification.

With POINT "none" it only says, once each, which points it passed, and which statements `Journal.record` made.
"""

import asyncio
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from contextvars import ContextVar
from enum import StrEnum
from typing import Any, NamedTuple

import asyncpg

from listener.cli import main
from listener.core.calls import Source
from listener.core.session import Delivered

ARMED, KILLED_AT, PASSED, STATED = "armed", "killed at", "passed", "stated"
"""The events that it logs."""
HEAD_BYTES_MAX = 200
"""What begins a file of the spool is shorter."""
SENT_s = 0.02
"""How long a request may take to the socket."""


class Moment(StrEnum):
    """When, of a function."""

    BEFORE = "before"
    AFTER = "after"
    HALF = "half"
    """Of two arguments the second, bytes, is written to its half."""
    SENT = "sent"
    """What it sends is on its way, and the answer has not been read."""


class Point(NamedTuple):
    """A place where a process may be killed. `where` is `module:name`, or a statement."""

    name: str
    where: str
    moment: Moment
    only: Callable[[tuple[Any, ...], Any], bool] = lambda _arguments, _result: True
    """Of its arguments and, after it, of what it gave: whether this passing counts."""
    passing: int = 3
    """Which passing is the last: not the first, which may be a snapshot's or an empty one."""
    burst: bool = False
    """Passed only by a large delivery."""
    websocket: bool = False
    """Passed only where websockets are used."""
    spools: bool = False
    """Passed only by what goes to the spool."""


def _notifications(body: bytes) -> bool:
    return b'"/v2/me/calls"' in body


def _acknowledges(send: Any) -> bool:
    """Whether what is sent is a connect that acknowledges something."""
    return any(message.get("ext", {}).get("ack", -1) not in (-1, True) for message in send.messages)


def _delivered(facts: Any) -> bool:
    return any(isinstance(fact, Delivered) and fact.messages for fact in facts)


def _heard(messages: Any) -> bool:
    return any(each.source is Source.COMETD for each in messages)


def _records(given: tuple[Any, ...]) -> bool:
    """Whether what is written to the spool is more than the head of a file."""
    return len(given[1]) > HEAD_BYTES_MAX


_TRANSPORTS = "listener.adapters.cometd"
_JOURNAL = "listener.store.journal:Journal"
_SPOOL = "listener.store.spool:Spool"
_WRITE = "listener.store.spool:_write_all"

POINTS = (
    Point(
        "bytes read", f"{_TRANSPORTS}:LongPolling._ask", Moment.AFTER, lambda _, body: _notifications(body)
    ),
    Point(
        "frame read",
        f"{_TRANSPORTS}:WebSocket._next_frame",
        Moment.AFTER,
        lambda _, body: _notifications(body),
        websocket=True,
    ),
    Point("answer split", f"{_TRANSPORTS}:split", Moment.AFTER, lambda given, _: _notifications(given[0])),
    Point("delivery told", f"{_TRANSPORTS}:Line.tell", Moment.BEFORE, lambda given, _: _delivered(given[1])),
    Point("put into the outbox", f"{_TRANSPORTS}:Line._post", Moment.AFTER),
    Point("taken by the courier", "listener.coverage:Watch.hear", Moment.BEFORE),
    Point("in the pipeline's queue", "listener.pipeline:Pipeline.hear", Moment.AFTER),
    Point("spool file made", f"{_SPOOL}._writable", Moment.AFTER, passing=1, burst=True, spools=True),
    Point(
        "half spooled",
        _WRITE,
        Moment.HALF,
        lambda given, _: _records(given),
        passing=1,
        burst=True,
        spools=True,
    ),
    Point(
        "not synced",
        _WRITE,
        Moment.AFTER,
        lambda given, _: _records(given),
        passing=1,
        burst=True,
        spools=True,
    ),
    Point("spooled", f"{_SPOOL}.append", Moment.AFTER, passing=1, burst=True, spools=True),
    Point("read from the spool", f"{_SPOOL}.read", Moment.AFTER, passing=1, burst=True, spools=True),
    Point("decoded", "listener.store.batch:read", Moment.AFTER),
    Point("batch handed over", f"{_JOURNAL}.record", Moment.BEFORE, lambda given, _: _heard(given[1])),
    # The first batch of a stream, and whatever is not as it was expected.
    Point("transaction begun", "BEGIN", Moment.AFTER),
    Point("accounts locked", "journal._TOUCH", Moment.AFTER),
    Point("positions read", "rows.POSITIONS", Moment.AFTER),
    Point("calls named", "rows.NAMED", Moment.AFTER),
    Point("calls read", "rows.CALLS", Moment.AFTER, passing=1),
    Point("notifications copied", "COPY notification", Moment.AFTER),
    Point("changes copied", "COPY change", Moment.AFTER),
    Point("anomalies copied", "COPY anomaly", Moment.AFTER, passing=1),
    Point("rows written", "rows.WRITE", Moment.AFTER),
    # A large batch that is as expected.
    Point(
        "half folded, half copied",
        "listener.store.batch:Foreseen._fold",
        Moment.AFTER,
        lambda given, _: given[1] > 0,
        passing=1,
        burst=True,
    ),
    Point("large batch written", "rows.WRITE_AS_EXPECTED", Moment.AFTER, passing=1, burst=True),
    Point("before COMMIT", "COMMIT", Moment.BEFORE),
    Point("COMMIT sent", "COMMIT", Moment.SENT),
    Point("COMMIT answered", "COMMIT", Moment.AFTER),
    # Any other batch: one statement is the transaction.
    Point("before the one statement", "rows.WRITE_AT_ONCE", Moment.BEFORE, passing=10),
    Point("one statement sent", "rows.WRITE_AT_ONCE", Moment.SENT, passing=20),
    Point("one statement answered", "rows.WRITE_AT_ONCE", Moment.AFTER, passing=10),
    Point("committed, nobody told", f"{_JOURNAL}.record", Moment.AFTER, lambda given, _: _heard(given[1])),
    Point("still in the spool", f"{_SPOOL}.release", Moment.BEFORE, passing=1, burst=True, spools=True),
    Point("out of the spool", f"{_SPOOL}.release", Moment.AFTER, passing=1, burst=True, spools=True),
    Point("session told", "listener.core.session:Session.committed", Moment.AFTER, passing=10),
    Point(
        "acknowledgement sent",
        f"{_TRANSPORTS}:LongPolling._ask",
        Moment.SENT,
        lambda given, _: _acknowledges(given[1]),
    ),
    Point(
        "acknowledgement sent in a frame",
        f"{_TRANSPORTS}:WebSocket._ask",
        Moment.SENT,
        lambda given, _: _acknowledges(given[1]),
        websocket=True,
    ),
)
"""From the first byte that was read to the acknowledgement."""

_recording: ContextVar[bool] = ContextVar("recording", default=False)
"""Whether `Journal.record` is under way: other transactions pass the same statements."""


class Watchman:
    """Looks at every passing; kills at one of them, or tells of all."""

    def __init__(self, name: str, passing: int) -> None:
        self.name = name
        self.left = passing
        self.armed = False
        self._told: set[tuple[str, str]] = set()

    def passes(self, point: Point, given: tuple[Any, ...], result: Any = None) -> bool:
        """Whether this is where it ends."""
        if not self.armed or not point.only(given, result):
            return False
        if self.name == "none":
            self.tell(PASSED, point.name)
        if point.name != self.name:
            return False
        self.left -= 1
        return self.left == 0

    def arm(self) -> None:
        """Counts from now on."""
        self.armed = True
        self.tell(ARMED, self.name)

    def kill(self) -> None:
        """Says where, and ends."""
        self.tell(KILLED_AT, self.name)
        os.kill(os.getpid(), signal.SIGKILL)

    def tell(self, event: str, what: str) -> None:
        """One line of log, once."""
        if (event, what) not in self._told:
            self._told.add((event, what))
            os.write(2, json.dumps({"event": event, "what": what}).encode() + b"\n")


def watched(function: Any, points: list[Point], watchman: Watchman) -> Any:
    """The function, with all its points looked at."""
    moments = {moment: [point for point in points if point.moment is moment] for moment in Moment}

    def look(moment: Moment, given: tuple[Any, ...], result: Any = None) -> bool:
        ends = [watchman.passes(point, given, result) for point in moments[moment]]  # each counts its own
        return any(ends)

    if not asyncio.iscoroutinefunction(function):

        def plain(*given: Any, **named: Any) -> Any:
            if look(Moment.BEFORE, given):
                watchman.kill()
            if look(Moment.HALF, given):
                function(given[0], given[1][: len(given[1]) // 2])
                watchman.kill()
            result = function(*given, **named)
            if look(Moment.AFTER, given, result):
                watchman.kill()
            return result

        return plain

    async def awaited(*given: Any, **named: Any) -> Any:
        if look(Moment.BEFORE, given):
            watchman.kill()
        if look(Moment.SENT, given):
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(function(*given, **named))
                await asyncio.sleep(0 if points[0].where in _statements() else SENT_s)
                watchman.kill()
        result = await function(*given, **named)
        if look(Moment.AFTER, given, result):
            watchman.kill()
        return result

    return awaited


def _statements() -> dict[str, str]:
    """The names of the journal's statements, by their text."""
    names = {"BEGIN": "BEGIN", "COMMIT": "COMMIT"}
    for module in ("rows", "journal", "batch", "ledger"):
        for name, value in vars(importlib.import_module(f"listener.store.{module}")).items():
            if isinstance(value, str) and name.isupper() and " " in value:
                names.setdefault(f"{module}.{name}", value)
    return {**names, **{f"COPY {table}": table for table in ("notification", "change", "anomaly")}}


def watch(watchman: Watchman) -> None:
    """Watches every point: functions where they are looked up, statements where asyncpg takes them."""
    names = _statements()
    for where in {point.where for point in POINTS} - set(names):
        module_name, _, path = where.partition(":")
        owner: Any = importlib.import_module(module_name)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        points = [point for point in POINTS if point.where == where]
        setattr(owner, name, watched(getattr(owner, name), points, watchman))
    journal: Any = importlib.import_module("listener.store.journal").Journal
    record = journal.record

    async def recording(*given: Any) -> Any:
        token = _recording.set(True)
        try:
            return await record(*given)
        finally:
            _recording.reset(token)

    journal.record = recording
    labels = {text: name for name, text in names.items()}
    for method in ("execute", "fetch", "fetchval", "copy_records_to_table"):
        _watch_statements(method, labels, watchman)


def _watch_statements(method: str, labels: dict[str, str], watchman: Watchman) -> None:
    asked = getattr(asyncpg.Connection, method)

    async def asking(connection: Any, text: str, *given: Any, **named: Any) -> Any:
        if not _recording.get():
            return await asked(connection, text, *given, **named)
        label = labels.get(text, text.strip()[:60])
        if watchman.name == "none" and watchman.armed:
            watchman.tell(STATED, label)
        points = [point for point in POINTS if point.where == label]
        return await watched(asked, points, watchman)(connection, text, *given, **named)

    setattr(asyncpg.Connection, method, asking)


if __name__ == "__main__":
    watchman = Watchman(sys.argv[1], int(sys.argv[2]))
    signal.signal(signal.SIGUSR1, lambda *_: watchman.arm())
    watch(watchman)
    sys.exit(main(sys.argv[3:]))
