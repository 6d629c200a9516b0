# The teacher for most: mmdet's RTMDet-l, trained on COCO.
_base_ = "./_base_/rtmdet.py"

model = dict(
    backbone=dict(deepen_factor=1, widen_factor=1),
    neck=dict(in_channels=[256, 512, 1024], out_channels=256, num_csp_blocks=3),
    bbox_head=dict(in_channels=256, feat_channels=256),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
load_from = "mmdet::rtmdet/rtmdet_l_8xb32-300e_coco.py"
