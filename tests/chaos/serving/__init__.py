"""Load and faults on a running server, by real clients; `python -m tests.chaos.serving` has the commands."""
