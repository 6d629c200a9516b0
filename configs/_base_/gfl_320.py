# mmdet's GFL with the data, schedule and optimiser of the small models: images fit into 320 x 256 pixels, trained from
# scratch, quick enough for a CPU.
# `--data` sets the paths, the class names and their number.
_base_ = "mmdet::gfl/gfl_r50_fpn_1x_coco.py"

# A head with BatchNorm is shared by all levels, and so is its running mean: trained on the statistics of each level,
# run on their mixture. Norms in the neck bring the levels to one scale (bccd, 6 epochs: AP 51.5 with them; 40.5 without
# after 25), and at the end the head is trained as it will be run (custom_hooks).
model = dict(neck=dict(norm_cfg=dict(type="BN")))

input_size = (320, 256)  # width, height
pad_value = (104, 116, 124)  # blue, green, red: the mean colour, rounded

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
train_dataloader = dict(
    _delete_=True,
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(type="CocoDataset", pipeline=train_pipeline),
)
val_dataloader = dict(
    _delete_=True,
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="CocoDataset", test_mode=True, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(_delete_=True, type="CocoMetric", metric="bbox")
test_evaluator = val_evaluator

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=25, val_interval=5)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",  # its precision is measured: see --precision
    optimizer=dict(type="AdamW", lr=1.5e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", begin=0, end=25, T_max=25, eta_min=1e-5, convert_to_iter_based=True),
]
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=10),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=1),
)
custom_hooks = [dict(type="FreezeHeadNormsHook", begin=0.6)]
