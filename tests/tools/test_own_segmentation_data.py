"""From folders of one's own to a trained, tested and drawn model, with the configs for it and a tiny ViT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from support.own_folder import COLOURS, SIZE, write_own
from support.threads import one_thread  # noqa: F401 (a fixture)

pytest.importorskip("mmseg", reason="the segmentation tools need the packages of the extra 'mmseg'")

import eval_seg
import train_seg
import visualize

from apt_dense.hosts.load_trained import load_trained

pytestmark = pytest.mark.filterwarnings("ignore")  # MMSeg's own

CONFIGS = Path(__file__).parents[2] / "configs" / "mmseg"
SMALL = ["image_size=96", *(f"{split}_dataloader.{key}" for split in ("train", "val", "test")
                            for key in ("num_workers=0", "persistent_workers=False"))]  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of timm's smallest ViT."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), path)
    return path


def own_config(path: Path, base: str, data: Path, weights: Path) -> str:
    """A config as docs/YOUR_DATA.md shows it."""
    lines = f'_base_ = "{CONFIGS / base}"', f'data_root = "{data}"', f'pretrained = "{weights}"'
    path.write_text("\n".join([*lines, 'architecture = "test_vit"', ""]))
    return str(path)


@pytest.mark.parametrize(
    ("base", "kind", "folders", "iterations"),
    [
        ("own_data_hundreds.py", "colours", ("{}", "{}annot"), 60),
        ("own_data_ten_thousands.py", "palette", ("images/{}", "masks/{}"), 2),
    ],
)
def test_train_test_and_draw(
    base: str, kind: str, folders: tuple[str, str], iterations: int, weights: Path, tmp_path: Path
) -> None:
    data = write_own(tmp_path / "streets", kind, 4, folders, classes=COLOURS if kind == "colours" else None)
    if kind == "palette":
        (data / "classes.txt").write_text("0 sky\n1 road\n2 car\n3 void\n")
    config, work = own_config(tmp_path / "own.py", base, data, weights), tmp_path / "work"
    size = [*SMALL, "model.decode_head.channels=64", "model.auxiliary_head.channels=16"] if "ten" in base else SMALL
    options = ["--work-dir", str(work), "--cfg-options", *size]
    train_seg.main([config, "--max-iters", str(iterations), *options])

    checkpoint = str(work / f"iter_{iterations}.pth")
    out = ["--out", str(tmp_path / "masks"), "--show-dir", str(tmp_path / "drawn")]
    scores = eval_seg.main([config, checkpoint, *out, *options])
    assert 0 <= scores["mIoU"] <= 100 and (iterations < 60 or scores["mIoU"] > 50), "a third of it is chance"
    assert len(list((tmp_path / "drawn").rglob("*.png"))) == 4
    predicted = np.asarray(Image.open(tmp_path / "masks" / "street_0.png"))
    assert predicted.shape == SIZE and set(np.unique(predicted)) <= {0, 1, 2}

    trained = load_trained(work)  # photos go through the same pipeline, without the reading of masks
    photo = np.asarray(Image.open(data / folders[0].format("val") / "street_0.jpg"))
    assert trained.class_names == ("sky", "road", "car") and np.array_equal(trained.predict(photo), predicted)


def test_augmented_tests_and_the_run_s_own_config(weights: Path, tmp_path: Path) -> None:
    """The config that a run leaves needs no weights any more, and shows the patches that the run used."""
    data = write_own(tmp_path / "streets", count=2)
    config = own_config(tmp_path / "own.py", "own_data_hundreds.py", data, weights)
    train_seg.main([config, "--max-iters", "1", "--work-dir", str(tmp_path / "work"), "--cfg-options", *SMALL])
    left = str(tmp_path / "work" / "own.py")
    options = ["--work-dir", str(tmp_path / "test"), "--tta"]
    assert "mIoU" in eval_seg.main([left, str(tmp_path / "work" / "iter_1.pth"), *options])
    visualize.main([str(data / "images" / "val"), "--out", str(tmp_path / "patches"), "--config", left])
    assert len(list((tmp_path / "patches").glob("*.png"))) == 2
    whole = visualize.read_config(Path(left))
    Path(config).write_text(f"{Path(config).read_text()}image_size = 96\n")
    short = visualize.read_config(Path(config))  # tells the same: patches and sizes of its weights and lines
    assert visualize.config_options(short) == visualize.config_options(whole)
    assert visualize.config_scale(short) == visualize.config_scale(whole) == (384, 96)


def test_a_list_that_lacks_a_value_ends_in_a_line(weights: Path, tmp_path: Path) -> None:
    data = write_own(tmp_path / "streets", classes="0 sky\n1 road\n3 void\n")
    config = own_config(tmp_path / "own.py", "own_data_hundreds.py", data, weights)
    with pytest.raises(SystemExit) as ended:
        train_seg.main([config, "--work-dir", str(tmp_path / "work")])
    message = str(ended.value.code)
    assert message.startswith("train_seg: ") and "does not list: 2; add lines such as '2 NAME'" in message
    assert "\n" not in message
