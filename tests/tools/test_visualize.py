"""Visualize: the picture shows the partition, and bad input is named."""

from __future__ import annotations

import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("tqdm", reason="the tools show their progress with it")

import visualize

from apt_dense import APTViT, PatchSelector

from shared.patch_pictures import draw_photo, partition_photo
from shared.photo_files import read_photo


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """64 x 96 pixels: the left half flat, the right half noise."""
    rng = np.random.default_rng(0)
    image = np.full((64, 96, 3), 100, np.uint8)
    image[:, 64:] = rng.integers(0, 256, (64, 32, 3))
    path = tmp_path / "photo.png"
    cv2.imwrite(str(path), image)
    return path


def test_counts_are_those_of_the_partition(photo: Path) -> None:
    patches = partition_photo(visualize.read_image(photo), PatchSelector(thresholds=(5.5, 4.0)))
    assert patches.per_scale.tolist() == [[8, 0, 1]] and patches.tokens_kept == 9 / 24
    scale_map = patches.scale_map[0]
    assert (scale_map[:, :4] == 2).all() and (scale_map[:, 4:] == 0).all()


def test_pictures_are_written_whole(photo: Path, tmp_path: Path) -> None:
    visualize.main([str(photo), "--out", str(tmp_path / "drawn")])
    picture = cv2.imread(str(tmp_path / "drawn" / "photo_patches.png"))
    assert picture.shape[0] > 64 and not list(tmp_path.rglob("*.partial"))


def test_the_patch_size_of_a_config_is_that_of_its_weights(tmp_path: Path) -> None:
    pytest.importorskip("mmseg", reason="reads a config of MMSegmentation")
    torch.save(APTViT(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2).state_dict(), tmp_path / "x.pth")
    backbone = {"type": "APTViT", "pretrained": str(tmp_path / "x.pth"), "thresholds": (5.0,)}
    (tmp_path / "config.py").write_text(f"model = dict(backbone={backbone!r})")
    assert visualize.config_options(visualize.read_config(tmp_path / "config.py"))["patch_size"] == 8


def test_photos_have_the_size_that_a_config_tests_them_in(photo: Path, tmp_path: Path) -> None:
    pytest.importorskip("mmseg", reason="reads a config of MMSegmentation")
    from mmcv.transforms import Resize

    backbone = {"type": "APTViT", "patch_size": 4, "thresholds": (5.0,)}
    steps = [{"type": "LoadImageFromFile"}, {"type": "Resize", "scale": (90, 29), "keep_ratio": True}]
    lines = f"model = dict(backbone={backbone!r})", f"test_dataloader = dict(dataset=dict(pipeline={steps!r}))"
    (tmp_path / "config.py").write_text("\n".join(lines))
    scale = visualize.config_scale(visualize.read_config(tmp_path / "config.py"))
    expected = Resize((90, 29), keep_ratio=True)({"img": visualize.read_image(photo)})["img"]
    assert expected.shape == (29, 44, 3) and np.array_equal(visualize.read_image(photo, None, scale), expected)
    assert visualize.read_image(photo, 48, scale).shape == (32, 48, 3), "--size goes first"


def test_a_config_s_size_is_that_of_the_pictures(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mmengine", reason="reads a config of MMSegmentation")
    steps = [{"type": "Resize", "scale": (128, 32), "keep_ratio": True}]
    lines = "model = dict(backbone=dict(type='APTViT', patch_size=8))", f"test_pipeline = {steps!r}"
    (tmp_path / "config.py").write_text("\n".join(lines))
    visualize.main([str(photo), "--stats-only", "--config", str(tmp_path / "config.py")])
    assert "48 x 32   tokens kept 24 of 24" in capsys.readouterr().out


@pytest.mark.parametrize(("size", "longer"), [((64, 96), 576), ((400, 900), 900), ((300, 3000), 1875)])
def test_the_plain_photo_stands_beside_its_patches_in_a_size_to_see_them(size: tuple[int, int], longer: int) -> None:
    """Enlarged up to six times, left as it is, or shrunk to patches of 10 pixels."""
    rng = np.random.default_rng(0)
    image = np.full((*size, 3), 200, np.uint8)
    image[: size[0] // 2] = rng.integers(0, 256, (size[0] // 2, size[1], 3))
    selector = PatchSelector(thresholds=(5.5, 4.0))
    picture = draw_photo(image, selector, partition_photo(image, selector))
    assert picture.shape[1] == 2 * longer + 8
    height = size[0] * longer // size[1]
    left, right = picture[-height:, :longer], picture[-height:, longer + 8 :]
    assert (left[height // 2 + 20 :] == 200).all(), "the photo itself"
    colours = np.unique(right[-30:].reshape(-1, 3), axis=0)
    assert len(colours) >= 2 and (colours != 200).any(), "its flat half is tinted and outlined"
    assert picture.shape[0] > height + 20, "under a caption"


def test_grids_of_small_patches_are_lighter() -> None:
    """Noise is cut into the smallest patches; outlines of them leave the more of a picture the smaller they are."""
    noise = np.random.default_rng(0).integers(120, 136, (160, 3200, 3), dtype=np.uint8)
    selector, change = PatchSelector(thresholds=()), {}
    for width in (800, 3200):
        image = noise[:, :width]
        picture = draw_photo(image, selector, partition_photo(image, selector)).astype(int)
        shown = (picture.shape[1] - 8) // 2
        change[width] = np.abs(picture[-40:, shown + 8 :] - picture[-40:, :shown]).max()
    assert change[3200] < 0.7 * change[800]


def test_the_caption_names_the_thresholds(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []
    monkeypatch.setattr(
        "shared.patch_pictures.text_bar",
        lambda width, entries, size: texts.extend(text for text, _ in entries) or np.zeros((20, width, 3), np.uint8),
    )
    image, selector = visualize.read_image(photo), PatchSelector(thresholds=(5.5, 4.0))
    draw_photo(image, selector, partition_photo(image, selector))
    assert texts[0] == "tokens kept 9 of 24 (38 %)" and texts[-1] == "entropy below 5.5 for 32 px, 4 for 64 px"


def test_numbers_alone(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.rglob("*"))
    visualize.main([str(photo), "--stats-only"])
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"{photo}   96 x 64   tokens kept 9 of 24 (38 %)   16 px: 8   32 px: 0   64 px: 1"
    assert last == "1 of 1 photos read: tokens kept 38 % on average, entropy below 5.5 for 32 px, 4 for 64 px"
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(SystemExit) as ended:
        visualize.main([str(photo)])
    assert ended.value.code == 2 and "--stats-only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["missing.jpg"], "does not exist"),
        (["."], "holds no photos"),
        (["photo.png", "--thresholds", "4", "5.5"], "rise with the scale"),
        (["photo.png", "--scorer", "laplacian"], "--thresholds"),
        (["photo.png", "--config", "missing.py"], "missing.py"),
    ],
)
def test_bad_input_is_named_in_one_line(
    arguments: list[str], named: str, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    if arguments[0] == "photo.png":
        arguments = [str(photo), *arguments[1:]]
    with pytest.raises(SystemExit, match=named) as stopped:
        visualize.main([*arguments, "--out", str(tmp_path / "drawn")])
    assert "\n" not in str(stopped.value)


def test_a_broken_photo_is_left_out_and_the_others_are_drawn(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photo.parent / "broken.jpg").write_bytes(b"no photo")
    with pytest.raises(SystemExit, match="1 of 2 photos could not be read"):
        visualize.main([str(photo.parent), "--out", str(tmp_path / "drawn")])
    assert "broken.jpg" in capsys.readouterr().err
    assert (tmp_path / "drawn" / "photo_patches.png").is_file()
    assert not (tmp_path / "drawn" / "broken_patches.png").exists()


def test_libpng_does_not_complain_of_colour_profiles(photo: Path, capfd: pytest.CaptureFixture[str]) -> None:
    expected, data = read_photo(photo), photo.read_bytes()
    start = data.index(b"IHDR") + 4 + 13 + 4
    content = b"odd\0\0" + zlib.compress(b"no profile" * 20)
    chunk = len(content).to_bytes(4, "big") + b"iCCP" + content + zlib.crc32(b"iCCP" + content).to_bytes(4, "big")
    photo.write_bytes(data[:start] + chunk + data[start:])
    cv2.imread(str(photo))
    if not capfd.readouterr().err:
        pytest.skip("this OpenCV is silent")
    assert np.array_equal(read_photo(photo), expected) and capfd.readouterr().err == ""
