"""tools/fit_scorer.py: what is learned from masks and objects, and what the scorer then hides."""

import json
from argparse import Namespace
from collections import Counter
from pathlib import Path

import calibrate
import cv2
import fit_scorer as tool
import numpy as np
import pytest
import torch
from torch import Tensor
from visualize import selector_of

from apt_dense import PatchSelector
from apt_dense.patches.first_block_scores import FirstBlocks, FirstBlockScorer
from apt_dense.patches.learned_scores import USUAL_THRESHOLDS
from apt_dense.patches.scorer_files import load_scorer
from apt_dense.patches.scores import entropy_scores
from apt_dense.weights.files import write_checkpoint

from calibration.coco_objects_as_labels import load_objects
from calibration.learned_scorer_training import LABELS, Fit, other_classes, photo_batches
from calibration.scorer_networks import PADDING, FirstBlocksNetwork, pretrained_weights
from calibration.scorer_report import hidden_by
from evidence.labelled_photos import IGNORED
from evidence.photos_in_memory import LabelledSet
from support.coco_folder import write_coco
from support.scorers import MODEL, random_vit_weights

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own


def naive(mask: np.ndarray, size: int) -> np.ndarray:
    rows, columns = mask.shape[0] // size, mask.shape[1] // size
    shares = np.full((rows, columns), np.nan)
    for row, column in np.ndindex(rows, columns):
        patch = mask[row * size : (row + 1) * size, column * size : (column + 1) * size].ravel()
        counts = Counter(label for label in patch.tolist() if label != IGNORED)
        if counts:
            shares[row, column] = 1 - max(counts.values()) / counts.total()
    return shares


@pytest.mark.parametrize(("rows", "columns", "size"), [(16, 16, 4), (13, 22, 5), (4, 4, 4)])
def test_the_share_of_other_classes(rows: int, columns: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 4, (3, rows, columns), generator=generator)
    masks[masks == 3] = IGNORED
    masks[1, :5] = IGNORED
    masks[2] = IGNORED
    found = other_classes(masks, size)
    for mask, shares in zip(masks, found, strict=True):
        np.testing.assert_allclose(shares.numpy(), naive(mask.numpy(), size), atol=1e-6)
    assert other_classes(masks[2:], size).isnan().all()


def test_what_is_hidden_follows_from_the_order_of_scores() -> None:
    """Four patches that would hide 0, 8, 4 and 0 of 16 pixels, scored 1, 2, 3 and 4."""
    mask = torch.zeros(4, 16, dtype=torch.long)
    mask[:2, 4:8] = 1
    mask[0, 8:12] = 1

    def scorer(pixels: Tensor, patch_size: int, scales: list[int]) -> tuple[Tensor]:
        return (torch.arange(1.0, 5.0).view(1, 1, 4),)

    data = LabelledSet(torch.zeros(1, 3, 4, 16, dtype=torch.uint8), mask[None])
    batches, fit = list(photo_batches(data, False)), Fit(2, 1, (4, 16))
    hidden = [LABELS.of(*batch)(4) for batch in batches]
    shares = hidden_by(scorer, batches, fit, [1.0, 1 - 0.75 / 4, 1 - 0.75 / 2, 1 - 0.75 * 3 / 4, 0.25], hidden)
    assert shares == pytest.approx([0, 0, 8 / 12, 1, 1])


def write_noise(root: Path, count: int) -> None:
    """Squares on a ground of the same noise, bright and dark pixels alike: another colour, the same entropy."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        grey = rng.integers(0, 200, (64, 96))
        mask = np.zeros((64, 96), np.uint8)
        top, left = rng.integers(0, 40), rng.integers(0, 70)
        mask[top : top + 18, left : left + 18] = 1
        photo = np.stack([grey, grey + 55 * mask, grey], 2)
        cv2.imwrite(str(root / "images" / f"{number}.png"), photo)
        cv2.imwrite(str(root / "masks" / f"{number}.png"), mask)


def options(root: Path, *others: str) -> list[str]:
    folders = ["--images", str(root / "images"), "--masks", str(root / "masks")]
    return [*folders, "--size", "64x96", "--patch-size", "4", "--out", str(root / "scorer.safetensors"), *others]


def test_it_learns_what_entropy_does_not_tell(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_noise(tmp_path, 40)
    tool.main(options(tmp_path, "--epochs", "12", "--scales", "1"))
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("| 60%"))
    learned, entropy = (float(cell.strip(" %")) for cell in line.split("|")[2:4])
    assert learned < 15 < entropy, printed
    selector = PatchSelector(patch_size=4, thresholds=(0.05,), scorer=str(tmp_path / "scorer.safetensors"))
    assert 0 <= float(selector.tokens_kept(torch.randn(1, 3, 64, 96))) <= 1


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    write_noise(tmp_path, 21)
    contents = []
    for seed in ("0", "0", "1"):
        tool.main(options(tmp_path, "--epochs", "1", "--scales", "1", "--seed", seed))
        contents.append((tmp_path / "scorer.safetensors").read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_calibrate_goes_on_from_its_thresholds(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Scores are around 0.01, and the threshold of the next scale is a quarter."""
    write_noise(tmp_path, 21)
    tool.main(options(tmp_path, "--epochs", "3"))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| 60%"))
    printed = line.split("|")[4].split()
    first, second = map(float, printed)
    assert first / second == pytest.approx(4, rel=2e-3)
    photos = [str(tmp_path / "images" / f"{number}.png") for number in (5, 15)]  # those held out
    patches = ["--patch-size", "4", "--scorer", str(tmp_path / "scorer.safetensors"), "--thresholds", *printed]
    calibrate.main([*photos, *patches, "--tokens", "0.6", "--workers", "0", "--out", str(tmp_path / "calibrated")])
    found = json.loads((tmp_path / "calibrated" / "thresholds.json").read_text())
    assert found["share"] == pytest.approx(0.6, abs=0.02) and found["factor"] == pytest.approx(1, rel=0.1)
    assert found["thresholds"] == pytest.approx([first * found["factor"], second * found["factor"]], rel=2e-3)


def test_files_have_their_own_usual_thresholds(tmp_path: Path) -> None:
    write_noise(tmp_path, 21)
    tool.main(options(tmp_path, "--epochs", "1"))
    given = Namespace(thresholds=None, scorer=str(tmp_path / "scorer.safetensors"), patch_size=None)
    assert selector_of(given, None).thresholds == USUAL_THRESHOLDS == (0.02, 0.005)


def test_objects_are_numbered_and_boxes_serve_where_there_are_no_masks(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "coco", images=3)
    with_masks = load_objects(data, 64, None, torch.device("cpu"))
    assert with_masks.photos.shape == (3, 3, 64, 64)
    for mask in with_masks.masks:
        numbers = set(mask.unique().tolist())
        assert {0, 1} <= numbers and max(numbers - {IGNORED}) <= 24
    assert entropy_scores(with_masks.photos.float(), 4, [1])[0].shape == (3, 8, 8)


def test_photos_in_corners_are_looked_at_alone(tmp_path: Path) -> None:
    data = load_objects(write_coco(tmp_path / "coco", images=3), 64, None, torch.device("cpu"))
    found = list(photo_batches(data, in_corners=True))
    assert [batch.photos.shape for batch in found] == [(1, 3, 48, 64)] * 3
    assert all((batch.masks != IGNORED).all() for batch in found)
    assert (data.photos[:, :, 48:] == torch.tensor(PADDING)[:, None, None]).all()
    assert [len(batch.masks) for batch in photo_batches(data, in_corners=False)] == [3]


def test_shares_that_cannot_be_reached_stay_empty(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """20 x 20 pixels are 25 patches of 4; merging all that fit leaves 13."""
    write_noise(tmp_path, 21)
    tool.main([*options(tmp_path, "--epochs", "1", "--scales", "1"), "--size", "20x20"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [bool(line.split("|")[4].strip()) for line in lines[2:]] == [True, True, False]


def test_first_blocks_of_a_vit_learn_it_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_noise(tmp_path, 40)
    weights = tmp_path / "vit.pth"
    write_checkpoint(random_vit_weights(), weights)
    tool.main(options(tmp_path, "--epochs", "10", "--model", MODEL, "--weights", str(weights), "--blocks", "2"))
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("| 60%"))
    learned, entropy = (float(cell.strip(" %")) for cell in line.split("|")[2:4])
    assert learned < entropy - 10, printed
    scorer = load_scorer(tmp_path / "scorer.safetensors", (124, 116, 104))
    assert isinstance(scorer, FirstBlockScorer) and "vit.blocks.2.norm1.weight" not in scorer.weights
    start = random_vit_weights()
    assert not torch.equal(scorer.weights["vit.blocks.0.attn.qkv.weight"], start["blocks.0.attn.qkv.weight"])
    torch.testing.assert_close(scorer.weights["vit.pos_embed"], start["pos_embed"], atol=0.1, rtol=0)


@pytest.mark.parametrize(
    "model",
    [
        "test_vit2", "test_vit3", "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2",
        "vit_base_patch16_clip_quickgelu_224", "vit_base_patch16_siglip_224", "deit3_small_patch16_224",
        "vit_little_patch16_reg4_gap_256",
    ],
)  # fmt: skip
def test_families_of_plain_vits_serve(tmp_path: Path, model: str) -> None:
    """Also those with other tokens, norms or poolings."""
    state = random_vit_weights(model)
    write_checkpoint(state, tmp_path / "vit.safetensors")
    network = FirstBlocksNetwork(FirstBlocks(model, 1), pretrained_weights(model, tmp_path / "vit.safetensors"))
    for name, value in network.blocks.state_dict().items():
        torch.testing.assert_close(value, state[name.removeprefix("vit.")], atol=0, rtol=0)
    assert network(torch.rand(1, 3, 32, 48) * 255, 16).shape == (1, 2, 3)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--out", "scorer.pth"], "expected a name that ends in .safetensors"),
        (["--scales", "5"], "holds no patch of 128 pixels"),
        (["--coco", "data"], "give --images or --coco, and not both"),
        (["--weights", "vit.pth"], "--weights vit.pth: give --model, whose they are"),
        (["--blocks", "2"], "--blocks 2: give --model, whose they are"),
        (["--model", "nothing", "--weights", "vit.pth"], "timm has no model 'nothing'"),
        (["--model", MODEL, "--weights", "vit.pth", "--blocks", "7"], "first 7 blocks of test_vit: expected 1 to 6"),
        (["--model", MODEL, "--weights", "missing.pth"], "missing.pth does not exist"),
        (["--limit", "10"], "10 photos to learn from: expected 20 or more"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_learned_from_is_named(tmp_path: Path, changed: list[str], words: str) -> None:
    write_noise(tmp_path, 21)
    with pytest.raises(SystemExit, match=words):
        tool.main(options(tmp_path, *changed))
