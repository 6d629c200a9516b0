# NanoDet with half of its backbone's width: a student that can start from ../shared/data/weights/shufflenetv2_x0_5.pth,
# which wants pixels from 0 to 1, and from its teacher's head. To be used from the folder of the checkout.
_base_ = "./nanodet.py"

model = dict(
    data_preprocessor=dict(mean=[0.0, 0.0, 0.0], std=[255.0, 255.0, 255.0]),
    backbone=dict(width="x0_5"),
    neck=dict(in_channels=[48, 96, 192]),
)

max_epochs = 10
