# Shared by all runs: registered classes, environment, logging, drawing.
default_scope = "mmseg"
custom_imports = dict(imports=["apt_dense.hosts.mmseg"], allow_failed_imports=False)
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
vis_backends = [dict(type="LocalVisBackend")]
# Without a name it is named after the run. With a fixed name, a second run in the same process would use the folder of
# the first.
visualizer = dict(type="SegLocalVisualizer", vis_backends=vis_backends)
log_processor = dict(by_epoch=False)
log_level = "INFO"
load_from = None
resume = False
tta_model = dict(type="APTSegTTAModel")  # SegTTAModel, with crops of all augmentations in shared forward passes
