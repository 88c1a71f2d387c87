"""A list of live calls beside what was heard: which differences there are, and which of them count."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from listener.core.calls import Call, Heard, Snapshot, Source
from listener.core.decode import decode
from listener.core.normalise import Board
from listener.core.probe import NAMED_MAX, Difference, confirmed, differences, sentence
from tests.core.messages import ABSENT, CHANNEL, JsonObject, message, resource, snapshot

STARTED = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)
PATH = "/api/v2/me/calls"
ONE, TWO = "02AB7CDKQ1H9V6T4080000LAES000001", "02AB7CDKQ1H9V6T4080000LAES000002"

Said = tuple[float, str, str]
"""When, of which call, and its state."""


def at(seconds: float) -> datetime:
    """So long after the beginning."""
    return STARTED + timedelta(seconds=seconds)


def legs(call_id: str) -> dict[str, Any]:
    """The ids of a call: two calls share none."""
    return {"id": call_id, "callUuid": call_id, "connId": call_id[-8:]}


def played(*said: Said) -> dict[int, Call]:
    """All calls after these messages, by their ids."""
    calls: dict[int, Call] = {}
    for number, (seconds, call_id, state) in enumerate(said, 1):
        heard = Heard(1, "a stream", number, at(seconds), CHANNEL, message(state, **legs(call_id)))
        for step in Board(calls.values()).hear(number * 10, heard, decode(heard.raw, CHANNEL)):
            calls[step.call.id] = step.call
    return calls


def known(*said: Said) -> list[Call]:
    """The calls that are open after these messages, as the store gives them."""
    return [call for call in played(*said).values() if call.open]


def live(call_id: str, state: object = "Established", **fields: Any) -> JsonObject:
    """A call as a list has it."""
    return resource(state, **(legs(call_id) | fields))


def look(
    calls: Sequence[Call], *listed: JsonObject, asked_s: float = 60, status: int = 0
) -> list[Difference]:
    """The differences between the calls and a list that was asked for then, and came half a second later."""
    raw = snapshot(*listed, status=status)
    decoded = decode(raw, PATH)
    assert isinstance(decoded, Snapshot)
    heard = Heard(1, "another", 1, at(asked_s + 0.5), PATH, raw, Source.SNAPSHOT, at(asked_s))
    return differences(calls, heard, decoded)


TALK = (10.0, ONE, "Established")

TABLE: dict[str, tuple[list[Said], list[JsonObject], list[Difference]]] = {
    "nothing and nothing": ([], [], []),
    "the same call in the same state": ([TALK], [live(ONE)], []),
    "two calls": ([TALK, (20, TWO, "Held")], [live(TWO, "Held"), live(ONE)], []),
    "listed and never heard": ([], [live(ONE)], [Difference(ONE, None, "Established")]),
    "one of two is listed and never heard": (
        [TALK],
        [live(ONE), live(TWO, "Ringing")],
        [Difference(TWO, None, "Ringing")],
    ),
    "heard and not listed": ([TALK], [], [Difference(ONE, "Established", None, at(10))]),
    "another state": ([TALK], [live(ONE, "Held")], [Difference(ONE, "Established", "Held", at(10))]),
    "listed at its end": (
        [TALK],
        [live(ONE, "Released")],
        [Difference(ONE, "Established", "Released", at(10))],
    ),
    "had ended and is listed at its end": ([TALK, (20, ONE, "Released")], [live(ONE, "Released")], []),
    "had ended and is listed as live": (
        [TALK, (20, ONE, "Released")],
        [live(ONE)],
        [Difference(ONE, None, "Established")],
    ),
    "listed without a state": ([TALK], [live(ONE, ABSENT), live(TWO, ABSENT)], []),
    "listed twice": ([TALK], [live(ONE), live(ONE, "Held")], []),
    "another id and the same callUuid": ([TALK], [live(ONE, id="0099aabb", connId=ABSENT)], []),
    "in an unknown state on both sides": ([(10, ONE, "Parked")], [live(ONE, "Parked")], []),
    "heard when the list was asked for": ([(60, ONE, "Held")], [live(ONE)], []),
    "heard since the list was asked for": ([TALK, (60.2, ONE, "Held")], [live(ONE)], []),
    "began since the list was asked for": ([(60.2, ONE, "Dialing")], [], []),
    "heard just before": (
        [(59.9, ONE, "Held")],
        [live(ONE)],
        [Difference(ONE, "Held", "Established", at(59.9))],
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_what_is_a_difference(case: str) -> None:
    """A call that is listed and not known, known and not listed, or in two states; and nothing else."""
    said, listed, expected = TABLE[case]
    assert look(known(*said), *listed) == expected


def test_a_list_that_is_not_complete_differs_in_nothing() -> None:
    """An error says nothing about what it does not list."""
    assert look(known(TALK), live(TWO), status=4) == []


STATES = ("Dialing", "Ringing", "Established", "Held", "Released", "Completed", "Parked")
CALLS = st.tuples(st.sampled_from([ONE, TWO]), st.sampled_from(STATES))
LISTED = st.tuples(st.sampled_from([ONE, TWO]), st.sampled_from([*STATES, ABSENT]))


@given(said=st.lists(CALLS, max_size=5), listed=st.lists(LISTED, max_size=3))
def test_what_is_stored_of_a_list_agrees_with_it(
    said: list[tuple[str, str]], listed: list[tuple[str, object]]
) -> None:
    """The snapshot that is stored after a session was given up leaves nothing of the difference, whatever it
    lists: a disagreement cannot give up one session after another by itself."""
    calls = played(*((n, *one) for n, one in enumerate(said)))
    raw = snapshot(*(live(*one) for one in listed))
    decoded = decode(raw, PATH)
    heard = Heard(1, "another", 1, at(60.5), PATH, raw, Source.SNAPSHOT, at(60))
    for step in Board(calls.values()).hear(1000, heard, decoded):
        calls[step.call.id] = step.call
    after = [call for call in calls.values() if call.open]
    assert look(after, *(live(*one) for one in listed), asked_s=120) == []


# ── Twice ─────────────────────────────────────────────────────────────────────────────────────────────


def test_only_what_is_there_twice_is_confirmed() -> None:
    """A race shows a difference once: another list shows it no more, or another one."""
    first = look(known(TALK), live(TWO))
    assert [each.call_id for each in first] == [TWO, ONE]
    assert confirmed(first, look(known(TALK), live(ONE), asked_s=65)) == []
    assert confirmed(first, look(known(TALK), live(ONE), live(TWO), asked_s=65)) == [first[0]]
    assert confirmed([], first) == []


def test_a_call_that_moves_on_unheard_is_confirmed() -> None:
    """What counts is that nothing was heard of it, not in which state it is listed."""
    first = look(known(TALK), live(ONE, "Held"), live(TWO, "Ringing"))
    now = look(known(TALK), live(TWO), asked_s=65)
    assert confirmed(first, now) == now
    assert {each.listed for each in now} == {None, "Established"}


def test_a_call_that_was_heard_in_between_is_not_confirmed() -> None:
    """The list was late or early by a moment, and the session hears: that may happen twice in a row."""
    first = look(known(TALK), live(ONE, "Held"))
    now = look(known(TALK, (62, ONE, "Held")), live(ONE), asked_s=65)
    assert (len(first), len(now)) == (1, 1)
    assert confirmed(first, now) == []


def test_a_sentence_names_some_and_counts_the_rest() -> None:
    """Each kind in its own words; a log line stays a line."""
    found = [
        Difference("1", None, "Ringing"),
        Difference("2", "Held", None),
        Difference("3", "Held", "Dialing"),
    ]
    told = sentence(found)
    assert told == (
        "call 1 is live (Ringing), and its beginning was not heard; "
        "call 2 is no longer live, and its end was not heard (Held is the last); "
        "call 3 is Dialing, and Held is the last that was heard"
    )
    assert len(found) == NAMED_MAX
    assert sentence([*found, *found]) == told + "; and 3 more"
