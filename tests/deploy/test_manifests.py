"""Every overlay builds, is what Kubernetes and the operators accept, and asks for no privilege."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from serve_app.app import GRACEFUL_SHUTDOWN_SECONDS
from serve_app.settings import Settings
from tests.deploy.definitions import definition
from tests.deploy.manifests import (
    EXAMPLES,
    KUSTOMIZATIONS,
    OVERLAYS,
    ROOT,
    Manifest,
    built,
    containers,
    of_kind,
    pod_templates,
    ray_cluster,
    ray_service,
    serve_config,
)

KUBERNETES_VERSION = "1.32"
CUSTOM_KINDS = ("RayService", "PodMonitor", "PrometheusRule", "HTTPRoute")
#: What the "restricted" standard lets a pod mount.
RESTRICTED_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "projected", "secret"} | {
    "persistentVolumeClaim"
}


def all_manifests() -> list[Any]:
    files = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in EXAMPLES]
    return [*files, *(manifest for overlay in OVERLAYS for manifest in built(overlay))]


def schema_of(kind: str, version: str) -> Manifest:
    """The definition of a custom object with unknown fields refused, as `kubectl apply` refuses them."""
    schema: Manifest = _strict(definition(kind, version))
    return schema


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: _strict(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        open_ended = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
        if not open_ended:
            strict["additionalProperties"] = False
    return strict


def test_there_are_the_three_overlays() -> None:
    assert OVERLAYS == ("cpu-demo", "gpu-pool", "single-gpu")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_own_schemas_accept_every_object_and_pod(overlay: str) -> None:
    for manifest in built(overlay):
        if manifest["kind"] not in CUSTOM_KINDS:
            kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
    for name, template in pod_templates(overlay):
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, **template["metadata"]},
            "spec": template["spec"],
        }
        kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("kind", ["RayService", "PodMonitor", "PrometheusRule"])
def test_the_operators_definitions_accept_the_custom_objects(overlay: str, kind: str) -> None:
    for manifest in of_kind(overlay, kind):
        schema = schema_of(kind, manifest["apiVersion"].rpartition("/")[2])
        # The API server checks metadata by itself.
        schema["properties"].pop("metadata")
        schema.pop("additionalProperties", None)
        errors = list(jsonschema.Draft202012Validator(schema).iter_errors(manifest))
        assert not errors, [(list(error.path), error.message) for error in errors]


def test_a_misspelt_field_would_be_refused() -> None:
    schema = schema_of("RayService", "v1")
    spoilt = ray_service("gpu-pool") | {"spec": {**ray_service("gpu-pool")["spec"], "serveConfigV3": ""}}
    assert any(
        "serveConfigV3" in error.message
        for error in jsonschema.Draft202012Validator(schema).iter_errors(spoilt)
    )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_pass_the_restricted_standard(overlay: str) -> None:
    (namespace,) = of_kind(overlay, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for name, template in pod_templates(overlay):
        spec = template["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & set(spec), name
        assert all(set(volume) - {"name"} <= RESTRICTED_VOLUMES for volume in spec.get("volumes", ())), name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in containers(template):
            assert_confined(f"{name}/{container['name']}", container["securityContext"])
            assert not any("hostPort" in port for port in container.get("ports", ())), name
    if "autoscalerOptions" in ray_cluster(overlay):
        assert_confined("autoscaler", ray_cluster(overlay)["autoscalerOptions"]["securityContext"])


def assert_confined(name: str, security: Manifest) -> None:
    assert security["allowPrivilegeEscalation"] is False, name
    assert security["readOnlyRootFilesystem"] is True, name
    assert security["capabilities"] == {"drop": ["ALL"]}, name
    assert not security.get("privileged"), name
    assert not {"runAsUser", "runAsNonRoot", "seccompProfile", "procMount"} & set(security), name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_have_a_version_and_containers_limits(overlay: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name, template in pod_templates(overlay):
        for container in containers(template):
            image, _, tag = container["image"].rpartition(":")
            assert image and tag and tag != "latest", container["image"]
            if image.endswith("zimage-turbo"):
                assert tag == f"{project['version']}-{'cpu' if overlay == 'cpu-demo' else 'cuda'}"
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), name
            assert "memory" in container["resources"]["limits"], name
            assert container["volumeMounts"], name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_head_draws_nothing_and_gpus_are_asked_for_by_workers_alone(overlay: str) -> None:
    cluster = ray_cluster(overlay)
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert not any("gpu" in name for name in head["resources"]["limits"])
    (group,) = cluster["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    (application,) = serve_config(overlay)["applications"]
    assert int(worker["resources"]["limits"].get("nvidia.com/gpu", 0)) == application["args"]["num_gpus"]
    assert float(worker["resources"]["requests"]["cpu"]) >= application["args"].get("worker_cpus", 1)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_and_the_application_are_closed_by_secrets_that_the_page_tells_how_to_make(overlay: str) -> None:
    page = (KUSTOMIZATIONS / "README.md").read_text(encoding="utf-8")
    auth = ray_cluster(overlay)["authOptions"]
    assert auth["mode"] == "token"
    made = set(re.findall(r"create secret generic (\S+)[^\n]*\\?\n?\s*--from-literal=(\w[\w-]*)=", page))
    assert (auth["secretName"], "auth_token") in made
    for name, template in pod_templates(overlay):
        for container in containers(template):
            for variable in container.get("env", ()):
                if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                    assert (reference["name"], reference["key"]) in made, name
    for role in ("head", "draw"):
        (container,) = dict(pod_templates(overlay))[role]["spec"]["containers"]
        assert "ZIMAGE_API_KEY" in {variable["name"] for variable in container["env"]}
    assert not of_kind(overlay, "Secret")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_the_serve_port_is_open_to_everybody(overlay: str) -> None:
    policies = of_kind(overlay, "NetworkPolicy")
    open_ports = {
        port["port"]
        for policy in policies
        for rule in policy["spec"].get("ingress", ())
        if "from" not in rule
        for port in rule["ports"]
    }
    assert open_ports == {8000}
    for name, template in pod_templates(overlay):
        labels = template["metadata"]["labels"]
        assert any(
            _selects(policy["spec"]["podSelector"], labels) and "Ingress" in policy["spec"]["policyTypes"]
            for policy in policies
        ), name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_budgets_and_monitors_select_the_pods(overlay: str) -> None:
    # KubeRay adds its own labels to these.
    labels = {
        name: {**template["metadata"]["labels"], "ray.io/node-type": "head" if name == "head" else "worker"}
        for name, template in pod_templates(overlay)
    }
    selected = {
        name
        for budget in of_kind(overlay, "PodDisruptionBudget")
        for name, found in labels.items()
        if _selects(budget["spec"]["selector"], found)
    }
    assert selected == {"head", "draw"}
    for monitor in of_kind(overlay, "PodMonitor"):
        for name, template in pod_templates(overlay):
            if _selects(monitor["spec"]["selector"], labels[name]):
                ports = {port["name"] for each in containers(template) for port in each.get("ports", ())}
                assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports
        assert any(_selects(monitor["spec"]["selector"], found) for found in labels.values())


def _selects(selector: Manifest, labels: dict[str, str]) -> bool:
    exact = all(labels.get(name) == value for name, value in selector.get("matchLabels", {}).items())
    expressions = selector.get("matchExpressions", ())
    assert all(each["operator"] == "In" for each in expressions)
    return exact and all(labels.get(each["key"]) in each["values"] for each in expressions)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_upgrade_waits_for_the_longest_picture(overlay: str) -> None:
    assert ray_service(overlay)["spec"]["rayClusterDeletionDelaySeconds"] > GRACEFUL_SHUTDOWN_SECONDS
    for name in ("head", "draw"):
        spec = dict(pod_templates(overlay))[name]["spec"]
        assert spec["terminationGracePeriodSeconds"] > GRACEFUL_SHUTDOWN_SECONDS


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_cluster_has_the_ray_that_was_tested(overlay: str) -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"ray=={ray_cluster(overlay)['rayVersion']}" in pins


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_is_written_goes_into_volumes(overlay: str) -> None:
    for name, template in pod_templates(overlay):
        volumes = {volume["name"] for volume in template["spec"].get("volumes", ())}
        claims = {
            claim["metadata"]["name"]
            for manifest in of_kind(overlay, "StatefulSet")
            if manifest["metadata"]["name"] == name
            for claim in manifest["spec"]["volumeClaimTemplates"]
        }
        for container in containers(template):
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert set(mounts) <= volumes | claims, name
            assert "/tmp" in mounts.values(), name
            if "zimage-turbo:" in container["image"]:
                assert "/var/cache/zimage-turbo" in mounts.values(), name
            if container["name"] in ("ray-head", "ray-worker"):
                assert "/var/lib/zimage-turbo" in mounts.values(), "jobs would have no place to be kept"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_model_that_is_served_is_the_one_that_is_downloaded(overlay: str) -> None:
    (application,) = serve_config(overlay)["applications"]
    downloads = [
        container["command"][container["command"].index("--model") + 1]
        for container in dict(pod_templates(overlay))["draw"]["spec"].get("initContainers", ())
    ]
    served = application["args"].get("model")
    assert downloads == ([served] if served else [])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_serve_configs_name_known_settings(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve.schema import ServeDeploySchema

    monkeypatch.setenv("ZIMAGE_API_KEY", "of the test")
    monkeypatch.setenv("ZIMAGE_HOST", "0.0.0.0")
    config = serve_config(overlay)
    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    settings = Settings.model_validate(application.args)
    assert application.import_path == "serve_app:build"
    assert settings.api_key is not None
    # Serve takes unknown keys in silence.
    assert set(config) <= set(ServeDeploySchema.model_fields)
    assert set(config["applications"][0]) <= set(type(application).model_fields)
    for deployment in config["applications"][0].get("deployments", ()):
        assert set(deployment) <= set(type(application.deployments[0]).model_fields)
        scaling = deployment.get("autoscaling_config")
        if scaling is None:
            continue
        (group,) = ray_cluster(overlay)["workerGroupSpecs"]
        assert (scaling["min_replicas"], scaling["max_replicas"]) == (
            group["minReplicas"],
            group["maxReplicas"],
        )


@pytest.mark.parametrize("name", ["podmonitor.yaml", "prometheusrule.yaml"])
def test_the_monitors_here_are_copies_of_those_in_monitoring(name: str) -> None:
    """kustomize takes no file from outside its folder; `make manifests` copies them."""
    copy, original = KUSTOMIZATIONS / "monitoring" / name, ROOT / "monitoring" / "kubernetes" / name
    assert copy.read_bytes() == original.read_bytes()


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_examples_lead_to_the_service_that_kuberay_makes(file: Path) -> None:
    manifest = yaml.safe_load(file.read_text(encoding="utf-8"))
    if manifest["kind"] not in CUSTOM_KINDS:
        kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
    name = ray_service("single-gpu")["metadata"]["name"]
    assert f"{name}-serve-svc" in yaml.safe_dump(manifest)
    assert manifest["metadata"]["namespace"] == "zimage-turbo"


def test_no_manifest_is_open_to_every_image_or_every_privilege() -> None:
    text = yaml.safe_dump_all(all_manifests())
    assert ":latest" not in text
    assert "privileged: true" not in text
    assert "hostPath" not in text
