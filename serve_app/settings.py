"""Every setting of the server, in one place; the only module that reads the environment.

A value comes from the caller (command line, `serve run key=value`, `args` of a Serve config file),
else from the environment (`ZIMAGE_PORT=7861`), else from the YAML file that `ZIMAGE_CONFIG` names.
"""

from __future__ import annotations

import base64
import difflib
import importlib.util
import ipaddress
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from platformdirs import user_data_path
from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings import YamlConfigSettingsSource as YamlSource

from serve_app.model_list import ListedModel, read_models
from serve_app.results import check_place
from serve_app.signing import INSTALL, can_sign
from serve_app.watermark import check_text
from zimage_engine.errors import InvalidRequest
from zimage_engine.loading.lora_weight import LoraWeight, parse_lora
from zimage_engine.memory.residency import MemoryWishes, parse_memory
from zimage_engine.types import EMBEDDING_CACHE_BYTES, Enhancer

ENVIRONMENT_PREFIX = "ZIMAGE_"
CONFIG_FILE_VARIABLE = "ZIMAGE_CONFIG"
#: Names the file with the secret of the HAProxy that `launch` puts in front; for our own processes alone.
PROXY_SECRET_VARIABLE = "ZIMAGE_PROXY_SECRET_FILE"
#: PyTorch's own, the present name and the one before.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


class SettingsError(ValueError):
    """A setting cannot be used; the message says which, and what to do."""


class Settings(BaseSettings):
    """What a person who runs the server can choose."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        # Serve shows errors as they stand, and the arguments may hold a key.
        hide_input_in_errors=True,
    )

    model: str | None = Field(
        default=None, description="Folder or hub id of the model to load; empty: the embedded demo model."
    )
    # NoDecode: in the environment it may be NAME=PATH with commas between, and no JSON.
    models: Annotated[tuple[ListedModel, ...], NoDecode] = Field(
        default=(),
        description="More models that requests may name: names with the folder, file or hub id of each, or "
        "with path, aliases, family, base and dtype; as text NAME=PATH with commas, or JSON. They are loaded "
        "when they are asked for.",
    )
    max_loaded_models: int | None = Field(
        default=None,
        ge=1,
        description="Models that a worker has in memory at a time; the least recently used goes first; "
        "empty: as many as fit.",
    )
    family: str | None = Field(
        default=None,
        description="Kind of the model, such as sdxl, where its files do not tell; empty: recognised.",
    )
    base: str | None = Field(
        default=None,
        description="Folder or hub id of a whole model of the same kind, for what a single file lacks.",
    )
    text_encoder: str | None = Field(
        default=None, description="Folder or file with the text encoder, where the model has none."
    )
    vae: str | None = Field(
        default=None, description="Folder or file with the VAE, where the model has none."
    )
    # NoDecode: in the environment it is PATH=WEIGHT as elsewhere, and no JSON.
    loras: Annotated[tuple[LoraWeight, ...], NoDecode] = Field(
        default=(),
        description="LoRA files as PATH or PATH=WEIGHT (1 is as trained): a list, or text with commas.",
    )
    lora_folder: Path | None = Field(
        default=None,
        description="Folder whose .safetensors files requests may name as LoRAs; it is looked at anew for "
        "each request. Empty: requests may name those of loras alone.",
    )
    dtype: Literal["auto", "bfloat16", "float32", "float16"] | None = Field(
        default=None,
        description="bfloat16, float32 or float16, where the model bears it; auto: bfloat16 or float32, "
        "whichever this processor was measured to be faster in; empty: the family's own.",
    )
    offload: Literal["auto", "none", "model", "stream", "sequential", "disk"] = Field(
        default="auto",
        description="How weights that do not fit on the card are brought there; auto: the fastest that fits.",
    )
    vram: int | None = Field(
        default=None,
        ge=1,
        description="Memory of the card that may be used, such as 12GiB, 8G or bytes; empty: what is free.",
    )
    float8: bool = Field(
        default=False,
        description="Keep the denoiser's matrices in float8: half the memory, a little coarser.",
    )
    quantize: Literal["int8", "fp8", "int8-dynamic", "fp8-dynamic"] | None = Field(
        default=None,
        description="Quantise the denoiser's matrices by torchao, int8 or fp8: half the memory, a little "
        "other pictures; int8-dynamic and fp8-dynamic multiply in the small type too; empty: not at all.",
    )
    exact: bool = Field(
        default=False,
        description="Draw by the plain path, bit for bit as stock diffusers does, whatever `zimage-turbo "
        "tune` found to be quicker.",
    )
    embedding_cache: int = Field(
        default=EMBEDDING_CACHE_BYTES,
        ge=0,
        description="Memory of the host in which a worker keeps encoded prompts, such as 64MiB or bytes; "
        "0: none, each is encoded again.",
    )
    device: str | None = Field(
        default=None, description="cuda, cuda:1, mps or cpu; empty: the best that the worker finds."
    )
    host: str = Field(
        default="127.0.0.1", description="Address to listen on; other than loopback needs a key."
    )
    port: int = Field(default=7860, ge=1, le=65535, description="Port of the page and of the API.")
    num_replicas: int = Field(
        default=1, ge=1, le=1024, description="Image workers; each holds the model on a GPU of its own."
    )
    max_replicas: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Let the image workers grow with the queue, up to so many, in place of num_replicas; "
        "empty: always num_replicas.",
    )
    min_replicas: int = Field(
        default=1, ge=1, le=1024, description="With max_replicas: image workers that stay without requests."
    )
    upscale_seconds: float = Field(
        default=10,
        ge=0,
        le=3600,
        description="With max_replicas: how long more requests than workers must be there before more start.",
    )
    downscale_seconds: float = Field(
        default=600,
        ge=0,
        le=86400,
        description="With max_replicas: how long workers must be idle before they end; loading a model again "
        "costs more than keeping it for a while.",
    )
    num_ingresses: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Processes that answer HTTP; each has a queue of its own, and the workers are shared.",
    )
    num_gpus: float | None = Field(
        default=None,
        ge=0,
        description="GPUs that Ray reserves for a worker; empty: 1 where there is one, else 0.",
    )
    worker_cpus: float = Field(
        default=1, ge=0, description="CPUs that Ray reserves for a worker; it does not limit the threads."
    )
    cpu_threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Threads that a worker computes with; empty: every core that the process may use, shared "
        "out among num_replicas.",
    )
    max_batch_size: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Pictures of one size, of one request or of several, that share each forward pass at "
        "most; 1 draws one after another.",
    )
    default_steps: int | None = Field(
        default=None,
        ge=1,
        le=100,
        description="Steps where the caller names none; empty: the model's own.",
    )
    default_guidance_scale: float | None = Field(
        default=None,
        ge=0,
        le=20,
        allow_inf_nan=False,
        description="Guidance where the caller names none, 1 is off; empty: the model's own.",
    )
    default_enhance: bool = Field(
        default=True, description="Whether prompts are enhanced where the caller does not say."
    )
    enhancer: Enhancer = Field(
        default="rules",
        description="Who enhances prompts where the caller does not say: rules; model, the text encoder that "
        "is loaded anyway; or endpoint, a language model elsewhere. What a language model wrote is checked, "
        "and the rules are used where it cannot be.",
    )
    # NoDecode: in the environment they are words with commas between, and no JSON.
    offered_enhancers: Annotated[tuple[Enhancer, ...], NoDecode] = Field(
        default=(),
        description="What requests may name beside rules and the default enhancer, such as model,endpoint.",
    )
    enhancer_url: str | None = Field(
        default=None,
        description="Base address of the OpenAI-compatible API that the enhancer endpoint asks, such as "
        "http://127.0.0.1:8000/v1.",
    )
    enhancer_model: str | None = Field(default=None, description="The model there that is asked.")
    enhancer_api_key: SecretStr | None = Field(default=None, description="Key for it; empty: none.")
    enhancer_seconds: float = Field(
        default=20,
        gt=0,
        le=600,
        allow_inf_nan=False,
        description="Seconds that a language model may take for a prompt before the rules are used.",
    )
    enhancer_tokens: int = Field(
        default=256, ge=16, le=4096, description="Tokens that a language model may write for a prompt."
    )
    max_queued_requests: int = Field(
        default=64,
        ge=1,
        description="Requests that may wait in the queue of an ingress; more are answered with 429.",
    )
    max_queue_seconds: float | None = Field(
        default=600,
        gt=0,
        allow_inf_nan=False,
        description="Longest wait in the queue, as estimated from the last pictures; who would wait longer "
        "is answered with 429. OpenAI's client gives up after 600.",
    )
    request_seconds: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that one request may take in all, the wait in the queue included, before it is "
        "given up with status 504; unset: as long as it takes.",
    )
    pictures_at_once: int = Field(
        default=0,
        ge=0,
        description="Pictures that one caller (a key's name, else an address) may have waiting or being "
        "drawn at an ingress; more are answered with 429; 0: no limit.",
    )
    requests_a_minute: int = Field(
        default=0,
        ge=0,
        description="Requests for pictures that an ingress takes from one caller a minute; more are answered "
        "with 429; 0: no limit.",
    )
    drawing_seconds: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that drawing one request may take before it is given up with status 504; "
        "unset: as long as it takes.",
    )
    worker_restart_seconds: float = Field(
        default=60,
        ge=0,
        le=3600,
        description="How long a request waits for a worker: a new one when its own has died, or the first.",
    )
    drain_seconds: float = Field(
        default=30,
        ge=0,
        le=3600,
        description="How long `launch`, when it is told to end, lets the requests that it has accepted "
        "finish.",
    )
    max_body_bytes: int = Field(
        default=1024 * 1024, ge=1024, description="Largest request body; more is answered with 413."
    )
    max_image_bytes: int = Field(
        default=20 * 1024 * 1024,
        ge=1024,
        le=256 * 1024 * 1024,
        description="Largest body of a request to edit a picture, with the files in it; more is answered "
        "with 413.",
    )
    body_seconds: float = Field(
        default=30,
        gt=0,
        le=3600,
        description="How long a request's body may take to arrive; a slower one is answered with 408.",
    )
    api_key: SecretStr | None = Field(
        default=None, description="Key that every request must carry, but for /healthz and /readyz."
    )
    api_keys_file: Path | None = Field(
        default=None,
        description="File with the hashes of named keys, each with scopes, as `zimage-turbo keys` writes it; "
        "the api_key, where there is one too, may do everything.",
    )
    metrics_without_key: bool = Field(
        default=False, description="Answer /metrics without a key too, where a key is needed otherwise."
    )
    # NoDecode: in the environment they are names with commas between, and no JSON.
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Names under which people reach the server, such as images.example.org, where a proxy "
        "stands before it; empty: with keys any, without them this machine's own.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Web pages elsewhere that may call the API from a browser, such as "
        "https://app.example.org; empty: none.",
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Proxies before the server whose X-Forwarded-For, -Proto and -Host are believed: "
        "addresses or networks, such as 10.1.0.0/16; empty: none but the HAProxy of `launch`.",
    )
    audit_log: bool | None = Field(
        default=None,
        description="A log line for each request that changes something or is refused: who, what, outcome, "
        "never a prompt; empty: where callers carry keys.",
    )
    log_format: Literal["plain", "json"] = Field(
        default="plain",
        description="How the server's log lines look: plain for a person, json for a log collector; with "
        "json each request is logged.",
    )
    # Not OTEL_EXPORTER_OTLP_ENDPOINT: platforms put that into every container, and traces are off by default.
    otlp_endpoint: str | None = Field(
        default=None,
        description="Collector that gets an OpenTelemetry trace of each request by OTLP over HTTP, such as "
        "http://127.0.0.1:4318; empty: no traces.",
    )
    data_dir: Path = Field(
        default_factory=lambda: user_data_path("zimage-turbo"),
        description="Folder for what outlives a restart, such as pictures that were asked for as url; empty: "
        "zimage-turbo in the user's data folder.",
    )
    results_url: str | None = Field(
        default=None,
        description="Where pictures that were asked for as url are kept, such as s3://bucket/prefix (extra "
        "s3), for servers on several machines; empty: a folder below data_dir.",
    )
    result_seconds: float = Field(
        default=24 * 3600,
        ge=1,
        le=10 * 365 * 24 * 3600,
        allow_inf_nan=False,
        description="How long a kept picture can be fetched.",
    )
    result_bytes: int = Field(
        default=10 * 2**30,
        ge=64 * 2**20,
        description="How much is kept in all, such as 10GiB or bytes; beyond it the oldest are removed.",
    )
    jobs_url: SecretStr | None = Field(
        default=None,
        description="PostgreSQL database that jobs are kept in, such as postgresql://user:password@host/db, "
        "for servers on several machines; empty: a file below data_dir.",
    )
    job_seconds: float = Field(
        default=7 * 24 * 3600,
        ge=24 * 3600,
        le=10 * 365 * 24 * 3600,
        allow_inf_nan=False,
        description="How long a job that has ended is remembered, and one that nobody draws waits.",
    )
    max_jobs: int = Field(
        default=10_000, ge=1, description="Jobs that may wait or be drawn; more are answered with 429."
    )
    max_jobs_of_caller: int = Field(
        default=1_000, ge=1, description="The same of one key's; without keys of all callers."
    )
    webhook_url: str | None = Field(
        default=None,
        description="Address that is told of the end of each job that names none itself; empty: none.",
    )
    webhook_secret: SecretStr | None = Field(
        default=None, description="Secret that these are signed with: whsec_ and 24 to 64 bytes in base64."
    )
    webhook_private_addresses: bool = Field(
        default=False,
        description="Let callers name webhooks on this machine and in private networks; webhook_url may lead "
        "there in any case.",
    )
    history: bool = Field(
        default=True,
        description="Keep what is drawn on the page, for whoever drew it: files and an index below data_dir, "
        "or where jobs_url and results_url lead. Pictures of the API are not kept.",
    )
    history_pictures: int = Field(
        default=5_000,
        ge=1,
        description="Pictures of one key that the history keeps, without keys of all callers; beyond it the "
        "oldest are removed.",
    )
    history_bytes: int = Field(
        default=10 * 2**30,
        ge=64 * 2**20,
        description="How much the history keeps in all, such as 10GiB or bytes; beyond it the oldest are "
        "removed.",
    )
    history_seconds: float = Field(
        default=365 * 24 * 3600,
        ge=1,
        le=100 * 365 * 24 * 3600,
        allow_inf_nan=False,
        description="How long the history keeps a picture.",
    )
    c2pa_certificate: Path | None = Field(
        default=None,
        description="File with the certificate that pictures are signed with as C2PA says, in PEM, and "
        "behind it those that vouch for it (extra c2pa); with c2pa_key. Empty: pictures are not signed.",
    )
    c2pa_key: Path | None = Field(
        default=None, description="File with its private key in PEM, without a password."
    )
    c2pa_algorithm: Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"] | None = Field(
        default=None, description="How it signs; empty: as goes with the key, es256 for one of P-256."
    )
    c2pa_timestamp_url: str | None = Field(
        default=None,
        description="Authority (RFC 3161) that is asked for the time of each signature; empty: none.",
    )
    watermark: str | None = Field(
        default=None,
        description="Text of at most 20 bytes that is put into the pixels of every picture where no eye sees "
        "it, such as a name; empty: none.",
    )
    ui: bool = Field(default=True, description="Serve the page at /.")
    haproxy: bool | None = Field(
        default=None,
        description="Let `launch` put HAProxy in front, not Serve's own proxy; empty: where it is there.",
    )

    @field_validator(
        "model",
        "family",
        "base",
        "text_encoder",
        "vae",
        "dtype",
        "quantize",
        "device",
        "api_key",
        "api_keys_file",
        "results_url",
        "jobs_url",
        "webhook_url",
        "webhook_secret",
        "c2pa_certificate",
        "c2pa_key",
        "c2pa_algorithm",
        "c2pa_timestamp_url",
        "watermark",
        "enhancer_url",
        "enhancer_model",
        "enhancer_api_key",
        mode="before",
    )
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        """An empty string, as `ZIMAGE_MODEL=` gives it, is no value."""
        return None if isinstance(value, str) and not value.strip() else value

    @field_validator("allowed_hosts", "cors_origins", "trusted_proxies", "offered_enhancers", mode="before")
    @classmethod
    def _read_names(cls, value: Any) -> Any:
        """A list, or text with commas between."""
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _hosts_are_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            if not _is_web_address(f"http://{each}") or "/" in each or "*" in each:
                raise ValueError(
                    "setting allowed_hosts must be names with or without a port, such as images.example.org, "
                    f"got {each!r}"
                )
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins_are_addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            if not _is_web_address(each) or each.count("/") != 2 or "*" in each:
                raise ValueError(
                    "setting cors_origins must be origins without a path, such as https://app.example.org, "
                    f"got {each!r}"
                )
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _proxies_are_addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            if not _is_some_network(each):
                raise ValueError(
                    "setting trusted_proxies must be addresses or networks, such as 10.1.2.3 or 10.1.0.0/16, "
                    f"and never all there are, got {each!r}"
                )
        return value

    @field_validator("otlp_endpoint")
    @classmethod
    def _read_collector(cls, value: str | None) -> str | None:
        """Where the collector is, without the path of traces, which is always the same; empty is none."""
        if value is None or not value.strip():
            return None
        if not _is_web_address(value):
            raise ValueError(
                "setting otlp_endpoint must be a collector's address such as http://127.0.0.1:4318, "
                f"got {value!r}"
            )
        if not _is_installed("opentelemetry.exporter.otlp.proto.http"):
            raise ValueError(
                "setting otlp_endpoint needs a package that is not installed here: "
                "pip install 'zimage-turbo[tracing]', or leave the setting out"
            )
        return value.rstrip("/").removesuffix("/v1/traces")

    @field_validator("lora_folder", mode="before")
    @classmethod
    def _empty_is_no_folder(cls, value: Any) -> Any:
        """An empty string, as `ZIMAGE_LORA_FOLDER=` gives it, is no value."""
        is_empty = value is None or (isinstance(value, str) and not value.strip())
        return None if is_empty else Path(value).expanduser()

    @field_validator("data_dir", mode="before")
    @classmethod
    def _empty_is_the_users(cls, value: Any) -> Any:
        """An empty string, as `ZIMAGE_DATA_DIR=` gives it, is no value."""
        is_empty = isinstance(value, str) and not value.strip()
        return user_data_path("zimage-turbo") if is_empty else Path(value).expanduser()

    @field_validator("results_url")
    @classmethod
    def _results_can_be_kept(cls, value: str | None) -> str | None:
        if value is not None:
            check_place(value)
        return value

    @field_validator("jobs_url")
    @classmethod
    def _jobs_are_in_postgresql(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        try:
            parts = urlsplit(value.get_secret_value())
            is_database = parts.scheme in ("postgres", "postgresql") and parts.port != 0
        except ValueError:
            is_database = False
        if not is_database:
            # What it is instead is not told: it may hold a password.
            raise ValueError(
                "setting jobs_url must be a database such as postgresql://user:password@host/name; empty "
                "keeps jobs in a file below data_dir"
            )
        if not _is_installed("psycopg"):
            raise ValueError(
                "setting jobs_url needs a package that is not installed here: "
                "pip install 'zimage-turbo[postgres]'"
            )
        return value

    @field_validator("webhook_url")
    @classmethod
    def _webhooks_go_somewhere(cls, value: str | None) -> str | None:
        if value is not None and ("@" in value or not _is_web_address(value.partition("?")[0])):
            raise ValueError("setting webhook_url must be an address such as https://example.org/done")
        return value

    @field_validator("enhancer_url")
    @classmethod
    def _endpoint_is_somewhere(cls, value: str | None) -> str | None:
        if value is not None and ("@" in value or not _is_web_address(value)):
            raise ValueError(
                "setting enhancer_url must be an address such as http://127.0.0.1:8000/v1; a key belongs "
                "into enhancer_api_key"
            )
        return value

    @field_validator("webhook_secret")
    @classmethod
    def _webhooks_can_be_signed(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not is_webhook_secret(value.get_secret_value()):
            raise ValueError("setting webhook_secret must be whsec_ and then 24 to 64 bytes in base64")
        return value

    @field_validator("c2pa_timestamp_url")
    @classmethod
    def _times_are_told_somewhere(cls, value: str | None) -> str | None:
        if value is not None and not _is_web_address(value):
            raise ValueError(
                "setting c2pa_timestamp_url must be an authority's address such as http://time.example.org, "
                f"got {value!r}"
            )
        return value

    @field_validator("watermark")
    @classmethod
    def _watermark_fits(cls, value: str | None) -> str | None:
        return None if value is None else check_text(value)

    @field_validator("result_bytes", "history_bytes", mode="before")
    @classmethod
    def _read_kept_bytes(cls, value: Any, info: ValidationInfo) -> Any:
        """Bytes, or text with a unit."""
        if not isinstance(value, str):
            return value
        try:
            return parse_memory(value, f"setting {info.field_name}")
        except InvalidRequest as wrong:
            raise ValueError(str(wrong)) from wrong

    @field_validator("vram", mode="before")
    @classmethod
    def _read_vram(cls, value: Any) -> Any:
        """Bytes, or text with a unit."""
        if not isinstance(value, str) or not value.strip():
            return value or None
        try:
            return parse_memory(value, "vram")
        except InvalidRequest as wrong:
            raise ValueError(str(wrong)) from wrong

    @field_validator("embedding_cache", mode="before")
    @classmethod
    def _read_embedding_cache(cls, value: Any) -> Any:
        """Bytes, or text with a unit; empty text, as `ZIMAGE_EMBEDDING_CACHE=` gives it, is no value."""
        if not isinstance(value, str) or value.strip() == "0":
            return value
        if not value.strip():
            return EMBEDDING_CACHE_BYTES
        try:
            return parse_memory(value, "setting embedding_cache")
        except InvalidRequest as wrong:
            raise ValueError(f"{wrong}; 0 keeps no prompts") from wrong

    @property
    def results_place(self) -> Path | str:
        """Where finished pictures are kept: a folder, or as text a URL."""
        return self.results_url or self.data_dir / "results"

    @property
    def memory(self) -> MemoryWishes:
        """The wishes about the device's memory in the engine's words."""
        return MemoryWishes(
            None if self.offload == "auto" else self.offload, self.vram, self.float8, self.quantize
        )

    @field_validator("models", mode="before")
    @classmethod
    def _read_models(cls, value: Any) -> Any:
        """A mapping, or text: a JSON object where it starts with a brace, else NAME=PATH with commas."""
        return read_models(value)

    @field_validator("max_loaded_models", mode="before")
    @classmethod
    def _empty_is_what_fits(cls, value: Any) -> Any:
        return None if isinstance(value, str) and not value.strip() else value

    @field_validator("loras", mode="before")
    @classmethod
    def _read_loras(cls, value: Any) -> Any:
        """A list of `PATH=WEIGHT`, or text: a JSON list where it starts with a bracket, else with commas."""
        if isinstance(value, str):
            value = _listed(value)
        if not isinstance(value, (list, tuple)) or not all(
            isinstance(each, (str, LoraWeight)) for each in value
        ):
            raise ValueError(
                "setting loras must be a list of PATH or PATH=WEIGHT, such as style.safetensors=0.8, "
                f"got {value!r}"
            )
        try:
            return tuple(parse_lora(each) if isinstance(each, str) else each for each in value)
        except InvalidRequest as wrong:
            raise ValueError(str(wrong)) from wrong

    @property
    def has_endpoint(self) -> bool:
        """Whether there is an endpoint that the enhancer can ask."""
        return self.enhancer_url is not None and self.enhancer_model is not None

    @model_validator(mode="after")
    def _endpoint_is_there(self) -> Settings:
        if "endpoint" in (self.enhancer, *self.offered_enhancers) and not self.has_endpoint:
            raise ValueError(
                "the enhancer endpoint needs to know whom to ask: set enhancer_url and enhancer_model, or "
                "leave endpoint out of enhancer and offered_enhancers"
            )
        return self

    @model_validator(mode="after")
    def _memory_is_one_wish(self) -> Settings:
        try:
            _ = self.memory
        except InvalidRequest as wrong:
            raise ValueError(str(wrong)) from wrong
        return self

    @model_validator(mode="before")
    @classmethod
    def _names_are_known(cls, given: Any) -> Any:
        """Serve shows what is raised here as it stands, so it is a sentence."""
        unknown = [name for name in given if name not in cls.model_fields] if isinstance(given, dict) else []
        if unknown:
            raise ValueError("; ".join(no_such("setting", name, cls.model_fields) for name in unknown))
        return given

    @model_validator(mode="after")
    def _pictures_can_be_signed(self) -> Settings:
        """What can be said without reading the files, which `Finisher.of` does where pictures are drawn."""
        if (self.c2pa_certificate is None) != (self.c2pa_key is None):
            missing = "c2pa_key" if self.c2pa_key is None else "c2pa_certificate"
            raise ValueError(
                f"settings c2pa_certificate and c2pa_key go together, and {missing} is missing: name both, "
                "or leave both out, and pictures are not signed"
            )
        if self.c2pa_key is None and (self.c2pa_timestamp_url or self.c2pa_algorithm):
            raise ValueError(
                "settings c2pa_timestamp_url and c2pa_algorithm do nothing without c2pa_certificate and "
                "c2pa_key: name those, or leave all of them out"
            )
        if self.c2pa_key is not None and not can_sign():
            raise ValueError(
                "setting c2pa_key needs a package that is not installed here: "
                f"{INSTALL}, or leave c2pa_certificate and c2pa_key out"
            )
        return self

    @model_validator(mode="after")
    def _workers_grow_upwards(self) -> Settings:
        if self.max_replicas is not None and self.min_replicas > self.max_replicas:
            raise ValueError(
                f"setting max_replicas must be at least min_replicas, {self.min_replicas}, "
                f"got {self.max_replicas}"
            )
        return self

    @model_validator(mode="after")
    def _open_address_needs_a_key(self) -> Settings:
        if not is_loopback(self.host) and self.api_key is None and self.api_keys_file is None:
            raise ValueError(
                f"host {self.host} can be reached by other machines, and there is no api_key: set "
                "ZIMAGE_API_KEY to a secret of your own, or ZIMAGE_API_KEYS_FILE to a file that "
                "`zimage-turbo keys add` has made, or listen on 127.0.0.1"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        refuse_unknown_variables(cls)
        sources: tuple[PydanticBaseSettingsSource, ...] = (init_settings, env_settings)
        if named := os.environ.get(CONFIG_FILE_VARIABLE):
            file = Path(named)
            if not file.is_file():
                raise SettingsError(
                    f"{CONFIG_FILE_VARIABLE} names {named}, and there is no such file; "
                    "correct the path or unset the variable"
                )
            sources += (YamlSource(settings_cls, yaml_file=file, yaml_file_encoding="utf-8"),)
        return sources

    @property
    def fewest_workers(self) -> int:
        """Workers that are there when nothing is asked."""
        return self.num_replicas if self.max_replicas is None else self.min_replicas

    @property
    def most_workers(self) -> int:
        """Workers that may share a machine when much is asked."""
        return self.max_replicas or self.num_replicas

    @property
    def url(self) -> str:
        """Where a person on this machine opens the page."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def _is_web_address(text: str) -> bool:
    """Whether it names a server, with or without a port and a path, and nothing behind them."""
    try:
        parts = urlsplit(text)
        is_port = parts.port != 0
    except ValueError:
        return False
    named = parts.scheme in ("http", "https") and bool(parts.hostname) and is_port
    return named and not parts.query and not parts.fragment


def _is_some_network(text: str) -> bool:
    """Whether it is an address or a network, and not the network of all addresses."""
    try:
        return ipaddress.ip_network(text).prefixlen > 0
    except ValueError:
        return False


def is_webhook_secret(text: str) -> bool:
    """Whether it is a secret in the form of Standard Webhooks: a prefix, and 24 to 64 bytes in base64."""
    try:
        key = base64.b64decode(text.removeprefix("whsec_"), validate=True)
    except ValueError:  # also for what is no ASCII
        return False
    return text.startswith("whsec_") and 24 <= len(key) <= 64


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package that it would be in
        return False


def _listed(text: str) -> Any:
    """The parts of a text with commas between; a JSON list, for paths that hold commas, as it stands."""
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except ValueError as wrong:
            raise ValueError(f"setting loras starts with a bracket but is no JSON list ({wrong})") from None
    return [part for part in text.split(",") if part.strip()]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def allocator_environment() -> dict[str, str]:
    """What a worker's environment says to PyTorch's allocator, before CUDA starts.

    Twenty sizes in a row would otherwise wear the device's memory out. What a person has set stays.
    """
    chosen = {name: value for name in ALLOCATOR_VARIABLES if (value := os.environ.get(name))}
    return chosen or {ALLOCATOR_VARIABLES[0]: "expandable_segments:True"}


def proxy_secret() -> bytes | None:
    """What the HAProxy of `launch` shows to our ingresses; None where there is none."""
    try:
        return Path(os.environ[PROXY_SECRET_VARIABLE]).read_bytes() or None
    except (KeyError, OSError):
        return None


def refuse_unknown_variables(settings: type[BaseSettings]) -> None:
    """Raise SettingsError for a `ZIMAGE_...` variable that no setting reads: a slip would go unnoticed."""
    known = {ENVIRONMENT_PREFIX + name.upper() for name in settings.model_fields} | {CONFIG_FILE_VARIABLE}
    for variable in os.environ:
        if variable.upper() == PROXY_SECRET_VARIABLE:
            continue
        if variable.upper().startswith(ENVIRONMENT_PREFIX) and variable.upper() not in known:
            near = difflib.get_close_matches(variable.upper(), known, n=1)
            meant = f"did you mean {near[0]}?" if near else "known are " + ", ".join(sorted(known))
            raise SettingsError(f"the environment variable {variable} is no setting; {meant}")


def load_settings(**chosen: Any) -> Settings:
    """The settings with what the caller chose on top; None is not a choice.

    Raises SettingsError with one sentence a problem.
    """
    try:
        return Settings(**{name: value for name, value in chosen.items() if value is not None})
    except ValidationError as error:
        raise SettingsError("; ".join(_sentence(problem) for problem in error.errors())) from None


def no_such(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that nothing reads, with the nearest that is known."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    meant = f"did you mean {near[0]}?" if near else "known are " + ", ".join(names)
    return f"there is no {kind} {name}; {meant}"


def _sentence(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    complaint = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"setting {name}: {complaint}, got {problem['input']!r}; {Settings.model_fields[name].description}"
