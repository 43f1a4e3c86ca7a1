"""ScaleIoUMetric: loops over pixels, MMSeg's own IoUMetric, groups without pixels, several processes, refusals."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

pytest.importorskip("mmseg", reason="the MMSeg host needs the packages of the extra 'mmseg'")

from mmengine.config import Config
from mmengine.registry import HOOKS, METRICS
from mmseg.evaluation import IoUMetric

from apt_dense.hosts.iou_by_scale import border_distance
from apt_dense.hosts.mmseg import scale_iou_metric
from apt_dense.hosts.mmseg.scale_iou_metric import ScaleIoUMetric, add_hook, add_metric

from support.tiny_segmentors import CLASSES, mmseg_scope, samples, segmentor  # noqa: F401 (a fixture)
from support.tiny_trainings import run_processes

pytestmark = pytest.mark.filterwarnings("ignore")  # MMSeg's own
META = {"classes": ("road", "sky", "tree")}
OPTIONS = {"mode": "whole", "thresholds": (5.0,)}


def metric(model: object, **options: Any) -> ScaleIoUMetric:
    """A metric that a run's hook has told its model."""
    built = METRICS.build({"type": "ScaleIoUMetric", **options})
    built.dataset_meta = META
    hook = HOOKS.build({"type": "ScaleIoUMetricHook"})
    loop = SimpleNamespace(evaluator=SimpleNamespace(metrics=[IoUMetric(), built]))
    hook.before_val_epoch(SimpleNamespace(val_loop=loop, model=model))
    return built


def batch(size: tuple[int, int] = (50, 44), void: float = 0.1) -> tuple[dict, list[dict]]:
    """Pictures that are flat on the left, as loaded; predictions that are right two times of three."""
    data, random = samples(*size), np.random.default_rng(0)
    predictions = []
    for sample in data["data_samples"]:
        truth = torch.from_numpy(random.integers(0, CLASSES, (1, -(-size[0] // 9), -(-size[1] // 9))))
        truth = truth.repeat_interleave(9, 1).repeat_interleave(9, 2)[:, : size[0], : size[1]].clone()
        wrong = torch.from_numpy(random.random(truth.shape) < 0.33)
        prediction = torch.where(wrong, (truth + 1) % CLASSES, truth)
        truth[torch.from_numpy(random.random(truth.shape) < void)] = 255
        sample.gt_sem_seg.data = truth
        predictions.append({"gt_sem_seg": {"data": truth}, "pred_sem_seg": {"data": prediction}})
    return data, predictions


def evaluate(model: object, data: dict, predictions: list[dict], **options: Any) -> dict[str, float]:
    built = metric(model, **options)
    built.process(data, predictions)
    return built.evaluate(len(predictions))


def plain(predictions: list[dict], coarse: list[np.ndarray], want: bool | None, boundary: bool) -> float:
    """mIoU in % of the pixels that are coarse, are not, or all (None), by a loop over them."""
    sums = np.zeros((3, CLASSES))
    for one, is_coarse in zip(predictions, coarse, strict=True):
        truth, predicted = (one[name]["data"][0].numpy() for name in ("gt_sem_seg", "pred_sem_seg"))
        distance = border_distance(truth.shape)

        def near(labels: np.ndarray, y: int, x: int, truth: np.ndarray = truth, distance: int = distance) -> bool:
            around = slice(max(0, y - distance), y + distance + 1), slice(max(0, x - distance), x + distance + 1)
            return not boundary or bool((labels[around] != labels[y, x])[truth[around] != 255].any())

        for y, x in np.ndindex(truth.shape):
            if truth[y, x] == 255 or want not in (None, is_coarse[y, x]):
                continue
            in_truth, in_prediction = near(truth, y, x), near(predicted, y, x)
            sums[0, truth[y, x]] += in_truth and in_prediction and truth[y, x] == predicted[y, x]
            sums[1, predicted[y, x]] += in_prediction
            sums[2, truth[y, x]] += in_truth
    return 100 * np.nanmean(sums[0] / (sums[1] + sums[2] - sums[0]))


def test_values_are_those_of_a_loop() -> None:
    model, (data, predictions) = segmentor(**OPTIONS), batch()
    found = evaluate(model, data, predictions)
    inputs = model.data_preprocessor(data, False)["inputs"]
    cells = model.backbone.partition(inputs).numpy()
    coarse = [(one > 0).repeat(8, 0).repeat(8, 1)[:50, :44] for one in cells]
    names = {"mIoU_fine": (False, False), "mIoU_coarse": (True, False), "mBoundaryIoU": (None, True),
             "mBoundaryIoU_fine": (False, True), "mBoundaryIoU_coarse": (True, True)}  # fmt: skip
    assert set(found) == {*names, "coarse_pixels"}
    for name, (want, boundary) in names.items():
        assert found[name] == pytest.approx(plain(predictions, coarse, want, boundary), abs=0.006), name
    labelled = [one["gt_sem_seg"]["data"][0].numpy() != 255 for one in predictions]
    share = sum(one[mask].sum() for one, mask in zip(coarse, labelled, strict=True)) / np.sum(labelled)
    assert found["coarse_pixels"] == pytest.approx(100 * share, abs=0.006) and 0.2 < share < 0.8


def test_all_fine_pixels_have_mmsegs_own_iou() -> None:
    data, predictions = batch()
    theirs = IoUMetric()
    theirs.dataset_meta = META
    theirs.process(data, predictions)
    found = evaluate(segmentor(thresholds=()), data, predictions)
    assert found["mIoU_fine"] == pytest.approx(theirs.evaluate(2)["mIoU"], abs=0.006)
    assert set(found) == {"mIoU_fine", "mBoundaryIoU", "mBoundaryIoU_fine", "coarse_pixels"}
    assert found["coarse_pixels"] == 0 and found["mBoundaryIoU"] == found["mBoundaryIoU_fine"]


def test_a_uniform_model_can_be_grouped_by_the_patches_of_another() -> None:
    data, predictions = batch()
    expected = evaluate(segmentor(**OPTIONS), data, predictions)
    assert evaluate(segmentor(thresholds=()), data, predictions, thresholds=[5.0]) == expected


def test_models_are_found_inside_of_wrappers() -> None:
    """As DistributedDataParallel around test-time augmentation."""
    model, inner = torch.nn.Module(), torch.nn.Module()
    model.module, inner.module = inner, segmentor(**OPTIONS)
    assert evaluate(model, *batch()) == evaluate(inner.module, *batch())


def test_several_sizes_are_told_apart() -> None:
    data, predictions = batch((64, 64))
    found = evaluate(segmentor(thresholds=(5.0, 4.0)), data, predictions)
    assert "mIoU_scale1" not in found, "the flat half is all of scale 2"
    assert found["mIoU_scale2"] == found["mIoU_coarse"] != found["mIoU_fine"]
    assert found["mBoundaryIoU_scale2"] == found["mBoundaryIoU_coarse"] and found["coarse_pixels"] < 60


def test_classes_are_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(scale_iou_metric, "print_log", lambda text, *_: said.append(text))
    evaluate(segmentor(**OPTIONS), *batch())
    assert all(word in said[0] for word in (*META["classes"], "IoU_coarse", "BoundaryIoU_fine"))


@pytest.mark.parametrize("size", [(50, 44), (7, 5)])
def test_all_void_has_no_values(size: tuple[int, int]) -> None:
    assert evaluate(segmentor(**OPTIONS), *batch(size, void=1.1)) == {}


def test_another_void_label() -> None:
    data, predictions = batch()
    expected = evaluate(segmentor(**OPTIONS), data, predictions)
    for one in predictions:
        one["gt_sem_seg"]["data"][one["gt_sem_seg"]["data"] == 255] = 77
    assert evaluate(segmentor(**OPTIONS), data, predictions, ignore_index=77) == expected
    assert evaluate(segmentor(**OPTIONS), data, predictions) != expected


# ---- several processes


def _score_half(rank: int, path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}.store", rank=rank, world_size=2)
    data, predictions = batch()
    built = metric(segmentor(**OPTIONS))
    built.process({key: values[rank : rank + 1] for key, values in data.items()}, predictions[rank : rank + 1])
    path.with_suffix(f".{rank}.json").write_text(json.dumps(built.evaluate(2)))
    dist.destroy_process_group()


def test_two_processes_score_as_one(tmp_path: Path) -> None:
    path = tmp_path / "scores"
    assert run_processes([partial(_score_half, rank, path) for rank in range(2)], path) == [(0, "")] * 2
    expected = evaluate(segmentor(**OPTIONS), *batch())
    assert all(json.loads(path.with_suffix(f".{rank}.json").read_text()) == expected for rank in range(2))


# ---- refusals, configs


def test_without_the_hook_or_labels() -> None:
    data, predictions = batch()
    built = METRICS.build({"type": "ScaleIoUMetric"})
    with pytest.raises(ValueError, match=r'add dict\(type="ScaleIoUMetricHook"\) to custom_hooks'):
        built.process(data, predictions)
    with pytest.raises(ValueError, match="needs labels, but the data have none"):
        metric(segmentor(**OPTIONS)).process(data, [{"pred_sem_seg": one["pred_sem_seg"]} for one in predictions])
    with pytest.raises(ValueError, match="needs a model with one APTViT"):
        metric(torch.nn.Identity()).process(data, predictions)


def test_thresholds_are_checked_when_it_is_built() -> None:
    with pytest.raises((ValueError, TypeError), match="thresholds"):
        METRICS.build({"type": "ScaleIoUMetric", "thresholds": ["high"]})


@pytest.mark.parametrize("evaluators", [{"type": "IoUMetric"}, [{"type": "IoUMetric"}]])
def test_metric_and_hook_are_added_once(evaluators: object) -> None:
    cfg = Config({"test_evaluator": evaluators, "custom_hooks": [{"type": "EMAHook"}]})
    add_hook(cfg)
    assert len(cfg.custom_hooks) == 1
    for _ in range(2):
        add_metric(cfg, [5.0])
    assert [one["type"] for one in cfg.test_evaluator] == ["IoUMetric", "ScaleIoUMetric"]
    assert cfg.test_evaluator[1]["thresholds"] == [5.0]
    assert [one["type"] for one in cfg.custom_hooks] == ["EMAHook", "ScaleIoUMetricHook"]
    add_hook(empty := Config({"val_evaluator": {"type": "mmseg.ScaleIoUMetric"}}))
    assert [one["type"] for one in empty.custom_hooks] == ["ScaleIoUMetricHook"]


def test_an_added_metric_leaves_out_what_others_do_and_keeps_its_own_options() -> None:
    plain = Config({"test_evaluator": {"type": "IoUMetric", "ignore_index": 254}})
    add_metric(plain, (5.5,))
    assert plain.test_evaluator[1] == {"type": "ScaleIoUMetric", "ignore_index": 254, "thresholds": (5.5,)}
    own = Config({"test_evaluator": [{"type": "IoUMetric"}, {"type": "ScaleIoUMetric", "border_share": 0.01}]})
    add_metric(own, None)
    assert own.test_evaluator[1] == {"type": "ScaleIoUMetric", "border_share": 0.01, "thresholds": None}
    assert [hook["type"] for hook in own.custom_hooks] == ["ScaleIoUMetricHook"]
