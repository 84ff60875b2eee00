"""Weights stored in the dtype that is computed in stay in their files; the kernel can have that memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WEIGHT_BYTES = 200_000_000
SMAPS = Path("/proc/self/smaps_rollup")
LOAD = """
import json, sys
from pathlib import Path
from zimage_engine import Engine
def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("Anonymous:")))
Engine.load(sys.argv[1], "cpu", dtype=sys.argv[3])  # imports, kernels, thread pools
before = anonymous()
engine = Engine.load(sys.argv[2], "cpu", dtype=sys.argv[3])
modules = [each for each in engine.pipeline.components.values() if hasattr(each, "parameters")]
weights = sum(each.numel() * each.element_size() for module in modules for each in module.parameters())
print(json.dumps({"grown": anonymous() - before, "weights": weights}))
"""


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.benchmarks.big_checkpoints import write_z_image_folder

    return write_z_image_folder(tmp_path_factory.mktemp("large"), WEIGHT_BYTES, "bfloat16")


@pytest.mark.skipif(not SMAPS.exists(), reason="only Linux tells what of a process's memory has no file")
@pytest.mark.parametrize(
    ("dtype", "least", "most"),
    [
        pytest.param("bfloat16", 0.0, 0.3, id="as stored: mapped"),
        # The other way round shows that the figure tells a copy from a mapping.
        pytest.param("float32", 0.9, 1.3, id="cast: a copy"),
    ],
)
def test_weights_stay_mapped_where_nothing_must_be_cast(
    large_model: Path, tiny_model: Path, dtype: str, least: float, most: float
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tiny_model), str(large_model), dtype],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights"] > 0.9 * WEIGHT_BYTES
    assert least <= found["grown"] / found["weights"] <= most
