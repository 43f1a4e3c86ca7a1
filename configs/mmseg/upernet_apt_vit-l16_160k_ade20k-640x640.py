# UPerNet, adaptive ViT-L/16, ADE20K at 640 x 640: the usual settings for large pre-trained ViTs (MAE, BEiT).
_base_ = [
    "_base_/upernet_apt_vit_b16.py",
    "_base_/ade20k_640.py",
    "_base_/schedule_160k.py",
    "_base_/runtime.py",
]
model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(
        img_size=640,
        embed_dim=1024,
        depth=24,
        num_heads=16,
        out_indices=(7, 11, 15, 23),
        drop_path_rate=0.2,
    ),
    neck=dict(embed_dim=1024),
    decode_head=dict(in_channels=[1024, 1024, 1024, 1024]),
    auxiliary_head=dict(in_channels=1024),
    test_cfg=dict(crop_size=(640, 640), stride=(426, 426)),
)
optim_wrapper = dict(
    optimizer=dict(lr=2e-5, weight_decay=0.05),
    # Layer-wise decay: block i of 24 learns at lr * 0.9 ** (24 - i), so early, general features change least. MMSeg's
    # own constructor only accepts backbones named BEiT or MAE.
    constructor="APTLearningRateDecayOptimWrapperConstructor",
    paramwise_cfg=dict(_delete_=True, num_layers=24, decay_rate=0.9, decay_type="layer_wise"),
)
