# make demo: the whole job on drawn images, to a report.   make test: the tests.   Both set up .venv by themselves.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-bindings check docs bench-bccd bench-distillation bench-training-step \
	bench-calibration clean

help:
	@echo "make demo        train, distil, export, quantise, measure and report on drawn images (6 to 8 minutes on 2 cores)"
	@echo "make test        the tests that need minutes, not hours; no network, no GPU"
	@echo "make test-slow   the long ones"
	@echo "make test-bindings   builder and runtime against TensorRT's real bindings (downloads 6 MB once; needs g++)"
	@echo "make check       formatting, lint, types, import rules"
	@echo "make docs        docs/commands.md, from what the commands say to --help"
	@echo "make bench-bccd  the same job on real images: ../shared/data/bccd"
	@echo "make bench-distillation   what each method of distillation gains, over seeds (hours; goes on where it was cut off)"
	@echo "make bench-calibration    what INT8 costs and gains by each method, by INT8-aware training, by other tools (hours; goes on)"
	@echo "make bench-training-step  the time of a training step, plain and fast (3 minutes on a quiet machine)"

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $$($(PYTHON) --version) found; Python 3.10 or newer is needed. Name one: make PYTHON=python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	@touch $@

demo: $(READY)
	$(BIN)/python -m crosskd.shapes demo/shapes --images 400 --size 160
	@$(BIN)/python -m crosskd.pipeline configs/demo/crosskd.py --data demo/shapes -o demo/run; status=$$?; \
		if [ $$status -le 1 ]; then echo; echo "Open demo/run/report.html in a browser."; else exit $$status; fi

test: $(READY)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow --timeout 5400

test-bindings: $(READY)
	$(BIN)/python -m pytest -m slow tests/deploy/tensorrt/test_bindings.py

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

bench-distillation: $(READY)
	$(BIN)/python -m benchmarks.studies.distillation shapes
	$(BIN)/python -m benchmarks.studies.distillation bccd
	$(BIN)/python -m benchmarks.studies.distillation ablations

bench-training-step: $(READY)
	$(BIN)/python -m benchmarks.studies.training_step --threads 2 --steps 4 --rounds 3 -o benchmarks/results/training_step/cpu.json

# What INT8 costs and gains: models, INT8-aware students, then three tables. A run that has ended has its config.py.
CALIBRATION := runs/bench/calibration
RESULTS := benchmarks/results/calibration
BCCD := ../shared/data/bccd
COCO := ../shared/data/coco_open
UNDER_BCCD := --data $(BCCD) --teacher-checkpoint $(CALIBRATION)/teacher/detector.pth
UNDER_NANODET := --data $(COCO) --teacher-checkpoint $(CALIBRATION)/nanodet/detector.pth
GROUP_NORM := --set "model.student.bbox_head.norm_cfg={'type':'GN','num_groups':32,'requires_grad':True}"
INT8_AWARE := --quantize int8 --target onnxruntime

bench-calibration: $(CALIBRATION)/batchnorm.onnx $(CALIBRATION)/groupnorm.onnx $(CALIBRATION)/r18.onnx $(CALIBRATION)/nanodet.onnx \
		$(CALIBRATION)/int8-batchnorm/config.py $(CALIBRATION)/int8-groupnorm/config.py $(CALIBRATION)/int8-nanodet/config.py
	-$(MAKE) .venv-modelopt/.ready
	$(BIN)/python -m benchmarks.studies.calibration int8-aware configs/bench/nanodet_crosskd.py --data $(COCO) \
		--student $(CALIBRATION)/nanodet --teacher $(CALIBRATION)/nanodet/detector.pth --epochs 10 --learning-rate 1.5e-4 \
		--runs-dir $(CALIBRATION)/int8_aware -o $(RESULTS)/int8_aware
	$(BIN)/python -m benchmarks.studies.calibration methods batchnorm=$(CALIBRATION)/batchnorm.onnx:$(BCCD) \
		groupnorm=$(CALIBRATION)/groupnorm.onnx:$(BCCD) r18=$(CALIBRATION)/r18.onnx:$(BCCD) nanodet=$(CALIBRATION)/nanodet.onnx:$(COCO) \
		--int8-aware batchnorm=$(CALIBRATION)/int8-batchnorm/student.int8.onnx groupnorm=$(CALIBRATION)/int8-groupnorm/student.int8.onnx \
		nanodet=$(CALIBRATION)/int8-nanodet/student.int8.onnx nanodet=$(CALIBRATION)/int8_aware/int8-aware-0/student.int8.onnx \
		--runs-dir $(CALIBRATION)/methods -o $(RESULTS)/methods
	$(BIN)/python -m benchmarks.studies.tools $(CALIBRATION)/batchnorm.onnx --data $(BCCD) \
		--num-images 64 --modelopt-python .venv-modelopt/bin/python -o $(RESULTS)/tools_bccd
	$(BIN)/python -m benchmarks.studies.tools $(CALIBRATION)/nanodet.onnx --data $(COCO) \
		--num-images 64 --modelopt-python .venv-modelopt/bin/python -o $(RESULTS)/tools_coco

$(CALIBRATION)/teacher/config.py: | $(READY)
	$(BIN)/python -m crosskd.train configs/bench/bccd_teacher.py --data $(BCCD) -o $(@D)

$(CALIBRATION)/r18/config.py: | $(READY)
	$(BIN)/python -m crosskd.train configs/bench/bccd_r18.py --data $(BCCD) -o $(@D)

$(CALIBRATION)/batchnorm/config.py: $(CALIBRATION)/teacher/config.py
	$(BIN)/python -m crosskd.distill configs/bench/bccd_crosskd.py $(UNDER_BCCD) --epochs 10 -o $(@D)

$(CALIBRATION)/groupnorm/config.py: $(CALIBRATION)/teacher/config.py
	$(BIN)/python -m crosskd.distill configs/bench/bccd_crosskd.py $(UNDER_BCCD) --epochs 10 $(GROUP_NORM) -o $(@D)

$(CALIBRATION)/nanodet/config.py: | $(READY)
	mkdir -p $(CALIBRATION)
	$(BIN)/python -m configs.bench.nanodet_detector ../shared/data/weights/nanodet_m_coco_torch_rgb.pth -o $(CALIBRATION)/nanodet.pth
	$(BIN)/python -m crosskd.adopt configs/bench/nanodet.py --data $(COCO) --checkpoint $(CALIBRATION)/nanodet.pth -o $(@D)

$(CALIBRATION)/int8-batchnorm/config.py: $(CALIBRATION)/batchnorm/config.py
	$(BIN)/python -m crosskd.distill configs/bench/bccd_crosskd.py $(UNDER_BCCD) $(INT8_AWARE) --epochs 3 \
		--from $(CALIBRATION)/batchnorm/student.pth -o $(@D)

$(CALIBRATION)/int8-groupnorm/config.py: $(CALIBRATION)/groupnorm/config.py
	$(BIN)/python -m crosskd.distill configs/bench/bccd_crosskd.py $(UNDER_BCCD) $(INT8_AWARE) --epochs 3 $(GROUP_NORM) \
		--from $(CALIBRATION)/groupnorm/student.pth -o $(@D)

$(CALIBRATION)/int8-nanodet/config.py: $(CALIBRATION)/nanodet/config.py
	$(BIN)/python -m crosskd.distill configs/bench/nanodet_crosskd.py $(UNDER_NANODET) $(INT8_AWARE) \
		--from $(CALIBRATION)/nanodet/detector.pth -o $(@D)

$(CALIBRATION)/%.onnx: $(CALIBRATION)/%/config.py
	$(BIN)/python -m deploy.export $(<D) -o $@

# ModelOpt's own environment; where it cannot be installed, its rows say so.
.venv-modelopt/.ready:
	$(PYTHON) -m venv .venv-modelopt
	.venv-modelopt/bin/pip install --quiet "nvidia-modelopt[onnx]==0.47.*" opencv-python-headless==4.12.0.88
	@touch $@

clean:
	rm -rf .venv .venv-modelopt demo
