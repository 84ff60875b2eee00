"""The engine: loads a model once, then draws whatever is asked of it; knows no HTTP, Ray or Gradio.

engine = Engine.load()
result = engine.generate(GenerationRequest(prompt="a red circle on a white background", seed=7))
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from zimage_engine import cpu
from zimage_engine.dtype_choice import choice_of_dtype
from zimage_engine.errors import (
    CheckpointError,
    DeviceFailed,
    DoesNotFit,
    EngineError,
    GenerationCancelled,
    InvalidRequest,
    LeverFailed,
    OutOfMemory,
)
from zimage_engine.families import ModelFamily, family_named
from zimage_engine.loading.adapter import ModelLoaderAdapter
from zimage_engine.loading.describe import describe, max_tokens
from zimage_engine.loading.lora import lora_checker
from zimage_engine.loading.lora_folder import LoraFolder, reason_without_path
from zimage_engine.loading.lora_layouts import check_loras
from zimage_engine.loading.lora_shelf import LoraShelf, WantedLora, wanted_loras
from zimage_engine.loading.lora_weight import LoraWeight
from zimage_engine.loading.provenance import drawn_with
from zimage_engine.loading.view import default_cache_folder
from zimage_engine.memory.activations import activation_bytes
from zimage_engine.memory.held import HeldMemory
from zimage_engine.memory.oom import MemoryReport
from zimage_engine.memory.planner import title
from zimage_engine.memory.quantize import check_quantisation, quiet_torchao
from zimage_engine.memory.residency import MemoryWishes, OffloadPlan, Residency
from zimage_engine.memory.room import Room, keeper_for
from zimage_engine.memory.snapshot import (
    available_devices,
    choose_device,
    device_clock,
    device_status,
)
from zimage_engine.prompts import enhancer
from zimage_engine.prompts.llm_writing import notice_of
from zimage_engine.prompts.tokens import prompt_tokens, where_it_ends
from zimage_engine.refiner import refine
from zimage_engine.rewriting import rewritten
from zimage_engine.sampling.company import merge_for
from zimage_engine.sampling.control import DrawingControl
from zimage_engine.sampling.device_failure import device_failures_named
from zimage_engine.sampling.editing import PreparedSource, prepared
from zimage_engine.sampling.editing_plan import EditPlan
from zimage_engine.sampling.embedding_cache import EmbeddingCache
from zimage_engine.sampling.pipeline import DrawnPicture, GuardedPipeline, PromptEmbeddings
from zimage_engine.sampling.plan import SamplingPlan, resolve
from zimage_engine.sampling.preview import preview
from zimage_engine.sampling.sketch import Sketcher
from zimage_engine.sampling.text_generation import OnText
from zimage_engine.sampling.told import guard_notices
from zimage_engine.second_look import drawn_and_looked_at
from zimage_engine.speed.acting import Levers
from zimage_engine.speed.levers import LEVER_NAMES, Choices, compiles, lever_named, names_in, only
from zimage_engine.speed.remembered import key_of_choice, remembered_choices
from zimage_engine.speed.warming import pictures_to_compile
from zimage_engine.types import (
    EMBEDDING_CACHE_BYTES,
    DeviceStatus,
    EditUse,
    EnhancedPrompt,
    GenerationReport,
    GenerationRequest,
    GenerationResult,
    LoraOffer,
    LoraUse,
    MemoryUse,
    ModelDescription,
    ModelIdentity,
    Notice,
    OnStep,
    PictureReport,
    RewriteBudget,
    SourcePicture,
    StepProgress,
)

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

logger = logging.getLogger(__name__)

#: The model that comes with the package, and what it is called.
DEMO_MODEL_PATH = Path(__file__).parent / "demo" / "model"
DEMO_MODEL_ID = "z-image-demo"

#: Of the memory that is free beside one drawing, what others drawn at once may be predicted to take.
SHARE_OF_FREE = 0.8

#: So many requests wait for idle LoRAs to be wanted again before these make room for compiled code.
CALM_REQUESTS = 3


#: Makes each of several pictures by an engine that is for it alone, and returns what was made, in order.
Each = Callable[["Sequence[Callable[[Engine], _Finished]]"], "list[_Finished]"]

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")


def _naming_device_failures(
    method: Callable[Concatenate[Engine, Arguments], Returned],
) -> Callable[Concatenate[Engine, Arguments], Returned]:
    """A method of the engine in which a lost device is met as DeviceFailed."""

    @wraps(method)
    def named(self: Engine, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        with device_failures_named(self.description.device):
            return method(self, *args, **kwargs)

    return named


class Engine:
    """One model on one device.

    It has no lock: call `generate` from one thread at a time. The pipeline and its scheduler have a state.
    """

    def __init__(
        self,
        pipeline: Any,
        family: ModelFamily,
        model_id: str,
        device: str,
        memory: MemoryWishes | None = None,
        embedding_cache_bytes: int = EMBEDDING_CACHE_BYTES,
        lora_folder: str | Path | None = None,
    ) -> None:
        """Take over a verified pipeline; `Engine.load` is the usual way here.

        The pipeline comes on the host: what of it goes to `device`, and when, is the memory plan's.
        """
        self.pipeline = pipeline.to("cpu")
        self.description: ModelDescription = replace(
            describe(pipeline, family, model_id, device),
            shares_passes=merge_for(getattr(pipeline, family.denoiser), device) is not None,
        )
        self._max_tokens = max_tokens(pipeline, family)
        self._clock = device_clock(device)
        #: What the text encoder answered; None where nothing of that is to be kept.
        self._embeddings = EmbeddingCache(embedding_cache_bytes) if embedding_cache_bytes else None
        self._guarded = GuardedPipeline(pipeline, family, self._clock, self._embeddings)
        self._sketcher = Sketcher()
        self._keeper = keeper_for(self.pipeline, family, device, memory or MemoryWishes())
        self._levers = Levers(self.pipeline, family, device)
        self._keeper.before_moving = self._levers.before_weights_move
        #: Whether what is drawn now is drawn for the compiler alone.
        self._is_warming = False
        #: Who draws the pictures of a request; None: this engine, one after another.
        self._each: Each | None = None
        self._shelf = LoraShelf(self.pipeline, self._keeper.weights_change)
        folder = None if lora_folder is None else Path(lora_folder).expanduser()
        self._folder = LoraFolder(folder, lora_checker(self.pipeline))
        #: Requests in a row that nothing but idle LoRAs kept from being drawn by compiled code.
        self._drawn_beside_idle_loras = 0
        #: What requests that name no LoRAs are drawn with.
        self._default_loras: tuple[WantedLora, ...] = ()
        self._loras: tuple[LoraUse, ...] = ()
        #: Whether a picture that looks wrong is drawn once more in float32, where it was drawn in less.
        self.draws_again = True
        #: The repairs that the checkpoint needed to be loaded, by name.
        self.repairs: tuple[str, ...] = ()
        #: What the model is made of; without a digest where it did not come from files.
        self.identity = ModelIdentity()
        tokenizer_json = self.description.tokenizer_json
        self._tokens = prompt_tokens(tokenizer_json) if tokenizer_json else None

    @classmethod
    def load(
        cls,
        path_or_id: str | Path | None = None,
        device: str | None = None,
        *,
        family: str | None = None,
        base: str | Path | None = None,
        text_encoder: str | Path | None = None,
        vae: str | Path | None = None,
        loras: Sequence[LoraWeight] = (),
        lora_folder: str | Path | None = None,
        dtype: str | None = None,
        memory: MemoryWishes | None = None,
        offload: str | None = None,
        embedding_cache_bytes: int = EMBEDDING_CACHE_BYTES,
        threads: int | None = None,
        exact: bool = False,
        may_compile: bool = True,
    ) -> Engine:
        """Load a model folder, single file or hub id; None is the demo model that comes with the package.

        `family` says what kind of model it is where the files do not; `base` is a folder or hub id that
        supplies what a single file lacks, `text_encoder` and `vae` are folders or files with that one part.
        `loras` are put on as by `set_loras`; requests may name these, and the files of `lora_folder`.
        `dtype` is "bfloat16", "float32" or "float16", None the family's
        own; DtypeRefused with the reason where the model does not bear it. "auto" is float32 on a processor
        that was measured to be clearly faster in it and has the memory, else bfloat16; None means that too on
        a processor without instructions for bfloat16.
        `memory` limits what of the device's memory is used, and how; None: whatever is fastest and fits.
        `offload` is its offload alone, where that is all there is to say: "none", "model", "stream",
        "sequential" or "disk"; None and "auto" leave it as `memory` has it.
        `embedding_cache_bytes` of the host's memory keep encoded prompts for requests that repeat them, 0
        none; pictures are the same.
        `threads` is what a CPU computes with, None: every core that the process may use.
        What `zimage_engine.tuning` found to be quicker for this model on this device acts; with `exact`, and
        where nothing was measured, pictures are drawn as by stock diffusers, bit for bit. Without
        `may_compile` what of it has to be compiled first is left out: for who draws little or cannot wait.

        `device` is "cuda", "cuda:1", "mps" or "cpu"; None takes the best there is, in that order.
        Raises DeviceUnavailable, CheckpointNotFound, UnknownFamily or CheckpointDamaged.
        """
        chosen = choose_device(device, available_devices())
        check_loras(loras)
        if offload not in (None, "auto"):
            memory = replace(memory or MemoryWishes(), offload=offload)
        quiet_torchao()
        check_quantisation(None if memory is None else memory.quantize, chosen)
        source = partial(
            ModelLoaderAdapter,
            DEMO_MODEL_PATH if path_or_id is None else path_or_id,
            family,
            base=base,
            text_encoder=text_encoder,
            vae=vae,
        )
        if chosen == "cpu":
            cpu.use_cores(threads)
        choice = choice_of_dtype(dtype, chosen, source)
        adapter = source(dtype=dtype if choice is None else choice.dtype)
        engine = cls(
            adapter.load(),
            adapter.family,
            _model_id(path_or_id),
            chosen,
            memory,
            embedding_cache_bytes,
            lora_folder,
        )
        if choice is not None:
            engine.description = replace(engine.description, dtype_because=choice.because)
        engine.set_loras(loras)
        engine.place()
        engine.repairs = adapter.repairs
        engine.identity = adapter.identity
        if not exact:
            engine.accelerate_as_remembered(may_compile)
        return engine

    @property
    def loras(self) -> tuple[LoraUse, ...]:
        """The LoRAs that requests which name none are drawn with, in the order in which they were given."""
        return self._loras

    def set_loras(self, loras: Sequence[LoraWeight]) -> tuple[LoraUse, ...]:
        """Put `loras` on in place of those that are on; all of them or, on an error, none.

        An empty sequence takes all off: the next picture is bit for bit that of an engine that never had any.
        Raises CheckpointNotFound or CheckpointDamaged where a file does not fit the model whole.
        """
        check_loras(loras)
        if self._embeddings is not None:  # its keys do not tell what is adapted, and by what
            self._embeddings.clear()
        wanted = wanted_loras(loras)
        pinned = {each.key for each in self._default_loras}
        # First what is new beside what is there, so that an error leaves that.
        self._shelf.put_on(wanted, pinned)
        self._shelf.put_on(wanted, keep_others=False)
        self._default_loras, self._loras = wanted, self._shelf.uses()
        self._keeper.plan_beside(self._shelf.bytes)
        self._folder.also(loras)
        return self._loras

    def loras_offered(self) -> tuple[LoraOffer, ...]:
        """The LoRAs that a request may name, as they are now, and those that it may not, with the reason.

        For any thread, also while a picture is drawn.
        """
        return self._folder.offers()

    def _wanted_loras(self, request: GenerationRequest) -> tuple[WantedLora, ...]:
        """What the request is drawn with. Raises InvalidRequest."""
        if request.loras is None:
            return self._default_loras
        found = self._folder.find(request.loras)
        defaults = {each.lora.path: each.key for each in self._default_loras}
        try:
            # A default that was exchanged on the disk meanwhile is still the one of the start.
            return tuple(
                WantedLora(defaults[lora.path], lora) if lora.path in defaults else wanted_loras([lora])[0]
                for lora in found
            )
        except (CheckpointError, OSError) as error:
            raise InvalidRequest("a LoRA that was asked for has just gone; send it again", "loras") from error

    def _put_on(self, wanted: tuple[WantedLora, ...]) -> None:
        """Let these act alone, whatever did before. Raises InvalidRequest for one that does not fit."""
        try:
            changes_text = self._shelf.put_on(wanted, {each.key for each in self._default_loras})
        except (CheckpointError, OSError) as error:
            reason = str(error)
            for each in wanted:
                reason = reason_without_path(error, each.lora.path.stem, each.lora.path)
                if reason != str(error):
                    break
            raise InvalidRequest(f"a LoRA cannot be used with this model: {reason}", "loras") from error
        if changes_text and self._embeddings is not None:
            self._embeddings.clear()
        self._keeper.plan_beside(self._shelf.bytes)

    def _let_idle_loras_go(self, wanted: tuple[WantedLora, ...], plan: SamplingPlan) -> None:
        """Those kept for later go where this picture would be drawn faster without them, or at all."""
        if not self._shelf.idle_bytes:
            self._drawn_beside_idle_loras = 0
            return
        if (
            not wanted
            and not self._default_loras
            and compiles(self._levers.for_picture(plan.width_px, plan.height_px))
        ):
            # Compiled code does not know the layers that they are woven into.
            self._drawn_beside_idle_loras += 1
            if self._drawn_beside_idle_loras > CALM_REQUESTS:
                self._shelf.put_on(wanted, keep_others=False)
                self._keeper.plan_beside(self._shelf.bytes)
                return
        acting_bytes = self._shelf.bytes - self._shelf.idle_bytes
        guided = plan.guidance_scale > 1.0
        if not self._keeper.is_as_fast_beside(plan.width_px, plan.height_px, guided, acting_bytes):
            pinned = {each.key for each in self._default_loras}
            self._shelf.put_on(wanted, pinned, keep_others=False)
            self._keeper.plan_beside(self._shelf.bytes)

    def place(self) -> None:
        """Bring the weights to where a picture of the model's own size wants them: the first is quick then.

        A device with too little memory for that size may have enough for a smaller one: that is no error.
        """
        model = self.description
        try:
            plan = self._keeper.before(
                model.native_width, model.native_height, model.default_guidance_scale > 1.0
            )
            # Where there is nothing to decide there is nothing to say on a terminal.
            level = logging.INFO if self._keeper.has_own_memory else logging.DEBUG
            logger.log(level, "memory: %s", plan.because)
        except (DoesNotFit, OutOfMemory) as error:
            logger.warning("memory: %s", error)

    @property
    def levers(self) -> Levers:
        """What may make drawing quicker at the price of other last bits, and by size what of it acts."""
        return self._levers

    @property
    def lever_facts(self) -> dict[str, Any]:
        """What a choice of levers holds for: the device, the versions, the model's shape and dtype."""
        family, placed = family_named(self.description.family), self._keeper.plan
        return {
            **asdict(drawn_with(self.description.device)),
            "family": family.name,
            # How far a lever moves random weights' noise says nothing of pictures.
            "from_files": bool(self.identity.digest),
            "dtype": self.description.dtype,
            "denoiser": _shape_of(getattr(self.pipeline, family.denoiser)),
            "vae": _shape_of(self.pipeline.vae),
            "float8": placed is not None and placed.float8_storage,
            "quantize": None if placed is None else placed.quantize,
        }

    def accelerate(self, choices: Choices) -> None:
        """Let these levers act, by size bucket, in place of others; what they need is compiled now.

        Pictures wait for no compiler afterwards: what was not compiled here runs as it is.
        Raises LeverFailed, and none acts then.
        """
        compiled_folder = default_cache_folder().parent / "compiled"
        self._is_warming = True
        try:
            self._levers.use(choices, compiled_folder)
            # Where nothing compiled could act now there is nothing to compile for.
            if self._is_whole_on_device and not len(self._shelf):
                for request in pictures_to_compile(self._levers.choices, self.description):
                    self.generate(request)
        except DeviceFailed:
            raise
        # A compiler may end in any error there is, and none of them is a reason not to draw.
        except Exception as error:
            self._levers.use({})
            raise LeverFailed(f"{type(error).__name__}: {error}") from error
        finally:
            self._is_warming = False

    def accelerate_as_remembered(self, may_compile: bool = True) -> None:
        """Let act what was measured to be quicker here; what fails is told in the log and left out.

        Without `may_compile` what would have to be compiled is left out too.
        """
        remembered = remembered_choices()
        key = key_of_choice(self.lever_facts)
        found = remembered.recall(key)
        facts = self._levers.facts
        ready = only(found, lambda lever: not lever.compiles)
        wanted = only(found, lambda lever: lever.refusal(facts) is None) if may_compile else ready
        if not found:
            logger.debug("nothing was measured to be quicker here; `zimage-turbo tune` does it once")
        for choices in (wanted, ready):
            names = names_in(choices)
            if not names:
                return
            started = time.perf_counter()
            try:
                with remembered.trying(key, compiles(names) or names[0]):
                    self.accelerate(choices)
            except LeverFailed as failed:
                logger.warning("what was measured to be quicker here is left out: %s", failed)
                continue
            told = ", ".join(lever_named(name).title for name in names)
            logger.info("quicker by %s; ready after %.1f s", told, time.perf_counter() - started)
            return

    @property
    def _is_whole_on_device(self) -> bool:
        """Whether no weights move while a picture is drawn."""
        placed = self._keeper.plan
        return placed is not None and placed.residency is Residency.NONE

    def _levers_for(self, request: GenerationRequest, plan: SamplingPlan) -> tuple[str, ...]:
        """What acts on this picture: nothing while weights move, no compiled code with LoRAs among them."""
        if request.exact or not self._is_whole_on_device:
            return ()
        names = self._levers.for_picture(plan.width_px, plan.height_px)
        return tuple(name for name in names if not (len(self._shelf) and lever_named(name).compiles))

    def memory_report(self) -> MemoryReport:
        """The memory plan in force, what the device holds, and what was done against a lack of it so far."""
        return self._keeper.report

    @_naming_device_failures
    def device_status(self) -> DeviceStatus:
        """What the device is called, how much of its memory is used now, and the memory plan in force.

        Raises DeviceFailed where the device was lost.
        """
        status, plan = device_status(self.description.device), self._keeper.plan
        if plan is None or not self._keeper.has_own_memory:
            return status
        return replace(status, plan=title(plan), plan_because=plan.because)

    @_naming_device_failures
    def generate(
        self,
        request: GenerationRequest,
        on_step: OnStep | None = None,
        control: DrawingControl | None = None,
    ) -> GenerationResult:
        """Draw the pictures of `request`, one after another.

        Picture i is bit for bit the one that `seed + i` draws alone. `on_step` is called after each step, in
        this thread; what it raises ends the drawing and comes out here. `control` does the same and more: it
        cancels from another thread, sets a deadline, and shows the latents. However a drawing ends, the next
        one is as from a fresh engine.
        Raises InvalidRequest, InvalidSize or DoesNotFit before anything is drawn, OutOfMemory where the
        device's memory is used up whatever is moved off it, GuardExhausted where a value that is
        not finite came back whatever was tried, GenerationCancelled or DeadlineExceeded when told to stop,
        DeviceFailed where the device was lost: no other call of this process will fare better.
        """
        started = time.perf_counter()
        plan = resolve(request, self.description)
        wanted = self._wanted_loras(request)
        source = None if request.image is None else prepared(request.image, plan.width_px, plan.height_px)
        by_model = request.enhancer == "model"
        enhancement = self._enhance(plan, request.enhance and bool(plan.prompt) and not by_model)
        plan = plan.with_prompts(enhancement)
        reins = _Reins(control or DrawingControl(), on_step, plan, self._guarded)
        reins.check()
        if self._each is None:
            self._put_on(wanted)
            self._let_idle_loras_go(wanted, plan)
        room = Room(self._keeper, lambda: self._guarded.stage)
        with room.for_request(plan.width_px, plan.height_px, plan.guidance_scale > 1.0):
            if by_model and request.enhance and plan.prompt:
                enhancement = self._rewritten(
                    plan.prompt, plan.negative_prompt, request.rewrite_budget, reins.check
                )
                plan = plan.with_prompts(enhancement)
            embeddings = room.made_for(lambda: self._guarded.encode(plan, self._max_tokens))
            self._keeper.encoded()
            acted: set[str] = set()

            def drawn(by: Engine, index: int) -> _Finished:
                names = by._levers_for(request, plan)
                with by._acting(names):
                    finished = by._draw(plan, embeddings, index, reins, source)
                acted.update(by._levers.acted(names))
                return finished

            def made(index: int, by: Engine) -> _Finished:
                with reins.stopping_all():
                    return room.made_for(partial(drawn, by, index))

            each = self._each or self._one_after_another
            pictures = each([partial(made, index) for index in range(len(plan.seeds))])
        images = [picture.image for picture in pictures]
        report = self._report(plan, enhancement, embeddings, pictures, room.use, started)
        report = replace(report, accelerated_by=tuple(name for name in LEVER_NAMES if name in acted))
        if report.edit is not None and request.image is not None:
            report = replace(report, edit=replace(report.edit, source_digest=_digest_of(request.image)))
        return GenerationResult(images, report)

    def _one_after_another(self, works: Sequence[Callable[[Engine], _Finished]]) -> list[_Finished]:
        return [work(self) for work in works]

    def _acting(self, names: tuple[str, ...]) -> AbstractContextManager[None]:
        """These levers act within; of drawings beside others they act in each pass of the denoiser."""
        is_beside_others = self._each is not None
        return nullcontext() if is_beside_others else self._levers.acting(names, self._is_warming)

    @property
    def denoiser(self) -> torch.nn.Module:
        """The network that is called in each step."""
        module: torch.nn.Module = getattr(self.pipeline, self.denoiser_name)
        return module

    @property
    def denoiser_name(self) -> str:
        """What the pipeline has it under."""
        return family_named(self.description.family).denoiser

    def loras_for(self, request: GenerationRequest) -> tuple[WantedLora, ...]:
        """The LoRAs that the request would be drawn with now. Reads files' headers; raises InvalidRequest."""
        return self._wanted_loras(request)

    @contextmanager
    def held_for(self, request: GenerationRequest) -> Iterator[Held | None]:
        """Within, all is where a picture of this request's size wants it, its LoRAs on, its levers laid out.

        None where the plan in force moves weights while a picture is drawn, or where there is none: such a
        request is drawn by `generate`, beside nobody.
        """
        try:
            with device_failures_named(self.description.device):
                plan = resolve(request, self.description)
                wanted = self._wanted_loras(request)
                self._put_on(wanted)
                self._let_idle_loras_go(wanted, plan)
                # As with guidance: who joins may have it.
                in_force = self._keeper.before(plan.width_px, plan.height_px, True)
        except EngineError:  # it is told by `generate`
            yield None
            return
        try:
            is_whole = in_force.residency is Residency.NONE and not in_force.release_text_encoder
            levers = self._levers_for(request, plan) if is_whole else ()
            # What is laid out stays so; what is a switch is the passes' own.
            with self._levers.acting(levers):
                pass
            yield Held(in_force, wanted, levers) if is_whole else None
        finally:
            self._keeper.after()

    def room_beside(self, held: Held) -> int | None:
        """How many drawings more than one the device's memory suffices for; None where it has none."""
        plan = held.plan
        free = self._keeper.free_bytes() if self._keeper.has_own_memory else None
        if free is None:
            return None
        family = family_named(self.description.family)
        config: dict[str, Any] = dict(getattr(self.denoiser, "config", {}))
        each = activation_bytes(family, config, plan.width_px, plan.height_px, True)
        return int(SHARE_OF_FREE * max(0, free - plan.peak_bytes) / max(1, each))

    def at_seat(self, pipeline: Any, held: Held, each: Each) -> Engine:
        """This engine for one of several drawings under way at once, to be used while `held_for` holds.

        `pipeline` has these weights, a scheduler of its own, and shells of the denoiser and the VAE; `each`
        draws the pictures of a request. Levers are for who calls the denoiser to let act.
        """
        own = copy.copy(self)
        family = family_named(self.description.family)
        own._guarded = GuardedPipeline(pipeline, family, self._clock, self._embeddings)
        own._keeper = HeldMemory(held.plan, self._keeper.has_own_memory)  # type: ignore[assignment]
        own._each = each
        return own

    def preview(self, latents: torch.Tensor) -> Image | None:
        """A small picture of what is being drawn; None where none can be shown. Never raises.

        To be called from within a control's `on_latents`, with its latents. The finished picture is bit for
        bit the one that is drawn without.
        """
        return preview(self._guarded.at_work, latents)

    def sketch(self, latents: torch.Tensor) -> Image | None:
        """As `preview`, smaller, coarser and at little cost: for every step; some it may leave out."""
        return self._sketcher.sketch(self._guarded.at_work, latents)

    def _enhance(self, plan: SamplingPlan, wanted: bool) -> EnhancedPrompt:
        if not wanted:
            return enhancer.unchanged(plan.prompt, plan.negative_prompt)
        return enhancer.enhance(
            plan.prompt,
            plan.negative_prompt,
            count_tokens=None if self._tokens is None else self._tokens.count,
            token_limit=self.description.token_limit,
        )

    @_naming_device_failures
    def rewrite(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        budget: RewriteBudget | None = None,
        control: DrawingControl | None = None,
        on_text: OnText | None = None,
    ) -> EnhancedPrompt:
        """What a request with `enhancer` "model" is drawn from: rewritten by the text encoder, or by rules.

        `rewrite` of the answer tells which it was, and why. `on_text` hears what is written as it comes,
        before it is judged. `control` cancels within one token. In the thread that draws, as `generate`;
        pictures are the same before and after.
        Raises GenerationCancelled or DeadlineExceeded when told to stop, DeviceFailed where the device was
        lost.
        """
        reins = control or DrawingControl()
        reins.check()
        self._put_on(self._default_loras)
        if self._keeper.plan is None:
            self.place()
        try:
            return self._rewritten(prompt, negative_prompt, budget or RewriteBudget(), reins.check, on_text)
        finally:
            self.pipeline.maybe_free_model_hooks()
            self._keeper.encoded()
            self._keeper.after()

    def _rewritten(
        self,
        prompt: str,
        negative_prompt: str | None,
        budget: RewriteBudget,
        check: Callable[[], None],
        on_text: OnText | None = None,
    ) -> EnhancedPrompt:
        return rewritten(
            self.pipeline,
            self._keeper.plan,
            prompt,
            negative_prompt,
            budget,
            check=check,
            on_text=on_text,
            count_tokens=None if self._tokens is None else self._tokens.count,
            token_limit=self.description.token_limit,
        )

    def _naming_the_word(self, notices: tuple[Notice, ...], plan: SamplingPlan) -> tuple[Notice, ...]:
        """The notices of prompts that were cut off, with the word at which."""
        prompts = {"prompt": plan.prompt, "negative_prompt": plan.negative_prompt}
        named = []
        for notice in notices:
            parameter = notice.code.removesuffix("_truncated")
            cut = None
            if self._tokens is not None and parameter in prompts:
                cut = self._tokens.cut(prompts[parameter], self.description.token_limit)
            told = notice.message if cut is None else f"{notice.message}; {where_it_ends(parameter, cut)}"
            named.append(replace(notice, message=told))
        return tuple(named)

    def _draw(
        self,
        plan: SamplingPlan,
        embeddings: PromptEmbeddings,
        index: int,
        reins: _Reins,
        source: PreparedSource | None,
    ) -> _Finished:
        """One picture, refined where the plan says so; what a mask leaves out is the source's."""
        seed = plan.seeds[index]

        def draw(in_float32: bool) -> DrawnPicture:
            # The steps of a second drawing are not told: they are the same steps of the same picture.
            told = (lambda *_: None) if in_float32 else reins.of_picture(index, self._guarded)
            return self._guarded.draw(plan, embeddings, seed, reins.check, told, in_float32, source)

        if self._is_warming:  # nobody sees it
            unseen = draw(False)
            return _Finished(unseen, unseen.image, (), 0.0)
        is_last = self._guarded.is_float32 or not self.draws_again
        drawn, looks = drawn_and_looked_at(draw, is_last, self._clock)
        notices = (*guard_notices(drawn.trace, plan.guidance_scale), *looks)
        for notice in notices:
            logger.warning("seed %d: %s", seed, notice.message)
        finish = (lambda image: image) if source is None else source.pasted
        if not plan.refine:
            return _Finished(drawn, finish(drawn.image), notices, 0.0)
        refined = refine(drawn.image)
        return _Finished(drawn, finish(refined.image), notices, refined.seconds)

    def _report(
        self,
        plan: SamplingPlan,
        enhancement: EnhancedPrompt,
        embeddings: PromptEmbeddings,
        pictures: list[_Finished],
        memory: MemoryUse,
        started: float,
    ) -> GenerationReport:
        """What happened. The first picture's report carries what encoding the prompts took, and its trips."""
        model = self.description
        others = len(pictures) - 1
        encoding = [(embeddings.encode_seconds, embeddings.trips), *[(0.0, ())] * others]
        reports = tuple(
            PictureReport(
                seed=seed,
                seconds=encode_seconds + picture.seconds,
                encode_seconds=encode_seconds,
                denoise_seconds=picture.drawn.denoise_seconds,
                decode_seconds=picture.drawn.decode_seconds,
                refine_seconds=picture.refine_seconds,
                warnings=picture.notices,
                guard=replace(picture.drawn.trace, trips=(*trips, *picture.drawn.trace.trips)),
            )
            for seed, picture, (encode_seconds, trips) in zip(plan.seeds, pictures, encoding, strict=True)
        )
        return GenerationReport(
            model=model.id,
            family=model.family,
            device=model.device,
            dtype=model.dtype,
            dtype_because=model.dtype_because,
            prompt=plan.prompt,
            negative_prompt=plan.negative_prompt,
            enhancement=enhancement,
            width=plan.width_px,
            height=plan.height_px,
            num_inference_steps=plan.steps,
            guidance_scale=plan.guidance_scale,
            scheduler=type(self.pipeline.scheduler).__name__,
            seconds=time.perf_counter() - started,
            pictures=reports,
            warnings=(
                *plan.warnings,
                *notice_of(enhancement),
                *self._naming_the_word(embeddings.warnings, plan),
            ),
            memory=memory,
            loras=self._shelf.uses(),
            prompt_cache=embeddings.cache,
            edit=None if plan.edit is None else _use_of(plan.edit),
            identity=self.identity,
            drawn_with=drawn_with(model.device),
            guidance_until=plan.guidance_until,
        )


@dataclass(frozen=True)
class Held:
    """What stays as it is while drawings are under way at once: the memory plan, the LoRAs, the levers."""

    plan: OffloadPlan
    loras: tuple[WantedLora, ...]
    levers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Finished:
    """A picture as it is handed over, and how it came about; `refine_seconds` 0: it was not refined."""

    drawn: DrawnPicture
    image: Image = field(repr=False)
    notices: tuple[Notice, ...]
    refine_seconds: float

    @property
    def seconds(self) -> float:
        return self.drawn.denoise_seconds + self.drawn.decode_seconds + self.refine_seconds


def _digest_of(source: SourcePicture) -> str:
    digest = hashlib.sha256(source.rgb)
    digest.update(source.mask or b"")
    return digest.hexdigest()[:32]


class _Reins:
    """A request's control and callback as the drawing of its pictures takes them."""

    def __init__(
        self, control: DrawingControl, on_step: OnStep | None, plan: SamplingPlan, shown: GuardedPipeline
    ) -> None:
        """`shown` is what previews are made of."""
        self._control = control
        self._on_step = on_step
        self._plan = plan
        self._shown = shown
        self._told = [0] * len(plan.seeds)
        self._has_failed = False

    def check(self) -> None:
        """Raise what ends a drawing: its control's word, or that another picture of it has failed."""
        self._control.check()
        if self._has_failed:
            raise GenerationCancelled("another picture of the same request could not be drawn")

    @contextmanager
    def stopping_all(self) -> Iterator[None]:
        """What ends the drawing of one picture ends that of the others."""
        try:
            yield
        except BaseException:
            self._has_failed = True
            raise

    def of_picture(self, index: int, drawn_by: GuardedPipeline) -> Callable[[int, Any], None]:
        def stepped(step: int, latents: Any) -> None:
            if step <= self._told[index]:  # drawn again for want of memory
                return
            self._told[index] = step
            self._shown.at_work = drawn_by.at_work
            progress = StepProgress(
                index + 1, len(self._plan.seeds), step, self._plan.drawn_steps, sum(self._told)
            )
            if self._on_step is not None:
                self._on_step(progress)
            self._control.stepped(progress, latents)

        return stepped


def _use_of(edit: EditPlan) -> EditUse:
    return EditUse(edit.strength, edit.steps_run, edit.masked, edit.source_width_px, edit.source_height_px)


def _shape_of(part: Any) -> list[str]:
    """The class of a diffusers model and all of its settings but where they came from."""
    settings = {name: value for name, value in part.config.items() if not name.startswith("_")}
    return [type(part).__name__, json.dumps(settings, sort_keys=True, default=str)]


def _model_id(path_or_id: str | Path | None) -> str:
    """What callers know the model by: a hub id as it is, a path by its last name alone."""
    if path_or_id is None:
        return DEMO_MODEL_ID
    path = Path(path_or_id).expanduser()
    if path.is_file():
        return path.stem
    return path.resolve().name if path.is_dir() else str(path_or_id)
