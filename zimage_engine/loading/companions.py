"""What a checkpoint and those named beside it hold together: each component once, and from where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from zimage_engine.checkpoint.features import CheckpointFeatures, ComponentFeatures
from zimage_engine.checkpoint.repair import AppliedRepair
from zimage_engine.checkpoint.tokenizer_files import TokenizerFiles
from zimage_engine.families import ModelFamily
from zimage_engine.loading import repairs as known
from zimage_engine.loading.found_models import FoundModel, found_models, has_no_weights
from zimage_engine.loading.tokenizer_mending import Tokenizer


@dataclass(frozen=True, slots=True)
class Companions:
    """Checkpoints named beside a file that does not hold everything; each a measured folder or file."""

    base: CheckpointFeatures | None = None
    text_encoder: CheckpointFeatures | None = None
    vae: CheckpointFeatures | None = None


@dataclass(frozen=True, slots=True)
class Gathered:
    """`models` are all models by component, `homes` the checkpoint that each component is taken from."""

    features: CheckpointFeatures
    models: Mapping[str, FoundModel] = field(repr=False)
    homes: Mapping[str, CheckpointFeatures] = field(repr=False)
    repairs: tuple[AppliedRepair, ...]

    def component(self, name: str) -> ComponentFeatures | None:
        home = self.homes.get(name)
        return home.components.get(name) if home else None

    def folder(self, name: str) -> Path:
        """Where the files of the component `name` are, or would be."""
        return _root(self.homes.get(name, self.features)) / name

    def tokenizer(self, name: str) -> Tokenizer:
        component = self.component(name)
        return Tokenizer(name, self.folder(name), (component and component.tokenizer) or TokenizerFiles())

    def whole_sibling(self, name: str, encoders: Mapping[str, str]) -> Tokenizer | None:
        """Another tokenizer that is whole and whose text encoder has as many words.

        `encoders` names the text encoder that each tokenizer reads for.
        """
        words = self._words_of(encoders[name])
        for other, encoder in encoders.items():
            tokenizer = self.tokenizer(other)
            is_alike = words is not None and self._words_of(encoder) == words
            if other != name and tokenizer.is_whole and is_alike:
                return tokenizer
        return None

    def _words_of(self, text_encoder: str) -> int | None:
        model = self.models.get(text_encoder)
        tables = [shape for name, shape in model.shapes.items() if "token_embedding" in name] if model else []
        return tables[0][0] if tables else None


def gather(
    features: CheckpointFeatures,
    models: Mapping[str, FoundModel],
    family: ModelFamily,
    companions: Companions,
) -> Gathered:
    """The checkpoint's own components, and from its companions what it does not hold itself."""
    own = Gathered(features, dict(models), dict.fromkeys(features.components, features), ())
    for name, source in _sources_beside(family, companions):
        own = _with(own, name, source, family)
    return own


def _sources_beside(family: ModelFamily, companions: Companions) -> Iterable[tuple[str, CheckpointFeatures]]:
    named = {"text_encoder": companions.text_encoder, "vae": companions.vae}
    for name in family.components:
        for source in (named.get(name), companions.base):
            if source is not None:
                yield name, source


def _with(own: Gathered, name: str, source: CheckpointFeatures, family: ModelFamily) -> Gathered:
    """`own` with the component `name` from `source`, where it needs that one."""
    taken = AppliedRepair(known.TAKE_FROM_BASE, name, f"taken from {source.path}")
    moved = {**own.homes, name: source}
    if name in dict(family.text_encoders) and _has_the_whole_tokenizer(own, name, source):
        return replace(own, homes=moved, repairs=(*own.repairs, taken))
    mine = own.features.components.get(name)
    is_model = mine is not None and not has_no_weights(mine)
    if name in own.models or (name in own.homes and not is_model):
        return own
    model = found_models(source).get(name)
    models = own.models
    if model is not None:
        models = {**models, name: replace(model, repairs=(taken, *model.repairs))}
    if name not in source.components or name in own.homes:
        return replace(own, models=models)
    # A model's repair is told with the model.
    told = () if name in models else (taken,)
    return replace(own, models=models, homes=moved, repairs=(*own.repairs, *told))


def _has_the_whole_tokenizer(own: Gathered, name: str, source: CheckpointFeatures) -> bool:
    """Whether `source` has the tokenizer that the checkpoint itself lacks or has only in part."""
    theirs = source.components.get(name)
    if theirs is None or theirs.tokenizer is None or own.tokenizer(name).is_whole:
        return False
    return Tokenizer(name, source.path / name, theirs.tokenizer).is_whole


def _root(features: CheckpointFeatures) -> Path:
    return features.path if features.path.is_dir() else features.path.parent
