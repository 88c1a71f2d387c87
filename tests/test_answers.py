"""How answers look: what a table says, and that JSON says it all."""

import io
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.console import Console

from listener import answers
from listener.answers import as_json, seconds, share, show_calls, show_coverage, show_timeline
from listener.core.calls import Call, Direction, Outcome, Party, Source
from listener.store.history import Altered, Coverage, Found, Moment, Odd, Page, Stretch, Timeline

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
LATER = NOON + timedelta(minutes=2)


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Local time is UTC, so that what is printed does not depend on the machine."""
    monkeypatch.setattr(answers, "_local", _in_utc)


def _in_utc(at: datetime, *, milliseconds: bool = False) -> str:
    text = at.astimezone(UTC).strftime("%H:%M:%S")
    return f"{text}.{at.microsecond // 1000:03d}" if milliseconds else text


def _call(**other: Any) -> Call:
    fields: dict[str, Any] = {
        "id": 4711,
        "account": 1,
        "call_id": "uuid-1",
        "aliases": ("uuid-1", "conn-1"),
        "state": "Released",
        "state_since": LATER,
        "opened_at": NOON,
        "last_heard_at": LATER,
        "ended_at": LATER,
        "direction": Direction.OUTBOUND,
        "opened_by": Source.COMETD,
        "number": "5002",
        "phone_number": "5001",
        "parties": (
            Party(0, "5002", "", "", "", NOON, LATER),
            Party(1, "[bold]5003", "", "", "RoleNewParty", NOON, NOON + timedelta(minutes=1)),
        ),
        "user_data": {"Segment": "Gold", "Nested": {"a": [1, 2]}, "Long": "x" * 100},
        "ring_s": 4.25,
        "talk_s": 125.0,
        "outcome": Outcome.ANSWERED,
        "settled": "released",
    }
    return Call(**(fields | other))


def _found(**other: Any) -> Found:
    return Found("agent5001", "north", _call(**other))


def _page(*found: Found, observed: float = 1.0, after: str | None = None) -> Page:
    return Page(found, after, observed, NOON, LATER)


def _shown(show: Any, *arguments: Any, **options: Any) -> str:
    out = Console(file=io.StringIO(), width=answers.WIDTH_ELSEWHERE, highlight=False)
    show(*arguments, out, **options)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0, "0.0 s"), (7.44, "7.4 s"), (60, "1:00"), (125.4, "2:05"), (3725, "1:02:05")],
)
def test_durations(value: float | None, text: str) -> None:
    """Seconds below a minute, then minutes, then hours."""
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 %"),
        (1, "100 %"),
        (0.5, "50 %"),
        (0.987, "98.7 %"),
        (0.99999, "more than 99.9 %"),
        (0.00001, "less than 0.1 %"),
    ],
)
def test_shares_are_not_rounded_into_lies(value: float, text: str) -> None:
    """Almost all is not all, and almost nothing is not nothing."""
    assert share(value) == text


def test_a_list_of_calls() -> None:
    """A row says who, with whom, how long and how it ended; below stands what was observed."""
    text = _shown(show_calls, _page(_found(), observed=0.987, after="123-4711"))
    (row,) = [line for line in text.splitlines() if "4711" in line and "agent5001" in line]
    words = "4711 12:00:00 agent5001 5001 → 5002 5002, ([bold]5003) Released 4.2 s 2:05 answered"
    assert " ".join(row.split()) == words
    assert "1 call; observed: 98.7 % of the time from 12:00:00 to 12:02:00" in text
    assert "there are more: --after 123-4711" in text


def test_no_calls_are_not_no_observation() -> None:
    """An empty answer still says whether anybody listened."""
    assert _shown(show_calls, _page(observed=0.0)) == (
        "no calls; observed: 0 % of the time from 12:00:00 to 12:02:00\n"
    )


@pytest.mark.parametrize(
    ("direction", "text"),
    [
        (Direction.OUTBOUND, "5001 → 5002"),
        (Direction.INBOUND, "5002 → 5001"),
        (Direction.UNKNOWN, "5001 – 5002"),
    ],
)
def test_who_called_whom(direction: Direction, text: str) -> None:
    """The arrow goes from who called to who was called; where that was not heard there is none."""
    assert text in _shown(show_calls, _page(_found(direction=direction)))


def test_an_inferred_end_is_said_to_be_one() -> None:
    """A call whose end nobody heard says so beside its outcome."""
    text = _shown(show_calls, _page(_found(settled="inferred: no longer live", ended_at=None)))
    assert "answered (inferred)" in text


def test_a_timeline() -> None:
    """All ids, all participants with their times, attached data, and every message with what it changed."""
    moments = (
        Moment(
            at=NOON + timedelta(seconds=1.25),
            server_at=None,
            notification=9,
            message_type="CallStateChangeMessage",
            notification_type="StatusChange",
            source=Source.COMETD,
            channel="/v2/me/calls",
            changes=(
                Altered("state", "", "Ringing", "Established"),
                Altered("participant", "5002", None, {"number": "5002"}),
                Altered("participant", "5003", {"number": "5003"}, None),
                Altered("user_data", "Segment", None, "[red]Gold"),
                Altered("user_data", "Old", 1, None),
                Altered("capabilities", "", ["Hold"], ["Retrieve", "Hangup"]),
            ),
            anomalies=(Odd("unknown_state", "Quantum"),),
            raw=b"{}",
        ),
    )
    text = _shown(show_timeline, Timeline(_found(parent_call_id="uuid-0"), moments, 1.0))
    for part in (
        "call 4711 of agent5001: outbound, 5001 → 5002, Released, answered, ring 4.2 s, talk 2:05",
        "uuid-1, conn-1",
        "consult belongs to uuid-0",
        "5002 joined 12:00:00, left 12:02:00",
        "[bold]5003 (RoleNewParty) joined 12:00:00, left 12:01:00",
        "Segment = Gold",
        'Nested = {"a":[1,2]}',
        "Long = " + "x" * (answers.VALUE_CHARS_MAX - 1) + "…",
        "12:00:01.250",
        "1.2 s",
        "StatusChange",
        "state: Ringing → Established",
        "participant 5002 joins",
        "participant 5003 leaves",
        "user_data Segment: [red]Gold",
        "user_data Old: 1 is gone",
        "capabilities: +Hangup +Retrieve -Hold",
        "odd: unknown_state: Quantum",
        "observed: 100 %",
    ):
        assert part in text, part


def test_coverage_and_its_gaps() -> None:
    """Each stretch with its length; with gaps only, those observed are left out."""
    middle = NOON + timedelta(seconds=90)
    stretches = (
        Stretch("agent5001", "north", NOON, middle, ""),
        Stretch("agent5001", "north", middle, LATER, "session lost"),
    )
    coverage = Coverage(NOON, LATER, stretches, 0.75, {"session lost": 30.0})
    text = _shown(show_coverage, coverage, gaps_only=False)
    assert "1:30" in text
    assert [line.split()[-1] for line in text.splitlines() if "agent5001" in line] == ["observed", "lost"]
    assert "not observed, session lost: 30.0 s of all accounts together" in text
    assert "observed: 75 % of the time" in text
    gaps = _shown(show_coverage, coverage, gaps_only=True)
    assert [line.split()[-1] for line in gaps.splitlines() if "agent5001" in line] == ["lost"]


def test_json_has_everything() -> None:
    """JSON has each field, times with their zone, and calls whole."""
    told = json.loads(as_json(_page(_found(), observed=0.5, after="1-2")))
    assert (told["observed"], told["after"], told["since"]) == (0.5, "1-2", "2026-03-02T12:00:00Z")
    (found,) = told["calls"]
    assert found["account"] == "agent5001"
    assert found["call"]["user_data"]["Nested"] == {"a": [1, 2]}
    assert [party["number"] for party in found["call"]["parties"]] == ["5002", "[bold]5003"]


def test_json_has_raw_messages() -> None:
    """A raw message is text where it is UTF-8, and base64 where it is not."""

    def moment(raw: bytes) -> Moment:
        return Moment(NOON, None, 1, "", "", Source.COMETD, "/v2/me/calls", (), (), raw)

    (told,) = json.loads(as_json([Timeline(_found(), (moment(b'{"\xc3\xa4":1}'), moment(b"\xff")), 1.0)]))
    assert told["moments"][0]["raw"] == '{"ä":1}'
    assert told["moments"][1]["raw_base64"] == "/w=="
