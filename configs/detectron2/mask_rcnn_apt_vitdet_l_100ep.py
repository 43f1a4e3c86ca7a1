# Mask R-CNN, adaptive ViTDet-L, COCO at 1024 x 1024, 100 epochs.
from .common.vit_sizes import use_vit_l
from .mask_rcnn_apt_vitdet_b_100ep import dataloader, lr_multiplier, model, optimizer, train

use_vit_l(model, optimizer, train)
