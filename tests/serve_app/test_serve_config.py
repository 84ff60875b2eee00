"""`zimage-turbo check-config`: what a Serve configuration says that Serve would not tell."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from serve_app.cli import app
from serve_app.serve_config import ServeConfigUnreadable, problems_in, refuse_open_address
from serve_app.settings import SettingsError, load_settings
from tests.deploy.manifests import NO_KUSTOMIZER, OVERLAYS, built, kustomizer
from tests.running_server import ROOT

CONFIG: dict[str, Any] = {
    "http_options": {"host": "127.0.0.1", "port": 8000},
    "logging_config": {"log_level": "WARNING"},
    "applications": [
        {
            "name": "zimage-turbo",
            "route_prefix": "/",
            "import_path": "serve_app:build",
            "args": {"num_replicas": 1, "ui": False},
            "deployments": [
                {"name": "PromptEnhancer", "user_config": {"default_steps": 6}},
                {"name": "ImageWorker", "user_config": {"drawing_seconds": 60}},
            ],
        }
    ],
}
OURS = ("applications", 0)
INGRESS, WORKER = (*OURS, "deployments", 0), (*OURS, "deployments", 1)


def changed(place: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """The sound configuration with one value put in at a place; None takes it out."""
    config = copy.deepcopy(CONFIG)
    within: Any = config
    for step in place[:-1]:
        within = within[step]
    if value is None:
        del within[place[-1]]
    else:
        within[place[-1]] = value
    return config


def told(config: Any, has_key: bool = False) -> tuple[str, ...]:
    return problems_in(yaml.safe_dump(config), has_key)


def test_a_sound_configuration_passes() -> None:
    assert told(CONFIG) == ()


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (
            ("http_option",),
            {"host": "127.0.0.1"},
            "http_option: there is no key http_option; did you mean http_options?",
        ),
        (("http_options", "hots"), "x", "http_options.hots: there is no key hots; did you mean host?"),
        (
            (*OURS, "rout_prefix"),
            "/",
            "applications[0].rout_prefix: there is no key rout_prefix; did you mean route_prefix?",
        ),
        (
            (*WORKER, "num_replica"),
            2,
            "applications[0].deployments[1].num_replica: there is no key num_replica; did you",
        ),
        (
            (*WORKER, "autoscaling_config"),
            {"max_replica": 2},
            "deployments[1].autoscaling_config.max_replica: there is",
        ),
        (
            (*WORKER, "ray_actor_options"),
            {"num_gpu": 1},
            "deployments[1].ray_actor_options.num_gpu: there is no key",
        ),
        (("logging_config", "levle"), "INFO", "logging_config.levle: there is no key levle"),
        (
            (*WORKER, "name"),
            "ImageWorkers",
            "deployments[1].name: there is no deployment ImageWorkers; did you mean",
        ),
        ((*WORKER, "name"), ["x"], "deployments[1].name: there is no deployment"),
        (
            (*INGRESS, "user_config", "default_stps"),
            3,
            "deployments[0].user_config: there is no live setting of",
        ),
        (
            (*WORKER, "user_config"),
            {"default_steps": 3},
            "default_steps is a live setting of PromptEnhancer, not of",
        ),
        ((*INGRESS, "user_config"), "x", "must be a mapping of live settings, got str"),
        (
            (*OURS, "args", "num_replica"),
            3,
            "applications[0].args: there is no setting num_replica; did you mean",
        ),
        ((*OURS, "args", "max_queued_requests"), 0, "applications[0].args: setting max_queued_requests"),
        ((*OURS, "args"), "x", "applications[0].args: must be a mapping of settings, got str"),
        (("http_options", "host"), None, "http_options.host: is missing, and Serve would listen on 0.0.0.0"),
        (("http_options",), None, "http_options.host: is missing"),
        (("http_options",), "x", "http_options: must be a mapping, got str"),
        (
            ("http_options", "host"),
            "0.0.0.0",
            "http_options.host: it is 0.0.0.0, where other machines reach it",
        ),
        (("http_options", "host"), "images.example.org", "http_options.host: it is images.example.org"),
        (("http_options", "port"), "x", "http_options.port: input should be a valid integer"),
        ((*WORKER, "max_ongoing_requests"), "x", "deployments[1].max_ongoing_requests: input should"),
        (("applications",), None, "applications: field required"),
        (("applications",), {"a": 1}, "applications: must be a list, got dict"),
        (("applications", 0), "x", "applications[0]"),
        ((*OURS, "deployments"), "x", "applications[0].deployments"),
        ((*OURS, "deployments", 0), "x", "applications[0].deployments[0]"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(
    place: tuple[str | int, ...], value: Any, sentence: str
) -> None:
    problems = told(changed(place, value))
    assert any(sentence in problem for problem in problems), problems
    assert not any("pydantic" in problem for problem in problems)


def test_every_problem_is_told_at_once() -> None:
    config = changed((*WORKER, "num_replica"), 2)
    config["http_option"] = config.pop("http_options")
    config["applications"][0]["args"]["num_replica"] = 2
    assert len(told(config)) == 4


@pytest.mark.parametrize(
    "place", [(*OURS, "args", "api_key"), (*OURS, "runtime_env")], ids=["in args", "in the environment"]
)
def test_with_a_key_any_address_may_be_named(place: tuple[str | int, ...]) -> None:
    key: Any = (
        {"env_vars": {"ZIMAGE_API_KEY": "of the test"}} if place[-1] == "runtime_env" else "of the test"
    )
    config = changed(place, key)
    config["http_options"]["host"] = "0.0.0.0"
    assert told(config) == ()
    assert told(changed(("http_options", "host"), "0.0.0.0"), has_key=True) == ()


def test_another_application_is_read_for_keys_alone() -> None:
    config = changed((*OURS, "import_path"), "theirs:app")
    config["applications"][0]["args"] = {"colour": "red"}
    config["applications"][0]["deployments"] = [{"name": "Theirs", "num_replica": 1}]
    (problem,) = told(config)
    assert "num_replica" in problem


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("", "no Serve configuration"),
        ("kind: Namespace\napiVersion: v1", "no Serve configuration"),
        ("- 1\n- 2", "no Serve configuration"),
        ("a: [1", "it is no YAML"),
        ("kind: RayService\nspec: {serveConfigV2: {a: 1}}", "serveConfigV2 must be text"),
        ("kind: RayService\nspec: {serveConfigV2: '['}", "it is no YAML"),
    ],
)
def test_a_file_without_a_configuration_is_said_to_be_none(text: str, phrase: str) -> None:
    with pytest.raises(ServeConfigUnreadable, match=r".") as unreadable:
        problems_in(text)
    assert phrase in str(unreadable.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7"])
def test_an_application_without_a_key_is_not_built_for_a_serve_that_others_reach(host: str) -> None:
    with pytest.raises(SettingsError, match="there is no key"):
        refuse_open_address(host, load_settings())
    refuse_open_address(host, load_settings(api_key="of the test"))


@pytest.mark.parametrize("host", [None, "", "127.0.0.1", "::1", "localhost"])
def test_on_this_machine_alone_it_is_built_without_a_key(host: str | None) -> None:
    refuse_open_address(host, load_settings())


MANIFEST = ROOT / "k8s" / "base" / "ray-service.yaml"
SHIPPED = (ROOT / "serve_app" / "config" / "local.yaml", MANIFEST)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_the_shipped_files_pass(file: Path) -> None:
    done = CliRunner().invoke(app, ["check-config", str(file)])
    assert (done.exit_code, done.stdout) == (0, f"{file}: nothing is wrong\n")


@pytest.mark.parametrize("file", sorted((ROOT / "k8s" / "overlays").glob("*/serve-config.yaml")), ids=str)
def test_the_shipped_patches_pass_for_nodes_with_a_key(file: Path) -> None:
    assert CliRunner().invoke(app, ["check-config", "--key-in-environment", str(file)]).exit_code == 0
    without = CliRunner().invoke(app, ["check-config", str(file)])
    assert without.exit_code == 1
    assert "http_options.host" in without.stderr


@pytest.mark.skipif(kustomizer() is None, reason=NO_KUSTOMIZER)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_kustomize_makes_of_every_overlay_passes(overlay: str) -> None:
    assert problems_in(yaml.safe_dump_all(built(overlay))) == ()


def test_a_manifest_whose_pods_lack_the_key_is_refused() -> None:
    manifest = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))
    (group,) = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    group["template"]["spec"]["containers"][0]["env"] = []
    (problem,) = problems_in(yaml.safe_dump(manifest))
    assert "there is no key" in problem


@pytest.mark.parametrize(
    ("content", "phrase"), [(None, "cannot read"), (b"\xff\xfe\xff", "no UTF-8"), (b"a: [", "no YAML")]
)
def test_an_unreadable_file_ends_with_a_sentence(tmp_path: Path, content: bytes | None, phrase: str) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_bytes(content)
    done = CliRunner().invoke(app, ["check-config", str(file)])
    assert done.exit_code == 2
    assert phrase in done.stderr
