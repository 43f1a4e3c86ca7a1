"""Trains and evaluates torchvision's Mask R-CNN: the library of train_det_torchvision."""
