# A linear head, adaptive ViT-B/16, ADE20K at 512 x 512.
_base_ = [
    "_base_/linear_apt_vit_b16.py",
    "_base_/ade20k_512.py",
    "_base_/schedule_160k.py",
    "_base_/runtime.py",
]
