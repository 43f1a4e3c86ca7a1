"""The share of tokens that a run keeps, in MMEngine's logs: ``train/tokens_kept``, ``val/tokens_kept``,
``test/tokens_kept``."""

from mmengine.logging import MessageHub

_SUMS = "apt_dense_tokens"  # not resumed: a validation or test starts from its first image


def log_tokens_kept(share: float, cells: int, training: bool) -> None:
    """Log the share of a forward pass, in training; otherwise the share since the validation or test began, since
    MMEngine logs the last value of such a loop. Outside of the Runner's loops nothing is logged.

    Args:
        share: tokens of a forward pass as a share of its cells.
        cells: their number, by which shares are averaged.
    """
    hub = MessageHub.get_current_instance()
    if training:
        hub.update_scalar("train/tokens_kept", share)
        return
    loop = hub.get_info("loop_stage")
    if loop not in ("val", "test"):
        return
    current = loop, hub.get_info("iter")  # each validation of a training has its own iteration
    before, tokens, total = hub.get_info(_SUMS, (None, 0.0, 0))
    if before != current:
        tokens, total = 0.0, 0
    tokens, total = tokens + share * cells, total + cells
    hub.update_info(_SUMS, (current, tokens, total), resumed=False)
    hub.update_scalar(f"{loop}/tokens_kept", tokens / total, resumed=False)
