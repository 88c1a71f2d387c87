"""A Bayeux session without I/O: what to send next, what was heard, what is a gap, when to wake.

The shell (`listener.adapters.cometd`) owns the sockets and the clock. It asks `Session.next(now)` what to
do, does it, and reports the outcome with `received` or `failed`; whatever is worth telling comes back as a
list of facts. Everything that was measured to go wrong in Bayeux clients is decided here, where a test
needs no network (numbers refer to the Bayeux specification 1.0 and the CometD reference):

- **Acknowledge after commit.** With CometD's `ack` extension the server keeps what it sent until a later
  /meta/connect carries the number of the batch. We send that number only after `committed` covers the
  batch. While the store is slow the session is kept alive by polling with the *old* number and
  `advice: {timeout: 0}`, and what the answer repeats is not taken.
- **Redelivery has a place.** The answer to a connect that carries number A begins with the first message
  after A. So each message has a position, counted from 1 since the handshake; one at a position that we
  have had is a repetition, whatever it says, and two equal messages at two positions are two facts.
- **Time is in milliseconds** in `advice`, fields that are absent keep their last value, null is absent.
- **No storm.** Every failure waits longer than the last, with jitter and a cap; a handshake that succeeds
  does not reset this, a connection that lasts does. For the first seconds retries stay dense, because the
  server still keeps the session (`maxInterval`, 10 s by default). A server that answers every connect at
  once and with nothing is asked less often too.
- **A restart is no loss.** A session outlives us by its server's `maxInterval`: `resume` goes on with it,
  from the batch that was stored last. So each delivery says which batch it makes whole, for who stores it.
- **A stop knows how far it heard.** Before a planned one, `last` asks once more for all that is queued: with
  acknowledgements the answer holds also what was under way in an answer that nobody waits for any more.
- **Nothing silent.** A refused subscription, a lost session, a connect or handshake that is denied: each is
  a fact, is tried again slowly, and counts as a gap until every channel is subscribed again.
"""

import json
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from enum import StrEnum
from typing import Any

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

HANDSHAKE = "/meta/handshake"
CONNECT = "/meta/connect"
SUBSCRIBE = "/meta/subscribe"
DISCONNECT = "/meta/disconnect"

LONG_POLLING = "long-polling"
WEBSOCKET = "websocket"


class Limits(Struct, frozen=True):
    """Every bound of a session, in seconds."""

    request_s: float = 10.0
    """How long a handshake, a subscription or a farewell may take."""
    network_delay_s: float = 5.0
    """How much longer than its own timeout a connect may take. With the first retry it must stay below the
    server's maxInterval (10 s by default), or a half-open connection costs the session."""
    keep_alive_s: float = 4.0
    """How long a session may be silent while the store is slow; below maxInterval."""
    timeout_s: float = 30.0
    """The connect timeout that is assumed until the server advises another."""
    timeout_s_max: float = 120.0
    interval_s_max: float = 60.0
    """No advice makes us wait longer between two connects."""
    retry_s: float = 0.2
    retry_dense_s_max: float = 2.0
    """Cap of the wait between retries during `dense_s`."""
    dense_s: float = 15.0
    """Somewhat longer than maxInterval (10 s by default): a short outage must not cost a long wait."""
    retry_s_max: float = 30.0
    lasting_s: float = 1.0
    """A session that has lived this long when a connect succeeds has recovered: waits start small again."""
    refused_s: float = 60.0
    """How long to leave a server alone that advised "none" or refused the login; for the login twice as long
    each time up to `refused_s_max`, since insisting locks accounts."""
    refused_s_max: float = 3600.0
    resubscribe_s: float = 5.0
    resubscribe_s_max: float = 60.0
    malformed_max: int = 3
    """After so many unreadable answers in a row the session is given up, so that one message that cannot be
    delivered does not hold back all that follow it."""
    vain_max: int = 3
    """After so many connects in a row that were answered at once and with nothing, the next ones wait, up to
    `retry_dense_s_max`: the server's own timeout, which should hold them, is missing or 0."""


DEFAULT_LIMITS = Limits()

KEEP_ALIVE_SHARE = 0.4
"""Of an advised maxInterval: the most that a session stays silent, so that one lost request costs nothing."""

ADVICE_MS_MAX = 10**15
"""Times beyond this are this: a JSON number can be too large for a float."""

BY_HAND_BYTES_MAX = 4 * 1024 * 1024
"""The largest answer that is taken apart by hand because the decoder refuses it; that takes about a second.
A larger one is malformed."""


EARLY_BYTES_MAX = 4 * 1024 * 1024
"""What may wait for the reply that comes after it, over a websocket. More is told at once; then it is not
known which batch it makes whole, and only the next delivery makes the session resumable again."""


class Failure(StrEnum):
    """Why a request brought no answer that can be used."""

    NETWORK = "network"
    """No connection, cut, or no answer in time."""
    HTTP = "http"
    """An answer with another status than 200 and than those below."""
    UNAUTHORISED = "unauthorised"
    """HTTP 401 or 403: log in again."""
    MALFORMED = "malformed"
    """Not a JSON array of messages."""
    OVERSIZED = "oversized"
    """More than the shell takes in one answer."""


class Send(Struct, frozen=True):
    """Send these messages and report the outcome of each answer within `timeout_s`."""

    channel: str
    """The meta channel of all of them."""
    messages: list[dict[str, Any]]
    timeout_s: float


class Sleep(Struct, frozen=True):
    """Nothing to do until this time, unless the session is told something before."""

    until: float


class Login(Struct, frozen=True):
    """Authenticate anew, then call `logged_in` or `failed`."""


class Stop(Struct, frozen=True):
    """The session is over; nothing is to be sent any more."""


Action = Send | Sleep | Login | Stop
"""What `Session.next` may answer."""


class Cookie(Struct, frozen=True):
    """A cookie of the account's jar, in the words of RFC 6265, as it was set."""

    name: str
    value: str
    domain: str
    path: str
    secure: bool
    expires: str
    max_age: str

    def __repr__(self) -> str:
        return f"Cookie({self.name})"


class Kept(Struct, frozen=True):
    """What a Bayeux session is resumed with after a restart, apart from what the stream's row holds.

    A credential: whoever has it can take the session over. It is stored, and neither logged nor shown.
    """

    stream: str
    client_id: str
    ack: bool
    connection_type: str
    max_interval_s: float | None
    """The `maxInterval` that the server advised; None if it said nothing of it."""
    channels: tuple[str, ...]
    """Those that the server has confirmed, sorted."""
    owner: str
    """Whose session it is, in the words of who runs the line: another's is not resumed."""
    cookies: tuple[Cookie, ...]
    token: tuple[tuple[str, str], ...]
    """The header with the CSRF token, where the server wants one."""

    def __repr__(self) -> str:
        return f"Kept({self.stream})"


class Saved(Struct, frozen=True):
    """A session as the store has it: what was kept of it, and how far its messages are stored."""

    kept: Kept
    saved_at: datetime
    position: int = 0
    """The last that is stored; 0 if none is."""
    batch: tuple[int, int] | None = None
    """As in `calls.Heard.batch`, of the last message that is stored."""

    @property
    def resumes_at(self) -> tuple[int, int] | None:
        """The batch to acknowledge next, and the position that it ends at; None if that is not known, and the
        session cannot be resumed. Without acknowledgements the number means nothing."""
        if not self.kept.ack:
            return NOTHING_YET, self.position
        if self.position == 0:
            return NOTHING_YET, 0
        return self.batch


NOTHING_YET = -1
"""What is acknowledged before the first batch."""


class Handshaken(Struct, frozen=True):
    """A new session began: positions count from 1 again. `ack` says whether the server acknowledges."""

    client_id: str
    ack: bool
    connection_types: tuple[str, ...]


class Subscribed(Struct, frozen=True):
    """Every wanted channel is subscribed: from here on nothing is missed."""


class SubscriptionRefused(Struct, frozen=True):
    """The server denied a channel; it is asked for again after `retry_s`."""

    channel: str
    error: str
    retry_s: float


class Delivered(Struct, frozen=True):
    """Messages that were not had before, at consecutive positions beginning with `first`.

    `redelivered` counts those that the server repeated; they are left out. `odd` are items that have no
    position, because no server counts them: such as are no Bayeux messages, and data that an acknowledging
    server sends outside of a connect.
    """

    first: int
    messages: list[tuple[str, bytes]]
    """Channel and exact bytes of each."""
    redelivered: int = 0
    odd: tuple[tuple[str, bytes], ...] = ()
    before: tuple[int, int] | None = None
    """The batch that was whole before these messages, as `calls.Heard.batch` has it."""
    batch: tuple[int, int] | None = None
    """The batch that is whole with the last of them; None where its number is not known yet."""


class Gap(Struct, frozen=True):
    """Since `since` we may have missed something, because of `cause` (one of `calls.GAP_CAUSES`). Another
    one with the same `since` knows the cause better, or says what else went wrong."""

    since: float
    cause: str
    detail: str


class Unbroken(Struct, frozen=True):
    """The session goes on where it was and the server kept everything: the last `Gap` was none."""


class Resumed(Struct, frozen=True):
    """The session goes on, but without acknowledgements what was in flight is lost: the `Gap` ends now."""


class Refused(Struct, frozen=True):
    """The server grants no session, or wants no more of us ("none"), for the reason in `error`; tried again
    after `retry_s`."""

    error: str
    retry_s: float


Fact = Handshaken | Subscribed | SubscriptionRefused | Delivered | Gap | Unbroken | Resumed | Refused
"""What `received` and `failed` may tell."""


class _Advice(Struct):
    reconnect: Any = None
    interval: Any = None
    timeout: Any = None
    maxInterval: Any = None  # noqa: N815 - the specification's spelling, here and below


class _Reply(Struct):
    """What we read of a message; `data` is only asked whether it is there."""

    channel: str = ""
    id: Any = None
    successful: bool | None = None
    error: str | None = None
    clientId: str | None = None  # noqa: N815
    subscription: Any = None
    supportedConnectionTypes: Any = None  # noqa: N815
    advice: _Advice | None = None
    ext: Any = None
    data: Raw | UnsetType = UNSET


_REPLY = msgspec.json.Decoder(_Reply)
_OBJECT = msgspec.json.Decoder(dict[str, Any])


def split(body: bytes) -> list[bytes]:
    """The exact bytes of each message of a Bayeux answer; raises `ValueError` if it is no JSON array.

    A lone object, which the specification allows, counts as an array of one.
    """
    try:
        return [bytes(raw) for raw in _ITEMS.decode(body)]
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        if body.lstrip()[:1] == b"[":
            return _split_by_hand(body, error)
        try:
            _OBJECT.decode(body)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            raise ValueError(f"no JSON array of messages: {error}") from None
        return [body]


_ITEMS = msgspec.json.Decoder(list[Raw])
_MARK = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{},]', re.DOTALL)


def _split_by_hand(body: bytes, error: Exception) -> list[bytes]:
    """As `split`, for an array that the decoder refuses: it goes no deeper than the interpreter's stack, and
    one half of a surrogate pair spoils all messages round it. Only brackets and commas are looked at here, so
    that such a message is kept and the others are heard."""
    if len(body) > BY_HAND_BYTES_MAX:
        raise ValueError(f"no JSON array of messages: {error}, in more than {BY_HAND_BYTES_MAX} bytes")
    items: list[bytes] = []
    depth = start = end = 0
    for mark in _MARK.finditer(body):
        text = mark[0]
        if text in b"[{":
            depth += 1
            if depth == 1:
                start = mark.end()
        elif text in b"]}":
            depth -= 1
        if (text == b"," and depth == 1) or depth == 0:
            items.append(body[start : mark.start()].strip())
            start = end = mark.end()
        if depth == 0:
            break
    if depth or body[end:].strip() or b"" in items:
        raise ValueError(f"no JSON array of messages: {error}")
    return items


class Session:
    """One account's Bayeux session, over as many handshakes as it takes.

    Drive it so: `want` the channels; then in a loop ask `next(now)` and obey; report with `received`
    (also for messages that come unasked over a websocket), `failed`, `logged_in`; call `committed` whenever
    delivered messages have become durable. `now` is any steady clock in seconds. `jitter` gives numbers
    from 0 to 1. Never raises for anything that a server sends.
    """

    __slots__ = (  # thousands of sessions live in one process, and a dict costs more than all their values
        "_acknowledged",
        "_acknowledged_position",
        "_asked",
        "_asked_at",
        "_batches",
        "_channels",
        "_committed",
        "_connecting",
        "_cursor",
        "_early",
        "_early_bytes",
        "_failing_since",
        "_failures",
        "_first_connect",
        "_fruitful",
        "_gap",
        "_gap_detail",
        "_gap_since",
        "_goodbye",
        "_handshaken_at",
        "_interval_s",
        "_jitter",
        "_last_contact",
        "_login_due",
        "_login_refusals",
        "_malformed",
        "_max_interval_s",
        "_may_be_held",
        "_message_id",
        "_not_before",
        "_offered",
        "_polling_old",
        "_refusals",
        "_relogin",
        "_resubscribe_at",
        "_resuming",
        "_server_timeout_s",
        "_stopped",
        "_subscribed",
        "_unanswered",
        "_vain",
        "_vouched",
        "_whole",
        "ack",
        "client_id",
        "connection_type",
        "limits",
        "observing",
        "position",
        "server_connection_types",
    )

    def __init__(self, *, now: float, jitter: Callable[[], float], limits: Limits = DEFAULT_LIMITS) -> None:
        self.limits = limits
        self.connection_type = LONG_POLLING
        self.client_id: str | None = None
        self.ack = False
        """Whether the server of the present session acknowledges."""
        self.position = 0
        """The last position that was delivered in the present session."""
        self.server_connection_types: tuple[str, ...] = ()
        """What the server offered at the last handshake."""
        self.observing = False
        """Whether every wanted channel is subscribed and the last exchange succeeded."""
        self._jitter = jitter
        self._offered = [LONG_POLLING]
        self._channels: list[str] = []
        self._subscribed: set[str] = set()
        self._resubscribe_at: dict[str, float] = {}
        self._refusals = 0
        self._message_id = 0
        self._unanswered: set[str] = set()
        self._asked: dict[str, str] | None = None
        self._server_timeout_s = limits.timeout_s
        self._max_interval_s = float("inf")
        self._interval_s = 0.0
        self._login_due = False
        self._first_connect = True
        self._connecting = False
        self._asked_at = now
        self._may_be_held = False
        self._fruitful = False
        self._vain = 0
        self._polling_old = False
        self._batches: list[tuple[Any, int]] = []
        self._acknowledged: Any = None
        self._acknowledged_position = 0
        self._committed = 0
        self._cursor = 0
        self._whole: tuple[int, int] | None = None
        self._early: list[tuple[_Reply | None, bytes]] = []
        self._early_bytes = 0
        self._resuming = 0
        self._relogin = False
        self._not_before = 0.0
        self._last_contact = now
        self._vouched = now
        self._handshaken_at = now
        self._failures = 0
        self._failing_since: float | None = None
        self._malformed = 0
        self._login_refusals = 0
        self._gap: str | None = "not started"
        self._gap_since = now
        self._gap_detail = ""
        self._goodbye = False
        self._stopped = False

    # What the shell wants

    def offer(self, connection_types: Iterable[str]) -> None:
        """The connection types that the next handshake offers."""
        self._offered = list(connection_types)

    def use(self, connection_type: str) -> None:
        """The connection type that further connects name, after the negotiation."""
        self.connection_type = connection_type

    def want(self, channel: str) -> None:
        """Subscribes to `channel` now and after every handshake."""
        if channel not in self._channels:
            self._channels.append(channel)

    def unwant(self, channel: str) -> None:
        """Forgets `channel`; the server is not told, its messages are merely no longer asked for."""
        if channel in self._channels:
            self._channels.remove(channel)
        self._subscribed.discard(channel)

    @property
    def wanted(self) -> tuple[str, ...]:
        """The channels asked for with `want`."""
        return tuple(self._channels)

    @property
    def subscribed(self) -> frozenset[str]:
        """The channels that the server has confirmed in the present session."""
        return frozenset(self._subscribed)

    @property
    def answered(self) -> bool:
        """Whether every message of the last `Send` has had its reply."""
        return not self._unanswered

    @property
    def connected(self) -> bool:
        """Whether a connect has succeeded since the last handshake."""
        return self.client_id is not None and not self._first_connect

    @property
    def timeout_s(self) -> float:
        """How long the server holds a connect: what it advised, or less where we ask for less."""
        return min(self._server_timeout_s, self.limits.timeout_s_max)

    def committed(self, position: int) -> None:
        """Everything up to `position` of the present session is durable and may be acknowledged."""
        self._committed = max(self._committed, position)

    def login_first(self) -> None:
        """Authenticate before anything else is sent."""
        self._login_due = True

    def resume(self, saved: Saved, *, attempts_max: int | None = None, login_first: bool = False) -> None:
        """Go on with a session of an earlier run; call it before anything is asked, for one that has
        `resumes_at`.

        `Unbroken` (or `Resumed`, without acknowledgements) says that the server still had it; `Gap` with the
        cause "session lost" that it had not, and then another one begins: after a login, with `login_first`.
        When `attempts_max` connects brought no answer, it is given up too.
        """
        kept, place = saved.kept, saved.resumes_at
        if place is None:
            raise ValueError("this session cannot be resumed: it is not known what to acknowledge")
        self.client_id, self.ack, self.connection_type = kept.client_id, kept.ack, kept.connection_type
        self.server_connection_types = (kept.connection_type,)
        self._subscribed.update(kept.channels)
        if kept.max_interval_s is not None:
            self._max_interval_s = kept.max_interval_s
        number, position = place
        self._acknowledged = None if number == NOTHING_YET else number
        self.position = self._cursor = self._committed = self._acknowledged_position = position
        self._whole = place if kept.ack else None
        self._resuming = -1 if attempts_max is None else attempts_max
        self._relogin = login_first

    @property
    def durable(self) -> bool:
        """Whether everything that was delivered in the present session is committed."""
        return self._committed >= self.position

    @property
    def max_interval_s(self) -> float | None:
        """How long the server keeps a silent session, if it has said so."""
        return None if self._max_interval_s == float("inf") else self._max_interval_s

    def logged_in(self) -> None:
        """The login that `Login` asked for succeeded."""
        self._login_due = False
        self._login_refusals = 0

    def login_refused(self, detail: str, now: float) -> list[Fact]:
        """The login that `Login` asked for was refused; it is tried again, ever more slowly."""
        facts: list[Fact] = []
        self._begin_gap("login refused", detail, facts)
        wait_s = self.limits.refused_s * 2.0 ** min(self._login_refusals, 20)
        self._login_refusals += 1
        self._not_before = now + min(wait_s, self.limits.refused_s_max)
        return facts

    def goodbye(self) -> None:
        """Say /meta/disconnect next, then stop."""
        self._goodbye = True

    def last(self, now: float, *, held: bool = False) -> Send | None:
        """A connect to send before the session is left alone, on a connection that nothing was asked on: an
        answer to what was asked before would be taken for its own. It is answered at once, or `held`.

        None where its answer would not prove that everything was heard: without acknowledgements what an
        earlier answer took from the server is gone; nor while something is not durable, or there is a gap.
        """
        if not (self.ack and self.observing and self.durable) or self.client_id is None or self._goodbye:
            return None
        self._early, self._early_bytes = [], 0  # not told, so not acknowledged: it comes again
        connect = self._connect(now, [], at_once=not held)
        return connect if isinstance(connect, Send) else None

    # What to do

    def next(self, now: float) -> Action:
        """The next thing to do; ask again after doing it."""
        if self._stopped:
            return Stop()
        if self._goodbye:
            if self.client_id is None:
                self._stopped = True
                return Stop()
            return self._send(DISCONNECT, [{"clientId": self.client_id}], now, self.limits.request_s)
        if now < self._not_before:
            return Sleep(self._not_before)
        if self._login_due:
            return Login()
        if self.client_id is None:
            return self._handshake(now)
        missing = [channel for channel in self._channels if channel not in self._subscribed]
        due = [channel for channel in missing if self._resubscribe_at.get(channel, now) <= now]
        if due and not self._first_connect:
            messages = [{"clientId": self.client_id, "subscription": channel} for channel in due]
            send = self._send(SUBSCRIBE, messages, now, self.limits.request_s)
            self._asked = {message["id"]: message["subscription"] for message in messages}
            return send
        return self._connect(now, [self._resubscribe_at.get(channel, now) for channel in missing])

    def _handshake(self, now: float) -> Send:
        message = {
            "version": "1.0",
            "minimumVersion": "1.0",
            "supportedConnectionTypes": list(self._offered),
            "advice": {"timeout": round(self.limits.timeout_s * 1000), "interval": 0},
            "ext": {"ack": True},
        }
        return self._send(HANDSHAKE, [message], now, self.limits.request_s)

    def _connect(self, now: float, resubscribe_at: list[float], *, at_once: bool = False) -> Action:
        message: dict[str, Any] = {"clientId": self.client_id, "connectionType": self.connection_type}
        while self._batches and self._batches[0][1] <= self._committed:
            self._acknowledged, self._acknowledged_position = self._batches.pop(0)
        waiting = bool(self._batches)  # something was delivered and is not durable yet
        # Before the first subscription there is nothing to hear, and a long poll would hold it up.
        idle = not self._first_connect and not self._channels
        if waiting or idle:
            advised_s = max(self.limits.retry_s, self._max_interval_s * KEEP_ALIVE_SHARE)
            due = self._last_contact + min(self.limits.keep_alive_s, advised_s)
            if now < due:
                return Sleep(due)
        hold_s = self.timeout_s
        # After a failure a connect that waits would leave open for long whether the session lives.
        probing = self._gap is not None and self._all_subscribed()
        self._may_be_held = not (waiting or idle or probing or at_once or self._first_connect)
        if not self._may_be_held:
            hold_s = 0.0
        elif resubscribe_at:
            hold_s = min(hold_s, max(0.0, min(resubscribe_at) - now))
        if hold_s < self._server_timeout_s:
            message["advice"] = {"timeout": round(hold_s * 1000)}
        if self.ack:
            message["ext"] = {"ack": NOTHING_YET if self._acknowledged is None else self._acknowledged}
            self._cursor = self._acknowledged_position
            self._polling_old = waiting
        self._connecting = True
        self._fruitful = False
        return self._send(CONNECT, [message], now, hold_s + self.limits.network_delay_s)

    def _send(self, channel: str, messages: list[dict[str, Any]], now: float, timeout_s: float) -> Send:
        self._asked_at = now
        self._unanswered.clear()
        for message in messages:
            self._message_id += 1
            message["channel"] = channel
            message["id"] = str(self._message_id)
            self._unanswered.add(message["id"])
        return Send(channel, messages, timeout_s)

    # What happened

    def received(self, items: list[bytes], now: float) -> list[Fact]:
        """Messages from the server, as `split` gave them: an answer, or frames that came unasked."""
        self._last_contact = now
        messages: list[tuple[_Reply | None, bytes]] = []
        replies: list[_Reply] = []
        facts: list[Fact] = []
        for raw in items:
            item: _Reply | None
            try:
                item = _REPLY.decode(raw)
            except (msgspec.MsgspecError, UnicodeError, RecursionError):
                item = _tolerant(raw)
            if item is None or not item.channel.startswith("/meta/"):
                messages.append((item, raw))
            elif item.channel == HANDSHAKE:
                self._replied(item, now, facts)  # first: what comes with it is the new session's
            else:
                replies.append(item)
        closed = any(reply.channel == CONNECT for reply in replies)
        if self._connecting and self.ack and not closed:
            # Frames of a websocket, whose batch has no number before the reply comes in one of its own.
            self._early += messages
            self._early_bytes += sum(len(raw) for _, raw in messages)
            if self._early_bytes > EARLY_BYTES_MAX:
                self._take_early(facts)
        else:
            messages, self._early, self._early_bytes = [*self._early, *messages], [], 0
            if messages:
                self._take(messages, facts, _batch_number(replies))
        # Data before these: the number in a connect's reply covers the data that came with it.
        for reply in replies:
            self._replied(reply, now, facts)
        return facts

    def _take_early(self, facts: list[Fact]) -> None:
        """Tells what came before its reply, without the number: the next delivery has one again."""
        early, self._early, self._early_bytes = self._early, [], 0
        if early:
            self._take(early, facts, None)

    def _take(
        self, messages: list[tuple[_Reply | None, bytes]], facts: list[Fact], number: int | None
    ) -> None:
        """Tells what is new among these, each with its position; `number` is that of their batch."""
        new: list[tuple[str, bytes]] = []
        odd: list[tuple[str, bytes]] = []
        first = self.position + 1
        redelivered = 0
        counted = self._connecting or not self.ack
        for item, raw in messages:
            channel = "" if item is None else item.channel
            if counted and _in_queue(item, raw):
                if self._counts_as_new():
                    new.append((channel, raw))
                elif not self._polling_old:
                    redelivered += 1
            elif item is None or item.data is not UNSET or item.successful is None:
                odd.append((channel, raw))
        before = batch = None
        if new:
            self._fruitful = True
            # An older one would be taken for true of these too, and messages for repetitions: rather none.
            batch = (number, self.position) if self.ack and number is not None else None
            before, self._whole = self._whole, batch
        if new or odd or redelivered:
            facts.append(Delivered(first, new, redelivered, tuple(odd), before, batch))

    def _replied(self, reply: _Reply, now: float, facts: list[Fact]) -> None:
        self._malformed = 0
        if reply.id is None:
            self._unanswered.clear()  # `id` is optional; without it the answer is to what was asked last
        else:
            self._unanswered.discard(str(reply.id))
        self._advised(reply)
        if reply.channel == CONNECT:
            self._connect_replied(reply, now, facts)
        elif reply.channel == HANDSHAKE:
            self._handshake_replied(reply, now, facts)
        elif reply.channel == SUBSCRIBE:
            self._subscribe_replied(reply, now, facts)
        elif reply.channel == DISCONNECT:
            self._disconnected(now, facts)

    def _counts_as_new(self) -> bool:
        """Gives the next data message its position; False if we have had that position."""
        if self._cursor < self.position:
            self._cursor += 1
            return False
        if self._polling_old:
            return False  # not taken, so not acknowledged: it comes again
        self._cursor += 1
        self.position += 1
        return True

    def _advised(self, reply: _Reply) -> None:
        """Merges advice; what is absent, null or nonsense keeps its last value. Times are milliseconds."""
        advice = reply.advice
        if advice is None:
            return
        timeout = _seconds(advice.timeout)
        if timeout is not None:
            self._server_timeout_s = timeout
        interval = _seconds(advice.interval)
        if interval is not None:
            self._interval_s = min(interval, self.limits.interval_s_max)
        max_interval = _seconds(advice.maxInterval)
        if max_interval is not None:
            self._max_interval_s = max_interval

    def _handshake_replied(self, reply: _Reply, now: float, facts: list[Fact]) -> None:
        if not reply.successful or not reply.clientId:
            self._rejected(reply, now, facts, otherwise="handshake")
            return
        ext = reply.ext
        self.client_id = reply.clientId
        self.ack = isinstance(ext, dict) and bool(ext.get("ack"))
        self.position = self._cursor = self._committed = self._acknowledged_position = 0
        self._acknowledged = None
        self._whole = (NOTHING_YET, 0) if self.ack else None
        self._resuming = 0
        self._batches.clear()
        self._subscribed.clear()
        self._resubscribe_at.clear()
        self._first_connect = True
        self._connecting = False
        self._polling_old = False
        self._handshaken_at = now
        types = reply.supportedConnectionTypes
        known = isinstance(types, list)
        self.server_connection_types = tuple(map(str, types)) if known else (LONG_POLLING,)
        facts.append(Handshaken(reply.clientId, self.ack, self.server_connection_types))

    def _connect_replied(self, reply: _Reply, now: float, facts: list[Fact]) -> None:
        self._connecting = False
        if self.client_id is None:
            return  # of a session that ended in this same answer
        if reply.successful is False:
            self._rejected(reply, now, facts, otherwise="retry")
            return
        self._vouched = self._asked_at
        self._resuming = 0
        if self.ack and not self._polling_old:
            number = reply.ext.get("ack") if isinstance(reply.ext, dict) else None
            if number is not None and self._cursor > self._acknowledged_position:
                self._batches.append((number, self._cursor))
                if self._whole is None and self._cursor == self.position and _storable(number):
                    self._whole = (number, self.position)
        self._polling_old = False
        self._first_connect = False
        lasts = now - self._handshaken_at >= self.limits.lasting_s
        if lasts and (self._may_be_held or self._fruitful):
            self._recovered()
        self._not_before = now + max(self._interval_s, self._vain_s(now))
        if self._gap is not None and self._all_subscribed():
            facts.append(Unbroken() if self.ack else Resumed())
            self._gap = None
        self.observing = self._gap is None and self._all_subscribed()

    def _vain_s(self, now: float) -> float:
        """How long to wait because connects come back at once and with nothing."""
        if self._fruitful or not self._may_be_held or now - self._asked_at >= self.limits.retry_s:
            self._vain = 0
            return 0.0
        self._vain += 1
        if self._vain <= self.limits.vain_max:
            return 0.0
        doubled = self.limits.retry_s * 2.0 ** min(self._vain - self.limits.vain_max, 20)
        return min(self.limits.retry_dense_s_max, doubled)

    def _subscribe_replied(self, reply: _Reply, now: float, facts: list[Fact]) -> None:
        named = reply.subscription
        if named is None and self._asked is not None:
            named = self._asked.get(str(reply.id))
        listed = named if isinstance(named, list) else [named]
        channels = [each for each in listed if isinstance(each, str) and each in self._channels]
        if reply.successful and channels:
            self._vouched = self._asked_at
            self._subscribed.update(channels)
            if self._all_subscribed():
                self._refusals = 0
                self._asked = None
                self._gap = None
                self.observing = True
                facts.append(Subscribed())
            return
        error = reply.error or "refused without a reason"
        if reply.successful:
            error = "the server granted a channel that was not asked for"
        elif _code(error) in (401, 402) or _unknown_client(error):
            self._rejected(reply, now, facts, otherwise="handshake")
            return
        self._refusals += 1
        doubled = self.limits.resubscribe_s * 2.0 ** min(self._refusals - 1, 10)
        retry_s = min(self.limits.resubscribe_s_max, doubled)
        for channel in channels or [c for c in self._channels if c not in self._subscribed]:
            self._resubscribe_at[channel] = now + retry_s
            facts.append(SubscriptionRefused(channel, error, retry_s))
        self._begin_gap("subscription refused", error, facts)

    def _all_subscribed(self) -> bool:
        return bool(self._channels) and self._subscribed.issuperset(self._channels)

    def _disconnected(self, now: float, facts: list[Fact]) -> None:
        """Our own farewell was answered, or the server ended the session unasked."""
        if self._goodbye:
            self._stopped = True
            return
        self._lose_session("session lost", "the server sent /meta/disconnect", facts)
        self._back_off(now)

    def _rejected(self, reply: _Reply, now: float, facts: list[Fact], *, otherwise: str) -> None:
        """An unsuccessful reply: what the advice, else the error code, else `otherwise` says."""
        error = reply.error or f"{reply.channel} unsuccessful without a reason"
        code = _code(error)
        reconnect = reply.advice.reconnect if reply.advice is not None else None
        if reconnect not in ("retry", "handshake", "none"):
            reconnect = "handshake" if reply.channel == HANDSHAKE else otherwise
        unknown_client = reply.channel != HANDSHAKE and _unknown_client(error)
        if unknown_client and reconnect == "retry":
            reconnect = "handshake"  # whatever was advised: who is not known gets nowhere by retrying
        if reconnect == "none":
            self._lose_session("session lost", error, facts)
            self._not_before = now + self.limits.refused_s
            self._login_due = True
            facts.append(Refused(error, self.limits.refused_s))
            return
        if code in (401, 403) and not unknown_client:
            self._login_due = True
        if reconnect == "handshake":
            self._lose_session("session lost", error, facts)
        else:
            self._begin_gap("disconnected", error, facts)
        self._back_off(now)
        if reply.channel == HANDSHAKE:
            facts.append(Refused(error, self._not_before - now))

    def failed(self, failure: Failure, detail: str, now: float) -> list[Fact]:
        """The last `Send` or `Login` brought no answer that can be used; `detail` is for a person."""
        facts: list[Fact] = []
        self._take_early(facts)
        if self._goodbye:
            self._stopped = True
            return facts
        self._unanswered.clear()
        tried = self._connecting and self._resuming > 0
        if self._connecting and self._may_be_held and now - self._asked_at >= self.limits.lasting_s:
            self._recovered()  # it was held, so the connection had been good
        self._connecting = False
        self._polling_old = False
        if failure is Failure.UNAUTHORISED:
            self._login_due = True
        if failure is Failure.MALFORMED:
            self._malformed += 1
        if failure is Failure.OVERSIZED:
            self._lose_session("oversized", detail, facts)
        elif self._malformed >= self.limits.malformed_max:
            self._malformed = 0
            self._lose_session("malformed", detail, facts)
        elif tried and self._resuming == 1:
            self._lose_session("session lost", f"too old to be tried again: {detail}", facts)
        else:
            self._begin_gap("disconnected", detail, facts)
        self._resuming -= tried
        self._back_off(now)
        return facts

    def abandon(self, cause: str, detail: str, now: float) -> list[Fact]:
        """Gives the session up and begins another: the shell found it deaf or cannot take its messages."""
        facts: list[Fact] = []
        self._lose_session(cause, detail, facts)
        self._back_off(now)
        return facts

    def _begin_gap(self, cause: str, detail: str, facts: list[Fact]) -> None:
        """From the last moment that we can vouch for on, unless a gap is open; then its cause may change.

        That moment is when the last good answer was asked for: a server may lose the session while it holds
        the connect, and still answer it well. "disconnected" says least, and replaces nothing but "not
        started". What went wrong now is told even so, since it is what a person must mend.
        """
        self.observing = False
        if self._gap is None:
            self._gap_since = self._vouched
        elif cause == self._gap or (cause == "disconnected" and self._gap != "not started"):
            if detail == self._gap_detail:
                return
            cause = self._gap
        self._gap = cause
        self._gap_detail = detail
        facts.append(Gap(self._gap_since, cause, detail))

    def _lose_session(self, cause: str, detail: str, facts: list[Fact]) -> None:
        """The session is gone, and with it what the server had not sent yet."""
        self._take_early(facts)
        had = self.client_id is not None
        if self._resuming:
            self._resuming = 0
            self._login_due = self._login_due or self._relogin
        self.client_id = None
        self._subscribed.clear()
        self._connecting = False
        if had:
            self._begin_gap(cause, detail, facts)

    def _recovered(self) -> None:
        """The next failure is the first again."""
        self._failures = 0
        self._failing_since = None

    def _back_off(self, now: float) -> None:
        """Waits before the next attempt: twice as long each time, with jitter, dense while the server may
        still keep the session; at least as long as the server advised."""
        if self._failing_since is None:
            self._failing_since = now
        dense = now - self._failing_since < self.limits.dense_s
        cap = self.limits.retry_dense_s_max if dense else self.limits.retry_s_max
        wait = min(cap, self.limits.retry_s * 2.0 ** min(self._failures, 20))
        # Waits grow on from the dense cap when the dense time is over; they do not leap.
        if not dense or wait < cap:
            self._failures += 1
        self._not_before = now + max(wait * (0.5 + 0.5 * self._jitter()), self._interval_s)


def _tolerant(raw: bytes) -> _Reply | None:
    """Reads a message of which some field has an unexpected type; such a field is as if absent. None for what
    cannot be read at all."""
    try:
        # This decoder takes halves of surrogate pairs, which cannot be written again: so once more without.
        fields = json.loads(json.dumps(json.loads(raw), ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    text = {
        name: fields[name] for name in ("channel", "error", "clientId") if isinstance(fields.get(name), str)
    }
    advice = fields.get("advice")
    return _Reply(
        **text,
        id=fields.get("id"),
        successful=fields["successful"] if isinstance(fields.get("successful"), bool) else None,
        subscription=fields.get("subscription"),
        supportedConnectionTypes=fields.get("supportedConnectionTypes"),
        ext=fields.get("ext"),
        advice=_Advice(*(advice.get(name) for name in _Advice.__struct_fields__))
        if isinstance(advice, dict)
        else None,
        data=Raw(b"") if "data" in fields else UNSET,
    )


def _in_queue(item: _Reply | None, raw: bytes) -> bool:
    """Whether the server keeps such an item in the session's queue, so that it has a place there.

    To count one that is not from the queue would shift all places after it, and lose messages; to miss one
    that is would only have it come twice. So this is strict. What cannot be read is a message if it is an
    object and cannot be a reply.
    """
    if item is None:
        return raw[:1] == b"{" and b'"/meta/' not in raw
    return bool(item.channel) and (item.data is not UNSET or item.successful is None)


def _batch_number(replies: list[_Reply]) -> int | None:
    """The number of the batch that an answer closes, if it closes one and the number can be stored."""
    for reply in replies:
        if reply.channel == CONNECT and reply.successful is not False and isinstance(reply.ext, dict):
            number = reply.ext.get("ack")
            return number if _storable(number) else None
    return None


def _storable(number: Any) -> bool:
    """Whether it is a number as CometD counts batches, and a column can hold it; 0 and below mean none."""
    return isinstance(number, int) and not isinstance(number, bool) and 0 < number < 2**63


def _seconds(milliseconds: Any) -> float | None:
    """A time of an advice; some servers send it as text."""
    if isinstance(milliseconds, str):
        try:
            milliseconds = float(milliseconds)
        except ValueError:
            return None
    if isinstance(milliseconds, bool) or not isinstance(milliseconds, int | float):
        return None
    if not 0 <= milliseconds < float("inf"):
        return None
    return min(milliseconds, ADVICE_MS_MAX) / 1000


def _unknown_client(error: str) -> bool:
    """Whether the server does not know our clientId: CometD says 402, some balancers 403, faye 401."""
    code = _code(error)
    return code == 402 or (code in (401, 403) and "unknown" in error.lower())


def _code(error: str) -> int:
    """The number that begins a Bayeux error ("402::session_unknown"); 0 if there is none."""
    head = error[:3]
    return int(head) if head.isascii() and head.isdigit() else 0
