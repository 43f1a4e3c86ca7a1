# The same demo with every patch at 8 pixels, for comparison with the adaptive one.
_base_ = "demo_adaptive.py"
model = dict(backbone=dict(thresholds=()))
