"""Tests of the adapters, against servers that we did not write where there are such."""
