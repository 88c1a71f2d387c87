"""The demo: its arithmetic, its comparison, and one whole run of the real command."""

import hashlib
import io
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from rich.console import Console

from listener.core.calls import Call, Direction, Outcome, Party, Source
from listener.demo import (
    Pulse,
    headline,
    invocation,
    lost,
    missing,
    picture,
    pulse,
    quantile,
    scrape,
    surplus,
    total,
)
from listener.metrics import Metrics
from listener.store.embedded import Embedded
from listener.store.history import Found, Kept

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)

HISTOGRAM = """\
# HELP x_seconds Something.
# TYPE x_seconds histogram
x_seconds_bucket{le="0.001"} 10.0
x_seconds_bucket{le="0.01"} 90.0
x_seconds_bucket{le="1"} 100.0
x_seconds_bucket{le="+Inf"} 100.0
x_seconds_count 100.0
x_seconds_sum 1.5
"""


def test_scrape_reads_what_our_metrics_write() -> None:
    """Every sample of the text format is found, with and without labels."""
    metrics = Metrics()
    metrics.accounts(7)
    metrics.gap("session lost", 2.5)
    scraped = scrape(metrics.text())
    assert total(scraped, "listener_accounts") == 7
    assert total(scraped, "listener_gap_seconds_total", cause="session lost") == 2.5
    assert total(scraped, "listener_gap_seconds_total") == 2.5
    samples = [line for line in metrics.text().splitlines() if line and not line.startswith("#")]
    assert len(scraped) == len(samples)


@pytest.mark.parametrize(
    ("share", "seconds"), [(0.05, 0.0005), (0.1, 0.001), (0.5, 0.0055), (0.9, 0.01), (0.95, 0.505), (1, 1)]
)
def test_quantiles_as_promql_has_them(share: float, seconds: float) -> None:
    """A quantile lies within its bucket, in proportion."""
    assert quantile(share, {}, scrape(HISTOGRAM), "x_seconds") == pytest.approx(seconds)


def test_quantiles_are_of_what_came_between() -> None:
    """What was observed before the first scrape does not count; of nothing there is no quantile."""
    before = scrape(HISTOGRAM)
    after = {
        sample: value + (sample[0].endswith("_bucket") and ("le", "0.001") not in sample[1])
        for sample, value in before.items()
    }
    assert quantile(0.5, before, after, "x_seconds") == pytest.approx(0.0055)
    assert quantile(0.5, before, before, "x_seconds") is None
    assert quantile(0.5, {}, {}, "x_seconds") is None


def test_a_value_beyond_all_buckets() -> None:
    """The last finite bound is what can be said of it."""
    beyond = scrape('x_seconds_bucket{le="1"} 0.0\nx_seconds_bucket{le="+Inf"} 4.0\n')
    assert quantile(0.5, {}, beyond, "x_seconds") == 1


def test_the_pulse_is_of_the_window() -> None:
    """Notifications per second are those between the first and last scrape; lists of calls are none."""
    first = scrape('listener_notifications_total{type="StatusChange"} 100.0\n')
    last = scrape(
        'listener_notifications_total{type="StatusChange"} 150.0\n'
        'listener_notifications_total{type="aside"} 10.0\n'
        'listener_notifications_total{type="snapshot"} 4.0\n'
        'listener_sessions{state="up"} 3.0\nlistener_sessions{state="waiting"} 1.0\nlistener_accounts 4.0\n'
    )
    now = pulse([(10.0, first), (12.0, last)])
    assert (now.heard, now.per_second, now.up, now.accounts, now.lag_ms) == (160, 30.0, 3, 4, None)
    assert pulse([(10.0, first)]).per_second == 0


# ── What is missing ───────────────────────────────────────────────────────────────────────────────────


def _digest(*raw: bytes) -> str:
    return hashlib.sha256(b"".join(each + b"\n" for each in raw)).hexdigest()


def _call(**other: Any) -> Call:
    fields: dict[str, Any] = {
        "id": 1,
        "account": 1,
        "call_id": "c1",
        "aliases": ("c1",),
        "state": "Released",
        "state_since": NOON,
        "opened_at": NOON,
        "last_heard_at": NOON,
        "direction": Direction.OUTBOUND,
        "opened_by": Source.COMETD,
        "parties": (Party(0, "5002", "", "", "", NOON, NOON),),
        "user_data": {"Key": ["a", "b"], "Other": 1},
        "outcome": Outcome.ANSWERED,
        "hold_count": 1,
        "notifications": 4,
        "settled": "released",
    }
    return Call(**(fields | other))


def _truth(**call: Any) -> dict[str, Any]:
    script = {
        "account": "agent",
        "script": "dial_answered",
        "dialect": "v2",
        "call_id": "c1",
        "aliases": ["c1"],
        "direction": "outbound",
        "final_state": "Released",
        "outcome": "answered",
        "hold_count": 1,
        "parties": ["5002"],
        "user_data": [["Key", "a"], ["Other", 1], ["Key", "b"]],
        "recording": None,
        "notifications": 4,
        "accepted": 4,
        "finished": True,
    }
    account = {"sent": 5, "accepted": 4, "digest": _digest(b"1", b"2", b"3", b"4")}
    return {"accounts": {"agent": account}, "calls": [script | call]}


KEPT = {"agent": Kept(4, _digest(b"1", b"2", b"3", b"4"))}


def test_nothing_is_missing() -> None:
    """What was heard as it was sent is no difference; messages that nobody was subscribed to do not count."""
    assert missing(_truth(), KEPT, {"agent": [_call()]}) == []
    assert lost(_truth(), KEPT) == 0


@pytest.mark.parametrize(
    ("kept", "part", "count"),
    [
        ({}, "4 notifications were sent, 0 are stored", 4),
        ({"agent": Kept(3, "")}, "4 notifications were sent, 3 are stored", 1),
        (
            {"agent": Kept(4, _digest(b"1", b"3", b"2", b"4"))},
            "not the bytes that were sent, in their order",
            0,
        ),
    ],
)
def test_missing_notifications(kept: dict[str, Kept], part: str, count: int) -> None:
    """Too few, and others than were sent, are each named, by account."""
    (problem,) = missing(_truth(), kept, {"agent": [_call()]})
    assert problem.startswith("agent: ")
    assert part in problem
    assert lost(_truth(), kept) == count


def test_more_than_was_sent_is_not_missing() -> None:
    """What nobody sent is a surplus and no loss; and the other way round."""
    more = {"agent": Kept(5, "")}
    assert surplus(_truth(), more) == ["agent: 4 notifications were sent, 5 are stored"]
    assert missing(_truth(), more, {"agent": [_call()]}) == []
    assert lost(_truth(), more) == 0
    assert surplus(_truth(), KEPT) == surplus(_truth(), {}) == []


@pytest.mark.parametrize(
    ("started_as", "command"),
    [
        ("/opt/listener/bin/listener", "/opt/listener/bin/listener"),
        ("/opt/my listener/bin/listener", "'/opt/my listener/bin/listener'"),
        ("/opt/listener/__main__.py", f"{shlex.quote(sys.executable)} -m listener"),
    ],
)
def test_the_hint_names_the_command_that_runs(started_as: str, command: str) -> None:
    """What a person is told to type works wherever it was installed."""
    assert invocation(started_as) == command


@pytest.mark.parametrize(
    ("direction", "call"),
    [
        (Direction.OUTBOUND, "5001 → 15242"),
        (Direction.INBOUND, "15242 → 5001"),
        (Direction.UNKNOWN, "5001 – 15242"),
    ],
)
def test_the_picture_fits_a_terminal(direction: Direction, call: str) -> None:
    """At 80 columns: who called whom, who else is on it, and the figures of a large site in one line."""
    parties = (Party(0, "15242", "", "", "", NOON, NOON), Party(1, "5003", "", "", "", NOON, None))
    found = Found(
        "agent5001", "", _call(phone_number="5001", number="15242", direction=direction, parties=parties)
    )
    now = Pulse(1_234_567, 1234.0, 123.4, 1000, 1000, 1000)
    out = Console(file=io.StringIO(), width=80)
    talking = _call(phone_number="+12025550150", number="+61355509133", state="Established", outcome=None)
    open_ = msgspec.structs.replace(talking, settled=None)
    out.print(picture(now, [found, Found("agent5002", "", open_)], NOON, 24))
    assert isinstance(out.file, io.StringIO)
    lines = out.file.getvalue().splitlines()
    assert lines[0].rstrip() == headline(now)
    (row,) = [line for line in lines if "agent5001" in line]
    assert call in row
    assert row.count("15242") == 1
    assert "…" not in out.file.getvalue()
    assert "5003" in row


def test_the_picture_names_an_account_without_a_number() -> None:
    """Where no message told the account's number its name stands for it."""
    out = Console(file=io.StringIO(), width=120)
    found = Found("agent5001", "", _call(phone_number=None, number="15242"))
    out.print(picture(pulse([(0.0, {})]), [found], NOON, 24))
    assert isinstance(out.file, io.StringIO)
    assert "agent5001 → 15242" in out.file.getvalue()


@pytest.mark.parametrize(
    ("other", "part"),
    [
        ({"call_id": "c2"}, "is not there"),
        ({"notifications": 3}, "notifications should be 4, is 3"),
        ({"state": "Held"}, "state should be Released, is Held"),
        ({"outcome": Outcome.UNANSWERED}, "outcome should be answered, is unanswered"),
        ({"direction": Direction.INBOUND}, "direction should be outbound, is inbound"),
        ({"hold_count": 0}, "hold count should be 1, is 0"),
        ({"parties": ()}, "participants should be ['5002'], is []"),
        ({"recording": "Recording"}, "recording should be None, is Recording"),
        ({"user_data": {"Key": "b", "Other": 1}}, "attached data should be"),
    ],
)
def test_a_call_that_is_not_as_it_was(other: dict[str, Any], part: str) -> None:
    """Each figure of a call that differs from the script is named."""
    (problem,) = missing(_truth(), KEPT, {"agent": [_call(**other)]})
    assert problem.startswith("agent: call c1 (dial_answered, v2)")
    assert part in problem


@pytest.mark.parametrize("script", [{"finished": False}, {"accepted": 3}])
def test_a_call_that_nobody_could_know_whole(script: dict[str, Any]) -> None:
    """A call that goes on, or part of which was said to nobody, is not compared."""
    assert missing(_truth(**script), KEPT, {}) == []


# ── Whole ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory for a demo; its server and all its files are gone afterwards."""
    yield tmp_path / "demo"
    # Where the files are is known only to a server that was started: as root they may lie elsewhere.
    server = Embedded(tmp_path / "demo" / "postgres")
    server.start()
    server.destroy()


def _command(directory: Path, *more: str) -> list[str]:
    options = ["--directory", str(directory), "--accounts", "6", "--rate", "60"]
    return [sys.executable, "-m", "listener", "demo", *options, *more]


def _processes_of(directory: Path) -> list[list[str]]:
    """The command lines of what runs there."""
    there = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    return [words for words in there if words and str(directory) in " ".join(words)]


def test_a_whole_demo(directory: Path) -> None:
    """It starts everything, loses nothing, says so, and can be asked afterwards."""
    done = subprocess.run(
        _command(directory, "--seconds", "2"), capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    heard = re.search(r"^notifications +(\d+) heard and stored, of 6 accounts$", done.stdout, re.MULTILINE)
    assert heard is not None
    assert int(heard[1]) >= 100
    assert re.search(r"^lost +0$", done.stdout, re.MULTILINE)
    assert re.search(r"^wire to commit +p50 [\d.]+ ms, p99 [\d.]+ ms$", done.stdout, re.MULTILINE)
    config = ["-c", str(directory / "listener.toml")]
    asked = subprocess.run(
        [sys.executable, "-m", "listener", "calls", *config, "--number", "5001", "--since", "1h"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert asked.returncode == 0, asked.stdout + asked.stderr
    assert "agent5001" in asked.stdout


def test_interrupted_in_a_terminal(directory: Path) -> None:
    """On a terminal the table moves; Ctrl-C lets the calls end and checks; nothing is left running."""
    ours, theirs = pty.openpty()
    environ = os.environ | {"COLUMNS": "100", "LINES": "30", "TERM": "xterm"}
    shown, interrupted, deadline = b"", False, time.monotonic() + 50
    with subprocess.Popen(
        _command(directory), stdin=theirs, stdout=theirs, stderr=theirs, env=environ
    ) as demo:
        os.close(theirs)
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    shown += os.read(ours, 65536)
                except OSError:  # the other side is closed
                    break
            if not interrupted and shown.count(b"also on it") > 3:
                demo.send_signal(signal.SIGINT)
                interrupted = True
        os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert demo.returncode == 0, text
    assert "sessions up 6/6" in text
    assert "agent5001" in text
    assert re.search(r"^lost +0\r$", text, re.MULTILINE)
    assert _processes_of(directory) == []


_PARENT = """\
import asyncio, os, signal, sys
from pathlib import Path
from listener.demo import _Child

async def play():
    child = await _Child.start("simulate", ["simulate", "--idle", "--accounts=1"], Path(sys.argv[1]))
    await child.said(lambda line: "url" in line)
    print(child._process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(play())
"""


def test_children_end_with_their_parent(tmp_path: Path) -> None:
    """A demo that is killed with -9 leaves no contact centre behind."""
    done = subprocess.run(
        [sys.executable, "-c", _PARENT, str(tmp_path / "log")],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    child = int(done.stdout)
    try:
        psutil.wait_procs([psutil.Process(child)], timeout=10)
    except psutil.NoSuchProcess:
        return
    alive = psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE
    if alive:
        os.kill(child, signal.SIGKILL)
    assert not alive
