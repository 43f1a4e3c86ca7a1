"""Visualize: the picture shows the partition, and bad input is named."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("tqdm", reason="the tools show their progress with it")

import visualize

from apt_dense import APTViT, PatchSelector


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
    patches = visualize.partition_photo(visualize.read_image(photo), PatchSelector(thresholds=(5.5, 4.0)))
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
    assert visualize.config_options(tmp_path / "config.py")["patch_size"] == 8


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
