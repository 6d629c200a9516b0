# NanoDet-m under itself in float: for `crosskd.distill --quantize int8`.
_base_ = "./nanodet.py"

model = dict(
    _delete_=True,
    type="CrossKDDetector",
    student={{_base_.model}},
    teacher=dict(config="nanodet.py", checkpoint=None),
    distill=dict(method="crosskd", split=1),
)
