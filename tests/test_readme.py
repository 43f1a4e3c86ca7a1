"""Every code block of the README and of docs/YOUR_DATA.md runs as it stands (those of the page with -m slow).

The blocks of a section run one after the other in a folder of their own, which looks like this repository. Files that
they name are made there first: add a line to ``MAKERS`` for another one. A block that starts with "# NAME.py" or
"# NAME.txt" is saved as that file; one of the language "text" that does not is only shown.
"""

from __future__ import annotations

import configparser
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from support.annotation_files import write_voc, write_yolo
from support.markdown_blocks import ROOT, Block, repository, run_block, sections_of
from support.own_folder import write_own

#: Page -> the level of the headings below which blocks build on each other.
PAGES = {"README.md": 3, "docs/YOUR_DATA.md": 2}
SECTIONS = {f"{Path(page).name}: {name}": (page, blocks) for page, level in PAGES.items()
            for name, blocks in sections_of(ROOT / page, level).items()}  # fmt: skip
#: Commands after "pip install" that .ci/run takes from the README and runs itself, since they take minutes.
RUN_BY_CI = "python tools/quickstart.py", "pytest"
#: Text in a block -> the packages without which it is skipped.
NEEDS = {
    "detectron2": ("detectron2",), "tools/train_det.py": ("detectron2", "shapely"), "_seg.py": ("mmseg",),
    "apt_dense.hosts.mmseg": ("mmengine",), "_torchvision.py": ("pycocotools", "cv2"),
    "tools/predict.py": ("supervision",), "tools/": ("cv2", "tqdm"),
}  # fmt: skip


# ---- files that blocks name


def _weights(name: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        torch.save(timm.create_model(name, num_classes=0).state_dict(), path)

    return write


def _photo(path: Path) -> None:
    rows, columns = np.mgrid[:238, :322]
    Image.fromarray(np.stack([rows, columns // 2, (rows * columns) % 256], axis=2).astype(np.uint8)).save(path)


def _streets(kind: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        write_own(path, kind, count=4, classes=None)

    return write


def _cracks(path: Path) -> None:
    write_own(path, "binary", count=10, folders=("images", "masks"), splits=("all",), classes=None)


def _fields(path: Path) -> None:
    write_own(path, folders=("rgb/{}", "truth/{}"), splits=("first", "second"))


def _raccoons(path: Path) -> None:
    write_voc(path, 5, classes=1)


def _converted(path: Path) -> None:
    run_block(Block("sh", f"python tools/convert_annotations.py voc {path} --val-share 0.2", 0), path.parents[1])


def _shapes(path: Path) -> None:
    write_yolo(path, 4)
    (path / "data.yaml").write_text("names: [raccoon, cat]\ntrain: images\nval: images\n")


def _flat_to_noisy(path: Path) -> None:
    path.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        amount = rng.uniform(0, 40, (8, 10, 1)).repeat(32, 0).repeat(32, 1)
        photo = 128 + amount * rng.standard_normal((256, 320, 3))
        Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(path / f"{number}.png")


def _halves(path: Path) -> None:
    path.mkdir()
    mask = np.repeat([0, 1], 128).astype(np.uint8)[:, None].repeat(320, 1)
    for number in range(6):
        Image.fromarray(mask).save(path / f"{number}.png")


#: What is made where a section names it.
MAKERS: dict[str, Callable[[Path], None]] = {
    "dinov2_vits14_pretrain.pth": _weights("vit_small_patch14_dinov2"),
    "photo.jpg": _photo,
    "my_photos": _flat_to_noisy,
    "my_masks": _halves,
    "data/cracks": _cracks,
    "data/fields": _fields,
    "data/raccoons": _raccoons,
    "data/raccoons/annotations/instances_train.json": lambda path: _converted(path.parents[1]),
    "data/shapes": _shapes,
}
STREETS = {"README.md": _streets("values"), "docs/YOUR_DATA.md": _streets("colours")}


# ---- the tests


#: Those of the page train for minutes, and run with pytest -m slow.
CASES = [pytest.param(section, marks=[] if section.startswith("README") else pytest.mark.slow) for section in SECTIONS]


@pytest.mark.parametrize("section", CASES)
def test_blocks_run_as_they_stand(section: str, tmp_path: Path) -> None:
    page, blocks = SECTIONS[section]
    folder = repository(tmp_path / "repository")
    text = "".join(block.text for block in blocks)
    for name, make in {**MAKERS, "data/streets": STREETS[page]}.items():
        if name in text:
            make(folder / name)
    ran, lacking = 0, set()
    for block in filter(lambda block: not _is_installation(block), blocks):
        missing = {package for package in _packages(block) if importlib.util.find_spec(package) is None}
        if missing:
            lacking |= missing
        else:
            run_block(block, folder)
            _check(block, folder)
            ran += 1
    if lacking:
        pytest.skip(f"all but {ran} of {len(blocks)} blocks need {', '.join(sorted(lacking))}")


def _packages(block: Block) -> set[str]:
    return {package for word, packages in NEEDS.items() if word in block.text for package in packages}


def _is_installation(block: Block) -> bool:
    return block.language == "sh" and all(line.startswith("pip install") for line in block.text.splitlines())


def _check(block: Block, folder: Path) -> None:
    """Do with a block that only defines something what its reader does next."""
    if block.file and "_base_" in block.text:
        code = f"from apt_dense.hosts.mmseg.training_config import load_config; load_config({block.file!r})"
        run_block(Block("python", code, block.line), folder)
    elif block.text.startswith("custom_imports"):
        build = "import apt_dense.hosts.mmseg\nfrom mmengine.registry import MODELS\nMODELS.build(model['backbone'])\n"
        run_block(Block("python", block.text + build, block.line), folder)
    elif "data/cracks &&" in block.text:
        kept = {split: len(list((folder / "data/cracks" / "masks" / split).iterdir())) for split in ("train", "val")}
        assert kept == {"train": 8, "val": 2}


def test_every_block_is_of_a_kind_that_is_run() -> None:
    assert len(SECTIONS) > 6 and {block.language for _, blocks in SECTIONS.values() for block in blocks} <= {
        "sh", "python", "text",
    }  # fmt: skip


def test_installations_name_extras_that_exist_and_commands_that_ci_runs() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [line for _, blocks in SECTIONS.values() for block in blocks if _is_installation(block)
             for line in block.text.splitlines()]  # fmt: skip
    ci = (ROOT / ".ci" / "run").read_text()
    assert lines
    for line in lines:
        extras = re.findall(r'"\.\[([\w,]+)\]"', line)
        assert all(extra in setup["options.extras_require"] for found in extras for extra in found.split(","))
        command = line.partition("&& ")[2]
        assert not command or (command in RUN_BY_CI and f"readme_command '{command}'" in ci.replace("'&& ", "'"))


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, "docs/HOSTS.md", "docs/CHECKPOINTS.md"]:
        text = (ROOT / page).read_text()
        headings = {
            re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in re.findall(r"^#+ (.+)", text, re.M)
        }
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            name, _, anchor = target.partition("#")
            if "://" not in target:
                assert not name or (ROOT / page).parent.joinpath(name).exists(), (page, target)
                assert name or anchor in headings, (page, target)
