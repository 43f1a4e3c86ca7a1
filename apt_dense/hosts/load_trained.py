"""Load what the training tools wrote, ready to use.

from apt_dense.hosts.load_trained import load_trained

detector = load_trained("runs/det")  # a run's folder or a checkpoint of any of the three trainers
found = detector.predict(photo)      # (H, W, 3) uint8 RGB -> boxes, scores, labels and masks
print([detector.class_names[label] for label in found.labels], found.scores)

segmentor = load_trained("work_dirs/upernet_apt_vit-b16_160k_ade20k-512x512")
labels = segmentor.predict(photo)    # (H, W): the class of each pixel
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch

from apt_dense.hosts.trained_model_types import TrainedDetector, TrainedSegmentor
from apt_dense.weights.files import CheckpointError, read_checkpoint

TORCHVISION = "last.pth"  # of tools/train_det_torchvision.py
DETECTRON2 = "config.yaml"  # of tools/train_det.py and Detectron2's DefaultTrainer
FINAL = "model_final.pth"  # of either, also where config.yaml was forgotten
_EXPECTED = (
    "expected the folder or a checkpoint of a run of train_det_torchvision.py (last.pth), train_seg.py, "
    "train_det.py or DefaultTrainer (both with config.yaml next to it)"
)


def load_trained(
    path: str | Path, config: str | Path | None = None, device: str | torch.device | None = None
) -> TrainedDetector | TrainedSegmentor:
    """Load a trained model in eval mode, with its classes and the size that it sees photos in.

    Only the files of the run are read, and no code in any of them is run. Pickles may hold tensors and plain values,
    and configs values and the names of known classes; anything else is refused.

    Args:
        path: a run's folder, of which the last checkpoint is taken, or a checkpoint: last.pth of
            tools/train_det_torchvision.py; iter_N.pth of tools/train_seg.py or another run of MMSegmentation;
            model_final.pth of tools/train_det.py or Detectron2's DefaultTrainer, with config.yaml next to it.
        config: a config file of MMSegmentation or Detectron2 (lazy), for checkpoints that come without one, or whose
            model is made of other packages' parts. Configs are programs: unlike a run's own, the file that you name is
            run.
        device: where to put the model; by default a GPU if there is one.

    Returns:
        A :class:`TrainedDetector` or a :class:`TrainedSegmentor` (``apt_dense.hosts.trained_model_types``). Both have
        ``predict(photo)``, ``model`` (the host's own), ``backbone`` (the :class:`apt_dense.APTViT` inside of it) and
        ``class_names``.

    Raises:
        FileNotFoundError: if there is no such file, or the folder holds no checkpoint.
        ValueError: if the file is damaged, of another kind, does not fit its config, or holds code.
        ImportError: if the host's package is not installed.
    """
    path, config = Path(path).expanduser(), None if config is None else str(config)
    trained = _load(path, config)
    return trained.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _load(path: Path, config: str | None) -> TrainedDetector | TrainedSegmentor:
    if path.is_dir() and (path / TORCHVISION).is_file():
        path = path / TORCHVISION
    folder = path if path.is_dir() else path.parent
    if (folder / DETECTRON2).is_file() or (path / FINAL).is_file():
        kind = "detectron2"
    else:
        kind = "mmseg" if path.is_dir() else _kind_of_file(path)
    if kind == "torchvision":
        if config is not None:
            raise ValueError(f"config={config}: {path} brings its own settings; leave config out")
        from apt_dense.hosts.torchvision.load_trained_detector import load_trained_detector

        return load_trained_detector(path)
    if kind == "detectron2":
        from apt_dense.hosts.detectron2.load_trained_detector import load_trained_detector

        return load_trained_detector(path, config)
    from apt_dense.hosts.mmseg.load_trained_segmentor import load_trained_segmentor

    return load_trained_segmentor(path, config)


def _kind_of_file(path: Path) -> str:
    """Tell by its content which trainer wrote a checkpoint. Raises FileNotFoundError, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {_EXPECTED}")
    try:
        content = read_checkpoint(path)
    except CheckpointError:
        # MMEngine pickles its log with the weights, which the reader of its host knows.
        if importlib.util.find_spec("mmseg") is None:
            raise
        return "mmseg"
    kinds = {"torchvision": {"settings", "categories"}, "mmseg": {"state_dict"}, "detectron2": {"model"}}
    for kind, keys in kinds.items() if isinstance(content, Mapping) else ():
        if keys <= content.keys():
            return kind
    raise ValueError(f"{path} is not a checkpoint of a run; {_EXPECTED}")
