# COCO with large-scale jitter: flip, scale by 0.1 to 2, crop. The model pads images smaller than the crop.
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
# Pixels of a side, for training, testing and the model's padding.
dataloader.image_size = 1024

_size = "${dataloader.image_size}"
dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(horizontal=True),
    L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=_size, target_width=_size),
    L(T.FixedSizeCrop)(crop_size=(_size, _size), pad=False),
]
dataloader.train.mapper.image_format = "RGB"
# Cropping cuts masks, so boxes are computed from them again.
dataloader.train.mapper.recompute_boxes = True
dataloader.train.total_batch_size = 64

dataloader.test.mapper.augmentations = [L(T.ResizeShortestEdge)(short_edge_length=_size, max_size=_size)]
# Given, because Detectron2 cannot infer them from the predictions of a model that does not find anything yet.
dataloader.evaluator.tasks = ("bbox", "segm")
