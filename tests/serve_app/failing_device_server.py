"""A server whose first worker loses its device while it draws, and whose workers all die of one prompt.

Everything is real but the device's error, and why a worker ends.

    python -m tests.serve_app.failing_device_server MODEL PORT MARKER

The worker that finds no file MARKER makes it, and its denoiser raises what torch raises after a launch
failure.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.app import HEALTH_CHECK_SECONDS, WORKER_ONGOING_REQUESTS
from serve_app.local_cluster import LocalCluster
from serve_app.settings import Settings, load_settings
from serve_app.worker import ImageWorker
from zimage_engine.types import GenerationRequest

if TYPE_CHECKING:
    from ray.serve import Application


#: Whatever has it in its prompt ends the process that draws it, in its first step.
FATAL = "fatal circle"


class FailingWorker(ImageWorker):
    async def __init__(self, settings: Settings, marker: str) -> None:  # type: ignore[misc]
        await ImageWorker.__init__(self, settings)  # type: ignore[misc]
        self._draws_what_is_fatal = False

        def dies(*_: Any) -> None:
            if self._draws_what_is_fatal:
                os._exit(1)

        self._pool.engines[0].pipeline.transformer.register_forward_pre_hook(dies)
        if Path(marker).exists():
            return
        Path(marker).touch()
        steps: list[int] = []

        def fails(*_: Any) -> None:
            import torch

            steps.append(1)
            if len(steps) > 2:
                raise torch.AcceleratorError("CUDA error: unspecified launch failure")

        self._pool.engines[0].pipeline.transformer.register_forward_pre_hook(fails)

    async def _drawn_by(self, engine: Any, request: GenerationRequest, *rest: Any) -> Any:
        self._draws_what_is_fatal = FATAL in request.prompt
        return await ImageWorker._drawn_by(self, engine, request, *rest)


def build(settings: Settings) -> Application:
    # What Ray reads from the environment is there by now, and not before.
    from ray import serve

    from serve_app.ingress import PromptEnhancerIngress

    worker = serve.deployment(
        FailingWorker,
        name="ImageWorker",
        max_ongoing_requests=WORKER_ONGOING_REQUESTS,
        health_check_period_s=HEALTH_CHECK_SECONDS,
    )
    ingress = serve.deployment(
        PromptEnhancerIngress, name="PromptEnhancer", ray_actor_options={"num_cpus": 0}
    )
    return ingress.bind(worker.bind(settings, sys.argv[3]), settings)


def main() -> None:
    settings = load_settings(model=sys.argv[1], port=int(sys.argv[2]), device="cpu", cpu_threads=1, ui=False)
    with contextlib.suppress(KeyboardInterrupt), LocalCluster(settings) as cluster:
        cluster.run(build, settings)
        sys.stdout.write(f"zimage-turbo is ready: {settings.url}\n")
        sys.stdout.flush()
        threading.Event().wait()


if __name__ == "__main__":
    main()
