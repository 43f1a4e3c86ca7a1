"""The benchmark: figures of functions whose answer is known, ratios, files, and each scope on the smallest model."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.references import normalise

for package in ("skimage", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason="the benchmark needs it")

import benchmark
import benchmark_kernels

from apt_dense import APTViT
from apt_dense.layout.packed import build_layout
from apt_dense.nn.relative import relative_bias_of_queries
from apt_dense.ops.attention import packed_attention
from apt_dense.ops.bias import RelativeBias
from apt_dense.ops.kernels import cpu_sliced
from apt_dense.ops.kernels.interface import Inputs

from benchmarks import detectors, segmentors
from benchmarks.backbones import backbone_candidates, build_backbone
from benchmarks.cheap_rivals import cheap_rivals
from benchmarks.measure_in_turns import Candidate, Result, Variant, Way, measure
from benchmarks.meters import gflops_of, memory_of, share_outside
from benchmarks.model_cases import Case
from benchmarks.photos import photos
from benchmarks.plot import plot
from benchmarks.table import Row, Setting, read_csv, rows_of, table, write_csv

CPU = torch.device("cpu")
SETTING = Setting("backbone", "vit-test", "inference", 64, 2, "float32", "thresholds 5.5 4", "here")
MIB = 2**18  # float32 numbers


# ---- measures --------------------------------------------------------------------------------------------------------


def three_at_once() -> None:
    first = torch.ones(MIB)
    second = first + 1
    third = first + second
    del first, second
    third * 1  # two are held


@pytest.mark.parametrize(("action", "expected"), [(three_at_once, 3), (lambda: torch.ones(MIB) + 1, 2)])
def test_memory_is_the_peak_and_the_same_each_time(action: Callable[[], object], expected: float) -> None:
    found = {memory_of(action, CPU) for _ in range(3)}
    assert len(found) == 1 and found.pop() == pytest.approx(expected, abs=0.01)


def test_memory_of_a_backward_pass_counts_gradients_and_not_what_was_there() -> None:
    weight = torch.ones(MIB, requires_grad=True)
    # The result of exp is kept for its gradient.
    assert memory_of(lambda: weight.exp().sum().backward(), CPU) == pytest.approx(2, abs=0.01)


def test_fused_attention_is_counted_with_its_backward() -> None:
    q = torch.randn(2, 3, 40, 8, requires_grad=True)
    product = 2 * 2 * 3 * 40 * 40 * 8  # one of two in the forward pass and of five in the backward pass
    assert gflops_of(lambda: F.scaled_dot_product_attention(q, q, q)) * 1e9 == pytest.approx(2 * product)
    assert gflops_of(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward()) * 1e9 == pytest.approx(
        7 * product
    )


def test_slices_of_attention_are_counted_as_fused_attention_is() -> None:
    q = torch.randn(1024, 3, 8, requires_grad=True)  # a number of rows that is not filled up
    segments = build_layout(torch.zeros(1, 1, 1024), 1).images
    run = partial(packed_attention, Inputs(q, q, q, segments), "rows")
    assert gflops_of(lambda: run()) * 1e9 == pytest.approx(2 * 2 * 3 * 1024**2 * 8)
    assert gflops_of(lambda: run().sum().backward()) * 1e9 == pytest.approx(7 * 2 * 3 * 1024**2 * 8)


def test_attention_backends_have_about_the_same_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bias is a lookup in one, a product in another, further channels in the third: little next to 512 channels."""
    model, images = APTViT(img_size=96, thresholds=(5.5, 4.0), embed_dim=16, depth=1, num_heads=1), photos(96, 2)
    layout = model.layout(images, model.partition(images))
    q, k, v = (torch.randn(layout.images.total, 1, 512) for _ in range(3))
    tables = (torch.randn(11, 512) for _ in "hw")
    bias = RelativeBias(relative_bias_of_queries(q, *tables, layout.image_cells, layout), layout.image_cells)

    monkeypatch.setattr(cpu_sliced, "whole_rows", lambda count: count)  # without filling up

    def count(backend: str) -> float:
        return gflops_of(lambda: packed_attention(Inputs(q, k, v, layout.images, bias), backend))

    rows, mask, sdpa = (count(backend) for backend in ("rows", "mask", "sdpa"))
    assert rows * 1e9 == pytest.approx(sum(2 * 2 * n**2 * 512 for n in layout.images.offsets.diff().tolist()), rel=0.03)
    assert mask == pytest.approx(rows, rel=0.04) and sdpa == pytest.approx(rows, rel=0.04)


class Waits(nn.Module):
    def forward(self, seconds: float) -> None:
        time.sleep(seconds)


def test_the_share_outside_of_blocks() -> None:
    inside, outside = Waits(), Waits()
    assert share_outside([inside], lambda: (inside(0.03), outside(0.01)), CPU) == pytest.approx(0.25, abs=0.1)
    assert not inside._forward_hooks and not inside._forward_pre_hooks


def candidate(name: str, role: str, run: Callable[[], object]) -> Candidate:
    return Candidate(name, role, lambda: Variant(nn.Linear(1, 1), run, lambda: torch.zeros(())))


def test_one_that_fails_says_so_and_the_others_go_on() -> None:
    calls: list[str] = []

    def out_of_memory() -> None:
        calls.append("fails")
        if len(calls) > 3:
            raise torch.OutOfMemoryError("tried to allocate\nmuch")

    def not_installed() -> Variant:
        raise ModuleNotFoundError("No module named 'x'")

    candidates = [
        candidate("works", "twin", lambda: calls.append("works")),
        candidate("fails", "ours", out_of_memory),
        Candidate("missing", "timm", not_installed),
    ]
    results = measure(candidates, Way("inference", CPU, torch.float32), rounds=4, label="test")
    works, fails, missing = rows_of(SETTING, results, (5.5, 4.0))
    assert calls[:4] == ["works", "fails", "works", "fails"] and len(results[0].seconds) == 4
    assert works.of_twin == 1 and works.note == "" and works.of_timm is None
    assert (fails.seconds, fails.note) == (None, "OutOfMemoryError: tried to allocate")
    assert missing.note == "ModuleNotFoundError: No module named 'x'"
    assert "OutOfMemoryError" in table([works, fails, missing])


# ---- rows ------------------------------------------------------------------------------------------------------------


def made_up_rows() -> list[Row]:
    return rows_of(SETTING, [
        Result("uniform", "twin", [5.0, 4.0, 3.0], 1.0, gflops=10.0, memory_mib=50.0),
        Result("adaptive", "ours", [2.0, 9.0, 1.0], 0.6, gflops=4.0, memory_mib=40.0, outside_blocks=0.1),
        Result("timm", "timm", [6.0, 6.0, 6.0], 1.0, gflops=10.0, memory_mib=100.0),
        Result("MMSeg", "mmseg", [8.0, 8.0, 8.0], 1.0, gflops=10.0, memory_mib=200.0),
    ], (5.5, 4.0))  # fmt: skip


def test_ratios_of_made_up_times() -> None:
    uniform, adaptive, timm, mmseg = made_up_rows()
    assert (adaptive.seconds, adaptive.fastest, adaptive.slowest) == (2.0, 1.0, 9.0)
    assert (adaptive.of_twin, adaptive.of_timm, adaptive.of_mmseg, adaptive.of_detectron2) == (2.0, 3.0, 4.0, None)
    assert adaptive.efficiency == pytest.approx(2.0 / 2.5) and adaptive.memory_of_twin == 0.8
    assert (uniform.of_twin, uniform.efficiency, timm.of_timm, mmseg.of_timm) == (1.0, 1.0, 1.0, 0.75)
    assert (adaptive.thresholds, uniform.thresholds, adaptive.environment) == ("5.5 4", "", "here")


def test_the_table_names_its_baselines_and_leaves_empty_columns_out() -> None:
    lines = table(made_up_rows()).splitlines()
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert {"x timm", "x MMSeg", "x twin", "memory/twin", "outside blocks %", "environment"} <= set(header)
    assert "x Detectron2" not in header and "note" not in header
    adaptive = dict(zip(header, (cell.strip() for cell in lines[3].strip("|").split("|")), strict=True))
    assert adaptive["median s (spread)"] == "2 (1-9)" and adaptive["x timm"] == "3.00"
    assert (adaptive["tokens"], adaptive["outside blocks %"], adaptive["environment"]) == ("60%", "10.0%", "here")
    assert {line.count("|") for line in lines} == {len(header) + 1}


def test_csv_holds_the_rows(tmp_path: Path) -> None:
    rows = made_up_rows()
    write_csv(rows, tmp_path / "rows.csv")
    assert read_csv(tmp_path / "rows.csv") == rows and [p.name for p in tmp_path.iterdir()] == ["rows.csv"]
    (tmp_path / "rows.csv").write_text("variant,seconds\n")
    with pytest.raises(ValueError, match="expected .*'variant', 'scope'"):
        read_csv(tmp_path / "rows.csv")


def test_a_plot_needs_something_measured(tmp_path: Path) -> None:
    rows = [row._replace(size=size) for row in made_up_rows() for size in (512, 1024)]
    plot([*rows, rows[0]._replace(seconds=None, note="failed")], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing was measured"):
        plot([row._replace(seconds=None) for row in rows], tmp_path / "plot.png")


# ---- runs ------------------------------------------------------------------------------------------------------------


def options(*arguments: str) -> list[str]:
    return ["--model", "vit-test", "--sizes", "64", "--rounds", "1", "--device", "cpu", *arguments]


def test_a_run_writes_rows_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, picture = tmp_path / "rows.csv", tmp_path / "plot.png"
    steps = ("--steps", "inference", "training", "--budget", "0.6", "--keep", "0.7")
    benchmark.main(options(*steps, "--csv", str(path), "--plot", str(picture)))
    rows = read_csv(path)
    assert [row.variant for row in rows[:6]] == [
        "apt_dense, uniform", "apt_dense, adaptive", "apt_dense, budget 0.6",
        "uniform, smaller image (48 pixels, patches of 16)", "uniform, larger patches (96 pixels, patches of 32)",
        "timm, fused attention",
    ]  # fmt: skip
    ours, timm = rows[:3], rows[5]
    assert all(row.seconds and row.gflops and row.memory_mib for row in (*ours, timm))
    assert ours[0].tokens == 1 and all(0 < row.tokens < 1 for row in ours[1:])
    assert all(0 < row.outside_blocks < 1 for row in ours) and timm.outside_blocks is None
    assert timm.of_timm == 1 and timm.gflops == pytest.approx(ours[0].gflops, rel=0.01)
    assert {row.step for row in rows} == {"inference", "training"} and "torch" in rows[0].environment
    assert rows[-1].gflops > 2 * timm.gflops and not any(row.outside_blocks for row in rows if row.step == "training")
    assert capsys.readouterr().out.count("apt_dense, uniform") == 2 and picture.is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plot.png", "rows.csv"]


def test_resume_measures_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, partial = tmp_path / "rows.csv", tmp_path / "rows.csv.partial"
    measured: list[tuple[int, str]] = []

    def compare(setting: Setting, _: object) -> list[Row]:
        if setting.size == 96 and len(measured) < 2:
            raise KeyboardInterrupt
        measured.append((setting.size, setting.options))
        return [Row(variant="uniform", seconds=1.0, fastest=1.0, slowest=1.0, **setting._asdict())]

    monkeypatch.setattr(benchmark, "compare", compare)
    sizes = options("--sizes", "64", "80", "96", "--csv", str(path))
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(options("--sizes", "64", "96", "--csv", str(path)))
    assert [row.size for row in read_csv(partial)] == [64] and not path.exists()
    with pytest.raises(SystemExit, match="pass --resume"):
        benchmark.main(sizes)
    benchmark.main([*sizes, "--resume"])
    assert [size for size, _ in measured] == [64, 80, 96] and [row.size for row in read_csv(path)] == [64, 80, 96]
    assert not partial.exists()
    benchmark.main([*sizes, "--resume"])
    assert len(measured) == 3
    benchmark.main([*sizes, "--resume", "--keep", "0.5"])  # other options are other settings
    assert len(measured) == 6 and len(read_csv(path)) == 6


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "vit-x"], "'vit-x' is unknown; expected one of vit-s, vit-b"),
        (["--sizes", "100"], r"\[100\].*multiples of 16"),
        (["--sizes", "0"], "multiples of 16"),
        (["--rounds", "0"], "--rounds 0"),
        (["--batches", "2", "0"], "--batches 0"),
        (["--keep", "1.5"], "--keep 1.5"),
        (["--keep", "0.01"], "a share of 0.01 of the tokens cannot be reached"),
        (["--budget", "0"], "--budget 0"),
        (["--compile", "--scope", "pyramid"], "--compile is for"),
        (["--resume"], "--resume needs --csv"),
    ],
)
def test_bad_options_are_named(arguments: list[str], named: str) -> None:
    with pytest.raises(SystemExit, match=named):
        benchmark.main(options(*arguments))


def variants_of(candidates: list[Candidate]) -> list[Variant]:
    return [candidate.build() for candidate in candidates]


def case(model: str, size: int = 64, batch: int = 1, training: bool = False) -> Case:
    images = normalise(torch.randint(0, 256, (batch, 3, size, size)))
    return Case(model, images, (5.5, 4.0), 0.6, training)


def outputs_agree(candidates: list[Candidate], roles: tuple[str, ...]) -> None:
    """Noise keeps every patch without a budget, so that all of these have the same values."""
    with torch.no_grad():
        found = [c.build().infer() for c in candidates if c.role in roles]
    first, *others = (value[-1] if isinstance(value, (list, tuple)) else value for value in found)
    assert others and all(torch.allclose(as_map(first), as_map(other), atol=1e-4) for other in others)


def as_map(output: Tensor) -> Tensor:
    """Tokens (B, N, C) or a feature map (B, C, h, w) -> (B, C, N)."""
    return output.transpose(1, 2) if output.ndim == 3 else output.flatten(2)


def test_timm_has_the_twin_s_values() -> None:
    outputs_agree(backbone_candidates(case("vit-test")), ("twin", "timm"))


def test_mmseg_has_the_twin_s_values() -> None:
    pytest.importorskip("mmseg", reason="MMSegmentation is not installed")
    outputs_agree(backbone_candidates(case("vit-test")), ("twin", "mmseg"))
    for head in segmentors.HEADS:
        outputs_agree(segmentors.segmentor_candidates(case("vit-test"), head), ("twin", "mmseg"))


def test_detectron2_has_the_twin_s_values() -> None:
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    for scope in ("backbone", "pyramid"):
        outputs_agree(benchmark.SCOPES[scope](case("vitdet-test", 96)), ("twin", "detectron2"))


def run_both_steps(candidates: Callable[[Case], list[Candidate]], model: str, variants: int) -> None:
    for step, batch in (("inference", 1), ("training", 1)):
        built = candidates(Case(model, photos(64, batch), (5.5, 4.0), 0.6, step == "training"))
        results = measure(built, Way(step, CPU, torch.float32), rounds=1, label=step)
        assert len(results) == variants and not any(result.failure for result in results)
        assert all(result.seconds and result.gflops and result.memory_mib for result in results)
        assert results[0].tokens == 1 and results[2].tokens < 1


def test_pyramids_run() -> None:
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    run_both_steps(benchmark.SCOPES["pyramid"], "vitdet-test", 4)


def test_torchvision_s_detector_runs() -> None:
    run_both_steps(detectors.torchvision_candidates, "vitdet-test", 3)


def test_detectron2_s_detector_runs() -> None:
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    run_both_steps(detectors.detector_candidates, "vitdet-test", 4)


def test_detectors_find_objects() -> None:
    """Else the masks would cost nothing."""
    (found,) = detectors.torchvision_candidates(case("vit-test", 96))[0].build().infer()
    assert len(found["boxes"]) == len(found["masks"]) > 5


@pytest.mark.parametrize("scope", ["segmentor", "linear"])
@pytest.mark.parametrize(("model", "variants"), [("vit-test", 6), ("vitdet-test", 5)])
def test_segmentors_run(scope: str, model: str, variants: int) -> None:
    pytest.importorskip("mmseg", reason="MMSegmentation is not installed")
    run_both_steps(benchmark.SCOPES[scope], model, variants)


@pytest.mark.parametrize("size", [64, 96, 160])
def test_cheap_rivals_see_as_many_tokens_as_ours(size: int) -> None:
    pytest.importorskip("skimage")
    own = Case("vit-test", photos(size, 2), (5.5, 4.0))
    share = backbone_candidates(own)[1].build().tokens
    grid = (size // 16) ** 2
    for rival in cheap_rivals(own):
        cells = rival.case.size // rival.patch_size
        model = build_backbone(rival.case, patch_size=rival.patch_size)
        (out,) = model(rival.case.images)
        assert out.shape[-2:] == (cells, cells) and rival.tokens == cells**2 / grid
        assert abs(cells - (share * grid) ** 0.5) <= 0.5 and rival.case.thresholds == ()


def test_baselines_can_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("skimage")
    benchmark.main(["--model", "vit-test", "--sizes", "64", "--rounds", "1", "--skip", "mmseg", "--dtype", "bfloat16"])
    printed = capsys.readouterr().out
    assert "timm, fused attention" in printed and "| MMSegmentation" not in printed and "bfloat16" in printed


def test_kernels_are_compared_with_pytorchs(capsys: pytest.CaptureFixture) -> None:
    benchmark_kernels.main(["--rows", "50", "--dim", "16", "--heads", "2", "--rounds", "1", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    measured = [line for line in lines if line.endswith("| |") and "ms" not in line]
    assert len(measured) == 2 * (2 + 2 * 5)  # linear layers, fused attention and four backends, each step
    assert all("not cuda" in line for line in lines if "varlen" in line)


def test_kernels_refuse_what_cannot_be_cut_into_heads() -> None:
    with pytest.raises(SystemExit, match="multiple of --heads"):
        benchmark_kernels.main(["--dim", "10", "--heads", "4"])
