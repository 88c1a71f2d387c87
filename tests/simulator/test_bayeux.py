"""The CometD server without its sockets: channels, batches, acknowledgements, bounds."""

from random import Random
from typing import Any

import pytest

from listener.simulator.bayeux import LONG_POLLING, Broker, ServerSession, matches
from listener.simulator.scripts import CALLS_CHANNEL, Message
from listener.simulator.settings import SimulatorSettings

Json = dict[str, Any]


def message(number: int, channel: str = CALLS_CHANNEL) -> Message:
    """A data message that says its number."""
    return Message(channel, b'{"n":%d}' % number)


def opened(broker: Broker, *, ack: bool = True) -> ServerSession:
    """A session of the account `a` that is subscribed and has had its first connect."""
    ext = {"ext": {"ack": True}} if ack else {}
    session, _ = broker.handshake({"channel": "/meta/handshake", **ext}, "a", "b1", LONG_POLLING, 0.0)
    broker.handle(session, {"channel": "/meta/subscribe", "subscription": CALLS_CHANNEL}, 0.0)
    connect(broker, session, -1)
    return session


def connect(broker: Broker, session: ServerSession, ack: int, **advice: int) -> tuple[Json, list[int]]:
    """A whole /meta/connect that is not held: the reply and the numbers that came with it."""
    asked: Json = {"channel": "/meta/connect", "clientId": session.id, "ext": {"ack": ack}}
    if advice:
        asked["advice"] = advice
    reply, hold_s = broker.connect(session, asked, LONG_POLLING, alone=True)
    if hold_s is not None:
        broker.release(session)
    reply, data = broker.conclude(session, reply, LONG_POLLING, 0.0)
    return {**reply, "held": hold_s}, [int(m.raw[5:-1]) for m in data]


@pytest.mark.parametrize(
    ("pattern", "channel", "expected"),
    [
        ("/v2/me/calls", "/v2/me/calls", True),
        ("/v2/me/calls", "/v2/me/devices", False),
        ("/v2/me/*", "/v2/me/calls", True),
        ("/v2/me/*", "/v2/me/calls/deep", False),
        ("/v2/*", "/v2/me/calls", False),
        ("/v2/**", "/v2/me/calls", True),
        ("/**", "/v2/me/calls", True),
    ],
)
def test_channel_patterns(pattern: str, channel: str, *, expected: bool) -> None:
    """`*` is one level, `**` any."""
    assert matches(pattern, channel) is expected


def test_each_connect_closes_a_batch() -> None:
    """The numbers go up by one with every reply, also when it carries nothing."""
    broker = Broker(SimulatorSettings(), ["a"])
    session = opened(broker)
    broker.publish("a", message(1))
    first, data = connect(broker, session, 1)
    assert (first["ext"]["ack"], data) == (2, [1])
    second, data = connect(broker, session, 2, timeout=0)
    assert (second["ext"]["ack"], data) == (3, [])


def test_an_older_acknowledgement_brings_everything_after_it_again() -> None:
    """What was not acknowledged comes again, in order, with what is new, under a new number."""
    broker = Broker(SimulatorSettings(), ["a"])
    session = opened(broker)
    for number in (1, 2):
        broker.publish("a", message(number))
    _, data = connect(broker, session, 1)
    assert data == [1, 2]
    broker.publish("a", message(3))
    _, data = connect(broker, session, 1)
    assert data == [1, 2, 3]
    _, data = connect(broker, session, 2)
    assert data == [3]
    _, data = connect(broker, session, 3, timeout=0)
    assert data == []


def test_a_connect_that_leaves_messages_behind_is_not_held() -> None:
    """With unacknowledged messages the reply is immediate, unless the client gave a timeout itself."""
    broker = Broker(SimulatorSettings(timeout_ms=5000), ["a"])
    session = opened(broker)
    broker.publish("a", message(1))
    connect(broker, session, 1)
    reply, data = connect(broker, session, 1)
    assert (reply["held"], data) == (None, [1])
    reply, data = connect(broker, session, 1, timeout=2000)
    assert (reply["held"], data) == (2.0, [1])
    reply, data = connect(broker, session, 4)
    assert (reply["held"], data) == (5.0, [])


def test_a_bounded_reply_leaves_the_rest_for_the_next() -> None:
    """With a bound on the reply nothing is lost, nothing comes twice, and the order stays."""
    broker = Broker(SimulatorSettings(reply_messages_max=10), ["a"])
    session = opened(broker)
    for number in range(35):
        broker.publish("a", message(number))
    got: list[int] = []
    ack = 1
    for _ in range(4):
        reply, data = connect(broker, session, ack)
        assert len(data) <= 10
        got += data
        ack = reply["ext"]["ack"]
    assert got == list(range(35))


def test_without_ack_a_taken_message_is_gone() -> None:
    """Nothing comes again without the extension, whether the client asks for it or not."""
    broker = Broker(SimulatorSettings(ack=False), ["a"])
    session = opened(broker)
    broker.publish("a", message(1))
    reply, data = connect(broker, session, -1)
    assert data == [1]
    assert "ext" not in reply
    assert connect(broker, session, -1, timeout=0)[1] == []


def test_random_losses_of_replies_lose_nothing() -> None:
    """Whatever replies are lost and whatever older acknowledgements come, each message arrives, and the
    first arrivals are in order."""
    for seed in range(50):
        rng = Random(seed)
        broker = Broker(SimulatorSettings(reply_messages_max=rng.choice([0, 3, 10])), ["a"])
        session = opened(broker)
        sent, ack = 0, 1
        seen: list[int] = []
        for _ in range(200):
            if rng.random() < 0.6:
                sent += 1
                broker.publish("a", message(sent))
            if rng.random() < 0.5:
                reply, data = connect(broker, session, ack, timeout=0)
                if rng.random() < 0.7:
                    ack = reply["ext"]["ack"]
                    seen += [number for number in data if not seen or number > seen[-1]]
        for _ in range(200):
            reply, data = connect(broker, session, ack, timeout=0)
            ack = reply["ext"]["ack"]
            seen += [number for number in data if not seen or number > seen[-1]]
        assert seen == list(range(1, sent + 1))
        assert session.waiting == 0
        assert all(m.delivered for m in broker.ledgers["a"].messages or ())


def test_a_full_queue_drops_the_session() -> None:
    """A client that takes nothing loses its session at the bound, and hears 402."""
    broker = Broker(SimulatorSettings(session_queue_max=5), ["a"])
    session = opened(broker)
    for number in range(6):
        broker.publish("a", message(number))
    assert session.ended == "full"
    assert broker.find({"clientId": session.id}, "b1") is None
    ledger = broker.ledgers["a"]
    assert (ledger.sent, ledger.accepted, ledger.unsubscribed) == (6, 5, 1)
    assert ledger.undelivered == [1, 2, 3, 4, 5]


def test_a_session_expires_only_between_connects() -> None:
    """It goes interval + maxInterval after the last reply, and never while a connect is held."""
    broker = Broker(SimulatorSettings(max_interval_ms=5000), ["a"])
    session = opened(broker)
    broker.sweep(4.9)
    assert session.id in broker.sessions
    broker.connect(session, {"channel": "/meta/connect", "ext": {"ack": 1}}, LONG_POLLING, alone=True)
    broker.sweep(100.0)
    assert session.id in broker.sessions
    broker.release(session)
    broker.conclude(session, {}, LONG_POLLING, 100.0)
    broker.sweep(105.1)
    assert session.ended == "expired"


def test_the_ledger_knows_what_nobody_heard() -> None:
    """Messages on a channel without a subscriber are counted apart and are not in the digest."""
    broker = Broker(SimulatorSettings(), ["a"])
    broker.publish("a", message(1))
    opened(broker)
    broker.publish("a", message(2))
    broker.publish("a", message(3, "/v2/me/devices"))
    ledger = broker.ledgers["a"]
    assert (ledger.sent, ledger.accepted, ledger.unsubscribed) == (3, 1, 2)
    assert [(m.position, m.accepted) for m in ledger.messages or ()] == [(1, False), (2, True), (3, False)]
    other = Broker(SimulatorSettings(), ["a"])
    opened(other)
    other.publish("a", message(2))
    assert other.ledgers["a"].digest == ledger.digest
