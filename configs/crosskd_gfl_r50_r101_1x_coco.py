# GFL R50 under GFL R101, 1x: AP 40.2 -> 43.7 as published (arXiv 2306.11369, table 5).
_base_ = "mmdet::gfl/gfl_r50_fpn_1x_coco.py"

model = dict(
    _delete_=True,
    type="CrossKDDetector",
    student={{_base_.model}},
    teacher=dict(
        config="mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py",
        checkpoint="https://download.openmmlab.com/mmdetection/v2.0/gfl/gfl_r101_fpn_mstrain_2x_coco/gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth",
    ),
    distill=dict(method="crosskd", split=3),
)
