# UPerNet on an adaptive EVA-02-L/16 (arXiv 2303.11331): SwiGLU with a norm inside, keys without a bias, rotary
# positions.
_base_ = "upernet_apt_vit_b16.py"
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
        rotary=dict(ref_feat_shape=(16, 16)),  # positions are scaled to the grid of the pre-training
        out_indices=(7, 11, 15, 23),
        drop_path_rate=0.2,
    ),
    neck=dict(embed_dim=1024),
    decode_head=dict(in_channels=[1024, 1024, 1024, 1024], channels=1024),
    auxiliary_head=dict(in_channels=1024),
)
