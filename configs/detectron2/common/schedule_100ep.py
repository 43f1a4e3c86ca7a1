# 100 epochs of COCO at 64 images per iteration, AdamW with layer-wise decay, from MAE weights; for ViT-B.
from functools import partial

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from apt_dense.hosts.detectron2 import get_apt_lr_decay_rate
from apt_dense.weights.parameter_rules import UNDECAYED

train = model_zoo.get_config("common/train.py").train
train.max_iter = 184375
train.amp.enabled = True
train.ddp.fp16_compression = True
train.init_checkpoint = "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_base.pth?matching_heuristics=True"
train.seed = 0

# Relative to train.max_iter: another max_iter scales the whole schedule.
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[163889, 177546], num_updates=train.max_iter
    ),
    warmup_length=250 / train.max_iter,
    warmup_factor=0.001,
)

optimizer = model_zoo.get_config("common/optim.py").AdamW
optimizer.params.lr_factor_func = partial(get_apt_lr_decay_rate, num_layers=12, lr_decay_rate=0.7)
optimizer.params.overrides = {name: {"weight_decay": 0.0} for name in UNDECAYED}
