"""Masks are found by what they have after the names of their images."""

import pytest

from apt_dense.hosts.mask_file_names import common_ending


@pytest.mark.parametrize(
    "images, masks, ending",
    [
        (["1", "2"], ["1", "2"], ""),
        (["1", "2"], ["1_L", "2_L", "3_L"], "_L"),
        (["1", "2"], ["1", "2", "1_L", "2_L"], ""),  # the shortest
        (["1", "1_a"], ["1_L", "1_a_L"], "_L"),
        (["1", "2", "3"], ["2_L", "3_L"], "_L"),  # so that an error names 1_L
        (["1", "10"], ["1", "10"], ""),
        ([], ["1_L"], ""),
    ],
)
def test_the_ending_is_that_of_most(images: list[str], masks: list[str], ending: str) -> None:
    assert common_ending(images, masks) == ending
