"""ModelLoaderAdapter: what stands between a model on disk and the stock `from_pretrained`.

    adapter = ModelLoaderAdapter("/models/z-image-turbo")
    print(adapter.explain())
    pipeline = adapter.load()
    # the same without the checks:
    pipeline = ZImagePipeline.from_pretrained(adapter.model_path, **adapter.get_load_kwargs())

Recognising and explaining read JSON and file headers only; torch is imported by `load` and
`get_load_kwargs`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from zimage_engine.checkpoint.features import CheckpointFeatures, read_features
from zimage_engine.errors import CheckpointDamaged
from zimage_engine.families import ModelFamily, family_named, identify
from zimage_engine.loading.locate import locate
from zimage_engine.loading.plan import LoadPlan, plan_load


class ModelLoaderAdapter:
    """Loads one model of a supported family, whatever name it has.

    `path_or_repo_id` is a folder or a hub id. `family` is the name of a family, for a checkpoint that is
    known better than its files tell; None recognises it from the inside. Each property is read once, on
    first use, and raises what that step can find: CheckpointNotFound, UnknownFamily, CheckpointDamaged.
    """

    def __init__(self, path_or_repo_id: str | Path, family: str | None = None) -> None:
        self._path_or_repo_id = path_or_repo_id
        self._family_name = family

    @cached_property
    def model_path(self) -> Path:
        """The folder on disk; a hub id that is not whole in the cache is fetched."""
        return locate(self._path_or_repo_id)

    @cached_property
    def features(self) -> CheckpointFeatures:
        """What is in the folder."""
        return read_features(self.model_path)

    @cached_property
    def family(self) -> ModelFamily:
        """What kind of model it is."""
        return family_named(self._family_name) if self._family_name else identify(self.features)

    @cached_property
    def plan(self) -> LoadPlan:
        """How it will be loaded."""
        return plan_load(self.features, self.family)

    def get_load_kwargs(self) -> dict[str, Any]:
        """The keyword arguments for the stock `from_pretrained(model_path, ...)`."""
        import torch

        return {
            # The dtype itself: diffusers takes its name as a string for nothing and loads float32.
            "torch_dtype": getattr(torch, self.family.dtype),
            "use_safetensors": self.plan.use_safetensors,
            "variant": self.plan.variant,
            "local_files_only": True,
        }

    def explain(self) -> str:
        """What was recognised, by what, and how it will be loaded, for a person to read."""
        because = f"family={self._family_name!r} was given" if self._family_name else self.family.fingerprint
        lines = [
            f"{self.model_path}: {self.family.title}",
            f"  because {because}",
            f"  loaded by {self.family.pipeline_class}.from_pretrained",
            *(f"  {reason}" for reason in self.plan.reasons),
        ]
        for component, files in self.plan.weights.items():
            tensors = [tensor for file in files for tensor in file.tensors]
            stored = "/".join(sorted({tensor.dtype for tensor in tensors})) or "unknown until read"
            megabytes = sum(file.size_bytes for file in files) / 1e6
            names = files[0].name if len(files) == 1 else f"{len(files)} files"
            lines.append(f"  {component}: {names}, {megabytes:.1f} MB, {len(tensors)} tensors, {stored}")
        return "\n".join(lines)

    def load(self) -> Any:
        """The stock pipeline on the CPU, verified.

        Raises CheckpointDamaged for whatever keeps it from drawing, also where diffusers would go on.
        """
        import diffusers

        from zimage_engine.loading.verify import verify

        pipeline_class = getattr(diffusers, self.plan.family.pipeline_class)
        with _quiet_loading():
            try:
                pipeline = pipeline_class.from_pretrained(self.model_path, **self.get_load_kwargs())
            # What the stock loaders raise for files they cannot use; MemoryError and bugs of ours go through.
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                raise CheckpointDamaged(
                    f"{self.model_path} is a {self.family.title} model, but diffusers cannot load it: {error}"
                ) from error
        pipeline.set_progress_bar_config(disable=True)
        verify(pipeline, self.plan)
        return pipeline


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No progress bars, and no advice on the name of a keyword that this version of diffusers still takes."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    shown = [bars for bars in (diffusers_logging, transformers_logging) if bars.is_progress_bar_enabled()]
    for bars in shown:
        bars.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch_dtype.*")
            yield
    finally:
        for bars in shown:
            bars.enable_progress_bar()
