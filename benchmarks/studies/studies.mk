# The laboratory: what measures this project itself. Included by the Makefile, whose variables it uses.

## make bench-distillation     what each method of distillation gains, over seeds (hours; goes on where it was cut off)
## make bench-transfer         what pretrained weights gain, alone and distilled, over seeds (two hours; goes on)
## make bench-calibration      what INT8 costs and gains by each method, by INT8-aware training, by other tools (hours; goes on)
## make bench-recipes          what the students of configs/recipes take on this machine, untrained (15 minutes)
## make bench-training-step    the time of a training step, plain and fast (3 minutes on a quiet machine)
## make bench-int8-speed       how much faster INT8 is on this machine, by operator, at which AP (half an hour, most of it trainings)
## make bench-int8-distilled   whether distillation makes a student harder to quantise (an hour after bench-transfer; goes on)

.SECONDARY:  # models on the way are kept
.PHONY: bench-distillation bench-transfer bench-recipes bench-training-step bench-calibration bench-int8-speed bench-int8-distilled

bench-distillation: $(READY)
	$(BIN)/python -m benchmarks.studies.distillation shapes
	$(BIN)/python -m benchmarks.studies.distillation bccd
	$(BIN)/python -m benchmarks.studies.distillation ablations

# One training at a time: their processor time is compared.
TRANSFER := -m benchmarks.studies.distillation --jobs 1 -o benchmarks/results/transfer

bench-transfer: runs/bench/nanodet.pth
	$(BIN)/python $(TRANSFER) transfer-bccd
	$(BIN)/python $(TRANSFER) transfer-coco

# NanoDet-m, trained on COCO, under mmdet's names.
runs/bench/nanodet.pth: | $(READY)
	mkdir -p $(@D)
	$(BIN)/python -m configs.studies.nanodet_detector ../shared/data/weights/nanodet_m_coco_torch_rgb.pth -o $@

bench-recipes: $(READY)
	$(BIN)/python -m benchmarks.studies.recipes --data $(BCCD)

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
	-$(MAKE) .venv-modelopt/.ready .venv-nncf/.ready --keep-going
	$(BIN)/python -m benchmarks.studies.calibration int8-aware configs/studies/nanodet_crosskd.py --data $(COCO) \
		--student $(CALIBRATION)/nanodet --teacher $(CALIBRATION)/nanodet/detector.pth --epochs 10 --learning-rate 1.5e-4 \
		--runs-dir $(CALIBRATION)/int8_aware -o $(RESULTS)/int8_aware
	$(BIN)/python -m benchmarks.studies.calibration methods batchnorm=$(CALIBRATION)/batchnorm.onnx:$(BCCD) \
		groupnorm=$(CALIBRATION)/groupnorm.onnx:$(BCCD) r18=$(CALIBRATION)/r18.onnx:$(BCCD) nanodet=$(CALIBRATION)/nanodet.onnx:$(COCO) \
		--int8-aware batchnorm=$(CALIBRATION)/int8-batchnorm/student.int8.onnx groupnorm=$(CALIBRATION)/int8-groupnorm/student.int8.onnx \
		nanodet=$(CALIBRATION)/int8-nanodet/student.int8.onnx nanodet=$(CALIBRATION)/int8_aware/int8-aware-0/student.int8.onnx \
		--runs-dir $(CALIBRATION)/methods -o $(RESULTS)/methods
	$(BIN)/python -m benchmarks.studies.tools $(CALIBRATION)/batchnorm.onnx --data $(BCCD) \
		--num-images 64 -o $(RESULTS)/tools_bccd
	$(BIN)/python -m benchmarks.studies.tools $(CALIBRATION)/nanodet.onnx --data $(COCO) \
		--num-images 64 -o $(RESULTS)/tools_coco

# Predictors in INT8, too: `calibration.quantize --max-ap-drop` takes them where the budget allows it.
SPEED := r18 half nanodet
DATA_OF_nanodet := $(COCO)
data_of = $(or $(DATA_OF_$(1)),$(BCCD))

bench-int8-speed: $(SPEED:%=$(CALIBRATION)/%.predictors.result.json)
	$(BIN)/python -m benchmarks.studies.operators \
		$(foreach name,$(SPEED),$(name)=$(CALIBRATION)/$(name).onnx:$(CALIBRATION)/$(name).predictors.onnx) --data $(BCCD) -o $(RESULTS)/operators

$(CALIBRATION)/%.predictors.onnx: $(CALIBRATION)/%.onnx
	$(BIN)/python -m calibration.quantize $< --data $(call data_of,$*) --target onnxruntime --int8-predictors -o $@

$(CALIBRATION)/%.result.json: $(CALIBRATION)/%.onnx
	$(BIN)/python -m benchmarks.accuracy $< --data $(call data_of,$*) -o $@

$(CALIBRATION)/%.predictors.result.json: $(CALIBRATION)/%.predictors.onnx $(CALIBRATION)/%.result.json
	$(BIN)/python -m benchmarks.accuracy $< --data $(call data_of,$*) --against $(CALIBRATION)/$*.result.json -o $@

$(CALIBRATION)/half/config.py: | $(READY)
	$(BIN)/python -m crosskd.train configs/gfl_r18_half_320.py --data $(BCCD) --epochs 6 -o $(@D)

# Students of `make bench-transfer` and of `make demo`, quantised.
SEEDS := 0 1 2
DISTILLED := -m benchmarks.studies.calibration distilled

bench-int8-distilled: bench-transfer
	$(BIN)/python -m benchmarks.studies.distillation --jobs 1 -o $(RESULTS) easy --epochs 8
	$(BIN)/python $(DISTILLED) configs/studies/transfer_bccd_crosskd.py --data $(BCCD) --teacher runs/bench/transfer-bccd/teacher/detector.pth \
		--alone $(SEEDS:%=runs/bench/transfer-bccd/pretrained-%) --distilled $(SEEDS:%=runs/bench/transfer-bccd/pretrained-crosskd-%) \
		--epochs 2 --runs-dir $(CALIBRATION)/distilled-bccd -o $(RESULTS)/distilled_bccd
	$(BIN)/python $(DISTILLED) configs/demo/crosskd.py --data runs/bench/easy_data --teacher configs/demo/teacher.pth \
		--alone $(SEEDS:%=runs/bench/easy/none-%) --distilled $(SEEDS:%=runs/bench/easy/crosskd-%) \
		--epochs 2 --runs-dir $(CALIBRATION)/distilled-easy -o $(RESULTS)/distilled_easy

$(CALIBRATION)/teacher/config.py: | $(READY)
	$(BIN)/python -m crosskd.train configs/studies/bccd_teacher.py --data $(BCCD) -o $(@D)

$(CALIBRATION)/r18/config.py: | $(READY)
	$(BIN)/python -m crosskd.train configs/studies/bccd_r18.py --data $(BCCD) -o $(@D)

$(CALIBRATION)/batchnorm/config.py: $(CALIBRATION)/teacher/config.py
	$(BIN)/python -m crosskd.distill configs/studies/bccd_crosskd.py $(UNDER_BCCD) --epochs 10 -o $(@D)

$(CALIBRATION)/groupnorm/config.py: $(CALIBRATION)/teacher/config.py
	$(BIN)/python -m crosskd.distill configs/studies/bccd_crosskd.py $(UNDER_BCCD) --epochs 10 $(GROUP_NORM) -o $(@D)

$(CALIBRATION)/nanodet/config.py: | runs/bench/nanodet.pth
	$(BIN)/python -m crosskd.adopt configs/studies/nanodet.py --data $(COCO) --checkpoint runs/bench/nanodet.pth -o $(@D)

$(CALIBRATION)/int8-batchnorm/config.py: $(CALIBRATION)/batchnorm/config.py
	$(BIN)/python -m crosskd.distill configs/studies/bccd_crosskd.py $(UNDER_BCCD) $(INT8_AWARE) --epochs 3 \
		--from $(CALIBRATION)/batchnorm/student.pth -o $(@D)

$(CALIBRATION)/int8-groupnorm/config.py: $(CALIBRATION)/groupnorm/config.py
	$(BIN)/python -m crosskd.distill configs/studies/bccd_crosskd.py $(UNDER_BCCD) $(INT8_AWARE) --epochs 3 $(GROUP_NORM) \
		--from $(CALIBRATION)/groupnorm/student.pth -o $(@D)

$(CALIBRATION)/int8-nanodet/config.py: $(CALIBRATION)/nanodet/config.py
	$(BIN)/python -m crosskd.distill configs/studies/nanodet_crosskd.py $(UNDER_NANODET) $(INT8_AWARE) \
		--from $(CALIBRATION)/nanodet/detector.pth -o $(@D)

$(CALIBRATION)/%.onnx: $(CALIBRATION)/%/config.py
	$(BIN)/python -m deploy.export $(<D) -o $@

# ModelOpt's own environment; where it cannot be installed, its rows say so.
.venv-modelopt/.ready:
	$(PYTHON) -m venv .venv-modelopt
	.venv-modelopt/bin/pip install --quiet "nvidia-modelopt[onnx]==0.47.*" opencv-python-headless==4.12.0.88
	@touch $@

# NNCF's, likewise.
.venv-nncf/.ready:
	$(PYTHON) -m venv .venv-nncf
	.venv-nncf/bin/pip install --quiet nncf==3.4.0 openvino==2026.4.1 onnx==1.23.2 opencv-python-headless==4.12.0.88
	@touch $@
