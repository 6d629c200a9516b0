# Students of GFL: a backbone of timm, trained on ImageNet; neck and head with BatchNorm, which INT8 can run.
_base_ = "./gfl.py"

model = dict(
    backbone=dict(_delete_=True, type="TimmBackbone", out_indices=(2, 3, 4), pretrained=True),  # strides 8, 16, 32
    neck=dict(in_channels="backbone", start_level=0),
)
batchnorm_head = True
