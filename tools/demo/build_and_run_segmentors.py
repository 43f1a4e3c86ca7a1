"""Build, load and run MMSegmentation's models, one image at a time."""

from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmseg.structures import SegDataSample
from torch import nn

from apt_dense.weights.files import read_checkpoint, write_whole

from shared.log_on_terminal import quiet
from shared.token_counts import Patches, choose_patches


def build(config: Config) -> nn.Module:
    """Build the segmentor of a config."""
    with quiet():
        init_default_scope("mmseg")
        model = MODELS.build(config.model)
        model.init_weights()
    return model


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the weights as MMEngine reads them, whole or not at all."""
    with write_whole(path) as partial:
        torch.save({"state_dict": model.state_dict()}, partial)


def load_model(config: Config, path: Path) -> nn.Module:
    """Build the segmentor of a config with trained weights, to be evaluated."""
    model = build(config)
    model.load_state_dict(read_checkpoint(path)["state_dict"])
    return model.eval()


@torch.inference_mode()
def predict(model: nn.Module, image: np.ndarray) -> np.ndarray:
    """Predict the class of each pixel (H, W) of an image (H, W, 3) uint8 RGB."""
    return model.test_step(_batch(image))[0].pred_sem_seg.data[0].numpy()


def _batch(image: np.ndarray) -> dict[str, list]:
    shape = dict.fromkeys(("img_shape", "ori_shape", "pad_shape"), image.shape[:2])
    bgr = torch.from_numpy(np.ascontiguousarray(image[..., ::-1])).permute(2, 0, 1)  # as MMSegmentation loads files
    return {"inputs": [bgr], "data_samples": [SegDataSample(metainfo=shape)]}


def partition(model: nn.Module, image: np.ndarray) -> Patches:
    """Cut an image (H, W, 3) uint8 RGB into patches, as the model's backbone does."""
    inputs = model.data_preprocessor(_batch(image), False)["inputs"]
    return choose_patches(model.backbone.patches, inputs)
