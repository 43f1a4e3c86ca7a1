"""State dicts that reach the backbone inside a detector's: names of other ViTs find their places, and none is missing
without an error."""

from collections.abc import Iterator

from torch import Tensor, nn

from apt_dense.checkpoint_names import is_table
from apt_dense.checkpoints import LoadReport, fit_state
from apt_dense.conversions import to_apt


def convert_below(model: nn.Module, state: dict[str, Tensor], prefix: str) -> LoadReport:
    """Convert the entries of ``state`` below ``prefix``, in place, to those of an ``APTViT``: our names, positions
    resampled, tables of rotary positions taken out. What has no place stays, with our name.

    Raises:
        ValueError: for a weight whose shape does not fit; ``state`` is as it was.
    """
    below = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    ours = to_apt(below)
    fitted, report = fit_state(ours, model)
    for name in below:
        del state[prefix + name]
    left = {name: ours[name] for name in report.unused + report.unexpected if not is_table(name, ours[name])}
    state.update({prefix + name: value for name, value in {**left, **fitted}.items()})
    return report


def errors_of(report: LoadReport, prefix: str) -> Iterator[str]:
    """What Detectron2 would only warn of: weights of the backbone that are missing or unknown."""
    where, remedy = prefix.removesuffix("."), "or set strict_loading=False on the backbone"
    if not report.loaded:
        yield (
            f"no weight of the checkpoint belongs to {where}, which would stay random. Files of a bare backbone need "
            f"FILE?matching_heuristics=True, or tools/convert_checkpoint.py --to detectron2; {remedy}"
        )
    elif report.missing or report.unexpected:
        yield (
            f"the checkpoint does not fit {where}: {report.summary()}. Detectron2 has taken out weights of another "
            f"shape before. Use the config of the checkpoint, {remedy}"
        )
