# GFL R18 under GFL R50 with CrossKD and PKD, 1x.
_base_ = "./crosskd_gfl_r18_r50_1x_coco.py"

model = dict(distill=dict(method="crosskd+pkd"))
