"""Write composed scenes as a data set in ADE20K's and in COCO's layout."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from demo.photographs import load_folder, load_shipped
from demo.scenes import BACKGROUND, Scene, compose_scene

SPLITS = (("training", "train"), ("validation", "val"))  # ADE20K's name, COCO's name
WRITTEN = {"classes.txt", "images", "annotations", "coco"}
MIN_SCENE_SIZE = 64
MIN_INSTANCE_PIXELS = 64  # an object of which less shows is not a COCO instance; its pixels keep their class


def make_demo_data(
    out: str | Path,
    images: str | Path | None = None,
    train: int = 200,
    val: int = 40,
    size: int = 512,
    seed: int = 0,
    force: bool = False,
) -> list[str]:
    """Write the data set into the new folder ``out`` and return the class names, label 1 (background) first.

    Everything is written to ``<out>.partial`` and renamed at the end, so that ``out`` is whole or absent.

    Args:
        images: folder of photographs to use instead of scikit-image's.
        train, val: number of scenes, at least 1 each.
        size: mean side of a scene in pixels, at least 64.
        force: replace ``out`` if it is an earlier data set of this tool.

    Raises:
        ValueError: for a bad value, photograph or folder, naming it and the remedy.
    """
    check_numbers(train, val, size, seed)
    out = Path(out).resolve()
    check_target(out, images, force)
    materials, backdrops = load_folder(Path(images)) if images is not None else load_shipped()
    names = [BACKGROUND, *(material.name for material in materials)]
    splits = []
    for split, count in enumerate((train, val)):
        seeds = [(seed, split, index) for index in range(count)]
        scenes = (compose_scene(materials, backdrops, size, np.random.default_rng(entropy)) for entropy in seeds)
        splits.append(tqdm(scenes, f"{SPLITS[split][0]} scenes", total=count, unit="scene", leave=False))
    write_data_set(out, names, splits)
    return names


def write_data_set(out: Path, names: Sequence[str], splits: Sequence[Iterable[Scene]]) -> None:
    """Write training and validation scenes into ``out``, which is whole or absent.

    Args:
        names: of label 1 (background) and on.
        splits: the scenes of training and of validation.
    """
    partial = out.with_name(out.name + ".partial")
    make_room(partial)
    partial.mkdir(parents=True)
    (partial / "classes.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    for split, scenes in enumerate(splits):
        write_split(partial, split, scenes, names[1:])
    move_into_place(partial, out)


def check_numbers(train: int, val: int, size: int, seed: int) -> None:
    limits = (("train", train, 1), ("val", val, 1), ("size", size, MIN_SCENE_SIZE), ("seed", seed, 0))
    for name, value, least in limits:
        if value < least:
            raise ValueError(f"--{name} is {value}; it must be at least {least}")


def check_target(out: Path, images: str | Path | None, force: bool) -> None:
    if images is not None and Path(images).resolve().is_relative_to(out):
        raise ValueError(f"the photographs ({images}) lie inside the output folder {out}; choose another folder")
    if out.exists() and not force:
        raise ValueError(f"{out} exists; pass --force to replace it or choose another folder")
    check_ours(out)


def check_ours(folder: Path) -> None:
    """Raise ValueError for a folder with anything that this tool did not write."""
    if not folder.exists():
        return
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if found and ("classes.txt" not in found or not found <= WRITTEN):
        raise ValueError(f"{folder} holds more than a data set of this tool; remove it or choose another folder")


def make_room(folder: Path) -> None:
    check_ours(folder)
    if folder.exists():
        shutil.rmtree(folder)


def move_into_place(partial: Path, out: Path) -> None:
    """Rename, so that no half-removed or half-written folder is ever called ``out``."""
    if not out.exists():
        os.replace(partial, out)
        return
    old = out.with_name(out.name + ".old")
    make_room(old)
    os.replace(out, old)
    os.replace(partial, out)
    shutil.rmtree(old)


# ---- files ----------------------------------------------------------------------------------------------------------


def write_split(root: Path, split: int, scenes: Iterable[Scene], categories: Sequence[str]) -> None:
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
    """Encode and write, so that a full disk is an OSError with the file's name and not OpenCV's silent False."""
    path.write_bytes(cv2.imencode(path.suffix, image, options)[1].tobytes())


def coco_annotations(scene: Scene) -> Iterator[dict[str, Any]]:
    """Yield an entry per object of which at least 64 pixels show; box and area are those of the exact mask."""
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
    """Trace the outer borders of a uint8 mask along pixel edges, as COCO's [x, y, x, y, ...]; holes are filled.

    OpenCV's contours run through pixel centres. In the doubled mask, pixel x covers 2x and 2x + 1, whose halves rounded
    up are x and x + 1, the two edges: a single pixel at (0, 0) gives the square [0, 0, 0, 1, 1, 1, 1, 0].
    """
    doubled = cv2.copyMakeBorder(mask.repeat(2, axis=0).repeat(2, axis=1), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    contours = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE, offset=(-1, -1))[0]
    edges = [cv2.approxPolyDP((contour + 1) // 2, 0.6, closed=True)[:, 0] + (left, top) for contour in contours]
    return [edge.ravel().tolist() for edge in edges if len(edge) >= 3]
