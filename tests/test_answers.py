"""How answers look: what a table says, and that JSON says it all."""

import io
import json
import time
from collections.abc import Iterator
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
def _utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Local time is UTC, so that what is printed does not depend on the machine."""
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


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


def _shown(show: Any, *arguments: Any, width: int = answers.WIDTH_ELSEWHERE, **options: Any) -> str:
    out = Console(file=io.StringIO(), width=width, highlight=False)
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
    words = "4711 2026-03-02 12:00:00 agent5001 5001 → 5002 5002, ([bold]5003) Released 4.2 s 2:05 answered"
    assert " ".join(row.split()) == words
    assert "1 call; observed: 98.7 % of the time from 2026-03-02 12:00:00 to 2026-03-02 12:02:00" in text
    assert "there are more: --after 123-4711" in text


def _wide_page(*opened_at: datetime) -> Page:
    """Calls between international numbers, one with an inferred end: wider than most."""
    parties = (Party(0, "+12025550113", "", "", "", NOON, LATER), Party(1, "5003", "", "", "", NOON, NOON))
    figures: dict[str, Any] = {"phone_number": "+12025550112", "number": "+12025550113", "parties": parties}
    ended = {"settled": "inferred: no longer live", "ended_at": None, "outcome": Outcome.UNANSWERED}
    return _page(
        *(_found(id=1_234_567, opened_at=at, **figures, hold_count=1, hold_s=3.0) for at in opened_at),
        _found(id=1_234_568, opened_at=NOON, **figures, **ended),
    )


@pytest.mark.parametrize("width", [*range(24, 80, 7), 80, 81, 99, 100, 120, 140, 200])
@pytest.mark.parametrize("opened_at", [NOON, NOON - timedelta(days=1)])
def test_a_list_is_never_cut(width: int, opened_at: datetime) -> None:
    """At any width a row has its id, time, both numbers, everybody on it, and how it ended."""
    text = _shown(show_calls, _wide_page(opened_at), width=width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for part in ("1234567", "1234568", "12:00:00", "(5003)", "answered", "unanswered", "(inferred)"):
        assert part in text, part
    assert text.count("2026-03-02") >= 1
    assert text.count("+12025550112") == 2
    assert text.count("+12025550113") == 4


def test_at_80_columns_a_call_is_one_line() -> None:
    """Narrow, the day stands above, and what tells least is left out and said to be."""
    lines = _shown(show_calls, _page(_found(), _found(id=4712)), width=80).splitlines()
    assert lines[0] == "2026-03-02"
    rows = [" ".join(line.split()) for line in lines if line.lstrip().startswith("47")]
    assert rows == [
        f"{id} 12:00:00 agent5001 5001 → 5002 5002, ([bold]5003) Released answered" for id in (4711, 4712)
    ]
    assert "too narrow for: hold, ring, talk; a wider terminal or -o json shows them" in lines


def test_wide_enough_nothing_is_left_out() -> None:
    """At 200 columns all is there, the date with each call."""
    text = _shown(show_calls, _wide_page(NOON))
    assert "too narrow" not in text
    assert text.count("2026-03-02 12:00:00") == 2 + 1


def test_no_calls_are_not_no_observation() -> None:
    """An empty answer still says whether anybody listened."""
    assert _shown(show_calls, _page(observed=0.0)) == (
        "no calls; observed: 0 % of the time from 2026-03-02 12:00:00 to 2026-03-02 12:02:00\n"
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


def test_an_account_whose_number_nobody_told() -> None:
    """Its name stands for it: who called it is known all the same."""
    text = _shown(show_calls, _page(_found(phone_number=None, direction=Direction.INBOUND)), width=80)
    assert "5002 → agent5001" in text


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
    timeline = Timeline(_found(parent_call_id="uuid-0"), moments, 1.0)
    text = _shown(show_timeline, timeline, everything=True)
    for part in (
        "call 4711 of agent5001: outbound, 5001 → 5002, Released, answered, ring 4.2 s, talk 2:05",
        "began   2026-03-02 12:00:00",
        "uuid-1, conn-1",
        "consult belongs to uuid-0",
        "5002 joined 2026-03-02 12:00:00, left 2026-03-02 12:02:00",
        "[bold]5003 (RoleNewParty) joined 2026-03-02 12:00:00, left 2026-03-02 12:01:00",
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


@pytest.mark.parametrize("width", [80, 140, 200])
def test_a_timeline_is_never_cut(width: int) -> None:
    """At any usual width the time, the seconds, the message and all changes are whole."""
    raw = (Altered("user_data", "Key", None, "v" * 55), Altered("capabilities", "", [], ["Hold"]))
    name = "CallRecordingStateChange"
    moment = Moment(LATER, None, 9, "", name, Source.COMETD, "/v2/me/calls", raw, (), b"{}")
    text = _shown(show_timeline, Timeline(_found(), (moment,), 1.0), width=width)
    (row,) = [line for line in text.splitlines() if name in line]
    assert row.split()[:3] == ["12:02:00.000", "2:00", name]
    table = text[text.index("heard") :]
    assert table.count("v") == 55 + 1  # and that of "observed"
    assert "…" not in table


def test_capabilities_only_when_asked_for() -> None:
    """What an agent may do changes with every message: left out, and said to be."""
    changes = (
        Altered("capabilities", "", ["Hold"], ["Retrieve"]),
        Altered("state", "", "Held", "Established"),
    )
    moment = Moment(LATER, None, 9, "", "StatusChange", Source.COMETD, "/v2/me/calls", changes, (), b"{}")
    timeline = Timeline(_found(), (moment,), 1.0)
    short, whole = (_shown(show_timeline, timeline, everything=each) for each in (False, True))
    assert "+Retrieve" not in short
    assert "1 change of capabilities left out; --all shows all" in short
    assert "+Retrieve -Hold" in whole
    assert "--all" not in whole


def test_a_call_over_midnight_has_dates() -> None:
    """Where the day above is not the day of all messages, each has its own."""
    moment = Moment(NOON + timedelta(days=1), None, 9, "", "X", Source.COMETD, "", (), (), b"{}")
    assert "2026-03-03 12:00:00.000" in _shown(show_timeline, Timeline(_found(), (moment,), 1.0), width=80)


def _coverage(*accounts: str) -> Coverage:
    """Of each account: observed for a minute, a gap told in two rows, observed again."""
    at = [NOON + timedelta(seconds=each) for each in (0, 60, 75, 90, 120)]
    causes = ("", "session lost", "session lost", "")
    stretches = tuple(
        Stretch(account, "north", since, until, cause)
        for account in accounts
        for since, until, cause in zip(at, at[1:], causes, strict=False)
    )
    return Coverage(NOON, LATER, stretches, 0.75, {"session lost": 30.0 * len(accounts)})


@pytest.mark.parametrize("width", [80, 200])
def test_coverage_account_by_account(width: int) -> None:
    """A row for each account: its share, how many gaps, the longest and why, and how it is now."""
    text = _shown(show_coverage, _coverage("agent5001", "agent5002"), width=width)
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "account observed gaps longest gap its cause now" in rows
    assert "agent5001 75 % 1 30.0 s session lost observed" in rows
    assert "agent5002 75 % 1 30.0 s session lost observed" in rows
    assert "not observed, session lost: 1:00 of all accounts together" in rows
    assert "observed: 75 % of the time" in text


def test_coverage_that_never_broke() -> None:
    """An account without a gap has none that is the longest; the end of the asked time has its name."""
    coverage = Coverage(NOON, LATER, (Stretch("agent5001", "north", NOON, LATER, ""),), 1.0, {})
    text = _shown(show_coverage, coverage, last="at the end")
    assert "agent5001 100 % 0 observed" in [" ".join(line.split()) for line in text.splitlines()]
    assert "at the end" in text


def test_coverage_and_its_gaps() -> None:
    """Each stretch with its length, neighbours of one cause as one; or only those not observed."""
    text = _shown(show_coverage, _coverage("agent5001"), each=True)
    rows = [line for line in text.splitlines() if "agent5001" in line]
    assert [line.split()[-1] for line in rows] == ["observed", "lost", "observed"]
    assert "30.0 s" in rows[1]
    assert "not observed, session lost: 30.0 s\n" in text
    gaps = _shown(show_coverage, _coverage("agent5001"), gaps_only=True)
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
