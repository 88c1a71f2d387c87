"""Places dials: by whom, whether that is allowed, written down first, sent once, and its answer told.

Whoever wants a dial gives its parameters as JSON, by the names that its vendor gives them. This module finds
the account by which it goes, refuses what the settings do not allow, holds the parameters to their rules
(`listener.core.requests`), has the dial written down, and only then lets the adapter ask for the call: once,
in a task of its own, so that a caller who hangs up changes nothing. What the adapter heard becomes a fact of
the dial. A crash between the two leaves a dial that ends as unknown, and never a call that nobody asked for;
nothing here ever sends a dial again.

Hang-up, answer and recordings change a call that there is. They are sent at once and their answer is given
back; only a hang-up of a dial is a fact of the dial, told once the PBX accepted it: one that was refused, or
never sent, must not explain why the dial ended.

It refuses to know HTTP, SQL and settings: ways out are handed in as plain values.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Protocol, TypeVar, assert_never

import msgspec
import structlog
from msgspec import Struct, structs

from listener.core.calls import JsonObject
from listener.core.dialling import (
    DEADLINES,
    Accepted,
    Deadlines,
    Dial,
    Fact,
    HangupRequested,
    NotAnswered,
    Refused,
    System,
    placed,
)
from listener.core.requests import (
    TEXT_CHARS_MAX,
    Acknowledgement,
    Click2DialCall,
    GwsDial,
    GwsPreviewDial,
    NoojeeAnswer,
    NoojeeDial,
    NoojeeHangup,
    NoojeeStartRecording,
    NoojeeStopRecording,
    preview_dial,
)
from listener.errors import (
    InvalidRequest,
    KeyReused,
    NotAllowed,
    NotKnown,
    RemoteError,
    StoreError,
    StoreUnavailable,
    TooMany,
)

SENDING_MAX = 200
"""Dials that are being asked for at the same time; a further one is refused before it is written down."""

KEY_CHARS_MAX = 200
"""An idempotency key is no longer."""

NAMES_SHOWN_MAX = 10
"""So many names are proposed where a wrong one was given."""

PLACE_S = 10.0
"""How long the database may take to write a dial down, and how old a dial may be that is sent: by then its
caller has an answer. Less than he waits for it (`listener.api.REQUEST_S`), lest we dial when he gave up."""

TELL_S = 10.0
"""How long a caller waits for the store to note a hang-up that the PBX accepted."""

PREVIEW_S_MAX = 8 * 3600.0
"""How long ago a preview record may have been heard that is dialled by its handle: a shift."""

PREVIEW = "preview"
"""How a GWS dial of an outbound record is called, beside the names of `System`."""

SYSTEMS = (System.GWS.value, PREVIEW, System.NOOJEE.value, System.CLICK2DIAL.value)


class Watch(Protocol):
    """Who writes dials down and follows them: `listener.dialwatch.DialWatch`."""

    async def place(
        self, dial: Dial, key: str | None = None, request: JsonObject | None = None
    ) -> tuple[Dial, bool]:
        """Writes a dial down; with False the dial that has this key already. Raises `StoreError`."""

    async def tell(self, dial: str, fact: Fact, at: datetime) -> Dial | None:
        """Notes what was learnt of a dial; waits for a store that is away."""


class Written(Protocol):
    """What is written down of dials and calls: `listener.store.dials.Dials`. It raises `StoreError`."""

    async def keyed(self, key: str) -> Dial | None:
        """The dial that was placed with this key."""

    async def requested(self, id: str) -> JsonObject | None:
        """What was asked for when a dial was placed."""

    async def previews(self, account: int, since: datetime) -> list[bytes]:
        """The messages about outbound records that an account received since then, the newest first."""

    async def call_ids(self, call: int) -> tuple[str, ...]:
        """The ids by which the outside system knows a call."""

    async def called(self, accounts: Iterable[int], name: str) -> Dial | None:
        """The dial that is the call which the outside system calls so."""


class GwsWay(Struct, frozen=True):
    """A way out: an account at a GWS."""

    account: int
    name: str
    environment: str
    dials: bool
    """The settings allow it."""
    dial: Callable[[GwsDial | GwsPreviewDial], Awaitable[Acknowledgement]]


class NoojeeCalls(Protocol):
    """`listener.adapters.noojee.Noojee`. None of it raises."""

    async def dial(self, request: NoojeeDial) -> Acknowledgement:
        """Asks for a call."""

    async def hangup(self, request: NoojeeHangup) -> Acknowledgement:
        """Asks for a call to be hung up."""

    async def answer(self, request: NoojeeAnswer) -> Acknowledgement:
        """Asks a handset to answer."""

    async def start_recording(self, request: NoojeeStartRecording) -> Acknowledgement:
        """Asks for a recording."""

    async def stop_recording(self, request: NoojeeStopRecording) -> Acknowledgement:
        """Asks for its end."""


class NoojeeWay(Struct, frozen=True):
    """A way out: a Noojee, with the account of each extension."""

    name: str
    dials: bool
    accounts: Mapping[str, int]
    """By extension, without technology."""
    monitored: bool
    """Its events are listened to: dials ask for them."""
    calls: NoojeeCalls


class Click2DialWay(Struct, frozen=True):
    """A way out: a Click2Dial, with the account of each extension."""

    name: str
    dials: bool
    accounts: Mapping[str, int]
    before_v3: bool
    dial: Callable[[Click2DialCall], Awaitable[Acknowledgement]]


class Placed(Struct, frozen=True):
    """A dial that was asked for."""

    dial: Dial
    is_new: bool
    """False: its key was used before, and nothing is sent."""
    warnings: tuple[str, ...] = ()
    """What is allowed and often goes wrong."""


class _Ready(Struct, frozen=True):
    """A request that was checked, and how it goes out."""

    system: System
    account: int
    number: str
    request: GwsDial | GwsPreviewDial | NoojeeDial | Click2DialCall
    send: Callable[[], Awaitable[Acknowledgement]]
    device: str | None = None
    reference: str | None = None
    caller_id: str | None = None


class _Asked(Struct, frozen=True):
    """What every request may have beside the parameters of its system."""

    system: str
    account: str | None = None
    environment: str | None = None
    campaign: str | None = None

    def __post_init__(self) -> None:
        for name in ("account", "environment", "campaign"):
            value = getattr(self, name)
            if value is None:
                continue
            if not value.strip():
                raise InvalidRequest(name, "is empty", "give it a value, or leave it out")
            if len(value) > TEXT_CHARS_MAX:
                raise InvalidRequest(name, f"has {len(value)} characters", f"shorten it to {TEXT_CHARS_MAX}")
            if not value.isprintable():
                raise InvalidRequest(name, "has control characters", "leave them out")


_S = TypeVar("_S", bound=Struct)
_W = TypeVar("_W", NoojeeWay, Click2DialWay)

_REFERENCES = ("contact_ref", "call_ref", "reference")
"""What Click2Dial calls a reference: from v3.0.0, before that, and in `Click2DialCall`."""

_HANDLE = "recordHandle"
"""What Genesys calls the name of an outbound record, in a record and in a request that names one."""

_OURS = frozenset(_Asked.__struct_fields__)


def _new_id() -> str:
    return f"d-{secrets.token_hex(8)}"


class Switchboard:
    """Places dials. `run` it in a task: it holds those that are being sent.

    The ways may be changed while it runs: `gws` by the account's name, the others by the PBX's.
    """

    def __init__(
        self,
        watch: Watch,
        written: Written,
        *,
        deadlines: Deadlines = DEADLINES,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),  # noqa: TID251 - a shell's default
        new_id: Callable[[], str] = _new_id,
        sending_max: int = SENDING_MAX,
        place_s: float = PLACE_S,
        tell_s: float = TELL_S,
    ) -> None:
        self.gws: dict[str, GwsWay] = {}
        self.noojee: dict[str, NoojeeWay] = {}
        self.click2dial: dict[str, Click2DialWay] = {}
        self._watch = watch
        self._written = written
        self._deadlines = deadlines
        self._wall = wall
        self._new_id = new_id
        self._sending_max = sending_max
        self._place_s = place_s
        self._tell_s = tell_s
        self._sending = 0
        self._tasks: asyncio.TaskGroup | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._log = structlog.get_logger()

    async def run(self) -> None:
        """Holds the dials that are being sent, until cancelled; those end with it."""
        async with asyncio.TaskGroup() as self._tasks:
            try:
                await asyncio.Event().wait()
            finally:
                self._tasks = None

    async def drain(self) -> None:
        """Returns when no dial is being sent; bound it with a timeout."""
        await self._idle.wait()

    async def place(self, fields: JsonObject, key: str | None = None) -> Placed:
        """Place a dial. `fields` are `system` (one of `SYSTEMS`), the `account` or `environment` by which it
        goes, a `campaign` to group it by, and the request's own parameters by their vendor's names. Of a
        preview record that was heard, `recordHandle` alone will do, or the `message` that brought it.

        It is written down when this returns, and being asked for. Raises `InvalidRequest`, `NotKnown`,
        `NotAllowed`, `KeyReused`, `TooMany` or `StoreError`, the last after `PLACE_S` at most; in each of
        these cases nothing is sent, and a dial that was written all the same ends as unknown.
        """
        try:
            async with asyncio.timeout(self._place_s):
                return await self._place(fields, key)
        except TimeoutError:
            raise StoreUnavailable(
                f"the database did not take the dial within {self._place_s:g} s, so nothing was sent; "
                "ask again with the same key when it answers"
            ) from None

    async def _place(self, fields: JsonObject, key: str | None) -> Placed:
        if key is not None and not (0 < len(key) <= KEY_CHARS_MAX and key.isascii() and key.isprintable()):
            raise InvalidRequest(
                "Idempotency-Key",
                "is empty, too long, or has characters that no header should have",
                f"write up to {KEY_CHARS_MAX} printable ASCII characters",
            )
        asked = _converted({name: value for name, value in fields.items() if name in _OURS}, _Asked)
        own = {name: value for name, value in fields.items() if name not in _OURS}
        if asked.system == PREVIEW and "message" in own:
            own = _from_message(own)
        request: JsonObject = {**structs.asdict(asked), **own}
        # First of all: what this request needs may be forgotten, or forbidden, since it was carried out.
        if key is not None and (before := await self._written.keyed(key)) is not None:
            return await self._again(before, request)
        if asked.system == PREVIEW and _HANDLE in own:
            own = await self._heard_record(asked, own)
            request |= own
        id = self._new_id()
        ready = self._ready(asked, own, id)
        if self._tasks is None or self._sending >= self._sending_max:
            raise TooMany(f"{self._sending} dials are being sent, or we are stopping; ask again in a moment")
        dial = placed(
            id,
            ready.account,
            ready.system,
            ready.number,
            self._wall(),
            device=ready.device,
            reference=ready.reference,
            caller_id=ready.caller_id,
            campaign=asked.campaign,
            deadlines=self._deadlines,
        )
        # Counted before the first wait, so that the bound holds for callers at the same time.
        self._sending += 1
        self._idle.clear()
        is_new = False
        try:
            kept, is_new = await self._watch.place(dial, key, request)
            if is_new and self._tasks is not None:
                self._tasks.create_task(self._send(ready, kept), name=f"dial {id}")
        finally:
            if not is_new:
                self._done()
        warnings = ready.request.warnings if isinstance(ready.request, Click2DialCall) else ()
        return Placed(kept, True, warnings) if is_new else await self._again(kept, request)

    async def _again(self, kept: Dial, request: JsonObject) -> Placed:
        """The dial that has the key of this request already. Raises `KeyReused`."""
        asked = await self._written.requested(kept.id)
        if asked is None or _without_record(asked) != _without_record(request):
            raise KeyReused(
                f"the Idempotency-Key was used for another request, the dial {kept.id}; "
                "give each request a key of its own"
            )
        return Placed(kept, False)

    async def _send(self, ready: _Ready, dial: Dial) -> None:
        """Asks for the call, once, and tells the dial what came of that."""
        fact: Acknowledgement
        try:
            if (late := self._too_late(dial)) is not None:
                fact = NotAnswered(sent=False, system=ready.system, text=late)
            else:
                fact = await ready.send()
        except Exception as error:  # noqa: BLE001 - it may have been sent, and must not be sent again
            self._log.exception("a dial broke", dial=dial.id)
            fact = NotAnswered(
                sent=True, system=ready.system, text=f"a defect of ours: {type(error).__name__}"
            )
        finally:
            self._done()
        self._log.info("dial", dial=dial.id, system=str(ready.system), said=type(fact).__name__.lower())
        with suppress(StoreError):  # its deadline ends it
            await self._watch.tell(dial.id, fact, self._wall())

    def _too_late(self, dial: Dial) -> str | None:
        """Why a dial is not sent any more: this process, or its machine, stood still meanwhile."""
        now = self._wall()
        if now - dial.requested_at > timedelta(seconds=self._place_s):
            return f"it was asked for more than {self._place_s:g} s before it could be sent; ask again"
        if dial.deadline_at is not None and now >= dial.deadline_at:
            return "its deadline passed before it could be sent; raise limits.dial_requested_s"
        return None

    def _done(self) -> None:
        self._sending -= 1
        if self._sending == 0:
            self._idle.set()

    # ── Which way ─────────────────────────────────────────────────────────────────────────────────────

    def _ready(self, asked: _Asked, own: JsonObject, id: str) -> _Ready:
        match asked.system:
            case System.GWS.value:
                return self._by_gws(asked, own, id)
            case "preview":
                return self._by_preview(asked, own)
            case System.NOOJEE.value:
                return self._by_noojee(asked, own)
            case System.CLICK2DIAL.value:
                return self._by_click2dial(asked, own, id)
            case _:
                raise InvalidRequest(
                    "system", f"{asked.system!r:.40} is none of ours", f"write {', '.join(SYSTEMS)}"
                )

    def _gws_way(self, asked: _Asked) -> GwsWay:
        if asked.account is not None:
            way = self.gws.get(asked.account)
            if way is None:
                raise NotKnown(f"there is no account {asked.account!r:.60}; {_known(self.gws)}")
        else:
            there = [way for way in self.gws.values() if asked.environment in (None, way.environment)]
            ways = [way for way in there if way.dials]
            if len(ways) != 1:
                raise InvalidRequest(
                    "account",
                    "does not say by whom to dial",
                    f"name it; {_known([way.name for way in ways])}",
                )
            (way,) = ways
        if not way.dials:
            raise NotAllowed(
                f"the settings do not let this listener dial by {way.name}; set dials = true, then SIGHUP"
            )
        return way

    def _by_gws(self, asked: _Asked, own: JsonObject, id: str) -> _Ready:
        way = self._gws_way(asked)
        request = _converted(own, GwsDial)
        if request.reference is None:
            request = structs.replace(request, reference=id)
        return _Ready(
            System.GWS,
            way.account,
            request.number,
            request,
            lambda: way.dial(request),
            device=request.device,
            reference=request.reference,
        )

    def _by_preview(self, asked: _Asked, own: JsonObject) -> _Ready:
        way = self._gws_way(asked)
        own = {name: value for name, value in own.items() if name != _HANDLE}
        request = _converted(own, GwsPreviewDial)
        caller_id = request.outbound_record.get("outboundCallerId")
        return _Ready(
            System.GWS,
            way.account,
            request.number,
            request,
            lambda: way.dial(request),
            device=request.device_path and request.device_path.rpartition("/")[2],
            caller_id=caller_id if isinstance(caller_id, str) and caller_id else None,
        )

    async def _heard_record(self, asked: _Asked, own: JsonObject) -> JsonObject:
        """The request with the outbound record that was heard with its handle. Raises as `place`."""
        way, handle = self._gws_way(asked), own[_HANDLE]
        if "outboundRecord" in own:
            raise InvalidRequest(_HANDLE, "stands beside a record that has one", "give one of them")
        for raw in await self._written.previews(way.account, self._wall() - timedelta(seconds=PREVIEW_S_MAX)):
            try:
                record = preview_dial(raw).outbound_record
            except InvalidRequest:
                continue  # of a campaign, or of a record that was chained
            if record.get(_HANDLE) == handle:
                return {"outboundRecord": record, **own}
        raise NotKnown(
            f"{way.name} heard of no preview record {handle!r:.40} lately; have /v2/me/outbound among the "
            "channels of its environment, or give the record whole"
        )

    def _noojee_way(self, environment: str | None) -> NoojeeWay:
        return _only(self.noojee, environment, "noojee")

    def _by_noojee(self, asked: _Asked, own: JsonObject) -> _Ready:
        way = _allowed(self._noojee_way(asked.environment), "noojee")
        request = _converted({"monitored": way.monitored, **own}, NoojeeDial)
        account = _account(way.accounts, way.name, "extenOrUniqueId", request.exten_or_unique_id)
        return _Ready(
            System.NOOJEE,
            account,
            request.number,
            request,
            lambda: way.calls.dial(request),
            device=request.exten_or_unique_id,
            caller_id=request.caller_id or None,
        )

    def _by_click2dial(self, asked: _Asked, own: JsonObject, id: str) -> _Ready:
        way = _allowed(_only(self.click2dial, asked.environment, "click2dial"), "click2dial")
        # Its name depends on the version, which the settings know. None is none, and ours takes its place.
        given = {name: own[name] for name in _REFERENCES if own.get(name) is not None}
        if len(given) > 1:
            raise InvalidRequest(" and ".join(given), "are names of one parameter", "give one of them")
        reference = next(iter(given.values()), id)
        rest = {name: value for name, value in own.items() if name not in _REFERENCES}
        request = _converted({**rest, "reference": reference, "before_v3": way.before_v3}, Click2DialCall)
        account = _account(way.accounts, way.name, "agent", request.agent)
        shown = request.outbound_id
        return _Ready(
            System.CLICK2DIAL,
            account,
            request.callee,
            request,
            lambda: way.dial(request),
            device=request.agent,
            reference=request.reference,
            caller_id=shown if shown.isdecimal() else None,
        )

    # ── Calls that there are ──────────────────────────────────────────────────────────────────────────

    async def hang_up(self, dial: Dial) -> Dial:
        """Ask for a dial to be hung up, and give it as it is then.

        Only Noojee can, by the id of its call, since by extension it may be another call. It is a fact of the
        dial only when Noojee accepted it. Raises `NotAllowed` where that cannot be done, and what `answered`
        raises.
        """
        if dial.outcome is not None:
            return dial
        if dial.system is not System.NOOJEE:
            raise NotAllowed(f"{dial.system} has no request that hangs up; hang up at the telephone")
        way = next((way for way in self.noojee.values() if dial.account in way.accounts.values()), None)
        if way is None:
            raise NotKnown(f"no [noojee] of the settings has the account of the dial {dial.id}; add it")
        _allowed(way, "noojee")
        ids = () if dial.call is None else await self._written.call_ids(dial.call)
        if not ids:
            raise NotAllowed(
                f"which call the dial {dial.id} is was not heard yet, and by extension another call might be "
                "hung up; ask again in a moment"
            )
        asked_at = self._wall()
        said = await way.calls.hangup(NoojeeHangup(exten_or_unique_id=ids[0]))
        self._log.info("hang-up", dial=dial.id, said=type(said).__name__.lower())
        answered(said)
        return await self._hung_up(way, ids[0], asked_at, dial) or dial

    async def _hung_up(
        self, way: NoojeeWay, call_id: str, asked_at: datetime, dial: Dial | None = None
    ) -> Dial | None:
        """Tell the dial of a call that its PBX took our hang-up. None where no dial has that id, as none has
        an extension: by that it may have been another call."""
        try:
            async with asyncio.timeout(self._tell_s):
                dial = dial or await self._written.called(way.accounts.values(), call_id)
                return dial and await self._watch.tell(dial.id, HangupRequested(), asked_at)
        except (TimeoutError, StoreError) as error:
            # It was done, and an error would say that it was not. The watch notes it when the store is back.
            self._log.warning("a hang-up is not noted yet", call=call_id, error=str(error))
            return None

    async def control(self, action: str, fields: JsonObject) -> None:
        """Have Noojee do something with a call: `hangup`, `answer`, `start` or `stop` (recording).

        `fields` are the `environment` and the request's own parameters. A hang-up by the id of a call is a
        fact of the dial that the call is. Raises as `place`, and as `answered`.
        """
        asked = _converted({"system": "noojee", **{n: v for n, v in fields.items() if n in _OURS}}, _Asked)
        own = {name: value for name, value in fields.items() if name not in _OURS}
        if asked.system != System.NOOJEE:
            raise NotAllowed(f"{asked.system} has no request for that; Noojee has")
        way = _allowed(self._noojee_way(asked.environment), "noojee")
        said: Acknowledgement
        asked_at, hung_up = self._wall(), None
        match action:
            case "hangup":
                hung_up = _converted(own, NoojeeHangup)
                said = await way.calls.hangup(hung_up)
            case "answer":
                said = await way.calls.answer(_converted(own, NoojeeAnswer))
            case "start":
                said = await way.calls.start_recording(_converted(own, NoojeeStartRecording))
            case "stop":
                said = await way.calls.stop_recording(_converted(own, NoojeeStopRecording))
            case _:
                raise InvalidRequest("action", f"{action!r:.40} is none", "write start or stop")
        self._log.info("asked a pbx", action=action, environment=way.name)
        answered(said)
        if hung_up is not None:
            await self._hung_up(way, hung_up.exten_or_unique_id, asked_at)


def _from_message(own: JsonObject) -> JsonObject:
    """The parameters of a preview dial, with the record that their message brought. Raises
    `InvalidRequest`."""
    message, device = own["message"], own.get("devicePath")
    if not own.keys() <= {"message", "devicePath"} or not isinstance(device, str | None):
        raise InvalidRequest("message", "is the whole request", "give devicePath beside it, or nothing")
    if not isinstance(message, dict):
        raise InvalidRequest("message", "is no JSON object", "give the message as it was heard")
    record = preview_dial(message).outbound_record
    return {"outboundRecord": record} if device is None else {"outboundRecord": record, "devicePath": device}


def _without_record(request: JsonObject) -> JsonObject:
    """What was asked for: a record that was found by its handle was not, and is forgotten some day."""
    if _HANDLE not in request:
        return request
    return {name: value for name, value in request.items() if name != "outboundRecord"}


def answered(said: Acknowledgement) -> None:
    """Returns where a system said yes, and raises `RemoteError` with what it said instead."""
    match said:
        case Accepted():
            return
        case Refused():
            text = f"{said.cause.system} refused: {said.cause} {said.cause.text}".rstrip()
            raise RemoteError(f"{text}; see whether it knows the extension and the call")
        case NotAnswered():
            sent = "it may have been done" if said.sent else "nothing was sent"
            text = f"{said.system} did not answer, {sent}: {said.text}".rstrip(": ")
            raise RemoteError(f"{text}; look at its base_url, the network and the call")
        case _:
            assert_never(said)


def _converted(fields: JsonObject, kind: type[_S]) -> _S:
    """The fields as a request; what is of the wrong type, lacking or too much is said by its name."""
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        what, _, where = text.partition(" - at `$")
        name = where.strip("`.") or text.partition("`")[2].partition("`")[0] or "request"
        if "unknown field" in text:
            known = ", ".join(field.encode_name for field in structs.fields(kind))
            raise InvalidRequest(name, "is no parameter of this request", f"it has {known}") from None
        if "missing required field" in text:
            raise InvalidRequest(name, "is lacking", "give it") from None
        raise InvalidRequest(name, what[0].lower() + what[1:], "write it as the vendor's page does") from None


def _only(ways: Mapping[str, _W], name: str | None, section: str) -> _W:
    """The PBX of that name, or the only one."""
    if name is not None:
        if name not in ways:
            raise NotKnown(f"there is no [{section}.{name[:40]}]; {_known(ways)}")
        return ways[name]
    if not ways:
        raise NotKnown(f"the settings have no [{section}.NAME]; write one, see the README, Dials")
    if len(ways) > 1:
        raise InvalidRequest("environment", "does not say by which PBX", f"name it; {_known(ways)}")
    (way,) = ways.values()
    return way


def _allowed(way: _W, section: str) -> _W:
    if not way.dials:
        raise NotAllowed(
            f"the settings do not let this listener dial by [{section}.{way.name}]; set dials = true there"
        )
    return way


def _account(accounts: Mapping[str, int], pbx: str, argument: str, device: str) -> int:
    """The account of an extension, which may be written with its technology: exactly, unlike what a PBX says
    of a channel, since `SIP/101-boss` is another telephone than `SIP/101`."""
    bare = device.rpartition("/")[2]
    if bare not in accounts:
        raise NotKnown(
            f"{argument}: {device!r:.60} is no extension of {pbx} in the settings; add it to extensions"
        )
    return accounts[bare]


def _known(names: Mapping[str, object] | list[str]) -> str:
    shown = ", ".join(sorted(names)[:NAMES_SHOWN_MAX])
    return f"known are {shown}{', …' if len(names) > NAMES_SHOWN_MAX else ''}" if shown else "there is none"
