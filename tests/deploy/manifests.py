"""The manifests as kustomize builds them, alone or in kubectl, and what is in them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
KUSTOMIZATIONS = ROOT / "k8s"
OVERLAYS = tuple(sorted(folder.name for folder in (KUSTOMIZATIONS / "overlays").iterdir()))
EXAMPLES = tuple(sorted((KUSTOMIZATIONS / "examples").glob("*.yaml")))
#: Command, how it tells its version, how it builds a folder, and its oldest that reads `components` and
#: `patches` together: both since kustomize 4, which kubectl has since 1.21.
KUSTOMIZERS = (
    ("kubectl", ("version", "--client"), "kustomize", (1, 21)),
    ("kustomize", ("version",), "build", (4, 0)),
)
NO_KUSTOMIZER = (
    "needs kubectl from 1.21 on or kustomize from 4 on; Debian bookworm's kubernetes-client is 1.20"
)

Manifest = dict[str, Any]


@cache
def kustomizer() -> tuple[str, ...] | None:
    """The command that builds our files on this machine, without the folder; None where there is none."""
    for program, version_of, build, oldest in KUSTOMIZERS:
        if shutil.which(program) is None:
            continue
        told = subprocess.run([program, *version_of], capture_output=True, text=True, check=False).stdout
        version = re.search(r"v(\d+)\.(\d+)", told)
        if version and (int(version[1]), int(version[2])) >= oldest:
            return program, build
    return None


@cache
def built(overlay: str) -> tuple[Manifest, ...]:
    """Every object of an overlay; raises RuntimeError with kustomize's own words.

    Where nothing here can build it, the test is skipped, in CI it fails.
    """
    command = kustomizer()
    if command is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(NO_KUSTOMIZER)
    done = subprocess.run(
        [*command, str(KUSTOMIZATIONS / "overlays" / overlay)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or done.stderr:
        raise RuntimeError(f"{' '.join(command)} {overlay}: {done.stderr}")
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
