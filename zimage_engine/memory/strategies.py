"""Puts a pipeline's weights where a plan says, and takes that back: one row for each residency.

Knows why nothing was decided: the plan says what, the rows know how.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from platformdirs import user_cache_path

from zimage_engine.families import family_named
from zimage_engine.memory.quantize import QuantisedLayers
from zimage_engine.memory.residency import Footprint, OffloadPlan, Residency
from zimage_engine.memory.streaming import StreamedModule, move, removed_on_error, tensors_of

#: Names of diffusers' hooks, in the order in which they come off.
_DIFFUSERS_HOOKS = ("lazy_prefetch_group_offloading", "layer_execution_tracker", "group_offloading")
_CASTING_HOOKS = ("peft_autocast_disable", "layerwise_casting")
_TILING = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size")


class Removable(Protocol):
    """Something done to a pipeline that can be undone."""

    def remove(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Target:
    """What a plan is applied to. `cache_folder` is where the weights go that lie on the disk."""

    pipeline: Any
    footprint: Footprint
    device: torch.device
    cache_folder: Path

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """Every component with weights, the ones that the footprint does not know too."""
        return {
            name: component
            for name, component in self.pipeline.components.items()
            if isinstance(component, torch.nn.Module)
        }

    def blocks(self, component: str) -> list[torch.nn.Module]:
        """The component's blocks in the order in which they are called."""
        known = self.footprint.components.get(component)
        module = self.modules[component]
        return [] if known is None else [module.get_submodule(path) for path in known.blocks]


@dataclass
class AppliedOffload:
    """A plan in force. The engine calls `after_encoding` when the prompts are encoded."""

    plan: OffloadPlan
    #: Whether a copy from the host runs beside the computing; None where nothing is copied.
    is_pinned: bool | None = None
    _parts: list[Removable] = field(default_factory=list)
    _text_encoders: list[StreamedModule] = field(default_factory=list)

    def after_encoding(self) -> None:
        """Let the text encoders leave the device, where the plan says so; they come back when called."""
        if self.plan.release_text_encoder:
            for text_encoder in self._text_encoders:
                text_encoder.leave()

    def remove(self) -> None:
        """As if never applied: no hook is left, every weight is on the device where it was found."""
        while self._parts:
            self._parts.pop().remove()
        self._text_encoders = []


def apply(
    plan: OffloadPlan,
    pipeline: Any,
    footprint: Footprint,
    device: str | torch.device,
    cache_folder: Path | None = None,
) -> AppliedOffload:
    """Put the weights of `pipeline`, wherever they are, as `plan` says; pictures stay what they are.

    (Float8 storage, quantised matrices and tiles change pictures, which is the plan's to decide.) Where this
    fails, out of memory included, everything is as before. One plan at a time: remove it before the next.
    """
    target = Target(
        pipeline,
        footprint,
        _numbered(torch.device(device)),
        cache_folder or user_cache_path("zimage-turbo", appauthor=False) / "offload",
    )
    applied = AppliedOffload(plan)
    with removed_on_error(applied._parts):
        applied._parts.append(_ExecutionDevice(pipeline, target.device))
        if plan.float8_storage:
            applied._parts.append(_Float8(target.modules[footprint.denoiser]))
        if plan.quantize is not None:
            denoiser = target.modules[footprint.denoiser]
            layers = family_named(footprint.family).quantised_layers
            applied._parts.append(QuantisedLayers(denoiser, layers, plan.quantize, target.device))
        if plan.vae_tile_px is not None:
            applied._parts.append(_Tiles(target.modules[footprint.vae], plan.vae_tile_px))
        STRATEGIES[plan.residency].put(plan, target, applied)
    return applied


def _numbered(device: torch.device) -> torch.device:
    """`cuda` as `cuda:0`, as a tensor there says; the two are not equal."""
    return torch.device(device.type, 0) if device.type != "cpu" and device.index is None else device


def _resident(plan: OffloadPlan, target: Target, applied: AppliedOffload) -> None:
    """All stays but text encoders that are to leave."""
    _put(plan, target, applied, {})


def _streamed(plan: OffloadPlan, target: Target, applied: AppliedOffload) -> None:
    """The denoiser's blocks that the plan names come one ahead of their turn."""
    denoiser = target.footprint.denoiser
    streamed = [target.modules[denoiser].get_submodule(path) for path in plan.streamed_blocks]
    _put(plan, target, applied, {denoiser: streamed})


def _in_turns(plan: OffloadPlan, target: Target, applied: AppliedOffload) -> None:
    """Each component whole while it works. diffusers' `enable_model_cpu_offload` copies weights back to the
    host when they leave, unpinned, though they were never changed; here they are forgotten."""
    _put(plan, target, applied, {}, visiting=target.modules)


def _on_disk(plan: OffloadPlan, target: Target, applied: AppliedOffload) -> None:
    """Single layers, read from files when they are called. diffusers' way writes a weight that two layers
    share a second time after it has let go of it: T5's embedding came back as NaN."""
    target.cache_folder.mkdir(parents=True, exist_ok=True)
    folder = _Folder(Path(tempfile.mkdtemp(prefix="weights-", dir=target.cache_folder)))
    applied._parts.append(folder)
    layers = {
        name: [part for part in module.modules() if not [*part.children()] and tensors_of((part,))]
        for name, module in target.modules.items()
    }
    _put(plan, target, applied, layers, folder=folder.path)


def _put(
    plan: OffloadPlan,
    target: Target,
    applied: AppliedOffload,
    streamed: Mapping[str, Sequence[torch.nn.Module]],
    visiting: Container[str] = (),
    folder: Path | None = None,
) -> None:
    """Each component with its `streamed` parts fetched as they are called, and the rest of it on the device:
    for good, or from its call to that of the next one if it is `visiting`."""
    footprint = target.footprint
    turns: list[StreamedModule] = []

    def others_leave() -> None:
        for turn in turns:
            turn.leave()

    for name, module in target.modules.items():
        is_text = name in footprint.text_encoders
        parts = streamed.get(name, ())
        if is_text and plan.stream_text_encoder and not parts:
            parts = target.blocks(name)
        component_folder = None if folder is None else folder / name
        if component_folder is not None:
            component_folder.mkdir()
        turn = StreamedModule(
            module,
            parts,
            target.device,
            visiting=name in visiting or (is_text and plan.release_text_encoder),
            # A VAE is not called by forward; while it decodes, the denoiser's places are free.
            entrances=tuple(module.children()) if name == footprint.vae and (streamed or visiting) else (),
            before_entering=others_leave,
            folder=component_folder,
        )
        turns.append(turn)
        applied._parts.append(turn)
        if is_text:
            applied._text_encoders.append(turn)
    copied = [turn for turn in turns if turn.is_copied]
    applied.is_pinned = all(turn.is_pinned for turn in copied) if copied else None


def _by_module(plan: OffloadPlan, target: Target, applied: AppliedOffload) -> None:
    """diffusers' group offloading of single layers. accelerate's sequential offload copies synchronously and
    leaves weights as `meta` tensors, whose values are elsewhere; this one prefetches on a stream."""
    for module in target.modules.values():
        applied._parts.append(_GroupOffload(module, target.device))


@dataclass(frozen=True, slots=True)
class Strategy:
    """How one residency is brought about, and by whose code."""

    residency: Residency
    put: Callable[[OffloadPlan, Target, AppliedOffload], None]
    because: str


STRATEGIES: Mapping[Residency, Strategy] = {
    row.residency: row
    for row in (
        Strategy(Residency.NONE, _resident, "nothing moves while a picture is drawn"),
        Strategy(
            Residency.MODEL,
            _in_turns,
            "ours: the stock one copies unchanged weights back to the host at each turn",
        ),
        Strategy(Residency.STREAM, _streamed, "ours: the stock one knows no resident blocks"),
        Strategy(
            Residency.SEQUENTIAL,
            _by_module,
            "diffusers' leaf level: the least memory, prefetched on a stream",
        ),
        Strategy(Residency.DISK, _on_disk, "ours: the stock one loses weights that layers share"),
    )
}


class _ExecutionDevice:
    """The pipeline computes on `device` wherever its weights lie at the moment.

    Stock pipelines ask the first component's weights, which may be visiting the host.
    """

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        self._pipeline = pipeline
        self._stock = type(pipeline)
        members = {
            "__module__": self._stock.__module__,
            "__qualname__": self._stock.__qualname__,
            "_execution_device": property(lambda _: device),
        }
        pipeline.__class__ = type(self._stock.__name__, (self._stock,), members)

    def remove(self) -> None:
        self._pipeline.__class__ = self._stock


class _GroupOffload:
    """diffusers' group offloading at leaf level for one component."""

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        from diffusers.hooks import apply_group_offloading

        self._module = module
        self._device = device
        self._homes = [(tensor, tensor.device) for tensor in tensors_of((module,))]
        is_cuda = device.type == "cuda"
        try:
            apply_group_offloading(
                module,
                onload_device=device,
                offload_device=torch.device("cpu"),
                offload_type="leaf_level",
                use_stream=is_cuda,
                record_stream=is_cuda,
            )
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        _remove_diffusers_hooks(self._module, _DIFFUSERS_HOOKS)
        for tensor, device in self._homes:
            if device.type == "cpu" and tensor.is_pinned():
                tensor.data = tensor.data.clone()
            move((tensor,), device)
        if self._device.type == "cuda":
            # What diffusers had locked takes half as much again as the weights, and PyTorch would keep it.
            torch.cuda.synchronize(self._device)
            torch._C._host_emptyCache()


class _Folder:
    """A folder that is gone afterwards."""

    def __init__(self, folder: Path) -> None:
        self.path = folder

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


class _Float8:
    """diffusers' layerwise casting: stored in float8, computed in the dtype that it had.

    What it was is kept on the host, because float8 cannot be undone.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._before = [(tensor, tensor.device, tensor.data.to("cpu")) for tensor in tensors_of((module,))]
        try:
            module.enable_layerwise_casting(
                storage_dtype=torch.float8_e4m3fn, compute_dtype=module.dtype, non_blocking=False
            )
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        _remove_diffusers_hooks(self._module, _CASTING_HOOKS)
        for tensor, device, before in self._before:
            tensor.data = before.to(device)


class _Tiles:
    """The VAE decodes in pieces of `side_px` a side; the sizes that it comes with never cut anything."""

    def __init__(self, vae: Any, side_px: int) -> None:
        self._vae = vae
        self._before = {name: getattr(vae, name) for name in _TILING}
        scale = vae.tile_sample_min_size // vae.tile_latent_min_size
        vae.use_tiling = True
        vae.tile_latent_min_size = side_px // scale
        vae.tile_sample_min_size = side_px // scale * scale

    def remove(self) -> None:
        for name, value in self._before.items():
            setattr(self._vae, name, value)


def _remove_diffusers_hooks(module: torch.nn.Module, names: Sequence[str]) -> None:
    """Take these hooks off, and the empty registries and bound `forward`s that diffusers leaves behind."""
    for part in module.modules():
        registry = getattr(part, "_diffusers_hook", None)
        if registry is None:
            continue
        for name in names:
            if (hook := registry.get_hook(name)) is not None:
                # Layerwise casting refuses to be taken off, as it cannot give the old weights back; we can.
                hook.deinitalize_hook = lambda which: which
                registry.remove_hook(name, recurse=False)
        if not registry.hooks:
            del part._diffusers_hook
            forward = vars(part).get("forward")
            if getattr(forward, "__func__", None) is type(part).forward:
                del part.forward
