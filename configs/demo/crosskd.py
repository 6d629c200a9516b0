# What `make demo` runs: the student under the teacher.
_base_ = "./student.py"

model = dict(
    _delete_=True,
    type="CrossKDDetector",
    student={{_base_.model}},
    teacher=dict(config="teacher.py", checkpoint=None),
    distill=dict(method="crosskd", split=1),
)
report_limits = dict(max_ap_drop=12.0, min_speedup=2.0, min_ap=25.0)
