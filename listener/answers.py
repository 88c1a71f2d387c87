"""How answers look: the calls, one call's timeline and coverage, as tables for people and JSON for programs.

It decides columns, words and units; it refuses to know how an answer was found, and asks nothing itself. A
table shows local time, JSON has UTC; JSON holds everything, a table what fits. Both always say which share of
the asked time was observed, because "no call" and "nobody listened" are different answers.
"""

import base64
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from listener.core.calls import Call, Direction
from listener.store.history import Altered, Coverage, Found, Moment, Page, Stretch, Timeline

WIDTH_ELSEWHERE = 200
"""Columns where standard output is no terminal: wide enough that nothing useful is cut."""
VALUE_CHARS_MAX = 60
"""A longer value of attached data is cut in a table; JSON has it whole."""

_STATES = {"Ringing": "yellow", "Dialing": "cyan", "Established": "green", "Held": "magenta"}


def console() -> Console:
    """A console for standard output, as it is now."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=WIDTH_ELSEWHERE)


def as_json(answer: Page | Coverage | Iterable[Timeline]) -> str:
    """Give an answer whole, as indented JSON. A raw message is text where it is UTF-8, else base64."""
    told: Any = msgspec.to_builtins(
        answer if isinstance(answer, Page | Coverage) else list(answer), builtin_types=(bytes,)
    )
    return msgspec.json.format(msgspec.json.encode(_with_text(told)), indent=2).decode()


def _with_text(value: Any) -> Any:
    if isinstance(value, dict):
        named = {}
        for key, item in value.items():
            if isinstance(item, bytes):
                try:
                    named[key] = item.decode()
                except UnicodeDecodeError:
                    named[f"{key}_base64"] = base64.b64encode(item).decode()
            else:
                named[key] = _with_text(item)
        return named
    return [_with_text(item) for item in value] if isinstance(value, list | tuple) else value


# ── Words ─────────────────────────────────────────────────────────────────────────────────────────────


def _local(at: datetime, *, milliseconds: bool = False) -> str:
    local = at.astimezone()
    return local.strftime("%Y-%m-%d %H:%M:%S") + (f".{local.microsecond // 1000:03d}" if milliseconds else "")


def seconds(value: float | None) -> str:
    """Say a duration: 7.4 s, 2:05, 1:02:05; nothing for none."""
    if value is None:
        return ""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def share(value: float) -> str:
    """Say a share in percent, never rounded up to all nor down to nothing."""
    percent = value * 100
    if 0 < percent < 0.1:
        return "less than 0.1 %"
    if 99.9 < percent < 100:
        return "more than 99.9 %"
    return f"{percent:.1f} %".replace(".0 %", " %")


def _participants(call: Call) -> str:
    """Everyone who was on the call, once each, in order; in brackets who has left before it ended."""
    stays = {party.number: party for party in call.parties}
    ended_at = call.ended_at or call.last_heard_at
    return ", ".join(
        number if party.left_at is None or party.left_at >= ended_at else f"({number})"
        for number, party in stays.items()
    )


def _from_to(call: Call) -> str:
    """Who called whom; where the beginning was not heard, a dash says only that they are connected."""
    own, other = call.phone_number or "?", call.number or "?"
    match call.direction:
        case Direction.OUTBOUND:
            return f"{own} → {other}"
        case Direction.INBOUND:
            return f"{other} → {own}"
        case Direction.UNKNOWN:
            return f"{own} – {other}"


def _state(call: Call) -> str:
    colour = _STATES.get(call.state, "dim" if not call.open else "white")
    return f"[{colour}]{escape(call.state)}[/]"


def _outcome(call: Call) -> str:
    if call.settled is not None and call.settled.startswith("inferred"):
        return f"{call.outcome or ''} (inferred)".strip()
    return call.outcome or ""


def _observed(observed: float, since: datetime, until: datetime) -> str:
    return f"observed: {share(observed)} of the time from {_local(since)} to {_local(until)}"


# ── Tables ────────────────────────────────────────────────────────────────────────────────────────────


def _table(*columns: str, right: Iterable[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column, justify="right" if column in right else "left", no_wrap=column != "participants"
        )
    return table


def show_calls(page: Page, out: Console) -> None:
    """Print calls, newest first, and below them what share of the time was observed."""
    table = _table(
        "id", "began", "account", "call", "participants", "state", "ring", "talk", "hold", "outcome",
        right=("id", "ring", "talk", "hold"),
    )  # fmt: skip
    for found in page.calls:
        call = found.call
        table.add_row(
            str(call.id),
            _local(call.opened_at),
            escape(found.account),
            escape(_from_to(call)),
            escape(_participants(call)),
            _state(call),
            seconds(call.ring_s),
            seconds(call.talk_s),
            seconds(call.hold_s) if call.hold_count else "",
            _outcome(call),
        )
    if page.calls:
        out.print(table)
    out.print(f"{len(page.calls) or 'no'} call{'s' * (len(page.calls) != 1)}", end="; ")
    out.print(_observed(page.observed, page.since, page.until))
    if page.after is not None:
        out.print(f"there are more: --after {page.after}")


def show_timeline(timeline: Timeline, out: Console) -> None:
    """Print one call: what it is, who was on it, and every message with what it changed."""
    call = timeline.found.call
    out.print(f"[bold]call {call.id}[/] of {escape(timeline.found.account)}: {_summary(timeline.found)}")
    out.print(f"  ids     {escape(', '.join(call.aliases))}")
    if call.parent_call_id:
        out.print(f"  consult belongs to {escape(call.parent_call_id)}")
    for party in call.parties:
        left = f"left {_local(party.left_at)}" if party.left_at else "is on it"
        role = f" ({party.role})" if party.role else ""
        out.print(f"  {escape(party.number)}{escape(role)} joined {_local(party.joined_at)}, {left}")
    for key, value in call.user_data.items():
        out.print(f"  {escape(key)} = {escape(_value(value))}")
    table = _table("heard", "after", "message", "what changed", right=("after",))
    for moment in timeline.moments:
        after = seconds((moment.at - call.opened_at).total_seconds())
        title = moment.notification_type or moment.message_type or moment.source
        table.add_row(_local(moment.at, milliseconds=True), after, escape(title), "\n".join(_told(moment)))
    out.print(table)
    out.print(_observed(timeline.observed, call.opened_at, call.last_heard_at))


def _summary(found: Found) -> str:
    call = found.call
    parts = [call.direction, escape(_from_to(call)), _state(call)]
    if outcome := _outcome(call):
        parts.append(outcome)
    figures = [
        f"{name} {seconds(value)}"
        for name, value in (
            ("ring", call.ring_s),
            ("talk", call.talk_s),
            ("hold", call.hold_s),
            ("wrap", call.wrap_s),
        )
        if value
    ]
    return ", ".join([*parts, *figures])


def _told(moment: Moment) -> list[str]:
    changed = [_change(change) for change in moment.changes]
    return changed + [f"[yellow]odd: {odd.kind}: {escape(odd.detail)}[/]" for odd in moment.anomalies]


def _change(change: Altered) -> str:
    name = escape(f"{change.field} {change.key}".strip())
    if change.field == "participant":
        return f"participant {escape(change.key)} {'leaves' if change.after is None else 'joins'}"
    if change.field == "capabilities":
        before, after = set(change.before or ()), set(change.after or ())
        moved = [f"+{each}" for each in sorted(after - before)]
        moved += [f"-{each}" for each in sorted(before - after)]
        return f"{name}: {escape(' '.join(moved))}"
    if change.before is None:
        return f"{name}: {escape(_value(change.after))}"
    if change.after is None:
        return f"{name}: {escape(_value(change.before))} is gone"
    return f"{name}: {escape(_value(change.before))} → {escape(_value(change.after))}"


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= VALUE_CHARS_MAX else text[: VALUE_CHARS_MAX - 1] + "…"


def show_coverage(coverage: Coverage, out: Console, *, gaps_only: bool) -> None:
    """Print for each account from when to when it was observed or, with `gaps_only`, only when it was not."""
    table = _table("account", "from", "to", "for", "", right=("for",))
    shown = [stretch for stretch in coverage.stretches if stretch.cause or not gaps_only]
    for stretch in shown:
        table.add_row(
            escape(stretch.account),
            _local(stretch.since),
            _local(stretch.until),
            seconds((stretch.until - stretch.since).total_seconds()),
            _covered(stretch),
        )
    if shown:
        out.print(table)
    for cause, lasted in sorted(coverage.gaps_s.items()):
        out.print(f"not observed, {escape(cause)}: {seconds(lasted)} of all accounts together")
    out.print(_observed(coverage.observed, coverage.since, coverage.until))


def _covered(stretch: Stretch) -> str:
    return f"[red]{escape(stretch.cause)}[/]" if stretch.cause else "[green]observed[/]"
