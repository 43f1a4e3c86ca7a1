# Cascade Mask R-CNN, adaptive ViTDet-L, COCO at 1024 x 1024, 100 epochs.
from .common.cascade_heads import use_cascade
from .mask_rcnn_apt_vitdet_l_100ep import dataloader, lr_multiplier, model, optimizer, train

use_cascade(model)
