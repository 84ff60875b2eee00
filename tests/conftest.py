"""Fixtures that tests all over the tree share.

`server`: the address of one real server with the embedded demo model, such as http://127.0.0.1:43211,
started by `zimage-turbo launch` when the first test asks for it and ended with the session. Tests that
use it carry the marker `server`, leave its state alone, and do not assume that they are alone on it.

`launched`: the same server with its process and its output; for tests that look at these.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.running_server import RunningServer, running_server


@pytest.fixture(scope="session")
def launched() -> Iterator[RunningServer]:
    with running_server() as running:
        yield running


@pytest.fixture(scope="session")
def server(launched: RunningServer) -> str:
    return launched.base_url
