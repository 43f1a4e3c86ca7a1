"""Layer-wise decay of the learning rate in Detectron2's configs."""

from apt_dense.weights.parameter_rules import inner_name, lr_scale


def get_apt_lr_decay_rate(name: str, lr_decay_rate: float = 1.0, num_layers: int = 12) -> float:
    """The share of the learning rate for a parameter of a detector.

    A drop-in for Detectron2's ``get_vit_lr_decay_rate`` as ``optimizer.params.lr_factor_func``, with the same values
    for all parameters of its ViT. The embedding gets lr_decay_rate**(num_layers + 1), block i
    lr_decay_rate**(num_layers - i), and everything else the full rate: heads, pyramid, convolutional residuals, and
    parameters that no checkpoint of a plain ViT holds. The rule is ``apt_dense.weights.parameter_rules``.

    Raises:
        ValueError: if the block is not one of ``num_layers`` blocks; its rate would exceed the full one.
    """
    return lr_scale(inner_name(name), num_layers, lr_decay_rate)
