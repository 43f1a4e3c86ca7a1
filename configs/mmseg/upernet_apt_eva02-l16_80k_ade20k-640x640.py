# The same at 640 x 640, with wider heads.
_base_ = [
    "_base_/upernet_apt_eva02_l16.py",
    "_base_/ade20k_640.py",
    "_base_/schedule_80k_decay.py",
    "_base_/runtime.py",
]
model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(img_size=640),
    decode_head=dict(channels=1536),
    auxiliary_head=dict(channels=1536),
    test_cfg=dict(crop_size=(640, 640), stride=(426, 426)),
)
