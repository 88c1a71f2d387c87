"""What goes wrong in a soak, and when: drawn from a seed, and from nothing else.

There are two kinds of trouble. A *sting* breaks one exchange of one account, as the simulator's faults do;
they come all the time, beside each other. A *stroke* hits everything: a process is killed, the database
restarted, a contact centre forgets its sessions. Strokes come one after the other, with time between them in
which everything has to work; they are dealt like cards, so that none comes twice before each has come once,
and what the promises name comes first. The last part of a soak is quiet, so that everything settles.

In a long soak nothing kills the daemon in the last two fifths: whether its memory is flat can only be seen in
a life that is long.
"""

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from random import Random
from typing import Any, NamedTuple

from listener.simulator.faults import Fault

QUIET_SHARE, QUIET_s_MIN, QUIET_s_MAX = 0.15, 15.0, 120.0
"""How long nothing goes wrong at the end."""
LONG_s = 240.0
"""From this length on there are strokes longer than a server keeps a session, and a long last life."""
LAST_LIFE_SHARE = 0.4
STING_s = 1.5
"""Between two stings, on average."""
STROKE_s, STROKE_LONG_s = 4.0, 12.0
"""Between two strokes, on average, in a short soak and in a long one."""


class Blow(StrEnum):
    """What a stroke does."""

    KILL = "kill"
    """SIGKILL to the daemon, and a start after so many seconds."""
    TERM = "term"
    """SIGTERM to the daemon, exit code 0, and a start after so many seconds."""
    FREEZE = "freeze"
    """SIGSTOP to the daemon, SIGCONT after so many seconds."""
    RELOAD = "reload"
    """SIGHUP without some accounts, and another with them after so many seconds."""
    POSTGRES_FAST = "postgres_fast"
    """PostgreSQL stopped in its fast mode, and started after so many seconds."""
    POSTGRES_IMMEDIATE = "postgres_immediate"
    """PostgreSQL stopped as in a crash, and started after so many seconds."""
    POSTGRES_FREEZE = "postgres_freeze"
    """SIGSTOP to every process of PostgreSQL, SIGCONT after so many seconds."""
    POSTGRES_CUT = "postgres_cut"
    """Every connection to the database is ended by the server."""
    CENTRE_RESTART = "centre_restart"
    """A contact centre restarts, and knows no session any more."""
    CENTRE_FORGETS = "centre_forgets"
    """A contact centre forgets all Bayeux sessions."""
    CENTRE_REFUSES_LOGIN = "centre_refuses_login"
    """A password is refused for so many seconds; a reload follows."""
    CENTRE_REFUSES_CHANNEL = "centre_refuses_channel"
    """Subscriptions are refused for so many seconds, and all sessions are forgotten."""
    CENTRE_EXPIRES_CSRF = "centre_expires_csrf"
    """Every CSRF token is another one."""
    CENTRE_OVERSIZE = "centre_oversize"
    """One notification is larger than what the listener takes."""


NAMED = (
    Blow.KILL,
    Blow.TERM,
    Blow.FREEZE,
    Blow.RELOAD,
    Blow.POSTGRES_FAST,
    Blow.POSTGRES_IMMEDIATE,
    Blow.POSTGRES_FREEZE,
)
"""What comes first, in an order of the seed's: also a minute has most of them."""
DEADLY = (Blow.KILL, Blow.TERM)
"""What ends a daemon's life."""
SHORT_s: Mapping[Blow, tuple[float, float]] = {
    Blow.KILL: (0.0, 2.0),
    Blow.TERM: (0.0, 1.0),
    Blow.FREEZE: (0.5, 3.0),
    Blow.RELOAD: (0.5, 3.0),
    Blow.POSTGRES_FAST: (0.0, 2.0),
    Blow.POSTGRES_IMMEDIATE: (0.0, 2.0),
    Blow.POSTGRES_FREEZE: (0.5, 3.0),
    Blow.CENTRE_RESTART: (0.0, 1.5),
    Blow.CENTRE_REFUSES_LOGIN: (1.0, 3.0),
    Blow.CENTRE_REFUSES_CHANNEL: (1.0, 3.0),
}
"""How long the state that a stroke makes lasts; those that are not here make none."""
LONGER_s = (11.0, 16.0)
"""Longer than a server keeps a session (`maxInterval`, 10 s by default)."""
MAY_BE_LONGER = (
    Blow.KILL,
    Blow.TERM,
    Blow.FREEZE,
    Blow.POSTGRES_FAST,
    Blow.POSTGRES_FREEZE,
    Blow.CENTRE_RESTART,
)
LONGER_SHARE = 0.3
ADVICE = ({"reconnect": "handshake"}, {"reconnect": "none"}, {"reconnect": "retry", "interval": 700})


class Sting(NamedTuple):
    """A fault of one exchange."""

    at_s: float
    centre: int
    account: int
    kind: str
    details: Mapping[str, Any]


class Stroke(NamedTuple):
    """Something that hits everything; it is not begun before the one before it is over."""

    at_s: float
    blow: Blow
    seconds: float
    centre: int
    accounts: tuple[int, ...]
    """Those of the centre that are meant, where not all are."""


class Schedule(NamedTuple):
    """All that goes wrong, in the order of time; nothing after `quiet_s`."""

    quiet_s: float
    stings: Sequence[Sting]
    strokes: Sequence[Stroke]


def draw(seed: int, seconds: float, accounts: Sequence[int]) -> Schedule:
    """The schedule of a soak of so many seconds; `accounts` is how many each centre has."""
    quiet_s = seconds - min(QUIET_s_MAX, max(QUIET_s_MIN, QUIET_SHARE * seconds))
    return Schedule(
        quiet_s,
        list(_stings(Random(f"{seed}:stings"), quiet_s, accounts)),
        list(_strokes(Random(f"{seed}:strokes"), quiet_s, accounts, long=seconds >= LONG_s)),
    )


def _moments(dice: Random, mean_s: float, until_s: float) -> Iterator[float]:
    at_s = mean_s
    while at_s < until_s:
        yield at_s
        at_s += mean_s * (0.5 + dice.random())


def _dealt(dice: Random, cards: Sequence[Any], first: Sequence[Any] = ()) -> Iterator[Any]:
    """Each card once, `first` before the others; then all of them again, in another order."""
    deck = dice.sample(first, len(first))
    deck += dice.sample([card for card in cards if card not in first], len(cards) - len(first))
    while True:
        yield from deck
        deck = dice.sample(cards, len(cards))


def _stings(dice: Random, until_s: float, accounts: Sequence[int]) -> Iterator[Sting]:
    kinds = _dealt(dice, list(Fault))
    for at_s in _moments(dice, STING_s, until_s):
        centre = dice.choices(range(len(accounts)), accounts)[0]
        kind = next(kinds)
        details: dict[str, Any] = {"on": dice.choices(["connect", "subscribe", "handshake"], [8, 1, 1])[0]}
        match kind:
            case Fault.DELAY:
                details["seconds"] = round(dice.uniform(0.2, 3.0), 1)
            case Fault.HTTP_STATUS:
                details["status"] = dice.choice([403, 408, 429, 500, 502])
            case Fault.TRUNCATED_JSON:
                details["times"] = dice.choice([1, 1, 4])
            case Fault.ADVICE:
                details["advice"] = dice.choice(ADVICE)
        yield Sting(round(at_s, 2), centre, dice.randrange(accounts[centre]), str(kind), details)


def _strokes(dice: Random, until_s: float, accounts: Sequence[int], *, long: bool) -> Iterator[Stroke]:
    blows = _dealt(dice, list(Blow), NAMED)
    for at_s in _moments(dice, STROKE_LONG_s if long else STROKE_s, until_s):
        blow = next(blows)
        while long and blow in DEADLY and at_s > (1 - LAST_LIFE_SHARE) * until_s:
            blow = next(blows)
        low_s, high_s = SHORT_s.get(blow, (0.0, 0.0))
        if long and blow in MAY_BE_LONGER and dice.random() < LONGER_SHARE:
            low_s, high_s = LONGER_s
        centre = dice.randrange(len(accounts))
        some = tuple(sorted(dice.sample(range(accounts[centre]), min(2, accounts[centre]))))
        yield Stroke(round(at_s, 2), blow, round(dice.uniform(low_s, high_s), 2), centre, some)
