"""Compares the calls that an account is known to have with a list of its live calls: whether it is deaf.

A list that says the same as what was heard proves little: what began and ended between two lists leaves no
trace in either. One that says something else proves that a message did not come, or has not come yet. Which
of the two it is cannot be seen in one list, so a difference counts only when it is `confirmed` by another
list, with nothing heard of that call in between.

The comparison is the fold itself (`listener.core.normalise.Board`): a difference is what the list would
change if it were stored. So what is called the same call here is the same call there, and the snapshot that
is stored after a session was given up leaves nothing of the difference that gave it up.

It refuses to know whether the session is deaf because of a balancer, a server or an agent's login, and since
when: `listener.coverage.Watch` knows what was last heard.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime

from msgspec import Struct

from listener.core.calls import Call, Heard, Snapshot
from listener.core.normalise import Board

NAMED_MAX = 3
"""Differences that one sentence names; of more it says how many."""


class Difference(Struct, frozen=True):
    """One call of which the list says something else than what was heard."""

    call_id: str
    """Under which it was first heard, or is listed if it never was."""
    heard: str | None
    """The state that was heard last; None: nothing was heard of it, or it had ended."""
    listed: str | None
    """The state in the list; None: it is not listed."""
    heard_at: datetime | None = None
    """When it was last heard of."""

    def __str__(self) -> str:
        """In words, for a log."""
        if self.heard is None:
            return f"call {self.call_id} is live ({self.listed}), and its beginning was not heard"
        if self.listed is None:
            return (
                f"call {self.call_id} is no longer live, and its end was not heard ({self.heard} is the last)"
            )
        return f"call {self.call_id} is {self.listed}, and {self.heard} is the last that was heard"


def differences(known: Iterable[Call], heard: Heard, listed: Snapshot) -> list[Difference]:
    """What a list of live calls says otherwise than the calls that are known to be open.

    `known` are the account's open calls with everything in them that was said before the list came, and
    maybe more: a call that was heard of since the list was asked for (`heard.asked_at`) is not compared. A
    call that is not known, and listed at its end (Released, Completed) or without a state, is no difference:
    it may have ended before. Of a list that does not claim to be complete nothing is concluded.
    """
    if not listed.complete:
        return []
    before = {call.id: call for call in known}
    # Ids above all that are known: the calls that the list would open must not take the place of one.
    steps = Board(before.values()).hear(max(before, default=0), heard, listed)
    found = []
    for step in steps:
        call = step.call
        was = before.get(call.id)
        if was is None:
            if call.open and call.state:
                found.append(Difference(call.call_id, None, call.state))
        elif call.state != was.state:
            still = call.state if call.ended_at is not None or call.open else None
            found.append(Difference(was.call_id, was.state, still, was.last_heard_at))
    return found


def confirmed(before: Sequence[Difference], now: Sequence[Difference]) -> list[Difference]:
    """Those of `now` that were there before, about calls of which nothing was heard in between."""
    had = {(each.call_id, each.heard_at) for each in before}
    return [each for each in now if (each.call_id, each.heard_at) in had]


def sentence(found: Sequence[Difference]) -> str:
    """The differences in one sentence, for a person."""
    more = len(found) - NAMED_MAX
    named = "; ".join(map(str, found[:NAMED_MAX]))
    return f"{named}; and {more} more" if more > 0 else named
