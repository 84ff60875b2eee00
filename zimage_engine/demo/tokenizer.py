"""Builds the demo model's Qwen2Tokenizer: byte-level BPE in which every caption word is one token.

Nothing is unknown to it (any text falls back to bytes), but a tiny model learns "red" far sooner as
one token than as letters.
"""

from __future__ import annotations

import random
import re
from itertools import pairwise
from typing import TYPE_CHECKING

from tokenizers import pre_tokenizers

from zimage_engine.demo import captions
from zimage_engine.demo.pictures import random_pair, random_scene, random_single

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
#: Shorter than Qwen3's own template, so that a caption fits the denoiser's first block of 32 tokens.
#: What it adds, one closing token, lets even an empty prompt have an embedding.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}<|im_end|>"
TOKEN_LIMIT = 512

_ENGLISH_WORD = re.compile(r"[A-Za-z]+")
_CHINESE_RUN = re.compile(r"[一-鿿]+")


def build_tokenizer() -> Qwen2Tokenizer:
    """The tokenizer, made anew from the caption tables; the same on every machine."""
    from transformers import Qwen2Tokenizer

    byte_symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate((*SPECIAL_TOKENS, *byte_symbols))}
    merges: list[tuple[str, str]] = []
    ranks: dict[tuple[str, str], int] = {}

    def learn(unit: str) -> None:
        """Add the merges that make `unit` (in byte symbols) one token, whatever was learned before."""
        pieces = _merge(list(unit), ranks)
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            ranks.setdefault(pair, len(ranks))
            merges.append(pair)
            pieces[:2] = [pair[0] + pair[1]]
            vocabulary.setdefault(pieces[0], len(vocabulary))

    words = _caption_words()
    for character in sorted({character for word in words for character in word if ord(character) > 127}):
        learn(_in_byte_symbols(character))
    for word in words:
        learn(_in_byte_symbols(word))
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=TOKEN_LIMIT,
        padding_side="right",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _merge(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding as it is defined: the pair of lowest rank is merged until none is left."""
    while len(pieces) > 1:
        pairs = list(pairwise(pieces))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        index = pairs.index(best)
        pieces[index : index + 2] = [best[0] + best[1]]
    return pieces


def _in_byte_symbols(text: str) -> str:
    return "".join(
        piece
        for piece, _ in pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(
            text
        )
    )


def _caption_words() -> list[str]:
    """Every word that a caption can hold: English with and without a leading space, Chinese whole."""
    rng = random.Random(0)
    texts = [", ".join((*captions.QUALITY_EN, *captions.NEGATIVE_EN))]
    for make in (random_single, random_pair, random_scene):
        texts += [captions.caption(make(rng), rng, "en") for _ in range(6000)]
    english = sorted({word.lower() for text in texts for word in _ENGLISH_WORD.findall(text)})
    spelled = [
        form for word in english for form in (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
    ]
    chinese = sorted(
        {run for phrase in captions.chinese_words() for run in _CHINESE_RUN.findall(phrase)},
        key=lambda word: (len(word), word),
    )
    return [*spelled, "，", "。", "、", *chinese]
