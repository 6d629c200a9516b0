# What all recipes share: photos as data, and a training that starts from pretrained weights. `--data` sets the paths,
# the class names and their number.
_base_ = "mmdet::_base_/default_runtime.py"

input_size = (512, 512)  # width, height
pad_value = (104, 116, 124)  # blue, green, red: the mean colour, rounded
flips = "horizontal"  # "all" for images without an up and a down: microscopes, aerial images

train_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="FitJitter", scale=input_size, factors=(0.5, 1.5)),
    dict(type="YOLOXHSVRandomAug"),
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
train_dataloader = dict(
    batch_size=16,
    num_workers=2,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(type="CocoDataset", pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=2,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="CocoDataset", test_mode=True, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoMetric", metric="bbox")
test_evaluator = val_evaluator

# The pipeline chooses the number of epochs by that of the images (crosskd/recipes.py); all else is stretched to it.
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=48, val_interval=4)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0, bypass_duplicate=True),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=2, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", begin=2, end=48, T_max=46, eta_min=1e-5, convert_to_iter_based=True),
]
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=10),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=1),
)
custom_hooks = [dict(type="EMAHook", ema_type="MomentumAnnealingEMA", momentum=0.0002, update_buffers=True)]
