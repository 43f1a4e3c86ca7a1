# The same run with every patch at 16 pixels, for comparison with the adaptive one.
_base_ = "upernet_apt_vit-b16_160k_ade20k-512x512.py"
model = dict(backbone=dict(thresholds=()))
