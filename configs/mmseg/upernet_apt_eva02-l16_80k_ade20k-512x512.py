# UPerNet, adaptive EVA-02-L/16, ADE20K at 512 x 512: the settings of EVA-02's own segmentation model (arXiv 2303.11331),
# with Feature2Pyramid and UPerHead as installed. Weights: model.backbone.pretrained=FILE, where FILE is EVA-02's
# eva02_L_*_p14to16.pt. Files of patches of 14 pixels are resampled first: tools/convert_checkpoint.py --patch-size 16.
# All patches at 16 pixels: --cfg-options model.backbone.thresholds="()".
_base_ = [
    "_base_/upernet_apt_vit_b16.py",
    "_base_/ade20k_512.py",
    "_base_/schedule_80k_decay.py",
    "_base_/runtime.py",
]
model = dict(
    backbone=dict(
        embed_dim=1024,
        depth=24,
        num_heads=16,
        mlp_ratio=4 * 2 / 3,
        mlp_layer="swiglu",
        scale_mlp_norm=True,
        qkv_fused=False,
        k_bias=False,
        rotary=dict(ref_feat_shape=(16, 16)),  # positions are counted on the grid of the pre-training
        out_indices=(7, 11, 15, 23),
        drop_path_rate=0.2,
    ),
    neck=dict(embed_dim=1024),
    decode_head=dict(in_channels=[1024, 1024, 1024, 1024], channels=1024),
    auxiliary_head=dict(in_channels=1024),
)
