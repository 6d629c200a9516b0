# What `make demo` runs: the student under the teacher.
_base_ = "./student.py"

model = dict(
    _delete_=True,
    type="CrossKDDetector",
    student={{_base_.model}},
    teacher=dict(config="teacher.py", checkpoint=None),
    distill=dict(method="crosskd", split=1),
)
# What the student is for: an AP that its user needs, at a speed that the teacher does not have.
report_limits = dict(min_ap=25.0, min_speedup=1.5)
