"""The real command as a process of its own, against the simulated contact centre, and killed."""
