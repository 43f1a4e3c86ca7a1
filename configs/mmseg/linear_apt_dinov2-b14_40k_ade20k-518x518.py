# A linear head, adaptive DINOv2 ViT-B/14, ADE20K at 518 x 518 (37 x 37 patches): DINOv2's linear evaluation, but with
# the backbone fine-tuned, which adaptive patches need. Weights: model.backbone.pretrained=FILE, DINOv2's own file, or
# =timm://vit_base_patch14_dinov2.lvd142m. With registers: add model.backbone.reg_tokens=4
# model.backbone.no_embed_class=True. All patches at 14 pixels: model.backbone.thresholds="()".
_base_ = [
    "_base_/linear_apt_vit_b16.py",
    "_base_/ade20k_518.py",
    "_base_/schedule_40k_decay.py",
    "_base_/runtime.py",
]
model = dict(
    data_preprocessor=dict(size=(518, 518)),
    backbone=dict(img_size=518, patch_size=14, init_values=1e-5),
    test_cfg=dict(crop_size=(518, 518), stride=(345, 345)),
)
