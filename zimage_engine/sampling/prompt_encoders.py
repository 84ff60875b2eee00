"""How each stock pipeline takes prompts: what it encodes them to, and how it is called with that.

Knows nothing of plans or timing. Add a row to PROMPT_ENCODERS for another pipeline class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

Role = Literal["prompt", "negative_prompt"]


class PromptEncoder(Protocol):
    """What differs from pipeline to pipeline. `guided` is whether guidance is on (w above 1).

    Stock pipelines read each prompt in a pass of its own, so what one of them comes to depends on its text
    alone, not on the other prompt: it can be handed in again beside another.
    """

    #: Which of `encode`'s answers are each prompt's own.
    names: Mapping[Role, tuple[str, ...]]

    def encode(
        self,
        pipeline: Any,
        prompt: str,
        negative_prompt: str,
        guided: bool,
        max_tokens: int,
        known: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Both prompts, once for all pictures, as keyword arguments of the pipeline.

        `known` are such arguments from earlier; a prompt whose `names` are all there is not read again.
        """

    def call_arguments(self, embeddings: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments of one call; what the call may change is copied."""

    def count_tokens(self, pipeline: Any, prompt: str) -> int:
        """How many tokens the text encoder would be given if nothing were cut off."""

    def texts(self, pipeline: Any, prompt: str, negative_prompt: str, guided: bool) -> dict[Role, str]:
        """Which of the prompts the text encoder has to read."""


class ZImageEncoder:
    """Lists of states of one chat-framed prompt each."""

    names: Mapping[Role, tuple[str, ...]] = {
        "prompt": ("prompt_embeds",),
        "negative_prompt": ("negative_prompt_embeds",),
    }

    def encode(
        self,
        pipeline: Any,
        prompt: str,
        negative_prompt: str,
        guided: bool,
        max_tokens: int,
        known: Mapping[str, Any],
    ) -> dict[str, Any]:
        positive, negative = pipeline.encode_prompt(
            # Lists of our own: the pipeline writes its templates into those that it is given.
            prompt=[prompt],
            negative_prompt=[negative_prompt],
            do_classifier_free_guidance=guided,
            max_sequence_length=max_tokens,
            **known,
        )
        return {"prompt_embeds": tuple(positive), "negative_prompt_embeds": tuple(negative)}

    def call_arguments(self, embeddings: Mapping[str, Any]) -> dict[str, Any]:
        return {name: list(tensors) for name, tensors in embeddings.items()}

    def count_tokens(self, pipeline: Any, prompt: str) -> int:
        framed = pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
        return _count(pipeline.tokenizer, framed)

    def texts(self, pipeline: Any, prompt: str, negative_prompt: str, guided: bool) -> dict[Role, str]:
        return _read(prompt, negative_prompt if guided else None)


class SDXLEncoder:
    """States of two text encoders side by side, and the pooled state of the second."""

    names: Mapping[Role, tuple[str, ...]] = {
        "prompt": ("prompt_embeds", "pooled_prompt_embeds"),
        "negative_prompt": ("negative_prompt_embeds", "negative_pooled_prompt_embeds"),
    }

    def encode(
        self,
        pipeline: Any,
        prompt: str,
        negative_prompt: str,
        guided: bool,
        max_tokens: int,
        known: Mapping[str, Any],
    ) -> dict[str, Any]:
        names = (
            "prompt_embeds",
            "negative_prompt_embeds",
            "pooled_prompt_embeds",
            "negative_pooled_prompt_embeds",
        )
        tensors = pipeline.encode_prompt(
            prompt=prompt,
            # SDXL was trained with zeros for an empty prompt, which the pipeline takes for None alone.
            negative_prompt=negative_prompt or None,
            do_classifier_free_guidance=_takes_two_passes(pipeline, guided),
            **known,
        )
        return dict(zip(names, tensors, strict=True))

    def call_arguments(self, embeddings: Mapping[str, Any]) -> dict[str, Any]:
        return dict(embeddings)

    def count_tokens(self, pipeline: Any, prompt: str) -> int:
        return max(_count(pipeline.tokenizer, prompt), _count(pipeline.tokenizer_2, prompt))

    def texts(self, pipeline: Any, prompt: str, negative_prompt: str, guided: bool) -> dict[Role, str]:
        zeros_instead = not negative_prompt and pipeline.config.force_zeros_for_empty_prompt
        is_read = _takes_two_passes(pipeline, guided) and not zeros_instead
        return _read(prompt, negative_prompt if is_read else None)


def _takes_two_passes(pipeline: Any, guided: bool) -> bool:
    """A unet that is told the guidance draws the guided picture in one call."""
    return guided and pipeline.unet.config.time_cond_proj_dim is None


class PixArtEncoder:
    """States of T5 and the masks of their padding."""

    names: Mapping[Role, tuple[str, ...]] = {
        "prompt": ("prompt_embeds", "prompt_attention_mask"),
        "negative_prompt": ("negative_prompt_embeds", "negative_prompt_attention_mask"),
    }

    def encode(
        self,
        pipeline: Any,
        prompt: str,
        negative_prompt: str,
        guided: bool,
        max_tokens: int,
        known: Mapping[str, Any],
    ) -> dict[str, Any]:
        names = (
            "prompt_embeds",
            "prompt_attention_mask",
            "negative_prompt_embeds",
            "negative_prompt_attention_mask",
        )
        tensors = pipeline.encode_prompt(
            prompt,
            negative_prompt=negative_prompt,
            do_classifier_free_guidance=guided,
            max_sequence_length=max_tokens,
            # Cleaning needs packages that may be missing, and would read another prompt than was reported.
            clean_caption=False,
            **known,
        )
        return dict(zip(names, tensors, strict=True))

    def call_arguments(self, embeddings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **embeddings,
            "negative_prompt": None,
            # Binning would draw another size and scale it to the one that was asked.
            "use_resolution_binning": False,
        }

    def count_tokens(self, pipeline: Any, prompt: str) -> int:
        return _count(pipeline.tokenizer, prompt.lower())  # the pipeline lowers what T5 reads

    def texts(self, pipeline: Any, prompt: str, negative_prompt: str, guided: bool) -> dict[Role, str]:
        return _read(prompt, negative_prompt if guided else None)


PROMPT_ENCODERS: Mapping[str, PromptEncoder] = {
    "ZImagePipeline": ZImageEncoder(),
    "StableDiffusionXLPipeline": SDXLEncoder(),
    "PixArtAlphaPipeline": PixArtEncoder(),
    "PixArtSigmaPipeline": PixArtEncoder(),
}


def encoder_for(pipeline: Any) -> PromptEncoder:
    """The row of the pipeline's class, or of the nearest class that it is derived from."""
    for each in type(pipeline).__mro__:
        if each.__name__ in PROMPT_ENCODERS:
            return PROMPT_ENCODERS[each.__name__]
    raise TypeError(f"no prompt encoder for {type(pipeline).__name__}; there are {sorted(PROMPT_ENCODERS)}")


def _read(prompt: str, negative_prompt: str | None) -> dict[Role, str]:
    texts: dict[Role, str] = {"prompt": prompt}
    if negative_prompt is not None:
        texts["negative_prompt"] = negative_prompt
    return texts


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, truncation=False, padding=False, verbose=False).input_ids)
