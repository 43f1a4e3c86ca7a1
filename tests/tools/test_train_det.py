"""tools/train_det.py on the shrunken real config and tiny folders in COCO's layout: data, training, weights."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support.families import HEADS, timm_model
from support.tiny_coco import (  # noqa: F401 (skips the tests where there is no Detectron2)
    ADAPTIVE,
    CATEGORIES,
    ROOT,
    SHRINK_MASK_RCNN,
    TINY_YACS,
    UNIFORM,
    annotation,
    batches,
    one_thread,
    write_coco,
)

pytest.importorskip("shapely", reason="Detectron2's training loader crops masks with shapely: pip install shapely")

import train_det
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import defaults
from detectron2.evaluation import COCOEvaluator

from apt_dense.hosts import coco_picture_sizes
from apt_dense.hosts.detectron2 import add_apt_config
from apt_dense.hosts.detectron2 import train_and_evaluate as detectron2_run
from apt_dense.hosts.detectron2.coco_data import use_data_root
from apt_dense.hosts.detectron2.train_and_evaluate import load_config
from apt_dense.hosts.readable_images import DataError, line_of

RESULTS = Path("inference", "coco_instances_results.json")
EVERY_LINE = ["train.log_period=1", "optimizer.lr=0.002"]


def arguments(data: Path, out: Path, *extra: str, flags: tuple[str, ...] = (), config: Path = ADAPTIVE) -> list[str]:
    options = ["--config-file", str(config), "--data-root", str(data), *flags]
    return [*options, *SHRINK_MASK_RCNN, *EVERY_LINE, f"train.output_dir={out}", *extra]


def logged(out: Path) -> dict[int, dict]:
    """The lines of metrics.json by iteration; what was written last counts."""
    lines = (json.loads(line) for line in (out / "metrics.json").read_text().splitlines())
    return {line["iteration"]: line for line in lines if "total_loss" in line}


def losses(out: Path) -> list[float]:
    return [line["total_loss"] for _, line in sorted(logged(out).items())]


def failure(argv: list[str]) -> str:
    """The one line that the tool ends with."""
    with pytest.raises(SystemExit) as ended:
        train_det.main(argv)
    message = str(ended.value.code)
    assert message.startswith("train_det: ") and "\n" not in message
    return message


@pytest.fixture(scope="module", autouse=True)
def _quiet_logs() -> Iterator[None]:
    """Detectron2's handlers would keep, for good, the output streams that pytest lends to a single test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(defaults, "setup_logger", lambda *_, name="detectron2", **__: logging.getLogger(name))
        yield


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="module")
def trained(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of 20 iterations, with checkpoints after 8 and 16."""
    out = tmp_path_factory.mktemp("trained")
    train_det.main(arguments(coco, out, "train.max_iter=20", "train.checkpointer.period=8"))
    return out


def described_by(path: Path, folder: Path, **options: object) -> list[str]:
    """A config whose backbone is what a weights file says, made small: the tool's arguments."""
    config = folder / "described.py"
    config.write_text(
        f"""from detectron2.config import LazyCall, LazyConfig
from apt_dense.hosts.detectron2 import APTViT
cfg = LazyConfig.load({str(ADAPTIVE)!r})
model, dataloader, train, optimizer = cfg.model, cfg.dataloader, cfg.train, cfg.optimizer
lr_multiplier = cfg.lr_multiplier
model.backbone.net = LazyCall(APTViT)(
    pretrained={str(path)!r}, thresholds=(5.5,), out_feature="last_feat", **{options!r}
)
"""
    )
    small = [option for option in SHRINK_MASK_RCNN if "backbone.net" not in option]
    return ["--config-file", str(config), *small, f"train.output_dir={folder / 'out'}", "train.max_iter=1"]


@pytest.mark.parametrize("options", [{}, {"patch_size": 14}])
def test_patches_that_no_pyramid_takes_are_refused_first(options: dict, coco: Path, tmp_path: Path) -> None:
    torch.save(dict(timm_model("dinov2").state_dict()), tmp_path / "dinov2.pth")
    argv = described_by(tmp_path / "dinov2.pth", tmp_path, num_heads=HEADS, img_size=128, **options)
    assert "patch_size=16" in failure([*argv[:2], "--data-root", str(coco), *argv[2:]])
    assert not (tmp_path / "out").exists()


def test_a_weights_file_describes_the_backbone(coco: Path, tmp_path: Path) -> None:
    """Trained, evaluated without that file from the run's own config, and from the first config."""
    path = tmp_path / "dinov2.pth"
    torch.save(dict(timm_model("dinov2").state_dict()), path)
    argv = described_by(path, tmp_path, num_heads=HEADS, patch_size=16, img_size=128)
    data = ["--data-root", str(coco)]
    train_det.main([*argv[:2], *data, *argv[2:]])
    weights = f"train.init_checkpoint={tmp_path / 'out' / 'model_final.pth'}"
    train_det.main([*argv[:2], *data, "--eval-only", *argv[2:], weights])
    path.unlink()
    found = (tmp_path / "out" / RESULTS).read_text()
    (tmp_path / "out" / RESULTS).unlink()
    train_det.main(["--config-file", str(tmp_path / "out" / "config.yaml"), *data, "--eval-only", weights])
    assert (tmp_path / "out" / RESULTS).read_text() == found


# ---- training and evaluation -----------------------------------------------------------------------------------------


def test_training_learns_saves_and_logs(trained: Path) -> None:
    lines = logged(trained)
    assert sorted(lines) == list(range(20))
    assert np.mean(losses(trained)[-5:]) < 0.8 * np.mean(losses(trained)[:5])
    assert all(0 < line["tokens_kept"] <= 1 for line in lines.values())
    of_test = json.loads((trained / "metrics.json").read_text().splitlines()[-1])
    assert "bbox/AP" in of_test and 0 < of_test["test/tokens_kept"] <= 1
    saved = {path.name for path in trained.glob("*.pth")}
    assert saved == {"model_0000007.pth", "model_0000015.pth", "model_final.pth"}
    assert json.loads((trained / "classes.json").read_text()) == [[c["id"], c["name"]] for c in CATEGORIES]


def test_training_ends_with_an_evaluation_of_boxes_and_masks(trained: Path) -> None:
    last = json.loads((trained / "metrics.json").read_text().splitlines()[-1])
    assert {"bbox/AP", "segm/AP", "bbox/AP-red", "segm/AP-blue"} <= set(last)
    assert (trained / RESULTS).is_file()


def test_evaluation_alone_gives_the_same_numbers(coco: Path, trained: Path, tmp_path: Path) -> None:
    weights = f"train.init_checkpoint={trained / 'model_final.pth'}"
    only_val = shutil.copytree(coco, tmp_path / "only_val", ignore=shutil.ignore_patterns("*train*"))
    train_det.main(arguments(only_val, tmp_path, weights, flags=("--eval-only",)))
    expected, found = (json.loads((out / RESULTS).read_text()) for out in (trained, tmp_path))
    assert [thing["bbox"] for thing in found] == [thing["bbox"] for thing in expected]
    assert {thing["category_id"] for thing in found} <= {category["id"] for category in CATEGORIES}


def test_objects_are_scored_by_scale(
    coco: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an evaluation, and in training; the uniform twin by the same patches."""
    found: list[dict] = []
    monkeypatch.setattr(detectron2_run, "print_csv_format", found.append)
    only, weights = ("--eval-only",), f"train.init_checkpoint={trained / 'model_final.pth'}"
    train_det.main(arguments(coco, tmp_path, weights, "train.ap_by_scale=True", flags=only))
    thresholds = list(load_config(str(ADAPTIVE)).model.backbone.net.thresholds)
    by_theirs = f"train.ap_by_scale={thresholds}".replace(" ", "")
    train_det.main(arguments(coco, tmp_path, weights, by_theirs, flags=only, config=UNIFORM))
    train_det.main(arguments(coco, tmp_path / "run", weights, "train.ap_by_scale=True", "train.max_iter=1"))
    boxes = json.loads((coco / "annotations" / "instances_val2017.json").read_text())["annotations"]
    for results in found:
        assert set(results) == {"bbox", "segm", "bbox_by_scale", "segm_by_scale"}
        numbers = [results["bbox_by_scale"][f"objects_{group}"] for group in ("fine", "mixed", "coarse")]
        assert sum(numbers) == len(boxes)
    adaptive, uniform = (
        [value for name, value in results["bbox_by_scale"].items() if "objects" in name] for results in found[:2]
    )
    assert adaptive == uniform
    last = json.loads((tmp_path / "run" / "metrics.json").read_text().splitlines()[-1])
    assert "bbox_by_scale/AP_coarse" in last
    for value, message in (("[9,8,7,6,5]", "thresholds="), ("much", "expected True for the")):
        assert re.search(message, failure(arguments(coco, tmp_path / "bad", f"train.ap_by_scale={value}")))


def test_boxes_and_masks_are_reported_also_where_nothing_is_found(coco: Path, trained: Path, tmp_path: Path) -> None:
    cfg = train_det.prepare(train_det.parse_args(arguments(
        coco, tmp_path, f"train.init_checkpoint={trained / 'model_final.pth'}",
        "model.roi_heads.box_predictor.test_score_thresh=1.1", flags=("--eval-only",),
    )))  # fmt: skip
    results = detectron2_run.evaluate_checkpoint(cfg)
    assert list(results) == ["bbox", "segm"] and all(math.isnan(result["AP"]) for result in results.values())


def test_uniform_twin_is_evaluated_with_adaptive_weights(coco: Path, trained: Path, tmp_path: Path) -> None:
    weights = f"train.init_checkpoint={trained / 'model_final.pth'}"
    train_det.main(arguments(coco, tmp_path, weights, flags=("--eval-only",), config=UNIFORM))
    assert (tmp_path / RESULTS).is_file()


class EvaluatingTrainer(defaults.DefaultTrainer):
    """As in the README."""

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, name: str) -> COCOEvaluator:
        return COCOEvaluator(name, output_dir=cfg.OUTPUT_DIR)


def test_yacs_config_trains_and_tests_with_detectron2_s_own_trainer(coco: Path, tmp_path: Path) -> None:
    lazy = load_config(str(ADAPTIVE))
    use_data_root(lazy, str(coco), ["train", "val"])
    cfg = get_cfg()
    add_apt_config(cfg)
    cfg.merge_from_file(str(ADAPTIVE.with_name("mask_rcnn_apt_vitdet_b.yaml")))
    cfg.merge_from_list([
        *TINY_YACS, "DATASETS.TRAIN", (lazy.dataloader.train.dataset.names,),
        "DATASETS.TEST", (lazy.dataloader.test.dataset.names,),
        "OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "SOLVER.IMS_PER_BATCH", 2,
        "INPUT.MIN_SIZE_TRAIN", (90,), "INPUT.MAX_SIZE_TRAIN", 120, "DATALOADER.NUM_WORKERS", 0,
        "INPUT.MIN_SIZE_TEST", 90, "INPUT.MAX_SIZE_TEST", 120,
    ])  # fmt: skip
    EvaluatingTrainer(cfg).train()
    assert (tmp_path / "model_final.pth").is_file()
    last = json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])
    assert {"bbox/AP", "segm/AP", "bbox/AP-red"} <= set(last) and (tmp_path / RESULTS.name).is_file()
    assert all(map(math.isfinite, losses(tmp_path)))


# ---- resuming --------------------------------------------------------------------------------------------------------


def test_resumed_run_has_the_same_losses_with_any_workers(coco: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "model_0000007.pth", tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000007.pth")
    train_det.main(arguments(coco, tmp_path, "train.max_iter=20", "train.eval_period=0",
                             "dataloader.train.num_workers=1", flags=("--resume",)))  # fmt: skip
    assert sorted(logged(tmp_path)) == list(range(8, 20))
    assert losses(tmp_path) == pytest.approx(losses(trained)[8:], rel=1e-4)


def test_killed_run_goes_on_as_if_it_had_not_been(coco: Path, trained: Path, tmp_path: Path) -> None:
    command = arguments(coco, tmp_path, "train.max_iter=20", "train.checkpointer.period=4", "train.eval_period=0")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "train_det.py"), *command],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    # Its first checkpoint is that of iteration 3; what comes after it is lost.
    while process.poll() is None and time.monotonic() < deadline:
        if (tmp_path / "last_checkpoint").exists() and max(logged(tmp_path), default=0) >= 5:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    train_det.main([*command[:4], "--resume", *command[4:]])
    assert sorted(logged(tmp_path)) == list(range(20))
    assert losses(tmp_path) == pytest.approx(losses(trained), rel=1e-4)


def test_nothing_to_resume_starts_from_the_beginning(coco: Path, trained: Path, tmp_path: Path) -> None:
    train_det.main(arguments(coco, tmp_path, "train.max_iter=2", "train.eval_period=0", flags=("--resume",)))
    assert losses(tmp_path)[0] == pytest.approx(losses(trained)[0], rel=1e-4)


# ---- data ------------------------------------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


TRAIN, VAL = Path("annotations/instances_train2017.json"), Path("annotations/instances_val2017.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "does not exist, so there is no annotations/instances_train.*expected DIR/"),
        (lambda root: (root / VAL).unlink(), r"holds no annotations/instances_val\*.json; expected"),
        (lambda root: (root / TRAIN).write_text("{"), "instances_train2017.json is damaged: it is not JSON"),
        (lambda root: (root / "val2017/000000000002.png").unlink(), "1 of the 4 images that .* such as 0+2.png"),
        (lambda root: rewrite(root / VAL, lambda c: c["categories"][0].update(name="pink")),
         "differ from those of .*json"),
        (lambda root: rewrite(root / TRAIN, lambda c: [a.update(iscrowd=1) for a in c["annotations"]]),
         "has only crowds"),
        (lambda root: rewrite(root / TRAIN, lambda c: c["annotations"].clear()), "has no objects; label some"),
        (lambda root: rewrite(root / TRAIN, lambda c: c["annotations"][0].update(segmentation=[])),
         "annotation 1 of image 1 has no segmentation"),
        (lambda root: rewrite(root / TRAIN, lambda c: c["annotations"][0].update(category_id=4)),
         "annotation 1 of image 1 has category 4"),
    ],
)  # fmt: skip
def test_bad_folders_are_refused_before_a_model_is_built(
    coco: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    root = shutil.copytree(coco, tmp_path / "damaged")
    damage(root)
    found = failure(arguments(root, tmp_path / "out"))
    assert str(root) in found
    assert re.search(message, found)


def add_difficult_objects(content: dict) -> None:
    """A crowd, boxes without width or area, a polygon of two points, and images without objects."""
    crowd = {"counts": [0, 90 * 50, 120 * 90 - 90 * 50], "size": [120, 90]}
    things = content["annotations"]
    things.append(annotation(content, 1, 7, (0, 0, 50, 90), iscrowd=1, segmentation=crowd))
    things.append(annotation(content, 1, 3, (10, 10, 0, 20)))
    things.append(annotation(content, 2, 20, (10, 10, 0, 0)))
    things.append(annotation(content, 2, 20, (10, 10, 5, 5), segmentation=[[10, 10, 15, 15]]))
    things[:] = [thing for thing in things if thing["image_id"] != 3]


def test_difficult_objects_are_trained_with_or_left_out(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "difficult", change=add_difficult_objects)
    train_det.main(arguments(root, tmp_path / "out", "train.max_iter=4", "train.eval_period=0"))
    assert len(losses(tmp_path / "out")) == 4 and all(map(math.isfinite, losses(tmp_path / "out")))
    names = {Path(name).stem for batch in batches(root, 0, 8, "dataloader.train.num_workers=0") for name, *_ in batch}
    assert names == {f"{number:012d}" for number in (1, 2, 4)}  # the image without objects is left out


def test_unreadable_image_is_named(coco: Path, tmp_path: Path) -> None:
    root = shutil.copytree(coco, tmp_path / "damaged")
    for image in (root / "train2017").iterdir():
        image.write_bytes(image.read_bytes()[:100])
    for workers in (0, 1):
        with pytest.raises(DataError) as raised:
            batches(root, 0, 1, f"dataloader.train.num_workers={workers}")
        assert line_of(raised.value).startswith(f"{root / 'train2017'}/0000")
        assert "is not a readable image" in line_of(raised.value)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("sample", [5000, 1])
def test_cut_off_jpegs_are_named(
    split: str, sample: int, coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(coco, tmp_path / "cut")
    paths = sorted((root / f"{split}2017").iterdir())
    for path in paths:
        Image.open(path).save(path, "jpeg")
    for path in paths[1:]:
        path.write_bytes(path.read_bytes()[:-30])
    monkeypatch.setattr(coco_picture_sizes, "MOST", sample)
    found = failure(arguments(root, tmp_path / "out", "train.max_iter=2"))
    says = "3 of 4 images are JPEG files that are cut off" if sample > 1 else "is a JPEG file that is cut off"
    assert says in found and str(root / f"{split}2017") in found


NET = "model.backbone.net"
#: Mistakes that show while parts are built, in the first batch or forward pass, and what is named.
LATE = [
    ("model.proposal_generator.head.in_channels=8", "model.proposal_generator in"),
    ("model.roi_heads.box_head.input_shape.channels=8", "model.roi_heads.box_head in"),
    ("model.roi_heads.box_predictor.input_shape.channels=8", "model.roi_heads.box_predictor in"),
    ("model.roi_heads.mask_head.input_shape.channels=8", "model.roi_heads.mask_head in"),
    ("model.roi_heads.box_predictor.num_classes=1", "model.roi_heads.box_predictor in"),
    ("model.roi_heads.box_pooler.output_size=5", "model.roi_heads.box_head in"),
    ("model.proposal_generator.in_features=[p2,p9]", "model.proposal_generator in"),
    ("model.proposal_generator.anchor_generator.strides=[4,8]", "model.proposal_generator.anchor_generator in"),
    ("model.pixel_mean=[1.0,2.0]", f"{NET} in"),
    (f"{NET}.foo=3", f"{NET} in"),
    (f"{NET}._target_=nope.Nope", f"{NET} in"),
    ("model.roi_heads.proposal_matcher.thresholds=[0.9,0.1]", "model.roi_heads.proposal_matcher in"),
    ("dataloader.train.mapper.image_format=XYZ", "dataloader.train.mapper in"),
    ("dataloader.train.mapper.augmentations.0.foo=3", "RandomFlip of dataloader.train.mapper.augmentations in"),
    ("dataloader.train.total_batch_size=0", "dataloader.train in"),
    ("optimizer.foo=3", "optimizer in"),
    ("lr_multiplier.warmup_length=x", "lr_multiplier in"),
    ("dataloader.evaluator.foo=3", "dataloader.evaluator in"),
]  # fmt: skip


@pytest.mark.parametrize(("option", "named"), LATE)
def test_mistakes_in_configs_are_named(option: str, named: str, coco: Path, tmp_path: Path) -> None:
    workers = f"dataloader.train.num_workers={int('mapper' in option)}"
    said = failure(arguments(coco, tmp_path, "train.max_iter=1", workers, option))
    assert said.startswith(f"train_det: {named} the config") and said.endswith(f"is in {tmp_path / 'errors.log'}")
    assert "Traceback" in (tmp_path / "errors.log").read_text()


def test_mistakes_in_configs_are_named_in_evaluations(coco: Path, trained: Path, tmp_path: Path) -> None:
    weights = f"train.init_checkpoint={trained / 'model_final.pth'}"
    option = "model.proposal_generator.in_features=[p2,p9]"
    said = failure(arguments(coco, tmp_path, weights, option, flags=("--eval-only",)))
    assert "model.proposal_generator in the config failed: KeyError: p9" in said


@pytest.mark.parametrize(
    ("option", "message"),
    [("log_period=0", "train.log_period=0 must be 1 or more"), ("max_iter=x", "whole number"),
     ("eval_period=1.5", "whole number"), ("checkpointer.period=x", "whole number"), ("device=foo", "not a device"),
     ("checkpointer.max_to_keep=0", "1 or more"), ("amp.enabled=yes_please", "True or False")],
)  # fmt: skip
def test_numbers_of_a_run_are_checked_first(option: str, message: str, coco: Path, tmp_path: Path) -> None:
    said = failure(arguments(coco, tmp_path / "out", f"train.{option}"))
    assert f"train.{option.partition('=')[0]}=" in said and message in said and not (tmp_path / "out").exists()


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "checkpoint .* does not exist; correct train.init_checkpoint"),
        (b"", r"weights.pth \(0 bytes\) cannot be read: it is cut off or damaged"),
        (b"no weights", r"weights.pth \(10 bytes\) cannot be read"),
        ("half", r"weights.pth \(\d+ bytes\) cannot be read"),
        ("other", r"does not fit backbone.net: 1 loaded; .*\d+ missing \("),
    ],
)
def test_bad_weights_are_not_evaluated(
    coco: Path, trained: Path, tmp_path: Path, content: bytes | str | None, message: str
) -> None:
    path, good = tmp_path / "weights.pth", (trained / "model_final.pth").read_bytes()
    if content == "other":
        torch.save({"model": {"backbone.net.pos_embed": torch.zeros(1, 197, 48)}}, path)
    elif content is not None:
        path.write_bytes(good[: len(good) // 2] if content == "half" else content)
    found = failure(arguments(coco, tmp_path / "out", f"train.init_checkpoint={path}", flags=("--eval-only",)))
    assert re.search(message, found)


def test_damaged_pickle_of_a_model_zoo_is_named(coco: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.pkl").write_bytes(b"\x80\x04cut")
    argv = arguments(coco, tmp_path, f"train.init_checkpoint={tmp_path / 'weights.pkl'}", flags=("--eval-only",))
    assert "weights.pkl (5 bytes) cannot be read" in failure(argv)


def test_no_weights_are_nothing_to_evaluate(coco: Path, tmp_path: Path) -> None:
    found = failure(arguments(coco, tmp_path, flags=("--eval-only",)))
    assert "nothing to evaluate: set train.init_checkpoint" in found


@pytest.mark.parametrize("marker", ["gone.pth", ""])
def test_resume_from_a_missing_or_damaged_checkpoint_names_the_marker(coco: Path, tmp_path: Path, marker: str) -> None:
    (tmp_path / "last_checkpoint").write_text(marker)
    assert str(tmp_path / "last_checkpoint") in failure(arguments(coco, tmp_path, flags=("--resume",)))


def test_weights_of_another_size_are_refused_on_resume(coco: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "model_0000007.pth", tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000007.pth")
    found = failure(arguments(coco, tmp_path, "model.backbone.net.img_size=512", flags=("--resume",)))
    assert "attn.rel_pos_h is (127, 24) instead of (63, 24)" in found
