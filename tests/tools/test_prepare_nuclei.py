"""The nuclei's masks as COCO's boxes and outlines, and what cannot be converted."""

from pathlib import Path

import numpy as np
import prepare_nuclei
import pytest
from PIL import Image
from pycocotools.coco import COCO

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight pictures of two sizes; nucleus n of a picture is n + 3 pixels wide, the last in two parts."""
    for number in range(8):
        folder, size = tmp_path / "stage1_train" / f"id{number}", (40, 60) if number < 4 else (64, 64)
        save(folder / "images" / f"id{number}.png", np.full((*size, 4), 90, np.uint8))
        for nucleus in range(3):
            mask = np.zeros(size, np.uint8)
            mask[5 : 9 + nucleus, 10 * nucleus + 4 : 11 * nucleus + 7] = 255
            mask[30:32, 50:52] = 255 * (nucleus == 2)
            save(folder / "masks" / f"{nucleus}.png", mask)
        save(folder / "masks" / "empty.png", np.zeros(size, np.uint8))
    return tmp_path


def test_boxes_are_those_of_the_masks(data: Path) -> None:
    prepare_nuclei.main([str(data)])
    found = {}
    for split in ("train", "val"):
        coco = COCO(data / "annotations" / f"instances_{split}.json")
        for number, image in coco.imgs.items():
            assert (data / image["file_name"]).is_file()
            found[Path(image["file_name"]).stem] = split
            entries = coco.imgToAnns[number]
            assert [entry["bbox"] for entry in entries] == [[4, 5, 3, 4], [14, 5, 4, 5], [24, 5, 5, 6]]
            for entry, pixels in zip(entries, (12, 20, 30), strict=True):
                assert coco.annToMask(entry).sum() == pixels == entry["area"]
    assert sorted(name for name, split in found.items() if split == "val") == ["id1", "id5"] and len(found) == 8


def test_what_does_not_fit_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="expected folders with images/ and masks/"):
        prepare_nuclei.main([str(tmp_path / "stage1_train" / "id0")])
    save(data / "stage1_train" / "id3" / "masks" / "1.png", np.zeros((9, 9), np.uint8))
    with pytest.raises(SystemExit, match=r"id3/masks/1.png: expected a mask of \(40, 60\), not \(9, 9\)"):
        prepare_nuclei.main([str(data)])
    for path in (data / "stage1_train" / "id3" / "masks").iterdir():
        path.unlink()
    with pytest.raises(SystemExit, match="id3/masks holds no masks"):
        prepare_nuclei.main([str(data)])
