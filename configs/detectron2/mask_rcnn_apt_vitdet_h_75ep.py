# Mask R-CNN, adaptive ViTDet-H, COCO at 1024 x 1024, 75 epochs.
from .common.vit_sizes import use_vit_h
from .mask_rcnn_apt_vitdet_b_100ep import dataloader, lr_multiplier, model, optimizer, train

use_vit_h(model, optimizer, train, lr_multiplier)
