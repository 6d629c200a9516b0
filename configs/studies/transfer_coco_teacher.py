# The teacher of `make bench-transfer` on photos: NanoDet-m, trained on COCO, fine-tuned. To be used from the folder of
# the checkout. It knows such photos already: a few epochs at a low rate, for the smaller images.
_base_ = "./nanodet.py"

load_from = "runs/bench/nanodet.pth"  # made by configs.studies.nanodet_detector
input_size = (256, 256)  # width, height
optim_wrapper = dict(optimizer=dict(lr=1e-4))
max_epochs = 4
