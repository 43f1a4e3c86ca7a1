"""Options that the commands for MMSegmentation share; imports mmengine."""

import argparse
import os
from pathlib import Path

from mmengine.config import Config, DictAction


def add_options(parser: argparse.ArgumentParser, work_dir: str) -> None:
    """Add the config, the options that override it, and those that place files and processes.

    Args:
        parser: of a command; its own arguments and options come after these.
        work_dir: what the folder of the run holds, for the help.
    """
    parser.add_argument("config", help="config file")
    parser.add_argument("--work-dir", help=f"folder of {work_dir}")
    parser.add_argument("--data-root", help="folder of the data set, for all splits")
    parser.add_argument(
        "--allow-empty-classes", action="store_true", help="accept data of which some classes have no pixel"
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help='override the config: a.b=1, lists as a="[1,2]"',
    )
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help="set by some launchers")


def use_work_dir(cfg: Config, args: argparse.Namespace) -> None:
    """Set the folder of a run's files: the option's, else the config's, else work_dirs/CONFIG_NAME."""
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or os.path.join("work_dirs", Path(args.config).stem)
