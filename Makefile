# Two commands: `make serve` draws in the browser, `make test` checks everything.
PYTHON ?= python3
VENV ?= .venv
PORT ?= 7860
BIN := $(VENV)/bin

.PHONY: serve up test check bench bench-gpu format image image-test manifests manifests-test clean

serve: $(VENV)/.installed
	@exec $(BIN)/zimage-turbo launch --port $(PORT)

# The server with Prometheus beside it, and Grafana where it is installed; ARGS="-- --model MODEL" and the like.
PROMETHEUS_PORT ?= 9090
GRAFANA_PORT ?= 3000
up: $(VENV)/.installed
	@exec $(BIN)/python docker/up.py --port $(PORT) --prometheus-port $(PROMETHEUS_PORT) \
		--grafana-port $(GRAFANA_PORT) $(ARGS)

# What starts a server has the machine for itself; the rest is shared out over the processors, a thread for each.
test: $(VENV)/.installed-test check
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile -m "not server"; rest=$$?; \
		$(BIN)/python -m pytest -m server && exit $$rest

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What this machine's processor does with the demo model, beside stock diffusers, in a few minutes; a GPU has a
# suite of its own below. ARGS="--repeat 9" and the like; `zimage-turbo bench --help` says what there is.
# What is quicker here is measured first, and remembered below build/.
bench: export XDG_CACHE_HOME := $(CURDIR)/build/cache
bench: $(VENV)/.installed-test
	$(BIN)/zimage-turbo tune --device cpu --size 256x256 --size 512x512
	$(BIN)/zimage-turbo bench --device cpu --size 256x256 --size 512x512 --compare-stock \
		--json build/bench.json --markdown build/bench.md $(ARGS)

# Needs a CUDA device; ARGS="--part limited --only 12GiB" runs a part of it, --tiny the same code on the CPU.
bench-gpu: $(VENV)/.installed-test
	$(BIN)/python -m tests.gpu.bench --json build/bench-gpu.json --markdown build/bench-gpu.md $(ARGS)
	$(BIN)/python -m tests.gpu.speed --json build/speed-gpu.json

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# VARIANT=cpu or cuda; with Docker, or with another builder of that kind: BUILDER="buildah bud".
VARIANT ?= cuda
BUILDER ?= docker build
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

image:
	$(BUILDER) --file docker/Dockerfile --build-arg VARIANT=$(VARIANT) --build-arg VERSION=$(VERSION) \
		--build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) \
		--tag zimage-turbo:$(VERSION)-$(VARIANT) .

# Builds the CPU image on a Debian made from nothing, starts it and draws with it: as root, in several minutes.
image-test:
	$(PYTHON) docker/image_test.py

manifests:
	cp monitoring/kubernetes/podmonitor.yaml monitoring/kubernetes/prometheusrule.yaml k8s/monitoring/

# The manifests against the definitions of custom objects in a folder; your cluster's own come there by
#   kubectl get crd rayservices.ray.io podmonitors.monitoring.coreos.com prometheusrules.monitoring.coreos.com \
#       -o yaml > FOLDER/crds.yaml
manifests-test: $(VENV)/.installed-test
	$(if $(CRDS),CRD_FOLDER=$(abspath $(CRDS))) $(BIN)/python -m pytest tests/deploy/test_manifests.py tests/deploy/test_rules.py

# The stamps are made again only when what is to be installed has changed.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
