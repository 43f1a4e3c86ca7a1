# 40,000 iterations for a few ten thousand images (16 epochs of 20,000 at a batch of 8). The last block of the
# pretrained backbone learns at a tenth of the new heads' rate, each block before it at 0.8 of the next one's.
_base_ = "schedule_160k.py"
max_iters = 40000
optim_wrapper = dict(
    optimizer=dict(lr=3e-4, weight_decay=0.05),
    constructor="APTLearningRateDecayOptimWrapperConstructor",
    paramwise_cfg=dict(_delete_=True, decay_rate=0.8, backbone_lr_mult=0.1),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=max_iters),
]
auto_scale_lr = dict(enable=False, base_batch_size=8)
train_cfg = dict(max_iters=max_iters, val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000))
