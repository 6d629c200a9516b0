# GFL R50 under GFL R101 with CrossKD and PKD, 1x: AP 40.2 -> 43.9 as published (arXiv 2306.11369).
_base_ = "./crosskd_gfl_r50_r101_1x_coco.py"

model = dict(distill=dict(method="crosskd+pkd"))
