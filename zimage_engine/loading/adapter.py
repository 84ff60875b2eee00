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
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from zimage_engine.checkpoint.features import CheckpointFeatures, read_features
from zimage_engine.errors import CheckpointDamaged
from zimage_engine.families import FAMILIES, ModelFamily, family_named
from zimage_engine.loading.collector import collector_at_rest
from zimage_engine.loading.companions import Companions
from zimage_engine.loading.found_models import FoundModel
from zimage_engine.loading.known_loads import KnownLoad, KnownLoads, key_of_load
from zimage_engine.loading.locate import commit_of, locate
from zimage_engine.loading.lora_description import refuse_lora
from zimage_engine.loading.mending import Mending, plan_mending
from zimage_engine.loading.plan import LoadPlan, plan_load
from zimage_engine.loading.provenance import digest_of
from zimage_engine.loading.view import default_cache_folder, ensure_view, find_view
from zimage_engine.types import ModelIdentity


class ModelLoaderAdapter:
    """Loads one model of a supported family, whatever name it has and whatever of it must be mended.

    `path_or_repo_id` is a folder, a single file of weights, or a hub id (`owner/name`, or
    `owner/name@revision` with a branch, tag or commit). `family` is the name of a family, for a checkpoint
    that is known better than its files tell; None recognises it from the inside. `base`, `text_encoder` and
    `vae` are folders or files that supply what a single file lacks; `cache_folder` is where repaired views
    are kept (None: the user's cache directory). `dtype` is "bfloat16" (None: the family's own, which is
    that), "float32" or "float16". `fetch` False refuses a hub id that is not whole in the cache. Each
    property is read once, on first use, and raises what that step can find:
    CheckpointNotFound, UnknownFamily, CheckpointDamaged, DtypeRefused.
    """

    def __init__(
        self,
        path_or_repo_id: str | Path,
        family: str | None = None,
        *,
        base: str | Path | None = None,
        text_encoder: str | Path | None = None,
        vae: str | Path | None = None,
        cache_folder: Path | None = None,
        dtype: str | None = None,
        fetch: bool = True,
    ) -> None:
        self._path_or_repo_id = path_or_repo_id
        self._family_name = family
        self._beside = {"base": base, "text_encoder": text_encoder, "vae": vae}
        self._cache_folder = cache_folder
        self._dtype = dtype
        self._fetch = fetch

    @cached_property
    def origin(self) -> Path:
        """The folder or file on disk; a hub id that is not whole in the cache is fetched."""
        return locate(self._path_or_repo_id, fetch=self._fetch)

    @property
    def commit(self) -> str | None:
        """The commit hash that a hub id was resolved to; None for files from elsewhere."""
        return commit_of(self.origin)

    @cached_property
    def _measured(self) -> CheckpointFeatures:
        return read_features(self.origin)

    @cached_property
    def mending(self) -> Mending:
        """What it was recognised as and every repair that it needs; nothing is written for this."""
        refuse_lora(self.origin)
        beside = {
            name: None if path is None else read_features(locate(path, fetch=self._fetch))
            for name, path in self._beside.items()
        }
        return plan_mending(self._measured, self._family_name, Companions(**beside), self._dtype)

    @cached_property
    def family(self) -> ModelFamily:
        """What kind of model it is, drawing in the dtype that it is loaded as."""
        if "mending" not in vars(self) and self._known is not None:
            return replace(family_named(self._known.family), dtype=self._known.dtype)
        return self.mending.family

    @cached_property
    def model_path(self) -> Path:
        """The folder for the stock call: the original where it is healthy, else its repaired view."""
        view = self.mending.view
        return self.origin if view is None else ensure_view(view, self._cache_folder)

    @cached_property
    def features(self) -> CheckpointFeatures:
        """What is in `model_path`."""
        if self.mending.view is None:
            return self._measured
        return read_features(self.model_path, is_our_view=True)

    @cached_property
    def plan(self) -> LoadPlan:
        """How `model_path` will be loaded."""
        return plan_load(self.features, self.family)

    def check(self) -> None:
        """Raise whatever would keep it from loading and shows without loading; writes nothing."""
        if self.mending.view is None:
            _ = self.plan

    def get_load_kwargs(self) -> dict[str, Any]:
        """The keyword arguments for the stock `from_pretrained(model_path, ...)`."""
        plan = self.plan
        return _load_kwargs(
            KnownLoad(plan.family.name, self.family.dtype, plan.use_safetensors, plan.variant, "", ())
        )

    def explain(self) -> str:
        """What was recognised, by what, what is mended and why, what was checked, for a person to read."""
        self.check()
        mending = self.mending
        lines = [
            f"{self.origin}: {self.family.title}",
            f"  because {mending.because}",
            f"  loaded by {self.family.pipeline_class}.from_pretrained",
        ]
        if self.commit is not None:
            lines.append(f"  from the hub, at the commit {self.commit}")
        lines += [f"  note: {note}" for note in mending.notes]
        if mending.view is None:
            lines += [f"  {reason}" for reason in self.plan.reasons]
            lines.append("  repairs: none, the files are loaded as they are")
        else:
            lines.append(f"  {self.family.dtype}: said outright, because without it diffusers mixes dtypes")
            lines.append(
                f"  repairs: {len(mending.repairs)}, in a view beside the files, which stay untouched"
            )
            lines += [
                f"    {made.repair.name} ({made.place}): {made.detail}; {made.repair.because}"
                for made in mending.repairs
            ]
        lines += [_model_line(model) for model in mending.models]
        return "\n".join(lines)

    def load(self) -> Any:
        """The stock pipeline on the CPU, verified.

        A content that was loaded and verified before is loaded as it was then, without looking at it anew.
        Raises CheckpointDamaged for whatever keeps it from drawing, also where diffusers would go on.
        """
        with collector_at_rest():
            return self._load()

    def _load(self) -> Any:
        from zimage_engine.loading.verify import verify

        known = self._known
        if known is not None:
            return self._from_pretrained(self._known_path(known), known)
        load = KnownLoad(
            family=self.family.name,
            dtype=self.family.dtype,
            use_safetensors=self.plan.use_safetensors,
            variant=self.plan.variant,
            view="" if self.mending.view is None else self.model_path.name,
            repairs=tuple(made.repair.name for made in self.mending.repairs),
        )
        pipeline = self._from_pretrained(self.model_path, load)
        verify(pipeline, self.plan)
        if self._key is not None:
            self._known_loads.remember(self._key, load)
        return pipeline

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files of weights that `load` reads, in its order; before a repair those it is made from."""
        known = self._known
        if known is None and self.mending.view is not None:
            found = (file for model in self.mending.models for file in model.stored.files)
        elif known is None:
            found = (file for files in self.plan.weights.values() for file in files)
        else:
            features = read_features(self._known_path(known), is_our_view=bool(known.view))
            found = (file for files in plan_load(features, self.family).weights.values() for file in files)
        return tuple(dict.fromkeys(file.path for file in found))

    @property
    def repairs(self) -> tuple[str, ...]:
        """The names of the repairs, as `load` makes them."""
        if self._known is not None:
            return self._known.repairs
        return tuple(made.repair.name for made in self.mending.repairs)

    @property
    def identity(self) -> ModelIdentity:
        """What it is made of, wherever its files stand: their content, and its commit where it has one."""
        beside = [locate(path) for path in self._beside.values() if path is not None]
        return ModelIdentity(digest_of([self.origin, *beside]), self.commit, self.repairs)

    def _from_pretrained(self, path: Path, load: KnownLoad) -> Any:
        import diffusers

        pipeline_class = getattr(diffusers, self.family.pipeline_class)
        with _quiet_loading():
            try:
                pipeline = pipeline_class.from_pretrained(path, **_load_kwargs(load))
            # What the stock loaders raise for files they cannot use; MemoryError and bugs of ours go through.
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                raise CheckpointDamaged(
                    f"{self.origin} is a {self.family.title} model, but diffusers cannot load it: {error}"
                ) from error
            pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @cached_property
    def _known_loads(self) -> KnownLoads:
        return KnownLoads(self._cache_folder or default_cache_folder())

    @cached_property
    def _key(self) -> str | None:
        beside = {name: None if path is None else locate(path) for name, path in self._beside.items()}
        return key_of_load(
            {"model": self.origin, **beside}, {"family": self._family_name, "dtype": self._dtype}
        )

    @cached_property
    def _known(self) -> KnownLoad | None:
        """How this content was loaded before; None where it was not, or where its view has gone since."""
        known = None if self._key is None else self._known_loads.recall(self._key)
        if known is None or known.family not in {family.name for family in FAMILIES}:
            return None
        return known if not known.view or find_view(known.view, self._cache_folder) else None

    def _known_path(self, known: KnownLoad) -> Path:
        return self.origin if not known.view else (self._cache_folder or default_cache_folder()) / known.view


def _load_kwargs(load: KnownLoad) -> dict[str, Any]:
    import torch

    return {
        # The dtype itself: diffusers takes its name as a string for nothing and loads float32.
        "torch_dtype": getattr(torch, load.dtype),
        "use_safetensors": load.use_safetensors,
        "variant": load.variant,
        "local_files_only": True,
    }


def _model_line(model: FoundModel) -> str:
    """One component: its files, their size, and what was found in them and checked."""
    files = model.stored.files
    stored = "/".join(sorted({tensor.dtype for tensor in model.stored.tensors})) or "unknown until read"
    megabytes = sum(file.size_bytes for file in files) / 1e6
    names = files[0].name if len(files) == 1 else f"{len(files)} files"
    left_out = f", {len(model.part.dropped)} stored ones left out" if model.part.dropped else ""
    return (
        f"  {model.name}: {names}, {megabytes:.1f} MB, {model.part.class_name}, all "
        f"{len(model.part.recipes)} tensors there and of the right shape, {stored}{left_out}"
    )


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
