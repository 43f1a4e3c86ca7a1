# UPerNet on an adaptive ViT-B/16. The backbone returns four stride-16 maps, which Feature2Pyramid brings to strides
# 4, 8, 16 and 32 by 2 x 2 transposed convolutions. (MultiLevelNeck's 3 x 3 convolution at stride 4 alone would cost
# 174 GFLOP, about as much as the whole backbone.)
norm_cfg = dict(type="SyncBN", requires_grad=True)  # MMEngine replaces it by BN for a single process
pixel_mean = [123.675, 116.28, 103.53]  # RGB, grey levels 0-255
pixel_std = [58.395, 57.12, 57.375]
model = dict(
    type="APTEncoderDecoder",  # EncoderDecoder, with several crops per forward when testing
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=pixel_mean,
        std=pixel_std,
        bgr_to_rgb=True,
        size=(512, 512),
        pad_val=0,
        seg_pad_val=255,
    ),
    # Pre-trained weights: --cfg-options model.backbone.pretrained=FILE (a timm, MAE or MMSeg ViT checkpoint, among
    # others) or =timm://MODEL_NAME. With None they are random, which only suits trials.
    backbone=dict(
        type="APTViT",
        pretrained=None,
        img_size=512,
        patch_size=16,
        embed_dim=768,
        depth=12,
        num_heads=12,
        class_token=True,
        final_norm=False,
        out_indices=(2, 5, 8, 11),
        drop_path_rate=0.1,
        # Patches of 32 and 64 pixels stay whole where their score is below these; () is the plain ViT.
        thresholds=(5.5, 4.0),
        scorer="entropy",
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
        channel_order="RGB",
    ),
    neck=dict(type="Feature2Pyramid", embed_dim=768, rescales=[4, 2, 1, 0.5], norm_cfg=norm_cfg),
    decode_head=dict(
        type="APTUPerHead",
        in_channels=[768, 768, 768, 768],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=512,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_channels=768,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=0.4),
    ),
    train_cfg=dict(),
    # Fewer crops per forward need less memory; the result is the same.
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341), crops_per_forward=8, whole_patches=True),
)
