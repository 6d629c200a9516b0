# An edge student on a backbone of timm, alone: GFL on MobileNetV4-Conv-Small with the neck and head of
# gfl_r18_half_320.py. It has convolutions, ReLU and additions only, which all run in INT8: no squeeze-excitation and no
# h-swish as in MobileNetV3, LCNet and EfficientNet. For another model of timm change `model`; the neck follows.
_base_ = "./gfl_r18_half_320.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="TimmBackbone",
        model="mobilenetv4_conv_small",
        out_indices=(1, 2, 3, 4),  # strides 4, 8, 16, 32
    ),
    neck=dict(in_channels="backbone"),
)
