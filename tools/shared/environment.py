"""What a figure depends on besides the code."""

import os
import platform
import re
from pathlib import Path

import torch


def environment(device: torch.device) -> str:
    """Name torch, the processor, and its threads."""
    if device.type == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name(device)}"
    cpu = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpu.read_text()) if cpu.exists() else None
    name = found[1] if found else platform.machine()
    return f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads of {os.cpu_count()}"
