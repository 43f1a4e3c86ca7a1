"""APByScaleEvaluator: patches of the images as the model sees them, in pixels of the files; refusals."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is built from source (see its INSTALL page)")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances

from apt_dense.hosts.detectron2.ap_by_scale import APByScaleEvaluator

from support.tiny_coco import ADAPTIVE, CATEGORIES, UNIFORM, one_thread, tiny_model, write_coco  # noqa: F401 (a fixture)

pytestmark = pytest.mark.filterwarnings("ignore")  # pycocotools' own
NAME = "tiny_by_scale"


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A registered data set of tall and wide pictures with coloured rectangles on grey; its annotations."""
    root = write_coco(tmp_path_factory.mktemp("data") / "coco")
    path = root / "annotations" / "instances_val2017.json"
    register_coco_instances(NAME, {}, str(path), str(root / "val2017"))
    DatasetCatalog.get(NAME)  # sets the labels of categories
    return json.loads(path.read_text())


def picture(entry: dict, factor: int) -> dict:
    """A loader's dictionary: noise above, grey below, ``factor`` times as large as the annotations' pixels."""
    height, width = factor * entry["height"], factor * entry["width"]
    pixels = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels[:, height // 2 :] = 90
    return {"image": pixels, "image_id": entry["id"], "height": entry["height"], "width": entry["width"]}


def perfect(content: dict, entry: dict, masks: bool) -> dict:
    """The output of a perfect detector: the annotations themselves."""
    own = [one for one in content["annotations"] if one["image_id"] == entry["id"]]
    found = Instances((entry["height"], entry["width"]))
    found.pred_boxes = Boxes(torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (o["bbox"] for o in own)]).float())
    ids = [category["id"] for category in CATEGORIES]
    found.pred_classes = torch.tensor([ids.index(one["category_id"]) for one in own])
    found.scores = torch.linspace(0.9, 0.5, len(own))
    if masks:
        found.pred_masks = torch.zeros(len(own), entry["height"], entry["width"], dtype=torch.bool)
        for place, (x, y, w, h) in enumerate(one["bbox"] for one in own):
            found.pred_masks[place, y : y + h, x : x + w] = True
    return {"instances": found}


@pytest.mark.parametrize(("factor", "masks"), [(1, True), (2, False)])
def test_shares_are_those_of_the_models_patches(content: dict, factor: int, masks: bool) -> None:
    model = tiny_model(ADAPTIVE, "model.backbone.square_pad=0")
    evaluator = APByScaleEvaluator(NAME, model)
    for first in (0, 2):  # a tall and a wide picture, which are padded to one size
        images = content["images"][first : first + 2]
        inputs = [picture(entry, factor) for entry in images]
        evaluator.process(inputs, [perfect(content, entry, masks) for entry in images])
        cells = model.backbone.net.partition(model.preprocess_image(inputs).tensor)
        pixels = (cells > 0).repeat_interleave(16, 1).repeat_interleave(16, 2).numpy()
        for entry, coarse in zip(images, pixels, strict=True):
            for one in content["annotations"]:
                if one["image_id"] == entry["id"]:
                    x, y, w, h = (factor * value for value in one["bbox"])
                    expected = coarse[y : y + h, x : x + w].mean()
                    assert evaluator._found.objects[one["id"]] == pytest.approx(expected, abs=1e-6)
    shares = list(evaluator._found.objects.values())
    assert min(shares) < 0.5 < max(shares)
    results = evaluator.evaluate()
    assert set(results) == ({"bbox_by_scale", "segm_by_scale"} if masks else {"bbox_by_scale"})
    scores = results["bbox_by_scale"]
    groups = {"fine": (-1, 0), "mixed": (0, 0.5), "coarse": (0.5, 1)}
    for group, (above, most) in groups.items():
        number = sum(above < share <= most for share in shares)
        assert scores[f"objects_{group}"] == number
        assert np.isnan(scores[f"AP_{group}"]) if not number else scores[f"AP_{group}"] == pytest.approx(100)
    evaluator.reset()
    assert not evaluator._found.images


def test_a_uniform_model_can_be_grouped_by_other_patches(content: dict) -> None:
    entry = content["images"][0]
    found = []
    for path, thresholds in (
        (ADAPTIVE, None),
        (UNIFORM, None),
        (UNIFORM, tiny_model(ADAPTIVE).backbone.net.thresholds),
    ):
        evaluator = APByScaleEvaluator(NAME, tiny_model(path), thresholds)
        evaluator.process([picture(entry, 1)], [perfect(content, entry, False)])
        found.append(evaluator._found.objects)
    assert found[0] == found[2] and set(found[1].values()) == {0}


def _score_half(rank: int, content: dict, path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}.store", rank=rank, world_size=2)
    path.with_suffix(f".{rank}.json").write_text(json.dumps(scores_of(content, content["images"][rank::2])))
    torch.distributed.destroy_process_group()


def scores_of(content: dict, images: list[dict]) -> dict:
    """The scores of a perfect detector on these images, gathered over all processes."""
    evaluator = APByScaleEvaluator(NAME, tiny_model())
    for entry in images:
        evaluator.process([picture(entry, 1)], [perfect(content, entry, True)])
    scores = evaluator.evaluate()
    return {kind: {name: value for name, value in one.items() if value == value} for kind, one in scores.items()}


def test_two_processes_score_as_one(content: dict, tmp_path: Path) -> None:
    pytest.importorskip("mmseg", reason="processes are forked by a helper that serves all hosts")
    from support.tiny_trainings import run_processes

    path = tmp_path / "scores"
    assert run_processes([partial(_score_half, rank, content, path) for rank in range(2)], path) == [(0, "")] * 2
    first, second = (json.loads(path.with_suffix(f".{rank}.json").read_text()) for rank in range(2))
    assert first == scores_of(content, content["images"]) and first["segm_by_scale"] and second == {}


def test_keypoints_are_left_where_they_are(content: dict) -> None:
    entry = content["images"][0]
    output = perfect(content, entry, False)
    output["instances"].pred_keypoints = torch.zeros(len(output["instances"]), 1, 3)
    evaluator = APByScaleEvaluator(NAME, tiny_model())
    evaluator.process([picture(entry, 1)], [output])
    assert not output["instances"].pred_keypoints.any()


def test_what_cannot_be_split_is_refused(content: dict) -> None:
    with pytest.raises(ValueError, match="Identity has no preprocess_image"):
        APByScaleEvaluator(NAME, torch.nn.Identity())
    MetadataCatalog.get("without_file")
    with pytest.raises(ValueError, match="'without_file' has no json_file"):
        APByScaleEvaluator("without_file", tiny_model())
    with pytest.raises(ValueError, match="thresholds="):
        APByScaleEvaluator(NAME, tiny_model(), (5.0, 4.0, 3.0, 2.0))
