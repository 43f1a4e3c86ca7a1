# The same with ViT-L/14.
_base_ = "linear_apt_dinov2-b14_40k_ade20k-518x518.py"
model = dict(
    backbone=dict(embed_dim=1024, depth=24, num_heads=16, out_indices=(23,)),
    decode_head=dict(in_channels=1024, channels=1024),
)
optim_wrapper = dict(paramwise_cfg=dict(num_layers=24, decay_rate=0.9))
