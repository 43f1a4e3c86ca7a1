"""The configs of configs/mmseg: each parses, agrees with itself, trains every parameter, and reads ADE20K's layout."""

import inspect
from pathlib import Path

import pytest
import timm
import torch

from support.tiny_ade import CONFIGS, one_thread, shrink_options, write_ade  # noqa: F401

pytest.importorskip("mmseg", reason="the MMSeg configs need the packages of the extra 'mmseg'")

from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import DATASETS
from mmseg.structures import SegDataSample
from torch import nn

from apt_dense import APTViT
from apt_dense.hosts.mmseg.batched_slide_and_tta import APTEncoderDecoder, APTSegTTAModel
from apt_dense.hosts.mmseg.training_config import load_config
from apt_dense.nn.rotary import Rotary
from apt_dense.weights.parameter_rules import decays
from apt_dense.weights.timm_arguments import apt_arguments

every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
UNIFORM = [path for path in CONFIGS if "_uniform_" in path.name]
PAPER_PATCHES = sorted((CONFIGS[0].parent / "paper_patches").glob("*.py"))


@pytest.fixture(scope="module")
def ade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ade(tmp_path_factory.mktemp("data") / "ade")


def flat(node: object, prefix: str = "") -> dict:
    """Flatten nested dicts and lists to {dotted key: leaf}; empty ones are leaves."""
    if not isinstance(node, (dict, list, tuple)) or not node:
        return {prefix[1:]: node}
    items = node.items() if isinstance(node, dict) else enumerate(node)
    return {key: leaf for name, child in items for key, leaf in flat(child, f"{prefix}.{name}").items()}


def tiny_model(path: Path) -> nn.Module:
    cfg = load_config(str(path), shrink_options(path))
    init_default_scope("mmseg")
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    model.init_weights()
    return model


def batch(height: int, width: int, images: int = 2) -> dict:
    """A batch as data loaders yield it: images (3, H, W) uint8, BGR, and their masks."""
    pixels = torch.randint(0, 256, (images, 3, height, width), dtype=torch.uint8)
    pixels[..., : width // 2] = 90
    shapes = dict(ori_shape=(height, width), img_shape=(height, width))
    samples = [SegDataSample(metainfo=shapes) for _ in range(images)]
    for sample in samples:
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 150, (1, height, width)))
    return dict(inputs=list(pixels), data_samples=samples)


def test_there_are_configs_for_every_family_and_twins_of_the_plain_vits() -> None:
    families = [path.name.split("_")[2] for path in CONFIGS if "_apt_" in path.name]
    assert sorted(set(families)) == [
        "dinov2-b14",
        "dinov2-l14",
        "dinov3-b16",
        "dinov3-l16",
        "eva02-l16",
        "vit-b16",
        "vit-l16",
    ]
    assert {path.name.replace("_uniform_", "_apt_") for path in UNIFORM} == {
        path.name for path in CONFIGS if "_apt_vit-" in path.name
    }


FAMILIES = {
    "dinov2-b14": "vit_base_patch14_dinov2", "dinov2-l14": "vit_large_patch14_dinov2",
    "dinov3-b16": "vit_base_patch16_dinov3_qkvb", "dinov3-l16": "vit_large_patch16_dinov3_qkvb",
    "eva02-l16": "eva02_large_patch14_224",
}  # fmt: skip
#: Options that depend on the task; EVA-02's patches are resampled to 16 pixels.
CHOSEN = {"img_size", "pixel_mean", "pixel_std", "final_norm", "patch_size"}


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.name.split("_")[2] in FAMILIES], ids=lambda path: path.stem
)
def test_backbone_is_that_of_the_family(path: Path) -> None:
    """The architecture that timm builds under the family's name."""
    with torch.device("meta"):
        expected = apt_arguments(timm.create_model(FAMILIES[path.name.split("_")[2]], num_classes=0))
    backbone = Config.fromfile(path).model.backbone
    defaults = {name: p.default for name, p in inspect.signature(APTViT).parameters.items()}
    for name, value in expected.items():
        found = backbone.get(name, defaults[name])
        if name == "rotary" and value is not None:
            found = Rotary(**found)
        if name == "mlp_ratio":
            found, value = int(found * backbone.embed_dim), round(value * backbone.embed_dim)
        assert name in CHOSEN or found == value, name
    assert backbone.patch_size == int(path.name.split("_")[2][-2:])


@every_config
def test_config_agrees_with_itself(path: Path) -> None:
    cfg = Config.fromfile(path)
    size = cfg.model.backbone.img_size
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert {
        cfg.model.data_preprocessor.size, cfg.model.test_cfg.crop_size, steps["RandomCrop"].crop_size
    } == {(size, size)}  # fmt: skip
    assert steps["RandomResize"].scale == cfg.test_dataloader.dataset.pipeline[1].scale == (4 * size, size)
    assert cfg.model.backbone.pixel_mean == cfg.model.data_preprocessor.mean
    assert cfg.model.backbone.pixel_std == cfg.model.data_preprocessor.std
    layers = cfg.optim_wrapper.get("paramwise_cfg").get("num_layers", cfg.model.backbone.depth)
    assert layers == cfg.model.backbone.depth
    assert cfg.model.get("pretrained") is cfg.model.backbone.pretrained is cfg.load_from is None
    assert Config.fromstring(cfg.pretty_text, ".py").to_dict() == cfg.to_dict(), "the copy in the work dir would differ"


@pytest.mark.parametrize("path", UNIFORM, ids=lambda path: path.stem)
def test_uniform_twin_differs_in_thresholds_only(path: Path) -> None:
    twin, adaptive = (flat(Config.fromfile(name).to_dict()) for name in (path, str(path).replace("_uniform_", "_apt_")))
    differing = {key for key in twin.keys() | adaptive.keys() if twin.get(key) != adaptive.get(key)}
    thresholds = "model.backbone.thresholds"
    assert differing == {thresholds, f"{thresholds}.0", f"{thresholds}.1"}
    assert twin[thresholds] == ()


@pytest.mark.parametrize("path", PAPER_PATCHES, ids=lambda path: path.stem)
def test_the_paper_s_patches_differ_in_thresholds_only(path: Path) -> None:
    paper, ours = (flat(Config.fromfile(name).to_dict()) for name in (path, path.parents[1] / path.name))
    differing = {key for key in paper.keys() | ours.keys() if paper.get(key) != ours.get(key)}
    assert differing == {f"model.backbone.thresholds.{place}" for place in range(2)}
    assert tiny_model(path).backbone.thresholds == (5.75,)


@every_config
def test_every_parameter_gets_a_gradient(path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_model(path)
    data = model.data_preprocessor(batch(64, 64), training=True)
    sum(value for name, value in model(**data, mode="loss").items() if "loss" in name).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@every_config
def test_weight_decay_follows_the_rule(path: Path) -> None:
    """With and without layer-wise decay of the rates."""
    model, cfg = tiny_model(path), load_config(str(path), shrink_options(path))
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    found = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        expected = cfg.optim_wrapper.optimizer.weight_decay if decays(name, parameter) else 0.0
        assert found[id(parameter)] == expected, name


@every_config
def test_prediction_has_the_size_of_the_image(path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_model(path).eval()
    data = model.data_preprocessor(batch(70, 101, images=1))  # larger than the 64 pixel window, not divisible by it
    with torch.no_grad():
        (sample,) = model(**data, mode="predict")
    assert sample.pred_sem_seg.data.shape == (1, 70, 101)
    assert sample.seg_logits.data.shape == (150, 70, 101)


@every_config
def test_crops_and_augmentations_share_forward_passes(path: Path) -> None:
    cfg = load_config(str(path), shrink_options(path))
    init_default_scope("mmseg")
    model = MODELS.build({**cfg.tta_model, "module": cfg.model})
    assert type(model) is APTSegTTAModel and type(model.module) is APTEncoderDecoder
    assert cfg.model.test_cfg.crops_per_forward == 8


@pytest.mark.parametrize("name", ["thresholds", "out_indices"])
def test_backbone_takes_what_the_command_line_can_write(name: str) -> None:
    """--cfg-options model.backbone.thresholds=() and the like arrive as tuples or lists."""
    options = shrink_options(CONFIGS[0]) | {"model.backbone.thresholds": [5.0]}
    cfg = load_config(
        str(CONFIGS[0]), options | {f"model.backbone.{name}": {"thresholds": (), "out_indices": [3]}[name]}
    )
    init_default_scope("mmseg")
    assert len(MODELS.build(cfg.model.backbone).thresholds) == (0 if name == "thresholds" else 1)


@pytest.mark.parametrize("key", ["model.pretrained", "model.backbone.pretrained"])
def test_pretrained_weights_are_one_option(key: str, tmp_path: Path) -> None:
    source = tiny_model(CONFIGS[0]).backbone
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    cfg = load_config(str(CONFIGS[0]), shrink_options(CONFIGS[0]) | {key: str(tmp_path / "vit.pth")})
    init_default_scope("mmseg")
    model = MODELS.build(cfg.model)
    model.init_weights()
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


@every_config
def test_data_sets_read_the_layout_of_ade20k(path: Path, ade: Path) -> None:
    cfg = load_config(str(path), data_root=str(ade))
    init_default_scope("mmseg")
    for split in ("train", "val", "test"):
        data = DATASETS.build(cfg[f"{split}_dataloader"].dataset)
        assert len(data) == 2
        sample = data[0]
        size, training = cfg.crop_size[0], split == "train"
        assert max(sample["inputs"].shape[1:]) <= (size if training else 4 * size), split
        assert min(sample["inputs"].shape[1:]) == size or training, split
        mask = sample["data_samples"].gt_sem_seg.data
        assert mask.shape[1:] == (sample["inputs"].shape[1:] if training else (64, 96)), split
        assert set(mask.unique().tolist()) <= {*range(150), 255}, split


def test_tta_pipeline_makes_six_scales_and_their_mirror_images(ade: Path) -> None:
    cfg = load_config(str(CONFIGS[0]), {"test_dataloader.dataset.pipeline": None}, data_root=str(ade))
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    init_default_scope("mmseg")
    images = DATASETS.build(cfg.test_dataloader.dataset)[0]["inputs"]
    assert [tuple(image.shape[1:]) for image in images[::2]] == [
        (32, 48), (48, 72), (64, 96), (80, 120), (96, 144), (112, 168)
    ]  # fmt: skip
    assert torch.equal(images[5].flip(-1), images[4])
