"""What was heard that may concern a dial, before anybody knows which: out of a batch, or out of the journal.

A call is told step by step: live, as the pipeline committed it; or again after a crash, from the call as it
is now and the states that it went through (`retold`). Both give the same `Told`, with the id of the message,
so that a dial which was told something already recognises it. Messages without a call that name a cause of
failure are `Trouble`.

It decides what of a batch can matter to dials. It refuses to know which dial it is (`listener.core.dialling`
finds that), and where dials are kept.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

import msgspec
from msgspec import Struct, structs

from listener.core.calls import Aside, Call, Heard, Recorded, State
from listener.core.dialling import Cause, Dial, Fact, Match, System

TROUBLE_TYPES = frozenset({"ErrorMessage", "EventError"})
"""Messages that say that something failed, and name no call: of the devices channel, and of v3."""

TEXT_CHARS_MAX = 500
"""A longer text of an error is cut; the whole message is in the journal."""


class Told(Struct, frozen=True, gc=False):
    """A call, as it is after a message."""

    notification: int
    """The id of the message."""
    at: datetime
    """When it was received."""
    call: Call
    began: bool = False
    """It is the first message about the call."""


class Trouble(Struct, frozen=True, gc=False):
    """A message of an account that says that something failed, without saying what."""

    notification: int
    at: datetime
    account: int
    cause: Cause


class News(Struct, frozen=True, gc=False):
    """Something to be written down about one dial: what was `found` of whose it is, and then the fact."""

    dial: str
    """Its id."""
    at: datetime
    fact: Fact | None = None
    """None where several dials may be meant: then none of them is told anything but that."""
    notification: int | None = None
    """The message that says so. What is not newer than the last that the dial was told is left out."""
    found: Match | None = None
    call: int | None = None
    """The call that was found to be the dial's; without `found`, by the name that its system has for it."""
    opens: Dial | None = None
    """The dial as it begins, if there is none yet: an overheard one."""
    merges: str | None = None
    """An overheard dial that turned out to be this one."""


class Mark(Struct, frozen=True, gc=False):
    """Up to which message of an account everything was told."""

    notification: int
    at: datetime


def told(recorded: Recorded) -> tuple[list[Told | Trouble], dict[int, Mark]]:
    """What a committed batch tells, in the order of its messages, and how far its accounts have come."""
    items: list[Told | Trouble] = []
    marks: dict[int, Mark] = {}
    steps = iter(zip(recorded.origins, recorded.steps, strict=True))
    following = next(steps, None)
    for place, (id, entry) in enumerate(zip(recorded.ids, recorded.entries, strict=True)):
        heard, last = entry.heard, id
        while following is not None and following[0] == place:
            step = following[1]
            items.append(Told(id, heard.received_at, step.call, step.began))
            # The calls that a snapshot opens have ids of their own, after that of the message.
            last = max(last, step.call.id) if step.began else last
            following = next(steps, None)
        if isinstance(entry.other, Aside) and entry.other.message_type in TROUBLE_TYPES:
            items.append(trouble(id, heard, entry.other.message_type))
        marks[heard.account] = Mark(last, heard.received_at)
    return items, marks


def retold(call: Call, states: Iterable[tuple[int, datetime, str | None]]) -> list[Told]:
    """The steps of a call, from what it is now and its changes of state (message, time, state), in order."""
    changes = list(states) or [(call.id, call.opened_at, call.state)]
    steps = []
    for place, (notification, at, state) in enumerate(changes, 1):
        if place == len(changes) and not call.open:
            as_then = call
        else:
            established = call.established_at is not None and call.established_at <= at
            as_then = structs.replace(
                call,
                state=state or "",
                state_since=at,
                established_at=call.established_at if established else None,
                ended_at=call.ended_at if state in _OVER else None,
                settled=call.settled if state in _OVER else None,
                outcome=call.outcome if state in _OVER else None,
            )
        steps.append(Told(notification, at, as_then, began=place == 1))
    return steps


_OVER = (State.RELEASED, State.COMPLETED)


def trouble(id: int, heard: Heard, message_type: str) -> Trouble:
    """What an error message of this type says: of the devices channel nothing but that; of v3 a code and a
    text. Total."""
    said: Any = None
    try:
        said = msgspec.json.decode(heard.raw)
        if isinstance(said, list) and said:
            said = said[0]
        said = said.get("data", said).get("error")
    except (msgspec.DecodeError, UnicodeError, AttributeError):
        said = None
    code = text = ""
    if isinstance(said, dict):
        code, text = (_text(said.get(key)) for key in ("errorCode", "errorMessage"))
    field = "ErrorCode" if message_type == "EventError" else "ErrorMessage"
    return Trouble(id, heard.received_at, heard.account, Cause(System.GWS, field, code, text))


def _text(value: object) -> str:
    return str(value)[:TEXT_CHARS_MAX] if isinstance(value, str | int) and not isinstance(value, bool) else ""
