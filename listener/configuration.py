"""How settings are read: TOML file < secrets directory < environment < flags, merged into one `Settings`.

It decides which file is read, where each value came from, and whether all of them together can be run with.
It fails loudly and completely: `load` raises one `SettingsError` with a line for every problem, each naming
the file and line (or the variable, secret file or flag), the key, and the cure. What is wrong is taken out
and the rest is checked all the same, so that one run tells everything; but what may only follow from what is
wrong is not told (`_Found.doubtful`). It never repeats a value in a message, so that no message can show a
secret.

It refuses to know what a value may be by itself (that is `listener.settings`), and what the settings are for:
files that they point to are read, but no address is opened here and no password tried. The daemon does not
import this module: it is given settings, and a function that reads them anew.

Sources, the later wins, section by section:

1. the TOML file. Paths in it are relative to the file;
2. the secrets directory: one file per setting, named as the environment variable in any case
   (`listener_store__dsn`). systemd's `LoadCredential=` and Docker secrets both end as such a directory;
3. the environment: `LISTENER_OPERATIONS__PORT=9464`, sections joined by two underscores, lists as JSON;
4. flags: `--set operations.port=9464`.
"""

import copy
import csv
import difflib
import io
import ipaddress
import os
import re
import ssl
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_settings import EnvSettingsSource
from pydantic_settings.exceptions import SettingsError as SourceError

from listener.errors import SettingsError
from listener.settings import (
    NAMED,
    PREFIX,
    REDIS_SCHEMES,
    SECTIONS,
    Account,
    Api,
    Click2DialPbx,
    Environment,
    NoojeePbx,
    Operations,
    Settings,
)

RESERVED_VARIABLES = frozenset({"LISTENER_CONFIG", "LISTENER_SECRETS_DIR", "LISTENER_SAMPLES"})
"""Variables of ours that are no settings: where the settings are, and a switch of the tests."""

CONFIG_BYTES_MAX = 16 * 2**20
"""A larger configuration file is refused: it is the wrong file."""
ACCOUNTS_FILE_BYTES_MAX = 64 * 2**20
"""Some 500,000 accounts; a larger file is refused."""
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

NO_ACCOUNT = (
    f"there is no account to listen to: write a listener.toml after {EXAMPLE}, "
    "or see it all work with `make demo`"
)

LIKENESS_MIN = 0.6
"""From which likeness on (difflib's ratio, 0 to 1) a name that nobody knows may be meant to be another."""
LIKENESS_SURE = 0.8
"""From which likeness on a table that nobody knows is checked as the one that it may be meant to be."""

Key = tuple[str | int, ...]

_PATHS: dict[str, tuple[str, ...]] = {
    name: tuple(key for key, info in model.model_fields.items() if "Path" in str(info.annotation))
    for name, model in SECTIONS.items()
}


# ── Where a value came from ───────────────────────────────────────────────────────────────────────────


class _Kind(IntEnum):
    """Kinds of places, in the order in which they are told."""

    CONFIGURATION = 0
    ACCOUNTS_FILE = 1
    SECRET = 2
    VARIABLE = 3
    FLAG = 4


@dataclass(frozen=True, order=True)
class _Place:
    """Where something was said: a file with its line, or whatever else a setting can come from."""

    kind: _Kind
    name: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.line}" if self.line else self.name


@dataclass(frozen=True)
class _Source:
    """One source's values, and the place of each."""

    values: dict[str, Any]
    places: dict[Key, _Place] = field(default_factory=dict)
    tables: dict[Key, _Place] = field(default_factory=dict)
    """Of tables that nobody opened: where one of their settings was said."""


@dataclass
class _Found:
    """Every problem met so far, and what is not known because of them."""

    problems: list[tuple[_Place, str]] = field(default_factory=list)
    blind: bool = False
    """A whole source could not be read, and whatever is missed may be in it."""
    _wrong: dict[Key, set[str | int]] = field(default_factory=dict)

    def problem(self, place: _Place, sentence: str) -> None:
        """Note one; `sentence` says what is wrong, and the cure."""
        self.problems.append((place, sentence))

    def doubt(self, key: Key) -> None:
        """What `key` was to be is not known."""
        self._wrong.setdefault(key[:-1], set()).add(key[-1])

    def doubtful(self, table: Key, *names: str) -> bool:
        """Whether one of these settings of a table may be other than it seems, because it or the table is
        wrong: then nothing is told that may only follow."""
        keys = [(*table, name) for name in names] if self._wrong else []
        return any(key[end] in self._wrong.get(key[:end], ()) for key in keys for end in range(len(key)))

    def refuse(self) -> None:
        """Raise SettingsError if there is any problem: sorted by file and line, then the other sources."""
        problems = sorted(self.problems, key=lambda problem: problem[0])
        # A line each, whatever the names in it are.
        told = [" ".join(f"{place}: {said}".split()) for place, said in problems]
        rest = [f"and {len(told) - PROBLEMS_MAX} problems more"] if len(told) > PROBLEMS_MAX else []
        if told:
            raise SettingsError("\n".join(told[:PROBLEMS_MAX] + rest))


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


def _from_toml(path: Path, found: _Found) -> _Source:
    try:
        text = _read(path, CONFIG_BYTES_MAX)
    except _Unreadable as error:
        found.blind = True
        found.problem(
            _Place(_Kind.CONFIGURATION, str(path)),
            f"{error.cause}; name another file with -c or LISTENER_CONFIG",
        )
        return _Source({})
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        # The message ends in "(at line 3, column 5)" or "(at end of document)".
        cause, _, at = str(error).partition(" (at ")
        line = at.removeprefix("line ").partition(",")[0] if at.startswith("line ") else text.count("\n")
        found.blind = True
        found.problem(
            _Place(_Kind.CONFIGURATION, str(path), int(line)),
            f"this is not TOML: {cause.lower()}; see {EXAMPLE}",
        )
        return _Source({})
    places = {key: _Place(_Kind.CONFIGURATION, str(path), line) for key, line in _lines(text).items()}
    source = _Source(values, places)
    for name in [name for name in values if name not in Settings.model_fields]:
        for section in difflib.get_close_matches(name, SECTIONS, n=1, cutoff=LIKENESS_SURE):
            _respell(source, name, section, found)
    _anchor(values, path.parent)
    return source


def _respell(source: _Source, name: str, section: str, found: _Found) -> None:
    """Say that a table's name is misspelt, and put what it holds where it was meant to be: what is wrong in
    it is told too, and nothing that only follows. What cannot have been meant so stays, and is refused."""
    values, first = source.values, 0
    given, meant = values[name], values.get(section)
    if section == "accounts":
        if not (isinstance(given, list) and _are_tables(given) and isinstance(meant, list | None)):
            return
        first = len(meant or [])
        values[section] = [*(meant or []), *given]
    else:
        if not (isinstance(given, dict) and isinstance(meant, dict | None)):
            return
        if section in NAMED and not _are_tables(given.values()):
            return
        values[section] = _merge(given, meant or {})
    del values[name]
    said = f'there is no setting "{name}" at the top of the file; did you mean "{section}"?'
    found.problem(_place([source], (name,)), said)
    for key, place in [(key, place) for key, place in source.places.items() if key[0] == name]:
        match key:
            case (_, int(number), *below):
                source.places[(section, first + number, *below)] = place
            case (_, *below):
                source.places.setdefault((section, *below), place)


def _are_tables(values: Iterable[Any]) -> bool:
    return all(isinstance(value, dict) for value in values)


def _anchor(values: dict[str, Any], base: Path) -> None:
    """Make a file's paths relative to that file, in place; wrong shapes are left to be refused."""
    tables: list[tuple[Any, tuple[str, ...]]] = [(values, ("accounts_file",))]
    for name, keys in _PATHS.items():
        section = values.get(name)
        if name in NAMED and isinstance(section, dict):
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


def _key_of(variable: str) -> Key:
    return tuple(variable.lower().removeprefix(PREFIX.lower()).split("__"))


def _from_variables(variables: Mapping[str, str], places: Mapping[str, _Place], found: _Found) -> _Source:
    """Read what is given by name: in the environment, as files of a directory or as flags, with one spelling.
    What somebody forgot to fill in is no value."""
    for name in [name for name in variables if not variables[name]]:
        found.problem(places[name], "it is empty; give a value, or leave it out")
        found.doubt(_key_of(name))
    variables = {name: value for name, value in variables.items() if value}
    source = EnvSettingsSource(Settings)
    while True:
        source.env_vars = {name.lower(): value for name, value in variables.items()}
        try:
            values = source()
        except SourceError as error:
            # One field at a time is told, by its name alone; without it the rest can be read.
            wrong = [name for name in variables if f'"{_top(name)}"' in str(error)]
            if not wrong:
                raise
            found.problem(
                places[wrong[0]],
                f'a list or section here must be JSON: {error.__cause__}; write ["…"] or {{"…": …}}',
            )
            found.doubt((_top(wrong[0]),))
            variables = {name: value for name, value in variables.items() if name not in wrong}
        else:
            keys = {_key_of(name): places[name] for name in variables}
            tables = {key[:end]: place for key, place in keys.items() for end in range(1, len(key))}
            return _Source(values, keys, tables)


def _top(variable: str) -> str:
    return variable.lower().removeprefix(PREFIX.lower()).split("__")[0]


def _environment_source(environ: Mapping[str, str], found: _Found) -> _Source:
    ours = {
        name: value
        for name, value in environ.items()
        if name.startswith(PREFIX) and name not in RESERVED_VARIABLES and _top(name) in Settings.model_fields
    }
    return _from_variables(ours, {name: _variable(name) for name in ours}, found)


def _variable(name: str) -> _Place:
    return _Place(_Kind.VARIABLE, f"environment variable {name}")


def _secrets_source(directory: Path | None, said_by: str, found: _Found) -> _Source:
    """Read the secrets directory; files that were surely meant as settings and are none are problems."""
    if directory is None:
        return _Source({})
    if not directory.is_dir():
        found.blind = True
        found.problem(
            _Place(_Kind.SECRET, said_by), f"there is no directory {directory}; name another, or leave it out"
        )
        return _Source({})
    variables: dict[str, str] = {}
    places: dict[str, _Place] = {}
    for path in sorted(directory.iterdir()):
        name = path.name.upper()
        place = _Place(_Kind.SECRET, f"secret file {path}")
        if not path.is_file():
            continue
        if name.startswith(PREFIX) and _top(name) in Settings.model_fields:
            try:
                variables[name], places[name] = _read(path, SECRET_BYTES_MAX).strip(), place
            except _Unreadable as error:
                found.problem(place, str(error))
                found.doubt(_key_of(name))
        elif name.startswith(PREFIX):
            found.problem(place, f"there is no such setting{_meant_setting(name, '__', 'listener_')}")
            found.doubt(_intended(name)[0] or (_top(name),))
        elif "__" in name and _top(name) in Settings.model_fields:
            found.problem(place, f"a secret file needs the prefix; name it listener_{path.name}")
            found.doubt(_key_of(name))
    return _from_variables(variables, places, found)


def _flags_source(overrides: Mapping[str, str], found: _Found) -> _Source:
    """Read flags as if they were variables."""
    known: dict[str, str] = {}
    places: dict[str, _Place] = {}
    for dotted, value in overrides.items():
        name = PREFIX + dotted.upper().replace(".", "__")
        places[name] = _Place(_Kind.FLAG, f"flag --set {dotted}")
        if _top(name) in Settings.model_fields:
            known[name] = value
        else:
            found.problem(places[name], f"there is no such setting{_meant_setting(name, '.')}")
            found.doubt(_intended(name)[0] or (_top(name),))
    return _from_variables(known, places, found)


def _unknown_variables(environ: Mapping[str, str], merged: dict[str, Any], found: _Found) -> None:
    """Name the LISTENER_ variables that set nothing: a misspelt one would otherwise be silently ignored."""
    referred = {value for key, value in _texts(merged) if key.endswith("_env")}
    for name in environ:
        if (
            name.startswith(PREFIX)
            and name not in RESERVED_VARIABLES
            and name not in referred
            and _top(name) not in Settings.model_fields
        ):
            found.problem(_variable(name), f"there is no such setting{_meant_setting(name, '__', PREFIX)}")
            found.doubt(_intended(name)[0] or (_top(name),))


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


def _like(name: str, names: Collection[str]) -> list[str]:
    """The name among `names` that is most like `name`, if any is."""
    return difflib.get_close_matches(name, names, n=1, cutoff=LIKENESS_MIN) if names else []


def _meant(name: str, allowed: Mapping[str, Any]) -> str:
    close = _like(name, allowed)
    return f'; did you mean "{close[0]}"?' if close else f"; known are {', '.join(allowed)}"


def _intended(variable: str) -> tuple[Key, bool]:
    """The setting that a variable's name, which is none, was meant to be, and whether an underscore is what
    it lacks; empty where nobody could tell."""
    top, *below = map(str, _key_of(variable))
    for section, model in SECTIONS.items():
        if top.startswith(f"{section}_"):
            name = top.removeprefix(f"{section}_")
            named = section in NAMED or name in model.model_fields
            return (section, *([name] if named else _like(name, model.model_fields) or [name]), *below), True
    close = _like(top, Settings.model_fields)
    return (close[0], *below) if close else (), False


def _meant_setting(variable: str, joint: str, prefix: str = "") -> str:
    """Propose the setting that `variable` was meant to be, spelt as its source spells settings."""
    intended, lacks_underscore = _intended(variable)
    if not intended:
        return _meant(_top(variable), Settings.model_fields)
    meant = joint.join(map(str, intended))
    named = prefix + (meant.upper() if prefix.isupper() else meant)
    return f'; did you mean "{named}"{" (two underscores)" if lacks_underscore and joint == "__" else ""}?'


def _table_of(key: Key) -> tuple[str, Mapping[str, Any]]:
    """Give the TOML name of the table that holds `key`, and the settings that it may hold."""
    match key:
        case (("environments" | "noojee" | "click2dial") as section, str(name), _, *_):
            return f"[{section}.{name}]", SECTIONS[section].model_fields
        case ("accounts", int(), _, *_):
            return "[[accounts]]", Account.model_fields
        case (str(section), _, *_) if section in SECTIONS:
            return f"[{section}]", SECTIONS[section].model_fields
        case _:
            return "the top of the file", Settings.model_fields


def _sentence(kind: str, message: str, key: Key) -> str:
    """Say what is wrong with `key` and what to write instead; never what was written."""
    table, allowed = _table_of(key)
    name = str(key[-1])
    if kind == "extra_forbidden":
        homes = [f"[{other}]" for other, model in SECTIONS.items() if name in model.model_fields]
        moved = f"; it belongs to {' or '.join(homes)}" if homes else _meant(name, allowed)
        where = f"in {table}" if table.startswith("[") else f"at {table}"
        return f'there is no setting "{name}" {where}{moved}'
    setting = next((str(part) for part in reversed(key) if part in allowed), name)
    cure = allowed[setting].description if setting in allowed else None
    if kind == "missing":
        return f"{table} lacks {name}: {cure}"
    called = f"[[accounts]] {name}" if key[0] == "accounts" and len(key) > 2 else ".".join(map(str, key))
    if kind == "model_type":
        heading = "[[accounts]]" if key[0] == "accounts" else f"[{called}]"
        return f"{called} is no table; write {heading} with its settings below"
    if kind.startswith("bool_"):
        return f"{called} must be true or false ({cure})"
    if kind in ("int_parsing", "float_parsing"):
        return f"{called} must be a {'whole ' if kind == 'int_parsing' else ''}number; write {cure}"
    if kind == "string_too_short":
        return f"{called} is empty; write {cure}"
    said = message.removeprefix("Value error, ").removeprefix("Input ")
    return f"{called}: {said}{f'; write {cure}' if cure and '; write ' not in said else ''}"


def _as_key(loc: tuple[int | str, ...]) -> Key:
    """Drop what pydantic adds to a location for a union or a mapping's key."""
    return tuple(part for part in loc if part != "[key]")


# ── What is left without what is wrong ────────────────────────────────────────────────────────────────

_STAND_IN = "https://unknown.invalid"
"""In the place of a value that must be there and is wrong, so that the rest of its table can be checked. Only
for that: whatever it is in is refused (RFC 2606: nobody has such a host)."""


def _checked(merged: dict[str, Any], sources: Sequence[_Source], found: _Found) -> tuple[Settings, list[int]]:
    """Settings, for which each value by itself was checked, and the number that each account had in its list.
    What is wrong is told, and left out as if nobody had said it."""
    try:
        return Settings(**merged), list(range(len(merged.get("accounts", ()))))
    except ValidationError as error:
        details = error.errors(include_input=False, include_url=False, include_context=False)
    keys = [_as_key(detail["loc"]) for detail in details]
    for detail, key in zip(details, keys, strict=True):
        if detail["type"] != "missing":
            known = _table_of(key)[1] if detail["type"] == "extra_forbidden" else ()
            meant = _like(str(key[-1]), known)
            found.doubt((*key[:-1], *meant) if meant else _setting(key))
    for detail, key in zip(details, keys, strict=True):
        # What is missing may be there under a wrong name, or in what could not be read.
        if detail["type"] == "missing":
            if found.blind or found.doubtful(key[:-1], str(key[-1])):
                continue
            found.doubt(key)
        found.problem(_place(sources, key), _sentence(detail["type"], detail["msg"], key))
    rest = copy.deepcopy(merged)
    for key in keys:
        _leave_out(rest, _setting(key))
    accounts = list(rest.get("accounts", ()))
    numbers = [number for number, account in enumerate(accounts) if account is not None]
    rest["accounts"] = [accounts[number] for number in numbers]
    for name in NAMED:
        for table in rest.get(name, {}).values():
            _stand_in(SECTIONS[name], table)
    for table in rest["accounts"]:
        _stand_in(Account, table)
    return Settings(**rest), numbers


def _setting(key: Key) -> Key:
    """The setting that holds what is at `key`."""
    return key[: 3 if key[0] in (*NAMED, "accounts") else 2]


def _leave_out(values: Any, key: Key) -> None:
    """Take what is at `key` out of `values`; a place in a list stays, empty."""
    *path, last = key
    for part in path:
        values = values.get(part) if isinstance(values, dict) else values[int(part)]
        if values is None:
            return
    if isinstance(values, dict):
        values.pop(last, None)
    else:
        values[int(last)] = None


def _stand_in(model: type[BaseModel], table: dict[str, Any]) -> None:
    for name, info in model.model_fields.items():
        if info.is_required():
            table.setdefault(name, _STAND_IN)


# ── The files that settings point to ──────────────────────────────────────────────────────────────────


class _Unreadable(Exception):
    """Why a file could not be read, and the cure, as the rest of a sentence."""

    def __init__(self, cause: str, cure: str) -> None:
        super().__init__(f"{cause}; {cure}")
        self.cause = cause


def _read(path: Path, bytes_max: int) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(bytes_max + 1)
    except OSError as error:
        raise _Unreadable(
            f"it cannot be read ({error.strerror or error})", "name a file that this user may read"
        ) from None
    if len(content) > bytes_max:
        raise _Unreadable(
            f"it is larger than {bytes_max} bytes, so it is the wrong file", "name the right one"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _Unreadable("it is not UTF-8 text", "save it as UTF-8") from None


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
            return (SecretStr(text), None) if text else (None, f"{key} {holder[key]} is empty; fill it in")
        case [key] if key.endswith("_env"):
            if text := environ.get(holder[key], ""):
                return SecretStr(text), None
            state = "empty" if holder[key] in environ else "not set"
            return None, f"{key}: the variable {holder[key]} is {state}; set it, or name another"
        case [key] if isinstance(holder[key], SecretStr) and not holder[key].get_secret_value():
            return None, f"{key} is empty; write it, or leave it out"
        case [key]:
            return holder[key], None
        case _:
            return None, None


def _spellings(name: str) -> tuple[str, str, str]:
    """How a secret may be given."""
    return name, f"{name}_file", f"{name}_env"


@dataclass
class _Loading:
    """One run of `load` after each value was checked: whether they go together, and what they point to."""

    settings: Settings
    numbers: list[int]
    """Which number each account has in its list."""
    names: Mapping[str, set[str]]
    """The names of all environments and PBXs, also of those that are wrong."""
    environ: Mapping[str, str]
    places: list[_Source]
    found: _Found
    accounts_given: bool = False
    """Whether anybody named an account, be it a wrong one; known after `accounts`."""

    def problem(self, key: Key, sentence: str) -> None:
        self.found.problem(_place(self.places, key), sentence)

    def environments(self) -> dict[str, Environment]:
        resolved = {}
        for name, environment in self.settings.environments.items():
            key = ("environments", name)
            token = self._taken(key, dict(environment), "token")
            headers = self._headers(key, environment)
            if (
                environment.auth == "headers"
                and not headers
                and not self.found.doubtful(key, "auth", *_spellings("headers"))
            ):
                self.problem(
                    key,
                    'auth = "headers" needs headers, headers_file or headers_env; give it one of them',
                )
            self._placeholders(name, headers)
            self._authority(key, environment.ca_file)
            resolved[name] = environment.model_copy(update={"token": token, "headers": headers})
        return resolved

    def _placeholders(self, name: str, headers: Mapping[str, SecretStr]) -> None:
        for title, value in headers.items():
            if set(re.findall(r"\{(\w*)\}", value.get_secret_value())) - {"login", "password"}:
                self.problem(
                    ("environments", name, "headers"),
                    f"the header {title} has a {{…}} that is neither {{login}} nor {{password}}; "
                    "write one of these",
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

    def _headers(self, key: Key, holder: Environment | Click2DialPbx) -> dict[str, SecretStr]:
        """The headers of every request, wherever they were given."""
        if not (holder.headers_file or holder.headers_env):
            return holder.headers
        text = self._taken(key, dict(holder), "headers")
        headers = {}
        lines = text.get_secret_value().splitlines() if text is not None else []
        for number, line in enumerate(filter(None, map(str.strip, lines)), 1):
            title, colon, value = line.partition(":")
            if not colon or not title.strip():
                self.problem(
                    key, f'line {number} of the given headers is no "Name: value"; write it like that'
                )
                self.found.doubt((*key, "headers"))
                continue
            headers[title.strip()] = SecretStr(value.strip())
        return headers

    def accounts(self, environments: Mapping[str, Environment]) -> tuple[Account, ...]:
        given: list[tuple[_Place, Key, Account]] = [
            (_place(self.places, ("accounts", number)), ("accounts", number), account)
            for number, account in zip(self.numbers, self.settings.accounts, strict=True)
        ]
        if self.settings.accounts_file is not None:
            given += self._accounts_file(self.settings.accounts_file)
        accounts: list[Account] = []
        identities: dict[tuple[str, str], _Place] = {}
        names: dict[str, _Place] = {}
        for place, key, account in given:
            doubtful = self.found.doubtful
            password = None
            problems = []
            if not doubtful(key, *_spellings("password")):
                password, why = _secret(dict(account), "password", self.environ)
                if why:
                    problems.append(why)
                    self.found.doubt((*key, "password"))
            problems += self._account_problems(account, key, password, environments)
            known = account if account.name else account.model_copy(update={"name": account.login})
            identity = None
            if not doubtful(key, "environment", "login"):
                identity = (account.environment, account.login)
            if identity is not None and identity in identities:
                # Whatever else is wrong with it goes with it.
                first = identities[identity]
                said = f"{account.login} is already an account of {account.environment}, at {first}"
                problems = [f"{said}; remove one of them"]
            elif not doubtful(key, "name", *() if account.name else ("login",)):
                if known.name in names:
                    problems.append(
                        f"the name {known.name} is taken at {names[known.name]}; give this one another name"
                    )
                names[known.name] = place
                accounts.append(known.model_copy(update={"password": password}))
            if identity is not None:
                identities.setdefault(identity, place)
            for problem in problems:
                self.found.problem(place, problem)
        self.accounts_given = bool(given)
        return tuple(accounts)

    def _account_problems(
        self,
        account: Account,
        key: Key,
        password: SecretStr | None,
        environments: Mapping[str, Environment],
    ) -> list[str]:
        """What an account lacks of its environment."""
        doubtful, name = self.found.doubtful, account.environment
        who = "this account" if doubtful(key, "login") else f"account {account.login}"
        if doubtful(key, "environment") or doubtful(("environments",), name):
            return []
        if name not in environments:
            known = dict.fromkeys(sorted(self.names["environments"]))
            cure = _meant(name, known) if known else "; write one"
            return [f'{who}: there is no [environments."{name}"]{cure}']
        environment, home = environments[name], ("environments", name)
        if password is not None or doubtful(key, *_spellings("password")) or doubtful(home, "auth"):
            return []
        if environment.auth == "basic":
            lack = "lacks password_file, password_env or password; give it one of them"
            return [f"{who} {lack}"]
        can_bear = environment.token is not None or doubtful(home, *_spellings("token"))
        if environment.auth == "bearer" and not can_bear:
            lack = "has no bearer token; give it a password_file, or the environment a token_file"
            return [f"{who} {lack}"]
        return []

    def _accounts_file(self, path: Path) -> list[tuple[_Place, Key, Account]]:
        try:
            text = _read(path, ACCOUNTS_FILE_BYTES_MAX)
        except _Unreadable as error:
            self.problem(("accounts_file",), f"accounts_file {path}: {error}")
            self.found.doubt(("accounts_file",))
            return []
        reader = csv.reader(io.StringIO(text), strict=True)
        rows: list[tuple[_Place, Key, Account]] = []
        try:
            header = [title.strip() for title in next(reader, [])]
            doubts = self._columns(path, header)
            for row in reader if header else ():  # what has no column has no rows
                rows += self._row(path, reader.line_num, header, row, doubts)
        except csv.Error as error:
            self.found.problem(
                _Place(_Kind.ACCOUNTS_FILE, str(path), reader.line_num),
                f"this is not CSV: {error}; write quotes and line breaks within quotes",
            )
            self.found.doubt(("accounts_file",))
        return rows

    def _columns(self, path: Path, header: list[str]) -> set[str]:
        """Check the header row; give what is not known of any row."""
        place = _Place(_Kind.ACCOUNTS_FILE, str(path), 1)
        unknown = [title for title in dict.fromkeys(header) if title not in Account.model_fields]
        for title in unknown:
            self.found.problem(place, f'there is no column "{title}"{_meant(title, Account.model_fields)}')
        twice = [title for title in dict.fromkeys(header) if header.count(title) > 1 and title not in unknown]
        for title in twice:
            self.found.problem(place, f'the column "{title}" is there twice; keep one')
        absent = [title for title in ("environment", "login") if title not in header]
        meant = {like for title in unknown for like in _like(title, Account.model_fields)}
        lacking = [title for title in absent if title not in meant]
        if lacking:
            columns = " and ".join(f"the column {title}" for title in lacking)
            self.found.problem(place, f"the header row lacks {columns}; add what is lacking")
            self.found.doubt(("accounts_file",))
        return {*twice, *absent, *meant, *unknown}

    def _row(
        self, path: Path, line: int, header: list[str], row: list[str], doubts: set[str]
    ) -> Iterator[tuple[_Place, Key, Account]]:
        """The account of a row, without what is wrong with it; none where nobody could tell which it is."""
        place, key = _Place(_Kind.ACCOUNTS_FILE, str(path), line), ("row", line)
        if not any(map(str.strip, row)):
            return
        if len(row) != len(header):
            self.found.problem(
                place,
                f"{len(row)} values for {len(header)} columns; write one for each, be it empty",
            )
            self.found.doubt(("accounts_file",))
            return
        given: dict[str, Any] = {
            title: value
            for title, value in zip(header, row, strict=True)
            if value.strip() and title not in doubts
        }
        if "password_file" in given:
            given["password_file"] = path.parent / Path(given["password_file"]).expanduser()
        for name in doubts:
            self.found.doubt((*key, name))
        try:
            yield place, key, Account.model_validate(given)
        except ValidationError as error:
            for detail in error.errors(include_input=False, include_url=False, include_context=False):
                if detail["loc"][0] in doubts:
                    continue
                sentence = _sentence(detail["type"], detail["msg"], ("accounts", 0, *detail["loc"]))
                self.found.problem(place, _of_row(sentence))
                self.found.doubt((*key, detail["loc"][0]))
                given.pop(str(detail["loc"][0]), None)
            _stand_in(Account, given)
            yield place, key, Account.model_validate(given)

    def is_deaf(self) -> bool:
        """Whether there is surely nobody to listen to."""
        pbxs = [(section, name) for section in ("noojee", "click2dial") for name in self.names[section]]
        return not (
            self.accounts_given
            or self.settings.pbx_accounts()
            or self.found.doubtful((), "accounts", "accounts_file", "noojee", "click2dial")
            or any(self.found.doubtful(key, "extensions") for key in pbxs)
        )

    def noojee(self) -> dict[str, NoojeePbx]:
        resolved = {}
        for name, pbx in self.settings.noojee.items():
            key = ("noojee", name)
            api_key = self._taken(key, dict(pbx), "api_key")
            if api_key is None and not self.found.doubtful(key, *_spellings("api_key")):
                self.problem(
                    key, f"[noojee.{name}] lacks api_key_file, api_key_env or api_key; give it one of them"
                )
            if not pbx.base_url.startswith("https://") and not _is_loopback(_host(pbx.base_url)):
                self.problem(
                    (*key, "base_url"),
                    "the API key would go over the network in clear; write https:// (Noojee requires it)",
                )
            self._pbx_name(key, name)
            self._authority(key, pbx.ca_file)
            resolved[name] = pbx.model_copy(update={"api_key": api_key})
        return resolved

    def click2dial(self) -> dict[str, Click2DialPbx]:
        resolved = {}
        for name, pbx in self.settings.click2dial.items():
            key = ("click2dial", name)
            headers = self._headers(key, pbx)
            redis_url = self._taken(key, dict(pbx), "redis_url")
            if redis_url is not None and not redis_url.get_secret_value().startswith(REDIS_SCHEMES):
                self.problem(
                    key, "redis_url must begin with another scheme; write redis://, rediss:// or unix://"
                )
            webhook_token = self._taken(key, dict(pbx), "webhook_token")
            hears = redis_url is not None or webhook_token is not None
            ways = (*_spellings("redis_url"), *_spellings("webhook_token"))
            if pbx.dials and not hears and not self.found.doubtful(key, *ways):
                self.problem(
                    key,
                    f"[click2dial.{name}] dials and hears of no end; give it a redis_url_file or a "
                    "webhook_token_file",
                )
            if name in self.names["noojee"]:
                self.problem(key, f"the name {name} is also a [noojee.{name}]; give one of them another")
            self._pbx_name(key, name)
            self._authority(key, pbx.ca_file)
            resolved[name] = pbx.model_copy(
                update={"headers": headers, "redis_url": redis_url, "webhook_token": webhook_token}
            )
        return resolved

    def pbx_accounts(self, accounts: Iterable[Account]) -> None:
        """An account is at one system: else nobody could say through which a call of it went."""
        owners = {account.name: f"[[accounts]] {account.name}" for account in accounts}
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
        elif name in self.names["environments"]:
            self.problem(key, f"the name {name} is also an [environments.{name}]; give one of them another")

    def _taken(self, key: Key, holder: Mapping[str, Any], name: str) -> SecretStr | None:
        """The secret given as NAME, NAME_file or NAME_env; None where none is, or where it is not known."""
        if self.found.doubtful(key, *_spellings(name)):
            return None
        value, why = _secret(holder, name, self.environ)
        if why:
            self.problem(key, why)
            self.found.doubt((*key, name))
        return value

    def api(self, settings: Settings) -> Api:
        api = settings.api
        token = self._taken(("api",), dict(api), "token")
        if (
            token is None
            and not self.found.doubtful(("api",), *_spellings("token"))
            and settings.anybody_dials()
        ):
            self.problem(
                self._dialling(settings),
                "something here has dials = true, and [api] has no token, so nobody could ask for a dial; "
                "set api.token_file, or leave dials out",
            )
        return api.model_copy(update={"token": token})

    def _dialling(self, settings: Settings) -> Key:
        """A key that lets somebody dial; of an accounts file, that of the file."""
        named = (
            (section, name, table) for section in NAMED for name, table in getattr(settings, section).items()
        )
        keys: list[Key] = [(section, name, "dials") for section, name, table in named if table.dials]
        keys += [
            ("accounts", number, "dials")
            for number, account in zip(self.numbers, self.settings.accounts, strict=True)
            if account.dials
        ]
        return min(keys, key=lambda key: _place(self.places, key), default=("accounts_file",))

    def operations(self) -> Operations:
        operations = self.settings.operations
        token = self._taken(("operations",), dict(operations), "token")
        if (
            token is None
            and not _is_loopback(operations.host)
            and not self.found.doubtful(("operations",), *_spellings("token"))
        ):
            self.problem(
                ("operations", "host"),
                f"operations.host {operations.host} is not loopback, so anybody there could read everything; "
                "set operations.token_file, or host to 127.0.0.1",
            )
        return operations.model_copy(update={"token": token})


def _of_row(sentence: str) -> str:
    """Say of a row of the accounts file what `_sentence` said of a table."""
    return sentence.replace("[[accounts]] lacks", "this row lacks").removeprefix("[[accounts]] ")


def _host(url: str) -> str:
    """The host of an address that was checked."""
    return urlsplit(url).hostname or ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _place(sources: Sequence[_Source], key: Key) -> _Place:
    """Where `key` was said, the strongest source first; for a key nobody said, its table."""
    for end in range(len(key), 0, -1):
        for places in (*(each.places for each in sources), *(each.tables for each in sources)):
            if key[:end] in places:
                return places[key[:end]]
    return _Place(_Kind.CONFIGURATION, "settings")


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
    listens: bool = False,
) -> Settings:
    """Read every source, check all of it, and give the settings with every secret and account in place.

    `path` is the TOML file, or None for none (see `find`). `overrides` are flags as typed, keyed by
    dotted path ("operations.port"). `secrets_dir` falls back on LISTENER_SECRETS_DIR and systemd's
    CREDENTIALS_DIRECTORY. With `listens`, settings that name no account are a problem too. Raises
    SettingsError, whose message has a line for every problem found, sorted by file and line. Reads files,
    also on every reload; opens no connection.
    """
    environ = os.environ if environ is None else environ
    said_by = "--secrets-dir"
    for variable in ("LISTENER_SECRETS_DIR", "CREDENTIALS_DIRECTORY"):
        if secrets_dir is None and environ.get(variable):
            secrets_dir, said_by = Path(environ[variable]), f"environment variable {variable}"
    found = _Found()
    toml = _Source({}) if path is None else _from_toml(path, found)
    sources = [
        _flags_source(overrides or {}, found),
        _environment_source(environ, found),
        _secrets_source(secrets_dir, said_by, found),
        toml,
    ]
    merged: dict[str, Any] = {}
    for source in reversed(sources):
        merged = _merge(merged, source.values)
    if not found.blind:  # else what cannot be read may name them
        _unknown_variables(environ, merged, found)
    settings, numbers = _checked(merged, sources, found)
    if found.blind:
        found.refuse()
    names = {name: set(merged[name]) if isinstance(merged.get(name), dict) else set() for name in NAMED}
    loading = _Loading(settings, numbers, names, environ, sources, found)
    checked: dict[str, Any] = {"environments": loading.environments()}
    checked["accounts"] = loading.accounts(checked["environments"])
    checked["noojee"] = loading.noojee()
    checked["click2dial"] = loading.click2dial()
    checked["operations"] = loading.operations()
    checked["api"] = loading.api(settings.model_copy(update=checked))
    loading.pbx_accounts(checked["accounts"])
    if listens and loading.is_deaf():
        said = "no listener.toml" if path is None else str(path)
        found.problem(_Place(_Kind.CONFIGURATION, said), f"[[accounts]]: {NO_ACCOUNT}")
    found.refuse()
    return settings.model_copy(update=checked)
