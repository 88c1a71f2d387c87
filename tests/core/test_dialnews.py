"""What a batch tells about dials, and what is told again of a call: the same, with the same messages."""

from datetime import timedelta
from itertools import count

import pytest

from listener.core.calls import Call, Heard, Recorded, Step, noted
from listener.core.decode import decode
from listener.core.dialling import CallHeard, Cause, Dial, System, advance, overheard
from listener.core.dialnews import TEXT_CHARS_MAX, Mark, Told, Trouble, retold, told, trouble
from listener.core.normalise import Board
from tests.core import messages
from tests.store.line import T0

ERROR = b'{"error":{"errorCode":415,"errorMessage":"Invalid Destination DN"},"messageType":"EventError"}'


def heard(raw: bytes, position: int = 1, channel: str = messages.CHANNEL) -> Heard:
    """A message, a second after the one before."""
    at = T0 + timedelta(seconds=position)
    return Heard(1, "s", position, at, channel, raw)


def recorded(*messages: Heard) -> Recorded:
    """What the journal answers to these messages."""
    board, ids = Board(()), count(100, 10)
    steps: list[Step] = []
    origins: list[int] = []
    numbers = []
    for place, each in enumerate(messages):
        numbers.append(next(ids))
        made = board.hear(numbers[-1], each, decode(each.raw, each.channel))
        steps += made
        origins += [place] * len(made)
    new = tuple(noted(each, decode(each.raw, each.channel)) for each in messages)
    return Recorded(new, tuple(steps), 0, tuple(numbers), tuple(origins))


def course(*states: str) -> Recorded:
    """A call through these states."""
    return recorded(*(heard(messages.message(state), place) for place, state in enumerate(states, 1)))


def test_a_batch_tells_in_order() -> None:
    """Steps with their message and its time, errors between them, and how far the account has come."""
    batch = recorded(
        heard(messages.message("Dialing")),
        heard(ERROR, 2),
        heard(b"no JSON", 3),
        heard(messages.message("Released"), 4),
    )
    items, marks = told(batch)
    assert [(type(item), item.notification, item.at) for item in items] == [
        (Told, 100, T0 + timedelta(seconds=1)),
        (Trouble, 110, T0 + timedelta(seconds=2)),
        (Told, 130, T0 + timedelta(seconds=4)),
    ]
    assert [item.began for item in items if isinstance(item, Told)] == [True, False]
    assert marks == {1: Mark(130, T0 + timedelta(seconds=4))}


def test_the_mark_is_beyond_the_calls_that_a_list_opens() -> None:
    """Each has an id of its own, after that of the message; all follow from it."""
    listed = [messages.resource("Dialing", id=id, connId=id) for id in ("a", "b")]
    items, marks = told(recorded(heard(messages.snapshot(*listed))))
    calls = [item.call.id for item in items if isinstance(item, Told)]
    assert len(calls) == 2
    assert marks[1].notification == max(calls) > 100


def test_an_old_batch_without_ids_tells_nothing() -> None:
    """All of it was told before."""
    assert told(Recorded((), (), 3)) == ([], {})


@pytest.mark.parametrize(
    "states",
    [
        ("Dialing", "Released"),
        ("Dialing", "Ringing", "Established", "Held", "Established", "Released", "Completed"),
        ("Dialing", "Ringing"),
        ("Dialing", "Established"),
        ("Established", "Released"),
    ],
)
def test_told_again_is_told_the_same(states: tuple[str, ...]) -> None:
    """A dial that hears the steps live, and one that hears what the call and its changes say, are equal."""
    batch = course(*states)
    items, _ = told(batch)
    live = [item for item in items if isinstance(item, Told)]
    changes = [
        (one.notification, one.at, change.after)
        for one, step in zip(live, batch.steps, strict=True)
        for change in step.changes
        if change.field == "state"
    ]
    again = retold(live[-1].call, changes)
    assert [(one.notification, one.at, one.began) for one in again] == [
        (one.notification, one.at, one.began) for one in live
    ]
    assert _dial(again) == _dial(live)


def _dial(steps: list[Told]) -> Dial | None:
    dial = overheard(steps[0].call)
    for step in steps:
        if dial is not None:
            dial = advance(dial, CallHeard(step.call), step.at).dial
    return dial


def test_a_call_without_a_state_is_told_once() -> None:
    """Its opening is all that there is to tell."""
    call: Call = course("Dialing").steps[0].call
    (one,) = retold(call, [])
    assert (one.notification, one.at, one.call, one.began) == (call.id, call.opened_at, call, True)


@pytest.mark.parametrize(
    ("raw", "kind", "cause"),
    [
        (ERROR, "EventError", Cause(System.GWS, "ErrorCode", "415", "Invalid Destination DN")),
        (
            b'[{"data":' + ERROR + b"}]",
            "EventError",
            Cause(System.GWS, "ErrorCode", "415", "Invalid Destination DN"),
        ),
        (b'{"data":{"messageType":"ErrorMessage"}}', "ErrorMessage", Cause(System.GWS, "ErrorMessage")),
        (b'{"error":{"errorCode":true,"errorMessage":[1]}}', "EventError", Cause(System.GWS, "ErrorCode")),
        (b'{"error":"x"}', "EventError", Cause(System.GWS, "ErrorCode")),
        (b'{"data":7}', "EventError", Cause(System.GWS, "ErrorCode")),
        (b"[]", "EventError", Cause(System.GWS, "ErrorCode")),
        (b"\xff", "EventError", Cause(System.GWS, "ErrorCode")),
    ],
)
def test_an_error_says_what_it_says(raw: bytes, kind: str, cause: Cause) -> None:
    """Its code and text where it has them, whatever else it is; never an exception."""
    assert trouble(7, heard(raw), kind).cause == cause


def test_a_long_error_is_cut() -> None:
    """The whole message is in the journal."""
    raw = b'{"error":{"errorMessage":"' + b"x" * 9_000 + b'"}}'
    assert len(trouble(7, heard(raw), "EventError").cause.text) == TEXT_CHARS_MAX
