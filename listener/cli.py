"""The command line: what a person types, and what he is told.

It decides the words, the exit codes and how answers look; it refuses to know how anything is done. Each
command imports what it needs when it runs, so that `--help` and `decode` start fast.

Every failure that we know is one sentence on standard error and an exit code; a traceback is shown only
with --debug, or for what should not happen.
"""

import argparse
import asyncio
import difflib
import errno
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from listener import __version__
from listener.core.moments import SO_LONG, moment
from listener.errors import InvalidRequest, ListenerError, RemoteError, SettingsError, StoreError

if TYPE_CHECKING:
    from listener.api import Client
    from listener.core.calls import Direction
    from listener.core.why import Tally
    from listener.settings import Settings
    from listener.store.dialled import DialHistory, DialPage
    from listener.store.history import Coverage, History, Page

T = TypeVar("T")

OK = 0
NEGATIVE = 1
USAGE = 2
STORE = 3
REMOTE = 4
INTERNAL = 70
INTERRUPTED = 130

LIMIT = 50
"""Calls or accounts in one answer, where no other number is asked for."""

WIDTH_MIN, WIDTH_MAX = 20, 2000
"""Columns that an answer may be asked to have."""

PORT_MAX = 65535

DECODE_BYTES_MAX = 256 * 2**20
"""Input of `decode`; a larger one is refused rather than half read."""

DESCRIPTION = "Hears every call notification of a contact centre, and remembers it so that it can be proved."

EPILOG = """\
five minutes, from nothing to a question answered:
  make demo                                   a simulated contact centre, heard live; Ctrl-C ends it
  listener calls --number 5001 --since 1h     the calls with 5001 in the last hour, and who was on them
  listener call 4711                          all that happened on one of them
  listener coverage --last 1h -o strip        who was listened to, and when not, as a picture
  listener dials --why --last 1h              why dials fail more than before

a site of your own:
  cp deploy/listener.example.toml listener.toml   then edit it
  listener check-config                       names every problem with its line and cure
  listener db upgrade                         makes or updates the tables
  listener run                                listens until it is told to stop

exit codes:
  0   done; the answer is yes
  1   done; the answer is no: no such call or account, something was not recognised, something is missing
  2   wrong usage or configuration; the message names the file, the line and the cure
  3   the database is not there or not up to date
  4   the contact centre refuses or does not answer
  70  a defect of ours; --debug shows where
  130 interrupted
"""


# ── Times ─────────────────────────────────────────────────────────────────────────────────────────────


def _moment(text: str) -> datetime:
    now = datetime.now(UTC)  # noqa: TID251 - "an hour ago" is from when it was typed
    try:
        return moment(text, now)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _last(text: str) -> datetime:
    if not SO_LONG.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no length of time; write 90m, 24h, 7d or 2w")
    return _moment(text)


# ── Values ────────────────────────────────────────────────────────────────────────────────────────────

_PUNCTUATION = frozenset("-()./\N{NON-BREAKING HYPHEN}\N{EN DASH}")
_PLACE = re.compile(r"\d{1,17}-\d{1,18}")
"""How a list says where it ended: microseconds and an id, both as large as they come."""


def dialable(text: str) -> str:
    """A number as it is stored: without the blanks and punctuation that people write into one.

    What has letters is no number but a name, and stays as it is. Raises ValueError where there is no digit.
    """
    if any(each.isalpha() for each in text):
        return text
    bare = "".join(each for each in text if not each.isspace() and each not in _PUNCTUATION)
    if not any(each.isdecimal() for each in bare):
        raise ValueError(f"{text!r} has no digit; write 5001 or +12025550112")
    return bare


def _number(text: str) -> str:
    try:
        return dialable(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _state(text: str) -> str:
    """A known state in any case; Genesys may know more, and they are taken as typed."""
    from listener.core.calls import State

    return next((state.value for state in State if state.casefold() == text.casefold()), text)


def _direction(text: str) -> "Direction":
    from listener.core.calls import Direction

    try:
        return Direction(text.casefold())
    except ValueError:
        raise argparse.ArgumentTypeError(f"inbound, outbound or unknown, not {text!r}") from None


def _calls_limit(text: str) -> int:
    from listener.store.history import PAGE_MAX  # too slow for --help, which does not come here

    return _whole(1, PAGE_MAX)(text)


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    bounds = f"{least} to {most}" if most is not None else f"a whole number from {least} on"

    def read(text: str) -> int:
        if re.fullmatch(r"[+-]?[0-9]{1,18}", text) and least <= int(text) <= (most or sys.maxsize):
            return int(text)
        raise argparse.ArgumentTypeError(f"{bounds}, not {text!r}")

    return read


def _above_0(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"a number above 0, not {text!r}")
    return value


def _place(text: str) -> str:
    if not _PLACE.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not where a list ended; take it from below the list before"
        )
    return text


# ── decode ────────────────────────────────────────────────────────────────────────────────────────────


def split_messages(content: bytes) -> list[bytes]:
    """Find the messages in a file: one JSON document, a JSON array of messages, or JSON lines of either.

    Exact bytes, so that decoding sees what was sent. Total: what is no JSON at all is one message, and the
    decoder says why it is none.
    """
    from listener.core.session import split

    def expanded(document: bytes) -> list[bytes]:
        try:
            return split(document) if document[:1] == b"[" else [document]
        except ValueError:
            return [document]

    document = content.removeprefix(b"\xef\xbb\xbf").strip()
    if not document or _is_json(document):
        return expanded(document) if document else []
    lines = [line.strip() for line in document.splitlines() if line.strip()]
    if not _is_json(lines[0]):
        return [document]
    return [message for line in lines for message in expanded(line)]


def _is_json(document: bytes) -> bool:
    try:
        json.loads(document)
    except (ValueError, RecursionError):
        return False
    return True


def decoded_lines(messages: Iterable[bytes], now: datetime) -> Iterator[dict[str, Any]]:
    """Say of each message what it normalises to, and what it did to its call, given those before it.

    Times are the server's own where it sent them, else `now`, since a file does not say when it was heard.
    """
    import msgspec

    from listener.core.calls import Heard, Notification, Snapshot, Unrecognised
    from listener.core.decode import decode
    from listener.core.normalise import Board, ids_needed

    board = Board(())
    next_id = 1
    for position, raw in enumerate(messages, 1):
        decoded = decode(raw)
        at = (decoded.server_at if isinstance(decoded, Notification) else None) or now
        heard = Heard(
            0, "file", position, at, "", raw, asked_at=at if isinstance(decoded, Snapshot) else None
        )
        steps = board.hear(next_id, heard, decoded)
        next_id += ids_needed(decoded)
        line: dict[str, Any] = {"message": position, "kind": type(decoded).__name__.lower()}
        if isinstance(decoded, Unrecognised):
            line["reason"] = decoded.reason
        else:
            line["decoded"] = _told(msgspec.to_builtins(decoded))
            line["steps"] = [
                msgspec.to_builtins(step) | {"call": _told(msgspec.to_builtins(step.call))} for step in steps
            ]
        yield line


def _told(fields: dict[str, Any]) -> dict[str, Any]:
    """Leave out the fields that no message carried."""
    return {name: value for name, value in fields.items() if value is not None}


def _decode(options: argparse.Namespace) -> int:
    name = "standard input" if options.file == "-" else options.file
    try:
        if options.file == "-":
            if sys.stdin.isatty():
                print("listener: reading standard input; Ctrl-D ends it", file=sys.stderr)
            content = sys.stdin.buffer.read(DECODE_BYTES_MAX + 1)
        else:
            with Path(options.file).open("rb") as file:
                content = file.read(DECODE_BYTES_MAX + 1)
    except OSError as error:
        raise SettingsError(f"{name}: it cannot be read ({error.strerror})") from None
    if len(content) > DECODE_BYTES_MAX:
        raise SettingsError(f"{name}: larger than {DECODE_BYTES_MAX} bytes; split it")
    messages = split_messages(content)
    if not messages:
        print(f"listener: {name}: empty: no message in it", file=sys.stderr)
        return NEGATIVE
    now = datetime.now(UTC)  # noqa: TID251 - stands in for a time that the file does not have
    recognised = True
    for line in decoded_lines(messages, now):
        print(json.dumps(line, ensure_ascii=False))
        recognised = recognised and line["kind"] != "unrecognised"
    return OK if recognised else NEGATIVE


# ── Configuration and database ────────────────────────────────────────────────────────────────────────


def _settings(options: argparse.Namespace) -> "Settings":
    return _found_settings(options)[1]


def _found_settings(options: argparse.Namespace, *, listens: bool = False) -> tuple[Path | None, "Settings"]:
    """The settings and the file they are from; None where there is no file. `listens`: with accounts."""
    from listener.configuration import DEMO_CONFIG, find, load

    path = find(options.config, os.environ)
    if path == DEMO_CONFIG and options.config is None:
        print(f"listener: no listener.toml here, so the demo's {path} is used", file=sys.stderr)
    given = [(text, *text.partition("=")) for text in options.set + options.set_after]
    if wrong := [text for text, _, equals, _ in given if not equals]:
        raise SettingsError("\n".join(f"--set {text}; write it as --set section.key=value" for text in wrong))
    overrides = {key.strip(): value for _, key, _, value in given}
    return path, load(path, overrides, secrets_dir=options.secrets_dir, listens=listens)


def _check_config(options: argparse.Namespace) -> int:
    path, settings = _found_settings(options, listens=True)
    counts = (
        (len(settings.environments), "environment"),
        (len(settings.accounts), "account"),
        *((len(settings.noojee) + len(settings.click2dial), "PBX"),) * bool(settings.pbx_accounts()),
    )
    told = ", ".join(f"{count} {what}{'s' * (count != 1)}" for count, what in counts)
    print(f"{path or 'no file'}: ok, {told}")
    return OK


@contextmanager
def _database(settings: "Settings", *, make: bool = False) -> Iterator[str]:
    """Give the DSN; where none is configured, run the bundled server meanwhile (it may run already)."""
    if settings.store.dsn is not None:
        yield settings.store.dsn.get_secret_value()
        return
    from listener.store.embedded import Embedded

    directory = settings.store.data_dir
    if not make and not directory.exists():
        raise StoreError(
            f"there is no database in {directory.absolute()} yet: `listener run` makes one, `make demo` one "
            "to try; or name another with store.dsn or store.data_dir, or the settings that do with -c"
        )
    with Embedded(directory) as server:
        yield server.dsn


def _db(options: argparse.Namespace) -> int:
    from listener.store import migrate

    with _database(_settings(options), make=options.action == "upgrade") as dsn:
        if options.action == "upgrade":
            before = asyncio.run(migrate.current(dsn))
            asyncio.run(migrate.upgrade(dsn))
            after = asyncio.run(migrate.current(dsn))
            print(f"{before or 'empty'} -> {after}" if before != after else f"{after}, nothing to do")
            return OK
        found, needed = asyncio.run(migrate.current(dsn)), migrate.head()
        print(found or "empty")
        if found == needed:
            return OK
        print(f"listener: this version needs {needed}; run `listener db upgrade`", file=sys.stderr)
        return NEGATIVE


# ── Questions ─────────────────────────────────────────────────────────────────────────────────────────


def _answer(options: argparse.Namespace, ask: Callable[["History"], Awaitable[T]]) -> T:
    """Ask one question of the database that the settings name."""
    from listener.store.history import History

    async def asked(dsn: str) -> T:
        async with History(dsn) as history:
            return await ask(history)

    with _database(_settings(options)) as dsn:
        return asyncio.run(asked(dsn))


async def _all_known(history: "History", options: argparse.Namespace) -> None:
    """Raise where an account or tenant was asked for that never was: a misspelt name is no empty answer."""
    if not options.account and not options.tenant:
        return
    there = await history.accounts()
    for kind, asked in (("account", options.account), ("tenant", options.tenant)):
        known = {getattr(each, kind) for each in there}
        for name in asked:
            if name not in known:
                near = difflib.get_close_matches(name, known - {""}, n=1, cutoff=0.5)
                cure = f"did you mean {near[0]}?" if near else "`listener coverage` lists them"
                raise ListenerError(f'there is no {kind} "{name}"; {cure}')


def _period_checked(options: argparse.Namespace) -> None:
    if options.since is not None and options.until is not None and options.until < options.since:
        raise SettingsError("--until is before --since: exchange them")


def _calls(options: argparse.Namespace) -> int:
    from listener.answers import as_json, console, show_calls

    _period_checked(options)

    async def ask(history: "History") -> "Page":
        await _all_known(history, options)
        return await history.calls(
            since=options.since,
            until=options.until,
            accounts=options.account,
            tenant=options.tenant,
            direction=options.direction,
            state=options.state,
            live=True if options.live else None,
            number=options.number,
            number_ends=options.number_ends,
            limit=options.limit,
            after=options.after,
        )

    page = _answer(options, ask)
    if options.output == "json":
        print(as_json(page))
    else:
        show_calls(page, console())
    return OK if page.calls else NEGATIVE


def _call(options: argparse.Namespace) -> int:
    from listener.answers import as_json, console, show_timeline

    timelines = _answer(options, lambda history: history.call(options.id))
    if options.output == "json":
        print(as_json(timelines))
    else:
        for timeline in timelines:
            show_timeline(timeline, console(), everything=options.all)
    if not timelines:
        print(f"listener: no call is known as {options.id}; `listener calls` lists them", file=sys.stderr)
    return OK if timelines else NEGATIVE


def _coverage(options: argparse.Namespace) -> int:
    from listener.answers import as_json, console, show_coverage, show_strip

    _period_checked(options)
    if options.gaps and options.output == "strip":
        raise SettingsError("--gaps is for the table: the strip shows gaps anyway")

    async def ask(history: "History") -> "Coverage":
        await _all_known(history, options)
        return await history.coverage(
            since=options.since,
            until=options.until,
            accounts=options.account,
            tenant=options.tenant,
            limit=options.limit,
        )

    coverage = _answer(options, ask)
    if options.output == "json":
        print(as_json(coverage))
    elif options.output == "strip":
        show_strip(coverage, console(options.width))
    else:
        show_coverage(coverage, console(options.width), gaps=options.gaps)
    return OK if coverage.accounts else NEGATIVE


def _spool(options: argparse.Namespace) -> int:
    from listener.answers import as_json, console, show_spool
    from listener.store.spool import inspect

    report = inspect(_settings(options).spool_directory())
    if options.output == "json":
        print(as_json(report))
    else:
        show_spool(report, console())
    damaged = bool(report.damaged or report.set_aside)
    return NEGATIVE if options.verify and damaged else OK


# ── Dials ─────────────────────────────────────────────────────────────────────────────────────────────

WHY_LAST = "1h"
"""The period that --why explains where none is asked for."""

ACKNOWLEDGED_S = 15.0
"""How long `dial` without --wait waits for the answer of the system; then it says what is known."""

RECORD_BYTES_MAX = 1024 * 1024
"""A larger file is no outbound record."""


def _dials_answer(options: argparse.Namespace, ask: "Callable[[DialHistory], Awaitable[T]]") -> T:
    from listener.store.dialled import DialHistory

    async def asked(dsn: str) -> T:
        async with DialHistory(dsn) as history:
            return await ask(history)

    with _database(_settings(options)) as dsn:
        return asyncio.run(asked(dsn))


def _print_json(told: Any) -> None:
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(told), indent=2).decode())


def _dials(options: argparse.Namespace) -> int:
    _period_checked(options)
    if options.why:
        return _dials_why(options)
    if options.id is not None:
        return _dial_told(options)
    from listener.answers import console, show_dials
    from listener.api import page_told

    async def ask(history: "DialHistory") -> "DialPage":
        await _all_known(history, options)
        return await history.dials(
            since=options.since,
            until=options.until,
            accounts=options.account,
            tenant=options.tenant,
            systems=options.system,
            origin=options.origin,
            campaigns=options.campaign,
            outcomes=options.outcome,
            waiting=True if options.waiting else None,
            leg=options.leg,
            cause=options.cause,
            number=options.number,
            number_ends=options.number_ends,
            limit=options.limit,
            after=options.after,
        )

    page = _dials_answer(options, ask)
    if options.output == "json":
        _print_json(page_told(page))
    else:
        show_dials(page, console())
    return OK if page.dials else NEGATIVE


def _dial_told(options: argparse.Namespace) -> int:
    from listener.answers import console, show_dial
    from listener.api import timeline_told

    timeline = _dials_answer(options, lambda history: history.dial(options.id))
    if timeline is None:
        print(f"listener: there is no dial {options.id}; `listener dials` lists them", file=sys.stderr)
        return NEGATIVE
    if options.output == "json":
        _print_json(timeline_told(timeline))
    else:
        show_dial(timeline, console())
    return OK


def _dials_why(options: argparse.Namespace) -> int:
    from listener.answers import console, show_why
    from listener.core.why import explain

    now = datetime.now(UTC)  # noqa: TID251 - "until now" is when it was asked
    since = options.since if options.since is not None else moment(WHY_LAST, now)

    async def ask(history: "DialHistory") -> "tuple[list[Tally], list[Tally]]":
        await _all_known(history, options)
        return await history.tallies(
            since,
            options.until or now,
            accounts=options.account,
            tenant=options.tenant,
            systems=options.system,
            origin=options.origin,
            campaigns=options.campaign,
        )

    why = explain(*_dials_answer(options, ask))
    if options.output == "json":
        _print_json(why)
    else:
        show_why(why, console())
    return OK if why.now.dials else NEGATIVE


def _client(settings: "Settings") -> "Client":
    """The API of the listener that runs with these settings."""
    from listener.api import Client

    api = settings.api
    if api.token is None:
        raise SettingsError(
            "api.token is not set, so no listener takes dials; set api.token_file and dials = true, "
            "see the README, Dials"
        )
    if api.port == 0:
        raise SettingsError("api.port is 0, so nobody knows where the listener is; set --set api.port=9465")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(api.host, api.host)  # noqa: S104 - what is listened on
    where = f"[{host}]" if ":" in host else host
    return Client(f"http://{where}:{api.port}", api.token.get_secret_value())


def _parameters(options: argparse.Namespace) -> dict[str, Any]:
    """What was given of the request's own parameters, by their vendor's names."""
    given = {name: getattr(options, name) for name in options.parameters}
    return {name: value for name, value in given.items() if value not in (None, False)}


def _dial(options: argparse.Namespace) -> int:
    parameters = _parameters(options)
    if options.system == "preview":
        parameters |= _outbound_record(options)

    async def placed() -> dict[str, Any]:
        async with _client(_settings(options)) as client:
            dial = await client.dial(
                options.system,
                account=getattr(options, "by", None),
                environment=options.environment,
                campaign=options.campaign,
                key=options.key,
                **parameters,
            )
            for warning in dial["warnings"]:
                print(f"listener: {warning}", file=sys.stderr)
            return await _followed(client, dial, options)

    dial = asyncio.run(placed())
    if options.output == "json":
        _print_json(dial)
    elif not options.wait:
        print(_dial_line(dial))
    if dial["outcome"] is None:
        # Who waited wants to know whether somebody answered; nobody had, or it would be connected.
        return NEGATIVE if options.wait and dial["state"] != "connected" else OK
    return OK if dial["outcome"] in ("answered", "machine") else NEGATIVE


def _dial_line(dial: dict[str, Any]) -> str:
    return f"{dial['id']} {dial['outcome'] or dial['state']} {dial['cause_text']}".rstrip()


async def _followed(client: "Client", dial: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The dial at its end with --wait, with each state as it comes; else once the system has answered."""
    shown, last = "", dial
    try:
        async with asyncio.timeout(options.wait_s if options.wait else ACKNOWLEDGED_S):
            async for last in client.follow(dial["id"]):
                line = _dial_line(last)
                if options.wait and options.output == "table" and line != shown:
                    print(line, flush=True)
                    shown = line
                if not options.wait and last["state"] != "requested":
                    break
    except TimeoutError:
        print(f"listener: no end so far; `listener dials {dial['id']}` tells it later", file=sys.stderr)
    return last


def _outbound_record(options: argparse.Namespace) -> dict[str, Any]:
    """The record of --record, or the message of --message, as JSON."""
    path = options.record or options.message
    if path is None:
        return {}
    try:
        raw = (
            sys.stdin.buffer.read(RECORD_BYTES_MAX + 1)
            if path == "-"
            else Path(path).read_bytes()[: RECORD_BYTES_MAX + 1]
        )
    except OSError as error:
        raise SettingsError(f"{path}: it cannot be read ({error.strerror})") from None
    try:
        value = json.loads(raw) if len(raw) <= RECORD_BYTES_MAX else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise SettingsError(f"{path}: it is no JSON object; give an outbound record, whole")
    return {"outboundRecord" if options.record else "message": value}


def _control(options: argparse.Namespace) -> int:
    async def asked() -> None:
        async with _client(_settings(options)) as client:
            if options.action == "hangup" and options.id is not None:
                print(_dial_line(await client.hang_up(options.id)))
            else:
                await client.control(options.action, environment=options.environment, **_parameters(options))

    if options.action == "hangup" and (options.id is None) == (options.extenOrUniqueId is None):
        raise SettingsError("name either the dial, or --exten-or-unique-id of a call")
    asyncio.run(asked())
    return OK


# ── The daemon, the simulator, the demo ───────────────────────────────────────────────────────────────


def _run(options: argparse.Namespace) -> int:
    from listener.configuration import DEMO_CONFIG, find
    from listener.daemon import run

    if options.config is None and find(None, os.environ) == DEMO_CONFIG:
        raise SettingsError(
            f"no listener.toml here, and `run` does not take {DEMO_CONFIG}, whose contact centre ends with "
            "the demo; write one (deploy/listener.example.toml shows all of it), or name one with -c"
        )
    _, settings = _found_settings(options, listens=True)
    run(settings, reread=lambda: _settings(options), goodbye=options.goodbye)
    return OK


def _simulate(options: argparse.Namespace) -> int:
    import signal

    from listener.simulator.centre import Simulator, run_simulator
    from listener.simulator.settings import SimulatorSettings

    faults = {}
    for given in options.fault:
        name, _, share = given.partition("=")
        try:
            faults[name] = float(share)
        except ValueError:
            raise SettingsError(f"--fault {given}: write it as --fault drop_mid_reply=0.01") from None
    settings = SimulatorSettings(
        accounts=options.accounts,
        rate=options.rate,
        seed=options.seed,
        dialect=options.dialect,
        calls_per_account=options.calls_per_account,
        port=options.port,
        csrf=options.csrf,
        ack=not options.no_ack,
        websocket=not options.no_websocket,
        faults=faults,
        noojee=options.noojee is not None,
        noojee_port=options.noojee or 0,
        click2dial=options.click2dial is not None,
        click2dial_port=options.click2dial or 0,
        click2dial_redis=options.redis,
        click2dial_webhook=options.webhook,
    )

    def ready(simulator: Simulator) -> None:
        logins = list(simulator.accounts)
        there = {"url": simulator.url, "accounts": len(logins), "first": logins[0], "last": logins[-1]}
        there |= {"password": settings.password}
        if simulator.noojee is not None:
            there |= {"noojee": simulator.noojee.url, "noojee_key": settings.noojee_key}
        if simulator.click2dial is not None:
            there |= {"click2dial": simulator.click2dial.url}
        print(json.dumps(there), flush=True)

    async def play() -> dict[str, Any]:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, stop.set)
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        truth = await run_simulator(
            settings, stop=stop, seconds=options.seconds, playing=not options.idle, on_ready=ready
        )
        told = truth.as_json()
        return {key: told[key] for key in ("sent", "accepted", "unsubscribed", "undelivered", "outcomes")}

    try:
        told = asyncio.run(play())
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        why = "it is taken" if error.errno == errno.EADDRINUSE else "it needs a privilege"
        raise SettingsError(f"--port {options.port}: {why}; name another, or 0 for any free one") from None
    print(json.dumps(told))
    return OK


def _demo(options: argparse.Namespace) -> int:
    from listener.demo import Demo

    given = options.seconds if options.seconds is not None else os.environ.get("DEMO_SECONDS")
    try:
        seconds = _above_0(given) if isinstance(given, str) and given else given or None
    except argparse.ArgumentTypeError:
        raise SettingsError(f"DEMO_SECONDS={given}: write a number of seconds above 0, such as 20") from None
    return Demo(options.directory, seconds=seconds, accounts=options.accounts, rate=options.rate).run()


# ── Words ─────────────────────────────────────────────────────────────────────────────────────────────


class _Parser(argparse.ArgumentParser):
    """argparse, with examples kept as they are written, and what was misspelt said by the command itself."""

    def __init__(self, **kwargs: Any) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(**{"formatter_class": layout, "allow_abbrev": False, **kwargs})

    def parse_known_args(  # type: ignore[override] # argparse has overloads
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse, but it refuses what it does not know: else the root would, with its own usage."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            option = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(option, self._option_string_actions, n=1)
            self.error(f"unknown: {' '.join(unknown)}" + (f"; did you mean {near[0]}?" if near else ""))
        return known, []

    def error(self, message: str) -> NoReturn:
        """Usage and the sentence on standard error, exit code 2."""
        if wrong := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            choices = re.findall(r"[\w-]+", wrong[2])
            if near := difflib.get_close_matches(wrong[1], choices, n=1):
                message += f"; did you mean {near[0]}?"
        super().error(message.removeprefix("argument "))


def _shared(*, top: bool) -> _Parser:
    """Options for before and after the command; one that is not given after it leaves what was before."""

    def default(value: Any) -> Any:
        return value if top else argparse.SUPPRESS

    shared = _Parser(add_help=False)
    group = shared.add_argument_group("for every command")
    group.add_argument(
        "-c",
        "--config",
        type=Path,
        metavar="FILE",
        default=default(None),
        help="the settings; else LISTENER_CONFIG, ./listener.toml, /etc/listener/listener.toml, the demo's",
    )
    group.add_argument(
        "--set",
        action="append",
        dest="set" if top else "set_after",
        metavar="KEY=VALUE",
        default=[],
        help="set one setting, such as operations.port=9464; may be repeated",
    )
    group.add_argument(
        "--secrets-dir", type=Path, metavar="DIR", default=default(None), help="else LISTENER_SECRETS_DIR"
    )
    group.add_argument(
        "--debug", action="store_true", default=default(False), help="show where a failure comes from"
    )
    return shared


def parser() -> argparse.ArgumentParser:
    """Build the whole command line."""
    root = _Parser(prog="listener", description=DESCRIPTION, epilog=EPILOG, parents=[_shared(top=True)])
    root.add_argument("--version", action="version", version=f"listener {__version__}")
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    shared = _shared(top=False)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], help_: str, more: str = ""
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=help_, description=help_[0].upper() + help_[1:] + ".", epilog=more, parents=[shared]
        )
        added.set_defaults(run=run)
        return added

    running = command(
        "run",
        _run,
        "listen until told to stop (SIGTERM, Ctrl-C); SIGHUP reads the accounts again",
        "What is heard is stored before the contact centre is told that we have it. It never gives up on a\n"
        "contact centre: what it cannot hear becomes a gap that `listener coverage` shows. /-/ready on\n"
        "operations.port says whether every account is observed, and why not. A second signal does not\n"
        "wait.\n\n"
        "exit codes: 0 it was told to stop; 2 wrong settings, or no account; 3 no database, or no tables\n\n"
        "examples:\n"
        "  listener run\n"
        "  listener run -c /etc/listener/listener.toml --set log.format=text\n",
    )
    running.add_argument(
        "--goodbye",
        action="store_true",
        help="end the sessions at a stop; without it the next start goes on with them, and misses nothing",
    )

    demo = command(
        "demo",
        _demo,
        "see it work: a simulated contact centre, heard live, then checked",
        "examples:\n"
        "  listener demo                until Ctrl-C\n"
        "  listener demo --seconds 20   ends by itself; exit code 1 if anything that was sent is missing\n",
    )
    demo.add_argument(
        "--seconds", type=_above_0, help="end after so long; else DEMO_SECONDS, else Ctrl-C ends it"
    )
    demo.add_argument(
        "--directory", type=Path, default=Path(".demo"), metavar="DIR", help="where all of it is kept (.demo)"
    )
    demo.add_argument("--accounts", type=_whole(1), default=40, help="accounts (40)")
    demo.add_argument(
        "--rate", type=_above_0, default=50.0, help="notifications per second, of all accounts (50)"
    )

    simulate = command(
        "simulate",
        _simulate,
        "be a contact centre on loopback, with scripted calls",
        "It prints its address as a JSON line, and at its end what it sent. GET /simulator/truth and\n"
        "/simulator/stats tell the same over HTTP; POST /simulator/faults makes something go wrong.\n\n"
        "exit codes: 0 it was told to stop, or its time was over; 2 a value or a port that cannot be\n\n"
        "examples:\n"
        "  listener simulate --port 8090 --accounts 3 --rate 10 --fault drop_mid_reply=0.01\n"
        "  listener simulate --port 8090 --noojee 8091 --click2dial 8300 --redis redis://127.0.0.1/0\n",
    )
    simulate.add_argument(
        "--port", type=_whole(0, PORT_MAX), default=0, help="where to listen on 127.0.0.1 (any free port)"
    )
    simulate.add_argument(
        "--accounts", type=_whole(1), default=20, help="accounts: agent5000, agent5001, … (20)"
    )
    simulate.add_argument("--rate", type=_above_0, default=50.0, help="notifications per second (50)")
    simulate.add_argument("--seed", type=int, default=1, help="the same seed says the same (1)")
    simulate.add_argument("--seconds", type=_above_0, help="play so long, let the calls end, and leave")
    simulate.add_argument(
        "--dialect",
        default="mixed",
        help="v2, v2-strings, v2-connid, v3, or mixed (mixed)",
    )
    simulate.add_argument(
        "--calls-per-account", type=_whole(1), default=1, help="calls of one account at a time (1)"
    )
    simulate.add_argument("--no-ack", action="store_true", help="without CometD's acknowledgement extension")
    simulate.add_argument("--no-websocket", action="store_true", help="long-polling only")
    simulate.add_argument("--csrf", action="store_true", help="ask for a CSRF token, as GWS can")
    simulate.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="NAME=SHARE",
        help="a fault at random; may be repeated",
    )
    simulate.add_argument(
        "--noojee",
        type=_whole(0, PORT_MAX),
        metavar="PORT",
        help="be a Noojee too, there; 0 is any free port",
    )
    simulate.add_argument(
        "--click2dial", type=_whole(0, PORT_MAX), metavar="PORT", help="be a Click2Dial too, there"
    )
    simulate.add_argument(
        "--redis", metavar="URL", help="the Redis, which must run, for Click2Dial's records"
    )
    simulate.add_argument("--webhook", metavar="URL", help="where the Click2Dial posts its records")
    simulate.add_argument("--idle", action="store_true", help="play nothing until POST /simulator/play")

    decode = command(
        "decode",
        _decode,
        "say what messages normalise to, or why they are not recognised; JSON lines",
        "A file holds one JSON document, a JSON array of messages, or JSON lines of either. All of them are\n"
        "taken as of one account, so that later ones continue the calls of earlier ones. Exit code 1 if any\n"
        "was not recognised.\n\nexample:\n  listener decode message.json | jq .steps[].changes\n",
    )
    decode.add_argument(
        "file", nargs="?", default="-", metavar="FILE", help="a file, or - for standard input"
    )

    period, output = _questions(command)
    _dial_questions(command, period, output)
    _dial_commands(command)

    spool = command(
        "spool",
        _spool,
        "show what was heard and waits on disk, because the database is or was away",
        "It may be asked while the listener runs, and changes nothing. Every checksum is read. Accounts are\n"
        "told by their ids in the database, which need not answer.\n\n"
        "examples:\n"
        "  listener spool\n"
        "  listener spool --verify -o json    exit code 1 if a record is damaged or was set aside\n",
    )
    spool.add_argument("--verify", action="store_true", help="exit code 1 if anything is damaged")
    spool.add_argument("-o", "--output", choices=("table", "json"), default="table", help="how (table)")

    database = command(
        "db",
        _db,
        "make or update the tables, or say which version they have",
        "An upgrade is one transaction: it happens wholly or not at all, and a second one at the same time\n"
        "waits. The first needs three roles; where the user of the DSN may not make them, it says what a\n"
        "superuser has to run.\n\n"
        "exit codes: 0 up to date; 1 `current` found another version, or none; 2 wrong settings;\n"
        "3 no database, or it refuses\n\n"
        "examples:\n"
        "  listener db upgrade\n"
        "  listener db current --set store.dsn=postgresql://listener@db.example.com/listener\n",
    )
    database.add_argument(
        "action",
        choices=("upgrade", "current"),
        help="upgrade brings them up to date; current is 1 if they are not",
    )

    command(
        "check-config",
        _check_config,
        "check the settings without connecting anywhere; name every problem with its line and cure",
        "exit codes: 0 `listener run` would take them; 2 it would not, and why, a line for each problem\n\n"
        "examples:\n"
        "  listener check-config\n"
        "  listener check-config -c /etc/listener/listener.toml --secrets-dir /run/secrets\n",
    )
    return root


_Adds = Callable[..., None]


def _questions(command: Callable[..., argparse.ArgumentParser]) -> tuple[_Adds, _Adds]:
    """Add the commands that read what was stored about calls; gives what adds the options of a period, and of
    how an answer looks."""

    def output(to: argparse.ArgumentParser, *more: str) -> None:
        to.add_argument(
            "-o",
            "--output",
            choices=("table", "json", *more),
            default="table",
            help="for a person or for a program (table)",
        )

    def period(to: argparse.ArgumentParser) -> None:
        asked = to.add_argument_group(
            "which time, and whose",
            "WHEN is so long ago (90s, 45m, 1h, 2d, 1w), a local time (2026-03-02T14:00, 2026-03-02),\n"
            "one of another zone (2026-03-02T14:00+01:00, …Z), or now.",
        )
        begin = asked.add_mutually_exclusive_group()
        begin.add_argument(
            "--since",
            "--from",
            type=_moment,
            metavar="WHEN",
            help="from when on; else from the beginning of what is known",
        )
        begin.add_argument(
            "--last",
            type=_last,
            dest="since",
            metavar="LENGTH",
            help="the last 90m, 24h, 7d; the same as --since",
        )
        asked.add_argument(
            "--until",
            "--to",
            type=_moment,
            metavar="WHEN",
            help="until when, itself not included; else until now",
        )
        asked.add_argument(
            "--account",
            action="extend",
            nargs="+",
            default=[],
            metavar="NAME",
            help="these accounts, as the settings name them; may be repeated",
        )
        asked.add_argument(
            "--tenant",
            action="extend",
            nargs="+",
            default=[],
            metavar="NAME",
            help="the accounts of these tenants; may be repeated",
        )

    calls = command(
        "calls",
        _calls,
        "list calls: who, with whom, how long, and how it ended",
        "Below the list stands which share of the time was observed: no call and nobody listening differ.\n"
        "Participants are everybody except the account itself; who left before the call ended is in\n"
        "brackets. A terminal shows the columns that fit, -o json everything.\n\n"
        "A call that ended while nobody listened is said to be (inferred): it has no end, and of what\n"
        "nobody heard no duration; + is at least so long, ? is not known.\n\n"
        "An account's own number is known where messages name it. Where those of a site never do, the\n"
        "account's name stands for it, and --account finds its calls; --number cannot.\n\n"
        "exit codes: 0 there are calls; 1 there is none, or no such account or tenant; 2 wrong usage;\n"
        "3 no database\n\n"
        "examples:\n"
        "  listener calls --number 5001 --last 1h          to or from 5001, or with it on the call\n"
        "  listener calls --live                           what goes on now\n"
        "  listener calls --tenant north --direction inbound --since 2026-03-02\n"
        "  listener calls --since 2026-03-02T08:00 --until 2026-03-02T18:00 --account agent5001 -o json\n",
    )
    period(calls)
    which = calls.add_argument_group("which calls")
    which.add_argument(
        "--number",
        type=_number,
        help="a whole number: of the account, the other party, or anybody on the call; "
        "blanks and -()./ in it do not count",
    )
    which.add_argument("--number-ends", type=_number, metavar="DIGITS", help="the last digits of one")
    which.add_argument(
        "--direction",
        type=_direction,
        metavar="WHICH",
        help="inbound, outbound, or unknown: it was met when it had begun already",
    )
    which.add_argument(
        "--state", type=_state, help="Ringing, Dialing, Established, Held, Released, Completed, …"
    )
    which.add_argument("--live", action="store_true", help="only those that go on now")
    which.add_argument(
        "--limit", type=_calls_limit, default=LIMIT, metavar="COUNT", help=f"how many, newest first ({LIMIT})"
    )
    which.add_argument("--after", type=_place, metavar="PLACE", help="go on where a list before ended")
    output(calls)

    call = command(
        "call",
        _call,
        "tell all that happened on a call: every message and what it changed",
        "Changes of its capabilities come with each message: --all shows them, and -o json. The share\n"
        "below is of the time from its beginning to its last message, or to now while it goes on.\n"
        "Of a call that ended while nobody listened it says between when that was, and why it is known.\n\n"
        "exit codes: 0 there it is; 1 no call is known by that id; 2 wrong usage; 3 no database\n\n"
        "examples:\n"
        "  listener call 4711\n"
        "  listener call 00UAB12CDE34F001 -o json\n",
    )
    call.add_argument(
        "id", metavar="ID", help="its id in the list, or any id that the contact centre gave it"
    )
    call.add_argument("--all", action="store_true", help="also the changes of its capabilities")
    output(call)

    coverage = command(
        "coverage",
        _coverage,
        "tell how much of the time each account was observed, and when not and why",
        "A row for each account, the worst first: its share, its gaps and their causes, and how it is now.\n"
        "An account counts from when it was added until it was removed. What the causes mean, and what to\n"
        'do, is in the README under "Gaps".\n\n'
        "-o strip draws a line for each account. A capital is a cause with nothing observed, a small\n"
        "letter says that a part of that stretch was missing, if only a moment. Colours are for a\n"
        "terminal; NO_COLOR=1 switches them off.\n\n"
        "exit codes: 0 there are accounts in that time, however little was observed; 1 there is none;\n"
        "2 wrong usage; 3 no database\n\n"
        "examples:\n"
        "  listener coverage --last 24h\n"
        "  listener coverage --last 24h -o strip\n"
        "  listener coverage --account agent5001 --from 2026-03-02T08:00 --to 2026-03-02T18:00 --gaps\n"
        "  listener coverage --tenant north -o json | jq .total.percent\n",
    )
    period(coverage)
    coverage.add_argument(
        "--gaps", action="store_true", help="each gap, from when to when, instead of the rows"
    )
    coverage.add_argument(
        "--limit",
        type=_whole(1),
        default=LIMIT,
        metavar="COUNT",
        help=f"accounts to show, the worst first ({LIMIT}); the sums are of all of them",
    )
    coverage.add_argument(
        "--width",
        type=_whole(WIDTH_MIN, WIDTH_MAX),
        metavar="COLUMNS",
        help="how wide; else the terminal, or 200 where there is none",
    )
    output(coverage, "strip")
    return period, output


def _word(kind: str) -> Callable[[str], Any]:
    """One of the words of an enumeration of `listener.core.dialling`, imported only when it is used."""

    def read(text: str) -> Any:
        from listener.core import dialling

        words = getattr(dialling, kind)
        try:
            return words(text.casefold().replace("-", "_"))
        except ValueError:
            raise argparse.ArgumentTypeError(f"one of {', '.join(words)}, not {text!r}") from None

    return read


def _dial_questions(command: Callable[..., argparse.ArgumentParser], period: _Adds, output: _Adds) -> None:
    dials = command(
        "dials",
        _dials,
        "list dials: how each ended, and why; or why they fail more than before",
        "A dial is any attempt to reach a number: placed by this listener, or overheard because an agent's\n"
        "call began in Dialing. Each gets one outcome: answered, machine, busy, no_answer, rejected,\n"
        "cancelled, invalid_number, unreachable, congestion, not_allowed, failed or unknown; (inferred)\n"
        "where no system said it. With an id, it tells how the outcome was reached, and which call it is.\n\n"
        "--why names the smallest group of dials that explains why more fail in the period (the last\n"
        f"{WHY_LAST} where none is given) than in as long a time before. Then come the failures by outcome,\n"
        "cause, leg and system, the most first; where they gather at an account or numbers, by that too.\n\n"
        "exit codes: 0 there are dials; 1 there is none, or no such dial, account or tenant; 2 wrong usage;\n"
        "3 no database\n\n"
        "examples:\n"
        "  listener dials --last 1h --outcome busy no_answer\n"
        "  listener dials --number 0383208100 --since 2026-03-02\n"
        "  listener dials d-3edd6b025f6f9641\n"
        "  listener dials --why --last 1h\n"
        "  listener dials --cause 'ErrorCode 231' -o json | jq .dials[].number\n",
    )
    dials.add_argument("id", nargs="?", metavar="ID", help="one dial, with all that led to its outcome")
    dials.add_argument("--why", action="store_true", help="why dials fail more than in the time before")
    period(dials)
    which = dials.add_argument_group("which dials")
    which.add_argument(
        "--outcome",
        type=_word("Outcome"),
        action="extend",
        nargs="+",
        default=[],
        metavar="WORD",
        help="those that ended so; may be repeated",
    )
    which.add_argument("--waiting", action="store_true", help="only those that wait for their end")
    which.add_argument("--leg", type=_word("Leg"), metavar="WORD", help="agent, callee or system")
    which.add_argument("--cause", metavar="CODE", help='a raw cause, "ErrorCode 231", or its code alone')
    which.add_argument(
        "--system",
        type=_word("System"),
        action="extend",
        nargs="+",
        default=[],
        metavar="WORD",
        help="gws, noojee or click2dial; may be repeated",
    )
    which.add_argument("--origin", type=_word("Origin"), metavar="WORD", help="placed or overheard")
    which.add_argument(
        "--campaign",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME",
        help="those that were placed for it; may be repeated",
    )
    which.add_argument("--number", type=_number, help="a whole number, in any spelling")
    which.add_argument("--number-ends", type=_number, metavar="DIGITS", help="the last digits of one")
    which.add_argument(
        "--limit", type=_calls_limit, default=LIMIT, metavar="COUNT", help=f"how many, newest first ({LIMIT})"
    )
    which.add_argument("--after", metavar="PLACE", help="go on where a list before ended")
    output(dials)


_THROUGH = (
    "It goes through the listener that runs with the same settings (api.port, api.token), so that its\n"
    "end is heard, and only where they say dials = true.\n\n"
)
_DIAL_CODES = (
    "exit codes: 0 it was accepted or, with --wait, answered; 1 it failed, was not answered while that was\n"
    "waited for, or there is no such account; 2 wrong usage or settings; 3 the database does not answer,\n"
    "nothing was sent; 4 no listener answers\n\n"
)


def _dial_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands that place dials, and change calls that there are."""
    dial = command(
        "dial",
        _dial,
        "call a number by one of the systems",
        _THROUGH + _DIAL_CODES + "examples:\n"
        "  listener dial gws --by agent5001 5000 --wait\n"
        "  listener dial noojee --exten-or-unique-id SIP/101 0383208100 --key order-4711\n"
        "  listener dial click2dial --agent 201 --outbound-id 27820001234 0820001234\n"
        "  listener dial hangup d-3edd6b025f6f9641\n",
    )
    systems = dial.add_subparsers(title="by which, or what to do with a call", metavar="WHAT", required=True)

    def system(name: str, help_: str, parameters: Sequence[str], example: str) -> argparse.ArgumentParser:
        added = systems.add_parser(
            name,
            help=help_,
            description=help_[0].upper() + help_[1:] + ".",
            epilog=f"{_THROUGH}{_DIAL_CODES}example:\n  listener dial {name} {example}\n",
            parents=[_shared(top=False)],
        )
        added.set_defaults(run=_dial, system=name, parameters=tuple(parameters))
        added.add_argument("--key", help="an idempotency key: the same key never dials twice")
        added.add_argument("--campaign", metavar="NAME", help="what to group the dial by")
        added.add_argument("--environment", metavar="NAME", help="by which of several")
        added.add_argument("--wait", action="store_true", help="follow it to its outcome")
        added.add_argument(
            "--wait-s",
            type=_above_0,
            default=14_400.0,
            metavar="SECONDS",
            help="follow it for so long (14400)",
        )
        added.add_argument(
            "-o", "--output", choices=("table", "json"), default="table", help="for a person or a program"
        )
        return added

    gws = system(
        "gws",
        "dial by an account at Genesys Web Services",
        ("number", "device", "location", "userData", "reference"),
        '--by agent5001 5000 --user-data \'{"CustomerSegment": "Gold"}\' --wait',
    )
    gws.add_argument("--by", metavar="ACCOUNT", help="the account; else the only one that may dial")
    gws.add_argument("number")
    gws.add_argument("--device", metavar="ID", help="the id of its device; else its only one")
    gws.add_argument("--location", help="the location attribute of the TServer's request")
    gws.add_argument("--user-data", dest="userData", type=_json_object, metavar="JSON", help="attached data")
    gws.add_argument("--reference", help="what the call is recognised by; else one is made")
    preview = system(
        "preview",
        "dial the number of an outbound preview record",
        ("devicePath", "recordHandle"),
        "--by agent5001 --record-handle 431",
    )
    preview.add_argument("--by", metavar="ACCOUNT", help="the account; else the only one that may dial")
    preview.add_argument("--device-path", dest="devicePath", metavar="PATH", help="/devices/ID")
    what = preview.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", metavar="FILE", help="the outbound record, whole, as JSON; - for stdin")
    what.add_argument(
        "--record-handle",
        dest="recordHandle",
        type=int,
        metavar="HANDLE",
        help="that of a preview record that the account heard in the last eight hours",
    )
    what.add_argument("--message", metavar="FILE", help="the message that brought it, as it was heard")
    noojee = system(
        "noojee",
        "dial by a Noojee: the extension is called first, then the number",
        ("number", "extenOrUniqueId", "autoAnswer", "callerId", "phoneCaption", "monitored", "record", "tag"),
        "--exten-or-unique-id SIP/101 0383208100 --record --tag order-4711",
    )
    noojee.add_argument("number")
    noojee.add_argument("--exten-or-unique-id", dest="extenOrUniqueId", required=True, metavar="SIP/100")
    noojee.add_argument(
        "--auto-answer", dest="autoAnswer", metavar="TEXT", help="by which the handset answers"
    )
    noojee.add_argument("--caller-id", dest="callerId", metavar="NUMBER", help="what the number is shown")
    noojee.add_argument("--phone-caption", dest="phoneCaption", metavar="TEXT", help="a line on the handset")
    noojee.add_argument("--monitored", action="store_true", help="ask for its events, also without subscribe")
    noojee.add_argument("--record", action="store_true", help="record when it is answered")
    noojee.add_argument("--tag", help="of the recording; only with --record")
    click2dial = system(
        "click2dial",
        "dial by a Click2Dial: the agent is called first, then the callee",
        ("agent", "callee", "outbound_id", "reference"),
        "--agent 201 --outbound-id 27820001234 0820001234 --wait",
    )
    click2dial.add_argument("callee", help="0820001234, 27820001234 or 0027820001234")
    click2dial.add_argument("--agent", required=True, metavar="EXTENSION")
    click2dial.add_argument(
        "--outbound-id", dest="outbound_id", required=True, metavar="NUMBER", help="what the callee is shown"
    )
    click2dial.add_argument("--reference", help="contact_ref or call_ref; else one is made")

    def control(
        to: Any, action: str, help_: str, parameters: Sequence[str], *, example: str, of: str = "dial"
    ) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = to.add_parser(
            action,
            help=help_,
            description=help_[0].upper() + help_[1:] + ".",
            epilog=f"{_THROUGH}exit codes: 0 done; 1 it cannot be done, or no such dial; 2 wrong usage or "
            "settings;\n3 the database does not answer; 4 Noojee refuses, or no listener answers\n\n"
            f"example:\n  listener {of} {action} {example}\n",
            parents=[_shared(top=False)],
        )
        added.set_defaults(run=_control, action=action, parameters=tuple(parameters))
        added.add_argument("--environment", metavar="NAME", help="by which Noojee of several")
        return added

    hangup = control(
        systems,
        "hangup",
        "have Noojee hang up a call",
        ("extenOrUniqueId",),
        example="d-3edd6b025f6f9641",
    )
    hangup.add_argument("id", nargs="?", metavar="ID", help="a dial")
    hangup.add_argument(
        "--exten-or-unique-id", dest="extenOrUniqueId", metavar="1543022361.57", help="a call"
    )
    answer = control(
        systems,
        "answer",
        "have a handset of Noojee's answer",
        ("uniqueId", "exten", "answerString"),
        example="--unique-id 1543022361.57 --exten SIP/101",
    )
    answer.add_argument("--unique-id", dest="uniqueId", required=True, metavar="ID")
    answer.add_argument("--exten", required=True, metavar="SIP/100")
    answer.add_argument("--answer-string", dest="answerString", metavar="TEXT")

    record = command(
        "record",
        _control,
        "have Noojee start or stop recording a call",
        _THROUGH
        + "exit codes: 0 done; 1 it cannot be done; 2 wrong usage or settings; 4 Noojee refuses, or no\n"
        "listener answers\n\nexamples:\n"
        "  listener record start --exten-or-unique-id 410 --tag 22 --agent-login-name Fred\n"
        "  listener record stop --exten-or-unique-id 410\n",
    )
    actions = record.add_subparsers(title="what", metavar="WHAT", required=True)
    for action, parameters in (
        ("start", ("extenOrUniqueId", "tag", "agentLoginName")),
        ("stop", ("extenOrUniqueId", "agentLoginName")),
    ):
        added = control(
            actions,
            action,
            f"{action} recording a call",
            parameters,
            example="--exten-or-unique-id 410",
            of="record",
        )
        added.add_argument("--exten-or-unique-id", dest="extenOrUniqueId", required=True, metavar="410")
        added.add_argument(
            "--agent-login-name", dest="agentLoginName", metavar="NAME", help="who owns the leg"
        )
        if action == "start":
            added.add_argument("--tag", help="stored as the call record's External Reference")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError('it is no JSON object; write \'{"key": "value"}\'')
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit code. Never raises for a failure that we know."""
    if hasattr(sys.stdout, "reconfigure"):
        # What was heard is shown whatever the terminal's encoding.
        sys.stdout.reconfigure(errors="backslashreplace")
    options = parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        code = run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read us has seen enough (`| head`). Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - whatever it is has an exit code
        if options.debug:
            traceback.print_exc()
        return _failed(error)
    return code


def _failed(error: Exception) -> int:
    """Say what went wrong in one sentence (of several problems, one each), and give the exit code."""
    for line in str(error).splitlines() if isinstance(error, ListenerError) else ():
        print(f"listener: {line}", file=sys.stderr)
    match error:
        case SettingsError() | InvalidRequest():
            return USAGE
        case StoreError():
            return STORE
        case RemoteError():
            return REMOTE
        case ListenerError():
            return NEGATIVE
        case _:
            said = f"{type(error).__name__}: {error}"
            print(f"listener: a defect of ours: {said}; --debug shows where", file=sys.stderr)
            return INTERNAL
