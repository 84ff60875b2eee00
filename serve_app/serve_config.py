"""A Serve configuration read before it is deployed: names that nothing reads, and an address open to all.

Serve passes over keys that it does not know, and listens on every interface where `http_options.host` is
missing. `problems_in` sees the whole file; `check_deployed` what the cluster still knows while it builds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ValidationError

from serve_app.live_settings import READ_BY, DeploymentName, read_user_config
from serve_app.settings import (
    ENVIRONMENT_PREFIX,
    Settings,
    SettingsError,
    is_loopback,
    load_settings,
    no_such,
)

#: The ways to write it.
IMPORT_PATHS = ("serve_app:build", "serve_app.app:build", "serve_app:app")
#: Where the key of every caller, or the file of keys, comes from.
KEY_SETTINGS = ("api_key", "api_keys_file")
KEY_VARIABLES = tuple(ENVIRONMENT_PREFIX + name.upper() for name in KEY_SETTINGS)
#: A patch of Kustomize names the part of the manifest that it replaces.
PATCHED_PATH = "/spec/serveConfigV2"
#: How long the controller may take to tell its configuration.
CONTROLLER_SECONDS = 10.0


class ServeConfigUnreadable(ValueError):
    """The file holds no Serve configuration; the message says what it holds."""


@dataclass(frozen=True)
class FoundConfig:
    """One Serve configuration of a file, and whether what it will run in is known to have a key."""

    config: Any
    has_key: bool


def problems_in(text: str, has_key: bool = False) -> tuple[str, ...]:
    """What is wrong in the Serve configurations of `text`, a sentence with its place each; () where nothing.

    `text` is a Serve config file, a RayService manifest, or a patch of one, also several with --- between.
    `has_key`: the processes that it is deployed to have a key in their environment; a manifest shows it.
    Raises ServeConfigUnreadable.
    """
    try:
        documents = [each for each in yaml.safe_load_all(text) if each is not None]
        found = [config for document in documents for config in _configs_of(document, has_key)]
    except yaml.YAMLError as error:
        raise ServeConfigUnreadable(f"it is no YAML: {' '.join(str(error).split())}") from None
    if not found:
        raise ServeConfigUnreadable(
            "there is no Serve configuration in it: no applications, and no RayService with a serveConfigV2"
        )
    return tuple(problem for each in found for problem in _problems(each))


def check_deployed(settings: Settings) -> None:
    """Raise SettingsError where the Serve that runs here must not get this application.

    That is where its proxies listen for other machines and there is no key, and where the configuration that
    is being deployed gives a deployment of ours a `user_config` that cannot be used. What Serve has dropped
    already, every key that it does not know, cannot be seen here: `problems_in` reads the file itself. Nor is
    this called when a `user_config` alone changes, which builds nothing.
    """
    import ray
    from ray.serve.context import _get_global_client

    if not ray.is_initialized():
        return
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    refuse_open_address(client.http_config.host, settings)
    deployed = ray.get(client._controller.get_app_configs.remote(), timeout=CONTROLLER_SECONDS)
    for application in deployed.values():
        if application.import_path not in IMPORT_PATHS:
            continue
        for deployment in application.deployments:
            if deployment.name in READ_BY and isinstance(deployment.user_config, Mapping):
                read_user_config(deployment.user_config, settings, deployment.name)


def refuse_open_address(host: str | None, settings: Settings) -> None:
    """Raise SettingsError where `host`, which Serve listens on, is open to others and there is no key."""
    has_key = any(getattr(settings, name) is not None for name in KEY_SETTINGS)
    if host and not is_loopback(host) and not has_key:
        raise SettingsError(_open_address(f"Serve listens on {host}"))


def _open_address(listens: str) -> str:
    return (
        f"{listens}, where other machines reach it, and there is no key: set {' or '.join(KEY_VARIABLES)} in "
        "the environment of every Ray node, or http_options.host to 127.0.0.1"
    )


# --- what a file holds -----------------------------------------------------------------------------------


def _configs_of(document: Any, has_key: bool) -> Iterator[FoundConfig]:
    if isinstance(document, list):
        for change in document:
            if isinstance(change, Mapping) and change.get("path") == PATCHED_PATH:
                yield FoundConfig(_inner(change.get("value")), has_key)
    elif isinstance(document, Mapping) and document.get("kind") == "RayService":
        spec = document.get("spec") or {}
        if "serveConfigV2" in spec:
            yield FoundConfig(_inner(spec["serveConfigV2"]), has_key or _pods_have_a_key(spec))
    elif isinstance(document, Mapping) and ("applications" in document or "apiVersion" not in document):
        yield FoundConfig(document, has_key)


def _inner(text: Any) -> Any:
    if not isinstance(text, str):
        raise ServeConfigUnreadable(
            f"serveConfigV2 must be text, got {type(text).__name__}; write `|` before it"
        )
    return yaml.safe_load(text)


def _pods_have_a_key(spec: Mapping[str, Any]) -> bool:
    """Whether the pods of every group are given one: the application is built on any of them."""
    cluster = spec.get("rayClusterConfig") or {}
    groups = [cluster.get("headGroupSpec") or {}, *(cluster.get("workerGroupSpecs") or ())]
    return all(_pod_has_a_key(group) for group in groups)


def _pod_has_a_key(group: Mapping[str, Any]) -> bool:
    containers = ((group.get("template") or {}).get("spec") or {}).get("containers") or ()
    return any(
        variable.get("name") in KEY_VARIABLES and (variable.get("value") or variable.get("valueFrom"))
        for container in containers
        for variable in container.get("env") or ()
    )


# --- what is wrong with one ------------------------------------------------------------------------------


def _problems(found: FoundConfig) -> Iterator[str]:
    from ray.serve.schema import ServeDeploySchema

    config = found.config
    if not isinstance(config, Mapping):
        yield f"the configuration must be a mapping with applications, got {type(config).__name__}"
        return
    misshapen = list(_unknown_keys(ServeDeploySchema, config, ""))
    yield from misshapen
    applications = config.get("applications")
    listed = list(enumerate(applications)) if isinstance(applications, list) else []
    named = {index: application for index, application in listed if isinstance(application, Mapping)}
    for index, application in named.items():
        if application.get("import_path") in IMPORT_PATHS:
            yield from _problems_of_ours(application, f"applications[{index}]")
    yield from _problems_of_address(config, found.has_key or any(map(_brings_a_key, named.values())))
    if not misshapen:  # which Serve's own checks do not expect
        try:
            ServeDeploySchema.model_validate(dict(config))
        except ValidationError as error:
            yield from (_sentence(problem) for problem in error.errors(include_url=False))


def _unknown_keys(schema: type[BaseModel], given: Mapping[Any, Any], place: str) -> Iterator[str]:
    for name, value in given.items():
        path = f"{place}.{name}" if place else str(name)
        field = schema.model_fields.get(name) if isinstance(name, str) else None
        if field is None:
            yield f"{path}: {no_such('key', str(name), schema.model_fields)}"
            continue
        inner = next(_models_in(field.annotation), None)
        if inner is None or value is None:
            continue
        if get_origin(field.annotation) is not list:
            yield from _unknown_keys_of_one(inner, value, path)
        elif not isinstance(value, list):
            yield f"{path}: must be a list, got {type(value).__name__}"
        else:
            for index, row in enumerate(value):
                yield from _unknown_keys_of_one(inner, row, f"{path}[{index}]")


def _unknown_keys_of_one(schema: type[BaseModel], given: Any, path: str) -> Iterator[str]:
    if isinstance(given, Mapping):
        yield from _unknown_keys(schema, given, path)
    else:
        yield f"{path}: must be a mapping, got {type(given).__name__}"


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation allows, in lists and beside None too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _problems_of_ours(application: Mapping[str, Any], place: str) -> Iterator[str]:
    args = application.get("args") or {}
    settings: Settings | None = None
    if not isinstance(args, Mapping):
        yield f"{place}.args: must be a mapping of settings, got {type(args).__name__}"
    else:
        try:
            settings = load_settings(**{str(name): value for name, value in args.items()})
        except SettingsError as wrong:
            yield f"{place}.args: {wrong}"
    deployments = application.get("deployments") or []
    for index, deployment in enumerate(deployments if isinstance(deployments, list) else []):
        if not isinstance(deployment, Mapping):
            continue
        name = str(deployment.get("name"))
        named = next((each for each in READ_BY if each == name), None)
        if named is None:
            yield f"{place}.deployments[{index}].name: {no_such('deployment', name, READ_BY)}"
        elif deployment.get("user_config") is not None:
            yield from _problems_of_user_config(
                deployment["user_config"], settings, named, f"{place}.deployments[{index}].user_config"
            )


def _problems_of_user_config(
    user_config: Any, settings: Settings | None, deployment: DeploymentName, place: str
) -> Iterator[str]:
    try:
        # Where args are wrong, that is said once, and the bounds are the same.
        read_user_config(user_config, settings or Settings.model_construct(), deployment)
    except SettingsError as wrong:
        yield f"{place}: {wrong}"


def _problems_of_address(config: Mapping[str, Any], has_key: bool) -> Iterator[str]:
    options = config.get("http_options")
    host = options.get("host") if isinstance(options, Mapping) else None
    if host is None:
        yield (
            "http_options.host: is missing, and Serve would listen on 0.0.0.0, every interface; "
            "name it, 127.0.0.1 for this machine alone"
        )
    elif not is_loopback(str(host)) and not has_key:
        yield f"http_options.host: {_open_address(f'it is {host}')}"


def _brings_a_key(application: Mapping[str, Any]) -> bool:
    args, environment = application.get("args"), application.get("runtime_env")
    variables = environment.get("env_vars") if isinstance(environment, Mapping) else None
    return _names_any(args, KEY_SETTINGS) or _names_any(variables, KEY_VARIABLES)


def _names_any(given: Any, names: Iterable[str]) -> bool:
    return isinstance(given, Mapping) and any(given.get(name) for name in names)


def _sentence(problem: Any) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])
    place = "".join(parts).lstrip(".")
    complaint = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"{place}: {complaint}" if place else complaint
