"""MMEngine's Runner with one-line errors for damaged checkpoints and for images that are normalised otherwise than the
backbone expects, and separate logs for each run."""

from itertools import count
from typing import Any

from mmengine.optim import OptimWrapperDict
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn

from apt_dense.hosts.check_resumed_checkpoints import check_moments, continuing_from
from apt_dense.hosts.mmseg.config_errors import ConfigError
from apt_dense.hosts.pixel_agreement import pixel_disagreement

_NUMBERS = count(1)


@RUNNERS.register_module()
class APTRunner(Runner):
    """MMEngine's ``Runner``; raises CheckpointError if a part of a checkpoint that it resumes from is damaged, and
    ConfigError if the backbone scores patches of images by another normalisation than the model's preprocessor's.

    Two of a process that begin in the same second have logs of their own: MMEngine tells runs apart by name and second.
    """

    def __init__(self, *args: Any, experiment_name: str | None = None, **options: Any) -> None:
        name = experiment_name or getattr(options.get("cfg"), "filename", None) or "run"
        stem = str(name).replace("\\", "/").rpartition("/")[2].removesuffix(".py")
        super().__init__(*args, experiment_name=f"{stem}_{next(_NUMBERS)}", **options)
        _check_pixels(self.model)

    def resume(self, filename: str, *args: Any, **options: Any) -> None:
        """Load all parts of a checkpoint."""
        with continuing_from(filename):
            super().resume(filename, *args, **options)
            wrapped = self.optim_wrapper
            for one in wrapped.values() if isinstance(wrapped, OptimWrapperDict) else [wrapped]:
                check_moments(one.optimizer, filename)


def _check_pixels(model: nn.Module) -> None:
    """Raise ConfigError unless a model normalises images as its backbone expects; one that normalises none passes."""
    while hasattr(model, "module"):  # wrapped by DistributedDataParallel, test-time augmentation, or both
        model = model.module
    preprocessor = getattr(model, "data_preprocessor", None)
    if getattr(preprocessor, "mean", None) is None:
        return
    found = pixel_disagreement(model, preprocessor.mean, preprocessor.std)
    if found:
        raise ConfigError(f"model.data_preprocessor and model.backbone in the config do not agree: {found}")
