# Two commands do all set-up on a machine with Python >= 3.10, pip and a package index: make demo, make test.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test quick lint docs bench clean
demo: .venv/.cli
	$(BIN)/scalora train recipes/demo.yaml --overwrite

test: .venv/.dev .venv/.quantised .venv/.diffusion .venv/.deepspeed  ## everything, the packaged real models too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4
	OMP_NUM_THREADS=1 PYTHONPATH=.venv/quantised $(BIN)/python -m pytest tests/compatibility/test_quantised.py \
	  tests/engine/test_quantised_optimizers.py tests/compatibility/test_trainer_optimizers.py tests/runs/test_quantization.py
	OMP_NUM_THREADS=1 PYTHONPATH=.venv/deepspeed $(BIN)/python -m pytest tests/engine/test_zero.py
	OMP_NUM_THREADS=1 PYTHONPATH=.venv/diffusion $(BIN)/python -m pytest tests/compatibility/ -k "unet or table_of_families"

quick: .venv/.dev  ## without the packaged real models: needs no network
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 -m "not real"

lint: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

docs: .venv/.dev  ## the site, in site/; its search wants a server: python -m http.server -d site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: .venv/.dev  ## hours on a CPU, with nothing else running
	for model in minilm smollm2; do for precision in fp32 bf16; do \
	  $(BIN)/python -m benchmarks.cost.overhead --model $$model --precision $$precision || exit; done; done
	$(BIN)/python -m benchmarks.cost.event
	$(BIN)/python -m benchmarks.cost.sketch
	$(BIN)/python -m benchmarks.cost.loading

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv

# torch comes first and alone: a looser request may fetch gigabytes of another build.
.venv/.torch: .venv/bin/python constraints.txt
	$(PIP) "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	@touch $@

.venv/.cli: .venv/.torch pyproject.toml
	$(PIP) --editable '.[cli]'
	@touch $@

.venv/.dev: .venv/.torch pyproject.toml
	$(PIP) --editable '.[dev]'
	@touch $@ .venv/.cli

# Apart from the rest: where these are installed, every import of transformers loads them.
.venv/.quantised: .venv/.torch constraints.txt
	$(PIP) --upgrade --no-deps --target .venv/quantised bitsandbytes torchao
	@touch $@

.venv/.diffusion: .venv/.torch constraints.txt
	$(PIP) --upgrade --no-deps --target .venv/diffusion diffusers
	@touch $@

# Its compiled operations are left out: none is needed on a CPU.
.venv/.deepspeed: .venv/.torch constraints.txt
	DS_BUILD_OPS=0 $(PIP) --upgrade --no-deps --no-build-isolation --target .venv/deepspeed \
	  deepspeed einops hjson msgpack ninja psutil py-cpuinfo
	@touch $@

clean:
	rm -rf .venv site
