"""Train a segmentation model with MMSegmentation's Runner.

    python tools/train_seg.py configs/mmseg/upernet_apt_vit-b16_160k_ade20k-512x512.py --data-root DIR
    torchrun --nproc_per_node 8 tools/train_seg.py CONFIG --launcher pytorch --amp

Works with and without a GPU. Checkpoints and logs go to work_dirs/CONFIG_NAME unless --work-dir says otherwise. Ctrl-C
ends a run after its current iteration, with a checkpoint, in all its processes; torchrun then prints a traceback of its
own. With --dry-run, nothing is trained or kept.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Sequence

from shared.log_on_terminal import quiet, show_log
from shared.packages import needed_packages

with needed_packages("train_seg"):
    import torch.distributed as dist
    from mmengine.config import Config
    from mmengine.optim import OptimWrapperDict
    from torch import Tensor

    from apt_dense.hosts.interrupts import Stopped, stop_requests
    from apt_dense.hosts.locks import lock_folder
    from apt_dense.hosts.mmseg.arguments_from_pretrained import fill_in_config
    from apt_dense.hosts.mmseg.balanced_sampler import use_balanced_sampler
    from apt_dense.hosts.mmseg.config_errors import ConfigError, building_from, running
    from apt_dense.hosts.mmseg.dataset_checks import check_data
    from apt_dense.hosts.mmseg.resumable_data import make_resumable
    from apt_dense.hosts.mmseg.runner_hooks import DueEvaluationHook, StopHook, use_hooks
    from apt_dense.hosts.mmseg.runner_with_checked_resume import APTRunner
    from apt_dense.hosts.mmseg.safe_checkpoints import check_resume
    from apt_dense.hosts.mmseg.training_config import complete_training, load_config, start_processes, use_amp
    from apt_dense.hosts.readable_images import DataError, line_of
    from apt_dense.hosts.run_errors import RunError
    from apt_dense.weights.files import CheckpointError

    from shared.balance_options import add_balance
    from shared.dry_run import Trial, describe_trial
    from shared.mmseg_options import add_options, use_work_dir


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "checkpoints and logs")
    parser.add_argument("--max-iters", type=int, help="iterations of training; the schedule shrinks in proportion")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in the work dir")
    parser.add_argument("--amp", action="store_true", help="mixed precision: float16, without a GPU bfloat16")
    add_balance(parser)
    parser.add_argument(
        "--dry-run", nargs="?", type=int, const=1, metavar="N", help="say what a training of N processes (default 1) "
        "would do: parameter groups, tokens, memory"
    )  # fmt: skip
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> Config:
    """Make the final config, and check it and its files before a model is built."""
    cfg = load_config(args.config, args.cfg_options, data_root=args.data_root, max_iters=args.max_iters)
    use_work_dir(cfg, args)
    cfg.resume = args.resume or cfg.get("resume", False)
    complete_training(cfg)
    fill_in_config(cfg)
    use_balanced_sampler(cfg, args.balance, args.balance_draws)
    if args.amp:
        use_amp(cfg)
    with building_from(cfg):
        check_data(cfg, ("train", "val"), every_class=not args.allow_empty_classes)
    make_resumable(cfg, check_resume(cfg) if cfg.resume else None)
    use_hooks(cfg)
    start_processes(cfg, args.launcher)
    return cfg


def train(cfg: Config) -> None:
    """Train. A first SIGINT or SIGTERM to any of its processes ends a run after its current iteration, with a
    checkpoint.

    Raises:
        Stopped: on such a signal.
        CheckpointError: for weights that cannot be read, or do not fit the model.
        ConfigError: for a part of the config that cannot be built.
        RunError: for other errors, most of which are mistakes in the config, too.
        OSError: if a file cannot be read or written.
    """
    with stop_requests() as asked, running(cfg):
        runner = APTRunner.from_cfg(cfg)
        runner.register_hook(StopHook(asked))
        runner.register_hook(DueEvaluationHook())
        runner.train()


def dry_run(cfg: Config, processes: int) -> str:
    """Describe a training of so many processes by a few steps in this one. Raises as ``train``."""
    with tempfile.TemporaryDirectory() as folder, building_from(cfg):
        cfg.work_dir = folder
        with quiet():
            runner = APTRunner.from_cfg(cfg)
            runner.check_pixels(is_new=True)
            runner._init_model_weights()
            wrapper = runner.build_optim_wrapper(cfg.optim_wrapper)
            loader = runner.build_dataloader(cfg.train_dataloader, seed=runner.seed)
        model, batches = runner.model.train(), iter(loader)
        if isinstance(wrapper, OptimWrapperDict):
            raise ConfigError("--dry-run describes a single optimizer, but optim_wrapper has several")

        def loss() -> Tensor:
            data = model.data_preprocessor(next(batches), True)
            with wrapper.optim_context(model):
                return model.parse_losses(model(**data, mode="loss"))[0]

        order = getattr(loader.sampler, "order", None)
        accumulate = cfg.optim_wrapper.get("accumulative_counts", 1)
        tokens = None if order is None else order.tokens
        return describe_trial(Trial(model, wrapper.optimizer, loss, loader.batch_size, processes, accumulate, tokens))


def is_main_process() -> bool:
    """Tell from what launchers set, before MMEngine has read it."""
    return not any(int(os.environ.get(name, 0)) for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"))


def end_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    show_log()
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    try:
        cfg = prepare(args)
    except (OSError, ValueError) as error:
        sys.exit(f"train_seg: {error}")
    if args.dry_run is not None:
        try:
            print(dry_run(cfg, args.dry_run))
        except (CheckpointError, ConfigError, OSError) as error:
            sys.exit(f"train_seg: {' '.join(str(error).split())}")
        return
    alone_or_first = args.launcher == "none" or is_main_process()
    try:
        with lock_folder(cfg.work_dir) if alone_or_first else contextlib.nullcontext():
            train(cfg)
    except DataError as error:
        sys.exit(f"train_seg: {line_of(error)}")
    except (CheckpointError, ConfigError, RunError, OSError) as error:
        sys.exit(f"train_seg: {' '.join(str(error).split())}")
    except Stopped as stopped:
        end_processes()
        if not alone_or_first:
            sys.exit(shared.interrupts.CODE)  # one of them says it
        raise KeyboardInterrupt(f"stopped after iteration {stopped.args[0]}; add --resume to continue") from None
    end_processes()


if __name__ == "__main__":
    shared.interrupts.run(main)
