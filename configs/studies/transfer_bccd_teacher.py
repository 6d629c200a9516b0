# The teacher of `make bench-transfer` on blood cells: NanoDet-m, trained on COCO, fine-tuned. To be used from the
# folder of the checkout.
_base_ = "./nanodet.py"

load_from = "runs/bench/nanodet.pth"  # made by configs.studies.nanodet_detector
input_size = (256, 192)  # width, height
optim_wrapper = dict(optimizer=dict(lr=5e-4))
max_epochs = 12
