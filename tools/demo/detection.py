"""The detection half of the quickstart: train twins with torchvision, score them with COCO's numbers."""

import contextlib
import io
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from apt_dense.hosts.torchvision.load_trained_detector import load_trained_detector
from apt_dense.hosts.torchvision.run_settings import TASKS, Settings
from apt_dense.hosts.torchvision.safe_checkpoints import CHECKPOINT
from apt_dense.option_checks import Options, each, instance, option, whole

from demo import TWINS, check_shown
from demo.detection_sheet import draw_sheet
from demo.resumable_stages import Record, Stage, run_stage
from shared.picture_layout import write_png
from shared.token_counts import TokenCounter
from torchvision_detection.data import CocoSplit, load_split
from torchvision_detection.evaluation import coco_scores, detect, score_where_right_ones_dominate
from torchvision_detection.training import LOG, Trainer, train


@dataclass(frozen=True)
class DetectionPlan(Options):
    """Amounts of everything: training of each twin, test scenes scored, scenes shown. All are checked."""

    settings: Settings = option(Settings(), instance(Settings))
    scored: int = option(40, whole(1))
    shown: tuple[int, ...] = option((0, 2, 5), each(whole(0)))

    def _check_together(self) -> None:
        check_shown("shown", self.shown, self.scored)


# ViT and patches are those of the segmentors (configs/mmseg/demo_*.py). Two levels, of strides 8 and 16, and narrow
# heads leave most of the time to the backbone, as in real detectors; from random weights a few hundred iterations would
# not do.
PLAN = DetectionPlan(
    Settings(
        model="vit_demo", patch_size=8, thresholds=(0.15, 0.1), scorer="laplacian", size=304, channels=64,
        scale_factors=(1.0, 0.5), box_features=128, proposals=100, box_samples=64, scale_jitter=(0.9, 1.1),
        batch_size=2, iterations=250, lr=5e-4, lr_decay=1.0, weight_decay=0.05, warmup=10,
    ),
)  # fmt: skip
SHORT = DetectionPlan(replace(PLAN.settings, iterations=8), scored=4, shown=(0,))


def settings_of(twin: str, plan: DetectionPlan, segmentor: Path) -> Settings:
    """Return the settings of a twin; thresholds and the weights it starts from are all that differs."""
    settings = replace(plan.settings, pretrained=str(segmentor))
    return settings if twin == "adaptive" else replace(settings, thresholds=())


def run_detection(
    root: Path, scenes: Path, segmentors: Mapping[str, Record], plan: DetectionPlan, force: bool = False
) -> dict[str, Record]:
    """Run the stages below ``root`` that are not finished there; return the records of all by name.

    Args:
        scenes: folder of the demo data.
        segmentors: the stages of the trained twins, whose backbones those of the detectors start from.
    """
    done = {}
    for twin in TWINS:
        settings = settings_of(twin, plan, segmentors[twin].folder / "model.pth")
        uses = {"segmentor": segmentors[twin].made, "settings": asdict(settings), "scored": plan.scored}
        stage = Stage(
            f"detection_{twin}", uses,
            lambda folder, settings=settings: train_twin(folder, scenes, settings, plan.scored), [CHECKPOINT],
            tell=lambda results: f"box AP {results['AP']:.3f}, {results['tokens']:.0%} of tokens",
        )  # fmt: skip
        done[twin] = run_stage(stage, root, force)
    uses = {twin: done[twin].made for twin in TWINS} | {"shown": plan.shown}
    sheet = Stage(
        "detection_sheet", uses, lambda folder: make_sheet(folder, scenes, plan, done), ["detections.png"],
        tell=lambda _: "drawn: detections.png",
    )  # fmt: skip
    done["sheet"] = run_stage(sheet, root, force)
    return done


def train_twin(folder: Path, scenes: Path, settings: Settings, scored: int) -> dict[str, Any]:
    """Train and score one twin; its weights are ``last.pth``."""
    for name in (CHECKPOINT, LOG):
        (folder / name).unlink(missing_ok=True)  # of an interrupted run with other settings
    trainer = Trainer(settings, load_split(scenes, "train"))
    if not train(trainer, folder, progress=f"{folder.name}: training"):
        raise KeyboardInterrupt
    log = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    val = _first(load_split(scenes, "val"), scored)
    tokens = TokenCounter(trainer.model.backbone.net)
    start = time.perf_counter()
    detections = detect(trainer.model, val, progress=f"{folder.name}: evaluating")
    seconds = time.perf_counter() - start
    scores = {kind: coco_scores(val.coco, detections, kind) for kind in TASKS["masks"]}
    timed = log[len(log) // 5 :]
    return {
        "AP": scores["bbox"]["AP"], "AP50": scores["bbox"]["AP50"],
        "mask AP": scores["segm"]["AP"], "mask AP50": scores["segm"]["AP50"],
        "tokens": tokens.take(),
        "train images/s": trainer.settings.batch_size / statistics.median(entry["seconds"] for entry in timed),
        "test images/s": len(val.image_ids) / seconds,
        "score threshold": score_where_right_ones_dominate(val.coco, detections),
        "first loss": statistics.mean(entry["loss"] for entry in log[:10]),
        "last loss": statistics.mean(entry["loss"] for entry in log[-10:]),
    }  # fmt: skip


def _first(split: CocoSplit, count: int) -> CocoSplit:
    """Take the first ``count`` images out of a split, so that COCOeval does not miss the others."""
    ids = split.image_ids[:count]
    truth = split.coco
    truth.dataset["images"] = truth.loadImgs(ids)
    truth.dataset["annotations"] = truth.loadAnns(truth.getAnnIds(imgIds=list(ids)))
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        truth.createIndex()
    return split._replace(image_ids=tuple(ids))


def make_sheet(folder: Path, scenes: Path, plan: DetectionPlan, done: Mapping[str, Record]) -> dict[str, Any]:
    """Draw detections.png: what each twin finds in some test scenes."""
    val = load_split(scenes, "val")
    models = {twin: load_trained_detector(done[twin].folder / CHECKPOINT) for twin in TWINS}
    thresholds = {twin: done[twin].results["score threshold"] for twin in TWINS}
    image_ids = [val.image_ids[number] for number in plan.shown]
    write_png(folder / "detections.png", draw_sheet(val, image_ids, models, thresholds))
    return {}
