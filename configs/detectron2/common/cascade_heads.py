# Cascade R-CNN's three stages of box heads in place of Mask R-CNN's one.
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNConvFCHead, FastRCNNOutputLayers
from omegaconf import DictConfig


def box_head() -> DictConfig:
    shape = ShapeSpec(channels=256, height=7, width=7)
    return L(FastRCNNConvFCHead)(input_shape=shape, conv_dims=[256] * 4, fc_dims=[1024], conv_norm="LN")


def box_predictor(centre: float, size: float) -> DictConfig:
    return L(FastRCNNOutputLayers)(
        input_shape=ShapeSpec(channels=1024),
        test_score_thresh=0.05,
        box2box_transform=L(Box2BoxTransform)(weights=(centre, centre, size, size)),
        cls_agnostic_bbox_reg=True,
        num_classes="${...num_classes}",
    )


def matcher(overlap: float) -> DictConfig:
    return L(Matcher)(thresholds=[overlap], labels=[0, 1], allow_low_quality_matches=False)


def use_cascade(model: DictConfig) -> None:
    for key in ("box_head", "box_predictor", "proposal_matcher"):
        model.roi_heads.pop(key)
    model.roi_heads.update(
        _target_=CascadeROIHeads,
        box_heads=[box_head() for _ in range(3)],
        box_predictors=[box_predictor(*weights) for weights in ((10, 5), (20, 10), (30, 15))],
        proposal_matchers=[matcher(overlap) for overlap in (0.5, 0.6, 0.7)],
    )
