"""Metrics: what one committed batch adds, that label sets are closed, and that the names are well made."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import count

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client.parser import text_string_to_metric_families

from listener.core.calls import (
    GAP_CAUSES,
    Anomaly,
    Aside,
    Closing,
    Decoded,
    Heard,
    Noted,
    Notification,
    Recorded,
    Snapshot,
    Source,
    Step,
    Unrecognised,
    noted,
)
from listener.core.dialling import (
    Accepted,
    Advance,
    CallHeard,
    Cause,
    Elapsed,
    Refused,
    System,
    advance,
    overheard,
    placed,
)
from listener.core.normalise import Board
from listener.metrics import SESSION_STATES, Metrics

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
_IDS = count(1)


def _value(metrics: Metrics, sample: str, **labels: str) -> float:
    found = [
        each.value
        for family in text_string_to_metric_families(metrics.text())
        for each in family.samples
        if each.name == sample and each.labels == labels
    ]
    assert len(found) == 1, f"{sample}{labels} is there {len(found)} times"
    return found[0]


def _heard(position: int = 1, at: datetime = NOON) -> Heard:
    return Heard(1, "s", position, at, "/v2/me/calls", b"{}")


def _noted(decoded: Decoded, position: int = 1, at: datetime = NOON) -> Noted:
    return noted(_heard(position, at), decoded)


def _said(state: str | None, kind: str = "StatusChange", call: str = "c1") -> Notification:
    return Notification("CallStateChangeMessage", kind, call, state=state)


def _record(metrics: Metrics, board: Board, *messages: Decoded) -> list[Step]:
    """Feed one batch of messages through the fold and into the metrics, as the pipeline does."""
    said = [(_heard(position), decoded) for position, decoded in enumerate(messages, 1)]
    steps = [step for heard, decoded in said for step in board.hear(next(_IDS), heard, decoded)]
    metrics.recorded(Recorded(tuple(noted(*each) for each in said), tuple(steps), 0), 0.004, NOON)
    return steps


def test_a_batch_is_counted() -> None:
    """One transaction: its size, seconds, types, duplicates and the times of commit and receipt."""
    metrics = Metrics()
    entries = (
        _noted(_said("Ringing"), 1),
        _noted(_said("Ringing"), 2),
        _noted(_said(None, "AttachedDataChanged"), 3),
        _noted(_said(None, "SomethingNew"), 4),
        _noted(Aside("DeviceStateChangeMessage"), 5),
        _noted(Unrecognised("no JSON"), 6),
        _noted(Snapshot((), complete=True), 7),
    )
    metrics.recorded(Recorded(entries, (), 3), 0.004, NOON + timedelta(milliseconds=6))
    for kind, times in {
        "StatusChange": 2,
        "AttachedDataChanged": 1,
        "other": 1,
        "aside": 1,
        "unrecognised": 1,
        "snapshot": 1,
    }.items():
        assert _value(metrics, "listener_notifications_total", type=kind) == times
    assert _value(metrics, "listener_unrecognised_total") == 1
    assert _value(metrics, "listener_duplicates_total") == 3
    assert _value(metrics, "listener_batch_notifications_sum") == 10
    assert _value(metrics, "listener_commit_seconds_bucket", le="0.003") == 0
    assert _value(metrics, "listener_commit_seconds_bucket", le="0.005") == 1
    assert _value(metrics, "listener_last_commit_timestamp_seconds") == NOON.timestamp() + 0.006
    assert _value(metrics, "listener_last_notification_timestamp_seconds") == NOON.timestamp()


def test_lag_is_from_receipt_to_commit() -> None:
    """Each message adds the time from its receipt to the commit, into the bucket that holds it."""
    metrics = Metrics()
    entries = tuple(
        _noted(Aside("x"), position, NOON - timedelta(milliseconds=lag_ms))
        for position, lag_ms in enumerate([2, 2, 9, 400, 90_000])
    )
    metrics.recorded(Recorded(entries, (), 0), 0.001, NOON)
    assert [
        _value(metrics, "listener_lag_seconds_bucket", le=bound)
        for bound in ("0.001", "0.002", "0.0075", "0.01", "0.25", "1", "60", "+Inf")
    ] == [0, 2, 2, 3, 3, 4, 4, 5]
    assert _value(metrics, "listener_lag_seconds_sum") == pytest.approx(90.413)


def test_server_lag_is_across_both_clocks() -> None:
    """The server's timestamp is compared with our receipt; a server clock ahead of ours counts as none."""
    metrics = Metrics()
    for offset_s in (0.2, -5):
        said = Notification("m", "StatusChange", "c", server_at=NOON - timedelta(seconds=offset_s))
        metrics.recorded(Recorded((_noted(said),), (), 0), 0.001, NOON)
    assert _value(metrics, "listener_server_lag_seconds_count") == 2
    assert _value(metrics, "listener_server_lag_seconds_sum") == pytest.approx(0.2)


def test_an_empty_batch_is_a_commit_all_the_same() -> None:
    """A transaction that held only duplicates moves the time of the last commit, not that of receipt."""
    metrics = Metrics()
    metrics.recorded(Recorded((), (), 2), 0.001, NOON)
    assert _value(metrics, "listener_last_commit_timestamp_seconds") == NOON.timestamp()
    assert _value(metrics, "listener_last_notification_timestamp_seconds") == 0


def test_open_calls_follow_the_states() -> None:
    """The gauge moves with each state, and is empty when every call has ended."""
    metrics, board = Metrics(), Board(())

    def now() -> dict[str, float]:
        states = ("Dialing", "Ringing", "Established", "Held", "other")
        found = {state: _value(metrics, "listener_calls", state=state) for state in states}
        return {state: calls for state, calls in found.items() if calls}

    seen = []
    for said in (
        _said("Ringing"),
        _said("Established"),
        _said(None, "AttachedDataChanged"),
        _said("Held"),
        _said("Quantum"),
        _said("Dialing", call="c2"),
        _said("Released"),
        _said(None, "AttachedDataChanged"),
        _said("Completed"),
        _said("Released", call="c2"),
        _said("Released", call="c3"),
    ):
        _record(metrics, board, said)
        seen.append(now())
    assert seen == [
        {"Ringing": 1},
        {"Established": 1},
        {"Established": 1},
        {"Held": 1},
        {"other": 1},
        {"other": 1, "Dialing": 1},
        {"Dialing": 1},
        {"Dialing": 1},
        {"Dialing": 1},
        {},
        {},
    ]
    assert _value(metrics, "listener_calls_began_total", direction="inbound") == 1
    assert _value(metrics, "listener_calls_began_total", direction="outbound") == 1
    assert _value(metrics, "listener_calls_ended_total", outcome="answered") == 1
    assert _value(metrics, "listener_calls_ended_total", outcome="unanswered") == 1


def test_a_snapshot_that_ends_a_call_takes_it_out() -> None:
    """A call that ended unheard leaves the gauge with the snapshot that shows it, though no state changed."""
    metrics, board = Metrics(), Board(())
    _record(metrics, board, _said("Established"))
    asked_at = NOON + timedelta(seconds=5)
    heard = Heard(1, "r", 1, asked_at, "/v2/me/calls", b"[]", asked_at=asked_at)
    snapshot = Snapshot((), complete=True, oddities=(Anomaly("malformed_field", "x"),))
    steps = board.hear(next(_IDS), heard, snapshot)
    assert [step.ended for step in steps] == [True]
    before = _value(metrics, "listener_anomalies_total", kind="malformed_field")
    metrics.recorded(Recorded((noted(heard, snapshot),), tuple(steps), 0), 0.001, asked_at)
    assert _value(metrics, "listener_calls", state="Established") == 0
    assert _value(metrics, "listener_calls_ended_total", outcome="answered") == 1
    assert _value(metrics, "listener_anomalies_total", kind="malformed_field") == before + 1


def test_what_we_closed_ourselves_was_not_heard() -> None:
    """It ends the call and takes it out of the gauge, and is no sign of life."""
    metrics, board = Metrics(), Board(())
    (opened,) = _record(metrics, board, _said("Held"))
    heard_at = _value(metrics, "listener_last_notification_timestamp_seconds")
    at = NOON + timedelta(days=2)
    closing = Closing((opened.call.id,), "not heard of")
    heard = Heard(1, "c", 1, at, "listener/closing", b"", Source.LISTENER, asked_at=at)
    steps = tuple(board.hear(next(_IDS), heard, closing))
    metrics.recorded(Recorded((noted(heard, closing),), steps, 0), 0.001, at)
    assert _value(metrics, "listener_calls", state="Held") == 0
    assert _value(metrics, "listener_calls_ended_total", outcome="answered") == 1
    assert _value(metrics, "listener_anomalies_total", kind="ended_unheard") == 1
    assert _value(metrics, "listener_notifications_total", type="closing") == 1
    assert _value(metrics, "listener_last_notification_timestamp_seconds") == heard_at


def test_open_calls_of_the_store_are_the_beginning() -> None:
    """What the store knew to be open is set at start, and moves on from there."""
    metrics = Metrics()
    (step,) = _record(Metrics(), Board(()), _said("Ringing"))
    metrics.open_calls([step.call])
    metrics.open_calls([step.call])
    assert _value(metrics, "listener_calls", state="Ringing") == 1
    _record(metrics, Board([step.call]), _said("Released"))
    assert _value(metrics, "listener_calls", state="Ringing") == 0


def test_anomalies_are_counted_by_kind() -> None:
    """An odd message adds to its kind, whatever kind the future brings."""
    metrics, board = Metrics(), Board(())
    _record(metrics, board, _said("Quantum"), _said("Ringing", "SomethingNew"))
    assert _value(metrics, "listener_anomalies_total", kind="unknown_state") == 1
    assert _value(metrics, "listener_anomalies_total", kind="unknown_notification_type") == 1
    (step,) = _record(Metrics(), Board(()), _said("Ringing"))
    odd = Step(step.call, (), (Anomaly("of a later version", ""),))
    metrics.recorded(Recorded((), (odd,), 0), 0.001, NOON)
    assert _value(metrics, "listener_anomalies_total", kind="other") == 1


def test_sessions_move_between_states() -> None:
    """A session is in one state at a time; one that ends is in none."""
    metrics = Metrics()
    metrics.session_state(None, "starting")
    metrics.session_state("starting", "up")
    metrics.session_state(None, "refused")
    metrics.session_state(None, "confused")
    assert [_value(metrics, "listener_sessions", state=state) for state in SESSION_STATES] == [0, 1, 0, 1]
    assert _value(metrics, "listener_sessions", state="other") == 1
    metrics.session_state("up", None)
    assert _value(metrics, "listener_sessions", state="up") == 0


def test_the_plain_ones() -> None:
    """Handshakes, reconnects, failures, gaps, backlog and accounts are what was said."""
    metrics = Metrics()
    metrics.handshake()
    metrics.reconnect()
    metrics.commit_failed()
    metrics.gap("disconnected", 2.5)
    metrics.gap("disconnected", 1)
    metrics.gap("sunspots", 4)
    metrics.backlog(12, 3400)
    metrics.accounts(7)
    for name, value in {
        "listener_handshakes_total": 1,
        "listener_reconnects_total": 1,
        "listener_commit_failures_total": 1,
        "listener_backlog_notifications": 12,
        "listener_backlog_bytes": 3400,
        "listener_accounts": 7,
    }.items():
        assert _value(metrics, name) == value
    assert _value(metrics, "listener_gap_seconds_total", cause="disconnected") == 3.5
    assert _value(metrics, "listener_gap_seconds_total", cause="other") == 4


def test_the_spool_is_shown() -> None:
    """What is in it now, and what went through it."""
    metrics = Metrics()
    metrics.spool(notifications=12, size_bytes=3000, oldest=NOON, drained=0, set_aside=0, full=True)
    assert _value(metrics, "listener_spool_notifications") == 12
    assert _value(metrics, "listener_spool_bytes") == 3000
    assert _value(metrics, "listener_spool_oldest_timestamp_seconds") == NOON.timestamp()
    assert _value(metrics, "listener_spool_full") == 1
    metrics.spool(notifications=0, size_bytes=0, oldest=None, drained=12, set_aside=1, full=False)
    metrics.spool_damaged(2)
    assert _value(metrics, "listener_spool_oldest_timestamp_seconds") == 0
    assert _value(metrics, "listener_spool_full") == 0
    assert _value(metrics, "listener_spool_drained_total") == 12
    assert _value(metrics, "listener_spool_set_aside_total") == 3


def test_every_series_is_there_from_the_start() -> None:
    """The set of series never changes, whatever is counted: no label value is made up on the way."""

    def series(metrics: Metrics) -> set[tuple[str, frozenset[tuple[str, str]]]]:
        return {
            (sample.name, frozenset(sample.labels.items()))
            for family in text_string_to_metric_families(metrics.text())
            for sample in family.samples
        }

    metrics = Metrics()
    before = series(metrics)
    assert {dict(labels).get("cause") for _, labels in before} >= GAP_CAUSES
    _record(
        metrics, Board(()), *(_said(f"State{number}", f"Type{number}", f"c{number}") for number in range(50))
    )
    metrics.gap("sunspots", 1)
    metrics.session_state(None, "confused")
    assert series(metrics) == before


# ── Names ─────────────────────────────────────────────────────────────────────────────────────────────

ABBREVIATED = {
    "ms",
    "sec",
    "secs",
    "s",
    "us",
    "ns",
    "min",
    "b",
    "kb",
    "mb",
    "gb",
    "pct",
    "msec",
    "usec",
    "num",
    "cnt",
}


def _lint(text: str) -> Iterator[str]:
    """Apply the rules of `promtool check metrics` (Prometheus 2.42) that concern names, types and help."""
    for family in text_string_to_metric_families(text):
        name = family.name + "_total" * (family.type == "counter")
        if not family.documentation.strip():
            yield f"{name} has no help"
        if family.type == "counter" and f"\n# TYPE {name} counter" not in f"\n{text}":
            yield f"{name}: a counter ends in _total"
        if family.type not in ("counter", "unknown") and family.name.endswith("_total"):
            yield f"{name}: only a counter ends in _total"
        if family.type != "histogram" and family.name.endswith(("_bucket", "_count", "_sum")):
            yield f"{name}: the ending belongs to histograms"
        if re.search(r"[A-Z:]", name):
            yield f"{name}: lower case, and no colon"
        words = name.split("_")
        if {"counter", "gauge", "histogram", "summary"} & set(words):
            yield f"{name}: the type is no part of the name"
        if ABBREVIATED & set(words):
            yield f"{name}: units are written out"
        for unit in ("milliseconds", "minutes", "hours", "kilobytes", "percent"):
            if unit in words:
                yield f"{name}: base units only"
        for sample in family.samples:
            if any(label != label.lower() for label in sample.labels):
                yield f"{name}: labels are in lower case"


def test_names_are_well_made() -> None:
    """Every name keeps the rules that `promtool check metrics` knows, and is ours or the process' own."""
    metrics = Metrics()
    assert list(_lint(metrics.text())) == []
    names = [described.name for described in metrics.catalogue()]
    assert len(names) == len(set(names))
    assert all(name.startswith("listener_") for name in names)
    others = {line.split()[2] for line in metrics.text().splitlines() if line.startswith("# TYPE")} - set(
        names
    )
    assert all(name.startswith("process_") for name in others)


@pytest.mark.parametrize(
    "line",
    [
        "# HELP x_seconds \n# TYPE x_seconds gauge\nx_seconds 1\n",
        "# HELP x A thing.\n# TYPE x counter\nx 1\n",
        "# HELP x_total A thing.\n# TYPE x_total gauge\nx_total 1\n",
        "# HELP x_ms A thing.\n# TYPE x_ms gauge\nx_ms 1\n",
        "# HELP x_gauge A thing.\n# TYPE x_gauge gauge\nx_gauge 1\n",
        "# HELP x_milliseconds A thing.\n# TYPE x_milliseconds gauge\nx_milliseconds 1\n",
        "# HELP theThing A thing.\n# TYPE theThing gauge\ntheThing 1\n",
        "# HELP x_count A thing.\n# TYPE x_count gauge\nx_count 1\n",
    ],
)
def test_the_rules_can_fail(line: str) -> None:
    """Each rule of ours refuses what promtool refuses; where promtool is installed, it is asked too."""
    assert list(_lint(line))
    if promtool := shutil.which("promtool"):
        asked = subprocess.run(
            [promtool, "check", "metrics"], input=line, text=True, capture_output=True, check=False
        )
        assert asked.returncode != 0


if promtool := shutil.which("promtool"):
    # Defined only where Prometheus is installed: it is no peer that `make test` may ask an ordinary user to
    # install, and `_lint` has its rules.
    def test_promtool_finds_nothing() -> None:
        """The real `promtool check metrics` is content."""
        assert promtool is not None
        asked = subprocess.run(
            [promtool, "check", "metrics"],
            input=Metrics().text(),
            text=True,
            capture_output=True,
            check=False,
        )
        assert (asked.returncode, asked.stdout + asked.stderr) == (0, "")


def _overheard(metrics: Metrics, *states: str) -> int:
    """A dial that was overheard through these states, ten seconds apart; gives its call."""
    board = Board(())
    dial = None
    for turn, state in enumerate(states):
        at = NOON + timedelta(seconds=10 * turn)
        said = _said(state, call="dialled")
        (step,) = board.hear(next(_IDS), _heard(at=at), said)
        dial = dial or overheard(step.call)
        assert dial is not None
        after = advance(dial, CallHeard(step.call), at)
        metrics.dial(after)
        dial = after.dial
    assert dial is not None
    assert dial.call is not None
    return dial.call


def test_a_dial_is_counted_once_for_each_turn_of_its_life() -> None:
    """Ringing and answer with their seconds, the answer when it came, the end by outcome and leg."""
    metrics = Metrics()
    pair = {"system": "gws", "origin": "overheard"}
    _overheard(metrics, "Dialing", "Ringing", "Established")
    assert _value(metrics, "listener_dials_connected_total", **pair) == 1
    assert _value(metrics, "listener_dials_total", **pair, outcome="answered", leg="callee") == 0
    _overheard(metrics, "Dialing", "Ringing", "Established", "Held", "Released")
    assert _value(metrics, "listener_dials_total", **pair, outcome="answered", leg="callee") == 1
    assert _value(metrics, "listener_dial_ring_seconds_bucket", **pair, le="7.5") == 0
    assert _value(metrics, "listener_dial_ring_seconds_bucket", **pair, le="10.0") == 2
    assert _value(metrics, "listener_dial_answer_seconds_sum", **pair) == 40
    assert _value(metrics, "listener_dials_connected_total", **pair) == 2


def test_what_became_of_placed_dials_is_counted() -> None:
    """Refused on the side of the system, unknown and then corrected: that is no second end."""
    metrics = Metrics()
    pair = {"system": "noojee", "origin": "placed"}
    dial = placed("d", 1, System.NOOJEE, "123", NOON)
    metrics.dial(advance(dial, Refused(Cause(System.NOOJEE, "http", "403")), NOON))
    assert _value(metrics, "listener_dials_total", **pair, outcome="not_allowed", leg="system") == 1
    accepted = advance(dial, Accepted(), NOON)
    metrics.dial(accepted)
    late = NOON + timedelta(hours=1)
    unknown = advance(accepted.dial, Elapsed(), late)
    metrics.dial(unknown)
    metrics.dial(Advance(unknown.dial, changed=True, corrected=True))
    assert _value(metrics, "listener_dials_total", **pair, outcome="unknown", leg="system") == 1
    assert _value(metrics, "listener_dials_corrected_total") == 1
    metrics.dial_ambiguous()
    metrics.dial_dropped(3)
    metrics.dial_unmatched("dial")
    metrics.dial_unmatched("nothing")
    assert _value(metrics, "listener_dials_ambiguous_total") == 1
    assert _value(metrics, "listener_dials_dropped_total") == 3
    assert _value(metrics, "listener_dials_unmatched_total", what="dial") == 1
    assert _value(metrics, "listener_dials_unmatched_total", what="other") == 1


def test_waiting_dials_are_those_of_now() -> None:
    """A system that has none any more shows none."""
    metrics = Metrics()
    metrics.dials_waiting({System.GWS: 3, System.NOOJEE: 1})
    metrics.dials_waiting({System.GWS: 2})
    waiting = {system: _value(metrics, "listener_dials_waiting", system=system.value) for system in System}
    assert waiting == {System.GWS: 2, System.NOOJEE: 0, System.CLICK2DIAL: 0}


async def test_exemplars_name_a_call_in_openmetrics() -> None:
    """Who asks /metrics for OpenMetrics gets a call's id with the bucket; the text format has none."""
    metrics = Metrics()
    call = _overheard(metrics, "Dialing", "Ringing", "Established")
    app = web.Application()
    app.router.add_get("/metrics", metrics.handler())
    async with TestClient(TestServer(app)) as client:
        wanted = {"Accept": "application/openmetrics-text; version=1.0.0"}
        async with client.get("/metrics", headers=wanted) as reply:
            shown = await reply.text()
            assert reply.content_type == "application/openmetrics-text"
        async with client.get("/metrics") as reply:
            plain = await reply.text()
    bucket = 'listener_dial_answer_seconds_bucket{le="20.0",origin="overheard",system="gws"} 1.0'
    assert f'{bucket} # {{call="{call}"}} 20.0 ' in shown
    assert shown.endswith("# EOF\n")
    assert bucket + "\n" in plain
