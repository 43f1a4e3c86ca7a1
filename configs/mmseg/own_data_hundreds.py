# Your own segmentation data, a few hundred images: a linear head on a pretrained ViT. docs/YOUR_DATA.md explains the
# folders. Copy this file or override its lines: --data-root DIR, --cfg-options pretrained=FILE.
_base_ = [
    "_base_/linear_any_vit.py",
    "_base_/own_folders.py",
    "_base_/schedule_2k_slow_backbone.py",
    "_base_/runtime.py",
]
data_root = "data/own"  # with images, masks and classes.txt
pretrained = "timm://vit_small_patch14_dinov2.lvd142m"  # or a file
architecture = None  # of a file that does not tell all: timm's name, such as "vit_small_patch14_dinov2"
image_size = 512  # pixels of the shorter side, and of crops
