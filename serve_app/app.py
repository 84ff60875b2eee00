"""The application: which deployments there are, and how a person starts them on one machine.

`build` is the only place that binds deployments; all four ways to start come through it. Ray is
imported inside the functions, because what it reads from the environment must be set before.
"""

# No postponed annotations here: Serve reads the class behind `settings: Settings` to check arguments.

import asyncio
import contextlib
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.settings import Settings, allocator_environment

if TYPE_CHECKING:
    from ray.serve import Application

APP_NAME = "default"

#: The settings that name a folder, a file or a hub id.
MODEL_PATHS = ("model", "base", "text_encoder", "vae")

#: The worker's own lock lets one request draw at a time; the others are at hand when it ends, and
#: one may be packing its pictures.
WORKER_ONGOING_REQUESTS = 3
#: Each open page holds a stream of events.
INGRESS_ONGOING_REQUESTS = 1000
#: A rolling update waits for the longest picture before it ends a worker.
GRACEFUL_SHUTDOWN_SECONDS = 300.0
HEALTH_CHECK_SECONDS = 10.0
#: How long a collector of traces may hold up the end of `launch`.
TRACES_SECONDS = 3.0


def build(settings: Settings) -> "Application":
    """The bound graph: the prompt-enhancer ingress in front of the image workers."""
    from ray import serve

    from serve_app.ingress import PromptEnhancerIngress
    from serve_app.worker import ImageWorker

    settings = _with_absolute_paths(settings)
    num_gpus = gpus_for_a_worker(settings, _gpus_in_reach)
    worker = serve.deployment(
        ImageWorker,
        name="ImageWorker",
        num_replicas=settings.num_replicas,
        max_ongoing_requests=WORKER_ONGOING_REQUESTS,
        # The ingress' own queue is the bounded one, and hands over no more than the workers have room for.
        max_queued_requests=-1,
        graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_SECONDS,
        health_check_period_s=HEALTH_CHECK_SECONDS,
        ray_actor_options={
            "num_cpus": settings.worker_cpus,
            "num_gpus": num_gpus,
            "runtime_env": {"env_vars": allocator_environment()} if num_gpus else {},
        },
    )
    ingress = serve.deployment(
        PromptEnhancerIngress,
        name="PromptEnhancer",
        max_ongoing_requests=INGRESS_ONGOING_REQUESTS,
        # Who waits in its queue when it is to end is still served.
        graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_SECONDS,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(worker.bind(settings), settings)


def launch(settings: Settings) -> None:
    """Serve on this machine until Ctrl-C or SIGTERM, then end every process that was started.

    Prints the address once a worker has its model. Raises LaunchFailed, with a sentence, where the
    port is taken or the model cannot be loaded; CheckpointError, before anything is started, for a
    folder that is no model, a LoRA that is none, or a path where there is nothing.
    """
    from serve_app.local_cluster import LocalCluster

    settings = _with_absolute_paths(settings)
    _check_files(settings)
    try:
        with LocalCluster(settings) as cluster:
            cluster.run(build, settings)
            _say(f"zimage-turbo is ready: {settings.url}")
            try:
                threading.Event().wait()
            finally:
                _send_traces(settings)
    except KeyboardInterrupt:
        _say("zimage-turbo has stopped")


def _send_traces(settings: Settings) -> None:
    """Ray ends the ingresses at once, and with them the traces that they have not sent yet: send them before.

    A collector that is away holds up the end for TRACES_SECONDS.
    """
    if settings.otlp_endpoint is None:
        return
    from ray import serve
    from ray.serve.exceptions import RayServeException

    async def asked() -> None:
        # Before HAProxy a handle works in the event loop that it was made in, and nowhere else.
        sent = serve.get_app_handle(APP_NAME).broadcast("send_traces")
        await sent.results_async(timeout_s=TRACES_SECONDS, return_exceptions=True)

    with contextlib.suppress(TimeoutError, RayServeException):
        asyncio.run(asked())


def gpus_for_a_worker(settings: Settings, gpus_in_reach: Callable[[], int]) -> float:
    """What Ray reserves for a worker: what the settings say, else 1 where there is a GPU to draw with."""
    if settings.num_gpus is not None:
        return settings.num_gpus
    if settings.device is not None and not settings.device.startswith("cuda"):
        return 0
    return 1 if gpus_in_reach() else 0


def _gpus_in_reach() -> int:
    """GPUs of the cluster, or of this machine while no cluster is connected; found without torch."""
    import ray
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    if ray.is_initialized():
        return int(ray.cluster_resources().get("GPU", 0))
    return NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()


def _with_absolute_paths(settings: Settings) -> Settings:
    """Workers run in a directory of their own, where a relative path leads elsewhere."""
    absolute: dict[str, Any] = {
        name: str(path.resolve())
        for name in MODEL_PATHS
        if (named := getattr(settings, name)) is not None and (path := Path(named).expanduser()).exists()
    }
    if settings.api_keys_file is not None:
        absolute["api_keys_file"] = settings.api_keys_file.expanduser().resolve()
    absolute["loras"] = tuple(replace(lora, path=lora.path.resolve()) for lora in settings.loras)
    return settings.model_copy(update=absolute)


def _check_files(settings: Settings) -> None:
    """Raise CheckpointError for files that no worker could load; what a hub has is left to the worker.

    Raises InvalidRequest for a file of keys that cannot be used.
    """
    from serve_app.keys import KeyFileWrong, read_keys
    from zimage_engine import ModelLoaderAdapter
    from zimage_engine.errors import InvalidRequest
    from zimage_engine.families import family_named
    from zimage_engine.loading.locate import locate
    from zimage_engine.loading.lora_layouts import check_loras

    if settings.api_keys_file is not None:
        try:
            read_keys(settings.api_keys_file)
        except KeyFileWrong as wrong:
            raise InvalidRequest(str(wrong), "api_keys_file") from wrong
    if settings.family is not None:
        family_named(settings.family)
    named = {name: path for name in MODEL_PATHS if (path := getattr(settings, name)) is not None}
    here = {name: path for name, path in named.items() if Path(path).exists() or path.count("/") != 1}
    for path in here.values():
        locate(path)
    check_loras(settings.loras)
    if "model" in here and here == named:
        beside = {name: path for name, path in here.items() if name != "model"}
        ModelLoaderAdapter(here["model"], settings.family, **beside).check()


def _say(sentence: str) -> None:
    sys.stdout.write(sentence + "\n")
    sys.stdout.flush()
