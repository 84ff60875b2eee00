"""Says a picture's spec in English or Chinese, in many wordings; knows nothing of pixels or of torch.

Whatever a caption leaves unsaid has its usual value: medium size, the centre, a white ground.
So a caption always tells all that is needed to draw its picture.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from zimage_engine.demo.pictures import SceneSpec, ShapesSpec, Spec, Thing

Choose = Callable[[tuple[str, ...]], str]

#: The enhancer's words and its negative words: the model must draw the same with them or without.
QUALITY_EN = ("masterpiece", "best quality", "ultra-detailed", "cinematic lighting", "sharp focus")
QUALITY_ZH = ("杰作", "最佳质量", "超精细", "电影级光照", "锐利对焦")
NEGATIVE_EN = ("deformed", "blurry", "bad anatomy", "disfigured", "poorly drawn face")
NEGATIVE_ZH = ("畸形", "模糊", "糟糕的解剖结构", "毁容", "画得糟糕的脸")

_SIZE_EN = {"small": ("small", "little", "tiny"), "medium": ("",), "big": ("big", "large", "huge")}
_SHAPE_EN = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
}
_PLACE_EN = {
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "centre": ("in the centre", "in the middle", "in the center"),
}
_SHORT_PLACE_EN = {"left": "left", "right": "right", "top": "top", "bottom": "bottom", "centre": "centre"}
_RELATION_EN = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
}
_OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}

_COLOUR_ZH = {
    "red": "红色",
    "green": "绿色",
    "blue": "蓝色",
    "yellow": "黄色",
    "purple": "紫色",
    "orange": "橙色",
    "white": "白色",
    "black": "黑色",
}
_SHAPE_ZH = {
    "circle": ("圆形", "圆形", "圆"),
    "square": ("正方形", "方形", "方块"),
    "triangle": ("三角形",),
    "star": ("星星", "五角星", "星形"),
    "heart": ("心形", "爱心"),
}
_SIZE_ZH = {"small": ("小", "小的", "很小的"), "medium": ("",), "big": ("大", "大的", "很大的")}
_PLACE_ZH = {
    "left": ("左边", "左侧"),
    "right": ("右边", "右侧"),
    "top": ("上方", "顶部", "上面"),
    "bottom": ("下方", "底部", "下面"),
    "centre": ("中间", "中央"),
}
_RELATION_ZH = {
    "above": ("上方", "上面"),
    "below": ("下方", "下面"),
    "left of": ("左边", "左侧"),
    "right of": ("右边", "右侧"),
}

_TIME_EN = {
    "day": ("by day", "in the daytime", "on a sunny day", "day"),
    "night": ("at night", "by night", "in a starry night", "night"),
    "sunset": ("at sunset", "in the evening", "sunset"),
}
_GROUND_EN = {
    "field": ("in a field", "in a meadow", "on the grass"),
    "sea": ("by the sea", "at sea", "on the sea"),
    "mountains": ("in front of mountains", "in the mountains", "with mountains"),
}
_GROUND_NAME_EN = {
    "field": ("a field", "a meadow", "grass"),
    "sea": ("the sea", "a calm sea"),
    "mountains": ("mountains", "snowy mountains"),
}
_TIME_ZH = {
    "day": ("白天", "晴天"),
    "night": ("夜晚", "夜里", "星空下"),
    "sunset": ("日落", "夕阳下", "傍晚"),
}
_GROUND_ZH = {
    "field": ("田野", "草地", "草地上"),
    "sea": ("大海", "海上", "海边"),
    "mountains": ("山", "雪山", "山前"),
}


def caption(spec: Spec, rng: random.Random, language: str = "en", complete: bool = False) -> str:
    """Say the spec in `language` ("en" or "zh"); with `complete` the ground's colour is always said."""
    choose: Choose = rng.choice
    if isinstance(spec, SceneSpec):
        return (_scene_en if language == "en" else _scene_zh)(spec, rng, choose)
    say_ground = complete or spec.background != "white" or rng.random() < 0.8
    if len(spec.things) == 1:
        words = (_single_en if language == "en" else _single_zh)(spec, rng, choose, say_ground)
    else:
        words = (_pair_en if language == "en" else _pair_zh)(spec, rng, choose, say_ground)
    if language == "en" and rng.random() < 0.1:
        words = words[0].upper() + words[1:]
    if rng.random() < 0.08:
        words += "." if language == "en" else "。"
    return words


def with_quality(words: str, rng: random.Random, language: str) -> str:
    """The caption with some or all of the enhancer's words behind it."""
    phrases: tuple[str, ...] = QUALITY_EN if language == "en" else QUALITY_ZH
    if rng.random() < 0.4:
        phrases = tuple(phrase for phrase in phrases if rng.random() < 0.6)
    joint = ", " if language == "en" else "，"
    return joint.join((words.rstrip(".。"), *phrases))


def unconditional(rng: random.Random) -> str:
    """What stands for "no caption": nothing, or the negative words that the enhancer uses."""
    if rng.random() < 0.5:
        return ""
    phrases, joint = rng.choice(((NEGATIVE_EN, ", "), (NEGATIVE_ZH, "，")))
    return joint.join(phrases if rng.random() < 0.7 else phrases[: rng.randint(1, len(phrases))])


# --- English ------------------------------------------------------------------------------------


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _noun_en(thing: Thing, choose: Choose) -> str:
    return " ".join(
        part for part in (choose(_SIZE_EN[thing.size]), thing.colour, choose(_SHAPE_EN[thing.shape])) if part
    )


def _ground_en(colour: str, rng: random.Random, choose: Choose) -> str:
    if rng.random() < 0.7:
        return f"on {_article(colour)} background"
    return choose(
        (f"against {_article(colour)} background", f"with {_article(colour)} background", f"on {colour}")
    )


def _place_en(thing: Thing, rng: random.Random, choose: Choose) -> str:
    if thing.place is None or (thing.place == "centre" and rng.random() < 0.7):
        return ""
    return choose(_PLACE_EN[thing.place])


def _single_en(spec: ShapesSpec, rng: random.Random, choose: Choose, say_ground: bool) -> str:
    thing = spec.things[0]
    noun, place = _noun_en(thing, choose), _place_en(thing, rng, choose)
    if rng.random() < 0.4:  # a comma list
        if place and rng.random() < 0.4:
            place = _SHORT_PLACE_EN[thing.place or "centre"]
        parts = [noun, place, f"{spec.background} background" if say_ground else ""]
        return ", ".join(part for part in parts if part)
    ground = _ground_en(spec.background, rng, choose) if say_ground else ""
    opening = choose(("", "", "", "there is ", "a picture of ", "draw "))
    order = (place, ground) if rng.random() < 0.6 else (ground, place)
    return opening + " ".join(part for part in (_article(noun), *order) if part)


def _pair_en(spec: ShapesSpec, rng: random.Random, choose: Choose, say_ground: bool) -> str:
    first, second = spec.things
    listed = rng.random() < 0.35
    ground = f", {spec.background} background" if listed else " " + _ground_en(spec.background, rng, choose)
    if not say_ground:
        ground = ""

    def noun(thing: Thing) -> str:
        words = _noun_en(thing, choose)
        return words if listed else _article(words)

    if spec.relation:
        relation = spec.relation
        if rng.random() < 0.3:  # the same picture, said from the other thing's side
            first, second, relation = second, first, _OPPOSITE[relation]
        return f"{noun(first)} {choose(_RELATION_EN[relation])} {noun(second)}{ground}"
    places = [_place_en(thing, rng, choose) for thing in (first, second)]
    said = [
        " ".join(part for part in (noun(thing), place) if part)
        for thing, place in zip((first, second), places, strict=True)
    ]
    if first.place == "centre" and rng.random() < 0.5:
        return f"{said[0]}{ground}, {said[1]}"
    return f"{said[0]}{choose((' and ', ', '))}{said[1]}{ground}"


def _items_en(spec: SceneSpec, choose: Choose, rng: random.Random) -> list[str]:
    say = rng.random() < 0.75

    def coloured(colour: str | None, noun: str) -> str:
        return f"{colour} {noun}" if colour and say else noun

    names = {
        "house": _article(coloured(spec.house_colour, "house")),
        "boat": _article(coloured(spec.boat_colour, "boat")),
        "flower": coloured(spec.flower_colour, "flowers"),
        "tree": choose(("trees", "a tree", "two trees")),
        "sun": choose(("the sun", "a sun")),
        "moon": choose(("the moon", "a moon")),
    }
    return [names[item] for item in spec.items]


def _scene_en(spec: SceneSpec, rng: random.Random, choose: Choose) -> str:
    items, time = _items_en(spec, choose, rng), choose(_TIME_EN[spec.time])
    rng.shuffle(items)
    if rng.random() < 0.4 or not items:
        parts = [*items, choose(_GROUND_NAME_EN[spec.ground]), time]
        if rng.random() < 0.5:
            parts = [part.removeprefix("a ").removeprefix("the ") for part in parts]
        words = ", ".join(parts)
    else:
        listed = items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
        words = f"{listed} {choose(_GROUND_EN[spec.ground])} {time}"
    return words + choose(("", "", "", ", flat illustration"))


# --- Chinese ------------------------------------------------------------------------------------


def _noun_zh(thing: Thing, rng: random.Random, choose: Choose, counted: bool = False) -> str:
    shape = choose(_SHAPE_ZH[thing.shape])
    measure = choose(("一颗", "一个")) if thing.shape in ("star", "heart") else "一个"
    joint = "的" if rng.random() < 0.35 else ""
    return (
        f"{measure if counted else ''}{choose(_SIZE_ZH[thing.size])}{_COLOUR_ZH[thing.colour]}{joint}{shape}"
    )


def _single_zh(spec: ShapesSpec, rng: random.Random, choose: Choose, say_ground: bool) -> str:
    thing = spec.things[0]
    ground = f"{_COLOUR_ZH[spec.background]}背景"
    place = (
        "" if thing.place == "centre" and rng.random() < 0.7 else choose(_PLACE_ZH[thing.place or "centre"])
    )
    style = rng.random()
    if not say_ground:
        noun = _noun_zh(thing, rng, choose, counted=rng.random() < 0.5)
        return noun if not place else choose((f"{place}的{noun}", f"{place}有{noun}", f"{noun}，{place}"))
    if style < 0.4:
        noun = _noun_zh(thing, rng, choose, counted=rng.random() < 0.4)
        if not place:
            return choose((f"{ground}上的{noun}", f"{ground}上有{noun}"))
        return choose(
            (f"{ground}{place}的{noun}", f"{ground}上，{place}有{noun}", f"{ground}，{place}有{noun}")
        )
    noun = _noun_zh(thing, rng, choose, counted=rng.random() < 0.5)
    if not place:
        return choose((f"{noun}，{ground}", f"{noun}，在{ground}上"))
    return choose((f"{noun}，{place}，{ground}", f"{place}的{noun}，{ground}", f"{noun}在{place}，{ground}"))


def _pair_zh(spec: ShapesSpec, rng: random.Random, choose: Choose, say_ground: bool) -> str:
    first, second = spec.things
    ground = f"{_COLOUR_ZH[spec.background]}背景"

    def noun(thing: Thing) -> str:
        return _noun_zh(thing, rng, choose, counted=rng.random() < 0.4)

    if spec.relation:
        relation = spec.relation
        if rng.random() < 0.3:
            first, second, relation = second, first, _OPPOSITE[relation]
        words = f"{noun(first)}在{noun(second)}{choose(('', '的'))}{choose(_RELATION_ZH[relation])}"
    else:
        said = []
        for thing in (first, second):
            place = (
                ""
                if thing.place == "centre" and rng.random() < 0.7
                else choose(_PLACE_ZH[thing.place or "centre"])
            )
            said.append(
                choose((f"{place}有{noun(thing)}", f"{place}的{noun(thing)}")) if place else noun(thing)
            )
        if first.place == "centre" and say_ground and rng.random() < 0.4:
            return f"{ground}上的{said[0]}，{said[1]}"
        words = "，".join(said)
    if not say_ground:
        return words
    return choose((f"{words}，{ground}", f"{ground}上，{words}", f"{ground}，{words}"))


def _scene_zh(spec: SceneSpec, rng: random.Random, choose: Choose) -> str:
    say = rng.random() < 0.75

    def coloured(colour: str | None, noun: str) -> str:
        return f"{_COLOUR_ZH[colour]}{choose(('', '的'))}{noun}" if colour and say else noun

    names = {
        "house": coloured(spec.house_colour, choose(("房子", "小屋"))),
        "boat": coloured(spec.boat_colour, choose(("小船", "船"))),
        "flower": coloured(spec.flower_colour, choose(("花", "花朵"))),
        "tree": choose(("树", "大树", "两棵树")),
        "sun": "太阳",
        "moon": choose(("月亮", "弯弯的月亮")),
    }
    items = [names[item] for item in spec.items]
    rng.shuffle(items)
    time, ground = choose(_TIME_ZH[spec.time]), choose(_GROUND_ZH[spec.ground])
    if rng.random() < 0.5:
        opening = f"{time}的{ground}"
        words = f"{opening}，{choose(('和', '，')).join(items)}" if items else opening
    else:
        words = "，".join([*items, ground, time] if rng.random() < 0.5 else [time, ground, *items])
    return words + choose(("", "", "", "，扁平插画"))


def chinese_words() -> tuple[str, ...]:
    """The Chinese words that captions are made of, each of which the tokenizer keeps whole."""
    tables = (_SHAPE_ZH, _SIZE_ZH, _PLACE_ZH, _RELATION_ZH, _TIME_ZH, _GROUND_ZH)
    words = [word for table in tables for row in table.values() for word in row]
    joints = "的 在 有 上 和 一个 一颗 背景 小 大 很小 很大 弯弯 扁平 插画"
    nouns = "房子 小屋 小船 船 花 花朵 树 大树 两棵 太阳 月亮"
    return (*words, *_COLOUR_ZH.values(), *joints.split(), *nouns.split(), *QUALITY_ZH, *NEGATIVE_ZH)
