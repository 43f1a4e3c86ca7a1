"""Options of the trainers that balance tokens over processes."""

import argparse


def add_balance(parser: argparse.ArgumentParser) -> None:
    """Add ``--balance`` and ``--balance-draws``."""
    parser.add_argument(
        "--balance", metavar="FILE", help="give processes equally many tokens; FILE keeps each image's, counted once"
    )
    parser.add_argument(
        "--balance-draws", type=int, metavar="N", help="with --balance: train on N augmentations of each image in "
        "turn, which are counted; otherwise on new ones, and one of them is counted"
    )  # fmt: skip
