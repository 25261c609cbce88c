"""Models as a data set meets them: nothing but sizes, preprocessing and tokenizer."""

from __future__ import annotations

from pathlib import Path

from mmlg_scale import towers
from mmlg_scale.data.tokens import load_tokenizer


def spec_for(root: Path, image_size: int = 32, context_length: int = 16, preprocess: towers.Preprocess | None = None) -> towers.ModelSpec:
    """A small model with the tokenizer that the data set offers, or byte pairs."""
    tokenizer = load_tokenizer(root)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": image_size, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1},
        "text_cfg": {"context_length": context_length, "vocab_size": tokenizer.vocab_size, "width": 16, "heads": 2, "layers": 1},
    }
    return towers.ModelSpec(towers.model_config(config), preprocess or towers.Preprocess(), tokenizer)
