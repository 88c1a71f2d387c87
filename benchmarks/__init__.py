"""Ratios and figures, one JSON line each; every figure is compared inside the same run."""
