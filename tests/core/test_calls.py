"""The vocabulary: that it is what its docstrings promise to everybody who builds on it."""

from datetime import UTC, datetime

import msgspec
import pytest

from listener.core import calls
from listener.core.calls import (
    ANOMALY_KINDS,
    CHANGE_FIELDS,
    GAP_CAUSES,
    OPENING_FIELDS,
    Call,
    Change,
    Direction,
    Heard,
    Notification,
    Outcome,
    Party,
    Source,
    State,
)

AT = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)


def a_call(**fields: object) -> Call:
    """A call of which nothing is known but that it is there."""
    known: dict[str, object] = {
        "id": 1,
        "account": 1,
        "call_id": "a",
        "aliases": ("a",),
        "state": "Ringing",
        "state_since": AT,
        "opened_at": AT,
        "last_heard_at": AT,
        "direction": Direction.INBOUND,
        "opened_by": Source.COMETD,
    }
    return msgspec.convert(known | fields, Call)


def test_words_are_the_vendors_own() -> None:
    """States compare equal to the texts that Genesys sends, so that a stored text needs no translation."""
    assert {str(state) for state in State} == {
        "Dialing",
        "Ringing",
        "Established",
        "Held",
        "Released",
        "Completed",
    }


@pytest.mark.parametrize(
    "value",
    [
        a_call(),
        Notification("CallStateChangeMessage", "StatusChange", "a"),
        Change("state", None, "Ringing"),
        Heard(1, "s", 1, AT, "/v2/me/calls", b"{}"),
        Party(0, "7023", "", "", "", AT),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_do_not_change(value: object) -> None:
    """What was handed on cannot be altered by whom it was handed to."""
    field = value.__struct_fields__[0]  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        setattr(value, field, getattr(value, field))


@pytest.mark.parametrize(
    ("fields", "is_open"),
    [
        ({}, True),
        ({"state": "Nonsense"}, True),
        ({"ended_at": AT}, False),
        ({"settled": "inferred: no longer among the live calls"}, False),
        ({"ended_at": AT, "settled": "released"}, False),
    ],
)
def test_open_is_neither_ended_nor_inferred(fields: dict[str, object], is_open: bool) -> None:
    """A call goes on until its end was heard or inferred, whatever its state is called."""
    assert a_call(**fields).open is is_open


def test_calls_do_not_share_their_data() -> None:
    """The empty userData of one call is not that of another."""
    assert a_call().user_data is not a_call().user_data


def test_a_call_survives_storage() -> None:
    """A call with everything in it comes back equal from JSON, which is how the store keeps parts of it."""
    call = a_call(
        parties=(Party(0, "7023", "+491", "7023", "RoleDestination", AT, AT),),
        user_data={"Case": "4", "WWE_PARTY_7023": {"firstname": "é"}, "Tries": 3, "Rate": 0.5},
        capabilities=frozenset({"Hold", "Hangup"}),
        outcome=Outcome.ANSWERED,
    )
    assert msgspec.json.decode(msgspec.json.encode(call), type=Call) == call


def test_changed_fields_are_fields_of_a_call() -> None:
    """Every field that a change may name can be looked up on the call; participants are its stays."""
    assert CHANGE_FIELDS - {"participant"} <= set(Call.__struct_fields__)
    assert OPENING_FIELDS <= CHANGE_FIELDS


@pytest.mark.parametrize("labels", [ANOMALY_KINDS, GAP_CAUSES])
def test_label_sets_are_plain_words(labels: frozenset[str]) -> None:
    """They become values of metric labels: short, lower case, closed."""
    assert all(label == label.lower() and len(label) <= 32 and label.strip() for label in labels)


def test_everything_public_says_what_it_is() -> None:
    """A vocabulary without definitions is none."""
    own = [value for value in vars(calls).values() if getattr(value, "__module__", None) == calls.__name__]
    assert len(own) > 15
    assert all(value.__doc__ for value in own)
