"""Makes torchvision, and so open_clip, importable beside a CPU-only torch.

PyPI's torchvision is a CUDA build. Beside a CPU-only torch its compiled operators cannot be loaded and importing it fails; declaring them
is enough, since nothing here calls them. Where they can be loaded, they are, and nothing is declared.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_declared: list[torch.library.Library] = []
"""A reference keeps a declaration alive."""


def provide_operators() -> None:
    """Load torchvision's operators, or declare them where that fails. Nothing happens where torchvision is not installed."""
    found = importlib.util.find_spec("torchvision")
    if found is None or not found.submodule_search_locations or hasattr(torch.ops.torchvision, "nms"):
        return
    for extension in Path(found.submodule_search_locations[0]).glob("_C*.so"):
        try:
            torch.ops.load_library(str(extension))
        except OSError:
            continue
        return
    library = torch.library.Library("torchvision", "DEF")
    _declared.append(library)
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
