"""Lets levers act on one pipeline, for a picture at a time, and takes them back; chooses and times none.

However a lever comes or goes, a picture that is drawn with none of them is bit for bit the one of a pipeline
that never had any. For the thread that draws: torch's switches for attention and compiled code are the
process's.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import platform
import shutil
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

from zimage_engine.families import ModelFamily
from zimage_engine.speed.levers import Choices, LeverFacts, agreeing, compiles, lever_named, size_bucket

logger = logging.getLogger(__name__)

#: Which kernel comes first; where it cannot take what it is given (a mask, a shape), the next one does.
_KERNELS: dict[str, tuple[SDPBackend, ...]] = {
    "attention_cudnn": (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ),
    "attention_flash": (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ),
    "attention_efficient": (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
}

#: Classes of blocks that diffusers does not name in a model's own `_repeated_blocks`.
_MORE_BLOCKS = {"PixArtTransformer2DModel": ("BasicTransformerBlock",)}

#: A block is compiled anew for each kind of call: with and without modulation, a mask, a second half. Z-Image
#: comes to 8, which is torch's limit, and a second model of the same class would have none left.
MOST_KINDS = 64

#: Where torch keeps what it compiled, unless the user has said it.
_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


class Levers:
    """What may act on a pipeline: by the sizes of pictures, while its weights stay where they are."""

    def __init__(self, pipeline: Any, family: ModelFamily, device: str) -> None:
        self._pipeline = pipeline
        self._family = family
        self._device = torch.device(device).type
        self._choices: Choices = {}
        self._compiled: str | None = None
        self._hooks: list[RemovableHandle] = []
        #: Since `acting` began: passes of the denoiser, and calls of blocks that ran as they are in them.
        self._passes = self._uncompiled_calls = 0
        #: None where laying out has failed halfway.
        self._is_channels_last: bool | None = False

    @property
    def facts(self) -> LeverFacts:
        """What decides which levers can be tried."""
        builds = any(map(shutil.which, _compilers(self._device)))
        if self._device == "cuda":
            builds = builds and find_spec("triton") is not None
        return LeverFacts(self._device, bool(self._blocks()), builds)

    @property
    def choices(self) -> Choices:
        """By size bucket, what acts on a picture of such a size."""
        return self._choices

    def use(self, choices: Choices, compiled_folder: Path | None = None) -> None:
        """Let these act from the next picture on, in place of those before.

        Compiled code is made where a block is called while `acting` may compile, and kept in
        `compiled_folder` for the next process.
        """
        choices = agreeing(choices)
        wanted = {compiles(names) for names in choices.values()} - {None}
        assert len(wanted) <= 1
        attention = {
            name for names in choices.values() if compiles(names) for name in names if name in _KERNELS
        }
        self._compile(wanted.pop() if wanted else None, attention, compiled_folder)
        self.choose(choices)

    def choose(self, choices: Choices) -> None:
        """As `use`, without touching compiled code: what is there rests where it is not among them."""
        self._choices = choices

    def for_picture(self, width_px: int, height_px: int) -> tuple[str, ...]:
        """The levers for a picture of this size, where nothing else speaks against them."""
        return self._choices.get(size_bucket(width_px, height_px), ())

    @contextmanager
    def acting(self, names: Collection[str], may_compile: bool = False) -> Iterator[None]:
        """These act within, and no other. What would have to be compiled for it runs as it is, unless it
        `may_compile`: a picture never waits for a compiler."""
        self.lay_out(names)
        self._passes = self._uncompiled_calls = 0
        with self.during_passes(names, may_compile):
            yield

    def acted(self, names: Collection[str]) -> tuple[str, ...]:
        """Those of `names` that really did since `acting` began: compiled code if one call at least was of a
        kind that had been compiled, for all others run as they are."""
        ran = self._uncompiled_calls < self._passes * len(self._blocks())
        return tuple(name for name in names if ran or not lever_named(name).compiles)

    @contextmanager
    def during_passes(self, names: Collection[str], may_compile: bool = False) -> Iterator[None]:
        """As `acting`, for single calls of the denoiser among others' work: weights stay as they lie."""
        with ExitStack() as stack:
            if self._compiled is not None:
                stance = "eager_on_recompile"
                if self._compiled not in names:
                    stance = "force_eager"
                elif may_compile:
                    stance = "default"
                    stack.enter_context(torch._dynamo.config.patch(recompile_limit=MOST_KINDS))
                    stack.enter_context(warnings.catch_warnings())
                    # Positions are complex numbers, which torch leaves as they are; nothing is slower for it.
                    warnings.filterwarnings("ignore", message=".*complex operators.*")
                stack.enter_context(torch.compiler.set_stance(stance))
            for name in names:
                if name in _KERNELS:
                    stack.enter_context(sdpa_kernel(list(_KERNELS[name]), set_priority=True))
            if self._compiled == "cuda_graphs" and "cuda_graphs" in names:
                stack.enter_context(_each_pass_begun(self._denoiser))
            yield

    def lay_out(self, names: Collection[str]) -> None:
        """Lay the VAE's weights out for these levers."""
        wanted = "channels_last_vae" in names
        if wanted != self._is_channels_last:
            layout = torch.channels_last if wanted else torch.contiguous_format
            self._is_channels_last = None
            self._pipeline.vae.to(memory_format=layout)
            self._is_channels_last = wanted

    def before_weights_move(self) -> None:
        """The weights are as they were loaded afterwards: whoever moves them keeps copies of its own."""
        self.lay_out(())

    @property
    def _denoiser(self) -> Any:
        return getattr(self._pipeline, self._family.denoiser)

    def _blocks(self) -> list[torch.nn.Module]:
        denoiser = self._denoiser
        named: Collection[str] = getattr(denoiser, "_repeated_blocks", None) or ()
        classes = named or _MORE_BLOCKS.get(type(denoiser).__name__, ())
        return [module for module in denoiser.modules() if type(module).__name__ in classes]

    def _compile(self, lever: str | None, attention: Collection[str], folder: Path | None) -> None:
        if lever is not None:
            _one_form_of_code(self._blocks(), (lever, *attention))
        if lever == self._compiled:
            return
        for block in self._blocks():
            # What Module.compile sets; torch has no call that takes it back.
            block._compiled_call_impl = None
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if lever is not None:
            if folder is not None:
                _keep_compiled_code_in(folder / _machine_and(attention))
            # Putting on LoRAs does it for good, and compiled code would not know the weights again.
            self._denoiser.requires_grad_(False)
            options = {"triton.cudagraphs": True} if lever == "cuda_graphs" else None

            def entered(_block: torch.nn.Module, _args: Any) -> None:
                if not torch.compiler.is_compiling():  # of compiled code nothing is left of this
                    self._uncompiled_calls += 1

            def begun(_denoiser: torch.nn.Module, _args: Any) -> None:
                self._passes += 1

            self._hooks.append(self._denoiser.register_forward_pre_hook(begun))
            for block in self._blocks():
                self._hooks.append(block.register_forward_pre_hook(entered))
                # One code for all sizes and lengths of prompts: another one must not wait for a compiler.
                block.compile(fullgraph=True, dynamic=True, options=options)
        self._compiled = lever


@contextmanager
def _each_pass_begun(denoiser: torch.nn.Module) -> Iterator[None]:
    """CUDA graphs hand out the same memory in each pass: told when one begins, they keep none too long."""

    def begun(_module: torch.nn.Module, _args: Any) -> None:
        torch.compiler.cudagraph_mark_step_begin()

    handle = denoiser.register_forward_pre_hook(begun)
    try:
        yield
    finally:
        handle.remove()


def _compilers(device: str) -> tuple[str, ...]:
    """What torch looks for: kernels for a processor are C++, those of triton are started by a little C."""
    if device == "cpu":
        return (os.environ.get("CXX") or "g++", "clang++")
    return (os.environ.get("CC") or "gcc", "cc", "clang")


#: By class of blocks, what the code of this process is compiled for.
_forms: dict[str, tuple[str, ...]] = {}


def _one_form_of_code(blocks: Sequence[torch.nn.Module], form: tuple[str, ...]) -> None:
    """torch keeps compiled code by the class of a block and does not look at which attention was chosen when
    it was made, nor by what it was compiled: code of another form goes, also that of other models."""
    wanted = {type(block).__name__: tuple(sorted(form)) for block in blocks}
    if any(_forms.get(name, form) != form for name, form in wanted.items()):
        torch._dynamo.reset()
        _forms.clear()
    _forms.update(wanted)


def _machine_and(attention: Collection[str]) -> str:
    """A folder's name for machines that run the same code: what is made for a processor uses all that it has,
    and torch's own notes do not tell which attention was chosen."""
    flags = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    told = repr((platform.machine(), flags, torch.__version__, sorted(attention)))
    return hashlib.sha256(told.encode()).hexdigest()[:16]


#: Where this process keeps its compiled code, once that was decided.
_our_folder: str | None = None


def _keep_compiled_code_in(folder: Path) -> None:
    """torch's own place is in the system's folder for passing files: gone at the next start, anybody's."""
    global _our_folder
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # imports half of the compiler

    # torch writes its own place there as soon as it has looked for it; what a user chose is another.
    if os.environ.get(_CACHE_VARIABLE, default_cache_dir()) not in (default_cache_dir(), _our_folder):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        seen = folder.stat()
        if seen.st_uid != os.getuid() or seen.st_mode & 0o022 or not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "its folder is another user's or open to others")
    except OSError as error:
        logger.warning("compiled code cannot be kept, so the next start compiles again: %s", error.strerror)
        return
    os.environ[_CACHE_VARIABLE] = _our_folder = str(folder)
