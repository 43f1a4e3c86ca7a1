# Cascade Mask R-CNN, adaptive EVA-02-L, COCO at 1024 x 1024, windows of 16 cells.
from .cascade_mask_rcnn_apt_vitdet_b_100ep import dataloader, lr_multiplier, model, optimizer, train
from .common.eva02_sizes import use_eva02_l, use_eva02_schedule

use_eva02_l(model, image_size=1024, window_size=16, global_every=6)
use_eva02_schedule(optimizer, train, lr_multiplier, dataloader, lr=6e-5, batch=144)
