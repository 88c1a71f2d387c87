"""Endurance: the real command under everything that can go wrong, from a seed, for as long as is wanted.

`make soak` runs `python -m tests.soak`. `schedule` says what goes wrong and when, from the seed alone;
`endure` lets it happen; `verdict` holds the database, the log and the process against what was sent.
"""
