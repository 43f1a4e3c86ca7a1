# The same run with every patch at 16 pixels (EVA-02's own detector), for comparison with the adaptive one.
from .cascade_mask_rcnn_apt_eva02_l_1536 import dataloader, lr_multiplier, model, optimizer, train

model.backbone.net.update(thresholds=(), drop_padding=False)
