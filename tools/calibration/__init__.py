"""Finds thresholds for a target on photos: the library of tools/calibrate.py."""
