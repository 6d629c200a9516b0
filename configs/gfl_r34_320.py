# The small teacher: the student's neck and head under a ResNet-34 of full width, trained for longer.
_base_ = "./gfl_r18_half_320.py"

model = dict(backbone=dict(depth=34, base_channels=64), neck=dict(in_channels=[64, 128, 256, 512]))

max_epochs = 40
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type="CosineAnnealingLR",
        by_epoch=True,
        begin=0,
        end=max_epochs,
        T_max=max_epochs,
        eta_min=1e-5,
        convert_to_iter_based=True,
    ),
]
