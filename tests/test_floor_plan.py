"""The floor plan: each room imports only from rooms below it, and questions are asked in one place."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import apt_dense

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "apt_dense"
#: From the ground up. A file or folder imports from its own folder and from what stands before it.
FLOORS = ["runtime", "option_checks", "options", "patches", "layout", "ops", "nn", "weights", "vit", "drawing", "hosts"]
#: Files without a test file of their own name, and the tests that hold them.
TESTED_ELSEWHERE = {
    "layout/tokens.py": "layout/test_packed.py",
    "layout/window_geometry.py": "layout/test_packed.py",
    "patches/blocks_of_pixels.py": "patches/test_scores.py",
    "patches/histogram_scores.py": "patches/test_scores.py",
    "patches/contrast_scores.py": "patches/test_scores.py",
    "patches/image_preparation.py": "patches/test_partition.py",
    "nn/layers.py": "nn/test_block.py",
    "nn/attention.py": "nn/test_block.py",
    "ops/kernels/interface.py": "ops/test_attention.py",
    "ops/kernels/length_buckets.py": "ops/test_attention.py",
    "ops/kernels/sdpa_bias_as_channels.py": "ops/test_attention.py",
    "ops/kernels/sdpa_bias_as_mask.py": "ops/test_attention.py",
    "ops/kernels/cpu_sliced.py": "ops/test_attention.py",
    "ops/kernels/cpu_sliced_bfloat16.py": "ops/test_slices_in_bfloat16.py",
    "ops/kernels/sliced_heads.py": "ops/test_attention.py",
    "ops/kernels/varlen.py": "ops/test_attention.py",
    "ops/kernels/flex.py": "ops/test_attention.py",
    "ops/bias.py": "nn/test_relative.py",
    "weights/arguments_by_family.py": "weights/test_arguments_from_file.py",
    "weights/arguments_from_shapes.py": "weights/test_arguments_from_file.py",
    "weights/loading_mixin.py": "weights/test_load.py",
    "weights/find_backbone_weights.py": "weights/test_load.py",
    "weights/timm_block_arguments.py": "weights/test_timm_arguments.py",
    "option_checks.py": "test_options.py",
    "hosts/coco_lenient_values.py": "hosts/test_coco_annotations.py",
    "hosts/coco_outlines.py": "hosts/test_coco_annotations.py",
    "hosts/coco_picture_sizes.py": "hosts/test_coco.py",
    "hosts/detectron2/patch_options_of_train.py": "tools/test_train_det.py",
    "hosts/torchvision/pixel_transform.py": "hosts/torchvision/test_detectors.py",
    "hosts/torchvision/pyramid.py": "hosts/torchvision/test_detectors.py",
    "hosts/torchvision/safe_checkpoints.py": "tools/test_train_det_torchvision.py",
    "hosts/torchvision/build_detector.py": "tools/test_train_det_torchvision.py",
    "hosts/trained_model_types.py": "hosts/test_load_trained.py",
    "hosts/mmseg/trusted_config_types.py": "hosts/mmseg/test_load_trained_segmentor.py",
    "hosts/vit_sizes_and_windows.py": "tools/test_train_det_torchvision.py",
}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def tree_of(path: Path) -> ast.Module:
    return ast.parse((PACKAGE / path).read_text(encoding="utf-8"))


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, dotted, without the package's name."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "apt_dense":
            inside = node.module.removeprefix("apt_dense").removeprefix(".")
            found |= {f"{inside}.{alias.name}".strip(".") for alias in node.names} | {inside}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("apt_dense.") for a in node.names if a.name.startswith("apt_dense.")}
    return found - {""}


def floor_of(module: str) -> int:
    return FLOORS.index(module.split(".")[0])


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_come_from_below(path: Path) -> None:
    own = floor_of(path.parts[0].removesuffix(".py"))
    for module in imports_of(path):
        if module.split(".")[0] in FLOORS:
            assert floor_of(module) <= own, f"{path} imports {module} from above"


def test_no_imports_in_circles() -> None:
    modules = {".".join(path.with_suffix("").parts): imports_of(path) for path in FILES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for other in modules[module] & modules.keys():
                visit(other, (*trail, module))
            done.add(module)

    for module in modules:
        visit(module, ())


def test_the_core_imports_no_host() -> None:
    hosts = {"detectron2", "mmengine", "mmcv", "mmseg", "pycocotools", "cv2", "PIL", "matplotlib", "skimage"}
    for path in FILES:
        if path.parts[0] != "hosts":
            names = {name.split(".")[0] for name in foreign_imports(path)}
            assert not names & hosts, path


def foreign_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_tests_mirror_the_rooms(path: Path) -> None:
    expected = TESTED_ELSEWHERE.get(str(path), str(path.with_name(f"test_{path.name}")))
    assert (ROOT / "tests" / expected).is_file()


def test_device_and_compiler_are_asked_for_in_one_place() -> None:
    """In runtime.py, and by kernels, which say where they can run."""
    for path in FILES:
        if path.parts[0] in ("runtime.py", "ops"):
            continue
        asked = {
            node.attr
            for node in ast.walk(tree_of(path))
            if isinstance(node, ast.Attribute)
            and (node.attr in ("is_compiling", "is_cuda", "is_available") or ast.unparse(node).endswith("device.type"))
        }
        assert not asked or path.parts[0] == "hosts", (path, asked)


def test_packed_or_fixed_is_asked_by_two_modules_at_most() -> None:
    """Everything else asks the layout itself."""
    asking = [
        path
        for path in FILES
        if path.parts[0] != "layout"
        and any(isinstance(n, ast.Attribute) and n.attr in ("is_fixed", "are_all") for n in ast.walk(tree_of(path)))
    ]
    assert [str(path) for path in asking] == ["nn/patch_embed.py", "nn/relative.py"]


def functions_of(path: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.walk(tree_of(path)):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                yield (f"{node.name}.{child.name}" if isinstance(node, ast.ClassDef) else child.name), child


@pytest.mark.parametrize("path", FILES, ids=str)
def test_functions_take_few_arguments_and_constructors_are_short(path: Path) -> None:
    for name, function in functions_of(path):
        arguments = function.args
        count = len([a for a in arguments.posonlyargs + arguments.args if a.arg not in ("self", "cls")])
        count += len(arguments.kwonlyargs)
        hosts_own = path.parts[0] == "hosts" and name.endswith("__init__")
        # torch and Detectron2 say what these take.
        given = name.endswith(("_load_from_state_dict", "build_resumable_loader"))
        assert count <= 8 or hosts_own or given or name == "mask_rcnn", f"{path}: {name} takes {count} arguments"
        if name.endswith("__init__"):
            first, last = function.body[0].lineno, function.body[-1].end_lineno
            assert last - first < 60, f"{path}: {name}"


def test_files_are_short() -> None:
    lines = {str(path): len((PACKAGE / path).read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert lines["vit.py"] <= 230
    assert not {path: count for path, count in lines.items() if count > 350}


def test_public_names_are_listed_in_the_readme() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    listed = re.search(r"Public names of `apt_dense`: (.*?)\. ", text)[1]
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(apt_dense.__all__)
    assert all(hasattr(apt_dense, name) for name in apt_dense.__all__)
