"""JPEG files that are cut off are told from whole ones, whatever follows the end."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from apt_dense.hosts.readable_images import DataError, check_all_whole, check_whole, is_cut_off, is_file_cut_off


def picture(**options: object) -> bytes:
    """A JPEG with a thumbnail in its EXIF data, which has marks of its own."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    small, whole = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels[:8, :8]).save(small, "jpeg")
    Image.fromarray(pixels).save(whole, "jpeg", exif=b"Exif\0\0" + small.getvalue(), **options)
    return whole.getvalue()


KINDS = {"baseline": {}, "progressive": {"progressive": True}, "fine": {"quality": 100, "subsampling": 0}}
PICTURES = {name: picture(**options) for name, options in KINDS.items()}


@pytest.mark.parametrize("kind", PICTURES)
@given(at=st.floats(0, 1, exclude_max=True))
def test_any_cut_is_seen(kind: str, at: float) -> None:
    data = PICTURES[kind]
    length = 2 + int(at * (len(data) - 2))
    cut = data[:length]
    assert is_cut_off(cut) or cut.endswith(b"\xff\xd9"), "only the thumbnail's end looks like one"


@pytest.mark.parametrize("kind", PICTURES)
@given(more=st.binary(max_size=40))
def test_anything_may_follow_the_end(kind: str, more: bytes) -> None:
    """Films that phones append hold all marks by chance."""
    for tail in (more, more + b"\xff\xda\0\4", b"\xff\xd8" + more):
        assert not is_cut_off(PICTURES[kind] + tail)


@pytest.mark.parametrize("data", [b"", b"\xff", b"no picture", b"\x89PNG\r\n", b"GIF89a", b"BM"])
def test_other_files_are_not_judged(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(data)
    assert not is_cut_off(data) and not is_file_cut_off(tmp_path / "a")


@pytest.mark.parametrize("data", [b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\xff\xff", b"\xff\xd8\xff\xda\0\0"])
def test_starts_of_pictures_are_cut_off(data: bytes) -> None:
    assert is_cut_off(data)


def test_files_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    data = PICTURES["baseline"]
    paths = [tmp_path / f"{number}.jpg" for number in range(4)]
    for number, path in enumerate(paths):
        path.write_bytes([data, data[:500], data + b"more", data[:-2]][number])
    assert [is_file_cut_off(path) for path in paths] == [False, True, False, True]
    check_whole(paths[0])
    with pytest.raises(DataError, match=f"{paths[1]} is a JPEG file that is cut off; replace it"):
        check_whole(paths[1])
    check_all_whole([paths[0], paths[2], tmp_path / "none.jpg"], 3)
    for of, sample in ((4, ""), (9, r" \(a sample of 9\)")):
        with pytest.raises(DataError, match=f"^2 of 4 images{sample} are JPEG .* the first is {paths[1]}: replace it"):
            check_all_whole(paths, of)
