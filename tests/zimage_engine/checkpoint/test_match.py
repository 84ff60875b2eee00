from __future__ import annotations

from pathlib import Path

import pytest

from zimage_engine.checkpoint.features import CheckpointFeatures, ComponentFeatures
from zimage_engine.checkpoint.match import Condition, config_class, config_has, config_lacks, pipeline_class


def features_of(model_index: dict[str, object], **configs: dict[str, object]) -> CheckpointFeatures:
    components = {
        name: ComponentFeatures(name, "diffusers", "", True, config, (), (), ())
        for name, config in configs.items()
    }
    return CheckpointFeatures(Path("/somewhere"), model_index, components)


FEATURES = features_of(
    {"_class_name": "ZImagePipeline"}, transformer={"_class_name": "Denoiser", "dim": 3, "extra": None}
)


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        (pipeline_class("ZImagePipeline"), True),
        (pipeline_class("Other", "ZImagePipeline"), True),
        (pipeline_class("Other"), False),
        (config_class("transformer", "Denoiser"), True),
        (config_class("unet", "Denoiser"), False),
        (config_has("transformer", "dim"), True),
        (config_has("transformer", "extra"), False),
        (config_lacks("transformer", "extra"), True),
        (config_lacks("transformer", "dim"), False),
        (config_has("transformer", "dim") & config_lacks("transformer", "extra"), True),
        (config_has("transformer", "dim") & config_has("transformer", "extra"), False),
    ],
)
def test_words_hold_or_fail(condition: Condition, holds: bool) -> None:
    assert (condition.first_failure(FEATURES) is None) is holds


def test_a_condition_prints_as_it_is_written() -> None:
    condition = pipeline_class("A", "B") & config_has("transformer", "dim") & config_class("vae", "C")
    assert (
        str(condition)
        == "pipeline_class('A', 'B') & config_has('transformer', 'dim') & config_class('vae', 'C')"
    )


def test_the_first_failure_says_what_was_found() -> None:
    condition = config_has("transformer", "dim") & pipeline_class("Other") & config_has("vae", "x")
    failure = condition.first_failure(FEATURES)
    assert failure == "pipeline_class('Other') fails: model_index._class_name is 'ZImagePipeline'"
    assert config_has("vae", "x").first_failure(FEATURES) == "config_has('vae', 'x') fails: vae.x is nothing"


def test_a_condition_tells_every_key_that_it_reads() -> None:
    condition = pipeline_class("A") & config_lacks("transformer", "dim")
    assert condition.addresses == {"model_index._class_name", "transformer.dim"}
