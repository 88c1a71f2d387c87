"""Times as people write them: an hour ago, now, or ISO 8601.

It decides what a text means, given what time it is; it refuses to know who wrote it and where.
"""

import re
from datetime import UTC, datetime, timedelta

SO_LONG = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
"""A length of time: 90m, 24h, 7d."""

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def moment(text: str, now: datetime) -> datetime:
    """Read a time: "90m" (so long ago; s, m, h, d, w), "now", or ISO 8601, local unless it says.

    Raises ValueError with the cure.
    """
    if text == "now":
        return now
    if ago := SO_LONG.fullmatch(text):
        try:
            return now - timedelta(**{_UNITS[ago[2]]: float(ago[1])})
        except OverflowError:
            raise ValueError(f"{text!r} is too long ago") from None
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is no time; write 90m, 1h, 2d or 2026-03-02T14:00") from None
