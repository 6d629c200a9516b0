# GFL R18, 1x: the student of crosskd_gfl_r18_r50_1x_coco.py, alone.
_base_ = "mmdet::gfl/gfl_r50_fpn_1x_coco.py"

model = dict(
    backbone=dict(depth=18, init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet18")),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
