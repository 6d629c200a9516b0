# The larger teacher: mmdet's RTMDet-x, trained on COCO.
_base_ = "./_base_/rtmdet.py"

model = dict(
    backbone=dict(deepen_factor=1.33, widen_factor=1.25),
    neck=dict(in_channels=[320, 640, 1280], out_channels=320, num_csp_blocks=4),
    bbox_head=dict(in_channels=320, feat_channels=320),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
load_from = "mmdet::rtmdet/rtmdet_x_8xb32-300e_coco.py"
