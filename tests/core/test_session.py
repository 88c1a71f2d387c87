"""The session as a script: send, answer, facts. No socket, no clock, no chance but Hypothesis'.

Each rule of `listener.core.session` has its conversation here, and each way in which a server, a network or
a store was measured to go wrong. The last part lets chance play the server: first one that answers anything
at all, then one that keeps CometD's promises while the network keeps none.
"""

import json
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise, product
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from listener.core.calls import GAP_CAUSES
from listener.core.session import (
    CONNECT,
    DEFAULT_LIMITS,
    DISCONNECT,
    EARLY_BYTES_MAX,
    HANDSHAKE,
    LONG_POLLING,
    SUBSCRIBE,
    WEBSOCKET,
    Cookie,
    Delivered,
    Fact,
    Failure,
    Gap,
    Handshaken,
    Kept,
    Limits,
    Login,
    Refused,
    Resumed,
    Saved,
    Send,
    Session,
    Sleep,
    Subscribed,
    SubscriptionRefused,
    Unbroken,
    split,
)
from tests.core.playbook import (
    CALLS,
    DEVICES,
    T0,
    Answer,
    Playbook,
    body,
    call,
    encoded,
    only,
    play,
    replies,
    seqs,
)

MINUTE = 60.0
TIGHT = 1e-6
"""How exactly times are compared: they are sums of floats."""


def opened(*channels: str, ack: bool = True, limits: Limits = DEFAULT_LIMITS, **fields: Any) -> Playbook:
    """A conversation whose session is subscribed and has told so."""
    script = Playbook(*channels, limits=limits)
    script.opens(ack=ack, **fields)
    return script


def kinds(facts: list[Fact]) -> list[type[Fact]]:
    """What kinds of facts were told, in order."""
    return [type(fact) for fact in facts]


# ── Opening ───────────────────────────────────────────────────────────────────────────────────────────


def test_opening_is_handshake_connect_subscribe_connect() -> None:
    """A session is opened in that order, and the first connect does not wait, nothing being subscribed."""
    script = Playbook(CALLS)
    script.session.offer([WEBSOCKET, LONG_POLLING])

    script.sends(
        HANDSHAKE, version="1.0", supportedConnectionTypes=[WEBSOCKET, LONG_POLLING], ext={"ack": True}
    )
    told = script.answers(clientId="c1", ext={"ack": True}, supportedConnectionTypes=[LONG_POLLING])
    assert told == [Handshaken("c1", True, (LONG_POLLING,))]

    script.sends(CONNECT, clientId="c1", connectionType=LONG_POLLING, advice={"timeout": 0}, ext={"ack": -1})
    assert script.answers(ext={"ack": 1}) == []
    assert script.session.subscribed == set()

    script.sends(SUBSCRIBE, clientId="c1", subscription=CALLS)
    assert script.answers() == [Subscribed()]
    assert script.session.observing
    assert script.session.subscribed == {CALLS}

    assert "advice" not in script.sends(CONNECT).messages[0]


def test_channels_are_subscribed_in_one_request() -> None:
    """One request carries a message for each channel, and only all of them together are a subscription."""
    script = Playbook(CALLS, DEVICES)
    script.handshakes()
    script.polls()

    request = script.sends(SUBSCRIBE)
    assert [message["subscription"] for message in request.messages] == [CALLS, DEVICES]

    first, second = encoded(replies(request))
    assert script.hears([first]) == []
    assert not script.session.answered
    assert script.hears([second]) == [Subscribed()]
    assert script.session.answered


def test_a_channel_wanted_later_is_subscribed_then() -> None:
    """A channel that is wanted while the session lives is asked for next, alone."""
    script = opened()
    script.session.want(DEVICES)

    request = script.sends(SUBSCRIBE, subscription=DEVICES)
    assert len(request.messages) == 1
    assert script.answers() == [Subscribed()]
    script.sends(CONNECT)


def test_a_channel_unwanted_is_asked_for_no_more() -> None:
    """After `unwant` a new session subscribes to the others only."""
    script = opened(CALLS, DEVICES)
    script.session.unwant(DEVICES)
    script.session.unwant("/never/wanted")
    assert script.session.wanted == (CALLS,)

    script.session.abandon("stalled", "nothing heard", script.now)
    script.rests()
    script.handshakes(client_id="c2")
    script.polls()
    assert [each["subscription"] for each in script.sends(SUBSCRIBE).messages] == [CALLS]


def test_without_channels_the_session_is_only_kept_alive() -> None:
    """Before anything is wanted a poll would only hold up the subscription to come."""
    script = Playbook(CALLS)
    script.session.unwant(CALLS)
    script.handshakes()
    script.polls()
    assert script.rests() == pytest.approx(DEFAULT_LIMITS.keep_alive_s)
    script.sends(CONNECT, advice={"timeout": 0})


def test_message_ids_never_repeat() -> None:
    """A reply names the request by its id: no id means two requests."""
    script = opened()
    ids = []
    for number in range(1, 20):
        request = script.sends(CONNECT)
        ids += [message["id"] for message in request.messages]
        script.answers(call(number), ext={"ack": number})
        script.commits(number)
    assert len(set(ids)) == len(ids) == 19


def test_a_server_that_names_no_connection_types_offers_long_polling() -> None:
    """Long-polling is what every server has to offer (Bayeux 1.0, section 2.1)."""
    script = Playbook()
    facts = script.handshakes(supportedConnectionTypes="websocket")
    assert only(facts, Handshaken).connection_types == (LONG_POLLING,)


def test_replies_without_id_answer_what_was_asked() -> None:
    """`id` is optional in the specification; a server without it is answered like any other."""
    script = Playbook()
    script.sends(HANDSHAKE)
    script.answers(clientId="c1", id=None)
    assert script.session.answered
    script.sends(CONNECT)
    script.answers(id=None)
    script.sends(SUBSCRIBE)
    assert script.answers(id=None) == [Subscribed()]


def test_ids_may_come_back_as_numbers() -> None:
    """Some servers turn the id "3" into the number 3."""
    script = opened()
    request = script.sends(CONNECT)
    script.hears(encoded([{"channel": CONNECT, "id": int(request.messages[0]["id"]), "successful": True}]))
    assert script.session.answered


# ── The last ask ──────────────────────────────────────────────────────────────────────────────────────


def test_the_last_ask_acknowledges_what_is_durable_and_is_not_held() -> None:
    """Whatever is being held: it is answered at once. After it a connect that is held may be left behind."""
    script = opened()
    script.polls(call(1), ack=2)
    script.commits(1)
    script.sends(CONNECT, ext={"ack": 2})
    script.sent = asked = script.after(9).session.last(script.now)
    assert asked is not None
    (message,) = asked.messages
    assert (asked.channel, message["ext"], message["advice"]) == (CONNECT, {"ack": 2}, {"timeout": 0})
    assert asked.timeout_s == DEFAULT_LIMITS.network_delay_s
    assert seqs(script.answers(call(2), ext={"ack": 3})) == [2]
    assert script.session.observing

    assert script.session.last(script.now, held=True) is None, "not durable yet"
    script.commits(2)
    left = script.session.last(script.now, held=True)
    assert left is not None
    assert left.messages[0]["ext"] == {"ack": 3}
    assert "advice" not in left.messages[0]


def test_what_was_under_way_comes_with_the_last_ask_and_counts_once() -> None:
    """Frames whose number had not come yet were not told; the server repeats them, and they are heard."""
    script = opened()
    script.sends(CONNECT)
    script.pushes(call(1), call(2))
    script.sent = script.session.last(script.now)
    told = script.answers(call(1), call(2), call(3), ext={"ack": 5})
    assert told == [Delivered(1, [(CALLS, call(n)) for n in (1, 2, 3)], before=(-1, 0), batch=(5, 3))]


def test_a_last_ask_that_proves_nothing_is_not_made() -> None:
    """Without acknowledgements, in a gap, with something that is not durable, before the first connect and
    after the farewell."""
    assert opened(ack=False).session.last(T0) is None
    assert Playbook(CALLS).session.last(T0) is None
    script = opened()
    script.polls(call(1), ack=2)
    assert script.session.last(script.now) is None
    assert script.after(MINUTE).session.last(script.now) is None
    script.commits(1)
    assert script.session.last(script.now) is not None
    script.fails()
    assert script.session.last(script.now) is None
    script = opened()
    script.session.goodbye()
    assert script.session.last(script.now) is None


def test_a_session_that_is_unknown_at_the_last_ask_proves_nothing() -> None:
    """The answer says so, and it observes no more."""
    script = opened()
    script.sent = script.session.last(script.now)
    script.refuses("402::session_unknown")
    assert not script.session.observing


# ── Acknowledge after commit ──────────────────────────────────────────────────────────────────────────


def test_a_batch_is_acknowledged_only_after_its_commit() -> None:
    """What was delivered stays the server's to keep until it is durable here."""
    script = opened()
    told = script.polls(call(1), call(2), ack=2)
    assert told == [Delivered(1, [(CALLS, call(1)), (CALLS, call(2))], before=(-1, 0), batch=(2, 2))]

    assert isinstance(script.session.next(script.now), Sleep)
    script.commits(2)
    script.sends(CONNECT, ext={"ack": 2})


def test_a_commit_of_a_part_acknowledges_nothing() -> None:
    """A batch has one number: it is acknowledged whole or not at all."""
    script = opened()
    script.polls(call(1), call(2), call(3), ack=2)
    script.commits(2)
    script.rests()
    script.sends(CONNECT, ext={"ack": -1})
    script.answers(call(1), call(2), call(3), ext={"ack": 3})
    script.commits(3)
    script.sends(CONNECT, ext={"ack": 2})


def test_commits_may_come_before_the_number_does() -> None:
    """Over a websocket the data can be durable before the reply that numbers its batch has come."""
    script = opened()
    script.sends(CONNECT)
    script.pushes(call(1))
    script.commits(1)
    script.answers(ext={"ack": 7})
    script.sends(CONNECT, ext={"ack": 7})


def test_commits_never_go_backwards() -> None:
    """A late word about an earlier commit takes nothing back."""
    script = opened()
    script.polls(call(1), call(2), ack=2)
    script.commits(2)
    script.commits(1)
    script.sends(CONNECT, ext={"ack": 2})


def test_the_number_is_the_servers_whatever_it_is() -> None:
    """We count positions; what the server calls its batches is echoed and not understood."""
    script = opened()
    script.polls(call(1), ack="batch-9")  # type: ignore[arg-type]
    script.commits(1)
    script.sends(CONNECT, ext={"ack": "batch-9"})


def test_a_server_that_may_not_acknowledge_is_asked_nothing_of_the_kind() -> None:
    """Without the extension a connect carries no acknowledgement."""
    script = opened(ack=False)
    assert not script.session.ack
    script.polls(call(1))
    assert "ext" not in script.sends(CONNECT).messages[0]


def test_the_session_is_kept_alive_with_the_old_acknowledgement() -> None:
    """While the store is slow the server hears from us, learns nothing new, and is not made to wait."""
    script = opened()
    script.polls(call(1), ack=2)
    script.commits(1)
    script.polls(call(2), ack=3)

    for _ in range(5):
        assert script.rests() == pytest.approx(DEFAULT_LIMITS.keep_alive_s)
        script.sends(CONNECT, ext={"ack": 2}, advice={"timeout": 0})
        assert script.answers(call(2), call(3), ext={"ack": 4}) == []
    assert script.session.observing

    script.commits(2)
    script.sends(CONNECT, ext={"ack": 3})
    assert seqs(script.answers(call(3), ext={"ack": 5})) == [3]


def test_what_a_keep_alive_brings_is_not_acknowledged() -> None:
    """The answer to a keep-alive is dropped, so its number must never be sent."""
    script = opened()
    script.polls(call(1), ack=2)
    script.rests()
    script.sends(CONNECT)
    script.commits(1)
    script.answers(call(1), call(2), ext={"ack": 3})
    script.sends(CONNECT, ext={"ack": 2})
    assert seqs(script.answers(call(2), ext={"ack": 4})) == [2]


def test_the_keep_alive_follows_the_servers_own_bound() -> None:
    """A server that gives sessions up earlier than usual hears from us earlier."""
    script = opened(advice={"timeout": 3000, "maxInterval": 2000})
    script.polls(call(1), ack=2)
    assert script.rests() < 1.0


def test_two_equal_messages_are_two_facts() -> None:
    """What makes a repetition is its place, not its content."""
    script = opened()
    assert seqs(script.polls(call(5), call(5), ack=2)) == [5, 5]
    script.commits(2)
    assert seqs(script.polls(call(5), ack=3)) == [5]
    assert script.session.position == 3


def test_a_lost_reply_is_repeated_and_counts_once() -> None:
    """The connection is cut after the data and before the number: the server sends both again."""
    script = opened()
    script.sends(CONNECT)
    assert script.pushes(call(1), call(1)) == []
    assert seqs(script.fails()) == [1, 1]
    script.rests()

    told = script.polls(call(1), call(1), call(3), ack=3)
    delivered = only(told, Delivered)
    assert (delivered.first, delivered.redelivered) == (3, 2)
    assert seqs(told) == [3]
    script.commits(3)
    script.sends(CONNECT, ext={"ack": 3})


def test_several_lost_replies_in_a_row() -> None:
    """Each attempt brings a little more, and all of it again; only the last brings the number."""
    script = opened()
    got: list[int] = []
    for upto in (2, 3, 5):
        script.sends(CONNECT, ext={"ack": -1})
        assert script.pushes(*map(call, range(1, upto + 1))) == []
        got += seqs(script.fails())
        script.rests()
    got += seqs(script.polls(*map(call, range(1, 7)), ack=9))
    assert got == [1, 2, 3, 4, 5, 6]
    script.commits(6)
    script.sends(CONNECT, ext={"ack": 9})


def test_a_repetition_that_is_cut_short_again() -> None:
    """The repetition may end before what we had: what it lacked comes the next time, and is still known."""
    script = opened()
    script.sends(CONNECT)
    script.pushes(call(1), call(2), call(3))
    script.fails()
    script.rests()
    script.sends(CONNECT)
    script.pushes(call(1))
    assert seqs(script.fails()) == []
    script.rests()
    assert seqs(script.polls(call(1), call(2), call(3), call(4), ack=4)) == [4]


def test_the_place_follows_the_last_acknowledgement_sent() -> None:
    """A repetition begins after what *that* connect acknowledged, not after what was acknowledged since."""
    script = opened()
    script.polls(call(1), call(2), ack=2)
    script.commits(2)
    script.sends(CONNECT, ext={"ack": 2})
    script.pushes(call(3))
    script.fails()
    script.rests()
    script.sends(CONNECT, ext={"ack": 2})
    assert seqs(script.answers(call(3), call(4), ext={"ack": 3})) == [4]
    assert script.session.position == 4


def test_an_answer_without_number_is_acknowledged_never() -> None:
    """Something between us and the server took `ext` away: the data counts, and may come again."""
    script = opened()
    assert seqs(script.polls(call(1))) == [1]
    assert seqs(script.polls(call(1), call(2), ack=2)) == [2]
    script.commits(2)
    script.sends(CONNECT, ext={"ack": 2})


def test_positions_begin_anew_with_each_session() -> None:
    """Another session is another stream; commits of the old one acknowledge nothing in it."""
    script = opened()
    script.polls(call(1), call(2), ack=2)
    script.rests()
    script.sends(CONNECT)
    script.refuses("402::session_unknown")
    script.commits(2)
    script.rests()
    script.opens(client_id="c2")

    told = script.polls(call(3), ack=2)
    assert only(told, Delivered).first == 1
    script.rests()
    script.sends(CONNECT, ext={"ack": -1})


def test_without_acknowledgement_everything_counts() -> None:
    """A server without the extension repeats nothing, so nothing can be a repetition."""
    script = opened(ack=False)
    assert seqs(script.polls(call(1), call(1))) == [1, 1]
    script.sends(CONNECT)
    script.pushes(call(2))
    script.fails()
    script.rests()
    told = script.polls(call(2))
    assert seqs(told) == [2]
    assert only(told, Delivered).redelivered == 0
    assert script.session.position == 4


def test_data_outside_of_a_connect_has_no_place_where_batches_are_counted() -> None:
    """An acknowledging server repeats what its connects carried, and nothing else."""
    script = opened()
    script.polls(call(1), ack=2)
    told = script.pushes(call(9))
    assert told == [Delivered(2, [], odd=((CALLS, call(9)),))]
    assert script.session.position == 1


def test_data_with_a_handshake_belongs_to_the_new_session() -> None:
    """A server may hand data to a session as soon as it exists; its places count from 1."""
    script = opened(ack=False)
    script.polls(call(1), call(2))
    script.sends(CONNECT)
    script.refuses("402::session_unknown")
    script.rests()
    request = script.sends(HANDSHAKE)
    told = script.hears([*encoded(replies(request, clientId="c2")), call(3)])
    assert kinds(told) == [Handshaken, Delivered]
    assert only(told, Delivered).first == 1


def test_a_message_without_data_is_acknowledged_like_the_others() -> None:
    """What stands in the server's queue must leave it, or it would come again for ever."""
    script = opened()
    bare = b'{"channel":"/v2/me/calls","ext":{"x":1}}'
    told = script.polls(bare, ack=2)
    assert only(told, Delivered).messages == [(CALLS, bare)]
    script.commits(1)
    script.sends(CONNECT, ext={"ack": 2})


# ── Advice ────────────────────────────────────────────────────────────────────────────────────────────


def test_times_of_advice_are_milliseconds() -> None:
    """An interval of 2000 is two seconds of rest, a timeout of 3000 three of waiting."""
    script = opened(ack=False)
    script.polls(call(1), advice={"reconnect": "retry", "interval": 2000, "timeout": 3000})
    assert script.rests() == pytest.approx(2.0)
    assert script.sends(CONNECT).timeout_s == pytest.approx(3.0 + DEFAULT_LIMITS.network_delay_s)


def test_advice_is_merged() -> None:
    """What an advice leaves out keeps its last value."""
    script = opened(ack=False)
    script.polls(call(1), advice={"timeout": 3000})
    script.polls(call(2), advice={"interval": 500})
    assert script.rests() == pytest.approx(0.5)
    assert script.sends(CONNECT).timeout_s == pytest.approx(3.0 + DEFAULT_LIMITS.network_delay_s)
    script.answers(call(3), advice={"interval": 0})
    assert script.sends(CONNECT).timeout_s == pytest.approx(3.0 + DEFAULT_LIMITS.network_delay_s)


@pytest.mark.parametrize(
    "advice",
    [
        None,
        {},
        "retry",
        7,
        [],
        {"interval": None, "timeout": None, "reconnect": None},
        {"interval": -1, "timeout": -5},
        {"interval": "soon", "timeout": {"ms": 1}},
        {"interval": True, "timeout": [30]},
        {"interval": "NaN", "timeout": "Infinity"},
    ],
)
def test_nonsense_in_advice_is_as_if_absent(advice: Any) -> None:
    """Null, negative or foreign values change nothing and stop nothing."""
    script = opened(ack=False)
    script.polls(call(1), advice=advice)
    assert script.sends(CONNECT).timeout_s == pytest.approx(30.0 + DEFAULT_LIMITS.network_delay_s)
    script.answers(call(2))
    assert script.session.observing


def test_an_interval_may_be_text() -> None:
    """Some servers send their times as text."""
    script = opened(ack=False)
    script.polls(call(1), advice={"interval": "1500"})
    assert script.rests() == pytest.approx(1.5)


@pytest.mark.parametrize("interval", [10**9, 10**400, "1e300"])
def test_an_interval_is_capped(interval: Any) -> None:
    """No advice makes us deaf for longer than we decided."""
    script = opened(ack=False)
    script.polls(call(1), advice={"interval": interval})
    assert script.rests() == pytest.approx(DEFAULT_LIMITS.interval_s_max)


def test_a_longer_timeout_than_ours_is_asked_to_be_shorter() -> None:
    """Where the server would hold a connect for an hour we ask for less, and wait no longer than that."""
    script = opened(ack=False)
    script.polls(call(1), advice={"timeout": 3_600_000})
    request = script.sends(CONNECT, advice={"timeout": round(DEFAULT_LIMITS.timeout_s_max * 1000)})
    assert request.timeout_s == pytest.approx(DEFAULT_LIMITS.timeout_s_max + DEFAULT_LIMITS.network_delay_s)
    assert script.session.timeout_s == DEFAULT_LIMITS.timeout_s_max


def test_reconnect_none_is_obeyed_loudly_and_not_for_ever() -> None:
    """The session is over and told so; after a rest a new one is asked for, with a fresh login."""
    script = opened()
    script.after(7.0).sends(CONNECT)
    told = script.refuses("500::gone", advice={"reconnect": "none"})
    assert told == [Gap(T0, "session lost", "500::gone"), Refused("500::gone", DEFAULT_LIMITS.refused_s)]
    assert not script.session.observing
    assert script.rests() == pytest.approx(DEFAULT_LIMITS.refused_s)
    script.logs_in()
    script.session.logged_in()
    script.opens(client_id="c2")


def test_reconnect_handshake_is_obeyed_whatever_the_error_says() -> None:
    """The advice decides before the code does."""
    script = opened()
    script.sends(CONNECT)
    told = script.refuses("500::whatever", advice={"reconnect": "handshake"})
    assert only(told, Gap).cause == "session lost"
    script.rests()
    script.opens(client_id="c2")
    assert script.session.observing


def test_reconnect_retry_keeps_the_session_and_the_interval() -> None:
    """The same session goes on after the rest that was asked for; meanwhile it is a gap."""
    script = opened()
    script.sends(CONNECT)
    told = script.refuses("503::busy", advice={"reconnect": "retry", "interval": 5000})
    assert only(told, Gap).cause == "disconnected"
    assert script.rests() == pytest.approx(5.0)
    script.sends(CONNECT, clientId="c1")
    assert kinds(script.answers(call(1), ext={"ack": 2})) == [Delivered, Unbroken]


def test_retry_does_not_help_a_client_that_is_unknown() -> None:
    """Some servers say "retry" to a session that they do not have; only a handshake gets anywhere."""
    script = opened()
    script.sends(CONNECT)
    script.refuses("402::session_unknown", advice={"reconnect": "retry"})
    script.rests()
    script.sends(HANDSHAKE)


def test_multiple_clients_are_polled_at_the_interval() -> None:
    """Two sessions of one browser: CometD answers at once, and asks for a rest between the connects."""
    script = opened()
    script.polls(ack=2, advice={"interval": 2000, "multiple-clients": True})
    assert script.rests() == pytest.approx(2.0)
    script.sends(CONNECT)


# ── Refusals ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "error", ["402::session_unknown", "402::Unknown client", "403::Unknown client", "401:c1:Unknown client"]
)
def test_an_unknown_client_begins_a_new_session(error: str) -> None:
    """CometD says 402, GWS behind a balancer 403, faye 401: a new session and no new login."""
    script = opened()
    script.polls(call(1), ack=2)
    script.commits(1)
    script.after(3.0).sends(CONNECT)
    told = script.refuses(error)
    assert told == [Gap(T0, "session lost", error)]
    script.rests()
    assert kinds(script.opens(client_id="c2")) == [Handshaken, Subscribed]
    assert script.session.observing


@pytest.mark.parametrize("error", ["401::unauthorized", "403::policy"])
def test_a_session_that_lost_its_login_logs_in_again(error: str) -> None:
    """401 and 403 say who we are is in doubt: log in, then go on with the same session."""
    script = opened()
    script.sends(CONNECT)
    assert only(script.refuses(error), Gap).cause == "disconnected"
    script.rests()
    script.logs_in()
    script.session.logged_in()
    script.sends(CONNECT, clientId="c1")
    assert Unbroken() in script.answers(ext={"ack": 2})


def test_http_401_logs_in_again() -> None:
    """A refusal by HTTP is one by Bayeux."""
    script = opened()
    script.sends(CONNECT)
    script.fails(Failure.UNAUTHORISED, "HTTP 401")
    script.rests()
    script.logs_in()


def test_a_refused_handshake_is_told_and_tried_again() -> None:
    """Whoever looks must see why there is no session, even where there never was one."""
    script = Playbook()
    script.sends(HANDSHAKE)
    told = script.refuses("403::handshake_denied")
    assert only(told, Refused).error == "403::handshake_denied"
    assert only(told, Refused).retry_s == pytest.approx(script.rests())
    script.logs_in()
    script.session.logged_in()
    script.opens()
    assert script.session.observing


def test_a_handshake_without_client_id_is_none() -> None:
    """A reply that claims success and grants nothing is a refusal."""
    script = Playbook()
    script.sends(HANDSHAKE)
    assert kinds(script.answers()) == [Refused]
    script.rests()
    script.sends(HANDSHAKE)


def test_a_refused_subscription_is_loud_retried_and_a_gap() -> None:
    """Deaf on one channel is deaf: told by its name, asked for ever more slowly, closed when granted."""
    script = Playbook(CALLS, DEVICES)
    script.handshakes()
    script.polls(ack=1)
    request = script.sends(SUBSCRIBE)
    granted, denied = replies(request)
    denied |= {"successful": False, "error": "403:/v2/me/devices:denied"}
    told = script.hears(encoded([granted, denied]))
    assert told == [
        SubscriptionRefused(DEVICES, "403:/v2/me/devices:denied", DEFAULT_LIMITS.resubscribe_s),
        Gap(T0, "subscription refused", "403:/v2/me/devices:denied"),
    ]
    assert not script.session.observing

    # Meanwhile the granted channel is heard, and no connect is held beyond the next attempt.
    attempts = [script.now]
    while len(attempts) < 7:
        action = script.session.next(script.now)
        assert isinstance(action, Send)
        script.sent = action
        if action.channel == SUBSCRIBE:
            assert [each["subscription"] for each in action.messages] == [DEVICES]
            attempts.append(script.now)
            script.refuses("403::denied")
        else:
            script.after(action.timeout_s - DEFAULT_LIMITS.network_delay_s)
            assert Unbroken() not in script.answers(ext={"ack": 2})
    waits = [after - before for before, after in pairwise(attempts)]
    assert waits == pytest.approx([5.0, 10.0, 20.0, 40.0, 60.0, 60.0])

    script.after(DEFAULT_LIMITS.resubscribe_s_max)
    script.sends(SUBSCRIBE, subscription=DEVICES)
    assert script.answers() == [Subscribed()]
    assert script.session.observing


def test_a_refused_resubscription_is_as_loud() -> None:
    """After a new handshake a denied channel must not just drop out."""
    script = opened()
    script.sends(CONNECT)
    script.refuses("402::session_unknown")
    script.rests()
    script.handshakes(client_id="c2")
    script.polls(ack=1)
    script.sends(SUBSCRIBE)
    told = script.refuses("403::denied")
    assert only(told, SubscriptionRefused).channel == CALLS
    assert only(told, Gap) == Gap(T0, "subscription refused", "403::denied")


@pytest.mark.parametrize("error", ["402::session_unknown", "403::Unknown client", "401::Unknown client"])
def test_a_subscription_for_an_unknown_client_begins_a_new_session(error: str) -> None:
    """Not the channel is refused here but the session."""
    script = Playbook()
    script.handshakes()
    script.polls(ack=1)
    script.sends(SUBSCRIBE)
    told = script.refuses(error)
    assert SubscriptionRefused not in kinds(told)
    script.rests()
    script.opens(client_id="c2")


def test_a_subscription_is_matched_by_id_where_it_is_not_named() -> None:
    """A reply that names no channel answers the message with its id."""
    script = Playbook(CALLS, DEVICES)
    script.handshakes()
    script.polls(ack=1)
    request = script.sends(SUBSCRIBE)
    nameless = [{k: v for k, v in reply.items() if k != "subscription"} for reply in replies(request)]
    assert script.hears(encoded(nameless)) == [Subscribed()]


def test_a_subscription_to_something_else_is_none() -> None:
    """A success for a channel that nobody asked for is no success, and no reason to ask again at once."""
    script = Playbook()
    script.handshakes()
    script.polls(ack=1)
    script.sends(SUBSCRIBE)
    told = script.answers(subscription="/other")
    assert only(told, SubscriptionRefused).channel == CALLS
    script.sends(CONNECT)


def test_several_channels_may_be_granted_in_one_reply() -> None:
    """`subscription` may be a list (Bayeux 1.0, section 4.5)."""
    script = Playbook(CALLS, DEVICES)
    script.handshakes()
    script.polls(ack=1)
    script.sends(SUBSCRIBE)
    assert Subscribed() in script.answers(subscription=[CALLS, DEVICES])


def test_a_login_that_is_refused_slows_down() -> None:
    """Insisting locks accounts: each refusal doubles the wait, up to an hour, and a success forgets it."""
    script = Playbook()
    script.session.login_first()
    waits = []
    for _ in range(9):
        script.logs_in()
        script.session.login_refused("wrong password", script.now)
        waits.append(script.rests())
    assert waits[:6] == [60.0, 120.0, 240.0, 480.0, 960.0, 1920.0]
    assert waits[6:] == [DEFAULT_LIMITS.refused_s_max] * 3

    script.logs_in()
    script.session.logged_in()
    script.opens()
    script.sends(CONNECT)
    script.fails(Failure.UNAUTHORISED)
    script.rests()
    script.logs_in()
    script.session.login_refused("wrong password", script.now)
    assert script.rests() == DEFAULT_LIMITS.refused_s


def test_login_first_comes_before_the_handshake() -> None:
    """GWS wants the cookie of a REST login on CometD's first request."""
    script = Playbook()
    script.session.login_first()
    script.logs_in()
    script.session.logged_in()
    script.sends(HANDSHAKE)


def test_the_servers_own_disconnect_begins_a_new_session() -> None:
    """/meta/disconnect that nobody asked for is a lost session, and not the end."""
    script = opened()
    script.after(2.0).sends(CONNECT)
    request = script.sent
    assert request is not None
    told = script.hears(
        [
            *encoded([{"channel": DISCONNECT, "successful": True}]),
            *encoded(replies(request, advice={"reconnect": "none"})),
        ]
    )
    assert only(told, Gap) == Gap(T0, "session lost", "the server sent /meta/disconnect")
    script.rests()
    script.opens(client_id="c2")
    assert script.session.observing


def test_goodbye_is_said_and_is_the_end() -> None:
    """A planned stop tells the server, whatever was to be waited for."""
    script = opened()
    script.polls(call(1), ack=2)
    script.says_goodbye()
    script.stops()


def test_goodbye_without_a_session_says_nothing() -> None:
    """There is nobody to tell."""
    script = Playbook()
    script.session.goodbye()
    script.stops()


def test_goodbye_that_is_not_heard_is_the_end_too() -> None:
    """Stopping must not depend on the network."""
    script = opened()
    script.session.goodbye()
    script.sends(DISCONNECT)
    assert script.fails() == []
    script.stops()


# ── No storm ──────────────────────────────────────────────────────────────────────────────────────────


def test_waits_grow_and_are_capped() -> None:
    """Dense while the server may still keep the session, then ever rarer up to the cap."""
    script = opened()
    waits = []
    for _ in range(40):
        script.sends(CONNECT)
        script.fails()
        waits.append(script.rests())
    assert waits[:5] == pytest.approx([0.2, 0.4, 0.8, 1.6, 2.0])
    dense = [wait for wait, at in zip(waits, _times(waits), strict=True) if at < DEFAULT_LIMITS.dense_s]
    assert max(dense) <= DEFAULT_LIMITS.retry_dense_s_max
    assert waits[-1] == pytest.approx(DEFAULT_LIMITS.retry_s_max)
    assert waits == sorted(waits)


def _times(waits: list[float]) -> list[float]:
    """When each wait began."""
    return [sum(waits[:index]) for index in range(len(waits))]


@pytest.mark.parametrize(("jitter", "share"), [(0.0, 0.5), (0.5, 0.75), (1.0, 1.0)])
def test_jitter_spreads_the_upper_half(jitter: float, share: float) -> None:
    """A thousand sessions that lost one server do not come back in one moment."""
    script = Playbook(jitter=lambda: jitter)
    script.sends(HANDSHAKE)
    script.fails()
    assert script.rests() == pytest.approx(DEFAULT_LIMITS.retry_s * share)


def test_waits_begin_small_again_after_a_session_that_lasted() -> None:
    """One bad minute is forgotten when the server holds a connect, or has something to say, again."""
    script = opened()
    for _ in range(10):
        script.sends(CONNECT)
        script.fails()
        script.rests()
    script.polls(call(1), ack=2)
    script.commits(1)
    script.sends(CONNECT)
    script.fails()
    assert script.rests() == pytest.approx(DEFAULT_LIMITS.retry_s)


def test_waits_begin_small_again_after_a_connect_that_was_held() -> None:
    """An outage, a recovery, and a cut before the server had anything to say: that cut is the first."""
    script = opened()
    play(script, lambda *_: Failure.NETWORK, MINUTE)
    script.rests()
    script.sends(CONNECT)
    script.answers(ext={"ack": 2})
    script.sends(CONNECT)
    script.after(10.0).fails()
    assert script.rests() == pytest.approx(DEFAULT_LIMITS.retry_s)


def test_a_handshake_that_succeeds_resets_nothing() -> None:
    """402 after every handshake: each round waits longer than the one before."""
    script = opened()
    waits = []
    for round_ in range(12):
        script.sends(CONNECT)
        script.refuses("402::session_unknown")
        waits.append(script.rests())
        script.opens(client_id=f"c{round_ + 2}")
    assert waits == sorted(waits)
    assert waits[-1] > 8 * waits[0]


def grant(request: Send, _now: float, **fields: Any) -> list[bytes]:
    """A server that agrees to anything, at once."""
    extra: dict[str, Any] = {"clientId": "c1"} if request.channel == HANDSHAKE else {}
    return encoded(replies(request, **extra, **fields))


def refuse(request: Send, _now: float, **fields: Any) -> list[bytes]:
    """A server that refuses anything, at once."""
    return encoded(replies(request, successful=False, **fields))


def unless_handshake(refusal: Callable[..., Answer]) -> Callable[[Send, float], Answer]:
    """A server that grants sessions and then does this."""
    return lambda request, now: (grant if request.channel == HANDSHAKE else refusal)(request, now)


def unless_held(refusal: Callable[..., Answer]) -> Callable[[Send, float], Answer]:
    """A server that opens the session and then does this to every connect that could wait."""

    def answer(request: Send, now: float) -> Answer:
        opening = request.channel != CONNECT or request.messages[0].get("advice") == {"timeout": 0}
        return (grant if opening else refusal)(request, now)

    return answer


def with_error(error: str, **advice: Any) -> Callable[[Send, float], Answer]:
    """Refuses with this error and this advice."""
    extra: dict[str, Any] = {"advice": advice} if advice else {}
    return lambda request, now: refuse(request, now, error=error, **extra)


STORMS: dict[str, Callable[[Send, float], Answer]] = {
    "nobody there": lambda *_: Failure.NETWORK,
    "HTTP 503": lambda *_: Failure.HTTP,
    "HTTP 403": lambda *_: Failure.UNAUTHORISED,
    "HTML": lambda *_: Failure.MALFORMED,
    "oversized": lambda *_: Failure.OVERSIZED,
    "everything oversized but the opening": unless_held(lambda *_: Failure.OVERSIZED),
    "everything malformed but the opening": unless_held(lambda *_: Failure.MALFORMED),
    "empty answers": lambda *_: [],
    "null items": lambda *_: [b"null"],
    "empty answers to connects": unless_held(lambda *_: []),
    "handshake refused without advice": with_error("403::denied"),
    "handshake refused, retry": with_error("500::no", reconnect="retry", interval=0),
    "handshake refused, handshake": with_error("500::no", reconnect="handshake", interval=0),
    "handshake refused, none": with_error("403::denied", reconnect="none"),
    "connect refused without advice": unless_handshake(with_error("500::no")),
    "connect refused, retry": unless_held(with_error("500::no", reconnect="retry", interval=0)),
    "402 to every connect": unless_handshake(with_error("402::unknown")),
    "402 to every held connect": unless_held(with_error("402::unknown", reconnect="handshake", interval=0)),
    "401 to every held connect": unless_held(with_error("401::who")),
    "none to every held connect": unless_held(with_error("500::no", reconnect="none")),
    "disconnected at once": unless_held(lambda *_: encoded([{"channel": DISCONNECT}])),
    "subscription refused": lambda request, now: (
        refuse(request, now, error="403::denied") if request.channel == SUBSCRIBE else held(request, now)
    ),
    "subscription unnamed": lambda request, now: (
        grant(request, now, subscription=None, id="?") if request.channel == SUBSCRIBE else held(request, now)
    ),
    "connects that never wait": grant,
    "connects that never wait, timeout 0": lambda request, now: grant(request, now, advice={"timeout": 0}),
    "acknowledgements taken away": lambda request, now: [
        *([call(1)] if request.channel == CONNECT else []),
        *grant(request, now, ext={"ack": True} if request.channel == HANDSHAKE else {}),
    ],
}
"""Servers that go wrong, and go on to."""


def held(request: Send, now: float) -> Answer:
    """Grants, but a connect that may wait is answered when its time is over: by nobody, here."""
    opening = request.channel != CONNECT or request.messages[0].get("advice") == {"timeout": 0}
    return grant(request, now) if opening else Failure.NETWORK


@pytest.mark.parametrize("server", STORMS)
def test_no_server_is_stormed(server: str) -> None:
    """Ten minutes of the same trouble bring a few requests a minute after the first, dense seconds."""
    script = Playbook()
    first = play(script, STORMS[server], 10.0)
    later = play(script, STORMS[server], 10 * MINUTE)
    handshakes = [at for at, act in later if isinstance(act, Send) and act.channel == HANDSHAKE]
    assert len(first) <= 60, f"{len(first)} requests in 10 s"
    assert len(later) / 10 <= 60, f"{len(later) / 10} requests a minute"
    assert len(handshakes) / 10 <= 10, f"{len(handshakes) / 10} handshakes a minute"
    assert later, "it gave up"


def test_messages_are_not_slowed_down() -> None:
    """What is held back is only asking in vain: a server that always has something is asked at once."""
    script = opened()
    began = script.now
    for number in range(1, 500):
        script.sends(CONNECT)
        script.answers(call(number), ext={"ack": number + 1})
        script.commits(number)
    assert script.now == began


def test_recovery_is_quick() -> None:
    """A server that was away for eight seconds is asked within two when it is back."""
    script = opened()
    play(script, lambda *_: Failure.NETWORK, 8.0)
    acts = play(script, grant, 2.1)
    assert acts
    assert script.session.observing


# ── What cannot be read ───────────────────────────────────────────────────────────────────────────────


def test_an_oversized_answer_ends_the_session_at_once() -> None:
    """It cannot be acknowledged, so it would come again for ever: the session is given up, as a gap."""
    script = opened()
    script.after(5.0).sends(CONNECT)
    told = script.fails(Failure.OVERSIZED, "70,000,000 bytes")
    assert told == [Gap(T0, "oversized", "70,000,000 bytes")]
    script.rests()
    assert Subscribed() in script.opens(client_id="c2")


def test_a_malformed_answer_thrice_ends_the_session() -> None:
    """Twice may be the network; the third time the same message would hold back all that follow it."""
    script = opened()
    for _ in range(2):
        script.sends(CONNECT, clientId="c1")
        script.fails(Failure.MALFORMED, "not JSON")
        script.rests()
    assert [gap.cause for gap in script.facts if isinstance(gap, Gap)] == ["disconnected"]

    script.sends(CONNECT, clientId="c1")
    told = script.fails(Failure.MALFORMED, "not JSON")
    assert told == [Gap(T0, "malformed", "not JSON")]
    script.rests()
    assert Subscribed() in script.opens(client_id="c2")


def test_answers_without_a_reply_are_malformed_too() -> None:
    """A JSON array that answers nothing is as useless as HTML: thrice, and the session is given up."""
    script = opened()
    for _ in range(3):
        script.sends(CONNECT)
        script.hears([])
        script.fails(Failure.MALFORMED, "an answer without a reply")
        script.rests()
    assert [gap.cause for gap in script.facts if isinstance(gap, Gap)] == ["disconnected", "malformed"]
    script.sends(HANDSHAKE)


def test_a_good_answer_forgets_the_malformed_ones() -> None:
    """Only answers in a row count."""
    script = opened()
    for number in range(1, 6):
        script.sends(CONNECT)
        script.fails(Failure.MALFORMED)
        script.rests()
        script.polls(call(number), ack=number + 1)
        script.commits(number)
    assert script.session.client_id == "c1"


ODD = [
    b"null",
    b"7",
    b'"text"',
    b"[]",
    b"[[1]]",
    b"{}",
    b'{"channel":7,"data":{}}',
    b'{"channel":null,"data":1}',
    b'{"data":{"a":1}}',
]


@pytest.mark.parametrize("item", ODD)
def test_items_that_are_no_messages_are_kept_and_have_no_place(item: bytes) -> None:
    """No server queues such a thing, so it may not shift the places of those that it does."""
    script = opened()
    script.sends(CONNECT)
    told = script.answers(item, call(1), item, ext={"ack": 2})
    delivered = only(told, Delivered)
    assert delivered.messages == [(CALLS, call(1))]
    assert [raw for _, raw in delivered.odd] == [item, item]
    assert script.session.position == 1
    script.commits(1)
    script.sends(CONNECT, ext={"ack": 2})


def test_a_message_too_deep_to_read_has_its_place() -> None:
    """Whatever is in it: it is a message, it is kept whole, and what follows it is heard."""
    deep = b'{"channel":"/v2/me/calls","data":' + b"[" * 10_000 + b"]" * 10_000 + b"}"
    script = opened()
    request = script.sends(CONNECT)
    answer = b"[" + b",".join([deep, call(2), *encoded(replies(request, ext={"ack": 2}))]) + b"]"
    told = script.hears(split(answer))
    assert [raw for _, raw in only(told, Delivered).messages] == [deep, call(2)]
    script.commits(2)
    script.sends(CONNECT, ext={"ack": 2})


@pytest.mark.parametrize("data", [b'"\\ud800"', b"{'a':1}", b"nul", b"01", b'"\\x"'])
def test_a_message_that_is_no_json_has_its_place(data: bytes) -> None:
    """One message that the server wrote badly neither hides the others nor holds them back."""
    bad = b'{"channel":"/v2/me/calls","data":' + data + b"}"
    script = opened()
    request = script.sends(CONNECT)
    told = script.hears(
        split(b"[" + b",".join([bad, call(2), *encoded(replies(request, ext={"ack": 2}))]) + b"]")
    )
    assert [raw for _, raw in only(told, Delivered).messages] == [bad, call(2)]
    assert script.session.answered
    script.commits(2)
    script.sends(CONNECT, ext={"ack": 2})


def test_what_is_echoed_can_be_written() -> None:
    """Half of a surrogate pair in what we send back must not make the next request impossible."""
    script = opened()
    request = script.sends(CONNECT)
    reply = b'{"channel":"/meta/connect","id":"%b","successful":true,"ext":{"ack":"\\ud800"}}'
    script.hears([call(1), reply % request.messages[0]["id"].encode()])
    script.commits(1)
    msgspec.json.encode(script.sends(CONNECT).messages)


def test_what_might_be_a_reply_has_no_place() -> None:
    """An item that cannot be read and speaks of /meta/ is kept apart: to count it might lose a message."""
    script = opened()
    script.sends(CONNECT)
    told = script.answers(b'{"channel":"/meta/connect","x":nul}', call(1), ext={"ack": 2})
    assert only(told, Delivered).messages == [(CALLS, call(1))]


def test_bytes_that_are_no_text_stay_as_they_are() -> None:
    """A message that is not UTF-8 is a message all the same."""
    raw = b'{"channel":"/v2/me/calls","data":"\xff\xfe"}'
    script = opened()
    script.sends(CONNECT)
    assert only(script.answers(raw, ext={"ack": 2}), Delivered).messages == [(CALLS, raw)]


def test_fields_of_unexpected_types_are_as_if_absent() -> None:
    """One odd field does not make a reply unreadable."""
    script = opened()
    request = script.sends(CONNECT)
    odd = {"channel": CONNECT, "id": request.messages[0]["id"], "successful": True, "error": 5, "clientId": 7}
    script.hears(encoded([{**odd, "ext": [], "advice": "none", "subscription": {}}]))
    assert script.session.answered
    assert script.session.observing


@pytest.mark.parametrize(
    ("text", "items"),
    [
        (b"[]", []),
        (b" [ 1 , {} ] ", [b"1", b"{}"]),
        (b'[{"a" : "\\u00e9", "a":2}]', [b'{"a" : "\\u00e9", "a":2}']),
        (b'{"channel":"/meta/connect"}', [b'{"channel":"/meta/connect"}']),
        (b'\n {"a":1} ', [b'\n {"a":1} ']),
        (b'[{"a":"\\ud800"} , {"b":"]"}]', [b'{"a":"\\ud800"}', b'{"b":"]"}']),
        (b'[{"a":1e400},{"b":"\\ud800\\"]"}]', [b'{"a":1e400}', b'{"b":"\\ud800\\"]"}']),
        (b'[{"a":wrong}, 1]', [b'{"a":wrong}', b"1"]),
    ],
)
def test_split_keeps_the_bytes(text: bytes, items: list[bytes]) -> None:
    """An answer is taken apart without being rewritten; a lone object is an array of one."""
    assert split(text) == items


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"<html>",
        b"null",
        b"7",
        b'"x"',
        b"[",
        b"[1",
        b"[1] 2",
        b"[1,,2]",
        b"[,]",
        b'{"a":',
        b"{} {}",
        b'[{"channel":"/meta/conn',
        b'[{"channel":"/x","data":{"a":}]',
        b"[" * 5_000,
        b'[{"a":' + b"[" * 5_000 + b"]" * 4_999 + b"}]",
        b"[" + b"[" * 5_000 + b"]" * 5_000 + b"] []",
        b"[" * 3_000_000 + b"]" * 3_000_000,
    ],
    ids=range(18),
)
def test_split_refuses_what_is_no_array(text: bytes) -> None:
    """Everything else is malformed, and said so."""
    with pytest.raises(ValueError, match="no JSON array"):
        split(text)


# ── Gaps ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_gap_begins_when_the_last_good_answer_was_asked_for() -> None:
    """A server may lose the session while it holds a connect, and answer that one well all the same."""
    script = opened(ack=False)
    asked_at = script.after(3.0).now
    script.sends(CONNECT)
    script.after(30.0).answers()
    script.sends(CONNECT)
    assert script.after(0.1).refuses("402::unknown") == [Gap(asked_at, "session lost", "402::unknown")]


def test_an_answer_without_a_reply_vouches_for_nothing() -> None:
    """An empty answer to a connect that waited half a minute says nothing about that half minute."""
    script = opened(ack=False)
    script.sends(CONNECT)
    script.after(30.0).hears([])
    assert only(script.fails(Failure.MALFORMED, "no reply"), Gap).since == T0


def test_data_vouches_for_nothing() -> None:
    """What is read now may have waited in the socket's buffer while the store was slow, and the server may
    have given the session up since."""
    script = opened(ack=False)
    script.session.use(WEBSOCKET)
    script.sends(CONNECT, connectionType=WEBSOCKET)
    script.after(20.0).pushes(call(1))
    assert only(script.after(0.1).fails(), Gap).since == T0


def test_after_a_failure_the_first_connect_does_not_wait() -> None:
    """Whether the session lives is to be known now, not when the server has something to say."""
    script = opened()
    script.sends(CONNECT)
    script.fails()
    script.rests()
    script.sends(CONNECT, advice={"timeout": 0})
    assert Unbroken() in script.answers(ext={"ack": 2})
    assert "advice" not in script.sends(CONNECT).messages[0]


def test_a_server_that_kept_everything_leaves_no_gap() -> None:
    """With acknowledgements a cut that the session survives was none."""
    script = opened()
    script.sends(CONNECT)
    script.fails()
    assert not script.session.observing
    script.rests()
    assert kinds(script.polls(call(1), ack=2)) == [Delivered, Unbroken]
    assert script.session.observing


def test_a_server_that_does_not_acknowledge_leaves_one() -> None:
    """Without them what was in flight is lost, although the session goes on."""
    script = opened(ack=False)
    script.sends(CONNECT)
    script.fails()
    script.rests()
    assert kinds(script.polls(call(1))) == [Delivered, Resumed]
    assert script.session.observing


def test_a_cause_that_is_known_better_keeps_the_beginning() -> None:
    """Cut, then found to be lost, then denied: one gap since the first, named after the last."""
    script = opened()
    script.after(1.0).sends(CONNECT)
    script.fails()
    script.rests()
    script.sends(CONNECT)
    script.refuses("402::session_unknown")
    script.rests()
    script.handshakes(client_id="c2")
    script.polls(ack=1)
    script.sends(SUBSCRIBE)
    script.refuses("403::denied")
    gaps = [fact for fact in script.facts if isinstance(fact, Gap)]
    assert [gap.cause for gap in gaps] == ["disconnected", "session lost", "subscription refused"]
    assert {gap.since for gap in gaps} == {T0}


def test_a_cut_does_not_hide_a_better_cause() -> None:
    """The cause "disconnected" says least: it replaces nothing but "not started". What went wrong is told
    under the better one, and once."""
    script = opened()
    script.sends(CONNECT)
    script.refuses("402::session_unknown")
    script.rests()
    script.sends(HANDSHAKE)
    assert script.fails() == [Gap(T0, "session lost", "cut")]
    script.rests()
    script.sends(HANDSHAKE)
    assert script.fails() == []
    script.rests()
    script.sends(HANDSHAKE)
    assert script.fails(detail="another") == [Gap(T0, "session lost", "another")]


def test_never_started_is_a_gap_with_its_reason() -> None:
    """Before the first session the gap is as old as the session object."""
    script = Playbook()
    script.after(1.0).sends(HANDSHAKE)
    assert script.fails() == [Gap(T0, "disconnected", "cut")]


def test_a_login_refused_while_the_session_lives_is_a_gap_that_ends() -> None:
    """The REST login failed for a while; the server kept the session all the time, and the gap closes."""
    script = opened()
    script.sends(CONNECT)
    script.fails(Failure.UNAUTHORISED, "HTTP 403")
    script.rests()
    script.logs_in()
    told = script.session.login_refused("wrong password", script.now)
    assert told == [Gap(T0, "login refused", "wrong password")]
    script.rests()
    script.logs_in()
    script.session.logged_in()
    assert Unbroken() in script.polls(ack=2)
    assert script.session.observing


def test_a_connect_that_is_refused_is_a_gap() -> None:
    """A server that answers and gives nothing makes us as deaf as one that is away."""
    script = opened(ack=False)
    script.after(1.0).sends(CONNECT)
    assert script.refuses("500::busy") == [Gap(T0, "disconnected", "500::busy")]
    script.rests()
    assert Resumed() in script.polls(call(1))


def test_a_session_that_is_abandoned_is_a_gap_with_the_callers_cause() -> None:
    """Whoever finds out that we are deaf says so, and another session begins."""
    script = opened()
    told = script.session.abandon("stalled", "the snapshot knows calls that we never heard of", script.now)
    assert only(told, Gap).cause == "stalled"
    script.rests()
    assert Subscribed() in script.opens(client_id="c2")


def test_every_cause_is_one_of_the_vocabulary() -> None:
    """Causes become rows and labels of metrics: the set is closed."""
    causes = set()
    for server, begun in product(STORMS.values(), (False, True)):
        script = opened() if begun else Playbook()
        play(script, server, MINUTE)
        script.session.login_refused("wrong", script.now)
        causes |= {fact.cause for fact in script.facts if isinstance(fact, Gap)}
    assert causes <= GAP_CAUSES
    assert {"disconnected", "session lost", "oversized", "malformed", "subscription refused"} <= causes


# ── Chance ────────────────────────────────────────────────────────────────────────────────────────────

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)

advices = st.fixed_dictionaries(
    {},
    optional={
        "reconnect": st.sampled_from(["retry", "handshake", "none", "?", None]) | json_values,
        "interval": st.sampled_from([0, 100, 2000, -1, "500", 10**400]) | json_values,
        "timeout": st.sampled_from([0, 30_000, 10**9, -1, "x"]) | json_values,
        "maxInterval": st.sampled_from([0, 1, 10_000, -1]) | json_values,
    },
)

errors = st.sampled_from(
    ["402::unknown", "403::Unknown client", "403::denied", "401::who", "500::", "", "??", "4"]
)

overlays = st.fixed_dictionaries(
    {},
    optional={
        "successful": st.booleans() | json_values,
        "error": errors | json_values,
        "clientId": st.sampled_from(["c1", "c2", ""]) | json_values,
        "id": st.sampled_from(["1", "2", "3", None]) | json_values,
        "advice": st.none() | advices | json_values,
        "ext": st.sampled_from([{"ack": True}, {"ack": 3}, {}, None]) | json_values,
        "subscription": st.sampled_from([CALLS, DEVICES, [CALLS, DEVICES], "/x"]) | json_values,
        "supportedConnectionTypes": json_values,
    },
)

free_messages = st.fixed_dictionaries(
    {},
    optional={
        "channel": st.sampled_from([CALLS, HANDSHAKE, CONNECT, SUBSCRIBE, DISCONNECT, "/meta/?", ""])
        | json_values,
        "data": json_values,
        "successful": st.booleans(),
        "id": st.sampled_from(["1", "2", "3"]),
        "clientId": st.sampled_from(["c1", "c2"]),
        "advice": advices,
        "ext": st.sampled_from([{"ack": True}, {"ack": 3}]),
    },
)

raw_items = (
    free_messages.map(lambda message: json.dumps(message).encode())
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=12)
)

moves = st.one_of(
    st.tuples(st.just("obey"), overlays),
    st.tuples(st.just("obey"), st.just({})),
    st.tuples(st.just("data"), st.integers(0, 4)),
    st.tuples(st.just("items"), st.lists(raw_items, max_size=4)),
    st.tuples(st.just("fail"), st.sampled_from(Failure)),
    st.tuples(st.just("commit"), st.integers(0, 50)),
    st.tuples(st.just("login refused"), st.none()),
    st.tuples(st.just("abandon"), st.none()),
    st.tuples(st.just("wait"), st.floats(0, 40)),
)

WAIT_s_MAX = max(DEFAULT_LIMITS.refused_s_max, DEFAULT_LIMITS.interval_s_max, DEFAULT_LIMITS.retry_s_max)


def _live(session: Session, now: float) -> Send | Login | Sleep:
    """The session wants something now, or at a time that is not too far away."""
    action = session.next(now)
    assert isinstance(action, Send | Login | Sleep)
    if isinstance(action, Sleep):
        assert now < action.until <= now + WAIT_s_MAX + TIGHT
    if isinstance(action, Send):
        assert 0 < action.timeout_s <= DEFAULT_LIMITS.timeout_s_max + DEFAULT_LIMITS.network_delay_s
        msgspec.json.encode(action.messages)
    return action


class Positions:
    """Checks that within a session each place is given once, in order and without holes."""

    def __init__(self) -> None:
        self.last = 0

    def take(self, facts: list[Fact]) -> None:
        """The facts of one answer."""
        for fact in facts:
            if isinstance(fact, Handshaken):
                self.last = 0
            elif isinstance(fact, Delivered):
                assert fact.first == self.last + 1
                self.last += len(fact.messages)


@given(st.lists(moves, max_size=40), st.booleans())
def test_no_server_can_break_a_session(script: list[tuple[str, Any]], login_first: bool) -> None:
    """Whatever comes, nothing is raised, something is always to be done or awaited, and places only grow."""
    now = T0
    session = Session(now=now, jitter=lambda: 0.5)
    session.want(CALLS)
    session.want(DEVICES)
    if login_first:
        session.login_first()
    positions = Positions()
    for kind, what in script:
        action = _live(session, now)
        facts: list[Fact] = []
        now += 0.01
        match kind:
            case "obey":
                if isinstance(action, Sleep):
                    now = action.until
                elif isinstance(action, Login):
                    session.logged_in()
                else:
                    extra = {"clientId": "c9", "ext": {"ack": True}} if action.channel == HANDSHAKE else {}
                    facts = session.received(encoded(replies(action, **{**extra, **what})), now)
            case "data":
                facts = session.received([call(n) for n in range(what)], now)
            case "items":
                facts = session.received(what, now)
            case "fail":
                facts = session.failed(what, "by chance", now)
            case "commit":
                session.committed(min(what, session.position))
            case "login refused":
                facts = session.login_refused("by chance", now)
            case "abandon":
                facts = session.abandon("stalled", "by chance", now)
            case "wait":
                now += what
        positions.take(facts)
        assert positions.last == session.position or session.client_id is None
        for fact in facts:
            if isinstance(fact, Gap):
                assert fact.cause in GAP_CAUSES
                assert T0 <= fact.since <= now
            if isinstance(fact, Unbroken | Resumed | Subscribed):
                assert session.subscribed >= {CALLS, DEVICES} or session.client_id is None

    # A server that behaves from now on is soon heard, whatever was before.
    session.logged_in()
    heard = _until_observing(session, now)
    assert heard <= now + 2 * WAIT_s_MAX


def _until_observing(session: Session, now: float) -> float:
    """Obeys until all channels are subscribed; the server agrees to everything. Gives the time."""
    for _ in range(200):
        if session.observing:
            return now
        action = _live(session, now)
        now += 0.01
        if isinstance(action, Sleep):
            now = max(now, action.until)
        elif isinstance(action, Login):
            session.logged_in()
        else:
            extra = {"clientId": "c10", "ext": {"ack": True}} if action.channel == HANDSHAKE else {}
            session.received(encoded(replies(action, **extra)), now)
    raise AssertionError("not subscribed after 200 steps")


# ── Resume ────────────────────────────────────────────────────────────────────────────────────────────


KEPT = Kept(
    stream="5d3f7c1e-3f0e-4c4c-9a51-6d2f4e8f0b11",
    client_id="c1",
    ack=True,
    connection_type=LONG_POLLING,
    max_interval_s=10.0,
    channels=(CALLS,),
    owner="ada at the lab",
    cookies=(),
    token=(),
)


def resumed(
    *, position: int = 5, batch: tuple[int, int] | None = (3, 5), ack: bool = True, **how: Any
) -> Playbook:
    """A conversation that goes on with a session of an earlier run."""
    script = Playbook()
    kept = msgspec.structs.replace(KEPT, ack=ack)
    script.session.resume(Saved(kept, datetime(2026, 3, 2, tzinfo=UTC), position, batch), **how)
    return script


def test_each_delivery_says_what_makes_it_resumable() -> None:
    """All but its last message leave the batch before it whole, the last one makes its own."""
    script = opened()
    first = only(script.polls(call(1), call(2), ack=2), Delivered)
    assert (first.before, first.batch) == ((-1, 0), (2, 2))
    script.commits(2)
    script.polls(ack=3)
    second = only(script.polls(call(3), ack=4), Delivered)
    assert (second.before, second.batch) == ((2, 2), (4, 3))


@pytest.mark.parametrize("number", ["7", 7.5, True, 0, -1, 2**63, None, {}])
def test_a_number_that_no_column_holds_makes_nothing_resumable(number: Any) -> None:
    """It is acknowledged as it came; but the batch before must not be taken for the present one."""
    script = opened()
    script.sends(CONNECT)
    told = only(script.answers(call(1), ext={"ack": number}), Delivered)
    assert (told.before, told.batch) == ((-1, 0), None)
    script.commits(1)
    script.after(5)
    told = only(script.polls(call(2), ack=9), Delivered)
    assert (told.before, told.batch) == (None, (9, 2)) if number is not None else (told.first, told.batch)


def test_without_acknowledgements_nothing_has_a_batch() -> None:
    """Whatever `ext` says."""
    script = opened(ack=False)
    told = only(script.polls(call(1), ack=2), Delivered)
    assert (told.before, told.batch) == (None, None)


def test_frames_wait_for_the_number_that_comes_after_them() -> None:
    """Over a websocket a batch's reply is a frame of its own, the last one."""
    script = opened()
    script.sends(CONNECT)
    assert script.pushes(call(1)) == []
    assert script.pushes(call(2)) == []
    told = only(script.answers(ext={"ack": 2}), Delivered)
    assert (seqs([told]), told.before, told.batch) == ([1, 2], (-1, 0), (2, 2))


def test_frames_do_not_wait_beyond_their_bound() -> None:
    """They are told without a number, and once it has come the next delivery knows of it."""
    script = opened()
    script.sends(CONNECT)
    big = json.dumps({"channel": CALLS, "data": {"seq": 1, "padding": "x" * EARLY_BYTES_MAX}}).encode()
    told = only(script.pushes(big), Delivered)
    assert (told.before, told.batch) == ((-1, 0), None)
    assert only(script.pushes(big), Delivered).batch is None
    assert script.answers(ext={"ack": 2}) == []
    script.commits(2)
    told = only(script.polls(call(3), ack=3), Delivered)
    assert (told.first, told.before, told.batch) == (3, (2, 2), (3, 3))


def test_a_batch_in_several_deliveries_is_acknowledged_after_the_last_commit() -> None:
    """However large it is, and in whatever order the commits become known."""
    script = opened()
    script.sends(CONNECT)
    big = json.dumps({"channel": CALLS, "data": {"seq": 1, "padding": "x" * EARLY_BYTES_MAX}}).encode()
    firsts = [only(script.pushes(big), Delivered).first for _ in range(3)]
    script.answers(call(4), ext={"ack": 2})
    assert firsts == [1, 2, 3]
    for position in (1, 3):
        script.commits(position)
        script.rests()
        script.sends(CONNECT, ext={"ack": -1}, advice={"timeout": 0})
        assert seqs(script.answers(big, big, big, call(4), ext={"ack": 3 + position})) == []
    script.commits(4)
    script.sends(CONNECT, ext={"ack": 2})


@pytest.mark.parametrize("how", ["cut", "abandoned", "disconnected", "unknown"])
def test_frames_are_heard_when_their_number_never_comes(how: str) -> None:
    """What was heard is told, however the session or its connection ends."""
    script = opened()
    script.sends(CONNECT)
    assert script.pushes(call(1)) == []
    match how:
        case "cut":
            facts = script.fails()
        case "abandoned":
            facts = script.session.abandon("stalled", "deaf", script.now)
        case "disconnected":
            facts = script.hears([b'{"channel":"/meta/disconnect","successful":true}'])
        case _:
            facts = script.refuses("402::session_unknown")
    assert seqs(facts) == [1]
    assert kinds(facts)[0] is Delivered
    assert only(facts, Delivered).batch is None


def test_a_session_is_resumed_with_its_first_connect() -> None:
    """No login, no handshake, no subscription: a connect that does not wait carries what is stored."""
    script = resumed(login_first=True)
    script.sends(CONNECT, clientId="c1", ext={"ack": 3}, advice={"timeout": 0})
    told = script.answers(call(6), call(7), ext={"ack": 9})
    assert told == [
        Delivered(6, [(CALLS, call(6)), (CALLS, call(7))], before=(3, 5), batch=(9, 7)),
        Unbroken(),
    ]
    assert script.session.observing
    assert script.session.position == 7
    script.commits(7)
    assert "advice" not in script.sends(CONNECT, ext={"ack": 9}).messages[0]


def test_a_session_that_had_heard_nothing_is_resumed() -> None:
    """Nothing is acknowledged, and positions count from 1."""
    script = resumed(position=0, batch=None)
    script.sends(CONNECT, ext={"ack": -1})
    assert only(script.answers(call(1), ext={"ack": 1}), Delivered).first == 1


def test_what_is_stored_of_a_batch_in_part_comes_again_at_its_places() -> None:
    """The session counts on from the batch; the store leaves out what it has."""
    script = resumed(position=7, batch=(3, 5))
    assert only(script.polls(call(6), call(7), call(8), ack=4), Delivered).first == 6


def test_a_session_whose_batch_is_not_known_is_not_resumed() -> None:
    """To acknowledge an old one would number what comes after it wrongly, and lose it."""
    saved = Saved(KEPT, datetime(2026, 3, 2, tzinfo=UTC), 7, None)
    assert saved.resumes_at is None
    with pytest.raises(ValueError, match="cannot be resumed"):
        Playbook().session.resume(saved)


def test_without_acknowledgements_a_session_goes_on_and_says_that_something_may_be_lost() -> None:
    """Its positions go on from what is stored."""
    script = resumed(ack=False, position=7, batch=None)
    assert "ext" not in script.sends(CONNECT, clientId="c1").messages[0]
    told = script.answers(call(8))
    assert told == [Delivered(8, [(CALLS, call(8))]), Resumed()]


@pytest.mark.parametrize("error", ["402::session_unknown", "401::unknown client", "403:c1:Unknown client"])
@pytest.mark.parametrize("login_first", [True, False])
def test_a_session_that_is_gone_is_followed_by_another(error: str, *, login_first: bool) -> None:
    """As ever: a gap, a login where the server wants one, a handshake, the subscription."""
    script = resumed(login_first=login_first)
    script.sends(CONNECT)
    told = only(script.refuses(error, advice={"reconnect": "handshake"}), Gap)
    assert (told.since, told.cause) == (T0, "session lost")
    script.rests()
    if login_first:
        script.logs_in()
        script.session.logged_in()
    assert kinds(script.opens(client_id="c2")) == [Handshaken, Subscribed]
    assert only(script.polls(call(1), ack=2), Delivered).first == 1


def test_a_server_that_is_away_is_tried_again_with_the_same_session() -> None:
    """It may only be slow to come back; the session is lost when the server says so."""
    script = resumed()
    script.sends(CONNECT, clientId="c1")
    assert only(script.fails(), Gap).cause == "disconnected"
    script.rests()
    script.sends(CONNECT, clientId="c1", ext={"ack": 3})
    assert script.answers(ext={"ack": 4}) == [Unbroken()]


def test_an_old_session_is_tried_once() -> None:
    """Then another begins, with a login; but where the one attempt succeeds it is as good as any."""
    script = resumed(attempts_max=1, login_first=True)
    script.sends(CONNECT, clientId="c1")
    assert only(script.fails(), Gap).cause == "session lost"
    script.rests()
    script.logs_in()
    script.session.logged_in()
    script.sends(HANDSHAKE)

    script = resumed(attempts_max=1)
    assert script.polls(ack=4) == [Unbroken()]
    script.sends(CONNECT)
    assert only(script.fails(), Gap).cause == "disconnected"


def test_a_channel_that_is_wanted_besides_is_subscribed_after_the_resumption() -> None:
    """The others are the server's already."""
    script = resumed()
    script.session.want(DEVICES)
    script.polls(ack=4)
    assert [each["subscription"] for each in script.sends(SUBSCRIBE).messages] == [DEVICES]
    assert script.answers() == [Subscribed()]


def test_what_is_kept_shows_nothing_of_it() -> None:
    """It is a credential, and `repr` finds its way into logs."""
    cookie = Cookie("JSESSIONID", "secret", "lab", "/", True, "", "")
    kept = msgspec.structs.replace(KEPT, client_id="secret", cookies=(cookie,), token=(("X-CSRF", "secret"),))
    assert "secret" not in repr(Saved(kept, datetime(2026, 3, 2, tzinfo=UTC)))
    assert "secret" not in repr(cookie)


class Server:
    """An acknowledging CometD server in a few lines: a queue of numbered messages, and batches over it.

    Each reply to a connect carries all that is queued, closes a batch, and names its number; a connect that
    acknowledges a number forgets what was queued until that batch was closed.
    """

    def __init__(self) -> None:
        self.published = 0
        self.queue: deque[int] = deque()
        self.batch = 0
        self.closed: list[tuple[int, int]] = []
        self.forgotten = 0
        """The highest number that was acknowledged."""

    def publish(self, count: int) -> None:
        """Queues so many."""
        for _ in range(count):
            self.published += 1
            self.queue.append(self.published)

    def connect(self, acknowledged: Any) -> tuple[list[bytes], int]:
        """The data of the reply, and its number."""
        for number, last in [each for each in self.closed if each[0] <= acknowledged]:
            self.closed.remove((number, last))
            while self.queue and self.queue[0] <= last:
                self.forgotten = self.queue.popleft()
        self.batch += 1
        self.closed.append((self.batch, self.published))
        return [call(seq) for seq in self.queue], self.batch


exchanges = st.lists(
    st.tuples(
        st.integers(0, 3),  # published before
        st.sampled_from(["whole", "request lost", "reply lost", "cut"]),
        st.integers(0, 8),  # after so many data frames the connection is cut
        st.integers(0, 5),  # commits of what is pending: that many messages
        st.booleans(),  # in frames, as over a websocket
        st.booleans(),  # killed after that, and started again
    ),
    max_size=40,
)


class Stored:
    """A session, and a store that takes its time: what is durable, and how far, as a stream's row has it."""

    def __init__(self) -> None:
        self.book = opened()
        self.durable: list[int] = []
        """The numbers of the messages, in the order of commit."""
        self.position = 0
        self.batch: tuple[int, int] | None = None
        self._pending: deque[tuple[int, int, tuple[int, int] | None, bool]] = deque()

    def take(self, facts: list[Fact]) -> None:
        """Takes what was delivered."""
        for fact in facts:
            assert not isinstance(fact, Handshaken)
            if isinstance(fact, Delivered):
                last = fact.first + len(fact.messages) - 1
                for place, seq in enumerate(seqs([fact]), start=fact.first):
                    whole = fact.batch if place == last else fact.before
                    self._pending.append((seq, place, whole, place == last))

    def commit(self, messages: int) -> None:
        """Makes so many durable, each once; a delivery that is durable as a whole is known to be."""
        for _ in range(min(messages, len(self._pending))):
            seq, place, whole, last = self._pending.popleft()
            if place > self.position:
                self.position, self.batch = place, whole
                self.durable.append(seq)
            if last:
                self.book.commits(place)

    def restart(self) -> bool:
        """Loses what is not durable, and goes on with the session; False where that cannot be."""
        saved = Saved(KEPT, datetime(2026, 3, 2, tzinfo=UTC), self.position, self.batch)
        if saved.resumes_at is None:
            return False
        self._pending.clear()
        self.book = Playbook()
        self.book.session.resume(saved)
        return True

    def exchange(self, server: Server, fate: str, cut_after: int, *, frames: bool) -> None:
        """One connect, or a rest."""
        action = self.book.session.next(self.book.now)
        if isinstance(action, Sleep):
            self.book.now = action.until
            return
        assert isinstance(action, Send)
        assert action.channel == CONNECT
        self.book.sent = action
        self.book.now += 0.01
        if fate == "request lost":
            self.take(self.book.fails())
            return
        data, number = server.connect(action.messages[0]["ext"]["ack"])
        assert server.forgotten <= len(self.durable), "the server forgot what is not durable"
        if fate == "reply lost":
            self.take(self.book.fails())
        elif fate == "cut":
            for item in data[:cut_after]:
                self.take(self.book.pushes(item))
            self.take(self.book.fails())
        elif frames:
            for item in data:
                self.take(self.book.pushes(item))
            self.take(self.book.answers(ext={"ack": number}))
        else:
            self.take(self.book.answers(*data, ext={"ack": number}))


@given(exchanges)
def test_everything_is_committed_once_and_in_order(
    script: list[tuple[int, str, int, int, bool, bool]],
) -> None:
    """Against a server that acknowledges, over a network that loses what it likes and a store that takes
    its time, killed at any moment and resumed with what the store has, if that can be: what the server
    forgot is durable, and what is durable is all of it, once, in order."""
    server = Server()
    stored = Stored()
    for published, fate, cut_after, commits, frames, killed in script:
        server.publish(published)
        stored.exchange(server, fate, cut_after, frames=frames)
        stored.commit(commits)
        if killed:
            stored.restart()

    for _ in range(10):
        stored.exchange(server, "whole", 0, frames=False)
        stored.commit(server.published)
    assert stored.durable == list(range(1, server.published + 1))
    assert not server.queue


@given(exchanges, st.integers(0, 3), st.integers(0, 8), st.integers(0, 3), st.integers(0, 3))
def test_after_the_last_ask_nothing_that_was_said_is_missing(
    script: list[tuple[int, str, int, int, bool, bool]], held: int, frames: int, before: int, after: int
) -> None:
    """In the model: whatever happened, and whatever is under way in an answer that is not waited for, of
    which some frames may have come. Where the session asks for the last time, all that was said before is
    durable with its answer; what is said later is the next life's, once and in order."""
    server, stored = Server(), Stored()
    for published, fate, cut_after, commits, framed, _ in script:
        server.publish(published)
        stored.exchange(server, fate, cut_after, frames=framed)
        stored.commit(commits)
    stored.commit(server.published)

    book = stored.book
    action = book.session.next(book.now)
    if isinstance(action, Send):
        server.publish(held)
        for item in server.connect(action.messages[0]["ext"]["ack"])[0][:frames]:
            stored.take(book.pushes(item))
        stored.commit(server.published)
    server.publish(before)
    book.sent = last = book.session.last(book.now)
    if last is not None:
        data, number = server.connect(last.messages[0]["ext"]["ack"])
        stored.take(book.answers(*data, ext={"ack": number}))
        assert book.session.observing
        stored.commit(server.published)
        assert stored.durable == list(range(1, server.published + 1))
        server.publish(after)
        left = book.session.last(book.now, held=True)
        assert left is not None
        server.connect(left.messages[0]["ext"]["ack"])
        assert server.forgotten <= len(stored.durable)

    if stored.restart():
        for _ in range(10):
            stored.exchange(server, "whole", 0, frames=False)
            stored.commit(server.published)
        assert stored.durable == list(range(1, server.published + 1))


@pytest.mark.parametrize("kills", [1, 2, 3])
def test_a_kill_at_any_point_of_any_delivery_leaves_the_session_resumable(kills: int) -> None:
    """Over long-polling, after each message that may have been the last to become durable."""
    for committed in product(range(4), repeat=kills):
        server, stored = Server(), Stored()
        for durable in committed:
            server.publish(3)
            for _ in range(2):
                stored.exchange(server, "whole", 0, frames=False)
                stored.commit(durable)
            assert stored.restart()
        for _ in range(6):
            stored.exchange(server, "whole", 0, frames=False)
            stored.commit(server.published)
        assert stored.durable == list(range(1, server.published + 1))


def test_what_was_heard_without_its_number_makes_no_session_resumable() -> None:
    """Its batch is acknowledged when it has come again, and nothing is stored then: who took an older batch
    for the last one would take the next messages for these."""
    server, stored = Server(), Stored()
    server.publish(2)
    stored.exchange(server, "cut", 2, frames=True)
    stored.commit(2)
    for _ in range(3):
        stored.exchange(server, "whole", 0, frames=False)
    assert server.forgotten == 2
    assert not stored.restart()

    server.publish(1)
    stored.exchange(server, "whole", 0, frames=False)
    stored.commit(1)
    assert stored.restart()


def test_the_model_notices_an_early_acknowledgement() -> None:
    """The model above is worth something: a client that acknowledges what it merely had loses messages."""
    server = Server()
    server.publish(2)
    data, number = server.connect(-1)
    assert len(data) == 2
    server.connect(number)
    assert server.forgotten == 2
    assert body({"channel": CALLS}) == [b'{"channel": "/v2/me/calls"}']
