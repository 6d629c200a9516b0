# RetinaNet R50 under Swin-T with CrossKD and PKD, 1x.
_base_ = "./crosskd_retinanet_r50_swint_1x_coco.py"

model = dict(distill=dict(method="crosskd+pkd"))
