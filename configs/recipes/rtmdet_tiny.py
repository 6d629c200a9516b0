# A small student: mmdet's RTMDet-tiny, trained on COCO.
_base_ = "./_base_/rtmdet.py"

model = dict(
    backbone=dict(deepen_factor=0.167, widen_factor=0.375),
    neck=dict(in_channels=[96, 192, 384], out_channels=96, num_csp_blocks=1),
    bbox_head=dict(in_channels=96, feat_channels=96, exp_on_reg=False),
)
load_from = "mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py"
