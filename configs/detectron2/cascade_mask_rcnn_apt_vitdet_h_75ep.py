# Cascade Mask R-CNN, adaptive ViTDet-H, COCO at 1024 x 1024, 75 epochs.
from .common.cascade_heads import use_cascade
from .mask_rcnn_apt_vitdet_h_75ep import dataloader, lr_multiplier, model, optimizer, train

use_cascade(model)
