# The teacher of `make bench-distillation` on drawn shapes: full width, more epochs.
_base_ = "./shapes_student.py"

model = dict(backbone=dict(base_channels=64), neck=dict(in_channels=[64, 128, 256, 512]))

max_epochs = 20
train_cfg = dict(val_interval=10)
