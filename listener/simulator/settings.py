"""What can be set about the simulated contact centre, in one frozen value.

Times of the Bayeux protocol are milliseconds, as the protocol has them; all others are seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from listener.errors import SettingsError
from listener.simulator.scripts import CALLS_CHANNEL, Dialect, Quirks

MIXED = "mixed"
"""Every dialect, one account after the other."""


@dataclass(frozen=True, slots=True)
class SimulatorSettings:
    """All of it has defaults that suit a test; `SettingsError` says what is wrong."""

    # The centre.
    accounts: int = 20
    rate: float = 50.0
    """Notifications per second, over all accounts."""
    seed: int = 1
    """The same seed gives the same messages in the same order for each account."""
    dialect: str = MIXED
    """One of `Dialect`, or "mixed"."""
    calls_per_account: int = 1
    """Calls that an account has at a time."""
    epoch_s: float | None = None
    """The server's clock at the first message, in epoch seconds; None: the real one. Fixed, the bytes
    of two runs are equal too."""
    quirks: Quirks = field(default_factory=Quirks)
    password: str = "simulated"  # noqa: S105 - made up, for loopback
    """The password of every account; logins are agent5000, agent5001, …"""
    dial_time_scale: float = 1.0
    """What the delays of calls dialled by request are multiplied by: 0.01 makes them a hundred times
    faster."""
    v3_channel: str = CALLS_CHANNEL
    """Where messages of the v3 dialect go. Workspace v3 itself uses /workspace/v3/voice; the default
    lets one listener hear all dialects from one subscription."""
    remember: bool = True
    """Keep every message and call for the truth; False keeps counts and digests only, for long runs."""

    # Where it listens.
    host: str = "127.0.0.1"
    port: int = 0
    """0: any free one."""

    # The PBXs beside it, each a server of its own.
    noojee: bool = False
    noojee_port: int = 0
    noojee_key: str = "simulated-key"
    click2dial: bool = False
    click2dial_port: int = 0
    click2dial_version: int = 3
    """Below 3 its records have the spelling before v3.0.0."""
    click2dial_webhook: str | None = None
    """Where it posts its records."""
    click2dial_redis: str | None = None
    """The Redis on whose lists it puts them."""

    # GWS.
    csrf: bool = False
    csrf_on_notifications: bool = False
    """Genesys does not say whether the token is wanted on CometD's requests too."""
    contact_centre_session_required: bool = False
    """Dial answers 500, "Device … is not registered.", until StartContactCenterSession."""
    partial_contact_centre_session: bool = False
    """StartContactCenterSession answers statusCode 7."""

    # CometD.
    ack: bool = True
    """The acknowledgement extension is installed."""
    websocket: bool = True
    """Websocket is offered beside long-polling."""
    timeout_ms: int = 30_000
    interval_ms: int = 0
    max_interval_ms: int = 10_000
    advise_max_interval: bool = True
    """Put maxInterval into the advice, as CometD does with its handshakeReconnect option on."""
    sessions_per_browser: int = 1
    """Suspended /meta/connect of one BAYEUX_BROWSER cookie; further ones get the multi-session advice."""
    multi_session_interval_ms: int = 2_000
    sweep_period_ms: int = 997
    """How often expired sessions are looked for."""
    reply_messages_max: int = 2_000
    """Messages in one long-polling reply, the rest follows in the next. CometD has no such bound and
    empties its queue; 0 does the same."""
    frame_messages_max: int = 1
    """Messages in one websocket frame (CometD: messagesPerFrame)."""
    session_queue_max: int = 500_000
    """Messages that wait in one session. When full, the session is dropped as if it had expired: its
    client hears 402 and knows that it has a gap."""
    faults: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """Faults at random: the name of a `Fault` to its share of the exchanges."""

    def __post_init__(self) -> None:
        if self.dialect != MIXED and self.dialect not in set(Dialect):
            names = ", ".join([MIXED, *Dialect])
            raise SettingsError(f"simulator: there is no dialect {self.dialect!r}; write one of {names}")
        for name in ("accounts", "rate", "calls_per_account", "timeout_ms", "max_interval_ms"):
            if getattr(self, name) <= 0:
                raise SettingsError(f"simulator: {name} must be above 0, not {getattr(self, name)}")
