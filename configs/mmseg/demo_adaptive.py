# The demo of tools/quickstart.py: a small adaptive ViT with a linear head, from random weights, on the scenes that
# tools/make_demo_data.py composes. Trains in a minute on two CPU cores; not meant for real data.
_base_ = ["_base_/linear_apt_vit_b16.py", "_base_/schedule_160k.py", "_base_/runtime.py"]

# Scenes have 304 pixels on average and no side below 256, so no crop is padded. Patches of 8 pixels give as many tokens
# as patches of 16 do at 512 x 512.
crop_size = (256, 256)
classes = ("background", "cat", "brick", "grass", "gravel", "page", "tissue", "coin", "retina")
palette = [
    [60, 60, 70],
    [240, 150, 40],
    [190, 60, 50],
    [80, 170, 60],
    [130, 140, 160],
    [235, 230, 200],
    [150, 110, 200],
    [240, 210, 60],
    [250, 120, 150],
]

model = dict(
    backbone=dict(
        img_size=256,
        patch_size=8,
        embed_dim=192,
        depth=4,
        num_heads=3,
        out_indices=(3,),
        class_token=False,
        drop_path_rate=0.0,
        # Blurred backgrounds are smooth but not of one colour: flat to the Laplacian, not to the entropy.
        thresholds=(0.15, 0.1),
        scorer="laplacian",
    ),
    data_preprocessor=dict(size=crop_size),
    decode_head=dict(in_channels=192, channels=192, num_classes=len(classes)),
    test_cfg=dict(_delete_=True, mode="whole"),
)

check_labels = dict(type="CheckLabels", num_classes=len(classes))
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    check_labels,
    dict(type="RandomCrop", crop_size=crop_size),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    check_labels,
    dict(type="PackSegInputs"),
]
data_root = "demo/data/scenes"
dataset = dict(
    type="BaseSegDataset",
    data_root=data_root,
    metainfo=dict(classes=classes, palette=palette),
    reduce_zero_label=True,
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,  # a worker would compete with training for the few cores
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

max_iters = 200
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.05), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=False, begin=20, end=max_iters),
]
randomness = dict(seed=0)
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=max_iters, max_keep_ckpts=1, save_best=None),
)
