# RetinaNet R50 under R101, 2x: AP 37.4 -> 39.7 as published (arXiv 2306.11369).
_base_ = "./retinanet_r50_on_output_2x_coco.py"

model = dict(
    _delete_=True,
    type="CrossKDDetector",
    student={{_base_.model}},
    teacher=dict(
        config="mmdet::retinanet/retinanet_r101_fpn_2x_coco.py",
        checkpoint="https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_2x_coco/retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth",
    ),
    distill=dict(method="crosskd", split=3),
)
