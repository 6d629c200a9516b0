# What `make demo` runs: the student under the teacher.
_base_ = "./student.py"

model = dict(
    _delete_=True,
    type="CrossKDDetector",
    student={{_base_.model}},
    teacher=dict(config="teacher.py", checkpoint=None),
    distill=dict(method="crosskd", split=1),
)
# Of the model that ships, against the teacher; and an AP that a training of minutes does not reach: the demo says so.
report_limits = dict(max_ap_drop=10.0, min_speedup=1.5, min_ap=20.0)
