"""Complete the config of a test: predicted masks, drawings, test-time augmentation, whatever the config leaves out."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import METRICS
from mmseg.evaluation import IoUMetric

from apt_dense.hosts.mmseg.dataset_checks import dataset_configs
from apt_dense.hosts.mmseg.readable_images import name_unreadable_files
from apt_dense.hosts.mmseg.tta_pipeline import augmented


@METRICS.register_module()
class APTIoUMetric(IoUMetric):
    """MMSeg's ``IoUMetric``, which keeps the folders of the images in ``output_dir``.

    MMSeg writes a/0.png and b/0.png to the same file, and the last one remains.

    Args:
        image_root: folder of all images; masks are named by the images' paths below it.
        **options: as for ``IoUMetric``.
    """

    def __init__(self, image_root: str, **options: Any) -> None:
        super().__init__(**options)
        self.image_root = image_root

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Add predictions to the metric and write them."""
        root, reduces = self.output_dir, self.dataset_meta.get("reduce_zero_label", False)
        try:
            for sample in data_samples:
                if root is not None:
                    self.output_dir = os.path.join(root, self._folder_of(sample["img_path"]))
                    os.makedirs(self.output_dir, exist_ok=True)
                # MMSeg writes labels one too low where the pipeline's meta_keys leave this out.
                super().process(data_batch, [{"reduce_zero_label": reduces, **sample}])
        finally:
            self.output_dir = root

    def _folder_of(self, image: str) -> str:
        """Return the folder of an image below ``image_root``; of one that lies elsewhere, all of its path."""
        folder = os.path.relpath(os.path.dirname(image), self.image_root)
        if os.pardir not in Path(folder).parts:
            return folder
        whole = Path(os.path.abspath(image)).parent
        return str(whole.relative_to(whole.anchor))


def complete_test(cfg: Config) -> None:
    """Check that a config can be tested, and add the loop where it names none.

    Raises:
        ValueError: if it has no model, data or metric.
    """
    for key, example in (
        ("model", 'dict(type="APTEncoderDecoder", ...)'),
        ("test_dataloader", "val_dataloader"),
        ("test_evaluator", 'dict(type="IoUMetric")'),
    ):
        if not cfg.get(key):
            raise ValueError(f"the config has no {key}, which a test needs; add {key} = {example}")
    if not cfg.get("test_cfg"):
        cfg.test_cfg = {"type": "TestLoop"}


def write_masks(cfg: Config, folder: str) -> None:
    """Let the metric write each predicted mask, under its image's path below the data set's image folder.

    Raises:
        ValueError: if no evaluator of the config writes masks, or the folder holds the data set's own.
    """
    images = _folders(cfg, "img_path")
    for taken in [path.resolve() for path in [*images, *_folders(cfg, "seg_map_path")]]:
        if taken in (Path(folder).resolve(), *Path(folder).resolve().parents):
            raise ValueError(f"--out {folder} is inside of {taken}, whose files it would replace; name another folder")
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list | tuple) else [cfg.test_evaluator]
    writing = [one for one in evaluators if one.get("type") in ("IoUMetric", "APTIoUMetric", "CityscapesMetric")]
    if not writing:
        kinds = [one.get("type") for one in evaluators]
        raise ValueError(f"--out needs an evaluator that writes masks, such as IoUMetric; test_evaluator has {kinds}")
    for one in writing:
        one.update(output_dir=folder, keep_results=True)
        if one["type"] == "IoUMetric":
            # Links stay, as in the paths of the images that the data set lists.
            one.update(type="APTIoUMetric", image_root=os.path.commonpath(images or [Path.cwd()]))


def _folders(cfg: Config, kind: str) -> list[Path]:
    """Return the folders of the images ("img_path") or masks ("seg_map_path") that are tested."""
    found = []
    for dataset in dataset_configs(cfg.get("test_dataloader")):
        prefix = (dataset.get("data_prefix") or {}).get(kind)
        if prefix is not None:
            found.append(Path(dataset.get("data_root") or "", prefix).expanduser().absolute())
    return found


def draw_predictions(cfg: Config, folder: str) -> None:
    """Let MMSeg draw each prediction over its image, in ``folder``."""
    hooks = cfg.get("default_hooks") or {}
    hooks["visualization"] = {**(hooks.get("visualization") or {"type": "SegVisualizationHook"}), "draw": True}
    cfg.default_hooks = hooks
    visualizer = cfg.get("visualizer") or {"type": "SegLocalVisualizer"}
    visualizer["vis_backends"] = visualizer.get("vis_backends") or [{"type": "LocalVisBackend"}]
    cfg.visualizer = {**visualizer, "save_dir": folder}


def use_tta(cfg: Config) -> None:
    """Average over augmentations, with ``tta_model`` or, without one, MMSeg's or ours: those of ``tta_pipeline`` or,
    without one, six scales and mirror images of what the test pipeline gives (``tta_pipeline.augmented``).

    Raises:
        ValueError: if the config has no data set, or its pipeline is such that ``tta_pipeline`` must say it.
    """
    datasets = list(dataset_configs(cfg.test_dataloader))
    if not datasets:
        raise ValueError("--tta sets the pipeline of test_dataloader.dataset, but the config has none")
    for dataset in datasets:
        dataset["pipeline"] = cfg.get("tta_pipeline") or augmented(dataset.get("pipeline") or [])
        name_unreadable_files(dataset["pipeline"])
    packed = str(cfg.model.get("type")).rpartition(".")[2] == "APTEncoderDecoder"
    default = {"type": "APTSegTTAModel" if packed else "SegTTAModel"}
    cfg.model = {**(cfg.get("tta_model") or default), "module": cfg.model}
