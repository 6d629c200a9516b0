# The student of depthwise convolutions under the teacher of `make bench-distillation`.
_base_ = "./bccd_mobilenetv4.py"

model = dict(
    _delete_=True,
    type="CrossKDDetector",
    student={{_base_.model}},
    teacher=dict(config="bccd_teacher.py", checkpoint=None),
    distill=dict(method="crosskd", split=1),
)
