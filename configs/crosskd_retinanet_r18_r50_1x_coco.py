# RetinaNet R18 under R50, 1x.
_base_ = "./retinanet_r18_on_output_1x_coco.py"

model = dict(
    _delete_=True,
    type="CrossKDDetector",
    student={{_base_.model}},
    teacher=dict(
        config="mmdet::retinanet/retinanet_r50_fpn_1x_coco.py",
        checkpoint="https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r50_fpn_1x_coco/retinanet_r50_fpn_1x_coco_20200130-c2398f9e.pth",
    ),
    distill=dict(method="crosskd", split=3),
)
