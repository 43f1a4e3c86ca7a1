"""The result of a calibration: text, snippets for each host, a histogram and the photos that keep most tokens."""

import heapq
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from apt_dense import PatchSelector
from apt_dense.drawing import draw_patches
from apt_dense.patches.calibration import FACTORS, Calibration
from apt_dense.patches.image_preparation import denormalise

from calibration.curve_record import PhotoCurve
from calibration.token_curves import Source
from shared.picture_layout import resize_longer_side, side_by_side, stack, text_bar, write_png
from shared.thresholds_for_share import short
from shared.token_counts import choose_patches

WORST = 8  # photos that are drawn
_DRAWN = 480  # pixels of a drawn photo's longer side


class Shares(NamedTuple):
    """Shares of tokens at the chosen thresholds: of all photos, and the photos with the largest; and all tokens."""

    all: np.ndarray
    tokens: list[int]
    worst: list[tuple[float, str]]  # largest first


def shares_at(curves: Iterable[PhotoCurve], factor: float) -> Shares:
    """Read each photo's share off its curve, at the next smaller factor that curves are made for."""
    place = int((factor * (1 + 1e-9) >= FACTORS).sum()) - 1
    shares, tokens, worst = [], [], []
    for curve in curves:
        if curve.patches is None:
            continue
        tokens.append(int(curve.patches[place].sum()))
        shares.append(tokens[-1] / curve.cells)
        heapq.heappush(worst, (float(shares[-1]), curve.path))
        if len(worst) > WORST:
            heapq.heappop(worst)
    return Shares(np.array(shares), tokens, sorted(worst, reverse=True))


def describe(found: Calibration, patch_size: int, drawn: bool = False) -> str:
    """Describe the result in a few lines; of draws of photos if ``drawn``."""
    low, middle, high = found.quantiles
    what = "draws" if drawn else "photos"
    sizes = ", ".join(f"{patch_size << scale} px {share:.0%}" for scale, share in enumerate(found.cells))
    return "\n".join([
        f"thresholds: {' '.join(map(short, found.thresholds))} (those given, times {found.factor:.3f})",
        f"tokens kept: {found.share:.1%} on average over {found.images} {what}; 5 % of them keep at most {low:.1%}, "
        f"half {middle:.1%}, 95 % at most {high:.1%}",
        f"area by patch size: {sizes}",
        f"as many other photos of the same kind: {found.expected[0]:.1%} to {found.expected[1]:.1%} on average, 95 "
        f"times of 100",
    ])  # fmt: skip


def snippets(selector: PatchSelector, share: float) -> str:
    """Return what to write into the configs of each host, in Markdown: thresholds, and the share of tokens to expect,
    from which training should not be far."""
    thresholds = f"({', '.join(map(short, selector.thresholds))},)"
    scorer = "" if selector.scorer == "entropy" else f', scorer="{selector.scorer}"'
    hook = f"TokenDriftHook(expected={share:.3f})"
    blocks = {
        "MMSegmentation, a config": (
            "python",
            f"model = dict(backbone=dict(thresholds={thresholds}{scorer}))\n"
            f'custom_hooks = [dict(type="TokenDriftHook", expected={share:.3f})]',
        ),
        "Detectron2, a lazy config": (
            "python",
            f"model.backbone.net.thresholds = {thresholds}\n"
            + (f'model.backbone.net.scorer = "{selector.scorer}"\n' if scorer else "")
            + f"train.expected_tokens = {share:.3f}",
        ),
        f"Detectron2, a yacs config (and `trainer.register_hooks([{hook}])`)": (
            "yaml",
            f"MODEL:\n  APT:\n    THRESHOLDS: {thresholds}" + (f"\n    SCORER: {selector.scorer}" if scorer else ""),
        ),
        "torchvision and your own code": (
            "python",
            f"APTViT.from_timm(..., thresholds={thresholds}{scorer})",
        ),
        "tools/train_det_torchvision.py": (
            "sh",
            f"--thresholds {' '.join(map(short, selector.thresholds))} --expected-tokens {share:.3f}"
            + (f" --scorer {selector.scorer}" if scorer else ""),
        ),
    }
    note = f"Training then warns once in its log if it keeps a share of tokens more than a tenth away from {share:.1%}."
    return "\n\n".join([note, *(f"{title}:\n\n```{kind}\n{text}\n```" for title, (kind, text) in blocks.items())])


def draw_histogram(path: Path, shares: np.ndarray, found: Calibration) -> None:
    """Draw how many photos keep which share of their tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
    axes.hist(100 * shares, bins=np.linspace(0, 100, 41), color="#4878a8")
    axes.axvline(100 * found.share, color="#b03030", label=f"mean {found.share:.1%}")
    axes.axvline(100 * found.quantiles[2], color="#b03030", linestyle="--", label=f"95 %: {found.quantiles[2]:.1%}")
    axes.set(xlabel="tokens kept, %", ylabel="photos", xlim=(0, 100))
    axes.set_title("thresholds " + " / ".join(map(short, found.thresholds)))
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_worst(path: Path, worst: Sequence[tuple[float, str]], selector: PatchSelector, source: Source) -> None:
    """Draw the photos that keep most tokens, with their patches."""
    drawn = [_draw(share, name, selector, source) for share, name in worst]
    rows = [side_by_side(drawn[first : first + 4], gap=12) for first in range(0, len(drawn), 4)]
    write_png(path, stack(rows, gap=12))


def _draw(share: float, name: str, selector: PatchSelector, source: Source) -> np.ndarray:
    image, _ = source.image(name)
    patches = choose_patches(selector, image)
    picture = denormalise(image, selector.pixel_format)[0].permute(1, 2, 0).byte().numpy()
    drawn = draw_patches(picture, patches.scale_map[0].numpy(), selector.patch_size, max(1, max(picture.shape) // 500))
    drawn = resize_longer_side(drawn, _DRAWN)
    return stack([text_bar(drawn.shape[1], [(f"{Path(name).name}: {share:.0%}", None)]), drawn])
