# The student of `make demo`, alone: GFL, ResNet-18 of a quarter of the width, on easy drawn images of 128 x 128 pixels.
_base_ = "../gfl_r18_half_320.py"

model = dict(
    backbone=dict(base_channels=16),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=64, start_level=1, num_outs=4),
    bbox_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(strides=[8, 16, 32, 64])),
)

input_size = (128, 128)  # width, height
val_dataloader = dict(batch_size=16)
test_dataloader = dict(batch_size=16)

max_epochs = 14
train_cfg = dict(val_interval=100)  # only at the end
