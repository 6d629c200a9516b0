# The teacher of `make bench-distillation` on blood cells: twice the student's width, more epochs.
_base_ = "../gfl_r18_half_320.py"

max_epochs = 24
train_cfg = dict(val_interval=10)
