"""State dicts that reach the backbone inside a detector's: no weight of it is missing without an error."""

from collections.abc import Iterator

from apt_dense.weights.load import LoadReport


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
