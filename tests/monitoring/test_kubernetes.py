"""The objects for the Prometheus operator fit its own definitions, with no field that it does not know."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from monitoring.generate import HERE
from tests.running_server import ROOT

DEFINITIONS = ROOT.parent / "shared" / "schemas"
FILES = [HERE / "kubernetes" / name for name in ("podmonitor.yaml", "prometheusrule.yaml")]


def schema_of(kind: str) -> dict[str, Any]:
    for file in DEFINITIONS.glob("*.yaml"):
        for definition in yaml.safe_load_all(file.read_text(encoding="utf-8")):
            if definition and definition["spec"]["names"]["kind"] == kind:
                schema: dict[str, Any] = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
                return _closed(schema)
    pytest.fail(f"no definition of {kind} in {DEFINITIONS}")


def _closed(schema: Any) -> Any:
    """The schema with unknown fields refused; `metadata` is Kubernetes' own and left open."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(each) for name, each in schema.items()}
    if str(closed.get("pattern", "")).startswith("^(?i)"):  # Go reads that, Python does not
        del closed["pattern"]
    if "properties" in closed and "additionalProperties" not in closed:
        closed["additionalProperties"] = False
    return closed


@pytest.mark.skipif(not DEFINITIONS.is_dir(), reason=f"the operator's definitions are not in {DEFINITIONS}")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_objects_fit_the_operators_definitions(file: Path) -> None:
    for thing in yaml.safe_load_all(file.read_text(encoding="utf-8")):
        jsonschema.validate(thing, schema_of(thing["kind"]))


@pytest.mark.usefixtures("prometheus")
def test_the_scrape_configuration_reads_as_prometheus_reads_it(tmp_path: Path) -> None:
    # Debian's Prometheus is built without the discovery of Kubernetes; the relabelling is what is looked at.
    jobs = yaml.safe_load((HERE / "kubernetes" / "scrape-config.yaml").read_text(encoding="utf-8"))
    for job in jobs:
        assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    file = tmp_path / "prometheus.yml"
    file.write_text(yaml.safe_dump({"scrape_configs": jobs}), encoding="utf-8")
    done = subprocess.run(
        ["promtool", "check", "config", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
