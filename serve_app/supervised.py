"""The process in which the server of `zimage-turbo launch` runs, below its supervisor.

    python -m serve_app.supervised DESCRIPTOR

`supervision` starts it, and tells it by the line with that descriptor what to serve.
"""

from __future__ import annotations

import signal
import sys

from serve_app.app import serve_here
from serve_app.local_cluster import LaunchFailed
from serve_app.supervision import STOP_SIGNALS, Line, Ready, stop_on_signals
from zimage_engine.errors import EngineError


def main() -> None:
    """Serve until a signal or the supervisor's end; the supervisor is told what keeps it from starting."""
    stop_on_signals()
    line = Line(int(sys.argv[1]))
    try:
        settings, folder = line.receive()
        serve_here(settings, folder, lambda: line.tell(Ready()))
    except (LaunchFailed, EngineError) as error:
        # Once told, the supervisor ends this process, which is about to end by itself.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        line.tell(error)
    except (KeyboardInterrupt, EOFError):
        return


if __name__ == "__main__":
    main()
