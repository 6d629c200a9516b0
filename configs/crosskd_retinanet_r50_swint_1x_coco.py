# RetinaNet R50 under Swin-T, 1x: AP 36.5 -> 38.0 as published (arXiv 2306.11369). mmdet publishes no checkpoint of
# this teacher: train it (`crosskd.train mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py`), give --teacher-checkpoint.
_base_ = "./retinanet_r50_on_output_1x_coco.py"

model = dict(
    _delete_=True,
    type="CrossKDDetector",
    student={{_base_.model}},
    teacher=dict(
        config="mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py",
        checkpoint=None,
    ),
    distill=dict(method="crosskd", split=3),
)
