# ADE20K at 640 x 640 crops: as ade20k_512.py, but with 640 for 512 in the pipelines.
_base_ = "ade20k_512.py"
crop_size = (640, 640)

train_pipeline = _base_.train_pipeline
train_pipeline[3].update(scale=(2560, 640))
train_pipeline[4].update(crop_size=crop_size)
test_pipeline = _base_.test_pipeline
test_pipeline[1].update(scale=(2560, 640))
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
