# The student of `make bench-distillation` on drawn shapes: GFL, ResNet-18 of a quarter of the width, four tower layers,
# images of 128 x 128 pixels. Small and trained briefly, so that there is something to gain.
_base_ = "../demo/student.py"

model = dict(
    backbone=dict(base_channels=16),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=64, start_level=1, num_outs=4),
    bbox_head=dict(in_channels=64, feat_channels=64, stacked_convs=4, anchor_generator=dict(strides=[8, 16, 32, 64])),
)

input_size = (128, 128)  # width, height
pad_value = (104, 116, 124)  # blue, green, red
train_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="FitResize", scale=input_size),
    dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"]),
    dict(type="FitPad", size=input_size, pad_value=pad_value),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="FitResize", scale=input_size),
    dict(type="FitPad", size=input_size, pad_value=pad_value),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(batch_size=16, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=16, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

max_epochs = 16
train_cfg = dict(val_interval=100)  # only at the end
