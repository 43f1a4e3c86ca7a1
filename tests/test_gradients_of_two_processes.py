"""DistributedDataParallel and fully sharded parameters (FSDP2) on two gloo processes give the mean of both batches'
gradients, whatever is in these."""

from __future__ import annotations

import multiprocessing
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from apt_dense import APTViT

from support.references import noise, randomise

TINY = {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 2, "thresholds": (5.5, 4.0)}
FLAT = torch.zeros(1, 3, 64, 64)
CASES = {
    "noise on both": [noise(1, 3, 64, 64, seed=1), noise(1, 3, 64, 64, seed=2)],
    "one flat": [noise(1, 3, 64, 64, seed=1), FLAT],
    "both flat": [FLAT, FLAT + 0.1],
    "other sizes and numbers": [noise(2, 3, 48, 80, seed=1), noise(1, 3, 33, 64, seed=2)],
}


def build(**options: object) -> APTViT:
    return randomise(APTViT(**TINY, **options), 0.2, 0).train()


def loss_of(model: torch.nn.Module, images: Tensor) -> Tensor:
    return model(images)[0].square().mean()


def train(rank: int, folder: Path, images: list[Tensor], options: dict, sharded: bool, answers: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = build(**options)
    gradients = in_shards(model, images[rank]) if sharded else exchanged(model, images[rank])
    answers.send({name: gradient.numpy() for name, gradient in gradients.items()})
    dist.destroy_process_group()


def exchanged(model: APTViT, images: Tensor) -> dict[str, Tensor]:
    """Gradients of two batches, accumulated: the first is not exchanged."""
    wrapped = DistributedDataParallel(model)
    for number in range(2):
        with nullcontext() if number else wrapped.no_sync():
            loss_of(wrapped, images).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def in_shards(model: APTViT, images: Tensor) -> dict[str, Tensor]:
    """The same where each process keeps half of each parameter, block by block."""
    mesh = init_device_mesh("cpu", (2,))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)
    for number in range(2):
        model.set_requires_gradient_sync(bool(number))
        loss_of(model, images).backward()
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
@pytest.mark.parametrize("options", [{}, {"checkpoint_blocks": True}], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_mean_of_their_gradients(
    name: str, options: dict, sharded: bool, tmp_path: Path
) -> None:
    context, answers, processes = multiprocessing.get_context("fork"), [], []
    for rank in range(2):
        answer, sender = multiprocessing.Pipe(duplex=False)
        processes.append(context.Process(target=train, args=(rank, tmp_path, CASES[name], options, sharded, sender)))
        processes[-1].start()
        sender.close()  # so that a process that dies ends the wait for its answer
        answers.append(answer)
    found = [answer.recv() for answer in answers]
    for process in processes:
        process.join()
    alone = build()
    for images in CASES[name]:  # each twice, of which processes take the mean
        loss_of(alone, images).backward()
    for parameter_name, parameter in alone.named_parameters():
        for one in found:
            torch.testing.assert_close(torch.from_numpy(one[parameter_name]), parameter.grad, rtol=1e-4, atol=1e-6)
