# UPerNet on an adaptive DINOv3 ViT-B/16, ADE20K at 512 x 512, the backbone fine-tuned. Weights:
# model.backbone.pretrained=FILE, DINOv3's own file, or =timm://vit_base_patch16_dinov3_qkvb.lvd1689m.
# All patches at 16 pixels: model.backbone.thresholds="()".
_base_ = [
    "_base_/upernet_apt_vit_b16.py",
    "_base_/ade20k_512.py",
    "_base_/schedule_40k_decay.py",
    "_base_/runtime.py",
]
model = dict(
    backbone=dict(
        reg_tokens=4,
        use_abs_pos=False,
        rotary=dict(rope_type="dinov3", temperature=100.0, rotate_half=True),
        k_bias=False,
        init_values=1e-5,
        norm_eps=1e-5,
        final_norm=True,
        norm_intermediates=True,
    ),
)
