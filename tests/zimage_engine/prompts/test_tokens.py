"""Tokens are counted as the model's own tokenizer counts them, without torch."""

from __future__ import annotations

import subprocess
import sys
from importlib import resources

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from zimage_engine.errors import CheckpointDamaged
from zimage_engine.prompts.enhancer import enhance
from zimage_engine.prompts.tokens import cut_notice, prompt_tokens, token_counter


def word_tokenizer() -> Tokenizer:
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "circle": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def demo_tokenizer_json() -> str:
    file = resources.files("zimage_engine") / "demo" / "model" / "tokenizer" / "tokenizer.json"
    return file.read_text("utf-8")


@pytest.mark.parametrize(("text", "count"), [("", 0), ("a red circle", 3), ("a blue circle, small", 5)])
def test_tokens_are_counted(text: str, count: int) -> None:
    assert token_counter(word_tokenizer().to_str())(text) == count


def test_the_tokenizers_own_special_tokens_are_counted() -> None:
    tokenizer = word_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert token_counter(tokenizer.to_str())("a red circle") == 5


def test_what_the_file_says_of_padding_and_truncation_does_not_count() -> None:
    tokenizer = word_tokenizer()
    tokenizer.enable_padding(length=4)
    tokenizer.enable_truncation(max_length=4)
    count = token_counter(tokenizer.to_str())
    assert count("a") == 1
    assert count("a red circle " * 5) == 15


@pytest.mark.parametrize("content", ["", "{}", "not json"])
def test_a_file_that_cannot_be_read_is_an_error_that_says_what_to_do(content: str) -> None:
    with pytest.raises(
        CheckpointDamaged, match=r"Expected the contents of a tokenizer\.json.*save_pretrained"
    ):
        token_counter(content)


def test_the_demo_models_prompts_are_counted_as_its_text_encoder_gets_them() -> None:
    from transformers import PreTrainedTokenizerFast

    content = demo_tokenizer_json()
    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(content))
    count = token_counter(content)
    for prompt in (
        "a red circle on a white background",
        "白色背景上的红色圆形",
        "Ångström 😀, [a|b] (c:1.2)\n",
    ):
        assert count(prompt) == len(theirs(prompt).input_ids) > 0


@pytest.mark.parametrize(
    ("text", "limit", "start", "word"),
    [
        ("a red circle", 3, None, None),
        ("a red circle", 2, 6, "circle"),
        ("a red circle", 0, 0, "a"),
        ("a red circle, a red circle", 4, 14, "a"),
    ],
)
def test_a_prompt_that_is_too_long_is_cut_at_a_word(
    text: str, limit: int, start: int | None, word: str | None
) -> None:
    cut = prompt_tokens(word_tokenizer().to_str()).cut(text, limit)
    assert (cut and cut.start, cut and cut.word) == (start, word)


def test_special_tokens_take_their_room_from_the_words() -> None:
    tokenizer = word_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    cut = prompt_tokens(tokenizer.to_str()).cut("a red circle", 4)
    assert cut is not None and (cut.word, cut.tokens, cut.limit) == ("circle", 5, 4)


def test_what_is_told_to_be_cut_off_is_what_a_tokenizer_leaves_out() -> None:
    content = demo_tokenizer_json()
    tokens, tokenizer = prompt_tokens(content), Tokenizer.from_str(content)
    prompt = "a red circle on a white background, 白色背景上的红色圆形，上方有一颗小星星 watercolour"
    for limit in range(1, tokens.count(prompt)):
        cut = tokens.cut(prompt, limit)
        assert cut is not None
        assert prompt[cut.start : cut.start + len(cut.word)] == cut.word
        assert cut.start <= tokenizer.encode(prompt).offsets[limit][1] <= len(prompt)
        # All before the word is read, and with the word there is no room.
        assert tokens.count(prompt[: cut.start].rstrip()) <= limit
    assert tokens.cut(prompt, tokens.count(prompt)) is None


def test_the_notice_names_the_word_and_what_to_do() -> None:
    cut = prompt_tokens(word_tokenizer().to_str()).cut("a red circle", 2)
    assert cut is not None
    notice = cut_notice("prompt", cut)
    assert notice.code == "prompt_truncated"
    assert notice.message == (
        "prompt takes 3 tokens and this model has room for 2: the room for prompt ends at 'circle', "
        "its character 7, and the rest would be left out; shorten it"
    )


def test_an_enhanced_prompt_stays_within_a_limit_counted_by_a_real_tokenizer() -> None:
    count = token_counter(demo_tokenizer_json())
    own = count("a red circle")
    whole = count(enhance("a red circle", None).prompt)
    kept = set()
    for limit in range(own, whole + 1):
        enhanced = enhance("a red circle", None, count_tokens=count, token_limit=limit)
        assert count(enhanced.prompt) <= limit
        kept.add(len(enhanced.added))
    assert kept == {0, 1, 2, 3, 4, 5}


def test_the_prompts_package_imports_no_torch() -> None:
    code = (
        "import sys, zimage_engine.prompts.enhancer as e, zimage_engine.prompts.tokens as t;"
        "e.enhance('a cat', None);"
        "import tokenizers;"
        "print(', '.join({'torch', 'transformers', 'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
