"""LoRAs by name in requests: each picture is that of a fresh engine with the same, whatever was before."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_map

from tests.zimage_engine.memory.quantised_words import HAS_INT8
from tests.zimage_engine.tiny_models import write_tiny_pixart, write_tiny_sdxl, write_tiny_z_image
from tests.zimage_engine.tiny_models.lora import write_lora
from zimage_engine import Engine, GenerationRequest, LoraWeight
from zimage_engine.errors import GenerationCancelled, InvalidRequest
from zimage_engine.loading import lora_shelf
from zimage_engine.loading.lora_choice import choices_in_prompt
from zimage_engine.memory.options import PlannedOptions
from zimage_engine.memory.planner import PlanOptions
from zimage_engine.memory.residency import MemoryWishes, OffloadPlan
from zimage_engine.sampling.control import DrawingControl
from zimage_engine.types import GenerationResult, LoraChoice

ASKED = GenerationRequest(
    prompt="A red circle", seed=11, width=64, height=64, num_inference_steps=2, enhance=False
)
#: What the server was started with, and what a request may name: some share modules, one adapts fewer.
STARTED = ("light", 0.6)
#: None: the request says nothing of LoRAs.
COMBINATIONS: tuple[tuple[tuple[str, float], ...] | None, ...] = (
    None,
    (),
    (("style", 0.8),),
    (("style", -0.3),),
    (("touch", 1.0),),
    (("ink", 0.5),),
    (("style", 0.8), ("touch", 0.5)),
    (("touch", 0.5), ("style", 0.8)),
    (("ink", 0.7), ("light", 0.2)),
)


def write_text_lora(model: Path, file: Path) -> Path:
    """A LoRA for the denoiser and the first text encoder of an SDXL folder."""
    tensors = load_file(write_lora(model, file, seed=3))
    weights = load_file(next((model / "text_encoder").glob("*.safetensors")))
    name = next(name for name in weights if name.endswith("layers.0.self_attn.q_proj.weight"))
    rows, columns = weights[name].shape
    stem = f"text_encoder.{name.removesuffix('.weight')}"
    generator = torch.Generator().manual_seed(3)
    tensors[f"{stem}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
    tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, 4, generator=generator)
    save_file(tensors, file)
    return file


class Rig:
    """A model with a folder of LoRAs, an engine that is used again and again, and what fresh ones draw."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        write_lora(model, folder / "style.safetensors", seed=1)
        write_lora(model, folder / "touch.safetensors", seed=2, modules=("to_q",))
        write_lora(model, folder / "light.safetensors", seed=4)
        has_text = (model / "unet").is_dir()
        (write_text_lora if has_text else write_lora)(model, folder / "ink.safetensors")
        started = [LoraWeight(folder / f"{STARTED[0]}.safetensors", STARTED[1])]
        self.engine = Engine.load(model, "cpu", loras=started, lora_folder=folder)
        self._fresh: dict[Any, bytes] = {}

    def fresh(self, combination: tuple[tuple[str, float], ...] | None) -> bytes:
        """What an engine draws that was loaded with these LoRAs, and has drawn nothing else."""
        wanted = (STARTED,) if combination is None else combination
        if wanted not in self._fresh:
            loras = [LoraWeight(self.folder / f"{name}.safetensors", weight) for name, weight in wanted]
            fresh = Engine.load(self.model, "cpu", loras=loras)
            self._fresh[wanted] = fresh.generate(ASKED).images[0].tobytes()
        return self._fresh[wanted]

    def asked(self, combination: tuple[tuple[str, float], ...] | None) -> GenerationRequest:
        named = None if combination is None else tuple(LoraChoice(*each) for each in combination)
        return replace(ASKED, loras=named)

    def drawn(self, combination: tuple[tuple[str, float], ...] | None) -> GenerationResult:
        return self.engine.generate(self.asked(combination))

    @property
    def denoiser(self) -> torch.nn.Module:
        part = "unet" if hasattr(self.engine.pipeline, "unet") else "transformer"
        return getattr(self.engine.pipeline, part)


@pytest.fixture(scope="module")
def rigs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rig]:
    folder = tmp_path_factory.mktemp("loras-by-name")
    return {
        "z-image": Rig(write_tiny_z_image(folder / "z"), folder / "loras of z"),
        "sdxl": Rig(write_tiny_sdxl(folder / "x"), folder / "loras of x"),
    }


@pytest.fixture
def rig(rigs: dict[str, Rig]) -> Rig:
    return rigs["z-image"]


@contextmanager
def once(denoiser: torch.nn.Module, happening: Any) -> Iterator[None]:
    """The next output of the denoiser is what `happening` makes of it; what it raises is raised there."""
    left = [happening]

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        return left.pop()(output) if left else output

    handle = denoiser.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    assert not left


def spoilt(output: Any) -> Any:
    return tree_map(lambda value: value * float("nan"), output)


def out_of_memory(_output: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory (injected)")


DISTURBANCES = ("cancel", "fault", "memory", "refusal")


def disturb(rig: Rig, combination: tuple[tuple[str, float], ...] | None, kind: str) -> None:
    """A request that does not end as others do."""
    if kind == "cancel":
        control = DrawingControl()
        with pytest.raises(GenerationCancelled):
            rig.engine.generate(rig.asked(combination), on_step=lambda _: control.cancel(), control=control)
    elif kind == "fault":
        with once(rig.denoiser, spoilt):
            report = rig.drawn(combination).report
        assert report.pictures[0].guard.trips
    elif kind == "memory":
        with once(rig.denoiser, out_of_memory):
            result = rig.drawn(combination)
        assert result.report.memory is not None and result.report.memory.oom_recoveries == ("freed",)
        assert result.images[0].tobytes() == rig.fresh(combination)
    else:
        with pytest.raises(InvalidRequest):
            rig.drawn((("style", 0.8), ("nothing", 1.0)))


@pytest.mark.parametrize("kind", ["z-image", "sdxl"])
def test_fifty_requests_of_each_model_draw_what_fresh_engines_draw(
    rigs: dict[str, Rig], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few are kept, so that they come and go; every fifth follows on one that was disturbed."""
    monkeypatch.setattr(lora_shelf, "KEPT_LORAS", 3)
    rig, chance = rigs[kind], random.Random(20)
    for number in range(50):
        if number % 5 == 0:
            disturb(rig, chance.choice(COMBINATIONS), DISTURBANCES[number // 5 % 4])
        combination = chance.choice(COMBINATIONS)
        result = rig.drawn(combination)
        assert result.images[0].tobytes() == rig.fresh(combination), (number, combination)
        wanted = (STARTED,) if combination is None else combination
        told = [(use.name, use.weight) for use in result.report.loras]
        assert told == [(f"{name}.safetensors", weight) for name, weight in wanted]
        assert len(rig.engine._shelf) <= 3
    assert len({rig.fresh(each) for each in COMBINATIONS}) == len(COMBINATIONS)
    assert [(use.name, use.weight) for use in rig.engine.loras] == [("light.safetensors", 0.6)]


#: Where it is refused, the other way of multiplying in the small type.
DYNAMIC = ("z-image", "int8-dynamic" if HAS_INT8 else "fp8-dynamic")


@pytest.mark.parametrize(
    ("kind", "word"), [("z-image", "int8"), ("z-image", "fp8"), ("sdxl", "int8"), DYNAMIC]
)
def test_over_quantised_matrices_they_draw_what_fresh_engines_draw(
    rigs: dict[str, Rig], kind: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_shelf, "KEPT_LORAS", 2)
    rig, wishes = rigs[kind], MemoryWishes(quantize=word)
    engine = Engine.load(rig.model, "cpu", lora_folder=rig.folder, memory=wishes)
    expected: dict[Any, bytes] = {}
    for combination in ((), (("ink", 0.7), ("light", 0.2))):
        loras = [LoraWeight(rig.folder / f"{name}.safetensors", weight) for name, weight in combination]
        fresh = Engine.load(rig.model, "cpu", loras=loras, memory=wishes)
        expected[combination] = fresh.generate(ASKED).images[0].tobytes()
        assert expected[combination] != rig.fresh(combination), "drawn with other matrices"
    assert len(set(expected.values())) == len(expected)
    off, mixed = expected
    for combination in (mixed, off, mixed, (("style", 0.8),), off, mixed):
        result = engine.generate(rig.asked(combination))
        assert result.images[0].tobytes() == expected.get(combination, result.images[0].tobytes())
        assert result.report.memory is not None and result.report.memory.quantize == word


@dataclass(frozen=True, eq=False)
class Card(PlannedOptions):
    """The planner of a card that has always the same room."""

    def options(
        self, width_px: int, height_px: int, guided: bool, free_bytes: int | None
    ) -> Sequence[OffloadPlan]:
        return super().options(width_px, height_px, guided, 2**30)


def test_what_they_take_is_planned_for_and_idle_ones_go_where_a_picture_needs_their_room(
    tmp_path: Path,
) -> None:
    model = write_tiny_z_image(tmp_path / "z")
    for number in range(3):
        write_lora(model, tmp_path / "loras" / f"{number}.safetensors", seed=number)
    engine = Engine.load(model, "cpu", lora_folder=tmp_path / "loras")
    keeper, asked = engine._keeper, replace(ASKED, guidance_scale=1.0, loras=())

    def named(*numbers: int) -> GenerationRequest:
        return replace(asked, loras=tuple(LoraChoice(str(number)) for number in numbers))

    size = (asked.width, asked.height, False)
    expected = [engine.generate(named(number)).images[0].tobytes() for number in range(3)]
    one_bytes = engine._shelf.bytes // 3
    on_pipeline = sum(
        weight.nbytes for name, weight in engine.pipeline.transformer.named_parameters() if ".lora_" in name
    )
    assert engine._shelf.bytes == on_pipeline > 0 and engine._shelf.idle_bytes == 2 * one_bytes
    alone = Card(keeper._footprint, PlanOptions(), 0)
    fastest = alone.options(*size, None)[0]
    # Room for the fastest way with two LoRAs beside it, and not with three.
    reserve = 2**30 - fastest.peak_bytes - 2 * one_bytes - one_bytes // 2
    keeper._planner = keeper._planner_alone = replace(alone, reserve_bytes=reserve)
    keeper._beside_bytes = 0
    for number in (0, 1, 2, 0):
        result = engine.generate(named(number))
        assert result.images[0].tobytes() == expected[number]
        assert result.report.memory is not None
        assert keeper.plan is not None and keeper.plan.relative_speed == fastest.relative_speed
        assert len(engine._shelf) <= 2
    engine.generate(named(0, 1, 2))
    assert keeper.plan is not None and keeper.plan.relative_speed < fastest.relative_speed
    engine.generate(named())
    assert keeper.plan.peak_bytes + engine._shelf.bytes <= 2**30 - reserve


def test_all_pictures_of_a_request_have_its_loras(rig: Rig) -> None:
    """Requests are drawn one after another, so LoRAs of two never meet."""
    asked = replace(rig.asked((("style", 0.8),)), n=2)
    result = rig.engine.generate(asked)
    alone = [rig.engine.generate(replace(asked, n=1, seed=seed)).images[0] for seed in (11, 12)]
    assert [image.tobytes() for image in result.images] == [image.tobytes() for image in alone]
    assert result.images[0].tobytes() == rig.fresh((("style", 0.8),))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("stile", "did you mean 'style'"),
        ("../loras of z/style", "did you mean|there are"),
        ("../../x/style", "there is no LoRA"),
        ("/etc/passwd", "there is no LoRA"),
        ("style/../style", "there is no LoRA"),
        ("..", "there is no LoRA"),
        ("", "there is no LoRA"),
        ("style\0", "there is no LoRA"),
        ("z" * 5000, "there is no LoRA"),
    ],
)
def test_a_name_is_looked_up_and_never_made_into_a_path(rig: Rig, name: str, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told) as refused:
        rig.drawn(((name, 1.0),))
    assert refused.value.parameter == "loras"
    assert str(rig.folder) not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_an_ending_and_another_spelling_of_an_accent_are_the_same_name(rig: Rig) -> None:
    file = write_lora(rig.model, rig.folder / "\u6c34\u5f69 caf\u00e9.safetensors", seed=7)
    try:
        plain = rig.drawn(((file.stem, 1.0),)).images[0].tobytes()
        assert rig.drawn(((file.name, 1.0),)).images[0].tobytes() == plain
        assert rig.drawn((("\u6c34\u5f69 cafe\u0301", 1.0),)).images[0].tobytes() == plain
    finally:
        file.unlink()


def test_a_name_twice_too_many_and_weights_that_are_no_numbers_are_refused(rig: Rig) -> None:
    for named, told in (
        ([("style", 1.0), ("style.safetensors", 0.5)], "twice"),
        ([("style", float("nan"))], "finite"),
        ([("style", 1.0)] * 9, "at most 8"),
    ):
        with pytest.raises(InvalidRequest, match=told):
            rig.drawn(tuple(named))


def test_the_folder_is_looked_at_anew(rig: Rig) -> None:
    file = rig.folder / "new.safetensors"
    with pytest.raises(InvalidRequest, match="there is no LoRA 'new'"):
        rig.drawn((("new", 1.0),))
    write_lora(rig.model, file, seed=8)
    first = rig.drawn((("new", 1.0),))
    other = write_lora(rig.model, rig.folder / ".new.part", seed=9)
    other.replace(file)
    second = rig.drawn((("new", 1.0),))
    assert first.images[0].tobytes() != second.images[0].tobytes()
    assert first.report.loras[0].digest != second.report.loras[0].digest
    fresh = Engine.load(rig.model, "cpu", loras=[LoraWeight(file)]).generate(ASKED).images[0]
    assert second.images[0].tobytes() == fresh.tobytes()
    file.unlink()
    with pytest.raises(InvalidRequest, match="there is no LoRA 'new'"):
        rig.drawn((("new", 1.0),))
    assert rig.drawn(()).images[0].tobytes() == rig.fresh(())


def test_what_was_there_at_the_start_stays_the_default_when_its_file_goes(tmp_path: Path, rig: Rig) -> None:
    file = write_lora(rig.model, tmp_path / "started.safetensors", seed=6)
    engine = Engine.load(rig.model, "cpu", loras=[LoraWeight(file)])
    before = engine.generate(ASKED).images[0].tobytes()
    file.unlink()
    assert engine.generate(replace(ASKED, loras=())).images[0].tobytes() == rig.fresh(())
    assert engine.generate(ASKED).images[0].tobytes() == before


def test_files_that_do_not_fit_are_listed_with_the_reason_and_refused(
    rigs: dict[str, Rig], tmp_path: Path
) -> None:
    rig = rigs["z-image"]
    folder = tmp_path / "odd"
    good = write_lora(rig.model, folder / "good.safetensors", seed=1)
    whole = good.read_bytes()
    (folder / "torn.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "pickle.safetensors").write_bytes(b"\x80\x04cos\nsystem\n" + b"x" * 50)
    save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    save_file(
        {name: value * torch.nan for name, value in load_file(good).items()}, folder / "nan.safetensors"
    )
    write_lora(rigs["sdxl"].model, folder / "foreign.safetensors")
    (folder / "pickle.pt").write_bytes(b"\x80\x04")
    (folder / "folder.safetensors").mkdir()
    outside = write_lora(rig.model, tmp_path / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "ring.safetensors").symlink_to(folder / "ring.safetensors")
    (folder / "inside.safetensors").symlink_to(good)
    (folder / "gone.safetensors").symlink_to(tmp_path / "nothing")

    engine = Engine.load(rig.model, "cpu", lora_folder=folder)
    offers = {offer.name: offer for offer in engine.loras_offered()}
    fitting = {name for name, offer in offers.items() if not offer.refusal}
    assert fitting == {"good", "inside", "nan"}
    assert offers.keys() >= {"torn", "empty", "pickle", "model", "foreign", "link"}
    assert not offers.keys() & {"folder", "pickle.pt", "outside"}
    assert offers["good"].digest and offers["good"].made_for
    for name, words in {
        "torn": "fetch it again",
        "pickle": "is a pickle",
        "model": "belong to no LoRA",
        "foreign": "Stable Diffusion",
        "link": "leads out of the folder",
        "nan": "not finite",
    }.items():
        with pytest.raises(InvalidRequest, match=words) as refused:
            engine.generate(replace(ASKED, loras=(LoraChoice(name),)))
        assert str(tmp_path) not in str(refused.value)
        assert name in str(refused.value)
    assert engine.generate(replace(ASKED, loras=())).images[0].tobytes() == rig.fresh(())
    of_sdxl = Engine.load(rigs["sdxl"].model, "cpu", lora_folder=folder)
    assert {offer.name for offer in of_sdxl.loras_offered() if not offer.refusal} == {"foreign"}


def test_a_model_that_takes_no_loras_says_so_of_each(rig: Rig, tmp_path: Path) -> None:
    engine = Engine.load(write_tiny_pixart(tmp_path / "tiny"), "cpu", lora_folder=rig.folder)
    assert all("takes no LoRAs" in offer.refusal for offer in engine.loras_offered())
    with pytest.raises(InvalidRequest, match="takes no LoRAs"):
        engine.generate(replace(ASKED, loras=(LoraChoice("style"),)))


def test_the_authors_words_are_passed_on(rig: Rig, tmp_path: Path) -> None:
    file = write_lora(rig.model, tmp_path / "told.safetensors")
    save_file(
        load_file(file),
        file,
        {"modelspec.trigger_phrase": "inkwash, ink", "modelspec.usage_hint": "0.6 to 0.8"},
    )
    (offer,) = Engine.load(rig.model, "cpu", lora_folder=tmp_path).loras_offered()
    assert (offer.trigger_words, offer.usage_hint) == (("inkwash", "ink"), "0.6 to 0.8")


@pytest.mark.parametrize(
    ("prompt", "left", "named"),
    [
        ("a cat", "a cat", ()),
        ("a cat <lora:style:0.8>", "a cat", (LoraChoice("style", 0.8),)),
        ("<lora:style> a cat", "a cat", (LoraChoice("style"),)),
        (
            "a <lora:a b:-1.5> cat<lora:水彩:.5:0.2>",
            "a cat",
            (LoraChoice("a b", -1.5), LoraChoice("水彩", 0.5)),
        ),
        ("a cat <lora:style:much>", "a cat", (LoraChoice("style"),)),
        ("a < lora:style> b", "a < lora:style> b", ()),
        ("a <lora:> b", "a <lora:> b", ()),
    ],
)
def test_tags_in_a_prompt_name_loras(prompt: str, left: str, named: tuple[LoraChoice, ...]) -> None:
    assert choices_in_prompt(prompt) == (left, named)
