"""What a language model is asked when it is to rewrite a prompt, and what becomes of its answer.

    messages = messages_for(prompt, budget)
    ... a language model answers ...
    enhanced = judged(prompt, negative_prompt, Written(text), by="model", ...)

Pure: knows no model, no endpoint and no clock.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from zimage_engine.prompts.enhancer import enhance
from zimage_engine.prompts.language import language_of
from zimage_engine.prompts.llm_check import Objection, objection_to
from zimage_engine.prompts.phrases import read_lexicon_file
from zimage_engine.types import EnhancedPrompt, Enhancer, Notice, NotWritten, Rewrite, RewriteBudget, Written

#: The code of the notice that the rules were used in a language model's place.
NOT_REWRITTEN = "prompt_not_rewritten"

_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


def messages_for(prompt: str, budget: RewriteBudget) -> list[dict[str, str]]:
    """The chat that asks for another wording of `prompt`, in its language, the prompt as the user's turn."""
    instruction = read_lexicon_file("rewriting")["instruction"][language_of(prompt)].strip()
    # A token is about a Chinese character, or three quarters of an English word.
    words = max(20, budget.tokens * 2 // 3)
    return [
        {"role": "system", "content": instruction.format(words=words)},
        {"role": "user", "content": prompt},
    ]


def tidy(text: str) -> str:
    """What was written without thoughts before it and white space around it."""
    return _THOUGHTS.sub("", text).strip()


def judged(
    prompt: str,
    negative_prompt: str | None,
    answer: Written | NotWritten,
    by: Enhancer,
    *,
    count_tokens: Callable[[str], int] | None = None,
    token_limit: int | None = None,
) -> EnhancedPrompt:
    """The answer in the prompt's place where it can be used, else what the rules make of the prompt.

    The negative prompt is the rules' in either case, so that it never contradicts what is drawn.
    """
    text = tidy(answer.text) if isinstance(answer, Written) else ""
    if isinstance(answer, NotWritten):
        objection: Objection | None = Objection(answer.outcome, answer.because)
    elif answer.ended != "done":
        objection = _UNFINISHED[answer.ended]
    else:
        objection = objection_to(prompt, text, count_tokens=count_tokens, token_limit=token_limit)
    source = prompt if objection is not None else text
    by_rules = enhance(source, negative_prompt, count_tokens=count_tokens, token_limit=token_limit)
    tokens = answer.tokens if isinstance(answer, Written) else 0
    who = _WHO[by]
    if objection is not None:
        because = f"{who} was not used: {objection.because}; the rules were."
        rewrite = Rewrite(by, objection.outcome, because, answer.seconds, tokens)
        return replace(by_rules, rewrite=rewrite)
    because = f"{who} rewrote the prompt, and what had to stay in it is there."
    return replace(
        by_rules,
        prompt=text,
        added=(),
        because=because,
        additions=tuple(each for each in by_rules.additions if each.field != "prompt"),
        left_out=tuple(each for each in by_rules.left_out if each.field != "prompt"),
        rewrite=Rewrite(by, "used", because, answer.seconds, tokens),
    )


def notice_of(enhanced: EnhancedPrompt) -> tuple[Notice, ...]:
    """What the caller should know: that the rules were used where a language model was asked for."""
    rewrite = enhanced.rewrite
    if rewrite is None or rewrite.outcome == "used":
        return ()
    return (Notice(NOT_REWRITTEN, rewrite.because),)


_WHO = {
    "rules": "The rules",
    "model": "The language model",
    "endpoint": "The language model of the endpoint",
}
_UNFINISHED = {
    "tokens": Objection("unfinished", "it was not done within the tokens that it may write"),
    "seconds": Objection("timeout", "it was not done within its time"),
}
