"""What may import what: the layers, and processes that must not carry torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: The ingress and whoever only starts the server: each is imported in an interpreter of its own.
WITHOUT_TORCH = (
    "serve_app",
    "serve_app.app",
    "serve_app.cli",
    "serve_app.ingress",
    "serve_app.local_cluster",
    "serve_app.service",
    "serve_app.ui",
    "serve_app.worker",
    "zimage_engine",
    "zimage_engine.errors",
    "zimage_engine.prompts.enhancer",
    "zimage_engine.sampling.plan",
    "zimage_engine.types",
)
HEAVY = ("torch", "diffusers", "transformers")


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_importing_it_brings_no_torch(module: str) -> None:
    program = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (ran.stdout.strip(), ran.returncode) == ("[]", 0), ran.stderr


def test_the_builders_come_from_the_package_and_bind_without_torch() -> None:
    program = (
        "import sys, serve_app\n"
        "from ray.serve import Application\n"
        "assert isinstance(serve_app.app, Application), type(serve_app.app)\n"
        "assert isinstance(serve_app.app, Application), 'the second look found something else'\n"
        "assert serve_app.build(serve_app.settings.Settings(port=7999)) is not None\n"
        "from serve_app.app import launch\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (ran.stdout.strip(), ran.returncode) == ("[]", 0), ran.stderr


def test_the_layers_hold() -> None:
    linter = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    assert linter is not None, "import-linter is not installed; pip install '.[test]'"
    ran = subprocess.run([linter, "--no-cache"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
