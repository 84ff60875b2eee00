"""The frozen values that travel through the engine: what was asked, what happened.

What a stage decides for itself lives beside that stage (`sampling.plan.SamplingPlan`,
`loading.plan.LoadPlan`). This module knows no torch and no diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class SourcePicture:
    """A picture to draw from, in plain bytes, so that it can be sent and kept without a picture library.

    `rgb` has 3 bytes a pixel and `mask` one, row by row from the top: 255 where it is to be drawn anew, 0
    where it has to stay. None: all of it is drawn anew. `shrunk_from` is (width, height) in pixels of the
    file that it came from, where that was larger.
    """

    width: int
    height: int
    rgb: bytes = field(repr=False)
    mask: bytes | None = field(default=None, repr=False)
    shrunk_from: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class LoraChoice:
    """A LoRA by the name that it is offered under, and how strongly it acts: 1 as trained, 0 not at all."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class LoraOffer:
    """A LoRA that may be asked for by name, or why not: `refusal` is "" where it fits the model.

    `made_for` is a clause for a person, "" where the file tells nothing. `trigger_words` and `usage_hint` are
    its author's, where the file has them. `digest` is as in `LoraUse`.
    """

    name: str
    size_bytes: int
    refusal: str = ""
    made_for: str = ""
    digest: str = ""
    trigger_words: tuple[str, ...] = ()
    usage_hint: str = ""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What the caller asked; None means that the family's default is wanted.

    `width` and `height` are pixels. `guidance_scale` is the conventional w: 1 (or 0) is off.
    `guidance_until` is the part of the way from noise to picture, 0 to 1, up to which guidance acts: steps
    that begin further on are drawn without, in half the work. None and 1: it acts in all; 0: in the first.
    Picture i of `n` is drawn from `seed + i`, so that each can be drawn again on its own.
    `refine` strengthens fine detail of the finished picture; None means where `enhance` is on.
    With `image` that picture is drawn anew, as far as `strength` says: above 0, hardly; 1, from noise alone
    where it is drawn anew (SDXL's start keeps a trace of it; a mask's surroundings are looked at). The prompt
    may be empty then, and the size is by default that of the picture.
    `loras` are drawn with in place of those that the engine was loaded with; none of them: with none.
    `exact`: nothing that makes drawing quicker at the price of other last bits takes part, so that the
    picture is bit for bit that of an engine which knows of none.
    """

    prompt: str
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    n: int = 1
    enhance: bool = True
    refine: bool | None = None
    image: SourcePicture | None = None
    strength: float | None = None
    loras: tuple[LoraChoice, ...] | None = None
    #: Which of several models is to draw it, for whoever has several; an engine has one, and draws with it.
    model: str | None = None
    #: Who enhances the prompt, where `enhance` is on; None: the rules. An engine knows no endpoint.
    enhancer: Enhancer | None = None
    rewrite_budget: RewriteBudget = field(default_factory=lambda: RewriteBudget())
    guidance_until: float | None = None
    exact: bool = False


#: What a word of a prompt speaks of.
Kind = Literal["subject", "style", "material", "light", "scene", "quality", "quoted"]
#: Why the enhancer added a phrase (missing) or left it out.
Reason = Literal["missing", "said", "kind_said", "against", "refused", "no_room"]


@dataclass(frozen=True, slots=True)
class PhraseChoice:
    """One phrase that the enhancer added or left out: what, of which kind, why.

    `field` is the prompt that it belongs to; `about` the caller's words that decided, "" where none did.
    `because` is a sentence in English, `zimage_engine.prompts.enhancer.because` has it in other languages.
    """

    phrase: str
    field: Literal["prompt", "negative_prompt"]
    kind: Kind
    reason: Reason
    about: str
    because: str


#: Who writes what is drawn: rules, the language model that the text encoder is, or one elsewhere.
Enhancer = Literal["rules", "model", "endpoint"]
#: How a language model's rewriting of a prompt ended. "used": it is drawn; else what the rules made is.
#: From "empty" to "drift" its text was not what was asked for, the others tell that there was none.
RewriteOutcome = Literal[
    "used",
    "empty",
    "talk",
    "loop",
    "language",
    "quoted",
    "weight",
    "number",
    "name",
    "negation",
    "style",
    "drift",
    "too_long",
    "unfinished",
    "timeout",
    "unavailable",
    "failed",
]


@dataclass(frozen=True, slots=True)
class RewriteBudget:
    """What a language model may take for one prompt."""

    seconds: float = 20.0
    tokens: int = 256


@dataclass(frozen=True, slots=True)
class Written:
    """What a language model wrote, why it stopped (done, or all taken that it may take), and its cost."""

    text: str
    ended: Literal["done", "tokens", "seconds"] = "done"
    seconds: float = 0.0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class NotWritten:
    """Why a language model wrote nothing; `because` is a clause for a person."""

    outcome: RewriteOutcome
    because: str
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Rewrite:
    """How a language model's rewriting ended; `because` is a sentence, `tokens` what it wrote, if known."""

    by: Enhancer
    outcome: RewriteOutcome
    because: str
    seconds: float = 0.0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class EnhancedPrompt:
    """What the enhancer made of a prompt.

    `added` and `added_negative` are the phrases it put in, in order; `because` is one sentence a
    person can read. With enhancement turned off the prompts are the caller's and nothing is added.
    `additions` and `left_out` explain each phrase of the enhancer's on its own.
    """

    prompt: str
    negative_prompt: str
    added: tuple[str, ...] = ()
    added_negative: tuple[str, ...] = ()
    language: str = "en"
    because: str = ""
    additions: tuple[PhraseChoice, ...] = ()
    left_out: tuple[PhraseChoice, ...] = ()
    #: None where no language model was asked.
    rewrite: Rewrite | None = None


@dataclass(frozen=True, slots=True)
class Notice:
    """Something the caller should know about a picture that was drawn all the same.

    `code` is from a small closed set (it becomes a metric label); `message` is a sentence.
    """

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class StepProgress:
    """One denoising step has ended: step `step` of `steps` of picture `picture` of `pictures`, from 1.

    Pictures may be drawn at once; `ended` is how many steps of all of them have ended, None where one is
    drawn after another.
    """

    picture: int
    pictures: int
    step: int
    steps: int
    ended: int | None = field(default=None, compare=False)

    @property
    def steps_ended(self) -> int:
        """How many steps of all pictures have ended: it only grows."""
        return (self.picture - 1) * self.steps + self.step if self.ended is None else self.ended


#: Called after every step, in the thread that draws; what it raises stops the drawing.
OnStep = Callable[[StepProgress], None]


@dataclass(frozen=True, slots=True)
class GuardAttempt:
    """One measure against a bad value: which, how it ended ("recovered", "failed", "skipped"), and why."""

    rung: str
    outcome: str
    seconds: float
    because: str = ""


@dataclass(frozen=True, slots=True)
class GuardTrip:
    """A bad value that was found, and what was done about it.

    `stage` is "encode", "source" (a picture to draw from), "denoise" or "decode"; `step` counts from 1, None
    where there are no steps;
    `finding` is "nan", "inf" or "out of range".
    """

    stage: str
    step: int | None
    finding: str
    attempts: tuple[GuardAttempt, ...] = ()

    @property
    def recovered_by(self) -> str | None:
        """The rung that helped; None where nothing did."""
        return next((each.rung for each in self.attempts if each.outcome == "recovered"), None)


@dataclass(frozen=True, slots=True)
class GuardTrace:
    """What the guard saw while one picture was drawn; no trips is the usual case.

    `clipped_values` counts values of the denoiser's output that were clipped into the family's range.
    `final_guidance_scale` is the conventional w that the last step was drawn with.
    """

    trips: tuple[GuardTrip, ...] = ()
    clipped_values: int = 0
    final_guidance_scale: float | None = None


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Where the weights lay while a request was drawn; bytes are of the device.

    `offload` is the way (none, model, stream, sequential, disk), `plan` says it in a line with its reason.
    `predicted_peak_bytes` is None on a device without memory of its own. `oom_recoveries` tells what was done
    after each out-of-memory: freed, leaner, tiled. `quantize` is its word where the denoiser's matrices
    were quantised, which changes pictures a little.
    """

    offload: str
    plan: str
    predicted_peak_bytes: int | None = None
    oom_recoveries: tuple[str, ...] = ()
    quantize: str | None = None


#: How much of encoded prompts an engine keeps unless it is told otherwise: of Z-Image's two dozen with all
#: their 512 tokens, or two hundred with 60.
EMBEDDING_CACHE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class PromptCacheUse:
    """How many of a request's prompts were encoded before (`hits`), and how many now (`misses`)."""

    hits: int
    misses: int


@dataclass(frozen=True, slots=True)
class PictureReport:
    """How one picture was made. Seconds are wall-clock; the stages are what the pipeline spent.

    `refine_seconds` is 0 where the picture was not refined. `watermark` is the text that whoever packed it
    into a file put into its pixels, "" where that was none.
    """

    seed: int
    seconds: float
    encode_seconds: float
    denoise_seconds: float
    decode_seconds: float
    warnings: tuple[Notice, ...] = ()
    refine_seconds: float = 0.0
    guard: GuardTrace = field(default_factory=GuardTrace)
    watermark: str = ""


@dataclass(frozen=True, slots=True)
class LoraUse:
    """A LoRA that was in force: its file's name, how strongly it acted, how many modules it adapted.

    `digest` is 32 hex digits of its content, as in `ModelIdentity`, "" where that is not known.
    """

    name: str
    weight: float
    adapted_modules: int
    digest: str = ""


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What a model is made of. `digest` is 32 hex digits of its files' content, "" where that is not known.

    Of large files the size and samples are taken and not every byte: it tells files that differ by chance
    apart, and is no proof against those that were made to look the same.
    `revision` is the commit of the hub that it came from, None for files from elsewhere; `repairs` are the
    names of what was mended to load it.
    """

    digest: str = ""
    revision: str | None = None
    repairs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DrawnWith:
    """What beside the model a picture's bits depend on: the device's name, a CPU's threads, and versions.

    `threads` is None on a device of its own; `versions` are (library, version).
    """

    device_name: str = ""
    threads: int | None = None
    versions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class EditUse:
    """How a picture was drawn from another: of the plan's steps the last `steps_run` were drawn.

    `masked`: what the mask leaves out is the source's own pixels. Sizes are pixels of the source.
    """

    strength: float
    steps_run: int
    masked: bool
    source_width: int
    source_height: int
    #: 32 hex digits of the source's pixels and its mask.
    source_digest: str = ""


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """What happened, whole: every value that was decided, for each picture what it took.

    `guidance_scale` is the conventional w, `guidance_until` as in the request. `prompt` and `negative_prompt`
    are those that were drawn.
    `warnings` concern the whole request; those of one picture stand in `pictures`. `prompt_cache` is None
    where encoded prompts are not kept. `dtype_because` is the model's, "" where nothing was to be chosen.
    `edit` is None where nothing but the prompt was drawn from. `sharing` is how many drawings
    shared each of the denoiser's forward passes on the average; the seconds were spent on all of them,
    and `device_seconds` of those on this one; None where it was alone. `accelerated_by` names what made it
    quicker and moved its last bits, () where nothing did: `zimage_engine.speed.levers` has the names.
    """

    model: str
    family: str
    device: str
    dtype: str
    prompt: str
    negative_prompt: str
    enhancement: EnhancedPrompt
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    seconds: float
    pictures: tuple[PictureReport, ...]
    warnings: tuple[Notice, ...] = ()
    memory: MemoryUse | None = None
    loras: tuple[LoraUse, ...] = ()
    prompt_cache: PromptCacheUse | None = None
    dtype_because: str = ""
    edit: EditUse | None = None
    identity: ModelIdentity = field(default_factory=ModelIdentity)
    drawn_with: DrawnWith = field(default_factory=DrawnWith)
    guidance_until: float = 1.0
    sharing: float = 1.0
    device_seconds: float | None = None
    accelerated_by: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values that `json.dumps` takes."""
        return asdict(self)


@dataclass(frozen=True)
class GenerationResult:
    """The pictures (PIL, RGB) in the order asked, and the report of how they were made."""

    images: list[Image] = field(repr=False)
    report: GenerationReport


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What a loaded model tells about itself to whoever talks to it without torch.

    Sizes are pixels; `max_side` bounds width and height, `max_steps` the steps. `tokenizer_json` is the text
    of a `tokenizers` file ("" where the model has none), so that prompts can be counted elsewhere;
    `token_limit` is how many of a prompt's own tokens reach the text encoder, the chat template's off.
    `dtype_because` says why it computes in `dtype`, where that was for the program to choose, else "".
    `shares_passes`: pictures of one size can have their steps in one forward pass.
    """

    id: str
    family: str
    device: str
    dtype: str
    native_width: int
    native_height: int
    size_multiple: int
    default_steps: int
    default_guidance_scale: float
    token_limit: int
    tokenizer_json: str = field(repr=False, default="")
    max_side: int = 2048
    max_steps: int = 100
    dtype_because: str = ""
    shares_passes: bool = False


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """Memory of the device that draws, in bytes; None where the device does not tell (CPU).

    `plan` says in a few words where the weights are, None where there is nothing to plan; `plan_because` why.
    """

    device: str
    name: str
    total_bytes: int | None
    used_bytes: int | None
    plan: str | None = None
    plan_because: str | None = None
