# A student of depthwise convolutions on blood cells, which lose more by INT8 than others: for `make bench-calibration`.
_base_ = "../gfl_mobilenetv4_320.py"

max_epochs = 20
train_cfg = dict(val_interval=100)  # only at the end
