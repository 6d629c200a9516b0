# GFL R18 under GFL R50, 1x.
_base_ = "./gfl_r18_1x_coco.py"

model = dict(
    _delete_=True,
    type="CrossKDDetector",
    student={{_base_.model}},
    teacher=dict(
        config="mmdet::gfl/gfl_r50_fpn_1x_coco.py",
        checkpoint="https://download.openmmlab.com/mmdetection/v2.0/gfl/gfl_r50_fpn_1x_coco/gfl_r50_fpn_1x_coco_20200629_121244-25944287.pth",
    ),
    distill=dict(method="crosskd", split=3),
)
