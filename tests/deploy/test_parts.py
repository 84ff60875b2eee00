"""What an operator counts on is in the manifests, and each part would be missed if it went."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from serve_app.app import GRACEFUL_SHUTDOWN_SECONDS
from serve_app.settings import Settings
from tests.deploy import manifests, test_manifests
from tests.deploy.manifests import (
    EXAMPLES,
    OVERLAYS,
    Manifest,
    built,
    containers,
    of_kind,
    pod_templates,
    ray_cluster,
    ray_service,
    serve_config,
)

GPU_OVERLAYS = ("gpu-pool", "single-gpu")
#: Cloud providers give a pod's node its credentials there.
METADATA_SERVICE = "169.254.169.254/32"
#: A picture of many steps on a small machine.
STREAM_SECONDS = 3600


def worker(overlay: str) -> Manifest:
    spec: Manifest = dict(pod_templates(overlay))["draw"]["spec"]
    return spec


@pytest.mark.parametrize("overlay", ["gpu-pool"])
def test_the_head_remembers_in_a_redis_that_has_a_password_and_a_disk(overlay: str) -> None:
    options = ray_cluster(overlay)["gcsFaultToleranceOptions"]
    assert options["backend"] == "redis"
    host, _, port = options["redisAddress"].partition(":")
    (service,) = [each for each in of_kind(overlay, "Service") if each["metadata"]["name"] == host]
    assert int(port) in {each["port"] for each in service["spec"]["ports"]}
    (redis,) = of_kind(overlay, "StatefulSet")
    labels = redis["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    (container,) = redis["spec"]["template"]["spec"]["containers"]
    (password,) = container["env"]
    assert password["valueFrom"] == options["redisPassword"]["valueFrom"]
    assert f"requirepass ${password['name']}\n" in container["command"][-1]
    assert "appendonly yes\n" in container["command"][-1]
    (claim,) = redis["spec"]["volumeClaimTemplates"]
    assert claim["metadata"]["name"] in {mount["name"] for mount in container["volumeMounts"]}
    (drawing,) = worker(overlay)["containers"]
    patience = {each["name"]: each.get("value") for each in drawing["env"]}
    assert int(patience["RAY_gcs_rpc_server_reconnect_timeout_s"] or 0) >= GRACEFUL_SHUTDOWN_SECONDS


@pytest.mark.parametrize("overlay", ["gpu-pool"])
def test_workers_come_and_go_with_the_queue(overlay: str) -> None:
    cluster = ray_cluster(overlay)
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    # It asks the API server in the name of the head's account.
    assert "automountServiceAccountToken" not in dict(pod_templates(overlay))["head"]["spec"]
    ((deployment,),) = [each["deployments"] for each in serve_config(overlay)["applications"]]
    scaling = deployment["autoscaling_config"]
    (group,) = cluster["workerGroupSpecs"]
    assert 1 <= scaling["min_replicas"] < scaling["max_replicas"]
    assert (group["minReplicas"], group["maxReplicas"]) == (scaling["min_replicas"], scaling["max_replicas"])
    assert cluster["autoscalerOptions"]["idleTimeoutSeconds"] > GRACEFUL_SHUTDOWN_SECONDS


@pytest.mark.parametrize("overlay", ["cpu-demo", "single-gpu"])
def test_no_pod_speaks_to_the_api_server_where_nothing_scales(overlay: str) -> None:
    for name, template in pod_templates(overlay):
        assert template["spec"]["automountServiceAccountToken"] is False, name


@pytest.mark.parametrize("overlay", GPU_OVERLAYS)
def test_gpu_workers_may_run_on_gpu_nodes_and_find_the_download(overlay: str) -> None:
    spec = worker(overlay)
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in spec["tolerations"]
    claims = {each["metadata"]["name"] for each in of_kind(overlay, "PersistentVolumeClaim")}
    (cache,) = [volume for volume in spec["volumes"] if volume["name"] == "cache"]
    assert cache["persistentVolumeClaim"]["claimName"] in claims
    (download,) = spec["initContainers"]
    assert "download" in download["command"]
    mounts = [
        {mount["name"]: mount["mountPath"] for mount in each["volumeMounts"]}["cache"]
        for each in containers({"spec": spec})
    ]
    assert len(set(mounts)) == 1


@pytest.mark.parametrize("overlay", ["single-gpu"])
def test_jobs_and_pictures_lie_in_a_volume_that_outlives_the_pod_of_the_front_end(overlay: str) -> None:
    spec = worker(overlay)
    claims = {each["metadata"]["name"]: each["spec"] for each in of_kind(overlay, "PersistentVolumeClaim")}
    (data,) = [volume for volume in spec["volumes"] if volume["name"] == "data"]
    claim = claims[data["persistentVolumeClaim"]["claimName"]]
    assert claim["accessModes"] == ["ReadWriteOnce"], "SQLite bears no file that several nodes write"
    kept_bytes = sum(Settings.model_fields[name].default for name in ("result_bytes", "history_bytes"))
    assert int(claim["resources"]["requests"]["storage"].removesuffix("Gi")) * 2**30 > kept_bytes
    # Whoever writes there is where the volume is: the head has no CPUs, and no second cluster comes beside.
    ((deployment,),) = [each["deployments"] for each in serve_config(overlay)["applications"]]
    assert deployment["name"] == "PromptEnhancer" and deployment["ray_actor_options"]["num_cpus"] > 0
    assert ray_cluster(overlay)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert ray_cluster(overlay)["workerGroupSpecs"][0]["maxReplicas"] == 1
    assert ray_service(overlay)["spec"]["upgradeStrategy"]["type"] == "None"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_has_room_for_what_is_kept_in_it(overlay: str) -> None:
    kept_bytes = sum(Settings.model_fields[name].default for name in ("result_bytes", "history_bytes"))
    for name in ("head", "draw"):
        spec = dict(pod_templates(overlay))[name]["spec"]
        (data,) = [volume for volume in spec["volumes"] if volume["name"] == "data"]
        if "emptyDir" in data:
            assert int(data["emptyDir"]["sizeLimit"].removesuffix("Gi")) * 2**30 > kept_bytes, name


@pytest.mark.parametrize("overlay", GPU_OVERLAYS)
def test_monitoring_comes_along(overlay: str) -> None:
    assert of_kind(overlay, "PodMonitor")
    (rules,) = of_kind(overlay, "PrometheusRule")
    assert any("alert" in rule for group in rules["spec"]["groups"] for rule in group["rules"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_of_ray_is_probed(overlay: str) -> None:
    for name in ("head", "draw"):
        (container,) = dict(pod_templates(overlay))[name]["spec"]["containers"]
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container), name
    (drawing,) = worker(overlay)["containers"]
    # Serve's proxy: a node without one gets no request.
    assert drawing["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": "serve"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_reach_what_they_need_and_no_more(overlay: str) -> None:
    needed = {"head": {53}, "draw": {53}, "zimage-turbo-redis": set[int]()}
    if overlay in GPU_OVERLAYS:
        needed["draw"] |= {443}
    if overlay == "gpu-pool":
        needed["head"] |= {6379, 443, 6443}
    for name, template in pod_templates(overlay):
        policies = [
            policy["spec"]
            for policy in of_kind(overlay, "NetworkPolicy")
            if test_manifests._selects(policy["spec"]["podSelector"], template["metadata"]["labels"])
        ]
        assert any("Egress" in policy["policyTypes"] for policy in policies), name
        allowed = [rule for policy in policies for rule in policy.get("egress", ())]
        assert {port["port"] for rule in allowed for port in rule.get("ports", ())} == needed[name], name
        for rule in allowed:
            assert rule["to"], name
            for block in (peer["ipBlock"] for peer in rule["to"] if "ipBlock" in peer):
                assert METADATA_SERVICE in block["except"], name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_new_cluster_takes_over_where_there_is_room_for_two(overlay: str) -> None:
    spec = ray_service(overlay)["spec"]
    assert spec["upgradeStrategy"]["type"] == ("None" if overlay == "single-gpu" else "NewCluster")
    assert spec["excludeHeadPodFromServeSvc"] is True


def test_ways_in_let_a_stream_flow_and_a_picture_take_its_time() -> None:
    examples = {
        manifest["kind"]: manifest
        for manifest in (yaml.safe_load(file.read_text(encoding="utf-8")) for file in EXAMPLES)
    }
    prefix = "nginx.ingress.kubernetes.io/proxy-"
    notes = examples["Ingress"]["metadata"]["annotations"]
    assert notes[f"{prefix}buffering"] == "off"
    assert int(notes[f"{prefix}read-timeout"]) >= STREAM_SECONDS
    assert int(notes[f"{prefix}send-timeout"]) >= STREAM_SECONDS
    assert examples["Ingress"]["spec"]["tls"]
    (rule,) = examples["HTTPRoute"]["spec"]["rules"]
    assert all(int(each.removesuffix("s")) >= STREAM_SECONDS for each in rule["timeouts"].values())


Check = Callable[[str], None]
Path = tuple[str | int, ...]
CLUSTER: Path = ("spec", "rayClusterConfig")
WORKER: Path = (*CLUSTER, "workerGroupSpecs", 0, "template", "spec")
WORKER_CONTAINER: Path = (*WORKER, "containers", 0)
SERVICE = ("RayService", "zimage-turbo")

#: What is taken out of an overlay, and the test above or in test_manifests.py that must miss it. An empty
#: path takes the whole object.
REMOVALS: tuple[tuple[str, tuple[str, str], Path, Check], ...] = (
    *(
        (
            "cpu-demo",
            ("PodDisruptionBudget", name),
            (),
            test_manifests.test_budgets_and_monitors_select_the_pods,
        )
        for name in ("zimage-turbo-head", "zimage-turbo-draw")
    ),
    *(
        ("gpu-pool", ("NetworkPolicy", name), (), test_pods_reach_what_they_need_and_no_more)
        for name in ("zimage-turbo", "zimage-turbo-download", "zimage-turbo-head", "zimage-turbo-redis")
    ),
    *(
        (
            "gpu-pool",
            ("NetworkPolicy", name),
            (),
            test_manifests.test_only_the_serve_port_is_open_to_everybody,
        )
        for name in ("zimage-turbo", "zimage-turbo-redis")
    ),
    *(
        ("single-gpu", SERVICE, path, check)
        for path, check in (
            (
                (*CLUSTER, "authOptions"),
                test_manifests.test_ray_and_the_application_are_closed_by_secrets_that_the_page_tells_how_to_make,
            ),
            (
                (*WORKER_CONTAINER, "env", 0),
                test_manifests.test_ray_and_the_application_are_closed_by_secrets_that_the_page_tells_how_to_make,
            ),
            ((*WORKER, "tolerations"), test_gpu_workers_may_run_on_gpu_nodes_and_find_the_download),
            ((*WORKER, "initContainers"), test_gpu_workers_may_run_on_gpu_nodes_and_find_the_download),
            ((*WORKER_CONTAINER, "startupProbe"), test_every_pod_of_ray_is_probed),
            ((*WORKER_CONTAINER, "readinessProbe"), test_every_pod_of_ray_is_probed),
            ((*WORKER_CONTAINER, "livenessProbe"), test_every_pod_of_ray_is_probed),
            (
                (*WORKER, "terminationGracePeriodSeconds"),
                test_manifests.test_an_upgrade_waits_for_the_longest_picture,
            ),
            (
                ("spec", "rayClusterDeletionDelaySeconds"),
                test_manifests.test_an_upgrade_waits_for_the_longest_picture,
            ),
            (
                ("spec", "excludeHeadPodFromServeSvc"),
                test_a_new_cluster_takes_over_where_there_is_room_for_two,
            ),
            (("spec", "upgradeStrategy"), test_a_new_cluster_takes_over_where_there_is_room_for_two),
            (
                (*WORKER, "automountServiceAccountToken"),
                test_no_pod_speaks_to_the_api_server_where_nothing_scales,
            ),
            *(
                (path, test_manifests.test_pods_pass_the_restricted_standard)
                for path in (
                    (*WORKER, "securityContext", "runAsNonRoot"),
                    (*WORKER, "securityContext", "seccompProfile"),
                    (*WORKER_CONTAINER, "securityContext", "allowPrivilegeEscalation"),
                    (*WORKER_CONTAINER, "securityContext", "capabilities"),
                    (*WORKER_CONTAINER, "securityContext", "readOnlyRootFilesystem"),
                )
            ),
        )
    ),
    (
        "single-gpu",
        ("Namespace", "zimage-turbo"),
        ("metadata", "labels", "pod-security.kubernetes.io/enforce"),
        test_manifests.test_pods_pass_the_restricted_standard,
    ),
    (
        "single-gpu",
        ("PersistentVolumeClaim", "zimage-turbo-cache"),
        (),
        test_gpu_workers_may_run_on_gpu_nodes_and_find_the_download,
    ),
    ("single-gpu", ("PrometheusRule", ""), (), test_monitoring_comes_along),
    ("single-gpu", ("PodMonitor", ""), (), test_monitoring_comes_along),
    *(
        (
            "gpu-pool",
            SERVICE,
            (*CLUSTER, *path),
            test_the_head_remembers_in_a_redis_that_has_a_password_and_a_disk,
        )
        for path in (
            ("gcsFaultToleranceOptions",),
            ("gcsFaultToleranceOptions", "redisPassword"),
            ("workerGroupSpecs", 0, "template", "spec", "containers", 0, "env", -1),
        )
    ),
    *(
        (
            "gpu-pool",
            (kind, "zimage-turbo-redis"),
            path,
            test_the_head_remembers_in_a_redis_that_has_a_password_and_a_disk,
        )
        for kind, path in (
            ("Service", ()),
            ("StatefulSet", ()),
            ("StatefulSet", ("spec", "volumeClaimTemplates")),
        )
    ),
    *(
        ("gpu-pool", SERVICE, (*CLUSTER, name), test_workers_come_and_go_with_the_queue)
        for name in ("enableInTreeAutoscaling", "autoscalerOptions")
    ),
)


@pytest.mark.parametrize(
    ("overlay", "of", "path", "check"),
    REMOVALS,
    ids=lambda each: (
        each.__name__ if callable(each) else ".".join(map(str, each)) if isinstance(each, tuple) else each
    ),
)
def test_what_is_taken_out_is_missed(
    overlay: str, of: tuple[str, str], path: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(overlay)
    spoilt = without(built(overlay), of, path)
    for module in (manifests, test_manifests):
        monkeypatch.setattr(module, "built", lambda _: spoilt)
    with pytest.raises((AssertionError, LookupError, ValueError)):
        check(overlay)


def without(found: tuple[Manifest, ...], of: tuple[str, str], path: Path) -> tuple[Manifest, ...]:
    """The manifests less an object, or what is at a path in it; for an empty name all objects of a kind."""
    kind, name = of
    chosen = [each for each in found if each["kind"] == kind and name in ("", each["metadata"]["name"])]
    assert chosen, of
    if not path:
        return tuple(each for each in found if each not in chosen)
    (manifest,) = chosen
    changed = copy.deepcopy(manifest)
    place: Any = changed
    for step in path[:-1]:
        place = place[step]
    del place[path[-1]]
    return tuple(changed if each is manifest else each for each in found)
