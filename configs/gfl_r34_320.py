# The small teacher: the student's neck and head under a ResNet-34 of full width, trained for longer.
_base_ = "./gfl_r18_half_320.py"

model = dict(backbone=dict(depth=34, base_channels=64), neck=dict(in_channels=[64, 128, 256, 512]))

max_epochs = 40
