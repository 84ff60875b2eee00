"""The graph that every way to start binds."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.app import build, gpus_for_a_worker
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
