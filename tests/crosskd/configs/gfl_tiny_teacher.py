# The teacher of the tests: the tiny student with a wider backbone.
_base_ = "./gfl_tiny.py"

model = dict(backbone=dict(base_channels=16), neck=dict(in_channels=[16, 32, 64, 128]))
