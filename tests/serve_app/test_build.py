"""The graph that every way to start binds."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.autoscaling_policy import default_autoscaling_policy
from ray.serve.config import AutoscalingContext

from serve_app.app import build, gpus_for_a_worker, growth
from serve_app.queueing import FairQueue, Sharing
from serve_app.settings import load_settings
from zimage_engine.loading.lora_weight import LoraWeight


@pytest.mark.parametrize(
    ("chosen", "there", "reserved"),
    [
        ({}, 0, 0),
        ({}, 1, 1),
        ({}, 8, 1),
        ({"device": "cuda"}, 1, 1),
        ({"device": "cuda:1"}, 2, 1),
        ({"device": "cpu"}, 1, 0),
        ({"device": "mps"}, 1, 0),
        ({"num_gpus": 0.5}, 0, 0.5),
        ({"num_gpus": 0}, 4, 0),
    ],
)
def test_a_worker_takes_a_gpu_where_there_is_one(
    chosen: dict[str, object], there: int, reserved: float
) -> None:
    assert gpus_for_a_worker(load_settings(**chosen), lambda: there) == reserved


def test_the_settings_reach_serve_as_its_options(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_model.parent)
    settings = load_settings(
        model=tiny_model.name,
        vae=f"{tiny_model.name}/vae",
        loras=["style.safetensors=0.8"],
        num_gpus=1,
        num_replicas=3,
        max_queued_requests=7,
        worker_cpus=2,
    )
    ingress = build(settings)._bound_deployment
    worker = ingress.init_args[0]._bound_deployment
    assert (worker.num_replicas, worker.max_queued_requests) == (3, -1), "the queue is in the ingress"
    assert worker.max_ongoing_requests > 1, "one slot idles the device between two pictures"
    options = worker.ray_actor_options
    assert (options["num_cpus"], options["num_gpus"]) == (2, 1)
    assert options["runtime_env"]["env_vars"] == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    chosen = worker.init_args[0]
    assert chosen.model == str(tiny_model), "the worker runs in another directory"
    assert chosen.vae == str(tiny_model / "vae")
    assert chosen.loras == (LoraWeight(tiny_model.parent / "style.safetensors", 0.8),)
    assert ingress.ray_actor_options["num_cpus"] == 0
    assert ingress.max_ongoing_requests >= 200, "each open page holds a stream of events"


def test_workers_that_follow_the_queue_and_several_ingresses_reach_serve_too() -> None:
    ingress = build(load_settings(max_replicas=5, min_replicas=2, upscale_seconds=4))._bound_deployment
    worker = ingress.init_args[0]._bound_deployment
    scaling = worker._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.upscale_delay_s) == (2, 5, 4)
    assert (ingress.user_config, worker.user_config) == ({}, {}), "taken out of the file, it leads back here"
    assert build(load_settings(num_ingresses=2))._bound_deployment.num_replicas == 2


@pytest.mark.parametrize("workers", [1, 3, 7])
def test_a_long_queue_more_than_doubles_the_workers(workers: int) -> None:
    """By Serve's own policy, on what the ingress hands over when all wait."""
    assert wanted_workers(workers, None) == 2 * workers + 1


@pytest.mark.parametrize("workers", [1, 3, 7])
def test_where_requests_share_passes_workers_grow_by_half_of_what_one_draws(workers: int) -> None:
    assert wanted_workers(workers, Sharing("small", 2), max_batch_size=2) == 2 * workers + 1
    # Serve rounds up.
    assert wanted_workers(workers, Sharing("small", 4), max_batch_size=4) == pytest.approx(2 * workers + 0.5)
    # What cannot share calls for more of them too.
    assert wanted_workers(workers, None, max_batch_size=8) == pytest.approx(workers + 0.5)


def wanted_workers(workers: int, sharing: Sharing | None, **settings: int) -> float:
    """By Serve's own policy, so many workers when sixty wait at one ingress."""
    queue = FairQueue(places=100)
    queue.set_workers(workers)
    for _ in range(60):
        queue.enter("a", 1.0, 1, sharing)
    scaling = growth(load_settings(max_replicas=50, upscale_seconds=0, **settings))
    assert scaling is not None
    context = AutoscalingContext(
        deployment_id=DeploymentID("ImageWorker"),
        deployment_name="ImageWorker",
        app_name=None,
        current_num_replicas=workers,
        target_num_replicas=workers,
        running_replicas=[],
        total_num_requests=queue.admitted,
        total_queued_requests=0,
        aggregated_metrics=None,
        raw_metrics=None,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=50,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=scaling,
    )
    wanted, _ = default_autoscaling_policy(context)
    return float(wanted)
