# NanoDet-m, trained on COCO, for INT8-aware fine-tuning (`make bench-calibration`): it loses more by INT8 than a ResNet
# does. To be used from the folder of the checkout.
_base_ = "../_base_/gfl_320.py"

custom_imports = dict(imports=["configs.studies.nanodet_detector"])

model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(_delete_=True, type="NanoDetBackbone"),
    neck=dict(_delete_=True, type="NanoDetPAN", in_channels=[116, 232, 464], out_channels=96),
    bbox_head=dict(
        type="NanoDetHead",
        in_channels=96,
        feat_channels=96,
        stacked_convs=2,
        reg_max=7,
        norm_cfg=dict(type="BN"),
        anchor_generator=dict(octave_base_scale=5, strides=[8, 16, 32], center_offset=0.5),
    ),
)

input_size = (320, 320)  # width, height
pad_value = (0, 0, 0)
train_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="FitResize", scale=input_size),
    dict(type="RandomFlip", prob=0.5),
    dict(type="FitPad", size=input_size, pad_value=pad_value),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="FitResize", scale=input_size),
    dict(type="FitPad", size=input_size, pad_value=pad_value),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

max_epochs = 40
train_cfg = dict(val_interval=100)  # only at the end
