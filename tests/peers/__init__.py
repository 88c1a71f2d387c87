"""Real CometD servers, a proxy that breaks connections, and the tests that they do what they claim."""
