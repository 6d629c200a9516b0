# The student of `make bench-distillation` on blood cells: the small student with a ResNet-18 of a quarter of the width,
# trained briefly.
_base_ = "../gfl_r18_half_320.py"

model = dict(backbone=dict(base_channels=16), neck=dict(in_channels=[16, 32, 64, 128]))

max_epochs = 5
train_cfg = dict(val_interval=100)  # only at the end
