"""A conversation with a session, written as a script: what it sends, what is answered, what it then tells.

A `Playbook` holds a `Session`, a clock that moves only when the script says so, and the last request. Its
verbs take both parts: `sends`, `rests`, `logs_in` and `stops` claim what the session wants to do next, and
fail if it wants anything else; `answers`, `refuses`, `fails` and `pushes` are the server and the network,
and give the facts that the session told. There is nothing asynchronous and no chance in it.

`play` runs a session against a function that answers, over simulated minutes, to count what it sends.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

from listener.core.session import (
    CONNECT,
    DEFAULT_LIMITS,
    DISCONNECT,
    HANDSHAKE,
    SUBSCRIBE,
    Delivered,
    Fact,
    Failure,
    Limits,
    Login,
    Send,
    Session,
    Sleep,
    Stop,
    split,
)

CALLS = "/v2/me/calls"
DEVICES = "/v2/me/devices"
T0 = 1000.0
"""When every script begins, in seconds of its clock."""

ACTS_MAX = 10_000
"""A session that wants more than so much at one moment of `play` runs in circles."""

Message = dict[str, Any]
Told = TypeVar("Told")
Answer = list[bytes] | Failure


def call(seq: int, channel: str = CALLS) -> bytes:
    """A data message that can be told from others by its number."""
    return json.dumps({"channel": channel, "data": {"seq": seq}}).encode()


def seqs(facts: list[Fact]) -> list[int]:
    """The numbers of the messages that were delivered, in order."""
    return [
        json.loads(raw)["data"]["seq"]
        for fact in facts
        if isinstance(fact, Delivered)
        for _, raw in fact.messages
    ]


def only(facts: list[Fact], kind: type[Told]) -> Told:
    """The one fact of this kind."""
    (fact,) = [each for each in facts if isinstance(each, kind)]
    return fact


def replies(send: Send, **fields: Any) -> list[Message]:
    """What a server that agrees answers to each message of a request; `fields` are laid over each."""
    made = []
    for message in send.messages:
        reply = {"channel": message["channel"], "id": message["id"], "successful": True}
        if send.channel == SUBSCRIBE:
            reply["subscription"] = message["subscription"]
        made.append({**reply, **fields})
    return made


def encoded(items: list[Message]) -> list[bytes]:
    """Each item as a server would write it."""
    return [json.dumps(item).encode() for item in items]


class Playbook:
    """One conversation. `channels` and `limits` are the session's; its jitter always waits longest."""

    def __init__(
        self, *channels: str, limits: Limits = DEFAULT_LIMITS, jitter: Callable[[], float] = lambda: 1.0
    ) -> None:
        self.now = T0
        self.session = Session(now=self.now, jitter=jitter, limits=limits)
        self.facts: list[Fact] = []
        """Everything that was told, in order."""
        self.sent: Send | None = None
        for channel in channels or (CALLS,):
            self.session.want(channel)

    # What the session does

    def sends(self, channel: str, **fields: Any) -> Send:
        """It wants to send on `channel` now, and each message has these fields."""
        action = self.session.next(self.now)
        assert isinstance(action, Send), f"wants {action} instead of {channel}"
        assert action.channel == channel, f"wants {action}"
        for message in action.messages:
            assert message["channel"] == channel
            for name, value in fields.items():
                assert message.get(name) == value, f"{name} is {message.get(name)!r}, not {value!r}"
        self.sent = action
        return action

    def rests(self) -> float:
        """It wants nothing now; moves the clock to the time that it names, and gives the seconds."""
        action = self.session.next(self.now)
        assert isinstance(action, Sleep), f"wants {action} instead of rest"
        seconds = action.until - self.now
        assert seconds > 0, "rest without end"
        self.now = action.until
        return seconds

    def logs_in(self) -> None:
        """It wants to log in now."""
        assert self.session.next(self.now) == Login()

    def stops(self) -> None:
        """It wants nothing any more."""
        assert self.session.next(self.now) == Stop()

    # What happens to it

    def after(self, seconds: float) -> "Playbook":
        """Moves the clock."""
        self.now += seconds
        return self

    def hears(self, items: list[bytes]) -> list[Fact]:
        """These items arrive, as they are."""
        return self._told(self.session.received(items, self.now))

    def pushes(self, *data: bytes) -> list[Fact]:
        """Data arrives by itself, as frames of a websocket do."""
        return self.hears(list(data))

    def answers(self, *data: bytes, **fields: Any) -> list[Fact]:
        """The server agrees to the last request; data comes before the reply, as CometD sends it."""
        assert self.sent is not None, "nothing was asked"
        return self.hears([*data, *encoded(replies(self.sent, **fields))])

    def refuses(self, error: str, **fields: Any) -> list[Fact]:
        """The server refuses every message of the last request."""
        return self.answers(successful=False, error=error, **fields)

    def fails(self, failure: Failure = Failure.NETWORK, detail: str = "cut") -> list[Fact]:
        """The last request brought no answer."""
        return self._told(self.session.failed(failure, detail, self.now))

    def commits(self, position: int) -> None:
        """Everything up to this position is durable."""
        self.session.committed(position)

    def _told(self, facts: list[Fact]) -> list[Fact]:
        self.facts += facts
        return facts

    # Longer passages

    def handshakes(self, *, ack: bool = True, client_id: str = "c1", **fields: Any) -> list[Fact]:
        """It asks for a session and is given one."""
        self.sends(HANDSHAKE)
        ext = {"ext": {"ack": True}} if ack else {}
        advice = {"reconnect": "retry", "timeout": 30_000, "interval": 0}
        return self.answers(**{"clientId": client_id, "advice": advice, **ext, **fields})

    def opens(self, *, ack: bool = True, client_id: str = "c1", **fields: Any) -> list[Fact]:
        """All that it takes to be subscribed: a handshake, a connect that does not wait, the subscription."""
        facts = self.handshakes(ack=ack, client_id=client_id, **fields)
        self.sends(CONNECT, clientId=client_id, advice={"timeout": 0})
        facts += self.answers(**({"ext": {"ack": 1}} if ack else {}))
        self.sends(SUBSCRIBE, clientId=client_id)
        return facts + self.answers()

    def polls(self, *data: bytes, ack: int | None = None, **fields: Any) -> list[Fact]:
        """A connect, answered with data and with the number of the batch."""
        self.sends(CONNECT)
        return self.answers(*data, **({"ext": {"ack": ack}} if ack is not None else {}), **fields)

    def says_goodbye(self) -> None:
        """It is told to leave, says so, is answered, and is gone."""
        self.session.goodbye()
        self.sends(DISCONNECT)
        self.answers()
        self.stops()


def play(
    playbook: Playbook, answer: Callable[[Send, float], Answer], seconds: float, *, lag_s: float = 0.001
) -> list[tuple[float, Send | Login]]:
    """Obeys the session for so many simulated seconds; gives when it sent what, or logged in.

    `answer` is the server: it takes a request and the time, and gives the items that come back, or how the
    request failed. Logins succeed. Everything takes `lag_s`.
    """
    end = playbook.now + seconds
    acts: list[tuple[float, Send | Login]] = []
    while playbook.now < end:
        action = playbook.session.next(playbook.now)
        if isinstance(action, Stop):
            break
        if isinstance(action, Sleep):
            playbook.now = max(playbook.now, min(action.until, end))
            continue
        acts.append((playbook.now, action))
        assert len(acts) < ACTS_MAX, "a storm"
        playbook.now += lag_s
        if isinstance(action, Login):
            playbook.session.logged_in()
            continue
        came = answer(action, playbook.now)
        if isinstance(came, Failure):
            playbook.fails(came)
        else:
            playbook.hears(came)
            if not playbook.session.answered:
                playbook.fails(Failure.MALFORMED, "no reply")
    return acts


def body(*items: Message) -> list[bytes]:
    """Items as they come out of an answer's body."""
    return split(json.dumps(list(items)).encode())
