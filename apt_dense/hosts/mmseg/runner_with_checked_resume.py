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
    before a training ConfigError if the backbone expects images of another normalisation than the preprocessor's.

    Two of a process that begin in the same second have logs of their own: MMEngine tells runs apart by name and second.
    """

    def __init__(self, *args: Any, experiment_name: str | None = None, **options: Any) -> None:
        name = experiment_name or getattr(options.get("cfg"), "filename", None) or "run"
        stem = str(name).replace("\\", "/").rpartition("/")[2].removesuffix(".py")
        super().__init__(*args, experiment_name=f"{stem}_{next(_NUMBERS)}", **options)

    def train(self) -> nn.Module:
        """Train, unless :meth:`check_pixels` raises."""
        self.check_pixels(is_new=not self._resume)
        return super().train()

    def test(self) -> dict[str, float]:
        """Test, with a warning by :meth:`check_pixels` if there is reason to."""
        self.check_pixels(is_new=False)
        return super().test()

    def check_pixels(self, is_new: bool) -> None:
        """Compare the images that the backbone expects with what the model's preprocessor makes; one that normalises
        none passes.

        Args:
            is_new: whether nothing is trained yet, so that the config can still be mended; else a difference is logged.

        Raises:
            ConfigError: if they differ, and ``is_new``.
        """
        model = self.model
        while hasattr(model, "module"):  # wrapped by DistributedDataParallel, test-time augmentation, or both
            model = model.module
        preprocessor = getattr(model, "data_preprocessor", None)
        if getattr(preprocessor, "mean", None) is None:
            return
        found = pixel_disagreement(model, preprocessor.mean, preprocessor.std)
        if found and is_new:
            raise ConfigError(f"model.data_preprocessor and model.backbone in the config do not agree: {found}")
        if found:
            self.logger.warning(f"{found} (trained so, the model has learned to live with the patches that it got)")

    def resume(self, filename: str, *args: Any, **options: Any) -> None:
        """Load all parts of a checkpoint."""
        with continuing_from(filename):
            super().resume(filename, *args, **options)
            wrapped = self.optim_wrapper
            for one in wrapped.values() if isinstance(wrapped, OptimWrapperDict) else [wrapped]:
                check_moments(one.optimizer, filename)
