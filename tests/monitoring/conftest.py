"""Prometheus and promtool, Debian's: missing on a machine they skip, in CI they fail."""

from __future__ import annotations

import os
import shutil

import pytest


@pytest.fixture(scope="session")
def prometheus() -> None:
    """For tests that need `prometheus` and `promtool`."""
    if shutil.which("prometheus") is None or shutil.which("promtool") is None:
        message = "Prometheus is not installed: apt-get install prometheus"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
