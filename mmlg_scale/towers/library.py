"""open_clip itself, imported in one place and only when asked for, since that takes seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmlg_scale.towers.torchvision_ops import provide_operators

provide_operators()

import open_clip  # noqa: E402
from open_clip.transformer import TextTransformer, VisionTransformer  # noqa: E402

__all__ = ["TextTransformer", "VisionTransformer", "build_tower", "open_clip"]


def build_tower(config: Mapping[str, Any], modality: str) -> VisionTransformer | TextTransformer:
    """open_clip's tower of a configuration, with a random start; `modality` is image or text."""
    quick_gelu = config.get("quick_gelu", False)
    if modality == "image":
        fields = open_clip.CLIPVisionCfg(**config["vision_cfg"])
        return open_clip.model._build_vision_tower(config["embed_dim"], fields, quick_gelu)
    return open_clip.model._build_text_tower(config["embed_dim"], open_clip.CLIPTextCfg(**config["text_cfg"]), quick_gelu)
