# The same with the patches of the paper's detection: 16 pixels, 32 and 64 cut at 2 bits, 128 at 0.3. They keep nearly
# all tokens of most photos (docs/THRESHOLDS.md).
from ..mask_rcnn_apt_vitdet_b_100ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.net.thresholds = (2.0, 2.0, 0.3)
