# The same demo with every patch at 8 pixels: what the adaptive one is compared with.
_base_ = "demo_adaptive.py"
model = dict(backbone=dict(thresholds=()))
