"""Tiny trainings of MMSegmentation and Detectron2 in one process or several, and what each read and computed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch.nn import Module

from apt_dense.hosts.mmseg import backbone as mmseg_backbone
from apt_dense.hosts.mmseg import resumable_data
from apt_dense.hosts.mmseg.training_config import load_config

from support import tiny_ade, tiny_trainings
from support.tiny_trainings import HAS_DETECTRON2, train_seg

if HAS_DETECTRON2:
    import train_det

    from apt_dense.hosts.detectron2 import backbone as detectron2_backbone
    from apt_dense.hosts.detectron2 import resumable_loader

    from support import tiny_coco

PORT = 30_000 + os.getpid() % 10_000


class Process(NamedTuple):
    """What a process of a training did: indices of the images it read, and the tokens of each of its batches."""

    images: list[int]
    tokens: list[int]


def train(name: str, argv: Sequence[str], out: Path, ranks: int = 2) -> list[Process]:
    """Train with "seg" or "det" in forked processes; fails if one does."""
    start = {"seg": _start_seg, "det": _start_det}[name]
    records = [out.with_suffix(f".{rank}.json") for rank in range(ranks)]
    mains = [partial(_recorded, partial(start, argv, rank, ranks, out), record) for rank, record in enumerate(records)]
    ended = tiny_trainings.run_processes(mains, out)
    assert ended == [(0, "")] * ranks, ended
    return [Process(**json.loads(record.read_text())) for record in records]


def _start_seg(argv: Sequence[str], rank: int, ranks: int, out: Path) -> None:
    """As torchrun does."""
    argv = [*argv, "--work-dir", str(out)]
    if ranks > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT), "WORLD_SIZE": str(ranks)}
        os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank))
        argv += ["--launcher", "pytorch"]
    train_seg.main(argv)


def _start_det(argv: Sequence[str], rank: int, ranks: int, out: Path) -> None:
    """As Detectron2's launch does."""
    from detectron2.engine.launch import _distributed_worker

    args = train_det.parse_args([*argv, f"train.output_dir={out}"])
    if ranks == 1:
        train_det.main_worker(args)
    else:
        _distributed_worker(rank, train_det.main_worker, ranks, ranks, 0, f"file://{out}.store", (args,))


def _recorded(main: Callable[[], None], path: Path) -> None:
    """Run a training and write what it read and computed."""
    read, tokens = [], []

    def note_tokens(model: Module, share: float, cells: int) -> None:
        if model.training:
            tokens.append(round(share * cells))

    hosts = [(mmseg_backbone.APTViT, resumable_data.SeededDataset)]
    if HAS_DETECTRON2:
        hosts += [(detectron2_backbone.APTViT, resumable_loader.SeededDataset)]
        hosts += [(None, resumable_loader.DrawnInTurn)]
    for backbone, dataset in hosts:
        if backbone is not None:
            _before(backbone, "_log_tokens_kept", note_tokens)
        _before(dataset, "__getitem__", lambda data, key: read.append(int(key[0] if isinstance(key, tuple) else key)))
    main()
    path.write_text(json.dumps({"images": read, "tokens": tokens}))


def _before(owner: type, name: str, note: Callable) -> None:
    original = getattr(owner, name)

    def noted(*args: object, **options: object) -> object:
        note(*args, **options)
        return original(*args, **options)

    setattr(owner, name, noted)


def write_seg(folder: Path, images: int, augmented: bool = False, **options: object) -> list[str]:
    """Write data, half of them flat and half noise, and a config of a linear head, with the usual augmentation or none;
    returns the arguments of a training."""
    real = next(path for path in tiny_ade.CONFIGS if path.name.startswith("linear_apt_vit-b16"))
    data = tiny_ade.write_ade(folder / "ade", images, size=(64, 64))
    make_half_noise(sorted((data / "images" / "training").iterdir(), key=lambda path: int(path.stem)))
    cfg = load_config(str(real), {**tiny_ade.shrink_options(real), "default_hooks.logger.interval": 1})
    if not augmented:
        pipeline = cfg.train_dataloader.dataset.pipeline
        cfg.train_dataloader.dataset.pipeline = [*pipeline[:3], pipeline[-1]]
    cfg.train_cfg.val_interval = 1000
    cfg.merge_from_dict({"train_dataloader.batch_size": 1, "default_hooks.checkpoint.interval": 1000, **options})
    cfg.dump(folder / "tiny.py")
    return [str(folder / "tiny.py"), "--data-root", str(data)]


def write_det(
    folder: Path, images: int, *options: str, augmented: bool = False, config: Path | None = None
) -> list[str]:
    """The same with Mask R-CNN, or another config."""
    data = tiny_coco.write_coco(folder / "coco", images)
    make_half_noise(sorted((data / "train2017").iterdir()))
    return [
        "--config-file", str(config or tiny_coco.ADAPTIVE), "--data-root", str(data), *tiny_coco.SHRINK_MASK_RCNN,
        *([] if augmented else ["dataloader.train.mapper.augmentations=[]"]), "train.log_period=1",
        "train.eval_period=0", "train.checkpointer.period=1000", "optimizer.lr=0.002", *options,
    ]  # fmt: skip


def make_half_noise(paths: Sequence[Path]) -> None:
    """Overwrite pictures: the first half are flat, the others noise."""
    random = np.random.default_rng(0)
    for place, path in enumerate(paths):
        size = Image.open(path).size[::-1]
        flat = np.full((*size, 3), 90 + place, np.uint8)
        noise = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(flat if place < len(paths) // 2 else noise).save(path)


def proposal_network(num_classes: int, **parts: object) -> Module:
    """Detectron2's proposal network, with the number of classes that configs are expected to name."""
    from detectron2.modeling.meta_arch.rcnn import ProposalNetwork

    return ProposalNetwork(**parts)
