"""--dry-run of all trainers: parameter groups, tokens and memory, and nothing trained or kept."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmseg", reason="runs the tools of all hosts")

from apt_dense import APTViT
from apt_dense.hosts.token_counts import read_counts
from apt_dense.hosts.torchvision import build_detector

from shared.dry_run import Trial, describe_groups, describe_trial
from support import coco_folder
from support.tiny_trainings import NAMES, Job, jobs, one_thread  # noqa: F401 (fixtures)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]  # warnings: the hosts' own


def trial_of(**options: object) -> Trial:
    """A ViT that trains on images of 16 cells, flat ones but for the first."""
    torch.manual_seed(0)
    model = APTViT(img_size=64, embed_dim=256, depth=2, num_heads=2, thresholds=(5.5, 4.0))
    model.patch_embed.requires_grad_(False)
    images = iter([torch.rand(1, 3, 64, 64) * 4 - 2, *torch.zeros(3, 1, 3, 64, 64)])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": trained[:2], "lr": 0.1}, {"params": trained[2:], "weight_decay": 0.5}]
    optimizer = torch.optim.AdamW(groups, lr=0.2, weight_decay=0.0)
    return Trial(model, optimizer, lambda: model(next(images))[0].square().mean(), 1)._replace(**options)


def numbers(text: str, pattern: str) -> list[float]:
    return [float(found.replace(",", "")) for found in re.search(pattern, text).groups()]


def test_groups_are_listed_with_rates_and_what_is_frozen() -> None:
    trial = trial_of()
    lines = describe_groups(trial.model, trial.optimizer).splitlines()
    first = sum(parameter.numel() for parameter in trial.optimizer.param_groups[0]["params"])
    assert lines[2].startswith(f"| 0 | 0.1 | 0 | {first:,} | 2: ") and lines[3].startswith("| 1 | 0.2 | 0.5 | ")
    frozen = sum(parameter.numel() for parameter in trial.model.patch_embed.parameters())
    total = sum(parameter.numel() for parameter in trial.model.parameters())
    assert lines[-1] == f"{total - frozen:,} parameters are trained, {frozen:,} are frozen."


def test_tokens_are_those_of_some_batches_or_counted() -> None:
    text = describe_trial(trial_of(processes=4, accumulate=3))
    assert (
        "5 per image, 5 per batch of 1 of a process, 57 per step of 4 x 3 such batches" in text
    )  # (16 + 1 + 1 + 1) / 4
    assert "4 batches, of 1 to 16" in text
    counted = describe_trial(trial_of(images=2, tokens=[10, 30, 20]))
    assert "20 per image, 40 per batch of 2 of a process, 40 per step" in counted and "3 counted images" in counted


def test_a_training_shorter_than_the_trial_is_described() -> None:
    trial = trial_of()
    images = iter([torch.zeros(1, 3, 64, 64)])
    assert "1 batches, of 1 to 1" in describe_trial(
        trial._replace(loss=lambda: trial.model(next(images))[0].square().mean())
    )


def test_memory_is_that_of_weights_moments_gradients_and_activations() -> None:
    trial = trial_of(processes=2)
    trained = sum(p.numel() for p in trial.model.parameters() if p.requires_grad) * 4 / 2**20
    whole = sum(p.numel() for p in trial.model.parameters()) * 4 / 2**20
    text = describe_trial(trial)
    pattern = r"process: (\S+) MiB .* weights (\S+), optimizer (\S+), .* gradients (\S+) at .* buckets (\S+);"
    total, weights, moments, peak, buckets = numbers(text, pattern)
    assert weights == pytest.approx(whole, abs=0.51) and moments == pytest.approx(2 * trained, abs=0.51)
    assert buckets == pytest.approx(trained, abs=0.51) and trained < peak < 4 * trained + 10
    assert total == pytest.approx(weights + moments + peak + buckets, abs=2.1)


@pytest.mark.parametrize("name", NAMES)
def test_trainers_describe_and_keep_nothing(
    name: str, jobs: dict[str, Job], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(build_detector.PRESETS, "tiny", coco_folder.TINY_PRESET)
    job, out, counts = jobs[name], tmp_path / "out", tmp_path / "tokens.json"
    balance = [] if name == "torchvision" else ["--balance", str(counts)]
    more = ["--dry-run", "4"] if name == "seg" else ["--dry-run"]
    argv = job.argv(out, False)
    job.main([*more, *balance, *argv] if name == "det" else [*argv, *balance, *more])
    said = capsys.readouterr().out
    assert "| group | learning rate | weight decay |" in said and "backbone" in said
    assert numbers(said, r"([\d,]+) parameters are trained, ([\d,]+) are frozen")[0] > 50_000
    assert "Memory expected per process" in said and [path.name for path in tmp_path.iterdir()] == ["tokens.json"] * (
        name != "torchvision"
    )
    if name == "seg":
        assert "per step of 4 x 1 such batches" in said
    if name != "torchvision":
        tokens, _ = read_counts(counts)
        assert f"Tokens expected: {sum(tokens) / len(tokens):.0f} per image" in said


@pytest.mark.parametrize("name", [*NAMES[:2]])
def test_a_file_of_something_else_is_named_in_one_line(name: str, jobs: dict[str, Job], tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    argv, more = jobs[name].argv(tmp_path / "out", False), ["--balance", str(tmp_path / "x.json")]
    with pytest.raises(SystemExit, match=r"train_\w+: .*x.json is not a file of token counts"):
        jobs[name].main([*more, *argv] if name == "det" else [*argv, *more])
