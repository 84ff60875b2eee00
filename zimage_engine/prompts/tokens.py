"""Counts a prompt's tokens as the text encoder will, without the text encoder and without torch."""

from __future__ import annotations

from collections.abc import Callable

from zimage_engine.errors import CheckpointDamaged


def token_counter(tokenizer_json: str) -> Callable[[str], int]:
    """A function that counts the tokens of a text, by the text of a `tokenizer.json` file.

    Special tokens that the tokenizer itself puts around a text are counted; those of a chat template
    are not. Nothing is padded or cut off. Raises CheckpointDamaged where the file cannot be read.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises nothing more precise than this
        raise CheckpointDamaged(
            f"Expected the contents of a tokenizer.json file, got {len(tokenizer_json)} characters that the "
            f"tokenizers library cannot read ({error}). Save the tokenizer again with save_pretrained()."
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return lambda text: len(tokenizer.encode(text).ids)
