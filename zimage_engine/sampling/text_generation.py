"""Lets the text encoder that is loaded anyway write: a Qwen3 whose head is its own transposed embedding.

No weight is copied, and nothing stays on the pipeline: what it draws afterwards is what it drew before.
Knows nothing of what is to be written. For the thread that draws.
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, Qwen3ForCausalLM, Qwen3Model
from transformers.generation import StoppingCriteria, StoppingCriteriaList, TextStreamer

from zimage_engine.errors import EngineError
from zimage_engine.sampling.device_failure import raise_if_failed
from zimage_engine.types import NotWritten, RewriteBudget, Written

logger = logging.getLogger(__name__)

#: Called with each piece of text as it is written.
OnText = Callable[[str], None]
#: What ends an answer in the chats of Qwen3.
_ENDS = ("<|im_end|>", "<|endoftext|>")


def language_model(text_encoder: Any) -> Any | None:
    """`text_encoder` as a language model on the same weights; None where it is none.

    What is new in memory are a few objects of Python: the layers, and the embedding as the head, are those
    of the text encoder.
    """
    if isinstance(text_encoder, Qwen3ForCausalLM):
        return text_encoder
    if not isinstance(text_encoder, Qwen3Model) or not text_encoder.config.tie_word_embeddings:
        return None
    config = copy.deepcopy(text_encoder.config)
    # The body that the class makes is thrown away at once: one layer is enough for it.
    thin = copy.deepcopy(config)
    thin.num_hidden_layers, thin.layer_types = 1, list(config.layer_types[:1])
    with torch.device("meta"):
        model = Qwen3ForCausalLM(thin)
    model.config = config
    model.model = text_encoder
    model.lm_head.weight = text_encoder.get_input_embeddings().weight
    return model.eval()


def write(
    pipeline: Any,
    messages: Sequence[dict[str, str]],
    budget: RewriteBudget,
    check: Callable[[], None] = lambda: None,
    on_text: OnText | None = None,
) -> Written | NotWritten:
    """The answer of the pipeline's text encoder to a chat, the same each time, within `budget`.

    `check` is called before each token, and what it raises ends the writing and comes out here. The seconds
    are looked at as often. What goes wrong is told, but for a lost device, which is raised.
    """
    began = time.monotonic()

    def failed(because: str, error: Exception | None = None) -> NotWritten:
        if error is not None:
            logger.warning("the text encoder could not write: %s: %s", type(error).__name__, error)
        return NotWritten("unavailable" if error is None else "failed", because, time.monotonic() - began)

    model = language_model(getattr(pipeline, "text_encoder", None))
    tokenizer = getattr(pipeline, "tokenizer", None)
    if model is None or tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return failed("this model's text encoder is no language model that can write")
    check()
    try:
        return _written(model, tokenizer, pipeline._execution_device, messages, budget, check, on_text, began)
    except torch.OutOfMemoryError as error:
        return failed("the device had too little memory left for it", error)
    except EngineError:  # what `check` raises
        raise
    except Exception as error:
        raise_if_failed(error)
        return failed("the text encoder failed at it", error)


def _written(
    model: Any,
    tokenizer: Any,
    device: torch.device,
    messages: Sequence[dict[str, str]],
    budget: RewriteBudget,
    check: Callable[[], None],
    on_text: OnText | None,
    began: float,
) -> Written | NotWritten:
    framed = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    asked = tokenizer(framed, return_tensors="pt", truncation=False, padding=False, verbose=False)
    ids = asked.input_ids.to(device)
    room = model.config.max_position_embeddings - ids.shape[1]
    if room < budget.tokens:
        return NotWritten(
            "unavailable",
            f"the prompt takes {ids.shape[1]} tokens with what is asked, and the text encoder reads "
            f"{model.config.max_position_embeddings} in all",
            time.monotonic() - began,
        )
    reins = _Reins(check, began + budget.seconds)
    ends = _ends(tokenizer)
    with torch.no_grad(), warnings.catch_warnings():
        # Under a memory plan the weights may be on their way to the device.
        warnings.simplefilter("ignore")
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=budget.tokens,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                eos_token_id=list(ends),
                pad_token_id=ends[0],
            ),
            stopping_criteria=StoppingCriteriaList([reins]),
            streamer=None if on_text is None else _Teller(tokenizer, on_text),
        )
    new = output[0, ids.shape[1] :].tolist()
    is_done = bool(new) and new[-1] in ends
    return Written(
        text=tokenizer.decode(new, skip_special_tokens=True),
        ended="done" if is_done else "seconds" if reins.is_late else "tokens",
        seconds=time.monotonic() - began,
        tokens=len(new),
    )


def _ends(tokenizer: Any) -> tuple[int, ...]:
    known = tokenizer.get_vocab()
    named = (tokenizer.eos_token, *_ENDS)
    return tuple(dict.fromkeys(known[word] for word in named if word in known))


class _Reins(StoppingCriteria):
    """Ends the writing when its time is over, and lets whoever waits for it end it."""

    def __init__(self, check: Callable[[], None], ends_at: float) -> None:
        self._check = check
        self._ends_at = ends_at
        self.is_late = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._check()
        self.is_late = time.monotonic() >= self._ends_at
        return torch.full((input_ids.shape[0],), self.is_late, dtype=torch.bool, device=input_ids.device)


class _Teller(TextStreamer):
    """Tells each piece of text when its characters are whole."""

    def __init__(self, tokenizer: Any, on_text: OnText) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)
