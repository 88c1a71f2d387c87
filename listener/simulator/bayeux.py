"""A CometD server without I/O: who is connected, what waits for whom, what was acknowledged.

It decides what every Bayeux message is answered with, which data messages go along, and when a session
is lost. It knows no socket and reads no clock: times are given to it in seconds of a monotonic clock.
The transport owns the waiting: `Broker.connect` says how long a /meta/connect is to be held, the session
calls `notify` when there is a reason to answer it, and `Broker.conclude` makes the answer.

The rules are those of CometD Java (`ServerSessionImpl`, `AbstractHttpTransport`,
`AbstractWebSocketEndPoint`, `AcknowledgedMessagesSessionExtension`), in our own words:

- With the `ack` extension, messages travel only with /meta/connect replies. Each such reply closes a
  batch and carries its number, also when it carries no message. A message stays queued until a
  /meta/connect arrives that acknowledges its batch or a later one; whatever is queued goes with *every*
  reply, so an older acknowledgement brings everything after it again, in order.
- A /meta/connect whose acknowledgement leaves messages behind is answered at once, unless the client
  gave a timeout itself.
- Without it, messages leave the queue when a reply takes them, whether it arrives or not, and any reply
  takes them.
- Advice is sent with the handshake, with the first reply on another transport, and to a /meta/connect
  that brought advice itself.
- A session expires `interval + maxInterval` after the last reply to a handshake or a /meta/connect; while
  a /meta/connect is held it does not.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from random import Random
from typing import Any, Final

from listener.simulator.scripts import Message
from listener.simulator.settings import SimulatorSettings

LONG_POLLING: Final = "long-polling"
WEBSOCKET: Final = "websocket"

Reply = dict[str, Any]


class Ledger:
    """What one account was sent, in order: the truth about it.

    `digest` is the SHA-256 of every accepted message followed by a newline. With `remember` the messages
    themselves are kept too.
    """

    def __init__(self, account: str, *, remember: bool) -> None:
        self.account = account
        self.sent = 0
        self.accepted = 0
        """Entered the queue of at least one session."""
        self.unsubscribed = 0
        """Said while no session of the account was subscribed to the channel, or all were deaf."""
        self.messages: list[Message] | None = [] if remember else None
        self._sha256 = hashlib.sha256()
        self._abandoned: list[Message] = []

    def enter(self, message: Message, *, accepted: bool) -> None:
        """Note a message that was just published; it gets its position."""
        self.sent += 1
        message.position = self.sent
        message.accepted = accepted
        if accepted:
            self.accepted += 1
            self._sha256.update(message.raw)
            self._sha256.update(b"\n")
            if message.truth is not None:
                message.truth.accepted += 1
        else:
            self.unsubscribed += 1
        if self.messages is not None:
            self.messages.append(message)

    def abandon(self, messages: Iterable[Message]) -> None:
        """Note messages that were in a session which ended, or in a reply that was lost for good. What is
        noted here grows with what is lost: it is what `undelivered` is made of."""
        self._abandoned += messages

    @property
    def digest(self) -> str:
        """Hex."""
        return self._sha256.hexdigest()

    @property
    def undelivered(self) -> list[int]:
        """Positions of accepted messages that no session acknowledged before it ended. Their listener
        may have them or not; nobody can know."""
        return sorted({message.position for message in self._abandoned if not message.delivered})


class ServerSession:
    """One Bayeux session: the queue of one client.

    `hold` belongs to the transport that holds its /meta/connect. `notify` is called when a message was
    queued or the session ended; the transport sets it.
    """

    def __init__(self, client_id: str, ledger: Ledger, browser_id: str, *, ack: bool) -> None:
        self.id = client_id
        self.ledger = ledger
        self.browser_id = browser_id
        self.ack = ack
        self.connected = False
        self.ended = ""
        """Why it is no more: disconnected, expired, forgotten, full; empty while it lives."""
        self.subscriptions: set[str] = set()
        self.expires_at = 0.0
        """Monotonic seconds; 0 while a /meta/connect is being handled or held."""
        self.advised = ""
        """The transport whose advice the client has."""
        self.hold: object | None = None
        self.notify: Callable[[], None] | None = None
        self.batch = 1
        self._queue: deque[Message] = deque()
        self._first = 0
        self._taken = 0
        self._closed: deque[tuple[int, int]] = deque()
        self._wanted: dict[str, bool] = {}

    @property
    def fresh(self) -> bool:
        """True when there are messages that no reply has carried yet."""
        return self._first + len(self._queue) > self._taken

    @property
    def waiting(self) -> int:
        """Messages that are queued: with ack, all that are not acknowledged."""
        return len(self._queue)

    def subscribe(self, channel: str) -> None:
        """Add a channel or a pattern (`/*`, `/**`)."""
        self.subscriptions.add(channel)
        self._wanted.clear()

    def unsubscribe(self, channel: str) -> bool:
        """Remove one; False when it was not there."""
        self._wanted.clear()
        if channel not in self.subscriptions:
            return False
        self.subscriptions.remove(channel)
        return True

    def deafen(self) -> set[str]:
        """Lose every subscription without a word, as a server does that forgets them: whatever the client
        asks is answered as ever. Gives what was lost; `subscribe` brings it back."""
        lost, self.subscriptions = self.subscriptions, set()
        self._wanted.clear()
        return lost

    def wants(self, channel: str) -> bool:
        """Whether a subscription covers the channel."""
        wanted = self._wanted.get(channel)
        if wanted is None:
            wanted = self._wanted[channel] = any(matches(p, channel) for p in self.subscriptions)
        return wanted

    def queue(self, message: Message) -> None:
        """Queue a message and say so to the transport."""
        self._queue.append(message)
        if self.notify is not None:
            self.notify()

    def acknowledge(self, batch: int) -> bool:
        """Forget the messages up to this batch. True when some that were sent before are still there: the
        client has not got them all."""
        if batch >= self.batch:
            # CometD forgets all that is queued, however impossible the number is.
            self.ledger.abandon(self._queue)
            self._first += len(self._queue)
            self._taken = self._first
            self._queue.clear()
        while self._closed and self._closed[0][0] <= batch:
            _, end = self._closed.popleft()
            self._discard(end - self._first)
        return not self.fresh and bool(self._queue)

    def _discard(self, count: int) -> None:
        for _ in range(count):
            self._queue.popleft().delivered = True
            self._first += 1
        self._taken = max(self._taken, self._first)

    def take(self, most: int) -> tuple[int, list[Message]]:
        """The messages for one reply, at most so many (0: all), and the number of the batch that this
        closes. Without ack they leave the queue."""
        count = min(most, len(self._queue)) if most else len(self._queue)
        if self.ack:
            messages = list(islice(self._queue, count))
            end = self._first + count
            batch = self.batch
            self._closed.append((batch, end))
            self._taken = max(self._taken, end)
            self.batch += 1
            return batch, messages
        messages = [self._queue.popleft() for _ in range(count)]
        self._first += count
        self._taken = self._first
        return 0, messages

    def end(self, reason: str) -> None:
        """Let it be no more."""
        self.ended = reason
        self.ledger.abandon(self._queue)
        self._queue.clear()
        self._taken = self._first
        if self.notify is not None:
            self.notify()


def matches(pattern: str, channel: str) -> bool:
    """Bayeux channel patterns: `/a/*` is one level deep, `/a/**` any."""
    if pattern.endswith("/**"):
        return channel.startswith(pattern[:-2])
    if pattern.endswith("/*"):
        prefix = pattern[:-1]
        return channel.startswith(prefix) and "/" not in channel[len(prefix) :]
    return pattern == channel


class Broker:
    """All sessions of one server, and what each Bayeux message is answered with."""

    def __init__(self, settings: SimulatorSettings, accounts: Sequence[str]) -> None:
        self.settings = settings
        self.ledgers = {name: Ledger(name, remember=settings.remember) for name in accounts}
        self.sessions: dict[str, ServerSession] = {}
        self.refused: set[str] = set()
        """Channels and patterns to which a subscription is answered 403."""
        self.handshakes = 0
        self._by_account: dict[str, tuple[ServerSession, ...]] = dict.fromkeys(accounts, ())
        self._held: dict[str, int] = {}
        # Client ids must differ between runs even with the same seed, as a restarted server's do.
        self._ids = Random()

    # Messages out. ------------------------------------------------------------------------------

    def publish(self, account: str, message: Message) -> None:
        """Queue a message in every session of the account that is subscribed to its channel."""
        accepted = False
        for session in self._by_account[account]:
            if session.wants(message.channel):
                if session.waiting >= self.settings.session_queue_max:
                    self.remove(session, "full")
                    continue
                accepted = True
                session.queue(message)
        self.ledgers[account].enter(message, accepted=accepted)

    def sessions_of(self, account: str) -> tuple[ServerSession, ...]:
        """Its live sessions, oldest first."""
        return self._by_account[account]

    # Messages in. -------------------------------------------------------------------------------

    def find(self, message: dict[str, Any], browser_id: str | None) -> ServerSession | None:
        """The session that a message belongs to. Over long-polling its BAYEUX_BROWSER cookie must be the
        one that the session was made with; a websocket (None) needs none."""
        session = self.sessions.get(str(message.get("clientId")))
        if session is None or browser_id is None or (browser_id and session.browser_id == browser_id):
            return session
        return None

    def handshake(
        self, message: dict[str, Any], account: str, browser_id: str, transport: str, now: float
    ) -> tuple[ServerSession, Reply]:
        """Open a session."""
        self.handshakes += 1
        wanted = message.get("ext")
        ack = self.settings.ack and isinstance(wanted, dict) and wanted.get("ack") is True
        client_id = f"{self.handshakes:x}{self._ids.getrandbits(100):025x}"
        session = ServerSession(client_id, self.ledgers[account], browser_id, ack=ack)
        self.sessions[client_id] = session
        self._by_account[account] += (session,)
        reply = self._reply(message, successful=True)
        reply |= {
            "clientId": client_id,
            "version": "1.0",
            "minimumVersion": "1.0",
            "supportedConnectionTypes": ([WEBSOCKET] if self.settings.websocket else []) + [LONG_POLLING],
            "advice": self._advice(session, transport),
        }
        if ack:
            reply["ext"] = {"ack": True}
        self.expire_later(session, now)
        return session, reply

    def connect(
        self, session: ServerSession | None, message: dict[str, Any], transport: str, *, alone: bool
    ) -> tuple[Reply, float | None]:
        """Begin to answer a /meta/connect: the reply so far, and the seconds to hold it unless `notify` is
        called; None: answer at once. Call `conclude` when it is to be answered, and, over long-polling
        and if it was held, `release` before that.

        `alone` is false when it came with other messages: then it is never held."""
        if session is None or session.ended:
            return self.unknown(message), None
        session.expires_at = 0.0
        advice = message.get("advice")
        advice = advice if isinstance(advice, dict) else {}
        asked_ms = advice.get("timeout")
        timeout_ms = asked_ms if isinstance(asked_ms, int | float) else None
        extension = message.get("ext")
        batch = extension.get("ack") if isinstance(extension, dict) else None
        if session.ack and isinstance(batch, int) and session.acknowledge(batch) and timeout_ms is None:
            timeout_ms = 0
        was_connected, session.connected = session.connected, True
        if advice:
            # The client may have forgotten the server's advice, for example because of a reload.
            session.advised = ""
        reply = self._reply(message, successful=True)
        if session.advised != transport:
            reply["advice"] = self._advice(session, transport)
        if timeout_ms is None:
            timeout_ms = self.settings.timeout_ms
        # A websocket whose messages do not wait for /meta/connect holds it whatever is queued.
        free = transport == WEBSOCKET and not session.ack
        if not alone or (session.fresh and not free):
            return reply, None
        if transport == LONG_POLLING:
            held = self._held.get(session.browser_id, 0)
            if held >= self.settings.sessions_per_browser:
                reply["advice"] = {
                    "reconnect": "retry",
                    "interval": self.settings.multi_session_interval_ms,
                    "multiple-clients": True,
                }
                return reply, None
            if timeout_ms > 0 and was_connected:
                self._held[session.browser_id] = held + 1
        return reply, timeout_ms / 1000 if timeout_ms > 0 and was_connected else None

    def release(self, session: ServerSession) -> None:
        """A long-polling /meta/connect is held no more."""
        held = self._held[session.browser_id] - 1
        if held:
            self._held[session.browser_id] = held
        else:
            del self._held[session.browser_id]

    def conclude(
        self, session: ServerSession, reply: Reply, transport: str, now: float
    ) -> tuple[Reply, list[Message]]:
        """The answer to a /meta/connect: the reply, and the messages that go before it."""
        if session.ended == "disconnected":
            reply["advice"] = {**reply.get("advice", {}), "reconnect": "none"}
            return reply, []
        if session.ended:
            return self.unknown(reply), []
        most = self.settings.reply_messages_max if transport == LONG_POLLING else 0
        batch, messages = session.take(most)
        if session.ack:
            reply["ext"] = {"ack": batch}
        self.expire_later(session, now)
        return reply, messages

    def handle(self, session: ServerSession | None, message: dict[str, Any], now: float) -> Reply:
        """Answer any message that is neither a handshake nor a /meta/connect."""
        channel = message.get("channel")
        if session is None or session.ended:
            return self.unknown(message)
        if session.expires_at:
            session.expires_at = max(session.expires_at, now + self.settings.max_interval_ms / 1000)
        if channel == "/meta/subscribe":
            return self._subscribe(session, message)
        if channel == "/meta/unsubscribe":
            channels = _channels(message)
            if not channels:
                return self._reply(message, error="403::subscription_missing")
            if not all(session.unsubscribe(name) for name in channels):
                return self._reply(message, error="403::unsubscribe_failed")
            return self._reply(message, successful=True)
        if channel == "/meta/disconnect":
            self.remove(session, "disconnected")
            return self._reply(message, successful=True)
        if not isinstance(channel, str):
            return self._reply(message, error="400::channel_missing")
        # GWS publishes, its clients only listen.
        return self._reply(message, error="403:denied_by_security_policy:publish_denied")

    def _subscribe(self, session: ServerSession, message: dict[str, Any]) -> Reply:
        channels = _channels(message)
        if not channels:
            return self._reply(message, error="403::subscription_missing")
        for name in channels:
            if not name.startswith("/"):
                return self._reply(message, error="403::subscription_invalid")
            if name in self.refused or any(matches(pattern, name) for pattern in self.refused):
                return self._reply(message, error="403:denied_by_security_policy:subscribe_denied")
            session.subscribe(name)
        return self._reply(message, successful=True)

    # Ends. --------------------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        """Remove the sessions that have expired."""
        for session in [s for s in self.sessions.values() if 0 < s.expires_at < now]:
            self.remove(session, "expired")

    def remove(self, session: ServerSession, reason: str) -> None:
        """End a session: disconnected | expired | forgotten | full."""
        if self.sessions.pop(session.id, None) is None:
            return
        account = session.ledger.account
        self._by_account[account] = tuple(s for s in self._by_account[account] if s is not session)
        session.end(reason)

    # Replies. -----------------------------------------------------------------------------------

    def expire_later(self, session: ServerSession, now: float) -> None:
        """Let the session expire unless a /meta/connect comes in time."""
        session.expires_at = now + (self.settings.interval_ms + self.settings.max_interval_ms) / 1000

    def _advice(self, session: ServerSession, transport: str) -> dict[str, Any]:
        session.advised = transport
        advice: dict[str, Any] = {
            "interval": self.settings.interval_ms,
            "timeout": self.settings.timeout_ms,
            "reconnect": "retry",
        }
        if self.settings.advise_max_interval:
            advice["maxInterval"] = self.settings.max_interval_ms
        return advice

    def _reply(self, message: dict[str, Any], *, successful: bool = False, error: str = "") -> Reply:
        reply: Reply = {"channel": message.get("channel"), "successful": successful}
        if "id" in message:
            reply["id"] = message["id"]
        if "subscription" in message:
            reply["subscription"] = message["subscription"]
        if error:
            reply["error"] = error
        return reply

    def unknown(self, message: dict[str, Any]) -> Reply:
        """What a message of an unknown client is answered with; a reply will do for the message."""
        reply = self._reply(message, error="402::session_unknown")
        if message.get("channel") in ("/meta/connect", "/meta/handshake"):
            reply["advice"] = {"interval": 0, "reconnect": "handshake"}
        return reply


def _channels(message: dict[str, Any]) -> list[str]:
    wanted = message.get("subscription")
    return [str(name) for name in wanted] if isinstance(wanted, list) else [wanted] if wanted else []
