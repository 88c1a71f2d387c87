"""TALKS. One outside party per file; none knows another, the store, or the settings."""
