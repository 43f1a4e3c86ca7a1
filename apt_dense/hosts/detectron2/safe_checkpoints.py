"""Detectron2's checkpoints: read without running code, and refused where weights of the model would stay random.

This import makes all of Detectron2's checkpointers read files in this way.
"""

import logging
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from apt_dense import vit
from apt_dense.hosts.check_resumed_checkpoints import check_optimizer, check_parts, continuing_from, entries_of
from apt_dense.weights.files import CheckpointError, read_checkpoint, write_text_whole, write_whole
from apt_dense.weights.load import LoadReport, convert_below
from apt_dense.weights.parameter_rules import is_new
from apt_dense.weights.resize import noted_grid
from apt_dense.weights.tensor_checks import check_kinds

# Below Detectron2's logger, whose setup then prints it and writes it to log.txt.
logger = logging.getLogger("detectron2.apt_dense")

_UNREADABLE = (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, LookupError, AttributeError, ImportError)


def errors_of(report: LoadReport, prefix: str) -> Iterator[str]:
    """Yield an error if weights of the backbone are missing or unknown, of which Detectron2 would only warn."""
    where, remedy = prefix.removesuffix("."), "or set strict_loading=False on the backbone"
    if not report.loaded:
        yield (
            f"no weight of the checkpoint belongs to {where}, which would stay random. Files of a bare backbone need "
            f"FILE?matching_heuristics=True, or tools/convert_checkpoint.py --to detectron2; {remedy}"
        )
    elif report.missing or report.unexpected:
        yield (
            f"the checkpoint does not fit {where}: {report.summary()}. Detectron2 has taken out weights of another "
            f"shape before. Use the config of the checkpoint, {remedy}"
        )


class APTCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which raises if a file is missing, damaged or does not fit, and runs no pickled code.

    Weights of coarse patches, which only a model with thresholds has, may always be missing or left over.

    Args:
        complete: whether all other weights must be there, in the right shape. If not, Detectron2 only warns of those
            outside the backbone, which suits weights to start training from.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", *, complete: bool = False, **checkpointables: Any) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.complete = complete

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict:
        """As ``DetectionCheckpointer.load``.

        Raises:
            CheckpointError: if the file does not exist, cannot be read or does not fit the model.
        """
        file = urlparse(path)._replace(query="").geturl() if path else ""
        if file and "://" not in file and not os.path.isfile(file):
            raise CheckpointError(f"checkpoint {file} does not exist; correct train.init_checkpoint{self._marker()}")
        try:
            with continuing_from(file):
                return super().load(path, *args, **kwargs)
        except OSError as error:  # of a download, or while reading
            raise CheckpointError(f"checkpoint {file} cannot be fetched ({error}); download it first") from error

    def save(self, name: str, **kwargs: Any) -> None:
        """As ``DetectionCheckpointer.save``. A run killed meanwhile leaves the checkpoint before, and its name in
        "last_checkpoint".

        Raises:
            OSError: if the file cannot be written, naming it and its disk.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": self.model.state_dict()}
        content |= {key: part.state_dict() for key, part in self.checkpointables.items()}
        if "optimizer" in content.get("trainer", {}):
            content |= entries_of(content["trainer"]["optimizer"])
        path = Path(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        with write_whole(path) as partial:
            torch.save({**content, **kwargs}, partial)
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Note the name of the last checkpoint, whole or not at all."""
        write_text_whole(Path(self.save_dir, "last_checkpoint"), last_filename_basename)

    def _marker(self) -> str:
        """Name the other place a path can come from: the note of the last checkpoint in the output folder."""
        marker = os.path.join(self.save_dir, "last_checkpoint")
        return f" or {marker}" if self.save_dir and os.path.isfile(marker) else ""

    def _load_file(self, filename: str) -> dict:
        try:
            return super()._load_file(filename)
        except _UNREADABLE as error:
            raise CheckpointError(
                f"checkpoint {filename} ({os.path.getsize(filename)} bytes) cannot be read: it is cut off or damaged, "
                f"no checkpoint, or holds pickled code. Use an older one{self._marker()}, or copy it again"
            ) from error

    def _load_model(self, checkpoint: Mapping) -> Any:
        if self.complete:  # Detectron2 passes over parts that are missing, and begins with a new optimizer
            check_parts(checkpoint, dict.fromkeys(self.checkpointables, Mapping), "the checkpoint")
            if "trainer" in self.checkpointables:
                check_parts(checkpoint["trainer"], {"optimizer": Mapping}, "the checkpoint")
                check_optimizer(checkpoint["trainer"]["optimizer"], checkpoint, "the checkpoint")
        try:
            self._convert_ndarray_to_tensor(checkpoint["model"])
            check_kinds(checkpoint["model"], self.model.state_dict())
            if not self.complete:
                self._convert(checkpoint["model"])
            report = super()._load_model(checkpoint)
        except (ValueError, RuntimeError) as error:  # raised by the backbone
            raise CheckpointError(" ".join(str(error).split())) from error
        for kind in ("missing_keys", "unexpected_keys"):
            _leave_out_new(getattr(report, kind), kind)
        if self.complete:
            _check_complete(report.missing_keys, report.incorrect_shapes)
        return report

    def _convert(self, state: dict) -> None:
        """Bring positions to the backbone's shape, before Detectron2 drops those of another shape, and what a bare
        backbone's file notes of them, before Detectron2 matches names by their ends."""
        for name, module in unwrapped(self.model).named_modules():
            if isinstance(module, vit.APTViT):
                bare = "pos_embed" in state and noted_grid(state, "") is not None
                convert_below(module, state, "" if bare else f"{name}.")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _read_zoo_file(filename: str) -> dict:
    """Read a pickle of Detectron2's model zoo or of Caffe2. Detectron2 then matches Caffe2's names by its own rules."""
    content = read_checkpoint(filename)
    if "model" in content and "__author__" in content:
        return content
    weights = {k: v for k, v in content.get("blobs", content).items() if not k.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _read_pycls_file(filename: str) -> dict:
    """Read pycls' weights, which Detectron2 matches by their names' ends."""
    state = read_checkpoint(filename)["model_state"]
    weights = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    return {"model": weights, "__author__": "pycls", "matching_heuristics": True}


_READERS = {".pkl": _read_zoo_file, ".pyth": _read_pycls_file}
_upstream_load_file = DetectionCheckpointer._load_file


def _load_file_safely(self: DetectionCheckpointer, filename: str) -> dict:
    """``DetectionCheckpointer._load_file``. Its own unpickles .pkl, and reads pycls' files past ``_torch_load``."""
    reader = next((read for suffix, read in _READERS.items() if filename.endswith(suffix)), None)
    return _upstream_load_file(self, filename) if reader is None else reader(filename)


def _torch_load_safely(self: DetectionCheckpointer, filename: str) -> Mapping:
    return read_checkpoint(filename)


# Detectron2's trainers, as yacs configs use them, make a checkpointer of their own, which cannot be replaced.
DetectionCheckpointer._load_file, DetectionCheckpointer._torch_load = _load_file_safely, _torch_load_safely


def _leave_out_new(names: list[str], kind: str) -> None:
    """Remove the parameters that only APT has from a list of missing or unexpected ones, in place."""
    new = [name for name in names if is_new(name)]
    names[:] = [name for name in names if not is_new(name)]
    if new:
        logger.info("%d %s of coarse patches, as between models with and without thresholds", len(new), kind)


def _check_complete(missing: Sequence[str], shapes: Sequence[tuple]) -> None:
    problems = [f"{len(missing)} are missing ({', '.join(missing[:3])})"] if missing else []
    problems += [f"{name} is {theirs} instead of {ours}" for name, theirs, ours in shapes[:3]]
    if problems:
        raise CheckpointError(
            f"the checkpoint does not fit the model, of its weights {'; '.join(problems)}. What stays random makes "
            f"results meaningless: use the config that it was trained with, and set train.init_checkpoint to the "
            f"file of a trained detector"
        )
