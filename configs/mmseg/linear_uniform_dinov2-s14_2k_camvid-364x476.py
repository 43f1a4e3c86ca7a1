# The same with every patch at 14 pixels, for comparison.
_base_ = "linear_apt_dinov2-s14_2k_camvid-364x476.py"
model = dict(backbone=dict(thresholds=()))
