# The same with ViT-L/16.
_base_ = "upernet_apt_dinov3-b16_40k_ade20k-512x512.py"
model = dict(
    backbone=dict(embed_dim=1024, depth=24, num_heads=16, out_indices=(5, 11, 17, 23)),
    neck=dict(embed_dim=1024),
    decode_head=dict(in_channels=[1024, 1024, 1024, 1024]),
    auxiliary_head=dict(in_channels=1024),
)
optim_wrapper = dict(paramwise_cfg=dict(num_layers=24, decay_rate=0.9))
