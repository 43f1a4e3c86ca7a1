# Your own segmentation data, a few ten thousand images: UPerNet on a pretrained ViT. As own_data_hundreds.py otherwise.
_base_ = [
    "_base_/upernet_any_vit.py",
    "_base_/own_folders.py",
    "_base_/schedule_40k_slow_backbone.py",
    "_base_/runtime.py",
]
data_root = "data/own"  # with images, masks and classes.txt
pretrained = "timm://vit_base_patch14_dinov2.lvd142m"  # or a file
architecture = None  # of a file that does not tell all: timm's name, such as "vit_base_patch14_dinov2"
image_size = 512  # pixels of the shorter side, and of crops
train_dataloader = dict(batch_size=8)
