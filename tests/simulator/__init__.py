"""Tests of the simulated contact centre, over real sockets."""
