# The student of `make bench-transfer` on photos, under its teacher; what it starts from is said by --from.
_base_ = "./nanodet_half_crosskd.py"

model = dict(teacher=dict(config="transfer_coco_teacher.py"))
input_size = (256, 256)  # width, height
max_epochs = 5
