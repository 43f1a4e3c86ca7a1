"""What a figure depends on besides the code."""

import os

import torch

from apt_dense.ops.onednn_matmul import PRODUCTS, is_faster
from apt_dense.runtime import describe_machine


def environment(device: torch.device) -> str:
    """Name torch, the processor, its instruction sets and threads, and the library of its float32 products."""
    if device.type == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name(device)}"
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()}"
    forward, training = (PRODUCTS[is_faster(trains)] for trains in (False, True))
    products = forward if forward == training else f"{forward} (in training {training})"
    return f"torch {torch.__version__}, {describe_machine()}, {threads}, products by {products}"
