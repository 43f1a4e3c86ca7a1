# UPerNet on an adaptive DINOv2 ViT-B/14, ADE20K at 518 x 518. Weights and uniform twin as for the linear head. All
# outputs pass the final norm, as in DINOv2's own dense heads.
_base_ = [
    "_base_/upernet_apt_vit_b16.py",
    "_base_/ade20k_518.py",
    "_base_/schedule_40k_decay.py",
    "_base_/runtime.py",
]
model = dict(
    data_preprocessor=dict(size=(518, 518)),
    backbone=dict(img_size=518, patch_size=14, init_values=1e-5, final_norm=True, norm_intermediates=True),
    test_cfg=dict(crop_size=(518, 518), stride=(345, 345)),
)
