# The small student made as small as the tests need it: 96 x 64 pixels, 8 to 64 channels, one epoch.
_base_ = "../../../configs/gfl_r18_half_320.py"

model = dict(
    backbone=dict(base_channels=8),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    bbox_head=dict(in_channels=16, feat_channels=16),
    test_cfg=dict(score_thr=0.001),  # little is surer than that after one epoch
)

input_size = (96, 64)  # width, height
pad_value = (104, 116, 124)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="FitResize", scale=input_size),
    dict(type="FitPad", size=input_size, pad_value=pad_value),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="FitResize", scale=input_size),
    dict(type="FitPad", size=input_size, pad_value=pad_value),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(type="Bf16OptimWrapper")  # named, so that no test waits for a measurement
max_epochs = 1
train_cfg = dict(val_interval=1)
