"""compare_frames: made and given videos, counted by plain loops; a memory that steadies a still camera."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest

for package in ("cv2", "tqdm", "matplotlib"):
    pytest.importorskip(package, reason="compare_frames needs it")

import compare_frames

from apt_dense import PatchSelector

from shared.normalise import normalise, to_grey_levels
from shared.photo_files import read_photo
from video.synthetic_frames import panning_camera, still_camera, with_noise


def picture() -> np.ndarray:
    random = np.random.default_rng(0)
    return cv2.resize(random.integers(60, 160, (8, 14, 3), dtype=np.uint8), (224, 128))


def test_what_a_still_camera_sees_passes_by() -> None:
    frames = list(still_camera(picture(), frames=3, step=10))
    for number, frame in enumerate(frames):
        rows, columns = np.where((frame != picture()).any(-1))
        assert columns.min() >= 10 * number and columns.max() < 10 * number + 21 and np.ptp(rows) <= 20


def test_a_panning_camera_sees_parts_of_the_photo() -> None:
    frames = list(panning_camera(picture(), frames=3, step=10))
    assert [frame.shape for frame in frames] == [(128, 204, 3)] * 3
    assert all(np.array_equal(frame, picture()[:, 10 * n : 10 * n + 204]) for n, frame in enumerate(frames))
    with pytest.raises(ValueError, match="too narrow for 30 frames 8 pixels apart"):
        list(panning_camera(picture(), frames=30, step=8))


def test_noise_has_its_deviation_and_repeats() -> None:
    grey = np.full((100, 100, 3), 120, np.uint8)
    first, second = (np.stack(list(with_noise(iter([grey, grey]), 3.0))) for _ in range(2))
    assert np.array_equal(first, second) and not np.array_equal(first[0], first[1])
    assert first.astype(float).std() == pytest.approx(3.0, abs=0.1)
    assert np.array_equal(next(with_noise(iter([grey]), 0.0)), grey)


def read_rows(out: Path) -> list[dict[str, str]]:
    with (out / "frames.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_photo_gives_two_videos_and_memory_steadies_the_still_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = cv2.resize(picture(), (640, 384))
    cv2.imwrite(str(tmp_path / "photo.png"), photo[..., ::-1])
    (scores,) = PatchSelector(thresholds=(1.0,)).scores(normalise(to_grey_levels(photo), PatchSelector().pixel_format))
    options = ["--frames", "6", "--thresholds", str(scores.median().item()), "--noise", "1"]
    options += ["--out", str(tmp_path / "out")]
    compare_frames.main([str(tmp_path / "photo.png"), *options])
    changed: dict[tuple[str, str], float] = {}
    for row in read_rows(tmp_path / "out"):
        key = row["video"], row["patches"]
        changed[key] = changed.get(key, 0) + float(row["changed"])
    assert changed["still camera", "with memory"] < 0.6 * changed["still camera", "alone"]
    assert changed["panning camera", "alone"] > 0
    assert cv2.imread(str(tmp_path / "out" / "frames.png")) is not None
    assert capsys.readouterr().out.count("| still camera | 6 |") == 2


def test_frames_of_a_folder_are_counted_as_a_loop_does(tmp_path: Path) -> None:
    (tmp_path / "video").mkdir()
    for number, frame in enumerate(with_noise(panning_camera(picture(), 4, 8), 3.0)):
        cv2.imwrite(str(tmp_path / "video" / f"{number}.png"), frame)
    compare_frames.main([str(tmp_path / "video"), "--thresholds", "6.2", "5.5", "--out", str(tmp_path / "out")])
    selector, maps = PatchSelector(thresholds=(6.2, 5.5)), []
    for path in sorted((tmp_path / "video").iterdir()):
        maps.append(selector.scale_map(normalise(to_grey_levels(read_photo(path)), selector.pixel_format))[0].numpy())
    rows = [row for row in read_rows(tmp_path / "out") if row["patches"] == "alone"]
    assert [row["video"] for row in rows] == ["video"] * 4
    for number, row in enumerate(rows):
        tokens = sum(4.0 ** -float(scale) for scale in maps[number].flat)
        assert float(row["tokens"]) == pytest.approx(tokens / maps[number].size)
        assert float(row["changed"]) == pytest.approx((maps[number] != maps[max(number - 1, 0)]).mean())


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "video").mkdir()
    cv2.imwrite(str(tmp_path / "video" / "0.png"), picture())
    with pytest.raises(SystemExit, match="holds 1 photo; expected at least two"):
        compare_frames.main([str(tmp_path / "video"), "--out", str(tmp_path / "out")])
    cv2.imwrite(str(tmp_path / "video" / "1.png"), picture()[:64])
    with pytest.raises(SystemExit, match="a frame has 224 x 64 pixels, others not"):
        compare_frames.main([str(tmp_path / "video"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "frames.csv").exists()
