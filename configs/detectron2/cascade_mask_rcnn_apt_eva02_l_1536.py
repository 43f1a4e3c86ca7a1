# Cascade Mask R-CNN, adaptive EVA-02-L, COCO at 1536 x 1536, windows of 32 cells and twice as many global blocks.
from .cascade_mask_rcnn_apt_vitdet_b_100ep import dataloader, lr_multiplier, model, optimizer, train
from .common.eva02_sizes import use_eva02_l, use_eva02_schedule

dataloader.image_size = 1536
use_eva02_l(model, image_size=1536, window_size=32, global_every=3)
use_eva02_schedule(optimizer, train, lr_multiplier, dataloader, lr=5e-5, batch=128)
model.backbone.net.use_act_checkpoint = True
