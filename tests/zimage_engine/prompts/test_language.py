"""The language of a prompt is the one in which most of it is said."""

from __future__ import annotations

import pytest

from zimage_engine.prompts.language import language_of


@pytest.mark.parametrize(
    ("prompt", "language"),
    [
        ("a red circle on a white background", "en"),
        ("白色背景上的红色圆形", "zh"),
        ("白色背景上的紅色圓形", "zh"),
        ("赛博朋克女孩，neon lights", "zh"),
        ("一只穿着red dress的cat", "zh"),
        ("a girl in 北京", "en"),
        ("cyberpunk girl, neon lights, 雨", "en"),
        # Quoted words are drawn, not spoken.
        ('a sign that says "欢迎光临北京大饭店"', "en"),
        ("a sign that says 「欢迎光临」", "en"),
        ("a sign that says '欢迎光临北京大饭店'", "en"),
        ("招牌上写着“WELCOME TO THE GRAND HOTEL BEIJING”", "zh"),
        ("“欢迎光临”", "zh"),
        ("it's a cat's life", "en"),
        # Kana make it Japanese, a single の on a shop sign does not.
        ("夕焼けの海と猫", "en"),
        ("ネオンの街", "en"),
        ("一家名叫优の良品的小店，夜晚的街道", "zh"),
        ("고양이", "en"),
        ("кошка", "en"),
        ("12345 !?", "en"),
        ("", "en"),
    ],
)
def test_language_of(prompt: str, language: str) -> None:
    assert language_of(prompt) == language
