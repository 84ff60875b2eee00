"""The manifests as `kubectl kustomize` builds them, and what is in them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
KUSTOMIZATIONS = ROOT / "k8s"
OVERLAYS = tuple(sorted(folder.name for folder in (KUSTOMIZATIONS / "overlays").iterdir()))
EXAMPLES = tuple(sorted((KUSTOMIZATIONS / "examples").glob("*.yaml")))
#: `patches` and `components` are read since kustomize 4; kubectl has it since 1.21.
OLDEST_KUBECTL = (1, 21)

Manifest = dict[str, Any]


def usable_kubectl() -> str | None:
    """A kubectl whose kustomize reads our files; None where there is none."""
    found = shutil.which("kubectl")
    if found is None:
        return None
    told = subprocess.run([found, "version", "--client"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"v(\d+)\.(\d+)", told)
    return found if version and (int(version[1]), int(version[2])) >= OLDEST_KUBECTL else None


@cache
def built(overlay: str) -> tuple[Manifest, ...]:
    """Every object of an overlay; raises RuntimeError with kubectl's own words."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUSTOMIZATIONS / "overlays" / overlay)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or done.stderr:
        raise RuntimeError(f"kubectl kustomize {overlay}: {done.stderr}")
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(overlay: str, kind: str) -> list[Manifest]:
    return [manifest for manifest in built(overlay) if manifest["kind"] == kind]


def ray_service(overlay: str) -> Manifest:
    (service,) = of_kind(overlay, "RayService")
    return service


def ray_cluster(overlay: str) -> Manifest:
    cluster: Manifest = ray_service(overlay)["spec"]["rayClusterConfig"]
    return cluster


def serve_config(overlay: str) -> Manifest:
    config: Manifest = yaml.safe_load(ray_service(overlay)["spec"]["serveConfigV2"])
    return config


def pod_templates(overlay: str) -> Iterator[tuple[str, Manifest]]:
    """Each pod that the overlay makes, as a name and a template."""
    cluster = ray_cluster(overlay)
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]
    for manifest in built(overlay):
        if manifest["kind"] in ("Deployment", "StatefulSet", "DaemonSet", "Job"):
            yield manifest["metadata"]["name"], manifest["spec"]["template"]


def containers(template: Manifest) -> list[Manifest]:
    return [*template["spec"].get("initContainers", ()), *template["spec"]["containers"]]
