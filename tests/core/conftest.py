"""How long Hypothesis looks: `short` in every run, the same examples each time; `long` when asked for.

LISTENER_HYPOTHESIS=long pytest tests/core
"""

import os

from hypothesis import HealthCheck, settings

# Deadlines measure the machine, not the code; pytest's own timeout ends what hangs.
settings.register_profile("short", max_examples=300, derandomize=True, deadline=None)
settings.register_profile(
    "long", max_examples=5_000, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile(os.environ.get("LISTENER_HYPOTHESIS", "short"))
