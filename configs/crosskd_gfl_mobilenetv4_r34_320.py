# The edge student on a backbone of timm under the small teacher, a ResNet. Without distillation it is
# gfl_mobilenetv4_320.py, with the same seed and schedule.
_base_ = "./gfl_mobilenetv4_320.py"

model = dict(
    _delete_=True,
    type="CrossKDDetector",
    student={{_base_.model}},
    teacher=dict(config="gfl_r34_320.py", checkpoint=None),
    distill=dict(method="crosskd", split=1),
)
# Of the model that ships, against the teacher: points of AP, times.
report_limits = dict(max_ap_drop=5.0, min_speedup=2.0)
