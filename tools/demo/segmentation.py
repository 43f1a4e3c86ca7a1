"""The segmentation half of tools/quickstart.py: train twins, time them side by side, show what they predict."""

import contextlib
import io
import os
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import skimage
import torch
from make_demo_data import make_demo_data
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmseg.structures import SegDataSample
from torch import nn
from tqdm import tqdm

from apt_dense.hosts.mmseg.run import load_config
from apt_dense.patches.partition import count_tokens
from apt_dense.weights.files import read_checkpoint

from demo.stages import Record, Stage, run_stage
from shared.pictures import (
    describe_tokens,
    draw_patches,
    fit_canvas,
    paint_labels,
    resize_longer_side,
    side_by_side,
    stack,
    text_bar,
    write_png,
)

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "mmseg"
TWINS = ("uniform", "adaptive")
WARM_UP = 3  # images of each twin that are not timed
SHOWN_PATCH = 10  # pixels of the smallest patches on the contact sheet
COLUMN = 440  # pixels that the widest picture takes there
GAP = 8  # pixels between pictures there


@dataclass(frozen=True)
class Plan:
    """How much of everything.

    train, val: scenes to train and to test on; iters: of training, of each twin.
    size: mean side of a scene in pixels, and the longer side of whole photos.
    shown_scenes, photos: what the contact sheet shows: numbers of test scenes, files of scikit-image.
    """

    train: int = 240
    val: int = 40
    iters: int = 200
    size: int = 304
    shown_scenes: tuple[int, ...] = (1, 4)
    photos: tuple[str, ...] = ("chelsea.png", "coins.png", "rocket.jpg")


SHORT = Plan(train=24, val=8, iters=15, shown_scenes=(1,), photos=("chelsea.png",))


# ---- stages ---------------------------------------------------------------------------------------------------------


def run_segmentation(root: Path, plan: Plan, force: bool = False, data_only: bool = False) -> dict[str, Record]:
    """Run the stages below ``root`` that are not finished there, or just the data; their records by name."""
    amounts = {"train": plan.train, "val": plan.val, "size": plan.size}
    data = run_stage(Stage("data", amounts, lambda folder: make_scenes(folder, amounts), ["scenes"]), root, force)
    if data_only:
        return {"data": data}
    configs = {twin: demo_config(twin, data.folder / "scenes", plan.iters) for twin in TWINS}
    uses = {"data": data.made, "configs": [config.to_dict() for config in configs.values()]}
    weights = [f"{twin}.pth" for twin in TWINS]
    done = {"data": data}
    done["start"] = run_stage(Stage("start", uses, lambda folder: save_start(folder, configs), weights), root, force)
    for twin in TWINS:
        start = done["start"].folder / f"{twin}.pth"
        stage = Stage(
            twin, {"start": done["start"].made},
            lambda folder, twin=twin, start=start: train(folder, configs[twin], start), ["model.pth"],
        )  # fmt: skip
        done[twin] = run_stage(stage, root, force)
    uses = {twin: done[twin].made for twin in TWINS}
    done["speed"] = run_stage(Stage("speed", uses, lambda folder: compare_speed(configs, done)), root, force)
    uses |= {"scenes": plan.shown_scenes, "photos": plan.photos, "size": plan.size}
    sheet = Stage("sheet", uses, lambda folder: draw_sheet(folder, configs, plan, done), ["contact_sheet.png"])
    done["sheet"] = run_stage(sheet, root, force)
    return done


def make_scenes(folder: Path, amounts: Mapping[str, int]) -> dict[str, Any]:
    return {"classes": make_demo_data(folder / "scenes", force=True, **amounts)}


def demo_config(twin: str, scenes: Path, iters: int) -> Config:
    """The twin's config on these scenes, with the schedule stretched to ``iters``."""
    return load_config(str(CONFIGS / f"demo_{twin}.py"), data_root=str(scenes), max_iters=iters)


def save_start(folder: Path, configs: Mapping[str, Config]) -> dict[str, Any]:
    """Initial weights of both: the same, but for the parameters that only the adaptive one has."""
    torch.manual_seed(0)
    models = {twin: build(config) for twin, config in configs.items()}
    shared = models["uniform"].state_dict()
    models["adaptive"].load_state_dict(shared, strict=False)
    for twin, model in models.items():
        save_weights(model, folder / f"{twin}.pth")
    return {"parameters": {twin: sum(p.numel() for p in model.parameters()) for twin, model in models.items()}}


def train(folder: Path, config: Config, start: Path) -> dict[str, Any]:
    """Train one twin and score it on the test scenes, by MMSegmentation's Runner; its weights are ``model.pth``."""
    config = config.copy()
    config.work_dir, config.load_from = str(folder / "run"), str(start)
    runner = Runner.from_cfg(config)
    model = runner.train()
    save_weights(model, folder / "model.pth")
    history = {name: runner.message_hub.get_scalar(f"train/{name}").data[0] for name in ("time", "data_time")}
    seconds = np.subtract(history["time"], history["data_time"])[len(history["time"]) // 5 :]
    tokens = runner.message_hub.get_scalar("train/tokens_kept").data[0]
    return {
        "mIoU": float(runner.message_hub.get_scalar("val/mIoU").current()),
        "accuracy": float(runner.message_hub.get_scalar("val/aAcc").current()),
        "tokens, train": float(np.mean(tokens)),
        "train images/s": config.train_dataloader.batch_size / float(np.median(seconds)),
    }


def compare_speed(configs: Mapping[str, Config], done: Mapping[str, Record]) -> dict[str, Any]:
    """Test speed of the twins on the same whole scenes, taking turns, one image at a time."""
    models = {twin: load_model(configs[twin], done[twin].folder / "model.pth") for twin in TWINS}
    scenes = [read_rgb(path) for path in scene_paths(done)]
    seconds, tokens = {twin: [] for twin in TWINS}, {twin: [] for twin in TWINS}
    for scene in tqdm([*scenes[:WARM_UP], *scenes], "timing", leave=False):
        for twin, model in models.items():
            start = time.perf_counter()
            predict(model, scene)
            seconds[twin].append(time.perf_counter() - start)
            tokens[twin].append(share_of_tokens(model, scene))
    return {
        twin: {
            "test images/s": 1 / statistics.median(seconds[twin][WARM_UP:]),
            "tokens, test": statistics.mean(tokens[twin][WARM_UP:]),
        }
        for twin in TWINS
    }


# ---- models ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """MMEngine and its heads say a lot while they are built."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def build(config: Config) -> nn.Module:
    """The segmentor of a config, with plain batch norm as one process trains."""
    with quiet():
        init_default_scope("mmseg")
        model = MODELS.build(config.model)
        model.init_weights()
    return model


def save_weights(model: nn.Module, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    torch.save({"state_dict": model.state_dict()}, partial)
    os.replace(partial, path)


def load_model(config: Config, path: Path) -> nn.Module:
    model = build(config)
    model.load_state_dict(read_checkpoint(path)["state_dict"])
    return model.eval()


@torch.inference_mode()
def predict(model: nn.Module, image: np.ndarray) -> np.ndarray:
    """Class of each pixel (H, W) of an image (H, W, 3) uint8 RGB."""
    return model.test_step(_batch(image))[0].pred_sem_seg.data[0].numpy()


def _batch(image: np.ndarray) -> dict[str, list]:
    shape = dict.fromkeys(("img_shape", "ori_shape", "pad_shape"), image.shape[:2])
    bgr = torch.from_numpy(np.ascontiguousarray(image[..., ::-1])).permute(2, 0, 1)  # as MMSegmentation loads files
    return {"inputs": [bgr], "data_samples": [SegDataSample(metainfo=shape)]}


def partition(model: nn.Module, image: np.ndarray) -> torch.Tensor:
    """Scale map (1, h, w) of an image (H, W, 3) uint8 RGB."""
    inputs = model.data_preprocessor(_batch(image), False)["inputs"]
    return model.backbone.partition(inputs)


def share_of_tokens(model: nn.Module, image: np.ndarray) -> float:
    scale_map = partition(model, image)
    return count_tokens(scale_map, len(model.backbone.thresholds) + 1).sum().item() / scale_map.numel()


# ---- contact sheet --------------------------------------------------------------------------------------------------


def draw_sheet(folder: Path, configs: Mapping[str, Config], plan: Plan, done: Mapping[str, Record]) -> dict[str, Any]:
    """contact_sheet.png: test scenes, then whole photos: picture, patches, what each twin predicts, and the truth."""
    models = {twin: load_model(configs[twin], done[twin].folder / "model.pth") for twin in TWINS}
    metainfo = configs["adaptive"].val_dataloader.dataset.metainfo
    rows = []
    for path in [scene_paths(done)[number] for number in plan.shown_scenes]:
        truth = cv2.imread(str(path).replace("images", "annotations").replace(".jpg", ".png"), cv2.IMREAD_UNCHANGED)
        rows.append(_row(models, read_rgb(path), metainfo.palette, truth.astype(np.int64) - 1))
    for name in plan.photos:
        photo = resize_longer_side(read_rgb(Path(skimage.data_dir) / name), plan.size)
        rows.append(_row(models, photo, metainfo.palette, None))
    titles = ("picture", "patches", "uniform model", "adaptive model", "truth")
    heads = [text_bar(rows[0].shape[1] // len(titles) - GAP, [(title, None)]) for title in titles]
    legend = text_bar(rows[0].shape[1], list(zip(metainfo.classes, map(tuple, metainfo.palette), strict=True)))
    sheet = [text_bar(1, [(_title(done), None)]), side_by_side(heads, GAP), *rows, legend]
    write_png(folder / "contact_sheet.png", stack(sheet, GAP))
    return {}


def _title(done: Mapping[str, Record]) -> str:
    speed = done["speed"].results
    parts = [
        f"{twin}: mIoU {done[twin].results['mIoU']:.1f}, {speed[twin]['tokens, test']:.0%} of tokens, "
        f"{speed[twin]['test images/s']:.1f} images/s"
        for twin in TWINS
    ]
    return "   |   ".join(parts)


def _row(models: Mapping[str, nn.Module], image: np.ndarray, palette: list, truth: np.ndarray | None) -> np.ndarray:
    """Pictures of one width side by side, enlarged so that the smallest patches can be told apart."""
    backbone = models["adaptive"].backbone
    factor = SHOWN_PATCH / backbone.patch_size
    scale_map = partition(models["adaptive"], image)
    kept = count_tokens(scale_map, len(backbone.thresholds) + 1)[0].tolist()
    shown = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    pictures = [shown, draw_patches(shown, scale_map[0].numpy(), SHOWN_PATCH)]
    labels = [predict(model, image) for model in models.values()] + ([] if truth is None else [truth])
    for label in labels:
        large = cv2.resize(label.astype(np.uint8), shown.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        pictures.append(paint_labels(shown, large, palette))
    pictures += [np.full((*shown.shape[:2], 3), 255, np.uint8)] * (5 - len(pictures))
    row = side_by_side([fit_canvas(picture, shown.shape[0], COLUMN) for picture in pictures], GAP)
    return stack([row, text_bar(1, [(describe_tokens(kept, scale_map.numel()), None)], 13)])


def scene_paths(done: Mapping[str, Record]) -> list[Path]:
    """The test scenes."""
    return sorted((done["data"].folder / "scenes" / "images" / "validation").glob("*.jpg"))


def read_rgb(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB."""
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
