"""torchvision host: its detectors on an adaptive ViT, which need nothing but packages from the index.

    model = mask_rcnn(APTViT.from_timm("vit_base_patch16_224.mae", ..., drop_padding=True), num_classes=1 + 80)

``faster_rcnn`` and ``retinanet`` are for data without masks.
"""

from apt_dense.hosts.torchvision.detectors import faster_rcnn, mask_rcnn, retinanet
from apt_dense.hosts.torchvision.pixel_transform import OnlyPaddingIsZero
from apt_dense.hosts.torchvision.pyramid import OneStagePyramid, PyramidBackbone

__all__ = ["OneStagePyramid", "OnlyPaddingIsZero", "PyramidBackbone", "faster_rcnn", "mask_rcnn", "retinanet"]
