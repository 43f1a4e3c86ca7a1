"""Write a small segmentation and detection data set made of real photographs, for trying things out.

    python tools/make_demo_data.py data/demo                    # photographs that scikit-image ships: no download
    python tools/make_demo_data.py data/demo --images my_photos # each photograph becomes one class

What comes out (ADE20K's layout, and the same scenes as COCO instances):

    data/demo/classes.txt                                       one name a line: line n is label n, 1 the background
    data/demo/images/{training,validation}/scene_00000.jpg
    data/demo/annotations/{training,validation}/scene_00000.png uint8; 0 = ignored, n = class n (reduce_zero_label=True)
    data/demo/coco/annotations/instances_{train,val}.json       category c is label c + 1, background is none

A scene depends on the seed, the split, its number, the size and the photographs, not on how many scenes are made. The
same versions of OpenCV and NumPy write the same bytes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from demo.scenes import BACKGROUND, Cutout, Material, Photo, Scene, compose_scene

SPLITS = (("training", "train"), ("validation", "val"))  # ADE20K's name, COCO's name
WRITTEN = {"classes.txt", "images", "annotations", "coco"}
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MAX_CLASSES = 12  # the first photographs of --images, by name
MIN_PHOTO_SIDE, MAX_PHOTO_SIDE = 64, 2048  # pixels; larger photographs are shrunk
MIN_SCENE_SIZE = 64
MIN_INSTANCE_PIXELS = 64  # with less to be seen, an object is no COCO instance; its pixels keep their class

# class: file, part of it (top, bottom, left, right in pixels), colour gains (R, G, B) that tint grey photographs
TEXTURES = {
    "cat": ("chelsea.png", (0, 300, 60, 380), (1.0, 1.0, 1.0)),
    "brick": ("brick.png", (0, 512, 0, 512), (1.3, 0.85, 0.75)),
    "grass": ("grass.png", (0, 512, 0, 512), (0.85, 1.1, 0.5)),
    "gravel": ("gravel.png", (0, 512, 0, 512), (1.0, 1.0, 1.0)),
    "page": ("page.png", (10, 185, 0, 384), (1.0, 1.0, 1.0)),
    "tissue": ("ihc.png", (0, 512, 0, 512), (1.0, 1.0, 1.0)),
}
OBJECTS = {"coin": ("coins.png", (1.15, 0.95, 0.6)), "retina": ("retina.jpg", (1.0, 1.0, 1.0))}  # file, colour gains
BACKDROPS = ("moon.png", "rocket.jpg", "camera.png", "cell.png", "astronaut.png", "motorcycle_left.png", "coffee.png")


class DemoDataError(ValueError):
    """Something the user can put right; the message names the value and the remedy."""


def make_demo_data(
    out: str | Path,
    images: str | Path | None = None,
    train: int = 200,
    val: int = 40,
    size: int = 512,
    seed: int = 0,
    force: bool = False,
) -> list[str]:
    """Write the data set into the new folder `out` and return the class names, label 1 (background) first.

    Everything is written to `<out>.partial` and renamed at the end, so that `out` is whole or absent.

    Args:
        images: folder of photographs to use in place of scikit-image's.
        train, val: number of scenes, at least 1 each.
        size: mean side of a scene in pixels, at least 64.
        force: replace `out` if it is an earlier data set of this tool.

    Raises:
        DemoDataError: a bad value, photograph or folder.
    """
    check_numbers(train, val, size, seed)
    out = Path(out).resolve()
    check_target(out, images, force)
    materials, backdrops = load_folder(Path(images)) if images is not None else load_shipped()
    names = [BACKGROUND, *(material.name for material in materials)]
    partial = out.with_name(out.name + ".partial")
    make_room(partial)
    partial.mkdir(parents=True)
    (partial / "classes.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    for split, count in enumerate((train, val)):
        seeds = [(seed, split, index) for index in range(count)]
        scenes = (compose_scene(materials, backdrops, size, np.random.default_rng(entropy)) for entropy in seeds)
        write_split(partial, split, tqdm(scenes, SPLITS[split][0], total=count, unit="scene"), names[1:])
    move_into_place(partial, out)
    return names


def check_numbers(train: int, val: int, size: int, seed: int) -> None:
    limits = (("train", train, 1), ("val", val, 1), ("size", size, MIN_SCENE_SIZE), ("seed", seed, 0))
    for name, value, least in limits:
        if value < least:
            raise DemoDataError(f"--{name} is {value}; it must be at least {least}")


def check_target(out: Path, images: str | Path | None, force: bool) -> None:
    if images is not None and Path(images).resolve().is_relative_to(out):
        raise DemoDataError(f"the photographs ({images}) lie inside the output folder {out}; choose another folder")
    if out.exists() and not force:
        raise DemoDataError(f"{out} exists; pass --force to replace it or choose another folder")
    check_ours(out)


def check_ours(folder: Path) -> None:
    """Refuse to delete what this tool did not write."""
    if not folder.exists():
        return
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if found and ("classes.txt" not in found or not found <= WRITTEN):
        raise DemoDataError(f"{folder} holds more than a data set of this tool; remove it or choose another folder")


def make_room(folder: Path) -> None:
    check_ours(folder)
    if folder.exists():
        shutil.rmtree(folder)


def move_into_place(partial: Path, out: Path) -> None:
    """Rename, so that no half-removed or half-written folder is ever called `out`."""
    if not out.exists():
        os.replace(partial, out)
        return
    old = out.with_name(out.name + ".old")
    make_room(old)
    os.replace(out, old)
    os.replace(partial, out)
    shutil.rmtree(old)


# ---- photographs ----------------------------------------------------------------------------------------------------


def load_folder(folder: Path) -> tuple[list[Material], list[Photo]]:
    """The user's photographs: each is a class named by its file, and the flat parts of all are the backgrounds."""
    if not folder.is_dir():
        raise DemoDataError(f"--images {folder} is not a folder; pass the folder that holds your photographs")
    paths = sorted(path for path in folder.iterdir() if is_photo(path))
    if not paths:
        raise DemoDataError(f"--images {folder} holds no photographs ({' '.join(PHOTO_SUFFIXES)}); put some there")
    title = "photographs" if len(paths) <= MAX_CLASSES else f"first {MAX_CLASSES} of {len(paths)} photographs"
    paths = paths[:MAX_CLASSES]
    stems = [BACKGROUND, *(path.stem for path in paths)]
    names = [path.stem if stems.count(path.stem) == 1 else path.name for path in paths]
    photos = [Photo.from_pixels(read_photo(path)) for path in tqdm(paths, title, unit="photo")]
    return [Material(name, photo) for name, photo in zip(names, photos)], photos


def is_photo(path: Path) -> bool:
    return path.suffix.lower() in PHOTO_SUFFIXES and not path.name.startswith(".") and path.is_file()


def load_shipped() -> tuple[list[Material], list[Photo]]:
    """Photographs inside the installed scikit-image, read as files: its loaders could start a download."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise DemoDataError("scikit-image is not installed: pip install scikit-image, or pass --images DIR")
    folder = Path(spec.origin).parent / "data"
    materials = []
    for name, (file, (top, bottom, left, right), gains) in TEXTURES.items():
        pixels = tint(read_shipped(folder, file)[top:bottom, left:right], gains)
        materials.append(Material(name, Photo.from_pixels(pixels)))
    for name, (file, gains) in OBJECTS.items():
        pixels = tint(read_shipped(folder, file), gains)
        materials.append(Material(name, Photo.from_pixels(pixels), cut_round_objects(pixels)))
    return materials, [Photo.from_pixels(read_shipped(folder, file)) for file in BACKDROPS]


def read_shipped(folder: Path, file: str) -> np.ndarray:
    if not (folder / file).is_file():
        raise DemoDataError(f"{folder} has no {file}: pip install --force-reinstall scikit-image, or pass --images DIR")
    return read_photo(folder / file)


def read_photo(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright, sides of 64 to 2048 pixels; grey, 16-bit and alpha are converted."""
    pixels = decode(path.read_bytes())
    if pixels is None:
        raise DemoDataError(f"{path} is not a readable photograph; remove it or re-save it")
    if min(pixels.shape[:2]) < MIN_PHOTO_SIDE:
        height, width = pixels.shape[:2]
        raise DemoDataError(
            f"{path} is {width} x {height} pixels, at least {MIN_PHOTO_SIDE} x {MIN_PHOTO_SIDE} are needed; remove it"
        )
    scale = min(1, MAX_PHOTO_SIDE / max(pixels.shape[:2]))
    pixels = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else pixels
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def decode(data: bytes) -> np.ndarray | None:
    """(H, W, 3) uint8 BGR, or None where the data are broken."""
    # A JPEG that ends early may still decode, to grey below the break: it lacks the end mark after its last scan.
    cut_short = data.startswith(b"\xff\xd8") and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")
    if cut_short or not data:
        return None
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        return None


def tint(pixels: np.ndarray, gains: tuple[float, float, float]) -> np.ndarray:
    return np.minimum(np.rint(pixels * np.array(gains, np.float32)), 255).astype(np.uint8)


def cut_round_objects(pixels: np.ndarray) -> tuple[Cutout, ...]:
    """Bright round things on a dark ground: coins, or the disc of a fundus photograph.

    Otsu's threshold; a region counts when it fills 70 % of its enclosing circle and is at least 24 pixels wide.
    """
    grey = cv2.medianBlur(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), 5)
    _, bright = cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    hulls = map(cv2.convexHull, cv2.findContours(bright, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0])
    return tuple(cut_ellipse(pixels, hull) for hull in hulls if is_round(hull))


def is_round(hull: np.ndarray) -> bool:
    _, radius = cv2.minEnclosingCircle(hull)
    return radius >= 12 and cv2.contourArea(hull) >= 0.7 * np.pi * radius**2


def cut_ellipse(pixels: np.ndarray, hull: np.ndarray) -> Cutout:
    """What lies in the ellipse that fits a convex outline best, 3 % smaller so that nothing of the ground shows."""
    centre, diameters, degrees = cv2.fitEllipse(hull)
    angles, turn = np.linspace(0, 2 * np.pi, 64, endpoint=False), np.deg2rad(degrees)
    x, y = 0.485 * diameters[0] * np.cos(angles), 0.485 * diameters[1] * np.sin(angles)
    points = np.stack((x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)), axis=1) + centre
    left, top = np.maximum(np.floor(points.min(axis=0)), 0).astype(int)
    right, bottom = np.ceil(points.max(axis=0)).astype(int) + 1
    crop = pixels[top:bottom, left:right]
    outline = (points - (left, top) + 0.5) / (crop.shape[1] / 2, crop.shape[0] / 2) - 1
    return Cutout(crop, outline.astype(np.float32))


# ---- files ----------------------------------------------------------------------------------------------------------


def write_split(root: Path, split: int, scenes: Iterator[Scene], categories: list[str]) -> None:
    """Write the pictures and masks of one split, and their COCO file last."""
    ade_name, coco_name = SPLITS[split]
    pictures, masks = root / "images" / ade_name, root / "annotations" / ade_name
    pictures.mkdir(parents=True)
    masks.mkdir(parents=True)
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, scene in enumerate(scenes):
        name = f"scene_{index:05d}"
        bgr = cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR)
        write_image(pictures / f"{name}.jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 95])
        write_image(masks / f"{name}.png", scene.labels, [])
        height, width = scene.instances.shape
        entries.append({"id": index + 1, "file_name": f"{name}.jpg", "height": height, "width": width})
        for annotation in coco_annotations(scene):
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **annotation})
    named = [{"id": number, "name": name} for number, name in enumerate(categories, start=1)]
    target = root / "coco" / "annotations" / f"instances_{coco_name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"images": entries, "annotations": annotations, "categories": named}))


def write_image(path: Path, image: np.ndarray, options: list[int]) -> None:
    """Encode first, so that a full disk is an OSError with the file's name and not a silent False."""
    path.write_bytes(cv2.imencode(path.suffix, image, options)[1].tobytes())


def coco_annotations(scene: Scene) -> Iterator[dict[str, Any]]:
    """One entry per object of which at least 64 pixels are to be seen; box and area are those of the exact mask."""
    for number, category in enumerate(scene.categories, start=1):
        mask = (scene.instances == number).astype(np.uint8)
        area = cv2.countNonZero(mask)
        if area < MIN_INSTANCE_PIXELS:
            continue
        left, top, width, height = cv2.boundingRect(mask)
        polygons = mask_polygons(mask[top : top + height, left : left + width], left, top)
        box = [left, top, width, height]
        yield {"category_id": category, "segmentation": polygons, "bbox": box, "area": area, "iscrowd": 0}


def mask_polygons(mask: np.ndarray, left: int = 0, top: int = 0) -> list[list[float]]:
    """Outer borders of a uint8 mask along its pixels' edges, as COCO's [x, y, x, y, ...] in pixels; holes are filled.

    OpenCV runs through pixel centres. In the mask doubled, pixel x covers 2x and 2x + 1, whose halves rounded up are
    x and x + 1, the two edges: a single pixel at (0, 0) gives the square [0, 0, 0, 1, 1, 1, 1, 0].
    """
    doubled = cv2.copyMakeBorder(mask.repeat(2, axis=0).repeat(2, axis=1), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    contours = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE, offset=(-1, -1))[0]
    edges = [cv2.approxPolyDP((contour + 1) // 2, 0.6, closed=True)[:, 0] + (left, top) for contour in contours]
    return [edge.ravel().tolist() for edge in edges if len(edge) >= 3]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to create")
    parser.add_argument("--images", type=Path, metavar="DIR", help="use the photographs of this folder")
    parser.add_argument("--train", type=int, default=200, help="training scenes (default: %(default)s)")
    parser.add_argument("--val", type=int, default=40, help="validation scenes (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="mean side in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other scenes (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace OUT if an earlier run of this tool wrote it")
    arguments = parser.parse_args(argv)
    try:
        names = make_demo_data(**vars(arguments))
    except (DemoDataError, OSError) as error:
        raise SystemExit(f"make_demo_data: {error}") from error
    print(f"{arguments.train} + {arguments.val} scenes in {arguments.out}, {len(names)} classes: {', '.join(names)}")


if __name__ == "__main__":
    main()
