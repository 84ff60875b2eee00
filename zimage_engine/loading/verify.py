"""Looks at a loaded pipeline for the damage that diffusers and transformers pass over in silence.

Knows nothing of where the files came from. Every check raises CheckpointDamaged with a sentence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch

from zimage_engine.errors import CheckpointDamaged
from zimage_engine.loading.finite import is_finite, not_finite
from zimage_engine.loading.plan import LoadPlan

#: Words that any tokenizer of a text-to-image model knows something of, in the two languages we speak.
PROBE = "a red circle on a white background, 白色背景上的红色圆形"

#: Published files were saved when the class kept its model under this name; transformers reads both ways.
_OLDER_PREFIXES = {"CLIPTextModel": "text_model.", "CLIPTextModelWithProjection": "text_model."}


def verify(pipeline: Any, plan: LoadPlan) -> None:
    """Check that `pipeline` is what the files of `plan` say, and could draw.

    Its weights are those of the files by name, none was left on the meta device, all are of one dtype and
    finite; the tokenizer makes ids that the text encoder has embeddings for.
    """
    dtype = getattr(torch, plan.family.dtype)
    for name, files in plan.weights.items():
        module = getattr(pipeline, name)
        if all(file.form == "safetensors" for file in files):  # a pickle has no header to read names from
            check_names(name, module, {tensor.name for file in files for tensor in file.tensors})
        check_no_meta(name, module)
        check_dtype(name, module, dtype)
        check_finite(name, module)
    for tokenizer, text_encoder in plan.family.text_encoders:
        check_tokenizer(
            getattr(pipeline, tokenizer),
            getattr(pipeline, text_encoder),
            has_chat_template=plan.family.has_chat_template,
            component=tokenizer,
        )


def check_names(component: str, module: torch.nn.Module, in_files: Collection[str]) -> None:
    """The files hold a tensor for each of the model's, and no other.

    A transformers base model may be stored under its head's prefix and with its head: `model.norm.weight`
    and `lm_head.weight` for `norm.weight`. Weights tied to others need not be stored, and buffers that the
    model computes for itself, such as position ids, may be.
    """
    expected, stored = set(module.state_dict()), set(in_files)
    computed = {name for name, _ in module.named_buffers()} - expected
    older = _OLDER_PREFIXES.get(type(module).__name__, "")
    stored = {name.removeprefix(older) for name in stored}
    expected = {name.removeprefix(older) for name in expected}
    computed = {name.removeprefix(older) for name in computed}
    prefix = getattr(module, "base_model_prefix", "")
    if prefix:
        tied = getattr(module, "all_tied_weights_keys", None) or {}
        # Of two names for one table of words either will do: transformers makes the other one of it. A head
        # is no such table: stored alone it is what is left of a model.
        stored |= {target for double, target in tied.items() if double in stored - {"lm_head.weight"}}
        expected, stored, computed, tied_names = (
            {name.removeprefix(f"{prefix}.") for name in names}
            for names in (expected, stored, computed, tied)
        )
        stored = (stored - ({"lm_head.weight"} - expected)) | (tied_names & expected)
    missing, surplus = sorted(expected - stored), sorted(stored - expected - computed)
    if missing or surplus:
        parts = [
            f"{len(names)} tensors {where} (the first is {names[0]})"
            for names, where in (
                (missing, "of the model are not in them"),
                (surplus, "in them are not the model's"),
            )
            if names
        ]
        raise CheckpointDamaged(
            f"{component}: the weight files do not fit the model: {', and '.join(parts)}; "
            "they are of another layout or another model"
        )


def check_no_meta(component: str, module: torch.nn.Module) -> None:
    """Every tensor has values; diffusers leaves those it did not find on the meta device."""
    empty = [name for name, tensor in _tensors(module) if tensor.is_meta]
    if empty:
        raise CheckpointDamaged(
            f"{component}: {len(empty)} tensors were not loaded (the first is {empty[0]}); "
            "the weight files do not hold them"
        )


def check_dtype(component: str, module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Every floating parameter is of `dtype`."""
    other = {
        name: parameter.dtype
        for name, parameter in module.named_parameters()
        if parameter.is_floating_point() and parameter.dtype != dtype
    }
    if other:
        name, found = next(iter(other.items()))
        raise CheckpointDamaged(f"{component}: {len(other)} parameters are not {dtype}: {name} is {found}")


def check_finite(component: str, module: torch.nn.Module) -> None:
    """No weight is NaN or infinite; one is enough to make every picture black."""
    for name, tensor in _tensors(module):
        if not is_finite(tensor):
            raise not_finite(component, name)


def check_tokenizer(
    tokenizer: Any, text_encoder: Any, has_chat_template: bool = True, component: str = "tokenizer"
) -> None:
    """The tokenizer frames (where the family does) and reads a prompt, and all its ids have an embedding."""
    ids = tokenizer(_framed(tokenizer, component) if has_chat_template else PROBE).input_ids
    words = tokenizer(PROBE, add_special_tokens=False).input_ids
    known = [token for token in words if token not in tokenizer.all_special_ids]
    if not known or len(known) < len(words) / 2:
        raise CheckpointDamaged(
            f"{component}: of {PROBE!r} it makes {len(words)} tokens, {len(known)} of them known, "
            "so it lacks its vocabulary; fetch the tokenizer folder again"
        )
    rows = text_encoder.get_input_embeddings().num_embeddings
    if max(ids) >= rows:
        raise CheckpointDamaged(
            f"{component}: it makes the id {max(ids)}, but the text encoder has {rows} embeddings; "
            "one of the two is of another model"
        )


def _framed(tokenizer: Any, component: str) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": PROBE}], tokenize=False, add_generation_prompt=True
            )
        )
    except ValueError as error:
        raise CheckpointDamaged(
            f"{component}: it has no chat template, which the pipeline frames prompts with; fetch the "
            "tokenizer folder again (the template is in tokenizer_config.json or chat_template.jinja)"
        ) from error


def _tensors(module: torch.nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
