"""Whether a soak was passed: what was sent beside what is stored, the daemon's log, and what it uses.

The comparison with the truth is `tests.support.truth`. Added to it is what only a long run shows. Memory is
flat when, in the longest life of the daemon and after its warm-up, the middle of the last third is not above
that of the first third by more than a margin: a leak grows with every message, caches and an allocator's
habits do not. The log may say that others failed, as they were made to; it may not say that we did.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import asyncpg

from tests.soak.endure import Endurance, Sample
from tests.support.truth import compare

WARM_UP_s = 30.0
LIFE_s_MIN = 120.0
"""A life shorter than this, after its warm-up, says nothing about memory."""
RSS_SHARE_MAX, RSS_BYTES_MAX = 0.10, 12 * 2**20
"""How much more the last third may take than the first: a share of it, and so much."""
DESCRIPTORS_MAX = 12
"""The same for descriptors: connections come and go."""

EXPECTED = frozenset(
    {
        "the store does not answer; nothing is acknowledged meanwhile",
        "the database does not answer",
        "not reloaded yet; tried again soon",
        "subscription refused",
        "the server wants no more of us",
        "not everything could be stored in time; what was not is not acknowledged",
        "asyncio: ConnectionDoesNotExistError",
    }
)
"""What a log may say at the level of errors while others fail."""
OF_ASYNCPG = "ConnectionDoesNotExistError"
"""asyncpg leaves a future that nobody asks when a server goes away while it connects, and asyncio says so;
what it means for us is raised to whoever waits for that connection."""
LINE_CHARS_MAX = 2000
"""Of a line of the log that is quoted."""
SHOWN_MAX = 20
"""Sentences about what is wrong in one verdict."""


class Verdict(NamedTuple):
    """`wrong` is empty when the soak was passed."""

    wrong: list[str]
    figures: dict[str, Any]
    """For one line."""
    errors: Counter[str]
    """What the log said at the level of errors, by event."""

    def line(self) -> str:
        """The figure line: one JSON object."""
        return json.dumps(self.figures)

    def check(self) -> "Verdict":
        """Raises AssertionError with what is wrong, if anything is."""
        assert not self.wrong, "\n".join([*self.wrong[:SHOWN_MAX], self.line()])
        return self


async def judge(soak: Endurance, dsn: str | None = None) -> Verdict:
    """Judges a soak that has run, by its database, which still runs, or by a copy of it."""
    dsn = dsn or soak.dsn
    witness, plan = soak.witness, soak.plan
    wrong = list(witness.wrong)
    sent = stored = missing = calls = inferred = surplus = 0
    late_s = 0.0
    stings: Counter[str] = Counter()
    for centre in soak.centres:
        stings.update(centre.simulator.faults.struck)
        acknowledged = centre.simulator.settings.ack
        report = await compare(dsn, centre.simulator.truth(), acknowledged=acknowledged, name=centre.account)
        wrong += [f"{centre.name}: {each}" for each in report.wrong]
        sent += report.sent
        stored += report.stored
        missing += report.missing
        calls += report.calls
        inferred += report.inferred
        surplus += report.surplus
        late_s = max(late_s, report.late_s)
    errors, broken = read_log(soak.daemon.log)
    wrong += broken
    wrong += growth(witness.lives)
    longest = _longest(witness.lives)
    first, last = (longest[0], longest[-1]) if longest else (None, None)
    figures = {
        "verdict": "failed" if wrong else "passed",
        "minutes": round(plan.seconds / 60, 2),
        "seed": plan.seed,
        "accounts": plan.accounts,
        "sent": sent,
        "stored": stored,
        "in_gaps": missing,
        "surplus": surplus,
        "calls_whole": calls,
        "calls_inferred": inferred,
        "starts": soak.daemon.starts,
        "blows": dict(sorted(witness.blows.items())),
        "stings": dict(sorted(stings.items())),
        "gap_s": await _gap_s(dsn),
        "late_s_max": round(late_s, 1),
        "rss_mib": [round(each.rss_bytes / 2**20, 1) for each in (first, last) if each],
        "fds": [each.descriptors for each in (first, last) if each],
        "errors_logged": errors.total(),
    }
    return Verdict(wrong, figures, errors)


async def _gap_s(dsn: str) -> dict[str, float]:
    """Account-seconds of every cause but those before the first start and after the last stop."""
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch(
            "SELECT cause, round(extract(epoch FROM sum(until - since)), 1)::float AS seconds FROM coverage"
            " WHERE cause <> '' AND until IS NOT NULL GROUP BY cause ORDER BY cause"
        )
    finally:
        await connection.close()
    return {row["cause"]: row["seconds"] for row in rows if row["seconds"]}


def read_log(log: Path) -> tuple[Counter[str], list[str]]:
    """What it says at the level of errors, by event, and sentences about what it must not say."""
    errors: Counter[str] = Counter()
    wrong: list[str] = []
    unexpected: set[str] = set()
    for text in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            wrong.append(f"the log has a line that is no JSON: {text[:300]}")
            continue
        event = str(line.get("event"))
        if line.get("level") in ("error", "critical"):
            if line.get("logger") == "asyncio" and str(line.get("error")).startswith(OF_ASYNCPG):
                event = f"asyncio: {OF_ASYNCPG}"
            errors[event] += 1
            if (event not in EXPECTED or "exception" in line) and event not in unexpected:
                unexpected.add(event)  # the first of its kind will do
                wrong.append(f"the log says: {text[:LINE_CHARS_MAX]}")
    return errors, wrong


def _longest(lives: Sequence[Sequence[Sample]]) -> Sequence[Sample]:
    """The samples of the longest life, after its warm-up."""
    longest = max(lives, key=lambda life: life[-1].at_s if life else 0.0, default=[])
    return [sample for sample in longest if sample.at_s >= WARM_UP_s] or longest


def growth(lives: Sequence[Sequence[Sample]]) -> list[str]:
    """What grows that should not; nothing where no life was long enough to tell."""
    samples = _longest(lives)
    if not samples or samples[-1].at_s - samples[0].at_s < LIFE_s_MIN:
        return []
    third = len(samples) // 3
    found = []
    for name, values, most in (
        ("memory (bytes)", [sample.rss_bytes for sample in samples], RSS_BYTES_MAX),
        ("descriptors", [sample.descriptors for sample in samples], DESCRIPTORS_MAX),
    ):
        early, late = median(values[:third]), median(values[-third:])
        if late > early * (1 + RSS_SHARE_MAX) + most:
            found.append(
                f"{name} grew from {early:.0f} to {late:.0f} in a life of {samples[-1].at_s:.0f} s;"
                f" now and then it was {values[:: max(1, len(values) // 10)]}"
            )
    return found
