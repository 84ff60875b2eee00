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

from serve_app.model_list import ListedModel
from serve_app.serve_config import check_deployed
from serve_app.settings import Settings, allocator_environment

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.config import AutoscalingConfig

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
#: A dead worker is found, and replaced, within this time; asking one takes milliseconds.
HEALTH_CHECK_SECONDS = 2.0
#: How long a collector of traces may hold up the end of `launch`.
TRACES_SECONDS = 3.0
#: A drain that is over sooner is not worth a line.
TOLD_OF_DRAINING_SECONDS = 1.0


def build(settings: Settings) -> "Application":
    """The bound graph: the prompt-enhancer ingress in front of the image workers.

    Raises SettingsError where the Serve that runs already must not get it, as `check_deployed` tells.
    """
    from ray import serve

    from serve_app.ingress import PromptEnhancerIngress
    from serve_app.worker import ImageWorker

    check_deployed(settings)
    settings = _with_absolute_paths(settings)
    num_gpus = gpus_for_a_worker(settings, _gpus_in_reach)
    worker = serve.deployment(
        ImageWorker,
        name="ImageWorker",
        num_replicas=settings.num_replicas if settings.max_replicas is None else None,
        autoscaling_config=growth(settings),
        # Not None: one that is taken out of the configuration leads back to the settings of the start.
        user_config={},
        max_ongoing_requests=WORKER_ONGOING_REQUESTS + settings.max_batch_size - 1,
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
        num_replicas=settings.num_ingresses,
        user_config={},
        max_ongoing_requests=INGRESS_ONGOING_REQUESTS,
        # Who waits in its queue when it is to end is still served.
        graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_SECONDS,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(worker.bind(settings), settings)


def growth(settings: Settings) -> "AutoscalingConfig | None":
    """How the workers follow the queue; None where their number is fixed.

    Each ingress hands over up to two pictures a worker and one more, so a queue of any length looks like
    2W + 1 to Serve: with a target of one a worker, W grows to 2W + 1 at once, 1 to 3 to 7, while a worker for
    each caller who draws one picture after another is enough. Where requests share passes, up to
    `max_batch_size` a worker are handed over, of which one pass draws all: half of them are the target then,
    and never more than 2, because a queue of pictures that cannot share must make workers grow too.
    """
    if settings.max_replicas is None:
        return None
    from ray.serve.config import AutoscalingConfig

    # What is looked back on is averaged: longer than the delay, it would be the delay.
    look_back = max(1.0, min(10.0, settings.upscale_seconds))
    return AutoscalingConfig(
        min_replicas=settings.min_replicas,
        max_replicas=settings.max_replicas,
        target_ongoing_requests=min(2.0, max(1.0, settings.max_batch_size / 2)),
        upscale_delay_s=settings.upscale_seconds,
        downscale_delay_s=settings.downscale_seconds,
        look_back_period_s=look_back,
        metrics_interval_s=min(look_back, 5.0),
    )


def launch(settings: Settings) -> None:
    """Serve on this machine until Ctrl-C or SIGTERM, then end every process that was started.

    Prints the address once a worker has its model, and starts it again, saying so, where Ray or Serve dies.
    Raises LaunchFailed, with a sentence, where the port is taken, the model cannot be loaded, or the server
    could not be brought back; CheckpointError, before anything is started, for a folder that is no model, a
    LoRA that is none, or a path where there is nothing.
    """
    from serve_app.local_cluster import LaunchFailed
    from serve_app.supervision import GivenUp, NotStarted, Patience, supervise

    # Of the folder that it is called in, modules are found there too where they are here.
    is_on_path = not {"", str(Path.cwd())}.isdisjoint(sys.path)
    command = [sys.executable, *([] if is_on_path else ["-P"]), "-m", "serve_app.supervised"]
    try:
        patience = Patience(finish_seconds=settings.drain_seconds)
        supervise(command, settings, settings.url, _say, patience)
    except KeyboardInterrupt:
        _say("zimage-turbo has stopped")
    except (NotStarted, GivenUp) as error:
        raise LaunchFailed(str(error)) from error


def serve_here(settings: Settings, folder: Path, ready: Callable[[], None]) -> None:
    """Serve in this process until KeyboardInterrupt; `ready` is called once a worker has its model.

    `folder` is for Ray's files, and removed at the end. Raises as `launch` does.
    """
    from serve_app.local_cluster import LocalCluster
    from serve_app.local_engine import read_ahead

    settings = _with_absolute_paths(settings)
    # The workers read the same files seconds later, when Ray is up: then they are in memory, or on their way.
    reading = read_ahead(settings)
    _check_files(settings)
    with LocalCluster(settings, folder) as cluster:
        cluster.run(build, settings)
        reading.stop()
        ready()
        try:
            threading.Event().wait()
        finally:
            _end_gently(settings)


def _end_gently(settings: Settings) -> None:
    """What is under way is drawn to its end before the workers go; KeyboardInterrupt ends that at once.

    Ray ends the ingresses at once, and with them the traces that they have not sent yet: those are sent
    before. A collector that is away holds up the end for TRACES_SECONDS.
    """
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from serve_app.draining import drain_all

    async def asked() -> int:
        # One event loop for both: before HAProxy a handle works in that of its first call, and nowhere else.
        ingresses = serve.get_app_handle(APP_NAME)
        left = await drain_all(ingresses, settings.drain_seconds)
        if settings.otlp_endpoint is not None:
            with contextlib.suppress(TimeoutError):
                sent = ingresses.broadcast("send_traces")
                await sent.results_async(timeout_s=TRACES_SECONDS, return_exceptions=True)
        return left

    told = threading.Timer(
        TOLD_OF_DRAINING_SECONDS,
        _say,
        ["zimage-turbo finishes the pictures that are under way; Ctrl-C once more ends it at once"],
    )
    told.start()
    left = 0
    try:
        with contextlib.suppress(RayServeException):
            left = asyncio.run(asked())
    finally:
        told.cancel()
    if left:
        _say(f"zimage-turbo ends with {left} requests unfinished after {settings.drain_seconds:g} s")


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
    for name in ("c2pa_certificate", "c2pa_key"):
        if (file := getattr(settings, name)) is not None:
            absolute[name] = file.expanduser().resolve()
    absolute["models"] = tuple(
        replace(model, path=_absolute(model.path), base=None if model.base is None else _absolute(model.base))
        for model in settings.models
    )
    if settings.lora_folder is not None:
        absolute["lora_folder"] = settings.lora_folder.resolve()
    absolute["loras"] = tuple(replace(lora, path=lora.path.resolve()) for lora in settings.loras)
    return settings.model_copy(update=absolute)


def _absolute(path_or_id: str) -> str:
    path = Path(path_or_id).expanduser()
    return str(path.resolve()) if path.exists() else path_or_id


def _check_files(settings: Settings) -> None:
    """Raise CheckpointError for files that no worker could load; what a hub has is left to the worker.

    Raises InvalidRequest for a file of keys, or a certificate to sign pictures with, that cannot be used.
    """
    from serve_app.finishing import Finisher
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
    Finisher.of(settings)
    if settings.family is not None:
        family_named(settings.family)
    named = {name: path for name in MODEL_PATHS if (path := getattr(settings, name)) is not None}
    here = {name: path for name, path in named.items() if Path(path).exists() or path.count("/") != 1}
    for path in here.values():
        locate(path)
    check_loras(settings.loras)
    if settings.lora_folder is not None and not settings.lora_folder.is_dir():
        raise InvalidRequest(
            f"setting lora_folder must be a folder with .safetensors files, and there is none at "
            f"{settings.lora_folder}",
            "lora_folder",
        )
    if "model" in here and here == named:
        beside = {name: path for name, path in here.items() if name != "model"}
        ModelLoaderAdapter(here["model"], settings.family, **beside).check()
    for model in settings.models:
        _check_listed(model)


def _check_listed(model: ListedModel) -> None:
    """As `_check_files` for one of the list; the sentence begins with its name."""
    from zimage_engine import ModelLoaderAdapter
    from zimage_engine.errors import CheckpointError
    from zimage_engine.families import family_named
    from zimage_engine.loading.locate import locate

    try:
        if model.family is not None:
            family_named(model.family)
        named = [path for path in (model.path, model.base) if path is not None]
        here = [path for path in named if Path(path).exists() or path.count("/") != 1]
        for path in here:
            locate(path)
        if here == named:
            ModelLoaderAdapter(model.path, model.family, base=model.base).check()
    except CheckpointError as wrong:
        raise type(wrong)(f"setting models, {model.name}: {wrong}") from wrong


def _say(sentence: str) -> None:
    sys.stdout.write(sentence + "\n")
    sys.stdout.flush()
