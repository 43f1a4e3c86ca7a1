# EVA-02's detectors (arXiv 2303.11331): SwiGLU with a norm inside, keys without a bias, rotary positions that restart
# in each window and run over the image in the other blocks, both scaled to the 16 x 16 grid of the pre-training.
from functools import partial

from omegaconf import DictConfig

from apt_dense.hosts.detectron2 import get_apt_lr_decay_rate


def use_eva02_l(model: DictConfig, image_size: int, window_size: int, global_every: int) -> None:
    """Blocks ``global_every - 1``, ``2 * global_every - 1``, ... attend over the image, the others inside windows."""
    model.backbone.net.update(
        img_size=image_size,
        embed_dim=1024,
        depth=24,
        num_heads=16,
        drop_path_rate=0.4,
        mlp_ratio=4 * 2 / 3,
        mlp_layer="swiglu",
        act_layer=None,
        scale_mlp_norm=True,
        qkv_fused=False,
        k_bias=False,
        use_rel_pos=False,
        rotary={"ref_feat_shape": (16, 16)},
        window_size=window_size,
        window_block_indexes=[i for i in range(24) if (i + 1) % global_every],
    )


def use_eva02_schedule(
    optimizer: DictConfig, train: DictConfig, lr_multiplier: DictConfig, dataloader: DictConfig, lr: float, batch: int
) -> None:
    """60k iterations, layer-wise decay of 0.8, weight decay for everything."""
    optimizer.lr = lr
    optimizer.params.lr_factor_func = partial(get_apt_lr_decay_rate, lr_decay_rate=0.8, num_layers=24)
    optimizer.params.overrides = {}
    optimizer.params.weight_decay_norm = None
    train.max_iter = 60000
    # Set train.init_checkpoint to EVA-02's file, such as eva02_L_pt_m38m_p14to16.pt, or to that of a trained detector.
    train.init_checkpoint = ""
    steps = lr_multiplier.scheduler
    steps.milestones = [train.max_iter * 8 // 10, train.max_iter * 9 // 10]
    steps.num_updates = train.max_iter
    lr_multiplier.warmup_length = 1000 / train.max_iter
    dataloader.train.total_batch_size = batch
