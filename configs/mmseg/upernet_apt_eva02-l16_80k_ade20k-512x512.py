# UPerNet, adaptive EVA-02-L/16, ADE20K at 512 x 512, with the settings of EVA-02's own segmentation model (arXiv
# 2303.11331) and MMSeg's Feature2Pyramid and UPerHead. Weights: model.backbone.pretrained=FILE, where FILE is EVA-02's
# eva02_L_*_p14to16.pt. Resample files of patches of 14 pixels first: tools/convert_checkpoint.py --patch-size 16.
# All patches at 16 pixels: --cfg-options model.backbone.thresholds="()".
_base_ = [
    "_base_/upernet_apt_eva02_l16.py",
    "_base_/ade20k_512.py",
    "_base_/schedule_80k_decay.py",
    "_base_/runtime.py",
]
