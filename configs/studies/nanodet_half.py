# NanoDet with half of its backbone's width, whose weights (../shared/data/weights/shufflenetv2_x0_5.pth) want pixels from
# 0 to 1: the student of `make bench-transfer`. To be used from the folder of the checkout.
_base_ = "./nanodet.py"

model = dict(
    data_preprocessor=dict(mean=[0.0, 0.0, 0.0], std=[255.0, 255.0, 255.0]),
    backbone=dict(width="x0_5"),
    neck=dict(in_channels=[48, 96, 192]),
)

max_epochs = 10
