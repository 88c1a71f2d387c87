"""Times as people write them. What the command line takes of them is in tests/test_cli.py."""

from datetime import UTC, datetime, timedelta

import pytest

from listener.core.moments import moment

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("now", NOON),
        ("90s", NOON - timedelta(seconds=90)),
        ("1.5h", NOON - timedelta(minutes=90)),
        ("2w", NOON - timedelta(days=14)),
        ("2026-03-02T14:00+01:00", datetime(2026, 3, 2, 13, tzinfo=UTC)),
        ("2026-03-02T14:00:00Z", datetime(2026, 3, 2, 14, tzinfo=UTC)),
    ],
)
def test_a_time_is_read(text: str, meant: datetime) -> None:
    """So long ago, now, or ISO 8601."""
    assert moment(text, NOON) == meant


@pytest.mark.parametrize("text", ["", "yesterday", "90", "99999999w"])
def test_what_is_no_time_is_refused(text: str) -> None:
    """With what to write instead, or why not."""
    with pytest.raises(ValueError, match=r"is no time; write 90m|is too long ago"):
        moment(text, NOON)
