"""What tests share: servers to talk to, and values to feed in."""
