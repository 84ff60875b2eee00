"""Lists the tensors in a file that torch.save wrote, without torch and without running the pickle.

A pickle is a program: to load one is to run it. Here its instructions are walked by a small stack machine
that has no way to import or call anything; the globals that tensors are made of stand as inert rows of a
table, and a pickle that asks for any other is refused by the name of it.

Forms: a zip archive of `data.pkl` and one record for each storage (torch 1.6 and later), and the older one of
five pickles with the storages after them. Source: torch/serialization.py, `_save` and `_legacy_save`.
"""

from __future__ import annotations

import io
import os
import pickletools
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from zimage_engine.checkpoint.file_damage import FileDamage, quoted
from zimage_engine.checkpoint.safetensors_header import BITS, elements_in
from zimage_engine.checkpoint.tensors import TensorFacts
from zimage_engine.checkpoint.zip_records import read_plain_record, read_zip_records

#: A model of 5,000 tensors pickles to about a megabyte in 250,000 instructions.
_MAX_PICKLE_BYTES = 64_000_000
_MAX_INSTRUCTIONS = 2_000_000
_MAX_NESTING = 16
_MAX_NAMES = 200_000
_MALFORMED = "is not a pickle that torch.save wrote: its instructions do not fit together"
_RE_SAVE = "re-save it as safetensors"
#: What a broken pickle does to a machine that takes each instruction at its word.
_STUMBLES = (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, struct.error)

#: The first pickle of the old form holds this number, the second 1001 (torch/serialization.py).
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

#: torch's names of element types, in the safetensors words.
_DTYPES: Mapping[str, str] = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "bool": "BOOL",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
}  # fmt: skip
_STORAGES: Mapping[str, str] = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "ComplexFloatStorage": "C64", "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16",
    "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL", "UntypedStorage": "U8",
}  # fmt: skip
#: The same things under the names that Python 2 or the platform gives them.
_SAME_MODULE = {"__builtin__": "builtins", "posix": "os", "nt": "os"}


@dataclass(frozen=True, slots=True, eq=False)
class _Global:
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    dtype: str
    key: str
    elements: int

    @property
    def size_bytes(self) -> int:
        return self.elements * BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True, eq=False)
class _Tensor:
    """As the pickle tells it: nothing of it is checked yet."""

    storage: Any
    dtype: str
    offset: Any
    shape: Any
    stride: Any


#: Whatever is neither a tensor nor a way to one.
_INERT = object()


def read_torch_archive(path: Path) -> tuple[tuple[TensorFacts, ...], str]:
    """The tensors of a zip archive that torch.save wrote, and a clause on what is wrong ("" if nothing).

    Names are the keys on the way to a tensor, joined with dots: `state_dict.x.weight`.
    """
    try:
        with path.open("rb") as file:
            return _list_archive(file), ""
    except FileDamage as damage:
        return (), str(damage)


def read_legacy_pickle(path: Path) -> tuple[tuple[TensorFacts, ...], str]:
    """The same for the form that torch.save wrote before 1.6."""
    try:
        with path.open("rb") as file:
            return _list_legacy(file), ""
    except FileDamage as damage:
        return (), str(damage)


def walk_names(top: Any, is_tensor: Callable[[Any], bool]) -> Iterator[tuple[str, Any]]:
    """Each tensor under the dicts of `top` with its dotted name. Raises FileDamage where they never end.

    The one rule for names, so that a tensor is found again under the name it was listed by.
    """
    if not isinstance(top, Mapping):
        raise FileDamage(f"holds no table of named tensors; {_RE_SAVE}")
    seen = 0
    pending: list[tuple[str, Any, int]] = [("", top, 0)]
    while pending:
        prefix, table, depth = pending.pop()
        seen += len(table)
        if depth > _MAX_NESTING or seen > _MAX_NAMES:
            raise FileDamage(f"holds tables nested without end; {_RE_SAVE}")
        for key, value in table.items():
            if not isinstance(key, str):
                continue
            if is_tensor(value):
                yield prefix + key, value
            elif isinstance(value, Mapping):
                pending.append((f"{prefix}{key}.", value, depth + 1))


def _list_archive(file: BinaryIO) -> tuple[TensorFacts, ...]:
    records = read_zip_records(file)
    pickles = [name for name in records if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise FileDamage("is a zip archive, but not one that torch.save wrote: it has no data.pkl")
    record = records[pickles[0]]
    if record.size_bytes > _MAX_PICKLE_BYTES:
        raise FileDamage(f"has a data.pkl of {record.size_bytes} bytes, which no model needs; {_RE_SAVE}")
    machine = _Machine(io.BytesIO(read_plain_record(file, record)))
    tensors = _tensors(machine.run())
    folder = pickles[0].removesuffix("data.pkl")
    for name, tensor in tensors.items():
        storage = records.get(f"{folder}data/{tensor.storage.key}")
        if storage is None:
            raise FileDamage(f"lacks the data of the tensor {quoted(name)}")
        if storage.size_bytes != tensor.storage.size_bytes or not storage.is_plain:
            raise FileDamage(
                f"has {storage.size_bytes} bytes for the tensor {quoted(name)} "
                f"where its pickle announces {tensor.storage.size_bytes}"
            )
    return tuple(TensorFacts(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())


def _list_legacy(file: BinaryIO) -> tuple[TensorFacts, ...]:
    file_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    front = io.BytesIO(file.read(min(file_bytes, _MAX_PICKLE_BYTES)))
    magic, protocol = _Machine(front).run(), _Machine(front).run()
    if magic != _LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL:
        raise FileDamage("is a pickle, but not one that torch.save wrote")
    system = _Machine(front).run()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise FileDamage(f"was written on a big-endian machine; {_RE_SAVE}")
    machine = _Machine(front)
    tensors = _tensors(machine.run())
    keys = _Machine(front).run()
    storages = {storage.key: storage for storage in machine.storages}
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise FileDamage(_MALFORMED)
    for name, tensor in tensors.items():
        if tensor.storage.key not in keys:
            raise FileDamage(f"lacks the data of the tensor {quoted(name)}")
    # Each storage is its number of elements in 8 bytes, then the elements.
    announced_bytes = front.tell() + sum(8 + storages[key].size_bytes for key in keys)
    if announced_bytes != file_bytes:
        raise FileDamage(f"has {file_bytes} bytes where its pickles announce {announced_bytes}")
    position = front.tell()
    for key in keys:
        file.seek(position)
        if int.from_bytes(file.read(8), "little") != storages[key].elements:
            raise FileDamage("has a storage of another length than its pickle announces")
        position += 8 + storages[key].size_bytes
    return tuple(TensorFacts(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())


def _tensors(top: Any) -> dict[str, _Tensor]:
    """The named tensors of the unpickled object, each known to lie inside its storage."""
    tensors: dict[str, _Tensor] = {}
    for name, tensor in walk_names(top, lambda value: isinstance(value, _Tensor)):
        if name in tensors:
            raise FileDamage(f"has two tensors of the name {quoted(name)}")
        if not _lies_in_its_storage(tensor):
            raise FileDamage(f"gives the tensor {quoted(name)} a shape that its storage does not hold")
        tensors[name] = tensor
    return tensors


def _lies_in_its_storage(tensor: _Tensor) -> bool:
    shape, stride, storage = tensor.shape, tensor.stride, tensor.storage
    if not isinstance(storage, _Storage) or not _are_counts(shape) or not _are_counts(stride):
        return False
    if not _are_counts((tensor.offset,)) or len(shape) != len(stride):
        return False
    # An untyped storage counts bytes, whatever stands in them.
    capacity = storage.size_bytes * 8 // BITS[tensor.dtype]
    # More elements than the storage has would be an expanded view, which grows when it is copied.
    elements = elements_in(shape) if all(shape) else 0
    if elements is None or elements > capacity:
        return False
    steps = sum((side - 1) * step for side, step in zip(shape, stride, strict=True))
    return tensor.offset + (steps + 1 if all(shape) else 0) <= capacity


def _are_counts(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(one) is int and 0 <= one < 2**56 for one in value)


# What the permitted globals give when they are called: no row runs anything but the row.


def _ordered_dict(pairs: Any = ()) -> dict[str, Any]:
    return {key: value for key, value in pairs if isinstance(key, str)}


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, storage.dtype, offset, shape, stride)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> _Tensor:
    word = _DTYPES.get(dtype.name.removeprefix("torch."))
    if word is None:
        raise FileDamage(f"has a tensor of the type {quoted(dtype.name)}; {_RE_SAVE}")
    return _Tensor(storage, word, offset, shape, stride)


def _first(value: Any, *_: Any) -> Any:
    return value


def _inert(*_: Any) -> Any:
    return _INERT


_PERMITTED: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    # Not tensors, but harmless company: torch.load(weights_only=True) permits them too.
    **dict.fromkeys(
        (
            "torch.Size",
            "torch.device",
            "torch.serialization._get_layout",
            "collections.Counter",
            "builtins.set",
            "builtins.complex",
            "builtins.bytearray",
            "_codecs.encode",
            *(f"torch.{name}" for name in _DTYPES),
            "torch.complex128",
            *(f"torch.{name}" for name in _STORAGES),
            "torch.storage.UntypedStorage",
        ),
        _inert,
    ),
}


@dataclass(slots=True)
class _Machine:
    """Runs one pickle from `source` without running anything: see the table of instructions below."""

    source: io.BytesIO
    stack: list[Any] = field(default_factory=list)
    stacks_below_marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    storages: list[_Storage] = field(default_factory=list)

    def run(self) -> Any:
        """What the pickle leaves on top of the stack. Raises FileDamage, and nothing else."""
        try:
            # pickletools tells the instructions apart; no argument of one is longer than the bytes there are.
            for count, (opcode, argument, _) in enumerate(pickletools.genops(self.source)):
                if count > _MAX_INSTRUCTIONS:
                    raise FileDamage(f"is a pickle of endless instructions; {_RE_SAVE}")
                if opcode.name in _PUSHED:
                    self.stack.append(argument)
                elif opcode.name not in _IGNORED:
                    _INSTRUCTIONS[opcode.name](self, argument)
            return self.stack.pop()
        except _STUMBLES as error:
            raise FileDamage(_MALFORMED) from error

    def pop_to_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.stacks_below_marks.pop()
        return items

    def mark(self, _: Any) -> None:
        self.stacks_below_marks.append(self.stack)
        self.stack = []

    def pop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_to_mark()

    def drop_to_mark(self, _: Any) -> None:
        self.pop_to_mark()

    def duplicate(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def remember(self, index: Any) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def recall(self, index: Any) -> None:
        self.stack.append(self.memo[index])

    def tuple_of(self, count: int) -> None:
        items = self.stack[-count:]
        if len(items) != count:
            raise IndexError
        self.stack[-count:] = [tuple(items)]

    def tuple_to_mark(self, _: Any) -> None:
        items = tuple(self.pop_to_mark())
        self.stack.append(items)

    def list_to_mark(self, _: Any) -> None:
        items = self.pop_to_mark()
        self.stack.append(items)

    def dict_to_mark(self, _: Any) -> None:
        items = self.pop_to_mark()
        self.stack.append({})
        self._put(items)

    def set_to_mark(self, _: Any) -> None:
        self.pop_to_mark()
        self.stack.append(_INERT)

    def append_one(self, _: Any) -> None:
        item = self.stack.pop()
        self._extend([item])

    def append_to_mark(self, _: Any) -> None:
        self._extend(self.pop_to_mark())

    def put_one(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put([key, value])

    def put_to_mark(self, _: Any) -> None:
        self._put(self.pop_to_mark())

    def add_to_mark(self, _: Any) -> None:
        self.pop_to_mark()
        if self.stack[-1] is not _INERT:
            raise TypeError

    def _extend(self, items: list[Any]) -> None:
        self.stack[-1].extend(items)

    def _put(self, items: list[Any]) -> None:
        table = self.stack[-1]
        if table is _INERT:  # a Counter
            return
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Only strings name tensors; other keys are left out unhashed, for a deep tuple's hash never ends.
            if isinstance(key, str):
                table[key] = value

    def ask_for(self, spoken: str) -> None:
        """GLOBAL: its argument is the module and the name, with a space between."""
        module, _, name = spoken.partition(" ")
        self.stack.append(_permitted(module, name))

    def ask_for_stacked(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError
        self.stack.append(_permitted(module, name))

    def instance(self, spoken: str) -> None:
        module, _, name = spoken.partition(" ")
        arguments = self.pop_to_mark()
        self.stack.append(_call(_permitted(module, name), tuple(arguments)))

    def object_to_mark(self, _: Any) -> None:
        callee, *arguments = self.pop_to_mark()
        self.stack.append(_call(callee, tuple(arguments)))

    def call(self, _: Any) -> None:
        arguments, callee = self.stack.pop(), self.stack.pop()
        self.stack.append(_call(callee, arguments))

    def call_with_names(self, _: Any) -> None:
        self.stack.pop()
        self.call(None)

    def set_state(self, _: Any) -> None:
        """BUILD: attributes beside the content, such as the `_metadata` of a state dict."""
        self.stack.pop()
        if not self.stack:
            raise IndexError

    def storage(self, _: Any) -> None:
        """The one kind of outside object that torch writes: ("storage", class, key, device, elements)."""
        kind, storage_class, key, _device, elements, *_views = self.stack.pop()
        dtype = _STORAGES.get(storage_class.name.rpartition(".")[2])
        if kind != "storage" or dtype is None or not isinstance(key, str) or not _are_counts((elements,)):
            raise ValueError
        self.stack.append(_Storage(dtype, key, elements))
        self.storages.append(self.stack[-1])

    def refuse_extension(self, code: Any) -> None:
        raise FileDamage(
            f"is a pickle that would run code: it asks for extension {quoted(str(code))}; refused"
        )


def _permitted(module: str, name: str) -> _Global:
    full_name = f"{_SAME_MODULE.get(module, module)}.{name}"
    if full_name not in _PERMITTED:
        raise FileDamage(f"is a pickle that would run code: it asks for {quoted(full_name)}; refused")
    return _Global(full_name)


def _call(callee: Any, arguments: Any) -> Any:
    if not isinstance(callee, _Global) or not isinstance(arguments, tuple):
        raise TypeError
    return _PERMITTED[callee.name](*arguments)


#: Instructions whose argument is the value: numbers, texts and bytes.
_PUSHED = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
})  # fmt: skip
_IGNORED = frozenset({"PROTO", "FRAME", "STOP"})
#: Every other instruction that is understood; one that is not here makes the pickle malformed.
_INSTRUCTIONS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_SET": lambda machine, _: machine.stack.append(_INERT),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "TUPLE": _Machine.tuple_to_mark,
    "LIST": _Machine.list_to_mark,
    "DICT": _Machine.dict_to_mark,
    "FROZENSET": _Machine.set_to_mark,
    "APPEND": _Machine.append_one,
    "APPENDS": _Machine.append_to_mark,
    "SETITEM": _Machine.put_one,
    "SETITEMS": _Machine.put_to_mark,
    "ADDITEMS": _Machine.add_to_mark,
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.drop_to_mark,
    "DUP": _Machine.duplicate,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.remember),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.recall),
    "GLOBAL": _Machine.ask_for,
    "STACK_GLOBAL": _Machine.ask_for_stacked,
    "INST": _Machine.instance,
    "OBJ": _Machine.object_to_mark,
    "NEWOBJ": _Machine.call,
    "NEWOBJ_EX": _Machine.call_with_names,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.set_state,
    "BINPERSID": _Machine.storage,
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), _Machine.refuse_extension),
}
