"""MMSegmentation host: ``backbone=dict(type="APTViT", ...)`` after

    custom_imports = dict(imports=["apt_dense.hosts.mmseg"])

This import registers everything that a config can name, in MMEngine's root registries, where every OpenMMLab package
finds it. The backbone, the constructor of optimizers, schedules of patches, mixed precision on a CPU and the file
backend "apt_atomic" need MMEngine only. With MMSegmentation installed, the segmentor, test-time augmentation,
``APTLoadImage``, ``CheckLabels``, ``ScaleIoUMetric`` and data sets in folders of one's own are registered as well.
"""

import importlib.util

from apt_dense.hosts.mmseg import (  # noqa: F401 (register what runs use)
    balanced_sampler,
    patch_schedule_hook,
    pickles_in_configs,
    resumable_data,
    runner_hooks,
    safe_checkpoints,
    token_drift_hook,
)
from apt_dense.hosts.mmseg.backbone import APTViT
from apt_dense.hosts.mmseg.layer_decay_and_cpu_amp import (
    APTLearningRateDecayOptimWrapperConstructor,
    CPUAmpOptimWrapper,
)

if importlib.util.find_spec("mmseg"):
    from apt_dense.hosts.mmseg import (  # noqa: F401 (register what configs name)
        batched_slide_and_tta,
        dataset_checks,
        evaluation_config,
        own_data_dataset,
        scale_iou_metric,
    )

__all__ = ["APTLearningRateDecayOptimWrapperConstructor", "APTViT", "CPUAmpOptimWrapper"]
