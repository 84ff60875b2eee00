"""JSON files of a checkpoint with bytes or values changed at random: an explanation or a typed error."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoints.damages import shards_without_index
from zimage_engine import ModelLoaderAdapter
from zimage_engine.errors import CheckpointError

MODELS = ("z-image", "sdxl", "pixart-sigma")
STRANGE: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers(-5, 2**40), max_size=4),
    st.lists(st.none() | st.text(max_size=5), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)
QUICK = settings(
    max_examples=250,
    # Wall time says nothing on a busy machine: `_explained` bounds the time on the processor.
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def _json_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.json") if "tokenizer" not in path.parent.name)


#: Some hundred times what an explanation of these models takes.
MAX_CPU_SECONDS = 5.0


def _explained(folder: Path) -> None:
    started = time.process_time()
    try:
        assert ModelLoaderAdapter(folder).explain()
    except CheckpointError as error:
        assert 10 < len(str(error)) < 5000
    assert time.process_time() - started < MAX_CPU_SECONDS


@pytest.mark.parametrize("model", MODELS)
@QUICK
@given(chosen=st.integers(0, 99), key=st.integers(0, 99), value=STRANGE)
def test_a_strange_value_in_a_settings_file(healthy, model: str, chosen: int, key: int, value: Any) -> None:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(shutil.copytree(healthy(model)[0], Path(work) / "model"))
        files = _json_files(folder)
        path = files[chosen % len(files)]
        content = json.loads(path.read_text(encoding="utf-8"))
        content[sorted(content)[key % len(content)]] = value
        path.write_text(json.dumps(content), encoding="utf-8")
        _explained(folder)


@QUICK
@given(
    chosen=st.integers(0, 99),
    at=st.integers(0, 10**6),
    cut=st.integers(0, 30),
    insert=st.binary(max_size=10),
)
def test_changed_bytes_in_a_settings_or_index_file(
    healthy, chosen: int, at: int, cut: int, insert: bytes
) -> None:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(shutil.copytree(healthy("z-image")[0], Path(work) / "model"))
        shards_without_index(folder)
        place = folder / "transformer"
        names = {"x_pad_token": "diffusion_pytorch_model-00001-of-00002.safetensors"}
        index = place / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": names}), encoding="utf-8")
        files = _json_files(folder)
        path = files[chosen % len(files)]
        content = path.read_bytes()
        start = at % (len(content) + 1)
        path.write_bytes(content[:start] + insert + content[start + cut :])
        _explained(folder)
