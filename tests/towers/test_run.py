"""Towers block by block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmlg_scale import towers
from tests.towers.models import PLAIN, WIDE, batch, clip_of, features


@pytest.mark.parametrize("config", [PLAIN, WIDE])
def test_blocks_one_by_one_are_the_whole_tower(config: dict[str, Any]) -> None:
    """Features bit for bit, and tapped hidden states as forward hooks see them."""
    clip = clip_of(config)
    images, texts = batch(config)
    seen: list[Tensor] = []
    hook = clip.visual.transformer.resblocks[1].register_forward_hook(lambda module, args, out: seen.append(out))
    image_features, text_features = features(clip, config)
    hook.remove()
    with torch.no_grad():
        found, hidden = towers.encode_image_with_hidden(clip, images, tap=(2,))
        assert torch.equal(found, image_features)
        assert torch.equal(towers.encode_text_with_hidden(clip, texts)[0], text_features)
    assert torch.equal(hidden[0], seen[0])
