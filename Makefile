# make demo: the whole job on drawn images, to a report.   make test: the tests.   Both set up .venv by themselves.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-teacher test test-slow test-bindings test-faults check docs bench-bccd clean

help:
	@echo "make demo        train, distil, export, quantise, measure and report on drawn images (6 minutes on 2 cores)"
	@echo "make demo-teacher   the weights of its teacher anew, which are in the repository"
	@echo "make test        the tests that need minutes, not hours; no network, no GPU"
	@echo "make test-slow   the long ones"
	@echo "make test-bindings   builder and runtime against TensorRT's real bindings (downloads 6 MB once; needs g++)"
	@echo "make test-faults damaged inputs, kills, full disks, signals (minutes; FAULTS=\"--inputs 25000 --kills 50\" for more)"
	@echo "make check       formatting, lint, types, import rules"
	@echo "make docs        docs/commands.md, from what the commands say to --help"
	@echo "make bench-bccd  the same job on real images: ../shared/data/bccd"
	@sed -n "s/^## //p" benchmarks/studies/studies.mk

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $$($(PYTHON) --version) found; Python 3.10 or newer is needed. Name one: make PYTHON=python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	@touch $@

EASY_SHAPES := $(BIN)/python -m crosskd.shapes --size 128 --difficulty easy

demo: $(READY)
	$(EASY_SHAPES) demo/easy-shapes --images 1000 --held-out 0.2
	@$(BIN)/python -m crosskd.pipeline configs/demo/crosskd.py --data demo/easy-shapes --teacher-checkpoint configs/demo/teacher.pth -o demo/run; \
		status=$$?; if [ $$status -le 1 ]; then echo; echo "Open demo/run/report.html in a browser."; else exit $$status; fi

demo-teacher: $(READY)
	$(EASY_SHAPES) demo/teacher-shapes --images 2400 --held-out 0.05 --seed 1
	$(BIN)/python -m crosskd.train configs/demo/teacher.py --data demo/teacher-shapes -o demo/teacher
	$(BIN)/python -m configs.demo.half_weights demo/teacher/detector.pth -o configs/demo/teacher.pth

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow --timeout 5400

test-bindings: $(READY)
	$(BIN)/python -m pytest -m slow tests/deploy/tensorrt/test_bindings.py

test-faults: $(READY)
	$(BIN)/python -m tests.faults $(FAULTS) -o benchmarks/results/faults

check: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vermin --quiet --target=3.8- --no-tips --violations deploy calibration benchmarks
	$(BIN)/python tests/tensorrt_api/check_usage.py deploy benchmarks --min 8.5

docs: $(READY)
	$(BIN)/python docs/commands.py

bench-bccd: $(READY)
	$(BIN)/python -m crosskd.pipeline configs/crosskd_gfl_r18_half_r34_320.py --data ../shared/data/bccd -o runs/bccd

include benchmarks/studies/studies.mk

clean:
	rm -rf .venv .venv-modelopt .venv-nncf demo
