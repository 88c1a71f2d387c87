"""Settings: TOML file < secrets directory < environment < flags, merged into one frozen `Settings`.

It decides what a setting is called, where its value came from, and whether all of them together can be
run with. It fails loudly and completely: `load` raises one `SettingsError` with a line for every problem,
each naming the file and line (or the variable, secret file or flag), the key, and the cure. It never
repeats a value in a message, so that no message can show a secret.

It refuses to know what the settings are for: no address is opened here and no password tried. Nothing
below the daemon imports this module; adapters take plain arguments.

Sources, the later wins, section by section:

1. the TOML file. Paths in it are relative to the file;
2. the secrets directory: one file per setting, named as the environment variable in any case
   (`listener_store__dsn`). systemd's `LoadCredential=` and Docker secrets both end as such a directory;
3. the environment: `LISTENER_OPERATIONS__PORT=9464`, sections joined by two underscores, lists as JSON;
4. flags: `--set operations.port=9464`.
"""

import base64
import csv
import difflib
import io
import ipaddress
import os
import re
import ssl
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, assert_never
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError as SourceError

from listener.errors import SettingsError

PREFIX = "LISTENER_"
RESERVED_VARIABLES = frozenset({"LISTENER_CONFIG", "LISTENER_SECRETS_DIR", "LISTENER_SAMPLES"})
"""Variables of ours that are no settings: where the settings are, and a switch of the tests."""

CONFIG_BYTES_MAX = 16 * 2**20
"""A larger configuration file is refused: it is the wrong file."""
ACCOUNTS_FILE_BYTES_MAX = 64 * 2**20
"""Some 500,000 accounts; a larger file is refused."""
REDIS_SCHEMES = ("redis://", "rediss://", "unix://")
SECRET_BYTES_MAX = 64 * 2**10
"""A larger secret file is refused: it is the wrong file."""
CA_BYTES_MAX = 4 * 2**20
"""Some thousand certificates, more than any system trusts; a larger file is refused."""
PROBLEMS_MAX = 50
"""Problems named in one message; the rest is counted, so that a broken file of thousands stays readable."""

DEMO_CONFIG = Path(".demo/listener.toml")
CONFIG_FILES = (Path("listener.toml"), Path("/etc/listener/listener.toml"), DEMO_CONFIG)
"""Where the configuration is looked for when neither -c nor LISTENER_CONFIG says; the demo's comes last,
so that questions can be asked after `make demo` with nothing configured."""

EXAMPLE = "deploy/listener.example.toml"

Key = tuple[str | int, ...]


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
    """One login whose calls are heard. After `load`, `password` holds the secret wherever it came from."""

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
    """Everything that can be set. Made by `load` only; frozen."""

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
        """Take what `load` merged and nothing else: it keeps where each value came from."""
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
        """Give the environment of `account`; `load` has checked that there is one."""
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


_SECTIONS: dict[str, type[BaseModel]] = {
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
_NAMED = ("environments", "noojee", "click2dial")
"""Sections of which there are several, each with a name."""
_PATHS: dict[str, tuple[str, ...]] = {
    name: tuple(key for key, info in model.model_fields.items() if "Path" in str(info.annotation))
    for name, model in _SECTIONS.items()
}


# ── Where a value came from ───────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Source:
    """One source's values, and a name for the place of each."""

    values: dict[str, Any]
    places: dict[Key, str] = field(default_factory=dict)


def _lines(text: str) -> dict[Key, int]:
    """Say on which line each key of a valid TOML text stands.

    tomllib tells no lines. But a statement (a header, or a key with its value) is the shortest run of
    lines that is valid TOML by itself, so tomllib also finds the statements, whatever they contain.
    """
    lines: dict[Key, int] = {}
    table: Key = ()
    array_lengths: dict[Key, int] = {}
    start, pending = 1, ""
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        start = start if pending else number
        pending += line
        try:
            statement = tomllib.loads(pending)
        except tomllib.TOMLDecodeError:
            continue
        opening = pending.lstrip()
        pending = ""
        if not statement:
            continue
        if opening.startswith("["):
            table = _header(statement, array_lengths, is_array=opening.startswith("[["))
            for end in range(1, len(table) + 1):
                lines.setdefault(table[:end], start)
        else:
            for key in _keys(statement):
                lines.setdefault((*table, *key), start)
    return lines


def _header(statement: dict[str, Any], array_lengths: dict[Key, int], *, is_array: bool) -> Key:
    path: Key = ()
    names: list[str] = []
    node: Any = statement
    while isinstance(node, dict) and node:
        (name, node), *_ = node.items()
        names.append(name)
    for name in names:
        path = (*path, name)
        last = len(names) == sum(isinstance(part, str) for part in path)
        if last and is_array:
            array_lengths[path] = array_lengths.get(path, 0) + 1
        if path in array_lengths:
            path = (*path, array_lengths[path] - 1)
    return path


def _keys(node: Any) -> Iterator[Key]:
    """Give the path of everything within a value, itself first."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in items:
        yield (name,)
        for key in _keys(value):
            yield (name, *key)


def _from_toml(path: Path) -> _Source:
    try:
        text = _read(path, CONFIG_BYTES_MAX)
    except _Unreadable as error:
        raise SettingsError(f"{path}: {error}; name another file with -c or LISTENER_CONFIG") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        # The message ends in "(at line 3, column 5)" or "(at end of document)".
        cause, _, at = str(error).partition(" (at ")
        line = at.removeprefix("line ").partition(",")[0] if at.startswith("line ") else text.count("\n")
        raise SettingsError(f"{path}:{line}: this is not TOML: {cause.lower()}; see {EXAMPLE}") from None
    _anchor(values, path.parent)
    return _Source(values, {key: f"{path}:{line}" for key, line in _lines(text).items()})


def _anchor(values: dict[str, Any], base: Path) -> None:
    """Make a file's paths relative to that file, in place; wrong shapes are left to be refused."""
    tables: list[tuple[Any, tuple[str, ...]]] = [(values, ("accounts_file",))]
    for name, keys in _PATHS.items():
        section = values.get(name)
        if name in _NAMED and isinstance(section, dict):
            tables += [(table, keys) for table in section.values()]
        elif name == "accounts" and isinstance(section, list):
            tables += [(table, keys) for table in section]
        else:
            tables.append((section, keys))
    for table, keys in tables:
        if isinstance(table, dict):
            for key in keys:
                if isinstance(table.get(key), str):
                    table[key] = str(base / Path(table[key]).expanduser())


def _from_variables(variables: Mapping[str, str], places: dict[str, str]) -> tuple[_Source, list[str]]:
    """Read what is given by name, in the environment or as files of a directory; both have one spelling.

    Also give the problems of those that are empty: what somebody forgot to fill in is no value.
    """
    empty = [
        f"{places[name]} is empty; give a value, or leave it out" for name in variables if not variables[name]
    ]
    variables = {name: value for name, value in variables.items() if value}
    source = EnvSettingsSource(Settings)
    source.env_vars = {name.lower(): value for name, value in variables.items()}
    try:
        values = source()
    except SourceError as error:
        cause = error.__cause__
        raise SettingsError(
            f"{_source_field(error, places)}: a list or section here must be JSON: {cause}"
        ) from None
    keys: dict[Key, str] = {}
    for name in variables:
        path: tuple[str, ...] = tuple(name.lower().removeprefix(PREFIX.lower()).split("__"))
        keys[path] = places[name]
    return _Source(values, keys), empty


def _source_field(error: SourceError, places: dict[str, str]) -> str:
    named = [place for name, place in places.items() if f'"{_top(name)}"' in str(error)]
    return named[0] if named else "environment"


def _top(variable: str) -> str:
    return variable.lower().removeprefix(PREFIX.lower()).split("__")[0]


def _environment_source(environ: Mapping[str, str]) -> tuple[_Source, list[str]]:
    ours = {
        name: value
        for name, value in environ.items()
        if name.startswith(PREFIX) and name not in RESERVED_VARIABLES and _top(name) in Settings.model_fields
    }
    return _from_variables(ours, {name: f"environment variable {name}" for name in ours})


def _secrets_source(directory: Path | None, said_by: str) -> tuple[_Source, list[str]]:
    """Read the secrets directory; also give the problems of files that were surely meant as settings."""
    if directory is None:
        return _Source({}), []
    if not directory.is_dir():
        raise SettingsError(f"{said_by}: {directory}: no such secrets directory")
    variables: dict[str, str] = {}
    places: dict[str, str] = {}
    problems: list[str] = []
    for path in sorted(directory.iterdir()):
        name = path.name.upper()
        if not path.is_file():
            continue
        if name.startswith(PREFIX) and _top(name) in Settings.model_fields:
            places[name] = f"secret file {path}"
            try:
                variables[name] = _read(path, SECRET_BYTES_MAX).strip()
            except _Unreadable as error:
                problems.append(f"{path}: {error}")
        elif name.startswith(PREFIX):
            problems.append(f"{path}: there is no such setting{_meant_setting(name, '__', 'listener_')}")
        elif "__" in name and _top(name) in Settings.model_fields:
            problems.append(f"{path}: a secret file needs the prefix: name it listener_{path.name}")
    source, empty = _from_variables(variables, places)
    return source, problems + empty


def _flags_source(overrides: Mapping[str, str]) -> tuple[_Source, list[str]]:
    """Read flags as if they were variables; also give the problems of those that set nothing."""
    flags = {PREFIX + dotted.upper().replace(".", "__"): dotted for dotted in overrides}
    problems = [
        f"flag --set {dotted}: there is no such setting{_meant_setting(name, '.')}"
        for name, dotted in flags.items()
        if _top(name) not in Settings.model_fields
    ]
    known = {name: overrides[dotted] for name, dotted in flags.items() if _top(name) in Settings.model_fields}
    source, empty = _from_variables(known, {name: f"flag --set {flags[name]}" for name in known})
    return source, problems + empty


def _unknown_variables(environ: Mapping[str, str], merged: dict[str, Any]) -> list[str]:
    """Name the LISTENER_ variables that set nothing: a misspelt one would otherwise be silently ignored."""
    referred = {value for key, value in _texts(merged) if key.endswith("_env")}
    return [
        f"environment variable {name}: there is no such setting{_meant_setting(name, '__', PREFIX)}"
        for name in sorted(environ)
        if name.startswith(PREFIX)
        and name not in RESERVED_VARIABLES
        and name not in referred
        and _top(name) not in Settings.model_fields
    ]


def _texts(node: Any) -> Iterator[tuple[str, str]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in items:
        if isinstance(value, str):
            yield str(name), value
        else:
            yield from _texts(value)


def _merge(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


# ── What is wrong, in words ───────────────────────────────────────────────────────────────────────────


def _meant(name: str, allowed: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else f"; known are {', '.join(allowed)}"


def _meant_setting(variable: str, joint: str, prefix: str = "") -> str:
    """Propose the setting that `variable` was meant to be, spelt as its source spells settings."""
    top, *below = variable.lower().removeprefix(PREFIX.lower()).split("__")
    section = next((name for name in _SECTIONS if top.startswith(f"{name}_")), None)
    if section:
        meant = [section, top.removeprefix(f"{section}_"), *below]
    elif close := difflib.get_close_matches(top, Settings.model_fields, n=1, cutoff=0.6):
        meant = [close[0], *below]
    else:
        return _meant(top, Settings.model_fields)
    named = prefix + (joint.join(meant).upper() if prefix.isupper() else joint.join(meant))
    return f'; did you mean "{named}"{" (two underscores)" if section and joint == "__" else ""}?'


def _table_of(key: Key) -> tuple[str, Mapping[str, Any]]:
    """Give the TOML name of the table that holds `key`, and the settings that it may hold."""
    match key:
        case (("environments" | "noojee" | "click2dial") as section, str(name), _, *_):
            return f"[{section}.{name}]", _SECTIONS[section].model_fields
        case ("accounts", int(), _, *_):
            return "[[accounts]]", Account.model_fields
        case (str(section), _, *_) if section in _SECTIONS:
            return f"[{section}]", _SECTIONS[section].model_fields
        case _:
            return "the top of the file", Settings.model_fields


def _sentence(kind: str, message: str, key: Key) -> str:
    """Say what is wrong with `key` and what to write instead; never what was written."""
    table, allowed = _table_of(key)
    name = str(key[-1])
    if kind == "extra_forbidden":
        homes = [f"[{other}]" for other, model in _SECTIONS.items() if name in model.model_fields]
        moved = f"; it belongs to {' or '.join(homes)}" if homes else _meant(name, allowed)
        where = f"in {table}" if table.startswith("[") else f"at {table}"
        return f'there is no setting "{name}" {where}{moved}'
    setting = next((str(part) for part in reversed(key) if part in allowed), name)
    cure = allowed[setting].description if setting in allowed else None
    if kind == "missing":
        return f"{table} lacks {name}: {cure}"
    called = f"[[accounts]] {name}" if key[0] == "accounts" and len(key) > 2 else ".".join(map(str, key))
    if kind.startswith("bool_"):
        return f"{called} must be true or false ({cure})"
    if kind in ("int_parsing", "float_parsing"):
        return f"{called} must be a {'whole ' if kind == 'int_parsing' else ''}number; write {cure}"
    if kind == "string_too_short":
        return f"{called} is empty; write {cure}"
    said = message.removeprefix("Value error, ").removeprefix("Input ")
    return f"{called}: {said}{f'; write {cure}' if cure else ''}"


def _as_key(loc: tuple[int | str, ...]) -> Key:
    """Drop what pydantic adds to a location for a union or a mapping's key."""
    return tuple(part for part in loc if part != "[key]")


# ── The files that settings point to ──────────────────────────────────────────────────────────────────


class _Unreadable(Exception):
    """Why a file could not be read, as the rest of a sentence."""


def _read(path: Path, bytes_max: int) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(bytes_max + 1)
    except OSError as error:
        raise _Unreadable(f"it cannot be read ({error.strerror or error})") from None
    if len(content) > bytes_max:
        raise _Unreadable(f"it is larger than {bytes_max} bytes, so it is the wrong file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _Unreadable("it is not UTF-8 text") from None


def _secret(
    holder: Mapping[str, Any], name: str, environ: Mapping[str, str]
) -> tuple[SecretStr | None, str | None]:
    """Find a secret given as NAME, NAME_file or NAME_env; give it, or why it cannot be had."""
    given = [key for key in (name, f"{name}_file", f"{name}_env") if holder.get(key) not in (None, {}, "")]
    if len(given) > 1:
        return None, f"{' and '.join(given)} are both given; keep one"
    match given:
        case [key] if key.endswith("_file"):
            try:
                text = _read(holder[key], SECRET_BYTES_MAX).strip()
            except _Unreadable as error:
                return None, f"{key} {holder[key]}: {error}"
            return (SecretStr(text), None) if text else (None, f"{key} {holder[key]} is empty")
        case [key] if key.endswith("_env"):
            text = environ.get(holder[key], "")
            state = "empty" if holder[key] in environ else "not set"
            return (
                (SecretStr(text), None) if text else (None, f"{key}: the variable {holder[key]} is {state}")
            )
        case [key] if isinstance(holder[key], SecretStr) and not holder[key].get_secret_value():
            return None, f"{key} is empty; write it, or leave it out"
        case [key]:
            return holder[key], None
        case _:
            return None, None


@dataclass
class _Loading:
    """One run of `load` after the merge: what is known so far, and every problem met."""

    settings: Settings
    environ: Mapping[str, str]
    places: list[_Source]
    problems: list[str]

    def problem(self, key: Key, sentence: str) -> None:
        self.problems.append(f"{_place(self.places, key)}: {sentence}")

    def environments(self) -> dict[str, Environment]:
        resolved = {}
        for name, environment in self.settings.environments.items():
            given = dict(environment)
            token, why = _secret(given, "token", self.environ)
            if why:
                self.problem(("environments", name), why)
            headers = environment.headers
            if environment.headers_file or environment.headers_env:
                text, why = _secret(given, "headers", self.environ)
                if why:
                    self.problem(("environments", name), why)
                elif text is not None:
                    headers = self._header_lines(("environments", name), text.get_secret_value())
            if environment.auth == "headers" and not headers and not why:
                self.problem(
                    ("environments", name), 'auth = "headers" needs headers, headers_file or headers_env'
                )
            self._placeholders(name, headers)
            self._authority(("environments", name), environment.ca_file)
            resolved[name] = environment.model_copy(update={"token": token, "headers": headers})
        return resolved

    def _placeholders(self, name: str, headers: Mapping[str, SecretStr]) -> None:
        for title, value in headers.items():
            if set(re.findall(r"\{(\w*)\}", value.get_secret_value())) - {"login", "password"}:
                self.problem(
                    ("environments", name, "headers"),
                    f"the header {title} has a {{…}} that is neither {{login}} nor {{password}}",
                )

    def _authority(self, key: Key, path: Path | None) -> None:
        if path is None:
            return
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=_read(path, CA_BYTES_MAX))
        except _Unreadable as error:
            self.problem((*key, "ca_file"), f"ca_file {path}: {error}")
        except (ssl.SSLError, ValueError):
            self.problem(
                (*key, "ca_file"),
                f"ca_file {path}: no certificates can be read from it; it must be PEM (BEGIN CERTIFICATE)",
            )

    def _header_lines(self, key: Key, text: str) -> dict[str, SecretStr]:
        headers = {}
        for number, line in enumerate(filter(None, map(str.strip, text.splitlines())), 1):
            title, colon, value = line.partition(":")
            if not colon or not title.strip():
                self.problem(key, f'line {number} of the given headers is no "Name: value"')
                continue
            headers[title.strip()] = SecretStr(value.strip())
        return headers

    def accounts(self, environments: Mapping[str, Environment]) -> tuple[Account, ...]:
        found = [
            (_place(self.places, ("accounts", index)), account)
            for index, account in enumerate(self.settings.accounts)
        ]
        if self.settings.accounts_file is not None:
            found += self._accounts_file(self.settings.accounts_file)
        accounts: dict[tuple[str, str], tuple[str, Account]] = {}
        names: dict[str, str] = {}
        for place, given in found:
            account = given if given.name else given.model_copy(update={"name": given.login})
            password, why = _secret(dict(account), "password", self.environ)
            problem = why or self._account_problem(account, password, environments)
            identity = (account.environment, account.login)
            if identity in accounts:
                first, _ = accounts[identity]
                problem = f"{account.login} is already an account of {account.environment}, at {first}"
            elif account.name in names:
                problem = (
                    f"the name {account.name} is taken at {names[account.name]}; give this one another name"
                )
            if problem:
                self.problems.append(f"{place}: {problem}")
            names[account.name] = place
            accounts[identity] = (place, account.model_copy(update={"password": password}))
        return tuple(account for _, account in accounts.values())

    @staticmethod
    def _account_problem(
        account: Account, password: SecretStr | None, environments: Mapping[str, Environment]
    ) -> str | None:
        environment = environments.get(account.environment)
        if environment is None:
            return (
                f'account {account.login}: there is no [environments."{account.environment}"]'
                f"{_meant(account.environment, environments) if environments else '; write one'}"
            )
        if environment.auth == "basic" and password is None:
            return f"account {account.login} lacks password_file, password_env or password"
        if environment.auth == "bearer" and password is None and environment.token is None:
            return (
                f"account {account.login} has no bearer token: "
                "give it a password_file, or the environment a token_file"
            )
        return None

    def _accounts_file(self, path: Path) -> list[tuple[str, Account]]:
        try:
            text = _read(path, ACCOUNTS_FILE_BYTES_MAX)
        except _Unreadable as error:
            self.problem(("accounts_file",), f"accounts_file {path}: {error}")
            return []
        reader = csv.reader(io.StringIO(text), strict=True)
        try:
            header = [title.strip() for title in next(reader, [])]
            if unknown := [title for title in header if title not in Account.model_fields]:
                sentence = f'there is no column "{unknown[0]}"{_meant(unknown[0], Account.model_fields)}'
                self.problems.append(f"{path}:1: {sentence}")
                return []
            if twice := [title for index, title in enumerate(header) if title in header[:index]]:
                self.problems.append(f'{path}:1: the column "{twice[0]}" is there twice; keep one')
                return []
            if lacking := [title for title in ("environment", "login") if title not in header]:
                self.problems.append(f"{path}:1: the header row lacks the column {lacking[0]}")
                return []
            return list(self._rows(path, header, reader))
        except csv.Error as error:
            self.problems.append(f"{path}:{reader.line_num}: this is not CSV: {error}")
            return []

    def _rows(self, path: Path, header: list[str], reader: Any) -> Iterator[tuple[str, Account]]:
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if not any(map(str.strip, row)):
                continue
            if len(row) != len(header):
                self.problems.append(f"{place}: {len(row)} values for {len(header)} columns")
                continue
            given: dict[str, Any] = {
                title: value for title, value in zip(header, row, strict=True) if value.strip()
            }
            if "password_file" in given:
                given["password_file"] = path.parent / Path(given["password_file"]).expanduser()
            try:
                yield place, Account.model_validate(given)
            except ValidationError as error:
                for detail in error.errors(include_input=False, include_url=False, include_context=False):
                    sentence = _sentence(detail["type"], detail["msg"], ("accounts", 0, *detail["loc"]))
                    self.problems.append(f"{place}: {_of_row(sentence)}")

    def noojee(self) -> dict[str, NoojeePbx]:
        resolved = {}
        for name, pbx in self.settings.noojee.items():
            key = ("noojee", name)
            api_key = self._taken(key, dict(pbx), "api_key")
            if api_key is None and not self._given(dict(pbx), "api_key"):
                self.problem(key, f"[noojee.{name}] lacks api_key_file, api_key_env or api_key")
            if not pbx.base_url.startswith("https://") and not _is_loopback(_host(pbx.base_url)):
                self.problem(
                    (*key, "base_url"),
                    "the API key would go over the network in clear: write https:// (Noojee requires it)",
                )
            self._pbx_name(key, name)
            self._authority(key, pbx.ca_file)
            resolved[name] = pbx.model_copy(update={"api_key": api_key})
        return resolved

    def click2dial(self) -> dict[str, Click2DialPbx]:
        resolved = {}
        for name, pbx in self.settings.click2dial.items():
            key = ("click2dial", name)
            given = dict(pbx)
            headers = pbx.headers
            if text := self._taken(key, given, "headers") if self._given(given, "headers_") else None:
                headers = self._header_lines(key, text.get_secret_value())
            redis_url = self._taken(key, given, "redis_url")
            if redis_url is not None and not redis_url.get_secret_value().startswith(REDIS_SCHEMES):
                self.problem(key, "redis_url must begin with redis://, rediss:// or unix://")
            webhook_token = self._taken(key, given, "webhook_token")
            if pbx.dials and not (self._given(given, "redis_url") or self._given(given, "webhook_token")):
                self.problem(
                    key,
                    f"[click2dial.{name}] dials and hears of no end; give it a redis_url_file or a "
                    "webhook_token_file",
                )
            if name in self.settings.noojee:
                self.problem(key, f"the name {name} is also a [noojee.{name}]; give one of them another")
            self._pbx_name(key, name)
            self._authority(key, pbx.ca_file)
            resolved[name] = pbx.model_copy(
                update={"headers": headers, "redis_url": redis_url, "webhook_token": webhook_token}
            )
        return resolved

    def pbx_accounts(self, accounts: Iterable[Account]) -> None:
        """An account is at one system: else nobody could say through which a call of it went."""
        owners = {account.name: f"[[accounts]] {account.login}" for account in accounts}
        pbxs: dict[Key, NoojeePbx | Click2DialPbx] = {
            **{("noojee", name): pbx for name, pbx in self.settings.noojee.items()},
            **{("click2dial", name): pbx for name, pbx in self.settings.click2dial.items()},
        }
        for key, pbx in pbxs.items():
            for name in sorted(set(pbx.extensions.values())):
                if name in owners:
                    self.problem(
                        (*key, "extensions"),
                        f"the account {name} is taken by {owners[name]}; give another name",
                    )
                owners[name] = f"[{key[0]}.{key[1]}]"

    def _pbx_name(self, key: Key, name: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            self.problem(key, f"the name {name!r} is part of addresses; write letters, digits, . _ and -")
        elif name in self.settings.environments:
            self.problem(key, f"the name {name} is also an [environments.{name}]; give one of them another")

    @staticmethod
    def _given(holder: Mapping[str, Any], name: str) -> bool:
        return any(value not in (None, {}, "") for field_, value in holder.items() if field_.startswith(name))

    def _taken(self, key: Key, holder: Mapping[str, Any], name: str) -> SecretStr | None:
        """The secret given as NAME, NAME_file or NAME_env; None where none is, or a problem was noted."""
        value, why = _secret(holder, name, self.environ)
        if why:
            self.problem(key, why)
        return value

    def api(self, settings: Settings) -> Api:
        api = settings.api
        token = self._taken(("api",), dict(api), "token")
        if token is None and not self._given(dict(api), "token") and settings.anybody_dials():
            self.problem(
                ("api",),
                "something here has dials = true, and [api] has no token, so nobody could ask for a dial; "
                "set api.token_file, or leave dials out",
            )
        return api.model_copy(update={"token": token})

    def operations(self) -> Operations:
        operations = self.settings.operations
        token, why = _secret(dict(operations), "token", self.environ)
        if why:
            self.problem(("operations",), why)
        elif token is None and not _is_loopback(operations.host):
            self.problem(
                ("operations", "host"),
                f"operations.host {operations.host} is not loopback, so anybody there could read everything; "
                "set operations.token_file, or host to 127.0.0.1",
            )
        return operations.model_copy(update={"token": token})


def _of_row(sentence: str) -> str:
    """Say of a row of the accounts file what `_sentence` said of a table."""
    return sentence.replace("[[accounts]] lacks", "this row lacks").removeprefix("[[accounts]] ")


def _without(values: Mapping[str, Any], key: Key) -> dict[str, Any]:
    """Give `values` without the one at `key`, or without what is there in the place of its table."""
    first, *rest = map(str, key)
    below = values.get(first)
    kept = {name: value for name, value in values.items() if name != first}
    if rest and isinstance(below, dict) and rest[0] in below:
        kept[first] = _without(below, tuple(rest))
    return kept


def _host(url: str) -> str:
    """The host of an address that was checked."""
    return urlsplit(url).hostname or ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _place(sources: list[_Source], key: Key) -> str:
    """Name where `key` was said, the strongest source first; for a key nobody said, the table above it."""
    for end in range(len(key), 0, -1):
        for source in sources:
            if key[:end] in source.places:
                return source.places[key[:end]]
    return next(
        (place for source in sources for place in source.places.values() if source.values), "settings"
    )


def _refuse(problems: list[str]) -> None:
    if problems:
        rest = [f"and {len(problems) - PROBLEMS_MAX} problems more"] if len(problems) > PROBLEMS_MAX else []
        raise SettingsError("\n".join(problems[:PROBLEMS_MAX] + rest))


def find(given: Path | None, environ: Mapping[str, str]) -> Path | None:
    """Say which configuration file to read: `given`, else LISTENER_CONFIG, else the first of CONFIG_FILES.

    None means that there is none, which is no error: everything has a default, the accounts excepted.
    """
    if given is not None:
        return given
    if named := environ.get("LISTENER_CONFIG"):
        return Path(named)
    return next((path for path in CONFIG_FILES if path.is_file()), None)


def load(
    path: Path | None,
    overrides: Mapping[str, str] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    secrets_dir: Path | None = None,
) -> Settings:
    """Read every source, check all of it, and give the settings with every secret and account in place.

    `path` is the TOML file, or None for none (see `find`). `overrides` are flags as typed, keyed by
    dotted path ("operations.port"). `secrets_dir` falls back on LISTENER_SECRETS_DIR and systemd's
    CREDENTIALS_DIRECTORY. Raises SettingsError, whose message has a line for every problem found. Reads
    files, also on every reload; opens no connection.
    """
    environ = os.environ if environ is None else environ
    said_by = "--secrets-dir"
    for variable in ("LISTENER_SECRETS_DIR", "CREDENTIALS_DIRECTORY"):
        if secrets_dir is None and environ.get(variable):
            secrets_dir, said_by = Path(environ[variable]), f"environment variable {variable}"
    toml = _Source({}) if path is None else _from_toml(path)
    flags, problems = _flags_source(overrides or {})
    secrets, unusable = _secrets_source(secrets_dir, said_by)
    variables, empty = _environment_source(environ)
    problems += unusable + empty
    sources = [flags, variables, secrets, toml]
    merged: dict[str, Any] = {}
    for source in reversed(sources):
        merged = _merge(merged, source.values)
    problems += _unknown_variables(environ, merged)
    wrong: list[Key] = []
    try:
        settings = Settings(**merged)
    except ValidationError as error:
        for detail in error.errors(include_input=False, include_url=False, include_context=False):
            wrong.append(key := _as_key(detail["loc"]))
            problems.append(f"{_place(sources, key)}: {_sentence(detail['type'], detail['msg'], key)}")
        # What does not depend on the wrong values is checked all the same: a site mends all of it at once.
        for key in wrong:
            merged = _without(merged, key[:1] if key[0] in (*_NAMED, "accounts") else key)
        try:
            settings = Settings(**merged)
        except ValidationError:
            _refuse(problems)
            raise
    loading = _Loading(settings, environ, sources, problems)
    broken = {key[0] for key in wrong}
    checked: dict[str, Any] = {}
    if not broken & {"environments", "accounts"}:
        checked["environments"] = loading.environments()
        checked["accounts"] = loading.accounts(checked["environments"])
    if not broken & {"environments", "accounts", "noojee", "click2dial"}:
        loading.pbx_accounts(checked["accounts"])
    if "noojee" not in broken:
        checked["noojee"] = loading.noojee()
    if "click2dial" not in broken:
        checked["click2dial"] = loading.click2dial()
    if not any(key[0] == "operations" and str(key[-1]).startswith("token") for key in wrong):
        checked["operations"] = loading.operations()
    if not any(key[0] == "api" and str(key[-1]).startswith("token") for key in wrong):
        checked["api"] = loading.api(settings.model_copy(update=checked))
    _refuse(problems)
    return settings.model_copy(update=checked)
