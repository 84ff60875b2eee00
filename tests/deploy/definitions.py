"""The makers' definitions (CRDs) of custom objects, and their rules in CEL as an API server evaluates them.

The definitions are too large to keep here. They are read from the folder in CRD_FOLDER, which an operator
fills from the own cluster (`make manifests-test` tells how), else from `shared/schemas` beside the checkout.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import celpy
import lark
import pytest
import yaml
from celpy.evaluation import base_functions

from tests.deploy.manifests import ROOT, Manifest

CRD_FOLDER = Path(os.environ.get("CRD_FOLDER") or ROOT.parent / "shared" / "schemas")
#: What CEL has besides functions that are values; cel-python evaluates them in the syntax tree.
MACROS = frozenset({"has", "all", "exists", "exists_one", "map", "filter", "dyn"})
#: There is no earlier version of this part: a first `apply`, or a field that is new.
ABSENT: Any = object()

FIRST_APPLY = "a rule about a change, and there is nothing earlier to compare with"


@dataclass(frozen=True)
class Verdict:
    """What came of one rule at one place of a manifest."""

    path: str
    rule: str
    outcome: Literal["kept", "broken", "skipped"]
    because: str = ""


def definition(kind: str, version: str) -> Manifest:
    """The schema of a custom object; skips where there is none, and fails where one was promised."""
    found = _definitions().get((kind, version))
    if found is not None:
        return found
    lacks = (
        f"no definition of {kind} {version} in {CRD_FOLDER}; make manifests-test CRDS=FOLDER names another"
    )
    if "CRD_FOLDER" in os.environ:
        pytest.fail(lacks)
    pytest.skip(lacks)


@cache
def _definitions() -> dict[tuple[str, str], Manifest]:
    documents = [
        document
        for file in sorted(CRD_FOLDER.glob("*.yaml"))
        for document in yaml.load_all(file.read_text(encoding="utf-8"), yaml.CSafeLoader)
        if document
    ]
    # `kubectl get crd -o yaml` wraps several into a List.
    crds = [each for document in documents for each in document.get("items", [document])]
    return {
        (crd["spec"]["names"]["kind"], each["name"]): each["schema"]["openAPIV3Schema"]
        for crd in crds
        if crd["kind"] == "CustomResourceDefinition"
        for each in crd["spec"]["versions"]
    }


def verdicts(schema: Manifest, value: Any, old: Any = ABSENT, path: str = "") -> Iterator[Verdict]:
    """Every rule that concerns `value`, which replaces `old`: evaluated, or skipped with a reason."""
    if isinstance(value, dict):
        # The API server fills in defaults before it looks at rules.
        fields = schema.get("properties", {})
        value = {name: each["default"] for name, each in fields.items() if "default" in each} | value
    for each in schema.get("x-kubernetes-validations", ()):
        yield _verdict(path, each, value, old)
    for name, part, child, earlier in _children(schema, value, old):
        yield from verdicts(part, child, earlier, f"{path}{name}")


def rules(schema: Manifest, path: str = "") -> Iterator[tuple[str, str]]:
    """Every rule of a definition, with the place that it stands at."""
    for each in schema.get("x-kubernetes-validations", ()):
        yield path, each["rule"]
    for name, part in schema.get("properties", {}).items():
        yield from rules(part, f"{path}.{name}")
    if isinstance(extra := schema.get("additionalProperties"), dict):
        yield from rules(extra, f"{path}.*")
    if "items" in schema:
        yield from rules(schema["items"], f"{path}[]")


def unknown_functions(rule: str) -> set[str]:
    """What a rule calls that cel-python has not: Kubernetes' own additions to CEL, as isURL and quantity."""
    tree = celpy.Environment().compile(rule)
    called = {
        str(child)
        for call in tree.find_pred(lambda node: node.data in ("ident_arg", "member_dot_arg"))
        for child in call.children
        if isinstance(child, lark.Token) and child.type == "IDENT"
    }
    return called - MACROS - set(base_functions)


def _verdict(path: str, validation: Manifest, value: Any, old: Any) -> Verdict:
    rule = validation["rule"]
    if "oldSelf" in rule and old is ABSENT:
        return Verdict(path, rule, "skipped", FIRST_APPLY)
    if unknown := unknown_functions(rule):
        return Verdict(path, rule, "skipped", f"cel-python has no {', '.join(sorted(unknown))}")
    environment = celpy.Environment()
    variables = {"self": value} if old is ABSENT else {"self": value, "oldSelf": old}
    program = environment.program(environment.compile(rule))
    kept = program.evaluate({name: celpy.json_to_cel(each) for name, each in variables.items()})
    if kept:
        return Verdict(path, rule, "kept")
    return Verdict(path, rule, "broken", validation.get("message", f"failed rule: {rule}"))


def _children(schema: Manifest, value: Any, old: Any) -> Iterator[tuple[str, Manifest, Any, Any]]:
    """The parts of a value: where, by which schema, what, and what was there before."""
    if isinstance(value, dict):
        extra = schema.get("additionalProperties")
        for name, child in value.items():
            part = schema.get("properties", {}).get(name, extra)
            if isinstance(part, dict):
                yield f".{name}", part, child, old.get(name, ABSENT) if isinstance(old, dict) else ABSENT
    if isinstance(value, list) and "items" in schema:
        # Only lists with keys tell which element was which before.
        keys = schema.get("x-kubernetes-list-map-keys")
        earlier = old if keys and isinstance(old, list) else []
        known = {tuple(each.get(key) for key in keys or ()): each for each in earlier}
        for index, child in enumerate(value):
            before = known.get(tuple(child.get(key) for key in keys), ABSENT) if keys else ABSENT
            yield f"[{index}]", schema["items"], child, before
