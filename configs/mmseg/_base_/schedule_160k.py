# 160k iterations of AdamW at a total batch of 16 (8 devices x 2 images), the usual ADE20K schedule for ViTs.
# For another length, `tools/train_seg.py --max-iters N` scales all numbers of iterations below.
max_iters = 160000
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    # No weight decay for vectors (biases, norms, LayerScale), nor for positions, class and register tokens, as in
    # apt_dense/weights/parameter_rules.py.
    paramwise_cfg=dict(
        flat_decay_mult=0.0,
        custom_keys={
            "pos_embed": dict(decay_mult=0.0),
            "cls_token": dict(decay_mult=0.0),
            "reg_token": dict(decay_mult=0.0),
        },
    ),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=max_iters),
]
auto_scale_lr = dict(enable=False, base_batch_size=16)

train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=16000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    # "apt_atomic" renames complete files, so an interrupted run leaves no half-written checkpoint.
    checkpoint=dict(
        type="CheckpointHook",
        by_epoch=False,
        interval=16000,
        max_keep_ckpts=3,
        save_best="mIoU",
        backend_args=dict(backend="apt_atomic"),
    ),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="SegVisualizationHook"),
)
