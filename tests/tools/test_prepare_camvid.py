"""tools/prepare_camvid.py: labels, folders, and what it says to folders that are not CamVid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import prepare_camvid as tool
import pytest
from PIL import Image

from evidence import camvid_in_ade20k_layout as camvid
from support.tiny_camvid import write_camvid


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("above", [False, True])
def test_labels_are_shifted_and_images_copied(above: bool, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = write_camvid(tmp_path / "theirs" / "CamVid")
    (tmp_path / "out.partial" / "images").mkdir(parents=True)  # of a run that was interrupted
    tool.main([str(source.parent if above else source), str(tmp_path / "out")])
    assert "2 training, 2 validation, 2 testing images" in capsys.readouterr().out
    for theirs, ours in (("train", "training"), ("val", "validation"), ("test", "testing")):
        for i in range(2):
            name = f"{theirs}{i}.png"
            copied = tmp_path / "out" / "images" / ours / name
            assert copied.read_bytes() == (source / theirs / name).read_bytes()
            before, after = read(source / f"{theirs}annot" / name), read(tmp_path / "out" / "annotations" / ours / name)
            assert after.dtype == np.uint8 and after.max() == 11
            assert all(b == (0 if a == 11 else a + 1) for a, b in zip(before.flat, after.flat, strict=True))
    assert len((tmp_path / "out" / "classes.txt").read_text().splitlines()) == 11
    assert not (tmp_path / "out.partial").exists()


def spoil(source: Path, what: str) -> None:
    mask = source / "valannot" / "val1.png"
    if what == "folder":
        (source / "testannot").rename(source / "elsewhere")
    elif what == "mask":
        mask.unlink()
    elif what == "empty":
        [path.unlink() for path in (source / "val").iterdir()]
    else:
        labels = np.full((36, 48) if what == "label" else (36, 47), 12 if what == "label" else 3, np.uint8)
        Image.fromarray(labels).save(mask)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("folder", "testannot does not exist"),
        ("mask", "2 images, of which 1 have no mask in .*valannot, such as val1.png"),
        ("empty", "holds 0 images"),
        ("label", "val1.png: label 12, where 0 to 11"),
        ("size", r"the mask has shape \(36, 47\), its image \(36, 48\)"),
    ],
)
def test_other_folders_are_refused(what: str, message: str, tmp_path: Path) -> None:
    source = write_camvid(tmp_path / "camvid")
    spoil(source, what)
    with pytest.raises(ValueError, match=message):
        camvid.prepare_camvid(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match=f"prepare_camvid: .*{message}"):
        tool.main([str(source), str(tmp_path / "out")])


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    source = write_camvid(tmp_path / "camvid")
    with pytest.raises(SystemExit, match="exists; remove it"):
        tool.main([str(source), str(source)])
