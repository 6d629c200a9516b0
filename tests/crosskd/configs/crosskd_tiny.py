# The tiny student under the tiny teacher.
_base_ = "./gfl_tiny.py"

model = dict(
    _delete_=True,
    type="CrossKDDetector",
    student={{_base_.model}},
    teacher=dict(config="gfl_tiny_teacher.py", checkpoint=None),
    distill=dict(method="crosskd", split=1),
)
report_limits = dict(max_ap_drop=5.0)
