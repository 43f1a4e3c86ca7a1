"""Labels of photos, as calibration looks at them: label maps, and the boxes of small objects."""

from typing import NamedTuple

import numpy as np

NO_BOXES = np.zeros((0, 4), np.float32)


class Labels(NamedTuple):
    """The labels of a photo (H, W).

    Args:
        map: (H, W) uint8 classes or objects; 255 for none.
        small: (n, 4) boxes of small objects, x1, y1, x2, y2 in pixels.
    """

    map: np.ndarray
    small: np.ndarray
