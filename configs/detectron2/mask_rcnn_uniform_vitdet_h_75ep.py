# The same run with every patch at 16 pixels (Detectron2's own ViTDet), for comparison with the adaptive one.
from .mask_rcnn_apt_vitdet_h_75ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.net.update(thresholds=(), drop_padding=False)
