"""LoRAs with random weights, made with PEFT and written by diffusers itself."""

from __future__ import annotations

from pathlib import Path

#: What attention is adapted in; any model with diffusers' names has them.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def write_lora(
    model: Path, file: Path, seed: int = 0, modules: tuple[str, ...] = ATTENTION, strength: float = 0.5
) -> Path:
    """A LoRA of rank 4 for the denoiser of the Z-Image or SDXL folder `model`; returns `file`."""
    import torch
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel, ZImagePipeline
    from diffusers.models import ZImageTransformer2DModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    part, model_class, pipeline_class = (
        ("unet", UNet2DConditionModel, StableDiffusionXLPipeline)
        if (model / "unet").is_dir()
        else ("transformer", ZImageTransformer2DModel, ZImagePipeline)
    )
    denoiser = model_class.from_pretrained(model / part, torch_dtype=torch.bfloat16)
    denoiser.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=list(modules)))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in denoiser.named_parameters():
        if ".lora_" in name:
            # PEFT starts with B at zero, as one does before training.
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * strength
    file.parent.mkdir(parents=True, exist_ok=True)
    pipeline_class.save_lora_weights(
        file.parent,
        **{f"{part}_lora_layers": get_peft_model_state_dict(denoiser)},
        weight_name=file.name,
    )
    return file
