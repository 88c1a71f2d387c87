"""`python -m tests.soak`: one soak, and its figure line; the exit code is 0 when it was passed.

SOAK_MINUTES (10; a fraction will do), SOAK_SEED (1), SOAK_ACCOUNTS (20), SOAK_RATE (30 notifications a second
over all accounts). What it leaves when it fails is named: the daemon's log and settings.
"""

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from tests.soak.endure import Endurance, Plan
from tests.soak.verdict import SHOWN_MAX, Verdict, judge
from tests.support.running import short_place


def say(text: str) -> None:
    """Prints at once, so that a pipe shows it too."""
    print(text, flush=True)  # noqa: T201 - its only way to speak


async def soak(plan: Plan, place: Path) -> Verdict:
    """Runs and judges."""
    endurance = Endurance(plan, place, short_place(), say=say)
    try:
        await endurance.run()
        return await judge(endurance)
    finally:
        await endurance.close()


def main() -> int:
    """Reads the variables, runs, prints."""
    plan = Plan(
        seconds=60 * float(os.environ.get("SOAK_MINUTES", "10")),
        seed=int(os.environ.get("SOAK_SEED", "1")),
        accounts=int(os.environ.get("SOAK_ACCOUNTS", "20")),
        rate=float(os.environ.get("SOAK_RATE", "30")),
    )
    # So that a soak that is told to end ends what it started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    place = Path(tempfile.mkdtemp(prefix="soak-"))
    say(f"{plan.seconds / 60:g} minutes, seed {plan.seed}, {plan.accounts} accounts, {plan.rate:g}/s")
    verdict = asyncio.run(soak(plan, place))
    for event, count in verdict.errors.most_common():
        say(f"logged as error: {count} x {event}")
    for sentence in verdict.wrong[:SHOWN_MAX]:
        say(f"WRONG: {sentence}")
    if len(verdict.wrong) > SHOWN_MAX:
        say(f"and {len(verdict.wrong) - SHOWN_MAX} more")
    say(verdict.line())
    if verdict.wrong:
        say(f"the daemon's log is {place / 'listener.log'}")
        return 1
    shutil.rmtree(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
