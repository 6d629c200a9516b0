# A student with attention, alone: GFL on Swin-T with the neck and head of gfl_r18_half_320.py. Its fully connected
# layers run in INT8; softmax, norms and GELU are float. Stochastic depth is off, as training with INT8 needs it.
_base_ = "./gfl_r18_half_320.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="SwinTransformer",
        embed_dims=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=0.0,
        convert_weights=True,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth",
        ),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
