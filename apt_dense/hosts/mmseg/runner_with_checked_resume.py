"""MMEngine's Runner, with errors of damaged checkpoints in one line."""

from typing import Any

from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from apt_dense.hosts.check_resumed_checkpoints import continuing_from


@RUNNERS.register_module()
class APTRunner(Runner):
    """MMEngine's ``Runner``; raises CheckpointError if a part of a checkpoint that it resumes from is damaged."""

    def resume(self, filename: str, *args: Any, **options: Any) -> None:
        """Load all parts of a checkpoint."""
        with continuing_from(filename):
            super().resume(filename, *args, **options)
