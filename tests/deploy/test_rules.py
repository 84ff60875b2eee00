"""The rules (CEL) in the operators' definitions, evaluated as the API server does at `kubectl apply`."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from typing import Any

import pytest

from tests.deploy.definitions import FIRST_APPLY, definition, rules, unknown_functions, verdicts
from tests.deploy.manifests import OVERLAYS, Manifest, built, ray_service
from tests.deploy.test_manifests import CUSTOM_KINDS

MANAGER = "ray.io/kuberay-operator"
CLUSTER = ("spec", "rayClusterConfig")
#: What a first `apply` of a manifest is refused for: the field, the value, the rule's own words.
WRONG: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("spec", "managedBy"), "somebody-else", "must be either 'ray.io/kuberay-operator'"),
    ((*CLUSTER, "managedBy"), "somebody-else", "must be either 'ray.io/kuberay-operator'"),
)
#: What a later `apply` is refused for: the field, the value before, the value now.
CHANGED: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("spec", "managedBy"), MANAGER, "kueue.x-k8s.io/multikueue"),
    ((*CLUSTER, "managedBy"), MANAGER, "kueue.x-k8s.io/multikueue"),
    ((*CLUSTER, "gcsFaultToleranceOptions", "backend"), "redis", "rocksdb"),
)


def custom_objects(overlay: str) -> list[tuple[Manifest, Manifest]]:
    """Each custom object with its definition; the examples' HTTPRoute is in no overlay."""
    found = [manifest for manifest in built(overlay) if manifest["kind"] in CUSTOM_KINDS]
    return [(each, definition(each["kind"], each["apiVersion"].rpartition("/")[2])) for each in found]


def with_value(manifest: Manifest, path: tuple[str, ...], value: Any) -> Manifest:
    changed: Manifest = copy.deepcopy(manifest)
    place = changed
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return changed


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_first_apply_breaks_no_rule(overlay: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = [each for manifest, schema in custom_objects(overlay) for each in verdicts(schema, manifest)]
    counted = Counter((each.outcome, each.because) for each in found)
    with capsys.disabled():
        for (outcome, because), count in counted.items():
            sys.stdout.write(f"\n{overlay}: {count} rules {outcome} {because}")
    assert [each for each in found if each.outcome == "broken"] == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_same_applied_again_breaks_no_rule(overlay: str) -> None:
    found = [
        each for manifest, schema in custom_objects(overlay) for each in verdicts(schema, manifest, manifest)
    ]
    assert [each for each in found if each.outcome == "broken"] == []
    assert FIRST_APPLY not in {each.because for each in found}
    # The one field of ours with a rule is the backend of the head's memory.
    assert len(found) == (overlay == "gpu-pool")


@pytest.mark.parametrize(("path", "value", "message"), WRONG, ids=lambda each: str(each))
def test_a_wrong_value_is_caught(path: tuple[str, ...], value: str, message: str) -> None:
    schema = definition("RayService", "v1")
    found = list(verdicts(schema, with_value(ray_service("gpu-pool"), path, value)))
    (broken,) = [each for each in found if each.outcome == "broken"]
    assert broken.path == "." + ".".join(path)
    assert message in broken.because
    right = list(verdicts(schema, with_value(ray_service("gpu-pool"), path, MANAGER)))
    assert [each.outcome for each in right if each.because != FIRST_APPLY] == ["kept"]


@pytest.mark.parametrize(("path", "before", "now"), CHANGED, ids=lambda each: str(each))
def test_a_forbidden_change_is_caught(path: tuple[str, ...], before: str, now: str) -> None:
    schema = definition("RayService", "v1")
    old, new = (with_value(ray_service("gpu-pool"), path, value) for value in (before, now))
    broken = [each for each in verdicts(schema, new, old) if each.outcome == "broken"]
    assert [each.path for each in broken] == ["." + ".".join(path)]
    assert "immutable" in broken[0].because


@pytest.mark.parametrize("kind", [("RayService", "v1"), ("PodMonitor", "v1"), ("PrometheusRule", "v1")])
def test_every_rule_of_the_definitions_can_be_evaluated(
    kind: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """And none waits for a field that we set one day: each has a row above that breaks it."""
    found = set(rules(definition(*kind)))
    with capsys.disabled():
        sys.stdout.write(f"\n{kind[0]}: {len(found)} rules")
    assert {rule: unknown_functions(rule) for _, rule in found if unknown_functions(rule)} == {}
    rows = {"." + ".".join(path) for path, _, _ in (*WRONG, *CHANGED)}
    assert {path for path, _ in found} <= rows


def test_functions_that_only_kubernetes_has_are_named() -> None:
    rule = "isURL(self.at) && quantity(self.size).isGreaterThan(quantity('1Gi')) && self.list.all(x, x > 1)"
    assert unknown_functions(rule) == {"isURL", "quantity", "isGreaterThan"}
    schema = {"x-kubernetes-validations": [{"rule": rule}]}
    (skipped,) = verdicts(schema, {"at": "", "size": "2Gi", "list": [2]})
    assert skipped.outcome == "skipped"
    assert "isGreaterThan, isURL, quantity" in skipped.because


def test_defaults_are_there_before_rules_and_keys_tell_elements_apart() -> None:
    schema = {
        "properties": {
            "size": {"default": 3},
            "parts": {
                "x-kubernetes-list-map-keys": ["name"],
                "items": {
                    "x-kubernetes-validations": [{"rule": "self.side >= oldSelf.side", "message": "m"}]
                },
            },
        },
        "x-kubernetes-validations": [{"rule": "self.size > 2 && !has(self.colour)"}],
    }
    old = {"parts": [{"name": "a", "side": 1}, {"name": "b", "side": 5}]}
    new = {"parts": [{"name": "b", "side": 4}, {"name": "c", "side": 1}]}
    outcomes = {each.path: each.outcome for each in verdicts(schema, new, old)}
    assert outcomes == {"": "kept", ".parts[0]": "broken", ".parts[1]": "skipped"}
