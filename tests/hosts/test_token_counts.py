"""Token counts are made once, kept with what they depend on, and made again where that differs."""

from __future__ import annotations

import json
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch.distributed as dist

from apt_dense import PatchSelector
from apt_dense.hosts.token_counts import cached_counts, digest, read_counts, selector_options, write_counts


class Counter:
    """Counts of index * 10, and the indices that were asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, index: int) -> int:
        self.asked.append(index)
        return index * 10


def test_images_are_counted_once_unless_settings_differ(tmp_path: Path) -> None:
    path, count = tmp_path / "new" / "tokens.json", Counter()
    for settings, images, asked in (({"a": (1, 2)}, 3, 3), ({"a": (1, 2)}, 3, 3), ({"a": 3}, 3, 6), ({"a": 3}, 4, 10)):
        assert cached_counts(path, settings, count, images) == [10 * index for index in range(images)]
        assert len(count.asked) == asked
    tokens, counted_with = read_counts(path)
    assert tokens == [0, 10, 20, 30] and counted_with == {"a": 3, "images": 4}


def test_workers_count_the_same(tmp_path: Path) -> None:
    assert cached_counts(tmp_path / "x.json", {}, Counter(), 3, workers=2) == [0, 10, 20]


@pytest.mark.parametrize("content", ["{", "[]", '{"tokens": [1]}', '{"tokens": ["x"], "counted_with": {}}'])
def test_other_files_are_not_overwritten(content: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is not a file of token counts; name another file"):
        cached_counts(path, {}, Counter(), 1)
    assert path.read_text() == content


def test_options_of_selectors_are_plain_and_tell_them_apart() -> None:
    selector = PatchSelector(patch_size=8, thresholds=(5.0,))
    _ = selector.pixel_format  # a cached value is no option
    assert json.loads(json.dumps(selector_options(selector)))["thresholds"] == [5.0]
    assert selector_options(selector) == selector_options(PatchSelector(patch_size=8, thresholds=(5.0,)))
    assert selector_options(selector) != selector_options(PatchSelector(patch_size=8, thresholds=(4.0,)))
    assert digest(["a", "b"]) != digest(["a", "c"])


def count_in_turn(rank: int, folder: Path, answers: Connection) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    # As on two machines without a folder in common: the second process finds no file where it looks.
    path, count, found = folder / str(rank) / "x.json", Counter(), []
    for _ in range(2):
        found.append(cached_counts(path, {}, count, 5))
    (folder / "0" / "x.json").write_text("{")
    dist.barrier()
    try:
        cached_counts(path, {}, count, 5)
    except ValueError as error:
        found.append(str(error))
    answers.send((found, count.asked))
    dist.destroy_process_group()


def test_processes_share_the_counting_the_file_and_its_errors(tmp_path: Path) -> None:
    context, pipes = multiprocessing.get_context("fork"), [multiprocessing.Pipe() for _ in range(2)]
    for rank in range(2):
        context.Process(target=count_in_turn, args=(rank, tmp_path, pipes[rank][1])).start()
    answers = [pipe.recv() if pipe.poll(60) else None for pipe, _ in pipes]
    assert [asked for _, asked in answers] == [[0, 2, 4], [1, 3]]
    for found, _ in answers:
        assert found[:2] == [[0, 10, 20, 30, 40]] * 2 and "is not a file of token counts" in found[2]
    assert not (tmp_path / "1").exists()


def test_counts_are_read_as_written(tmp_path: Path) -> None:
    write_counts(tmp_path / "x.json", [1.5, 2], {"a": 1})
    assert read_counts(tmp_path / "x.json") == ([1.5, 2.0], {"a": 1})
