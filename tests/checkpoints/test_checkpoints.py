"""Every case: it loads and draws what the undamaged model draws, or is refused in a useful sentence."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch

from tests.checkpoints.cases import CASES, Case
from tests.checkpoints.models import adapter_for, damaged
from tests.checkpoints.outcome import outcome

HERE = Path(__file__).parent


def test_every_case_has_its_folder_and_every_folder_its_case() -> None:
    folders = {path.parent.name for path in HERE.glob("*/expected.json")}
    assert folders == {case.name for case in CASES}
    assert len(folders) >= 60
    assert sum(case.together for case in CASES) >= 25


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_comes_out_as_expected(case: Case, healthy, tmp_path: Path) -> None:
    expected = json.loads((HERE / case.name / "expected.json").read_text(encoding="utf-8"))
    folder, reference = healthy(case.model)
    found = outcome(case, folder, reference, tmp_path)
    if case.error:
        assert found.get("error") == case.error, found
        assert case.message in found["message"]
        assert len(found["message"]) < 2000
    else:
        assert "error" not in found, found["message"]
        assert found["picture"] == ("within rounding" if case.rounding else "equal")
        assert set(case.repairs) <= set(found["repairs"])
    assert {key: found.get(key) for key in ("family", "repairs", "error", "picture")} == {
        key: expected.get(key) for key in ("family", "repairs", "error", "picture")
    }


@pytest.mark.parametrize("case", [case for case in CASES if not case.error][::11], ids=lambda case: case.name)
def test_the_users_files_stay_as_they_were(case: Case, healthy, tmp_path: Path) -> None:
    path, folder = damaged(case, healthy(case.model)[0], tmp_path)

    def state() -> dict[str, tuple[int, int]]:
        return {
            str(each): (each.stat().st_size, each.stat().st_mtime_ns)
            for each in folder.rglob("*")
            if each.is_file()
        }

    before = state()
    adapter_for(case, path, folder, tmp_path / "views").load()
    assert state() == before
    assert not (Path.cwd() / "was-run").exists()


STOCK_CALLS = {
    "z-image": diffusers.ZImagePipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "pixart-sigma": diffusers.PixArtSigmaPipeline,
}


@pytest.mark.parametrize("name", STOCK_CALLS)
@pytest.mark.parametrize("is_damaged", [False, True], ids=["healthy", "damaged"])
def test_the_stock_call_takes_the_path_and_the_kwargs(
    name: str, is_damaged: bool, healthy, tmp_path: Path
) -> None:
    case = next(case for case in CASES if case.name == f"{name}-{'compiled' if is_damaged else 'healthy'}")
    path, folder = damaged(case, healthy(name)[0], tmp_path)
    adapter = adapter_for(case, path, folder, tmp_path / "views")
    assert (adapter.model_path == path) is not is_damaged
    stock = STOCK_CALLS[name].from_pretrained(adapter.model_path, **adapter.get_load_kwargs())
    ours = adapter.load()
    for component in (adapter.family.denoiser, "vae", "text_encoder"):
        weights = getattr(stock, component).state_dict()
        for key, tensor in getattr(ours, component).state_dict().items():
            assert torch.equal(weights[key], tensor), f"{component}.{key}"
