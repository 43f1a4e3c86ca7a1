# ADE20K at 518 x 518 crops, 37 patches of 14 pixels: as ade20k_512.py, but with 518 for 512 in the pipelines.
_base_ = "ade20k_512.py"
crop_size = (518, 518)

train_pipeline = _base_.train_pipeline
train_pipeline[3].update(scale=(2072, 518))
train_pipeline[4].update(crop_size=crop_size)
test_pipeline = _base_.test_pipeline
test_pipeline[1].update(scale=(2072, 518))
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
