"""tools/compare_by_training.py --times: models of all rows take turns, and only what differs in time is built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import compare_by_training as tool
import pytest
import timm
import torch

from evidence import miou_after_training as training
from evidence import times_in_turns as times
from evidence.labelled_photos import find_pairs
from evidence.training_variants import Variant
from evidence.variant_backbones import Plan
from support.coco_folder import write_coco
from support.markdown_blocks import rows_by_name
from support.threads import one_thread  # noqa: F401
from support.tiny_camvid import write_camvid

CPU = torch.device("cpu")
FORM = "tokens=0.5, thresholds=(5.5,)"
ROWS = (
    "uniform", f"adaptive: {FORM}", f"switched: {FORM}, start='uniform', epochs=0", "smaller: size=(16, 32)",
    "merging: tokens=0.75, rival='merging'",
)  # fmt: skip
DETECTORS = (ROWS[0], f"adaptive: {FORM}", "smaller: size=(64, 64)")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), root / "weights.pth")
    write_coco(root / "coco", images=4)
    return write_camvid(root, images=4)


def run(folders: Path, out: Path, data: list[str], rows: tuple[str, ...], *more: str) -> None:
    argv = ["--model", "test_vit", "--weights", str(folders / "weights.pth"), *data]
    argv += [word for row in rows for word in ("--row", row)]
    tool.main([*argv, "--epochs", "1", "--batch", "2", "--device", "cpu", "--out", str(out), "--seeds", "0", *more])


def masks(folders: Path) -> list[str]:
    argv = ["--size", "32x48", "--classes", "12"]
    argv += ["--images", str(folders / "train"), "--masks", str(folders / "trainannot")]
    return [*argv, "--test-images", str(folders / "val"), "--test-masks", str(folders / "valannot")]


def test_rows_get_times_without_being_trained_again(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folders, tmp_path, masks(folders), ROWS)
    before = (tmp_path / "rows.jsonl").read_bytes()
    built, build = [], training.build
    monkeypatch.setattr(training, "build", lambda plan, variant: built.append(variant.name) or build(plan, variant))
    run(folders, tmp_path, masks(folders), ROWS, "--times", "2", "--plot")
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    assert built == ["uniform", "adaptive", "smaller", "merging"] * 2  # to test, and to train
    found = rows_by_name(tmp_path / "table.md")
    assert found["switched"]["ms"] == found["adaptive"]["ms"] and not found["switched"]["step ms"]
    trained = [row for name, row in found.items() if name != "switched"]
    for prefix, rows in (("", found.values()), ("step ", trained)):
        for row in rows:
            least, most = map(float, row[f"{prefix}range"].split("-"))
            digits = 0.5 if prefix else 0.0  # of the column
            assert 0 < least <= float(row[f"{prefix}ms"]) + digits and float(row[f"{prefix}ms"]) <= most + digits
    text = (tmp_path / "table.md").read_text()
    assert '"ms": of a photo, batches of 8; "step ms": of a training step of 2 photos.' in text
    assert "medians and ranges of 2 rounds on" in text
    assert (tmp_path / "curves.png").is_file()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
@pytest.mark.parametrize("more", [[], ["--frozen"]])
def test_whole_detectors_are_timed(more: list[str], folders: Path, tmp_path: Path) -> None:
    run(folders, tmp_path, ["--coco", str(folders / "coco"), "--size", "128"], DETECTORS, "--times", "1", *more)
    found = rows_by_name(tmp_path / "table.md")
    assert all(float(row["ms"]) > 0 and "backbone ms" not in row for row in found.values())
    assert all(("step ms" in row) == (not more) for row in found.values())
    text = (tmp_path / "table.md").read_text()
    assert '"ms": of a photo, one at a time' in text and "medians and ranges of 1 round on" in text
    assert ('"step ms": of a training step' in text) == (not more)


def test_models_that_are_timed_are_those_of_the_rows(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = find_pairs([folders / "val"], [folders / "valannot"])
    task = training.SegmentationTask(pairs, pairs, False, CPU)
    plan = Plan("test_vit", folders / "weights.pth", 12, (32, 48), 1, 2)
    models, build = [], training.build
    monkeypatch.setattr(training, "build", lambda *args: models.append(build(*args)) or models[-1])
    forward = task.forward(plan, Variant("a", {}, tokens=0.5), (4.25,))
    assert forward() == len(pairs) == 4
    assert tuple(models[0].backbone.thresholds) == (4.25,) and not models[0].training


def test_a_timed_step_trains_on_the_same_photos_and_leaves_the_weights(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = find_pairs([folders / "val"], [folders / "valannot"])
    plan = Plan("test_vit", folders / "weights.pth", 12, (32, 48), 1, 2)
    models, build, inputs = [], training.build, []
    monkeypatch.setattr(training, "build", lambda *args: models.append(build(*args)) or models[-1])
    step = training.SegmentationTask(pairs, pairs, False, CPU).step(plan, Variant("a", {}, tokens=0.5), (4.25,))
    (model,) = models
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    model.register_forward_pre_hook(lambda module, given: inputs.append(given[0].clone()))
    assert step() == step() == 2 and model.training and tuple(model.backbone.thresholds) == (4.25,)
    assert torch.equal(*inputs) and all(parameter.grad is not None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_a_step_is_of_a_batch_and_a_time_of_a_photo(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes three seconds."""
    pairs = find_pairs([folders / "val"], [folders / "valannot"])
    plan = Plan("test_vit", folders / "weights.pth", 12, (32, 48), 1, 2)
    monkeypatch.setattr(times, "seconds_of", lambda action, device: action() or 3.0)
    task = training.SegmentationTask(pairs, pairs, False, CPU)
    found = times.times_of(task, plan, [Variant("a", {}), Variant("b", {}, epochs=0)], {"a": (), "b": ()}, 1, CPU)
    assert found["b"] == {"ms": pytest.approx(750.0), "range": "750.0-750.0"}
    assert found["a"] == {**found["b"], "step ms": pytest.approx(3000.0), "step range": "3000.0-3000.0"}


def test_a_table_is_there_should_timing_fail(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(tool, "times_of", out_of_memory)
    with pytest.raises(RuntimeError):
        run(folders, tmp_path, masks(folders), ROWS[:1], "--times", "1")
    assert rows_by_name(tmp_path / "table.md")["uniform"]["mIoU"]


def test_models_take_turns_after_a_round_that_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = iter([9.0, 9.0, 2.0, 0.5, 1.5, 4.0]), []

    def seconds_of(action: Callable[[], None], device: torch.device) -> float:
        action()
        return next(clock)

    monkeypatch.setattr(times, "seconds_of", seconds_of)
    forwards = {
        name: lambda name=name, photos=photos: calls.append(name) or photos for name, photos in (("a", 4), ("b", 1))
    }
    assert times.milliseconds_in_turns(forwards, 2, CPU) == {"a": [500.0, 1000.0], "b": [500.0, 1500.0]}
    assert calls == ["b", "a", "a", "b", "b", "a"]


def test_what_slows_a_round_slows_all_alike() -> None:
    """Three rounds, of which the last took twice as long, and one model was held up once."""
    found = times.without_drift({"a": [100.0, 100.0, 200.0], "b": [50.0, 50.0, 100.0]})
    assert found == {"a": pytest.approx([100.0] * 3), "b": pytest.approx([50.0] * 3)}
    held_up = times.without_drift({"a": [100.0, 400.0, 200.0], "b": [50.0, 50.0, 100.0]})
    assert held_up["a"][0] == pytest.approx(held_up["a"][2]) and held_up["a"][1] > 1.9 * held_up["a"][0]
    assert times.without_drift({"a": [3.0]}) == {"a": [pytest.approx(3.0)]}


@pytest.mark.parametrize("rounds", ["0", "-1", "x"])
def test_wrong_numbers_of_rounds_are_refused(
    rounds: str, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(folders, tmp_path, masks(folders), ROWS, "--times", rounds)
    assert ended.value.code == 2 and "--times" in capsys.readouterr().err


def test_a_row_s_own_budget_holds(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = find_pairs([folders / "val"], [folders / "valannot"])
    plan = Plan("test_vit", folders / "weights.pth", 12, (32, 48), 1, 2)
    models, build = [], training.build
    monkeypatch.setattr(training, "build", lambda *args: models.append(build(*args)) or models[-1])
    budget = Variant("a", {"thresholds": (5.5,), "token_budget": 0.5})
    training.SegmentationTask(pairs, pairs, False, CPU).forward(plan, budget, (5.5,))
    assert models[0].backbone.patches.token_budget == 0.5
