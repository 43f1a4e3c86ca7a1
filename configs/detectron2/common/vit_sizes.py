# From ViTDet-B to L and H: the backbone, the decay of its learning rates, and its MAE weights.
from functools import partial

from omegaconf import DictConfig

from apt_dense.hosts.detectron2 import get_apt_lr_decay_rate

_MAE = "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_{}.pth?matching_heuristics=True"


def use_vit_l(model: DictConfig, optimizer: DictConfig, train: DictConfig) -> None:
    model.backbone.net.update(embed_dim=1024, depth=24, num_heads=16, drop_path_rate=0.4)
    _use(model, optimizer, train, lr_decay_rate=0.8, weights="large")


def use_vit_h(model: DictConfig, optimizer: DictConfig, train: DictConfig, lr_multiplier: DictConfig) -> None:
    model.backbone.net.update(embed_dim=1280, depth=32, num_heads=16, drop_path_rate=0.5)
    _use(model, optimizer, train, lr_decay_rate=0.9, weights="huge_p14to16")
    # ViTDet-H has weight decay on norms and positions, too.
    optimizer.params.overrides = {}
    optimizer.params.weight_decay_norm = None
    # 75 epochs.
    train.max_iter = train.max_iter * 3 // 4
    steps = lr_multiplier.scheduler
    steps.milestones = [milestone * 3 // 4 for milestone in steps.milestones]
    steps.num_updates = train.max_iter


def _use(model: DictConfig, optimizer: DictConfig, train: DictConfig, lr_decay_rate: float, weights: str) -> None:
    depth = model.backbone.net.depth
    # The last block of each quarter attends over the image, the others inside windows.
    model.backbone.net.window_block_indexes = [i for i in range(depth) if (i + 1) % (depth // 4)]
    optimizer.params.lr_factor_func = partial(get_apt_lr_decay_rate, lr_decay_rate=lr_decay_rate, num_layers=depth)
    train.init_checkpoint = _MAE.format(weights)
