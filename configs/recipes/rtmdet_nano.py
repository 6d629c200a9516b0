# The smallest student: MobileNetV4-Conv-Small of half width under RTMDet's neck and head.
_base_ = "./_base_/rtmdet.py"

model = dict(
    data_preprocessor=dict(
        mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], bgr_to_rgb=True
    ),  # as its weights were
    backbone=dict(
        _delete_=True,
        type="TimmBackbone",
        model="mobilenetv4_conv_small_050",
        out_indices=(2, 3, 4),
        pretrained=True,
    ),
    neck=dict(in_channels="backbone", out_channels=64, num_csp_blocks=1),
    bbox_head=dict(in_channels=64, feat_channels=64, exp_on_reg=False),
)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
