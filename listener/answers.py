"""How answers look: the calls, one call's timeline, coverage and dials, as tables and pictures for people and
JSON for programs.

It decides columns, words and units; it refuses to know how an answer was found, and asks nothing itself. A
table shows local time, JSON has UTC; JSON holds everything, a table what fits. Both always say which share of
the asked time was observed, because "no call" and "nobody listened" are different answers. What nobody heard,
such as the end of a call that ended in a gap, is said to be unheard and never shown as a time or a duration.
"""

import base64
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, time, timedelta
from typing import Any

import msgspec
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from listener.core.calls import Call
from listener.core.dialling import FAILURES, SUCCESSES, Confidence, Dial, System, extension
from listener.core.why import Why
from listener.store.dialled import DialFound, DialPage, DialTimeline
from listener.store.history import (
    Altered,
    Coverage,
    Figures,
    Found,
    Odd,
    Page,
    Present,
    Timeline,
    Watched,
)
from listener.store.spool import SpoolReport

WIDTH_ELSEWHERE = 200
"""Columns where standard output is no terminal: wide enough that nothing useful is left out."""
PARTICIPANTS_CHARS = 24
"""Participants go on on the next line beyond so many characters, rather than that another column goes."""
TITLE_CHARS_MAX = 30
"""A longer name of a message, which Genesys has none of, goes on on the next line."""
VALUE_CHARS_MAX = 60
"""A longer value of attached data is cut in a table; JSON has it whole."""
GAPS_SHOWN_MAX = 1000
"""Gaps in a table, which says how many more there are; JSON has them all."""
LABEL_CHARS_MAX = 24
"""A longer name of an account is cut beside its strip, so that there is room for the strip."""
CELLS_MIN = 10
"""A strip has so many cells also where the terminal is too narrow for them."""

_STATES = {"Ringing": "yellow", "Dialing": "cyan", "Established": "green", "Held": "magenta"}


def console(width: int | None = None) -> Console:
    """A console for standard output, as it is now, or as wide as is asked for. Colours are for a terminal,
    and NO_COLOR switches them off (no-color.org)."""
    found = Console(highlight=False, width=width)
    if width is not None:
        return found
    # COLUMNS would not do elsewhere: Python's readline sets it to 80 for every child, asked for or not.
    return found if found.is_terminal else Console(highlight=False, width=WIDTH_ELSEWHERE)


def as_json(answer: Page | Coverage | SpoolReport | Iterable[Timeline]) -> str:
    """Give an answer whole, as indented JSON. A raw message is text where it is UTF-8, else base64."""
    told: Any = msgspec.to_builtins(
        answer if isinstance(answer, Page | Coverage | SpoolReport) else list(answer), builtin_types=(bytes,)
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


_INFERRED = "inferred: "


def _unheard(call: Call) -> str:
    """Why a call counts as ended whose end nobody heard; nothing for any other call."""
    if call.ended_at is None and call.settled is not None:
        return call.settled.removeprefix(_INFERRED)
    return ""


def _durations(call: Call) -> dict[str, str]:
    """Ring, talk and hold in words. Of a call whose end nobody heard they lasted at least so long ("+"), or
    nobody knows how long ("?")."""

    def told(value: float, *, began: bool, ended: bool) -> str:
        if not began:
            return ""
        if ended:
            return seconds(value)
        return f"{seconds(value)}+" if value else "?"

    heard, answered = not _unheard(call), call.established_at is not None
    return {
        "ring": told(call.ring_s, began=True, ended=heard or answered),
        "talk": told(call.talk_s, began=heard or answered, ended=heard),
        "hold": told(call.hold_s, began=call.hold_count > 0, ended=heard),
    }


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
    if _unheard(call):
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
        **_durations(call),
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
        if reasons := sorted({_unheard(found.call) for found in page.calls} - {""}):
            why = escape("; ".join(reasons))
            out.print(f"inferred: nobody heard the end ({why}); + is at least so long, ? is not known")
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
    out.print(f"  ended   {_ended(timeline)}")
    out.print(f"  ids     {escape(', '.join(call.aliases))}")
    if call.parent_call_id:
        out.print(f"  consult belongs to {escape(call.parent_call_id)}")
    for party in call.parties:
        stays = "is on it" if call.open else "nobody heard when it left"
        left = f"left {_local(party.left_at)}" if party.left_at else stays
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
    out.print(_observed(timeline.observed, call.opened_at, timeline.until))


def _ended(timeline: Timeline) -> str:
    """When a call ended; or between which moments it did so unheard, and why that is known."""
    call = timeline.found.call
    if call.ended_at is not None:
        return _local(call.ended_at)
    if call.open:
        return "not yet"
    between = f"between {_local(call.last_heard_at)} and {_local(timeline.until)}"
    return f"unheard, {between}: {escape(_unheard(call))}"


def _summary(found: Found) -> str:
    call = found.call
    parts = [call.direction, escape(found.who), _state(call)]
    if outcome := _outcome(call):
        parts.append(outcome)
    figures = [
        f"{name} {told}"
        for name, told in (_durations(call) | {"wrap": seconds(call.wrap_s)}).items()
        if told not in {"", "0.0 s"}
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


# ── Coverage ──────────────────────────────────────────────────────────────────────────────────────────


def show_coverage(coverage: Coverage, out: Console, *, gaps: bool = False) -> None:
    """Print a row for each account, the worst first: how much of it was observed, its gaps, and how it is at
    the end; then the tenants, and all together. With `gaps`, each gap of theirs instead of the rows."""
    if not coverage.accounts:
        out.print(_nobody(coverage))
        return
    if gaps:
        _show_gaps(coverage, out)
    else:
        _show_accounts(coverage, out)
    together = [
        {"together": f"{each.tenant} ({each.accounts})", **_figures(each.figures)}
        for each in coverage.tenants
        if each.tenant
    ]
    count = sum(each.accounts for each in coverage.tenants)
    together.append({"together": f"all ({count})", **_figures(coverage.total)})
    _print_rows(together, out)
    _show_rest(coverage, out)


def _nobody(coverage: Coverage) -> str:
    """Why an answer has no account."""
    if coverage.first_at is None:
        return "not started: there is no account yet"
    if coverage.since >= coverage.now:
        return f"not started: the time from {_local(coverage.since)} on is still to come"
    if coverage.until <= coverage.first_at:
        return f"not started: the first account was added {_local(coverage.first_at)}, after that time"
    return f"there was no account from {_local(coverage.since)} to {_local(coverage.until)}"


def _show_rest(coverage: Coverage, out: Console) -> None:
    """What every answer about coverage ends with."""
    if coverage.not_shown:
        out.print(f"not shown, and none of them worse: {coverage.not_shown} more; --limit shows more")
    when = "now" if coverage.until == coverage.now else "at the end"
    how = [f"{count} {escape(cause) or 'observed'}" for cause, count in coverage.last.items()]
    out.print(f"{when}: {', '.join(how) or 'all removed'}")
    to_come = "; the rest is still to come" if coverage.asked_until > coverage.until else ""
    since = coverage.since if coverage.first_at is None else max(coverage.since, coverage.first_at)
    out.print(_observed(coverage.observed, since, coverage.until) + to_come)


def _figures(figures: Figures) -> dict[str, str]:
    causes = sorted(figures.causes_s.items(), key=lambda each: -each[1])
    return {
        "observed": share(figures.percent / 100) if figures.percent is not None else "–",
        "gaps": str(figures.gaps),
        "longest gap": seconds(figures.longest_gap_s) if figures.gaps else "",
        "not observed": "\n".join(f"{cause} {seconds(lasted)}" for cause, lasted in causes),
    }


def _show_accounts(coverage: Coverage, out: Console) -> None:
    last = "now" if coverage.until == coverage.now else "at the end"
    rows = [
        {
            "account": each.account,
            "tenant": each.tenant,
            **_figures(each.figures),
            last: _present(each.last, coverage.until),
        }
        for each in coverage.accounts
    ]
    left_out = _print_rows(rows, out)
    if left_out:
        out.print(f"too narrow for: {', '.join(left_out)}; a wider terminal or -o json shows them")
    out.print()


_SENTENCES = {"not observed", "now", "at the end"}


def _print_rows(rows: Sequence[Mapping[str, str]], out: Console) -> list[str]:
    """Print rows of coverage; gives the columns for which there was no room. Sentences go on on the next
    line, between two words."""
    widths = {
        column: _needed(column, [row[column] for row in rows], words=column in _SENTENCES)
        for column in rows[0]
    }
    left_out: list[str] = []
    for column in ("tenant", "longest gap"):
        if column in widths and _left(widths, out) < 0:
            del widths[column]
            left_out.append(column)
    for column in [each for each in widths if each in _SENTENCES]:
        wanted = _needed(column, [line for row in rows for line in row[column].splitlines()])
        widths[column] += max(0, min(_left(widths, out), wanted - widths[column]))
    table = _table(*widths, right=("observed", "gaps", "longest gap"), widths=widths)
    for row in rows:
        cells_ = {column: escape(row[column]) for column in widths}
        for column in ("now", "at the end"):
            if column in cells_:
                colour = "green" if row[column] == "observed" else "red"
                cells_[column] = f"[{colour}]{cells_[column]}[/]"
        table.add_row(*cells_.values())
    out.print(table)
    return left_out


def _left(widths: Mapping[str, int], out: Console) -> int:
    return out.width - sum(widths.values()) - _GAP_CHARS * (len(widths) - 1)


def _present(present: Present | None, at: datetime) -> str:
    if present is None:
        return "removed"
    if not present.cause:
        return "observed"
    since = _time(present.since) if _day(present.since) == _day(at) else _local(present.since)
    return f"{present.cause} since {since}"


def _show_gaps(coverage: Coverage, out: Console) -> None:
    gaps = [(each.account, gap) for each in coverage.accounts for gap in each.gaps]
    table = _table("account", "from", "to", "for", "cause", right=("for",))
    for account, gap in gaps[:GAPS_SHOWN_MAX]:
        lasted = seconds((gap.until - gap.since).total_seconds())
        table.add_row(escape(account), _local(gap.since), _local(gap.until), lasted, escape(gap.cause))
    if gaps:
        out.print(table)
        out.print()
    if len(gaps) > GAPS_SHOWN_MAX:
        out.print(f"gaps not shown: {len(gaps) - GAPS_SHOWN_MAX} more; -o json has them all")


# ── Coverage as a picture ─────────────────────────────────────────────────────────────────────────────

CAUSES = {
    "not started": ("N", "bright_black"),
    "stopped": ("X", "bright_black"),
    "disconnected": ("D", "red"),
    "session lost": ("L", "magenta"),
    "login refused": ("P", "yellow"),
    "subscription refused": ("R", "yellow"),
    "stalled": ("S", "bright_red"),
    "storage down": ("B", "cyan"),
    "spool damaged": ("C", "bright_cyan"),
    "oversized": ("O", "blue"),
    "malformed": ("M", "blue"),
}
"""The letter and the colour of each cause; small, the letter says that part of a cell was observed."""
_OTHER = ("U", "red")
_ABSENT = " "


def cells(each: Watched, edges: Sequence[datetime], observed: str) -> str:
    """One character for each stretch of time between two edges.

    `observed` where all of it was; the capital of a cause where nothing was, and its small letter where only
    a part was missing, however short; a blank where there was no such account. Of several causes in a cell
    the longest is told.
    """
    lost: list[dict[str, timedelta]] = [{} for _ in edges[1:]]
    for gap in each.gaps:
        at = max(bisect_right(edges, gap.since) - 1, 0)
        while at < len(lost) and edges[at] < gap.until:
            lasted = min(gap.until, edges[at + 1]) - max(gap.since, edges[at])
            if lasted:
                lost[at][gap.cause] = lost[at].get(gap.cause, timedelta()) + lasted
            at += 1
    drawn = []
    for begin, end, causes in zip(edges, edges[1:], lost, strict=False):
        existed = min(end, each.until) - max(begin, each.since)
        if existed <= timedelta():
            drawn.append(_ABSENT)
        elif not causes:
            drawn.append(observed)
        else:
            letter = CAUSES.get(max(sorted(causes), key=lambda cause: causes[cause]), _OTHER)[0]
            whole = sum(causes.values(), timedelta()) == existed
            drawn.append(letter if whole else letter.lower())
    return "".join(drawn)


def show_strip(coverage: Coverage, out: Console) -> None:
    """Draw a line for each account, the worst first, as wide as the console: time runs to the right."""
    if not coverage.accounts:
        out.print(_nobody(coverage))
        return
    label_chars = min(max(cell_len(each.account) for each in coverage.accounts), LABEL_CHARS_MAX)
    percents = [_short(each.figures) for each in coverage.accounts]
    percent_chars = max(map(len, percents))
    count = max(out.width - label_chars - percent_chars - 2, CELLS_MIN)
    span = coverage.until - coverage.since
    edges = [coverage.since + span * place // count for place in range(count + 1)]
    observed = "━" if out.encoding.startswith("utf") else "="
    styles = {letter: f"bold {colour} reverse" for letter, colour in (*CAUSES.values(), _OTHER)}
    styles |= {letter.lower(): f"bold {colour}" for letter, colour in (*CAUSES.values(), _OTHER)}
    for each, percent in zip(coverage.accounts, percents, strict=True):
        line = Text(each.account)
        line.truncate(label_chars, overflow="ellipsis", pad=True)
        line.append(" ")
        for drawn in cells(each, edges, observed):
            line.append(drawn, styles.get(drawn, "green"))
        line.append(f" {percent:>{percent_chars}}")
        out.print(line, soft_wrap=True)
    out.print(Text(" " * (label_chars + 1) + axis(coverage.since, coverage.until, count)), soft_wrap=True)
    causes = [
        cause for cause in coverage.total.causes_s if any(_has(each, cause) for each in coverage.accounts)
    ]
    legend = Text(f"{observed} observed", "green")
    for cause in causes:
        letter, colour = CAUSES.get(cause, _OTHER)
        legend.append(f"  {letter} {cause}", colour)
    out.print(legend)
    part = "; a small letter: a part of it was observed" if causes else ""
    out.print(f"each cell is {_cell(span / count)}{part}; blank: no such account then")
    _show_rest(coverage, out)


def _has(each: Watched, cause: str) -> bool:
    return cause in each.figures.causes_s


def _short(figures: Figures) -> str:
    """A share in few characters, never rounded up to all nor down to nothing."""
    percent = figures.percent
    if percent is None:
        return "–"
    if 0 < percent < 0.1:
        return "<0.1 %"
    return (
        ">99.9 %"
        if 99.9 < percent < 100
        else f"{percent:.0f} %"
        if percent in {0, 100}
        else f"{percent:.1f} %"
    )


def _cell(lasts: timedelta) -> str:
    lasts_s = lasts.total_seconds()
    return f"{lasts_s * 1000:.3g} ms" if lasts_s < 1 else seconds(lasts_s)


_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400)
_DAY_S = 86_400


def axis(since: datetime, until: datetime, count: int) -> str:
    """Local times below `count` cells: each mark stands below the cell in which its time lies."""
    drawn = ""
    for place, label in _marks(since, until, count):
        if place >= len(drawn) + bool(drawn) and place + len(label) < count:
            drawn = drawn.ljust(place) + "|" + label
    return drawn.ljust(count)


def _marks(since: datetime, until: datetime, count: int) -> Iterator[tuple[int, str]]:
    """Round local times in [since, until), each with its cell and what to call it."""
    span_s = (until - since).total_seconds()
    room_s = span_s * len("|00:00:00  ") / count
    step_s = next((each for each in _STEPS_S if each >= room_s), 0)
    if not step_s:
        step_s = _DAY_S
        while step_s < room_s:
            step_s *= 2
    # By the clock on the wall, so that marks are round also where summer time begins or ends.
    wall = since.astimezone().replace(tzinfo=None)
    midnight = datetime.combine(wall.date(), time())
    mark = midnight + timedelta(seconds=-((midnight - wall).total_seconds() // step_s) * step_s)
    while (at := mark.astimezone(UTC)) < until:
        if at >= since:
            form = "%m-%d" if mark.time() == time() else "%H:%M:%S" if step_s < 60 else "%H:%M"
            yield int((at - since) * count / (until - since)), mark.strftime(form)
        mark += timedelta(seconds=step_s)


# ── The spool ─────────────────────────────────────────────────────────────────────────────────────────


def show_spool(report: SpoolReport, out: Console) -> None:
    """Print what lies in the spool, segment by segment, whose it is, and what of it is damaged."""
    use = "a listener uses it" if report.in_use else "no listener uses it now"
    if not report.exists:
        out.print(f"{escape(report.directory)}: there is none, so nothing waits on disk", overflow="fold")
        return
    out.print(f"{escape(report.directory)}: {use}", overflow="fold")
    if report.segments:
        titles = ("segment", "records", "notifications", "bytes", "oldest", "newest", "damaged")
        table = _table(*titles, right=("records", "notifications", "bytes", "damaged"))
        for each in report.segments:
            table.add_row(
                each.name.removesuffix(".spool").lstrip("0"),
                str(each.records),
                str(each.notifications),
                str(each.size_bytes),
                _local(each.oldest) if each.oldest else "",
                _local(each.newest) if each.newest else "",
                f"[red]{each.damaged}[/]" if each.damaged else "",
            )
        out.print(table)
    for account, notifications in report.accounts.items():
        out.print(f"account {account} in the database: {notifications} notifications")
    torn_bytes = sum(each.torn_bytes for each in report.segments)
    if torn_bytes:
        out.print(f"{torn_bytes} bytes at the end are half a record: it is being written, or a crash cut it")
    for name, size_bytes in report.set_aside.items():
        out.print(f"[red]set aside as damaged:[/] {escape(name)}, {size_bytes} bytes", overflow="fold")
    if report.damaged or report.set_aside:
        out.print("damaged records are not stored: look at the disk, keep the .damaged files for support")
    what = "nothing" if not report.notifications else f"{report.notifications} notifications"
    out.print(f"{what} on disk that the database does not have yet, {report.size_bytes} bytes")


# ── Dials ─────────────────────────────────────────────────────────────────────────────────────────────

_DIAL_FIRST_TO_GO = ("origin", "leg", "ring", "answer", "system")
_ENDING_CHARS_MIN = 20
"""An outcome, or a word of a cause, goes into so many."""
_OUTCOMES = {**dict.fromkeys(SUCCESSES, "green"), **dict.fromkeys(FAILURES, "red")}


def _dial_row(found: DialFound) -> dict[str, str]:
    dial, raw = found.dial, _cause(found.dial)
    cause = raw if len(raw) <= VALUE_CHARS_MAX else raw[: VALUE_CHARS_MAX - 1] + "…"
    return {
        "id": dial.id,
        "asked": _local(dial.requested_at),
        "dial": f"{_who_dialled(found)} → {dial.number or '?'}",
        "system": dial.system,
        "origin": dial.origin,
        "leg": dial.leg or "",
        "ring": seconds(dial.time_to_ring_s),
        "answer": seconds(dial.time_to_answer_s),
        "outcome": ": ".join(filter(None, (_dial_outcome(dial), cause))),
    }


def _who_dialled(found: DialFound) -> str:
    """By a name or number that people know: of a PBX the extension; a device of GWS has but an id."""
    dial = found.dial
    return found.account if dial.system is System.GWS or not dial.device else extension(dial.device)


def _cause(dial: Dial) -> str:
    return "" if dial.cause is None else " ".join(filter(None, (str(dial.cause), dial.cause.text)))


def _dial_outcome(dial: Dial) -> str:
    if dial.outcome is None:
        return f"({dial.state})"
    inferred = " (inferred)" if dial.confidence is Confidence.INFERRED else ""
    return f"{dial.outcome}{inferred}"


def _of_one_day(rows: list[dict[str, str]], *columns: str, out: Console) -> list[dict[str, str]]:
    """The rows with times alone, below their day, where all are of one."""
    days = {row[column][:10] for row in rows for column in columns}
    if len(days) != 1:
        return rows
    out.print(f"[bold]{days.pop()}[/]")
    return [row | {column: row[column][11:] for column in columns} for row in rows]


def _told_in(
    rows: list[dict[str, str]], last: str, out: Console, *, first_to_go: Iterable[str], times: Iterable[str]
) -> tuple[dict[str, int], list[str]]:
    """The widths of the columns, the last of which takes what is left; and which columns there is no room
    for. If that is not enough, a time goes below its day."""
    widths = {column: _needed(column, [row[column] for row in rows]) for column in rows[0]}
    whole = widths[last]
    widths[last] = min(whole, _ENDING_CHARS_MIN)
    left_out = []
    for column in first_to_go:
        if _left(widths, out) < 0:
            del widths[column]
            left_out.append(column)
    for column in times:
        if _left(widths, out) < 0:
            widths[column] = _needed(column, [row[column] for row in rows], words=True)
    widths[last] = min(whole, widths[last] + max(0, _left(widths, out)))
    return widths, left_out


def show_dials(page: DialPage, out: Console) -> None:
    """Print dials, newest first, and below them what share of the time was observed."""
    left_out: list[str] = []
    if page.dials:
        rows = _of_one_day([_dial_row(found) for found in page.dials], "asked", out=out)
        widths, left_out = _told_in(rows, "outcome", out, first_to_go=_DIAL_FIRST_TO_GO, times=["asked"])
        table = _table(*widths, right=("ring", "answer"), widths=widths)
        for found, row in zip(page.dials, rows, strict=True):
            shown = {column: escape(row[column]) for column in widths}
            shown["outcome"] = f"[{_dial_colour(found.dial)}]{shown['outcome']}[/]"
            table.add_row(*shown.values())
        out.print(table)
        if any(found.dial.outcome is None for found in page.dials):
            out.print("in brackets: it waits for its end, and has got so far")
    if left_out:
        out.print(f"too narrow for: {', '.join(left_out)}; a wider terminal or -o json shows them")
    count = f"{len(page.dials) or 'no'} dial{'s' * (len(page.dials) != 1)}"
    out.print(f"{count}; {_observed(page.observed, page.since, page.until)}")
    if page.after is not None:
        out.print(f"there are more: --after {page.after}")


def _dial_colour(dial: Dial) -> str:
    return "cyan" if dial.outcome is None else _OUTCOMES.get(dial.outcome, "yellow")


def show_dial(timeline: DialTimeline, out: Console) -> None:
    """Print one dial: what it is, how it ended, how that was reached, and which call it is."""
    found, dial = timeline.found, timeline.found.dial
    row = _dial_row(found)
    out.print(
        f"[bold]dial {dial.id}[/] of {escape(found.account)} by {dial.system}, {dial.origin}: "
        f"{escape(row['dial'])}, [{_dial_colour(dial)}]{_dial_outcome(dial)}[/]"
    )
    told = {
        "asked for": row["asked"],
        "ended": "not yet" if dial.ended_at is None else _local(dial.ended_at),
        "waits until": "" if dial.deadline_at is None else _local(dial.deadline_at),
        "leg": row["leg"],
        "ended by": dial.ended_by or "",
        "cause": _cause(dial),
        "device": dial.device or "",
        "ring": row["ring"],
        "answer": row["answer"],
        "retry": dial.retry or "",
        "caller id": dial.caller_id or "",
        "campaign": dial.campaign or "",
        "reference": dial.reference or "",
        "key": found.key or "",
        "turned out": found.merged_into or "",
        "call": _call_of(timeline),
    }
    for name, value in told.items():
        if value:
            out.print(f"  {name:<12}{escape(value)}")
    if timeline.facts:
        table = _table("heard", "what", "said", "then it was")
        for fact in timeline.facts:
            said = " ".join(filter(None, (fact.said, str(fact.cause) if fact.cause is not None else "")))
            state = f"{fact.state}, {fact.outcome}" if fact.outcome is not None else fact.state
            heard = _local(fact.at, milliseconds=True)
            table.add_row(heard, fact.kind, escape(said), state)
        out.print(table)


def _call_of(timeline: DialTimeline) -> str:
    dial = timeline.found.dial
    if timeline.found.candidates:
        return f"ambiguous: it may also be that of {', '.join(timeline.found.candidates)}"
    by = ", ".join(dial.matched_by)
    matched = f"matched by {by} ({dial.match_confidence})" if by else ""
    if timeline.call is None:
        return matched
    return f"{timeline.call.call.id}, {timeline.call.who}; {matched}".removesuffix("; ")


WHY_GROUPS_SHOWN = 12
"""Groups that are printed: the largest. JSON has more."""


def show_why(why: Why, out: Console) -> None:
    """Print the sentence that names the smallest group that explains the rise, and then the groups of
    failures, those with the most first. Nothing stands in columns, so that a narrow terminal cuts nothing."""
    out.print(escape(why.sentence), style="bold")
    shown = why.groups[:WHY_GROUPS_SHOWN]
    times = [{"first": _local(group.first_at), "last": _local(group.last_at)} for group in shown]
    if times:
        out.print()
        times = _of_one_day(times, "first", "last", out=out)
    for group, at in zip(shown, times, strict=True):
        now, before = group.now, group.before
        was = f"before {share(before.share)}" if before.dials else "none dialled before"
        example = f"; e.g. {group.example}" if group.example else ""
        out.print(f"[red]{now.failures}[/] of {now.dials} {escape(str(group))}")
        out.print(f"    {share(now.share)}, {was}; first {at['first']}, last {at['last']}{escape(example)}")
    left_out = why.left_out + sum(group.now.failures for group in why.groups[WHY_GROUPS_SHOWN:])
    if left_out:
        out.print(f"{left_out} failure{'s' * (left_out != 1)} in smaller groups left out; -o json has more")
    if why.partial:
        out.print("there were too many different dials to look at all; ask for a shorter time or one account")
