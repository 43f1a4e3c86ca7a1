# Mask R-CNN, adaptive ViTDet-B, COCO at 1024 x 1024, 100 epochs.
from .common.coco_lsj import dataloader
from .common.mask_rcnn_apt import model
from .common.schedule_100ep import lr_multiplier, optimizer, train
