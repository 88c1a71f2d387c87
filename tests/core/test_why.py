"""The five incidents that `--why` must find, each hidden in 10,000 ordinary dials, and their absence."""

import math
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from listener.core import why
from listener.core.dialling import FAILURES, Leg, Outcome
from listener.core.why import Condition, Figures, Tally, Why, explain

STARTED = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)
DIALS = 10_000
ACCOUNTS = [f"agent{number:02}" for number in range(40)]
CAMPAIGNS = {f"campaign{number}": f"278722200{number}0" for number in range(8)}
"""Each with the caller id that it shows."""
SYSTEMS = {
    account: ("gws", "gws", "noojee", "click2dial")[place % 4] for place, account in enumerate(ACCOUNTS)
}
PREFIXES = ("2771", "2772", "2773", "2782", "2783", "2784", "2711", "2721", "2731", "2787")
ENDINGS: list[tuple[float, Outcome, str]] = [
    (0.62, Outcome.ANSWERED, ""),
    (0.05, Outcome.MACHINE, ""),
    (0.09, Outcome.BUSY, "CallState 6"),
    (0.15, Outcome.NO_ANSWER, "CallState 7"),
    (0.02, Outcome.CANCELLED, ""),
    (0.02, Outcome.INVALID_NUMBER, "ErrorCode 415"),
    (0.02, Outcome.UNKNOWN, ""),
    (0.01, Outcome.REJECTED, "CallState 21"),
    (0.01, Outcome.CONGESTION, "CallState 10"),
    (0.01, Outcome.FAILED, "http 503"),
]
"""How ordinary dials end."""

Incident = Callable[[Tally, random.Random], Tally]


def ordinary(chance: random.Random) -> Tally:
    """One dial as on any day."""
    account = chance.choice(ACCOUNTS)
    campaign = chance.choice(list(CAMPAIGNS))
    _, outcome, cause = chance.choices(ENDINGS, [each[0] for each in ENDINGS])[0]
    at = STARTED + timedelta(seconds=chance.uniform(0, 3600))
    return Tally(
        system=SYSTEMS[account],
        account=account,
        device=f"device of {account}",
        number_prefix=chance.choice(PREFIXES) + f"{chance.randrange(1000):03}",
        caller_id=CAMPAIGNS[campaign],
        campaign=campaign,
        outcome=outcome,
        cause=cause,
        dials=1,
        first_at=at,
        last_at=at,
    )


def day(seed: int, incident: Incident | None = None, dials: int = DIALS) -> list[Tally]:
    """So many dials, those that the incident concerns with its ending."""
    chance = random.Random(seed)
    heard = [ordinary(chance) for _ in range(dials)]
    return heard if incident is None else [incident(each, chance) for each in heard]


def _becomes(tally: Tally, outcome: Outcome, cause: str) -> Tally:
    return structs.replace(tally, outcome=outcome, cause=cause)


def trunk_prefix(tally: Tally, chance: random.Random) -> Tally:
    """The trunk for 2787 is full: most of its dials find no circuit."""
    if tally.number_prefix.startswith("2787") and chance.random() < 0.8:
        return _becomes(tally, Outcome.CONGESTION, "CallState 15")
    return tally


def device_unregistered(tally: Tally, _: random.Random) -> Tally:
    """The phone of one account is not registered: each of its dials is refused."""
    return _becomes(tally, Outcome.FAILED, "statusCode 4") if tally.account == "agent04" else tally


def caller_id_rejected(tally: Tally, chance: random.Random) -> Tally:
    """The network rejects one campaign's caller id, nine times of ten."""
    if tally.campaign == "campaign3" and chance.random() < 0.9:
        return _becomes(tally, Outcome.REJECTED, "CallState 21")
    return tally


def provider_down(tally: Tally, _: random.Random) -> Tally:
    """A system refuses every dial."""
    return _becomes(tally, Outcome.FAILED, "http 503") if tally.system == "noojee" else tally


def wrong_numbers(tally: Tally, chance: random.Random) -> Tally:
    """One agent works from a bad list: a third of the numbers do not exist, said in different ways."""
    if tally.account == "agent17" and chance.random() < 0.4:
        return _becomes(tally, Outcome.INVALID_NUMBER, chance.choice(["ErrorCode 415", "CallState 12"]))
    return tally


INCIDENTS: dict[str, tuple[Incident, set[Condition], Outcome]] = {
    "trunk prefix": (trunk_prefix, {Condition("number", "2787")}, Outcome.CONGESTION),
    "device unregistered": (device_unregistered, {Condition("account", "agent04")}, Outcome.FAILED),
    "caller id rejected": (
        caller_id_rejected,
        {Condition("caller_id", "27872220030")},
        Outcome.REJECTED,
    ),
    "provider down": (provider_down, {Condition("system", "noojee")}, Outcome.FAILED),
    "wrong numbers": (wrong_numbers, {Condition("account", "agent17")}, Outcome.INVALID_NUMBER),
}
SEEDS = range(1, 4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", INCIDENTS)
def test_the_cause_is_found(name: str, seed: int) -> None:
    """The smallest group that holds the rise is the incident: nothing wider, nothing narrower."""
    incident, conditions, outcome = INCIDENTS[name]
    found = explain(day(seed, incident), day(seed + 100)).explanation
    assert found is not None
    assert set(found.group.conditions) == conditions
    assert found.group.outcome is outcome
    assert found.of_the_rise > 0.5
    assert found.group.now.share > 0.3
    assert found.group.before.share < 0.1
    assert math.isclose(found.outside.share, found.outside_before.share, abs_tol=0.02)


@pytest.mark.parametrize("seed", range(1, 9))
def test_ordinary_days_have_no_rise(seed: int) -> None:
    """Two days without an incident differ by chance only, and chance is not explained."""
    answer = explain(day(seed), day(seed + 100))
    assert answer.explanation is None
    assert answer.sentence.startswith("No group of dials fails more than before beyond chance. In all ")


def test_an_incident_that_goes_on_is_no_rise() -> None:
    """What failed as much in the period before has not risen, however much it fails."""
    assert explain(day(1, provider_down), day(2, provider_down)).explanation is None


def test_an_incident_that_ended_is_no_rise() -> None:
    """Fewer failures than before are nothing to explain."""
    assert explain(day(1), day(2, provider_down)).explanation is None


@pytest.mark.parametrize("name", INCIDENTS)
def test_shorter_periods_are_compared_by_shares(name: str) -> None:
    """An hour is compared with a day: shares count, and not how many."""
    incident, conditions, _ = INCIDENTS[name]
    found = explain(day(1, incident), day(2, dials=3 * DIALS)).explanation
    assert found is not None
    assert set(found.group.conditions) == conditions


def test_a_conjunction_is_found() -> None:
    """An incident that only two conditions together describe is named by both."""

    def both(tally: Tally, _: random.Random) -> Tally:
        if tally.system == "gws" and tally.number_prefix.startswith("2711"):
            return _becomes(tally, Outcome.NOT_ALLOWED, "ErrorCode 649")
        return tally

    found = explain(day(1, both), day(2)).explanation
    assert found is not None
    assert set(found.group.conditions) == {Condition("system", "gws"), Condition("number", "2711")}
    assert found.group.cause == "ErrorCode 649"


def test_a_rise_everywhere_is_in_all_dials() -> None:
    """When everything fails, no group is singled out."""

    def everywhere(tally: Tally, chance: random.Random) -> Tally:
        return _becomes(tally, Outcome.CONGESTION, "CallState 10") if chance.random() < 0.5 else tally

    found = explain(day(1, everywhere), day(2)).explanation
    assert found is not None
    assert found.group.conditions == ()
    assert found.outside == Figures(0, 0)


def test_a_group_that_is_new_is_compared_with_all_dials() -> None:
    """A campaign without a past that fails from its first dial on is found."""

    def new(tally: Tally, _: random.Random) -> Tally:
        if tally.campaign != "campaign5":
            return tally
        return structs.replace(
            tally, campaign="new", caller_id="27100000000", outcome=Outcome.REJECTED, cause="CallState 21"
        )

    found = explain(day(1, new), day(2)).explanation
    assert found is not None
    assert set(found.group.conditions) == {Condition("caller_id", "27100000000")}
    assert Condition("campaign", "new") in found.shared
    assert found.group.before == Figures(0, 0)


def test_the_answer_is_in_words() -> None:
    """The sentence begins with where, what and how many; how it was before, when it was last, a dial to look
    at and what else they share follow, and how all dials went comes last."""

    def told(dials: list[Tally]) -> list[Tally]:
        return [structs.replace(each, leg=Leg.AGENT, example=f"d-{each.last_at:%M%S}") for each in dials]

    answer = explain(told(day(1, device_unregistered)), told(day(101)))
    found = answer.explanation
    assert found is not None
    now, before = found.group.now, found.group.before
    assert answer.sentence.startswith(
        f"The rise is in account agent04: {now.failures} of {now.dials} ended as failed (statusCode 4) "
        f"on the agent's leg (100.0 %), before {before.failures} of {before.dials}"
    )
    assert f"last at {found.group.last_at:%Y-%m-%d %H:%M:%S} UTC" in answer.sentence
    assert f"for example dial d-{found.group.last_at:%M%S}" in answer.sentence
    assert "share: system gws." in answer.sentence
    assert answer.sentence.endswith(
        f"In all {answer.now.failures} of {answer.now.dials} dials failed ({100 * answer.now.share:.1f} %), "
        f"before {answer.before.failures} of {answer.before.dials} ({100 * answer.before.share:.1f} %)."
    )


def failing(dials: int = 1, minute: int = 0, **fields: object) -> Tally:
    """So many dials that found the callee busy, at a minute."""
    at = STARTED + timedelta(minutes=minute)
    alike: dict[str, object] = {
        "system": "gws",
        "account": "ann",
        "number_prefix": "2782123",
        "outcome": Outcome.BUSY,
        "cause": "CallState 6",
        "leg": Leg.CALLEE,
        "example": f"d-{minute}",
    }
    return Tally(dials=dials, first_at=at, last_at=at, **{**alike, **fields})  # type: ignore[arg-type]


def test_groups_are_listed_with_their_past() -> None:
    """Each group: first, last, how many, their share of the group's dials, the same before, and a dial of the
    last of them to look at."""

    def answered(dials: int) -> Tally:
        return failing(dials, minute=7, outcome=Outcome.ANSWERED, cause="", leg=None, example="")

    answer = explain([failing(2, 5), failing(1, 9), answered(9)], [failing(1, 1), answered(19)])
    (group,) = answer.groups
    assert set(group.conditions) == {
        Condition("number", "2782"),
        Condition("account", "ann"),
        Condition("system", "gws"),
    }
    assert (group.outcome, group.cause, group.leg) == (Outcome.BUSY, "CallState 6", Leg.CALLEE)
    assert (group.now, group.before) == (Figures(12, 3), Figures(20, 1))
    assert (group.now.share, group.before.share) == (0.25, 0.05)
    assert (group.first_at, group.last_at) == (
        STARTED + timedelta(minutes=5),
        STARTED + timedelta(minutes=9),
    )
    assert (group.example, group.elsewhere) == ("d-9", False)
    assert str(group) == (
        "busy (CallState 6) on the callee's leg: system gws, account ann, numbers that begin with 2782"
    )


def test_internal_numbers_are_one_group() -> None:
    """Each extension is dialled once or twice: a group of each would say nothing."""
    dials = [failing(1, number, number_prefix=f"{5000 + number}") for number in range(30)]
    (group,) = explain(dials, [structs.replace(each, outcome=None) for each in dials]).groups
    assert Condition("number", why.INTERNAL) in group.conditions
    assert (group.now, group.before) == (Figures(30, 30), Figures(30, 0))
    assert "internal numbers" in str(group)


def test_an_ordinary_day_is_a_handful_of_groups() -> None:
    """Failures that are spread over accounts and numbers are one group for each cause, leg and system."""
    dials = day(1)
    groups = explain(dials, day(101)).groups
    kinds = {(each.system, each.outcome, each.cause) for each in dials if each.outcome in FAILURES}
    assert len(groups) == len(kinds)
    assert [group.now.failures for group in groups] == sorted(
        (group.now.failures for group in groups), reverse=True
    )


@pytest.mark.parametrize("name", INCIDENTS)
def test_where_a_cause_is_gathered_is_a_group_of_its_own(name: str) -> None:
    """An account or a beginning of numbers that stands out is named; the others with the same cause follow as
    those elsewhere, with their own dials."""
    incident, conditions, outcome = INCIDENTS[name]
    (condition,) = conditions
    answer = explain(day(1, incident), day(101))
    if condition.dimension in ("account", "number"):
        group = next(each for each in answer.groups if condition in each.conditions)
        assert group.outcome is outcome
        assert not group.elsewhere


def test_those_elsewhere_are_counted_without_those_that_are_named() -> None:
    """Failures, dials, the past, the time of the last and its example: no dial is in two groups."""

    def well(dials: int, account: str) -> Tally:
        return failing(dials, 59, account=account, outcome=Outcome.ANSWERED, cause="", leg=None, example="")

    others = [failing(2, 20 + number, account=f"a{number}") for number in range(5)]
    now = [failing(12, 30), *others, well(8, "ann"), well(40, "a0")]
    named, rest = explain(now, [failing(1, 1), failing(3, 1, account="a1"), well(50, "ann")]).groups
    assert Condition("account", "ann") in named.conditions
    assert (named.now, named.before, named.elsewhere) == (Figures(20, 12), Figures(51, 1), False)
    assert (rest.now, rest.before, rest.elsewhere) == (Figures(50, 10), Figures(3, 3), True)
    assert (rest.last_at, rest.example) == (STARTED + timedelta(minutes=24), "d-24")
    assert str(rest) == "busy (CallState 6) on the callee's leg: system gws, elsewhere"


def test_the_same_cause_on_another_leg_is_another_group() -> None:
    """Rule 5 of the taxonomy: busy is another matter when the agent's own phone is."""
    answer = explain([failing(3), failing(2, leg=Leg.AGENT)], [])
    assert [(group.leg, group.now.failures) for group in answer.groups] == [(Leg.CALLEE, 3), (Leg.AGENT, 2)]

    def own_phone(tally: Tally, _: random.Random) -> Tally:
        if tally.account != "agent04":
            return structs.replace(tally, leg=Leg.CALLEE)
        return structs.replace(_becomes(tally, Outcome.BUSY, "CallState 6"), leg=Leg.AGENT)

    answer = explain(day(1, own_phone), [structs.replace(each, leg=Leg.CALLEE) for each in day(101)])
    assert answer.explanation is not None
    assert answer.explanation.group.leg is Leg.AGENT
    assert "ended as busy (CallState 6) on the agent's leg" in answer.sentence


def test_no_device_id_is_named() -> None:
    """A device of GWS has but an id, which nobody knows by heart; of a PBX it is the extension."""
    at_first = explain(day(1, device_unregistered), day(101))
    assert "device of agent04" not in msgspec.json.encode(at_first).decode()

    def extension(tally: Tally, channel: int) -> Tally:
        return structs.replace(
            tally, system="noojee", account="office", device=f"SIP/{channel % 40}-12FA{channel}"
        )

    now = [extension(each, place) for place, each in enumerate(day(1))]
    now = [
        _becomes(each, Outcome.NO_ANSWER, "status No Answer") if each.device.startswith("SIP/7-") else each
        for each in now
    ]
    found = explain(now, [extension(each, place) for place, each in enumerate(day(101))]).explanation
    assert found is not None
    assert found.group.conditions == (Condition("device", "7"),)


def test_what_is_not_listed_is_counted() -> None:
    """More groups than are listed: those with the most failures are, and of the others the number is said."""
    tallies = [failing(number + 1, cause=f"CallState {number}") for number in range(why.GROUPS_MAX + 2)]
    answer = explain(tallies, [])
    assert len(answer.groups) == why.GROUPS_MAX
    assert answer.left_out == 1 + 2
    assert answer.groups[0].now.failures == why.GROUPS_MAX + 2


def test_more_tallies_than_are_looked_at_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of too many tallies those with the most dials are looked at, and the answer says that it is partial."""
    monkeypatch.setattr(why, "TALLIES_MAX", DIALS // 2)
    assert explain(day(1), day(2)).partial
    monkeypatch.setattr(why, "TALLIES_MAX", DIALS)
    assert not explain(day(1), day(2)).partial


def test_without_a_past_nothing_is_explained() -> None:
    """No dials before: the failures are listed, and the sentence says that nothing can be compared."""
    answer = explain(day(1, provider_down), [])
    assert answer.explanation is None
    assert answer.groups
    assert "nothing to compare with" in answer.sentence
    assert explain([], day(1)).sentence == "Nothing was dialled in this period."


def test_what_is_called_off_or_goes_on_is_no_failure() -> None:
    """A cancelled dial, a machine and a dial in conversation count as dials and not as failures."""
    kinds = (Outcome.CANCELLED, Outcome.MACHINE, Outcome.ANSWERED, None)
    tallies = [Tally("gws", "ann", "2782", outcome, 1, STARTED, STARTED) for outcome in kinds]
    answer = explain(tallies, tallies)
    assert answer.now == Figures(4, 0)
    assert answer.groups == ()


tallies_of_any_kind = st.lists(
    st.builds(
        Tally,
        system=st.sampled_from(["gws", "noojee", ""]),
        account=st.sampled_from(["ann", "ben", ""]),
        number_prefix=st.text("0123456789", max_size=8),
        outcome=st.none() | st.sampled_from(list(Outcome)),
        dials=st.integers(0, 200),
        first_at=st.just(STARTED),
        last_at=st.just(STARTED),
        cause=st.sampled_from(["", "CallState 6"]),
    ),
    max_size=12,
)


@given(tallies_of_any_kind, tallies_of_any_kind)
def test_it_answers_whatever_was_counted(now: list[Tally], before: list[Tally]) -> None:
    """Total, and consistent: a group's failures are some of its dials, and a rise has more than before."""
    answer: Why = explain(now, before)
    assert answer.now.failures <= answer.now.dials
    listed = sum(group.now.failures for group in answer.groups)
    assert listed + answer.left_out == answer.now.failures
    if answer.explanation is not None:
        found = answer.explanation
        assert found.group.now.share > found.group.before.share or found.group.before.dials < why.PRIOR_DIALS
        assert found.outside.dials + found.group.now.dials == answer.now.dials
        assert 0 < found.of_the_rise <= 1


@given(tallies_of_any_kind, tallies_of_any_kind, st.randoms(use_true_random=False))
def test_the_order_of_the_tallies_is_nothing(
    now: list[Tally], before: list[Tally], chance: random.Random
) -> None:
    """The same tallies in another order, or one dial at a time, give the same answer."""
    shuffled = list(now)
    chance.shuffle(shuffled)
    assert explain(shuffled, before) == explain(now, before)
