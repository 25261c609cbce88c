"""open_clip, imported in one place: beside a CPU-only torch it needs help."""

from __future__ import annotations

import torch

# PyPI's torchvision is a CUDA build. Beside a CPU-only torch its two compiled operators are missing and importing it fails; declaring
# them is enough, since nothing here calls them. The reference keeps the declaration alive.
_TORCHVISION = None
if not hasattr(torch.ops.torchvision, "nms"):
    _TORCHVISION = torch.library.Library("torchvision", "DEF")
    for _operator in ("nms", "qnms"):
        _TORCHVISION.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import open_clip  # noqa: E402
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg  # noqa: E402
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer  # noqa: E402

__all__ = [
    "CLIP",
    "CLIPTextCfg",
    "CLIPVisionCfg",
    "ResidualAttentionBlock",
    "TextTransformer",
    "VisionTransformer",
    "open_clip",
]
