# FCOS R50 under R101 with CrossKD and PKD, 2x, multi-scale: AP 38.5 -> 41.3 as published (arXiv 2306.11369).
_base_ = "./crosskd_fcos_r50_r101_2x_coco.py"

model = dict(distill=dict(method="crosskd+pkd"))
