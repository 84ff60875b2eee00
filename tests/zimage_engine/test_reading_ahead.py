"""What is read before it is wanted: whole, in order, no more than there is room for, and never in the way."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.page_cache import part_in_memory, put_out
from tests.zimage_engine.tiny_models import write_tiny_z_image
from zimage_engine.errors import CheckpointNotFound
from zimage_engine.loading.adapter import ModelLoaderAdapter
from zimage_engine.reading_ahead import (
    PIECE_BYTES,
    FilePart,
    ReadingAhead,
    ReadingProgress,
    bytes_free_for_files,
    parts_to_read,
)

SECONDS = 60.0


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three, of which one is longer than a piece and one is empty."""
    made = []
    for name, size in (("a", PIECE_BYTES + 100), ("b", 0), ("c", 5000)):
        (tmp_path / name).write_bytes(os.urandom(size))
        made.append(tmp_path / name)
    return made


@pytest.mark.parametrize(
    ("most_bytes", "wanted"),
    [
        (10**9, [("a", 0, PIECE_BYTES), ("a", PIECE_BYTES, 100), ("c", 0, 5000)]),
        (PIECE_BYTES + 100, [("a", 0, PIECE_BYTES), ("a", PIECE_BYTES, 100)]),
        (PIECE_BYTES + 1100, [("a", 0, PIECE_BYTES), ("a", PIECE_BYTES, 100), ("c", 0, 1000)]),
        (10, [("a", 0, 10)]),
        (0, []),
    ],
)
def test_files_are_read_in_their_order_and_as_far_as_there_is_room(
    files: list[Path], most_bytes: int, wanted: list[tuple[str, int, int]]
) -> None:
    folder = files[0].parent
    there = [files[0], folder / "is not there", *files[1:]]
    assert parts_to_read(there, most_bytes) == [FilePart(folder / name, *rest) for name, *rest in wanted]


def test_when_it_has_ended_every_byte_was_read(files: list[Path]) -> None:
    reading = ReadingAhead(lambda: files, free_bytes=lambda: 10**9)
    assert reading.wait(SECONDS)
    assert reading.progress == ReadingProgress(PIECE_BYTES + 5100, PIECE_BYTES + 5100)
    assert reading.progress.ratio == 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked what it has in memory")
def test_files_are_in_memory_afterwards(files: list[Path]) -> None:
    put_out(files)
    if part_in_memory(files):
        pytest.skip("this file system keeps its files in memory")
    assert ReadingAhead(lambda: files, free_bytes=lambda: 10**9).wait(SECONDS)
    assert part_in_memory(files) == 1.0


def test_a_model_that_is_not_there_is_left_to_the_loader_to_tell() -> None:
    def files() -> Sequence[Path]:
        raise CheckpointNotFound("there is nothing")

    reading = ReadingAhead(files)
    assert reading.wait(SECONDS)
    assert reading.progress.ratio is None


def test_a_file_that_goes_away_while_it_is_read_disturbs_nothing(files: list[Path]) -> None:
    def room() -> int:
        return 10**9

    reading = ReadingAhead(lambda: [*files, files[0].parent], free_bytes=room)
    assert reading.wait(SECONDS)


def test_told_to_stop_it_reads_no_further(files: list[Path]) -> None:
    goes_on = threading.Event()

    def room() -> int:
        goes_on.wait(SECONDS)
        return 10**9

    reading = ReadingAhead(lambda: files, free_bytes=room)
    assert not reading.wait(0)
    reading.stop()
    goes_on.set()
    assert reading.wait(SECONDS)
    assert reading.progress.read_bytes == 0


V2 = "31 24 0:27 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "34 24 0:30 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory"


@pytest.mark.parametrize(
    ("group", "mount", "files", "free"),
    [
        pytest.param("0::/", V2, {"memory.max": "1000", "memory.current": "700"}, 400, id="v2"),
        pytest.param(
            "0::/", V2, {"memory.max": "max", "memory.current": "700"}, None, id="v2 without a limit"
        ),
        pytest.param("0::/", V2, {"memory.max": "500", "memory.current": "700"}, 0, id="v2 over its limit"),
        pytest.param(
            "3:memory:/",
            V1,
            {"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "700"},
            400,
            id="v1",
        ),
        pytest.param("0::/", V2, {}, None, id="none"),
    ],
)
def test_room_is_what_a_control_group_leaves(
    tmp_path: Path, group: str, mount: str, files: dict[str, str], free: int | None
) -> None:
    """What its files take already, 100 bytes here, counts as free."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(group + "\n")
    (tmp_path / "proc/self/mountinfo").write_text(mount + "\n")
    folder = tmp_path / mount.split()[4].lstrip("/")
    folder.mkdir(parents=True)
    prefix = "" if mount == V2 else "total_"
    stat = f"anon 600\n{prefix}active_file 60\n{prefix}inactive_file 40"
    for name, text in (files | {"memory.stat": stat}).items():
        (folder / name).write_text(text + "\n")
    found = bytes_free_for_files(tmp_path)
    assert found > 10**7 if free is None else found == free


def test_the_files_of_a_model_are_those_that_loading_reads(tmp_path: Path) -> None:
    folder, cache = write_tiny_z_image(tmp_path / "tiny"), tmp_path / "cache" / "views"
    # A second copy of the weights in another form, as published folders have them.
    denoiser = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(denoiser), folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
    wanted = (
        folder / "text_encoder" / "model.safetensors",
        denoiser,
        folder / "vae" / "diffusion_pytorch_model.safetensors",
    )

    def adapter() -> ModelLoaderAdapter:
        return ModelLoaderAdapter(folder, cache_folder=cache)

    assert sorted(adapter().weight_files) == sorted(wanted)
    adapter().load()
    assert sorted(adapter().weight_files) == sorted(wanted), "and when it was loaded before"


def test_before_a_repair_the_files_are_the_damaged_ones_and_then_those_of_the_view(tmp_path: Path) -> None:
    folder, cache = write_tiny_z_image(tmp_path / "tiny"), tmp_path / "cache" / "views"
    denoiser = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({f"_orig_mod.{name}": tensor for name, tensor in load_file(denoiser).items()}, denoiser)

    def adapter() -> ModelLoaderAdapter:
        return ModelLoaderAdapter(folder, cache_folder=cache)

    assert denoiser in adapter().weight_files
    adapter().load()
    mended = adapter().weight_files
    assert len(mended) == 3 and denoiser not in mended
    assert all(file.is_relative_to(cache) and file.exists() for file in mended)
