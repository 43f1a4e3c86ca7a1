"""The segmentation half of the quickstart: make scenes, train twins with MMSegmentation, time them side by side."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import skimage
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from tqdm import tqdm

from apt_dense.hosts.mmseg.training_config import load_config
from apt_dense.option_checks import Options, each, option, text, whole

from demo import TWINS, check_shown
from demo.build_and_run_segmentors import build, load_model, partition, predict, save_weights
from demo.dataset import make_demo_data
from demo.resumable_stages import Record, Stage, run_stage
from demo.segmentation_sheet import GAP, draw_sheet
from demo.training_bar import TrainingBar
from shared.photo_files import read_photo
from shared.picture_layout import resize_longer_side, stack, text_bar, write_png

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "mmseg"
WARM_UP = 3  # images of each twin that are not timed


@dataclass(frozen=True)
class Plan(Options):
    """Amounts of everything; each is checked by type and range.

    train, val: scenes to train and to test on; iters: of training, of each twin.
    size: mean side of a scene in pixels, and the longer side of whole photos.
    shown_scenes, photos: what the contact sheet shows: numbers of test scenes, files of scikit-image.
    """

    train: int = option(240, whole(1))
    val: int = option(40, whole(1))
    iters: int = option(200, whole(1))
    size: int = option(304, whole(64))
    shown_scenes: tuple[int, ...] = option((1, 4), each(whole(0)))
    photos: tuple[str, ...] = option(("chelsea.png", "coins.png", "rocket.jpg"), each(text))

    def _check_together(self) -> None:
        check_shown("shown_scenes", self.shown_scenes, self.val)


SHORT = Plan(train=24, val=8, iters=15, shown_scenes=(1,), photos=("chelsea.png",))


def run_segmentation(root: Path, plan: Plan, force: bool = False, compare: bool = True) -> dict[str, Record]:
    """Run the stages below ``root`` that are not finished there; return their records by name.

    Args:
        compare: time the trained twins and draw what they predict.
    """
    amounts = {"train": plan.train, "val": plan.val, "size": plan.size}
    made = Stage("data", amounts, lambda folder: make_scenes(folder, amounts), ["scenes"], tell=_tell_data)
    data = run_stage(made, root, force)
    configs = {twin: demo_config(twin, data.folder / "scenes", plan.iters) for twin in TWINS}
    uses = {"data": data.made, "configs": [config.to_dict() for config in configs.values()]}
    weights = [f"{twin}.pth" for twin in TWINS]
    done = {"data": data}
    start_stage = Stage("start", uses, lambda folder: save_start(folder, configs), weights, tell=_tell_start)
    done["start"] = run_stage(start_stage, root, force)
    for twin in TWINS:
        start = done["start"].folder / f"{twin}.pth"
        stage = Stage(
            twin, {"start": done["start"].made},
            lambda folder, twin=twin, start=start: train(folder, configs[twin], start, twin), ["model.pth"],
            tell=lambda results: f"mIoU {results['mIoU']:.1f}, {results['tokens, train']:.0%} of tokens in training",
        )  # fmt: skip
        done[twin] = run_stage(stage, root, force)
    if not compare:
        return done
    uses = {twin: done[twin].made for twin in TWINS}
    speed = Stage("speed", uses, lambda folder: compare_speed(configs, done), tell=_tell_speed)
    done["speed"] = run_stage(speed, root, force)
    uses |= {"scenes": plan.shown_scenes, "photos": plan.photos, "size": plan.size}
    sheet = Stage(
        "sheet", uses, lambda folder: make_sheet(folder, configs, plan, done), ["contact_sheet.png"],
        tell=lambda _: "drawn: contact_sheet.png",
    )  # fmt: skip
    done["sheet"] = run_stage(sheet, root, force)
    return done


def _tell_data(results: Mapping[str, Any]) -> str:
    return f"scenes with {len(results['classes']) - 1} kinds of objects"


def _tell_start(results: Mapping[str, Any]) -> str:
    return f"the same weights for both models, {results['parameters']['uniform'] / 1e6:.1f} million"


def _tell_speed(results: Mapping[str, Any]) -> str:
    return ", ".join(f"{twin} {results[twin]['test images/s']:.1f} images/s" for twin in TWINS)


def make_scenes(folder: Path, amounts: Mapping[str, int]) -> dict[str, Any]:
    return {"classes": make_demo_data(folder / "scenes", force=True, **amounts)}


def demo_config(twin: str, scenes: Path, iters: int) -> Config:
    """Load the twin's config on these scenes, with the schedule stretched to ``iters``."""
    return load_config(str(CONFIGS / f"demo_{twin}.py"), data_root=str(scenes), max_iters=iters)


def save_start(folder: Path, configs: Mapping[str, Config]) -> dict[str, Any]:
    """Save the initial weights of both: equal, except for the parameters that only the adaptive one has."""
    torch.manual_seed(0)
    models = {twin: build(config) for twin, config in configs.items()}
    shared = models["uniform"].state_dict()
    models["adaptive"].load_state_dict(shared, strict=False)
    for twin, model in models.items():
        save_weights(model, folder / f"{twin}.pth")
    return {"parameters": {twin: sum(p.numel() for p in model.parameters()) for twin, model in models.items()}}


def train(folder: Path, config: Config, start: Path, name: str) -> dict[str, Any]:
    """Train one twin and score it on the test scenes with MMSegmentation's Runner; its weights are ``model.pth``."""
    config = config.copy()
    config.work_dir, config.load_from = str(folder / "run"), str(start)
    runner = Runner.from_cfg(config)
    runner.register_hook(TrainingBar(name))
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
    """Time the twins on the same whole scenes, taking turns, one image at a time."""
    models = {twin: load_model(configs[twin], done[twin].folder / "model.pth") for twin in TWINS}
    scenes = [read_photo(path) for path in scene_paths(done)]
    seconds, tokens = {twin: [] for twin in TWINS}, {twin: [] for twin in TWINS}
    for scene in tqdm([*scenes[:WARM_UP], *scenes], "timing", leave=False):
        for twin, model in models.items():
            start = time.perf_counter()
            predict(model, scene)
            seconds[twin].append(time.perf_counter() - start)
            tokens[twin].append(partition(model, scene).tokens_kept)
    return {
        twin: {
            "test images/s": 1 / statistics.median(seconds[twin][WARM_UP:]),
            "tokens, test": statistics.mean(tokens[twin][WARM_UP:]),
        }
        for twin in TWINS
    }


def make_sheet(folder: Path, configs: Mapping[str, Config], plan: Plan, done: Mapping[str, Record]) -> dict[str, Any]:
    """Draw contact_sheet.png: figures of the twins, and what they predict for test scenes and whole photos."""
    models = {twin: load_model(configs[twin], done[twin].folder / "model.pth") for twin in TWINS}
    scenes = [scene_paths(done)[number] for number in plan.shown_scenes]
    photos = [resize_longer_side(read_photo(Path(skimage.data_dir) / name), plan.size) for name in plan.photos]
    sheet = draw_sheet(models, scenes, photos, configs["adaptive"].val_dataloader.dataset.metainfo)
    write_png(folder / "contact_sheet.png", stack([text_bar(1, [(_title(done), None)]), sheet], GAP))
    return {}


def _title(done: Mapping[str, Record]) -> str:
    speed = done["speed"].results
    parts = [
        f"{twin}: mIoU {done[twin].results['mIoU']:.1f}, {speed[twin]['tokens, test']:.0%} of tokens, "
        f"{speed[twin]['test images/s']:.1f} images/s"
        for twin in TWINS
    ]
    return "   |   ".join(parts)


def scene_paths(done: Mapping[str, Record]) -> list[Path]:
    """List the test scenes."""
    return sorted((done["data"].folder / "scenes" / "images" / "validation").glob("*.jpg"))
