"""tools/fit_scorer.py --features: what is learned from a trained ViT's features, without labels."""

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import cv2
import fit_scorer as tool
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense import APTViT
from apt_dense.hosts.torchvision import build_detector
from apt_dense.hosts.torchvision.run_settings import Settings
from apt_dense.patches.first_block_scores import FirstBlockScorer
from apt_dense.patches.learned_scores import LearnedScorer
from apt_dense.patches.scorer_files import load_scorer
from apt_dense.patches.scores import entropy_scores
from apt_dense.weights.files import write_checkpoint

from calibration.feature_variance import feature_variance, uniform_backbone, uniform_model, variance_within
from calibration.learned_scorer_training import Fit
from calibration.scorer_networks import pretrained_weights
from calibration.scorer_report import hidden_table
from evidence.fast_16_bits import in_16_bits
from evidence.labelled_photos import IGNORED
from evidence.photos_in_memory import LabelledSet, load_unlabelled, random_views
from shared.normalise import normalise
from support.coco_folder import TINY_PRESET, write_coco
from support.references import randomise
from support.scorers import MODEL, random_vit_weights

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
CPU = torch.device("cpu")


def random_features(batch: int, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(batch, 5, rows, columns, generator=generator), dim=1)


def known(features: Tensor, patch_size: int = 1) -> Tensor:
    return torch.ones(len(features), *(n * patch_size for n in features.shape[2:]), dtype=torch.bool)


def test_variance_is_half_the_mean_squared_distance_of_two_features() -> None:
    features = random_features(2, 5, 7)
    found = variance_within(features, known(features, 4), 4, 8)
    assert found.shape == (2, 2, 3)
    for image, row, column in np.ndindex(*found.shape):
        inside = features[image, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1).T
        torch.testing.assert_close(found[image, row, column], torch.cdist(inside, inside).square().mean() / 2)
    assert variance_within(features, known(features, 4), 4, 4).max() < 1e-6


@pytest.mark.parametrize("features", [torch.ones(1, 1, 4, 4), torch.zeros(1, 3, 4, 4), random_features(1, 3, 9)])
def test_variance_is_from_0_to_1(features: Tensor) -> None:
    found = variance_within(features, known(features), 1, 2)
    assert ((found >= 0) & (found <= 1)).all() and found.shape[1:] == tuple(n // 2 for n in features.shape[2:])


def test_patches_with_unknown_pixels_have_no_variance() -> None:
    """The pixel 5, 8 lies in the patch of row 1 and column 2."""
    is_known = known(features := random_features(1, 4, 6), 2)
    is_known[0, 5, 8] = False
    assert variance_within(features, is_known, 2, 4).isnan().nonzero().tolist() == [[0, 1, 2]]


def variance_of(features: Tensor, patch_size: int) -> Tensor:
    """The variance of a whole image's standardised features within patches of scale 1."""
    standardised = F.layer_norm(features.float().movedim(1, -1), features.shape[1:2])
    unit = F.normalize(standardised, dim=-1).movedim(-1, 1)
    return variance_within(unit, known(unit, patch_size), patch_size, 2 * patch_size)


def trained(patch_size: int, shape: tuple[int, int], path: Path) -> APTViT:
    """A model of other patches, positions and pixels than timm's, whose weights are in a file."""
    pixels = {"pixel_mean": (10.0, 120.0, 90.0), "pixel_std": (50.0, 60.0, 70.0)}
    options = {"patch_size": patch_size, "img_size": shape, "thresholds": (), "final_norm": False, **pixels}
    model = randomise(APTViT.from_timm(MODEL, pretrained=False, **options)).eval()
    write_checkpoint(model.state_dict(), path)
    return model


@pytest.mark.parametrize(("patch_size", "shape"), [(16, (64, 96)), (8, (64, 64)), (8, (48, 80))])
def test_features_are_those_of_the_trained_model(tmp_path: Path, patch_size: int, shape: tuple[int, int]) -> None:
    model = trained(patch_size, shape, tmp_path / "trained.pth")
    pixels, fit = torch.rand(2, 3, *shape) * 255, Fit(patch_size, 1, shape)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (model.pixel_format.mean, model.pixel_format.std))
    with torch.inference_mode(), in_16_bits("cpu"):
        (features,) = model((pixels - mean) / std)
    expected = variance_of(features, patch_size)
    target = feature_variance(uniform_model(MODEL, tmp_path / "trained.pth", fit), patch_size)
    masks = torch.zeros(2, *shape, dtype=torch.long)
    torch.testing.assert_close(target.of(pixels, masks)(2 * patch_size), expected, atol=2e-3, rtol=0)
    assert expected.std() > 0.01
    assert target.of(pixels, torch.full_like(masks, IGNORED))(2 * patch_size).isnan().all()


def test_photos_too_narrow_to_score_are_left_out_of_the_table() -> None:
    narrow, wide = (LabelledSet(torch.zeros(1, 3, 64, n), torch.zeros(1, 64, n)) for n in (15, 64))
    fit = Fit(8, 1, (64, 64))
    assert "On 1 photos held out" in hidden_table(entropy_scores, [narrow, wide], fit)
    with pytest.raises(ValueError, match="no photo held out holds a patch of 16 pixels"):
        hidden_table(entropy_scores, [narrow], fit)


def test_incomplete_patches_are_left_out(tmp_path: Path) -> None:
    trained(8, (64, 64), tmp_path / "trained.pth")
    target = feature_variance(uniform_model(MODEL, tmp_path / "trained.pth", Fit(8, 1, (64, 64))), 8)
    pixels = torch.rand(1, 3, 47, 63) * 255
    found = target.of(pixels, torch.zeros(1, 47, 63))(16)
    whole = target.of(pixels[..., :40, :56], torch.zeros(1, 40, 56))(16)
    assert found.shape == (1, 2, 3)
    torch.testing.assert_close(found, whole)


def test_the_first_blocks_start_from_models_of_other_patches(tmp_path: Path) -> None:
    model = trained(8, (64, 64), tmp_path / "trained.pth")
    weights, start = pretrained_weights(MODEL, tmp_path / "trained.pth"), random_vit_weights()
    assert weights["patch_embed.proj.weight"].shape == start["patch_embed.proj.weight"].shape
    assert {name for name in start if name.startswith("blocks")} <= set(weights)
    name = "blocks.5.mlp.fc1.weight"
    torch.testing.assert_close(weights[name], model.state_dict()[name], atol=0, rtol=0)


def options(root: Path, *others: str) -> list[str]:
    model = ["--model", MODEL, "--weights", str(root / "vit.pth"), "--blocks", "2"]
    return ["--features", "--size", "64x96", *model, "--scales", "1", "--out", str(root / "a.safetensors"), *others]


def write_stripes(folder: Path, count: int) -> None:
    """Stripes on one side of every photo, and one colour on the other, where features agree."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        photo = np.full((64, 96, 3), rng.integers(0, 256, 3), np.uint8)
        photo[:, : 48 + rng.integers(-8, 9)] = rng.integers(0, 256, (64, 1, 3))
        cv2.imwrite(str(folder / f"{number}.png"), photo[:, ::-1] if rng.random() < 0.5 else photo)


def test_photos_without_labels_serve(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_stripes(tmp_path / "photos" / "day", 20)
    write_stripes(tmp_path / "photos" / "night", 20)
    model = APTViT.from_timm(MODEL, pretrained=False, patch_size=4, thresholds=())
    write_checkpoint(randomise(model).state_dict(), tmp_path / "vit.pth")
    tool.main(options(tmp_path, "--images", str(tmp_path / "photos"), "--patch-size", "4", "--epochs", "8"))
    printed = capsys.readouterr().out
    assert "On 4 photos held out" in printed and "hidden of the variance of features within them all" in printed
    line = next(line for line in printed.splitlines() if line.startswith("| 60%"))
    assert float(line.split("|")[2].strip(" %")) < 40, printed  # of patches that are merged at random, 53


def test_photos_without_labels_may_have_any_size(tmp_path: Path) -> None:
    shapes = (64, 96), (31, 200), (7, 5)
    for number, shape in enumerate(shapes):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.full((*shape, 3), 50 * number, np.uint8))
    data = load_unlabelled(sorted(tmp_path.glob("*.png")), (32, 48), CPU)
    assert data.photos.shape == (3, 3, 32, 48) and data.masks.shape == (3, 32, 48)
    assert data.photos.float().mean((1, 2, 3)).tolist() == [0, 50, 100]


def test_padding_stays_right_of_mirrored_photos() -> None:
    """A photo of 6 x 5 pixels, lighter to the right as its labels rise, in the corner of a square of 8."""
    photos, masks = torch.full((1, 3, 8, 8), 50, dtype=torch.uint8), torch.full((1, 8, 8), IGNORED, dtype=torch.uint8)
    masks[..., :6, :5] = torch.arange(5)
    photos[..., :6, :5] = torch.arange(0, 250, 50)
    views = random_views(LabelledSet(photos, masks), (8, 8), torch.zeros(40, dtype=torch.long), torch.Generator(), True)
    is_rising = []
    for view, mask in zip(*views, strict=True):
        is_known = mask != IGNORED
        assert (is_known.int().diff(dim=1) <= 0).all(), mask
        labels, lightness = mask[0][is_known[0]].float(), view[0, 0][is_known[0]]
        is_rising.append(bool(labels[-1] > labels[0]))
        assert torch.corrcoef(torch.stack([labels, lightness]))[0, 1] > 0.5  # 1, but for what is mixed with padding
    assert {True, False} == set(is_rising)


def test_photos_of_detection_data_serve(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = write_coco(tmp_path / "coco", images=20)
    write_checkpoint(random_vit_weights(), tmp_path / "vit.pth")
    tool.main(options(tmp_path, "--coco", str(data), "--size", "64", "--epochs", "1"))
    assert "variance of features" in capsys.readouterr().out
    assert isinstance(load_scorer(tmp_path / "a.safetensors", (124, 116, 104)), FirstBlockScorer)


def write_run(path: Path) -> APTViT:
    """The checkpoint of a detector with adaptive patches, as torchvision's trainer writes it; return its backbone."""
    settings = Settings(model="tiny", size=96, channels=8, box_features=16, proposals=20, thresholds=(5.5,))
    model = randomise(build_detector.build_model(settings, 2)).eval()
    content = {"model": model.state_dict(), "settings": asdict(settings), "categories": [(1, "red")]}
    torch.save({**content, "optimizer": {}, "scheduler": {}, "iteration": 1}, path)
    return model.backbone.net


def test_a_run_of_a_trainer_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(build_detector.PRESETS, "tiny", TINY_PRESET)
    backbone = write_run(tmp_path / "last.pth")
    backbone.set_patches(thresholds=())
    patch_size, pixels = backbone.patch_size, torch.rand(1, 3, 64, 96) * 255
    with torch.inference_mode(), in_16_bits("cpu"):
        features = backbone(normalise(pixels, backbone.pixel_format))[-1]
    target = feature_variance(uniform_backbone(tmp_path, None, Fit(patch_size, 1, (64, 96))), patch_size)
    found = target.of(pixels, torch.zeros(1, 64, 96))(2 * patch_size)
    expected = variance_of(features, patch_size)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    assert expected.std() > 0.01

    write_stripes(tmp_path / "photos", 20)
    given = ["--features", str(tmp_path), "--images", str(tmp_path / "photos"), "--size", "64x96", "--scales", "1"]
    tool.main([*given, "--epochs", "1", "--out", str(tmp_path / "a.safetensors")])
    assert "variance of features" in capsys.readouterr().out
    assert isinstance(load_scorer(tmp_path / "a.safetensors", (124, 116, 104)), LearnedScorer)
    with pytest.raises(
        SystemExit, match=f"its smallest patches are of {patch_size} pixels; give --patch-size {patch_size}"
    ):
        tool.main([*given, "--patch-size", "8", "--out", str(tmp_path / "b.safetensors")])
    with pytest.raises(SystemExit, match="none does not exist"):
        tool.main(["--features", str(tmp_path / "none"), *given[2:], "--out", str(tmp_path / "b.safetensors")])
    write_checkpoint(random_vit_weights(), tmp_path / "vit.pth")
    with pytest.raises(
        SystemExit, match="vit.pth is not a checkpoint of a run.*If these are weights alone: --features --model NAME"
    ):
        tool.main(["--features", str(tmp_path / "vit.pth"), *given[2:], "--out", str(tmp_path / "b.safetensors")])


def test_detectron2s_backbone_and_dropped_padding_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward gives a dictionary, and its padding has no tokens; photos in a corner have features of their own."""
    backbones = pytest.importorskip("apt_dense.hosts.detectron2", reason="Detectron2 is not installed")
    options = {"embed_dim": 48, "depth": 2, "num_heads": 2, "img_size": 64, "thresholds": (5.5,), "drop_padding": True}
    backbone = randomise(backbones.APTViT(**options, use_abs_pos=False)).eval()
    monkeypatch.setattr("calibration.feature_variance.load_trained", lambda *_, **__: Namespace(backbone=backbone))
    target = feature_variance(uniform_backbone(Path("run"), None, Fit(16, 1, (64, 64))), 16)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[:, 32:], masks[:, :, 48:] = IGNORED, IGNORED
    found, alone = target.of(pixels, masks)(32), target.of(pixels[..., :32, :48], masks[:, :32, :48])(32)
    torch.testing.assert_close(found[:, :1, :1], alone, atol=2e-3, rtol=0)
    assert alone > 0.05
    assert found.isnan().sum() == 3


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--images", "a", "--masks", "b"], "--masks: leave it out with --features"),
        (["--coco", "a", "--size", "64", "--zero-is-void"], "--zero-is-void: leave it out with --features"),
        (["--images", "a", "--coco", "b"], "give --images or --coco, and not both"),
        ([], "give --images or --coco, and not both"),
        (["--images", "photos", "--config", "own.py"], "--config own.py: give --features RUN, to which it belongs"),
        (["--images", "photos", "--patch-size", "8"], "vit.pth, as test_vit with --patch-size 8: .*patch"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and value else "",
)
def test_what_cannot_be_learned_from_is_named(tmp_path: Path, changed: list[str], words: str) -> None:
    write_checkpoint(random_vit_weights(), tmp_path / "vit.pth")
    with pytest.raises(SystemExit, match=words):
        tool.main(options(tmp_path, *changed))


@pytest.mark.parametrize("given", [[], ["--model", MODEL], ["--weights", "vit.pth"]], ids=["none", "model", "weights"])
def test_features_are_of_a_trained_model(tmp_path: Path, given: list[str]) -> None:
    out = ["--out", str(tmp_path / "a.safetensors")]
    with pytest.raises(SystemExit, match="--features: give --model and --weights"):
        tool.main(["--features", "--images", str(tmp_path), "--size", "64x96", *given, *out])
