"""A hostile file at every door: each path by which a file or an address becomes weights, in each format. Nothing that
is pickled runs, and each tool ends with one line and a status other than 0."""

from __future__ import annotations

import functools
import gzip
import http.server
import io
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mmseg", reason="walks through the tools of all hosts")
pytest.importorskip("detectron2", reason="walks through the tools of all hosts")

import calibrate
import check_identity
import convert_checkpoint
import eval_seg
import measure_accuracy
import report
import train_det
import train_det_torchvision
import train_seg
import visualize
from detectron2.checkpoint import DetectionCheckpointer
from mmengine.model import PretrainedInit
from mmengine.runner import CheckpointLoader, load_checkpoint

from apt_dense import APTViT
from apt_dense.hosts import detectron2 as detectron2_host
from apt_dense.hosts import mmseg as mmseg_host
from apt_dense.hosts.detectron2.safe_checkpoints import APTCheckpointer
from apt_dense.hosts.load_trained import load_trained
from apt_dense.hosts.mmseg.safe_checkpoints import load_from_safe, read_address, read_run
from apt_dense.hosts.mmseg.training_config import load_config
from apt_dense.hosts.torchvision import build_detector as torchvision_model
from apt_dense.weights.files import read_checkpoint
from apt_dense.weights.load import load_backbone

from demo import build_and_run_segmentors as segmentors
from support import coco_folder, tiny_coco
from support.hostile import Bomb
from support.tiny_ade import CONFIGS, one_thread, shrink_options, write_ade  # noqa: F401 (a fixture)

pytestmark = pytest.mark.filterwarnings("ignore")  # the hosts' own

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


# ---- hostile files


def _zipped(content: Any, path: Path) -> None:
    with path.open("wb") as file:  # torch itself writes to no name that begins with a dot
        torch.save(content, file)


def _legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def _pickled(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def _in_bytes(content: Any, path: Path) -> None:
    """As bytes of a file of torch's inside a pickle, which torch's own storages unpickle."""

    class Storage:
        def __reduce__(self) -> tuple:
            inner = io.BytesIO()
            torch.save(content, inner)
            return torch.storage._load_from_bytes, (inner.getvalue(),)

    path.write_bytes(pickle.dumps({"model": {"a": Storage()}}))


def _in_tar(content: Any, path: Path) -> None:
    """torch's first format."""
    with tarfile.open(path, "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(content)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def _in_npz(content: Any, path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, model=np.array([content], object))


def _in_npy(content: Any, path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([content], object), allow_pickle=True)


def _gzipped(content: Any, path: Path) -> None:
    path.write_bytes(gzip.compress(pickle.dumps(content)))


#: How a file is written, and the suffixes that it may have.
FORMATS = {
    "zip.pth": _zipped, "zip.bin": _zipped, "zip.pkl": _zipped, "zip.safetensors": _zipped, "zip.pyth": _zipped,
    "legacy.pth": _legacy, "legacy.pt": _legacy, "legacy.pkl": _legacy,
    "pickle.pkl": _pickled, "pickle.pth": _pickled, "pickle.bin": _pickled, "pickle.safetensors": _pickled,
    "storage.pkl": _in_bytes, "storage.pth": _in_bytes,
    ".pkl": _pickled, ".pyth": _pickled, ".pth": _zipped,  # no name before the suffix
    "tar.pt": _in_tar, "arrays.npz": _in_npz, "array.npy": _in_npy, "packed.pkl": _gzipped,
}  # fmt: skip
#: One of each kind of reader, for doors that take a second each.
FEW = "zip.pth", "legacy.pth", "pickle.pkl", "pickle.safetensors"


def hostile(folder: Path, name: str) -> Path:
    """Write a file with a good state dict, what a run would need, and a bomb next to them."""
    state = {f"backbone.{key}": value for key, value in APTViT(**SMALL).state_dict().items()}
    run = {"meta": {"iter": 1, "epoch": 0}, "message_hub": {}, "optimizer": {}, "param_schedulers": []}
    path = folder / name
    FORMATS[name]({"state_dict": state, "model": state, "model_state": state, **run, "x": Bomb(folder / "ran")}, path)
    return path


def test_the_bomb_explodes_where_code_is_run(tmp_path: Path) -> None:
    """The files below would do harm: torch's own reader is fooled by them."""
    for name in ("zip.pth", "legacy.pth"):
        torch.load(hostile(tmp_path, name), weights_only=False)
        (tmp_path / "ran").rmdir()
    pickle.loads(hostile(tmp_path, "pickle.pkl").read_bytes())
    assert (tmp_path / "ran").is_dir()


# ---- functions

READERS: dict[str, Callable[[str], object]] = {
    "read_checkpoint": read_checkpoint,
    "load_backbone": lambda path: load_backbone(APTViT(**SMALL), path),
    "from_weights": lambda path: APTViT.from_weights(path, num_heads=2),
    "from_timm": lambda path: APTViT.from_timm("vit_tiny_patch16_224", pretrained=path),
    "MMSegmentation's backbone": lambda path: mmseg_host.APTViT(pretrained=path, num_heads=2),
    "Detectron2's backbone": lambda path: detectron2_host.APTViT(pretrained=path, num_heads=2, patch_size=8),
    "read_run": read_run,
    "read_address": read_address,
    "load_from_safe": load_from_safe,
    "MMEngine's CheckpointLoader": CheckpointLoader.load_checkpoint,
    "MMEngine's load_checkpoint": lambda path: load_checkpoint(torch.nn.Linear(1, 1), path),
    "load_trained": load_trained,
    "MMEngine's init_cfg": lambda path: PretrainedInit(path)(torch.nn.Linear(1, 1)),
    "MMEngine's init_cfg with a prefix": lambda path: PretrainedInit(path, prefix="a")(torch.nn.Linear(1, 1)),
    "Detectron2's checkpointer": lambda path: DetectionCheckpointer(torch.nn.Linear(1, 1)).load(path),
    "APTCheckpointer": lambda path: APTCheckpointer(torch.nn.Linear(1, 1)).load(path),
    "the quickstart's load_model": lambda path: segmentors.load_model(None, Path(path)),
    "the torchvision tool's backbone": lambda path: torchvision_model._load_pretrained(APTViT(**SMALL), Path(path)),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_runs_code(reader: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmentors, "build", lambda config: torch.nn.Linear(1, 1))
    path = hostile(tmp_path, name)
    with pytest.raises(ValueError, match="pickled code"):
        READERS[reader](str(path))
    assert not (tmp_path / "ran").exists()


# ---- tools


@pytest.fixture(scope="module")
def seg(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A config made small, as a file, and its data: the arguments that both segmentation tools take."""
    folder = tmp_path_factory.mktemp("seg")
    real = next(path for path in CONFIGS if path.name.startswith("upernet_apt_vit-b16"))
    load_config(str(real), shrink_options(real)).dump(folder / "tiny.py")
    return [str(folder / "tiny.py"), "--data-root", str(write_ade(folder / "ade"))]


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_coco.write_coco(tmp_path_factory.mktemp("coco") / "coco", images=2)


def ends_in_a_line(main: Callable, argv: list, folder: Path, words: str = "pickled code") -> str:
    """Run a tool, which must end in one line about the file, without having run its code."""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, argv)))
    message = str(ended.value.code)
    assert "\n" not in message and words in message, message
    assert not (folder / "ran").exists()
    return message


def option(key: str) -> Callable[[Path], list[str]]:
    return lambda path: ["--cfg-options", f"{key}={path}"]


def prefixed(path: Path) -> list[str]:
    return [*of_part("backbone.init_cfg")(path), "model.backbone.init_cfg.prefix=backbone"]


def of_part(part: str) -> Callable[[Path], list[str]]:
    """Weights of another part of the model, which MMEngine's own initialisation loads."""
    return lambda path: ["--cfg-options", f"model.{part}.type=Pretrained", f"model.{part}.checkpoint={path}"]


SEG_DOORS = {
    "load_from": option("load_from"), "pretrained": option("model.backbone.pretrained"), "init_cfg": prefixed,
    "model.init_cfg": of_part("init_cfg"), "head.init_cfg": of_part("decode_head.init_cfg"),
    "resume and load_from": lambda path: ["--resume", *option("load_from")(path)],
}  # fmt: skip


def test_weights_of_classes_in_a_pickle(seg: list[str], tmp_path: Path) -> None:
    """MMSegmentation reads those of a loss by ``mmengine.load``."""
    extra = option("model.decode_head.loss_decode.class_weight")(hostile(tmp_path, "pickle.pkl"))
    ends_in_a_line(train_seg.main, seg_argv(seg, tmp_path / "work", extra), tmp_path)


def seg_argv(seg: list[str], work: Path, extra: list[str]) -> list:
    return [*seg, "--work-dir", work, "--max-iters", 1, *extra]


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("door", SEG_DOORS)
def test_train_seg(door: str, name: str, seg: list[str], tmp_path: Path) -> None:
    path = hostile(tmp_path, name)
    ends_in_a_line(train_seg.main, seg_argv(seg, tmp_path / "work", SEG_DOORS[door](path)), tmp_path)


@pytest.mark.parametrize("name", FEW)
def test_train_seg_resumes_from_its_marker(name: str, seg: list[str], tmp_path: Path) -> None:
    (tmp_path / "last_checkpoint").write_text(str(hostile(tmp_path, name)))
    ends_in_a_line(train_seg.main, seg_argv(seg, tmp_path, ["--resume"]), tmp_path)


@pytest.mark.parametrize("name", FEW)
def test_eval_seg(name: str, seg: list[str], tmp_path: Path) -> None:
    ends_in_a_line(eval_seg.main, [*seg, "--work-dir", tmp_path / "w", hostile(tmp_path, name)], tmp_path)
    other = option("load_from")(hostile(tmp_path, name))
    ends_in_a_line(eval_seg.main, [*seg, "--work-dir", tmp_path / "w", "none.pth", *other], tmp_path)


def det_argv(coco: Path, out: Path, *extra: object, flags: tuple[str, ...] = ()) -> list:
    options = ["--config-file", tiny_coco.ADAPTIVE, "--data-root", coco, *flags, *tiny_coco.SHRINK_MASK_RCNN]
    return [*options, f"train.output_dir={out}", "train.max_iter=1", *extra]


@pytest.mark.parametrize("name", [*FEW, "legacy.pkl", "zip.pyth"])
@pytest.mark.parametrize("door", ["init_checkpoint", "heuristics", "eval", "resume"])
def test_train_det(door: str, name: str, coco: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "out", hostile(tmp_path, name)
    query = "?matching_heuristics=True" if door == "heuristics" else ""
    argv = det_argv(coco, out, f"train.init_checkpoint='{path}{query}'", flags=("--eval-only",) * (door == "eval"))
    if door == "resume":
        out.mkdir()
        (out / "last_checkpoint").write_text(str(path))
        argv = det_argv(coco, out, flags=("--resume",))
    ends_in_a_line(train_det.main, argv, tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_proposals_in_a_pickle(split: str, coco: Path, tmp_path: Path) -> None:
    key = f"dataloader.{split}.dataset.proposal_files"
    argv = det_argv(coco, tmp_path / "out", f"{key}=['{hostile(tmp_path, 'pickle.pkl')}']")
    ends_in_a_line(train_det.main, argv, tmp_path, f"{key}=")


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("door", ["--pretrained", "--checkpoint", "--resume"])
def test_train_det_torchvision(
    door: str, name: str, coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(torchvision_model.PRESETS, "tiny", coco_folder.TINY_PRESET)
    out, path = tmp_path / "out", hostile(tmp_path, name)
    extra = [door, path, *(["--eval-only"] if door == "--checkpoint" else [])]
    if door == "--resume":
        if name.endswith(("pkl", "safetensors")):
            pytest.skip("it resumes from last.pth only")
        out.mkdir()
        path.rename(out / "last.pth")
        extra = [door]
    ends_in_a_line(train_det_torchvision.main, [coco, "--out", out, *coco_folder.TINY, *extra], tmp_path)


@pytest.mark.parametrize("name", FORMATS)
def test_convert_checkpoint(name: str, tmp_path: Path) -> None:
    ends_in_a_line(convert_checkpoint.main, [hostile(tmp_path, name), tmp_path / "out.pth"], tmp_path)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "mmseg", "detectron2"])
def test_check_identity(model: str, name: str, seg: list[str], tmp_path: Path) -> None:
    named = {"mmseg": seg[0], "detectron2": tiny_coco.ADAPTIVE}.get(model, model)
    host = [] if named == model else ["--host", model]
    ends_in_a_line(check_identity.main, [named, *host, "--checkpoint", hostile(tmp_path, name)], tmp_path)


@pytest.mark.parametrize("name", FEW)
def test_measure_accuracy(name: str, seg: list[str], tmp_path: Path) -> None:
    path, common = hostile(tmp_path, name), ["--sizes", "64x96", "--out", tmp_path / "out"]
    photos, masks = (Path(seg[2]) / kind / "validation" for kind in ("images", "annotations"))
    features = ["features", "--model", "vit_tiny_patch16_224", "--weights", path, "--photos", photos]
    ends_in_a_line(measure_accuracy.main, [*features, *common], tmp_path)
    labels = ["labels", "--config", seg[0], "--checkpoint", path, "--images", photos, "--masks", masks]
    ends_in_a_line(measure_accuracy.main, [*labels, *common], tmp_path)


#: Tools that look at the weights of a config for what they say of the patches, or build its model.
LOOKING = {
    "visualize": (visualize.main, ["photos", "--config", "config"]),
    "calibrate": (calibrate.main, ["photos", "--tokens", "0.6", "--config", "config"]),
    "calibrate to a time": (calibrate.main, ["photos", "--milliseconds", "9", "--square", "64", "--config", "config"]),
    "calibrate through a pipeline": (calibrate.main, ["--pipeline", "config", "--data-root", "data"]),
    "report": (report.main, ["photos", "--config", "config"]),
}


def run_looking(tool: str, lines: str, seg: list[str], folder: Path) -> None:
    config = folder / "config.py"
    config.write_text(f"_base_ = {seg[0]!r}\n{lines}\n")
    words = {"photos": Path(seg[2]) / "images" / "validation", "data": seg[2], "config": config}
    main, argv = LOOKING[tool]
    ends_in_a_line(main, [*(words.get(word, word) for word in argv), "--out", folder / "out"], folder)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("tool", LOOKING)
def test_tools_that_look_at_a_config_s_weights(tool: str, name: str, seg: list[str], tmp_path: Path) -> None:
    weights = f"img_size=64, thresholds=(5.5,), pretrained={str(hostile(tmp_path, name))!r}"
    run_looking(tool, f"model = dict(backbone=dict(_delete_=True, type='APTViT', {weights}))", seg, tmp_path)


def test_a_pickle_in_a_model_that_is_timed(seg: list[str], tmp_path: Path) -> None:
    weights = str(hostile(tmp_path, "pickle.pkl"))
    lines = f"model = dict(decode_head=dict(loss_decode=dict(class_weight={weights!r})))"
    run_looking("calibrate to a time", lines, seg, tmp_path)


@pytest.mark.parametrize("name", ["local-dir:{}", "hf-hub:owner/name"])
def test_names_that_are_measured_are_not_paths(name: str, seg: list[str], tmp_path: Path) -> None:
    hostile(tmp_path, "zip.pth").rename(tmp_path / "pytorch_model.bin")
    argv = ["features", "--model", name.format(tmp_path), "--photos", seg[2], "--sizes", "64x96"]
    ends_in_a_line(measure_accuracy.main, [*argv, "--out", tmp_path / "out"], tmp_path, "timm has no model")


@pytest.mark.parametrize("name", ["timm://local-dir:{}", "timm://hf-hub:owner/name"])
def test_names_of_timm_are_not_paths(name: str, seg: list[str], tmp_path: Path) -> None:
    hostile(tmp_path, "zip.pth").rename(tmp_path / "pytorch_model.bin")
    extra = option("model.backbone.pretrained")(name.format(tmp_path))
    ends_in_a_line(train_seg.main, seg_argv(seg, tmp_path / "work", extra), tmp_path, "timm has no model")


# ---- addresses


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server of ``tmp_path`` on this machine, and an empty cache of downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("door", [*SEG_DOORS, "marker", "eval"])
def test_addresses_in_segmentation(door: str, address: str, seg: list[str], tmp_path: Path) -> None:
    url = f"{address}/{hostile(tmp_path, 'zip.pth').name}"
    if door == "eval":
        ends_in_a_line(eval_seg.main, [*seg, "--work-dir", tmp_path / "w", url], tmp_path)
        return
    if door == "marker":
        (tmp_path / "last_checkpoint").write_text(url)
    extra = ["--resume"] if door == "marker" else SEG_DOORS[door](url)
    ends_in_a_line(train_seg.main, seg_argv(seg, tmp_path, extra), tmp_path)


@pytest.mark.parametrize("name", ["zip.pth", "pickle.pkl"])
def test_addresses_in_detection(name: str, address: str, coco: Path, tmp_path: Path) -> None:
    url = f"{address}/{hostile(tmp_path, name).name}"
    ends_in_a_line(train_det.main, det_argv(coco, tmp_path / "out", f"train.init_checkpoint={url}"), tmp_path)


@pytest.mark.parametrize("door", ["load_from", "pretrained"])
def test_addresses_that_are_not_there_are_named(door: str, address: str, seg: list[str], tmp_path: Path) -> None:
    extra = SEG_DOORS[door](f"{address}/none.pth")
    message = ends_in_a_line(train_seg.main, seg_argv(seg, tmp_path, extra), tmp_path, "cannot be downloaded")
    assert f"{address}/none.pth" in message


def test_detectron2_names_addresses_that_are_not_there(address: str, coco: Path, tmp_path: Path) -> None:
    argv = det_argv(coco, tmp_path / "out", f"train.init_checkpoint={address}/none.pth")
    assert f"{address}/none.pth" in ends_in_a_line(train_det.main, argv, tmp_path, "cannot be fetched")


# ---- what the Runner does with a file that could be read


def good_run(path: Path, **meta: object) -> None:
    """Write what a Runner would resume from, with other entries of its description."""
    state = {"backbone.unknown": torch.ones(1)}
    run = {"message_hub": {}, "optimizer": {}, "param_schedulers": [{}]}
    torch.save({"state_dict": state, "meta": {"iter": 1, "epoch": 0, **meta}, **run}, path)


def test_a_config_inside_a_checkpoint_is_not_run(seg: list[str], tmp_path: Path) -> None:
    """MMEngine runs ``meta["config"]`` as Python when it resumes."""
    path = tmp_path / "run.pth"
    good_run(path, config=f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    assert set(load_from_safe(str(path))["meta"]) == {"iter", "epoch"}
    extra = ["--resume", *option("load_from")(path)]
    ends_in_a_line(train_seg.main, seg_argv(seg, tmp_path / "work", extra), tmp_path, "does not fit")


def test_a_file_that_is_swapped_after_the_check_is_refused(
    seg: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, check = tmp_path / "weights.pth", train_seg.check_data
    torch.save({"state_dict": {}}, path)

    def swap(*args: object, **options: object) -> None:  # comes after load_config, which has read the good file
        check(*args, **options)
        hostile(tmp_path, "zip.pth").replace(path)

    monkeypatch.setattr(train_seg, "check_data", swap)
    ends_in_a_line(train_seg.main, seg_argv(seg, tmp_path / "work", option("load_from")(path)), tmp_path)


def test_weights_of_which_none_fits_are_not_trained_from(seg: list[str], tmp_path: Path) -> None:
    torch.save(APTViT(**SMALL).state_dict(), tmp_path / "vit.pth")
    extra = option("load_from")(tmp_path / "vit.pth")
    message = ends_in_a_line(train_seg.main, seg_argv(seg, tmp_path / "work", extra), tmp_path, "none of its")
    assert "pos_embed" in message and "backbone." in message and "backbone.pretrained" in message


def test_tools_are_run_as_scripts_with_a_status(tmp_path: Path) -> None:
    """sys.exit with a message is status 1."""
    tool = Path(convert_checkpoint.__file__)
    argv = [sys.executable, "-W", "ignore", tool, hostile(tmp_path, "zip.pth"), tmp_path / "out.pth"]
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tool.parents[1])})
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and not (tmp_path / "ran").exists()
