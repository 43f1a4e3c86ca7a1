"""The share of tokens kept over a test, which Detectron2 has no log of."""

from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.utils.events import get_event_storage, has_event_storage
from torch import nn

from apt_dense.hosts.detectron2.backbone import APTViT
from apt_dense.hosts.detectron2.safe_checkpoints import logger


@contextmanager
def tokens_counted(model: nn.Module) -> Iterator[None]:
    """Log the share of all cells that a model keeps tokens of inside the block, and put it into the run's metrics as
    ``test/tokens_kept`` if there are any. In several processes, it is that of the images of each."""
    counts = {"tokens": 0.0, "cells": 0}
    backbones = [module for module in model.modules() if isinstance(module, APTViT)]

    def count(share: float, cells: int) -> None:
        counts["tokens"] += share * cells
        counts["cells"] += cells

    for backbone in backbones:
        backbone._log_tokens_kept = count
    try:
        yield
    finally:
        for backbone in backbones:
            del backbone._log_tokens_kept
    if counts["cells"]:
        share = counts["tokens"] / counts["cells"]
        logger.info("tokens_kept of the test: %.4f", share)
        if has_event_storage():
            get_event_storage().put_scalar("test/tokens_kept", share, smoothing_hint=False)
