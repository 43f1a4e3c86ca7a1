"""tools/compare_by_training.py: variants, views to train on, equal tokens, rows that survive interruption."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import compare_by_training as tool
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from evidence import frozen_features as frozen
from evidence import miou_after_training as training
from evidence import photos_in_memory as memory
from evidence import training_loop as loop
from evidence.labelled_photos import Labelled, find_pairs
from evidence.training_variants import Variant, in_order, parse_variant
from evidence.variant_backbones import Plan
from support.markdown_blocks import rows_by_name
from support.threads import one_thread  # noqa: F401
from support.tiny_camvid import write_camvid

MODEL, SIZE = "test_vit", (32, 48)  # patches of 16
ROWS = (
    "uniform",
    "adaptive: tokens=0.5, thresholds=(5.5,)",
    "smaller: size=(16, 32)",
    "switched: tokens=0.5, start='uniform', epochs=0",
    "merging: tokens=0.75, rival='merging'",
    "finer: tokens=1.0, patch_size=8",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_camvid(tmp_path_factory.mktemp("camvid"), images=4)


def pairs(folders: Path) -> list[Labelled]:
    return find_pairs([folders / "val"], [folders / "valannot"])


def arguments(folders: Path, out: Path, *more: str) -> list[str]:
    argv = ["--model", MODEL, "--weights", str(folders / "weights.pth"), "--size", "32x48", "--classes", "12"]
    argv += ["--images", str(folders / "train"), "--masks", str(folders / "trainannot")]
    argv += ["--test-images", str(folders / "val"), "--test-masks", str(folders / "valannot")]
    argv += [word for row in ROWS for word in ("--row", row)]
    return [*argv, "--epochs", "1", "--batch", "2", "--device", "cpu", "--out", str(out), *more]


@pytest.fixture(scope="module")
def whole(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import timm

    torch.manual_seed(0)
    torch.save(timm.create_model(MODEL).state_dict(), folders / "weights.pth")
    out = tmp_path_factory.mktemp("whole")
    tool.main(arguments(folders, out, "--seeds", "0", "1", "--plot"))
    return out


def test_rows_at_equal_tokens_over_seeds(whole: Path) -> None:
    found = rows_by_name(whole / "table.md")
    assert list(found) == ["uniform", "adaptive", "smaller", "switched", "merging", "finer"]
    assert {name: row["tokens"] for name, row in found.items()} == {
        "uniform": "6", "adaptive": "3", "smaller": "2", "switched": "3", "finer": "6", "merging": "4",
    }  # fmt: skip
    assert {row["seeds"] for row in found.values()} == {"2"}
    assert all(0 <= float(row["mIoU"]) <= 100 and float(row["spread"]) >= 0 for row in found.values())
    assert found["switched"]["loss"] == "" and float(found["uniform"]["loss"]) > 0
    assert (whole / "curves.png").is_file()


def without_times(out: Path) -> list[dict[str, str]]:
    with (out / "table.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.endswith("ms")} for row in csv.DictReader(file)]


def test_interrupted_it_continues_with_the_same_figures(
    whole: Path, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run, calls = training.run, []

    def dies_at_the_third(*args: object) -> object:
        calls.append(args[1].name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(training, "run", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        tool.main(arguments(folders, out, "--seeds", "0", "1"))
    (weights,) = (out / "weights").glob("seed0_*.pth")
    weights.unlink()  # trained again where a row starts from it
    tool.main(arguments(folders, out, "--seeds", "0", "1"))
    # The third was not kept; the uniform one is trained again where a row of its seed starts from it.
    assert calls[:6] == ["uniform", "adaptive", "smaller", "smaller", "uniform", "switched"]
    assert without_times(out) == without_times(whole)


def test_weights_of_another_command_are_not_started_from(folders: Path, whole: Path, tmp_path: Path) -> None:
    for epochs in ("1", "2"):
        tool.main(arguments(folders, tmp_path, "--seeds", "0", "--epochs", epochs))
    assert len(list((tmp_path / "weights").glob("seed0_*.pth"))) == 2


def test_a_row_that_starts_from_another_has_its_weights(folders: Path, whole: Path) -> None:
    """With nothing merged, switching without training gives the mIoU that was measured."""
    plan = Plan(MODEL, folders / "weights.pth", 12, SIZE, 1, 2)
    data = memory.load_set(pairs(folders), False, 12, torch.device("cpu"))
    sets = training.Sets(data, data)
    first, state = training.run(plan, Variant("a", {}), 3, sets, None)
    again, _ = training.run(plan, Variant("b", {"thresholds": (0.0,)}, start="a", epochs=0), 4, sets, state)
    assert again["mIoU"] == first["mIoU"] and again["loss"] is None
    with pytest.raises(ValueError, match="starts from a model of another form"):
        loop.load_start(training.build(plan, Variant("c", {})), {"norm.weights": state.pop("norm.weight"), **state})


def test_training_lowers_the_loss(folders: Path, whole: Path) -> None:
    plan = Plan(MODEL, folders / "weights.pth", 12, SIZE, 60, 2, rate=0.01)
    data = memory.load_set(pairs(folders), False, 12, torch.device("cpu"))
    data = data._replace(masks=(data.photos[:, 0] > 128).byte())  # can be learned
    torch.manual_seed(0)
    model, losses = training.build(plan, Variant("a", {})), []
    loss_of = partial(training.loss_of_views, model, partial(memory.random_views, data, SIZE))
    loop.train(model, model.backbone, loss_of, len(data.masks), plan, Variant("a", {}), 0, losses.append)
    assert torch.stack(losses[-10:]).mean() < 0.7 * torch.stack(losses[:5]).mean()


@pytest.mark.parametrize(("epochs", "steps"), [(0, 0), (0.25, 1), (1, 4), (1.5, 6)])
def test_parts_of_epochs(epochs: float, steps: int) -> None:
    model, losses = torch.nn.Linear(1, 1), []
    plan = Plan(MODEL, None, 2, SIZE, 1, 2)
    variant = Variant("a", {}, epochs=epochs)
    loop.train(model, torch.nn.Identity(), lambda *_: model(torch.ones(1)).sum(), 9, plan, variant, 0, losses.append)
    assert len(losses) == steps


def test_what_only_apt_has_learns_faster_than_the_backbone(folders: Path, whole: Path) -> None:
    plan = Plan(MODEL, folders / "weights.pth", 12, SIZE, 1, 2)
    model = training.build(plan, Variant("a", {}, tokens=0.5))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = loop.parameter_groups(model, model.backbone, 1.0, 0.1, 0.02)
    assert [group["lr"] for group in groups] == [1.0, 0.1, 0.02]
    head, new, rest = ({names.pop(id(parameter)) for parameter in group["params"]} for group in groups)
    assert not names and {name.split(".")[0] for name in head} == {"norm", "classifier"}
    assert all("coarse_embed." in name for name in new) and not [name for name in rest if "coarse_embed." in name]
    uniform = training.build(plan, Variant("b", {}))
    assert len(loop.parameter_groups(uniform, uniform.backbone, 1.0, 0.1, 0.02)) == 2


def test_a_row_that_goes_on_slowly_learns_what_is_new_at_the_full_rate(
    folders: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(MODEL, folders / "weights.pth", 12, SIZE, 1, 2)
    variant = Variant("a", {}, tokens=0.5, rate=0.1, epochs=0)
    rates: list[float] = []
    optimizer = torch.optim.SGD
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda groups, **_: rates.extend(g["lr"] for g in groups) or optimizer(groups, lr=0)
    )
    model = training.build(plan, variant)
    loop.train(model, model.backbone, lambda *_: torch.zeros(()), 4, plan, variant, 0, lambda loss: None)
    assert rates == pytest.approx([plan.rate * part for part in (0.1, plan.new_rate, 0.1 * plan.backbone_rate)])


# ---- a frozen backbone


FROZEN = Variant("a", {"thresholds": (5.5,), "proportional_attention": 0.5}, tokens=0.5)


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [({}, 1, 1), ({"thresholds": (5.5,), "token_budget": 0.5}, 0.4, 0.5), ({"thresholds": (99.0,)}, 0.25, 0.25)],
)
def test_the_share_of_rows_that_name_none_is_counted(folders: Path, options: dict, least: float, most: float) -> None:
    plan, variant = Plan(MODEL, folders / "weights.pth", 12, (64, 96), 1, 2), Variant("a", options)
    data = memory.load_set(pairs(folders), False, 12, torch.device("cpu"))
    net = training.build(plan, variant).backbone
    share = training.choose_thresholds(net, variant, plan, training.images_to_calibrate(net, plan, variant, data))
    assert least <= share <= most


def test_features_made_once_give_the_model_s_own_logits(folders: Path, whole: Path) -> None:
    plan = Plan(MODEL, folders / "weights.pth", 12, SIZE, 1, 2, backbone_rate=0.0)
    data = memory.load_set(pairs(folders), False, 12, torch.device("cpu"))
    model = training.build(plan, FROZEN).eval()
    images = training.images_to_calibrate(model.backbone, plan, FROZEN, data)
    training.choose_thresholds(model.backbone, FROZEN, plan, images)
    features = frozen.features_of(model.backbone, data, SIZE, mirrored=True)
    assert features.maps.shape[:2] == (2, 4) and features.maps.dtype == torch.float16
    for view, photos in enumerate((data.photos, data.photos.flip(-1))):
        expected = model(next(memory.resized_photos(data._replace(photos=photos), SIZE, 4)), (60, 80))
        found = frozen.FrozenSegmentor(model)(features.maps[view].float(), (60, 80))
        torch.testing.assert_close(
            found, expected, atol=0.02 * float(expected.detach().abs().max()), rtol=0.05
        )  # bfloat16's
    expected_scores = training.evaluate(model, data, SIZE)
    scores = frozen.evaluate_frozen(frozen.FrozenSegmentor(model), features)
    assert scores["tokens"] == expected_scores["tokens"]
    assert scores["accuracy"] == pytest.approx(expected_scores["accuracy"], abs=2)


def test_masks_are_mirrored_with_their_features() -> None:
    maps = torch.arange(4.0).view(1, 1, 1, 1, 4).expand(2, 3, 1, 2, 4).clone().half()
    maps[1] = maps[1].flip(-1)
    masks = torch.arange(4, dtype=torch.uint8).expand(3, 2, 4)
    data = frozen.FrozenSet(maps, masks, 8.0, 1.0)
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(8):
        found, wanted = data.views(torch.tensor([0, 2]), generator)
        assert torch.equal(found[:, 0].long(), wanted)
        seen |= {int(first) for first in wanted[:, 0, 0]}
    assert seen == {0, 3}


def test_frozen_nothing_but_the_head_is_trained(folders: Path, whole: Path) -> None:
    plan = Plan(MODEL, folders / "weights.pth", 12, SIZE, 20, 2, rate=0.01, backbone_rate=0.0)
    data = memory.load_set(pairs(folders), False, 12, torch.device("cpu"))
    torch.manual_seed(0)
    before = training.build(plan, FROZEN).state_dict()
    results, after = training.run(plan, FROZEN, 0, training.Sets(data, data), None)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in moved} == {"norm", "classifier"}
    assert results["loss"] > 0 and results["tokens"] == pytest.approx(3, abs=1)


def test_scores_are_grouped_by_the_patches_of_a_row(folders: Path, whole: Path, tmp_path: Path) -> None:
    rows = ["--row", "random: tokens=0.5, thresholds=(1.0,), rival='random'"]
    tool.main(arguments(folders, tmp_path, "--seeds", "0", "--frozen", "--group-by", "adaptive", *rows))
    head, _, *lines = (tmp_path / "table.md").read_text().split("\n\n")[1].splitlines()
    names = [name.strip() for name in head.strip("|").split("|")]
    assert {"boundary", "fine", "coarse", "backbone ms"} < set(names) and "step ms" not in names
    for line in lines:
        row = dict(zip(names, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
        assert (
            all(0 <= float(row[name]) <= 100 for name in ("boundary", "fine", "coarse"))
            and float(row["backbone ms"]) > 0
        )
    with pytest.raises(SystemExit, match="expected the name of a row with adaptive patches"):
        tool.main(arguments(folders, tmp_path, "--group-by", "uniform"))


def test_frozen_all_seeds_share_the_features(
    folders: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, make = [], training.features_of
    monkeypatch.setattr(training, "features_of", lambda *args: made.append(1) or make(*args))
    tool.main(arguments(folders, tmp_path, "--seeds", "0", "1", "2", "--frozen"))
    assert len(made) == 2 * len(ROWS)
    assert "| 3 |" in (tmp_path / "table.md").read_text()


# ---- variants


def test_variants_are_names_options_and_fields() -> None:
    found = parse_variant("b: tokens=0.6, size=(28, 42), start='a', epochs=1, rate=0.1, scorer='laplacian'")
    assert found == Variant("b", {"scorer": "laplacian"}, (28, 42), 0.6, "a", 1, 0.1)
    assert parse_variant("uniform") == Variant("uniform", {}) and not parse_variant("uniform").is_adaptive


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: tokens=0", "tokens=0, expected a number above 0"),
        ("a: tokens=True", "tokens=True, expected a number above 0"),
        ("a: tokens=float('nan')", "expected NAME or"),
        ("a: size=3", "size=3, expected two numbers"),
        ("a: size=(3, 0)", "size=.3, 0., expected two numbers"),
        ("a: epochs=-1", "epochs=-1, expected 0 or more"),
        ("a: epochs='1'", "epochs='1', expected 0 or more"),
        ("a: rate=0", "rate=0, expected a number above 0"),
        ("a: start=1", "start=1, expected the name"),
        ("a: tokens", "expected NAME or"),
        ("a: nothing=1", "APTViT has no option nothing"),
    ],
)
def test_other_variants_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_variant(text)


def test_rows_start_from_rows_before_them() -> None:
    first, second = Variant("a", {}), Variant("b", {}, start="a")
    assert in_order([first, second]) == [first, second]
    with pytest.raises(ValueError, match="row 'b' starts from 'a'; list that row before it"):
        in_order([second, first])
    with pytest.raises(ValueError, match="several rows are called 'a'"):
        in_order([first, first])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--epochs", "0"], "--epochs 0: expected 1 or more"),
        (["--batch", "1"], "--batch 1: expected 2 or more"),
        (["--limit", "1"], "--limit 1: expected 2 or more"),
        (["--classes", "5"], "a mask has class 11, and there are 5 classes"),
        (["--size", "32"], "expected HEIGHTxWIDTH"),
    ],
)
def test_wrong_arguments_end_in_a_line(
    more: list[str], message: str, folders: Path, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=f"^compare_by_training: .*{message}"):
        tool.main(arguments(folders, tmp_path, "--seeds", "0", *more))


# ---- photos


def test_views_are_parts_of_photo_and_mask_alike() -> None:
    masks = torch.arange(6 * 8, dtype=torch.uint8).view(1, 6, 8).repeat_interleave(10, 1).repeat_interleave(10, 2)
    data = memory.LabelledSet(masks[:, None].expand(-1, 3, -1, -1).contiguous(), masks)
    photos, labels = memory.random_views(data, (60, 80), torch.zeros(32, dtype=torch.long), torch.Generator())
    assert photos.shape == (32, 3, 60, 80) and labels.shape == (32, 60, 80) and labels.dtype == torch.int64
    inner = F.max_pool2d(labels[:, None].float(), 5, 1, 2) == -F.max_pool2d(-labels[:, None].float(), 5, 1, 2)
    assert torch.equal(photos[:, :1][inner], labels[:, None].float()[inner])  # away from borders, where photos mix
    seen = [view.unique().numel() for view in labels]
    assert min(seen) >= 4 * 5 and max(seen) <= 48 and len(set(seen)) > 1  # parts of 1 / 1.5 at least
    mirrored = labels[:, 30, 10] > labels[:, 30, 70]
    assert 4 < mirrored.sum() < 28


def test_each_photo_is_seen_once_an_epoch() -> None:
    steps = list(memory.epochs_of(7, 3, 2, torch.Generator().manual_seed(0)))
    assert [len(step) for step in steps] == [3] * 4
    assert len(set(torch.cat(steps[:2]).tolist())) == 6 and not torch.equal(steps[0], steps[2])


def test_photos_of_several_sizes_are_refused(tmp_path: Path) -> None:
    for name, size in (("0", (4, 6)), ("1", (4, 7))):
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(tmp_path / "images" / f"{name}.png")
        Image.fromarray(np.zeros(size, np.uint8)).save(tmp_path / "masks" / f"{name}_L.png")
    found = find_pairs([tmp_path / "images"], [tmp_path / "masks"])
    with pytest.raises(ValueError, match="several sizes, .*resize them to one first"):
        memory.load_set(found, False, 12, torch.device("cpu"))
