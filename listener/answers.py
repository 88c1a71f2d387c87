"""How answers look: the calls, one call's timeline and coverage, as tables for people and JSON for programs.

It decides columns, words and units; it refuses to know how an answer was found, and asks nothing itself. A
table shows local time, JSON has UTC; JSON holds everything, a table what fits. Both always say which share of
the asked time was observed, because "no call" and "nobody listened" are different answers.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from listener.core.calls import Call
from listener.store.history import Altered, Coverage, Found, Odd, Page, Stretch, Timeline

WIDTH_ELSEWHERE = 200
"""Columns where standard output is no terminal: wide enough that nothing useful is left out."""
PARTICIPANTS_CHARS = 24
"""Participants go on on the next line beyond so many characters, rather than that another column goes."""
TITLE_CHARS_MAX = 30
"""A longer name of a message, which Genesys has none of, goes on on the next line."""
VALUE_CHARS_MAX = 60
"""A longer value of attached data is cut in a table; JSON has it whole."""

_STATES = {"Ringing": "yellow", "Dialing": "cyan", "Established": "green", "Held": "magenta"}


def console() -> Console:
    """A console for standard output, as it is now."""
    found = Console(highlight=False)
    # COLUMNS would not do elsewhere: Python's readline sets it to 80 for every child, asked for or not.
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


def _day(at: datetime) -> str:
    return _local(at)[:10]


def _time(at: datetime, *, milliseconds: bool = False) -> str:
    return _local(at, milliseconds=milliseconds)[11:]


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


def _colour(call: Call) -> str:
    return _STATES.get(call.state, "dim" if not call.open else "white")


def _state(call: Call) -> str:
    return f"[{_colour(call)}]{escape(call.state)}[/]"


def _outcome(call: Call) -> str:
    if call.settled is not None and call.settled.startswith("inferred"):
        return f"{call.outcome or ''} (inferred)".strip()
    return call.outcome or ""


def _observed(observed: float, since: datetime, until: datetime) -> str:
    return f"observed: {share(observed)} of the time from {_local(since)} to {_local(until)}"


# ── Tables ────────────────────────────────────────────────────────────────────────────────────────────


def _table(*columns: str, right: Iterable[str] = (), widths: Mapping[str, int] | None = None) -> Table:
    """A table in which nothing is cut: what does not fit goes on on the next line. Columns that have no width
    of their own in `widths` share the rest."""
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold"
    )
    for column in columns:
        table.add_column(
            column,
            justify="right" if column in right else "left",
            overflow="fold",
            width=(widths or {}).get(column),
        )
    return table


def _needed(column: str, texts: Iterable[str], *, words: bool = False) -> int:
    """The width that a column's cells need whole or, with `words`, broken between words."""
    pieces = (piece for text in texts for piece in (text.split() if words else [text]))
    return max(cell_len(column), *map(cell_len, pieces), 0)


_COLUMNS = ("id", "began", "account", "call", "participants", "state", "ring", "talk", "hold", "outcome")
_FIRST_TO_GO = ("hold", "ring", "talk", "account")
_GAP_CHARS = 2
"""Between two columns of a table."""


def _row(found: Found) -> dict[str, str]:
    call = found.call
    return {
        "id": str(call.id),
        "began": _local(call.opened_at),
        "account": found.account,
        "call": found.who,
        "participants": _participants(call),
        "state": call.state,
        "ring": seconds(call.ring_s),
        "talk": seconds(call.talk_s),
        "hold": seconds(call.hold_s) if call.hold_count else "",
        "outcome": _outcome(call),
    }


def _widths(rows: Sequence[Mapping[str, str]], width: int, *, narrow: bool) -> dict[str, int] | None:
    """The columns' widths: each whole or, where it is `narrow`, broken between words at the worst; None where
    there is not room enough."""
    cells = {column: [row[column] for row in rows] for column in rows[0]}
    wanted = {column: _needed(column, texts) for column, texts in cells.items()}
    by_words = {column: _needed(column, texts, words=True) for column, texts in cells.items()}
    widths = wanted | {
        "participants": max(by_words["participants"], min(wanted["participants"], PARTICIPANTS_CHARS))
    }
    if narrow:
        widths = by_words
    left = width - sum(widths.values()) - _GAP_CHARS * (len(widths) - 1)
    if left < 0:
        return None
    for column in ("call", "participants", *widths):
        more = min(left, wanted[column] - widths[column])
        widths[column] += more
        left -= more
    return widths


def _fitted(
    rows: Sequence[Mapping[str, str]], width: int, *, one_day: bool
) -> tuple[list[dict[str, str]], dict[str, int]] | None:
    """The rows with as many columns as there is room for, and their widths; None where there is too little.

    What tells least goes first: the date where it is one for all, the durations, the account; then the state
    of a call that ended, which its outcome implies.
    """
    fitted = [dict(row) for row in rows]
    for step in ("all", "date", *_FIRST_TO_GO, "outcome", "words"):
        if step == "date" and one_day:
            fitted = [row | {"began": row["began"][11:]} for row in fitted]
        elif step == "outcome":
            fitted = [row | {"state": row["outcome"] or row["state"]} for row in fitted]
        fitted = [{column: text for column, text in row.items() if column != step} for row in fitted]
        if (widths := _widths(fitted, width, narrow=step == "words")) is not None:
            return fitted, widths
    return None


def show_calls(page: Page, out: Console) -> None:
    """Print calls, newest first, and below them what share of the time was observed."""
    left_out: list[str] = []
    if page.calls:
        days = {_day(found.call.opened_at) for found in page.calls}
        rows = [_row(found) for found in page.calls]
        fitted = _fitted(rows, out.width, one_day=len(days) == 1)
        if fitted is None:
            for found, row in zip(page.calls, rows, strict=True):
                out.print(f"{row['id']}  {row['began']}  {escape(row['call'])}", overflow="fold")
                ended = f", {row['outcome']}" if row["outcome"] else ""
                with_ = f"{escape(row['participants'])}: " if row["participants"] else ""
                out.print(f"  {with_}{_state(found.call)}{ended}", overflow="fold")
            left_out = [*_FIRST_TO_GO]
        else:
            told, widths = fitted
            left_out = [column for column in _FIRST_TO_GO if column not in widths]
            if len(told[0]["began"]) < len(rows[0]["began"]):
                out.print(f"[bold]{days.pop()}[/]")
            table = _table(*widths, right=("id", "ring", "talk", "hold"), widths=widths)
            for found, cells in zip(page.calls, told, strict=True):
                shown = {column: escape(text) for column, text in cells.items()}
                shown["state"] = f"[{_colour(found.call)}]{shown['state']}[/]"
                table.add_row(*shown.values())
            out.print(table)
        out.print("participants: everybody except the account itself, in brackets who left before the end")
    if left_out:
        out.print(f"too narrow for: {', '.join(left_out)}; a wider terminal or -o json shows them")
    count = f"{len(page.calls) or 'no'} call{'s' * (len(page.calls) != 1)}"
    out.print(f"{count}; {_observed(page.observed, page.since, page.until)}")
    if page.after is not None:
        out.print(f"there are more: --after {page.after}")


def show_timeline(timeline: Timeline, out: Console, *, everything: bool = False) -> None:
    """Print one call: what it is, who was on it, and every message with what it changed; changes of its
    capabilities, which come with each message and say little, only with `everything`."""
    call = timeline.found.call
    out.print(f"[bold]call {call.id}[/] of {escape(timeline.found.account)}: {_summary(timeline.found)}")
    out.print(f"  began   {_local(call.opened_at)}")
    out.print(f"  ids     {escape(', '.join(call.aliases))}")
    if call.parent_call_id:
        out.print(f"  consult belongs to {escape(call.parent_call_id)}")
    for party in call.parties:
        left = f"left {_local(party.left_at)}" if party.left_at else "is on it"
        role = f" ({party.role})" if party.role else ""
        out.print(f"  {escape(party.number)}{escape(role)} joined {_local(party.joined_at)}, {left}")
    for key, value in call.user_data.items():
        out.print(f"  {escape(key)} = {escape(_value(value))}")
    one_day = {_day(moment.at) for moment in timeline.moments} <= {_day(call.opened_at)}
    rows, left_out = [], 0
    for moment in timeline.moments:
        told = [change for change in moment.changes if everything or change.field != "capabilities"]
        left_out += len(moment.changes) - len(told)
        rows.append(
            (
                (_time if one_day else _local)(moment.at, milliseconds=True),
                seconds((moment.at - call.opened_at).total_seconds()),
                moment.notification_type or moment.message_type or moment.source,
                "\n".join(_told(told, moment.anomalies)),
            )
        )
    columns = ("heard", "after", "message")
    widths = {name: _needed(name, [row[at] for row in rows]) for at, name in enumerate(columns)}
    widths["message"] = min(widths["message"], TITLE_CHARS_MAX)
    table = _table(*columns, "what changed", right=("after",), widths=widths)
    for heard, after, title, changed in rows:
        table.add_row(heard, after, escape(title), changed)
    out.print(table)
    if left_out:
        out.print(f"{left_out} change{'s' * (left_out != 1)} of capabilities left out; --all shows all")
    out.print(_observed(timeline.observed, call.opened_at, call.last_heard_at))


def _summary(found: Found) -> str:
    call = found.call
    parts = [call.direction, escape(found.who), _state(call)]
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


def _told(changes: Iterable[Altered], anomalies: Iterable[Odd]) -> list[str]:
    changed = [_change(change) for change in changes]
    return changed + [f"[yellow]odd: {odd.kind}: {escape(odd.detail)}[/]" for odd in anomalies]


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


def _merged(stretches: Iterable[Stretch]) -> list[Stretch]:
    """Neighbours of one account and one cause as one stretch."""
    merged: list[Stretch] = []
    for stretch in stretches:
        if merged and (merged[-1].account, merged[-1].cause, merged[-1].until) == (
            stretch.account,
            stretch.cause,
            stretch.since,
        ):
            merged[-1] = msgspec.structs.replace(merged[-1], until=stretch.until)
        else:
            merged.append(stretch)
    return merged


def _lasted_s(stretch: Stretch) -> float:
    return (stretch.until - stretch.since).total_seconds()


def _by_account(stretches: Iterable[Stretch], *, last: str) -> Table:
    """A row for each account: how much of it was observed, and the worst that happened."""
    accounts: dict[str, list[Stretch]] = {}
    for stretch in stretches:
        accounts.setdefault(stretch.account, []).append(stretch)
    titles = ("account", "observed", "gaps", "longest gap", "its cause", last)
    table = _table(*titles, right=("observed", "gaps", "longest gap"))
    for name, its in accounts.items():
        gaps = [stretch for stretch in its if stretch.cause]
        longest = max(gaps, key=_lasted_s, default=None)
        asked_s = sum(map(_lasted_s, its))
        observed = 1 - sum(map(_lasted_s, gaps)) / asked_s if asked_s else 0.0
        table.add_row(
            escape(name),
            share(observed),
            str(len(gaps)),
            seconds(_lasted_s(longest)) if longest else "",
            escape(longest.cause) if longest else "",
            _covered(its[-1]),
        )
    return table


def show_coverage(
    coverage: Coverage, out: Console, *, each: bool = False, gaps_only: bool = False, last: str = "now"
) -> None:
    """Print a row for each account: how much of it was observed, its gaps, and how it is at the end, which
    `last` names. With `each`, from when to when it was observed; with `gaps_only`, only when it was not."""
    merged = _merged(coverage.stretches)
    shown = [stretch for stretch in merged if stretch.cause or not gaps_only]
    if shown and not (each or gaps_only):
        out.print(_by_account(shown, last=last))
        out.print("--account NAME shows when, --gaps all gaps")
    elif shown:
        table = _table("account", "from", "to", "for", "", right=("for",))
        for stretch in shown:
            table.add_row(
                escape(stretch.account),
                _local(stretch.since),
                _local(stretch.until),
                seconds(_lasted_s(stretch)),
                _covered(stretch),
            )
        out.print(table)
    together = " of all accounts together" if len({stretch.account for stretch in merged}) > 1 else ""
    for cause, lasted in sorted(coverage.gaps_s.items()):
        out.print(f"not observed, {escape(cause)}: {seconds(lasted)}{together}")
    out.print(_observed(coverage.observed, coverage.since, coverage.until))


def _covered(stretch: Stretch) -> str:
    return f"[red]{escape(stretch.cause)}[/]" if stretch.cause else "[green]observed[/]"
