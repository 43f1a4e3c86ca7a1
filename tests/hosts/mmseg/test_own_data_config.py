"""Configs that name a data set and weights in one line each are completed from both."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from support.own_folder import VALUES, write_own

pytest.importorskip("mmseg", reason="the configs are MMSegmentation's")

from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from apt_dense.hosts.mmseg.training_config import load_config

pytestmark = pytest.mark.filterwarnings("ignore")  # MMSeg's own

FOLDER = Path(__file__).parents[3] / "configs" / "mmseg"
HUNDREDS, TEN_THOUSANDS = FOLDER / "own_data_hundreds.py", FOLDER / "own_data_ten_thousands.py"
#: timm's smallest ViT: 64 channels, 6 blocks, patches of 16 pixels.
TINY = {"pretrained": None, "architecture": "test_vit", "image_size": 64}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_own(tmp_path_factory.mktemp("own"))


@pytest.fixture(params=[HUNDREDS, TEN_THOUSANDS], ids=lambda path: path.stem)
def model(request: pytest.FixtureRequest, data: Path) -> nn.Module:
    cfg = load_config(str(request.param), {**TINY, "model.decode_head.channels": 64}, data_root=str(data))
    init_default_scope("mmseg")
    return MODELS.build({**cfg.model, "data_preprocessor": cfg.model.data_preprocessor})


def test_one_line_names_the_data_and_one_the_weights(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(f'_base_ = "{HUNDREDS}"\ndata_root = "{data}"\npretrained = "timm://test_vit.r160_in1k"\n')
    cfg = load_config(str(path))
    assert {cfg[f"{split}_dataloader"].dataset.data_root for split in ("train", "val", "test")} == {str(data)}
    assert cfg.model.backbone.init_cfg.checkpoint == "timm://test_vit.r160_in1k"
    assert (cfg.model.backbone.embed_dim, cfg.model.backbone.depth) == (64, 6)
    assert cfg.model.decode_head.num_classes == 3 and cfg.model.decode_head.in_channels == 64
    assert cfg.train_dataloader.dataset.data_prefix == {"img_path": "images/train", "seg_map_path": "masks/train"}


def test_a_file_tells_its_architecture_and_asks_for_the_rest(data: Path, tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "vit.pth")
    options = {"pretrained": str(tmp_path / "vit.pth"), "image_size": 64}
    with pytest.raises(ValueError, match="num_heads"):
        load_config(str(TEN_THOUSANDS), options, data_root=str(data))
    cfg = load_config(str(TEN_THOUSANDS), {**options, "model.backbone.num_heads": 2}, data_root=str(data))
    assert (cfg.model.backbone.embed_dim, cfg.model.backbone.num_heads) == (64, 2)
    assert cfg.model.backbone.out_indices == (0, 2, 3, 5) and cfg.model.neck.embed_dim == 64


@pytest.mark.parametrize("known", [{"model.backbone.num_heads": 2}, {"architecture": "test_vit"}])
def test_patches_can_be_resampled(known: dict, data: Path, tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "vit.pth")
    options = {"pretrained": str(tmp_path / "vit.pth"), "model.backbone.patch_size": 8, **known}
    cfg = load_config(str(HUNDREDS), options, data_root=str(data))
    init_default_scope("mmseg")
    model = MODELS.build(cfg.model)
    model.init_weights()
    assert model.backbone.patch_embed.proj.weight.shape[-1] == 8


def test_the_completed_config_stands_alone(data: Path, tmp_path: Path) -> None:
    """A run writes it next to its checkpoints; neither names of weights nor of folders are looked up again."""
    cfg = load_config(str(TEN_THOUSANDS), dict(TINY), data_root=str(data))
    cfg.dump(tmp_path / "dumped.py")
    assert load_config(str(tmp_path / "dumped.py")).model == cfg.model
    assert "pretrained" not in cfg and "architecture" not in cfg and "image_size" not in cfg


def test_test_data_are_those_of_val_where_there_are_none(data: Path, tmp_path: Path) -> None:
    cfg = load_config(str(HUNDREDS), dict(TINY), data_root=str(data))
    assert cfg.test_dataloader.dataset.data_prefix == cfg.val_dataloader.dataset.data_prefix
    named = {**TINY, "val_dataloader.dataset.data_prefix": dict(img_path="images/train", seg_map_path="masks/train")}
    cfg = load_config(str(HUNDREDS), named, data_root=str(data))
    assert cfg.test_dataloader.dataset.data_prefix.img_path == "images/train"
    own = write_own(tmp_path, splits=("train", "val", "test"))
    cfg = load_config(str(HUNDREDS), dict(TINY), data_root=str(own))
    assert cfg.test_dataloader.dataset.data_prefix.img_path == "images/test"


def test_models_have_the_classes_and_run(model: nn.Module) -> None:
    heads = [model.decode_head] + ([model.auxiliary_head] if model.with_auxiliary_head else [])
    assert {head.num_classes for head in heads} == {3}
    assert model.eval().encode_decode(torch.randn(1, 3, 64, 64), [{"img_shape": (64, 64)}]).shape[1:] == (3, 64, 64)


def test_the_backbone_learns_more_slowly_than_the_heads(model: nn.Module) -> None:
    """At one rate for everything, a model fine-tuned on CamVid was a third as good."""
    upernet = model.with_auxiliary_head
    cfg = load_config(str(TEN_THOUSANDS if upernet else HUNDREDS), {"data_root": "", "train_dataloader": None,
                      "val_dataloader": None, "test_dataloader": None})  # fmt: skip
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    rates = {name: group["lr"] for group in groups for name in group["param_names"]}
    heads = {rate for name, rate in rates.items() if not name.startswith("backbone.")}
    backbone = {name: rate for name, rate in rates.items() if name.startswith("backbone.")}
    assert heads == {3e-4 if upernet else 1e-3}
    assert max(backbone.values()) == pytest.approx(3e-5 if upernet else 2e-5)
    assert (len(set(backbone.values())) == 1) == (not upernet)
    assert backbone["backbone.pos_embed"] == min(backbone.values())


@pytest.mark.parametrize("size", [100, 224])
def test_one_line_sets_the_size(size: int, data: Path) -> None:
    cfg = load_config(str(HUNDREDS), {**TINY, "image_size": size}, data_root=str(data))
    whole = (112, 112) if size == 100 else (224, 224)  # patches of 16 pixels
    assert cfg.model.data_preprocessor.size == cfg.model.test_cfg.crop_size == whole
    assert cfg.train_dataloader.dataset.pipeline[3].crop_size == whole
    assert cfg.train_dataloader.dataset.pipeline[2].scale == (4 * whole[0], whole[0])
    assert cfg.val_dataloader.dataset.pipeline[1].scale == (4 * whole[0], whole[0])
    assert cfg.test_dataloader.dataset.pipeline[1].scale == (4 * whole[0], whole[0])
    assert cfg.tta_pipeline[1].transforms[0][1].scale == (4 * whole[0], whole[0])
    assert cfg.model.backbone.img_size == whole[0]


def test_pixels_are_normalised_as_the_weights_expect(data: Path) -> None:
    options = {**TINY, "architecture": "vit_tiny_patch16_224"}  # mean and deviation 0.5
    cfg = load_config(str(HUNDREDS), options, data_root=str(data))
    assert cfg.model.data_preprocessor.mean == [127.5] * 3 == list(cfg.model.backbone.pixel_mean)


def test_what_a_config_says_itself_stays(data: Path) -> None:
    options = {**TINY, "model.backbone.thresholds": (), "model.backbone.depth": 2, "model.decode_head.num_classes": 5}
    cfg = load_config(str(HUNDREDS), options, data_root=str(data))
    assert cfg.model.backbone.thresholds == () and cfg.model.backbone.depth == 2
    assert cfg.model.decode_head.num_classes == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": "weights.pth"}, "weights.pth does not exist"),
        ({"pretrained": None}, "pretrained=None does not tell the architecture: add architecture"),
        ({"pretrained": "timm://test_vit", "architecture": "test_vit"}, "timm://test_vit tells its own"),
        ({"pretrained": "timm://test_vitt"}, "timm has no model 'test_vitt'; did you mean"),
        ({**TINY, "image_size": 0}, "image_size=0: expected pixels"),
        ({**TINY, "data_root": None}, "the config names no data set"),
        ({**TINY, "data_root": "nowhere"}, "no train data in nowhere"),
    ],
)
def test_configs_that_tell_too_little(options: dict, message: str, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    given = {"data_root": str(data), **options}
    path.write_text(f'_base_ = "{HUNDREDS}"\n' + "".join(f"{key} = {value!r}\n" for key, value in given.items()))
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        load_config(str(path))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_other_configs_stay_as_they_are() -> None:
    cfg = load_config(str(FOLDER / "linear_apt_vit-b16_160k_ade20k-512x512.py"))
    assert cfg.model.decode_head.num_classes == 150 and "data_prefix" in cfg.train_dataloader.dataset


def test_the_void_label_is_set_in_one_place(tmp_path: Path) -> None:
    """Ignored pixels are 255 everywhere behind classes.txt: losses, metric, padding."""
    cfg = load_config(str(TEN_THOUSANDS), dict(TINY), data_root=str(write_own(tmp_path, classes=VALUES)))
    init_default_scope("mmseg")
    model = MODELS.build(cfg.model)
    assert {model.decode_head.ignore_index, model.auxiliary_head.ignore_index} == {255}
    assert model.data_preprocessor.seg_pad_val == 255
    assert not [key for key in _keys(cfg.to_dict()) if "ignore" in key or "reduce_zero" in key]


def _keys(node: object) -> list[str]:
    if isinstance(node, dict):
        return [*map(str, node), *(key for value in node.values() for key in _keys(value))]
    return [key for value in node for key in _keys(value)] if isinstance(node, list | tuple) else []
