"""Why dials fail more than before: which group of dials the rise is in.

Two periods are compared. Each is given as tallies: how many dials with the same system, account, device,
caller id, campaign, beginning of the number, outcome, cause and leg. Out of them come the groups with the
most failures, and one explanation: the smallest group of dials that holds the rise.

The groups are for who must see at a glance what fails, so they are few: one for each outcome, cause, leg and
system. Only where such failures gather at some accounts, or at some beginnings of numbers (whichever gathers
them more), those are groups of their own, and the others are `elsewhere`. Internal numbers are one beginning.
No dial is in two groups. A device of GWS is never named, since it has but an id that nobody knows by heart.

How a group is scored, in plain words. A group is a handful of conditions ("account ann, number 2787…"), with
a kind of failure: any, one outcome, or one outcome with its raw cause. Before, a certain share of its dials
failed in that way. Its score is the log of how much likelier the failures of now are with the share that they
have than with the share of before. So it is high if many dials are concerned *and* their share rose much. Too
wide a group scores less, since it takes in dials that fail as ever; too narrow a one scores less, since it
leaves failures out. Each condition costs `CONDITION_COST` points, because among many groups some are high by
chance. For the same reason only groups count that are surprising when both periods may have been unlucky (two
shares against one for both, in the same points): by `SCORE_MIN` and the log of the number of groups tried. If
there is none, there is no rise. Of groups
that are the very same dials the one with the fewest conditions is named, and a longer beginning of a number
before a shorter; whatever else its failures have in common is said beside it.

A group counts only if more of its dials fail than before in whatever way: when a provider is back, its dials
are busy and unanswered again, and that is no rise. One that hardly existed before is compared with what all
dials did then (`PRIOR_DIALS`).

It refuses to know clocks, tables and what a person should do about it. The work is bounded: see the limits.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime

from msgspec import Struct

from listener.core.dialling import ENDING_DIGITS_MIN, FAILURES, Leg, Outcome, System, extension

PREFIX_LENGTHS = (2, 3, 4, 5, 6, 7)
"""How many digits of a number are looked at; give tallies by `PREFIX_MAX`."""

PREFIX_MAX = max(PREFIX_LENGTHS)

PREFIX_LISTED = 4
"""The digits by which the listed groups are told apart."""

INTERNAL = "internal"
"""In place of a beginning: all numbers that are so short that they are extensions."""

GROUPS_MAX = 50
"""Groups listed, those with the most failures first; of the others `Why.left_out` says how many failures."""

GATHERED_SHARE = 0.3
GATHERED_MIN = 10
"""So much of the failures of one kind and system, and so many, make an account or a beginning a group of its
own, or all of them: so there are at most three, and those elsewhere."""

TALLIES_MAX = 50_000
"""Tallies looked at for the explanation, of each period. Of more those with the most dials are taken, and
`Why.partial` says so."""

VALUES_MAX = 400
"""Values of one dimension that are tried, those with the most failures first."""

BEAM = 8
"""Groups that are tried with a further condition, the best first."""

CONDITIONS_MAX = 3

PRIOR_DIALS = 20.0
"""How many dials' worth of evidence the share of all dials before is, when a group's own is judged."""

SHARE_MIN = 0.005
"""No kind of failure is taken to have been rarer than this: else a code that was never seen before would
outweigh an outcome that many codes say."""

CONDITION_COST = 6.0
SCORE_MIN = 10.0
"""With the log of the number of groups tried: a chance of about one in 20,000 for a false alarm."""

EXCESS_MIN = 5.0
"""Failures more than before would have had, below which nothing is called a rise."""


class Tally(Struct, frozen=True, gc=False):
    """How many dials of one period were alike in all of this. An empty value is one that is not known; it is
    never named as the group."""

    system: str
    account: str
    """Its name, as it shall be said."""
    number_prefix: str
    """The first `PREFIX_MAX` digits of the normalised number (`listener.core.dialling.normalised`)."""
    outcome: Outcome | None
    """None: it was connected, and goes on."""
    dials: int
    first_at: datetime
    last_at: datetime
    cause: str = ""
    """The raw cause as `str(Cause)` gives it."""
    leg: Leg | None = None
    """The leg that failed."""
    example: str = ""
    """The id of one of them, if they failed."""
    device: str = ""
    caller_id: str = ""
    campaign: str = ""


class Figures(Struct, frozen=True, gc=False):
    """Failures among dials."""

    dials: int
    failures: int

    @property
    def share(self) -> float:
        """Of the dials that failed, from 0 to 1; 0 if there were none."""
        return self.failures / self.dials if self.dials else 0.0


class Condition(Struct, frozen=True, gc=False, order=True):
    """One condition of a group."""

    dimension: str
    """system, account, device, caller_id, campaign or number; a number's value is how it begins, or
    `INTERNAL`."""
    value: str

    def __str__(self) -> str:
        """In words."""
        if self.dimension == "number":
            internal = self.value == INTERNAL
            return "internal numbers" if internal else f"numbers that begin with {self.value}"
        return f"{self.dimension.replace('_', ' ')} {self.value}"


class Group(Struct, frozen=True, gc=False):
    """Failures of one kind among the dials that meet all conditions.

    `now` and `before` count all dials that meet them, and those that failed in this way; the times are of
    such failures.
    """

    conditions: tuple[Condition, ...]
    """None: all dials."""
    outcome: Outcome | None
    """None: any failure."""
    cause: str | None
    """None: any cause of that outcome."""
    leg: Leg | None
    """None: any leg, or none is known."""
    now: Figures
    before: Figures
    first_at: datetime
    last_at: datetime
    example: str
    """The id of such a dial, one of the last; empty if the tallies have none."""
    elsewhere: bool = False
    """Without the dials that other groups of the same outcome, cause, leg and system name."""

    def __str__(self) -> str:
        """What failed how, and where, in words."""
        where = _in_words(self.conditions) or "all dials"
        rest = ", elsewhere" if self.elsewhere else ""
        return f"{_kind_in_words(self.outcome, self.cause, self.leg)}: {where}{rest}"


class Explanation(Struct, frozen=True, gc=False):
    """The smallest group that holds the rise."""

    group: Group
    shared: tuple[Condition, ...]
    """What all its failures have in common beyond its conditions."""
    excess: float
    """Failures more than there would have been with the share of before."""
    of_the_rise: float
    """How much of the whole rise of this kind of failure that is, from 0 to 1."""
    outside: Figures
    """The same kind of failure among all other dials, now."""
    outside_before: Figures
    score: float


class Why(Struct, frozen=True, gc=False):
    """The answer to why dials fail; `sentence` says it in words."""

    now: Figures
    before: Figures
    groups: tuple[Group, ...]
    left_out: int
    explanation: Explanation | None
    """None: nothing rose beyond chance."""
    sentence: str
    partial: bool = False
    """There were more tallies than `TALLIES_MAX`."""


DIMENSIONS = ("system", "account", "caller_id", "campaign", "device", "number")
"""By what dials are told apart; of two that pick the very same dials, the first is named."""

_Kind = tuple[Outcome | None, str | None, Leg | None]
"""A kind of failure: outcome, cause and leg; None is any."""

_ANY: _Kind = (None, None, None)


class _Row(Struct, frozen=True, gc=False):
    """A tally with its conditions and kinds of failure worked out once."""

    conditions: frozenset[int]
    """Their numbers: the search compares them millions of times."""
    kinds: tuple[_Kind, ...]
    """Empty for a dial that did not fail."""
    dials: int
    tally: Tally


def explain(now: Iterable[Tally], before: Iterable[Tally]) -> Why:
    """Groups the failures of a period, and names the smallest group that holds their rise.

    `now` and `before` hold *all* dials of the two periods, also those that went well: without them nothing
    can be said of shares. The periods may differ in length, as only shares are compared.
    """
    tallies, tallies_before = list(now), list(before)
    here, earlier = _figures(tallies), _figures(tallies_before)
    numbers: dict[Condition, int] = {}
    rows, rows_before = _rows(tallies, numbers), _rows(tallies_before, numbers)
    search = _Search(rows, rows_before, list(numbers)) if here.failures and earlier.dials else None
    explanation = search.explanation() if search is not None else None
    groups, left_out = _groups(tallies, tallies_before)
    return Why(
        now=here,
        before=earlier,
        groups=groups,
        left_out=left_out,
        explanation=explanation,
        sentence=_sentence(here, earlier, explanation),
        partial=max(len(tallies), len(tallies_before)) > TALLIES_MAX,
    )


def _failed(tally: Tally) -> bool:
    return tally.outcome in FAILURES


def _figures(tallies: Iterable[Tally]) -> Figures:
    dials = failures = 0
    for tally in tallies:
        dials += tally.dials
        failures += tally.dials if _failed(tally) else 0
    return Figures(dials, failures)


# ── The groups ────────────────────────────────────────────────────────────────────────────────────────


_Place = tuple[str, str, str]
"""System, account and how the number begins; empty is any."""

_ALIKE = ("account", "number")
"""What failures of one kind and system may gather at; of equals the first is named."""


class _Counted:
    """Dials, and failures of each kind, of every place."""

    def __init__(self, tallies: Iterable[Tally]) -> None:
        self.dials: Counter[_Place] = Counter()
        self.failures: Counter[tuple[_Kind, _Place]] = Counter()
        for tally in tallies:
            system, account, number = tally.system, tally.account, _begins(tally)
            for place in {
                (system, account, number),
                (system, account, ""),
                (system, "", number),
                (system, "", ""),
            }:
                self.dials[place] += tally.dials
                if _failed(tally):
                    self.failures[_kind(tally), place] += tally.dials

    def figures(self, kind: _Kind, place: _Place) -> Figures:
        """Of a place."""
        return Figures(self.dials[place], self.failures[kind, place])


def _begins(tally: Tally) -> str:
    internal = 0 < len(tally.number_prefix) < ENDING_DIGITS_MIN
    return INTERNAL if internal else tally.number_prefix[:PREFIX_LISTED]


def _kind(tally: Tally) -> _Kind:
    return tally.outcome, tally.cause, tally.leg


def _groups(now: Sequence[Tally], before: Sequence[Tally]) -> tuple[tuple[Group, ...], int]:
    """The failures by cause and leg, and where they gather; and how many were left out."""
    here, earlier = _Counted(now), _Counted(before)
    failing: defaultdict[tuple[_Kind, str], list[Tally]] = defaultdict(list)
    for tally in now:
        if _failed(tally):
            failing[_kind(tally), tally.system].append(tally)
    groups = [
        group
        for (kind, system), members in failing.items()
        for group in _gathered(kind, system, members, here, earlier)
    ]
    groups.sort(key=lambda group: (-group.now.failures, str(group)))
    left_out = sum(group.now.failures for group in groups[GROUPS_MAX:])
    return tuple(groups[:GROUPS_MAX]), left_out


def _gathered(
    kind: _Kind, system: str, members: Sequence[Tally], here: _Counted, earlier: _Counted
) -> Iterator[Group]:
    """The groups of the failures of one kind and system: where they gather, and elsewhere."""
    total = sum(tally.dials for tally in members)
    by: dict[str, defaultdict[str, list[Tally]]] = {each: defaultdict(list) for each in _ALIKE}
    for tally in members:
        by["account"][tally.account].append(tally)
        by["number"][_begins(tally)].append(tally)

    def gathered(dimension: str) -> dict[str, int]:
        counted = {value: sum(each.dials for each in those) for value, those in by[dimension].items()}
        least = max(GATHERED_MIN, GATHERED_SHARE * total)
        return {value: dials for value, dials in counted.items() if value and dials >= min(least, total)}

    def wide(dimension: str, value: str) -> _Place:
        return (system, value, "") if dimension == "account" else (system, "", value)

    def beyond(dimension: str) -> float:
        """Failures at those places beyond their part of all dials: where all dial, failures do not gather."""
        dials = sum(here.dials[wide(dimension, value)] for value in found[dimension])
        return sum(found[dimension].values()) - total * dials / max(here.dials[system, "", ""], 1)

    found = {dimension: gathered(dimension) for dimension in _ALIKE}
    chosen = max(_ALIKE, key=beyond)
    now, past = here.figures(kind, (system, "", "")), earlier.figures(kind, (system, "", ""))
    rest = [tally for value, those in by[chosen].items() if value not in found[chosen] for tally in those]
    for value in found[chosen]:
        those = by[chosen][value]
        accounts, numbers = {each.account for each in those}, {_begins(each) for each in those}
        place = (
            system,
            accounts.pop() if len(accounts) == 1 else "",
            numbers.pop() if len(numbers) == 1 else "",
        )
        yield _group(kind, place, those, here.figures(kind, place), earlier.figures(kind, place))
        now = _without(now, here.figures(kind, wide(chosen, value)))
        past = _without(past, earlier.figures(kind, wide(chosen, value)))
    if rest:
        yield _group(kind, (system, "", ""), rest, now, past, elsewhere=bool(found[chosen]))


def _group(
    kind: _Kind,
    place: _Place,
    failing: Sequence[Tally],
    now: Figures,
    before: Figures,
    *,
    elsewhere: bool = False,
) -> Group:
    outcome, cause, leg = kind
    system, account, number = place
    conditions = (("number", number), ("account", account), ("system", system))
    return Group(
        conditions=tuple(Condition(dimension, value) for dimension, value in conditions if value),
        outcome=outcome,
        cause=cause,
        leg=leg,
        now=now,
        before=before,
        first_at=min(tally.first_at for tally in failing),
        last_at=max(tally.last_at for tally in failing),
        example=_example(failing),
        elsewhere=elsewhere,
    )


def _example(failing: Iterable[Tally]) -> str:
    return max((tally.last_at, tally.example) for tally in failing)[1]


# ── The search ────────────────────────────────────────────────────────────────────────────────────────


def _rows(tallies: Sequence[Tally], numbers: dict[Condition, int]) -> list[_Row]:
    """The tallies as the search wants them; conditions that are new get their numbers."""
    if len(tallies) > TALLIES_MAX:
        tallies = sorted(tallies, key=lambda tally: -tally.dials)[:TALLIES_MAX]
    known: dict[tuple[str, str], int] = {}
    rows = []
    for tally in tallies:
        values = [(dimension, getattr(tally, dimension)) for dimension in DIMENSIONS[:-2]]
        values.append(("device", "" if tally.system == System.GWS else extension(tally.device)))
        digits = tally.number_prefix
        values += [("number", digits[:length]) for length in PREFIX_LENGTHS if len(digits) >= length]
        conditions = []
        for pair in values:
            if not pair[1]:
                continue
            if pair not in known:
                known[pair] = numbers.setdefault(Condition(*pair), len(numbers))
            conditions.append(known[pair])
        kinds: tuple[_Kind, ...] = ()
        if _failed(tally):
            kinds = (_ANY, (tally.outcome, None, None), _kind(tally))
        rows.append(_Row(frozenset(conditions), kinds, tally.dials, tally))
    return rows


class _Counts:
    """Dials and failures of some rows, in all and by each single condition that they meet."""

    __slots__ = ("all", "dials", "failures", "kinds")

    def __init__(self, rows: Iterable[_Row]) -> None:
        self.all = 0
        self.kinds: Counter[_Kind] = Counter()
        self.dials: defaultdict[int, int] = defaultdict(int)
        self.failures: defaultdict[_Kind, defaultdict[int, int]] = defaultdict(lambda: defaultdict(int))
        for row in rows:
            self.all += row.dials
            for condition in row.conditions:
                self.dials[condition] += row.dials
            for kind in row.kinds:
                self.kinds[kind] += row.dials
                failures = self.failures[kind]
                for condition in row.conditions:
                    failures[condition] += row.dials

    def figures(self, condition: int, kind: _Kind) -> Figures:
        """Of the rows that meet a condition."""
        failures = self.failures.get(kind)
        return Figures(self.dials.get(condition, 0), failures.get(condition, 0) if failures else 0)

    def whole(self, kind: _Kind) -> Figures:
        """Of all rows."""
        return Figures(self.all, self.kinds[kind])


class _Candidate(Struct, frozen=True, gc=False):
    conditions: frozenset[int]
    kind: _Kind
    now: Figures
    before: Figures
    score: float
    surprise: float


def _score(now: Figures, before: Figures, usual: float) -> float:
    """How much likelier the failures of now are with their own share than with that of before."""
    share = (before.failures + PRIOR_DIALS * usual) / (before.dials + PRIOR_DIALS)
    share = min(max(share, SHARE_MIN), now.share)
    well = now.dials - now.failures
    score = now.failures * math.log(now.share / share)
    return score + (well * math.log((1 - now.share) / (1 - share)) if well else 0.0)


def _surprise(now: Figures, before: Figures, usual: float) -> float:
    """How surprising it is that the share rose: the log likelihood ratio of two shares against one."""
    dials, failures = before.dials + PRIOR_DIALS, before.failures + PRIOR_DIALS * usual
    if now.dials == 0 or now.share <= failures / dials:
        return 0.0
    both = (now.failures + failures) / (now.dials + dials)
    return sum(
        part * math.log(part / whole / share)
        for part, whole, share in (
            (now.failures, now.dials, both),
            (now.dials - now.failures, now.dials, 1 - both),
            (failures, dials, both),
            (dials - failures, dials, 1 - both),
        )
        if part > 0
    )


class _Search:
    """Looks for the group that holds the rise, from the widest on: all dials, each single condition, and the
    best of those with further ones."""

    def __init__(self, rows: list[_Row], rows_before: list[_Row], conditions: list[Condition]) -> None:
        self._conditions = conditions
        self._rows, self._rows_before = rows, rows_before
        self._now, self._before = _Counts(rows), _Counts(rows_before)
        self._wanted = self._most_failing()
        self._usual = {
            kind: (self._before.kinds[kind] + 0.5) / (self._before.all + 1) for kind in self._now.kinds
        }
        self._found: list[_Candidate] = []
        self._tried = 0

    def _most_failing(self) -> frozenset[int]:
        """The conditions that are tried: of each dimension those with the most failures."""
        by_dimension: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
        failures = self._now.failures[_ANY]
        for number in failures:
            condition = self._conditions[number]
            length = len(condition.value) if condition.dimension == "number" else 0
            by_dimension[condition.dimension, length].append(number)
        return frozenset(
            number
            for members in by_dimension.values()
            for number in sorted(members, key=lambda each: (-failures[each], self._conditions[each]))[
                :VALUES_MAX
            ]
        )

    def explanation(self) -> Explanation | None:
        """The best group with what is to be said of it; None if nothing rose beyond chance."""
        everything = self._rises(self._now.whole(_ANY), self._before.whole(_ANY), _ANY)
        for kind in self._now.kinds if everything else ():
            self._consider(frozenset(), kind, self._now.whole(kind), self._before.whole(kind))
        self._consider_within(frozenset(), self._now, self._before)
        for size in range(1, CONDITIONS_MAX):
            for conditions in self._beam(size):
                here = _Counts(row for row in self._rows if conditions <= row.conditions)
                earlier = _Counts(row for row in self._rows_before if conditions <= row.conditions)
                self._consider_within(conditions, here, earlier)
        least = SCORE_MIN + math.log(max(self._tried, 1))
        sure = [candidate for candidate in self._found if candidate.surprise >= least]
        return self._told(min(sure, key=self._preference)) if sure else None

    def _consider_within(self, conditions: frozenset[int], here: _Counts, earlier: _Counts) -> None:
        """Tries every further condition, on a dimension that has none yet."""
        dimensions = {self._conditions[number].dimension for number in conditions}
        rising = [
            number
            for number in here.failures[_ANY]
            if number in self._wanted
            and self._conditions[number].dimension not in dimensions
            and self._rises(here.figures(number, _ANY), earlier.figures(number, _ANY), _ANY)
        ]
        for kind, failures in here.failures.items():
            for number in rising:
                if number in failures:
                    now, before = here.figures(number, kind), earlier.figures(number, kind)
                    self._consider(conditions | {number}, kind, now, before)

    def _rises(self, now: Figures, before: Figures, kind: _Kind) -> bool:
        return _excess(now, before, self._usual[kind]) >= EXCESS_MIN

    def _consider(self, conditions: frozenset[int], kind: _Kind, now: Figures, before: Figures) -> None:
        self._tried += 1
        cost = CONDITION_COST * len(conditions)
        surprise = _surprise(now, before, self._usual[kind]) - cost
        if surprise > 0 and self._rises(now, before, kind):
            score = _score(now, before, self._usual[kind]) - cost
            self._found.append(_Candidate(conditions, kind, now, before, score, surprise))

    def _preference(self, candidate: _Candidate) -> tuple[float, int, list[tuple[int, int, str]], str]:
        """Sorts the best first; the rest tells apart groups that are the very same dials."""
        conditions = [self._conditions[number] for number in candidate.conditions]
        named = sorted(
            (
                DIMENSIONS.index(each.dimension),
                -len(each.value) if each.dimension == "number" else 0,
                each.value,
            )
            for each in conditions
        )
        return -round(candidate.score, 6), len(conditions), named, str(candidate.kind)

    def _beam(self, size: int) -> list[frozenset[int]]:
        """The best groups of so many conditions to narrow further; of the very same dials only one."""
        chosen: dict[frozenset[int], None] = {}
        seen: set[tuple[_Kind, Figures, Figures]] = set()
        for each in sorted((one for one in self._found if len(one.conditions) == size), key=self._preference):
            if (each.kind, each.now, each.before) not in seen:
                seen.add((each.kind, each.now, each.before))
                chosen[each.conditions] = None
            if len(chosen) == BEAM:
                break
        return list(chosen)

    def _told(self, best: _Candidate) -> Explanation:
        kind = best.kind
        failing = [row for row in self._rows if kind in row.kinds and best.conditions <= row.conditions]
        usual = self._usual[kind]
        whole, whole_before = self._now.whole(kind), self._before.whole(kind)
        excess = _excess(best.now, best.before, usual)
        return Explanation(
            group=Group(
                conditions=tuple(sorted(self._conditions[number] for number in best.conditions)),
                outcome=kind[0],
                cause=kind[1],
                leg=kind[2],
                now=best.now,
                before=best.before,
                first_at=min(row.tally.first_at for row in failing),
                last_at=max(row.tally.last_at for row in failing),
                example=_example(row.tally for row in failing),
            ),
            shared=self._shared(failing, best.conditions),
            excess=excess,
            of_the_rise=min(1.0, excess / max(excess, _excess(whole, whole_before, usual))),
            outside=_without(whole, best.now),
            outside_before=_without(whole_before, best.before),
            score=best.score,
        )

    def _shared(self, failing: Iterable[_Row], conditions: frozenset[int]) -> tuple[Condition, ...]:
        """What all these failures have in common beyond the conditions and beyond all dials; of a number its
        longest beginning."""
        everywhere = {number for number, dials in self._now.dials.items() if dials == self._now.all}
        common = frozenset.intersection(*(row.conditions for row in failing)) - conditions - everywhere
        longest: dict[str, Condition] = {}
        for each in sorted((self._conditions[number] for number in common), key=lambda each: len(each.value)):
            longest[each.dimension] = each
        named = {self._conditions[number] for number in conditions}
        return tuple(
            longest[dimension]
            for dimension in DIMENSIONS
            if dimension in longest
            and not any(each.value.startswith(longest[dimension].value) for each in named)
        )


def _excess(now: Figures, before: Figures, usual: float) -> float:
    """Failures more than there would have been with the share of before."""
    share = (before.failures + PRIOR_DIALS * usual) / (before.dials + PRIOR_DIALS)
    return now.failures - now.dials * share


# ── The answer ────────────────────────────────────────────────────────────────────────────────────────


def _without(whole: Figures, part: Figures) -> Figures:
    return Figures(whole.dials - part.dials, whole.failures - part.failures)


def _percent(figures: Figures) -> str:
    return f"{100 * figures.share:.1f} %"


def _in_words(conditions: Iterable[Condition]) -> str:
    return ", ".join(
        str(each) for each in sorted(conditions, key=lambda each: DIMENSIONS.index(each.dimension))
    )


_SIDES = {Leg.AGENT: " on the agent's leg", Leg.CALLEE: " on the callee's leg", Leg.SYSTEM: " in the system"}


def _kind_in_words(outcome: Outcome | None, cause: str | None, leg: Leg | None) -> str:
    if outcome is None:
        return "any failure"
    return f"{outcome}{f' ({cause})' if cause else ''}{_SIDES[leg] if leg is not None else ''}"


def _sentence(now: Figures, before: Figures, explanation: Explanation | None) -> str:
    """The answer for a person: where the rise is comes first, since who reads it on a narrow screen, or at
    night, may read no further."""
    if now.dials == 0:
        return "Nothing was dialled in this period."
    overall = f"{now.failures} of {now.dials} dials failed ({_percent(now)})"
    if before.dials == 0:
        return f"{overall}; nothing was dialled in the period before, so there is nothing to compare with."
    overall = f"In all {overall}, before {before.failures} of {before.dials} ({_percent(before)})."
    if explanation is None:
        return f"No group of dials fails more than before beyond chance. {overall}"
    group = explanation.group
    kind = "failed"
    if group.outcome is not None:
        kind = f"ended as {_kind_in_words(group.outcome, group.cause, group.leg)}"
    where = _in_words(group.conditions) or "all dials"
    example = f", for example dial {group.example}" if group.example else ""
    words = (
        f"The rise is in {where}: {group.now.failures} of {group.now.dials} {kind} "
        f"({_percent(group.now)}), before {group.before.failures} of {group.before.dials} "
        f"({_percent(group.before)}); first at {group.first_at:%Y-%m-%d %H:%M:%S}, last at "
        f"{group.last_at:%Y-%m-%d %H:%M:%S} UTC{example}. "
        f"It holds {100 * explanation.of_the_rise:.0f} % of the rise"
    )
    if explanation.outside.dials:
        words += (
            f"; of all other dials {_percent(explanation.outside)} {kind}, "
            f"before {_percent(explanation.outside_before)}"
        )
    words += "."
    if explanation.shared:
        words += f" All these failures share: {_in_words(explanation.shared)}."
    return f"{words} {overall}"
