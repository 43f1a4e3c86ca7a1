"""The real loops of both hosts: two processes train as one does with their images in one batch, also with accumulated
gradients, in bfloat16, and resumed in the middle. MMSegmentation's also keeps a moving average of its weights, and
freezes the backbone's blocks.

Without augmentation, drop path and samples of anchors, whose random numbers differ between processes. Detectron2's
model is its proposal network, whose losses are means over images. (Those of Mask R-CNN's heads are means over the boxes
that a process has found, so that Detectron2's own results depend on how images are spread.)
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import Tensor

pytest.importorskip("mmseg", reason="trains with both hosts")

from apt_dense.hosts.mmseg.safe_checkpoints import read_run
from apt_dense.weights.files import read_checkpoint

from support import tiny_coco
from support.threads import one_thread  # noqa: F401 (a fixture)
from support.tiny_trainings import NAMES
from support.two_processes import train, write_det, write_seg

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]  # warnings: the hosts' own
ITERATIONS = 4  # of the optimizer
#: The largest distance of weights, as a share of the largest change in the second half of the training.
NEAR = {"float32": 1e-4, "bfloat16": 0.02}

PROPOSALS = """
import torch
from detectron2.config import LazyCall as L, LazyConfig
from support.two_processes import proposal_network

whole = LazyConfig.load({whole!r})
dataloader, lr_multiplier, optimizer, train, model = (
    whole[name] for name in ("dataloader", "lr_multiplier", "optimizer", "train", "model")
)
model = L(proposal_network)(
    num_classes=3, backbone=model.backbone, proposal_generator=model.proposal_generator, pixel_mean=model.pixel_mean,
    pixel_std=model.pixel_std,
)
model.backbone.net.update(channel_order="RGB", drop_path_rate=0.0)
model.proposal_generator.update(batch_size_per_image=100_000, positive_fraction=1.0)
train.ddp.fp16_compression = False
dataloader.train.aspect_ratio_grouping = False
del dataloader["evaluator"], optimizer["betas"]
optimizer.update(_target_=torch.optim.SGD, momentum=0.9)
lr_multiplier.warmup_length = 0.0
"""


def seg_argv(folder: Path, batch: int, dtype: str, accumulate: int) -> list[str]:
    """Plain SGD, since Adam makes large steps of the rounding of small gradients. With accumulation, only the head and
    what APT alone has are trained."""
    options = {
        "train_dataloader.batch_size": batch, "default_hooks.checkpoint.interval": ITERATIONS // 2 * accumulate,
        "default_hooks.checkpoint.max_keep_ckpts": 9, "optim_wrapper.accumulative_counts": accumulate,
        "optim_wrapper.optimizer": dict(_delete_=True, type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4),
        "model.backbone.drop_path_rate": 0.0, "model.backbone.frozen_stages": 4 if accumulate > 1 else -1,
        "custom_hooks": [dict(type="EMAHook", momentum=0.3)],
        "param_scheduler": [dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, end=100)],
    }  # fmt: skip
    argv = [*write_seg(folder, 6, **options), "--max-iters", str(ITERATIONS * accumulate)]
    return [*argv, "--amp"] if dtype == "bfloat16" else argv


def det_argv(folder: Path, dtype: str, accumulate: int) -> list[str]:
    config = folder / "proposals.py"
    config.parent.mkdir(parents=True)
    config.write_text(PROPOSALS.format(whole=str(tiny_coco.ADAPTIVE)))
    options = [
        f"train.max_iter={ITERATIONS}", f"train.checkpointer.period={ITERATIONS // 2}", "optimizer.lr=20.0",
        f"train.accumulate={accumulate}", f"train.amp.enabled={dtype == 'bfloat16'}", "train.amp.dtype=bfloat16",
    ]  # fmt: skip
    return [option for option in write_det(folder, 6, *options, config=config) if "roi_heads" not in option]


class Host(NamedTuple):
    """File names of the checkpoints in the middle and at the end, and how weights are read."""

    middle: str
    last: str
    note: str  # of the last checkpoint

    def weights(self, path: Path) -> Mapping[str, Tensor]:
        """The model's, and their moving average."""
        if self.last == "model_final.pth":
            return read_checkpoint(path)["model"]
        content = read_run(path)
        return {f"average.{name}": tensor for name, tensor in content["state_dict"].items()} | content["ema_state_dict"]


def host_of(name: str, accumulate: int) -> Host:
    if name == "det":
        return Host("model_0000001.pth", "model_final.pth", "model_0000001.pth")
    done = ITERATIONS * accumulate
    return Host(f"iter_{done // 2}.pth", f"iter_{done}.pth", "{folder}/" + f"iter_{done // 2}.pth")


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[key].double() - other[key].double()).abs().max().item() for key in one)


def argv_of(name: str, folder: Path, batch: int, dtype: str, accumulate: int) -> list[str]:
    return seg_argv(folder, batch, dtype, accumulate) if name == "seg" else det_argv(folder, dtype, accumulate)


@pytest.mark.parametrize("dtype, accumulate", [("float32", 1), ("bfloat16", 2)])
@pytest.mark.parametrize("name", NAMES[:2])
def test_two_processes_train_as_one(name: str, dtype: str, accumulate: int, tmp_path: Path) -> None:
    host = host_of(name, accumulate)
    one, two, resumed = (tmp_path / kind / "out" for kind in ("one", "two", "resumed"))
    read = train(name, argv_of(name, one.parent, 2, dtype, accumulate), one, ranks=1)
    argv = argv_of(name, two.parent, 1, dtype, accumulate)
    apart = train(name, argv, two)
    expected = host.weights(one / host.last)
    change = distance(host.weights(one / host.middle), expected)
    assert change > 1e-4 and distance(host.weights(two / host.last), expected) <= NEAR[dtype] * change
    # The same images, in turns.
    assert len(read[0].images) == 2 * ITERATIONS * accumulate
    assert [process.images for process in apart] == [read[0].images[rank::2] for rank in range(2)]

    resumed.mkdir(parents=True)
    shutil.copy(two / host.middle, resumed)
    (resumed / "last_checkpoint").write_text(host.note.format(folder=resumed))
    rest = train(name, ["--resume", *argv] if name == "det" else [*argv, "--resume"], resumed)
    assert [process.images for process in rest] == [process.images[len(process.images) // 2 :] for process in apart]
    again = host.weights(resumed / host.last)
    assert distance(again, host.weights(two / host.last)) <= 1e-6 * change
