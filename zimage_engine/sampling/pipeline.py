"""Draws what a plan says with the stock diffusers pipeline, guarded: a bad value is met, not shown.

Knows nothing of requests or reports. Call it from one thread at a time: a pipeline has a state, but for the
time of a call only: however a call ends, the next one draws what it would draw in a fresh process.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from zimage_engine.errors import GuardExhausted
from zimage_engine.families import ModelFamily
from zimage_engine.sampling import float32
from zimage_engine.sampling.decoding import GuardedDecoder
from zimage_engine.sampling.device_failure import raise_if_failed
from zimage_engine.sampling.editing import EditingPipeline, PreparedSource, encoded
from zimage_engine.sampling.embedding_cache import EmbeddingCache, PromptKey
from zimage_engine.sampling.guard import StepFault, StepWatch, guarded_scheduler
from zimage_engine.sampling.known_dtype import dtype_known, dtype_of
from zimage_engine.sampling.known_signatures import signatures_known
from zimage_engine.sampling.module_walk import modules_within, tensors_within
from zimage_engine.sampling.plan import SamplingPlan
from zimage_engine.sampling.prompt_encoders import Role, encoder_for
from zimage_engine.sampling.recovery import Facts, Measures, Trip
from zimage_engine.sampling.tripwire import finding_in
from zimage_engine.types import GuardTrace, GuardTrip, Notice, PromptCacheUse

if TYPE_CHECKING:
    from PIL.Image import Image

#: Seconds from some fixed moment, read when the device has nothing left to do.
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class PromptEmbeddings:
    """Both prompts as arguments of the pipeline that encoded them; `cache` None: nothing is kept."""

    arguments: Mapping[str, Any] = field(repr=False)
    encode_seconds: float
    warnings: tuple[Notice, ...]
    trips: tuple[GuardTrip, ...] = ()
    cache: PromptCacheUse | None = None


@dataclass(frozen=True, slots=True)
class DrawnPicture:
    """One picture and what it took.

    `denoise_seconds` runs from the call of the pipeline to the end of its last step (so it holds the
    drawing of the noise, and what was drawn again after a fault), `decode_seconds` from there to the
    finished picture. Where a picture is edited, the first one's `denoise_seconds` hold the VAE's encoding of
    its source too.
    """

    image: Image = field(repr=False)
    denoise_seconds: float
    decode_seconds: float
    trace: GuardTrace


class GuardedPipeline:
    """A stock pipeline with a guard at each place where a bad value can come from.

    The text encoder's answer, each output of the denoiser and the decoded picture are looked at; what is
    found is recovered from by the family's rungs, or GuardExhausted is raised. Nothing of it outlives a call,
    but for sound embeddings where there is a cache for them: what was found bad, or made in recovering from
    it, is not kept.
    """

    def __init__(
        self, pipeline: Any, family: ModelFamily, clock: Clock, cache: EmbeddingCache | None = None
    ) -> None:
        self._cache = cache
        self._pipeline = pipeline
        self._family = family
        self._clock = clock
        self._encoder = encoder_for(pipeline)
        #: What draws now: the stock pipeline, or one around its components that draws from a picture.
        self.at_work = pipeline
        #: What was at work last; an out-of-memory that comes out of a call belongs to it.
        self.stage: Literal["encode", "denoise", "decode"] = "encode"

    @property
    def is_float32(self) -> bool:
        """Whether float32 is what the denoiser and the VAE are drawn in anyway."""
        return all(dtype_of(module) is torch.float32 for module in (self._denoiser, self._pipeline.vae))

    @property
    def _denoiser(self) -> torch.nn.Module:
        module: torch.nn.Module = getattr(self._pipeline, self._family.denoiser)
        return module

    def encode(self, plan: SamplingPlan, max_tokens: int) -> PromptEmbeddings:
        """Encode the plan's prompts once, for all of its pictures.

        The text encoder reads at most `max_tokens`, chat template included; a warning tells what was cut off.
        """
        started = self._clock()
        self.stage = "encode"
        guided = plan.guidance_scale > 1.0
        texts = self._encoder.texts(self._pipeline, plan.prompt, plan.negative_prompt, guided)
        try:
            with torch.no_grad():
                arguments, trips, use = self._encoded(plan, max_tokens, texts)
        finally:
            self._pipeline.maybe_free_model_hooks()
        encode_seconds = self._clock() - started
        return PromptEmbeddings(
            arguments=arguments,
            encode_seconds=encode_seconds,
            trips=trips,
            cache=use,
            warnings=tuple(
                Notice(
                    f"{parameter}_truncated",
                    f"{parameter} takes {count} tokens and this model reads {max_tokens}: "
                    f"the last {count - max_tokens} were left out; shorten it",
                )
                for parameter, text in texts.items()
                if (count := self._encoder.count_tokens(self._pipeline, text)) > max_tokens
            ),
        )

    def _encoded(
        self, plan: SamplingPlan, max_tokens: int, texts: Mapping[Role, str]
    ) -> tuple[Mapping[str, Any], tuple[GuardTrip, ...], PromptCacheUse | None]:
        """The prompts from the cache where they are there, and what is sound of the others goes into it.

        Recovering from a bad value reads both prompts again: the picture is that of a guard without a cache.
        """
        if self._cache is None:
            return (*self._read(plan, max_tokens, {}), None)
        encoder = _form_of(self._text_encoders)
        keys = {role: PromptKey(text, role, max_tokens, encoder) for role, text in texts.items()}
        hits = {role: states for role, key in keys.items() if (states := self._cache.find(key)) is not None}
        known = {name: value for states in hits.values() for name, value in states.items()}
        arguments, trips = self._read(plan, max_tokens, known)
        if not trips:
            for role, key in keys.items():
                if role not in hits:
                    self._cache.put(key, {name: arguments[name] for name in self._encoder.names[role]})
        return arguments, trips, PromptCacheUse(len(hits), len(keys) - len(hits))

    @property
    def _text_encoders(self) -> list[torch.nn.Module]:
        return [getattr(self._pipeline, name) for _, name in self._family.text_encoders]

    def _read(
        self, plan: SamplingPlan, max_tokens: int, known: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], tuple[GuardTrip, ...]]:
        """What the text encoder makes of the prompts that are not `known`, judged together with those."""
        text_encoders = self._text_encoders

        def encode(measures: Measures, known: Mapping[str, Any]) -> dict[str, Any]:
            with ExitStack() as stack:
                for text_encoder in text_encoders:
                    if (context := context_of(measures)) is not None:
                        stack.callback(float32.during_forward(text_encoder, context))
                return self._encoder.encode(
                    self._pipeline,
                    plan.prompt,
                    plan.negative_prompt,
                    plan.guidance_scale > 1.0,
                    max_tokens,
                    known,
                )

        limit = self._family.embedding_limit
        arguments = encode(Measures(), known)
        found = finding_in(arguments, limit)
        if found is None:
            return arguments, ()
        facts = Facts(
            current=Measures(),
            is_float32=all(text_encoder.dtype is torch.float32 for text_encoder in text_encoders),
        )
        trip = Trip("encode", None, found, self._family.encode_rungs, self._clock)
        while found is not None:
            measures = trip.next_measures(facts, found)
            try:
                arguments = encode(measures, {})
            except RuntimeError as error:
                raise_if_failed(error)
                found = _could_not(error)
            else:
                found = finding_in(arguments, limit)
        trip.recovered()
        return arguments, (trip.report,)

    def draw(
        self,
        plan: SamplingPlan,
        embeddings: PromptEmbeddings,
        seed: int,
        check: Callable[[], None],
        on_step: Callable[[int, torch.Tensor], None],
        in_float32: bool = False,
        source: PreparedSource | None = None,
    ) -> DrawnPicture:
        """Draw one picture, from `source` where the plan is to edit one.

        `check` is called before each step's result is used and before decoding, `on_step` with 1, 2, ...
        and the latents after each step; what either raises ends the drawing. `in_float32` draws every step
        and decodes in float32 arithmetic. The noise comes from the CPU's generator on every device, so a
        seed means the same noise everywhere. Raises GuardExhausted where a bad value comes back.
        """
        self.stage = "denoise"
        start = Measures(plan.guidance_scale, float32=in_float32, lasting=in_float32)
        if source is None:
            return _Drawing(self, plan, embeddings, seed, check, on_step, start).run()
        started = self._clock()
        try:
            latents, trips = self._encoded_source(source, in_float32)
        except GuardExhausted as exhausted:
            raise GuardExhausted(exhausted.message, (*embeddings.trips, *exhausted.trips)) from None
        encode_seconds = self._clock() - started
        drawing = _Drawing(self, plan, embeddings, seed, check, on_step, start, (source, latents))
        try:
            drawn = drawing.run()
        except GuardExhausted as exhausted:
            raise GuardExhausted(exhausted.message, (*trips, *exhausted.trips)) from None
        source.tell_once()
        return replace(
            drawn,
            denoise_seconds=encode_seconds + drawn.denoise_seconds,
            trace=replace(drawn.trace, trips=(*trips, *drawn.trace.trips)),
        )

    def _encoded_source(
        self, source: PreparedSource, in_float32: bool
    ) -> tuple[torch.Tensor, tuple[GuardTrip, ...]]:
        """The source's latents. What helps the VAE to decode where memory is short helps it here."""
        self.stage = "decode"
        try:
            latents_and_trips = encoded(self._pipeline, self._family, source, self._clock, in_float32)
        finally:
            self._pipeline.maybe_free_model_hooks()
        self.stage = "denoise"
        return latents_and_trips


class _Drawing:
    """One picture on its way: calls the pipeline, and again from the last good step after each fault."""

    def __init__(
        self,
        guarded: GuardedPipeline,
        plan: SamplingPlan,
        embeddings: PromptEmbeddings,
        seed: int,
        check: Callable[[], None],
        on_step: Callable[[int, torch.Tensor], None],
        start: Measures,
        source: tuple[PreparedSource, torch.Tensor] | None = None,
    ) -> None:
        self._guarded = guarded
        self._seed = seed
        self._source = source
        self._editing = (
            None
            if source is None
            else EditingPipeline(guarded._pipeline, guarded._family, source[0].mask is not None)
        )
        self._pipeline = guarded._pipeline if self._editing is None else self._editing.pipeline
        self._family = guarded._family
        self._clock = guarded._clock
        self._encoder = guarded._encoder
        self._denoiser = guarded._denoiser
        self._plan = plan
        self._embeddings = embeddings
        self._check = check
        self._on_step = on_step
        self._measures = start
        self._trips: list[Trip] = []
        self._open: Trip | None = None
        self._settled = start
        self._end_measures: Callable[[], None] = lambda: None
        self._watch = StepWatch(
            residual=self._family.residual.at_guidance(plan.guidance_scale),
            generator=torch.Generator("cpu").manual_seed(seed),
            before_step=lambda _step: check(),
            passed=self._passed,
            left_out=plan.steps - plan.drawn_steps,
        )

    def run(self) -> DrawnPicture:
        started = self._clock()
        decoder = GuardedDecoder(
            self._pipeline.vae,
            limit=self._family.decoded_limit,
            rungs=self._family.decode_rungs,
            clock=self._clock,
            before=self._before_decoding,
            start=Measures(float32=self._measures.float32),
        )
        try:
            with decoder.in_place(), self._own_scheduler(), self._known():
                output = self._call()
                while isinstance(output, StepFault):
                    self._go_back(output)
                    output = self._call()
        except GuardExhausted as exhausted:
            met = [trip.report for trip in self._trips if trip is not self._open]
            trips = (*self._embeddings.trips, *met, *exhausted.trips)
            raise GuardExhausted(exhausted.message, trips) from None
        decode_started = decoder.started_at or self._clock()
        return DrawnPicture(
            output.images[0],
            denoise_seconds=decode_started - started,
            decode_seconds=self._clock() - decode_started,
            trace=GuardTrace(
                trips=tuple(trip.report for trip in self._trips) + decoder.trips,
                clipped_values=self._watch.clipped_values,
                final_guidance_scale=self._measures.guidance_scale,
            ),
        )

    @contextmanager
    def _known(self) -> Iterator[None]:
        """Within, what stays while one picture is drawn is looked up once."""
        with dtype_known(self._denoiser), signatures_known():
            yield

    def _before_decoding(self) -> None:
        self._guarded.stage = "decode"
        self._check()

    def _call(self) -> Any:
        """What the pipeline returns, or the fault that ended it."""
        self._begin(self._measures)
        self._pipeline.scheduler.watch = self._watch
        try:
            with self._start() as beginning:
                return self._pipeline(
                    **self._encoder.call_arguments(self._embeddings.arguments),
                    **beginning,
                    num_inference_steps=self._plan.steps,
                    guidance_scale=self._family.to_pipeline_guidance(self._measures.guidance_scale),
                    **_where_guidance_ends(self._plan),
                    generator=self._watch.generator,
                )
        except StepFault as fault:
            return fault
        except RuntimeError as error:
            raise_if_failed(error)
            # A measure that this machine cannot take (memory, a missing kernel) is one that did not help.
            if self._open is None or self._open.tried is None:
                raise
            return StepFault(self._watch.step, _could_not(error))
        finally:
            self._end_measures()
            self._pipeline.maybe_free_model_hooks()

    @contextmanager
    def _start(self) -> Iterator[dict[str, Any]]:
        """What tells the pipeline where to begin: with fresh noise, a picture, or the last good step."""
        start, generator = self._watch.resume_from, self._watch.generator
        if self._editing is not None and self._source is not None:
            source, latents = self._source
            with self._editing.drawing(self._plan, latents, start, generator, self._seed):
                yield self._editing.arguments(self._plan, source, latents)
            return
        size = {"width": self._plan.width_px, "height": self._plan.height_px}
        if start is None:
            yield size
            return
        generator.set_state(start.generator_state)
        yield {**size, "latents": start.latents}

    def _begin(self, measures: Measures) -> None:
        context = context_of(measures)
        self._end_measures = (
            (lambda: None) if context is None else float32.during_forward(self._denoiser, context)
        )

    def _go_back(self, fault: StepFault) -> None:
        """Choose what to try next from where the fault's step started; raises GuardExhausted."""
        self._check()
        if self._open is None:
            self._open = Trip(
                "denoise", fault.step + 1, fault.finding, self._family.denoise_rungs, self._clock
            )
            self._trips.append(self._open)
            self._settled = self._measures
        self._watch.resume_from = self._watch.last_good
        self._measures = self._open.next_measures(self._facts(), fault.finding)

    def _facts(self) -> Facts:
        earlier = [trip.report for trip in self._trips[:-1]]
        helped = {trip.recovered_by: trip.step for trip in earlier if trip.recovered_by}
        failed = {
            attempt.rung: trip.step
            for trip in earlier
            for attempt in trip.attempts
            if attempt.outcome == "failed" and attempt.rung != trip.recovered_by
        }
        return Facts(
            current=self._settled,
            is_float32=getattr(self._denoiser, "dtype", None) is torch.float32,
            failed=failed,  # type: ignore[arg-type]
            helped=helped,  # type: ignore[arg-type]
        )

    def _passed(self, step: int, latents: torch.Tensor) -> None:
        if self._open is not None:
            self._open.recovered()
            self._open = None
            if not self._measures.lasting:
                self._end_measures()
                self._end_measures = lambda: None
                self._measures = Measures(self._measures.guidance_scale)
        self._on_step(step + 1, latents)

    @contextmanager
    def _own_scheduler(self) -> Iterator[None]:
        """A fresh guarded scheduler in the place of the pipeline's, which stays as it was loaded.

        Set past the pipeline's own `__setattr__`, which would write the class into its config.
        """
        members = vars(self._pipeline)
        stock = members["scheduler"]
        members["scheduler"] = guarded_scheduler(stock, self._watch)
        self._guarded.at_work = self._pipeline
        try:
            yield
        finally:
            members["scheduler"] = stock
            self._guarded.at_work = self._guarded._pipeline


def _where_guidance_ends(plan: SamplingPlan) -> dict[str, float]:
    """Keyword arguments; nothing where guidance acts to the end, which pipelines that know no other do."""
    return {"cfg_truncation": plan.guidance_until} if plan.guidance_until < 1 else {}


def context_of(measures: Measures) -> Callable[[torch.nn.Module], Any] | None:
    """What has to hold while a module runs under these measures."""
    if measures.float32:
        return float32.wide
    return float32.plain_attention if measures.plain_attention else None


def _form_of(text_encoders: Sequence[torch.nn.Module]) -> Hashable:
    """What tells weights as they were loaded from the same ones quantised or stored in another dtype."""
    return tuple(
        (
            frozenset(type(module) for module in modules_within(text_encoder)),
            frozenset((type(tensor), tensor.dtype) for tensor in tensors_within(text_encoder)),
        )
        for text_encoder in text_encoders
    )


def _could_not(error: RuntimeError) -> str:
    return f"an error ({type(error).__name__})"
