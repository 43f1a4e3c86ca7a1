# The same with the patches of the paper's segmentation: 16 and 32 pixels, cut at 5.75 bits (docs/THRESHOLDS.md).
_base_ = "../upernet_apt_vit-b16_160k_ade20k-512x512.py"
model = dict(backbone=dict(thresholds=(5.75,)))
