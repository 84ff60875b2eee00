"""Files made to harm their reader: each is refused in a clause, quickly, and runs nothing."""

import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from tests.zimage_engine.checkpoint.test_weight_files import write_gguf
from zimage_engine.checkpoint.weight_files import read_weight_file


class Calls:
    """Pickles to a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class Plain:
    """Pickles by NEWOBJ and BUILD."""


def archive(path: Path, pickled: bytes, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        for key, content in records.items():
            file.writestr(f"archive/data/{key}", content)
    return path


def touch(marker: Path) -> Calls:
    return Calls(os.system, f"touch {marker}")


EVIL: dict[str, tuple[Callable[[Path], Any], str]] = {
    "at the top": (touch, "os.system"),
    "in an OrderedDict": (lambda marker: OrderedDict(a=torch.zeros(1), b=touch(marker)), "os.system"),
    "deep in tables": (lambda marker: {"a": {"b": [(touch(marker),)]}}, "os.system"),
    "as a key": (lambda marker: {touch(marker): 1}, "os.system"),
    "through eval": (lambda marker: {"a": Calls(eval, f"open({str(marker)!r}, 'w')")}, "builtins.eval"),
    "through getattr": (lambda _: [Calls(getattr, Calls(__import__, "os"), "system")], "builtins.getattr"),
    "through open": (lambda marker: {"a": Calls(open, str(marker), "w")}, "io.open"),
    "through torch": (lambda marker: {"a": Calls(torch.load, str(marker))}, "torch.serialization.load"),
    "as an instance": (lambda _: {"a": Plain()}, "test_hostile_files.Plain"),
}  # fmt: skip


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("case", EVIL)
def test_a_pickle_that_would_run_code_is_refused_by_name(tmp_path: Path, case: str, form: str) -> None:
    make, name = EVIL[case]
    marker, path = tmp_path / "it_ran", tmp_path / "model.bin"
    torch.save(make(marker), path, _use_new_zipfile_serialization=form == "zip")
    file = read_weight_file(path)
    assert "is a pickle that would run code: it asks for " in file.damage
    assert f"{name}; refused" in file.damage
    assert file.tensors == ()
    assert not marker.exists()


@pytest.mark.parametrize(
    ("instructions", "clause"),
    [
        (b"cos\nsystem\n(S'touch it_ran'\ntR.", "os.system; refused"),
        (b"(S'touch it_ran'\nios\nsystem\n.", "os.system; refused"),
        (b"(cos\nsystem\nS'touch it_ran'\no.", "os.system; refused"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch it_ran\x85R.", "os.system; refused"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch it_ran\x85}\x92.", "os.system; refused"),
        (b"\x82\x01.", "asks for extension 1; refused"),
        (b"c__builtin__\nexec\n.", "builtins.exec; refused"),
        (b"ctorch\nload\n.", "torch.load; refused"),
        (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "__globals__; refused"),
        (b"cos\x07\n" + b"x" * 999 + b"\n.", "...; refused"),
        (b"Pan outside object\n.", "do not fit together"),
        (b"S'not a function'\n)R.", "do not fit together"),
        (b"\x97.", "do not fit together"),
        (b".", "do not fit together"),
        (b"", "do not fit together"),
        (b"N.", "holds no table of named tensors"),
        (b"]r\xff\xff\xff\x7f.", "holds no table of named tensors"),
        (b"\x96" + (2**40).to_bytes(8, "little") + b".", "do not fit together"),
        (b"\x8e" + (2**63 - 1).to_bytes(8, "little") + b".", "do not fit together"),
        (b"I" + b"9" * 10_000 + b"\n.", "do not fit together"),
        (b")" + b"\x85" * 100_000 + b"}" + b"h\x00", "do not fit together"),
    ],
)
def test_instructions_written_by_hand_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instructions: bytes, clause: str
) -> None:
    monkeypatch.chdir(tmp_path)
    damage = read_weight_file(archive(tmp_path / "model.bin", instructions)).damage
    assert clause in damage
    assert len(damage) < 300 and damage.isprintable()
    assert not (tmp_path / "it_ran").exists()


def test_tables_that_hold_each_other_come_to_an_end(tmp_path: Path) -> None:
    itself: dict[str, Any] = {}
    itself["again"] = itself
    doubled: dict[str, Any] = {}
    for _ in range(40):
        doubled = {"left": doubled, "right": doubled}
    for content in (itself, doubled):
        path = archive(tmp_path / "model.bin", pickle.dumps(content))
        assert "nested without end" in read_weight_file(path).damage


def test_a_deep_tuple_as_a_key_is_not_hashed(tmp_path: Path) -> None:
    """Hashing a tuple of so many levels overflows the interpreter's stack; no `except` catches that."""
    path = archive(tmp_path / "model.bin", b"})" + b"\x85" * 300_000 + b"Ns.")
    assert read_weight_file(path).damage == ""


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("old", "new", "clause"),
    [
        (b"K\x02K\x03\x86", b"K\x02K\x04\x86", "x a shape that its storage does not hold"),
        (b"K\x02K\x03\x86", b"K\x02J\xff\xff\xff\xff\x86", "x a shape that its storage does not hold"),
        (b"K\x02K\x03\x86", b"K\x02\x88\x86", "x a shape that its storage does not hold"),
        (b"K\x02K\x03\x86", b"K\x02K\x03\x85", "x a shape that its storage does not hold"),
        (b"K\x03K\x01\x86", b"K\x09K\x01\x86", "x a shape that its storage does not hold"),
        (b"FloatStorage", b"LongStorage", "has 24 bytes for the tensor x where its pickle announces 48"),
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009", "lacks the data of the tensor x"),
    ],
)
def test_a_tensor_that_its_pickle_lies_about_is_named(
    tmp_path: Path, old: bytes, new: bytes, clause: str
) -> None:
    with zipfile.ZipFile(io.BytesIO(saved({"x": torch.zeros(2, 3)}))) as honest:
        pickled = honest.read("archive/data.pkl")
    assert pickled.count(old) == 1
    assert read_weight_file(archive(tmp_path / "honest", pickled, **{"0": bytes(24)})).damage == ""
    path = archive(tmp_path / "lying", pickled.replace(old, new), **{"0": bytes(24)})
    assert clause in read_weight_file(path).damage


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_cut_off_anywhere_is_damage(tmp_path: Path, zipped: bool) -> None:
    whole = saved({"x": torch.zeros(2, 3)}, _use_new_zipfile_serialization=zipped)
    path = tmp_path / "model.bin"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert read_weight_file(path).damage


def test_a_compressed_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(30_000_000))
    tracemalloc.start()
    damage = read_weight_file(path).damage
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "cannot be read as it stands" in damage
    assert peak_bytes < 1_000_000


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def entry(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


NOT_JSON = "its header is not the JSON that it should be"
LYING_ENTRIES: list[tuple[dict[str, Any], int, str]] = [
    ({"x": entry([2, 2**40], [0, 24])}, 24, "gives the tensor x 24 bytes where its shape and type need"),
    ({"x": entry([2**40] * 40, [0, 24])}, 24, "tensor x with more elements than any file can hold"),
    ({"x": entry([2**62, 2**62, 0], [0, 0])}, 0, "tensor x with more elements than any file can hold"),
    ({"x": entry([6], [0, 23])}, 23, "gives the tensor x 23 bytes where its shape and type need 24"),
    ({"x": entry([6], [0, 24]), "y": entry([6], [12, 36])}, 36, "the tensor y, which overlaps x"),
    ({"x": entry([6], [0, 24]), "y": entry([6], [0, 24])}, 24, "the tensor y, which overlaps x"),
    ({"x": entry([6], [0, 24]), "y": entry([6], [28, 52])}, 52, "the tensor y, which leaves a hole after x"),
    ({"x": entry([6], [4, 28])}, 28, "the tensor x, which leaves a hole after the header"),
    ({"x": entry([250], [0, 1000])}, 24, "bytes where its header announces"),
    ({"x": entry([6], [0, 24])}, 25, "bytes where its header announces"),
    ({"x": entry([6], [24, 0])}, 24, "gives the tensor x -24 bytes"),
    ({"x": entry([-6], [0, 24])}, 24, NOT_JSON),
    ({"x": entry([6], [-24, 0])}, 24, NOT_JSON),
    ({"x": entry([True, 6], [0, 24])}, 24, NOT_JSON),
    ({"x": entry([6.0], [0, 24])}, 24, NOT_JSON),
    ({"x": entry("6", [0, 24])}, 24, NOT_JSON),
    ({"x": entry([6], [0, 24, 24])}, 24, NOT_JSON),
    ({"x": entry([6], None)}, 24, NOT_JSON),
    ({"x": entry([6], [0, 24], ["F32"])}, 24, NOT_JSON),
    ({"x": entry([6], [0, 24], "F33")}, 24, "the tensor x of the unknown type F33"),
    ({"x": entry([6], [0, 24]), "__metadata__": {"a": 1}}, 24, NOT_JSON),
    ({"x": entry([6], [0, 24]), "__metadata__": []}, 24, NOT_JSON),
    ({"x": {"dtype": "F32", "shape": [6]}}, 24, NOT_JSON),
    ({"x": []}, 0, NOT_JSON),
]


@pytest.mark.parametrize(("header", "data_bytes", "clause"), LYING_ENTRIES)
def test_a_lying_safetensors_header_is_refused(
    tmp_path: Path, header: dict[str, Any], data_bytes: int, clause: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header(json.dumps(header).encode(), bytes(data_bytes)))
    assert clause in read_weight_file(path).damage


CUT_OFF = "its header is cut off"


@pytest.mark.parametrize(
    ("content", "clause"),
    [
        ((2**63).to_bytes(8, "little") + b"{}", CUT_OFF),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", CUT_OFF),
        ((3).to_bytes(8, "little") + b"{}", CUT_OFF),
        (with_header(b'{"\xff\xfe": 1}'), NOT_JSON),
        (with_header('{"x": 1}'.encode("utf-16-le")), NOT_JSON),
        (with_header(b'{"x":' + b"[" * 100_000), NOT_JSON),
        (with_header(b'{"x":' * 100_000), NOT_JSON),
        (with_header(b'{"x":' + b"[" * 500 + b"]" * 500 + b"}"), NOT_JSON),
        (with_header(b'{"x":' + b"9" * 100_000 + b"}"), NOT_JSON),
        (with_header(b'{"__metadata__":{"a":"1","a":"2"}}'), NOT_JSON),
        (with_header(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), NOT_JSON),
        (with_header(b'{"x":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}'), NOT_JSON),
        (with_header(b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,-0]}}'), NOT_JSON),
    ],
)
def test_a_broken_safetensors_header_is_refused(tmp_path: Path, content: bytes, clause: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    file = read_weight_file(path)
    assert clause in file.damage
    assert file.form == "safetensors"


def gguf_text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def gguf_file(tensors: int, settings: int, rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, settings) + rest


def gguf_row(name: bytes, sides: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return gguf_text(name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, kind, offset)


DATA = bytes(256)


@pytest.mark.parametrize(
    ("content", "clause"),
    [
        (gguf_file(2**63, 0, DATA), "announces more tensors or settings"),
        (gguf_file(0, 2**63, DATA), "announces more tensors or settings"),
        (gguf_file(0, 1, struct.pack("<Q", 2**62)), "a name of absurd length"),
        (gguf_file(0, 1, gguf_text(b"\xff\xfe")), "not UTF-8"),
        (gguf_file(0, 1, gguf_text(b"k") + struct.pack("<I", 77)), "unknown kind 77"),
        (gguf_file(0, 1, gguf_text(b"k") + struct.pack("<IIQ", 9, 4, 2**62)), "is cut off"),
        (gguf_file(0, 1, gguf_text(b"k") + struct.pack("<IIQ", 9, 8, 2**62)), "an array of absurd length"),
        (
            gguf_file(0, 1, gguf_text(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9),
            "unknown kind 9",
        ),
        (gguf_file(0, 1, gguf_text(b"k") + struct.pack("<IQ", 8, 2**62)), "is cut off"),
        (gguf_file(0, 1, gguf_text(b"general.alignment") + struct.pack("<II", 4, 0)), "alignment"),
        (gguf_file(1, 0, gguf_row(b"x", (1,) * 9)), "gives the tensor x 9 sides"),
        (gguf_file(1, 0, gguf_row(b"x", (2**60, 2**60)) + DATA), "tensor x with more elements than any file"),
        (gguf_file(1, 0, gguf_row(b"x", (1000,)) + DATA), "bytes where its header announces"),
        (gguf_file(1, 0, gguf_row(b"x", (8,), offset=2**63) + DATA), "bytes where its header announces"),
        (gguf_file(1, 0, gguf_row(b"x", (8,), offset=1) + DATA), "at a place that is not aligned"),
        (gguf_file(1, 0, gguf_row(b"x", (8,), kind=99) + DATA), "tensor x of the unknown type 99"),
        (gguf_file(1, 0, gguf_row(b"x", (16, 2), kind=8) + DATA), "x, which does not split into Q8_0 blocks"),
        (gguf_file(2, 0, gguf_row(b"x", (8,)) * 2 + DATA), "two tensors of one name"),
        (gguf_file(2, 0, gguf_row(b"x", (9,)) + gguf_row(b"y", (8,)) + DATA), "overlaps"),
    ],
)
def test_a_lying_gguf_header_is_refused(tmp_path: Path, content: bytes, clause: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert clause in read_weight_file(path).damage


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(3, dtype=torch.bfloat16)}
    save_file(weights, folder / "safetensors", metadata={"made": "here"})
    torch.save({"state_dict": weights}, folder / "zip")
    torch.save({"state_dict": weights}, folder / "legacy", _use_new_zipfile_serialization=False)
    write_gguf(folder / "gguf")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


#: Edits of a file: at a place (a fraction of its length) so many bytes are taken out and others put in.
EDITS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from([0, 1, 1, 8, 10**6]), st.binary(max_size=9)),
    min_size=1,
    max_size=4,
)  # fmt: skip
FUZZ = settings(
    max_examples=200,
    deadline=2000,  # milliseconds for one file
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
    database=None,
)


def check_reading(path: Path) -> None:
    """It raises nothing, allocates little, and passes only what safetensors' own library passes."""
    tracemalloc.start()
    file = read_weight_file(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 50_000_000
    assert file.damage.isprintable()
    if file.form == "safetensors" and not file.damage:
        with safe_open(path, framework="pt") as opened:
            assert set(opened.keys()) == {tensor.name for tensor in file.tensors}


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy", "gguf"])
@FUZZ
@given(edits=EDITS)
def test_an_edited_file_never_harms_its_reader(
    tmp_path: Path, whole_files: dict[str, bytes], form: str, edits: list[tuple[float, int, bytes]]
) -> None:
    content = whole_files[form]
    for place, taken_out, put_in in edits:
        start = int(place * len(content))
        content = content[:start] + put_in + content[start + taken_out :]
    path = tmp_path / "edited"
    path.write_bytes(content)
    check_reading(path)


@FUZZ
@given(pickled=st.binary(max_size=200))
def test_a_random_pickle_never_harms_its_reader(tmp_path: Path, pickled: bytes) -> None:
    check_reading(archive(tmp_path / "random", pickled))


@FUZZ
@given(magic=st.sampled_from([b"", b"GGUF\x03\0\0\0", b"PK\x03\x04", b"\x80\x02"]), content=st.binary())
def test_random_bytes_never_harm_their_reader(tmp_path: Path, magic: bytes, content: bytes) -> None:
    path = tmp_path / "random"
    path.write_bytes(magic + content)
    check_reading(path)


HEADER_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**65) | st.floats() | st.text(max_size=3) | st.just("U8"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
ENTRIES = st.fixed_dictionaries({
    "dtype": st.sampled_from(["U8", "F16", "F4"]) | HEADER_VALUES,
    "shape": st.lists(st.integers(0, 3), max_size=2) | HEADER_VALUES,
    "data_offsets": st.lists(st.integers(0, 6), min_size=2, max_size=2) | HEADER_VALUES,
})  # fmt: skip


@FUZZ
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRIES | HEADER_VALUES, max_size=3),
    data=st.binary(max_size=6),
)
def test_what_passes_as_safetensors_opens_in_the_library(
    tmp_path: Path, header: dict[str, Any], data: bytes
) -> None:
    path = tmp_path / "random"
    path.write_bytes(with_header(json.dumps(header).encode(), data))
    check_reading(path)
