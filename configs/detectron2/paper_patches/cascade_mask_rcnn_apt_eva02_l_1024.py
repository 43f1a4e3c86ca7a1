# The same with the patches of the paper's detection: 16 pixels, 32 and 64 cut at 2 bits, 128 at 0.3. They keep nearly
# all tokens of most photos (docs/THRESHOLDS.md).
from ..cascade_mask_rcnn_apt_eva02_l_1024 import dataloader, lr_multiplier, model, optimizer, train

model.backbone.net.thresholds = (2.0, 2.0, 0.3)
