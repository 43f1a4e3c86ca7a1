"""Test a trained segmentation model with MMSegmentation's Runner.

    python tools/eval_seg.py CONFIG CHECKPOINT --data-root DIR [--tta] [--by-scale] [--out DIR] [--show-dir DIR]

Works with and without a GPU. The metrics also go to WORK_DIR/TIMESTAMP/TIMESTAMP.json.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import os
import sys
from collections.abc import Sequence

from shared.log_on_terminal import show_log
from shared.packages import needed_packages

with needed_packages("eval_seg"):
    import torch.distributed as dist
    from mmengine.config import Config

    from apt_dense.hosts.mmseg.arguments_from_pretrained import fill_in_config
    from apt_dense.hosts.mmseg.config_errors import ConfigError, building_from, running
    from apt_dense.hosts.mmseg.dataset_checks import check_data
    from apt_dense.hosts.mmseg.evaluation_config import complete_test, draw_predictions, use_tta, write_masks
    from apt_dense.hosts.mmseg.runner_with_checked_resume import APTRunner
    from apt_dense.hosts.mmseg.safe_checkpoints import check_weights, load_from_safe, local_address
    from apt_dense.hosts.mmseg.scale_iou_metric import add_metric
    from apt_dense.hosts.mmseg.training_config import load_config, start_processes
    from apt_dense.hosts.readable_images import DataError, line_of
    from apt_dense.hosts.run_errors import RunError
    from apt_dense.weights.files import CheckpointError

    from shared.mmseg_options import add_options, use_work_dir


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "logs and metrics")
    parser.add_argument("checkpoint", help="checkpoint of the whole model: a file, or an address")
    parser.add_argument(
        "--out",
        help="folder for the predicted masks, PNG files named as the images, with the labels of the data set's masks "
        "(where a classes.txt gives values or colours: 0 for its first class, 1 for the next, ...)",
    )
    parser.add_argument("--show-dir", help="folder for images with the prediction painted over")
    parser.add_argument("--tta", action="store_true", help="average over six scales and mirror images")
    parser.add_argument(
        "--by-scale", nargs="*", type=float, metavar="T", help="also score pixels under small and under large patches "
        "apart: the model's, or those of these thresholds"
    )  # fmt: skip
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> Config:
    """Make the final config, and check the test data before a model is built."""
    cfg = load_config(args.config, args.cfg_options, data_root=args.data_root)
    use_work_dir(cfg, args)
    cfg.load_from, cfg.resume = local_address(args.checkpoint), False
    complete_test(cfg)
    if args.by_scale is not None:
        add_metric(cfg, args.by_scale or None)
    fill_in_config(cfg, cfg.load_from)
    if args.out:
        write_masks(cfg, args.out)
    if args.show_dir:
        draw_predictions(cfg, args.show_dir)
    with building_from(cfg):
        check_data(cfg, ("test",), every_class=not args.allow_empty_classes)
    start_processes(cfg, args.launcher)
    if args.tta:
        use_tta(cfg)
    return cfg


def build(cfg: Config) -> APTRunner:
    """Build a Runner whose model fits the checkpoint. Raises ValueError."""
    checkpoint = load_from_safe(cfg.load_from)
    with building_from(cfg):
        runner = APTRunner.from_cfg(cfg)
    model = runner.model
    while hasattr(model, "module"):  # wrapped by DistributedDataParallel, test-time augmentation, or both
        model = model.module
    check_weights(model, checkpoint, cfg.load_from)
    return runner


def main(argv: Sequence[str] | None = None) -> dict:
    args = parse_args(argv)
    show_log()
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    try:
        runner = build(prepare(args))
    except (OSError, ValueError) as error:
        sys.exit(f"eval_seg: {error}")
    try:
        with running(runner.cfg):
            metrics = runner.test()
    except DataError as error:
        sys.exit(f"eval_seg: {line_of(error)}")
    except (CheckpointError, ConfigError, RunError, OSError) as error:
        sys.exit(f"eval_seg: {' '.join(str(error).split())}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return metrics


if __name__ == "__main__":
    shared.interrupts.run(main)
