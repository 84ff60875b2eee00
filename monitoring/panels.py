"""The dashboards as tables: one row a panel. Knows nothing of Grafana's JSON.

In expressions SCOPE stands for the matchers of the chosen namespace and application; `$__rate_interval` is
Grafana's own. Units are Grafana's names.
"""

from __future__ import annotations

from dataclasses import dataclass

SCOPE = 'namespace=~"$namespace", application=~"$application"'


#: Matchers of single panels.
PARTS = 'stage!="total"'
GUARDED = 'stage=~"encode|denoise|decode"'
GIVEN_UP = 'outcome="guard_exhausted"'
RECOVERED = 'outcome="recovered"'
REFUSED = 'outcome="queue_full"'
FOUND = 'outcome="hit"'
REFUSED_OR_LEFT = 'outcome=~"queue_full|rate_limit_exceeded|cancelled"'


@dataclass(frozen=True, slots=True)
class Query:
    """One expression, and the name of each of its series; `{{label}}` in it is a label's value."""

    expression: str
    legend: str


@dataclass(frozen=True, slots=True)
class Level:
    """From `above` on the figure is shown in `colour`."""

    above: float
    colour: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture on a dashboard. `is_figure`: a single large figure instead of a line over time.

    `levels` colour a figure; `is_stacked` fills lines on top of one another; `needs_gpu`: a CPU has none of
    it, and the panel is empty or at zero there. `has_exemplars`: single requests are shown as dots, with
    their ids.
    """

    title: str
    unit: str
    description: str
    queries: tuple[Query, ...]
    is_figure: bool = False
    is_stacked: bool = False
    needs_gpu: bool = False
    levels: tuple[Level, ...] = ()
    highest: float | None = None
    has_exemplars: bool = False


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One dashboard: a row of figures on top, its lines below, three in a row."""

    uid: str
    title: str
    description: str
    panels: tuple[Panel, ...]


def metric(name: str, matchers: str = "") -> str:
    return f"{name}{{{SCOPE}{', ' if matchers else ''}{matchers}}}"


def rate(name: str, matchers: str = "") -> str:
    return f"rate({metric(name, matchers)}[$__rate_interval])"


def quantile(share: float, histogram: str, by: str = "", matchers: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) ({rate(histogram + '_bucket', matchers)}))"


def quantiles(histogram: str) -> tuple[Query, ...]:
    return tuple(
        Query(quantile(share, histogram), words)
        for share, words in ((0.5, "half are below"), (0.95, "95 % are below"), (0.99, "99 % are below"))
    )


GOOD, WARN, BAD = "green", "orange", "red"
LOW_IS_GOOD = (Level(0, GOOD), Level(0.05, WARN), Level(0.2, BAD))

WORKERS = (
    Query(f"sum({metric('application:zimage_workers_up:sum')})", "up"),
    Query(f"max({metric('zimage_workers_wanted')})", "wanted"),
)

SERVICE = Dashboard(
    "zimage-service",
    "zimage-turbo: service",
    "Is it up, is it fast, does it answer? Look here first.",
    (
        Panel(
            "Model loaded",
            "bool_yes_no",
            "Yes where at least one worker has its model and answers. No means that every request gets 503.",
            (Query(f"max({metric('zimage_model_loaded')})", "loaded"),),
            is_figure=True,
            levels=(Level(0, BAD), Level(1, GOOD)),
        ),
        Panel(
            "Workers up",
            "short",
            "Workers that have their model and answer now, beside how many the settings ask for.",
            WORKERS,
            is_figure=True,
        ),
        Panel(
            "Requests in flight",
            "short",
            "Requests without an answer yet, those that wait and those that are drawn.",
            (Query(f"sum({metric('zimage_requests_in_flight')})", "in flight"),),
            is_figure=True,
        ),
        Panel(
            "Failing on our side",
            "percentunit",
            "The share of the last five minutes' requests that ended in an error of ours, of these and those "
            "that were served. Refused, cancelled and wrong requests are not counted at all.",
            (Query(f"max({metric('application:zimage_requests_failed:ratio_rate5m')})", "failing"),),
            is_figure=True,
            levels=LOW_IS_GOOD,
        ),
        Panel(
            "Slower than 30 s",
            "percentunit",
            "The share of the last five minutes' served requests that took longer than the objective, which "
            "allows 5 %.",
            (Query(f"max({metric('application:zimage_requests_slow:ratio_rate5m')})", "slow"),),
            is_figure=True,
            levels=LOW_IS_GOOD,
        ),
        Panel(
            "Version",
            "short",
            "How many front ends run which version; two versions are there while an upgrade is under way.",
            (Query(f"count by (version) ({metric('zimage_build_info')})", "{{version}}"),),
            is_figure=True,
        ),
        Panel(
            "Requests by outcome",
            "reqps",
            "ok is served, cancelled is a caller who left, queue_full is refused with 429; anything else is "
            "the error code that the caller was sent.",
            (Query(f"sum by (outcome) ({rate('zimage_requests_total')}) > 0", "{{outcome}}"),),
            is_stacked=True,
        ),
        Panel(
            "Seconds a request",
            "s",
            "From the checked request to its finished reply, waiting included; of requests that were served.",
            quantiles("zimage_request_seconds"),
            has_exemplars=True,
        ),
        Panel(
            "Pictures",
            "short",
            "Pictures handed over in a minute.",
            (Query(f"60 * sum({rate('zimage_pictures_total')})", "a minute"),),
        ),
        Panel(
            "Pictures drawn quicker",
            "short",
            "Pictures in a minute that `zimage-turbo tune` had found something quicker for, by what acted on "
            "them: their last bits are others than those of the plain path. A picture counts in the line of "
            "each that acted. 0 where nothing was tuned, or where `exact` is set.",
            (
                Query(
                    f"60 * sum by (lever) ({rate('zimage_pictures_accelerated_total')})",
                    "{{lever}}",
                ),
            ),
        ),
        Panel(
            "Where the seconds go",
            "s",
            "Mean seconds of each stage. Enhancing and packing are of a request, the others of a picture.",
            (
                Query(
                    f"sum by (stage) ({rate('zimage_generation_seconds_sum', PARTS)}) / "
                    f"sum by (stage) ({rate('zimage_generation_seconds_count', PARTS)})",
                    "{{stage}}",
                ),
            ),
            is_stacked=True,
        ),
        Panel(
            "Prompts encoded before",
            "percentunit",
            "The share of prompts, negative ones counted too, that the text encoder did not have to read "
            "again. Empty while nothing is drawn, or where `embedding_cache` is 0.",
            (
                Query(
                    f"sum({rate('zimage_prompt_cache_total', FOUND)})"
                    f" / sum({rate('zimage_prompt_cache_total')})",
                    "encoded before",
                ),
            ),
            highest=1,
        ),
        Panel(
            "Prompts rewritten by a language model",
            "short",
            "Prompts a minute that the text encoder or the endpoint was asked to rewrite, by what became "
            "of it: used, or why the rules were used instead. Empty where the enhancer is rules.",
            (
                Query(
                    f"60 * sum by (outcome) ({rate('zimage_prompt_rewrites_total')})",
                    "{{outcome}}",
                ),
            ),
            is_stacked=True,
        ),
        Panel(
            "Seconds a step",
            "s",
            "From the end of one denoising step to the end of the next. It is the same for every prompt; "
            "larger pictures, guidance, offloading and the guard's retries make it longer.",
            quantiles("zimage_step_seconds"),
        ),
        Panel(
            "Pictures a forward pass",
            "short",
            "How many pictures had a step in a forward pass of the denoiser, on the average. Above 1 where "
            "requests of one size come at the same time and share passes: more pictures a minute, each of "
            "them a little later.",
            (
                Query(
                    f"sum({rate('zimage_denoiser_pass_pictures_total')})"
                    f" / sum({rate('zimage_denoiser_passes_total')})",
                    "pictures",
                ),
            ),
        ),
        Panel(
            "Dead workers' requests",
            "short",
            "Requests that were sent to another worker because theirs died under them or its device failed, "
            "in a minute, and the failed devices among them. The caller notices nothing but the time.",
            (
                Query(f"60 * sum({rate('zimage_worker_retries_total')})", "sent again"),
                Query(f"60 * sum({rate('zimage_device_failures_total')})", "devices failed"),
            ),
        ),
        Panel(
            "Jobs",
            "short",
            "Jobs that are kept, by status: queued ones wait, running ones are drawn; the others have ended, "
            "and are forgotten after `job_seconds`. Every front end tells of the same database.",
            (Query(f"max by (status) ({metric('zimage_jobs')})", "{{status}}"),),
        ),
        Panel(
            "Oldest waiting job",
            "s",
            "How long the job that has waited longest has waited. It grows where the workers cannot keep up, "
            "or where nobody has the model that it wants.",
            (Query(f"max({metric('zimage_jobs_oldest_queued_seconds')})", "waits"),),
        ),
        Panel(
            "Webhooks",
            "short",
            "Tries to tell other servers of the ends of jobs, in a minute: delivered, again where the "
            "receiver failed and is told later, given_up where that was the last try.",
            (Query(f"60 * sum by (outcome) ({rate('zimage_webhook_deliveries_total')})", "{{outcome}}"),),
            is_stacked=True,
        ),
        Panel(
            "Slow requests against the budget",
            "percentunit",
            "The share slower than the objective over one and six hours. Someone is woken above 72 % of an "
            "hour and told above 30 % of six hours.",
            (
                Query(f"max({metric('application:zimage_requests_slow:ratio_rate1h')})", "one hour"),
                Query(f"max({metric('application:zimage_requests_slow:ratio_rate6h')})", "six hours"),
            ),
        ),
    ),
)

MEMORY = Dashboard(
    "zimage-memory",
    "zimage-turbo: GPU and memory",
    "Does the model fit, and what is done where it does not? Device figures are absent on a CPU.",
    (
        Panel(
            "Device memory in use",
            "percentunit",
            "The fullest worker's device, other programs on it included.",
            (Query(f"max({metric('replica:zimage_vram_used:ratio')})", "used"),),
            is_figure=True,
            needs_gpu=True,
            levels=(Level(0, GOOD), Level(0.9, WARN), Level(0.95, BAD)),
        ),
        Panel(
            "Out of memory",
            "short",
            "Out-of-memory errors in the last hour; most are recovered from by leaner means.",
            (Query(f"round(sum(increase({metric('zimage_oom_total')}[1h])))", "an hour"),),
            is_figure=True,
            needs_gpu=True,
            levels=(Level(0, GOOD), Level(1, WARN)),
        ),
        Panel(
            "Models",
            "short",
            "How many workers hold which model, on which device and in which number format.",
            (
                Query(
                    f"count by (model, device, dtype) ({metric('zimage_worker_model_info')})",
                    "{{model}} {{device}} {{dtype}}",
                ),
            ),
            is_figure=True,
        ),
        Panel(
            "Repairs at loading",
            "short",
            "Repairs that the checkpoint needed; `zimage-turbo inspect MODEL` names them.",
            (Query(f"max({metric('zimage_model_repairs')})", "repairs"),),
            is_figure=True,
        ),
        Panel(
            "Loading the model",
            "s",
            "Seconds that the slowest worker's loading took, a download included.",
            (Query(f"max({metric('zimage_model_load_seconds')})", "loading"),),
            is_figure=True,
        ),
        Panel(
            "Models coming and going",
            "short",
            "Models of the list that were loaded on demand, those that failed, and those that went for them, "
            "in an hour; in memory: of the fullest worker. Many an hour: let more stay, or add workers.",
            (
                Query(f"3600 * sum by (outcome) ({rate('zimage_model_loads_total')})", "loaded: {{outcome}}"),
                Query(f"3600 * sum({rate('zimage_model_unloads_total')})", "unloaded"),
                Query(f"max({metric('zimage_models_in_memory')})", "in memory"),
            ),
        ),
        Panel(
            "Disk of the models, free",
            "percentunit",
            "The part of the disk with downloads and repaired views that is free, where least is.",
            (Query(f"min({metric('replica:zimage_store_free:ratio')})", "free"),),
            is_figure=True,
            levels=(Level(0, BAD), Level(0.1, WARN), Level(0.2, GOOD)),
        ),
        Panel(
            "Device memory by kind",
            "bytes",
            "used: by anyone. reserved: by our worker; allocated: in use of that; peak: the most so far. The "
            "fullest worker of each; free: the emptiest one's.",
            (Query(f"max by (kind) ({metric('zimage_vram_bytes')})", "{{kind}}"),),
            needs_gpu=True,
        ),
        Panel(
            "Device memory by worker",
            "percentunit",
            "One line a worker; a worker that stands out shares its device or draws larger pictures.",
            (Query(metric("replica:zimage_vram_used:ratio"), "{{replica}}"),),
            needs_gpu=True,
            highest=1,
        ),
        Panel(
            "Fragmentation",
            "percentunit",
            "The part of the reserved memory that lies free between pieces in use, and cannot be given back.",
            (Query(metric("zimage_vram_fragmentation_ratio"), "{{replica}}"),),
            needs_gpu=True,
            highest=1,
        ),
        Panel(
            "Defragmentations",
            "short",
            "empty_cache gives unused memory back; deep moves the weights out and in again. In an hour.",
            (Query(f"3600 * sum by (kind) ({rate('zimage_defrag_total')})", "{{kind}}"),),
            needs_gpu=True,
        ),
        Panel(
            "Time spent defragmenting",
            "percentunit",
            "The share of the workers' time; above a percent the thresholds are too eager.",
            (Query(f"sum({rate('zimage_defrag_seconds_total')})", "share"),),
            needs_gpu=True,
        ),
        Panel(
            "Out of memory by stage",
            "short",
            "At which stage, and what was done: memory freed, a leaner plan, or refused. In an hour.",
            (
                Query(
                    f"3600 * sum by (stage, outcome) ({rate('zimage_oom_total')}) > 0 or on () "
                    f"label_replace(3600 * sum({rate('zimage_oom_total')}), 'stage', 'none', '', '')",
                    "{{stage}} {{outcome}}",
                ),
            ),
            needs_gpu=True,
        ),
        Panel(
            "Offload mode",
            "short",
            "How many workers keep their weights in which way; none is the fastest, disk the slowest.",
            (Query(f"sum by (mode) ({metric('zimage_offload_mode')})", "{{mode}}"),),
            is_stacked=True,
            needs_gpu=True,
        ),
        Panel(
            "Disk of the models",
            "bytes",
            "Free and total bytes of the disk with downloads and repaired views.",
            (Query(f"min by (kind) ({metric('zimage_store_bytes')})", "{{kind}}"),),
        ),
    ),
)

GUARD = Dashboard(
    "zimage-guard",
    "zimage-turbo: guard and quality",
    "Are pictures sound, and what does it take to make them so?",
    (
        Panel(
            "Bad values a picture",
            "short",
            "Values that were not finite or absurdly large, for each picture of the last 15 minutes. Zero is "
            "usual.",
            (Query(f"max({metric('application:zimage_guard_trips:per_picture15m')})", "a picture"),),
            is_figure=True,
            levels=LOW_IS_GOOD,
        ),
        Panel(
            "Given up",
            "short",
            "Requests of the last hour that ended with an error because nothing helped.",
            (
                Query(
                    f"round(sum(increase({metric('zimage_requests_total', GIVEN_UP)}[1h])))",
                    "an hour",
                ),
            ),
            is_figure=True,
            levels=(Level(0, GOOD), Level(1, BAD)),
        ),
        Panel(
            "Clipped values",
            "short",
            "Values of the denoiser's output that were clipped into the family's range in the last hour.",
            (Query(f"round(sum(increase({metric('zimage_guard_clipped_values_total')}[1h])))", "an hour"),),
            is_figure=True,
        ),
        Panel(
            "Bad values by stage",
            "short",
            "Where they were met, in a minute. picture: it looked wrong though no bad value was found.",
            (Query(f"60 * sum by (stage) ({rate('zimage_guard_trips_total')})", "{{stage}}"),),
            is_stacked=True,
        ),
        Panel(
            "What helped",
            "short",
            "The rungs of the ladder by which a bad value was recovered from, in a minute. same_inputs: it "
            "was transient, which points at the hardware.",
            (
                Query(
                    f"60 * sum by (rung) ({rate('zimage_guard_retries_total', RECOVERED)})",
                    "{{rung}}",
                ),
            ),
            is_stacked=True,
        ),
        Panel(
            "What was tried",
            "short",
            "Attempts by how they ended, in a minute. Each failed one costs a step or more.",
            (Query(f"60 * sum by (outcome) ({rate('zimage_guard_retries_total')})", "{{outcome}}"),),
            is_stacked=True,
        ),
        Panel(
            "Warnings",
            "short",
            "Warnings in the reports by code, in a minute. picture_...: how a finished picture looks; "
            "..._outside_range: what was asked for.",
            (Query(f"60 * sum by (code) ({rate('zimage_warnings_total')})", "{{code}}"),),
        ),
        Panel(
            "Time in the guard's stages",
            "s",
            "95 % of pictures take less, by stage; denoise and decode carry what the retries cost.",
            (Query(quantile(0.95, "zimage_generation_seconds", "stage", GUARDED), "{{stage}}"),),
        ),
    ),
)

CAPACITY = Dashboard(
    "zimage-capacity",
    "zimage-turbo: capacity and scaling",
    "Are there enough workers, and would another one help?",
    (
        Panel(
            "Waiting now",
            "short",
            "Requests that nobody draws yet.",
            (Query(f"sum({metric('application:zimage_queue_depth:sum')})", "waiting"),),
            is_figure=True,
            levels=(Level(0, GOOD), Level(4, WARN), Level(32, BAD)),
        ),
        Panel(
            "Workers busy",
            "percentunit",
            "The share of the last five minutes in which workers drew. Above 80 % another worker shortens "
            "the waiting.",
            (Query(f"max({metric('application:zimage_workers_busy:avg5m')})", "busy"),),
            is_figure=True,
            levels=(Level(0, GOOD), Level(0.8, WARN), Level(0.95, BAD)),
        ),
        Panel(
            "Refused",
            "short",
            "Requests of the last hour that were answered with 429 because too many waited.",
            (
                Query(
                    f"round(sum(increase({metric('zimage_requests_total', REFUSED)}[1h])))",
                    "an hour",
                ),
            ),
            is_figure=True,
            levels=(Level(0, GOOD), Level(1, WARN)),
        ),
        Panel(
            "Waiting",
            "short",
            "Requests that are under way and not being drawn.",
            (Query(f"sum({metric('application:zimage_queue_depth:sum')})", "waiting"),),
        ),
        Panel(
            "Seconds of waiting",
            "s",
            "What served requests waited for a worker, the way to it and back included.",
            quantiles("zimage_queue_wait_seconds"),
        ),
        Panel(
            "Workers",
            "short",
            "Up and wanted, and how many of them draw.",
            (*WORKERS, Query(f"sum({metric('zimage_worker_busy')})", "drawing")),
        ),
        Panel(
            "Load of each worker",
            "percentunit",
            "The share of the last minute in which it drew. Even lines mean that the work is well spread.",
            (Query(f"avg_over_time({metric('zimage_worker_busy')}[1m])", "{{replica}}"),),
            highest=1,
        ),
        Panel(
            "Seconds a step by worker",
            "s",
            "Mean. A worker that stands out has a slower or a shared device.",
            (
                Query(
                    f"sum by (replica) ({rate('zimage_step_seconds_sum')}) / "
                    f"sum by (replica) ({rate('zimage_step_seconds_count')})",
                    "{{replica}}",
                ),
            ),
        ),
        Panel(
            "Pixels a second",
            "short",
            "What all workers together hand over: the measure of work that does not depend on picture sizes.",
            (Query(f"sum({rate('zimage_pixels_total')})", "pixels"),),
        ),
        Panel(
            "Refused and cancelled",
            "reqps",
            "queue_full is refused with 429, rate_limit_exceeded too where one caller had its part; "
            "cancelled are callers who did not wait.",
            (
                Query(
                    "sum by (outcome) (" + rate("zimage_requests_total", REFUSED_OR_LEFT) + ")",
                    "{{outcome}}",
                ),
            ),
        ),
    ),
)

DASHBOARDS = (SERVICE, MEMORY, GUARD, CAPACITY)
