# A linear classifier of each cell on an adaptive ViT of any architecture: the tools take backbone, channels and pixel
# format from the weights that `pretrained` names, and the number of classes from the data.
model = dict(
    type="APTEncoderDecoder",  # EncoderDecoder, with several crops per forward when testing
    data_preprocessor=dict(type="SegDataPreProcessor", bgr_to_rgb=True, size=(512, 512), pad_val=0, seg_pad_val=255),
    # Patches of 2 and 4 times the smallest size stay whole where their entropy in bits is below these; () is the plain
    # ViT.
    backbone=dict(type="APTViT", thresholds=(5.5, 4.0)),
    decode_head=dict(
        type="FCNHead",  # without convolutions: one 1 x 1 classifier
        num_convs=0,
        concat_input=False,
        in_index=0,
        dropout_ratio=0.0,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    train_cfg=dict(),
    # Fewer crops per forward need less memory; the result is the same.
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341), crops_per_forward=8, whole_patches=True),
)
