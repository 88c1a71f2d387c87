"""Noojee Contact's CallManagementAPI: dial, hang up, answer, start and stop recording; and its events.

Facts that this file rests on (vendor's pages): every operation is a POST with its arguments in the query and
an empty body; the API key is one of those arguments, so that a URL must never be shown; every reply has a
`Code`, 0 for success, negative for an error, positive for a notice; start and stop recording answer HTTP 200
or an error. `Code` 0 to a dial means that it was queued, and no more: what becomes of it is heard from
subscribe.
"""

import asyncio
import random
import ssl
import uuid
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Protocol
from urllib.parse import quote, quote_plus, urlencode

import msgspec
import structlog
from msgspec import Struct
from yarl import URL

from listener.adapters.exchange import (
    REQUEST_S,
    Answer,
    NoAnswer,
    Secrets,
    Trouble,
    exchange,
    login_refused,
    refusal,
    unanswered,
)
from listener.core.calls import Heard
from listener.core.dialling import Accepted, Cause, Refused, System
from listener.core.pbx import NoojeeEvent, noojee_channel, read_noojee
from listener.core.requests import (
    Acknowledgement,
    NoojeeAnswer,
    NoojeeDial,
    NoojeeHangup,
    NoojeeStartRecording,
    NoojeeStopRecording,
    build,
)
from listener.errors import LoginRefused, RemoteUnavailable


class Noojee:
    """One Noojee server. `base_url` is the server without a path; `api_key` is a global key (a user key has
    no access to calls). A request may take `request_s`. No method raises, and none asks twice."""

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        tls: ssl.SSLContext | None = None,
        request_s: float = REQUEST_S,
    ) -> None:
        self._base_url = str(URL(base_url)).rstrip("/")
        self._api_key = api_key
        self._secrets = Secrets([api_key])
        self._tls = tls
        self._request_s = request_s

    async def dial(self, request: NoojeeDial) -> Acknowledgement:
        """Asks for a call. Accepted carries the SessionID, which matches nothing that is heard later."""
        return self._acknowledgement(await self._send(request))

    async def hangup(self, request: NoojeeHangup) -> Acknowledgement:
        """Asks for a call to be hung up."""
        return self._acknowledgement(await self._send(request))

    async def answer(self, request: NoojeeAnswer) -> Acknowledgement:
        """Asks a handset to answer."""
        return self._acknowledgement(await self._send(request))

    async def start_recording(self, request: NoojeeStartRecording) -> Acknowledgement:
        """Asks for a call to be recorded."""
        return self._acknowledgement(await self._send(request), by_status=True)

    async def stop_recording(self, request: NoojeeStopRecording) -> Acknowledgement:
        """Asks for no more recording."""
        return self._acknowledgement(await self._send(request), by_status=True)

    async def _send(
        self, request: NoojeeDial | NoojeeHangup | NoojeeAnswer | NoojeeStartRecording | NoojeeStopRecording
    ) -> Answer | NoAnswer:
        built = build(request)
        return await exchange(
            built.method,
            URL(f"{self._base_url}{built.target}&apiKey={quote_plus(self._api_key)}", encoded=True),
            headers={"Content-Type": built.content_type},
            secrets=self._secrets,
            body=built.body,
            tls=self._tls,
            within_s=self._request_s,
        )

    def _acknowledgement(self, answer: Answer | NoAnswer, *, by_status: bool = False) -> Acknowledgement:
        """What was said; `by_status`: HTTP 200 alone is success."""
        if isinstance(answer, NoAnswer):
            return unanswered(System.NOOJEE, answer)
        code, message = answer.integer("Code"), answer.json().get("Message")
        text = self._secrets.one_line(message) if isinstance(message, str) else ""
        if code is not None and code < 0:
            if "apikey" in text.lower():  # no list of codes exists; a message that names the key is about it
                return login_refused(System.NOOJEE, f"Code {code} {text}")
            return Refused(Cause(System.NOOJEE, "Code", str(code), text))
        if answer.status >= 300:
            return refusal(System.NOOJEE, answer)
        if code is None and not by_status:
            return unanswered(System.NOOJEE, answer)
        if code:
            structlog.get_logger().warning("noojee accepted with a notice", code=code, message=text)
        session = answer.integer("SessionID")
        return Accepted(None if session is None else str(session))


# ── Hearing ───────────────────────────────────────────────────────────────────────────────────────────

POLL_S = 25.0
"""How long a subscribe that finds nothing may last at the server (its timeOut)."""

POLL_MARGIN_S = 15.0
"""How much longer we wait for its answer: a read time-out below timeOut loses every quiet poll."""

REPLY_BYTES_MAX = 16 * 1024 * 1024
"""The largest reply of a subscribe that is read; an event has some 300 bytes."""

EVENTS_MAX = 2**17
"""Of one extension in one reply; positions count in steps of it. What is beyond would be a reply of 40 MB."""

SEQUENCE_MAX = 2**63 // EVENTS_MAX - 1
"""A larger number leaves no room for a position; it is taken for none."""

RETRY_S = 0.5
RETRY_S_MAX = 30.0
"""Between two polls that failed: doubled each time, up to this, and half of it by chance."""

REPLIES_UNREADABLE_MAX = 3
"""So often the same poll is tried again when its reply makes no sense; then its place is given up, because
the same reply would come for ever."""

POLL_S_MIN = 0.1
"""A server that says at once that nothing happened is asked again no sooner."""

JOIN_S = 0.3
"""A poll runs for so long before another one takes its place for a new extension: a server takes 100 ms to
gather events, and dials by the hundred must not keep every poll from being answered."""

_STREAMS = uuid.UUID("6f1d9f0e-3b0c-5d55-9a6e-0c6a4d0f5e21")
"""The namespace of the streams' names (RFC 9562, 5.5)."""


class NoojeePlace(Struct, frozen=True):
    """Where the hearing of one PBX goes on. Keep it, and give it to the next `NoojeeEvents`."""

    generation: str
    """UUID text: the sequence numbers since the last time that they began anew."""
    seq: int


class NoojeeHeard(Struct, frozen=True):
    """One event as it came. `stream` and `position` are its place: the same event asked for again, because
    nobody knows whether it was stored, has the same."""

    extension: str
    """Empty for a reply that could not be read."""
    stream: str
    position: int
    received_at: datetime
    channel: str
    """What `listener.core.decode.decode` must be given with `raw`."""
    raw: bytes
    """Its exact bytes, without those of the events beside it; of a reply that could not be read, all but our
    key."""
    event: NoojeeEvent | None
    """None where it makes no sense; `raw` has it."""

    def heard(self, account: int) -> Heard:
        """The event as the pipeline takes it."""
        return Heard(account, self.stream, self.position, self.received_at, self.channel, self.raw)


class NoojeeHearing(Protocol):
    """Where `NoojeeEvents` takes what it hears."""

    async def hear(self, events: Sequence[NoojeeHeard], committed: Callable[[], None]) -> None:
        """Takes events of one extension, in order; returns when there is room for more; calls `committed`
        on the event loop once they are stored."""

    def keep(self, place: NoojeePlace) -> None:
        """Everything up to here is stored: a later run may go on from here."""

    def answered(self, until: datetime) -> None:
        """Everything that happened at the extensions until then was handed on, stored or not."""

    def covered(self, cause: str, detail: str, at: datetime) -> None:
        """From now on the extensions are heard (`cause` empty), or not, for one of `GAP_CAUSES`; `detail` is
        a sentence for a person. Only changes are told."""


class _Reply(Struct):
    Data: dict[str, list[msgspec.Raw]] | None = None
    seq: int | None = None
    Code: int | None = None
    Message: str | None = None


class _Unreadable(Exception):
    """A reply that makes no sense, or is too large to be looked at; the text says why."""


class NoojeeEvents:
    """Hears what happens at the extensions of one PBX. Give it extensions with `watch`, and run `run`.

    One long poll asks for all of them. Its sequence number is the acknowledgement: an event comes again until
    a later number is asked for, so nothing is lost with a reply that was cut or a poll that was given up, and
    a new extension joins at once, by a poll in the place of the one that waits. An event's place follows from
    the number that was asked with, so what comes twice counts once. `keep` is told a number only when all up
    to it is stored.

    With number 0 the server tells what is live now, and with a timeOut of 0 at once. That is where a first
    run begins; and a PBX that counts from the beginning again (a restart) is heard anew from there, with the
    gap `session lost` for what ended meanwhile. Until the first number comes, a reply that is cut may take
    the events of a call with it that ends before the next. How long a server keeps events is not documented:
    after a long break they may be lost, which the gap of the break shows. A PBX that restarts and counts
    beyond our number before we ask again cannot be told from one that did not.

    Only what a dial with monitored=yes, or the PBX's settings, let it tell is heard at all.
    """

    def __init__(
        self,
        pbx: str,
        base_url: str,
        api_key: str,
        hearing: NoojeeHearing,
        *,
        place: NoojeePlace | None = None,
        tls: ssl.SSLContext | None = None,
        poll_s: float = POLL_S,
        retry_s: float = RETRY_S,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),  # noqa: TID251 - a shell's default
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._pbx = pbx
        self._url = f"{str(URL(base_url)).rstrip('/')}/servicemanager/rest/CallManagementAPI/subscribe"
        self._api_key = api_key
        self._secrets = Secrets([api_key])
        self._hearing = hearing
        self._tls = tls
        self._poll_s = poll_s
        self._retry_s = retry_s
        self._wall = wall
        self._pause = pause
        self._jitter = jitter
        self._place = place or _new_place()
        self._watched: Counter[str] = Counter()
        self._joined = asyncio.Event()
        self._cause: str | None = None
        self._unreadable = 0
        self._storing: deque[_Storing] = deque()

    @property
    def place(self) -> NoojeePlace:
        """What is asked with next; what is stored may be behind."""
        return self._place

    def watch(self, extension: str) -> None:
        """Hear this extension (without technology) from now on; before its dial is sent. Counted: as often
        as it is watched it must be unwatched."""
        self._watched[extension] += 1
        if self._watched[extension] == 1:
            self._joined.set()

    def unwatch(self, extension: str) -> None:
        """The next poll need not ask for it any more."""
        self._watched[extension] -= 1
        if self._watched[extension] <= 0:
            del self._watched[extension]

    async def run(self) -> None:
        """Hears until cancelled. Raises nothing of the PBX's: whatever is wrong there is told by `covered`,
        and tried again."""
        failures = 0
        while True:
            while not self._watched:
                self._joined.clear()
                await self._joined.wait()
            if await self._poll():
                failures = 0
                continue
            longest_s = min(self._retry_s * 2**failures, RETRY_S_MAX)
            failures = min(failures + 1, 16)
            await self._pause(longest_s * (0.5 + self._jitter() / 2))

    async def _poll(self) -> bool:
        """One poll and what it brought; False if there must be a pause before the next."""
        self._joined.clear()
        if self._place.seq == 0:
            self._place = _new_place()  # what is live now, asked for twice, is two answers
        after = self._place
        # While we are deaf, the sooner it answers the sooner that is over.
        timeout_s = self._poll_s if self._cause == "" else 0.0
        loop = asyncio.get_running_loop()
        asked_at, began = self._wall(), loop.time()
        answer = await self._asked(sorted(self._watched), timeout_s)
        if answer is None:
            return True
        received_at, took_s = self._wall(), loop.time() - began
        try:
            reply, seq = self._read(answer)
        except LoginRefused as error:
            return self._deaf("login refused", str(error))
        except RemoteUnavailable as error:
            return self._deaf("disconnected", str(error))
        except _Unreadable as error:
            return await self._unreadable_reply(answer, str(error), received_at)
        self._unreadable = 0
        if seq < after.seq:
            self._place = _new_place()
            detail = (
                f"{self._pbx} counts from the beginning again ({seq} after {after.seq}): it was restarted"
            )
            return self._deaf("session lost", detail)
        told = {extension: events for extension, events in (reply.Data or {}).items() if events}
        # A number that stays where it is, or fits no position, names no place that could be asked for again.
        anew = (bool(told) and seq == after.seq) or seq > SEQUENCE_MAX
        heard = [
            self._heard(after, extension, number, received_at, bytes(raw))
            for extension, events in told.items()
            for number, raw in enumerate(events, start=1)
        ]
        self._place = _new_place() if anew else NoojeePlace(after.generation, seq)
        waited = self._cause == ""
        self._covered("", "")
        if heard or self._place != after:
            await self._handed(heard, self._place)
        if not anew:
            # A server that waited the whole timeOut had nothing to tell until that was over.
            quiet = not told and took_s >= timeout_s
            self._hearing.answered(asked_at + timedelta(seconds=timeout_s) if quiet else asked_at)
        if self._place == after and not heard and waited and loop.time() - began < POLL_S_MIN:
            await self._pause(POLL_S_MIN)
        return not anew

    async def _unreadable_reply(self, answer: Answer | NoAnswer, why: str, at: datetime) -> bool:
        """What is done about a reply that makes no sense: it is asked for again, then kept without our
        key, and its place given up."""
        oversized = isinstance(answer, Answer) and answer.trouble is Trouble.TOO_LARGE
        self._unreadable += 1
        if self._unreadable >= REPLIES_UNREADABLE_MAX and isinstance(answer, Answer):
            self._unreadable = 0
            self._place = _new_place()
            if not oversized:
                # What answers there may be anything, also a proxy's page that quotes the URL with our key.
                raw = self._secrets.hide_in(answer.body)
                await self._handed([self._heard(self._place, "", 1, at, raw)], self._place)
        return self._deaf("oversized" if oversized else "malformed", why)

    async def _asked(self, extensions: list[str], timeout_s: float) -> Answer | NoAnswer | None:
        """The answer of one poll; None if it was given up because an extension joined."""
        query = {
            "exten": ",".join(extensions),
            "lastSequenceNumber": str(self._place.seq),
            "timeOut": f"{timeout_s:g}",
            "apiKey": self._api_key,
        }
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with asyncio.TaskGroup() as tasks:
            poll = tasks.create_task(
                exchange(
                    "POST",
                    URL(f"{self._url}?{urlencode(query, quote_via=quote, safe=',')}", encoded=True),
                    headers={"Content-Type": "application/x-www-form-urlencoded"},
                    secrets=self._secrets,
                    tls=self._tls,
                    within_s=timeout_s + POLL_MARGIN_S,
                    bytes_max=REPLY_BYTES_MAX,
                )
            )
            joining = tasks.create_task(self._joined.wait())
            await asyncio.wait((poll, joining), return_when=asyncio.FIRST_COMPLETED)
            joining.cancel()
            if not poll.done():
                # Should it be answered just now, that answer comes again: the number is the same.
                await asyncio.wait((poll,), timeout=max(0.0, began + JOIN_S - loop.time()))
                poll.cancel()
        return None if poll.cancelled() else poll.result()

    def _read(self, answer: Answer | NoAnswer) -> tuple[_Reply, int]:
        """The reply and its number; raises what it is instead."""
        where = f"Noojee at {self._pbx}"
        if isinstance(answer, NoAnswer):
            raise RemoteUnavailable(f"{where}: {answer.why}; check base_url and the network")
        if answer.trouble is Trouble.TOO_LARGE:
            raise _Unreadable(f"{where}: a reply has {answer.why}")
        if answer.trouble is not None:
            raise RemoteUnavailable(f"{where}: the reply was cut: {answer.why}")
        if answer.status in (401, 403):
            raise LoginRefused(f"{where}: HTTP {answer.status} {answer.said}; check the apiKey")
        if answer.status != 200:
            leads = f" to {answer.location}" if answer.location else ""
            raise RemoteUnavailable(f"{where}: HTTP {answer.status}{leads} {answer.said}; check base_url")
        try:
            reply = msgspec.json.decode(answer.body, type=_Reply)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise _Unreadable(f"{where}: {error}; it said {answer.said}") from None
        if reply.Code is not None and reply.Code < 0:
            said = self._secrets.one_line(reply.Message or "")
            # No list of codes exists; all errors of the key that are known are -1.
            raise LoginRefused(
                f"{where}: Code {reply.Code} {said}; "
                "check the apiKey (a global key) and which addresses Noojee lets in"
            )
        if reply.seq is None or reply.seq < 0:
            raise _Unreadable(f"{where}: a reply without seq: {answer.said}")
        if any(len(events) >= EVENTS_MAX for events in (reply.Data or {}).values()):
            raise _Unreadable(f"{where}: {EVENTS_MAX} events or more of one extension in a reply")
        return reply, reply.seq

    def _heard(
        self, after: NoojeePlace, extension: str, number: int, at: datetime, raw: bytes
    ) -> NoojeeHeard:
        """An event with its place: the `number`-th of its extension after the place that was asked with."""
        channel = noojee_channel(self._pbx, extension)
        event = read_noojee(raw, channel)
        return NoojeeHeard(
            extension=extension,
            stream=str(uuid.uuid5(_STREAMS, f"{after.generation} {extension}")),
            position=after.seq * EVENTS_MAX + number,
            received_at=at,
            channel=channel,
            raw=raw,
            event=event if isinstance(event, NoojeeEvent) else None,
        )

    async def _handed(self, heard: list[NoojeeHeard], place: NoojeePlace) -> None:
        """Hands a reply on; its place is kept once it and all before it are stored.

        All extensions at once: each of them waits for a commit, and one after the other a hundred of them
        would make the next poll wait for a hundred commits, while deadlines pass."""
        by_extension: dict[str, list[NoojeeHeard]] = {}
        for each in heard:
            by_extension.setdefault(each.extension, []).append(each)
        storing = _Storing(place, len(by_extension))
        self._storing.append(storing)
        self._keep()

        def committed() -> None:
            storing.open -= 1
            self._keep()

        async with asyncio.TaskGroup() as tasks:
            for events in by_extension.values():
                tasks.create_task(self._hearing.hear(events, committed))

    def _keep(self) -> None:
        stored: NoojeePlace | None = None
        while self._storing and self._storing[0].open == 0:
            stored = self._storing.popleft().place
        if stored is not None:
            self._hearing.keep(stored)

    def _deaf(self, cause: str, detail: str) -> bool:
        self._covered(cause, detail)
        return False

    def _covered(self, cause: str, detail: str) -> None:
        if cause != self._cause:
            self._cause = cause
            self._hearing.covered(cause, detail, self._wall())


class _Storing(Struct):
    """A reply that was handed on; `open` parts of it are not stored yet."""

    place: NoojeePlace
    open: int


def _new_place() -> NoojeePlace:
    return NoojeePlace(str(uuid.uuid4()), 0)
