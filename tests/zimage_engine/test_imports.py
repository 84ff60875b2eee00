"""A fresh interpreter can use the light parts of the engine without the heavy libraries."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers")
LIGHT_STATEMENTS = (
    "import zimage_engine",
    "from zimage_engine import GenerationRequest",
    "from zimage_engine import ModelLoaderAdapter",
    "import zimage_engine.types",
    "import zimage_engine.errors",
    "import zimage_engine.prompts",
    "import zimage_engine.prompts.enhancer",
    "import zimage_engine.prompts.tokens",
    "import zimage_engine.checkpoint.features",
    "import zimage_engine.families",
    "from zimage_engine import LoraWeight",
    "import zimage_engine.loading.adapter",
    "import zimage_engine.loading.lora_description",
    "import zimage_engine.sampling.plan",
    "import zimage_engine.quality",
)


@pytest.mark.parametrize("statement", LIGHT_STATEMENTS)
def test_light_modules_import_no_torch(statement: str) -> None:
    program = f"{statement}\nimport sys\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_engine_itself_does_import_torch() -> None:
    program = (
        f"from zimage_engine import Engine\nimport sys\nprint([n for n in {HEAVY!r} if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "torch" in done.stdout, done.stderr


def test_every_public_name_resolves() -> None:
    import zimage_engine

    assert {name for name in zimage_engine.__all__ if getattr(zimage_engine, name, None) is None} == set()
    assert set(zimage_engine.__all__) <= set(dir(zimage_engine))


def test_an_unknown_name_is_an_attribute_error() -> None:
    import zimage_engine

    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = zimage_engine.Motor
