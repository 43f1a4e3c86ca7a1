# A linear head, adaptive DINOv2 ViT-S/14, CamVid at 364 x 476. Weights: model.backbone.pretrained=FILE, DINOv2's own
# file, or =timm://vit_small_patch14_dinov2.lvd142m. One coarse scale: images are small, patches of 56 pixels rare.
_base_ = [
    "_base_/linear_apt_vit_b16.py",
    "_base_/camvid_364x476.py",
    "_base_/schedule_2k_fast_head.py",
    "_base_/runtime.py",
]
model = dict(
    data_preprocessor=dict(size=(364, 476)),
    backbone=dict(
        img_size=(364, 476),
        patch_size=14,
        embed_dim=384,
        num_heads=6,
        init_values=1e-5,
        thresholds=(5.5,),
        drop_path_rate=0.0,
    ),
    decode_head=dict(in_channels=384, channels=384, num_classes=11),
    test_cfg=dict(_delete_=True, mode="whole"),
)
