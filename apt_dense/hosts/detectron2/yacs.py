"""The adaptive ViT in Detectron2's yacs configs."""

from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.utils import comm

from apt_dense.hosts.detectron2.backbone import APTViT
from apt_dense.hosts.detectron2.class_names_of_run import write_classes
from apt_dense.hosts.detectron2.feature_pyramid import SimpleFeaturePyramid
from apt_dense.options import BlockOptions, PatchOptions
from apt_dense.weights.files import CheckpointError, write_text_whole

#: Arguments that a file of weights tells, whatever the config says.
_OF_FILE = (
    "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "norm_eps", "use_abs_pos",
    "pretrain_img_size", "pretrain_use_cls_token",
)  # fmt: skip


def add_apt_config(cfg: CfgNode) -> None:
    """Add the node MODEL.APT to a yacs config: the arguments of ``APTViT`` in capitals, then the pyramid's.

        cfg = get_cfg()
        add_apt_config(cfg)
        cfg.merge_from_file("configs/detectron2/mask_rcnn_apt_vitdet_b.yaml")
        DefaultTrainer(cfg)

    The defaults are those of ViTDet-B; options that only APT has are off. With PRETRAINED.FILE, the file of a ViT tells
    the architecture in place of EMBED_DIM, DEPTH and the others of ``_OF_FILE``, and PRETRAINED holds what it cannot
    tell: NUM_HEADS, ACT_LAYER, NORM_EPS, NO_ROTARY (True for CLIP). PRETRAINED.PATCH_SIZE: 16 resamples its patches.
    """
    cfg.MODEL.APT = CfgNode({
        "IMG_SIZE": 1024,
        "PATCH_SIZE": 16,
        "EMBED_DIM": 768,
        "DEPTH": 12,
        "NUM_HEADS": 12,
        "MLP_RATIO": 4.0,
        "QKV_BIAS": True,
        "DROP_PATH_RATE": 0.1,
        "NORM_EPS": 1e-6,
        "USE_ABS_POS": True,
        "USE_REL_POS": True,
        "REL_POS_ZERO_INIT": True,
        "WINDOW_SIZE": 14,
        "WINDOW_BLOCK_INDEXES": (0, 1, 3, 4, 6, 7, 9, 10),
        "RESIDUAL_BLOCK_INDEXES": (),
        "USE_ACT_CHECKPOINT": False,
        "PRETRAIN_IMG_SIZE": 224,
        "PRETRAIN_USE_CLS_TOKEN": True,
        "THRESHOLDS": PatchOptions.thresholds,
        "TOKEN_BUDGET": PatchOptions.token_budget,
        "MIN_TOKENS": PatchOptions.min_tokens,
        "ATTENTION_BACKEND": BlockOptions.attention_backend,
        "PROPORTIONAL_ATTENTION": BlockOptions.proportional_attention,
        "SCORER": PatchOptions.scorer,
        "DROP_PADDING": PatchOptions.drop_padding,
        "PRETRAINED": {
            "FILE": "", "PATCH_SIZE": None, "NUM_HEADS": None, "ACT_LAYER": None, "NORM_EPS": None, "NO_ROTARY": False,
        },
        "PYRAMID": {"SCALE_FACTORS": (4.0, 2.0, 1.0, 0.5), "SQUARE_PAD": 1024},
    })  # fmt: skip


def save_run_config(cfg: CfgNode) -> None:
    """Write what ``load_trained`` needs next to the checkpoints of a ``DefaultTrainer``: config.yaml and, if the data
    sets of the config are known, classes.json, both in ``cfg.OUTPUT_DIR``.

    Call it in a script that does not call Detectron2's ``default_setup``, and in others for the names of the classes.
    In several processes, the first alone writes.

    Raises:
        OSError: if the files cannot be written.
    """
    if comm.is_main_process():
        folder = Path(cfg.OUTPUT_DIR)
        folder.mkdir(parents=True, exist_ok=True)
        write_text_whole(folder / "config.yaml", cfg.dump())
        write_classes(cfg, folder)


@BACKBONE_REGISTRY.register()
def build_apt_vit_sfp_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SimpleFeaturePyramid:
    """Build the backbone that yacs configs name in MODEL.BACKBONE.NAME: the adaptive ViT of MODEL.APT and its pyramid,
    levels p2 to p6.

    The pyramid's channels and norm are those of MODEL.FPN. The pixel format is MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and
    INPUT.FORMAT.

    Raises:
        ValueError: if the config has no node MODEL.APT, or PRETRAINED in it is no node.
        FileNotFoundError, CheckpointError: for weights that cannot be read or do not tell an argument.
    """
    if "APT" not in cfg.MODEL:
        raise ValueError("the config has no node MODEL.APT; call add_apt_config(cfg) before merging files into it")
    options = {name.lower(): value for name, value in cfg.MODEL.APT.items()}
    pyramid, pretrained = options.pop("pyramid"), options.pop("pretrained")
    if not isinstance(pretrained, CfgNode):
        raise ValueError(f"MODEL.APT.PRETRAINED={pretrained!r} is a node; set MODEL.APT.PRETRAINED.FILE to the file")
    if pretrained.FILE:
        options = {name: value for name, value in options.items() if name not in _OF_FILE} | _answers(pretrained)
    pixels = {"pixel_mean": cfg.MODEL.PIXEL_MEAN, "pixel_std": cfg.MODEL.PIXEL_STD, "channel_order": cfg.INPUT.FORMAT}
    try:
        net = APTViT(in_chans=input_shape.channels, **pixels, **options)
    except CheckpointError as error:
        keys = ", ".join(name for name in pretrained if name != "FILE")
        raise CheckpointError(
            f"{error}. In this config, arguments are given in MODEL.APT.PRETRAINED: {keys}"
        ) from error
    return SimpleFeaturePyramid(
        net,
        "last_feat",
        cfg.MODEL.FPN.OUT_CHANNELS,
        pyramid.SCALE_FACTORS,
        LastLevelMaxPool(),
        cfg.MODEL.FPN.NORM,
        pyramid.SQUARE_PAD,
    )


def _answers(pretrained: CfgNode) -> dict[str, Any]:
    """Arguments of the node PRETRAINED that are given."""
    options = {name.lower(): value for name, value in pretrained.items() if value is not None}
    answers = {} if not options.pop("no_rotary") else {"rotary": None}
    return {"pretrained": options.pop("file"), **options, **answers}
