# The largest student: MobileNetV4-Conv-Medium.
_base_ = "./_base_/gfl_student.py"

model = dict(
    backbone=dict(model="mobilenetv4_conv_medium"),
    neck=dict(out_channels=192),
    bbox_head=dict(in_channels=192, feat_channels=192, stacked_convs=4),
)
