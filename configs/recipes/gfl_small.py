# A student of middle size: ResNet-18.
_base_ = "./_base_/gfl_student.py"

model = dict(
    backbone=dict(model="resnet18"),
    neck=dict(out_channels=128),
    bbox_head=dict(in_channels=128, feat_channels=128, stacked_convs=3),
)
