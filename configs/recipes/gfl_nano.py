# The smallest student: MobileNetV4-Conv-Small of half width.
_base_ = "./_base_/gfl_student.py"

model = dict(
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),  # as its weights were trained
    backbone=dict(model="mobilenetv4_conv_small_050"),
    neck=dict(out_channels=64),
    bbox_head=dict(in_channels=64, feat_channels=64, stacked_convs=2),
)
