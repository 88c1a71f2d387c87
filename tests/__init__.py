"""The tests: a tree that mirrors `listener`, and the other side of every promise."""
