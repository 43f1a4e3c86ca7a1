"""The detection half of tools/quickstart.py: Mask R-CNN on torchvision, twins, COCO's numbers, what they find."""

import contextlib
import io
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from apt_dense.patches.partition import count_tokens

from demo.stages import Record, Stage, run_stage
from shared.pictures import Colour, describe_tokens, draw_patches, side_by_side, stack, text_bar, write_png
from torchvision_detection.data import CocoSplit, load_split, read_image, read_objects
from torchvision_detection.evaluation import TokenCounter, evaluate, predict
from torchvision_detection.model import Settings, build_model, load_weights
from torchvision_detection.training import CHECKPOINT, LOG, Trainer, read_run, train

TWINS = ("uniform", "adaptive")
GAP = 8  # pixels between pictures of the sheet
SURE = 0.15  # lowest score of a box that is drawn: models that saw so little are never sure
PALETTE: tuple[Colour, ...] = (
    (240, 150, 40), (190, 60, 50), (80, 170, 60), (130, 140, 160), (235, 230, 200), (150, 110, 200), (240, 210, 60),
    (250, 120, 150),
)  # fmt: skip


@dataclass(frozen=True)
class DetectionPlan:
    """How much of everything: training of each twin, test scenes scored, scenes shown."""

    settings: Settings
    scored: int = 24
    shown: tuple[int, ...] = (0, 2, 5)


# Small enough for two CPU cores: here the heads take most of the time, so that fewer tokens save little of it. Scenes
# shrunk to so few pixels are busy, hence the high thresholds.
PLAN = DetectionPlan(
    Settings(
        model="vit_demo", thresholds=(6.8, 6.0), size=224, channels=64, box_features=128, proposals=100,
        box_samples=64, scale_jitter=(0.9, 1.1), batch_size=2, iterations=320, lr=1e-3, weight_decay=0.05, warmup=10,
    )
)  # fmt: skip
SHORT = DetectionPlan(replace(PLAN.settings, iterations=8), scored=4, shown=(0,))


def settings_of(twin: str, plan: DetectionPlan) -> Settings:
    """The twins differ in the thresholds alone."""
    return plan.settings if twin == "adaptive" else replace(plan.settings, thresholds=())


def run_detection(root: Path, scenes: Path, made: str, plan: DetectionPlan, force: bool = False) -> dict[str, Record]:
    """Run the stages below ``root`` that are not finished there; the records of all, by name.

    Args:
        scenes: folder of the demo data.
        made: when it was made; other data makes other results.
    """
    done = {}
    for twin in TWINS:
        uses = {"data": made, "settings": asdict(settings_of(twin, plan)), "scored": plan.scored}
        stage = Stage(
            f"detection_{twin}", uses, lambda folder, twin=twin: train_twin(folder, scenes, twin, plan), [CHECKPOINT]
        )
        done[twin] = run_stage(stage, root, force)
    uses = {twin: done[twin].made for twin in TWINS} | {"shown": plan.shown}
    sheet = Stage("detection_sheet", uses, lambda folder: draw_sheet(folder, scenes, plan, done), ["detections.png"])
    done["sheet"] = run_stage(sheet, root, force)
    return done


def train_twin(folder: Path, scenes: Path, twin: str, plan: DetectionPlan) -> dict[str, Any]:
    """Train and score one twin; its weights are ``last.pth``."""
    for name in (CHECKPOINT, LOG):
        (folder / name).unlink(missing_ok=True)  # of a run that was broken off with other settings
    trainer = Trainer(settings_of(twin, plan), load_split(scenes, "train"))
    if not train(trainer, folder):
        raise KeyboardInterrupt
    log = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    val = _first(load_split(scenes, "val"), plan.scored)
    tokens = TokenCounter(trainer.model.backbone.net)
    start = time.perf_counter()
    scores = evaluate(trainer.model, val)
    seconds = time.perf_counter() - start
    timed = log[len(log) // 5 :]
    return {
        "AP": scores["bbox"]["AP"], "AP50": scores["bbox"]["AP50"],
        "mask AP": scores["segm"]["AP"], "mask AP50": scores["segm"]["AP50"],
        "tokens": tokens.take(),
        "train images/s": trainer.settings.batch_size / statistics.median(entry["seconds"] for entry in timed),
        "test images/s": len(val.image_ids) / seconds,
        "first loss": statistics.mean(entry["loss"] for entry in log[:10]),
        "last loss": statistics.mean(entry["loss"] for entry in log[-10:]),
    }  # fmt: skip


def _first(split: CocoSplit, count: int) -> CocoSplit:
    """The split without the images after the first ``count``, so that COCOeval does not miss them."""
    ids = split.image_ids[:count]
    truth = split.coco
    truth.dataset["images"] = truth.loadImgs(ids)
    truth.dataset["annotations"] = truth.loadAnns(truth.getAnnIds(imgIds=list(ids)))
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        truth.createIndex()
    return split._replace(image_ids=tuple(ids))


# ---- picture --------------------------------------------------------------------------------------------------------


def draw_sheet(folder: Path, scenes: Path, plan: DetectionPlan, done: Mapping[str, Record]) -> dict[str, Any]:
    """detections.png: scene with its objects, patches, and what each twin finds."""
    val = load_split(scenes, "val")
    models = {twin: load_twin(done[twin].folder / CHECKPOINT, val.num_classes) for twin in TWINS}
    rows = [_row(val, val.image_ids[number], models) for number in plan.shown]
    width = rows[0].shape[1]
    legend = text_bar(width, [(name, PALETTE[i % len(PALETTE)]) for i, name in enumerate(val.names)])
    title = "scene and its objects | patches | found by the uniform model | found by the adaptive model"
    write_png(folder / "detections.png", stack([text_bar(width, [(title, None)]), *rows, legend], GAP))
    return {}


def load_twin(path: Path, num_classes: int) -> torch.nn.Module:
    checkpoint = read_run(path)
    model = build_model(Settings(**checkpoint["settings"]), num_classes, pretrained=False)
    load_weights(model, checkpoint["model"], path)
    return model.eval()


def _row(val: CocoSplit, image_id: int, models: Mapping[str, torch.nn.Module]) -> np.ndarray:
    pixels = read_image(val, image_id)
    masks, labels = read_objects(val, image_id)
    truth = draw_objects(pixels, np.array(masks, bool), labels)
    found = []
    for model in models.values():
        objects = predict(model, pixels, SURE)
        found.append(draw_objects(pixels, objects["masks"].numpy(), objects["labels"].tolist()))
    return side_by_side([truth, _patches(models["adaptive"], pixels), *found], GAP)


def draw_objects(pixels: np.ndarray, masks: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """Masks (n, H, W) bool of labels from 1, and their boxes, over pixels (H, W, 3) uint8."""
    filled = [i for i, mask in enumerate(masks) if mask.any()]
    if not filled:
        return pixels
    chosen = torch.from_numpy(np.ascontiguousarray(masks[filled]))
    colours = [tuple(PALETTE[(labels[i] - 1) % len(PALETTE)]) for i in filled]
    drawn = draw_segmentation_masks(
        torch.from_numpy(pixels.copy()).permute(2, 0, 1), chosen, alpha=0.45, colors=colours
    )
    boxes = torch.tensor([_box(mask) for mask in masks[filled]], dtype=torch.float32)
    return draw_bounding_boxes(drawn, boxes, colors=colours, width=2).permute(1, 2, 0).numpy()


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    y, x = np.nonzero(mask)
    return x.min(), y.min(), x.max() + 1, y.max() + 1


def _patches(model: torch.nn.Module, pixels: np.ndarray) -> np.ndarray:
    """The patches that the detector cuts the picture into, at the size that it resizes pictures to."""
    images, _ = model.transform([torch.from_numpy(pixels).permute(2, 0, 1).float() / 255])
    scale_map = model.backbone.net.partition(images.tensors)
    height, width = images.image_sizes[0]
    shown = torch.nn.functional.interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1)[None].float(), size=(height, width), mode="bilinear", antialias=True
    )[0].permute(1, 2, 0).byte().numpy()  # fmt: skip
    drawn = draw_patches(shown, scale_map[0].numpy(), model.backbone.net.patch_size)
    kept = count_tokens(scale_map, len(model.backbone.net.thresholds) + 1).sum().item()
    drawn = cv2.resize(drawn, pixels.shape[1::-1], interpolation=cv2.INTER_AREA)
    return stack([drawn, text_bar(drawn.shape[1], [(describe_tokens([kept], scale_map.numel()), None)])])
