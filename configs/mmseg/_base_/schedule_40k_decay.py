# 40k iterations with layer-wise decay of the learning rate: block i of n learns at lr * decay_rate ** (n - i).
_base_ = "schedule_160k.py"
max_iters = 40000
optim_wrapper = dict(
    optimizer=dict(lr=3e-5, weight_decay=0.05),
    constructor="APTLearningRateDecayOptimWrapperConstructor",
    paramwise_cfg=dict(_delete_=True, num_layers=12, decay_rate=0.8, decay_type="layer_wise"),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))
