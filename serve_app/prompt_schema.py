"""Prompts on the wire: what `/v1/prompts/enhance` and `/v1/prompts/analyze` take and answer.

Knows no routes and no workers; how fields are refused is `openai_schema`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve_app import openai_schema as schema
from serve_app.openai_schema import PROMPT_CHARACTERS, PictureWarning
from zimage_engine.prompts.analyzer import analyze
from zimage_engine.prompts.enhancer import enhance, unchanged
from zimage_engine.prompts.language import language_of
from zimage_engine.prompts.llm_writing import notice_of
from zimage_engine.prompts.tokens import PromptTokens, cut_notice
from zimage_engine.types import (
    EnhancedPrompt,
    Enhancer,
    Kind,
    Notice,
    PhraseChoice,
    Reason,
    RewriteOutcome,
)

_WITHOUT_NULL: dict[str, Any] = {"pattern": r"^[^\x00]*$"}


class EnhanceRequest(BaseModel):
    """The body of `POST /v1/prompts/enhance`. Null is the same as left out."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: str = Field(
        min_length=1,
        max_length=PROMPT_CHARACTERS,
        description="The prompt as it was written, in English or Chinese.",
        # Python's white space has five characters more than a schema's \s.
        json_schema_extra={"pattern": r"^[^\x00]*[^\s\x00\x1c-\x1f\x85][^\x00]*$"},
    )
    negative_prompt: str | None = Field(
        None,
        max_length=PROMPT_CHARACTERS,
        description="What to keep out, as it was written.",
        json_schema_extra=_WITHOUT_NULL,
    )
    enhance: bool | Enhancer | None = Field(
        None,
        description="As for pictures: false, nothing is added, and the lengths are told; null, the server's "
        "default; or by rules, model or endpoint, where the server offers it.",
    )
    stream: bool | None = Field(
        None,
        description="true: server-sent events, what a language model writes as it comes, and the whole "
        "answer in the last. null: false.",
    )


class AnalyzeRequest(BaseModel):
    """The body of `POST /v1/prompts/analyze`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: str = Field(
        max_length=PROMPT_CHARACTERS,
        description="The prompt as far as it is written; it may be empty.",
        json_schema_extra=_WITHOUT_NULL,
    )


class PromptPhrase(BaseModel):
    """A phrase of the enhancer's that was added or left out."""

    phrase: str
    field: Literal["prompt", "negative_prompt"]
    kind: Kind
    #: missing: it was added. said, kind_said, against, refused, no_room: it was not.
    reason: Reason
    #: The words that decided; "" where none did.
    about: str
    because: str


class PromptRewrite(BaseModel):
    """How a language model's rewriting ended: used, or why the rules were used in its place."""

    by: Enhancer
    outcome: RewriteOutcome
    because: str
    seconds: float
    #: What it wrote; 0 where that is not known.
    tokens: int


class EnhanceResponse(BaseModel):
    """What would be drawn, and why. Tokens are null where the model tells no tokenizer."""

    object: Literal["prompt.enhancement"] = "prompt.enhancement"
    prompt: str
    negative_prompt: str
    language: str
    because: str
    additions: list[PromptPhrase]
    left_out: list[PromptPhrase]
    tokens: int | None
    negative_tokens: int | None
    token_limit: int
    warnings: list[PictureWarning]
    #: Who made the prompt; null where nothing was to be done.
    enhancer: Enhancer | None
    #: null where no language model was asked.
    rewrite: PromptRewrite | None


class EnhanceDeltaEvent(BaseModel):
    """A piece of what a language model writes, before it is judged: the last event tells what is used."""

    type: Literal["prompt_enhancement.delta"]
    delta: str


class EnhanceCompletedEvent(EnhanceResponse):
    """The whole answer."""

    type: Literal["prompt_enhancement.completed"]


class PromptSpan(BaseModel):
    """A recognised word from character `start` up to `end`, counted from 0 in Unicode characters."""

    start: int
    end: int
    kind: Kind
    text: str
    language: str
    weight: float
    negated: bool


class AnalyzeResponse(BaseModel):
    """What is recognised. Tokens and their limit are null where no model has told of them."""

    object: Literal["prompt.analysis"] = "prompt.analysis"
    language: str
    spans: list[PromptSpan]
    tokens: int | None
    token_limit: int | None
    #: The character, counted as those of spans, from which on the model does not read it; null: all is read.
    cut_at: int | None
    warnings: list[PictureWarning]


def parse_enhance(payload: Mapping[str, Any]) -> EnhanceRequest:
    """The checked request; raises RequestRefused with one sentence on the first thing that is wrong."""
    wire = schema.validated(EnhanceRequest, payload)
    schema.check_prompt(wire)
    schema.check_texts(wire, "prompt", "negative_prompt")
    return wire


def parse_analyze(payload: Mapping[str, Any]) -> AnalyzeRequest:
    """The checked request; raises RequestRefused with one sentence on the first thing that is wrong."""
    wire = schema.validated(AnalyzeRequest, payload)
    schema.check_texts(wire, "prompt")
    return wire


def enhanced(
    wire: EnhanceRequest, enhance_by_default: bool, tokens: PromptTokens | None, token_limit: int
) -> EnhanceResponse:
    """The prompts as the rules have a picture drawn from them; `tokens` None: the length is not bounded."""
    prompt, negative = prompts_of(wire)
    if is_wanted(wire, enhance_by_default):
        made = enhance(
            prompt,
            negative,
            count_tokens=None if tokens is None else tokens.count,
            token_limit=None if tokens is None else token_limit,
        )
    else:
        made = unchanged(prompt, negative)
    return to_response(made, is_wanted(wire, enhance_by_default), tokens, token_limit)


def prompts_of(wire: EnhanceRequest) -> tuple[str, str]:
    """Both prompts as a picture's request would have them."""
    return wire.prompt.strip(), (wire.negative_prompt or "").strip()


def is_wanted(wire: EnhanceRequest, enhance_by_default: bool) -> bool:
    """Whether anything is to be enhanced."""
    return bool(enhance_by_default if wire.enhance is None else wire.enhance)


def to_response(
    made: EnhancedPrompt, is_enhanced: bool, tokens: PromptTokens | None, token_limit: int
) -> EnhanceResponse:
    """What was made, with what of it would be cut off."""
    rewrite = made.rewrite
    by_language_model = rewrite is not None and rewrite.outcome == "used"
    return EnhanceResponse(
        prompt=made.prompt,
        negative_prompt=made.negative_prompt,
        language=made.language,
        because=made.because,
        additions=[_phrase(choice) for choice in made.additions],
        left_out=[_phrase(choice) for choice in made.left_out],
        tokens=None if tokens is None else tokens.count(made.prompt),
        negative_tokens=None if tokens is None else tokens.count(made.negative_prompt),
        token_limit=token_limit,
        warnings=[
            *map(_warning, notice_of(made)),
            *_warnings({"prompt": made.prompt, "negative_prompt": made.negative_prompt}, tokens, token_limit),
        ],
        enhancer=None if not is_enhanced else rewrite.by if rewrite and by_language_model else "rules",
        rewrite=None if rewrite is None else PromptRewrite(**asdict(rewrite)),
    )


def analysed(wire: AnalyzeRequest, tokens: PromptTokens | None, token_limit: int | None) -> AnalyzeResponse:
    """What is recognised in the prompt, and how much of the room it takes where that is known."""
    cut = None if tokens is None or token_limit is None else tokens.cut(wire.prompt, token_limit)
    return AnalyzeResponse(
        language=language_of(wire.prompt),
        spans=[
            PromptSpan(
                start=span.start,
                end=span.end,
                kind=span.kind,
                text=span.text,
                language=span.language,
                weight=span.weight,
                negated=span.is_negated,
            )
            for span in analyze(wire.prompt)
        ],
        tokens=None if tokens is None else tokens.count(wire.prompt),
        token_limit=token_limit,
        cut_at=None if cut is None else cut.start,
        warnings=_warnings({"prompt": wire.prompt}, tokens, token_limit),
    )


def _phrase(choice: PhraseChoice) -> PromptPhrase:
    return PromptPhrase(
        phrase=choice.phrase,
        field=choice.field,
        kind=choice.kind,
        reason=choice.reason,
        about=choice.about,
        because=choice.because,
    )


def _warnings(
    prompts: Mapping[str, str], tokens: PromptTokens | None, token_limit: int | None
) -> list[PictureWarning]:
    """What would be cut off; nothing where that is not known."""
    if tokens is None or token_limit is None:
        return []
    cuts = ((name, tokens.cut(text, token_limit)) for name, text in prompts.items())
    return [_warning(cut_notice(name, cut)) for name, cut in cuts if cut is not None]


def _warning(notice: Notice) -> PictureWarning:
    return PictureWarning(code=notice.code, message=notice.message)
