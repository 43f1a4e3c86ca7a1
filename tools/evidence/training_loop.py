"""A training of a model with a pretrained backbone: AdamW, a linear warm-up and a linear decay."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from apt_dense import APTViT
from apt_dense.weights.parameter_rules import is_new

from evidence.photos_in_memory import epochs_of
from evidence.training_variants import Variant
from evidence.variant_backbones import Plan

_WARM_UP = 0.05  # of the steps
Loss = Callable[[Tensor, torch.Generator], Tensor]


def train(
    model: nn.Module, backbone: nn.Module, loss_of: Loss, count: int, plan: Plan, variant: Variant, seed: int,
    note: Callable[[Tensor], None],
) -> float | None:  # fmt: skip
    """Train in place, with AdamW, a linear warm-up and a linear decay to zero.

    Args:
        backbone: the part of the model that is pretrained.
        loss_of: numbers of photos, and what draws views of them -> the loss.
        count: photos.
        note: called with the loss of each step, on the device.

    Returns:
        Seconds of a step; None if there were none.

    Raises:
        ValueError: if there are too few photos for a step.
    """
    generator, device = torch.Generator().manual_seed(seed), next(model.parameters()).device
    epochs = plan.epochs if variant.epochs is None else variant.epochs
    rate, steps = plan.rate * variant.rate, round(count // plan.batch * epochs)
    if epochs and not steps:
        raise ValueError(f"row {variant.name!r}: {epochs} epochs of {count} photos make no step of {plan.batch} photos")
    groups = parameter_groups(model, backbone, rate, plan.rate * plan.new_rate, rate * plan.backbone_rate)
    optimizer = _optimizer(groups, plan, device)
    warm_up = max(1, round(steps * _WARM_UP))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )
    model.train()
    start = time.perf_counter()
    batches = islice(epochs_of(count, plan.batch, math.ceil(epochs), generator), steps)
    for numbers in tqdm(batches, variant.name, steps, leave=False):
        note(_update(optimizer, loss_of(numbers, generator)))
        schedule.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / steps if steps else None


def _optimizer(groups: list[dict[str, Any]], plan: Plan, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, weight_decay=plan.weight_decay, fused=device.type == "cuda")


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def repeated_step(model: nn.Module, backbone: nn.Module, loss_of: Loss, count: int, plan: Plan) -> Callable[[], int]:
    """Make a function that trains a model for one step, to be timed, and returns the number of its photos. They are the
    same in each call, and so is all that is drawn at random; rates are zero: all calls ask for the same work."""
    optimizer = _optimizer(parameter_groups(model, backbone, 0.0, 0.0, 0.0), plan, next(model.parameters()).device)
    model.train()

    def step() -> int:
        torch.manual_seed(0)  # of dropped paths, and of proposals that are trained on
        generator = torch.Generator().manual_seed(0)
        numbers = next(epochs_of(count, plan.batch, 1, generator))
        _update(optimizer, loss_of(numbers, generator))
        return len(numbers)

    return step


def parameter_groups(
    model: nn.Module, backbone: nn.Module, rate: float, new_rate: float, backbone_rate: float
) -> list[dict[str, Any]]:
    """Parameters of the head, those that only APT has, and all else in the backbone."""
    groups: tuple[list, list, list] = [], [], []
    pretrained = {id(parameter) for parameter in backbone.parameters()}
    for name, parameter in model.named_parameters():
        groups[0 if id(parameter) not in pretrained else 1 if is_new(name) else 2].append(parameter)
    rates = rate, new_rate, backbone_rate
    return [{"params": group, "lr": each} for group, each in zip(groups, rates, strict=True) if group]


def load_start(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the weights of another row but those that only adaptive patches have, which may be missing.

    Raises:
        ValueError: if they are of another form.
    """
    missing, unexpected = model.load_state_dict(state, strict=False)
    wrong = [name for name in (*missing, *unexpected) if not is_new(name)]
    if wrong:
        raise ValueError(f"a row starts from a model of another form: {wrong[:3]}")


def summary(backbone: APTViT, share: float, losses: Sequence[Tensor]) -> dict[str, Any]:
    """Notes on a training besides its scores; the loss is the mean over its last tenth."""
    loss = torch.stack(losses[-len(losses) // 10 :]).mean().item() if losses else None
    return {"share": share, "loss": loss, "thresholds": list(backbone.thresholds)}


def on_cpu(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights, with what they note (``arguments_in_own_metadata``)."""
    state = model.state_dict()
    for name, value in state.items():
        state[name] = value.cpu()
    return state
