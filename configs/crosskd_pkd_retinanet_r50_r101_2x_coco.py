# RetinaNet R50 under R101 with CrossKD and PKD, 2x: AP 37.4 -> 39.8 as published (arXiv 2306.11369).
_base_ = "./crosskd_retinanet_r50_r101_2x_coco.py"

model = dict(distill=dict(method="crosskd+pkd"))
