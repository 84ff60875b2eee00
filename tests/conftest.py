"""Fixtures that tests all over the tree share.

`server`: the address of one real server with the embedded demo model, such as http://127.0.0.1:43211,
started by `zimage-turbo launch` when the first test asks for it and ended with the session. Tests that
use it carry the marker `server`, leave its state alone, and do not assume that they are alone on it.

`cache_of_our_own`: no test writes into the cache of the person who runs them.

`process_left_as_it_was`: each test ends with the process's switches as it found them.

`launched`: the same server with its process and its output; for tests that look at these.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from platformdirs import user_cache_path

from tests.running_server import RunningServer, running_server

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every server of theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """No collection of garbage walks through what the imports have left: 600,000 objects, 0.3 s each time.

    The engine collects before each rung of its out-of-memory ladder and with each model that goes.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """What ends a server ignores signals for the rest of its process; a test's children would inherit it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def cache_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder of this session and of the processes that its tests start.

    Chromium stays where playwright keeps it, which is in the cache too.
    """
    folder = tmp_path_factory.mktemp("cache")
    browsers = os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or str(user_cache_path("ms-playwright"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_CACHE_HOME", str(folder))
        environment.setenv("XDG_DATA_HOME", str(folder / "data"))
        environment.setenv("PLAYWRIGHT_BROWSERS_PATH", browsers)
        yield folder


@pytest.fixture(autouse=True)
def process_left_as_it_was() -> Iterator[None]:
    """No test, and nothing that it called, leaves a switch of the whole process turned."""
    before = _switches()
    yield
    after = _switches()
    # torch may have come with this test: its switches are known from then on.
    assert {name: after[name] for name in before} == before


def _switches() -> dict[str, object]:
    found: dict[str, object] = {"gc": gc.isenabled(), "folder": Path.cwd()}
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "is_grad_enabled"):
        kernels = torch.backends.cuda  # on the CPU they rule too
        found |= {
            "flash attention": kernels.flash_sdp_enabled(),
            "memory-efficient attention": kernels.mem_efficient_sdp_enabled(),
            "plain attention": kernels.math_sdp_enabled(),
            "gradients": torch.is_grad_enabled(),
            "dtype": torch.get_default_dtype(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
    return found


@pytest.fixture(scope="session")
def launched() -> Iterator[RunningServer]:
    with running_server() as running:
        yield running


@pytest.fixture(scope="session")
def server(launched: RunningServer) -> str:
    return launched.base_url
