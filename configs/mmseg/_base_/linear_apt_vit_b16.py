# A linear classifier of each cell on an adaptive ViT-B/16 (the linear baseline of Segmenter). Almost nothing but the
# backbone runs, so this head shows its speed best.
_base_ = "upernet_apt_vit_b16.py"
model = dict(
    backbone=dict(out_indices=(11,), final_norm=True),
    neck=None,
    decode_head=dict(
        _delete_=True,
        type="FCNHead",  # without convolutions: dropout and one 1 x 1 classifier
        num_convs=0,
        concat_input=False,
        in_channels=768,
        channels=768,
        in_index=0,
        dropout_ratio=0.0,
        num_classes=150,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=None,
)
