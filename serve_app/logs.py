"""Where the application's own words go: one line each, to the standard error of its process.

Ray hands that on to the terminal of `launch`, and to the pod's log in a cluster. Serve redirects
`sys.stderr` into files of its own, so the real one is used.
"""

from __future__ import annotations

import logging
import sys

LOGGER_NAME = "serve_app"


def log_to_terminal() -> None:
    """Let the loggers of this package write to the terminal; called once in each replica."""
    logger = logging.getLogger(LOGGER_NAME)
    if logger.handlers:
        return
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
