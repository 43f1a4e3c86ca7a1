"""The identity check: passes where the backbone is timm's, fails where one number differs, names what is missing."""

from __future__ import annotations

import re
from pathlib import Path

import check_identity
import cv2
import numpy as np
import pytest
import timm
import torch

from identity import model_pairs as pairs

TINY = "vit_tiny_patch16_224"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    cv2.imwrite(str(tmp_path / "photo.png"), np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))
    return tmp_path / "photo.png"


@pytest.fixture(autouse=True)
def _two_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's models with two blocks."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, depth=2, **options))


def check(*arguments: object) -> int | str:
    """The exit status, or the one line that the tool ends with."""
    with pytest.raises(SystemExit) as end:
        check_identity.main([str(argument) for argument in arguments])
    assert "\n" not in str(end.value.code)
    return end.value.code


def lines(output: str) -> dict[str, tuple[float, float]]:
    """Difference and scale by output."""
    found = re.findall(r"^(block \d+)\s+(\S+)\s+(\S+)", output, re.MULTILINE)
    return {name: (float(difference), float(scale)) for name, difference, scale in found}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        (TINY, 64),
        ("deit3_small_patch16_224", 64),
        ("vit_small_patch14_reg4_dinov2", 56),
        ("eva02_tiny_patch14_224", 56),
        ("vit_small_patch16_dinov3", 64),
        ("samvit_base_patch16", 64),
    ],
)
def test_timm_models_pass(name: str, size: int, photo: Path, capsys: pytest.CaptureFixture) -> None:
    assert check(name, "--img-size", size, "--image", photo) == 0
    output = capsys.readouterr().out
    found = lines(output)
    assert list(found) == ["block 0", "block 1"] and output.endswith("PASS\n")
    assert all(difference <= 1e-4 * max(1, scale) and 0.2 < scale < 20 for difference, scale in found.values())


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv.bias", "blocks.1.mlp.fc2.weight", "pos_embed", "norm.bias"])
def test_one_number_that_differs_fails(
    name: str, photo: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of a parameter; of ``qkv.bias``, that is one of the values' biases."""
    load = pairs.load_backbone

    def load_wrongly(model: torch.nn.Module, content: dict) -> None:
        load(model, content)
        with torch.no_grad():
            model.get_parameter(name).flatten()[-1] += 0.5

    monkeypatch.setattr(pairs, "load_backbone", load_wrongly)
    assert check(TINY, "--img-size", 64, "--image", photo) == 1
    output = capsys.readouterr().out
    assert "FAIL: beyond 0.0001 at unit scale" in output
    first = output.split("differs")[0].splitlines()[-1]
    assert first.startswith("block 0" if name in ("blocks.0.attn.qkv.bias", "pos_embed") else "block 1")


LAYER_SCALE = "vit_small_patch14_reg4_dinov2"


@pytest.fixture
def _large_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of real weights: logits so large that float32 alone is off by more than 1e-4, and channels that stand out."""
    fill = pairs.randomise

    def randomise(model: torch.nn.Module, seed: int) -> None:
        fill(model, seed)
        with torch.no_grad():
            for block in model.blocks:
                block.attn.qkv.weight[: 2 * model.embed_dim].mul_(40)
                block.mlp.fc2.bias[7] += 90 / getattr(block.ls2, "gamma", torch.ones(8))[7]

    monkeypatch.setattr(pairs, "randomise", randomise)


@pytest.mark.usefixtures("_large_activations")
@pytest.mark.parametrize(("name", "size"), [(TINY, 224), ("vit_base_patch16_clip_224", 224), (LAYER_SCALE, 224)])
def test_what_float32_cannot_tell_apart_passes(
    name: str, size: int, photo: Path, capsys: pytest.CaptureFixture
) -> None:
    assert check(name, "--img-size", size, "--image", photo) == 0
    output = capsys.readouterr().out
    rounding = [float(line.split()[4]) for line in output.splitlines() if line.startswith("block")]
    assert max(rounding) > 1e-4


@pytest.mark.usefixtures("_large_activations")
@pytest.mark.parametrize("kind", ["LayerScale left out", "one of its factors", "one bias", "activation"])
def test_what_float32_can_tell_apart_fails(kind: str, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = pairs.load_backbone

    def load_wrongly(model: torch.nn.Module, content: dict) -> None:
        load(model, content)
        block = model.blocks[1]
        with torch.no_grad():
            if kind == "LayerScale left out":
                block.ls1.gamma.fill_(1.0)
            elif kind == "one of its factors":
                block.ls1.gamma[3] *= 1.1
            elif kind == "one bias":
                block.mlp.fc2.bias[0] += 0.1
            else:
                block.mlp.act = torch.nn.SiLU()

    monkeypatch.setattr(pairs, "load_backbone", load_wrongly)
    assert check(LAYER_SCALE, "--img-size", 224, "--image", photo) == 1


@pytest.mark.parametrize(
    ("scale", "rounding", "expected"),
    [(0.1, 0, 1e-4), (1, 2e-5, 1e-4), (20, 0, 2e-3), (1.5, 5.8e-4, 2.32e-3), (1, float("nan"), 1e-4)],
)
def test_the_tolerance_grows_with_scale_and_rounding(scale: float, rounding: float, expected: float) -> None:
    assert check_identity.tolerance(scale, rounding) == pytest.approx(expected)


def test_values_that_are_not_finite_fail(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = pairs.randomise

    def with_nan(model: torch.nn.Module, seed: int) -> None:
        fill(model, seed)
        with torch.no_grad():
            model.norm.bias[0] = torch.nan

    monkeypatch.setattr(pairs, "randomise", with_nan)
    assert check(TINY, "--img-size", 64, "--image", photo) == 1


def test_seeds_give_other_weights(photo: Path, capsys: pytest.CaptureFixture) -> None:
    outputs = []
    for seed in (0, 0, 1):
        check(TINY, "--img-size", 32, 64, "--image", photo, "--seed", seed)
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2] and "(1, 3, 32, 64)" in outputs[0]


def test_every_parameter_is_random() -> None:
    model = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=28)
    pairs.randomise(model, 0)
    assert not [name for name, p in model.named_parameters() if p.flatten().unique().numel() < p.numel() / 2]
    assert model.blocks[0].norm1.weight.mean().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_checkpoint_goes_into_both(prefix: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Into timm's by timm's own conversion: EVA-02's own names, of which both make the same."""
    theirs = timm.create_model("eva02_tiny_patch14_224", img_size=56, num_classes=0)
    pairs.randomise(theirs, 5)
    state = theirs.state_dict()
    for ours, names in ((r"([qv])_proj\.bias", r"\1_bias"), ("fc1_g", "w1"), ("fc1_x", "w2"), (r"mlp\.fc2", "mlp.w3")):
        state = {re.sub(ours, names, name): value for name, value in state.items()}
    torch.save({"model": {prefix + name: value for name, value in state.items()}}, tmp_path / "eva.pth")
    arguments = ("eva02_tiny_patch14_224", "--img-size", 56, "--image", photo)
    assert check(*arguments, "--checkpoint", tmp_path / "eva.pth") == 0
    loaded = lines(capsys.readouterr().out)
    assert check(*arguments, "--seed", 5) == 0
    assert lines(capsys.readouterr().out) == loaded


def test_the_photo_is_normalised_as_the_model_expects() -> None:
    photo = np.full((10, 10, 3), (255, 0, 51), np.uint8)
    image = check_identity.prepare(photo, (4, 6), pairs.PixelFormat((127.5,) * 3, (127.5,) * 3, "BGR"))
    assert image.shape == (1, 3, 4, 6)
    torch.testing.assert_close(image[0, :, 0, 0], torch.tensor([-0.6, -1.0, 1.0]))


def test_the_astronaut_is_the_default(capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("skimage")
    assert check(TINY, "--img-size", 32) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vit_tiny_patch16_225"], "has no model 'vit_tiny_patch16_225'; did you mean one of ['vit_tiny_patch16_224'"),
        (["beit_base_patch16_224"], "APTViT does not support the architecture Beit"),
        ([TINY, "--image", "none.jpg"], "none.jpg is not a readable photo"),
        ([TINY, "--checkpoint", "none.pth"], "none.pth does not exist"),
        ([TINY, "--checkpoint", "a.pth", "--pretrained"], "give one of them"),
        ([TINY, "--host", "mmseg"], "--host goes with a config file"),
        ([TINY, "--img-size", "0"], "--img-size takes one or two numbers of pixels, not 0"),
        (["none.py"], "config none.py does not exist"),
    ],
)
def test_errors_are_one_line(arguments: list, message: str, photo: Path) -> None:
    image = [] if "--image" in arguments else ["--image", photo]
    found = check(*arguments, *image)
    assert isinstance(found, str) and found.startswith("check_identity: ") and message in found


def test_checkpoints_that_do_not_fit(photo: Path, tmp_path: Path) -> None:
    state = timm.create_model(TINY, img_size=64, num_classes=0).state_dict()
    del state["blocks.1.norm1.bias"]
    torch.save(state, tmp_path / "x.pth")
    found = check(TINY, "--img-size", 64, "--image", photo, "--checkpoint", tmp_path / "x.pth")
    assert "the checkpoint lacks 1 weights: ['blocks.1.norm1.bias']" in found
    (tmp_path / "x.pth").write_bytes(b"no weights")
    assert "cannot be read as weights" in check(TINY, "--image", photo, "--checkpoint", tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("text", "host"), [("_base_ = 'x.py'", "MMSegmentation"), ("from .common import model", "Detectron2")]
)
def test_hosts_that_are_not_installed(
    text: str, host: str, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.py").write_text(text)
    monkeypatch.setattr(pairs.importlib.util, "find_spec", lambda name: None)
    assert f"{host} is not installed" in check(tmp_path / "config.py", "--image", photo)


@pytest.mark.parametrize("size", [(16 * 2, 16 * 8), (16 * 8, 16 * 2)])
def test_images_of_as_many_patches_as_a_square(size: tuple[int, int], photo: Path) -> None:
    """The model's grid, 2 x 8, is not taken for 4 x 4."""
    assert check(TINY, "--img-size", *size, "--image", photo) == 0
