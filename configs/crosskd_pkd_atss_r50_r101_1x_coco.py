# ATSS R50 under R101 with CrossKD and PKD, 1x: AP 39.4 -> 41.8 as published (arXiv 2306.11369).
_base_ = "./crosskd_atss_r50_r101_1x_coco.py"

model = dict(distill=dict(method="crosskd+pkd"))
