"""Rewrites a prompt with the text encoder that is loaded; by rules where that cannot be or comes out wrong.

Joins the writing, its check and the memory plan; knows no requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zimage_engine.memory.residency import OffloadPlan, Residency
from zimage_engine.prompts.llm_writing import judged, messages_for
from zimage_engine.sampling.text_generation import OnText, write
from zimage_engine.types import EnhancedPrompt, NotWritten, RewriteBudget, Written

#: Residencies under which the text encoder is whole on the device, and stays from one token to the next.
_STAYS = frozenset({Residency.NONE, Residency.MODEL, Residency.STREAM})


def obstacle(plan: OffloadPlan | None) -> str | None:
    """Why the text encoder cannot write under this memory plan, in a clause; None where it can.

    A token needs all of its weights: where these are fetched piece by piece, each token would fetch all of
    them anew, and a prompt would take minutes.
    """
    if plan is None or (plan.residency in _STAYS and not plan.stream_text_encoder):
        return None
    return (
        f"the memory plan ({plan.residency.value}) brings the text encoder to the device in pieces, and it "
        "would be fetched anew for every word"
    )


def rewritten(
    pipeline: Any,
    plan: OffloadPlan | None,
    prompt: str,
    negative_prompt: str | None,
    budget: RewriteBudget,
    *,
    check: Callable[[], None] = lambda: None,
    on_text: OnText | None = None,
    count_tokens: Callable[[str], int] | None = None,
    token_limit: int | None = None,
) -> EnhancedPrompt:
    """What the text encoder makes of the prompt, or the rules; `rewrite` tells which, and why.

    `check` is called before each token; what it raises comes out here.
    """
    answer: Written | NotWritten
    if (because := obstacle(plan)) is not None:
        answer = NotWritten("unavailable", because)
    elif count_tokens is not None and token_limit is not None and count_tokens(prompt) > token_limit:
        answer = NotWritten(
            "unavailable", "the prompt is longer than the model reads, and rules shorten none"
        )
    else:
        answer = write(pipeline, messages_for(prompt, budget), budget, check, on_text)
    return judged(
        prompt, negative_prompt, answer, "model", count_tokens=count_tokens, token_limit=token_limit
    )
