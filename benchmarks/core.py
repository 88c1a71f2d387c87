"""What understanding a message costs: decoding it, and folding it into its call.

`python -m benchmarks.core` prints one JSON line. Each of five rounds reads the same messages three times:
with `json.loads`, which is the measure; with `decode`; and with `decode` and a `Board`. Seconds are CPU
seconds of this one process. Figures are the medians of the rounds, ratios the medians of each round's own, so
that a busy machine slows both sides of them. What a board costs to fill from the store is part of the
journal's figures, and not of these.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence

from benchmarks.traffic import traffic
from listener.core.calls import Heard
from listener.core.decode import decode
from listener.core.normalise import Board, ids_needed

MESSAGES = 20_000
ACCOUNTS = 50
ROUNDS = 5


def read_only(heard: Sequence[Heard]) -> None:
    """The measure: the standard library reads the bytes, and nothing is made of them."""
    for each in heard:
        json.loads(each.raw)


def decode_only(heard: Sequence[Heard]) -> None:
    """Each message becomes a notification."""
    for each in heard:
        decode(each.raw)


def decode_and_fold(heard: Sequence[Heard]) -> None:
    """Each message becomes a notification, and each notification a step of its call."""
    board, number = Board([]), 1
    for each in heard:
        decoded = decode(each.raw)
        board.hear(number, each, decoded)
        number += ids_needed(decoded)


def _seconds(work: Callable[[Sequence[Heard]], None], heard: Sequence[Heard]) -> float:
    began = time.process_time()
    work(heard)
    return time.process_time() - began


def main() -> None:
    """Runs all and prints the line."""
    heard = list(traffic(MESSAGES, accounts=ACCOUNTS))
    rounds = [
        tuple(MESSAGES / _seconds(work, heard) for work in (read_only, decode_only, decode_and_fold))
        for _ in range(ROUNDS)
    ]
    loads, decoded, folded = (statistics.median(column) for column in zip(*rounds, strict=True))
    figures = {
        "benchmark": "core",
        "messages": MESSAGES,
        "mean_bytes": round(sum(len(each.raw) for each in heard) / MESSAGES),
        "json_loads_per_second": round(loads),
        "decode_per_second": round(decoded),
        "decode_and_normalise_per_second": round(folded),
        "decode_us": round(1e6 / decoded, 2),
        "decode_and_normalise_us": round(1e6 / folded, 2),
        "decode_to_json_loads": round(statistics.median(d / j for j, d, _ in rounds), 2),
        "decode_and_normalise_to_json_loads": round(statistics.median(f / j for j, _, f in rounds), 2),
    }
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
