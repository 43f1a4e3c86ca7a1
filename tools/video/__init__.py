"""Library of tools/compare_frames.py: videos, and their patches with and without memory of earlier frames."""
