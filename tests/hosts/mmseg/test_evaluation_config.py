"""Configs of tests that leave parts out: each works, or is refused in one line; masks of equal names keep apart."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmseg", reason="apt_dense.hosts.mmseg.evaluation_config completes configs of MMSeg")

from mmengine.config import Config
from mmengine.registry import METRICS, init_default_scope

from apt_dense.hosts.mmseg.batched_slide_and_tta import APTSegTTAModel  # noqa: F401 (registers)
from apt_dense.hosts.mmseg.evaluation_config import APTIoUMetric, complete_test, draw_predictions, use_tta, write_masks
from apt_dense.hosts.mmseg.training_config import complete_training, load_config, start_processes, use_amp


def dataset(root: str = "/data", images: str = "images", masks: str = "masks") -> dict:
    return dict(
        type="ADE20KDataset", data_root=root, pipeline=[], data_prefix=dict(img_path=images, seg_map_path=masks)
    )


def config(**change: object) -> Config:
    """A config with nothing but what MMEngine asks for."""
    parts = dict(
        model=dict(type="APTEncoderDecoder"), test_dataloader=dict(dataset=dataset()),
        test_evaluator=dict(type="IoUMetric"), train_dataloader=dict(dataset=dataset()), train_cfg=dict(max_iters=10),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=1e-3)),
    ) | change  # fmt: skip
    return Config({key: value for key, value in parts.items() if value is not Ellipsis})


# ---- tests


@pytest.mark.parametrize("value", [None, ...])
@pytest.mark.parametrize("key", ["model", "test_dataloader", "test_evaluator"])
def test_what_a_test_needs_is_named(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"the config has no {key}, which a test needs; add {key} = "):
        complete_test(config(**{key: value}))


@pytest.mark.parametrize("value", [None, ...])
def test_the_loop_is_added(value: object) -> None:
    cfg = config(test_cfg=value)
    complete_test(cfg)
    assert cfg.test_cfg.type == "TestLoop"


@pytest.mark.parametrize("as_list", [True, False])
def test_evaluators_may_be_a_list(as_list: bool, tmp_path: Path) -> None:
    iou = dict(type="IoUMetric", iou_metrics=["mIoU"])
    cfg = config(test_evaluator=[dict(type="DepthMetric"), iou] if as_list else iou)
    write_masks(cfg, str(tmp_path))
    changed = cfg.test_evaluator[1] if as_list else cfg.test_evaluator
    assert changed.to_dict() == dict(
        type="APTIoUMetric",
        iou_metrics=["mIoU"],
        output_dir=str(tmp_path),
        keep_results=True,
        image_root="/data/images",
    )
    if as_list:
        assert cfg.test_evaluator[0].to_dict() == dict(type="DepthMetric")


def test_evaluators_that_write_nothing_are_named(tmp_path: Path) -> None:
    for evaluator in (dict(type="DepthMetric"), [dict(type="DepthMetric")]):
        with pytest.raises(ValueError, match=r"--out needs an evaluator that writes masks.* has \['DepthMetric'\]"):
            write_masks(config(test_evaluator=evaluator), str(tmp_path))


@pytest.mark.parametrize("folder", ["/data/masks", "/data/images", "/data/masks/", "/data/masks/validation"])
def test_the_data_set_is_not_overwritten(folder: str) -> None:
    with pytest.raises(ValueError, match="--out .* is inside of /data/(masks|images), whose files it would replace"):
        write_masks(config(), folder)


@pytest.mark.parametrize(
    "hooks", [..., None, {}, dict(visualization=None), dict(visualization=dict(type="SegVisualizationHook"))]
)
@pytest.mark.parametrize("visualizer", [..., None, dict(type="SegLocalVisualizer"), dict(type="V", vis_backends=None)])
def test_drawing_needs_no_hook_in_the_config(hooks: object, visualizer: object) -> None:
    cfg = config(default_hooks=hooks, visualizer=visualizer)
    draw_predictions(cfg, "drawn")
    assert cfg.default_hooks.visualization.to_dict() == dict(type="SegVisualizationHook", draw=True)
    assert cfg.visualizer.save_dir == "drawn" and cfg.visualizer.vis_backends == [dict(type="LocalVisBackend")]


@pytest.mark.parametrize(("kind", "tta"), [("APTEncoderDecoder", "APTSegTTAModel"), ("EncoderDecoder", "SegTTAModel")])
def test_a_model_for_augmentation_is_chosen(kind: str, tta: str) -> None:
    cfg = config(model=dict(type=kind), tta_pipeline=[dict(type="TestTimeAug", transforms=[])])
    use_tta(cfg)
    assert cfg.model.to_dict() == dict(type=tta, module=dict(type=kind))
    assert cfg.test_dataloader.dataset.pipeline[0].type == "TestTimeAug"


def test_augmentation_reaches_data_sets_in_wrappers() -> None:
    wrapped = dict(type="ConcatDataset", datasets=[dataset("/a"), dataset("/b")])
    cfg = config(tta_pipeline=[dict(type="TestTimeAug")], test_dataloader=dict(dataset=wrapped))
    use_tta(cfg)
    assert [one.pipeline for one in cfg.test_dataloader.dataset.datasets] == [[dict(type="TestTimeAug")]] * 2


@pytest.mark.parametrize("value", [None, ..., []])
def test_augmentation_without_a_pipeline_is_that_of_the_test(value: object) -> None:
    data = dataset() | dict(pipeline=[dict(type="LoadImageFromFile"), dict(type="PackSegInputs")])
    cfg = config(tta_pipeline=value, test_dataloader=dict(dataset=data))
    use_tta(cfg)
    assert [step.type for step in cfg.test_dataloader.dataset.pipeline] == ["APTLoadImage", "TestTimeAug"]
    with pytest.raises(ValueError, match="--tta cannot be derived from the test pipeline .*; add tta_pipeline"):
        use_tta(config(tta_pipeline=value))
    with pytest.raises(ValueError, match="--tta sets the pipeline of test_dataloader.dataset"):
        use_tta(config(tta_pipeline=value, test_dataloader=dict(batch_size=1)))


# ---- masks of equal names


def sample(path: str, label: int) -> dict:
    mask = torch.full((1, 4, 5), label)
    return dict(img_path=path, pred_sem_seg=dict(data=mask), gt_sem_seg=dict(data=mask), reduce_zero_label=False)


def test_masks_of_equal_names_keep_their_folders(tmp_path: Path) -> None:
    init_default_scope("mmseg")
    metric = METRICS.build(dict(type="APTIoUMetric", image_root="/d", output_dir=str(tmp_path)))
    metric.dataset_meta = dict(classes=("x", "y", "z"))
    paths = ["/d/a/0.jpg", "/d/b/0.jpg", "/d/0.jpg", "/d/a/b/0.jpg"]
    metric.process({}, [sample(path, place % 3) for place, path in enumerate(paths)])
    written = {str(path.relative_to(tmp_path)): np.asarray(Image.open(path)) for path in tmp_path.rglob("*.png")}
    assert {name: mask.max() for name, mask in written.items()} == {
        "a/0.png": 0,
        "b/0.png": 1,
        "0.png": 2,
        "a/b/0.png": 0,
    }
    assert metric.output_dir == str(tmp_path)
    assert metric.evaluate(4)["mIoU"] == 100


@pytest.mark.parametrize("linked", ["root", "folder", "nothing"])
@pytest.mark.parametrize("relative", [True, False])
def test_masks_stay_in_their_folder_where_data_are_links(
    linked: str, relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """data/ade is a link to another disk in most installations. Images may be PNG files, as masks are."""
    init_default_scope("mmseg")
    monkeypatch.chdir(tmp_path)
    disk = tmp_path / "disk" / "far" / "away"
    for folder in ("a", "b"):
        (disk / "images" / folder).mkdir(parents=True)
        Image.new("RGB", (5, 4), (9, 9, 9)).save(disk / "images" / folder / "0.png")
    root = Path("data") if relative else tmp_path / "data"
    if linked == "folder":
        root.mkdir()
        (root / "images").symlink_to(disk / "images")
    else:
        root.symlink_to(disk)
    if linked == "nothing":
        root = disk
    cfg = config(test_dataloader=dict(dataset=dataset(str(root))))
    write_masks(cfg, "out")
    metric = METRICS.build(cfg.test_evaluator)
    metric.dataset_meta = dict(classes=("x", "y", "z"))
    metric.process({}, [sample(f"{root}/images/{folder}/0.png", label) for label, folder in enumerate("ab")])
    written = {
        path.relative_to("out").as_posix(): np.asarray(Image.open(path)).max() for path in Path("out").rglob("*.png")
    }
    assert written == {"a/0.png": 0, "b/0.png": 1}
    assert all(np.asarray(Image.open(path)).max() == 9 for path in disk.rglob("*.png"))


@pytest.mark.parametrize("prefix", [None, {}, {"img_path": "images"}, {"seg_map_path": "masks"}])
def test_masks_of_equal_names_keep_apart_without_folders_in_the_config(
    prefix: dict | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images elsewhere, of which the config says no folder, keep all of their path."""
    init_default_scope("mmseg")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    cfg = config(test_dataloader=dict(dataset=dataset() | dict(data_prefix=prefix)))
    write_masks(cfg, "out")
    metric = METRICS.build(cfg.test_evaluator)
    metric.dataset_meta = dict(classes=("x", "y", "z"))
    metric.process({}, [sample(path, 0) for path in ("/far/a/0.png", "/far/b/0.png", "c/0.png", "../d/0.png")])
    files = list(tmp_path.rglob("*.png"))
    assert len(files) == 4 and all(tmp_path / "work" / "out" in path.parents for path in files)


@pytest.mark.parametrize("in_meta", [True, False])
@pytest.mark.parametrize("in_sample", [True, False, None])
def test_labels_are_written_as_the_masks_have_them(in_meta: bool, in_sample: bool | None, tmp_path: Path) -> None:
    """Also where the pipeline's meta_keys leave reduce_zero_label out."""
    init_default_scope("mmseg")
    metric = METRICS.build(dict(type="APTIoUMetric", image_root="/d", output_dir=str(tmp_path)))
    metric.dataset_meta = dict(classes=("x", "y", "z"), reduce_zero_label=in_meta)
    found = sample("/d/0.jpg", 2)
    found.pop("reduce_zero_label")
    metric.process({}, [found if in_sample is None else {**found, "reduce_zero_label": in_sample}])
    reduced = in_meta if in_sample is None else in_sample
    assert np.asarray(Image.open(tmp_path / "0.png")).max() == 2 + reduced


def test_nothing_is_written_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    metric = APTIoUMetric("/d")
    metric.dataset_meta = dict(classes=("x", "y"))
    metric.process({}, [sample("/d/a/0.jpg", 0)])
    assert len(metric.results) == 1 and not list(tmp_path.iterdir())


# ---- training


@pytest.mark.parametrize("value", [None, ...])
@pytest.mark.parametrize("key", ["model", "train_dataloader", "train_cfg", "optim_wrapper"])
def test_what_training_needs_is_named(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"the config has no {key}, which training needs"):
        complete_training(config(**{key: value}))


def test_half_a_validation_is_named_and_half_a_test_is_left_out() -> None:
    with pytest.raises(ValueError, match="the config has val_dataloader, but validation needs"):
        complete_training(config(val_dataloader=dict(dataset=dataset())))
    with pytest.raises(ValueError, match="the config has val_evaluator and val_cfg, but validation needs"):
        complete_training(config(val_evaluator=dict(type="IoUMetric"), val_cfg=dict(type="ValLoop")))
    cfg = config(val_dataloader=dict(dataset=dataset()), val_evaluator=dict(type="IoUMetric"))
    complete_training(cfg)
    assert cfg.val_cfg.type == "ValLoop" and cfg.test_dataloader is cfg.test_evaluator is cfg.test_cfg is None


@pytest.mark.parametrize("kind", [..., "OptimWrapper"])
def test_amp_needs_no_type_of_the_wrapper(kind: object) -> None:
    wrapper = dict(optimizer=dict(type="AdamW", lr=1e-3)) | ({} if kind is ... else {"type": kind})
    cfg = config(optim_wrapper=wrapper)
    use_amp(cfg)
    assert cfg.optim_wrapper.type in ("AmpOptimWrapper", "CPUAmpOptimWrapper")


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        (None, "--amp changes optim_wrapper, but the config has none"),
        (..., "--amp changes optim_wrapper, but the config has none"),
        (dict(type="OptimWrapper"), "--amp needs a single optimizer"),
        (dict(type="ApexOptimWrapper", optimizer=dict(type="SGD")), "cannot be combined with optim_wrapper.type=Apex"),
    ],
)
def test_amp_with_other_wrappers(wrapper: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        use_amp(config(optim_wrapper=wrapper))


def test_processes_start_without_env_cfg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apt_dense.hosts.mmseg.training_config.get_device", lambda: "cpu")
    monkeypatch.setattr("apt_dense.hosts.mmseg.training_config.dist.is_initialized", lambda: True)
    for value in (..., None, dict(cudnn_benchmark=True)):
        cfg = config(env_cfg=value)
        start_processes(cfg, "pytorch")
        assert cfg.env_cfg.dist_cfg.backend == "gloo"


# ---- reading


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = dict(", "SyntaxError"),
        ("model = 1 +", "SyntaxError"),
        ("_base_ = 'nowhere.py'", "FileNotFoundError"),
        ("_base_ = ['mmseg::nowhere.py']", "cannot be read"),
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("custom_imports = dict(imports=['nowhere_at_all'])", "ImportError"),
        ("model = {{_base_.gone}}", "cannot be read"),
        ("a = dict(b=1)\n_base_ = 'same.py'", "cannot be read"),
        ("\0", "cannot be read"),
    ],
)
def test_configs_that_cannot_be_read(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(text)
    with pytest.raises(ValueError, match="own.py cannot be read as a config of MMEngine") as raised:
        load_config(str(path))
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["own.txt", "own"])
def test_configs_of_other_kinds(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("model = 1")
    with pytest.raises(ValueError, match="cannot be read as a config"):
        load_config(str(tmp_path / name))


@pytest.mark.parametrize(
    "options", [{"pipeline.9.scale": 1}, {"pipeline.x": 1}, {"model.type.a.b": 1, "pipeline.7": 2}]
)
def test_options_that_do_not_fit(options: dict, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("pipeline = [dict(type='A')]\nmodel = dict(type='B')")
    with pytest.raises(ValueError, match=r"--cfg-options .* does not fit .*own.py: "):
        load_config(str(path), options)


@pytest.mark.parametrize("text", ["train_cfg = None", "train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=3)", ""])
def test_lengths_of_configs_without_iterations(text: str, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(text)
    with pytest.raises(ValueError, match="max_iters was given, but this config trains by epochs or not at all"):
        load_config(str(path), max_iters=3)


@pytest.mark.parametrize("hooks", ["None", "dict(checkpoint=None)", "{}"])
def test_lengths_of_configs_without_hooks(hooks: str, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(f"train_cfg = dict(max_iters=100)\ndefault_hooks = {hooks}")
    assert load_config(str(path), max_iters=3).train_cfg.max_iters == 3


def test_deleting_through_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("model = dict(backbone=dict(type='A', depth=3))")
    cfg = load_config(str(path), {"model.backbone": dict(_delete_=True, type="B")})
    assert cfg.model.backbone.to_dict() == dict(type="B")
