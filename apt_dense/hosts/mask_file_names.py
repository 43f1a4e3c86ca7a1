"""Match mask files to image files by name: equal stems, or a common suffix such as "_L"."""

from collections import Counter
from collections.abc import Iterable


def common_ending(images: Iterable[str], masks: Iterable[str]) -> str:
    """Return the ending with which most images' names are masks' names, the shortest of several: "_L" for 1.jpg and
    2.jpg with 1_L.png and 2_L.png. "" where there is none.

    Args:
        images, masks: names without suffix.
    """
    names = set(images)
    found = Counter(mask[cut:] for mask in set(masks) for cut in range(len(mask) + 1) if mask[:cut] in names)
    return min(found, key=lambda ending: (-found[ending], len(ending), ending), default="")
