"""What a language model may write in a prompt's place: properties in both languages, and a table."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.zimage_engine.prompts.test_enhancer_properties import prompts
from zimage_engine.prompts.llm_check import objection_to
from zimage_engine.prompts.llm_kept import kept_in

MANY = settings(max_examples=120, deadline=None, derandomize=True)

#: For each language what prompts are made of, and what a good text adds.
SUBJECTS = {
    "en": ("a fox", "an old lighthouse", "a girl", "a wooden boat", "a garden"),
    "zh": ("狐狸", "一座灯塔", "少女", "木船", "花园"),
}
ADDED = {
    "en": (" resting in warm evening haze", ", fine texture, gentle colours", " beneath drifting mist"),
    "zh": ("，笼罩在温暖的薄雾里", "，质感细腻，色彩柔和", "，远处云雾缭绕"),
}
#: What must not be lost, by the objection that is due when it is.
PRECIOUS = {
    "en": {
        "quoted": ('saying "OPEN 24"', "with “Bonjour” on it", "named after 'Vega'", "marked «Nord»"),
        "weight": ("(neon:1.3)", "((mist))", "[rain]", "<lora:ink:0.8>"),
        "number": ("with three lamps", "7 swans", "an 85mm lens", "twelve candles"),
        "name": ("in Kyoto", "named Alba", "by the Danube"),
        "negation": ("no people", "without shadows", "not crowded"),
        "style": ("pixel art", "watercolor", "at night"),
    },
    "zh": {
        "quoted": ("写着“春风”", "招牌「面馆」", "《山海》封面", '"OPEN"字样'),
        "weight": ("(霓虹:1.3)", "（雾：0.8）", "((雾))", "<lora:ink:0.8>"),
        "number": ("三只白鹤", "7盏灯", "十二棵柳树", "两扇窗"),
        "name": ("名叫阿青", "Leica镜头", "叫小满的孩子"),
        "negation": ("没有行人", "不要文字", "无云"),
        "style": ("像素画", "水彩", "夜景"),
    },
}
JOINT = {"en": ", ", "zh": "，"}
languages = st.sampled_from(sorted(SUBJECTS))


@MANY
@given(prompts())
def test_any_prompt_can_stand_in_its_own_place(prompt: str) -> None:
    assume(prompt.strip())
    assert objection_to(prompt, prompt) is None


@MANY
@given(st.text(min_size=1, max_size=60))
def test_so_can_any_text(text: str) -> None:
    assume(text.strip())
    assert objection_to(text, text) is None


@MANY
@given(languages, st.data())
def test_what_is_only_added_to_can_be_used(language: str, data: st.DataObject) -> None:
    kept = data.draw(
        st.lists(st.sampled_from([each for row in PRECIOUS[language].values() for each in row]), max_size=4)
    )
    prompt = JOINT[language].join([data.draw(st.sampled_from(SUBJECTS[language])), *dict.fromkeys(kept)])
    written = prompt + data.draw(st.sampled_from(ADDED[language]))
    assert objection_to(prompt, written) is None


@MANY
@given(languages, st.data())
def test_whatever_is_lost_is_told(language: str, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(PRECIOUS[language])))
    lost = data.draw(st.sampled_from(PRECIOUS[language][kind]))
    others = [each for name, row in PRECIOUS[language].items() if name != kind for each in row]
    kept = [
        data.draw(st.sampled_from(SUBJECTS[language])),
        *data.draw(st.lists(st.sampled_from(others), max_size=3)),
    ]
    kept = list(dict.fromkeys(kept))
    place = data.draw(st.integers(0, len(kept)))
    prompt = JOINT[language].join([*kept[:place], lost, *kept[place:]])
    written = JOINT[language].join(kept) + data.draw(st.sampled_from(ADDED[language]))
    objection = objection_to(prompt, written)
    assert objection is not None, (prompt, written)
    if language == "en":
        assert objection.outcome == kind or kind == "quoted"


@MANY
@given(prompts(), st.integers(1, 20), st.text(max_size=80))
def test_the_limit_is_kept(prompt: str, limit: int, written: str) -> None:
    def count(text: str) -> int:
        return len(text)

    objection = objection_to(prompt, written, count_tokens=count, token_limit=limit)
    assert len(written) <= limit or objection is not None
    if len(written) > limit and written.strip():
        assert objection is not None and objection.outcome == "too_long"


@MANY
@given(languages, languages, st.data())
def test_the_language_stays(one: str, other: str, data: st.DataObject) -> None:
    prompt = data.draw(st.sampled_from(SUBJECTS[one]))
    written = data.draw(st.sampled_from(SUBJECTS[other])) + data.draw(st.sampled_from(ADDED[other]))
    objection = objection_to(prompt, written)
    assert (objection is not None and objection.outcome == "language") == (one != other)


@pytest.mark.parametrize(
    ("prompt", "written"),
    [
        (
            "three red cats and two dogs on a sofa",
            "Three fluffy red cats and two sleepy dogs rest on a velvet sofa in warm evening light",
        ),
        (
            'a sign saying "OPEN"',
            "a glowing neon sign saying “OPEN” on a wet brick wall at dusk, reflections on the pavement",
        ),
        ("a sign saying OPEN", 'an enamel sign saying "OPEN" above a small bakery'),
        ("2boys playing chess", "two boys playing chess at a wooden table, soft window light"),
        ("a beach with no people", "a wide beach with no people, golden sand, distant clouds"),
        (
            "portrait of Marie Curie in Paris, 85mm",
            "An elegant portrait of Marie Curie in Paris, shot at 85mm, soft side light",
        ),
        (
            "(neon:1.3) street, <lora:foo:0.8>",
            "(neon:1.3) street in the rain, mirrored lights <lora:foo:0.8>",
        ),
        (
            "三只猫坐在窗台上，没有人",
            "窗台上坐着三只毛茸茸的猫，午后的阳光洒在窗帘上，画面中没有人，安静温暖",
        ),
        (
            "夜景，霓虹灯下的少女，“春风”招牌，浅景深",
            "夜景中，霓虹灯下的少女静静站着，头顶“春风”招牌发出柔和红光，浅景深，雨后街面倒映着灯光",
        ),
        ("3只猫", "三只毛色各异的猫依偎在一起，柔和的光线"),
        ("一个叫小明的男孩", "一个叫小明的男孩站在阳光下的田野里，微风吹拂"),
        ("五颜六色的热气球", "五颜六色的热气球缓缓升起，晨雾弥漫在山谷里"),
    ],
)
def test_a_text_that_says_more_of_the_same_picture_can_be_used(prompt: str, written: str) -> None:
    assert objection_to(prompt, written) is None


@pytest.mark.parametrize(
    ("prompt", "written", "outcome"),
    [
        ("a cat", " \n", "empty"),
        ("a cat", "Here is the rewritten prompt: a cat in the sun", "talk"),
        ("a cat", "I'm sorry, but I can't help with that.", "talk"),
        ("一只猫", "好的，以下是改写：一只猫在阳光下", "talk"),
        ("一只猫", "抱歉，我无法处理这个请求", "talk"),
        ("a cat", "a cat. Let me know if you want another!", "talk"),
        ("a cat", "**a cat** in the sun", "talk"),
        ("a cat", "a cat<|im_end|>", "talk"),
        ("a cat", "a cat cat cat cat cat", "loop"),
        ("一只猫", "一只猫，很美很美很美很美很美", "loop"),
        ("a cat on a mat", "一只猫坐在垫子上", "language"),
        ("一只猫", "a cat in the sun", "language"),
        ('a sign "OPEN"', 'a sign "CLOSED"', "quoted"),
        ('a sign "OPEN"', "a sign OPEN", "quoted"),
        ("a quiet street", 'a quiet street with a sign "HOTEL"', "quoted"),
        ("招牌“春风”", "招牌“秋风”", "quoted"),
        ("(fog:1.2), a pier", "(fog:1.4), a pier", "weight"),
        ("a pier <lora:a:1>", "a pier", "weight"),
        ("three cats", "two cats", "number"),
        ("three cats and two dogs", "two cats and three dogs", "number"),
        ("a cat", "three cats on a mat", "number"),
        ("two cats and a dog", "two cats and two dogs", "number"),
        ("三只猫", "两只猫", "number"),
        ("一只猫", "三只猫趴在窗台上", "number"),
        ("a 1920s car", "an old car", "number"),
        ("a portrait of Ada Lovelace", "a portrait of a scientist", "name"),
        ("名叫阿青的剑客", "一位剑客站在雨里", "name"),
        ("上海 Leica 街拍", "上海街拍", "name"),
        ("a beach, no people", "a beach full of people", "negation"),
        ("a beach, no people", "a beach with no people, people swimming", "negation"),
        ("a cat in a hat", "a cat without a hat", "negation"),
        ("海滩，没有行人", "海滩上行人如织", "negation"),
        ("pixel art of a fox", "a photo of a fox in the woods", "style"),
        ("水彩画，狐狸", "狐狸的照片", "style"),
        ("a small tin robot watering roses", "abstract waves of colour", "drift"),
    ],
)
def test_what_must_not_be_used_is_told_by_its_reason(prompt: str, written: str, outcome: str) -> None:
    objection = objection_to(prompt, written)
    assert objection is not None
    assert objection.outcome == outcome or (outcome == "drift" and objection.outcome == "style"), objection
    assert objection.because and len(objection.because) < 200


def test_words_that_look_like_numbers_count_nothing() -> None:
    for text in ("五颜六色的万花筒", "十字路口", "一起去远方", "第三个人", "someone often"):
        assert kept_in(text).counts == ()
    assert [count.value for count in kept_in("二十三只鸟，一百零五盏灯，三千棵树").counts] == [
        "23",
        "105",
        "3000",
    ]


@pytest.mark.parametrize(
    "piece", ["three cats, ", "“字”", "没有人和车，", "no no ", "((((", "Paris 7 ", "三只"]
)
def test_the_longest_texts_are_judged_in_reasonable_time(piece: str) -> None:
    text = (piece * 32_000)[:8_000]
    objection_to(text, text)
