"""mIoU of one trained MMSegmentation model with the same weights: uniform, adaptive, on smaller images."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from tqdm import tqdm

from apt_dense.hosts.mmseg.safe_checkpoints import check_weights, load_from_safe
from apt_dense.hosts.mmseg.training_config import load_config

from evidence.equal_token_rows import SMALLER, Case, check_size
from evidence.labelled_photos import Labelled, read_labels
from evidence.match_token_counts import model_input, resized, smaller_grid, timed
from evidence.model_forms import Form, set_thresholds, with_thresholds
from evidence.segmentation_scores import score
from shared.normalise import to_grey_levels
from shared.photo_files import read_photo
from shared.thresholds_for_share import mean_share, scores_of, thresholds_for


def load_segmentor(config: Path, checkpoint: Path, form: Form, thresholds: Sequence[float]) -> nn.Module:
    """The trained model of a config with the options of a form, adaptive whatever it was trained as.

    Raises:
        ValueError: if the config has no ``APTViT``, or the checkpoint does not fit.
    """
    cfg = load_config(str(config))
    backbone = cfg.model.get("backbone") or {}
    if backbone.get("type") != "APTViT":
        raise ValueError(f"{config}: its backbone is {backbone.get('type')}; this tool switches an APTViT")
    backbone.update(pretrained=None, init_cfg=None, token_budget=None)
    backbone.update({"thresholds": tuple(thresholds), **form.options})
    cfg.model.test_cfg = Config({"mode": "whole"})._cfg_dict
    init_default_scope(cfg.get("default_scope", "mmseg"))
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    content = load_from_safe(str(checkpoint))
    check_weights(model, content, str(checkpoint))
    model.load_state_dict(content.get("state_dict", content), strict=False)  # what only APT has may start at zero
    return model


def zero_is_void(config: Path) -> bool:
    """Whether label 0 in the files of a config's test data is not counted."""
    dataset = (load_config(str(config)).get("test_dataloader") or {}).get("dataset") or {}
    return bool(dataset.get("reduce_zero_label"))


class Switch(NamedTuple):
    """The thresholds and the image size of a row, and the share of tokens that they leave."""

    thresholds: tuple[float, ...]
    size: tuple[int, int]
    share: float


def switch_for(model: nn.Module, case: Case, ratios: Sequence[float], photos: Sequence[Path]) -> Switch:
    """Choose them so that all photos together keep the share of the case.

    Args:
        ratios: of the thresholds, which are scaled.
    """
    net = model.backbone
    grid = check_size(case.size, net.patch_size)
    if case.form is not None:
        selector = with_thresholds(net.patches, ratios)
        images = (model_input(resized(to_grey_levels(read_photo(path)), case.size), net) for path in photos)
        scores = [scores_of(selector, image) for image in tqdm(images, "scores", total=len(photos), leave=False)]
        thresholds = thresholds_for(scores, ratios, case.share)
        return Switch(thresholds, case.size, mean_share(scores, thresholds))
    if case.variant != SMALLER:
        return Switch((), case.size, 1.0)
    small = smaller_grid(grid, case.share)
    size = small[0] * net.patch_size, small[1] * net.patch_size
    return Switch((), size, small[0] * small[1] / (grid[0] * grid[1]))


@torch.inference_mode()
def evaluate(model: nn.Module, switch: Switch, pairs: Sequence[Labelled], void: bool) -> dict[str, Any]:
    """The results of a row: mIoU, boundary IoU and pixel accuracy in per cent over all pairs, tokens, milliseconds of
    the whole model (median over images of a forward pass).

    Args:
        void: whether label 0 is not counted, and label n is class n - 1.
    """
    set_thresholds(model.backbone, switch.thresholds)
    classes = model.decode_head.num_classes
    seconds = []

    def predictions() -> Iterator[tuple[Tensor, Tensor]]:
        for pair in tqdm(pairs, "images", leave=False):
            picture = resized(to_grey_levels(read_photo(pair.photo)), switch.size)
            labels = torch.from_numpy(read_labels(pair.mask, void))[None]
            found, took = timed(lambda picture=picture, size=labels.shape[1:]: predict(model, picture, size))
            seconds.append(took)
            yield found[None], labels

    return {
        "tokens": switch.share,
        **score(predictions(), classes),
        "ms": 1000 * sorted(seconds)[len(seconds) // 2],
        "images": len(pairs),
        "thresholds": list(switch.thresholds),
    }


def predict(model: nn.Module, picture: Tensor, size: tuple[int, int]) -> Tensor:
    """Classes (H, W) at the size of the mask, of grey levels (1, 3, h, w)."""
    shape = tuple(picture.shape[-2:])
    meta = {"img_shape": shape, "pad_shape": shape, "ori_shape": shape}
    logits = model.encode_decode(model_input(picture, model.backbone), [meta])
    align = model.decode_head.align_corners
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=align).argmax(1)[0]
