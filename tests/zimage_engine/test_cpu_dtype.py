from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from zimage_engine import Engine, GenerationRequest, cpu_dtype
from zimage_engine.cpu_dtype import (
    DtypeSpeeds,
    Widths,
    choose_dtype,
    measure_speeds,
    measured_speeds,
    widths_of,
)

GIB = 2**30
NARROW = Widths(16, 32, 8, 8)


def speeds(matmul_gain: float, conv_gain: float) -> DtypeSpeeds:
    return DtypeSpeeds(matmul_gain * 1e-3, 1e-3, conv_gain * 2e-3, 2e-3)


@pytest.mark.parametrize(
    ("matmul_gain", "conv_gain", "available_bytes", "dtype", "said"),
    [
        (0.25, 0.5, 64 * GIB, "bfloat16", "2.8 times as fast as in float32"),
        (1.0, 1.0, 64 * GIB, "bfloat16", "only 1.00 times"),
        (1.2, 1.2, 64 * GIB, "bfloat16", "only 1.20 times as fast in float32"),
        (0.5, 2.4, 64 * GIB, "bfloat16", "only 1.10 times"),
        (1.3, 1.3, 64 * GIB, "float32", "1.3 times as fast in float32"),
        (2.0, 200.0, 64 * GIB, "float32", "20.0 times"),
        (2.0, 200.0, 9 * GIB, "bfloat16", "its weights take 8.0 GiB, and 9.0 GiB of memory are free"),
        (2.0, 200.0, 11 * GIB, "float32", "20.0 times"),
    ],
)
def test_float32_is_taken_where_it_is_clearly_faster_and_fits(
    matmul_gain: float, conv_gain: float, available_bytes: int, dtype: str, said: str
) -> None:
    choice = choose_dtype(speeds(matmul_gain, conv_gain), 8 * GIB, available_bytes)
    assert choice.dtype == dtype
    assert said in choice.because


@pytest.mark.parametrize(
    ("denoiser", "vae", "widths"),
    [
        ([(512, 192)] * 2 + [(192, 192)] * 3 + [(5000,)], [(128, 64, 3, 3)], Widths(192, 512, 64, 128)),
        ([(10240, 3840), (3840, 10240)], [(512, 512, 3, 3)], Widths(1024, 1024, 128, 128)),
        ([(8, 4)], [], Widths(4, 8, 128, 128)),
        ([], [(4, 8, 1, 1)], Widths(1024, 1024, 8, 4)),
    ],
)
def test_what_is_tried_has_the_widths_of_the_model(
    denoiser: list[tuple[int, ...]], vae: list[tuple[int, ...]], widths: Widths
) -> None:
    assert widths_of(denoiser, vae) == widths
    assert widths_of(denoiser[::-1], vae[::-1]) == widths


def test_a_processor_is_measured_in_both_dtypes() -> None:
    began = time.perf_counter()
    found = measure_speeds(NARROW)
    assert all(0 < seconds <= time.perf_counter() - began for seconds in asdict(found).values())


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    first = measured_speeds(NARROW, tmp_path / "processors")
    assert measured_speeds(NARROW, tmp_path / "processors") == first
    assert len(list((tmp_path / "processors").iterdir())) == 1
    measured_speeds(replace(NARROW, conv_in=4), tmp_path / "processors")
    assert len(list((tmp_path / "processors").iterdir())) == 2


@pytest.mark.parametrize(
    "note",
    [
        "",
        "[]",
        "{}",
        '{"gain": 2}',
        '{"matmul_bfloat16": 0}',
        json.dumps(dict.fromkeys(asdict(speeds(1, 1)), 0)),
    ],
)
def test_a_note_that_says_nothing_is_made_anew(tmp_path: Path, note: str) -> None:
    measured_speeds(NARROW, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(note)
    found = measured_speeds(NARROW, tmp_path)
    assert found.gain > 0
    assert json.loads(file.read_text()) == asdict(found)


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert measured_speeds(NARROW, tmp_path / "file" / "processors").gain > 0


@pytest.mark.parametrize(("gain", "dtype"), [(0.5, "bfloat16"), (4.0, "float32")])
def test_an_engine_loads_in_what_was_measured_to_be_faster(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gain: float, dtype: str
) -> None:
    """The measured figures are given: which of them this machine would have is its own affair."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_dtype, "measure_speeds", lambda widths: speeds(gain, gain))
    engine = Engine.load(tiny_model, "cpu", dtype="auto")
    assert engine.description.dtype == dtype
    assert f"{engine.pipeline.transformer.dtype}" == f"torch.{dtype}"
    assert "times as fast" in engine.description.dtype_because
    report = engine.generate(GenerationRequest(prompt="a red circle", num_inference_steps=1, seed=1)).report
    assert (report.dtype, report.dtype_because) == (dtype, engine.description.dtype_because)
    assert json.loads(json.dumps(report.to_dict()))["dtype_because"]


def test_without_auto_nothing_is_measured(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(widths: Widths) -> DtypeSpeeds:
        raise AssertionError(widths)

    monkeypatch.setattr(cpu_dtype, "measure_speeds", refuse)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"architecture": "x86_64", "avx512_bf16": True})
    engine = Engine.load(tiny_model, "cpu")
    assert (engine.description.dtype, engine.description.dtype_because) == ("bfloat16", "")


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"architecture": "x86_64", "avx2": True}, "float32"),
        ({"architecture": "x86_64", "avx512_bf16": True}, "bfloat16"),
        ({"architecture": "x86_64", "amx_bf16": True}, "bfloat16"),
        ({"architecture": "aarch64"}, "bfloat16"),
    ],
)
def test_without_instructions_for_bfloat16_it_is_auto_unless_told(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capabilities: dict[str, object],
    dtype: str,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    monkeypatch.setattr(cpu_dtype, "measure_speeds", lambda widths: speeds(9.0, 9.0))
    assert Engine.load(tiny_model, "cpu").description.dtype == dtype
    assert Engine.load(tiny_model, "cpu", dtype="bfloat16").description.dtype == "bfloat16"
