"""Write labelled pictures as COCO's annotation files, checked by the reader that the training tools use."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apt_dense.hosts.coco import Needs, check_split
from apt_dense.hosts.coco_lenient_values import plural
from apt_dense.weights.files import write_text_whole

from annotation_formats.labelled_pictures import Labelled, Picture, area_of


class Written(NamedTuple):
    """A written annotation file.

    Args:
        path: the file.
        pictures, empty: all pictures, and those without objects.
        objects: by class.
        outlined: objects with an outline.
    """

    path: Path
    pictures: int
    empty: int
    objects: Counter[str]
    outlined: int

    def __str__(self) -> str:
        count = self.objects.total()
        by_class = ", ".join(f"{name} {number}" for name, number in self.objects.items())
        return (
            f"{plural(self.pictures, 'picture')} ({self.empty} without objects), {plural(count, 'object')} "
            f"({self.outlined} with an outline): {by_class} -> {self.path}"
        )


def annotation_files(out: Path, splits: Sequence[str]) -> dict[str, Path]:
    """Return the annotation file of each split below the folder of a data set."""
    return {split: out / "annotations" / f"instances_{split}.json" for split in splits}


def write_splits(
    splits: Mapping[str, Sequence[Picture]], names: Sequence[str], out: Path, box_outlines: bool = False
) -> list[Written]:
    """Check all splits and write OUT/annotations/instances_SPLIT.json, each whole or not at all.

    Pictures stay where they are: their names are paths from ``out``.

    Args:
        names: of the classes, which get the ids 1, 2, ...
        box_outlines: give objects without an outline that of their box.

    Raises:
        FileNotFoundError, ValueError: if the reader refuses a split; no file is then written.
        OSError: if a file cannot be written.
    """
    files = annotation_files(out, list(splits))
    texts = {}
    out.mkdir(parents=True, exist_ok=True)  # names of pictures may lead out of it
    for split, pictures in splits.items():
        texts[split] = json.dumps(coco_content(pictures, names, out, box_outlines))
        content = json.loads(texts[split])
        masks = all("segmentation" in entry for entry in content["annotations"])
        checked = check_split(content, files[split], out, split, Needs(masks, every_class=False))
        lost = len(content["annotations"]) - len(checked.content["annotations"])
        if lost:  # the log says which; a converter that loses objects must not pass
            raise ValueError(f"{files[split]} was not written: training would leave out {plural(lost, 'object')} of it")
    (out / "annotations").mkdir(exist_ok=True)
    for split, text in texts.items():
        write_text_whole(files[split], text + "\n")
    return [_counted(files[split], pictures, names) for split, pictures in splits.items()]


def coco_content(pictures: Sequence[Picture], names: Sequence[str], out: Path, box_outlines: bool) -> dict[str, Any]:
    """Return the content of an annotation file: ids of pictures and objects count from 1."""
    ids = {name: number for number, name in enumerate(names, start=1)}
    images, annotations = [], []
    for number, picture in enumerate(pictures, start=1):
        height, width = picture.size
        name = Path(os.path.relpath(picture.path.absolute(), out.absolute())).as_posix()
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for entry in picture.objects:
            fields = {"id": len(annotations) + 1, "image_id": number, "category_id": ids[entry.name]}
            annotations.append(fields | _fields(entry, box_outlines))
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _fields(entry: Labelled, box_outlines: bool) -> dict[str, Any]:
    box = [round(value, 3) for value in entry.box]
    fields = {"bbox": box, "area": round(area_of(entry), 3), "iscrowd": int(entry.ignored)}
    if entry.outline is not None:
        return fields | {"segmentation": [[round(value, 3) for value in entry.outline]]}
    if box_outlines:
        x, y, w, h = box
        return fields | {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
    return fields


def _counted(path: Path, pictures: Sequence[Picture], names: Sequence[str]) -> Written:
    objects = [entry for picture in pictures for entry in picture.objects]
    counts = Counter(dict.fromkeys(names, 0))
    counts.update(entry.name for entry in objects)
    empty = sum(not picture.objects for picture in pictures)
    return Written(path, len(pictures), empty, counts, sum(entry.outline is not None for entry in objects))
