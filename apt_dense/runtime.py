"""``torch.compile``: what stays out of its graphs.

Without a token budget the number of tokens comes from the device, and loops over buckets depend on it. Compiled, they
would make graphs for each image. All around them, which depends on the number of rows alone, is compiled.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def outside_graphs(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function, which ``torch.compile`` then calls as it is, and all that it calls."""
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function
