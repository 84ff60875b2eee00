"""One random LoRA written in every layout that trainers use, drawn with, and taken off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, ZImagePipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

from tests.zimage_engine.tiny_models import write_tiny_sdxl
from zimage_engine.errors import CheckpointDamaged, CheckpointNotFound, InvalidRequest
from zimage_engine.loading.lora import apply_loras, remove_loras
from zimage_engine.loading.lora_weight import LoraWeight

Pair = tuple[torch.Tensor, torch.Tensor]
Tensors = dict[str, torch.Tensor]

RANK = 4
#: A power of two below the rank: scaling by it is exact in every dtype.
ALPHA = 2.0
WEIGHT = 0.5
PEFT_ENDS = (".lora_A.weight", ".lora_B.weight")
KOHYA_ENDS = (".lora_down.weight", ".lora_up.weight")


def random_lora(pipeline: Any, seed: int = 0) -> dict[str, Pair]:
    """A and B for every linear layer of the denoiser; q, k and v share A, as a fused layer's do."""
    generator = torch.Generator().manual_seed(seed)
    pairs: dict[str, Pair] = {}
    for path, module in pipeline.transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            out_width, in_width = module.weight.shape
            block, _, last = path.rpartition(".")
            a = torch.randn(RANK, in_width, generator=generator) * in_width**-0.5
            if last in ("to_k", "to_v"):
                a = pairs[f"{block}.to_q"][0]
            pairs[path] = (a, torch.randn(out_width, RANK, generator=generator) * RANK**-0.5)
    return pairs


def fused(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """The same with q, k and v in one and the single-file names."""
    joined: dict[str, Pair] = {}
    for path, (a, b) in pairs.items():
        block, _, last = path.rpartition(".")
        if last == "to_q":
            joined[f"{block}.qkv"] = (a, torch.cat([pairs[f"{block}.to_{name}"][1] for name in "qkv"]))
        elif last not in ("to_k", "to_v"):
            joined[single_file_name(path)] = (a, b)
    return joined


def single_file_name(path: str) -> str:
    for ours, theirs in (
        ("to_out.0", "out"),
        ("all_x_embedder.2-1", "x_embedder"),
        ("all_final_layer.2-1", "final_layer"),
    ):
        path = path.replace(ours, theirs)
    return path


def written(
    prefix: str, ends: tuple[str, str], with_alpha: bool = True, flat: bool = False, join: bool = False
) -> Callable[[Mapping[str, Pair]], Tensors]:
    """Writes the LoRA in one layout; without alpha, alpha / rank is in A as PEFT's convention wants."""

    def write(pairs: Mapping[str, Pair]) -> Tensors:
        tensors: Tensors = {}
        for path, (a, b) in (fused(pairs) if join else pairs).items():
            stem = prefix + (path.replace(".", "_") if flat else path)
            tensors[stem + ends[0]] = (a if with_alpha else a * (ALPHA / RANK)).clone()
            tensors[stem + ends[1]] = b.clone()
            if with_alpha:
                tensors[stem + ".alpha"] = torch.tensor(ALPHA)
        return tensors

    return write


def with_duplicates(pairs: Mapping[str, Pair]) -> Tensors:
    """Split layers under dotted names and the fused ones again beside them."""
    ends = (".lora.down.weight", ".lora.up.weight")
    split = written("diffusion_model.", ends)(pairs)
    renamed = {name.replace(".to_q.", ".to.q.").replace(".to_k.", ".to.k."): t for name, t in split.items()}
    return {
        **renamed,
        **written("diffusion_model.", ends, join=True)(pairs),
    }


LAYOUTS: dict[str, Callable[[Mapping[str, Pair]], Tensors]] = {
    "bare": written("", PEFT_ENDS, with_alpha=False),
    "transformer": written("transformer.", PEFT_ENDS, with_alpha=False),
    "transformer, alpha": written("transformer.", PEFT_ENDS),
    "transformer, down/up": written("transformer.", KOHYA_ENDS),
    "diffusion_model": written("diffusion_model.", PEFT_ENDS, with_alpha=False),
    "diffusion_model, down/up": written("diffusion_model.", KOHYA_ENDS),
    "diffusion_model, fused": written("diffusion_model.", PEFT_ENDS, with_alpha=False, join=True),
    "model.diffusion_model": written("model.diffusion_model.", PEFT_ENDS, with_alpha=False),
    "model.diffusion_model, fused, down/up": written("model.diffusion_model.", KOHYA_ENDS, join=True),
    "base_model.model": written("base_model.model.", PEFT_ENDS, with_alpha=False),
    "default": written("", (".lora_A.default.weight", ".lora_B.default.weight"), with_alpha=False),
    "lora_unet": written("lora_unet_", KOHYA_ENDS, flat=True),
    "lora_unet, fused": written("lora_unet_", KOHYA_ENDS, flat=True, join=True),
    "lora_unet__": written("lora_unet__", KOHYA_ENDS, flat=True),
    "lora_transformer": written("lora_transformer_", KOHYA_ENDS, flat=True),
    "lycoris": written("lycoris_", KOHYA_ENDS, flat=True),
    "lycoris, fused": written("lycoris_", KOHYA_ENDS, flat=True, join=True),
    "duplicates": with_duplicates,
}


@pytest.fixture(scope="module")
def shared_pipeline(tiny_model: Path) -> Any:
    return ZImagePipeline.from_pretrained(tiny_model, torch_dtype=torch.float32)


@pytest.fixture
def pipeline(shared_pipeline: Any) -> Iterator[Any]:
    yield shared_pipeline
    remove_loras(shared_pipeline)


@pytest.fixture(scope="module")
def plain(shared_pipeline: Any) -> torch.Tensor:
    remove_loras(shared_pipeline)
    return draw(shared_pipeline)


def draw(pipeline: Any) -> torch.Tensor:
    drawn = pipeline(
        prompt="a red circle",
        height=64,
        width=64,
        num_inference_steps=2,
        guidance_scale=0.0,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    )
    return drawn.images


def by_hand(folder: Path, *loras: tuple[Mapping[str, Pair], float]) -> torch.Tensor:
    """The picture of a pipeline whose weights are W + scale * B @ A."""
    pipeline = ZImagePipeline.from_pretrained(folder, torch_dtype=torch.float32)
    for pairs, scale in loras:
        for path, (a, b) in pairs.items():
            pipeline.transformer.get_submodule(path).weight.data += scale * (b @ a)
    return draw(pipeline)


def peft_layers(pipeline: Any) -> list[str]:
    return [
        path for path, module in pipeline.transformer.named_modules() if isinstance(module, BaseTunerLayer)
    ]


@pytest.fixture(scope="module")
def expected(tiny_model: Path, shared_pipeline: Any) -> torch.Tensor:
    return by_hand(tiny_model, (random_lora(shared_pipeline), WEIGHT * ALPHA / RANK))


@pytest.fixture(scope="module")
def reference(shared_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The picture with the layout that diffusers itself writes."""
    file = tmp_path_factory.mktemp("lora") / "reference.safetensors"
    save_file(LAYOUTS["transformer"](random_lora(shared_pipeline)), file)
    apply_loras(shared_pipeline, [LoraWeight(file, WEIGHT)])
    picture = draw(shared_pipeline)
    remove_loras(shared_pipeline)
    return picture


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_draws_the_same_picture_and_leaves_no_trace(
    layout: str,
    pipeline: Any,
    plain: torch.Tensor,
    expected: torch.Tensor,
    reference: torch.Tensor,
    tmp_path: Path,
) -> None:
    pairs = random_lora(pipeline)
    file = tmp_path / "a.safetensors"
    save_file(LAYOUTS[layout](pairs), file)

    (report,) = apply_loras(pipeline, [LoraWeight(file, WEIGHT)])
    drawn = draw(pipeline)
    assert report.adapted_modules == len(pairs) == len(peft_layers(pipeline))
    assert not torch.allclose(drawn, plain, atol=1e-2)
    assert torch.allclose(drawn, expected, atol=1e-3)
    assert torch.equal(drawn, reference)

    remove_loras(pipeline)
    assert peft_layers(pipeline) == []
    assert torch.equal(draw(pipeline), plain)


def test_two_loras_add_up_with_their_weights_in_one_call_or_two(
    pipeline: Any, tiny_model: Path, tmp_path: Path
) -> None:
    one, two = random_lora(pipeline, 1), random_lora(pipeline, 2)
    # The second has another rank and only some of the modules.
    two = {path: (a[:2], b[:, :2]) for path, (a, b) in two.items() if "attention" in path}
    two |= {path: pair for path, pair in random_lora(pipeline, 3).items() if path.endswith("w1")}
    files = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_file(LAYOUTS["lora_unet"](one), files[0])
    save_file(
        {f"{p}{end}": t.clone() for p, pair in two.items() for end, t in zip(PEFT_ENDS, pair, strict=True)},
        files[1],
    )
    expected = by_hand(tiny_model, (one, 0.5 * ALPHA / RANK), (two, -0.25))

    reports = apply_loras(pipeline, [LoraWeight(files[0], 0.5), LoraWeight(files[1], -0.25)])
    together = draw(pipeline)
    assert [report.adapted_modules for report in reports] == [len(one), len(two)]
    assert torch.allclose(together, expected, atol=1e-3)

    remove_loras(pipeline)
    apply_loras(pipeline, [LoraWeight(files[0], 0.5)])
    apply_loras(pipeline, [LoraWeight(files[1], -0.25)])
    assert torch.equal(draw(pipeline), together)


def test_a_failed_call_leaves_the_pipeline_as_it_was(
    pipeline: Any, plain: torch.Tensor, tmp_path: Path
) -> None:
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    tensors = LAYOUTS["transformer"](random_lora(pipeline))
    save_file(tensors, good)
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, bad)

    with pytest.raises(CheckpointDamaged, match="not finite"):
        apply_loras(pipeline, [LoraWeight(good), LoraWeight(bad)])
    assert peft_layers(pipeline) == []
    assert torch.equal(draw(pipeline), plain)

    apply_loras(pipeline, [LoraWeight(good, WEIGHT)])
    before = draw(pipeline)
    with pytest.raises(CheckpointDamaged, match="not finite"):
        apply_loras(pipeline, [LoraWeight(good), LoraWeight(bad)])
    assert torch.equal(draw(pipeline), before)


def test_adapters_take_the_denoisers_dtype(tiny_model: Path, tmp_path: Path) -> None:
    pipeline = ZImagePipeline.from_pretrained(tiny_model, torch_dtype=torch.bfloat16)
    file = tmp_path / "a.safetensors"
    save_file(LAYOUTS["bare"](random_lora(pipeline)), file)
    apply_loras(pipeline, [LoraWeight(file)])
    assert {parameter.dtype for parameter in pipeline.transformer.parameters()} == {torch.bfloat16}


def test_files_that_do_not_fit_are_refused(pipeline: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(LAYOUTS["bare"](random_lora(pipeline)), file)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointDamaged, match="bytes"):
        apply_loras(pipeline, [LoraWeight(file)])
    torch.save({"a": torch.ones(1)}, tmp_path / "a.bin")
    with pytest.raises(CheckpointDamaged, match="pickle"):
        apply_loras(pipeline, [LoraWeight(tmp_path / "a.bin")])
    with pytest.raises(CheckpointNotFound, match="no LoRA at"):
        apply_loras(pipeline, [LoraWeight(tmp_path / "none.safetensors")])
    with pytest.raises(InvalidRequest, match="finite"):
        LoraWeight(file, float("nan"))
    assert peft_layers(pipeline) == []


def test_sdxl_goes_through_diffusers_and_is_counted(tmp_path: Path, pipeline: Any) -> None:
    sdxl = StableDiffusionXLPipeline.from_pretrained(
        write_tiny_sdxl(tmp_path / "sdxl"), torch_dtype=torch.float32
    )
    tensors: Tensors = {}
    for path, module in sdxl.unet.named_modules():
        if isinstance(module, torch.nn.Linear) and "attn" in path:
            stem = "lora_unet_" + path.replace(".", "_")
            tensors[f"{stem}.lora_down.weight"] = torch.randn(RANK, module.in_features)
            tensors[f"{stem}.lora_up.weight"] = torch.randn(module.out_features, RANK)
            tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
    file = tmp_path / "a.safetensors"
    save_file(tensors, file)
    (report,) = apply_loras(sdxl, [LoraWeight(file, WEIGHT)])
    assert report.adapted_modules == len(tensors) // 3 > 0
    layers = [module for module in sdxl.unet.modules() if isinstance(module, BaseTunerLayer)]
    assert {layer.scaling[report.adapter_name] for layer in layers} == {WEIGHT * ALPHA / RANK}

    remove_loras(sdxl)
    for layout in ("bare", "transformer", "lora_unet"):
        save_file(LAYOUTS[layout](random_lora(pipeline)), file)
        with pytest.raises(CheckpointDamaged, match="take one made for this model"):
            apply_loras(sdxl, [LoraWeight(file)])
    assert not any(isinstance(module, BaseTunerLayer) for module in sdxl.unet.modules())
