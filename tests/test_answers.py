"""How answers look: what a table says, and that JSON says it all."""

import io
import json
import re
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.console import Console

from listener import answers
from listener.answers import (
    WHY_GROUPS_SHOWN,
    as_json,
    axis,
    cells,
    seconds,
    share,
    show_calls,
    show_coverage,
    show_dial,
    show_dials,
    show_strip,
    show_timeline,
    show_why,
)
from listener.core.calls import GAP_CAUSES, Call, Direction, Outcome, Party, Source
from listener.core.dialling import Cause, Confidence, DialState, Leg, Refused, System, advance, placed
from listener.core.dialling import Outcome as DialOutcome
from listener.core.why import Tally, explain
from listener.store.dialled import DialFound, DialPage, DialTimeline, FactFound
from listener.store.history import (
    Account,
    Altered,
    Coverage,
    Figures,
    Found,
    Moment,
    Odd,
    Page,
    Tenant,
    Timeline,
    Watched,
    assess,
)

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
    assert "inferred: nobody heard the end (no longer live); + is at least so long, ? is not known" in text


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"established_at": NOON}, ["4.2 s", "2:05+"]),
        ({"established_at": NOON, "talk_s": 0.0}, ["4.2 s", "?"]),
        ({"established_at": NOON, "talk_s": 0.0, "hold_count": 1, "hold_s": 3.0}, ["4.2 s", "?", "3.0 s+"]),
        ({"talk_s": 0.0, "ring_s": 0.0, "outcome": Outcome.UNKNOWN}, ["?"]),
    ],
)
def test_a_call_that_ended_unheard_has_no_invented_duration(fields: dict[str, Any], told: list[str]) -> None:
    """What is known is a least; what is not known is no zero."""
    found = _found(settled="inferred: no longer live", ended_at=None, **fields)
    (row,) = [line for line in _shown(show_calls, _page(found)).splitlines() if "4711" in line]
    figures = row.partition("Released")[2].replace(" s", "s").split()
    assert [each.replace("s", " s") for each in figures[: len(told)]] == told
    assert figures[len(told)] == str(found.call.outcome)


def test_a_timeline_of_a_call_that_ended_unheard() -> None:
    """Between when it ended and why that is known, and neither an end nor who left when."""
    party = Party(0, "5002", "", "", "", NOON)
    found = _found(settled="inferred: no longer live", ended_at=None, established_at=NOON, parties=(party,))
    text = _shown(show_timeline, Timeline(found, (), 0.5, LATER + timedelta(minutes=3)))
    assert "ended   unheard, between 2026-03-02 12:02:00 and 2026-03-02 12:05:00: no longer live\n" in text
    assert "5002 joined 2026-03-02 12:00:00, nobody heard when it left" in text
    assert "answered (inferred), ring 4.2 s, talk 2:05+\n" in text
    assert "observed: 50 % of the time from 2026-03-02 12:00:00 to 2026-03-02 12:05:00" in text


def test_a_timeline_of_a_call_that_goes_on() -> None:
    """It has not ended yet, and the share is about the time up to now."""
    party = Party(0, "5002", "", "", "", NOON)
    found = _found(settled=None, outcome=None, ended_at=None, state="Established", parties=(party,))
    text = _shown(show_timeline, Timeline(found, (), 1.0, LATER + timedelta(minutes=3)))
    assert "  ended   not yet\n" in text
    assert "5002 joined 2026-03-02 12:00:00, is on it" in text
    assert "observed: 100 % of the time from 2026-03-02 12:00:00 to 2026-03-02 12:05:00" in text


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
    timeline = Timeline(_found(parent_call_id="uuid-0"), moments, 1.0, LATER)
    text = _shown(show_timeline, timeline, everything=True)
    for part in (
        "call 4711 of agent5001: outbound, 5001 → 5002, Released, answered, ring 4.2 s, talk 2:05",
        "began   2026-03-02 12:00:00",
        "ended   2026-03-02 12:02:00",
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
    text = _shown(show_timeline, Timeline(_found(), (moment,), 1.0, LATER), width=width)
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
    timeline = Timeline(_found(), (moment,), 1.0, LATER)
    short, whole = (_shown(show_timeline, timeline, everything=each) for each in (False, True))
    assert "+Retrieve" not in short
    assert "1 change of capabilities left out; --all shows all" in short
    assert "+Retrieve -Hold" in whole
    assert "--all" not in whole


def test_a_call_over_midnight_has_dates() -> None:
    """Where the day above is not the day of all messages, each has its own."""
    moment = Moment(NOON + timedelta(days=1), None, 9, "", "X", Source.COMETD, "", (), (), b"{}")
    assert "2026-03-03 12:00:00.000" in _shown(
        show_timeline, Timeline(_found(), (moment,), 1.0, LATER), width=80
    )


def _at(seconds_: float) -> datetime:
    return NOON + timedelta(seconds=seconds_)


def _watched(name: str, *rows: tuple[float, float, str], **other: Any) -> Watched:
    """An account from noon to two minutes later, of which these rows tell."""
    fields: dict[str, Any] = {"tenant": "north", "since": NOON, "removed_at": None} | other
    return assess(Account(name, **fields), [(_at(a), _at(b), cause) for a, b, cause in rows], NOON, LATER)


def _once_lost(name: str, **other: Any) -> Watched:
    """Observed for a minute, a gap told in two rows, observed again."""
    rows = ((0, 60, ""), (60, 75, "session lost"), (75, 90, "session lost"), (90, 120, ""))
    return _watched(name, *rows, **other)


def _coverage(*accounts: Watched, **other: Any) -> Coverage:
    count = len(accounts)
    total = Figures(120.0 * count, 90.0 * count, 75.0, count, 30.0, {"session lost": 30.0 * count})
    fields: dict[str, Any] = {
        "since": NOON,
        "until": LATER,
        "now": LATER,
        "asked_until": LATER,
        "first_at": NOON,
        "total": total,
        "last": {"": count},
        "tenants": (Tenant("north", count, total),),
        "accounts": accounts,
        "not_shown": 0,
    }
    return Coverage(**(fields | other))


def _lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.mark.parametrize("width", [100, 200])
def test_coverage_account_by_account(width: int) -> None:
    """A row for each account: its share, its gaps by cause, and how it is now; then all together."""
    text = _shown(show_coverage, _coverage(_once_lost("agent5001"), _once_lost("agent5002")), width=width)
    rows = _lines(text)
    assert "account tenant observed gaps longest gap not observed now" in rows
    assert "agent5001 north 75 % 1 30.0 s session lost 30.0 s observed" in rows
    assert "agent5002 north 75 % 1 30.0 s session lost 30.0 s observed" in rows
    assert "north (2) 75 % 2 30.0 s session lost 1:00" in rows
    assert "all (2) 75 % 2 30.0 s session lost 1:00" in rows
    assert "now: 2 observed" in rows
    assert "observed: 75 % of the time from 2026-03-02 12:00:00 to 2026-03-02 12:02:00" in rows


def test_coverage_is_said_of_no_time_before_the_first_account() -> None:
    """A minute after a start, a question about the last hour is answered for that minute."""
    since = NOON - timedelta(minutes=58)
    rows = _lines(_shown(show_coverage, _coverage(_once_lost("agent5001"), since=since)))
    assert "observed: 75 % of the time from 2026-03-02 12:00:00 to 2026-03-02 12:02:00" in rows


@pytest.mark.parametrize("width", [60, 80])
def test_narrow_coverage_is_not_cut(width: int) -> None:
    """What does not fit goes on on the next line, and all of it is there."""
    rows = [(0, 10, "subscription refused"), (10, 20, "login refused"), (20, 120, "session lost")]
    coverage = _coverage(_watched("agent5001", *rows))
    text = _shown(show_coverage, coverage, width=width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for word in ("agent5001", "subscription", "refused", "login", "session", "lost", "1:40", "12:00:20"):
        assert word in text, word


def test_each_cause_has_its_line() -> None:
    """At 80 columns a cause stands whole beside its seconds, the longest first."""
    coverage = _coverage(_watched("agent5001", (0, 10, "not started"), (10, 70, "stalled"), (70, 120, "")))
    lines = _shown(show_coverage, coverage, width=80).splitlines()
    assert _lines("\n".join(lines[2:4])) == [
        "agent5001 north 41.7 % 2 1:00 stalled 1:00 observed",
        "not started 10.0 s",
    ]


def test_coverage_now() -> None:
    """A gap that goes on is told with its beginning, by day where that was another; a removed account is
    neither observed nor a gap."""
    gone = _watched("gone", (0, 60, ""), removed_at=_at(60))
    since = _watched("deaf", (-90_000, 300, "disconnected"), since=_at(-100_000))
    coverage = _coverage(since, _watched("late", (0, 61, ""), (61, 120, "stalled")), gone)
    coverage = replace(coverage, last={"disconnected": 1, "stalled": 1}, not_shown=7)
    text = "\n".join(_lines(_shown(show_coverage, coverage)))
    assert "disconnected 2:00 disconnected since 2026-03-01 11:00:00\n" in text
    assert "stalled 59.0 s stalled since 12:01:01\n" in text
    assert "gone north 100 % 0 removed\n" in text
    assert "now: 1 disconnected, 1 stalled\n" in text
    assert "not shown, and none of them worse: 7 more; --limit shows more\n" in text


def test_coverage_of_a_time_that_is_over_or_not() -> None:
    """The end of the asked time is not called "now" where it is not; what is to come is said to be."""
    over = _shown(show_coverage, _coverage(_once_lost("a"), now=LATER + timedelta(days=1)))
    assert "at the end: 1 observed" in over
    assert "now" not in over
    half = _shown(show_coverage, _coverage(_once_lost("a"), asked_until=LATER + timedelta(days=1)))
    assert half.endswith("to 2026-03-02 12:02:00; the rest is still to come\n")


@pytest.mark.parametrize("show", [show_coverage, show_strip])
@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"first_at": None}, "not started: there is no account yet"),
        (
            {"since": LATER, "until": LATER, "now": NOON},
            "not started: the time from 2026-03-02 12:02:00 on is still to come",
        ),
        (
            {"first_at": LATER},
            "not started: the first account was added 2026-03-02 12:02:00, after that time",
        ),
        ({}, "there was no account from 2026-03-02 12:00:00 to 2026-03-02 12:02:00"),
    ],
)
def test_coverage_of_nobody(show: Any, other: dict[str, Any], said: str) -> None:
    """An answer without an account says why there is none."""
    assert _shown(show, _coverage(**other)) == f"{said}\n"


def test_coverage_and_its_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gap with its length, neighbours of one cause as one; and how many more there are."""
    coverage = _coverage(_once_lost("agent5001"), _once_lost("agent5002"))
    rows = _lines(_shown(show_coverage, coverage, gaps=True))
    assert "agent5001 2026-03-02 12:01:00 2026-03-02 12:01:30 30.0 s session lost" in rows
    assert "agent5002 2026-03-02 12:01:00 2026-03-02 12:01:30 30.0 s session lost" in rows
    monkeypatch.setattr(answers, "GAPS_SHOWN_MAX", 1)
    text = _shown(show_coverage, coverage, gaps=True)
    assert "agent5002" not in text
    assert "gaps not shown: 1 more; -o json has them all" in text


def test_coverage_as_json() -> None:
    """Exact figures as numbers, every gap, and of which time."""
    told = json.loads(as_json(_coverage(_once_lost("agent5001"))))
    (account,) = told["accounts"]
    assert (account["account"], account["tenant"]) == ("agent5001", "north")
    assert account["gaps"] == [
        {"since": "2026-03-02T12:01:00Z", "until": "2026-03-02T12:01:30Z", "cause": "session lost"}
    ]
    assert account["figures"] == {
        "asked_s": 120.0,
        "observed_s": 90.0,
        "percent": 75.0,
        "gaps": 1,
        "longest_gap_s": 30.0,
        "causes_s": {"session lost": 30.0},
    }
    assert account["last"] == {"cause": "", "since": "2026-03-02T12:01:30Z"}
    assert (told["since"], told["until"]) == ("2026-03-02T12:00:00Z", "2026-03-02T12:02:00Z")
    assert told["total"]["percent"] == told["tenants"][0]["figures"]["percent"] == 75.0


# ── Strips ────────────────────────────────────────────────────────────────────────────────────────────


def _edges(count: int) -> list[datetime]:
    return [NOON + (LATER - NOON) * place // count for place in range(count + 1)]


@pytest.mark.parametrize(
    ("rows", "drawn"),
    [
        ([(0, 120, "")], "━━━━━━"),
        ([(0, 20, ""), (20, 60, "disconnected"), (60, 120, "")], "━DD━━━"),
        ([(0, 30, ""), (30, 60, "disconnected"), (60, 120, "")], "━dD━━━"),
        ([(0, 50, ""), (50, 50.001, "stalled"), (50.001, 120, "")], "━━s━━━"),
        ([(0, 39.999, "stalled"), (39.999, 120, "")], "Ss━━━━"),
        ([(0, 5, "stalled"), (5, 20, "disconnected"), (20, 120, "")], "D━━━━━"),
        ([(0, 10, "stalled"), (10, 20, "disconnected"), (20, 120, "")], "D━━━━━"),
        ([(0, 5, "stalled"), (5, 7, "disconnected"), (7, 120, "")], "s━━━━━"),
        ([(0, 20, "sunspots"), (20, 120, "")], "U━━━━━"),
        ([], "NNNNNN"),
        ([(0, 120, "stopped")], "XXXXXX"),
    ],
)
def test_a_strip_is_true(rows: list[tuple[float, float, str]], drawn: str) -> None:
    """Capitals where nothing was observed, small letters where a part was not, however short."""
    assert cells(_watched("a", *rows), _edges(6), "━") == drawn


def test_a_strip_of_an_account_that_came_and_went() -> None:
    """Blank where there was no such account; a cell in which it came is judged by the part since then."""
    each = _watched("a", (30, 70, ""), (70, 80, "stalled"), since=_at(30), removed_at=_at(80))
    assert cells(each, _edges(6), "━") == " ━━s  "


@given(
    st.lists(
        st.tuples(st.integers(0, 120_000), st.sampled_from(["", "stalled", "disconnected"])), max_size=9
    ),
    st.integers(1, 40),
)
def test_a_strip_hides_no_gap(turns: list[tuple[int, str]], count: int) -> None:
    """Whatever the gaps and the width: a cell is drawn as observed where nothing of it is a gap, and as a gap
    where nothing of it was observed."""
    times = sorted({at for at, _ in turns} | {0, 120_000})
    causes = [cause for _, cause in turns] + [""] * len(times)
    rows = [(a / 1000, b / 1000, cause) for a, b, cause in zip(times, times[1:], causes, strict=False)]
    each, edges = _watched("a", *rows), _edges(count)
    drawn = cells(each, edges, "━")
    assert len(drawn) == count
    for character, since, until in zip(drawn, edges, edges[1:], strict=False):
        lost = sum(
            (max(min(gap.until, until) - max(gap.since, since), timedelta()) for gap in each.gaps),
            timedelta(),
        )
        assert (character == "━") == (lost == timedelta())
        assert character.isupper() == (lost == until - since)


def test_every_cause_has_its_letter() -> None:
    """One of its own: else two causes would look the same."""
    assert set(answers.CAUSES) == GAP_CAUSES
    letters = [letter for letter, _ in answers.CAUSES.values()]
    assert len(set(letters)) == len(letters)
    assert all(letter.isupper() for letter in letters)


@pytest.mark.parametrize("width", [20, 80, 200])
def test_the_picture(width: int) -> None:
    """A line for each account, as wide as the console, with its share; then times, and what letters mean."""
    text = _shown(show_strip, _coverage(_once_lost("agent5001"), _watched("b", (0, 120, ""))), width=width)
    one, two, axis_, legend = text.splitlines()[:4]
    assert len(one) == len(two) == max(width, 9 + 1 + answers.CELLS_MIN + 1 + 6)
    assert re.fullmatch(r"agent5001 ━+l?L+l?━+ 75.0 %", one) or width == 20
    assert re.fullmatch(r"b         ━+ +100 %", two)
    assert "L" in one.upper()
    if width > 20:
        assert "|12:00:00" in axis_ or "|12:00" in axis_
        assert legend == "━ observed  L session lost"
        assert "a small letter: a part of it was observed" in text
        assert "observed: 75 % of the time" in text


def test_the_picture_in_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal has colours, one that says NO_COLOR has none, and neither has a file."""

    def drawn(**options: Any) -> str:
        out = Console(file=io.StringIO(), width=80, highlight=False, **options)
        show_strip(_coverage(_once_lost("a")), out)
        assert isinstance(out.file, io.StringIO)
        return out.file.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[1;7;35mL" in drawn(force_terminal=True)
    assert "\x1b" not in drawn()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "35m" not in drawn(force_terminal=True)


@pytest.mark.parametrize(
    ("span", "count", "drawn"),
    [
        (timedelta(hours=1), 60, "|12:00         |12:15         |12:30         |12:45         "),
        (timedelta(days=2), 48, "|12:00      |03-03      |12:00      |03-04           "),
        (timedelta(seconds=30), 40, "|12:00:00    |12:00:10    |12:00:20     "),
        (timedelta(days=100), 40, None),
        (timedelta(microseconds=3), 10, None),
    ],
)
def test_the_axis(span: timedelta, count: int, drawn: str | None) -> None:
    """Round times, each below its cell, and never more than there is room for."""
    found = axis(NOON, NOON + span, count)
    assert len(found) == count
    assert drawn is None or found == drawn[:count].ljust(count)


def test_the_axis_of_the_night_when_summer_time_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mark stands where its time on the wall was."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    since = datetime(2026, 3, 28, 23, tzinfo=UTC)  # midnight; 02:00 to 03:00 does not exist
    drawn = axis(since, since + timedelta(hours=6), 120)
    assert drawn.index("|01:00") == 20
    assert drawn.index("|04:00") == 60


def test_json_has_everything() -> None:
    """JSON has each field, times with their zone, and calls whole."""
    told = json.loads(as_json(_page(_found(), observed=0.5, after="1-2")))
    assert (told["observed"], told["after"], told["since"]) == (0.5, "1-2", "2026-03-02T12:00:00Z")
    (found,) = told["calls"]
    assert found["account"] == "agent5001"
    assert found["call"]["user_data"]["Nested"] == {"a": [1, 2]}
    assert [party["number"] for party in found["call"]["parties"]] == ["5002", "[bold]5003"]


def test_json_of_a_call_that_ended_unheard() -> None:
    """It has no end, and says why it counts as ended; `until` is when that was concluded."""
    found = _found(settled="inferred: no longer live", ended_at=None)
    (told,) = json.loads(as_json([Timeline(found, (), 0.5, LATER + timedelta(minutes=3))]))
    call = told["found"]["call"]
    assert (call["ended_at"], call["settled"]) == (None, "inferred: no longer live")
    assert told["until"] == "2026-03-02T12:05:00Z"


def test_json_has_raw_messages() -> None:
    """A raw message is text where it is UTF-8, and base64 where it is not."""

    def moment(raw: bytes) -> Moment:
        return Moment(NOON, None, 1, "", "", Source.COMETD, "/v2/me/calls", (), (), raw)

    (told,) = json.loads(
        as_json([Timeline(_found(), (moment(b'{"\xc3\xa4":1}'), moment(b"\xff")), 1.0, LATER)])
    )
    assert told["moments"][0]["raw"] == '{"ä":1}'
    assert told["moments"][1]["raw_base64"] == "/w=="


# ── Dials ─────────────────────────────────────────────────────────────────────────────────────────────


def _dial(**other: Any) -> DialFound:
    dial = placed("d-1", 1, System.GWS, "0383208100", NOON, device="5000")
    ended = advance(dial, Refused(Cause(System.GWS, "statusCode", "5", "no permission")), LATER).dial
    return DialFound("agent5000", "north", replace(ended, **other))


def _dials(*found: DialFound, width: int = 200) -> str:
    out = Console(file=io.StringIO(), width=width, highlight=False)
    show_dials(DialPage(found, None, 1.0, NOON, LATER), out)
    text: str = out.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_a_dial_says_how_it_ended_and_why() -> None:
    """Who dialled whom, the outcome, the leg, and the raw cause in its system's words."""
    text = _dials(_dial())
    assert re.search(
        r"d-1 +12:00:00 +agent5000 → 0383208100 +gws +placed +system +not_allowed: statusCode 5 no", text
    )
    assert "1 dial; observed: 100 % of the time" in text
    assert "not_allowed (inferred)" in _dials(_dial(confidence=Confidence.INFERRED))


@pytest.mark.parametrize(
    ("system", "device", "who"),
    [
        (System.GWS, "3f0f2a6e-7d2b-4d0c-9b7e-5a1f2d6c8e90", "agent5000"),
        (System.NOOJEE, "SIP/101", "101"),
        (System.CLICK2DIAL, "2001", "2001"),
        (System.NOOJEE, None, "agent5000"),
    ],
)
def test_who_dialled_has_a_name_or_a_number(system: System, device: str | None, who: str) -> None:
    """The account, as nobody knows a device of GWS by its id; of a PBX the extension."""
    assert f" {who} → 0383208100" in _dials(_dial(system=system, device=device))


def test_a_dial_that_waits_says_how_far_it_got() -> None:
    """In brackets, and the brackets are explained."""
    waiting = DialFound("agent5000", "", placed("d-2", 1, System.NOOJEE, "5001", NOON))
    text = _dials(waiting)
    assert "(requested)" in text
    assert "in brackets: it waits for its end" in text


def test_dials_on_a_narrow_terminal_keep_what_matters() -> None:
    """The id, who dialled whom, the outcome and the cause stay, each word whole; what is left out is said."""
    many = {
        "id": "d-3edd6b025f6f9641",
        "system": System.CLICK2DIAL,
        "device": "2001",
        "number": "27820001234",
    }
    text = _dials(_dial(**many), _dial(**many, requested_at=NOON - timedelta(days=1)), width=80)
    assert all(len(line) <= 80 for line in text.splitlines())
    for word in ("d-3edd6b025f6f9641", "2001 → 27820001234", "not_allowed:", "statusCode", "permission"):
        assert text.count(word) == 2, word
    assert "too narrow for: origin, leg, ring, answer, system" in text


def test_one_dial_tells_what_led_to_its_outcome() -> None:
    """Its facts in order, its call and how sure that is; of several candidates none is named as its call."""
    fact = FactFound(
        LATER, "refused", "", None, None, _dial().dial.cause, DialState.ENDED, DialOutcome.NOT_ALLOWED
    )
    out = Console(file=io.StringIO(), width=120, highlight=False)
    found = replace(_dial(), key="order-1", candidates=("d-7",))
    show_dial(DialTimeline(found, (fact,), None, None), out)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert "cause       statusCode 5 no permission" in text
    assert "key         order-1" in text
    assert "ambiguous: it may also be that of d-7" in text
    assert re.search(r"12:02:00.000 +refused +statusCode 5 +ended, not_allowed", text)


def _why(*now: Tally, before: Sequence[Tally] = (), width: int = 200) -> list[str]:
    out = Console(file=io.StringIO(), width=width, highlight=False)
    show_why(explain(now, before), out)
    lines: list[str] = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return lines


def test_why_says_the_sentence_and_then_the_groups() -> None:
    """What to know first comes first; then of each group how many, how and where, and below it the share
    against before, when it was last, and a dial to look at. Nothing is cut where it is narrow."""
    bad = Tally(
        "gws", "ann", "2787123", DialOutcome.BUSY, 40, NOON, LATER,
        cause="ErrorCode 231", leg=Leg.CALLEE, example="d-7",
    )  # fmt: skip
    good = Tally("gws", "ann", "2782555", DialOutcome.ANSWERED, 60, NOON, LATER)
    before = [replace(good, dials=100)]
    lines = _why(bad, good, before=before, width=500)
    assert lines[0].startswith("The rise is in numbers that begin with 2787123: 40 of 40 ended as busy")
    where = "system gws, account ann, numbers that begin with 2787"
    assert lines[1:] == [
        "",
        "2026-03-02",
        f"40 of 40 busy (ErrorCode 231) on the callee's leg: {where}",
        "    100 %, none dialled before; first 12:00:00, last 12:02:00; e.g. d-7",
    ]
    narrow = _why(bad, good, before=before, width=40)
    assert all(len(line) <= 40 for line in narrow)
    assert " ".join(" ".join(narrow).split()) == " ".join(" ".join(lines).split())


def test_why_shows_the_largest_groups() -> None:
    """More than one can take in at night are left out, and counted."""
    causes = range(WHY_GROUPS_SHOWN + 2)
    lines = _why(
        *(
            Tally(
                "gws", "ann", "2787123", DialOutcome.FAILED, 10 + each, NOON, LATER, cause=f"ErrorCode {each}"
            )
            for each in causes
        )
    )
    shown = [line for line in lines if "failed (ErrorCode" in line]
    assert [int(line.split()[0]) for line in shown] == [10 + each for each in reversed(causes[2:])]
    assert lines[-1] == "21 failures in smaller groups left out; -o json has more"
