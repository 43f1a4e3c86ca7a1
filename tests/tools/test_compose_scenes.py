"""Scenes composed of photographs and cut-outs: labels, held-out sources, errors."""

import json
from pathlib import Path

import compose_scenes
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own

GREYS = {"photos": (20, 25, 30, 40), "ball": (100, 104, 107, 110), "box": (200, 204, 207, 210)}


def picture(path: Path, grey: int, size: tuple[int, int], transparent: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size, 4), grey, np.uint8)
    pixels[..., 3] = 255
    if transparent:
        pixels[:3] = pixels[-5:] = 0
    image = Image.fromarray(pixels) if transparent else Image.fromarray(pixels[..., :3])
    image.save(path)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Four photographs and four cut-outs of two classes, each of one grey level."""
    for folder, greys in GREYS.items():
        for number, grey in enumerate(greys):
            size = (150, 210) if folder == "photos" else (40, 30)
            picture(tmp_path / folder / f"{number}.png", grey, size, folder != "photos")
    return tmp_path


def run(sources: Path, out: str = "out", *options: str) -> Path:
    folders = [str(sources / name) for name in ("ball", "box")]
    counts = "--train", "6", "--val", "5", "--size", "128"
    command = [str(sources / out), "--photos", str(sources / "photos"), "--cutouts", *folders, *counts, *options]
    compose_scenes.main(command)
    return sources / out


def test_labels_are_those_of_the_objects_on_the_picture(sources: Path) -> None:
    out = run(sources)
    assert (out / "classes.txt").read_text().split() == ["background", "ball", "box"]
    seen = set()
    for mask in sorted((out / "annotations").glob("*/*.png")):
        labels = np.asarray(Image.open(mask))
        grey = np.asarray(Image.open(Path(str(mask).replace("annotations", "images")).with_suffix(".jpg")))[..., 1]
        assert labels.shape == grey.shape == (128, 128)
        assert labels.min() >= 1 and labels.max() <= 3
        seen |= set(np.unique(labels))
        medians = [
            float(np.median(grey[labels == label])) for label in np.unique(labels) if (labels == label).sum() > 30
        ]
        assert medians == sorted(medians), mask  # backdrops are darker than balls, and those than boxes
    assert seen == {1, 2, 3}


def test_no_source_is_in_both_splits(sources: Path) -> None:
    """Each backdrop has a grey level of its own, changed by at most 15 and 5 per cent: the held-out one is alone."""
    for number, grey in enumerate((10, 250, 10, 10)):
        picture(sources / "photos" / f"{number}.png", grey, (150, 210), False)
    out = run(sources)
    levels = {
        split: [
            float(np.median(np.asarray(Image.open(path)))) for path in sorted((out / "images" / split).glob("*.jpg"))
        ]
        for split in ("training", "validation")
    }
    assert max(levels["training"]) < 100 < min(levels["validation"])


def test_objects_are_coco_instances_small_ones_too(sources: Path) -> None:
    out = run(sources, "out", "--train", "30", "--size", "256")
    coco = COCO(out / "coco" / "annotations" / "instances_train.json")
    sides = [max(annotation["bbox"][2:]) for annotation in coco.anns.values()]
    assert len(coco.imgs) == 30 and min(sides) < 20 and max(sides) > 50
    for number, entry in coco.imgs.items():
        labels = np.asarray(Image.open(out / "annotations/training" / f"{Path(entry['file_name']).stem}.png"))
        for annotation in coco.imgToAnns[number]:
            inside = labels[coco.annToMask(annotation) > 0]
            assert (inside == annotation["category_id"] + 1).mean() > 0.5


def test_equal_seeds_make_equal_files(sources: Path) -> None:
    one, two, other = run(sources, "one"), run(sources, "two"), run(sources, "other", "--seed", "1")
    name = Path("annotations/training/scene_00002.png")
    assert (one / name).read_bytes() == (two / name).read_bytes() != (other / name).read_bytes()
    assert json.loads((one / "coco/annotations/instances_val.json").read_text())["images"][4]["width"] == 128


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: [path.unlink() for path in sorted((root / "photos").iterdir())[1:]], "1 photograph"),
        (lambda root: picture(root / "box" / "0.png", 9, (8, 8), False), ""),
        (lambda root: [picture(path, 9, (8, 8), False) for path in (root / "box").iterdir()], "0 of 4 PNG files"),
        (lambda root: (root / "ball" / "1.png").write_bytes(b"none"), "1.png is damaged"),
        (lambda root: (root / "out").mkdir(), "exists; pass --force"),
    ],
)
def test_what_cannot_be_used_is_named(sources: Path, change: object, words: str) -> None:
    """A picture without transparent parts among others is left out."""
    change(sources)
    if not words:
        run(sources)
        return
    with pytest.raises(SystemExit, match=words):
        run(sources)
