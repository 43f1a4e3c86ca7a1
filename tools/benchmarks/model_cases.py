"""Cases to build candidates for: models by name, their arguments, the ways ours chooses patches, shared weights."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from apt_dense import APTViT
from apt_dense.hosts.vit_sizes_and_windows import SIZES, WINDOW_SIZE, ViTSize, windowed_blocks
from apt_dense.weights.parameter_rules import COARSE

from benchmarks.measure_in_turns import Variant
from shared.token_counts import choose_patches

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


class Case(NamedTuple):
    """One comparison.

    Args:
        model: "vit-b", "vitdet-b", ...
        images: (B, 3, S, S), normalised by ImageNet's mean and deviation in RGB.
        token_budget: of the variant with a budget; None for no such variant.
        training: whether a training step is measured.
        compiles: whether backbones are compiled, ours and the baselines' (in inference).
    """

    model: str
    images: Tensor
    thresholds: tuple[float, ...]
    token_budget: float | None = None
    training: bool = False
    compiles: bool = False

    @property
    def size(self) -> int:
        """Pixels of an image's side."""
        return self.images.shape[-1]

    @property
    def compiles_now(self) -> bool:
        """Whether backbones are compiled in the step that is measured."""
        return self.compiles and not self.training

    @property
    def is_vitdet(self) -> bool:
        """Whether the model has windows and relative positions."""
        return self.model.startswith("vitdet-")

    @property
    def is_tiny(self) -> bool:
        """Whether this only tries the tool out, with heads as small as the backbone."""
        return self.model.endswith("-test")


_SIZES = {name[0]: SIZES[name] for name in ("small", "base", "large", "huge")} | {"test": ViTSize(32, 4, 2)}
MODELS = tuple(f"{family}-{size}" for family in ("vit", "vitdet") for size in _SIZES)
TINY_CHANNELS = 16  # of the heads of models named "test"
#: Detectron2's positions, which are those of ViTDet's checkpoints.
AS_DETECTRON2 = {
    "pretrain_img_size": 224, "pretrain_use_cls_token": True, "partial_patches": "crop", "pos_antialias": False,
}  # fmt: skip


def model_arguments(model: str) -> dict[str, Any]:
    """Return the arguments of a ViT for "vit-b" (global attention) or "vitdet-b" (windows, relative positions).

    Raises:
        ValueError: for a model that is not in ``MODELS``.
    """
    if model not in MODELS:
        raise ValueError(f"model {model!r} is unknown; expected one of {', '.join(MODELS)}")
    family, _, name = model.partition("-")
    size = _SIZES[name]
    if family == "vit":
        return size._asdict()
    windowed = windowed_blocks(size.depth) or tuple(range(size.depth - 1))  # even the smallest model has some
    return {**size._asdict(), "window_size": WINDOW_SIZE, "window_block_indexes": windowed, "use_rel_pos": True}


def backbone_arguments(case: Case) -> dict[str, Any]:
    """Return the arguments of a detector's or segmentor's backbone; those of windows override the config's."""
    plain = {"window_size": 0, "window_block_indexes": (), "use_rel_pos": False}
    return {**plain, **model_arguments(case.model), "img_size": case.size, "drop_path_rate": 0.0}


def our_variants(case: Case) -> list[tuple[str, str, dict[str, Any]]]:
    """Return name, role and the arguments of APTViT that choose patches; the uniform twin comes first."""
    variants = [
        ("apt_dense, uniform", "twin", {"thresholds": ()}),
        ("apt_dense, adaptive", "ours", {"thresholds": case.thresholds}),
    ]
    if case.token_budget is not None:
        budget = {"thresholds": case.thresholds, "token_budget": case.token_budget}
        variants.append((f"apt_dense, budget {case.token_budget:g}", "ours", budget))
    return variants


def load_weights(model: nn.Module, state: Mapping[str, Tensor], may_lack: Sequence[str] = (COARSE,)) -> None:
    """Load all weights; only parameters whose names hold one of ``may_lack`` may keep their values.

    Raises:
        ValueError: if the names do not agree.
    """
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not any(part in name for part in may_lack)]
    if missing or unexpected:
        raise ValueError(f"weights differ: the state dict lacks {missing[:3]} and has {unexpected[:3]} too many")


def randomise_relative_positions(model: nn.Module) -> None:
    """Draw relative positions at random. They start at zero, which would hide mistakes."""
    for name, parameter in model.named_parameters():
        if "rel_pos" in name:
            nn.init.trunc_normal_(parameter, std=0.02)


def feature_variant(module: nn.Module, run: Callable[[Tensor], Sequence[Tensor]], case: Case, **more: Any) -> Variant:
    """Build a variant whose ``run`` gives feature maps; the training loss is their mean square."""
    module.to(case.images.device).train(case.training)

    def loss() -> Tensor:
        return sum(feature_map.float().square().mean() for feature_map in run(case.images))

    return Variant(module, lambda: run(case.images), loss, **more)


def task_variant(
    model: nn.Module, case: Case, infer: Callable[[], object], losses: Callable[[], Mapping[str, Tensor]],
    net: APTViT | None = None,
) -> Variant:  # fmt: skip
    """Build a variant of a detector or segmentor; ``net`` is its backbone if that is ours."""
    model.to(case.images.device).train(case.training)
    tokens = 1.0 if net is None else choose_patches(net.patches, case.images).tokens_kept
    return Variant(model, infer, lambda: sum(losses().values()), tokens)
