"""Training a detector on a data set in COCO's layout: iterations, log, checkpoints, resuming.

A run that is killed and resumed takes the same course as one that is not: the order of the images, their augmentation
and every random number follow from the seed and the iteration.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from apt_dense.hosts.anneal_patches import AnnealedPatches
from apt_dense.hosts.check_resumed_checkpoints import (
    check_iteration,
    check_moments,
    check_optimizer,
    continuing_from,
    entries_of,
)
from apt_dense.hosts.coco import check_same_categories
from apt_dense.hosts.interrupts import stop_requests
from apt_dense.hosts.locks import lock_folder
from apt_dense.hosts.token_drift import TokenDrift
from apt_dense.hosts.torchvision.build_detector import build_model
from apt_dense.hosts.torchvision.run_settings import Settings
from apt_dense.hosts.torchvision.safe_checkpoints import CHECKPOINT, load_weights, settings_of
from apt_dense.patches.schedule import PatchSchedule
from apt_dense.weights.files import naming_file, write_text_whole, write_whole

from shared.token_counts import TokenCounter
from torchvision_detection.batches import TrainingImages, TrainingOrder, make_loader
from torchvision_detection.data import CocoSplit
from torchvision_detection.evaluation import evaluate
from torchvision_detection.optimizer import make_optimizer, rate_at

LOG = "log.jsonl"  # one object a line: losses of an iteration, or scores of an evaluation

log = logging.getLogger(__name__)


class Trainer:
    """A model in training, with everything that a checkpoint has to hold.

    Args:
        split: the training data; decides the number of classes.
        pretrained: False where ``load`` follows.
    """

    def __init__(
        self, settings: Settings, split: CocoSplit, device: str | torch.device = "cpu", pretrained: bool = True
    ) -> None:
        self.settings, self.split, self.device, self.iteration = settings, split, torch.device(device), 0
        torch.manual_seed(settings.seed)
        self.model = build_model(settings, split.num_classes, pretrained).to(self.device)
        self.optimizer = make_optimizer(self.model, settings)
        rate = partial(rate_at, warmup=settings.warmup, iterations=settings.iterations)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        self.tokens = TokenCounter(self.model.backbone.net)
        self.drift = None if settings.expected_tokens is None else TokenDrift(settings.expected_tokens)
        self.patches = None
        if settings.anneal is not None:
            self.patches = AnnealedPatches(self.model, PatchSchedule(*settings.anneal), settings.iterations)

    def batches(self, workers: int = 0) -> Iterator[tuple[list, list]]:
        """Iterate over images and targets of the remaining iterations."""
        settings = self.settings
        images = TrainingImages(self.split, settings.size, settings.scale_jitter, seed=settings.seed)
        count = len(self.split.image_ids)
        order = TrainingOrder(count, settings.batch_size, self.iteration, settings.iterations, settings.seed)
        return iter(make_loader(images, workers, order))

    def step(self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
        """Run one iteration and return its entry of the log.

        Raises:
            FloatingPointError: if the loss is not finite. The model is left as it was.
        """
        self.model.train()
        in_force = {} if self.patches is None else self.patches.set(self.iteration)
        # Sampling of proposals, drop path and all other random choices depend on the iteration alone.
        torch.manual_seed(int(np.random.SeedSequence((self.settings.seed, self.iteration)).generate_state(1)[0]))
        images = [image.to(self.device, non_blocking=True) for image in images]
        targets = [{k: v.to(self.device, non_blocking=True) for k, v in target.items()} for target in targets]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp):
            losses = self.model(images, targets)
        entry = self._entry({name: value.item() for name, value in losses.items()}) | in_force
        self._note_share(entry["tokens_kept"])
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        if self.settings.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.scheduler.step()
        self.iteration += 1
        return entry

    def _entry(self, losses: dict[str, float]) -> dict[str, float]:
        total = sum(losses.values())
        if not math.isfinite(total):
            raise FloatingPointError(
                f"the loss of iteration {self.iteration} is {total} ({losses}); start again with a lower --lr"
            )
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        return {"iteration": self.iteration, "loss": total, **losses, "tokens_kept": self.tokens.take(), "lr": rate}

    def _note_share(self, tokens_kept: float) -> None:
        """Warn once where another share of tokens is kept than expected, at the thresholds of the settings."""
        if self.drift is None or (self.patches is not None and not self.patches.reached(self.iteration)):
            return
        warning = self.drift.add(tokens_kept)
        if warning:
            log.warning(warning)

    def save(self, path: Path) -> None:
        """Write a checkpoint; a run killed meanwhile leaves the previous one."""
        content = {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(), "iteration": self.iteration,
            "settings": asdict(self.settings), "categories": self.split.categories,
        }  # fmt: skip
        content |= entries_of(content["optimizer"])
        with write_whole(path) as partial_path:
            torch.save(content, partial_path)

    def load(self, checkpoint: Mapping[str, Any], path: Path) -> None:
        """Continue from a checkpoint's content (``read_run``). Raises ValueError if it belongs to another run."""
        differences = settings_of(checkpoint, path).differences(self.settings)
        if differences:
            raise ValueError(
                f"{path} belongs to another run ({'; '.join(differences)}); resume with its settings, or choose "
                f"another folder"
            )
        check_same_categories(checkpoint["categories"], self.split.categories, path, "the training data")
        check_iteration(checkpoint["iteration"], self.settings.iterations, path)
        load_weights(self.model, checkpoint["model"], path)
        check_optimizer(checkpoint["optimizer"], checkpoint, path)
        with continuing_from(path):
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.scheduler.load_state_dict(checkpoint["scheduler"])
            if self.scheduler.last_epoch != checkpoint["iteration"]:
                raise ValueError(f"the schedule is at iteration {self.scheduler.last_epoch!r:.40}")
        check_moments(self.optimizer, path)
        self.iteration = checkpoint["iteration"]
        if self.patches is not None:
            self.patches.set_as_after(self.iteration)  # a run that is done is scored again


def train(
    trainer: Trainer, out: Path, *, val: CocoSplit | None = None, eval_every: int = 0, save_every: int = 1000,
    workers: int = 0, progress: bool | str = True, by_scale: Sequence[float] | None = None,
) -> bool:  # fmt: skip
    """Train up to the settings' number of iterations, log to OUT/log.jsonl and save to OUT/last.pth.

    The first SIGINT or SIGTERM ends the run after its current iteration, with a checkpoint.

    Args:
        val: evaluate on this split every ``eval_every`` iterations (0: never).
        save_every: iterations between checkpoints; the last one is always saved.
        progress: show a bar; a text is its title, and such a bar is removed at the end.
        by_scale: as for ``evaluate``.

    Returns:
        Whether all iterations are done.
    """
    end = trainer.settings.iterations
    with lock_folder(out), stop_requests() as stop, Log(out / LOG, trainer.iteration) as log_file:
        titled = isinstance(progress, str)
        bar = tqdm(
            trainer.batches(workers), progress if titled else "training", total=end, initial=trainer.iteration,
            disable=not progress, leave=not titled,
        )  # fmt: skip
        start = time.perf_counter()
        for batch in bar:
            entry = trainer.step(*batch)
            log_file.write(entry | {"seconds": time.perf_counter() - start})
            bar.set_postfix(loss=f"{entry['loss']:.3f}", tokens=f"{entry['tokens_kept']:.0%}")
            done, stopped = trainer.iteration == end, stop()
            if done or stopped or trainer.iteration % save_every == 0:
                trainer.save(out / CHECKPOINT)
            if stopped:
                break
            if val is not None and eval_every and not done and trainer.iteration % eval_every == 0:
                scores = evaluate(
                    trainer.model, val, amp=trainer.settings.amp, workers=workers, progress=progress, by_scale=by_scale
                )
                scores["tokens_kept"] = trainer.tokens.take()
                log_file.write({"iteration": trainer.iteration} | scores)
            start = time.perf_counter()
    return trainer.iteration == end


class Log(contextlib.AbstractContextManager):
    """A log of one JSON object a line that goes on at an iteration. Each line is in the file once ``write`` returns."""

    def __init__(self, path: Path, iteration: int) -> None:
        cut_log(path, iteration)
        self.path, self.file = path, path.open("ab", buffering=0)  # a buffer would be written once more at the end

    def write(self, entry: Mapping[str, Any]) -> None:
        """Add a line. Raises OSError, naming the file and a full disk."""
        with naming_file(self.path):
            self.file.write((json.dumps(entry) + "\n").encode())

    def __exit__(self, *error: object) -> None:
        self.file.close()


def cut_log(path: Path, iteration: int) -> None:
    """Drop what a killed run logged after its last checkpoint: those iterations are done again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # the last line may have been cut off
            entry = json.loads(line)
            if entry["iteration"] < iteration + ("loss" not in entry):
                kept.append(line + "\n")
    write_text_whole(path, "".join(kept))
