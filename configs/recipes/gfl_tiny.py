# A small student: MobileNetV4-Conv-Small.
_base_ = "./_base_/gfl_student.py"

model = dict(
    backbone=dict(model="mobilenetv4_conv_small"),
    neck=dict(out_channels=96),
    bbox_head=dict(in_channels=96, feat_channels=96, stacked_convs=2),
)
