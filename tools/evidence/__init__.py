"""Measure what adaptive patches cost in accuracy: data, runs over seeds, features and mIoU by switching."""
