# The teacher of `make demo`: the student with twice the width. Its weights are in teacher.pth, so that no demo has to
# train it: `make demo-teacher` does, on 2,160 images that are drawn from another seed.
_base_ = "./student.py"

model = dict(backbone=dict(base_channels=32), neck=dict(in_channels=[32, 64, 128, 256]))

train_dataloader = dict(batch_size=16)
max_epochs = 10
