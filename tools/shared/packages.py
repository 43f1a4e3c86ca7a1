"""End a tool with one line where a package that it needs is not installed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_DETECTRON2 = "pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2 shapely omegaconf"
_MMSEG = 'pip install "apt_dense[mmseg]"'
#: How to install a package, by the name that Python imports.
INSTALL = {
    "mmengine": _MMSEG,
    "mmcv": _MMSEG,
    "mmseg": _MMSEG,
    "detectron2": _DETECTRON2,
    "fvcore": _DETECTRON2,
    "omegaconf": _DETECTRON2,
    "iopath": _DETECTRON2,
    "shapely": "pip install shapely",
    "pycocotools": "pip install pycocotools",
    "supervision": "pip install supervision",
    "skimage": "pip install scikit-image",
    "cv2": "pip install opencv-python",
    "PIL": "pip install pillow",
    "yaml": "pip install pyyaml",
    "numpy": "pip install numpy",
    "matplotlib": "pip install matplotlib",
    "tqdm": "pip install tqdm",
    "gradio": 'pip install "apt_dense[explore]"',
    "timm": "pip install timm",
    "torch": "pip install torch torchvision",
    "torchvision": "pip install torch torchvision",
    "safetensors": "pip install safetensors",
}


@contextmanager
def needed_packages(tool: str) -> Iterator[None]:
    """Turn the error of a missing package into a line "TOOL: ... pip install ..." and exit status 1.

    An error of another module stays as it is: it is a fault of ours.
    """
    try:
        yield
    except ImportError as error:
        # A package may be missing as a whole, or found in a form that lacks the module.
        package = (error.name or "").split(".")[0]
        if package not in INSTALL:
            raise
        sys.exit(f"{tool}: {package} cannot be imported ({str(error).splitlines()[0]}); install it: {INSTALL[package]}")
