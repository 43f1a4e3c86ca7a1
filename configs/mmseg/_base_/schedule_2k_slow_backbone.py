# 2,000 iterations for a few hundred images (20 epochs of 400 at a batch of 4). The pretrained backbone learns at a
# fiftieth of the new head's rate. At the head's rate it forgets what it knew, and learns the patches' sizes by heart:
# predictions then have the shape of the patches.
_base_ = "schedule_160k.py"
max_iters = 2000
optim_wrapper = dict(
    optimizer=dict(lr=1e-3, weight_decay=0.05),
    constructor="APTLearningRateDecayOptimWrapperConstructor",
    paramwise_cfg=dict(_delete_=True, decay_rate=1.0, backbone_lr_mult=0.02),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=100, end=max_iters),
]
auto_scale_lr = dict(enable=False, base_batch_size=4)
train_cfg = dict(max_iters=max_iters, val_interval=500)
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=500, max_keep_ckpts=1))
