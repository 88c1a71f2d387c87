"""The command line: what is printed where, and with which exit code."""

import asyncio
import io
import json
import os
import pty
import re
import socket
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from listener import __version__, cli
from listener.cli import decoded_lines, dialable, main, parser, split_messages
from listener.configuration import DEMO_CONFIG
from listener.core.calls import Cover, Heard
from listener.core.moments import moment
from listener.errors import (
    ListenerError,
    LoginRefused,
    RemoteUnavailable,
    SchemaOutdated,
    SettingsError,
    StoreUnavailable,
)
from listener.store.claim import Claim
from listener.store.journal import AccountRow, Journal
from listener.store.spool import Spool
from tests.support.centres import Centres, centres
from tests.support.running import InProcess

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)

COMMANDS = (
    *("run", "demo", "simulate", "decode", "calls", "call", "coverage", "dials", "dial", "record", "spool"),
    *("db", "check-config"),
)


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty directory, with no setting of the machine's."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("LISTENER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("listener.configuration.CONFIG_FILES", (Path("listener.toml"),))


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


# ── Help ──────────────────────────────────────────────────────────────────────────────────────────────


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` lists the commands with what they are for, examples, and the exit codes."""
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command}" in text
    assert "exit codes:" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command explains itself and its options, with an example and what its exit codes mean."""
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "exit code" in text.casefold()
    assert f"\n  listener {command}" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`--version` says which."""
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"listener {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["dance"], ["run", "--loud"], ["calls", "--since", "teatime"]])
def test_wrong_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What is not understood is said on standard error, with exit code 2."""
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == cli.USAGE
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["calls", "--limit", "0"], "--limit: 1 to 1000"),
        (["calls", "--limit", "-1"], "--limit: 1 to 1000"),
        (["calls", "--limit", "1001"], "--limit: 1 to 1000"),
        (["calls", "--limit", "ten"], "--limit: 1 to 1000"),
        (["calls", "--after", "teatime"], "--after: 'teatime' is not where a list ended"),
        (["calls", "--direction", "up"], "--direction: inbound, outbound or unknown, not 'up'"),
        (["calls", "--last", "2026-03-02"], "--last: '2026-03-02' is no length of time"),
        (["calls", "--last", "1h", "--since", "2h"], "--since/--from: not allowed with argument --last"),
        (["coverage", "--limit", "0"], "--limit: a whole number from 1 on"),
        (["coverage", "--width", "5"], "--width: 20 to 2000"),
        (["coverage", "--last", "now"], "--last: 'now' is no length of time"),
        (["calls", "--number", "-"], "--number: '-' has no digit"),
        (["calls", "--number-ends", " "], "--number-ends: ' ' has no digit"),
        (["simulate", "--port", "65536"], "--port: 0 to 65535"),
        (["simulate", "--port=-1"], "--port: 0 to 65535"),
        (["simulate", "--seconds=-1"], "--seconds: a number above 0"),
        (["demo", "--seconds", "-3"], "--seconds: a number above 0"),
        (["demo", "--seconds", "nan"], "--seconds: a number above 0"),
        (["demo", "--rate", "0"], "--rate: a number above 0"),
        (["demo", "--accounts", "0"], "--accounts: a whole number from 1 on"),
    ],
)
def test_values_out_of_bounds_are_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A value that cannot be is refused before anything starts, with those that can."""
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == cli.USAGE
    assert f"error: {said}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_demo_seconds_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """DEMO_SECONDS is held to the same bounds."""
    for value in ("-3", "soon", "0"):
        monkeypatch.setenv("DEMO_SECONDS", value)
        code, _, said = _run(capsys, "demo")
        assert code == cli.USAGE
        assert f"DEMO_SECONDS={value}: write a number of seconds above 0" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["calls", "coverage"])
def test_a_period_that_runs_backwards(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--until before --since is a mistake and no empty answer."""
    for begin, end in (("--since", "--until"), ("--from", "--to"), ("--last", "--to")):
        code, out, said = _run(capsys, command, begin, "1h", end, "2h")
        assert (code, out) == (cli.USAGE, "")
        assert "--until is before --since" in said


@pytest.mark.parametrize(
    ("arguments", "usage", "meant"),
    [
        (["calls", "--acount", "x"], "usage: listener calls ", "--account"),
        (["run", "--confg=x"], "usage: listener run ", "--config"),
        (["--debgu", "run"], "usage: listener ", "--debug"),
        (["covrage"], "usage: listener ", "coverage"),
        (["calls", "-o", "jsn"], "usage: listener calls ", "json"),
    ],
)
def test_what_was_meant(
    arguments: list[str], usage: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was misspelt is said with the usage of its own command and the nearest that there is."""
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == cli.USAGE
    said = capsys.readouterr().err
    assert said.startswith(usage)
    assert said.endswith(f"did you mean {meant}?\n")


@pytest.mark.parametrize(
    ("typed", "number"),
    [
        ("5001", "5001"),
        ("+1 202-555-0112", "+12025550112"),
        ("(202) 555.0112", "2025550112"),
        ("030/901820", "030901820"),
        ("agent-5@example.org", "agent-5@example.org"),
    ],
)
def test_numbers_as_people_write_them(typed: str, number: str) -> None:
    """Blanks and punctuation do not count; what has letters is a name."""
    assert dialable(typed) == number


def test_help_starts_fast(tmp_path: Path) -> None:
    """`--help` and `decode` import neither the database nor the web: a person waits for them."""
    message = tmp_path / "message"
    message.write_bytes(RINGING)
    script = (
        "import sys; from listener.cli import main\n"
        "main(['decode', sys.argv[1]])\n"
        "heavy = {'sqlalchemy', 'asyncpg', 'aiohttp', 'pydantic', 'rich', 'alembic', 'prometheus_client'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(message)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_options_may_stand_before_and_after_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is given before the command is not undone after it."""
    config = tmp_path / "a.toml"
    config.write_text("[log]\nlevel = 'loud'\n")
    code, _, said = _run(capsys, "-c", str(config), "check-config", "--set", "log.format=x")
    assert code == cli.USAGE
    assert f"{config}:2" in said
    assert "flag --set log.format" in said
    code, _, said = _run(capsys, "--set", "log.level=x", "check-config", "--set", "log.format=x")
    assert "log.level" in said
    assert "log.format" in said
    assert parser().parse_args(["--debug", "check-config"]).debug
    assert parser().parse_args(["check-config", "--debug"]).debug


# ── Failures ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SettingsError("cause; cure"), 2),
        (StoreUnavailable("cause; cure"), 3),
        (SchemaOutdated("cause; cure"), 3),
        (LoginRefused("cause; cure"), 4),
        (RemoteUnavailable("cause; cure"), 4),
        (ListenerError("cause; cure"), 1),
    ],
)
def test_known_failures_are_a_sentence_and_a_code(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each kind of failure has its exit code, and is one sentence without a traceback."""

    def fail(options: object) -> int:
        raise error

    monkeypatch.setattr(cli, "_check_config", fail)
    assert _run(capsys, "check-config") == (code, "", "listener: cause; cure\n")
    code_, _, said = _run(capsys, "check-config", "--debug")
    assert code_ == code
    assert "Traceback" in said


def test_a_defect_is_said_to_be_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What should not happen is called a defect, with the way to see more."""

    def fail(options: object) -> int:
        return 1 // 0

    monkeypatch.setattr(cli, "_check_config", fail)
    code, out, said = _run(capsys, "check-config")
    assert (code, out) == (cli.INTERNAL, "")
    assert said.startswith("listener: a defect of ours: ZeroDivisionError: ")
    assert "--debug" in said
    code, _, said = _run(capsys, "check-config", "--debug")
    assert code == cli.INTERNAL
    assert said.startswith("Traceback")


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C is no failure to explain."""

    def interrupt(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_check_config", interrupt)
    assert _run(capsys, "check-config") == (cli.INTERRUPTED, "", "")


def test_a_reader_that_leaves_early(tmp_path: Path) -> None:
    """`listener decode … | head -1` ends quietly."""
    messages = tmp_path / "messages"
    messages.write_text('{"call": {"id": "c", "state": "Ringing"}}\n' * 20_000)
    command = [sys.executable, "-m", "listener", "decode", str(messages)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 0


# ── Configuration ─────────────────────────────────────────────────────────────────────────────────────


def test_check_config_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings that can be run with are "ok", with what is in them."""
    (tmp_path / "listener.toml").write_text(
        "[environments.a]\nbase_url = 'http://a'\n"
        "[[accounts]]\nenvironment = 'a'\nlogin = 'x'\npassword = 'p'\n"
        "[[accounts]]\nenvironment = 'a'\nlogin = 'y'\npassword = 'p'\n"
    )
    assert _run(capsys, "check-config") == (0, "listener.toml: ok, 1 environment, 2 accounts\n", "")


def test_check_config_finds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a file there is nothing to listen to, which `run` would refuse too."""
    code, out, said = _run(capsys, "check-config")
    assert (code, out) == (cli.USAGE, "")
    assert "no listener.toml" in said


def test_the_demos_settings_are_for_questions_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run` does not fall back on them: their contact centre has ended, and the gaps would be the demo's."""
    monkeypatch.setattr("listener.configuration.CONFIG_FILES", (Path("listener.toml"), DEMO_CONFIG))
    (tmp_path / ".demo").mkdir()
    (tmp_path / ".demo" / "listener.toml").write_text(
        "[environments.a]\nbase_url = 'http://a'\n"
        "[[accounts]]\nenvironment = 'a'\nlogin = 'x'\npassword = 'p'\n"
    )
    code, out, said = _run(capsys, "run")
    assert (code, out) == (cli.USAGE, "")
    assert "`run` does not take .demo/listener.toml" in said
    assert _run(capsys, "check-config")[0] == 0


def test_check_config_without_an_account(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that names no account is no more "ok" than `run` would find it."""
    (tmp_path / "listener.toml").write_text("[environments.a]\nbase_url = 'http://a'\n")
    code, out, said = _run(capsys, "check-config")
    assert (code, out) == (cli.USAGE, "")
    assert said.startswith("listener: listener.toml: [[accounts]]: there is no account to listen to")
    assert _run(capsys, "run")[0] == cli.USAGE


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://[nowhere",
        "postgresql://u:se[cret@h/x",
        "postgresql://h:abc/x",
        "postgresql://a:5432,b:99999/x",
    ],
)
def test_an_address_that_cannot_be_read(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Is a setting that is wrong, and no defect of ours; what it holds may be secret and is not repeated."""
    for command in (["db", "current"], ["calls"], ["run"], ["check-config"]):
        code, out, said = _run(capsys, *command, "--set", f"store.dsn={dsn}")
        assert (code, out) == (cli.USAGE, "")
        told = (
            "listener: flag --set store.dsn: store.dsn: it cannot be read as an address; write postgresql://"
        )
        assert said.splitlines()[-1].startswith(told)
        assert dsn.removeprefix("postgresql://") not in said


@pytest.mark.parametrize("dsn", ["a:5432,b:5433", "u:p%5Bw@[::1]:5432", "", "%2Ftmp", "u@"])
def test_an_address_of_any_form_is_taken(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Several hosts, IPv6, none at all, a socket: what is read here is read by the driver alone."""
    code, _, said = _run(capsys, "check-config", "--set", f"store.dsn=postgresql://{dsn}/x")
    assert code == cli.USAGE
    assert "no account to listen to" in said


def test_check_config_names_every_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings that cannot be run with are named line by line, with exit code 2; that they name nobody to
    listen to is one of them, and `run` says the same."""
    (tmp_path / "listener.toml").write_text("[log]\nlevel = 'x'\n[stor]\n")
    code, out, said = _run(capsys, "check-config")
    assert (code, out) == (2, "")
    assert _run(capsys, "run") == (code, out, said)
    assert [line.partition(": ")[2].partition(": ")[0] for line in said.splitlines()] == [
        "listener.toml",
        "listener.toml:2",
        "listener.toml:3",
    ]


def test_a_flag_without_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    """--set wants KEY=VALUE, and says so."""
    code, _, said = _run(capsys, "check-config", "--set", "log.level")
    assert code == cli.USAGE
    assert "--set section.key=value" in said
    _, _, said = _run(capsys, "check-config", "--set", "log.level", "--set", "log.format")
    assert len(said.splitlines()) == 2


def test_run_without_accounts(capsys: pytest.CaptureFixture[str]) -> None:
    """With nothing to listen to, `run` says how to begin."""
    code, _, said = _run(capsys, "run")
    assert code == cli.USAGE
    assert "deploy/listener.example.toml" in said


def test_simulate_refuses_nonsense(capsys: pytest.CaptureFixture[str]) -> None:
    """A fault without a share, an unknown one and an unknown dialect are refused."""
    for arguments in (["--fault", "delay"], ["--fault", "sunspots=1"], ["--dialect", "latin"]):
        code, out, said = _run(capsys, "simulate", "--seconds", "0.1", *arguments)
        assert (code, out) == (cli.USAGE, "")
        assert said.startswith("listener: ")


def test_simulate_without_its_redis(capsys: pytest.CaptureFixture[str]) -> None:
    """It does not begin, rather than end with the first record."""
    redis = ("--click2dial", "0", "--redis", "redis://127.0.0.1:9/0")
    code, out, said = _run(capsys, "simulate", "--seconds", "0.1", *redis)
    assert (code, out) == (cli.USAGE, "")
    assert said.startswith("listener: simulator: no Redis answers where Click2Dial's records go (")
    assert said.count("\n") == 1


def test_simulate_on_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    """A port that somebody has is named, with the way out."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, out, said = _run(capsys, "simulate", "--seconds", "0.1", "--port", port)
    assert (code, out) == (cli.USAGE, "")
    assert said == f"listener: --port {port}: it is taken; name another, or 0 for any free one\n"


def test_simulate_says_where_it_is_and_what_it_sent(capsys: pytest.CaptureFixture[str]) -> None:
    """`simulate --seconds` prints its address first and its account of itself last, as JSON lines."""
    code, out, _ = _run(capsys, "simulate", "--seconds", "0.2", "--rate", "100", "--accounts", "3")
    assert code == 0
    there, told = map(json.loads, out.splitlines())
    assert there["url"].startswith("http://127.0.0.1:")
    assert (there["first"], there["last"]) == ("agent5000", "agent5002")
    assert told["sent"] >= 20
    assert told["unsubscribed"] == told["sent"]


# ── Times ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("now", NOON),
        ("90s", NOON - timedelta(seconds=90)),
        ("1.5h", NOON - timedelta(minutes=90)),
        ("2d", NOON - timedelta(days=2)),
        ("2w", NOON - timedelta(days=14)),
        ("2026-03-01T10:00Z", datetime(2026, 3, 1, 10, tzinfo=UTC)),
        ("2026-03-01T10:00+02:00", datetime(2026, 3, 1, 8, tzinfo=UTC)),
        ("2026-03-01", datetime(2026, 3, 1).astimezone(UTC)),
    ],
)
def test_times(text: str, meant: datetime) -> None:
    """So long ago, or a moment, which is local time unless it says otherwise."""
    assert moment(text, NOON) == meant


@pytest.mark.parametrize(
    "text", ["", "h", "1y", "-1h", "99999999999d", "2026-13-01", "0001-01-01T00:00+14:00"]
)
def test_times_that_are_none(text: str) -> None:
    """Anything else is refused with examples of what to write."""
    with pytest.raises(ValueError, match=r"write 90m, 1h, 2d|too long ago"):
        moment(text, NOON)


# ── decode ────────────────────────────────────────────────────────────────────────────────────────────

RINGING = (
    b'{"messageType":"CallStateChangeMessage","notificationType":"StatusChange",'
    b'"call":{"id":"c","state":"Ringing"}}'
)
TALKING = RINGING.replace(b"Ringing", b"Established")


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        (b"", []),
        (b"\n \n", []),
        (RINGING, [RINGING]),
        (b"\xef\xbb\xbf" + RINGING + b"\r\n", [RINGING]),
        (
            json.dumps(json.loads(RINGING), indent=2).encode(),
            [json.dumps(json.loads(RINGING), indent=2).encode()],
        ),
        (b"[" + RINGING + b" , " + TALKING + b"]", [RINGING, TALKING]),
        (b"[]", []),
        (RINGING + b"\n\n" + TALKING + b"\n", [RINGING, TALKING]),
        (b"[" + RINGING + b"]\n[" + TALKING + b"]", [RINGING, TALKING]),
        (RINGING + b"\nnonsense\n" + TALKING, [RINGING, b"nonsense", TALKING]),
        (b"{'single':\n'quotes'}", [b"{'single':\n'quotes'}"]),
        (b"\xff\xfe", [b"\xff\xfe"]),
    ],
)
def test_where_a_message_ends(content: bytes, messages: list[bytes]) -> None:
    """One document, an array, or lines of either; exact bytes; what is no JSON is one message."""
    assert split_messages(content) == messages


def test_decode_follows_a_call() -> None:
    """Messages of one file continue each other: the second changes the call that the first opened."""
    first, second = decoded_lines([RINGING, TALKING], NOON)
    assert first["decoded"]["state"] == "Ringing"
    assert first["steps"][0]["began"]
    assert second["steps"][0]["changes"] == (
        {"field": "state", "before": "Ringing", "after": "Established", "key": ""},
    )
    assert second["steps"][0]["call"]["id"] == first["steps"][0]["call"]["id"]


def test_decode_says_why_not(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What is not recognised is said with its reason; exit code 1, also when the rest was."""
    path = tmp_path / "messages"
    path.write_bytes(RINGING + b'\n{"a": 1}\n')
    code, out, said = _run(capsys, "decode", str(path))
    recognised, other = map(json.loads, out.splitlines())
    assert (code, said) == (cli.NEGATIVE, "")
    assert recognised["kind"] == "notification"
    assert other["kind"] == "unrecognised"
    assert other["reason"]


def test_decode_reads_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a file, and with "-", standard input is read."""
    for arguments in ([], ["-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(RINGING)))
        code, out, _ = _run(capsys, "decode", *arguments)
        assert code == 0
        assert json.loads(out)["decoded"]["call_id"] == "c"


@pytest.mark.parametrize("content", [b"", b"[]", b"\n \n"])
def test_decode_of_nothing(content: bytes, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A file without a message is no success: something before it went wrong."""
    (tmp_path / "messages").write_bytes(content)
    assert _run(capsys, "decode", "messages") == (1, "", "listener: messages: empty: no message in it\n")


def test_decode_on_a_terminal_says_that_it_waits(tmp_path: Path) -> None:
    """Without a file, who sits at a terminal is told what is expected of him."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "listener", "decode"]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        os.close(theirs)
        assert child.stderr is not None
        assert child.stderr.readline() == b"listener: reading standard input; Ctrl-D ends it\n"
        os.write(ours, b"\x04")
        assert child.stderr.read() == b"listener: standard input: empty: no message in it\n"
    os.close(ours)
    assert child.returncode == cli.NEGATIVE


def test_decode_of_a_file_that_cannot_be_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing file, a directory, and one that is too large are each refused in a sentence."""
    large = tmp_path / "large"
    large.write_bytes(b"x" * 100)
    monkeypatch.setattr(cli, "DECODE_BYTES_MAX", 99)
    for name, part in {
        "none": "No such file",
        str(tmp_path): "Is a directory",
        str(large): "larger than 99 bytes",
    }.items():
        code, out, said = _run(capsys, "decode", name)
        assert (code, out) == (cli.USAGE, "")
        assert part in said


_JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.binary() | _JSON.map(lambda value: json.dumps(value).encode()))
def test_decode_is_total(content: bytes) -> None:
    """Whatever the bytes: lines of JSON, and no traceback."""
    for line in decoded_lines(split_messages(content), NOON):
        assert json.loads(json.dumps(line))["kind"] in {"notification", "snapshot", "aside", "unrecognised"}


# ── db ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_tables_are_made_and_named(empty_database: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`db current` is 1 on an empty database and says the cure; `db upgrade` is that, and can be repeated."""
    dsn = ["--set", f"store.dsn={empty_database}"]
    code, out, said = _run(capsys, "db", "current", *dsn)
    assert (code, out) == (cli.NEGATIVE, "empty\n")
    assert "listener db upgrade" in said
    code, out, _ = _run(capsys, "db", "upgrade", *dsn)
    assert code == 0
    assert out.startswith("empty -> ")
    revision = out.split()[-1]
    assert _run(capsys, "db", "upgrade", *dsn) == (0, f"{revision}, nothing to do\n", "")
    assert _run(capsys, "db", "current", *dsn) == (0, f"{revision}\n", "")


def test_a_database_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    """No server at the address is 3; no bundled server's directory is 3 with the ways to make one."""
    code, out, said = _run(capsys, "db", "current", "--set", "store.dsn=postgresql://x@127.0.0.1:1/x")
    assert (code, out) == (cli.STORE, "")
    assert said.startswith("listener: PostgreSQL does not answer")
    assert "store.dsn" in said
    code, out, said = _run(capsys, "db", "current")
    assert (code, out) == (cli.STORE, "")
    assert "`listener run` makes one, `make demo` one to try" in said


# ── Questions ─────────────────────────────────────────────────────────────────────────────────────────


def _said(state: str, participants: str = '[{"phoneNumber":"5002"}]') -> bytes:
    return (
        b'{"messageType":"CallStateChangeMessage","notificationType":"StatusChange","phoneNumber":"5001","call":'
        b'{"id":"uuid-1","callType":"Internal","state":"%s","participants":%s}}'
    ) % (state.encode(), participants.encode())


async def _remember(dsn: str, *messages: bytes) -> None:
    """Store messages of one account, two seconds apart, the last just now; and that it was observed."""
    async with await Journal.open(dsn) as journal:
        account = (await journal.register([AccountRow("agent5001", "north", "prod")]))["agent5001"]
        began = datetime.now(UTC) - timedelta(seconds=2 * len(messages))  # noqa: TID251 - "--since 1h" is real
        await journal.cover([Cover(account, began)])
        stream = str(uuid4())
        heard = []
        for position, raw in enumerate(messages, 1):
            at = began + timedelta(seconds=2 * position)
            heard.append(Heard(account, stream, position, at, "/v2/me/calls", raw))
        await journal.record(heard)


@pytest.fixture
def remembered(database: str) -> Iterator[list[str]]:
    """The flags that name a database in which one call of agent5001 with 5002 is stored, and which a listener
    has claimed."""
    with asyncio.Runner() as runner:
        runner.run(_remember(database, _said("Dialing"), _said("Established"), _said("Released", "[]")))
        claim = runner.run(Claim.take(database))
        yield ["--set", f"store.dsn={database}"]
        runner.run(claim.release())


def test_the_calls_to_a_number_and_who_was_on_them(
    remembered: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The question of the README: a table with the participants, and the observed share below it."""
    code, out, said = _run(capsys, "calls", "--number", "5002", "--since", "1h", *remembered)
    assert (code, said) == (0, "")
    (row,) = [line for line in out.splitlines() if "agent5001" in line]
    assert "5001 → 5002" in row
    assert "answered" in row
    assert re.search(r"^1 call; observed: .* % of the time from ", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--number", "5001"], True),
        (["--number", "500"], False),
        (["--number", " 50-02 "], True),
        (["--number-ends", "02"], True),
        (["--account", "agent5001"], True),
        (["--tenant", "north"], True),
        (["--account", "agent5001", "agent5001", "--tenant", "north"], True),
        (["--direction", "Outbound"], True),
        (["--direction", "inbound"], False),
        (["--from", "1h", "--to", "now"], True),
        (["--last", "1h"], True),
        (["--state", "Released"], True),
        (["--state", "rELEASED"], True),
        (["--state", "Held"], False),
        (["--live"], False),
        (["--until", "1h"], False),
        (["--since", "now"], False),
        (["--limit", "1"], True),
    ],
)
def test_filters(
    arguments: list[str], found: bool, remembered: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each filter chooses; an answer without a call is exit code 1, and still says what was observed."""
    code, out, _ = _run(capsys, "calls", *arguments, *remembered)
    assert code == (cli.OK if found else cli.NEGATIVE)
    assert ("agent5001" in out) == found
    assert "observed: " in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["calls", "--account", "agent5009"], 'no account "agent5009"; did you mean agent5001?'),
        (["calls", "--account", "agent5001", "--account", "x"], 'no account "x"; `listener coverage` lists'),
        (["calls", "--account", "agent5001", "x"], 'no account "x"; `listener coverage` lists'),
        (["calls", "--tenant", "nroth"], 'no tenant "nroth"; did you mean north?'),
        (["coverage", "--account", "5001"], 'no account "5001"; did you mean agent5001?'),
    ],
)
def test_a_name_that_nobody_has(
    arguments: list[str], said: str, remembered: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelt account or tenant is said to be none, which an empty list would hide."""
    code, out, told = _run(capsys, *arguments, *remembered)
    assert (code, out) == (cli.NEGATIVE, "")
    assert told.startswith(f"listener: there is {said}")


def test_calls_as_json(remembered: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """`-o json` is one document with the calls, the observed share and where to go on."""
    code, out, _ = _run(capsys, "calls", "-o", "json", *remembered)
    assert code == 0
    told = json.loads(out)
    assert [found["call"]["outcome"] for found in told["calls"]] == ["answered"]
    assert 0 < told["observed"] <= 1
    assert told["after"] is None


@pytest.mark.parametrize("by", ["id", "call_id"])
def test_all_that_happened_on_a_call(
    by: str, remembered: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """`call ID` tells every change, in order, by our id or by one of the contact centre's."""
    _, out, _ = _run(capsys, "calls", "-o", "json", *remembered)
    name = str(json.loads(out)["calls"][0]["call"][by])
    code, out, _ = _run(capsys, "call", name, *remembered)
    assert code == 0
    places = [
        out.index(part)
        for part in (
            "state: Dialing",
            "participant 5002 joins",
            "Dialing → Established",
            "Established → Released",
        )
    ]
    assert places == sorted(places)
    code, out, _ = _run(capsys, "call", name, "-o", "json", *remembered)
    (timeline,) = json.loads(out)
    assert [moment["raw"] for moment in timeline["moments"]] == [
        raw.decode() for raw in (_said("Dialing"), _said("Established"), _said("Released", "[]"))
    ]


def test_a_call_that_is_not_known(remembered: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown id is exit code 1 and a sentence."""
    code, out, said = _run(capsys, "call", "nobody", *remembered)
    assert (code, out) == (cli.NEGATIVE, "")
    assert said.startswith("listener: no call is known as nobody")


def test_who_was_observed(remembered: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """`coverage` tells how much of each account was observed; `--gaps` when not; JSON all of it."""
    code, out, said = _run(capsys, "coverage", *remembered)
    assert (code, said) == (0, "")
    assert re.search(r"^agent5001 +north +100 % +0 +observed", out, re.MULTILINE)
    assert re.search(r"^now: 1 observed$", out, re.MULTILINE)
    code, out, _ = _run(capsys, "coverage", "--gaps", "--last", "1h", *remembered)
    assert code == 0
    assert "all (1)" in out
    code, out, _ = _run(capsys, "coverage", "-o", "json", "--tenant", "north", *remembered)
    told = json.loads(out)
    assert (code, told["total"]["percent"], told["accounts"][0]["account"]) == (0, 100.0, "agent5001")


def test_who_was_observed_as_a_picture(remembered: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """`-o strip` draws a line for each account, as wide as is asked for; `--gaps` has no place in it."""
    code, out, said = _run(capsys, "coverage", "-o", "strip", "--width", "60", *remembered)
    assert (code, said) == (0, "")
    line, times = out.splitlines()[:2]
    assert re.fullmatch(r"agent5001 ━+ 100 %", line)
    assert len(line) == 60
    assert len(times) <= 60
    code, out, said = _run(capsys, "coverage", "-o", "strip", "--gaps", *remembered)
    assert (code, out) == (cli.USAGE, "")
    assert "--gaps is for the table" in said


def test_the_picture_fits_the_terminal(remembered: list[str]) -> None:
    """On a terminal it is as wide as that, and in colours."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 70))
    environment = {key: value for key, value in os.environ.items() if key not in {"NO_COLOR", "COLUMNS"}}
    command = [sys.executable, "-m", "listener", "coverage", "-o", "strip", *remembered]
    with subprocess.Popen(command, stdout=theirs, env=environment | {"TERM": "xterm"}) as child:
        assert child.wait(60) == 0
    os.close(theirs)
    line = os.read(ours, 65536).decode().splitlines()[0]
    os.close(ours)
    assert "\x1b[32m" in line
    assert len(re.sub(r"\x1b\[[0-9;]*m", "", line)) == 70


@pytest.mark.parametrize("output", ["table", "strip", "json"])
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--from", "2000-01-01", "--to", "2000-01-02"], "not started: the first account was added "),
        (["--from", "2100-01-01"], "not started: the time from 2100-01-01 00:00:00 on is still to come"),
    ],
)
def test_a_time_in_which_nobody_was_watched(
    output: str, asked: list[str], said: str, remembered: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first account and after now nothing is claimed: exit code 1, and why."""
    code, out, _ = _run(capsys, "coverage", *asked, "-o", output, *remembered)
    assert code == cli.NEGATIVE
    if output == "json":
        assert json.loads(out)["total"]["percent"] is None
    else:
        assert out.startswith(said)


@pytest.mark.parametrize("question", [["calls"], ["call", "1"], ["coverage"]])
def test_questions_to_an_empty_database(
    question: list[str], empty_database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A database without our tables is exit code 3, with the cure."""
    code, out, said = _run(capsys, *question, "--set", f"store.dsn={empty_database}")
    assert (code, out) == (cli.STORE, "")
    assert "listener db upgrade" in said


# ── The spool ─────────────────────────────────────────────────────────────────────────────────────────


def _waiting(account: int, count: int) -> list[Heard]:
    return [Heard(account, f"s{account}", at, NOON, "/v2/me/calls", b"{}") for at in range(1, count + 1)]


def test_spool_says_that_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    """Which is how it should be, and is no failure; it says where it looked."""
    code, out, _ = _run(capsys, "spool", "--verify")
    assert code == 0
    assert "listener-data-spool: there is none" in out


def test_spool_shows_what_waits_and_for_whom(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Segments, accounts, and that a listener uses it; the same as JSON."""
    spool = Spool.open(tmp_path / "listener-data-spool")
    spool.append([_waiting(1, 2), _waiting(7, 3)])
    code, out, _ = _run(capsys, "spool")
    assert code == 0
    assert "a listener uses it" in out
    assert "account 7 in the database: 3 notifications" in out
    assert "5 notifications on disk that the database does not have yet" in out
    spool.close()
    code, out, _ = _run(capsys, "spool", "--verify", "-o", "json")
    told = json.loads(out)
    assert (code, told["in_use"], told["notifications"], told["accounts"]) == (0, False, 5, {"1": 2, "7": 3})


def test_spool_verify_is_1_when_a_record_is_damaged(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Before it was set aside and afterwards; without --verify it is said all the same."""
    spool = Spool.open(tmp_path / "listener-data-spool")
    spool.append([_waiting(1, 2)])
    spool.close()
    (path,) = (tmp_path / "listener-data-spool").glob("*.spool")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert _run(capsys, "spool", "--verify")[0] == 1
    Spool.open(tmp_path / "listener-data-spool").close()
    code, out, _ = _run(capsys, "spool", "--verify")
    assert code == 1
    assert "set aside as damaged: 000000000001-40.damaged" in out
    assert _run(capsys, "spool")[0] == 0


# ── Dials ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def dialling(
    redis_url: str, database: str, tmp_path: Path
) -> AsyncIterator[tuple[Centres, Callable[..., Awaitable[int]]]]:
    """A listener that runs, with all three systems; and the command line, which finds it by its settings."""
    async with centres(redis_url) as there, InProcess(there.settings(database)).running() as listener:
        room = listener.daemon._room
        assert room is not None
        config = tmp_path / "listener.toml"
        config.write_text(there.toml(database).replace("[api]\nport = 0", f"[api]\nport = {room.port}"))

        # What the listener logs is no answer of the command line's.
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(file=io.StringIO()))

        async def run(*arguments: str) -> int:
            return await asyncio.to_thread(main, (*arguments, "-c", str(config)))

        try:
            yield there, run
        finally:
            structlog.reset_defaults()


async def test_dials_are_placed_followed_and_told(
    dialling: tuple[Centres, Callable[..., Awaitable[int]]], capsys: pytest.CaptureFixture[str]
) -> None:
    """From `dial --wait` over the list and one dial's facts to why: each is asked of the same dials."""
    there, run = dialling
    there.click2dial.scripts |= {"0820001234": "answered", "0820001235": "busy"}
    click2dial = ("dial", "click2dial", "--agent", "2001", "--outbound-id", "27110009000")
    assert await run("dial", "gws", "--by", "agent5000", "5001", "--wait") == cli.OK
    states = capsys.readouterr().out.splitlines()
    id = states[0].split()[0]
    assert {line.split()[0] for line in states} == {id}
    assert states[-1] == f"{id} answered"
    spring = ("--key", "k1", "--campaign", "spring")
    assert await run(*click2dial, "0820001235", "--wait", "-o", "json", *spring) == cli.NEGATIVE
    busy = json.loads(capsys.readouterr().out)
    assert (busy["outcome"], busy["cause"]["code"], busy["key"]) == ("busy", "busy 17", "k1")
    assert await run(*click2dial, "0820001234") == cli.OK
    assert capsys.readouterr().out.split()[1] in {"accepted", "answered"}
    assert await run("dials", "--system", "noojee", "click2dial", "--outcome", "busy", "-o", "json") == cli.OK
    assert [each["id"] for each in json.loads(capsys.readouterr().out)["dials"]] == [busy["id"]]
    assert await run("dials", "--after", "zzz") == cli.USAGE
    assert "after: is not where a page ended; take it from the page before" in capsys.readouterr().err
    assert await run("dials", "--outcome", "answered", "--system", "gws") == cli.OK
    table = capsys.readouterr().out
    assert id in table
    assert busy["id"] not in table
    assert "1 dial; observed: " in table
    assert await run("dials", "--cause", "busy 17", "-o", "json") == cli.OK
    page = json.loads(capsys.readouterr().out)
    assert [each["id"] for each in page["dials"]] == [busy["id"]]
    assert await run("dials", "--campaign", "autumn", "spring", "-o", "json") == cli.OK
    assert [each["id"] for each in json.loads(capsys.readouterr().out)["dials"]] == [busy["id"]]
    assert await run("dials", "--why", "--campaign", "autumn") == cli.NEGATIVE
    assert "Nothing was dialled in this period." in capsys.readouterr().out
    assert await run("dials", busy["id"]) == cli.OK
    told = capsys.readouterr().out
    assert "end_reason busy 17" in told
    assert "certain by reference, number, device, time" in told
    assert await run("dials", "d-none") == cli.NEGATIVE
    assert "there is no dial d-none" in capsys.readouterr().err
    assert await run("dials", "--number", "5999") == cli.NEGATIVE
    assert "no dials; observed: " in capsys.readouterr().out
    assert await run("dials", "--why", "--last", "1h") == cli.OK
    why = capsys.readouterr().out
    assert "1 of " in why
    assert "end_reason busy 17" in why
    assert await run("dials", "--why", "-o", "json") == cli.OK
    assert json.loads(capsys.readouterr().out)["now"]["failures"] == 1


async def test_what_a_dial_is_refused_for_is_said(
    dialling: tuple[Centres, Callable[..., Awaitable[int]]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """One sentence with the cure, and the exit code that says whose matter it is."""
    there, run = dialling
    record = tmp_path / "record.json"
    record.write_text("[]")
    cases: list[tuple[int, str, tuple[str, ...]]] = [
        (cli.USAGE, "number: '50 01' has a blank; write it", ("dial", "gws", "--by", "agent5000", "50 01")),
        (cli.NEGATIVE, "no account 'eve'; known are agent5000", ("dial", "gws", "--by", "eve", "5001")),
        (cli.USAGE, "account: does not say by whom to dial; name it", ("dial", "gws", "5001")),
        (
            cli.USAGE,
            "it is no JSON object",
            ("dial", "preview", "--by", "agent5000", "--record", str(record)),
        ),
        (cli.USAGE, "name either the dial, or", ("dial", "hangup")),
        (cli.NEGATIVE, "there is no dial 'd-none'", ("dial", "hangup", "d-none")),
        (cli.REMOTE, "noojee refused: Code -1", ("record", "start", "--exten-or-unique-id", "101")),
        (
            cli.USAGE,
            "begins with neither 0, 27 nor 00",
            ("dial", "click2dial", "--agent", "2001", "--outbound-id", "27110009000", "5001"),
        ),
        (cli.REMOTE, "no listener answers at", ("dial", "gws", "5001", "--set", "api.port=9")),
        (cli.USAGE, "api.port is 0", ("dial", "gws", "5001", "--set", "api.port=0")),
        (cli.USAGE, "refuses the token", ("dial", "gws", "5001", "--set", "api.token=wrong")),
    ]
    for code, said, arguments in cases:
        assert await run(*arguments) == code, arguments
        error = capsys.readouterr().err
        assert said in error, arguments
        assert error.count("\n") == 1, error
    assert there.noojee.calls == []
    assert there.click2dial.calls == []


async def test_who_waits_is_told_that_nobody_answered_so_far(
    dialling: tuple[Centres, Callable[..., Awaitable[int]]], capsys: pytest.CaptureFixture[str]
) -> None:
    """That is no success, and says where to look later."""
    there, run = dialling
    there.noojee.scripts["0383208100"] = "silent"
    noojee = ("dial", "noojee", "--exten-or-unique-id", "SIP/101", "--wait", "--wait-s")
    assert await run(*noojee, "0.5", "0383208100") == cli.NEGATIVE
    said = capsys.readouterr()
    assert "no end so far" in said.err
    id = said.out.split()[0]
    assert await run("dial", "hangup", id) == cli.NEGATIVE
    assert "was not heard yet" in capsys.readouterr().err


async def test_a_hang_up_says_how_the_dial_stands(
    dialling: tuple[Centres, Callable[..., Awaitable[int]]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one that is over its outcome, which nothing changes any more."""
    _, run = dialling
    assert await run("dial", "gws", "--by", "agent5000", "5001", "--wait") == cli.OK
    id = capsys.readouterr().out.split()[0]
    assert await run("dial", "hangup", id) == cli.OK
    assert capsys.readouterr().out == f"{id} answered\n"


async def test_a_call_of_noojees_is_recorded_answered_and_hung_up(
    dialling: tuple[Centres, Callable[..., Awaitable[int]]],
) -> None:
    """Each command is the request that its vendor's page shows."""
    there, run = dialling
    there.noojee._time_scale = 1.0
    there.noojee.scripts["0383208100"] = "silent"
    dial = ("dial", "noojee", "0383208100", "--exten-or-unique-id", "SIP/101")
    assert await run(*dial, "--record", "--tag", "22", "--phone-caption", "My Brand") == cli.OK
    (call,) = there.noojee.calls
    assert call.arguments == {
        "phoneCaption": "My Brand",
        "number": "0383208100",
        "extenOrUniqueId": "SIP/101",
        "monitored": "yes",
        "record": "true",
        "tag": "22",
    }
    by_id = ("--exten-or-unique-id", call.unique_call_id)
    call.ended = False  # the script has nothing to say, and the call goes on
    assert await run("record", "stop", *by_id) == cli.OK
    call.status = "Ringing"
    assert await run("dial", "answer", "--unique-id", call.unique_call_id, "--exten", "SIP/101") == cli.OK
    assert call.status == "Connected"
    assert await run("dial", "hangup", *by_id) == cli.OK
    assert call.ended
    assert [each[0] for each in there.noojee.recordings] == ["stop"]


async def test_a_preview_record_is_dialled(
    dialling: tuple[Centres, Callable[..., Awaitable[int]]],
    database: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the handle of one that was heard, as the record whole, or as the message that brought it."""
    _, run = dialling
    record = {
        "recordHandle": 431,
        "phoneNumber": "5001",
        "outboundCallerId": "410004343",
        "otherFields": {"a": "b"},
    }
    message = {"messageType": "OutboundRecordMessage", "notificationType": "PreviewRecord", "record": record}
    journal = await Journal.open(database, connections=1)
    try:
        ids = await journal.register([AccountRow("agent5000", "", "lab")])
        raw = json.dumps({"channel": "/v2/me/outbound", "data": message}).encode()
        now = datetime.now(UTC)  # noqa: TID251 - only what was heard lately is dialled
        heard = Heard(ids["agent5000"], str(uuid4()), 1, now, "/v2/me/outbound", raw)
        await journal.record([heard])
    finally:
        await journal.close()
    handle = ("dial", "preview", "--by", "agent5000", "--record-handle")
    assert await run(*handle, "432") == cli.NEGATIVE
    assert "heard of no preview record 432 lately" in capsys.readouterr().err
    assert await run(*handle, "431", "--wait", "-o", "json") == cli.OK
    assert json.loads(capsys.readouterr().out)["request"]["outboundRecord"] == record
    for option, value in (("--record", record), ("--message", message)):
        path = tmp_path / f"{option}.json"
        path.write_text(json.dumps(value))
        told = await run("dial", "preview", "--by", "agent5000", option, str(path), "--wait", "-o", "json")
        assert told == cli.OK
        dial = json.loads(capsys.readouterr().out)
        assert (dial["number"], dial["caller_id"], dial["outcome"]) == ("5001", "410004343", "answered")
        assert dial["request"]["outboundRecord"] == record


def test_simulate_is_a_noojee_and_a_click2dial_too(capsys: pytest.CaptureFixture[str]) -> None:
    """Where they are asked for, each says where it is."""
    code, out, _ = _run(
        capsys, "simulate", "--seconds", "0.1", "--accounts", "1", "--noojee", "0", "--click2dial", "0"
    )
    assert code == cli.OK
    there = json.loads(out.splitlines()[0])
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", there["noojee"])
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", there["click2dial"])
    assert there["noojee_key"] == "simulated-key"


def test_without_an_api_nobody_dials(capsys: pytest.CaptureFixture[str]) -> None:
    """It says which settings are lacking."""
    assert _run(capsys, "dial", "gws", "5001")[0] == cli.USAGE
    code, _, error = _run(capsys, "dial", "gws", "5001")
    assert code == cli.USAGE
    assert "api.token is not set, so no listener takes dials" in error
