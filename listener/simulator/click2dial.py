"""Teleforge Click2Dial as a server on loopback: the one request that it has, and records at the end of calls.

A request is answered at once, then nothing is heard until one record says how the call ended: by a POST to a
webhook, by a Redis list, or by both. The records have every disposition of the reference, in the spelling
since v3.0.0 or the one before, the number as it was dialled or in another of its four spellings, and the
reference cut at 230 characters. A record may come late, twice or never.

Where the reference leaves something open, this is what was chosen: a request that is no JSON or lacks a field
is HTTP 400; one whose values break a rule is taken, and its record says `error` with end_code 28; before
v3.0.0 the record has the dial's call_ref as its own, and no contact_ref; a webhook that does not answer 2xx
is asked again a few times; a record that Redis does not take is lost.

`Click2DialServer.truth` is what happened, and what can be known of it from the record alone.
"""

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from random import Random
from time import time  # noqa: TID251 - the default of a shell
from types import TracebackType
from typing import Any, Final, Self

import aiohttp
import msgspec
from aiohttp import web
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from listener.errors import SettingsError
from listener.simulator.party import Party, json_answer

CDR_LIST: Final = "enigma:notifications:cdr"
INBOUND_LIST: Final = "enigma:notifications:inbound"

CONTACT_REF_MAX: Final = 230
WEBHOOK_TRIES: Final = 5
WEBHOOK_PAUSE_S: Final = 0.2
WEBHOOK_S: Final = 10.0
"""How long the webhook may take to answer."""

REDIS_S: Final = 5.0
"""How long Redis may take to answer."""

_log = logging.getLogger(__name__)

_AGENT: Final = re.compile(r"\d{3,4}|0\d{9}|27\d{9}|00\d{11,14}")
_CALLEE: Final = re.compile(r"0\d{9}|27\d{9}|00\d{11,14}")
_OUTBOUND_ID: Final = re.compile(r"random|tvc_\S+|0\d{9}|27\d{9}")
_REFERENCE: Final = re.compile(r"[A-Za-z0-9.\-_~:]*")


@dataclass(frozen=True, slots=True)
class Disposition:
    """How a call ends in its record; `known` is the outcome that this proves."""

    end_reason: str
    end_code: int | None
    talks: bool
    rings_s: float
    happened: str
    known: str


SCRIPTS: Final[Mapping[str, Disposition]] = {
    "answered": Disposition("hungup", 16, True, 8.0, "answered", "answered"),
    "answered_0": Disposition("hungup", 0, True, 8.0, "answered", "answered"),
    "cancelled": Disposition("hungup", 16, False, 6.0, "cancelled", "cancelled"),
    "voicemail": Disposition("voicemail", 16, True, 20.0, "machine", "machine"),
    "busy": Disposition("busy", 17, False, 2.0, "busy", "busy"),
    "reject": Disposition("reject", 21, False, 3.0, "rejected", "rejected"),
    "reject_19": Disposition("reject", 19, False, 25.0, "no_answer", "no_answer"),
    "reject_22": Disposition("reject", 22, False, 1.0, "invalid_number", "invalid_number"),
    "timeout": Disposition("timeout", 18, False, 30.0, "no_answer", "no_answer"),
    # No ringing is ever heard of, so 102 is read as a failure (the taxonomy's footnote).
    "timeout_102": Disposition("timeout", 102, False, 30.0, "no_answer", "failed"),
    "error_28": Disposition("error", 28, False, 0.2, "invalid_number", "invalid_number"),
    "error_34": Disposition("error", 34, False, 0.5, "congestion", "congestion"),
    "error_42": Disposition("error", 42, False, 0.5, "congestion", "congestion"),
    "error_127": Disposition("error", 127, False, 0.5, "failed", "failed"),
    "failed": Disposition("failed", None, False, 0.1, "failed", "failed"),
    "silent": Disposition("", None, False, 0.0, "unknown", "unknown"),
}
"""By name; after `silent` no record comes."""

MIX: Final[Mapping[str, float]] = {
    "answered": 45,
    "answered_0": 5,
    "cancelled": 6,
    "voicemail": 6,
    "busy": 8,
    "reject": 4,
    "reject_19": 3,
    "reject_22": 2,
    "timeout": 10,
    "timeout_102": 2,
    "error_28": 2,
    "error_34": 2,
    "error_42": 2,
    "error_127": 1,
    "failed": 1,
    "silent": 1,
}
"""What becomes of a dial to a number that no script was chosen for, by weight."""

RECORD_FAULTS: Final = frozenset({"lost", "late", "twice"})


@dataclass(slots=True)
class Click2DialCall:
    """One call, and its record: the truth."""

    agent: str
    callee: str
    reference: str
    """contact_ref or call_ref as the request had it, or as the PBX made it."""
    script: str
    happened: str
    """The outcome that it had."""
    known: str
    """The outcome that its record proves."""
    call_ref: str
    call_time: int = 0
    fault: str = ""
    """What goes wrong with its record: lost, late, twice; empty: nothing."""
    record: str = ""
    """The record as it was sent; empty while there is none."""
    sent: int = 0
    """How often it was handed to the webhook or the list."""
    ended: bool = False
    request: Mapping[str, Any] = field(default_factory=dict)


class Click2DialServer(Party):
    """The server. Records go to `webhook` (a URL) and to the lists at `redis_url`, where they are given.

    `scripts` says what becomes of a call to a callee, as it was dialled; others go by `mix` and the seed.
    `version` is the major one: below 3 records have the old spelling. Delays are multiplied by `time_scale`;
    a late record comes `late_s` later. `answer` is the body that a request is answered with.
    """

    def __init__(
        self,
        *,
        webhook: str | None = None,
        redis_url: str | None = None,
        version: int = 3,
        scripts: Mapping[str, str] | None = None,
        mix: Mapping[str, float] = MIX,
        time_scale: float = 1.0,
        late_s: float = 1.0,
        answer: bytes = b"",
        seed: int = 1,
        host: str = "127.0.0.1",
        port: int = 0,
        clock: Callable[[], float] = time,
    ) -> None:
        super().__init__(host=host, port=port, seed=seed)
        self.webhook = webhook
        self.version = version
        self.scripts = dict(scripts or {})
        for name in (*self.scripts.values(), *mix):
            if name not in SCRIPTS:
                raise SettingsError(
                    f"simulator: no such Click2Dial script {name!r}; write one of {', '.join(SCRIPTS)}"
                )
        self.calls: list[Click2DialCall] = []
        self.answers: Counter[int] = Counter()
        """Statuses that the webhook answered; 0: it could not be reached."""
        self._redis_url = redis_url
        self._redis: Redis | None = None
        self._http: aiohttp.ClientSession | None = None
        self._mix = dict(mix)
        self._time_scale = time_scale
        self._late_s = late_s
        self._answer = answer
        self._rng = Random(f"{seed}:click2dial")
        self._clock = clock
        self._armed: list[str] = []
        self._rates: dict[str, float] = {}
        self.route(
            "POST", "/click2dial/calls", self._create, lambda: web.Response(status=400, text="Refused")
        )

    async def __aenter__(self) -> Self:
        """Raises SettingsError where no Redis answers at `redis_url`."""
        if self._redis_url is not None:
            await _answering(self._redis_url)
        await super().__aenter__()
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=WEBHOOK_S))
        if self._redis_url is not None:
            self._redis = _client(self._redis_url)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await super().__aexit__(kind, error, trace)
        finally:
            if self._http is not None:
                await self._http.close()
            if self._redis is not None:
                await self._redis.aclose()

    # What goes on. --------------------------------------------------------------------------------

    def arm_record(self, fault: str, *, times: int = 1) -> None:
        """Let the records of the next `times` calls be lost, come late, or come twice."""
        if fault not in RECORD_FAULTS:
            raise SettingsError(f"simulator: no such fault {fault!r}; write one of {sorted(RECORD_FAULTS)}")
        self._armed += [fault] * times

    def records_at_random(self, rates: Mapping[str, float]) -> None:
        """From now on records are lost, late or doubled with these chances."""
        if not set(rates) <= RECORD_FAULTS or not 0 <= sum(rates.values()) <= 1:
            raise SettingsError(f"simulator: chances of {sorted(RECORD_FAULTS)}, together at most 1")
        self._rates = dict(rates)

    def call(
        self, agent: str, callee: str, script: str = "answered", *, reference: str = "", inbound: bool = False
    ) -> Click2DialCall:
        """A call that nobody asked the API for: a softphone dials, or (`inbound`) somebody calls."""
        call = self._begin(agent, callee, script, reference)
        self.spawn(self._play(call, inbound=inbound))
        return call

    async def idle(self, timeout_s: float = 30.0) -> None:
        """Wait until no call goes on and every record is sent."""
        async with asyncio.timeout(timeout_s):
            while self._background:
                await asyncio.wait(self._background)

    def truth(self) -> dict[str, Any]:
        """What happened, as a JSON object."""
        return {"calls": [asdict(call) for call in self.calls], "faults": dict(self.faults.struck)}

    def _begin(self, agent: str, callee: str, script: str, reference: str) -> Click2DialCall:
        how = SCRIPTS.get(script)
        if how is None:
            raise SettingsError(
                f"simulator: no such Click2Dial script {script!r}; write one of {', '.join(SCRIPTS)}"
            )
        fault = self._armed.pop(0) if self._armed else ""
        if not fault and self._rates:
            chance = self._rng.random()
            for name, rate in self._rates.items():
                chance -= rate
                if chance < 0:
                    fault = name
                    break
        number = len(self.calls) + 1
        call_ref = f"pbx-{int(self._clock())}-{number}"
        call = Click2DialCall(
            agent,
            callee,
            reference or f"made-{number}",
            script,
            how.happened,
            "unknown" if fault == "lost" else how.known,
            call_ref if self.version >= 3 else reference or call_ref,
            self._rng.randint(3, 240) if how.talks else 0,
            fault,
        )
        self.calls.append(call)
        return call

    async def _play(self, call: Click2DialCall, *, inbound: bool = False) -> None:
        how = SCRIPTS[call.script]
        dialed_at = datetime.fromtimestamp(self._clock(), UTC).strftime("%Y-%m-%d %H:%M:%S")
        if inbound:
            await self._push(INBOUND_LIST, msgspec.json.encode(self._inbound(call)))
        await asyncio.sleep((how.rings_s + call.call_time) * self._time_scale)
        call.ended = True
        if not how.end_reason:
            return
        raw = msgspec.json.encode(self._record(call, how, dialed_at, "inbound" if inbound else "outbound"))
        call.record = raw.decode()
        if call.fault == "lost":
            return
        if call.fault == "late":
            await asyncio.sleep(self._late_s)
        for _ in range(2 if call.fault == "twice" else 1):
            if await self._push(CDR_LIST, raw) or self.webhook is not None:
                call.sent += 1
            await self._post(raw)
        if not call.sent:
            call.known = "unknown"

    def _record(
        self, call: Click2DialCall, how: Disposition, dialed_at: str, direction: str
    ) -> dict[str, Any]:
        number = self._spelt(call.callee)
        payload: dict[str, Any] = {
            "extension": call.agent,
            "dial_number": "27110009000",
            "call_ref": call.call_ref,
            "dialed_at": dialed_at,
            "end_reason": how.end_reason,
            "end_code": how.end_code,
            "call_time": call.call_time,
            "hold_time": 0,
            "recording_url": f"http://pbx.test/recordings/{call.call_ref}",
        }
        if self.version >= 3:
            payload |= {
                "number": number,
                "contact_ref": call.reference[:CONTACT_REF_MAX],
                "call_dir": direction,
                "ref": "click-dial",
            }
        else:
            payload |= {"ref": number, "campaign_ref": direction}
        return {"type": "cdr", "payload": payload}

    def _inbound(self, call: Click2DialCall) -> dict[str, Any]:
        direction = {"call_dir" if self.version >= 3 else "campaign_ref": "inbound"}
        return {
            "type": "call",
            "payload": {
                "number": self._spelt(call.callee),
                "dial_number": "27110009000",
                "hold_time": self._rng.randint(0, 60),
                "call_ref": call.call_ref,
                "contact_ref": call.reference[:CONTACT_REF_MAX],
                "ref": call.agent,
            }
            | direction,
        }

    def _spelt(self, number: str) -> str:
        """The same South African number in one of its spellings; another number as it is."""
        for prefix in ("0027", "27", "0"):
            if number.startswith(prefix) and len(number) == len(prefix) + 9:
                rest = number[len(prefix) :]
                return self._rng.choice(("0", "27", "0027", "+27")) + rest
        return number

    async def _push(self, name: str, raw: bytes) -> bool:
        """Puts it on a list, if there are any; False if it is lost, which is said."""
        if self._redis is None:
            return True
        try:
            async with asyncio.timeout(REDIS_S):
                await self._redis.lpush(name, raw)
        except (RedisError, OSError) as error:  # OSError: TimeoutError is one
            _log.warning("a record is lost: Redis does not take it (%s): %r", _said(error), raw)
            return False
        return True

    async def _post(self, raw: bytes) -> None:
        if self.webhook is None or self._http is None:
            return
        for attempt in range(WEBHOOK_TRIES):
            try:
                async with self._http.post(
                    self.webhook, data=raw, headers={"Content-Type": "application/json"}
                ) as response:
                    status = response.status
            except (aiohttp.ClientError, TimeoutError):
                status = 0
            self.answers[status] += 1
            if 200 <= status < 300:
                return
            await asyncio.sleep(WEBHOOK_PAUSE_S * attempt * self._time_scale)

    # The request. ---------------------------------------------------------------------------------

    async def _create(self, request: web.Request) -> web.Response:
        try:
            body = msgspec.json.decode(await request.read())
        except msgspec.DecodeError:
            body = None
        if not isinstance(body, dict) or not all(
            isinstance(body.get(name), str) for name in ("agent", "callee", "outbound_id")
        ):
            return json_answer({"error": "agent, callee and outbound_id are needed"}, status=400)
        reference = body.get("contact_ref" if self.version >= 3 else "call_ref") or ""
        agent, callee = body["agent"], body["callee"]
        valid = (
            _AGENT.fullmatch(agent)
            and _CALLEE.fullmatch(callee)
            and _OUTBOUND_ID.fullmatch(body["outbound_id"])
            and isinstance(reference, str)
            and _REFERENCE.fullmatch(reference)
        )
        script = self.scripts.get(callee)
        if script is None:
            script = self._rng.choices(list(self._mix), list(self._mix.values()))[0]
        call = self._begin(agent, callee, script if valid else "error_28", str(reference))
        call.request = body
        self.spawn(self._play(call))
        return web.Response(body=self._answer, content_type="application/json")


def _client(url: str) -> Redis:
    """A client that asks once: a command that is sent again would be a second record."""
    return Redis.from_url(url, retry=Retry(NoBackoff(), 0))


async def _answering(url: str) -> None:
    """Raises SettingsError where no Redis answers."""
    try:
        async with _client(url) as redis, asyncio.timeout(REDIS_S):
            await redis.ping()
    except (RedisError, OSError, ValueError) as error:  # ValueError: it is no such URL
        raise SettingsError(
            f"simulator: no Redis answers where Click2Dial's records go ({_said(error)}); start one there, "
            "or have them posted to a webhook instead (--webhook URL)"
        ) from None


def _said(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
