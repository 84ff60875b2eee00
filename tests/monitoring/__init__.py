"""The monitoring beside a real server, a real Prometheus, and promtool."""
