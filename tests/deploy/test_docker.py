"""The Dockerfile as hadolint reads it, and what docker compose brings up; `make image-test` builds it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.deploy.manifests import ROOT

DOCKER = ROOT / "docker"
DOCKERFILE = DOCKER / "Dockerfile"
MONITORING = ROOT / "monitoring"


def compose() -> dict[str, dict[str, dict[str, object]]]:
    found: dict[str, dict[str, dict[str, object]]] = yaml.safe_load(
        (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    )
    return found


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    told = subprocess.run([str(hadolint), str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")


def test_hadolint_would_speak(tmp_path: Path) -> None:
    spoilt = tmp_path / "Dockerfile"
    spoilt.write_text(DOCKERFILE.read_text(encoding="utf-8") + "USER root\n", encoding="utf-8")
    hadolint = Path(sys.executable).with_name("hadolint")
    told = subprocess.run([str(hadolint), str(spoilt)], capture_output=True, text=True, check=False)
    assert told.returncode != 0 and "DL3002" in told.stdout


def test_the_version_in_the_labels_is_the_projects() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"ARG VERSION={version}\n" in DOCKERFILE.read_text(encoding="utf-8")
    assert str(compose()["services"]["zimage-turbo"]["image"]).startswith(f"zimage-turbo:{version}-")


def test_the_build_gets_what_the_dockerfile_copies_and_no_more() -> None:
    lines = (DOCKER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        name
        for line in DOCKERFILE.read_text(encoding="utf-8").splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for name in line.split()[1:-1]
    }
    assert "*" in lines
    assert allowed == copied


def test_compose_mounts_what_is_there_and_pins_its_images() -> None:
    for name, service in compose()["services"].items():
        image = str(service["image"])
        assert re.search(r":v?\d+\.\d+\.\d+", image), image
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        for volume in service["volumes"]:
            source = str(volume).partition(":")[0]
            if source.startswith("."):
                assert (DOCKER / source).exists(), volume
            else:
                assert source in compose()["volumes"], volume


def test_compose_is_reachable_from_this_machine_alone() -> None:
    for service in compose()["services"].values():
        assert all(str(port).startswith("127.0.0.1:") for port in service["ports"])


def test_compose_keeps_secrets_out_of_its_file() -> None:
    example = (DOCKER / "env.example").read_text(encoding="utf-8")
    for name in ("ZIMAGE_API_KEY", "GRAFANA_PASSWORD"):
        assert re.search(rf"^{name}=$", example, re.MULTILINE)
        assert f"${{{name}:?" in (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    assert "docker/.env" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_grafana_finds_what_is_provisioned() -> None:
    grafana = compose()["services"]["grafana"]
    sources = yaml.safe_load((MONITORING / "grafana/provisioning/datasources/prometheus.yml").read_bytes())
    variables = set(re.findall(r"\$\{(\w+)\}", sources["datasources"][0]["url"]))
    environment = grafana["environment"]
    assert isinstance(environment, dict)
    assert variables <= set(environment)
    (provider,) = yaml.safe_load((MONITORING / "grafana/provisioning/dashboards/zimage.yml").read_bytes())[
        "providers"
    ]
    assert f"../monitoring/grafana/dashboards:{provider['options']['path']}:ro" in list(grafana["volumes"])


def test_prometheus_labels_the_server_as_on_one_box() -> None:
    """The dashboards choose by these labels, wherever the server runs."""
    ours = yaml.safe_load((DOCKER / "prometheus.yml").read_bytes())
    theirs = yaml.safe_load((MONITORING / "prometheus/prometheus.yml").read_bytes())
    (job,) = ours["scrape_configs"]
    (target,) = job["static_configs"]
    server = next(each for each in theirs["scrape_configs"] if each["job_name"] == job["job_name"])
    assert target["labels"] == server["static_configs"][0]["labels"]
    assert ours["rule_files"] == theirs["rule_files"]
    assert ours["global"] == theirs["global"]
    assert target["targets"] == ["zimage-turbo:8000"]
    assert "zimage-turbo" in compose()["services"]


def test_promtool_accepts_the_configuration(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool: apt-get install prometheus")
    shutil.copytree(MONITORING / "prometheus" / "rules", tmp_path / "rules")
    key = tmp_path / "key"
    key.write_text("of the test", encoding="ascii")
    text = (DOCKER / "prometheus.yml").read_text(encoding="utf-8")
    (tmp_path / "prometheus.yml").write_text(
        text.replace("/run/secrets/zimage_api_key", str(key)), encoding="utf-8"
    )
    told = subprocess.run(
        [promtool, "check", "config", str(tmp_path / "prometheus.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
