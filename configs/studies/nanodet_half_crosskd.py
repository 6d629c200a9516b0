# NanoDet of half width under NanoDet-m, trained on COCO.
_base_ = "./nanodet_half.py"

model = dict(
    _delete_=True,
    type="CrossKDDetector",
    student={{_base_.model}},
    teacher=dict(config="nanodet.py", checkpoint=None),
    distill=dict(method="crosskd", split=1),
)
