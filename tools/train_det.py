"""Train or evaluate a detector with Detectron2's lazy configs.

    python tools/train_det.py --config-file configs/detectron2/mask_rcnn_apt_vitdet_b_100ep.py --num-gpus 8
    python tools/train_det.py --config-file CONFIG --data-root DIR train.output_dir=OUT train.max_iter=1000
    python tools/train_det.py --config-file CONFIG --eval-only train.init_checkpoint=OUT/model_final.pth

Options first, then key=value overrides of the config. Without --data-root, data sets are looked for where the
environment variable DETECTRON2_DATASETS says. With --resume, a run continues from its last checkpoint exactly as if it
had not stopped. Ctrl-C ends a run after its current iteration, with a checkpoint, in all its processes. With --dry-run,
nothing is trained or kept. train.accumulate=N averages the gradients of N batches in each iteration. With
train.ap_by_scale=True, AP is also split by the patches under objects. Works with and without a GPU; without, AMP is off
unless it is bfloat16 (train.amp.dtype=bfloat16).
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import contextlib
import sys
from collections.abc import Sequence

from shared.log_on_terminal import show_log
from shared.packages import needed_packages

with needed_packages("train_det"):
    import torch
    from detectron2.config import instantiate
    from detectron2.data.detection_utils import SizeMismatchError
    from detectron2.engine import default_argument_parser, default_setup, launch
    from detectron2.utils import comm
    from detectron2.utils.events import EventStorage
    from omegaconf import DictConfig
    from torch.multiprocessing import ProcessExitedException

    from apt_dense.hosts.detectron2 import train_and_evaluate as run
    from apt_dense.hosts.detectron2.accumulation_and_bfloat16 import amp_dtype, batches_per_iteration
    from apt_dense.hosts.detectron2.arguments_from_pretrained import fill_in_config
    from apt_dense.hosts.detectron2.balanced_sampler import use_balanced_sampler
    from apt_dense.hosts.detectron2.coco_data import check_data, use_data_root
    from apt_dense.hosts.detectron2.resumable_loader import resumable
    from apt_dense.hosts.interrupts import Stopped, passing_signals_on
    from apt_dense.hosts.locks import lock_folder
    from apt_dense.hosts.readable_images import DataError, line_of
    from apt_dense.hosts.token_counts import read_counts

    from shared.balance_options import add_balance
    from shared.dry_run import Trial, describe_trial


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument("--data-root", metavar="DIR", help="folder in COCO's layout, for training and evaluation")
    parser.add_argument(
        "--allow-empty-classes", action="store_true", help="accept data without objects of some classes"
    )
    add_balance(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="say what a training on that many GPUs and machines would do: parameter "
        "groups, tokens, memory"
    )  # fmt: skip
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> DictConfig:
    """Make the final config, and check it and its data before a model is built."""
    splits = ("val",) if args.eval_only else ("train", "val")
    every_class = not args.allow_empty_classes
    cfg = run.load_config(args.config_file)
    run.check_parts(cfg, training=not args.eval_only)
    if args.data_root:
        use_data_root(cfg, args.data_root, splits, every_class)
    run.apply_overrides(cfg, args.opts)
    run.complete_config(cfg)
    # A run that goes on, and an evaluation, take all weights from its checkpoint.
    fill_in_config(cfg, keep_weights=not (args.eval_only or (args.resume and run.has_checkpoint(cfg))))
    if args.balance_draws is not None and not args.balance:
        raise ValueError("--balance-draws needs --balance FILE, in which token counts are kept")
    if args.balance and not args.eval_only:
        use_balanced_sampler(cfg, args.balance, args.balance_draws)
    check_data(cfg, splits, every_class)
    return cfg


def dry_run(args: argparse.Namespace) -> str:
    """Describe a training on the machines that are named by a few steps in this process. Raises as ``run.train``."""
    cfg, processes = prepare(args), args.num_gpus * args.num_machines
    loader = cfg.dataloader.train
    if loader.total_batch_size % processes:
        raise ValueError(f"total_batch_size={loader.total_batch_size} must be a multiple of the {processes} processes")
    images = loader.total_batch_size = loader.total_batch_size // processes
    model = instantiate(cfg.model).to(cfg.train.device).train()
    run.check_pixels(cfg, model, "train", is_new=True)
    cfg.optimizer.params.model = model
    batches, precision = iter(instantiate(resumable(loader, cfg.train.seed, 0))), cfg.train.amp

    def loss() -> torch.Tensor:
        dtype = getattr(torch, amp_dtype(cfg.train))
        with EventStorage(0), torch.autocast(torch.device(cfg.train.device).type, dtype, enabled=precision.enabled):
            return sum(model(next(batches)).values())

    tokens = read_counts(args.balance)[0] if args.balance else None
    accumulate = batches_per_iteration(cfg.train)
    return describe_trial(Trial(model, instantiate(cfg.optimizer), loss, images, processes, accumulate, tokens))


def main_worker(args: argparse.Namespace) -> None:
    """Run one process of the job."""
    if comm.is_main_process():
        show_log()
    try:
        cfg = prepare(args)
    except (OSError, ValueError) as error:
        sys.exit(f"train_det: {error}")
    writes = not args.eval_only and comm.is_main_process()
    try:
        with lock_folder(cfg.train.output_dir) if writes else contextlib.nullcontext():
            default_setup(cfg, args)
            run.evaluate_checkpoint(cfg) if args.eval_only else run.train(cfg, args.resume)
    except SizeMismatchError as error:  # of a picture whose size was not looked at before training
        sys.exit(f"train_det: {str(error).splitlines()[-1]}")
    except DataError as error:
        sys.exit(f"train_det: {line_of(error)}")
    except (run.CheckpointError, run.RunError, run.PatchOptionError, OSError) as error:
        sys.exit(f"train_det: {' '.join(str(error).split())}")
    except Stopped as stopped:
        run.logger.info("stopped after iteration %d", stopped.args[0])  # torch drops what a started process raises
        raise KeyboardInterrupt(f"stopped after iteration {stopped.args[0]}; add --resume to continue") from None


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.dry_run:
        show_log()
        try:
            print(dry_run(args))
        except (OSError, ValueError) as error:
            sys.exit(f"train_det: {' '.join(str(error).split())}")
        return
    several = args.num_gpus * args.num_machines > 1
    with passing_signals_on() if several else contextlib.nullcontext(lambda: False) as stopped:
        try:
            launch(main_worker, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))
        except ProcessExitedException as error:  # of which the process itself has said why, unless it was killed
            if not stopped():
                sys.exit(f"train_det: {error}" if error.signal_name else error.exit_code)
    if stopped():
        raise KeyboardInterrupt("stopped; add --resume to continue")


if __name__ == "__main__":
    shared.interrupts.run(main)
