"""Views are whole or not there, made once, kept within a bound, and leave the user's files alone."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from zimage_engine.checkpoint.parts import Recipe
from zimage_engine.checkpoint.weight_files import read_weight_file
from zimage_engine.errors import CacheFull, CheckpointDamaged
from zimage_engine.loading import view as view_module
from zimage_engine.loading.view import (
    MANIFEST,
    ensure_view,
    list_views,
    prune_views,
    remove_views,
    views_to_prune,
)
from zimage_engine.loading.view_key import block_offsets, key_of
from zimage_engine.loading.view_plan import LinkedFile, ViewPlan, WrittenText, WrittenWeights

QKV = torch.arange(48, dtype=torch.float32).reshape(12, 4)
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def plan_of(origin: Path, text: str = "{}") -> ViewPlan:
    """A plan over a folder that has one fused file and one healthy one, made here if it is not there."""
    if not origin.exists():
        (origin / "vae").mkdir(parents=True)
        (origin / "vae" / "healthy.safetensors").write_bytes(b"healthy" * 20_000)
        save_file({"qkv": QKV}, origin / "fused.safetensors")
    return ViewPlan(
        title=f"tiny from {origin.name}",
        origin=origin,
        linked=(LinkedFile("vae/model.safetensors", origin / "vae" / "healthy.safetensors"),),
        texts=(WrittenText("transformer/config.json", text),),
        weights=(
            WrittenWeights(
                WEIGHTS,
                (Recipe("q", (6, 4), "qkv", rows=(0, 6)), Recipe("k", (6, 4), "qkv", rows=(6, 12))),
                (read_weight_file(origin / "fused.safetensors"),),
                "bfloat16",
            ),
        ),
    )


def sparse_plan(folder: Path, tensors: int, side: int = 2048) -> ViewPlan:
    """A plan that takes a while to write: float32 zeros that take no room where they are read."""
    sizes = {f"t{number}": side * side * 4 for number in range(tensors)}
    header, begin = {}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "F32", "shape": [side, side], "data_offsets": [begin, begin + size]}
        begin += size
    packed = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    with (folder / "large.safetensors").open("wb") as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        file.truncate(8 + len(packed) + begin)
    source = read_weight_file(folder / "large.safetensors")
    recipes = tuple(Recipe(name, (side, side), name) for name in sizes)
    return ViewPlan(
        "large", folder, (), (), (WrittenWeights("w.safetensors", recipes, (source,), "float32"),)
    )


def start_making(plan: ViewPlan, cache: Path) -> subprocess.Popen[str]:
    plan_file = cache.parent / "plan.pickle"
    plan_file.write_bytes(pickle.dumps(plan))
    program = (
        "import pickle, sys; from pathlib import Path; from zimage_engine.loading.view import ensure_view\n"
        "import zimage_engine.loading.tensor_writer, zimage_engine.loading.tensor_files\n"
        "plan = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(ensure_view(plan, Path(sys.argv[2]), reserve_bytes=0))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, str(plan_file), str(cache)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def go(making: subprocess.Popen[str]) -> None:
    assert making.stdin and making.stdout
    assert making.stdout.readline() == "ready\n"
    making.stdin.write("\n")
    making.stdin.flush()


def unfinished(cache: Path) -> list[Path]:
    return list(cache.glob(".unfinished-*"))


def test_a_view_links_what_is_healthy_and_holds_what_was_rewritten(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "model", text='{"shift": 3.0}')
    view = ensure_view(plan, tmp_path / "cache")
    assert view.name == key_of(plan)
    assert (view / "vae" / "model.safetensors").is_symlink()
    assert (view / "vae" / "model.safetensors").samefile(tmp_path / "model" / "vae" / "healthy.safetensors")
    assert (view / "transformer" / "config.json").read_text() == '{"shift": 3.0}'
    written = load_file(view / WEIGHTS)
    assert written["q"].equal(QKV[:6].bfloat16()) and written["k"].equal(QKV[6:].bfloat16())
    (listed,) = list_views(tmp_path / "cache")
    held = (view / WEIGHTS).stat().st_size + len('{"shift": 3.0}')
    assert (listed.key, listed.title, listed.size_bytes) == (view.name, "tiny from model", held)
    assert unfinished(tmp_path / "cache") == []


def test_the_next_time_it_is_only_touched(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "model")
    view = ensure_view(plan, tmp_path / "cache")
    made = (view / WEIGHTS).stat()
    os.utime(view / MANIFEST, (1000, 1000))
    assert ensure_view(plan, tmp_path / "cache") == view
    assert (view / WEIGHTS).stat().st_ino == made.st_ino
    assert (view / MANIFEST).stat().st_mtime > time.time() - 100


def test_the_users_files_stay_as_they_are(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "model")

    def facts() -> dict[Path, tuple[int, bytes]]:
        files = (path for path in (tmp_path / "model").rglob("*") if path.is_file())
        return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}

    before = facts()
    ensure_view(plan, tmp_path / "cache")
    remove_views(list_views(tmp_path / "cache"))
    assert list_views(tmp_path / "cache") == ()
    assert facts() == before


def shorten_weights(view: Path, _: Path) -> None:
    os.truncate(view / WEIGHTS, 100)


def remove_text(view: Path, _: Path) -> None:
    (view / "transformer" / "config.json").unlink()


def spoil_manifest(view: Path, _: Path) -> None:
    (view / MANIFEST).write_text("{")


def spoil_link(view: Path, _: Path) -> None:
    (view / "vae" / "model.safetensors").unlink()
    (view / "vae" / "model.safetensors").symlink_to("/nowhere/at/all")


@pytest.mark.parametrize("spoil", [shorten_weights, remove_text, spoil_manifest, spoil_link])
def test_a_view_that_is_not_whole_is_mended(spoil: object, tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "model")
    view = ensure_view(plan, tmp_path / "cache")
    spoil(view, tmp_path)  # type: ignore[operator]
    assert ensure_view(plan, tmp_path / "cache") == view
    assert load_file(view / WEIGHTS)["k"].equal(QKV[6:].bfloat16())
    assert (view / "vae" / "model.safetensors").read_bytes() == b"healthy" * 20_000
    assert [listed.is_whole for listed in list_views(tmp_path / "cache")] == [True]
    assert unfinished(tmp_path / "cache") == []


def test_a_moved_model_gets_its_links_set_anew_and_nothing_rewritten(tmp_path: Path) -> None:
    view = ensure_view(plan_of(tmp_path / "here"), tmp_path / "cache")
    made = (view / WEIGHTS).stat().st_ino
    (tmp_path / "here").rename(tmp_path / "there")
    assert [listed.is_whole for listed in list_views(tmp_path / "cache")] == [False]
    assert ensure_view(plan_of(tmp_path / "there"), tmp_path / "cache") == view
    assert (view / "vae" / "model.safetensors").samefile(tmp_path / "there" / "vae" / "healthy.safetensors")
    assert (view / WEIGHTS).stat().st_ino == made


def test_a_view_of_another_version_is_listed_and_removed(tmp_path: Path) -> None:
    view = ensure_view(plan_of(tmp_path / "model"), tmp_path / "cache")
    manifest = json.loads((view / MANIFEST).read_text())
    (view / MANIFEST).write_text(json.dumps({**manifest, "format": manifest["format"] + 1}))
    (listed,) = list_views(tmp_path / "cache")
    assert (listed.key, listed.is_whole) == (view.name, False)
    assert listed.size_bytes > (view / WEIGHTS).stat().st_size
    assert prune_views(tmp_path / "cache", max_bytes=0) == (listed,)
    assert not view.exists()


def test_memory_that_was_mapped_is_let_go_of_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_module, "_MAPPED_BYTES", 1)
    plan = plan_of(tmp_path / "model")
    stored = {f"t{number}": QKV + number for number in range(5)}
    save_file(stored, tmp_path / "model" / "many.safetensors")
    source = read_weight_file(tmp_path / "model" / "many.safetensors")
    recipes = tuple(Recipe(name, (12, 4), name) for name in stored)
    weights = WrittenWeights("many.safetensors", recipes, (source,), "float32")
    view = ensure_view(replace(plan, weights=(weights,)), tmp_path / "cache")
    written = load_file(view / "many.safetensors")
    assert all(written[name].equal(tensor) for name, tensor in stored.items())


def test_two_processes_at_once_make_one_view(tmp_path: Path) -> None:
    plan, cache = sparse_plan(tmp_path / "model", tensors=6), tmp_path / "cache"
    both = [start_making(plan, cache), start_making(plan, cache)]
    for making in both:
        go(making)
    answers = [making.communicate(timeout=300)[0] for making in both]
    assert [making.returncode for making in both] == [0, 0]
    assert answers == [f"{cache / key_of(plan)}\n"] * 2
    assert len(list_views(cache)) == 1 and list_views(cache)[0].is_whole
    assert unfinished(cache) == []
    made = load_file(cache / key_of(plan) / "w.safetensors")
    assert len(made) == 6 and all(not tensor.any() for tensor in made.values())


def test_what_was_killed_in_the_middle_is_not_taken_for_whole(tmp_path: Path) -> None:
    plan, cache = sparse_plan(tmp_path / "model", tensors=24), tmp_path / "cache"
    making = start_making(plan, cache)
    go(making)
    deadline = time.monotonic() + 120
    while not list(cache.glob(".unfinished-*/w.safetensors")):
        assert time.monotonic() < deadline and making.poll() is None
        time.sleep(0.001)
    making.send_signal(signal.SIGKILL)
    making.communicate(timeout=60)
    assert list_views(cache) == () and not (cache / key_of(plan)).exists()
    assert len(unfinished(cache)) == 1

    ensure_view(plan_of(tmp_path / "other"), cache)
    assert unfinished(cache) == []
    view = ensure_view(plan, cache, reserve_bytes=0)
    assert len(load_file(view / "w.safetensors")) == 24


def test_what_another_process_is_making_stays_for_a_day(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    making = cache / f".unfinished-{'ab' * 16}-word"
    making.mkdir(parents=True)
    (cache / ".locks").mkdir()
    with FileLock(cache / ".locks" / f"{'ab' * 16}.lock"):
        prune_views(cache)
        assert making.is_dir()
        os.utime(making, (time.time() - 90_000,) * 2)
        prune_views(cache)
        assert not making.exists()


def test_a_tensor_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "model")
    (weights,) = plan.weights
    wrong = replace(plan, weights=(replace(weights, recipes=(Recipe("q", (7, 4), "qkv"),)),))
    with pytest.raises(CheckpointDamaged, match=r"qkv.*\[12, 4\].*\[7, 4\]"):
        ensure_view(wrong, tmp_path / "cache")
    assert list_views(tmp_path / "cache") == () and unfinished(tmp_path / "cache") == []


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    needed = 96 + len("{}")
    with pytest.raises(CacheFull, match=rf"needs {needed} bytes .* \d+ are free"):
        ensure_view(plan_of(tmp_path / "model"), tmp_path / "cache", reserve_bytes=10**18)
    assert list_views(tmp_path / "cache") == () and unfinished(tmp_path / "cache") == []


@pytest.mark.parametrize("target", ["../out", "/etc/out", "vae/../../out", "C:out", "a\\..\\out", ""])
def test_no_name_leads_out_of_the_view(target: str, tmp_path: Path) -> None:
    plan = replace(plan_of(tmp_path / "model"), texts=(WrittenText(target, "x"),))
    with pytest.raises(CheckpointDamaged, match="leads out"):
        ensure_view(plan, tmp_path / "cache")
    assert not (tmp_path / "out").exists()


def refuse(_source: Path, _target: Path) -> None:
    raise OSError("this file system has none")


@pytest.mark.parametrize(
    ("ways", "kind"),
    [
        ((os.symlink, os.link, shutil.copy2), "symlink"),
        ((refuse, os.link, shutil.copy2), "hard link"),
        ((refuse, refuse, shutil.copy2), "copy"),
    ],
)
def test_where_links_are_refused_the_next_way_is_taken(
    ways: tuple[view_module.Link, ...], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_module, "LINKS", ways)
    plan = plan_of(tmp_path / "model")
    view = ensure_view(plan, tmp_path / "cache")
    target, source = view / "vae" / "model.safetensors", tmp_path / "model" / "vae" / "healthy.safetensors"
    assert target.read_bytes() == source.read_bytes()
    assert (target.is_symlink(), target.samefile(source)) == (kind == "symlink", kind != "copy")
    made = (view / WEIGHTS).stat().st_ino
    assert ensure_view(plan, tmp_path / "cache") == view and (view / WEIGHTS).stat().st_ino == made
    (listed,) = list_views(tmp_path / "cache")
    assert (listed.size_bytes >= source.stat().st_size) == (kind == "copy")


def test_the_longest_not_used_go_first_and_the_new_one_stays(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    texts = ["a" * 500, "b" * 500, "c" * 500]
    views = [ensure_view(plan_of(tmp_path / "model", text), cache) for text in texts]
    for view, last_used in zip(views, (2000, 1000, 3000), strict=True):
        os.utime(view / MANIFEST, (last_used, last_used))
    one = list_views(cache)[0].size_bytes
    newest = ensure_view(plan_of(tmp_path / "model", "d" * 500), cache, max_bytes=3 * one)
    assert {view.path for view in list_views(cache)} == {views[0], views[2], newest}
    only = ensure_view(plan_of(tmp_path / "model", "e" * 500), cache, max_bytes=1)
    # What was used within minutes may be being loaded just now.
    assert {view.path for view in list_views(cache)} == {newest, only}
    assert [view.path for view in views_to_prune(list_views(cache), one)] == [newest]
    assert {view.path for view in prune_views(cache, max_bytes=0)} == {newest, only}


def test_what_is_locked_is_not_removed(tmp_path: Path) -> None:
    view = ensure_view(plan_of(tmp_path / "model"), tmp_path / "cache")
    with FileLock(tmp_path / "cache" / ".locks" / f"{view.name}.lock"):
        assert prune_views(tmp_path / "cache", max_bytes=0) == ()
        assert view.is_dir()
    assert [gone.path for gone in prune_views(tmp_path / "cache", max_bytes=0)] == [view]


def test_the_key_sees_content_that_changed_at_the_same_size_and_time(tmp_path: Path) -> None:
    plan = sparse_plan(tmp_path / "model", tensors=2)
    file = tmp_path / "model" / "large.safetensors"
    stat, key = file.stat(), key_of(plan)
    for offset in (stat.st_size - 1, block_offsets(stat.st_size)[31] + 5):
        with file.open("r+b") as opened:
            opened.seek(offset)
            opened.write(b"\x01")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert key_of(plan) != key
        key = key_of(plan)


def test_the_key_is_that_of_plan_and_content_not_of_the_place(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "copy")
    assert key_of(plan_of(tmp_path / "copy")) == key_of(plan)
    (weights,) = plan.weights
    changes = (
        replace(plan, texts=(WrittenText("transformer/config.json", "{ }"),)),
        replace(plan, weights=(replace(weights, dtype="float16"),)),
        replace(plan, weights=(replace(weights, recipes=weights.recipes[:1]),)),
        replace(plan, linked=()),
    )
    assert len({key_of(changed) for changed in (plan, *changes)}) == 5


def test_a_file_of_the_hub_cache_is_known_by_its_name(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("5a" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"healthy")
    (tmp_path / "model.safetensors").symlink_to(blob)
    plan = ViewPlan("", tmp_path, (LinkedFile("m", tmp_path / "model.safetensors"),), (), ())
    key = key_of(plan)
    os.utime(blob, (1000, 1000))
    assert key_of(plan) == key
    blob.rename(blob.with_name("6b" * 32))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to(blob.with_name("6b" * 32))
    assert key_of(plan) != key


def test_twenty_gigabytes_get_a_key_in_well_under_a_second(tmp_path: Path) -> None:
    file = tmp_path / "large.bin"
    with file.open("wb") as opened:
        opened.truncate(20_000_000_000)
    began = time.perf_counter()
    key_of(ViewPlan("", tmp_path, (LinkedFile("m.bin", file),), (), ()))
    assert time.perf_counter() - began < 0.5
