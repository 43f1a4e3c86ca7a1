# Mask R-CNN on an adaptive ViTDet-B: Detectron2's own model with three targets changed.
from detectron2 import model_zoo

from apt_dense.hosts.detectron2 import APTGeneralizedRCNN, APTViT, SimpleFeaturePyramid

model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
model._target_ = APTGeneralizedRCNN  # Detectron2's, without cutting off images larger than square_pad
model.backbone._target_ = SimpleFeaturePyramid
model.backbone.square_pad = "${dataloader.image_size}"
model.backbone.net.update(
    _target_=APTViT,
    # A patch of 32 (64) pixels stays whole where its entropy is below 5.5 (4.0) bits.
    thresholds=(5.5, 4.0),
    # No tokens for the padding to a square.
    drop_padding=True,
    # The format of the model's pixels is set in one place, on the model.
    pixel_mean="${...pixel_mean}",
    pixel_std="${...pixel_std}",
    channel_order="${...input_format}",
)
