# ATSS R50 under R101, 1x: AP 39.4 -> 41.8 as published (arXiv 2306.11369).
_base_ = "mmdet::atss/atss_r50_fpn_1x_coco.py"

model = dict(
    _delete_=True,
    type="CrossKDDetector",
    student={{_base_.model}},
    teacher=dict(
        config="mmdet::atss/atss_r101_fpn_1x_coco.py",
        checkpoint="https://download.openmmlab.com/mmdetection/v2.0/atss/atss_r101_fpn_1x_coco/atss_r101_fpn_1x_20200825-dfcadd6f.pth",
    ),
    distill=dict(method="crosskd", split=3),
)
