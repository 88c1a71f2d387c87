"""What can be set: the name, type, default, bounds and meaning of each setting, as one frozen `Settings`.

It decides what each value may be by itself; the description of a setting is the cure that a refusal names. It
answers what several settings mean together: who may dial, where the spool lies, which headers log in.

It refuses to know where a value was said, and whether all of them can be run with: `listener.configuration`
reads and checks them. Settings stop at the daemon and its dialroom: everything below takes plain arguments.
"""

import base64
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, assert_never
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

PREFIX = "LISTENER_"
"""What the variable, or the secret file, of each setting begins with."""
REDIS_SCHEMES = ("redis://", "rediss://", "unix://")


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", str_strip_whitespace=True, hide_input_in_errors=True
    )


def _address(value: str, instead: str) -> str:
    """The address of a server without its last slash; raises ValueError. `instead` is where a login goes."""
    if not value.startswith(("http://", "https://")) or len(value.split("://", 1)[1].strip("/")) == 0:
        raise ValueError("it must begin with http:// or https:// and name a host")
    if "@" in value.split("://", 1)[1].partition("/")[0]:
        raise ValueError(f"it must hold no user and no password; {instead}")
    return value.rstrip("/")


def _extensions(value: dict[str, str]) -> dict[str, str]:
    """Extensions without blanks and technology, each with the name of an account."""
    for extension, account in value.items():
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", extension):
            raise ValueError("an extension is written without technology and blanks, such as 101")
        if not account.strip():
            raise ValueError("an extension needs the name of an account")
    return {extension: account.strip() for extension, account in value.items()}


class Store(_Section):
    """Where the calls are remembered."""

    dsn: SecretStr | None = Field(
        None,
        description='a PostgreSQL address, "postgresql://user@host/database"; none means the bundled server',
    )
    data_dir: Path = Field(Path("listener-data"), description="the directory of the bundled server")
    spool_dir: Path | None = Field(
        None, description="the directory for what is heard while the database is away"
    )

    @field_validator("dsn")
    @classmethod
    def _of_postgresql(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().startswith(("postgresql://", "postgres://")):
            raise ValueError("it must begin with postgresql://")
        try:
            netloc = "" if value is None else urlsplit(value.get_secret_value()).netloc
            for host in netloc.rpartition("@")[2].split(","):
                _ = urlsplit(f"//{host}").port
        except ValueError:
            # What is wrong with it may hold the password, and is not quoted.
            raise ValueError(
                "it cannot be read as an address; write postgresql://user:password@host:5432/database, and "
                "in user and password %XX for what is neither letter nor digit, such as %5B for ["
            ) from None
        return value


class Environment(_Section):
    """One GWS: where it is and how one logs in."""

    base_url: str = Field(description='the address of the GWS, such as "https://gws.example.com"')
    auth: Literal["basic", "bearer", "headers"] = Field(
        "basic", description='"basic" (login and password), "bearer" (a token) or "headers" (given ones)'
    )
    token: SecretStr | None = Field(
        None, description="the bearer token of accounts that have none of their own"
    )
    token_file: Path | None = Field(None, description="a file that holds the token")
    token_env: str | None = Field(None, description="the name of a variable that holds the token")
    headers: dict[str, SecretStr] = Field(
        default_factory=dict, description="headers of every request; {login} and {password} are filled in"
    )
    headers_file: Path | None = Field(None, description='a file of headers, "Name: value" on each line')
    headers_env: str | None = Field(None, description="the name of a variable with such lines")
    ca_file: Path | None = Field(None, description="certificates (PEM) of a private authority")
    verify: bool = Field(True, description="false accepts any certificate: only for trying things out")
    websocket: bool = Field(
        False, description="true tries a websocket first; GWS 8.5.2 offers long-polling only"
    )
    channels: tuple[str, ...] = Field(
        ("/v2/me/calls", "/v2/me/devices"),
        description='a list of Bayeux channels, with "/v2/me/calls" among them',
    )
    start_contact_center_session: bool = Field(
        False,
        description="true LOGS THE AGENT IN (StartContactCenterSession); a mere listener leaves it false",
    )
    dials: bool = Field(False, description="true lets this listener dial by the accounts of this GWS")
    me_path: str = Field("/api/v2/me", description="the path that logs in")
    notifications_path: str = Field("/api/v2/notifications", description="the path of the CometD server")
    snapshot_path: str = Field("/api/v2/me/calls?fields=*", description="the path that lists the live calls")

    @field_validator("base_url")
    @classmethod
    def _an_address(cls, value: str) -> str:
        return _address(value, "they belong to the accounts")

    @field_validator("channels")
    @classmethod
    def _with_calls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [channel for channel in value if not channel.startswith("/")]:
            raise ValueError(f"a channel begins with a slash; {wrong[0]!r} does not")
        if not value:
            raise ValueError("at least one channel is needed to hear anything")
        return value


class Account(_Section):
    """One login whose calls are heard. `configuration.load` puts the secret into `password`."""

    environment: str = Field(description="the NAME of one of the [environments.NAME]")
    login: str = Field(min_length=1, description="the login at the GWS")
    name: str = Field("", description="how tables and the log call it; the login where it is not given")
    password: SecretStr | None = Field(None, description="the password, or the account's own bearer token")
    password_file: Path | None = Field(None, description="a file that holds the password")
    password_env: str | None = Field(None, description="the name of a variable that holds the password")
    tenant: str = Field("", description="whose account it is, where several share a listener")
    start_contact_center_session: bool | None = Field(
        None, description="true LOGS THE AGENT IN; as the environment says where it is not given"
    )
    dials: bool | None = Field(
        None, description="true lets this listener dial by it; as the environment says where it is not given"
    )


class NoojeePbx(_Section):
    """One Noojee Contact: where it is, and whose its extensions are."""

    base_url: str = Field(description='the address of the Noojee, such as "https://noojee.example.com"')
    api_key: SecretStr | None = Field(None, description="the global API key")
    api_key_file: Path | None = Field(None, description="a file that holds the API key")
    api_key_env: str | None = Field(None, description="the name of a variable that holds the API key")
    ca_file: Path | None = Field(None, description="certificates (PEM) of a private authority")
    verify: bool = Field(True, description="false accepts any certificate: only for trying things out")
    tenant: str = Field("", description="whose the accounts of this PBX are")
    extensions: dict[str, str] = Field(
        default_factory=dict,
        description='an account for each extension, { 101 = "desk101" }, of a name that no other account has',
    )
    subscribe: bool = Field(True, description="false does not ask for the events of these extensions")
    dials: bool = Field(False, description="true lets this listener dial by this PBX")

    @field_validator("base_url")
    @classmethod
    def _an_address(cls, value: str) -> str:
        return _address(value, "the API key is its login")

    @field_validator("extensions")
    @classmethod
    def _well_named(cls, value: dict[str, str]) -> dict[str, str]:
        return _extensions(value)


class Click2DialPbx(_Section):
    """One Click2Dial server: where it is, and how its records come."""

    base_url: str = Field(
        description='the address of the Click2Dial, with its port, such as "http://pbx.example.com:8300"'
    )
    version: Literal["contact_ref", "call_ref"] = Field(
        "contact_ref", description='"contact_ref" from v3.0.0, "call_ref" before: what it calls the reference'
    )
    headers: dict[str, SecretStr] = Field(
        default_factory=dict, description="headers that a gateway before it wants"
    )
    headers_file: Path | None = Field(None, description='a file of headers, "Name: value" on each line')
    headers_env: str | None = Field(None, description="the name of a variable with such lines")
    ca_file: Path | None = Field(None, description="certificates (PEM) of a private authority")
    verify: bool = Field(True, description="false accepts any certificate: only for trying things out")
    redis_url: SecretStr | None = Field(
        None, description='where its records are, "redis://:password@host:6379/0"; this listener empties it'
    )
    redis_url_file: Path | None = Field(None, description="a file that holds the redis_url")
    redis_url_env: str | None = Field(None, description="the name of a variable that holds the redis_url")
    webhook_token: SecretStr | None = Field(
        None, description="what whoever posts a record to /click2dial/NAME has to show"
    )
    webhook_token_file: Path | None = Field(None, description="a file that holds the webhook_token")
    webhook_token_env: str | None = Field(
        None, description="the name of a variable that holds the webhook_token"
    )
    tenant: str = Field("", description="whose the accounts of this PBX are")
    extensions: dict[str, str] = Field(
        default_factory=dict,
        description='an account for each extension, { 101 = "desk101" }, of a name that no other account has',
    )
    dials: bool = Field(False, description="true lets this listener dial by this PBX")

    @field_validator("base_url")
    @classmethod
    def _an_address(cls, value: str) -> str:
        return _address(value, "the headers are for that")

    @field_validator("redis_url")
    @classmethod
    def _of_redis(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().startswith(REDIS_SCHEMES):
            raise ValueError("it must begin with redis://, rediss:// or unix://")
        return value

    @field_validator("extensions")
    @classmethod
    def _well_named(cls, value: dict[str, str]) -> dict[str, str]:
        return _extensions(value)


class Api(_Section):
    """Where programs, and the command line, place dials. It always needs a token."""

    host: str = Field("127.0.0.1", description="the address to listen on")
    port: int = Field(9465, ge=0, le=65535, description="a port number; 0 takes a free one")
    token: SecretStr | None = Field(None, description="what a caller sends as Authorization: Bearer …")
    token_file: Path | None = Field(None, description="a file that holds the token")
    token_env: str | None = Field(None, description="the name of a variable that holds the token")


class Operations(_Section):
    """The daemon's own pages: /metrics, /-/healthy, /-/ready."""

    host: str = Field("127.0.0.1", description="the address to listen on; other than loopback needs a token")
    port: int = Field(9464, ge=0, le=65535, description="a port number; 0 takes a free one")
    token: SecretStr | None = Field(None, description="what a reader sends as Authorization: Bearer …")
    token_file: Path | None = Field(None, description="a file that holds the token")
    token_env: str | None = Field(None, description="the name of a variable that holds the token")


class Limits(_Section):
    """The named bounds. What happens at each is in the README."""

    backlog_bytes_max: int = Field(
        64 * 2**20,
        ge=2**16,
        description="bytes heard and not yet stored, at least 65536, before we stop asking for more",
    )
    spool_bytes_max: int = Field(
        2**30,
        ge=2**20,
        description="bytes on disk of what is heard while the database is away, at least 1048576",
    )
    delivery_bytes_max: int = Field(
        16 * 2**20,
        ge=2**10,
        description="bytes of one reply of the CometD server, at least 1024; a larger one is a gap",
    )
    batch_max: int = Field(
        2000, ge=1, le=100_000, description="notifications in one transaction, 1 to 100000"
    )
    stop_s: float = Field(
        20.0, gt=0, le=600, description="seconds to store what was heard when told to stop, up to 600"
    )
    probe_s: float = Field(
        60.0,
        ge=0,
        le=86_400,
        description="seconds between two questions, whether an account is deaf, up to 86400; 0 asks none",
    )
    call_hours_max: float = Field(
        24.0,
        gt=0,
        le=8760,
        description="hours without a word of an open call, up to 8760, until its end is inferred",
    )
    wrap_up_s_max: float = Field(
        3600.0,
        gt=0,
        le=86_400,
        description="seconds until the end of a wrap-up is not waited for any more, up to 86400",
    )
    dial_requested_s: float = Field(
        60.0,
        gt=0,
        le=86_400,
        description="seconds for the answer to a dial's request, or for its call, up to 86400",
    )
    dial_accepted_s: float = Field(
        60.0,
        gt=0,
        le=86_400,
        description="seconds from a dial's acknowledgement to its call, up to 86400",
    )
    dial_silent_s: float = Field(
        3600.0,
        gt=0,
        le=86_400,
        description="the same for Click2Dial, which says nothing until the call is over, up to 86400",
    )
    dial_agent_s: float = Field(
        90.0, gt=0, le=86_400, description="seconds that the agent's own phone may ring, up to 86400"
    )
    dial_ringing_s: float = Field(
        180.0, gt=0, le=86_400, description="seconds that the number may be called, up to 86400"
    )
    dial_s: float = Field(
        14_400.0,
        gt=0,
        le=604_800,
        description="seconds of a whole dial with its conversation, up to 604800",
    )


class Log(_Section):
    """What is written to standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description='the least that is written: "debug", "info", "warning" or "error"'
    )
    format: Literal["json", "text"] = Field("json", description='"json" for machines, "text" for a terminal')


class Settings(BaseSettings):
    """Everything that can be set. Made by `configuration.load` only; frozen."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        hide_input_in_errors=True,
    )

    store: Store = Store()
    environments: dict[str, Environment] = Field(
        default_factory=dict, description="at least one [environments.NAME]"
    )
    accounts: tuple[Account, ...] = Field((), description="[[accounts]] tables")
    accounts_file: Path | None = Field(None, description="a CSV file of accounts with a header row")
    noojee: dict[str, NoojeePbx] = Field(default_factory=dict, description="[noojee.NAME] tables")
    click2dial: dict[str, Click2DialPbx] = Field(default_factory=dict, description="[click2dial.NAME] tables")
    api: Api = Api()
    operations: Operations = Operations()
    limits: Limits = Limits()
    log: Log = Log()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the signature is pydantic's
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take what `configuration.load` merged and nothing else: it keeps where each value came from."""
        return (init_settings,)

    def spool_directory(self, environ: Mapping[str, str] = os.environ) -> Path:
        """Where the spool is: as set, else beside the bundled server's directory, else the state directory
        that systemd or XDG names."""
        if self.store.spool_dir is not None:
            return self.store.spool_dir
        if self.store.dsn is None:
            return self.store.data_dir.with_name(f"{self.store.data_dir.name}-spool")
        # systemd.exec(5): several are joined by colons. XDG Base Directory: relative ones are ignored.
        if given := environ.get("STATE_DIRECTORY", "").partition(":")[0]:
            return Path(given) / "spool"
        state = environ.get("XDG_STATE_HOME", "")
        home = Path(state) if state.startswith("/") else Path.home() / ".local" / "state"
        return home / "listener" / "spool"

    def environment(self, account: Account) -> Environment:
        """Give the environment of `account`; `configuration.load` has checked that there is one."""
        return self.environments[account.environment]

    def logs_agent_in(self, account: Account) -> bool:
        """True when the account's contact-centre session is to be started, which logs the agent in."""
        own = account.start_contact_center_session
        return self.environment(account).start_contact_center_session if own is None else own

    def may_dial(self, account: Account) -> bool:
        """True when this listener may dial by the account."""
        return self.environment(account).dials if account.dials is None else account.dials

    def anybody_dials(self) -> bool:
        """True when this listener may dial by anybody."""
        pbxs: tuple[NoojeePbx | Click2DialPbx, ...] = (*self.noojee.values(), *self.click2dial.values())
        known = [account for account in self.accounts if account.environment in self.environments]
        return any(pbx.dials for pbx in pbxs) or any(map(self.may_dial, known))

    def pbx_accounts(self) -> dict[str, tuple[str, str]]:
        """The accounts of PBXs: each name with its tenant, and the PBX's name."""
        pbxs: dict[str, NoojeePbx | Click2DialPbx] = {**self.noojee, **self.click2dial}
        return {
            account: (pbx.tenant, name) for name, pbx in pbxs.items() for account in pbx.extensions.values()
        }

    def login_headers(self, account: Account) -> dict[str, str]:
        """Give the headers that log `account` in, in clear: for the wire only, never for a log."""
        environment = self.environment(account)
        password = account.password.get_secret_value() if account.password else ""
        match environment.auth:
            case "basic":
                # RFC 7617, section 2: user-id and password joined by a colon; UTF-8 is what servers announce.
                pair = base64.b64encode(f"{account.login}:{password}".encode()).decode()
                own = {"Authorization": f"Basic {pair}"}
            case "bearer":
                token = password or (environment.token.get_secret_value() if environment.token else "")
                own = {"Authorization": f"Bearer {token}"}
            case "headers":
                own = {}
            case never:
                assert_never(never)
        given = {
            name: value.get_secret_value().replace("{login}", account.login).replace("{password}", password)
            for name, value in environment.headers.items()
        }
        return own | given


SECTIONS: dict[str, type[BaseModel]] = {
    "store": Store,
    "environments": Environment,
    "accounts": Account,
    "noojee": NoojeePbx,
    "click2dial": Click2DialPbx,
    "api": Api,
    "operations": Operations,
    "limits": Limits,
    "log": Log,
}
"""The model of each section of `Settings`; of a section that holds several, that of each of them."""
NAMED = ("environments", "noojee", "click2dial")
"""Sections of which there are several, each with a name."""
