# A student of the usual size on blood cells: GFL, ResNet-18, 256 channels, four tower layers, with BatchNorm in its
# head. `make bench-calibration` times its INT8.
_base_ = "../gfl_r18_half_320.py"

model = dict(
    backbone=dict(base_channels=64),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=256, start_level=1),
    bbox_head=dict(
        in_channels=256,
        feat_channels=256,
        stacked_convs=4,
        anchor_generator=dict(strides=[8, 16, 32, 64, 128]),
    ),
)

max_epochs = 10
train_cfg = dict(val_interval=100)  # only at the end
