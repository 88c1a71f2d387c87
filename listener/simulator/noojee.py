"""Noojee Contact's CallManagementAPI as a server on loopback: its six operations, and scripted calls.

A dial is answered "queued" at once, whatever becomes of it; then a script runs, and what it says of the call
is heard by subscribe, and by nobody else: one long poll for a list of extensions, with one sequence number
for all of them. The traps are those of the reference: the SessionID of a dial is in no event, an API call is
not `isClickToDialCall`, Unlinked is no end, Hungup says nothing of an answer, extensions of subscribe have no
technology and only monitored ones are heard, names of parameters are case-sensitive.

Where the reference leaves something open, this is what was chosen: every event is kept (`EVENTS_MAX` of them)
and comes again to whoever asks with an older number; with number 0 each live call is told as it is now; an
error is HTTP 200 with Code -1; a PBX that restarted counts from 0 again and waits as if nothing had happened
when it is asked with a number that it has not reached.

`NoojeeServer.truth` is what happened, and what can be known of it from the events alone.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from random import Random
from time import time  # noqa: TID251 - the default of a shell
from typing import Any, Final

from aiohttp import web

from listener.errors import SettingsError
from listener.simulator.party import ANSWER_LOST, Party, json_answer

API: Final = "/servicemanager/rest/CallManagementAPI/"
EVENTS_MAX: Final = 100_000
"""Events that are kept for late questions; older ones are forgotten."""
POLL_S_MIN: Final = 0.1
"""How long a poll that may wait lasts at least, and gathers ("minimum poll about 100 ms")."""
TIMEOUT_S: Final = 10.0
"""timeOut where none is asked for."""
NOT_ANSWERED_S: Final = 25.0

Act = tuple[float, str | None]
"""Seconds to wait, and the status to say then; None: say nothing."""

INBOUND: Final = "inbound:"
"""Before a status: said of a call to the extension."""


@dataclass(frozen=True, slots=True)
class Script:
    """How a call goes. `known` is the outcome that its events prove, `happened` the one that it had."""

    acts: tuple[Act, ...]
    happened: str
    known: str
    inbound: bool = False


SCRIPTS: Final[Mapping[str, Script]] = {
    "answered": Script(((1.0, "Dialing Out"), (6.0, "Connected"), (40.0, "Hungup")), "answered", "answered"),
    "answered_with_agent_leg": Script(
        (
            (0.5, INBOUND + "Ringing"),
            (2.0, INBOUND + "Connected"),
            (0.2, "Dialing Out"),
            (6.0, "Connected"),
            (40.0, "Hungup"),
        ),
        "answered",
        "answered",
    ),
    "not_answered": Script(((1.0, "Dialing Out"), (NOT_ANSWERED_S, "Hungup")), "no_answer", "unknown"),
    "callee_busy": Script(((1.0, "Dialing Out"), (1.5, "Hungup")), "busy", "unknown"),
    "transferred": Script(
        (
            (1.0, "Dialing Out"),
            (5.0, "Connected"),
            (20.0, "Unlinked"),
            (0.5, "Connected"),
            (30.0, "Hungup"),
        ),
        "answered",
        "answered",
    ),
    "unlinked_then_hungup": Script(
        ((1.0, "Dialing Out"), (5.0, "Connected"), (20.0, "Unlinked"), (0.3, "Hungup")),
        "answered",
        "answered",
    ),
    "agent_not_answering": Script(
        ((0.5, INBOUND + "Ringing"), (20.0, INBOUND + "No Answer")), "no_answer", "no_answer"
    ),
    "agent_busy": Script(((0.3, INBOUND + "Busy"),), "busy", "busy"),
    "silent": Script((), "unknown", "unknown"),
    "end_unheard": Script(((1.0, "Dialing Out"), (5.0, "Connected")), "answered", "answered"),
    "strange": Script(
        ((1.0, "Dialing Out"), (2.0, "Whispering"), (2.0, "Connected"), (30.0, "Hungup")),
        "answered",
        "answered",
    ),
    "inbound_answered": Script(
        ((0.0, INBOUND + "Ringing"), (4.0, INBOUND + "Connected"), (60.0, INBOUND + "Hungup")),
        "answered",
        "",
        inbound=True,
    ),
    "inbound_missed": Script(
        ((0.0, INBOUND + "Ringing"), (15.0, INBOUND + "No Answer"), (0.1, INBOUND + "Hungup")),
        "no_answer",
        "",
        inbound=True,
    ),
    "inbound_busy": Script(((0.0, INBOUND + "Busy"),), "busy", "", inbound=True),
}
"""By name. `refused` is a name too: the dial is answered with Code -1."""

REFUSED: Final = "refused"

MIX: Final[Mapping[str, float]] = {
    "answered": 40,
    "answered_with_agent_leg": 10,
    "not_answered": 15,
    "callee_busy": 8,
    "transferred": 6,
    "unlinked_then_hungup": 4,
    "agent_not_answering": 5,
    "agent_busy": 3,
    "silent": 3,
    "end_unheard": 2,
    "strange": 2,
    REFUSED: 2,
}
"""What becomes of a dial to a number that no script was chosen for, by weight."""


@dataclass(slots=True)
class NoojeeCall:
    """One call, and all that was said of it: the truth."""

    extension: str
    number: str
    script: str
    happened: str
    """The outcome that it had."""
    known: str
    """The outcome that its events prove, of a refused one the answer; empty for a call to the extension."""
    unique_call_id: str
    call_number: int
    """`CallID` of its events."""
    session: int | None = None
    """The SessionID that its dial was answered with; None: not dialled by the API."""
    heard: bool = True
    """Its extension is monitored; else no event of it is told."""
    recorded: bool = False
    record: bool = False
    tag: str = ""
    arguments: Mapping[str, str] = field(default_factory=dict)
    """What the dial was asked with, without the key."""
    statuses: list[str] = field(default_factory=list)
    ended: bool = False
    status: str = ""
    inbound: bool = False


@dataclass(frozen=True, slots=True)
class _Event:
    seq: int
    extension: str
    body: Mapping[str, Any]


class NoojeeServer(Party):
    """The server. `scripts` says what becomes of a dial to a number; other numbers go by `mix` and the seed.

    `monitored` are extensions whose events are told from the start; a dial with monitored=yes adds its own.
    Delays of scripts are multiplied by `time_scale`. `clock` gives epoch seconds.
    """

    def __init__(
        self,
        *,
        api_key: str = "simulated-key",
        scripts: Mapping[str, str] | None = None,
        mix: Mapping[str, float] = MIX,
        monitored: frozenset[str] = frozenset(),
        time_scale: float = 1.0,
        seed: int = 1,
        host: str = "127.0.0.1",
        port: int = 0,
        clock: Callable[[], float] = time,
    ) -> None:
        super().__init__(host=host, port=port, seed=seed)
        self.api_key = api_key
        self.scripts = dict(scripts or {})
        for name in (*self.scripts.values(), *mix):
            if name not in SCRIPTS and name != REFUSED:
                raise SettingsError(f"simulator: no such Noojee script {name!r}; write one of {_names()}")
        self.calls: list[NoojeeCall] = []
        """Every call so far, the refused ones without an event."""
        self.recordings: list[tuple[str, str, str, str]] = []
        """What start and stop were asked: operation, unique id of the call, tag, agentLoginName."""
        self.seq = 0
        """Of the last event."""
        self.polls = 0
        """Subscribes that are waiting now."""
        self._mix = dict(mix)
        self._monitored = set(monitored)
        self._time_scale = time_scale
        self._rng = Random(f"{seed}:noojee")
        self._clock = clock
        self._events: deque[_Event] = deque(maxlen=EVENTS_MAX)
        self._happened = asyncio.Condition()
        self._sessions = 0
        self._numbers = 0
        for name, operation in (
            ("dial", self._dial),
            ("hangup", self._hangup),
            ("answer", self._answer),
            ("subscribe", self._subscribe),
            ("start", self._start),
            ("stop", self._stop),
        ):
            self.route("POST", API + name, self._checked(operation), lambda: _error("Refused"))

    # What goes on. --------------------------------------------------------------------------------

    def call(self, extension: str, script: str, number: str = "0299990000") -> NoojeeCall:
        """A call that nobody asked the API for: an agent dials by hand, or is rung."""
        call = self._begin(extension, number, script, None)
        self.spawn(self._play(call))
        return call

    def monitor(self, extension: str) -> None:
        """Tell of this extension's calls from now on."""
        self._monitored.add(extension)

    async def restart(self) -> None:
        """As a PBX that was restarted: no call, no event, and sequence numbers from 0. Calls end unheard."""
        for call in self.calls:
            call.ended = True
        async with self._happened:
            self._events.clear()
            self.seq = 0

    async def idle(self, timeout_s: float = 30.0) -> None:
        """Wait until no script runs."""
        async with asyncio.timeout(timeout_s):
            while self._background:
                await asyncio.wait(self._background)

    def truth(self) -> dict[str, Any]:
        """What happened, as a JSON object."""
        return {
            "calls": [asdict(call) for call in self.calls],
            "recordings": [list(each) for each in self.recordings],
            "events": self.seq,
            "faults": dict(self.faults.struck),
        }

    def _begin(self, extension: str, number: str, script: str, session: int | None) -> NoojeeCall:
        how = SCRIPTS.get(script)
        if how is None and script != REFUSED:
            raise SettingsError(f"simulator: no such Noojee script {script!r}; write one of {_names()}")
        self._numbers += 1
        heard = extension in self._monitored
        known = how.known if how is not None else "failed"
        if not heard and how is not None:
            known = "unknown" if known else ""
        call = NoojeeCall(
            extension,
            number,
            script,
            how.happened if how is not None else "failed",
            known,
            f"{int(self._clock())}.{self._numbers}",
            self._numbers,
            session,
            heard,
            inbound=how.inbound if how is not None else False,
        )
        self.calls.append(call)
        return call

    async def _play(self, call: NoojeeCall) -> None:
        for delay_s, status in SCRIPTS[call.script].acts:
            await asyncio.sleep(delay_s * self._time_scale * (0.5 + self._rng.random()))
            if call.ended:
                return
            if status is not None:
                await self._say(call, status)
        call.ended = True

    async def _say(self, call: NoojeeCall, status: str) -> None:
        inbound = status.startswith(INBOUND)
        call.status = status.removeprefix(INBOUND)
        call.statuses.append(call.status)
        call.ended = call.ended or call.status == "Hungup"
        if not call.heard:
            return
        async with self._happened:
            self.seq += 1
            self._events.append(_Event(self.seq, call.extension, self._body(call, inbound=inbound)))
            self._happened.notify_all()

    def _body(self, call: NoojeeCall, *, inbound: bool) -> dict[str, Any]:
        return {
            "CallData": {
                "callerId": call.number,
                "uniqueCallId": call.unique_call_id,
                "callStartTime": "",
                "isQueueCall": False,
                "isClickToDialCall": False,
                "inbound": inbound,
                "status": call.status,
                "otherPartyCallerId": call.number,
                "connectedCallerIdNum": "",
                "outboundDestination": "" if inbound else call.number,
            },
            "CallID": call.call_number,
            "Code": 0,
        }

    # The six operations. --------------------------------------------------------------------------

    def _checked(self, operation: Callable[[web.Request], Any]) -> Callable[[web.Request], Any]:
        async def handle(request: web.Request) -> web.Response:
            if request.query.get("apiKey") != self.api_key:
                return _error("Invalid apiKey")
            answer: web.Response = await operation(request)
            return answer

        return handle

    async def _dial(self, request: web.Request) -> web.Response:
        query = request.query
        number, device = query.get("number", ""), query.get("extenOrUniqueId", "")
        technology, _, extension = device.rpartition("/")
        if not number or not technology or not extension:
            return _error("number and extenOrUniqueId, with the technology, are needed")
        script = self.scripts.get(number)
        if script is None:
            script = self._rng.choices(list(self._mix), list(self._mix.values()))[0]
        if query.get("monitored") == "yes":
            self._monitored.add(extension)
        self._sessions += 1
        call = self._begin(extension, number, script, self._sessions)
        call.arguments = {name: value for name, value in query.items() if name != "apiKey"}
        call.record, call.tag = query.get("record") == "true", query.get("tag", "")
        if script == REFUSED:
            call.session, call.ended = None, True
            if request[ANSWER_LOST]:
                call.known = "unknown"  # only its answer says so
            return _error("Extension is not logged in")
        self.spawn(self._play(call))
        return json_answer({"SessionID": call.session, "Message": "Originate successfully queued", "Code": 0})

    async def _hangup(self, request: web.Request) -> web.Response:
        query = request.query
        call = self._find(query.get("extenOrUniqueId", ""))
        if call is None:
            return _error("No such channel")
        if call.known:
            # Before it was connected, our own hang-up is the only thing that says how it ended.
            call.known = call.happened = "answered" if "Connected" in call.statuses else "cancelled"
        call.ended = True
        await self._say(call, "Hungup")
        return json_answer({"Message": "Channel Hungup", "Code": 0})

    async def _answer(self, request: web.Request) -> web.Response:
        query = request.query
        call = self._find(query.get("uniqueId", ""))
        if call is None or call.status != "Ringing" or call.extension != _bare(query.get("exten", "")):
            return _error("No such call to answer")
        await self._say(call, INBOUND + "Connected" if call.inbound else "Connected")
        return json_answer({"Message": "Answered", "Code": 0})

    async def _start(self, request: web.Request) -> web.Response:
        return self._recording("start", request.query)

    async def _stop(self, request: web.Request) -> web.Response:
        return self._recording("stop", request.query)

    def _recording(self, operation: str, query: Mapping[str, str]) -> web.Response:
        call = self._find(query.get("extenOrUniqueId", ""))
        if call is None:
            return _error("No such call")
        call.recorded = operation == "start"
        self.recordings.append(
            (operation, call.unique_call_id, query.get("tag", ""), query.get("agentLoginName", ""))
        )
        return json_answer({"Message": "Success", "Code": 0})

    def _find(self, name: str) -> NoojeeCall | None:
        """The live call with this unique id, else the newest at this extension: not always the one meant."""
        live = [call for call in reversed(self.calls) if not call.ended]
        by_id = (call for call in live if call.unique_call_id == name)
        return next(by_id, next((call for call in live if call.extension == _bare(name)), None))

    async def _subscribe(self, request: web.Request) -> web.Response:
        query = request.query
        try:
            extensions = {each for each in query["exten"].split(",") if each}
            after = int(query["lastSequenceNumber"])
            timeout_s = float(query.get("timeOut", TIMEOUT_S))
        except (KeyError, ValueError):
            return _error("exten, lastSequenceNumber and timeOut are needed")
        if after == 0 and (now := self._now(extensions)):
            return self._reply(now)
        if timeout_s > 0:
            self.polls += 1
            try:
                await self._wait(extensions, after, timeout_s)
            finally:
                self.polls -= 1
        return self._reply(self._since(extensions, after))

    async def _wait(self, extensions: set[str], after: int, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + min(POLL_S_MIN, timeout_s)
        try:
            async with asyncio.timeout(timeout_s), self._happened:
                await self._happened.wait_for(lambda: bool(self._since(extensions, after)))
        except TimeoutError:
            return
        # What comes shortly after goes with it: several events in one reply.
        await asyncio.sleep(max(0.0, until - loop.time()))

    def _since(self, extensions: set[str], after: int) -> list[_Event]:
        newest_first = takewhile(lambda event: event.seq > after, reversed(self._events))
        return [event for event in newest_first if event.extension in extensions][::-1]

    def _now(self, extensions: set[str]) -> list[_Event]:
        """Each live call as it is: its last event."""
        live = {call.unique_call_id for call in self.calls if not call.ended}
        last = {
            event.body["CallData"]["uniqueCallId"]: event
            for event in self._events
            if event.extension in extensions
        }
        return [event for id, event in last.items() if id in live]

    def _reply(self, events: list[_Event]) -> web.Response:
        data: dict[str, list[Any]] = {}
        for event in events:
            data.setdefault(event.extension, []).append(event.body)
        return json_answer({"Data": data, "seq": self.seq, "Code": 0})


def _bare(name: str) -> str:
    """SIP/410-12FA7B is 410."""
    return name.rpartition("/")[2].partition("-")[0]


def _error(message: str) -> web.Response:
    return json_answer({"Message": message, "Code": -1})


def _names() -> str:
    return ", ".join((*SCRIPTS, REFUSED))
