"""Helpers of the MMSeg tests: small backbones and segmentors, and batches for them. Needs mmseg."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.references import noise, randomise

pytest.importorskip("mmseg", reason="the MMSeg host needs the packages of the extra 'mmseg'")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mmengine.config import ConfigDict
    from mmengine.structures import PixelData
    from mmseg.models.backbones import VisionTransformer
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample
    from mmseg.utils import register_all_modules

from apt_dense.hosts.mmseg import APTViT

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
CLASSES = 3
PREPROCESSOR = {
    "type": "SegDataPreProcessor",
    "mean": [123.675, 116.28, 103.53],
    "std": [58.395, 57.12, 57.375],
    "bgr_to_rgb": True,
    "size_divisor": 16,
}


@pytest.fixture(scope="module", autouse=True)
def mmseg_scope() -> None:
    """For modules that import it: MMSeg's modules are registered and its scope is the default."""
    register_all_modules(init_default_scope=True)


def backbone(seed: int = 0, **options: Any) -> APTViT:
    """A small adaptive ViT with random weights."""
    return randomise(APTViT(**{**SMALL, "thresholds": (4.0,), **options}), 0.2, seed)


def loaded(model: APTViT, seed: int = 1) -> bool:
    """Whether a model holds the weights of ``backbone(seed)`` wherever both have them."""
    expected = backbone(seed).state_dict()
    return all(torch.equal(value, expected[name]) for name, value in model.state_dict().items() if name in expected)


def half_flat(*size: int) -> Tensor:
    """A batch of two normalised images of noise, flat on the left."""
    batch = noise(2, 3, *size)
    batch[..., : size[1] // 2] = 0.5
    return batch


FCN = {
    "type": "FCNHead",
    "in_channels": 16,
    "channels": 8,
    "num_convs": 1,
    "concat_input": False,
    "num_classes": CLASSES,
    "norm_cfg": {"type": "BN"},
    "loss_decode": {"type": "CrossEntropyLoss"},
}
UPER = {**FCN, "type": "UPerHead", "in_channels": [16, 16], "in_index": [0, 1], "pool_scales": (1, 2)}
del UPER["num_convs"], UPER["concat_input"]
SEGMENTORS = {
    "fcn": {"backbone": {"out_indices": -1}, "decode_head": FCN},
    "upernet": {
        "backbone": {"out_indices": (0, 1)},
        "neck": {"type": "MultiLevelNeck", "in_channels": [16, 16], "out_channels": 16, "scales": [2, 1]},
        "decode_head": UPER,
        "auxiliary_head": {**FCN, "in_index": 1},
    },
}
TEST_MODES = {"whole": {"mode": "whole"}, "slide": {"mode": "slide", "crop_size": (32, 32), "stride": (21, 21)}}


def segmentor(kind: str = "fcn", mode: str = "whole", **options: Any) -> nn.Module:
    """Build one of ``SEGMENTORS`` with random weights; ``options`` go to its backbone."""
    config = copy.deepcopy(SEGMENTORS[kind])
    config["backbone"] = {"type": "APTViT", **SMALL, "thresholds": (4.0,), **config["backbone"], **options}
    return MODELS.build(
        ConfigDict(type="EncoderDecoder", data_preprocessor=PREPROCESSOR, test_cfg=TEST_MODES[mode], **config)
    )


def samples(*size: int) -> dict[str, list]:
    """Two 8-bit BGR images, flat on the left, with their masks."""
    generator = torch.Generator().manual_seed(0)
    inputs, data_samples = [], []
    for _ in range(2):
        image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        image[..., : size[1] // 2] = 90
        mask = torch.randint(0, CLASSES, (1, *size), generator=generator)
        sample = SegDataSample(gt_sem_seg=PixelData(data=mask))
        sample.set_metainfo({"ori_shape": size, "img_shape": size, "pad_shape": size, "padding_size": [0, 0, 0, 0]})
        inputs.append(image)
        data_samples.append(sample)
    return {"inputs": inputs, "data_samples": data_samples}


def mmseg_vit(**options: Any) -> VisionTransformer:
    """MMSeg's own ViT with random weights. Its eval() returns None, so it does not chain."""
    model = VisionTransformer(
        **{
            "img_size": 32,
            "patch_size": 8,
            "embed_dims": 16,
            "num_layers": 2,
            "num_heads": 2,
            "patch_bias": True,
            "norm_cfg": {"type": "LN", "eps": 1e-6},
            **options,
        }
    )
    model.eval()
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        norm_weight = "ln" in name and name.endswith("weight")
        parameter.data = noise(*parameter.shape, seed=seed) * 0.2 + norm_weight
    return model
