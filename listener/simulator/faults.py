"""What goes wrong in an exchange: once on command, or at random from a seed.

This module decides which exchange is hit; the server decides what that means on the wire. Faults that
change the state of the server (forgotten sessions, deaf ones, a restart, refused logins) are methods of
`listener.simulator.gws.GwsServer`, since they hit no single exchange.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random
from typing import Any

from listener.errors import SettingsError


class Fault(StrEnum):
    """What may happen to the answer of one Bayeux exchange."""

    DROP_BEFORE_REPLY = "drop_before_reply"
    """The reply is made and counted as sent, and the connection is cut before its first byte."""
    DROP_MID_REPLY = "drop_mid_reply"
    """The connection is cut in the middle of the body."""
    REPLY_LOST = "reply_lost"
    """All messages are sent, and the connection is cut before the /meta/connect reply: with the ack
    extension they come again."""
    HALF_OPEN = "half_open"
    """The connection stays open and nothing is ever answered. A request that arrives is not even looked
    at; one that is held already is answered into the void."""
    DELAY = "delay"
    """The reply comes `seconds` late."""
    TRUNCATED_JSON = "truncated_json"
    """HTTP is whole, its JSON ends too early."""
    HTML_503 = "html_503"
    """A proxy's error page."""
    NULL_ITEMS = "null_items"
    """`null` stands between the messages, once at the beginning and once at the end."""
    ADVICE_NULL = "advice_null"
    """`"advice": null` in every reply of the exchange."""
    STRING_INTERVAL = "string_interval"
    """The advice has its interval as text."""
    ADVICE = "advice"
    """The reply carries the given `advice`; reconnect none or handshake ends the session too."""
    UNKNOWN_CLIENT = "unknown_client"
    """The session is forgotten and the exchange answered 402."""
    HTTP_STATUS = "http_status"
    """HTTP `status` with a GWS error body."""


WEBSOCKET_FAULTS = frozenset(Fault) - {Fault.HTML_503, Fault.HTTP_STATUS}
"""Those that have a meaning on a websocket; the two others close it with 1011 there."""


@dataclass(slots=True)
class ArmedFault:
    """A fault that waits for its exchange."""

    kind: Fault
    account: str | None = None
    """A login; None: any."""
    on: str = "connect"
    """connect | handshake | subscribe | disconnect | any."""
    times: int = 1
    seconds: float = 1.0
    """DELAY: how late."""
    status: int = 503
    """HTTP_STATUS: which."""
    advice: dict[str, Any] = field(default_factory=dict)
    """ADVICE: what."""

    def fits(self, account: str, exchange: str) -> bool:
        """Whether it is meant for this exchange of this account."""
        return self.account in (None, account) and self.on in ("any", exchange)


class Faults:
    """The faults that are to come. Not one of its methods waits or fails late: `arm` checks names."""

    def __init__(self, rates: Mapping[str, float] | None = None, seed: int = 1) -> None:
        self.struck: Counter[str] = Counter()
        """How often each fault has hit."""
        self._armed: list[ArmedFault] = []
        self._rates: list[tuple[Fault, float]] = []
        self._rng = Random(seed)
        if rates:
            self.at_random(rates, seed)

    def arm(
        self, kind: str, *, account: str | None = None, on: str = "connect", times: int = 1, **details: Any
    ) -> None:
        """Let the next `times` fitting exchanges fail so; `details` are fields of `ArmedFault`."""
        try:
            self._armed.append(ArmedFault(Fault(kind), account, on, times, **details))
        except (ValueError, TypeError) as error:
            names = ", ".join(Fault)
            raise SettingsError(f"simulator: no such fault ({error}); write one of {names}") from error

    def at_random(self, rates: Mapping[str, float], seed: int) -> None:
        """From now on each exchange fails with these chances (0 to 1 each, their sum at most 1)."""
        try:
            self._rates = [(Fault(kind), float(rate)) for kind, rate in rates.items()]
        except ValueError as error:
            raise SettingsError(f"simulator: {error}; write one of {', '.join(Fault)}") from error
        if not 0 <= sum(rate for _, rate in self._rates) <= 1:
            raise SettingsError("simulator: the rates of the faults must add up to at most 1")
        self._rng = Random(seed)

    def clear(self) -> None:
        """Let nothing fail any more."""
        self._armed.clear()
        self._rates.clear()

    def take(self, account: str, exchange: str, *, arriving: bool = False) -> ArmedFault | None:
        """The fault of this exchange, if any; it is used up by this. `arriving` asks only for faults
        that keep a request from being looked at."""
        for armed in self._armed:
            if armed.fits(account, exchange) and (not arriving or armed.kind is Fault.HALF_OPEN):
                break
        else:
            return None if arriving else self._draw()
        armed.times -= 1
        if armed.times <= 0:
            self._armed.remove(armed)
        self.struck[armed.kind] += 1
        return armed

    def _draw(self) -> ArmedFault | None:
        if not self._rates:
            return None
        chance = self._rng.random()
        for kind, rate in self._rates:
            chance -= rate
            if chance < 0:
                self.struck[kind] += 1
                return ArmedFault(kind, on="any")
        return None
