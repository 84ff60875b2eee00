"""Reads single tensors out of files of weights, in whichever form they are; knows no model and no layout.

Nothing is opened before a tensor of it is asked for, and no file is read as a whole, except torch's form from
before 1.6, which cannot be read otherwise.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from zimage_engine.checkpoint.file_damage import FileDamage
from zimage_engine.checkpoint.gguf_header import GGML_TYPES, GgufTensor, read_gguf_header
from zimage_engine.checkpoint.tensors import WeightFile
from zimage_engine.checkpoint.torch_pickle import walk_names
from zimage_engine.checkpoint.weight_files import read_weight_file
from zimage_engine.errors import CheckpointDamaged, CheckpointError


class TensorFiles:
    """The tensors of `sources` by stored name; a context manager that lets go of the files at its end.

    Raises CheckpointDamaged for a source with damage.
    """

    def __init__(self, sources: Iterable[WeightFile]) -> None:
        self._sources: dict[str, list[WeightFile]] = defaultdict(list)
        self._open_files: dict[Path, _OpenFile] = {}
        for source in sources:
            if source.damage:
                raise CheckpointDamaged(f"{source.name} {source.damage}")
            for tensor in source.tensors:
                self._sources[tensor.name].append(source)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self, stored_name: str) -> torch.Tensor:
        """The tensor on the CPU in its stored dtype and shape; a quantised GGUF one in float32.

        It may be a view of the mapped file: it stays good after `close`, and is not to be changed in place.
        Raises CheckpointDamaged where no file has the name, more than one has, or its file cannot be read.
        """
        holders = self._sources.get(stored_name, ())
        if len(holders) != 1:
            where = " and ".join(source.name for source in holders) or "no file"
            raise CheckpointDamaged(f"expected the tensor {stored_name} in one file, found it in {where}")
        (source,) = holders
        try:
            if source.path not in self._open_files:
                self._open_files[source.path] = _OPENERS[source.form](source)
            return self._open_files[source.path].read(stored_name)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointDamaged(
                f"{source.name} changed or cannot be read any more, at the tensor {stored_name} ({error})"
            ) from error

    def close(self) -> None:
        """Let go of the files; a later `read` opens them anew."""
        for open_file in self._open_files.values():
            open_file.close()
        self._open_files.clear()


class _OpenFile(Protocol):
    def read(self, stored_name: str) -> torch.Tensor: ...

    def close(self) -> None: ...


class _SafetensorsFile:
    def __init__(self, source: WeightFile) -> None:
        self._file = safe_open(source.path, framework="pt", device="cpu")
        self._file.__enter__()

    def read(self, stored_name: str) -> torch.Tensor:
        return self._file.get_tensor(stored_name)

    def close(self) -> None:
        self._file.__exit__(None, None, None)


#: torch.load has no error of its own: a malformed file, or an fp8 one of the old form, ends in any of these.
_TORCH_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    AttributeError,
    AssertionError,
    TypeError,
    KeyError,
    ValueError,
)


class _TorchFile:
    def __init__(self, source: WeightFile) -> None:
        with source.path.open("rb") as file:
            is_archive = file.read(2) == b"PK"
        try:
            top = torch.load(source.path, map_location="cpu", mmap=is_archive, weights_only=True)
            self._tensors: Mapping[str, torch.Tensor] = dict(walk_names(top, torch.is_tensor))
        except (*_TORCH_ERRORS, FileDamage) as error:
            # Ours names the global that it asks for; torch's message is a page of advice to switch this off.
            damage = read_weight_file(source.path).damage or "is not what torch can read as weights alone"
            raise CheckpointDamaged(f"{source.name} {damage}") from error

    def read(self, stored_name: str) -> torch.Tensor:
        return self._tensors[stored_name].detach()

    def close(self) -> None:
        self._tensors = {}


class _GgufFile:
    def __init__(self, source: WeightFile) -> None:
        header = read_gguf_header(source.path)
        if header.damage:
            raise CheckpointDamaged(f"{source.name} {header.damage}")
        self._tensors = {tensor.name: tensor for tensor in header.tensors}
        self._file = source.path.open("rb")

    def read(self, stored_name: str) -> torch.Tensor:
        tensor = self._tensors[stored_name]
        self._file.seek(tensor.start)
        stored = bytearray(self._file.read(tensor.size_bytes))
        if len(stored) != tensor.size_bytes:
            raise ValueError("the file has become shorter")
        dtype = _PLAIN_DTYPES.get(GGML_TYPES[tensor.kind].name)
        if dtype is None:
            return _dequantise(stored, tensor)
        if not stored:
            return torch.empty(tensor.shape, dtype=dtype)
        return torch.frombuffer(stored, dtype=dtype).reshape(tensor.shape)

    def close(self) -> None:
        self._file.close()


def _dequantise(stored: bytearray, tensor: GgufTensor) -> torch.Tensor:
    try:
        import gguf  # only files of this form need it
    except ImportError as error:
        raise CheckpointError(
            "GGUF weights need the package gguf, which is not there: pip install gguf"
        ) from error
    blocks = np.frombuffer(stored, dtype=np.uint8).reshape(-1, GGML_TYPES[tensor.kind].bytes_per_block)
    try:
        values = gguf.dequantize(blocks, gguf.GGMLQuantizationType(tensor.kind))
    except NotImplementedError as error:
        raise CheckpointError(
            f"the tensor {tensor.name} is of the GGUF type {GGML_TYPES[tensor.kind].name}, "
            "which the package gguf cannot expand; use a file of another type, such as Q8_0"
        ) from error
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).reshape(tensor.shape)


_PLAIN_DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
_OPENERS: Mapping[str, Callable[[WeightFile], Any]] = {
    "safetensors": _SafetensorsFile,
    "bin": _TorchFile,
    "gguf": _GgufFile,
}
