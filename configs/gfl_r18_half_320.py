# The small student, alone: GFL, ResNet-18 of half width, two tower layers with BatchNorm (GroupNorm cannot run in
# INT8).
_base_ = "./_base_/gfl_320.py"

model = dict(
    backbone=dict(
        depth=18,
        base_channels=32,
        frozen_stages=-1,
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=96, start_level=0, num_outs=5),
    bbox_head=dict(
        in_channels=96,
        feat_channels=96,
        stacked_convs=2,
        norm_cfg=dict(type="BN", requires_grad=True),
        anchor_generator=dict(strides=[4, 8, 16, 32, 64]),
    ),
)
