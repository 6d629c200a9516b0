# The student of `make bench-distillation` under its teacher; `--set model.distill.method=...` changes the method.
_base_ = "./bccd_student.py"

model = dict(
    _delete_=True,
    type="CrossKDDetector",
    student={{_base_.model}},
    teacher=dict(config="bccd_teacher.py", checkpoint=None),
    distill=dict(method="crosskd", split=1),
)
