# Everything a user types. `make help` lists it.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
GPU_PYTHON ?= python3
GPU_ARGS ?=
MUTANTS_ARGS ?=
TEST_PROCESSES ?= 2
MONITORING_ARGS ?=
FUZZ_EXAMPLES ?= 100000
CONFIG ?= configs/tiny-cpu.yaml
LOCK := requirements/cpu.lock
GPU_LOCK := requirements/gpu.lock
PYTHONS := 3.11 3.12 3.13
TORCH := 2.13.0
TRITON := 3.6.0
TRITON_READY := $(VENV)/.triton-$(TRITON)
BESIDE_OTHERS := "not triton and not autoscaling and not whole_machine"
NIXL := 1.5.1
NIXL_READY := $(VENV)/.nixl-$(NIXL)
TRITON_COMPILES := tests/experts/kernels/test_compiles.py
TRITON_TESTS := tests/experts/kernels tests/experts/dispatch tests/benchmarks

.DEFAULT_GOAL := help
.PHONY: help serve monitoring test test-triton test-cluster fuzz mutants rehearse-gpu test-gpu lint docs bench bench-quick bench-gpu lock clean

help: ## list what `make` can do
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

# torch first: its CPU build is no ordinary package. Where pip finds it under its own name, good; elsewhere uv knows
# PyTorch's CPU index by itself. The lock is complete, so nothing resolves dependencies at install time.
$(READY): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit(0 if v in "$(PYTHONS)".split() else f"{sys.executable} is Python {v}, expected one of $(PYTHONS); set PYTHON=python3.11")'
	@echo "==> creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install -q --disable-pip-version-check uv
	@echo "==> installing torch $(TORCH) (CPU build)"
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps "torch==$(TORCH)+cpu" 2>/dev/null \
	  || $(VENV)/bin/uv pip install --python $(PY) --no-deps --torch-backend cpu "torch==$(TORCH)"
	@echo "==> installing $$(grep -c == $(LOCK)) locked packages"
	@grep -v '^torch==' $(LOCK) > $(VENV)/lock-without-torch.txt
	@$(VENV)/bin/uv pip install -q --python $(PY) --no-deps --compile-bytecode -r $(VENV)/lock-without-torch.txt \
	  || $(PY) -m pip install -q --disable-pip-version-check --no-deps -r $(VENV)/lock-without-torch.txt
	@echo "==> installing expertmesh itself"
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@echo "==> compiling what would be compiled on first use"
	@$(PY) -m experts.precompile
	@touch $@

# In a folder of its own, so that vllm does not see it. Its interpreter and its compiler need no GPU.
$(TRITON_READY): $(READY)
	@echo "==> installing triton $(TRITON)"
	@rm -rf $(VENV)/triton
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps --target $(VENV)/triton triton==$(TRITON)
	@touch $@

# Likewise, 70 MB that only pools over NIXL need. It has wheels for Linux alone.
$(NIXL_READY): $(READY)
	@echo "==> installing nixl $(NIXL)"
	@rm -rf $(VENV)/nixl
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps --target $(VENV)/nixl nixl==$(NIXL) nixl-cu12==$(NIXL) \
	  && touch $@ || { rm -rf $(VENV)/nixl; echo "==> there is no nixl for this machine: its test is skipped"; }

serve: $(READY) ## install if needed, then serve CONFIG=configs/tiny-cpu.yaml; prints the URL and a curl line when ready
	@$(VENV)/bin/expertmesh serve $(CONFIG)

monitoring: $(READY) ## Prometheus, and Grafana where it is installed, for what `make serve` serves; MONITORING_ARGS="--help" for ports
	@$(PY) -m cluster.observability.monitoring $(MONITORING_ARGS)

# Two at a time, then alone what needs the whole machine. tests/conftest.py says what runs beside what. What fails beside
# other tests (exit status 1) has to pass alone, right after: on two cores a service may be late because of its neighbour.
# Not so the data plane and the planner: a wrong row that is seen once is a wrong row.
test: $(NIXL_READY) ## the whole test suite but for Triton's programs and Ray's node autoscaler
	@$(PY) -m placement.precompile
	@$(PY) -m pytest -n $(TEST_PROCESSES) -m $(BESIDE_OTHERS) || { [ $$? -eq 1 ] \
	  && ! grep -qE '"tests/(experts|placement)/' .pytest_cache/v/cache/lastfailed \
	  && echo "==> once more, alone: what failed beside other tests" && $(PY) -m pytest -v --lf --lfnf=none -m $(BESIDE_OTHERS); }
	$(PY) -m pytest -m whole_machine

test-triton: $(TRITON_READY) ## Triton's programs in its interpreter and through its compiler, without a GPU (fetches 190 MB)
	PYTHONPATH=$(CURDIR)/$(VENV)/triton TRITON_INTERPRET=1 $(PY) -m pytest -m triton $(TRITON_TESTS) --deselect $(TRITON_COMPILES)
	PYTHONPATH=$(CURDIR)/$(VENV)/triton $(PY) -m pytest $(TRITON_COMPILES)

test-cluster: $(READY) ## real Ray clusters: three hosts in network namespaces (needs root), nodes that come and go
	$(PY) -m pytest -m "cluster or autoscaling"

rehearse-gpu: test-triton ## all GPU code that runs without a GPU: test-triton, pairs over gloo, the benchmarks with tiny sizes
	$(PY) -m pytest tests/experts/transports tests/benchmarks
	$(PY) -m benchmarks.gpu --device cpu

# With the machine's own Python: the environment above has torch's CPU build.
test-gpu: ## what needs a CUDA device, with GPU_PYTHON=python3 (which has torch for CUDA)
	$(GPU_PYTHON) tests/run_gpu.py $(GPU_ARGS)

bench-gpu: ## every GPU benchmark, likewise; GPU_ARGS="--quick" or "--only kernels,router"
	$(GPU_PYTHON) -m benchmarks.gpu $(GPU_ARGS)

fuzz: $(READY) ## 100,000 odd messages to a live shard, by strangers and by members; or FUZZ_EXAMPLES=1000
	EXPERTMESH_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(PY) -m pytest -q -s tests/experts/shard/test_fuzz.py

mutants: $(READY) ## changes to the sources that no test notices; MUTANTS_ARGS="--only gate" or "--sample 1000 --seed 2"
	@$(PY) -c "import cosmic_ray" 2>/dev/null || $(PY) -m pip install -q --disable-pip-version-check \
	  "$$(sed -n 's/^mutants = \["\(.*\)"\]/\1/p' pyproject.toml)"
	$(PY) -m tests.mutants $(MUTANTS_ARGS)

lint: $(READY) ## ruff, mypy and codespell
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/codespell

bench: $(READY) ## every benchmark, as tables and JSON under bench-results/
	$(PY) -m benchmarks

bench-quick: $(READY) ## the same, few runs: does it work, not how fast
	$(PY) -m benchmarks --quick

# Where PyTorch's CPU index is out of reach: LOCK_ARGS="--find-links FOLDER", with a folder that holds torch's CPU wheel.
LOCK_ARGS ?= --torch-backend cpu
lock: ## resolve the lock files anew, and check the first for every Python that is promised
	$(VENV)/bin/uv pip compile -q --no-header --no-annotate $(LOCK_ARGS) --python-version $(firstword $(PYTHONS)) --override requirements/overrides.txt requirements/cpu.in -o $(LOCK)
	@sed -i '1i # Resolved by `make lock`; installed with --no-deps, which leaves out torchvision, torchaudio, torchcodec and triton on purpose.' $(LOCK)
	@grep -v '^torch==' $(LOCK) > $(VENV)/lock-without-torch.txt
	@for python in $(PYTHONS); do echo "==> wheels for Python $$python"; \
	  $(VENV)/bin/uv pip compile -q --no-deps --only-binary :all: --python-version $$python $(VENV)/lock-without-torch.txt -o $(VENV)/lock-$$python.txt || exit 1; done
	@echo "==> $(GPU_LOCK)"
	$(VENV)/bin/uv pip compile -q --no-header --no-annotate --only-binary :all: --python-version 3.11 --python-platform x86_64-manylinux_2_34 requirements/gpu.in -o $(GPU_LOCK)
	@sed -i '1i # Resolved by `make lock` for Linux on x86_64 and Python 3.11, which configs/images/gpu.Dockerfile has.' $(GPU_LOCK)

docs: $(READY) ## the docs as a site, in build/site; fails on a broken link, a wrong anchor, a misspelt word
	$(VENV)/bin/codespell docs README.md
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo "open build/site/index.html"

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache bench-results build
