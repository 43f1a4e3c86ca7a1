"""tools/train_det_torchvision.py: training, interruption and resuming, evaluation, weights, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from support.coco_folder import TINY, TINY_PRESET, TOOLS, one_thread, write_coco  # noqa: F401 (a fixture, applied by itself)
from support.families import timm_model

pytest.importorskip("pycocotools", reason="data sets in COCO's layout are read with pycocotools")

import train_det_torchvision as tool

from apt_dense.hosts import coco_picture_sizes, token_drift
from apt_dense.hosts.torchvision import build_detector as model
from apt_dense.hosts.torchvision.build_detector import build_model
from apt_dense.hosts.torchvision.run_settings import Settings
from apt_dense.hosts.vit_sizes_and_windows import windowed_blocks

from torchvision_detection import training
from torchvision_detection.data import load_split
from torchvision_detection.optimizer import make_optimizer, rate_at

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own

model.PRESETS["tiny"] = TINY_PRESET  # with drop path, so that random numbers matter
ITERATIONS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("data") / "coco", images=3)


@pytest.fixture(scope="module")
def whole_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an uninterrupted run; tests only read it."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    start(data, out)
    return out


def start(data: Path, out: Path, *options: str, iterations: int = ITERATIONS) -> dict | None:
    return tool.main([str(data), "--out", str(out), *TINY, "--iterations", str(iterations), *options])


def logged(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("expected", "anneal", "warnings"), [("0.9", (), 1), ("0.9", ("--anneal", "0", "1"), 0)])
def test_another_share_of_tokens_than_expected_is_said_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    expected: str, anneal: tuple[str, ...], warnings: int,
) -> None:  # fmt: skip
    """Iterations before the schedule's end do not count."""
    monkeypatch.setattr(token_drift, "WINDOW", 2)
    start(data, tmp_path / "out", "--expected-tokens", expected, *anneal, iterations=4)
    assert sum("90.0% were expected" in message for message in caplog.messages) == warnings


def curve(out: Path) -> list[dict]:
    """The log without times, and without evaluations."""
    lines = [{k: v for k, v in entry.items() if k != "seconds"} for entry in logged(out)]
    return [line for line in lines if "loss" in line]


def failure(*argv: object) -> str:
    """The one line that the tool ends with."""
    with pytest.raises(SystemExit) as ended:
        tool.main(list(map(str, argv)))
    assert "\n" not in str(ended.value.code)
    return str(ended.value.code)


# ---- training -------------------------------------------------------------------------------------------------------


def test_the_loss_falls_on_two_images(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "data", images=2)
    results = start(data, tmp_path / "out", "--no-amp", "--clip", "0", iterations=40)
    losses = [entry["loss"] for entry in logged(tmp_path / "out")]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())


def test_log_and_results(whole_run: Path) -> None:
    lines, results = curve(whole_run), json.loads((whole_run / "results.json").read_text())
    assert [line["iteration"] for line in lines] == list(range(ITERATIONS))
    parts = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")
    assert all(line["loss"] == pytest.approx(sum(line[part] for part in parts)) for line in lines)
    assert all(0 < line["tokens_kept"] < 1 for line in lines)  # grey ground in large patches
    assert set(results) == {"bbox", "segm", "tokens_kept"} and len(results["bbox"]) == len(results["segm"]) == 12
    assert 0 < results["tokens_kept"] < 1
    assert not list(whole_run.glob("*.partial"))


@pytest.mark.parametrize("options", [("--thresholds", "none", "--no-drop-padding"), ("--amp", "--checkpoint-blocks")])
def test_variants(data: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    start(data, tmp_path, *options, "--eval-every", "1", iterations=2)
    lines = logged(tmp_path)
    assert [("loss" in line, line["iteration"]) for line in lines] == [(True, 0), (False, 1), (True, 1)]
    assert (lines[0]["tokens_kept"] == 1) == ("none" in options)
    assert lines[1]["bbox"]["AP"] >= 0


def test_training_on_images_without_objects(tmp_path: Path) -> None:
    start(write_coco(tmp_path / "data", change=lambda c: c["annotations"].__delitem__(slice(2))), tmp_path / "out",
          "--batch-size", "1", iterations=2)  # fmt: skip
    assert sorted(entry["loss_mask"] == 0 for entry in logged(tmp_path / "out")) == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"].clear(), "has no objects"),
        (lambda c: [a.update(segmentation=[[]]) for a in c["annotations"]], "4 with an outline of less than three"),
        (lambda c: [a.update(image_id="7") for a in c["annotations"]], "4 of images that are not listed"),
        (lambda c: [a.update(iscrowd=True) for a in c["annotations"]], "4 crowds"),
        (lambda c: [a.update(category_id="3") for a in c["annotations"]], "none of 1 class: green (0 of 0)"),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--eval-only",)])
def test_nothing_to_learn_is_refused(tmp_path: Path, change: Callable, message: str, flags: tuple) -> None:
    root = write_coco(tmp_path / "data", change=change)
    assert message in failure(root, "--out", tmp_path / "out", *TINY, *flags)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_ends_the_run(data: Path, tmp_path: Path) -> None:
    message = failure(data, "--out", tmp_path, *TINY, "--lr", "1e30", "--clip", "0", "--iterations", "9")
    assert ("loss of iteration" in message and "lower --lr" in message) or "NaN or infinite" in message


# ---- boxes without masks ---------------------------------------------------------------------------------------------


def without_masks(content: dict) -> None:
    for number, entry in enumerate(content["annotations"]):
        entry.pop("segmentation") if number else entry.update(segmentation=[])


def test_data_without_masks_are_learned_and_scored_for_boxes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, out = write_coco(tmp_path / "data", change=without_masks), tmp_path / "out"
    with caplog.at_level("INFO"):
        results = start(data, out, iterations=1)
    assert "the val data have no masks: boxes alone" in caplog.text
    assert set(results) == {"bbox", "tokens_kept"} and len(results["bbox"]) == 12
    assert "loss_mask" not in logged(out)[0] and "loss_box_reg" in logged(out)[0]
    assert tool.main([str(data), "--out", str(out), "--eval-only", "--workers", "0"]) == results
    assert "trained for boxes alone" in failure(
        write_coco(tmp_path / "masks"), "--out", out, "--eval-only", "--task", "masks"
    )
    assert "has no segmentation" in failure(data, "--out", tmp_path / "other", *TINY, "--task", "masks")
    assert tool.main([str(data), "--out", str(out), "--resume", "--workers", "0", "--device", "cpu"]) == results


def test_masks_may_be_left_out(data: Path, whole_run: Path, tmp_path: Path) -> None:
    assert set(start(data, tmp_path / "boxes", "--task", "boxes", iterations=1)) == {"bbox", "tokens_kept"}
    assert "task: boxes against masks" in failure(data, "--out", tmp_path / "boxes", "--resume", "--task", "masks")
    common = [str(data), "--out", str(tmp_path / "scored"), "--eval-only", "--task", "boxes", "--workers", "0"]
    found = tool.main([*common, "--checkpoint", str(whole_run / "last.pth")])
    assert found == {k: v for k, v in json.loads((whole_run / "results.json").read_text()).items() if k != "segm"}


def test_some_objects_without_masks_are_named(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "data", change=lambda content: content["annotations"][1].pop("segmentation"))
    message = failure(data, "--out", tmp_path / "out", *TINY)
    assert "annotation 2 of image 10 has no segmentation" in message and "--task boxes" in message


# ---- interruption ---------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import torch, train_det_torchvision
from support import coco_folder
from apt_dense.hosts import token_drift
from apt_dense.hosts.torchvision import build_detector as model
from torchvision_detection import training
torch.set_num_threads(1)
model.PRESETS["tiny"] = coco_folder.TINY_PRESET
step = training.Trainer.step
def step_or_die(self, *batch):
    entry = step(self, *batch)
    if self.iteration == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return entry
training.Trainer.step = step_or_die
train_det_torchvision.main(sys.argv[1:])
"""


def test_a_killed_run_takes_the_same_course_when_resumed(data: Path, whole_run: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (TOOLS, TOOLS.parent / "tests", TOOLS.parent)))}
    argv = [str(data), "--out", str(tmp_path), *TINY, "--iterations", str(ITERATIONS), "--save-every", "4"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *argv], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"iteration": 6, "lo')  # as a line that was being written
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 6
    torch.manual_seed(99)
    results = tool.main([str(data), "--out", str(tmp_path), "--resume", "--workers", "0", "--device", "cpu"])
    resumed, whole = curve(tmp_path), curve(whole_run)
    assert [line["iteration"] for line in resumed] == list(range(ITERATIONS))
    for line, expected in zip(resumed, whole, strict=True):
        assert line == pytest.approx(expected, abs=1e-6)
    assert results == json.loads((whole_run / "results.json").read_text())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint(
    data: Path, whole_run: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = training.Trainer.step

    def interrupted(self: training.Trainer, *batch: object) -> dict:
        if self.iteration == 2:
            os.kill(os.getpid(), number)
        return step(self, *batch)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "step", interrupted)
        assert start(data, tmp_path) is None
    assert signal.getsignal(number) is before
    assert len(curve(tmp_path)) == 3
    tool.main([str(data), "--out", str(tmp_path), "--resume", *TINY])
    assert curve(tmp_path) == curve(whole_run)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(
    data: Path, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = training.Trainer(Settings(model="tiny", size=64), load_split(data, "train"))
    trainer.save(tmp_path / "last.pth")
    before = (tmp_path / "last.pth").read_bytes()

    def half(_: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        trainer.save(tmp_path / "last.pth")
    assert (tmp_path / "last.pth").read_bytes() == before


def test_resuming_a_finished_run_evaluates_it(data: Path, whole_run: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    assert start(data, tmp_path / "run", "--resume") == json.loads((whole_run / "results.json").read_text())
    assert curve(tmp_path / "run") == curve(whole_run)


def test_resume_without_a_checkpoint_starts(data: Path, tmp_path: Path) -> None:
    start(data, tmp_path, "--resume", iterations=1)
    assert len(curve(tmp_path)) == 1


# ---- evaluation -----------------------------------------------------------------------------------------------------


def test_eval_only(data: Path, whole_run: Path, tmp_path: Path) -> None:
    common = [str(data), "--out", str(tmp_path), "--eval-only", "--workers", "0", "--device", "cpu"]
    common += ["--checkpoint", str(whole_run / "last.pth")]
    expected = json.loads((whole_run / "results.json").read_text())
    assert tool.main(common) == expected == json.loads((tmp_path / "results.json").read_text())
    assert tool.main([*common, "--thresholds", "none"])["tokens_kept"] == 1
    assert 0 < tool.main([*common, "--size", "96"])["tokens_kept"] <= 1


def test_objects_are_scored_by_scale(data: Path, whole_run: Path, tmp_path: Path) -> None:
    """In evaluations, also of the uniform model by the same patches, and in training."""
    common = [str(data), "--out", str(tmp_path), "--eval-only", "--workers", "0", "--device", "cpu"]
    common += ["--checkpoint", str(whole_run / "last.pth")]
    adaptive = tool.main([*common, "--by-scale"])
    expected = json.loads((whole_run / "results.json").read_text())
    assert {name: value for name, value in adaptive.items() if "by_scale" not in name} == expected
    thresholds = [str(value) for value in Settings().thresholds]
    uniform = tool.main([*common, "--thresholds", "none", "--by-scale", *thresholds])
    for kind in ("bbox_by_scale", "segm_by_scale"):
        numbers = [{n: v for n, v in one[kind].items() if "objects" in n} for one in (adaptive, uniform)]
        assert numbers[0] == numbers[1] and len(numbers[0]) == 6
        assert sum(v for name, v in numbers[0].items() if not name.startswith("small")) == 6
    results = start(data, tmp_path / "run", "--by-scale", "--eval-every", "1", iterations=2)
    (line,) = [entry for entry in logged(tmp_path / "run") if "bbox" in entry]
    assert set(line["bbox_by_scale"]) == set(results["segm_by_scale"])
    assert "thresholds" in failure(*common, "--by-scale", "9", "8", "7", "6", "5", "4")


def test_eval_only_refuses_other_categories(data: Path, whole_run: Path, tmp_path: Path) -> None:
    def rename(content: dict) -> None:
        content["categories"] = [{"id": 3, "name": "red"}, {"id": 90, "name": "blue"}]

    other = write_coco(tmp_path / "data", change=rename)
    message = failure(other, "--out", tmp_path, "--eval-only", "--checkpoint", whole_run / "last.pth")
    assert "categories (id, name) of the val data differ" in message and "blue" in message


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_bad_checkpoints(data: Path, whole_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    common = (data, "--out", tmp_path, "--device", "cpu")
    assert "does not exist" in failure(*common, "--eval-only")
    whole = (whole_run / "last.pth").read_bytes()
    for content in (b"", b"nothing", whole[: len(whole) // 2]):
        path.write_bytes(content)
        for option in ("--eval-only", "--resume"):
            assert "cannot be read as weights" in failure(*common, option)
    torch.save({"model": {}}, path)
    assert "is not a checkpoint of this tool: it lacks ['optimizer'" in failure(*common, "--resume")
    checkpoint = torch.load(whole_run / "last.pth")
    torch.save(checkpoint | {"model": dict(list(checkpoint["model"].items())[:-5])}, path)
    assert "does not fit the model: 5 problems, such as" in failure(*common, "--eval-only")


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("model", [None, 3, "x"]),
        ("optimizer", [None, "x", {}, {"state": None, "param_groups": []}]),
        ("scheduler", [None, {}, "x"]),
        ("iteration", [None, "3", -1, 1.5, float("nan"), 10**12, 1]),  # the schedule is at another
        ("settings", [None, "x", {"size": "x"}, {"lr": None, "speed": 3}, {"amp": "no"}, {"thresholds": "5"}]),
        ("categories", [None, 3]),
    ],
)
def test_damaged_parts_are_named_with_the_file(
    part: str, values: list, data: Path, whole_run: Path, tmp_path: Path
) -> None:
    path, checkpoint = tmp_path / "last.pth", torch.load(whole_run / "last.pth")
    for value in values:
        torch.save(checkpoint | {part: value}, path)
        said = failure(data, "--out", tmp_path, "--device", "cpu", "--resume")
        assert f"{path} cannot be continued from: " in said or f"{path} has settings that this version" in said


def test_resume_with_other_settings(data: Path, whole_run: Path) -> None:
    message = failure(data, "--out", whole_run, "--resume", *TINY, "--lr", "5e-3", "--iterations", ITERATIONS)
    assert "belongs to another run (lr: 0.002 against 0.005)" in message
    assert "exists; add --resume to continue that run" in failure(data, "--out", whole_run, *TINY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--thresholds", "a"), "--thresholds a: expected numbers such as 5.5 4.0, or none"),
        (("--thresholds", "4", "5"), "rise with the scale"),
        (("--size", "3"), "size=3 must be 32 or more"),
        (("--lr", "0"), "lr=0.0 must be a finite number, above 0"),
        (("--model", "vit_tinny"), "timm has no model 'vit_tinny'"),
        (("--pretrained", "timm"), "--pretrained timm goes with a timm model"),
        (("--pretrained", "gone.pth"), "gone.pth does not exist"),
        (("--scale-jitter", "2", "1"), "scale_jitter=(2.0, 1.0) must be a lowest"),
    ],
)
def test_bad_settings(data: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    assert message in failure(data, "--out", tmp_path, *TINY, *options)


def test_train_and_val_need_the_same_categories(data: Path, tmp_path: Path) -> None:
    root = shutil.copytree(data, tmp_path / "data")
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"].append({"id": 91, "name": "new"})
    path.write_text(json.dumps(content))
    assert "has none of 1 class: new (0 of 0)" in failure(root, "--out", tmp_path / "out", *TINY)
    allowed = failure(root, "--out", tmp_path / "out", *TINY, "--allow-empty-classes")
    assert "both files need the same list" in allowed


# ---- weights and optimizer ------------------------------------------------------------------------------------------


def test_a_vit_file_as_pretrained_weights(tmp_path: Path) -> None:
    """timm's names with a class token's position and a head, without relative positions."""
    source = build_model(Settings(model="tiny", size=64), 3).backbone.net.state_dict()
    weights = {k: torch.randn_like(v) for k, v in source.items() if "rel_pos" not in k and "coarse" not in k}
    others = {"cls_token": torch.zeros(1, 1, 48), "head.weight": torch.zeros(9, 48)}
    torch.save({"model": weights | others}, tmp_path / "vit.pth")
    settings = Settings(model="tiny", size=64, pretrained=str(tmp_path / "vit.pth"))
    loaded = build_model(settings, 3).backbone.net.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    torch.save({"model": {"norm1.weight": torch.zeros(3)}}, tmp_path / "vit.pth")
    with pytest.raises(ValueError, match="vit.pth does not fit the backbone"):
        build_model(settings, 3)


def test_a_timm_model() -> None:
    net = build_model(Settings(model="vit_tiny_patch16_224", size=64, thresholds=(5.0,)), 3).backbone.net
    assert net.window_size == 14 and net.thresholds == (5.0,) and net.cls_token is None and net.drop_padding


@pytest.fixture
def small_dinov2(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """timm's names stand for small models; returns for each whether its weights were asked for."""
    create, asked = timm.create_model, []

    def create_small(name: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        asked.append(pretrained)
        return create(name, **{"embed_dim": 48, "depth": 2, "num_heads": 3, **options})

    monkeypatch.setattr(timm, "create_model", create_small)
    return asked


DINOV2 = "vit_small_patch14_dinov2"


@pytest.mark.parametrize("pretrained", ["timm", "none.pth"])
def test_patches_that_no_pyramid_takes_are_refused_before_weights_are_loaded(
    pretrained: str, small_dinov2: list[bool]
) -> None:
    with pytest.raises(ValueError, match="patches of 14 pixels: .* with patch_size=16"):
        build_model(Settings(model=DINOV2, size=64, pretrained=pretrained), 3)
    assert small_dinov2 == [False]


def test_dinov2_with_its_patches_resampled(tmp_path: Path, small_dinov2: list[bool]) -> None:
    source = timm_model("dinov2")
    torch.save(dict(source.state_dict()), tmp_path / "dinov2.pth")
    settings = Settings(model=DINOV2, size=64, pretrained=str(tmp_path / "dinov2.pth"), patch_size=16)
    detector = build_model(settings, 3)
    assert torch.equal(detector.backbone.net.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    assert detector.backbone.strides == (4, 8, 16, 32, 64)
    assert not any(small_dinov2)


def test_windowed_blocks() -> None:
    assert windowed_blocks(12) == (0, 1, 3, 4, 6, 7, 9, 10)
    assert windowed_blocks(2) == ()


def test_learning_rates() -> None:
    detector = build_model(Settings(model="tiny", size=64), 3)
    optimizer = make_optimizer(detector, Settings(model="tiny", lr=1.0, lr_decay=0.5))
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == len(list(detector.parameters()))
    net = detector.backbone.net
    expected = (
        (net.pos_embed, 0.125, 0), (net.patch_embed.proj.weight, 0.125, 0.1), (net.blocks[0].attn.rel_pos_h, 0.25, 0.1),
        (net.blocks[1].mlp.fc1.weight, 0.5, 0.1), (net.blocks[1].mlp.fc1.bias, 0.5, 0),
        (detector.rpn.head.cls_logits.weight, 1, 0.1), (detector.backbone.simfp_4[0].weight, 1, 0.1),
        (net.coarse_embed.down.weight, 1, 0.1),
    )  # fmt: skip
    for parameter, rate, decay in expected:
        assert (groups[id(parameter)]["lr"], groups[id(parameter)]["weight_decay"]) == (rate, decay)


def test_schedule() -> None:
    rates = [rate_at(i, warmup=3, iterations=270) for i in (0, 1, 3, 100, 239, 240, 259, 260)]
    assert rates == pytest.approx([0.25, 0.5, 1, 1, 1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("sample", [5000, 1])
def test_cut_off_jpegs_are_named(sample: int, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the training and, beyond the sample that is looked at then, while it reads."""
    root = write_coco(tmp_path / "data")
    for path in sorted((root / "train2017").iterdir()):
        Image.open(path).save(path, "jpeg")
    path.write_bytes(path.read_bytes()[:-30])
    monkeypatch.setattr(coco_picture_sizes, "MOST", sample)
    said = failure(root, *TINY, "--workers", workers, "--iterations", 2, "--out", tmp_path / "out")
    assert f"{path} is a JPEG file that is cut off" in said or "1 of 2 images are JPEG files that are cut off" in said
    assert str(path) in said and ("1 of 2 images" in said) == (sample > 1) and "\n" not in said


def test_an_error_of_the_model_names_its_part_and_the_traceback(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("torchvision.models.detection.rpn.RPNHead.forward", fail)
    said = failure(data, *TINY, "--iterations", 1, "--out", tmp_path)
    assert said.endswith(
        f"the model's rpn.head failed: RuntimeError: out of memory; the full traceback is in {tmp_path / 'errors.log'}"
    )
    assert "in fail" in (tmp_path / "errors.log").read_text() and not list(tmp_path.glob("*.lock"))
