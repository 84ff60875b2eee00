"""Downloads from a real hub on loopback: whole, gone on with, checked, and refused with a sentence."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from tests.stand_in_hub import StandInHub
from zimage_engine.errors import DownloadError, DownloadIncomplete, InvalidRequest
from zimage_engine.loading import hub_listing, hub_transfer
from zimage_engine.loading.hub import DownloadProgress, DownloadReport, download_model
from zimage_engine.loading.hub_listing import RemoteFile

MODEL = "someone/tiny-z-image"
SHARDS = (
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
)
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
MEBIBYTE = 1024 * 1024


def weights(name: str, megabytes: float, seed: int = 0) -> bytes:
    count = int(megabytes * MEBIBYTE / 4)
    return save({name: np.random.default_rng(seed).standard_normal(count, dtype=np.float32)})


def model_files() -> dict[str, bytes]:
    """A ZImagePipeline folder as publishers make it, with everything that should not be fetched."""
    first, second = (weights("layers.0.w", 3, 1), weights("layers.1.w", 2, 2))
    index = {
        "metadata": {},
        "weight_map": {"layers.0.w": Path(SHARDS[0]).name, "layers.1.w": Path(SHARDS[1]).name},
    }
    component = ["diffusers", "ZImageTransformer2DModel"]
    return {
        "model_index.json": json.dumps({"_class_name": "ZImagePipeline", "transformer": component}).encode(),
        "scheduler/scheduler_config.json": b'{"shift": 3.0}',
        "text_encoder/config.json": b'{"model_type": "qwen3"}',
        "text_encoder/model.safetensors": weights("embed", 0.5, 3),
        "text_encoder/pytorch_model.bin": b"a pickle",
        "tokenizer/tokenizer.json": b'{"version": "1.0"}' * 100,
        "tokenizer/empty.txt": b"",
        "transformer/config.json": b'{"dim": 64}',
        INDEX: json.dumps(index).encode(),
        SHARDS[0]: first,
        SHARDS[1]: second,
        "vae/config.json": b"{}",
        "vae/diffusion_pytorch_model.safetensors": weights("decoder", 0.2, 4),
        "vae/diffusion_pytorch_model.fp16.safetensors": weights("decoder", 0.1, 4),
        "README.md": "a model card, 模型卡".encode(),
        "assets/showcase.webp": b"RIFF",
        ".gitattributes": b"*.safetensors filter=lfs",
    }


NOT_WANTED = {
    "text_encoder/pytorch_model.bin",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "assets/showcase.webp",
    ".gitattributes",
}


@pytest.fixture(autouse=True)
def without_the_callers_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(variable, raising=False)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(hub_transfer, "WAITS_SECONDS", (0.01, 0.02, 0.05))


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    with StandInHub() as hub:
        hub.publish(MODEL, model_files())
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hf" / "hub"


def snapshot_files(report: DownloadReport) -> dict[str, bytes]:
    return {
        path.relative_to(report.path).as_posix(): path.read_bytes()
        for path in report.path.rglob("*")
        if path.is_file()
    }


def wanted_files() -> dict[str, bytes]:
    return {path: content for path, content in model_files().items() if path not in NOT_WANTED}


def offered(cache: Path) -> list[Path]:
    """The revisions by whose name the cache would give out a model."""
    return [path for path in cache.rglob("refs/*") if path.is_file()]


def test_a_whole_model_comes_into_the_cache_and_huggingface_hub_finds_it(
    hub: StandInHub, cache: Path
) -> None:
    seen: list[DownloadProgress] = []
    report = download_model(MODEL, endpoint=hub.endpoint, cache_dir=cache, on_progress=seen.append)

    assert snapshot_files(report) == wanted_files()
    assert {path for path, _ in report.left_out} == NOT_WANTED
    assert all(because for _, because in report.left_out)
    assert report.total_bytes == report.fetched_bytes == sum(map(len, wanted_files().values()))
    assert report.file_count == len(wanted_files())
    assert seen[-1].done_bytes == seen[-1].total_bytes
    for path in NOT_WANTED:
        assert hub.fetched(path) == []

    from huggingface_hub import snapshot_download, try_to_load_from_cache

    assert snapshot_download(MODEL, cache_dir=cache, local_files_only=True) == str(report.path)
    assert try_to_load_from_cache(MODEL, SHARDS[0], cache_dir=cache) == str(report.path / SHARDS[0])


def test_a_second_run_fetches_nothing(hub: StandInHub, cache: Path) -> None:
    download_model(MODEL, endpoint=hub.endpoint, cache_dir=cache)
    sent_bytes = hub.sent_bytes
    report = download_model(MODEL, endpoint=hub.endpoint, cache_dir=cache)
    assert report.fetched_bytes == 0
    assert hub.sent_bytes == sent_bytes
    assert snapshot_files(report) == wanted_files()


def test_a_line_that_breaks_off_is_gone_on_with_by_itself(hub: StandInHub, cache: Path) -> None:
    hub.faults.break_off[SHARDS[0]] = (700_000, 3)
    report = download_model(MODEL, endpoint=hub.endpoint, cache_dir=cache)

    assert snapshot_files(report) == wanted_files()
    asked = hub.fetched(SHARDS[0])
    assert [one.byte_range for one in asked] == [None, "bytes=700000-", "bytes=1400000-", "bytes=2100000-"]
    assert sum(one.sent_bytes for one in asked) == len(model_files()[SHARDS[0]])


def test_a_later_run_goes_on_from_the_bytes_that_arrived(hub: StandInHub, cache: Path) -> None:
    hub.faults.break_off[SHARDS[0]] = (500_000, 4)  # as often as the patience lasts: three waits
    with pytest.raises(DownloadError, match=r"broke off 4 times in a row.*2000000 of \d+ bytes are kept"):
        download_model(MODEL, endpoint=hub.endpoint, cache_dir=cache)
    assert offered(cache) == []

    hub.requests.clear()
    report = download_model(MODEL, endpoint=hub.endpoint, cache_dir=cache)
    assert snapshot_files(report) == wanted_files()
    (asked,) = hub.fetched(SHARDS[0])
    assert asked.byte_range == "bytes=2000000-"
    assert asked.sent_bytes == len(model_files()[SHARDS[0]]) - 2_000_000
    assert list(cache.rglob("*.incomplete")) == []


def test_patience_is_for_attempts_that_bring_little(hub: StandInHub, cache: Path) -> None:
    """A long file may break off more often than there are waits, as long as it gets on."""
    big = weights("w", 9)
    hub.publish(MODEL, {"model.safetensors": big})
    hub.faults.break_off["model.safetensors"] = (MEBIBYTE, 8)
    report = download_model(MODEL, endpoint=hub.endpoint, cache_dir=cache)
    assert (report.path / "model.safetensors").read_bytes() == big
    assert len(hub.fetched("model.safetensors")) == 9


def test_a_server_without_ranges_begins_again_and_the_file_is_right(hub: StandInHub, cache: Path) -> None:
    hub.faults.no_ranges = True
    hub.faults.break_off[SHARDS[1]] = (300_000, 2)
    report = download_model(MODEL, endpoint=hub.endpoint, cache_dir=cache)
    assert snapshot_files(report) == wanted_files()
    assert {one.status for one in hub.fetched(SHARDS[1])} == {200}


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_answer_that_means_not_now_is_waited_out(hub: StandInHub, cache: Path, status: int) -> None:
    hub.faults.refuse = {SHARDS[0]: (status, 2), "revision": (status, 1)}
    assert snapshot_files(download_model(MODEL, endpoint=hub.endpoint, cache_dir=cache)) == wanted_files()


@pytest.mark.parametrize(
    ("path", "kind"), [(SHARDS[1], "sha256"), ("transformer/config.json", "git-sha1"), (INDEX, "git-sha1")]
)
def test_a_file_that_was_altered_on_the_way_is_refused_and_removed(
    hub: StandInHub, cache: Path, path: str, kind: str
) -> None:
    hub.faults.corrupt[path] = 1
    with pytest.raises(DownloadIncomplete, match=rf"{path}: expected {kind} [0-9a-f]+, got [0-9a-f]+"):
        download_model(MODEL, endpoint=hub.endpoint, cache_dir=cache)
    assert offered(cache) == []
    assert list(cache.rglob(f"snapshots/*/{path}")) == []

    report = download_model(MODEL, endpoint=hub.endpoint, cache_dir=cache)
    assert snapshot_files(report) == wanted_files()
    assert [one.byte_range for one in hub.fetched(path)] == [None, None]


def test_a_part_left_by_other_content_is_thrown_away_and_the_file_fetched_whole(
    hub: StandInHub, cache: Path
) -> None:
    content = model_files()[SHARDS[0]]
    name = hashlib.sha256(content).hexdigest()
    part = cache / "models--someone--tiny-z-image" / "blobs" / f"{name}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"of an older time" * 1000)
    report = download_model(MODEL, endpoint=hub.endpoint, cache_dir=cache)
    assert snapshot_files(report) == wanted_files()
    assert [one.byte_range for one in hub.fetched(SHARDS[0])] == ["bytes=16000-", None]


def test_a_file_damaged_on_the_disk_is_fetched_anew(hub: StandInHub, cache: Path) -> None:
    report = download_model(MODEL, endpoint=hub.endpoint, cache_dir=cache)
    damaged = (report.path / SHARDS[0]).resolve()
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    cut = (report.path / "model_index.json").resolve()
    cut.write_bytes(b"{")
    hub.requests.clear()
    assert snapshot_files(download_model(MODEL, endpoint=hub.endpoint, cache_dir=cache)) == wanted_files()
    assert len(hub.fetched(SHARDS[0])) == len(hub.fetched("model_index.json")) == 1
    assert hub.fetched(SHARDS[1]) == []


def test_an_index_that_names_a_shard_nobody_has_is_found_before_the_weights_are_fetched(
    hub: StandInHub, cache: Path
) -> None:
    files = model_files()
    del files[SHARDS[1]]
    hub.publish(MODEL, files)
    with pytest.raises(DownloadIncomplete, match=rf"{INDEX} names 1 shard.*{SHARDS[1]}"):
        download_model(MODEL, endpoint=hub.endpoint, cache_dir=cache)
    assert hub.fetched(SHARDS[0]) == []
    assert offered(cache) == []


def test_an_index_may_call_for_a_file_that_would_have_been_left_out(hub: StandInHub, cache: Path) -> None:
    files = model_files()
    files["text_encoder/model.safetensors.index.json"] = json.dumps(
        {"weight_map": {"a": "model.safetensors", "b": "pytorch_model.bin"}}
    ).encode()
    hub.publish(MODEL, files)
    report = download_model(MODEL, endpoint=hub.endpoint, cache_dir=cache)
    assert (report.path / "text_encoder/pytorch_model.bin").read_bytes() == b"a pickle"


def test_a_file_that_the_hub_announced_but_does_not_give_is_an_error(hub: StandInHub, cache: Path) -> None:
    hub.faults.missing.add(SHARDS[1])
    with pytest.raises(DownloadError, match="announced"):
        download_model(MODEL, endpoint=hub.endpoint, cache_dir=cache)
    assert offered(cache) == []


def test_dest_becomes_a_plain_folder_and_nothing_else_is_left_there(hub: StandInHub, tmp_path: Path) -> None:
    dest = tmp_path / "models" / "tiny"
    hub.faults.break_off[SHARDS[0]] = (500_000, 4)
    with pytest.raises(DownloadError):
        download_model(MODEL, endpoint=hub.endpoint, dest=dest)
    assert not (dest / SHARDS[0]).exists()
    hub.requests.clear()

    report = download_model(MODEL, endpoint=hub.endpoint, dest=dest)
    assert report.path == dest
    assert snapshot_files(report) == wanted_files()
    assert not any(path.is_symlink() for path in dest.rglob("*"))
    assert hub.fetched(SHARDS[0])[0].byte_range is not None

    hub.requests.clear()
    assert download_model(MODEL, endpoint=hub.endpoint, dest=dest).fetched_bytes == 0
    assert hub.sent_bytes == 0


def test_a_revision_is_fetched_by_its_name_and_by_its_commit(hub: StandInHub, cache: Path) -> None:
    old = {**model_files(), "transformer/config.json": b'{"dim": 32}'}
    commit = hub.publish(MODEL, old, revision="v1.0")
    by_name = download_model(MODEL, "v1.0", endpoint=hub.endpoint, cache_dir=cache)
    assert by_name.commit == commit
    assert (by_name.path / "transformer/config.json").read_bytes() == b'{"dim": 32}'
    assert [path.name for path in offered(cache)] == ["v1.0"]

    sent_bytes = hub.sent_bytes
    assert download_model(MODEL, commit, endpoint=hub.endpoint, cache_dir=cache).path == by_name.path
    assert hub.sent_bytes == sent_bytes
    main = download_model(MODEL, endpoint=hub.endpoint, cache_dir=cache)
    assert main.fetched_bytes == len(model_files()["transformer/config.json"])  # the rest is shared


def test_a_new_commit_that_fails_leaves_the_old_one_offered(hub: StandInHub, cache: Path) -> None:
    first = download_model(MODEL, endpoint=hub.endpoint, cache_dir=cache)
    hub.publish(MODEL, {**model_files(), SHARDS[1]: weights("layers.1.w", 2, 99)})
    hub.faults.corrupt[SHARDS[1]] = 1
    with pytest.raises(DownloadIncomplete):
        download_model(MODEL, endpoint=hub.endpoint, cache_dir=cache)
    (ref,) = offered(cache)
    assert ref.read_text() == first.commit
    assert snapshot_files(first) == wanted_files()


def test_large_files_may_lie_on_another_host_and_the_token_stays_with_the_hub(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with StandInHub() as storage, StandInHub(storage=storage.endpoint) as hub:
        storage.publish(MODEL, model_files())
        hub.publish(MODEL, model_files(), token="hf_secret")
        storage.faults.break_off[SHARDS[0]] = (1_500_000, 1)
        report = download_model(MODEL, endpoint=hub.endpoint, cache_dir=cache)
        assert snapshot_files(report) == wanted_files()
        assert {asked.authorization for asked in hub.requests} == {"Bearer hf_secret"}
        assert {asked.authorization for asked in storage.requests} == {None}
        assert [asked.byte_range for asked in storage.fetched(SHARDS[0])] == [None, "bytes=1500000-"]


def test_the_endpoint_of_the_environment_is_read_at_the_call(
    hub: StandInHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint + "/")
    assert download_model(MODEL, cache_dir=cache).file_count == len(wanted_files())


@pytest.mark.parametrize(
    ("model_id", "revision", "token", "sentence"),
    [
        ("someone/else", None, None, "there is no model someone/else at .*HF_TOKEN"),
        (MODEL, "v9", None, "has no revision v9: give --revision"),
        ("someone/private", None, None, "no model someone/private .* or it is private"),
        ("someone/private", None, "hf_wrong", "did not accept the token"),
        ("someone/gated", None, None, "is gated: open http.*/someone/gated in a browser"),
        ("someone/gated", None, "hf_wrong", "is gated: open http.*/someone/gated in a browser"),
        ("someone/nothing", None, None, "holds no files"),
        ("someone/climber", None, None, "outside the model's own folder"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_sentence(
    hub: StandInHub,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_id: str,
    revision: str | None,
    token: str | None,
    sentence: str,
) -> None:
    hub.publish("someone/private", model_files(), token="hf_secret")
    hub.publish("someone/gated", model_files(), token="hf_secret", gated=True)
    hub.publish("someone/nothing", {})
    hub.publish("someone/climber", {"../../.bashrc": b"rm"})
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(DownloadError, match=sentence) as refused:
        download_model(model_id, revision, endpoint=hub.endpoint, cache_dir=cache)
    assert "\n" not in str(refused.value)
    assert offered(cache) == []


@pytest.mark.parametrize("model_id", ["https://huggingface.co/a/b", "a/b/c", "", "so me/thing", "../models"])
def test_what_is_no_id_is_refused_as_the_callers_mistake(hub: StandInHub, cache: Path, model_id: str) -> None:
    with pytest.raises(InvalidRequest, match="owner/name"):
        download_model(model_id, endpoint=hub.endpoint, cache_dir=cache)


def test_no_network_and_no_hub_are_told_apart(hub: StandInHub, cache: Path) -> None:
    with pytest.raises(DownloadError, match=r"could not reach http://127.0.0.1:9 .*HF_ENDPOINT"):
        download_model(MODEL, endpoint="http://127.0.0.1:9", cache_dir=cache)
    with pytest.raises(DownloadError, match="is not a model hub"):
        download_model(MODEL, endpoint=hub.endpoint + "/some/page", cache_dir=cache)


def test_offline_mode_is_named_as_the_reason(
    hub: StandInHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        download_model(MODEL, endpoint=hub.endpoint, cache_dir=cache)


def test_a_disk_that_is_too_small_is_found_before_anything_is_fetched(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zimage_engine.loading import hub as hub_module

    monkeypatch.setattr(hub_module, "SPARE_BYTES", 10**18)  # no disk of today leaves an exabyte free
    with pytest.raises(
        DownloadError, match=r"needs [\d.]+ GB more on the disk of .* are free: free .* or choose"
    ):
        download_model(MODEL, endpoint=hub.endpoint, dest=tmp_path / "new" / "folder")
    assert hub.sent_bytes == 0
    assert not (tmp_path / "new" / "folder").exists()


def test_dest_that_is_a_file_or_cannot_be_written_is_refused(hub: StandInHub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InvalidRequest, match="must be a folder"):
        download_model(MODEL, endpoint=hub.endpoint, dest=tmp_path / "file")
    with pytest.raises(DownloadError, match="could not write"):
        download_model(MODEL, endpoint=hub.endpoint, dest=tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


def test_two_downloads_to_one_place_do_not_mix(hub: StandInHub, cache: Path) -> None:
    hub.faults.pause_seconds = 0.05
    first = start_download(hub, cache)
    try:
        wait_until(lambda: any(cache.rglob("*.incomplete")))
        with pytest.raises(DownloadError, match=r"another download of someone/tiny-z-image .* is running"):
            download_model(MODEL, endpoint=hub.endpoint, cache_dir=cache)
        hub.faults.pause_seconds = 0.0
        assert first.wait(60) == 0
    finally:
        first.kill()
        first.wait()


def test_ctrl_c_keeps_what_arrived_says_so_and_the_next_run_goes_on(hub: StandInHub, cache: Path) -> None:
    hub.faults.pause_seconds = 0.1  # long enough for the signal to come in time on a crowded machine
    process = start_download(hub, cache)
    try:
        wait_until(lambda: any(part.stat().st_size > 500_000 for part in cache.rglob("*.incomplete")))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "run it again to go on from there" in said
    assert "Traceback" not in said
    assert offered(cache) == []
    kept_bytes = sum(part.stat().st_size for part in cache.rglob("*.incomplete"))
    assert kept_bytes > 500_000

    hub.faults.pause_seconds = 0.0
    report = download_model(MODEL, endpoint=hub.endpoint, cache_dir=cache)
    assert snapshot_files(report) == wanted_files()
    assert report.fetched_bytes <= report.total_bytes - kept_bytes


def start_download(hub: StandInHub, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "serve_app.cli", "download", "--model", MODEL],
        env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell lets what it starts in the background ignore Ctrl-C, and so would all that is started below.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_until(happened: object, timeout_seconds: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        try:
            if happened():  # type: ignore[operator]
                return
        except FileNotFoundError:  # a part that was just moved to its place
            pass
        time.sleep(0.02)
    pytest.fail(f"it did not happen within {timeout_seconds} s")


LEFT_OUT_CASES = [
    # (files of the model, those of them that are left out)
    ({"unet/a.bin", "unet/a.safetensors"}, {"unet/a.bin"}),
    ({"unet/a.bin", "vae/a.safetensors"}, set()),
    ({"a.ckpt"}, set()),
    ({"m/pytorch_model.bin.index.json", "m/model.safetensors"}, {"m/pytorch_model.bin.index.json"}),
    ({"m/model.fp16.safetensors"}, set()),
    ({"m/model.fp16.safetensors", "m/model.safetensors"}, {"m/model.fp16.safetensors"}),
    (
        {
            "m/model.fp16-00001-of-00002.safetensors",
            "m/model.safetensors.index.fp16.json",
            "m/model-00001-of-00003.safetensors",
            "m/model.safetensors.index.json",
        },
        {"m/model.fp16-00001-of-00002.safetensors", "m/model.safetensors.index.fp16.json"},
    ),
    ({"whole.safetensors", "model_index.json", "unet/a.safetensors"}, {"whole.safetensors"}),
    ({"whole.safetensors"}, set()),
    ({"lora/pytorch_lora_weights.safetensors", "model_index.json"}, set()),
    ({"unet/model.onnx", "unet/openvino_model.xml", "flax_model.msgpack"}, None),
    ({"vae/config.json", "tokenizer/merges.txt", "tokenizer/spiece.model", "README.md"}, set()),
]


@pytest.mark.parametrize(("paths", "left"), LEFT_OUT_CASES)
def test_what_is_left_out_depends_on_what_else_is_there(paths: set[str], left: set[str] | None) -> None:
    choice = hub_listing.choose(RemoteFile(path, 1, "sha256", path) for path in sorted(paths))
    assert {file.path for file, _ in choice.left_out} == (paths if left is None else left)
    assert {file.path for file in choice.wanted} == paths - (paths if left is None else left)
