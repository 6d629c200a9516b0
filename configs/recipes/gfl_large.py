# The larger teacher: ResNet-101, as mmdet trained it on COCO.
_base_ = "./_base_/gfl.py"

model = dict(backbone=dict(depth=101))
optim_wrapper = dict(optimizer=dict(lr=2e-4))
load_from = "mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py"
