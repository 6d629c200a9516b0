# The teacher of `make demo`: one and a half times the width, more epochs.
_base_ = "./student.py"

model = dict(backbone=dict(base_channels=48), neck=dict(in_channels=[48, 96, 192, 384]))

max_epochs = 11
