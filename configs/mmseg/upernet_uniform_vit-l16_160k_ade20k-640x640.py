# The same run with every patch at 16 pixels, for comparison with the adaptive one.
_base_ = "upernet_apt_vit-l16_160k_ade20k-640x640.py"
model = dict(backbone=dict(thresholds=()))
