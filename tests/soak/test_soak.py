"""A short soak, and that a soak can fail: each thing that it is there to find is found."""

import json
from collections.abc import Sequence
from pathlib import Path

import asyncpg
import pytest

from listener.simulator.faults import Fault
from listener.store.embedded import DATABASE
from tests.soak.endure import Endurance, Plan, Sample
from tests.soak.schedule import DEADLY, Blow, draw
from tests.soak.verdict import EXPECTED, growth, judge, read_log
from tests.support.database import new_database
from tests.support.running import short_place

SHORT = Plan(seconds=50.0, seed=50, accounts=8, rate=20.0)
CENTRES = [10, 5, 5]
MINUTES_10 = 600.0


@pytest.mark.timeout(400)
async def test_a_minute_of_it(tmp_path: Path) -> None:
    """Killed, frozen, reloaded, without its database, and stung all the time: nothing is lost outside a gap,
    nothing doubled. Then what such a run must find is done to its database by hand, and is found."""
    soak = Endurance(SHORT, tmp_path, short_place())
    try:
        await soak.run()
        figures = (await judge(soak)).check().figures
        assert figures["stored"] > figures["sent"] / 4
        assert figures["calls_whole"] > 20
        # On a slow machine what the schedule has last is left out.
        assert set(figures["blows"]) & {Blow.KILL, Blow.TERM}
        assert len(figures["blows"]) >= 3
        assert len(figures["stings"]) > 5
        assert json.loads((await judge(soak)).line()) == figures
        for tampering, words in TAMPERINGS.items():
            assert words in await tampered(soak, tampering), tampering
        assert (await judge(soak)).wrong == []
    finally:
        await soak.close()


TAMPERINGS = {
    """
    DELETE FROM notification WHERE id = (SELECT max(id) FROM notification
        WHERE source = 'cometd' AND position > 1 AND raw <> 'null')
    """: "acknowledged and are not stored",
    """
    CREATE TEMP TABLE again AS SELECT * FROM notification WHERE id = (SELECT max(id) FROM notification
        WHERE source = 'cometd' AND position > 1 AND raw <> 'null');
    UPDATE again SET id = (SELECT max(id) + 1 FROM notification);
    INSERT INTO notification SELECT * FROM again
    """: "never sent, or twice",
    """
    DELETE FROM coverage WHERE id IN (SELECT max(id) FROM coverage WHERE since < until)
    """: "goes on at",
    """
    UPDATE coverage SET until = since WHERE cause <> '' AND since < until
    """: "said in no gap",
    """
    UPDATE call SET state = 'Established' WHERE ended_at IS NOT NULL
    """: "state should be",
    """
    UPDATE call SET user_data = '{"one": "more"}'
    """: "userData should be",
}
"""What is done to a database, and words of the sentence that must come of it."""


async def tampered(soak: Endurance, statements: str) -> str:
    """What is wrong with a copy of the database in which these statements have been run."""
    async with new_database(soak.postgres, DATABASE) as dsn:
        connection = await asyncpg.connect(dsn)
        try:
            await connection.execute("SET session_replication_role = replica")  # no trigger is in the way
            await connection.execute(statements)
        finally:
            await connection.close()
        return "\n".join((await judge(soak, dsn)).wrong)


def test_a_seed_is_a_schedule() -> None:
    """The same seed, length and accounts give the same schedule; another seed gives another."""
    assert draw(1, MINUTES_10, CENTRES) == draw(1, MINUTES_10, CENTRES)
    assert draw(1, MINUTES_10, CENTRES) != draw(2, MINUTES_10, CENTRES)


@pytest.mark.parametrize("seed", range(1, 21))
def test_ten_minutes_have_everything(seed: int) -> None:
    """Every fault of one exchange and every blow comes, in the order of time, for accounts that exist;
    nothing after the quiet has begun, and no death in the last life."""
    schedule = draw(seed, MINUTES_10, CENTRES)
    assert {sting.kind for sting in schedule.stings} == set(Fault)
    assert {stroke.blow for stroke in schedule.strokes} == set(Blow)
    moments = [[sting.at_s for sting in schedule.stings], [stroke.at_s for stroke in schedule.strokes]]
    for each in moments:
        assert each == sorted(each)
        assert each[-1] < schedule.quiet_s
    assert all(sting.account < CENTRES[sting.centre] for sting in schedule.stings)
    assert all(max(stroke.accounts) < CENTRES[stroke.centre] for stroke in schedule.strokes)
    deaths = [stroke.at_s for stroke in schedule.strokes if stroke.blow in DEADLY]
    assert len(deaths) >= 2
    assert max(deaths) < 0.6 * schedule.quiet_s
    assert any(stroke.seconds > 10 for stroke in schedule.strokes), "nothing outlasts a session"


def life(rss_mib: Sequence[float], descriptors: Sequence[int] = (30,)) -> list[Sample]:
    """Ten minutes of a daemon; the values are spread over them."""
    return [
        Sample(
            2.0 * number,
            round(rss_mib[number * len(rss_mib) // 300] * 2**20),
            descriptors[number * len(descriptors) // 300],
        )
        for number in range(300)
    ]


def test_what_grows_is_found_and_what_wavers_is_not() -> None:
    """A leak of memory or of descriptors fails a soak; a warm-up, a bulge and a short life do not."""
    assert growth([life([60, 90, 92, 91, 90, 93, 92, 90])]) == []
    assert growth([life([90, 90, 130, 90, 91])]) == []
    assert growth([life([90, 100, 110, 120, 130])]) != []
    assert growth([life([90], [30, 30, 31, 29, 33])]) == []
    assert growth([life([90], [30, 40, 50, 60, 70])]) != []
    assert growth([life([90, 100, 110, 120, 130])[:60]]) == []
    assert growth([life([90])[:60], life([90, 100, 110, 120, 130]), []]) != []
    assert growth([]) == []


def test_what_a_log_must_not_say_is_found(tmp_path: Path) -> None:
    """Failures of others are counted; an unknown error, a traceback and a line that is no JSON are wrong."""
    log = tmp_path / "listener.log"
    event = min(EXPECTED)

    def read(*lines: str) -> tuple[int, int]:
        log.write_text("\n".join(lines))
        errors, wrong = read_log(log)
        return errors.total(), len(wrong)

    assert read('{"event": "listening", "level": "info"}') == (0, 0)
    assert read(json.dumps({"event": event, "level": "error"})) == (1, 0)
    assert read(json.dumps({"event": event, "level": "error", "exception": "Traceback …"})) == (1, 1)
    assert read('{"event": "an account broke", "level": "error"}') == (1, 1)
    assert read(*['{"event": "an account broke", "level": "error"}'] * 5) == (5, 1)
    assert read("Traceback (most recent call last):") == (0, 1)
