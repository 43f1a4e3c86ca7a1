"""MMSegmentation host: ``backbone=dict(type="APTViT", ...)`` after

    custom_imports = dict(imports=["apt_dense.hosts.mmseg"])

Registered in mmengine's root registries, so every OpenMMLab package finds it. The backbone needs mmengine only; with
MMSegmentation installed, the segmentor and test-time augmentation of ``slide`` are registered, too.
"""

import importlib.util

from apt_dense.hosts.mmseg.backbone import APTLearningRateDecayOptimWrapperConstructor, APTViT, layer_of

if importlib.util.find_spec("mmseg"):  # so that one import registers everything a model's config can name
    from apt_dense.hosts.mmseg import slide  # noqa: F401

__all__ = ["APTLearningRateDecayOptimWrapperConstructor", "APTViT", "layer_of"]
