# The teacher of `make demo`: full width, more epochs.
_base_ = "./student.py"

model = dict(backbone=dict(base_channels=64), neck=dict(in_channels=[64, 128, 256, 512]))

max_epochs = 12
