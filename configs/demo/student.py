# The student of `make demo`, alone: the small student on images of 160 x 160 pixels, trained for minutes only.
_base_ = "../gfl_r18_half_320.py"

input_size = (160, 160)  # width, height
max_epochs = 7
train_cfg = dict(val_interval=20)  # only at the end
