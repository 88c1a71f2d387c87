"""What is heard of a PBX goes to the dials first, then to the journal; its coverage is its accounts'."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

import pytest

from listener.core.calls import Cover, Heard
from listener.core.dialling import Dial, Fact, NoojeeStatus, Sighting, System
from listener.errors import StoreUnavailable
from listener.pbxwatch import PbxWatch

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
SEEN = Sighting(System.NOOJEE, NOON, 7, "5001", device="101")


class _Everything:
    """The dials, the pipeline and the ledger: what they were given, in order."""

    def __init__(self) -> None:
        self.got: list[str] = []
        self.covers: list[Cover] = []
        self.vouched: Callable[[], datetime | None] = lambda: None
        self.committing: list[Callable[[], None]] = []
        self.away = self.full = self.slow = False

    async def sighted(
        self, seen: Sighting, fact: Fact, at: datetime, *, key: str = "", beside: bool = False
    ) -> Dial | None:
        assert (seen, fact, at) == (SEEN, NoojeeStatus("Hungup"), NOON)
        if self.full:
            raise StoreUnavailable("too many facts of dials wait")
        if self.away:
            await asyncio.Event().wait()
        self.got.append(f"dial {key} {beside}")
        return None

    async def hear(self, heard: Sequence[Heard], committed: Callable[[], None]) -> None:
        self.got.append(f"hear {heard[0].account}")
        self.committing.append(committed)
        if not self.slow:
            committed()

    def cover(self, cover: Cover, vouched: Callable[[], datetime | None] = lambda: None) -> None:
        self.covers.append(cover)
        self.vouched = vouched


def _watch(all_: _Everything, gaps: list[tuple[str, float]], answers_s: float | None = 40.0) -> PbxWatch:
    return PbxWatch(
        "office",
        {"101": 7, "102": 8},
        dials=all_,
        pipeline=all_,
        ledger=all_,
        answers_s=answers_s,
        wall=lambda: NOON,
        gap=lambda cause, seconds: gaps.append((cause, seconds)),
        since=NOON,
        tell_s=0.05,
    )


async def test_the_dials_are_told_before_it_is_committed() -> None:
    """What is asked for again after a crash was either committed, or is told to the dials again."""
    all_, committed = _Everything(), asyncio.Event()
    heard = Heard(7, "s", 1, NOON, "/noojee/office/101", b"{}")
    await _watch(all_, []).take([heard], [(SEEN, NoojeeStatus("Hungup"), "1.5", True)], committed.set)
    assert all_.got == ["dial 1.5 True", "hear 7"]
    assert committed.is_set()


@pytest.mark.parametrize("trouble", ["away", "full"])
async def test_dials_that_wait_for_the_database_do_not_hold_up_what_is_heard(trouble: str) -> None:
    """It goes on to the pipeline, which has a spool; also what the dials take no more."""
    all_ = _Everything()
    setattr(all_, trouble, True)
    heard = Heard(7, "s", 1, NOON, "/noojee/office/101", b"{}")
    await _watch(all_, []).take([heard], [(SEEN, NoojeeStatus("Hungup"), "1.5", True)], lambda: None)
    assert all_.got == ["hear 7"]


def test_whose_an_extension_is() -> None:
    """With its technology or without; what nobody knows goes to the first, and is said to be unknown."""
    watch = _watch(_Everything(), [])
    assert [watch.account(each) for each in ("102", "SIP/102", "999", "")] == [8, 8, 7, 7]
    assert [watch.knows(each) for each in ("102", "SIP/102", "999", "")] == [True, True, False, False]


def test_a_gap_of_the_pbx_is_one_of_each_account() -> None:
    """From when to when, why, and what /-/ready says meanwhile."""
    all_, gaps = _Everything(), list[tuple[str, float]]()
    watch = _watch(all_, gaps)
    assert watch.trouble == "not heard yet"
    watch.covered("", "", NOON + timedelta(seconds=1))
    assert watch.trouble == ""
    watch.covered("disconnected", "no answer", NOON + timedelta(seconds=5))
    assert watch.trouble == "disconnected: no answer"
    watch.covered("", "", NOON + timedelta(seconds=8))
    watch.end(NOON + timedelta(seconds=9))
    assert [(each.account, each.cause) for each in all_.covers] == [
        (7, ""),
        (8, ""),
        (7, "disconnected"),
        (8, "disconnected"),
        (7, ""),
        (8, ""),
        (7, "stopped"),
        (8, "stopped"),
    ]
    assert gaps == [("not started", 2.0), ("disconnected", 6.0)]


def _at(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


def test_it_vouches_for_what_was_answered_since_it_is_heard() -> None:
    """Up to when its PBX has told everything; after a gap only from the first answer on."""
    all_ = _Everything()
    watch = _watch(all_, [], answers_s=None)
    watch.covered("", "", NOON)
    assert all_.vouched() is None
    watch.answered(_at(25))
    assert all_.vouched() == _at(25)
    watch.covered("disconnected", "no answer", _at(26))
    watch.covered("", "", _at(90))
    assert all_.vouched() is None
    watch.answered(_at(90))
    assert all_.vouched() == _at(90)


def test_where_answers_are_not_told_it_vouches_for_what_is_older_than_the_newest_may_be() -> None:
    """A Redis is read list by list, and no answer of it says until when all was told."""
    all_ = _Everything()
    _watch(all_, []).covered("", "", NOON)
    assert all_.vouched() == NOON - timedelta(seconds=40)


@pytest.mark.parametrize(("answers_s", "before"), [(None, NOON), (40.0, NOON - timedelta(seconds=40))])
async def test_it_vouches_for_nothing_that_is_not_durable(answers_s: float | None, before: datetime) -> None:
    """A crash loses what was taken and not committed: until that is, nothing newer is vouched for than what
    was before it, however many answers came since and whichever of them were committed."""
    clock = [NOON]
    all_ = _Everything()
    watch = _watch(all_, [], answers_s=answers_s)
    watch._wall = lambda: clock[0]
    watch.covered("", "", NOON)
    watch.answered(NOON)
    all_.slow = True
    heard = Heard(7, "s", 1, NOON, "/noojee/office/101", b"{}")
    for seconds in (10, 20):
        await watch.take([heard], [], lambda: None)
        clock[0] = _at(seconds)
        watch.answered(_at(seconds))
    first, second = all_.committing
    second()
    assert all_.vouched() == before
    await watch.take([heard], [], lambda: None)
    clock[0] = _at(30)
    watch.answered(_at(30))
    first()
    assert all_.vouched() == before + timedelta(seconds=20)
    all_.committing[2]()
    assert all_.vouched() == before + timedelta(seconds=30)
