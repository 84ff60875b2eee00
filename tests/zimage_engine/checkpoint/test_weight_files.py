"""Real tiny files of every form, and what is read from their headers."""

from collections import OrderedDict
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from zimage_engine.checkpoint.gguf_header import GGML_TYPES, read_gguf_header
from zimage_engine.checkpoint.weight_files import read_weight_file

TORCH_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint16: "U16",
    torch.bool: "BOOL",
}


def every_dtype() -> dict[str, torch.Tensor]:
    return {word: torch.zeros(2, 3).to(dtype) for dtype, word in TORCH_DTYPES.items()}


def write_gguf(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "lumina2")
    writer.add_array("tokenizer.ggml.tokens", [f"word{index}" for index in range(50)])
    writer.add_array("comfy.gguf.orig_shape.flat", [2, 2, 16])
    writer.add_string("tokenizer.chat_template", "x" * 5000)
    writer.add_tensor("plain", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("half", np.ones((4, 2), dtype=np.float16))
    writer.add_tensor("flat", np.ones((1, 64), dtype=np.float32))
    blocks = gguf.quantize(
        np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64), gguf.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("quantised", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def listed(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    file = read_weight_file(path)
    assert file.damage == ""
    return {tensor.name: (tensor.dtype, tensor.shape) for tensor in file.tensors}


@pytest.mark.parametrize(
    ("form", "write"),
    [
        ("safetensors", save_file),
        ("bin", torch.save),
        ("bin", lambda weights, path: torch.save(weights, path, _use_new_zipfile_serialization=False)),
    ],
)
def test_every_dtype_is_listed_under_the_safetensors_word(tmp_path: Path, form: str, write) -> None:
    path = tmp_path / "of_no_telling_name"
    write(every_dtype(), path)
    assert listed(path) == {word: (word, (2, 3)) for word in TORCH_DTYPES.values()}
    assert read_weight_file(path).form == form


@pytest.mark.parametrize("zipped", [True, False])
def test_nested_tables_of_a_pickle_are_joined_with_dots(tmp_path: Path, zipped: bool) -> None:
    shared = torch.zeros(6)
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    content = {
        "state_dict": module.state_dict(),  # an OrderedDict with the attribute _metadata
        "ema": OrderedDict(
            module={"x": torch.nn.Parameter(torch.zeros(4)), "part": shared[2:4], "all": shared}
        ),
        "turned": torch.zeros(2, 3).t(),
        "epoch": 3,
        "rate": 1e-4,
        "note": "text",
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "steps": {1, 2},
        "optimizer": [{"step": torch.zeros(1)}, (None, True, b"bytes")],
        7: torch.zeros(1),
    }
    path = tmp_path / "model.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert listed(path) == {
        "state_dict.0.weight": ("F32", (3, 2)),
        "state_dict.0.bias": ("F32", (3,)),
        "state_dict.1.weight": ("F32", (3,)),
        "state_dict.1.bias": ("F32", (3,)),
        "state_dict.1.running_mean": ("F32", (3,)),
        "state_dict.1.running_var": ("F32", (3,)),
        "state_dict.1.num_batches_tracked": ("I64", ()),
        "ema.module.x": ("F32", (4,)),
        "ema.module.part": ("F32", (2,)),
        "ema.module.all": ("F32", (6,)),
        "turned": ("F32", (3, 2)),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "model.pt"
    torch.save({"x": torch.zeros(2, 3)}, path, pickle_protocol=protocol)
    assert listed(path) == {"x": ("F32", (2, 3))}


def test_gguf_is_listed_in_torchs_order_with_its_architecture(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.safetensors")  # the name lies, the content counts
    assert listed(path) == {
        "plain": ("F32", (2, 3)),
        "half": ("F16", (4, 2)),
        "flat": ("F32", (2, 2, 16)),
        "quantised": ("GGUF:Q8_0", (2, 64)),
    }
    assert read_weight_file(path).form == "gguf"
    assert read_gguf_header(path).architecture == "lumina2"


def test_the_table_of_ggml_types_is_the_librarys() -> None:
    # Q8_1 is left out: it never stands in a file, and the library gives it another size than ggml.
    for number, ours in GGML_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (ours.name, (ours.elements_per_block, ours.bytes_per_block)) == (
            kind.name,
            gguf.GGML_QUANT_SIZES[kind],
        )


@pytest.mark.parametrize(
    ("name", "variant", "is_shard"),
    [
        ("model.safetensors", "", False),
        ("diffusion_pytorch_model.fp16.safetensors", "fp16", False),
        ("diffusion_pytorch_model-00001-of-00003.safetensors", "", True),
        ("model.fp16-00001-of-00002.safetensors", "fp16", True),
        ("unet/model-00001-of-00002.fp16.safetensors", "fp16", True),
        ("dreamshaper.v8.safetensors", "", False),
        ("split-00002-of-00004.gguf", "", True),
    ],
)
def test_variant_and_shard_are_told_from_the_name(
    tmp_path: Path, name: str, variant: str, is_shard: bool
) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x")
    file = read_weight_file(tmp_path / "x", name)
    assert (file.name, file.variant, file.is_shard, file.damage) == (name, variant, is_shard, "")


@pytest.mark.parametrize(
    ("content", "clause"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a git-lfs pointer"),
        (b"\n\n<!DOCTYPE html><html>sign in</html>", "is a web page"),
        (b"<html>moved</html>", "is a web page"),
        (b"\x00" * 100, "is neither safetensors, nor torch's, nor GGUF"),
        (b"GGUF", "header is cut off"),
        (b"GGUF\x01\x00\x00\x00" + b"\x00" * 16, "is GGUF of version 1"),
        (b"PK\x03\x04", "with the table of contents, is cut off"),
        (b"\x80\x02N.", "do not fit together"),
        (b"\x80\x02\x8a\x01\x05.\x80\x02N.\x80\x02N.", "not one that torch.save wrote"),
    ],
)
def test_what_is_no_file_of_weights_is_named(tmp_path: Path, content: bytes, clause: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    file = read_weight_file(path)
    assert clause in file.damage
    assert file.tensors == ()


def test_a_file_that_cannot_be_read_is_a_clause_too(tmp_path: Path) -> None:
    (tmp_path / "broken_link").symlink_to(tmp_path / "gone")
    assert "cannot be read (No such file" in read_weight_file(tmp_path / "broken_link").damage
    assert "cannot be read (Is a directory" in read_weight_file(tmp_path).damage


def test_no_weights_are_read(tmp_path: Path) -> None:
    """A sparse file of 40 GB is listed from its header."""
    path = tmp_path / "model.safetensors"
    header = b'{"x":{"dtype":"F32","shape":[10000000000],"data_offsets":[0,40000000000]}}'
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 40_000_000_000)
    assert listed(path) == {"x": ("F32", (10_000_000_000,))}
