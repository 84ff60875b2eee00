"""Tensors read one by one out of real tiny files are the ones that were written."""

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from zimage_engine.checkpoint.weight_files import read_weight_file
from zimage_engine.errors import CheckpointDamaged
from zimage_engine.loading.tensor_files import TensorFiles

WEIGHTS = {
    "x": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "y": torch.arange(4, dtype=torch.bfloat16),
    "z": torch.arange(4, dtype=torch.float32).to(torch.float8_e4m3fn),
    "nothing": torch.zeros(0, 3),
}


def write_legacy(weights: dict, path: Path) -> None:
    torch.save(weights, path, _use_new_zipfile_serialization=False)


def write_gguf(path: Path, tensors: dict[str, np.ndarray], kind: gguf.GGMLQuantizationType) -> None:
    writer = gguf.GGUFWriter(path, "lumina2")
    for name, tensor in tensors.items():
        writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("write", [save_file, torch.save, write_legacy])
def test_each_listed_tensor_is_read_as_it_was_written(tmp_path: Path, write) -> None:
    # torch itself cannot read fp8 in the old form back.
    weights = {name: WEIGHTS[name] for name in WEIGHTS if (write, name) != (write_legacy, "z")}
    write(weights, tmp_path / "w")
    source = read_weight_file(tmp_path / "w")
    assert {tensor.name for tensor in source.tensors} == set(weights)
    with TensorFiles([source]) as files:
        read = {name: files.read(name) for name in weights}
    for name, tensor in weights.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].device.type == "cpu"
        assert read[name].float().tolist() == tensor.float().tolist()
        assert read[name].shape == tensor.shape


def test_what_torch_cannot_read_back_is_a_sentence(tmp_path: Path) -> None:
    write_legacy({"z": WEIGHTS["z"]}, tmp_path / "w")
    with pytest.raises(CheckpointDamaged, match=r"^w is not what torch can read as weights alone"):
        TensorFiles([read_weight_file(tmp_path / "w")]).read("z")


@pytest.mark.parametrize("write", [torch.save, write_legacy])
def test_a_nested_name_is_resolved_as_it_was_listed(tmp_path: Path, write) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    write({"state_dict": {"a.b": parameter, "c": {"d": torch.zeros(2)}}, "epoch": 1}, tmp_path / "w")
    source = read_weight_file(tmp_path / "w")
    with TensorFiles([source]) as files:
        read = {tensor.name: files.read(tensor.name) for tensor in source.tensors}
    assert read["state_dict.a.b"].tolist() == [1, 1, 1]
    assert not read["state_dict.a.b"].requires_grad
    assert read["state_dict.c.d"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [("F32", 0), ("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 1e-2), ("Q4_0", 0.15), ("Q5_1", 0.05)],
)
def test_gguf_is_expanded(tmp_path: Path, kind: str, tolerance: float) -> None:
    written = np.linspace(-1, 1, 3 * 64, dtype=np.float32).reshape(3, 64)
    write_gguf(tmp_path / "w", {"a": written, "b": written[:1]}, gguf.GGMLQuantizationType[kind])
    with TensorFiles([read_weight_file(tmp_path / "w")]) as files:
        read, small = files.read("a"), files.read("b")
    assert (read.shape, small.shape) == ((3, 64), (1, 64))
    assert read.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert (read.float() - torch.from_numpy(written)).abs().max() <= tolerance


def test_names_are_found_across_files(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "one")
    torch.save({"b": torch.ones(1)}, tmp_path / "two")
    with TensorFiles(map(read_weight_file, (tmp_path / "one", tmp_path / "two"))) as files:
        assert (files.read("a").item(), files.read("b").item()) == (0, 1)
        with pytest.raises(
            CheckpointDamaged, match=r"expected the tensor c in one file, found it in no file"
        ):
            files.read("c")


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"a": torch.zeros(1)}, tmp_path / name)
    files = TensorFiles(map(read_weight_file, (tmp_path / "one", tmp_path / "two")))
    with pytest.raises(CheckpointDamaged, match=r"found it in one and two"):
        files.read("a")


@pytest.mark.parametrize("write", [save_file, torch.save])
def test_closing_lets_go_of_the_file(tmp_path: Path, write) -> None:
    path = tmp_path / "weights_of_this_test"
    write({"a": torch.zeros(100_000)}, path)
    with TensorFiles([read_weight_file(path)]) as files:
        assert files.read("a").sum() == 0
        assert path.name in mapped_or_open()
    assert path.name not in mapped_or_open()
    assert files.read("a").sum() == 0  # opened anew
    files.close()


def mapped_or_open() -> str:
    if not Path("/proc/self/maps").exists():
        pytest.skip("only Linux tells which files a process holds")
    descriptors = Path("/proc/self/fd")
    opened = [str(link.readlink()) for link in descriptors.iterdir() if link.is_symlink()]
    return Path("/proc/self/maps").read_text() + "\n".join(opened)


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("write", [torch.save, write_legacy])
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, write) -> None:
    marker, path = tmp_path / "it_ran", tmp_path / "model.bin"
    write({"a": torch.zeros(1), "b": Evil(marker)}, path)
    with pytest.raises(CheckpointDamaged, match=r"would run code: it asks for os\.system; refused"):
        TensorFiles([read_weight_file(path)])
    assert not marker.exists()


@pytest.mark.parametrize("write", [torch.save, write_legacy])
def test_a_pickle_that_became_evil_after_it_was_listed_is_refused_too(tmp_path: Path, write) -> None:
    marker, path = tmp_path / "it_ran", tmp_path / "model.bin"
    write({"a": torch.zeros(1)}, path)
    files = TensorFiles([read_weight_file(path)])
    write({"a": torch.zeros(1), "b": Evil(marker)}, path)
    with pytest.raises(CheckpointDamaged, match=r"would run code: it asks for os\.system; refused") as caught:
        files.read("a")
    assert len(str(caught.value).splitlines()) == 1
    assert not marker.exists()


@pytest.mark.parametrize("write", [save_file, torch.save])
def test_a_file_cut_off_after_it_was_listed_is_a_sentence(tmp_path: Path, write) -> None:
    path = tmp_path / "w"
    write({"a": torch.zeros(1000)}, path)
    files = TensorFiles([read_weight_file(path)])
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(CheckpointDamaged, match=r"^w "):
        files.read("a")
