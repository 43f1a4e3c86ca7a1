# 2k iterations of AdamW for a few hundred images, a pretrained backbone and a new head: the head learns fifty times as
# fast. At the head's rate a backbone forgets what it knew, and an adaptive one learns patch sizes by heart.
_base_ = "schedule_160k.py"
max_iters = 1840  # 20 epochs of CamVid at a batch of 4
optim_wrapper = dict(
    optimizer=dict(lr=2e-5, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={"decode_head": dict(lr_mult=50.0)}),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=92),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=92, end=max_iters),
]
auto_scale_lr = dict(enable=False, base_batch_size=4)
train_cfg = dict(max_iters=max_iters, val_interval=460)
default_hooks = dict(logger=dict(interval=23), checkpoint=dict(interval=92, max_keep_ckpts=1))
