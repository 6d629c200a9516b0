# The teacher for most: ResNet-50, as mmdet trained it on COCO.
_base_ = "./_base_/gfl.py"

optim_wrapper = dict(optimizer=dict(lr=2e-4))
load_from = "mmdet::gfl/gfl_r50_fpn_ms-2x_coco.py"
