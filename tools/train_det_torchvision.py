"""Train Mask R-CNN, or Faster R-CNN for boxes without masks, with an adaptive ViT on a data set in COCO's layout, with
torchvision, and score it as COCO does.

    python tools/train_det_torchvision.py DATA --out runs/det --model vit_small_patch16_224 --pretrained timm
    python tools/train_det_torchvision.py DATA --out runs/det --resume
    python tools/train_det_torchvision.py DATA --out runs/det --eval-only [--thresholds none]

DATA is a folder in COCO's layout (annotations/instances_{train,val}2017.json, train2017, val2017), or one that
tools/make_demo_data.py wrote. OUT gets log.jsonl (losses, tokens kept), last.pth and results.json (COCO's twelve
numbers for boxes and masks; with --by-scale also AP by the patches under objects). Without --task, data without
segmentations are trained and scored for boxes alone. Runs with and without a GPU, in one process; to train on several
GPUs, use Detectron2. tools/predict.py draws what the model finds in photos.
"""

from __future__ import annotations

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.packages import needed_packages

with needed_packages("train_det_torchvision"):
    import torch

    from apt_dense.hosts.coco import check_same_categories
    from apt_dense.hosts.find_patch_selector import find_patch_selector
    from apt_dense.hosts.locks import lock_folder
    from apt_dense.hosts.readable_images import DataError, line_of
    from apt_dense.hosts.run_errors import RunError, explaining_errors
    from apt_dense.hosts.torchvision.build_detector import PRESETS, build_model
    from apt_dense.hosts.torchvision.run_settings import TASKS, Settings
    from apt_dense.hosts.torchvision.safe_checkpoints import CHECKPOINT, load_weights, read_run, settings_of
    from apt_dense.weights.files import CheckpointError, write_text_whole

    from shared.dry_run import Trial, describe_trial
    from shared.option_types import device
    from shared.token_counts import TokenCounter
    from torchvision_detection.data import CocoSplit, load_split
    from torchvision_detection.evaluation import evaluate
    from torchvision_detection.training import Trainer, train

_DEFAULTS = Settings()
_EXPECTED = CheckpointError, DataError, FloatingPointError  # which say in one line what to do
_MODEL_HELP = f"{', '.join(PRESETS)} (ViTDet's, with windows and relative positions) or the name of a timm ViT"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options. Settings that were not given are left out: they come from the checkpoint or ``Settings``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of the data set")
    parser.add_argument("--out", type=Path, required=True, help="folder of log, checkpoint and results")
    parser.add_argument("--resume", action="store_true", help="continue from OUT/last.pth, if there is one")
    parser.add_argument("--dry-run", action="store_true", help="say what training would do: parameter groups, memory")
    parser.add_argument("--eval-only", action="store_true", help="score a checkpoint and end")
    parser.add_argument("--checkpoint", type=Path, help="what --eval-only scores (default: OUT/last.pth)")
    parser.add_argument(
        "--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that read images (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=1000, help="iterations (default: %(default)s)")
    parser.add_argument(
        "--allow-empty-classes", action="store_true", help="accept data without objects of some classes"
    )
    parser.add_argument(
        "--by-scale", nargs="*", type=float, metavar="T", help="also score objects by the share of large patches under "
        "them: the model's patches, or those of these thresholds"
    )  # fmt: skip
    parser.add_argument("--eval-every", type=int, default=0, help="iterations; 0 for the end only (the default)")
    _add_settings(parser.add_argument_group("settings (kept in the checkpoint)"))
    args = parser.parse_args(argv)
    if args.save_every < 1 or args.eval_every < 0 or args.workers < 0:
        parser.error("--save-every must be at least 1, --eval-every and --workers at least 0")
    return args


def _add_settings(group: argparse._ArgumentGroup) -> None:
    def add(name: str, help: str, **options: object) -> None:
        default = getattr(_DEFAULTS, name)
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, help=f"{help} (default: {shown})", default=argparse.SUPPRESS, **options)

    found = "default: masks if the data have them"
    group.add_argument("--task", choices=list(TASKS), default=argparse.SUPPRESS, help=f"what to learn ({found})")
    add("model", _MODEL_HELP)
    add("pretrained", "weights of a ViT: a file, or timm for those of a timm model")
    add(
        "patch_size",
        "pixels, to resample patches: 16 for DINOv2's of 14; None for the model's own",
        type=int,
    )
    add("thresholds", "one number per scale from 1 up, or none for uniform patches", nargs="+", metavar="T")
    add("scorer", "what thresholds are compared with: a scorer's name, or a file of tools/fit_scorer.py")
    add(
        "anneal",
        "raise the thresholds from 0, uniform patches, between these shares of the run, such as 0 0.5",
        type=float, nargs=2, metavar=("BEGIN", "END"),
    )  # fmt: skip
    add("expected_tokens", "warn where training keeps another share of tokens than this, by 10 %% of it", type=float)
    add("drop_padding", "spend no tokens on padding", action=argparse.BooleanOptionalAction)
    add("size", "pixels of the longer side", type=int)
    add("channels", "channels of pyramid and heads", type=int)
    add(
        "scale_factors",
        "sizes of the pyramid's levels relative to the ViT's feature map, descending, from 4, 2, 1 and 0.5",
        type=float, nargs="+", metavar="FACTOR",
    )  # fmt: skip
    add("box_features", "width of the box head's linear layer", type=int)
    add("proposals", "boxes per image that the RPN hands on", type=int)
    add("box_samples", "of these, boxes per image that losses are computed for", type=int)
    add("checkpoint_blocks", "recompute activations to save memory", action=argparse.BooleanOptionalAction)
    add("scale_jitter", "lowest and highest factor of --size in training", type=float, nargs=2, metavar="FACTOR")
    add("batch_size", "images per iteration", type=int)
    add("iterations", "length of the run", type=int)
    add("lr", "learning rate", type=float)
    add("lr_decay", "factor of the rate per layer; None is 0.7 with --pretrained, otherwise 1", type=float)
    add("weight_decay", "of AdamW", type=float)
    add("warmup", "iterations over which the rate rises", type=int)
    add("clip", "largest norm of the gradients, 0 for any", type=float)
    add("amp", "compute in bfloat16", action=argparse.BooleanOptionalAction)
    add("seed", "of weights, order and augmentation", type=int)


def given_settings(args: argparse.Namespace) -> dict[str, object]:
    """Return the settings on the command line, in the types of ``Settings``."""
    names = [field.name for field in dataclasses.fields(Settings)]
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if "thresholds" in given:
        given["thresholds"] = _thresholds(given["thresholds"])
    given |= {name: tuple(given[name]) for name in ("scale_factors", "scale_jitter", "anneal") if name in given}
    return given


def _thresholds(words: Sequence[str]) -> tuple[float, ...]:
    if list(words) == ["none"]:
        return ()
    try:
        return tuple(float(word) for word in words)
    except ValueError:
        raise ValueError(f"--thresholds {' '.join(words)}: expected numbers such as 5.5 4.0, or none") from None


def checkpoint_path(args: argparse.Namespace) -> Path:
    return (args.eval_only and args.checkpoint) or args.out / CHECKPOINT


def read_checkpoint(args: argparse.Namespace) -> Mapping[str, Any] | None:
    """Read the checkpoint to resume from or to score; None to start a run. Raises as ``read_run``."""
    path = checkpoint_path(args)
    if not path.exists():
        return None
    if not (args.resume or args.eval_only):
        raise ValueError(f"{path} exists; add --resume to continue that run, or choose another --out")
    return read_run(path)


def load_splits(args: argparse.Namespace, task: str | None) -> list[CocoSplit]:
    """Read "val" and, to train, "train". Without a task, masks are used if both have them."""
    names = ("val",) if args.eval_only else ("val", "train")
    masks = None if task is None else task == "masks"
    splits = [load_split(args.data, name, not args.allow_empty_classes, masks) for name in names]
    without = [name for name, split in zip(names, splits, strict=True) if not split.masks]
    if task is None and without:
        logging.info("the %s data have no masks: boxes alone are learned and scored (--task boxes)", without[0])
        return [split._replace(masks=False) for split in splits]
    return splits


def make_trainer(args: argparse.Namespace, split: CocoSplit, checkpoint: Mapping[str, Any] | None) -> Trainer:
    """Make a trainer at the first iteration or, from a checkpoint's content, at its own."""
    given = {"task": "masks" if split.masks else "boxes"} | given_settings(args)
    if checkpoint is None:
        return Trainer(Settings(**given), split, args.device)
    path = checkpoint_path(args)
    settings = dataclasses.replace(settings_of(checkpoint, path), **given)
    trainer = Trainer(settings, split, args.device, pretrained=False)
    trainer.load(checkpoint, path)
    logging.info("continuing from iteration %d of %s", trainer.iteration, path)
    return trainer


def load_model(
    args: argparse.Namespace, val: CocoSplit, checkpoint: Mapping[str, Any] | None
) -> tuple[torch.nn.Module, Settings]:
    """Load the model of a checkpoint. Settings on the command line, such as thresholds, replace the trained ones."""
    path = checkpoint_path(args)
    if checkpoint is None:
        raise FileNotFoundError(f"checkpoint {path} does not exist; name one with --checkpoint")
    check_same_categories(val.categories, checkpoint["categories"], "the val data", path)
    trained = settings_of(checkpoint, path)
    if val.masks and trained.task == "boxes":
        raise ValueError(f"{path} was trained for boxes alone, so it cannot be scored for masks; leave out --task")
    settings = dataclasses.replace(trained, **given_settings(args))
    # Positions keep the size that they were trained in; images may have another. Masks may be left out of the score.
    as_trained = dataclasses.replace(settings, size=trained.size, task=trained.task)
    model = build_model(as_trained, val.num_classes, pretrained=False)
    load_weights(model, checkpoint["model"], path)
    model.transform.min_size, model.transform.max_size = (settings.size,), settings.size
    return model.to(args.device), settings


def check_by_scale(args: argparse.Namespace, model: torch.nn.Module) -> None:
    """Raise on thresholds that the model cannot be scored by, before anything takes time."""
    if args.by_scale is not None:
        find_patch_selector(model, args.by_scale or None)


def score(model: torch.nn.Module, val: CocoSplit, settings: Settings, args: argparse.Namespace) -> dict:
    """Evaluate, and write the numbers to OUT/results.json."""
    tokens = TokenCounter(model.backbone.net)
    with explaining_errors(args.out, expected=_EXPECTED):
        results = evaluate(model, val, amp=settings.amp, workers=args.workers, by_scale=args.by_scale)
    results["tokens_kept"] = tokens.take()
    args.out.mkdir(parents=True, exist_ok=True)
    write_text_whole(args.out / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def dry_run(trainer: Trainer, workers: int) -> str:
    """Describe a training by a few of its steps, of which nothing is kept."""
    batches, model = trainer.batches(workers), trainer.model.train()

    def loss() -> torch.Tensor:
        images, targets = next(batches)
        targets = [{name: value.to(trainer.device) for name, value in target.items()} for target in targets]
        with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.settings.amp):
            return sum(model([image.to(trainer.device) for image in images], targets).values())

    return describe_trial(Trial(model, trainer.optimizer, loss, trainer.settings.batch_size))


def run(args: argparse.Namespace) -> dict | None:
    """Do what the command line asks for; return None if the training was stopped."""
    checkpoint = read_checkpoint(args)
    trained = None if checkpoint is None else settings_of(checkpoint, checkpoint_path(args)).task
    val, *train_split = load_splits(args, getattr(args, "task", trained))
    if args.eval_only:
        model, settings = load_model(args, val, checkpoint)
        check_by_scale(args, model)
        return score(model, val, settings, args)
    (split,) = train_split
    trainer = make_trainer(args, split, checkpoint)
    check_by_scale(args, trainer.model)
    check_same_categories(val.categories, split.categories, "the val data", "the training data")
    if args.dry_run:
        print(dry_run(trainer, args.workers))
        return {}
    options = {name: getattr(args, name) for name in ("eval_every", "save_every", "workers", "by_scale")}
    with explaining_errors(args.out, expected=_EXPECTED):
        finished = train(trainer, args.out, val=val, **options)
    if not finished:
        logging.info("stopped after iteration %d; add --resume to continue", trainer.iteration)
        return None
    with lock_folder(args.out):
        return score(trainer.model, val, trainer.settings, args)


def main(argv: Sequence[str] | None = None) -> dict | None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        results = run(args)
    except DataError as error:
        sys.exit(f"train_det_torchvision: {line_of(error) or error}")
    except (OSError, ValueError, TypeError, FloatingPointError, RunError) as error:
        sys.exit(f"train_det_torchvision: {error}")
    for kind in [kind for kind in results or () if kind != "tokens_kept"]:
        print(kind, "  ".join(f"{name} {value:.3f}" for name, value in results[kind].items()))
    return results


def script() -> None:
    """Run ``main`` so that a caller can tell a stopped run from a finished one."""
    if main() is None:
        raise KeyboardInterrupt("stopped; add --resume to continue")


if __name__ == "__main__":
    shared.interrupts.run(script)
