"""Measures how many bytes of activations each stage of the published models needs, without weights or a GPU.

    python -m tests.benchmarks.activation_bytes [--family z-image-turbo] [--json FILE]

The real diffusers and transformers classes run in their published configuration on tensors that have a shape
and no values (torch's FakeTensorMode). Every storage that an operation makes is counted from its making until
the last tensor on it is gone; what stood before the call (weights, inputs) is not counted. Beside each figure
stands what `zimage_engine.memory.activations` predicts.

Not seen: workspaces inside kernels (cuDNN's convolutions above all), the allocator's rounding, fragmentation,
the CUDA context. `fused` counts attention as the fused kernels need it, `plain` as the matrix of all pairs.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from zimage_engine.families import ModelFamily, family_named
from zimage_engine.memory.activations import activation_bytes, decode_bytes, encode_bytes
from zimage_engine.memory.published import PUBLISHED_CONFIGS

SIZES_PX = ((512, 512), (768, 1024), (1024, 1024), (1536, 1024), (2048, 2048))
FAMILIES = ("z-image-turbo", "sdxl", "pixart-sigma")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made inside it; `peak_bytes` is the most that lived at one moment."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def know(self, tensors: Iterable[torch.Tensor]) -> None:
        """What is there already: not counted."""
        for tensor in tensors:
            self._known.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage)
        weakref.finalize(storage, self._forget, size)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, size: int) -> None:
        self.live_bytes -= size


class FusedAttention(TorchFunctionMode):
    """Attention as the fused kernels need it: the answer and one float32 for each row, no matrix of pairs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = _attention_arguments(args, kwargs)
        query, value = given["query"], given["value"]
        batch, heads, length, _ = query.shape
        _rows = torch.empty(batch, heads, length, dtype=torch.float32)
        # The kernels answer with the heads beside the width, so that the transposition after them is a view.
        answer = torch.empty(batch, length, heads, value.shape[-1], dtype=query.dtype)
        return answer.transpose(1, 2)


def _attention_arguments(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> dict[str, Any]:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    return {**dict(zip(names, args, strict=False)), **(kwargs or {})}


class PlainAttention(TorchFunctionMode):
    """Attention as torch's math kernel does it, with the matrix of all pairs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = _attention_arguments(args, kwargs)
        query, key, value = given.pop("query"), given.pop("key"), given.pop("value")
        return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, **given)[0]


def peak_bytes(module: torch.nn.Module, call: Callable[[], Any], plain: bool = False) -> int:
    """The most bytes that one call has at a time beside what is there already."""
    attention: AbstractContextManager[Any] = PlainAttention() if plain else FusedAttention()
    counted = LiveBytes()
    counted.know([*module.parameters(), *module.buffers()])
    with torch.no_grad(), attention, counted:
        call()
    return counted.peak_bytes


def build(class_name: str, config: Mapping[str, Any]) -> torch.nn.Module:
    """The class in its published configuration, bfloat16, without values."""
    import diffusers
    import transformers

    # A module of fake tensors cannot be cast afterwards.
    torch.set_default_dtype(torch.bfloat16)
    try:
        if hasattr(diffusers, class_name):
            known = getattr(diffusers, class_name)
            module = known.from_config(dict(config))
        else:
            known = getattr(transformers, class_name)
            module = known(known.config_class(**config))
    finally:
        torch.set_default_dtype(torch.float32)
    return module.eval()


def z_image(module: torch.nn.Module, width: int, height: int, batch: int, tokens: int) -> Callable[[], Any]:
    latents = [torch.empty(16, 1, height // 8, width // 8, dtype=torch.bfloat16) for _ in range(batch)]
    # Two prompts of different length: the shorter one is masked.
    captions = [torch.empty(tokens if i == 0 else 32, 2560, dtype=torch.bfloat16) for i in range(batch)]
    times = torch.empty(batch, dtype=torch.float32)
    return lambda: module(latents, times, captions, return_dict=False)


def pixart(module: torch.nn.Module, width: int, height: int, batch: int, tokens: int) -> Callable[[], Any]:
    latents = torch.empty(batch, 4, height // 8, width // 8, dtype=torch.bfloat16)
    captions = torch.empty(batch, tokens, 4096, dtype=torch.bfloat16)
    mask = torch.empty(batch, tokens, dtype=torch.bfloat16)
    return lambda: module(
        latents,
        encoder_hidden_states=captions,
        encoder_attention_mask=mask,
        timestep=torch.empty(batch, dtype=torch.int64),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )


def sdxl(module: torch.nn.Module, width: int, height: int, batch: int, tokens: int) -> Callable[[], Any]:
    latents = torch.empty(batch, 4, height // 8, width // 8, dtype=torch.bfloat16)
    captions = torch.empty(batch, tokens, 2048, dtype=torch.bfloat16)
    added = {"text_embeds": torch.empty(batch, 1280, dtype=torch.bfloat16), "time_ids": torch.empty(batch, 6)}
    return lambda: module(
        latents, torch.empty((), dtype=torch.float32), captions, added_cond_kwargs=added, return_dict=False
    )


CALLS = {"z-image-turbo": z_image, "pixart-sigma": pixart, "sdxl": sdxl}


#: Blocks that are left of a row of equal ones: each frees what it made before the next begins, so the others
#: add nothing to the peak (`--all-blocks` shows it). A unet's blocks differ, and all of them are run.
FEW_BLOCKS = {"n_layers": 2, "num_layers": 2}


def measured_rows(
    family: ModelFamily, sizes: Iterable[tuple[int, int]], all_blocks: bool
) -> Iterable[dict[str, Any]]:
    """One row for every stage, size, guidance, attention and tile."""
    yield from _decode_rows(family, sizes)
    yield from _encode_rows(family)
    yield from _denoise_rows(family, sizes, all_blocks)


def _denoise_rows(
    family: ModelFamily, sizes: Iterable[tuple[int, int]], all_blocks: bool
) -> Iterable[dict[str, Any]]:
    class_name, config = PUBLISHED_CONFIGS[family.name][family.denoiser]
    fewer = {key: count for key, count in FEW_BLOCKS.items() if key in config and not all_blocks}
    tokens = family.caption_tokens(config)
    denoiser = build(class_name, {**config, **fewer})
    for width, height in sizes:
        for guided, plain in ((False, False), (True, False), (False, True)):
            call = CALLS[family.name](denoiser, width, height, 1 + guided, tokens)
            yield {
                "stage": "denoise",
                "attention": "plain" if plain else "fused",
                "width": width,
                "height": height,
                "guided": guided,
                "measured_bytes": peak_bytes(denoiser, call, plain),
                "predicted_bytes": activation_bytes(
                    family, config, width, height, guided, plain_attention=plain
                ),
            }


def _decode_rows(family: ModelFamily, sizes: Iterable[tuple[int, int]]) -> Iterable[dict[str, Any]]:
    class_name, config = PUBLISHED_CONFIGS[family.name]["vae"]
    vae: Any = build(class_name, config)
    for tile in (None, 512, 256):
        if tile is not None:
            vae.enable_tiling()
            vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // 8
        for width, height in sizes:
            latents = torch.empty(1, config["latent_channels"], height // 8, width // 8, dtype=torch.bfloat16)
            call = functools.partial(vae.decode, latents, return_dict=False)
            for plain in (False, True):
                yield {
                    "stage": "decode",
                    "attention": "plain" if plain else "fused",
                    "width": width,
                    "height": height,
                    "tile": tile,
                    "measured_bytes": peak_bytes(vae, call, plain),
                    "predicted_bytes": decode_bytes(config, width, height, tile, plain_attention=plain),
                }


def _encode_rows(family: ModelFamily) -> Iterable[dict[str, Any]]:
    configs = PUBLISHED_CONFIGS[family.name]
    tokens = family.caption_tokens(configs[family.denoiser][1])
    for _, name in family.text_encoders:
        class_name, config = configs[name]
        encoder = build(class_name, config)
        length = min(tokens, config.get("max_position_embeddings", tokens))
        ids = torch.empty(1, length, dtype=torch.int64)
        mask = torch.empty(1, length, dtype=torch.int64)
        call = functools.partial(encoder, input_ids=ids, attention_mask=mask, output_hidden_states=True)
        yield {
            "stage": f"encode by {name}",
            "tokens": length,
            "measured_bytes": peak_bytes(encoder, call),
            "predicted_bytes": encode_bytes(family, name, config, configs[family.denoiser][1]),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--family", choices=FAMILIES, action="append")
    parser.add_argument("--size", action="append", help="such as 1024x1024; several may be given")
    parser.add_argument("--all-blocks", action="store_true", help="run every block of the transformers")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    given = [size.split("x") for size in chosen.size or ()]
    sizes = [(int(width), int(height)) for width, height in given] or list(SIZES_PX)
    found = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name in chosen.family or FAMILIES:
            for row in measured_rows(family_named(name), sizes, chosen.all_blocks):
                found.append({"family": name, **row})
                error = row["predicted_bytes"] / row["measured_bytes"] - 1
                words = " ".join(f"{key}={value}" for key, value in row.items())
                sys.stdout.write(f"{name} {words} error={error:+.1%}\n")
                sys.stdout.flush()
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
